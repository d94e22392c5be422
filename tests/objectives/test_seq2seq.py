"""The sequence-to-sequence objective: decoder inputs, packed pairs and padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.loss import cross_entropy
from jaxlm.objectives import seq2seq
from jaxlm.testing.helpers import add_noise, apply, initial_params, random_tokens, relative_error, tiny_model


def test_the_decoder_input_is_the_shifted_target():
    source, targets = np.array([[7, 8, 9, 1]]), np.array([[5, 6, 1]])
    batch = seq2seq.batch(source, targets, start_id=3)
    assert batch.tokens.tolist() == [[3, 5, 6]]
    assert batch.targets.tolist() == [[5, 6, 1]]
    assert batch.weights.tolist() == [[1, 1, 1]]
    assert batch.segment_ids is None
    assert {name: x.tolist() for name, x in batch.inputs.items()} == {"source": [[7, 8, 9, 1]]}


def test_the_start_id_does_not_have_the_dtype_of_the_targets():
    targets, segments = np.array([[5, 6, 1]], np.uint8), np.array([[1, 1, 1]])
    for each in (None, segments):
        shifted = seq2seq.shift_right(targets, 300, each)
        assert (shifted.dtype, shifted.tolist()) == (np.int32, [[300, 5, 6]])


def test_every_document_begins_with_the_start_id_and_padding_has_weight_0():
    source, targets = np.array([[7, 1, 8, 1, 0]]), np.array([[0, 5, 6, 1, 9, 1, 0]])
    segments, source_segments = np.array([[0, 1, 1, 1, 2, 2, 0]]), np.array([[1, 1, 2, 2, 0]])
    batch = seq2seq.batch(source, targets, start_id=3, source_segment_ids=source_segments, segment_ids=segments)
    assert batch.tokens.tolist() == [[3, 3, 5, 6, 3, 9, 3]]
    assert batch.weights.tolist() == [[0, 1, 1, 1, 1, 1, 0]]
    assert batch.segment_ids is segments
    assert batch.inputs["source_segment_ids"] is source_segments


def test_a_model_without_encoder_reads_the_source_before_the_targets():
    batch = seq2seq.batch(np.array([[7, 8, 1]]), np.array([[5, 6, 1]]), start_id=3)
    causal = seq2seq.to_decoder_only_batch(batch)
    assert causal.tokens.tolist() == [[7, 8, 1, 3, 5, 6]]
    assert causal.targets.tolist() == [[0, 0, 0, 5, 6, 1]]
    assert causal.weights.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert causal.segment_ids.tolist() == [[1, 1, 1, 1, 1, 1]]
    assert causal.inputs == {}
    padded = seq2seq.batch(
        np.array([[7, 8, 0]]), np.array([[5, 1, 0]]), start_id=3, source_segment_ids=np.array([[1, 1, 0]]),
        segment_ids=np.array([[1, 1, 0]]),
    )  # fmt: skip
    assert seq2seq.to_decoder_only_batch(padded).segment_ids.tolist() == [[1, 1, 0, 1, 1, 0]]
    segments = np.array([[2, 2, 0]])
    second = padded.replace(segment_ids=segments, inputs={**padded.inputs, "source_segment_ids": segments})
    assert seq2seq.to_decoder_only_batch(second).segment_ids.tolist() == [[2, 2, 0, 2, 2, 0]]
    for segments in ([[1, 2, 0]], [[2, 2, 0]]):
        with pytest.raises(ValueError, match="a row has several documents"):
            seq2seq.to_decoder_only_batch(padded.replace(segment_ids=np.array(segments)))


def test_the_loss_of_packed_pairs_is_the_sum_over_pairs():
    model = tiny_model("t5")
    params = add_noise(initial_params(model))
    source, targets = random_tokens(model, 1, 9), random_tokens(model, 1, 9, seed=1)
    segments = {
        "source_segment_ids": np.array([[1] * 4 + [2] * 4 + [0]]),
        "segment_ids": np.array([[1] * 4 + [2] * 4 + [0]]),
    }
    packed = seq2seq.batch(source, targets, start_id=0, **segments)
    total, weight, state = jax.jit(functools.partial(seq2seq.loss, model))(params, packed)
    assert float(weight) == 8
    assert state is None
    pairs = [seq2seq.batch(source[:, start : start + 4], targets[:, start : start + 4], start_id=0) for start in (0, 4)]

    @jax.jit
    def loss_and_logits(params, pair):
        hidden, _ = apply(model, params, pair.tokens, **pair.inputs)
        return seq2seq.loss(model, params, pair)[0], jnp.sum(cross_entropy(model.logits(params, hidden), pair.targets))

    expected = [loss_and_logits(params, pair) for pair in pairs]
    assert relative_error(total, sum(loss for loss, _ in expected)) < 1e-5
    assert relative_error(total, sum(losses for _, losses in expected)) < 1e-5


def test_rows_are_padded_on_the_right():
    tokens, segment_ids = seq2seq.pad([[5, 6, 1], [7], [8, 1]], pad_id=9)
    assert tokens.tolist() == [[5, 6, 1], [7, 9, 9], [8, 1, 9]]
    assert segment_ids.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert tokens.dtype == segment_ids.dtype == np.int32
    assert seq2seq.pad([[5]], 3)[0].tolist() == [[5, 0, 0]]


def test_invalid_input_raises_errors():
    source, targets = np.zeros((2, 4), np.int32), np.zeros((2, 3), np.int32)
    with pytest.raises(ValueError, match=r"source \[2, 4\] and targets \[3, 3\] must have .* the same batch size"):
        seq2seq.batch(source, np.zeros((3, 3), np.int32), start_id=0)
    for empty in ({"source": source, "targets": targets[:, :0]}, {"source": source[:, :0], "targets": targets}):
        with pytest.raises(
            ValueError, match=r"source \[2, \d\] and targets \[2, \d\] must have at least one token per row"
        ):
            seq2seq.batch(**empty, start_id=0)
    with pytest.raises(ValueError, match=r"source must be integers of shape \[batch, time\], got int32\[4\]"):
        seq2seq.batch(source[0], targets, start_id=0)
    with pytest.raises(ValueError, match=r"targets must be integers of shape \[batch, time\], got float64\[2, 3\]"):
        seq2seq.batch(source, targets.astype(float), start_id=0)
    with pytest.raises(ValueError, match=r"source_segment_ids \[2, 3\] must have the shape of source \[2, 4\]"):
        seq2seq.batch(source, targets, start_id=0, source_segment_ids=targets)
    with pytest.raises(ValueError, match=r"^segment_ids \[2, 4\] must have the shape of targets \[2, 3\]"):
        seq2seq.batch(source, targets, start_id=0, segment_ids=source)
    for rows, length, message in [
        ([[1, 2], []], None, "row 1 has no tokens: remove it"),
        ([[]], None, "row 0 has no tokens: remove it"),
        ([], None, "there are no rows to pad: give at least one"),
        ([[1, 2, 3, 4]], 3, "row 0 has 4 tokens: it must have at most 3; truncate or remove it"),
    ]:
        with pytest.raises(ValueError, match=message):
            seq2seq.pad(rows, length)


def test_values_that_int32_does_not_represent_are_not_cast():
    with pytest.raises(ValueError, match="row 1 has dtype float64, but batches hold int32: convert it to integers"):
        seq2seq.pad([[3], [1.7, 2.0]])
    with pytest.raises(ValueError, match="row 0 has values outside int32: from 1 to 1099511627781"):
        seq2seq.pad([[1, 2**40 + 5]])
    with pytest.raises(ValueError, match="the array of targets has values outside int32"):
        seq2seq.shift_right(np.array([[2**40 + 5]]), 0)
