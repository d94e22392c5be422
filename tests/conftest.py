"""A strict session: eight virtual devices, silent broadcasting of ranks and warnings are errors (see pyproject)."""

import gc
import os
from pathlib import Path

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
DEFAULTS = {
    "xla_force_host_platform_device_count": "8",
    # Most of a test's time is the compiler's. Without LLVM's optimisations a test takes half as long.
    "xla_backend_optimization_level": "0",
    "xla_cpu_parallel_codegen_split_count": "1",  # two processes share the cores already
}
if jaxlib.version.__version_info__ < (0, 11):
    # Its older way from fused operations to LLVM compiles four times as fast. Later versions have only the new one, and
    # refuse a flag that they do not know.
    DEFAULTS["xla_cpu_use_fusion_emitters"] = "false"
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([flags, *(f"--{name}={v}" for name, v in DEFAULTS.items() if name not in flags)])

import jax  # noqa: E402 (reads the environment)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

MAPS = Path("/proc/self/maps")
MAX_MAPS = Path("/proc/sys/vm/max_map_count")
EVERY = 20
_finished = 0


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests for ``--dist loadgroup``: one process runs all tests of a group and compiles its models once.

    A group is a module; in the contract, the tests of one family.
    """
    for item in items:
        group = item.nodeid.split("::")[0]
        if group.endswith("test_contract.py"):
            group += str(item.callspec.params.get("name", "")) if hasattr(item, "callspec") else ""
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_teardown() -> None:
    """Forget compiled programs before there are too many: each maps pieces of memory, of which Linux allows a process
    65,530, and the compiler crashes at the next one."""
    global _finished
    _finished += 1
    if _finished % EVERY == 0 and MAPS.exists() and MAX_MAPS.exists():
        with MAPS.open("rb") as lines:
            count = sum(1 for _ in lines)
        if count > int(MAX_MAPS.read_text()) // 2:
            jax.clear_caches()
            gc.collect()
