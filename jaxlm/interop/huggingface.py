"""Load and save models as Hugging Face directories (``config.json`` and ``*.safetensors``), without torch.

All families use the same code. The published formats of the families are tables of names (``jaxlm.interop.formats``).
jaxlm's own format is used for families without a published format, and for models that no published format can
represent. In this format, ``model_type`` in ``config.json`` is ``jaxlm-<family>``, and ``config`` contains
the fields of the family's config. The name of a tensor is the path of its parameter, such as
``layers.3.mlp.up.weight``.

Loading first checks the checksums (if there is a file ``checksums.json``), and then the config. The file headers have
the name, shape and dtype of every tensor. Loading checks the names of all tensors, and the shape of every tensor to
load. Next, it reads copies of tied tensors, and compares them with the tied tensors. Then it checks the dtype of every
tensor to load. After these checks, loading reads the tensors of one parameter at a time.
Loading downloads nothing. It never opens pickle files, because a pickle can run arbitrary code.

    >>> model, params = load_pretrained("gpt2-directory")                              # doctest: +SKIP
    >>> save_pretrained("another-directory", model, params)                            # doctest: +SKIP
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm import integrity, processes, spec
from jaxlm.config import check_min
from jaxlm.data.tokenizers import TOKENIZER_FILES, Tokenizer
from jaxlm.interop.config_json import (
    ModelDescription,
    class_name,
    describe_model,
    format_of,
    generation_config_json,
    model_config_json,
    token_ids_by_role,
)
from jaxlm.interop.directory import ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, path_inside, write_json
from jaxlm.interop.formats import Format
from jaxlm.interop.locations import Location, copies_of, locations_of, tensor_groups
from jaxlm.json_files import read_object
from jaxlm.models.heads import LABEL_HEADS
from jaxlm.models.model import Model
from jaxlm.sharding import Sharding
from jaxlm.spec import Params

__all__ = ["load_pretrained", "named_tensors", "params_from_tensors", "save_pretrained"]

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
    """The model and its parameters, loaded from a Hugging Face directory.

    Without the overrides ``task`` and ``num_labels``, the files must contain all tensors of the model. A copy may
    replace a tied tensor. In addition, the files may contain only the following tensors, which are not loaded:

    - copies of tied tensors, which must be equal to the loaded tensor;
    - tensors that are not parameters, such as masks in old files;
    - a pooler or a next-sentence head that the model does not have, as in many published files of BERT and RoBERTa.

    With the override ``task`` or ``num_labels``, the head of the model may differ from the head in the files. Then a
    head (or pooler) that the files lack is initialized as in ``model.init``. A head in the files that the model lacks
    is not loaded. A head for labels is always initialized if the files are for another task or have another number of
    labels. If ``task`` is not the task of the files, the model may also lack other parts of the files, such as the
    decoder of T5 (``task="none", num_decoder_layers=0``). These parts are not loaded. But in a part that the model has,
    the files must not contain more layers, or more parameters of a layer, than the model.

    ``model.metadata.initialized`` lists the initialized parameters. ``model.metadata.unused_tensors`` lists the tensors
    of poolers, heads and other parts that are not loaded. The logger "jaxlm" reports both.

    In addition to the result, host memory holds the initialized parameters, and one loaded parameter at a time (with
    all its layers if it is stacked).

    Args:
        directory: contains ``config.json`` and either ``model.safetensors`` or shards with an index file.
        param_dtype: dtype of the parameters; None: the dtype in the files (for initialized parameters, the dtype to
            which JAX promotes the dtypes of the loaded parameters). This argument is required if the tensors of a
            parameter are float64 or have several dtypes.
        sharding: the shardings of the parameters; None: all parameters are on the default device.
        seed: random seed for the initialized parameters.
        overrides: fields of the family's ``Config``, such as ``task="classification"``, ``dtype="bfloat16"`` (dtype of
            activations), or ``vocab_multiple=8``, which pads the token embedding with rows of zeros.

    Example:
        >>> model, params = load_pretrained("gpt2-directory", attention_dropout=0.0)    # doctest: +SKIP
        >>> model, params = load_pretrained("bert-directory", task="classification", num_labels=3)   # doctest: +SKIP
        >>> model.metadata.initialized                                                        # doctest: +SKIP
        ('classifier/bias', 'classifier/weight')

    Raises:
        FileNotFoundError: the directory, ``config.json`` or a safetensors file does not exist.
        ValueError: the architecture, a setting, an override or ``param_dtype`` is not supported; a file is damaged or
            does not match ``checksums.json``; a file is outside the directory; the directory has only pickle
            files, or both ``model.safetensors`` and an index file; or a tensor is missing, is not in the model,
            has a wrong shape or dtype, or differs from a tensor that must be equal.
    """
    if param_dtype not in (None, *_DTYPES.values()):
        raise ValueError(f"param_dtype={param_dtype!r} is unknown: choose from {', '.join(_DTYPES.values())}, or None")
    directory = Path(directory)
    integrity.verify_checksums(directory)
    description = _read_description(directory, overrides)
    model = description.model
    with contextlib.ExitStack() as stack:
        tensors = _with_current_names(_open_tensors(directory, description, stack), description.format, directory)
        _check_num_layers_and_experts(description, len(tensors), directory)
        specs = spec.flatten(model.specs)
        shardings = None if sharding is None else spec.flatten(sharding.tree(model.specs))
        match = _match_tensors(description, tensors, directory)
        dtypes = _dtypes(match.locations, tensors, param_dtype)
        initialized = spec.init({path: specs[path] for path in match.initialized}, jax.random.key(seed))
        initialized_dtype = param_dtype or jnp.result_type(*dtypes.values())
        leaves = []
        for path, leaf in specs.items():
            if path in initialized:
                array = np.asarray(initialized.pop(path).astype(initialized_dtype))
            else:
                location = match.locations[path]
                values = (tensors[name].read(location.rows) for name in location.names)
                array = location.to_parameter(leaf.shape, dtypes[path], values)
            if shardings is None:
                device_array = jnp.asarray(array)
            else:
                device_array = jax.make_array_from_callback(array.shape, shardings[path], array.__getitem__)
            leaves.append(device_array.block_until_ready())  # so that the host holds only one parameter at a time
    return _with_load_report(model, match, directory), jax.tree.unflatten(jax.tree.structure(model.specs), leaves)


def save_pretrained(
    directory: str | os.PathLike[str],
    model: Model,
    params: Params,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Save a model in a directory that :func:`load_pretrained` can load.

    If ``transformers`` has a class for the model, it can load the directory, too. The saved tensors have the dtype and
    the exact bits of the parameters, but a tensor that contains several parameters has their common dtype. A tied head
    and vocabulary padding are not saved. If the model was loaded from a directory of the same format, the config fields
    that jaxlm does not set keep their loaded values.

    All files are first written to a temporary directory and then moved. ``checksums.json``, which contains the SHA-256
    of all saved files, is moved first. So if the process is killed before the last move, :func:`load_pretrained`
    rejects the mixture of old and new files. An old ``generation_config.json`` and, with ``tokenizer``, old tokenizer
    files are removed before the files are moved, unless new files replace them. Old weights that are not replaced are
    removed afterwards.

    Host memory holds at most the tensors of one file, and one group of parameters that are saved in the same tensors.

    Args:
        directory: created if it does not exist. Only configs, weights, ``checksums.json`` and (with ``tokenizer``)
            tokenizer files are replaced or removed.
        params: parameters with the shapes of :attr:`Model.specs`, float32, bfloat16 or float16. If the parameters are
            sharded over several processes, all processes must call this function; the first process writes the files.
        tokenizer: saved in the same directory. Its special token ids are written to ``config.json`` and
            ``generation_config.json``.
        max_shard_bytes: maximum size in bytes of the tensors in one weight file. A larger tensor has its own file.

    Raises:
        OSError: the disk is full, or the directory or a file is not writable. The message says whether files have
            changed, and names them.
        ValueError: the directory contains an adapter; the format cannot represent the special token ids; the
            parameters do not match the model or have another dtype; the tokenizer does not match the model; or
            ``max_shard_bytes`` is below 1.
    """
    check_min(1, max_shard_bytes=max_shard_bytes)
    directory = Path(directory)
    if (directory / ADAPTER_CONFIG).exists():
        raise ValueError(
            f"{directory} contains an adapter ({ADAPTER_CONFIG}), so transformers would load the base model of the "
            "adapter instead of the saved model: save the model in another directory"
        )
    spec.require_same(model.specs, params, f"parameters of {model.family}", dtypes=False)
    flat = spec.flatten(params)
    for path, leaf in flat.items():
        if str(leaf.dtype) not in _DTYPES.values():
            raise ValueError(f"{path} is {leaf.dtype}: cast it to one of {', '.join(_DTYPES.values())} before saving")
    num_entries_of_dtype: collections.Counter[str] = collections.Counter()
    for leaf in flat.values():
        num_entries_of_dtype[str(leaf.dtype)] += leaf.size
    configs = {CONFIG: model_config_json(model, num_entries_of_dtype.most_common(1)[0][0], tokenizer)}
    generation_config = generation_config_json(model, tokenizer)
    if generation_config is not None:
        configs = {GENERATION_CONFIG: generation_config, **configs}

    is_distributed = any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in flat.values())
    if is_distributed and not processes.is_first():
        collections.deque(
            _tensors_with_copies(model, params), maxlen=0
        )  # all processes must take part in each all-gather
        processes.barrier("saved")
        return
    with integrity.staging_directory(directory) as temporary:
        for name, content in configs.items():
            write_json(temporary / name, content)
        if tokenizer is not None:
            tokenizer.save(temporary)
        other_files = sorted(set(os.listdir(temporary)) - {CONFIG})
        weights = _write_weights(temporary, model, params, max_shard_bytes)
        written = [*weights, *other_files, CONFIG]
        old_settings = {GENERATION_CONFIG, *(TOKENIZER_FILES if tokenizer is not None else ())} - set(written)
        # Shards are moved one by one. The old index is deleted first. So a mixture of old and new shards has no index,
        # and cannot be loaded. Old settings are also deleted first. The new checksums.json does not list them, so
        # loading would not notice that they do not belong to the new weights.
        delete_first = sorted(old_settings | ({INDEX} & set(weights)))
        integrity.install_files(temporary, directory, written, delete_first=delete_first)
    for file in os.listdir(directory):
        if (file == INDEX or _WEIGHTS_OR_SHARD.fullmatch(file)) and file not in written:
            (directory / file).unlink()
    integrity.sync(directory)
    if is_distributed:
        processes.barrier("saved")


