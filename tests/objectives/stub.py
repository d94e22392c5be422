"""A small model without attention for tests of objectives. It compiles fast."""

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models import heads
from jaxlm.nn.loss import chunked_cross_entropy
from jaxlm.testing.helpers import assert_trees_close, relative_error

VOCAB = 11


class MeanModel:
    """A model whose hidden state is a token's embedding and the mean embedding of its row, without padding.

    A linear head computes ``outputs`` logits.
    """

    def __init__(self, outputs: int) -> None:
        self.outputs, self.problem_type = outputs, None
        self.config = types.SimpleNamespace(num_labels=outputs, vocab_size=outputs)

    def init(self, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        shapes = {"token": (VOCAB, 4), "type": (2, 4), "head": (8, self.outputs)}
        return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def apply(self, params, tokens, *, segment_ids=None, key=None, token_types=None):
        # An id outside the vocabulary gives NaN, as in the models of jaxlm.
        x = params["token"].at[tokens].get(mode="fill", fill_value=jnp.nan)
        if token_types is not None:
            x = x + params["type"][token_types]
        is_token = jnp.ones(tokens.shape) if segment_ids is None else (jnp.asarray(segment_ids) > 0).astype(jnp.float32)
        mean = jnp.sum(x * is_token[:, :, None], axis=1) / jnp.maximum(jnp.sum(is_token, axis=1), 1.0)[:, None]
        return jnp.concatenate([x, jnp.broadcast_to(mean[:, None], x.shape)], axis=2), None

    def logits(self, params, hidden):
        return hidden @ params["head"]

    def cross_entropy(self, params, hidden, targets, weights, *, label_smoothing=0.0):
        return chunked_cross_entropy(self.logits, params, hidden, targets, weights, label_smoothing=label_smoothing)

    def pool(self, params, hidden, segment_ids=None, key=None):
        return heads.last_token_hidden(hidden, None if segment_ids is None else jnp.asarray(segment_ids))


def random_tokens(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, VOCAB, (batch, length)).astype(np.int32)


def check_loss_and_gradient(loss, reference, params) -> float:
    """Assert that ``loss`` (total, weight, state) and its gradient equal those of ``reference`` (total).

    Returns the weight.
    """

    def total_and_weight(params):
        total, weight, _ = loss(params)
        return total, weight

    (total, weight), gradient = jax.jit(jax.value_and_grad(total_and_weight, has_aux=True))(params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(reference))(params)
    assert relative_error(total, expected) < 1e-6
    assert_trees_close(gradient, expected_gradient, 2e-5)
    return float(weight)
