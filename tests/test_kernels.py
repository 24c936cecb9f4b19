"""The kernels' numbers: every rule, in every chain and address, against its torch twin."""

import inspect
import math

import numpy as np
import pytest
import torch
from cases import MAIN_CASES, kernels_overflow
from oracles import oracle_class
from rule_cases import (
    ADDRESSES,
    CASES,
    CHAINS,
    IN_TORCH,
    accepted,
    assert_as_twin,
    declared_rules,
    kernel_rules,
    optimizer,
    parameters,
    results,
    same_bits,
    scalars,
    set_gradients,
    shipped_optimizers,
    states,
    tensors,
    twin_step,
)
from thinning import every_pair

from fusedopt import kernels, means, torch_stages, triton_backend

pytestmark = [pytest.mark.usefixtures("needs_triton"), kernels_overflow]


def test_vocabularies_are_equal():
    declared = declared_rules()
    assert set(declared) == kernel_rules()
    # One function serves both places of eps.
    twins = {name: getattr(rule.twin, "func", rule.twin).__name__ for name, rule in declared.items()}
    assert all(twin == name.removesuffix("_eps_inside") for name, twin in twins.items())
    # What takes a value and the parameter is a stage.
    in_kernels = {name: fn.arg_names for name, fn in vars(kernels.stages).items() if hasattr(fn, "arg_names")}
    in_kernels = {name: names for name, names in in_kernels.items() if names[1:2] == ["p"]}
    twins = torch_stages.stages | means.terms
    assert in_kernels == {name: list(inspect.signature(twin).parameters) for name, twin in twins.items()}
    # A term sees the states, a stage may see its term's mean.
    assert {name for name, names in in_kernels.items() if "state" in names} == set(means.terms)


def test_every_rule_has_a_case():
    assert {case.split()[0] for case in CASES} == set(declared_rules())
    for case in CASES:
        made = optimizer(case, parameters([3], "cpu"), backend=None)
        assert made.rule(made.param_groups[0]).name == case.split()[0]


def test_every_optimizer_speaks_of_known_stages():
    for cls in shipped_optimizers():
        params = parameters([3], "cpu")
        made = cls(params, lr=0.1, cautious=True)
        (group,) = made.param_groups
        update = made.update(group, 1, *scalars(made, group, *params))
        for stage in (*update.on_grad, *update.on_update):
            assert stage.name in torch_stages.stages
            # First the value (or gradient) and the parameter, and where there are means, the gradient and those.
            args = getattr(kernels.stages, stage.name).arg_names[3 + len(stage.terms) if stage.terms else 2 :]
            assert len(stage.args) == len(args)
            assert stage.neutral is None or len(stage.neutral) == len(args)
            for term in stage.terms:
                assert getattr(kernels.stages, term).arg_names[4:] == args


# No chain knows the rule or the dtype: each stands around two rules, and all of them at once around every rule.
AROUND = [
    (case, chain, dtype)
    for case in CASES
    for chain in (CHAINS if case in ("sgd", "amsgrad") else ("none", "all"))
    for dtype in (("float32", "float64") if chain in ("none", "all") else ("float32",))
]


@every_pair
@pytest.mark.parametrize(("case", "chain", "dtype"), AROUND)
@pytest.mark.parametrize("address", ADDRESSES)
def test_one_step(case, address, chain, dtype, device):
    dtype = getattr(torch, dtype)
    # A remainder alone, and a full tile with one element in the next.
    sizes = [(3, 3), 1025]
    params = parameters(sizes, device, dtype)
    made = optimizer(case, params, address, **CHAINS[chain])
    # The first step of momentum is another than the second.
    for t in (1, 2):
        set_gradients(params, tensors(sizes, device, dtype, seed=t))
        expected = twin_step(made, t)
        made.step()
        (executor,) = made._engine.executors
        assert isinstance(executor, triton_backend.Executor)
        assert executor.bucket.flat == (address == "flat")
        assert_as_twin(made, expected)


@pytest.mark.parametrize("case", CASES)
def test_groups_and_step_counts_have_rows_of_their_own(case, device):
    """Three groups, the last of which joins a step later: one launch, four rows."""
    params = parameters([5, 1030, 9], device)
    groups = [{"params": [p], "lr": lr, "weight_decay": w} for p, lr, w in zip(params, (0.1, 0.01, 0.3), (0, 0.1, 0))]
    made = optimizer(case, groups)
    set_gradients(params[:2], tensors([5, 1030], device, seed=1))
    made.step()
    set_gradients(params, tensors([5, 1030, 9], device, seed=2))
    expected = twin_step(made, 2)[:2]
    # As if the third were alone: it takes its first step.
    expected += twin_step(made, 1)[2:]
    made.step()
    assert len(made._engine.executors) == 1
    assert_as_twin(made, expected)


