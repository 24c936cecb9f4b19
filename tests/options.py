"""The optimizers of the registry and their options: the one table from which all tests take their cases."""

import torch

import fusedopt

NAMES = sorted(fusedopt.registry)
IN_TORCH = [name for name in NAMES if hasattr(torch.optim, name)]
"""Those that can be exchanged with torch.optim's, and left to its step."""

TENSOR_LR = torch.tensor(0.03, dtype=torch.float64)
"""float64, since torch's Adam computes its step size in the dtype of a tensor lr."""

OPTIONS = {
    "SGD": [
        {},
        {"lr": TENSOR_LR},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.05},
        {"maximize": True},
        {"momentum": 0.8, "dampening": 0.1, "weight_decay": 0.05, "maximize": True},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05, "maximize": True},
    ],
    "Adagrad": [
        {},
        {"lr": TENSOR_LR},
        {"lr_decay": 0.1},
        {"initial_accumulator_value": 0.5},
        {"eps": 1e-3},
        {"weight_decay": 0.05},
        {"maximize": True},
        {"lr_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3, "weight_decay": 0.05, "maximize": True},
    ],
    "RMSprop": [
        {},
        {"lr": TENSOR_LR},
        {"alpha": 0.5},
        {"alpha": 0.0},
        {"alpha": 1.0, "eps": 0.1},
        {"alpha": 1 - 1e-9, "eps": 0.1},
        {"eps": 1e-3},
        {"centered": True},
        {"momentum": 0.9},
        {"momentum": 0.8, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.05, "maximize": True},
        {"centered": True, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.05, "maximize": True},
        {"weight_decay": 0.05},
        {"maximize": True},
        {"weight_decay": 0.05, "maximize": True},
        {"momentum": 0.8, "centered": True, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.05, "maximize": True},
    ],
    "Adam": [
        {},
        {"lr": TENSOR_LR},
        {"betas": (0.5, 0.9)},
        {"betas": (0.0, 0.0)},
        {"eps": 1e-3},
        {"amsgrad": True},
        {"weight_decay": 0.05},
        {"weight_decay": 0.05, "decoupled_weight_decay": True},
        {"maximize": True},
        {"betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": True, "weight_decay": 0.05, "maximize": True},
    ],
    "AdamW": [
        {},
        {"lr": TENSOR_LR},
        {"betas": (0.5, 0.9)},
        {"eps": 1e-3},
        {"amsgrad": True},
        {"weight_decay": 0.05},
        {"maximize": True},
        {"betas": (0.5, 0.9), "eps": 1e-3, "amsgrad": True, "weight_decay": 0.05, "maximize": True},
    ],
    "Lion": [
        {},
        {"lr": TENSOR_LR},
        {"betas": (0.5, 0.9), "weight_decay": 0.05, "maximize": True},
    ],
    "Adan": [
        {},
        {"lr": TENSOR_LR, "weight_decay": 0.05},
        {"betas": (0.5, 0.8, 0.9), "eps": 1e-3, "weight_decay": 0.05, "no_prox": True, "maximize": True},
    ],
    "AdEMAMix": [
        {},
        {"lr": TENSOR_LR, "alpha_warmup": 6},
        {
            "betas": (0.5, 0.9, 0.99),
            "alpha": 5.0,
            "beta3_warmup": 20,
            "alpha_warmup": 10,
            "eps": 1e-3,
            "weight_decay": 0.05,
            "maximize": True,
        },
    ],
    "StableAdamW": [
        {},
        {"lr": TENSOR_LR},
        {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.05, "maximize": True},
        {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    ],
    "LAMB": [
        {},
        {"lr": TENSOR_LR, "always_adapt": True},
        {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.05, "maximize": True},
        {"weight_decay": 0.0},
        {"weight_decay": 0.0, "always_adapt": True},
    ],
    "NAdam": [
        {},
        {"lr": TENSOR_LR, "betas": (0.5, 0.9), "eps": 1e-3},
        {"betas": (0.0, 0.0)},
        {"momentum_decay": 0.3, "weight_decay": 0.05, "maximize": True},
        {"weight_decay": 0.05, "decoupled_weight_decay": True},
    ],
    "RAdam": [
        {},
        {"lr": TENSOR_LR, "betas": (0.5, 0.9), "eps": 1e-3},
        {"betas": (0.0, 0.6)},
        {"weight_decay": 0.05, "maximize": True},
        {"weight_decay": 0.05, "decoupled_weight_decay": True},
    ],
    "Adamax": [
        {},
        {"lr": TENSOR_LR},
        {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.05, "maximize": True},
    ],
    "Adadelta": [
        {},
        {"lr": TENSOR_LR},
        {"rho": 1.0, "eps": 0.1},
        {"rho": 0.5, "eps": 1e-3, "weight_decay": 0.05, "maximize": True},
    ],
    "ASGD": [
        {},
        {"lr": TENSOR_LR, "lambd": 0.1, "alpha": 0.5},
        {"t0": 2.5},
        {"lambd": 0.1, "alpha": 0.5, "t0": 3, "weight_decay": 0.05, "maximize": True},
    ],
    "Rprop": [
        {},
        {"lr": TENSOR_LR, "maximize": True},
        {"etas": (0.3, 1.5), "step_sizes": (0.01, 0.05)},
    ],
}
"""Every option alone, and all that go together. Without ``lr`` a case runs at LR."""

LR = 0.03

STATEFUL = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.5},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"amsgrad": True},
    "Lion": {"weight_decay": 0.05},
    "Adan": {"weight_decay": 0.05},
    "AdEMAMix": {"beta3_warmup": 10, "alpha_warmup": 10},
    "StableAdamW": {},
    "LAMB": {"weight_decay": 0.05},
    "NAdam": {"momentum_decay": 0.1, "weight_decay": 0.05},
    "RAdam": {"betas": (0.9, 0.99), "decoupled_weight_decay": True},
    "Adamax": {"weight_decay": 0.05},
    "Adadelta": {"rho": 0.8, "eps": 1e-3},
    "ASGD": {"lambd": 0.1, "t0": 2},
    "Rprop": {},
}
"""One option set per optimizer, with as much state as it can have: for tests of what is kept and moved."""
