"""Recurrent layers and their cells: LSTM and GRU. Their conventions are in ``jaxlm.nn.recurrence.cells``."""

from jaxlm.nn.recurrence.cells import (
    GRUReset,
    gru_cell,
    gru_specs,
    gru_state_specs,
    lstm_cell,
    lstm_specs,
    lstm_state_specs,
    project,
)
from jaxlm.nn.recurrence.layers import Implementation, gru, lstm

__all__ = [
    "GRUReset",
    "Implementation",
    "gru",
    "gru_cell",
    "gru_specs",
    "gru_state_specs",
    "lstm",
    "lstm_cell",
    "lstm_specs",
    "lstm_state_specs",
    "project",
]
