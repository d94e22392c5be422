"""minGRU (Feng et al. 2024, "Were RNNs all we needed?") as a family outside the package.

Each layer is ``h_t = (1 - z_t) * h_{t-1} + z_t * c_t`` with the gate ``z = sigmoid(W_z x)`` and the candidate ``c = W_c
x``, both without the state. So the layer is a linear scan.

Shapes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.models import common
from jaxlm.nn.dropout import dropout
from jaxlm.nn.embedding import embed, round_up, unembed
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.norm import rms_norm, rms_norm_specs
from jaxlm.nn.scan import linear_scan
from jaxlm.nn.segments import segment_boundaries
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Normal, fold_in_name


@dataclasses.dataclass(frozen=True)
class Config(common.TransformerConfig):
    """Shape and behaviour of a minGRU language model."""

    vocab_size: int = 10000
    """Number of token ids."""
    num_layers: int = 4
    """Number of layers."""
    embed_dim: int = 256
    """Model width."""
    init_stddev: float = 0.02
    """Standard deviation of initial weights."""
    residual_dropout: float = 0.1
    """Dropout rate on the output of each layer."""


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """The hidden states after the last norm, [B, T, D], and the new state (None without a state)."""
    common.check_tokens(tokens, segment_ids, None, None)
    segments = common.segment_ids_or_ones(tokens, segment_ids)
    reset, keep, last_segment = segment_boundaries(segments, None if state is None else state["last_segment"])
    x = embed(params["token_embedding"], tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size)
    x = constrain(x, ("batch", "seq", "activation_embed"))

    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, layer_state, layer_key = layer
        projected = linear(weights["input"], rms_norm(weights["norm"], x, 1e-6))
        gate, candidate = jax.nn.sigmoid(projected[:, :, 0]), projected[:, :, 1]
        hidden, last = linear_scan(
            1.0 - gate, gate * candidate, None if layer_state is None else layer_state["hidden"],
            reset_BT=reset, keep_BT=keep,
        )  # fmt: skip
        out = dropout(linear(weights["output"], hidden), cfg.residual_dropout, fold_in_name(layer_key, "output"))
        x = constrain(x + out, ("batch", "seq", "activation_embed"))
        return x, None if layer_state is None else {"hidden": last}

    layers = None if state is None else state["layers"]
    x, layers = common.run_layers(block, x, params["layers"], layers, key, remat=cfg.remat, num_layers=cfg.num_layers)
    x = rms_norm(params["final_norm"], x, 1e-6)
    return x, None if state is None else {"layers": layers, "last_segment": last_segment}


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """The logits of the next token, [B, T, V] float32 (V padded to ``vocab_multiple``)."""
    return constrain(unembed(params["head"], hidden, cfg.vocab_size), ("batch", None, "vocab"))


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    D, V, normal = cfg.embed_dim, round_up(cfg.vocab_size, cfg.vocab_multiple), Normal(cfg.init_stddev)
    layer = {
        "norm": rms_norm_specs(D),
        "input": linear_specs((D, 2, D), ("embed", None, "mlp"), normal),
        "output": linear_specs((D, D), ("mlp", "embed"), normal, bias=False),
    }
    table = ArraySpec((V, D), ("vocab", "embed"), normal, decay=True)
    layers = spec.layers([layer] * cfg.num_layers, stacked=cfg.scan_layers)
    return {"token_embedding": table, "layers": layers, "final_norm": rms_norm_specs(D), "head": table}


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state for any ``length``: ``hidden`` of each layer, and the last document of each row."""
    layer = {"hidden": ArraySpec((batch, cfg.embed_dim), ("batch", "activation_embed"))}
    layers = spec.layers([layer] * cfg.num_layers, stacked=cfg.scan_layers)
    return {"layers": layers, "last_segment": ArraySpec((batch,), ("batch",), dtype=jnp.int32)}


def carried_state_length(cfg: Config) -> int:
    """The ``length`` of :func:`state_specs` for training along a text. The state has the same size for any length."""
    return 1


VARIANTS = {"mingru-tiny": Config(vocab_size=128, num_layers=2, embed_dim=32, init_stddev=0.1)}
