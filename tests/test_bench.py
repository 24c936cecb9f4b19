"""The benchmarks themselves: rivals who do less are not timed, rows survive, and the script for GPUs runs from its
first line to its last, here in the interpreter."""

import csv
import os
import re
import sys
import time
from typing import NamedTuple

import gpu
import gpu_tests
import history
import measure
import problem
import profiles
import pytest
import rivals
import shapes
import shard
import torch
from problem import Case
from programs import BENCH, Done, forked, program
from variants import VARIANTS

import fusedopt

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="bench/gpu.sh itself runs here")


def test_every_registered_optimizer_is_measured():
    assert {variant.name for variant in VARIANTS.values()} == set(fusedopt.registry)


class TestEqualWork:
    """What check() lets pass, and what not."""

    def off(self, monkeypatch, change, case):
        """Run the check on torch's foreach implementation after ``change(optimizer, step) -> step``."""
        made = problem.Problem.made

        def changed(self, name, groups, limit=None):
            optimizer, step = made(self, name, groups, limit)
            return optimizer, change(optimizer, step) if name == "foreach" else step

        monkeypatch.setattr(problem.Problem, "made", changed)
        return problem.check(case, shapes.tiny(shapes.MODELS["mlp"]), "cpu", "foreach")

    @pytest.mark.parametrize("label", ["AdamW", "RMSprop", "SGD-momentum"])
    @pytest.mark.parametrize("clip", [False, True])
    def test_torch_and_fusedopt_pass(self, monkeypatch, label, clip):
        case = Case("mlp", label, clip)
        assert self.off(monkeypatch, lambda optimizer, step: step, case) < 1e-6
        assert problem.check(case, shapes.tiny(shapes.MODELS["mlp"]), "cpu", "fusedopt") < 1e-6

    def test_without_clipping(self, monkeypatch):
        with pytest.raises(problem.Unequal, match="off by"):
            self.off(monkeypatch, lambda optimizer, step: optimizer.step, Case("mlp", "AdamW", clip=True))

    def test_without_decay(self, monkeypatch):
        def change(optimizer, step):
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0
            return step

        with pytest.raises(problem.Unequal, match="promises"):
            self.off(monkeypatch, change, Case("mlp", "AdamW"))

    def test_amsgrad_taken_and_ignored(self, monkeypatch):
        def change(optimizer, step):
            for group in optimizer.param_groups:
                group["amsgrad"] = False
            return step

        with pytest.raises(problem.Unequal):
            self.off(monkeypatch, change, Case("mlp", "Adam-amsgrad"))

    def test_fewer_steps(self, monkeypatch):
        def change(optimizer, step):
            taken = iter([True, True, True, False])
            return lambda: next(taken) and step()

        with pytest.raises(problem.Unequal):
            self.off(monkeypatch, change, Case("mlp", "SGD"))

    def test_clipping_binds_at_every_step(self):
        """With a fixed limit torch would go on multiplying by 1, and ours would not multiply at all. The gradients
        come back, before their squares are no normal numbers."""
        made = problem.Problem(Case("mlp", "SGD", clip=True), shapes.tiny(shapes.MODELS["mlp"]), "cpu")
        groups = made.parameters()
        _, theirs = made.made("fused", groups)
        optimizer, ours = made.made("fusedopt", made.parameters())
        params = [p for group in groups for p in group["params"]]

        def norm():
            return sum(p.grad.square().sum().item() for p in params) ** 0.5

        first = norm()
        for _ in range(50):
            before = norm()
            theirs()
            between = norm()
            assert between < 0.999 * before
            ours()
            assert optimizer.max_grad_norm < 0.999 * between
        made.limit.restore()
        assert norm() == pytest.approx(first, rel=0.01)


class TestMissing:
    def made(self, name, label="AdamW"):
        return rivals.IMPLEMENTATIONS[name].make(VARIANTS[label], [{"params": [torch.nn.Parameter(torch.ones(2))]}], {})

    def test_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "optimi", None)
        with pytest.raises(rivals.Missing, match="optimi cannot be imported"):
            self.made("optimi")

    def test_implementation(self):
        with pytest.raises(rivals.Missing, match="has no fused RMSprop"):
            self.made("fused", "RMSprop")

    def test_argument(self, monkeypatch):
        """A class that does not know what was asked for must not run without it."""

        class AdamW(torch.optim.SGD):
            def __init__(self, params, lr, betas, eps, weight_decay):
                raise AssertionError("made all the same")

        monkeypatch.setitem(sys.modules, "optimi", type(sys)("optimi"))
        sys.modules["optimi"].Adam = AdamW
        with pytest.raises(rivals.Missing, match=r"optimi\.Adam has no amsgrad"):
            self.made("optimi", "Adam-amsgrad")


