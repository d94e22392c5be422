"""``Trainer``: the training step, a pure function of a state and a batch, for ``jit`` (with shardings) or ``pmap``.

Shapes: B batch size; A number of micro-batches per batch (``grad_accum_steps``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from jaxlm import spec
from jaxlm.adapt import Adaptation, overwrite
from jaxlm.config import check_min
from jaxlm.models import Model
from jaxlm.objectives.batch import Loss, loss_and_terms, term_names
from jaxlm.sharding import Sharding, num_shards, platform
from jaxlm.spec import Params
from jaxlm.training import nt_asgd
from jaxlm.training.layouts import LayoutStep
from jaxlm.training.optimizer import OptimizerConfig, optimizer_sharding
from jaxlm.training.report import NON_METRIC_FIELDS

CarriedStateSize = tuple[int, int]
"""The size of the model state that training carries from batch to batch: (rows, tokens), the two arguments of
``Model.init_state``."""
Metrics = dict[str, jax.Array]
Step = Callable[["TrainState", Any], tuple["TrainState", Metrics]]

METRIC_NAMES = frozenset((
    *NON_METRIC_FIELDS, "loss", "gradient_norm", "parameter_norm", "weight", "skipped", "skipped_in_a_row",
    "learning_rate", "tokens", "examples", "tokens_per_second", "examples_per_second", "time",
))  # fmt: skip
"""Names of the fields of ``metrics.jsonl``, except validation metrics and terms of a loss. A term must not have one of
these names."""
SPIKE_WINDOW = 128
"""Number of recent losses with which a new loss is compared to detect a spike (``Trainer.spike_deviations``)."""


def reset_rows(model: Model, carry_size: CarriedStateSize, state: Any, batch: Any) -> Any:
    """The carried model state, with empty rows where ``batch.reset`` is True.

    Raises:
        ValueError: ``carry_size`` and the batch have different numbers of rows.
    """
    rows, batch_rows = carry_size[0], jax.tree.leaves(batch)[0].shape[0]
    if rows != batch_rows:
        raise ValueError(
            f"carry_size={carry_size} has {rows} rows, but the batch has {batch_rows} (with shard_map or pmap: "
            "on each device): change one of them"
        )
    return state if batch.reset is None else spec.reset(model.state_specs(*carry_size), state, batch.reset)


def carry_size_of(model: Model, rows: int) -> CarriedStateSize | None:
    """``Trainer.carry_size`` for batches with this number of rows; None if training this model carries no state."""
    length = model.carried_state_length
    return None if length is None else (rows, length)


@struct.dataclass
class TrainState:
    """The complete state of training between two steps. The next steps depend only on this state and their batches.

    Attributes:
        step: number of steps so far, including skipped steps. The random key of a step is derived from ``key`` and
            this number.
        params: trained parameters, float32.
        optimizer: Optax state.
        key: root key of the random numbers of all steps.
        ema: exponential moving average of ``params``; None without ``Trainer.ema_decay``.
        skipped: number of steps whose loss or gradient was not finite, or whose loss was a spike.
        skipped_in_a_row: number of skipped steps since the last step that was not skipped.
        model_state: model state at the end of the last batch whose step was not skipped (``model.state_specs``). A
            later skipped step only resets the rows where ``batch.reset`` is True. None without ``Trainer.carry_size``.
        frozen: parameters that are not trained; None without ``Trainer.adaptation``.
        recent_losses: [:data:`SPIKE_WINDOW`] losses of the last steps that were not skipped, with NaN in unused
            entries; None without ``Trainer.spike_deviations``.

    The leaves are arrays. ``Trainer.abstract`` returns the same tree with ``jax.ShapeDtypeStruct`` as leaves, and
    ``Trainer.shardings`` with shardings as leaves.
    """

    step: Any
    params: Any
    optimizer: Any
    key: Any
    ema: Any
    skipped: Any
    skipped_in_a_row: Any
    model_state: Any = None
    frozen: Any = None
    recent_losses: Any = None


def check_step_settings(grad_accum_steps: int, ema_decay: float | None, spike_deviations: float | None) -> None:
    """Raise ``ValueError`` if one of these settings of a :class:`Trainer` is out of its range."""
    check_min(1, grad_accum_steps=grad_accum_steps)
    if ema_decay is not None and not 0.0 < ema_decay < 1.0:
        raise ValueError(f"ema_decay={ema_decay} must be between 0 and 1, or None")
    if spike_deviations is not None and not spike_deviations > 0.0:
        raise ValueError(f"spike_deviations={spike_deviations} must be positive, or None")


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A model, an optimizer and a loss, with the methods that a training loop needs.

    Attributes:
        model: the model.
        optimizer: an Optax transformation. It gets the loss as ``value`` (for ``optax.contrib.reduce_on_plateau``).
            Transformations that evaluate the loss themselves are not supported (``optax.contrib.sam`` with
            ``opaque_mode=True``, ``optax.contrib.sophia``, line searches).
        loss: the ``loss`` of an objective, or a function with its signature.
        grad_accum_steps: A, the number of micro-batches per batch. They are computed one after the other, which saves
            memory, and their gradients are summed. The sum is the gradient of the whole batch, with three exceptions:
            dropout, batch normalization and router losses are computed for each micro-batch. A must be 1 with
            ``carry_size``, because a micro-batch would have fewer rows than the carried state.
        ema_decay: decay of the exponential moving average of the trained parameters; None keeps no average.
        spike_deviations: a step is also skipped if its loss is more than this many standard deviations above the mean
            of the last :data:`SPIKE_WINDOW` losses of steps that were not skipped. The rule applies as soon as
            ``SPIKE_WINDOW / 2`` such losses exist. The skip-step optimizers of OLMo-core
            (``optim/skip_step_optimizer.py``) have a similar rule with 6 deviations. They also compare the gradient
            norm, and they include the losses of skipped steps. None: a step is skipped only if its loss or gradient
            norm is not finite.
        carry_size: (rows, tokens), the size of the model state that is carried from batch to batch; None carries no
            state.
        adaptation: selects the trained parameters (``jaxlm.adapt``); None trains all parameters.
        learning_rate: the learning rate as a function of the number of earlier updates. It is used only for logging.
        sharding: how arrays are distributed over devices; None uses one device.
        shard_map: whether ``jit_step`` uses ``jax.shard_map``, for data parallelism. Each device then computes the loss
            and the gradients of its rows as a separate batch, and the gradients are summed. The sum is the gradient of
            the whole batch, with the exceptions of ``grad_accum_steps``: dropout, batch normalization and router losses
            are computed for the rows of each device. On CPU devices, this can be faster than a step that XLA
            partitions (docs/labbook.md).

    Raises:
        TypeError: ``optimizer`` is an ``OptimizerConfig``.
        ValueError: ``grad_accum_steps``, ``ema_decay`` or ``spike_deviations`` is out of its range;
            ``grad_accum_steps`` is above 1 with ``carry_size``; the name of a term of the loss is in
            :data:`METRIC_NAMES` or begins with ``validation_``; or, with ``shard_map``: ``sharding`` is None, splits a
            parameter, has a mesh axis that does not split the batch, or has devices of another platform than JAX's
            default device.

    Example:
        >>> trainer = Trainer(model, optimizer, causal.loss)                     # doctest: +SKIP
        >>> state, step = trainer.init(jax.random.key(0)), trainer.jit_step()    # doctest: +SKIP
        >>> state, metrics = step(state, batch)                                  # doctest: +SKIP
    """

    model: Model
    optimizer: optax.GradientTransformation
    loss: Loss
    grad_accum_steps: int = 1
    ema_decay: float | None = None
    carry_size: CarriedStateSize | None = None
    adaptation: Adaptation | None = None
    learning_rate: Callable[[Any], Any] | None = None
    sharding: Sharding | None = None
    spike_deviations: float | None = None
    shard_map: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, OptimizerConfig):
            raise TypeError(
                "the optimizer is an OptimizerConfig, but a Trainer needs an Optax optimizer: use make_optimizer or "
                "TrainingConfig.trainer"
            )
        check_step_settings(self.grad_accum_steps, self.ema_decay, self.spike_deviations)
        if self.grad_accum_steps > 1 and self.carry_size is not None:
            raise ValueError(
                f"grad_accum_steps={self.grad_accum_steps} cannot split a batch whose rows carry state "
                f"(carry_size={self.carry_size}): set it to 1"
            )
        if self.shard_map:
            self._check_shard_map()
        names = term_names(self.loss)
        if taken := sorted(name for name in names if name in METRIC_NAMES or name.startswith("validation_")):
            raise ValueError(
                f"the loss has the terms {taken}, which are names of other metrics or begin with validation_: rename "
                "the terms"
            )

    def _check_shard_map(self) -> None:
        """Raise ``ValueError`` unless the mesh splits only the batch and has devices of JAX's default platform."""
        if self.sharding is None:
            raise ValueError("shard_map=True needs a mesh: pass a sharding, such as Sharding(make_mesh('data=2'))")
        mesh = self.sharding.mesh
        if self.sharding.num_shards(("batch",)) != mesh.size:
            raise ValueError(
                f"shard_map=True needs a mesh whose axes all split the batch, got {dict(mesh.shape)}: use only the "
                "mesh axis data"
            )
        for specs in (self.model.specs, self.specs):  # frozen and trained parameters
            for path, sharding in spec.flatten(self.sharding.tree(specs)).items():
                if not sharding.is_fully_replicated:
                    raise ValueError(
                        f"shard_map=True needs a full copy of the parameters on each device, but the mesh "
                        f"{dict(mesh.shape)} splits {path!r}: use only the mesh axis data"
                    )
        if mesh.devices.flat[0].platform != platform():
            raise ValueError(
                f"shard_map=True needs a mesh over devices of JAX's default platform, {platform()}, got "
                f"{mesh.devices.flat[0].platform}: set jax_default_device, or shard_map=False"
            )

    # ------------------------------------------------------------------------------------------------- state

    @property
    def specs(self) -> spec.Tree:
        """Specs of the trained parameters."""
        return self.model.specs if self.adaptation is None else self.adaptation.specs(self.model.specs)

    def init(self, key: jax.Array, params: Params | None = None) -> TrainState:
        """The initial state, created with the shardings of :meth:`shardings`.

        The values do not depend on the number of devices.

        Args:
            key: root key of all random numbers of the training.
            params: initial parameters of the model. The state gets a copy of them. If the trainer has a ``sharding``,
                the copy is on the devices of the mesh. None initializes the parameters at random.

        Raises:
            ValueError: ``params`` are not the parameters of the model (other names or shapes), or a trained parameter
                is not float32.
        """
        if params is not None:
            self._require_model_params(params)
            params = to_mesh(params, self.model.specs, self.sharding)
        if self.sharding is not None and jax.process_count() == 1:
            key = jax.device_put(key, self.sharding.replicated())  # it may be committed to other devices
        return self._jitted_init()(key, params)

    def _require_model_params(self, params: Params) -> None:
        spec.require_same(self.model.specs, params, f"parameters of {self.model.family}", dtypes=False)

    def _jitted_init(self) -> Any:
        return jax.jit(self._init, out_shardings=None if self.sharding is None else self.shardings())

    def _init(self, key: jax.Array, params: Params) -> TrainState:
        key = spec.typed_key(key)
        keys: list[Any] = [spec.fold_in_name(key, name) for name in ("init", "train", "adapt")]
        init_key, train_key, adapt_key = keys
        # The step donates the buffers of the state. Without the copy, it would donate the caller's buffers.
        params = self.model.init(init_key) if params is None else jax.tree.map(jnp.copy, params)
        frozen = None
        if self.adaptation is not None:
            params, frozen = self.adaptation.split(self.model.specs, params, adapt_key)
        for name, leaf in spec.flatten(params).items():
            if leaf.dtype != jnp.float32:
                raise ValueError(
                    f"training needs float32 parameters, {name!r} is {leaf.dtype}: convert them "
                    f'(load_pretrained(..., param_dtype="float32")) and choose the compute dtype in the config'
                )
        # No buffer may be donated twice, so the moving average is a copy and each counter is a separate array.
        ema = None if self.ema_decay is None else jax.tree.map(jnp.copy, params)
        step, skipped, in_a_row = (jnp.zeros((), jnp.int32) for _ in range(3))
        model_state = None if self.carry_size is None else self.model.init_state(*self.carry_size)
        return TrainState(
            step, params, self.optimizer.init(params), train_key, ema, skipped, in_a_row, model_state, frozen,
            None if self.spike_deviations is None else jnp.full(SPIKE_WINDOW, jnp.nan, jnp.float32),
        )  # fmt: skip

    def abstract(self, params: Params | None = None) -> TrainState:
        """Shapes, dtypes and shardings of the state, to restore a checkpoint or to compile the step ahead of time.

        Args:
            params: the parameters passed to ``init``; only their shapes and dtypes are used. This argument is needed if
                a frozen parameter is not float32. None: all parameters are float32.

        Raises:
            ValueError: as in :meth:`init`.
        """
        if params is None:
            params = spec.abstract(self.model.specs)
        else:
            self._require_model_params(params)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        return self._jitted_init().eval_shape(jax.random.key(0), params)

    def shardings(self) -> TrainState:
        """The sharding of each array of the state.

        The optimizer state has the shardings of :func:`jaxlm.training.optimizer.optimizer_sharding`. Counters and keys
        are replicated.

        Raises:
            ValueError: the trainer has no ``sharding``.
        """
        if self.sharding is None:
            raise ValueError("a trainer with sharding=None has no shardings: pass a Sharding to Trainer")
        replicated = self.sharding.replicated()
        params = self.sharding.tree(self.specs)
        optimizer = optimizer_sharding(self.optimizer, self.specs, self.sharding)
        model_state = frozen = None
        if self.carry_size is not None:
            model_state = self.sharding.tree(self.model.state_specs(*self.carry_size))
        if self.adaptation is not None:
            frozen = self.sharding.tree(self.adaptation.frozen_specs(self.model.specs))
        ema = None if self.ema_decay is None else params
        losses = None if self.spike_deviations is None else replicated
        return TrainState(
            replicated, params, optimizer, replicated, ema, replicated, replicated, model_state, frozen, losses
        )

    def model_params(self, state: TrainState) -> Any:
        """The parameters of the model for evaluation and export, including frozen parameters.

        ``ema_decay`` replaces the trained parameters by their moving averages. NT-ASGD without ``ema_decay`` replaces
        them by the mean that the optimizer computes, as soon as averaging has started. Other averages in the state of
        an optimizer, such as that of ``optax.contrib.schedule_free``, are not used.
        """
        trained = state.params if state.ema is None else state.ema
        if state.ema is None and nt_asgd.has_averaging(state.optimizer):
            trained = nt_asgd.mean_params(state.optimizer, state.params)
        return self._merge(trained, state.frozen)

    def _merge(self, params: Params, frozen: Any) -> Any:
        return params if self.adaptation is None else self.adaptation.merge(params, frozen)

    def _overwrite(self, trained: Any, frozen: Any, values: Any) -> tuple[Any, Any]:
        """Both trees with new values of some parameters, such as the running statistics of batch normalization."""
        if self.adaptation is None:
            return overwrite(trained, values), frozen
        return self.adaptation.overwrite(trained, frozen, values)

    # -------------------------------------------------------------------------------------------------- step

    def step(
        self, state: TrainState, batch: Any, *, axis_name: str | tuple[str, ...] | None = None
    ) -> tuple[TrainState, Metrics]:
        """The state after one step, and metrics. The function is pure.

        A step is skipped if its loss or gradient norm is not finite, or if its loss is a spike (``spike_deviations``).
        If all targets of the batch have weight 0, the loss is NaN, so the step is skipped. A skipped step changes only
        the counters, and resets the rows of the model state where ``batch.reset`` is True. Everything else stays
        bitwise the same. Metrics are float32 scalars: ``loss`` (mean, nats), ``gradient_norm`` (before clipping),
        ``parameter_norm`` (of the trained parameters after the step), ``weight`` (sum of the weights of the targets),
        ``skipped`` and ``skipped_in_a_row``, and the mean of each term of the loss
        (``jaxlm.objectives.batch.LossWithTerms``).

        If an update makes a parameter non-finite, the update is not undone, because that would need a copy of the old
        parameters. ``parameter_norm`` shows this case: it is finite only if all trained parameters are finite.

        If no model state is carried, the loss may return new values of some parameters instead of a model state, for
        example the running statistics of batch normalization. After the update, these values overwrite the trained and
        the frozen parameters of the same names.

        Args:
            batch: a batch of the objective; rows with ``batch.reset`` start from an empty model state.
            axis_name: the name of the mapped axis over which gradients are summed, or the names of several axes. Set it
                inside ``jax.pmap``, and inside ``jax.shard_map`` with ``check_vma=False``.

        Raises:
            ValueError: ``grad_accum_steps`` does not divide the number of rows, the mesh does not divide the rows of a
                micro-batch, or ``carry_size`` has another number of rows than the batch.
        """
        key = jax.random.fold_in(state.key, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        if self.carry_size is not None:
            model_state = reset_rows(self.model, self.carry_size, state.model_state, batch)
            state = dataclasses.replace(state, model_state=model_state)
        gradients = self._gradients if self.grad_accum_steps == 1 else self._accumulated_gradients
        sums, new_model_state = gradients(state.params, state.frozen, batch, key, state.model_state)
        if axis_name is not None:
            sums = jax.lax.psum(sums, axis_name)
            if state.model_state is None:
                new_model_state = jax.lax.pmean(new_model_state, axis_name)
        grads, total_loss, weight, terms = sums
        loss, scale = total_loss / weight, 1.0 / weight
        norm = optax.tree.norm(grads) * scale
        accepted = jnp.isfinite(loss) & jnp.isfinite(norm)
        if state.recent_losses is not None:
            accepted &= ~self._is_spike(loss, state.recent_losses)

        def update(state: TrainState) -> tuple[TrainState, jax.Array]:
            state = self._update(state, grads, scale, loss, norm, new_model_state)
            # Both branches compute this norm. Without the barrier, XLA would compute it once after the conditional, in
            # a separate pass over the parameters. With the barrier, it computes the norm in the pass of the update.
            return state, jax.lax.optimization_barrier(optax.tree.norm(state.params))

        def skip(state: TrainState) -> tuple[TrainState, jax.Array]:
            counters = {"skipped": state.skipped + 1, "skipped_in_a_row": state.skipped_in_a_row + 1}
            return dataclasses.replace(state, **counters), optax.tree.norm(state.params)

        # With jax.lax.cond, XLA updates parameters and moments in place. With jnp.where, XLA would first copy the old
        # moments (docs/labbook.md).
        state, parameter_norm = jax.lax.cond(accepted, update, skip, state)
        metrics = {
            "loss": loss,
            "gradient_norm": norm,
            "parameter_norm": parameter_norm,
            "weight": weight,
            "skipped": state.skipped.astype(jnp.float32),
            "skipped_in_a_row": state.skipped_in_a_row.astype(jnp.float32),
        }
        metrics |= {name: term / weight for name, term in terms.items()}
        return dataclasses.replace(state, step=state.step + 1), metrics

    def _is_spike(self, loss: jax.Array, losses: jax.Array) -> jax.Array:
        """Whether ``loss`` is a spike compared with ``losses`` [:data:`SPIKE_WINDOW`], whose unused entries are NaN."""
        assert self.spike_deviations is not None
        is_used = jnp.isfinite(losses)
        count = jnp.sum(is_used)
        mean = jnp.sum(losses, where=is_used) / jnp.maximum(count, 1)
        variance = jnp.sum((losses - mean) ** 2, where=is_used) / jnp.maximum(count - 1, 1)
        return (count >= SPIKE_WINDOW // 2) & (loss > mean + self.spike_deviations * jnp.sqrt(variance))

    def _gradients(self, params: Params, frozen: Any, batch: Any, key: jax.Array, model_state: Any) -> tuple[Any, Any]:
        """The sums (gradient, loss, weight, terms) over the batch, and the state that the loss returns."""

        def loss_and_state(params: Params) -> tuple[jax.Array, Any]:
            model_params = self._merge(params, frozen)
            total, weight, new_state, terms = loss_and_terms(
                self.loss, self.model, model_params, batch, key=key, state=model_state
            )
            return total, (weight, terms, new_state)

        (total, (weight, terms, new_state)), grads = jax.value_and_grad(loss_and_state, has_aux=True)(params)
        return (grads, total, weight, terms), new_state

    def _accumulated_gradients(
        self, params: Params, frozen: Any, batch: Any, key: jax.Array, model_state: Any
    ) -> tuple[Any, Any]:
        """The results of ``_gradients`` for the whole batch, computed one micro-batch after the other.

        If the loss returns new values of parameters, the second result is their mean over the micro-batches.
        """

        def add_micro_batch(sums: Any, indexed_micro_batch: Any) -> tuple[Any, Any]:
            index, micro_batch = indexed_micro_batch
            new_sums, new_state = self._gradients(params, frozen, micro_batch, jax.random.fold_in(key, index), None)
            return jax.tree.map(jnp.add, sums, new_sums), new_state

        terms = {name: jnp.zeros(()) for name in term_names(self.loss)}
        zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros(()), terms)
        indexed_micro_batches = (jnp.arange(self.grad_accum_steps), _micro_batches(batch, self.grad_accum_steps))
        sums, new_states = jax.lax.scan(add_micro_batch, zeros, indexed_micro_batches)
        return sums, jax.tree.map(lambda x: jnp.mean(x, axis=0), new_states)

    def _update(
        self, state: TrainState, grads: Any, scale: jax.Array, loss: jax.Array, norm: jax.Array, new_model_state: Any
    ) -> TrainState:
        """The state after a step that is not skipped. ``step`` keeps its old value."""
        ema, model_state, frozen, losses = state.ema, state.model_state, state.frozen, state.recent_losses
        # XLA fuses this multiplication by 1 / weight into the optimizer, so it needs no extra pass over the gradients.
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        # Clipping reads `gradient` and `gradient_norm`, so it does not compute the norm again. Transformations such as
        # optax.contrib.reduce_on_plateau read the loss (`value`). Optax drops these arguments for optimizers that do
        # not accept them.
        apply_optimizer = optax.with_extra_args_support(self.optimizer).update
        updates, optimizer_state = apply_optimizer(
            grads, state.optimizer, state.params, value=loss, gradient=grads, gradient_norm=norm
        )
        params = optax.apply_updates(state.params, updates)
        if model_state is not None:
            model_state = new_model_state
        elif new_model_state is not None:
            params, frozen = self._overwrite(params, frozen, new_model_state)
            # NT-ASGD does not average the running statistics: evaluation and export use those of the last step.
            optimizer_state = nt_asgd.map_mean(
                optimizer_state, lambda mean: self._overwrite(mean, frozen, new_model_state)[0]
            )
        if self.ema_decay is not None:
            decay = self.ema_decay
            ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
        if losses is not None:
            losses = losses.at[(state.step - state.skipped) % SPIKE_WINDOW].set(loss)
        return dataclasses.replace(
            state, params=params, optimizer=optimizer_state, ema=ema, skipped_in_a_row=jnp.zeros((), jnp.int32),
            model_state=model_state, frozen=frozen, recent_losses=losses,
        )  # fmt: skip

    def jit_step(self) -> Step:
        """:meth:`step`, compiled with ``jax.jit``. It donates the input state, so do not use this state again.

        On a TPU, the compiler chooses the memory layouts of the state (:class:`jaxlm.training.layouts.LayoutStep`),
        except with ``shard_map``.
        """
        if self.sharding is None:
            return LayoutStep(self.step) if platform() == "tpu" else jax.jit(self.step, donate_argnums=0)
        sharding = self.sharding
        in_shardings = (self.shardings(), sharding.named_sharding(("batch",)))
        out_shardings = (self.shardings(), sharding.replicated())

        def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            with sharding.scope():
                return self.step(state, batch)

        if self.shard_map:
            in_specs, out_specs = jax.tree.map(lambda leaf: leaf.spec, (in_shardings, out_shardings))
            step = jax.shard_map(
                functools.partial(self._per_device_trainer().step, axis_name=sharding.mesh.axis_names),
                mesh=sharding.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False,
            )  # fmt: skip
        elif sharding.mesh.devices.flat[0].platform == "tpu":
            return LayoutStep(step, (*in_shardings, out_shardings[1]))
        return jax.jit(step, in_shardings=in_shardings, out_shardings=out_shardings, donate_argnums=0)

    def _per_device_trainer(self) -> Trainer:
        """The trainer for the rows of one device, without sharding."""
        assert self.sharding is not None
        carry_size = self.carry_size
        if carry_size is not None:
            rows, tokens = carry_size
            carry_size = rows // self.sharding.num_shards(("batch",)), tokens
        return dataclasses.replace(self, carry_size=carry_size, sharding=None, shard_map=False)

    def pmap_step(self) -> Step:
        """:meth:`step`, compiled with ``jax.pmap`` for data parallelism.

        The state, the batch and the metrics have a leading device axis: the tokens of a batch are
        [devices, B / devices, T]. ``flax.jax_utils.replicate`` adds this axis to a state. The input state is donated.
        The field ``sharding`` is not used.
        """

        step = functools.partial(self.step, axis_name="devices")
        return jax.pmap(step, axis_name="devices", donate_argnums=0)


def to_mesh(params: Params, specs: spec.Tree, sharding: Sharding | None) -> Params:
    """``params`` as arrays that a jitted function over the mesh accepts.

    Such a function rejects arrays that are committed to other devices, or to the same devices in another order. With
    several processes, it accepts NumPy arrays, but rejects a ``jax.Array`` that is local to one process.

    Args:
        specs: the specs of ``params``.
        sharding: the mesh and its rules; None returns ``params`` unchanged.
    """
    if sharding is None:
        return params
    if jax.process_count() > 1:
        return jax.tree.map(lambda x: np.asarray(x) if getattr(x, "is_fully_addressable", True) else x, params)
    if all(_is_on(sharding.mesh, x) for x in jax.tree.leaves(params) if isinstance(x, jax.Array)):
        return params
    return jax.device_put(params, sharding.tree(specs))


def _is_on(mesh: Mesh, x: jax.Array) -> bool:
    """Whether ``x`` is on a mesh with the devices of ``mesh`` in the same order."""
    return isinstance(x.sharding, NamedSharding) and [*x.sharding.mesh.devices.flat] == [*mesh.devices.flat]


def _micro_batches(batch: Any, count: int) -> Any:
    """The batch [B, ...] as [A, B / A, ...].

    Micro-batch a has the rows a, a + A, ... So each device keeps its rows if A divides the number of rows per device.

    Raises:
        ValueError: A does not divide B, or the mesh does not divide B / A.
    """
    rows, shards = jax.tree.leaves(batch)[0].shape[0], num_shards(("batch",))
    if rows % count:
        raise ValueError(
            f"grad_accum_steps={count} does not divide the batch of {rows} rows (with shard_map: on each device): "
            "change one of them"
        )
    if rows // count % shards:
        raise ValueError(
            f"grad_accum_steps={count} gives micro-batches of {rows // count} of the {rows} rows, which the mesh "
            f"cannot split into {shards} shards: make the batch a multiple of {count * shards} rows, or change "
            "grad_accum_steps"
        )

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(rows // count, count, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def to_global_batch(batch: Any, sharding: Sharding | None) -> Any:
    """The global batch [B, ...], with its rows sharded over the mesh; ``batch`` itself if ``sharding`` is None.

    Args:
        batch: the rows of the global batch that this process loads (``sharding.local_rows``).
    """
    return batch if sharding is None else jax.tree.map(sharding.from_rows, batch)
