"""Tests of the decoding kernel (interpreted on the CPU) against the reference: values, all gradients, unread slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.models import get_model
from jaxlm.nn import choices, lazy_pallas
from jaxlm.nn.attention import attention, decode_kernel
from jaxlm.nn.attention.cache import CacheView, append
from jaxlm.nn.attention.distance_bias import distance_bias
from jaxlm.nn.attention.mask import Mask
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import apply, assert_trees_close, initial_params, random_tokens, relative_error


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """``decode`` uses the kernel, in Pallas's interpreter, with small blocks."""
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    monkeypatch.setattr(choices, "decode_products", lambda *arguments: "kernel")
    monkeypatch.setattr(decode_kernel, "MAX_BLOCK_SLOTS", 128)
    monkeypatch.setattr(decode_kernel, "MAX_SLOTS_OF_ONE_BLOCK", 128)


def cached(filled, T, S, H, G, K, V, layers=None, dtype=np.float32):
    """Queries (the last tokens of the ``filled`` slots of each row), cached keys and values, and the mask."""
    rng = np.random.default_rng(0)
    B, stacked = len(filled), () if layers is None else (layers,)
    layer = None if layers is None else jnp.int32(layers - 1)
    q = jnp.asarray(rng.normal(size=(B, T, H, K)), dtype)
    k, v = (
        CacheView(jnp.asarray(rng.normal(size=(*stacked, B, S, G * width)), dtype), layer, G) for width in (K, V)
    )  # fmt: skip
    slot_1S, filled_B1 = np.arange(S, dtype=np.int32)[None], np.array(filled, np.int32)[:, None]
    mask = Mask(
        causal=True, query_order=filled_B1 - T + np.arange(T, dtype=np.int32),
        key_order=np.broadcast_to(slot_1S, (B, S)), query_segments=np.ones((B, T), np.int32),
        key_segments=np.where(slot_1S < filled_B1, np.int32(1), np.int32(0)),
    )  # fmt: skip
    return q, k, v, mask


def attend(q, k, v, mask, implementation):
    return jax.jit(functools.partial(attention, mask=mask, implementation=implementation))(q, k, v)


