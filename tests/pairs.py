"""An optimizer of fusedopt beside torch's, on equal parameters; comparisons and snapshots.

The oracle is torch.optim's for-loop (``foreach=False``) in float64: its foreach and fused variants have
faults of their own.
"""

import torch
from cases import STEADY, give_gradients, in_two_groups, model
from options import LR, STATEFUL
from oracles import oracle_class

import fusedopt

SCALARS = {"mu_product", "eta", "mu"}
"""What torch keeps beside the step count, one number per parameter."""


class Pair:
    """An optimizer of fusedopt, and torch's beside it on equal parameters."""

    def __init__(
        self,
        name,
        options=None,
        kind="small",
        dtype=torch.float64,
        device="cpu",
        groups=True,
        build=model,
        start=STEADY,
        **settings,
    ):
        options = {"lr": LR, **(STATEFUL[name] if options is None else options)}
        self.ours, self.theirs = build(kind, dtype, device), build(kind, dtype, device)
        arrange = in_two_groups if groups else lambda params, options: params
        self.opt = fusedopt.registry[name](arrange(self.ours, options), **options, **settings)
        self.oracle = oracle_class(name)(arrange(self.theirs, options), **options, foreach=False)
        self.number = start
        self.clipped = False  # whether clipping ever changed a gradient

    def step(self, count=1):
        """Both take the same steps; the oracle clips as torch's users do."""
        for _ in range(count):
            give_gradients(self.ours, self.number)
            give_gradients(self.theirs, self.number, plain=True)
            self.opt.step()
            self.clipped |= clip(self.theirs, self.opt)
            self.oracle.step()
            self.number += 1

    def oracle_keys(self):
        """The names of the states that torch keeps for one parameter."""
        give_gradients(self.theirs, 5)
        self.oracle.step()
        return list(self.oracle.state[self.theirs[1]])

    def check(self, tolerance=1e-12):
        """Parameters, states and groups are those of the oracle.

        The tolerance: float64 rounds at 1.1e-16; 50 steps of a dozen operations, some of which cancel
        (centered RMSprop), stay below 1e-12, and a wrong or a float32 number anywhere does not.
        """
        close(self.ours, self.theirs, tolerance)
        for group, expected in zip(self.opt.param_groups, self.oracle.param_groups, strict=True):
            assert group.keys() == expected.keys()
            assert all(group[key] == expected[key] for key in group if key not in ("params", "foreach", "fused"))
        close_states(self.opt, self.oracle, tolerance)


def close_states(ours, theirs, tolerance):
    """The states of two optimizers, ours and torch's."""
    # Where state_dict() has been told of steps that were skipped on a GPU.
    ours, theirs = (optimizer.state_dict()["state"] for optimizer in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for k in ours:
        assert list(ours[k]) == list(theirs[k])
        expected = [comparable(key, s, ours[k][key]) for key, s in theirs[k].items()]
        close(list(ours[k].values()), expected, tolerance)


def comparable(key, theirs, ours):
    """A state of torch's, to be compared with ours. Dtypes of scalars are test_states_are_created_as_by_torch's: torch
    changes them when it loads. Its ASGD has them on the GPU, its step count too, where every step waits for them."""
    if key in SCALARS:
        return theirs.to(ours)
    return theirs.to(ours.device) if key == "step" else theirs


def clip(params, settings):
    """The settings of an optimizer of ours, done by torch. Returns whether they changed anything."""
    grads = [p.grad for p in params if p.grad is not None]
    before = [g.clone() for g in grads]
    if settings.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(params, settings.max_grad_norm, foreach=False)
    limits = settings.max_grad_value
    if limits is not None:
        low, high = limits if isinstance(limits, tuple) else (-limits, limits)
        for g in grads:
            g.clamp_(low, high)
    return not all(map(torch.equal, grads, before))


def close(ours, theirs, tolerance):
    """Equal in shape, dtype and device, and in value to ``tolerance`` (absolute below 1, relative above)."""
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a.detach(), b.detach(), rtol=tolerance, atol=tolerance, msg=lambda text, k=k: f"tensor {k}: {text}"
        )


def snapshot(optimizer):
    """Copies of everything that belongs to an optimizer: parameters, states, groups."""
    groups = optimizer.param_groups
    states = optimizer.state_dict()["state"]
    return {
        "params": [p.detach().clone() for group in groups for p in group["params"]],
        "states": {k: {key: copied(value) for key, value in state.items()} for k, state in states.items()},
        "groups": [{**group, "params": len(group["params"])} for group in groups],
    }


def copied(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def assert_same(before, after):
    """Two snapshots are the same to the last bit."""
    assert before["groups"] == after["groups"]
    assert len(before["params"]) == len(after["params"])
    assert all(map(same_bits, before["params"], after["params"]))
    assert before["states"].keys() == after["states"].keys()
    for k, state in before["states"].items():
        assert list(state) == list(after["states"][k])
        assert all(map(same_bits, state.values(), after["states"][k].values()))


def same_bits(a, b):
    """Equal dtypes, shapes and bit patterns, so that NaN and the sign of zero count; or equal objects."""
    if not isinstance(a, torch.Tensor):
        return a == b
    if (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
        return False
    if a.is_meta:
        return True
    # 0-dim tensors have no bytes to view, and expanded ones no memory of their own.
    return torch.equal(
        *(torch.empty(x.numel(), dtype=x.dtype).copy_(x.detach().flatten()).view(torch.uint8) for x in (a, b))
    )


def both(name, build, **settings):
    """``build()`` twice, with an optimizer of ours on the one and torch's on the other."""
    ours, theirs = build(), build()
    return (
        (ours, fusedopt.registry[name](ours.parameters(), lr=0.1, **settings)),
        (theirs, oracle_class(name)(theirs.parameters(), lr=0.1, foreach=False)),
    )


def raised(call):
    """The exception that a call ends with, or None."""
    try:
        call()
    except Exception as error:
        return error
    return None
