"""The implementations that ``benchmarks.attention`` compares: attention in jaxlm, in JAX and in torch.

Shapes: B batch, T queries, S keys, H heads, K head width.
"""

from __future__ import annotations

import abc
from typing import Any

from benchmarks import shapes
from benchmarks.baselines import JaxSampled, Sampled, TorchImplementation, jax_exact, torch_device, torch_wait

MAX_DISTANCE = 128
"""``relative_attention_max_distance`` of T5. All distances from this number on are in the last bucket."""


def shift(padded: Any) -> Any:
    """The relative shift in the code of Dai et al. 2019, [B, H, T, R].

    For s <= t, column s of row t has the score of distance t - s. The other entries must be masked.

    Args:
        padded: one column of zeros, then the score of each query and distance, [B, H, T, R + 1]. The distances are
            R - 1 to 0, and R = T.
    """
    B, H, T, columns = padded.shape
    return padded.reshape(B, H, columns, T)[:, :, 1:].reshape(B, H, T, columns - 1)


class JaxAttention(JaxSampled):
    """Base class of attention in JAX, in one jitted function."""

    def __init__(self, directory: str, pass_name: str, **sizes: Any) -> None:
        jax = jax_exact()
        self.shape, self.pass_name = shapes.Attention(**sizes), pass_name
        arrays = jax.device_put(shapes.attention_arrays(self.shape))
        dout, constants = arrays.pop("dout"), self.constants()

        def both(arrays: Any, constants: Any, dout: Any) -> Any:
            out, vjp = jax.vjp(lambda arrays: self.attend(arrays, constants), arrays)
            return out, vjp(dout)[0]

        self.arguments = (arrays, constants) if pass_name == "forward" else (arrays, constants, dout)
        self.jitted = jax.jit(self.attend if pass_name == "forward" else both)

    @abc.abstractmethod
    def constants(self) -> Any:
        """The second argument of :meth:`attend`, which has no gradient."""

    @abc.abstractmethod
    def attend(self, arrays: Any, constants: Any) -> Any:
        """The output [B, T, H, K]. ``arrays``: those of ``shapes.attention_arrays`` without ``dout``."""

    def name_results(self, results: Any) -> dict[str, Any]:
        return {"out": results} if self.pass_name == "forward" else {"out": results[0], **results[1]}


class Jaxlm(JaxAttention):
    """``jaxlm.nn.attention.attention`` with its default implementation.

    For ``decode``, the mask hides the free slots of the cache.
    """

    def constants(self) -> Any:
        import jax.numpy as jnp

        from jaxlm.nn.attention.mask import Mask

        if self.shape.variant != "decode":
            return Mask(causal=True)
        slot_1S, length = jnp.arange(self.shape.keys)[None], self.shape.length
        segments = (slot_1S < length).astype(jnp.int32)
        return Mask(
            causal=True, query_order=jnp.full((1, 1), length - 1), key_order=slot_1S,
            query_segments=jnp.ones((1, 1), jnp.int32), key_segments=segments,
        )  # fmt: skip

    def attend(self, arrays: Any, constants: Any) -> Any:
        from jaxlm.nn.attention import attention
        from jaxlm.nn.attention.bucket_bias import bias_of_each_distance
        from jaxlm.nn.attention.distance_bias import distance_bias

        T, S, bias = self.shape.queries, self.shape.keys, None
        if self.shape.variant == "bias":
            table = bias_of_each_distance(arrays["table"], MAX_DISTANCE, bidirectional=False)
            bias = distance_bias(table, MAX_DISTANCE, T, S, query_offset=0)
        if self.shape.variant == "relative":
            scale = self.shape.width**-0.5
            bias = distance_bias(arrays["table"], S - 1, T, S, query_offset=0, q_BTHK=arrays["query"], scale=scale)
        return attention(arrays["query"], arrays["key"], arrays["value"], constants, bias=bias)


