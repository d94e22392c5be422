"""Predictions for texts. They do not depend on the batch, and few shapes are compiled."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

import jaxlm
from jaxlm.data import ByteTokenizer
from jaxlm.decoding import NotFiniteError, generate, log_likelihood
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.tasks import classification, predict
from jaxlm.tasks.predict import Predictions, classify, label_words, score_ids, score_texts
from jaxlm.testing.helpers import FIRST_VARIANTS, add_noise, decode_state, initial_params, tiny_model

BYTES = ByteTokenizer()
TEXTS = ["a fine film", "dull", "not so bad, after all", "a"]
CLASSIFIERS = tuple(name for name in FIRST_VARIANTS if hasattr(tiny_model(name).module, "pool"))


@functools.cache
def model_and_params(name: str, **fields: Any) -> tuple[Any, Any]:
    model = tiny_model(name, vocab_size=264, **fields)
    return model, add_noise(initial_params(model))


def classifier(name: str = "bert-tiny") -> tuple[Any, Any]:
    return model_and_params(name, task="classification", num_labels=3)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model: Any, params: Any, ids: Any, **inputs: Any) -> jax.Array:
    """Return the logits [T, V] of one text without padding."""
    return model.logits(params, model.apply(params, ids, **inputs)[0])[0]


@functools.partial(jax.jit, static_argnums=0)
def probabilities_of(model: Any, params: Any, ids: Any, **inputs: Any) -> jax.Array:
    """Return the probabilities of the labels of one text without padding."""
    hidden, _ = model.apply(params, ids, **inputs)
    return jax.nn.softmax(model.logits(params, model.pool(params, hidden))[0, 0])


def words_tokenizer() -> Any:
    """Return a WordPiece tokenizer with the template of BERT."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    from jaxlm.data.tokenizers import PretrainedTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "play", "##ing", "ann", "sings", "."]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(words[:4])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PretrainedTokenizer(backend)


# ---------------------------------------------------------------------------------------------- labels of texts


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_predicts_the_same_with_and_without_a_batch(name: str) -> None:
    model, params = classifier(name)
    predictions = classify(model, params, BYTES, TEXTS, batch_size=4)
    assert predictions.probabilities.shape == (4, 3)
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert predictions.labels == predictions.probabilities.argmax(axis=1).tolist(), (
        "labels are numbers, because the model has no label names"
    )

    ids = BYTES.encode(TEXTS[1])[None]
    types = (
        {}
        if "token_types" not in inspect.signature(model.module.apply).parameters
        else {"token_types": np.zeros_like(ids)}
    )
    expected = probabilities_of(model, params, ids, **types)
    np.testing.assert_allclose(predictions.probabilities[1], expected, atol=2e-5)


