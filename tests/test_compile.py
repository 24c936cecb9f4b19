"""What the compiler makes of the kernels, for five GPUs, without one.

Rules x addresses x dtypes, exactly as the optimizers launch them (tests/aot.py), with the installed Triton and, where
FUSEDOPT_OLD_TRITON names a folder with another, with that one too. FUSEDOPT_COMPILE=all compiles every rule for every
GPU, which takes many minutes; see extents.py for what is left out otherwise.
"""

import collections
import re

import extents
import pytest
import triton
from compiling import EXTENT, LOAD, NVIDIA, STORE, TARGETS, TRITONS, compiled, count, extent
from rule_cases import ADDRESSES, declared_rules

WITH_MORE = extents.ONE_OF_EACH if EXTENT == "all" else extents.ONE_OF_EACH[:1]
"""The GPUs for which kernels that zero gradients, or clip them by units, are compiled."""

MAX_REGISTERS = {"float32": 64, "mixed": 80, "float64": 80, "bfloat16": 80}
"""Per thread. At 64 an SM holds 1024 threads, each with 16 bytes per tensor under way. Eight elements in float32 need
more where a rule has two or three states (maxnreg=64 spills); at 80 an SM still holds 768 threads, hence at least
16 * 4 * 768 = 49 KB under way, and 33 KB suffice to hide a microsecond at 4.3 TB/s. A program in float64 has 512
threads: at 80 one fits, with just those 33 KB; without, rules with three states would spill."""


MAX_REGISTERS_OF_MUCH = {"float32": 64, "mixed": 96, "float64": 80, "bfloat16": 96}
"""Where a stage after the rule still needs the gradient, where norms are taken, and for the rules of MUCH. At 96 an SM
holds 640 threads and 16 * 4 * 640 = 41 KB under way."""

MUCH = "step_adan", "step_adadelta", "step_rmsprop_centered_momentum"
"""Four states; 86 registers on sm_80; three states, and 82 registers on sm_90."""


@pytest.fixture(scope="module", params=TRITONS)
def report(request):
    """What the program says: facts by target, "launches" for the number of compiles, "triton" for its version."""
    dtypes = extents.DTYPES[extent(request.param)]
    # Last what finds its kernels in Triton's cache by then.
    jobs = [
        *(f"{target}:{dtype}" for target in TARGETS for dtype in dtypes[target]),
        *(f"{target}:{what}" for target in WITH_MORE for what in ("zeroed", "units")),
        "instructions",
        "launches",
    ]
    found = compiled(request.param, jobs) | {"extent": extent(request.param), "dtypes": dtypes}
    for target in TARGETS:
        found[target] = [kernel for dtype in dtypes[target] for kernel in found[f"{target}:{dtype}"]]
    return found


def steps(report, target, means=False):
    """The update kernels; with ``means`` those with a stage that needs one."""
    return [kernel for kernel in report[target] if kernel["name"].startswith("step_") and kernel["means"] == means]


def tracked(report, target):
    """The update kernels that take norms."""
    return [kernel for kernel in report[target] if kernel["name"].startswith("tracked_")]


def named(report, target, name):
    return [kernel for kernel in report[target] if kernel["name"] == name]


def times_tracked(report, target):
    """How often the kernel is compiled that takes norms."""
    dtypes = [dtype for dtype in report["dtypes"][target] if extents.is_tracked(target, dtype, report["extent"])]
    return sum(len(extents.compiled_addresses(target, dtype, report["extent"])) for dtype in dtypes)


def lengths_of_records(report, target, dtype):
    """How many there are of what the scattered address says of a tensor: one address more for each state."""
    rules = extents.compiled_rules(target, dtype, "scattered", report["extent"])
    return len({len(declared_rules()[rule].states) for rule in rules})


def label(kernel):
    return f"{kernel['name']} {kernel['address']} {kernel['dtype']}"


def test_the_other_triton_is_another(report, request):
    is_old = "old" in request.node.callspec.params.values()
    assert (report["triton"] != triton.__version__) == is_old


@pytest.mark.parametrize("target", TARGETS)
def test_every_case_is_compiled_once(target, report):
    """Two cases of one rule, such as momentum with and without Nesterov, share a kernel."""
    found = collections.Counter(map(label, steps(report, target)))
    places = [(dtype, address) for dtype in report["dtypes"][target] for address in ADDRESSES]
    rules = {place: extents.compiled_rules(target, *place, report["extent"]) for place in places}
    assert found == {f"step_{name} {a} {d}": 1 for (d, a), names in rules.items() for name in names}


