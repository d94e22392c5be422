"""Runs that diverge: skipped updates, loss spikes and rollbacks. Interrupted runs give the same results."""

import dataclasses
import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.checkpoint import Checkpointer
from jaxlm.data import Batches
from jaxlm.data.batching import TokenBatch
from jaxlm.objectives import causal
from jaxlm.testing.helpers import assert_trees_equal, initial_params, tiny_model
from jaxlm.training import loop
from jaxlm.training.loop import DivergedError, Run, TrainingConfig, train
from jaxlm.training.report import read_metrics
from jaxlm.training.trainer import SPIKE_WINDOW, Trainer
from tests.training.cached_trainer import CachedTrainer

STEPS = 20
HUGE_FACTOR = 1e8


@dataclasses.dataclass(frozen=True, eq=False)
class NumberedBatches:
    """A source whose batch ``index`` is filled with its index, or with ``index + gap`` from batch ``at`` on."""

    at: int = 0
    gap: int = 0
    batch_size: int = 2
    rows_per_epoch: int = 1000

    def batch(self, index, rows):
        number = index if index < self.at else index + self.gap
        return TokenBatch(np.full((len(rows), 5), number, np.int32))

    def check(self, vocab_size):
        pass

    def fingerprint(self):
        return {"kind": "Numbered", "gap": self.gap}


class StoppingBatches(Batches):
    """Batches that stop the run when batch ``at`` is requested: SIGTERM saves a checkpoint, an error does not."""

    def __init__(self, source, at, how):
        super().__init__(source, to_batch=to_batch)
        self.at, self.how = at, how

    def __next__(self):
        if self.state()["next"] == self.at:
            if self.how == "error":
                raise RuntimeError("killed")
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__next__()


def to_batch(token_batch):
    return causal.batch(token_batch.tokens)


@functools.cache
def gpt_model(**changes):
    return tiny_model("gpt", **{"num_layers": 1, **changes})


def evaluate(params):
    return {"loss": float(np.mean(params["final_norm"]["scale"]))}


@functools.cache
def loss_with(nan=(), huge=(), spikes=()):
    """A loss that depends on the parameters, the batch number and the key. Batches with given numbers have faults."""

    def loss(model, params, batch, *, key=None, state=None):
        number = batch.tokens[0, 0]

        def is_among(numbers):
            return jnp.any(jnp.asarray([-1, *numbers]) == number)

        noise = jax.random.uniform(key) + 0.1 * jnp.sin(number.astype(jnp.float32))
        total = jnp.mean((params["final_norm"]["scale"] - noise) ** 2)
        factor = jnp.where(is_among(nan), jnp.nan, 1.0) * jnp.where(is_among(huge), HUGE_FACTOR, 1.0)
        total = factor * total + 50.0 * is_among(spikes)
        return total, jnp.float32(1.0), None

    return loss


def nonfinite_sgd(grads, state, params=None):
    """SGD whose update is NaN if a gradient is large."""
    return jax.tree.map(lambda grad: jnp.where(jnp.max(jnp.abs(grad)) > 1e3, jnp.nan, -0.1) * grad, grads), state


MOMENTUM_SGD = optax.sgd(0.1, momentum=0.9)
NONFINITE_SGD = optax.GradientTransformation(lambda params: optax.EmptyState(), nonfinite_sgd)


def run(
    directory, loss, data=None, *, resume=False, optimizer=MOMENTUM_SGD, model=None, rate=None, params=None, **options
):
    options = {"evaluate_every": 1000, "checkpoint_every": 4, "max_skipped_in_a_row": 3, **options}
    config = TrainingConfig(options.pop("steps", STEPS), 2, **options)
    trainer = CachedTrainer(**vars(config.trainer(model or gpt_model(), optimizer, loss, learning_rate=rate)))
    data = data or Batches(NumberedBatches(), to_batch=to_batch)
    return train(trainer, data, evaluate, config, Run(directory, resume=resume), params)


def saved_steps(directory):
    with Checkpointer(directory / "checkpoints") as checkpoints:
        return checkpoints.steps()


