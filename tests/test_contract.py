"""The contract of a family (docs/tour.md), tested for EVERY family. A line in FAMILIES is all that a new one needs.

Every test runs over the tiny variants: one for each form of a family. What a test asks of a form follows from it:
one that carries a state is causal and decodes; one that does not sees both ways; one with an encoder reads a source.
"""

import dataclasses
import functools
import sys
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
from jaxlm.objectives import objective
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.trainer import Trainer
from tests.helpers import (
    TINY,
    assert_trees_close,
    assert_trees_equal,
    batch_of,
    decodes,
    forms,
    lively,
    random_tokens,
    relative_error,
    source_of,
    task_of,
    tiny_model,
    with_stacked_layers,
)

TOLERANCE = 2e-5  # float32, other orders of summation
STEP_TOLERANCE = 1e-4  # the same after Adam, which divides small gradients by their own size

DECODERS = tuple(name for name in TINY if decodes(tiny_model(name)))
every_form = pytest.mark.parametrize("name", forms())
every_decoder = pytest.mark.parametrize("name", forms(DECODERS))
LAYERED = tuple(name for name in TINY if hasattr(tiny_model(name).config, "scan_layers"))
every_layered = pytest.mark.parametrize("name", forms(LAYERED))
every_layered_decoder = pytest.mark.parametrize("name", forms(tuple(name for name in DECODERS if name in LAYERED)))


def setup(name, batch=2, length=24, **overrides):
    model = tiny_model(name, **overrides)
    return model, lively(initial(model)), random_tokens(model, batch, length)


@functools.cache
def initial(model, seed=0):
    return _init(model)(jax.random.key(seed))


@functools.cache
def _init(model):
    return jax.jit(model.init)


@functools.partial(jax.jit, static_argnums=0)
def _hidden_of(model, params, tokens, inputs):
    return model.apply(params, tokens, **inputs)[0]


def hidden_of(model, params, tokens, **inputs):
    """Hidden states; an encoder-decoder reads the source that belongs to the row."""
    return _hidden_of(model, params, tokens, {**source_of(model, len(tokens)), **inputs})


def empty_state(model, params, rows, length):
    """What decoding starts from."""
    if not model.reads_source:
        return model.init_state(rows, length)
    return jax.jit(model.init_decode_state, static_argnums=2)(params, source_of(model, rows)["source"], length)


def alone(model, params, tokens, row, start=0, stop=None):
    """Hidden states of a piece of one row, with nothing else in the batch, [T, D]."""
    own = {name: x[row : row + 1] for name, x in source_of(model, len(tokens)).items()}
    return hidden_of(model, params, tokens[row : row + 1, start:stop], **own)[0]


def loss_of(model, params, batch, key=None):
    total, weight, _ = objective(task_of(model)).loss(model, params, batch, key=key)
    return total / weight


@every_form
def test_config_is_frozen_hashable_and_has_only_plain_fields(name):
    model = tiny_model(name)
    assert hash(model) == hash(dataclasses.replace(model))
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.vocab_size = 7


@pytest.mark.parametrize("name", FAMILIES)
def test_every_config_field_has_a_docstring(name):
    bodies = {}
    for owner in family(name).Config.__mro__[:-1]:  # fields may come from a config that it extends
        text = Path(sys.modules[owner.__module__].__file__).read_text(encoding="utf-8")
        start = text.index(f"class {owner.__name__}")
        bodies[owner] = (
            text[start : text.index("def __post_init__", start)] if "__post_init__" in text[start:] else text
        )
    for field in dataclasses.fields(family(name).Config):
        described = [
            body.split(f"\n    {field.name}:")[1] for body in bodies.values() if f"\n    {field.name}:" in body
        ]
        assert described[-1].split("\n")[1].strip().startswith('"""'), (
            f"{field.name} has no docstring, so --help would not explain it"
        )


@every_form
def test_specs_are_hashable_and_stable(name):
    model = tiny_model(name)
    one, two = spec.flatten(model.specs), spec.flatten(model.specs)
    assert {path: hash(leaf) for path, leaf in one.items()} == {path: hash(leaf) for path, leaf in two.items()}
    assert one == two
    assert not any("." in part for path in one for part in path.split("/"))