def test_float32_arithmetic_is_ieee(device):
    """Bit for bit what numpy computes in the same order: no fused multiply-add, division and root correctly rounded."""
    (p,) = params = parameters([4097], device)
    made = optimizer("amsgrad", params, max_grad_value=(-1.0, 2.0), weight_decay=0.1, maximize=True, decoupled=True)
    value = p.detach().cpu().numpy().copy()
    m, v, largest = np.zeros((3, p.numel()), dtype=np.float32)
    for t in (1, 2, 3):
        (grad,) = grads = tensors([4097], device, seed=t, scale=3.0)
        set_gradients(params, grads)
        made.step()
        hyper = made.update(made.param_groups[0], t)
        lr, weight1, weight2, eps, correction1, correction2 = map(np.float32, (hyper.lr, *hyper.h))
        g = -np.clip(grad.cpu().numpy(), np.float32(-1), np.float32(2))
        m = m + weight1 * (g - m)
        v = v + weight2 * (g * g - v)
        largest = np.maximum(largest, v)
        u = m * correction1 / (np.sqrt(largest) * correction2 + eps)
        value = value - lr * (u + np.float32(0.1) * value)
        for x, y in zip(results(made)[0], (value, m, v, largest)):
            assert same_bits(x.cpu(), torch.from_numpy(y))


@pytest.mark.parametrize("case", IN_TORCH)
def test_overflow_and_nan_as_in_torch(case, device):
    """An average of squares that once overflowed stays infinite, NaN stays NaN, and neighbours see nothing of it. Of
    torch the for-loop: a GPU's default, foreach, multiplies an infinite parameter by ASGD's lambd, which is 0 here."""
    steps = [[1e21, 1e25, 1.0, 1.0, 0.5], [1.0, 1.0, math.nan, math.inf, -1.0], [1.0, 1.0, 1.0, 1.0, 2.0]]
    name, options = CASES[case]
    ours, theirs = (torch.nn.Parameter(torch.ones(5, device=device)) for _ in range(2))
    made = optimizer(case, [ours], lr=0.01)
    options = accepted(name, {"weight_decay": 0.0} | options | {"lr": 0.01})
    reference = oracle_class(name)([theirs], **options, foreach=False)
    for g in torch.tensor(steps, device=device):
        ours.grad, theirs.grad = g.clone(), g.clone()
        made.step()
        reference.step()
    keys = made.rule(made.param_groups[0]).keys
    expected = [theirs.detach(), *(reference.state[theirs][key] for key in keys)]
    for x, y in zip(results(made)[0], expected):
        # Three steps' worth of the bound for one.
        torch.testing.assert_close(x, y, rtol=3e-6, atol=0, equal_nan=True)


def test_what_a_group_does_not_use_changes_nothing(device):
    """A stage that only another group needs runs for all, and 0 x inf is NaN."""
    special = torch.tensor([math.inf, -math.inf, 1.0, -0.0], device=device)
    params = [torch.nn.Parameter(special.clone()), torch.nn.Parameter(special.clone())]
    set_gradients(params, [torch.tensor([1.0, 2.0, 3e38, -0.0], device=device) for _ in params])
    groups = [{"params": [params[0]]}, {"params": [params[1]], "weight_decay": 0.5, "maximize": True}]
    alone = [torch.nn.Parameter(special.clone())]
    set_gradients(alone, [params[0].grad.clone()])
    for decoupled in (False, True):
        optimizer("sgd", groups, decoupled=decoupled).step()
        optimizer("sgd", alone).step()
        assert same_bits(params[0], alone[0])


