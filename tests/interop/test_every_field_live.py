"""Change each field of each transformers config: jaxlm gives the same output, or an error that names the field.

Run with ``-m live``. The fields are those of the config class, further fields that its model reads, and aliases. Each
test sets one field in ``config.json`` to several values of its type.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.interop import config_json, formats
from jaxlm.interop.huggingface import load_pretrained
from jaxlm.models import FAMILIES, Model
from jaxlm.testing.helpers import relative_error
from tests.interop.classes import TRANSFORMERS_CLASSES, declare_tied_head
from tests.interop.test_classes_live import torch_class
from tests.oracles import transformer_xl
from tests.oracles.xlnet import perm_mask, target_mapping

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

B, T, P = 2, 24, 5
LOWEST, HIGHEST = 7, 18
"""Tokens are above the special ids and inside the smallest vocabulary."""

TOKENS = np.random.default_rng(0).integers(LOWEST, HIGHEST, (B, T)).astype(np.int32)
ORDER = np.stack([np.random.default_rng(row).permutation(T) for row in range(B)]).astype(np.int32)
TARGETS = np.argsort(ORDER, axis=1)[:, -P:].astype(np.int32)
"""A factorization order and its last positions, for XLNet's query stream.

The first positions are not targets, because a query without visible tokens differs from transformers
(docs/families/index.md).
"""

TABLES = {table.model_type: table for name in FAMILIES for table in formats.of(name)}
"""``model_type`` -> its last format, which has the default classes."""

_GPT: dict[str, Any] = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
_LLAMA: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
_QWEN3_NEXT: dict[str, Any] = {
    **_LLAMA, "full_attention_interval": 2, "head_dim": 8, "partial_rotary_factor": 0.5, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6, "num_experts": 4,
    "num_experts_per_tok": 2, "mlp_only_layers": [0], "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    "rms_norm_eps": 0.03,
    "use_cache": False,  # the cache of transformers needs layers of both kinds
}  # fmt: skip
_BERT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20,
    "max_position_embeddings": 34, "type_vocab_size": 2,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "openai-gpt": _GPT,
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "sliding_window": 6},
    "qwen2": {**_LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "sliding_window": 6},
    "qwen3": {**_LLAMA, "head_dim": 6, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0},
    "qwen3_moe": {
        **_LLAMA, "head_dim": 6, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
        "use_sliding_window": True, "sliding_window": 6,
    },
    "qwen3_next": _QWEN3_NEXT,
    "smollm3": {
        **_LLAMA, "hidden_size": 32, "no_rope_layer_interval": 2, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gemma3_text": {
        **_LLAMA, "head_dim": 6, "sliding_window": 6, "query_pre_attn_scalar": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "bert": _BERT,
    "roberta": {**_BERT, "type_vocab_size": 1},
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "xlnet": {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 20},
    "transfo-xl": {
        "vocab_size": 40, "cutoffs": [20, 30], "div_val": 2, "n_layer": 2, "n_head": 2, "d_head": 5, "d_model": 16,
        "d_embed": 16, "d_inner": 20, "mem_len": 6, "clamp_len": 9, "same_length": True, "trainer_compatible": True,
    },
    "mamba2": {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 4, "state_size": 6,
        "n_groups": 2, "time_step_limit": [0.2, 1.5],
    },
    "bamba": {
        **_LLAMA, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6,
        "use_cache": False,  # otherwise transformers warns
    },
    "falcon_h1": {
        **_LLAMA, "mamba_d_ssm": None, "mamba_n_heads": 8, "mamba_n_groups": 2, "mamba_d_state": 6,
        "mamba_rms_norm": True, "key_multiplier": 0.5, "ssm_multipliers": [0.5, 0.75, 1.5, 0.65, 1.75],
        "use_cache": False,
    },
    "recurrent_gemma": {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "lru_width": 12, "attention_window_size": 32, "logits_soft_cap": 5.0,
    },
    "xlstm": {
        "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 4, "qk_dim_factor": 2.0,
        "gate_soft_cap": 4.0, "norm_eps": 1e-3, "use_cache": False,
    },
}  # fmt: skip
"""Fields of the tiny configurations that differ from the defaults of their class."""

_SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {"type": "linear", "factor": 3.0},
    {"rope_type": "default"},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 2.0], "long_factor": [2.0, 3.0]},
]  # fmt: skip
_ACTIVATION_FIELDS = ("activation_function", "afn", "hidden_act", "ff_activation", "dense_act_fn", "hidden_activation")
_ACTIVATIONS = [
    "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_10", "quick_gelu", "relu", "relu6", "relu2", "silu",
    "swish", "mish", "tanh", "sigmoid", "linear", "laplace", None,
]  # fmt: skip
_WORDS: dict[str, list[Any]] = {
    "position_embedding_type": ["relative_key", "relative_key_query"],
    "summary_type": ["first", "mean", "cls_index", "last"],
    "summary_activation": [None, "tanh", "relu"],
    "attn_type": ["uni", 1, 2, 3],
    "feed_forward_proj": ["gelu", "silu", "gated-gelu", "gated-relu", "gated-silu", "gelu_new"],
    "init": ["uniform", "normal"],
    "problem_type": ["regression", "multi_label_classification"],
    "finetuning_task": ["mnli"],
    "prefix": ["summarize: "],
    "tokenizer_class": ["BertTokenizer"],
    "rope_scaling": _SCALINGS,
    "layer_types": [
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["sliding_attention", "full_attention"],
        ["linear_attention"] * 2,
    ],
    "no_rope_layers": [[1, 1], [0, 1], [0, 0], [1], None],
    "no_rope_layer_interval": [1, 3],
    "use_bidirectional_attention": [True],
    "full_attention_interval": [1, 3, 0, None],
    "mlp_only_layers": [[1], [], [1, 0]],
    "id2label": [{"0": "a", "1": "b", "2": "c"}, {"0": "only"}],
    "label2id": [{"a": 0, "b": 1}],
    "num_labels": [3, 1, 2],
    "pruned_heads": [{"0": [1]}, {"1": [0, 2]}],
    "task_specific_params": [{"summarization": {"num_beams": 4}}],
    "cutoffs": [[10], [], [10, 20, 30]],
    "tie_projs": [[False, False, False], [True, True, True], [False, True, False]],
    "dtype": ["bfloat16", "float16"],
    "torch_dtype": ["bfloat16", "float16"],
    "max_window_layers": [1, 2, 5],
    "partial_rotary_factor": [0.5, 1.0],
    "block_types": [["attention"], ["recurrent", "attention"], ["mamba"], []],
    "proj_share_all_but_first": [False, True],
    "head_dim": [8, 4, 2, None],
    "d_kv": [8, 3],
    "relative_attention_num_buckets": [16, 7, 2, None],
    "mem_len": [3, 0, None],
    "sliding_window": [3, None, 100],
    "time_step_limit": [[0.0, 0.9], [0.5, float("inf")], [0.5], None, "none"],
    "time_step_rank": [1, "auto"],
    "expand": [1, 3, None],
    "attn_layer_indices": [[0, 1], [], [5], None, 1],
    "mamba_d_ssm": [16, 24, 20],
    "mamba_expand": [1, 3, None],
    "ssm_multipliers": [[1.0] * 5, [0.5], None, 2.0],
    "mlp_multipliers": [[0.5, 1.5], [0.5], None, 2.0],
    "mamba_n_heads": [4, 3, None],
    "mamba_n_groups": [1, 4, 3, None],
    "mamba_d_head": [4, 3, "auto"],
    "num_heads": [4, 16, None],
    "n_groups": [1, 4, 3, None],
    "qk_dim_factor": [1.0, 0.51, 3, 0.1, None],
    "ffn_round_up_to_multiple_of": [1, 10, 0, None],
    "weight_mode": ["fused"],
    "mode": ["train_with_padding"],
}
"""Values of fields whose valid values do not follow from their type."""

_DERIVED_FROM = (
    "feed_forward_proj", "num_hidden_layers", "num_layers", "use_sliding_window", "sliding_window", "max_window_layers",
    "cutoffs", "proj_share_all_but_first", "n_head", "d_model", "num_attention_heads", "hidden_size",
)  # fmt: skip
"""Fields from which transformers derives other fields. They are changed with and without the derived fields."""

UNDECLARED: dict[str, tuple[str, ...]] = {
    "gpt2": ("classifier_dropout", "hidden_dropout", "summary_last_dropout", "n_ctx"),
    "llama": ("partial_rotary_factor",),
    "mistral": ("rope_scaling", "partial_rotary_factor", "layer_types"),
    "mixtral": ("rope_scaling", "partial_rotary_factor", "layer_types"),
    "qwen2": ("head_dim", "partial_rotary_factor"),
    "qwen3": ("partial_rotary_factor",),
    "qwen3_moe": ("head_dim", "partial_rotary_factor", "layer_types", "max_window_layers"),
    "qwen3_next": ("full_attention_interval",),
    "bamba": ("head_dim",),
    "falcon_h1": ("head_dim", "mlp_bias", "attention_bias"),
    "xlnet": ("d_head", "summary_proj_to_labels", "summary_first_dropout", "use_cache"),
}
"""Fields that the config class does not declare, but that the model reads or published files have."""

_BASE = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "num_labels",
)  # fmt: skip
"""Fields of the base class that ``to_dict`` may leave out."""

_UNREAD = {
    "additional outputs":
        "return_dict output_hidden_states output_attentions torchscript use_cache use_mems_eval",
    "details or the dtype of the computation, or no effect":
        "chunk_size_feed_forward reorder_and_upcast_attn pretraining_tp use_bfloat16 dtype torch_dtype n_ctx "
        "chunk_size time_step_rank norm_reduction_force_float32 chunkwise_kernel sequence_kernel step_kernel mode "
        "return_last_states autocast_kernel_dtype inference_state_dtype max_inference_chunksize mamba_chunk_size "
        "num_logits_to_keep",
    "training: initial weights, the loss, or dropout of heads that have no dropout in jaxlm":
        "output_router_logits router_aux_loss_coef initializer_factor init init_range w_init_variance_scale "
        "final_w_init_variance_scale problem_type "
        "tf_legacy_loss use_mems_train trainer_compatible summary_first_dropout summary_last_dropout "
        "classifier_dropout hidden_dropout rescale_prenorm_residual z_loss_coefficient",
    "metadata for tokenization or generation, which jaxlm keeps":
        "is_encoder_decoder pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id prefix "
        "task_specific_params tokenizer_class finetuning_task label2id",
    "read by other classes of transformers, but not by the tested class":
        "id2label num_labels is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder "
        "pruned_heads summary_type summary_use_proj summary_activation summary_proj_to_labels start_n_top end_n_top "
        "layer_types partial_rotary_factor max_window_layers",
    "the length of the memory (an argument of init_state), and the number of reused tokens": "mem_len reuse_len",
}  # fmt: skip
EXPLAINED = {field: reason for reason, fields in _UNREAD.items() for field in fields.split()}
"""Fields that jaxlm does not read -> the reason. The outputs must still agree."""


# ------------------------------------------------------------------------------- outputs of transformers and jaxlm


@functools.cache
def _class(architecture: str) -> Any:
    """The class of transformers. ``benchmarks.torch_models`` corrects a cast in the class of Transformer-XL."""
    if architecture.startswith("TransfoXL"):
        from benchmarks.torch_models import transformer_xl_module  # imports torch

        return getattr(transformer_xl_module(), architecture)
    return torch_class(architecture)


class Reference:
    """A random transformers model for one ``config.json``, and its output for ``TOKENS``."""

    def __init__(self, architecture: str, content: dict[str, Any]) -> None:
        import torch

        model_class = _class(architecture)
        config = model_class.config_class.from_dict(dict(content))
        torch.manual_seed(0)
        self.model = model = model_class(config).eval()
        noise = torch.Generator().manual_seed(0)
        is_t5 = config.model_type in ("t5", "mt5", "umt5")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                matrix = "norm" not in name and "bias" not in name
                # Attention scores of T5 are not scaled: larger weights make rounding errors large.
                scale = 0.05 if is_t5 and matrix else 0.2
                parameter.copy_(matrix * parameter + scale * torch.randn(parameter.shape, generator=noise))
        model.tie_weights()  # with torchscript, this copies the weights
        declare_tied_head(model)
        ids = torch.from_numpy(TOKENS).long()
        inputs: dict[str, Any] = {"input_ids": ids}
        if config.model_type == "transfo-xl":  # without a given memory, the model attends to zeros
            inputs["mems"] = [torch.zeros(0, B, config.d_model) for _ in range(config.n_layer)]
        elif is_t5 and not architecture.endswith("EncoderModel"):
            inputs |= {"decoder_input_ids": ids.flip(1), "use_cache": False}
        elif architecture == "XLNetLMHeadModel":
            inputs["perm_mask"] = torch.from_numpy(perm_mask(ORDER, TARGETS))
            inputs["target_mapping"] = torch.from_numpy(target_mapping(TARGETS, T))
        with torch.no_grad():
            output = model(**inputs, return_dict=True)
        names = ("prediction_scores", "logits", "last_hidden_state")
        self.output = next(getattr(output, name) for name in names if getattr(output, name, None) is not None).numpy()
        if not np.isfinite(self.output).all():
            raise ValueError("not finite")

    def same_as(self, other: Reference) -> bool:
        """Whether the weights (by name) and the output equal those of ``other`` bitwise."""
        own_weights, other_weights = self.model.state_dict(), other.model.state_dict()
        return (
            own_weights.keys() == other_weights.keys()
            and all(
                x.shape == other_weights[name].shape and bool((x == other_weights[name]).all())
                for name, x in own_weights.items()
            )
            and np.array_equal(self.output, other.output)
        )


def jaxlm_output(model: Model, params: Any) -> np.ndarray:
    """The output of jaxlm."""
    # Without fields that do not affect the output, more configs are equal and use the same compiled function.
    fields = [field.name for field in dataclasses.fields(model.config)]
    rates = dict.fromkeys([name for name in fields if name.endswith(("dropout", "init_stddev"))], 0.0)
    return np.asarray(_jit_output(Model(model.family, dataclasses.replace(model.config, **rates)), params))


def _apply(model: Model, params: Any) -> jax.Array:
    if model.reads_source:
        hidden, _ = model.apply(params, TOKENS[:, ::-1], source=TOKENS)
    elif model.config.task == "permutation":
        hidden, _ = model.apply(params, TOKENS, order=ORDER, targets=TARGETS)
    else:
        hidden, _ = model.apply(params, TOKENS)
    if model.config.task == "none":
        return hidden
    if model.config.task == "classification":
        return model.logits(params, model.pool(params, hidden))[:, 0]
    return model.logits(params, hidden)


# Compiling takes most of the time.
_jit_output = jax.jit(_apply, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


# ---------------------------------------------------------------------------------------------------- the cases


def fields_of(model_type: str, config: Any) -> list[str]:
    """Every field of the config class, undeclared fields, and aliases."""
    listed = [*signature(config), *config.to_dict(), *UNDECLARED.get(model_type, ()), *config.attribute_map, *_BASE]
    names = [name for name in dict.fromkeys(listed) if not name.startswith("_")]
    return [name for name in names if name not in ("transformers_version", "model_type", "architectures")]


def _generation_fields() -> set[str]:
    from transformers import PretrainedConfig

    return set(PretrainedConfig._get_global_generation_defaults())


def signature(config: Any) -> list[str]:
    return [name for name in inspect.signature(type(config).__init__).parameters if name not in ("self", "kwargs")]


def values_of(model_type: str, field: str, value: Any) -> list[Any]:
    """Values other than ``value``, by its type."""
    if field in _generation_fields():
        return ["something else"]  # the output of one forward pass does not depend on them
    if field == "rope_scaling" and model_type != "llama":  # a few values are enough: all Llama formats share this code
        values = _SCALINGS[::4]
    elif field in _WORDS:
        values = _WORDS[field]
    elif field in _ACTIVATION_FIELDS:
        values = _ACTIVATIONS
    elif isinstance(value, bool):
        values = [not value]
    elif isinstance(value, int):
        values = [2 * value, None]
    elif isinstance(value, float):
        values = [0.5 * value + 0.01, None]
    elif value is None:
        values = [2, "gelu"]
    else:
        values = ["something else"]
    return [candidate for candidate in values if candidate != value or type(candidate) is not type(value)]


def cases_of(model_type: str, architecture: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield (field, value, ``config.json``) for a full config of transformers and for a minimal config."""
    config, minimal = base_config(model_type, architecture)
    full = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [architecture]}
    full = {name: value for name, value in full.items() if name not in ("transformers_version", "dtype")}
    for field in fields_of(model_type, config):
        before = getattr(config, field, None)
        for value in values_of(model_type, field, before):
            if field in (*signature(config), "num_labels"):
                yield field, value, {**minimal, field: value}
            if field not in signature(config) or field in _DERIVED_FROM:
                yield field, value, {**full, field: value}
        default = type(config)().to_dict().get(field)
        has_small_default = not isinstance(default, int) or default <= 32
        if field in minimal and has_small_default:
            yield field, "missing", {name: value for name, value in minimal.items() if name != field}
            yield field, "missing", {name: value for name, value in full.items() if name != field}


