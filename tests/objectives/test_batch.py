"""Functions for all objectives: counts of a batch, label smoothing and token accuracy."""

import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm.objectives
from jaxlm.nn import choices
from jaxlm.nn.loss import chunked_argmax
from jaxlm.objectives import OBJECTIVES, causal, objective, seq2seq
from jaxlm.objectives.batch import (
    Batch,
    count_examples_and_tokens,
    hidden_states_at_targets,
    smoothed_token_loss,
    token_accuracy,
)
from jaxlm.testing.helpers import apply, initial_params, tiny_model
from tests.objectives.stub import VOCAB, MeanModel, check_loss_and_gradient, random_tokens

MODEL = MeanModel(VOCAB)
TOKENS = random_tokens(3, 8)
SEGMENTS = np.array([[1] * 8, [1] * 5 + [0] * 3, [0] * 8], np.int32)


def test_every_module_except_the_shared_one_is_an_objective():
    modules = [module.name for module in pkgutil.iter_modules(jaxlm.objectives.__path__)]
    assert sorted([*OBJECTIVES, "batch"]) == sorted(modules)
    assert all(callable(objective(name).batch) and objective(name).loss for name in OBJECTIVES)
    for name in ("batch", "casual"):
        with pytest.raises(ValueError, match=f"there is no objective for task='{name}': choose from causal, class"):
            objective(name)


def test_count_excludes_padding():
    assert count_examples_and_tokens(causal.batch(TOKENS)) == (3, 3 * 7)
    assert count_examples_and_tokens(causal.batch(TOKENS, SEGMENTS)) == (2, 7 + 5)
    pair = seq2seq.batch(
        TOKENS, TOKENS[:, :4], start_id=0, source_segment_ids=SEGMENTS, segment_ids=SEGMENTS[:, :4]
    )  # fmt: skip
    assert count_examples_and_tokens(pair) == (2, 8 + 5 + 4 + 4)


def test_target_positions_outside_the_row_give_nan():
    positions = np.array([[0, 7, 8, -1]] * 3, np.int8)
    batch, params = Batch(TOKENS, TOKENS[:, :4], np.ones((3, 4), np.float32), target_positions=positions), MODEL.init()
    hidden, _ = MODEL.apply(params, TOKENS)
    got, _ = hidden_states_at_targets(MODEL, params, batch, None, None)
    np.testing.assert_array_equal(got[:, :2], hidden[:, [0, 7]])
    assert np.isnan(got[:, 2:]).all()


def test_a_smoothed_loss_is_the_cross_entropy_to_the_smoothed_distribution():
    batch, smoothing = causal.batch(TOKENS, SEGMENTS), 0.3

    def reference(params):
        hidden, _ = MODEL.apply(params, batch.tokens, segment_ids=batch.segment_ids)
        log_probs = jax.nn.log_softmax(MODEL.logits(params, hidden))
        smoothed_targets = (1 - smoothing) * jax.nn.one_hot(batch.targets, VOCAB) + smoothing / VOCAB
        return -jnp.sum(batch.weights * jnp.sum(smoothed_targets * log_probs, axis=-1))

    loss = smoothed_token_loss(smoothing)
    assert check_loss_and_gradient(lambda p: loss(MODEL, p, batch), reference, MODEL.init()) == 7 + 4
    with pytest.raises(ValueError, match="label_smoothing=-0.1 must be in"):
        smoothed_token_loss(-0.1)


def test_token_accuracy_ignores_tokens_with_weight_0():
    batch, params = causal.batch(TOKENS, SEGMENTS), MODEL.init()
    hidden, _ = MODEL.apply(params, batch.tokens, segment_ids=batch.segment_ids)
    best = np.argmax(MODEL.logits(params, hidden), axis=-1).astype(np.int32)
    three_correct = batch.replace(targets=np.where(np.arange(7) < 3, best, (best + 1) % VOCAB))
    assert [float(x) for x in token_accuracy(MODEL, params, three_correct)[:2]] == [6.0, 11.0]


def test_token_accuracy_of_a_head_with_more_labels_than_ids():
    model = MeanModel(VOCAB + 5)
    model.config.vocab_size = VOCAB
    params = model.init()
    hidden, _ = model.apply(params, TOKENS)
    best = np.argmax(model.logits(params, hidden), axis=-1)
    assert best.max() >= VOCAB
    assert float(token_accuracy(model, params, Batch(TOKENS, best, np.ones(best.shape, np.float32)))[0]) == best.size


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("max_chunk_logits", [1, 2 * 3 * VOCAB, 2**20])
def test_token_accuracy_in_chunks_equals_that_of_all_logits(monkeypatch, max_chunk_logits):
    model = tiny_model("gpt2-tiny", vocab_size=101, vocab_multiple=8)
    params = initial_params(model)
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (2, 12), 0, 101), np.int32)
    batch = causal.batch(tokens)
    hidden, _ = apply(model, params, batch.tokens, segment_ids=batch.segment_ids)
    best = np.argmax(np.asarray(model.logits(params, hidden))[..., :101], axis=-1)
    batch = batch.replace(targets=np.where(np.arange(11) % 3 == 0, best, batch.targets))
    monkeypatch.setattr(choices, "max_logits", lambda: max_chunk_logits)
    np.testing.assert_array_equal(chunked_argmax(model.logits, params, hidden), best)
    num_correct, weight, _ = jax.jit(lambda params: token_accuracy(model, params, batch))(params)
    assert (float(num_correct), float(weight)) == (float(np.sum(best == batch.targets)), 22.0)
    assert 8 <= float(num_correct) < 22


def test_token_accuracy_never_stores_all_logits(monkeypatch):
    monkeypatch.setattr(choices, "max_logits", lambda: 3 * 2 * VOCAB)
    batch = causal.batch(TOKENS)
    jaxpr = str(jax.make_jaxpr(lambda params: token_accuracy(MODEL, params, batch)[0])(MODEL.init()))
    assert f"[3,2,{VOCAB}]" in jaxpr
    assert f"[3,7,{VOCAB}]" not in jaxpr
