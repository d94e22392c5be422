"""Linear recurrences.

The state of ``linear_scan`` is a vector for each row. The state of ``linear_attention``, ``ssd`` (the state space model
of Mamba-2, a special case of linear attention), ``gated_delta_rule`` and ``generalized_delta_rule`` is a matrix for
each head. The state of ``mlstm`` is a matrix, a vector and a number for each head. ``implementation=Chunked(32)`` runs
a scan with a matrix state in chunks of 32 steps.
"""

from jaxlm.nn.scan.delta_rule import gated_delta_rule, generalized_delta_rule
from jaxlm.nn.scan.matrix_state import Chunked, linear_attention
from jaxlm.nn.scan.mlstm import mlstm, mlstm_state_specs
from jaxlm.nn.scan.state_space import ssd
from jaxlm.nn.scan.vector_state import linear_scan

__all__ = [
    "Chunked",
    "gated_delta_rule",
    "generalized_delta_rule",
    "linear_attention",
    "linear_scan",
    "mlstm",
    "mlstm_state_specs",
    "ssd",
]
