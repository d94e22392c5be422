"""Attention maps: the attention weights with which a model reads given texts.

A map has the weights between tokens, averaged over layers and heads. For a classifier with attention pooling, it has
the weights of each hop. A hop is one weighted sum of the tokens (Lin et al. 2017).

Shapes: L layers, B batch, H heads (hops, for attention pooling), T queries, S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import spec
from jaxlm.config import check_same_number
from jaxlm.data.encodings import SPECIAL_TOKEN, Encoding
from jaxlm.data.tokenizers import Tokenizer, input_rows
from jaxlm.data.tokens import check_tokens
from jaxlm.decoding import decoder_start_id
from jaxlm.decoding.batches import pad_rows
from jaxlm.models import Model
from jaxlm.models.model import NoAttentionWeightsError
from jaxlm.spec import Params
from jaxlm.tasks.predict import check_encoding, check_texts, token_type_inputs
from jaxlm.training.report import AttentionMap, write_attention


def has_attention_maps(model: Model) -> bool:
    """Whether the model can record attention weights, which :func:`attention_maps` needs."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    source = {"source": tokens} if model.reads_source else {}
    try:
        jax.eval_shape(lambda params: model.attention_weights(params, tokens, **source), spec.abstract(model.specs))
    except NoAttentionWeightsError:
        return False
    return True


