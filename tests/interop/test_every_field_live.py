"""Every field of every reference configuration, changed alone: jaxlm computes what transformers computes, or refuses
the field by name. Run with ``-m live``.

The fields are those of the configuration class, those that its model reads beside them, and their aliases. Each is set
to several values of its type in ``config.json``.
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
from tests.helpers import relative_error
from tests.interop.classes import CLASSES
from tests.interop.test_classes_live import torch_class
from tests.oracles.xlnet import perm_mask, target_mapping

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

B, T, P = 2, 24, 5
LOWEST, HIGHEST = 7, 18
"""Tokens are above the special ids and below the smallest vocabulary."""

TOKENS = np.random.default_rng(0).integers(LOWEST, HIGHEST, (B, T)).astype(np.int32)
ORDER = np.stack([np.random.default_rng(row).permutation(T) for row in range(B)]).astype(np.int32)
TARGETS = np.argsort(ORDER, axis=1)[:, -P:].astype(np.int32)
"""A factorization order and the last of it, for XLNet's query stream: a query that sees nothing differs (see docs)."""

TABLES = {table.model_type: table for name in FAMILIES for table in formats.of(name)}
"""``model_type`` -> its last format, which has the general classes."""

_GPT: dict[str, Any] = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
_LLAMA: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
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
_ACTIVATION_FIELDS = ("activation_function", "afn", "hidden_act", "ff_activation", "dense_act_fn")
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
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2, ["sliding_attention", "full_attention"]],
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
    "proj_share_all_but_first": [False, True],
    "head_dim": [8, 4, 2, None],
    "d_kv": [8, 3],
    "relative_attention_num_buckets": [16, 7, 2, None],
    "mem_len": [3, 0, None],
    "sliding_window": [3, None, 100],
}
"""Values of fields whose words or structure a type does not tell."""

_DERIVED_FROM = (
    "feed_forward_proj", "num_hidden_layers", "num_layers", "use_sliding_window", "sliding_window", "max_window_layers",
    "cutoffs", "proj_share_all_but_first", "n_head", "d_model", "num_attention_heads", "hidden_size",
)  # fmt: skip
"""Fields from which transformers derives others: they are changed without and beside those."""

BESIDE: dict[str, tuple[str, ...]] = {
    "gpt2": ("classifier_dropout", "hidden_dropout", "summary_last_dropout", "n_ctx"),
    "llama": ("partial_rotary_factor",),
    "mistral": ("rope_scaling", "partial_rotary_factor", "layer_types"),
    "qwen2": ("head_dim", "partial_rotary_factor"),
    "xlnet": ("d_head", "summary_proj_to_labels", "summary_first_dropout", "use_cache"),
}
"""Fields that a model reads though its configuration class does not declare them, or that published files have."""

_BASE = (
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "num_labels",
)  # fmt: skip
"""Fields of the base class that ``to_dict`` may leave out."""

_UNREAD = {
    "what is returned beside the output":
        "return_dict output_hidden_states output_attentions torchscript use_cache use_mems_eval",
    "how or in which dtype it is computed, or nothing at all":
        "chunk_size_feed_forward reorder_and_upcast_attn pretraining_tp use_bfloat16 dtype torch_dtype n_ctx",
    "training: fresh weights, the loss, or dropout of heads that have none here":
        "initializer_factor init init_range problem_type tf_legacy_loss use_mems_train trainer_compatible "
        "summary_first_dropout summary_last_dropout classifier_dropout hidden_dropout",
    "metadata, which is kept, and read by whoever tokenizes or generates":
        "is_encoder_decoder pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id prefix "
        "task_specific_params tokenizer_class finetuning_task label2id",
    "read by other classes of transformers, but not by the one whose case it is":
        "id2label num_labels is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder "
        "pruned_heads summary_type summary_use_proj summary_activation summary_proj_to_labels start_n_top end_n_top "
        "layer_types partial_rotary_factor",
    "the length of the memory, which is an argument of init_state, and how much of it is reused": "mem_len reuse_len",
}  # fmt: skip
EXPLAINED = {field: reason for reason, fields in _UNREAD.items() for field in fields.split()}
"""Fields that jaxlm does not read, and what they are: the outputs must agree all the same."""


# ------------------------------------------------------------------------------------------------ the two sides


