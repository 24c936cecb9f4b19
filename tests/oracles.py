"""What an optimizer must equal: torch.optim's class of the same name or, where torch lacks it, its paper's algorithm,
written here line by line in torch's protocol."""

import math

import torch


def oracle_class(name):
    """The class that the optimizer of this name is compared with."""
    return getattr(torch.optim, name, None) or PAPERS[name]


class Paper(torch.optim.Optimizer):
    """Base of the algorithms from papers: ``move(p, g, state, group)`` takes the step number ``state["step"]``, with
    ``states`` that begin as zeros. A subclass is declared with its options and their defaults."""

    states = ()

    def __init_subclass__(cls, **options):
        cls.options = {**options, "maximize": False}

    def __init__(self, params, *, foreach=None, **options):
        """``foreach`` is what torch's classes are given, and not looked at."""
        assert options.keys() <= self.options.keys()
        super().__init__(params, self.options | options)

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


class StableAdamW(Paper, lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-2):
    """Wortsman et al., arXiv 2304.13013, algorithm 2, with the decay of the loop's last line inside."""

    states = ("exp_avg", "exp_avg_sq")

    def move(self, p, g, state, group):
        t, m, v = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        hats = [beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in group["betas"]]
        m.copy_(hats[0] * m + (1 - hats[0]) * g)
        v.copy_(hats[1] * v + (1 - hats[1]) * g**2)
        eps = torch.tensor(group["eps"], dtype=p.dtype)
        rms = torch.sqrt(torch.mean(g**2 / torch.maximum(v, eps**2)))
        lr = group["lr"] / torch.clamp(rms, min=1.0)
        p.copy_(p - lr * group["weight_decay"] * p - lr * m / (torch.sqrt(v) + eps))


class LAMB(Paper, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=1e-2, always_adapt=False):
    """You et al., arXiv 1904.00962, algorithm 2, with phi(x) = x, and Apex's exception for groups without decay."""

    states = ("exp_avg", "exp_avg_sq")

    def move(self, p, g, state, group):
        t, m, v = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        beta1, beta2 = group["betas"]
        m.copy_(beta1 * m + (1 - beta1) * g)
        v.copy_(beta2 * v + (1 - beta2) * g**2)
        r = (m / (1 - beta1**t)) / (torch.sqrt(v / (1 - beta2**t)) + group["eps"])
        step = r + group["weight_decay"] * p
        norm_of_p, norm_of_step = torch.linalg.vector_norm(p), torch.linalg.vector_norm(step)
        ratio = 1.0
        if (group["weight_decay"] or group["always_adapt"]) and norm_of_p != 0 and norm_of_step != 0:
            ratio = norm_of_p / norm_of_step
        p.copy_(p - group["lr"] * ratio * step)


class Lion(Paper, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
    """Chen et al., arXiv 2302.06675, algorithm 2."""

    states = ("exp_avg",)

    def move(self, p, g, state, group):
        (beta1, beta2), m = group["betas"], state["exp_avg"]
        update = torch.sign(beta1 * m + (1 - beta1) * g)
        # Scaled first, as torch's optimizers and lion-pytorch do: in float32 the rounding is theirs.
        p.copy_(p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update)
        m.copy_(beta2 * m + (1 - beta2) * g)


class Adan(Paper, lr=1e-3, betas=(0.98, 0.92, 0.99), eps=1e-8, weight_decay=0.0, no_prox=False):
    """Xie et al., arXiv 2208.06677, algorithm 1, with the betas and the bias corrections of the authors' code."""

    states = ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")

    def move(self, p, g, state, group):
        t, (beta1, beta2, beta3) = int(state["step"]), group["betas"]
        m, v, b, before = (state[key] for key in self.states)
        difference = g + before if t > 1 else torch.zeros_like(g)
        m.copy_(beta1 * m + (1 - beta1) * g)
        b.copy_(beta2 * b + (1 - beta2) * difference)
        v.copy_(beta3 * v + (1 - beta3) * (g + beta2 * difference) ** 2)
        before.copy_(-g)
        lr, decay = group["lr"], group["weight_decay"]
        step = lr / (torch.sqrt(v / (1 - beta3**t)) + group["eps"])
        move = step * (m / (1 - beta1**t) + beta2 * b / (1 - beta2**t))
        p.copy_(p * (1 - lr * decay) - move if group["no_prox"] else (p - move) / (1 + lr * decay))


class AdEMAMix(
    Paper,
    lr=1e-3,
    betas=(0.9, 0.999, 0.9999),
    alpha=2.0,
    beta3_warmup=None,
    alpha_warmup=None,
    eps=1e-8,
    weight_decay=0.0,
):
    """Pagliardini, Ablin and Grangier, arXiv 2409.03137, equations (AdEMAMix) and appendix A.1 for the schedules."""

    states = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")

    def move(self, p, g, state, group):
        t, (beta1, beta2, beta3), alpha = int(state["step"]), group["betas"], group["alpha"]
        fast, slow, v = (state[key] for key in self.states)
        if group["alpha_warmup"]:
            alpha = min(t * alpha / group["alpha_warmup"], alpha)
        if group["beta3_warmup"] and t < group["beta3_warmup"]:
            share = t / group["beta3_warmup"]
            first, last = (math.log(0.5) / math.log(beta + 1e-8) - 1 for beta in (beta1, beta3))
            beta3 = math.exp(math.log(0.5) / ((1 - share) * first + share * last + 1))
        fast.copy_(beta1 * fast + (1 - beta1) * g)
        slow.copy_(beta3 * slow + (1 - beta3) * g)
        v.copy_(beta2 * v + (1 - beta2) * g**2)
        update = (fast / (1 - beta1**t) + alpha * slow) / (torch.sqrt(v / (1 - beta2**t)) + group["eps"])
        # Scaled first, as by torch.optim.AdamW: in float32 the rounding is its.
        p.copy_(p * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * update)


PAPERS = {cls.__name__: cls for cls in (StableAdamW, LAMB, Lion, Adan, AdEMAMix)}
