"""The loop that decodes token by token, and the parameters and the model state in this loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm import spec
from jaxlm.models import Model
from jaxlm.models.registry import FAMILIES
from jaxlm.nn import choices
from jaxlm.nn.attention import memory
from jaxlm.nn.convolution import weight_norm
from jaxlm.spec import ArraySpec, State

MAX_ADDED_TOKENS = 128
"""Maximum number of tokens that a memory in the decoding layout reads before it is converted. More tokens need more
space, and the conversion takes about as long as a few tokens."""

Progress = TypeVar("Progress")


def loop_params(model: Model, params: Any) -> Any:
    """The parameters for a loop that reads one token per step. What depends only on parameters is computed once.

    The results of the model do not change. The parameters of families outside this package are returned unchanged.

    - Weights with weight normalization (``jaxlm.nn.convolution.weight_norm``) are normalized, in the compute dtype.
    - Half-precision parameters of norms and other half-precision vectors become float32. Otherwise, XLA on a TPU
      converts each vector in every step, with a separate operation that takes as long as normalizing a few tokens. Two
      kinds of parameters are not converted: vectors beside a ``weight`` (biases), and vectors in stacked layers that
      are not parameters of norms. The families compute norms in float32 and cast other vectors at their use.

    Args:
        params: arrays, or their specs.
    """
    # An object with the methods of a model need not have a family.
    return _convert(params, model.config.dtype) if getattr(model, "family", None) in FAMILIES else params


def _convert(tree: Any, dtype: DTypeLike) -> Any:
    if isinstance(tree, tuple):
        return tuple(_convert(x, dtype) for x in tree)
    if not isinstance(tree, Mapping):
        return tree
    if "direction" in tree and "gain" in tree:
        tree = _with_weight(dict(tree), dtype)
    is_norm, has_weight = "scale" in tree or "scale_minus_one" in tree, "weight" in tree

    def convert(name: str, x: Any) -> Any:
        if isinstance(x, tuple | Mapping):
            return _convert(x, dtype)
        is_vector = (is_norm and name in ("scale", "scale_minus_one", "bias")) or (len(x.shape) == 1 and not has_weight)
        is_half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        return _cast(x, jnp.float32) if is_vector and is_half else x

    return {name: convert(name, x) for name, x in tree.items()}


def _with_weight(params: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """``params`` with the normalized ``weight`` in ``dtype`` instead of ``direction`` and ``gain``."""
    direction, gain = params["direction"], params["gain"]
    if isinstance(direction, ArraySpec):
        others = {name: leaf for name, leaf in params.items() if name not in ("direction", "gain")}
        return {"weight": _cast(direction, dtype), **others}
    normalized = weight_norm(params, num_input_axes=len(direction.shape) - len(gain.shape))
    return {**normalized, "weight": normalized["weight"].astype(dtype)}


def _cast(x: Any, dtype: DTypeLike) -> Any:
    return dataclasses.replace(x, dtype=dtype) if isinstance(x, ArraySpec) else x.astype(dtype)


def loop_state_specs(model: Model, specs: spec.Tree, max_steps: int) -> Any:
    """The specs of the model state inside :func:`decoding_loop`.

    Args:
        specs: the specs of the state outside the loop.
    """
    if not _uses_decoding_layout(model):
        return specs
    return memory.decoding_specs(specs, _num_added_slots(specs["segment_ids"].shape[1], max_steps))


def decoding_loop(
    model: Model,
    specs: spec.Tree,
    unfinished: Callable[[Progress], jax.Array],
    read_next: Callable[[Progress, spec.Tree], Progress],
    progress: Progress,
    *,
    max_steps: int,
) -> Progress:
    """The result of ``while unfinished(progress): progress = read_next(progress, specs)``.

    On an accelerator, the memory of Transformer-XL and XLNet has the decoding layout inside the loop
    (``jaxlm.nn.attention.memory``), so that a step does not copy the memory. ``read_next`` gets the specs of the state
    in the loop.

    Args:
        specs: specs with the axes of the state outside the loop. The sizes of the axes may differ.
        progress: a dataclass with the model state in the field ``state``.
        max_steps: maximum number of steps.
    """
    if not _uses_decoding_layout(model):
        return jax.lax.while_loop(unfinished, lambda progress: read_next(progress, specs), progress)
    state: State = progress.state  # type: ignore[attr-defined]
    num_added = _num_added_slots(state["segment_ids"].shape[1], max_steps)
    loop_specs = memory.decoding_specs(specs, num_added)

    def run_block(progress: Any) -> Any:
        state = memory.to_decoding_layout(specs, progress.state, num_added)
        progress, _ = jax.lax.while_loop(
            lambda carry: (carry[1] < num_added) & unfinished(carry[0]),
            lambda carry: (read_next(carry[0], loop_specs), carry[1] + 1),
            (dataclasses.replace(progress, state=state), 0),
        )
        return dataclasses.replace(progress, state=memory.from_decoding_layout(specs, progress.state, num_added))

    return jax.lax.while_loop(unfinished, run_block, progress)


def _uses_decoding_layout(model: Model) -> bool:
    # An object with the methods of a model need not have a module.
    has_memory = getattr(getattr(model, "module", None), "HAS_MEMORY_STATE", False)
    return has_memory and choices.memory_decoding_layout()


def _num_added_slots(slots: int, max_steps: int) -> int:
    """The number of slots that the decoding layout adds to a memory of ``slots`` slots.

    The sum is a multiple of 16, because a TPU stores bfloat16 arrays in tiles of 16 rows.
    """
    steps = min(max_steps, MAX_ADDED_TOKENS)
    return steps + -(slots + steps) % 16
