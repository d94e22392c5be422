"""A strict session: eight virtual devices, silent broadcasting of ranks and warnings are errors (see pyproject)."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    flags += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in flags:
    # Nearly all of a test's time is LLVM's: without its optimisations a test takes half as long.
    flags += " --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = flags

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
