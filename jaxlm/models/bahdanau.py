"""The Bahdanau form of ``jaxlm.models.attention_rnn``: RNNsearch (Bahdanau et al. 2015).

The encoder is a bidirectional GRU, and the decoder is a GRU. The decoder attends with the state *before* the token,
s[t-1]. The context vector is an input of the decoder's GRU. A maxout layer reads s[t-1], the embedding and the context
vector; the head reads the output of the maxout layer. The decoder's initial state is tanh(W h + b), where h is the
state of the backward encoder at the first source token.

The maxout layer reads s[t-1] instead of s[t], as in appendix A.2.2 of the paper and in the authors' code (GroundHog).
The reset gate of both GRUs is applied before the recurrent matmul, as in the paper. The update gate z is the weight of
the old state, as in ``jaxlm.nn.recurrence``. In the paper, z is the weight of the new state.

Shapes: B batch, T target time, S source time, E embedding, C = 2H encoder width, G gates, H hidden width, D width of
the head's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxlm.models import recurrent
from jaxlm.nn import recurrence
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.sharding import constrain
from jaxlm.spec import ArraySpec, Params, State, Uniform

if TYPE_CHECKING:
    from jaxlm.models.attention_rnn import Config


def encode(
    cfg: Config, weights: Params, x_BSE: jax.Array, segments_BS: jax.Array, key: jax.Array | None
) -> dict[str, Any]:
    """The states of both directions at each source token: {"encoded": [B, S, C]}."""
    encoded = recurrent.bidirectional(recurrence.gru, weights, x_BSE, segments_BS)
    return {"encoded": constrain(encoded, ("batch", None, "activation_embed"))}


def initial_states(cfg: Config, weights: Params, source: dict[str, Any], in_document_BTS: jax.Array) -> dict[str, Any]:
    """For each target position, the decoder's initial state of the document that contains the position, [B, T, ...].

    A row may contain several documents; ``in_document_BTS`` says which source tokens belong to the document of a target
    position. The state is computed from the encoder's backward state at the first source token of the document.
    """
    first_BT = jnp.argmax(in_document_BTS, axis=-1)
    encoded_BTC = jnp.take_along_axis(source["encoded"], first_BT[:, :, None], axis=1)
    backward_BTH = encoded_BTC[:, :, cfg.hidden_dim :]
    return {"layer_0": {"hidden": jnp.tanh(linear(weights["begin"], backward_BTH)).astype(jnp.float32)}}


def step(
    cfg: Config,
    params: Params,
    attend: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    projected_BGH: jax.Array,
    state: State,
    key: jax.Array | None,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """The next state, and the outputs of the step: s[t-1], c[t] and the attention weights (appendix A.2.2)."""
    weights = params["decoder"]
    state_BH = state["layer_0"]["hidden"].astype(projected_BGH.dtype)
    context_BC, weights_BS = attend(state_BH)
    projected_BGH = projected_BGH + linear(weights["context"], context_BC)
    new_state = {"layer_0": recurrence.gru_cell(weights["layer_0"], projected_BGH, state["layer_0"])}
    return new_state, {"state": state_BH, "context": context_BC, "weights": weights_BS}


def features(weights: Params, x_BTE: jax.Array, outputs: dict[str, jax.Array]) -> jax.Array:
    """The input of the head, [B, T, D]: the maximum of each pair of units of U s + V e + C c + b.

    This is a maxout layer (Goodfellow et al. 2013).
    """
    inputs = {"state": outputs["state"], "embedding": x_BTE, "context": outputs["context"]}
    pairs_BTD2 = sum(linear(weights[name], x) for name, x in inputs.items())
    return jnp.max(pairs_BTD2, axis=-1)


def specs(cfg: Config, init: Uniform, recurrent_init: Uniform | None) -> dict[str, Any]:
    """The specs of encoder, decoder and output layer."""
    E, H, D, C = cfg.embed_dim, cfg.hidden_dim, cfg.output_dim, 2 * cfg.hidden_dim
    layer = recurrence.gru_specs(E, H, recurrent_init, reset="before")
    return {
        "encoder": {"forward": layer, "backward": layer},
        "decoder": {
            "begin": linear_specs((H, H), ("embed", "mlp"), init),
            "layer_0": layer,
            "context": linear_specs((C, 3, H), ("embed", None, "mlp"), init, bias=False),  # the paper's C_r, C_z and C
        },
        "output": {
            "state": linear_specs((H, D, 2), ("embed", "mlp", None), init),
            "embedding": linear_specs((E, D, 2), ("embed", "mlp", None), init, bias=False),
            "context": linear_specs((C, D, 2), ("embed", "mlp", None), init, bias=False),
        },
    }


def encoder_width(cfg: Config) -> int:
    """The width C of the encoded source."""
    return 2 * cfg.hidden_dim


def state_specs(
    cfg: Config, batch: int, source_spec: Callable[[int, Any], ArraySpec]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The specs of the decoder's state, and ``{}``: this form adds no arrays to the source state."""
    return {"layer_0": recurrence.gru_state_specs(batch, cfg.hidden_dim)}, {}
