"""What all objectives share: counts of a batch, smoothed losses and accuracy of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives import causal, seq2seq
from jaxlm.objectives.batch import count, smoothed_token_loss, token_accuracy
from tests.objectives.stub import VOCAB, Bag, compare, random_tokens

MODEL = Bag(VOCAB)
TOKENS = random_tokens(3, 8)
SEGMENTS = np.array([[1] * 8, [1] * 5 + [0] * 3, [0] * 8], np.int32)


def test_examples_and_tokens_are_counted_without_padding():
    assert count(causal.batch(TOKENS)) == (3, 3 * 7)
    assert count(causal.batch(TOKENS, SEGMENTS)) == (2, 7 + 5)
    pair = seq2seq.batch(
        TOKENS, TOKENS[:, :4], start_id=0, source_segment_ids=SEGMENTS, segment_ids=SEGMENTS[:, :4]
    )  # fmt: skip
    assert count(pair) == (2, 8 + 5 + 4 + 4)


def test_a_smoothed_loss_is_the_cross_entropy_to_the_smoothed_distribution():
    batch, smoothing = causal.batch(TOKENS, SEGMENTS), 0.3

    def literal(params):
        hidden, _ = MODEL.apply(params, batch.tokens, segment_ids=batch.segment_ids)
        log_probs = jax.nn.log_softmax(MODEL.logits(params, hidden))
        wanted = (1 - smoothing) * jax.nn.one_hot(batch.targets, VOCAB) + smoothing / VOCAB
        return -jnp.sum(batch.weights * jnp.sum(wanted * log_probs, axis=-1))

    loss = smoothed_token_loss(smoothing)
    assert compare(lambda p: loss(MODEL, p, batch), literal, MODEL.init()) == 7 + 4
    with pytest.raises(ValueError, match="label_smoothing=-0.1 must be in"):
        smoothed_token_loss(-0.1)


def test_accuracy_of_tokens_counts_those_with_weight():
    batch, params = causal.batch(TOKENS, SEGMENTS), MODEL.init()
    hidden, _ = MODEL.apply(params, batch.tokens, segment_ids=batch.segment_ids)
    best = np.argmax(MODEL.logits(params, hidden), axis=-1).astype(np.int32)
    right = batch.replace(targets=np.where(np.arange(7) < 3, best, (best + 1) % VOCAB))
    assert [float(x) for x in token_accuracy(MODEL, params, right)[:2]] == [6.0, 11.0]
