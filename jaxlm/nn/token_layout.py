"""The order of the tokens of a call: the padding of each row is moved to the row's end, and back after the last layer.

Windows over time must skip padding, wherever it is. So :func:`move_padding_last` moves the padding of each row to the
row's end before the first layer, and :func:`restore_order` restores the original order after the last layer. Between
these two functions, the real tokens of a row are adjacent, within a call of the model and across calls. A change of the
segment id starts a document.

Shapes: B batch, T time, P number of past segment ids (at least 1).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxlm.nn.segments import check_state_rows, document_numbers, segment_boundaries, select_state
from jaxlm.spec import ArraySpec, require_arrays


@struct.dataclass
class TokenLayout:
    """The segments and the order of the tokens of a call, after the padding of each row was moved to the row's end.

    Attributes:
        segment_ids: [B, T], the segment ids after reordering; None: each row is one document, and there is no state.
        original_indices: [B, T], the index of each token before reordering; None: the tokens were not reordered.
        past_segment_ids: [B, P], the segment ids of the last P real tokens of earlier calls; None without a state.
        documents: [B, P + T], the document number (``jaxlm.nn.segments.document_numbers``) of each token of
            ``past_segment_ids`` and then of ``segment_ids``. Without a state, it is [B, T]. None if ``segment_ids`` is
            None.
        num_real: the number of real tokens of each row in the call; None if ``segment_ids`` is None.
    """

    segment_ids: Any
    original_indices: Any
    past_segment_ids: Any
    documents: Any
    num_real: Any

    def documents_with_past(self, num_past: int) -> jax.Array:
        """The document numbers of the last ``num_past`` real tokens of earlier calls and of all tokens of the call.

        With ``num_past`` above 0, there must be a state with at least ``num_past`` past segment ids.
        """
        return self.documents[:, self.documents.shape[1] - self.segment_ids.shape[1] - num_past :]

    def reorder(self, x_BT: jax.Array | None) -> jax.Array | None:
        """An array [B, T, ...] of the tokens before reordering, in the order of the layout. None gives None."""
        if x_BT is None or self.original_indices is None:
            return x_BT
        order_BT = self.original_indices
        return jnp.take_along_axis(x_BT, order_BT.reshape(*order_BT.shape, *[1] * (x_BT.ndim - 2)), axis=1)

    def restore(self, x_BTC: jax.Array) -> jax.Array:
        """An array of the tokens in the order of the layout, in the order before reordering."""
        if self.original_indices is None:
            return x_BTC
        inverse_BT = jnp.argsort(self.original_indices, axis=1)
        return jnp.take_along_axis(x_BTC, inverse_BT[:, :, None], axis=1)

    def recurrence_masks(self, *, include_first: bool = False) -> dict[str, jax.Array]:
        """The arguments ``reset_BT`` and ``keep_BT`` of recurrences and scans, after reordering.

        If ``segment_ids`` is None, the dict is empty, because each row is then one document without padding. For
        ``include_first``, see :func:`segment_boundaries`.
        """
        if self.segment_ids is None:
            return {}
        last_segment_B = None if self.past_segment_ids is None else self.past_segment_ids[:, -1]
        reset_BT, keep_BT, _ = segment_boundaries(self.segment_ids, last_segment_B, include_first=include_first)
        return {"reset_BT": reset_BT, "keep_BT": keep_BT}


def past_segment_specs(batch: int, tail_length: int) -> ArraySpec:
    """Spec of the segment ids of the last P real tokens, [B, P], where P is ``max(tail_length, 1)``.

    Like the tails, these ids are part of the state of a model. An id of 0 means that fewer than P real tokens were
    read.

    Args:
        tail_length: the length of the longest tail of the model.
    """
    return ArraySpec((batch, max(tail_length, 1)), ("batch", None), dtype=jnp.int32)


def move_padding_last(
    tokens_BT: jax.Array, segment_ids: jax.Array | None, past_BP: jax.Array | None
) -> tuple[jax.Array, TokenLayout]:
    """The tokens with each row's padding moved to the end of the row, and their :class:`TokenLayout`.

    Args:
        segment_ids: [B, T], 0 for padding, 1, 2, ... for documents. None: all tokens belong to document 1.
        past_BP: segment ids of the tokens of earlier calls (:func:`past_segment_specs`); None without a state.
    """
    require_arrays(tokens_BT=tokens_BT, segment_ids=segment_ids, past_BP=past_BP)
    if past_BP is not None:
        check_state_rows(past_BP.shape[0], tokens_BT.shape[0])
    if segment_ids is None and past_BP is None:
        return tokens_BT, TokenLayout(None, None, None, None, None)
    if segment_ids is None:
        order_BT, segment_ids = None, jnp.ones(tokens_BT.shape, jnp.int32)
        num_real_B = jnp.full(tokens_BT.shape[:1], tokens_BT.shape[1], jnp.int32)
    else:
        segment_ids = segment_ids.astype(jnp.int32)  # the dtype of the past segment ids in the state
        order_BT = real_first_indices(segment_ids)
        tokens_BT, segment_ids = (jnp.take_along_axis(x, order_BT, axis=1) for x in (tokens_BT, segment_ids))
        num_real_B = jnp.sum(segment_ids > 0, axis=1, dtype=jnp.int32)
    ids_BS = segment_ids if past_BP is None else jnp.concatenate([past_BP, segment_ids], axis=1)
    return tokens_BT, TokenLayout(segment_ids, order_BT, past_BP, document_numbers(ids_BS), num_real_B)


def real_first_indices(segment_ids_BT: jax.Array) -> jax.Array:
    """The indices of each row's real tokens in their order, followed by the indices of its padding, [B, T]."""
    return jnp.argsort(segment_ids_BT <= 0, axis=1, stable=True)


def restore_order(layout: TokenLayout, hidden_BTC: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """The hidden states in the original order of the tokens, and the past segment ids for the next call.

    Without a state, the second result is None.
    """
    past = layout.past_segment_ids
    if past is not None:
        past = last_real(jnp.concatenate([past, layout.segment_ids], axis=1), layout.num_real, past.shape[1])
    return layout.restore(hidden_BTC), past


def last_real(x_BS: jax.Array, num_real_B: jax.Array, length: int) -> jax.Array:
    """The last ``length`` real entries of each row of ``x``, [B, length, ...].

    A row of ``x`` has ``length`` entries of earlier calls, then ``num_real`` real entries, and then the padding.
    """
    if x_BS.shape[1] == length + 1:  # one new token: this needs no gather
        return select_state(num_real_B > 0, x_BS[:, 1:], x_BS[:, :-1])
    # One index per entry: for a slice of ``length`` entries, XLA would transpose all of ``x`` on a TPU.
    index_BW = num_real_B[:, None] + jnp.arange(length)[None]
    index_BW = index_BW.reshape(*index_BW.shape, *[1] * (x_BS.ndim - 2))
    return jnp.take_along_axis(x_BS, index_BW, axis=1, mode="promise_in_bounds")
