"""Nobody waits for the GPU: torch's own debug mode makes every operation that does so an error."""

import contextlib

import pytest
import torch
from feature_runs import Run
from features import KINDS, STEPS, absent, program

SETTLED = 2
"""The step from which on nothing is planned any more."""

WAIT = {"torch.amp.GradScaler", "tensor lr", "graph"}
"""torch's scaler asks whether to step; a host that counts steps reads the rate, which is on the GPU; what a graph holds
cannot wait."""

FEATURES = [name for name in KINDS if name not in WAIT and not absent(program([name]))]


@contextlib.contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to wait for")
@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("feature", FEATURES)
def test_no_step_waits(feature):
    run = Run(program([feature]), torch.device("cuda"), "triton")
    update = run.update

    def update_without_waiting():
        with no_waiting():
            update()

    for number in range(STEPS):
        if number == SETTLED:
            run.update = update_without_waiting
        run.step(number, None)
