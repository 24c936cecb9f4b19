"""``capturable=True``: the device counts the steps and makes the hyperparameters, and nobody waits for it.

torch.optim refuses it on a CPU, so what is compared is our own step that counts on the host, which other tests compare
with torch's.
"""

import pytest
import torch
from cases import (
    KERNEL_NAMES,
    STEADY,
    every_choice_of_options,
    give_gradients,
    in_two_groups,
    interpreter_noise,
    model,
)
from graphs import Waits
from options import LR, NAMES, STATEFUL
from pairs import close
from test_schedulers import SCHEDULERS

import fusedopt
from fusedopt.columns import maximum

pytestmark = pytest.mark.usefixtures("needs_triton")


def optimizer(name, params, options=None, capturable=True, **settings):
    options = {"lr": LR, **(STATEFUL[name] if options is None else options)}
    # Where it is a setting of ours instead of torch's argument, it means the same.
    groups = in_two_groups(params, options)
    return fusedopt.registry[name](
        groups, **options, **({"capturable": True} if capturable else {}), backend="triton", **settings
    )


@pytest.fixture
def no_launches(monkeypatch):
    """Steps count and make their rows, and no other kernel runs."""
    from fusedopt.kernels import numbers

    from fusedopt.launch import Launches

    launch = Launches.__call__

    def launch_numbers(self, kernel, *args, **constants):
        if kernel in (numbers.write_rows, numbers.advance):
            launch(self, kernel, *args, **constants)

    monkeypatch.setattr(Launches, "__call__", launch_numbers)


def rows_by_parameter(opt):
    (executor,) = opt._engine.executors
    table = executor.rows.table.cpu().double()
    members = executor.bucket.members
    return {m.position: table[k if executor.bucket.capturable else m.cohort] for k, m in enumerate(members)}


@every_choice_of_options
def test_the_device_makes_the_rows_of_the_host(name, options, device, no_launches):
    """Tolerance: powers and roots of another library in float64, and for RAdam what its difference makes of them: of a
    length of 1999 it takes nearly all away again."""
    rtol = 1e-11 if name == "RAdam" else 1e-13
    settings = {"max_grad_value": 0.9, "ema_decay": 0.99}
    opts = [
        optimizer(name, model("tiny", device=device), options, capturable, **settings) for capturable in (False, True)
    ]
    plans = []
    for number in range(14):
        found = []
        for opt in opts:
            params = [p for group in opt.param_groups for p in group["params"]]
            give_gradients(params, number)
            opt.param_groups[1]["weight_decay"] = 0.03 * (number % 3)
            if not isinstance(opt.param_groups[0]["lr"], torch.Tensor):
                opt.param_groups[0]["lr"] = LR / (1 + number // 2)
            opt.step()
            found.append(rows_by_parameter(opt))
        if number in (STEADY + 1, STEADY + 7):
            plans.append(opts[1]._engine.plan)
        expected, made = found
        assert made.keys() == expected.keys()
        for position, row in expected.items():
            torch.testing.assert_close(made[position], row, rtol=rtol, atol=1e-300, msg=f"{position}, step {number}")
    assert plans[0] is plans[1]
    host, device_counts = (opt.state_dict()["state"] for opt in opts)
    for k, state in host.items():
        for key in {"step", "mu_product", "eta", "mu"} & state.keys():
            torch.testing.assert_close(device_counts[k][key].cpu(), state[key], rtol=2e-7, atol=0)


@interpreter_noise
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_trajectory(name, device):
    """Clipping, averages, skipped steps and a learning rate that is a tensor."""
    ended = []
    for capturable in (False, True):
        params = model("tiny", device=device)
        lr = torch.tensor(LR, dtype=torch.float64, device=device)
        settings = {"max_grad_norm": 3.0, "skip_nonfinite": True, "ema_decay": 0.9}
        opt = optimizer(name, params, {**STATEFUL[name], "lr": lr}, capturable, **settings)
        for number in range(9):
            give_gradients(params, number)
            if number in (0, 5):
                params[1].grad = torch.full_like(params[1], float("nan"))
            # The first two alike: where the device counts, ASGD's eta begins at the rate of one that was skipped.
            lr.fill_(LR / max(1, number))
            opt.step()
        assert opt.skipped_steps == 2
        states = [x.cpu() for state in opt.state_dict()["state"].values() for x in state.values()]
        ended.append([*params, *opt.ema_parameters(), *states])
    close(*ended, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_waits(name, device, no_launches):
    """Not even where a parameter has no gradient, which needs another plan, or a scheduler changes what it may."""
    params = model("tiny", device=device)
    rates = [torch.tensor(lr, device=device) for lr in (0.1, 0.2)]
    opt = optimizer(name, params, {**STATEFUL[name], "lr": rates[0]}, max_grad_norm=1.0, skip_nonfinite=True)
    opt.param_groups[1]["lr"] = rates[1]
    give_gradients(params, 4)
    opt.step()
    for number in range(5, 16):
        give_gradients(params, number)
        with Waits():
            rates[0].mul_(0.9)
            opt.param_groups[1]["weight_decay"] = 0.01 * number
            opt.step()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers_write_into_the_tensors(kind, device, no_launches):
    """What every scheduler of torch does to the learning rate, and to betas, arrives in the rows."""
    opts, schedulers = [], []
    for capturable in (False, True):
        opt = optimizer("Adam", model("tiny", device=device), None, capturable)
        for group in opt.param_groups if capturable else ():
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64, device=device)
        opts.append(opt)
    rates = [group["lr"] for group in opts[1].param_groups]
    schedulers = [SCHEDULERS[kind](opt) for opt in opts]
    seen = set()
    for number in range(4, 12):
        found = []
        for opt, scheduler in zip(opts, schedulers):
            give_gradients([p for group in opt.param_groups for p in group["params"]], number)
            opt.step()
            scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
            found.append(rows_by_parameter(opt))
        for position, row in found[0].items():
            # Chained multiplications of the rate, by Python and by torch.
            torch.testing.assert_close(found[1][position], row, rtol=1e-12, atol=1e-300)
            seen.add(float(row[0]))
    assert len(seen) > 2
    assert all(group["lr"] is rate for group, rate in zip(opts[1].param_groups, rates))


@pytest.mark.parametrize("tensors", [False, True])
def test_groups_that_are_alike_do_not_lie_side_by_side(tensors, device, no_launches):
    """Evaluated together, their rows still go to the right parameters."""
    found = []
    for capturable in (False, True):
        params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=device)) for _ in range(5)]
        rates = [0.1, 0.2, 0.3]
        if tensors and capturable:
            rates = [torch.tensor(rate, dtype=torch.float64, device=device) for rate in rates]
        decays = [0.0, 0.5, 0.0]
        groups = [
            {"params": ps, "lr": lr, "weight_decay": decay}
            for ps, lr, decay in zip((params[:2], params[2:3], params[3:]), rates, decays)
        ]
        opt = fusedopt.NAdam(groups, capturable=capturable, backend="triton")
        for number in range(3):
            for k, p in enumerate(params):
                p.grad = None if k == 4 and number == 0 else torch.ones_like(p)
            opt.step()
        found.append(rows_by_parameter(opt))
        products = [state["mu_product"].item() for state in opt.state.values()]
        found[-1]["products"] = torch.tensor(products)
    assert found[0].keys() == found[1].keys()
    for position, row in found[0].items():
        torch.testing.assert_close(found[1][position], row, rtol=1e-12, atol=0)


