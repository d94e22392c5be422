"""Tests of the family contract (docs/tour.md, section 3), for the families of this package and of other packages.

A test module imports all names of this module and sets ``FAMILIES`` to the names of its families:

    import jaxlm
    import hawk
    from jaxlm.testing.contract import *

    jaxlm.register_family("hawk", hawk)
    FAMILIES = ("hawk",)

The tests run on the variants of these families whose name ends in ``-tiny``. The checks depend on the variant. A model
with a state must be causal and support decoding. A model without a state must be bidirectional. An encoder-decoder gets
a source. A test that applies to no variant is skipped. Tests on meshes need eight devices: set
``XLA_FLAGS=--xla_force_host_platform_device_count=8``. Call ``pytest.register_assert_rewrite("jaxlm.testing")`` in
``conftest.py`` to see the values of failed assertions.

Shapes: T time, S source time, D model width.
"""

import dataclasses
import functools
import inspect

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.checkpoint import Checkpointer
from jaxlm.decoding import Sampling, generate
from jaxlm.models import get_model
from jaxlm.models.registry import family
from jaxlm.objectives import objective
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import (
    TINY,
    add_noise,
    apply,
    assert_trees_close,
    assert_trees_equal,
    batch_of,
    can_stack_layers,
    decode_state,
    decodes,
    initial_params,
    initialized_params,
    random_tokens,
    relative_error,
    source_inputs,
    tiny_model,
    tiny_variants,
    variant_params,
    with_stacked_layers,
)
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.trainer import Trainer

TOLERANCE = 2e-5  # float32; only the order of summation differs
STEP_TOLERANCE = 1e-4  # Adam divides by the size of the gradient, so it amplifies rounding errors of small gradients


REPRESENTATIVES = ("gpt2-tiny", "t5-tiny", "xlnet-tiny", "lstm-tiny", "mamba2-tiny", "resnet-tiny")
"""Variants of the package with different kinds of parameters, states and batches. Tests of code that all
families share (``Trainer``, ``Checkpointer``, ``spec.init``) run on these variants, and on all variants of other
packages."""


def for_variants(condition, *, package_variants=None):
    """A decorator for a test that runs on all tiny variants for which ``condition(model)`` is True.

    Args:
        package_variants: the variants of this package on which the test runs if the condition is True. None: all.
            Variants of other packages do not depend on this argument.
    """

    def set_condition(test):
        test.condition, test.package_variants = condition, package_variants
        return test

    return set_condition


_tiny_model = functools.cache(tiny_model)


every_variant = for_variants(lambda model: True)
representatives = for_variants(lambda model: True, package_variants=REPRESENTATIVES)
every_decoder = for_variants(decodes)
every_layered = for_variants(can_stack_layers)
every_layered_decoder = for_variants(lambda model: can_stack_layers(model) and decodes(model))


def pytest_generate_tests(metafunc):
    """Parametrize the tests with the variants or families of the module that imports them."""
    families = metafunc.module.FAMILIES
    for family_name in families:
        _tiny_model(family_name)  # raises if the family has no tiny variant
    condition = getattr(metafunc.function, "condition", None)
    if condition is not None:
        chosen = getattr(metafunc.function, "package_variants", None)
        names = [
            name
            for name in tiny_variants(families)
            if condition(_tiny_model(name)) and (chosen is None or name in chosen or name not in TINY)
        ]
        metafunc.parametrize("name", variant_params(names))
    elif "family_name" in metafunc.fixturenames:
        metafunc.parametrize("family_name", families)


def setup(name, batch=2, length=24, **overrides):
    """The tiny model, initial parameters with noise, and random tokens [batch, length].

    ``overrides`` are values of config fields. Fields that the config does not have are ignored.
    """
    model = tiny_model(name).with_known_fields(**overrides)
    return model, add_noise(initial_params(model)), random_tokens(model, batch, length)


def hidden_of(model, params, tokens, **inputs):
    """Hidden states of the tokens. An encoder-decoder reads ``source_inputs`` if ``inputs`` has no source."""
    return apply(model, params, tokens, **{**source_inputs(model, len(tokens)), **inputs})[0]


def initial_state(model, params, batch_size, length):
    """The initial decoding state. For an encoder-decoder, it contains the encoded source."""
    if not model.reads_source:
        return model.init_state(batch_size, length)
    return decode_state(model, params, source_inputs(model, batch_size)["source"], length)


def state_specs_of(model, batch_size, length):
    """The specs of :func:`initial_state`."""
    sizes = {"source_length": source_inputs(model, 1)["source"].shape[1]} if model.reads_source else {}
    return model.state_specs(batch_size, length, **sizes)


def hidden_of_row(model, params, tokens, row, start=0, stop=None):
    """Hidden states [T, D] of ``tokens[row, start:stop]``, computed in a batch of one row."""
    source = {name: x[row : row + 1] for name, x in source_inputs(model, len(tokens)).items()}
    return hidden_of(model, params, tokens[row : row + 1, start:stop], **source)[0]


def loss_function(model):
    """The loss of the model's task: the sum of the losses, the sum of the weights, and the state."""
    return objective(model.task).loss


