"""``capturable=True``: step counts that only the device knows, and what becomes of them in checkpoints and when a step
is skipped.

torch.optim refuses it on a CPU, so what is compared is our own step that counts on the host.
"""

import copy

import numpy as np
import pytest
import torch
from cases import give_gradients, interpreter_noise, model
from pairs import assert_same, close, snapshot
from test_capturable import optimizer, rows_by_parameter
from thinning import every_pair

import fusedopt

pytestmark = pytest.mark.usefixtures("needs_triton")


def test_states_are_as_in_torch(device):
    params = model("tiny", device=device)
    give_gradients(params, 4)
    opt = optimizer("NAdam", params)
    opt.step()
    for state in opt.state.values():
        for key in ("step", "mu_product"):
            assert (state[key].shape, state[key].dtype) == ((), torch.float32)
            assert state[key].device == params[0].device
        assert state["step"] == 1


@every_pair
@interpreter_noise
@pytest.mark.parametrize("name", ["SGD", "NAdam"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_checkpoints_go_between_both_kinds(name, before, after, device):
    """What a loaded group says of capturable counts, as in torch; where it is a setting, the setting does."""
    params = model("tiny", device=device)
    opt, twin = (optimizer(name, ps, capturable=before) for ps in (params, model("tiny", device=device)))
    for number in range(4, 7):
        for o in (opt, twin):
            give_gradients([p for group in o.param_groups for p in group["params"]], number)
            o.step()
    other = optimizer(name, params, capturable=after)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for group in other.param_groups:
        if "capturable" in group:
            assert group["capturable"] == before
            group["capturable"] = after
    for number in range(7, 10):
        for o in (other, twin):
            give_gradients([p for group in o.param_groups for p in group["params"]], number)
            o.step()
    close(params, [p for group in twin.param_groups for p in group["params"]], 1e-12)


@interpreter_noise
def test_a_count_that_somebody_changes_is_heeded(device):
    params = model("tiny", device=device)
    opt = optimizer("Adam", params)
    give_gradients(params, 5)
    opt.step()
    for state in opt.state.values():
        state["step"].fill_(41.0)
    plan = opt._engine.plan
    opt.step()
    assert opt._engine.plan is plan
    assert all(state["step"] == 42 for state in opt.state.values())
    row = next(iter(rows_by_parameter(opt).values()))
    assert np.isclose(float(row[4]), 1 / (1 - 0.9**42), rtol=1e-12)


@interpreter_noise
def test_a_first_step_that_was_skipped_is_still_to_come(device):
    """SGD keeps no count, and takes the first gradient as it is, without dampening."""
    ended = []
    for skipped in (False, True):
        params = model("tiny", device=device)
        options = {"momentum": 0.9, "dampening": 0.3}
        opt = optimizer("SGD", params, options, skip_nonfinite=True)
        for number in ([4] if skipped else []) + [5, 6]:
            give_gradients(params, number)
            if number == 4:
                params[1].grad.fill_(float("inf"))
            opt.step()
        ended.append(params)
    close(*ended, 1e-15)


@interpreter_noise
def test_only_some_groups(device):
    """The counts of the others stay on the host, and both know of skipped steps."""
    ended = []
    for capturable in (False, True):
        params = model("tiny", device=device)
        opt = optimizer("AdamW", params, {"amsgrad": True}, False, skip_nonfinite=True, max_grad_norm=2.0)
        opt.param_groups[1]["capturable"] = capturable
        for number in range(4, 10):
            give_gradients(params, number)
            if number == 6:
                params[1].grad = torch.full_like(params[1], float("nan"))
            opt.step()
        ended.append(snapshot(opt))
    for groups in (run.pop("groups") for run in ended):
        assert len(groups) == 2
    close(ended[0]["params"], ended[1]["params"], 1e-12)
    assert [float(s["step"]) for s in ended[0]["states"].values()] == [
        float(s["step"]) for s in ended[1]["states"].values()
    ]


@interpreter_noise
def test_the_host_takes_back_nothing_that_the_device_skipped(device):
    """When it begins to count after that."""
    params = model("tiny", device=device)
    opt = optimizer("Adam", params, {}, skip_nonfinite=True)
    for number in range(4, 10):
        give_gradients(params, number)
        if number in (6, 8):
            params[1].grad = torch.full_like(params[1], float("nan"))
        if number == 7:
            for group in opt.param_groups:
                group["capturable"] = False
        opt.step()
    assert all(state["step"] == 4 for state in opt.state_dict()["state"].values())
    assert opt.skipped_steps == 2


@pytest.mark.parametrize("name", ["SGD", "Lion"])
def test_a_setting_needs_the_kernels(name):
    params = model("tiny")
    opt = fusedopt.registry[name](params, capturable=True, backend="torch")
    give_gradients(params, 5)
    before = snapshot(opt)
    with pytest.raises(RuntimeError, match=r"capturable=True keeps the step count on a GPU.*parameter 0.*requested"):
        opt.step()
    assert_same(before, snapshot(opt))
