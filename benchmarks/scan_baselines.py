"""The implementations that ``benchmarks.scans`` compares: single operations with the same random inputs.

Shapes: B batch, T time, D channels of a scan, H heads, K head width, C channels of a convolution.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from benchmarks.baselines import JaxImplementation, TorchImplementation, jax_exact, torch_device, torch_wait
from benchmarks.worker import Implementation

MIN_SAMPLES = 4096
"""Minimum number of elements of each result that are compared. If a result has fewer elements, all are compared."""


def inputs_of(op: str, sizes: dict[str, int]) -> tuple[list[np.ndarray], np.ndarray]:
    """The random inputs of an operation, and the gradient of its output.

    linear_scan              decay and input [B, T, D]
    linear_attention         query, key and value [B, T, H, K], log decay [B, T, H] (``decays`` = 1) or [B, T, H, K]
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
        return [1.0 / (1.0 + np.exp(-normal(*shape))), normal(*shape)], normal(*shape)
    if op == "linear_attention":
        shape_BTHK, decays = (B, T, sizes["H"], sizes["K"]), sizes["decays"]
        log_decay = -0.1 * np.exp(normal(*(shape_BTHK[:3] if decays == 1 else shape_BTHK)))
        return [normal(*shape_BTHK), normal(*shape_BTHK), normal(*shape_BTHK), log_decay], normal(*shape_BTHK)
    assert op == "depthwise_convolution", op
    return [normal(sizes["taps"], sizes["C"]), normal(B, T, sizes["C"])], normal(B, T, sizes["C"])


def sample(result: np.ndarray) -> list[float]:
    """Evenly spaced elements of a result."""
    flat = result.ravel()
    return flat[:: max(1, flat.size // MIN_SAMPLES)].astype(float).tolist()


class ScanImplementation(Implementation):
    """Base class. Samples of the results of the first repetition are compared.

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
            # the gradient of the input (linear_scan, depthwise_convolution) or of the query (linear_attention) is
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
        from jaxlm.nn.convolution import depthwise_convolution
        from jaxlm.nn.scan import linear_attention, linear_scan

        if self.op == "linear_scan":
            return linear_scan(*inputs, implementation=self.implementation)[0]
        if self.op == "linear_attention":
            return linear_attention(*inputs, implementation=self.implementation)[0]
        weight, x = inputs
        return depthwise_convolution({"weight": weight}, x, padding="causal", implementation=self.implementation)

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


class Torch(ScanImplementation, TorchImplementation):
    """``depthwise_convolution`` with ``torch.nn.functional.conv1d``: one group per channel, axes [B, C, T]."""

    def __init__(self, directory: str, op: str, sizes: dict[str, int], backward: bool) -> None:
        import torch

        (weight, x), dout = inputs_of(op, sizes)
        device = torch_device()

        def tensor(array: np.ndarray) -> Any:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.weight = tensor(weight.T[:, None]).requires_grad_(backward)
        self.x = tensor(np.swapaxes(x, 1, 2)).requires_grad_(backward)
        self.dout, self.backward = tensor(np.swapaxes(dout, 1, 2)), backward

    def run(self) -> list[Any]:
        import torch

        taps = self.weight.shape[-1]
        y = torch.nn.functional.conv1d(self.x, self.weight, padding=taps - 1, groups=len(self.weight))
        y = y[:, :, : self.x.shape[-1]]
        gradients = torch.autograd.grad(y, (self.weight, self.x), self.dout) if self.backward else ()
        torch_wait()
        return [*gradients, y]

    def to_numpy(self, array: Any) -> np.ndarray:
        x = array.detach().cpu().numpy()
        return x[:, 0].T if x.shape == self.weight.shape else np.swapaxes(x, 1, 2)
