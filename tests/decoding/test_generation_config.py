"""Tests of generation defaults: given fields override ``generation_config.json``, which overrides the library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data import ByteTokenizer, CharTokenizer
from jaxlm.decoding import (
    GREEDY,
    BeamConfig,
    GenerationConfig,
    Sampling,
    beam_search,
    generate,
    generate_text,
    stream_text,
)
from jaxlm.models.model import Metadata
from jaxlm.testing.helpers import initial_params

TOKENIZER = ByteTokenizer()


def with_file_fields(model: jaxlm.Model, **fields: Any) -> jaxlm.Model:
    """The model with these fields in its ``generation_config.json``."""
    return dataclasses.replace(model, metadata=Metadata(generation_config=fields))


NO_FIELDS = GenerationConfig()


def resolve(given: GenerationConfig = NO_FIELDS, /, **fields: Any) -> GenerationConfig:
    return given.resolve(with_file_fields(jaxlm.get_model("gpt2-tiny", vocab_size=257), **fields), TOKENIZER)


def test_without_a_file_the_defaults_are_those_of_the_library() -> None:
    expected = GenerationConfig(128, GREEDY, 1, 1.0, (), early_stopping="never", end_ids=(256,))
    assert resolve() == expected
    assert GenerationConfig().resolve(jaxlm.get_model("gpt2-tiny", vocab_size=257), TOKENIZER) == expected


def test_given_fields_override_the_file_and_the_file_overrides_the_library() -> None:
    fields = {"max_length": 40, "num_beams": 3, "length_penalty": 0.5, "eos_token_id": [7, 9], "stop_strings": "."}
    assert resolve(**fields) == GenerationConfig(
        None, GREEDY, 3, 0.5, (".",), max_length=40, early_stopping=False, end_ids=(7, 9)
    )
    given = GenerationConfig(5, num_beams=2, length_penalty=2.0, stop=(), early_stopping=True, end_ids=(3,))
    assert resolve(given, **fields) == dataclasses.replace(given, sampling=GREEDY)
    assert resolve(GenerationConfig(max_length=9), max_new_tokens=3).max_length == 9
    config = resolve(max_new_tokens=3, max_length=99)
    assert (config.max_new_tokens, config.max_length) == (3, None)
    assert resolve(GenerationConfig(num_beams=1), **fields).length_penalty == 1.0, "has no effect without beams"
    assert resolve(num_beams=4, early_stopping=True).early_stopping is True
    greedy = {"num_beams": 1, "early_stopping": False, "length_penalty": 2.0}  # as in a file with all fields
    assert resolve(**greedy) == resolve(num_beams=1)
    config = resolve(GenerationConfig(num_beams=4), **greedy)
    assert (config.num_beams, config.length_penalty, config.early_stopping) == (4, 2.0, False)
    assert resolve(eos_token_id=7).end_ids == (7,)


@pytest.mark.parametrize(
    ("in_config", "expected"), [([7, 256, 9, 999], (256, 7, 9)), ([7, 9], (256,)), (7, (256,)), (None, (256,))]
)
def test_a_list_of_end_ids_in_the_config_is_used_if_it_has_that_of_the_tokenizer(in_config: Any, expected: Any) -> None:
    model = jaxlm.get_model("gpt2-tiny", vocab_size=257)

    def end_ids(given: GenerationConfig = NO_FIELDS, file: Any = None) -> Any:
        metadata = Metadata(config={"eos_token_id": in_config}, generation_config=file)
        return given.resolve(dataclasses.replace(model, metadata=metadata), TOKENIZER).end_ids

    assert end_ids() == end_ids(file={"max_new_tokens": 3}) == expected
    assert end_ids(file={"eos_token_id": [3, 999]}) == (3,)  # id 999 is not in the vocabulary
    assert end_ids(file={"eos_token_id": [-1, 3]}) == (3,)
    assert end_ids(file={"eos_token_id": 3}) == end_ids(GenerationConfig(end_ids=(3,))) == (3,)
    assert end_ids(GenerationConfig(ignored_fields=("eos_token_id",)), {"eos_token_id": [256, 4]}) == expected


@pytest.mark.parametrize(("name", "kind"), [("stop_strings", "a string"), ("eos_token_id", "a whole number")])
def test_lists_in_the_file_have_entries_of_one_type(name: str, kind: str) -> None:
    message = rf"generation_config.json: {name}=\[2.5\] must be {kind} or a list in which each entry is {kind}"
    with pytest.raises(ValueError, match=message):
        resolve(**{name: [2.5]})


def resolve_config(given: GenerationConfig = NO_FIELDS, /, file: Any = None, **fields: Any) -> GenerationConfig:
    """``resolve`` for a model with these fields in its ``config.json``."""
    metadata = Metadata(config=fields, generation_config=file)
    model = dataclasses.replace(jaxlm.get_model("gpt2-tiny", vocab_size=257), metadata=metadata)
    return given.resolve(model, TOKENIZER)


def test_without_the_file_the_settings_in_the_config_are_used() -> None:
    fields = {"max_length": 84, "num_beams": 4, "length_penalty": 0.6, "early_stopping": True, "n_layer": 2}
    expected = {name: value for name, value in fields.items() if name != "n_layer"}
    assert resolve_config(**fields) == resolve(**expected) != resolve()
    assert resolve_config(do_sample=True, top_k=50) == resolve(do_sample=True)
    assert resolve_config(file={}, **fields) == resolve(), "the file hides the config"
    assert resolve_config(GenerationConfig(9, num_beams=2), **fields).max_new_tokens == 9
    defaults = {  # in config.json files of old versions of transformers
        "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
        "temperature": 1.0, "top_k": 50, "top_p": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
        "bad_words_ids": None, "num_return_sequences": 1, "output_scores": False, "use_cache": True,
    }  # fmt: skip
    assert resolve_config(**defaults) == resolve()
    ignored = GenerationConfig(ignored_fields=("no_repeat_ngram_size", "forced_eos_token_id"))
    assert resolve_config(ignored, no_repeat_ngram_size=2, forced_eos_token_id=1, max_length=84).max_length == 84


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"no_repeat_ngram_size": 2, "forced_eos_token_id": 1}, r"^config.json sets forced_eos_token_id=1, no_repeat_"),
        ({"num_beams": 2.5}, r"^config.json: num_beams=2.5 must be a whole number"),
        ({"stop_strings": [1]}, r"^config.json: stop_strings=\[1\] must be a string or a list in which each entry is"),
        ({"top_k": -1}, r"^config.json: top_k=-1 must be at least 0"),
        ({"max_length": 0}, r"^config.json: max_length=0 must be at least 1"),
        ({"do_sample": True, "top_p": 2}, r"top_p=2 must be in \(0, 1\].* are read from config.json\)"),
        ({"do_sample": True, "num_beams": 2}, r"num_beams=2 searches for .* are read from config.json\)"),
    ],
)
def test_errors_name_the_config_if_it_has_the_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_config(**fields)


@pytest.mark.parametrize(
    ("given", "sampling", "fields", "has_hint"),
    [
        ({}, {"top_p": 0.0, "temperature": 1.0}, {"do_sample": True, "top_k": 3}, False),
        ({}, {"temperature": 1.0}, {"top_p": 0.0}, True),
        ({}, {"temperature": 0.7}, {"max_length": 9, "do_sample": True}, False),  # num_beams=5 is a default
        ({}, {}, {"do_sample": True}, True),
        ({"num_beams": 2}, {}, {"do_sample": True}, True),
        ({"num_beams": 2}, {"temperature": None}, {"do_sample": True}, True),
        ({"num_beams": 2, "sampling": Sampling()}, {}, {"do_sample": True, "num_beams": 3}, False),
    ],
)
def test_errors_name_the_file_only_if_a_field_comes_from_it(
    given: dict[str, Any], sampling: dict[str, Any], fields: dict[str, Any], has_hint: bool
) -> None:
    model = with_file_fields(jaxlm.get_model("gpt2-tiny", vocab_size=257), **fields)
    with pytest.raises(ValueError, match=r"top_p=0.0 must|num_beams=\d searches") as info:
        GenerationConfig(**given).resolve(model, TOKENIZER, default=GenerationConfig(num_beams=5), sampling=sampling)
    assert ("read from generation_config.json" in str(info.value)) == has_hint


def test_a_program_may_have_other_defaults() -> None:
    model, default = jaxlm.get_model("gpt2-tiny", vocab_size=257), GenerationConfig(500, Sampling(0.8), stop=("!",))

    def sampling_of(given: dict[str, Any], **fields: Any) -> Sampling | None:
        return (
            GenerationConfig()
            .resolve(with_file_fields(model, **fields), TOKENIZER, default=default, sampling=given)
            .sampling
        )

    config = GenerationConfig().resolve(model, TOKENIZER, default=default)
    assert (config.max_new_tokens, config.sampling, config.stop) == (500, Sampling(0.8), ("!",))
    assert sampling_of({}, temperature=0.5, top_p=0.9) == Sampling(0.5, top_p=0.9)
    assert sampling_of({"top_p": 0.3}, temperature=0.5, top_p=0.9) == Sampling(0.5, top_p=0.3)
    assert sampling_of({"temperature": 0.0}, do_sample=True, top_p=0.9) == GREEDY
    assert sampling_of({"temperature": 0.7}, do_sample=False) == Sampling(0.7)
    turn_off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert sampling_of({"temperature": 0.0, **turn_off}) == GREEDY
    assert sampling_of(turn_off, temperature=0.5, top_k=3, top_p=0.9, min_p=0.1) == Sampling(0.5)
    assert sampling_of({"do_sample": True}, do_sample=False, temperature=0.5) == Sampling(0.5)
    assert sampling_of({"do_sample": False}, do_sample=True) == GREEDY
    assert sampling_of({}, do_sample=False) == GREEDY
    assert sampling_of({}, num_beams=4) == GREEDY, "beams of the file search"


def test_sampling_fields_of_the_file() -> None:
    """The file sets ``Sampling`` as in transformers, and a given ``Sampling`` has priority."""
    fields = {"temperature": 0.6, "top_k": 0, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5}
    assert resolve(do_sample=True, **fields).sampling == Sampling(0.6, None, 0.9, 0.1, 1.5)
    assert resolve(**fields).sampling == Sampling(0.0, repetition_penalty=1.5), "as in transformers"
    assert resolve(do_sample=True).sampling == Sampling(top_k=50), "the default of transformers"
    assert resolve(do_sample=True, top_k=400).sampling == Sampling(), "more than there are ids"
    assert resolve(do_sample=True, min_p=0, top_p=1.0).sampling == Sampling(top_k=50, top_p=1.0), "no effect"
    assert resolve(GenerationConfig(sampling=Sampling(0.9)), do_sample=True, **fields).sampling == Sampling(0.9)
    model = with_file_fields(jaxlm.get_model("gpt2-tiny", vocab_size=257), do_sample=True)
    with pytest.raises(
        ValueError, match=r"generation_config.json sets do_sample=True: pass key, .* or sampling=GREEDY"
    ):
        generate_text(model, initial_params(model), TOKENIZER, ["a"])
    model = dataclasses.replace(model, metadata=Metadata(config={"do_sample": True}))
    with pytest.raises(ValueError, match=r"^config.json sets do_sample=True: pass key, .* or sampling=GREEDY"):
        generate_text(model, initial_params(model), TOKENIZER, ["a"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"no_repeat_ngram_size": 3, "min_length": 0, "forced_bos_token_id": 2, "new_idea": 1},
            r"generation_config.json sets forced_bos_token_id=2, new_idea=1, no_repeat_ngram_size=3, which jaxlm does",
        ),
        (
            {"min_length": 5},
            r"sets min_length=5, .* support: .* remove it from the file or .*ignored_fields=\('min_length',\)",
        ),
        ({"temperature": "hot"}, r"generation_config.json: temperature='hot' must be a finite number"),
        ({"num_beams": True}, r"generation_config.json: num_beams=True must be a whole number"),
        ({"num_beams": 0}, r"generation_config.json: num_beams=0 must be at least 1"),
        ({"do_sample": True, "top_p": 0}, r"top_p=0 must be in \(0, 1\].*generation_config.json"),
        ({"do_sample": True, "top_p": 2}, r"top_p=2 must be in \(0, 1\].*generation_config.json"),
        ({"do_sample": True, "num_beams": 2}, r"num_beams=2 searches for .*temperature=1.0 draws .*generation_config"),
        ({"repetition_penalty": 1.2, "num_beams": 2}, r"num_beams=2 does not support .*repetition_penalty=1.2"),
    ],
)
def test_error_names_unsupported_fields_of_the_file(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(**fields)


def test_unsupported_fields_with_neutral_values_are_accepted() -> None:
    neutral = {
        "no_repeat_ngram_size": 0, "typical_p": 1.0, "forced_eos_token_id": None, "num_return_sequences": 1,
        "use_cache": False, "pad_token_id": 3, "bos_token_id": 2, "transformers_version": "4.57.6",
        "trust_remote_code": False,
    }  # fmt: skip
    assert resolve(**neutral) == resolve()


def test_fields_of_the_file_can_be_ignored() -> None:
    fields = {"no_repeat_ngram_size": 3, "min_length": 5, "max_new_tokens": 7, "temperature": "hot"}
    given = GenerationConfig(ignored_fields=["no_repeat_ngram_size", "min_length", "temperature"])  # type: ignore[arg-type]
    config = resolve(given, **fields)
    assert (config.max_new_tokens, config.sampling) == (7, GREEDY)
    assert config.ignored_fields == ("no_repeat_ngram_size", "min_length", "temperature")
    assert resolve(config, **fields) == config
    with pytest.raises(ValueError, match=r"sets min_length=5, which jaxlm does not support"):
        resolve(GenerationConfig(ignored_fields=("no_repeat_ngram_size", "temperature")), **fields)
    with pytest.raises(ValueError, match=r"ignored_fields has 'min_lenght', which is not a field of generation_config"):
        resolve(GenerationConfig(ignored_fields=("min_lenght",)), **fields)
    assert resolve(suppress_tokens=[]).max_new_tokens == 128  # an empty list changes nothing
    assert resolve(GenerationConfig(ignored_fields=("new_idea",)), new_idea=1).max_new_tokens == 128


LETTERS = CharTokenizer("abcdefghij")
"""One character for each id."""


@pytest.fixture(scope="module")
def letter_model() -> tuple[jaxlm.Model, Any]:
    model = jaxlm.get_model("gpt2-tiny", vocab_size=10, num_layers=1)
    return model, jax.tree.map(lambda x: 8.0 * x, initial_params(model, 3))


@pytest.mark.thorough
def test_max_length_counts_the_prompt_of_each_row(letter_model: Any) -> None:
    (model, params), texts = letter_model, ["abcdefg", "jih"]
    limited = with_file_fields(model, max_length=12)
    full_texts = generate_text(model, params, LETTERS, texts, GenerationConfig(9))
    assert generate_text(limited, params, LETTERS, texts) == [full_texts[0][:5], full_texts[1]]
    assert "".join(stream_text(limited, params, LETTERS, texts[1], chunk=4)) == full_texts[1]
    beam_texts = generate_text(limited, params, LETTERS, texts, GenerationConfig(num_beams=3))
    assert beam_texts == [
        generate_text(model, params, LETTERS, [text], GenerationConfig(12 - len(text), num_beams=3))[0]
        for text in texts
    ]
    with pytest.raises(ValueError, match=r"prompt 0 has 7 tokens, and max_length=7 leaves no room for new tokens"):
        generate_text(model, params, LETTERS, texts, GenerationConfig(max_length=7))


@pytest.mark.thorough
def test_a_row_ends_at_any_of_several_end_ids(gpt: Any) -> None:
    model, params = gpt
    prompts = np.array([[5, 6, 7], [11, 3, 9], [40, 22, 1], [8, 8, 2]], np.int32)
    without_end = np.asarray(generate(model, params, prompts, max_new_tokens=10).tokens)
    ends = tuple(dict.fromkeys([int(without_end[0, 4]), int(without_end[1, 2])]))
    assert len(ends) == 2
    out = generate(model, params, prompts, max_new_tokens=10, end_id=ends)
    for row, length in zip(range(4), out.lengths.tolist(), strict=True):
        indices = np.flatnonzero(np.isin(without_end[row], ends))
        assert length == (indices[0] + 1 if indices.size else 10)
        assert out.tokens[row].tolist() == without_end[row, :length].tolist() + [ends[0]] * (10 - length)
    assert {int(out.tokens[row, length - 1]) for row, length in enumerate(out.lengths.tolist()[:2])} <= set(ends)
    key = jax.random.key(0)
    options: dict[str, Any] = {"max_new_tokens": 10, "sampling": Sampling(2.0), "key": key}
    sampled = np.asarray(generate(model, params, prompts, **options).tokens)
    ends = (int(sampled[0, 3]), int(sampled[1, 5]))
    lengths = generate(model, params, prompts, **options, end_id=ends).lengths.tolist()
    assert lengths == [int(np.flatnonzero(np.isin([*row, ends[0]], ends))[0]) + 1 for row in sampled[:, :9]]


def test_beams_end_at_any_of_several_end_ids(gpt: Any) -> None:
    model, params = gpt
    prompts = np.array([[5, 6, 7], [11, 3, 9]], np.int32)
    # Without a length penalty, hypotheses that end early have larger sums, so the search finds both ends.
    without_end = beam_search(
        model, params, prompts, max_new_tokens=8, beams=BeamConfig(num_beams=2, length_penalty=0.0)
    )
    ends = (int(without_end.tokens[0, 0, 1]), int(without_end.tokens[1, 0, 2]))
    out = beam_search(
        model, params, prompts, max_new_tokens=8, end_id=ends, beams=BeamConfig(num_beams=2, length_penalty=0.0)
    )
    last_tokens = set()
    for row in range(2):
        for tokens, length in zip(np.asarray(out.tokens)[row], np.asarray(out.lengths)[row], strict=True):
            assert not np.isin(tokens[: length - 1], ends).any()
            assert length == 8 or tokens[length - 1] in ends
            assert tokens[length:].tolist() == [ends[0]] * (8 - length)
            last_tokens.add(int(tokens[length - 1]))
    assert set(ends) <= last_tokens


@pytest.mark.thorough
def test_beams_with_a_limit_per_row_equal_separate_searches(gpt: Any) -> None:
    model, params = gpt
    prompts, limits = np.array([[5, 6, 7], [11, 3, 9]], np.int32), [3, 7]
    together = beam_search(
        model, params, prompts, max_new_tokens=np.array(limits), end_id=5, beams=BeamConfig(num_beams=3)
    )
    for row, limit in enumerate(limits):
        separate = beam_search(
            model, params, prompts[row : row + 1], max_new_tokens=limit, end_id=5, beams=BeamConfig(num_beams=3)
        )
        np.testing.assert_array_equal(together.tokens[row, :, :limit], separate.tokens[0])
        np.testing.assert_array_equal(together.lengths[row], separate.lengths[0])
    for bad in (np.array([3]), np.array([3, 0])):
        with pytest.raises(ValueError, match=r"must be one number of at least 1 for each prompt"):
            beam_search(model, params, prompts, max_new_tokens=bad, beams=BeamConfig(num_beams=3))
    for value in ("soon", 1):
        for config in (BeamConfig, GenerationConfig):
            with pytest.raises(ValueError, match=f"early_stopping={value!r} must be true or false or 'never'"):
                config(num_beams=3, early_stopping=value)  # type: ignore[arg-type]


def test_text_ends_at_any_of_several_end_ids_of_a_loaded_directory(letter_model: Any, tmp_path: Path) -> None:
    (model, params), texts = letter_model, ["abcdefg", "jih"]
    full_texts = generate_text(model, params, LETTERS, texts, GenerationConfig(9))
    ends = list(dict.fromkeys(LETTERS.encode(full_texts[0])[2:].tolist() + LETTERS.encode(full_texts[1]).tolist()))[:2]
    stops = LETTERS.decode(ends)
    expected = [text[: min([text.find(c) for c in stops if c in text], default=9)] for text in full_texts]
    assert expected != full_texts
    jaxlm.save_pretrained(tmp_path, with_file_fields(model, eos_token_id=ends, max_new_tokens=9), params)
    loaded, params = jaxlm.load_pretrained(tmp_path)
    assert generate_text(loaded, params, LETTERS, texts) == expected
    assert generate_text(loaded, params, LETTERS, texts, GenerationConfig(end_ids=())) == full_texts


@pytest.mark.thorough
def test_the_decoder_start_id_of_the_file_overrides_that_of_the_config() -> None:
    model = jaxlm.get_model("t5-tiny", vocab_size=257, num_layers=1)
    params = jax.tree.map(lambda x: 8.0 * x, initial_params(model, 1))
    config = GenerationConfig(6)
    other = model.with_fields(decoder_start_id=9)
    (expected,) = generate_text(other, params, TOKENIZER, ["ab"], config)
    assert generate_text(with_file_fields(model, decoder_start_token_id=9), params, TOKENIZER, ["ab"], config) == [
        expected
    ]
    assert generate_text(model, params, TOKENIZER, ["ab"], config) != [expected]
    null = dataclasses.replace(
        model,
        metadata=Metadata(config={"decoder_start_token_id": None}, generation_config={"decoder_start_token_id": 9}),
    )  # null in config.json is no id
    assert generate_text(null, params, TOKENIZER, ["ab"], config) == [expected]
    ignoring = GenerationConfig(6, ignored_fields=("decoder_start_token_id",))
    (start_0,) = generate_text(model, params, TOKENIZER, ["ab"], config)
    for value in (9, "x"):
        file = with_file_fields(model, decoder_start_token_id=value)
        assert generate_text(file, params, TOKENIZER, ["ab"], ignoring) == [start_0]
    file = with_file_fields(model, decoder_start_token_id=9999)
    with pytest.raises(ValueError, match="generation_config.json: decoder_start_token_id=9999 is not an id of the mod"):
        generate_text(file, params, TOKENIZER, ["ab"], config)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_new_tokens": 3, "max_length": 4}, ValueError, "give max_new_tokens=3 or max_length=4, not both"),
        ({"early_stopping": "soon"}, ValueError, "early_stopping='soon' must be true or false or 'never'"),
        ({"end_ids": ("a",)}, ValueError, r"end_ids=\('a',\) must be None or a tuple in which each entry is a whole"),
        ({"batch_size": 1.5}, ValueError, "batch_size=1.5 must be a whole number or None"),
        ({"ignored_fields": "top_k"}, TypeError, r"ignored_fields is a sequence of strings, .* pass \('top_k',\)"),
        ({"end_ids": 3}, TypeError, r"end_ids is a sequence of ids, got one id: pass \(3,\)"),
    ],
)
def test_errors_name_bad_fields(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GenerationConfig(**fields)
