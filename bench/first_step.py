"""How long the first step takes in this process, per optimizer, in milliseconds: planning, compiling, running.

python bench/first_step.py MODEL          # prints JSON; MODEL is one of shapes.py, or tiny
"""

from __future__ import annotations

import json
import sys
import time

from device import device
from problem import Case, Problem
from shapes import MODELS, tiny

OPTIMIZERS = "AdamW", "RMSprop"


def main() -> None:
    on = device()
    groups = tiny(MODELS["resnet50"]) if sys.argv[1] == "tiny" else MODELS[sys.argv[1]]
    took = {}
    for name in OPTIMIZERS:
        problem = Problem(Case("resnet50", name, clip=True), groups, on.name, "triton")
        _, step = problem.made("fusedopt", problem.parameters())
        on.settle()
        begin = time.perf_counter()
        step()
        on.settle()
        took[name] = round((time.perf_counter() - begin) * 1e3, 1)
    print(json.dumps(took))


if __name__ == "__main__":
    main()
