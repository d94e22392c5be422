"""The implementations that ``benchmarks.recurrence`` compares: one recurrent layer in jaxlm, Flax and torch.

All implementations have the same random weights and inputs. H: width of input and state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

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


class FlaxRecurrence(JaxSampled):
    """``flax.linen.RNN`` with an ``OptimizedLSTMCell`` or a ``GRUCell``, in one jitted function."""

    def __init__(self, directory: str, layer: str, pass_name: str, **sizes: int) -> None:
        jax = jax_exact()
        from flax import linen

        arrays = shapes.recurrence_arrays(shapes.Recurrence(**sizes), layer)
        x, doutput = (jax.device_put(arrays.pop(name)) for name in ("input", "doutput"))
        self.is_lstm, width = layer == "lstm", sizes["width"]
        params = jax.device_put({"params": {"cell": self._to_flax(arrays)}})
        rnn = linen.RNN((linen.OptimizedLSTMCell if self.is_lstm else linen.GRUCell)(width), return_carry=True)

        def forward(params: Any, x: Any) -> Any:
            state, output = rnn.apply(params, x)
            return output, state

        def both(params: Any, x: Any, doutput: Any) -> Any:
            output, vjp, state = jax.vjp(forward, params, x, has_aux=True)
            return output, state, *vjp(doutput)

        self.arguments = (params, x) if pass_name == "forward" else (params, x, doutput)
        self.jitted = jax.jit(forward if pass_name == "forward" else both)

    def _biased_product(self) -> str:
        """The product to which Flax adds the bias of a gate: "i" (with the input) or "h" (with the state)."""
        return "h" if self.is_lstm else "i"

    def _to_flax(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """The parameters of Flax's cell: one kernel for each product and gate, such as ``hf``."""
        gates, cell = "ifgo" if self.is_lstm else "rzn", {}
        for product, weight in (("i", "weight_input"), ("h", "weight_hidden")):
            for index, gate in enumerate(gates):
                bias = {"bias": arrays["bias"][index]} if product == self._biased_product() else {}
                cell[product + gate] = {"kernel": arrays[weight][:, index], **bias}
        if not self.is_lstm:
            cell["hn"]["bias"] = arrays["bias_hidden"]
        return cell

    def _from_flax(self, cell: dict[str, Any]) -> dict[str, np.ndarray]:
        """The inverse of :meth:`_to_flax`: arrays in jaxlm's layout from the parameters of Flax's cell."""
        gates = "ifgo" if self.is_lstm else "rzn"

        def stacked(product: str, name: str) -> np.ndarray:
            return np.stack([cell[product + gate][name] for gate in gates], axis=-2)

        arrays = {"weight_input": stacked("i", "kernel"), "weight_hidden": stacked("h", "kernel")}
        arrays["bias"] = stacked(self._biased_product(), "bias")
        return arrays | ({} if self.is_lstm else {"bias_hidden": np.asarray(cell["hn"]["bias"])})

    def name_results(self, results: Any) -> dict[str, Any]:
        output, state, *gradients = results
        named = {"output": output} | ({"cell": state[0], "hidden": state[1]} if self.is_lstm else {"hidden": state})
        return named | ({"params": gradients[0]["params"]["cell"], "input": gradients[1]} if gradients else {})

    def read(self, result: dict[str, Any]) -> dict[str, list[float]]:
        """Also converts the gradients to jaxlm's layout, outside of the measured time."""
        result = dict(result)
        return super().read(result | self._from_flax(result.pop("params")) if "params" in result else result)


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