def test_batch_size_and_order_do_not_change_predictions() -> None:
    expected = classify(*classifier(), BYTES, TEXTS).probabilities
    np.testing.assert_allclose(classify(*classifier(), BYTES, TEXTS, batch_size=3).probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(classify(*classifier(), BYTES, TEXTS[::-1]).probabilities, expected[::-1], atol=1e-5)


@pytest.mark.thorough
def test_one_compilation_per_bucket() -> None:
    compiled_before = predict._label_probabilities._cache_size()
    texts = ["x" * n for n in range(1, 40)]
    model, params = model_and_params("bert-tiny", task="classification", num_labels=5)
    classify(model, params, BYTES, texts, batch_size=2)
    assert predict._label_probabilities._cache_size() == compiled_before + 3, "the buckets have 16, 32 and 48 tokens"
    classify(model, params, BYTES, texts[3:30], batch_size=2)
    assert predict._label_probabilities._cache_size() == compiled_before + 3


def test_pairs_use_the_template_and_token_types_of_the_tokenizer() -> None:
    tokenizer, (model, params) = words_tokenizer(), classifier()
    actual = classify(model, params, tokenizer, ["ann sings"], ["playing ."]).probabilities[0]
    ids, types = np.array([[2, 6, 7, 3, 4, 5, 8, 3]]), np.array([[0, 0, 0, 0, 1, 1, 1, 1]])
    expected = probabilities_of(model, params, ids, token_types=types)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    single_text = classify(model, params, tokenizer, ["ann sings playing ."]).probabilities[0]
    assert np.abs(actual - single_text).max() > 1e-3


def test_labels_have_the_label_names_of_the_model() -> None:
    assert Predictions(np.array([[0.1, 0.9], [0.6, 0.4]]), ("no", "yes")).labels == ["yes", "no"]
    model, params = classifier()
    predictions = classify(model.with_labels(["bad", "good", "so-so"]), params, BYTES, TEXTS)
    assert predictions.labels == [("bad", "good", "so-so")[i] for i in predictions.ids]
    token_classifier, params = model_and_params("bert-tiny", task="token_classification", num_labels=2)
    (labels,) = label_words(token_classifier.with_labels(["O", "NAME"]), params, BYTES, ["ann sings"])
    assert {label.label for label in labels} <= {"O", "NAME"}


def test_labels_of_a_multi_label_model_are_independent(tmp_path: Path) -> None:
    save_pretrained(tmp_path, *classifier())
    (tmp_path / "checksums.json").unlink()  # the configuration changes
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())

    def loaded(problem: str, **overrides: Any) -> Any:
        path.write_text(json.dumps({**config, "problem_type": problem}))
        return load_pretrained(tmp_path, **overrides)

    shares = classify(*classifier(), BYTES, TEXTS).probabilities
    probabilities = classify(*loaded("multi_label_classification"), BYTES, TEXTS).probabilities
    odds = probabilities / (1 - probabilities)
    np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), shares, rtol=1e-4)
    encoded: Any = [{"tokens": BYTES.encode(text), "label": 0} for text in TEXTS]
    predicted = classification.predict(*loaded("multi_label_classification"), encoded)
    np.testing.assert_allclose(predicted, probabilities, rtol=1e-4)
    with pytest.raises(ValueError, match="num_labels=3 and problem_type='regression': its outputs are regression"):
        classification.predict(*loaded("regression"), encoded)
    assert np.abs(probabilities.sum(axis=1) - 1).min() > 1e-3
    with pytest.raises(ValueError, match="num_labels=3 and problem_type='regression': its outputs are regression"):
        classify(*loaded("regression"), BYTES, TEXTS)
    new_head = classify(*loaded("regression", num_labels=2), BYTES, TEXTS).probabilities
    np.testing.assert_allclose(new_head.sum(axis=1), 1.0, rtol=1e-5)
    # A multi-label model may have one label.
    model, params = loaded("multi_label_classification")
    one_label = dataclasses.replace(model.config, num_labels=1)
    params["classifier"] = {name: array[..., :1] for name, array in params["classifier"].items()}
    got = classify(dataclasses.replace(model, config=one_label), params, BYTES, TEXTS).probabilities
    np.testing.assert_allclose(got, probabilities[:, :1], rtol=1e-5)


def test_errors_for_texts_that_cannot_be_classified() -> None:
    with pytest.raises(ValueError, match="text 1 is '', which has no tokens"):
        classify(*classifier(), BYTES, ["a", ""])
    with pytest.raises(ValueError, match="text 1 is '', which has no tokens"):
        classify(*classifier(), words_tokenizer(), ["ann", ""])
    with pytest.raises(ValueError, match="text 1 has 65 tokens, but max_positions=64: shorten it"):
        classify(*classifier(), BYTES, ["a", "a" * 65])
    with pytest.raises(ValueError, match=r"text 0: id 120 at position 0 is outside the vocabulary of 100 ids"):
        classify(tiny_model("bert-tiny", vocab_size=100, task="classification"), {}, BYTES, ["xa"])
    with pytest.raises(ValueError, match="the tokenizer returns token type 1, but roberta has num_token_types=1"):
        classify(*classifier("roberta-tiny"), BYTES, ["a"], ["b"])
    with pytest.raises(TypeError, match=r"one string: pass \['a'\]"):
        classify(*classifier(), BYTES, "a")
    with pytest.raises(ValueError, match="there are no texts"):
        classify(*classifier(), BYTES, [])
    with pytest.raises(ValueError, match="this is a BERT with a masked-token head: it does not classify texts"):
        classify(jaxlm.get_model("bert-tiny"), {}, BYTES, ["a"])
    with pytest.raises(ValueError, match="num_labels=1 and problem_type=None: .* compute them with model.logits"):
        classify(jaxlm.get_model("bert-tiny", task="classification", num_labels=1), {}, BYTES, ["a"])


def model_with_nan_embedding(name: str, letter: str, **fields: Any) -> tuple[Any, Any]:
    """Return a model and parameters with NaN in the embedding of one byte."""
    model, params = model_and_params(name, **fields)
    table = params["token_embedding"].at[ord(letter), :5].set(np.nan)
    return model, {**params, "token_embedding": table}


