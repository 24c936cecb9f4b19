"""The two lessons of ``python -m fusedopt``: what is learned, by which network, and how it is judged.

    classification   logits = W2 relu(W1 x + b1) + b2,  cross-entropy, mini-batches
    regression       the same network with one output,  mean squared error, the full batch

The handwritten digits (8x8) and the diabetes table ship inside scikit-learn; ``--data ROOT`` reads letters in the
notMNIST layout instead of the digits. Nothing is downloaded.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from tqdm import tqdm

PARTS = ("train", "validation", "test")
LAYOUT = "expected ROOT/<class>/*.png, one folder per class, 28x28 grey images"


class DataError(Exception):
    """The data cannot be used; the message says where it was looked for, what was found and what is expected."""


@dataclass(frozen=True)
class Lesson:
    """Data, network size, loss and score of one training.

    ``parts`` maps each name in PARTS to ``x`` (n, d), in the network's dtype, and ``y`` (n,), int64 classes or targets.
    ``loss`` and ``score`` take the network's output (n, outputs) and ``y`` and return a 0-dim tensor.
    """

    name: str
    note: str
    parts: dict[str, tuple[Tensor, Tensor]]
    hidden: int
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    loss_name: str
    score: Callable[[Tensor, Tensor], Tensor]
    score_name: str
    score_format: str
    batch_size: int | None = None  # None: the full batch

    def network(self, seed: int) -> nn.Module:
        """Linear(d, hidden) - ReLU - Linear(hidden, outputs), initialised from ``seed``."""
        torch.manual_seed(seed)
        x, _ = self.parts["train"]
        return nn.Sequential(
            nn.Linear(x.shape[1], self.hidden, dtype=x.dtype),
            nn.ReLU(),
            nn.Linear(self.hidden, self.outputs, dtype=x.dtype),
        )


def classification(root: Path | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> Lesson:
    """Letters from ``root`` (notMNIST layout), or the embedded digits; DataError if ``root`` cannot be used."""
    if root is None:
        digits = load_digits()
        x, y = torch.from_numpy(digits.data) / 16, torch.from_numpy(digits.target)
        name, classes, note = "digits", 10, f"{len(x)} handwritten digits of 8x8 pixels, 10 classes"
    else:
        x, y, names, skipped = read_notmnist(root)
        x = x / 255
        name, classes, note = "letters", len(names), f"{len(x)} images, classes {' '.join(names)}; {count(skipped)}"
        if classes == 1:
            note += "; one class alone is nothing to tell apart, so every answer will be right"
        if len(x) < 5:
            note += "; fewer than five leave nothing for validation and test"
    return Lesson(
        name=name,
        note=note,
        parts=split(x.to(dtype) - 0.5, y, seed),
        hidden=256,
        outputs=classes,
        loss=cross_entropy,
        loss_name="training loss (cross-entropy)",
        score=accuracy,
        score_name="accuracy",
        score_format=".1%",
        batch_size=64,
    )


def regression(seed: int = 0) -> Lesson:
    """Progression of diabetes from ten measurements; features and target standardised by the training part.

    float64, because in float32 even torch's own Adam, for-loop against fused, ends with parameters up to 0.9 apart:
    where the last digit decides on which side of ReLU's kink a unit stands, the gradients differ, and 3000 steps
    amplify that. In float64 what differs is the formula.
    """
    table = load_diabetes(scaled=False)
    parts = split(torch.from_numpy(table.data), torch.from_numpy(table.target), seed)
    scales = [(values.mean(0), values.std(0)) for values in parts["train"]]
    parts = {
        part: tuple((values - mean) / std for values, (mean, std) in zip(pair, scales)) for part, pair in parts.items()
    }
    return Lesson(
        name="diabetes",
        note=f"{len(table.data)} patients, {table.data.shape[1]} measurements, standardised; float64",
        parts=parts,
        hidden=8,  # more units learn the few training patients by heart, and the test error grows
        outputs=1,
        loss=squared_error,
        loss_name="training loss (MSE)",
        score=squared_error,
        score_name="MSE",
        score_format=".4f",
    )


def accuracy(logits: Tensor, classes: Tensor) -> Tensor:
    """Fraction of rows whose largest logit is at the right class."""
    return (logits.argmax(1) == classes).double().mean()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """mean (output - target)^2 with outputs (n, 1) and targets (n,)."""
    return mse_loss(outputs.squeeze(1), targets)  # unsqueezed, (n, 1) - (n,) would broadcast to (n, n)


def split(x: Tensor, y: Tensor, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Shuffle the rows of x (n, d) and y (n,) and cut them into 60 % train, 20 % validation, 20 % test."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    fifth = len(x) // 5
    rows = order.split([len(x) - 2 * fifth, fifth, fifth])
    return {part: (x[chosen], y[chosen]) for part, chosen in zip(PARTS, rows)}


def read_notmnist(root: Path) -> tuple[Tensor, Tensor, list[str], Counter[str]]:
    """Images (n, 784) uint8, classes (n,) int64, the folder name of each class, and the files skipped by reason.

    A folder without a single usable image is no class. DataError if ``root`` is no folder, or if no image is left.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}: {LAYOUT}")
    images: list[np.ndarray] = []
    labels: list[int] = []
    names: list[str] = []
    skipped: Counter[str] = Counter()
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir()):
        before = len(images)
        for path in tqdm(sorted(folder.glob("*.png")), desc=f"reading {folder.name}", leave=False):
            image = read_image(path)
            if isinstance(image, str):
                skipped[image] += 1
            else:
                images.append(image)
        if len(images) > before:
            labels += [len(names)] * (len(images) - before)
            names.append(folder.name)
    if not images:
        raise DataError(f"{root} has no usable image ({count(skipped)}): {LAYOUT}")
    return torch.from_numpy(np.stack(images)), torch.tensor(labels), names, skipped


def read_image(path: Path) -> np.ndarray | str:
    """The 784 pixels of a 28x28 image, 8 bits of grey, or the reason why the file is skipped."""
    try:
        with Image.open(path) as image:
            if image.size != (28, 28) or image.mode != "L":
                return "not 28x28 grey"
            image.load()
            return np.asarray(image).reshape(-1)
    except Exception:  # a decoder meets garbage with OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        return "unreadable"


def count(skipped: Counter[str]) -> str:
    """Say how many files were skipped: ``3 files skipped (2 unreadable, 1 not 28x28 grey)``."""
    reasons = ", ".join(f"{number} {reason}" for reason, number in skipped.most_common())
    return f"{skipped.total()} files skipped" + (f" ({reasons})" if reasons else "")
