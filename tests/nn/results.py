"""Outputs and gradients of recurrences and scans, for comparisons with their equations."""

import jax
import jax.numpy as jnp
import numpy as np


def random_masks(B, T):
    """Masks with resets at real steps only."""
    rng = np.random.default_rng(4)
    reset, keep = rng.random((B, T)) < 0.2, rng.random((B, T)) < 0.7
    return {"reset_BT": reset & keep, "keep_BT": keep}


def results(function, arguments, **options):
    """The outputs and all gradients. The last state is part of the loss, so that its gradient is tested as well."""

    def loss(*arguments):
        outputs = function(*arguments, **options)
        leaves = jax.tree.leaves(outputs)
        return sum(jnp.sum(leaf * jnp.cos(jnp.arange(leaf.size).reshape(leaf.shape))) for leaf in leaves), outputs

    gradient = jax.value_and_grad(loss, range(len(arguments)), has_aux=True)
    (_, outputs), gradients = jax.jit(gradient)(*arguments)
    return jax.device_get((outputs, gradients))


def float64_results(function, arguments, **options):
    with jax.enable_x64(True):
        return results(function, jax.tree.map(lambda x: np.asarray(x, np.float64), arguments), **options)
