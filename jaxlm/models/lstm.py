"""LSTM language model with the regularization of AWD-LSTM (Merity et al. 2017), and bidirectional LSTM encoder.

The code follows that of AWD-LSTM where it differs from the paper: ``recurrent.regularization`` has means instead of
norms, and the output head has a bias. Each gate has one bias, initialised with 0 (torch has two, which act as their
sum). The state has constant size.

Shapes: B batch, T time, D width of the last layer (twice that for both directions), V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxlm.models import recurrent
from jaxlm.nn.recurrence import lstm, lstm_specs, lstm_state_specs


@dataclasses.dataclass(frozen=True)
class Config(recurrent.RecurrentConfig):
    """Shape and behaviour of an LSTM. The defaults are AWD-LSTM on the Penn Treebank (24M parameters)."""


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
    dropped, _, state = recurrent.apply(cfg, lstm, params, tokens, state, segment_ids, key)
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
    return recurrent.apply(cfg, lstm, params, tokens, state, segment_ids, key)


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
    return recurrent.specs(cfg, lstm_specs)


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """The specs of the state for any ``length``: ``hidden`` and ``cell`` of each layer, and each row's last document.

    Raises:
        TypeError: the model reads in both directions.
    """
    return recurrent.state_specs(cfg, batch, lstm_state_specs)


def _zaremba(width: int, rate: float, bound: float) -> Config:
    """Zaremba et al. 2014 ("Recurrent Neural Network Regularization") on the Penn Treebank."""
    return Config(
        num_layers=2, embed_dim=width, hidden_dim=width, tie_embeddings=False, embedding_dropout=0.0,
        input_dropout=rate, hidden_dropout=rate, output_dropout=rate, weight_dropout=0.0, dropout_mask="fresh",
        init_bound=bound, recurrent_init_bound=bound,
    )  # fmt: skip


VARIANTS = {
    "awd-lstm": Config(),
    "lstm-zaremba-medium": _zaremba(650, 0.5, 0.05),
    "lstm-zaremba-large": _zaremba(1500, 0.65, 0.04),
    # Larger initial weights: with the default bound, the gradients of so small a model are too small to learn quickly.
    "lstm-tiny": Config(
        vocab_size=128, num_layers=2, embed_dim=24, hidden_dim=48, init_bound=1.0, recurrent_init_bound=0.5
    ),
    "lstm-encoder-tiny": Config(
        vocab_size=128,
        num_layers=2,
        embed_dim=24,
        hidden_dim=16,
        recurrent_init_bound=0.5,
        direction="both",
        task="classification",
    ),
}
