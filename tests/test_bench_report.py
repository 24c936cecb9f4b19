"""Rows of measurements, and the tables and plots that are made of them."""

import dataclasses
import sys

import growth
import history
import pytest
import report
from history import Row
from programs import BENCH, program


def a_row(**values):
    common = {
        "date": "2026-11-20", "commit": "abc1234", "machine": "a machine", "driver": "", "device": "cpu", "threads": 1,
        "python": "3.12", "torch": "2.13", "triton": "3.9", "part": "step", "model": "gpt2", "tensors": 148,
        "elements": 124_439_808, "optimizer": "AdamW", "dtype": "float32", "clip": False, "amp": False,
        "implementation": "fusedopt", "wall_us": 100.0, "wall_low": 90.0, "wall_high": 110.0, "host_us": 40.0,
        "bandwidth": 0.9, "memory_bytes": 995518464, "rival": "fused", "rival_us": 125.0, "ratio": 0.8,
        "ratio_low": 0.7, "ratio_high": 0.9, "rounds": 9,
    }  # fmt: skip
    return Row(**common | values)


class TestHistory:
    def test_rows_come_back(self, tmp_path):
        rows = [
            a_row(note="a, b\nand c"),
            a_row(clip=True, status="skipped", wall_us=None, ratio=None),
            Row("2026-11-21", "", "", "", "cuda", 1, "", "", "", part="check", implementation="graph", status="failed"),
        ]
        path = tmp_path / "history.csv"
        history.append(rows[:1], path)
        history.append(rows[1:], path)
        rows[0].note = "a, b and c"
        assert history.read(path) == (rows, [])

    def test_committed_rows_can_be_read(self):
        rows, problems = history.read()
        assert problems == []
        assert len(rows) >= 152

    def test_other_columns(self, tmp_path):
        path = tmp_path / "history.csv"
        path.write_text("date,ours_us\n2026-11-20,3\n")
        with pytest.raises(ValueError, match="has the columns date,ours_us"):
            history.append([a_row()], path)
        assert path.read_text() == "date,ours_us\n2026-11-20,3\n"
        rows, (problem_,) = history.read(path)
        assert rows == [] and "line 1" in problem_

    def test_latest_row_of_each_case(self):
        old, other, new = a_row(wall_us=1.0), a_row(clip=True), a_row(wall_us=2.0, date="2026-11-22")
        assert history.latest([old, other, new]) == [other, new]

    def test_of_one_date_the_later_line_counts(self):
        """Lines are appended as they are measured."""
        old, new, before = a_row(wall_us=1.0), a_row(wall_us=2.0), a_row(wall_us=3.0, date="2026-11-19")
        assert history.latest([old, new]) == [new]
        assert history.latest([new, old]) == [old]
        for row in (old, before):  # other machines
            row.machine = "another"
        assert report.newest([old, new]) == report.newest([new, before]) == [new]
        assert report.newest([new, old]) == [old]


DAMAGE = {
    "a time that is none": ("100.0", "fast", "wall_us is 'fast', not a number"),
    "a time that is nan": ("100.0", "nan", "wall_us is 'nan', not a number"),
    "no time": (",100.0,90.0", ",,90.0", "wall_us is '', not a time"),
    "a cell too few": ("a machine,", "", "values for"),
    "an opened quote": (",ok,", ',"ok,', "values for"),
    "a date": ("2026-11-20", "20.11.2026", "date is '20.11.2026', not YYYY-MM-DD"),
    "a truth value": ("False", "no", "is 'no', not a truth value"),
    "a status": (",ok,", ",fine,", "status is 'fine', not one of"),
}


PAGES = {"README.md": report.SECTIONS, "page.md": report.PAGE_SECTIONS}