@pytest.mark.parametrize("limit", [0.5, (-0.5, None), (None, 0.5)])
def test_clip_value_propagates_nan(limit, device):
    values = [math.nan, math.inf, -math.inf, 0.1]
    (p,) = params = [torch.nn.Parameter(torch.zeros(4, device=device))]
    set_gradients(params, [torch.tensor(values, device=device)])
    optimizer("sgd", params, lr=1.0, max_grad_value=limit).step()
    low, high = limit if isinstance(limit, tuple) else (-limit, limit)
    expected = -torch.tensor(values, device=device).clamp(low, high)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_clip_factor_propagates_nan(bad, device):
    """As torch.nn.utils.clip_grad_norm_: an infinite norm gives 0 and, where the gradient is infinite, NaN."""
    ours, theirs = (torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    for p in (ours, theirs):
        p.grad = torch.tensor([bad, 1.0, 2.0], device=device)
    optimizer("sgd", [ours], lr=1.0, max_grad_norm=1.0).step()
    torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    torch.optim.SGD([theirs], lr=1.0).step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def rounded_once(x, dtype):
    """float32 to the nearest 16-bit number, ties to even, by numpy alone."""
    if dtype is torch.float16:
        return torch.from_numpy(x.cpu().numpy().astype(np.float16))
    patterns = x.cpu().numpy().view(np.uint32).astype(np.uint64)
    upper = (patterns + 0x7FFF + (patterns >> np.uint64(16) & np.uint64(1))) >> np.uint64(16)
    return torch.from_numpy(upper.astype(np.uint16)).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding(dtype, device):
    """To the nearest, ties to even: random numbers of every size, and numbers half way between two others."""
    patterns = torch.randint(1, 0x7F800000, (2000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    half_way = patterns & ~0xFFFF | 0x8000 if dtype is torch.bfloat16 else patterns & ~0x1FFF | 0x1000
    values = torch.cat([patterns, half_way]).view(torch.float32).to(device)
    p = torch.nn.Parameter(torch.zeros(values.shape, dtype=dtype, device=device))
    p.grad_dtype = None
    p.grad = -values
    optimizer("sgd", [p], lr=1.0).step()
    assert same_bits(p.detach().cpu(), rounded_once(values, dtype))


@every_pair
@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES)
def test_small_dtypes_compute_in_float32_and_round_once(case, dtype, address, device):
    """Bit for bit what the same step in float32 gives, rounded at the end and nowhere before."""
    sizes = [1033, 15]
    chain = CHAINS["all"] | {"max_grad_norm": None}
    narrow = [torch.nn.Parameter(p) for p in tensors(sizes, device, dtype)]
    wide = [torch.nn.Parameter(p.detach().float()) for p in narrow]
    ours, reference = optimizer(case, narrow, address, **chain), optimizer(case, wide, address, **chain)
    for t in (1, 2):
        grads = tensors(sizes, device, dtype, seed=t)
        set_gradients(narrow, grads)
        set_gradients(wide, [g.float() for g in grads])
        ours.step()
        reference.step()
        for got, exact in zip(results(ours), results(reference)):
            for x, y in zip(got, exact):
                assert x.dtype == dtype
                assert same_bits(x.cpu(), rounded_once(y, dtype))
        # Both go on from the same numbers.
        for p, q in zip(narrow, wide):
            for x, y in zip((p, *states(ours, p)), (q, *states(reference, q))):
                y.data.copy_(x.data)


@pytest.mark.parametrize("case", [case for case in MAIN_CASES if case != "sgd"])
def test_wide_states_of_small_parameters(case, device):
    """States that were loaded in float32 stay float32: only the parameter is rounded."""
    sizes = [1033, 15]
    narrow = [torch.nn.Parameter(p) for p in tensors(sizes, device, torch.bfloat16)]
    wide = [torch.nn.Parameter(p.detach().float()) for p in narrow]
    ours, reference = optimizer(case, narrow), optimizer(case, wide)
    grads = tensors(sizes, device, torch.bfloat16, seed=1)
    set_gradients(wide, [g.float() for g in grads])
    reference.step()
    for p, q in zip(narrow, wide):
        ours.state[p] = {key: torch.clone(value) for key, value in reference.state[q].items()}
        q.data.copy_(p.data)
    grads = tensors(sizes, device, torch.bfloat16, seed=2)
    set_gradients(narrow, grads)
    set_gradients(wide, [g.float() for g in grads])
    ours.step()
    reference.step()
    for got, exact in zip(results(ours), results(reference)):
        assert same_bits(got[0].cpu(), rounded_once(exact[0], torch.bfloat16))
        assert all(same_bits(x, y) for x, y in zip(got[1:], exact[1:]))


def test_gradients_may_have_another_dtype(device):
    """float32 gradients of bfloat16 parameters (FSDP, amp) are used as they are."""
    (p,) = narrow = [torch.nn.Parameter(p) for p in tensors([1033], device, torch.bfloat16)]
    (q,) = wide = [torch.nn.Parameter(p.detach().float())]
    p.grad_dtype = None
    for params in (narrow, wide):
        set_gradients(params, tensors([1033], device, seed=1))
        optimizer("adam", params).step()
    assert same_bits(p.detach().cpu(), rounded_once(q.detach(), torch.bfloat16))