def loss_of(model, params, batch, key=None):
    total, weight, _ = loss_function(model)(model, params, batch, key=key)
    return total / weight


@every_variant
def test_config_is_frozen_and_hashable(name):
    model = tiny_model(name)
    assert hash(model) == hash(dataclasses.replace(model))
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.vocab_size = 7


def test_every_config_field_has_a_docstring(family_name):
    # A config may inherit fields, so the code of each base class is searched. The search ends at the first method,
    # because an argument of a method looks like a field.
    bodies = [inspect.getsource(owner).split("    def ")[0] for owner in family(family_name).Config.__mro__[:-1]]
    for field in dataclasses.fields(family(family_name).Config):
        docstrings = [body.split(f"\n    {field.name}:")[1] for body in bodies if f"\n    {field.name}:" in body]
        assert docstrings[-1].split("\n")[1].strip().startswith('"""'), (
            f"{field.name} has no docstring, so --help would not explain it"
        )


@every_variant
def test_specs_are_hashable_and_equal_on_every_read(name):
    """Two reads of the specs give equal values and hashes, and no key contains a dot."""
    model = tiny_model(name)
    first, second = spec.flatten(model.specs), spec.flatten(model.specs)
    assert {path: hash(leaf) for path, leaf in first.items()} == {path: hash(leaf) for path, leaf in second.items()}
    assert first == second
    assert not any("." in part for path in first for part in path.split("/"))


@representatives
def test_initial_values_depend_only_on_path_and_layer(name):
    model = tiny_model(name)
    flat = spec.flatten(model.specs)
    expected = {}
    for start in (0, 1):  # initialize every second leaf without the other leaves
        half = dict(list(flat.items())[start::2])
        expected |= jax.jit(functools.partial(spec.init, half))(jax.random.key(0))
    assert_trees_equal(spec.flatten(jax.jit(model.init)(jax.random.key(0))), {path: expected[path] for path in flat})
    seeds = zip(*(jax.tree.leaves(initialized_params(model, seed)) for seed in (0, 1)), strict=True)
    assert any(not np.array_equal(*pair) for pair in seeds)
    if not any(leaf.is_stacked for leaf in flat.values()):
        return  # the model has no stacked layers
    deeper_model = model.with_fields(num_layers=model.config.num_layers + 1)
    deeper_values = spec.flatten(initialized_params(deeper_model))
    for path, leaf in spec.flatten(deeper_model.specs).items():
        if path in flat and leaf.is_stacked and flat[path].init == leaf.init and flat[path].shape != leaf.shape:
            assert relative_error(deeper_values[path][: model.config.num_layers], expected[path]) < 1e-6


@every_variant
def test_specs_match_the_initialized_parameters(name):
    model = tiny_model(name)
    params = initialized_params(model)
    assert spec.differences(model.specs, params) == []
    assert_trees_close(initial_params(model), params, 1e-3)
    traced = jax.eval_shape(model.init, jax.random.key(0))
    assert spec.differences(spec.abstract(model.specs), traced) == []
    assert model.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


@representatives
def test_jit_and_eager_results_agree(name):
    model, params, tokens = setup(name, length=8)
    eager_hidden, _ = model.apply(params, tokens, **source_inputs(model, 2))
    assert relative_error(hidden_of(model, params, tokens), eager_hidden) < TOLERANCE
    head_input = model.pool(params, eager_hidden) if model.task == "classification" else eager_hidden
    logits = model.logits(params, head_input)
    assert logits.dtype == jnp.float32
    assert relative_error(jax.jit(model.logits)(params, head_input), logits) < TOLERANCE


@every_variant
def test_remat_and_attention_implementation_do_not_change_loss_and_gradients(name):
    model, params, tokens = setup(name, length=13, remat="none")
    batch, key = batch_of(model, tokens), jax.random.key(3)
    want = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, batch, key)))(params)
    for choice in ({"remat": "full", "attention_implementation": "blockwise"}, {"remat": "dots"}):
        other = model.with_known_fields(**choice)
        if other == model:
            continue
        got = jax.jit(jax.value_and_grad(lambda p, other=other: loss_of(other, p, batch, key)))(params)
        assert_trees_close(got, want, TOLERANCE, floor=1e-4)


@every_layered
def test_stacked_and_per_layer_models_agree(name):
    model, params, tokens = setup(name)
    stacked = with_stacked_layers(model)
    assert stacked.specs == spec.restack(model.specs) != model.specs
    assert_trees_equal(initialized_params(stacked), spec.restack(initialized_params(model)))
    key, stacked_params = jax.random.key(2), spec.restack(params)
    want = hidden_of(model, params, tokens, key=key)
    assert relative_error(hidden_of(stacked, stacked_params, tokens, key=key), want) < TOLERANCE


