"""Config fields, specs and computation of layers with a mixture of experts instead of an MLP.

A block has the parameters ``mlp`` (a SwiGLU MLP) or ``experts`` (``jaxlm.nn.experts``). A family with
:class:`ExpertsConfig` also has a function ``apply_with_routing``, which returns the results of ``apply`` and a third
result: the router statistics of the layers with experts, stacked (None without experts).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxlm.models import common
from jaxlm.nn.experts import Implementation, RouterStatistics, expert_specs, mixture_of_experts
from jaxlm.nn.swiglu import swiglu, swiglu_specs
from jaxlm.spec import Initializer, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(common.TransformerConfig):
    """Base class for the ``Config`` of a family whose layers may have experts.

    The ``Config`` must have the fields ``num_layers``, ``embed_dim`` and ``mlp_dim``.
    """

    num_experts: int | None = None
    """Number of experts of a layer; None: every layer has an MLP, and the other fields of experts have no effect."""
    experts_per_token: int = 2
    """Number of experts that each token selects."""
    expert_dim: int | None = None
    """Hidden width of an expert; None means mlp_dim."""
    renormalize_experts: bool = True
    """Whether the weights of a token's experts sum to 1; otherwise, they are the probabilities of the router."""
    expert_interval: int = 1
    """Only every expert_interval-th layer has experts. The other layers have MLPs."""
    dense_layers: tuple[int, ...] = ()
    """Indices, from 0, of layers that have an MLP instead of experts, regardless of expert_interval."""
    capacity_factor: float | None = None
    """Maximum number of tokens that an expert accepts in a row, as a multiple of the mean number of tokens per expert.
    The maximum is rounded up. Earlier tokens have priority. An expert adds 0 to the output of a token that it does not
    accept. None: experts accept all tokens. This option is for training, and Hugging Face files do not contain it.
    Cached decoding gives other results than one call for the whole row, because the maximum depends on the number of
    tokens of a call."""
    experts_implementation: Implementation | None = None
    """Name of the implementation; None: the device and the shapes decide. It must be None with a capacity_factor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity_factor is not None and not self.capacity_factor > 0.0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be positive, or None")
        if self.capacity_factor is not None and self.experts_implementation is not None:
            raise ValueError(
                f"experts_implementation={self.experts_implementation!r} does not support capacity_factor="
                f"{self.capacity_factor}: set one of them to None"
            )
        if self.num_experts is None:
            return
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be at most num_experts={self.num_experts}"
            )
        num_layers: int = self.num_layers  # type: ignore[attr-defined]
        if not all(0 <= layer < num_layers for layer in self.dense_layers):
            raise ValueError(f"dense_layers={self.dense_layers} must be in [0, num_layers={num_layers})")
        num_with_experts = sum(has_experts(self, layer) for layer in range(num_layers))
        settings = f"expert_interval={self.expert_interval} and dense_layers={self.dense_layers}"
        if num_with_experts == 0:
            raise ValueError(f"no layer has experts with {settings}: set num_experts to None")
        if self.scan_layers and num_with_experts < num_layers:
            raise ValueError(
                f"scan_layers=True needs layers of one kind, but only {num_with_experts} of {num_layers} layers have "
                f"experts with {settings}: set scan_layers to False"
            )


def has_experts(cfg: Any, layer: int) -> bool:
    """Whether a layer has experts instead of an MLP."""
    return cfg.num_experts is not None and (layer + 1) % cfg.expert_interval == 0 and layer not in cfg.dense_layers


def mlp_specs(cfg: Any, layer: int, init: Initializer, *, shared_dim: int | None = None) -> dict[str, Any]:
    """The specs of the experts or the MLP of a layer: ``{"experts": specs}`` or ``{"mlp": specs}``.

    Args:
        shared_dim: hidden width of a shared expert in a layer with experts; None: no shared expert.
    """
    if not has_experts(cfg, layer):
        return {"mlp": swiglu_specs(cfg.embed_dim, cfg.mlp_dim, init)}
    hidden = cfg.mlp_dim if cfg.expert_dim is None else cfg.expert_dim
    return {"experts": expert_specs(cfg.embed_dim, hidden, cfg.num_experts, init, shared_hidden=shared_dim)}


def mlp(
    cfg: Any,
    weights: Params,
    x_BTD: jax.Array,
    segment_ids_BT: jax.Array | None,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
) -> tuple[jax.Array, RouterStatistics | None]:
    """The output of the experts or of the MLP of a layer, [B, T, D], and the router statistics (None for an MLP).

    Args:
        segment_ids_BT: 0 for padding. The router statistics and the capacities ignore padding. None: no padding.
        activation: the activation function of the gate of an MLP. Experts always use SiLU.
    """
    if "mlp" in weights:
        return swiglu(weights["mlp"], x_BTD, activation), None
    return mixture_of_experts(
        weights["experts"], x_BTD, num_selected=cfg.experts_per_token, renormalize=cfg.renormalize_experts,
        keep_BT=None if segment_ids_BT is None else segment_ids_BT > 0, capacity_factor=cfg.capacity_factor,
        implementation=cfg.experts_implementation,
    )  # fmt: skip