class TestTrace:
    """What a profiler's trace says, from one written by hand."""

    def event(self, category, name, ts, dur=1.0):
        return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur}

    def test_counts(self):
        trace = [
            self.event("user_annotation", profiles.LABEL, 0, 10),
            self.event("gpu_user_annotation", profiles.LABEL, 2, 30),
            self.event("kernel", "step_adam", 20, 7.0),
            self.event("kernel", "step_adam", 30, 9.0),
            self.event("kernel", "sum_of_squares", 40, 3.0),
            self.event("gpu_memcpy", "Memcpy HtoD", 15),
            self.event("cuda_runtime", "cudaMemcpyAsync", 3),
            self.event("cuda_runtime", "cudaStreamSynchronize", 5),
            self.event("cuda_runtime", "cudaMemcpy", 6),
            self.event("cuda_runtime", "cudaDeviceSynchronize", 50),
            {"ph": "i", "cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 5},
        ]
        seen = profiles.summary(trace, 2)
        assert (seen.launches, seen.copies, seen.waits) == (1.5, 0.5, 1.0)
        assert seen.kernels == {"step_adam": [7.0, 9.0], "sum_of_squares": [3.0]}

    def test_what_each_kernel_moves(self):
        """Of a step under a GradScaler, which has kernels of torch's too."""
        seen = profiles.Seen(3, 0, 0, {"step_adam": [7.0], "sum_of_squares": [1.0], "void at::native::add": [2.0]})
        result = measure.Result("fusedopt", bytes=800, gradient_bytes=100, seen=seen)
        blank = history.Row("", "", "", "", "cuda", 1, "", "", "")
        made = measure._kernel_rows(blank, result, copy=1e8)
        assert {row.implementation: (row.bytes, row.bandwidth) for row in made} == {
            "fusedopt: step_adam": (700, 1.0), "fusedopt: sum_of_squares": (100, 1.0),
        }  # fmt: skip

    def test_peak_memory(self):
        def action():
            a = torch.ones(1000)
            b = torch.ones(3000)
            del b
            return a

        assert profiles.cpu_peak(action) == 16000


class Compiled(NamedTuple):
    """How bench/code_quality.py and compile_time.py end, with the kernels of adam."""

    saved: Done
    report: list[dict]
    """Its lines, by that run."""
    compared: Done
    """With a report that says more than can be reached."""
    committed: Done
    timed: Done


ADAM = "code_quality", "--targets", "sm_90", "--dtypes", "float32", "--cases", "adam", "--addresses", "scattered"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    better = (BENCH / "code_quality.csv").read_text().replace(",128,128,", ",256,128,")
    (folder / "better.csv").write_text(better)
    saved, *others = forked(
        (*ADAM, "--save", "--report", folder / "report.csv"),
        (*ADAM, "--check", "--report", folder / "better.csv"),
        (*ADAM, "--check"),
        ("compile_time",),
    )
    with (folder / "report.csv").open(newline="") as file:
        return Compiled(saved, list(csv.DictReader(file)), *others)


@CPU_ONLY
class TestCodeQuality:
    """One kernel through compiler, disassembler and comparison. (The whole report takes minutes.)"""

    def test_adam(self, compiled):
        assert compiled.saved.returncode == 0, compiled.saved.stderr
        adam, norm = sorted(compiled.report, key=lambda line: float(line["bytes"]), reverse=True)
        assert (norm["kernel"], adam["kernel"]) == ("sum_of_squares", "step_adam")
        assert (float(norm["bytes"]), float(adam["bytes"])) == (4, 28)
        assert adam["load_bits"] == adam["store_bits"] == norm["load_bits"] == "128"
        assert (adam["stack"], adam["shared"]) == ("0", "0")
        assert 30 <= float(adam["instructions"]) <= 80  # facts: 43 in the loop, and what a tile costs
        # 28 bytes of 124,439,808 elements at 4.8 TB/s.
        assert adam["h200_us"] == "725.9" and adam["a100_us"] == ""

    def test_worse_than_before(self, compiled):
        assert compiled.compared.returncode == 1
        assert "WORSE: sm_90 step_adam scattered float32: load_bits 256 -> 128" in compiled.compared.stdout

    def test_not_worse_than_committed(self, compiled):
        done = compiled.committed
        assert done.returncode == 0, f"{done.stdout}\nif that is meant, run python bench/code_quality.py --save"


def test_compile_time(compiled):
    assert compiled.timed.returncode == 0, compiled.timed.stderr
    times = r"([\d.]+) s, ([\d.]+) s of processors"
    found = re.fullmatch(rf"Triton [\d.]+, sm_90: {times} for step_adam, sum_of_squares\n", compiled.timed.stdout)
    assert found and all(0.01 < float(seconds) < 100 for seconds in found.groups())


@CPU_ONLY
def test_dry_run_of_the_gpu_script(tmp_path):
    """Every part leaves rows, none of which says failed."""
    done = program("bash", BENCH / "gpu.sh", tmp_path, "--dry", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    rows, problems = history.read(tmp_path / "history.csv")
    assert problems == []
    assert {row.status for row in rows} <= {"ok", "skipped"}
    # The parts by their own rows or, where they time steps, by what these are of.
    parts = {"tests", "step", "equal", "stress", "races", "sweep", "graph", "cold", "huge", "train", "sanitize"}
    assert {row.part for row in rows} == parts
    steps = {(row.model, row.amp) for row in rows if row.part == "step"}
    assert steps == {("gpt2", True), *((model, False) for model in ("gpt2", "small1000", "mlp", "llama1b", "resnet50"))}
    assert "fusedopt one launch" in {row.implementation for row in rows}
    assert "fusedopt" in (tmp_path / "info.txt").read_text()
    assert (tmp_path / "history.jsonl").stat().st_size > 0
    assert len(list(tmp_path.iterdir())) <= 8
    assert f"{sum(row.status == 'ok' for row in history.latest(rows))} ok, 0 not" in done.stdout


ENDS = {
    "hangs": (lambda run: time.sleep(60), "failed", "cut off after"),
    "dies": (lambda run: os._exit(3), "failed", "ended with exit code 3"),
    "raises": (lambda run: [][1], "failed", "IndexError: list index out of range"),
    "works": (lambda run: run.result("works", "this", "ok", "seen"), "ok", "seen"),
}


@CPU_ONLY
def test_a_part_that_ends_badly_leaves_a_row(tmp_path, monkeypatch):
    """And takes no other part along."""
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part(part, 2) for name, (part, *_) in ENDS.items()})
    run = gpu.Run(tmp_path, dry=True)
    for name in ENDS:
        gpu.within(2 if name == "hangs" else 300, name, run)
    rows, problems = history.read(run.history)
    assert problems == []
    assert [row.part for row in rows] == list(ENDS)
    for row in rows:
        _, status, note = ENDS[row.part]
        assert row.status == status and row.note.startswith(note)


