"""One training step, pure: ``(state, batch) -> (state, metrics)``. Everything else wraps it: jit, sharding, pmap.

Shapes: B batch; A parts that a batch is accumulated over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxlm import spec
from jaxlm.models import Model
from jaxlm.sharding import Sharding

Loss = Callable[..., tuple[jax.Array, jax.Array, Any]]
"""``loss(model, params, batch, *, key, state) -> (total, weight, state)``: see ``jaxlm.objectives``."""
Stream = tuple[int, int]
"""Of the state that a stream carries: batch rows, and how many tokens it remembers."""
Metrics = dict[str, jax.Array]
Step = Callable[["TrainState", Any], tuple["TrainState", Metrics]]


@struct.dataclass
class TrainState:
    """All that a training carries from step to step. What is not here cannot influence a resumed run.

    Attributes:
        step: steps made, skipped ones included; picks the random key of a step.
        params: float32 masters.
        optimizer: the Optax state.
        key: root of every random draw.
        average: exponential moving average of ``params``, or None.
        skipped: steps whose loss or gradient was not finite, in all.
        skipped_in_a_row: those since the last good step.
        carried: what the model carries along a stream of batches (``model.state_specs``), or None.

    Leaves are arrays; shapes, or shardings, in the trees that describe a state.
    """

    step: Any
    params: Any
    optimizer: Any
    key: Any
    average: Any
    skipped: Any
    skipped_in_a_row: Any
    carried: Any = None


def fresh_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    average: bool = False,
    carried: Any = None,
) -> TrainState:
    """The state before the first step. ``carried``: where a stream starts, ``model.init_state(batch, length)``.

    Raises:
        ValueError: parameters that are not float32: updates smaller than a bfloat16 step would be lost.
    """
    for name, leaf in spec.flatten(params).items():
        if leaf.dtype != jnp.float32:
            raise ValueError(
                f"training needs float32 parameters, {name!r} is {leaf.dtype}: convert them "
                f'(load_pretrained(..., param_dtype="float32")) and choose the compute dtype in the config'
            )
    # Copies, and a zero for each counter: buffers are donated to the step, and none can be donated twice.
    copy = jax.tree.map(jnp.copy, params) if average else None
    step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
    return TrainState(step, params, optimizer.init(params), key, copy, skipped, in_a_row, carried)


def init_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    *,
    average: bool = False,
    stream: Stream | None = None,
    sharding: Sharding | None = None,
) -> TrainState:
    """A fresh state with random parameters, made where it will live. Same values on any number of devices."""

    def make(key: jax.Array) -> TrainState:
        init_key, train_key = (spec.fold_name(key, name) for name in ("init", "train"))
        assert init_key is not None
        assert train_key is not None
        carried = None if stream is None else model.init_state(*stream)
        return fresh_state(model.init(init_key), optimizer, train_key, average=average, carried=carried)

    if sharding is None:
        return jax.jit(make)(key)
    place = state_sharding(model, optimizer, sharding, average=average, stream=stream)
    return jax.jit(make, out_shardings=place)(key)


def abstract_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    *,
    average: bool = False,
    stream: Stream | None = None,
    sharding: Sharding | None = None,
    layers_apart: bool = False,
) -> TrainState:
    """Shapes (and shardings) of a state: what to restore a checkpoint into, or compile against."""

    def make(key: jax.Array) -> TrainState:
        state = init_state(model, optimizer, key, average=average, stream=stream)
        return spec.unstack(state) if layers_apart else state

    shapes = jax.eval_shape(make, jax.random.key(0))
    if sharding is None:
        return shapes
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        shapes,
        state_sharding(model, optimizer, sharding, average=average, stream=stream, layers_apart=layers_apart),
    )


def state_sharding(
    model: Model,
    optimizer: optax.GradientTransformation,
    sharding: Sharding,
    *,
    average: bool = False,
    stream: Stream | None = None,
    layers_apart: bool = False,
) -> TrainState:
    """Where each array of a state lives: what is shaped like parameters as they are, the rest on every device.

    ``layers_apart``: of a state whose layers ``spec.unstack`` took apart; so the optimizer must be ``Entrywise``.
    """
    specs = spec.unstack(model.specs) if layers_apart else model.specs
    params, everywhere = sharding.tree(specs), sharding.replicated()
    shapes = jax.eval_shape(optimizer.init, spec.abstract(specs))
    optimizer_sharding = optax.tree.map_params(
        optimizer,
        lambda _, place: place,
        shapes,
        params,
        transform_non_params=lambda _: everywhere,
    )
    carried = None
    if stream is not None:
        carried_specs = model.state_specs(*stream)
        carried = sharding.tree(spec.unstack(carried_specs) if layers_apart else carried_specs)
    average_sharding = params if average else None
    return TrainState(
        everywhere, params, optimizer_sharding, everywhere, average_sharding, everywhere, everywhere, carried
    )


def make_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    accumulate: int = 1,
    average_decay: float | None = None,
    stream: Stream | None = None,
    axis_name: str | None = None,
    sharding: Sharding | None = None,
) -> Step:
    """The pure step.

    Args:
        loss: an objective's ``loss``.
        accumulate: A, parts of the batch whose gradients are summed one after the other: less memory, equal result.
        average_decay: decay of the moving average of weights; None keeps none.
        stream: what the state carries along a stream of batches; where ``batch.reset`` is True, a row starts anew.
        axis_name: the axis to sum gradients over, under ``jax.pmap`` or ``shard_map``.
        sharding: constraints on activations; parameters and batch are placed by :func:`jit_step`.

    The step skips an update whose loss or gradient norm is not finite: parameters, optimizer, average and what is
    carried stay bit for bit what they were, and it is counted. Metrics, float32 scalars: ``loss`` (mean, nats),
    ``gradient_norm`` (before clipping), ``weight`` (tokens), ``skipped`` and ``skipped_in_a_row``.

    Where the state carries nothing, what the loss hands on are new values of parameters that no gradient trains
    (the running statistics of batch normalisation): they replace entries of the parameters after the update.
    """

    def total_loss(params: Any, batch: Any, key: jax.Array, carried: Any) -> tuple[jax.Array, Any]:
        total, weight, carried = loss(model, params, batch, key=key, state=carried)
        return total, (weight, carried)

    def whole(params: Any, batch: Any, key: jax.Array, carried: Any) -> tuple[Any, Any]:
        """Sums over the batch: gradient of the loss, loss, and weight; and what is handed on."""
        gradient = jax.value_and_grad(total_loss, has_aux=True)
        (total, (weight, carried)), grads = gradient(params, batch, key, carried)
        return (grads, total, weight), carried

    def in_parts(params: Any, batch: Any, key: jax.Array, carried: Any) -> tuple[Any, Any]:
        """As ``whole``, of one part of the batch after the other."""

        def part(sums: Any, numbered: Any) -> tuple[Any, Any]:
            number, rows = numbered
            added, moved = whole(params, rows, jax.random.fold_in(key, number), None)
            return jax.tree.map(jnp.add, sums, added), moved

        if carried is not None:
            raise ValueError(f"accumulate={accumulate} cannot cut a batch whose rows are streams: leave it at 1")
        start = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros(()))
        sums, moved = jax.lax.scan(part, start, (jnp.arange(accumulate), _parts(batch, accumulate)))
        return sums, jax.tree.map(lambda x: jnp.mean(x, axis=0), moved)

    gradients = whole if accumulate == 1 else in_parts
    # Clipping need not read every gradient once more for a norm that is known; what asks for none is given none.
    apply_optimizer = optax.with_extra_args_support(optimizer).update

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        carried = state.carried
        if stream is not None and batch.reset is not None:
            carried = spec.reset(model.state_specs(*stream), carried, batch.reset)
        sums, moved = gradients(state.params, batch, key, carried)
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)
            moved = moved if carried is not None else jax.lax.pmean(moved, axis_name)
        summed, total, weight = sums
        mean, share = total / weight, 1.0 / weight
        norm = optax.tree.norm(summed) * share
        good = jnp.isfinite(mean) & jnp.isfinite(norm)

        def update(held: Any) -> Any:
            params, optimizer_state, average, carried = held
            # Made means here, where the optimizer reads them, and by a product: no pass over the gradients of its own.
            grads = jax.tree.map(lambda g: g * share.astype(g.dtype), summed)
            updates, optimizer_state = apply_optimizer(grads, optimizer_state, params, gradient_norm=norm)
            params = optax.apply_updates(params, updates)
            if carried is not None:
                carried = moved
            elif moved is not None:
                params = {**params, **moved}
            if average_decay is not None:
                average = jax.tree.map(
                    lambda old, new: average_decay * old + (1.0 - average_decay) * new, average, params
                )
            return params, optimizer_state, average, carried

        # A branch and not a select: a skipped step reads nothing, and XLA overwrites parameters and moments in place,
        # where with selects it first copies the old moments (docs/labbook.md).
        held = (state.params, state.optimizer, state.average, state.carried)
        params, optimizer_state, average, carried = jax.lax.cond(good, update, lambda held: held, held)
        bad = jnp.where(good, 0, 1)
        skipped, in_a_row = state.skipped + bad, jnp.where(good, 0, state.skipped_in_a_row + 1)
        metrics = {
            "loss": mean,
            "gradient_norm": norm,
            "weight": weight,
            "skipped": skipped.astype(jnp.float32),
            "skipped_in_a_row": in_a_row.astype(jnp.float32),
        }
        new = TrainState(state.step + 1, params, optimizer_state, state.key, average, skipped, in_a_row, carried)
        return new, metrics

    if sharding is None:
        return step

    def sharded_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        with sharding.scope():
            return step(state, batch)

    return sharded_step


def _parts(batch: Any, count: int) -> Any:
    """[B, ...] to [A, B / A, ...]. Part a takes rows a, a + A, ...: a split of the rows over devices stays a split."""

    def cut(x: jax.Array) -> jax.Array:
        if x.shape[0] % count:
            raise ValueError(f"accumulate={count} does not divide the batch of {x.shape[0]} rows: change one of them")
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut, batch)


def jit_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    accumulate: int = 1,
    average_decay: float | None = None,
    stream: Stream | None = None,
    sharding: Sharding | None = None,
    layers_apart: bool = False,
) -> Step:
    """:func:`make_step`, compiled, with the state's buffers donated: the state passed in must not be used again.

    ``layers_apart``: the state is one that ``spec.unstack`` took apart, and so placed; without ``sharding`` the step
    takes either.
    """
    step = make_step(
        model, optimizer, loss,
        accumulate=accumulate, average_decay=average_decay, stream=stream, sharding=sharding,
    )  # fmt: skip
    if sharding is None:
        return jax.jit(step, donate_argnums=0)
    place = state_sharding(
        model, optimizer, sharding, average=average_decay is not None, stream=stream, layers_apart=layers_apart
    )
    return jax.jit(
        step,
        in_shardings=(place, sharding.named(("batch",))),
        out_shardings=(place, sharding.replicated()),
        donate_argnums=0,
    )


def place_batch(batch: Any, sharding: Sharding | None) -> Any:
    """This process's rows of a batch (``sharding.rows``), on the host, as global arrays [B, ...] split by rows."""
    return batch if sharding is None else jax.tree.map(sharding.from_rows, batch)


def pmap_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    average_decay: float | None = None,
    stream: Stream | None = None,
) -> Step:
    """Data parallel with ``jax.pmap``: the state has a leading device axis (``flax.jax_utils.replicate``), and so has
    the batch, [devices, B / devices, T]. Gradients are summed over devices; every device makes the same update."""
    step = make_step(model, optimizer, loss, average_decay=average_decay, stream=stream, axis_name="devices")
    return jax.pmap(step, axis_name="devices", donate_argnums=0)
