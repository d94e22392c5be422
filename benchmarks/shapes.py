"""Sizes, random inputs and optimizer settings of the benchmarks, and the work (FLOPs or bytes) for each size."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

GEMM_SIZE = 2048
"""Rows and columns of the matrices whose product measures the peak FLOP/s."""
COPY_BYTES = 1 << 28
"""Bytes of the float32 array whose copy and read measure the peak bandwidth."""
READ_ROWS = 1 << 13
READ_WIDTH = COPY_BYTES // 4 // READ_ROWS
"""Shape of the same array as a matrix. One of the reads that measure the bandwidth multiplies it by a vector."""
ADAMW: dict[str, Any] = {
    "learning_rate": 1e-5, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0,
}  # fmt: skip
"""AdamW settings of all implementations. Weight decay applies only to parameters with two or more axes (jaxlm: with
``decay=True`` in their spec)."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """A linear recurrence or a depthwise convolution over time, float32.

    Attributes:
        op: depthwise_convolution, or the name of a function in ``jaxlm.nn.scan``.
        sizes: pairs of a name and a size: B batch, T time, D channels of linear_scan, H heads, K head width, ``decays``
            (1 or K) decay factors per head, C channels of the convolution, and ``taps``, its kernel size.
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
    Scan("gated_delta_rule", (("B", 2), ("T", 1024), ("H", 8), ("K", 64))),
    Scan("generalized_delta_rule", (("B", 2), ("T", 1024), ("H", 8), ("K", 64))),
    Scan("mlstm", (("B", 2), ("T", 1024), ("H", 8), ("K", 64))),
    Scan("depthwise_convolution", (("B", 4), ("T", 1024), ("C", 512), ("taps", 4))),
)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """The sizes of a recurrent layer and its batch. Input and state have the same width."""

    length: int
    """Time steps."""
    batch: int
    """Rows."""
    width: int
    """Width of the hidden state."""

    def __str__(self) -> str:
        return f"T{self.length} B{self.batch} H{self.width}"


RECURRENCES = (Recurrence(128, 32, 512), Recurrence(256, 64, 256), Recurrence(512, 1, 650))
"""At the first size, matmuls take most of the time; at the second, the elementwise operations of the gates; at the
third, reading the weights. The third width is that of the medium LSTM of Zaremba et al. 2014."""
NUM_GATES = {"lstm": 4, "gru": 3, "gru-before": 3}
"""Number of gates of each layer, including the candidate. ``gru`` applies the reset gate after the product of the state
and its weights, as torch does; ``gru-before`` applies it before this product (Cho et al. 2014)."""

QUICK_RECURRENCES = (Recurrence(6, 2, 8),)


@dataclasses.dataclass(frozen=True)
class Attention:
    """The sizes of causal attention in one row, or of one query over a key-value cache."""

    variant: str
    """plain, bias, relative or decode."""
    length: int
    """Tokens; for decode: filled slots of the cache."""
    capacity: int
    """For decode: all slots of the cache. Not used by the other variants."""
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
    """Random arrays, float32: ``query`` and ``dout`` [1, T, H, K], ``key`` and ``value`` [1, S, H, K], and ``table``.

    T is the number of queries, and S the number of keys. ``dout`` is the gradient of the output. ``table`` has one bias
    for each bucket of T5, [32, H] (variant ``bias``), or one vector for each distance, [S, H, K] (variant
    ``relative``). The other variants have no table.
    """
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
    """The work of one repetition, from which its FLOP/s or bytes per second are computed.

    Attributes:
        tokens: number of tokens that a repetition reads or generates.
        amount: amount of work in ``unit``.
        unit: "FLOP" (the peak is that of a matrix product), "B" for bytes that are read and written (the peak is that
            of a copy), or "B read" for bytes that are only read (the peak is that of a read). Result files contain
            these strings.
        formula: text that explains ``amount``.
        flops: FLOPs. None: not counted.
        bytes: bytes, if each input is read once and each result is written once. None: not counted.
    """

    tokens: int
    amount: float
    unit: str
    formula: str
    flops: float | None = None
    bytes: float | None = None


