"""Tests of Freeze and LoRA: which parameters are trained or frozen, and that both layer layouts agree."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import spec
from jaxlm.adapt import Adaptation, Freeze, LoRA, is_table, num_row_axes
from jaxlm.checkpoint import Checkpointer
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.objectives import classification
from jaxlm.spec import ArraySpec
from jaxlm.testing.helpers import (
    TINY,
    add_noise,
    assert_trees_close,
    assert_trees_equal,
    initial_params,
    random_tokens,
    tiny_model,
    with_stacked_layers,
)
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.trainer import Trainer

BERT = tiny_model("bert", task="classification", scan_layers=True)
T5 = tiny_model("t5", num_decoder_layers=3, scan_layers=True)
EVERY_MATRIX = LoRA(3, alpha=5.0, targets=("weight", "embedding"))
ADAPTATIONS = (
    Freeze(("embedding",)),
    Freeze(first_layers=1),
    Freeze(("attention/", "^pooler/"), first_layers=1),
    Freeze((), first_layers=2),
    LoRA(2),
    LoRA(3, alpha=6.0, targets=("attention/output", "mlp/up"), full_training_patterns=("^classifier/", "norm")),
    EVERY_MATRIX,
)


def params_of(model):
    return jax.device_get(add_noise(initial_params(model)))


def split(adaptation, specs, params, seed=1):
    """The trees of ``adaptation.split`` as NumPy arrays, by one compiled program."""
    return jax.device_get(jax.jit(functools.partial(adaptation.split, specs))(params, jax.random.key(seed)))


def merge(adaptation, trained, frozen):
    """The parameters of ``adaptation.merge`` as NumPy arrays, by one compiled program."""
    return jax.device_get(jax.jit(adaptation.merge)(trained, frozen))


def random_like(trained):
    """A tree of random values with the shapes of ``trained``. With the initial zeros, LoRA factors have no effect."""
    return jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), trained)


# --------------------------------------------------------------------------------------- every adaptation


@pytest.mark.thorough
@pytest.mark.parametrize("adaptation", ADAPTATIONS, ids=str)
@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
def test_merge_undoes_split_and_specs_match(adaptation, layout):
    assert isinstance(adaptation, Adaptation)
    assert hash(adaptation) == hash(dataclasses.replace(adaptation))
    to_layout = spec.unstack if layout == "per_layer" else lambda tree: tree
    params, specs = params_of(BERT), to_layout(BERT.specs)
    trained, frozen = split(adaptation, specs, to_layout(params))
    spec.require_same(adaptation.specs(specs), trained, "trained")
    spec.require_same(adaptation.frozen_specs(specs), frozen, "frozen")
    assert_trees_equal(merge(adaptation, trained, frozen), to_layout(params))
    # Splitting before or after the change of layout gives the same values.
    stacked = split(adaptation, BERT.specs, params)
    assert_trees_equal((trained, frozen), tuple(map(to_layout, stacked)))
    merged = merge(adaptation, random_like(stacked[0]), stacked[1])
    assert_trees_close(
        merge(adaptation, to_layout(random_like(stacked[0])), to_layout(stacked[1])), to_layout(merged), 1e-6
    )


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("adaptation", [ADAPTATIONS[2], ADAPTATIONS[5]], ids=["freeze", "lora"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_training_changes_only_the_trained_parameters(adaptation, name):
    """Weight decay is on, because it also changes parameters without a gradient."""
    tokens = random_tokens(BERT, 2, 6)
    params = params_of(BERT)
    trained, frozen = split(adaptation, BERT.specs, params)
    config = OptimizerConfig(name, learning_rate=1e-2, warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(config, adaptation.specs(BERT.specs), 10)

    def loss(trained, frozen):
        merged = adaptation.merge(trained, frozen)
        hidden, _ = BERT.apply(merged, tokens)
        return jnp.sum(BERT.logits(merged, BERT.pool(merged, hidden))[:, 0, 0] ** 2)

    @jax.jit
    def step(trained, state):
        grads = jax.grad(loss)(trained, frozen)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, grads

    state, new = jax.jit(optimizer.init)(trained), trained
    for _ in range(2):
        new, state, grads = step(new, state)
    before, after = spec.flatten(params), spec.flatten(merge(adaptation, new, frozen))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    if isinstance(adaptation, Freeze):
        expected = {name for name in before if "attention/" not in name and not name.startswith("pooler/")}
        for name in expected:
            if name.startswith("layers/"):
                assert np.array_equal(before[name][0], after[name][0]), name
                assert not np.array_equal(before[name][1], after[name][1]), name
    else:
        expected = {
            name for name in before
            if name.endswith(("attention/output/weight", "mlp/up/weight")) or "norm" in name or "classifier/" in name
        }  # fmt: skip
    assert changed <= expected
    assert expected - changed <= {"token_type_embedding"}
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads["layers"]))


@pytest.mark.thorough
def test_gradients_of_the_trained_tree_follow_from_those_of_the_parameters():
    """Freeze: the gradients are equal. LoRA: a factor's gradient is that of the matrix times the other factor."""
    weights = params_of(BERT)
    total = lambda params: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(params))  # noqa: E731
    freeze = Freeze(("attention/",), first_layers=1)
    total_gradient = jax.jit(jax.grad(total))

    def trained_gradient(adaptation, trained, frozen):
        return jax.jit(jax.grad(lambda trained: total(adaptation.merge(trained, frozen))))(trained)

    trained, frozen = split(freeze, BERT.specs, weights)
    expected = split(freeze, BERT.specs, total_gradient(weights))[0]
    assert_trees_close(trained_gradient(freeze, trained, frozen), expected, 1e-6)
    lora = LoRA(2, alpha=6.0, targets=("mlp/up/weight",))
    factors, frozen = split(lora, BERT.specs, weights)
    factors = random_like(factors)
    grads = trained_gradient(lora, factors, frozen)["layers"]["mlp"]["up"]["weight"]
    matrix_grad = np.asarray(total_gradient(merge(lora, factors, frozen))["layers"]["mlp"]["up"]["weight"])
    pair = factors["layers"]["mlp"]["up"]["weight"]
    assert_trees_close(grads["lora_a"], 3.0 * np.einsum("lif,lrf->lir", matrix_grad, pair["lora_b"]), 1e-5)
    assert_trees_close(grads["lora_b"], 3.0 * np.einsum("lif,lir->lrf", matrix_grad, pair["lora_a"]), 1e-5)