CASES = {
    # filled slots, T, S, H, G, K, V, layers
    "several blocks": ((130, 5, 300), 1, 300, 4, 4, 16, 16, None),
    "several queries, groups, wide values": ((3, 290), 3, 300, 6, 2, 8, 24, None),
    "one key head, stacked layers": ((256, 17), 2, 256, 5, 1, 16, 16, 3),
    "several blocks of heads, groups": ((100, 255), 2, 256, 8, 4, 64, 64, 2),
    "fewer slots than a block": ((7, 90), 1, 90, 4, 2, 8, 8, None),
}


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_values_and_gradients(name, monkeypatch):
    monkeypatch.setattr(decode_kernel, "MAX_BLOCK_WIDTH", 128)
    q, k, v, mask = cached(*CASES[name])
    (_, T, H, _), S = q.shape, k.shape[1]
    table = jnp.asarray(np.random.default_rng(1).normal(size=(25, H)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        def attend(q, key_stack, value_stack, table):
            bias = distance_bias(table, 12, T, S, query_offset=S - T)
            views = k.replace(stack=key_stack), v.replace(stack=value_stack)
            return attention(q, *views, mask, scale=0.3, bias=bias, implementation=implementation)

        out, vjp_fn = jax.vjp(attend, q, k.stack, v.stack, table)
        return out, vjp_fn(jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

    got, want = run("decode"), run("reference")
    assert_trees_close(got, want, 1e-5)
    assert all(np.abs(gradient).max() > 1e-3 for gradient in want[1])


def test_blocks_after_the_end_of_a_row_are_not_read():
    q, k, v, mask = cached((100, 230), 1, 384, 4, 2, 8, 8)
    want = attend(q, k, v, mask, "reference")
    k, v = (x.replace(stack=x.stack.at[0, 128:].set(jnp.nan).at[1, 256:].set(jnp.nan)) for x in (k, v))
    assert relative_error(attend(q, k, v, mask, "decode"), want) < 3e-6


def test_nan_keys_in_masked_slots_have_no_effect():
    """As in ``reference``. The keys are in the block of a visible slot."""
    q, k, v, mask = cached((100, 101), 1, 128, 4, 2, 8, 8)
    want = attend(q, k, v, mask, "reference")
    k = k.replace(stack=k.stack.at[:, 101:].set(jnp.nan))
    assert relative_error(attend(q, k, v, mask, "decode"), want) < 3e-6


def test_the_kernel_is_chosen_for_a_few_queries(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")

    def choose(queries, dtype=jnp.bfloat16):
        return choices.decode_products((2, queries, 8, 64), (2, 300, 4, 64), dtype, 1)

    assert (choose(choices.MAX_DECODE_QUERIES), choose(choices.MAX_DECODE_QUERIES + 1)) == ("kernel", "merged")
    assert choose(1, jnp.float16) == "merged"


def test_appending_a_token_keeps_the_dtype_of_the_slots():
    slots = append(jnp.zeros((2, 3), jnp.int16), jnp.ones((2, 1), jnp.int32), jnp.asarray([0, 2]))
    assert slots.dtype == jnp.int16
    assert slots.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_a_query_without_visible_keys_gives_zeros():
    q, k, v, mask = cached((40, 200), 2, 256, 4, 2, 8, 8)
    mask = mask.replace(query_segments=np.array([[1, 2], [3, 1]], np.int32))
    out = attend(q, k, v, mask, "decode")
    assert relative_error(out, attend(q, k, v, mask, "reference")) < 3e-6
    assert not np.any(out[0, 1]) and not np.any(out[1, 0]) and np.all(out[0, 0] != 0.0)  # noqa: PT018


def test_bfloat16_and_windows():
    q, k, v, mask = cached((40, 250), 1, 256, 4, 4, 16, 16, dtype=jnp.bfloat16)
    mask = mask.replace(window=30)
    out = attend(q, k, v, mask, "decode")
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, attend(q, k, v, mask, "reference")) < 0.02


@pytest.mark.thorough
def test_rows_and_heads_split_over_devices():
    q, k, v, mask = cached((3, 300), 1, 300, 4, 2, 8, 8)
    want = attend(q, k, v, mask, "reference")
    mesh = Sharding(make_mesh("data=2,tensor=2", devices=jax.devices()[:4]))

    @jax.jit
    def run(q, k, v):
        with mesh.scope():
            q = sharding.constrain(q, ("batch", None, "heads", None))
            return attention(q, k, v, mask, implementation="decode")

    assert relative_error(run(q, k, v), want) < 3e-6


@pytest.mark.parametrize("scan_layers", [False, True])
def test_cached_decoding_of_a_model(scan_layers):
    model = get_model("llama-tiny", attention_implementation="decode", scan_layers=scan_layers)
    params, tokens = initial_params(model), random_tokens(model, 2, 12)
    want, _ = apply(model.with_fields(attention_implementation="reference"), params, tokens)
    step = jax.jit(lambda state, tokens: model.apply(params, tokens, state=state))
    state, parts = model.init_state(2, 12), []
    for start in range(0, 12, 3):
        hidden, state = step(state, tokens[:, start : start + 3])
        parts.append(hidden)
    assert relative_error(jnp.concatenate(parts, axis=1), want) < 1e-5


def test_values_that_are_the_keys_are_one_input_of_the_kernel(monkeypatch):
    q, k, _, mask = cached((3, 150), 2, 160, 4, 1, 16, 16)
    num_inputs, attend = [], decode_kernel._attend
    monkeypatch.setattr(
        decode_kernel,
        "_attend",
        lambda static, floats, *rest: num_inputs.append(len(floats)) or attend(static, floats, *rest),
    )

    def value_and_gradients(same):
        def run(q, stack):
            keys = CacheView(stack, heads=1)
            values = keys if same else CacheView(stack, heads=1)
            end_1 = jnp.full((1,), 160, jnp.int32)
            return decode_kernel.attention(q, keys, values, mask, end_B=end_1, scale=0.3, biases=())

        out, vjp_fn = jax.vjp(run, q, k.stack)
        return out, vjp_fn(jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)))

    assert_trees_close(value_and_gradients(True), value_and_gradients(False), 1e-6)
    assert num_inputs == [3, 4]  # queries, bias, keys (and values)
