"""Formats of :mod:`jaxlm.models.bert`."""

from __future__ import annotations

from jaxlm.interop.formats.format import Format
from jaxlm.models.bert import mlp_dim

BERT = Format(
    architectures={
        "BertForMaskedLM": {"task": "masked", "next_sentence": False},
        "BertForPreTraining": {"task": "masked", "next_sentence": True},
        "BertModel": {"task": "none", "next_sentence": False},
        "BertForNextSentencePrediction": {"task": "none", "next_sentence": True},
        "BertForSequenceClassification": {"task": "classification"},
        "BertForTokenClassification": {"task": "token_classification"},
        "BertForQuestionAnswering": {"task": "span_qa"},
    },
    model_type="bert",
    prefix="bert.",
    hf_name_of_field={
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "num_token_types": "type_vocab_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "embed_dim": "hidden_size",
        "mlp_dim": "intermediate_size",
        "activation": "hidden_act",
        "norm_epsilon": "layer_norm_eps",
        "init_stddev": "initializer_range",
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
        "embedding_norm/scale": "embeddings.LayerNorm.weight",
        "embedding_norm/bias": "embeddings.LayerNorm.bias",
        "layers/attention/query/weight": "encoder.layer.{layer}.attention.self.query.weight",
        "layers/attention/query/bias": "encoder.layer.{layer}.attention.self.query.bias",
        "layers/attention/key/weight": "encoder.layer.{layer}.attention.self.key.weight",
        "layers/attention/key/bias": "encoder.layer.{layer}.attention.self.key.bias",
        "layers/attention/value/weight": "encoder.layer.{layer}.attention.self.value.weight",
        "layers/attention/value/bias": "encoder.layer.{layer}.attention.self.value.bias",
        "layers/attention/output/weight": "encoder.layer.{layer}.attention.output.dense.weight",
        "layers/attention/output/bias": "encoder.layer.{layer}.attention.output.dense.bias",
        "layers/attention_norm/scale": "encoder.layer.{layer}.attention.output.LayerNorm.weight",
        "layers/attention_norm/bias": "encoder.layer.{layer}.attention.output.LayerNorm.bias",
        "layers/mlp/up/weight": "encoder.layer.{layer}.intermediate.dense.weight",
        "layers/mlp/up/bias": "encoder.layer.{layer}.intermediate.dense.bias",
        "layers/mlp/down/weight": "encoder.layer.{layer}.output.dense.weight",
        "layers/mlp/down/bias": "encoder.layer.{layer}.output.dense.bias",
        "layers/mlp_norm/scale": "encoder.layer.{layer}.output.LayerNorm.weight",
        "layers/mlp_norm/bias": "encoder.layer.{layer}.output.LayerNorm.bias",
        "pooler/weight": "pooler.dense.weight",
        "pooler/bias": "pooler.dense.bias",
    },
    unprefixed_tensors={
        "masked/dense/weight": "cls.predictions.transform.dense.weight",
        "masked/dense/bias": "cls.predictions.transform.dense.bias",
        "masked/norm/scale": "cls.predictions.transform.LayerNorm.weight",
        "masked/norm/bias": "cls.predictions.transform.LayerNorm.bias",
        "masked/bias": "cls.predictions.bias",
        "next_sentence/weight": "cls.seq_relationship.weight",
        "next_sentence/bias": "cls.seq_relationship.bias",
        "classifier/weight": "classifier.weight",
        "classifier/bias": "classifier.bias",
        "token_classifier/weight": "classifier.weight",
        "token_classifier/bias": "classifier.bias",
        "span/weight": "qa_outputs.weight",
        "span/bias": "qa_outputs.bias",
    },
    tied_tensors={"cls.predictions.decoder.weight": "token_embedding", "cls.predictions.decoder.bias": "masked/bias"},
    renamed={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},  # in the first published files
    ignored=(r"embeddings\.position_ids",),  # 0, 1, 2, ... in old files
)

FORMATS = (BERT,)
