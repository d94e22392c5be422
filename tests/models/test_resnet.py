"""VDCNN: sizes, padding, statistics, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.models import get_model, resnet
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import add_noise, apply, initial_params, random_tokens, relative_error, tiny_model


def setup(**overrides):
    model = tiny_model("resnet-tiny", **overrides)
    params = add_noise(initial_params(model))
    # The noise must not make variances negative.
    params["statistics"] = jax.tree.map(jnp.abs, params["statistics"])
    return model, params, random_tokens(model, 3, 40)


@jax.jit
def labels_of_tiny(params, tokens, segment_ids):
    model = tiny_model("resnet-tiny")
    hidden, _ = apply(model, params, tokens, segment_ids=segment_ids)
    return model.logits(params, model.pool(params, hidden, segment_ids=segment_ids))


def test_the_mesh_axis_of_the_text_need_not_divide_the_lengths_of_the_blocks():
    model = tiny_model("resnet-tiny", max_positions=12)
    tokens = random_tokens(model, 2, 12)

    def hidden(params):
        with Sharding(make_mesh("sequence=4", devices=jax.devices()[:4])).scope():
            return model.apply(params, tokens)[0]

    assert jax.eval_shape(hidden, spec.abstract(model.specs)).shape[:2] == (2, 6)


@pytest.mark.parametrize(
    ("variant", "convolutions", "published"),
    [("vdcnn-9", 9, 2.2), ("vdcnn-17", 17, 4.3), ("vdcnn-29", 29, 4.6), ("vdcnn-49", 49, 7.8)],
)
def test_sizes_of_the_paper(variant, convolutions, published):
    """Table 2 of the paper, in millions. Its counts do not include the hidden layers (12.6 M).

    For an unknown reason, they exceed the count of the convolutions in the same table by 0.6 M at every depth.
    """
    model = get_model(variant)
    sizes = {path: leaf.size for path, leaf in spec.flatten(model.specs).items() if not path.startswith("statistics")}
    weights = [path for path in sizes if "convolution" in path or path == "input/weight"]
    assert len(weights) == convolutions
    hidden = sum(size for path, size in sizes.items() if path.startswith(("fc", "classifier")))
    assert hidden == 4096 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 2 + 2
    assert published - (sum(sizes.values()) - hidden) / 1e6 == pytest.approx(0.59, abs=0.05)


def test_features_are_an_eighth_as_long_and_eight_times_as_wide():
    model = get_model("vdcnn-29")
    tokens = jax.ShapeDtypeStruct((2, 300), jnp.int32)
    hidden, state = jax.eval_shape(model.apply, spec.abstract(model.specs), tokens)
    assert hidden.shape == (2, 128, 512)
    assert state is None
    pooled = jax.eval_shape(model.pool, spec.abstract(model.specs), hidden)
    assert pooled.shape == (2, 1, 2048)


def test_padding_has_no_effect():
    model, params, tokens = setup()
    short = tokens[:, :30]
    want = labels_of_tiny(params, short, np.ones_like(short))
    left, right, within = (np.full((3, 40), 7, np.int32) for _ in range(3))
    real_positions = (np.arange(10, 40), np.arange(30), np.delete(np.arange(40), slice(5, 15)))
    for padded, positions in zip((left, right, within), real_positions, strict=True):
        padded[:, positions] = short
        ids = np.zeros((3, 40), np.int32)
        ids[:, positions] = 1
        assert relative_error(labels_of_tiny(params, padded, ids), want) < 1e-6
    assert relative_error(labels_of_tiny(params, tokens, np.ones_like(tokens)), want) > 1e-2
    two_documents = np.ones_like(tokens)
    two_documents[0, 20:] = 2
    labels = np.asarray(labels_of_tiny(params, tokens, two_documents))
    assert np.isnan(labels[0]).all()
    assert np.isfinite(labels[1:]).all()


def test_training_uses_batch_statistics_and_updates_running_statistics():
    model, params, tokens = setup()
    train = jax.jit(lambda params: model.apply(params, tokens, key=jax.random.key(0)))
    hidden, state = train(params)
    assert spec.differences(model.specs["statistics"], state["statistics"]) == []
    shifted_params = {**params, "statistics": jax.tree.map(lambda x: x + 1.0, params["statistics"])}
    hidden_again, shifted_state = train(shifted_params)
    np.testing.assert_array_equal(hidden_again, hidden)  # running statistics are not used
    for new, old in zip(jax.tree.leaves(shifted_state), jax.tree.leaves(state), strict=True):
        assert relative_error(new - old, np.full(old.shape, 0.9)) < 1e-5
    for _ in range(120):
        params = {**params, **train(params)[1]}
    # The running statistics converge to those of the batch, with the unbiased variance.
    eval_hidden, eval_state = jax.jit(lambda params: model.apply(params, tokens))(params)
    assert eval_state is None
    assert relative_error(eval_hidden, hidden) < 0.02


def test_statistics_have_no_gradient():
    model, params, tokens = setup()
    for key in (None, jax.random.key(0)):
        grads = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, tokens, key=key)[0] ** 2)))(params)  # noqa: B023
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["statistics"]))
        assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["layer_0"]))
    assert not any(jax.tree.leaves(spec.decay_mask(model.specs["statistics"])))


def test_errors_name_bad_input():
    model, params, tokens = setup()
    with pytest.raises(ValueError, match="80 tokens exceed max_positions=64"):
        model.apply(params, np.concatenate([tokens, tokens], axis=1))
    with pytest.raises(ValueError, match="a classifier of whole texts carries no state"):
        model.apply(params, tokens, state={})
    with pytest.raises(ValueError, match="max_positions=1020 must be a multiple of 8"):
        resnet.Config(max_positions=1020)
    with pytest.raises(ValueError, match="at least 8 \\* k_max = 64"):
        resnet.Config(max_positions=56)
    with pytest.raises(ValueError, match=r"blocks=\(2, 0\) must give at least one block"):
        resnet.Config(blocks=(2, 0))
    with pytest.raises(ValueError, match="downsample='mean' is unknown"):
        resnet.Config(downsample="mean")
    with pytest.raises(ValueError, match="norm_momentum=0.0 must be in"):
        resnet.Config(norm_momentum=0.0)
    headless = dataclasses.replace(model, config=dataclasses.replace(model.config, task="none"))
    assert not {"fc_1", "fc_2", "classifier"} & set(headless.specs)
    with pytest.raises(ValueError, match="task='none' has no head for labels"):
        headless.logits(params, jnp.zeros((1, 1, 32)))
