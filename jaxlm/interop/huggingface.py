"""Hugging Face directories in and out, without torch: ``config.json`` and ``*.safetensors``.

The code is the same for all families. What differs is data, the published formats of a family
(``jaxlm.interop.formats``). A family without a published format is written with our own names: ``model_type`` is
``jaxlm-<family>``, ``config`` has the fields of its config, and the name of a tensor is its path, such as
``layers.3.mlp.up.weight``.

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
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm import integrity, processes, spec
from jaxlm.data.tokenizers import TOKENIZER_FILES, Tokenizer
from jaxlm.interop import formats
from jaxlm.interop.config_json import (
    Description,
    describe,
    format_of,
    is_stacked,
    their_config,
    their_generation_config,
    token_fields,
)
from jaxlm.interop.directory import CONFIG, GENERATION_CONFIG, inside, write_json
from jaxlm.interop.formats import Format, Layout
from jaxlm.json_files import read_object
from jaxlm.models.heads import HEADS
from jaxlm.models.model import Model
from jaxlm.sharding import Sharding

__all__ = ["load_pretrained", "named_tensors", "params_of_tensors", "save_pretrained"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_LOG = logging.getLogger("jaxlm")
_WEIGHTS_OR_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load_pretrained(
    directory: str | os.PathLike[str],
    *,
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    sharding: Sharding | None = None,
    seed: int = 0,
    **overrides: Any,
) -> tuple[Model, spec.Tree]:
    """The model and the parameters that a Hugging Face directory holds.

    ``task`` or ``num_labels`` ask for another head than that of the files: parameters that the files lack are
    initialised as ``model.init`` does, and tensors of other heads are left out. ``model.metadata`` lists both as
    ``fresh`` and ``unused``, and the logger "jaxlm" reports them. Without ``task`` and ``num_labels``, the files must
    hold exactly the model.

    On the host, at most one parameter (all of its layers if they are stacked) is held beyond the result.

    Args:
        directory: with ``config.json`` and ``model.safetensors``, or shards and their index.
        param_dtype: dtype to cast the parameters to; None keeps that of the files.
        sharding: where the parameters go; None puts them on the default device.
        seed: of the key for parameters that the files lack.
        overrides: fields of the family's ``Config``, such as ``task="classification"``, ``dtype="bfloat16"``
            (activations), or ``vocab_multiple=8``, which pads the token tables with rows of zeros.

    Example:
        >>> model, params = load_pretrained("gpt2-directory", attention_dropout=0.0)    # doctest: +SKIP
        >>> model, params = load_pretrained("bert-directory", task="classification", num_labels=3)   # doctest: +SKIP
        >>> model.metadata.fresh                                                        # doctest: +SKIP
        ('classifier/bias', 'classifier/weight')

    Raises:
        FileNotFoundError: no such directory, ``config.json`` or safetensors file.
        ValueError: an architecture or setting that is not supported; a damaged file, or one that differs from
            ``checksums.json``; a path out of the directory; a tensor that is missing, unknown, or of another shape or
            dtype than the config says.
    """
    if param_dtype not in (None, *_DTYPES.values()):
        raise ValueError(f"param_dtype={param_dtype!r} is unknown: choose from {', '.join(_DTYPES.values())}, or None")
    directory = Path(directory)
    integrity.verify_checksums(directory)
    description = _read_description(directory, overrides)
    model = description.model
    with contextlib.ExitStack() as stack:
        tensors = _renamed(_open(directory, stack), description.table, directory)
        layers = getattr(model.config, "num_layers", 0)
        if layers > len(tensors):  # before specs are made for each layer
            raise ValueError(f"{directory}: {layers} layers in {CONFIG}, but only {len(tensors)} tensors in its files")
        specs = spec.flatten(model.specs)
        shardings = None if sharding is None else spec.flatten(sharding.tree(model.specs))
        match = _match(description, tensors, directory)
        dtypes = _dtypes(match.places, tensors, param_dtype)
        fresh = spec.init({path: specs[path] for path in match.fresh}, jax.random.key(seed))
        fresh_dtype = param_dtype or jnp.result_type(*dtypes.values())
        leaves = []
        for path, leaf in specs.items():
            if path in fresh:
                array = np.asarray(fresh.pop(path).astype(fresh_dtype))
            else:
                array = _read(leaf, match.places[path], tensors, dtypes[path])
            if shardings is None:
                placed = jnp.asarray(array)
            else:
                placed = jax.make_array_from_callback(array.shape, shardings[path], array.__getitem__)
            leaves.append(placed.block_until_ready())  # one at a time on the host
    return _reported(model, match, directory), jax.tree.unflatten(jax.tree.structure(model.specs), leaves)


def save_pretrained(
    directory: str | os.PathLike[str],
    model: Model,
    params: spec.Tree,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write ``params`` so that ``transformers`` (or :func:`load_pretrained`) opens the directory.

    Bytes are those of ``params``, in their dtype; a tied head and the padding of token tables are left out. What the
    directory that the model was loaded from said, and jaxlm does not decide, is written as it was. Everything is
    written under temporary names first, then renamed, and only then what an earlier save left over is removed, so that
    a directory never mixes two models. ``checksums.json`` has the SHA-256 of the files written; :func:`load_pretrained`
    verifies it. On the host, at most one file and one parameter are held.

    Args:
        directory: made when missing. Files other than the configs, the weights, and the tokenizer where one is given,
            are left alone.
        params: of :attr:`Model.specs`' shapes, in float32, bfloat16 or float16. Where they are spread over the devices
            of several processes, all of these must call this, and the first one writes.
        tokenizer: saved too, and its special ids are written into ``config.json`` and ``generation_config.json``.
        max_shard_bytes: weights above this are split into several files. A larger tensor has a file of its own.

    Raises:
        OSError: the disk is full or the directory cannot be written; what was there is unchanged.
        ValueError: a config that Hugging Face's form of the family cannot express, params that are not the model's, or
            a tokenizer that does not fit.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    spec.require_same(model.specs, params, f"parameters of {model.family}", dtypes=False)
    flat = spec.flatten(params)
    for path, leaf in flat.items():
        if str(leaf.dtype) not in _DTYPES.values():
            raise ValueError(f"{path} is {leaf.dtype}: cast it to one of {', '.join(_DTYPES.values())} before saving")
    configs = {CONFIG: their_config(model, jnp.result_type(*(leaf.dtype for leaf in flat.values())), tokenizer)}
    generation_config = their_generation_config(model, tokenizer)
    if generation_config is not None:
        configs = {GENERATION_CONFIG: generation_config, **configs}

    together = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in flat.values())
    if together and not processes.is_first():
        collections.deque(named_tensors(model, params), maxlen=0)  # gathering them takes all processes
        processes.wait("saved")
        return
    directory = Path(directory)
    with integrity.staged(directory) as temporary:
        for name, content in configs.items():
            write_json(temporary / name, content)
        if tokenizer is not None:
            tokenizer.save(temporary)
        others = sorted(set(os.listdir(temporary)) - {CONFIG})
        weights = _write_weights(temporary, model, params, max_shard_bytes)
        written = [*weights, *others, CONFIG]
        if INDEX in weights:
            # Shards are renamed one by one. Without an index, old and new shards cannot be loaded as one model.
            (directory / INDEX).unlink(missing_ok=True)
        integrity.install(temporary, directory, written)
    for file in os.listdir(directory):
        of_model = file in (INDEX, GENERATION_CONFIG) or _WEIGHTS_OR_SHARD.fullmatch(file)
        of_tokenizer = tokenizer is not None and file in TOKENIZER_FILES
        if (of_model or of_tokenizer) and file not in written:
            (directory / file).unlink()
    integrity.sync(directory)
    if together:
        processes.wait("saved")


def _write_weights(directory: Path, model: Model, params: spec.Tree, max_shard_bytes: int) -> list[str]:
    """The names of the files that hold ``params``; an index is the last."""
    flat = spec.flatten(params)
    sizes = [
        (name, math.prod(place.shape) * flat[path].dtype.itemsize)
        for path, place in _places(model, format_of(model)).items()
        for name in place.names
    ]
    shards = _split(sizes, max_shard_bytes)
    last = len(shards)
    files = [WEIGHTS] if last == 1 else [f"model-{i:05}-of-{last:05}.safetensors" for i in range(1, last + 1)]
    tensors = named_tensors(model, params)
    for file, names in zip(files, shards, strict=True):
        # transformers insists on the metadata.
        save_file(dict(itertools.islice(tensors, len(names))), directory / file, metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG, directory / file)  # save_file may leave it to its owner alone
    if last == 1:
        return files
    index = {
        "metadata": {"total_size": sum(size for _, size in sizes)},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    write_json(directory / INDEX, index)
    return [*files, INDEX]


def named_tensors(model: Model, tree: spec.Tree) -> Iterator[tuple[str, np.ndarray]]:
    """Their name and layout of every tensor of ``tree``, which is shaped as the parameters: gradients, for example.

    Example:
        >>> model = get_model("gpt2-tiny")
        >>> tensors = dict(named_tensors(model, model.init(jax.random.key(0))))
        >>> tensors["transformer.h.1.attn.c_attn.weight"].shape
        (32, 96)
    """
    flat, specs = spec.flatten(tree), spec.flatten(model.specs)
    for path, place in _places(model, format_of(model)).items():
        array = processes.on_host(flat[path])
        for name, layer in zip(place.names, array if is_stacked(specs[path]) else [array], strict=True):
            yield name, place.to_theirs(layer)


def params_of_tensors(model: Model, tensors: Mapping[str, Any]) -> spec.Tree:
    """The parameters of the model from the tensors that :func:`named_tensors` names, in their dtype.

    Raises:
        ValueError: a tensor that is missing, unknown or of another shape than the model's.
    """
    specs, places = spec.flatten(model.specs), _places(model, format_of(model))
    shapes = {name: place.shape for place in places.values() for name in place.names}
    found = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
    if found != shapes:
        names = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
        lines = [f"{name}: {found.get(name, 'missing')}, expected {shapes.get(name, 'nothing')}" for name in names]
        raise ValueError("the tensors are not those of the model:\n  " + "\n  ".join(lines[:20]))
    leaves = []
    for path, leaf in specs.items():
        place = places[path]
        arrays = [np.asarray(tensors[name]) for name in place.names]
        array = np.zeros(leaf.shape, np.result_type(*arrays))
        for layer, theirs in zip(array if is_stacked(leaf) else [array], arrays, strict=True):
            layer[tuple(slice(size) for size in place.ours)] = place.to_ours(theirs)
        leaves.append(jnp.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(model.specs), leaves)


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


def _places(model: Model, table: Format, prefix: str | None = None) -> dict[str, _Place]:
    """Where every parameter of the model is, in the order of its specs. Default prefix: that of the head classes."""
    prefix = table.prefix if prefix is None else prefix
    unpadded = {"vocab_multiple": 1} if hasattr(model.config, "vocab_multiple") else {}
    specs = spec.flatten(model.module.specs(dataclasses.replace(model.config, **unpadded)))
    names = {path: prefix + name for path, name in table.tensors.items()} | dict(table.head)
    places = {}
    for path, leaf in specs.items():
        name, layer = spec.split_layer(path)
        if name not in names:
            raise ValueError(f"{name} of this {model.family} has no name in files of model_type={table.model_type!r}")
        ours = leaf.shape[1:] if is_stacked(leaf) else leaf.shape
        layers = range(leaf.shape[0]) if is_stacked(leaf) else [layer]
        layout = table.layouts.get(name, tuple((axis,) for axis in range(len(ours))))
        places[path] = _Place(tuple(names[name].format(layer=layer) for layer in layers), ours, layout)
    return places


# -------------------------------------------------------------------------------------------------------- files


def _read_description(directory: Path, overrides: dict[str, Any]) -> Description:
    """What ``config.json`` and ``generation_config.json`` of a directory and the overrides describe."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{str(directory)!r} is not a directory: nothing is downloaded, so fetch the files first, for example with "
            "`hf download openai-community/gpt2 --local-dir DIRECTORY`"
        )
    if not (directory / CONFIG).exists():
        raise FileNotFoundError(f"{directory} has no {CONFIG}: it is not a directory of `save_pretrained`")
    description = describe(read_object(inside(directory, CONFIG)), directory / CONFIG, overrides)
    metadata = description.model.metadata
    assert metadata is not None
    if (directory / GENERATION_CONFIG).exists():
        content = read_object(inside(directory, GENERATION_CONFIG))
        ids = {role.removesuffix("_token_id"): token for role, token in token_fields(content).items()}
        metadata = dataclasses.replace(metadata, generation_config=content, token_ids={**metadata.token_ids, **ids})
    return dataclasses.replace(description, model=dataclasses.replace(description.model, metadata=metadata))


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
    for name, path in [(name, inside(directory, name)) for name in files]:
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
    index = read_object(inside(directory, INDEX)).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{path}: weight_map must name the file of each tensor")
    for name in sorted(set(index.values())):
        if not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name!r}: only .safetensors files are read, pickles can run any code")
    return index


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


