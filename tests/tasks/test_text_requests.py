"""Requests in text against a plain loop over the logits of one row at a time, for every family that decodes."""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data import ByteTokenizer, CharTokenizer
from jaxlm.data.tokenizers import PretrainedTokenizer
from jaxlm.decoding import GREEDY, GenerationConfig, generate_text, score
from jaxlm.decoding.batches import bucket_length
from jaxlm.tasks.text_requests import TextRequests, rolling_windows
from tests.helpers import FIRST_VARIANTS, add_noise, decodes, task_of, tiny_model

BYTES = ByteTokenizer()
PREFIX = BYTES.end_id
NAMES = [
    name
    for name in FIRST_VARIANTS
    if decodes(tiny_model(name)) and task_of(tiny_model(name)) in ("causal", "permutation", "seq2seq")
]
LENGTH = 64
PAIRS = [("a man is ", "here"), ("the sea", " is"), ("", "o sea"), ("a man is here", " x")]


@functools.cache
def pair(name: str) -> tuple[Any, Any]:
    start = {"decoder_start_id": 7} if tiny_model(name).reads_source else {}
    model = tiny_model(name, vocab_size=264, **start)
    return model, add_noise(jax.jit(model.init)(jax.random.key(0)))


@functools.cache
def requests(name: str, **options: Any) -> TextRequests:
    return TextRequests(*pair(name), BYTES, batch_size=2, **options)


@functools.cache
def forward(model: Any) -> Any:
    def log_probs(params: Any, tokens: Any, source: Any) -> jax.Array:
        inputs = {} if source is None else {"source": source}
        return jax.nn.log_softmax(model.logits(params, model.apply(params, tokens, **inputs)[0])[0], axis=-1)

    return jax.jit(log_probs)


def next_log_probs(name: str, ids: list[int], source: list[int] | None) -> np.ndarray:
    """Log-probabilities [len(ids), V] after each token of one row. It is filled up behind, which no decoder sees."""
    model, params = pair(name)
    row = np.zeros((1, LENGTH), np.int32)
    row[0, : len(ids)] = ids
    read = None if source is None else np.array([source], np.int32)
    return np.asarray(forward(model)(params, row, read))[: len(ids)]


def plain_score(name: str, context: list[int], ids: list[int]) -> tuple[float, bool]:
    """The likelihood of ``ids`` after ``context``, by one pass over one row."""
    if pair(name)[0].reads_source:
        found = next_log_probs(name, [7, *ids[:-1]], context)
    else:
        found = next_log_probs(name, [*context, *ids[:-1]], None)[len(context) - 1 :]
    return float(found[np.arange(len(ids)), ids].sum()), bool((found.argmax(axis=-1) == ids).all())


def plain_text(name: str, context: list[int], count: int) -> list[int]:
    """Greedy tokens after ``context``, one pass for each."""
    reads_source = pair(name)[0].reads_source
    row = [7] if reads_source else list(context)
    for _ in range(count):
        found = next_log_probs(name, row, context if reads_source else None)
        row.append(int(found[-1, : BYTES.vocab_size].argmax()))
        if row[-1] == BYTES.end_id:
            break
    return row[1:] if reads_source else row[len(context) :]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_answers_as_a_plain_loop_over_its_logits(name: str) -> None:
    answers = requests(name)
    reads_source = pair(name)[0].reads_source
    (text,) = answers.generate([("a man is", {"max_gen_toks": 4})])
    new = plain_text(name, list(b"a man is"), 4)
    assert text == BYTES.decode([*b"a man is", *new])[8:] if not reads_source else text == BYTES.decode(new)

    greedy = BYTES.decode(new)
    pairs = [*PAIRS, ("a man is", greedy)] if "\ufffd" not in greedy else PAIRS
    found = answers.log_likelihoods(pairs)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        kept = context.rstrip()
        ids = list((context[len(kept) :] + continuation).encode())
        want, want_greedy = plain_score(name, list(kept.encode()) or [PREFIX], ids)
        assert value == pytest.approx(want, abs=1e-3)
        assert is_greedy == want_greedy
    assert all(is_greedy for _, is_greedy in found[len(PAIRS) :])

    (rolled, nothing) = answers.rolling_log_likelihoods(["to be or not to be", ""])
    assert rolled == pytest.approx(plain_score(name, [PREFIX], list(b"to be or not to be"))[0], abs=1e-3)
    assert nothing == 0.0


