"""Optimizers treat each layer and each matrix separately, for stacked and per-layer parameters.

Also schedules, layer-wise learning rates and recipes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from jaxlm import spec
from jaxlm.adapt import Freeze, LoRA
from jaxlm.config import from_json, to_json
from jaxlm.models import FAMILIES
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import (
    add_noise,
    assert_trees_close,
    assert_trees_equal,
    initial_params,
    tiny_model,
    with_stacked_layers,
)
from jaxlm.training.nt_asgd import mean_params, start_averaging
from jaxlm.training.optimizer import (
    MUON_RMS,
    OptimizerConfig,
    layer_learning_rate_factors,
    learning_rate,
    make_optimizer,
    muon_dimension_numbers,
    optimizer_sharding,
)
from jaxlm.training.recipes import RECIPES, recipe

NAMES = ("adamw", "adafactor", "muon", "sgd", "nt_asgd", "adadelta")
T5 = tiny_model("t5", num_layers=2, num_decoder_layers=3, scan_layers=True)
PLAIN = {"learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": None}


def params_and_gradients(model, count=2):
    """Return parameters and a list of ``count`` gradients, as NumPy arrays."""
    params = jax.device_get(add_noise(initial_params(model)))
    rng = np.random.default_rng(7)

    def gradient_like(x):
        return rng.standard_normal(x.shape).astype(np.float32) * (1 + x.size % 3)

    return params, [jax.tree.map(gradient_like, params) for _ in range(count)]


def run_optimizer(optimizer, params, gradients):
    """Return the last updates and the optimizer state after steps with all ``gradients``, as NumPy arrays."""
    update = jax.jit(optimizer.update)
    state = jax.jit(optimizer.init)(params)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return jax.device_get((updates, state))


# ------------------------------------------------------------------------------------------- layer layouts


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("name", NAMES)
def test_stacked_and_per_layer_parameters_get_equal_updates_and_states(name):
    sizes = {"num_layers": 1, "num_decoder_layers": 2} if name == "adafactor" else {}
    model = tiny_model("t5" if name == "adafactor" else "gpt2-tiny", **sizes, scan_layers=True)
    config, params, gradients = OptimizerConfig(name, warmup_steps=1, layer_decay=0.5), *params_and_gradients(model)
    stacked, per_layer = (make_optimizer(config, specs, 10) for specs in (model.specs, spec.unstack(model.specs)))
    updates, state = run_optimizer(stacked, params, gradients)
    other_updates, other_state = run_optimizer(per_layer, spec.unstack(params), list(map(spec.unstack, gradients)))
    assert jax.tree.structure(spec.unstack(state)) == jax.tree.structure(other_state)
    assert_trees_close(spec.unstack(updates), other_updates, 1e-4)
    assert_trees_close(spec.unstack(state), other_state, 1e-4)
    assert jax.tree.structure(spec.restack(other_state)) == jax.tree.structure(state)
    assert_trees_equal(spec.restack(spec.unstack(state)), state)


def test_adafactor_factors_the_flattened_matrices_of_each_layer():
    """Compare with ``optax.adafactor`` on the flattened matrices of one layer. They are large enough to be factored."""
    specs = {
        "layers": {
            "query": {"weight": spec.ArraySpec((3, 130, 2, 65), ("layers", "embed", "heads", "kv"))},
            "output": {"weight": spec.ArraySpec((3, 2, 65, 140), ("layers", "heads", "kv", "embed"))},
            "query_bias": {"bias": spec.ArraySpec((3, 2, 65), ("layers", "heads", "kv"))},
        }
    }
    optimizer = make_optimizer(OptimizerConfig("adafactor", **PLAIN), specs, 10)
    params = jax.tree.map(lambda s: np.random.default_rng(s.size).normal(size=s.shape).astype(np.float32), specs)
    gradients = [jax.tree.map(lambda p, n=n: np.sin(p * n) * (1 + n), params) for n in (1, 2)]
    updates, state = run_optimizer(optimizer, params, gradients)
    shapes = {"query": (130, 130), "output": (130, 140), "query_bias": (130,)}
    reference = optax.adafactor(1.0)
    for layer in range(3):
        flat_matrices = lambda tree, layer=layer: {  # noqa: E731
            name: jax.tree.leaves(leaf)[0][layer].reshape(shapes[name]) for name, leaf in tree["layers"].items()
        }
        expected, _ = run_optimizer(reference, flat_matrices(params), list(map(flat_matrices, gradients)))
        assert_trees_close(flat_matrices(updates), expected, 1e-4)
    factored = spec.flatten(state[1])
    assert factored["layers/output/weight/0/v_row"].shape == (3, 130)
    assert factored["layers/output/weight/0/v_col"].shape == (3, 140)


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_each_expert_is_its_own_matrix(name):
    """The updates of the experts of each layer equal those of a model with one parameter per expert."""
    shape, axes = (130, 140), ("embed", "mlp")
    stacked = {"layers": {"up": {"weight": spec.ArraySpec((2, 3, *shape), ("layers", "expert", *axes))}}}
    separate = {f"expert_{e}": {"weight": spec.ArraySpec(shape, axes)} for e in range(6)}
    matrices = np.random.default_rng(0).normal(size=(2, 3, *shape)).astype(np.float32)
    params = {"layers": {"up": {"weight": matrices}}}
    gradients = [jax.tree.map(lambda p, n=n: np.sin(p * n) * (1 + n), params) for n in (1, 2)]

    def split(tree):
        matrices = tree["layers"]["up"]["weight"].reshape(6, *shape)
        return {f"expert_{e}": {"weight": matrices[e]} for e in range(6)}

    config = OptimizerConfig(name, **PLAIN)
    updates, _ = run_optimizer(make_optimizer(config, stacked, 10), params, gradients)
    expected, _ = run_optimizer(make_optimizer(config, separate, 10), split(params), list(map(split, gradients)))
    assert_trees_close(split(updates), expected, 1e-4)


# ----------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("name", ["gpt2-tiny", "llama-tiny", "mixtral-tiny", "t5-tiny", "lstm-tiny", "resnet-tiny"])
def test_muon_updates_every_matrix_except_embeddings_and_heads(name):
    model = with_stacked_layers(tiny_model(name))
    specs = spec.flatten(model.specs)
    dimension_numbers = jax.tree.leaves(
        muon_dimension_numbers(model.specs), is_leaf=lambda x: x is None or hasattr(x, "_fields")
    )
    handled = {path for path, number in zip(specs, dimension_numbers, strict=True) if number is not None}
    outside = {"token_embedding", "position_embedding", "head", "classifier/weight"}
    expected = {path for path in specs if path.rsplit("/", 1)[-1].startswith("weight")} - outside
    assert handled == expected
    matrices = sum(specs[path].size for path in handled)
    inside = sum(leaf.size for path, leaf in specs.items() if path not in outside)
    vectors = sum(leaf.size for path, leaf in specs.items() if path not in outside | handled)
    assert matrices + vectors == inside
    assert matrices > 0.85 * inside
    by_default = sum(leaf.size for leaf in specs.values() if len(leaf.shape) == 2)
    assert matrices > by_default or name in ("lstm-tiny", "resnet-tiny")


def test_optax_muon_accepts_the_dimension_numbers():
    """``optax.contrib.muon`` accepts the dimension numbers. Its default is all arrays with two axes."""
    model = tiny_model("gpt2-tiny", scan_layers=True)
    params = initial_params(model)

    def handled(**options):
        state = optax.contrib.muon(1e-3, **options).init(params)
        return sum(x.size for x in jax.tree.leaves(state.inner_states["muon"].inner_state[0].mu))

    tables = params["token_embedding"].size + params["position_embedding"].size
    biases_and_scales = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim == 2)
    assert handled() == tables + biases_and_scales
    matrices = sum(x.size for x in jax.tree.leaves(params["layers"])) - biases_and_scales
    matrices -= params["layers"]["attention"]["qkv"]["bias"].size
    assert handled(muon_weight_dimension_numbers=muon_dimension_numbers(model.specs)) == matrices == 24576


@pytest.mark.thorough
def test_muon_orthogonalises_the_flattened_matrix_of_each_layer():
    model = tiny_model("llama-tiny", scan_layers=True)
    optimizer = make_optimizer(OptimizerConfig("muon", **PLAIN), model.specs, 10)
    params, gradients = params_and_gradients(model)
    shapes = {
        "layers/attention/output/weight": (32, 32),
        "layers/attention/key/weight": (32, 16),
        "layers/mlp/up/weight": (32, 48),
    }

    def matrices(tree):
        flat = spec.flatten(tree)
        return {path: list(flat[path].reshape(2, *shape)) for path, shape in shapes.items()}

    @jax.jit
    def last_update(*gradients):
        muon = scale_by_muon()
        state = muon.init(jnp.zeros_like(gradients[0]))
        for gradient in gradients:
            update, state = muon.update(gradient, state)
        return update

    updates = matrices(run_optimizer(optimizer, params, gradients)[0])
    all_expected = jax.device_get(jax.tree.map(last_update, *map(matrices, gradients)))
    for path, shape in shapes.items():
        scale = MUON_RMS * math.sqrt(max(shape))
        for update, expected in zip(updates[path], all_expected[path], strict=True):
            np.testing.assert_allclose(update, -scale * expected, atol=2e-4)
            singular_values = np.linalg.svd(update, compute_uv=False) / scale
            assert 0.3 < singular_values.min() <= singular_values.max() < 1.3
            assert 0.1 < np.sqrt(np.mean(update**2)) < 0.25  # the size of AdamW's updates


def test_muon_splits_fused_projections_and_gates_into_matrices():
    numbers = muon_dimension_numbers(tiny_model("gpt2-tiny", scan_layers=True).specs)
    assert numbers["layers"]["attention"]["qkv"]["weight"] == MuonDimensionNumbers((1,), (3, 4))
    assert muon_dimension_numbers(tiny_model("lstm-tiny").specs)["layer_0"]["weight_input"] == MuonDimensionNumbers(
        (0,), (2,)
    )
    assert muon_dimension_numbers(tiny_model("resnet-tiny").specs)["layer_0"]["convolution_1"][
        "weight"
    ] == MuonDimensionNumbers((0, 1), (2,))


def test_muon_has_dimension_numbers_for_lora_factors():
    specs = LoRA(4, targets=("attention/",)).specs(T5.specs)
    numbers = muon_dimension_numbers(specs)["decoder"]["layers"]["attention"]["output"]["weight"]
    assert numbers == {"lora_a": MuonDimensionNumbers((1, 2), (3,)), "lora_b": MuonDimensionNumbers((1,), (2,))}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama-tiny", "^head$"),
        ("attention-rnn-tiny", "^head/weight$"),
        ("gpt2-tiny", "token_embedding"),
        ("gpt2-tiny", "position_embedding"),
    ],
)
def test_muon_does_not_update_lora_factors_of_embeddings_and_heads(name, target):
    factors = LoRA(2, targets=(target,)).specs(tiny_model(name).specs)
    assert jax.tree.leaves(muon_dimension_numbers(factors)) == []


# ----------------------------------------------------------------------------------------- other optimizers


def test_muon_updates_other_parameters_with_adam():
    model = tiny_model("lstm-tiny")
    params, gradients = params_and_gradients(model)
    config = OptimizerConfig("muon", **PLAIN)
    muon, _ = run_optimizer(make_optimizer(config, model.specs, 10), params, gradients)
    adam, _ = run_optimizer(
        make_optimizer(dataclasses.replace(config, name="adamw"), model.specs, 10), params, gradients
    )
    muon, adam = spec.flatten(muon), spec.flatten(adam)
    close = {path for path in adam if np.allclose(muon[path], adam[path], atol=1e-5)}
    assert close == {"token_embedding", "head/bias", "layer_0/bias", "layer_1/bias"}


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"name": "sgd", "beta1": 0.0}, optax.sgd(1.0)),
        ({"name": "sgd", "beta1": 0.9}, optax.sgd(1.0, momentum=0.9)),
        ({"name": "sgd", "beta1": 0.99, "nesterov": True}, optax.sgd(1.0, momentum=0.99, nesterov=True)),
        ({"name": "adadelta", "beta2": 0.95, "epsilon": 1e-6}, optax.adadelta(1.0, 0.95, 1e-6)),
        ({"name": "adamw", "beta2": 0.98}, optax.adam(1.0, 0.9, 0.98)),
    ],
)
def test_optimizers_equal_those_of_optax(options, reference):
    specs = {"w": spec.ArraySpec((4, 5), ("embed", "mlp"))}
    params, gradients = {"w": jnp.ones((4, 5))}, [{"w": jnp.arange(20.0).reshape(4, 5) - n} for n in range(3)]
    updates, _ = run_optimizer(make_optimizer(OptimizerConfig(**{**PLAIN, **options}), specs, 10), params, gradients)
    assert_trees_close(updates, run_optimizer(reference, params, gradients)[0], 1e-6)


def test_clipping_of_float16_gradients_computes_the_norm_in_float32():
    specs = {"w": spec.ArraySpec((2,), ("embed",))}
    config = OptimizerConfig("sgd", **{**PLAIN, "clip_norm": 1.0}, beta1=0.0)
    w = {"w": jnp.asarray([600.0, 800.0], jnp.float16)}
    updates, _ = make_optimizer(config, specs, 10).update(w, make_optimizer(config, specs, 10).init(w), w)
    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-2)


def test_nt_asgd_averages_the_iterates_of_sgd():
    specs = {"w": spec.ArraySpec((3,), ("embed",))}
    optimizer = make_optimizer(OptimizerConfig("nt_asgd", **{**PLAIN, "learning_rate": 0.1}, beta1=0.0), specs, 10)
    params, iterates = {"w": jnp.ones(3)}, []
    state = start_averaging(optimizer.init(params))
    for _ in range(3):
        iterates.append(params["w"])
        updates, state = optimizer.update({"w": 2 * params["w"]}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(mean_params(state)["w"], np.mean([*iterates, params["w"]], axis=0), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_states_are_sharded_like_parameters(name):
    sharding = Sharding(make_mesh("fsdp=4,tensor=2"))
    optimizer = make_optimizer(OptimizerConfig(name), T5.specs, 1000)
    params, _ = params_and_gradients(T5)
    shardings = spec.flatten(optimizer_sharding(optimizer, T5.specs, sharding))
    state = spec.flatten(jax.jit(optimizer.init)(params))
    assert shardings.keys() == state.keys()
    sharded_paths = {path for path, leaf_sharding in shardings.items() if any(leaf_sharding.spec)}
    moment_paths = {
        path for path in state if path.endswith(("mlp/up/weight", "mlp/up/weight/0/mu")) or "up/weight/0/v" in path
    }
    if name == "adafactor":
        sharded_paths |= {
            path for path in moment_paths if state[path].ndim < 3
        }  # row and column statistics need no sharding
    assert moment_paths <= sharded_paths
    assert moment_paths or name == "sgd"
    for path, leaf_sharding in shardings.items():
        leaf_sharding.shard_shape(state[path].shape)  # raises if the sharding does not divide the shape


@pytest.mark.parametrize("name", ["adamw", "nt_asgd"])
def test_clipping_and_learning_rates_of_layers_do_not_change_the_names_of_the_state(name):
    """So a resumed run may switch them on or off. The numbers must stay those of earlier checkpoints."""
    specs = tiny_model("gpt2-tiny").specs
    rates = jax.tree.map(lambda leaf: 1.0, specs) if name == "adamw" else None
    changes = ({}, {"clip_norm": None}, {"layer_decay": 0.5}, {"clip_norm": None, "layer_decay": 0.5})
    optimizers = [make_optimizer(OptimizerConfig(name, **change), specs, 1000) for change in changes]
    optimizers.append(make_optimizer(OptimizerConfig(name), specs, 1000, rates=rates))
    names = [set(spec.flatten(jax.eval_shape(each.init, spec.abstract(specs)))) for each in optimizers]
    assert {path.split("/")[0] for path in names[0]} == ({"1", "3"} if name == "adamw" else {"1", "3", "4"})
    assert all(other == names[0] for other in names)


# ---------------------------------------------------------------------------------------- layer-wise rates


def test_layer_rates_equal_those_of_beit():
    rates = layer_learning_rate_factors(T5.specs, 0.5)
    flat = spec.flatten(rates)
    np.testing.assert_allclose(jnp.ravel(flat["decoder/layers/mlp/up/weight"]), [0.125, 0.25, 0.5])
    np.testing.assert_allclose(jnp.ravel(flat["encoder/layers/attention_norm/scale"]), [0.25, 0.5])
    assert flat["encoder/layers/mlp/up/weight"].shape == (2, 1, 1)
    assert flat["token_embedding"] == flat["encoder/relative_bias"] == 0.5**4
    assert flat["decoder/final_norm/scale"] == 1.0
    classifier = spec.flatten(layer_learning_rate_factors(tiny_model("bert", task="classification").specs, 0.5))
    assert classifier["classifier/weight"] == classifier["pooler/bias"] == 1.0
    assert classifier["embedding_norm/scale"] == 0.125
    recurrent = spec.flatten(layer_learning_rate_factors(tiny_model("lstm-encoder-tiny").specs, 0.5))
    assert recurrent["layer_0/forward/bias"] == 0.25
    assert recurrent["layer_1/backward/weight_hidden"] == 0.5


def test_layer_rates_without_the_first_layers_are_those_of_the_complete_model():
    """The top layer is next to the head in both models. Only embeddings depend on the number of trained layers."""
    specs = tiny_model("bert", scan_layers=True).specs
    complete, rest = (
        spec.flatten(layer_learning_rate_factors(tree, 0.5)) for tree in (specs, Freeze((), 1).specs(specs))
    )
    np.testing.assert_array_equal(complete["layers/mlp/up/weight"][1:], rest["layers/mlp/up/weight"])
    assert (complete["token_embedding"], rest["token_embedding"]) == (0.125, 0.25)


def test_layer_decay_multiplies_the_whole_update():
    """The factor also applies to weight decay, for stacked and per-layer parameters."""
    model = tiny_model("bert", scan_layers=True)
    params, gradients = params_and_gradients(model)
    config = OptimizerConfig("sgd", **{**PLAIN, "weight_decay": 0.1}, beta1=0.0)
    plain, _ = run_optimizer(make_optimizer(config, model.specs, 10), params, gradients)
    decayed = make_optimizer(dataclasses.replace(config, layer_decay=0.5), model.specs, 10)
    expected = jax.tree.map(lambda update, rate: update * rate, plain, layer_learning_rate_factors(model.specs, 0.5))
    assert_trees_close(run_optimizer(decayed, params, gradients)[0], expected, 1e-6)
    per_layer = make_optimizer(dataclasses.replace(config, layer_decay=0.5), spec.unstack(model.specs), 10)
    updates, _ = run_optimizer(per_layer, spec.unstack(params), list(map(spec.unstack, gradients)))
    assert_trees_close(updates, spec.unstack(expected), 1e-6)


def test_layer_decay_needs_layers():
    with pytest.raises(ValueError, match=r"layer_decay=0.5: the model has neither .* leave layer_decay out"):
        make_optimizer(OptimizerConfig(layer_decay=0.5), {"w": spec.ArraySpec((3,), ("embed",))}, 1000)


# ------------------------------------------------------------------------------------------------ schedules


def test_inverse_square_root_has_warm_up_hold_and_decay():
    vaswani = learning_rate(OptimizerConfig(learning_rate=2.0, schedule="inverse_square_root", warmup_steps=4), 100)
    np.testing.assert_allclose([vaswani(n) for n in (0, 3, 4, 16, 64)], [0.4, 1.6, 2.0, 1.0, 0.5], rtol=1e-6)
    t5 = learning_rate(recipe("t5"), 50_000)
    np.testing.assert_allclose([t5(n) for n in (0, 9_999, 10_000, 40_000)], [0.01, 0.01, 0.01, 0.005], rtol=1e-5)
    assert float(learning_rate(recipe("t5"), 300)(299)) == pytest.approx(0.01)


def test_cosine_and_linear_hold_before_the_decay():
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=10, hold_steps=40, final_fraction=0.0)
    rate = learning_rate(config, 100)
    np.testing.assert_allclose([rate(n) for n in (10, 50, 75, 100)], [1.0, 1.0, 0.5, 0.0], atol=1e-6)
    with pytest.raises(ValueError, match="warmup_steps=10 plus hold_steps=40 must be fewer than the 50 steps"):
        learning_rate(config, 50)
    with pytest.raises(ValueError, match="needs at least one warm-up or hold step, and has warmup_steps=0"):
        learning_rate(OptimizerConfig(schedule="inverse_square_root", warmup_steps=0), 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "name='adam' is unknown: choose from 'adamw', 'adafactor'"),
        ({"schedule": "cosin"}, "schedule='cosin' is unknown: choose from 'cosine'"),
        ({"hold_steps": -1}, "hold_steps=-1 must be at least 0"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5 must be a whole number of steps, or below 1 for a fraction"),
        ({"layer_decay": 1.5}, r"layer_decay=1.5 must be in \(0, 1\], or None"),
        ({"nesterov": True}, "nesterov=True is only for sgd and nt_asgd, not for name='adamw'"),
    ],
)
def test_bad_configs_raise_an_error_with_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**change)


# -------------------------------------------------------------------------------------------------- recipes


def test_every_family_has_a_recipe_that_trains():
    assert tuple(RECIPES) == FAMILIES
    specs = {"layers": {"weight": spec.ArraySpec((2, 4, 5), ("layers", "embed", "mlp"))}}
    params = {"layers": {"weight": np.ones((2, 4, 5), np.float32)}}
    for family, published in RECIPES.items():
        assert published.source, family
        config = recipe(family)
        assert from_json(OptimizerConfig, to_json(config)) == config
        optimizer = make_optimizer(config, specs, 1000)
        updates, _ = run_optimizer(optimizer, params, [params])
        assert np.all(updates["layers"]["weight"] < 0), family


def test_the_warm_up_of_a_recipe_is_a_fraction_of_the_training():
    for family, published in RECIPES.items():
        config, steps = recipe(family), published.steps or 1000
        assert dataclasses.replace(config, warmup_steps=published.optimizer.warmup_steps) == published.optimizer
        got, want = (learning_rate(settings, steps) for settings in (config, published.optimizer))
        warmup = published.optimizer.warmup_steps
        for n in (0, warmup - 1, warmup):
            assert got(n) == want(n), family
    bert = learning_rate(recipe("bert"), 5_000)  # 1 % of the steps
    assert float(bert(50)) == pytest.approx(1e-4)
    assert max(float(bert(49)), float(bert(51))) < float(bert(50))
    with pytest.raises(ValueError, match="unknown family 'gpt2': choose from gpt, llama"):
        recipe("gpt2")