@every_variant
def test_every_dropout_rate_acts_only_with_a_key(name):
    config = tiny_model(name).config
    fields = [field for field in dataclasses.fields(config) if field.name.endswith("dropout")]
    # A rate whose default is None belongs to a head that this variant may not have, so it is not tested.
    rates = {field.name: 0.2 for field in fields if field.default is not None}
    model, params, tokens = setup(name, batch=8, **rates)
    batch = batch_of(model, tokens)

    @functools.partial(jax.jit, static_argnums=0)
    def loss(model, params, key):
        return loss_of(model, params, batch, key)

    without_dropout = loss(model, params, None)
    first, repeated, different = (loss(model, params, jax.random.key(seed)) for seed in (1, 1, 2))
    assert_trees_equal(first, repeated)
    assert (relative_error(first, different) > 1e-6) == bool(rates)
    if has_statistics(model):
        return  # batch normalization uses the statistics of the batch if there is a key, so the loss changes anyway
    assert (relative_error(first, without_dropout) > 1e-6) == bool(rates)
    for rate in rates:
        single_rate = tiny_model(name, **{rate: 0.2})
        assert relative_error(loss(single_rate, params, jax.random.key(1)), without_dropout) > 1e-5, (
            f"{rate} does nothing"
        )


def has_statistics(model):
    """Whether the model has batch normalization."""
    return "statistics" in model.specs


@every_decoder
def test_decoding_steps_compile_once(name):
    """Four decoding steps of one token compile the step only once."""
    model, params, tokens = setup(name)
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    state = initial_state(model, params, 2, 16)
    for position in range(4):
        _, state = step(params, tokens[:, position : position + 1], state)
    assert step._cache_size() == 1


@for_variants(lambda model: decodes(model) and hasattr(model.module, "cross_entropy"))
def test_custom_cross_entropy_equals_the_cross_entropy_of_the_logits(name):
    model, params, tokens = setup(name)
    hidden = hidden_of(model, params, tokens)
    targets, weights = jnp.roll(tokens, -1, axis=1), jnp.asarray(tokens % 3, jnp.float32)

    def loss_from_logits(params, hidden):
        log_p = jax.nn.log_softmax(model.logits(params, hidden)[..., : model.config.vocab_size])
        return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])

    def custom_loss(params, hidden):
        return model.cross_entropy(params, hidden, targets, weights)

    got, want = (jax.jit(jax.value_and_grad(loss, (0, 1)))(params, hidden) for loss in (custom_loss, loss_from_logits))
    assert_trees_close(got, want, TOLERANCE)


