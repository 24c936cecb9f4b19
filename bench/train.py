"""End to end: whole training steps (forward, backward, clipping, update) with torch's optimizer and with ours.

    python bench/train.py [--save]

``char-gpt`` predicts the next character of the documentation that ships inside Python (``pydoc_data.topics``);
``convnet``, a small ResNet, tells noisy patterns apart. Both take turns in one process, from the same seed on the same
batches, and their losses must come out alike.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from device import Cpu, device
from history import HISTORY, Row, append
from measure import Result, rows
from problem import Case, Problem
from step import HEADER, line
from torch import Tensor, nn
from torch.nn import functional as F

from fusedopt.__main__ import amount

LIMIT = 1.0
"""Of the gradient norm, as usual for such networks."""

ALIKE = 0.05
"""Part by which the mean losses of the last steps may differ: training amplifies roundings."""


class Sizes(NamedTuple):
    width: int
    depth: int
    batch: int
    length: int
    """Characters, or pixels along a side."""


class Task(NamedTuple):
    variant: str
    sizes: dict[str, Sizes]
    build: Callable[[Sizes], nn.Module]
    batches: Callable[[Sizes, torch.device], Iterator[tuple[Tensor, Tensor]]]


class CharGPT(nn.Module):
    """Embedding, causal transformer blocks with the norm first, one linear layer back to characters."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        vocabulary = len(alphabet())
        self.characters = nn.Embedding(vocabulary, sizes.width)
        self.positions = nn.Parameter(torch.randn(sizes.length, sizes.width) * 0.02)
        heads = max(1, sizes.width // 64)
        block = nn.TransformerEncoderLayer(
            sizes.width, heads, 4 * sizes.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, sizes.depth, nn.LayerNorm(sizes.width), enable_nested_tensor=False)
        self.head = nn.Linear(sizes.width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(sizes.length))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.characters(x) + self.positions, self.mask, is_causal=True))


class Block(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), with a 1 x 1 convolution on the way where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        same = channels == width and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return self.short(x) + self.conv2(F.relu(self.norm2(y)))


def convnet(sizes: Sizes) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, sizes.width, 3, 1, 1, bias=False)]
    channels = sizes.width
    for stage in range(3):
        for number in range(sizes.depth):
            width = sizes.width * 2**stage
            layers.append(Block(channels, width, 2 if stage and not number else 1))
            channels = width
    return nn.Sequential(
        *layers, nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    )


@functools.cache
def text() -> str:
    """Half a million characters of English about Python."""
    from pydoc_data import topics

    return "\n".join(topics.topics.values())


@functools.cache
def alphabet() -> list[str]:
    return sorted(set(text()))


def sentences(sizes: Sizes, device: torch.device, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    index = {character: number for number, character in enumerate(alphabet())}
    data = torch.tensor([index[character] for character in text()], device=device)
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(sizes.length + 1, device=device)
    while True:
        starts = torch.randint(len(data) - sizes.length - 1, (sizes.batch,), generator=generator).to(device)
        picked = data[starts[:, None] + window]
        yield picked[:, :-1], picked[:, 1:]


def patterns(sizes: Sizes, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, sizes.length, sizes.length)
    kinds = torch.randn(10, *shape, generator=generator)
    while True:
        y = torch.randint(10, (sizes.batch,), generator=generator)
        x = kinds[y] + 2 * torch.randn(sizes.batch, *shape, generator=generator)
        yield x.to(device), y.to(device)


TASKS = {
    "char-gpt": Task(
        "AdamW",
        {"cuda": Sizes(384, 6, 64, 256), "cpu": Sizes(128, 4, 16, 64), "tiny": Sizes(4, 1, 2, 8)},
        CharGPT,
        sentences,
    ),
    "convnet": Task(
        "SGD-momentum",
        {"cuda": Sizes(64, 3, 256, 32), "cpu": Sizes(16, 2, 32, 32), "tiny": Sizes(2, 1, 2, 8)},
        convnet,
        patterns,
    ),
}

IMPLEMENTATIONS = "fusedopt", "foreach", "fused"


class Training:
    """One network under training by one implementation."""

    def __init__(self, task: Task, sizes: Sizes, name: str, device: torch.device, backend: str | None):
        torch.manual_seed(0)
        self.network = task.build(sizes).to(device)
        self.batches = task.batches(sizes, device)
        self.losses: list[Tensor] = []
        self.params = [p for p in self.network.parameters() if p.requires_grad]
        self.shapes = [[tuple(p.shape) for p in self.params]]
        case = Case("", task.variant, clip=True)
        groups = [{"params": self.params, "lr": 1e-3 if task.variant == "AdamW" else 0.05}]
        problem = Problem(case, [], device.type, backend)
        self.optimizer, self.update = problem.made(name, groups, LIMIT)

    def step(self) -> None:
        x, y = next(self.batches)
        autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda")
        with autocast:
            output = self.network(x)
            loss = F.cross_entropy(output.flatten(0, -2).float(), y.flatten())
        loss.backward()
        self.update()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())


def measure(name: str, on: Cpu, seconds: float, tiny: bool = False) -> list[Row]:
    """A row per implementation: the time of a whole training step, in interleaved rounds, and the losses."""
    task = TASKS[name]
    sizes = task.sizes["tiny" if tiny else on.name]
    device = torch.device(on.name)
    trainings = {
        each: Training(task, sizes, each, device, "triton" if tiny and each == "fusedopt" else None)
        for each in IMPLEMENTATIONS
    }
    results = {each: Result(each) for each in trainings}
    for each, training in trainings.items():
        on.settle()
        begin = time.perf_counter()
        training.step()
        on.settle()
        results[each].first = time.perf_counter() - begin
    deadline = time.perf_counter() + seconds
    order = list(trainings)
    per_round = 1 if tiny else 10
    while len(results["fusedopt"].wall) < (5 if seconds else 2) or time.perf_counter() < deadline:
        for each in order:
            on.settle()
            begin = time.perf_counter()
            for _ in range(per_round):
                trainings[each].step()
            on.settle()
            results[each].wall.append((time.perf_counter() - begin) / per_round)
        order.append(order.pop(0))
    ended = {each: [loss.item() for loss in training.losses] for each, training in trainings.items()}
    reference = statistics.fmean(ended["fused"][-20:])
    for each, losses in ended.items():
        last = statistics.fmean(losses[-20:])
        results[each].note = f"loss {losses[0]:.3f} -> {last:.3f} in {len(losses)} steps"
        if not math.isclose(last, reference, rel_tol=ALIKE):
            results[each].status = "unequal"
    case = Case(name, task.variant, clip=True, dtype="bfloat16 autocast" if on.name == "cuda" else "float32")
    made = rows(case, list(results.values()), on, {name: next(iter(trainings.values())).shapes})
    for row in made:
        row.part = "train"
    gc.collect()
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--threads", type=amount, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="per task (default: %(default)s)")
    parser.add_argument("--save", action="store_true", help="append the rows to --out")
    parser.add_argument("--out", type=pathlib.Path, default=HISTORY, help="default: bench/history.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    on = device(options.device)
    print(HEADER)
    for name in options.tasks:
        made = measure(name, on, options.seconds)
        print(*map(line, made), sep="\n", flush=True)
        if options.save:
            append(made, options.out)


if __name__ == "__main__":
    main()
