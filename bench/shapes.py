"""The parameter shapes of real models, without the models.

Each entry is a list of groups, each a list of shapes. Counts are checked against the published ones
in ``test_shapes``.
"""

from __future__ import annotations

Shape = tuple[int, ...]


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


def small(count: int = 1000) -> list[Shape]:
    """As in detectors, adapters and small language models: weights of 16 x 16 and biases of 64."""
    return [(16, 16) if i % 2 else (64,) for i in range(count)]


def layerwise(count: int = 465) -> list[list[Shape]]:
    """One group per tensor, as layer-wise learning rates make them in detectors: 465 groups."""
    sizes = ((256, 256), (256,), (256,), (1024, 256))
    return [[sizes[i % len(sizes)]] for i in range(count)]


MODELS: dict[str, list[list[Shape]]] = {
    "mlp": [mlp()],
    "resnet50": [resnet50()],
    "gpt2": [gpt2()],
    "small1000": [small()],
    "one50m": [[(50_000_000,)]],
    "groups465": layerwise(),
}
