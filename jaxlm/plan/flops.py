"""Model FLOPs: the floating-point operations that a step of the model needs, independent of how it is compiled.

MFU (Chowdhery et al. 2022, appendix B) is computed from model FLOPs. Operations that remat or a kernel recomputes are
not counted.

Symbols: N parameters used in matmuls, L layers, D total width of all heads, T tokens per row, P parameters that are
used once per row.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jax_core

from jaxlm import spec
from jaxlm.devices import LANES
from jaxlm.models import Model, llama
from jaxlm.objectives.batch import Batch, Loss

FAMILIES_WITH_FORMULA = ("gpt", "llama", "bert", "roberta")
"""Families whose FLOPs have a closed formula, because they consist of attention and matmuls only."""
_LOOKED_UP_EMBEDDINGS = ("position_embedding", "token_type_embedding", "source_embedding")
_TOKEN_TABLES = re.compile(r"token_embedding|tails/[^/]+/embedding")
"""Paths of the tables of token embeddings. ``transformer_xl`` may have more tables for rare tokens (``tails``)."""
_ONCE_PER_SOURCE = re.compile(r"^encoder/|cross_attention/(key|value)/|^alignment/key")
"""Paths of parameters that an encoder-decoder uses once for each source, before the first decoding step."""
_ONCE_PER_ROW = re.compile(r"^(pooler|classifier_dense|classifier|next_sentence)/")
"""Paths of parameters that are multiplied only by the pooled output of a row, not by each token."""


@dataclasses.dataclass(frozen=True)
class Flops:
    """A number of FLOPs, and how they are counted.

    Attributes:
        amount: the number of FLOPs, summed over all devices.
        formula: a text that describes the count.
    """

    amount: float
    formula: str


def training_flops(model: Model, batch: int, sequence: int) -> Flops | None:
    """FLOPs of a training step with ``batch`` rows of ``sequence`` tokens, by the closed formula of the family.

    None: the family has no closed formula (:data:`FAMILIES_WITH_FORMULA`).
    """
    if model.family not in FAMILIES_WITH_FORMULA:
        return None
    leaves = matmul_specs(model, decoding=False)
    row_weights = sum(leaf.size for name, leaf in leaves.items() if _ONCE_PER_ROW.search(name))
    weights = active_matmul_parameters(model) - row_weights
    causal = model.family in ("gpt", "llama")
    tokens, cfg = batch * sequence, model.config
    (layer, *_) = spec.unstack(model.specs)["layers"]
    width = math.prod(layer["attention"]["output"]["weight"].shape[:2])
    attention = 12 * cfg.num_layers * width * sequence * tokens / (2 if causal else 1)
    attention_text = "6*L*D*T*tokens (causal half of attention)" if causal else "12*L*D*T*tokens (attention)"
    if getattr(cfg, "window", None) is not None:
        keys_of_layers = [
            _mean_keys(min(cfg.window, sequence) if kind == "window" else sequence, sequence)
            for kind in llama.layer_kinds(cfg)
        ]
        attention = 12 * width * tokens * sum(keys_of_layers)
        attention_text = "12*D*tokens*(mean number of visible keys, summed over the layers)"
    row_text, row_count = (" + 6*P*rows", f", P = {row_weights:,} after the pooling") if row_weights else ("", "")
    return Flops(
        6.0 * weights * tokens + attention + 6.0 * row_weights * batch,
        f"6*N*tokens{row_text} + {attention_text}, N = {weights:,} {_weights_text(model)}{row_count}; "
        "recomputation is not counted",
    )


def _mean_keys(window: int, sequence: int) -> float:
    """The approximate mean number of keys to which a query of a causal layer with this window attends."""
    return window * (1 - window / (2 * sequence))


def decoding_flops(model: Model, batch: int) -> Flops:
    """FLOPs of one new token in each of ``batch`` rows: two per parameter that a token uses in matmuls.

    Attention to earlier tokens and the update of a recurrent state are not counted.
    """
    weights = active_matmul_parameters(model, decoding=True)
    return Flops(
        2.0 * weights * batch,
        f"2*N*rows, N = {weights:,} {_weights_text(model, decoding=True)}; attention to the cache is not counted",
    )


def _weights_text(model: Model, *, decoding: bool = False) -> str:
    """A text that describes N, the number from :func:`active_matmul_parameters`."""
    if active_fraction_of_experts(model) == 1.0:
        return "parameters in matmuls"
    return f"active of {matmul_parameters(model, decoding=decoding):,} parameters in matmuls"


def matmul_parameters(model: Model, *, decoding: bool = False) -> int:
    """The number of all parameters except embedding tables that are only looked up.

    A table of token embeddings counts only if it is also the output head. Biases and norms also count; they are few.

    Args:
        decoding: whether to count only the parameters that each decoding step uses. The encoder, and the key and value
            projections of the source, then do not count.
    """
    return sum(leaf.size for leaf in matmul_specs(model, decoding=decoding).values())


def matmul_specs(model: Model, *, decoding: bool, specs: Any = None) -> dict[str, spec.ArraySpec]:
    """The specs of the parameters that :func:`matmul_parameters` counts, by path.

    Args:
        specs: the specs of all parameters; None: ``model.specs``.
    """
    leaves, looked_up = spec.flatten(model.specs if specs is None else specs), set(_LOOKED_UP_EMBEDDINGS)
    tied = getattr(model.config, "tie_embeddings", "head" not in model.specs)
    if not tied or model.task not in ("causal", "masked", "permutation", "seq2seq"):
        looked_up |= {name for name in leaves if _TOKEN_TABLES.fullmatch(name)}
    return {
        name: leaf
        for name, leaf in leaves.items()
        if name not in looked_up and not (decoding and model.reads_source and _ONCE_PER_SOURCE.search(name))
    }


def active_matmul_parameters(model: Model, *, decoding: bool = False) -> int:
    """The number from :func:`matmul_parameters`, with only as many experts of each layer as one token selects."""
    leaves = matmul_specs(model, decoding=decoding).values()
    experts = sum(leaf.size for leaf in leaves if spec.EXPERT in leaf.axes)
    return sum(leaf.size for leaf in leaves) - experts + round(experts * active_fraction_of_experts(model))


def active_fraction_of_experts(model: Model) -> float:
    """The fraction of the experts of a layer that a token selects; 1 for a model without experts."""
    num_experts = getattr(model.config, "num_experts", None)
    return model.config.experts_per_token / num_experts if num_experts else 1.0


def counted_training_flops(model: Model, loss: Loss, batch: Batch, state: Any = None) -> Flops:
    """FLOPs of a training step: three times the FLOPs of its loss, which are counted in the jaxpr of the loss.

    The factor is 3 because the backward pass has two products for each product of the forward pass. The jaxpr of the
    backward pass is not used, because it contains recomputation, such as that in a chunked scan. For the same reason,
    the model of the loss is :func:`without_recomputation`.

    Args:
        batch: a batch of arrays or of ``jax.ShapeDtypeStruct``.
        state: the model state that is carried from batch to batch, or None.
    """
    model = without_recomputation(model)

    def run(params: Any, batch: Batch, state: Any) -> Any:
        return loss(model, params, batch, state=state)

    # The loss is traced for a CPU, because the kernels for TPUs also compute padding.
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        device = None
    with jax.default_device(device):
        forward = counted_flops(run, spec.abstract(model.specs), batch, state)
    return Flops(3 * forward.amount, "3 * dots and convolutions of the loss (causal attention is not halved)")


def without_recomputation(model: Model) -> Model:
    """The same model with settings for which its jaxpr contains no recomputation of layers or of attention scores.

    Remat is off, and the implementation of attention is ``reference``. The implementation of experts is ``ragged_dot``,
    in which each expert processes only the tokens that selected it. This is not possible for a model with a
    ``capacity_factor``. There, each expert processes all its slots, including empty ones.
    """
    if model.has_experts and model.config.capacity_factor is None:
        model = model.with_known_fields(experts_implementation="ragged_dot")
    return model.with_known_fields(remat="none", attention_implementation="reference")


def counted_flops(function: Any, *arguments: Any) -> Flops:
    """FLOPs of all dots, ragged dots and convolutions in the jaxpr of ``function``.

    A multiplication with an addition counts as 2 FLOPs. The body of a ``scan`` counts once per iteration, and the body
    of a ``while`` once. A conditional counts as its most expensive branch. The body of a Pallas kernel counts once per
    grid step, and the body of a ``shard_map`` once per device. Elementwise operations are not counted.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments)
    return Flops(_count(jaxpr.jaxpr), "dots and convolutions in the jaxpr (causal attention is not halved)")