class JaxNN(JaxAttention):
    """``jax.nn.dot_product_attention``. The variants with a bias have a dense bias array.

    For ``decode``, ``key_value_seq_lengths`` hides the free slots of the cache.
    """

    def constants(self) -> Any:
        """``bias``: the bucket of each query-key pair [T, S]. ``decode``: the number of filled slots [1]. Else None."""
        import jax.numpy as jnp

        from jaxlm.nn.attention.bucket_bias import distance_buckets

        T, S = self.shape.queries, self.shape.keys
        if self.shape.variant == "decode":
            return jnp.full((1,), self.shape.length, jnp.int32)
        if self.shape.variant != "bias":
            return None
        distance = jnp.arange(S)[None] - jnp.arange(T)[:, None]
        buckets = jnp.asarray(distance_buckets(32, MAX_DISTANCE, bidirectional=False))
        return buckets[jnp.clip(distance, -MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE]

    def attend(self, arrays: Any, constants: Any) -> Any:
        import jax.numpy as jnp
        from jax.nn import dot_product_attention

        qkv = arrays["query"], arrays["key"], arrays["value"]
        if self.shape.variant == "decode":
            return dot_product_attention(*qkv, key_value_seq_lengths=constants)
        bias = None
        if self.shape.variant == "bias":
            bias = arrays["table"][constants].transpose(2, 0, 1)[None]
        if self.shape.variant == "relative":
            scores = jnp.einsum("bthk,rhk->bhtr", arrays["query"], arrays["table"]) * self.shape.width**-0.5
            bias = shift(jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0))))
        return dot_product_attention(*qkv, bias=bias, is_causal=True)


class Torch(Sampled, TorchImplementation):
    """``scaled_dot_product_attention``. The variants with a bias have a dense bias array.

    For ``decode``, the function gets only the filled slots of the cache.
    """

    def __init__(self, directory: str, pass_name: str, **sizes: Any) -> None:
        import torch

        self.shape, self.pass_name = shapes.Attention(**sizes), pass_name
        arrays = {
            name: torch.from_numpy(x).to(torch_device()) for name, x in shapes.attention_arrays(self.shape).items()
        }
        self.dout = arrays.pop("dout")
        self.arrays = {name: x.requires_grad_(pass_name == "both") for name, x in arrays.items()}
        T, S = self.shape.queries, self.shape.keys
        self.is_future = torch.ones(T, S, dtype=torch.bool, device=torch_device()).triu(1)
        if self.shape.variant == "bias":
            from transformers.models.t5.modeling_t5 import T5Attention

            distance = torch.arange(S)[None] - torch.arange(T)[:, None]
            bucket = T5Attention._relative_position_bucket(
                distance, bidirectional=False, num_buckets=32, max_distance=MAX_DISTANCE
            )
            self.bucket = bucket.to(torch_device())

    def _forward(self) -> Any:
        import torch

        q, k, v = (self.arrays[name].transpose(1, 2) for name in ("query", "key", "value"))
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if self.shape.variant == "plain":
            return sdpa(q, k, v, is_causal=True).transpose(1, 2)
        if self.shape.variant == "decode":
            n = self.shape.length
            return sdpa(q, k[:, :, :n], v[:, :, :n]).transpose(1, 2)
        if self.shape.variant == "bias":
            bias = self.arrays["table"][self.bucket].permute(2, 0, 1)[None]
        else:
            scores = torch.einsum("bhtk,rhk->bhtr", q, self.arrays["table"]) * self.shape.width**-0.5
            bias = shift(torch.nn.functional.pad(scores, (1, 0)))
        return sdpa(q, k, v, attn_mask=bias.masked_fill(self.is_future, float("-inf"))).transpose(1, 2)

    def run(self) -> dict[str, Any]:
        import torch

        with torch.set_grad_enabled(self.pass_name == "both"):
            results = {"out": self._forward()}
        if self.pass_name == "both":
            gradients = torch.autograd.grad(results["out"], list(self.arrays.values()), self.dout)
            results |= dict(zip(self.arrays, gradients, strict=True))
        torch_wait()
        return results
