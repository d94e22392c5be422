"""torch models with the weights of a jaxlm checkpoint, for families that transformers does not have.

This module also corrects the classes of Transformer-XL and xLSTM in transformers (:func:`transformer_xl_module`,
:func:`xlstm_module`). The module imports torch. In the benchmarks, only the processes that run torch import
it. Shapes: B batch, T time, V vocabulary, D width of embeddings, H hidden width of an LSTM, F width of the fully
connected layers.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional


class LSTM(nn.Module):
    """The language model of Zaremba et al. 2014 without dropout: embedding, ``nn.LSTM``, and an untied head."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__()
        if config["tie_embeddings"] or config["direction"] != "forward":
            raise ValueError("the torch LSTM needs tie_embeddings=False and direction='forward': choose such a model")
        V, D, H, layers = (config[name] for name in ("vocab_size", "embed_dim", "hidden_dim", "num_layers"))
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(H, V)
        self.layers = nn.LSTM(D, H, layers, batch_first=True)
        state = {"embedding.weight": tensors["token_embedding"]}
        state |= {f"head.{name}": tensors[f"head.{name}"] for name in ("weight", "bias")}
        for layer in range(layers):
            weights = {name: tensors[f"layer_{layer}.{name}"] for name in ("weight_input", "weight_hidden", "bias")}
            state |= {f"layers.{name}_l{layer}": x for name, x in recurrent_state(weights).items()}
        self.load_state_dict(state)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits [B, T, V] for tokens [B, T], and the state of ``nn.LSTM``. ``state=None`` is a state of zeros."""
        hidden, state = self.layers(self.embedding(tokens), state)
        return self.head(hidden), state


def recurrent_state(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a layer of ``nn.LSTM`` or ``nn.GRU``, from those of jaxlm. The gate order is the same."""
    bias = weights["bias"].flatten()
    hidden_bias = torch.zeros_like(bias)
    if "bias_hidden" in weights:  # of a GRU: the bias of its candidate
        hidden_bias = torch.cat([hidden_bias[: -len(weights["bias_hidden"])], weights["bias_hidden"]])
    return {
        "weight_ih": weights["weight_input"].flatten(1).T,
        "weight_hh": weights["weight_hidden"].flatten(1).T,
        "bias_ih": bias,
        "bias_hh": hidden_bias,
    }


class VDCNN(nn.Module):
    """The VDCNN of Conneau et al. 2017 from torch layers, for unpadded texts."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config["vocab_size"], config["embed_dim"])
        self.body, self.head = _Body(config), _Head(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, labels] for tokens [B, T]."""
        return self.head(self.body(self.embedding(tokens).mT))


class _Body(nn.Module):
    """All blocks of a VDCNN: token vectors [B, D, T] to features [B, C, S]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["channels"]
        self.input = nn.Conv1d(config["embed_dim"], width, 3, padding=1)
        for group, blocks in enumerate(config["blocks"]):
            for block in range(blocks):
                out_width = config["channels"] * 2**group
                layer = sum(config["blocks"][:group]) + block
                self.add_module(f"layer_{layer}", _Block(config, width, out_width, halve=group > 0 and block == 0))
                width = out_width

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


class _Block(nn.Module):
    """Two convolutions, and a shortcut if the config has shortcuts."""

    def __init__(self, config: dict[str, Any], width: int, out_width: int, *, halve: bool) -> None:
        super().__init__()
        self.downsample, self.has_shortcut = config["downsample"] if halve else None, config["shortcut"]
        stride = 2 if self.downsample == "convolution" else 1

        def norm() -> nn.BatchNorm1d:
            return nn.BatchNorm1d(out_width, config["norm_epsilon"], config["norm_momentum"])

        self.convolution_1 = nn.Conv1d(width, out_width, 3, stride, padding=1, bias=False)
        self.norm_1, self.norm_2 = norm(), norm()
        self.convolution_2 = nn.Conv1d(out_width, out_width, 3, padding=1, bias=False)
        if self.has_shortcut:
            self.shortcut = nn.Identity() if width == out_width else nn.Conv1d(width, out_width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.downsample == "max_pool":
            x = functional.max_pool1d(x, 3, stride=2, padding=1)
        elif self.downsample == "k_max_pool":
            x = k_max(x, x.shape[-1] // 2)
        y = functional.relu(self.norm_1(self.convolution_1(x)), inplace=True)
        y = self.norm_2(self.convolution_2(y))
        return functional.relu(y + self.shortcut(x) if self.has_shortcut else y, inplace=True)


class _Head(nn.Module):
    """The classifier of a VDCNN: features [B, C, S] to logits [B, labels]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.k_max, F = config["k_max"], config["fc_dim"]
        width = config["channels"] * 2 ** (len(config["blocks"]) - 1)
        self.fc_1, self.fc_2 = nn.Linear(width * self.k_max, F), nn.Linear(F, F)
        self.classifier = nn.Linear(F, config["num_labels"])

    def forward(self, x: Tensor) -> Tensor:
        x = k_max(x, self.k_max).mT.flatten(1)
        return self.classifier(functional.relu(self.fc_2(functional.relu(self.fc_1(x)))))


