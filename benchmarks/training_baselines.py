"""jaxlm and its baselines for ``benchmarks.training``: loss or optimizer step with the same checkpoint and batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import complete_models
from benchmarks.baselines import JaxImplementation, TorchImplementation, jax_exact, torch_device
from benchmarks.shapes import ADAMW


class JaxTraining(JaxImplementation):
    """Base class of implementations that call a jitted function. The first repetition compiles the function.

    The function is a step ``(state, batch) -> (state, {"loss": ...})``, or a loss ``(params, batch) -> loss`` if
    ``is_step`` is False. ``state`` then has only the parameters.
    """

    function: Any
    state: Any
    batch: Any
    compiled: Any = None
    is_step = True

    def run(self) -> float:
        if self.compiled is None:
            from jaxlm.training.layouts import with_formats

            self.compiled = self.function.lower(self.state, self.batch).compile()
            self.state = with_formats(self.state, self.compiled.input_formats[0][0])
        result = jax_exact().block_until_ready(self.compiled(self.state, self.batch))
        if not self.is_step:
            return float(result)
        self.state, metrics = result
        return float(metrics["loss"])

    def facts(self) -> dict[str, Any]:
        memory = None if self.compiled is None else self.compiled.memory_analysis()
        if memory is None:
            return super().facts()
        arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        return {**super().facts(), "step_bytes": arrays + memory.temp_size_in_bytes}


class Jaxlm(JaxTraining):
    """jaxlm: a step of ``Trainer.jit_step``, or only the jitted loss.

    As in the experiments, the layers are not stacked (``scan_layers=False``), and the process keeps freed memory
    (``jaxlm.host.keep_freed_memory``).
    """

    is_freed_memory_kept = True

    def __init__(self, directory: str, family: str, pass_name: str) -> None:
        jax = jax_exact()
        import jaxlm
        from jaxlm.objectives import objective
        from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
        from jaxlm.training.trainer import Trainer

        model, params = jaxlm.load_pretrained(directory)
        self.is_step = pass_name == "step"
        self.batch = jax.device_put(complete_models.batch_of(complete_models.load(directory)))
        loss = objective(model.task).loss
        if not self.is_step:

            def mean_loss(params: Any, batch: Any) -> Any:
                total, weight, _ = loss(model, params, batch)
                return total / weight

            self.state, self.function = jax.device_put(params), jax.jit(mean_loss)
            return
        settings = OptimizerConfig(schedule="constant", warmup_steps=0, **ADAMW)
        optimizer = make_optimizer(settings, model.specs, steps=1_000_000)
        trainer = Trainer(model, optimizer, loss)
        self.state = trainer.init(jax.random.key(0), params)
        self.function = trainer.jit_step()


class Flax(JaxTraining):
    """The Flax class of transformers: a jitted step with donated state, or only the jitted loss."""

    packages = ("transformers",)

    def __init__(self, directory: str, family: str, pass_name: str) -> None:
        jax = jax_exact()
        import jax.numpy as jnp
        import optax

        model = flax_model(directory)
        arrays = complete_models.load(directory)
        self.is_step = pass_name == "step"
        self.batch = jax.device_put((complete_models.inputs(family, arrays), complete_models.labels(arrays)))

        def mean_loss(params: Any, batch: Any) -> Any:
            inputs, labels = batch
            logits = model(**inputs, params=params, train=self.is_step).logits
            mask = labels != complete_models.IGNORED
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(mask, labels, 0))
            return jnp.sum(losses * mask) / jnp.sum(mask)

        optimizer = optax.chain(
            optax.clip_by_global_norm(ADAMW["clip_norm"]),
            optax.adamw(
                ADAMW["learning_rate"], ADAMW["beta1"], ADAMW["beta2"], ADAMW["epsilon"],
                weight_decay=ADAMW["weight_decay"], mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
            ),
        )  # fmt: skip

        def step(state: Any, batch: Any) -> Any:
            params, optimizer_state = state
            loss, gradients = jax.value_and_grad(mean_loss)(params, batch)
            updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
            return (optax.apply_updates(params, updates), optimizer_state), {"loss": loss}

        params = jax.device_put(model.params)
        self.state, self.function = params, jax.jit(mean_loss)
        if self.is_step:
            self.state = params, jax.device_put(optimizer.init(params))
            self.function = jax.jit(step, donate_argnums=0)


def flax_model(directory: str) -> Any:
    """The Flax model of a checkpoint."""
    import inspect

    import jax.numpy as jnp
    import transformers

    clip = jnp.clip
    if "a_max" not in inspect.signature(clip).parameters:  # Flax T5 passes a_max, which JAX renamed to max
        vars(jnp)["clip"] = lambda x, a_min=None, a_max=None, **options: clip(x, a_min, a_max, **options)
    return getattr(transformers, f"Flax{complete_models.transformers_class(directory)}").from_pretrained(directory)


class Torch(TorchImplementation):
    """The torch class of transformers or ``torch_models``, in eager mode: a step with fused AdamW, or only the loss.

    The attention implementation is the default of the class.
    """

    compile = False

    def __init__(self, directory: str, family: str, pass_name: str) -> None:
        import torch

        self.is_step, self.device = pass_name == "step", torch_device()
        model, loss = torch_loss(directory, family)
        model.to(self.device).train(self.is_step)
        self.parameters = list(model.parameters())
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": ADAMW["weight_decay"]},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        betas = (ADAMW["beta1"], ADAMW["beta2"])
        self.optimizer = torch.optim.AdamW(groups, ADAMW["learning_rate"], betas, ADAMW["epsilon"], fused=True)
        self.loss = torch.compile(loss) if self.compile else loss

    def run(self) -> float:
        import torch

        if not self.is_step:
            with torch.no_grad():
                return self.loss().item()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, ADAMW["clip_norm"])
        self.optimizer.step()
        return loss.item()  # waits until the computation has ended


class TorchCompiled(Torch):
    """:class:`Torch` with ``torch.compile`` for the loss and its gradient. The optimizer is not compiled."""

    compile = True


def torch_loss(directory: str, family: str) -> tuple[Any, Callable[[], Any]]:
    """The torch model of a directory, and a function that returns its mean loss on the batch in the directory."""
    import torch

    from benchmarks import torch_models

    device, arrays = torch_device(), complete_models.load(directory)

    def tensor(x: Any) -> Any:
        result = torch.from_numpy(x).to(device)
        return result if result.is_floating_point() else result.long()

    labels = tensor(complete_models.labels(arrays))
    model = torch_model(directory, family)
    if family == "transformer_xl":
        tokens = tensor(arrays["tokens"])
        return model, lambda: model.loss(tokens, labels)
    if family not in complete_models.OWN_TORCH_FAMILIES:
        inputs = {name: tensor(x) for name, x in complete_models.inputs(family, arrays).items()}
        options = {"xlnet": {"use_mems": False}, "bert": {}}.get(family, {"use_cache": False})

        def logits() -> Any:
            if family == "griffin":
                torch_models.forget_states(model)
            return model(**inputs, **options).logits

    else:
        tokens = tensor(arrays["tokens"])

        def logits() -> Any:
            output = model(tokens)
            return output[0] if family == "lstm" else output

    def loss() -> Any:
        scores = logits()
        return torch.nn.functional.cross_entropy(
            scores.reshape(-1, scores.shape[-1]), labels.reshape(-1), ignore_index=complete_models.IGNORED
        )

    return model, loss


def torch_model(directory: str, family: str) -> Any:
    """The torch model of a checkpoint, from transformers or ``torch_models``."""
    from benchmarks import torch_models

    if family in complete_models.OWN_TORCH_FAMILIES:
        return torch_models.read(directory, family)
    import transformers

    module = torch_models.xlstm_module() if family == "xlstm" else transformers
    torch_class = getattr(module, complete_models.transformers_class(directory))
    length = complete_models.load(directory)["tokens"].shape[1]
    return torch_class.from_pretrained(directory, **complete_models.torch_options(family, length))