@every_variant
def test_bfloat16_is_finite_and_near_float32(name):
    model, params, tokens = setup(name)
    bfloat16_model = model.with_fields(dtype="bfloat16")
    hidden = hidden_of(bfloat16_model, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert relative_error(hidden.astype(jnp.float32), hidden_of(model, params, tokens)) < 0.05
    batch = batch_of(model, tokens)
    grads = jax.jit(jax.grad(lambda p: loss_of(bfloat16_model, p, batch)))(params)
    assert all(leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


@every_variant
def test_bfloat16_parameters_give_the_same_results_as_the_same_values_in_float32(name):
    model, params, tokens = setup(name)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded)
    assert relative_error(hidden_of(model, rounded, tokens), hidden_of(model, widened, tokens)) < 1e-5


@every_variant
def test_each_position_depends_on_exactly_the_visible_positions(name):
    """In a causal model, d hidden[t] / d embedding[s] is exactly 0 for s > t and nonzero otherwise.

    In other models, this derivative is nonzero for all t and s. In an encoder-decoder, the derivative with respect to
    the embedding of each source token is also nonzero.
    """
    model, params, _ = setup(name)
    if not has_full_context(model):
        return  # separate tests check the receptive fields of the convolutional families
    tokens = np.arange(9, dtype=np.int32)[None]  # distinct, so that each row of the table belongs to one position
    source = {"source": np.arange(9, 14, dtype=np.int32)[None]} if model.reads_source else {}

    def hidden(table):
        return model.apply({**params, "token_embedding": table}, tokens, **source)[0][0]

    jacobian = np.abs(np.asarray(jax.jit(jax.jacrev(hidden))(params["token_embedding"])))
    influence_TS = jacobian[:, :, :9].max(axis=(1, 3))
    if decodes(model):
        assert np.all(influence_TS[np.triu_indices(9, 1)] == 0.0)
        assert np.all(influence_TS[np.tril_indices(9)] > 0.0)
    else:
        assert np.all(influence_TS > 0.0)
    if model.reads_source:
        assert np.all(jacobian[:, :, 9:14].max(axis=(1, 3)) > 0.0)


def has_full_context(model):
    """Whether each position depends on all positions (in a causal model: on all positions up to itself).

    False for convolutions, whose receptive fields are limited.
    """
    return not getattr(model.module, "HAS_LOCAL_RECEPTIVE_FIELD", False)


def downsamples(model):
    """Whether the model downsamples a text: the hidden states of 24 tokens have another number of positions."""
    tokens = np.zeros((1, 24), np.int32)
    hidden, _ = jax.eval_shape(lambda p: model.apply(p, tokens, **source_inputs(model, 1)), spec.abstract(model.specs))
    return hidden.shape[1] != tokens.shape[1]


@every_variant
@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_does_not_change_the_other_positions(name, side):
    model, params, tokens = setup(name, batch=3, length=12)
    lengths = (12, 7, 4)
    padded, segments = np.full((3, 12), 5, np.int32), np.zeros((3, 12), np.int32)
    positions_of = {
        "left": lambda n: np.arange(12 - n, 12),
        "right": np.arange,
        "between": lambda n: np.linspace(0, 11, n).astype(np.int32),  # padding between the tokens of a document
    }
    real_positions = [positions_of[side](n) for n in lengths]
    for row, positions in enumerate(real_positions):
        padded[row, positions], segments[row, positions] = tokens[row, : lengths[row]], 1
    hidden = hidden_of(model, params, padded, segment_ids=segments)
    assert np.isfinite(np.asarray(hidden)).all()
    if downsamples(model):
        labels = model.logits(params, model.pool(params, hidden, segment_ids=segments))
        for row, n in enumerate(lengths):
            unpadded_hidden = hidden_of(model, params, tokens[row : row + 1, :n])
            assert relative_error(labels[row], model.logits(params, model.pool(params, unpadded_hidden))[0]) < TOLERANCE
        return
    for row, positions in enumerate(real_positions):
        expected = hidden_of_row(model, params, tokens, row, 0, lengths[row])
        assert relative_error(hidden[row, positions], expected) < TOLERANCE


@every_variant
def test_packed_documents_equal_separate_documents(name):
    model, params, tokens = setup(name, batch=1, length=26)
    boundaries = (0, 12, 16, 23)  # three documents, then padding
    segments = np.zeros((1, 26), np.int32)
    for number, (start, stop) in enumerate(zip(boundaries, boundaries[1:], strict=False), start=1):
        segments[:, start:stop] = number
    inputs = {"segment_ids": segments}
    if model.reads_source:  # the target with segment id n reads the source with segment id n
        source = source_inputs(model, 1)["source"]
        inputs |= {"source": np.tile(source, 3), "source_segment_ids": np.repeat([[1, 2, 3]], source.shape[1], axis=1)}
    packed = hidden_of(model, params, tokens, **inputs)
    if downsamples(model):
        assert np.isnan(np.asarray(packed)).all()  # models that downsample do not support packing
        return
    for start, stop in zip(boundaries, boundaries[1:], strict=False):
        assert relative_error(packed[0, start:stop], hidden_of_row(model, params, tokens, 0, start, stop)) < TOLERANCE
    if model.task != "causal":
        return
    weights = batch_of(model, tokens, segments).weights[0]
    assert np.flatnonzero(weights == 0).tolist() == [11, 15, 22, 23, 24]  # the last token of each document, and padding


@every_variant
def test_a_segment_id_that_occurs_again_starts_a_document(name):
    """If a segment id occurs again after another id, a new document begins, also in a later call with a state."""
    model, params, tokens = setup(name, batch=1, length=12)
    again, unique = (np.repeat([ids], 3, axis=1).astype(np.int32) for ids in ([1, 2, 1, 2], [1, 2, 3, 4]))
    # Models that downsample do not support packing. In an encoder-decoder, a segment id selects a document of the
    # source, so the id may occur again.
    if downsamples(model) or model.reads_source:
        return
    expected = hidden_of(model, params, tokens, segment_ids=unique)
    assert relative_error(hidden_of(model, params, tokens, segment_ids=again), expected) < TOLERANCE
    if not decodes(model):
        return
    state, parts = initial_state(model, params, 1, 14), []
    for start, stop in ((0, 5), (5, 10), (10, 11), (11, 12)):
        hidden, state = apply(model, params, tokens[:, start:stop], state=state, segment_ids=again[:, start:stop])
        parts.append(hidden)
    assert relative_error(jnp.concatenate(parts, axis=1), expected) < TOLERANCE


@every_decoder
@pytest.mark.parametrize("cuts", [(5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8), (16,), (9, 14, 15, 16)])
def test_cached_equals_full_at_every_position(name, cuts):
    """Prefill, chunks and single steps give the hidden states of one call without a state."""
    model, params, tokens = setup(name, batch=2, length=17)
    state, chunks = initial_state(model, params, 2, 20), []
    for start, stop in zip((0, *cuts), (*cuts, 17), strict=True):
        hidden, state = apply(model, params, tokens[:, start:stop], state=state)
        chunks.append(hidden)
    assert relative_error(jnp.concatenate(chunks, axis=1), hidden_of(model, params, tokens)) < TOLERANCE
    assert spec.differences(state_specs_of(model, 2, 20), state) == []


@every_decoder
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_unequal_length_decode_independently(name, side):
    model, params, tokens = setup(name, batch=3, length=12)
    lengths = (9, 4, 1)
    prompt, segments = np.full((3, 9), 7, np.int32), np.zeros((3, 9), np.int32)
    for row, n in enumerate(lengths):
        positions = slice(9 - n, 9) if side == "left" else slice(0, n)
        prompt[row, positions], segments[row, positions] = tokens[row, :n], 1
    _, state = apply(model, params, prompt, state=initial_state(model, params, 3, 12), segment_ids=segments)
    outputs = []
    for i in range(3):
        next_tokens = np.stack([tokens[row, n + i] for row, n in enumerate(lengths)])[:, None]
        hidden, state = apply(model, params, next_tokens, state=state)
        outputs.append(hidden[:, 0])
    for row, n in enumerate(lengths):
        expected = hidden_of_row(model, params, tokens, row, 0, n + 3)[n:]
        assert relative_error(jnp.stack([output[row] for output in outputs]), expected) < TOLERANCE


@every_decoder
def test_take_and_reset_act_on_single_rows_of_a_state(name):
    """After ``spec.take_rows_clipped`` or ``spec.reset``, each row continues as if it were decoded alone."""
    model, params, tokens = setup(name, batch=3, length=12)
    specs = state_specs_of(model, 3, 12)
    assert all("batch" in leaf.axes for leaf in jax.tree.leaves(specs))
    _, state = apply(model, params, tokens[:, :8], state=initial_state(model, params, 3, 12))
    order = np.array([2, 0, 0])
    after_take, _ = apply(
        model, params, tokens[order][:, 8:], state=spec.take_rows_clipped(specs, state, jnp.asarray(order))
    )
    for row, source_row in enumerate(order):
        assert relative_error(after_take[row], hidden_of_row(model, params, tokens, source_row)[8:]) < TOLERANCE
    if model.reads_source:
        return  # a reset row would have no source
    after_reset, _ = apply(model, params, tokens[:, 8:], state=spec.reset(specs, state, jnp.array([True, False, True])))
    for row in (0, 2):
        assert relative_error(after_reset[row], hidden_of_row(model, params, tokens, row, 8)) < TOLERANCE
    assert relative_error(after_reset[1], hidden_of_row(model, params, tokens, 1)[8:]) < TOLERANCE


@every_decoder
def test_a_prefix_branches_and_each_branch_rolls_back(name):
    """Read a prefix once and branch it into three rows, then undo a different number of tokens in each row.

    The branches have padding and start new documents. Layers that can be stacked are tested in both layouts.
    """
    model, params, tokens = setup(name, batch=3, length=11)
    tokens[:, :5] = tokens[0, :5]
    segments = np.array(
        [[1] * 5 + row for row in ([1, 1, 2, 2, 2, 2], [1, 0, 2, 2, 2, 1], [1, 1, 1, 2, 2, 3])], np.int32
    )
    if model.reads_source:  # a segment id selects a document of the source, which has only one
        segments = np.minimum(segments, 1)
    _check_rollback(model, params, tokens, segments)
    if can_stack_layers(model):
        _check_rollback(with_stacked_layers(model), spec.restack(params), tokens, segments)


def _check_rollback(model, params, tokens, segments):
    source = {key: np.repeat(x[:1], 3, axis=0) for key, x in source_inputs(model, 1).items()}
    expected = hidden_of(model, params, tokens, segment_ids=segments, **source)
    # The state has only 11 slots per row. So the last step works only if the rollback frees the slots of undone tokens.
    _, prefix = apply(model, params, tokens[:1, :5], state=initial_state(model, params, 1, 11))
    before = spec.take_rows_clipped(state_specs_of(model, 1, 11), prefix, jnp.zeros(3, int))
    hidden, after = apply(model, params, tokens[:, 5:11], state=before, segment_ids=segments[:, 5:11])
    is_real = segments[:, 5:11] > 0
    assert relative_error(hidden[is_real], expected[:, 5:11][is_real]) < TOLERANCE
    count = np.array([3, 2, 0])
    state = jax.jit(model.rollback)(params, before, tokens[:, 5:11], after, count, segments[:, 5:11])
    assert spec.differences(state_specs_of(model, 3, 11), state) == []
    positions = 5 + count[:, None] + np.arange(3)
    next_tokens, next_segments = (np.take_along_axis(x, positions, axis=1) for x in (tokens, segments))
    hidden, _ = apply(model, params, next_tokens, state=state, segment_ids=next_segments)
    assert relative_error(hidden, np.take_along_axis(expected, positions[..., None], axis=1)) < TOLERANCE


@every_layered_decoder
def test_stacked_and_per_layer_states_agree(name):
    """Prefill with padding, reordering, decoding and reset give the same results in both layouts up to rounding."""
    model, params, tokens = setup(name, batch=3, length=10)
    stacked = with_stacked_layers(model)
    segments = np.ones((3, 8), np.int32)
    segments[1, :3] = 0
    order, results = jnp.array([1, 0, 0]), []
    for variant, weights in ((model, params), (stacked, spec.restack(params))):
        specs = state_specs_of(variant, 3, 12)
        _, state = apply(
            variant, weights, tokens[:, :8], state=initial_state(variant, weights, 3, 12), segment_ids=segments
        )
        state = spec.take_rows_clipped(specs, state, order)
        hidden, state = apply(variant, weights, tokens[:, 8:9], state=state)
        if not model.reads_source:  # a reset row would have no source
            state = spec.reset(specs, state, jnp.array([False, False, True]))
        last_hidden, state = apply(variant, weights, tokens[:, 9:], state=state)
        assert jax.tree.structure(state) == jax.tree.structure(specs)
        results.append((hidden, last_hidden, spec.restack(state)))
    assert_trees_close(results[1], results[0], TOLERANCE)
    with pytest.raises(ValueError, match=r"the parameters have one tree per layer .* but the state has stacked layers"):
        model.apply(params, tokens[:, 9:], state=state)


@every_decoder
def test_too_many_tokens_for_a_state_raise_or_give_nan(name):
    """If shapes show that the tokens do not fit, the call raises. If only the data shows it, the result is NaN."""
    model, params, tokens = setup(name, batch=2, length=6)
    if not model.has_cache:
        return  # the state has a fixed size, or it drops the oldest tokens
    with pytest.raises(ValueError, match="6 new tokens do not fit into a state of 4 slots"):
        model.apply(params, tokens, state=initial_state(model, params, 2, 4))
    _, state = apply(model, params, tokens[:, :3], state=initial_state(model, params, 2, 4))
    hidden, _ = apply(model, params, tokens[:, 3:], state=state)
    assert np.isnan(np.asarray(hidden)).all()


@every_variant
def test_a_token_id_outside_the_vocabulary_gives_nan(name):
    # vocab_multiple=48 adds padding rows to the token table. The ids of these rows are also outside the vocabulary.
    model, params, tokens = setup(name, vocab_multiple=48)
    positions = 3 if has_full_context(model) else slice(None)
    for bad_id in (model.config.vocab_size, -1):
        bad_tokens = tokens.copy()
        bad_tokens[0, 3] = bad_id
        assert np.isnan(np.asarray(hidden_of(model, params, bad_tokens))[0, positions]).any()


@every_variant
def test_errors_name_the_bad_input(name):
    model, params, tokens = setup(name)
    source = source_inputs(model, 2)
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \[batch, time\], got float32"):
        model.apply(params, tokens.astype(np.float32), **source)
    with pytest.raises(ValueError, match="tokens must be integers"):
        model.apply(params, tokens[0], **source)
    with pytest.raises(ValueError, match=r"segment_ids \[2, 3\] must have the shape of tokens \[2, 24\]"):
        model.apply(params, tokens, segment_ids=np.ones((2, 3), np.int32), **source)
    if model.reads_source:
        with pytest.raises(ValueError, match=r"source must be integers of shape \[batch, time\], got float32"):
            model.apply(params, tokens, source=tokens.astype(np.float32))
        with pytest.raises(ValueError, match=r"source_segment_ids \[2, 3\] must have the shape of source"):
            model.apply(params, tokens, **source, source_segment_ids=np.ones((2, 3), np.int32))
    with pytest.raises(ValueError, match="did you mean 'vocab_size'"):
        get_model(name, vocab_sice=3)


@pytest.mark.thorough
@every_variant
def test_loss_and_decoding_need_no_implicit_dtype_promotion(name):
    """JAX can trace generation and the gradient of the loss with ``jax_numpy_dtype_promotion="strict"``."""
    model, params, tokens = setup(name, length=9)
    batch, key = batch_of(model, tokens), jax.random.key(0)
    sampling = Sampling(temperature=0.7, top_k=3, top_p=0.9, repetition_penalty=1.1)
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(lambda params: loss_function(model)(model, params, batch, key=key)[0]), params)
        if decodes(model):
            prompts, inputs = tokens, {}
            if model.reads_source:
                state = decode_state(model, params, source_inputs(model, len(tokens))["source"], 8)
                prompts, inputs = tokens[:, :1], {"state": state}
            jax.eval_shape(
                lambda params: generate(
                    model, params, prompts, max_new_tokens=3, key=key, sampling=sampling, **inputs
                ).tokens,
                params,
            )  # fmt: skip