def run_without_batches(at, gap, tmp, **options):
    """Return the result of a run without faults. Its data skip ``gap`` batches from batch ``at`` on."""
    return run(tmp / "without", loss_with(), Batches(NumberedBatches(at, gap), to_batch=to_batch), **options)


# ------------------------------------------------------------------------------------------------ rollback


@pytest.mark.thorough
def test_a_rollback_skips_the_batches_since_the_checkpoint(tmp_path, capfd):
    loss = loss_with(nan=(9, 10, 11))
    result = run(tmp_path / "run", loss, max_rollbacks=2)
    assert_trees_equal(result.state, run_without_batches(8, 4, tmp_path).state)
    assert (result.step, result.rollbacks, int(result.state.skipped)) == (STEPS, 1, 0)
    messages = " ".join(capfd.readouterr().err.split())
    assert "step 10: a loss or gradient that is not finite (loss nan" in messages
    assert "Rollback 1 of 2: training continues from step 8, without the batches of steps 9 to 12" in messages
    events = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "event" in record]
    assert events == [{"step": 12, "event": "rollback", "to_step": 8, "rollbacks": 1, "batches_left_out": 4}]
    # Interruptions do not change the result, neither while steps are skipped nor after the rollback.
    for name, stops in {
        "signals": [("signal", 6), ("signal", 10), ("signal", 13)],
        "both": [("error", 11), ("signal", 9), ("error", 15)],
    }.items():
        directory = tmp_path / name
        for how, at in stops:
            data = StoppingBatches(NumberedBatches(), at, how)
            try:
                interrupted = run(directory, loss, data, max_rollbacks=2, resume=directory.exists())
                assert interrupted.interrupted == "SIGTERM"
            except RuntimeError as error:
                assert str(error) == "killed"  # noqa: PT017
        resumed = run(directory, loss, max_rollbacks=2, resume=True)
        assert_trees_equal(resumed.state, result.state)
        assert (resumed.rollbacks, resumed.tokens) == (1, result.tokens)
        assert saved_steps(directory) == saved_steps(tmp_path / "run") == [16, 20]


def test_a_rollback_empties_the_carried_model_state(tmp_path, monkeypatch):
    """The batches after a rollback do not continue the batches before the checkpoint."""
    states = []
    resume_from = loop._Loop._resume_from

    def record(self, state, saved):
        states.append(jax.device_get(state.model_state))
        resume_from(self, state, saved)

    monkeypatch.setattr(loop._Loop, "_resume_from", record)
    model = tiny_model("lstm-tiny")
    config = TrainingConfig(6, 2, checkpoint_every=2, max_skipped_in_a_row=2, max_rollbacks=1, evaluate_every=6)
    trainer = config.trainer(model, optax.sgd(0.1), nan_loss_of_batches(3, 4), carry_size=(2, 1))
    train(trainer, Batches(NumberedBatches(), to_batch=to_batch), lambda params: {"loss": 1.0}, config, Run(tmp_path))
    (state,) = states
    assert_trees_equal(state, model.init_state(2, 1))


def nan_loss_of_batches(*indices):
    """The causal loss, NaN for the batches with these indices."""

    def loss(model, params, batch, *, key=None, state=None):
        total, weight, new_state = causal.loss(model, params, batch, key=key, state=state)
        return jnp.where(jnp.isin(batch.tokens[0, 0], jnp.asarray(indices)), jnp.nan, total), weight, new_state

    return loss


def test_rollbacks_are_limited_and_keep_the_checkpoint(tmp_path):
    loss = loss_with(nan=range(9, 200))
    with pytest.raises(DivergedError, match=r"is of step 8; the run has already gone back max_rollbacks=2 times"):
        run(tmp_path, loss, max_rollbacks=2, keep_last=1)
    events = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record.get("event") == "rollback"]
    # After the first rollback, step 9 uses batch 12. The loss of this batch is not finite, either.
    assert [(event["step"], event["to_step"], event["batches_left_out"]) for event in events] == [
        (12, 8, 4),
        (11, 8, 7),
    ]
    assert saved_steps(tmp_path) == [8]
    with pytest.raises(DivergedError, match="is of step 8; max_rollbacks=1 would go back to it"):
        run(tmp_path, loss, resume=True)
    with pytest.raises(DivergedError, match="There is no scheduled checkpoint yet"):
        run(tmp_path / "early", loss_with(nan=range(200)), max_rollbacks=2)
    # Without checkpoint_every, the checkpoints in the directory may be those of another run.
    with pytest.raises(DivergedError, match=r"data of these steps\. The run cannot .*, because checkpoint_every=None$"):
        run(tmp_path, loss, checkpoint_every=None)


