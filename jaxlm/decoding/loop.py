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
"""Maximum number of slots that the decoding layout adds to a memory, before rounding (:func:`_num_added_slots`). When
these slots are full, the loop converts the memory and continues. More slots would need more space, and a conversion
takes only about as long as a few tokens."""

Progress = TypeVar("Progress")


def loop_params(model: Model, params: Any) -> Any:
    """The parameters for a loop that reads one token per step. Values that depend only on parameters are computed once.

    The results of the model are the same, up to rounding. Families outside this package keep their parameters.

    - Weights with weight normalization (``jaxlm.nn.convolution.weight_norm``) are normalized and cast to the compute
      dtype.
    - Half-precision parameters of norms and other half-precision vectors become float32. Otherwise, XLA on a TPU
      converts each of them in every step, with a separate operation of about 1.8 k cycles. Results do not change,
      because the families compute norms in float32 and cast other vectors at their use. Two kinds of vectors are not
      converted: vectors in the same dict as a ``weight`` (biases), and vectors of stacked layers that are not
      parameters of norms.

    Args:
        params: arrays, or their specs.
    """
    # An object with the methods of a model need not have a family.
    return _convert_tree(params, model.config.dtype) if getattr(model, "family", None) in FAMILIES else params


def _convert_tree(tree: Any, dtype: DTypeLike) -> Any:
    """The result of :func:`loop_params` for a tree of parameters or specs; ``dtype`` is the compute dtype."""
    if isinstance(tree, tuple):
        return tuple(_convert_tree(x, dtype) for x in tree)
    if not isinstance(tree, Mapping):
        return tree
    if "direction" in tree and "gain" in tree:
        tree = _with_normalized_weight(dict(tree), dtype)
    is_norm, has_weight = "scale" in tree or "scale_minus_one" in tree, "weight" in tree

    def convert_entry(name: str, x: Any) -> Any:
        if isinstance(x, tuple | Mapping):
            return _convert_tree(x, dtype)
        is_vector = (is_norm and name in ("scale", "scale_minus_one", "bias")) or (len(x.shape) == 1 and not has_weight)
        is_half = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
        return _cast(x, jnp.float32) if is_vector and is_half else x

    return {name: convert_entry(name, x) for name, x in tree.items()}


def _with_normalized_weight(params: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """``params`` with the normalized ``weight`` in ``dtype`` instead of ``direction`` and ``gain``."""
    weight = direction = params["direction"]
    if not isinstance(direction, ArraySpec):
        weight = weight_norm(params, num_input_axes=direction.ndim - params["gain"].ndim)["weight"]
    others = {name: leaf for name, leaf in params.items() if name not in ("direction", "gain")}
    return {"weight": _cast(weight, dtype), **others}


def _cast(x: Any, dtype: DTypeLike) -> Any:
    return dataclasses.replace(x, dtype=dtype) if isinstance(x, ArraySpec) else x.astype(dtype)


def loop_state_specs(model: Model, specs: spec.Tree, max_steps: int) -> Any:
    """The specs of the model state inside :func:`decoding_loop`.

    Args:
        specs: the specs of the state outside the loop.
        max_steps: as in :func:`decoding_loop`.
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

    On an accelerator, the state of a family with ``HAS_MEMORY_STATE`` (Transformer-XL, XLNet) has the decoding layout
    inside the loop (``jaxlm.nn.attention.memory``), so that a step does not copy the memory. When the added slots are
    full, the loop converts the state to the usual layout and back.

    Args:
        specs: specs with the axes of the state outside the loop. The sizes of the axes may differ.
        unfinished: whether there is another step.
        read_next: one step. It gets specs with the axes of the state inside the loop.
        progress: a dataclass with the model state in the field ``state``.
        max_steps: maximum number of steps. A memory gets no more slots than these steps need, up to rounding.
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

    It is ``min(max_steps, MAX_ADDED_TOKENS)``, rounded up so that the memory then has a multiple of 16 slots. A TPU
    stores bfloat16 arrays in tiles of 16 rows.
    """
    num_tokens = min(max_steps, MAX_ADDED_TOKENS)
    return num_tokens + -(slots + num_tokens) % 16