@dataclasses.dataclass(frozen=True)
class _Match:
    """Where the parameters of a model are in files.

    Attributes:
        places: of every parameter that the files hold.
        fresh: paths of the parameters that they do not hold.
        unused: names of the tensors that are not parameters of the model.
    """

    places: dict[str, _Place]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]


def _match(description: Description, tensors: dict[str, _Tensor], directory: Path) -> _Match:
    """Where every parameter is, after a check that the files hold exactly the tensors of the model, or of its base."""
    model, table = description.model, description.table
    prefix = table.prefix if any(name.startswith(table.prefix) for name in tensors) else ""
    places = _places(model, table, prefix)
    stored: dict[str, _Place] = {}
    if description.stored is not None:
        stored_table = table if formats.of(model.family) else format_of(description.stored)
        stored = _places(description.stored, stored_table, prefix)
    owners = {name: path for path, place in stored.items() for name in place.names}
    fresh = _fresh_paths(description, places, stored, tensors) if stored else []
    places = {path: place for path, place in places.items() if path not in fresh}
    expected = {
        name: _Tensor(None, name, place.shape, tensors[name].dtype if name in tensors else "tensor")
        for place in places.values()
        for name in place.names
    }
    copies = {
        name: path
        for name, path in table.copies.items()
        if name in tensors and name not in expected and name not in owners and path in places
    }
    extra = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in expected
        and name not in copies
        and not any(re.fullmatch(pattern, name.removeprefix(prefix)) for pattern in table.ignored)
    }

    def of_another_head(name: str) -> bool:
        outside = bool(prefix) and not name.startswith(prefix)
        return outside or name in table.copies or (name in owners and owners[name] not in places)

    unused = [name for name in extra if stored and of_another_head(name)]
    actual = {name: tensor for name, tensor in tensors.items() if name in expected}
    actual |= {name: tensor for name, tensor in extra.items() if name not in unused}
    spec.require_same(expected, actual, f"the tensors in {directory} and those of its {CONFIG}", dtypes=False)
    for copy, path in copies.items():
        (name,) = places[path].names
        if not _same_bytes(tensors[copy], tensors[name]):
            raise ValueError(
                f"{directory}: {copy} must equal {name}, of which it is a copy according to {CONFIG}: they differ"
            )
    return _Match(places, tuple(fresh), tuple(unused))


