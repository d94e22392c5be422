"""A training step: updates, skipped steps, gradient accumulation, EMA, sharding and adaptation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import spec
from jaxlm.adapt import Freeze, LoRA
from jaxlm.objectives import causal
from jaxlm.objectives.batch import LossWithTerms, loss_and_terms
from jaxlm.sharding import DATA_PARALLEL, Rules, Sharding, make_mesh
from jaxlm.testing.helpers import (
    assert_trees_close,
    assert_trees_equal,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
)
from jaxlm.training import trainer as trainer_lib
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxlm.training.trainer import Trainer


@functools.cache
def model_optimizer_batch(**overrides):
    model = tiny_model("gpt", num_layers=1, **overrides)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1, epsilon=1e-3), model.specs, 20)
    return model, optimizer, causal.batch(random_tokens(model, 8, 13))


@functools.cache
def compiled_init(**options):
    model, optimizer, _ = model_optimizer_batch()
    return jax.jit(Trainer(model, optimizer, causal.loss, **options).init)


def initial_state(**options):
    return compiled_init(**options)(jax.random.key(0))


def nan_loss(model, params, batch, *, key=None, state=None):
    """The causal loss. It is NaN if the first token of the batch is 0."""
    total, weight, _ = causal.loss(model, params, batch, key=key)
    return total * jnp.where(batch.tokens[0, 0] == 0, jnp.nan, 1.0), weight, None


@functools.cache
def compiled_step(**options):
    model, optimizer, _ = model_optimizer_batch()
    return jax.jit(Trainer(model, optimizer, nan_loss, **options).step)


def test_a_step_equals_value_and_grad_and_an_optax_update():
    model, optimizer, batch = model_optimizer_batch()
    state = initial_state()
    batch.tokens[0, 0] = 3
    key = jax.random.fold_in(state.key, 0)

    def mean_loss(params):
        total, weight, _ = causal.loss(model, params, batch, key=key)
        return total / weight

    @jax.jit
    def update(params, optimizer_state):
        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, _ = optimizer.update(grads, optimizer_state, params)
        return loss, optax.tree.norm(grads), optax.apply_updates(params, updates)

    loss, gradient_norm, params = update(state.params, state.optimizer)
    after, metrics = compiled_step()(state, batch)
    parameter_norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in map(np.asarray, jax.tree.leaves(after.params))))
    assert_trees_close(after.params, params, 1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-6)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(gradient_norm), rel=1e-5)
    assert float(metrics["parameter_norm"]) == pytest.approx(float(parameter_norm), rel=1e-5)
    assert float(metrics["weight"]) == 8 * 12


def test_a_step_with_a_nan_loss_changes_no_bit_and_is_counted():
    _, _, batch = model_optimizer_batch()
    step = compiled_step(ema_decay=0.9)
    bad = dataclasses.replace(batch, tokens=batch.tokens.copy())
    bad.tokens[0, 0], batch.tokens[0, 0] = 0, 3
    before, _ = step(initial_state(ema_decay=0.9), batch)
    after, metrics = step(before, bad)
    for name in ("params", "optimizer", "ema"):
        assert_trees_equal(getattr(after, name), getattr(before, name))
    assert np.isnan(float(metrics["loss"]))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (2, 1, 1)
    after, metrics = step(after, bad)
    assert (int(after.skipped), int(metrics["skipped_in_a_row"])) == (2, 2)
    after, metrics = step(after, batch)
    assert (int(after.skipped), int(metrics["skipped_in_a_row"])) == (2, 0)
    assert not np.array_equal(after.params["token_embedding"], before.params["token_embedding"])


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("count", [2, 8])
def test_gradient_accumulation_equals_the_full_batch_with_uneven_padding(count):
    batch = dataclasses.replace(model_optimizer_batch()[2], weights=np.tri(8, 12, 3).astype(np.float32))
    batch.tokens[0, 0] = 3
    expected, actual = (compiled_step(grad_accum_steps=n)(initial_state(), batch) for n in (1, count))
    assert_trees_close(
        (actual[0].params, actual[0].optimizer, actual[1]),
        (expected[0].params, expected[0].optimizer, expected[1]),
        2e-5,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("count", [1, 2])
def test_the_metrics_have_the_mean_of_each_term_of_the_loss(count):
    model = tiny_model("mixtral-tiny")
    segments = np.ones((4, 11), np.int32)
    segments[0, 4:] = segments[3, :2] = 0  # the two micro-batches have different weights
    batch = causal.batch(random_tokens(model, 4, 11), segments)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), model.specs, 20)
    trainer = Trainer(model, optimizer, causal.training_loss(model), grad_accum_steps=count)
    state = trainer.init(jax.random.key(0))
    micro_batches = [jax.tree.map(lambda x, n=n: x[n::count], batch) for n in range(count)]

    @jax.jit
    def cross_entropy_and_sums(params):
        sums = [loss_and_terms(causal.training_loss(model), model, params, part) for part in micro_batches]
        return causal.loss(model, params, batch)[0], sums

    total, sums = cross_entropy_and_sums(state.params)
    weight = sum(float(part[1]) for part in sums)
    means = {name: sum(float(part[3][name]) for part in sums) / weight for name in sums[0][3]}
    cross_entropy = float(total) / weight
    _, metrics = jax.jit(trainer.step)(state, batch)
    assert float(metrics["load_balance_loss"]) == pytest.approx(means["load_balance_loss"], rel=1e-5)
    assert float(metrics["router_z_loss"]) == pytest.approx(means["router_z_loss"], rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(cross_entropy + 0.01 * means["load_balance_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["weight", "learning_rate", "event", "to_step", "validation_x"])
def test_a_term_with_the_name_of_a_metric_raises_an_error(name):
    model, optimizer, _ = model_optimizer_batch()
    with pytest.raises(ValueError, match=f"terms \\['{name}'\\], which are names of other metrics or begin"):
        Trainer(model, optimizer, LossWithTerms((name,), causal.loss))


def test_terms_must_have_the_names_of_the_loss():
    model, _, batch = model_optimizer_batch()

    def loss(*arguments, **options):
        total, weight, state = causal.loss(*arguments, **options)
        return total, weight, state, {"b": total}

    def named_loss(params):
        return loss_and_terms(LossWithTerms(("a",), loss), model, params, batch)

    with pytest.raises(ValueError, match=r"the loss returned the terms \['b'\], but its names are \['a'\]"):
        jax.eval_shape(named_loss, spec.abstract(model.specs))


def test_a_loss_may_return_numbers_and_must_return_three_values():
    model, optimizer, batch = model_optimizer_batch()

    def loss_with(*results):
        return lambda *arguments, **options: (*causal.loss(*arguments, **options)[:1], *results)

    state = jax.eval_shape(Trainer(model, optimizer, causal.loss).init, jax.random.key(0))
    for count in (1, 2):
        trainer = Trainer(model, optimizer, loss_with(8.0, None), grad_accum_steps=count)
        assert jax.eval_shape(trainer.step, state, batch)[0] == state
    with pytest.raises(ValueError, match=r"must return a tuple \(total, weight, state\), but it returned 2 values"):
        jax.eval_shape(Trainer(model, optimizer, loss_with(8.0)).step, state, batch)


def test_grad_accum_steps_must_divide_the_batch():
    with pytest.raises(ValueError, match="grad_accum_steps=3 does not divide the batch of 8 rows"):
        compiled_step(grad_accum_steps=3)(initial_state(), model_optimizer_batch()[2])


def test_the_shards_of_a_mesh_must_divide_a_micro_batch():
    model, optimizer, batch = model_optimizer_batch()
    sharding = Sharding(make_mesh("data=8"))
    trainer = Trainer(model, optimizer, causal.loss, grad_accum_steps=2, sharding=sharding)
    with pytest.raises(ValueError, match="grad_accum_steps=2 gives micro-batches of 4 of the 8 rows.* into 8 shards"):
        jax.eval_shape(trainer.jit_step(), trainer.abstract(), batch)


def test_a_trainer_without_sharding_has_no_shardings():
    model, optimizer, _ = model_optimizer_batch()
    with pytest.raises(ValueError, match="sharding=None has no shardings: pass a Sharding to Trainer"):
        Trainer(model, optimizer, causal.loss).shardings()


def test_gradient_accumulation_with_a_sharded_batch():
    model, optimizer, batch = model_optimizer_batch()
    batch.tokens[0, 0] = 3
    sharding = Sharding(make_mesh("data=4", devices=jax.devices()[:4]))
    trainer = Trainer(model, optimizer, causal.loss, grad_accum_steps=2, sharding=sharding)
    state = jax.device_put(initial_state(), trainer.shardings())
    actual, expected = trainer.jit_step()(state, batch), compiled_step()(initial_state(), batch)
    assert_trees_close((actual[0].params, actual[1]), (expected[0].params, expected[1]), 2e-5)


def test_ema_is_the_moving_average_of_the_parameters():
    batch = model_optimizer_batch()[2]
    batch.tokens[0, 0] = 3
    state = initial_state(ema_decay=0.9)
    assert_trees_equal(state.ema, state.params)
    after, _ = compiled_step(ema_decay=0.75)(state, batch)
    before, new = jax.device_get((state.params, after.params))
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before, new)
    assert_trees_close(after.ema, expected, 1e-6)


def test_dropout_differs_by_step_and_repeats_by_seed():
    model, optimizer, batch = model_optimizer_batch()
    dropout_model = dataclasses.replace(model, config=dataclasses.replace(model.config, residual_dropout=0.3))
    step = jax.jit(Trainer(dropout_model, optimizer, causal.loss).step)
    state = initial_state()
    loss, repeated = step(state, batch)[1]["loss"], step(state, batch)[1]["loss"]
    next_step = step(state.replace(step=state.step + 1), batch)[1]["loss"]
    assert float(loss) == float(repeated)
    assert float(loss) != float(next_step)


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"vocab_size": 100}, {"max_positions": 16}])
def test_parameters_of_another_model_raise_an_error(change):
    model, optimizer, _ = model_optimizer_batch()
    params = spec.abstract(model.with_fields(**change).specs)
    trainer = Trainer(model, optimizer, causal.loss)
    for function in (trainer.abstract, lambda params: trainer.init(jax.random.key(0), params)):
        with pytest.raises(ValueError, match="parameters of gpt do not match"):
            function(params)


def test_training_rejects_bfloat16_parameters():
    model, optimizer, _ = model_optimizer_batch()
    bfloat16_params = jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16), initial_state().params)
    with pytest.raises(ValueError, match="training needs float32 parameters, 'final_norm/bias' is bfloat16: convert"):
        Trainer(model, optimizer, causal.loss).init(jax.random.key(0), bfloat16_params)


def test_a_step_passes_the_gradient_norm_to_the_optimizer():
    """Compare an optimizer that accepts ``gradient_norm`` and clips by it with an optimizer that computes the norm."""
    model, optimizer, batch = model_optimizer_batch()
    argument_names = []

    def update(updates, state, params=None, **extra_args):
        argument_names.append(set(extra_args))
        return optimizer.update(updates, state, params, **extra_args)

    batch.tokens[0, 0] = 3
    expected, _ = compiled_step()(initial_state(), batch)
    plain = optax.GradientTransformation(optimizer.init, lambda grads, state, params=None: update(grads, state, params))
    for wrapped in (plain, optax.GradientTransformationExtraArgs(optimizer.init, update)):
        step = jax.jit(Trainer(model, wrapped, nan_loss).step)
        assert_trees_close(step(initial_state(), batch)[0].params, expected.params, 1e-6)
    assert argument_names == [set(), {"value", "gradient", "gradient_norm"}]


def test_an_optimizer_reads_the_loss():
    """Each step adds its update to the loss. The loss does not fall, so the second and third update are halved."""
    model, _, batch = model_optimizer_batch()
    optimizer = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))

    def loss(model, params, batch, *, key=None, state=None):
        bias = params["final_norm"]["bias"][0]
        return jax.lax.stop_gradient(-2.0 * bias) + bias, jnp.ones(()), None

    state = initial_state()
    state = dataclasses.replace(state, optimizer=optimizer.init(state.params))
    step = jax.jit(Trainer(model, optimizer, loss).step)
    values = []
    for _ in range(3):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss"]))
    assert values == [0.0, 1.0, 1.5]


def test_clipping_uses_the_norm_of_the_updates_that_it_gets():
    """The norm 100 of the gradient is 0.1 after the first transformation, which is below clip_norm."""
    model, _, batch = model_optimizer_batch()

    def loss(model, params, batch, *, key=None, state=None):
        return 100.0 * params["final_norm"]["bias"][0], jnp.ones(()), None

    config = OptimizerConfig(
        "sgd", learning_rate=1.0, schedule="constant", warmup_steps=0, weight_decay=0.0, beta1=0.0, clip_norm=1.0
    )
    clipped = make_optimizer(config, model.specs, 10)
    state = initial_state()
    for optimizer, update in ((clipped, 1.0), (optax.chain(optax.scale(0.001), clipped), 0.1)):
        started = dataclasses.replace(state, optimizer=optimizer.init(state.params))
        after, metrics = jax.jit(Trainer(model, optimizer, loss).step)(started, batch)
        assert float(metrics["gradient_norm"]) == pytest.approx(100.0)
        assert float(after.params["final_norm"]["bias"][0]) == pytest.approx(-update, rel=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_abstract_has_the_shapes_dtypes_and_shardings_of_the_state(scan_layers):
    model, optimizer, _ = model_optimizer_batch(scan_layers=scan_layers)
    sharding = Sharding(make_mesh("fsdp=4,tensor=2"))
    trainer = Trainer(model, optimizer, causal.loss, ema_decay=0.9, sharding=sharding, spike_deviations=6.0)
    abstract, state = trainer.abstract(), trainer.init(jax.random.key(0))
    expected = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract) == expected
    layers = state.optimizer[1].mu["layers"]
    moments = (layers if scan_layers else layers[0])["mlp"]["up"]["weight"]
    assert moments.sharding.spec == jax.sharding.PartitionSpec(*[None] * scan_layers, "fsdp", "tensor")


@pytest.mark.parametrize("reverse", [False, True])
def test_parameters_on_other_devices_are_copied_to_the_mesh(reverse):
    """Parameters and key are committed to one device, or to all devices in reverse order."""
    model, optimizer, batch = model_optimizer_batch()
    sharding = Sharding(make_mesh("fsdp=4,tensor=2"))
    trainer = Trainer(model, optimizer, causal.loss, sharding=sharding)
    other = Sharding(make_mesh("fsdp=8", devices=jax.devices()[::-1]))
    placements = (other.replicated(), other.tree(model.specs)) if reverse else jax.devices()[3]
    key, params = jax.device_put((jax.random.key(0), jax.device_get(initial_state().params)), placements)
    state = trainer.init(key, params)
    assert_trees_equal(state.params, params)
    assert jax.tree.map(lambda x: x.sharding, state.params) == sharding.tree(model.specs)
    evaluate = Evaluator(model, causal.loss, [batch], sharding=sharding)
    assert evaluate(params) == evaluate(state.params)


# ----------------------------------------------------------------------------- optimizer and adaptation


def first_updates(optimizer, gradients, params):
    """The updates of the first step, as NumPy arrays."""
    update = jax.jit(lambda gradients, params: optimizer.update(gradients, optimizer.init(params), params)[0])
    return jax.device_get(update(gradients, params))


def test_schedules_have_a_warm_up_and_the_given_final_rate():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    rate = learning_rate(config, 110)
    assert float(rate(0)) == pytest.approx(1 / 11)
    assert float(rate(10)) == pytest.approx(1.0)
    assert float(rate(60)) == pytest.approx(0.55)
    assert float(rate(110)) == pytest.approx(0.1)
    assert float(learning_rate(dataclasses.replace(config, schedule="linear"), 110)(60)) == pytest.approx(0.55)
    assert float(learning_rate(dataclasses.replace(config, schedule="constant"), 110)(109)) == pytest.approx(1.0)


def test_weight_decay_applies_to_weights_only():
    model, _, _ = model_optimizer_batch()
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, schedule="constant", clip_norm=None)
    optimizer = make_optimizer(config, model.specs, 10)
    params = jax.tree.map(lambda spec: np.ones(spec.shape, np.float32), model.specs)
    updates = first_updates(optimizer, jax.tree.map(np.zeros_like, params), params)
    assert float(updates["token_embedding"][0, 0]) == pytest.approx(-0.05)
    assert float(updates["layers"][0]["mlp"]["up"]["weight"][0, 0]) == pytest.approx(-0.05)
    assert float(updates["layers"][0]["mlp"]["up"]["bias"][0]) == 0.0
    assert float(updates["final_norm"]["scale"][0]) == 0.0
    assert float(updates["layers"][0]["attention"]["qkv"]["bias"][0, 0, 0]) == 0.0


def test_clipping_limits_the_gradient_norm():
    model, _, _ = model_optimizer_batch()
    config = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=0,
        schedule="constant",
        clip_norm=1.0,
        weight_decay=0.0,
        beta1=0.0,
        beta2=0.0,
        epsilon=1.0,
    )
    params = jax.tree.map(lambda spec: np.zeros(spec.shape, np.float32), model.specs)
    grads = jax.tree.map(lambda p: np.full_like(p, 7.0), params)
    updates = first_updates(make_optimizer(config, model.specs, 10), grads, params)
    clipped_entry = 1.0 / model.num_parameters**0.5
    assert float(updates["token_embedding"][0, 0]) == pytest.approx(-clipped_entry / (clipped_entry + 1.0), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"beta2": 1.0}, r"beta2=1.0 must be in \[0, 1\)"),
        ({"final_fraction": 2.0}, "final_fraction=2.0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0 must be positive, or None"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_bad_optimizer_configs_raise_an_error_with_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_accum_steps": 0}, "grad_accum_steps=0 must be at least 1"),
        ({"ema_decay": 1.5}, "ema_decay=1.5 must be between 0 and 1, or None"),
        ({"spike_deviations": 0.0}, "spike_deviations=0.0 must be positive, or None"),
    ],
)
def test_bad_settings_of_a_trainer_raise_an_error_with_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_model("gpt2-tiny"), optax.sgd(0.1), causal.loss, **change)


def test_shard_map_needs_a_mesh_that_splits_no_parameter(monkeypatch):
    model = tiny_model("gpt2-tiny")
    with pytest.raises(ValueError, match="shard_map=True needs a mesh: pass a sharding"):
        Trainer(model, optax.sgd(0.1), causal.loss, shard_map=True)
    sharding = Sharding(make_mesh("fsdp=4,data=2"))
    with pytest.raises(ValueError, match=r"the mesh \{'fsdp': 4, 'data': 2\} splits '.*': use only the mesh axis data"):
        Trainer(model, optax.sgd(0.1), causal.loss, sharding=sharding, shard_map=True)
    sharding = Sharding(make_mesh("data=4,sequence=2"))
    with pytest.raises(ValueError, match=r"whose axes all split the batch, got {'data': 4, 'sequence': 2}: use only"):
        Trainer(model, optax.sgd(0.1), causal.loss, sharding=sharding, shard_map=True)
    only_the_norm = Freeze((r"^(?!final_norm)",))  # the frozen parameters count too
    sharding = Sharding(make_mesh("data=4,tensor=2"), DATA_PARALLEL | Rules.of(mlp="tensor") | Rules.of(batch="tensor"))
    with pytest.raises(ValueError, match=r"splits 'layers.*mlp"):
        Trainer(model, optax.sgd(0.1), causal.loss, adaptation=only_the_norm, sharding=sharding, shard_map=True)
    monkeypatch.setattr(trainer_lib, "platform", lambda: "gpu")
    with pytest.raises(ValueError, match="a mesh over devices of JAX's default platform, gpu, got cpu: set"):
        Trainer(model, optax.sgd(0.1), causal.loss, sharding=Sharding(make_mesh("data=8")), shard_map=True)


def test_a_trainer_needs_an_optax_optimizer():
    with pytest.raises(TypeError, match="a Trainer needs an Optax optimizer: use make_optimizer"):
        Trainer(tiny_model("gpt2-tiny"), OptimizerConfig(), causal.loss)


def test_bad_schedules_raise_an_error():
    with pytest.raises(ValueError, match="warmup_steps=100 must be fewer than the 100 steps"):
        learning_rate(OptimizerConfig(), 100)
    with pytest.raises(ValueError, match="schedule='cosin' is unknown: choose from 'cosine'"):
        learning_rate(OptimizerConfig(schedule="cosin"), 1000)


def test_abstract_keeps_the_dtype_of_frozen_parameters():
    model, lora = model_optimizer_batch()[0], LoRA(2)
    trainer = Trainer(model, optax.sgd(0.1), causal.loss, adaptation=lora)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), spec.abstract(model.specs))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainer.abstract(params).frozen)} == {"bfloat16"}


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("adaptation", [LoRA(2, alpha=4.0), Freeze(("embedding",))])
def test_only_adapted_parameters_are_trained_and_have_optimizer_state(adaptation, scan_layers):
    model, _, batch = model_optimizer_batch(scan_layers=scan_layers)
    batch.tokens[0, 0] = 3
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=1), adaptation.specs(model.specs), 20)
    trainer = Trainer(model, optimizer, causal.loss, ema_decay=0.5, adaptation=adaptation)
    params = initial_params(model, 3)
    state = trainer.init(jax.random.key(0), params)
    assert_trees_close(trainer.model_params(state), params, 1e-7)
    frozen = jax.tree.map(np.array, state.frozen)
    step, losses = trainer.jit_step(), []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert_trees_equal(state.frozen, frozen)
    assert spec.differences(trainer.specs, state.params) == spec.differences(trainer.specs, state.ema) == []
    merged = trainer.model_params(state)
    assert spec.differences(model.specs, merged) == []
    assert_trees_equal(merged["token_embedding"], params["token_embedding"])
    weight = "layers/attention/qkv/weight" if scan_layers else "layers/0/attention/qkv/weight"
    assert relative_error(spec.flatten(merged)[weight], spec.flatten(params)[weight]) > 1e-4
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * spec.count(adaptation.specs(model.specs))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_abstract_describes_an_adapted_and_sharded_state(name):
    model, _, batch = model_optimizer_batch()
    batch.tokens[0, 0] = 3
    adaptation, sharding = LoRA(4), Sharding(make_mesh("fsdp=4,tensor=2"))
    optimizer = make_optimizer(OptimizerConfig(name=name, warmup_steps=1), adaptation.specs(model.specs), 20)
    trainer = Trainer(model, optimizer, causal.loss, adaptation=adaptation, sharding=sharding)
    state = trainer.init(jax.random.key(0))
    describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.sharding))
    assert describe(trainer.abstract()) == describe(state)
    unsharded = dataclasses.replace(trainer, sharding=None)
    expected, _ = unsharded.jit_step()(unsharded.init(jax.random.key(0)), batch)
    actual, _ = trainer.jit_step()(state, batch)
    assert_trees_close(actual.params, expected.params, 2e-4)
