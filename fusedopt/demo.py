"""Train the lessons twice, with torch.optim and with fusedopt, and show what differs: nothing but the time of a step.

Both networks start from the same seed and see the same batches, in lockstep: on each batch first the one, then the
other makes its step, and they take turns in going first, so that whatever disturbs the machine disturbs both.
"""

import functools
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

import fusedopt
from fusedopt.demo_options import SCHEDULES
from fusedopt.lessons import Lesson
from fusedopt.stopping import Criterion

LEARNING_RATES = {"SGD": 0.1}  # the classifier's; every other optimizer keeps torch's own default


@dataclass
class Run:
    """One side of a comparison: a network, its optimizer, and what was recorded while it trained."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float | None = None
    schedule: LRScheduler | None = None
    losses: list[float] = field(default_factory=list)  # mean over the batches of each epoch
    seconds: list[float] = field(default_factory=list)  # wall time of each step, clipping included
    rates: list[float] = field(default_factory=list)  # learning rate of each step
    norms: list[Tensor] = field(default_factory=list)  # gradient norm of each step, before clipping; 0-dim
    scores: dict[str, float] = field(default_factory=dict)  # of each part, after the training

    def learn(self, lesson: Lesson, x: Tensor, y: Tensor) -> Tensor:
        """One update on the batch x (n, d), y (n,); returns the loss before it, 0-dim."""
        self.optimizer.zero_grad()
        loss = lesson.loss(self.network(x), y)
        loss.backward()
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters()]))
        self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
        synchronize(x.device)
        start = time.perf_counter()
        if self.clip is not None and not isinstance(self.optimizer, fusedopt.FusedOptimizer):
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.optimizer.step()
        synchronize(x.device)
        self.seconds.append(time.perf_counter() - start)
        if self.schedule is not None and not isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step()
        return loss.detach()

    def end_epoch(self, loss: float) -> None:
        self.losses.append(loss)
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(loss)

    def clipped_norms(self) -> list[float]:
        """The gradient norms after clipping."""
        norms = torch.stack(self.norms).tolist()
        return norms if self.clip is None else [norm * min(1, self.clip / (norm + 1e-6)) for norm in norms]


@dataclass
class Comparison:
    """The same training by torch.optim and by fusedopt; ``runs`` is keyed by these two names."""

    lesson: Lesson
    optimizer: str
    runs: dict[str, Run]
    stopped: str | None = None  # why the training ended before its last epoch

    @property
    def difference(self) -> float:
        """max |theta_torch - theta_fusedopt| over all elements of all parameters; NaN if any of them is."""
        pairs = zip(*(run.network.parameters() for run in self.runs.values()))
        return torch.stack([(theirs - ours).detach().abs().max() for theirs, ours in pairs]).max().item()

    @property
    def speedup(self) -> float:
        """Median time of a torch.optim step over that of a fusedopt step."""
        theirs, ours = (median(run.seconds) for run in self.runs.values())
        return theirs / ours


@dataclass(frozen=True)
class Regime:
    """How both sides train: ``lr`` None is the optimizer's default, ``clip`` the largest gradient norm, ``schedule`` a
    name in SCHEDULES, and ``stop`` the criteria that are asked after each epoch."""

    epochs: int
    lr: float | None = None
    clip: float | None = None
    schedule: str | None = None
    stop: tuple[Callable[[torch.optim.Optimizer], Criterion], ...] = ()


def compare(lesson: Lesson, name: str, regime: Regime, *, device: torch.device, seed: int = 0) -> Comparison:
    """Train ``lesson`` with ``torch.optim.<name>`` and ``fusedopt.<name>``, step by step on the same batches."""
    settings = {} if regime.lr is None else {"lr": regime.lr}
    parts = {part: (x.to(device), y.to(device)) for part, (x, y) in lesson.parts.items()}
    batch_size = lesson.batch_size or len(parts["train"][0])
    steps = regime.epochs * -(-len(parts["train"][0]) // batch_size)
    runs = {}
    for library, optimizer in (("torch.optim", getattr(torch.optim, name)), ("fusedopt", fusedopt.registry[name])):
        network = lesson.network(seed).to(device)
        inside = {"max_grad_norm": regime.clip} if library == "fusedopt" else {}
        runs[library] = run = Run(network, optimizer(network.parameters(), **settings, **inside), regime.clip)
        rate = run.optimizer.param_groups[0]["lr"]
        if regime.schedule is not None:
            run.schedule = SCHEDULES[regime.schedule](run.optimizer, steps)
    result = Comparison(lesson, f"{name} lr={rate:g}", runs)
    asked = [make(runs["fusedopt"].optimizer) for make in regime.stop]
    stop = functools.reduce(operator.or_, asked) if asked else None

    shuffle = torch.Generator().manual_seed(seed)  # on the CPU: the same batches on every device
    progress = tqdm(range(regime.epochs), desc=f"{lesson.name}, {result.optimizer}", unit="epoch")
    turn = list(runs.values())
    for _ in progress:
        losses = {id(run): [] for run in turn}
        for x, y in batches(*parts["train"], lesson.batch_size, shuffle):
            for run in turn:
                losses[id(run)].append(run.learn(lesson, x, y))
            turn.reverse()
        for run in turn:
            run.end_epoch(torch.stack(losses[id(run)]).mean().item())
        progress.set_postfix_str(f"loss {runs['fusedopt'].losses[-1]:.4f}", refresh=False)
        if stop is not None and stop(runs["fusedopt"].losses[-1]):
            result.stopped = stop.reason
            progress.close()
            break

    for run in turn:
        with torch.no_grad():
            run.scores = {part: lesson.score(run.network(x), y).item() for part, (x, y) in parts.items()}
    return result


def batches(x: Tensor, y: Tensor, size: int | None, shuffle: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch: x (n, d) and y (n,) in random order, ``size`` rows at a time; None: everything at once, in order."""
    if size is None:
        yield x, y
        return
    for rows in torch.randperm(len(x), generator=shuffle).to(x.device).split(size):
        yield x[rows], y[rows]


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Let torch use ``number`` CPU threads inside the block.

    Two threads make these trainings 1.3 times as fast on two free cores, and 20 times as slow where another program
    holds one of them: every parallel region then waits for the thread that does not run.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a step's time holds the work of that step and of nothing else."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(comparisons: list[Comparison]) -> str:
    """Two lines per training, torch.optim above fusedopt; plain ASCII, so that any terminal or pipe can take it."""
    rows = [
        ("training", "optimizer", "library", "measure", "train", "validation", "test", "step", "ratio", "difference")
    ]
    for result in comparisons:
        for library, run in result.runs.items():
            ours = library == "fusedopt"
            rows.append(
                (
                    "" if ours else result.lesson.name,
                    "" if ours else result.optimizer,
                    library,
                    result.lesson.score_name,
                    *(format(score, result.lesson.score_format) for score in run.scores.values()),
                    f"{median(run.seconds) * 1e6:.1f} us",
                    f"{result.speedup:.2f}x" if ours else "",
                    f"{result.difference:.1e}" if ours else "",
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = 4  # columns of words stand left, columns of numbers right
    lines = [
        "  ".join(
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
