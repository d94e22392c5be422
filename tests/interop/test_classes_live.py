"""Save and load every Hugging Face class in both directions: run with ``-m live`` and the ``reference`` extra.

python -m tests.interop.test_classes_live      prints the matrix
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.interop.formats import Format
from jaxlm.interop.huggingface import load_pretrained, named_tensors, save_pretrained
from jaxlm.testing.helpers import add_noise, assert_trees_equal, initial_params
from tests.interop.classes import TRANSFORMERS_CLASSES, declare_tied_head, model_of_class

pytestmark = pytest.mark.live


def torch_class(architecture: str) -> Any:
    """The class of transformers."""
    import transformers

    if architecture.startswith("TransfoXL"):
        import transformers.models.deprecated.transfo_xl as deprecated

        return getattr(deprecated, architecture)
    return getattr(transformers, architecture)


def check(name: str, table: Format, architecture: str, directory: Path) -> None:
    """Load a saved model in torch without missing or unexpected tensors, save it there, and load equal parameters."""
    import torch

    model = model_of_class(name, table, architecture)
    params = add_noise(initial_params(model))
    save_pretrained(directory / "ours", model, params)
    torch_model, info = torch_class(architecture).from_pretrained(directory / "ours", output_loading_info=True)
    problems = {kind: [name for name in names if not name.endswith("inv_freq")] for kind, names in info.items()}
    assert not any(problems.values()), problems  # inv_freq is not a parameter: torch computes it
    state = torch_model.state_dict()
    for tensor, array in named_tensors(model, params):
        torch_name = tensor if tensor in state else tensor.removeprefix(table.prefix)  # a base class has no prefix
        assert torch.equal(state[torch_name], torch.from_numpy(np.array(array))), tensor
    declare_tied_head(torch_model)
    torch_model.save_pretrained(directory / "theirs")
    reloaded_model, reloaded_params = load_pretrained(directory / "theirs")
    assert reloaded_model.specs == model.specs
    assert_trees_equal(reloaded_params, params)


@pytest.mark.filterwarnings("ignore:The output of TransfoXL will be updated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "table", "architecture"), TRANSFORMERS_CLASSES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_model_round_trips_through_the_torch_class(
    name: str, table: Format, architecture: str, tmp_path: Path
) -> None:
    check(name, table, architecture, tmp_path)


if __name__ == "__main__":
    print("| family | class | ours opens in torch | torch's opens in ours |\n|---|---|---|---|")
    for case in TRANSFORMERS_CLASSES:
        with tempfile.TemporaryDirectory() as folder:
            check(*case, Path(folder))
        print(f"| {case[0]} | `{case[2]}` | yes, byte for byte | yes, byte for byte |", flush=True)
