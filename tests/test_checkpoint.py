"""Tests of checkpoints: bitwise round trips, strict restores, checksums, and processes killed during a save."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxlm.checkpoint
from jaxlm import checkpoint, integrity, spec
from jaxlm.checkpoint import Checkpointer, CorruptCheckpointError, checksums

OPTIMIZER = optax.adamw(1e-2)


@flax.struct.dataclass
class TrainState:
    step: jax.Array
    params: Any
    optimizer: Any
    key: jax.Array
    carried: Any = None


def new_state(seed: int = 0) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embed": {"weight": jax.random.normal(keys[0], (16, 8))},
        "layers": {"scale": jnp.ones((2, 8), jnp.bfloat16), "weight": jax.random.normal(keys[1], (2, 8, 8))},
    }
    return TrainState(jnp.int32(0), params, OPTIMIZER.init(params), keys[2])


def train_step(state: TrainState) -> TrainState:
    """One step with noise from the state's key. A resume with a wrong key or wrong Adam moments changes the result."""

    def loss(params: Any) -> jax.Array:
        noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (16, 8))
        hidden = (params["embed"]["weight"] + noise) @ params["layers"]["weight"][0]
        return jnp.mean((hidden * params["layers"]["scale"][1][None, :].astype(jnp.float32)) ** 2)

    updates, optimizer = OPTIMIZER.update(jax.grad(loss)(state.params), state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, optimizer=optimizer)


jitted_step = jax.jit(train_step)
donating_step = jax.jit(train_step, donate_argnums=0)


def as_bytes(leaf: jax.Array) -> bytes:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same_bits(expected: Any, actual: Any) -> None:
    assert jax.tree.structure(expected) == jax.tree.structure(actual)
    for expected_leaf, actual_leaf in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        assert (expected_leaf.dtype, expected_leaf.shape) == (actual_leaf.dtype, actual_leaf.shape)
        assert as_bytes(expected_leaf) == as_bytes(actual_leaf)


def target_of(tree: Any, sharding: Any = None) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def names_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# ------------------------------------------------------------------------------------------------ round trips


def test_round_trip_is_bitwise_with_structure_and_meta(tmp_path: Path) -> None:
    state = jitted_step(jitted_step(new_state()))
    meta = {"config": {"name": "gpt", "rate": 1e-3, "tied": True}, "data": {"epoch": 2, "row": [1, 2, None]}}
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(2, state, meta, metric=1.5)
        restored, restored_meta = checkpointer.restore(target_of(state))
    assert_same_bits(state, restored)
    assert isinstance(restored, TrainState)
    assert restored.carried is None
    assert jax.random.key_impl(restored.key) == jax.random.key_impl(state.key)
    assert restored_meta == meta
    assert type(restored_meta["data"]["epoch"]) is int


@pytest.mark.thorough
def test_round_trip_keeps_every_dtype_and_odd_bits(tmp_path: Path) -> None:
    bits = jnp.asarray([0x7FC00001, 0xFFC12345, 0x80000000, 1], jnp.uint32)  # two NaNs, minus zero, a denormal
    tree = {
        "float": jax.lax.bitcast_convert_type(bits, jnp.float32),
        "half": jnp.asarray([jnp.nan, -0.0, jnp.inf], jnp.float16),
        "bool": jnp.asarray([True, False]),
        "int8": jnp.asarray([-128, 127], jnp.int8),
        "scalar": jnp.bfloat16(3),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), (2, 3)),
        "raw key": jax.random.PRNGKey(5),
        "list": [jnp.uint8(1), (jnp.int16(-2), None)],
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, tree, {}, wait=True)
        assert_same_bits(tree, checkpointer.restore(tree)[0])


