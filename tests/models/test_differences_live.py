"""Tests of the intended differences from transformers (tables in docs/families/): run with ``-m live``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import load_tokenizer, train_tokenizer
from jaxlm.interop.huggingface import load_pretrained, named_tensors
from jaxlm.testing.helpers import relative_error
from tests.oracles.xlnet import perm_mask, target_mapping

pytestmark = pytest.mark.live

BERT = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 16,
}  # fmt: skip
XLNET = {"vocab_size": 20, "d_model": 8, "n_layer": 1, "n_head": 2, "d_inner": 12}


def build(kind: str, directory: Path, **fields: Any) -> tuple[Any, Any, Any]:
    """A random model of transformers, and the same model loaded by jaxlm."""
    import torch
    import transformers

    torch.manual_seed(0)
    torch_model = getattr(transformers, kind)(getattr(transformers, kind).config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    torch_model.save_pretrained(directory)
    return torch_model, *load_pretrained(directory)


def test_decoding_ignores_clean_up_tokenization_spaces(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = "it isn 't so , is it ?"
    train_tokenizer([text], "word", 50).save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "clean_up_tokenization_spaces": True}))
    tokenizer, reference = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids, clean_up_tokenization_spaces=False)
    assert reference.decode(ids) == tokenizer.decode(ids).replace(" ,", ",").replace(" ?", "?")


def test_roberta_treats_pads_as_tokens_without_a_mask(tmp_path: Path) -> None:
    import torch

    torch_model, model, params = build("RobertaModel", tmp_path, **BERT, type_vocab_size=1)
    tokens = np.array([[0, 5, 6, 1, 1], [0, 7, 8, 9, 2]], np.int32)  # 1 is the padding id
    real = tokens != 1
    ids = torch.from_numpy(tokens).long()
    hidden, _ = model.apply(params, tokens)
    masked, _ = model.apply(params, tokens, segment_ids=real.astype(np.int32))
    with torch.no_grad():
        expected = torch_model(ids).last_hidden_state.numpy()
        expected_masked = torch_model(ids, attention_mask=torch.from_numpy(real)).last_hidden_state.numpy()
    assert relative_error(hidden[1], expected[1]) < 1e-5  # equal without padding
    assert relative_error(hidden[0], expected[0]) > 1e-2
    assert relative_error(masked[real], expected_masked[real]) < 1e-5


def test_the_pad_row_of_bert_has_a_gradient(tmp_path: Path) -> None:
    import torch

    torch_model, model, params = build("BertModel", tmp_path, **BERT)
    tokens = np.array([[3, 0, 4, 0, 5]], np.int32)  # the padding id 0 as a token
    weights = np.random.default_rng(0).standard_normal((1, 5, 8)).astype(np.float32)
    (torch_model(torch.from_numpy(tokens).long()).last_hidden_state * torch.from_numpy(weights)).sum().backward()
    expected = torch_model.embeddings.word_embeddings.weight.grad.numpy()
    gradient = jax.grad(lambda params: jnp.sum(model.apply(params, tokens)[0] * weights))(params)
    token_gradient = dict(named_tensors(model, gradient))["bert.embeddings.word_embeddings.weight"]
    assert relative_error(token_gradient[1:], expected[1:]) < 1e-5
    assert not expected[0].any()
    assert token_gradient[0].any()


def test_a_query_of_xlnet_without_visible_tokens_depends_on_no_token(tmp_path: Path) -> None:
    import torch

    torch_model, model, params = build("XLNetLMHeadModel", tmp_path, **XLNET)
    order = np.array([[2, 0, 3, 1]], np.int32)
    targets = np.array([[1, 3, 0]], np.int32)  # the first target is first in the order

    def run_both(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hidden, _ = model.apply(params, tokens, order=order, targets=targets)
        with torch.no_grad():
            expected = torch_model.transformer(
                torch.from_numpy(tokens).long(),
                perm_mask=torch.from_numpy(perm_mask(order, targets)),
                target_mapping=torch.from_numpy(target_mapping(targets, 4)),
            ).last_hidden_state
        return np.asarray(hidden), expected.numpy()

    hidden_1, expected_1 = run_both(np.array([[7, 8, 9, 10]], np.int32))
    hidden_2, expected_2 = run_both(np.array([[11, 12, 13, 14]], np.int32))
    assert relative_error(hidden_1[:, 1:], expected_1[:, 1:]) < 1e-5
    assert relative_error(hidden_2[:, 1:], expected_2[:, 1:]) < 1e-5
    assert relative_error(hidden_1[:, 0], hidden_2[:, 0]) < 1e-6  # depends on no token
    assert relative_error(expected_1[:, 0], expected_2[:, 0]) > 1e-2


def test_the_memory_of_xlnet_keeps_token_types(tmp_path: Path) -> None:
    import torch

    torch_model, model, params = build("XLNetLMHeadModel", tmp_path, **XLNET)
    tokens = np.random.default_rng(0).integers(3, 20, (1, 8)).astype(np.int32)
    order = np.array([[0, 1, 2, 3]], np.int32)
    ids = torch.from_numpy(tokens).long()

    def run_second_segment(memory_type: int) -> tuple[Any, np.ndarray]:
        """Outputs for the second four tokens (type 1) after four tokens of type ``memory_type``."""
        types = np.array([[memory_type] * 4, [1] * 4], np.int32)
        state = model.init_state(1, 4)
        memory = None
        for segment in (0, 1):
            positions = slice(4 * segment, 4 * segment + 4)
            inputs = {"order": order, "targets": order, "token_types": types[segment : segment + 1]}
            hidden, state = model.apply(params, tokens[:, positions], state=state, **inputs)
            with torch.no_grad():
                output = torch_model.transformer(
                    ids[:, positions],
                    mems=memory,
                    token_type_ids=torch.from_numpy(types[segment : segment + 1]).long(),
                    perm_mask=torch.from_numpy(perm_mask(order, order)),
                    target_mapping=torch.from_numpy(target_mapping(order, 4)),
                    use_mems=True,
                )
            memory = output.mems
        return hidden, output.last_hidden_state.numpy()

    assert relative_error(*run_second_segment(0)) < 1e-5
    assert relative_error(*run_second_segment(1)) > 1e-3
