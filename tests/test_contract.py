"""The contract of a family (docs/tour.md), tested for EVERY family. A line in FAMILIES is all that a new one needs."""

import dataclasses
import functools
from pathlib import Path

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.checkpoint import Checkpointer
from jaxlm.models import FAMILIES, get_model
from jaxlm.models.model import family
from jaxlm.objectives import causal
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.training import step as step_lib
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from tests.helpers import (
    assert_trees_close,
    assert_trees_equal,
    lively,
    random_tokens,
    relative_error,
    tiny_model,
)

TOLERANCE = 2e-5  # float32, other orders of summation
STEP_TOLERANCE = 1e-4  # the same after Adam, which divides small gradients by their own size

pytestmark = pytest.mark.parametrize("name", FAMILIES)


def setup(name, batch=2, length=24, **overrides):
    model = tiny_model(name, **overrides)
    return model, lively(initial(model)), random_tokens(model, batch, length)


@functools.cache
def initial(model):
    return jax.jit(model.init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(model, params, tokens, **inputs):
    return model.apply(params, tokens, **inputs)[0]


def loss_of(model, params, batch, key=None):
    total, weight = causal.loss(model, params, batch, key=key)
    return total / weight


def test_config_is_frozen_hashable_and_has_only_plain_fields(name):
    model = tiny_model(name)
    assert hash(model) == hash(dataclasses.replace(model))
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.vocab_size = 7


def test_every_config_field_has_a_docstring(name):
    text = Path(family(name).__file__).read_text(encoding="utf-8")
    body = text[text.index("class Config") : text.index("def __post_init__")]
    for field in dataclasses.fields(family(name).Config):
        after = body.split(f"\n    {field.name}:")[1].split("\n")[1]
        assert after.strip().startswith('"""'), f"{field.name} has no docstring, so --help would not explain it"


def test_specs_are_hashable_and_stable(name):
    model = tiny_model(name)
    one, two = spec.flatten(model.specs), spec.flatten(model.specs)
    assert {path: hash(leaf) for path, leaf in one.items()} == {path: hash(leaf) for path, leaf in two.items()}
    assert one == two
    assert not any("." in part for path in one for part in path.split("/"))


def test_init_depends_on_path_and_layer_only(name):
    model = tiny_model(name)
    params = spec.flatten(model.init(jax.random.key(0)))
    without_neighbours = {
        path: spec.init({path: leaf}, jax.random.key(0))[path] for path, leaf in _by_path(model).items()
    }
    assert_trees_equal(params, without_neighbours)
    deeper = dataclasses.replace(
        model, config=dataclasses.replace(model.config, num_layers=model.config.num_layers + 1)
    )
    for path, leaf in spec.flatten(deeper.init(jax.random.key(0))).items():
        if path.startswith("layers/") and spec.flatten(model.specs)[path].init == spec.flatten(deeper.specs)[path].init:
            assert_trees_equal(leaf[: model.config.num_layers], params[path])
    assert not np.array_equal(*(jax.tree.leaves(model.init(jax.random.key(seed)))[-1] for seed in (0, 1)))


def _by_path(model):
    return spec.flatten(model.specs)


def test_abstract_equals_real(name):
    model, params, _ = setup(name)
    assert spec.diff(model.specs, params) == []
    traced = jax.eval_shape(model.init, jax.random.key(0))
    assert spec.diff(spec.abstract(model.specs), traced) == []
    assert model.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_jit_equals_no_jit(name):
    model, params, tokens = setup(name)
    plain, _ = model.apply(params, tokens)
    assert relative_error(hidden_of(model, params, tokens), plain) < TOLERANCE
    logits = model.logits(params, plain)
    assert logits.dtype == jnp.float32
    assert relative_error(jax.jit(model.logits)(params, plain), logits) < TOLERANCE


@pytest.mark.parametrize(
    "change", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}, {"attention_implementation": "blockwise"}]
)
def test_how_it_is_computed_does_not_change_what(name, change):
    if not {field.name for field in dataclasses.fields(family(name).Config)} >= set(change):
        change = {}  # a family without that choice: the comparison is with itself
    model, params, tokens = setup(name)
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
    batch, key = causal.batch(tokens), jax.random.key(3)
    want = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, batch, key)))(params)
    got = jax.jit(jax.value_and_grad(lambda p: loss_of(other, p, batch, key)))(params)
    assert_trees_close(got, want, TOLERANCE)