def k_max(x: Tensor, k: int) -> Tensor:
    """The k largest values along the last axis, in their original order. The earliest of several zeros are selected."""
    # Many entries are equal, because a ReLU makes them 0. jaxlm selects the earliest of equal entries, and topk may
    # select any of them. So make earlier zeros slightly larger.
    decreasing = x.detach() - 1e-12 * torch.arange(x.shape[-1], device=x.device)
    positions = decreasing.topk(k, dim=-1).indices.sort(dim=-1).values
    return x.gather(-1, positions)


def vdcnn_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters and running statistics of :class:`VDCNN`, from the tensors of jaxlm."""
    state = {"embedding.weight": tensors["token_embedding"]}
    buffers = {"mean": "running_mean", "variance": "running_var"}
    for path, x in tensors.items():
        module, _, name = path.rpartition(".")
        if module.startswith("statistics."):
            norm = f"body.{module.removeprefix('statistics.')}"
            state[f"{norm}.{buffers[name]}"] = x
            state[f"{norm}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
        elif module.startswith(("input", "layer_")):
            state[f"body.{module}.{'weight' if name == 'scale' else name}"] = x.permute(2, 1, 0) if x.ndim == 3 else x
        elif module:
            state[f"head.{path}"] = x.T if x.ndim == 2 else x
    return state


@functools.cache
def transformer_xl_module() -> Any:
    """The module of the deprecated Transformer-XL in transformers, with a corrected cast of the positions.

    The original cast, ``type_as(dtype=...)``, raises a ``TypeError``.
    """
    import transformers.models.deprecated.transfo_xl.modeling_transfo_xl as module

    return _corrected(module, {r"\.type_as\(\s*dtype=word_emb\.dtype\s*\)": ".to(word_emb.dtype)"})


@functools.cache
def xlstm_module() -> Any:
    """The module of xLSTM in transformers. It uses the mLSTM of transformers, and two of its shapes are corrected.

    If the package ``xlstm`` is installed, the original module imports the mLSTM of that package. In transformers 4.57,
    texts of at least ``chunk_size`` tokens raise a ``TypeError``, and one shape has the width of all chunks instead of
    one chunk.
    """
    import transformers.models.xlstm.modeling_xlstm as module

    return _corrected(
        module,
        {
            r"if is_xlstm_available\(\)": "if False",
            r"vecM_k_combine\(batch_size": "vecM_k_combine.reshape(batch_size",
            r"(mat[QK]\.view\(batch_size, nh, nc, chunk_size, dqk)\)": r"\1 // nc)",
        },
    )


def _corrected(original: Any, replacements: dict[str, str]) -> Any:
    """A second module that runs the source of a module, with all matches of some patterns replaced."""
    source = inspect.getsource(original)
    for pattern, replacement in replacements.items():
        source, count = re.subn(pattern, replacement, source)
        if not count:
            raise ValueError(f"the source of {original.__name__} has no match of {pattern!r}: use transformers 4.57")
    module = types.ModuleType(original.__name__)
    module.__dict__.update(__file__=original.__file__, __package__=original.__package__, __spec__=original.__spec__)
    exec(compile(source, original.__file__, "exec", dont_inherit=True), vars(module))
    return module


class TransformerXL(nn.Module):
    """The deprecated Transformer-XL class of transformers, without memory.

    Its adaptive softmax computes the logits of a tail cluster of the vocabulary only for the labels in this cluster.
    """

    def __init__(self, directory: str) -> None:
        super().__init__()
        module = transformer_xl_module()
        config = module.TransfoXLConfig.from_pretrained(directory)
        config.trainer_compatible = True  # avoids a warning
        self.model = module.TransfoXLLMHeadModel.from_pretrained(directory, config=config)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The mean loss in nats over all labels, for tokens and labels [B, T]."""
        config = self.model.config
        memory = [torch.zeros(0, len(tokens), config.d_model, device=tokens.device) for _ in range(config.n_layer)]
        hidden = self.model.transformer(tokens, mems=memory).last_hidden_state
        # `crit` drops the last hidden state and the first label. Our labels are already the next tokens, so add one
        # hidden state at the end and one label at the start, which `crit` drops.
        hidden, labels = torch.cat([hidden, hidden[:, :1]], 1), torch.cat([labels[:, :1], labels], 1)
        return self.model.crit(hidden, labels).mean()


def read(directory: str, family: str) -> nn.Module:
    """The torch model with the weights in a directory that ``jaxlm.save_pretrained`` wrote.

    Args:
        family: the jaxlm family of the directory: transformer_xl, lstm or resnet (VDCNN).
    """
    if family == "transformer_xl":
        return TransformerXL(directory)
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))["config"]
    tensors = load_file(Path(directory) / "model.safetensors")
    if family == "lstm":
        return LSTM(config, tensors)
    model = VDCNN(config)
    model.load_state_dict(vdcnn_state(tensors))
    return model


def forget_states(model: nn.Module) -> None:
    """Remove the recurrent states that RecurrentGemma's layers in transformers keep after a call, even without a cache.

    The next call would otherwise start from these states.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "recurrent_states"):
            module.recurrent_states = None
