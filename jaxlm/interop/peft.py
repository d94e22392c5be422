"""Load and save LoRA adapters in the format of PEFT, without torch.

The files are ``adapter_config.json`` and ``adapter_model.safetensors``.

    >>> lora, trained = load_adapter("adapter", model)                                   # doctest: +SKIP
    >>> params = lora.merge(trained, lora.frozen(model.specs, params))                   # doctest: +SKIP
    >>> save_adapter("another", model, lora, trained)                                    # doctest: +SKIP

An adapter contains the LoRA factors (``jaxlm.adapt.LoRA``) and the parameters that are trained in full (PEFT's
``modules_to_save``). PEFT's tensor names contain the module names of a transformers class. So only models with a
published format are supported (``jaxlm.interop.formats``).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxlm import integrity, processes, spec
from jaxlm.adapt import LORA_A, LORA_B, LoRA, is_table, num_row_axes
from jaxlm.config import check_min, check_value
from jaxlm.interop import formats
from jaxlm.interop.config_json import format_of
from jaxlm.interop.directory import ADAPTER_CONFIG, path_inside, write_json
from jaxlm.interop.directory import CONFIG as MODEL_CONFIG
from jaxlm.interop.formats import Format, Layout
from jaxlm.interop.huggingface import INDEX as MODEL_INDEX
from jaxlm.interop.huggingface import WEIGHTS as MODEL_WEIGHTS
from jaxlm.interop.locations import Location, locations_of
from jaxlm.json_files import read_object
from jaxlm.models.heads import LABEL_HEADS
from jaxlm.models.model import Model

CONFIG = ADAPTER_CONFIG
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"

_FACTOR_KEYS = (f"/{LORA_A}", f"/{LORA_B}")
_NAME_PREFIX = "base_model.model."
_A_SUFFIX, _B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
_PEFT_TASKS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "span_qa": "QUESTION_ANS",
}
"""PEFT's task type of a model with a head, by jaxlm's task. PEFT has no type for other tasks, such as masked.

