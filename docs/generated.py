"""What pages are made of: docstrings, signatures and rules of the registered optimizers, sections of the README."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import torch

import fusedopt
from fusedopt import paths
from fusedopt.optimizer import FusedOptimizer
from fusedopt.rule import Rule

TORCH_PAGE = "https://docs.pytorch.org/docs/stable/generated/torch.optim.{}.html"
ARXIV = "https://arxiv.org/abs/"

ARGUMENTS = {
    "params": "parameters, groups of them, or named parameters",
    "lr": "learning rate η, a float or a tensor of one element",
    "momentum": "μ, how much of the past a step keeps",
    "dampening": "τ, what is taken off the gradient in the accumulated form",
    "weight_decay": "λ, see the formula for where it is added",
    "nesterov": "look ahead: take the gradient where momentum alone would lead",
    "maximize": "ascend: the gradient is negated first",
    "foreach": "a hint for torch's own step; checked and kept, without effect here",
    "fused": "a hint for torch's own step; as in torch, `True` lets torch's GradScaler leave unscaling to the step",
    "differentiable": "`True` runs torch's own step",
    "capturable": "for [CUDA graphs](../graphs.md)",
    "betas": "decay rates of the moments",
    "eps": "ε, keeps the division finite",
    "amsgrad": "use the largest v so far",
    "decoupled_weight_decay": "decay as AdamW does",
    "alpha": "decay rate α of the mean square",
    "centered": "subtract the mean: divide by the standard deviation",
    "lr_decay": "κ: the learning rate of step t is η / (1 + (t − 1) κ)",
    "initial_accumulator_value": "what G starts at",
    "beta3_warmup": "steps over which β₃ grows to its value; `None`: at once",
    "alpha_warmup": "steps over which α grows to its value; `None`: at once",
    "rho": "decay rate ρ of the averages",
    "momentum_decay": "ψ: how fast the momentum approaches β₁",
    "lambd": "λ of the decay of η and of the parameter",
    "alpha ASGD": "power of the decay of η",
    "t0": "the step at which averaging begins",
    "etas": "factors η⁻ and η⁺ by which step sizes shrink and grow",
    "step_sizes": "the smallest and the largest step",
}
"""What torch's arguments mean. Those of other optimizers stand in their classes."""


README = Path(__file__).parent.parent / "README.md"


def readme(section: str) -> str:
    """The text below a heading of the README. Links into the repository become names: it is not part of the site."""
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", README.read_text(), re.MULTILINE | re.DOTALL)
    body = body.removesuffix("Apache-2.0. Changes are in `CHANGELOG.md`.\n")
    return re.sub(r"\[([^]]+)\]\((?!https?:)[^)]+\)", r"`\1`", body)


def own_paths() -> dict[str, paths.Rule]:
    """The path that is drawn on each optimizer's page."""
    return {name: paths.OWN_PATHS.get(name, paths.Rule(name, name, {}, paths.GENTLE)) for name in fusedopt.registry}


def page(name: str) -> str:
    cls = fusedopt.registry[name]
    body, sources = split_docstring(cls)
    return "\n\n".join(
        [
            f"# {name}",
            summary(cls),
            "## Formula",
            f'<div class="formula" markdown>\n\n{body}\n\n</div>',
            "## Its path",
            path(name),
            "## Example",
            example(name),
            "## Arguments",
            arguments(cls),
            "## Memory and traffic",
            traffic(cls),
            "## Sources",
            links(name, sources),
            "",
        ]
    )


def overview() -> str:
    rows = [
        "| optimizer | states | in torch | bytes of state | bytes moved | with clipping |",
        "|---|---|---|---|---|---|",
    ]
    for name in sorted(fusedopt.registry):
        cls = fusedopt.registry[name]
        rule, means = default_rule(cls), takes_means(cls)
        keys = ", ".join(f"`{key}`" for key in rule.keys) or "none"
        there = f"[torch.optim.{name}]({TORCH_PAGE.format(name)})" if in_torch(name) else "no"
        bytes_moved = moved(rule, means)
        rows.append(f"| [{name}]({name}.md) | {keys} | {there} | {state(rule)} | {bytes_moved} | {bytes_moved + 4} |")
    return f"""# Optimizers

Optimizers that torch has take torch's arguments, in torch's order and with torch's defaults; all take the
[settings](AdamW.md#arguments) of fusedopt. Bytes are per parameter and step, in float32, with default
arguments: a step reads the gradient, reads and writes the parameter and every state; clipping to a norm reads the
gradient once more, and means over each tensor (StableAdamW, LAMB, `cautious=True`) read everything once before.

{chr(10).join(rows)}

The formulas of the textbooks, by number and with their arguments, are in the [Rosetta table](../rosetta.md).
"""


def split_docstring(cls: type) -> tuple[str, str]:
    """Formulas and remarks as Markdown, and the paragraph of sources."""
    text = inspect.cleandoc(sys.modules[cls.__module__].__doc__)
    paragraphs = text.split("\n\n")[1:]
    (sources,) = (p for p in paragraphs if p.startswith("Sources:"))
    found = []
    for paragraph in paragraphs:
        if paragraph is sources:
            continue
        if paragraph.startswith("    "):
            block = "\n".join(line[4:] for line in paragraph.split("\n"))
            found.append(f"```text\n{block}\n```")
        else:
            found.append(paragraph.replace("``", "`"))
    return "\n\n".join(found), sources.removeprefix("Sources:")


def summary(cls: type) -> str:
    first = cls.__doc__.split("\n")[0]
    return f"{first}\n\n`from fusedopt import {cls.__name__}`"


