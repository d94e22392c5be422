"""Fixtures of the decoding tests: GPT-2, and a small recurrent model whose state is not a KV cache.

Shapes: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm import spec
from jaxlm.models.model import Metadata
from jaxlm.spec import ArraySpec, Normal
from jaxlm.testing.helpers import initial_params


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    vocab_size: int = 32
    embed_dim: int = 16


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """A model with ``h = tanh(h U + E[x])`` that skips padding. Its state [D, B] has no time axis."""

    config: RecurrentConfig = RecurrentConfig()
    task = "causal"
    reads_source = False
    max_positions = None
    needs_whole_text = False
    metadata = Metadata()
    has_cache = False

    @property
    def specs(self) -> spec.Tree:
        V, D = self.config.vocab_size, self.config.embed_dim
        return {
            "table": ArraySpec((V, D), ("vocab", "embed"), Normal(0.05), decay=True),
            "recurrent": ArraySpec((D, D), (None, None), Normal(0.03), decay=True),
            "head": ArraySpec((V, D), ("vocab", "embed"), Normal(0.05), decay=True),
        }

    def init(self, key: jax.Array) -> spec.Tree:
        return spec.init(self.specs, key)

    def state_specs(self, batch: int, length: int) -> spec.Tree:
        return {"h": ArraySpec((self.config.embed_dim, batch), (None, "batch"))}

    def init_state(self, batch: int, length: int) -> spec.Tree:
        return spec.init(self.state_specs(batch, length))

    def apply(
        self, params: Any, tokens: jax.Array, *, state: Any = None, segment_ids: Any = None, positions: Any = None
    ) -> tuple[jax.Array, Any]:
        B, T = tokens.shape
        h_BD = (self.init_state(B, T) if state is None else state)["h"].T
        real_BT = jnp.ones((B, T), bool) if segment_ids is None else segment_ids > 0

        def step(h_BD: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
            token_B, real_B = x
            new_BD = jnp.tanh(h_BD @ params["recurrent"] + params["table"][token_B])
            h_BD = jnp.where(real_B[:, None], new_BD, h_BD)
            return h_BD, h_BD

        h_BD, hidden_TBD = jax.lax.scan(step, h_BD, (tokens.T, real_BT.T))
        return jnp.swapaxes(hidden_TBD, 0, 1), None if state is None else {"h": h_BD.T}

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        return jnp.einsum("BTD,VD->BTV", hidden, params["head"])


def context_sensitive_params(model: Any, seed: int = 0) -> Any:
    """Random parameters whose weights are large enough that the most likely token depends on the context."""
    params = initial_params(model, seed)
    return jax.tree.map(lambda x, weight: 20 * x if weight else x, params, spec.decay_mask(model.specs))


@pytest.fixture(scope="session")
def gpt() -> tuple[Any, Any]:
    model = jaxlm.get_model("gpt2-tiny")
    return model, context_sensitive_params(model)


@pytest.fixture(scope="session", params=["gpt", "recurrent"])
def pair(request: pytest.FixtureRequest, gpt: tuple[Any, Any]) -> tuple[Any, Any]:
    """A model and its parameters. A test with this fixture runs with both models."""
    return gpt if request.param == "gpt" else (Recurrent(), context_sensitive_params(Recurrent()))


@pytest.fixture(scope="session", params=["gpt", "recurrent"])
def tiny_pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Like ``pair``, but with only 5 token ids, so that a test can try every continuation."""
    if request.param == "gpt":
        model = jaxlm.get_model("gpt2-tiny", vocab_size=5, num_layers=1)
    else:
        model = Recurrent(RecurrentConfig(vocab_size=5))
    return model, context_sensitive_params(model, seed=3)


@pytest.fixture(scope="session")
def next_log_probs() -> Callable[..., np.ndarray]:
    """A function ``(model, params, rows) -> [B, 24, V]``: log-probabilities after each token, by one forward pass.

    Rows of different lengths are padded at their end, which has no effect in a causal model.
    """
    compiled: dict[Any, Any] = {}

    def run(model: Any, params: Any, rows: Any) -> np.ndarray:
        if model not in compiled:
            compiled[model] = jax.jit(
                lambda params, tokens: jax.nn.log_softmax(model.logits(params, model.apply(params, tokens)[0]), axis=-1)
            )
        padded_rows = np.zeros((len(rows), 24), np.int32)
        for padded_row, row in zip(padded_rows, rows, strict=True):
            padded_row[: len(row)] = row
        return np.asarray(compiled[model](params, padded_rows))

    return run


def padded(prompts: list[list[int]], sides: str) -> tuple[np.ndarray, np.ndarray]:
    """Pad prompts to one array; returns it and its segment ids. ``sides[row]`` is the side of the padding: l or r."""
    longest = max(map(len, prompts))
    tokens, segment_ids = np.full((len(prompts), longest), 1), np.zeros((len(prompts), longest), np.int32)
    for row, (prompt, side) in enumerate(zip(prompts, sides, strict=True)):
        positions = slice(longest - len(prompt), None) if side == "l" else slice(0, len(prompt))
        tokens[row, positions], segment_ids[row, positions] = prompt, 1
    return tokens, segment_ids


@pytest.fixture(scope="session")
def pad() -> Callable[[list[list[int]], str], tuple[np.ndarray, np.ndarray]]:
    return padded
