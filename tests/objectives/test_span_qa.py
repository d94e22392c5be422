"""The objective of extractive question answering: batches, loss and best spans."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.objectives import span_qa
from jaxlm.testing.helpers import assert_trees_close, relative_error
from tests.objectives.stub import MeanModel, check_loss_and_gradient, random_tokens

MODEL = MeanModel(2)
TOKENS = random_tokens(4, 8)
SEGMENTS = np.array([[1] * 8, [1] * 5 + [0] * 3, [0] * 2 + [1] * 6, [1] * 8], np.int32)
SPANS = np.array([[2, 5], [0, 4], [3, 3], [6, 9]])  # the last answer was truncated


def test_rows_with_a_truncated_answer_have_weight_0():
    batch = span_qa.batch(np.ones((4, 8), np.int32), SPANS, SEGMENTS)
    assert batch.weights.tolist() == [1, 1, 1, 0]
    assert batch.targets[:3].tolist() == SPANS[:3].tolist()
    assert batch.targets.dtype == np.int32


def test_loss_is_the_mean_of_two_cross_entropies_over_tokens_without_padding():
    batch = span_qa.batch(TOKENS, SPANS, SEGMENTS)

    def reference(params):
        logits = MODEL.logits(params, MODEL.apply(params, TOKENS, segment_ids=SEGMENTS)[0])
        total = 0.0
        for row, row_slice in enumerate((slice(0, 8), slice(0, 5), slice(2, 8))):
            for start_or_end in (0, 1):
                scores = logits[row, row_slice, start_or_end]
                total -= jax.nn.log_softmax(scores)[SPANS[row, start_or_end] - row_slice.start] / 2
        return total

    assert check_loss_and_gradient(lambda p: span_qa.loss(MODEL, p, batch), reference, MODEL.init()) == 3


def test_the_loss_of_a_row_does_not_depend_on_its_padding():
    params = MODEL.init()
    loss = jax.jit(lambda params, batch: span_qa.loss(MODEL, params, batch)[0])
    unpadded = loss(params, span_qa.batch(TOKENS[1:2, :5], SPANS[1:2]))
    padded = loss(params, span_qa.batch(TOKENS[1:2], SPANS[1:2], SEGMENTS[1:2]))
    assert relative_error(padded, unpadded) < 1e-6


def test_a_row_of_padding_does_not_change_the_gradient():
    batch = span_qa.batch(TOKENS, SPANS, SEGMENTS)
    batch_with_padding_row = batch.replace(segment_ids=SEGMENTS * np.array([1, 1, 1, 0])[:, None])
    gradient = jax.jit(jax.grad(lambda params, batch: span_qa.loss(MODEL, params, batch)[0]))
    expected, actual = (gradient(MODEL.init(), b) for b in (batch, batch_with_padding_row))
    assert_trees_close(actual, expected, 1e-6)


def test_best_spans_equal_a_search_over_all_pairs():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(30, 9, 2)).astype(np.float32)
    segments = (rng.random((30, 9)) < 0.7).astype(np.int32)
    segments[:, 4] = 1
    for max_length in (1, 3, 9, 30):
        spans, scores = jax.jit(span_qa.best_spans, static_argnames="max_length")(
            logits, segments, max_length=max_length
        )
        for row in range(30):
            pairs = {
                (i, j): logits[row, i, 0] + logits[row, j, 1]
                for i in range(9)
                for j in range(i, min(i + max_length, 9))
                if segments[row, i] and segments[row, j]
            }
            best = max(pairs, key=pairs.get)
            assert tuple(spans[row].tolist()) == best
            assert scores[row] == pairs[best]


def test_best_spans_return_the_positions_with_the_largest_logits():
    logits = np.zeros((2, 6, 2), np.float32)
    for row, (first, last) in enumerate([(1, 4), (5, 5)]):
        logits[row, first, 0] = logits[row, last, 1] = 3.0
    spans, scores = span_qa.best_spans(jnp.asarray(logits))
    assert spans.dtype == jnp.int32
    assert spans.tolist() == [[1, 4], [5, 5]]
    assert scores.tolist() == [6.0, 6.0]


@pytest.mark.parametrize(
    ("spans", "segments", "message"),
    [
        ([[0, 1], [4, 3]], None, r"span \[4, 3\] of row 1 must be \(first, last\) with 0 <= first <= last"),
        ([[-1, 1], [2, 3]], None, r"span \[-1, 1\] of row 0"),
        ([[0, 1], [2, 4]], [[1] * 5, [1] * 4 + [0]], r"span \[2, 4\] of row 1 .* among its real tokens"),
        ([[0, 1]], None, r"spans must be integers of shape \[2, 2\], got int64\[1, 2\]"),
        ([[0, 1], [0, 1]], [[1, 1, 2, 2, 0]] * 2, "segment_ids up to 2: a row must be one document"),
    ],
)
def test_invalid_spans_raise_errors(spans, segments, message):
    segments = None if segments is None else np.array(segments, np.int32)
    with pytest.raises(ValueError, match=message):
        span_qa.batch(np.zeros((2, 5), np.int32), np.array(spans), segments)


def test_rows_need_a_token():
    with pytest.raises(ValueError, match=r"tokens \[2, 0\] must have at least one token per row"):
        span_qa.batch(np.zeros((2, 0), np.int32), np.zeros((2, 2), int), np.zeros((2, 0), np.int32))


def test_logits_of_another_task_raise_an_error():
    batch = span_qa.batch(np.zeros((1, 5), np.int32), np.array([[0, 1]]))
    with pytest.raises(ValueError, match=r"logits \[1, 5, 3\] must be \[batch, time, 2\]"):
        span_qa.loss(MeanModel(3), MeanModel(3).init(), batch)
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        span_qa.best_spans(jnp.zeros((1, 5, 2)), max_length=0)


@pytest.mark.live
def test_loss_equals_that_of_transformers_without_padding():
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=16,
    )  # fmt: skip
    hf_model = BertForQuestionAnswering(config).eval()
    spans = np.array([[2, 5], [0, 0], [9, 9]])  # the last answer is outside the row
    tokens = torch.randint(20, (3, 8))
    output = hf_model(
        input_ids=tokens, start_positions=torch.tensor(spans[:, 0]), end_positions=torch.tensor(spans[:, 1])
    )
    logits = torch.stack([output.start_logits, output.end_logits], dim=-1).detach().numpy()

    class FixedLogits:
        """A model whose parameters are its logits."""

        def apply(self, params, tokens, **inputs):
            return params, None

        def logits(self, params, hidden):
            return hidden

    total, weight, _ = span_qa.loss(FixedLogits(), jnp.asarray(logits), span_qa.batch(tokens.numpy(), spans))
    assert relative_error(total / weight, output.loss.item()) < 1e-6