@every_form
def test_init_depends_on_path_and_layer_only(name):
    model = tiny_model(name)
    flat = spec.flatten(model.specs)
    alone = jax.jit(lambda key: {path: spec.init({path: leaf}, key)[path] for path, leaf in flat.items()})
    without_neighbours = alone(jax.random.key(0))
    assert_trees_equal(spec.flatten(initial(model)), without_neighbours)
    seeds = zip(*(jax.tree.leaves(initial(model, seed)) for seed in (0, 1)), strict=True)
    assert any(not np.array_equal(*pair) for pair in seeds)
    if not any(leaf.axes[0] == spec.LAYERS for leaf in flat.values()):
        return  # no stack of equal layers
    deeper = dataclasses.replace(
        model, config=dataclasses.replace(model.config, num_layers=model.config.num_layers + 1)
    )
    for path, leaf in spec.flatten(deeper.specs).items():
        mine = flat.get(path)
        if mine is not None and leaf.axes[0] == spec.LAYERS and mine.init == leaf.init and mine.shape != leaf.shape:
            longer = spec.init({path: leaf}, jax.random.key(0))[path]
            assert relative_error(longer[: model.config.num_layers], without_neighbours[path]) < 1e-6


@every_form
def test_abstract_equals_real(name):
    model, params, _ = setup(name)
    assert spec.diff(model.specs, params) == []
    traced = jax.eval_shape(model.init, jax.random.key(0))
    assert spec.diff(spec.abstract(model.specs), traced) == []
    assert model.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


@every_form
def test_jit_equals_no_jit(name):
    model, params, tokens = setup(name, length=8)
    plain, _ = model.apply(params, tokens, **source_of(model, 2))
    assert relative_error(hidden_of(model, params, tokens), plain) < TOLERANCE
    read = model.pool(params, plain) if task_of(model) == "classification" else plain
    logits = model.logits(params, read)
    assert logits.dtype == jnp.float32
    assert relative_error(jax.jit(model.logits)(params, read), logits) < TOLERANCE


@every_form
def test_how_it_is_computed_does_not_change_what(name):
    choices = {"remat": "full", "attention_implementation": "blockwise"}
    model, params, tokens = setup(name, length=13, **_offered(name, {"remat": "none"}))
    batch, key = batch_of(model, tokens), jax.random.key(3)
    want = jax.jit(jax.value_and_grad(lambda p: loss_of(model, p, batch, key)))(params)
    for change in [{field: value} for field, value in _offered(name, choices).items()] + [{"remat": "dots"}]:
        if not _offered(name, change):
            continue
        other = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
        got = jax.jit(jax.value_and_grad(lambda p, other=other: loss_of(other, p, batch, key)))(params)
        assert_trees_close(got, want, TOLERANCE, floor=1e-4)


def _offered(name, change):
    fields = {field.name for field in dataclasses.fields(tiny_model(name).config)}
    return {field: value for field, value in change.items() if field in fields}


@every_layered
def test_stacked_layers_give_what_per_layer_trees_give(name):
    model, params, tokens = setup(name)
    stacked = with_stacked_layers(model)
    assert stacked.specs == spec.restack(model.specs) != model.specs
    assert_trees_equal(jax.jit(stacked.init)(jax.random.key(0)), spec.restack(jax.jit(model.init)(jax.random.key(0))))
    key, stack = jax.random.key(2), spec.restack(params)
    want = hidden_of(model, params, tokens, key=key)
    assert relative_error(hidden_of(stacked, stack, tokens, key=key), want) < TOLERANCE
    if name not in DECODERS:
        return
    states = []
    for form, weights in ((model, params), (stacked, stack)):
        step = jax.jit(lambda p, t, s, form=form: form.apply(p, t, state=s))
        hidden, state = step(weights, tokens[:, :7], empty_state(form, weights, 2, 9))
        hidden, state = step(weights, tokens[:, 7:9], state)
        states.append((hidden, spec.restack(state)))
    assert_trees_close(states[1], states[0], TOLERANCE)


