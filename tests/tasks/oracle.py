"""A fake causal model with exact logits, computed from a list of known games."""

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
    """The state and the hidden state are a hash of the tokens so far. Logits count the next tokens in known games."""

    config: OracleConfig
    family = "oracle"
    task = "causal"
    reads_source = False
    max_positions = None

    def state_specs(self, batch: int, length: int) -> spec.Tree:
        return {"hash": ArraySpec((batch,), ("batch",), dtype=jnp.uint32)}

    def init_state(self, batch: int, length: int) -> spec.Tree:
        return spec.init(self.state_specs(batch, length))

    def apply(
        self, params: Any, tokens: jax.Array, *, state: Any = None, segment_ids: Any = None
    ) -> tuple[jax.Array, Any]:
        is_token_BT = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids > 0
        hash_B = (self.init_state(*tokens.shape) if state is None else state)["hash"]

        def step(hash_B: jax.Array, x: Any) -> tuple[jax.Array, jax.Array]:
            token_B, is_token_B = x
            hash_B = jnp.where(is_token_B, hash_B * FACTOR + token_B.astype(jnp.uint32), hash_B)
            return hash_B, hash_B

        hash_B, hash_TB = jax.lax.scan(step, hash_B, (tokens.T, is_token_BT.T))
        return hash_TB.T[..., None], None if state is None else {"hash": hash_B}

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        return (hidden == params["hash"][None, None]).astype(jnp.float32) @ params["logits"]


def oracle(tokenizer: MoveTokenizer, lines: Sequence[str], *, end: bool = True) -> tuple[Any, dict[str, np.ndarray]]:
    """Return a model and parameters that know the games ``lines``.

    After a game, the next token is the EOS token, or padding if ``end`` is False.
    """
    logits_of_hash: dict[int, np.ndarray] = {}
    for line in lines:
        hash, ids = 0, [*tokenizer.encode_game(line)[:-1], tokenizer.eos_id if end else tokenizer.pad_id]
        for id, next_id in zip(ids, ids[1:], strict=False):
            hash = (hash * int(FACTOR) + int(id)) % 2**32
            logits_of_hash.setdefault(hash, np.zeros(tokenizer.vocab_size, np.float32))[next_id] += 10.0
    params = {"hash": np.array(list(logits_of_hash), np.uint32), "logits": np.stack(list(logits_of_hash.values()))}
    return Oracle(OracleConfig(tokenizer.vocab_size)), params
