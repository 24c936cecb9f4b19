"""Names -> jit functions, tensors -> tables of addresses, one update launch per bucket.

The only module that imports ``fusedopt.kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .backends import interpreting
from .clipping import Skips, Terms, Verdict
from .distributed import Reduction
from .flat import is_dense
from .forms import QUANTIZED
from .kernels import address, means, norm, rounding, rules, stages
from .kernels import step as step_kernel
from .launch import Launches
from .means import Chunks
from .plan import Bucket, Member
from .rule import Rule, Update
from .settings import Settings
from .storage import part_key
from .upload import Upload

BLOCK = 1024
"""Elements per tile, a multiple of flat.ALIGNMENT."""

SLOTS = 1024
"""Partial sums of the norm per bucket, whatever the device: the order of addition must not depend on it."""

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


class Executor:
    """Runs one bucket."""

    def __init__(self, bucket: Bucket, settings: Settings):
        self.bucket = bucket
        self.settings = settings
        self.kernel = rule_kernel(bucket.rule)
        self.compute_dtype = torch.promote_types(bucket.dtype, torch.float32)
        members = bucket.members
        # A parameter with gaps in memory is updated in a dense copy.
        self.copied = [(m, _dense_like(m)) for m in members if not is_dense(m.param)]
        copies = {id(m): copy for m, copy in self.copied}
        self.params = [copies.get(id(m), m.param) for m in members]
        self.positions = [m.position for m in members]
        self.in_place = [m.param for m in members if id(m) not in copies]

        parts = {part_key(role, part): part for role, form in bucket.stored.roles for part in form.parts}
        self.forms = _of_roles([rounding.FORMS[form.name] for _, form in bucket.stored.roles], bucket, rounding.Forms)
        param, grad = address.PARAM.value, _role(address.GRAD.value, bucket.grad_dtype)
        if bucket.flat:
            buffers = {"": members[0].place.space.buffers["param"], **members[0].place.space.buffers}
            found = {key: address.Base(buffers[key], tl.constexpr(part.per)) for key, part in parts.items()}
            self.address, self.fields = address.flat, param + 1
        else:
            found = {key: _role(param + i, part.dtype, part.per) for i, (key, part) in enumerate(parts.items())}
            self.address, self.fields = address.scattered, param + len(parts)
        by_role = [tuple(found[part_key(role, part)] for part in form.parts) for role, form in bucket.stored.roles]
        self.roles = _of_roles(by_role, bucket, partial(address.Tensors, grad))
        # Threads hold 16 bytes of the widest part, and a warp whole blocks of quantized ones.
        quantizes = bucket.stored.quantizes
        widest = (
            2 if quantizes else max(dtype.itemsize for dtype in (bucket.grad_dtype, *(x.dtype for x in parts.values())))
        )
        self.vector = 16 // widest
        self.num_warps, self.norm_warps = _warps(self.vector), _warps(16 // bucket.grad_dtype.itemsize)
        self.granule = QUANTIZED if quantizes else 8

        self.records = np.zeros((len(members), self.fields), dtype=np.int64)
        self.records[:, address.NUMEL.value] = sizes = [p.numel() for p in self.params]
        self.records[:, address.ROW.value] = [m.cohort for m in members]
        self.records[:, address.DRAW.value] = [m.first_draw for m in members]
        dense = [param]
        if bucket.flat:
            self.records[:, param] = [m.place.space.offsets[m.place.index] for m in members]
        else:
            self.records[:, param] = [p.data_ptr() for p in self.params]
            for i, key in enumerate(list(parts)[1:], start=param + 1):
                self.records[:, i] = [m.place.views[key].data_ptr() for m in members]
            # A scale for many elements may lie anywhere.
            dense = [param + i for i, part in enumerate(parts.values()) if part.per == 1]
        self.in_line = np.bitwise_or.reduce(self.records[:, dense], axis=1) & 15 == 0
        self.tile_counts = counts = -(-np.asarray(sizes) // BLOCK)
        tiles = np.stack([np.repeat(np.arange(len(sizes)), counts), _ranges(counts)], axis=1)
        self.tile_count = len(tiles)
        self.tiles = torch.from_numpy(tiles.astype(np.int32)).to(bucket.device)
        self.table = Upload(bucket.device)
        self.rows = Upload(bucket.device)
        self.chains: dict[tuple, tuple] = {}
        self.grads: list[Tensor] = []
        self.strides = list(map(Tensor.stride, self.params))
        self.addresses: list[int] | None = None
        """The gradients', as the device knows them."""
        self.slots: Tensor | None = None
        self.chunks: Chunks | None = None
        self.launch = Launches(bucket.device)

    def take(self, grads: Sequence[Tensor | None]) -> None:
        """Take this step's gradients, in their parameters' layout, and tell the device where they are."""
        self.grads = [grads[i] for i in self.positions]
        if list(map(Tensor.stride, self.grads)) != self.strides:
            self.grads = [
                g if g.stride() == p.stride() else torch.empty_like(p, dtype=g.dtype).copy_(g)
                for g, p in zip(self.grads, self.params)
            ]
        addresses = list(map(Tensor.data_ptr, self.grads))
        if addresses != self.addresses:
            self.addresses = addresses
            self.records[:, address.GRAD.value] = addresses
            self.records[:, address.IS_ALIGNED.value] = (self.records[:, address.GRAD.value] & 15 == 0) & self.in_line
            self.table.send(self.records)

    def release(self) -> None:
        """Forget the gradients: the next backward pass must not hold two sets of them."""
        self.grads = []

    def workspace(self, buckets: int) -> tuple[Tensor, Tensor]:
        """The norm's slots and ticket. Zeroed once: every step leaves the ticket at zero, and writes the same slots."""
        if self.slots is None or len(self.slots) != buckets * SLOTS:
            self.slots = torch.zeros(buckets * SLOTS, dtype=torch.float64, device=self.bucket.device)
            self.ticket = torch.zeros(1, dtype=torch.int32, device=self.bucket.device)
        return self.slots, self.ticket

    def norm(self) -> float:
        """The norm of the gradients, waited for: only for buckets on several devices or backends."""
        slots, verdict = (torch.zeros(n, dtype=torch.float64, device=self.bucket.device) for n in (SLOTS, 4))
        self.add_squares(slots, 0, None, verdict, Terms())
        return math.sqrt(slots.sum().item())

    def add_squares(
        self,
        slots: Tensor,
        first_slot: int,
        ticket: Tensor | None,
        verdict: Tensor,
        terms: Terms,
    ) -> None:
        """Launch the norm kernel over this bucket; with a ticket its last program passes the verdict."""
        judging, constants, variant = _on(self.bucket.device, terms)
        self.launch(
            norm.sum_of_squares, (ticket is None, variant), min(self.tile_count, SLOTS),
            self.table.device_copy, self.tiles, self.tile_count, self.roles.grad, slots, first_slot, slots.numel(),
            ticket, verdict, *judging, **constants,
            FIELDS=self.fields, BLOCK=BLOCK, SLOTS=SLOTS, num_warps=self.norm_warps, enable_fp_fusion=False,
        )  # fmt: skip

    def step(self, update: Callable[..., Update], verdict: Verdict, skips: Skips) -> None:
        """Launch the update."""
        if self.tile_count == 0:
            return
        if self.tiles.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("step() in a CUDA graph needs capturable=True: its numbers would be frozen at capture")
        on_device = verdict.device is not None
        variants = skips.variants if on_device else 1
        updates = [update(cohort, skipped) for cohort in self.bucket.cohorts for skipped in range(variants)]
        used, h, on_grad, on_update, terms, averages, columns = self._chains(updates)
        rows = np.array([columns(u) for u in updates], dtype=np.float64)
        if self.bucket.stored.draws:
            steps = [cohort.t + 1 - skipped for cohort in self.bucket.cohorts for skipped in range(variants)]
            rows = np.column_stack([rows, steps])
        self.rows.send(rows.astype(np.float64 if self.compute_dtype == torch.float64 else np.float32))
        for member, copy in self.copied:
            copy.copy_(member.param)
        judged = verdict.on(self.bucket.device), skips.known if on_device else 0, variants
        variant = used, judged[0] is None
        common = {
            "RULE": self.kernel, "ADDRESS": self.address, "COMPUTE": TYPES[self.compute_dtype], "FIELDS": self.fields,
            "WIDTH": rows.shape[1], "GRANULE": self.granule, "BLOCK": BLOCK,
            "num_warps": self.num_warps, "enable_fp_fusion": False,
        }  # fmt: skip
        if terms:
            if self.chunks is None or self.chunks.means.shape[1] != len(terms):
                self.chunks = Chunks(self.tile_counts, len(terms), self.bucket.device)
            self.launch(
                means.means_of_terms, variant, self.chunks.programs,
                self.table.device_copy, self.chunks.table, self.rows.device_copy, self.chunks.partials,
                self.chunks.tickets, self.chunks.means, *judged, self.roles, self.forms,
                h, on_grad, terms, VECTOR=self.vector, **common,
            )  # fmt: skip
        self.launch(
            step_kernel.step, variant, self.tile_count,
            self.table.device_copy, self.tiles, self.rows.device_copy, self.chunks.means if terms else None,
            *judged, self.settings.seed, self.roles, self.forms, h, on_grad, on_update, averages,
            DRAWS=self.bucket.stored.draws, MEANS=len(terms), **common,
        )  # fmt: skip
        for member, copy in self.copied:
            member.param.copy_(copy)
        # In-place writes that autograd does not see by itself.
        torch.autograd.graph.increment_version(self.in_place)

    def _chains(self, updates: Sequence[Update]) -> tuple:
        """The kernel's view of the rows: which columns are ``h``, which stages run on which columns, of which terms
        they need means, which columns are the averages' weights; and what fills them."""
        used = tuple(
            tuple(any(u[chain][i].args != u[chain][i].neutral for u in updates) for i in range(len(updates[0][chain])))
            for chain in (2, 3)
        )
        if used not in self.chains:
            first = updates[0]
            h, end = _columns(1, len(first.h))
            averages, end = _columns(end, len(first.averages))
            built, terms = [], []
            for chain, keep in zip((first.on_grad, first.on_update), used):
                picked = []
                for stage in (s for s, k in zip(chain, keep) if k):
                    places, end = _columns(end, len(stage.args))
                    mean = tl.constexpr(-1)
                    if stage.term is not None:
                        mean = tl.constexpr(len(terms))
                        terms.append(stages.Term(getattr(stages, stage.term), places))
                    picked.append(stages.Stage(getattr(stages, stage.name), places, mean))
                built.append(tuple(picked))

            def columns(u: Update) -> list[float]:
                args = (
                    x
                    for chain, keep in zip((u.on_grad, u.on_update), used)
                    for s, k in zip(chain, keep)
                    if k
                    for x in s.args
                )
                return [u.lr, *u.h, *u.averages, *args]

            self.chains[used] = (used, h, *built, tuple(terms), averages, columns)
        return self.chains[used]


