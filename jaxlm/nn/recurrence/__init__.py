"""Recurrent layers (LSTM, GRU, RG-LRU, sLSTM), and LSTM and GRU cells (conventions: ``jaxlm.nn.recurrence.cells``)."""

from jaxlm.nn.recurrence.cells import (
    GRUReset,
    gru_cell,
    gru_specs,
    gru_state_specs,
    lstm_cell,
    lstm_specs,
    lstm_state_specs,
    project,
    project_time_major,
)
from jaxlm.nn.recurrence.layers import Implementation, gru, lstm, lstm_states
from jaxlm.nn.recurrence.rg_lru import rg_lru, rg_lru_specs
from jaxlm.nn.recurrence.slstm import slstm, slstm_specs, slstm_state_specs

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
    "lstm_states",
    "project",
    "project_time_major",
    "rg_lru",
    "rg_lru_specs",
    "slstm",
    "slstm_specs",
    "slstm_state_specs",
]
