"""Hugging Face directories in and out, without torch: ``config.json`` and ``*.safetensors``.

What differs between families is data, the ``HUGGING_FACE`` tables of each (``jaxlm.models.files.Format``): nothing here
knows a family. A family without tables, of which no published files exist, is written in the same way with our own
names: ``model_type`` is ``jaxlm-<family>``, ``config`` holds the fields of its config, and a tensor is called by its
path, such as ``layers.3.mlp.up.weight``.

Loading checks the config, then every name, shape and dtype from the headers of the files, and only then reads, one
parameter at a time. Nothing is downloaded, and pickles are never opened: loading one can run any code.

    >>> model, params = load_pretrained("gpt2-directory")                              # doctest: +SKIP
    >>> save_pretrained("another-directory", model, params)                            # doctest: +SKIP
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm import config as config_lib
from jaxlm import processes, spec
from jaxlm.models.files import Format, Layout
from jaxlm.models.model import FAMILIES, Model, family, get_model
from jaxlm.sharding import Sharding

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_NATIVE = "jaxlm-"
_WEIGHTS_OR_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load_pretrained(
    directory: str | os.PathLike[str],
    *,
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    sharding: Sharding | None = None,
    **overrides: Any,
) -> tuple[Model, spec.Tree]:
    """The model and the parameters that a Hugging Face directory holds.

    On the host, at most one parameter (all of its layers) is held beyond the result.

    Args:
        directory: with ``config.json`` and ``model.safetensors``, or shards and their index.
        param_dtype: dtype to cast the parameters to; None keeps that of the files.
        sharding: where the parameters go; None puts them on the default device.
        overrides: fields of the family's ``Config``, such as ``dtype="bfloat16"`` (activations), or
            ``vocab_multiple=8``, which pads the token tables with rows of zeros.

    Example:
        >>> model, params = load_pretrained("gpt2-directory", attention_dropout=0.0)    # doctest: +SKIP

    Raises:
        FileNotFoundError: no such directory, ``config.json`` or safetensors file.
        ValueError: an architecture or setting that is not supported; a damaged file; a path out of the directory; a
            tensor that is missing, unknown, or of another shape or dtype than the config says.
    """
    if param_dtype not in (None, *_DTYPES.values()):
        raise ValueError(f"param_dtype={param_dtype!r} is unknown: choose from {', '.join(_DTYPES.values())}, or None")
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{str(directory)!r} is not a directory: nothing is downloaded, so fetch the files first, for example with "
            "`hf download openai-community/gpt2 --local-dir DIRECTORY`"
        )
    model, table = _read_model(directory, overrides)
    specs = spec.flatten(model.specs)
    shardings = None if sharding is None else spec.flatten(sharding.tree(model.specs))
    with contextlib.ExitStack() as stack:
        tensors = _open(directory, stack)
        tensors = _renamed(tensors, table, directory)
        places = _match(model, table, tensors, directory)
        dtypes = {path: _dtype(path, place, tensors, param_dtype) for path, place in places.items()}
        leaves = []
        for path, place in places.items():
            array = _read(specs[path], place, tensors, dtypes[path])
            if shardings is None:
                leaf = jnp.asarray(array)
            else:
                leaf = jax.make_array_from_callback(array.shape, shardings[path], array.__getitem__)
            leaves.append(leaf.block_until_ready())  # one at a time on the host
    return model, jax.tree.unflatten(jax.tree.structure(model.specs), leaves)


def save_pretrained(
    directory: str | os.PathLike[str], model: Model, params: spec.Tree, *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write ``params`` so that ``transformers`` (or :func:`load_pretrained`) opens the directory.

    Bytes are those of ``params``, in their dtype; a tied head and the padding of token tables are left out. Everything
    is written under temporary names first, then renamed, and only then what an earlier save left over is removed, so
    that a directory never mixes two models. On the host, at most one file and one parameter are held.

    Args:
        directory: made when missing. Files other than the config and the weights are left alone.
        params: of :attr:`Model.specs`' shapes, in float32, bfloat16 or float16. Where they are spread over the devices
            of several processes, all of these must call this, and the first one writes.
        max_shard_bytes: weights above this are split into several files. A larger tensor has a file of its own.

    Raises:
        ValueError: a config that Hugging Face's form of the family cannot express, or params that are not the model's.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    spec.require_same(model.specs, params, f"parameters of {model.family}", dtypes=False)
    flat = spec.flatten(params)
    for path, leaf in flat.items():
        if str(leaf.dtype) not in _DTYPES.values():
            raise ValueError(f"{path} is {leaf.dtype}: cast it to one of {', '.join(_DTYPES.values())} before saving")
    config = _their_config(model, jnp.result_type(*(leaf.dtype for leaf in flat.values())))

    sizes = [
        (name, math.prod(place.shape) * flat[path].dtype.itemsize)
        for path, place in _places(model, _format(model)).items()
        for name in place.names
    ]
    shards = _split(sizes, max_shard_bytes)
    last = len(shards)
    files = [WEIGHTS] if last == 1 else [f"model-{i:05}-of-{last:05}.safetensors" for i in range(1, last + 1)]
    written = [*files, CONFIG]

    together = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in flat.values())
    if together and not processes.is_first():
        collections.deque(named_tensors(model, params), maxlen=0)  # gathering them takes all processes
        processes.wait("saved")
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as temporary:
        _write_json(Path(temporary, CONFIG), config)
        tensors = named_tensors(model, params)
        for file, names in zip(files, shards, strict=True):
            # transformers insists on the metadata.
            save_file(dict(itertools.islice(tensors, len(names))), Path(temporary, file), metadata={"format": "pt"})
            shutil.copymode(Path(temporary, CONFIG), Path(temporary, file))  # save_file may leave it to its owner alone
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(size for _, size in sizes)},
                "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
            }
            _write_json(Path(temporary, INDEX), index)
            written.insert(-1, INDEX)
            # Shards are renamed one by one: without an index, half of them cannot be taken for a model.
            (directory / INDEX).unlink(missing_ok=True)
        for name in written:
            os.replace(Path(temporary, name), directory / name)
    for file in os.listdir(directory):
        if (file == INDEX or _WEIGHTS_OR_SHARD.fullmatch(file)) and file not in written:
            (directory / file).unlink()
    if together:
        processes.wait("saved")


def named_tensors(model: Model, tree: spec.Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Their name and layout of every tensor of ``tree``, which is shaped as the parameters: gradients, for example.

    Example:
        >>> model = get_model("gpt2-tiny")
        >>> tensors = dict(named_tensors(model, model.init(jax.random.key(0))))
        >>> tensors["transformer.h.1.attn.c_attn.weight"].shape
        (32, 96)
    """
    flat, specs = spec.flatten(tree), spec.flatten(model.specs)
    for path, place in _places(model, _format(model)).items():
        array = processes.on_host(flat[path])
        for name, layer in zip(place.names, array if _stacked(specs[path]) else [array], strict=True):
            yield name, place.to_theirs(layer)


