"""The training or decoding step that ``jaxlm.plan`` compiles. The step gets shapes, not arrays.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm import spec
from jaxlm.decoding.loop import loop_params, loop_state_specs
from jaxlm.decoding.prompts import check_sharding, read_tokens
from jaxlm.models import Model
from jaxlm.nn.embedding import argmax
from jaxlm.objectives import objective, span_corruption
from jaxlm.objectives.batch import Batch
from jaxlm.plan import flops as flops_lib
from jaxlm.sharding import Sharding
from jaxlm.spec import Params
from jaxlm.training.layouts import auto_formats
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.trainer import Trainer, carry_size_of


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted training or decoding step, and the shapes of its arguments.

    Attributes:
        function: the jitted step. ``function.lower(*arguments)`` lowers it.
        arguments: trees of ``jax.ShapeDtypeStruct`` with shardings.
        parts: the large arguments by name, for example ``parameters``. The plan reports the bytes of each part.
        flops: model FLOPs of the step, summed over all devices.
        tokens: tokens that the step reads (training) or generates (decoding).
        objective: a text that says what is trained or decoded, for example ``train, causal``.
    """

    function: Any
    arguments: tuple[Any, ...]
    parts: dict[str, Any]
    flops: flops_lib.Flops
    tokens: int
    objective: str


