"""Text requests for every family that generates text. Results must equal those of a loop over single rows."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data import ByteTokenizer, CharTokenizer
from jaxlm.data.tokenizers import PretrainedTokenizer
from jaxlm.decoding import GREEDY, GenerationConfig, Sampling, generate_text, score
from jaxlm.decoding.batches import bucket_length
from jaxlm.models.model import Metadata
from jaxlm.tasks.text_requests import TextRequests, rolling_windows
from jaxlm.testing.helpers import FIRST_VARIANTS, add_noise, decodes, initial_params, tiny_model
from tests.decoding.test_text import Reciter

BYTES = ByteTokenizer()
PREFIX = BYTES.end_id
NAMES = [
    name
    for name in FIRST_VARIANTS
    if decodes(tiny_model(name)) and tiny_model(name).task in ("causal", "permutation", "seq2seq")
]
LENGTH = 64
PAIRS = [("a man is ", "here"), ("the sea", " is"), ("", "o sea"), ("a man is here", " x")]


@functools.cache
def model_and_params(name: str) -> tuple[Any, Any]:
    start = {"decoder_start_id": 7} if tiny_model(name).reads_source else {}
    model = tiny_model(name, vocab_size=264, **start)
    return model, add_noise(initial_params(model))


@functools.cache
def requests(name: str, **options: Any) -> TextRequests:
    return TextRequests(*model_and_params(name), BYTES, batch_size=2, **options)


@functools.cache
def forward(model: Any) -> Any:
    def log_probs(params: Any, tokens: Any, source: Any) -> jax.Array:
        inputs = {} if source is None else {"source": source}
        return jax.nn.log_softmax(model.logits(params, model.apply(params, tokens, **inputs)[0])[0], axis=-1)

    return jax.jit(log_probs)


def next_log_probs(name: str, ids: list[int], source: list[int] | None) -> np.ndarray:
    """Return log-probabilities [len(ids), V] after each token of one row. Padding at the end does not change them."""
    model, params = model_and_params(name)
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(ids)] = ids
    source_row = None if source is None else np.array([source], np.int32)
    return np.asarray(forward(model)(params, row, source_row))[: len(ids)]


def reference_score(name: str, context: list[int], ids: list[int]) -> tuple[float, bool]:
    """Return the log-likelihood of ``ids`` after ``context``, and whether they are the greedy tokens."""
    if model_and_params(name)[0].reads_source:
        log_probs = next_log_probs(name, [7, *ids[:-1]], context)
    else:
        log_probs = next_log_probs(name, [*context, *ids[:-1]], None)[len(context) - 1 :]
    return float(log_probs[np.arange(len(ids)), ids].sum()), bool((log_probs.argmax(axis=-1) == ids).all())


def reference_tokens(name: str, context: list[int], count: int) -> list[int]:
    """Return greedy tokens after ``context``. Each token needs one forward pass."""
    reads_source = model_and_params(name)[0].reads_source
    row = [7] if reads_source else list(context)
    for _ in range(count):
        log_probs = next_log_probs(name, row, context if reads_source else None)
        row.append(int(log_probs[-1, : BYTES.vocab_size].argmax()))
        if row[-1] == BYTES.end_id:
            break
    return row[1:] if reads_source else row[len(context) :]


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_every_family_returns_the_results_of_a_loop_over_its_logits(name: str) -> None:
    text_requests = requests(name)
    reads_source = model_and_params(name)[0].reads_source
    (text,) = text_requests.generate([("a man is", {"max_gen_toks": 4})])
    new_tokens = reference_tokens(name, list(b"a man is"), 4)
    assert (
        text == BYTES.decode([*b"a man is", *new_tokens])[8:] if not reads_source else text == BYTES.decode(new_tokens)
    )

    greedy = BYTES.decode(new_tokens)
    pairs = [*PAIRS, ("a man is", greedy)] if "\ufffd" not in greedy else PAIRS
    scores = text_requests.log_likelihoods(pairs)
    for (context, continuation), (value, is_greedy) in zip(pairs, scores, strict=True):
        stripped = context.rstrip()
        ids = list((context[len(stripped) :] + continuation).encode())
        expected, expected_greedy = reference_score(name, list(stripped.encode()) or [PREFIX], ids)
        assert value == pytest.approx(expected, abs=1e-3)
        assert is_greedy == expected_greedy
    assert all(is_greedy for _, is_greedy in scores[len(PAIRS) :])

    (rolling_score, empty_score) = text_requests.rolling_log_likelihoods(["to be or not to be", ""])
    assert rolling_score == pytest.approx(reference_score(name, [PREFIX], list(b"to be or not to be"))[0], abs=1e-3)
    assert empty_score == 0.0


def test_all_families_that_decode_are_tested() -> None:
    families = {tiny_model(name).family for name in NAMES}
    assert families == {
        "gpt", "llama", "t5", "xlnet", "transformer_xl", "lstm", "gru", "attention_rnn", "attention_rnn_lm",
        "resnet_lm", "mamba2", "griffin", "gated_deltanet", "xlstm", "rwkv7",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- long texts


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "max_length"), [("gpt2-tiny", 16), ("lstm-tiny", 16), ("t5-tiny", 16)])
def test_long_contexts_are_truncated_and_long_texts_are_scored_in_windows(
    name: str, max_length: int, caplog: pytest.LogCaptureFixture
) -> None:
    text_requests = TextRequests(*model_and_params(name), BYTES, batch_size=2, max_length=max_length)
    reads_source = model_and_params(name)[0].reads_source
    context, continuation = list(b"0123456789 the sea is near"), list(b" here")
    with caplog.at_level(logging.WARNING):
        ((value, _), (untruncated_value, _)) = text_requests.log_likelihoods(
            [(bytes(context).decode(), " here"), ("the sea is", " near")]
        )
    truncated = context[-max_length:] if reads_source else context[-(max_length + 1 - len(continuation)) :]
    assert value == pytest.approx(reference_score(name, truncated, continuation)[0], abs=1e-3)
    assert untruncated_value == pytest.approx(reference_score(name, list(b"the sea is"), list(b" near"))[0], abs=1e-3)
    assert text_requests.truncated == {"log_likelihoods": 1, "rolling_log_likelihoods": 0, "generate": 0}
    assert "1 of 2 requests have a truncated context: the model reads at most 16 tokens" in caplog.text

    ids = list(b"it is the east, and the sea is far away")
    assert len(ids) == 39
    windows = [(0, 16, 0), (16, 32, 16), (32, 39, 23)]  # the last one begins at token 39 - 16
    expected = 0.0
    for first, end, begin in windows:
        row = [PREFIX, *ids]
        expected += reference_score(name, row[begin : first + 1], ids[first:end])[0]
    (rolling_score,) = text_requests.rolling_log_likelihoods([bytes(ids).decode()])
    assert rolling_score == pytest.approx(expected, abs=2e-3)

    (text,) = text_requests.generate([(bytes(context).decode(), {"max_gen_toks": 4})])
    truncated = context[-max_length:] if reads_source else context[-(max_length - 4) :]
    new_tokens = reference_tokens(name, truncated, 4)
    assert text == (
        BYTES.decode(new_tokens) if reads_source else BYTES.decode([*truncated, *new_tokens])[len(truncated) :]
    )
    assert text_requests.truncated == {"log_likelihoods": 1, "rolling_log_likelihoods": 1, "generate": 1}


@pytest.mark.parametrize(("size", "length"), [(1, 4), (4, 4), (5, 4), (11, 4), (3, 1)])
def test_rolling_windows_score_every_token_once(size: int, length: int) -> None:
    ids = np.arange(1, size + 1, dtype=np.int32)
    windows = rolling_windows(ids, 0, length)
    assert np.concatenate([scored for _, scored in windows]).tolist() == ids.tolist()
    for number, (context, scored) in enumerate(windows):
        row = np.concatenate([context, scored])
        assert np.array_equal(row, np.arange(row[0], row[-1] + 1))
        assert context.size >= 1
        assert row.size - 1 == length or (number == 0 and row.size - 1 == size)


def test_few_shapes_are_compiled() -> None:
    text_requests = requests("gpt2-tiny")
    compiled_before = score._token_scores._cache_size()
    text_requests.log_likelihoods([("x" * n, "y" * (1 + n % 3)) for n in range(1, 60)])
    compiled = score._token_scores._cache_size() - compiled_before
    assert compiled <= len({bucket_length(n, 64) for n in range(1, 65)}) == 4
    text_requests.rolling_log_likelihoods(["z" * n for n in range(1, 60)])
    assert score._token_scores._cache_size() - compiled_before <= 4


# ---------------------------------------------------------------------------------------------- options and tokens


@pytest.mark.thorough
def test_generation_options() -> None:
    """Stop strings, sampling options and beams of a request have the meaning of the harness."""
    text_requests = requests("gpt2-tiny")
    (full_text,) = text_requests.generate([("a man", {"max_new_tokens": 8})])
    stop = next(character for character in full_text if character != full_text[0])
    expected = full_text[: full_text.index(stop)]
    texts_with_stop = text_requests.generate(
        [("a man", {"max_gen_toks": 8, "until": until, "do_sample": False}) for until in (stop, ["\0\0", stop], [""])]
    )
    assert texts_with_stop == [expected, expected, full_text]

    sampling_requests = [("a man", {"max_gen_toks": 8, "temperature": 1.0})] * 3
    texts = text_requests.generate(sampling_requests)
    assert len(set(texts)) > 1, "repeated requests have different samples"
    assert text_requests.generate(sampling_requests) == texts
    options = {"do_sample": True, "top_k": 0, "top_p": 0.5, "min_p": 0.0, "repetition_penalty": 1.2}
    config = text_requests.generation_config(options)
    assert config.sampling == Sampling(1.0, None, 0.5, None, 1.2)
    assert config.max_new_tokens == 256
    greedy = text_requests.generation_config({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "num_beams": 3})
    assert greedy.sampling is not None
    assert (greedy.sampling.temperature, greedy.sampling.top_p, greedy.num_beams) == (0.0, None, 3)
    # Options that are not set have the defaults of transformers.
    assert greedy.early_stopping is False
    assert text_requests.generation_config({"do_sample": True}).sampling == Sampling(1.0, 50)


def test_sampling_options_that_are_not_set_are_read_from_the_file() -> None:
    def sampling_of(options: dict[str, Any], **fields: Any) -> Sampling | None:
        model, params = model_and_params("gpt2-tiny")
        model = dataclasses.replace(model, metadata=Metadata(generation_config=fields))
        return TextRequests(model, params, BYTES).generation_config(options).sampling

    fields = {"temperature": 0.6, "top_k": 7, "min_p": 0.1}
    assert sampling_of({"do_sample": True}, do_sample=True, **fields) == Sampling(0.6, 7, min_p=0.1)
    assert sampling_of({"do_sample": True}, do_sample=False, num_beams=1, **fields) == Sampling(0.6, 7, min_p=0.1)
    assert sampling_of({"temperature": 0.8, "min_p": 0}, do_sample=True, **fields) == Sampling(0.8, 7)
    assert sampling_of({}, do_sample=True, **fields) == sampling_of({"do_sample": False}, **fields) == GREEDY
    with pytest.raises(ValueError, match=r"do_sample=True and temperature=0.0 .* read from generation_config.json"):
        sampling_of({"do_sample": True}, temperature=0.0)
    with pytest.raises(ValueError, match=r"num_beams=2 searches for likely texts, but temperature=0.6 draws"):
        sampling_of({"do_sample": True, "num_beams": 2}, **fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"typical_p": 0.5, "until": "x"}, "typical_p=0.5: not supported: choose from until, max_gen"),
        ({"max_gen_toks": 3, "max_tokens": 3}, "max_gen_toks and max_tokens have the same meaning: set one of them"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True and temperature=0.0 contradict each other"),
        ({"do_sample": "False"}, "do_sample='False' must be true or false"),
        ({"max_gen_toks": 3.7}, "max_gen_toks=3.7 must be a whole number"),
        ({"max_gen_toks": True}, "max_gen_toks=True must be a whole number"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"top_k": "5", "do_sample": True}, "top_k='5' must be a whole number"),
        ({"until": 5}, "until=5 must be a string or a tuple in which each entry is a string"),
        ({"until": [5]}, r"until=\(5,\) must be a string or a tuple in which each entry is a string"),
        ({"temperature": -0.5}, "temperature=-0.5 must be finite and at least 0"),
        ({"max_gen_toks": 64}, "max_gen_toks=64 leaves no space for the context, because the model reads max_length"),
        ({"temperature": 0.5, "num_beams": 2}, "num_beams=2 searches for likely texts, but temperature=0.5 draws"),
    ],
)
def test_invalid_options_raise_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        requests("gpt2-tiny").generate([("a man", options)])


def test_invalid_requests_raise_errors() -> None:
    text_requests = requests("gpt2-tiny")
    with pytest.raises(ValueError, match="the continuation of request 1 has no tokens: ''"):
        text_requests.log_likelihoods([("a", "b"), ("a", "")])
    message = "request 0 has 65 tokens, but the model reads 64: 'x{40}'...; shorten it, set a larger max_length, or use"
    with pytest.raises(ValueError, match=message):
        text_requests.log_likelihoods([("a", "x" * 65)])
    assert (
        text_requests.log_likelihoods([])
        == text_requests.rolling_log_likelihoods([])
        == text_requests.generate([])
        == []
    )
    with pytest.raises(ValueError, match="this is a BERT with a masked-token head: it does not score or generate text"):
        TextRequests(jaxlm.get_model("bert-tiny"), {}, BYTES)
    for options, message in (
        ({"batch_size": "auto"}, "batch_size='auto' must be an integer of at least 1"),
        ({"batch_size": True}, "batch_size=True must be an integer of at least 1"),
        ({"batch_size": None}, "batch_size=None must be an integer of at least 1"),
        ({"max_gen_toks": None}, "max_gen_toks=None must be an integer of at least 1"),
        ({"max_length": 65}, "max_length=65 exceeds the model's max_positions=64"),
        ({"prefix_token_id": 257}, "prefix_token_id=257 must be an id of the vocabulary, from 0 to 256"),
    ):
        with pytest.raises(ValueError, match=message):
            TextRequests(*model_and_params("gpt2-tiny"), BYTES, **options)


def test_a_tokenizer_without_special_tokens_needs_a_prefix() -> None:
    tokenizer = CharTokenizer.from_text("a man is here\n")
    with pytest.raises(ValueError, match="a text without a context needs a prefix token.*set prefix_token_id"):
        TextRequests(*model_and_params("gpt2-tiny"), tokenizer).rolling_log_likelihoods(["a man"])
    prefix = int(tokenizer.encode("\n")[0])
    text_requests = TextRequests(*model_and_params("gpt2-tiny"), tokenizer, prefix_token_id=prefix)
    ids = tokenizer.encode("a man").tolist()
    expected = reference_score("gpt2-tiny", [prefix], ids)[0]
    assert text_requests.rolling_log_likelihoods(["a man"]) == [pytest.approx(expected, abs=1e-3)]
    # If a text begins with the prefix token, this token is the context.
    scores = text_requests.log_likelihoods([("", "\na man"), ("", "a man")])
    assert [value for value, _ in scores] == [pytest.approx(expected, abs=1e-3)] * 2


def template_tokenizer(single: str) -> PretrainedTokenizer:
    """Return a word tokenizer with ``<s>`` (1), ``</s>`` (2) and a template."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(20))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(words[:3])
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PretrainedTokenizer(backend)