def base_config(model_type: str, architecture: str) -> tuple[Any, dict[str, Any]]:
    """The config of a tiny model, and its minimal ``config.json``."""
    fields = dict(TINY[model_type])
    if architecture.endswith("ForSequenceClassification") and model_type != "roberta":
        fields["pad_token_id"] = 0  # without a padding id, transformers rejects batches
    minimal = {"model_type": model_type, "architectures": [architecture], **fields}
    return torch_class(architecture).config_class(**fields), minimal


class ConfigComparison:
    """Compares jaxlm with one class of transformers; ``judge`` returns the verdict for one ``config.json``."""

    def __init__(self, architecture: str, minimal: dict[str, Any], directory: Path) -> None:
        self.architecture, self.directory = architecture, directory
        self.plain = Reference(architecture, minimal)
        model, params = self._load(self.plain, minimal)
        assert relative_error(jaxlm_output(model, params), self.plain.output) < 1e-5
        self.config = model.config

    def _load(self, reference: Reference, content: dict[str, Any]) -> tuple[Model, Any]:
        self.directory.mkdir(exist_ok=True)
        is_xl = reference.model.config.model_type == "transfo-xl"
        state = transformer_xl.state_to_save(reference.model) if is_xl else None
        reference.model.save_pretrained(self.directory, state_dict=state)
        (self.directory / "config.json").write_text(json.dumps(content))
        return load_pretrained(self.directory)

    def judge(self, field: str, content: dict[str, Any]) -> str:
        """The verdict for one ``config.json``, which differs from the default in ``field``.

        "refused": jaxlm raises an error that names the field. "invalid": transformers raises. "read" and "unread": the
        outputs are equal, and the field changes the config of jaxlm or does not. Other texts describe a problem.
        """
        try:
            described = config_json.describe_model(content, Path("config.json"), {}).model
        except ValueError as error:
            if field in str(error):
                return "refused"
            described = None
        try:
            reference = Reference(self.architecture, content)
        except Exception:  # transformers checks few fields, so any exception is possible
            return "invalid"
        if described is not None and described.config == self.config and reference.same_as(self.plain):
            return "unread"
        try:
            model, params = self._load(reference, content)
            output = jaxlm_output(model, params)
        except ValueError as error:
            table = TABLES[content["model_type"]]
            names = [
                field,
                *(jaxlm_output for jaxlm_output, theirs in table.hf_name_of_field.items() if theirs == field),
            ]
            return "refused" if any(name in str(error) for name in names) else f"refused without its name: {error}"
        if output.shape != reference.output.shape:
            return f"has shape {output.shape}, but {reference.output.shape} in transformers"
        error = relative_error(output, reference.output)
        if not error < 1e-5:
            return f"differs by {error:.1e}"
        return "unread" if model.config == self.config else "read"


