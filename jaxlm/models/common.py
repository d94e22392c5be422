"""What families share: checks of configs and inputs, and the loop over layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxlm import sharding, spec
from jaxlm.nn import cache
from jaxlm.nn.kernels import blockwise_attention

ComputeDtype = Literal["float32", "bfloat16", "float16"]
Remat = Literal["none", "dots", "full"]


def check_positive(cfg: Any, *names: str) -> None:
    """Raise ``ValueError`` unless every named field is at least 1."""
    for name in names:
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} must be at least 1")


def check_rates(cfg: Any, *names: str) -> None:
    """Raise ``ValueError`` unless every named field is a dropout rate in [0, 1)."""
    for name in names:
        if not 0.0 <= getattr(cfg, name) < 1.0:
            raise ValueError(f"{name}={getattr(cfg, name)} must be in [0, 1)")


def check_choices(cfg: Any, **choices: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` unless every named field is one of its choices."""
    for name, allowed in choices.items():
        if getattr(cfg, name) not in allowed:
            raise ValueError(f"{name}={getattr(cfg, name)!r} is unknown: choose from {', '.join(map(repr, allowed))}")


def check_tokens(
    tokens: Any, segment_ids: Any, positions: Any, max_positions: int | None, *, what: str = "tokens"
) -> None:
    """Raise unless the inputs of ``apply`` are integer arrays [B, T] of one shape, within the longest sequence.

    ``what``: how messages call them; the segments of a ``source`` are its ``source_segment_ids``.
    """
    segments = "segment_ids" if what == "tokens" else f"{what}_segment_ids"
    for name, x in ((what, tokens), (segments, segment_ids), ("positions", positions)):
        if x is None:
            continue
        if jnp.ndim(x) != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers of shape [batch, time], got {x.dtype}{list(jnp.shape(x))}")
        if x.shape != tokens.shape:
            raise ValueError(f"{name} {list(x.shape)} must have the shape of {what} {list(tokens.shape)}")
    # Packed rows (segments) and given positions may be longer than any single document.
    if max_positions is not None and segment_ids is None and positions is None and tokens.shape[1] > max_positions:
        raise ValueError(
            f"{tokens.shape[1]} tokens exceed max_positions={max_positions}: shorten them or enlarge the model"
        )


def check_source(tokens: jax.Array, source: Any, source_segment_ids: Any, state: Any) -> None:
    """Raise unless an encoder-decoder is given a source to read, or a state that has read one."""
    if (source is None) == (state is None):
        got = "neither" if source is None else "both"
        raise ValueError(f"apply takes source (to train) or state (to decode, from start), got {got}")
    if source is None:
        if source_segment_ids is not None:
            raise ValueError("source_segment_ids belong to start where a state is given: the state has them")
    elif source.shape[0] != tokens.shape[0]:
        raise ValueError(f"source {list(source.shape)} must have as many rows as tokens {list(tokens.shape)}")


def segments_of(ids: jax.Array, segment_ids: Any) -> jax.Array:
    """Segments that are not given are document 1 throughout, [B, T] int32."""
    # ones_like and not ones: split over devices as the ids are.
    return jnp.ones_like(ids, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)


def layers_apart(tree: Any) -> Any:
    """Parameters, what a model carries, or a ``TrainState``, for many steps: on a CPU each layer by itself, elsewhere
    as they are.

    The layers are copied once (``spec.unstack``); ``spec.restack`` undoes it.
    """
    return spec.unstack(tree) if sharding.platform() == "cpu" and sharding.active() is None else tree


def scan_layers(
    block: Callable[[jax.Array, Any], tuple[jax.Array, Any]],
    x: jax.Array,
    weights: Any,
    state: Any,
    key: jax.Array | None,
    *,
    count: int,
    remat: Remat,
    unroll: bool,
    in_place: bool = False,
) -> tuple[jax.Array, Any]:
    """``x, state[i] = block(x, (weights[i], state[i], key[i]))`` over the leading ``layers`` axis of all three.

    ``state`` and ``key`` may be None. Layer i's key is ``key`` folded with i. ``weights`` may also be a tuple of
    the layers' trees (``spec.unstack``), which unrolls the loop whatever ``unroll`` says; and so may ``state`` then.
    ``in_place``: the block gets ``cache.Slots`` for what is stacked in ``state[i]`` and gives them back, and nothing of
    the state is copied.

    Raises:
        ValueError: a state with layers apart for weights that are stacked.
    """
    apart = isinstance(state, tuple)
    if apart and not isinstance(weights, tuple):
        raise ValueError("the state has its layers apart, and the parameters have not: take both or neither apart")
    # In an unrolled loop, what is recomputed would be merged with what was computed before. A CPU's compiler may do so:
    # it puts an unrolled loop in an order of its own, and recomputing saves no memory there (docs/labbook.md).
    prevent_cse = (unroll or isinstance(weights, tuple)) and sharding.platform() != "cpu"
    if remat == "full":
        block = jax.checkpoint(block, prevent_cse=prevent_cse)
    elif remat == "dots":
        policies = jax.checkpoint_policies
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(blockwise_attention.SAVED)
        )
        block = jax.checkpoint(block, policy=policy, prevent_cse=prevent_cse)
    keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))

    def one(carry: Any, layer: Any) -> tuple[Any, None]:
        """A layer of a state that is carried whole."""
        x, state = carry
        own, index, layer_key = layer
        x, new = block(x, (own, cache.layer(state, index), layer_key))
        return (x, jax.tree.map(lambda _, n: n.all, state, new)), None

    if isinstance(weights, tuple):
        numbered = [(own, i, None if keys is None else keys[i]) for i, own in enumerate(weights)]
        if in_place and not apart:
            return functools.reduce(lambda carry, layer: one(carry, layer)[0], numbered, (x, state))
        made = []
        for own, i, layer_key in numbered:
            old = state[i] if apart else jax.tree.map(lambda s: s[i], state)  # noqa: B023 (called at once)
            x, new = block(x, (own, old, layer_key))
            made.append(new)
        if apart:
            return x, tuple(made)
        return x, jax.tree.map(lambda *new: jnp.stack(new), *made)  # once: each write into the stack would copy it
    loop = functools.partial(jax.lax.scan, length=count, unroll=count if unroll else 1)
    if in_place:
        return loop(one, (x, state), (weights, jnp.arange(count), keys))[0]
    return loop(block, x, (weights, state, keys))
