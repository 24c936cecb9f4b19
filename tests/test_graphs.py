"""Steps in CUDA graphs: every replay is a step, and the same bits as an eager one. Without a GPU: see graphs.py."""

import gc
import weakref

import pytest
import torch
from cases import KERNEL_NAMES, give_gradients, interpreter_noise, label, model
from graph_runs import Plain, Run, assert_equal, watch
from graphs import Graph, capture
from pairs import assert_same
from thinning import every_value

import fusedopt
from fusedopt import means

pytestmark = pytest.mark.usefixtures("needs_triton")

SETTINGS = [
    {},
    {"max_grad_norm": 3.0, "ema_decay": 0.9},
    {"max_grad_norm": 3.0, "skip_nonfinite": True, "launches": 1},
    {"skip_nonfinite": True, "track": "parameters"},
    {"max_grad_norm": 3.0, "adaptive_grad_clip": 0.01, "cautious": True},
]
"""Of which parts a step may consist."""


@interpreter_noise
@every_value
@pytest.mark.parametrize("settings", SETTINGS, ids=label)
@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_replay_is_an_eager_step(name, settings, device, monkeypatch):
    if means.needed(fusedopt.registry[name]([torch.ones(1)])):
        settings = {**settings, "launches": 2}  # one of its own between norm and update
    eager, captured = Run(name, device, **settings), Run(name, device, **settings)
    for run in (eager, captured):
        run.warm_up()
        run.prepare(6)
    before = captured.seen()
    graph = captured.capture(monkeypatch)
    assert_same(before[0], captured.seen()[0])  # nothing was done yet
    for number in range(6, 11):
        for run in (eager, captured):
            run.prepare(number, broken=settings.get("skip_nonfinite") and number == 8)
        eager.opt.step()
        graph.replay()
        assert_equal(captured, eager)


@interpreter_noise
def test_eager_steps_and_other_graphs_do_not_disturb_it(device, monkeypatch):
    """Each with gradients elsewhere, and with options that a graph has frozen; one of them with another plan."""
    eager, captured = (Run("RMSprop", device, max_grad_norm=3.0) for _ in range(2))
    grads = []
    for run in (eager, captured):
        run.warm_up()
        run.prepare(6)
        grads.append([[p.grad.clone() for p in run.params] for _ in range(3)])
    graphs = []
    for own, eps in zip(grads[1][:2], (1e-8, 1e-3)):
        for p, g in zip(captured.params, own):
            p.grad = g
        captured.opt.param_groups[0]["eps"] = captured.opt.param_groups[1]["eps"] = eps
        graphs.append(captured.capture(monkeypatch))
    for number in range(6, 14):
        turn = number % 3
        for run, own in ((eager, grads[0]), (captured, grads[1])):
            for p, g in zip(run.params, own[turn]):
                p.grad = g
            run.prepare(number)
            for group in run.opt.param_groups:
                group["eps"] = (1e-8, 1e-3, 1e-4)[turn]
            if number == 11:
                run.params[1].grad = None
        eager.opt.step()
        if turn == 2:
            captured.opt.step()
        else:
            graphs[turn].replay()
        assert_equal(captured, eager)


@interpreter_noise
def test_eager_steps_with_the_gradients_of_the_capture(device, monkeypatch):
    """Before it, after it, and elsewhere before the next replay: the graph's tables are its own, as are theirs."""
    eager, captured = (Run("Adam", device, max_grad_norm=3.0) for _ in range(2))
    for run in (eager, captured):
        run.warm_up()
        run.prepare(6)
    graph = captured.capture(monkeypatch)
    own = [[p.grad for p in run.params] for run in (eager, captured)]
    for number, elsewhere in ((6, False), (7, True), (8, True)):
        for run in (eager, captured):
            if elsewhere:
                for p in run.params:
                    p.grad = p.grad.clone()
            run.prepare(number)
            run.opt.step()
        for run, grads in zip((eager, captured), own):
            for p, g in zip(run.params, grads):
                p.grad = g
            run.prepare(number + 10)
        eager.opt.step()
        graph.replay()
        assert_equal(captured, eager)


