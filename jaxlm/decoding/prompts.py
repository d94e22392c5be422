"""Prompts: their checks, and the two calls of a model that all decoding is made of.

Prompts of unequal length are padded on either side, row by row as one likes: ``segment_ids`` is 1 on the prompt and 0
on padding. Shapes: B batch, T prompt length with padding, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import spec
from jaxlm.models import Model
from jaxlm.models.heads import last_real

Array = jax.Array | np.ndarray

EndId = int | Sequence[int] | None
"""The id that ends a row, several ids each of which ends it, or None: rows have no end."""


def end_ids_of(end_id: EndId) -> tuple[int, ...]:
    """The ids that end a row, without duplicates."""
    if end_id is None:
        return ()
    return tuple(dict.fromkeys([end_id] if isinstance(end_id, int | np.integer) else map(int, end_id)))


def is_end(tokens: jax.Array, end_ids: tuple[int, ...]) -> jax.Array:
    """Whether each token is one of ``end_ids``: bool in the shape of ``tokens``."""
    ids = np.asarray(end_ids, np.int32).reshape((1,) * tokens.ndim + (-1,))
    return jnp.any(tokens[..., None] == ids, axis=-1)


def check_prompts(
    model: Model,
    prompts_BT: Array,
    segment_ids_BT: Array | None,
    *,
    max_new_tokens: int,
    end_id: EndId,
    allowed_ids: int | None,
    state: Any = None,
) -> tuple[int, int]:
    """How many ids may be generated, and how many slots the state needs; every bad input raises.

    Values are checked on the host, so not for arrays that are being traced.

    Raises:
        TypeError: the family carries no state, or something is no array.
        ValueError: shapes, dtypes, ids or counts that cannot be meant; a state longer than the model allows.
    """
    check_ids(model, prompts_BT, segment_ids_BT, "prompts")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    batch, length = prompts_BT.shape
    slots = length + max_new_tokens - 1  # the last token is never read
    specs = model.state_specs(batch, slots)
    if state is None and model.reads_source:
        raise ValueError(
            f"{model.family} reads a source: for text, call jaxlm.decoding.generate_text(model, params, tokenizer, "
            "sources); for arrays, pass the prompts [batch, 1] of the decoder's start id and "
            f"state=model.start(params, source, length) with a length of at least {slots} tokens (the prompt, and all "
            f"but the last of the {max_new_tokens} new ones)"
        )
    if state is not None:
        _check_state(specs, state, batch)
    vocab_size = model.config.vocab_size
    ids = vocab_size if allowed_ids is None else allowed_ids
    if not 1 <= ids <= vocab_size:
        raise ValueError(f"allowed_ids={allowed_ids} must be between 1 and vocab_size={vocab_size}")
    for end in end_ids_of(end_id):
        if not 0 <= end < ids:
            raise ValueError(f"end_id={end} can never be generated: ids are 0 to {ids - 1}; None means no end")
    if segment_ids_BT is not None and not _traced(segment_ids_BT):
        _check_one_run(np.asarray(segment_ids_BT))
    return ids, slots


def _check_state(specs: spec.Tree, state: Any, batch: int) -> None:
    """Raise unless ``state`` is built like ``specs`` (its lengths may differ) with ``batch`` rows."""
    if spec.flatten(state).keys() != spec.flatten(specs).keys():
        raise ValueError("this is no state of the model:\n  " + "\n  ".join(spec.diff(specs, state, dtypes=False)))
    for (path, want), leaf in zip(jax.tree_util.tree_flatten_with_path(specs)[0], jax.tree.leaves(state), strict=True):
        at = want.axes.index("batch")
        if leaf.ndim != len(want.shape) or leaf.shape[at] != batch:
            raise ValueError(
                f"{spec.path_name(path)} of the state is {list(leaf.shape)}, but the prompts have {batch} rows: make "
                "the state for as many"
            )


def source_vocab_size(model: Model) -> int:
    """Number of ids that the encoder of an encoder-decoder reads."""
    return getattr(model.config, "source_vocab_size", None) or model.config.vocab_size


def check_ids(
    model: Model, ids_BT: Array, segment_ids_BT: Array | None, what: str, *, vocab_size: int | None = None
) -> None:
    """Raise unless ``ids`` are an array [B, T] of integers of the vocabulary, padding included (it is read too).

    ``vocab_size``: default is the size of the model's vocabulary.
    """
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    for name, x in ((what, ids_BT), ("segment_ids", segment_ids_BT)):
        if x is None:
            continue
        if not isinstance(x, jax.Array | np.ndarray):
            raise TypeError(f"{name} must be an array of integers [batch, time], got a {type(x).__name__}")
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers of shape [batch, time], got {x.dtype}{list(x.shape)}")
    if 0 in ids_BT.shape:
        raise ValueError(f"{what} {list(ids_BT.shape)} are empty: give at least one row of at least one token")
    if segment_ids_BT is not None and segment_ids_BT.shape != ids_BT.shape:
        raise ValueError(f"segment_ids {list(segment_ids_BT.shape)} must have the shape of {what} {list(ids_BT.shape)}")
    if _traced(ids_BT):
        return
    host = np.asarray(ids_BT)
    bad = np.argwhere((host < 0) | (host >= vocab_size))
    if bad.size:
        row, at = bad[0]
        raise ValueError(
            f"{what} have id {host[row, at]} in row {row} at position {at}, outside the vocabulary of "
            f"{vocab_size} ids (padding needs a valid id too, e.g. 0)"
        )


def _check_one_run(segment_ids_BT: np.ndarray) -> None:
    for row, segments in enumerate(segment_ids_BT):
        real = np.flatnonzero(segments)
        if real.size == 0:
            raise ValueError(f"row {row} of the prompts is all padding: give it at least one token")
        if real.size != real[-1] - real[0] + 1 or np.any(segments[real] != 1):
            raise ValueError(
                f"segment_ids of row {row} are {segments.tolist()}: a prompt is one run of 1, with padding (0) around"
            )


def _traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def read_prompts(
    model: Model, params: Any, prompts_BT: jax.Array, segment_ids_BT: jax.Array | None, slots: int, state: Any = None
) -> tuple[Any, jax.Array]:
    """The state (a fresh one, unless given) after the prompts, and the logits [B, V] of the token after each row's last
    real one."""
    if state is None:
        state = model.init_state(prompts_BT.shape[0], slots)
    hidden_BTD, state = model.apply(params, prompts_BT, state=state, segment_ids=segment_ids_BT)
    return state, model.logits(params, last_real(hidden_BTD, segment_ids_BT))[:, 0]


def read_tokens(
    model: Model, params: Any, state: Any, tokens_B: jax.Array, real_B: jax.Array | None = None
) -> tuple[Any, jax.Array]:
    """The state after one more token in each row, and the logits [B, V] of the next. Rows not ``real`` read padding."""
    segment_ids_B1 = None if real_B is None else real_B.astype(jnp.int32)[:, None]
    hidden_B1D, state = model.apply(params, tokens_B[:, None], state=state, segment_ids=segment_ids_B1)
    return state, model.logits(params, hidden_B1D)[:, 0]