@pytest.mark.parametrize("target", TARGETS)
def test_memory_is_accessed_16_bytes_at_a_time(target, report):
    """One load per tensor and one store per written tensor, for the vectors; mixed dtypes share one layout, in which
    the narrower ones move 8 bytes, twice for each thread. Rows, tables and remainders are scalar."""
    kernels = tracked(report, target)
    assert len(kernels) == times_tracked(report, target)
    for kernel in steps(report, target) + steps(report, target, means=True) + kernels:
        states = len(declared_rules()[re.sub("^(step|tracked)_", "", kernel["name"])].keys)
        mixed = kernel["dtype"] == "mixed" and states > 0
        loads, stores = (2 * states, 2 * states) if mixed else (states + 2, states + 1)
        if target in NVIDIA:
            wide = "v2.b64" if kernel["dtype"] == "float64" else "v4.b32"
            load, store = rf"{LOAD}\.{wide}", rf"{STORE}\.{wide}"
            assert count(kernel, rf"{LOAD}\.v2\.b32") == 4 * mixed, label(kernel)
            assert count(kernel, rf"{STORE}\.v2\.b32") == 2 * mixed, label(kernel)
            assert count(kernel, load) == loads, label(kernel)
        else:
            load, store = (rf"(global|buffer)_{op}_dwordx4" for op in ("load", "store"))
            # AMD's compiler also joins loads of neighbouring numbers of the row.
            assert count(kernel, load) >= loads, label(kernel)
        assert count(kernel, store) == stores, label(kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_registers_suffice(target, report):
    for kernel in report[target]:
        # In the cooperative kernel ptxas may park an address or two, outside of the loops over elements.
        parked = 16 if kernel["name"].startswith("clipped_") and target in NVIDIA and not kernel["tracked"] else 0
        assert kernel["stack"] <= parked, f"{label(kernel)} spills"
        much = kernel["means"] or kernel["tracked"] or kernel["name"].startswith(MUCH)
        budget = (MAX_REGISTERS_OF_MUCH if much else MAX_REGISTERS)[kernel["dtype"]]
        if kernel["name"].startswith("clipped_"):
            # At 80 an NVIDIA multiprocessor holds three programs of 256 threads, at 128 two, and sm_75's never more; on
            # AMD one has them all.
            budget = (128 if kernel["tracked"] else 96 if target == "sm_75" else 80) if target in NVIDIA else 512
        elif kernel["name"] == "sum_of_squares" and target not in NVIDIA:
            budget = 128  # four waves on each of a multiprocessor's four units
        assert kernel["registers"] <= budget, f"{label(kernel)}: {kernel['registers']}"


@pytest.mark.parametrize("target", TARGETS)
def test_steps_exchange_nothing_between_threads(target, report):
    """Neither a reduction nor a change of layout between dtypes, which would go through shared memory."""
    for kernel in steps(report, target) + steps(report, target, means=True):
        assert kernel["shared"] == 0, label(kernel)
        assert count(kernel, r"bar\.sync|s_barrier|shfl.*") == 0, label(kernel)


@pytest.mark.parametrize("target", NVIDIA)
def test_arithmetic_is_ieee(target, report):
    """Division and root correctly rounded, no fused multiply-add but in the sums of norms: what the interpreter
    computes, bit for bit."""
    for kernel in report[target]:
        assert count(kernel, r"div\.full.*|.*\.approx.*|mad\..*f(32|64)|.*\.ftz.*") == 0, label(kernel)
        fused = count(kernel, "fma.*") + count(kernel, r"fma\.rn\.f32x2")
        # A thread's elements to three sums, or to two where the step is skipped; of the rest as many as it has sums.
        expected = 5 * kernel["per_thread"] + 3 * kernel["sums_per_thread"] if "per_thread" in kernel else 0
        assert fused == expected, label(kernel)
    rootless = ("step_sgd", "step_momentum", "step_adamax", "step_asgd", "step_rprop", "step_lion")
    for kernel in steps(report, target):
        if not kernel["name"].startswith(rootless):
            kind = "f64" if kernel["dtype"] == "float64" else "f32"
            assert count(kernel, rf"div\.rn\.{kind}") and count(kernel, rf"sqrt\.rn\.{kind}"), label(kernel)


@pytest.mark.parametrize("target", NVIDIA)
def test_min_and_max_propagate_nan(target, report):
    """A GPU's plain min and max drop it. These kernels clip values and factors, so each has some."""
    for kernel in steps(report, target) + named(report, target, "sum_of_squares"):
        assert count(kernel, r"(min|max)\.(NaN\.)?f(32|64)"), label(kernel)
        # sm_75 and float64 have no such instruction, and test for NaN beside each.
        plain = count(kernel, r"(min|max)\.f(32|64)")
        assert plain <= count(kernel, r"setp\.(nan|num)\.f(32|64)"), label(kernel)
        if target != "sm_75" and kernel["dtype"] != "float64" and kernel["name"].startswith("step_"):
            assert plain == 0, label(kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_norm_kernel(target, report):
    """Two 16-byte loads at a time; and the last program to finish sees what all others have stored."""
    dtypes = report["dtypes"][target]
    whole = {dtype for dtype in dtypes if extents.is_whole(target, dtype, report["extent"])}
    assert {kernel["dtype"] for kernel in named(report, target, "judge")} == whole
    kernels = named(report, target, "sum_of_squares")
    # With and without loss scale.
    assert len(kernels) >= sum(lengths_of_records(report, target, dtype) for dtype in dtypes) + len(whole)
    for kernel in kernels:
        if target in NVIDIA:
            assert count(kernel, r"ld\.global\.(v4\.b32|v2\.b64)") == 2, label(kernel)
            assert count(kernel, r"atom\.global\.gpu\.acq_rel\.add\.u32") == 1
            # Not from the first-level cache, which may hold older values.
            assert count(kernel, r"ld\.global\.cg\.v2\.b64") >= 1
            assert count(kernel, r"sqrt\.rn\.f64") == 1
        else:
            assert count(kernel, r"(global|buffer)_load_dwordx4") >= 1, label(kernel)
            # Write back before the ticket is taken, invalidate afterwards.
            assert (
                count(kernel, "buffer_wbl2") == count(kernel, "global_atomic_add") == count(kernel, "buffer_inv") == 1
            )


@pytest.mark.parametrize("target", TARGETS)
def test_cooperative_kernel(target, report):
    """What the barrier is made of, and memory accessed 16 bytes at a time in both phases."""
    kernels = [kernel for kernel in report[target] if kernel["name"].startswith("clipped_")]
    assert len(kernels) == sum(
        len(extents.compiled_at_once(target, dtype, report["extent"]))
        + extents.is_whole(target, dtype, report["extent"])  # once more with norms
        for dtype in report["dtypes"][target]
    )
    for kernel in kernels:
        states = len(declared_rules()[kernel["name"].removeprefix("clipped_")].states)
        mixed = kernel["dtype"] == "mixed"
        if target in NVIDIA:
            # Every program arrives with release, and waits by a load with acquire: not by a volatile one, behind which
            # the slots might be read from the first-level cache, and not by an atomic addition, which is slower.
            assert count(kernel, r"atom\.global\.gpu\.release\.add\.u32") == 1, label(kernel)
            assert count(kernel, r"ld\.global\.gpu\.acquire\.b32") == 1, label(kernel)
            assert count(kernel, r"atom\..*") == 1, label(kernel)
            assert count(kernel, r"ld\.global\.cg\.v2\.b64") >= 1, label(kernel)
            wide = "v2.b64" if kernel["dtype"] == "float64" else "v4.b32"
            assert count(kernel, rf"ld\.global\.{wide}") >= 1, label(kernel)
            assert count(kernel, rf"{LOAD}\.{wide}") == states + 2 * (not mixed), label(kernel)
            assert count(kernel, rf"{STORE}\.{wide}") == states + (not mixed), label(kernel)
        else:
            # Write back before arriving, invalidate behind every look.
            assert count(kernel, "buffer_wbl2") == count(kernel, "global_atomic_add") == 1, label(kernel)
            assert count(kernel, "buffer_inv") == 1, label(kernel)


@pytest.mark.parametrize("target", TARGETS)
def test_means_kernel(target, report):
    """16-byte loads of what the term depends on, and no store of it; a tensor's last program sees what its others
    stored."""
    kernels = [kernel for kernel in report[target] if kernel["name"].startswith("means_")]
    assert len(kernels) == sum(
        len(extents.compiled_means(target, dtype, address, report["extent"]))
        for dtype in report["dtypes"][target]
        for address in extents.compiled_addresses(target, dtype, report["extent"])
    )
    for kernel in kernels:
        # Whether u agrees with g depends on all states; the excess of Adam's g over v on v alone; LAMB's norms on both
        # states and the parameter.
        states, params = {"amsgrad": (3, 0), "adam limited": (1, 0), "adam adapted": (2, 1)}[kernel["case"]]
        loads = 2 * states if kernel["dtype"] == "mixed" else states + 1 + params
        if target in NVIDIA:
            wide = "v2.b64" if kernel["dtype"] == "float64" else "v4.b32"
            assert count(kernel, rf"{LOAD}\.{wide}") == loads, label(kernel)
            assert count(kernel, r"st\.global\..*\.v[24].*") == 0, label(kernel)
            assert count(kernel, r"atom\.global\.gpu\.acq_rel\.add\.u32") == 1
            # Not from the first-level cache, which may hold older values.
            assert count(kernel, r"ld\.global\.cg\.b64") >= 1
        else:
            assert count(kernel, r"(global|buffer)_load_dwordx4") >= loads, label(kernel)
            assert count(kernel, r"(global|buffer)_store_dwordx4") == 0, label(kernel)
            # Write back before the ticket is taken, invalidate afterwards.
            assert (
                count(kernel, "buffer_wbl2") == count(kernel, "global_atomic_add") == count(kernel, "buffer_inv") == 1
            )


@pytest.mark.parametrize("target", WITH_MORE)
def test_zeros_are_stored_in_vectors(target, report):
    """Another store of 16 bytes for every 16 bytes of gradients where a step leaves zeros in their place. None comes
    before all threads have read theirs, which need not be the same elements."""
    store = rf"{STORE}\.v4\.b32" if target in NVIDIA else r"(global|buffer)_store_dwordx4"
    pairs = collections.defaultdict(lambda: [None, None])
    for kernel in report[f"{target}:zeroed"]:
        pairs[kernel["name"], kernel["dtype"], kernel["quantizes"]][kernel["zeroes"]] = kernel
    more = {(f"{name}_adam", "float32", False): 1 for name in ("step", "clipped", "tracked")}
    more |= {("step_adam", "float32", True): 4, ("step_adam", "bfloat16", True): 2}
    assert pairs.keys() <= more.keys() and len(pairs) == len(extents.zeroing_cases(report["extent"]))
    for key, (without, zeroing) in pairs.items():
        assert count(zeroing, store) == count(without, store) + more[key], key
        registers = 176 if key[2] else 80 if key[0] == "clipped_adam" else 64
        assert zeroing["stack"] == 0 and zeroing["registers"] <= registers, key
        assert zeroing["unfenced"] == 0, key


@pytest.mark.parametrize("target", WITH_MORE)
def test_adaptive_clipping(target, report):
    """No spills, and a unit's last program sees what its others stored."""
    kernels = report[f"{target}:units"]
    for dtype in extents.units_dtypes(report["extent"]):
        found = {kernel["name"]: kernel for kernel in kernels if kernel["dtype"] == dtype}
        assert found.keys() == {"ratios_of_units", "sum_of_squares", "step_adam", "clipped_adam"}
        registers = {name: kernel["registers"] for name, kernel in found.items()}
        assert registers["step_adam"] <= MAX_REGISTERS[dtype], registers
        # A program has 128 threads and adds float64; clipped as in test_registers_suffice.
        assert registers["ratios_of_units"] <= 128 and registers["clipped_adam"] <= (80 if target in NVIDIA else 512)
        assert found["ratios_of_units"]["stack"] == found["step_adam"]["stack"] == 0
        ratios = found["ratios_of_units"]
        if target in NVIDIA:
            assert count(ratios, r"atom\..*") == count(ratios, r"atom\.global\.gpu\.acq_rel\.add\.u32") == 1
            # Not from the first-level cache, which may hold older values.
            assert count(ratios, r"ld\.global\.cg\..*") >= 2
        else:
            assert (
                count(ratios, "buffer_wbl2") == count(ratios, "global_atomic_add") == count(ratios, "buffer_inv") == 1
            )


def test_numbers_never_recompile(report):
    """30 steps in which every hyperparameter and step count changes, with three groups and then with one."""
    cases = [
        f"{case}, {address}" for address in ADDRESSES for case in extents.launched_cases(address, report["extent"])
    ]
    with_means = extents.compiled_means("sm_90", "float32", "scattered", report["extent"])
    assert len(report["launches"]) == len(cases) + len(with_means) + 3
    for case, compiles in report["launches"].items():
        rule, place = re.split("[ ,]", case)[0], case.split()[-1]
        if place == "once":
            assert compiles == {f"clipped_{rule}": 1}, case
            continue
        more = {"means": {f"means_{rule}": 1}, "units": {"ratios_of_units": 1}}.get(place, {})
        update = f"tracked_{rule}" if place == "tracked" else f"step_{rule}"
        assert compiles == {update: 1, "sum_of_squares": 1} | more, case


def test_averages_and_norms_are_cheap(report):
    """Both together add at most 12 instructions per element to a clipped step; the budgets are what is reached. Triton
    3.6 forms the cache policy of every load again."""
    assert list(report["instructions"]) == extents.counted_dtypes(report["extent"])
    for dtype, (plain, extended) in report["instructions"].items():
        assert plain < extended <= plain + (9.5 if report["triton"].startswith("3.6.") else 7.5), dtype
