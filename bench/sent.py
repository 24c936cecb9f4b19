"""What a step sends to the device and launches there, counted from the tables themselves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np

from fusedopt.launch import Launches
from fusedopt.triton_tables import Tiles
from fusedopt.upload import Upload


@dataclasses.dataclass
class Sent:
    bytes: int = 0
    launches: int = 0


@contextlib.contextmanager
def counted(optimizer: Any) -> Iterator[Sent]:
    """Everything that goes to the device within: tables of addresses, rows of hyperparameters, lists of tiles."""
    found = Sent()
    send, launch, tiles = Upload.send, Launches.__call__, Tiles.__init__

    def counted_send(self: Upload, values: np.ndarray) -> None:
        found.bytes += values.nbytes
        send(self, values)

    def counted_launch(self: Launches, *args: Any, **constants: Any) -> None:
        found.launches += self.foreseen is None  # else it is compiled ahead
        launch(self, *args, **constants)

    def counted_tiles(self: Tiles, *args: Any) -> None:
        tiles(self, *args)
        found.bytes += self.table.nbytes

    with (
        mock.patch.object(Upload, "send", counted_send),
        mock.patch.object(Launches, "__call__", counted_launch),
        mock.patch.object(Tiles, "__init__", counted_tiles),
    ):
        yield found
