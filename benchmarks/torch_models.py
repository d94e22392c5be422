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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional


class LSTM(nn.Module):
    """The language model of Zaremba et al. 2014 without dropout: embedding, ``nn.LSTM``, and an untied head."""

    def __init__(self, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        if config["tie_embeddings"] or config["direction"] != "forward":
            raise ValueError("the torch LSTM needs tie_embeddings=False and direction='forward': choose such a model")
        V, D, H, layers = (config[name] for name in ("vocab_size", "embed_dim", "hidden_dim", "num_layers"))
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(H, V)
        self.layers = nn.LSTM(D, H, layers, batch_first=True)
        state = {"embedding.weight": arrays["token_embedding"]}
        state |= {"head.weight": arrays["head.weight"], "head.bias": arrays["head.bias"]}
        for layer in range(layers):
            weights = {name: arrays[f"layer_{layer}.{name}"] for name in ("weight_input", "weight_hidden", "bias")}
            for name, weight in (("ih", weights["weight_input"]), ("hh", weights["weight_hidden"])):
                state[f"layers.weight_{name}_l{layer}"] = weight.reshape(len(weight), -1).T
            state[f"layers.bias_ih_l{layer}"] = weights["bias"].ravel()
            state[f"layers.bias_hh_l{layer}"] = np.zeros(weights["bias"].size, np.float32)
        _load(self, state)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits [B, T, V] for tokens [B, T], and the state of ``nn.LSTM``. ``state=None`` is a state of zeros."""
        hidden, state = self.layers(self.embedding(tokens), state)
        return self.head(hidden), state


class VDCNN(nn.Module):
    """The VDCNN of Conneau et al. 2017 without shortcuts, from torch layers, for unpadded texts."""

    def __init__(self, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        super().__init__()
        if config["shortcut"] or config["downsample"] != "max_pool":
            raise ValueError("the torch VDCNN needs shortcut=False and downsample='max_pool': choose such a model")
        self.k_max, self.embedding = config["k_max"], nn.Embedding(config["vocab_size"], config["embed_dim"])
        state = {"embedding.weight": arrays["token_embedding"]}
        width = config["channels"]
        self.input = nn.Conv1d(config["embed_dim"], width, 3, padding=1)
        state |= {"input.weight": arrays["input.weight"].transpose(2, 1, 0), "input.bias": arrays["input.bias"]}
        stages: list[nn.Module] = []
        for group, blocks in enumerate(config["blocks"]):
            if group:
                stages.append(nn.MaxPool1d(3, stride=2, padding=1))
            for _ in range(blocks):
                layer = sum(isinstance(stage, nn.Sequential) for stage in stages)
                out_width = config["channels"] * 2**group
                modules: list[nn.Module] = []
                for number in (1, 2):
                    name, prefix = f"layer_{layer}", f"stages.{len(stages)}"
                    convolution = nn.Conv1d(width, out_width, 3, padding=1, bias=False)
                    norm = nn.BatchNorm1d(out_width, config["norm_epsilon"], config["norm_momentum"])
                    weight = arrays[f"{name}.convolution_{number}.weight"]
                    state[f"{prefix}.{len(modules)}.weight"] = weight.transpose(2, 1, 0)
                    norm_prefix = f"{prefix}.{len(modules) + 1}"
                    state[f"{norm_prefix}.weight"] = arrays[f"{name}.norm_{number}.scale"]
                    state[f"{norm_prefix}.bias"] = arrays[f"{name}.norm_{number}.bias"]
                    for ours, theirs in (("mean", "running_mean"), ("variance", "running_var")):
                        state[f"{norm_prefix}.{theirs}"] = arrays[f"statistics.{name}.norm_{number}.{ours}"]
                    state[f"{norm_prefix}.num_batches_tracked"] = np.zeros((), np.int64)
                    modules += [convolution, norm, nn.ReLU(inplace=True)]
                    width = out_width
                stages.append(nn.Sequential(*modules))
        self.stages = nn.ModuleList(stages)
        F = config["fc_dim"]
        self.fc_1, self.fc_2 = nn.Linear(width * self.k_max, F), nn.Linear(F, F)
        self.classifier = nn.Linear(F, config["num_labels"])
        for name in ("fc_1", "fc_2", "classifier"):
            state |= {f"{name}.weight": arrays[f"{name}.weight"].T, f"{name}.bias": arrays[f"{name}.bias"]}
        _load(self, state)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, labels] for tokens [B, T]."""
        x = self.input(self.embedding(tokens).mT)
        for stage in self.stages:
            x = stage(x)
        # Many entries are equal, because a ReLU makes them 0. jaxlm selects the earliest of equal entries, and topk may
        # select any of them. So make earlier zeros slightly larger.
        decreasing = x.detach() - 1e-12 * torch.arange(x.shape[-1], device=x.device)
        positions = decreasing.topk(self.k_max, dim=-1).indices.sort(dim=-1).values
        x = x.gather(-1, positions).mT.flatten(1)
        return self.classifier(functional.relu(self.fc_2(functional.relu(self.fc_1(x)))))


def _load(module: nn.Module, state: dict[str, np.ndarray]) -> None:
    """Load arrays into a module. Their names must be the names of its ``state_dict``."""
    module.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in state.items()})


@functools.cache
def transformer_xl_module() -> Any:
    """The module of the deprecated Transformer-XL in transformers, with a corrected cast of the positions.

    The original cast, ``type_as(dtype=...)``, raises a ``TypeError``.
    """
    import transformers.models.deprecated.transfo_xl.modeling_transfo_xl as module

    return _corrected(module, r"\.type_as\(\s*dtype=word_emb\.dtype\s*\)", ".to(word_emb.dtype)")


def xlstm_module() -> Any:
    """The module of xLSTM in transformers, with a corrected reshape in the chunked mLSTM.

    In transformers 4.57, texts of at least ``chunk_size`` tokens raise a ``TypeError``.
    """
    import transformers.models.xlstm.modeling_xlstm as module

    return _corrected(module, r"vecM_k_combine\(batch_size", "vecM_k_combine.reshape(batch_size")


def _corrected(module: Any, pattern: str, replacement: str) -> Any:
    """The module, after running its source again with all matches of a pattern replaced."""
    source = re.sub(pattern, replacement, inspect.getsource(module))
    exec(compile(source, module.__file__, "exec", dont_inherit=True), vars(module))
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
    arrays = load_file(Path(directory) / "model.safetensors")
    return {"lstm": LSTM, "resnet": VDCNN}[family](config, arrays)


def forget_states(model: nn.Module) -> None:
    """Remove the recurrent states that RecurrentGemma's layers in transformers keep after a call, even without a cache.

    The next call would otherwise start from these states.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "recurrent_states"):
            module.recurrent_states = None
