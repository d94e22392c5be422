"""Sizes, random inputs and optimizer settings of the benchmarks, and the FLOPs or bytes of each size."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

GEMM_SIZE = 2048
"""Rows and columns of the matrices whose product measures the peak FLOP/s."""
COPY_BYTES = 1 << 28
"""Bytes of the array whose copy measures the peak bandwidth."""
READ_ROWS = 1 << 13
READ_WIDTH = COPY_BYTES // 4 // READ_ROWS
"""Shape of the same array as a matrix. Its product with a vector measures the read bandwidth."""
ADAMW: dict[str, Any] = {
    "learning_rate": 1e-5, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0,
}  # fmt: skip
"""AdamW settings of all implementations. Weight decay applies only to matrices."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """A recurrence or convolution over time, float32.

    ``sizes`` has the name and the size of each axis. ``decays`` is the number of decay factors per head, 1 or K.
    """

    op: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def shown(self) -> str:
        """The sizes as text."""
        return " ".join(f"{name}{'=' if len(name) > 1 else ''}{size}" for name, size in self.sizes)

    def quick(self) -> Scan:
        """The same operation with small sizes."""
        small = {"B": 2, "T": 33, "D": 6, "C": 6, "H": 2, "K": 4, "decays": 4}
        return Scan(self.op, tuple((name, min(size, small.get(name, size))) for name, size in self.sizes))


SCANS = (
    Scan("linear_scan", (("B", 8), ("T", 2048), ("D", 1024))),
    Scan("linear_scan", (("B", 1), ("T", 4096), ("D", 2048))),
    Scan("linear_attention", (("B", 2), ("T", 1024), ("H", 8), ("K", 64), ("decays", 1))),
    Scan("linear_attention", (("B", 2), ("T", 1024), ("H", 8), ("K", 64), ("decays", 64))),
    Scan("depthwise_convolution", (("B", 4), ("T", 1024), ("C", 512), ("taps", 4))),
)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """A recurrent layer applied to a batch. Input and state have the same width."""

    length: int
    """Time steps."""
    batch: int
    """Rows."""
    width: int
    """Width of the hidden state."""

    def __str__(self) -> str:
        return f"T{self.length} B{self.batch} H{self.width}"


RECURRENCES = (Recurrence(128, 32, 512), Recurrence(256, 64, 256), Recurrence(512, 1, 650))
"""Three sizes. The first spends most of its time on matmuls, the second on gates, and the third on reading the weights.
The third size is a layer of Zaremba et al. 2014 with one row."""
GATES = {"lstm": 4, "gru": 3, "gru-before": 3}
"""Number of gates of each layer. ``gru`` applies the reset gate after the product, as torch does."""

QUICK_RECURRENCES = (Recurrence(6, 2, 8),)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal attention of one row, or one query over a cache."""

    variant: str
    """plain, bias, relative or decode."""
    length: int
    """Tokens; for decode: tokens in the cache."""
    capacity: int
    """For decode: capacity of the cache in tokens."""
    heads: int = 12
    """Number of heads."""
    width: int = 64
    """Width of a head."""

    @property
    def queries(self) -> int:
        """Number of queries."""
        return 1 if self.variant == "decode" else self.length

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.capacity if self.variant == "decode" else self.length

    def __str__(self) -> str:
        cache = f" of {self.capacity}" if self.variant == "decode" else ""
        return f"B1 T{self.length}{cache} H{self.heads} K{self.width}"


ATTENTION_LENGTHS = (1024, 4096)


