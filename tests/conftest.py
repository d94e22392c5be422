"""Pytest settings: eight virtual CPU devices; rank promotion is an error (pyproject.toml makes warnings errors)."""

import collections
import gc
import os
import signal
from pathlib import Path

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_DEFAULTS = {
    "xla_force_host_platform_device_count": "8",
    # Tests spend most of their time compiling. Without LLVM optimizations they take half as long.
    "xla_backend_optimization_level": "0",
    "xla_cpu_parallel_codegen_split_count": "1",  # two pytest processes already use all cores
}
if jaxlib.version.__version_info__ < (0, 11):
    # The older fusion emitters compile four times as fast. Later versions do not have them and reject unknown flags.
    XLA_DEFAULTS["xla_cpu_use_fusion_emitters"] = "false"
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([flags, *(f"--{name}={v}" for name, v in XLA_DEFAULTS.items() if name not in flags)])

import jax  # noqa: E402 (reads the environment)
import pytest  # noqa: E402

pytest.register_assert_rewrite("jaxlm.testing")  # shows the values of failed assertions

jax.config.update("jax_numpy_rank_promotion", "raise")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts background processes this way. Tests send SIGINT to processes that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

MAPS = Path("/proc/self/maps")
MAX_MAPS = Path("/proc/sys/vm/max_map_count")
CHECK_INTERVAL = 20
_finished = 0


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for ``--dist loadgroup``: one process runs all tests of a group and compiles its models once.

    A group is a module. In test_contract.py, a group is the tests of one variant. A live test is its own group: such
    tests share few models, and a long module would keep one process busy while the other one has no tests left.
    Contract tests that apply to no variant of a module are removed. Of tests with the mark ``plain_cases``, all but
    some cases get the mark ``thorough``.
    """
    items[:] = [item for item in items if not _has_no_parameters(item)]
    _mark_thorough_cases(items)
    for item in items:
        group = item.nodeid.split("::")[0]
        if group.endswith("test_contract.py"):
            group += str(item.callspec.params.get("name", "")) if hasattr(item, "callspec") else ""
        elif item.get_closest_marker("live"):
            group = item.nodeid
        item.add_marker(pytest.mark.xdist_group(group))


def _mark_thorough_cases(items: list[pytest.Item]) -> None:
    """Mark the cases that plain ``pytest`` does not run: see the mark ``plain_cases`` in pyproject.toml."""
    cases_of_test = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("plain_cases") and not item.get_closest_marker("thorough"):
            cases_of_test[item.nodeid.split("[")[0]].append(item)
    for cases in cases_of_test.values():
        mark = cases[0].get_closest_marker("plain_cases")
        if "name" in mark.kwargs:
            plain = [item for item in cases if item.callspec.params["name"] in mark.kwargs["name"]]
        else:
            count = min(mark.args[0], len(cases))
            plain = [cases[i * len(cases) // count] for i in range(count)]
        for item in cases:
            if item not in plain:
                item.add_marker("thorough")


def _has_no_parameters(item: pytest.Item) -> bool:
    """Whether the set of parameters of a test is empty; pytest would skip it."""
    return any("empty parameter set" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skip"))


def pytest_runtest_teardown() -> None:
    """Clear JAX's caches before the process has too many memory maps.

    Each compiled program adds memory maps. Linux allows 65,530 per process, and the compiler crashes above this limit.
    """
    global _finished
    _finished += 1
    if _finished % CHECK_INTERVAL == 0 and MAPS.exists() and MAX_MAPS.exists():
        with MAPS.open("rb") as lines:
            count = sum(1 for _ in lines)
        if count > int(MAX_MAPS.read_text()) // 2:
            jax.clear_caches()
            gc.collect()