class TestReport:
    def test_machines_have_tables_of_their_own(self):
        """README those of the machine that was measured last, results.md all."""
        rows = [
            a_row(machine=machine, part=part, model=model, host_us=time, ratio=time, date=date)
            for machine, time, date in (("one", 11.0, "2026-11-22"), ("another", 22.0, "2026-11-21"))
            for part, model in (*((part, "300 tensors") for part in growth.HOST), ("step", "gpt2"))
        ]
        for marker, cell in ((report.HOSTS, "| 11 (11) /"), (report.BEGIN, "| 11.00 / –")):
            made = report.SECTIONS[marker](rows)
            assert "one, " in made and cell in made
            assert "another" not in made and "22" not in made.replace("2026-11-22", "")
        second, first = report.results(rows).split("## one, 1 thread")
        assert "| 11 (11) /" in first and "| 11.00 / –" in first and "22.00" not in first
        assert "| 22 (22) /" in second and "| 22.00 / –" in second and "11.00" not in second

    @pytest.fixture(autouse=True)
    def needs_matplotlib(self):
        pytest.importorskip("matplotlib")

    @pytest.fixture
    def sample(self, tmp_path):
        """A history of two models, a loss, a skipped case and a failure; a README with markers."""
        rows = [
            a_row(model=model, implementation=name, clip=clip, ratio=ratio, tensors=tensors)
            for model, tensors in (("gpt2", 148), ("small1000", 1000))
            for name, ratio in (("fusedopt", 0.8 if model == "gpt2" else 1.37), ("fused", 1.0))
            for clip in (False, True)
        ]
        rows.append(a_row(optimizer="Lion", implementation="apex", status="skipped", note="no apex", wall_us=None))
        rows.append(a_row(optimizer="Lion", implementation="fusedopt", rival="", ratio=None))
        history.append(rows, tmp_path / "history.csv")
        for name, sections in PAGES.items():
            texts = "\nbetween\n".join(f"{marker}\nold\n{report.END}" for marker in sections)
            (tmp_path / name).write_text(f"before\n{texts}\nafter\n")
        return tmp_path

    @pytest.fixture
    def command(self, sample):
        files = "--history", sample / "history.csv", "--readme", sample / "README.md", "--page", sample / "page.md"
        return [str(x) for x in (BENCH / "report.py", *files, "--out", sample)]

    @pytest.fixture
    def run(self, command, monkeypatch):
        """The program in this process, which has imported what it takes seconds to import. Its exit code."""

        def run(*more):
            monkeypatch.setattr(sys, "argv", [*command, *more])
            return report.main()

        return run

    def test_tables_and_plots(self, sample, command, run):
        done = program(sys.executable, *command)
        assert done.returncode == 0, done.stderr
        text = (sample / "README.md").read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert "| AdamW | 0.80 / 0.80 | 1.37 / 1.37 |" in text  # a loss, in the same table
        assert "a machine, 1 thread; torch 2.13, Triton 3.9, 2026-11-20 (commit abc1234)" in text
        assert "skipped: no apex" in (sample / "results.md").read_text()
        plots = {path.name for path in (sample / "plots").iterdir()}
        names = ("step_time", "bandwidth", "host_time", "memory")
        assert plots == {f"{name}-1.{kind}" for name in names for kind in ("svg", "png")}
        assert all((sample / "plots" / name).stat().st_size > 5000 for name in plots)
        assert run("--check") == 0

    @pytest.mark.parametrize("page", PAGES)
    def test_a_number_without_a_row(self, sample, page, run):
        rows, _ = history.read(sample / "history.csv")
        for name, sections in PAGES.items():
            path = sample / name
            path.write_text(report.with_sections(path.read_text(), rows, sections))
        assert run("--check") == 0
        path = sample / page
        path.write_text(path.read_text().replace("1.37", "0.37").replace("Not measured yet.", "It is fast."))
        assert run("--check") == 1

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_corrupted_line(self, sample, damage):
        before, after, message = DAMAGE[damage]
        path = sample / "history.csv"
        lines = path.read_text().splitlines(keepends=True)
        assert before in lines[3]
        lines[3] = lines[3].replace(before, after, 1)
        path.write_text("".join(lines))
        rows, (problem_,) = history.read(path)
        assert problem_.startswith("history.csv line 4: ") and message in problem_
        assert len(rows) == len(lines) - 2

    def test_the_rest_is_still_drawn(self, sample, run, capsys):
        path = sample / "history.csv"
        path.write_text(path.read_text().replace("124439808", "many", 1) + "\x00\x01,;\n")
        path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
        assert run() == 0
        said = capsys.readouterr().err
        assert "history.csv line 2: elements is 'many', not a number" in said
        assert "history.csv line 12: " in said and "history.csv line 13: " in said
        assert (sample / "plots" / "memory-1.svg").exists()
        assert run("--check") == 1

    def test_readme_without_markers(self):
        with pytest.raises(ValueError, match="no markers"):
            report.with_sections("nothing", [])

    def test_committed_pages_say_what_the_rows_say(self):
        rows, _ = history.read()
        for page, sections in ((report.README, report.SECTIONS), (report.PAGE, report.PAGE_SECTIONS)):
            text = page.read_text()
            assert report.with_sections(text, rows, sections) == text, "run python bench/report.py"


