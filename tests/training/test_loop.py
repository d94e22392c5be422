"""The training loop with signals, kills, resumed runs and divergence."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm import integrity, spec
from jaxlm.adapt import Freeze
from jaxlm.checkpoint import Checkpointer, CorruptCheckpointError
from jaxlm.data import Batches, RandomWindows
from jaxlm.data.buckets import Bucketed
from jaxlm.nn.experts import load_balance_loss
from jaxlm.objectives import causal
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import (
    assert_trees_close,
    assert_trees_equal,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
)
from jaxlm.training.evaluation import Evaluator, bits_per_character, first_epoch
from jaxlm.training.experiment import ExperimentTraining
from jaxlm.training.loop import DivergedError, Run, TrainingConfig, _as_numbers, train
from jaxlm.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from jaxlm.training.report import draw_losses, metric_curve, read_metrics
from jaxlm.training.trainer import Trainer
from tests.training.cached_trainer import CachedTrainer

STEPS = 12


@functools.cache
def training_setup():
    model = tiny_model("gpt", num_layers=1, residual_dropout=0.1)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=2, learning_rate=1e-2), model.specs, STEPS)
    tokens = np.minimum(np.random.default_rng(0).geometric(0.1, 3000), 127).astype(np.int32)
    validation = Batches(RandomWindows(tokens, 16, 8, seed=9))
    evaluate = Evaluator(model, causal.loss, [to_batch(next(validation)) for _ in range(2)])
    return model, optimizer, tokens, evaluate


def to_batch(token_batch):
    return causal.batch(token_batch.tokens)


def run(directory, loss=causal.loss, data=None, **options):
    model, optimizer, tokens, evaluate = training_setup()
    config = {
        "steps": STEPS,
        "batch_size": 8,
        "evaluate_every": 6,
        "checkpoint_every": 4,
        **options,
    }
    resume, sharding = config.pop("resume", False), config.pop("sharding", None)
    initial, resume_directory = config.pop("initial", None), config.pop("resume_directory", None)
    directory.mkdir(exist_ok=True)
    config = TrainingConfig(**config)
    trainer = CachedTrainer(**vars(config.trainer(model, optimizer, loss, sharding=sharding)))
    data = data or Batches(RandomWindows(tokens, 16, 8, seed=1), to_batch=to_batch)
    named = Run(str(directory), {"note": "test"}, resume, resume_directory=resume_directory)
    return train(trainer, data, evaluate, config, named, initial)


def test_a_run_on_two_cpu_devices_equals_a_run_on_one(tmp_path):
    """Without dropout. The batches of four rows are split into two micro-batches on each device."""

    def train_on(count):
        _, _, tokens, evaluate = training_setup()
        model = tiny_model("gpt", num_layers=1)
        config = TrainingConfig(3, 8, grad_accum_steps=2, evaluate_every=3, checkpoint_every=None, cpu_devices=count)
        trainer = config.trainer(model, optax.adam(1e-2, eps=1e-3), causal.loss)
        data = Batches(RandomWindows(tokens, 16, 8, seed=1), to_batch=to_batch)
        return train(trainer, data, evaluate, config, Run(tmp_path / f"{count}"))

    one, two = train_on(1), train_on(2)
    assert_trees_close(two.params, one.params, 1e-4)
    assert two.validation_loss == pytest.approx(one.validation_loss, rel=1e-5)
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(two.params))


def test_cpu_devices_that_jax_does_not_have_raise_an_error(monkeypatch):
    model, config = tiny_model("gpt2-tiny"), TrainingConfig(batch_size=9, cpu_devices=9)
    with pytest.raises(
        ValueError, match=r'9 CPU devices, and JAX has 8: call jax.config.update\("jax_num_cpu_devices"'
    ):
        config.trainer(model, optax.sgd(0.1), causal.loss)
    with pytest.raises(ValueError, match="cpu_devices=9 has its own mesh over the CPU devices of one process"):
        config.trainer(model, optax.sgd(0.1), causal.loss, sharding=Sharding(make_mesh("data=8")))
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(platform="gpu")])
    with pytest.raises(ValueError, match="cpu_devices=9 is for a CPU, but JAX runs on a gpu: set it to 1"):
        config.trainer(model, optax.sgd(0.1), causal.loss)


@functools.cache
def uninterrupted(tmp):
    return run(tmp / "complete_run")


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    return uninterrupted(tmp_path_factory.getbasetemp())


class SignalBatches(Batches):
    """Batches that raise a signal while the batch of step ``at`` is drawn."""

    def __init__(self, source, at, signal_number):
        super().__init__(source, to_batch=to_batch)
        self.at, self.signal_number = at, signal_number

    def __next__(self):
        window = super().__next__()
        if self.state()["next"] == self.at:
            os.kill(os.getpid(), self.signal_number)
        return window


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_the_resumed_run_is_bitwise_equal(tmp_path, complete_run, capfd, signal_number):
    data = SignalBatches(RandomWindows(training_setup()[2], 16, 8, seed=1), 7, signal_number)
    handler = signal.getsignal(signal_number)
    interrupted = run(tmp_path, data=data, resume_directory=tmp_path.parent)
    assert interrupted.interrupted == signal_number.name
    assert int(interrupted.state.step) == 7
    assert signal.getsignal(signal_number) is handler
    message = capfd.readouterr().err.replace("\n", " ")
    assert f"{signal_number.name}: saved step 7 in {tmp_path / 'checkpoints'}; --resume {tmp_path.parent} " in message
    resumed = run(tmp_path, resume=True)
    assert_trees_equal(resumed.state, complete_run.state)
    assert resumed.validation_loss == complete_run.validation_loss
    steps, losses = metric_curve(read_metrics(tmp_path / "metrics.jsonl"), "loss")
    expected = metric_curve(read_metrics(tmp_path.parent / "complete_run" / "metrics.jsonl"), "loss")
    assert steps[-1] == STEPS
    assert dict(zip(steps, losses, strict=True))[STEPS] == expected[1][-1]


@pytest.mark.parametrize("where", ["evaluation", "step"])
def test_a_signal_before_or_during_an_evaluation_is_reported_at_once(tmp_path, capfd, where):
    model, optimizer, tokens, evaluate = training_setup()
    messages = []

    def signalling_evaluate(params):
        if where == "evaluation":
            os.kill(os.getpid(), signal.SIGINT)
        messages.append(capfd.readouterr().err.replace("\n", " "))
        return evaluate(params)

    config = TrainingConfig(steps=STEPS, batch_size=8, evaluate_every=3, checkpoint_every=None)
    source = RandomWindows(tokens, 16, 8, seed=1)
    data = SignalBatches(source, 3 if where == "step" else 99, signal.SIGINT)
    trainer = CachedTrainer(**vars(config.trainer(model, optimizer, causal.loss)))
    result = train(trainer, data, signalling_evaluate, config, Run(tmp_path))
    assert result.interrupted == "SIGINT"
    assert int(result.state.step) == 3
    (message,) = messages
    assert "SIGINT: the run ends after the evaluation of step 3; a second signal ends it now" in message


@pytest.mark.parametrize("checkpoint_every", [4, None])
def test_a_signal_during_the_last_step_ends_the_run_if_its_result_is_saved(tmp_path, complete_run, checkpoint_every):
    (tmp_path / "metrics.jsonl").write_text('{"step": 999, "loss": 1.0}\n')  # of another run
    data = SignalBatches(RandomWindows(training_setup()[2], 16, 8, seed=1), STEPS, signal.SIGINT)
    result = run(tmp_path, data=data, checkpoint_every=checkpoint_every)
    assert result.step == result.last_step == STEPS
    assert (result.interrupted, result.signal) == ((None, "SIGINT") if checkpoint_every is None else ("SIGINT", None))
    if checkpoint_every is not None:
        result = run(tmp_path, resume=True)
    assert (result.interrupted, result.validation) == (None, complete_run.validation)
    assert metric_curve(read_metrics(tmp_path / "metrics.jsonl"), "loss")[0][-1] == STEPS


@pytest.mark.parametrize("during", ["save", "restore"])
def test_a_signal_after_the_last_step_ends_the_run(tmp_path, complete_run, monkeypatch, during):
    method, is_resumed, synced = getattr(Checkpointer, during), during == "restore", []
    if is_resumed:
        shutil.copytree(tmp_path.parent / "complete_run", tmp_path, dirs_exist_ok=True)

    def signalling_method(self, *arguments, **options):
        if is_resumed or options["wait"]:
            os.kill(os.getpid(), signal.SIGTERM)
        if not is_resumed:
            assert synced[-1] == tmp_path / "metrics.jsonl", "metrics are on the disk before the checkpoint after them"
        return method(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, during, signalling_method)
        patch.setattr(integrity, "sync", synced.append)
        result = run(tmp_path, resume=is_resumed)
    assert (result.step, result.interrupted, result.validation) == (STEPS, "SIGTERM", None)
    result = run(tmp_path, resume=True)
    assert (result.interrupted, result.validation) == (None, pytest.approx(dict(complete_run.validation)))


KILLED = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_numpy_rank_promotion", "raise")
from tests.training import test_loop
test_loop.run(Path(sys.argv[1]), resume=sys.argv[2] == "resume", checkpoint_every=1)
"""


