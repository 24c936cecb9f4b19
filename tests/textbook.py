"""Textbook formulas, written literally in NumPy: update rules F1 to F13, clipping C1 to C5.

``grad(theta)`` is the gradient at a point, ``eta`` the learning rate of step t, counted from 1; ``memory`` holds what
is carried from step to step, zero at first.
"""

from typing import NamedTuple

import numpy as np

STEPS = 50
MU, RHO, BETA1, BETA2, DECAY = 0.9, 0.95, 0.8, 0.95, 0.03
EPS = 1e-2  # large enough to tell where it stands


def gradient_descent(theta, grad, eta, t, memory):
    return theta - eta * grad(theta)


def accumulated(theta, grad, eta, t, memory):
    memory["v"] = MU * memory["v"] + grad(theta)
    return theta - eta * memory["v"]


def velocity(theta, grad, eta, t, memory):
    memory["v"] = MU * memory["v"] - eta * grad(theta)
    return theta + memory["v"]


def average(theta, grad, eta, t, memory):
    memory["m"] = MU * memory["m"] + (1 - MU) * grad(theta)
    return theta - eta * memory["m"]


# Nesterov's two points: theta, and where momentum alone would lead, at which the gradient is taken. The parameter
# holds the latter, so that is what these return.


def accumulated_ahead(start, grad, eta, t, memory):
    theta, v = memory.setdefault("theta", start), memory["v"]
    memory["v"] = MU * v + grad(theta - eta * MU * v)
    memory["theta"] = theta - eta * memory["v"]
    return memory["theta"] - eta * MU * memory["v"]


def velocity_ahead(start, grad, eta, t, memory):
    theta, v = memory.setdefault("theta", start), memory["v"]
    memory["v"] = MU * v - eta * grad(theta + MU * v)
    memory["theta"] = theta + memory["v"]
    return memory["theta"] + MU * memory["v"]


def average_ahead(start, grad, eta, t, memory):
    theta, m = memory.setdefault("theta", start), memory["m"]
    memory["m"] = MU * m + (1 - MU) * grad(theta - eta * MU * m)
    memory["theta"] = theta - eta * memory["m"]
    return memory["theta"] - eta * MU * memory["m"]


