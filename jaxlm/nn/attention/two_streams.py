"""The queries of XLNet's two streams: their masks and positions (Yang et al. 2019, section 2.3).

The content stream has a query at each token. The query stream has a query at each position to predict. Such a query
does not attend to the token of its own position. Both streams attend to the same keys: the memory and the tokens. Each
position has an integer, its order. The content stream attends to positions of the same or a lower order, and the query
stream only to positions of a lower order.

Shapes: B batch, T tokens, P positions of the query stream, M memory slots, S keys (M + T; in the decoding layout of the
memory, all its slots).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.nn.attention import cache, memory
from jaxlm.nn.attention.bias import AttentionBias
from jaxlm.nn.attention.distance_bias import distance_bias, distance_bias_at_positions, distance_bias_at_query_positions
from jaxlm.nn.attention.mask import Mask
from jaxlm.spec import State

StreamKind = Literal["permuted", "left_to_right", "bidirectional"]
"""``permuted``: two streams with a factorization order. ``left_to_right``: two streams; query t of the query stream has
the position after token t. ``bidirectional``: only the content stream, without a causal mask."""

_MEMORY_ORDER = -(2**30)
"""The order of all memory slots if there is a factorization order. It is lower than the order of any token, and
differences between it and the orders of tokens do not overflow int32."""


@struct.dataclass
class Stream:
    """The queries of one stream.

    By default, the position of a key is its index among the S keys, and ``query_indices`` or ``query_offset`` gives the
    positions of the queries on the same scale. If ``positions`` is not None, it replaces both fields.

    If the memory has the decoding layout, one :class:`Stream` has two queries for each row, first the query of the
    content stream. P is then 2.

    Attributes:
        mask: which keys each query may attend to.
        query_offset: the position of the first query. The queries after it have the next positions.
        query_indices: [1 or B, P] the position of each query; None: ``query_offset`` is used.
        positions: the positions of queries [1 or B, T or P] and keys [1 or B, S]. Padding is not counted, and positions
            may be negated (``right_to_left`` of :func:`make_streams`). None: the default positions.
        token_types: token types of queries [B, T or P] and keys [B, S]; None: no types.
    """

    mask: Mask
    query_offset: int = struct.field(pytree_node=False)
    query_indices: Any
    positions: Any
    token_types: Any

    def position_bias(self, table: jax.Array, keys: int, q_BTHK: jax.Array, scale: float) -> AttentionBias:
        """The bias of relative positions for the queries ``q``; row n of ``table`` is for the distance ``keys - n``."""
        if self.positions is not None:
            return distance_bias_at_positions(table, keys, *self.positions, q_BTHK=q_BTHK, scale=scale)
        if self.query_indices is not None:
            return distance_bias_at_query_positions(table, keys, self.query_indices, keys, q_BTHK=q_BTHK, scale=scale)
        queries = q_BTHK.shape[1]
        return distance_bias(table, keys, queries, keys, query_offset=self.query_offset, q_BTHK=q_BTHK, scale=scale)


def make_streams(
    tokens_BT: jax.Array,
    state: State | None,
    segment_ids: jax.Array | None,
    kind: StreamKind,
    *,
    token_types: Any = None,
    right_to_left: Any = None,
    order: Any = None,
    targets: Any = None,
) -> tuple[Stream, ...]:
    """The content stream and, unless ``kind`` is bidirectional, the query stream.

    Args:
        state: a state as in ``memory.memory_specs``, with ``token_types`` [B, M] if the argument ``token_types`` is
            given; None: there is no memory, and S = T.
        segment_ids: [B, T], 0 for padding, 1, 2, ... for documents. None: one document.
        kind: see :data:`StreamKind`.
        token_types: [B, T] integers; None: the streams have no token types.
        right_to_left: [B] bool, True for rows whose positions are negated; None: no rows.
        order: [B, T] integers, the order of each token in the factorization. Required for ``kind="permuted"``; must be
            None for other kinds.
        targets: [B, P] integers, the positions to predict. Required for ``kind="permuted"``; not used for other kinds.

    Returns:
        One or two :class:`Stream`. With a state in the decoding layout, there is one, with the queries of both streams,
        because both attend to the same keys.

    Raises:
        ValueError: the state has the decoding layout, and ``kind`` is not left_to_right, ``right_to_left`` is given, or
            there is more than one token.
    """
    B, T = tokens_BT.shape
    is_causal = kind != "bidirectional"
    context, _ = memory.make_context(tokens_BT, state, segment_ids, causal=is_causal)
    if context.slots is not None:
        if kind != "left_to_right" or right_to_left is not None:
            wrong = f"kind={kind!r}" if right_to_left is None else "the argument right_to_left"
            raise ValueError(
                f"a memory in the decoding layout reads tokens from left to right, got {wrong}: convert the state with "
                "from_decoding_layout first"
            )
        return (_decoding_stream(context, state, token_types),)
    M = 0 if state is None else state["segment_ids"].shape[1]
    sign = 1 if right_to_left is None else jnp.where(right_to_left, -1, 1)[:, None]
    types_BS = token_types
    if token_types is not None and state is not None:
        types_BS = jnp.concatenate([state["token_types"], token_types.astype(jnp.int32)], axis=1)
    key_order = None
    if order is not None:
        order = jnp.asarray(order, jnp.int32)  # the order of the memory does not fit into a smaller dtype
        key_order = jnp.pad(order, ((0, 0), (M, 0)), constant_values=_MEMORY_ORDER)
    elif is_causal:
        key_order = context.key_positions

    def at_tokens(x_BT: Any) -> Any:
        return x_BT

    def at_targets(x_BT: Any) -> Any:
        if x_BT is None:
            return None
        return jnp.take_along_axis(jnp.broadcast_to(x_BT, (B, T)), targets, axis=1, mode="clip")

    def make_stream(select: Callable[[Any], Any], offset: int, order_BT: Any) -> Stream:
        """The queries of one stream.

        Args:
            select: a function that gets an array with one entry per token and returns the entries of the queries.
            offset: position of a query minus position of its token.
            order_BT: the highest order that each query may attend to. None: with a causal mask, a query may attend to
                keys up to its own index; without a causal mask, to all keys.
        """
        mask = Mask(
            causal=is_causal,
            query_order=order_BT,
            key_order=None if order_BT is None else key_order,
            query_segments=select(context.mask.query_segments),
            key_segments=context.mask.key_segments,
        )
        positions = None
        if segment_ids is not None or right_to_left is not None:
            positions = (select(context.query_positions) + offset) * sign, context.key_positions * sign
        query_indices = None if select is at_tokens else M + offset + select(jnp.arange(T)[None])
        types = None if token_types is None else (select(token_types), types_BS)
        return Stream(mask, M + offset, query_indices, positions, types)

    if kind == "permuted":
        return make_stream(at_tokens, 0, order), make_stream(at_targets, 0, at_targets(order) - 1)
    if kind == "bidirectional":
        return (make_stream(at_tokens, 0, None),)
    order_BT = None if state is None and segment_ids is None else context.query_positions
    # A query has the position after its token, because it predicts the next token.
    return make_stream(at_tokens, 0, order_BT), make_stream(at_tokens, 1, order_BT)


def _decoding_stream(context: memory.MemoryContext, state: Any, token_types: Any) -> Stream:
    """The queries of both streams for one new token per row, with a state in the decoding layout.

    Both queries attend to the keys up to the new token. The query of the query stream has the position after this
    token, because it predicts the next token.
    """
    assert context.slots is not None

    def for_both_queries(x_B1: jax.Array) -> jax.Array:
        return jnp.concatenate([x_B1, x_B1], axis=1)

    mask = dataclasses.replace(
        context.mask,
        query_order=for_both_queries(context.mask.query_order),
        query_segments=for_both_queries(context.mask.query_segments),
    )
    types = None
    if token_types is not None:
        types = for_both_queries(token_types), cache.append(state["token_types"], token_types, context.slots[:, 0])
    query_indices = jnp.concatenate([context.slots, context.slots + 1], axis=1)
    return Stream(mask, 0, query_indices, None, types)
