"""Checks of prompts, and the two model calls that decoding uses: read the prompts, and read one more token per row.

Prompts of unequal length are padded on the left or on the right. The side may differ between rows. ``segment_ids`` is 1
for prompt tokens and 0 for padding. Shapes: B batch, T prompt length with padding, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import processes, spec
from jaxlm.config import check_min, check_value
from jaxlm.decoding.describe import require_next_token_head
from jaxlm.models import Model
from jaxlm.models.heads import last_token_hidden
from jaxlm.sharding import Sharding, active, format_sizes
from jaxlm.spec import Array, Params, State

EndId = int | Sequence[int] | Array | None
"""The token id or token ids that end a row. None: no id ends a row."""


def as_end_ids(end_id: EndId) -> tuple[int, ...]:
    """The ids in ``end_id`` as a tuple without duplicates; empty for None.

    Raises:
        ValueError: an id is not an integer.
    """
    if end_id is None:
        return ()
    entries = end_id if isinstance(end_id, Sequence) else np.atleast_1d(np.asarray(end_id))
    ids = [np.asarray(entry).tolist() for entry in entries]  # np.asarray(entries) would convert True and 2 to [1, 2]
    for i in ids:
        check_value(int, i, "end_id")
    return tuple(dict.fromkeys(ids))


def is_end(tokens: jax.Array, end_ids: tuple[int, ...]) -> jax.Array:
    """Whether each token is one of ``end_ids``; bool with the shape of ``tokens``."""
    ids = np.asarray(end_ids, np.int32).reshape((1,) * tokens.ndim + (-1,))
    return jnp.any(tokens[..., None] == ids, axis=-1)


def check_sharding(sharding: Sharding | None) -> None:
    """Raise ``ValueError`` if ``sharding`` splits the axis ``seq``. In a decoding step, this axis has the size 1."""
    if sharding is None or sharding.num_shards(("seq",)) == 1:
        return
    sizes, rule = sharding.mesh.shape, dict(sharding.rules.table)["seq"]
    splitting = format_sizes({name: sizes[name] for name in rule if name in sizes})
    raise ValueError(
        f"decoding reads one token per call, so 'seq' cannot be split, but the rule seq={rule} splits it over "
        f"{splitting} of the mesh {format_sizes(sizes)}: use a mesh without this axis, or rules without 'seq'"
    )


def check_prompts(
    model: Model,
    prompts_BT: Array,
    segment_ids_BT: Array | None,
    max_new_tokens: int,
    end_ids: tuple[int, ...],
    num_allowed_ids: int | None,
    state: State | None,
) -> tuple[int, int]:
    """The number of ids that may be generated, and the number of cache slots that the tokens need.

    The function checks all arguments. It checks values on the host, so it does not check the values of traced arrays.

    Raises:
        TypeError: the family has no model state, or the prompts or segment ids are not an array.
        ValueError: the head does not predict the next token; the model is an encoder-decoder, and ``state`` is None;
            ``state`` belongs to another model, has another number of rows, or has too few free cache slots; a shape,
            dtype, type, id or count is wrong; an end id cannot be generated; a prompt is empty or has padding inside;
            there are more tokens than the model has positions; or the active sharding splits the axis ``seq``.
    """
    check_sharding(active())
    check_ids(model, prompts_BT, segment_ids_BT, "prompts")
    check_value(int, max_new_tokens, "max_new_tokens")
    check_value(int | None, num_allowed_ids, "num_allowed_ids")
    check_min(1, max_new_tokens=max_new_tokens)
    batch, length = prompts_BT.shape
    slots = length + max_new_tokens - 1  # the model does not read the last new token
    specs = model.state_specs(batch, slots)
    require_next_token_head(model, "it generates no tokens")
    if state is None and model.reads_source:
        raise ValueError(
            f"{model.family} reads a source: for text, call jaxlm.decoding.generate_text(model, params, tokenizer, "
            "sources); for arrays, pass prompts [batch, 1] with the decoder's start id and "
            f"state=model.init_decode_state(params, source, length) with a length of at least {slots} tokens (the "
            f"prompt and all {max_new_tokens} new tokens except the last)"
        )
    if state is not None:
        _check_state(specs, state, batch)
        check_free_slots(model, state, slots)
    vocab_size = model.config.vocab_size
    num_ids = vocab_size if num_allowed_ids is None else num_allowed_ids
    if not 1 <= num_ids <= vocab_size:
        raise ValueError(f"num_allowed_ids={num_allowed_ids} must be between 1 and vocab_size={vocab_size}")
    for end in end_ids:
        if not 0 <= end < num_ids:
            raise ValueError(f"end_id={end} can never be generated: ids are 0 to {num_ids - 1}; None means no end")
    if segment_ids_BT is not None and not _is_traced(segment_ids_BT):
        _check_no_gaps(processes.gather_to_host(segment_ids_BT))
    return num_ids, slots


def _check_state(specs: spec.Tree, state: State, batch: int) -> None:
    """Raise ``ValueError`` if ``state`` does not have the arrays of ``specs``, or does not have ``batch`` rows.

    The number of axes of each array must agree with ``specs``. The sizes of axes other than ``batch`` may differ.
    """
    if spec.flatten(state).keys() != spec.flatten(specs).keys():
        raise ValueError(
            "this is not a state of the model:\n  " + "\n  ".join(spec.differences(specs, state, dtypes=False))
        )
    specs_with_path = jax.tree_util.tree_leaves_with_path(specs)
    for (path, leaf_spec), leaf in zip(specs_with_path, jax.tree.leaves(state), strict=True):
        if leaf.ndim != len(leaf_spec.shape):
            raise ValueError(
                f"{spec.path_name(path)} of the state is {list(leaf.shape)}, but must have {len(leaf_spec.shape)} "
                "axes: make the state with model.init_state or by reading a prefix"
            )
        if leaf.shape[leaf_spec.axes.index("batch")] != batch:
            raise ValueError(
                f"{spec.path_name(path)} of the state is {list(leaf.shape)}, but the prompts have {batch} rows: make "
                f"a state with {batch} rows"
            )


def check_free_slots(model: Model, state: State, num_new: int) -> None:
    """Raise ``ValueError`` if a row of the key-value cache of ``state`` has fewer than ``num_new`` free slots.

    A state without a key-value cache has no limit. Inside ``jit``, the number of used slots is unknown and counts as 0.
    """
    if not model.has_cache:
        return
    slots, used = state["segment_ids"].shape[1], 0
    if not _is_traced(state["length"]):
        with jax.ensure_compile_time_eval():  # other arguments may be traced
            used = int(jnp.max(state["length"]))
    if slots - used < num_new:
        raise ValueError(
            f"the state has {slots - used} free cache slots, but the prompts and the new tokens need {num_new}: make a "
            f"state with a length of at least {used + num_new}"
        )


def check_memory_slots(model: Model, state: State, num_new: int) -> None:
    """Raise ``ValueError`` if ``state`` has a rolling memory that is too short for ``num_new`` more tokens.

    Speculative decoding calls this function for the state of the target model. At the end of each call of the model, a
    full rolling memory (``jaxlm.nn.attention.memory``) drops one old token for each new token. If a later token may
    attend to a dropped token, one call with several tokens gives other results than several calls with one token.

    The number of slots that ``Model.state_specs`` gives for all tokens is enough: a memory with this number of slots
    drops no token to which a later token may attend. If tokens attend only to a window, this number is at most the size
    of the window. The array ``segment_ids`` of a memory has one entry per slot. Inside ``jit``, the number of used
    slots is unknown and counts as 0.
    """
    if model.has_cache:  # see check_free_slots
        return
    for name, segment_ids in spec.flatten(state).items():
        if name.rpartition("/")[2] != "segment_ids" or segment_ids.ndim != 2:
            continue
        (batch, slots), used = segment_ids.shape, 0
        if not _is_traced(segment_ids):
            with jax.ensure_compile_time_eval():
                used = int(jnp.max(jnp.sum(segment_ids > 0, axis=1)))
        needed = spec.flatten(model.state_specs(batch, used + num_new))[name].shape[1]
        if slots < needed:
            raise ValueError(
                f"the state of the target model ({model.family}) has {slots} memory slots, {used} of them used, but "
                f"needs {needed}, because the memory must not drop a token while the model reads {num_new} more tokens "
                "(the prompts, the new tokens and the proposed tokens). Make a state with a length of at least "
                f"{used + num_new}, and let the model read the text that precedes the prompts into this state"
            )


def source_vocab_size(model: Model) -> int:
    """The vocabulary size of the source of an encoder-decoder. For other families, the vocabulary size of the model."""
    return getattr(model.config, "source_vocab_size", None) or model.config.vocab_size


def check_ids(
    model: Model, ids_BT: Array, segment_ids_BT: Array | None, what: str, *, vocab_size: int | None = None
) -> None:
    """Raise an error if the arrays are not valid ids and segment ids.

    The arrays must have an integer dtype and the same shape [B, T], without an axis of size 0. All ids must be in the
    vocabulary. The ids of padding are checked too, because the model embeds them. The ids of traced arrays are not
    checked.

    Args:
        what: the name of the ids in messages.
        vocab_size: number of valid ids. None: the vocabulary size of the model.

    Raises:
        TypeError: an argument is not an array.
        ValueError: an array has a wrong dtype, shape or id.
    """
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    for name, x in ((what, ids_BT), ("segment_ids", segment_ids_BT)):
        spec.require_arrays(**{name: x})
        if x is None:
            continue
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers of shape [batch, time], got {x.dtype}{list(x.shape)}")
    if 0 in ids_BT.shape:
        raise ValueError(f"{what} {list(ids_BT.shape)} are empty: give at least one row of at least one token")
    if segment_ids_BT is not None and segment_ids_BT.shape != ids_BT.shape:
        raise ValueError(f"segment_ids {list(segment_ids_BT.shape)} must have the shape of {what} {list(ids_BT.shape)}")
    if _is_traced(ids_BT):
        return
    host_ids = processes.gather_to_host(ids_BT)
    bad = np.argwhere((host_ids < 0) | (host_ids >= vocab_size))
    if bad.size:
        row, position = bad[0]
        raise ValueError(
            f"{what} have id {host_ids[row, position]} in row {row} at position {position}, outside the vocabulary of "
            f"{vocab_size} ids (padding needs a valid id too, e.g. 0)"
        )


def _check_no_gaps(segment_ids_BT: np.ndarray) -> None:
    """Raise ``ValueError`` if a row has no prompt token, padding between prompt tokens, or an id other than 0 and 1."""
    for row, segments in enumerate(segment_ids_BT):
        real = np.flatnonzero(segments)
        if real.size == 0:
            raise ValueError(f"row {row} of the prompts is all padding: give it at least one token")
        if real.size != real[-1] - real[0] + 1 or np.any(segments[real] != 1):
            raise ValueError(
                f"segment_ids of row {row} are {segments.tolist()}: a prompt must be consecutive 1s, with "
                "padding (0) only before or after it"
            )


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def read_prompts(
    model: Model,
    params: Params,
    prompts_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    slots: int,
    state: State | None = None,
) -> tuple[Any, jax.Array]:
    """The model state after the prompts, and the logits [B, V] of the next token of each row.

    Args:
        slots: number of cache slots of a new state.
        state: the state before the prompts. None: a new, empty state.
    """
    if state is None:
        state = model.init_state(prompts_BT.shape[0], slots)
    hidden_BTD, state = model.apply(params, prompts_BT, state=state, segment_ids=segment_ids_BT)
    return state, model.logits(params, last_token_hidden(hidden_BTD, segment_ids_BT))[:, 0]


def read_tokens(
    model: Model, params: Params, state: State | None, tokens_B: jax.Array, reads_token_B: jax.Array | None = None
) -> tuple[Any, jax.Array]:
    """The model state after one more token in each row, and the logits [B, V] of the next token.

    Args:
        reads_token_B: [B] bool, whether the row reads its token. The other rows read padding. None: all rows read their
            token.
    """
    segment_ids_B1 = None if reads_token_B is None else reads_token_B.astype(jnp.int32)[:, None]
    hidden_B1D, state = model.apply(params, tokens_B[:, None], state=state, segment_ids=segment_ids_B1)
    return state, model.logits(params, hidden_B1D)[:, 0]
