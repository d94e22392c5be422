"""The function :func:`default_variant`: the variant of a family that experiments train by default."""

from __future__ import annotations

from collections.abc import Callable

from jaxlm.models import Model, get_model, variant_names


def default_variant(family: str, accepts: Callable[[Model], bool]) -> str | None:
    """The name of the first variant for which ``accepts`` is true, or None if there is none.

    The order is: the tiny variants, all other variants, the family itself.
    """
    variants = [variant for variant, owner in variant_names().items() if owner == family]
    variants.sort(key=lambda variant: not variant.endswith("-tiny"))
    return next((variant for variant in (*variants, family) if accepts(get_model(variant))), None)
