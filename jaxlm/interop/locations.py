"""The tensor names and layouts of a model's parameters, in Hugging Face files and in jaxlm's own format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np
from jax.typing import DTypeLike

from jaxlm import spec
from jaxlm.adapt import num_row_axes
from jaxlm.interop.formats import Format, Layout
from jaxlm.models.heads import LABEL_HEAD_PARAMETERS
from jaxlm.models.model import Model


@dataclasses.dataclass(frozen=True)
class Location:
    """The tensor names and the layout of one parameter in files.

    A parameter with a leading axis of layers is a stack with one entry per layer. If files have one tensor for each
    expert, the axis of experts also belongs to the stack. Files have one tensor per entry. An entry is called a matrix
    here, whatever its number of axes. A parameter that is not a stack has one matrix. A row of a tensor is an index of
    its first axis.

    Attributes:
        names: the tensor name of each matrix, in the order of the stack; a single name if the parameter is not a stack.
        stack: sizes of the leading axes that form the stack; empty if the parameter is not a stack.
        model_shape: shape of one matrix in the model, without vocabulary padding.
        layout: how the axes of ``model_shape`` are ordered and merged in the files.
        first_row: index of the parameter's first row in the tensor.
        num_rows: number of rows of the tensor if it also contains other parameters. None: the tensor contains only this
            parameter.
    """

    names: tuple[str, ...]
    stack: tuple[int, ...]
    model_shape: tuple[int, ...]
    layout: Layout
    first_row: int = 0
    num_rows: int | None = None

    @property
    def shape_in_file(self) -> tuple[int, ...]:
        """Shape of one matrix in the files, without the rows of other parameters in the same tensor."""
        return tuple(math.prod(self.model_shape[axis] for axis in group) for group in self.layout)

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the files, including the rows of other parameters."""
        shape = self.shape_in_file
        return shape if self.num_rows is None else (self.num_rows, *shape[1:])

    @property
    def rows(self) -> slice:
        """The rows of each tensor that contain the parameter; all rows if it is the only parameter."""
        if self.num_rows is None:
            return slice(None)
        return slice(self.first_row, self.first_row + self.shape_in_file[0])

    @property
    def _file_axis_order(self) -> list[int]:
        return [axis for group in self.layout for axis in group]

    def matrices(self, array: np.ndarray) -> np.ndarray:
        """A view of the parameter ``array`` whose first axis is the stack: one matrix for each of :attr:`names`."""
        return array.reshape(len(self.names), *array.shape[len(self.stack) :])

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """One matrix of :meth:`matrices`, converted to the layout of files, without vocabulary padding."""
        array = array[tuple(slice(size) for size in self.model_shape)]
        # np.ascontiguousarray would change the shape () to (1,).
        return np.asarray(array.transpose(self._file_axis_order).reshape(self.shape_in_file), order="C")

    def to_model(self, array: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_file`: one matrix in the layout of the model, without vocabulary padding."""
        sizes = [self.model_shape[axis] for axis in self._file_axis_order]
        return array.reshape(sizes).transpose(np.argsort(self._file_axis_order))

    def to_parameter(self, shape: tuple[int, ...], dtype: DTypeLike, tensors: Iterable[np.ndarray]) -> np.ndarray:
        """The parameter with this shape and dtype. Vocabulary padding is 0.

        Args:
            tensors: for each of :attr:`names`, the :attr:`rows` of its tensor, which the caller has read.
        """
        array = np.zeros(shape, dtype)
        matrices, unpadded = self.matrices(array), tuple(slice(size) for size in self.model_shape)
        for number, tensor in zip(range(len(self.names)), tensors, strict=True):
            # The index "..." gives a view, also for a parameter without axes.
            matrices[number, ...][unpadded] = self.to_model(tensor)
        return array


def locations_of(model: Model, table: Format, prefix: str | None = None) -> dict[str, Location]:
    """The location of every parameter of the model, by path, in the order of the specs.

    Args:
        table: the format of the files.
        prefix: name prefix of the base model's tensors; None: ``table.prefix``, the prefix in files of classes with a
            head.

    Raises:
        ValueError: the format has no tensor for a parameter that is not in a head for labels.
    """
    prefix = table.prefix if prefix is None else prefix
    specs = spec.flatten(model.with_known_fields(vocab_multiple=1).specs)
    name_of = {path: prefix + name for path, name in table.tensors.items()} | dict(table.unprefixed_tensors)
    # A published format may have no name for a head for labels. A new head gets its path as name.
    name_of = {path: path.replace("/", ".") for path in LABEL_HEAD_PARAMETERS} | name_of
    locations = {}
    for path, leaf in specs.items():
        key, layer = spec.split_layer(path)
        if key not in name_of:
            raise ValueError(f"files of model_type={table.model_type!r} have no tensor for {key} of {model.family}")
        layers = range(leaf.shape[0]) if leaf.is_stacked else [layer]
        num_stack_axes = int(leaf.is_stacked)
        experts: Iterable[int | None] = [None]
        if "{expert}" in name_of[key]:
            assert leaf.axes[num_stack_axes] == spec.EXPERT, path
            experts, num_stack_axes = range(leaf.shape[num_stack_axes]), num_stack_axes + 1
        names = tuple(name_of[key].format(layer=layer, expert=expert) for layer in layers for expert in experts)
        shape = leaf.shape[num_stack_axes:]
        axes = tuple((axis,) for axis in range(len(shape)))
        layout = axes if table.is_jaxlm_format else table.layouts.get(key, _torch_layout(key, leaf, len(shape)))
        locations[path] = Location(names, leaf.shape[:num_stack_axes], shape, layout)
    order = {key: number for number, key in enumerate(name_of)}  # the order of parameters in the same tensor
    for paths in tensor_groups(locations).values():
        if len(paths) > 1:
            paths.sort(key=lambda path: order[spec.split_layer(path)[0]])
            sizes = [locations[path].shape_in_file[0] for path in paths]
            for number, path in enumerate(paths):
                locations[path] = dataclasses.replace(
                    locations[path], first_row=sum(sizes[:number]), num_rows=sum(sizes)
                )
    return locations


def _torch_layout(path: str, leaf: spec.ArraySpec, num_axes: int) -> Layout:
    """The default layout of a parameter, for parameters without an entry in ``Format.layouts`` (described there).

    Args:
        path: the path without a layer number.
        num_axes: number of axes of one matrix (:class:`Location`).
    """
    axes, kind = tuple(range(num_axes)), path.rpartition("/")[2]
    if kind == "bias":
        return (axes,)
    num_rows = num_row_axes(path, leaf) if kind == "weight" else None
    return tuple((axis,) for axis in axes) if num_rows is None else (axes[num_rows:], axes[:num_rows])


def copies_of(
    model: Model, table: Format, locations: Mapping[str, Location], prefix: str | None = None
) -> dict[str, str]:
    """``{tensor name: path}`` of the tensors that every layer has as copies of one parameter (``Format.layer_copies``).

    Args:
        locations: the locations of the parameters of the model.
        prefix: as in :func:`locations_of`.
    """
    prefix = table.prefix if prefix is None else prefix
    return {
        prefix + name.format(layer=layer): path
        for name, path in table.layer_copies.items()
        if path in locations
        for layer in range(model.config.num_layers)
    }


def tensor_groups(locations: Mapping[str, Location]) -> dict[tuple[str, ...], list[str]]:
    """``{names of tensors: paths of the parameters in them}``; the paths are in the order of their rows."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, location in locations.items():
        groups.setdefault(location.names, []).append(path)
    return {names: sorted(paths, key=lambda path: locations[path].first_row) for names, paths in groups.items()}
