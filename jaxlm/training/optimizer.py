"""Optimizers and schedules, from Optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxlm import spec


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with warm-up, decay and clipping."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from 0."""
    final_fraction: float = 0.1
    """Learning rate at the last step, as a fraction of the peak."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.99
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on weights and embeddings (not on biases and norm scales)."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None does not clip."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        for name in ("beta1", "beta2"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not 0.0 <= self.final_fraction <= 1.0:
            raise ValueError(f"final_fraction={self.final_fraction} must be in [0, 1]")
        if self.warmup_steps < 0 or self.weight_decay < 0.0:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and weight_decay={self.weight_decay} must not be negative"
            )
        if self.clip_norm is not None and self.clip_norm <= 0.0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive, or None for no clipping")


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The schedule: a function of the number of updates made so far.

    Raises:
        ValueError: the warm-up is as long as the training.
    """
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    if config.warmup_steps >= steps:
        raise ValueError(f"warmup_steps={config.warmup_steps} must be fewer than the {steps} steps of the training")
    after = steps - config.warmup_steps
    falls = {
        "cosine": optax.cosine_decay_schedule(peak, after, config.final_fraction),
        "linear": optax.linear_schedule(peak, last, after),
        "constant": optax.constant_schedule(peak),
    }
    if config.schedule not in falls:
        raise ValueError(f"schedule={config.schedule!r} is unknown: choose from {', '.join(falls)}")
    # From 1/n and not from 0: the first update should move the weights.
    rise = optax.linear_schedule(peak / (config.warmup_steps + 1), peak, config.warmup_steps)
    return optax.join_schedules([rise, falls[config.schedule]], [config.warmup_steps])


class Entrywise(optax.GradientTransformationExtraArgs):
    """A transformation to which it is all the same how parameters are gathered in arrays, so that layers may be apart.

    An entry's update depends on its own gradients, and on norms over all parameters. Adam is one; Adafactor, LAMB and
    Muon, which look at whole arrays, are not, nor is what has a mask in the form of a tree.
    """

    __slots__ = ()


def make_optimizer(config: OptimizerConfig, specs: spec.Tree, steps: int) -> Entrywise:
    """Clipping, Adam, decay where ``specs`` say so, and the schedule over ``steps`` updates."""
    clip = [] if config.clip_norm is None else [_clip_by_global_norm(config.clip_norm)]
    decays = spec.decay_mask(specs)
    chain = optax.chain(
        *clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=lambda params: spec.for_each_layer(decays, params)),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
    return Entrywise(chain.init, chain.update)


def _clip_by_global_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """``optax.clip_by_global_norm`` as one product with a scalar (Pascanu et al. 2013, algorithm 1).

    Theirs divides each entry, and XLA writes the quotient out before Adam reads it: a pass over all gradients. Where
    the caller hands over ``gradient_norm``, as our step does, they are not read for it once more either.
    """

    def clip(
        updates: optax.Updates, state: Any, params: Any = None, *, gradient_norm: Any = None, **others: Any
    ) -> tuple[optax.Updates, Any]:
        del params, others
        norm = optax.tree.norm(updates) if gradient_norm is None else gradient_norm
        factor = jnp.minimum(1.0, largest / norm)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, clip)
