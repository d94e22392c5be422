"""Pairs of texts as batches of an encoder-decoder."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.data.buckets import Bucketed
from jaxlm.data.examples import Examples
from jaxlm.data.vocabularies import train_tokenizer
from jaxlm.objectives import seq2seq as objective
from jaxlm.tasks import seq2seq
from jaxlm.testing.helpers import initial_params, tiny_model

PAIRS = Examples([{"source": "a b c", "target": "c b"}, {"source": "b", "target": "b a c a"}])


def tokenizer(template="eos"):
    return train_tokenizer(["a b c"], "word", 20, template=template)


def test_the_batch_has_shifted_decoder_inputs_and_targets():
    model = tiny_model("t5-tiny", decoder_start_id=0)
    tokens = tokenizer()
    a, b, c = (int(tokens.encode(word)[0]) for word in "abc")
    encoded = seq2seq.encode(PAIRS, tokens)
    assert encoded[0]["source"].tolist() == [a, b, c, 1]
    assert encoded[0]["target"].tolist() == [c, b, 1]
    source = Bucketed(encoded, 3, num_buckets=1, shuffle=False, length_multiple=1)
    batch = seq2seq.to_batch(model, tokens)(source.batch(0, range(3)))
    assert batch.tokens.tolist() == [[0, c, b, 0, 0], [0, b, a, c, a], [0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[c, b, 1, 0, 0], [b, a, c, a, 1], [0, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]
    assert batch.inputs["source_segment_ids"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["t5-tiny", "attention-rnn-tiny"])
def test_empty_rows_do_not_change_loss_and_gradient(name):
    model, tokens = tiny_model(name), tokenizer()
    params = initial_params(model)
    loss_and_gradient = jax.jit(jax.value_and_grad(lambda params, batch: objective.loss(model, params, batch)[0]))
    (batch,), (padded_batch,) = (
        seq2seq.batches(seq2seq.encode(PAIRS, tokens), model, tokens, rows, num_buckets=1) for rows in (2, 4)
    )  # fmt: skip
    (loss, gradient), (padded_loss, padded_gradient) = (
        loss_and_gradient(params, batch),
        loss_and_gradient(params, padded_batch),
    )
    np.testing.assert_allclose(padded_loss, loss, rtol=1e-5)
    for expected, actual in zip(jax.tree.leaves(gradient), jax.tree.leaves(padded_gradient), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


def test_an_id_outside_the_vocabulary_raises_an_error():
    tokens = tokenizer()
    small = SimpleNamespace(max_positions=None, config=SimpleNamespace(decoder_start_id=0, vocab_size=3))
    with pytest.raises(
        ValueError, match=r"the source of a batch: id \d at position \d is outside the vocabulary of 3 ids"
    ):
        seq2seq.batches(seq2seq.encode(PAIRS, tokens), small, tokens, 2)


def test_batches_are_not_longer_than_max_positions():
    tokens, model = tokenizer(), tiny_model("t5-tiny")
    encoded = seq2seq.encode(PAIRS, tokens)
    (batch,) = seq2seq.batches(encoded, model, tokens, 2, num_buckets=1)
    assert batch.tokens.shape == (2, 8), "T5 has no max_positions, so the length is a multiple of 8"
    limited = SimpleNamespace(max_positions=5, config=SimpleNamespace(decoder_start_id=0, vocab_size=99))
    (batch,) = seq2seq.batches(encoded, limited, tokens, 2, num_buckets=1)
    assert batch.tokens.shape == (2, 5)
    limited.max_positions = 4
    with pytest.raises(ValueError, match="target of example 1 has 5 entries, more than max_length=4"):
        seq2seq.batches(encoded, limited, tokens, 2)


def test_a_tokenizer_without_an_eos_token_is_rejected():
    with pytest.raises(ValueError, match="the tokenizer adds no EOS token at the end: train a tokenizer with"):
        seq2seq.encode(PAIRS, tokenizer("none"))
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        seq2seq.encode(PAIRS, tokenizer("cls_sep"))
    with pytest.raises(ValueError, match="the tokenizer adds no EOS token at the end"):
        seq2seq.encode(Examples([{"source": "a", "target": ""}]), tokenizer("none"))


def test_no_examples_have_no_ids():
    assert seq2seq.encode(Examples([]), tokenizer()) == []


def test_a_source_without_tokens_is_named():
    tokenizer = train_tokenizer(["one two"], "word", 50, template="eos")
    examples = Examples([{"source": "one"}, {"source": "\t"}], "test.en")
    with pytest.raises(ValueError, match=r"example 1 of test.en has the source '\\t', which has no tokens"):
        seq2seq.check_sources(examples, tokenizer)
    seq2seq.check_sources(examples[:1], tokenizer)