def test_round_trip_keeps_empty_arrays(tmp_path: Path) -> None:
    """Some optimizers keep an empty array for each vector of parameters (``optax.contrib.galore``)."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    replicated = jax.device_put(jnp.zeros((0, 0), jnp.bfloat16), NamedSharding(mesh, PartitionSpec()))
    tree = {"a": jnp.arange(3), "b": jnp.zeros((2, 0)), "c": replicated}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree, {}, wait=True)
        restored, _ = checkpointer.restore(tree)
        assert_same_bits(tree, restored)
        assert restored["c"].sharding == replicated.sharding
        with pytest.raises(ValueError, match="do not match"):
            checkpointer.restore({**tree, "b": jnp.zeros((0, 2))})


def test_round_trip_of_64_bit_types(tmp_path: Path) -> None:
    with jax.enable_x64(True), Checkpointer(tmp_path) as checkpointer:
        tree = {
            "f": jnp.asarray([1 / 3, -0.0], jnp.float64),
            "i": jnp.asarray([-(2**40), 3]),
            "c": jnp.asarray([1 + 2j]),
        }
        assert {leaf.dtype.itemsize for leaf in tree.values()} == {8, 16}
        checkpointer.save(0, tree, {})
        assert_same_bits(tree, checkpointer.restore(target_of(tree))[0])
        assert checksums(tree) != checksums(tree | {"i": tree["i"] + 2**33})


def test_specs_are_a_valid_restore_target(tmp_path: Path) -> None:
    specs = {
        "embed": spec.ArraySpec((4, 2), ("vocab", "embed"), spec.Normal(0.02)),
        "scale": spec.ArraySpec((2,), (None,)),
    }
    params = spec.init(specs, jax.random.key(0))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, params, {})
        assert_same_bits(params, checkpointer.restore(specs)[0])


def test_a_resumed_run_equals_the_uninterrupted_run_bitwise(tmp_path: Path) -> None:
    state = new_state()
    for _ in range(6):
        state = jitted_step(state)
    uninterrupted, state = state, new_state()
    with Checkpointer(tmp_path) as checkpointer:
        for _ in range(3):
            state = jitted_step(state)
        checkpointer.save(3, state, {})
    with Checkpointer(tmp_path) as checkpointer:
        state, _ = checkpointer.restore(jax.eval_shape(new_state))
    assert int(state.step) == 3
    for _ in range(3):
        state = donating_step(state)
    assert_same_bits(uninterrupted, state)


def test_buffers_may_be_donated_and_meta_changed_right_after_an_asynchronous_save(tmp_path: Path) -> None:
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    devices = jax.devices()
    for sharding in (
        jax.sharding.SingleDeviceSharding(devices[0]),
        NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data")),
    ):
        tree = step({str(i): jax.device_put(jnp.full((1 << 18,), i, jnp.float32), sharding) for i in range(4)})
        expected = {name: np.array(leaf) for name, leaf in tree.items()}
        meta = {"row": 7, "buffer": [1, 2]}
        with Checkpointer(tmp_path / type(sharding).__name__) as checkpointer:
            checkpointer.save(1, tree, meta)
            for _ in range(3):
                tree = step(tree)
            meta["row"] = 8
            meta["buffer"].clear()
            restored, restored_meta = checkpointer.restore(target_of(tree, sharding))
        for name, leaf in restored.items():
            np.testing.assert_array_equal(np.asarray(leaf), expected[name])
        assert restored_meta == {"row": 7, "buffer": [1, 2]}


def test_donating_the_state_after_a_save_does_not_change_the_checkpoint(tmp_path: Path) -> None:
    state, expected = new_state(), new_state()
    for _ in range(2):
        state, expected = donating_step(state), jitted_step(expected)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {})
        state = donating_step(state)
        assert_same_bits(expected, checkpointer.restore(jax.eval_shape(new_state))[0])


# ------------------------------------------------------------------------------------------------ other meshes


def shardings_by_name() -> dict[str, Any]:
    """Shardings of a [16, 8] array: one device, eight devices, two by four, replicated, and a mesh of explicit axes."""
    explicit = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    return {
        "one": jax.sharding.SingleDeviceSharding(jax.devices()[3]),
        "eight": NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data")),
        "two by four": NamedSharding(jax.make_mesh((2, 4), ("data", "model")), PartitionSpec("data", "model")),
        "replicated": NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec()),
        "explicit": NamedSharding(explicit, PartitionSpec(None, "data")),
    }


@pytest.mark.parametrize(
    ("saved", "restored"),
    [
        ("one", "eight"),
        ("eight", "one"),
        ("eight", "two by four"),
        ("replicated", "eight"),
        ("two by four", "explicit"),
    ],
)
def test_restore_onto_another_mesh(tmp_path: Path, saved: str, restored: str) -> None:
    before, after = shardings_by_name()[saved], shardings_by_name()[restored]
    tree = {
        "weight": jax.device_put(jax.random.normal(jax.random.key(0), (16, 8)), before),
        "keys": jax.device_put(jax.random.split(jax.random.key(0), (16, 8)), before),
        "here": jnp.arange(3),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree, {})
        target = target_of({name: tree[name] for name in ("weight", "keys")}, after) | {"here": tree["here"]}
        result, _ = checkpointer.restore(target)
    assert_same_bits(tree, result)
    assert result["weight"].sharding.is_equivalent_to(after, 2)
    assert result["keys"].sharding.is_equivalent_to(after, 2)
    assert result["here"].sharding.is_equivalent_to(tree["here"].sharding, 1)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_restore_into_the_other_layer_layout(tmp_path: Path, stacked: bool, count: int) -> None:
    """The tree also has arrays without layers, and layers without arrays. One target is on a mesh."""
    key = jax.random.key(3)
    layer = {
        "w": spec.ArraySpec((8, 4), ("embed", "mlp"), spec.Normal(1.0)),
        "norm": {"scale": spec.ArraySpec((8,), ("embed",))},
    }
    specs = {
        is_stacked: {"table": layer["w"], "encoder": {"layers": spec.layers([layer] * count, stacked=is_stacked)}}
        for is_stacked in (True, False)
    }
    saved, wanted = spec.init(specs[stacked], key), spec.init(specs[not stacked], key)
    masked = {True: {"layers": {"w": optax.MaskedNode()}}, False: {"layers": ({"w": optax.MaskedNode()},) * count}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": saved, "key": key, "masked": masked[stacked]}, {}, wait=True)
    mesh = NamedSharding(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), PartitionSpec())
    for sharding in (None, mesh):
        shape = lambda leaf, sharding=sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
        target = jax.tree.map(shape, {"params": wanted, "key": key, "masked": masked[not stacked]})
        restored, _ = Checkpointer(tmp_path).restore(target)
        assert_same_bits(wanted, restored["params"])
        assert bool(restored["key"] == key)
        if sharding is not None:
            assert {leaf.sharding for leaf in jax.tree.leaves(restored["params"])} == {mesh}
    one_more_layer = spec.abstract(
        {"table": layer["w"], "encoder": {"layers": spec.layers([layer] * (count + 1), stacked=not stacked)}}
    )
    with pytest.raises(ValueError, match=r"encoder/layers/"):
        Checkpointer(tmp_path).restore({"params": one_more_layer, "key": key})


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "optimizer", [optax.novograd(0.1), optax.scale_by_lbfgs(memory_size=2)], ids=["one number per weight", "memory"]
)
def test_an_optimizer_array_without_a_layer_axis_is_not_restored_in_the_other_layout(
    tmp_path: Path, optimizer: optax.GradientTransformation, stacked: bool
) -> None:
    layer = {"w": spec.ArraySpec((8, 4), ("embed", "mlp"))}

    def state(stacked: bool) -> dict[str, Any]:
        params = spec.init({"layers": spec.layers([layer] * 2, stacked=stacked)}, jax.random.key(0))
        return {"params": params, "optimizer": optimizer.init(params)}

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(stacked), {}, wait=True)
        checkpointer.restore(state(stacked))
        no_layer_axis = rf"optimizer/.*layers/w.*: use scan_layers={stacked}, as in the checkpoint"
        with pytest.raises(ValueError, match=rf"{no_layer_axis}|expected float32\[2\], got float32\[\]"):
            checkpointer.restore(state(not stacked))


def test_uncommitted_arrays_stay_uncommitted(tmp_path: Path) -> None:
    """An uncommitted step or key can be used with sharded parameters, before the save and after the restore."""
    mesh = jax.make_mesh((8,), ("data",))
    weight = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, PartitionSpec("data")))
    tree = {"weight": weight, "step": jnp.int32(3), "key": jax.random.key(0)}
    step = jax.jit(lambda tree: tree["weight"] + tree["step"] + jax.random.normal(tree["key"], (16,)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree, {})
        restored, _ = checkpointer.restore(tree)
    assert not restored["step"].committed
    np.testing.assert_array_equal(step(tree), step(restored))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_save_and_restore_under_a_global_mesh(tmp_path: Path, kind: AxisType) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    tree = {"free": jnp.arange(4.0), "key": jax.random.key(1)}
    with jax.set_mesh(mesh), Checkpointer(tmp_path) as checkpointer:
        tree["sharded"] = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, PartitionSpec("data")))
        checkpointer.save(1, tree, {})
        assert_same_bits(tree, checkpointer.restore(tree)[0])


def test_a_target_that_jax_cannot_create_raises(tmp_path: Path) -> None:
    abstract = jax.sharding.AbstractMesh((8,), ("data",))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(8)}, {}, wait=True)
        target = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(abstract, PartitionSpec("data")))
        with pytest.raises(ValueError, match=r"'x' has the sharding .* which has no devices"):
            checkpointer.restore({"x": target})
        with jax.enable_x64(True):
            checkpointer.save(2, {"x": jnp.zeros(8, jnp.float64)}, {}, wait=True)
        with pytest.raises(ValueError, match="'x' is float64: set jax_enable_x64"):
            checkpointer.restore({"x": jax.ShapeDtypeStruct((8,), np.dtype("float64"))})


# --------------------------------------------------------------------------------------------------- checksums


DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "float8_e5m2",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksum_detects_a_swap_and_every_flipped_bit(dtype: str) -> None:
    kind = jnp.dtype(dtype)
    data = np.random.default_rng(0).integers(0, 2, 24, np.uint8).astype(bool) if dtype == "bool" else np.arange(24)
    values = np.asarray(jnp.asarray(data).astype(kind)).reshape(4, 6)
    original = checksums({"x": jnp.asarray(values)})["x"]
    different = np.argwhere(values.ravel() != values.ravel()[0])[0, 0]
    swapped = values.ravel().copy()
    swapped[[0, different]] = swapped[[different, 0]]
    distinct_checksums = {original, checksums({"x": jnp.asarray(swapped.reshape(4, 6))})["x"]}
    bits = 1 if dtype == "bool" else 8 * kind.itemsize
    for bit in range(bits):
        flipped = bytearray(values.tobytes())
        flipped[5 * kind.itemsize + bit // 8] ^= 1 << (bit % 8)
        array = jnp.asarray(np.frombuffer(bytes(flipped), kind).reshape(4, 6))
        distinct_checksums.add(checksums({"x": array})["x"])
    assert len(distinct_checksums) == 2 + bits


def test_checksum_does_not_depend_on_the_sharding() -> None:
    array = jax.random.normal(jax.random.key(0), (16, 8))
    sharded = {name: jax.device_put(array, sharding) for name, sharding in shardings_by_name().items()}
    assert len(set(checksums(sharded).values())) == 1


def test_checksum_equals_that_of_earlier_versions() -> None:
    """If the checksum changes, ``restore`` must also accept the old one, or it rejects all earlier checkpoints."""
    values = checksums({"floats": jnp.arange(12, dtype=jnp.float32).reshape(3, 4), "scalar": jnp.bfloat16(-1.5)})
    assert values == GOLDEN


GOLDEN = {"floats": "78dfafae3c073165", "scalar": "4674b25ab182e459"}


# ---------------------------------------------------------------------------------------------------- strictness


def test_a_different_tree_raises_with_a_diff_before_arrays_are_read(tmp_path: Path) -> None:
    tree = {"a": jnp.zeros(3), "b": {"w": jnp.zeros((2, 2)), "k": jax.random.key(0)}, "same": jnp.int32(1)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, tree, {}, wait=True)
        for path in (tmp_path / "4" / "state").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        target = {
            "a": jnp.zeros(3, jnp.bfloat16),
            "b": {"w": jnp.zeros((4,)), "k": jax.random.key(0, impl="rbg")},
            "same": jnp.int32(1),
            "new": jnp.zeros(1),
        }
        with pytest.raises(ValueError, match=r"\(4 differences\)") as caught:
            checkpointer.restore(target)
        del target["new"], target["b"]["w"]
        with pytest.raises(ValueError, match="extra: b/w float32") as caught_extra:
            checkpointer.restore(target)
    text = str(caught.value)
    assert str(tmp_path / "4") in text
    assert "missing: new float32[1]" in text
    assert "differs: a expected bfloat16[3], got float32[3]" in text
    assert "differs: b/w expected float32[4], got float32[2, 2]" in text
    assert "differs: b/k expected key<rbg>[], got key<fry>[]" in text
    assert "same" not in text
    assert not isinstance(caught_extra.value, CorruptCheckpointError)


def test_errors_name_the_problem(tmp_path: Path) -> None:
    tree = {"x": jnp.zeros(2)}
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file is a file"):
        Checkpointer(tmp_path / "file")
    with pytest.raises(ValueError, match="keep_last=0 must be at least 1"):
        Checkpointer(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="directory='gs://bucket/run' is a URL"):
        Checkpointer("gs://bucket/run")
    with Checkpointer(tmp_path / "run") as checkpointer:
        assert (checkpointer.steps(), checkpointer.latest, checkpointer.best) == ([], None, None)
        for read in (
            checkpointer.meta,
            lambda: checkpointer.restore(tree),
            lambda: checkpointer.restore(tree, best=True),
        ):
            with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path / 'run'}"):
                read()
        assert not (tmp_path / "run").exists()
        checkpointer.save(3, tree, {})
        with pytest.raises(FileExistsError, match="run/3 exists"):
            checkpointer.save(3, tree, {})
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 in .*run: the steps are \[3\]"):
            checkpointer.restore(tree, 5)
        with pytest.raises(FileNotFoundError, match=r"has a metric: \[3\]"):
            checkpointer.restore(tree, best=True)
        with pytest.raises(ValueError, match="pass only one of them"):
            checkpointer.restore(tree, 3, best=True)
        with pytest.raises(ValueError, match="step must be an int >= 0, got -1"):
            checkpointer.save(-1, tree, {})
        with pytest.raises(TypeError, match="'x' is 3: a checkpoint holds arrays"):
            checkpointer.save(4, {"x": 3}, {})
        with pytest.raises(TypeError, match="'x' is a ndarray"):
            checkpointer.save(4, {"x": np.zeros(2)}, {})
        with pytest.raises(ValueError, match="same path name"):
            checkpointer.save(4, {"a": {"b": jnp.zeros(1)}, "a/b": jnp.zeros(1)}, {})
        with pytest.raises(TypeError, match=r"meta\['rows'\]\[0\] has the key 3: .* use '3'"):
            checkpointer.save(4, tree, {"rows": [{3: 1}]})
        with pytest.raises(TypeError, match=r"meta\['row'\] is np.int64\(3\) of type int64"):
            checkpointer.save(4, tree, {"row": np.int64(3)})
        assert checkpointer.steps() == [3]


# ---------------------------------------------------------------------------------------------------- corruption


def rewrite(path: Path, change: Any) -> None:
    """Change the arrays of a checkpoint with orbax. The files stay readable, but the recorded checksums are wrong."""
    with ocp.StandardCheckpointer() as orbax:
        arrays = orbax.restore(path / "state", jax.tree.map(np.asarray, STORED))
        shutil.rmtree(path / "state")
        orbax.save(path / "state", change(arrays))


STORED = {"a/one": np.arange(6.0, dtype=np.float32), "a/two": np.arange(4, dtype=np.int32), "b": np.float32(1)}


def saved_twice(directory: Path) -> dict[str, Any]:
    tree = {"a": {"one": jnp.arange(6.0), "two": jnp.arange(4)}, "b": jnp.float32(1)}
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, tree, {})
        checkpointer.save(2, tree, {"n": 2})
    return tree


def test_error_names_the_changed_arrays_and_an_intact_step(tmp_path: Path) -> None:
    tree = saved_twice(tmp_path)
    rewrite(tmp_path / "2", lambda arrays: arrays | {"a/one": arrays["a/one"][[0, 2, 1, 3, 4, 5]], "b": np.float32(2)})
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CorruptCheckpointError) as caught:
            checkpointer.restore(tree)
        text = str(caught.value)
        assert f"{tmp_path / '2'} is damaged: wrong checksum of a/one, b; the newest intact step before it is 1" in text
        assert_same_bits(tree, checkpointer.restore(tree, 1)[0])
        (tmp_path / "2").rename(tmp_path / "2.bad")
        assert_same_bits(tree, checkpointer.restore(tree)[0])


def damaged_step_pattern(reason: str, path: Path) -> str:
    """Pattern of the error if step 2 is damaged and step 1 is intact."""
    return f"{reason}.*; the newest intact step before it is 1: restore this step, or use on_corrupt=.previous."


def test_every_flipped_bit_of_a_record_is_detected(tmp_path: Path) -> None:
    tree = saved_twice(tmp_path)
    path = tmp_path / "2" / "record" / "metadata"
    original = path.read_bytes()
    generator = np.random.default_rng(0)
    with Checkpointer(tmp_path) as checkpointer:
        for index in generator.choice(len(original), 60, replace=False):
            changed = bytearray(original)
            changed[index] ^= 1 << int(generator.integers(8))
            path.write_bytes(changed)
            try:
                same = json.loads(changed) == json.loads(original)  # the flipped bit may only change white space
            except ValueError:
                same = False
            if same:
                checkpointer.restore(tree)
                continue
            with pytest.raises(CorruptCheckpointError, match=damaged_step_pattern("record", path)):
                checkpointer.restore(tree)
            assert checkpointer.steps() == [1]
            assert list(checkpointer.damaged()) == [2]
        path.write_bytes(original)
        assert checkpointer.restore(tree)[1] == {"n": 2}


def test_the_oldest_records_without_step_and_extra_are_read(tmp_path: Path) -> None:
    tree = saved_twice(tmp_path)
    path = tmp_path / "2" / "record" / "metadata"
    record = json.loads(path.read_text())
    for name in ("step", "extra", "checksum"):
        del record[name]
    path.write_text(json.dumps(record | {"checksum": checkpoint._digest(record)}))
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.latest_scheduled == 2
        restored, _ = checkpointer.restore(tree)
    assert spec.differences(tree, restored) == []


def test_a_record_of_another_version_raises(tmp_path: Path) -> None:
    tree = saved_twice(tmp_path)
    path = tmp_path / "2" / "record" / "metadata"
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps(record))
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CorruptCheckpointError, match="has no checksum: it is damaged, or jaxlm 0.1 wrote it"):
            checkpointer.restore(tree)
        record["format"] = checkpoint.FORMAT + 1
        record["checksum"] = checkpoint._digest(record)
        path.write_text(json.dumps(record))
        with pytest.raises(CorruptCheckpointError, match=rf"has format {checkpoint.FORMAT + 1}, .*: update jaxlm"):
            checkpointer.restore(tree)


def test_an_earlier_step_is_restored_only_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = saved_twice(tmp_path)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, tree, {"n": 3}, wait=True)
        rewrite(tmp_path / "2", lambda arrays: {**arrays, "b": np.float32(7)})
        (tmp_path / "3" / "record" / "metadata").write_text("{")
        with pytest.raises(CorruptCheckpointError, match="the newest intact step before it is 2"):
            checkpointer.restore(tree)  # the arrays of step 2 are damaged, but this call reads only its record
        restored, meta = checkpointer.restore(tree, on_corrupt="previous")
        assert_same_bits(tree, restored)
        assert meta == {}
        directory_names = sorted(name.split("-")[0] for name in names_in(tmp_path))
        assert directory_names == ["1", "2.corrupt", "3.corrupt"]
        assert "wrong checksum of b; it is kept as" in caplog.text
        with pytest.raises(ValueError, match="is only for the latest step"):
            checkpointer.restore(tree, 1, on_corrupt="previous")
        with pytest.raises(ValueError, match="on_corrupt='Previous' is unknown: choose from stop, previous"):
            checkpointer.restore(tree, on_corrupt="Previous")  # type: ignore[arg-type]
        (tmp_path / "1" / "record" / "metadata").unlink()
        with pytest.raises(CorruptCheckpointError, match="no other step is intact"):
            checkpointer.restore(tree, on_corrupt="previous")


def test_older_steps_are_deleted_only_after_the_new_step_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync = integrity.sync
    monkeypatch.setattr(integrity, "sync", lambda path: (events.append(str(path)), real_sync(path)))
    monkeypatch.setattr(shutil, "rmtree", lambda path: events.append(f"delete {path.name}"))
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(2)}, {}, wait=True)
        events.clear()
        checkpointer.save(2, {"x": jnp.zeros(2)}, {}, wait=True)
    record, state = (str(tmp_path / "2" / name) for name in ("record", "state"))
    files = [str(path) for path in (tmp_path / "2").rglob("*") if path.is_file()]
    assert all(events.index(path) < events.index(str(Path(path).parent)) for path in files)
    order = [events.index(path) for path in (record, state, str(tmp_path / "2"), str(tmp_path), "delete 1.deleted")]
    assert order[2:] == sorted(order[2:])
    assert max(order[:2]) < order[2]


def test_every_changed_byte_of_the_arrays_is_detected_or_harmless(tmp_path: Path) -> None:
    tree = {"weight": jax.random.normal(jax.random.key(0), (64, 64))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree, {}, wait=True)
        path = max((path for path in (tmp_path / "1" / "state").rglob("*") if path.is_file()), key=os.path.getsize)
        original = path.read_bytes()
        assert len(original) > 64 * 64 * 3
        for index in np.linspace(0, len(original) - 1, 40).astype(int):
            path.write_bytes(original[:index] + bytes([original[index] ^ 16]) + original[index + 1 :])
            try:
                restored, _ = checkpointer.restore(tree)
            except CorruptCheckpointError as error:
                assert str(tmp_path / "1") in str(error)  # noqa: PT017
            else:  # this byte does not affect the arrays
                assert_same_bits(tree, restored)


def test_lost_array_files_are_reported_as_corruption(tmp_path: Path) -> None:
    tree = {
        "x": jnp.zeros(4)
    }  # one array: if one of several fails, tensorstore reports the others as unraisable exceptions
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree, {})
        checkpointer.save(2, tree, {}, wait=True)
        shutil.rmtree(tmp_path / "2" / "state" / "d")
        with pytest.raises(
            CorruptCheckpointError, match=r"arrays of .*/2 cannot be read: .*; the newest intact .* is 1"
        ):
            checkpointer.restore(tree)


def test_meta_is_read_without_arrays(tmp_path: Path) -> None:
    saved_twice(tmp_path)
    for path in (tmp_path / "2" / "state").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.meta() == checkpointer.meta(2) == {"n": 2}
        assert checkpointer.meta(1) == {}


# ------------------------------------------------------------------------------------------ which steps are kept


def test_keeps_the_last_steps_and_the_best_step(tmp_path: Path) -> None:
    losses = {10: float("nan"), 20: 1.0, 30: float("nan"), 40: 2.0, 50: None, 60: 1.0}
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        for step, loss in losses.items():
            checkpointer.save(step, {"x": jnp.float32(step)}, {}, metric=loss)
        checkpointer.wait()
        assert checkpointer.steps() == [20, 50, 60]
        assert (checkpointer.latest, checkpointer.best) == (60, 20)
        assert float(checkpointer.restore({"x": jnp.float32(0)}, best=True)[0]["x"]) == 20
    assert names_in(tmp_path) == {"20", "50", "60"}


def test_keeps_only_the_last_step_without_a_metric(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, {"x": jnp.float32(step)}, {}, wait=True)
            assert checkpointer.steps() == [step]


def test_saving_an_earlier_step_does_not_delete_it(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(9, {"x": jnp.float32(9)}, {}, wait=True)
        checkpointer.save(4, {"x": jnp.float32(4)}, {}, wait=True)
        assert checkpointer.steps() == [4, 9]


def test_extra_steps_do_not_count_for_keep_last_and_roll_back_deletes_them(tmp_path: Path) -> None:
    def tree(step: int) -> dict[str, Any]:
        return {"x": jnp.float32(step)}

    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        with pytest.raises(FileNotFoundError, match=f"no checkpoint in {tmp_path} to go back to"):
            checkpointer.roll_back(tree(0))
        for step, extra in [(1, False), (2, False), (3, True)]:
            checkpointer.save(step, tree(step), {"n": step}, extra=extra, wait=True)
        assert checkpointer.steps() == [1, 2, 3]
        checkpointer.save(4, tree(4), {}, extra=True, wait=True)
        assert checkpointer.steps() == [1, 2, 4]
        assert float(checkpointer.restore(tree(0))[0]["x"]) == 4
        (tmp_path / "5").mkdir()  # a damaged step
        restored, meta = checkpointer.roll_back(tree(0))
        assert (float(restored["x"]), meta) == (2, {"n": 2})
        assert {name.split("-")[0] for name in names_in(tmp_path)} == {"1", "2", "5.corrupt"}
        assert float(checkpointer.restore(tree(0))[0]["x"]) == 2  # the damaged step is no reason to stop
        for step, extra in [(3, True), (4, False)]:
            checkpointer.save(step, tree(step), {}, extra=extra, wait=True)
        assert checkpointer.steps() == [2, 4]


def test_a_renamed_step_raises(tmp_path: Path) -> None:
    tree = saved_twice(tmp_path)
    (tmp_path / "2").rename(tmp_path / "3")
    renamed = pytest.raises(CorruptCheckpointError, match=r"3 is the checkpoint of step 2: it was renamed; .* is 1")
    with Checkpointer(tmp_path) as checkpointer, renamed:
        checkpointer.restore(tree)


def test_only_a_save_removes_leftovers(tmp_path: Path) -> None:
    tree = saved_twice(tmp_path)
    shutil.copytree(tmp_path / "2", tmp_path / "7.orbax-checkpoint-tmp")
    shutil.copytree(tmp_path / "2", tmp_path / "0.deleted")
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "half").write_text("a copy that was cut short")
    (tmp_path / "6" / "record").mkdir(parents=True)
    (tmp_path / "6" / "record" / "metadata").write_text('{"arrays": {"a')
    (tmp_path / "notes.txt").write_text("mine")
    before = names_in(tmp_path)
    with Checkpointer(tmp_path, keep_last=2) as reader:
        assert reader.steps() == [1, 2]
        assert list(reader.damaged()) == [5, 6]
        with pytest.raises(CorruptCheckpointError, match=r"6/record is damaged.*; the newest intact .* is 2"):
            reader.restore(tree)
        reader.restore(tree, 2)
    assert names_in(tmp_path) == before
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        checkpointer.save(7, tree, {}, wait=True)
        assert checkpointer.steps() == [2, 7]
        checkpointer.save(5, tree, {}, wait=True)
        assert checkpointer.steps() == [5, 7]
        assert_same_bits(tree, checkpointer.restore(tree, 5)[0])
    shutil.copytree(tmp_path / "7", tmp_path / "8.orbax-checkpoint-tmp-1")
    shutil.copytree(tmp_path / "7", tmp_path / "2.deleted")
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.remove_leftovers()
        assert checkpointer.steps() == [5, 7]
    new_names = names_in(tmp_path) - {"5", "6", "7", "notes.txt"}
    assert [name.split("-")[0] for name in new_names] == ["5.corrupt"]
    assert (tmp_path / new_names.pop() / "half").exists()


def test_a_failed_save_raises_and_keeps_the_earlier_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"x": jnp.arange(4.0)}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, tree, {}, wait=True)
        with monkeypatch.context() as patched:
            patched.setattr(checkpointer._orbax, "save", fail)
            with pytest.raises(OSError, match="Input/output error"):
                checkpointer.save(2, tree, {}, wait=True)
        assert checkpointer.steps() == [1]
        checkpointer.save(2, tree, {}, wait=True)
        assert_same_bits(tree, checkpointer.restore(tree)[0])


def test_a_file_with_the_name_of_an_interrupted_save_is_removed(tmp_path: Path) -> None:
    tree = {"x": jnp.arange(4.0)}
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(1, tree, {}, wait=True)
        (tmp_path / "2.orbax-checkpoint-tmp").write_text("not a directory")
        checkpointer.save(2, tree, {}, wait=True)
        assert checkpointer.steps() == [2]
        assert [path.name for path in tmp_path.iterdir() if "orbax" in path.name] == []


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            OSError(28, "No space left on device"),
            OSError,
            r"the disk of .* is full \(.* free\): the earlier checkpoints",
        ),
        (ValueError("UNKNOWN: write: No space left on device"), OSError, "the disk of .* is full .*Free some space"),
        (
            PermissionError(13, "Permission denied", "x"),
            PermissionError,
            "is not writable .*: the earlier checkpoints",
        ),
    ],
)
def test_error_for_an_unwritable_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], message: str
) -> None:
    tree = saved_twice(tmp_path)
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:

        def fail() -> None:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(checkpointer._orbax, "wait_until_finished", fail)
            with pytest.raises(kind, match=message):
                checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
        assert_same_bits(tree, checkpointer.restore(tree)[0])


def test_close_after_a_failed_save_deletes_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"x": jnp.arange(4.0)}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, tree, {}, wait=True)
    checkpointer.save(2, tree, {}, extra=True, wait=True)
    monkeypatch.setattr(checkpointer._orbax, "save", fail)
    with pytest.raises(OSError, match="the disk of .* is full"):
        checkpointer.save(3, tree, {})
    checkpointer.close()
    assert checkpointer.steps() == [1, 2]
    checkpointer = Checkpointer(tmp_path / "new")
    monkeypatch.setattr(checkpointer._orbax, "save", fail)
    with pytest.raises(OSError, match="the disk of .* is full"):
        checkpointer.save(1, tree, {})
    checkpointer.close()


def test_raised_errors_are_not_also_logged(tmp_path: Path) -> None:
    def is_logged(path: str, level: int, error: Exception | None, logger: str = "absl") -> bool:
        info = None if error is None else (type(error), error, None)
        record = logging.LogRecord(logger, level, path, 1, "a thread raised an exception", None, info)
        return bool(logging.getLogger(logger).filter(record))

    with Checkpointer(tmp_path), Checkpointer(tmp_path):
        orbax, other = ocp.__file__, optax.__file__
    assert not is_logged(orbax, logging.ERROR, OSError())
    assert is_logged(orbax, logging.WARNING, OSError())
    assert is_logged(orbax, logging.ERROR, None)
    assert is_logged(other, logging.ERROR, OSError())
    assert not is_logged(other, logging.ERROR, ValueError("DATA_LOSS [tensorstore_spec='...']"), logger="asyncio")
    assert is_logged(other, logging.ERROR, ValueError("DATA_LOSS"), logger="asyncio")


def test_errors_of_other_reads_after_a_failed_restore_are_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: printed.append(str(error.exc_value)))
    checkpoint._ignore_closed_event_loop.__wrapped__()
    loop = asyncio.new_event_loop()
    loop.close()
    for call in (lambda: loop.call_soon_threadsafe(print), lambda: [][0]):
        try:
            call()
        except (RuntimeError, IndexError) as error:
            trace = error.__traceback__
            assert trace is not None
            # Without the frame of this test, as in a thread that has no Python frame.
            sys.unraisablehook(SimpleNamespace(exc_value=error, exc_traceback=trace.tb_next.tb_next or trace))  # type: ignore
            sys.unraisablehook(SimpleNamespace(exc_value=error, exc_traceback=trace))  # type: ignore[arg-type]
    assert printed == ["Event loop is closed", "list index out of range", "list index out of range"]


# ------------------------------------------------------------------------------------------------------- kill -9

WORKER = """
import sys, jax, jax.numpy as jnp
from jaxlm.checkpoint import Checkpointer
tree = {str(i): jax.random.bits(jax.random.key(i), (1 << 20,)) for i in range(4)}
with Checkpointer(sys.argv[1], keep_last=2) as checkpointer:
    step = 0
    if checkpointer.latest is not None:
        tree, meta = checkpointer.restore(tree)
        step = meta["step"]
    while True:
        step += 1
        tree = jax.tree.map(lambda x: x + 1, tree)
        checkpointer.save(step, tree, {"step": step}, metric=-step)
