"""Splits of a text, and scores of a complete split. The tests compute the same scores without batches."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm.data import ByteTokenizer, CharTokenizer, ContiguousStreams, RandomWindows
from jaxlm.decoding import log_likelihood
from jaxlm.tasks import text_generation
from jaxlm.tasks.text_generation import Corpus, check_family, column_batches, scores
from jaxlm.testing.helpers import initial_params, tiny_model
from jaxlm.training.trainer import carry_size_of

TEXT = "To be, or not to be: that is the question.\n" * 8
CORPUS = Corpus.split(TEXT, CharTokenizer.from_text(TEXT), 0.3, 0.2)


def test_splits_are_consecutive() -> None:
    joined = np.concatenate([CORPUS.parts[part] for part in ("training", "validation", "test")])
    assert np.array_equal(joined, CharTokenizer.from_text(TEXT).encode(TEXT))
    assert len(CORPUS.parts["validation"]) == pytest.approx(0.3 * len(TEXT), abs=1)
    assert set(Corpus.split(TEXT, CharTokenizer.from_text(TEXT)).parts) == {"training", "validation"}
    with pytest.raises(ValueError, match="test_fraction=-0.1 must be at least 0 and less than 1"):
        Corpus.split(TEXT, CharTokenizer.from_text(TEXT), 0.5, -0.1)
    with pytest.raises(ValueError, match="leave nothing to train on"):
        Corpus.split(TEXT, CharTokenizer.from_text(TEXT), 0.5, 0.5)
    with pytest.raises(ValueError, match="test_fraction=0.001 of the text: 1 token, at least 2 needed; use a larger"):
        Corpus.split(TEXT, CharTokenizer.from_text(TEXT), 0.5, 0.001)


def test_splits_count_their_own_characters() -> None:
    text = "a" * 800 + "ж" * 200  # 2 bytes per character in the validation split, 1.2 in the text
    corpus = Corpus.split(text, ByteTokenizer(), 0.2)
    assert corpus.num_characters == {"training": 880, "validation": 120}
    assert corpus.parts["validation"].size == 240


def test_stateful_models_read_columns_and_others_read_windows() -> None:
    size = {"length": 8, "batch_size": 2}
    assert isinstance(CORPUS.batches("training", model=tiny_model("lstm"), **size), ContiguousStreams)
    assert isinstance(CORPUS.batches("training", model=tiny_model("gpt"), **size), RandomWindows)
    with pytest.raises(ValueError, match="validation split of the text: 50 streams of length 8"):
        CORPUS.batches("validation", model=tiny_model("gru"), length=8, batch_size=50)
    assert CORPUS.batches("training", length=64, batch_size=2, model=tiny_model("gpt")).length == 64
    with pytest.raises(ValueError, match="rows of 65 tokens exceed max_positions=64 of the model: use a smaller"):
        CORPUS.batches("training", length=65, batch_size=2, model=tiny_model("gpt"))
    assert carry_size_of(tiny_model("gpt"), 3) is None
    assert carry_size_of(tiny_model("gru"), 3) == (3, 1)
    memory = tiny_model("transformer_xl")
    assert carry_size_of(memory, 3) == (3, memory.config.memory_length)


@pytest.mark.parametrize(("size", "rows", "length"), [(50, 4, 5), (41, 4, 5), (42, 4, 5), (7, 4, 5), (2, 1, 1)])
def test_every_token_except_the_first_is_a_target_once(size: int, rows: int, length: int) -> None:
    batches = column_batches(np.arange(1, size + 1), rows, length)
    weighted_targets = [target for batch in batches for target in batch.targets[batch.weights > 0]]
    assert sorted(weighted_targets) == list(range(2, size + 1))
    for batch, next_batch in zip(batches, batches[1:], strict=False):
        assert np.array_equal(batch.targets[:, -1], next_batch.tokens[:, 0])


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["lstm", "transformer_xl"])
def test_a_stateful_model_scores_the_complete_column(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_generation, "NUM_SCORING_ROWS", 1)
    model = tiny_model(name)
    params = initial_params(model)
    ids = CORPUS.parts["test"][:25]
    corpus = Corpus("the text", {"test": ids}, {"test": ids.size})
    length = 6 if name == "lstm" else 24
    nats, bits, perplexity = scores(model, params, corpus, "test", length)
    expected = -float(log_likelihood(model, params, ids[None].astype(np.int32)).mean())
    assert nats.value == pytest.approx(expected, rel=1e-5)
    assert bits.value == pytest.approx(expected / np.log(2), rel=1e-5)
    assert perplexity.value == pytest.approx(np.exp(expected), rel=1e-5)
    assert nats.count == 24


def test_windows_overlap_by_half() -> None:
    model = tiny_model("gpt")
    params = initial_params(model)
    ids = CORPUS.parts["validation"][:33].astype(np.int32)
    nats = scores(
        model, params, Corpus("the text", {"validation": ids}, {"validation": ids.size // 2}), "validation", 16
    )[0]
    first = log_likelihood(model, params, ids[None, :17])[0]
    second = log_likelihood(model, params, ids[None, 8:25])[0, 8:]
    third = log_likelihood(model, params, ids[None, 16:33])[0, 8:]
    expected = -float(np.concatenate([first, second, third]).mean())
    assert nats.value == pytest.approx(33 / 16 * expected, rel=1e-5)  # 33 tokens of 16 characters
    assert nats.detail == "whole validation split, windows of 16 tokens, one every 8 tokens"


def test_models_that_do_not_generate_text_are_rejected() -> None:
    check_family(tiny_model("llama"))
    with pytest.raises(ValueError, match="this is a GPT with a classification head: it does not continue texts"):
        check_family(tiny_model("gpt", task="classification"))


@pytest.mark.parametrize("name", ["gpt", "lstm"])
def test_splits_that_cannot_be_scored_raise_errors(name: str) -> None:
    model = tiny_model(name)
    params = initial_params(model)

    def corpus(ids: list[int]) -> Corpus:
        return Corpus("file", {"test": np.array(ids)}, {"test": 9})

    with pytest.raises(ValueError, match="the test split of file.* id 128"):
        scores(model, params, corpus([1, 2, 128, 3]), "test", 8)
    with pytest.raises(ValueError, match="the test split of file: 1 tokens, at least 2 needed"):
        scores(model, params, corpus([1]), "test", 8)
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        scores(model, params, corpus([1, 2, 3]), "test", 0)
