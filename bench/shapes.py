"""The parameter shapes of real models, without the models.

A model is a list of groups, each a list of shapes. Counts are checked against the published ones
in ``test_shapes``.
"""

from __future__ import annotations

import math

Shape = tuple[int, ...]
Groups = list[list[Shape]]


def mlp() -> list[Shape]:
    """The lesson's classifier: Linear(784, 256), ReLU, Linear(256, 10)."""
    return [(256, 784), (256,), (10, 256), (10,)]


def resnet50() -> list[Shape]:
    """ResNet-50: 25,557,032 parameters in 161 tensors, most of them small."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[Shape]:
    """GPT-2 124M: 124,439,808 parameters in 148 tensors."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(block * 12), (d,), (d,)]


def llama() -> list[Shape]:
    """Llama 3.2 1B: 1,235,814,400 parameters in 146 tensors, embeddings tied."""
    d, kv, ffn = 2048, 512, 8192
    block = [(d,), (d, d), (kv, d), (kv, d), (d, d), (d,), (ffn, d), (ffn, d), (d, ffn)]
    return [(128_256, d), *(block * 16), (d,)]


def small(count: int = 1000) -> list[Shape]:
    """As in detectors, adapters and small language models: weights of 16 x 16 and biases of 64."""
    return [(16, 16) if i % 2 else (64,) for i in range(count)]


def layerwise(count: int = 465) -> list[list[Shape]]:
    """One group per tensor, as layer-wise learning rates make them in detectors: 465 groups."""
    sizes = ((256, 256), (256,), (256,), (1024, 256))
    return [[sizes[i % len(sizes)]] for i in range(count)]


MODELS: dict[str, Groups] = {
    "mlp": [mlp()],
    "resnet50": [resnet50()],
    "gpt2": [gpt2()],
    "llama1b": [llama()],
    "small1000": [small()],
    "one50m": [[(50_000_000,)]],
    "groups465": layerwise(),
}

TITLES = {
    "mlp": "MLP 784-256-10",
    "resnet50": "ResNet-50",
    "gpt2": "GPT-2 124M",
    "llama1b": "Llama 1B",
    "small1000": "1000 small tensors",
    "one50m": "one tensor of 50M",
    "groups465": "465 groups",
}
"""For tables, in their order."""

GPU_ONLY = {"llama1b"}
"""One step of it takes seconds on a CPU."""


def tensors(groups: Groups) -> int:
    return sum(map(len, groups))


def elements(groups: Groups) -> int:
    return sum(math.prod(shape) for group in groups for shape in group)


def cut(groups: Groups, limit: int) -> Groups:
    """The same groups and tensors, none with more than ``limit`` elements: quick to check, with all that many
    tensors and many groups can do wrong."""
    return [[shape if math.prod(shape) <= limit else (limit,) for shape in group] for group in groups]


def tiny(groups: Groups) -> Groups:
    """For Triton's interpreter, which takes milliseconds per tile: the first tensors of the first groups, cut."""
    return cut([group[:2] for group in groups[:2]], 60)
