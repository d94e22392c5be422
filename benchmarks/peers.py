"""The peers: jaxlm and what it is measured against, each set up as its own documentation would have it, in float32.

Every class is one side of one comparison (see ``worker.Peer``) and imports only its own framework. All read the
checkpoint that :class:`Machine` writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks import shapes
from benchmarks.shapes import ADAMW, COPY_BYTES, GEMM_SIZE, random_tokens
from benchmarks.worker import Peer

# A GPU is shared by all peers: JAX must not take most of its memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def _jax() -> Any:
    """JAX whose float32 is float32: accelerators round the inputs of products otherwise; torch does not."""
    import jax

    if jax.default_backend() != "cpu":
        jax.config.update("jax_default_matmul_precision", "float32")
    return jax


def _jax_facts() -> dict[str, Any]:
    return {"platform": _jax().default_backend()}


class Machine(Peer):
    """Writes the checkpoint, if a model is named, and measures the roofs: a matrix product and a copy, both by JAX."""

    repeats = 8

    def __init__(self, directory: str, model: str | None) -> None:
        jax = _jax()
        import jax.numpy as jnp

        self.known = {"device": jax.devices()[0].device_kind}
        if model is not None:
            self.known |= self._write(directory, model)
        self.x = jax.random.normal(jax.random.key(2), (GEMM_SIZE, GEMM_SIZE))
        self.product = jax.jit(jnp.matmul)
        self.memory = jnp.zeros(COPY_BYTES // 4, jnp.float32)
        self.add = jax.jit(lambda memory: memory + 1.0, donate_argnums=0)
        self.run()

    def _write(self, directory: str, model: str) -> dict[str, Any]:
        jax = _jax()
        import jaxlm

        no_dropout = dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), 0.0)
        gpt = jaxlm.get_model(model, **no_dropout)

        def lively(leaf: Any, key: Any) -> Any:
            # Biases other than 0, scales other than 1, and greedy tokens that do not just repeat the prompt's last.
            return leaf + 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

        leaves, tree = jax.tree.flatten(jax.jit(gpt.init)(jax.random.key(0)))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        params = jax.tree.unflatten(tree, map(lively, leaves, keys))
        jaxlm.save_pretrained(directory, gpt, params)
        config = gpt.config
        return {
            "parameters": gpt.num_parameters,
            "position_parameters": config.max_positions * config.embed_dim,
            "parameter_bytes": sum(leaf.nbytes for leaf in leaves),
            "layers": config.num_layers,
            "width": config.embed_dim,
            "vocab_size": config.vocab_size,
        }

    def run(self) -> dict[str, float]:
        return {
            "FLOP": 2 * GEMM_SIZE**3 / self._fastest(lambda: self.product(self.x, self.x)),
            "B": 2 * COPY_BYTES / self._fastest(self._copy),
        }

    def _copy(self) -> Any:
        self.memory = self.add(self.memory)
        return self.memory

    def _fastest(self, work: Callable[[], Any]) -> float:
        """Seconds of the best repetition: a roof is what can be reached, and the first one wakes threads up."""
        seconds = []
        for _ in range(self.repeats):
            begun = time.perf_counter()
            _jax().block_until_ready(work())
            seconds.append(time.perf_counter() - begun)
        return min(seconds)

    def facts(self) -> dict[str, Any]:
        return self.known


# ------------------------------------------------------------------------------------------------- training


class JaxTraining(Peer):
    """A jitted step ``(state, batch) -> (state, metrics)``, compiled in the first repetition."""

    step: Any
    state: Any
    batch: Any
    compiled: Any = None

    def run(self) -> float:
        if self.compiled is None:
            self.compiled = self.step.lower(self.state, self.batch).compile()
        self.state, metrics = _jax().block_until_ready(self.compiled(self.state, self.batch))
        return float(metrics["loss"])

    def facts(self) -> dict[str, Any]:
        memory = None if self.compiled is None else self.compiled.memory_analysis()
        if memory is None:
            return _jax_facts()
        arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return {**_jax_facts(), "step_bytes": arrays + memory.temp_size_in_bytes}


class JaxlmTraining(JaxTraining):
    """``jaxlm.training.step.jit_step``."""

    def __init__(self, directory: str, batch: int, length: int) -> None:
        jax = _jax()
        import jaxlm
        from jaxlm.objectives import causal
        from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
        from jaxlm.training.step import fresh_state, jit_step

        model, params = jaxlm.load_pretrained(directory)
        settings = OptimizerConfig(schedule="constant", warmup_steps=0, **ADAMW)
        optimizer = make_optimizer(settings, model.specs, steps=1_000_000)
        self.state = fresh_state(params, optimizer, jax.random.key(0))
        tokens = random_tokens(model.config.vocab_size, batch, length + 1)
        self.batch = jax.device_put(causal.batch(tokens))
        self.step = jit_step(model, optimizer, causal.loss)


class FlaxTraining(JaxTraining):
    """``FlaxGPT2LMHeadModel`` of transformers, in a jitted step with a donated state."""

    def __init__(self, directory: str, batch: int, length: int) -> None:
        jax = _jax()
        import optax
        from transformers import FlaxGPT2LMHeadModel

        model = FlaxGPT2LMHeadModel.from_pretrained(directory)
        params = model.params
        optimizer = optax.chain(
            optax.clip_by_global_norm(ADAMW["clip_norm"]),
            optax.adamw(
                ADAMW["learning_rate"], ADAMW["beta1"], ADAMW["beta2"], ADAMW["epsilon"],
                weight_decay=ADAMW["weight_decay"], mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
            ),
        )  # fmt: skip

        def step(state: Any, batch: Any) -> Any:
            def mean_loss(params: Any) -> Any:
                logits = model(batch[:, :-1], params=params, train=True).logits
                return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

            params, optimizer_state = state
            loss, gradients = jax.value_and_grad(mean_loss)(params)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), {"loss": loss}

        self.state = jax.device_put((params, optimizer.init(params)))
        self.batch = jax.device_put(random_tokens(model.config.vocab_size, batch, length + 1))
        self.step = jax.jit(step, donate_argnums=0)


class TorchTraining(Peer):
    """``GPT2LMHeadModel`` of transformers with fused scaled-dot-product attention and fused AdamW, eager."""

    compile = False

    def __init__(self, directory: str, batch: int, length: int) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        device = _torch_device()
        model = GPT2LMHeadModel.from_pretrained(directory, attn_implementation="sdpa").train().to(device)
        self.parameters = list(model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": ADAMW["weight_decay"]},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        betas = (ADAMW["beta1"], ADAMW["beta2"])
        self.optimizer = torch.optim.AdamW(groups, ADAMW["learning_rate"], betas, ADAMW["epsilon"], fused=True)
        self.batch = torch.from_numpy(random_tokens(model.config.vocab_size, batch, length + 1)).long().to(device)

        def loss(batch: Any) -> Any:
            logits = model(batch[:, :-1], use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

        self.loss = torch.compile(loss) if self.compile else loss

    def run(self) -> float:
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, ADAMW["clip_norm"])
        self.optimizer.step()
        return loss.item()  # waits for all of the above

    def facts(self) -> dict[str, Any]:
        return _torch_facts()


class TorchCompiledTraining(TorchTraining):
    """The same with forward and backward compiled by ``torch.compile``."""

    compile = True


# ------------------------------------------------------------------------------------------------- decoding


class JaxlmDecoding(Peer):
    """``jaxlm.decoding.generate``: prompt and all tokens in one jit."""

    def __init__(self, directory: str, batch: int, prompt: int, tokens: int) -> None:
        jax = _jax()
        import jaxlm
        from jaxlm.decoding import layers_apart

        self.model, params = jaxlm.load_pretrained(directory)
        self.params = jax.jit(layers_apart)(params)  # once for many calls, as the tour advises
        self.prompts, self.tokens = random_tokens(self.model.config.vocab_size, batch, prompt), tokens

    def run(self) -> list[list[int]]:
        from jaxlm.decoding import generate

        made = generate(self.model, self.params, self.prompts, max_new_tokens=self.tokens)
        return _jax().device_get(made.tokens).tolist()

    def facts(self) -> dict[str, Any]:
        return _jax_facts()


class FlaxDecoding(Peer):
    """``FlaxGPT2LMHeadModel.generate``, all of it in one jit."""

    def __init__(self, directory: str, batch: int, prompt: int, tokens: int) -> None:
        jax = _jax()
        from transformers import FlaxGPT2LMHeadModel

        model = FlaxGPT2LMHeadModel.from_pretrained(directory)
        self.params = jax.device_put(model.params)
        self.prompts, self.prompt = random_tokens(model.config.vocab_size, batch, prompt), prompt
        # No end token, as for the others: its generate() has no None for that, so it is an id that does not exist.
        options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        options["eos_token_id"] = model.config.vocab_size
        self.generate = jax.jit(lambda params, prompts: model.generate(prompts, params=params, **options).sequences)

    def run(self) -> list[list[int]]:
        sequences = self.generate(self.params, self.prompts)
        return _jax().device_get(sequences)[:, self.prompt :].tolist()

    def facts(self) -> dict[str, Any]:
        return _jax_facts()


class TorchDecoding(Peer):
    """``GPT2LMHeadModel.generate`` with its key-value cache."""

    def __init__(self, directory: str, batch: int, prompt: int, tokens: int) -> None:
        import torch
        from transformers import GPT2LMHeadModel

        device = _torch_device()
        self.model = GPT2LMHeadModel.from_pretrained(directory, attn_implementation="sdpa").eval().to(device)
        self.model.generation_config.eos_token_id = None  # never ends early, like the others
        self.prompts = torch.from_numpy(random_tokens(self.model.config.vocab_size, batch, prompt)).long().to(device)
        self.options = {"max_new_tokens": tokens, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        self.mask = torch.ones_like(self.prompts)

    def run(self) -> list[list[int]]:
        sequences = self.model.generate(self.prompts, attention_mask=self.mask, **self.options)
        return sequences[:, self.prompts.shape[1] :].tolist()

    def facts(self) -> dict[str, Any]:
        return _torch_facts()


# ----------------------------------------------------------------------------------------------- recurrence


class JaxSampled(Peer):
    """A jitted function, compiled in the first repetition, and samples of what it gives."""

    jitted: Any
    arguments: tuple[Any, ...]
    compiled: Any = None

    def named(self, made: Any) -> dict[str, Any]:
        """Its results by name."""
        raise NotImplementedError

    def run(self) -> dict[str, list[float]]:
        import numpy as np

        if self.compiled is None:
            self.compiled = self.jitted.lower(*self.arguments).compile()
        results = self.named(_jax().block_until_ready(self.compiled(*self.arguments)))
        return {name: np.asarray(leaf).ravel()[shapes.samples(leaf.size)].tolist() for name, leaf in results.items()}

    def facts(self) -> dict[str, Any]:
        memory = None if self.compiled is None else self.compiled.memory_analysis()
        return {**_jax_facts(), **({} if memory is None else {"temporary_bytes": memory.temp_size_in_bytes})}


class JaxlmRecurrence(JaxSampled):
    """``jaxlm.nn.recurrence.lstm`` or ``gru`` in a jit: output and last state, or also the gradient of everything."""

    def __init__(self, directory: str, layer: str, passes: str, **sizes: int) -> None:
        jax = _jax()
        from jaxlm.nn import recurrence

        arrays = jax.device_put(shapes.recurrence_arrays(shapes.Recurrence(**sizes), layer))
        x, doutput = arrays.pop("input"), arrays.pop("doutput")
        apply = recurrence.lstm if layer == "lstm" else recurrence.gru

        def forward(params: Any, x: Any) -> Any:
            return apply(params, x)

        def both(params: Any, x: Any, doutput: Any) -> Any:
            output, pull, state = jax.vjp(apply, params, x, has_aux=True)
            dparams, dx = pull(doutput)
            return output, state, {**dparams, "input": dx}

        self.arguments = (arrays, x) if passes == "forward" else (arrays, x, doutput)
        self.jitted = jax.jit(forward if passes == "forward" else both)

    def named(self, made: Any) -> dict[str, Any]:
        output, state, *gradients = made
        return {"output": output, **state, **(gradients[0] if gradients else {})}


class TorchRecurrence(Peer):
    """``torch.nn.LSTM`` or ``torch.nn.GRU``, whose reset gate acts after the product."""

    def __init__(self, directory: str, layer: str, passes: str, **sizes: int) -> None:
        import torch

        device, H = _torch_device(), sizes["width"]
        arrays = shapes.recurrence_arrays(shapes.Recurrence(**sizes), layer)
        self.x, self.doutput = (torch.from_numpy(arrays.pop(name)).to(device) for name in ("input", "doutput"))
        self.gradients, self.layer = passes != "forward", layer
        self.apply = (torch.nn.LSTM if layer == "lstm" else torch.nn.GRU)(H, H, batch_first=True)
        self.apply.to(device).requires_grad_(self.gradients)
        self.own = list(self.apply.parameters())  # weights and biases, of input and state
        weight_input, weight_hidden, bias, bias_hidden = self.own
        with torch.no_grad():
            for name, weight in (("weight_input", weight_input), ("weight_hidden", weight_hidden)):
                weight.copy_(torch.from_numpy(arrays[name].reshape(H, -1).T))
            bias.copy_(torch.from_numpy(arrays["bias"].ravel()))
            bias_hidden.zero_()
            if layer == "gru":
                bias_hidden[2 * H :] = torch.from_numpy(arrays["bias_hidden"])
        self.x.requires_grad_(self.gradients)

    def run(self) -> dict[str, list[float]]:
        import torch

        with torch.set_grad_enabled(self.gradients):
            output, state = self.apply(self.x)
        hidden, *cell = state if self.layer == "lstm" else (state,)
        results = {"output": output, "hidden": hidden, **({"cell": cell[0]} if cell else {})}
        if self.gradients:
            gradients = torch.autograd.grad(output, [*self.own, self.x], self.doutput)
            dinput, dhidden, dbias, dbias_hidden, dx = gradients
            results |= {"weight_input": dinput.T, "weight_hidden": dhidden.T, "bias": dbias, "input": dx}
            if self.layer == "gru":
                results["bias_hidden"] = dbias_hidden[2 * output.shape[-1] :]
        return {name: _torch_samples(leaf) for name, leaf in results.items()}

    def facts(self) -> dict[str, Any]:
        return _torch_facts()


def _torch_samples(x: Any) -> list[float]:
    import numpy as np

    at = np.unravel_index(shapes.samples(x.numel()), tuple(x.shape))
    return x.detach()[at].tolist()  # waits for all of the above


def _torch_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_facts() -> dict[str, Any]:
    import torch

    return {"platform": {"cuda": "gpu"}.get(_torch_device(), "cpu"), "threads": torch.get_num_threads()}
