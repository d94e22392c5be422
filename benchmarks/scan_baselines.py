"""The implementations that ``benchmarks.scans`` compares: single operations with the same random inputs.

Shapes: B batch, T time, D channels of a scan, H heads, K head width, C channels of a convolution.
"""

from __future__ import annotations

import abc
import importlib.util
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.baselines import JaxImplementation, TorchImplementation, jax_exact, torch_device, torch_wait
from benchmarks.worker import Implementation

MIN_LOG_DECAY = -math.exp(-0.5)
"""The smallest log decay of RWKV-7."""
MIN_SAMPLES = 4096
"""Minimum number of elements of each result that are compared. If a result has fewer elements, all are compared."""


def inputs_of(op: str, sizes: dict[str, int]) -> tuple[list[np.ndarray], np.ndarray]:
    """The random inputs of an operation, and the gradient of its output.

    linear_scan              decay and input [B, T, D]
    linear_attention         query, key and value [B, T, H, K], log decay [B, T, H] (``decays`` = 1) or [B, T, H, K]
    gated_delta_rule         query, normalized key, value [B, T, H, K], log decay and beta [B, T, H]
    generalized_delta_rule   query, key, value, log decay, a and b [B, T, H, K], as in RWKV-7
    mlstm                    query, key, value [B, T, H, K], pre-activations of input and forget gate [B, T, H]
    depthwise_convolution    weight [taps, C], input [B, T, C]

    Args:
        sizes: size of each axis by name, as in ``shapes.Scan``.
    """
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32)

    B, T = sizes["B"], sizes["T"]
    if op == "linear_scan":
        shape = (B, T, sizes["D"])
        return [_sigmoid(normal(*shape)), normal(*shape)], normal(*shape)
    if op == "linear_attention":
        shape_BTHK, decays = (B, T, sizes["H"], sizes["K"]), sizes["decays"]
        log_decay = -0.1 * np.exp(normal(*(shape_BTHK[:3] if decays == 1 else shape_BTHK)))
        return [normal(*shape_BTHK), normal(*shape_BTHK), normal(*shape_BTHK), log_decay], normal(*shape_BTHK)
    if op != "depthwise_convolution":
        shape_BTHK = B, T, sizes["H"], sizes["K"]
        query, key, value, dout = (normal(*shape_BTHK) for _ in range(4))
        if op == "mlstm":
            return [query, key, value, normal(*shape_BTHK[:3]), 3.0 + normal(*shape_BTHK[:3])], dout
        key /= np.linalg.norm(key, axis=-1, keepdims=True)
        if op == "gated_delta_rule":
            log_decay, beta = -0.1 * np.exp(normal(*shape_BTHK[:3])), _sigmoid(normal(*shape_BTHK[:3]))
            return [query, key, value, log_decay, beta], dout
        assert op == "generalized_delta_rule", op
        log_decay, rate = MIN_LOG_DECAY * _sigmoid(normal(*shape_BTHK)), _sigmoid(normal(*shape_BTHK))
        return [query, key, value, log_decay, -key, rate * key], dout
    return [normal(sizes["taps"], sizes["C"]), normal(B, T, sizes["C"])], normal(B, T, sizes["C"])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def sample(result: np.ndarray) -> list[float]:
    """Evenly spaced elements of a result."""
    flat = result.ravel()
    return flat[:: max(1, flat.size // MIN_SAMPLES)].astype(float).tolist()


class ScanImplementation(Implementation):
    """Base class of the implementations of one operation. Samples of the results of the first repetition are compared.

    The harness passes the argument ``directory`` to every implementation. These classes do not use it.
    """

    is_first_run = True

    @abc.abstractmethod
    def run(self) -> list[Any]:
        """Run one repetition, wait until it has ended, and return a list: the gradient of each input (only if the
        backward pass is measured), then the output."""

    def to_numpy(self, array: Any) -> np.ndarray:
        """An array in jaxlm's layout of axes."""
        return np.asarray(array)

    def read(self, result: list[Any]) -> dict[str, list[float]] | None:
        """Samples of the first repetition; None for later repetitions."""
        if not self.is_first_run:
            return None
        self.is_first_run = False
        return {f"result {number}": sample(self.to_numpy(array)) for number, array in enumerate(result)}


class Jaxlm(ScanImplementation, JaxImplementation):
    """The implementation of the operation that jaxlm chooses by default."""

    implementation: Any = None

    def __init__(self, directory: str, op: str, sizes: dict[str, int], backward: bool) -> None:
        jax = jax_exact()
        self.op, forward = op, self.forward

        def forward_and_backward(*arguments: Any) -> Any:
            # JAX assigns the donated buffers, in the order of the arguments, to the first results of the same shape. So
            # the gradient of the input (linear_scan, depthwise_convolution) or of the query (other operations) is
            # written to the buffer of ``dout``. In a model, XLA can also reuse this buffer, because nothing else needs
            # ``dout``. The gradients of the convolution do not need its output. If the function did not return the
            # output, XLA would remove the forward pass of the convolution.
            output, vjp = jax.vjp(forward, *arguments[:-1])
            return [*vjp(arguments[-1]), output]

        inputs, dout = inputs_of(op, sizes)
        self.inputs, self.dout = jax.device_put(inputs), jax.device_put(dout)
        self.donated = [1] if op == "linear_scan" else []
        self.backward = backward
        if backward:
            self.compiled = jax.jit(forward_and_backward, donate_argnums=[*self.donated, len(inputs)], keep_unused=True)
        else:
            self.compiled = jax.jit(lambda *inputs: [forward(*inputs)], donate_argnums=self.donated)
        self.copy = jax.jit(lambda x: x + 0.0)
        self.arguments: list[Any] = []

    def forward(self, *inputs: Any) -> Any:
        """The output of the operation."""
        from jax.nn import log_sigmoid

        from jaxlm.nn import scan
        from jaxlm.nn.convolution import depthwise_convolution

        options = {"implementation": self.implementation}
        if self.op == "depthwise_convolution":
            weight, x = inputs
            return depthwise_convolution({"weight": weight}, x, padding="causal", **options)
        if self.op in ("gated_delta_rule", "mlstm"):  # transformers multiplies the queries by this factor, too
            inputs = inputs[0] * inputs[0].shape[-1] ** -0.5, *inputs[1:]
        if self.op == "mlstm":
            query, key, value, log_input, forget = inputs
            return scan.mlstm(query, key, value, log_input, log_sigmoid(forget), **options)[0]
        if self.op == "generalized_delta_rule":
            query, key, value, log_decay, *low_rank = inputs
            return scan.generalized_delta_rule(
                query, key, value, log_decay, tuple(low_rank), min_log_decay=MIN_LOG_DECAY, **options
            )[0]
        return getattr(scan, self.op)(*inputs, **options)[0]

    def prepare(self) -> None:
        inputs = [self.copy(x) if index in self.donated else x for index, x in enumerate(self.inputs)]
        self.arguments = [*inputs, self.copy(self.dout)] if self.backward else inputs
        jax_exact().block_until_ready(self.arguments)

    def run(self) -> list[Any]:
        arguments, self.arguments = self.arguments, []
        return jax_exact().block_until_ready(self.compiled(*arguments))


class Reference(Jaxlm):
    """jaxlm's implementation ``reference``: ``lax.scan``, or ``lax.conv_general_dilated`` for the convolution."""

    implementation = "reference"


class AssociativeScan(Jaxlm):
    """``linear_scan`` with ``lax.associative_scan``."""

    def forward(self, *inputs: Any) -> Any:
        from jax import lax

        return lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), inputs, axis=1)[1]