def test_a_shard_goes_on_where_the_gpu_was_lost(tmp_path):
    """In another process, behind the test that failed, whose traceback is printed at once."""
    (tmp_path / "conftest.py").write_text("import shard\nshard.gpu_works = lambda: False\n")
    (tmp_path / "test_it.py").write_text("".join(f"def test_{k}(): assert {k} != 2\n\n\n" for k in range(6)))
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "shard", tmp_path]
    codes, (text,) = gpu_tests._run([[*map(str, command), "--shard=0/2"]], time.monotonic() + 100)
    assert codes == [shard.LOST]
    assert re.findall(r"test_it.py::test_(\d) (PASSED|FAILED)", text) == [
        ("0", "PASSED"),
        ("2", "FAILED"),
        ("4", "PASSED"),
    ]
    assert text.index("assert 2 != 2") < text.index("the GPU was lost")


def test_pytest_bench(tmp_path):
    """One case under pytest-benchmark: grouped, with our table, and a rival that is missing named with its reason."""
    pytest.importorskip("pytest_benchmark")
    done = program(
        sys.executable, "-m", "pytest", BENCH, "-q", "-p", "no:cacheprovider",
        "--models", "mlp", "--optimizers", "RMSprop", "--seconds", "0", f"--benchmark-json={tmp_path / 'bench.json'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "benchmark 'mlp RMSprop float32 clip'" in done.stdout
    assert "skipped: torch" in done.stdout and "has no fused RMSprop" in done.stdout
    assert '"memory_bytes"' in (tmp_path / "bench.json").read_text()
