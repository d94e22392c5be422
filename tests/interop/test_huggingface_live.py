"""Compare Hugging Face directories with transformers: run with ``-m live`` and the ``reference`` extra."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.interop import formats, huggingface
from jaxlm.interop.huggingface import load_pretrained, named_tensors, save_pretrained
from jaxlm.models import FAMILIES, Model, get_model
from jaxlm.models.registry import family
from jaxlm.objectives import causal
from jaxlm.testing.helpers import add_noise, initial_params, relative_error

pytestmark = pytest.mark.live

SHAPES: list[dict[str, Any]] = [
    {"n_layer": 1, "n_embd": 12, "n_head": 1, "vocab_size": 11, "activation_function": "relu"},
    {"n_layer": 3, "n_embd": 32, "n_head": 8, "vocab_size": 70, "tie_word_embeddings": False},
    {"n_layer": 4, "n_embd": 40, "n_head": 5, "vocab_size": 257, "n_inner": 24, "activation_function": "gelu"},
    {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 130},
]
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "n_positions": 32}


def forward(model: Model, params: Any, tokens: np.ndarray, segment_ids: Any = None) -> Any:
    """Hidden states and logits."""

    @jax.jit
    def run(params: Any) -> Any:
        hidden, _ = model.apply(params, tokens, segment_ids=segment_ids)
        return hidden, model.logits(params, hidden)

    return run(params)


@pytest.fixture(scope="module", params=range(len(SHAPES)), ids=lambda number: f"shape{number}")
def torch_model(request: pytest.FixtureRequest) -> Any:
    """A random GPT-2 of transformers. Its biases are not 0 and its scales are not 1."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(request.param)
    model = GPT2LMHeadModel(GPT2Config(**SPECIAL, **SHAPES[request.param])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens(torch_model: Any) -> np.ndarray:
    return np.random.default_rng(0).integers(0, torch_model.config.vocab_size, (3, 20)).astype(np.int32)


def test_hidden_states_logits_loss_and_all_gradients_equal_torch(
    torch_model: Any, tokens: np.ndarray, tmp_path: Path
) -> None:
    import torch

    torch_model.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path)
    ids = torch.from_numpy(tokens).long()
    torch_model.zero_grad()
    torch_output = torch_model(ids, labels=ids, output_hidden_states=True)
    torch_output.loss.backward()

    @jax.jit
    def compute(params: Any, batch: causal.Batch) -> Any:
        hidden, _ = model.apply(params, tokens)

        def mean_loss(params: Any) -> Any:
            total, count, _ = causal.loss(model, params, batch)
            return total / count

        return hidden, model.logits(params, hidden), *jax.value_and_grad(mean_loss)(params)

    hidden, logits, loss, gradients = compute(params, causal.batch(tokens))
    assert relative_error(hidden, torch_output.hidden_states[-1].detach()) < 1e-5
    assert relative_error(logits, torch_output.logits.detach()) < 1e-5
    assert relative_error(loss, torch_output.loss.detach()) < 1e-6
    expected = {name: parameter.grad for name, parameter in torch_model.named_parameters()}
    actual = dict(named_tensors(model, gradients))
    assert actual.keys() == expected.keys()
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 3e-5


def test_cached_decoding_equals_torch(torch_model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    import torch

    torch_model.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path)

    @jax.jit
    def step(tokens: Any, state: Any) -> Any:
        hidden, state = model.apply(params, tokens, state=state)
        return model.logits(params, hidden), state

    past, state = None, model.init_state(len(tokens), 20)
    for start, stop in [(0, 9), *((index, index + 1) for index in range(9, 20))]:
        with torch.no_grad():
            torch_output = torch_model(
                torch.from_numpy(tokens[:, start:stop]).long(), past_key_values=past, use_cache=True
            )
        past = torch_output.past_key_values
        logits, state = step(tokens[:, start:stop], state)
        assert relative_error(logits, torch_output.logits) < 1e-5


