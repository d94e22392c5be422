"""Pytest settings: eight virtual CPU devices; rank promotion is an error (pyproject.toml makes warnings errors)."""

import collections
import gc
import os
import signal
from pathlib import Path
from typing import Any

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.pop("JAXLM_CHOICES", None)  # the tests use the defaults
XLA_DEFAULTS = {
    "xla_force_host_platform_device_count": "8",
    # Tests spend most of their time compiling. Without LLVM optimizations they take half as long.
    "xla_backend_optimization_level": "0",
    "xla_cpu_parallel_codegen_split_count": "1",  # two pytest processes already use all cores
}
if jaxlib.version.__version_info__ < (0, 11):
    # The older fusion emitters compile four times as fast. Later versions do not have them and reject unknown flags.
    XLA_DEFAULTS["xla_cpu_use_fusion_emitters"] = "false"
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # Give each process its own cores, if there are enough. If XLA's threads of two processes share cores, the tests
    # take 10 % longer.
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))[int(worker[2:]) % count :: count]
    if cores:
        os.sched_setaffinity(0, cores)
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([flags, *(f"--{name}={v}" for name, v in XLA_DEFAULTS.items() if name not in flags)])

import jax  # noqa: E402 (reads the environment)
import pytest  # noqa: E402

pytest.register_assert_rewrite("jaxlm.testing")  # shows the values of failed assertions

jax.config.update("jax_numpy_rank_promotion", "raise")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell without job control starts background processes with SIGINT ignored. Some tests send SIGINT to processes
    # that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

MAPS = Path("/proc/self/maps")
MAX_MAPS = Path("/proc/sys/vm/max_map_count")
CHECK_INTERVAL = 10
_finished = 0


@pytest.hookimpl(tryfirst=True)  # before the selection by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Remove contract tests that apply to no variant of a module, and mark thorough cases.

    If a test has the mark ``plain_cases(count)``, all of its cases except ``count`` get the mark ``thorough``.
    """
    items[:] = [item for item in items if not _has_no_parameters(item)]
    _mark_thorough_cases(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A scheduler for ``--dist loadscope``: one process runs all tests of a group and compiles its models once.

    A group is a module. In test_contract.py, a group is the tests of one variant. In ``*_live.py``, each test is a
    group: such tests share few models, and a long module would keep one process busy while the other one has no tests
    left. The groups depend only on the names of tests, because pytest 9.2 ignores the marks ``xdist_group``.
    """
    from xdist.scheduler import LoadScopeScheduling

    from jaxlm.models.registry import variant_names

    variants = variant_names()

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module, _, name = nodeid.partition("::")
            if module.endswith("_live.py"):
                return nodeid
            if module.endswith("test_contract.py"):
                parameters = name.partition("[")[2]
                return max((v for v in variants if parameters.startswith(v)), key=len, default=module)
            return module

    return Scheduler(config, log) if config.getvalue("dist") == "loadscope" else None


PLAIN_VARIANTS = ("gpt2-tiny", "t5-tiny", "mamba2-tiny")
"""A decoder, an encoder-decoder and a recurrence."""

