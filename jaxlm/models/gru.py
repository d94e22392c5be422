"""GRU language model and bidirectional GRU encoder (Cho et al. 2014; as a language model, Chung et al. 2014).

The shape of ``jaxlm.models.lstm`` with another cell: reads one token after the other into a state of constant size.
``h' = (1 - z) * n + z * h`` as in torch and cuDNN; Chung et al. write it with z and 1 - z swapped. Gates r and z
have one bias each (torch has two, which act as their sum); all biases start at 0.

Legend: B batch, T time, D width of the last layer (twice that for both directions), V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, get_args

import jax

from jaxlm.models import common, heads, recurrent
from jaxlm.nn.recurrence import GRUReset, gru, gru_specs, gru_state_specs


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape and behaviour of a GRU. The defaults have the widths of Zaremba's medium LSTM (2014), with a tied head."""

    vocab_size: int = 10000
    """Number of token ids."""
    num_layers: int = 2
    """Number of layers."""
    embed_dim: int = 650
    """Width of the embeddings, and of the last layer before a tied head."""
    hidden_dim: int = 650
    """Width of each direction of the other layers."""
    direction: recurrent.Direction = "forward"
    """Read forward, or in both directions with the outputs side by side (an encoder)."""
    reset: GRUReset = "after"
    """Where the reset gate acts: after the product with the hidden weights (torch, cuDNN) or before it (Cho et al.)."""
    tie_embeddings: bool = True
    """Use the token table as output head (with task causal)."""
    embedding_dropout: float = 0.1
    """Rate at which whole word types are dropped from the embeddings, while training."""
    input_dropout: float = 0.4
    """Dropout rate on the embedded tokens, while training."""
    hidden_dropout: float = 0.25
    """Dropout rate between layers, while training."""
    output_dropout: float = 0.4
    """Dropout rate on the last layer's output, while training."""
    weight_dropout: float = 0.5
    """Dropout rate on the hidden-to-hidden weights (DropConnect), while training."""
    dropout_mask: recurrent.DropoutMask = "locked"
    """Dropout of activations: one mask for all steps of a row (locked), or one for each step (fresh)."""
    init_bound: float = 0.1
    """Initial embeddings and heads are uniform within this bound."""
    recurrent_init_bound: float | None = None
    """Initial weights of the layers are uniform within this bound; None means 1 / sqrt(width of the layer)."""
    task: heads.Task = "causal"
    """Which head the model has: causal, classification, tagging or none."""
    num_labels: int = 2
    """Number of labels (with task classification or tagging)."""
    vocab_multiple: int = 1
    """Pad the token table to a multiple of this many rows, so that it divides over devices."""
    dtype: common.ComputeDtype = "float32"
    """Compute dtype of activations; parameters keep their own, and the state is float32."""

    def __post_init__(self) -> None:
        recurrent.check(self)
        common.check_choices(self, reset=get_args(GRUReset))


def specs(cfg: Config) -> dict[str, Any]:
    """Every parameter of the model."""
    return recurrent.specs(cfg, functools.partial(gru_specs, reset=cfg.reset))


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, Any]:
    """``hidden`` of each layer, and the document that each row was in; ``length`` does not matter.

    Raises:
        TypeError: the model reads in both directions.
    """
    return recurrent.state_specs(cfg, batch, gru_state_specs)


def apply(
    cfg: Config,
    params: dict[str, Any],
    tokens: jax.Array,
    *,
    state: Any = None,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:
    """The last layer's outputs (dropped, when training), [B, T, D], and the new state (None without one).

    Args:
        tokens: [B, T] integer ids. An id outside the vocabulary gives NaN, there and from there on.
        state: from ``state_specs``; the tokens then continue what it has read.
        segment_ids: [B, T] int32, 0 padding, 1.. documents that do not see each other. Default: one document.
        key: random key for dropout; None is deterministic.
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
    """``apply`` for a loss with ``recurrent.regularization``: outputs after dropout, outputs before it, the state."""
    return recurrent.apply(cfg, gru, params, tokens, state, segment_ids, key)


def logits(cfg: Config, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """What the head of the task says: [B, T, V] (V padded to ``vocab_multiple``) or [B, T, labels] float32.

    Raises:
        ValueError: task none has no head.
    """
    return recurrent.logits(cfg, params, hidden)


def summary(
    cfg: Config,
    params: dict[str, Any],
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The largest value of each feature over the real tokens, [B, 1, D]: what the classifier reads.

    The maximum and not the mean, as Conneau et al. 2017 ("InferSent") find better for bidirectional encoders.
    """
    return recurrent.largest(hidden, segment_ids)


VARIANTS = {
    # Wide initial values: so small a model otherwise starts with too small gradients to learn anything in a few steps.
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
