"""Compare RWKV-7 with the authors' package ``rwkv`` on a CPU: logits, carried states, files; and the torch reference.

The package reads a ``.pth`` file and has no gradients. ``tests/oracles/rwkv7.py`` has them: a reference in torch, which
is compared with the package here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.interop.huggingface import named_tensors
from jaxlm.models import get_model
from jaxlm.testing.helpers import add_noise, relative_error
from tests.oracles.rwkv7 import hidden_of_text

pytestmark = [
    pytest.mark.live,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.jit
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

PAGE = Path(__file__).parents[2] / "docs/families/rwkv7.md"
TOKENS = np.random.default_rng(0).integers(0, 60, 70).astype(np.int32)
FIELDS: dict[str, Any] = {
    "vocab_size": 60, "num_layers": 3, "embed_dim": 48, "mlp_dim": 100, "head_dim": 16, "decay_rank": 7, "rate_rank": 6,
    "value_rank": 5, "gate_rank": 9, "norm_epsilon": 1e-5, "group_norm_epsilon": 64e-5,
}  # fmt: skip


def author_model(path: Path, strategy: str = "cpu fp32") -> Any:
    """The model of the package ``rwkv`` for a ``.pth`` file."""
    with pytest.MonkeyPatch.context() as patch:  # the package reads these variables when it is imported
        for name, value in {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}.items():
            patch.setenv(name, value)
        from rwkv.model import RWKV

        return RWKV(str(path.with_suffix("")), strategy)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    """Random tensors with the names and shapes of published files, with the unused tensors of the first block."""
    import torch

    model = get_model("rwkv7-tiny", **FIELDS)
    params = add_noise(jax.jit(model.init)(jax.random.key(0)))
    unused = {"blocks.0.att.v0": (1, 1, 48), "blocks.0.att.v1": (48, 5), "blocks.0.att.v2": (5, 48)}
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in named_tensors(model, params)}
    return {**tensors, **{name: torch.full(shape, 0.3) for name, shape in unused.items()}}


@pytest.fixture(scope="module")
def directory(tensors: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a ``.pth`` file and the files that the program in docs/families/rwkv7.md makes of it."""
    import torch

    directory: Path = tmp_path_factory.mktemp("rwkv7")
    torch.save(tensors, directory / "RWKV-x070.pth")
    (program,) = re.findall(r"^```python\n(import json\n.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        exec(compile(program, str(PAGE), "exec"), {})
    return directory


@pytest.fixture(scope="module")
def pair(directory: Path) -> tuple[Any, Any, Any]:
    """The model of the authors, the same model loaded by jaxlm, and its parameters."""
    return (author_model(directory / "RWKV-x070.pth"), *jaxlm.load_pretrained(directory / "rwkv7"))


def test_the_converted_config_has_the_shape_of_the_tensors(pair: tuple[Any, Any, Any]) -> None:
    assert pair[1] == get_model("rwkv7-tiny", **FIELDS)


def test_prompts_in_pieces_and_decoding_equal_the_package(pair: tuple[Any, Any, Any]) -> None:
    """Logits and all carried states, after calls with 40, 1, 1 and 28 tokens."""
    authors, model, params = pair
    step = jax.jit(lambda p, t, s: model.apply(p, t, state=s))
    their_state, state = None, model.init_state(1, len(TOKENS))
    for piece in (slice(0, 40), slice(40, 41), slice(41, 42), slice(42, 70)):
        want, their_state = authors.forward(TOKENS[piece].tolist(), their_state, full_output=True)
        hidden, state = step(params, TOKENS[None, piece], state)
        got = model.logits(params, hidden)[0]
        assert relative_error(got, want.reshape(got.shape)) < 1e-5
        for number, layer in enumerate(state["layers"]):  # the package has the axes of the matrix in the other order
            time_mix, memory, channel_mix = their_state[3 * number : 3 * number + 3]
            assert relative_error(layer["memory"][0], memory.mT) < 1e-5
            assert relative_error(layer["time_mix_tail"][0, 0], time_mix) < 1e-5
            assert relative_error(layer["channel_mix_tail"][0, 0], channel_mix) < 1e-5


def test_the_torch_reference_equals_the_package(pair: tuple[Any, Any, Any], tensors: dict[str, Any]) -> None:
    authors, model, _ = pair
    want, _ = authors.forward(TOKENS.tolist(), None, full_output=True)
    got = hidden_of_text(model.config, tensors, TOKENS) @ tensors["head.weight"].mT
    assert relative_error(got, want) < 1e-5


def test_the_package_reads_saved_tensors(pair: tuple[Any, Any, Any], tensors: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    authors, model, params = pair
    jaxlm.save_pretrained(tmp_path, model, params)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == {name for name in tensors if not re.match(r"blocks\.0\.att\.v\d", name)}
    assert all(torch.equal(saved[name], tensors[name]) for name in saved)
    torch.save(saved, tmp_path / "saved.pth")
    want, _ = authors.forward(TOKENS.tolist(), None, full_output=True)
    got, _ = author_model(tmp_path / "saved.pth").forward(TOKENS.tolist(), None, full_output=True)
    assert torch.equal(got, want)


def test_bfloat16_is_as_near_to_float32_as_the_package(
    pair: tuple[Any, Any, Any], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rwkv.model

    authors, model, params = pair
    want, _ = authors.forward(TOKENS.tolist(), None, full_output=True)
    monkeypatch.setattr(rwkv.model, "DTYPE", rwkv.model.DTYPE)  # the package sets this variable; restore it
    half_authors = author_model(directory / "RWKV-x070.pth", "cpu bf16")
    their_error = relative_error(half_authors.forward(TOKENS.tolist(), None, full_output=True)[0].float(), want)
    half = model.with_fields(dtype="bfloat16")
    hidden, _ = jax.jit(half.apply)(params, TOKENS[None])
    assert relative_error(half.logits(params, hidden)[0], want) < max(1.5 * their_error, 0.02)
