"""Tests of text generation with several families: it equals generation on arrays for all batch sizes and padding."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data import ByteTokenizer
from jaxlm.data.tokenizers import PretrainedTokenizer
from jaxlm.decoding import (
    GREEDY,
    BeamConfig,
    GenerationConfig,
    Sampling,
    batches,
    beam_search,
    decoder_start_id,
    generate,
    generate_text,
    sample,
    stream_text,
    windows,
)
from jaxlm.testing.helpers import add_noise, decode_state, initial_params, tiny_model

BYTES = ByteTokenizer()
NUM_NEW = 6
CAUSAL, SOURCE = ("gpt2-tiny", "lstm-tiny"), ("t5-tiny", "attention-rnn-tiny")
TEXTS = ["a man", "o", "two dogs are running", "the sea is", "a", "snow on a hill", "men"]
SHORT_TEXTS = [text for text in TEXTS if len(text) <= 16]
"""Texts of one bucket, for tests that need few compiled functions."""
every_family = pytest.mark.parametrize("name", [*CAUSAL, *SOURCE])


@functools.cache
def model_and_params(name: str) -> tuple[Any, Any]:
    start = {"decoder_start_id": BYTES.end_id} if name == "attention-rnn-tiny" else {}
    model = tiny_model(name, vocab_size=264, **start)
    return model, add_noise(initial_params(model))


def config_of(**fields: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NUM_NEW, **fields})


def generate_on_arrays(name: str, source: str, num_beams: int) -> str:
    """Generate the text of one prompt or source with the functions on arrays, without padding."""
    model, params = model_and_params(name)
    ids, state = BYTES.encode(source)[None], None
    if model.reads_source:
        state = decode_state(model, params, ids, NUM_NEW)
        ids = np.array([[model.config.decoder_start_id]], np.int32)
    options: dict[str, Any] = {
        "max_new_tokens": NUM_NEW, "end_id": BYTES.end_id, "num_allowed_ids": BYTES.vocab_size, "state": state,
    }  # fmt: skip
    if num_beams == 1:
        out = generate(model, params, ids, **options)
        return BYTES.decode(np.asarray(out.tokens)[0, : int(out.lengths[0])])
    beams = beam_search(model, params, ids, beams=BeamConfig(num_beams=num_beams), **options)
    return BYTES.decode(np.asarray(beams.tokens)[0, 0, : int(beams.lengths[0, 0])])


@pytest.mark.thorough
@every_family
@pytest.mark.parametrize("num_beams", [1, 3])
def test_batches_of_padded_texts_equal_separate_texts_on_arrays(name: str, num_beams: int) -> None:
    texts = ["a man", "snow on a hill", "o sea"]
    out = generate_text(*model_and_params(name), BYTES, texts, config_of(num_beams=num_beams, batch_size=2))
    assert out == [generate_on_arrays(name, source, num_beams) for source in texts]
    assert len(set(out)) > 1, "this model ignores its inputs"


@pytest.mark.thorough
@every_family
def test_order_batch_size_and_buckets_do_not_change_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = model_and_params(name)
    expected = generate_text(model, params, BYTES, TEXTS, config_of(batch_size=None))
    assert generate_text(model, params, BYTES, TEXTS, config_of(batch_size=2)) == expected
    assert generate_text(model, params, BYTES, TEXTS[::-1], config_of()) == expected[::-1]
    monkeypatch.setattr(windows, "bucket_length", lambda length, limit=None: length)
    assert generate_text(model, params, BYTES, TEXTS, config_of()) == expected, "padding to buckets changes texts"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "draft"), [("gpt2-tiny", "lstm-tiny"), ("t5-tiny", "lstm-tiny"), ("attention-rnn-tiny", "t5-tiny")]
)
def test_proposals_of_a_draft_model_do_not_change_texts(name: str, draft: str) -> None:
    model, params = model_and_params(name)
    config = config_of(batch_size=4, stop=("e",))
    expected = generate_text(model, params, BYTES, SHORT_TEXTS, config)
    assert (
        generate_text(model, params, BYTES, SHORT_TEXTS, config, draft=model_and_params(draft), num_proposed=2)
        == expected
    )


def test_a_draft_model_that_cannot_propose_raises() -> None:
    model, params = model_and_params("gpt2-tiny")
    run = functools.partial(generate_text, model, params, BYTES, TEXTS)
    with pytest.raises(ValueError, match="num_beams=2: beam search does not use a draft model; set num_beams=1"):
        run(config_of(num_beams=2), draft=model_and_params("lstm-tiny"))
    with pytest.raises(
        ValueError, match=r"the draft model \(t5\) reads a source, but gpt does not: use a model without"
    ):
        run(config_of(), draft=model_and_params("t5-tiny"))
    classifier = tiny_model("bert-tiny")
    with pytest.raises(ValueError, match="it cannot propose tokens; load a language model"):
        run(config_of(), draft=(classifier, {}))
    small = tiny_model("lstm-tiny", vocab_size=100)
    with pytest.raises(ValueError, match="the draft model has 100 token ids, but 257 ids may be generated or read"):
        run(config_of(), draft=(small, {}))
    with pytest.raises(ValueError, match="num_proposed=0 must be at least 1"):
        run(config_of(), draft=model_and_params("lstm-tiny"), num_proposed=0)
    with pytest.raises(ValueError, match="num_proposed=2 needs a draft model"):
        run(config_of(), num_proposed=2)
    with pytest.raises(TypeError, match=r"draft must be the pair \(model, params\), got Model"):
        run(config_of(), draft=small)
    with pytest.raises(TypeError, match=r"draft must be the pair \(model, params\), got a tuple of 3"):
        run(config_of(), draft=(small, {}, 2))


@pytest.mark.thorough
def test_beams_of_prompts_with_different_lengths_that_fit_only_without_padding() -> None:
    model = tiny_model("gpt2-tiny", vocab_size=264, max_positions=12)
    run = functools.partial(generate_text, model, initial_params(model), BYTES)
    config = GenerationConfig(max_length=13, num_beams=2)
    texts = ["abcdefg", "b"]
    assert run(texts, config) == [run([text], config)[0] for text in texts]


@pytest.mark.thorough
def test_positions_that_a_draft_model_needs() -> None:
    """A draft model needs ``max_positions`` for each prompt with its new tokens and proposals."""
    (model, params), draft = model_and_params("gpt2-tiny"), tiny_model("gpt2-tiny", vocab_size=264, max_positions=48)
    draft_pair = (draft, initial_params(draft))
    texts, config = ["a" * 34, "b"], GenerationConfig(max_length=40)
    expected = generate_text(model, params, BYTES, texts, config)
    # Both rows fit, but not with padding and the largest number of new tokens.
    assert generate_text(model, params, BYTES, texts, config, draft=draft_pair) == expected
    with pytest.raises(ValueError, match=r"prompt 0 has 34 tokens. With 12 new tokens .* 49 positions, .* has 48"):
        generate_text(model, params, BYTES, texts[:1], config_of(max_new_tokens=12), draft=draft_pair)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gpt2-tiny", "t5-tiny"])
def test_samples_depend_on_the_index_of_a_text_and_not_on_its_batch(name: str) -> None:
    model, params = model_and_params(name)
    sampling, key = Sampling(top_k=50), jax.random.key(3)
    expected = generate_text(model, params, BYTES, SHORT_TEXTS, config_of(sampling=sampling, batch_size=None), key=key)
    config = config_of(sampling=sampling, batch_size=3)
    assert generate_text(model, params, BYTES, SHORT_TEXTS, config, key=key) == expected
    assert len(set(generate_text(model, params, BYTES, ["a"] * 6, config, key=key))) == 6


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["t5-tiny", "gpt2-tiny"])
def test_compilations_are_bounded_by_the_buckets(name: str) -> None:
    model, params = model_and_params(name)
    texts = ["x" * n for n in range(1, 40)]
    before = sample._prefill._cache_size(), windows._read_sources._cache_size()
    generate_text(model, params, BYTES, texts, config_of(batch_size=4, max_new_tokens=1))
    buckets = len({batches.bucket_length(n) for n in range(1, 40)})
    assert buckets == 3
    prefills, sources = sample._prefill._cache_size() - before[0], windows._read_sources._cache_size() - before[1]
    assert prefills <= buckets
    assert sources <= buckets
    generate_text(model, params, BYTES, texts[5:], config_of(batch_size=4, max_new_tokens=1))
    assert sample._prefill._cache_size() == before[0] + prefills, "a second call compiles nothing"
    assert windows._read_sources._cache_size() == before[1] + sources


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", SOURCE)
@pytest.mark.parametrize("chunk", [1, 4])
def test_streaming_equals_generating_from_a_source(name: str, chunk: int) -> None:
    model, params = model_and_params(name)
    sampling, key = Sampling(top_k=50), jax.random.key(1)
    config = config_of(sampling=sampling, max_new_tokens=12)
    (expected,) = generate_text(model, params, BYTES, ["a man"], config, key=key)
    pieces = list(stream_text(model, params, BYTES, "a man", config, key=key, chunk=chunk))
    assert "".join(pieces) == expected
    assert len(pieces) > 1


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("num_beams", [1, 2])
def test_stop_strings_end_outputs(num_beams: int) -> None:
    model, params = model_and_params("t5-tiny")
    (text_without_stop,) = generate_text(model, params, BYTES, ["a man"], config_of(num_beams=num_beams))
    stop = text_without_stop[3]
    config = config_of(num_beams=num_beams, stop=(stop,))
    assert generate_text(model, params, BYTES, ["a man"], config) == [
        text_without_stop[: text_without_stop.index(stop)]
    ]


def word_tokenizer() -> Any:
    """A word tokenizer with special tokens and T5's template ``text </s>``."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(words[:3])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PretrainedTokenizer(backend)