def path(name: str) -> str:
    rule = own_paths()[name]
    shown = ", ".join(f"{key}={value!r}" for key, value in rule.options.items())
    with_options = f" with `{shown}`" if shown else ""
    return (
        f"![The path of {name} on a quadratic and a saddle](../pictures/{name}-light.svg#only-light)"
        f"![The path of {name} on a quadratic and a saddle](../pictures/{name}-dark.svg#only-dark)\n\n"
        f"Forty steps{with_options}, a dot each. Left 0.1 x₁² + 2 x₂², right a saddle between two minima."
    )


def example(name: str) -> str:
    return f"""```python
import torch
import fusedopt

model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
optimizer = fusedopt.{name}(model.parameters(), lr=0.01, max_grad_norm=1.0)
x, y = torch.randn(128, 20), torch.randint(2, (128,))
for _ in range(10):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
print(optimizer.grad_norm, optimizer.layout())
```"""


def arguments(cls: type) -> str:
    parameters = inspect.signature(cls).parameters
    settings = cls.settings_class.fields()
    common = FusedOptimizer.settings_class.fields()
    torchs = [
        f"| `{name}` | {default(p)} | {meaning(cls, name)} |" for name, p in parameters.items() if name not in settings
    ]
    header = "| argument | default | meaning |\n|---|---|---|\n"
    own = [name for name in settings if name not in common]
    blocks = [header + "\n".join(torchs)]
    if own:
        rows = [setting(name, settings[name]) for name in own]
        blocks.append("Besides torch's, for this formula (keyword-only, and attributes that may change between steps):")
        blocks.append(header + "\n".join(rows))
    rows = [setting(name, field) for name, field in common.items()]
    blocks.append("And what all optimizers of fusedopt share (the same):")
    blocks.append(header + "\n".join(rows))
    return "\n\n".join(blocks)


def meaning(cls: type, name: str) -> str:
    """What an argument is for: from the table, or else from the class's docstring; "" where neither says it."""
    own = re.search(rf"^ +{name}(?: \([^)]*\))?: (.*(?:\n {{12,}}\S.*)*)", cls.__doc__, re.MULTILINE)
    written = re.sub(r"\s+", " ", own[1]).rstrip(".").replace("``", "`") if own and not in_torch(cls.__name__) else ""
    return ARGUMENTS.get(f"{name} {cls.__name__}") or written or ARGUMENTS.get(name, "")


def setting(name: str, field: object) -> str:
    meaning = re.sub(r"\s+", " ", field.metadata["doc"]).strip().replace("``", "`")
    kind, _, rest = meaning.partition("): ")
    cells = f"{papers(rest)} *{kind.removeprefix('(')}*".replace("|", "\\|")
    return f"| `{name}` | `{field.default!r}` | {cells} |"


def default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    return f"`{parameter.default!r}`"


def rules_of(cls: type) -> list[Rule]:
    """The rules that stand in the optimizer's module, one of each name."""
    values = list(vars(sys.modules[cls.__module__]).values())
    values += [value for table in values if isinstance(table, dict) for value in table.values()]
    return list({value.name: value for value in reversed(values) if isinstance(value, Rule)}.values())[::-1]


def default_rule(cls: type) -> Rule:
    optimizer = made(cls)
    return optimizer.rule(optimizer.param_groups[0])


def made(cls: type) -> FusedOptimizer:
    return cls([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def state(rule: Rule) -> int:
    """Bytes of state per parameter in float32."""
    return 4 * len(rule.keys)


def moved(rule: Rule, means: bool = False) -> int:
    """Bytes that a step reads and writes: the gradient once, the parameter and every state twice. For means over each
    tensor all of it is read once before."""
    return 4 * (3 + 2 * len(rule.keys)) + means * 4 * (2 + len(rule.states))


def takes_means(cls: type) -> bool:
    optimizer = made(cls)
    (group,) = optimizer.param_groups
    stages = optimizer.update(group, 1, *optimizer.initial_scalars(group)).on_update
    return any(stage.terms and stage.args != stage.neutral for stage in stages)


def traffic(cls: type) -> str:
    means = takes_means(cls)
    rows = [
        f"| `{rule.name}` | {', '.join(f'`{key}`' for key in rule.keys) or 'none'} | {state(rule)} "
        f"| {moved(rule, means)} | {moved(rule, means) + 4} |"
        for rule in rules_of(cls)
    ]
    used = default_rule(cls).name
    again = (
        " The means over each tensor take a launch of their own, which reads everything once before." if means else ""
    )
    return (
        f"Bytes per parameter in float32. A step reads the gradient and reads and writes all else; clipping to a norm "
        f"reads the gradient once more.{again} Default arguments select `{used}`.\n\n"
        "| rule | states | of state | moved by a step | with clipping |\n|---|---|---|---|---|\n" + "\n".join(rows)
    )


def papers(text: str) -> str:
    """Links instead of names of arXiv."""
    return re.sub(r"arXiv (\d{4}\.\d{4,5})", rf"[arXiv \1]({ARXIV}\1)", text)


def in_torch(name: str) -> bool:
    return hasattr(torch.optim, name)


def links(name: str, sources: str) -> str:
    text = re.sub(r"\s+", " ", sources).strip().rstrip(".")
    lines = [f"- {part.strip()}" for part in papers(text).split(";")]
    if in_torch(name):
        lines.append(f"- [torch.optim.{name}]({TORCH_PAGE.format(name)})")
    kernel, module = "kernels/rules.py", fusedopt.registry[name].__module__.replace(".", "/") + ".py"
    lines.append(f"- as code: `{kernel}` (Triton), `{module}` (torch)")
    return "\n".join(lines)