def test_a_run_resumed_after_sigkill_is_bitwise_equal(tmp_path, complete_run):
    """Kill the run at three moments. Most kills are during a save, because every step saves a checkpoint."""
    directory, resume = tmp_path / "killed", "fresh"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for seconds in (0.0, 0.05, 0.11):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(directory), resume], cwd=Path(__file__).parents[2],
            env={**os.environ, **cache}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        last_step = int(max(saved_steps(directory), default=0))
        while process.poll() is None and max(saved_steps(directory), default=0) <= last_step:
            time.sleep(0.002)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resume = "resume"
        if max(saved_steps(directory)) == STEPS:
            break
    resumed = run(directory, resume=True) if max(saved_steps(directory)) < STEPS else None
    assert resumed is not None, "the run ended before it could be killed: make it longer"
    assert_trees_equal(resumed.state, complete_run.state)


def saved_steps(directory):
    return [int(path.name) for path in (directory / "checkpoints").glob("*") if path.name.isdigit()]


@pytest.mark.thorough
def test_a_run_can_be_resumed_on_another_mesh(tmp_path, complete_run):
    run(tmp_path, data=SignalBatches(RandomWindows(training_setup()[2], 16, 8, seed=1), 6, signal.SIGTERM))
    resumed = run(tmp_path, resume=True, sharding=Sharding(make_mesh("fsdp=4,tensor=2")))
    assert resumed.state.params["token_embedding"].sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
    assert resumed.validation_loss == pytest.approx(complete_run.validation_loss, rel=1e-4)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "scan_layers"), [("adamw", False), ("adafactor", True), ("optax", False)])
