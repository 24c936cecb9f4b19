"""``python -m fusedopt`` trains two lessons with torch.optim and with fusedopt; ``paths`` draws the way of every
textbook rule over two surfaces; ``info`` says what would run where; ``check FILE`` compares the Triton function and the
torch twin of every optimizer that a file defines.

Exit codes: 0 done; 1 ``check`` found a difference; 2 wrong arguments, unusable data, or a package of the extra
``demo`` is missing.
"""

import argparse
import importlib
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import fusedopt
from fusedopt.demo_options import CRITERIA, SCHEDULES, criterion

# The extra "demo" of pyproject.toml: import name -> name for pip.
EXTRA = {"matplotlib": "matplotlib", "tqdm": "tqdm", "sklearn": "scikit-learn", "PIL": "pillow"}
LEGEND = """\
step: median wall time of a step, clipping included, torch.optim at its defaults; ratio: torch.optim over fusedopt
difference: largest |parameter by torch.optim - parameter by fusedopt| after the training
(if it is large in float32 and vanishes with --dtype float64, it is rounding that the training amplified)"""


def main(argv: list[str] | None = None) -> int:
    """Run the arguments ``argv`` (None: the command line); returns 0 or raises SystemExit(2) after a message."""
    parser = arguments()
    options = parser.parse_args(argv)
    if options.command == "info":
        print(info())
        return 0
    try:
        if options.command == "check":
            return check(options.file)
        return draw_paths(options) if options.command == "paths" else train(options)
    except ModuleNotFoundError as missing:
        package = EXTRA.get((missing.name or "").partition(".")[0])
        if package is None:
            raise
        install = "pip install \"fusedopt[demo]\" (in a clone: pip install '.[demo]')"
        parser.exit(2, f"fusedopt: this needs {package}, which is not installed: {install}\n")
    except Unusable as problem:
        parser.exit(2, f"fusedopt: {problem}\n")


class Unusable(Exception):
    """What the user gave cannot be used; the message says why."""


def train(options: argparse.Namespace) -> int:
    """Train both lessons, print the comparison and save the plot."""
    from fusedopt import demo, lessons, plots

    try:
        classifier = lessons.classification(options.data, options.seed, getattr(torch, options.dtype))
        regression = lessons.regression(options.seed)
    except lessons.DataError as problem:
        raise Unusable(problem) from problem
    writable(options.out)
    for lesson in (classifier, regression):
        print(f"{lesson.name}: {lesson.note}")
    device = torch.device(options.device)
    common = {"clip": options.clip, "schedule": options.schedule, "stop": tuple(options.stop)}
    comparisons = []
    with demo.cpu_threads(options.threads):
        for name in [options.optimizer] if options.optimizer else ["SGD", "Adam"]:
            regime = demo.Regime(options.epochs, options.lr or demo.LEARNING_RATES.get(name), **common)
            comparisons.append(demo.compare(classifier, name, regime, device=device, seed=options.seed))
        regime = demo.Regime(options.regression_epochs, **common)
        comparisons.append(demo.compare(regression, "Adam", regime, device=device, seed=options.seed))

    backend = fusedopt.backend(device)
    where = f"{device} ({describe(device, options.threads)})"
    plots.plot(comparisons, f"torch.optim and fusedopt on {where}, fusedopt backend: {backend.name}", options.out)
    print(f"\n{demo.table(comparisons)}\n\n{LEGEND}")
    for result in comparisons:
        if result.stopped is not None:
            epochs = len(result.runs["fusedopt"].losses)
            print(f"{result.lesson.name}, {result.optimizer}: stopped after {epochs} epochs: {result.stopped}")
    print(f"device {where}, fusedopt backend {backend.name}: {backend.reason}\nplot: {options.out}")
    return 0


def draw_paths(options: argparse.Namespace) -> int:
    """Save the picture of all rules' paths."""
    from fusedopt import paths

    writable(options.out)
    paths.picture(options.out, options.steps)
    print(f"plot: {options.out}")
    return 0


