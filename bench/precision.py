"""How far from float64 every optimizer ends, beside torch's own on the same numbers: the table in docs/precision.md.

    python bench/precision.py [--names AdamW ...] [--save]    a table; --save puts it into docs/precision.md

Noisy gradients that do not depend on the parameters, as in ``tests/test_accuracy.py``, which asserts the bound; torch's
error is that of the best of its implementations. The kernels run in Triton's interpreter, which computes as they are
compiled to: float32 without fused multiply-add.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import triton  # noqa: E402
from accuracy import SIZE, STEPS, error, exact, least_error, ours, problem  # noqa: E402
from cases import label  # noqa: E402
from device import processor  # noqa: E402
from fusedopt.kernels import tuning  # noqa: E402
from options import NAMES, STATEFUL  # noqa: E402

PAGE = ROOT / "docs" / "precision.md"
BEGIN, END = "<!-- made by bench/precision.py: do not edit -->", "<!-- end -->"
SEEDS, LONG = 3, 400
HEAD = (
    f"| optimizer | torch | fallback | kernels | {LONG} steps: torch | fallback | kernels "
    '| bfloat16: torch | `master=None` | `"stochastic"` | `"split"` |'
)


def mean(errors: list[float]) -> float:
    return math.sqrt(sum(x * x for x in errors) / len(errors))


def single(name: str, options: dict, seeds: int, steps: int) -> Iterator[float]:
    """torch's, the fallback's and the kernels' error in float32."""
    runs = [problem(torch.float32, seed, steps) for seed in range(seeds)]
    wanted = [exact(name, options, numbers) for numbers in runs]
    yield mean([least_error(name, options, n, torch.float32, w) for n, w in zip(runs, wanted)])
    for backend in ("torch", "triton"):
        ends = [ours(name, n, torch.float32, backend=backend, **options)[1] for n in runs]
        yield mean(list(map(error, ends, wanted)))


def narrow(name: str, options: dict, seeds: int) -> Iterator[float]:
    """torch's error with bfloat16 parameters, and ours: in torch's form, and with float32 states."""
    runs = [problem(torch.bfloat16, seed) for seed in range(seeds)]
    wanted = [exact(name, options, numbers) for numbers in runs]
    yield mean([least_error(name, options, n, torch.bfloat16, w) for n, w in zip(runs, wanted)])
    for master, state_dtype in ((None, None), ("stochastic", torch.float32), ("split", torch.float32)):
        made = [
            ours(name, n, torch.bfloat16, backend="torch", master=master, state_dtype=state_dtype, **options)[0]
            for n in runs
        ]
        yield mean([error(optimizer.master_state_dict()[0], w) for optimizer, w in zip(made, wanted)])


def heading(seeds: int, long: int) -> list[str]:
    """What was measured, where and when."""
    return [
        f"Root mean square of the errors of {SIZE} parameters of size 1 after {STEPS} steps, {seeds} seeds, and after",
        f"{long} steps of one; {processor()}, torch {torch.__version__}, Triton {triton.__version__}'s interpreter,",
        f"{time.strftime('%Y-%m-%d')}:",
    ]


def table(names: list[str], seeds: int, long: int) -> str:
    """Markdown."""
    lines = [*heading(seeds, long), "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
    for name in names:
        options = STATEFUL[name]
        found = *single(name, options, seeds, STEPS), *single(name, options, 1, long), *narrow(name, options, seeds)
        title = f"{name}({label(options)})" if options else name
        lines.append(f"| {title} | " + " | ".join(f"{x:.1e}" for x in found) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--save", action="store_true", help="put the table into docs/precision.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # One program instead of many: the interpreter's time goes by programs.
    tuning.TABLE["interpreter"] = tuning.Tuning(block=SIZE)
    made = table(options.names, SEEDS, LONG)
    print(made)
    if options.save:
        page = PAGE.read_text()
        PAGE.write_text(re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n\n{made}\n\n{END}", page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