def test_a_run_can_be_resumed_in_the_other_layer_layout(tmp_path, monkeypatch, name, scan_layers):
    """Convert parameters, moments and EMA. This works with any Optax optimizer that is elementwise."""

    @functools.cache
    def model_and_optimizer(scan_layers):
        model = tiny_model("gpt", num_layers=2, scan_layers=scan_layers)
        if name == "optax":
            masked = optax.masked(optax.adamw(1e-2, eps=1e-3), spec.decay_mask(model.specs))
            return model, optax.chain(optax.clip(1.0), masked)
        return model, make_optimizer(OptimizerConfig(name, 1e-2, warmup_steps=2, epsilon=1e-3), model.specs, STEPS)

    def resume_with(scan_layers, steps):
        setup = (*model_and_optimizer(scan_layers), *tokens_and_evaluate)
        monkeypatch.setattr(sys.modules[__name__], "training_setup", lambda: setup)
        return run(tmp_path / str(scan_layers), resume=True, steps=steps, ema_decay=0.5)

    # The evaluation of the parameters is not the subject.
    tokens_and_evaluate = training_setup()[2], lambda params: {"loss": 0.0}
    reference = resume_with(scan_layers, 4)
    resume_with(not scan_layers, 2)
    (tmp_path / str(scan_layers)).rename(tmp_path / "reference")
    (tmp_path / str(not scan_layers)).rename(tmp_path / str(scan_layers))
    continued = resume_with(scan_layers, 4)
    assert jax.tree.structure(continued.state) == jax.tree.structure(reference.state)
    # The gradients of key biases are rounding errors, which Adafactor scales to updates of the usual size.
    expected, actual = (
        {path: leaf for path, leaf in spec.flatten((state.params, state.ema)).items() if "qkv/bias" not in path}
        for state in (reference.state, continued.state)
    )
    assert_trees_close(actual, expected, 1e-4)


@pytest.mark.thorough
def test_an_optimizer_state_without_another_layout_is_rejected(tmp_path, monkeypatch):
    """``optax.adafactor`` factors the stacked array. Its statistics cannot be converted to statistics of layers."""
    tokens_and_evaluate = training_setup()[2], lambda params: {"loss": 0.0}
    optimizer = optax.adafactor(1e-2, min_dim_size_to_factor=2)

    def resume_with(scan_layers, steps):
        model = tiny_model("gpt", num_layers=2, scan_layers=scan_layers)
        monkeypatch.setattr(sys.modules[__name__], "training_setup", lambda: (model, optimizer, *tokens_and_evaluate))
        return run(tmp_path / "run", resume=True, steps=steps)

    resume_with(True, 2)
    with pytest.raises(ValueError, match=r"the target and the checkpoint .* do not match"):
        resume_with(False, 4)
    assert int(resume_with(True, 4).state.step) == 4


