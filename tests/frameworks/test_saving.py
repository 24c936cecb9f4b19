"""Weights that ``flatten=True`` moved into one buffer are saved as tensors of their own: whoever writes safetensors
drops, or refuses, tensors that share memory."""

import copy

import pytest
import torch

safetensors = pytest.importorskip("safetensors.torch")
transformers = pytest.importorskip("transformers")

import fusedopt  # noqa: E402

OPTIONS = {"lr": 1e-2, "max_grad_norm": 1.0}


def gpt():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=32)
    return transformers.GPT2LMHeadModel(config)


def step(model, optimizer, number):
    tokens = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()


def flattened(model):
    optimizer = fusedopt.AdamW(model.parameters(), **OPTIONS, flatten=True)
    step(model, optimizer, 0)
    assert "0 flattened" not in optimizer.layout() and "flattened" in optimizer.layout()
    return optimizer


def same(saved, model):
    return all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_save_pretrained(tmp_path):
    """With input and output embeddings that are one parameter, which the format has to know of."""
    model = gpt()
    optimizer = flattened(model)
    model.save_pretrained(tmp_path)
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert same(other.state_dict(), model)
    # The saved model trains on as this one does.
    second = fusedopt.AdamW(other.parameters(), **OPTIONS, flatten=True)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, second)):
        m.eval()  # no dropout
        step(m, o, 1)
    assert same(other.state_dict(), model)


def test_safetensors(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 17), torch.nn.Tanh(), torch.nn.Linear(17, 3))
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-2, flatten=True)
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()
    assert "4 flattened" in optimizer.layout()
    safetensors.save_model(model, str(tmp_path / "model"))
    assert same(safetensors.load_file(tmp_path / "model"), model)
    states = {f"{k}.{key}": x for k, s in optimizer.state_dict()["state"].items() for key, x in s.items()}
    safetensors.save_file(states, tmp_path / "states")
    saved = safetensors.load_file(tmp_path / "states")
    assert len(saved) == 12 and all(torch.equal(saved[name], x) for name, x in states.items())
    for p in [*model.parameters(), *states.values()]:
        assert p.storage_offset() == 0 and p.untyped_storage().nbytes() == p.nbytes
