"""Splash attention, interpreted on the CPU, against the reference: values and gradients for each supported mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.nn import lazy_pallas
from jaxlm.nn.attention import attention, splash
from jaxlm.nn.attention.mask import Mask
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    """Run the kernels in Pallas's interpreter."""
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)


def inputs(T, S, H, G, K):
    rng = np.random.default_rng(0)
    shapes = (2, T, H, K), (2, S, G, K), (2, S, G, K), (2, T, H, K)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def segments(T, S, *, same):
    rng = np.random.default_rng(1)
    query, key = (np.sort(rng.integers(0, 4, (2, n)), axis=1).astype(np.int32) for n in (T, S))
    return {
        "query_segments": query,
        "key_segments": query if same else key + 2,
    }  # some segments have only queries or only keys


def uint8_segments(T):
    """Document 255 has the id that -1, the id of padding queries, would have in uint8; 254 that of padding keys."""
    ids = np.sort(np.random.default_rng(1).integers(253, 256, (2, T)), axis=1).astype(np.uint8)
    return {"query_segments": ids, "key_segments": ids}


CASES = {
    "causal": (Mask(causal=True), 256, 256, 2, 2),
    "causal, padded": (Mask(causal=True), 200, 200, 2, 1),
    "bidirectional, padded": (Mask(), 130, 250, 2, 2),
    "window": (Mask(causal=True, window=70), 256, 256, 1, 1),
    "causal documents": (Mask(causal=True, **segments(256, 256, same=True)), 256, 256, 2, 2),
    "documents with uint8 ids": (Mask(**uint8_segments(130)), 130, 130, 1, 1),
    "documents, equal in all rows": (
        Mask(causal=True, **{name: x[:1] for name, x in segments(130, 130, same=True).items()}),
        130,
        130,
        1,
        1,
    ),
    "segments, some queries without keys": (Mask(**segments(130, 200, same=False)), 130, 200, 2, 2),
}


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference_in_values_and_gradients(name, monkeypatch):
    mask, T, S, H, G = CASES[name]
    scale = 0.25 if name == "causal" else 0.3  # a power of two is a separate code path
    monkeypatch.setattr(splash, "MAX_BLOCK", 128)  # several blocks, of which masks skip some
    q, k, v, cotangent = inputs(T, S, H, G, 16)

    def run(function):
        def value_and_gradients(q, k, v):
            out, vjp_fn = jax.vjp(function, q, k, v)
            return out, vjp_fn(jnp.asarray(cotangent))

        return jax.jit(value_and_gradients)(q, k, v)

    got = run(lambda q, k, v: splash.attention(q, k, v, mask, scale=scale))
    want = run(lambda q, k, v: attention(q, k, v, mask, scale=scale, implementation="reference"))
    assert_trees_close(got, want, 1e-5)
    if "without keys" in name:
        assert np.any(np.all(np.asarray(want[0]) == 0.0, axis=(2, 3)))  # there are queries without visible keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "'splash' runs only on tpu, but this computation is compiled for cpu"),
        ({"bias": np.zeros((1, 1, 8, 8), np.float32)}, "'splash' takes no bias"),
        ({"dropout": 0.1, "key": jax.random.key(0)}, "'splash' has no dropout"),
        (
            {"mask": Mask(causal=True, query_order=np.zeros((2, 8), int), key_order=np.zeros((2, 8), int))},
            "'splash' takes no query_order",
        ),
    ],
)
def test_unsupported_arguments_give_the_reason(options, message):
    q, k, v, _ = inputs(8, 8, 2, 2, 16)
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, implementation="splash", **options)


def test_each_device_runs_its_own_rows_and_heads():
    mask = Mask(causal=True, **segments(128, 128, same=True))
    q, k, v, _ = inputs(128, 128, 4, 2, 16)
    sharding = Sharding(make_mesh("data=2,tensor=2,fsdp=1", devices=jax.devices()[:4]))

    def split(q, k, v):
        with sharding.scope():
            return splash.attention(q, k, v, mask, scale=0.3)

    for heads in (2, 1):  # one key head per device, or one key head for both devices
        k, v = k[:, :, :heads], v[:, :, :heads]
        assert_trees_close(
            jax.jit(split)(q, k, v), splash.attention(q, k, v, mask, scale=0.3), 1e-6
        )  # fmt: skip


def test_a_sequence_split_over_devices_is_not_supported():
    sharding = Sharding(make_mesh("data=4,sequence=2"))
    with sharding.scope():
        assert "without a sequence axis" in splash.unsupported_reason(Mask(causal=True), (), None)


def test_blocks_divide_the_length_and_are_as_large_as_allowed():
    sizes = {128: 128, 256: 256, 384: 384, 1024: 1024, 1152: 384, 1280: 640, 4096: 1024}
    assert {length: lazy_pallas.largest_divisor(length, 128, splash.MAX_BLOCK) for length in sizes} == sizes
