"""How the host's part of a step grows with the number of tensors: ``python bench/scale.py``.

Tiny tensors, so that nothing but the plan counts: what building it takes, and what checking it again at each step.
"""

import statistics
import time

import torch

import fusedopt
from fusedopt.plan import Plan

COUNTS = (1_000, 10_000, 100_000)


def measured(count: int) -> tuple[float, float]:
    """Seconds to build the plan for ``count`` tensors anew, and to check it at a step."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones(3)
    optimizer = fusedopt.AdamW(params, max_grad_norm=1.0)
    begin = time.process_time()
    plan = Plan(optimizer, {}, [p.grad for p in params])
    built = time.process_time() - begin
    plan.note_uses()
    times = []
    for _ in range(7):
        grads = [p.grad for p in params]
        begin = time.process_time()
        assert plan.holds(optimizer, params, grads)
        times.append(time.process_time() - begin)
    return built, statistics.median(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("tensors   plan built   checked at each step")
    for count in COUNTS:
        built, checked = measured(count)
        print(f"{count:7}   {built * 1e3:7.1f} ms   {checked * 1e3:7.2f} ms")
