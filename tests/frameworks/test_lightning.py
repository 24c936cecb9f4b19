"""Lightning's Trainer and Fabric: clipping inside and outside the step, and settings through Fabric's wrapper."""

import pytest
import torch

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
        return self.network(batch).square().mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


def fit(make, folder, **options):
    module = Module(make)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches(), batch_size=None))
    return [p.detach() for p in module.parameters()]


def close(a, b):
    for x, y in zip(a, b, strict=True):
        # float32, 12 steps of 1e-2.
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_trainer(tmp_path):
    expected = fit(lambda params: torch.optim.AdamW(params, **OPTIONS), tmp_path, gradient_clip_val=0.05)
    close(fit(lambda params: fusedopt.AdamW(params, **OPTIONS), tmp_path, gradient_clip_val=0.05), expected)
    close(fit(lambda params: fusedopt.AdamW(params, max_grad_norm=0.05, **OPTIONS), tmp_path), expected)


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
