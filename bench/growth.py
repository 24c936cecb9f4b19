"""Tables of how a step grows with tensors and ranks, from the rows of bench/host.py, scale.py and ranks.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from history import Row, latest, origin
from shapes import TITLES

PLANNING = "plan", "new plan"
STEPS = "first step", "same gradients", "moved gradients", "other gradients"
RANKS = "rank", "rank, moved", "rank, first", "all_reduce"
HOST = "host", "host, caches cold"
GROWTH = (*PLANNING, *STEPS, *RANKS, *HOST)
"""Parts of the history."""

BACKENDS = "torch", "triton"

HOSTS = "fusedopt", "fusedopt flatten", "fused", "foreach"

UNMEASURED = "Not measured yet."


def step_table(rows: list[Row]) -> str:
    """Whole steps by number of tensors: the fallback and torch, the kernels' host, what goes to the GPU."""
    found = {(r.part, r.tensors, r.implementation): r for r in latest(rows) if r.part in STEPS}
    if not found:
        return UNMEASURED
    heads = ["tensors", "the first step", "a step like the last", "gradients elsewhere", "another quarter without"]

    def cells(tensors: int) -> list[str]:
        by_step = []
        for part in STEPS:
            ours, kernels = (found.get((part, tensors, name)) for name in BACKENDS)
            times = [(ours, "host_us"), (ours, "rival_us"), (kernels, "host_us")]
            numbers = " / ".join(_time(getattr(row, column, None)) for row, column in times)
            by_step.append(f"{numbers}, {_bytes(getattr(kernels, 'bytes', None))}")
        return [f"{tensors:,}", *by_step]

    lead = f"{_lead(found.values())}; fallback / torch fused / kernels' host, bytes to the GPU:"
    return f"{lead}\n\n{_table(heads, map(cells, _numbers(found)))}"


def host_table(rows: list[Row]) -> str:
    """The host's time of a step whose launches do nothing, by optimizer and implementation."""
    found = {(r.part, r.optimizer, r.clip, r.model, r.implementation): r for r in latest(rows) if r.part in HOST}
    if not found:
        return UNMEASURED
    cases = dict.fromkeys((row.optimizer, row.clip) for row in found.values())
    measured = dict.fromkeys(row.model for row in found.values())
    # Some numbers of tensors are for the plot, and measured with one optimizer.
    models = [model for model in measured if all((HOST[0], *case, model, HOSTS[0]) in found for case in cases)]

    def cells(case: tuple[str, bool]) -> list[str]:
        def numbers(model: str, name: str) -> str:
            first, later = (found.get((part, *case, model, name)) for part in reversed(HOST))
            return "–" if later is None else f"{later.host_us:.0f} ({first.host_us:.0f})"

        by_model = (" / ".join(numbers(model, name) for name in HOSTS) for model in models)
        return [case[0], "yes" if case[1] else "", *by_model]

    lead = f"{_lead(found.values())}; µs of fusedopt / with `flatten=True` / torch fused / torch foreach:"
    return f"{lead}\n\n{_table(['optimizer', 'clipping', *models], map(cells, cases))}"


def plan_table(rows: list[Row]) -> str:
    """How long planning takes, by number of tensors: the fallback, and the kernels' tables."""
    found = {(r.part, r.tensors, r.implementation): r for r in latest(rows) if r.part in PLANNING}
    if not found:
        return UNMEASURED
    heads = ["tensors", "plan at the first step", "anew, with states in place", "check at every other step"]
    columns = ("plan", "first_ms", 1e3), ("new plan", "host_us", 1), ("plan", "host_us", 1)

    def cells(tensors: int) -> list[str]:
        return [f"{tensors:,}"] + [
            " / ".join(_time(getattr(found.get((part, tensors, name)), column, None), scale) for name in BACKENDS)
            for part, column, scale in columns
        ]

    return f"{_lead(found.values())}; fallback / kernels' tables:\n\n{_table(heads, map(cells, _numbers(found)))}"


def rank_table(rows: list[Row]) -> str:
    """What one rank holds, sends, launches and communicates, by number of ranks: the first rank and the last."""
    found = {(r.part, r.model, r.dtype, r.implementation): r for r in latest(rows) if r.part in RANKS}
    if not found:
        return UNMEASURED
    heads = [
        "model, layout", "ranks", "parameters it has a part of", "elements", "states", "to the GPU: first step",
        "like the last", "gradients elsewhere", "launches", "host", "all_reduce for the norm", "for `track`",
        "for `cautious`",
    ]  # fmt: skip

    def cells(case: tuple[str, str]) -> list[str]:
        model, layout, world = case[0].split()

        def both(part: str, value: Callable[[Row], str]) -> str:
            ranks = (found.get((part, *case, f"{place} rank")) for place in ("first", "last"))
            values = ["–" if row is None else value(row) for row in ranks]
            return " / ".join(dict.fromkeys(values))

        def joined(setting: str) -> str:
            row = found.get(("all_reduce", *case, setting))
            return "–" if row is None else f"{row.launches:.0f}, {_bytes(row.bytes)}"

        title = TITLES.get(model, f"{int(model):,} tensors" if model.isdecimal() else model)
        return [
            f"{title}, {layout}, {case[1]}", world,
            both("rank", lambda r: f"{r.tensors:,}"), both("rank", lambda r: f"{r.elements:,}"),
            both("rank", lambda r: _bytes(r.memory_bytes)), both("rank, first", lambda r: _bytes(r.bytes)),
            both("rank", lambda r: _bytes(r.bytes)), both("rank, moved", lambda r: _bytes(r.bytes)),
            both("rank", lambda r: f"{r.launches:.0f}"),
            _time(getattr(found.get(("rank", *case, "first rank")), "host_us", None)),
            *map(joined, ("max_grad_norm", "track", "cautious")),
        ]  # fmt: skip

    cases = dict.fromkeys((model, dtype) for _, model, dtype, _ in found)
    ordered = sorted(cases, key=lambda case: (case[0].split()[:2], case[1], int(case[0].split()[2])))
    return f"{_lead(found.values())}; first rank / last rank where they differ:\n\n{_table(heads, map(cells, ordered))}"


def growth_page(rows: list[Row]) -> str:
    """What the page about many ranks shows."""
    return f"{plan_table(rows)}\n\n{rank_table(rows)}"


def _numbers(found: Iterable[tuple]) -> list[int]:
    return sorted({tensors for _, tensors, _ in found})


def _lead(rows: Iterable[Row]) -> str:
    """Where the rows of a table come from."""
    rows = list(rows)
    notes = "".join(f"; {note}" for note in dict.fromkeys(row.note for row in rows if row.note))
    return f"{rows[-1].machine}, one thread; {origin(rows)}{notes}"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    found = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in found).replace("| --- ", "|---").replace("--- |", "---|")


def _time(microseconds: float | None, scale: float = 1) -> str:
    if microseconds is None:
        return "–"
    value = microseconds * scale / 1e3
    return f"{value:.2g} ms" if value < 100 else f"{value:.0f} ms"


def _bytes(value: int | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} B"
