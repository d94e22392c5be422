"""Cross-attention of a decoder to its source: keys and values that are computed once, and rows that share a source.

Shapes: B rows, N sources, T time, S source time, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.nn.attention import cache

SourceKV = Callable[[Any], tuple[Any, Any]]
"""A function from the weights of a decoder layer to the keys and values of the source, [N, S, H, K] each."""


def group_rows_by_source(x: jax.Array, sources: int) -> jax.Array:
    """``x`` [B, T, ...] reshaped to [N, B / N * T, ...], where ``sources`` is N: one row per source.

    Row b of ``x`` has source ``b // (B / N)``. In beam search, the rows of a source are its hypotheses. With the new
    shape, attention reads the keys of a source once for all rows of the source.
    """
    return x.reshape(sources, -1, *x.shape[2:])


def project_source(project: SourceKV, layers: Any) -> Any:
    """The keys and values of the source for all layers, to be stored in the decode state.

    The result is a tuple with one dict per layer, whose arrays ``key`` and ``value`` are [N, S, H * K]. For L stacked
    layers, it is one dict, whose arrays are [L, N, S, H * K].

    Args:
        project: projects the encoded source with the weights of a layer.
        layers: the weights of all layers, stacked or as a tuple with one tree per layer (``spec.layers``).
    """

    def layer_kv(weights: Any) -> dict[str, jax.Array]:
        return {name: x.reshape(*x.shape[:2], -1) for name, x in zip(("key", "value"), project(weights), strict=True)}

    return tuple(map(layer_kv, layers)) if isinstance(layers, tuple) else jax.lax.map(layer_kv, layers)


def with_source_kv(layers: Any, source_kv: Any, num_heads: int) -> tuple[Any, SourceKV]:
    """The weights of the decoder layers, and a function from the weights of one layer to the layer's keys and values.

    The returned weights have one more entry per layer. For layers in a tuple, it is ``source_kv``, the keys and values
    of the layer. For stacked layers, it is ``index``, the index of the layer. With the index, a layer reads its slice
    of the stack in place. A scan over the stack would copy the slice.

    Args:
        layers: the weights of all layers, as in :func:`project_source`.
        source_kv: the keys and values from :func:`project_source`.
        num_heads: H, the number of heads of the keys and values.

    Raises:
        ValueError: ``layers`` and ``source_kv`` have different layouts or numbers of layers.
    """
    spec.check_state_layers(layers, source_kv)
    if isinstance(layers, tuple):
        layers = tuple({**layer, "source_kv": kv} for layer, kv in zip(layers, source_kv, strict=True))
        return layers, lambda weights: cache.split_heads(weights["source_kv"], num_heads)

    def read_in_place(weights: Any) -> tuple[Any, Any]:
        views = jax.tree.map(lambda stack: cache.CacheView(stack, weights["index"]), source_kv)
        return cache.split_heads(views, num_heads)

    return {**layers, "index": jnp.arange(spec.num_layers(source_kv))}, read_in_place
