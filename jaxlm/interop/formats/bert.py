"""Formats of :mod:`jaxlm.models.bert`."""

from __future__ import annotations

from jaxlm.interop.formats.format import Format, classes, module_tensors, usual_fields
from jaxlm.models.bert import mlp_dim

_LAYER = "encoder.layer.{layer}"

BERT = Format(
    architectures={
        "BertForMaskedLM": {"task": "masked", "next_sentence": False},
        "BertForPreTraining": {"task": "masked", "next_sentence": True},
        "BertModel": {"task": "none", "next_sentence": False},
        "BertForNextSentencePrediction": {"task": "none", "next_sentence": True},
        **classes("Bert", "classification", "token_classification", "span_qa"),
    },
    model_type="bert",
    prefix="bert.",
    hf_name_of_field={
        **usual_fields("vocab_size", "max_positions", "num_layers", "num_heads", "embed_dim", "mlp_dim", "init_stddev"),
        "num_token_types": "type_vocab_size",
        "activation": "hidden_act",
        "norm_epsilon": "layer_norm_eps",
        "hidden_dropout": "hidden_dropout_prob",
        "attention_dropout": "attention_probs_dropout_prob",
        "classifier_dropout": "classifier_dropout",
    },
    default_fields={"mlp_dim": 3072},
    write_fields=lambda cfg: {"intermediate_size": mlp_dim(cfg)},
    jaxlm_value_of={
        "hidden_act": {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
    },
    # The family supports only these values. Any other value is an error.
    required={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "pruned_heads": {},
    },
    token_ids={"pad_token_id": 0},
    tensors={
        "token_embedding": "embeddings.word_embeddings.weight",
        "position_embedding": "embeddings.position_embeddings.weight",
        "token_type_embedding": "embeddings.token_type_embeddings.weight",
        **module_tensors("", "embeddings.", embedding_norm="LayerNorm"),
        **module_tensors("layers/attention/", f"{_LAYER}.attention.self.", query="query", key="key", value="value"),
        **module_tensors("layers/", f"{_LAYER}.attention.output.", attention_norm="LayerNorm"),
        **module_tensors("layers/attention/", f"{_LAYER}.attention.output.", output="dense"),
        **module_tensors("layers/mlp/", f"{_LAYER}.", up="intermediate.dense", down="output.dense"),
        **module_tensors("layers/", f"{_LAYER}.output.", mlp_norm="LayerNorm"),
        **module_tensors("", "", pooler="pooler.dense"),
    },
    unprefixed_tensors={
        "masked/bias": "cls.predictions.bias",
        **module_tensors("masked/", "cls.predictions.transform.", dense="dense", norm="LayerNorm"),
        **module_tensors("", "", next_sentence="cls.seq_relationship"),
        **module_tensors("", "", classifier="classifier", token_classifier="classifier", span="qa_outputs"),
    },
    tied_tensors={"cls.predictions.decoder.weight": "token_embedding", "cls.predictions.decoder.bias": "masked/bias"},
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},  # in the first published files
    ignored=(r"embeddings\.position_ids",),  # 0, 1, 2, ... in old files
)

FORMATS = (BERT,)
