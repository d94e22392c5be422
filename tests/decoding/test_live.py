"""Compare decoding with transformers: greedy search, beam search, logits processors and generation defaults."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.data import load_tokenizer
from jaxlm.decoding import BeamConfig, GenerationConfig, Sampling, beam_search, filter_logits, generate, generate_text
from jaxlm.decoding.config import _NO_EFFECT
from jaxlm.interop import config_json

pytestmark = pytest.mark.live

PROMPTS = [[5, 6, 7, 8, 9], [11, 3], [40, 22, 1]]
NUM_NEW = 12


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A random GPT-2 of transformers, and the same model and parameters in jaxlm."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=48, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    torch_model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    directory: Path = tmp_path_factory.mktemp("gpt2")
    torch_model.save_pretrained(directory)
    model, params = jaxlm.load_pretrained(directory)
    return torch_model, model, params


def torch_generate(torch_model: Any, prompts: np.ndarray, segment_ids: np.ndarray, **options: Any) -> Any:
    import torch

    return torch_model.generate(
        torch.as_tensor(prompts),
        attention_mask=torch.as_tensor(segment_ids),
        max_new_tokens=NUM_NEW,
        do_sample=False,
        return_dict_in_generate=True,
        pad_token_id=0 if options.get("eos_token_id") is None else options["eos_token_id"],
        **options,
    )


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("end_id", [None, 7])
def test_greedy_search_equals_transformers(
    reference: Any, pad: Callable[..., Any], penalty: float, end_id: int | None
) -> None:
    torch_model, model, params = reference
    prompts, segment_ids = pad(PROMPTS, "lll")
    prompts = np.where(segment_ids > 0, prompts, prompts[:, -1:])  # transformers also penalizes tokens in padding
    options = {"eos_token_id": end_id, "repetition_penalty": penalty}
    expected = torch_generate(torch_model, prompts, segment_ids, **options).sequences.numpy()[:, prompts.shape[1] :]
    sampling = Sampling(0.0, repetition_penalty=penalty)
    out = generate(model, params, prompts, segment_ids, max_new_tokens=NUM_NEW, sampling=sampling, end_id=end_id)
    np.testing.assert_array_equal(out.tokens[:, : expected.shape[1]], expected)
    assert out.lengths.max() <= expected.shape[1]


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("end_id", [None, 7])
def test_beam_search_equals_transformers(
    reference: Any, pad: Callable[..., Any], length_penalty: float, end_id: int | None
) -> None:
    torch_model, model, params = reference
    prompts, segment_ids = pad(PROMPTS, "lll")
    out = torch_generate(
        torch_model, prompts, segment_ids, num_beams=4, num_return_sequences=4, early_stopping="never",
        output_scores=True, length_penalty=length_penalty, eos_token_id=end_id,
    )  # fmt: skip
    expected = out.sequences.numpy()[:, prompts.shape[1] :].reshape(3, 4, -1)
    beams = beam_search(
        model,
        params,
        prompts,
        segment_ids,
        max_new_tokens=NUM_NEW,
        end_id=end_id,
        beams=BeamConfig(num_beams=4, length_penalty=length_penalty),
    )
    np.testing.assert_array_equal(beams.tokens[:, :, : expected.shape[2]], expected)
    np.testing.assert_allclose(beams.scores, out.sequences_scores.numpy().reshape(3, 4), rtol=1e-4)
    assert beams.lengths.max() <= expected.shape[2]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7, repetition_penalty=1.4),
        Sampling(top_k=5),
        Sampling(top_p=0.6),
        Sampling(min_p=0.1),
        Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=0.9),
    ],
)
def test_filters_equal_the_logits_processors_of_transformers(reference: Any, sampling: Sampling) -> None:
    import torch
    from transformers import GenerationConfig, LogitsProcessorList

    torch_model, _, _ = reference
    rng = np.random.default_rng(0)
    logits, prompts = 2 * rng.normal(size=(6, 48)).astype(np.float32), rng.integers(0, 48, (6, 10))
    config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0 if sampling.top_k is None else sampling.top_k,
        top_p=1.0 if sampling.top_p is None else sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
    )
    config._eos_token_tensor = None
    processors: LogitsProcessorList = torch_model._get_logits_processor(config, input_ids_seq_length=10)
    expected = processors(torch.as_tensor(prompts), torch.as_tensor(logits)).numpy()
    seen = np.zeros((6, 48), bool)
    seen[np.arange(6)[:, None], prompts] = True
    out = np.asarray(filter_logits(sampling, jnp.asarray(logits), jnp.asarray(seen)))
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))
    np.testing.assert_allclose(out, expected, rtol=1e-6)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_outputs_of_an_encoder_decoder_equal_transformers(tmp_path: Path, num_beams: int) -> None:
    """A batch of padded sources with special tokens. Beam search uses the stopping rule ``early_stopping="never"``."""
    import tokenizers
    import torch
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    config = T5Config(
        vocab_size=48, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch_model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    torch_model.save_pretrained(tmp_path)
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(45))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.save_pretrained(tmp_path)

    sources = ["w3 w9 w1", "w7", "w20 w21 w22 w23 w24 w25", "w2 w2"]
    batch = tokenizer(sources, return_tensors="pt", padding=True)
    options: dict[str, Any] = {"early_stopping": "never", "length_penalty": 0.6} if num_beams > 1 else {}
    tokens = torch_model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=NUM_NEW, do_sample=False,
        num_beams=num_beams, **options,
    )  # fmt: skip
    expected = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    model, params = jaxlm.load_pretrained(tmp_path)
    request = GenerationConfig(NUM_NEW, num_beams=num_beams, length_penalty=options.get("length_penalty", 1.0))
    assert generate_text(model, params, load_tokenizer(tmp_path), sources, request) == expected
    assert len(set(expected)) > 1


WORDS = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(45))]
FILES: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": NUM_NEW},
    "beams": {"max_new_tokens": NUM_NEW, "num_beams": 3, "length_penalty": 0.6},
    "beams that stop early": {"max_new_tokens": NUM_NEW, "num_beams": 3, "early_stopping": True},
    "exact beams": {"max_new_tokens": NUM_NEW, "num_beams": 3, "early_stopping": "never", "length_penalty": 0.3},
    "max_length": {"max_length": 9, "repetition_penalty": 1.3},
    "the likeliest of samples": {"max_new_tokens": NUM_NEW, "do_sample": True, "top_k": 1, "temperature": 0.7},
}


@pytest.fixture(scope="module", params=["gpt2", "t5"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A model of transformers, its word tokenizer, and the directory of both."""
    import tokenizers
    import torch
    from tokenizers import models, pre_tokenizers, processors
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5ForConditionalGeneration,
    )

    torch.manual_seed(4)
    common = {"vocab_size": len(WORDS), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    if request.param == "gpt2":
        torch_model: Any = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=32, n_layer=2, n_head=4, **common))
    else:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        torch_model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes, **common))
    torch_model = torch_model.eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    path = tmp_path_factory.mktemp(request.param)
    torch_model.save_pretrained(path)
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if request.param == "t5":
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.save_pretrained(path)
    return torch_model, tokenizer, path