@interpreter_noise
def test_what_a_graph_uses_outlives_the_plan(device, monkeypatch):
    run = Run("Adam", device, max_grad_norm=3.0)
    run.warm_up()
    run.prepare(6)
    graph = run.capture(monkeypatch)
    (executor,) = run.opt._engine.executors
    used = [
        weakref.ref(executor.norms.slots[1]),
        weakref.ref(executor.tables.tiles.table),
        weakref.ref(*executor.copied.values()),
    ]
    # What the CPU's graph holds for itself, and a true one does not.
    (graph.calls if isinstance(graph, Graph) else []).clear()
    del executor, graph
    run.params[1].grad = None
    run.opt.step()
    gc.collect()
    assert all(ref() is not None for ref in used)


@interpreter_noise
def test_memory_of_means_outlives_stages_that_come_later(device, monkeypatch):
    """Which need more means than the graph has."""
    params = model("tiny", device=device)
    opt = fusedopt.LAMB(params, weight_decay=0.0, cautious=True, capturable=True, backend="triton")
    give_gradients(params, 5, plain=True)
    opt.step()
    (executor,) = opt._engine.executors
    with capture(monkeypatch, [executor]) as graph:
        opt.step()
    used = weakref.ref(executor.chunks[1].means)
    if isinstance(graph, Graph):
        graph.calls.clear()  # a true graph keeps nothing alive
    opt.param_groups[0]["weight_decay"] = 0.1
    opt.step()
    gc.collect()
    assert opt._engine.executors == [executor]
    assert used() is not None and executor.chunks[3].means is not used()


@interpreter_noise
def test_options_that_it_reads_outlive_others(device, monkeypatch):
    """Tensors on the device, which are read by every replay, also where a group was given others since."""
    runs = [Run("Adam", device) for _ in range(2)]
    betas = [torch.tensor([0.9, 0.95], dtype=torch.float64, device=device).unbind() for _ in runs]
    for run, values in zip(runs, betas):
        for group in run.opt.param_groups:
            group["betas"] = values
        run.warm_up()
        run.prepare(6)
    eager, captured = runs
    graph = captured.capture(monkeypatch)
    used = list(map(weakref.ref, betas[1]))
    for number in range(6, 8):
        for run, values in zip(runs, betas):
            run.prepare(number)
            values[0].fill_(1 / number)
        captured.opt.refresh()
        eager.opt.step()
        graph.replay()
        assert_equal(captured, eager)
    if isinstance(graph, Graph):
        graph.calls.clear()  # a true graph keeps nothing alive
    for group in captured.opt.param_groups:
        group["betas"] = 0.5, 0.6
    del betas, values
    captured.opt.step()
    gc.collect()
    assert all(ref() is not None for ref in used)
    with pytest.raises(RuntimeError, match="betas changed"):
        captured.opt.refresh()


@interpreter_noise
def test_a_gradient_that_is_made_in_the_graph(device, monkeypatch):
    """Backward leaves it in the graph's own memory."""
    eager, captured = (Run("Adam", device, max_grad_norm=3.0) for _ in range(2))
    for run in (eager, captured):
        run.warm_up()

    def train(run):
        for p in run.params:
            p.grad = p.detach() * 0.1
        run.opt.step()

    with capture(monkeypatch, captured.opt._engine.executors) as graph:
        train(captured)
    for _ in range(3):
        train(eager)
        graph.replay()
        assert_equal(captured, eager)


