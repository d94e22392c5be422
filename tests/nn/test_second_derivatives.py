"""Tests that functions with custom gradients (``jax.custom_vjp``) have correct second derivatives.

Their Hessian-vector products (forward over reverse) equal those of the plain definition.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn.attention import attention
from jaxlm.nn.attention.mask import Mask
from jaxlm.nn.convolution import depthwise_convolution
from jaxlm.nn.experts import expert_specs, mixture_of_experts
from jaxlm.nn.linear import linear
from jaxlm.nn.loss import chunked_cross_entropy, cross_entropy
from jaxlm.nn.recurrence import gru, gru_cell, gru_specs, lstm, lstm_cell, lstm_specs, project
from jaxlm.nn.scan import Chunked, linear_attention, linear_scan
from jaxlm.testing.helpers import assert_trees_close

SEGMENTS = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 0]])


def normal(*shapes):
    """Arrays of NumPy. Arrays of JAX would be compiled when pytest collects the tests."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def parameters(specs):
    leaves, structure = jax.tree.flatten(specs)
    return jax.tree.unflatten(structure, normal(*(leaf.shape for leaf in leaves)))


def sum_of_sines(x):
    """A scalar whose second derivative with respect to ``x`` is not zero."""
    return jnp.sum(jnp.sin(x))


def attention_loss(implementation):
    mask = Mask(causal=True, query_segments=SEGMENTS, key_segments=SEGMENTS)
    return lambda qkv: sum_of_sines(attention(*qkv, mask, implementation=implementation))


def linear_loss(tree):
    return sum_of_sines(jnp.einsum("BTD,DF->BTF", tree["x"], tree["weight"]) + tree["bias"][None, None, :])


def loss_of(tree, max_chunk_logits):
    head = lambda params, hidden: hidden @ params  # noqa: E731
    weights = jnp.asarray([[1.0, 0.5, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    targets = jnp.arange(8).reshape(2, 4) % 6
    if max_chunk_logits is None:
        return sum_of_sines(jnp.sum(weights * cross_entropy(head(tree["w"], tree["h"]), targets)))
    return sum_of_sines(
        chunked_cross_entropy(head, tree["w"], tree["h"], targets, weights, max_chunk_logits=max_chunk_logits)
    )


def cell_loss(cell, names):
    def run(tree):
        x = project(tree["params"], tree["x"])
        state, out = {name: jnp.zeros((2, 3)) for name in names}, []
        for t in range(x.shape[1]):
            state = cell(tree["params"], x[:, t], state)
            out.append(state["hidden"])
        return sum_of_sines(jnp.stack(out))

    return run


def scan_loss(implementation):
    masks = {"reset_BT": SEGMENTS == 2, "keep_BT": SEGMENTS > 0}

    def run(tree):
        decay = jax.nn.sigmoid(tree["decay"])
        return sum_of_sines(linear_scan(decay, tree["input"], tree["state"], **masks, implementation=implementation)[0])

    return run


def linear_attention_loss(implementation):
    options = {"implementation": implementation}
    return lambda tree: sum_of_sines(linear_attention(*tree["qkv"], -jnp.exp(tree["decay"]), **options)[0])


def convolution_loss(implementation):
    options = {"padding": "causal", "implementation": implementation}
    return lambda tree: sum_of_sines(depthwise_convolution({"weight": tree["weight"]}, tree["x"], **options))


def experts_loss(**options):
    return lambda tree: sum_of_sines(
        mixture_of_experts(tree["params"], tree["x"], num_selected=2, renormalize=True, **options)[0]
    )


q, k, v, x, weight, bias, hidden, head = normal(
    (2, 5, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4), (2, 4, 3), (3, 5), (5,), (2, 4, 3), (3, 6)
)
CASES = {
    "attention": (attention_loss("blockwise"), attention_loss("reference"), (q, k, v)),
    "linear": (
        lambda tree: sum_of_sines(linear({"weight": tree["weight"], "bias": tree["bias"]}, tree["x"])),
        linear_loss,
        {"x": x, "weight": weight, "bias": bias},
    ),
    "chunked_cross_entropy": (
        lambda tree: loss_of(tree, 12),
        lambda tree: loss_of(tree, None),
        {"h": hidden, "w": head},
    ),
    "lstm": (
        lambda tree: sum_of_sines(lstm(tree["params"], tree["x"])[0]),
        cell_loss(lstm_cell, ("hidden", "cell")),
        {"params": parameters(lstm_specs(3, 3)), "x": x},
    ),
    "gru": (
        lambda tree: sum_of_sines(gru(tree["params"], tree["x"])[0]),
        cell_loss(gru_cell, ("hidden",)),
        {"params": parameters(gru_specs(3, 3)), "x": x},
    ),
    **{
        f"linear_scan {name}": (
            scan_loss(name),
            scan_loss("reference"),
            {"decay": q[:, :, 0], "input": k[:, :, 0], "state": q[:, 0, 1]},
        )
        for name in ("sequential", "chunked")
    },
    "linear_attention": (
        linear_attention_loss(Chunked(4)),
        linear_attention_loss("reference"),
        {"qkv": (q, k, v), "decay": v + q},
    ),
    "linear_attention with groups": (
        linear_attention_loss(Chunked(4)),
        linear_attention_loss("reference"),
        {"qkv": (q[:, :, :1], k[:, :, :1], v), "decay": (v + q)[..., 0]},
    ),
    **{
        f"mixture_of_experts {name}": (
            experts_loss(**options),
            experts_loss(implementation="reference"),
            {"params": parameters(expert_specs(3, 4, 3, spec.Normal(1.0))), "x": x},
        )
        for name, options in (("blocks", {"implementation": "blocks"}), ("capacity", {"capacity_factor": 3.0}))
    },
    "depthwise_convolution": (
        convolution_loss("shifts"),
        convolution_loss("reference"),
        {"weight": weight.T[:, :3], "x": x},
    ),
}


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("name", CASES)
def test_hessian_vector_product_equals_that_of_the_plain_definition(name):
    custom, plain, x = CASES[name]
    tangent = jax.tree.map(lambda leaf: jnp.cos(3.0 * leaf), x)
    got, want = (
        jax.jit(lambda x, tangent, f=f: jax.jvp(jax.grad(f), (x,), (tangent,))[1])(x, tangent) for f in (custom, plain)
    )
    assert_trees_close(got, want, 2e-5)