@functools.cache
def _class(architecture: str) -> Any:
    """The class of transformers, in a form that runs."""
    if architecture.startswith("TransfoXL"):
        from benchmarks.torch_models import transformer_xl_module  # imports torch

        return getattr(transformer_xl_module(), architecture)
    return torch_class(architecture)


class Reference:
    """A random reference model of one ``config.json`` and its output for the same tokens in every case."""

    def __init__(self, architecture: str, content: dict[str, Any]) -> None:
        import torch

        kind = _class(architecture)
        config = kind.config_class.from_dict(dict(content))
        torch.manual_seed(0)
        self.model = model = kind(config).eval()
        noise = torch.Generator().manual_seed(0)
        is_t5 = config.model_type in ("t5", "mt5", "umt5")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                matrix = "norm" not in name and "bias" not in name
                # Attention scores of T5 are not scaled: larger weights make rounding errors large.
                scale = 0.05 if is_t5 and matrix else 0.2
                parameter.copy_(matrix * parameter + scale * torch.randn(parameter.shape, generator=noise))
        model.tie_weights()  # with torchscript, copies
        if config.model_type == "transfo-xl" and not config.untie_r:  # it does not know that its layers share u and v
            layers = range(config.n_layer)
            model._dynamic_tied_weights_keys = [f"transformer.layers.{i}.dec_attn.r_[wr]_bias" for i in layers]
        ids = torch.from_numpy(TOKENS).long()
        given: dict[str, Any] = {"input_ids": ids}
        if config.model_type == "transfo-xl":  # it attends to zeros where no memory is given
            given["mems"] = [torch.zeros(0, B, config.d_model) for _ in range(config.n_layer)]
        elif is_t5 and not architecture.endswith("EncoderModel"):
            given |= {"decoder_input_ids": ids.flip(1), "use_cache": False}
        elif architecture == "XLNetLMHeadModel":
            given["perm_mask"] = torch.from_numpy(perm_mask(ORDER, TARGETS))
            given["target_mapping"] = torch.from_numpy(target_mapping(TARGETS, T))
        with torch.no_grad():
            output = model(**given, return_dict=True)
        names = ("prediction_scores", "logits", "last_hidden_state")
        self.output = next(getattr(output, name) for name in names if getattr(output, name, None) is not None).numpy()
        if not np.isfinite(self.output).all():
            raise ValueError("not finite")

    def same_as(self, other: Reference) -> bool:
        """Whether weights (by name) and output are those of another one, bit for bit."""
        one, two = self.model.state_dict(), other.model.state_dict()
        return (
            one.keys() == two.keys()
            and all(x.shape == two[name].shape and bool((x == two[name]).all()) for name, x in one.items())
            and np.array_equal(self.output, other.output)
        )


