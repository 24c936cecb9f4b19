"""Kernels are launched with the arguments that Triton's own binder would give them, on both supported Tritons."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from compiling import OLD_TRITON, TRITONS, environment_of
from fake_gpu.build import COMPILER, driver

import fusedopt
from fusedopt import launch, upload

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=TRITONS)
def report(request, tmp_path_factory):
    """What arrived at the driver: [by the handle, by the binder] for every case."""
    if COMPILER is None:
        pytest.skip("no C compiler, which Triton's launcher needs as well")
    folder = tmp_path_factory.mktemp("driver")
    root = Path(OLD_TRITON) / "triton" if request.param == "old" else Path(triton.__file__).parent
    finding_it = driver(folder, root / "backends" / "nvidia" / "include")
    command = [sys.executable, "-W", "error", HERE / "launching.py"]
    done = subprocess.run(command, env=environment_of(request.param) | finding_it, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert (found.pop("triton") == triton.__version__) == (request.param == "installed")
    assert found.pop("problem") is None  # see test_probe.py
    return found


@pytest.fixture(scope="module")
def cases(report):
    return {name: launches for name, launches in report.items() if name != "refused"}


def test_every_case_was_launched(cases):
    assert len(cases) == 4
    for case, (direct, _) in cases.items():
        at_once = case.endswith("at once")
        # The norm, the update.
        assert len(direct) == (1 if case.endswith("plain") or at_once else 2), case
        assert {record["cooperative"] for record in direct} == {int(at_once)}, case


def test_where_cooperative_launches_are_refused(report):
    """Two launches instead, without trying again; where one was asked for, an error, and nothing was launched."""
    auto, (error, launched) = report["refused"]
    for step in auto:
        assert [record["cooperative"] for record in step] == [0, 0]
    assert "launches=1 is not possible here: the driver refuses a cooperative launch" in error
    assert "too many blocks in cooperative launch" in error and "use launches='auto' or 2" in error
    assert launched == 0


def test_the_handle_gets_what_the_binder_would_give(cases):
    for case, (direct, bound) in cases.items():
        assert direct == bound, case
        for record in direct:
            assert record["stream"] == 77
            assert record["count"] == len(record["values"]) >= 5


def test_profilers_hear_of_launches(monkeypatch):
    """Whoever hooks on launches gets them from Triton, with the metadata that it makes."""
    calls = []

    class Kernel:
        arg_names = ("x", "N")

        def warmup(self, *args, grid, **constants):
            return Compiled()

        def __getitem__(self, grid):
            return lambda *args, **constants: calls.append((grid, args, constants))

    class Compiled:
        function = packed_metadata = None

        def _init_handles(self):
            pass

        def run(self, *args):
            calls.append("direct")

    active = type("Driver", (), {"get_current_stream": lambda self, index: 0})()
    monkeypatch.setattr(launch, "driver", type("Drivers", (), {"active": active}))
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    launches = launch.Launches(torch.device("cpu"))
    kernel = Kernel()
    for _ in range(2):
        launches(kernel, "variant", 3, 1.0, N=4)
    monkeypatch.setattr(launch.knobs.runtime.launch_enter_hook, "calls", [print])
    launches(kernel, "variant", 3, 1.0, N=4)
    bound = ((3,), (1.0,), {"N": 4})
    assert calls == ["direct", "direct", bound]


class Event:
    """Of a copy that has ended when the test says so."""

    ended = True

    def query(self):
        return self.ended


def test_pinned_memory_is_left_alone_while_a_copy_is_under_way(monkeypatch):
    monkeypatch.setattr(upload.torch.cuda, "Event", Event)
    empty = torch.empty
    monkeypatch.setattr(upload.torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    ring = upload.Ring(torch.zeros(2))
    busy = []
    for _ in range(3):
        memory, array, event = ring.take()
        assert all(memory is not other for other, _ in busy)
        array[:] = np.float32(len(busy))
        assert (memory == len(busy)).all()
        event.ended = False
        busy.append((memory, event))
    for turn in range(5):
        memory, event = busy[turn % 3]
        event.ended = True
        assert ring.take()[0] is memory
        event.ended = False
    assert ring.take()[0] is not memory
    assert len(ring.pieces) == 4


def test_a_graph_takes_pinned_memory_that_was_made_before_it(monkeypatch):
    """torch 2.10 cannot make any during a capture. Another graph, or another shape, needs other memory. Made
    in inference mode, it can be filled outside."""
    made = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: made.append(self) or self)
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, pin_memory: empty(x))
    table, values = upload.Upload(torch.device("cuda")), torch.arange(6.0).view(2, 3)
    with torch.inference_mode():
        table.prepare(values.numpy())
    (spare,) = table.spare.values()
    assert table._pinned(values) is spare and torch.equal(spare, values)
    assert table._pinned(values) is values
    table.prepare(np.zeros((3, 3), dtype=np.float32))
    assert table._pinned(values) is values
    assert len(made) == 2


@pytest.mark.parametrize("sent", [False, True], ids=["before it", "behind it"])
def test_what_an_interrupt_kept_from_being_sent_is_sent_later(sent, monkeypatch):
    table = upload.Upload(torch.device("cpu"))
    old, new = np.zeros((1, 2)), np.ones((1, 2))
    table.tell(old)
    send = table.send

    def interrupted(values):
        if sent:
            send(values)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(table, "send", interrupted)
        table.tell(new)
    for values in (old, new) if sent else (new, old):
        table.tell(values)
        assert np.array_equal(table.device_copy, values)


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("sent", [False, True], ids=["before it", "behind it"])
def test_addresses_that_an_interrupt_kept_from_being_sent_are_sent_later(sent, device, monkeypatch):
    """The step behind it reads the gradients where they are."""
    p = torch.nn.Parameter(torch.zeros(5, device=device))
    optimizer = fusedopt.SGD([p], lr=1.0, backend="triton")
    grads = [torch.full_like(p, x) for x in (1.0, 2.0)]
    p.grad = grads[0]
    optimizer.step()
    table = optimizer._engine.executors[0].tables.upload
    send = table.send

    def interrupted(values):
        if sent:
            send(values)
        raise KeyboardInterrupt

    p.grad = grads[1]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(table, "send", interrupted)
        optimizer.step()
    p.grad = grads[0 if sent else 1]
    optimizer.step()
    assert (p == (-2.0 if sent else -3.0)).all()