def test_metrics_and_plot_of_a_run(tmp_path, complete_run):
    """The metrics have the logged steps and the result of the run, and can be drawn."""
    directory = tmp_path.parent / "complete_run"
    records = read_metrics(directory / "metrics.jsonl")
    steps, losses = metric_curve(records, "loss")
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12]
    assert losses[-1] < losses[0]
    assert metric_curve(records, "validation_loss")[0] == [6, 12]
    assert metric_curve(records, "validation_loss")[1][-1] == complete_run.validation_loss
    assert all(record["weight"] == 8 * 16 for record in records if "weight" in record)
    draw_losses(directory / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    assert read_metrics(directory / "metrics.jsonl") == records


def test_divergence_stops_the_run_with_a_reason(tmp_path):
    def explode(model, params, batch, *, key=None, state=None):
        total, weight, _ = causal.loss(model, params, batch, key=key)
        return total * np.float32(np.inf), weight, None

    with pytest.raises(
        DivergedError, match=r"step 3: 3 steps in a row had a loss or gradient that is not finite .*Lower"
    ):
        run(tmp_path, loss=explode, max_skipped_in_a_row=3)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[0]["loss"] is None
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["skipped"] == 3.0


@pytest.mark.thorough
def test_nonfinite_weights_are_never_saved(tmp_path):
    model, _, tokens, evaluate = training_setup()

    def rate(count):  # a faulty schedule: loss and gradient are finite, but the new weights are not
        return jnp.where(count < 6, 1e-3, jnp.nan)

    config = TrainingConfig(STEPS, 8, evaluate_every=100, checkpoint_every=1, keep_last=1)
    trainer = config.trainer(model, optax.sgd(rate), causal.loss)
    data = Batches(RandomWindows(tokens, 16, 8, seed=1), to_batch=to_batch)
    with pytest.raises(DivergedError, match=r"step 7: the weights are not finite.*last scheduled checkpoint .* step 6"):
        train(trainer, data, evaluate, config, Run(tmp_path))
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [6]


def test_initial_parameters_are_not_modified(tmp_path):
    model, _, _, evaluate = training_setup()
    params = initial_params(model, 5)
    params_copy = jax.tree.map(np.array, params)
    result = run(tmp_path, initial=params)
    assert_trees_equal(params, params_copy)
    assert result.validation_loss < evaluate(params)["loss"]
    assert relative_error(result.state.params["final_norm"]["scale"], params["final_norm"]["scale"]) > 0


def test_resuming_a_complete_run_returns_its_result(tmp_path, complete_run, capfd):
    directory = tmp_path / "copy"
    shutil.copytree(tmp_path.parent / "complete_run", directory)
    resumed = run(directory, resume=True)
    assert "the training is complete" in capfd.readouterr().err
    assert_trees_equal(resumed.params, complete_run.params)
    assert resumed.validation == pytest.approx(dict(complete_run.validation))
    assert (resumed.step, resumed.interrupted) == (STEPS, None)
    metrics = (directory / "metrics.jsonl").read_bytes()
    with pytest.raises(
        ValueError, match=rf"of step {STEPS}, beyond training.steps=5: set training.steps to at least {STEPS}"
    ):
        run(directory, resume=True, steps=5)
    assert (directory / "metrics.jsonl").read_bytes() == metrics, "a failed start changes nothing"


def test_a_resumed_run_evaluates_its_last_step_if_the_checkpoint_was_not_evaluated(tmp_path, complete_run):
    directory = tmp_path / "copy"
    shutil.copytree(tmp_path.parent / "complete_run", directory)
    shutil.rmtree(directory / "checkpoints" / str(STEPS))
    result = run(directory, resume=True, steps=8)
    assert (result.step, result.interrupted) == (8, None)
    assert result.validation == training_setup()[3](result.params)
    assert metric_curve(read_metrics(directory / "metrics.jsonl"), "validation_loss")[0] == [6, 8]


def test_resuming_a_run_without_a_checkpoint_starts_at_step_0(tmp_path, complete_run, capfd):
    (tmp_path / "run").mkdir()
    # The run was killed while it wrote the second line. The first line is of a step that the new run does not have.
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 999, "loss": 1.0}\n{"step": 1, "lo')
    result = run(tmp_path / "run", resume=True)
    assert "there is no checkpoint yet: the run starts from its first step\n" in capfd.readouterr().err
    assert metric_curve(read_metrics(tmp_path / "run" / "metrics.jsonl"), "loss")[0][-1] == STEPS
    assert_trees_equal(result.params, complete_run.params)


def test_a_damaged_checkpoint_is_skipped_only_on_request(tmp_path, complete_run):
    directory = tmp_path / "copy"
    shutil.copytree(tmp_path.parent / "complete_run", directory)
    (directory / "checkpoints" / str(STEPS) / "record" / "metadata").write_text("{}")
    with pytest.raises(CorruptCheckpointError, match="the newest intact step before it is 8"):
        run(directory, resume=True)
    with pytest.raises(FileExistsError, match="has checkpoints of another run"):
        run(directory)
    result = run(directory, resume=True, on_corrupt="previous")
    assert_trees_equal(result.params, complete_run.params)


def test_a_run_directory_is_locked_by_one_process(tmp_path):
    with integrity.lock_directory(tmp_path), pytest.raises(BlockingIOError, match="is in use by another process"):
        run(tmp_path)
    with integrity.lock_directory(tmp_path):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"ema_decay": 1.5}, "ema_decay=1.5"),
        ({"ema_decay": 0}, "ema_decay=0 must be between 0 and 1, or None"),
        ({"batch_size": 8, "grad_accum_steps": 3}, "grad_accum_steps=3 does not divide batch_size=8"),
        (
            {"batch_size": 12, "grad_accum_steps": 2, "cpu_devices": 4},
            r"cpu_devices=4 does not divide the 6 rows of a micro-batch \(batch_size / grad_accum_steps\)",
        ),
        ({"cpu_devices": 0}, "cpu_devices=0 must be at least 1"),
        ({"max_rollbacks": -1}, "max_rollbacks=-1 must be at least 0"),
        ({"max_rollbacks": 1, "checkpoint_every": None}, "max_rollbacks=1 needs checkpoints"),
        ({"spike_deviations": 0.0}, "spike_deviations=0.0 must be positive, or None"),
        ({"spike_deviations": 0}, "spike_deviations=0 must be positive, or None"),
        ({"seed": -1}, "^seed=-1 must be from 0 to 4294967295"),
        ({"seed": 2**32}, "^seed=4294967296 must be from 0 to 4294967295"),
    ],
)
def test_bad_training_configs_raise_an_error_with_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 999}, "batch_size=999, but the data have batches of 8 rows: set batch_size=8"),
        ({"ema_decay": 0.9}, r"ema_decay=0.9, but the trainer has ema_decay=None: .* with config.trainer\(...\)"),
        ({"batch_size": 8, "grad_accum_steps": 4}, "grad_accum_steps=4, but the trainer has grad_accum_steps=1"),
        ({"spike_deviations": 6.0}, "spike_deviations=6.0, but the trainer has spike_deviations=None"),
        ({"cpu_devices": 2}, r"cpu_devices=2, but the trainer uses 1 device\(s\) with shard_map"),
    ],
)
def test_settings_that_contradict_the_trainer_or_the_data_are_errors_before_the_first_step(tmp_path, change, message):
    model, optimizer, tokens, evaluate = training_setup()
    trainer = Trainer(model, optimizer, causal.loss)
    data = Batches(RandomWindows(tokens, 16, 8, seed=1), to_batch=to_batch)
    with pytest.raises(ValueError, match=f"the config has {message}"):
        train(trainer, data, evaluate, TrainingConfig(steps=2, **change), Run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_settings_that_only_experiments_use_are_not_settings_of_train():
    for name, value in {"sequence_length": 77, "evaluation_batches": 7, "tracker": "tensorboard"}.items():
        with pytest.raises(TypeError, match=name):
            TrainingConfig(**{name: value})
        assert getattr(ExperimentTraining(**{name: value}), name) == value
    with pytest.raises(ValueError, match="evaluation_batches=1048577 is too large"):
        ExperimentTraining(evaluation_batches=2**20 + 1)


def test_reserved_keys_of_the_metadata_raise_an_error():
    with pytest.raises(ValueError, match="meta has the key 'model', which is reserved for values .*: rename it"):
        Run("run", {"note": "test", "model": "gpt"})


def test_metadata_that_is_not_json_raises_an_error_before_the_first_step():
    with pytest.raises(TypeError, match=r"meta\['rate'\] is .* of type float32: JSON has no such type"):
        Run("run", {"rate": np.float32(1.0)})


def test_the_directory_of_a_run_is_a_path():
    assert Run("run").directory == Path("run")


def test_the_evaluation_is_a_mean_over_tokens():
    model, _, tokens, _ = training_setup()
    params = initial_params(model)
    long, short = causal.batch(tokens[:60].reshape(4, 15)), causal.batch(tokens[100:106].reshape(2, 3))
    loss = jax.jit(lambda params: [causal.loss(model, params, batch)[:2] for batch in (long, short)])
    totals = loss(params)
    expected = sum(float(total) for total, _ in totals) / sum(float(weight) for _, weight in totals)
    assert Evaluator(model, causal.loss, [long, short])(params)["loss"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="at least one batch"):
        Evaluator(model, causal.loss, [])
    with pytest.raises(ValueError, match="the batches are only padding"):
        Evaluator(model, causal.loss, [with_zero_weights(long)])(params)


def test_an_evaluation_has_each_row_of_an_epoch_at_most_once():
    source = RandomWindows(np.arange(16 * 11 + 1), 16, 4, seed=3, stride=16)
    for max_batches, num_batches, num_rows in ((9, 3, 11), (3, 3, 11), (2, 2, 8)):
        parts = [first_epoch(Batches(source, rows, to_batch=to_batch), max_batches) for rows in ([0, 1], [2, 3])]
        assert [len(batches) for batches in parts] == [num_batches] * 2
        weighted = [batch.targets[batch.weights > 0] for batches in parts for batch in batches]
        assert len(np.unique(np.concatenate(weighted))) == sum(map(len, weighted)) == 16 * num_rows


def with_zero_weights(batch):
    return causal.Batch(batch.tokens, batch.targets, np.zeros_like(batch.weights))


def test_bits_per_character():
    """Bits per character are bits per token times tokens per character."""
    assert bits_per_character(np.log(2.0), 100, 100) == pytest.approx(1.0)
    assert bits_per_character(np.log(2.0), 100, 400) == pytest.approx(0.25)


def scripted_evaluate(values):
    """Return an evaluation function. Its ``score`` is the next of ``values`` and does not depend on the parameters."""
    remaining = iter(values)
    return lambda params: {"loss": 1.0, "score": next(remaining)}


def test_training_stops_early_and_restores_the_best_weights(tmp_path, capfd, monkeypatch):
    model, optimizer, tokens, _ = training_setup()
    best = {"best_metric": "score", "best_mode": "max", "restore_best": True, "evaluate_every": 2}
    evaluate = scripted_evaluate([0.1, 0.7, 0.5, 0.6, 0.2, 0.3])
    monkeypatch.setattr(sys.modules[__name__], "training_setup", lambda: (model, optimizer, tokens, evaluate))
    result = run(tmp_path / "stops", checkpoint_every=100, patience=2, **best)
    assert (result.step, int(result.state.step), result.last_step) == (4, 4, 8)
    assert result.validation == {"loss": 1.0, "score": 0.7}
    messages = capfd.readouterr().err
    assert "step 8: score has not improved in 2 evaluations: training stops" in messages
    assert "using the weights of step 4, which has the best score of all saved steps" in messages
    assert sorted(saved_steps(tmp_path / "stops")) == [4, 8]
    assert metric_curve(read_metrics(tmp_path / "stops" / "metrics.jsonl"), "validation_score") == (
        [2, 4, 6, 8],
        [0.1, 0.7, 0.5, 0.6],
    )
    restore = Checkpointer.restore

    def signalling_restore(self, *arguments, best=False, **options):
        if best:
            os.kill(os.getpid(), signal.SIGINT)
        return restore(self, *arguments, best=best, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "restore", signalling_restore)
        interrupted = run(tmp_path / "stops", resume=True, checkpoint_every=100, patience=2, **best)
    assert (interrupted.interrupted, interrupted.validation) == ("SIGINT", None)
    (tmp_path / "stops" / "checkpoints" / "4" / "record" / "metadata").write_text("{}")
    last = run(tmp_path / "stops", resume=True, checkpoint_every=100, patience=2, **best)
    assert (last.step, last.validation["score"]) == (8, 0.6)
    message = capfd.readouterr().err.replace("\n", " ")
    assert "an earlier evaluation had a better score, but its weights were not saved, or are damaged: " in message
    # The count of evaluations without improvement survives an interruption.
    monkeypatch.setattr(
        sys.modules[__name__], "training_setup", lambda: (model, optimizer, tokens, scripted_evaluate([0.1, 0.7, 0.5]))
    )  # fmt: skip
    data = SignalBatches(RandomWindows(tokens, 16, 8, seed=1), 7, signal.SIGTERM)
    assert run(tmp_path / "cut", data=data, checkpoint_every=100, patience=2, **best).interrupted == "SIGTERM"
    monkeypatch.setattr(
        sys.modules[__name__], "training_setup", lambda: (model, optimizer, tokens, scripted_evaluate([0.6, 0.9]))
    )
    resumed = run(tmp_path / "cut", resume=True, checkpoint_every=100, patience=2, **best)
    assert resumed.step == 4
    assert_trees_equal(resumed.params, result.params)


def test_a_run_whose_best_weights_are_damaged_returns_the_last_weights(tmp_path, capfd, monkeypatch):
    model, optimizer, tokens, _ = training_setup()
    evaluate = scripted_evaluate([0.7, 0.1])
    monkeypatch.setattr(sys.modules[__name__], "training_setup", lambda: (model, optimizer, tokens, evaluate))
    options = {"best_metric": "score", "best_mode": "max", "steps": 4, "evaluate_every": 2, "checkpoint_every": 2}
    assert run(tmp_path, restore_best=True, **options).step == 2
    files = [path for path in (tmp_path / "checkpoints" / "2" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    last = run(tmp_path, resume=True, restore_best=True, **options)
    assert (last.step, last.validation["score"]) == (4, 0.1)
    message = capfd.readouterr().err.replace("\n", " ")
    assert "an earlier evaluation had a better score, but its weights were not saved, or are damaged: " in message
    assert_trees_equal(last.params, run(tmp_path, resume=True, **options).params)


@pytest.mark.parametrize(("score", "step"), [(0.9, 5), (0.2, 4)])
def test_the_evaluation_of_an_interrupted_last_step_may_be_the_best(tmp_path, monkeypatch, score, step):
    model, optimizer, tokens, _ = training_setup()
    options = {"best_metric": "score", "best_mode": "max", "restore_best": True, "evaluate_every": 2}
    evaluate = scripted_evaluate([0.1, 0.7, score])
    monkeypatch.setattr(sys.modules[__name__], "training_setup", lambda: (model, optimizer, tokens, evaluate))
    data = SignalBatches(RandomWindows(tokens, 16, 8, seed=1), 5, signal.SIGTERM)
    assert run(tmp_path, data=data, checkpoint_every=100, **options).interrupted == "SIGTERM"
    result = run(tmp_path, resume=True, steps=5, checkpoint_every=100, **options)
    assert (result.step, result.validation["score"]) == (step, max(score, 0.7))


def test_best_mode_and_ema_cannot_change_and_a_directory_has_one_run(tmp_path):
    data = SignalBatches(RandomWindows(training_setup()[2], 16, 8, seed=1), 3, signal.SIGTERM)
    assert run(tmp_path, data=data).interrupted == "SIGTERM"
    with pytest.raises(ValueError, match="best_mode=max cannot change in a resumed run"):
        run(tmp_path, resume=True, best_mode="max")
    with pytest.raises(ValueError, match=r"ema_decay=0.5 cannot change .* \(saved value: None\): set it to None"):
        run(tmp_path, resume=True, ema_decay=0.5)
    with pytest.raises(FileExistsError, match="has checkpoints of another run"):
        run(tmp_path)


def test_an_unknown_best_metric_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match="best_metric='bleu' is not among the validation metrics loss: choose one"):
        run(tmp_path, best_metric="bleu")
    with pytest.raises(ValueError, match="restore_best=True needs checkpoints"):
        TrainingConfig(restore_best=True, checkpoint_every=None)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "evaluate returned None: return a dict"),
        ({"loss": 1.0, "bleu": "12"}, "evaluate returned bleu='12': return one number for each metric"),
        ({"loss": np.ones(2)}, "evaluate returned loss=array.*: return one number"),
    ],
)
def test_metrics_that_are_not_numbers_raise_an_error(metrics, message):
    with pytest.raises(TypeError, match=message):
        _as_numbers(metrics)


