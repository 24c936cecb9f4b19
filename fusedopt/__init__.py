"""fusedopt: torch.optim with the whole step in one or two GPU launches, and a fast torch fallback."""

from . import schedules, stopping
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adan import Adan
from .ademamix import AdEMAMix
from .amp import GradScaler
from .backends import Backend, backend
from .check import check_rule
from .convert import convert
from .lion import Lion
from .memory import memory
from .optimizer import FusedOptimizer, registry
from .release import enable_gradient_release
from .rmsprop import RMSprop
from .rule import Rule
from .sgd import SGD
from .stable_adamw import StableAdamW

__version__ = "0.1.0"
__all__ = [
    "SGD",
    "AdEMAMix",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adan",
    "Backend",
    "FusedOptimizer",
    "GradScaler",
    "Lion",
    "RMSprop",
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
