"""RoBERTa (Liu et al. 2019): BERT trained longer on more text, with new masks in each epoch and no next-sentence head.

The encoder is the same as in :mod:`jaxlm.models.bert`, with these differences. By default, there is one token type, and
epsilon is 1e-5. The first token of a document has row 2 of the position table, and rows 0 and 1 are not used: the
authors' positions begin at 2, the padding id (1) plus 1. The classifier has its own dense layer instead of the pooler.

Shapes: as in ``bert``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlm.models import bert, heads
from jaxlm.nn.dropout import dropout
from jaxlm.nn.linear import linear
from jaxlm.spec import Params, fold_in_name

FIRST_POSITION = 2
"""Row of the position table for the first token: the padding id plus 1."""


@dataclasses.dataclass(frozen=True)
class Config(bert.Config):
    """Shape and behavior of a RoBERTa. The defaults are the published base model."""

    first_position: ClassVar[int] = FIRST_POSITION

    vocab_size: int = 50265
    """Number of token ids."""
    num_token_types: int = 1
    """Number of token types. RoBERTa has only one type, because separators mark the sentences."""
    norm_epsilon: float = 1e-5
    """Added to the variance in layer norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.next_sentence:
            raise ValueError("next_sentence=True: RoBERTa has no next-sentence head, use family 'bert'")


apply = bert.apply
logits = bert.logits


def pool(
    cfg: Config,
    params: Params,
    hidden: jax.Array,
    segment_ids: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The pooled output [B, 1, D], from the hidden state h of each row's first token, <s>.

    For task classification, the pooled output is ``tanh(dense(h))`` with the classifier's own dense layer. With a
    ``key``, dropout is applied to ``h`` and to the pooled output. For other tasks, see :func:`bert.pool`.
    """
    if cfg.task != "classification":
        return bert.pool(cfg, params, hidden, segment_ids, key)
    rate = bert.classifier_dropout(cfg)
    first_token = dropout(heads.first_token_hidden(hidden, segment_ids), rate, fold_in_name(key, "classifier_dense"))
    return dropout(jnp.tanh(linear(params["classifier_dense"], first_token)), rate, fold_in_name(key, "classifier"))


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters."""
    tree = bert.specs(cfg)
    if cfg.task == "classification":
        tree["classifier_dense"] = tree.pop("pooler")
    return tree


VARIANTS = {
    "roberta-base": Config(),
    "roberta-large": Config(num_layers=24, num_heads=16, embed_dim=1024),
    "roberta-tiny": Config(vocab_size=128, max_positions=64, num_layers=2, num_heads=4, embed_dim=32),
}
