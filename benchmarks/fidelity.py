"""Numerical accuracy of GPT-2 in jaxlm: hidden states, logits, loss and gradients, compared with torch.

    python -m benchmarks.fidelity                                    GPT-2 124M, random weights, 2 rows of 128 tokens
    python -m benchmarks.fidelity --model gpt2-tiny --length 32 --json fidelity.json

The table shows max|a - b| / max|b|. The column "jaxlm - torch" compares the float32 results of jaxlm and torch. The
columns "jaxlm - float64" and "torch - float64" compare these float32 results with torch in float64. In the case
"padding", the first row is padded on the left and the last row on the right; padding positions are not compared.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import harness, shapes
from benchmarks.baselines import jax_exact

Results = dict[str, np.ndarray]
"""``hidden``, ``logits``, ``loss``, and the gradient of each parameter by its name in transformers."""


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Compare the results of jaxlm and torch."""

    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt2-tiny"] = "gpt2"
    """Variant of GPT-2."""
    batch: int = 2
    """Rows, at least 2: one row is padded on the left, and another row on the right."""
    length: int = 128
    """Tokens per row, at least 8."""
    json: Path | None = None
    """Write all results to this JSON file too."""


def jaxlm_results(directory: Path, tokens: np.ndarray, mask: np.ndarray) -> Results:
    """The results of jaxlm for tokens [B, T + 1] and their mask [B, T + 1] (1: token, 0: padding).

    ``hidden`` [N, D] and ``logits`` [N, V] have one row for each of the N input tokens that are not padding.
    """
    import jaxlm
    from jaxlm.interop.huggingface import named_tensors
    from jaxlm.objectives import causal

    jax = jax_exact()
    model, params = jaxlm.load_pretrained(directory)
    batch = causal.batch(tokens, mask)

    @jax.jit
    def compute(params: Any, batch: causal.Batch) -> Any:
        def mean_loss(params: Any) -> Any:
            total, count, _ = causal.loss(model, params, batch)
            return total / count

        hidden, _ = model.apply(params, batch.tokens, segment_ids=batch.segment_ids)
        return hidden, model.logits(params, hidden), *jax.value_and_grad(mean_loss)(params)

    hidden, logits, loss, gradients = jax.device_get(compute(params, batch))
    not_padding = mask[:, :-1] > 0
    return {
        "hidden": hidden[not_padding], "logits": logits[not_padding], "loss": loss,
        **dict(named_tensors(model, gradients)),
    }  # fmt: skip


def torch_results(directory: Path, tokens: np.ndarray, mask: np.ndarray, dtype: str) -> Results:
    """The results of ``GPT2LMHeadModel`` for the arguments of :func:`jaxlm_results`.

    Args:
        dtype: "float32" or "float64".
    """
    import torch
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(directory, attn_implementation="sdpa", dtype=getattr(torch, dtype))
    has_loss = (mask[:, 1:] > 0) & (mask[:, :-1] > 0)
    targets = torch.from_numpy(np.where(has_loss, tokens[:, 1:], -100)).long()
    out = model(
        torch.from_numpy(tokens[:, :-1]).long(),
        attention_mask=torch.from_numpy(mask[:, :-1]),
        position_ids=torch.from_numpy(np.maximum(mask[:, :-1].cumsum(1) - 1, 0)).long(),
        output_hidden_states=True,
        use_cache=False,
    )
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    loss.backward()
    not_padding = torch.from_numpy(mask[:, :-1] > 0)
    results = {"hidden": out.hidden_states[-1][not_padding], "logits": out.logits[not_padding], "loss": loss}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: tensor.detach().numpy() for name, tensor in {**results, **gradients}.items()}


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """max|actual - expected| / max|expected|; infinity if this number is not finite.

    Raises:
        Failure: the shapes differ.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise harness.Failure(f"shapes differ: {actual.shape} and {expected.shape}")
    result = float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))
    return result if np.isfinite(result) else float("inf")


def compare(case: str, ours: Results, theirs: Results, exact: Results) -> list[dict[str, Any]]:
    """Four rows: the differences of the hidden states, the logits, the loss, and one gradient.

    This gradient is the one with the largest difference between jaxlm and torch.

    Args:
        case: name of the case.
        ours, theirs, exact: the results of jaxlm, of torch, and of torch in float64.

    Raises:
        Failure: jaxlm and torch have different parameters, or parameters of different shapes.
    """
    if ours.keys() != theirs.keys():
        raise harness.Failure(f"jaxlm and torch have different parameters: {sorted(ours.keys() ^ theirs.keys())}")
    differences = {
        name: {
            "jaxlm_torch": difference(ours[name], theirs[name]),
            "jaxlm_float64": difference(ours[name], exact[name]),
            "torch_float64": difference(theirs[name], exact[name]),
        }
        for name in ours
    }
    outputs = ("hidden", "logits", "loss")
    worst = max(differences.keys() - set(outputs), key=lambda name: differences[name]["jaxlm_torch"])
    return [{"case": case, "result": name, **differences[name]} for name in (*outputs, worst)]


def run(options: Fidelity) -> None:
    """Compare and print the results."""
    if options.batch < 2 or options.length < 8:
        raise harness.UserError(
            f"--batch {options.batch} must be at least 2, and --length {options.length} must be at least 8: one row "
            "is padded on the left, and another row on the right"
        )
    harness.check_packages("torch", "benchmarks.baselines:TorchImplementation")
    with harness.session(options.model) as session:
        tokens = shapes.random_tokens(session.model["vocab_size"], options.batch, options.length + 1)
        full, padded = np.ones((2, *tokens.shape), np.int32)
        padded[0, : options.length // 4] = padded[-1, -options.length // 8 :] = 0
        rows = []
        for case, mask in (("no padding", full), ("padding", padded)):
            theirs, exact = (torch_results(session.directory, tokens, mask, dtype) for dtype in ("float32", "float64"))
            rows += compare(case, jaxlm_results(session.directory, tokens, mask), theirs, exact)
        columns = ("jaxlm_torch", "jaxlm_float64", "torch_float64")
        print(f"largest relative differences, float32, {options.model} B{options.batch} T{options.length}")
        cells = [[f"{row['case']}: {row['result']}", *(f"{row[name]:.1e}" for name in columns)] for row in rows]
        print(harness.table(("result", "jaxlm - torch", "jaxlm - float64", "torch - float64"), cells))
        print("The last line of each case is the gradient with the largest difference between jaxlm and torch.")
        harness.write_json(options.json, "fidelity", options, session.description, rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and return the exit status."""
    return harness.main(Fidelity, run, arguments, name="fidelity", description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
