"""Formats of :mod:`jaxlm.models.gpt`: GPT-2 and GPT-1."""

from __future__ import annotations

import dataclasses

from jaxlm.interop.formats.format import Format, classes, module_tensors, usual_fields

_GPT2 = Format(
    architectures={
        "GPT2LMHeadModel": {"task": "causal"},
        **classes("GPT2", "none", "classification", "token_classification", "span_qa"),
    },
    model_type="gpt2",
    prefix="transformer.",
    default_fields={"norm_position": "before"},
    hf_name_of_field={
        **usual_fields("vocab_size", "init_stddev", "tie_embeddings"),
        "max_positions": "n_positions",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "embed_dim": "n_embd",
        "mlp_dim": "n_inner",
        "norm_epsilon": "layer_norm_epsilon",
        "embedding_dropout": "embd_pdrop",
        "attention_dropout": "attn_pdrop",
        "residual_dropout": "resid_pdrop",
        "activation": "activation_function",
    },
    jaxlm_value_of={
        "activation_function": {
            "gelu_new": "gelu_tanh",
            "gelu_pytorch_tanh": "gelu_tanh",
            "gelu": "gelu",
            "relu": "relu",
        }
    },
    # The family supports only these values. Any other value is an error.
    required={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "pruned_heads": {},
    },
    aliases={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    token_ids={"bos_token_id": 50256, "eos_token_id": 50256},
    tensors={
        "token_embedding": "wte.weight",
        "position_embedding": "wpe.weight",
        **module_tensors("layers/attention/", "h.{layer}.attn.", qkv="c_attn", output="c_proj"),
        **module_tensors("layers/mlp/", "h.{layer}.mlp.", up="c_fc", down="c_proj"),
        **module_tensors("layers/", "h.{layer}.", attention_norm="ln_1", mlp_norm="ln_2"),
        **module_tensors("", "", final_norm="ln_f"),
    },
    unprefixed_tensors={
        "head": "lm_head.weight",
        "classifier/weight": "score.weight",
        **module_tensors("", "", token_classifier="classifier", span="qa_outputs"),
    },
    tied_tensors={"lm_head.weight": "token_embedding"},  # in some files of models with a tied head
    # GPT-2's Conv1D stores weights as [in, out]. So these weights are not transposed; only axes are merged.
    layouts={
        "layers/attention/qkv/weight": ((0,), (1, 2, 3)),
        "layers/attention/output/weight": ((0, 1), (2,)),
        "layers/mlp/up/weight": ((0,), (1,)),
        "layers/mlp/down/weight": ((0,), (1,)),
    },
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),  # in old files: the causal mask, and the score of masked keys
)
_GPT1 = dataclasses.replace(
    _GPT2,
    architectures={
        "OpenAIGPTLMHeadModel": {"task": "causal"},
        **classes("OpenAIGPT", "none", "classification"),
    },
    model_type="openai-gpt",
    default_fields={"norm_position": "after", "mlp_dim": None, "vocab_size": 40478, "max_positions": 512},
    hf_name_of_field={
        **{name: hf_name for name, hf_name in _GPT2.hf_name_of_field.items() if name not in ("mlp_dim", "activation")},
        "activation": "afn",
    },
    none_means={"mlp_dim": lambda cfg: 4 * cfg.embed_dim},
    jaxlm_value_of={"afn": {"gelu": "gelu_tanh", "relu": "relu"}},  # GPT-1's "gelu" is the tanh approximation
    required={"pruned_heads": {}},
    token_ids={},
    tensors={
        **_GPT2.tensors,
        "token_embedding": "tokens_embed.weight",
        "position_embedding": "positions_embed.weight",
    },
    ignored=(*_GPT2.ignored, "position_ids"),  # 0, 1, 2, ... in old files
)

FORMATS = (_GPT2, _GPT1)
