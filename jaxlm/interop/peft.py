"""LoRA adapters in the directory layout of PEFT, without torch: ``adapter_config.json``, ``adapter_model.safetensors``.

    >>> lora, trained = load_adapter("adapter", model)                                   # doctest: +SKIP
    >>> params = lora.merge(trained, lora.frozen(model.specs, params))                   # doctest: +SKIP
    >>> save_adapter("another", model, lora, trained)                                    # doctest: +SKIP

An adapter holds the factors of ``jaxlm.adapt.LoRA`` and the parameters that it trains in full
(``modules_to_save``). PEFT names tensors by modules of the transformers class, so the family needs a published format.
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
from jaxlm.adapt import LORA_A, LORA_B, LoRA, is_table, matrix_rows
from jaxlm.interop import formats
from jaxlm.interop.config_json import format_of, is_stacked
from jaxlm.interop.directory import inside, write_json
from jaxlm.interop.formats import Layout
from jaxlm.json_files import read_object
from jaxlm.models.model import Model

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_ROOT = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_TASKS = {
    "causal": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "tagging": "TOKEN_CLS",
    "span_qa": "QUESTION_ANS",
    "none": "FEATURE_EXTRACTION",
}
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights")
# What says how an adapter was made, or which modules it has, which the tensors say as well.
_NOT_NEEDED = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out", "layers_to_transform", "layers_pattern",
    "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
)  # fmt: skip
_INITIAL_OF_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base weights as they are."""


def load_adapter(directory: str | os.PathLike[str], model: Model) -> tuple[LoRA, spec.Tree]:
    """The adaptation and the trained tree that a PEFT directory holds, for the base model ``model``.

    Factors are float32, whatever the file has. ``lora_dropout`` acts in training only, and
    :class:`~jaxlm.adapt.LoRA` has none: a value above 0 gives a warning.

    Raises:
        FileNotFoundError: no such directory or file.
        ValueError: a file that has changed since it was saved; not a LoRA adapter, or one with an option that is not
            supported (DoRA, ranks or scales that differ by module, trained biases, ...); a tensor that the model has
            no place for, of another shape, or missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{str(directory)!r} is not a directory: nothing is downloaded, fetch the files first")
    integrity.verify_checksums(directory)
    config_path = inside(directory, CONFIG)
    rank, alpha = _check_config(read_object(config_path), config_path)
    try:
        tensors = load_file(inside(directory, WEIGHTS))
    except SafetensorError as error:
        raise ValueError(f"{directory / WEIGHTS} is truncated or no safetensors file: {error}") from error

    named = {name.removeprefix(_ROOT): tensor for name, tensor in tensors.items() if name.startswith(_ROOT)}
    if len(named) < len(tensors):
        strange = sorted(name for name in tensors if not name.startswith(_ROOT))
        raise ValueError(f"{directory / WEIGHTS}: {', '.join(strange[:5])} do not begin with {_ROOT!r}, as PEFT's do")
    per_layer = not getattr(model.config, "scan_layers", True)
    model = _stacked(model)
    weights = _weights(model, with_prefix=_has_prefix(model, named))
    owners = {name: weight for weight in weights.values() for name in weight.names}
    kinds = {name: _kind(name, owners, directory) for name in named}
    adapted = {owners[weight].path for weight, part in kinds.values() if part}
    whole = {owners[weight].path for weight, part in kinds.values() if not part}
    if not adapted:
        raise ValueError(f"{directory / WEIGHTS} holds no factors of LoRA")
    lora = LoRA(rank, alpha, targets=_exactly(adapted), train=_exactly(whole))
    reader = _Reader(directory, named, rank)
    leaves = {path: weights[path].whole_to_ours(reader.whole(weights[path])) for path in whole}
    for path in adapted:
        leaves |= weights[path].factors_to_ours(*reader.factors(weights[path]))
    trained = jax.tree_util.tree_map_with_path(lambda keys, _: leaves[spec.path_name(keys)], lora.specs(model.specs))
    return lora, jax.tree.map(jnp.asarray, spec.unstack(trained) if per_layer else trained)


def save_adapter(
    directory: str | os.PathLike[str], model: Model, lora: LoRA, trained: spec.Tree, *, base: str | None = None
) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained(transformers_model, directory)`` opens.

    Args:
        directory: made when missing; other files in it are left alone.
        model: the base model.
        trained: a tree with the specs ``lora.specs(model.specs)``.
        base: the directory or name of the base model, for ``peft.AutoPeftModel``.

    Raises:
        ValueError: a tree that is not the adaptation's, or a weight that is not a linear module in transformers'
            class (token tables, XLNet's attention), or a module that is trained in part only.
    """
    spec.require_same(lora.specs(model.specs), trained, f"trained tree of {lora}", dtypes=False)
    model, trained = _stacked(model), spec.restack(trained)
    weights = _weights(model, with_prefix=getattr(model.config, "task", None) != "none")
    flat = {name: np.asarray(processes.on_host(leaf), np.float32) for name, leaf in spec.flatten(trained).items()}
    tensors: dict[str, np.ndarray] = {}
    for path in lora.target_paths(model.specs):
        tensors |= weights[path].factors_to_peft(flat[f"{path}/{LORA_A}"], flat[f"{path}/{LORA_B}"])
    targets = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    whole = [path for path in flat if not path.endswith((f"/{LORA_A}", f"/{LORA_B}"))]
    for path in whole:
        tensors |= weights[path].whole_to_peft(flat[path])
    saved = _modules(weights, whole)
    task = _TASKS.get(getattr(model.config, "task", ""))
    # For these tasks PEFT itself adds the head to `modules_to_save`, and then misses its tensors where it was not.
    if not saved and task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        task = None
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.rank if lora.alpha is None else lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(weights[path].is_conv1d for path in lora.target_paths(model.specs)),
        "inference_mode": True,
    }
    if not processes.is_first():
        return
    directory = Path(directory)
    with integrity.staged(directory) as temporary:
        save_file({_ROOT + name: x for name, x in tensors.items()}, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, config)
        integrity.install(temporary, directory, (WEIGHTS, CONFIG))


