"""What is measured: sizes, random tokens, optimizer settings, and how much work each size is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

GEMM_SIZE = 2048
"""Rows and columns of the matrices whose product is the roof of arithmetic."""
COPY_BYTES = 1 << 28
"""Bytes of the array whose copy is the roof of bandwidth."""
READ_ROWS = 1 << 13
READ_WIDTH = COPY_BYTES // 4 // READ_ROWS
"""The same array as a matrix, whose product with a vector is one way to read it."""
ADAMW: dict[str, Any] = {
    "learning_rate": 1e-5, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0,
}  # fmt: skip
"""Settings of every peer's optimizer; decay on matrices only."""


@dataclasses.dataclass(frozen=True)
class Training:
    """A model's loss, or its optimizer step."""

    model: str = "gpt2"
    """Models of the families gpt, llama, bert, t5, xlnet, lstm, resnet (VDCNN), separated by commas."""
    passes: str = "step"
    """forward (the loss alone), step (an optimizer step), or both with a comma between them."""
    batch: int | None = None
    """Rows; None takes what is usual for the family."""
    length: int | None = None
    """Tokens of each row; None takes what is usual for the family."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Greedy generation."""

    model: str = "gpt2"
    """Models of the families gpt, llama, t5, xlnet, lstm, separated by commas."""
    batch: str = "1"
    """Rows; several numbers with commas between them."""
    prompt: str = "32"
    """Tokens of each prompt (of T5's source); several numbers with commas between them."""
    tokens: int = 64
    """Tokens generated in each row."""


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Forward and backward, compared."""

    model: str = "gpt2"
    """A GPT-2 size: gpt2, gpt2-medium, gpt2-large, gpt2-xl or gpt2-tiny."""
    batch: int = 2
    """Rows; at least 2, so that both sides can be padded."""
    length: int = 128
    """Tokens of each row."""


@dataclasses.dataclass(frozen=True)
class Scan:
    """A recurrence or convolution over time, float32. ``sizes`` are named as the operation names its axes."""

    op: str
    sizes: tuple[tuple[str, int], ...]

    @property
    def shown(self) -> str:
        """The sizes as text."""
        return " ".join(f"{name}{'=' if len(name) > 1 else ''}{size}" for name, size in self.sizes)

    def quick(self) -> Scan:
        """The same, tiny."""
        small = {"B": 2, "T": 33, "D": 6, "C": 6, "H": 2, "K": 4}
        return Scan(self.op, tuple((name, small.get(name, size)) for name, size in self.sizes))


SCANS = (
    Scan("linear_scan", (("B", 8), ("T", 2048), ("D", 1024))),
    Scan("linear_scan", (("B", 1), ("T", 4096), ("D", 2048))),
    Scan("linear_attention", (("B", 2), ("T", 1024), ("H", 8), ("K", 64), ("decays", 1))),
    Scan("linear_attention", (("B", 2), ("T", 1024), ("H", 8), ("K", 64), ("decays", 64))),
    Scan("depthwise_convolution", (("B", 4), ("T", 1024), ("C", 512), ("taps", 4))),
)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """A recurrent layer over a whole batch; its input is as wide as its state."""

    length: int
    """Steps."""
    batch: int
    """Rows."""
    width: int
    """Of the hidden state."""

    def __str__(self) -> str:
        return f"T{self.length} B{self.batch} H{self.width}"


RECURRENCES = (Recurrence(128, 32, 512), Recurrence(256, 64, 256), Recurrence(512, 1, 650))
"""Whose products weigh, whose gates weigh, and whose steps each read all weights: Zaremba et al. 2014 for one text."""
GATES = {"lstm": 4, "gru": 3, "gru-before": 3}
"""Layers, with how many gates they have. ``gru`` resets after the product, as torch does."""

QUICK_RECURRENCES = (Recurrence(6, 2, 8),)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Causal attention of one row, or one query over a cache."""

    form: str
    """plain, bias, relative or decode."""
    length: int
    """Tokens; for decode, those that the cache holds."""
    slots: int
    """For decode: tokens that the cache has room for."""
    heads: int = 12
    """Heads."""
    width: int = 64
    """Of each."""

    @property
    def queries(self) -> int:
        """How many."""
        return 1 if self.form == "decode" else self.length

    @property
    def keys(self) -> int:
        """How many."""
        return self.slots if self.form == "decode" else self.length

    def __str__(self) -> str:
        cache = f" of {self.slots}" if self.form == "decode" else ""
        return f"B1 T{self.length}{cache} H{self.heads} K{self.width}"


ATTENTION_LENGTHS = (1024, 4096)


def attention_arrays(shape: Attention) -> dict[str, np.ndarray]:
    """query, key, value, the output's gradient and, where the form has one, the table of biases or vectors."""
    rng = np.random.default_rng(0)

    def draw(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes, np.float32)

    H, K = shape.heads, shape.width
    arrays = {name: draw(1, n, H, K) for name, n in (("query", shape.queries), ("dout", shape.queries))}
    arrays |= {name: draw(1, shape.keys, H, K) for name in ("key", "value")}
    tables = {"bias": (32, H), "relative": (shape.keys, H, K)}
    return arrays | ({"table": draw(*tables[shape.form])} if shape.form in tables else {})


