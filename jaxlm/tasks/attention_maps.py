"""Attention maps of texts: pictures of what a model attends to, for reports and pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlm.data.encodings import Encoding
from jaxlm.data.tokenizers import Tokenizer
from jaxlm.decoding import decoder_start_id
from jaxlm.decoding.batches import pad_rows
from jaxlm.models import Model
from jaxlm.training.report import AttentionMap


def attention_maps(
    model: Model, params: Any, tokenizer: Tokenizer, texts: Sequence[str], outputs: Sequence[str] | None = None
) -> list[AttentionMap]:
    """A map of each text: attention weights, averaged over the layers and their heads.

    For an encoder-decoder, the rows are the tokens of ``outputs[n]`` and the columns those of the source ``texts[n]``:
    row t has the weights with which token t was predicted. For other families, the rows and the columns are the tokens
    of the text; where a classifier pools by attention, the rows are its hops.

    Raises:
        TypeError: the family has no attention, or ``texts`` is a single string.
        ValueError: ``outputs`` is missing for an encoder-decoder, or has another number of texts.
    """
    if isinstance(texts, str):
        raise TypeError(f"texts is a sequence of strings, got one string: pass [{texts!r}]")
    if model.reads_source != (outputs is not None):
        kind = "an encoder-decoder needs outputs" if model.reads_source else "only an encoder-decoder has outputs"
        raise ValueError(f"outputs={outputs!r}: {kind}, and {model.family!r} is {'' if outputs is None else 'not '}one")
    if outputs is not None and len(outputs) != len(texts):
        raise ValueError(f"{len(texts)} texts and {len(outputs)} outputs: give one output for each text")
    encoded = tokenizer.encode_inputs_batch(list(texts))
    tokens, segment_ids = _padded(encoded)
    columns = [_names(tokenizer, text, encoding) for text, encoding in zip(texts, encoded, strict=True)]
    if outputs is None:
        types = {}
        if model.reads_token_types:
            types["token_types"] = jnp.asarray(pad_rows([e.token_types for e in encoded], tokens.shape[1])[0])
        weights = model.attention_weights(params, tokens, segment_ids=segment_ids, **types)
        kind, rows = ("pool", None) if "pool" in weights else ("self", columns)
    else:
        targets = tokenizer.encode_inputs_batch(list(outputs))
        rows = [_names(tokenizer, text, encoding) for text, encoding in zip(outputs, targets, strict=True)]
        start = decoder_start_id(model, tokenizer)
        shifted = [np.concatenate([[start], target.ids[:-1]]) for target in targets]
        read, read_segments = (jnp.asarray(x) for x in pad_rows(shifted, max(ids.size for ids in shifted)))
        inputs = {"source": tokens, "source_segment_ids": segment_ids, "segment_ids": read_segments}
        weights, kind = model.attention_weights(params, read, **inputs), "cross"
    layers = np.stack([np.asarray(layer) for layer in weights[kind]])  # [L, B, H, T, S]
    maps = []
    for n, names in enumerate(columns):
        mean = layers[:, n].mean(axis=0)
        if rows is None:
            own, shown = [f"hop {hop + 1}" for hop in range(mean.shape[0])], mean[:, 0]
        else:
            own, shown = rows[n], mean.mean(axis=0)
        # A memory before the text, which is empty here, would be the first columns.
        shown = shown[: len(own), shown.shape[1] - tokens.shape[1] :][:, : len(names)]
        maps.append(AttentionMap(texts[n], own, names, np.clip(shown, 0.0, 1.0)))
    return maps


def _padded(encoded: Sequence[Encoding]) -> tuple[Any, Any]:
    """Tokens and segment ids [B, T] of the texts."""
    rows = [encoding.ids for encoding in encoded]
    tokens, segment_ids = pad_rows(rows, max(ids.size for ids in rows))
    return jnp.asarray(tokens), jnp.asarray(segment_ids)


def _names(tokenizer: Tokenizer, text: str, encoding: Encoding) -> list[str]:
    """The text of each token; of a special token, its name."""
    return [
        text[start:stop] if stop > start else tokenizer.decode([token])
        for token, (start, stop) in zip(encoding.ids.tolist(), encoding.offsets.tolist(), strict=True)
    ]