@pytest.mark.thorough
@pytest.mark.parametrize("num_beams", [1, 2])
def test_sources_have_special_tokens_and_outputs_have_none(num_beams: int) -> None:
    tokenizer, model = word_tokenizer(), tiny_model("t5-tiny", vocab_size=63)
    params = add_noise(initial_params(model, 5))
    ids = tokenizer.encode_inputs("w3 w9").ids
    assert ids[-1] == tokenizer.special_ids.eos == 1
    config = GenerationConfig(20, num_beams=num_beams)
    state = decode_state(model, params, ids[None], 20)
    out = beam_search(
        model,
        params,
        np.zeros((1, 1), np.int32),
        max_new_tokens=20,
        end_id=1,
        state=state,
        beams=BeamConfig(num_beams=num_beams),
    )
    tokens = np.asarray(out.tokens)[0, 0, : int(out.lengths[0, 0])].tolist()
    (output_text,) = generate_text(model, params, tokenizer, ["w3 w9"], config)
    assert output_text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert "<" not in output_text


def test_the_start_token_comes_from_the_model_or_else_the_tokenizer() -> None:
    tokenizer = word_tokenizer()
    assert decoder_start_id(tiny_model("t5-tiny", decoder_start_id=9), tokenizer) == 9
    other: Any = SimpleNamespace(family="other", config=object())
    assert decoder_start_id(other, PretrainedTokenizer(tokenizer.backend, {"bos": "w7"})) == tokenizer.encode("w7")[0]
    with pytest.raises(ValueError, match="no decoder_start_id and the tokenizer has no beginning-of-sequence"):
        decoder_start_id(other, BYTES)


