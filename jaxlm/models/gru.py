"""GRU language model and bidirectional GRU encoder (Cho et al. 2014; as a language model, Chung et al. 2014).

The model is that of ``jaxlm.models.lstm`` with another cell. The update is ``h' = (1 - z) * n + z * h`` as in torch and
cuDNN; Chung et al. exchange z and 1 - z. The gates r and z have one bias each (torch has two, which act as their sum).
All biases are initialised with 0.

Shapes: B batch, T time, D width of the last layer (twice that for both directions), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args

import jax

from jaxlm.models import common, recurrent
from jaxlm.nn.recurrence import GRUReset, gru, gru_specs, gru_state_specs


@dataclasses.dataclass(frozen=True)
class Config(recurrent.RecurrentConfig):
    """Shape and behaviour of a GRU. The defaults have the widths of Zaremba's medium LSTM (2014), with a tied head."""

    num_layers: int = 2
    """Number of layers."""
    embed_dim: int = 650
    """Width of the embeddings, and of the last layer if the output head is tied."""
    hidden_dim: int = 650
    """Width of each direction of the other layers."""
    reset: GRUReset = "after"
    """Where the reset gate acts: after the product with the hidden weights (torch, cuDNN) or before it (Cho et al.)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        common.check_choices(self, reset=get_args(GRUReset))


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """The outputs of the last layer after dropout, [B, T, D], and the new state (None without a state).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN for this token and all later ones.
        state: from ``state_specs``; the tokens continue the tokens in it.
        segment_ids: [B, T] int32, 0 for padding, 1, 2, ... for documents, which do not interact. Default: one document.
        key: random key for dropout; None: no dropout.
    """
    dropped, _, state = recurrent.apply(cfg, gru, params, tokens, state, segment_ids, key)
    return dropped, state


def apply_with_outputs(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """The outputs after and before dropout, and the new state: :func:`apply` for ``recurrent.regularization``."""
    return recurrent.apply(cfg, gru, params, tokens, state, segment_ids, key)


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """The logits of the task's head, float32: next token [B, T, V] (V padded to ``vocab_multiple``), or labels.

    Labels are described in ``heads.head_logits``; for classification, ``hidden`` comes from :func:`pool`.

    Raises:
        ValueError: the task is none, so there is no head.
    """
    return recurrent.logits(cfg, params, hidden)


def pool(
    cfg: Config,
    params: dict[str, Any],
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The input of the classifier: the maximum of each feature over the real tokens, [B, 1, D].

    Conneau et al. 2017 ("InferSent") find max pooling better than mean pooling for bidirectional encoders.
    """
    return recurrent.largest(hidden, segment_ids)


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    return recurrent.specs(cfg, functools.partial(gru_specs, reset=cfg.reset))


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state for any ``length``: ``hidden`` of each layer, and each row's last document.

    Raises:
        TypeError: the model reads in both directions.
    """
    return recurrent.state_specs(cfg, batch, gru_state_specs)


VARIANTS = {
    # Larger initial weights: with the default bound, the gradients of so small a model are too small to learn quickly.
    "gru-tiny": Config(
        vocab_size=128, num_layers=2, embed_dim=24, hidden_dim=48, init_bound=0.5, recurrent_init_bound=0.5
    ),
    "gru-encoder-tiny": Config(
        vocab_size=128,
        num_layers=2,
        embed_dim=24,
        hidden_dim=16,
        recurrent_init_bound=0.5,
        direction="both",
        task="classification",
    ),
}