HEAD = ("label", "problem", "summary", "classifier", "pad_token", "finetuning", "n_top", "dropout")
"""Parts of names of fields that heads read. All other fields are tested only with the first class of a type."""

TESTED_CLASSES = [
    (table.model_type, architecture)
    for _, table, architecture in TRANSFORMERS_CLASSES
    if architecture == next(iter(TABLES[table.model_type].architectures))
    or architecture.endswith("ForSequenceClassification")
]


@pytest.mark.parametrize(("model_type", "architecture"), TESTED_CLASSES, ids=[case[1] for case in TESTED_CLASSES])
def test_each_field_gives_equal_outputs_or_an_error_that_names_it(
    model_type: str, architecture: str, tmp_path: Path
) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    _, minimal = base_config(model_type, architecture)
    comparison = ConfigComparison(architecture, minimal, tmp_path / "model")
    is_first_class = architecture == next(iter(TABLES[model_type].architectures))
    verdicts: dict[str, set[str]] = {}
    problems = []
    for field, value, content in cases_of(model_type, architecture):
        if is_first_class or any(part in field for part in HEAD):
            verdict = comparison.judge(field, content)
            verdicts.setdefault(field, set()).add(verdict)
            if verdict not in ("refused", "invalid", "read", "unread"):
                problems.append(f"{field}={value!r} {verdict}")
    unread = {field for field, field_verdicts in verdicts.items() if not field_verdicts & {"read", "refused"}}
    explained = {field for field in (*EXPLAINED, *_generation_fields()) if field in verdicts}
    problems += [f"{field} is neither read nor explained" for field in sorted(unread - explained)]
    assert not problems, "\n".join(problems)
