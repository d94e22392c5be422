"""Every Hugging Face class in both directions: run with ``-m live`` and the ``reference`` extra.

python -m tests.interop.test_classes_live      prints the matrix
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.interop.formats import Format
from jaxlm.interop.huggingface import load_pretrained, named_tensors, save_pretrained
from tests.helpers import assert_trees_equal, lively
from tests.interop.classes import CLASSES, tiny

pytestmark = pytest.mark.live


def torch_class(architecture: str) -> Any:
    """The class of transformers."""
    import transformers

    if architecture.startswith("TransfoXL"):
        import transformers.models.deprecated.transfo_xl as deprecated

        return getattr(deprecated, architecture)
    return getattr(transformers, architecture)


def check(name: str, table: Format, architecture: str, directory: Path) -> None:
    """Ours opens in torch with nothing missing or left over; what torch then saves, we open, every byte as it was."""
    import torch

    model = tiny(name, table, architecture)
    params = jax.jit(lambda key: lively(model.init(key)))(jax.random.key(0))
    save_pretrained(directory / "ours", model, params)
    theirs, info = torch_class(architecture).from_pretrained(directory / "ours", output_loading_info=True)
    left = {kind: [name for name in names if not name.endswith("inv_freq")] for kind, names in info.items()}
    assert not any(left.values()), left  # (frequencies are no parameter: torch computes them)
    state = theirs.state_dict()
    for tensor, array in named_tensors(model, params):
        own = tensor if tensor in state else tensor.removeprefix(table.prefix)  # a base class calls itself nothing
        assert torch.equal(state[own], torch.from_numpy(np.array(array))), tensor
    theirs.save_pretrained(directory / "theirs")
    again, loaded = load_pretrained(directory / "theirs")
    assert again.specs == model.specs
    assert_trees_equal(loaded, params)


@pytest.mark.filterwarnings("ignore:The output of TransfoXL will be updated:DeprecationWarning")
@pytest.mark.parametrize(("name", "table", "architecture"), CLASSES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_class_opens_what_we_save_and_we_open_what_it_saves(
    name: str, table: Format, architecture: str, tmp_path: Path
) -> None:
    check(name, table, architecture, tmp_path)


if __name__ == "__main__":
    print("| family | class | ours opens in torch | torch's opens in ours |\n|---|---|---|---|")
    for case in CLASSES:
        with tempfile.TemporaryDirectory() as folder:
            check(*case, Path(folder))
        print(f"| {case[0]} | `{case[2]}` | yes, byte for byte | yes, byte for byte |", flush=True)
