"""bench/host.py, scale.py and ranks.py: what they claim to measure is measured."""

import growth
import history
import pytest
import torch.distributed as dist
from programs import forked

from fusedopt import backends

PROGRAMS = {
    "host": "--optimizers SGD --counts 20 --groups 40 --dtensors 8 --rounds 2 --passes 1",
    "scale": "--counts 20 40 --repeats 1",
    "ranks": "--ranks 24 --cases mlp/fully_shard/float32 mlp/tensor-parallel/float32 50/hybrid/float32",
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All programs are run once; by name, what one printed, line by line, and the rows that it saved."""
    folder = tmp_path_factory.mktemp("bench")
    commands = [(name, *options.split(), "--save", "--out", folder / name) for name, options in PROGRAMS.items()]
    ran = dict(zip(PROGRAMS, forked(*commands)))

    def of(name):
        assert ran[name].returncode == 0, ran[name].stderr
        rows, problems = history.read(folder / name)
        assert problems == []
        return ran[name].stdout.splitlines(), rows

    return of


def by_name(rows):
    return {(row.part, row.model, row.implementation): row for row in rows}


@pytest.mark.skipif(backends.triton_problem() is not None, reason="measures the Triton backend")
def test_the_quietest_pass_counts():
    import host

    busy, quiet = host.Times([7.0], [5.0, 9.0]), host.Times([8.0], [6.0, 4.0])
    passes = [{"fused": busy, "foreach": quiet}, {"fused": quiet, "foreach": busy}]
    assert host.quietest(passes) == {"fused": quiet, "foreach": quiet}


@pytest.mark.skipif(backends.triton_problem() is not None, reason="measures the Triton backend")
def test_every_case_is_measured(done):
    lines, rows = done("host")
    cases = [
        ["SGD", *model.split(), clip] for model in ("20 tensors", "40 groups", "8 DTensors") for clip in ("no", "yes")
    ]
    assert [line.split()[:4] for line in lines[1:]] == cases
    assert [row.clip for row in rows] == 2 * (8 * [False] + 8 * [True]) + 4 * [False] + 4 * [True]
    # Steps in a row and the first of a row, of two of ours, and of torch's fused and foreach.
    kinds = [(part, name) for name in growth.HOSTS for part in growth.HOST]
    assert [(row.part, row.implementation) for row in rows] == 4 * kinds + 2 * kinds[:4]
    assert all(1 < row.host_us < 10_000_000 for row in rows)
    table = growth.host_table(rows).splitlines()[2:]
    assert table[0] == "| optimizer | clipping | 20 tensors | 40 groups | 8 DTensors |"
    assert [line.count(" (") for line in table[2:]] == [10, 10]


@pytest.mark.skipif(backends.triton_problem() is not None, reason="measures the Triton backend")
def test_steps_of_every_size_are_measured(done):
    lines, rows = done("scale")
    rows = by_name(rows)
    starts = [line.split()[:2] for line in lines[1:]]
    assert starts == [[b, count] for b in ("torch", "triton") for count in ("20", "40")]
    for count in (20, 40):
        found = {part: rows[part, f"{count} tensors", "triton"] for part in growth.STEPS}
        first, same, moved, other = found.values()
        # Records of 8 numbers; a tile of the update and one of the norm, 16 bytes each; a row of hyperparameters.
        # The first step's row goes twice: its kernels are compiled ahead with one.
        assert first.bytes == count * (64 + 32) + 2 * same.bytes
        assert same.bytes == 7 * 4
        assert moved.bytes == count * 64 + same.bytes
        assert other.bytes >= count * 3 / 4 * (64 + 32) + same.bytes
        assert all(row.launches == 2 for row in found.values())
        assert rows["same gradients", f"{count} tensors", "torch"].rival_us > 0
        assert 0 < rows["plan", f"{count} tensors", "triton"].host_us < first.host_us


@pytest.mark.skipif(backends.triton_problem() is not None, reason="measures the Triton backend")
@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_a_rank_of_many(done):
    """Shards of 4 tensors over 24 ranks, in whole rows: 256 of 784 and as many biases, 10 of 256 and as many biases."""
    lines, rows = done("ranks")
    rows = by_name(rows)
    assert len(lines) == 6
    first, last = (rows["rank", "mlp fully_shard 24", f"{place} rank"] for place in ("first", "last"))
    assert (first.tensors, first.elements) == (4, 11 * 784 + 11 + 256 + 1)
    assert (last.tensors, last.elements) == (2, 3 * 784 + 3)
    assert first.memory_bytes == first.elements * 8 + 4 * 4
    assert (first.launches, first.bytes) == (3, 28)
    assert rows["rank, moved", "mlp fully_shard 24", "first rank"].bytes == 4 * 64 + 28
    for name, numbers in (("max_grad_norm", 2), ("track", 3 * 4), ("cautious", 4)):
        row = rows["all_reduce", "mlp fully_shard 24", name]
        assert (row.launches, row.bytes) == (1, numbers * 8)
    assert rows["all_reduce", "mlp tensor-parallel 24", "max_grad_norm"].launches == 2
    assert rows["rank", "50 hybrid 24", "last rank"].elements == 150
