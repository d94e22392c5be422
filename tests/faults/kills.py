"""Kill training runs at random times and resume them until they end. The results must equal those of a run without
kills."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.faults.faults import Fault

ROOT = Path(__file__).parents[2]
EXPECTED = "the run can be resumed, and ends with the weights and losses of a run without kills"
SETTINGS = shlex.split(
    "--model.set num_layers=1 num_heads=2 embed_dim=16 --training.steps 12 --training.batch-size 4 "
    "--training.sequence-length 16 --training.evaluate-every 4 --training.checkpoint-every 3 "
    "--training.evaluation-batches 1 --optimizer.warmup-steps 2 --sample-tokens 8 --prompt T --data"
)


def start(run: Path, text: Path, cache: Path) -> subprocess.Popen[bytes]:
    """Start a process that begins the run, or resumes it if it has a ``config.json``."""
    is_resumed = (run / "config.json").is_file()
    arguments = ["--resume", str(run)] if is_resumed else [*SETTINGS, str(text), "--output", str(run)]
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip
    with (run.parent / "output.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.text_generation", *arguments],
            cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip


def results(run: Path) -> tuple[bytes, dict[int, float]]:
    """Return the bytes of the exported weights, and the last logged loss of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return (run / "model/model.safetensors").read_bytes(), losses


def kills(directory: Path, count: int, seed: int = 0) -> Iterator[Fault]:
    """Kill runs ``count`` times with SIGKILL at random times. Resume each run until it ends."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    random, cache, text = np.random.default_rng(seed), directory / "cache", directory / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 60, encoding="utf-8")
    for _ in range(2):  # the second run uses the compilation cache, like all later runs
        shutil.rmtree(directory / "without-kills", ignore_errors=True)
        start_time = time.perf_counter()
        if start(directory / "without-kills", text, cache).wait() != 0:
            raise RuntimeError(f"the run without a kill failed: see {directory / 'output.log'}")
        seconds = time.perf_counter() - start_time
    expected = results(directory / "without-kills")
    num_kills, number = 0, 0
    while num_kills < count:
        run, kill_times, number = directory / f"run-{number}", list[float](), number + 1
        while True:
            process = start(run, text, cache)
            delay = float(random.uniform(0.0, 1.1 * seconds)) if num_kills + len(kill_times) < count else 60.0 * seconds
            try:
                status = process.wait(timeout=delay)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kill_times.append(delay)
        outcome = "the same weights and losses" if status == 0 else f"a resumed run ended with status {status}"
        passed = status == 0
        if passed:
            weights, losses = results(run)
            # A resumed process logs each of its first steps, so a resumed run can have more records.
            differing = [step for step, loss in expected[1].items() if losses.get(step) != loss]
            if weights != expected[0]:
                outcome, passed = "other weights", False
            elif differing:
                outcome, passed = f"other losses, or none, of steps {differing}", False
        for delay in kill_times:
            yield Fault("SIGKILL", f"after {delay:.1f} s of run {number - 1}", EXPECTED, outcome, passed)
        num_kills += len(kill_times)
        if passed:
            shutil.rmtree(run)