def training_work(pass_name: str, model: dict[str, Any]) -> Work:
    """FLOPs of an optimizer step, or of the loss. The loss has one third of the FLOPs of a step.

    Args:
        pass_name: "forward" (loss) or "step".
        model: the result of ``baselines.Machine.facts``.
    """
    tokens = model["batch"] * model["length"]
    if pass_name == "forward":
        return Work(tokens, model["training_flops"] / 3, "FLOP", f"({model['formula']}) / 3")
    return Work(tokens, model["training_flops"], "FLOP", model["formula"])


def decoding_work(batch: int, tokens: int, model: dict[str, Any]) -> Work:
    """Bytes that decoding must read: the parameters of all matmuls, once for each new token of a row.

    All rows share one read. The cache and the prompt are not counted.

    Args:
        tokens: new tokens per row.
        model: the result of ``baselines.Machine.facts``.
    """
    formula = "bytes of the parameters of matmuls (without encoder) * new tokens per row; the time includes the prompt"
    return Work(batch * tokens, model["weight_bytes_per_step"] * tokens, "B read", formula)


STATE_PRODUCTS = {"linear_attention": 2, "gated_delta_rule": 3, "generalized_delta_rule": 4, "mlstm": 2}
"""Number of operations with the state [K, V] in each step: products with a vector, and additions of outer products."""


def scan_work(shape: Scan, backward: bool) -> Work:
    """The work of an operation: bytes that must be read and written, or FLOPs for the keys of :data:`STATE_PRODUCTS`.

    Args:
        backward: whether to count the backward pass too.
    """
    sizes = dict(shape.sizes)
    tokens = sizes["B"] * sizes["T"]
    inputs, output = _scan_elements(shape.op, sizes)
    num_bytes = 4 * tokens * (inputs + output + (2 * inputs + output if backward else 0))
    if shape.op in STATE_PRODUCTS:
        factor = 2 * STATE_PRODUCTS[shape.op]
        flops = factor * tokens * sizes["H"] * sizes["K"] ** 2 * (3 if backward else 1)
        formula = (
            f"{factor}*B*T*H*K*V for the forward pass of the sequential recurrence (V = K), 3 times that with backward"
        )
        return Work(tokens, flops, "FLOP", formula, flops, num_bytes)
    if shape.op == "linear_scan":
        flops = (5 if backward else 2) * tokens * sizes["D"]
        formula = "3*B*T*D*4 bytes forward (decay, input, state), 5 more backward (decay, state, three gradients)"
    else:
        flops = (3 if backward else 1) * 2 * tokens * sizes["C"] * sizes["taps"]
        formula = "2*B*T*C*4 bytes forward (input, output), 3 more backward (input, gradients of output and input)"
    return Work(tokens, num_bytes, "B", formula, flops, num_bytes)


def _scan_elements(op: str, sizes: dict[str, int]) -> tuple[int, int]:
    """The number of elements per token of the inputs, and of the output. The weight of a convolution does not count."""
    if op == "linear_scan":
        return 2 * sizes["D"], sizes["D"]
    if op == "depthwise_convolution":
        return sizes["C"], sizes["C"]
    H, width = sizes["H"], sizes["H"] * sizes["K"]
    if op == "generalized_delta_rule":
        return 6 * width, width
    return 3 * width + H * (sizes["decays"] if op == "linear_attention" else 2), width


