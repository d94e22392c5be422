"""The causal objective: targets, weights and loss."""

import jax
import numpy as np
import pytest

from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives import causal
from jaxlm.testing.helpers import add_noise, random_tokens, relative_error, tiny_model


def test_targets_are_the_next_tokens_within_a_document():
    tokens = np.array([[5, 6, 7, 8, 9, 0]])
    batch = causal.batch(tokens, np.array([[1, 1, 1, 2, 2, 0]]))
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.targets.tolist() == [[6, 7, 8, 9, 0]]
    assert batch.weights.tolist() == [[1, 1, 0, 1, 0]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 2, 2]]
    assert causal.batch(tokens).weights.tolist() == [[1, 1, 1, 1, 1]]


def test_loss_is_the_summed_cross_entropy_of_the_logits():
    model = tiny_model("gpt")
    params = add_noise(jax.jit(model.init)(jax.random.key(0)))
    window = random_tokens(model, 3, 11)
    total, weight, _ = causal.loss(model, params, causal.batch(window))
    logits = model.logits(params, model.apply(params, window[:, :-1])[0])
    assert relative_error(total, cross_entropy(logits, window[:, 1:]).sum()) < 1e-6
    assert float(weight) == 30


def test_a_window_of_one_token_raises_an_error():
    with pytest.raises(ValueError, match=r"time at least 2, got \[4, 1\]"):
        causal.batch(np.zeros((4, 1), np.int32))