@every_form
def test_dropout_acts_by_key_and_only_with_one(name):
    config = tiny_model(name).config
    fields = [field for field in dataclasses.fields(config) if field.name.endswith("dropout")]
    # A rate that is None by default is that of a head which this form may lack.
    rates = {field.name: 0.2 for field in fields if field.default is not None}
    model, params, tokens = setup(name, batch=8, **rates)
    batch = batch_of(model, tokens)

    @functools.partial(jax.jit, static_argnums=0)
    def loss(model, params, key):
        return loss_of(model, params, batch, key)

    calm = loss(model, params, None)
    one, same, other = (loss(model, params, jax.random.key(seed)) for seed in (1, 1, 2))
    assert_trees_equal(one, same)
    assert (relative_error(one, other) > 1e-6) == bool(rates)
    if has_statistics(model):
        return  # a key also asks for the statistics of the batch
    assert (relative_error(one, calm) > 1e-6) == bool(rates)
    for rate in rates:
        alone = dataclasses.replace(model, config=dataclasses.replace(tiny_model(name).config, **{rate: 0.2}))
        assert relative_error(loss(alone, params, jax.random.key(1)), calm) > 1e-5, f"{rate} does nothing"


def has_statistics(model):
    """Whether the model normalises over the batch."""
    return "statistics" in model.specs


@every_decoder
def test_no_recompilation_on_the_second_call(name):
    model, params, tokens = setup(name)
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    state = empty_state(model, params, 2, 16)
    for at in range(4):
        _, state = step(params, tokens[:, at : at + 1], state)
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", [name for name in DECODERS if hasattr(tiny_model(name).module, "cross_entropy")])
def test_a_loss_of_its_own_is_that_of_the_logits(name):
    model, params, tokens = setup(name)
    hidden = hidden_of(model, params, tokens)
    targets, weights = jnp.roll(tokens, -1, axis=1), jnp.asarray(tokens % 3, jnp.float32)

    def by_logits(params, hidden):
        log_p = jax.nn.log_softmax(model.logits(params, hidden)[..., : model.config.vocab_size])
        return -jnp.sum(weights * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])

    def own(params, hidden):
        return model.cross_entropy(params, hidden, targets, weights)

    got, want = (jax.jit(jax.value_and_grad(loss, (0, 1)))(params, hidden) for loss in (own, by_logits))
    assert_trees_close(got, want, TOLERANCE)