def write_attention_maps(
    run: str | Path,
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    outputs: Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Write the :func:`attention_maps` of the texts to ``attention.json`` in the directory ``run``.

    The HTML report of the run shows the maps. The function does nothing if there are no texts, or if
    :func:`has_attention_maps` is False. The other arguments and the errors are those of :func:`attention_maps`.

    Args:
        options: the keyword arguments of :func:`attention_maps`.
    """
    if texts and has_attention_maps(model):
        write_attention(run, attention_maps(model, params, tokenizer, texts, outputs, **options))


def attention_maps(
    model: Model,
    params: Params,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    outputs: Sequence[str] | None = None,
    *,
    pairs: Sequence[str] | None = None,
    encodings: Sequence[Encoding] | None = None,
    max_tokens: int | None = None,
    output_special_tokens: bool = True,
) -> list[AttentionMap]:
    """A list with one attention map per text: the attention weights, averaged over layers and heads.

    For an encoder-decoder, the rows are the tokens of ``outputs[n]`` and the columns are the tokens of the source
    ``texts[n]``. Row t has the weights of the decoder step that predicts token t. For a classifier with attention
    pooling, each row is a hop of the pooling, and the columns are the tokens of the text. The hops are not averaged.
    For other models, rows and columns are the tokens of the text. For XLNet with the task ``permutation``, the weights
    are also averaged over the two streams (content and query). The list has no map for a text whose output has no
    tokens.

    Args:
        outputs: for an encoder-decoder, the output text for each source.
        pairs: the second text of each pair of texts, for models that read pairs.
        encodings: the encoding of each text or pair, for example a window of ``tokenizer.encode_windows``. None: the
            result of ``tokenizer.encode_inputs_batch``, truncated to ``max_tokens``.
        max_tokens: maximum number of tokens of a text, a pair or an output, including special tokens. Longer inputs are
            truncated, but ``encodings`` are not. A limit above the model's ``max_positions`` is reduced to
            ``max_positions``. None: no truncation, so the inputs must not be longer than ``max_positions``.
        output_special_tokens: True adds the special tokens of the tokenizer's template to the outputs. Use True if the
            targets of the training had these tokens.

    Raises:
        TypeError: the model cannot record attention weights, or ``texts`` is a single string or has an element that is
            not a string.
        ValueError: there are no texts; ``outputs`` is missing for an encoder-decoder, is given for another family, or
            has a different length than ``texts``; ``pairs`` or ``encodings`` has a different length than ``texts``; an
            encoding has a second text, and ``pairs`` is missing; a text has no tokens or more tokens than the model has
            positions; or an encoding has an id or a token type that the model does not have.
    """
    check_texts(texts)
    if model.reads_source != (outputs is not None):
        if model.reads_source:
            raise ValueError(f"outputs=None: an encoder-decoder needs outputs, and {model.family!r} is such a family")
        raise ValueError(f"outputs={outputs!r}: only an encoder-decoder has outputs, so pass none for {model.family!r}")
    if outputs is not None:
        check_same_number(text=texts, output=outputs)
    if max_tokens is not None and model.max_positions is not None:
        max_tokens = min(max_tokens, model.max_positions)
    encoded = encodings
    if encoded is None:
        encoded = tokenizer.encode_inputs_batch(list(texts), pairs, max_length=max_tokens)
    check_same_number(text=texts, encoding=encoded)
    for number, encoding in enumerate(encoded):
        check_encoding(model, encoding, f"text {number}")
        if pairs is None and encoding.sequence_ids.max() > 0:
            raise ValueError(f"encoding {number} has two texts: pass the second texts as pairs")
    longest = max(encoding.ids.size for encoding in encoded)
    tokens, segment_ids = pad_rows([encoding.ids for encoding in encoded], longest)
    inputs = zip(input_rows(texts, pairs), encoded, strict=True)
    columns = [_token_texts(tokenizer, row, encoding) for row, encoding in inputs]
    if outputs is None:
        types = token_type_inputs(model, [encoding.token_types for encoding in encoded], longest)
        weights = model.attention_weights(params, jnp.asarray(tokens), segment_ids=segment_ids, **types)
        kind, rows = ("pool", None) if "pool" in weights else ("self", columns)
    else:
        targets = _encode_outputs(model, tokenizer, outputs, max_tokens, output_special_tokens)
        rows = [_token_texts(tokenizer, (text,), target) for text, target in zip(outputs, targets, strict=True)]
        start_id = decoder_start_id(model, tokenizer)
        shifted = [np.concatenate([[start_id], target.ids[:-1]]) for target in targets]
        decoder_ids, decoder_segments = pad_rows(shifted, max(ids.size for ids in shifted))
        decoder_inputs = {"source": tokens, "source_segment_ids": segment_ids, "segment_ids": decoder_segments}
        weights, kind = model.attention_weights(params, jnp.asarray(decoder_ids), **decoder_inputs), "cross"
    layers = np.stack([np.asarray(layer) for layer in weights[kind]])  # [L, B, H, T, S]
    maps = []
    for n, column_names in enumerate(columns):
        # In families with a memory (Transformer-XL), the first keys are those of the memory. The memory is empty here,
        # so drop these columns.
        mean_HTS = layers[:, n].mean(axis=0)[..., -longest:]
        if rows is None:
            row_names, map_TS = [f"hop {hop + 1}" for hop in range(mean_HTS.shape[0])], mean_HTS[:, 0]
        else:
            row_names, map_TS = rows[n], mean_HTS.mean(axis=0)
        if row_names:
            map_TS = np.clip(map_TS[: len(row_names), : len(column_names)], 0.0, 1.0)
            maps.append(AttentionMap(texts[n], row_names, column_names, map_TS))
    return maps


def _encode_outputs(
    model: Model, tokenizer: Tokenizer, outputs: Sequence[str], max_tokens: int | None, special_tokens: bool
) -> list[Encoding]:
    """The encoding of each output. Raises ``ValueError`` if an id is outside the vocabulary of the model."""
    encoded = tokenizer.encode_inputs_batch(list(outputs), max_length=max_tokens)
    if not special_tokens:
        encoded = [Encoding(*(field[row.sequence_ids != SPECIAL_TOKEN] for field in row)) for row in encoded]
    for number, encoding in enumerate(encoded):
        check_tokens(encoding.ids, model.config.vocab_size, min_length=0, name=f"output {number}")
    return encoded


def _token_texts(tokenizer: Tokenizer, inputs: Sequence[str], encoding: Encoding) -> list[str]:
    """The text of each token of an encoded text or pair. The text of a special token is its name, such as ``[CLS]``."""
    spans = zip(encoding.ids.tolist(), encoding.sequence_ids.tolist(), encoding.offsets.tolist(), strict=True)
    return [
        inputs[number][start:stop] if stop > start else tokenizer.decode([token], skip_special_tokens=False)
        for token, number, (start, stop) in spans
    ]