def ids_of(rows: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[list[int], list[int]]]:
    return [(context.tolist(), ids.tolist()) for context, ids in rows]


def test_requests_have_the_special_tokens_of_the_template() -> None:
    tokenizer = template_tokenizer("<s> $A </s>")
    causal = TextRequests(*model_and_params("llama-tiny"), tokenizer)
    pairs = [("w0 ", "w1"), ("<s> w0", " w1"), ("", "w1"), (" ", "w1")]
    assert ids_of(causal._encode_pairs(pairs)) == [([1, 3], [4]), ([1, 3], [4]), ([1], [4]), ([1], [4])]
    assert [ids.tolist() for ids in causal._encode(["w0", ""])] == [[1, 3], []]
    source = TextRequests(*model_and_params("t5-tiny"), template_tokenizer("$A </s>"))
    assert ids_of(source._encode_pairs(pairs[:1])) == [([3, 2], [4])]
    assert [ids.tolist() for ids in source._encode(["w0", ""])] == [[3, 2], [2]]


def test_special_tokens_are_removed_from_generated_text_by_their_ids() -> None:
    """Ordinary tokens that spell a special token are text. A special token in a stop string ends the text."""
    import tokenizers
    from tokenizers import decoders, models

    characters = ["</s>", "<s>", "a", "<", "s", ">", "b"]
    backend = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(characters)}, []))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(characters[:2])
    tokenizer = PretrainedTokenizer(backend, {"bos": "<s>", "eos": "</s>"})
    params = jax.numpy.asarray([2, 3, 4, 5, 6, 1, 2, 6, 0] + [0] * 99)  # a<s>b, and then <s>ab</s>
    text_requests = TextRequests(Reciter(), params, tokenizer)
    options: list[dict[str, Any]] = [{}, {"until": "<s>"}, {"until": ["ba"]}, {"until": "a<s>"}, {"until": ["</s>"]}]
    texts = text_requests.generate([("a", {"max_gen_toks": 20, **each}) for each in options])
    assert texts == ["<s>bab", "", "<s>", "<s>b", "<s>bab"]
    assert text_requests.generation_config({"until": ["a<s>"]}).end_ids == (0, 1)
    assert requests("gpt2-tiny").generation_config({"until": ["a|b"]}).end_ids == (BYTES.end_id,)


def test_prompts_can_be_ids() -> None:
    config = GenerationConfig(8, GREEDY)
    texts = ["a man", "the sea"]
    texts_from_ids = generate_text(
        *model_and_params("gpt2-tiny"), BYTES, [BYTES.encode(text) for text in texts], config
    )
    assert texts_from_ids == generate_text(*model_and_params("gpt2-tiny"), BYTES, texts, config)
    with pytest.raises(TypeError, match="pass all prompts as strings or all as ids, got 1 strings of 2"):
        generate_text(*model_and_params("gpt2-tiny"), BYTES, ["a", BYTES.encode("b")], config)  # type: ignore[list-item]
