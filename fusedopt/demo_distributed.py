"""Train a small GPT, letter by letter, on several ranks, with checkpoints from which any number of ranks goes on.

    python -m torch.distributed.run --nproc-per-node 2 -m fusedopt.demo_distributed

It reads fusedopt's own source code, so nothing is downloaded. ``--engine fsdp`` spreads parameters, gradients and
states over the ranks (``fully_shard``), ``--engine ddp`` keeps them whole on each; the optimizer is told nothing of
either, and clips by the norm over all ranks. Where the folder has a checkpoint, training goes on from the newest: kill
a rank, start the command again (or give torch.distributed.run ``--max-restarts``), and the weights at the end are the
same to the last bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR

import fusedopt
from fusedopt.__main__ import positive

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
BATCH = 16
"""Sequences per step, over all ranks."""
KEPT = 2
"""Checkpoints: the newest, and one in case it turns out to be damaged."""


class Block(nn.Module):
    """x <- x + attention(norm(x)), x <- x + mlp(norm(x))"""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, length, WIDTH))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """(n, length) letters -> (n, length, letters) logits of the next one; given those, the mean loss."""

    def __init__(self, letters: int):
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.letter(x) + self.place(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        logits = self.head(self.norm(h))
        return logits if y is None else F.cross_entropy(logits.flatten(0, 1), y.flatten())


class Text:
    """Letters by number, and the batches that a step works on."""

    def __init__(self) -> None:
        files = sorted(Path(fusedopt.__file__).parent.glob("*.py"))
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        self.letters = sorted(set(text))
        number = {letter: k for k, letter in enumerate(self.letters)}
        self.data = torch.tensor([number[letter] for letter in text])

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the step's batch, which is the same after a restart, on whatever number of ranks."""
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(len(self.data) - CONTEXT - 1, (BATCH,), generator=generator)
        mine = starts.tensor_split(dist.get_world_size())[dist.get_rank()]
        rows = torch.stack([self.data[start : start + CONTEXT + 1] for start in mine])
        return rows[:, :-1], rows[:, 1:]


class Training(dcp.stateful.Stateful):
    """All that a checkpoint holds."""

    def __init__(self, engine: str, letters: int, steps: int, device: torch.device):
        torch.manual_seed(0)
        model = GPT(letters).to(device)
        if engine == "fsdp":
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        else:
            model = DistributedDataParallel(model)
        self.model = model
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = fusedopt.AdamW(groups, lr=3e-3, max_grad_norm=1.0, skip_nonfinite=True)
        self.schedule = CosineAnnealingLR(self.optimizer, steps)
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict(), "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]

    def advance(self, x: Tensor, y: Tensor) -> Tensor:
        """One step; returns this rank's loss, 0-dim."""
        self.optimizer.zero_grad()
        loss = self.model(x, y)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return loss.detach()


class Checkpoints:
    """Folders named after steps. One is complete when it has DCP's ``.metadata``, which is written last."""

    def __init__(self, folder: Path):
        self.folder = folder

    def complete(self) -> list[Path]:
        return sorted(path.parent for path in self.folder.glob("step-*/.metadata"))

    def resume(self, training: Training) -> None:
        """Go on from the newest that is complete, if there is one. All ranks take the same."""
        newest = [self.complete()[-1:]]
        dist.broadcast_object_list(newest)
        for path in newest[0]:
            dcp.load({"training": training}, checkpoint_id=path)
            say(f"going on from {path}")

    def save(self, training: Training) -> None:
        dcp.save({"training": training}, checkpoint_id=self.folder / f"step-{training.step:06}")
        if dist.get_rank() == 0:
            for path in self.complete()[:-KEPT]:
                shutil.rmtree(path)


def main(argv: list[str] | None = None) -> None:
    options = arguments().parse_args(argv)
    run(options, start(options.device))


def run(options: argparse.Namespace, device: torch.device) -> None:
    text = Text()
    training = Training(options.engine, len(text.letters), options.steps, device)
    checkpoints = Checkpoints(options.folder)
    checkpoints.resume(training)
    while training.step < options.steps:
        x, y = text.batch(training.step)
        loss = training.advance(x.to(device), y.to(device))
        if training.step % options.every == 0 or training.step == options.steps:
            dist.all_reduce(loss)
            norm = training.optimizer.grad_norm
            say(f"step {training.step}: loss {loss / dist.get_world_size():.3f}, gradient norm {norm:.2f}")
            checkpoints.save(training)
    weights = get_model_state_dict(training.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        torch.save(weights, options.folder / "weights.pt")
    say("".join(written(training.model, text, device, "class ")))
    say(f"{options.folder / 'weights.pt'}: the weights; {training.optimizer.layout()}")


@torch.no_grad()
def written(model: nn.Module, text: Text, device: torch.device, beginning: str, length: int = 120) -> Iterator[str]:
    """What the model writes. Every rank takes part, since each may hold a part of the weights."""
    yield beginning
    numbers = [text.letters.index(letter) for letter in beginning]
    generator = torch.Generator().manual_seed(0)
    for _ in range(length):
        logits = model(torch.tensor([numbers[-CONTEXT:]], device=device))[0, -1].float().cpu()
        numbers.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
        yield text.letters[numbers[-1]]


def start(kind: str | None) -> torch.device:
    """Join the process group that torch.distributed.run describes, or make one of this process alone."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for key, value in alone.items():
        os.environ.setdefault(key, value)
    number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    kind = kind or ("cuda" if gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) else "cpu")
    device = torch.device(kind, number) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = next(rendezvous("env://"))
    # After a restart the store of torch.distributed.run still holds the addresses of the ranks before.
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    write(f"rank {dist.get_rank()} of {dist.get_world_size()} on {device}, process {os.getpid()}")
    return device


def write(line: str) -> None:
    # What the model writes has letters that not every terminal can show.
    shown = line.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding)
    # One write with its end: print()'s two, when Python's output is unbuffered, mix with those of other ranks.
    sys.stdout.write(shown + "\n")
    sys.stdout.flush()


def say(line: str) -> None:
    if dist.get_rank() == 0:
        write(line)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m torch.distributed.run --nproc-per-node 2 -m fusedopt.demo_distributed",
        description="Train a small GPT on several ranks, with checkpoints from which any number of ranks goes on.",
    )
    parser.add_argument("--engine", choices=("fsdp", "ddp"), default="fsdp")
    parser.add_argument("--steps", type=positive(int), default=200)
    parser.add_argument("--every", type=positive(int), default=20, help="steps between checkpoints")
    parser.add_argument("--folder", type=Path, default=Path("demo/distributed"), help="of the checkpoints")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: one GPU per rank if there are as many")
    return parser


if __name__ == "__main__":
    main()
    dist.barrier()
    # Not destroy_process_group(): gloo's threads sometimes abort a process that has done all its work.
    sys.stdout.flush()
    os._exit(0)
