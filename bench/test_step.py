"""``pytest bench/``: one ``step()`` of fusedopt and of each of torch's implementations, grouped by case.

``bench/step.py`` measures the same cases interleaved and as ratios, which is what to believe on a machine that
others use too.
"""

import math

import pytest
import shapes
import torch
from step import VARIANTS, settle, steppers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS = ("forloop", "foreach", "fused", "default", "flatten")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "clip"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", shapes.MODELS)
def test_step(benchmark, model, variant, clip, implementation):
    benchmark.group = f"{model} {variant} {'clip' if clip else 'plain'}"
    step = dict(steppers(model, variant, clip, DEVICE, only=implementation)).get(implementation)
    if step is None:
        pytest.skip(f"torch has no {implementation} implementation of {variant}")

    def run():
        step()
        settle(DEVICE)

    benchmark.pedantic(run, rounds=7, warmup_rounds=2)


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [("mlp", 4, 203_530), ("resnet50", 161, 25_557_032), ("gpt2", 148, 124_439_808), ("small1000", 1000, 160_000)],
)
def test_shapes(model, tensors, parameters):
    """The published counts: torchvision's resnet50, OpenAI's smallest GPT-2 with tied embeddings."""
    listed = [shape for group in shapes.MODELS[model] for shape in group]
    assert len(listed) == tensors
    assert sum(map(math.prod, listed)) == parameters