A model without a head has the type FEATURE_EXTRACTION.
"""
_PEFT_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT adds to ``modules_to_save``, by task type."""
_READ_OPTIONS = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights")
# These options do not change the result of the adapter: they describe its training or its base model, or they follow
# from the names of its tensors.
_IGNORED_OPTIONS = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
)  # fmt: skip
_INITS_THAT_KEEP_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that do not change the base weights."""
_TYPES_WITH_REJECTED_OUT_PROJ = ("mamba2", "falcon_h1")
"""The model types for which PEFT rejects LoRA factors of modules with the name ``out_proj``."""


def load_adapter(directory: str | os.PathLike[str], model: Model) -> tuple[LoRA, spec.Tree]:
    """The :class:`~jaxlm.adapt.LoRA` and its trained parameters, loaded from a PEFT directory.

    The trained parameters are converted to float32. If ``lora_dropout`` is not 0, the function warns that further
    training has no dropout, because :class:`~jaxlm.adapt.LoRA` has none.

    Args:
        directory: contains ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: the base model.

    Raises:
        FileNotFoundError: the directory or a file does not exist.
        ValueError: one of these conditions holds:

            - A file is damaged or does not match ``checksums.json``, or the weights are only in a pickle file.
            - The model has no published format.
            - The adapter is not a LoRA adapter or has no LoRA factors.
            - An option is invalid or not supported (DoRA, different ranks or scales per module, trained biases, ...).
            - A tensor is missing (also if only some layers have an adapter), has a wrong shape or does not belong to
              the model.
            - A LoRA factor belongs to a weight that is not the weight of a linear module (see :func:`save_adapter`).
            - The tensor of a parameter that is trained in full also contains other parameters, or the transformers
              class uses it twice (see :func:`save_adapter`).
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{str(directory)!r} is not a directory: nothing is downloaded, so fetch the files first"
        )
    integrity.verify_checksums(directory)
    config_path = path_inside(directory, CONFIG)
    rank, alpha = _rank_and_alpha(read_object(config_path), config_path)
    tensors = _read_tensors(directory)
    prefix = format_of(model).prefix  # of the base model's tensors, in transformers classes with a head
    weights = _weights(model, with_prefix=any(name.startswith(prefix) for name in tensors))
    weight_of = {name: weight for weight in weights.values() for name in weight.names}
    owners = [_owner(name, weight_of, directory) for name in tensors]
    lora_paths = {path for path, is_factor in owners if is_factor}
    fully_trained = {path for path, is_factor in owners if not is_factor}
    if not lora_paths:
        raise ValueError(f"{directory / WEIGHTS} contains no LoRA factors")
    lora = LoRA(rank, alpha, targets=_exact_patterns(lora_paths), full_training_patterns=_exact_patterns(fully_trained))

    specs = lora.specs(model.specs)
    leaves = []
    for path, leaf in spec.flatten(specs).items():
        location = _trained_location(path, weights, rank)
        is_factor = path.endswith(_FACTOR_KEYS)
        requirement = f"r={rank} in {CONFIG} and the model require" if is_factor else "the model requires"
        for name in location.names:
            if name not in tensors:
                raise ValueError(
                    f"{directory / WEIGHTS} lacks {name!r}: adapters for only some of the layers are not supported"
                )
            if tensors[name].shape != location.tensor_shape:
                raise ValueError(
                    f"{directory / WEIGHTS}: {name!r} has shape {list(tensors[name].shape)}, but "
                    f"{requirement} {list(location.tensor_shape)}"
                )
        values = (tensors[name] for name in location.names)
        leaves.append(jnp.asarray(location.to_parameter(leaf.shape, np.float32, values)))
    return lora, jax.tree.unflatten(jax.tree.structure(specs), leaves)


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """The tensors of a PEFT directory by name, without :data:`_NAME_PREFIX`. For errors, see :func:`load_adapter`."""
    if not (directory / WEIGHTS).exists() and (directory / _PICKLE).exists():
        raise ValueError(
            f"{directory} contains the weights only as a pickle file ({_PICKLE}). jaxlm does not read it, because "
            "loading a pickle can run arbitrary code. If you trust the file, load the adapter with PEFT and save it "
            "with save_pretrained(directory, safe_serialization=True)"
        )
    try:
        tensors = load_file(path_inside(directory, WEIGHTS))
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} is truncated or not a safetensors file: {error}") from error
    unknown = sorted(name for name in tensors if not name.startswith(_NAME_PREFIX))
    if unknown:
        raise ValueError(
            f"{directory / WEIGHTS}: the names {', '.join(unknown[:5])} do not begin with {_NAME_PREFIX!r}, "
            "as all tensor names in PEFT files do"
        )
    return {name.removeprefix(_NAME_PREFIX): tensor for name, tensor in tensors.items()}


