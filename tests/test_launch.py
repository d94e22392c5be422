"""Scripts for rented machines, run here with a ``gcloud`` that writes down what it is asked for."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm import cli
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
    text = script(topology, COMMAND, zone="z")
    assert f"--accelerator-type={type} " in text
    assert ("python -m jaxlm.launch benchmarks.training" in text) == several


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


def test_hosts_are_joined_before_the_module_runs(tmp_path):
    """Two processes of one device each."""
    (tmp_path / "shown.py").write_text(
        "import sys, jax\nprint(sys.argv, jax.process_count(), jax.process_index(), len(jax.devices()))\n"
    )
    code = (
        "import sys, functools, jax; from jaxlm import launch\n"
        "port, index = sys.argv[1:]\n"
        "join = jax.distributed.initialize\n"
        "jax.distributed.initialize = functools.partial(join, f'localhost:{port}', 2, int(index))\n"
        "launch.main(['shown', '--flag'])\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}",
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
    }
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, port, str(index)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for index in range(2)
    ]
    shown = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert shown == [f"['{tmp_path / 'shown.py'}', '--flag'] 2 {index} 2" for index in range(2)]
