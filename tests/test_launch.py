"""Scripts for rented machines, run here with a ``gcloud`` that writes down what it is asked for."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import text_generation
from jaxlm import cli, config, launch
from jaxlm.launch import script

COMMAND = ["python", "-m", "benchmarks.training", "--json", "results/it's.json"]


def executed(text: str, directory: Path, failing: str = "no such word") -> tuple[int, list[list[str]]]:
    """Status of the script, and the arguments of every call of a program that would leave this machine."""
    log = directory / "log"
    for program in ("gcloud", "ssh", "scp", "git"):
        (directory / program).write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"open({str(log)!r}, 'a').write(repr([{program!r}, *sys.argv[1:]]) + '\\n')\n"
            f"sys.exit({failing!r} in sys.argv)\n"
        )
        (directory / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    status = subprocess.run(["bash", "-c", text], env=environment, cwd=directory, check=False).returncode
    return status, [eval(line) for line in log.read_text().splitlines()]


def test_a_tpu_is_created_used_and_deleted(tmp_path):
    status, calls = executed(script("v5e:2x4", COMMAND, zone="us-central1-a", name="mine", spot=True), tmp_path)
    assert status == 0
    words = [" ".join(call) for call in calls]
    assert words[0] == (
        "gcloud compute tpus tpu-vm create mine --zone=us-central1-a --accelerator-type=v5litepod-8 "
        "--version=v2-alpha-tpuv5-lite --spot"
    )
    assert words[-1] == "gcloud compute tpus tpu-vm delete mine --zone=us-central1-a --quiet"
    (run,) = [call[-1] for call in calls if "results/it" in call[-1]]
    # What arrives there is one argument, and means the command again when a shell there reads it.
    assert run.startswith("cd jaxlm && mkdir -p results && PATH=$HOME/venv/bin:$PATH python -m benchmarks.training")
    read = subprocess.run(
        ["bash", "-c", f"printf '%s|' {run.split('PATH ')[1]}"], capture_output=True, text=True, check=True
    )
    assert read.stdout.split("|")[:-1] == COMMAND


def test_a_tpu_is_deleted_also_when_something_fails(tmp_path):
    status, calls = executed(script("v6e:2x2", COMMAND, zone="z"), tmp_path, failing="scp")
    assert status != 0
    assert [call[4] for call in calls if call[0] == "gcloud"] == ["create", "scp", "delete"]


@pytest.mark.parametrize(
    ("topology", "type", "several"),
    [
        ("v4:2x2x1", "v4-8", False),
        ("v5p:2x2x2", "v5p-16", True),
        ("v5e:4x4", "v5litepod-16", True),
        ("v6e:8x8", "v6e-64", True),
    ],
)
def test_slices_of_several_hosts_join_them(topology, type, several):
    command = ["python", "-m", "experiments.text_generation", "--mesh", "data=8"]
    text = script(topology, command, zone="z")
    assert f"--accelerator-type={type} " in text
    assert ("python -m jaxlm.launch experiments.text_generation --mesh" in text) == several


def test_a_slice_of_several_hosts_is_measured_by_training_over_all_of_it():
    with pytest.raises(
        ValueError, match=r"benchmarks.training measures the devices of one process, and v5e:4x4 is sev"
    ):
        script("v5e:4x4", COMMAND, zone="z")
    (command,) = re.findall(r"python -m jaxlm.launch experiments.text_generation (.*)'", script("v5e:4x4", zone="z"))
    arguments = shlex.split(command)
    assert not set(";&|<>$'\"") & set(command)
    experiment, _ = config.parse(text_generation.PRESETS["gpt"], {}, arguments, program="test", description="")
    assert (experiment.mesh, experiment.training.batch_size) == ("data=16", 128)
    assert experiment.training.checkpoint_every is None
    assert experiment.output == Path("results/gpt2")
    model, _ = experiment.model.build(vocab_size=257, max_positions=1024)
    assert model.num_parameters == pytest.approx(124e6, rel=0.01)


def test_a_gpu_node_is_only_used(tmp_path):
    status, calls = executed(script("gpu", COMMAND, host="me@node"), tmp_path)
    assert status == 0
    assert [call[0] for call in calls] == ["git", "scp", "ssh", "ssh", "scp"]
    assert all("me@node" in " ".join(call) for call in calls[1:])


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        ("v9:2x2", {"zone": "z"}, "no topology is called 'v9:2x2': such as v4:2x2x2"),
        ("v5e:2x2x1", {"zone": "z"}, "no topology is called 'v5e:2x2x1'"),
        ("v5e:2x2", {}, "needs --zone"),
        ("v5e:2x2", {"zone": "z", "name": "Mine; rm -rf /"}, "must be of small letters"),
        ("gpu", {}, "needs --host user@machine"),
        ("gpu", {"host": "h", "zone": "z"}, "no zone"),
    ],
)
def test_what_cannot_be_meant_is_named(topology, options, message):
    with pytest.raises(ValueError, match=message):
        script(topology, COMMAND, **options)
    with pytest.raises(ValueError, match="the command must be python -m MODULE ..., got bash"):
        script("v5e:2x2", ["bash"], zone="z")


def test_the_command_prints_and_does_not_run(capsys):
    assert cli.main(["launch", "--topology", "v5e:2x2", "--zone", "z"]) == 1
    assert "jaxlm rents no machines: say --dry-run" in capsys.readouterr().err
    assert cli.main(["launch", "--topology", "v5e:2x2", "--zone", "z", "--dry-run"]) == 0
    default = ["python", "-m", "benchmarks.training", "--against", "", "--json", "results/training.json"]
    assert capsys.readouterr().out == script("v5e:2x2", default, zone="z")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: module"),
        (["--coordinator", "localhost:1", "m"], "--processes and --process are given together or not at all"),
        (["--coordinator", "localhost:1", "--processes", "2", "--process", "2", "m"], "--process 2 of 2: they are cou"),
    ],
)
def test_what_cannot_be_joined_is_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        launch.main(arguments)
    assert message in capsys.readouterr().err