@every_variant
def test_an_empty_batch_gives_empty_results_and_zero_gradients(name):
    """A batch without rows or tokens gives empty hidden states, loss 0, gradients 0, and an unchanged state.

    Models that downsample, and the pooling of classifiers, raise an error for rows without tokens.
    """
    model = tiny_model(name)
    params, loss = initial_params(model), loss_function(model)
    gradient = jax.jit(jax.value_and_grad(lambda p, batch, key: loss(model, p, batch, key=key)[:2], has_aux=True))
    for rows, length in ((0, 5), (2, 0)):
        tokens = np.zeros((rows, length), np.int32)
        segments = np.ones((rows, length), np.int32)
        source = source_inputs(model, rows)
        if length == 0 and downsamples(model):
            with pytest.raises(ValueError, match=r"tokens \[2, 0\] are empty, but .* that do not belong to tokens"):
                model.apply(params, tokens)
            continue
        hidden, state = model.apply(params, tokens, **source, segment_ids=segments)
        full, _ = jax.eval_shape(
            lambda p: model.apply(p, np.zeros((1, 5), np.int32), **source_inputs(model, 1)), params
        )
        output_length = 0 if length == 0 else full.shape[1]
        assert (hidden.shape, hidden.dtype, state) == ((rows, output_length, *full.shape[2:]), full.dtype, None)
        if model.task == "classification" and length == 0:
            with pytest.raises(ValueError, match=r"hidden states \[2, 0, \d+\] have no position to classify"):
                model.pool(params, hidden)
            continue
        batch = batch_of(model, np.zeros((rows, length + 1), np.int32))
        (total, weight), grads = gradient(params, batch, jax.random.key(0))
        assert (float(total), float(weight)) == (0.0, 0.0)
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
        if length == 0 and decodes(model):
            before = initial_state(model, params, 2, 4)
            empty_hidden, after = model.apply(params, tokens, state=before)
            assert empty_hidden.shape == hidden.shape
            assert_trees_equal(after, before)
    with pytest.raises(ValueError, match="tokens must be integers"):
        model.apply(params, np.zeros((0, 5), np.float32), **source_inputs(model, 0))
    if has_statistics(model):
        _, new_statistics = model.apply(params, np.zeros((0, 5), np.int32), key=jax.random.key(0))
        assert_trees_equal(new_statistics, {"statistics": params["statistics"]})