@pytest.mark.parametrize("name", FILES)
def test_generation_defaults_of_the_file_equal_transformers(directory: tuple[Any, Any, Path], name: str) -> None:
    """Both libraries take all options from generation_config.json. In the second round, two ids end a text."""
    from transformers import GenerationConfig as TransformersConfig

    torch_model, tokenizer, path = directory
    sources = ["w3 w9 w1", "w7 w5", "w20 w21 w22 w23 w24 w25", "w2"]
    ends = [46]
    for second_round in (False, True):
        content = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": ends, **FILES[name]}
        TransformersConfig(**content).save_pretrained(path)
        torch_model.generation_config = TransformersConfig.from_pretrained(path)
        expected = []
        for source in sources:
            batch = tokenizer(source, return_tensors="pt")
            tokens = torch_model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[
                0
            ].tolist()
            expected.append(tokens[1 if torch_model.config.is_encoder_decoder else batch["input_ids"].shape[1] :])
        model, params = jaxlm.load_pretrained(path)
        key = jax.random.key(0) if "do_sample" in FILES[name] else None
        texts = generate_text(model, params, load_tokenizer(path), sources, key=key)
        special_ids = range(3) if torch_model.config.is_encoder_decoder else ()
        lengths = [
            next((index for index, token in enumerate(new_tokens) if token in ends), len(new_tokens))
            for new_tokens in expected
        ]
        for text, new_tokens, length in zip(texts, expected, lengths, strict=True):
            assert text.split() == [WORDS[token] for token in new_tokens[:length] if token not in special_ids]
        if second_round:
            assert any(length < len(new_tokens) for new_tokens, length in zip(expected, lengths, strict=True))
        else:  # two tokens of the first round end a text in the second round
            ends = list(dict.fromkeys(token for new_tokens in expected for token in new_tokens[1:] if token > 2))[:2]
            assert len(ends) == 2


@pytest.mark.parametrize("name", FILES)
def test_settings_in_the_config_equal_transformers(directory: tuple[Any, Any, Path], name: str, tmp_path: Path) -> None:
    """Without generation_config.json, both libraries read config.json. A file that jaxlm creates keeps the settings."""
    torch_model, tokenizer, path = directory
    shutil.copytree(path, tmp_path / "a", ignore=shutil.ignore_patterns("generation_config.json"))
    config = {**json.loads((path / "config.json").read_text()), "eos_token_id": [1, 46], **FILES[name]}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    torch_model = type(torch_model).from_pretrained(tmp_path / "a").eval()
    start = 1 if torch_model.config.is_encoder_decoder else 4
    expected = []
    for source in ("w3 w9 w1 w4", "w20 w21 w22 w23"):
        batch = tokenizer(source, return_tensors="pt")
        tokens = torch_model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0, start:]
        ids = [token for token in tokens.tolist() if token not in range(3)]
        expected.append([WORDS[token] for token in (ids[: ids.index(46)] if 46 in ids else ids)])
    model, params = jaxlm.load_pretrained(tmp_path / "a")
    key = jax.random.key(0) if "do_sample" in FILES[name] else None
    texts = generate_text(model, params, load_tokenizer(tmp_path / "a"), ["w3 w9 w1 w4", "w20 w21 w22 w23"], key=key)
    assert [[word for word in text.split() if word in WORDS[3:]] for text in texts] == expected
    jaxlm.save_pretrained(tmp_path / "b", model, params, load_tokenizer(tmp_path / "a"))
    saved = type(torch_model).from_pretrained(tmp_path / "b").generation_config.to_dict()
    loaded = torch_model.generation_config.to_dict()
    assert {**saved, "_from_model_config": ...} == {**loaded, "_from_model_config": ...}


def test_the_default_settings_are_those_of_transformers() -> None:
    from transformers import GenerationConfig as TransformersConfig
    from transformers import PretrainedConfig

    values = config_json.GENERATION_DEFAULTS
    no_effect = {*_NO_EFFECT, "eos_token_id", "decoder_start_token_id"}
    reference = TransformersConfig().to_dict()
    assert values == {name: value for name, value in reference.items() if name not in no_effect}
    in_config = PretrainedConfig._get_global_generation_defaults()
    assert {name: values[name] for name in in_config if name not in no_effect} == {
        name: value for name, value in in_config.items() if name not in no_effect
    }
