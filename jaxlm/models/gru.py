"""GRU language model and bidirectional GRU encoder (cell: Cho et al. 2014; sequence models: Chung et al. 2014).

The model is that of ``jaxlm.models.lstm`` with a GRU cell instead of an LSTM cell. The update is
``h' = (1 - z) * n + z * h``, as in Cho et al., torch and cuDNN. Chung et al. exchange z and 1 - z. The gates r and z
have one bias each (torch has two, which act as their sum). With ``reset="after"``, the candidate n has two biases, as
in torch. All biases are initially 0.

Shapes: B batch, T time, D width of the output (the width of the last layer; with both directions, twice this width),
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools

from jaxlm.models import recurrent
from jaxlm.nn.recurrence import GRUReset, gru, gru_specs, gru_state_specs


@dataclasses.dataclass(frozen=True)
class Config(recurrent.RecurrentConfig):
    """Shape and behavior of a GRU. By default, the number and the widths of the layers are those of the medium LSTM of
    Zaremba et al. 2014. The other defaults are those of ``RecurrentConfig``.
    """

    num_layers: int = 2
    """Number of layers."""
    embed_dim: int = 650
    """Width of the embeddings, and of the last layer if tie_embeddings is True and the direction is forward."""
    hidden_dim: int = 650
    """Width of each direction of a layer. The last layer has the width embed_dim instead if tie_embeddings is True and
    the direction is forward."""
    reset: GRUReset = "after"
    """after: the reset gate acts after the product with the hidden weights (torch, cuDNN). before: it acts before this
    product (Cho et al.)."""

    @property
    def cell(self) -> recurrent.LayerFunctions:
        return recurrent.LayerFunctions(gru, functools.partial(gru_specs, reset=self.reset), gru_state_specs)


apply = recurrent.apply
apply_with_outputs = recurrent.apply_with_outputs
carried_state_length = recurrent.carried_state_length
logits = recurrent.logits
pool = recurrent.pool
specs = recurrent.specs
state_specs = recurrent.state_specs

# With the default bound of the initial weights, the gradients of such a small model would be too small to learn in a
# few steps.
_TINY = Config(vocab_size=128, num_layers=2, embed_dim=24, hidden_dim=48, init_bound=0.5, recurrent_init_bound=0.5)
VARIANTS = {
    "gru-tiny": _TINY,
    "gru-encoder-tiny": dataclasses.replace(
        _TINY, hidden_dim=16, init_bound=0.1, direction="both", task="classification"
    ),
}
