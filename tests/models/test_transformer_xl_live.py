"""Compare Transformer-XL with transformers: memory over several segments, written files, and published sizes.

python -m tests.models.test_transformer_xl_live     make the golden files of test_transformer_xl.py
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import get_model
from tests.models.test_transformer_xl import SEGMENTS
from tests.oracles import read_golden
from tests.oracles.transformer_xl import CASES, no_memory, random_model, reference

pytestmark = pytest.mark.live

LENGTHS = (4, 1, 9, 3, 5)


def segments(case):
    """The outputs of transformers for five consecutive segments."""
    import torch

    model = random_model(case)
    with tempfile.TemporaryDirectory() as directory:
        read_golden("transformer_xl", case, Path(directory))
        _load(model, Path(directory))
    tokens = np.random.default_rng(7).integers(0, model.config.vocab_size, (2, sum(LENGTHS))).astype(np.int32)
    memory, hidden, start = no_memory(model, 2), [], 0
    with torch.no_grad():
        for length in LENGTHS:
            ids = torch.tensor(tokens[:, start : start + length], dtype=torch.long)
            logits = model(ids, mems=memory).prediction_scores
            output = model.transformer(ids, mems=memory)
            memory, start = output.mems, start + length
            hidden.append(output.last_hidden_state.numpy())
    return {
        "tokens": tokens,
        "lengths": np.array(LENGTHS),
        "hidden": np.concatenate(hidden, axis=1),
        "logits": logits.numpy(),
        "memory": np.stack([layer.transpose(0, 1).numpy() for layer in memory]),
    }


def _load(model, directory):
    """Load without ``from_pretrained``, which initializes u and v again if all layers share them."""
    from safetensors.torch import load_file

    missing, unknown = model.load_state_dict(load_file(directory / "model.safetensors"), strict=False)
    assert not unknown
    assert all("crit.out_" in name or "_bias" in name for name in missing)


def test_golden_files_equal_transformers():
    with np.load(SEGMENTS) as file:
        for case in CASES:
            for name, x in segments(case).items():
                np.testing.assert_allclose(file[f"{case}/{name}"], x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["base", "divided", "pre_norm", "projected", "untied", "classifier"])
def test_transformers_reads_written_files(case, tmp_path):
    import torch

    from benchmarks.torch_models import transformer_xl_module

    (tmp_path / "theirs").mkdir()
    golden = reference(case, tmp_path / "theirs")
    save_pretrained(tmp_path / "ours", *load_pretrained(tmp_path / "theirs"))
    model_class = getattr(transformer_xl_module(), type(random_model(case)).__name__)
    config = transformer_xl_module().TransfoXLConfig.from_pretrained(tmp_path / "ours")
    config.trainer_compatible, config.pad_token_id = True, 0  # avoids a warning, and an error of the classifier
    model = model_class.from_pretrained(tmp_path / "ours", config=config).eval()
    ids = torch.tensor(golden["input/tokens"], dtype=torch.long)
    with torch.no_grad():
        output = model(ids, mems=no_memory(model, 2))
    assert np.array_equal(output.logits if case == "classifier" else output.prediction_scores, golden["logits"])


def test_number_of_parameters_equals_transformers():
    import torch

    from benchmarks.torch_models import transformer_xl_module

    module = transformer_xl_module()
    with torch.device("meta"):
        model = module.TransfoXLLMHeadModel(module.TransfoXLConfig(trainer_compatible=True))
    assert get_model("transfo-xl-wt103").num_parameters == model.num_parameters()


if __name__ == "__main__":
    arrays = {f"{case}/{name}": x for case in CASES for name, x in segments(case).items()}
    SEGMENTS.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(SEGMENTS, **arrays)
