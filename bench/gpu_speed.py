"""The parts of gpu.py that time something."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from unittest import mock

import train
from gpu_run import Run
from measure import microseconds, outline
from problem import Case, Problem
from rivals import IMPLEMENTATIONS
from variants import VARIANTS

CLIPS = False, True
TORCHS = "foreach", "fused"
OURS = "fusedopt", "fusedopt flatten"
ONCE = "fusedopt one launch"


def adamw(run: Run) -> None:
    """Bandwidth of update and norm against a copy, and against torch's fused kernel with clip_grad_norm_."""
    cases = [Case("gpt2", "AdamW", clip, dtype=dtype) for dtype in ("float32", "bfloat16") for clip in CLIPS]
    run.measure(run.few(cases, 2), [*OURS, *TORCHS])


def small(run: Run) -> None:
    """Where the host sets the pace."""
    labels = run.few(("AdamW", "RMSprop", "SGD-momentum", "SGD"))
    cases = [Case(model, label, clip) for label in labels for model in ("small1000", "groups465") for clip in CLIPS]
    run.measure(run.few(cases, 2), [*OURS, *TORCHS])


def rules(run: Run) -> None:
    """Every formula on a large model. torch has a fused kernel for few of them, and foreach for most."""
    cases = [Case("gpt2", label, clip) for label in VARIANTS if label != "AdamW" for clip in CLIPS]
    run.measure(run.few(cases), ["fusedopt", *TORCHS], seconds=0.2)


def once(run: Run) -> None:
    """Clipping and update in one launch or in two, by size: what ``launches="auto"`` should be on this GPU."""
    cases = [Case(model, "AdamW", clip=True) for model in ("mlp", "small1000", "resnet50", "gpt2")]
    cases += [Case("resnet50", "AdamW", clip=True, dtype="bfloat16"), Case("resnet50", "AdamW", clip=True, amp=True)]
    run.measure(run.few(cases), ["fusedopt", ONCE, "fused"])


def amp(run: Run) -> None:
    cases = [Case(model, "AdamW", clip, amp=True) for model in ("gpt2", "small1000") for clip in CLIPS]
    run.measure(run.few(cases), ["fusedopt", *TORCHS])


def models(run: Run) -> None:
    """The rest of DESIGN section 9."""
    names = "llama1b", "one50m", "resnet50", "mlp"
    labels = "AdamW", "RMSprop", "SGD-momentum"
    cases = [Case(model, label, clip) for label in labels for model in names for clip in CLIPS]
    run.measure(run.few(cases), [*OURS, *TORCHS], seconds=0.2)


def packages(run: Run) -> None:
    """Other packages, and torch's compiled step, which takes long to compile."""
    others = [name for name in IMPLEMENTATIONS if name not in (*OURS, ONCE, *TORCHS, "forloop", "compiled")]
    cases = [Case(model, label) for model in ("gpt2", "small1000") for label in ("AdamW", "Lion") if label in VARIANTS]
    run.measure(run.few(cases), ["fusedopt", "fused", "foreach", *others], seconds=0.2)
    cases = [Case("resnet50", "AdamW", clip) for clip in CLIPS]
    run.measure(run.few(cases), run.few(["fusedopt", "fused", "compiled"], 2))  # compiling takes longer than all else


def training(run: Run) -> None:
    """Whole training steps."""
    for name in train.TASKS:
        run.write(*train.measure(name, run.on, 0.0 if run.dry else 20.0, tiny=run.dry))


def sweep(run: Run) -> None:
    """Tile and warps of the update kernel: what should stand in the tuning table of this GPU."""
    for dtype in run.few(("float32", "bfloat16")):
        for flatten in run.few((False, True)):
            case = Case("gpt2", "AdamW", dtype=dtype)
            problem = Problem(case, run.models["gpt2"], run.on.name, run.backend)
            for block in run.few((512, 1024, 2048, 4096)):
                for elements in run.few((4, 8, 16)):
                    warps = block // (32 * elements)
                    run.write(_tuned(run, problem, block, warps, "fusedopt flatten" if flatten else "fusedopt"))


def _tuned(run: Run, problem: Problem, block: int, warps: int, name: str):
    label = f"{name} BLOCK={block} warps={warps}"
    try:
        with tuned(block, warps):
            optimizer, step = problem.made(name, problem.parameters())
            step()
            step()
            times = [run.on.busy(step, 3) or 0.0 for _ in range(7)]
    except Exception as error:  # out of registers, say: a row of the table, not the end of it
        return outline(problem.case, run.on, "sweep", label, run.models, status="failed", note=str(error))
    took = statistics.median(times)
    bytes_ = problem.bytes_needed(optimizer)
    return outline(
        problem.case, run.on, "sweep", label, run.models, device_us=microseconds(took), bytes=bytes_, rounds=len(times)
    )


@contextlib.contextmanager
def tuned(block: int, warps: int) -> Iterator[None]:
    """Kernels with that tile and that many warps, whatever the table says."""
    from fusedopt import triton_tables

    tables = triton_tables.Tables
    chosen, original = triton_tables.tuned, tables.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.num_warps = warps

    with (
        mock.patch.object(triton_tables, "tuned", lambda device: chosen(device)._replace(block=block)),
        mock.patch.object(tables, "__init__", init),
    ):
        yield
