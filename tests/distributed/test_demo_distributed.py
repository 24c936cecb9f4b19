"""The program of several ranks, with a rank that dies in the middle."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

STEPS, EVERY = 8, 2
LIMIT = 600
"""Seconds for one program, which takes ten, most of them for importing torch: for what hangs."""

ALONE = "--engine ddp --device cpu --steps 4 --every 2"


def launched(folder, *launcher):
    ranks = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *launcher]
    arguments = ["--steps", STEPS, "--every", EVERY, "--device", "cpu", "--folder", folder]
    return shlex.join(map(str, [*ranks, "-m", "fusedopt.demo_distributed", *arguments]))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of all runs, and what was printed by one process alone, up to its last line, and by two ranks. All are
    forks of a process that has imported torch."""
    folder = tmp_path_factory.mktemp("demo")
    runs = [
        f"{ALONE} --folder {shlex.quote(str(folder / 'alone'))}",
        launched(folder / "whole"),
        launched(folder / "broken", "--max-restarts", "1"),
    ]
    # The model writes letters that a terminal may lack.
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONIOENCODING": "ascii"}
    ran = subprocess.run(
        [sys.executable, Path(__file__).with_name("elastic.py"), *runs],
        env=os.environ | environment,
        timeout=LIMIT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder, *ran.stdout.split(f"{folder / 'alone' / 'weights.pt'}: the weights")


def weights(folder):
    return torch.load(folder / "weights.pt")


def test_a_killed_rank_costs_nothing_but_time(done):
    """torch.distributed.run starts both ranks again; they end where an uninterrupted training ends, bit for bit."""
    folder, _, text = done
    assert len(re.findall(r"rank \d of 2 on cpu", text)) == 6
    # Not at a line's beginning: gloo writes to the same pipe, a piece at a time.
    assert re.findall(r"going on from .*/(\w+/step-\d+)", text) == ["broken/step-000004"]
    assert [int(x) for x in re.findall(r"step (\d+): loss", text)] == 2 * [2, 4, 6, 8]
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", text)]
    assert losses[:4] == losses[4:] and losses[3] < losses[0]
    expected, found = weights(folder / "whole"), weights(folder / "broken")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert len(list((folder / "broken").glob("step-*"))) == 2


def test_one_process_and_ddp(done):
    folder, text, _ = done
    assert "rank 0 of 1" in text and "step 4: loss" in text
    assert "?" in text.splitlines()[-1]
    assert weights(folder / "alone")