# ------------------------------------------------------------------------------------------------- one weight


@dataclasses.dataclass(frozen=True)
class _Weight:
    """One parameter of the model: its path, the names of its layers in files, and how PEFT sees its factors.

    ``shape`` is that of one layer in the model, without padding of the vocabulary. ``rows`` as ``matrix_rows``.
    """

    path: str
    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    padded: tuple[int, ...]
    layout: Layout
    rows: int | None
    table: bool

    @property
    def is_conv1d(self) -> bool:
        """Whether transformers keeps the weight as [in, out] (GPT-2's ``Conv1D``)."""
        return not self.table and self.rows is not None and self.layout == self._sides

    @property
    def _sides(self) -> Layout:
        assert self.rows is not None
        axes = tuple(range(len(self.shape)))
        return (axes[: self.rows], axes[self.rows :])

    def check(self) -> None:
        """Refuse factors of a weight that is not the weight of a linear module.

        Raises:
            ValueError: it is not.
        """
        is_head = self.table and self.path.split("/")[0] == "head"
        is_linear = self.rows is not None and self.layout in (self._sides, self._sides[::-1])
        if not is_linear or (self.table and not is_head) or not self.names[0].endswith(".weight"):
            raise ValueError(
                f"{self.path} ({self.names[0]}) is not the weight of a linear module in transformers' class, so PEFT "
                "has no LoRA of it that is read or written here"
            )

    def factor_shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of PEFT's A [rank, in] and B [out, rank]."""
        rows, columns = (math.prod(self.shape[axis] for axis in side) for side in self._sides)
        inputs, outputs = (columns, rows) if self.table else (rows, columns)
        return (rank, inputs), (outputs, rank)

    def factors_to_peft(self, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
        """``{name: tensor}`` of our factors, stacked where the weight is."""
        self.check()
        tensors = {}
        for name, a_layer, b_layer in zip(self.names, self._layers(a), self._layers(b), strict=True):
            module = name.removesuffix(".weight")
            a_layer = a_layer[: self.shape[0]] if self.table else a_layer
            left, right = a_layer.reshape(-1, a_layer.shape[-1]), b_layer.reshape(b_layer.shape[0], -1)
            # The rows of a head are its outputs, those of every other weight its inputs.
            inputs, outputs = (right, left) if self.table else (left.T, right.T)
            tensors[module + _A] = np.ascontiguousarray(inputs)
            tensors[module + _B] = np.ascontiguousarray(outputs)
        return tensors

    def factors_to_ours(self, a: list[np.ndarray], b: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Our two factors, from PEFT's A and B of each layer."""
        rows = self.rows
        assert rows is not None
        rank = a[0].shape[0]
        left = [y if self.table else x.T for x, y in zip(a, b, strict=True)]
        right = [x if self.table else y.T for x, y in zip(a, b, strict=True)]
        ours_a = np.stack([x.reshape(*self.shape[:rows], rank) for x in left])
        ours_b = np.stack([x.reshape(rank, *self.shape[rows:]) for x in right])
        if self.table:
            ours_a = np.pad(ours_a, ((0, 0), (0, self.padded[0] - self.shape[0]), (0, 0)))
        both = {f"{self.path}/{LORA_A}": ours_a, f"{self.path}/{LORA_B}": ours_b}
        return both if self.stacked else {name: x[0] for name, x in both.items()}

    @property
    def _order(self) -> list[int]:
        return [axis for group in self.layout for axis in group]

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of one layer's tensor in files."""
        return tuple(math.prod(self.shape[axis] for axis in group) for group in self.layout)

    def whole_to_peft(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """``{name: tensor}`` of a parameter that is trained in full."""
        cut = tuple(slice(size) for size in self.shape)
        return {
            name: np.ascontiguousarray(layer[cut].transpose(self._order).reshape(self.file_shape))
            for name, layer in zip(self.names, self._layers(x), strict=True)
        }

    def whole_to_ours(self, layers: list[np.ndarray]) -> np.ndarray:
        """The parameter, from the tensor of each layer."""
        sizes = [self.shape[axis] for axis in self._order]
        ours = np.stack([layer.reshape(sizes).transpose(np.argsort(self._order)) for layer in layers])
        ours = np.pad(ours, [(0, 0), *((0, to - of) for of, to in zip(self.shape, self.padded, strict=True))])
        return ours if self.stacked else ours[0]

    def _layers(self, x: np.ndarray) -> np.ndarray:
        return x if self.stacked else x[None]


def _stacked(model: Model) -> Model:
    """The model with stacked layers: one parameter for all layers, as here in ``_Weight``."""
    if not hasattr(model.config, "scan_layers"):
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, scan_layers=True))


def _weights(model: Model, *, with_prefix: bool) -> dict[str, _Weight]:
    """``{path: weight}`` of every parameter of the model."""
    if not formats.of(model.family):
        raise ValueError(f"family {model.family!r} has no class in transformers, so PEFT has no adapters of it")
    table = format_of(model)
    prefix = table.prefix if with_prefix else ""
    names = {path: prefix + name for path, name in table.tensors.items()} | dict(table.head)
    unpadded = {"vocab_multiple": 1} if hasattr(model.config, "vocab_multiple") else {}
    specs = spec.flatten(model.module.specs(dataclasses.replace(model.config, **unpadded)))
    padded = spec.flatten(model.specs)
    weights = {}
    for path, leaf in specs.items():
        stacked = is_stacked(leaf)
        count, begin = (leaf.shape[0], 1) if stacked else (1, 0)
        shape = leaf.shape[begin:]
        weights[path] = _Weight(
            path=path,
            names=tuple(names[path].format(layer=layer) for layer in range(count)),
            stacked=stacked,
            shape=shape,
            padded=padded[path].shape[begin:],
            layout=table.layouts.get(path, tuple((axis,) for axis in range(len(shape)))),
            rows=matrix_rows(path, leaf),
            table=is_table(path, leaf),
        )
    return weights


# --------------------------------------------------------------------------------------------------- reading


def _check_config(config: dict[str, Any], path: Path) -> tuple[int, float]:
    """The rank and the scale ``alpha`` of our LoRA, after a check of every option."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type={config.get('peft_type')!r} is not supported: only 'LORA' is")
    for option, value in config.items():
        if option not in (*_READ, *_NOT_NEEDED) and value not in (None, False, {}, [], ""):
            raise ValueError(f"{path}: {option}={value!r} is not supported: merge the adapter with PEFT instead")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias={config['bias']!r} is not supported: only 'none' is")
    if config.get("init_lora_weights", True) not in _INITIAL_OF_THE_BASE:
        raise ValueError(
            f"{path}: init_lora_weights={config['init_lora_weights']!r} is not supported: it changes the base weights "
            "too; save the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(f"{path}: r={rank!r} must be a positive integer and lora_alpha={alpha!r} a number")
    if config.get("lora_dropout"):
        warnings.warn(
            f"{path}: lora_dropout={config['lora_dropout']} is not applied when training goes on: LoRA has no dropout",
            stacklevel=3,
        )
    # Kalajdzievski 2023: the scale is alpha / sqrt(r).
    return rank, float(alpha) * math.sqrt(rank) if config.get("use_rslora") else float(alpha)


def _has_prefix(model: Model, named: dict[str, np.ndarray]) -> bool:
    """Whether names are those of a class with a head, which holds the base class under a prefix."""
    prefix = format_of(model).prefix if formats.of(model.family) else ""
    return any(name.startswith(prefix) for name in named)


def _kind(name: str, owners: dict[str, _Weight], directory: Path) -> tuple[str, str]:
    """The weight that a tensor belongs to, and which factor it is (``""``: the whole weight)."""
    for part in (_A, _B):
        weight = name.removesuffix(part) + ".weight"
        if name.endswith(part):
            if weight not in owners:
                raise ValueError(f"{directory / WEIGHTS}: the model has no module {name.removesuffix(part)!r}")
            owners[weight].check()
            return weight, part
    if name.endswith(".base_layer.weight"):
        raise ValueError(
            f"{directory / WEIGHTS}: {name!r} is a weight of the base model: save the adapter with PEFT's "
            "save_pretrained(..., save_embedding_layers=False)"
        )
    if name not in owners:
        raise ValueError(f"{directory / WEIGHTS}: {name!r} is neither a factor of LoRA nor a parameter of the model")
    return name, ""


def _exactly(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"^{re.escape(path)}$" for path in sorted(paths))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Tensors of an adapter by the weight that they belong to, with a check of their shapes."""

    directory: Path
    tensors: dict[str, np.ndarray]
    rank: int

    def whole(self, weight: _Weight) -> list[np.ndarray]:
        return [self._read(name, weight.file_shape) for name in weight.names]

    def factors(self, weight: _Weight) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """PEFT's A and B of each layer."""
        modules = [name.removesuffix(".weight") for name in weight.names]
        a_shape, b_shape = weight.factor_shapes(self.rank)
        return [self._read(name + _A, a_shape) for name in modules], [
            self._read(name + _B, b_shape) for name in modules
        ]

    def _read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.directory / WEIGHTS
        if name not in self.tensors:
            raise ValueError(f"{path} lacks {name!r}: adapters on some layers of the stack only are not supported")
        if self.tensors[name].shape != shape:
            raise ValueError(
                f"{path}: {name!r} has shape {list(self.tensors[name].shape)}, but r={self.rank} of {CONFIG} and the "
                f"model ask for {list(shape)}"
            )
        return self.tensors[name].astype(np.float32)


# --------------------------------------------------------------------------------------------------- writing


def _modules(weights: dict[str, _Weight], whole: list[str]) -> list[str]:
    """Names of the modules that are trained in full: PEFT saves modules, never one of their parameters."""
    taken = {name for path in whole for name in weights[path].names}
    modules = sorted({name.rpartition(".")[0] for name in taken})
    for weight in weights.values():
        for name in weight.names:
            if name.rpartition(".")[0] in modules and name not in taken:
                raise ValueError(
                    f"{weight.path} ({name}) is not trained, but another parameter of its module is: PEFT saves whole "
                    "modules; name both in LoRA.train"
                )
    return modules
