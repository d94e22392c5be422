"""Compare a run of two processes with two devices each to a run of one process with four devices.

The processes run this file as a program: ``python -m jaxlm.launch ... tests.test_processes WORK DIRECTORY``.
"""

import concurrent.futures
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm import processes
from jaxlm.adapt import LoRA
from jaxlm.checkpoint import Checkpointer
from jaxlm.data import Batches, ContiguousStreams, PackedDocuments, RandomWindows
from jaxlm.decoding import generate
from jaxlm.interop import peft
from jaxlm.interop.directory import write_json
from jaxlm.objectives import causal
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_close, assert_trees_equal, initial_params, tiny_model
from jaxlm.training.evaluation import Evaluator
from jaxlm.training.loop import Run, TrainingConfig, train
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.report import metric_curve, read_metrics
from jaxlm.training.trainer import Trainer

NUM_PROCESSES, NUM_DEVICES = 2, 4
STEPS, LENGTH, ROWS = 6, 16, 8
MESHES = {
    "fsdp": "data=2,fsdp=2",
    "tensor": "tensor=2,data=2",  # both processes have the same rows, and heads are split
    "stream": "data=4",
}
TIMEOUT = 240
"""Time limit of a run, in seconds."""


def program(
    what,
    directory,
    mesh,
    *,
    resume=False,
    batches=Batches,
    initial=None,
    devices=NUM_DEVICES,
    optimizer=None,
    **options,
):
    """Train a tiny model; every process of the run calls this."""
    sharding = Sharding(make_mesh(mesh, devices=jax.devices()[:devices]))
    model = tiny_model("lstm" if what == "stream" else "gpt")
    tokens = np.minimum(np.random.default_rng(0).geometric(0.1, 3000), 63).astype(np.int32)
    stream = (ROWS, LENGTH) if what == "stream" else None
    if what == "packed":
        documents = np.split(tokens, np.cumsum(np.random.default_rng(1).integers(2, 20, 250)))
        source = PackedDocuments([document for document in documents if len(document)], LENGTH, ROWS, seed=1)
    else:
        source = ContiguousStreams(tokens, LENGTH, ROWS) if stream else RandomWindows(tokens, LENGTH, ROWS, seed=1)
    rows = sharding.local_rows(ROWS)
    held_out = Batches(source, rows)
    optimizer = optimizer or OptimizerConfig(warmup_steps=2, learning_rate=1e-2)
    config = TrainingConfig(
        batch_size=ROWS, ema_decay=0.9,
        **{"steps": STEPS, "checkpoint_every": 2, "evaluate_every": 3, **options},
    )  # fmt: skip

    def to_batch(token_batch):
        return causal.batch(token_batch.tokens, reset=token_batch.reset, segment_ids=token_batch.segment_ids)

    held_out = [to_batch(next(held_out)) for _ in range(2)]
    evaluate = Evaluator(model, causal.loss, held_out, sharding=sharding, carry_size=stream)
    transformation = make_optimizer(optimizer, model.specs, STEPS)
    trainer = config.trainer(model, transformation, causal.loss, sharding=sharding, carry_size=stream)
    data = batches(source, rows, to_batch=to_batch)
    return model, train(trainer, data, evaluate, config, Run(directory, resume=resume), initial)


def initial_lstm_params():
    return initial_params(tiny_model("lstm"), 3)


