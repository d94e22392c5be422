"""Mixtures of experts with SwiGLU experts: the router, its losses, and several implementations of the experts."""

from jaxlm.nn.experts.api import Implementation, expert_specs, mixture_of_experts
from jaxlm.nn.experts.router import RouterStatistics, load_balance_loss, router_z_loss

__all__ = [
    "Implementation",
    "RouterStatistics",
    "expert_specs",
    "load_balance_loss",
    "mixture_of_experts",
    "router_z_loss",
]
