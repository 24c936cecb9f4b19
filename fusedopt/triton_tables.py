"""What the kernels are told of a bucket's tensors: where each lies, in which form, and which tiles it is cut into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from .backends import interpreting
from .buckets import Bucket
from .forms import QUANTIZED, Part
from .kernels import address, rounding, tuning
from .storage import part_key
from .upload import Upload, on

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


class Tiles:
    """The parts of at most ``block`` elements into which tensors are cut, on the device: see kernels/address.py."""

    def __init__(self, sizes: Sequence[int], block: int, device: torch.device):
        sizes = np.asarray(sizes)
        self.of_tensors = -(-sizes // block)
        tensors, starts = np.repeat(np.arange(len(sizes)), self.of_tensors), _ranges(self.of_tensors) * block
        elements = np.minimum(sizes[tensors] - starts, block)
        self.count = len(tensors)
        table = np.zeros((self.count, address.TILE_FIELDS.value), dtype=np.int32)
        table[:, :3] = np.stack([tensors, starts // address.GRAIN.value, elements], axis=1)
        self.table = torch.from_numpy(table).to(device)


class Tables:
    """The tables of one bucket, and the compile-time arguments that go with them."""

    def __init__(self, bucket: Bucket, params: Sequence[Tensor]):
        """``params``: the members' parameters, or dense copies of them."""
        parts = {part_key(role, part): part for role, form in bucket.stored.roles for part in form.parts}
        forms = [rounding.FORMS[form.name] for _, form in bucket.stored.roles]
        self.forms = _of_roles(forms, bucket, partial(rounding.Forms, rounding.leave))
        self.zeroing_forms = self.forms._replace(grad=rounding.zero)
        """The same, with zeros left in place of the gradients."""
        self._find_roles(bucket, parts)
        self._write_records(bucket, params, parts)
        self.upload = Upload(bucket.device)
        self.addresses = b""
        """The gradients', as the device knows them."""

        self.tuning = tuned(bucket.device)
        sizes = [p.numel() for p in params]
        self.tiles = Tiles(sizes, self.tuning.block, bucket.device)
        self.norm_block = self.tuning.norm_bytes // bucket.grad_dtype.itemsize
        self.norm_tiles = Tiles(sizes, self.norm_block, bucket.device)
        self._divide_among_threads(bucket, parts)

    def _find_roles(self, bucket: Bucket, parts: dict[str, Part]) -> None:
        """Where kernels find each part of each role: by addresses in the records, or by a position in flat buffers."""
        param, grad = address.PARAM.value, _role(address.GRAD.value, bucket.grad_dtype)
        if bucket.flat:
            buffers = {"": bucket.members[0].place.space.buffers["param"], **bucket.members[0].place.space.buffers}
            found = {key: address.Base(buffers[key], tl.constexpr(part.per)) for key, part in parts.items()}
            self.address, self.fields = address.flat, param + 1
        else:
            found = {key: _role(param + i, part.dtype, part.per) for i, (key, part) in enumerate(parts.items())}
            self.address, self.fields = address.scattered, param + len(parts)
        by_role = [tuple(found[part_key(role, part)] for part in form.parts) for role, form in bucket.stored.roles]
        self.roles = _of_roles(by_role, bucket, partial(address.Tensors, grad))

    def _write_records(self, bucket: Bucket, params: Sequence[Tensor], parts: dict[str, Part]) -> None:
        """All but what changes with the gradients."""
        members, param = bucket.members, address.PARAM.value
        self.records = np.zeros((len(members), self.fields), dtype=np.int64)
        self.records[:, address.NUMEL.value] = [p.numel() for p in params]
        # Where the device counts, every parameter has a row of its own.
        self.records[:, address.ROW.value] = range(len(members)) if bucket.capturable else [m.cohort for m in members]
        self.records[:, address.DRAW.value] = [m.first_draw for m in members]
        dense = [param]
        if bucket.flat:
            self.records[:, param] = [m.place.space.offsets[m.place.index] for m in members]
        else:
            self.records[:, param] = [p.data_ptr() for p in params]
            for i, key in enumerate(list(parts)[1:], start=param + 1):
                self.records[:, i] = [m.place.views[key].data_ptr() for m in members]
            # A scale for many elements may lie anywhere.
            dense = [param + i for i, part in enumerate(parts.values()) if part.per == 1]
        self.in_line = np.bitwise_or.reduce(self.records[:, dense], axis=1) & 15 == 0

    def _divide_among_threads(self, bucket: Bucket, parts: dict[str, Part]) -> None:
        """How many elements a thread takes, and how many warps a program has."""
        quantizes = bucket.stored.quantizes
        # Threads hold 16 bytes of the widest part, and a warp whole blocks of quantized ones.
        widths = [bucket.grad_dtype.itemsize, *(part.dtype.itemsize for part in parts.values() if part.per == 1)]
        width = 2 if quantizes else max(widths)
        self.vector = self.tuning.bytes_at_once // width
        """Elements that a thread takes at once."""
        self.warp = 32 if interpreting() else driver.active.get_current_target().warp_size
        # Random bits serve eight elements, which must not be parted.
        self.draws = bucket.stored.draws
        mixes = not (quantizes or self.draws) and max(widths) == 4 > min(widths)
        self.granule = QUANTIZED if quantizes else self.vector if mixes else 8
        vectors = self.tuning.vectors_of_much if quantizes or mixes else 1
        self.num_warps = max(1, self.tuning.block // (self.warp * self.vector * vectors))
        self.max_registers = self.tuning.max_registers_of_much if quantizes else self.tuning.max_registers
        self.wide_block = self.tuning.norm_warps * self.warp * self.vector
        """The tile of an update with as many warps as the norm: it divides the norm's."""

    @cached_property
    def bounds(self) -> dict[str, int]:
        """What the compiler of the update is told of registers."""
        elements = self.tuning.block // (self.num_warps * self.warp)
        return {"maxnreg": self.tuning.registers[elements]} if elements in self.tuning.registers else {}

    def point_to(self, grads: Sequence[Tensor]) -> None:
        """Tell the device where the gradients are, if it does not know. A graph has a table of its own."""
        found = np.fromiter(map(Tensor.data_ptr, grads), np.int64, len(grads))
        addresses = found.tobytes()
        if addresses != self.addresses or not self.upload.holds():
            self.addresses = b""  # as long as an interrupt may come before they are on their way
            self.records[:, address.GRAD.value] = found
            self.records[:, address.IS_ALIGNED.value] = (found & 15 == 0) & self.in_line
            self.upload.send(self.records)
            self.addresses = addresses


def tuned(device: torch.device) -> tuning.Tuning:
    """The table's row for that device."""
    if interpreting():
        return tuning.TABLE["interpreter"]
    with on(device):
        target = driver.active.get_current_target()
    return tuning.tuning(target.backend, target.arch)


def _role(field: int, dtype: torch.dtype, per: int = 1) -> address.Role:
    return address.Role(tl.constexpr(field), tl.constexpr(TYPES[dtype]), tl.constexpr(per))


def _of_roles(found: list, bucket: Bucket, make: Callable) -> tuple:
    """What belongs to the parameter, to the states and to the averages."""
    end = 1 + len(bucket.rule.states)
    return make(found[0], tuple(found[1:end]), tuple(found[end:]))


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. n-1 for each count n, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
