"""Convert RoBERTa checkpoints of fairseq, given as arrays, to jaxlm. This module does not need fairseq or torch.

A fairseq checkpoint is a pickle file. Loading a pickle can run any code, so jaxlm does not open pickle files. If you
trust the file, load its arrays with torch, which must be installed:

    >>> checkpoint = torch.load("roberta.base/model.pt", weights_only=False)                     # doctest: +SKIP
    >>> weights = {name: x.float().numpy() for name, x in checkpoint["model"].items()}           # doctest: +SKIP
    >>> model, params = roberta_from_fairseq(weights, num_heads=12)                              # doctest: +SKIP
    >>> save_pretrained("roberta-base", model, params)                                           # doctest: +SKIP

The token ids are the ids of fairseq's dictionary: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, then the lines of
``dict.txt``, then ``<mask>``. Checkpoints of XLM-RoBERTa (base and large) have the same format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm import spec
from jaxlm.interop.huggingface import params_from_tensors
from jaxlm.models.model import Metadata, Model, get_model
from jaxlm.models.roberta import FIRST_POSITION

_ENCODER = "encoder.sentence_encoder."
_LAYER = rf"{re.escape(_ENCODER)}layers\.(\d+)\."
_RENAMED = (
    # Names in old checkpoints -> new names. fairseq also renames these tensors when it loads an old checkpoint.
    (r"^decoder\.", "encoder."),
    (r"\.emb_layer_norm\.", ".layernorm_embedding."),
    # New names of fairseq -> names in Hugging Face files.
    (rf"^{re.escape(_ENCODER)}embed_tokens\.", "roberta.embeddings.word_embeddings."),
    (rf"^{re.escape(_ENCODER)}embed_positions\.weight", "roberta.embeddings.position_embeddings.weight"),
    (rf"^{re.escape(_ENCODER)}layernorm_embedding\.", "roberta.embeddings.LayerNorm."),
    (rf"^{_LAYER}self_attn\.q_proj\.", r"roberta.encoder.layer.\1.attention.self.query."),
    (rf"^{_LAYER}self_attn\.k_proj\.", r"roberta.encoder.layer.\1.attention.self.key."),
    (rf"^{_LAYER}self_attn\.v_proj\.", r"roberta.encoder.layer.\1.attention.self.value."),
    (rf"^{_LAYER}self_attn\.out_proj\.", r"roberta.encoder.layer.\1.attention.output.dense."),
    (rf"^{_LAYER}self_attn_layer_norm\.", r"roberta.encoder.layer.\1.attention.output.LayerNorm."),
    (rf"^{_LAYER}fc1\.", r"roberta.encoder.layer.\1.intermediate.dense."),
    (rf"^{_LAYER}fc2\.", r"roberta.encoder.layer.\1.output.dense."),
    (rf"^{_LAYER}final_layer_norm\.", r"roberta.encoder.layer.\1.output.LayerNorm."),
    (r"^encoder\.lm_head\.", "lm_head."),
)
_IGNORED = re.compile(r"(version|_float_tensor)$")  # buffers that are not parameters
_TOKEN_TYPES = "roberta.embeddings.token_type_embeddings.weight"


def roberta_from_fairseq(
    weights: Mapping[str, Any], *, num_heads: int, head: str | None = None, **overrides: Any
) -> tuple[Model, spec.Tree]:
    """The model and the parameters of a fairseq RoBERTa checkpoint.

    fairseq's RoBERTa has no token types. So the model has one token type, and its embedding is zero.
    ``model.metadata.unused_tensors`` lists the tensors of heads that the model does not have.

    Args:
        weights: the arrays of the checkpoint, by fairseq's names.
        num_heads: number of attention heads, ``encoder_attention_heads`` in the arguments of the checkpoint. The shapes
            of the arrays do not determine it.
        head: name of a classification head, such as "mnli". The task of the model is then "classification". None: the
            task is "masked".
        overrides: fields of the family's ``Config``, such as ``dtype="bfloat16"``.

    Raises:
        ValueError: a tensor is missing, unknown or has the wrong shape; two tensors have the same name after renaming;
            the output matrix is not tied to the token embedding; the checkpoint does not have the head; or an override
            is invalid.
    """
    tensors = _hugging_face_tensors(weights)
    heads = {name.split(".")[1] for name in tensors if name.startswith("classification_heads.")}
    if head is not None and head not in heads:
        raise ValueError(f"no classification head {head!r} in the weights: they have {sorted(heads) or 'none'}")
    for name in ("roberta.embeddings.word_embeddings.weight", "roberta.embeddings.position_embeddings.weight"):
        if name not in tensors:
            table = "embed_tokens" if "word" in name else "embed_positions"
            raise ValueError(f"no {table}.weight in the weights: they have {', '.join(list(weights)[:5])}, ...")
    vocab_size, width = tensors["roberta.embeddings.word_embeddings.weight"].shape
    output = tensors.pop("lm_head.weight", None)
    if output is not None and not np.array_equal(output, tensors["roberta.embeddings.word_embeddings.weight"]):
        raise ValueError("lm_head.weight differs from the token embedding: untied weights are not supported")
    head_prefix = f"classification_heads.{head}."
    unused = [name for name in tensors if name.startswith("classification_heads.") and not name.startswith(head_prefix)]
    if head is not None:
        unused += [name for name in tensors if name.startswith("lm_head.")]
    tensors = {name.replace(head_prefix, "classifier."): x for name, x in tensors.items() if name not in unused}
    layers = {int(found[1]) for name in tensors if (found := re.match(r"roberta\.encoder\.layer\.(\d+)\.", name))}
    mlp_bias = tensors.get("roberta.encoder.layer.0.intermediate.dense.bias")
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_positions": len(tensors["roberta.embeddings.position_embeddings.weight"]) - FIRST_POSITION,
        "num_layers": max(layers, default=0) + 1,
        "num_heads": num_heads,
        "embed_dim": width,
        "mlp_dim": None if mlp_bias is None else mlp_bias.size,
        "task": "masked" if head is None else "classification",
    }
    if head is not None:
        if "classifier.out_proj.weight" not in tensors:
            raise ValueError(f"{head_prefix}out_proj.weight is missing")
        fields["num_labels"] = len(tensors["classifier.out_proj.weight"])
    model = get_model("roberta", **{**fields, **overrides})
    tensors[_TOKEN_TYPES] = np.zeros((1, width), tensors["roberta.embeddings.word_embeddings.weight"].dtype)
    metadata = Metadata(token_ids={"bos": 0, "pad": 1, "eos": 2}, unused_tensors=tuple(unused))
    return Model(model.family, model.config, metadata), params_from_tensors(model, tensors)


def _hugging_face_tensors(weights: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays by their names in Hugging Face files. Arrays of classification heads keep their fairseq names.

    The fused query, key and value matrices of old checkpoints are split. Buffers that are not parameters are left out.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, array in weights.items():
        if _IGNORED.search(name):
            continue
        fused = re.search(r"self_attn\.in_proj_(weight|bias)$", name)  # in checkpoints before fairseq 0.9
        if fused is None:
            arrays = {name: np.asarray(array)}
        else:
            thirds = np.split(np.asarray(array), 3)
            arrays = {
                f"{name[: fused.start()]}self_attn.{x}_proj.{fused[1]}": third
                for x, third in zip("qkv", thirds, strict=True)
            }
        for new_name, value in arrays.items():
            for pattern, replacement in _RENAMED:
                new_name = re.sub(pattern, replacement, new_name)
            if new_name in tensors:
                raise ValueError(f"two of the weights have the name {new_name} after renaming: remove one of them")
            tensors[new_name] = value
    return tensors
