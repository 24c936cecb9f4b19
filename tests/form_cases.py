"""What the tests and the report of code quality compile of the forms in which parameters and states are stored."""

import torch

FORMS = {
    "nearest + 8bit": {"master": None, "state_dtype": "8bit"},
    "stochastic + bfloat16": {"master": "stochastic", "state_dtype": torch.bfloat16},
    "stochastic + 8bit": {"master": "stochastic", "state_dtype": "8bit"},
    "kahan + bfloat16": {"master": "kahan", "state_dtype": torch.bfloat16},
    "kahan + 8bit": {"master": "kahan", "state_dtype": "8bit"},
    "split + bfloat16": {"master": "split", "state_dtype": torch.bfloat16},
    "split + 8bit": {"master": "split", "state_dtype": "8bit"},
    "split8 + bfloat16": {"master": "split8", "state_dtype": torch.bfloat16},
    "split8 + 8bit": {"master": "split8", "state_dtype": "8bit"},
    "fp32 + bfloat16": {"master": "fp32", "state_dtype": torch.bfloat16},
    "fp32 + 8bit": {"master": "fp32", "state_dtype": "8bit"},
}
"""Of bfloat16 parameters."""

SOME = ("nearest + 8bit", "stochastic + bfloat16", "split8 + 8bit")
"""Of these also with other rules than Adam's: a form does not know the rule."""

RULES = {"adam": tuple(FORMS), "momentum": SOME, "rmsprop_centered_momentum": SOME[:2], "adan": SOME}
"""Which forms are compiled with which case: one, two (of which one is exact) and four states beside Adam's two."""

EACH_MASTER = (
    "nearest + 8bit", "stochastic + bfloat16", "kahan + 8bit", "split + bfloat16", "split8 + 8bit", "fp32 + 8bit",
)  # fmt: skip
"""Each way to store parameters once, and both to store states: 8 bits with those that leave least room for them."""

FORMS_AT_ONCE = ("nearest + 8bit", "stochastic + 8bit", "fp32 + 8bit")
"""Compiled with Adam's rule as one cooperative kernel too; only the last, which moves most bytes, for one GPU and with
the installed Triton, unless FUSEDOPT_COMPILE is "all"."""


def stored_cases(extent: str, target: str) -> list[tuple[str, str]]:
    """(case, form): with Adam's rule each master for sm_90, with another Triton the forms of SOME, and the last two or
    one of these for other GPUs; with "all" all."""
    if extent == "core" or (extent == "some" and target != "sm_90"):
        first = 0 if target == "sm_90" else {"some": 1, "core": 2}[extent]
        return [("adam", form) for form in SOME[first:]]
    rules = RULES if extent == "all" else {"adam": EACH_MASTER, "momentum": SOME[:1]}
    return [(case, form) for case, forms in rules.items() for form in forms]


def forms_at_once(extent: str, target: str) -> tuple[str, ...]:
    if extent == "all":
        return FORMS_AT_ONCE
    return FORMS_AT_ONCE[2:] if (target, extent) == ("sm_90", "some") else ()
