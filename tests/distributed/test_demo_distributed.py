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


def launched(folder, *launcher):
    ranks = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", *launcher]
    arguments = ["--steps", STEPS, "--every", EVERY, "--device", "cpu", "--folder", folder]
    return shlex.join(map(str, [*ranks, "-m", "fusedopt.demo_distributed", *arguments]))


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def weights(folder):
    return torch.load(folder / "weights.pt")


def test_a_killed_rank_costs_nothing_but_time(tmp_path):
    """torch.distributed.run starts both ranks again; they end where an uninterrupted training ends, bit for bit. They
    are forks here, which have imported torch; as a program of its own the demo runs below, on one rank."""
    folders = tmp_path / "whole", tmp_path / "broken"
    runs = [launched(folders[0]), launched(folders[1], "--max-restarts", "1")]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("elastic.py"), *runs],
        env=environment(),
        timeout=LIMIT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"rank \d of 2 on cpu", done.stdout)) == 6
    # Not at a line's beginning: gloo writes to the same pipe, a piece at a time.
    assert re.findall(r"going on from .*/(\w+/step-\d+)", done.stdout) == ["broken/step-000004"]
    steps = [int(x) for x in re.findall(r"step (\d+): loss", done.stdout)]
    assert steps == 2 * [2, 4, 6, 8]
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[:4] == losses[4:] and losses[3] < losses[0]
    expected, found = map(weights, folders)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert len(list(folders[1].glob("step-*"))) == 2


def test_one_process_and_ddp(tmp_path):
    command = [sys.executable, "-m", "fusedopt.demo_distributed", "--engine", "ddp", "--device", "cpu", "--steps", "4"]
    command += ["--every", "2", "--folder", tmp_path]
    # The model writes letters that such a terminal lacks.
    ascii_only = environment() | {"PYTHONIOENCODING": "ascii"}
    first = subprocess.run(command, env=ascii_only, timeout=LIMIT, capture_output=True, text=True, check=True)
    assert "rank 0 of 1" in first.stdout and "step 4: loss" in first.stdout
    assert "?" in first.stdout.splitlines()[-2]
    assert weights(tmp_path)
