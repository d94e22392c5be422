"""Training with a model state that is carried from batch to batch."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.checkpoint import Checkpointer
from jaxlm.data import Batches, ContiguousStreams
from jaxlm.models import Model
from jaxlm.objectives import causal, objective
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import (
    TINY,
    add_noise,
    assert_trees_close,
    assert_trees_equal,
    decodes,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
    variant_params,
)
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.loop import Run, TrainingConfig, train
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from tests.training.cached_trainer import CachedTrainer

ROWS, LENGTH, MEMORY = 8, 6, 24
CARRY = (ROWS, MEMORY)
DECODERS = [name for name in TINY if decodes(tiny_model(name)) and tiny_model(name).task != "seq2seq"]


@functools.partial(jax.jit, static_argnums=0)
def loss_of(model: Any, params: Any, batch: Any, state: Any) -> Any:
    return objective(model.task).loss(model, params, batch, state=state)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", variant_params(DECODERS))
def test_losses_of_chunks_sum_to_the_loss_of_the_text(name: str) -> None:
    model = tiny_model(name)
    params = add_noise(initial_params(model))
    tokens = random_tokens(model, 2, 19)
    expected, _, _ = loss_of(model, params, causal.batch(tokens), model.init_state(2, MEMORY))
    chunk_losses, state = [], model.init_state(2, MEMORY)
    for start in (0, 6, 12):
        total, _, state = loss_of(model, params, causal.batch(tokens[:, start : start + 7]), state)
        chunk_losses.append(float(total))
    assert relative_error(sum(chunk_losses), expected) < 2e-5


def test_no_gradient_flows_into_the_model_state() -> None:
    model = tiny_model("lstm-tiny")
    params = add_noise(initial_params(model))
    batch = causal.batch(random_tokens(model, 2, 7))
    state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), model.init_state(2, 1))
    floats, tree = jax.tree.flatten(state)
    gradient = jax.grad(
        lambda leaves: causal.loss(model, params, batch, state=jax.tree.unflatten(tree, leaves))[0], allow_int=True
    )
    grads = jax.jit(gradient)(floats)
    assert not any(np.any(np.asarray(grad, np.float32)) for grad in grads if grad.dtype != jax.dtypes.float0)


@functools.cache
def model_optimizer_batches(name: str) -> tuple[Any, Any, Any]:
    model = tiny_model(name)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1, learning_rate=1e-2, epsilon=1e-3), model.specs, 40)
    columns = ContiguousStreams(random_tokens(model, 1, ROWS * 3 * LENGTH + 1)[0], LENGTH, ROWS)
    batches = [columns.batch(i, range(ROWS)) for i in range(4)]
    return model, optimizer, [causal.batch(token_batch.tokens, reset=token_batch.reset) for token_batch in batches]


def trainer_of(model: Any, optimizer: Any, **options: Any) -> CachedTrainer:
    return CachedTrainer(model, optimizer, causal.loss, carry_size=CARRY, **options)


def initial_state(model: Any, optimizer: Any) -> Any:
    return trainer_of(model, optimizer).init(jax.random.key(0))


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", ["lstm-tiny", "transformer-xl-tiny"])
def test_a_step_carries_the_model_state_and_resets_it_on_request(name: str) -> None:
    model, optimizer, batches = model_optimizer_batches(name)
    step = trainer_of(model, optimizer).jit_step()
    state = initial_state(model, optimizer)
    states = []
    for batch in batches[:2]:
        expected = loss_of(model, state.params, batch, state.model_state)[2]
        state, _ = step(state, batch)
        assert_trees_close(state.model_state, expected, 2e-5)
        assert spec.differences(model.state_specs(*CARRY), state.model_state) == []
        states.append(jax.device_get(state.model_state))
    assert step._cache_size() == 1
    # The fourth batch begins the next epoch, so the step resets the model state.
    assert batches[3].reset.all()
    expected = loss_of(model, state.params, batches[3], model.init_state(*CARRY))[2]
    state, _ = step(state, batches[3])
    assert_trees_close(state.model_state, expected, 2e-5)


@pytest.mark.thorough
def test_a_run_that_carries_state_cannot_change_its_dtype_or_batch_size(tmp_path: Path) -> None:
    model, optimizer, _ = model_optimizer_batches("lstm-tiny")
    tokens = random_tokens(model, 1, ROWS * 3 * LENGTH + 1)[0]

    def run(model: Model, rows: int = ROWS, **options: Any) -> Any:
        columns = ContiguousStreams(tokens, LENGTH, rows)
        data = Batches(columns, to_batch=lambda token_batch: causal.batch(token_batch.tokens, reset=token_batch.reset))
        config, trainer = (
            TrainingConfig(steps=1),
            CachedTrainer(model, optimizer, causal.loss, carry_size=(rows, MEMORY)),
        )
        return train(trainer, data, lambda params: {"loss": 1.0}, config, Run(tmp_path, **options))

    assert run(model).step == 1
    with pytest.raises(ValueError, match=r"dtype=bfloat16 cannot change .*saved value: float32.*: set it to float32"):
        run(model.with_fields(dtype="bfloat16"), resume=True)
    with pytest.raises(ValueError, match=rf"the saved iterator read other data:\n  batch_size: saved {ROWS}, now 1"):
        run(model, rows=1, resume=True)
    assert run(model, resume=True).step == 1


def test_a_skipped_step_keeps_the_model_state() -> None:
    model, optimizer, batches = model_optimizer_batches("lstm-tiny")
    step = trainer_of(model, optimizer).jit_step()
    state, _ = step(initial_state(model, optimizer), batches[0])
    before = jax.device_get(state.model_state)
    bad = batches[1].replace(tokens=np.full_like(batches[1].tokens, model.config.vocab_size))
    state, metrics = step(state, bad)
    assert metrics["skipped"] == 1
    assert_trees_equal(state.model_state, before)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["lstm-tiny", "transformer-xl-tiny"])
def test_model_states_are_sharded_and_restored_from_checkpoints(name: str, tmp_path: Any) -> None:
    model, optimizer, batches = model_optimizer_batches(name)
    single_step = trainer_of(model, optimizer).jit_step()
    expected = initial_state(model, optimizer)
    for batch in batches[:2]:
        expected, _ = single_step(expected, batch)
    sharding = Sharding(make_mesh("data=2,fsdp=2,tensor=2"))
    sharded_step = trainer_of(model, optimizer, sharding=sharding).jit_step()
    state = trainer_of(model, optimizer, sharding=sharding).init(jax.random.key(0))
    state, _ = sharded_step(state, batches[0])
    target = trainer_of(model, optimizer, sharding=sharding).abstract()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        restored, _ = checkpoints.restore(target)
    assert_trees_equal(restored, state)
    restored, _ = sharded_step(restored, batches[1])
    assert_trees_close(restored.params, expected.params, 1e-4)
    assert_trees_close(restored.model_state, expected.model_state, 1e-4)


def test_a_shard_map_step_carries_the_rows_of_each_device() -> None:
    model, optimizer, batches = model_optimizer_batches("lstm-tiny")
    sharding = Sharding(make_mesh("data=2", devices=jax.devices()[:2]))
    step = trainer_of(model, optimizer).jit_step()
    mapped = dataclasses.replace(trainer_of(model, optimizer), sharding=sharding, shard_map=True)
    mapped_step, state, expected = mapped.jit_step(), mapped.init(jax.random.key(0)), initial_state(model, optimizer)
    for batch in (batches[0], batches[1], batches[3]):  # the last batch resets the model state
        state, metrics = mapped_step(state, batch)
        expected, expected_metrics = step(expected, batch)
        assert_trees_close((state.params, metrics), (expected.params, expected_metrics), 1e-4)
        assert_trees_close(state.model_state, expected.model_state, 1e-4)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_batch_must_have_the_rows_of_the_carried_state(rows: int) -> None:
    model, optimizer, batches = model_optimizer_batches("lstm-tiny")
    trainer = dataclasses.replace(trainer_of(model, optimizer), carry_size=(rows, MEMORY))
    evaluate = Evaluator(model, causal.loss, batches, carry_size=trainer.carry_size)
    message = rf"carry_size=\({rows}, {MEMORY}\) has {rows} rows, but the batch has {ROWS}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(trainer.step, trainer.abstract(), batches[0])
    with pytest.raises(ValueError, match=message):
        evaluate(initial_params(model))


def test_grad_accum_steps_rejects_a_batch_with_carried_state() -> None:
    model, optimizer, _ = model_optimizer_batches("lstm-tiny")
    with pytest.raises(ValueError, match="grad_accum_steps=2 cannot split a batch whose rows carry state"):
        trainer_of(model, optimizer, grad_accum_steps=2)


def test_the_evaluator_carries_the_model_state() -> None:
    model, _, batches = model_optimizer_batches("lstm-tiny")
    params = add_noise(initial_params(model))
    joined = causal.batch(
        np.concatenate([batches[0].tokens, batches[1].tokens, batches[1].targets[:, -1:]], axis=1)
    )  # fmt: skip
    total, weight, _ = loss_of(model, params, joined, None)
    evaluate = Evaluator(model, causal.loss, batches[:2], carry_size=CARRY)
    assert evaluate(params)["loss"] == pytest.approx(float(total / weight), rel=1e-5)
    is_first = np.arange(ROWS) == 0  # only the first row starts from an empty state
    for rows, size in ((is_first, None), (~is_first, CARRY)):
        weighted = [dataclasses.replace(batch, weights=batch.weights * rows[:, None]) for batch in batches[:2]]
        reset = [dataclasses.replace(batch, reset=is_first) for batch in weighted]
        expected = Evaluator(model, causal.loss, weighted, carry_size=size)(params)["loss"]
        loss = Evaluator(model, causal.loss, reset, carry_size=CARRY)(params)["loss"]
        assert loss == pytest.approx(expected, rel=1e-6)
    assert Evaluator(model, causal.loss, batches[:2])(params)["loss"] != pytest.approx(float(total / weight), rel=1e-5)
