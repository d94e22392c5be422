"""The scores of a tile of queries and keys, and their gradients, for the ``blockwise`` and ``pallas`` implementations.

Shapes as in ``jaxlm.nn.attention.api``; V width of values, R queries and E keys of a tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn.attention.bias import BiasFn, Tile
from jaxlm.nn.attention.mask import Mask, keep_pairs
from jaxlm.nn.linear import dot

CHECKPOINT_NAME = "attention"
"""Name (``jax.ad_checkpoint.checkpoint_name``) of the arrays that the forward pass saves for the backward pass."""


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """The static (trace-time) arguments of the scores: those of the mask, the scale, and the function of each bias."""

    causal: bool
    window: int | None
    scale: float
    bias_fns: tuple[BiasFn, ...]


def scores(
    config: ScoreConfig, q_RK: jax.Array, k_EK: jax.Array, bias_arrays: Any, bias_integers: Any, tile: Tile,
    visible_RE: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """The masked scores of a tile, [R, E] float32, with biases.

    Args:
        bias_arrays: for each bias, the slices of its float arrays that the tile needs (``slice_for_tile``).
        bias_integers: for each bias, its integer arrays or None.
        visible_RE: the mask of the tile (:func:`visible_keys`).
    """
    scores_RE = dot(q_RK, k_EK, (1, 1)) * config.scale
    for bias_fn, arrays, integers in zip(config.bias_fns, bias_arrays, bias_integers, strict=True):
        scores_RE = scores_RE + bias_fn(arrays, integers, tile)
    return scores_RE if visible_RE is None else jnp.where(visible_RE, scores_RE, -jnp.inf)


def visible_keys(config: ScoreConfig, mask_integers: Any, tile: Tile) -> jax.Array | None:
    """The mask of a tile, bool [R, E]: True where a query may attend to a key. None: nothing is masked.

    Args:
        mask_integers: the integers of the mask (``Mask.arrays``), without the axis of the batch.
    """
    query_order, key_order, query_segments, key_segments = mask_integers
    orders = tile.indices() if query_order is None else (tile.query_column(query_order), tile.key_row(key_order))
    segments = None if query_segments is None else (tile.query_column(query_segments), tile.key_row(key_segments))
    return keep_pairs(Mask(config.causal, config.window), orders, segments)


def qkv_gradients(
    config: ScoreConfig, q_RK: jax.Array, k_EK: jax.Array, v_EV: jax.Array, dout_RV: jax.Array, kept: jax.Array,
    dscores: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The gradients of a tile: dq [R, K], and the contributions to dk [K, E] and dv [V, E], all float32.

    The keys are the last axis of dk and dv. A matmul with a result [E, K] takes four times as long on a CPU, and would
    transpose the larger factor on a TPU.

    Args:
        kept: [R, E], the probabilities after dropout.
        dscores: [R, E], the gradient of the scores.
    """
    scaled = (dscores * config.scale).astype(q_RK.dtype)
    return dot(scaled, k_EK, (1, 0)), dot(q_RK, scaled, (0, 0)), dot(dout_RV, kept.astype(v_EV.dtype), (0, 0))


def bias_gradients(bias_fn: BiasFn, bias_arrays: Any, integers: Any, tile: Tile, dscores: jax.Array) -> Any:
    """The gradients of ``bias_arrays`` (the slices of one bias), from the gradient of the scores of the tile."""
    return jax.vjp(lambda bias_arrays: bias_fn(bias_arrays, integers, tile), bias_arrays)[1](dscores)[0]