# ------------------------------------------------------------------------------------- ours and theirs, by name


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one parameter is in files: the names of its layers (one name if it is not stacked) and their layout.

    ``ours`` is the shape of one layer on our side, without padding.
    """

    names: tuple[str, ...]
    ours: tuple[int, ...]
    layout: Layout

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of each tensor in the file."""
        return tuple(math.prod(self.ours[axis] for axis in group) for group in self.layout)

    @property
    def _order(self) -> list[int]:
        return [axis for group in self.layout for axis in group]

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        array = array[tuple(slice(size) for size in self.ours)]
        return np.ascontiguousarray(array.transpose(self._order).reshape(self.shape))

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return array.reshape([self.ours[axis] for axis in self._order]).transpose(np.argsort(self._order))


def _stacked(leaf: spec.ArraySpec) -> bool:
    return leaf.axes[0] == spec.LAYERS


def _places(model: Model, table: Format, prefix: str | None = None) -> dict[str, _Place]:
    """Where every parameter of the model is, in the order of its specs. Default prefix: that of the head classes."""
    prefix = table.prefix if prefix is None else prefix
    unpadded = {"vocab_multiple": 1} if hasattr(model.config, "vocab_multiple") else {}
    specs = spec.flatten(model.module.specs(dataclasses.replace(model.config, **unpadded)))
    names = {path: prefix + name for path, name in table.tensors.items()} | dict(table.head)
    places = {}
    for path, leaf in specs.items():
        if path not in names:
            raise ValueError(f"{path} of this {model.family} has no name in files of model_type={table.model_type!r}")
        layers, ours = (leaf.shape[0], leaf.shape[1:]) if _stacked(leaf) else (1, leaf.shape)
        layout = table.layouts.get(path, tuple((axis,) for axis in range(len(ours))))
        places[path] = _Place(tuple(names[path].format(layer=layer) for layer in range(layers)), ours, layout)
    return places


