"""The Luong form of ``jaxlm.models.attention_rnn``: stacked LSTMs with attention (Luong et al. 2015).

The initial states of the decoder are the final states of the encoder. The query of attention is the state of the last
decoder layer *after* token t, h[t]. The result is the context vector c[t]. The head reads the attentional state
h~[t] = tanh(W_c [c[t]; h[t]]). The first layer of the decoder also reads h~[t], at token t + 1 (input feeding).

Shapes: B batch, T target time, S source time, E embedding width, C = H encoder width, G gates, H hidden width, D width
of the head's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxlm.nn import recurrence
from jaxlm.nn.dropout import dropout
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.segments import segment_boundaries
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Params, State, Uniform, fold_in_name

if TYPE_CHECKING:
    from jaxlm.models.attention_rnn import Config


def encode(cfg: Config, weights: Params, x: jax.Array, segments_BS: jax.Array, key: jax.Array | None) -> dict[str, Any]:
    """A dict with ``encoded``, the hidden states of the last layer [B, S, H], and ``states``, the states of all layers.

    The states of a layer are ``hidden`` and ``cell`` after each token, [B, S, H] float32.
    """
    reset, keep, _ = segment_boundaries(segments_BS)
    states: dict[str, Any] = {}
    for name in _layer_names(cfg):
        if states:
            x = dropout(x, cfg.dropout, fold_in_name(key, name))
        states[name] = recurrence.lstm_states(weights[name], x, reset, keep)
        x = constrain(states[name]["hidden"].astype(x.dtype), ("batch", None, "activation_embed"))
    return {"encoded": x, "states": states}


def initial_states(cfg: Config, weights: Params, source: dict[str, Any], in_document_BTS: jax.Array) -> dict[str, Any]:
    """The decoder's initial state for the document of each target position, [B, T, ...].

    The state contains the encoder's states after the last source token of the document, and zeros for ``feed``. For a
    document without source tokens, the caller must replace the state.

    Args:
        source: the result of :func:`encode`.
        in_document_BTS: whether each source token belongs to the document of each target position.
    """
    last_BT = in_document_BTS.shape[-1] - 1 - jnp.argmax(jnp.flip(in_document_BTS, axis=-1), axis=-1)
    states = jax.tree.map(
        lambda x_BSH: jnp.take_along_axis(x_BSH, last_BT[:, :, None], axis=1), source["states"]
    )  # fmt: skip
    return {**states, "feed": jnp.zeros((*last_BT.shape, cfg.output_dim))}


def step(
    cfg: Config,
    params: Params,
    attend: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    projected_BGH: jax.Array,
    state: State,
    key: jax.Array | None,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The next state, and the outputs of the step: h[t], c[t], the attention weights and h~[t] (section 3).

    Args:
        attend: a function from a query [B, H] to the context vector [B, C] and the attention weights [B, S].
        projected_BGH: the contribution of the token's embedding to the gates of the first layer.
    """
    weights, output, dtype = params["decoder"], params["output"], projected_BGH.dtype
    projected_BGH = projected_BGH + linear(weights["feed"], state["feed"].astype(dtype))
    new_state = {"layer_0": recurrence.lstm_cell(weights["layer_0"], projected_BGH, state["layer_0"])}
    x_BH = new_state["layer_0"]["hidden"].astype(dtype)
    for name in _layer_names(cfg)[1:]:
        projected_BGH = recurrence.project(weights[name], dropout(x_BH, cfg.dropout, fold_in_name(key, name)))
        new_state[name] = recurrence.lstm_cell(weights[name], projected_BGH, state[name])
        x_BH = new_state[name]["hidden"].astype(dtype)
    context_BC, weights_BS = attend(x_BH)
    attentional_BD = jnp.tanh(linear(output["state"], x_BH) + linear(output["context"], context_BC))
    outputs = {"state": x_BH, "context": context_BC, "weights": weights_BS, "attentional": attentional_BD}
    return {**new_state, "feed": attentional_BD.astype(jnp.float32)}, outputs


def features(weights: Params, x_BTE: jax.Array, outputs: dict[str, jax.Array]) -> jax.Array:
    """The input of the head: the attentional states h~, [B, T, D]."""
    return outputs["attentional"]


def specs(cfg: Config, init: Uniform, recurrent_init: Uniform | None) -> dict[str, Any]:
    """The specs of encoder, decoder and output layer."""
    E, H, D = cfg.embed_dim, cfg.hidden_dim, cfg.output_dim
    layers = {name: recurrence.lstm_specs(H if i else E, H, recurrent_init) for i, name in enumerate(_layer_names(cfg))}
    return {
        "encoder": layers,
        "decoder": {**layers, "feed": linear_specs((D, 4, H), ("embed", None, "mlp"), init, bias=False)},
        "output": {  # the two halves of the paper's W_c
            "state": linear_specs((H, D), ("embed", "mlp"), init),
            "context": linear_specs((H, D), ("embed", "mlp"), init, bias=False),
        },
    }


def encoder_width(cfg: Config) -> int:
    """The width C of the encoded source."""
    return cfg.hidden_dim


def state_specs(
    cfg: Config, batch: int, source_spec: Callable[[int, Any], ArraySpec]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The specs of the decoder's state, and ``{"states": specs}``, the entry that this form adds to the source state.

    Args:
        source_spec: a function ``(width, dtype)`` that returns the spec of an array [B, S, width].
    """
    decoder: dict[str, Any] = {
        name: recurrence.lstm_state_specs(batch, cfg.hidden_dim) for name in _layer_names(cfg)
    }  # fmt: skip
    decoder["feed"] = ArraySpec((batch, cfg.output_dim), ("batch", "activation_embed"))
    state = {name: source_spec(cfg.hidden_dim, jnp.float32) for name in ("hidden", "cell")}
    return decoder, {"states": dict.fromkeys(_layer_names(cfg), state)}


def _layer_names(cfg: Config) -> list[str]:
    return [f"layer_{index}" for index in range(cfg.num_layers)]
