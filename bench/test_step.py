"""``pytest bench/``: one ``step()`` of every implementation, grouped by case.

All implementations of a case are measured together, in interleaved rounds (measure.py); pytest-benchmark is told the
durations. So what it compares and saves does not depend on what the machine did meanwhile.
"""

import pytest
import shapes
from conftest import ROWS, chosen_implementations
from measure import measure, rows


class Replay:
    """A clock that shows durations measured before: two readings per round."""

    def __init__(self):
        self.readings = iter(())

    def show(self, durations):
        self.readings = iter([reading for duration in durations for reading in (0.0, duration)])

    def __call__(self):
        return next(self.readings)


clock = Replay()


@pytest.fixture(scope="module")
def measured(case, on, pytestconfig):
    """Results and rows of a case, by implementation."""
    results = measure(case, chosen_implementations(pytestconfig.option), on, pytestconfig.option.seconds)
    made = rows(case, results, on)
    pytestconfig.stash[ROWS] += made
    return {result.name: (result, row) for result, row in zip(results, made)}


@pytest.mark.benchmark(timer=clock)
def test_step(benchmark, measured, case, implementation):
    result, row = measured[implementation]
    if result.status == "skipped":
        pytest.skip(result.note)
    assert result.status == "ok", result.note
    benchmark.group = str(case)
    benchmark.extra_info.update({key: value for key, value in vars(row).items() if value not in (None, "")})
    clock.show(result.wall)
    benchmark.pedantic(lambda: None, rounds=len(result.wall))


@pytest.mark.parametrize(
    ("model", "tensors", "parameters"),
    [
        ("mlp", 4, 203_530),
        ("resnet50", 161, 25_557_032),
        ("gpt2", 148, 124_439_808),
        ("llama1b", 146, 1_235_814_400),
        ("small1000", 1000, 160_000),
    ],
)
def test_shapes(model, tensors, parameters):
    """The published counts: torchvision's resnet50, OpenAI's smallest GPT-2 and Llama 3.2 1B, both with tied
    embeddings."""
    assert shapes.tensors(shapes.MODELS[model]) == tensors
    assert shapes.elements(shapes.MODELS[model]) == parameters