def tables(name: str) -> tuple[Format, ...]:
    """The tables of a family; none where no published files exist."""
    return getattr(family(name), "HUGGING_FACE", ())


def _format(model: Model) -> Format:
    """The table that a model is written with: the first that can express it."""
    choices = tables(model.family)
    if not choices:
        return _native(model)
    for table in choices:
        fixed = {field: value for field, value in table.implied.items() if field not in table.fields}
        if _has(model, fixed) and any(_has(model, implied) for implied in table.architectures.values()):
            return table
    types = ", ".join(f"{table.model_type} ({', '.join(table.architectures)})" for table in choices)
    raise ValueError(f"no Hugging Face class of {types} is {model.config}")


def _has(model: Model, fields: Mapping[str, Any]) -> bool:
    return all(getattr(model.config, field) == value for field, value in fields.items())


def _native(model: Model) -> Format:
    """The table of a family that has no published files: names are paths."""

    def name(path: str, leaf: spec.ArraySpec) -> str:
        parts = [f"{part}.{{layer}}" if part == spec.LAYERS and _stacked(leaf) else part for part in path.split("/")]
        return ".".join(parts)

    names = {path: name(path, leaf) for path, leaf in spec.flatten(model.specs).items()}
    return Format(architectures={}, model_type=_NATIVE + model.family, prefix="", fields={}, tensors=names)


# ------------------------------------------------------------------------------------------------------- config


def _read_model(directory: Path, overrides: dict[str, Any]) -> tuple[Model, Format]:
    """The model that ``config.json`` and the overrides describe, and the table that names its tensors."""
    path = directory / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{directory} has no {CONFIG}: it is not a directory of `save_pretrained`")
    config = _read_json(_inside(directory, CONFIG))
    model_type = config.get("model_type")
    known = [(name, table) for name in FAMILIES for table in tables(name)]
    supported = "; ".join(f"{table.model_type} ({', '.join(table.architectures)})" for _, table in known)
    if model_type in [_NATIVE + name for name in FAMILIES if not tables(name)]:
        name = model_type.removeprefix(_NATIVE)
        try:
            read = config_lib.from_json(family(name).Config, config.get("config", {}))
            fields = {field.name: getattr(read, field.name) for field in dataclasses.fields(read)}
            model = get_model(name, **{**fields, **overrides})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}{f' with {overrides}' if overrides else ''}: {error}") from error
        return model, _native(model)
    known = [(name, table) for name, table in known if table.model_type == model_type]
    if not known:
        raise ValueError(f"{path}: model_type={model_type!r} is not supported: {supported}")
    # Configs that were never saved with a model name no class: the general table of a model type stands last.
    listed = config.get("architectures") or list(known[-1][1].architectures)
    architecture = listed[0] if isinstance(listed, list) else listed
    choices = [(name, table) for name, table in known if architecture in list(table.architectures)]
    if not choices:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported: {supported}")
    name, table = choices[0]
    fields = {**table.implied, **_our_fields(config, table, family(name).Config, path)}
    try:
        if table.read_fields is not None:
            fields |= table.read_fields(config)
        return get_model(name, **{**fields, **table.architectures[architecture], **overrides}), table
    except ValueError as error:
        raise ValueError(f"{path}{f' with {overrides}' if overrides else ''}: {error}") from error


def _our_fields(config: dict[str, Any], table: Format, config_class: type, path: Path) -> dict[str, Any]:
    for field, value in table.required.items():
        if config.get(field, value) != value:
            raise ValueError(f"{path}: {field}={config[field]!r} is not supported: only {value!r} is")
    hints = typing.get_type_hints(config_class)
    fields = {}
    for ours, theirs in table.fields.items():
        if theirs not in config:
            continue
        value = config[theirs]
        words = table.values.get(theirs)
        if words is not None:
            if not isinstance(value, str) or value not in words:
                raise ValueError(f"{path}: {theirs}={value!r} is not supported: choose from {', '.join(words)}")
            value = words[value]
        elif not _fits(value, hints[ours]):
            raise ValueError(
                f"{path}: {theirs}={value!r} is not of type {getattr(hints[ours], '__name__', hints[ours])}"
            )
        fields[ours] = value
    if "num_labels" in hints and "id2label" in config:  # how they write the number of labels
        fields["num_labels"] = len(config["id2label"])
    return fields


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type of a Config field."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    return type(value) in ((int, float) if hint is float else (hint,))