def test_an_evaluation_may_return_scalars_of_numpy_and_jax(tmp_path):
    model, optimizer, tokens, _ = training_setup()
    config = TrainingConfig(6, 8, evaluate_every=6, checkpoint_every=6, spike_deviations=6.0)
    trainer = CachedTrainer(**vars(config.trainer(model, optimizer, causal.loss)))
    data = Batches(RandomWindows(tokens, 16, 8, seed=1), to_batch=to_batch)
    metrics = {"loss": jnp.float32(0.5), "bleu": np.int64(3), "ratio": np.float32(0.25),
               "half": jnp.bfloat16(0.5), "solved": True}  # fmt: skip
    result = train(trainer, data, lambda params: metrics, config, Run(tmp_path / "run"))
    assert result.validation == {"loss": 0.5, "bleu": 3.0, "ratio": 0.25, "half": 0.5, "solved": 1.0}
    assert jax.tree.structure(result.state) == jax.tree.structure(trainer.abstract())
    with pytest.raises(ValueError, match="parameters of gpt do not match"):
        train(trainer, data, lambda params: metrics, config, Run(tmp_path / "other"), {"zz": jnp.ones(3)})


def test_trackers_receive_records_and_the_metrics_have_rates(tmp_path, monkeypatch):
    class Recorder:
        def __init__(self):
            self.records = []

        def log(self, step, values):
            self.records.append((step, dict(values)))

        def close(self):
            pass

    model, optimizer, tokens, evaluate = training_setup()
    config = TrainingConfig(steps=3, batch_size=8, evaluate_every=3, checkpoint_every=None)
    schedule = learning_rate(OptimizerConfig(warmup_steps=2, learning_rate=1e-2), STEPS)
    trainer = config.trainer(model, optimizer, causal.loss, learning_rate=schedule)
    tracker = Recorder()
    data = Batches(RandomWindows(tokens, 16, 8, seed=1), to_batch=to_batch)
    result = train(trainer, data, evaluate, config, Run(tmp_path, trackers=(tracker,)))
    assert [step for step, _ in tracker.records] == [1, 2, 3, 3]
    assert tracker.records[-1][1] == {"validation_loss": result.validation_loss}
    records = read_metrics(tmp_path / "metrics.jsonl")
    rates = [record["learning_rate"] for record in records[:3]]
    np.testing.assert_allclose(rates, [1e-2 / 3, 2e-2 / 3, 1e-2], rtol=1e-6)
    assert all((record["tokens"], record["examples"]) == (8 * 16, 8) for record in records[:3])
    assert records[2]["examples_per_second"] * 16 == pytest.approx(records[2]["tokens_per_second"])
    assert result.compilations == 1
    assert repr(result).startswith("Result(step=3, validation={'loss': ")