@every_form
def test_bfloat16_is_finite_and_near_float32(name):
    model, params, tokens = setup(name)
    low = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype="bfloat16"))
    hidden = hidden_of(low, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    assert relative_error(hidden.astype(jnp.float32), hidden_of(model, params, tokens)) < 0.05
    batch = batch_of(model, tokens)
    grads = jax.jit(jax.grad(lambda p: loss_of(low, p, batch)))(params)
    assert all(leaf.dtype == jnp.float32 and bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


@every_form
def test_who_influences_whom_by_gradient(name):
    """d hidden[t] / d embedding[s] is exactly 0 for s > t where a model is causal; elsewhere all influence all."""
    model, params, _ = setup(name)
    if not sees_everything(model):
        return  # tests of the family state what a stack of convolutions sees
    tokens = np.arange(9, dtype=np.int32)[None]  # distinct, so that each row of the table stands for one place
    source = {"source": np.arange(9, 14, dtype=np.int32)[None]} if model.reads_source else {}

    def hidden(table):
        return model.apply({**params, "token_embedding": table}, tokens, **source)[0][0]

    jacobian = np.abs(np.asarray(jax.jit(jax.jacrev(hidden))(params["token_embedding"])))
    influence_TS = jacobian[:, :, :9].max(axis=(1, 3))
    if name in DECODERS:
        assert np.all(influence_TS[np.triu_indices(9, 1)] == 0.0)
        assert np.all(influence_TS[np.tril_indices(9)] > 0.0)
    else:
        assert np.all(influence_TS > 0.0)
    if model.reads_source:
        assert np.all(jacobian[:, :, 9:14].max(axis=(1, 3)) > 0.0)


def sees_everything(model):
    """Whether every place can see all that its direction lets it see: not so for convolutions."""
    return model.family not in ("resnet", "resnet_lm", "alexnet")


def reads_whole_texts(model):
    """Whether hidden states are those of a text as a whole, at fewer places than it has tokens."""
    return model.family in ("resnet", "alexnet") and task_of(model) == "classification"


@every_form
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
    if reads_whole_texts(model):
        labels = model.logits(params, model.pool(params, hidden, segment_ids=segments))
        for row, n in enumerate(lengths):
            own = hidden_of(model, params, tokens[row : row + 1, :n])
            assert relative_error(labels[row], model.logits(params, model.pool(params, own))[0]) < TOLERANCE
        return
    for row, place in enumerate(places):
        assert relative_error(hidden[row, place], alone(model, params, tokens, row, 0, lengths[row])) < TOLERANCE


@every_form
def test_packed_equals_separate(name):
    model, params, tokens = setup(name, batch=1, length=30)
    borders = (0, 11, 14, 27)  # three documents, then padding
    segments = np.zeros((1, 30), np.int32)
    for number, (start, stop) in enumerate(zip(borders, borders[1:], strict=False), start=1):
        segments[:, start:stop] = number
    inputs = {"segment_ids": segments}
    if model.reads_source:  # document n of the target reads document n of the source
        source = source_of(model, 1)["source"]
        inputs |= {"source": np.tile(source, 3), "source_segment_ids": np.repeat([[1, 2, 3]], source.shape[1], axis=1)}
    packed = hidden_of(model, params, tokens, **inputs)
    if reads_whole_texts(model):
        assert np.isnan(np.asarray(packed)).all()  # several documents are no text
        return
    for start, stop in zip(borders, borders[1:], strict=False):
        assert relative_error(packed[0, start:stop], alone(model, params, tokens, 0, start, stop)) < TOLERANCE
    if task_of(model) != "causal":
        return
    weights = batch_of(model, tokens, segments).weights[0]
    assert np.flatnonzero(weights == 0).tolist() == [10, 13, 26, 27, 28]  # no document predicts the next one


@every_decoder
@pytest.mark.parametrize("cuts", [(5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8), (16,), (3, 11)])
def test_cached_equals_full_at_every_position(name, cuts):
    """Prefill, chunks and single steps all give what one call gives."""
    model, params, tokens = setup(name, batch=2, length=17)
    state, pieces = empty_state(model, params, 2, 20), []
    for start, stop in zip((0, *cuts), (*cuts, 17), strict=True):
        hidden, state = step_of(model, params, tokens[:, start:stop], state)
        pieces.append(hidden)
    assert relative_error(jnp.concatenate(pieces, axis=1), hidden_of(model, params, tokens)) < TOLERANCE
    sizes = {"source_length": source_of(model, 2)["source"].shape[1]} if model.reads_source else {}
    assert spec.diff(model.state_specs(2, 20, **sizes), state) == []


@functools.partial(jax.jit, static_argnums=0)
def step_of(model, params, tokens, state, segment_ids=None):
    return model.apply(params, tokens, state=state, segment_ids=segment_ids)


@every_decoder
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_unequal_length_decode_as_they_would_alone(name, side):
    model, params, tokens = setup(name, batch=3, length=14)
    lengths = (9, 4, 1)
    prompt, segments = np.full((3, 9), 7, np.int32), np.zeros((3, 9), np.int32)
    for row, n in enumerate(lengths):
        place = slice(9 - n, 9) if side == "left" else slice(0, n)
        prompt[row, place], segments[row, place] = tokens[row, :n], 1
    _, state = step_of(model, params, prompt, empty_state(model, params, 3, 14), segments)
    pieces = []
    for i in range(5):
        following = np.stack([tokens[row, n + i] for row, n in enumerate(lengths)])[:, None]
        hidden, state = step_of(model, params, following, state)
        pieces.append(hidden[:, 0])
    for row, n in enumerate(lengths):
        expected = alone(model, params, tokens, row, 0, n + 5)[n:]
        assert relative_error(jnp.stack([piece[row] for piece in pieces]), expected) < TOLERANCE


@every_decoder
def test_rows_reorder_and_reset_by_axis_name(name):
    model, params, tokens = setup(name, batch=3, length=10)
    sizes = {"source_length": source_of(model, 3)["source"].shape[1]} if model.reads_source else {}
    specs = model.state_specs(3, 12, **sizes)
    assert all("batch" in leaf.axes for leaf in jax.tree.leaves(specs))
    _, state = step_of(model, params, tokens[:, :8], empty_state(model, params, 3, 12))
    order = np.array([2, 0, 0])
    after, _ = step_of(model, params, tokens[order][:, 8:], spec.take(specs, state, jnp.asarray(order)))
    for row, taken in enumerate(order):
        assert relative_error(after[row], alone(model, params, tokens, taken)[8:]) < TOLERANCE
    if model.reads_source:
        return  # a row without its source is no beginning
    fresh, _ = step_of(model, params, tokens[:, 8:], spec.reset(specs, state, jnp.array([True, False, True])))
    for row in (0, 2):
        assert relative_error(fresh[row], alone(model, params, tokens, row, 8)) < TOLERANCE
    assert relative_error(fresh[1], alone(model, params, tokens, 1)[8:]) < TOLERANCE


@every_layered_decoder
def test_a_stacked_state_is_the_same_state(name):
    """Read, continued, reordered and reset, with padding: equal to the per-layer state up to rounding."""
    model, params, tokens = setup(name, batch=3, length=10)
    stacked = with_stacked_layers(model)
    segments = np.ones((3, 8), np.int32)
    segments[1, :3] = 0
    sizes = {"source_length": source_of(model, 3)["source"].shape[1]} if model.reads_source else {}
    order, found = jnp.array([1, 0, 0]), []
    for form, weights in ((model, params), (stacked, spec.restack(params))):
        specs = form.state_specs(3, 12, **sizes)
        _, state = step_of(form, weights, tokens[:, :8], empty_state(form, weights, 3, 12), segments)
        state = spec.take(specs, state, order)
        hidden, state = step_of(form, weights, tokens[:, 8:9], state)
        if not model.reads_source:  # the initial state of a row has no source
            state = spec.reset(specs, state, jnp.array([False, False, True]))
        more, state = step_of(form, weights, tokens[:, 9:], state)
        assert jax.tree.structure(state) == jax.tree.structure(specs)
        found.append((hidden, more, spec.restack(state)))
    assert_trees_close(found[1], found[0], TOLERANCE)
    with pytest.raises(ValueError, match=r"the parameters have one tree per layer .* but the state has stacked layers"):
        model.apply(params, tokens[:, 9:], state=state)


@every_decoder
def test_running_past_the_state_is_not_silent(name):
    """A state with room for fewer tokens than fed: an error when shapes tell, NaN when only the data does."""
    model, params, tokens = setup(name, batch=2, length=6)
    if forgets(model):
        return
    with pytest.raises(ValueError, match="6 new tokens do not fit a state of 4 slots"):
        model.apply(params, tokens, state=empty_state(model, params, 2, 4))
    _, state = step_of(model, params, tokens[:, :3], empty_state(model, params, 2, 4))
    hidden, _ = step_of(model, params, tokens[:, 3:], state)
    assert np.isnan(np.asarray(hidden)).all()


def forgets(model):
    """Whether a state has a size of its own or drops what is oldest: nothing to run past."""
    return "length" not in model.state_specs(1, 2)  # which a cache of keys and values counts


@every_form
def test_an_id_outside_the_vocabulary_is_not_silent(name):
    model, params, tokens = setup(name)
    for bad in (model.config.vocab_size, -1):
        wrong = tokens.copy()
        wrong[0, 3] = bad
        assert np.isnan(
            np.asarray(hidden_of(model, params, wrong))[0, 3 if sees_everything(model) else slice(None)]
        ).any()


@every_form
def test_bad_inputs_are_named(name):
    model, params, tokens = setup(name)
    source = source_of(model, 2)
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


@every_form
def test_an_empty_batch_is_read_and_trains_nothing(name):
    """No rows, or rows without tokens: empty hidden states, a sum of 0, gradients of 0, and a state that stays."""
    model = tiny_model(name)
    params = initial(model)
    objective_of = objective(task_of(model))

    @jax.jit
    def gradient(params, batch, key):
        def loss(params):
            total, weight, _ = objective_of.loss(model, params, batch, key=key)
            return total, weight

        return jax.value_and_grad(loss, has_aux=True)(params)

    for rows, length in ((0, 5), (2, 0)):
        tokens = np.zeros((rows, length), np.int32)
        segments = np.ones((rows, length), np.int32)
        source = source_of(model, rows)
        if length == 0 and reads_whole_texts(model):
            with pytest.raises(ValueError, match=r"tokens \[2, 0\] have no position, but .* a whole text"):
                model.apply(params, tokens)
            continue
        hidden, state = model.apply(params, tokens, **source, segment_ids=segments)
        full, _ = jax.eval_shape(lambda p: model.apply(p, np.zeros((1, 5), np.int32), **source_of(model, 1)), params)
        middle = 0 if length == 0 else full.shape[1]
        assert (hidden.shape, hidden.dtype, state) == ((rows, middle, *full.shape[2:]), full.dtype, None)
        if task_of(model) == "classification" and length == 0:
            with pytest.raises(ValueError, match=r"hidden states \[2, 0, \d+\] have no position to classify"):
                model.pool(params, hidden)
            continue
        made = batch_of(model, np.zeros((rows, length + 1), np.int32))
        (total, weight), grads = gradient(params, made, jax.random.key(0))
        assert (float(total), float(weight)) == (0.0, 0.0)
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))
        if length == 0 and name in DECODERS:
            before = empty_state(model, params, 2, 4)
            read, after = model.apply(params, tokens, state=before)
            assert read.shape == hidden.shape
            assert_trees_equal(after, before)
    with pytest.raises(ValueError, match="tokens must be integers"):
        model.apply(params, np.zeros((0, 5), np.float32), **source_of(model, 0))
    if has_statistics(model):
        _, moved = model.apply(params, np.zeros((0, 5), np.int32), key=jax.random.key(0))
        assert_trees_equal(moved, {"statistics": params["statistics"]})


