"""Compare Mamba-2 and its hybrids with torch: cached decoding after prompts of several lengths, and padded prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.decoding import generate
from jaxlm.testing.helpers import relative_error

pytestmark = pytest.mark.live


@pytest.fixture(scope="module", params=[1, 2])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A random model of transformers, the same model loaded by jaxlm, and its parameters."""
    import torch
    import transformers

    torch.manual_seed(request.param)
    config = transformers.Mamba2Config(
        vocab_size=31, hidden_size=24, num_hidden_layers=2, num_heads=6, head_dim=8, state_size=5,
        n_groups=request.param, chunk_size=4, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch_model = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    directory: Path = tmp_path_factory.mktemp("mamba2")
    torch_model.save_pretrained(directory)
    return (torch_model, *jaxlm.load_pretrained(directory))


@pytest.mark.parametrize("prompt", [2, 9])
def test_cached_decoding_equals_torch(models: tuple[Any, Any, Any], prompt: int) -> None:
    import torch

    torch_model, model, params = models
    tokens = np.random.default_rng(0).integers(0, 31, (2, 16)).astype(np.int32)
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    cache, state = None, model.init_state(2, 16)
    for start, stop in [(0, prompt), *((position, position + 1) for position in range(prompt, 16))]:
        with torch.no_grad():
            output = torch_model(
                torch.from_numpy(tokens[:, start:stop]).long(), cache_params=cache, use_cache=True,
                cache_position=torch.tensor([start]),
            )  # fmt: skip
        cache = output.cache_params
        hidden, state = step(params, tokens[:, start:stop], state)
        assert relative_error(model.logits(params, hidden), output.logits) < 1e-5
    for number, layer in enumerate(state["layers"]):  # transformers has the axes of a state in the other order
        assert relative_error(layer["hidden"], cache.ssm_states[number].mT) < 1e-5
        tail = np.concatenate([layer["x"], layer["BC"]], axis=-1)
        assert relative_error(tail, cache.conv_states[number].mT[:, 1:]) < 1e-5


@pytest.mark.parametrize("name", ["Bamba", "FalconH1"])
def test_cached_decoding_of_a_hybrid_equals_torch(name: str, tmp_path: Path) -> None:
    """The logits of each chunk equal those of one transformers call on the whole text.

    After prompts of different lengths, each generated token has the largest logit of one transformers call on the
    prompt and the generated tokens.
    """
    import torch
    import transformers

    fields = {
        "Bamba": {"attn_layer_indices": [1], "num_hidden_layers": 3},
        "FalconH1": {
            "mamba_d_ssm": 36, "num_hidden_layers": 2, "mamba_rms_norm": True, "key_multiplier": 0.5,
            "ssm_multipliers": [0.5, 0.75, 1.5, 0.65, 1.75], "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5,
        },
    }[name]  # fmt: skip
    config = getattr(transformers, f"{name}Config")(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, mamba_n_heads=6, mamba_d_state=5, mamba_n_groups=2, mamba_chunk_size=4, max_position_embeddings=32,
        eos_token_id=None, use_cache=False, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    torch_model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    torch_model.save_pretrained(tmp_path)
    model, params = jaxlm.load_pretrained(tmp_path)
    assert model.config.pattern == {"Bamba": ("mamba2", "attention"), "FalconH1": ("parallel",)}[name]
    tokens = np.random.default_rng(0).integers(1, 31, (2, 12)).astype(np.int32)
    with torch.no_grad():
        expected = torch_model(torch.from_numpy(tokens).long()).logits.numpy()
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    state = model.init_state(2, 12)
    for start, stop in [(0, 5), (5, 6), (6, 7), (7, 12)]:
        hidden, state = step(params, tokens[:, start:stop], state)
        assert relative_error(model.logits(params, hidden), expected[:, start:stop]) < 1e-5

    segments = (np.arange(12)[None] >= np.array([[0], [9]])).astype(np.int32)  # padding on the left
    generated = generate(model, params, tokens, segment_ids=segments, max_new_tokens=6).tokens
    ids = torch.from_numpy(np.concatenate([tokens, generated], axis=1)).long()
    mask = torch.from_numpy(np.concatenate([segments, np.ones_like(generated)], axis=1)).long()
    with torch.no_grad():
        output = torch_model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    assert generated.tolist() == output[:, 11:-1].argmax(-1).tolist()


def test_generation_after_padded_prompts_equals_torch(models: tuple[Any, Any, Any]) -> None:
    import torch

    torch_model, model, params = models
    prompts = np.random.default_rng(1).integers(1, 31, (3, 7)).astype(np.int32)
    segments = (np.arange(7)[None] >= np.array([[0], [3], [6]])).astype(np.int32)  # padding on the left
    expected = torch_model.generate(
        torch.from_numpy(prompts).long(), attention_mask=torch.from_numpy(segments).long(), max_new_tokens=8,
        do_sample=False,
    )  # fmt: skip
    generated = generate(model, params, prompts, segment_ids=segments, max_new_tokens=8)
    assert generated.tokens.tolist() == expected[:, 7:].tolist()


def test_transformers_ignores_the_mask_of_a_single_row(models: tuple[Any, Any, Any]) -> None:
    """With one row, transformers reads padding as text. jaxlm ignores padding, as does transformers with more rows."""
    import torch

    torch_model, model, params = models
    tokens = np.random.default_rng(3).integers(1, 31, (1, 9)).astype(np.int32)
    mask = np.array([[0] * 3 + [1] * 6], np.int32)
    ids, torch_mask = torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
    with torch.no_grad():
        masked, unmasked = (torch_model(ids, attention_mask=m).logits.numpy() for m in (torch_mask, None))
        alone = torch_model(ids[:, 3:]).logits.numpy()
    assert np.array_equal(masked, unmasked)
    hidden, _ = jax.jit(model.apply)(params, tokens, segment_ids=mask)
    logits = np.asarray(model.logits(params, hidden))[:, 3:]
    assert relative_error(logits, alone) < 1e-5
    assert relative_error(logits, masked[:, 3:]) > 1e-2


def test_bfloat16_is_as_near_to_float32_as_torch(models: tuple[Any, Any, Any]) -> None:
    import copy

    import torch

    torch_model, model, params = models
    tokens = np.random.default_rng(2).integers(0, 31, (2, 24)).astype(np.int32)
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        want = torch_model(ids).logits.numpy()
        torch_error = relative_error(copy.deepcopy(torch_model).bfloat16()(ids).logits, want)
    half = model.with_fields(dtype="bfloat16")
    assert relative_error(half.logits(params, jax.jit(half.apply)(params, tokens)[0]), want) < max(
        1.5 * torch_error, 0.02
    )
