"""fusedopt: torch.optim with the whole step in one or two GPU launches, and a fast torch fallback."""

from pathlib import Path

if not Path(__file__).with_name("kernels").exists():
    # In a checkout they lie beside the package (setup.cfg), and are found there whether it is installed or not.
    __path__.append(str(Path(__file__).resolve().parent.parent))

from . import schedules, stopping
from .adadelta import Adadelta
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adamax import Adamax
from .adan import Adan
from .ademamix import AdEMAMix
from .amp import GradScaler
from .asgd import ASGD
from .backends import Backend, backend
from .check import check_rule
from .convert import convert
from .lamb import LAMB
from .lion import Lion
from .memory import memory
from .nadam import NAdam
from .optimizer import FusedOptimizer, registry
from .radam import RAdam
from .release import enable_gradient_release
from .rmsprop import RMSprop
from .rprop import Rprop
from .rule import Rule
from .sgd import SGD
from .stable_adamw import StableAdamW

__version__ = "0.1.0"
__all__ = [
    "ASGD",
    "LAMB",
    "SGD",
    "AdEMAMix",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Adan",
    "Backend",
    "FusedOptimizer",
    "GradScaler",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Rule",
    "StableAdamW",
    "backend",
    "check_rule",
    "convert",
    "enable_gradient_release",
    "memory",
    "registry",
    "schedules",
    "stopping",
]
