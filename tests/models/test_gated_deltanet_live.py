"""Compare Gated DeltaNet with torch: cached decoding of Qwen3-Next."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.testing.helpers import relative_error

pytestmark = pytest.mark.live


@pytest.mark.parametrize("prompt", [2, 9])  # shorter than the convolution, and longer
def test_cached_decoding_equals_torch(prompt: int, tmp_path: Path) -> None:
    import torch
    import transformers

    config = transformers.Qwen3NextConfig(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_hidden_layers=4, num_attention_heads=4,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10, shared_expert_intermediate_size=8,
        mlp_only_layers=[1],
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=6, max_position_embeddings=32, rms_norm_eps=0.03,
    )  # fmt: skip
    torch.manual_seed(0)
    torch_model = transformers.Qwen3NextForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    torch_model.save_pretrained(tmp_path)
    model, params = jaxlm.load_pretrained(tmp_path)
    assert model.config.pattern == ("delta_rule", "delta_rule", "delta_rule", "attention")
    tokens = np.random.default_rng(0).integers(0, 31, (2, 16)).astype(np.int32)
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    past, state = None, model.init_state(2, 16)
    for start, stop in [(0, prompt), *((position, position + 1) for position in range(prompt, 16))]:
        with torch.no_grad():
            output = torch_model(torch.from_numpy(tokens[:, start:stop]).long(), past_key_values=past, use_cache=True)
        past = output.past_key_values
        hidden, state = step(params, tokens[:, start:stop], state)
        assert relative_error(model.logits(params, hidden), output.logits) < 1e-5
