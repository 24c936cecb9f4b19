"""What every rule makes of the same numbers: on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter.

python bench/trajectories.py FILE K/N [--few]         # of the rules each N-th, from the K-th
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

# The rules' cases are the tests'.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import without_dynamo
from rule_cases import ADDRESSES, CASES, CHAINS, optimizer, parameters, results, set_gradients, tensors

from fusedopt import backends

SIZES = [2500, 33]
STEPS = 3
FEW = [1500, 33]


def trajectories(device: str, cases: Iterable[str], sizes: list[int]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(label, parameters and states) after a few steps of every rule x address x {plain, all stages} x dtype."""
    for case in cases:
        for address in ADDRESSES:
            for chain in ("none", "all"):
                for dtype in (torch.float32, torch.bfloat16):
                    params = parameters(sizes, device, dtype)
                    made = optimizer(case, params, address, **CHAINS[chain])
                    for t in range(STEPS):
                        set_gradients(params, tensors(sizes, device, dtype, seed=t + 1))
                        made.step()
                    found = [x.cpu() for values in results(made) for x in values]
                    yield f"{case}, {address}, {'all stages' if chain == 'all' else 'plain'}, {dtype}", found


def main() -> None:
    without_dynamo.prepare()
    few = "--few" in sys.argv
    part, count = map(int, sys.argv[2].split("/"))
    cases = list(CASES)[: 1 if few else None][part::count]
    device = "cpu" if backends.interpreting() else "cuda"
    torch.save(dict(trajectories(device, cases, FEW if few else SIZES)), sys.argv[1])


if __name__ == "__main__":
    main()
