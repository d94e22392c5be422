"""The implementations that ``benchmarks.recurrence`` compares: one recurrent layer in jaxlm and in torch.

Both have the same random weights and inputs. H: width of input and state.
"""

from __future__ import annotations

from typing import Any

from benchmarks import shapes
from benchmarks.baselines import JaxSampled, Sampled, TorchImplementation, jax_exact, torch_device, torch_wait


class JaxlmRecurrence(JaxSampled):
    """``jaxlm.nn.recurrence.lstm`` or ``gru`` in one jitted function.

    The function returns the output, the last state and, if the backward pass is measured, the gradients. As in the
    programs in ``experiments``, the process does not return freed memory to the system
    (``jaxlm.host.keep_freed_memory``).
    """

    is_freed_memory_kept = True

    def __init__(self, directory: str, layer: str, pass_name: str, **sizes: int) -> None:
        jax = jax_exact()
        from jaxlm.nn import recurrence

        arrays = jax.device_put(shapes.recurrence_arrays(shapes.Recurrence(**sizes), layer))
        x, doutput = arrays.pop("input"), arrays.pop("doutput")
        apply = recurrence.lstm if layer == "lstm" else recurrence.gru

        def forward(params: Any, x: Any) -> Any:
            return apply(params, x)

        def both(params: Any, x: Any, doutput: Any) -> Any:
            output, vjp, state = jax.vjp(apply, params, x, has_aux=True)
            dparams, dx = vjp(doutput)
            return output, state, {**dparams, "input": dx}

        self.arguments = (arrays, x) if pass_name == "forward" else (arrays, x, doutput)
        self.jitted = jax.jit(forward if pass_name == "forward" else both)

    def name_results(self, results: Any) -> dict[str, Any]:
        output, state, *gradients = results
        return {"output": output, **state, **(gradients[0] if gradients else {})}


class TorchRecurrence(Sampled, TorchImplementation):
    """``torch.nn.LSTM`` or ``torch.nn.GRU``. This GRU applies the reset gate after the matrix product."""

    def __init__(self, directory: str, layer: str, pass_name: str, **sizes: int) -> None:
        import torch

        device, H = torch_device(), sizes["width"]
        arrays = shapes.recurrence_arrays(shapes.Recurrence(**sizes), layer)
        self.x, self.doutput = (torch.from_numpy(arrays.pop(name)).to(device) for name in ("input", "doutput"))
        self.has_gradients, self.layer = pass_name != "forward", layer
        self.apply = (torch.nn.LSTM if layer == "lstm" else torch.nn.GRU)(H, H, batch_first=True)
        self.apply.to(device).requires_grad_(self.has_gradients)
        self.parameters = list(self.apply.parameters())  # weight_ih, weight_hh, bias_ih, bias_hh
        weight_input, weight_hidden, bias, bias_hidden = self.parameters
        with torch.no_grad():
            for name, weight in (("weight_input", weight_input), ("weight_hidden", weight_hidden)):
                weight.copy_(torch.from_numpy(arrays[name].reshape(H, -1).T))
            bias.copy_(torch.from_numpy(arrays["bias"].ravel()))
            bias_hidden.zero_()
            if layer == "gru":
                bias_hidden[2 * H :] = torch.from_numpy(arrays["bias_hidden"])
        self.x.requires_grad_(self.has_gradients)

    def run(self) -> dict[str, Any]:
        import torch

        with torch.set_grad_enabled(self.has_gradients):
            output, state = self.apply(self.x)
        hidden, *cell = state if self.layer == "lstm" else (state,)
        results = {"output": output, "hidden": hidden, **({"cell": cell[0]} if cell else {})}
        if self.has_gradients:
            gradients = torch.autograd.grad(output, [*self.parameters, self.x], self.doutput)
            dweight_input, dweight_hidden, dbias, dbias_hidden, dx = gradients
            results |= {"weight_input": dweight_input.T, "weight_hidden": dweight_hidden.T, "bias": dbias, "input": dx}
            if self.layer == "gru":
                results["bias_hidden"] = dbias_hidden[2 * output.shape[-1] :]
        torch_wait()
        return results
