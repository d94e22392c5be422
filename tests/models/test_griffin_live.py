"""Compare Griffin with RecurrentGemma of transformers: cached decoding, the window, and differences.

The state of the torch class is in its layers. A call with several tokens and ``use_cache=True`` starts a new state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.testing.helpers import relative_error

pytestmark = pytest.mark.live

WINDOW = 10
SHAPE = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 5, "num_attention_heads": 3,
    "num_key_value_heads": 1, "lru_width": 36, "attention_window_size": WINDOW,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 61, (2, 30)).astype(np.int32)


@pytest.fixture(scope="module")
def models(tmp_path_factory: Any) -> tuple[Any, Any, Any]:
    """The torch model, and the jaxlm model and parameters that were loaded from its files."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch_model = transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    directory: Path = tmp_path_factory.mktemp("griffin")
    torch_model.save_pretrained(directory)
    model, params = jaxlm.load_pretrained(directory)
    assert model.config.window == WINDOW
    return torch_model, model, params


def torch_logits(torch_model: Any, start: int, stop: int, *, use_cache: bool) -> np.ndarray:
    import torch

    with torch.no_grad():
        return torch_model(
            torch.from_numpy(TOKENS[:, start:stop]).long(), cache_position=torch.arange(start, stop),
            use_cache=use_cache,
        ).logits.numpy()  # fmt: skip


def jaxlm_logits(model: Any, params: Any, length: int) -> np.ndarray:
    """Logits of one call without a state."""
    hidden, _ = jax.jit(model.apply)(params, TOKENS[:, :length])
    return np.asarray(model.logits(params, hidden))


@pytest.mark.parametrize(("prompt", "stop"), [(2, WINDOW - 1), (5, WINDOW - 1), (WINDOW, 30)])
def test_cached_decoding_equals_torch(models: Any, prompt: int, stop: int) -> None:
    """Texts within the window after any prompt, and texts far beyond it after a prompt that fills torch's cache."""
    torch_model, model, params = models
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    state = model.init_state(2, 1)
    whole = jaxlm_logits(model, params, stop)
    for start, end in [(0, prompt), *((position, position + 1) for position in range(prompt, stop))]:
        hidden, state = step(params, TOKENS[:, start:end], state)
        want = torch_logits(torch_model, start, end, use_cache=True)
        assert relative_error(model.logits(params, hidden), want) < 1e-5
        assert relative_error(whole[:, start:end], want) < 1e-5


def test_differences_of_the_window(models: Any) -> None:
    """Without a cache, torch has no window. While its cache fills, torch drops a token and attends to an empty slot."""
    torch_model, model, params = models
    from benchmarks.torch_models import forget_states  # imports torch

    forget_states(torch_model)
    without_cache = torch_logits(torch_model, 0, 30, use_cache=False)
    wide = model.with_fields(window=30)
    assert relative_error(jaxlm_logits(wide, params, 30), without_cache) < 1e-5
    ours = jaxlm_logits(model, params, 30)
    assert relative_error(ours[:, :WINDOW], without_cache[:, :WINDOW]) < 1e-5
    assert relative_error(ours[:, WINDOW:], without_cache[:, WINDOW:]) > 1e-3

    torch_logits(torch_model, 0, WINDOW - 1, use_cache=True)
    last_slot = torch_logits(torch_model, WINDOW - 1, WINDOW, use_cache=True)
    assert relative_error(ours[:, WINDOW - 1 : WINDOW], last_slot) > 1e-3
