"""Compare xLSTM with torch: cached decoding, the chunked form of transformers, generation, and padding."""

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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A random model of transformers, the same model loaded by jaxlm, and its parameters.

    The cache of transformers needs queries and values whose widths of all heads are multiples of 64.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.xLSTMConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=2, num_heads=4, qk_dim_factor=2.0, v_dim_factor=4.0,
        ffn_proj_factor=1.5, ffn_round_up_to_multiple_of=1, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch_model = transformers.xLSTMForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
        for block in torch_model.backbone.blocks:
            block.mlstm_layer.igate_preact.bias.add_(10.0)  # so that input gates are not always nearly 0
    directory: Path = tmp_path_factory.mktemp("xlstm")
    torch_model.save_pretrained(directory)
    return (torch_model, *jaxlm.load_pretrained(directory))


@pytest.mark.parametrize("prompt", [1, 9])
def test_cached_decoding_equals_torch(pair: tuple[Any, Any, Any], prompt: int) -> None:
    import torch

    torch_model, model, params = pair
    tokens = np.random.default_rng(0).integers(0, 31, (2, 14)).astype(np.int32)
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    cache, state = None, model.init_state(2, 14)
    for start, stop in [(0, prompt), *((position, position + 1) for position in range(prompt, 14))]:
        with torch.no_grad():
            output = torch_model(torch.from_numpy(tokens[:, start:stop]).long(), cache_params=cache, use_cache=True)
        cache = output.cache_params
        hidden, state = step(params, tokens[:, start:stop], state)
        assert relative_error(model.logits(params, hidden), output.logits) < 1e-5
    for number, layer in enumerate(state["layers"]):
        cell, normalizer, stabilizer = cache.rnn_state[number]
        assert relative_error(layer["cell"], cell) < 1e-5
        assert relative_error(layer["normalizer"], normalizer) < 1e-5
        assert relative_error(layer["stabilizer"], stabilizer[..., 0]) < 1e-5


def test_the_chunked_form_equals_torch(pair: tuple[Any, Any, Any]) -> None:
    """The corrected module of transformers reads 3 chunks of 8 tokens, and then single tokens."""
    import torch

    from benchmarks.torch_models import xlstm_module

    original, model, params = pair
    torch_model = xlstm_module().xLSTMForCausalLM(original.config).eval()
    torch_model.load_state_dict(original.state_dict())
    tokens = np.random.default_rng(1).integers(0, 31, (2, 29)).astype(np.int32)
    for block in torch_model.backbone.blocks:
        block.mlstm_layer.mlstm_backend._inference_fn.keywords["chunk_size"] = 8
    with torch.no_grad():
        output = torch_model(torch.from_numpy(tokens).long())
    hidden, _ = jax.jit(model.apply)(params, tokens)
    assert relative_error(model.logits(params, hidden), output.logits) < 1e-5


def test_generation_equals_torch(pair: tuple[Any, Any, Any]) -> None:
    import torch

    torch_model, model, params = pair
    prompts = np.random.default_rng(2).integers(1, 31, (3, 7)).astype(np.int32)
    expected = torch_model.generate(torch.from_numpy(prompts).long(), max_new_tokens=8, do_sample=False)
    generated = generate(model, params, prompts, max_new_tokens=8)
    assert generated.tokens.tolist() == expected[:, 7:].tolist()


def test_transformers_reads_padding_as_text(pair: tuple[Any, Any, Any]) -> None:
    """The class of transformers ignores the attention mask. In jaxlm, padding has no effect."""
    import torch

    torch_model, model, params = pair
    tokens = np.random.default_rng(3).integers(1, 31, (1, 9)).astype(np.int32)
    mask = np.array([[0] * 3 + [1] * 6], np.int32)
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        masked = torch_model(ids, attention_mask=torch.from_numpy(mask).long()).logits.numpy()
        alone = torch_model(ids[:, 3:]).logits.numpy()
    hidden, _ = jax.jit(model.apply)(params, tokens, segment_ids=mask)
    logits = np.asarray(model.logits(params, hidden))[:, 3:]
    assert relative_error(logits, alone) < 1e-5
    assert relative_error(logits, masked[:, 3:]) > 1e-2