class Jla(Jaxlm):
    """The implementation in plain JAX of the package ``jax-linear-attention`` (JLA), which it uses on a CPU.

    The number of steps of a chunk is JLA's default: 16 for ``generalized_delta_rule``, otherwise 64.
    """

    packages = ("jla", "equinox")
    extra = "jla"

    def forward(self, *inputs: Any) -> Any:
        import equinox
        import jax
        from jla.layers.conv import ShortConv
        from jla.ops import linear_attention

        if self.op == "depthwise_convolution":
            weight, x = inputs
            layer = ShortConv(x.shape[-1], len(weight), activation=False)
            return equinox.tree_at(lambda module: module.weight, layer, weight.T)(x)[0]
        query, key, value, *gates = inputs
        if self.op == "linear_attention":
            kind, options = "gla" if gates[0].ndim == 4 else "simple_gla", {"g": gates[0], "scale": 1.0}
        elif self.op == "gated_delta_rule":
            kind, options = "gated_deltanet", {"g": gates[0], "beta": gates[1]}
        elif self.op == "mlstm":
            kind, options = "mlstm", {"i": gates[0], "g": jax.nn.log_sigmoid(gates[1])}
        else:
            kind, options = "rwkv7", dict(zip("wab", gates, strict=True))
        return linear_attention(kind, query, key, value, impl="chunked", **options)[0]


