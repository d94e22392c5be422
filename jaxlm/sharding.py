"""Sharding: maps the logical axes of arrays to the axes of a mesh.

Models and other modules name only the logical axes of an array (``batch seq embed heads kv mlp vocab layers ...``). A
:class:`Rules` table says which mesh axes split each logical axis. Five such tables are predefined: data, tensor,
sequence and expert parallelism, and fully sharded parameters. :data:`DEFAULT_RULES` contains all five. For example:

    >>> sharding = Sharding(make_mesh("data=4,tensor=2"))                   # doctest: +SKIP
    >>> params = jax.jit(model.init, out_shardings=sharding.tree(model.specs))(key)   # doctest: +SKIP

The model width has two logical names: ``embed`` in parameters and ``activation_embed`` in activations. Full
sharding needs both names: it splits the width of parameters and the batch of activations over the same mesh axis, so
this mesh axis cannot also split the width of activations. If an array has an axis ``expert``, its batch axis is called
``expert_batch``. This axis is split over the mesh axes of ``batch`` that do not split ``expert``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm import spec as spec_lib
from jaxlm.config import suggest_name

Axes = Sequence[str | None]

LOGICAL_AXES = (
    "batch", "seq", "embed", "activation_embed", "heads", "kv", "mlp", "vocab", "positions", "norm", "slots",
    spec_lib.EXPERT, "expert_batch", spec_lib.LAYERS,
)  # fmt: skip
"""The names of all logical axes. ``heads``: attention heads. ``kv``: width of a head. ``mlp``: inner width of a layer.
``positions``: rows of a table of positions. ``norm``: vectors that no predefined rule splits, such as scales of norms.
``slots``: slots of a key-value cache. The module docstring explains ``activation_embed`` and ``expert_batch``."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """A table of the mesh axes that split each logical axis: ``((logical axis, (mesh axis, ...)), ...)``.

    Rules are hashable. :meth:`of` creates them. A logical axis without a rule is not split. A rule may name mesh axes
    that the mesh does not have. Such mesh axes are ignored, so that one table works for many meshes. But every axis of
    the mesh must occur in a rule: otherwise, :class:`Sharding` raises an error.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, **rules: str | tuple[str, ...]) -> Rules:
        """Rules from keyword arguments, for example ``Rules.of(batch=("data", "fsdp"), heads="tensor")``.

        Raises:
            ValueError: a keyword is not a logical axis that can have a rule.
        """
        for logical in rules:
            if logical == "expert_batch":
                raise ValueError("expert_batch has no rule of its own: it follows from the rules of batch and expert")
            if logical not in LOGICAL_AXES:
                known = [name for name in LOGICAL_AXES if name != "expert_batch"]
                hint = suggest_name(logical, known)
                raise ValueError(f"no logical axis is called {logical!r}: {hint}choose from {', '.join(known)}")
        return cls(tuple((name, (axes,) if isinstance(axes, str) else tuple(axes)) for name, axes in rules.items()))

    def __or__(self, other: Rules) -> Rules:
        """The union of two tables. A logical axis in both tables is split over the mesh axes of both."""
        merged = dict(self.table)
        for name, axes in other.table:
            merged[name] = merged.get(name, ()) + tuple(axis for axis in axes if axis not in merged.get(name, ()))
        return Rules(tuple(merged.items()))

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """The mesh axes that the rules name, in the order of their first use."""
        return tuple(dict.fromkeys(axis for _, axes in self.table for axis in axes))

    def partition(self, axes: Axes, mesh: Mesh) -> PartitionSpec:
        """The ``PartitionSpec`` of an array with these logical ``axes``.

        Raises:
            ValueError: the rules map two of the axes to one mesh axis, or a name is not a logical axis.
        """
        table = dict(self.table)
        experts = table.get(spec_lib.EXPERT, ())
        table["expert_batch"] = tuple(axis for axis in table.get("batch", ()) if axis not in experts)
        used_by: dict[str, str | None] = {}
        entries: list[tuple[str, ...]] = []
        for name in axes:
            if name is not None and name not in LOGICAL_AXES:
                raise ValueError(
                    f"no logical axis is called {name!r}: {suggest_name(name, LOGICAL_AXES)}add it to LOGICAL_AXES"
                )
            mesh_axes = tuple(axis for axis in table.get(name or "", ()) if axis in mesh.axis_names)
            for axis in mesh_axes:
                if axis in used_by:
                    raise ValueError(
                        f"logical axes {used_by[axis]!r} and {name!r} of an array with axes {tuple(axes)} are both "
                        f"mapped to mesh axis {axis!r}: give one of them another mesh axis in the rules"
                    )
                used_by[axis] = name
            entries.append(mesh_axes)
        return PartitionSpec(*entries)


