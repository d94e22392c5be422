"""Training along a stream: the state that a model carries from batch to batch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.checkpoint import Checkpointer
from jaxlm.data import Columns
from jaxlm.objectives import causal, objective
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.trainer import Trainer
from tests.helpers import (
    TINY,
    add_noise,
    assert_trees_close,
    assert_trees_equal,
    decodes,
    random_tokens,
    relative_error,
    task_of,
    tiny_model,
    variant_params,
)

ROWS, LENGTH, MEMORY = 8, 6, 24
STREAM = (ROWS, MEMORY)
READERS = [name for name in TINY if decodes(tiny_model(name)) and task_of(tiny_model(name)) != "seq2seq"]


@functools.partial(jax.jit, static_argnums=0)
def loss_of(model: Any, params: Any, batch: Any, state: Any) -> Any:
    return objective(task_of(model)).loss(model, params, batch, state=state)


@pytest.mark.parametrize("name", variant_params(READERS))
def test_a_text_in_pieces_costs_what_it_costs_whole(name: str) -> None:
    model = tiny_model(name)
    params = add_noise(jax.jit(model.init)(jax.random.key(0)))
    tokens = random_tokens(model, 2, 19)
    whole, _, _ = loss_of(model, params, causal.batch(tokens), model.init_state(2, MEMORY))
    pieces, state = [], model.init_state(2, MEMORY)
    for start in (0, 6, 12):
        total, _, state = loss_of(model, params, causal.batch(tokens[:, start : start + 7]), state)
        pieces.append(float(total))
    assert relative_error(sum(pieces), whole) < 2e-5


def test_no_gradient_flows_into_the_past() -> None:
    model = tiny_model("lstm-tiny")
    params = add_noise(jax.jit(model.init)(jax.random.key(0)))
    batch = causal.batch(random_tokens(model, 2, 7))
    state = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), model.init_state(2, 1))
    floats, tree = jax.tree.flatten(state)
    grads = jax.grad(
        lambda leaves: causal.loss(model, params, batch, state=jax.tree.unflatten(tree, leaves))[0], allow_int=True
    )(floats)
    assert not any(np.any(np.asarray(grad, np.float32)) for grad in grads if grad.dtype != jax.dtypes.float0)


@functools.cache
def setup(name: str) -> tuple[Any, Any, Any]:
    model = tiny_model(name)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1, learning_rate=1e-2, epsilon=1e-3), model.specs, 40)
    columns = Columns(random_tokens(model, 1, ROWS * 3 * LENGTH + 1)[0], LENGTH, ROWS)
    batches = [columns.batch(i, range(ROWS)) for i in range(4)]
    return model, optimizer, [causal.batch(window.tokens, reset=window.reset) for window in batches]


def trainer_of(model: Any, optimizer: Any, **options: Any) -> Trainer:
    return Trainer(model, optimizer, causal.loss, carry=STREAM, **options)


def fresh(model: Any, optimizer: Any) -> Any:
    return trainer_of(model, optimizer).init(jax.random.key(0))


@pytest.mark.parametrize("name", ["lstm-tiny", "transformer-xl-tiny"])
def test_a_step_carries_the_state_on_and_starts_anew_where_told(name: str) -> None:
    model, optimizer, batches = setup(name)
    step = trainer_of(model, optimizer).jit_step()
    state = fresh(model, optimizer)
    carried = []
    for batch in batches[:2]:
        params = jax.tree.map(jnp.copy, state.params)
        expected = causal.loss(model, params, batch, state=state.model_state)[2]
        state, _ = step(state, batch)
        assert_trees_close(state.model_state, expected, 2e-5)
        assert spec.diff(model.state_specs(*STREAM), state.model_state) == []
        carried.append(jax.device_get(state.model_state))
    assert step._cache_size() == 1
    # The fourth batch begins the next epoch: what came before is forgotten.
    assert batches[3].reset.all()
    params = jax.tree.map(jnp.copy, state.params)
    expected = causal.loss(model, params, batches[3], state=model.init_state(*STREAM))[2]
    state, _ = step(state, batches[3])
    assert_trees_close(state.model_state, expected, 2e-5)


def test_a_step_that_is_skipped_carries_nothing_on() -> None:
    model, optimizer, batches = setup("lstm-tiny")
    step = trainer_of(model, optimizer).jit_step()
    state, _ = step(fresh(model, optimizer), batches[0])
    before = jax.device_get(state.model_state)
    bad = batches[1].replace(tokens=np.full_like(batches[1].tokens, model.config.vocab_size))
    state, metrics = step(state, bad)
    assert metrics["skipped"] == 1
    assert_trees_equal(state.model_state, before)


@pytest.mark.parametrize("name", ["lstm-tiny", "transformer-xl-tiny"])
def test_streams_split_over_devices_and_come_back_from_checkpoints(name: str, tmp_path: Any) -> None:
    model, optimizer, batches = setup(name)
    single = trainer_of(model, optimizer).jit_step()
    want = fresh(model, optimizer)
    for batch in batches[:2]:
        want, _ = single(want, batch)
    sharding = Sharding(make_mesh("data=2,fsdp=2,tensor=2"))
    split = trainer_of(model, optimizer, sharding=sharding).jit_step()
    state = trainer_of(model, optimizer, sharding=sharding).init(jax.random.key(0))
    state, _ = split(state, batches[0])
    target = trainer_of(model, optimizer, sharding=sharding).abstract()
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        restored, _ = checkpoints.restore(target)
    assert_trees_equal(restored, state)
    restored, _ = split(restored, batches[1])
    assert_trees_close(restored.params, want.params, 1e-4)
    assert_trees_close(restored.model_state, want.model_state, 1e-4)


def test_a_batch_of_streams_cannot_be_cut_into_parts() -> None:
    model, optimizer, batches = setup("lstm-tiny")
    step = trainer_of(model, optimizer, grad_accum_steps=2).jit_step()
    with pytest.raises(ValueError, match="grad_accum_steps=2 cannot split a batch whose rows carry state"):
        step(fresh(model, optimizer), batches[0])


def test_an_evaluation_carries_the_state_too() -> None:
    model, _, batches = setup("lstm-tiny")
    params = add_noise(jax.jit(model.init)(jax.random.key(0)))
    whole = causal.batch(
        np.concatenate([batches[0].tokens, batches[1].tokens, batches[1].targets[:, -1:]], axis=1)
    )  # fmt: skip
    total, weight, _ = causal.loss(model, params, whole)
    evaluate = Evaluator(model, causal.loss, batches[:2], carry=STREAM)
    assert evaluate(params)["loss"] == pytest.approx(float(total / weight), rel=1e-5)
    assert Evaluator(model, causal.loss, batches[:2])(params)["loss"] != pytest.approx(float(total / weight), rel=1e-5)
