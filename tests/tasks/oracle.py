"""A causal model with exact values: it knows given games and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import spec
from jaxlm.data.moves import MoveTokenizer
from jaxlm.spec import ArraySpec

FACTOR = np.uint32(1_000_003)


@dataclasses.dataclass(frozen=True)
class OracleConfig:
    vocab_size: int


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Its state and hidden state are a hash of what was read; its logits count what followed in the known games."""

    config: OracleConfig
    family = "oracle"
    reads_source = False

    def state_specs(self, batch: int, length: int) -> spec.Tree:
        return {"hash": ArraySpec((batch,), ("batch",), dtype=jnp.uint32)}

    def init_state(self, batch: int, length: int) -> spec.Tree:
        return spec.init(self.state_specs(batch, length))

    def apply(
        self, params: Any, tokens: jax.Array, *, state: Any = None, segment_ids: Any = None
    ) -> tuple[jax.Array, Any]:
        real_BT = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        hash_B = (self.init_state(*tokens.shape) if state is None else state)["hash"]

        def step(hash_B: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
            token_B, real_B = x
            hash_B = jnp.where(real_B, hash_B * FACTOR + token_B.astype(jnp.uint32), hash_B)
            return hash_B, hash_B

        hash_B, hash_TB = jax.lax.scan(step, hash_B, (tokens.T, real_BT.T))
        return hash_TB.T[..., None], None if state is None else {"hash": hash_B}

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        return (hidden == params["hash"][None, None]).astype(jnp.float32) @ params["logits"]


def oracle(tokenizer: MoveTokenizer, lines: Sequence[str], *, end: bool = True) -> tuple[Any, dict[str, np.ndarray]]:
    """The model and the parameters that know ``lines``. With ``end`` False, padding follows them, not the end."""
    following: dict[int, np.ndarray] = {}
    for line in lines:
        hash, ids = 0, [*tokenizer.game(line)[:-1], tokenizer.eos_id if end else tokenizer.pad_id]
        for id, after in zip(ids, ids[1:], strict=False):
            hash = (hash * int(FACTOR) + int(id)) % 2**32
            following.setdefault(hash, np.zeros(tokenizer.vocab_size, np.float32))[after] += 10.0
    params = {"hash": np.array(list(following), np.uint32), "logits": np.stack(list(following.values()))}
    return Oracle(OracleConfig(tokenizer.vocab_size)), params
