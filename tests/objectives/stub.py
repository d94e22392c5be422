"""A model that compiles at once: what an objective needs of a model, and no attention."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models import heads
from jaxlm.nn.loss import chunked_cross_entropy
from tests.helpers import assert_trees_close, relative_error

VOCAB = 11


class Bag:
    """Each token's vector next to the mean of the row's real ones; a linear head with ``outputs`` logits."""

    def __init__(self, outputs: int) -> None:
        self.outputs = outputs
        self.config = types.SimpleNamespace(num_labels=outputs, vocab_size=outputs)

    def init(self, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        shapes = {"token": (VOCAB, 4), "type": (2, 4), "head": (8, self.outputs)}
        return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def apply(self, params, tokens, *, segment_ids=None, key=None, token_types=None):
        # As a family's: an id that does not exist gives NaN.
        x = params["token"].at[tokens].get(mode="fill", fill_value=jnp.nan)
        if token_types is not None:
            x = x + params["type"][token_types]
        real = jnp.ones(tokens.shape) if segment_ids is None else (jnp.asarray(segment_ids) > 0).astype(jnp.float32)
        total = jnp.sum(x * real[:, :, None], axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1.0)[:, None]
        return jnp.concatenate([x, jnp.broadcast_to(total[:, None], x.shape)], axis=2), None

    def logits(self, params, hidden):
        return hidden @ params["head"]

    def cross_entropy(self, params, hidden, targets, weights, *, label_smoothing=0.0):
        return chunked_cross_entropy(self.logits, params, hidden, targets, weights, label_smoothing=label_smoothing)

    def pool(self, params, hidden, segment_ids=None, key=None):
        return heads.last_token_state(hidden, None if segment_ids is None else jnp.asarray(segment_ids))


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, VOCAB, (batch, length)).astype(np.int32)


def compare(loss, literal, params) -> float:
    """``loss`` (total, weight, state) and its gradient against a ``literal`` total; returns the weight."""

    def ours(params):
        total, weight, _ = loss(params)
        return total, weight

    (total, weight), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    want, want_gradient = jax.jit(jax.value_and_grad(literal))(params)
    assert relative_error(total, want) < 1e-6
    assert_trees_close(gradient, want_gradient, 2e-5)
    return float(weight)