def _their_config(model: Model, dtype: Any) -> dict[str, Any]:
    table = _format(model)
    if table.model_type.startswith(_NATIVE):
        return {"model_type": table.model_type, "config": config_lib.to_json(model.config)}
    fields = {}
    for ours, theirs in table.fields.items():
        value = getattr(model.config, ours)
        if theirs in table.values:
            words = [word for word, meaning in table.values[theirs].items() if meaning == value]
            if not words:
                raise ValueError(f"{ours}={value!r} has no counterpart in {theirs} of {table.model_type}")
            value = words[0]
        fields[theirs] = value
    if table.write_fields is not None:
        fields |= table.write_fields(model.config)
    if getattr(model.config, "task", None) in ("classification", "tagging"):
        names = {str(number): f"LABEL_{number}" for number in range(model.config.num_labels)}
        fields |= {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
    architecture = next(name for name, implied in table.architectures.items() if _has(model, implied))
    return {
        "architectures": [architecture],
        "model_type": table.model_type,
        **fields,
        **table.required,
        **{field: token if token < model.config.vocab_size else None for field, token in table.token_ids.items()},
        "torch_dtype": str(dtype),
    }


# -------------------------------------------------------------------------------------------------------- files


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in an open file, nothing of which has been read but the header."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.file.get_slice(self.name)[start : min(stop, self.shape[0])]


def _open(directory: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Every tensor of the directory, by name. ``stack`` closes the files."""
    tensors: dict[str, _Tensor] = {}
    where: dict[str, str] = {}
    index = _read_index(directory)
    files = [WEIGHTS] if index is None else sorted(set(index.values()))
    for name, path in [(name, _inside(directory, name)) for name in files]:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            entries = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        except SafetensorError as error:
            raise ValueError(f"{directory / name} is truncated or no safetensors file: {error}") from error
        for key, entry in entries.items():
            if key in where:
                raise ValueError(f"{directory}: {key!r} is in {where[key]} and in {name}")
            where[key] = name
            tensors[key] = _Tensor(file, key, tuple(entry.get_shape()), entry.get_dtype())
    if index is not None and index != where:
        lines = [
            f"{key}: in {where.get(key, 'no file')}, index says {index.get(key, 'nothing')}"
            for key in sorted({*index, *where})
            if index.get(key) != where.get(key)
        ]
        raise ValueError(f"{directory / INDEX} does not match its files:\n  " + "\n  ".join(lines[:20]))
    return tensors


def _read_index(directory: Path) -> dict[str, str] | None:
    """``{tensor: file}`` of a sharded model, None for a single file; an error that helps when there is neither."""
    single, sharded = (directory / WEIGHTS).exists(), (directory / INDEX).exists()
    if single and sharded:
        raise ValueError(f"{directory} has {WEIGHTS} and {INDEX}, two models: remove the stale one")
    if single:
        return None
    if not sharded:
        found = sorted(path.name for path in directory.iterdir())
        pickles = [name for name in found if name.endswith(_PICKLES)]
        if pickles and not any(name.endswith(".safetensors") for name in found):
            raise ValueError(
                f"{directory} holds pickles only ({', '.join(pickles)}). They are not read: loading one can run "
                "any code: where you trust it, convert it with transformers, "
                "`AutoModelForCausalLM.from_pretrained(directory).save_pretrained(directory, safe_serialization=True)`"
            )
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}: it holds {', '.join(found)}")
    path = directory / INDEX
    index = _read_json(_inside(directory, INDEX)).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{path}: weight_map must name the file of each tensor")
    for name in sorted(set(index.values())):
        if not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name!r}: only .safetensors files are read, pickles can run any code")
    return index


def _inside(directory: Path, name: str) -> Path:
    """The file ``name`` directly in ``directory``, wherever links lead, unless that is out of it.

    The cache of the Hugging Face hub links ``snapshots/<revision>/<name>`` to ``blobs/``: there, the model's own folder
    is the border.
    """
    if Path(name).name != name or "\\" in name:
        raise ValueError(f"{directory}: the path {name!r} leads out of the directory: only plain file names are read")
    root = directory.resolve()
    path = (root / name).resolve()
    border = root.parent.parent if root.parent.name == "snapshots" else root
    if not path.is_relative_to(border):
        raise ValueError(f"{directory / name} is a link out of the directory, to {path}: copy the file into it instead")
    if not path.is_file():
        raise FileNotFoundError(f"{directory / name} is missing or no file")
    return path


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, not UTF-8
        raise ValueError(f"{path} is truncated or no JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _split(sizes: list[tuple[str, int]], most: int) -> list[list[str]]:
    """Names in order, in groups of at most ``most`` bytes (a larger tensor alone)."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(name)
        room -= size
    return groups


# ------------------------------------------------------------------------------------------------------ tensors


def _renamed(tensors: dict[str, _Tensor], table: Format, directory: Path) -> dict[str, _Tensor]:
    """The tensors under the names that they have today."""

    def today(name: str) -> str:
        old = next((old for old in table.renamed if name.endswith(old)), "")
        return name.removesuffix(old) + table.renamed.get(old, "")

    renamed = {today(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError(
            f"{directory} holds tensors under old and new names: {', '.join(sorted(set(tensors) - set(renamed)))}"
        )
    return renamed


def _match(model: Model, table: Format, tensors: dict[str, _Tensor], directory: Path) -> dict[str, _Place]:
    """Where every parameter is, after a check that the files hold exactly the tensors of the model."""
    for path, leaf in spec.flatten(model.specs).items():
        if _stacked(leaf) and leaf.shape[0] > len(tensors):  # before a name is made for each
            raise ValueError(f"{directory}: {leaf.shape[0]} layers of {path} in {CONFIG}, but {len(tensors)} tensors")
    prefix = table.prefix if any(name.startswith(table.prefix) for name in tensors) else ""
    places = _places(model, table, prefix)
    expected = {
        name: _Tensor(None, name, place.shape, tensors[name].dtype if name in tensors else "tensor")
        for place in places.values()
        for name in place.names
    }
    copies = {
        name: path for name, path in table.copies.items() if name in tensors and name not in expected and path in places
    }
    actual = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in copies and not any(re.fullmatch(pattern, name.removeprefix(prefix)) for pattern in table.ignored)
    }
    spec.require_same(expected, actual, f"the tensors in {directory} and those of its {CONFIG}", dtypes=False)
    for copy, path in copies.items():
        (name,) = places[path].names
        if not _same_bytes(tensors[copy], tensors[name]):
            raise ValueError(
                f"{directory}: {copy} must equal {name}, of which it is a copy according to {CONFIG}: they differ"
            )
    return places


def _same_bytes(one: _Tensor, two: _Tensor) -> bool:
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    step = 4096
    return all(
        one.rows(start, start + step).tobytes() == two.rows(start, start + step).tobytes()
        for start in range(0, one.shape[0], step)
    )


def _dtype(path: str, place: _Place, tensors: dict[str, _Tensor], param_dtype: str | None) -> str:
    """The dtype that a parameter will have."""
    found = sorted({tensors[name].dtype for name in place.names})
    what = f"{path} ({place.names[0]}{', ...' if len(place.names) > 1 else ''}) is {' and '.join(found)} in the file"
    if not set(found) <= {*_DTYPES, "F64"}:
        raise ValueError(f"{what}: only {', '.join(_DTYPES)} and F64 are read")
    if param_dtype is not None:
        return param_dtype
    if len(found) > 1 or found == ["F64"]:
        raise ValueError(f"{what}: choose one with param_dtype, for example param_dtype='float32'")
    return _DTYPES[found[0]]


def _read(leaf: spec.ArraySpec, place: _Place, tensors: dict[str, _Tensor], dtype: str) -> np.ndarray:
    """One parameter, its layers stacked; what the files lack of it (padding) is zero."""
    array = np.zeros(leaf.shape, dtype)
    for name, layer in zip(place.names, array if _stacked(leaf) else [array], strict=True):
        layer[tuple(slice(size) for size in place.ours)] = place.to_ours(tensors[name].read())
    return array
