"""Lightning's Trainer and Fabric: clipping inside and outside the step, resuming, DDP, settings through wrappers."""

import os

import pytest
import torch
import torch.distributed as dist
from training import same_on_all_ranks

lightning = pytest.importorskip("lightning")

import fusedopt  # noqa: E402

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 17), torch.nn.Tanh(), torch.nn.Linear(17, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 5, generator=generator) for _ in range(6)]


class Module(lightning.LightningModule):
    def __init__(self, make):
        super().__init__()
        self.network, self.make = network(), make

    def training_step(self, batch, number):
        # Under DDP each rank has a batch of its own.
        own = batch.roll(self.global_rank, -1)
        return self.network(own).square().mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


def fit(make, folder, epochs=2, saved=None, save=None, **options):
    """The weights after so many epochs, from the checkpoint ``saved`` on, kept in the checkpoint ``save``."""
    module = Module(make)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None), ckpt_path=saved)
    if save is not None:
        trainer.save_checkpoint(save)
    return [p.detach() for p in module.parameters()]


def close(a, b):
    for x, y in zip(a, b, strict=True):
        # float32, 12 steps of 1e-2.
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_trainer(tmp_path):
    expected = fit(lambda params: torch.optim.AdamW(params, **OPTIONS), tmp_path, gradient_clip_val=0.05)
    close(fit(lambda params: fusedopt.AdamW(params, **OPTIONS), tmp_path, gradient_clip_val=0.05), expected)
    close(fit(lambda params: fusedopt.AdamW(params, max_grad_norm=0.05, **OPTIONS), tmp_path), expected)


@pytest.mark.parametrize("flatten", [False, True])
def test_resumed_as_if_uninterrupted(flatten, tmp_path):
    def make(params):
        return fusedopt.AdamW(params, max_grad_norm=0.05, flatten=flatten, **OPTIONS)

    file = tmp_path / "after-one-epoch.ckpt"
    fit(make, tmp_path, epochs=1, save=file)
    resumed, whole = fit(make, tmp_path, saved=file), fit(make, tmp_path)
    assert all(map(torch.equal, resumed, whole))
    # From ours to torch's, in mid-training.
    close(fit(lambda params: torch.optim.AdamW(params, **OPTIONS), tmp_path, saved=file, gradient_clip_val=0.05), whole)


def under_a_launcher():
    """As torch.distributed.run tells Lightning that it has started the processes."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("flatten", [False, True])
def test_ddp(flatten, folder):
    under_a_launcher()
    on_ranks = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
    expected = fit(lambda ps: torch.optim.AdamW(ps, **OPTIONS), folder, gradient_clip_val=0.05, **on_ranks)
    found = fit(lambda ps: fusedopt.AdamW(ps, max_grad_norm=0.05, flatten=flatten, **OPTIONS), folder, **on_ranks)
    close(found, expected)
    same_on_all_ranks(found)


def test_fabric():
    """Its wrapper is a subclass with its own ``__dict__``: settings must reach the real optimizer all the same."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    ours, theirs = network(), network()
    expected = torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    model, optimizer = fabric.setup(ours, fusedopt.AdamW(ours.parameters(), **OPTIONS))
    optimizer.max_grad_norm = 0.05
    for x in batches():
        optimizer.zero_grad()
        fabric.backward(model(x).square().mean())
        optimizer.step()
        expected.zero_grad()
        theirs(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        expected.step()
    close(ours.parameters(), theirs.parameters())
