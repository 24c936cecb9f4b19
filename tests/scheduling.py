"""In which order, and on which worker of pytest-xdist, the tests run."""

from collections import Counter

from xdist.scheduler import LoadFileScheduling

RANKS = "distributed/test_"
ALONE = "test_demo_distributed.py"
"""Starts its ranks by itself."""

FIRST = (
    ALONE,
    RANKS,
    "test_ptx.py",
    "test_compile.py",
    "test_bench.py",
    "test_ahead.py",
    "test_compile_forms.py",
    "test_custom_rules.py",
    "test_bench_host.py",
    "test_graphs.py",
    "test_random_use.py",
    "test_demo_input.py",
    "test_launch.py",
    "test_emulated.py",
    "test_bench_report.py",
    "test_convergence.py",
    "test_demo.py",
    "test_adaptive_clip.py",
    "test_torch_compile.py",
)
"""Few tests that take long, since they start processes, train or take many steps: these begin first, so that no worker
is left alone with one of them. The machine of ptx/ keeps books of all tensors that there are, and later these are many.
"""


class Scheduling(LoadFileScheduling):
    """File by file, in the order of the tests. But all tests on several ranks go to one worker: whoever runs one of
    them starts the processes, and these run them all (``distributed/ranks.py``)."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        return RANKS if RANKS in file and ALONE not in file else file


def order(items):
    """What takes longest per file first, as far as the number of its tests tells; in place."""
    counts = Counter(item.path for item in items)

    def key(item):
        place = str(item.path)
        first = next((k for k, name in enumerate(FIRST) if name in place), len(FIRST))
        return first, -counts[item.path], place

    items.sort(key=key)