@pytest.mark.thorough
def test_nonfinite_weights_cause_a_rollback(tmp_path, capfd):
    result = run(tmp_path / "run", loss_with(huge=(9,)), optimizer=NONFINITE_SGD, max_rollbacks=1)
    assert_trees_equal(result.state, run_without_batches(8, 2, tmp_path, optimizer=NONFINITE_SGD).state)
    assert "step 10: the weights are not finite, although" in capfd.readouterr().err


def test_initial_weights_that_are_not_finite_are_reported(tmp_path):
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), initial_params(gpt_model()))
    with pytest.raises(DivergedError, match=r"step 1: the weights were not finite before .* Check the initial"):
        run(tmp_path, loss_with(), params=params)


def test_skipped_steps_postpone_the_next_checkpoint(tmp_path):
    loss = loss_with(nan=(7, 8, 11))  # skips steps 8, 9 and 12; step 10 is saved instead of step 8
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, loss, StoppingBatches(NumberedBatches(), 11, "error"))
    assert saved_steps(tmp_path) == [4, 10]
    interrupted = run(tmp_path, loss, StoppingBatches(NumberedBatches(), 11, "signal"), resume=True)
    assert (interrupted.interrupted, int(interrupted.state.skipped_in_a_row)) == ("SIGTERM", 1)
    assert saved_steps(tmp_path) == [4, 10, 12]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path, loss, StoppingBatches(NumberedBatches(), 14, "error"), resume=True)
    assert saved_steps(tmp_path) == [10, 13]


# -------------------------------------------------------------------------------------------------- spikes


def is_spike(recent_losses, loss, deviations):
    window = np.full(SPIKE_WINDOW, np.nan, np.float32)
    window[: len(recent_losses)] = recent_losses
    return bool(compiled_is_spike(deviations)(np.float32(loss), window))


@functools.cache
def compiled_is_spike(deviations):
    return jax.jit(Trainer(gpt_model(), optax.sgd(0.1), causal.loss, spike_deviations=deviations)._is_spike)


def test_a_spike_is_a_loss_above_mean_plus_deviations():
    losses = np.random.default_rng(0).normal(3.0, 0.5, SPIKE_WINDOW)
    bound = losses.mean() + 4.0 * losses.std(ddof=1)
    assert is_spike(losses, bound + 1e-3, 4.0)
    assert not is_spike(losses, bound - 1e-3, 4.0)
    assert not is_spike(losses, bound + 1e-3, 5.0)
    assert not is_spike(losses, -100.0, 4.0)  # a lower loss is never a spike
    few = losses[: SPIKE_WINDOW // 2]
    assert is_spike(few, 100.0, 4.0)
    assert not is_spike(few[:-1], 100.0, 4.0)


@pytest.mark.thorough
def test_a_spike_is_skipped_in_a_resumed_run_too(tmp_path, capfd):
    steps, at = SPIKE_WINDOW + 20, SPIKE_WINDOW + 10
    options = {"steps": steps, "checkpoint_every": 50, "spike_deviations": 6.0}
    result = run(tmp_path / "run", loss_with(spikes=(10, at)), **options)
    assert int(result.state.skipped) == 1  # the first spike comes before there are enough losses
    messages = capfd.readouterr().err
    assert f"step {at + 1}: a loss spike (loss 50." in messages
    assert "step 11:" not in messages
    skipped = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record.get("skipped_in_a_row")]
    assert [record["step"] for record in skipped] == [at + 1]
    without_policy = run(tmp_path / "off", loss_with(spikes=(10, at)), **{**options, "spike_deviations": None})
    assert int(without_policy.state.skipped) == 0
    # The checkpoint has the recent losses. The checkpoint of a run without spike_deviations has none.
    data = StoppingBatches(NumberedBatches(), SPIKE_WINDOW - 3, "signal")
    assert run(tmp_path / "cut", loss_with(spikes=(10, at)), data, **options).interrupted == "SIGTERM"
    resumed = run(tmp_path / "cut", loss_with(spikes=(10, at)), resume=True, **options)
    assert_trees_equal(resumed.state, result.state)
    later = run(tmp_path / "off", loss_with(spikes=(steps + 80,)), resume=True, **{**options, "steps": steps + 90})
    assert int(later.state.skipped) == 1


