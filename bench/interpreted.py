"""What every rule makes of the same numbers: on a GPU, and here, in a program of its own, in Triton's interpreter.

TRITON_INTERPRET=1 python bench/interpreted.py FILE [--few]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# The rules' cases are the tests'.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from rule_cases import ADDRESSES, CASES, CHAINS, optimizer, parameters, results, set_gradients, tensors

SIZES = [2500, 33]
STEPS = 3
FEW = [1500, 33]


def trajectories(device: torch.device, few: bool = False) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(label, parameters and states) after a few steps of every rule x address x {plain, all stages} x dtype."""
    sizes = FEW if few else SIZES
    for case in list(CASES)[: 1 if few else None]:
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
    torch.save(dict(trajectories(torch.device("cpu"), "--few" in sys.argv)), sys.argv[1])


if __name__ == "__main__":
    main()