def adagrad_inside(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["G"] += g**2
    return theta - eta * g / np.sqrt(memory["G"] + EPS)


def adagrad(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["G"] += g**2
    return theta - eta / (1 + (t - 1) * 0.1) * g / (np.sqrt(0.5 + memory["G"]) + EPS)


def rmsprop_inside(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["s"] = RHO * memory["s"] + (1 - RHO) * g**2
    return theta - eta * g / np.sqrt(memory["s"] + EPS)


def rmsprop_centered_momentum_inside(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["s"] = RHO * memory["s"] + (1 - RHO) * g**2
    memory["mean"] = RHO * memory["mean"] + (1 - RHO) * g
    memory["b"] = MU * memory["b"] + g / np.sqrt(memory["s"] - memory["mean"] ** 2 + EPS)
    return theta - eta * memory["b"]


def rmsprop(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["s"] = RHO * memory["s"] + (1 - RHO) * g**2
    return theta - eta * g / (np.sqrt(memory["s"]) + EPS)


def rmsprop_centered_momentum(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["s"] = RHO * memory["s"] + (1 - RHO) * g**2
    memory["mean"] = RHO * memory["mean"] + (1 - RHO) * g
    memory["b"] = MU * memory["b"] + g / (np.sqrt(memory["s"] - memory["mean"] ** 2) + EPS)
    return theta - eta * memory["b"]


def rmsprop_without_eps(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["s"] = RHO * memory["s"] + (1 - RHO) * g**2
    root = np.sqrt(memory["s"])
    return theta - eta * np.divide(g, root, out=np.zeros_like(g), where=root > 0)


def adam_without_correction(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["m"] = BETA1 * memory["m"] + (1 - BETA1) * g
    memory["s"] = BETA2 * memory["s"] + (1 - BETA2) * g**2
    return theta - eta * memory["m"] / np.sqrt(memory["s"] + EPS)


def adam_without_correction_outside(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["m"] = BETA1 * memory["m"] + (1 - BETA1) * g
    memory["s"] = BETA2 * memory["s"] + (1 - BETA2) * g**2
    return theta - eta * memory["m"] / (np.sqrt(memory["s"]) + EPS)


def adam(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["m"] = BETA1 * memory["m"] + (1 - BETA1) * g
    memory["s"] = BETA2 * memory["s"] + (1 - BETA2) * g**2
    m_hat, v_hat = memory["m"] / (1 - BETA1**t), memory["s"] / (1 - BETA2**t)
    return theta - eta * m_hat / (np.sqrt(v_hat) + EPS)


def adam_inside(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["m"] = BETA1 * memory["m"] + (1 - BETA1) * g
    memory["s"] = BETA2 * memory["s"] + (1 - BETA2) * g**2
    m_hat, v_hat = memory["m"] / (1 - BETA1**t), memory["s"] / (1 - BETA2**t)
    return theta - eta * m_hat / np.sqrt(v_hat + EPS)


def amsgrad_inside(theta, grad, eta, t, memory):
    g = grad(theta)
    memory["m"] = BETA1 * memory["m"] + (1 - BETA1) * g
    memory["s"] = BETA2 * memory["s"] + (1 - BETA2) * g**2
    memory["largest"] = np.maximum(memory["largest"], memory["s"])
    m_hat, v_hat = memory["m"] / (1 - BETA1**t), memory["largest"] / (1 - BETA2**t)
    return theta - eta * m_hat / np.sqrt(v_hat + EPS)


def adam_l2(theta, grad, eta, t, memory):
    return adam(theta, lambda x: grad(x) + DECAY * x, eta, t, memory)


def adamw(theta, grad, eta, t, memory):
    return adam(theta, grad, eta, t, memory) - eta * DECAY * theta


class Row(NamedTuple):
    optimizer: str
    options: dict
    update: object
    constant_eta: bool = False
    """The change of variables takes the next step's learning rate for this one's."""


FORMS = {form: {"momentum": MU, "momentum_form": form} for form in ("accumulated", "velocity", "average")}
INSIDE = {"eps": EPS, "eps_inside_sqrt": True}
CENTERED = {"alpha": RHO, "centered": True, "momentum": MU}
ADAM = {"betas": (BETA1, BETA2), "eps": EPS}
ROWS = {
    "F1 gradient descent": Row("SGD", {}, gradient_descent),
    "F2 momentum": Row("SGD", {"momentum": MU}, accumulated),
    "F2 momentum, by its name": Row("SGD", FORMS["accumulated"], accumulated),
    "F3 momentum, velocity": Row("SGD", FORMS["velocity"], velocity),
    "F4 momentum, averaged": Row("SGD", FORMS["average"], average),
    "F4 with beta 0": Row("SGD", {**FORMS["average"], "momentum": 0}, gradient_descent),
    "F4 with beta 1": Row("SGD", {**FORMS["average"], "momentum": 1}, lambda theta, *_: theta),
    "F5 Nesterov, accumulated": Row("SGD", {"momentum": MU, "nesterov": True}, accumulated_ahead, True),
    "F5 Nesterov, velocity": Row("SGD", {**FORMS["velocity"], "nesterov": True}, velocity_ahead),
    "F5 Nesterov, averaged": Row("SGD", {**FORMS["average"], "nesterov": True}, average_ahead, True),
    "F6 AdaGrad": Row("Adagrad", INSIDE, adagrad_inside),
    "F7 AdaGrad of torch": Row(
        "Adagrad", {"eps": EPS, "lr_decay": 0.1, "initial_accumulator_value": 0.5}, adagrad
    ),
    "F8 RMSProp": Row("RMSprop", {"alpha": RHO, **INSIDE}, rmsprop_inside),
    "F8 RMSProp, centered, momentum": Row("RMSprop", {**CENTERED, **INSIDE}, rmsprop_centered_momentum_inside),
    "F9 RMSProp of torch": Row("RMSprop", {"alpha": RHO, "eps": EPS}, rmsprop),
    "F9 RMSProp, centered, momentum": Row("RMSprop", {**CENTERED, "eps": EPS}, rmsprop_centered_momentum),
    "F10 RMSProp without eps": Row("RMSprop", {"alpha": RHO, "eps": 0}, rmsprop_without_eps),
    "F10 and eps nowhere inside": Row("RMSprop", {"alpha": RHO, **INSIDE, "eps": 0}, rmsprop_without_eps),
    "F11 Adam without correction": Row("Adam", {**ADAM, **INSIDE, "bias_correction": False}, adam_without_correction),
    "F11 with eps outside": Row("Adam", {**ADAM, "bias_correction": False}, adam_without_correction_outside),
    "F12 Adam": Row("Adam", ADAM, adam),
    "F12 with eps inside": Row("Adam", {**ADAM, **INSIDE}, adam_inside),
    "F12 with eps inside, AMSGrad": Row("Adam", {**ADAM, **INSIDE, "amsgrad": True}, amsgrad_inside),
    "F13 Adam with L2": Row("Adam", {**ADAM, "weight_decay": DECAY}, adam_l2),
    "F13 AdamW": Row("AdamW", {**ADAM, "weight_decay": DECAY}, adamw),
}  # fmt: skip

CLIPPING = {
    "none": ({}, lambda g: g),
    "C1 global norm": ({"max_grad_norm": 2.0}, lambda g: g * min(1, 2.0 / (np.linalg.norm(g) + 1e-6))),
    "C2 normalised": (
        {"max_grad_norm": 2.0, "grad_norm_mode": "normalize"}, lambda g: g * 2.0 / np.linalg.norm(g),
    ),
    "C3 component-wise": ({"max_grad_value": 0.4}, lambda g: np.clip(g, -0.4, 0.4)),
    "C4 one-sided": ({"max_grad_value": (None, 0.4)}, lambda g: np.minimum(g, 0.4)),
    "C5 both": (
        {"max_grad_norm": 2.0, "max_grad_value": 0.4},
        lambda g: np.clip(g * min(1, 2.0 / (np.linalg.norm(g) + 1e-6)), -0.4, 0.4),
    ),
}  # fmt: skip
