"""Causal models and encoder-decoders of many families for a given width, number of layers and vocabulary size.

Some families, such as those of other packages, have no entry in this module. The model of such a family has the name of
the family and the fields of one of its variants (a tiny variant, if possible), with the widths scaled to the given
width. Experiments run such a model only if ``--model`` names it. The same holds for ``transformer_xl``, because its
memory is for consecutive segments of a long text. ``alexnet`` has no entry, because its causal model is not published.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.variants import default_variant
from jaxlm.models import Model, get_model

HEAD_WIDTH = 32
"""Width of an attention head, if the width of the model is a multiple of it."""


def _definitions(width: int, layers: int, max_length: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """For each model name, the family or variant and its config fields.

    The vocabulary size, the width of the embeddings and the number of layers are missing. :func:`model_of` sets them.
    """
    heads, mlp = max(1, width // HEAD_WIDTH), 8 * width // 3
    attention = {"num_heads": heads, "max_positions": max_length}
    mamba2 = {"head_dim": 2 * width // heads, "state_size": 64}
    delta_rule = {
        "pattern": ("delta_rule",), "max_positions": None, "mlp_dim": mlp, "delta_key_heads": heads,
        "delta_value_heads": heads, "delta_key_dim": width // heads, "delta_value_dim": width // heads,
    }  # fmt: skip
    xlstm = {"num_heads": heads, "mlp_dim": mlp, "key_dim": width, "value_dim": 2 * width}
    rwkv_ranks = {"decay_rank": 32, "rate_rank": 32, "value_rank": 16, "gate_rank": 64}
    recurrent = {"hidden_dim": width, "init_bound": 0.5}
    # The default, ``attention="bahdanau"``, allows only one layer.
    luong = {"attention": "luong", "score": "general", "hidden_dim": width, "output_dim": width}
    return {
        "gpt": ("gpt2", attention),
        "llama": ("llama", {**attention, "mlp_dim": mlp}),
        "lstm": ("lstm", recurrent),
        "gru": ("gru", recurrent),
        "attention_rnn_lm": ("attention_rnn_lm", {"hidden_dim": width, "attention_dim": width, "window": None}),
        "resnet_lm": ("resnet_lm", {"blocks": ((width, 4, 1),) * layers}),
        "mamba2": ("mamba2", mamba2),
        "mamba2 [-1, 1]": ("mamba2", {**mamba2, "negative_eigenvalues": True}),
        # In the published pattern, attention follows two recurrent layers. A model of two layers would lack attention.
        "griffin": (
            "griffin",
            {"num_heads": heads, "mlp_dim": mlp, "window": 64, "pattern": ("recurrent", "attention")},
        ),
        "hawk": ("griffin", {"num_heads": heads, "mlp_dim": mlp, "pattern": ("recurrent",)}),
        "mlstm": ("xlstm", xlstm),
        "slstm": ("xlstm", {**xlstm, "pattern": ("slstm",)}),
        "rwkv7": ("rwkv7", {"mlp_dim": 4 * width, "head_dim": width // heads, **rwkv_ranks}),
        "gated_deltanet": ("gated_deltanet", delta_rule),
        "gated_deltanet [-1, 1]": ("gated_deltanet", {**delta_rule, "negative_eigenvalues": True}),
        "transformer_xl": (
            "transformer-xl-tiny",
            {
                "cutoffs": (),
                "token_dim": width,
                "num_heads": heads,
                "head_dim": width // heads,
                "mlp_dim": 4 * width,
            },
        ),
        "t5": ("t5", {"num_heads": heads, "head_dim": width // heads, "mlp_dim": 4 * width}),
        "attention_rnn": ("attention_rnn", {"source_vocab_size": None, **luong}),
    }


ENCODER_DECODERS = ("t5", "attention_rnn")
"""Names of the encoder-decoders. Only experiments whose batches have a source use them."""
MODELS = tuple(name for name in _definitions(64, 2, 64) if name not in (*ENCODER_DECODERS, "transformer_xl"))
"""Names of the causal models that experiments run by default. Some families have several models."""


def model_of(name: str, *, vocab_size: int, width: int, layers: int, max_length: int) -> Model:
    """The model with this name and these sizes, without dropout.

    Args:
        name: a name in :data:`MODELS` or :data:`ENCODER_DECODERS`, "transformer_xl", or the name of another family.
        max_length: length of the longest row in training and tests. It is ``max_positions`` of models that have a
            limit.

    Raises:
        ValueError: the family has no causal variant and no encoder-decoder, its ``Config`` lacks the field
            ``vocab_size`` or ``embed_dim``, or it does not accept the sizes.
    """
    definitions = _definitions(width, layers, max_length)
    if name in definitions:
        variant, fields = definitions[name]
    else:
        variant, fields = _default_definition(name, width, max_length)
    model = get_model(variant, vocab_size=vocab_size, embed_dim=width, **fields)
    return model.with_known_fields(num_layers=layers, **model.zero_dropout)


def _default_definition(family: str, width: int, max_length: int) -> tuple[str, dict[str, Any]]:
    """A variant of a family, and its fields that depend on the sizes, as in :func:`_definitions`.

    The widths are the fields with the name ``channels`` or a name that ends in ``_dim``, except sizes of a head.
    """
    variant = default_variant(family, lambda model: model.task == "causal" or model.reads_source)
    if variant is None:
        raise ValueError(
            f"family {family!r} has no causal variant and no encoder-decoder, so the laboratory cannot train it: "
            f"choose another model, such as {MODELS[0]}"
        )
    config = get_model(variant).config
    if not hasattr(config, "embed_dim"):
        raise ValueError(
            f"family {family!r} has no config field 'embed_dim', which is the width of a model in the laboratory: name "
            "the field of the width 'embed_dim'"
        )
    sizes = {
        field.name: value
        for field in dataclasses.fields(config)
        if isinstance(value := getattr(config, field.name), int) and field.name != "embed_dim"
    }
    heads = max(1, width // HEAD_WIDTH)
    fixed = {"num_heads": heads, "num_kv_heads": heads, "head_dim": width // heads, "max_positions": max_length}
    widths = {
        name: max(1, value * width // config.embed_dim)
        for name, value in sizes.items()
        if name == "channels" or (name.endswith("_dim") and not name.endswith("head_dim"))
    }
    return variant, {**widths, **{name: value for name, value in fixed.items() if name in sizes}}