class InterruptedBatches(Batches):
    """Batches whose iterator sends SIGINT to the last process at the fourth batch."""

    def __next__(self):
        if processes.is_first():
            time.sleep(0.01)  # so that the first process is behind the last one
        elif self.state()["next"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__next__()


def write_slowly(path, content):
    """``write_json`` after a second, so that a process that does not wait for the file does not find it."""
    time.sleep(1)
    write_json(path, content)


def work_together(directory):
    """The program of ``test_two_processes_train_like_one_process``: test ``call_in_first_process``, then train."""
    index = jax.process_index()
    assert processes.call_in_first_process(lambda: f"said by {index} é") == "said by 0 é"
    assert processes.call_in_first_process(lambda: "") == ""
    with pytest.raises(ValueError if index == 0 else RuntimeError, match="there is no room"):
        processes.call_in_first_process(lambda: (_ for _ in ()).throw(ValueError("there is no room")))
    with pytest.raises(ValueError, match="2 processes without a mesh would each train .* over all 4 devices"):
        train(Trainer(tiny_model("gpt"), None, None), None, None, TrainingConfig(), Run(directory))

    model, result = program("fsdp", directory / "fsdp", MESHES["fsdp"])
    embedding = result.state.params["token_embedding"]
    assert not embedding.is_fully_addressable
    jaxlm.save_pretrained(directory / "model", model, result.state.params)
    assert (directory / "model" / "model.safetensors").exists()  # also in the process that did not write the file
    lora = LoRA(2, full_training_patterns=("^position_embedding$",))
    trained, _ = lora.split(model.specs, result.state.params, jax.random.key(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft, "write_json", write_slowly)
        peft.save_adapter(directory / "adapter", model, lora, trained)
    assert (directory / "adapter" / "adapter_config.json").exists()
    assert processes.gather_to_host(embedding).shape == embedding.shape
    sharding = Sharding(make_mesh(MESHES["fsdp"]))
    prompts = np.arange(4 * 3, dtype=np.int32).reshape(4, 3)
    with sharding.scope():  # each process has half of the prompts
        rows = jax.tree.map(sharding.from_rows, (prompts[2 * index : 2 * index + 2], np.ones((2, 3), np.int32)))
        assert not rows[0].is_fully_addressable
        generation = generate(model, result.state.params, *rows, max_new_tokens=2)
    params = jax.tree.map(processes.gather_to_host, result.state.params)
    alone = generate(model, params, prompts, max_new_tokens=2)
    np.testing.assert_array_equal(processes.gather_to_host(generation.tokens), alone.tokens)
    local = jax.numpy.arange(3) + index
    assert processes.gather_to_host(local).tolist() == [
        index,
        index + 1,
        index + 2,
    ]  # an array of one process: no communication

    separate_directory = directory / f"of-{index}"
    with pytest.raises(
        ValueError, match="process 1 of 2 does not see the files of the first process in .*checkpoint_every=None"
    ):
        program("fsdp", separate_directory, MESHES["fsdp"])
    _, one_step = program("fsdp", separate_directory, MESHES["fsdp"], steps=1, checkpoint_every=None)
    assert int(one_step.state.step) == 1
    assert [path.name for path in separate_directory.iterdir()] == ["metrics.jsonl"] * (index == 0)

    program("fsdp", directory / "parts", MESHES["fsdp"], steps=4)
    program("fsdp", directory / "parts", MESHES["fsdp"], resume=True)
    program("tensor", directory / "tensor", MESHES["tensor"])
    program("stream", directory / "stream", MESHES["stream"], initial=initial_lstm_params())


def work_until_signalled(directory):
    _, result = program("fsdp", directory, MESHES["fsdp"], steps=1_000_000, batches=InterruptedBatches)
    print("stopped", result.interrupted, int(result.state.step), flush=True)


def launch(work, directory):
    """Run this file in all processes until they end; returns the standard output of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    flags += f" --xla_force_host_platform_device_count={NUM_DEVICES // NUM_PROCESSES}"
    command = [sys.executable, "-m", "jaxlm.launch", "--coordinator", coordinator, "--processes", str(NUM_PROCESSES)]
    running_processes = [
        subprocess.Popen(
            [*command, "--process", str(index), "tests.test_processes", work, str(directory)],
            cwd=Path(__file__).parents[1], env={**os.environ, "XLA_FLAGS": flags},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(NUM_PROCESSES)
    ]  # fmt: skip
    try:
        # Read from all processes at once: a process with a full pipe would block, and the other would wait for it.
        with concurrent.futures.ThreadPoolExecutor() as readers:
            outputs = list(readers.map(lambda process: process.communicate(timeout=TIMEOUT), running_processes))
    finally:
        for process in running_processes:
            process.kill()
    assert [process.returncode for process in running_processes] == [0] * NUM_PROCESSES, "\n\n".join(
        error for _, error in outputs
    )
    return [out for out, _ in outputs]


def restore_last(directory, state):
    """The last checkpoint, with the shardings of ``state`` in this process."""
    with Checkpointer(directory / "checkpoints") as checkpoints:
        restored_state, meta = checkpoints.restore(state)
        assert checkpoints.steps() == [4, 6]
    assert meta["data"]["next"] == STEPS
    return restored_state


@pytest.mark.thorough
def test_two_processes_train_like_one_process(tmp_path):
    """This is one test, so that the two processes start only once."""
    together = tmp_path / "together"
    together.mkdir()
    launch("together", together)
    for what, mesh in MESHES.items():
        _, alone = program(what, tmp_path / what, mesh, initial=initial_lstm_params() if what == "stream" else None)
        records = [read_metrics(directory / what / "metrics.jsonl") for directory in (tmp_path, together)]
        assert len(records[0]) == len(records[1])  # only one process writes a record
        for name in ("loss", "gradient_norm", "validation_loss", "weight"):
            (steps, want), (got_steps, got) = (metric_curve(record, name) for record in records)
            assert got_steps == steps
            np.testing.assert_allclose(got, want, rtol=1e-5)
        # The tolerance is large because Adam amplifies the rounding errors of very small gradients.
        state = restore_last(together / what, alone.state)
        assert_trees_close((state.params, state.ema), (alone.state.params, alone.state.ema), 1e-3)
        if what == "fsdp":
            assert_trees_equal(restore_last(together / "parts", alone.state), state)  # a resumed run is equal bitwise
            assert_trees_equal(jaxlm.load_pretrained(together / "model")[1], state.params)


def test_the_cause_of_a_failure_is_the_last_line_of_standard_error():
    stderr = processes._Stderr(io.BytesIO(), encoding="utf-8")
    for text in ("first\n", "prog: \x1b[31merror:\x1b[0m ", "disk", " full", "\n", "\n  \n"):
        stderr.write(text)
    assert stderr.last_line == "prog: error: disk full"
    stderr.write("step 3\rno line end")
    assert stderr.last_line == "no line end"


def test_errors_that_another_process_caused_are_not_logged():
    def record(exc_info):
        return logging.LogRecord("orbax", logging.ERROR, "file", 1, "message", None, exc_info)

    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: Connection closed by peer [127.0.0.1]:1234")
    assert processes._is_consequence(lost)
    assert not processes._keep_log_record(record((type(lost), lost, None)))
    error = OSError("disk full")
    for exc_info in ((type(error), error, None), None, False):
        assert processes._keep_log_record(record(exc_info))


def test_one_process_cannot_request_the_end_of_others():
    with pytest.raises(RuntimeError, match="request_end needs several processes"):
        processes.request_end()


@pytest.mark.thorough
def test_a_signal_to_one_process_ends_both_after_the_same_step(tmp_path):
    first, second = (re.search(r"stopped (\w+) (\d+)", out).groups() for out in launch("until_signalled", tmp_path))
    assert first[1] == second[1]
    assert (first[0], second[0]) == ("SIGTERM", "SIGINT")


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    {"together": work_together, "until_signalled": work_until_signalled}[sys.argv[1]](Path(sys.argv[2]))
