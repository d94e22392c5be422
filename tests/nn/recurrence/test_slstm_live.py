"""Compare the sLSTM with the authors' package ``xlstm``: outputs, states and all gradients of several random shapes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn.recurrence import slstm, slstm_specs
from jaxlm.nn.recurrence.slstm import STATE_NAMES
from jaxlm.spec import Normal
from jaxlm.testing.helpers import assert_trees_close, initial_values

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def authors() -> Any:
    """The authors' module of the sLSTM in plain torch. An import of the whole package would also compile kernels."""
    package = importlib.util.find_spec("xlstm")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).parent / "blocks/slstm/src/vanilla/__init__.py"
    spec = importlib.util.spec_from_file_location("xlstm_vanilla", path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["xlstm_vanilla"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("xlstm_vanilla")]:
        del sys.modules[name]


@pytest.mark.parametrize(("B", "T", "H", "P"), [(2, 9, 3, 4), (1, 40, 1, 7), (3, 17, 2, 16)])
@pytest.mark.parametrize("carried", [False, True])
def test_outputs_states_and_gradients_equal_those_of_the_authors(
    authors: Any, B: int, T: int, H: int, P: int, carried: bool
) -> None:
    import torch

    rng = np.random.default_rng(T)
    params = jax.device_get(initial_values(slstm_specs(H, P, Normal(0.5), Normal(0.5))))
    projected = rng.standard_normal((B, T, H, 4, P)).astype(np.float32)
    weights = rng.standard_normal((B, T, H, P)).astype(np.float32)
    state = {name: np.zeros((B, H, P), np.float32) for name in STATE_NAMES}
    if carried:
        state = {name: rng.standard_normal((B, H, P)).astype(np.float32) for name in STATE_NAMES}
        state["normalizer"] = 1.0 + np.abs(state["normalizer"])

    def total(params: Any, projected: Any, state: Any) -> Any:
        out, last = slstm(params, projected, state)
        return jnp.sum(out * weights), (out, last)

    gradients, (out, last) = jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, projected, state)

    # The authors' arrays: inputs [T, B, 4 * H * P], recurrent weights [H, 4 * P, P], biases [4 * H * P] and states
    # [4, B, H * P], with the order of gates i, f, z, o and the order of states y, c, n, m.
    leaves = [torch.from_numpy(np.array(x)).requires_grad_() for x in (*params.values(), projected)]
    tensors = dict(zip((*params, "projected"), leaves, strict=True))
    inputs = tensors["projected"].permute(1, 0, 3, 2, 4).reshape(T, B, -1)
    recurrent = tensors["weight_hidden"].reshape(H, P, 4 * P).transpose(1, 2)
    bias = tensors["bias"].transpose(0, 1).reshape(-1)
    states = torch.from_numpy(np.stack([state[name].reshape(B, -1) for name in STATE_NAMES]))
    all_states, last_states, _ = authors.slstm_forward(
        inputs, states, recurrent, bias, authors.slstm_pointwise_function_registry["slstm"]
    )
    want_out = all_states[0, 1:].reshape(T, B, H, P).transpose(0, 1)
    (want_out * torch.from_numpy(weights)).sum().backward()
    want_last = {name: last_states[i].reshape(B, H, P).detach().numpy() for i, name in enumerate(STATE_NAMES)}
    assert_trees_close((out, last), (want_out.detach().numpy(), want_last), 1e-5)
    want_gradients = {name: tensor.grad.numpy() for name, tensor in tensors.items()}
    assert_trees_close({**gradients[0], "projected": gradients[1]}, want_gradients, 2e-5)