def judge(executors: Sequence[Executor], terms: Terms, skips: Skips, reduction: Reduction) -> Verdict:
    """Pass the verdict on the device: one launch per bucket, and nobody waits."""
    device = executors[0].bucket.device
    verdict = skips.verdict(device)
    if reduction.communicates and terms.joins_ranks:
        _judge_with_other_ranks(executors, terms, verdict, reduction)
        return Verdict(norm=math.nan if terms.needs_norm else None, device=verdict)
    filled = [executor for executor in executors if executor.tile_count] if terms.needs_norm else []
    slots, ticket = executors[-1].workspace(max(len(filled), 1))
    for i, executor in enumerate(filled):
        last = executor is filled[-1]
        executor.add_squares(slots, i * SLOTS, ticket if last else None, verdict, terms)
    if not filled:
        judging, constants, variant = _on(device, terms)
        executors[-1].launch(
            norm.judge, variant, 1, slots, slots.numel(), verdict, *judging,
            **constants, SLOTS=SLOTS, enable_fp_fusion=False,
        )  # fmt: skip
    return Verdict(norm=math.nan if terms.needs_norm else None, device=verdict)


def _judge_with_other_ranks(executors: Sequence[Executor], terms: Terms, verdict: Tensor, reduction: Reduction) -> None:
    """The sums of squares by spread, one all_reduce per group, then the verdict in a launch of its own."""
    device = executors[0].bucket.device
    keys = reduction.keys
    alike = [[executor for executor in executors if executor.bucket.spread == key] for key in keys]
    longest = max(map(len, alike)) if terms.needs_norm else 0
    squares = torch.zeros(len(keys), dtype=torch.float64, device=device)
    if longest:
        slots, _ = executors[-1].workspace(len(keys) * longest)
        for i, row in enumerate(alike):
            for k, executor in enumerate(row):
                if executor.tile_count:
                    executor.add_squares(slots, (i * longest + k) * SLOTS, None, verdict, terms)
        squares = slots.view(len(keys), -1).sum(1)
    total = reduction.total(squares.to(reduction.device), terms.found_inf).to(device, non_blocking=True)
    if terms.found_inf is not None:
        terms = terms._replace(found_inf=total[1:])
    padded = torch.nn.functional.pad(total[:1], (0, SLOTS - 1))
    judging, constants, variant = _on(device, terms)
    executors[-1].launch(
        norm.judge, variant, 1, padded, SLOTS, verdict, *judging, **constants, SLOTS=SLOTS, enable_fp_fusion=False
    )


