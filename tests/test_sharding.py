import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlm import sharding
from jaxlm.sharding import (
    DATA_PARALLEL,
    DEFAULT_RULES,
    EXPERT_PARALLEL,
    FULLY_SHARDED,
    TENSOR_PARALLEL,
    Rules,
    Sharding,
    active,
    constrain,
    make_mesh,
    num_shards,
    parse_mesh,
)
from jaxlm.spec import ArraySpec


def test_rules_map_logical_axes_to_mesh_axes():
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    assert DEFAULT_RULES.partition(("batch", "seq", "activation_embed"), mesh) == P(("data", "fsdp"), None, None)
    assert DEFAULT_RULES.partition(("embed", None, "heads", "kv"), mesh) == P("fsdp", None, "tensor", None)
    assert DATA_PARALLEL.partition(("embed", "mlp"), mesh) == P(None, None)
    assert FULLY_SHARDED.partition(("vocab", "embed"), mesh) == P(None, "fsdp")
    assert TENSOR_PARALLEL.partition(("vocab", "embed"), mesh) == P("tensor", None)
    assert DEFAULT_RULES.partition(("batch", "mlp"), make_mesh("data=8")) == P("data", None)


def test_the_platform_is_that_of_the_mesh_or_of_the_default_device():
    cpu, other = jax.devices()[0], jax.devices()[3]
    assert sharding._device() is cpu
    for default in (other, "cpu"):
        with jax.default_device(default):
            assert sharding._device() is (other if default is other else cpu)
            with Sharding(make_mesh("data=8")).scope():
                assert sharding._device() is cpu
    assert sharding.platform() == "cpu"


def test_the_batch_of_experts_is_split_over_the_other_mesh_axes_of_the_batch():
    mesh = make_mesh("data=2,fsdp=2,expert=2")
    assert DEFAULT_RULES.partition(("batch", None), mesh) == P(("data", "fsdp", "expert"), None)
    assert DEFAULT_RULES.partition(("expert_batch", "expert", None), mesh) == P(("data", "fsdp"), "expert", None)
    assert EXPERT_PARALLEL.partition(("expert_batch", "expert"), mesh) == P(None, "expert")
    assert DATA_PARALLEL.partition(("expert_batch", "expert"), mesh) == P("data", None)
    with pytest.raises(ValueError, match="expert_batch has no rule of its own"):
        Rules.of(expert_batch="data")
    with pytest.raises(ValueError, match="no logical axis is called 'expert_batc': did you mean") as error:
        Rules.of(expert_batc="data")
    assert "expert_batch" not in str(error.value).split("called 'expert_batc'")[1]


def test_error_for_two_logical_axes_on_one_mesh_axis():
    rules = Rules.of(heads="tensor", kv="tensor")
    message = r"'heads' and 'kv' of an array with axes \('heads', 'kv'\) are both mapped to mesh axis 'tensor'"
    with pytest.raises(ValueError, match=message):
        rules.partition(("heads", "kv"), make_mesh("tensor=8"))


@pytest.mark.parametrize("name", ["expert", "mlp"])
def test_error_for_a_sum_over_a_mesh_axis_that_splits_the_result(name):
    """Otherwise, ``psum`` would add the outputs of different tokens."""
    axes = ("batch", "seq", None)
    message = f"'seq' and {name!r} of an array .* both mapped to mesh axis 'tensor'"
    for out_axes in (axes, [axes, ("batch",)]):
        with Sharding(make_mesh("data=2,tensor=4"), Rules.of(batch="data", seq="tensor", **{name: "tensor"})).scope():
            with pytest.raises(ValueError, match=message):
                sharding.map_shards(jnp.sin, [axes], out_axes, sum_over=("expert", "mlp"))
            sharding.map_shards(jnp.sin, [axes], out_axes)  # without a sum


def test_errors_for_wrong_names_suggest_the_right_name():
    with pytest.raises(ValueError, match="no logical axis is called 'head': did you mean 'heads'"):
        Rules.of(head="tensor")
    with pytest.raises(ValueError, match="no logical axis is called 'emebd': did you mean 'embed'"):
        DEFAULT_RULES.partition(("emebd",), make_mesh("data=8"))
    with pytest.raises(ValueError, match="mesh axis 'tenosr' has no rule.*did you mean 'tensor'"):
        Sharding(make_mesh("tenosr=8"))


def test_error_for_a_mesh_with_explicit_axes():
    message = (
        "mesh axis 'data' has axis type Explicit, but Sharding needs a mesh with Auto axes: use .*leave axis_type out"
    )
    with pytest.raises(ValueError, match=message):
        Sharding(make_mesh("data=8", axis_type=AxisType.Explicit))