def attention_arrays(shape: Attention) -> dict[str, np.ndarray]:
    """Random query, key, value and output gradient. For some variants, also a table of biases or position vectors."""
    rng = np.random.default_rng(0)

    def draw(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes, np.float32)

    H, K = shape.heads, shape.width
    arrays = {name: draw(1, n, H, K) for name, n in (("query", shape.queries), ("dout", shape.queries))}
    arrays |= {name: draw(1, shape.keys, H, K) for name in ("key", "value")}
    tables = {"bias": (32, H), "relative": (shape.keys, H, K)}
    return arrays | ({"table": draw(*tables[shape.variant])} if shape.variant in tables else {})


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one repetition: ``amount`` in ``unit``, computed by ``formula``, for ``tokens`` tokens.

    The units are "FLOP"; "B", bytes that are read and written (the peak is that of a copy); and "B read", bytes that
    are only read (the peak is that of a read). Result files contain these names.
    """

    tokens: int
    amount: float
    unit: str
    formula: str


def training_work(pass_name: str, model: dict[str, Any]) -> Work:
    """FLOPs of a loss or of an optimizer step. ``model`` is the result of ``baselines.Machine.facts``."""
    tokens = model["batch"] * model["length"]
    if pass_name == "forward":
        return Work(tokens, model["training_flops"] / 3, "FLOP", f"({model['formula']}) / 3")
    return Work(tokens, model["training_flops"], "FLOP", model["formula"])


def decoding_work(batch: int, tokens: int, model: dict[str, Any]) -> Work:
    """Bytes that decoding must read: the parameters of all matmuls, once per step. All rows share one read."""
    formula = "bytes of the parameters of matmuls (without encoder) * new tokens per row; the time includes the prompt"
    return Work(batch * tokens, model["weight_bytes_per_step"] * tokens, "B read", formula)


def scan_work(shape: Scan, backward: bool) -> Work:
    """The bytes that the operation must read and write, or the FLOPs of ``linear_attention``.

    Args:
        backward: count the forward and the backward pass, instead of the forward pass.
    """
    sizes = dict(shape.sizes)
    tokens = sizes["B"] * sizes["T"]
    if shape.op == "linear_attention":
        amount = 4 * tokens * sizes["H"] * sizes["K"] ** 2
        formula = "4*B*T*H*K*V for the forward pass of the sequential recurrence (V = K), 3 times that with backward"
        return Work(tokens, amount * (3 if backward else 1), "FLOP", formula)
    if shape.op == "linear_scan":
        elements, num_arrays = tokens * sizes["D"], 8 if backward else 3
        formula = "3*B*T*D*4 bytes forward (decay, input, state), 5 more backward (decay, state, three gradients)"
    else:
        elements, num_arrays = tokens * sizes["C"], 5 if backward else 2
        formula = "2*B*T*C*4 bytes forward (input, output), 3 more backward (input, gradients of output and input)"
    return Work(tokens, 4 * elements * num_arrays, "B", formula)


def attention_work(shape: Attention, pass_name: str) -> Work:
    """FLOPs of attention, not counting the bias; for decode, the bytes of the filled part of the cache."""
    H, K = shape.heads, shape.width
    if shape.variant == "decode":
        formula = "bytes of the cached keys and values; the peak is the bandwidth of a copy"
        return Work(1, 2 * 4 * H * K * shape.length, "B", formula)
    amount = 2.0 * shape.length**2 * H * K * (1 if pass_name == "forward" else 3.5)
    formula = "2*T*T*H*K forward, 3.5 times that with backward; the peak is the FLOP/s of a GEMM"
    return Work(shape.length, amount, "FLOP", formula)


def random_tokens(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Random ids [batch, length], int32, equal in every process."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length)).astype(np.int32)


def zipf_tokens(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Random ids [batch, length], int32, with the frequencies of words: 1 / (rank + 2.7), normalized (Mandelbrot 1953).

    Use these ids for an adaptive softmax, whose FLOPs depend on the frequencies.
    """
    frequency = 1.0 / (np.arange(vocab_size) + 2.7)
    rng = np.random.default_rng(0)
    return rng.choice(vocab_size, (batch, length), p=frequency / frequency.sum()).astype(np.int32)


def recurrence_work(shape: Recurrence, layer: str, pass_name: str) -> Work:
    """FLOPs of the matrix products of one layer, forward or with all gradients."""
    tokens, forward = shape.length * shape.batch, 2 * GATES[layer] * 2 * shape.width**2
    if pass_name == "forward":
        return Work(tokens, forward * tokens, "FLOP", "2*G*H*(D+H)*tokens, D = H: products of G gates")
    return Work(tokens, 3 * forward * tokens, "FLOP", "6*G*H*(D+H)*tokens, D = H: products of G gates, three times")


def recurrence_arrays(shape: Recurrence, layer: str) -> dict[str, np.ndarray]:
    """Random parameters in jaxlm's layout, input [B, T, D] and output gradient, float32, equal in every process."""
    rng, gates, H = np.random.default_rng(0), GATES[layer], shape.width
    shapes = {"weight_input": (H, gates, H), "weight_hidden": (H, gates, H), "bias": (gates, H), "bias_hidden": (H,)}
    arrays = {name: rng.uniform(-(H**-0.5), H**-0.5, size) for name, size in shapes.items()}
    arrays |= {name: rng.standard_normal((shape.batch, shape.length, H)) for name in ("input", "doutput")}
    if layer != "gru":
        del arrays["bias_hidden"]
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def samples(size: int) -> np.ndarray:
    """64 random indices into a flat array of this size, equal in every process."""
    return np.random.default_rng(1).integers(0, size, 64)