class Torch(ScanImplementation, TorchImplementation):
    """The operation in torch.

    For ``depthwise_convolution``, it is ``torch.nn.functional.conv1d`` with one group per channel and axes [B, C, T].
    ``gated_delta_rule`` is the chunked function of Qwen3-Next in transformers. ``mlstm`` is that of xLSTM with a single
    chunk, because it is wrong for more chunks in transformers 4.57.
    """

    def __init__(self, directory: str, op: str, sizes: dict[str, int], backward: bool) -> None:
        import torch

        inputs, dout = inputs_of(op, sizes)
        self.op, self.backward, device = op, backward, torch_device()

        def tensor(array: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(self._swap_axes(array))).to(device)

        self.inputs, self.dout = [tensor(x).requires_grad_(backward) for x in inputs], tensor(dout)
        if op == "mlstm":
            from benchmarks.torch_models import xlstm_module

            self.mlstm = xlstm_module().mlstm_chunkwise_native_autograd

    def _swap_axes(self, array: np.ndarray) -> np.ndarray:
        """An array of jaxlm in the axes of torch, or the reverse."""
        if array.ndim == 2:  # the weight of the convolution, [taps, C]
            return array.T[:, None]
        if self.op == "depthwise_convolution" and array.shape[1] == 1:
            return array[:, 0].T
        return array if self.op == "gated_delta_rule" else np.swapaxes(array, 1, 2)

    def _forward(self) -> Any:
        import torch

        if self.op == "gated_delta_rule":
            from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

            return torch_chunk_gated_delta_rule(*self.inputs)[0]
        if self.op == "mlstm":
            return self.mlstm(*self.inputs, chunk_size=self.dout.shape[2])
        weight, x = self.inputs
        y = torch.nn.functional.conv1d(x, weight, padding=weight.shape[-1] - 1, groups=len(weight))
        return y[:, :, : x.shape[-1]]

    def run(self) -> list[Any]:
        import torch

        y = self._forward()
        gradients = torch.autograd.grad(y, self.inputs, self.dout) if self.backward else ()
        torch_wait()
        return [*gradients, y]

    def to_numpy(self, array: Any) -> np.ndarray:
        return self._swap_axes(array.detach().cpu().numpy())


class Fla(Torch):
    """The operation in fla's files ``naive.py``, which are plain torch, as ``forward`` and gradients of autograd.

    The forms with chunks are used, except for ``linear_attention`` with one decay per channel: fla has only a loop over
    steps. The files are run without an import of ``fla``, because that needs Triton.
    """

    packages = (*Torch.packages, "einops", "fla")

    def __init__(self, directory: str, op: str, sizes: dict[str, int], backward: bool) -> None:
        super().__init__(directory, op, sizes, backward)
        folders = {"gated_delta_rule": "gated_delta_rule", "generalized_delta_rule": "generalized_delta_rule/dplr"}
        self.is_per_channel = op == "linear_attention" and sizes["decays"] > 1
        folder = folders.get(op, "gla" if self.is_per_channel else "simple_gla")
        package = importlib.util.find_spec("fla")
        assert package is not None
        assert package.origin is not None
        self.functions = runpy.run_path(str(Path(package.origin).parent / "ops" / folder / "naive.py"))

    def _swap_axes(self, array: np.ndarray) -> np.ndarray:
        return np.swapaxes(array, 1, 2) if self.op == "generalized_delta_rule" else array

    def _forward(self) -> Any:
        query, *inputs = self.inputs
        width = query.shape[-1]
        if self.op == "gated_delta_rule":
            return self.functions["naive_chunk_gated_delta_rule"](*self.inputs)[0]
        if self.op == "generalized_delta_rule":  # fla's name of the log decay is gk; it divides queries by sqrt(K)
            key, value, log_decay, a, b = inputs
            chunk = math.gcd(query.shape[2], 32)  # 32 is fla's default
            arguments = query * width**0.5, key, value, a, b, log_decay
            return self.functions["dplr_chunkwise"](*arguments, chunk_size=chunk)[0]
        if self.is_per_channel:
            return self.functions["naive_recurrent_gla"](query * width**0.5, *inputs)[0]
        return self.functions["naive_chunk_simple_gla"](query, *inputs, scale=1.0)[0]
