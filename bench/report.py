"""Tables and plots from history.csv: of every case the latest row, and nothing that has no row.

python bench/report.py            prints the tables, and writes README's, those of docs/distributed.md, results.md and
                                  plots/*.svg, *.png
python bench/report.py --check    writes nothing; fails if a page's tables are not what the rows say
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence

from growth import GROWTH, HOST, STEPS, UNMEASURED, growth_page, host_table, step_table
from history import HISTORY, Row, latest, origin, read
from shapes import TITLES

README = HISTORY.parent.parent / "README.md"
PAGE = HISTORY.parent.parent / "docs" / "distributed.md"
BEGIN = "<!-- made by bench/report.py from bench/history.csv: do not edit -->"
TENSORS = "<!-- many tensors: made by bench/report.py from the rows of bench/scale.py: do not edit -->"
HOSTS = "<!-- host: made by bench/report.py from the rows of bench/host.py: do not edit -->"
RANKS = "<!-- many ranks: made by bench/report.py from the rows of bench/scale.py and ranks.py: do not edit -->"
END = "<!-- end -->"

OURS = "fusedopt", "fusedopt flatten", "fusedopt 8-bit", "fusedopt one launch"

MANY = 6
"""Checks of one kind, above which a summary only counts those that passed."""


def machines(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By what a table should not mix, machine and number of threads, in the order of these."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        threads = "" if row.device == "cuda" else f", {row.threads} thread{'s' * (row.threads > 1)}"
        found.setdefault(f"{row.machine}{threads}", []).append(row)
    return dict(sorted(found.items()))


def ratio_table(rows: list[Row]) -> str:
    """Optimizers that torch has by models, float32: our time over that of torch's best, without and with clipping."""
    ours = [r for r in rows if r.implementation == "fusedopt" and r.dtype == "float32" and not r.amp]
    models = [model for model in TITLES if any(row.model == model for row in ours)]
    labels = sorted({row.optimizer for row in ours})
    cells = {(row.optimizer, row.model, row.clip): row for row in ours}
    lines = [f"| optimizer | {' | '.join(TITLES[model] for model in models)} |", "|---|" + "---|" * len(models)]
    for label in labels:
        pairs = [
            " / ".join(_ratio(cells.get((label, model, clip))) for clip in (False, True)).replace("– / –", "–")
            for model in models
        ]
        if set(pairs) == {"–"}:
            continue  # torch has no such optimizer
        lines.append(f"| {label} | {' | '.join(pairs)} |")
    return "\n".join(lines)


def titled_ratios(rows: list[Row]) -> str:
    """The same below what was measured where."""
    ((machine, found),) = machines(rows).items()
    return f"{machine}; {origin(found)}:\n\n{ratio_table(found)}"


def _ratio(row: Row | None) -> str:
    if row is None:
        return "–"
    if row.status != "ok":
        return row.status
    return "–" if row.ratio is None else f"{row.ratio:.2f}"


def full_table(rows: list[Row]) -> str:
    """Every row, with what it was compared with and what else was measured."""
    columns = "model, optimizer, dtype, clipping, AMP, implementation, wall µs (quartiles), host µs, device µs, of copy bandwidth, launches, host waits, memory, first step ms, over torch's best (quartiles)"  # noqa: E501
    names = columns.split(", ")
    lines = [f"| {' | '.join(names)} |", "|---|" + "---|" * (len(names) - 1)]
    order = {model: number for number, model in enumerate(TITLES)}
    for row in sorted(rows, key=lambda r: (order.get(r.model, 99), r.optimizer, r.dtype, bool(r.clip), bool(r.amp))):
        start = [TITLES.get(row.model, row.model), row.optimizer, row.dtype, _yes(row.clip), _yes(row.amp)]
        if row.status != "ok":
            cells = [*start, row.implementation, f"{row.status}: {row.note}".replace("|", "/"), *[""] * 8]
        else:
            cells = [*start, row.implementation, *_measured(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _measured(row: Row) -> list[str]:
    quartiles = f" ({_number(row.wall_low)} to {_number(row.wall_high)})" if row.wall_low is not None else ""
    ratio = ""
    if row.ratio is not None:
        ratio = f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f}) {row.rival}, {_number(row.rival_us)} µs"
    return [
        _number(row.wall_us) + quartiles,
        _number(row.host_us),
        _number(row.device_us),
        f"{row.bandwidth:.0%}" if row.bandwidth is not None else "",
        _number(row.launches),
        _number(row.waits),
        f"{row.memory_bytes / row.elements:.1f} B/element" if row.memory_bytes is not None else "",
        _number(row.first_ms),
        ratio,
    ]


def _yes(value: bool | None) -> str:
    return "yes" if value else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def newest(rows: Iterable[Row]) -> list[Row]:
    """Those of the machine that was measured last, of CPUs and of GPUs."""
    rows = list(rows)
    machine = {row.device: row.machine for row in sorted(rows, key=lambda row: row.date)}
    return [row for row in rows if row.machine == machine[row.device]]


def measured_last(table: Callable[[list[Row]], str], parts: Sequence[str]) -> Callable[[list[Row]], str]:
    """The table of some parts of the history, on those machines only."""

    def tables(rows: list[Row]) -> str:
        found = machines(newest(row for row in latest(rows) if row.part in parts))
        return "\n\n".join(map(table, found.values())) or UNMEASURED

    return tables


