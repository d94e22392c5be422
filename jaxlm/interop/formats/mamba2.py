"""Format of :mod:`jaxlm.models.mamba2`: Mamba-2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.interop.formats.format import TRANSPOSED, Format
from jaxlm.models.mamba2 import Config, num_heads

_INFINITY = {"__float__": "Infinity"}
"""How transformers 5 writes infinity in ``config.json``. Older versions write ``Infinity``, which is not valid JSON."""


def _read_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    heads, head_dim = config.get("num_heads", 128), config.get("head_dim", 64)
    width = config.get("expand", 2) * config.get("hidden_size", 4096)
    if type(heads) is not int or heads * head_dim != width:
        raise ValueError(f"num_heads={heads!r} with head_dim={head_dim} must equal expand * hidden_size = {width}")
    limit = config.get("time_step_limit", [0.0, math.inf])
    if not isinstance(limit, list) or len(limit) != 2:
        raise ValueError(f"time_step_limit={limit!r} must be a list of two numbers")
    low, high = (math.inf if x == _INFINITY else x for x in limit)
    if not all(type(x) in (int, float) for x in (low, high)) or math.isinf(low):
        raise ValueError(f"time_step_limit={limit!r} must be a list of two numbers, and the first must be finite")
    return {"dt_limit_min": low, "dt_limit_max": None if high == math.inf else high}


def _write_fields(cfg: Config) -> dict[str, Any]:
    high = math.inf if cfg.dt_limit_max is None else cfg.dt_limit_max
    return {"num_heads": num_heads(cfg), "time_step_limit": [cfg.dt_limit_min, high]}


_MIXER = "layers.{layer}.mixer."

FORMATS = (
    Format(
        architectures={"Mamba2ForCausalLM": {"task": "causal"}, "Mamba2Model": {"task": "none"}},
        model_type="mamba2",
        prefix="backbone.",
        default_fields={
            "vocab_size": 32768,
            "embed_dim": 4096,
            "num_layers": 64,
            "num_groups": 8,
            "init_stddev": 0.1,
            "tie_embeddings": False,
            "norm_before_gate": False,
        },
        hf_name_of_field={
            "vocab_size": "vocab_size",
            "num_layers": "num_hidden_layers",
            "embed_dim": "hidden_size",
            "expand": "expand",
            "head_dim": "head_dim",
            "state_size": "state_size",
            "num_groups": "n_groups",
            "conv_width": "conv_kernel",
            "linear_bias": "use_bias",
            "conv_bias": "use_conv_bias",
            "norm_epsilon": "layer_norm_epsilon",
            "residual_in_float32": "residual_in_fp32",
            "tie_embeddings": "tie_word_embeddings",
            "init_stddev": "initializer_range",
            "init_dt_min": "time_step_min",
            "init_dt_max": "time_step_max",
            "init_dt_floor": "time_step_floor",
        },
        read_fields=_read_fields,
        write_fields=_write_fields,
        required={"hidden_act": "silu", "rms_norm": True},
        token_ids={"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
        # Some tensors contain several parameters: in_proj has z, x, B, C and dt in this order; conv1d has x, B and C.
        tensors={
            "token_embedding": "embeddings.weight",
            "layers/norm/scale": "layers.{layer}.norm.weight",
            "layers/mixer/zx/weight": _MIXER + "in_proj.weight",
            "layers/mixer/BC/weight": _MIXER + "in_proj.weight",
            "layers/mixer/dt/weight": _MIXER + "in_proj.weight",
            "layers/mixer/zx/bias": _MIXER + "in_proj.bias",
            "layers/mixer/BC/bias": _MIXER + "in_proj.bias",
            "layers/mixer/dt/bias": _MIXER + "in_proj.bias",
            "layers/mixer/x_convolution/weight": _MIXER + "conv1d.weight",
            "layers/mixer/BC_convolution/weight": _MIXER + "conv1d.weight",
            "layers/mixer/x_convolution/bias": _MIXER + "conv1d.bias",
            "layers/mixer/BC_convolution/bias": _MIXER + "conv1d.bias",
            "layers/mixer/dt_bias": _MIXER + "dt_bias",
            "layers/mixer/A_log": _MIXER + "A_log",
            "layers/mixer/D": _MIXER + "D",
            "layers/mixer/norm/scale": _MIXER + "norm.weight",
            "layers/mixer/output/weight": _MIXER + "out_proj.weight",
            "layers/mixer/output/bias": _MIXER + "out_proj.bias",
            "final_norm/scale": "norm_f.weight",
        },
        unprefixed_tensors={"head": "lm_head.weight"},
        tied_tensors={"lm_head.weight": "token_embedding"},  # in files of models with a tied head
        layouts={
            "layers/mixer/zx/weight": ((1, 2), (0,)),
            "layers/mixer/zx/bias": ((0, 1),),
            **{f"layers/mixer/{name}/weight": TRANSPOSED for name in ("BC", "dt", "output")},
            # A depthwise convolution of torch has a weight of shape [channels, 1, taps].
            **{f"layers/mixer/{name}_convolution/weight": ((1,), (), (0,)) for name in ("x", "BC")},
        },
        renamed={"backbone.embedding.weight": "backbone.embeddings.weight"},  # the name in files of the authors' code
    ),
)