SLOW_CONTRACT_TESTS = {
    **dict.fromkeys(
        (
            "test_every_dropout_rate_acts_only_with_a_key",
            "test_bfloat16_parameters_give_the_same_results_as_the_same_values_in_float32",
            "test_each_position_depends_on_exactly_the_visible_positions",
            "test_padding_does_not_change_the_other_positions",
            "test_packed_documents_equal_separate_documents",
            "test_a_segment_id_that_occurs_again_starts_a_document",
            "test_cached_equals_full_at_every_position",
            "test_rows_of_unequal_length_decode_independently",
            "test_a_token_id_outside_the_vocabulary_gives_nan",
            "test_stacked_and_per_layer_models_agree",
            "test_take_and_reset_act_on_single_rows_of_a_state",
            "test_decoding_steps_compile_once",
            "test_loss_falls_in_twenty_steps_without_recompiling",
            "test_sharded_step_with_stacked_layers_equals_single_device_step",
            "test_an_empty_batch_gives_empty_results_and_zero_gradients",
        ),
        PLAIN_VARIANTS,
    ),
    # The step of T5 on a mesh and with stacked layers: test_sharded_step_with_stacked_layers_equals_single_device_step.
    "test_sharded_step_equals_single_device_step": ("gpt2-tiny", "mamba2-tiny"),
    # The stacked layers of T5: test_stacked_and_per_layer_models_agree. T5 on a mesh: see above.
    "test_stacked_and_per_layer_states_agree": ("gpt2-tiny", "mamba2-tiny"),
    "test_runs_under_an_explicit_mesh_and_in_shard_map": ("gpt2-tiny", "mamba2-tiny"),
    # T5 has the caches and the attention of GPT-2.
    "test_bfloat16_is_finite_and_near_float32": ("gpt2-tiny", "mamba2-tiny"),
    "test_a_prefix_branches_and_each_branch_rolls_back": ("gpt2-tiny", "mamba2-tiny"),
    # Code that all families share.
    "test_initial_values_depend_only_on_path_and_layer": ("gpt2-tiny",),
    "test_stacked_and_per_layer_training_steps_agree": ("gpt2-tiny",),
    "test_pmap_and_shard_map_steps_equal_single_device_step": ("gpt2-tiny",),
    "test_restored_state_is_bitwise_equal": ("gpt2-tiny", "mamba2-tiny", "resnet-tiny"),
    "test_jit_and_eager_results_agree": ("gpt2-tiny",),
    "test_remat_and_attention_implementation_do_not_change_loss_and_gradients": ("gpt2-tiny",),
}
"""Slow contract tests, and the variants for which plain pytest runs them."""


def _mark_thorough_cases(items: list[pytest.Item]) -> None:
    """Mark the cases that plain ``pytest`` does not run: see the mark ``plain_cases`` in pyproject.toml."""
    cases_of_test = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("thorough"):
            continue
        name = getattr(item, "originalname", item.name)
        if name in SLOW_CONTRACT_TESTS:
            if item.callspec.params["name"] not in SLOW_CONTRACT_TESTS[name]:
                item.add_marker("thorough")
        elif item.get_closest_marker("plain_cases"):
            cases_of_test[item.nodeid.split("[")[0]].append(item)
    for cases in cases_of_test.values():
        (count,) = cases[0].get_closest_marker("plain_cases").args
        for item in set(cases) - set(_choose_varied_cases(cases, count)):
            item.add_marker("thorough")


def _choose_varied_cases(cases: list[pytest.Item], count: int) -> list[pytest.Item]:
    """``count`` of the cases, which together have many different values of the parameters.

    The last case is chosen first, because it is rarely trivial. Each further choice is the case that adds the most
    values.
    """
    values = {case: {(name, repr(value)) for name, value in case.callspec.params.items()} for case in cases}
    chosen, seen = [], set()
    for _ in range(min(count, len(cases))):
        best = max((case for case in reversed(cases) if case not in chosen), key=lambda case: len(values[case] - seen))
        chosen.append(best)
        seen |= values[best]
    return chosen


def _has_no_parameters(item: pytest.Item) -> bool:
    """Whether the set of parameters of a test is empty. pytest would skip such a test."""
    return any("empty parameter set" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skip"))


def pytest_collection_finish() -> None:
    """Collect garbage rarely, and never look at the objects of the imported modules: this saves 8 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 20)


def pytest_runtest_teardown() -> None:
    """Clear JAX's caches before the process has too many memory maps.

    Each compiled program adds memory maps. Linux allows 65,530 per process, and the compiler crashes above this limit.
    The tests of one process stay below four fifths of it, if two processes share the plain tests. Clearing the caches
    takes ten seconds, and later tests compile their programs again.
    """
    global _finished
    _finished += 1
    if _finished % CHECK_INTERVAL == 0 and MAPS.exists() and MAX_MAPS.exists():
        with MAPS.open("rb") as lines:
            count = sum(1 for _ in lines)
        if count > int(MAX_MAPS.read_text()) * 4 // 5:
            jax.clear_caches()
            gc.collect()