MANY = {"tensors": 1000, "model": "1000 tensors", "wall_us": None, "rival_us": None, "memory_bytes": None}


class TestGrowth:
    """Tables by numbers of tensors and of ranks; what was not measured is a dash."""

    def test_plans(self):
        """The latest row of each number of tensors, in milliseconds."""
        rows = [
            a_row(**MANY, part="plan", implementation="torch", first_ms=first, host_us=420.0) for first in (90.0, 31.4)
        ]
        rows.append(a_row(**MANY, part="new plan", implementation="triton", host_us=123_456.0))
        assert "| 1,000 | 31 ms / – | – / 123 ms | 0.42 ms / – |" in growth.plan_table(rows)
        assert growth.plan_table([]) == growth.step_table([]) == growth.rank_table([]) == "Not measured yet."

    def test_steps(self):
        rows = [
            a_row(**MANY | {"rival_us": 5200.0}, part="same gradients", implementation="torch", host_us=1500.0),
            a_row(**MANY, part="same gradients", implementation="triton", host_us=610.0, bytes=28),
            a_row(**MANY, part="moved gradients", implementation="triton", host_us=640.0, bytes=64_028),
        ]
        expected = "| – / – / –, – | 1.5 ms / 5.2 ms / 0.61 ms, 28 B | – / – / 0.64 ms, 64 kB | – / – / –, – |"
        assert f"| 1,000 {expected}" in growth.step_table(rows)

    def test_ranks(self):
        """The first and the last rank in one line, once where they are equal; in the order of their number."""

        def row(world, part, implementation, **values):
            common = {**MANY, "model": f"gpt2 fully_shard {world}", "host_us": 400.0, "launches": 3.0}
            return a_row(**common | values, part=part, implementation=implementation)

        rows = [
            row(4096, "rank", "first rank", tensors=148, elements=93_794, memory_bytes=750_944, bytes=28),
            row(4096, "rank", "last rank", tensors=0, elements=0, memory_bytes=592, bytes=28),
            row(4096, "rank, moved", "first rank", bytes=9_500),
            row(4096, "all_reduce", "max_grad_norm", launches=1.0, bytes=16),
            row(512, "rank", "first rank", tensors=148, elements=1, memory_bytes=8, bytes=28),
        ]
        *_, fewer, more = growth.rank_table(rows).splitlines()
        assert fewer.startswith("| GPT-2 124M, fully_shard, float32 | 512 | 148 / – |")
        values = "148 / 0 | 93,794 / 0 | 751 kB / 592 B | – | 28 B | 9.5 kB / – | 3 | 0.4 ms | 1, 16 B | – | – |"
        assert more == f"| GPT-2 124M, fully_shard, float32 | 4096 | {values}"


def test_fields_of_old_rows_have_defaults():
    """A column can be added without touching rows: everything after the versions has a default."""
    fields = dataclasses.fields(Row)
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    assert required == [field.name for field in fields[: len(required)]]
