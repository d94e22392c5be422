"""References in float64, so that the differences to jaxlm contain only the rounding errors of jaxlm."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np


@contextlib.contextmanager
def float64(model: Any) -> Iterator[None]:
    """Convert a torch model to float64. In the context, all casts to float32 in its code are casts to float64.

    transformers casts to float32 in norms, softmax, rotary positions and recurrences, because it expects narrower
    parameters.
    """
    import torch

    model.double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


def as_float32(results: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays and torch tensors of ``results`` as NumPy arrays, with float32 instead of float64."""
    arrays = {key: x if isinstance(x, np.ndarray) else x.detach().numpy() for key, x in results.items()}
    return {key: x.astype(np.float32) if x.dtype == np.float64 else x for key, x in arrays.items()}