def test_each_bucket_is_compiled_once(tmp_path, capfd):
    model, optimizer, _, evaluate = training_setup()
    rng = np.random.default_rng(0)
    encoded = [{"tokens": rng.integers(0, 99, rng.integers(4, 40))} for _ in range(64)]
    source = Bucketed(encoded, 8, num_buckets=2)

    def bucket_to_batch(rows):
        return causal.batch(rows.fields["tokens"], rows.segment_ids("tokens"))

    config = TrainingConfig(steps=8, batch_size=8, evaluate_every=8, checkpoint_every=None)
    trainer = config.trainer(model, optimizer, causal.loss)
    result = train(trainer, Batches(source, to_batch=bucket_to_batch, prefetch=1), evaluate, config, Run(tmp_path))
    assert result.compilations == len(source.buckets) == 2
    assert "compiling for a new batch shape, number 2" in capfd.readouterr().err


def test_a_trainer_from_an_optimizer_config_equals_one_from_an_optimizer():
    model, config, optimizer = (
        training_setup()[0],
        TrainingConfig(steps=6),
        OptimizerConfig("sgd", 0.01, warmup_steps=2),
    )
    adaptation = Freeze(("embedding",))
    specs = adaptation.specs(model.specs)
    assert spec.count(specs) < spec.count(model.specs)
    trainer = config.trainer(model, optimizer, causal.loss, adaptation=adaptation)
    expected = config.trainer(model, make_optimizer(optimizer, specs, 6), causal.loss, adaptation=adaptation)
    assert jax.tree.structure(trainer.abstract().optimizer) == jax.tree.structure(expected.abstract().optimizer)
    assert expected.learning_rate is None
    assert [float(trainer.learning_rate(step)) for step in (0, 2)] == pytest.approx([0.01 / 3, 0.01])
    with pytest.raises(ValueError, match="warmup_steps=6 must be fewer than the 6 steps"):
        config.trainer(model, OptimizerConfig(warmup_steps=6), causal.loss)