def save_adapter(
    directory: str | os.PathLike[str], model: Model, lora: LoRA, trained: spec.Tree, *, base_model: str | None = None
) -> None:
    """Save an adapter in a directory that ``peft.PeftModel.from_pretrained(transformers_model, directory)`` can load.

    Args:
        directory: created if it does not exist. ``checksums.json`` is replaced and then lists only the two files of the
            adapter. Other files are not changed.
        model: the base model.
        lora: the LoRA settings with which ``trained`` was created.
        trained: the trained parameters, a tree with the specs ``lora.specs(model.specs)``. They are saved as float32.
            If they are sharded over several processes, all processes must call this function; the first process writes.
        base_model: directory or name of the base model, for ``peft.AutoPeftModel``.

    Raises:
        OSError: the disk is full, or the directory is not writable.
        ValueError: one of these conditions holds:

            - The directory contains a model, or ``model`` has no published format.
            - ``trained`` does not match the specs.
            - A weight with LoRA factors is not the weight of a linear module in the transformers class. For example, it
              is a token embedding.
            - PEFT rejects the module of a weight with LoRA factors (``out_proj`` of Mamba-2 and Falcon-H1).
            - The tensor of a parameter that is trained in full also contains other parameters.
            - A parameter is trained in full, and the transformers class uses its tensor twice (the token embedding of
              a model with a tied head, and of T5).
            - Only some parameters of a module are trained in full.
            - The name of another module ends with the name of a module that is trained in full. PEFT compares only the
              ends of names, so it would confuse these modules.
    """
    directory = Path(directory)
    _require_no_model(directory)
    spec.require_same(lora.specs(model.specs), trained, f"trained tree of {lora}", dtypes=False)
    is_distributed = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(trained))
    table = format_of(model)
    # A model with task="none" has a head if it has next_sentence=True.
    head_paths = table.unprefixed_tensors.keys() & spec.flatten(model.specs).keys()
    has_head = model.task != "none" or bool(head_paths)
    weights = _weights(model, with_prefix=has_head)
    flat = {
        name: np.asarray(processes.gather_to_host(leaf), np.float32) for name, leaf in spec.flatten(trained).items()
    }
    lora_paths = lora.target_paths(model.specs)
    lora_weights = [weight for weight in weights.values() if weight.path_without_layer in lora_paths]
    for weight in lora_weights:
        if table.model_type in _TYPES_WITH_REJECTED_OUT_PROJ and weight.names[0].endswith(".out_proj.weight"):
            raise ValueError(
                f"{weight.path_without_layer} ({weight.names[0]}) has LoRA factors, but PEFT rejects LoRA factors of "
                f"out_proj in models of type {table.model_type!r}: use other LoRA.targets, or save the merged "
                "parameters (lora.merge) with save_pretrained"
            )
    tensors: dict[str, np.ndarray] = {}
    for path, array in flat.items():
        location = _trained_location(path, weights, lora.rank)
        tensors |= zip(location.names, map(location.to_file, location.matrices(array)), strict=True)
    targets = [name.removesuffix(_A_SUFFIX) for name in tensors if name.endswith(_A_SUFFIX)]
    fully_trained = [path for path in flat if not path.endswith(_FACTOR_KEYS)]
    task = _PEFT_TASKS.get(model.task) if has_head else "FEATURE_EXTRACTION"
    # PEFT fails if the file lacks a tensor of a module that PEFT adds to `modules_to_save`. So the task is saved only
    # if all parameters of these modules are trained in full.
    heads = _PEFT_HEADS.get(task or "", ())
    paths_in_heads = {path for path, weight in weights.items() if weight.names[0].split(".")[0] in heads}
    if not paths_in_heads.issubset(fully_trained):
        task, heads = None, ()
    modules_to_save = _modules_to_save(weights, fully_trained, heads)
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.rank if lora.alpha is None else lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": modules_to_save or None,
        "fan_in_fan_out": any(weight.is_conv1d for weight in lora_weights),
        "inference_mode": True,
    }
    if processes.is_first():
        with integrity.staging_directory(directory) as temporary:
            file_tensors = {_NAME_PREFIX + name: tensor for name, tensor in tensors.items()}
            save_file(file_tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            write_json(temporary / CONFIG, config)
            integrity.install_files(temporary, directory, (WEIGHTS, CONFIG))
    if is_distributed:
        processes.barrier("adapter saved")


def _require_no_model(directory: Path) -> None:
    """Raise ``ValueError`` if the directory contains a model that transformers can load."""
    weights = [name for name in (MODEL_WEIGHTS, MODEL_INDEX, "pytorch_model.bin") if (directory / name).exists()]
    if weights and (directory / MODEL_CONFIG).exists():
        raise ValueError(
            f"{directory} contains a model ({MODEL_CONFIG}, {weights[0]}). With {CONFIG} in the same directory, "
            "transformers would load the base model of the adapter instead: save the adapter in another directory"
        )


# ------------------------------------------------------------------------------------------------- one weight


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One parameter of the model, with the conversions between the model and PEFT's files.

    Attributes:
        path: path of the parameter in the model.
        location: its tensor names and its layout in the files of the transformers class.
        num_row_axes: number of leading axes of one matrix (``Location``) that form the rows of the weight matrix (see
            ``jaxlm.adapt.num_row_axes``); None: the parameter is not a weight matrix, for example a bias.
        is_table: whether the parameter is an embedding table or an output head.
        tied_names: the names of additional tensors that the transformers class ties to this parameter.
    """

    path: str
    location: Location
    num_row_axes: int | None
    is_table: bool
    tied_names: tuple[str, ...]

    @property
    def path_without_layer(self) -> str:
        """The path without its layer number, as in the patterns of :class:`~jaxlm.adapt.LoRA`."""
        return spec.split_layer(self.path)[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The tensor name of each matrix of the parameter."""
        return self.location.names

    @property
    def is_conv1d(self) -> bool:
        """Whether the weight of a linear module has the shape [in, out] in files, as in GPT-2's ``Conv1D``."""
        return not self.is_table and self.location.layout == self._rows_and_columns

    @property
    def _rows_and_columns(self) -> Layout:
        """The axes of one matrix in the model that form its rows, and the axes that form its columns."""
        axes = tuple(range(len(self.location.model_shape)))
        return (axes[: self.num_row_axes], axes[self.num_row_axes :])

    def require_linear(self) -> None:
        """Raise ``ValueError`` unless this is the whole weight of a linear module in the transformers class."""
        is_head = self.is_table and self.path.split("/")[0] == "head"
        if (
            self.num_row_axes is None
            or self.location.layout not in (self._rows_and_columns, self._rows_and_columns[::-1])
            or self.location.num_rows is not None
            or (self.is_table and not is_head)
            or not self.names[0].endswith(".weight")
        ):
            raise ValueError(
                f"{self.path_without_layer} ({self.names[0]}) is not the weight of a linear module in the transformers "
                "class, so its LoRA factors cannot be saved or loaded in PEFT's format"
            )

    def factor_location(self, key: str, rank: int) -> Location:
        """The location in PEFT's files of the factor ``key``: A or B of jaxlm. A stacked weight has stacked factors."""
        self.require_linear()
        shape, num_rows = self.location.model_shape, self.num_row_axes
        factor_shape = (*shape[:num_rows], rank) if key == LORA_A else (rank, *shape[num_rows:])
        axes = tuple(range(len(factor_shape)))
        layout = (axes[:-1], axes[-1:]) if key == LORA_A else (axes[:1], axes[1:])
        # PEFT's A is [rank, in] and PEFT's B is [out, rank]. The rows of an output head are its outputs, so jaxlm's A
        # is PEFT's B. The rows of every other weight are its inputs, so the factors are transposed.
        suffix = _A_SUFFIX if (key == LORA_A) != self.is_table else _B_SUFFIX
        names = tuple(name.removesuffix(".weight") + suffix for name in self.names)
        return Location(names, self.location.stack, factor_shape, layout if self.is_table else layout[::-1])

    def require_own_tensor(self) -> None:
        """Raise ``ValueError`` if the tensor has other parameters too, or is tied to a tensor outside its module."""
        if self.location.num_rows is not None:
            raise ValueError(
                f"{self.path_without_layer} is a part of {self.names[0]} in the transformers class, so it cannot be "
                "saved or loaded in PEFT's format"
            )
        module = self.names[0].rpartition(".")[0]
        # PEFT copies a module with its submodules, including tied tensors inside of it. A tied tensor outside of the
        # module would keep its old value.
        second_name = next((name for name in self.tied_names if not name.startswith(f"{module}.")), None)
        if second_name is not None:
            raise ValueError(
                f"{self.path_without_layer} is trained in full, but the transformers class uses this tensor twice "
                f"({self.names[0]} and {second_name}), and PEFT trains only one copy. To save: use save_pretrained "
                "with the merged parameters (lora.merge). To load: merge the adapter with PEFT (merge_and_unload), "
                "and load the result"
            )


def _trained_location(path: str, weights: dict[str, _Weight], rank: int) -> Location:
    """The location in PEFT's files of a trained parameter: a LoRA factor, or a parameter that is trained in full."""
    weight_path, _, key = path.rpartition("/")
    if path.endswith(_FACTOR_KEYS):
        return weights[weight_path].factor_location(key, rank)
    weights[path].require_own_tensor()
    return weights[path].location


def _weights(model: Model, *, with_prefix: bool) -> dict[str, _Weight]:
    """The :class:`_Weight` of every parameter of the model, by path.

    Args:
        with_prefix: whether tensor names have the base model's prefix, as in transformers classes with a head.

    Raises:
        ValueError: the model has no published format.
    """
    table = format_of(model)
    if table.is_jaxlm_format:
        with_config = " with this config" if formats.of(model.family) else ""
        raise ValueError(
            f"family {model.family!r}{with_config} has no class in transformers, so PEFT has no adapters for it"
        )
    locations = locations_of(model, table, table.prefix if with_prefix else "")
    tied_names = _tied_names(model, table, locations)
    return {
        path: _Weight(
            path=path,
            location=locations[path],
            num_row_axes=num_row_axes(path, leaf),
            is_table=is_table(path, leaf),
            tied_names=tuple(name for name, tied_path in tied_names.items() if tied_path == path),
        )
        for path, leaf in spec.flatten(model.specs).items()
    }


def _tied_names(model: Model, table: Format, locations: dict[str, Location]) -> dict[str, str]:
    """``{name: path}`` of the tensors that the transformers class ties to the tensor of a parameter.

    For example, the name of a tied head has the path of the token embedding. A class with a head for labels, or
    without a head, has no tied head.
    """
    own_names = {name for location in locations.values() for name in location.names}
    base_modules = {(table.prefix + name).split(".")[0] for name in table.tensors.values()}
    has_head = model.task != "none" and model.task not in LABEL_HEADS
    return {
        name: path
        for name, path in table.tied_tensors.items()
        if path in locations and name not in own_names and (has_head or name.split(".")[0] in base_modules)
    }


# --------------------------------------------------------------------------------------------------- reading


def _rank_and_alpha(config: dict[str, Any], path: Path) -> tuple[int, float]:
    """The ``rank`` and ``alpha`` of :class:`~jaxlm.adapt.LoRA`, from a PEFT config.

    Raises:
        ValueError: an option of the config is invalid or not supported.
    """
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type={config.get('peft_type')!r} is not supported: only 'LORA' is supported")
    for option, value in config.items():
        if option not in (*_READ_OPTIONS, *_IGNORED_OPTIONS) and value not in (None, False, {}, [], ""):
            raise ValueError(f"{path}: {option}={value!r} is not supported: merge the adapter with PEFT instead")
    if config.get("bias") not in ("none", None):
        raise ValueError(f"{path}: bias={config['bias']!r} is not supported: only 'none' is supported")
    if config.get("init_lora_weights", True) not in _INITS_THAT_KEEP_BASE:
        raise ValueError(
            f"{path}: init_lora_weights={config['init_lora_weights']!r} is not supported: it changes the base "
            "weights; save the adapter with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    check_value(int, rank, f"{path}: r")
    check_value(float, alpha, f"{path}: lora_alpha")
    check_value(bool | None, config.get("use_rslora"), f"{path}: use_rslora")
    check_min(1, **{f"{path}: r": rank})
    if alpha <= 0:
        raise ValueError(f"{path}: lora_alpha={alpha} must be positive")
    if config.get("lora_dropout"):
        warnings.warn(
            f"{path}: lora_dropout={config['lora_dropout']} is not applied in further training: jaxlm's LoRA has "
            "no dropout",
            stacklevel=3,
        )
    # With use_rslora, the scale is alpha / sqrt(r) instead of alpha / r (Kalajdzievski 2023).
    return rank, float(alpha) * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _owner(name: str, weight_of: dict[str, _Weight], directory: Path) -> tuple[str, bool]:
    """The path without layer number of the weight to which a tensor belongs, and whether the tensor is a LoRA factor.

    Raises:
        ValueError: the tensor does not belong to the model, is a weight of the base model, or is a LoRA factor of a
            weight that cannot have LoRA factors in PEFT's format.
    """
    module = name.removesuffix(_A_SUFFIX).removesuffix(_B_SUFFIX)
    if module != name:
        weight = weight_of.get(f"{module}.weight")
        if weight is None:
            raise ValueError(f"{directory / WEIGHTS}: the model has no module {module!r}")
        weight.require_linear()
        return weight.path_without_layer, True
    if name.endswith(".base_layer.weight"):
        raise ValueError(
            f"{directory / WEIGHTS}: {name!r} is a weight of the base model: save the adapter with PEFT's "
            "save_pretrained(..., save_embedding_layers=False)"
        )
    if name not in weight_of:
        raise ValueError(f"{directory / WEIGHTS}: {name!r} is neither a LoRA factor nor a parameter of the model")
    return weight_of[name].path_without_layer, False


def _exact_patterns(paths: Iterable[str]) -> tuple[str, ...]:
    """Regular expressions that match exactly these paths."""
    return tuple(f"^{re.escape(path)}$" for path in sorted(paths))


# --------------------------------------------------------------------------------------------------- writing


def _modules_to_save(weights: dict[str, _Weight], fully_trained: list[str], heads: tuple[str, ...]) -> list[str]:
    """The names of the modules that are trained in full (PEFT's ``modules_to_save``).

    If one of these modules contains another of them, only the outer module is listed.

    Args:
        heads: names of the modules that PEFT adds itself. They count as modules that are trained in full.

    Raises:
        ValueError: only some parameters of a module are trained (PEFT saves only complete modules), or the name of
            another module ends with the name of a trained module (PEFT would also copy the other module).
    """
    trained_names = {name: path for path in fully_trained for name in weights[path].names}
    candidates = {*heads, *(name.rpartition(".")[0] for name in trained_names)}
    modules: dict[str, str] = {}  # module name -> path of one of its trained parameters
    for name, path in trained_names.items():
        outermost = next(module for module in _modules_of(name) if module in candidates)
        modules.setdefault(outermost, weights[path].path_without_layer)
    unlisted_modules: dict[str, str] = {}  # module name -> path of one of its parameters
    trained_paths = set(fully_trained)
    for weight in weights.values():
        for name in (*weight.names, *weight.tied_names):
            module = next((module for module in _modules_of(name) if module in modules), None)
            if module is not None and weight.path not in trained_paths:
                raise ValueError(
                    f"{weight.path_without_layer} ({name}) is not trained in full, but {modules[module]} of the same "
                    f"module ({module or 'the whole model'}) is: PEFT saves only complete modules, so "
                    "LoRA.full_training_patterns must select all parameters of the module, or none"
                )
            for module in _modules_of(name):
                if module not in modules:
                    unlisted_modules.setdefault(module, weight.path_without_layer)
    for unlisted, path in unlisted_modules.items():
        module = next((end for end in (unlisted[i:] for i in range(1, len(unlisted))) if end in modules), None)
        if module is not None:
            raise ValueError(
                f"{modules[module]} ({module}) is trained in full, so PEFT would also copy {path} ({unlisted}), "
                "because PEFT compares only the ends of module names: LoRA.full_training_patterns must select both, or "
                f"not select {modules[module]}"
            )
    return sorted(modules)


def _modules_of(name: str) -> list[str]:
    """The names of the modules that contain a tensor, from the whole model (``""``) to the module of the tensor."""
    parts = name.split(".")
    return [".".join(parts[:number]) for number in range(len(parts))]