@pytest.mark.thorough
def test_errors_name_texts_with_nonfinite_logits() -> None:
    message = r"the logits of text 1, 3 are not finite: 1 parameter is not finite: token_embedding \(5 of \d+ values\)"
    texts = ["a fine film", "dul*", "not so bad, after all", "*"]
    nan_classifier = model_with_nan_embedding("bert-tiny", "*", task="classification", num_labels=3)
    with pytest.raises(NotFiniteError, match=message):
        classify(*nan_classifier, BYTES, texts, batch_size=4)
    assert np.isfinite(classify(*nan_classifier, BYTES, TEXTS, batch_size=4).probabilities).all()
    encoded: list[Any] = [{"tokens": BYTES.encode(text), "label": 0} for text in ["***", *texts[:3]]]
    with pytest.raises(NotFiniteError, match="the logits of example 0, 2 are not finite: 1 parameter"):
        classification.predict(*nan_classifier, encoded, batch_size=4)
    with pytest.raises(NotFiniteError, match=message):
        label_words(
            *model_with_nan_embedding("bert-tiny", "*", task="token_classification", num_labels=4),
            BYTES,
            texts,
            batch_size=4,
        )
    # The last token of text 2 is not an input, so only the logits of text 1 are not finite.
    texts = ["a fine film", "d*ll", "not so bad, after all*"]
    with pytest.raises(NotFiniteError, match="the logits of text 1 are not finite: 1 parameter"):
        score_texts(*model_with_nan_embedding("lstm-tiny", "*", tie_embeddings=False), BYTES, texts, batch_size=2)


# ---------------------------------------------------------------------------------------------- labels of words


def test_a_word_has_the_label_of_its_first_token() -> None:
    model, params = model_and_params("bert-tiny", task="token_classification", num_labels=4)
    tokenizer, texts = words_tokenizer(), ["ann sings", "ann playing  sings."]
    ids = tokenizer.encode_inputs(texts[1]).ids
    assert ids.tolist() == [2, 6, 4, 5, 7, 8, 3]
    expected = softmax(np.asarray(logits_of(model, params, ids[None], token_types=np.zeros((1, 7), np.int32))), axis=-1)
    _, labels = label_words(model, params, tokenizer, texts)
    assert [texts[1][label.start : label.end] for label in labels] == ["ann", "playing", "sings."]
    assert [label.label for label in labels] == expected.argmax(axis=1)[[1, 2, 4]].tolist()
    np.testing.assert_allclose([label.probability for label in labels], expected.max(axis=1)[[1, 2, 4]], atol=1e-5)
    _, labels = label_words(model, params, tokenizer, texts, unit="token")
    assert [texts[1][label.start : label.end] for label in labels] == ["ann", "play", "ing", "sings", "."]
    assert [label.label for label in labels] == expected.argmax(axis=1)[1:6].tolist()


def test_a_byte_tokenizer_labels_words_of_several_bytes() -> None:
    model, params = model_and_params("bert-tiny", task="token_classification", num_labels=4)
    (labels,) = label_words(model, params, BYTES, ["né là"])
    assert [(label.start, label.end) for label in labels] == [(0, 2), (3, 5)]
    with pytest.raises(ValueError, match="unit='byte' must be 'word' or 'token'"):
        label_words(model, params, BYTES, ["a"], unit="byte")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this is a BERT with a classification head: it does not label words"):
        label_words(*classifier(), BYTES, ["a"])


# -------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["gpt2-tiny", "lstm-tiny"])
def test_causal_families_score_all_tokens_except_the_first(name: str) -> None:
    model, params = model_and_params(name)
    texts = TEXTS[:3]
    scores = score_texts(model, params, BYTES, texts, batch_size=2)
    assert scores.num_tokens.tolist() == [len(text) - 1 for text in texts]
    for text, actual, total in zip(texts, scores.token_log_likelihoods, scores.log_likelihoods, strict=True):
        expected = np.asarray(log_likelihood(model, params, BYTES.encode(text)[None]))[0]
        np.testing.assert_allclose(actual, expected, atol=2e-5)
        assert total == pytest.approx(expected.sum(), rel=1e-5)
    mean = -scores.log_likelihoods.sum() / scores.num_tokens.sum()
    assert scores.perplexity == pytest.approx(np.exp(mean))


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["t5-tiny", "attention-rnn-tiny"])
def test_encoder_decoders_score_targets_given_sources(name: str) -> None:
    model, params = model_and_params(name, decoder_start_id=7)
    start = 7
    texts, sources = ["yes", "a film"], ["ja", "ein Film, ganz gut"]
    scores = score_texts(model, params, BYTES, texts, sources, batch_size=2)
    for number, (text, source) in enumerate(zip(texts, sources, strict=True)):
        ids = np.append(BYTES.encode(text), 256)
        decoder_input = np.append(start, ids[:-1])[None].astype(np.int32)
        logits = logits_of(model, params, decoder_input, source=BYTES.encode(source)[None])
        log_probs = log_softmax(np.asarray(logits), axis=-1)
        np.testing.assert_allclose(scores.token_log_likelihoods[number], log_probs[np.arange(ids.size), ids], atol=2e-5)


