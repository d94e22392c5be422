"""Attention weights against ``output_attentions`` of transformers: run with ``-m live`` and the ``reference`` extra."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm

pytestmark = pytest.mark.live


def test_bert_attention_weights_equal_transformers(tmp_path):
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=32,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    reference = BertModel(config).eval()
    reference.save_pretrained(tmp_path)
    tokens = torch.randint(1, 40, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = reference(tokens, attention_mask=mask, output_attentions=True).attentions
    model, params = jaxlm.load_pretrained(tmp_path)
    weights = model.attention_weights(params, jnp.asarray(tokens.numpy()), segment_ids=jnp.asarray(mask.numpy()))
    assert len(weights["self"]) == 3
    for ours, theirs in zip(weights["self"], expected, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0].numpy(), atol=1e-6)
        np.testing.assert_allclose(ours[1, :, :6], theirs[1, :, :6].numpy(), atol=1e-6)


def test_t5_attention_weights_equal_transformers(tmp_path):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    config = T5Config(
        vocab_size=40, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    reference = T5ForConditionalGeneration(config).eval()
    reference.save_pretrained(tmp_path)
    source, decoder_tokens = torch.randint(1, 40, (2, 9)), torch.randint(1, 40, (2, 6))
    with torch.no_grad():
        output = reference(input_ids=source, decoder_input_ids=decoder_tokens, output_attentions=True)
    model, params = jaxlm.load_pretrained(tmp_path)
    weights = model.attention_weights(params, jnp.asarray(decoder_tokens.numpy()), source=jnp.asarray(source.numpy()))
    for kind in ("encoder", "decoder", "cross"):
        expected = output[f"{kind}_attentions"]
        assert len(weights[kind]) == len(expected)
        for ours, theirs in zip(weights[kind], expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-6)
