"""What an optimizer must equal: torch.optim's class of the same name or, where torch lacks it, its paper's algorithm,
written here line by line in torch's protocol."""

import torch


def oracle_class(name):
    """The class that the optimizer of this name is compared with."""
    return getattr(torch.optim, name, None) or PAPERS[name]


class Paper(torch.optim.Optimizer):
    """Base of the algorithms from papers: ``move(p, g, state, group)`` takes the step number ``state["step"]``."""

    states = ()

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state.update({key: torch.zeros_like(p) for key in self.states})
                dtype = torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32
                state["step"] = torch.tensor(float(state["step"]) + 1, dtype=dtype)
                self.move(p, -p.grad if group["maximize"] else p.grad, state, group)
        return loss


class StableAdamW(Paper):
    """Wortsman et al., arXiv 2304.13013, algorithm 2, with the decay of the loop's last line inside."""

    states = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-2, *, maximize=False, foreach=None
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize))

    def move(self, p, g, state, group):
        t, m, v = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        hats = [beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in group["betas"]]
        m.copy_(hats[0] * m + (1 - hats[0]) * g)
        v.copy_(hats[1] * v + (1 - hats[1]) * g**2)
        eps = torch.tensor(group["eps"], dtype=p.dtype)
        rms = torch.sqrt(torch.mean(g**2 / torch.maximum(v, eps**2)))
        lr = group["lr"] / torch.clamp(rms, min=1.0)
        p.copy_(p - lr * group["weight_decay"] * p - lr * m / (torch.sqrt(v) + eps))


PAPERS = {"StableAdamW": StableAdamW}