@pytest.mark.thorough
def test_the_trained_tree_can_be_checkpointed_and_exported_after_merge(tmp_path):
    """Save and restore the trained tree, merge it, and export it as a Hugging Face directory."""
    lora = LoRA(2, full_training_patterns=("^classifier/",))
    params = params_of(BERT)
    trained, frozen = split(lora, BERT.specs, params)
    trained = jax.tree.map(jnp.asarray, random_like(trained))  # a checkpoint holds jax arrays
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, trained, {}, wait=True)
        restored, _ = checkpoints.restore(lora.specs(BERT.specs))
    assert_trees_equal(restored, trained)
    merged = merge(lora, restored, lora.frozen(BERT.specs, params))
    save_pretrained(tmp_path / "export", BERT, merged)
    assert_trees_equal(load_pretrained(tmp_path / "export", scan_layers=True)[1], merged)


# -------------------------------------------------------------------------------------------------- freeze


@pytest.mark.thorough
def test_the_first_layers_of_every_stack_are_frozen():
    freeze = Freeze(first_layers=2)
    specs, frozen = spec.flatten(freeze.specs(T5.specs)), spec.flatten(freeze.frozen_specs(T5.specs))
    assert not any(name.startswith("encoder/layers") for name in specs)  # both of its layers
    assert specs["decoder/layers/mlp/up/weight"].shape == (1, 32, 64)
    assert frozen["first_layers/encoder/layers/mlp/up/weight"].shape == (2, 32, 64)
    assert "token_embedding" in specs
    params = params_of(T5)
    trained, rest = split(freeze, T5.specs, params)
    assert np.array_equal(
        trained["decoder"]["layers"]["mlp"]["up"]["weight"][0], params["decoder"]["layers"]["mlp"]["up"]["weight"][2]
    )
    assert_trees_equal(merge(freeze, trained, rest), params)
    assert spec.count(freeze.specs(T5.specs)) + spec.count(freeze.frozen_specs(T5.specs)) == T5.num_parameters


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Freeze(), r"Freeze\(\) freezes nothing"),
        (lambda: Freeze("embedding"), r"patterns='embedding' must be a tuple"),
        (lambda: Freeze(("(",)), r"patterns: '\(' is not a regular expression"),
        (lambda: Freeze(first_layers=-1), "first_layers=-1 must be at least 0"),
        (lambda: Freeze(("attension",)).specs(BERT.specs), "patterns: 'attension' matches none of the paths"),
        (lambda: Freeze((".",)).specs(BERT.specs), "nothing is left to train"),
        (lambda: Freeze(first_layers=3).specs(BERT.specs), "first_layers=3, but a stack of the model has 2 layers"),
        (lambda: Freeze(first_layers=1).specs(tiny_model("lstm").specs), "no stack of layers; freeze by pattern"),
        (lambda: LoRA(0), "rank=0 must be at least 1"),
        (lambda: LoRA(2, alpha=0.0), "alpha=0.0 must be a positive number"),
        (lambda: LoRA(2, targets=()), r"targets=\(\) adapts nothing"),
        (lambda: LoRA(2, targets="query"), "targets='query' must be a tuple"),
        (lambda: LoRA(2, targets=("query/bias",)).specs(BERT.specs), "targets: 'query/bias' matches none"),
        (
            lambda: LoRA(2, full_training_patterns=("head",)).specs(BERT.specs),
            "full_training_patterns: 'head' matches none of the paths",
        ),
        (
            lambda: LoRA(2, targets=("mlp",), full_training_patterns=("mlp",)).specs(BERT.specs),
            r"mlp/down/weight.* match targets=",
        ),
    ],
)
def test_errors_name_the_bad_adaptation(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.thorough
def test_frozen_layers_of_a_model_with_batch_normalisation():
    model = tiny_model("resnet-tiny")
    trainer = Trainer(model, optax.sgd(0.1), classification.loss, adaptation=Freeze(("layer_0/",)))
    state, step = trainer.init(jax.random.key(0)), jax.jit(trainer.step)
    batch = classification.batch(random_tokens(model, 4, 16), np.array([0, 1, 0, 1]), num_labels=2)
    new, metrics = step(state, batch)
    assert float(metrics["skipped"]) == 0
    frozen, trained = (spec.flatten(tree) for tree in (new.frozen, new.params))
    before = spec.flatten(state.frozen)
    mean = "matched/statistics/layer_0/norm_1/mean"
    assert not np.array_equal(before[mean], frozen[mean])
    # LoRA updates the statistics in the same way, and the other frozen parameters do not change.
    lora = Trainer(model, optax.sgd(0.1), classification.loss, adaptation=LoRA(2, targets=("weight$",)))
    of_lora = jax.jit(lora.step)(lora.init(jax.random.key(0)), batch)[0].frozen
    np.testing.assert_allclose(frozen[mean], of_lora["statistics"]["layer_0"]["norm_1"]["mean"], rtol=1e-5, atol=1e-6)
    assert all(path.startswith("matched/statistics/") or np.array_equal(before[path], frozen[path]) for path in before)
    changed = {path for path, leaf in spec.flatten(state.params).items() if not np.array_equal(leaf, trained[path])}
    assert any(path.startswith("statistics/") for path in changed)


@pytest.mark.parametrize(
    "adaptation",
    [
        Freeze(("mean",)),
        Freeze(first_layers=1),
        Freeze(("mean",), first_layers=1),
        Freeze(("weight",), first_layers=3),
        LoRA(1, targets=("weight",)),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["stacked", "per_layer"])
def test_new_values_overwrite_trained_and_frozen_parameters(adaptation, layout):
    def tree_of(matrix, vector, mean):
        layers = {"layers": {"norm": {"mean": mean, "scale": vector}, "mlp": {"weight": matrix}}}
        # A parameter may have the name of an entry of the frozen tree.
        return to_layout({"encoder": layers, "matched": vector, "first_layers": {"mean": mean}})

    to_layout = spec.unstack if layout == "per_layer" else lambda tree: tree
    matrix, vector = ArraySpec((3, 2, 2), ("layers", "embed", "mlp")), ArraySpec((3, 2), ("layers", "embed"))
    specs = tree_of(matrix, vector, vector)
    ones, mean = np.ones((3, 2), np.float32), np.arange(6, dtype=np.float32).reshape(3, 2)
    matrices = np.ones((3, 2, 2), np.float32)
    trained, frozen = split(adaptation, specs, tree_of(matrices, ones, ones))
    new = to_layout({"encoder": {"layers": {"norm": {"mean": mean}}}, "first_layers": {"mean": mean}})
    merged = merge(adaptation, *adaptation.overwrite(trained, frozen, new))
    assert_trees_equal(merged, tree_of(matrices, ones, mean))
    with pytest.raises(ValueError, match=r"the new value of .*first_layers/mean has the shape \(5,\): it must have"):
        adaptation.overwrite(trained, frozen, {"first_layers": {"mean": np.ones(5)}})


# ---------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize(
    "name", ["gpt2-tiny", "mixtral-tiny", "t5-tiny", "attention-rnn-tiny", "lstm-tiny", "resnet-tiny"]
)
def test_lora_factors_multiply_to_the_matrix_for_any_number_of_axes(name):
    model = with_stacked_layers(tiny_model(name))
    lora = LoRA(3, alpha=5.0, targets=("weight", "embedding"))
    params = params_of(model)
    trained, frozen = split(lora, model.specs, params)
    before = spec.flatten(params)
    assert_trees_equal(merge(lora, trained, frozen), params)
    trained = random_like(trained)
    factors, after = spec.flatten(trained), spec.flatten(merge(lora, trained, frozen))
    for path, leaf in lora.target_paths(model.specs).items():
        axes = zip(leaf.axes, leaf.shape, strict=True)
        matrices = math.prod(size for axis, size in axes if axis in (spec.LAYERS, spec.EXPERT))
        a, b, weight = (np.asarray(x, np.float64).reshape(matrices, -1) for x in (
            factors[f"{path}/lora_a"], factors[f"{path}/lora_b"], before[path]
        ))  # fmt: skip
        for index, changed in enumerate(np.asarray(after[path]).reshape(matrices, -1)):
            matrix = a[index].reshape(-1, 3) @ b[index].reshape(3, -1)
            np.testing.assert_allclose(changed, weight[index] + 5 / 3 * matrix.reshape(-1), atol=1e-4)


def test_initial_factors_equal_those_of_peft():
    lora = LoRA(4, targets=("attention/output", "token_embedding"))
    trained, _ = split(lora, T5.specs, params_of(T5))
    pair = trained["decoder"]["layers"]["attention"]["output"]["weight"]
    bound = (4 * 16) ** -0.5  # torch's kaiming_uniform_ with a = sqrt(5): 1 / sqrt(inputs)
    assert pair["lora_a"].shape == (3, 4, 16, 4)
    assert 0.9 * bound < np.max(np.abs(pair["lora_a"])) <= bound
    assert not np.any(pair["lora_b"])
    assert pair["lora_b"].shape == (3, 4, 32)
    table = trained["token_embedding"]
    assert not np.any(table["lora_a"])  # the factor with the vocabulary axis
    assert np.all(table["lora_b"] != 0)
    assert LoRA(4).scale == 1.0
    assert LoRA(4, alpha=8).scale == 2.0


def test_frozen_weights_keep_their_dtype():
    lora = LoRA(2)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(BERT))
    trained, frozen = split(lora, BERT.specs, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(merge(lora, trained, frozen))} == {jnp.dtype("bfloat16")}


