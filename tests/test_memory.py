"""fusedopt.memory says before training what is allocated in it."""

import pytest
import torch

import fusedopt


@pytest.mark.parametrize("master", [None, "stochastic", "kahan", "split", "split8", "fp32"])
@pytest.mark.parametrize("state_dtype", [None, torch.float32, torch.bfloat16, "8bit"])
def test_it_is_what_a_step_allocates(master, state_dtype):
    sizes = (5000, 33, 4096)
    params = [torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16)) for size in sizes]
    table = fusedopt.memory(params, fusedopt.AdamW, master=master, state_dtype=state_dtype)
    (row,) = (row for row in table if row.chosen)
    assert (row.master, row.state_dtype) == (master, state_dtype)
    optimizer = fusedopt.AdamW(params, master=master, state_dtype=state_dtype)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    beside = {"master", "master_low", "compensation"}
    found = {
        kind: sum(x.nbytes for p in params for key, x in optimizer.state[p].items() if key != "step" and kind(key))
        for kind in (beside.__contains__, lambda key: key not in beside)
    }
    assert [row.masters, row.states] == pytest.approx([total / sum(sizes) for total in found.values()])
    assert (row.parameters, row.gradients) == (2, 2)
    assert fusedopt.memory(params, optimizer) == table


def test_what_large_bfloat16_models_need_beside_the_gradient():
    model = torch.nn.Linear(4096, 1024, bias=False, dtype=torch.bfloat16)
    rows = {(row.master, row.state_dtype): row.total - row.gradients for row in fusedopt.memory(model, fusedopt.AdamW)}
    assert rows[None, "8bit"] <= 4.1
    assert rows["split8", "8bit"] <= 5.1
    assert rows["fp32", torch.float32] == 14


def test_it_prints_a_table_and_knows_what_makes_no_sense():
    model = torch.nn.Linear(4, 3)
    table = fusedopt.memory(model, fusedopt.Adam, state_dtype="8bit")
    assert {row.master for row in table} == {None}
    assert str(table).count("\n*") == 1
    assert repr(table) == str(table)
    half = [torch.nn.Parameter(torch.ones(3, dtype=torch.float16))]
    stateless = fusedopt.memory(half, fusedopt.SGD)
    assert "split" not in {row.master for row in stateless}
    assert {row.state_dtype for row in stateless} == {None}
    with pytest.raises(TypeError, match="fusedopt"):
        fusedopt.memory(model, torch.optim.Adam)
    with pytest.raises(TypeError, match="lr"):
        fusedopt.memory(model, fusedopt.Adam(model.parameters()), lr=1.0)


def test_an_instance_is_asked_about_with_its_own_model():
    """Whose parameters it updates, all or some."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = fusedopt.Adam(model[1].parameters())
    ways = [model, model[1], model.named_parameters(), [{"params": list(model[1].parameters())}]]
    (table, *same) = (fusedopt.memory(way, optimizer) for way in ways)
    assert all(other == table for other in same)
    with pytest.raises(ValueError, match=r"lacks 2 of the parameters .*, the first of shape \(2, 3\)"):
        fusedopt.memory(model[0], optimizer)


def test_gradients_stay_as_they_are():
    """An optimizer with flat_grads moves and zeroes them, but not before its first zero_grad() or step()."""
    model = torch.nn.Linear(4, 3)
    model.weight.grad = gradient = torch.ones(3, 4)
    assert fusedopt.memory(model, fusedopt.Adam, flat_grads=True) == fusedopt.memory(model, fusedopt.Adam)
    assert model.weight.grad is gradient and (gradient == 1).all() and model.bias.grad is None
    with pytest.raises(TypeError, match="flat_grads"):
        fusedopt.memory(model, fusedopt.Adam, flat_grads="yes")
