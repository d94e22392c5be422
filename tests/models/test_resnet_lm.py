"""GCNN: sizes, length of the context, states of constant size, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.models import get_model, resnet_lm
from jaxlm.testing.helpers import random_tokens, relative_error, tiny_model
from tests.models.helpers import setup


def test_size_of_the_published_model_of_wikitext_103():
    """229 M in fairseq's table of models, with its adaptive softmax (cutoffs 10,000, 20,000, 200,000) as head."""
    model = get_model("gcnn-14")
    width, boundaries = 2048, (10000, 20000, 200000, 267744)
    adaptive = width * (boundaries[0] + 3)
    for cluster, (start, stop) in enumerate(zip(boundaries, boundaries[1:], strict=False), start=1):
        adaptive += width // 4**cluster * (width + stop - start)
    body = model.num_parameters - spec.flatten(model.specs)["head"].size
    assert round((body + adaptive) / 1e6) == 229


@pytest.mark.parametrize(("variant", "context"), [("gcnn-14", 47), ("gcnn-13", 40), ("gcnn-8b", 25), ("gcnn-14b", 57)])
def test_context_length_of_the_published_stacks(variant, context):
    """The context of gated convolutions is 1 + the sum of (kernel - 1) tokens."""
    config = get_model(variant).config
    assert 1 + sum(kernel - 1 for _, kernel, _ in config.blocks) == context
    residuals = [residual for _, _, residual in config.blocks]
    assert residuals.count(3) == {"gcnn-8b": 7, "gcnn-14b": 13}.get(variant, 0)


def test_the_context_is_nine_tokens():
    model, params, tokens = setup("resnet-lm-tiny", length=20)
    apply = jax.jit(lambda tokens: model.apply(params, tokens)[0])
    hidden = apply(tokens)
    for distance, visible in ((8, True), (9, False)):
        changed = tokens.copy()
        changed[:, 15 - distance] = (changed[:, 15 - distance] + 1) % 128
        assert np.any(np.asarray(apply(changed))[:, 15] != np.asarray(hidden)[:, 15]) == visible


def test_initial_activations_keep_their_size_through_deep_stacks():
    sizes = []
    for depth in (1, 9):
        model = tiny_model("resnet-lm-tiny", blocks=((64, 4, 1),) * depth, embed_dim=64)
        tokens = random_tokens(model, 2, 40)
        hidden = jax.jit(lambda key: model.apply(model.init(key), tokens)[0])(jax.random.key(0))  # noqa: B023
        sizes.append(float(jnp.std(hidden)))
    assert 0.2 < sizes[1] / sizes[0] < 5.0


def test_documents_over_several_calls():
    """A packed prompt, then single steps that continue its last document and start a new one."""
    model, params, tokens = setup("resnet-lm-tiny", length=18)
    ids = np.array([[1] * 4 + [2] * 9 + [3] * 5, [0, 0] + [1] * 6 + [0] * 2 + [1] * 8], np.int32)
    step = jax.jit(lambda t, i, s: model.apply(params, t, state=s, segment_ids=i))
    state, outputs = model.init_state(2, 1), []
    for start, stop in [(0, 6), *((position, position + 1) for position in range(6, 18))]:
        hidden, state = step(tokens[:, start:stop], ids[:, start:stop], state)
        outputs.append(hidden)
    got = np.concatenate(outputs, axis=1)
    run_alone = jax.jit(lambda t: model.apply(params, t)[0])
    for row, document in ((0, 1), (0, 2), (0, 3), (1, 1)):
        positions = np.nonzero(ids[row] == document)[0]
        text = np.zeros((1, 18), np.int32)  # one shape, so that it compiles once; later tokens have no effect
        text[:, : len(positions)] = tokens[row, positions]
        assert relative_error(got[row, positions], run_alone(text)[0, : len(positions)]) < 1e-5


def test_errors_name_bad_input():
    with pytest.raises(ValueError, match=r"blocks=\(\) must contain at least one block"):
        resnet_lm.Config(blocks=())
    with pytest.raises(ValueError, match=r"blocks\[1\]=\(8, 3, 3\).* from 0 to 2"):
        resnet_lm.Config(blocks=((8, 3, 1), (8, 3, 3)))
    with pytest.raises(ValueError, match=r"dropout=1.0 must be in \[0, 1\)"):
        resnet_lm.Config(dropout=1.0)
    model, params, _ = setup("resnet-lm-tiny", length=20, task="none")
    assert "head" not in params
    with pytest.raises(ValueError, match="task='none' has no head for labels"):
        model.logits(params, jnp.zeros((1, 1, 24)))
