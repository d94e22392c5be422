"""Pallas, imported at its first use because the import takes half a second, and functions that TPU kernels share."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

INTERPRET = False
"""Whether the kernels run in Pallas's interpreter, which works on any device. Tests set this to True."""

OLD_TPUS = ("TPU v2", "TPU v3", "TPU v4")
"""Prefixes of the device kinds of TPUs before v5, which some kernels do not support."""


class _Lazy:
    """A module that is imported when one of its attributes is read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


pl, pltpu = _Lazy("jax.experimental.pallas"), _Lazy("jax.experimental.pallas.tpu")


def call_with_carry(
    kernel: Callable[..., None], name: str, grid: tuple[int, int, int], carry_shape: tuple[int, ...],
    in_specs: Sequence[Any], **arguments: Any,
) -> Callable[..., Any]:  # fmt: skip
    """A function that runs the kernel on the grid. It gets the input arrays and returns the outputs.

    The last argument of the kernel is the carry, a float32 array in VMEM. It keeps its value from one step of the last
    axis of the grid to the next step. The last input is the carry before the first of these steps. The last output is
    the carry after the last step. The other arguments of the kernel are the other inputs and the other outputs.

    Args:
        in_specs: the block specs of the inputs.
        arguments: further arguments of ``pl.pallas_call``, such as ``out_specs`` and ``out_shape``.
    """

    def run_step(*references: Any) -> None:
        *arrays, last, carry = references
        first = arrays.pop(len(in_specs) - 1)

        @pl.when(pl.program_id(2) == 0)
        def initialize() -> None:
            carry[...] = first[...]

        kernel(*arrays, carry)
        last[...] = carry[...]

    return pl.pallas_call(
        run_step, name=name, grid=grid, interpret=INTERPRET, scratch_shapes=[pltpu.VMEM(carry_shape, jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        in_specs=in_specs, **arguments,
    )  # fmt: skip


def with_reference(run: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``run``, which uses a kernel. Under ``vmap`` and in derivatives, it is ``reference``.

    Both functions have the same positional arguments, trees of arrays. JAX cannot differentiate most Pallas kernels,
    and the TPU compiler rejects many kernels under ``vmap``.
    """

    @jax.custom_batching.custom_vmap
    def run_with_vmap_rule(*arguments: Any) -> Any:
        return run(*arguments)

    @run_with_vmap_rule.def_vmap
    def vmap_rule(axis_size: int, is_mapped: Sequence[Any], *arguments: Any) -> tuple[Any, Any]:
        in_axes = jax.tree.map(lambda mapped: 0 if mapped else None, tuple(is_mapped))
        out = jax.vmap(reference, in_axes, axis_size=axis_size)(*arguments)
        return out, jax.tree.map(lambda _: True, out)

    @jax.custom_jvp
    def function(*arguments: Any) -> Any:
        return run_with_vmap_rule(*arguments)

    @function.defjvp
    def jvp_rule(primals: Any, tangents: Any) -> Any:
        return jax.jvp(reference, primals, tangents)

    return function


def shapes(*arrays: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shape and the dtype of each array, for ``out_shape`` of ``pl.pallas_call``."""
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


def largest_divisor(size: int, multiple: int, maximum: int) -> int:
    """The largest divisor of ``size`` that is a multiple of ``multiple`` and at most ``maximum``.

    ``size`` must be a multiple of ``multiple``.
    """
    return max(x for x in range(multiple, min(size, maximum) + 1, multiple) if size % x == 0)
