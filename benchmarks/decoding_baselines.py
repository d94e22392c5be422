"""jaxlm and its baselines for ``benchmarks.decoding``: greedy generation with one checkpoint and random prompts."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks import complete_models
from benchmarks.baselines import JaxImplementation, TorchImplementation, jax_exact, torch_device
from benchmarks.shapes import random_tokens
from benchmarks.training_baselines import flax_model, torch_model


class Jaxlm(JaxImplementation):
    """``jaxlm.decoding.generate``, which compiles one function for the prompt and the new tokens.

    For an encoder-decoder, the prompt is the source, and another compiled function reads it.
    """

    def __init__(self, directory: str, family: str, batch: int, prompt: int, tokens: int) -> None:
        jax = jax_exact()
        import jaxlm

        self.model, self.params = jaxlm.load_pretrained(directory)
        self.prompts, self.tokens = random_tokens(self.model.config.vocab_size, batch, prompt), tokens
        self.source: np.ndarray | None = None
        limit, needed = self.model.max_positions, prompt + tokens - 1
        if limit is not None and needed > limit:
            raise ValueError(
                f"--prompt {prompt} and --tokens {tokens} need {needed} positions, but the model has "
                f"max_positions={limit}: reduce one of them"
            )
        if self.model.reads_source:
            self.source = self.prompts
            self.prompts = np.full((batch, 1), self.model.config.decoder_start_id, np.int32)
            self.init_state = jax.jit(lambda params, source: self.model.init_decode_state(params, source, tokens + 1))

    def run(self) -> list[list[int]]:
        from jaxlm.decoding import generate

        state = None if self.source is None else self.init_state(self.params, self.source)
        generated = generate(self.model, self.params, self.prompts, max_new_tokens=self.tokens, state=state)
        return jax_exact().device_get(generated.tokens).tolist()


class Flax(JaxImplementation):
    """``generate`` of the Flax class of transformers, in one compiled function."""

    packages = ("transformers",)

    def __init__(self, directory: str, family: str, batch: int, prompt: int, tokens: int) -> None:
        jax = jax_exact()

        model = flax_model(directory)
        self.params = jax.device_put(model.params)
        self.prompts, self.tokens = random_tokens(model.config.vocab_size, batch, prompt), tokens
        # As in the other implementations, there is no end token. ``generate`` of the Flax classes does not accept None,
        # so the id of the end token is one that the model cannot generate.
        options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        options["eos_token_id"] = model.config.vocab_size
        self.generate = jax.jit(lambda params, prompts: model.generate(prompts, params=params, **options).sequences)

    def run(self) -> list[list[int]]:
        sequences = self.generate(self.params, self.prompts)
        return jax_exact().device_get(sequences)[:, -self.tokens :].tolist()


class Torch(TorchImplementation):
    """``generate`` of transformers with its key-value cache; for LSTM and XLNet, a loop over the new tokens.

    For XLNet, ``generate`` of transformers lets each token attend to all other tokens, so it cannot use a cache. In
    jaxlm, a token attends only to itself and to earlier tokens. The loop calls the class of transformers with masks
    that do the same. For each new token, the class reads the complete text again.
    """

    def __init__(self, directory: str, family: str, batch: int, prompt: int, tokens: int) -> None:
        import torch

        device = torch_device()
        self.model, self.family, self.num_tokens = torch_model(directory, family).eval().to(device), family, tokens
        vocab_size = self.model.embedding.num_embeddings if family == "lstm" else self.model.config.vocab_size
        self.prompts = torch.from_numpy(random_tokens(vocab_size, batch, prompt)).long().to(device)
        self.options: dict[str, Any] = {
            "max_new_tokens": tokens,
            "do_sample": False,
            "use_cache": True,
            "pad_token_id": 0,
        }
        self.options["attention_mask"] = torch.ones_like(self.prompts)
        if family not in ("lstm", "xlnet"):
            self.model.generation_config.eos_token_id = None  # no end token, as in the other implementations

    def run(self) -> list[list[int]]:
        import torch

        with torch.inference_mode():
            generate = {"lstm": self._generate_lstm, "xlnet": self._generate_xlnet}.get(self.family, self._generate)
            tokens = generate()
        return tokens[:, -self.num_tokens :].tolist()

    def _generate(self) -> Any:
        return self.model.generate(self.prompts, **self.options)

    def _generate_lstm(self) -> Any:
        import torch

        logits, state = self.model(self.prompts)
        tokens = [logits[:, -1].argmax(-1)]
        while len(tokens) < self.num_tokens:
            logits, state = self.model(tokens[-1][:, None], state)
            tokens.append(logits[:, -1].argmax(-1))
        return torch.stack(tokens, dim=1)

    def _generate_xlnet(self) -> Any:
        import torch

        text = self.prompts
        for _ in range(self.num_tokens):
            B, T = text.shape
            # Append one position for the next token. This position attends to all earlier ones, but not to itself. The
            # other positions attend to themselves and to all earlier positions.
            order, target = np.tile(np.arange(T + 1), (B, 1)), np.full((B, 1), T)
            masks = complete_models.perm_mask(order, target), complete_models.target_mapping(target, T + 1)
            perm_mask, target_mapping = (torch.from_numpy(mask).to(text.device) for mask in masks)
            padded = torch.nn.functional.pad(text, (0, 1))
            logits = self.model(padded, perm_mask=perm_mask, target_mapping=target_mapping, use_mems=False).logits
            text = torch.cat([text, logits[:, 0].argmax(-1)[:, None]], dim=1)
        return text