@for_variants(lambda model: model.reads_source)
@pytest.mark.parametrize(("rows", "length"), [(0, 6), (2, 0)])
def test_an_empty_source_raises(name, rows, length):
    model = tiny_model(name)
    params, source = initial_params(model), np.zeros((rows, length), np.int32)
    calls = (
        lambda: model.apply(params, np.zeros((2, 3), np.int32), source=source),
        lambda: model.encode(params, source),
        lambda: model.init_decode_state(params, source, 4),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"source \[{rows}, {length}\] is empty: give at least one row"):
            call()


# ------------------------------------------------------------------------------------- training and sharding


@functools.cache
def training_setup(name, batch=16):
    model = tiny_model(name).with_known_fields(vocab_multiple=8)
    return model, optimizer_of(model), batch_of(model, random_tokens(model, batch, 17))


def optimizer_of(model):
    # The true gradients of key biases are 0, so the computed gradients are rounding errors. With a large epsilon, Adam
    # does not amplify these errors.
    return make_optimizer(OptimizerConfig(warmup_steps=1, learning_rate=1e-2, epsilon=1e-3), model.specs, 40)


@functools.cache
def single_step(name):
    """The training step on one device: (jitted step, function that makes a new state, result of the first step)."""
    model, optimizer, batch = training_setup(name)
    trainer = Trainer(model, optimizer, loss_function(model))
    step = trainer.jit_step()
    # Not key 0: the input of one ReLU of T5 would be 0 up to rounding, and its gradient would depend on the order of
    # summation.
    host_state = jax.device_get(trainer.init(jax.random.key(1)).replace(key=None))

    def new_state():
        return jax.tree.map(jax.device_put, host_state).replace(key=jax.random.key(5))

    return step, new_state, run_one_step(step, new_state(), batch)


