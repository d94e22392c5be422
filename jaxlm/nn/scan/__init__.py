"""Linear recurrences: ``linear_scan``, whose state is a vector, and ``linear_attention``, whose state is a matrix.

``ssd``, the state space model of Mamba-2, is a linear attention.
"""

from jaxlm.nn.scan.matrix_state import linear_attention, linear_attention_step
from jaxlm.nn.scan.state_space import ssd
from jaxlm.nn.scan.vector_state import linear_scan

__all__ = ["linear_attention", "linear_attention_step", "linear_scan", "ssd"]
