"""Compare the gated delta rule with transformers: its chunked and its recurrent form, values and gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.scan import Chunked, gated_delta_rule
from jaxlm.testing.helpers import assert_trees_close

pytestmark = pytest.mark.live

B, T, H, K, V = 2, 37, 3, 8, 6


@pytest.mark.parametrize("name", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"])
def test_values_and_gradients_equal_transformers(name: str) -> None:
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next

    rng = np.random.default_rng(0)
    q, k, v, state, out_weight, state_weight = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((B, T, H, K), (B, T, H, K), (B, T, H, V), (B, H, K, V), (B, T, H, V), (B, H, K, V))
    )
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    log_decay = -np.exp(rng.standard_normal((B, T, H))).astype(np.float32)
    beta = rng.uniform(0.0, 2.0, (B, T, H)).astype(np.float32)
    arguments = (q, k, v, log_decay, beta, state)

    tensors = [torch.tensor(x, requires_grad=True) for x in arguments]
    options = {"chunk_size": 16} if "chunk" in name else {}
    out, last = getattr(modeling_qwen3_next, name)(
        *tensors[:5], initial_state=tensors[5], output_final_state=True, **options
    )
    ((out * torch.tensor(out_weight)).sum() + (last * torch.tensor(state_weight)).sum()).backward()
    want = (out.detach().numpy(), last.detach().numpy()), [x.grad.numpy() for x in tensors]

    for implementation in ("reference", Chunked(8)):

        def weighted(q: Any, *arguments: Any, implementation: Any = implementation) -> Any:
            # transformers scales the queries by K ** -0.5.
            out, last = gated_delta_rule(q * K**-0.5, *arguments, implementation=implementation)
            return jnp.sum(out * out_weight) + jnp.sum(last * state_weight), (out, last)

        gradients, outputs = jax.jit(jax.grad(weighted, range(6), has_aux=True))(*arguments)
        assert_trees_close((outputs, list(gradients)), want, 5e-6)