def test_layers_taken_apart_give_what_the_stack_gives(name):
    model, params, tokens = setup(name)
    apart = jax.jit(spec.unstack)(params)
    assert jax.tree.structure(apart) != jax.tree.structure(params)
    key = jax.random.key(2)
    assert (
        relative_error(hidden_of(model, apart, tokens, key=key), hidden_of(model, params, tokens, key=key)) < TOLERANCE
    )
    states = []
    for weights in (params, apart):
        step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
        hidden, state = step(weights, tokens[:, :7], model.init_state(2, 9))
        states.append((hidden, step(weights, tokens[:, 7:9], state)))
    assert_trees_close(states[1], states[0], TOLERANCE)


def test_dropout_acts_by_key_and_only_with_one(name):
    config = tiny_model(name).config
    rates = {field.name: 0.2 for field in dataclasses.fields(config) if field.name.endswith("dropout")}
    model, params, tokens = setup(name, **rates)
    calm = hidden_of(model, params, tokens)
    one, same, other = (hidden_of(model, params, tokens, key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert_trees_equal(one, same)
    assert relative_error(one, calm) > 1e-2
    assert relative_error(one, other) > 1e-2
    for rate in rates:
        alone = dataclasses.replace(model, config=dataclasses.replace(config, **{rate: 0.2}))
        assert relative_error(hidden_of(alone, params, tokens, key=jax.random.key(1)), calm) > 1e-3, (
            f"{rate} does nothing"
        )


def test_no_recompilation_on_the_second_call(name):
    model, params, tokens = setup(name)
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    state = jax.jit(model.init_state, static_argnums=(0, 1))(2, 16)
    for at in range(4):
        _, state = step(params, tokens[:, at : at + 1], state)
    assert step._cache_size() == 1


def test_bfloat16_is_finite_and_near_float32(name):
    model, params, tokens = setup(name)
    low = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype="bfloat16"))
    hidden = hidden_of(low, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert relative_error(hidden.astype(jnp.float32), hidden_of(model, params, tokens)) < 0.05
    grads = jax.jit(jax.grad(lambda p: loss_of(low, p, causal.batch(tokens))))(params)
    assert all(leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_causality_by_gradient(name):
    """d hidden[t] / d embedding[s] is exactly 0 for s > t and not 0 for s <= t."""
    model, params, tokens = setup(name, batch=1, length=9)
    tokens = np.arange(9, dtype=np.int32)[None]  # distinct, so that each row of the table stands for one place

    def hidden(table, t):
        return model.apply({**params, "token_embedding": table}, tokens)[0][0, t]

    jacobian = jax.jit(jax.jacrev(lambda table: jnp.stack([hidden(table, t) for t in range(9)])))(
        params["token_embedding"]
    )
    influence_TS = np.abs(np.asarray(jacobian)[:, :, :9]).max(axis=(1, 3))
    assert np.all(influence_TS[np.triu_indices(9, 1)] == 0.0)
    assert np.all(influence_TS[np.tril_indices(9)] > 0.0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    model, params, tokens = setup(name, batch=3, length=12)
    lengths = (12, 7, 4)
    padded, segments = np.full((3, 12), 5, np.int32), np.zeros((3, 12), np.int32)
    places = [slice(12 - n, 12) if side == "left" else slice(0, n) for n in lengths]
    for row, place in enumerate(places):
        padded[row, place], segments[row, place] = tokens[row, : lengths[row]], 1
    hidden = hidden_of(model, params, padded, segment_ids=segments)
    assert np.isfinite(np.asarray(hidden)).all()
    for row, place in enumerate(places):
        alone = hidden_of(model, params, tokens[row : row + 1, : lengths[row]])
        assert relative_error(hidden[row, place], alone[0]) < TOLERANCE


def test_packed_equals_separate(name):
    model, params, tokens = setup(name, batch=1, length=30)
    borders = (0, 11, 14, 27)  # three documents, then padding
    segments = np.zeros((1, 30), np.int32)
    for number, (start, stop) in enumerate(zip(borders, borders[1:], strict=False), start=1):
        segments[:, start:stop] = number
    packed = hidden_of(model, params, tokens, segment_ids=segments)
    for start, stop in zip(borders, borders[1:], strict=False):
        alone = hidden_of(model, params, tokens[:, start:stop])
        assert relative_error(packed[:, start:stop], alone) < TOLERANCE
    batch = causal.batch(tokens, segments)
    total = causal.loss(model, params, batch)[0]
    parts = [
        causal.loss(model, params, causal.batch(tokens[:, a:b]))[0] for a, b in zip(borders, borders[1:], strict=False)
    ]
    assert relative_error(total, sum(parts)) < TOLERANCE


@pytest.mark.parametrize("cuts", [(5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8), (16,), (3, 11)])
def test_cached_equals_full_at_every_position(name, cuts):
    """Prefill, chunks and single steps all give what one call gives."""
    model, params, tokens = setup(name, batch=2, length=17)
    state, pieces = model.init_state(2, 20), []
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    for start, stop in zip((0, *cuts), (*cuts, 17), strict=True):
        hidden, state = step(params, tokens[:, start:stop], state)
        pieces.append(hidden)
    assert relative_error(jnp.concatenate(pieces, axis=1), hidden_of(model, params, tokens)) < TOLERANCE
    assert spec.diff(model.state_specs(2, 20), state) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_unequal_length_decode_as_they_would_alone(name, side):
    model, params, tokens = setup(name, batch=3, length=14)
    lengths = (9, 4, 1)
    prompt, segments = np.full((3, 9), 7, np.int32), np.zeros((3, 9), np.int32)
    for row, n in enumerate(lengths):
        place = slice(9 - n, 9) if side == "left" else slice(0, n)
        prompt[row, place], segments[row, place] = tokens[row, :n], 1
    _, state = model.apply(params, prompt, state=model.init_state(3, 14), segment_ids=segments)
    pieces = []
    for i in range(5):
        following = np.stack([tokens[row, n + i] for row, n in enumerate(lengths)])[:, None]
        hidden, state = model.apply(params, following, state=state)
        pieces.append(hidden[:, 0])
    for row, n in enumerate(lengths):
        alone = hidden_of(model, params, tokens[row : row + 1, : n + 5])[0, n:]
        assert relative_error(jnp.stack([piece[row] for piece in pieces]), alone) < TOLERANCE


def test_rows_reorder_and_reset_by_axis_name(name):
    model, params, tokens = setup(name, batch=3, length=10)
    specs = model.state_specs(3, 12)
    assert all("batch" in leaf.axes for leaf in jax.tree.leaves(specs))
    _, state = model.apply(params, tokens[:, :8], state=model.init_state(3, 12))
    order = np.array([2, 0, 0])
    after, _ = model.apply(params, tokens[order][:, 8:], state=spec.take(specs, state, jnp.asarray(order)))
    assert relative_error(after, hidden_of(model, params, tokens[order])[:, 8:]) < TOLERANCE
    fresh, _ = model.apply(params, tokens[:, 8:], state=spec.reset(specs, state, jnp.array([True, False, True])))
    alone = hidden_of(model, params, tokens[:, 8:])
    assert relative_error(fresh[0::2], alone[0::2]) < TOLERANCE
    assert relative_error(fresh[1], hidden_of(model, params, tokens)[1, 8:]) < TOLERANCE


def test_running_past_the_state_is_not_silent(name):
    """A state with room for fewer tokens than fed: an error when shapes tell, NaN when only the data does."""
    model, params, tokens = setup(name, batch=2, length=6)
    specs = model.state_specs(2, 4)
    if not any(4 in leaf.shape for leaf in jax.tree.leaves(specs)):
        assert model.state_specs(2, 4) == model.state_specs(2, 400)  # the state does not grow: nothing to run past
        return
    with pytest.raises(ValueError, match="6 new tokens do not fit a state of 4 slots"):
        model.apply(params, tokens, state=model.init_state(2, 4))
    _, state = model.apply(params, tokens[:, :3], state=model.init_state(2, 4))
    hidden, _ = model.apply(params, tokens[:, 3:], state=state)
    assert np.isnan(np.asarray(hidden)).all()


def test_an_id_outside_the_vocabulary_is_not_silent(name):
    model, params, tokens = setup(name)
    for bad in (model.config.vocab_size, -1):
        wrong = tokens.copy()
        wrong[0, 3] = bad
        assert np.isnan(np.asarray(hidden_of(model, params, wrong))[0, 3]).any()


def test_bad_inputs_are_named(name):
    model, params, tokens = setup(name)
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \[batch, time\], got float32"):
        model.apply(params, tokens.astype(np.float32))
    with pytest.raises(ValueError, match="tokens must be integers"):
        model.apply(params, tokens[0])
    with pytest.raises(ValueError, match=r"segment_ids \[2, 3\] must have the shape of tokens \[2, 24\]"):
        model.apply(params, tokens, segment_ids=np.ones((2, 3), np.int32))
    with pytest.raises(ValueError, match="did you mean 'vocab_size'"):
        get_model(name, vocab_sice=3)


# ------------------------------------------------------------------------------------- training and sharding


@functools.cache
def training(name, batch=16):
    model = tiny_model(name, vocab_multiple=8)
    # A large epsilon: gradients that are 0 but for rounding (those of key biases) must not be blown up to whole steps.
    config = OptimizerConfig(warmup_steps=1, learning_rate=1e-2, epsilon=1e-3)
    optimizer = make_optimizer(config, model.specs, 40)
    return model, optimizer, causal.batch(random_tokens(model, batch, 17))


@functools.cache
def single_step(name):
    """The compiled step on one device: (step, function that makes a fresh state, result of the first step)."""
    model, optimizer, batch = training(name)
    step = step_lib.jit_step(model, optimizer, causal.loss)
    host_state = jax.device_get(step_lib.init_state(model, optimizer, jax.random.key(0)).replace(key=None))

    def fresh():
        return jax.tree.map(jnp.array, host_state).replace(key=jax.random.key(5))

    return step, fresh, after_one_step(step, fresh(), batch)


def after_one_step(step, state, batch):
    state, metrics = step(state, batch)
    return jax.device_get((state.params, state.optimizer, metrics))


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,tensor=4", "data=2,fsdp=2,tensor=2", "fsdp=4,sequence=2"])
def test_sharded_step_equals_single(name, mesh):
    """Loss, gradients (Adam's first moment is a tenth of them) and the updated parameters."""
    model, optimizer, batch = training(name)
    _, fresh, want = single_step(name)
    sharding = Sharding(make_mesh(mesh))
    state = jax.device_put(fresh(), step_lib.state_sharding(model, optimizer, sharding))
    got = after_one_step(step_lib.jit_step(model, optimizer, causal.loss, sharding=sharding), state, batch)
    assert_trees_close(got, want, STEP_TOLERANCE)


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_same_seed_same_parameters_on_any_mesh(name, mesh):
    model, _, _ = training(name)
    sharding = Sharding(make_mesh(mesh))
    split = jax.jit(model.init, out_shardings=sharding.tree(model.specs))(jax.random.key(0))
    assert_trees_equal(split, initial(model))


def test_pmap_equals_single(name):
    model, optimizer, batch = training(name)
    _, fresh, want = single_step(name)
    rows = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    step = step_lib.pmap_step(model, optimizer, causal.loss)
    got = after_one_step(step, flax.jax_utils.replicate(fresh()), rows)
    for device in (0, 7):
        assert_trees_close(jax.tree.map(lambda x, device=device: x[device], got), want, STEP_TOLERANCE)


def test_runs_under_an_explicit_mesh_and_in_shard_map(name):
    model, params, tokens = setup(name, batch=8)
    want = hidden_of(model, params, tokens)
    rows, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        lambda p, t: model.apply(p, t)[0], mesh=make_mesh("data=8"), in_specs=(everywhere, rows), out_specs=rows,
        check_vma=False,
    )  # fmt: skip
    assert relative_error(jax.jit(mapped)(params, tokens), want) < TOLERANCE
    mesh = make_mesh("data=8", axis_type=jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, tokens), (everywhere, rows))
        hidden = jax.jit(lambda p, t: model.apply(p, t)[0])(*placed)
    assert hidden.sharding.spec[0] == "data"
    assert relative_error(hidden, want) < TOLERANCE


def test_checkpoint_round_trip(name, tmp_path):
    model, optimizer, batch = training(name)
    step, fresh, _ = single_step(name)
    state, _ = step(fresh(), batch)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"family": name}, wait=True)
        restored, meta = checkpoints.restore(step_lib.abstract_state(model, optimizer))
    assert meta["family"] == name
    assert_trees_equal(restored, state)
    assert_trees_equal(step(restored, batch), step(state, batch))


def test_loss_falls_in_twenty_steps_without_recompiling(name):
    model, _, batch = training(name)
    step, fresh, _ = single_step(name)
    compiled = step._cache_size()
    state, losses = fresh(), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(np.log(model.config.vocab_size), rel=0.05)
    assert losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == max(compiled, 1)
