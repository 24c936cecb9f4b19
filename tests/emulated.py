"""Some steps as the kernels make them: compiled, on the machine of ptx/, or wherever a test runs them.

    python tests/emulated.py FILE TARGET [few | all]

takes them on the machine and saves what they leave. A program of its own, since Triton's interpreter and its compiler
cannot live in one process.
"""

import gc
import sys

import torch
import without_dynamo
from form_cases import FORMS
from rule_cases import ADDRESSES, CASES, CHAINS, WITH_MEANS, optimizer, parameters, tensors

SIZES = [1500, 33]
STEPS = 2

EVERYTHING = {"max_grad_norm": 2.0, "max_grad_value": (None, 0.5), "weight_decay": 0.1, "maximize": True}
SCALED = {"grad_scale": 4.0, "found_inf": 0.0}

FEATURES = {
    "adam": {},
    "adam, elements out of line": {"offset": 1, "max_grad_norm": 0.5, "master": None},
    "adam, flat, averages, norms": {"address": "flat", "ema_decay": 0.9, "track": "parameters", **EVERYTHING},
    "adam at once": {"launches": 1, "steps": 1, **EVERYTHING},
    "adam, bfloat16, split + 8bit, zeroed": {
        "dtype": torch.bfloat16, "sizes": [5000, 33], "flat_grads": "zeroed", **FORMS["split + 8bit"],
    },
    "momentum, bfloat16, stochastic": {"dtype": torch.bfloat16, **FORMS["stochastic + bfloat16"]},
    "momentum, clipped by units": {"adaptive_grad_clip": 0.1, "sizes": [(20, 30), 33]},
    "amsgrad, cautious": {**WITH_MEANS["amsgrad"], **EVERYTHING},
    "adagrad, scaled": {"scaler": SCALED, "max_grad_norm": 0.5},
    "nadam, float64": {"dtype": torch.float64, "max_grad_norm": 0.5},
}  # fmt: skip
"""By label, whose first word is a case of rule_cases.py."""

SLOW = {
    "adam at once, a step skipped, norms": {
        "launches": 1, "track": "total", "skip_nonfinite": True, "inf_at": 1, "ema_decay": 0.9, **EVERYTHING,
    },
    "amsgrad at once": {"launches": 1, "scaler": SCALED, "max_grad_norm": 0.5},
}  # fmt: skip
"""The cooperative kernel goes through a thousand slots of the norm."""


def scenarios(extent):
    """Settings by label."""
    if extent == "few":
        return FEATURES
    found = FEATURES | SLOW
    for case in CASES:
        for address in ADDRESSES:
            for chain in ("none", "all"):
                for dtype in (torch.float32, torch.bfloat16):
                    about = {"address": address, "dtype": dtype, **CHAINS[chain]}
                    found[f"{case}, {address}, stages: {chain}, {dtype}"] = about
        found[f"{case}, float64"] = {"dtype": torch.float64, **CHAINS["all"]}
    for form, settings in FORMS.items():
        for launches in (1, 2):
            about = {"dtype": torch.bfloat16, "launches": launches, "max_grad_norm": 0.5, **settings}
            found[f"adam, bfloat16, {form}, {launches} launches"] = {**about, "sizes": [5000, 4500]}
    return found


def outcome(label, about, device):
    """What the steps leave: tensors by name."""
    about = dict(about)
    sizes, dtype, offset = about.pop("sizes", SIZES), about.pop("dtype", torch.float32), about.pop("offset", 0)
    steps, inf_at, scaler = about.pop("steps", STEPS), about.pop("inf_at", None), about.pop("scaler", None)
    params = parameters(sizes, device, dtype)
    made = optimizer(label.split(",")[0].removesuffix(" at once"), params, **about)
    if scaler is not None:
        for name, number in scaler.items():
            setattr(made, name, torch.tensor([number], device=device))
    for step in range(steps):
        made.zero_grad()
        for k, (p, g) in enumerate(zip(params, tensors(sizes, device, dtype, seed=step + 1))):
            if step == inf_at and k == 0:
                g.view(-1)[7] = torch.inf
            if p.grad is not None:
                p.grad.copy_(g)
                continue
            memory = torch.empty(g.numel() + offset, dtype=dtype, device=device)
            p.grad = memory[offset:].view_as(g).copy_(g)
        made.step()
    found = {f"{k}.{key}": x for k, p in enumerate(params) for key, x in made.state[p].items()}
    found |= {f"{k}": p.detach() for k, p in enumerate(params)} | {f"{k}.grad": p.grad for k, p in enumerate(params)}
    found |= {f"{k}.average": made._ema[p] for k, p in enumerate(params) if p in made._ema}
    if made.grad_norm is not None:
        found["norm"] = made.grad_norm
    if made.track is not None:
        found |= {f"norm of {key}": x for key, x in made.metrics._asdict().items()}
    if made.skip_nonfinite:
        found["skipped"] = made.skipped_steps
    return {key: x.detach().cpu().clone() for key, x in found.items()}


def main(file, target, extent="few"):
    from ptx.gpu import EmulatedGPU
    from triton.runtime import driver

    from fusedopt import backends

    driver.set_active(EmulatedGPU(target, "emulated"))
    # CPU tensors are taken for those of the GPU.
    backends._device_problem = lambda device, requested: None
    device = torch.device("cpu")
    without_dynamo.prepare()
    gc.collect()
    gc.freeze()  # the machine looks for tensors among all objects, at every launch
    torch.save({label: outcome(label, about, device) for label, about in scenarios(extent).items()}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
