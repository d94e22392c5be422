"""LSTM language model with the regularization of AWD-LSTM (Merity et al. 2017), and bidirectional LSTM encoder.

Where the published code of AWD-LSTM differs from the paper, this model follows the code: ``recurrent.regularization``
computes means of squares instead of L2 norms, and the output head has a bias. Each gate has one bias, which is
initially 0 (torch has two, which act as their sum). The size of the state does not depend on the length of the text.

Shapes: B batch, T time, D width of the output (the width of the last layer; with both directions, twice this width),
V vocabulary.
"""

from __future__ import annotations

import dataclasses

from jaxlm.models import recurrent
from jaxlm.nn.recurrence import lstm, lstm_specs, lstm_state_specs


@dataclasses.dataclass(frozen=True)
class Config(recurrent.RecurrentConfig):
    """Shape and behavior of an LSTM. The defaults are AWD-LSTM on the Penn Treebank (24M parameters)."""

    @property
    def cell(self) -> recurrent.LayerFunctions:
        return recurrent.LayerFunctions(lstm, lstm_specs, lstm_state_specs)


apply = recurrent.apply
apply_with_outputs = recurrent.apply_with_outputs
carried_state_length = recurrent.carried_state_length
logits = recurrent.logits
pool = recurrent.pool
specs = recurrent.specs
state_specs = recurrent.state_specs


def _zaremba(width: int, rate: float, bound: float) -> Config:
    """The model of Zaremba et al. 2014 ("Recurrent Neural Network Regularization") for the Penn Treebank.

    Args:
        width: width of the embeddings and the layers.
        rate: dropout rate.
        bound: bound of the uniform initial weights.
    """
    return Config(
        num_layers=2, embed_dim=width, hidden_dim=width, tie_embeddings=False, embedding_dropout=0.0,
        input_dropout=rate, hidden_dropout=rate, output_dropout=rate, weight_dropout=0.0, dropout_mask="fresh",
        init_bound=bound, recurrent_init_bound=bound,
    )  # fmt: skip


# With the default bound of the initial weights, the gradients of such a small model would be too small to learn in a
# few steps.
_TINY = Config(vocab_size=128, num_layers=2, embed_dim=24, hidden_dim=48, init_bound=1.0, recurrent_init_bound=0.5)
VARIANTS = {
    "awd-lstm": Config(),
    "lstm-zaremba-medium": _zaremba(650, 0.5, 0.05),
    "lstm-zaremba-large": _zaremba(1500, 0.65, 0.04),
    "lstm-tiny": _TINY,
    "lstm-encoder-tiny": dataclasses.replace(
        _TINY, hidden_dim=16, init_bound=0.1, direction="both", task="classification"
    ),
}