class Elsewhere(torch.Tensor):
    """A tensor on another device than the parameters, for whoever asks."""

    device = torch.device("meta")


def test_rates_that_are_tensors_on_several_devices(device, no_launches):
    """One is read by the step itself, the other one is a number."""
    params = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64, device=device)) for _ in range(2)]
    rates = torch.tensor(0.1, dtype=torch.float64, device=device), Elsewhere(torch.tensor(0.2, dtype=torch.float64))
    opt = fusedopt.RAdam(
        [{"params": [p], "lr": rate} for p, rate in zip(params, rates)], capturable=True, backend="triton"
    )
    give_gradients(params, 0)
    opt.step()
    assert [row[0].item() for row in rows_by_parameter(opt).values()] == [0.1, 0.2]


def test_groups_with_rates_of_their_own_cost_no_operations_of_their_own(device, no_launches):
    def operations(count, rate):
        params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(count)]
        groups = [{"params": [p], "lr": rate(k)} for k, p in enumerate(params)]
        opt = fusedopt.RAdam(groups, capturable=True, backend="triton")
        for p in params:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            with Waits() as counted:
                opt.step()
        return counted.count

    assert operations(50, lambda k: 0.1 / (1 + k)) == operations(3, lambda k: 0.1 / (1 + k)) < 100
    for kind in (lambda k: torch.tensor(0.1, device=device),):
        # A tensor has to be taken into float64 and into a column.
        assert operations(50, kind) - operations(3, kind) <= 47 * 4


class Anchored(fusedopt.AdamW):
    """Reads what schedulers leave in a group: its rate is at least a tenth of the initial one."""

    def lr(self, group, t):
        return maximum(group["lr"], 0.1 * group.get("initial_lr", 0.5))


@pytest.mark.parametrize("initial", [[0.3, 0.2, 0.3], [0.2, 0.2, 0.2], [None, None, None]])
def test_a_formula_that_reads_what_groups_may_differ_in(initial, device, no_launches):
    found = []
    for capturable in (False, True):
        params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in initial]
        groups = [{"params": [p], **({"initial_lr": x} if x else {})} for p, x in zip(params, initial)]
        opt = Anchored(groups, capturable=capturable, lr=0.01, backend="triton")
        for step in range(3):
            opt.param_groups[0]["lr"] = 0.01 + 0.04 * step
            give_gradients(params, step)
            opt.step()
        found.append(rows_by_parameter(opt))
    for position, row in found[0].items():
        torch.testing.assert_close(found[1][position], row, rtol=1e-12, atol=0)