@pytest.mark.parametrize("mask_kind", ["left", "right"])
def test_logits_of_padded_rows_equal_torch(
    torch_model: Any, tokens: np.ndarray, tmp_path: Path, mask_kind: str
) -> None:
    import torch

    torch_model.save_pretrained(tmp_path)
    model, params = load_pretrained(tmp_path)
    mask = np.ones_like(tokens)
    mask[0, :7] = mask[1, :1] = 0
    mask = mask if mask_kind == "left" else mask[:, ::-1].copy()
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.no_grad():
        torch_output = torch_model(
            torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions).long(),
        )
    _, logits = forward(model, params, tokens, mask)
    real = mask == 1
    assert relative_error(logits[real], torch_output.logits.numpy()[real]) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_torch_model_round_trips(torch_model: Any, tokens: np.ndarray, tmp_path: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch_model = copy.deepcopy(torch_model).to(getattr(torch, dtype))
    torch_model.save_pretrained(tmp_path / "theirs", max_shard_size=1000)
    assert (tmp_path / "theirs" / huggingface.INDEX).exists()
    model, params = load_pretrained(tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", model, params, max_shard_bytes=1500)
    reloaded_model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", torch_dtype="auto").eval()
    assert type(reloaded_model) is type(torch_model)
    assert reloaded_model.dtype == getattr(torch, dtype)
    before, after = torch_model.state_dict(), reloaded_model.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)), name
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        assert torch.equal(torch_model(ids).logits, reloaded_model(ids).logits)
    assert {**reloaded_model.config.to_dict(), "_name_or_path": ""} == {
        **torch_model.config.to_dict(),
        "_name_or_path": "",
    }


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_a_saved_model(tied: bool, tmp_path: Path) -> None:
    import torch
    from transformers import GPT2LMHeadModel, GPT2Model

    model = get_model("gpt2-tiny", tie_embeddings=tied, vocab_size=100, vocab_multiple=16)
    params = add_noise(initial_params(model))
    save_pretrained(tmp_path, model, params)
    tokens = np.random.default_rng(0).integers(0, 100, (2, 15)).astype(np.int32)
    ids = torch.from_numpy(tokens).long()
    hidden, logits = forward(model, params, tokens)
    with torch.no_grad():
        torch_model, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
        base_model, base_info = GPT2Model.from_pretrained(tmp_path, output_loading_info=True)
        assert relative_error(logits[:, :, :100], torch_model.eval()(ids).logits) < 1e-5
        assert relative_error(hidden, base_model.eval()(ids).last_hidden_state) < 1e-5
    assert not any(info.values()), info
    assert not base_info["missing_keys"]
    assert (torch_model.config.bos_token_id, torch_model.config.eos_token_id) == (None, None)


def test_a_saved_base_class_can_be_loaded(torch_model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    import torch

    torch_model.transformer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2Model"]
    model, params = load_pretrained(tmp_path, task="causal", tie_embeddings=True)
    with torch.no_grad():
        expected = torch_model.transformer(torch.from_numpy(tokens).long()).last_hidden_state
    assert relative_error(forward(model, params, tokens)[0], expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "number"),
    [(name, n) for name in FAMILIES if name != "rwkv7" for n in range(len(formats.of(name)))],  # not in transformers
)
def test_defaults_of_missing_fields_equal_transformers(name: str, number: int) -> None:
    """For a field that ``config.json`` lacks, each format has the default of the transformers config class."""
    from transformers import AutoConfig

    table = formats.of(name)[number]
    expected = AutoConfig.for_model(table.model_type).to_dict()
    defaults = dataclasses.replace(
        family(name).Config(), **{**table.default_fields, **next(iter(table.architectures.values()))}
    )
    for field_name, file_name in table.hf_name_of_field.items():
        value, value_names = getattr(defaults, field_name), table.jaxlm_value_of.get(file_name)
        if value is None or file_name == "decoder_start_token_id":
            continue  # its default follows from another field, or generation sets it
        allowed = (
            [value]
            if value_names is None
            else [value_name for value_name, meaning in value_names.items() if meaning == value]
        )
        assert expected.get(file_name, allowed[0]) in allowed, file_name
    for field, value in table.required.items():
        assert expected.get(field, value) == value