@pytest.mark.parametrize("name", forms([name for name in TINY if tiny_model(name).reads_source]))
@pytest.mark.parametrize(("rows", "length"), [(0, 6), (2, 0)])
def test_an_empty_source_is_refused(name, rows, length):
    model = tiny_model(name)
    params, source = initial(model), np.zeros((rows, length), np.int32)
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
def training(name, batch=16):
    model = tiny_model(name, **_offered(name, {"vocab_multiple": 8}))
    return model, optimizer_of(model), batch_of(model, random_tokens(model, batch, 17))


def optimizer_of(model):
    # A large epsilon: gradients that are 0 but for rounding (those of key biases) must not be blown up to whole steps.
    return make_optimizer(OptimizerConfig(warmup_steps=1, learning_rate=1e-2, epsilon=1e-3), model.specs, 40)


@functools.cache
def single_step(name):
    """The compiled step on one device: (step, function that makes a fresh state, result of the first step)."""
    model, optimizer, batch = training(name)
    trainer = Trainer(model, optimizer, loss_function(model))
    step = trainer.jit_step()
    # Weights that leave no ReLU within rounding of 0 (those of key 0 leave one of T5's): on which side it falls depends
    # on the order of a sum, and all gradients below it on that.
    host_state = jax.device_get(trainer.init(jax.random.key(1)).replace(key=None))

    def fresh():
        return jax.tree.map(jnp.array, host_state).replace(key=jax.random.key(5))

    return step, fresh, after_one_step(step, fresh(), batch)


