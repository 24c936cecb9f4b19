"""Checkpoints of every option set of torch's own table of optimizer cases (``optim_db``)."""

import copy
import io

import pytest
import torch
from cases import AFTER_LOADING, give_gradients
from pairs import Pair, assert_same, close, snapshot
from thinning import every_pair, every_value
from torch_table import INFOS, every_info, every_input, exact, inputs

import fusedopt


@every_pair
@every_input
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_states_exchanged_with_torch(name, index, steps, device):
    """ours -> torch's -> file -> ours: the same bits, and afterwards the same steps to the last bit; but for numbers
    beside the step count, which torch casts."""
    options = exact(inputs(name)[index].kwargs)
    pair = Pair(name, options, "tiny", device=device, start=0)
    pair.step(steps)
    before = snapshot(pair.opt)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in pair.ours]
    middle = len(copies) // 2
    groups = [{"params": copies[:middle]}, {"params": copies[middle:]}]
    theirs = getattr(torch.optim, name)([dict(group) for group in groups], **options)
    theirs.load_state_dict(pair.opt.state_dict())
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    again = fusedopt.registry[name](groups, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    casts = AFTER_LOADING[name] > 1e-12
    if not casts:
        assert_same(before, snapshot(again))
    for number in range(steps, steps + 4):
        for params, optimizer in ((pair.ours, pair.opt), (copies, again)):
            give_gradients(params, number)
            optimizer.step()
    if casts:
        close(pair.ours, copies, AFTER_LOADING[name])
    else:
        assert_same(snapshot(pair.opt), snapshot(again))


@every_value
@every_input
def test_older_checkpoints(name, index, device):
    """Without the options that torch's class got later, and with steps that are numbers."""
    options = exact(inputs(name)[index].kwargs)
    pair = Pair(name, options, "tiny", device=device)
    pair.step(3)
    for optimizer in (pair.opt, pair.oracle):
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for flag in INFOS[name].not_og_supported_flags:
                group.pop(flag, None)
        for state in old["state"].values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].item()
        optimizer.load_state_dict(old)
        for group in optimizer.param_groups:
            group.update(maximize=options.get("maximize", False), foreach=False)
    pair.step(3)
    pair.check(AFTER_LOADING[name])


@every_info
@pytest.mark.parametrize("saved_named", [True, False])
@pytest.mark.parametrize("loaded_named", [True, False])
def test_named_parameters(name, saved_named, loaded_named):
    """The names of a checkpoint win; without any, the optimizer's own stay."""

    def build(cls, named):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).double()
        params = module.named_parameters() if named else module.parameters()
        return module, cls(params, lr=0.01)

    results = []
    for cls in (fusedopt.registry[name], getattr(torch.optim, name)):
        module, optimizer = build(cls, saved_named)
        for _ in range(2):
            optimizer.zero_grad()
            module(torch.ones(4, 3, dtype=torch.float64)).sum().backward()
            optimizer.step()
        other, loaded = build(cls, loaded_named)
        loaded.load_state_dict(optimizer.state_dict())
        other.load_state_dict(module.state_dict())
        other(torch.ones(4, 3, dtype=torch.float64)).sum().backward()
        loaded.step()
        results.append((list(other.parameters()), loaded.state_dict()["param_groups"]))
    close(results[0][0], results[1][0], AFTER_LOADING[name])
    assert results[0][1][0].get("param_names") == results[1][1][0].get("param_names")
    assert ("param_names" in results[0][1][0]) == (saved_named or loaded_named)