def run_one_step(step, state, batch):
    state, metrics = step(state, batch)
    return jax.device_get((state.params, state.optimizer, metrics))


def assert_steps_close(got, want):
    """Assert that the floating-point values of two results of ``run_one_step`` are equal up to ``STEP_TOLERANCE``.

    With ``floor``, values that are only rounding errors, such as the moments of key biases, do not fail.
    """
    for got_part, want_part in zip(got, want, strict=True):
        floats = [
            [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            for tree in (got_part, want_part)
        ]
        assert_trees_close(*floats, STEP_TOLERANCE, floor=1e-4)


@every_layered
def test_stacked_and_per_layer_training_steps_agree(name):
    model, _, batch = training_setup(name)
    stacked = with_stacked_layers(model)
    _, new_state, want = single_step(name)
    step = Trainer(stacked, optimizer_of(stacked), loss_function(stacked)).jit_step()
    got = run_one_step(step, jax.jit(spec.restack)(new_state()), batch)
    assert_steps_close(got, spec.restack(want))


@every_variant
def test_sharded_step_equals_single_device_step(name):
    check_sharded_step(name, "data=2,fsdp=2,tensor=2")  # data parallelism, FSDP and tensor parallelism together


def check_sharded_step(name, mesh, *, scan_layers=False):
    """Compare the new parameters, optimizer state and metrics of a step on a mesh with those of a step on one device.

    Args:
        mesh: the axes of the mesh, for ``make_mesh``.
        scan_layers: True: the model on the mesh has stacked layers.
    """
    model, _, batch = training_setup(name)
    model = with_stacked_layers(model) if scan_layers else model
    _, new_state, want = single_step(name)
    sharding = Sharding(make_mesh(mesh))
    trainer = Trainer(model, optimizer_of(model), loss_function(model), sharding=sharding)
    state = jax.device_put(spec.restack(new_state()) if scan_layers else new_state(), trainer.shardings())
    assert_steps_close(spec.restack(run_one_step(trainer.jit_step(), state, batch)), spec.restack(want))


@every_decoder
def test_the_length_of_a_state_need_not_be_divisible_by_the_sequence_axis(name):
    """The size of the mesh axis ``sequence`` must divide the number of new tokens.

    It need not divide the length of the state. The test only traces the call.
    """
    model = tiny_model(name)
    tokens = random_tokens(model, 2, 16)

    def trace(params, state):
        with Sharding(make_mesh("sequence=4", devices=jax.devices()[:4])).scope():
            return model.apply(params, tokens, state=state)[0]

    params, state = spec.abstract(model.specs), spec.abstract(state_specs_of(model, 2, 19))
    assert jax.eval_shape(trace, params, state).shape[:2] == (2, 16)


@representatives
def test_same_seed_same_parameters_on_a_mesh(name):
    model, _, _ = training_setup(name)
    sharding = Sharding(make_mesh("data=2,fsdp=2,tensor=2"))
    sharded_params = jax.jit(model.init, out_shardings=sharding.tree(model.specs))(jax.random.key(0))
    assert_trees_equal(sharded_params, initialized_params(model))


@representatives
def test_pmap_and_shard_map_steps_equal_single_device_step(name):
    model, optimizer, batch = training_setup(name)
    _, new_state, want = single_step(name)
    rows = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(2, 8, *x.shape[1:]), 0, 1), batch)
    if has_statistics(model):  # each device normalizes over its own rows, so compare with one micro-batch per device
        accumulating = Trainer(model, optimizer, loss_function(model), grad_accum_steps=8)
        want = run_one_step(accumulating.jit_step(), new_state(), batch)
    step = Trainer(model, optimizer, loss_function(model)).pmap_step()
    got = run_one_step(step, flax.jax_utils.replicate(new_state()), rows)
    for device in (0, 7):
        assert_steps_close(jax.tree.map(lambda x, device=device: x[device], got), want)
    sharding = Sharding(make_mesh("data=8"))
    trainer = Trainer(model, optimizer, loss_function(model), sharding=sharding, shard_map=True)
    rows = jax.tree.map(lambda x: x.reshape(16, *x.shape[2:]), rows)
    state = jax.device_put(new_state(), trainer.shardings())
    assert_steps_close(run_one_step(trainer.jit_step(), state, rows), want)


