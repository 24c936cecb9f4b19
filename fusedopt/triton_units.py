"""The launch of adaptive gradient clipping: what each unit's gradient is at most multiplied by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import units
from .launch import Launches
from .triton_tables import Tables
from .units import EPS, PART, UnitTables


class Limits:
    """The limits of one bucket's units."""

    def __init__(self, params: Sequence[Tensor], dtype: torch.dtype, tables: Tables, launch: Launches):
        self.units = UnitTables(params, dtype, launch.device)
        self.argument = units.Units(self.units.ratios, self.units.table)
        self.tables = tables
        self.launch = launch
        self.known = False

    def of_step(self, clipping: float) -> units.Units:
        """The kernels' argument: worked out once per step, for whoever needs it first."""
        if not self.known:
            self.known = True
            tables, of = self.tables, self.units
            self.launch(
                units.ratios_of_units, (), of.programs,
                tables.upload.device_copy, self.argument, of.parts, of.partials, of.tickets, clipping, EPS,
                tables.roles, ADDRESS=tables.address, FIELDS=tables.fields, PART=PART, BLOCK=tables.tuning.block,
                enable_fp_fusion=False,
            )  # fmt: skip
        return self.argument

    def forget(self) -> None:
        """The step is over."""
        self.known = False