def test_specs_of_factors_keep_the_logical_axes():
    pair = LoRA(2, targets=("attention/output",)).specs(BERT.specs)["layers"]["attention"]["output"]["weight"]
    assert pair["lora_a"].axes == ("layers", "heads", "kv", None)
    assert pair["lora_b"].axes == ("layers", None, "embed")
    assert pair["lora_a"].decay
    assert pair["lora_b"].decay


def test_merging_trees_with_the_same_parameter_raises():
    freeze = Freeze(("embedding",))
    _, frozen = split(freeze, BERT.specs, params_of(BERT))
    with pytest.raises(ValueError, match="contain the same parameter"):
        freeze.merge(params_of(BERT), frozen)
    trained = {"classifier": params_of(BERT)["classifier"]}  # the fully trained part of a trained tree
    with pytest.raises(ValueError, match=r"contain the same parameter: .* lora.frozen\(model.specs, params\) instead"):
        LoRA(2, full_training_patterns=("^classifier/",)).merge(trained, params_of(BERT))


# ------------------------------------------------------------------------------------------------ matrices


@pytest.mark.parametrize("name", TINY)
def test_num_row_axes_finds_exactly_the_weights_of_every_family(name):
    """Parameters with one number per channel are not matrices, even with two or more axes. All others are matrices."""
    per_channel = ("gain", "scale", "removal", "replacement", "bonus")
    for path, leaf in spec.flatten(tiny_model(name).specs).items():
        rows = num_row_axes(path, leaf)
        axes = [axis for axis in leaf.axes if axis not in (spec.LAYERS, spec.EXPERT)]
        last = path.rsplit("/", 1)[-1]
        if len(axes) < 2:
            assert rows is None, path
        elif rows is None:
            assert "bias" in last or last in per_channel, path
        else:
            assert 1 <= rows < len(axes), path
            assert "bias" not in last, path


