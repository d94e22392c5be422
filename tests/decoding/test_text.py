"""Tests of stop strings, multi-byte characters and streaming with a model that recites a given text."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import jaxlm
from jaxlm import spec
from jaxlm.data import ByteTokenizer, CharTokenizer, PretrainedTokenizer
from jaxlm.decoding import GenerationConfig, Sampling, generate_text, stream_text, text, windows
from jaxlm.models.model import Metadata
from jaxlm.spec import ArraySpec
from jaxlm.testing.helpers import initial_params

Pair = tuple[Any, Any]
BYTES = ByteTokenizer()


@dataclasses.dataclass(frozen=True)
class ReciterConfig:
    vocab_size: int = 300  # more ids than the tokenizer has


@dataclasses.dataclass(frozen=True)
class Reciter:
    """A model that predicts ``params[n]`` after n tokens. It only counts the tokens and ignores their ids."""

    config: ReciterConfig = ReciterConfig()
    reads_source = False
    max_positions = None
    needs_whole_text = False
    task = "causal"
    metadata = Metadata()
    has_cache = False

    def state_specs(self, batch: int, length: int) -> spec.Tree:
        return {"read": ArraySpec((batch,), ("batch",), dtype=jnp.int32)}

    def init_state(self, batch: int, length: int) -> spec.Tree:
        return spec.init(self.state_specs(batch, length))

    def apply(
        self, params: Any, tokens: jax.Array, *, state: Any = None, segment_ids: Any = None, positions: Any = None
    ) -> tuple[jax.Array, Any]:
        read_BT = state["read"][:, None] + jnp.cumsum(segment_ids, axis=1)
        return jax.nn.one_hot(params[read_BT], self.config.vocab_size), {"read": read_BT[:, -1]}

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        # The most likely ids are those that the tokenizer does not have.
        return 50.0 * hidden + jnp.where(jnp.arange(self.config.vocab_size) > 256, 100.0, 0.0)[None, None, :]


def recite(line: bytes) -> Pair:
    """A model that continues a prompt of n bytes with ``line[n:]``, then the end token."""
    params = np.full(200, BYTES.end_id, np.int32)
    params[: len(line)] = np.frombuffer(line, np.uint8)
    return Reciter(), jnp.asarray(params)


LINE = "The naïve € costs 😀😀 and 日本. And more"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("stop", [(), ("😀 and",), (". A", "xyz"), ("never",), ("日本",)])
def test_streamed_pieces_join_to_the_whole_text(stop: tuple[str, ...], chunk: int) -> None:
    model, params = recite(LINE.encode())
    pieces = list(stream_text(model, params, BYTES, "The", GenerationConfig(90, stop=stop), chunk=chunk))
    expected = min((LINE[3:].split(string)[0] for string in stop), key=len, default=LINE[3:])
    assert "".join(pieces) == expected
    assert "\ufffd" not in "".join(pieces)
    assert all(pieces)
    assert len(pieces) > 5 or chunk > 3
    assert generate_text(model, params, BYTES, ["The"], GenerationConfig(90, stop=stop)) == [expected]


def test_a_piece_is_yielded_before_later_tokens_are_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = recite(LINE.encode())
    generated: list[int] = []
    partial_texts = text._TextGenerator.partial_texts

    def record(*arguments: Any) -> Any:
        for texts in partial_texts(*arguments):
            generated.append(len(texts[0]))
            yield texts

    monkeypatch.setattr(text._TextGenerator, "partial_texts", record)
    pieces = stream_text(model, params, BYTES, "The", GenerationConfig(90), chunk=4)
    assert len(next(pieces)) == generated[-1] < 10
    assert len(generated) == 1
    next(pieces)
    assert len(generated) == 2


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_the_first_complete_stop_string_ends_the_text(chunk: int) -> None:
    model, params = recite(b"0123abcdef")
    for stop, expected in [
        (["abcd", "bc"], "123a"),  # bc is complete before abcd
        (["abcd", "cde"], "123"),
        (["bc", "abc"], "123"),  # both are complete at the same token: the longer string ends the text
        (["fe", "f0"], "123abcdef"),  # the text ends with the beginning of a stop string
    ]:
        assert "".join(stream_text(model, params, BYTES, "0", GenerationConfig(30, stop=stop), chunk=chunk)) == expected
        assert generate_text(model, params, BYTES, ["0"], GenerationConfig(30, stop=stop)) == [expected]


def test_a_possible_beginning_of_a_stop_string_is_not_streamed_yet() -> None:
    model, params = recite(b"x one st st stop two")
    pieces = list(stream_text(model, params, BYTES, "x", GenerationConfig(30, stop=("stop",)), chunk=1))
    assert pieces == [" ", "o", "n", "e", " ", "st ", "st "]


@pytest.mark.thorough
def test_an_incomplete_character_is_streamed_only_at_the_end() -> None:
    model, params = recite("x é€".encode())
    assert list(stream_text(model, params, BYTES, "x", GenerationConfig(6), chunk=1)) == [" ", "é", "€"]
    assert list(stream_text(model, params, BYTES, "x", GenerationConfig(5), chunk=1)) == [" ", "é", "\ufffd"]
    assert generate_text(model, params, BYTES, ["x"], GenerationConfig(5)) == [" é\ufffd"]


def byte_fallback_tokenizer() -> PretrainedTokenizer:
    """A BPE tokenizer with byte fallback and the ids of ``ByteTokenizer``. Only letters and spaces are not bytes."""
    tokens = [chr(i) if chr(i).isalpha() and i < 128 else f"<0x{i:02X}>" for i in range(256)]
    tokens[ord(" ")] = "▁"
    vocabulary = {token: i for i, token in enumerate([*tokens, "</s>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(  # as in Llama
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PretrainedTokenizer(backend)


FALLBACK = byte_fallback_tokenizer()


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK])
@pytest.mark.parametrize("num_wrong", [0, 4])
def test_new_text_does_not_depend_on_the_chunks(tokenizer: Any, num_wrong: int) -> None:
    rng = np.random.default_rng(num_wrong)
    for _ in range(60):
        line = np.frombuffer((LINE + "\n😀é\n").encode(), np.uint8).astype(np.int32)
        line[rng.integers(0, line.size, num_wrong)] = rng.integers(128, 256, num_wrong)
        first, last = np.sort(rng.integers(0, line.size + 1, 2))
        ids = line[:last]
        expected = text._IncrementalDecoder(tokenizer.decode, ids[:first]).read(ids, is_complete=True)
        new_text, pieces = text._IncrementalDecoder(tokenizer.decode, ids[:first]), ""
        for end in np.sort(rng.integers(first, last + 1, 12)):
            pieces = new_text.read(ids[:end], is_complete=False)
            assert expected.startswith(pieces)
            assert not pieces.endswith("\ufffd")
        assert new_text.read(ids, is_complete=True) == new_text.read(ids, is_complete=True) == expected
        if num_wrong == 0:  # a character that begins in the prompt is part of the new text
            whole, before = (bytes(part.tolist()).decode(errors="ignore") for part in (ids, ids[:first]))
            assert expected.rstrip("\ufffd") == (whole[len(before) :] if last > first else "")


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_wrong_byte_does_not_change_the_characters_before_it(chunk: int) -> None:
    model, params = recite(b"x\n\xe4\xb8\xad\xe5")  # the last character is cut
    prompt = np.array([ord("x")], np.int32)
    config = GenerationConfig(5, end_ids=())
    assert generate_text(model, params, FALLBACK, [prompt], config) == ["\n中\ufffd"]
    # The iterator yields no incomplete character before the end.
    pieces = list(text.stream_text(model, params, FALLBACK, "x", config, chunk=chunk))
    assert pieces == (["\n", "中", "\ufffd"] if chunk == 1 else ["\n", "中\ufffd"])
    stopped = dataclasses.replace(config, stop=("中",))
    assert list(stream_text(model, params, FALLBACK, "x", stopped, chunk=chunk)) == ["\n"]


@pytest.mark.thorough
def test_a_character_that_begins_in_the_prompt_is_generated_text() -> None:
    model, params = recite("cé!😀".encode())
    for size, expected in [(2, "é!😀"), (5, "😀"), (7, "😀")]:
        prompt = np.frombuffer("cé!😀".encode(), np.uint8)[:size].astype(np.int32)
        assert generate_text(model, params, BYTES, [prompt], GenerationConfig(9)) == [expected]
    for start in ("abc\ufffd".encode(), b"abc\xff"):  # wrong bytes of a prompt are not repeated
        model, params = recite(start + b"xyz")
        assert generate_text(
            model, params, BYTES, [np.frombuffer(start, np.uint8).astype(np.int32)], GenerationConfig(3)
        ) == ["xyz"]
    for size in (1, 5, 9):  # the prompt ends with complete emoji, and the new token is one byte
        model, params = recite(b"a" + "😀😀".encode() + b"\xf0")
        prompt = np.frombuffer(b"a" + "😀😀".encode(), np.uint8)[:size].astype(np.int32)
        expected = "😀😀"[size // 4 :] + "\ufffd"
        assert generate_text(model, params, FALLBACK, [prompt], GenerationConfig(10 - size)) == [expected]


def test_batched_prompts_of_unequal_length() -> None:
    model, params = recite(b"0123456789abc")
    prompts = ["0", "01234", "0123456789ab"]
    assert generate_text(model, params, BYTES, prompts, GenerationConfig(4)) == ["1234", "5678", "c"]
    ids = [np.frombuffer(prompt.encode(), np.uint8).astype(np.uint64) for prompt in prompts]
    assert generate_text(model, params, BYTES, ids, GenerationConfig(4)) == ["1234", "5678", "c"]
    # After its stop string, a row gets no more text while the other rows continue.
    assert generate_text(model, params, BYTES, prompts, GenerationConfig(12, stop=("45", "9a"))) == ["123", "5678", "c"]


def test_nothing_is_generated_after_the_chunk_that_contains_the_stop_string(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(windows, "advance", lambda *given: calls.append(given[-1]) or ADVANCE(*given))
    model, params = recite(b"0123456789" * 15)
    assert generate_text(model, params, BYTES, ["0", "012"], GenerationConfig(100, stop=("90",))) == [
        "12345678",
        "345678",
    ]
    assert calls == [text.CHUNK, text.CHUNK]
    calls.clear()
    assert len(generate_text(model, params, BYTES, ["0"], GenerationConfig(100))[0]) == 100
    assert calls == [100], "without stop strings there is one call"


ADVANCE = windows.advance


def test_a_tokenizer_that_decodes_the_first_word_differently() -> None:
    class Words:
        """A tokenizer of one-letter words. ``decode`` puts a space before every word except the first."""

        vocab_size, end_id = 26, None

        def encode(self, text: str) -> np.ndarray:
            return np.array([ord(word) - ord("a") for word in text.split()], np.int32)

        def decode(self, ids: Any) -> str:
            return " ".join(chr(ord("a") + i) for i in ids)

    model, params = Reciter(), jnp.arange(100) % 26
    tokenizer: Any = Words()
    assert generate_text(model, params, tokenizer, ["a b"], GenerationConfig(3)) == [" c d e"]
    assert list(stream_text(model, params, tokenizer, "a b", GenerationConfig(3), chunk=1)) == [" c", " d", " e"]


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", [1, 5])
def test_streaming_equals_generating_with_a_real_model(chunk: int) -> None:
    model = jaxlm.get_model("gpt2-tiny", vocab_size=257)
    params = initial_params(model)
    config, key = GenerationConfig(30, Sampling(top_k=100)), jax.random.key(3)
    (expected,) = generate_text(model, params, BYTES, ["To be"], config, key=key)
    assert len(expected) > 5
    assert "".join(stream_text(model, params, BYTES, "To be", config, key=key, chunk=chunk)) == expected


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["a", ""], ValueError, r"prompt 1 is '', which has no tokens: pass at least one character"),
        ([], ValueError, r"there are no prompts"),
        ("ab", TypeError, r"texts are a sequence of strings, got one string: pass \['ab'\]"),
        ([None], TypeError, "a prompt is a NoneType: pass strings, or token ids"),
        (["a", None], TypeError, "a prompt is a NoneType"),
        (np.arange(5, dtype=np.int32), TypeError, r"got one array int32\[5\]: pass \[ids\]"),
        ([np.array([5.7])], ValueError, r"prompt 0: expected a 1-D array of integer ids, got float64\[1\]"),
        ([np.array([5]), np.array([[5, 6]])], ValueError, r"prompt 1: expected a 1-D array of integer ids, got int64"),
        ([np.array([5, -1])], ValueError, "prompt 0: id -1 at position 1 is outside the vocabulary of 300 ids"),
        ([np.zeros(0, np.int32)], ValueError, "prompt 0 is .*, which has no tokens"),
    ],
)
def test_errors_name_bad_texts(texts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        generate_text(*recite(b"ab"), BYTES, texts, GenerationConfig(3))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"stop": "ab"}, TypeError, r"stop is a sequence of strings, got one string: pass \('ab',\)"),
        ({"stop": ("a", "")}, ValueError, r"stop strings must not be empty, got \['a', ''\]"),
        ({"max_new_tokens": 0}, ValueError, r"max_new_tokens=0 must be at least 1"),
        ({"batch_size": 0}, ValueError, r"batch_size=0 must be at least 1"),
        ({"num_beams": 0}, ValueError, r"num_beams=0 must be at least 1"),
        (
            {"num_beams": 2, "sampling": Sampling()},
            ValueError,
            r"num_beams=2 searches for likely texts, but temperature=1.0 draws at random: set num_beams=1",
        ),
        ({"length_penalty": 2.0, "num_beams": 1}, ValueError, r"length_penalty=2.0 needs beam search: set num_beams"),
        ({"early_stopping": True, "num_beams": 1}, ValueError, "early_stopping=True needs beam search: set num_beams"),
        ({"num_beams": 2, "length_penalty": float("inf")}, ValueError, r"length_penalty=inf must be a finite number"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens=2.5 must be a whole number or None"),
        ({"num_beams": 2.0}, ValueError, "num_beams=2.0 must be a whole number or None"),
        ({"stop": (1,)}, ValueError, r"stop=\(1,\) must be None or a tuple in which each entry is a string"),
        ({"stop": 1}, ValueError, "stop=1 must be None or a tuple in which each entry is a string"),
    ],
)
def test_errors_name_bad_fields(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GenerationConfig(**fields)


def test_random_sampling_needs_a_key() -> None:
    with pytest.raises(ValueError, match=r"temperature=1.0 draws at random: pass a key"):
        generate_text(*recite(b"ab"), BYTES, ["a"], GenerationConfig(3, Sampling()))
    with pytest.raises(ValueError, match="key must be one JAX key, .* got 0"):
        generate_text(*recite(b"ab"), BYTES, ["a"], GenerationConfig(3, Sampling()), key=0)  # type: ignore[arg-type]


def test_stream_text_raises_before_iteration() -> None:
    with pytest.raises(ValueError, match=r"prompt 0 is ''"):
        stream_text(*recite(b"ab"), BYTES, "", GenerationConfig(3))
    with pytest.raises(ValueError, match=r"chunk=0 must be at least 1"):
        stream_text(*recite(b"ab"), BYTES, "a", GenerationConfig(3), chunk=0)


def test_error_for_ids_outside_the_vocabulary_of_the_model() -> None:
    model = jaxlm.get_model("gpt2-tiny", vocab_size=2)
    message = "prompt 0: id 2 at position 2 is outside the vocabulary of 2 ids; use ids of the model's tokenizer"
    with pytest.raises(ValueError, match=message):
        generate_text(model, {}, CharTokenizer("abc"), ["abc"], GenerationConfig(3))


def greedy_by_forward_passes(model: jaxlm.Model, params: Any, prompt: np.ndarray, count: int) -> list[int]:
    """Greedy continuation with full forward passes. If the context is full, only its second half is kept."""
    limit, context, output = model.config.max_positions, list(prompt), []

    @jax.jit
    def logits(tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return model.logits(params, model.apply(params, tokens, segment_ids=segment_ids)[0])[0, :, : len(LETTERS)]

    while len(output) < count:
        if len(context) == limit + 1:
            context = context[-(limit // 2) :]
        padding = [0] * (limit - len(context))
        row = logits(jnp.asarray([context + padding]), jnp.asarray([[1] * len(context) + padding]))[len(context) - 1]
        output.append(int(jnp.argmax(row)))
        context.append(output[-1])
    return output


LETTERS = "abcdefghij"


@pytest.mark.thorough
@pytest.mark.parametrize("chunk", [3, 100])
def test_text_can_be_longer_than_the_context(chunk: int) -> None:
    model = jaxlm.get_model("gpt2-tiny", max_positions=12, num_layers=1)
    params = jax.tree.map(lambda x: 8.0 * x, initial_params(model, 3))
    tokenizer = CharTokenizer(LETTERS)
    want = tokenizer.decode(greedy_by_forward_passes(model, params, tokenizer.encode("abc"), 40))
    assert len(set(want)) > 1
    pieces = list(stream_text(model, params, tokenizer, "abc", GenerationConfig(40), chunk=chunk))
    assert "".join(pieces) == want
    # A stop string across the boundary of two windows (after 10 tokens) is found.
    stop = want[8:12]
    expected = want[: want.find(stop)]
    assert generate_text(model, params, tokenizer, ["abc"], GenerationConfig(40, stop=(stop,))) == [expected]
    with pytest.raises(ValueError, match="prompt 0 has 13 tokens, but max_positions=12: shorten it"):
        stream_text(model, params, tokenizer, "abcdefghijabc", GenerationConfig(3))


@pytest.mark.thorough
def test_the_repetition_penalty_counts_the_tokens_of_all_windows() -> None:
    model = jaxlm.get_model("gpt2-tiny", max_positions=12, num_layers=1)
    tokenizer = CharTokenizer(LETTERS + LETTERS.upper() + "0123456789")
    config, prompts = GenerationConfig(25, Sampling(0.0, repetition_penalty=1e6)), ["abc", "J"]
    outputs = generate_text(model, initial_params(model, 3), tokenizer, prompts, config)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert len({*prompt, *output}) == len(prompt) + 25


@pytest.mark.thorough
def test_rows_that_end_early_get_no_text_in_later_windows() -> None:
    model = jaxlm.get_model("gpt2-tiny", max_positions=12, num_layers=1)
    params = jax.tree.map(lambda x: 8.0 * x, initial_params(model, 3))
    tokenizer = CharTokenizer(LETTERS)
    separate = [generate_text(model, params, tokenizer, [prompt], GenerationConfig(40))[0] for prompt in ("abc", "jih")]
    stop = separate[0][2:4]
    together = generate_text(model, params, tokenizer, ["abc", "jih"], GenerationConfig(40, stop=(stop,)))
    assert together[0] == separate[0][: separate[0].find(stop)]
    index = separate[1].find(stop)
    assert together[1] == (separate[1] if index < 0 else separate[1][:index])


@pytest.mark.thorough
def test_raw_keys_and_typed_keys_give_the_same_samples() -> None:
    model, params = recite(LINE.encode())
    config = GenerationConfig(8, Sampling())
    run = lambda key: generate_text(model, params, BYTES, ["The"], config, key=key)  # noqa: E731
    assert run(jax.random.PRNGKey(0)) == run(jax.random.key(0))


def test_a_list_of_ids_is_refused_by_name() -> None:
    model, params = recite(LINE.encode())
    with pytest.raises(TypeError, match="a prompt is a list: pass strings, or token ids as int32 NumPy arrays"):
        generate_text(model, params, BYTES, [[5, 6]], GenerationConfig(8))  # type: ignore[list-item]
