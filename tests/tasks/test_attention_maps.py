"""Attention maps: the tokens of both axes and the weights. Other texts in the batch do not change the weights."""

import numpy as np
import pytest

import jaxlm
from jaxlm.data import ByteTokenizer
from jaxlm.tasks.attention_maps import attention_maps, write_attention_maps
from jaxlm.testing.helpers import initial_params
from jaxlm.training.report import read_attention


def model_params_tokenizer(name, **changes):
    model = jaxlm.get_model(name, vocab_size=256, **changes)
    return model, initial_params(model), ByteTokenizer()


@pytest.mark.thorough
def test_an_encoder_decoder_has_a_row_for_each_output_token():
    model, params, tokenizer = model_params_tokenizer("t5-tiny")
    both = attention_maps(model, params, tokenizer, ["a house", "sun"], ["ein Haus", "die Sonne"])
    assert [item.title for item in both] == ["a house", "sun"]
    assert list(both[1].columns) == ["s", "u", "n"]
    assert "".join(both[1].rows) == "die Sonne"
    np.testing.assert_allclose(np.sum(both[1].weights, axis=1), 1.0, rtol=1e-5)
    [alone] = attention_maps(model, params, tokenizer, ["sun"], ["die Sonne"])
    np.testing.assert_allclose(both[1].weights, alone.weights, atol=1e-6)
    maps = attention_maps(model, params, tokenizer, ["a house", "sun"], ["", "die Sonne"], output_special_tokens=False)
    assert [item.title for item in maps] == ["sun"], "an empty output has no rows"


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["bert-tiny", "gpt2-tiny", "transformer-xl-tiny"])
def test_other_families_have_the_tokens_of_the_text_on_both_axes(name):
    model, params, tokenizer = model_params_tokenizer(name)
    item = attention_maps(model, params, tokenizer, ["a house", "sun"])[1]
    assert list(item.rows) == list(item.columns) == ["s", "u", "n"]
    np.testing.assert_allclose(np.sum(item.weights, axis=1), 1.0, rtol=1e-5)


def test_attention_pooling_has_a_row_for_each_hop():
    model, params, tokenizer = model_params_tokenizer("attention-rnn-classifier-tiny")
    item = attention_maps(model, params, tokenizer, ["a house", "sun"])[1]
    assert list(item.rows) == ["hop 1", "hop 2"]
    np.testing.assert_allclose(np.sum(item.weights, axis=1), 1.0, rtol=1e-5)


def test_invalid_arguments_raise_errors():
    model, params, tokenizer = model_params_tokenizer("t5-tiny")
    with pytest.raises(ValueError, match="an encoder-decoder needs outputs"):
        attention_maps(model, params, tokenizer, ["sun"])
    with pytest.raises(ValueError, match="1 texts and 2 outputs"):
        attention_maps(model, params, tokenizer, ["sun"], ["a", "b"])
    with pytest.raises(TypeError, match="got one string"):
        attention_maps(model, params, tokenizer, "sun", ["a"])
    model, params, tokenizer = model_params_tokenizer("bert-tiny")
    with pytest.raises(ValueError, match="only an encoder-decoder has outputs"):
        attention_maps(model, params, tokenizer, ["sun"], ["a"])
    small = model.with_fields(vocab_size=5)
    with pytest.raises(ValueError, match="text 0: id [0-9]+ at position 0 is outside the vocabulary of 5 ids"):
        attention_maps(small, params, tokenizer, ["sun"])
    model, params, tokenizer = model_params_tokenizer("gpt2-tiny")
    with pytest.raises(ValueError, match="text 1: no tokens, at least 1 needed"):
        attention_maps(model, params, tokenizer, ["sun", ""])
    with pytest.raises(ValueError, match="there are no texts"):
        attention_maps(model, params, tokenizer, [])
    limit = model.config.max_positions
    with pytest.raises(ValueError, match=f"text 1 has {limit + 1} tokens, but max_positions={limit}: shorten it"):
        attention_maps(model, params, tokenizer, ["sun", "a" * (limit + 1)], max_tokens=None)


def test_ready_encodings_are_not_encoded_again():
    model, params, tokenizer = model_params_tokenizer("bert-tiny")
    window = tokenizer.encode_windows("who", "a house in the sun", max_length=8, stride=0)[1]
    [item] = attention_maps(model, params, tokenizer, ["who"], pairs=["a house in the sun"], encodings=[window])
    assert "".join(item.columns) == "who" + "se in"
    with pytest.raises(ValueError, match="each text needs one encoding: got 1 texts and 2 encodings"):
        attention_maps(model, params, tokenizer, ["who"], pairs=["a house in the sun"], encodings=[window] * 2)
    with pytest.raises(ValueError, match="encoding 0 has two texts: pass the second texts as pairs"):
        attention_maps(model, params, tokenizer, ["who"], encodings=[window])


def test_long_texts_are_truncated():
    model, params, tokenizer = model_params_tokenizer("gpt2-tiny")
    [item] = attention_maps(model, params, tokenizer, ["a house in the sun"], max_tokens=7)
    assert "".join(item.columns) == "a house"
    assert np.shape(item.weights) == (7, 7)


def test_a_file_is_written_only_for_a_family_with_attention(tmp_path):
    write_attention_maps(tmp_path, *model_params_tokenizer("gpt2-tiny"), [])
    assert not list(tmp_path.iterdir())
    write_attention_maps(tmp_path, *model_params_tokenizer("gpt2-tiny"), ["sun"])
    assert [item.title for item in read_attention(tmp_path)] == ["sun"]


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["lstm-tiny", "gru-tiny", "resnet-lm-tiny"])
def test_no_file_is_written_for_a_family_without_attention(tmp_path, name):
    write_attention_maps(tmp_path, *model_params_tokenizer(name), ["sun"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="has no attention weights"):
        attention_maps(*model_params_tokenizer(name), ["sun"])