@interpreter_noise
def test_a_scaler_skips_replays(device, monkeypatch):
    eager, captured = (Run("Adam", device) for _ in range(2))
    found = [torch.zeros(1, device=device) for _ in range(2)]
    for run, found_inf in zip((eager, captured), found):
        run.opt.found_inf, run.opt.grad_scale = found_inf, torch.full((1,), 4.0, device=device)
        run.warm_up()
        run.prepare(6)
    graph = captured.capture(monkeypatch)
    for number in range(6, 10):
        for run, found_inf in zip((eager, captured), found):
            run.prepare(number)
            found_inf.fill_(number == 7)
        eager.opt.step()
        graph.replay()
        assert_equal(captured, eager)
    assert captured.opt.skipped_steps == 1
    assert captured.opt.state[captured.params[0]]["step"] == 5


def refused(run, monkeypatch, match):
    before = run.seen()[0]
    with pytest.raises(RuntimeError, match=match):
        if torch.cuda.is_available():
            run.capture(monkeypatch)
        else:
            with capture(monkeypatch, run.opt._engine.executors):
                run.opt.step()
    assert_same(run.seen()[0], before)


def test_what_is_not_prepared_is_refused(device, monkeypatch):
    run = Run("Adam", device)
    run.prepare(6)
    match = "take a few steps like this one before capturing"
    with pytest.raises(RuntimeError, match=match), capture(monkeypatch, prepared_launches()):
        run.opt.step()
    run.warm_up()
    run.params[1].grad = None
    refused(run, monkeypatch, match)
    run.prepare(6)
    run.opt.step()
    run.opt.param_groups[0]["weight_decay"] = run.opt.param_groups[1]["weight_decay"]
    refused(run, monkeypatch, "take a step with these options before capturing")


def prepared_launches():
    """Executors of another optimizer: graphs.py wants to know the class of their launches."""
    other = Run("Adam", "cpu" if not torch.cuda.is_available() else "cuda")
    other.warm_up()
    return other.opt._engine.executors


def test_torchs_error_where_a_group_is_not_capturable(device, monkeypatch):
    run = Run("Adam", device)
    run.opt.param_groups[1]["capturable"] = False
    run.opt.param_groups[1]["lr"] = 0.1
    run.warm_up()
    run.prepare(6)
    match = "Attempting CUDA graph capture of step.. for an instance of Adam but param_groups' capturable is False"
    refused(run, monkeypatch, match)


@interpreter_noise
@pytest.mark.parametrize("options", [{"momentum": 0.9, "dampening": 0.2}, {}], ids=label)
def test_without_a_count_the_setting_is_needed_for_the_learning_rate_only(options, device, monkeypatch):
    """As torch's SGD is captured."""
    eager, captured = (
        Plain("SGD", device, **options, lr=0.1, max_grad_norm=3.0, skip_nonfinite=True) for _ in range(2)
    )
    for run in (eager, captured):
        run.warm_up()
        run.prepare(6)
        watch(run.opt)
    graph = captured.capture(monkeypatch)
    for number in range(6, 10):
        for run in (eager, captured):
            run.prepare(number)
        eager.opt.step()
        graph.replay()
        for a, b in zip(eager.params, captured.params):
            assert torch.equal(a, b)


@interpreter_noise
def test_skipped_replays_are_not_taken_back_on_the_host(device, monkeypatch):
    """Whose count they have not counted: else the momentum of one that skipped as often as steps came before it would
    count as never written."""
    eager, captured = (Plain("SGD", device, momentum=0.9, dampening=0.2, lr=0.1, skip_nonfinite=True) for _ in range(2))
    for run in (eager, captured):
        run.warm_up()
        watch(run.opt)
        run.prepare(6, broken=True)
    graph = captured.capture(monkeypatch)
    for _ in range(3):
        graph.replay()
        eager.opt.step()
    for number in (7, 8, 9):
        for run in (eager, captured):
            run.prepare(number, broken=number == 8)
            run.opt.step()
        assert_equal(captured, eager)


def test_a_count_that_would_be_frozen_is_refused(device, monkeypatch):
    run = Plain("Adagrad", device, lr_decay=0.1)
    run.warm_up()
    watch(run.opt)
    refused(run, monkeypatch, "Adagrad with these options depends on the step count.*capturable=True")
