"""The program of several ranks, with a rank that dies in the middle."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")

STEPS, EVERY = 60, 10
LIMIT = 600
"""Seconds for one training, which takes ten, most of them for importing torch: for what hangs."""


def program(folder, *launcher):
    ranks = [*["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"], *launcher]
    arguments = f"--steps {STEPS} --every {EVERY} --device cpu --folder".split()
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *ranks,
        "-m",
        "fusedopt.demo_distributed",
        *arguments,
        folder,
    ]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def weights(folder):
    return torch.load(folder / "weights.pt")


def test_a_killed_rank_costs_nothing_but_time(tmp_path):
    """torch.distributed.run starts both ranks again; they end where an uninterrupted training ends, bit for bit."""
    whole = subprocess.run(
        program(tmp_path / "whole"), env=environment(), timeout=LIMIT, capture_output=True, text=True, check=True
    )
    assert "going on from" not in whole.stdout
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", whole.stdout)]
    assert len(losses) == STEPS // EVERY and losses[-1] < losses[0]

    folder = tmp_path / "broken"
    with subprocess.Popen(
        program(folder, "--max-restarts", "1"), env=environment(), stdout=subprocess.PIPE, text=True
    ) as run:
        try:
            text = ""
            for line in run.stdout:
                text += line
                # Not at a line's beginning: gloo writes to the same pipe, a piece at a time.
                if f"step {2 * EVERY}:" in line and "going on from" not in text:
                    os.kill(int(re.search(r"rank 1 of 2 on cpu, process (\d+)", text)[1]), signal.SIGKILL)
            assert run.wait(LIMIT) == 0
        finally:
            run.kill()
    assert re.search(rf"going on from .*step-0000[{EVERY // 10}-{STEPS // 10 - 1}]0", text), text
    expected, found = weights(tmp_path / "whole"), weights(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert len(list(folder.glob("step-*"))) == 2


def test_one_process_and_ddp(tmp_path):
    command = [sys.executable, "-m", "fusedopt.demo_distributed", "--engine", "ddp", "--device", "cpu", "--steps", "4"]
    command += ["--every", "2", "--folder", tmp_path]
    # The model writes letters that such a terminal lacks.
    ascii_only = environment() | {"PYTHONIOENCODING": "ascii"}
    first = subprocess.run(command, env=ascii_only, timeout=LIMIT, capture_output=True, text=True, check=True)
    assert "rank 0 of 1" in first.stdout and "step 4: loss" in first.stdout
    assert "?" in first.stdout.splitlines()[-2]
    assert weights(tmp_path)