@every_variant
def test_runs_under_an_explicit_mesh_and_in_shard_map(name):
    """The hidden states equal those on one device, up to rounding, and an Explicit mesh keeps them sharded.

    A model with an argument ``positions`` gets positions that begin at 1. The gradients are only traced. Tracing fails
    if the type of a gradient, such as its sharding, is wrong. In ``shard_map``, the gradient is that of the sum of the
    hidden states. Under an Explicit mesh, it is that of the loss with dropout.
    """
    model, params, tokens = setup(name, batch=8)
    inputs = source_inputs(model, 8)
    if "positions" in inspect.signature(model.module.apply).parameters:
        inputs["positions"] = np.tile(np.arange(1, tokens.shape[1] + 1, dtype=np.int32), (8, 1))
    want = hidden_of(model, params, tokens, **inputs)
    batch_sharded, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        lambda p, t, inputs: model.apply(p, t, **inputs)[0], mesh=make_mesh("data=8"),
        in_specs=(replicated, batch_sharded, batch_sharded), out_specs=batch_sharded,
    )  # fmt: skip
    assert relative_error(jax.jit(mapped)(params, tokens, inputs), want) < TOLERANCE
    gradient = jax.eval_shape(jax.grad(lambda p: jnp.sum(mapped(p, tokens, inputs))), params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    mesh = make_mesh("data=8", axis_type=jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        arguments = jax.device_put((params, tokens, inputs), (replicated, batch_sharded, batch_sharded))
        hidden = jax.jit(lambda p, t, inputs: model.apply(p, t, **inputs)[0])(*arguments)
        batch = jax.device_put(batch_of(model, tokens), batch_sharded)
        model = model.with_fields(**dict.fromkeys(model.zero_dropout, 0.2))
        loss_gradient = jax.jit(jax.grad(lambda p, b: loss_of(model, p, b, jax.random.key(0))))
        gradient = jax.eval_shape(loss_gradient, arguments[0], batch)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert hidden.sharding.spec[0] == "data"
    assert relative_error(hidden, want) < TOLERANCE


@representatives
def test_restored_state_is_bitwise_equal(name, tmp_path):
    """A restored state has the same bits, and the next step gives the same bits."""
    model, optimizer, batch = training_setup(name)
    step, new_state, _ = single_step(name)
    state, _ = step(new_state(), batch)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"family": name}, wait=True)
        restored, meta = checkpoints.restore(Trainer(model, optimizer, loss_function(model)).abstract())
    assert meta["family"] == name
    assert_trees_equal(restored, state)
    assert_trees_equal(step(restored, batch), step(state, batch))


@every_variant
def test_loss_falls_in_twenty_steps_without_recompiling(name):
    model, _, batch = training_setup(name)
    step, new_state, _ = single_step(name)
    num_compiled = step._cache_size()
    state, losses = new_state(), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    predicts_labels = model.task in ("classification", "token_classification")
    outputs = model.config.num_labels if predicts_labels else model.config.vocab_size
    # The tolerance is large, because the published initialization of T5 gives logits of variance 1.
    assert losses[0] == pytest.approx(np.log(outputs), abs=0.7)
    assert losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == max(num_compiled, 1)