"""


@pytest.mark.thorough
def test_kill_in_the_middle_of_a_save(tmp_path: Path) -> None:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(Path(jaxlm.checkpoint.__file__).parents[1]),
    }
    directory, chance, interrupted, reached = tmp_path / "run", random.Random(0), 0, 0
    target = {str(i): jax.ShapeDtypeStruct((1 << 20,), jnp.uint32) for i in range(4)}
    for _ in range(3):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, str(directory)], env=environment)
        deadline = time.monotonic() + 180
        try:
            while True:  # wait for two more saves, then kill the process during the next save
                assert worker.poll() is None
                assert time.monotonic() < deadline
                saving = list(directory.glob("*.orbax-checkpoint-tmp*"))
                if saving and int(saving[0].name.split(".")[0]) > reached + 2:
                    break
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.03))
        finally:
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        interrupted += bool(list(directory.glob("*.orbax-checkpoint-tmp*")))
        with Checkpointer(directory) as checkpointer:
            tree, meta = checkpointer.restore(target)
            assert checkpointer.latest == meta["step"] >= reached + 2
        reached = meta["step"]
        for i in range(4):
            first = jax.random.bits(jax.random.key(i), (1 << 20,))
            np.testing.assert_array_equal(np.asarray(tree[str(i)]), np.asarray(first + jnp.uint32(reached)))
    assert interrupted
    with Checkpointer(directory, keep_last=2) as checkpointer:
        checkpointer.save(reached + 1, tree, {"step": reached + 1}, metric=0.0)
    assert names_in(directory) == {str(reached), str(reached + 1)}