def device_bytes(tree: Any) -> int:
    """Bytes per device of a tree of ``jax.ShapeDtypeStruct`` with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def bytes_read_by_a_token(model: Model, params: Params) -> float:
    """A lower bound of the number of parameter bytes that each device reads to decode one token.

    The bound counts the parameters in ``flops.matmul_specs``. Of the experts, it counts only the fraction that one
    token selects.

    Args:
        params: ``jax.ShapeDtypeStruct`` with shardings, in the tree structure of ``loop_params(model, model.specs)``.
    """
    fraction, leaves = flops_lib.active_fraction_of_experts(model), spec.flatten(params)
    specs = flops_lib.matmul_specs(model, decoding=True, specs=loop_params(model, model.specs))
    return sum(
        device_bytes(leaves[name]) * (fraction if spec.EXPERT in leaf.axes else 1.0) for name, leaf in specs.items()
    )


def abstract_batch(model: Model, batch: int, sequence: int, sharding: Sharding) -> Batch:
    """Shapes of the batch that the model's objective (``jaxlm.objectives``) makes from texts of ``sequence`` tokens.

    The leaves are ``jax.ShapeDtypeStruct`` with shardings. For encoder-decoders, ``sequence`` is the length of the
    source, and span corruption determines the length of the target.

    Raises:
        ValueError: ``batch`` or the length of the target is not divisible by the number of shards of its axis, or the
            source is too short for span corruption.
    """
    task = model.task
    rows = sharding.named_sharding(("batch",), (batch,), "a batch")

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=rows)

    tokens = array(sequence)
    if task == "classification":
        return Batch(tokens, array(), array(dtype=jnp.float32))
    if task == "span_qa":
        return Batch(tokens, array(2), array(dtype=jnp.float32))
    if task == "permutation":
        num_predicted = max(1, sequence // 6)  # about one token in six: Yang et al. 2019 predict 85 of 512
        inputs = {"token_types": tokens, "order": tokens, "targets": array(num_predicted)}
        return Batch(tokens, array(num_predicted), array(num_predicted, dtype=jnp.float32), inputs=inputs)
    if model.reads_source:
        target = span_corruption.text_length(sequence)[1]
        sharding.named_sharding(("batch", "seq"), (batch, target), f"the target of a source of {sequence} tokens")
        source = {"source": tokens}
        return Batch(array(target), array(target), array(target, dtype=jnp.float32), inputs=source)
    reset = array(dtype=jnp.bool_) if model.carried_state_length is not None else None
    return Batch(tokens, tokens, array(sequence, dtype=jnp.float32), reset=reset)


def training_step(
    model: Model,
    sharding: Sharding,
    batch: int,
    sequence: int,
    *,
    optimizer: OptimizerConfig,
    grad_accum_steps: int = 1,
) -> Step:
    """The training step that ``jaxlm.training.loop.train`` runs. It donates its state, which ``sharding`` shards.

    Raises:
        ValueError: the size of an array axis is not divisible by the size of its mesh axes, no objective trains the
            task, or the model cannot read the batch.
    """
    task = model.task
    # The numbers of steps of the schedule do not change the plan. One warm-up step replaces all warm-up and hold steps,
    # because the schedule "inverse_square_root" needs at least one such step.
    has_warmup = optimizer.warmup_steps > 0 or optimizer.hold_steps > 0
    config = dataclasses.replace(optimizer, warmup_steps=int(has_warmup), hold_steps=0)
    transformation = make_optimizer(config, model.specs, steps=1000)
    carry_size = carry_size_of(model, batch)
    batch_shapes = abstract_batch(model, batch, sequence, sharding)
    trainer = Trainer(
        model, transformation, objective(task).loss, grad_accum_steps=grad_accum_steps, carry_size=carry_size,
        sharding=sharding,
    )  # fmt: skip
    state = trainer.abstract()
    flops = flops_lib.training_flops(model, batch, sequence)
    if flops is None:
        unsharded = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (batch_shapes, state.model_state))
        flops = flops_lib.counted_training_flops(model, trainer.loss, *unsharded)
    parts = {"parameters": state.params, "optimizer": state.optimizer, "batch": batch_shapes}
    if carry_size is not None:
        parts["carried state"] = state.model_state
    tokens = sum(math.prod(x.shape) for x in (batch_shapes.tokens, batch_shapes.inputs.get("source")) if x is not None)
    name = f"train, {task}" + (", with carried state" if carry_size is not None else "") + _layout_note(model)
    return Step(trainer.jit_step(), (state, batch_shapes), parts, flops, tokens, name)


def _layout_note(model: Model) -> str:
    return ", scanned layers" if getattr(model.config, "scan_layers", False) else ""


def decoding_step(
    model: Model,
    sharding: Sharding,
    batch: int,
    sequence: int,
    *,
    param_dtype: str = "float32",
) -> Step:
    """The step inside the loop of ``jaxlm.decoding.generate``. It generates one token per row by argmax.

    The cache, if the model has one, has ``sequence`` slots, including the slot of the new token. An encoder-decoder
    also has a source of ``sequence`` tokens.

    Raises:
        TypeError: the family has no state, so it cannot decode.
        ValueError: the size of an array axis is not divisible by the size of its mesh axes, the mesh splits the axis
            ``seq``, or ``sequence`` is longer than the model allows.
    """
    check_sharding(sharding)
    sizes = {"source_length": sequence} if model.reads_source else {}
    with sharding.scope():  # the layout of the state depends on the platform
        specs = loop_state_specs(model, model.state_specs(batch, sequence, **sizes), max_steps=sequence)
    dtype = jnp.dtype(param_dtype)

    def cast(leaf: spec.ArraySpec) -> spec.ArraySpec:
        return dataclasses.replace(leaf, dtype=dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    params = sharding.abstract(loop_params(model, jax.tree.map(cast, model.specs)))
    state = sharding.abstract(specs)
    rows = sharding.named_sharding(("batch",), (batch,), "a batch")
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)

    def step(params: Params, state: Any, tokens_B: jax.Array) -> tuple[Any, jax.Array]:
        with sharding.scope():
            state, logits_BV = read_tokens(model, params, state, tokens_B)
            return state, argmax(logits_BV[:, : model.config.vocab_size])

    slots = f", {sequence} cache slots" if model.has_cache else ""
    # The compiler also chooses the layouts of arrays in the loop of ``generate``, so it chooses them here.
    params_format, state_format = (
        auto_formats(tree, jax.tree.map(lambda x: x.sharding, tree)) for tree in (params, state)
    )
    function: Callable[..., Any] = jax.jit(
        step, donate_argnums=1, in_shardings=(params_format, state_format, rows), out_shardings=(state_format, rows)
    )
    return Step(
        function, (params, state, tokens), {"parameters": params, "state": state},
        flops_lib.decoding_flops(model, batch), batch,
        "decode, one token" + slots + _layout_note(model),
    )  # fmt: skip