def ours(model: Model, params: Any) -> np.ndarray:
    """The output of jaxlm."""
    # What no output depends on shall not be compiled again.
    fields = [field.name for field in dataclasses.fields(model.config)]
    rates = dict.fromkeys([name for name in fields if name.endswith(("dropout", "init_stddev"))], 0.0)
    return np.asarray(_ours(Model(model.family, dataclasses.replace(model.config, **rates)), params))


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
_ours = jax.jit(_apply, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


# ---------------------------------------------------------------------------------------------------- the cases


def fields_of(model_type: str, config: Any) -> list[str]:
    """Every field of the reference class, what its model reads beside it, and aliases."""
    listed = [*signature(config), *config.to_dict(), *BESIDE.get(model_type, ()), *config.attribute_map, *_BASE]
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
        return ["something else"]  # no output of one call depends on them
    if field == "rope_scaling" and model_type != "llama":  # all Llamas share its reader
        found = _SCALINGS[::4]
    elif field in _WORDS:
        found = _WORDS[field]
    elif field in _ACTIVATION_FIELDS:
        found = _ACTIVATIONS
    elif isinstance(value, bool):
        found = [not value]
    elif isinstance(value, int):
        found = [2 * value, None]
    elif isinstance(value, float):
        found = [0.5 * value + 0.01, None]
    elif value is None:
        found = [2, "gelu"]
    else:
        found = ["something else"]
    return [one for one in found if one != value or type(one) is not type(value)]


def cases_of(model_type: str, architecture: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(field, value, the whole of ``config.json``): of what transformers writes, and of the least that it reads."""
    config, least = base_config(model_type, architecture)
    whole = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [architecture]}
    whole = {name: value for name, value in whole.items() if name not in ("transformers_version", "dtype")}
    for field in fields_of(model_type, config):
        before = getattr(config, field, None)
        for value in values_of(model_type, field, before):
            if field in (*signature(config), "num_labels"):
                yield field, value, {**least, field: value}
            if field not in signature(config) or field in _DERIVED_FROM:
                yield field, value, {**whole, field: value}
        default = type(config)().to_dict().get(field)
        small = not isinstance(default, int) or default <= 32
        if field in least and small:
            yield field, "missing", {name: value for name, value in least.items() if name != field}
            yield field, "missing", {name: value for name, value in whole.items() if name != field}


def base_config(model_type: str, architecture: str) -> tuple[Any, dict[str, Any]]:
    """The configuration of a tiny model, and the least ``config.json`` of it."""
    fields = dict(TINY[model_type])
    if architecture.endswith("ForSequenceClassification") and model_type != "roberta":
        fields["pad_token_id"] = 0  # without one, batches are refused
    least = {"model_type": model_type, "architectures": [architecture], **fields}
    return torch_class(architecture).config_class(**fields), least


class Search:
    """The cases of one class: ``judge`` says of each what jaxlm makes of it."""

    def __init__(self, architecture: str, least: dict[str, Any], directory: Path) -> None:
        self.architecture, self.directory = architecture, directory
        self.plain = Reference(architecture, least)
        model, params = self._load(self.plain, least)
        assert relative_error(ours(model, params), self.plain.output) < 1e-5
        self.config = model.config

    def _load(self, reference: Reference, content: dict[str, Any]) -> tuple[Model, Any]:
        self.directory.mkdir(exist_ok=True)
        reference.model.save_pretrained(self.directory)
        (self.directory / "config.json").write_text(json.dumps(content))
        return load_pretrained(self.directory)

    def judge(self, field: str, content: dict[str, Any]) -> str:
        """ "refused" by name; "invalid" for transformers; "read" or "unread"; or what is wrong."""
        try:
            described = config_json.describe(content, Path("config.json"), {}).model
        except ValueError as error:
            if field in str(error):
                return "refused"
            described = None
        try:
            reference = Reference(self.architecture, content)
        except Exception:  # of any kind: transformers checks little
            return "invalid"
        if described is not None and described.config == self.config and reference.same_as(self.plain):
            return "unread"
        try:
            model, params = self._load(reference, content)
            found = ours(model, params)
        except ValueError as error:
            table = TABLES[content["model_type"]]
            names = [field, *(ours for ours, theirs in table.fields.items() if theirs == field)]
            return "refused" if any(name in str(error) for name in names) else f"refused without its name: {error}"
        if found.shape != reference.output.shape:
            return f"has shape {found.shape}, but {reference.output.shape} in transformers"
        error = relative_error(found, reference.output)
        if not error < 1e-5:
            return f"differs by {error:.1e}"
        return "unread" if model.config == self.config else "read"


HEAD = ("label", "problem", "summary", "classifier", "pad_token", "finetuning", "n_top", "dropout")
"""Parts of the names of fields that heads read: the others are searched with the first class of a ``model_type``."""

SEARCHED = [
    (table.model_type, architecture)
    for _, table, architecture in CLASSES
    if architecture == next(iter(TABLES[table.model_type].architectures))
    or architecture.endswith("ForSequenceClassification")
]


@pytest.mark.parametrize(("model_type", "architecture"), SEARCHED, ids=[case[1] for case in SEARCHED])
def test_each_field_is_obeyed_or_refused_by_name(model_type: str, architecture: str, tmp_path: Path) -> None:
    import torch
    import transformers

    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    _, least = base_config(model_type, architecture)
    search = Search(architecture, least, tmp_path / "model")
    first = architecture == next(iter(TABLES[model_type].architectures))
    verdicts: dict[str, set[str]] = {}
    wrong = []
    for field, value, content in cases_of(model_type, architecture):
        if first or any(part in field for part in HEAD):
            verdict = search.judge(field, content)
            verdicts.setdefault(field, set()).add(verdict)
            if verdict not in ("refused", "invalid", "read", "unread"):
                wrong.append(f"{field}={value!r} {verdict}")
    unread = {field for field, found in verdicts.items() if not found & {"read", "refused"}}
    explained = {field for field in (*EXPLAINED, *_generation_fields()) if field in verdicts}
    wrong += [f"{field} is neither read nor explained" for field in sorted(unread - explained)]
    assert not wrong, "\n".join(wrong)
