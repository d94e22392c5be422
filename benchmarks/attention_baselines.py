"""The implementations that ``benchmarks.attention`` compares: attention in jaxlm and in torch.

Shapes: B batch, T queries, S keys, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

from benchmarks import shapes
from benchmarks.baselines import JaxSampled, Sampled, TorchImplementation, jax_exact, torch_device, torch_wait

MAX_DISTANCE = 128
"""``relative_attention_max_distance`` of T5. All distances from this number on are in the last bucket."""


class Jaxlm(JaxSampled):
    """``jaxlm.nn.attention.attention`` with its default implementation, in one jitted function.

    For ``decode``, the mask hides the free slots of the cache.
    """

    def __init__(self, directory: str, pass_name: str, **sizes: Any) -> None:
        jax = jax_exact()
        import jax.numpy as jnp

        from jaxlm.nn.attention import attention
        from jaxlm.nn.attention.bucket_bias import bias_of_each_distance
        from jaxlm.nn.attention.distance_bias import distance_bias
        from jaxlm.nn.attention.mask import Mask

        shape = shapes.Attention(**sizes)
        arrays = jax.device_put(shapes.attention_arrays(shape))
        dout, T, S = arrays.pop("dout"), shape.queries, shape.keys
        mask = Mask(causal=True)
        if shape.variant == "decode":
            slot_1S = jnp.arange(S)[None]
            segments = (slot_1S < shape.length).astype(jnp.int32)
            mask = Mask(
                causal=True, query_order=jnp.full((1, 1), shape.length - 1), key_order=slot_1S,
                query_segments=jnp.ones((1, 1), jnp.int32), key_segments=segments,
            )  # fmt: skip

        def forward(arrays: Any, mask: Any) -> Any:
            bias = None
            if shape.variant == "bias":
                table = bias_of_each_distance(arrays["table"], MAX_DISTANCE, bidirectional=False)
                bias = distance_bias(table, MAX_DISTANCE, T, S, query_offset=0)
            if shape.variant == "relative":
                bias = distance_bias(
                    arrays["table"], S - 1, T, S, query_offset=0, q_BTHK=arrays["query"], scale=K**-0.5
                )
            return attention(arrays["query"], arrays["key"], arrays["value"], mask, bias=bias)

        K = shape.width

        def both(arrays: Any, mask: Any, dout: Any) -> Any:
            out, vjp = jax.vjp(lambda arrays: forward(arrays, mask), arrays)
            return out, vjp(dout)[0]

        self.arguments = (arrays, mask) if pass_name == "forward" else (arrays, mask, dout)
        self.jitted = jax.jit(forward if pass_name == "forward" else both)
        self.pass_name = pass_name

    def name_results(self, results: Any) -> dict[str, Any]:
        return {"out": results} if self.pass_name == "forward" else {"out": results[0], **results[1]}


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
            B, H, T, R = scores.shape  # R: number of distances
            # The relative shift in the code of Dai et al. 2019: now column s of row t has the score of distance t - s.
            bias = torch.nn.functional.pad(scores, (1, 0)).view(B, H, R + 1, T)[:, :, 1:].reshape(B, H, T, R)
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