QUICK_DECODING = Decoding(batch="2", prompt="8", tokens=16)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one repetition does: ``amount`` of ``unit``, by the formula named, on its way to ``tokens`` tokens."""

    tokens: int
    amount: float
    unit: str
    formula: str


def training_work(passes: str, model: dict[str, Any]) -> Work:
    """Floating-point operations of a loss, or of a step. ``model`` holds what ``peers.Machine`` reports."""
    tokens = model["batch"] * model["length"]
    if passes == "forward":
        return Work(tokens, model["training_flops"] / 3, "FLOP", f"({model['formula']}) / 3")
    return Work(tokens, model["training_flops"], "FLOP", model["formula"])


def decoding_work(batch: int, tokens: int, model: dict[str, Any]) -> Work:
    """Bytes that must be read: what each new token of a row is multiplied with, however many rows there are."""
    formula = "bytes of multiplied parameters (no encoder's) * tokens of a row; reading the prompt included in the time"
    return Work(batch * tokens, model["decoded_bytes"] * tokens, "B read", formula)


def scan_work(shape: Scan, backward: bool) -> Work:
    """What must be moved or computed, forward, or forward and backward."""
    sizes = dict(shape.sizes)
    tokens = sizes["B"] * sizes["T"]
    if shape.op == "linear_attention":
        amount = 4 * tokens * sizes["H"] * sizes["K"] ** 2
        return Work(
            tokens, amount * (3 if backward else 1), "FLOP", "4*B*T*H*K*V forward, as steps do it, 3x with backward"
        )
    if shape.op == "linear_scan":
        numbers, passes = tokens * sizes["D"], 8 if backward else 3
        formula = "3*B*T*D*4 bytes forward (decay, input, state), 5 more backward (decay, state, three gradients)"
    else:
        numbers, passes = tokens * sizes["C"], 6 if backward else 2
        formula = "2*B*T*C*4 bytes forward (input, output), 4 more backward (input, three gradients)"
    return Work(tokens, 4 * numbers * passes, "B", formula)


def attention_work(shape: Attention, passes: str) -> Work:
    """Floating-point operations of plain attention, whatever the form adds; for decode, the bytes of the cache."""
    H, K = shape.heads, shape.width
    if shape.form == "decode":
        return Work(1, 2 * 4 * H * K * shape.length, "B", "bytes of the keys and values held, against a copy")
    amount = 2.0 * shape.length**2 * H * K * (1 if passes == "forward" else 3.5)
    return Work(shape.length, amount, "FLOP", "2*T*T*H*K forward, 3.5 times that with backward, against a GEMM")


def random_tokens(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """The same ids [batch, length] in every process, int32."""
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length)).astype(np.int32)


def zipf_tokens(vocab_size: int, batch: int, length: int) -> np.ndarray:
    """Ids [batch, length] as frequent as words of their rank, int32: 1 / (rank + 2.7) (Mandelbrot 1953). For an
    adaptive softmax, the work of which depends on them."""
    frequency = 1.0 / (np.arange(vocab_size) + 2.7)
    rng = np.random.default_rng(0)
    return rng.choice(vocab_size, (batch, length), p=frequency / frequency.sum()).astype(np.int32)


def recurrence_work(shape: Recurrence, layer: str, passes: str) -> Work:
    """Floating-point operations of the products of one layer, forward or with all gradients."""
    tokens, forward = shape.length * shape.batch, 2 * GATES[layer] * 2 * shape.width**2
    if passes == "forward":
        return Work(tokens, forward * tokens, "FLOP", "2*G*H*(D+H)*tokens, D = H: products of G gates")
    return Work(tokens, 3 * forward * tokens, "FLOP", "6*G*H*(D+H)*tokens, D = H: products of G gates, three times")


def recurrence_arrays(shape: Recurrence, layer: str) -> dict[str, np.ndarray]:
    """The same parameters (in jaxlm's layout), input [B, T, D] and gradient of the output in every process, float32."""
    rng, gates, H = np.random.default_rng(0), GATES[layer], shape.width
    shapes = {"weight_input": (H, gates, H), "weight_hidden": (H, gates, H), "bias": (gates, H), "bias_hidden": (H,)}
    arrays = {name: rng.uniform(-(H**-0.5), H**-0.5, size) for name, size in shapes.items()}
    arrays |= {name: rng.standard_normal((shape.batch, shape.length, H)) for name in ("input", "doutput")}
    if layer != "gru":
        del arrays["bias_hidden"]
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def samples(size: int) -> np.ndarray:
    """Indices of some elements of a flat array, the same in every process."""
    return np.random.default_rng(1).integers(0, size, 64)
