"""``history.csv``: one row per case and implementation, appended as soon as it is measured, and never edited but to
withdraw it.

Rows up to 2026-11-20 were written with fewer columns: of torch's implementations only the best one was kept, as
``rival``, and clipping, though it ran, changed nothing after the first step. What they do not say is empty.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

HISTORY = pathlib.Path(__file__).with_name("history.csv")

STATUS = {
    "ok": "measured, or a check that passed",
    "skipped": "cannot run here: the note says why",
    "unequal": "does not do what torch does: the note says by how much",
    "failed": "raised an error, or a check that failed",
    "withdrawn": "measured, but not what the row says: the note says why",
}


@dataclasses.dataclass
class Row:
    """Empty where nothing was measured."""

    # Where and when
    date: str
    commit: str
    machine: str
    driver: str
    device: str
    threads: int
    python: str
    torch: str
    triton: str
    clock: str = ""
    # What
    part: str = ""
    """"step" for one call of ``step()``, "kernel" for one kernel, "train" for a whole training step, ..."""
    model: str = ""
    tensors: int | None = None
    elements: int | None = None
    optimizer: str = ""
    dtype: str = ""
    clip: bool | None = None
    amp: bool | None = None
    implementation: str = ""
    status: str = "ok"
    note: str = ""
    # How long, in microseconds: wall, with quartiles; the host by itself; the device by itself
    wall_us: float | None = None
    wall_low: float | None = None
    wall_high: float | None = None
    host_us: float | None = None
    device_us: float | None = None
    first_ms: float | None = None
    """The first step: states, plans and, in rows of part "cold", compilation."""
    # How much, per step
    launches: float | None = None
    waits: float | None = None
    """How often the host waits for the device."""
    bytes: int | None = None
    """The least that a step must move; in rows of scale.py what it sends to the GPU, in those of ranks.py that, or what
    it communicates."""
    copy_gbs: float | None = None
    """Bandwidth of a copy in the same run, bytes read and written."""
    bandwidth: float | None = None
    """``bytes`` over the time that the device took, as a part of that."""
    memory_bytes: int | None = None
    """Peak above parameters and gradients."""
    # Against torch's best: median and quartiles of the ratios of interleaved rounds
    rival: str = ""
    rival_us: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    rounds: int | None = None

    def case(self) -> tuple:
        """What identifies a measurement: a later row of the same case replaces an earlier one in tables."""
        return (
            self.machine, self.device, self.threads, self.part, self.model, self.optimizer, self.dtype, self.clip,
            self.amp, self.implementation,
        )  # fmt: skip


FIELDS = {field.name: field for field in dataclasses.fields(Row)}


def write(records: Sequence[Any], kind: type, path: pathlib.Path) -> None:
    """A file of its own for dataclass instances of one kind, which replaces what was there."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, records))


def append(rows: Iterable[Row], path: pathlib.Path = HISTORY) -> None:
    """Write rows at the end of the file, which is complete after every call.

    Raises:
        ValueError: if the file has other columns.
    """
    new = not path.exists()
    if not new and (found := path.open(newline="").readline().strip()) != ",".join(FIELDS):
        raise ValueError(f"{path} has the columns {found}: write to a new file, or bring it to those of history.py")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({key: _text(value) for key, value in vars(row).items()} for row in rows)


def read(path: pathlib.Path = HISTORY) -> tuple[list[Row], list[str]]:
    """All rows that can be understood, and a sentence for each line that cannot."""
    rows, problems = [], []
    with path.open(newline="", errors="replace") as file:
        columns = file.readline().strip()
        if columns != ",".join(FIELDS):
            return [], [f"{path.name} line 1: the columns are not those of history.py: {columns[:200]}"]
        # No value has a line break in it: a quotation mark that nobody closes costs its own line only.
        for number, line in enumerate(file, 2):
            where = f"{path.name} line {number}"
            try:
                (values,) = csv.reader([line.rstrip("\r\n")])
                if len(values) != len(FIELDS):
                    raise ValueError(f"{len(values)} values for {len(FIELDS)} columns")
                rows.append(_row(dict(zip(FIELDS, values))))
            except (ValueError, csv.Error) as problem:
                problems.append(f"{where}: {problem}")
    return rows, problems


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each case, in the order of the file."""
    found: dict[tuple, Row] = {}
    for row in rows:
        found.pop(row.case(), None)
        found[row.case()] = row
    return list(found.values())


def origin(rows: Iterable[Row]) -> str:
    """Versions, commits and dates of some rows, in the order of the rows."""

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(str(getattr(row, name)) for row in rows if getattr(row, name)))

    return f"torch {values('torch')}, Triton {values('triton')}, {values('date')} (commit {values('commit')})"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return " ".join(value.split()) if isinstance(value, str) else str(value)


def _row(values: dict[str, str]) -> Row:
    row = Row(**{name: _value(name, FIELDS[name].type, text) for name, text in values.items()})
    try:
        datetime.date.fromisoformat(row.date)
    except ValueError:
        raise ValueError(f"date is {row.date!r}, not YYYY-MM-DD") from None
    if row.status not in STATUS:
        raise ValueError(f"status is {row.status!r}, not one of {', '.join(STATUS)}")
    if not row.implementation:
        raise ValueError("implementation is empty")
    if row.status == "ok" and row.part == "step" and not (row.wall_us or 0) > 0:
        raise ValueError(f"wall_us is {values['wall_us']!r}, not a time")
    return row


def _value(name: str, kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if text == "":
        if "None" in kind:
            return None
        raise ValueError(f"{name} is empty")
    try:
        if kind.startswith("bool"):
            return {"True": True, "False": False}[text]
        number = float(text)
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError
        return int(text) if kind.startswith("int") else number
    except (KeyError, ValueError):
        raise ValueError(
            f"{name} is {text!r}, not a {'truth value' if kind.startswith('bool') else 'number'}"
        ) from None
