"""Models under fully_shard, and what their steps communicate."""

import contextlib
from unittest import mock

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from training import Net, net


def sharded(build=Net, **options):
    """A layer by itself, and the rest."""
    model = net(build)
    fully_shard(model.first, **options)
    return fully_shard(model, **options)


@contextlib.contextmanager
def counted(optimizer):
    """The sizes of all all_reduces that the optimizer's steps make."""
    calls, stepping = [], []
    optimizer.register_step_pre_hook(lambda *_: stepping.append(True))
    optimizer.register_step_post_hook(lambda *_: stepping.clear())
    real = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        if stepping:
            calls.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield calls