@pytest.mark.thorough
def test_a_lasting_spike_causes_a_rollback(tmp_path):
    steps, at = SPIKE_WINDOW, SPIKE_WINDOW - 8
    loss = loss_with(spikes=range(at, at + 3))
    result = run(tmp_path / "run", loss, steps=steps, checkpoint_every=20, spike_deviations=6.0, max_rollbacks=1)
    assert (result.rollbacks, int(result.state.skipped)) == (1, 0)
    # Step 120 is a checkpoint, and the steps 121 to 123 are skipped.
    expected = run_without_batches(at, 3, tmp_path, steps=steps, checkpoint_every=20)
    assert result.state.recent_losses.shape == (SPIKE_WINDOW,)
    assert_trees_equal(result.state.replace(recent_losses=None), expected.state)


# ------------------------------------------------------------------------------------ changes in a resumed run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    run(directory, loss_with(), steps=8)
    return directory


def test_a_resumed_run_rejects_changes_of_the_model(finished_run):
    # The arrays of the second model differ, too.
    for name, value in (("norm_epsilon", 0.5), ("num_layers", 3)):
        with pytest.raises(ValueError, match=f"{name}={value} cannot change in a resumed run"):
            run(finished_run, loss_with(), resume=True, model=gpt_model(**{name: value}))
    # Dropout, precision and memory use may change.
    resumed = run(finished_run, loss_with(), resume=True, steps=8, model=gpt_model(residual_dropout=0.5, remat="none"))
    assert resumed.step == 8


def test_a_changed_schedule_is_reported(tmp_path, capfd):
    data = StoppingBatches(NumberedBatches(), 2, "signal")
    assert run(tmp_path, loss_with(), data, rate=lambda n: 0.5**n).interrupted
    run(tmp_path, loss_with(), resume=True, rate=lambda n: 0.5**n, steps=4)
    assert "learning rate" not in capfd.readouterr().err
    run(tmp_path, loss_with(), resume=True, rate=lambda n: 0.25**n, steps=6)
    assert "step 4: the next learning rate is 0.00390625, and it was 0.0625 when" in capfd.readouterr().err


def test_resuming_a_complete_run_removes_temporary_files_and_sums_its_time(finished_run):
    leftovers = [finished_run / "checkpoints" / name for name in ("8.orbax-checkpoint-tmp-1", "3.deleted")]
    for path in leftovers:
        (path / "state").mkdir(parents=True)
    resumed = run(finished_run, loss_with(), resume=True, steps=8)
    assert not any(path.exists() for path in leftovers)
    assert resumed.earlier_seconds > 0.0
    assert resumed.tokens == 8 * 2 * 4
    longer = run(finished_run, loss_with(), resume=True, steps=12)
    assert longer.tokens == 12 * 2 * 4
    assert run(finished_run, loss_with(), resume=True, steps=12).earlier_seconds > resumed.earlier_seconds


def test_an_incomplete_line_of_the_metrics_is_removed(finished_run):
    path = finished_run / "metrics.jsonl"
    earlier_records = read_metrics(path)
    with path.open("a") as file:
        file.write('{"step": 99, "lo')
    run(finished_run, loss_with(), resume=True, steps=earlier_records[-1]["step"])
    records = read_metrics(path)
    assert records[:-1] == earlier_records
    assert records[-1]["event"] == "resumed"