def _fresh_paths(
    description: Description,
    places: dict[str, _Place],
    stored: dict[str, _Place],
    tensors: dict[str, _Tensor],
) -> list[str]:
    """The parameters of heads (and poolers) that the files do not hold, always whole ones.

    A head of which the files hold a part is none of them: the check of names then reports what is missing.
    """
    assert description.stored is not None
    model, before = description.model.config, description.stored.config
    owners = {name: path for path, place in stored.items() for name in place.names}
    groups: dict[str, list[str]] = {}
    for path in places:
        head, _, _ = path.partition("/")
        of_head = path in description.table.head or head in (*HEADS.values(), "pooler")
        if of_head or (path not in stored and head != spec.LAYERS):
            groups.setdefault(head, []).append(path)
    fresh = []
    for head, paths in groups.items():
        # Heads of two tasks may have the same name in files.
        found = [
            path for path in paths if any(n in tensors and owners.get(n, path) == path for n in places[path].names)
        ]
        resized = any(
            path in stored
            and places[path].shape != stored[path].shape
            and all(name in tensors and tensors[name].shape == stored[path].shape for name in stored[path].names)
            for path in paths
        )
        other_task = head in HEADS.values() and model.task != before.task
        if other_task or not found or (resized and head in HEADS.values()):
            fresh += paths
    return fresh


