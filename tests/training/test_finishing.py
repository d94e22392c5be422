"""The end of a run: killed in any phase after the training, a run is finished by resuming it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments import text_generation
from jaxlm import load_pretrained
from jaxlm.training import experiment as lib
from jaxlm.training.loop import TrainingConfig
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.report import curve, read_metrics, read_results, read_samples

STEPS = 3
PHASES = [  # what is called in turn after the training
    (lib, "save_pretrained"),
    (lib, "draw_losses"),
    (text_generation, "write_passage"),
    (text_generation, "write_sample"),
    (text_generation, "scores"),
    (lib, "write_results"),
    (lib, "write_report"),
]


class Killed(BaseException):
    """Passes through handlers of ``Exception``, as no handler runs when a process is killed."""


def test_every_phase_after_the_training_can_be_repeated(tmp_path, monkeypatch):
    text, directory = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("to be, or not to be: that is the question. " * 40)
    experiment = text_generation.Experiment(
        model=lib.ModelConfig("gpt", ("num_layers=1", "num_heads=1", "embed_dim=8", "mlp_dim=8")),
        training=TrainingConfig(STEPS, 2, 8, evaluation_batches=1),
        optimizer=OptimizerConfig(warmup_steps=1), data=text, output=directory, prompt="to", sample_tokens=3,
    )  # fmt: skip
    weights: list[dict[str, np.ndarray]] = []

    def killed(*arguments: object, **options: object) -> None:
        raise Killed

    for module, name in PHASES:
        with monkeypatch.context() as patched:
            patched.setattr(module, name, killed)
            try:
                text_generation.run(experiment, directory if directory.exists() else None)
            except Killed:
                pass
            else:
                raise AssertionError(f"{name} was not called")
        if name != "save_pretrained":  # the model is exported before anything that may fail
            weights.append(exported(directory))
    result = text_generation.run(experiment, directory)
    weights.append(exported(directory))
    expected = jax.tree.leaves(jax.tree.map(np.asarray, result.params))
    for found in weights:
        assert all(np.array_equal(one, other) for one, other in zip(jax.tree.leaves(found), expected, strict=True))
    assert result.step == STEPS
    records = read_metrics(directory / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]  # no step was made twice
    assert curve(records, "validation_loss")[0] == [STEPS]
    assert sum(record.get("event") == "resumed" for record in records) == len(PHASES)
    assert read_results(directory)["steps"] == STEPS
    assert len(read_samples(directory)) == 1
    assert {"loss.png", "report.html", "sample.txt"} <= {path.name for path in directory.iterdir()}
    assert jnp.isfinite(result.validation_loss)


def exported(directory: Path) -> dict[str, np.ndarray]:
    """The parameters in ``model/``; their checksums are verified."""
    return jax.tree.map(np.asarray, load_pretrained(directory / "model")[1])