def test_the_families_are_all_that_decode() -> None:
    families = {pair(name)[0].family for name in NAMES}
    assert families == {
        "gpt", "llama", "t5", "xlnet", "transformer_xl", "lstm", "gru", "attention_rnn", "attention_rnn_lm",
        "resnet_lm",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------- long texts


@pytest.mark.parametrize(("name", "max_length"), [("gpt2-tiny", 16), ("lstm-tiny", 16), ("t5-tiny", 16)])
def test_contexts_lose_their_beginning_and_texts_are_scored_in_windows(
    name: str, max_length: int, caplog: pytest.LogCaptureFixture
) -> None:
    answers = TextRequests(*pair(name), BYTES, batch_size=2, max_length=max_length)
    reads_source = pair(name)[0].reads_source
    context, continuation = list(b"0123456789 the sea is near"), list(b" here")
    with caplog.at_level(logging.WARNING):
        ((value, _), (short, _)) = answers.log_likelihoods(
            [(bytes(context).decode(), " here"), ("the sea is", " near")]
        )
    kept = context[-max_length:] if reads_source else context[-(max_length + 1 - len(continuation)) :]
    assert value == pytest.approx(plain_score(name, kept, continuation)[0], abs=1e-3)
    assert short == pytest.approx(plain_score(name, list(b"the sea is"), list(b" near"))[0], abs=1e-3)
    assert answers.truncated == {"log_likelihoods": 1, "rolling_log_likelihoods": 0, "generate": 0}
    assert "1 of 2 requests have a truncated context: the model reads at most 16 tokens" in caplog.text

    ids = list(b"it is the east, and the sea is far away")
    assert len(ids) == 39
    windows = [(0, 16, 0), (16, 32, 16), (32, 39, 23)]  # the last one begins at token 39 - 16
    want = 0.0
    for first, end, begin in windows:
        row = [PREFIX, *ids]
        want += plain_score(name, row[begin : first + 1], ids[first:end])[0]
    (rolled,) = answers.rolling_log_likelihoods([bytes(ids).decode()])
    assert rolled == pytest.approx(want, abs=2e-3)

    (text,) = answers.generate([(bytes(context).decode(), {"max_gen_toks": 4})])
    kept = context[-max_length:] if reads_source else context[-(max_length - 4) :]
    new = plain_text(name, kept, 4)
    assert text == (BYTES.decode(new) if reads_source else BYTES.decode([*kept, *new])[len(kept) :])
    assert answers.truncated == {"log_likelihoods": 1, "rolling_log_likelihoods": 1, "generate": 1}


@pytest.mark.parametrize(("size", "length"), [(1, 4), (4, 4), (5, 4), (11, 4), (3, 1)])
def test_every_token_counts_once_and_windows_are_full(size: int, length: int) -> None:
    ids = np.arange(1, size + 1, dtype=np.int32)
    windows = rolling_windows(ids, 0, length)
    assert np.concatenate([counted for _, counted in windows]).tolist() == ids.tolist()
    for number, (context, counted) in enumerate(windows):
        row = np.concatenate([context, counted])
        assert np.array_equal(row, np.arange(row[0], row[-1] + 1))
        assert context.size >= 1
        assert row.size - 1 == length or (number == 0 and row.size - 1 == size)


def test_few_shapes_are_compiled() -> None:
    answers = requests("gpt2-tiny")
    before = score._token_scores._cache_size()
    answers.log_likelihoods([("x" * n, "y" * (1 + n % 3)) for n in range(1, 60)])
    compiled = score._token_scores._cache_size() - before
    assert compiled <= len({bucket_length(n, 64) for n in range(1, 65)}) == 4
    answers.rolling_log_likelihoods(["z" * n for n in range(1, 60)])
    assert score._token_scores._cache_size() - before <= 4


# ---------------------------------------------------------------------------------------------- options and tokens


def test_generation_options() -> None:
    answers = requests("gpt2-tiny")
    (whole,) = answers.generate([("a man", {"max_new_tokens": 8})])
    stop = next(character for character in whole if character != whole[0])
    wanted = whole[: whole.index(stop)]
    found = answers.generate(
        [("a man", {"max_gen_toks": 8, "until": until, "do_sample": False}) for until in (stop, ["\0\0", stop], [""])]
    )
    assert found == [wanted, wanted, whole]

    drawn = [("a man", {"max_gen_toks": 8, "temperature": 1.0})] * 3
    texts = answers.generate(drawn)
    assert len(set(texts)) > 1, "repeated requests draw anew"
    assert answers.generate(drawn) == texts
    config = answers.generation_config({"do_sample": True, "top_k": 0, "top_p": 0.5, "repetition_penalty": 1.2})
    assert config.sampling is not None
    assert (config.sampling.temperature, config.sampling.top_k, config.sampling.top_p) == (1.0, None, 0.5)
    assert config.max_new_tokens == 256
    greedy = answers.generation_config({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "num_beams": 3})
    assert greedy.sampling is not None
    assert (greedy.sampling.temperature, greedy.sampling.top_p, greedy.num_beams) == (0.0, None, 3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"typical_p": 0.5, "until": "x"}, "typical_p=0.5: not supported, generation options are until, max_gen"),
        ({"max_gen_toks": 3, "max_tokens": 3}, "max_gen_toks and max_tokens have the same meaning: set one of them"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample=True and temperature=0.0 contradict each other"),
        ({"max_gen_toks": 64}, "max_gen_toks=64 leaves no space for the context, because the model reads max_length"),
        ({"temperature": 0.5, "num_beams": 2}, "num_beams=2 searches for likely texts, but temperature=0.5 draws"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        requests("gpt2-tiny").generate([("a man", options)])


def test_bad_requests() -> None:
    answers = requests("gpt2-tiny")
    with pytest.raises(ValueError, match="the continuation of request 1 has no tokens: ''"):
        answers.log_likelihoods([("a", "b"), ("a", "")])
    with pytest.raises(ValueError, match="the continuation of request 0 has 65 tokens, but the model reads 64: 'xxx"):
        answers.log_likelihoods([("a", "x" * 65)])
    assert answers.log_likelihoods([]) == answers.rolling_log_likelihoods([]) == answers.generate([]) == []
    with pytest.raises(ValueError, match="this is a BERT with a masked-token head: it does not score or generate text"):
        TextRequests(jaxlm.get_model("bert-tiny"), {}, BYTES)
    for options, said in (
        ({"batch_size": "auto"}, "batch_size='auto' must be an integer of at least 1"),
        ({"max_length": 65}, "max_length=65 exceeds the model's max_positions=64"),
        ({"prefix_token_id": 257}, "prefix_token_id=257 must be an id of the vocabulary, from 0 to 256"),
    ):
        with pytest.raises(ValueError, match=said):
            TextRequests(*pair("gpt2-tiny"), BYTES, **options)


def test_a_tokenizer_without_special_tokens_needs_a_prefix() -> None:
    tokenizer = CharTokenizer.from_text("a man is here\n")
    with pytest.raises(ValueError, match="a text without a context needs a prefix token.*set prefix_token_id"):
        TextRequests(*pair("gpt2-tiny"), tokenizer).rolling_log_likelihoods(["a man"])
    prefix = int(tokenizer.encode("\n")[0])
    answers = TextRequests(*pair("gpt2-tiny"), tokenizer, prefix_token_id=prefix)
    ids = tokenizer.encode("a man").tolist()
    want = plain_score("gpt2-tiny", [prefix], ids)[0]
    assert answers.rolling_log_likelihoods(["a man"]) == [pytest.approx(want, abs=1e-3)]
    # A text that begins with the prefix has it as its context.
    found = answers.log_likelihoods([("", "\na man"), ("", "a man")])
    assert [value for value, _ in found] == [pytest.approx(want, abs=1e-3)] * 2


def template_tokenizer(single: str) -> PretrainedTokenizer:
    """Words, ``<s>`` (1), ``</s>`` (2), and a template."""
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


def test_special_tokens_of_the_template() -> None:
    tokenizer = template_tokenizer("<s> $A </s>")
    causal = TextRequests(*pair("llama-tiny"), tokenizer)
    pairs = [("w0 ", "w1"), ("<s> w0", " w1"), ("", "w1"), (" ", "w1")]
    assert ids_of(causal._encode_pairs(pairs)) == [([1, 3], [4]), ([1, 3], [4]), ([1], [4]), ([1], [4])]
    assert [ids.tolist() for ids in causal._encode(["w0", ""])] == [[1, 3], []]
    source = TextRequests(*pair("t5-tiny"), template_tokenizer("$A </s>"))
    assert ids_of(source._encode_pairs(pairs[:1])) == [([3, 2], [4])]
    assert [ids.tolist() for ids in source._encode(["w0", ""])] == [[3, 2], [2]]


def test_special_tokens_are_left_out_of_generated_text() -> None:
    answers = TextRequests(*pair("llama-tiny"), template_tokenizer("<s> $A"))
    assert answers._special_tokens.sub("", "w1 <s>w2</s> <w3>") == "w1 w2 <w3>"
    assert requests("gpt2-tiny")._special_tokens.sub("", "a|b") == "a|b"


def test_prompts_may_be_given_as_ids() -> None:
    config = GenerationConfig(8, GREEDY)
    texts = ["a man", "the sea"]
    found = generate_text(*pair("gpt2-tiny"), BYTES, [BYTES.encode(text) for text in texts], config)
    assert found == generate_text(*pair("gpt2-tiny"), BYTES, texts, config)
    with pytest.raises(TypeError, match="pass all prompts as strings or all as ids, got 1 strings of 2"):
        generate_text(*pair("gpt2-tiny"), BYTES, ["a", BYTES.encode("b")], config)  # type: ignore[list-item]
