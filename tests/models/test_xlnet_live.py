"""Compare XLNet's memory and right-to-left rows with transformers. These need several calls; an oracle makes one call.

python -m tests.models.test_xlnet_live      make the golden file of ``test_xlnet.py``
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlm.interop.huggingface import load_pretrained
from tests.models.test_xlnet import GOLDEN, check_memory
from tests.oracles.xlnet import perm_mask, target_mapping

pytestmark = pytest.mark.live

SEGMENTS, B, T, P, REUSED, SLOTS = 4, 4, 8, 3, 5, 7


def reference(directory: Path) -> dict[str, np.ndarray]:
    """The outputs for four consecutive segments with memory; the second half of the rows runs from right to left."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(7)
    config = transformers.XLNetConfig(
        vocab_size=23, d_model=12, n_layer=2, n_head=3, d_inner=10, mem_len=SLOTS, reuse_len=REUSED, clamp_len=9
    )
    model = transformers.XLNetLMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)

    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 23, (SEGMENTS, B, T)).astype(np.int32)
    order = np.stack([[rng.permutation(T) for _ in range(B)] for _ in range(SEGMENTS)]).astype(np.int32)
    targets = np.stack([[rng.permutation(T)[:P] for _ in range(B)] for _ in range(SEGMENTS)]).astype(np.int32)
    types = rng.integers(0, 2, (SEGMENTS, B, T)).astype(np.int32)
    types[:, :, :REUSED] = 0  # transformers assumes type 0 for the memory, as in pretraining

    model.transformer.bi_data = True  # a config field in transformers, an argument of the call in jaxlm
    permuted, memory = [], None
    for segment in range(SEGMENTS):
        output = model.transformer(
            _long(tokens[segment]),
            mems=memory,
            perm_mask=torch.from_numpy(perm_mask(order[segment], targets[segment])),
            target_mapping=torch.from_numpy(target_mapping(targets[segment], T)),
            token_type_ids=_long(types[segment]),
            use_mems=True,
        )
        permuted.append(output.last_hidden_state.detach().numpy())
        memory = output.mems

    # Left to right: one position is added after each segment, for the query of its last token. The memory omits it.
    model.transformer.bi_data = False
    model.transformer.reuse_len = None
    model.transformer.mem_len = 0
    causal, memory = [], None
    positions = np.tile(np.arange(T + 1), (B, 1))
    for segment in range(SEGMENTS):
        output = model.transformer(
            _long(np.pad(tokens[segment], ((0, 0), (0, 1)))),
            mems=memory,
            perm_mask=torch.from_numpy(perm_mask(positions, positions[:, 1:])),
            target_mapping=torch.from_numpy(target_mapping(positions[:, 1:], T + 1)),
            use_mems=True,
        )
        causal.append(output.last_hidden_state.detach().numpy())
        memory = [layer[:-1][-SLOTS:] for layer in output.mems]
    return {
        "tokens": tokens, "order": order, "targets": targets, "token_types": types, "slots": np.array(SLOTS),
        "permuted": np.stack(permuted), "causal": np.stack(causal),
    }  # fmt: skip


def _long(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x).long()


def test_memory_over_segments_equals_transformers(tmp_path):
    arrays = reference(tmp_path)
    check_memory(*load_pretrained(tmp_path), arrays)
    with np.load(GOLDEN / "reference.npz") as golden:  # the golden file has the outputs of this reference
        for name, x in arrays.items():
            np.testing.assert_allclose(x, golden[name], atol=1e-5)


def test_transformers_reads_written_files(tmp_path):
    import torch
    import transformers

    from jaxlm.interop.huggingface import save_pretrained

    model, params = load_pretrained(GOLDEN)
    save_pretrained(tmp_path, model, params)
    torch_model = transformers.XLNetLMHeadModel.from_pretrained(tmp_path)
    assert torch_model.config.clamp_len == 9
    with torch.no_grad():
        original_model = transformers.XLNetLMHeadModel.from_pretrained(GOLDEN)
        for parameter, original in zip(torch_model.parameters(), original_model.parameters(), strict=True):
            assert torch.equal(parameter, original)


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(GOLDEN / "reference.npz", **reference(GOLDEN))