def _count(jaxpr: Any) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "ragged_dot_general":
        # Each row of the left array is multiplied by one of the matrices of the right array. If the ragged axis is
        # contracted, each group of rows is multiplied separately, so each entry of the left array is used once for each
        # column of the output.
        (contracted, _), _ = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        lhs, output = equation.invars[0].aval, equation.outvars[0].aval
        if params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions[0] in contracted:
            return 2.0 * lhs.size * output.shape[-1]
        return 2.0 * output.size * math.prod(lhs.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        return 2.0 * equation.outvars[0].aval.size * kernel.size / kernel.shape[params["dimension_numbers"].rhs_spec[0]]
    inner = [_count(jaxpr) for jaxpr in _inner_jaxprs(params)]
    if name == "cond":
        return max(inner, default=0.0)
    repetitions = 1
    if name == "scan":
        repetitions = params["length"]
    elif name == "shard_map":
        repetitions = params["mesh"].size
    elif name == "pallas_call":
        repetitions = math.prod(params["grid_mapping"].grid)
    return repetitions * sum(inner)


def _inner_jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs in the parameters of an equation, such as the body of a ``scan``."""
    kinds = (jax_core.ClosedJaxpr, jax_core.Jaxpr)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, kinds))
    jaxprs = [leaf for leaf in leaves if isinstance(leaf, kinds)]
    return [jaxpr.jaxpr if isinstance(jaxpr, jax_core.ClosedJaxpr) else jaxpr for jaxpr in jaxprs]


Kernel = tuple[str, tuple[tuple[int, ...], ...]]
"""The name of a Pallas kernel and the shapes of its results, because kernels of one name can have different shapes."""


RAGGED_DOT, RAGGED_DOT_METADATA = "ragged-dot-none", "ragged-dot-metadata"
"""Names of the two kernels that libtpu makes from ``jax.lax.ragged_dot``."""


class KernelCall(NamedTuple):
    """A call of a Pallas kernel or of :data:`RAGGED_DOT`.

    Attributes:
        grid: number of grid steps; None: unknown.
        bytes: estimate of the bytes that are copied between HBM and VMEM. For each array, this is the sum of the blocks
            of all grid steps, but at most the size of the array, because a block that consecutive steps share is copied
            once. The number is too small if a block is copied again after other blocks. It is too large if steps share
            blocks and do not read the whole array.
        flops: FLOPs of the dots of all grid steps (:func:`counted_flops`).
    """

    grid: int | None
    bytes: int
    flops: float


def _padded_size(shape: Sequence[int]) -> int:
    """The number of entries of an array in HBM, where a TPU pads the last axis to a multiple of ``LANES``."""
    return math.prod(shape[:-1]) * (-(-shape[-1] // LANES) * LANES) if shape else 1


def _ragged_dot_bytes(equation: Any) -> int:
    """The smallest number of bytes that a ragged dot copies between HBM and VMEM."""
    rows, matrices, sizes, output = (variable.aval for variable in (*equation.invars, *equation.outvars))
    # A group without rows does not need its matrix.
    num_matrices = min(matrices.shape[0], rows.shape[0]) if matrices.ndim == 3 else matrices.shape[0]
    shapes = rows.shape, (num_matrices, *matrices.shape[1:]), sizes.shape, output.shape
    arrays = zip(shapes, (rows, matrices, sizes, output), strict=True)
    return sum(_padded_size(shape) * array.dtype.itemsize for shape, array in arrays)


def kernel_calls(jaxpr: Any) -> dict[Kernel, set[KernelCall]]:
    """The calls of the Pallas kernels and ragged dots in a jaxpr.

    Each value is a set, because several kernels can have the same name and the same shapes of the results.
    """
    calls: dict[Kernel, set[KernelCall]] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            kernel = equation.params["name"], tuple(result.aval.shape for result in equation.outvars)
            mapping = equation.params["grid_mapping"]
            steps, size = math.prod(mapping.grid), 0
            for block in mapping.block_mappings:
                entries = min(
                    steps * _padded_size(block.transformed_block_aval.shape), _padded_size(block.array_aval.shape)
                )
                size += entries * block.array_aval.dtype.itemsize
            calls.setdefault(kernel, set()).add(KernelCall(steps, size, _count_equation(equation)))
        if equation.primitive.name == "ragged_dot_general":
            output = equation.outvars[0].aval.shape
            call = KernelCall(None, _ragged_dot_bytes(equation), _count_equation(equation))
            calls.setdefault((RAGGED_DOT, (output,)), set()).add(call)
        for inner in _inner_jaxprs(equation.params):
            for kernel, inner_calls in kernel_calls(inner).items():
                calls.setdefault(kernel, set()).update(inner_calls)
    return calls