def loss_function(model):
    return objective(task_of(model)).loss


def after_one_step(step, state, batch):
    state, metrics = step(state, batch)
    return jax.device_get((state.params, state.optimizer, metrics))


def assert_steps_close(got, want):
    """Parameters, optimizer and metrics, each held against its own largest number where a gradient is only rounding."""
    for one, other in zip(got, want, strict=True):
        floats = [
            [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
            for tree in (one, other)
        ]
        assert_trees_close(*floats, STEP_TOLERANCE, floor=1e-4)


@every_layered
def test_a_step_with_stacked_layers_is_that_of_per_layer_trees(name):
    model, _, batch = training(name)
    stacked = with_stacked_layers(model)
    _, fresh, want = single_step(name)
    step = Trainer(stacked, optimizer_of(stacked), loss_function(stacked)).jit_step()
    got = after_one_step(step, jax.jit(spec.restack)(fresh()), batch)
    assert_steps_close(got, spec.restack(want))


@every_form
def test_sharded_step_equals_single(name):
    check_sharded_step(name, "data=2,fsdp=2,tensor=2")  # all tables at once


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,tensor=4", "fsdp=4,sequence=2"])
def test_each_table_by_itself(mesh):
    check_sharded_step("gpt2-tiny", mesh)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("gpt2-tiny", "data=2,fsdp=2,tensor=2"), ("t5-tiny", "fsdp=4,tensor=2"), ("transformer-xl-tiny", "data=8")],
)
def test_sharded_step_with_stacked_layers_equals_single(name, mesh):
    check_sharded_step(name, mesh, scan_layers=True)


