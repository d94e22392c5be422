"""Format of :mod:`jaxlm.models.rwkv7`: the tensors of the authors' ``.pth`` files, with their names and shapes.

transformers has no class for RWKV-7, and the authors' files have no config. So jaxlm defines the ``model_type``, the
architectures and the names of the config fields.
"""

from __future__ import annotations

from jaxlm.interop.formats.format import Format, Layout, module_tensors, usual_fields

_ATT, _FFN = "blocks.{layer}.att.", "blocks.{layer}.ffn."
_LETTERS = {"receptance": "r", "decay": "w", "key": "k", "value": "v", "rate": "a", "gate": "g"}
_LOW_RANK = {"decay": "w", "rate": "a", "value_residual": "v", "gate": "g"}
_PER_CHANNEL = {"removal": "k_k", "replacement": "k_a", "bonus": "r_k"}

_VECTOR: Layout = ((), (), (0,))  # [D] is [1, 1, D] in files
_HEADS: Layout = ((), (), (0, 1))  # [H, K] is [1, 1, H * K] in files

FORMATS = (
    Format(
        architectures={"RWKV_x070": {"task": "causal"}, "RWKV_x070Model": {"task": "none"}},
        model_type="rwkv7",
        prefix="",
        hf_name_of_field={
            **usual_fields("vocab_size", "num_layers", "embed_dim", "mlp_dim", "head_dim"),
            "decay_rank": "decay_low_rank_dim",
            "rate_rank": "a_low_rank_dim",
            "value_rank": "v_low_rank_dim",
            "gate_rank": "gate_low_rank_dim",
            "norm_epsilon": "norm_eps",
            "group_norm_epsilon": "group_norm_eps",
        },
        token_ids={"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
        tensors={
            "token_embedding": "emb.weight",
            **module_tensors("", "", embedding_norm="blocks.0.ln0", final_norm="ln_out"),
            **module_tensors("layers/", "blocks.{layer}.", time_mix_norm="ln1", channel_mix_norm="ln2"),
            **{f"layers/time_mix/shift/{name}": f"{_ATT}x_{letter}" for name, letter in _LETTERS.items()},
            **{
                f"layers/time_mix/{name}/{part}": f"{_ATT}{letter}{number}"
                for name, letter in _LOW_RANK.items()
                for number, part in enumerate(("up/bias", "down/weight", "up/weight"))
            },
            **{f"layers/time_mix/{name}": f"{_ATT}{tensor}" for name, tensor in _PER_CHANNEL.items()},
            **module_tensors("layers/time_mix/", _ATT, receptance="receptance", key="key", value="value"),
            **module_tensors("layers/time_mix/", _ATT, output="output", norm="ln_x"),
            **module_tensors("layers/channel_mix/", _FFN, key="key", value="value"),
            "layers/channel_mix/shift/key": f"{_FFN}x_k",
            "head": "head.weight",
        },
        layouts={
            **{f"layers/time_mix/shift/{name}": _VECTOR for name in _LETTERS},
            **{f"layers/time_mix/{name}/up/bias": _HEADS for name in _LOW_RANK},
            **{f"layers/time_mix/{name}/down/weight": ((0,), (1,)) for name in _LOW_RANK},
            **{f"layers/time_mix/{name}/up/weight": ((0,), (1, 2)) for name in _LOW_RANK},
            **{f"layers/time_mix/{name}": _HEADS for name in ("removal", "replacement")},
            "layers/time_mix/norm/scale": ((0, 1),),
            "layers/channel_mix/shift/key": _VECTOR,
        },
        # Some files of the authors have value-residual weights in the first block. These weights are not used.
        ignored=(r"blocks\.0\.att\.v[012]",),
    ),
)