@pytest.mark.parametrize(
    ("path", "shape", "axes", "rows", "table"),
    [
        ("layers/attention/output/weight", (2, 4, 8, 32), ("layers", "heads", "kv", "embed"), 2, False),
        ("layers/attention/qkv/weight", (2, 32, 3, 4, 8), ("layers", "embed", None, "heads", "kv"), 1, False),
        ("layers/experts/up/weight", (2, 4, 32, 48), ("layers", "expert", "embed", "mlp"), 1, False),
        ("layer_0/weight", (5, 64, 32), (None, "embed", "mlp"), 2, False),
        ("layers/0/slstm/cell/weight_hidden", (2, 16, 4, 16), ("heads", None, None, None), 1, False),
        ("layers/time_mix/gate/up/weight", (2, 24, 4, 8), ("layers", None, "heads", "kv"), 1, False),
        ("output/state/weight", (32, 24, 2), ("embed", "mlp", None), 1, False),
        ("head", (128, 32), ("vocab", "embed"), 1, True),
        ("head/weight", (128, 32), ("vocab", "embed"), 1, True),
        ("layers/attention/query/bias", (2, 4, 8), ("layers", "heads", "kv"), None, False),
        ("encoder/relative_bias", (32, 4), (None, "heads"), None, False),
    ],
)
def test_num_row_axes_and_is_table(path, shape, axes, rows, table):
    """``num_row_axes`` counts the input axes of a matrix; ``is_table`` is True only for vocabulary tables."""
    leaf = ArraySpec(shape, axes)
    assert num_row_axes(path, leaf) == rows
    assert is_table(path, leaf) == table