def test_scores_equal_the_log_probabilities_of_generated_tokens() -> None:
    model, params = model_and_params("t5-tiny")
    source = BYTES.encode("ja")[None]
    out = generate(
        model,
        params,
        np.zeros((1, 1), np.int32),
        max_new_tokens=5,
        num_allowed_ids=128,
        state=decode_state(model, params, source, 5),
    )
    text = BYTES.decode(np.asarray(out.tokens)[0])
    actual = score_texts(model, params, BYTES, [text], ["ja"]).token_log_likelihoods[0]
    assert actual.size == 6
    logits = np.asarray(logits_of(model, params, np.append(0, np.asarray(out.tokens)[0, :4])[None], source=source))
    log_allowed_probability = logsumexp(logits[:, :128], axis=-1) - logsumexp(logits, axis=-1)
    np.testing.assert_allclose(actual[:5], np.asarray(out.log_probs)[0] + log_allowed_probability, atol=2e-5)


def test_errors_for_texts_that_cannot_be_scored() -> None:
    gpt, t5 = model_and_params("gpt2-tiny"), model_and_params("t5-tiny")
    with pytest.raises(ValueError, match="text 1 is 'a', 1 tokens: the first token is not predicted"):
        score_texts(*gpt, BYTES, ["ab", "a"])
    assert score_texts(*gpt, BYTES, ["x" * 65]).num_tokens.tolist() == [64], "the last token is not an input"
    with pytest.raises(
        ValueError, match=r"text 0 has 66 tokens, but max_positions=64: score it in windows, with jaxlm"
    ):
        score_texts(*gpt, BYTES, ["x" * 66])
    with pytest.raises(ValueError, match="gpt reads no source: do not pass sources"):
        score_texts(*gpt, BYTES, ["ab"], ["cd"])
    with pytest.raises(ValueError, match="t5 needs one source for each text: got 1 for 2 texts"):
        score_texts(*t5, BYTES, ["ab", "c"], ["cd"])
    with pytest.raises(ValueError, match="got none for 2 texts"):
        score_texts(*t5, BYTES, ["ab", "c"])
    with pytest.raises(ValueError, match="source 0 is '', which has no tokens"):
        score_texts(*t5, BYTES, ["ab"], [""])
    with pytest.raises(TypeError, match=r"texts must be a sequence of strings, got one string: pass \['ab'\]"):
        score_texts(*t5, BYTES, "ab", ["cd"])
    with pytest.raises(TypeError, match=r"sources must be a sequence of strings, got one string: pass \['cd'\]"):
        score_texts(*t5, BYTES, ["ab"], "cd")
    with pytest.raises(TypeError, match=r"texts\[1\] must be a string, got NoneType"):
        score_texts(*gpt, BYTES, ["ab", None])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"sources\[0\] must be a string, got int: 3"):
        score_texts(*t5, BYTES, ["ab"], [3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="there are no texts"):
        score_texts(*t5, BYTES, [], [])
    with pytest.raises(
        ValueError, match=r"the context of text 0: expected a 1-D array of integer ids, got float64\[2\]"
    ):
        score_ids(*gpt, [np.array([1.0, 2.7])], [np.array([3])])
    with pytest.raises(ValueError, match=r"text 0: expected a 1-D array of integer ids, got int64\[1, 2\]"):
        score_ids(*gpt, [np.array([1])], [np.array([[3, 4]])])
    with pytest.raises(ValueError, match="there are no continuations: pass at least one"):
        score_ids(*gpt, [], [])
    with pytest.raises(ValueError, match="this is a BERT with a masked-token head: it does not score texts"):
        score_texts(jaxlm.get_model("bert-tiny"), {}, BYTES, ["ab"])
