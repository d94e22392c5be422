"""Compare training of VDCNN with torch: batch statistics, updated running statistics and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.models import get_model
from jaxlm.testing.helpers import assert_trees_close, relative_error
from tests.oracles import _native
from tests.oracles import resnet as oracle

pytestmark = pytest.mark.live


@pytest.mark.parametrize("downsample", ["max_pool", "k_max_pool", "convolution"])
def test_training_equals_torch(downsample):
    model = get_model("resnet-tiny", max_positions=32, blocks=(1, 2), downsample=downsample, norm_momentum=0.3)
    tensors = _native.parameters(model, 5)
    tokens = np.random.default_rng(5).integers(0, 64, (3, 28)).astype(np.int32)
    ids = _native.padding("left", tokens.shape)
    want, new_statistics = oracle.features(model.config, tensors, tokens, ids, training=True)
    want.sin().sum().backward()

    params = jax.tree.unflatten(
        jax.tree.structure(model.specs), [jnp.asarray(x.detach().numpy()) for x in tensors.values()]
    )

    @jax.jit
    def train(params):
        def total(params):
            hidden, state = model.apply(params, tokens, segment_ids=ids, key=jax.random.key(0))
            return jnp.sum(jnp.sin(hidden)), (hidden, state)

        return jax.grad(total, has_aux=True)(params)

    gradients, (hidden, state) = train(params)
    assert relative_error(hidden, want.detach()) < 1e-5
    assert_trees_close(spec.flatten(state), {path: x.numpy() for path, x in new_statistics.items()}, 1e-5)
    checked_gradients = {path: leaf for path, leaf in spec.flatten(gradients).items() if tensors[path].grad is not None}
    assert set(spec.flatten(model.specs)) - set(checked_gradients) >= set(new_statistics)
    largest = max(float(tensors[path].grad.abs().max()) for path in checked_gradients)
    for path, leaf in checked_gradients.items():
        expected = tensors[path].grad.numpy()
        error = np.abs(leaf - expected).max() / max(np.abs(expected).max(), 1e-3 * largest)
        assert error < 1e-4, (path, error)