DATA_PARALLEL = Rules.of(batch="data")
FULLY_SHARDED = Rules.of(batch="fsdp", embed="fsdp")
TENSOR_PARALLEL = Rules.of(heads="tensor", mlp="tensor", vocab="tensor")
SEQUENCE_PARALLEL = Rules.of(seq="sequence")
EXPERT_PARALLEL = Rules.of(batch="expert", expert="expert")
"""In layers without experts, the mesh axis ``expert`` splits the batch, so that devices repeat no computation."""
DEFAULT_RULES = DATA_PARALLEL | FULLY_SHARDED | TENSOR_PARALLEL | SEQUENCE_PARALLEL | EXPERT_PARALLEL
"""All five tables. Only the rules whose mesh axes exist in the mesh have an effect."""


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes of the named axes in ``text``: ``"data=4,tensor=2"`` gives ``{"data": 4, "tensor": 2}``.

    Raises:
        ValueError: a part is not ``name=size`` with a positive size, or a name occurs twice.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.strip().partition("=")
        if not equals or not name or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise ValueError(
                f"cannot read {part!r} in mesh {text!r}: write distinct axes as name=size, e.g. data=4,tensor=2"
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(
    shape: str | Mapping[str, int],
    *,
    devices: Sequence[jax.Device] | None = None,
    axis_type: AxisType = AxisType.Auto,
) -> Mesh:
    """A mesh with named axes over ``devices`` (default: all devices).

    Args:
        shape: ``{"data": 4, "tensor": 2}`` or ``"data=4,tensor=2"``.
        axis_type: ``Auto`` lets the compiler propagate shardings. :class:`Sharding` needs this type. ``Explicit`` is
            for ``jax.set_mesh`` without :class:`Sharding`. On an Explicit mesh, models, losses and their gradients
            support parameters with a full copy on each device, and a batch whose rows are split over the mesh. The
            Pallas kernels for TPUs do not run on an Explicit mesh.

    Raises:
        ValueError: the text cannot be read (:func:`parse_mesh`), or the product of the sizes is not the number of
            devices.
    """
    sizes = parse_mesh(shape) if isinstance(shape, str) else dict(shape)
    devices = jax.devices() if devices is None else devices
    needed = math.prod(sizes.values())
    if needed != len(devices):
        hint = (
            f" (for {needed} virtual CPU devices, set XLA_FLAGS=--xla_force_host_platform_device_count={needed})"
            if devices[0].platform == "cpu"
            else ""
        )
        raise ValueError(
            f"mesh {format_sizes(sizes)} needs {needed} devices, there are {len(devices)}: change the mesh{hint}"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(axis_type,) * len(sizes), devices=devices)


def format_sizes(sizes: Mapping[str, int]) -> str:
    """The sizes of named axes as text, such as ``data=4,tensor=2``: the inverse of :func:`parse_mesh`."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and the rules that map logical axes to its axes.

    Raises:
        ValueError: the mesh has an axis whose type is not ``Auto``, or an axis that no rule names.
    """

    mesh: Mesh
    rules: Rules = DEFAULT_RULES

    def __post_init__(self) -> None:
        for axis, axis_type in zip(self.mesh.axis_names, self.mesh.axis_types, strict=True):
            if axis_type != AxisType.Auto:
                raise ValueError(
                    f"mesh axis {axis!r} has axis type {axis_type.name}, but Sharding needs a mesh with Auto axes: use "
                    "jaxlm.sharding.make_mesh and leave axis_type out (an Explicit mesh is for jax.set_mesh without "
                    "Sharding)"
                )
        for axis in self.mesh.axis_names:
            if axis not in self.rules.mesh_axes:
                raise ValueError(
                    f"mesh axis {axis!r} has no rule, so it splits no array: "
                    f"{suggest_name(axis, self.rules.mesh_axes)}the rules name {', '.join(self.rules.mesh_axes)}"
                )

    def named_sharding(self, axes: Axes, shape: Sequence[int] | None = None, what: str = "array") -> NamedSharding:
        """The sharding of one array with logical ``axes``.

        Args:
            shape: the shape of the array. Each size must be divisible by the number of shards of its axis. None: the
                sizes are not checked.
            what: the name of the array in error messages.

        Raises:
            ValueError: a size is not divisible by the number of shards of its axis; or as in :meth:`Rules.partition`.
        """
        partition = self.rules.partition(axes, self.mesh)
        if shape is not None:
            for name, size in zip(axes, shape, strict=True):
                shards = self.num_shards((name,))
                if size % shards:
                    sizes = {axis: self.mesh.shape[axis] for axis in self.mesh_axes((name,))}
                    raise ValueError(
                        f"{what}: axis {name!r} of size {size} is not divisible by mesh axes "
                        f"{format_sizes(sizes)} ({shards} shards): "
                        f"make {name!r} a multiple of {shards} or change the mesh {format_sizes(self.mesh.shape)}"
                        + (" (for vocab: vocab_multiple)" if name == "vocab" else "")
                    )
        return NamedSharding(self.mesh, partition)

    def mesh_axes(self, axes: Axes) -> tuple[str, ...]:
        """The mesh axes that split an array with logical ``axes``."""
        entries = self.rules.partition(axes, self.mesh)  # an entry is a mesh axis, a tuple of mesh axes, or None
        return tuple(axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry or ()))

    def num_shards(self, axes: Axes) -> int:
        """The number of shards into which an array with logical ``axes`` is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.mesh_axes(axes))

    def tree(self, specs: spec_lib.Tree) -> spec_lib.Tree:
        """The sharding of each array in a tree of specs. The errors are those of :meth:`named_sharding`."""
        return jax.tree_util.tree_map_with_path(
            lambda path, spec: self.named_sharding(spec.axes, spec.shape, spec_lib.path_name(path)), specs
        )

    def abstract(self, specs: spec_lib.Tree) -> spec_lib.Tree:
        """A tree of ``jax.ShapeDtypeStruct`` with shardings, for ahead-of-time compilation and checkpoint restore."""
        return jax.tree.map(
            lambda spec, sharding: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding),
            specs,
            self.tree(specs),
        )

    def replicated(self) -> NamedSharding:
        """The sharding of an array that has a full copy on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def local_rows(self, batch_size: int) -> list[int]:
        """The sorted indices of the rows of the batch that are on the devices of this process.

        With one process, these are all rows. If tensor parallelism spans processes, several processes have the same
        rows.

        Raises:
            ValueError: ``batch_size`` is not divisible by the number of shards of the batch axis.
        """
        self.named_sharding(("batch",), (batch_size,), "a batch")
        num_blocks, local_blocks = self._blocks()
        block_size = batch_size // num_blocks
        return [block * block_size + row for block in local_blocks for row in range(block_size)]

    def from_rows(self, local: np.ndarray) -> jax.Array:
        """The global array [B, ...], sharded over rows.

        Args:
            local: host array with the rows of this process, in the order of :meth:`local_rows`.
        """
        num_blocks, local_blocks = self._blocks()
        shape = (local.shape[0] * num_blocks // len(local_blocks), *local.shape[1:])
        sharding = self.named_sharding(("batch",), shape[:1], "a batch")
        block_size = shape[0] // num_blocks

        def read_block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # JAX calls this function only for devices of this process
            start = local_blocks.index((index[0].start or 0) // block_size) * block_size
            return local[start : start + block_size]

        return jax.make_array_from_callback(shape, sharding, read_block)

    def _blocks(self) -> tuple[int, list[int]]:
        """The number of blocks into which a batch is split, and the indices of the blocks of this process."""
        num_blocks = self.num_shards(("batch",))
        indices = self.named_sharding(("batch",)).addressable_devices_indices_map((num_blocks,)).values()
        return num_blocks, sorted({range(num_blocks)[index[0]].start for index in indices if index is not None})

    def scope(self) -> contextlib.AbstractContextManager[None]:
        """A context manager in which :func:`constrain` applies this sharding.

        Enter it inside or outside the jitted function: ``jax.jit`` traces again if the active sharding changes.
        """
        return _active(self)


def cpu_sharding(count: int) -> Sharding:
    """The sharding that divides the rows of a batch among ``count`` CPU devices of this process.

    Raises:
        ValueError: JAX does not run on a CPU, or has fewer than ``count`` CPU devices.
    """
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        raise ValueError(f"cpu_devices={count} is for a CPU, but JAX runs on a {devices[0].platform}: set it to 1")
    if count > len(devices):
        raise ValueError(
            f"cpu_devices={count} needs {count} CPU devices, and JAX has {len(devices)}: call "
            f'jax.config.update("jax_num_cpu_devices", {count}) before JAX computes anything. If XLA_FLAGS sets '
            "xla_force_host_platform_device_count, change it there instead"
        )
    return Sharding(make_mesh({"data": count}, devices=devices[:count]), DATA_PARALLEL)


_active = jax.make_user_context(None)  # the cache keys of ``jax.jit`` contain its value


def active() -> Sharding | None:
    """The sharding of the enclosing :meth:`Sharding.scope`, or None outside a scope."""
    return _active.value


def num_shards(axes: Axes) -> int:
    """:meth:`Sharding.num_shards` of the enclosing scope; 1 outside a scope."""
    sharding = active()
    return 1 if sharding is None else sharding.num_shards(axes)


def platform() -> str:
    """The platform that JAX compiles for: ``cpu``, ``gpu`` or ``tpu``.

    In a :meth:`Sharding.scope`, this is the platform of the mesh. Outside a scope, it is that of JAX's default device.
    """
    return _device().platform


def device_kind() -> str:
    """The ``device_kind`` of the ``jax.Device`` that JAX compiles for (:func:`platform`), such as ``TPU v5 lite``."""
    return _device().device_kind


def compute_capability() -> str | None:
    """The compute capability of the GPU that JAX compiles for (:func:`platform`), such as ``9.0``. None: not a GPU."""
    return getattr(_device(), "compute_capability", None)


def _device() -> jax.Device:
    sharding = active()
    if sharding is not None:
        return sharding.mesh.devices.flat[0]
    # The value is a device, the name of a platform, or None.
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None or isinstance(default, str):
        return jax.local_devices(backend=default)[0]
    return default


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
    """``x`` with a sharding constraint for its logical ``axes``; unchanged outside a :meth:`Sharding.scope`."""
    sharding = active()
    if sharding is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding.named_sharding(axes, x.shape, "activation"))


def map_shards(
    function: Callable[..., Any], in_axes: Sequence[Axes], out_axes: Axes | list[Any], *, sum_over: Axes = ()
) -> Callable[..., Any]:
    """A function that applies ``function`` on each device to the shards of the arguments (``shard_map``).

    Outside a :meth:`Sharding.scope`, the result is ``function`` itself. No scope is active inside ``function``, so
    :func:`constrain` has no effect there.

    Args:
        in_axes: the logical axes of each argument.
        out_axes: the logical axes of the result; if the result is a tuple, a list with the axes of each array.
        sum_over: logical axes of the arguments that ``function`` sums over. ``psum`` adds the results of the shards of
            these axes.

    Raises:
        ValueError: the rules map two axes of one array to the same mesh axis; or the rules map an axis of a result and
            an axis of ``sum_over`` to the same mesh axis, so that ``psum`` would add different parts of the result. A
            call of the returned function also raises the errors of :meth:`Sharding.named_sharding` for its arguments.
    """
    sharding = active()
    if sharding is None:
        return function
    for axes in out_axes if isinstance(out_axes, list) else [out_axes]:
        sharding.rules.partition((*axes, *sum_over), sharding.mesh)
    mesh_axes = sharding.mesh_axes(sum_over)

    def function_of_shards(*shards: jax.Array) -> Any:
        with _active(None):
            result = function(*shards)
        return jax.lax.psum(result, mesh_axes) if mesh_axes else result

    def out_spec(axes: Axes) -> PartitionSpec:
        return sharding.rules.partition(axes, sharding.mesh)

    def apply(*arguments: jax.Array) -> Any:
        specs = [
            sharding.named_sharding(axes, x.shape, "argument").spec for axes, x in zip(in_axes, arguments, strict=True)
        ]
        return jax.shard_map(
            function_of_shards, mesh=sharding.mesh, in_specs=tuple(specs), check_vma=False,
            out_specs=tuple(map(out_spec, out_axes)) if isinstance(out_axes, list) else out_spec(out_axes),
        )(*arguments)  # fmt: skip

    return apply


def is_explicit() -> bool:
    """Whether the computation runs on a mesh with Explicit axes, set by ``jax.set_mesh``."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def has_explicit_axes(x: jax.Array) -> bool:
    """Whether ``x`` is on a mesh with Explicit axes."""
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def sharded_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """``x`` with the sharding of ``other``, an array of equal shape; unchanged if the mesh has no Explicit axes."""
    return jax.sharding.reshard(x, jax.typeof(other).sharding) if has_explicit_axes(other) else x


def gather_sharding(ids: jax.Array) -> NamedSharding | None:
    """The ``out_sharding`` of ``table.at[ids].get(...)``: the sharding of ``ids``, and an unsharded last axis.

    None if the mesh has no Explicit axes: JAX then needs no ``out_sharding``.
    """
    if not has_explicit_axes(ids):
        return None
    sharding = jax.typeof(ids).sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None))


def row_sharding(x: jax.Array) -> NamedSharding | None:
    """The ``out_sharding`` of a reshape of ``x`` that keeps its first axis.

    The first axis keeps its sharding, and all other axes are unsharded. None if the mesh has no Explicit axes: JAX then
    needs no ``out_sharding``.
    """
    if not has_explicit_axes(x):
        return None
    sharding = jax.typeof(x).sharding
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