def _reported(model: Model, match: _Match, directory: Path) -> Model:
    """The model whose metadata lists fresh and unused parameters, after a message to the logger."""
    assert model.metadata is not None
    metadata = dataclasses.replace(model.metadata, fresh=match.fresh, unused=match.unused)
    if any(path.partition("/")[0] in HEADS.values() for path in match.fresh):
        metadata = dataclasses.replace(metadata, labels=None)
    if match.fresh or match.unused:
        _LOG.info(
            "%s: freshly initialised: %s; left out: %s",
            directory, ", ".join(match.fresh) or "nothing", ", ".join(match.unused) or "nothing",
        )  # fmt: skip
    return dataclasses.replace(model, metadata=metadata)


def _same_bytes(one: _Tensor, two: _Tensor) -> bool:
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    step = 4096
    return all(
        one.rows(start, start + step).tobytes() == two.rows(start, start + step).tobytes()
        for start in range(0, one.shape[0], step)
    )


def _dtypes(places: dict[str, _Place], tensors: dict[str, _Tensor], param_dtype: str | None) -> dict[str, str]:
    """The dtype of each parameter, which is the same in all layers."""
    names: dict[str, list[str]] = collections.defaultdict(list)
    for path, place in places.items():
        names[spec.split_layer(path)[0]] += place.names
    dtypes = {path: _dtype(path, tensor_names, tensors, param_dtype) for path, tensor_names in names.items()}
    return {path: dtypes[spec.split_layer(path)[0]] for path in places}


def _dtype(path: str, names: list[str], tensors: dict[str, _Tensor], param_dtype: str | None) -> str:
    """The dtype of a parameter whose layers are the tensors ``names``."""
    found = sorted({tensors[name].dtype for name in names})
    what = f"{path} ({names[0]}{', ...' if len(names) > 1 else ''}) is {' and '.join(found)} in the file"
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
    for name, layer in zip(place.names, array if is_stacked(leaf) else [array], strict=True):
        layer[tuple(slice(size) for size in place.ours)] = place.to_ours(tensors[name].read())
    return array
