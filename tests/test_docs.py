"""The documentation: every code block runs, every public name says what it has to, every optimizer has its page."""

import inspect
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from options import NAMES

import fusedopt
from fusedopt.__main__ import arguments

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import generated  # noqa: E402

PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
PAGES |= {f"docs/optimizers/{name}.md": generated.page(name) for name in NAMES}


def blocks(text):
    return re.findall(r"^```python[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def execute(text, folder):
    """All blocks of a page, one after the other, as a file of its own: Triton wants to read its functions' source."""
    file = folder / "page.py"
    file.write_text("\n".join(blocks(text)))
    before = dict(fusedopt.registry)
    try:
        runpy.run_path(str(file))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert fusedopt.registry == before


LESSON = "docs/lesson.md"  # has a test of its own


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text) and page != LESSON])
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    execute(PAGES[page], tmp_path)


def test_every_block_is_found():
    """Indented, or under another name, a block would escape."""
    for page, text in PAGES.items():
        assert len(blocks(text)) == len(re.findall(r"``` *py", text)), page


SHELL = "\n".join([*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text()])


@pytest.mark.parametrize(
    "command", sorted({*re.findall(r"python -m fusedopt(?![.\w])([^`&\n]*)|`(--(?:schedule|data) [^`]*)`", SHELL)})
)
def test_command_lines_are_understood(command):
    arguments().parse_args(shlex.split("".join(command)))


def test_command_lines_name_what_there_is():
    scripts, extras = re.findall(r"python (bench/\w+\.py)", SHELL), re.findall(r"\.\[([\w-]+)\]", SHELL)
    assert len({*scripts}) > 5 and {"test", "dev", "docs", "test-frameworks"} <= {*extras}
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    project = (ROOT / "pyproject.toml").read_text()
    assert [extra for extra in extras if not re.search(rf"^{extra} = \[", project, re.MULTILINE)] == []


def test_the_lesson_prints_what_it_says(tmp_path, capsys):
    execute(PAGES[LESSON], tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"^accumulated -1\.1[45]\d*$", printed, re.MULTILINE)
    assert re.search(r"^velocity -1\.60*\d*$", printed, re.MULTILINE)
    assert "bias_correction=False: the first step is 0.316" in printed
    assert "bias_correction=True: the first step is 0.100" in printed
    assert "the loss reached" in printed
    rates = {name: float(value) for name, value in re.findall(r"^([\w ,-]+): (\d+\.\d)%", printed, re.MULTILINE)}
    assert len(rates) >= 9 and min(rates.values()) > 85  # chance is 10


def test_sections_of_the_readme_are_there():
    for text in PAGES.values():
        for section in re.findall(r"<!-- README: (.*) -->", text):
            assert len(generated.readme(section)) > 200, section


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in ROOT.glob("docs/*.md"):
        assert re.search(rf"[ -]{path.name}$", navigation, re.MULTILINE), path.name
    api = PAGES["docs/api.md"]
    public = {
        f"{module.__name__}.{name}" for module in (fusedopt.schedules, fusedopt.stopping) for name in module.__all__
    }
    public |= {f"fusedopt.{name}" for name in fusedopt.__all__ if name not in fusedopt.registry}
    for name in public - {"fusedopt.schedules", "fusedopt.stopping"}:
        assert re.search(rf"{re.escape(name)}\b", api), f"{name} is not on docs/api.md"


def test_every_optimizer_is_in_the_readmes_table_of_formulas():
    formulas = generated.readme("The formulas")
    for name in NAMES:
        assert re.search(rf"^\| `{name}\(", formulas, re.MULTILINE), name


# What a docstring has to say, and how one sees that it does.
SECTIONS = {
    "formula": r"<-|[Ff]ormula|\w = \w",
    "shapes": r"[Ss]hapes?\b",
    "dtypes": r"[Dd]types?\b|float32",
    "errors": r"Raises|[Ee]rrors?\b|raises",
    "source": r"Sources?:",
}
NUMERICAL = {
    **{name: cls for name, cls in vars(fusedopt).items() if name in fusedopt.registry},
    **{name: getattr(fusedopt, name) for name in ("FusedOptimizer", "GradScaler", "Rule")},
}
SCALAR = {
    name: getattr(module, name)
    for module in (fusedopt.schedules, fusedopt.stopping)
    for name in module.__all__
    if name != "Criterion"
}


def lacks(thing, sections):
    text = inspect.getdoc(thing) or ""
    return [name for name in sections if not re.search(SECTIONS[name], text)]


@pytest.mark.parametrize("name", NUMERICAL)
def test_docstrings_of_what_computes(name):
    assert not lacks(NUMERICAL[name], SECTIONS)


@pytest.mark.parametrize("name", SCALAR)
def test_docstrings_of_schedules_and_criteria(name):
    assert not lacks(SCALAR[name], ["formula", "errors", "source"])


@pytest.mark.parametrize("name", sorted({*fusedopt.__all__} - {*NUMERICAL, "registry"}))
def test_docstrings_of_everything_else(name):
    thing = getattr(fusedopt, name)
    if inspect.ismodule(thing):
        assert not lacks(thing, ["formula"])
        return
    assert not lacks(thing, ["errors"])
    if inspect.isfunction(thing):
        assert all(section in thing.__doc__ for section in ("Args:", "Raises:"))
        undocumented = [
            p for p in inspect.signature(thing).parameters if not re.search(rf"^ +{p}\b", thing.__doc__, re.M)
        ]
        assert not undocumented


@pytest.mark.parametrize("name", NAMES)
def test_pages_of_optimizers(name):
    """Formula, arguments, picture, bytes, sources; nothing that a signature has is missing."""
    text = PAGES[f"docs/optimizers/{name}.md"]
    for heading in ("Formula", "Its path", "Example", "Arguments", "Memory and traffic", "Sources"):
        assert f"\n## {heading}\n" in text
    cls = fusedopt.registry[name]
    for argument in inspect.signature(cls).parameters:
        assert f"| `{argument}` |" in text
        said = argument in cls.settings_class.fields() or generated.meaning(cls, argument)
        assert said, f"{argument} is explained neither in docs/generated.py nor in the class"
    assert "https://arxiv.org/abs/" in text or "Coursera" in text or "(19" in text or "JMLR" in text
    assert ("torch.optim." in text.split("## Sources")[1]) == hasattr(torch.optim, name)
    assert f"[{name}]({name}.md)" in generated.overview()


def test_bytes_are_those_of_the_states():
    """Two states of four bytes for Adam; SGD reads the gradient, and reads and writes the parameter."""
    adam, sgd = (generated.default_rule(cls) for cls in (fusedopt.Adam, fusedopt.SGD))
    assert (generated.state(adam), generated.moved(adam)) == (8, 28)
    assert (generated.state(sgd), generated.moved(sgd)) == (0, 12)
    assert [generated.takes_means(cls) for cls in (fusedopt.StableAdamW, fusedopt.AdamW)] == [True, False]