@pytest.mark.thorough
def test_the_terms_of_a_loss_are_metrics_of_an_evaluation():
    model = tiny_model("mixtral-tiny")
    params, batch = initial_params(model), causal.batch(random_tokens(model, 4, 9))
    plain = Evaluator(model, causal.loss, [batch])(params)
    evaluate = Evaluator(model, {"nats": causal.loss, "loss": causal.loss_with_load_balance(0.5)}, [batch, batch])
    assert evaluate.names == ("nats", "loss", "load_balance_loss", "router_z_loss")
    values = evaluate(params)
    assert set(values) == set(evaluate.names)
    assert values["nats"] == pytest.approx(plain["loss"], rel=1e-6)
    assert values["loss"] == pytest.approx(values["nats"] + 0.5 * values["load_balance_loss"], rel=1e-6)
    balance_loss = jax.jit(lambda params: load_balance_loss(model.apply_with_routing(params, batch.tokens)[2]))
    assert values["load_balance_loss"] == pytest.approx(float(balance_loss(params)), rel=1e-5)
    losses = {"loss": causal.loss_with_load_balance(0.5), "router_z_loss": causal.loss}
    with pytest.raises(ValueError, match="two metrics have the name 'router_z_loss': rename one"):
        Evaluator(model, losses, [batch])
    extra = {"extra_metrics": lambda params: {"bleu": 1.0, "loss": 0.0}}
    with pytest.raises(ValueError, match="two metrics have the name 'loss': rename one"):
        Evaluator(model, causal.loss, [batch], **extra, extra_metric_names=("bleu", "loss"))
    with pytest.raises(ValueError, match="extra_metrics returns 'loss', which is the name of another metric: rename"):
        Evaluator(model, causal.loss, [batch], **extra)(params)
    with pytest.raises(ValueError, match=r"extra_metric_names=\('bleu',\) needs extra_metrics"):
        Evaluator(model, causal.loss, [batch], extra_metric_names=("bleu",))
