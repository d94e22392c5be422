"""The names that many decoders in transformers share."""

from __future__ import annotations

from jaxlm.interop.formats.format import module_tensors, usual_fields

TASKS = ("causal", "none", "classification", "token_classification")
"""The tasks of the classes whose tensors of the base model have the same prefix."""
HEADS = {
    "head": "lm_head.weight",
    "classifier/weight": "score.weight",
    **module_tensors("", "", token_classifier="score", span="qa_outputs"),
}
"""``Format.unprefixed_tensors``."""
FIELDS = usual_fields(
    "vocab_size", "max_positions", "num_layers", "embed_dim", "mlp_dim", "rotary_base", "norm_epsilon", "init_stddev",
    "tie_embeddings",
)  # fmt: skip
"""``Format.hf_name_of_field``."""
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
"""Name of a matrix of attention in jaxlm -> its name in files."""
SWIGLU = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""Name of a SwiGLU matrix in jaxlm -> its name in files."""
