"""How much the tests compile: with FUSEDOPT_COMPILE "all", with "some", the default, or with "core", another Triton's.

What depends on the rule is asked of every rule, on one GPU; what depends on the address, dtype or GPU, of a few rules.
"""

from rule_cases import ADDRESSES, AT_ONCE, CASES, VARIANTS, WITH_MEANS

ONE_OF_EACH = ["sm_90", "gfx942"]
"""A GPU of each make."""

CORE = {"momentum", "rmsprop_centered_momentum", "adam", "amsgrad", "adan"}
"""Rules with one to four states, which stand for all where compiling every one would take too long."""

LARGE = {"adadelta", "ademamix", "rmsprop_centered_momentum"}
"""Those that need most registers beside them, where a thread holds eight elements of bfloat16."""

FEW = {"adam", "adan"}
"""The rule of most training, which is all that other GPUs than ONE_OF_EACH get, and AMD's in flat buffers, and one with
four states."""

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
    if (target, extent, address) == ("sm_90", "some", "scattered"):
        return {"float32": rules, "bfloat16": FEW | LARGE}.get(dtype, FEW)
    if (target, dtype) == ("sm_90", "float32"):
        return CORE if address == "scattered" else FEW
    return FEW if address == "scattered" and is_whole(target, dtype, extent) else {"adam"}


def compiled_addresses(target: str, dtype: str, extent: str) -> list[str]:
    return [address for address in ADDRESSES if compiled_rules(target, dtype, address, extent)]


def is_whole(target: str, dtype: str, extent: str) -> bool:
    """Whether each feature is compiled there: on a GPU of each make, with another Triton on one. Elsewhere neither a
    GradScaler's unscaling nor norms taken in one launch, and fewer means."""
    return extent == "all" or (dtype == "float32" and target in (ONE_OF_EACH if extent == "some" else ["sm_90"]))


def is_tracked(target: str, dtype: str, extent: str) -> bool:
    """Whether Adam's update with norms is compiled there, which takes longest of all: with each dtype on one GPU."""
    return is_whole(target, dtype, extent) or (target, extent) == ("sm_90", "some")


def compiled_at_once(target: str, dtype: str, extent: str) -> tuple[str, ...]:
    """The cases that are compiled as one cooperative kernel too: with "some" on one GPU one with more states, and with
    another Triton only there."""
    if extent == "all":
        return AT_ONCE
    if (target, dtype) == ("sm_90", "float32"):
        return AT_ONCE[::2] if extent == "some" else AT_ONCE[:1]
    return AT_ONCE[:1] if extent == "some" else ()


def compiled_means(target: str, dtype: str, address: str, extent: str) -> dict[str, dict]:
    """The cases with a stage that needs a mean, and their settings: with "some" both on one GPU in float32, and there
    in flat buffers and in bfloat16 the one with more states, as with float32 on a GPU of the other make."""
    is_first = (target, extent) == ("sm_90", "some")
    if extent == "all" or (is_first and (dtype, address) == ("float32", "scattered")):
        return WITH_MEANS
    if (is_first and dtype in ("float32", "bfloat16")) or (address == "scattered" and is_whole(target, dtype, extent)):
        return {"amsgrad": WITH_MEANS["amsgrad"]}
    return {}


def launched_cases(address: str, extent: str) -> list[str]:
    """Those of which many steps are taken, to see that nothing is compiled again."""
    everything = {case.split()[0] for case in CASES} - VARIANTS
    rules = everything if extent == "all" else CORE if (address, extent) == ("scattered", "some") else FEW
    return [case for case in CASES if case.split()[0] in rules and WITH_MEANS.get(case) != {}]


ZEROING = (
    ("scattered", "float32", {}),
    ("scattered", "float32", {"launches": 1}),
    ("scattered", "float32", {"track": "total"}),
    ("scattered", "float32", {"state_dtype": "8bit"}),
    ("flat", "bfloat16", {"state_dtype": "8bit"}),
)


def zeroing_cases(extent: str) -> tuple[tuple[str, str, dict], ...]:
    """(address, dtype, settings) of steps that leave zeros in place of gradients: by default none with norms, and those
    with 8-bit states in flat buffers alone; for another Triton two in all."""
    return {"all": ZEROING, "some": (*ZEROING[:2], ZEROING[4]), "core": ZEROING[::4]}[extent]


def units_dtypes(extent: str) -> list[str]:
    """Those with which adaptive clipping is compiled."""
    return ["float32", "bfloat16"] if extent == "all" else ["float32"]


def counted_dtypes(extent: str) -> list[str]:
    """Those of which instructions are counted."""
    return ["float32", "mixed", "bfloat16"] if extent == "all" else ["float32"]