def test_error_for_an_indivisible_axis_suggests_a_fix():
    sharding = Sharding(make_mesh("data=2,tensor=4"))
    with pytest.raises(
        ValueError,
        match=r"head: axis 'vocab' of size 65 is not divisible by mesh axes tensor=4 \(4 shards\): make 'vocab' a "
        r"multiple of 4 or change the mesh data=2,tensor=4 \(for vocab: vocab_multiple\)",
    ):
        sharding.tree({"head": ArraySpec((65, 32), ("vocab", "embed"))})
    with pytest.raises(ValueError, match=r"a batch: axis 'batch' of size 3 .* \(2 shards\)"):
        sharding.named_sharding(("batch", "seq"), (3, 8), "a batch")


@pytest.mark.parametrize(
    "text", ["data", "data=", "data=0", "data=-1", "=2", "data=2,data=4", "data=2,,tensor=4", "", "data=²"]
)
def test_error_for_an_invalid_mesh_string(text):
    with pytest.raises(ValueError, match="cannot read"):
        parse_mesh(text)


def test_a_mesh_must_use_all_devices():
    assert parse_mesh("data=4, tensor=2") == {"data": 4, "tensor": 2}
    assert make_mesh({"data": 4, "tensor": 2}).shape == {"data": 4, "tensor": 2}
    assert make_mesh("data=2", devices=jax.devices()[:2]).size == 2
    with pytest.raises(ValueError, match="mesh data=3 needs 3 devices, there are 8: .*device_count=3"):
        make_mesh("data=3")


def test_constrain_has_an_effect_only_in_a_scope():
    x = jnp.zeros((8, 4))
    assert constrain(x, ("batch", "embed")) is x
    sharding = Sharding(make_mesh("data=8"))

    def split(x):
        with sharding.scope():
            assert active() is sharding
            return constrain(x, ("batch", None))

    assert jax.jit(split)(x).sharding.spec[0] == "data"
    assert active() is None
    with pytest.raises(ValueError, match="activation: axis 'batch' of size 7"):
        jax.jit(split)(jnp.zeros((7, 4)))


def test_abstract_arrays_carry_their_sharding():
    sharding = Sharding(make_mesh("fsdp=8"))
    (leaf,) = jax.tree.leaves(sharding.abstract({"w": ArraySpec((16, 3), ("embed", None), dtype=jnp.bfloat16)}))
    assert (leaf.shape, leaf.dtype) == ((16, 3), np.dtype(jnp.bfloat16))
    assert leaf.sharding.shard_shape(leaf.shape) == (2, 3)


def test_rules_are_hashable_and_merge():
    sequence, expert = Rules.of(seq="sequence"), Rules.of(batch="expert", expert="expert")
    assert hash(DEFAULT_RULES) == hash(DATA_PARALLEL | FULLY_SHARDED | TENSOR_PARALLEL | sequence | expert)
    assert dict((DATA_PARALLEL | FULLY_SHARDED).table)["batch"] == ("data", "fsdp")


@pytest.mark.parametrize("mesh", ["data=4,fsdp=2", "tensor=2,data=4", "tensor=8"])
def test_one_process_has_all_rows_and_from_rows_shards_them(mesh):
    sharding = Sharding(make_mesh(mesh))
    assert sharding.local_rows(16) == list(range(16))
    local = np.arange(48).reshape(16, 3)
    rows = sharding.from_rows(local)
    np.testing.assert_array_equal(rows, local)
    assert rows.sharding.is_equivalent_to(sharding.named_sharding(("batch",)), 2)


def test_error_for_an_indivisible_number_of_rows():
    sharding = Sharding(make_mesh("data=4,fsdp=2"))
    for call in (lambda: sharding.local_rows(12), lambda: sharding.from_rows(np.zeros((12, 3)))):
        with pytest.raises(ValueError, match=r"a batch: axis 'batch' of size 12 is not divisible by .* \(8 shards\)"):
            call()


def test_jit_traces_again_in_another_scope_and_knows_static_arguments_by_position_and_name():
    shards = []

    @jax.jit(static_argnames=("power",), donate_argnames="y")
    def f(x, power, y):
        shards.append(num_shards(("batch",)))
        return y + x**power

    def call(power_by_name=False):
        y = jnp.ones(8)
        out = f(jnp.full(8, 3.0), power=2, y=y) if power_by_name else f(jnp.full(8, 3.0), 2, y)
        assert y.is_deleted()
        np.testing.assert_array_equal(out, np.full(8, 10.0))

    call()
    call()
    assert shards == [1]
    for mesh in ("data=8", "data=2,tensor=4", "data=8"):
        with Sharding(make_mesh(mesh)).scope():
            call()
    assert shards == [1, 8, 2]
    assert f._cache_size() == 3
    call(power_by_name=True)
    assert shards == [1, 8, 2, 1]