def check_sharded_step(name, mesh, *, scan_layers=False):
    """Loss, gradients (Adam's first moment is a tenth of them) and the updated parameters."""
    model, _, batch = training(name)
    model = with_stacked_layers(model) if scan_layers else model
    _, fresh, want = single_step(name)
    sharding = Sharding(make_mesh(mesh))
    trainer = Trainer(model, optimizer_of(model), loss_function(model), sharding=sharding)
    state = jax.device_put(spec.restack(fresh()) if scan_layers else fresh(), trainer.shardings())
    assert_steps_close(spec.restack(after_one_step(trainer.jit_step(), state, batch)), spec.restack(want))


@every_form
def test_same_seed_same_parameters_on_any_mesh(name):
    model, _, _ = training(name)
    sharding = Sharding(make_mesh("data=2,fsdp=2,tensor=2"))
    split = jax.jit(model.init, out_shardings=sharding.tree(model.specs))(jax.random.key(0))
    assert_trees_equal(split, initial(model))


@every_form
def test_pmap_equals_single(name):
    model, optimizer, batch = training(name)
    _, fresh, want = single_step(name)
    rows = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(2, 8, *x.shape[1:]), 0, 1), batch)
    if has_statistics(model):  # each device normalises over its own rows, as each part of an accumulated batch does
        accumulating = Trainer(model, optimizer, loss_function(model), grad_accum_steps=8)
        want = after_one_step(accumulating.jit_step(), fresh(), batch)
    step = Trainer(model, optimizer, loss_function(model)).pmap_step()
    got = after_one_step(step, flax.jax_utils.replicate(fresh()), rows)
    for device in (0, 7):
        assert_steps_close(jax.tree.map(lambda x, device=device: x[device], got), want)


@every_form
def test_runs_under_an_explicit_mesh_and_in_shard_map(name):
    model, params, tokens = setup(name, batch=8)
    want, source = hidden_of(model, params, tokens), source_of(model, 8)
    rows, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        lambda p, t, s: model.apply(p, t, **s)[0], mesh=make_mesh("data=8"), in_specs=(everywhere, rows, rows),
        out_specs=rows, check_vma=False,
    )  # fmt: skip
    assert relative_error(jax.jit(mapped)(params, tokens, source), want) < TOLERANCE
    mesh = make_mesh("data=8", axis_type=jax.sharding.AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, tokens, source), (everywhere, rows, rows))
        hidden = jax.jit(lambda p, t, s: model.apply(p, t, **s)[0])(*placed)
    assert hidden.sharding.spec[0] == "data"
    assert relative_error(hidden, want) < TOLERANCE


@every_form
def test_checkpoint_round_trip(name, tmp_path):
    model, optimizer, batch = training(name)
    step, fresh, _ = single_step(name)
    state, _ = step(fresh(), batch)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"family": name}, wait=True)
        restored, meta = checkpoints.restore(Trainer(model, optimizer, loss_function(model)).abstract())
    assert meta["family"] == name
    assert_trees_equal(restored, state)
    assert_trees_equal(step(restored, batch), step(state, batch))


@every_form
def test_loss_falls_in_twenty_steps_without_recompiling(name):
    model, _, batch = training(name)
    step, fresh, _ = single_step(name)
    compiled = step._cache_size()
    state, losses = fresh(), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    outputs = (
        model.config.num_labels
        if task_of(model) in ("classification", "token_classification")
        else model.config.vocab_size
    )
    assert losses[0] == pytest.approx(np.log(outputs), abs=0.7)  # T5's published start has logits of variance 1
    assert losses[-1] < 0.8 * losses[0]
    assert step._cache_size() == max(compiled, 1)