def _write_weights(directory: Path, model: Model, params: Params, max_shard_bytes: int) -> list[str]:
    """Write the parameters to weight files, and return the file names.

    If there are several weight files, the last name is the name of the index file.
    """
    flat = spec.flatten(params)
    table = format_of(model)
    locations = locations_of(model, table)
    paths_of_tensor = {name: paths for names, paths in tensor_groups(locations).items() for name in names}
    paths_of_tensor |= {name: [path] for name, path in copies_of(model, table, locations).items()}
    sizes = [
        (name, math.prod(locations[paths[0]].tensor_shape) * _common_dtype(flat[path] for path in paths).itemsize)
        for name, paths in paths_of_tensor.items()
    ]
    shards = _split_into_shards(sizes, max_shard_bytes)
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    tensors = _tensors_with_copies(model, params)
    for file, names in zip(files, shards, strict=True):
        # transformers rejects a file without this metadata.
        save_file(dict(itertools.islice(tensors, len(names))), directory / file, metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG, directory / file)  # save_file may create files that only the owner can read
    if count == 1:
        return files
    index = {
        "metadata": {"total_size": sum(size for _, size in sizes)},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    write_json(directory / INDEX, index)
    return [*files, INDEX]


def _tensors_with_copies(model: Model, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """The pairs of :func:`named_tensors`, and then a pair for each copy (:func:`copies_of`)."""
    yield from named_tensors(model, params)
    flat, table = spec.flatten(params), format_of(model)
    locations = locations_of(model, table)
    for name, path in copies_of(model, table, locations).items():
        yield name, locations[path].to_file(processes.gather_to_host(flat[path]))


def named_tensors(model: Model, tree: spec.Tree) -> Iterator[tuple[str, np.ndarray]]:
    """An iterator over pairs ``(name, tensor)`` as in Hugging Face files, for all leaves of ``tree``.

    ``tree`` has the structure and shapes of the parameters. For example, it contains parameters or gradients. If its
    leaves are sharded over several processes, all processes must iterate over all pairs.

    Example:
        >>> model = get_model("gpt2-tiny")
        >>> tensors = dict(named_tensors(model, model.init(jax.random.key(0))))
        >>> tensors["transformer.h.1.attn.c_attn.weight"].shape
        (32, 96)
    """
    flat, locations = spec.flatten(tree), locations_of(model, format_of(model))
    for names, paths in tensor_groups(locations).items():
        arrays = [locations[path].matrices(processes.gather_to_host(flat[path])) for path in paths]
        for number, name in enumerate(names):
            parts = [locations[path].to_file(array[number]) for path, array in zip(paths, arrays, strict=True)]
            yield name, parts[0] if len(parts) == 1 else np.concatenate(parts, dtype=_common_dtype(parts))


def _common_dtype(arrays: Iterable[Any]) -> np.dtype:
    """The dtype to which JAX promotes the dtypes of the arrays.

    ``np.result_type`` raises an error for bfloat16 and float16. ``jnp.result_type`` converts float64 to float32.
    """
    return functools.reduce(jnp.promote_types, (array.dtype for array in arrays))


def params_from_tensors(model: Model, tensors: Mapping[str, Any]) -> spec.Tree:
    """The parameters of the model from a mapping ``{name: tensor}``. This is the inverse of :func:`named_tensors`.

    Dtypes do not change, but JAX converts float64 to float32 by default. The entries of vocabulary padding are 0.

    Raises:
        ValueError: a tensor is missing, is not in the model, or has a wrong shape.
    """
    specs, locations = spec.flatten(model.specs), locations_of(model, format_of(model))
    shapes = {name: location.tensor_shape for location in locations.values() for name in location.names}
    found = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items()}
    if found != shapes:
        names = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
        lines = [f"{name}: {found.get(name, 'missing')}, expected {shapes.get(name, 'nothing')}" for name in names]
        raise ValueError("the tensors do not match the model:\n  " + "\n  ".join(lines[:20]))
    leaves = []
    for path, leaf in specs.items():
        location = locations[path]
        arrays = [np.asarray(tensors[name])[location.rows] for name in location.names]
        leaves.append(jnp.asarray(location.to_parameter(leaf.shape, _common_dtype(arrays), arrays)))
    return jax.tree.unflatten(jax.tree.structure(model.specs), leaves)


# -------------------------------------------------------------------------------------------------------- files


def _read_description(directory: Path, overrides: dict[str, Any]) -> ModelDescription:
    """The model that ``config.json``, ``generation_config.json`` and the overrides describe."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{str(directory)!r} is not a directory: nothing is downloaded, so fetch the files first, for example with "
            "`hf download openai-community/gpt2 --local-dir DIRECTORY`"
        )
    if not (directory / CONFIG).exists():
        raise FileNotFoundError(f"{directory} has no {CONFIG}: it is not a Hugging Face model directory")
    description = describe_model(read_object(path_inside(directory, CONFIG)), directory / CONFIG, overrides)
    metadata = description.model.metadata
    if (directory / GENERATION_CONFIG).exists():
        content = read_object(path_inside(directory, GENERATION_CONFIG))
        ids = token_ids_by_role(content, directory / GENERATION_CONFIG)
        metadata = dataclasses.replace(metadata, generation_config=content, token_ids={**metadata.token_ids, **ids})
    return dataclasses.replace(description, model=dataclasses.replace(description.model, metadata=metadata))


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in an open file, with the shape and dtype from the file header. :meth:`read` reads the values."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, rows: slice) -> np.ndarray:
        return self.file.get_tensor(self.name) if rows == slice(None) else self.file.get_slice(self.name)[rows]


def _open_tensors(directory: Path, description: ModelDescription, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """All tensors in the directory, by name. The files stay open until ``stack`` closes them."""
    tensors: dict[str, _Tensor] = {}
    file_of: dict[str, str] = {}
    index = _read_index(directory, description)
    files = [WEIGHTS] if index is None else sorted(set(index.values()))
    for name, path in [(name, path_inside(directory, name)) for name in files]:
        try:
            file = stack.enter_context(safe_open(path, framework="numpy"))
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (`file` is not a dict)
        except SafetensorError as error:
            raise ValueError(f"{directory / name} is truncated or not a safetensors file: {error}") from error
        for key, tensor_slice in slices.items():
            if key in file_of:
                raise ValueError(f"{directory}: {key!r} is in {file_of[key]} and in {name}")
            file_of[key] = name
            tensors[key] = _Tensor(file, key, tuple(tensor_slice.get_shape()), tensor_slice.get_dtype())
    if index is not None and index != file_of:
        lines = [
            f"{key}: in {file_of.get(key, 'no file')}, index says {index.get(key, 'nothing')}"
            for key in sorted({*index, *file_of})
            if index.get(key) != file_of.get(key)
        ]
        raise ValueError(f"{directory / INDEX} does not match its files:\n  " + "\n  ".join(lines[:20]))
    return tensors


def _read_index(directory: Path, description: ModelDescription) -> dict[str, str] | None:
    """``{tensor name: file name}`` of a sharded model; None if all weights are in one file.

    Args:
        description: the model in the files. The error message for pickle files names the transformers class of this
            model.

    Raises:
        FileNotFoundError: there are no weights.
        ValueError: there are only pickle files; there are both a single weight file and an index; or the index is
            invalid.
    """
    single, sharded = (directory / WEIGHTS).exists(), (directory / INDEX).exists()
    if single and sharded:
        raise ValueError(f"{directory} has both {WEIGHTS} and {INDEX}, so it has two models: remove the old one")
    if single:
        return None
    if not sharded:
        found = sorted(path.name for path in directory.iterdir())
        pickles = [name for name in found if name.endswith(_PICKLES)]
        table = description.format
        if pickles and not table.is_jaxlm_format and not any(name.endswith(".safetensors") for name in found):
            hf_class = class_name(description.model.metadata.config, table)
            raise ValueError(
                f"{directory} contains only pickle files ({', '.join(pickles)}). jaxlm does not read them, because "
                "loading a pickle can run arbitrary code. If you trust the files, convert them with their class in "
                f"transformers: `{hf_class}.from_pretrained(directory).save_pretrained(directory, "
                "safe_serialization=True)`"
            )
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}: it contains {', '.join(found)}")
    path = directory / INDEX
    index = read_object(path_inside(directory, INDEX)).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"{path}: weight_map must name the file of each tensor")
    for name in sorted(set(index.values())):
        if not name.endswith(".safetensors"):
            raise ValueError(f"{path} names {name!r}: only .safetensors files are read (pickles can run code)")
    return index


def _split_into_shards(sizes: list[tuple[str, int]], max_bytes: int) -> list[list[str]]:
    """The tensor names of each shard. ``sizes`` contains pairs (tensor name, number of bytes), whose order is kept.

    A shard has at most ``max_bytes``. A larger tensor has its own shard.
    """
    shards: list[list[str]] = []
    free_bytes = 0
    for name, size in sizes:
        if not shards or size > free_bytes:
            shards.append([])
            free_bytes = max_bytes
        shards[-1].append(name)
        free_bytes -= size
    return shards


# ------------------------------------------------------------------------------------------------------ tensors


def _with_current_names(tensors: dict[str, _Tensor], table: Format, directory: Path) -> dict[str, _Tensor]:
    """The tensors by their current names. Old files may contain former names (``Format.renamed``)."""

    def current_name(name: str) -> str:
        old_suffix = next((suffix for suffix in table.renamed if name.endswith(suffix)), "")
        return name.removesuffix(old_suffix) + table.renamed.get(old_suffix, "")

    renamed = {current_name(name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        names = ", ".join(sorted(set(tensors) - set(renamed)))
        raise ValueError(f"{directory} contains tensors under both an old and a new name: {names}")
    return renamed


def _check_num_layers_and_experts(description: ModelDescription, num_tensors: int, directory: Path) -> None:
    """Raise ``ValueError`` if the config has more layers or experts than there are tensors in the files.

    For a published format, this check runs before the specs and the tensor names of the model are computed. If the
    config has a wrong, huge number, the specs and the names would fill the memory. The number of experts is checked
    only if each expert has its own tensors.
    """
    has_expert_tensors = any("{expert}" in name for name in description.format.tensors.values())
    for model in filter(None, (description.model, description.model_in_files)):
        for kind in ("layers", "decoder_layers", *(("experts",) if has_expert_tensors else ())):
            number = getattr(model.config, f"num_{kind}", None) or 0
            if number > num_tensors:
                raise ValueError(
                    f"{directory}: {number} {kind.replace('_', ' ')} in {CONFIG}, but only {num_tensors} tensors in "
                    "the weight files"
                )


@dataclasses.dataclass(frozen=True)
class _Match:
    """The correspondence between the parameters of a model and the tensors in files.

    Attributes:
        locations: the locations of the parameters that the files contain, by path.
        initialized: paths of the parameters that the files do not contain.
        unused: names of the tensors of a pooler or a next-sentence head that the model does not have. If the override
            ``task`` or ``num_labels`` is given, also names of the tensors that belong only to another head. If ``task``
            is not the task of the files, also names of the tensors of other parts that the model does not have, such as
            a decoder.
    """

    locations: dict[str, Location]
    initialized: tuple[str, ...]
    unused: tuple[str, ...]


def _match_tensors(description: ModelDescription, tensors: dict[str, _Tensor], directory: Path) -> _Match:
    """Match the parameters of the model with the tensors in the files.

    If ``description.model_in_files`` is not None, the files may lack the head of the model, and may have other heads.

    Raises:
        ValueError: a tensor is missing, is not in the model, or has a wrong shape; or two tensors that must be equal
            differ.
    """
    model, table = description.model, description.format
    prefix = table.prefix if any(name.startswith(table.prefix) for name in tensors) else ""
    locations = locations_of(model, table, prefix)
    locations_in_files: dict[str, Location] = {}  # the locations of the saved model, without the overrides
    other_task = False
    initialized: list[str] = []
    if description.model_in_files is not None:
        other_task = model.task != description.model_in_files.task
        stored_table = format_of(description.model_in_files) if table.is_jaxlm_format else table
        locations_in_files = locations_of(description.model_in_files, stored_table, prefix)
    own_names = {name for location in (*locations.values(), *locations_in_files.values()) for name in location.names}
    locations = _replace_missing_by_copies(locations, table, tensors, own_names)
    locations_in_files = _replace_missing_by_copies(locations_in_files, table, tensors, own_names)
    if description.model_in_files is not None:
        initialized = _paths_to_initialize(description, locations, locations_in_files, tensors)
    stored_path_of = {name: path for path, location in locations_in_files.items() for name in location.names}
    groups = {path.partition("/")[0] for path in locations}
    locations = {path: location for path, location in locations.items() if path not in initialized}
    expected = {  # for a missing tensor, the error message has the word "tensor" instead of a dtype
        name: _Tensor(None, name, location.tensor_shape, tensors[name].dtype if name in tensors else "tensor")
        for location in locations.values()
        for name in location.names
    }
    copies = {
        name: path
        for name, path in [*table.tied_tensors.items(), *copies_of(model, table, locations, prefix).items()]
        if name in tensors
        and name not in expected
        and path in locations
        and not (other_task and name in stored_path_of)
    }
    extra = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in expected
        and name not in copies
        and not any(re.fullmatch(pattern, name.removeprefix(prefix)) for pattern in table.ignored)
    }

    def is_of_missing_part(name: str) -> bool:
        path = stored_path_of.get(name)
        if path is None:
            return name in table.tied_tensors or (bool(prefix) and not name.startswith(prefix))
        group = path.partition("/")[0]
        # A group has all parameters whose paths begin with the same key, for example the parameters of a head. In
        # families with the top-level keys layer_0, layer_1, ..., each layer is a group. A layer in the files that the
        # model lacks is an error.
        is_removed = group not in groups and not re.fullmatch(r"layer_\d+", group)
        return path in initialized or (other_task and is_removed)

    # Published files of BERT and RoBERTa contain a pooler or a next-sentence head even for classes that do not use it.
    optional = {prefix + name for path, name in table.tensors.items() if path.startswith("pooler/")}
    optional |= {name for path, name in table.unprefixed_tensors.items() if path.startswith("next_sentence/")}
    unused = [name for name in extra if name in optional or (locations_in_files and is_of_missing_part(name))]
    actual = {name: tensor for name, tensor in tensors.items() if name in expected}
    actual |= {name: tensor for name, tensor in extra.items() if name not in unused}
    spec.require_same(expected, actual, f"the tensors in {directory} and its {CONFIG}", dtypes=False)
    for copy, path in copies.items():
        (name,) = locations[path].names
        if not _same_bytes(tensors[copy], tensors[name]):
            raise ValueError(
                f"{directory}: {copy} must equal {name}, but they differ: with this {CONFIG}, both are the parameter "
                f"{path}"
            )
    return _Match(locations, tuple(initialized), tuple(unused))


def _replace_missing_by_copies(
    locations: dict[str, Location], table: Format, tensors: Mapping[str, _Tensor], own_names: set[str]
) -> dict[str, Location]:
    """The locations; a parameter whose tensor is missing gets the name of its tied copy.

    ``safetensors.torch.save_model`` keeps only one of several tied tensors. Some published files of T5 lack
    ``shared.weight``.

    Args:
        own_names: names of tensors of parameters, which cannot be copies of other parameters.
    """
    names_of = {
        path: (copy,)
        for copy, path in table.tied_tensors.items()
        if copy in tensors
        and copy not in own_names
        and path in locations
        and tensors.keys().isdisjoint(locations[path].names)
    }
    return {
        path: dataclasses.replace(location, names=names_of.get(path, location.names))
        for path, location in locations.items()
    }


def _paths_to_initialize(
    description: ModelDescription,
    locations: dict[str, Location],
    locations_in_files: dict[str, Location],
    tensors: dict[str, _Tensor],
) -> list[str]:
    """Paths of the head and pooler parameters that must be initialized.

    Either all parameters of a head are initialized, or all are loaded. A head is initialized in three cases:

    - the files contain none of its parameters;
    - the head in the files has another number of labels;
    - it is a head for labels, and the override ``task`` is not the task of the files.

    Layers, and the encoder or decoder that contains them, are never initialized.
    If the files contain only some parameters of a head that is loaded, a later check reports the missing parameters.
    """
    assert description.model_in_files is not None
    other_task = description.model.task != description.model_in_files.task
    stored_path_of = {name: path for path, location in locations_in_files.items() for name in location.names}
    # Some families (such as lstm, attention_rnn and resnet) name their layers layer_0, layer_1, ...; the other families
    # have the key ``layers``.
    groups_with_layers = {path.partition("/")[0] for path in locations if re.search(r"(^|/)layer(s|_\d+)/", path)}
    paths_of_head: dict[str, list[str]] = {}
    for path in locations:
        group, _, _ = path.partition("/")
        in_head = path in description.format.unprefixed_tensors or group in (*LABEL_HEADS.values(), "pooler")
        if in_head or (path not in locations_in_files and group not in groups_with_layers):
            paths_of_head.setdefault(group, []).append(path)
    initialized = []
    for group, paths in paths_of_head.items():
        # Heads of different tasks may use the same tensor name. So a tensor that belongs to another parameter of the
        # saved model does not count as found.
        found = any(
            name in tensors and stored_path_of.get(name, path) == path
            for path in paths
            for name in locations[path].names
        )
        in_files = [(locations[path], locations_in_files[path]) for path in paths if path in locations_in_files]
        resized = any(
            wanted.tensor_shape != stored.tensor_shape
            and all(name in tensors and tensors[name].shape == stored.tensor_shape for name in stored.names)
            for wanted, stored in in_files
        )
        if not found or (group in LABEL_HEADS.values() and (other_task or resized)):
            initialized += paths
    return initialized


def _with_load_report(model: Model, match: _Match, directory: Path) -> Model:
    """The model with ``initialized`` and ``unused_tensors`` in its metadata, and without label names for a new head.

    The logger reports initialized parameters as a warning, because they must be trained. It reports unused tensors with
    the level info.
    """
    metadata = dataclasses.replace(model.metadata, initialized=match.initialized, unused_tensors=match.unused)
    if any(path.partition("/")[0] in LABEL_HEADS.values() for path in match.initialized):
        metadata = dataclasses.replace(metadata, labels=None)
    if match.initialized:
        _LOG.warning("%s: new parameters, which must be trained: %s", directory, ", ".join(match.initialized))
    if match.unused:
        _LOG.info("%s: not loaded: %s", directory, ", ".join(match.unused))
    return dataclasses.replace(model, metadata=metadata)


def _same_bytes(a: _Tensor, b: _Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes. The tensors are read in blocks of rows."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    step, num_rows = 4096, a.shape[0]
    blocks = (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))
    return all(a.read(rows).tobytes() == b.read(rows).tobytes() for rows in blocks)


def _dtypes(locations: dict[str, Location], tensors: dict[str, _Tensor], param_dtype: str | None) -> dict[str, str]:
    """The dtype of each parameter, by path. Paths that differ only in the layer number get the same dtype."""
    names: dict[str, list[str]] = collections.defaultdict(list)
    for path, location in locations.items():
        names[spec.split_layer(path)[0]] += location.names
    dtypes = {path: _dtype(path, tensor_names, tensors, param_dtype) for path, tensor_names in names.items()}
    return {path: dtypes[spec.split_layer(path)[0]] for path in locations}


def _dtype(path: str, names: list[str], tensors: dict[str, _Tensor], param_dtype: str | None) -> str:
    """The dtype of a parameter. ``names`` are the tensor names of this parameter in all layers.

    Raises:
        ValueError: the dtype in the files is not supported; or ``param_dtype`` is None and the tensors are float64 or
            have several dtypes.
    """
    found = sorted({tensors[name].dtype for name in names})
    found_text = f"{path} ({names[0]}{', ...' if len(names) > 1 else ''}) is {' and '.join(found)} in the file"
    if not set(found) <= {*_DTYPES, "F64"}:
        raise ValueError(f"{found_text}: only {', '.join(_DTYPES)} and F64 are supported")
    if param_dtype is not None:
        return param_dtype
    if len(found) > 1 or found == ["F64"]:
        raise ValueError(f"{found_text}: choose a dtype with param_dtype, for example param_dtype='float32'")
    return _DTYPES[found[0]]