def _on(device: torch.device, terms: Terms) -> tuple[tuple, dict[str, bool], tuple]:
    """The kernels' last arguments, the constants that go with them, and which variant of a kernel they are."""
    # A scaler keeps its scale where the loss is, which may be another GPU.
    scaler = [x if x is None else x.to(device, non_blocking=True) for x in (terms.loss_scale, terms.found_inf)]
    constants = {"CLIP": terms.clip is not None, "SKIP": terms.skip_nonfinite}
    variant = *constants.values(), *(x if x is None else x.data_ptr() & 15 == 0 for x in scaler)
    return (*(terms.clip or (math.inf, 0.0, 1.0)), *scaler), constants, variant


def rule_kernel(rule: Rule) -> JITFunction | InterpretedFunction:
    """The rule as a Triton function.

    Raises:
        RuntimeError: if it has none, or one that cannot run in this process.
    """
    kernel = rule.kernel or getattr(rules, rule.name, None)
    if not isinstance(kernel, (JITFunction, InterpretedFunction)):
        raise RuntimeError(
            f"the rule {rule.name!r} has no Triton function: give Rule(kernel=...) one that is decorated with "
            "fusedopt.custom.jit, or use backend='torch'"
        )
    if isinstance(kernel, InterpretedFunction) != isinstance(step_kernel.step, InterpretedFunction):
        raise RuntimeError(
            f"TRITON_INTERPRET changed between the definition of the rule {rule.name!r} and of fusedopt's kernels; "
            "set it before the program starts"
        )
    return kernel


def _warps(vector: int) -> int:
    """How many warps share a tile, if each thread takes that many elements. AMD's have up to 64 threads."""
    threads = 32 if interpreting() else driver.active.get_current_target().warp_size
    return BLOCK // (threads * vector)


def _columns(start: int, count: int) -> tuple[tuple, int]:
    """The next columns of a row, and where they end."""
    return tuple(tl.constexpr(c) for c in range(start, start + count)), start + count


def _role(field: int, dtype: torch.dtype, per: int = 1) -> address.Role:
    return address.Role(tl.constexpr(field), tl.constexpr(TYPES[dtype]), tl.constexpr(per))


def _of_roles(found: list, bucket: Bucket, make: Callable) -> tuple:
    """What belongs to the parameter, to the states and to the averages."""
    end = 1 + len(bucket.rule.states)
    return make(found[0], tuple(found[1:end]), tuple(found[end:]))


def _dense_like(member: Member) -> Tensor:
    space, i = member.place.space, member.place.index
    return torch.empty_strided(space.sizes[i], space.strides[i], dtype=member.param.dtype, device=space.device)


def _ranges(counts: np.ndarray) -> np.ndarray:
    """0 .. n-1 for each count n, one after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
