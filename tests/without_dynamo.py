"""Optimizers that do not import torch._dynamo, for programs that the tests start and that compile nothing by torch.

torch keeps torch.compile from looking into some methods of its optimizers, and for that imports all of it when one of
them is first called, which takes as long again as torch itself.
"""

import torch


def prepare():
    """As if each of these methods had been called, and were left as it is."""
    for method in vars(torch.optim.Optimizer).values():
        inner = getattr(method, "__wrapped__", None)
        if inner is not None:
            inner.__dynamo_disable = inner
