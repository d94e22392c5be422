"""The families by name: those of this package, and those that users or installed packages register."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
from typing import Any

FAMILIES = (
    "gpt", "llama", "bert", "roberta", "t5", "xlnet", "transformer_xl", "lstm", "gru", "attention_rnn",
    "attention_rnn_lm", "resnet", "resnet_lm", "alexnet", "mamba2", "griffin", "gated_deltanet", "xlstm",
    "rwkv7",
)  # fmt: skip
"""Names of the families for any kind of text, each of which is a module of ``jaxlm.models``."""

_MODULES = {**{name: f"jaxlm.models.{name}" for name in FAMILIES}, "chess_llama": "jaxlm.tasks.chess_llama"}
"""The modules of all families of this package. ``chess_llama`` is not in FAMILIES because it reads only chess moves."""

ENTRY_POINT_GROUP = "jaxlm.families"
"""Entry-point group in which an installed package lists its families, so that commands find these families."""

_REQUIRED = ("Config", "specs", "apply", "logits")
_registered: dict[str, Any] = {}


def register_family(name: str, module: Any, *, replace: bool = False) -> None:
    """Register a family of another package, so that ``get_model``, saved models and experiments find it by name.

    A package can also list its families in its ``pyproject.toml``. Commands such as ``jaxlm generate`` then find them:

        [project.entry-points."jaxlm.families"]
        hawk = "my_package.hawk"

    Args:
        name: the name of the family.
        module: a module, or another object, with the functions of a family (docs/tour.md, section 3).
            ``Config``, ``specs``, ``apply`` and ``logits`` are required, ``VARIANTS`` is optional.
        replace: whether to replace a registered family of this name, for example when a notebook cell runs again. JAX
            caches compiled functions by the config, so define a new ``Config`` class in this cell too.

    Raises:
        ValueError: the name is not an identifier, or another family or variant already has this name or the name of one
            of the variants.
        TypeError: the module lacks a required attribute, its ``Config`` is not a frozen dataclass, or a variant is not
            an instance of ``Config``.
    """
    if not name.isidentifier():
        raise ValueError(f"name={name!r} must be a Python identifier, such as 'my_family'")
    if name in _MODULES:
        raise ValueError(f"a family {name!r} is already registered: choose another name")
    if _registered.get(name, module) is not module and not replace:
        raise ValueError(
            f"a family {name!r} is already registered: choose another name, or use register_family(..., replace=True)"
        )
    family_of = {variant: other for other in (*_MODULES, *_registered) if other != name for variant in _variants(other)}
    if name in family_of:
        raise ValueError(f"name={name!r} is a variant of family {family_of[name]!r}: choose another name")
    missing = [attribute for attribute in _REQUIRED if not hasattr(module, attribute)]
    if missing:
        raise TypeError(f"family {name!r} has no {', '.join(missing)}: a family needs {', '.join(_REQUIRED)}")
    config = module.Config
    if not (dataclasses.is_dataclass(config) and isinstance(config, type) and config.__dataclass_params__.frozen):  # type: ignore[attr-defined]
        raise TypeError(f"Config of family {name!r} must be a frozen dataclass: use dataclass(frozen=True)")
    variants = getattr(module, "VARIANTS", {})
    wrong = [variant for variant, value in variants.items() if not isinstance(value, config)]
    if wrong:
        raise TypeError(f"VARIANTS of family {name!r} must be instances of its Config, but {wrong[0]!r} is not")
    for variant in variants:
        if variant in family_of:
            raise ValueError(f"variant {variant!r} is already a variant of family {family_of[variant]!r}: rename it")
        if variant != name and variant in (*_MODULES, *_registered):
            raise ValueError(f"variant {variant!r} has the name of a family: rename it")
    _registered[name] = module


def family(name: str) -> Any:
    """The module of a family, or the object that was registered for it.

    Raises:
        ValueError: no family has this name.
        ImportError: the package of the family cannot be loaded.
    """
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _registered:
        if name not in _entry_points():
            raise ValueError(
                f"no family is called {name!r}: choose from {', '.join(family_names())}, or register it with "
                "jaxlm.register_family"
            )
        entry_point = _entry_points()[name]
        try:
            register_family(name, entry_point.load())
        except Exception as error:  # any error in the code of another package
            raise ImportError(
                f"family {name!r} ({entry_point.value}) of an installed package cannot be loaded: {error}"
            ) from error
    return _registered[name]


def family_names() -> tuple[str, ...]:
    """The names of all families: those of this package, then the registered ones and those of installed packages."""
    return tuple(dict.fromkeys((*_MODULES, *_registered, *_entry_points())))


def variant_names() -> dict[str, str]:
    """A dict from the name of every variant to the name of its family. This function loads all families."""
    return {variant: name for name in family_names() for variant in _variants(name)}


def family_of_variant(variant: str) -> str | None:
    """The name of the family of a variant, or None if no family has this variant.

    Families of installed packages come last, so they are loaded only if no other family has the variant.
    """
    return next((name for name in family_names() if variant in _variants(name)), None)


def _variants(name: str) -> dict[str, Any]:
    return getattr(family(name), "VARIANTS", {})


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
