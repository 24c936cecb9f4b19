"""transformers.Trainer: optimizer classes, ``optimizers=``, resuming, and the mixin that drops its own norm pass."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import fusedopt  # noqa: E402
from fusedopt.integrations import FusedClipMixin  # noqa: E402

OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 17), torch.nn.Tanh(), torch.nn.Linear(17, 3))

    def forward(self, x, labels):
        out = self.layers(x)
        return {"loss": torch.nn.functional.cross_entropy(out, labels), "logits": out}


def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 5, generator=generator)
    return [{"x": row, "labels": torch.tensor(k % 3)} for k, row in enumerate(x)]


def trainer(folder, cls=transformers.Trainer, model=None, max_grad_norm=0.1, **kwargs):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
        max_grad_norm=max_grad_norm, save_steps=4, logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return cls(model=model or Model(), args=arguments, train_dataset=data(), **kwargs)


def weights(run):
    return [p.detach() for p in run.model.parameters()]


def by_class(cls, **settings):
    return {"optimizer_cls_and_kwargs": (cls, OPTIONS | settings)}


def close(a, b):
    for x, y in zip(weights(a), weights(b), strict=True):
        # float32, 8 steps of 1e-2.
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_as_torch_does(tmp_path):
    runs = [trainer(tmp_path / str(k), **by_class(cls)) for k, cls in enumerate((torch.optim.AdamW, fusedopt.AdamW))]
    for run in runs:
        run.train()
    close(*runs)
    model = Model()
    given = trainer(
        tmp_path / "given",
        model=model,
        optimizers=(fusedopt.AdamW(model.parameters(), **OPTIONS), None),
        max_grad_norm=0.1,
    )
    given.train()
    resumed = trainer(tmp_path / "1", **by_class(fusedopt.AdamW))
    resumed.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-4"))
    for x, y in zip(weights(resumed), weights(runs[1])):
        assert torch.equal(x, y)


class FusedTrainer(FusedClipMixin, transformers.Trainer):
    pass


def test_clips_inside_the_step(tmp_path, monkeypatch):
    expected = trainer(tmp_path / "torch", **by_class(torch.optim.AdamW))
    expected.train()
    run = trainer(tmp_path / "ours", FusedTrainer, max_grad_norm=0, **by_class(fusedopt.AdamW, max_grad_norm=0.1))
    monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda *_: pytest.fail("a pass of the Trainer's own"))
    run.train()
    close(run, expected)


def test_both_clipping_is_refused(tmp_path):
    run = trainer(tmp_path, FusedTrainer, **by_class(fusedopt.AdamW, max_grad_norm=0.1))
    with pytest.raises(RuntimeError, match="both would clip"):
        run.train()