def writable(out: Path) -> None:
    """A plot that cannot be saved is better known before the training than after."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("ab").close()
    except OSError as problem:
        raise Unusable(problem) from problem


def arguments() -> argparse.ArgumentParser:
    """The command line; a wrong number, device or optimizer name ends with a message and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedopt",
        description="Train a classifier and a regression twice, with torch.optim and with fusedopt, from the same seed "
        "on the same batches, and compare scores, parameters and step times.",
    )
    commands = parser.add_subparsers(dest="command", title="instead of training", metavar="[paths | info | check FILE]")
    drawer = commands.add_parser("paths", help="draw the way of every textbook rule over a quadratic and a saddle")
    drawer.add_argument("--steps", type=amount, default=40, help="default: %(default)s")
    drawer.add_argument("--out", type=Path, default=Path("demo/paths.png"), help="a PNG (default: %(default)s)")
    commands.add_parser("info", help="versions, devices, the backend of each device, registered optimizers")
    checker = commands.add_parser("check", help="compare the Triton functions and torch twins of a file's optimizers")
    checker.add_argument("file", type=Path, help="a Python file that defines subclasses of fusedopt.FusedOptimizer")
    comparable = sorted(name for name in fusedopt.registry if hasattr(torch.optim, name))
    present = devices()
    add = parser.add_argument
    add("--data", type=Path, metavar="ROOT", help="images ROOT/<class>/*.png, 28x28 grey (default: embedded digits)")
    add("--optimizer", choices=comparable, help="of the classifier (default: SGD, then Adam; the regression has Adam)")
    add("--lr", type=positive(float), help="of the classifier (default: 0.1 for SGD, torch's default for the others)")
    add("--dtype", choices=["float32", "float64"], default="float32", help="of the classifier (default: %(default)s)")
    add("--epochs", type=amount, default=60, help="of the classifier (default: %(default)s)")
    add("--regression-epochs", type=amount, default=3000, help="full-batch epochs (default: %(default)s)")
    add("--schedule", choices=[*SCHEDULES], help="of the learning rate, over all steps (default: constant)")
    add("--clip", type=positive(float), metavar="S", help="clip the gradient norm to S (default: no clipping)")
    add(
        "--stop",
        type=stopping,
        nargs="+",
        default=[],
        metavar="CRITERION",
        help="stop where one of these holds after an epoch: " + ", ".join(f"{name}=NUMBER" for name in CRITERIA),
    )
    add("--device", choices=present, default=present[-1], help="default: %(default)s")
    add("--threads", type=amount, default=1, help="CPU threads (default: %(default)s; the networks are small)")
    add("--seed", type=seed, default=0, help="of the split, the initial parameters and the batches (default: 0)")
    add("--out", type=Path, default=Path("demo/fusedopt.png"), help="the plot, a PNG (default: %(default)s)")
    return parser


def check(file: Path) -> int:
    """Print what ``fusedopt.check_rule`` says of every optimizer that the file defines; 1 if anything is wrong."""
    from fusedopt.backends import triton_problem
    from fusedopt.check import check_file

    if not (file.is_file() and file.suffix == ".py"):
        raise Unusable(f"{file} is not a Python file")
    if problem := triton_problem():
        raise Unusable(f"check runs Triton functions, and {problem}")
    report = check_file(file)
    for name, difference in report.items():
        print(f"{name}: {difference or 'the Triton function and the torch twin agree'}")
    if not report:
        print(f"{file} defines no subclass of fusedopt.FusedOptimizer")
    return int(not report or any(report.values()))


def positive(number: type) -> Callable[[str], float]:
    """An argparse type: ``number`` (int or float), finite and above zero."""

    def parse(text: str) -> float:
        value = number(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number above zero")
        return value

    parse.__name__ = number.__name__  # argparse shows it: "invalid int value: 'ten'"
    return parse


amount = positive(int)


def seed(text: str) -> int:
    """An argparse type: what torch takes for one."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} has more than 64 bits")
    return value


def stopping(text: str) -> Callable:
    """An argparse type: a criterion such as ``loss=0.1``."""
    try:
        return criterion(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from problem


def devices() -> list[str]:
    """The devices that are there: ``cpu``, then ``cuda:<index>`` of each GPU, then ``cuda``, the current one."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["cpu", *gpus, "cuda"] if gpus else ["cpu"]


def describe(device: torch.device, threads: int) -> str:
    """The name of a GPU, or how many threads of a CPU are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{threads} thread{'s' if threads > 1 else ''}"


def info() -> str:
    """Versions, the devices with the backend that fusedopt would use on each, and the registered optimizers."""
    lines = [f"fusedopt    {fusedopt.__version__}", f"python      {platform.python_version()} on {platform.platform()}"]
    lines += [f"{module:<12}{version(module)}" for module in ("torch", "triton", "numpy")]
    for name in devices():
        backend = fusedopt.backend(name)
        gpu = f"{torch.cuda.get_device_name(name)}, " if name != "cpu" else ""
        lines.append(f"{name:<12}{gpu}backend {backend.name}: {backend.reason}")
    lines.append(f"optimizers  {', '.join(sorted(fusedopt.registry))}")
    return "\n".join(lines)


def version(module: str) -> str:
    """The version of a module, or why there is none."""
    try:
        return importlib.import_module(module).__version__
    except ModuleNotFoundError:
        return "not installed"
    except ImportError as problem:
        return f"cannot be imported: {problem}"


if __name__ == "__main__":
    sys.exit(main())