def test_errors_name_the_bad_source() -> None:
    model, params = model_and_params("t5-tiny")
    with pytest.raises(ValueError, match=r"source 1 is '', which has no tokens"):
        generate_text(model, params, BYTES, ["a", ""])
    with pytest.raises(ValueError, match=r"source 0 is '', which has no tokens"):
        generate_text(tiny_model("t5-tiny"), {}, word_tokenizer(), [""])
    with pytest.raises(ValueError, match=r"source 0: id 120 at position 0 is outside the vocabulary of 100 ids"):
        generate_text(tiny_model("t5-tiny", vocab_size=100), {}, BYTES, ["xa"])
    with pytest.raises(ValueError, match=r"source 1: id -2 at position 1 is outside the vocabulary of 264 ids"):
        generate_text(model, params, BYTES, [np.array([5]), np.array([5, -2])])
    with pytest.raises(ValueError, match=r"num_beams=2: beam search cannot stream text; use generate_text"):
        stream_text(model, params, BYTES, "a", GenerationConfig(num_beams=2))


def test_error_for_a_source_longer_than_max_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = model_and_params("t5-tiny")
    monkeypatch.setattr(jaxlm.Model, "max_positions", 6)
    with pytest.raises(ValueError, match=r"source 1 has 7 tokens, but max_positions=6: shorten it"):
        generate_text(model, params, BYTES, ["a", "0123456"])


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bert-tiny", {}, "this is a BERT with a masked-token head: it generates no text; load a language model"),
        ("gpt2-tiny", {"task": "classification"}, "this is a GPT with a classification head: it generates no text"),
        ("t5-tiny", {"task": "none"}, "this is a T5 with no head: it generates no text"),
    ],
)
def test_error_for_a_model_without_a_text_head(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_text(jaxlm.get_model(name, **fields), {}, BYTES, ["a"])


def test_error_of_generate_shows_the_call_for_an_encoder_decoder() -> None:
    model, params = model_and_params("t5-tiny")
    start = np.zeros((1, 1), np.int32)
    with pytest.raises(
        ValueError, match=r"generate_text\(model, params, tokenizer, sources\).*state=model.init_decode_state\("
    ):
        generate(model, params, start, max_new_tokens=NUM_NEW)
    out = generate(
        model,
        params,
        start,
        max_new_tokens=NUM_NEW,
        state=decode_state(model, params, BYTES.encode("a man")[None], NUM_NEW),
    )
    assert out.tokens.shape == (1, NUM_NEW)


def test_one_key_per_row_is_accepted() -> None:
    model, params = model_and_params("gpt2-tiny")
    prompts, key = np.array([[5, 6], [5, 6]], np.int32), jax.random.key(0)
    options: dict[str, Any] = {"max_new_tokens": NUM_NEW, "sampling": Sampling()}
    folded = generate(model, params, prompts, key=key, **options).tokens
    given = generate(model, params, prompts, key=sample.fold_in_rows(key, np.array([1, 0])), **options).tokens
    np.testing.assert_array_equal(given, folded[::-1])
    with pytest.raises(ValueError, match="3 keys for 2 prompts: pass one key, or one key per prompt"):
        generate(model, params, prompts, key=jax.random.split(key, 3), **options)


def test_the_config_is_hashable() -> None:
    assert hash(GenerationConfig(stop=["a", "b"])) == hash(GenerationConfig(stop=("a", "b")))  # type: ignore[arg-type]
    assert GenerationConfig().resolve(jaxlm.get_model("gpt2-tiny"), BYTES).sampling == GREEDY
