"""Base classes and functions of the measured implementations, and ``Machine``, which measures the peak performance.

An implementation (``worker.Implementation``) is set up as the documentation of its framework recommends, in float32. It
imports only its own framework. The implementations in ``training_baselines`` and ``decoding_baselines`` read the
checkpoint that :class:`Machine` writes. The implementations of a layer or an operation create their inputs from the
same random seeds, so all of them have the same inputs.
"""

from __future__ import annotations

import abc
import functools
import math
import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks import complete_models, shapes
from benchmarks.shapes import COPY_BYTES, GEMM_SIZE, READ_ROWS, READ_WIDTH
from benchmarks.worker import Implementation

# The processes of all implementations share one GPU, so JAX must not preallocate most of the GPU memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def jax_exact() -> Any:
    """The module ``jax``. On accelerators, the matmul precision is float32, as in torch; the default is lower."""
    import jax

    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "float32")
    return jax


class JaxImplementation(Implementation):
    """Base class of implementations in JAX."""

    def facts(self) -> dict[str, Any]:
        return {"platform": jax_exact().default_backend()}


class Machine(Implementation):
    """Writes the checkpoint and the training batch of a model, and measures the peak performance of the machine.

    With JAX, it measures the FLOP/s of a matrix product, and the memory bandwidth of a copy and of a read. The copy is
    the in-place addition of a constant to an array. The read is a sum or a matrix-vector product, whichever is faster.
    The training batch is written only for the families in ``complete_models.DEFAULT_BATCH_SIZES``.

    Args:
        directory: directory of the checkpoint and the training batch.
        model: name of the model; None writes no files.
        quick: whether to use the tiny variant of the family, and a small batch.
        batch, length: rows and tokens per row of the training batch; None: the default (``complete_models.sizes``).
    """

    num_repetitions = 8

    def __init__(
        self,
        directory: str,
        model: str | None,
        quick: bool = False,
        batch: int | None = None,
        length: int | None = None,
    ) -> None:
        jax = jax_exact()
        import jax.numpy as jnp

        self.properties = {"device": jax.devices()[0].device_kind}
        if model is not None:
            self.properties |= self._write(directory, model, quick, batch, length)
        self.x = jax.random.normal(jax.random.key(2), (GEMM_SIZE, GEMM_SIZE))
        self.matmul = jax.jit(jnp.matmul)
        self.large_array = jnp.zeros(COPY_BYTES // 4, jnp.float32)
        self.add = jax.jit(lambda memory: memory + 1.0, donate_argnums=0)
        self.reads = (jax.jit(jnp.sum), jax.jit(lambda memory: memory.reshape(READ_ROWS, -1) @ jnp.ones(READ_WIDTH)))
        self.run()

    def _write(self, directory: str, name: str, quick: bool, batch: int | None, length: int | None) -> dict[str, Any]:
        jax = jax_exact()
        import jaxlm
        from jaxlm.objectives import objective
        from jaxlm.plan import flops

        model = complete_models.build(name, quick=quick)

        def add_noise(leaf: Any, key: Any) -> Any:
            # Noise makes biases different from 0 and scales different from 1. With the initial values, greedy decoding
            # repeats the last token.
            return leaf + 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

        leaves, tree = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        params = jax.tree.unflatten(tree, map(add_noise, leaves, keys))
        jaxlm.save_pretrained(directory, model, params)
        properties = {
            "family": model.family,
            "parameters": model.num_parameters,
            "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
            "weight_bytes_per_step": 4 * complete_models.num_decoding_parameters(model),
            "vocab_size": model.config.vocab_size,
        }
        if model.family in complete_models.DEFAULT_BATCH_SIZES:
            data = complete_models.example(model, *complete_models.sizes(model, quick, batch, length))
            complete_models.save(data, directory)
            flop_count = flops.training_flops(model, *data.tokens.shape) if data.target_positions is None else None
            loss = objective(model.task).loss
            flop_count = flop_count or flops.counted_training_flops(model, loss, data)
            properties |= {"batch": len(data.tokens), "length": data.tokens.shape[1]}
            properties |= {"training_flops": flop_count.amount, "formula": flop_count.formula}
        return properties

    def run(self) -> dict[str, float]:
        """The peaks: ``{unit: units per second}``, for the units of ``shapes.Work``."""
        return {
            "FLOP": 2 * GEMM_SIZE**3 / self._fastest(lambda: self.matmul(self.x, self.x)),
            "B": 2 * COPY_BYTES / self._fastest(self._copy),
            "B read": COPY_BYTES / min(self._fastest(functools.partial(read, self.large_array)) for read in self.reads),
        }

    def _copy(self) -> Any:
        self.large_array = self.add(self.large_array)
        return self.large_array

    def _fastest(self, function: Callable[[], Any]) -> float:
        """The seconds of the fastest of ``num_repetitions`` calls. The first call may compile the function."""
        seconds = []
        for _ in range(self.num_repetitions):
            start = time.perf_counter()
            jax_exact().block_until_ready(function())
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    def facts(self) -> dict[str, Any]:
        return self.properties


class Sampled(Implementation):
    """Base class of implementations whose repetition returns arrays by name. 64 elements of each array are compared."""

    def read(self, result: dict[str, Any]) -> dict[str, list[float]]:
        """The elements of each array at the flat indices ``shapes.samples``; only these are copied from the device."""
        import numpy as np

        def sample(x: Any) -> list[float]:
            return x[np.unravel_index(shapes.samples(math.prod(x.shape)), x.shape)].tolist()

        return {name: sample(x) for name, x in result.items()}


class JaxSampled(Sampled, JaxImplementation):
    """Base class of implementations that run one jitted function.

    A subclass sets ``jitted`` (the function) and ``arguments`` (its arguments). The first repetition compiles the
    function.
    """

    jitted: Any
    arguments: tuple[Any, ...]
    compiled: Any = None

    @abc.abstractmethod
    def name_results(self, results: Any) -> dict[str, Any]:
        """The arrays that the function returned, by name."""

    def run(self) -> dict[str, Any]:
        if self.compiled is None:
            self.compiled = self.jitted.lower(*self.arguments).compile()
        return self.name_results(jax_exact().block_until_ready(self.compiled(*self.arguments)))


def torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_wait() -> None:
    """Wait until all computations of torch have ended."""
    import torch

    if torch_device() == "cuda":
        torch.cuda.synchronize()


class TorchImplementation(Implementation):
    """Base class of implementations in torch."""

    packages: tuple[str, ...] = ("torch", "transformers")

    def facts(self) -> dict[str, Any]:
        import torch

        return {"platform": {"cuda": "gpu"}.get(torch_device(), "cpu"), "threads": torch.get_num_threads()}
