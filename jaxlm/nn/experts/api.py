"""Mixture of experts: for each token, a router selects a few SwiGLU MLPs (experts). Their weighted outputs are added.

Shapes: B batch, T time, D model width, E experts, N selected experts of a token, F hidden width of an expert.
"""

from __future__ import annotations

from typing import Any

import jax

from jaxlm import sharding
from jaxlm.nn import choices
from jaxlm.nn.experts.capacity import with_capacity
from jaxlm.nn.experts.dropless import dropless
from jaxlm.nn.experts.reference import reference
from jaxlm.nn.experts.router import RouterStatistics, route, router_statistics
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.nn.swiglu import swiglu, swiglu_specs
from jaxlm.spec import EXPERT, ArraySpec, Initializer, Params, require_arrays

Implementation = choices.ExpertsImplementation


def expert_specs(
    width: int, hidden: int, num_experts: int, init: Initializer, *, shared_hidden: int | None = None
) -> dict[str, Any]:
    """The specs of ``router`` [D, E], ``gate`` and ``up`` [E, D, F], and ``down`` [E, F, D], all without biases.

    Args:
        width: D.
        hidden: F.
        num_experts: E.
        shared_hidden: hidden width of a shared expert, which processes every token. It adds the specs ``shared`` (a
            SwiGLU MLP) and ``shared_gate`` [D, 1]. None: no shared expert.
    """

    def weight(shape: tuple[int, int], axes: tuple[str, str]) -> dict[str, ArraySpec]:
        return {"weight": ArraySpec((num_experts, *shape), (EXPERT, *axes), init, decay=True)}

    specs: dict[str, Any] = {
        "router": linear_specs((width, num_experts), ("embed", None), init, bias=False),
        "gate": weight((width, hidden), ("embed", "mlp")),
        "up": weight((width, hidden), ("embed", "mlp")),
        "down": weight((hidden, width), ("mlp", "embed")),
    }
    if shared_hidden is not None:
        specs["shared"] = swiglu_specs(width, shared_hidden, init)
        specs["shared_gate"] = linear_specs((width, 1), ("embed", None), init, bias=False)
    return specs


def mixture_of_experts(
    params: Params,
    x_BTD: jax.Array,
    *,
    num_selected: int,
    renormalize: bool,
    keep_BT: jax.Array | None = None,
    capacity_factor: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, RouterStatistics]:
    """The output of the experts, [B, T, D], and the statistics of the router.

    The output of a token is ``sum over its N experts e of weight[e] * down[e](silu(gate[e](x)) * up[e](x))``
    (Shazeer et al. 2017, eq. 1; Jiang et al. 2024, section 2.1). With a shared expert, the output of the shared expert
    is added, multiplied by ``sigmoid(shared_gate(x))``.

    Args:
        params: see :func:`expert_specs`.
        num_selected: N, the number of experts that each token selects.
        renormalize: whether the weights of a token sum to 1; otherwise, they are its router probabilities.
        keep_BT: False at padding tokens. Their output is not defined, and the statistics ignore them. None: no padding.
        capacity_factor: in each row, an expert accepts at most this multiple of the mean number of tokens per expert
            (``jaxlm.nn.experts.capacity``). The expert drops the later tokens that selected it: it adds 0 to their
            outputs. None: no limit.
        implementation: how experts without a capacity are computed. None chooses the fastest known one. The
            implementations are

            - ``reference``: the plain definition; every expert processes every token.
            - ``ragged_dot``: tokens sorted by expert, and ``jax.lax.ragged_dot``. JAX cannot ``vmap`` it over ``x_BTD``
              with the same ``params`` for all entries, and cannot differentiate its gradient in reverse mode. Choose
              ``blocks`` or ``reference`` under such a ``vmap`` and for ``jax.grad`` of ``jax.grad``.
            - ``blocks``: tokens sorted by expert, and a loop over blocks of tokens that have the same expert.

    Raises:
        ValueError: ``num_selected`` is not in [1, E], ``implementation`` is unknown, ``capacity_factor`` is not
            positive, or ``capacity_factor`` and ``implementation`` are both given.
    """
    require_arrays(x_BTD=x_BTD, keep_BT=keep_BT)
    num_experts = params["router"]["weight"].shape[1]
    if not 1 <= num_selected <= num_experts:
        raise ValueError(f"num_selected={num_selected} must be in [1, {num_experts}], the number of experts")
    choices.check_implementation("mixture_of_experts", implementation, Implementation)
    if capacity_factor is not None and not capacity_factor > 0.0:
        raise ValueError(f"capacity_factor={capacity_factor} must be positive")
    if capacity_factor is not None and implementation is not None:
        raise ValueError(
            f"implementation={implementation!r} must be None with capacity_factor={capacity_factor}: the choice is for "
            "experts without a capacity"
        )
    routing = route(params["router"], x_BTD, num_selected, renormalize=renormalize)
    weights = {name: params[name]["weight"].astype(x_BTD.dtype) for name in ("gate", "up", "down")}
    if implementation is None:
        implementation = choices.experts(
            x_BTD.shape[0] * x_BTD.shape[1], weights["gate"].shape, explicit_mesh=sharding.has_explicit_axes(x_BTD)
        )
    if capacity_factor is not None:
        y_BTD = with_capacity(weights, x_BTD, routing, keep_BT, capacity_factor)
    elif implementation == "reference":
        y_BTD = reference(weights, x_BTD, routing)
    else:
        y_BTD = dropless(weights, x_BTD, routing, keep_BT, implementation)
    if "shared" in params:
        y_BTD += jax.nn.sigmoid(linear(params["shared_gate"], x_BTD)) * swiglu(params["shared"], x_BTD)
    return y_BTD, router_statistics(routing, keep_BT)
