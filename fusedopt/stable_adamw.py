"""StableAdamW: AdamW whose step is limited where v lags behind the gradient.

    beta1' = beta1 (1 - beta1^(t - 1)) / (1 - beta1^t), beta2' likewise: the averages need no correction then
    m <- beta1' m + (1 - beta1') g
    v <- beta2' v + (1 - beta2') g^2
    RMS = sqrt(mean(g^2 / max(v, eps^2))), the mean over each parameter
    u   = (m / (sqrt(v) + eps) + weight_decay p) / max(1, RMS)          p <- p - lr u

Sources: Wortsman et al., arXiv 2304.13013, algorithm 2; state and default betas and eps as in torch-optimi's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .adam import ADAM
from .arguments import check_betas, check_nonnegative
from .capture import CapturableSettings
from .optimizer import FusedOptimizer
from .rule import SMALLEST, Stage, divisible


class StableAdamW(FusedOptimizer):
    """StableAdamW, with AdamW's arguments.

    Args:
        params: parameters, named parameters, or groups of them.
        lr (float or 1-element tensor): the learning rate.
        betas: how much of the averages m and v is kept at each step.
        eps (float): added to the root of v, and its lower bound in RMS.
        weight_decay (float): decoupled, and limited with the rest of u.
        maximize (bool): ascend instead of descend.
    """

    settings_class = CapturableSettings
    capturable: bool

    def __init__(
        self, params: ParamsT, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-6,
        weight_decay: float = 1e-2, *, maximize: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        check_nonnegative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas, 2)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, **settings)

    def rule(self, group):
        return RULE

    def hyper(self, group, t):
        beta1, beta2 = map(float, group["betas"])
        return (1 - beta1) / (1 - beta1**t), (1 - beta2) / (1 - beta2**t), divisible(group["eps"]), 1.0, 1.0

    def decoupled(self, group):
        return True

    def update(self, group, t):
        update = super().update(group, t)
        limit = Stage("limit_rms", (max(float(group["eps"]) ** 2, SMALLEST),), None, terms=("excess",))
        return update._replace(on_update=(*update.on_update, limit))


# torch's fused kernel corrects the averages afterwards, and knows no limit.
RULE = ADAM._replace(fused=None)
