"""The cache of local attention: the keys and values of the last W tokens of each row, where W is the window.

The size of the cache does not depend on the length of the text. Token n of a row is in slot ``n % W``, so that a new
token replaces the token that leaves the window. Padding is not stored. The state of a model has two more arrays, which
all layers share:

    num_tokens      [B] number of tokens that each row has read, without padding
    document_start  [B] number of these tokens that are before the current document

Every array has an axis with the name ``batch``; beam search, state resets and shardings find the axis by this name.

Shapes: B batch, W window and number of slots, T new tokens, S = W + T keys, G heads, K head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from jaxlm.nn.attention import cache
from jaxlm.nn.attention.mask import Mask
from jaxlm.spec import ArraySpec, State


def token_count_specs(batch: int) -> dict[str, ArraySpec]:
    """Specs of ``num_tokens`` and ``document_start``, which all layers share."""
    return dict.fromkeys(("num_tokens", "document_start"), ArraySpec((batch,), ("batch",), dtype=jnp.int32))


def layer_specs(batch: int, window: int, heads: int, head_width: int, dtype: DTypeLike) -> dict[str, ArraySpec]:
    """Specs of the keys and values of one layer, each [B, W, G * K]."""
    return dict.fromkeys(
        ("key", "value"), ArraySpec((batch, window, heads * head_width), ("batch", None, None), dtype=dtype)
    )


@struct.dataclass
class Context:
    """The positions and the mask of the new tokens of a call, relative to the tokens in the cache.

    Attributes:
        positions: [1 or B, T], the position of each new token in its document.
        mask: which keys each new token may attend to. The keys are those of :func:`append_and_read`.
        slots: [B, T], the slot of each new token. The value W (one past the last slot) means that the token is not
            stored. None without a state.
    """

    positions: jax.Array
    mask: Mask
    slots: jax.Array | None


def make_context(
    tokens_BT: jax.Array, state: State | None, start_BT: jax.Array | None, keep_BT: jax.Array | None, window: int
) -> tuple[Context, Any]:
    """The :class:`Context` of new tokens, and the state with the new ``num_tokens`` and ``document_start``.

    Without a state, the second result is None.

    Args:
        state: a dict with ``num_tokens`` and ``document_start``; other entries are returned unchanged. None: no
            earlier tokens.
        start_BT: True at the first token of each document (``segment_boundaries`` with ``include_first=True``). None:
            each row is one document without padding; ``state`` must then be None too.
        keep_BT: False at padding. None has the meaning of ``start_BT=None``. Without a state, no padding may be between
            two tokens of a document, because the window would count it. To move the padding to the end of the rows,
            call ``jaxlm.nn.token_layout.move_padding_last`` first.
        window: W, the maximum number of tokens that a token attends to, itself included.

    Raises:
        ValueError: only one of ``start_BT`` and ``keep_BT`` is given, or a state is given without them.
    """
    B, T = tokens_BT.shape
    if start_BT is None or keep_BT is None:
        if state is not None or start_BT is not None or keep_BT is not None:
            missing = " and ".join(name for name, x in (("start_BT", start_BT), ("keep_BT", keep_BT)) if x is None)
            raise ValueError(
                f"{missing} must not be None{'' if state is None else ' with a state'}: pass the masks of "
                "segment_boundaries(..., include_first=True)"
            )
        return Context(jnp.arange(T, dtype=jnp.int32)[None], Mask(causal=True, window=window), None), None
    zeros_B = jnp.zeros_like(tokens_BT[:, 0], jnp.int32)
    before_B, document_B = (zeros_B, zeros_B) if state is None else (state["num_tokens"], state["document_start"])
    order_BT = before_B[:, None] + jnp.cumsum(keep_BT, axis=1, dtype=jnp.int32) - 1
    first_BT = jax.lax.cummax(jnp.where(start_BT, order_BT, document_B[:, None]), axis=1)
    # The id of a document is 1 + the index of its first token among the real tokens of the row in all calls together.
    # Segment ids cannot be used, because two documents may have the same segment id. The id of padding is 0.
    document_BT = jnp.where(keep_BT, first_BT + 1, 0)
    positions_BT = jnp.where(keep_BT, order_BT - first_BT, 0)
    if state is None:
        mask = Mask(causal=True, window=window, query_segments=document_BT, key_segments=document_BT)
        return Context(positions_BT, mask, None), None
    after_B = order_BT[:, -1] + 1
    is_stored_BT = keep_BT & (order_BT >= after_B[:, None] - window)
    slots_BT = jnp.where(is_stored_BT, order_BT % window, window)
    state = {**state, "num_tokens": after_B, "document_start": first_BT[:, -1]}
    if T == 1:  # the new token replaces the only cached token outside its window, so the updated cache has all its keys
        key_order, key_document = _slot_contents(after_B, first_BT[:, -1], window)
    else:
        key_order, key_document = (
            jnp.concatenate([old, new], axis=1)
            for old, new in zip(_slot_contents(before_B, document_B, window), (order_BT, document_BT), strict=True)
        )
    mask = Mask(
        causal=True, window=window, query_order=order_BT, key_order=key_order, query_segments=document_BT,
        key_segments=key_document,
    )  # fmt: skip
    return Context(positions_BT, mask, slots_BT), state


def _slot_contents(num_tokens_B: jax.Array, document_start_B: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """For each slot, the index of its token among the real tokens of the row, and the id of its document; both [B, W].

    The id is 0 for empty slots and for tokens of earlier documents, because no new token may attend to them.
    """
    last_B1 = num_tokens_B[:, None] - 1
    order_BW = last_B1 - (last_B1 - jnp.arange(window, dtype=jnp.int32)[None, :]) % window
    start_B1 = document_start_B[:, None]
    return order_BW, jnp.where((order_BW >= 0) & (order_BW >= start_B1), start_B1 + 1, 0)


def append_and_read(kv: Any, new: tuple[jax.Array, jax.Array], context: Context) -> tuple[Any, tuple[Any, Any]]:
    """A layer's cache with ``new`` keys and values, and the keys and values that attention reads.

    Args:
        kv: the cached ``key`` and ``value`` of the layer. None: no cache, so attention reads only ``new``.
        new: keys and values of the new tokens, each [B, T, G, K].

    Returns:
        The updated cache in the layout of ``kv``, and (keys, values). If T is 1, keys and values are the updated cache,
        [B, W, G, K]. Otherwise they are the old cache followed by ``new``, [B, W + T, G, K].
    """
    if kv is None:
        return None, new
    assert context.slots is not None
    B, T, G, _ = new[0].shape
    rows_B1 = jnp.arange(B)[:, None]
    new_kv = dict(zip(("key", "value"), new, strict=True))
    updated = {
        name: kv[name].at[rows_B1, context.slots].set(x.reshape(B, T, -1).astype(kv[name].dtype), mode="drop")
        for name, x in new_kv.items()
    }
    if T == 1:
        return updated, cache.split_heads(updated, G)
    keys, values = (
        jnp.concatenate([kv[name].reshape(B, -1, *x.shape[2:]), x.astype(kv[name].dtype)], axis=1)
        for name, x in new_kv.items()
    )
    return updated, (keys, values)
