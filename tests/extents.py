"""How much the tests compile: with FUSEDOPT_COMPILE "all", with "some", the default, or with "core", another Triton's.

What depends on the rule is asked of every rule, on one GPU; what depends on the address, dtype or GPU, of a few rules.
"""

from rule_cases import ADDRESSES, AT_ONCE, CASES, VARIANTS, WITH_MEANS

ONE_OF_EACH = ["sm_90", "gfx942"]
"""A GPU of each make."""

CORE = {"momentum", "rmsprop_centered_momentum", "adam", "amsgrad", "adan"}
"""Rules with one to four states, which stand for all where compiling every one would take too long."""

LARGE = {"adadelta", "ademamix"}
"""Those that need most registers beside them, where a thread holds eight elements of bfloat16."""

FEW = {"adam", "adan"}
"""The rule of most training, and one with four states."""

DTYPES = {
    "all": {
        "sm_75": ["float32", "bfloat16"],
        "sm_80": ["float32", "bfloat16"],
        "sm_90": ["float32", "bfloat16", "float64", "mixed"],
        "sm_100": ["float32", "bfloat16"],
        "gfx942": ["float32", "bfloat16", "float64", "mixed"],
    },
    "some": {
        "sm_75": ["float32"],
        "sm_80": ["bfloat16"],
        "sm_90": ["float32", "bfloat16", "float64", "mixed"],
        "sm_100": ["bfloat16"],
        "gfx942": ["float32", "mixed"],
    },
    "core": {
        "sm_75": ["float32"],
        "sm_80": ["bfloat16"],
        "sm_90": ["float32", "mixed"],
        "sm_100": ["bfloat16"],
        "gfx942": ["float32"],
    },
}
"""By extent and GPU. bfloat16 is computed in float32, and the compiler's work on both is the same for NVIDIA's GPUs."""


def compiled_rules(target: str, dtype: str, address: str, extent: str) -> set[str]:
    """With extent "all" every rule, but for the variants on most GPUs."""
    rules = {case.split()[0] for case in CASES}
    if extent == "all":
        return rules if target in ONE_OF_EACH else rules - VARIANTS
    if address == "flat" and (dtype != "float32" or target not in (ONE_OF_EACH if extent == "some" else ["sm_90"])):
        return set()
    if (target, address) == ("sm_90", "scattered") and extent == "some":
        return {"float32": rules, "bfloat16": CORE | LARGE}.get(dtype, FEW)
    return CORE if (target, address, dtype) == ("sm_90", "scattered", "float32") else FEW


def compiled_addresses(target: str, dtype: str, extent: str) -> list[str]:
    return [address for address in ADDRESSES if compiled_rules(target, dtype, address, extent)]


def is_whole(target: str, dtype: str, extent: str) -> bool:
    """Whether each feature is compiled there: on a GPU of each make. Elsewhere neither a GradScaler's unscaling nor
    norms taken in one launch, and fewer means."""
    return extent == "all" or (target in ONE_OF_EACH and dtype == "float32")


def compiled_at_once(target: str, dtype: str, extent: str) -> tuple[str, ...]:
    """The cases that are compiled as one cooperative kernel too."""
    return AT_ONCE if extent == "all" or (target, dtype, extent) == ("sm_90", "float32", "some") else AT_ONCE[:1]


def compiled_means(target: str, dtype: str, address: str, extent: str) -> dict[str, dict]:
    """The cases with a stage that needs a mean, and their settings. Elsewhere than where all is compiled the one with
    more states, on one GPU, and for another Triton none; in flat buffers on that GPU alone."""
    if address == "flat" and extent != "all" and (target, extent) != ("sm_90", "some"):
        return {}
    if is_whole(target, dtype, extent):
        return WITH_MEANS
    return {"amsgrad": WITH_MEANS["amsgrad"]} if (target, extent) == ("sm_90", "some") else {}


def launched_cases(address: str, extent: str) -> list[str]:
    """Those of which many steps are taken, to see that nothing is compiled again."""
    everything = {case.split()[0] for case in CASES} - VARIANTS
    rules = everything if extent == "all" else CORE if address == "scattered" else FEW
    return [case for case in CASES if case.split()[0] in rules and WITH_MEANS.get(case) != {}]


ZEROING = (
    ("scattered", "float32", {}),
    ("scattered", "float32", {"launches": 1}),
    ("scattered", "float32", {"track": "total"}),
    ("scattered", "float32", {"state_dtype": "8bit"}),
    ("flat", "bfloat16", {"state_dtype": "8bit"}),
)


def zeroing_cases(extent: str) -> tuple[tuple[str, str, dict], ...]:
    """(address, dtype, settings) of steps that leave zeros in place of gradients: by default those with 8-bit states
    in flat buffers alone; for another Triton two in all."""
    return {"all": ZEROING, "some": (*ZEROING[:3], ZEROING[4]), "core": ZEROING[::4]}[extent]


def units_dtypes(extent: str) -> list[str]:
    """Those with which adaptive clipping is compiled."""
    return ["float32"] if extent == "core" else ["float32", "bfloat16"]


def counted_dtypes(extent: str) -> list[str]:
    """Those of which instructions are counted."""
    return ["float32"] if extent == "core" else ["float32", "mixed", "bfloat16"]