SECTIONS = {
    BEGIN: measured_last(titled_ratios, ["step"]),
    TENSORS: measured_last(step_table, STEPS),
    HOSTS: measured_last(host_table, HOST),
}
"""What README takes from the rows, by the marker before it."""

PAGE_SECTIONS = {RANKS: growth_page}
"""The same for the page about many ranks."""


def with_sections(text: str, rows: list[Row], sections: dict[str, Callable[[list[Row]], str]] = SECTIONS) -> str:
    """A page with all of them between their markers.

    Raises:
        ValueError: if a marker is not there.
    """
    for marker, make in sections.items():
        before, begin, rest = text.partition(marker)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"the page has no markers {marker} and {END}")
        text = f"{before}{begin}\n\n{make(rows)}\n\n{end}{after}"
    return text


def results(rows: list[Row]) -> str:
    """All tables, as a page."""
    pages = ["# Results\n\nMade by `bench/report.py` from `bench/history.csv`; the latest row of each case."]
    for machine, found in machines(latest(rows)).items():
        timed = [row for row in found if row.part in ("step", "train", "kernel", "sweep", "cold")]
        growing = [row for row in found if row.part in GROWTH]
        checks = [row for row in found if row not in timed and row not in growing]
        pages.append(f"## {machine}\n\n{origin(found)}")
        if steps := [row for row in timed if row.part == "step"]:
            pages.append(f"float32, over torch's best, without / with clipping:\n\n{ratio_table(steps)}")
        if timed:
            pages.append(full_table(timed))
        if growing:
            pages += [host_table(growing), step_table(growing), growth_page(growing)]
        if checks:
            pages.append("\n".join(f"- {row.part}, {row.implementation}: {row.status}. {row.note}" for row in checks))
    return "\n\n".join(pages) + "\n"


def summary(rows: list[Row]) -> str:
    """For the end of a run on a GPU, of which only the end may be seen: what failed, and a line per case."""
    found = latest(rows)
    bad = [row for row in found if row.status in ("failed", "unequal")]
    lines = [f"{sum(row.status == 'ok' for row in found)} ok, {len(bad)} not, of {len(found)} rows"]
    skipped = [row for row in found if row.status == "skipped" and not row.model]
    lines += [f"SKIPPED {row.part} {row.implementation}: {row.note}"[:160] for row in skipped]
    lines += [f"NOT OK {r.part} {r.model} {r.optimizer} {r.implementation}: {r.note}"[:160] for r in bad]
    checks: dict[str, list[Row]] = {}
    for row in found:
        if row.part not in ("step", "train", "kernel", "sweep", *GROWTH) and row.status == "ok":
            checks.setdefault(row.part, []).append(row)
    for part, passed in checks.items():
        if len(passed) > MANY:
            lines.append(f"{part}: {len(passed)} ok")
            continue
        for row in passed:
            lines.append(
                " ".join(filter(None, [part, row.model, row.optimizer, f"{row.implementation}: {row.note}"]))[:160]
            )
    lines.append("model optimizer clip: ours us wall/host/device, of copy, launches, waits; over torch's best")
    for row in found:
        if row.part in ("step", "train") and row.implementation in OURS and row.status == "ok":
            values = "/".join(_number(value) or "-" for value in (row.wall_us, row.host_us, row.device_us))
            share = "" if row.bandwidth is None else f" {row.bandwidth:.0%}"
            ratio = "" if row.ratio is None else f" {row.ratio:.2f} {row.rival}"
            kind = "".join([" clip" * bool(row.clip), " amp" * bool(row.amp), " bf16" * row.dtype.startswith("b")])
            flat = row.implementation.removeprefix("fusedopt")
            counts = f" {_number(row.launches)} {_number(row.waits)}" if row.launches is not None else ""
            lines.append(f"{row.model} {row.optimizer}{kind}{flat}: {values}{share}{counts};{ratio}")
    return "\n".join(lines)


def write(
    history: pathlib.Path = HISTORY,
    readme: pathlib.Path = README,
    page: pathlib.Path = PAGE,
    out: pathlib.Path = HISTORY.parent,
) -> None:
    """README's tables and those of the page about many ranks, results.md and the plots in ``out``."""
    import plots

    rows, _ = read(history)
    readme.write_text(with_sections(readme.read_text(), rows))
    page.write_text(with_sections(page.read_text(), rows, PAGE_SECTIONS))
    (out / "results.md").write_text(results(rows))
    for path in plots.draw(rows, out / "plots"):
        print(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=pathlib.Path, default=HISTORY)
    parser.add_argument("--readme", type=pathlib.Path, default=README)
    parser.add_argument("--page", type=pathlib.Path, default=PAGE, help="about many ranks")
    parser.add_argument("--out", type=pathlib.Path, default=HISTORY.parent, help="for results.md and plots/")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    rows, problems = read(options.history)
    for problem in problems:
        print(f"not used: {problem}", file=sys.stderr)
    if options.check:
        texts = {options.readme: SECTIONS, options.page: PAGE_SECTIONS}
        same = all(page.read_text() == with_sections(page.read_text(), rows, of) for page, of in texts.items())
        print(f"the tables are {'' if same else 'not '}what the rows say{'' if same else ': run this'}")
        return 0 if same and not problems else 1
    print(SECTIONS[BEGIN](rows))
    write(options.history, options.readme, options.page, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
