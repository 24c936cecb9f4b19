"""Names -> jit functions, tensors -> tables of addresses, one update launch per bucket.

Only this module and its parts, ``triton_*.py``, import ``fusedopt.kernels``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .buckets import Bucket, Member
from .clipping import Terms, Verdict
from .cohorts import StepNumbers
from .flat import is_dense
from .forms import wide
from .gather import Picked
from .kernels import means, rules, tracked
from .kernels import step as step_kernel
from .launch import Launches
from .means import Chunks, stages_of
from .rule import Rule
from .settings import Settings
from .skips import Skips
from .triton_ahead import compile_ahead
from .triton_columns import Columns
from .triton_cooperative import Cooperative
from .triton_norm import Norm, judge, scaler_argument
from .triton_rows import Chains, Rows
from .triton_tables import TYPES, Tables
from .triton_tally import Tally
from .triton_units import Limits


class Executor:
    """Runs one bucket."""

    judge = staticmethod(judge)
    compile_ahead = staticmethod(compile_ahead)

    def __init__(self, bucket: Bucket, settings: Settings):
        self.bucket = bucket
        self.settings = settings
        self.kernel = rule_kernel(bucket.rule)
        members = self.pinned = bucket.members
        # A parameter with gaps in memory is updated in a dense copy.
        self.copied = {m: m.place.without_gaps() for m in members if not is_dense(m.param)}
        self.params = [self.copied.get(m, m.param) for m in members]
        self.picked = Picked(members)
        self.in_place = [m.param for m in members if m not in self.copied]
        self.grads: list[Tensor] = []
        self.owes_zeros = False
        """Whether zeros shall take the gradients' place, and do not yet."""

        self.launch = Launches(bucket.device)
        self.tables = Tables(bucket, self.params)
        self.norms = Norm(self.tables, bucket.device, self.launch)
        self.constants: dict[int, Mapping[str, Any]] = {}
        """The constants of kernels, by the width of a row."""
        self.compute_dtype = wide(bucket.dtype)
        self.rows: Columns | Rows
        if bucket.capturable:
            self.rows = Columns(bucket, self.compute_dtype, self.launch)
        else:
            self.rows = Rows(bucket, self.compute_dtype)
        self.chunks: dict[int, Chunks] = {}
        """For so many means. Others stay: a CUDA graph may go on using them."""
        self.needs_means: bool | None = None
        self.units: Limits | None = None
        if settings.adaptive_grad_clip is not None:
            self.units = Limits(self.params, self.compute_dtype, self.tables, self.launch)
        self.tally = Tally([m.position for m in members], self.tables, bucket.device)
        self.cooperative = Cooperative()

    def take(self, grads: Sequence[Tensor | None], as_planned: bool, owes_zeros: bool) -> None:
        """Take this step's gradients, in their parameters' layout, and tell the device where they are. ``as_planned``:
        whether they are laid out as at the first step; ``owes_zeros``: whether zeros shall take their place."""
        self.owes_zeros = owes_zeros
        self.grads = self.picked(grads, as_planned)
        self.tables.point_to(self.grads)

    def release(self) -> None:
        """Forget the gradients: the next backward pass must not hold two sets of them."""
        self.grads = []
        if self.units is not None:
            self.units.forget()

    def norm(self) -> float:
        """The norm of the gradients, waited for: only for buckets on several devices or backends."""
        return self.norms.wait()

    @property
    def ordered(self) -> Sequence[Member]:
        """The members in the order of means over them."""
        return self.bucket.members

    def shares_of_means(self, update: StepNumbers, verdict: Verdict, skips: Skips) -> Tensor:
        """What this rank's parts add to the means over whole parameters: float64 [members, terms]."""
        size = {"dtype": torch.float64, "device": self.bucket.device}
        if self.tables.tiles.count == 0:
            return torch.zeros(len(self.ordered), 0, **size)
        chains, shared, heeding = self._prepare_after(update, verdict, skips)
        shares = torch.zeros(len(self.ordered), chains.means_at_most, **size)
        found = self._means(chains, shared, *heeding).unbind(1) if chains.terms else ()
        for k, means_here in zip(chains.means, found):
            shares[:, k] = means_here * self.part_of_whole
        return shares

    @functools.cached_property
    def part_of_whole(self) -> Tensor:
        """How much of each whole parameter's elements this rank has."""
        sizes = [m.param.numel() / max(m.owner.numel(), 1) for m in self.ordered]
        return torch.tensor(sizes, dtype=torch.float64, device="cpu").to(self.bucket.device)

    def step(self, update: StepNumbers, verdict: Verdict, skips: Skips, found: Tensor | None = None) -> None:
        """Launch the update; ``found`` are the means, where ranks have joined theirs."""
        if self.tables.tiles.count == 0:
            self.owes_zeros = False
            if self.bucket.capturable:
                self.rows.look()
            return
        forms = self.forms()
        self._launch(update, verdict, skips, found, forms)
        self.finish(forms)

    def foresee(self, update: StepNumbers, verdict: Verdict, skips: Skips) -> None:
        """Go through the launches of ``step``, which ``launch`` leaves to be compiled."""
        if self.tables.tiles.count:
            self._launch(update, verdict, skips, None, self.forms())
        if self.bucket.capturable:
            self.rows.foresee(update.optimizer, verdict.tensor)
        if self.units is not None:
            self.units.forget()

    def _launch(self, update: StepNumbers, verdict: Verdict, skips: Skips, found: Tensor | None, forms: Any) -> None:
        chains, shared, heeding = self._prepare_after(update, verdict, skips)
        if not chains.terms:
            found = None
        elif found is None:
            found = self._means(chains, shared, *heeding)
        elif len(chains.terms) < found.shape[1]:
            found = torch.stack([found[:, k] for k in chains.means], dim=1)
        tables = self.tables
        variant = chains.used, heeding[0] is None, forms is tables.forms
        numbers = self.rows.table, found, *heeding, self.settings.seed, self.limits()
        formulas = tables.roles, forms, chains.h, chains.on_grad, chains.on_update, chains.averages
        shared = shared | {"DRAWS": self.tables.draws, "MEANS": len(chains.terms)}
        if self.settings.track is None:
            tiles = tables.tiles
            self.launch(
                step_kernel.step, variant, tiles.count,
                tables.upload.device_copy, tiles.table, *numbers, *formulas, **shared,
            )  # fmt: skip
        else:
            self._launch_tracked(variant, numbers, formulas, shared, verdict.loss_scale)

    def forms(self) -> Any:
        """The forms that this step's kernel stores in."""
        # Zeros belong in the gradients themselves, not in copies of them.
        zeroes = self.owes_zeros and all(g is m.owner.grad for g, m in zip(self.grads, self.bucket.members))
        return self.tables.zeroing_forms if zeroes else self.tables.forms

    def limits(self) -> Any:
        """The limits of the units, if gradients are clipped by units."""
        return self.units and self.units.of_step(self.settings.adaptive_grad_clip)

    def _launch_tracked(
        self, variant: tuple, numbers: tuple, formulas: tuple, shared: dict[str, Any], loss_scale: Tensor | None
    ) -> None:
        chunks, self.tally.latest = self.tally.chunks, self.tally.of_chunks
        scale, kind = scaler_argument(loss_scale, self.bucket.device)
        self.launch(
            tracked.tracked_step, (variant, kind), chunks.programs,
            self.tables.upload.device_copy, chunks.table, *numbers, self.tally.latest.sums, scale, *formulas,
            LANES=self.tables.tuning.block // self.tables.vector, **shared,
        )  # fmt: skip

    def step_cooperatively(self, update: StepNumbers, terms: Terms, skips: Skips) -> Verdict | None:
        """Launch norm, verdict and update as one cooperative kernel. None if there is nothing to update, where the
        verdict is one launch by itself, or if the driver refuses, which it will do at every step; RuntimeError if
        nothing else will do."""
        return self.cooperative.step(self, update, terms, skips) if self.tables.tiles.count else None

    def advance(self, optimizer: Any, verdict: Verdict) -> None:
        """Let the device count the step, unless the verdict skips it: after ``step``, for what is capturable."""
        self.rows.advance(optimizer, verdict.tensor)

    def variants(self, skips: Skips) -> tuple[int, int]:
        """Of how many skipped steps the rows know, and how many rows there are for further ones."""
        # A device that counts knows of all.
        return (0, 1) if self.bucket.capturable else (skips.known, skips.variants)

    def problem_with_one_launch(self, optimizer: Any) -> str | None:
        """Why ``step_cooperatively`` cannot be used, or None."""
        if self.needs_means is None:
            self.needs_means = bool(stages_of(optimizer.first_update(self.bucket.cohorts[0].group)))
        if self.needs_means:
            return "cautious=True, or another setting that needs means over tensors, takes a launch between"
        return self.cooperative.refusal

    @property
    def prefers_one_launch(self) -> bool:
        return self.tables.tuning.launches == 1

    def prepare(self, update: StepNumbers, variants: int) -> tuple[Chains, dict[str, Any]]:
        """Write this step's rows; what the update kernels have in common."""
        chains = self.rows.write(update, variants)
        for member, copy in self.copied.items():
            copy.copy_(member.param)
        shared = self.constants.get(chains.width)
        if shared is None:
            tables = self.tables
            shared = self.constants[chains.width] = MappingProxyType({
                "RULE": self.kernel, "ADDRESS": tables.address, "COMPUTE": TYPES[self.compute_dtype],
                "FIELDS": tables.fields, "WIDTH": chains.width, "GRANULE": tables.granule, **tables.bounds,
                "BLOCK": tables.tuning.block, "num_warps": tables.num_warps, "enable_fp_fusion": False,
            })  # fmt: skip
        return chains, shared

    def _prepare_after(
        self, update: StepNumbers, verdict: Verdict, skips: Skips
    ) -> tuple[Chains, dict[str, Any], tuple]:
        """``prepare``, and the arguments by which a kernel heeds the verdict that was passed before it."""
        known, variants = self.variants(skips) if verdict.tensor is not None else (0, 1)
        return *self.prepare(update, variants), (verdict.on(self.bucket.device), known, variants)

    def _means(self, chains: Chains, shared: dict[str, Any], *heeding: Any) -> Tensor:
        """Launch the kernel of the means over each tensor."""
        count = len(chains.terms)
        if count not in self.chunks:
            self.chunks[count] = Chunks(self.tables.tiles.of_tensors, count, self.bucket.device)
        chunks, tables = self.chunks[count], self.tables
        self.launch(
            means.means_of_terms, (chains.used, heeding[0] is None), chunks.programs,
            tables.upload.device_copy, chunks.table, self.rows.table, chunks.partials, chunks.tickets, chunks.means,
            *heeding, self.limits(), tables.roles, tables.forms, chains.h, chains.on_grad, chains.terms,
            VECTOR=tables.vector, **shared,
        )  # fmt: skip
        return chunks.means

    def finish(self, forms: Any) -> None:
        """What is left to do behind the launch of an update that stores in these forms."""
        if forms is self.tables.zeroing_forms:
            self.owes_zeros = False
        for member, copy in self.copied.items():
            member.param.copy_(copy)
        # In-place writes that autograd does not see by itself.
        torch.autograd.graph.increment_version(self.in_place)


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