def attention_work(shape: Attention, pass_name: str) -> Work:
    """FLOPs of the causal half of attention without the bias; for decode, the bytes of the filled slots of the cache.

    Args:
        pass_name: "forward" or "both" (forward and backward).
    """
    H, K = shape.heads, shape.width
    if shape.variant == "decode":
        formula = "bytes of the cached keys and values; the peak is the bandwidth of a copy"
        num_bytes = 2 * 4 * H * K * shape.length
        return Work(1, num_bytes, "B", formula, 4.0 * H * K * shape.length, num_bytes)
    flops = 2.0 * shape.length**2 * H * K * (1 if pass_name == "forward" else 3.5)
    # Forward: query, key, value, output; backward: these, and four gradients.
    num_bytes = 4 * shape.length * H * K * (4 if pass_name == "forward" else 12)
    formula = "2*T*T*H*K forward, 3.5 times that with backward; the peak is the FLOP/s of a GEMM"
    return Work(shape.length, flops, "FLOP", formula, flops, num_bytes)


def random_tokens(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Random ids [batch, length], int32, equal in every process."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length)).astype(np.int32)


def zipf_tokens(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Random ids [batch, length], int32, equal in every process, with the frequencies of words (Mandelbrot 1953).

    The frequency of id i is proportional to 1 / (i + 2.7). Use these ids for an adaptive softmax, whose FLOPs depend on
    the frequencies.
    """
    frequency = 1.0 / (np.arange(vocab_size) + 2.7)
    rng = np.random.default_rng(0)
    return rng.choice(vocab_size, (batch, length), p=frequency / frequency.sum()).astype(np.int32)


def recurrence_work(shape: Recurrence, layer: str, pass_name: str) -> Work:
    """FLOPs of the matrix products of one layer.

    Args:
        layer: a key of :data:`NUM_GATES`.
        pass_name: "forward" or "both" (forward and backward).
    """
    tokens, H, gates = shape.length * shape.batch, shape.width, NUM_GATES[layer]
    flops = 2 * gates * 2 * H**2 * tokens
    if pass_name == "forward":  # reads the input and the weights, writes the output
        num_bytes = 4 * (2 * tokens * H + 2 * gates * H**2)
        return Work(tokens, flops, "FLOP", "2*G*H*(D+H)*tokens, D = H: products of G gates", flops, num_bytes)
    # Backward: input, output and weights again, the gradients of input and output, and those of the weights.
    num_bytes = 4 * (6 * tokens * H + 3 * 2 * gates * H**2)
    formula = "6*G*H*(D+H)*tokens, D = H: products of G gates, three times"
    return Work(tokens, 3 * flops, "FLOP", formula, 3 * flops, num_bytes)


def work_of(program: str, op: str, shape: str) -> Work:
    """The work of a row of a result file, from its texts ``op`` and ``shape``.

    Args:
        program: attention, recurrence or scans.
    """
    sizes = {name: int(size) for name, size in re.findall(r"([A-Za-z]+)=?(\d+)", shape)}
    name, _, passes = op.replace(",", "").partition(" ")
    if program == "attention":
        return attention_work(Attention(name, sizes["T"], sizes["T"], sizes["H"], sizes["K"]), passes)
    if program == "recurrence":
        return recurrence_work(Recurrence(sizes["T"], sizes["B"], sizes["H"]), name, passes)
    return scan_work(Scan(name, tuple(sizes.items())), "backward" in passes)


def recurrence_arrays(shape: Recurrence, layer: str) -> dict[str, np.ndarray]:
    """Random parameters in jaxlm's layout, ``input`` [B, T, H], and ``doutput`` [B, T, H], the gradient of the output.

    The arrays are float32 and equal in every process. H is the width of input and state.
    """
    rng, gates, H = np.random.default_rng(0), NUM_GATES[layer], shape.width
    shapes = {"weight_input": (H, gates, H), "weight_hidden": (H, gates, H), "bias": (gates, H), "bias_hidden": (H,)}
    arrays = {name: rng.uniform(-(H**-0.5), H**-0.5, size) for name, size in shapes.items()}
    arrays |= {name: rng.standard_normal((shape.batch, shape.length, H)) for name in ("input", "doutput")}
    if layer != "gru":
        del arrays["bias_hidden"]
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def samples(size: int) -> np.ndarray:
    """64 random indices into a flat array of ``size`` elements, equal in every process."""
    return np.random.default_rng(1).integers(0, size, 64)
