"""Memory that planning gives up goes back to the stream on which it was allocated, and waits for the one that still
copies it."""

import pytest
import torch
from test_flat import linear_parameters
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no streams")


class Recorded(TorchDispatchMode):
    """Whose memory waits for a stream before it is free."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.record_stream.default:
            self.addresses.add(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{"flatten": True}, {"flatten": True, "state_dtype": torch.bfloat16}], ids=str)
def test_memory_that_a_step_gives_up_waits_for_its_stream(settings, device):
    """The parameters' own, and that of loaded states: the step may not be over yet when others get it."""
    params = linear_parameters(dtype=torch.float32, device=device)
    optimizer = fusedopt.Adam(params, **settings)
    states = {k: {"step": 3, "exp_avg": p.clone(), "exp_avg_sq": p.square()} for k, p in enumerate(params)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    for p in params:
        p.grad = torch.ones_like(p)
    given_up = {x.data_ptr() for state in optimizer.state.values() for x in state.values() if x.is_cuda}
    given_up |= {p.data_ptr() for p in params}
    with Recorded() as recorded, torch.cuda.stream(torch.cuda.Stream()):
        optimizer.step()
    assert given_up <= recorded.addresses
    # So do their buffers, when others take the place of these.
    for p, place in optimizer._engine.places.items():
        buffers = {x.data_ptr() for x in place.space.buffers.values()}
        p.data = p.detach().double()
        p.grad = p.detach().clone()
    with Recorded() as recorded:
        optimizer.step()
    assert buffers <= recorded.addresses
