"""Tests of scripts for rented machines (with fake ``gcloud``, ``ssh``, ``scp`` and ``git``), local processes and their
restarts, and the relay of JAX's report of a lost process."""

import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import text_generation
from jaxlm import cli, command_line, launch, stderr_relay
from jaxlm.launch import run_local, script

COMMAND = ["python", "-m", "benchmarks.training", "--json", "results/it's.json"]


def execute(text: str, directory: Path, *failing: str) -> tuple[int, list[list[str]]]:
    """Run a script with fake network programs; returns its status and the arguments of each call of these programs.

    A call with a word in ``failing`` fails. ``describe`` fails if the TPU does not exist.
    """
    log = directory / "log"
    for program in ("gcloud", "ssh", "scp", "git"):
        (directory / program).write_text(
            f"#!{sys.executable}\nimport sys\n"
            f"open({str(log)!r}, 'a').write(repr([{program!r}, *sys.argv[1:]]) + '\\n')\n"
            "if 'rev-parse' in sys.argv: print('..')\n"
            "if 'archive' in sys.argv: open('jaxlm.tar', 'w').close()\n"
            f"sys.exit(not set({failing!r}).isdisjoint(sys.argv))\n"
        )
        (directory / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    (directory / "subdirectory").mkdir(exist_ok=True)
    status = subprocess.run(
        ["bash", "-c", text], env=environment, cwd=directory / "subdirectory", check=False
    ).returncode
    assert not list(directory.rglob("*.tar")), "the script leaves no archive in the checkout"
    return status, [eval(line) for line in log.read_text().splitlines()]


def test_a_tpu_is_created_used_and_deleted(tmp_path):
    status, calls = execute(
        script("v5e:2x4", COMMAND, zone="us-central1-a", name="mine", spot=True), tmp_path, "describe"
    )
    assert status == 0
    words = [" ".join(call) for call in calls]
    assert words[2] == (
        "gcloud compute tpus tpu-vm create mine --zone=us-central1-a --accelerator-type=v5litepod-8 "
        "--version=v2-alpha-tpuv5-lite --spot"
    )
    assert words[-1] == "gcloud compute tpus tpu-vm delete mine --zone=us-central1-a --quiet"
    (run,) = [call[-1] for call in calls if "results/it" in call[-1]]
    # The remote shell gets the command as one argument and must parse it into the original words.
    assert run.startswith("cd jaxlm && mkdir -p results && PATH=$HOME/venv/bin:$PATH python -m benchmarks.training")
    parsed = subprocess.run(
        ["bash", "-c", f"printf '%s|' {run.split('PATH ')[1]}"], capture_output=True, text=True, check=True
    )
    assert parsed.stdout.split("|")[:-1] == COMMAND


def test_a_tpu_is_deleted_after_a_failure(tmp_path):
    for failing in ("create", "scp"):
        status, calls = execute(script("v6e:2x2", COMMAND, zone="z"), tmp_path, "describe", failing)
        assert status != 0
        assert [call[4] for call in calls if call[0] == "gcloud"][-2:] == [failing, "delete"]


@pytest.mark.parametrize(
    ("topology", "options"), [("v6e:2x2", {"zone": "z"}), ("gpu", {"host": "me@node"})], ids=["tpu", "gpu"]
)
def test_results_are_copied_also_after_an_error_of_the_command(tmp_path, topology, options):
    text = script(topology, COMMAND, **options)
    (run,) = [shlex.split(line.removesuffix(" || status=$?"))[-1] for line in text.splitlines() if "results/it" in line]
    status, calls = execute(text, tmp_path, "describe", run)
    assert status == 1
    copies = [" ".join(call) for call in calls if "scp" in call]
    assert "jaxlm/results" in copies[-1]


def test_a_command_that_starts_processes_itself_is_not_wrapped():
    command = ["python", "-m", "jaxlm.launch", "--lost-after", "60", "experiments.text_generation", "--mesh", "data=16"]
    assert f" {shlex.join(command)}" in script("v5e:4x4", command, zone="z")


@pytest.mark.parametrize(
    ("version", "calls_of_python"),
    [
        ((3, 11, 0), ["-m venv venv"]),
        ((3, 10, 12), ["-m pip install -q --user uv", "-m uv venv -q --seed --python 3.12 venv"]),
    ],
)
def test_a_tpu_with_an_old_python_gets_a_newer_one(version, calls_of_python, tmp_path):
    _, calls = execute(script("v6e:2x2", COMMAND, zone="z"), tmp_path, "describe")
    (install,) = [call[-1] for call in calls if "venv/bin/pip" in call[-1]]
    machine = tmp_path / "machine"
    (machine / "venv/bin").mkdir(parents=True)
    (machine / "python3").write_text(
        f"#!{sys.executable}\nimport sys\nif sys.argv[1] == '-c':\n    sys.version_info = {version}\n"
        "    exec(sys.argv[2])\nprint(*sys.argv[1:])\n"
    )
    (machine / "venv/bin/pip").write_text("#!/bin/sh\necho pip $*\n")
    for program in ("python3", "venv/bin/pip"):
        (machine / program).chmod(0o755)
    environment = {**os.environ, "PATH": f"{machine}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-c", install], env=environment, cwd=machine, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == [*calls_of_python, "pip install -q -e ./jaxlm[tpu,test]"]


def test_a_tpu_that_exists_already_is_not_deleted(tmp_path):
    status, calls = execute(script("v6e:2x2", COMMAND, zone="z"), tmp_path)
    assert status != 0
    assert [call[4] for call in calls if call[0] == "gcloud"] == ["describe"]


@pytest.mark.parametrize(
    ("topology", "type", "several_hosts"),
    [
        ("v4:2x2x1", "v4-8", False),
        ("v5p:2x2x2", "v5p-16", True),
        ("v5e:4x4", "v5litepod-16", True),
        ("v6e:8x8", "v6e-64", True),
    ],
)
def test_slices_of_several_hosts_run_jaxlm_launch(topology, type, several_hosts):
    command = ["python", "-m", "experiments.text_generation", "--mesh", "data=8"]
    text = script(topology, command, zone="z")
    assert f"--accelerator-type={type} " in text
    assert ("python -m jaxlm.launch experiments.text_generation --mesh" in text) == several_hosts


def test_a_slice_of_several_hosts_runs_an_experiment_by_default():
    with pytest.raises(
        ValueError, match=r"benchmarks.training measures the devices of one process, and v5e:4x4 has se"
    ):
        script("v5e:4x4", COMMAND, zone="z")
    (command,) = re.findall(r"python -m jaxlm.launch experiments.text_generation (.*)'", script("v5e:4x4", zone="z"))
    arguments = shlex.split(command)
    assert not set(";&|<>$'\"") & set(command)
    experiment = command_line.parse_experiment(
        text_generation.PRESETS["gpt"], {}, arguments, program="test", description="", recipes={}
    ).config
    assert (experiment.mesh, experiment.training.batch_size) == ("data=16", 128)
    assert experiment.training.checkpoint_every is None
    assert experiment.output == Path("results/gpt2")
    model, _ = experiment.model.build(vocab_size=257, max_positions=1024)
    assert model.num_parameters == pytest.approx(124e6, rel=0.01)


def test_a_gpu_node_is_not_created_or_deleted(tmp_path):
    status, calls = execute(script("gpu", COMMAND, host="me@node"), tmp_path)
    assert status == 0
    assert [call[0] for call in calls] == ["git", "git", "scp", "ssh", "ssh", "scp"]
    assert all("me@node" in " ".join(call) for call in calls[2:])


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        ("v9:2x2", {"zone": "z"}, "unknown topology 'v9:2x2': choose one such as v4:2x2x2"),
        ("v5e:2x2x1", {"zone": "z"}, "unknown topology 'v5e:2x2x1'"),
        ("v5e:2x8", {"zone": "z"}, "topology 'v5e:2x8': a v5e has one of the shapes 1x1, 2x2, 2x4, 4x4, 4x8, 8x8,"),
        ("v6e:3x5", {"zone": "z"}, "topology 'v6e:3x5': a v6e has one of the shapes 1x1, 2x2"),
        ("v5e:2x2", {}, "needs --zone"),
        ("v5e:2x2", {"zone": "z", "name": "Mine; rm -rf /"}, "must have only a-z, 0-9 and hyphens"),
        ("gpu", {}, "needs --host user@machine"),
        ("gpu", {"host": "h", "zone": "z"}, "no zone"),
    ],
)
def test_errors_name_the_bad_launch_option(topology, options, message):
    with pytest.raises(ValueError, match=message):
        script(topology, COMMAND, **options)
    with pytest.raises(ValueError, match="the command must be python -m MODULE ..., got bash"):
        script("v5e:2x2", ["bash"], zone="z")


def test_launch_prints_the_script_only_with_dry_run(capsys):
    assert cli.main(["launch", "--topology", "v5e:2x2", "--zone", "z"]) == 2
    assert "jaxlm does not rent machines: add --dry-run" in capsys.readouterr().err
    assert cli.main(["launch", "--topology", "v5e:2x2", "--zone", "z", "--dry-run"]) == 0
    default = ["python", "-m", "benchmarks.training", "--against", "", "--json", "results/training.json"]
    assert capsys.readouterr().out == script("v5e:2x2", default, zone="z")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: module"),
        (["--coordinator", "localhost:1", "m"], "--processes and --process must be given together or not at all"),
        (
            ["--coordinator", "localhost:1", "--processes", "2", "--process", "2", "m"],
            "--process 2 must be from 0 to 1",
        ),
        (
            ["--coordinator", "localhost:1", "--processes", "0", "--process", "0", "m"],
            "--processes 0 must be at least 1",
        ),
        ([".train"], "no module is called '.train': write it as for python -m"),
        (["--lost-after", "0", "m"], "--lost-after 0: give at least one second"),
    ],
)
def test_errors_name_the_bad_process_option(arguments, message, capsys):
    with pytest.raises(SystemExit):
        launch.main(arguments)
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ local processes

PROGRAM = """
import os, pathlib, signal, sys
with open("calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
attempt = len(open("calls").readlines())
run = pathlib.Path("run")
what = sys.argv[1]
if what == "mistake":
    sys.exit(2)
if what == "early" and attempt == 1:  # killed while the run directory is made
    run.mkdir()
    (run / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
run.mkdir(exist_ok=True)
(run / "config.json").touch()
if attempt < 3:
    os.kill(os.getpid(), signal.SIGKILL) if what == "killed" else sys.exit(1)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "prog.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    return lambda what, **options: run_local(
        ["python", "-m", "prog", what, "--preset", "p", "--recipe=r", "--steps=3", "--output", "run"], 1, **options
    )


@pytest.mark.thorough
@pytest.mark.parametrize("module", ["nonsense", "nonsense.module"])
def test_a_missing_module_is_a_user_error_without_restarts(module, capfd, tmp_path):
    command = ["python", "-m", module, "--output", str(tmp_path / "run")]
    assert launch.run_local(command, 2, restarts=2) == 2
    lines = capfd.readouterr().err.splitlines()
    assert any(f"no module is called '{module}'" in line for line in lines)
    assert not any("Traceback" in line or "restart" in line for line in lines)


@pytest.mark.thorough
def test_an_error_in_a_package_is_not_a_missing_module(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import surely_missing")
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        coordinator = f"localhost:{free_port.getsockname()[1]}"
    command = [sys.executable, "-m", "jaxlm.launch", "--coordinator", coordinator, "--processes", "1", "--process", "0"]
    command.append("package.train")
    environment = {**os.environ, "PYTHONPATH": str(Path(launch.__file__).parents[1])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "No module named 'surely_missing'" in result.stderr
    assert "no module is called" not in result.stderr


def test_error_for_a_coordinator_that_cannot_serve(capsys):
    with socket.create_server(("", 0)) as used:
        port = used.getsockname()[1]
        for address, message in [
            (f"localhost:{port}", f"process 0 cannot serve at port {port} (Address already in use): choose another"),
            ("localhost", "coordinator 'localhost' must be HOST:PORT"),
            ("localhost:66000", "with a port from 1 to 65535"),
        ]:
            with pytest.raises(SystemExit) as exit_info:
                launch.main(["--coordinator", address, "--processes", "2", "--process", "0", "this"])
            assert exit_info.value.code == 2
            assert message in capsys.readouterr().err


@pytest.mark.parametrize("what", ["killed", "failed"])
def test_a_run_that_dies_is_restarted_from_its_checkpoint(what, program, capsys):
    assert program(what, restarts=2) == 0
    first, *others = Path("calls").read_text().splitlines()
    assert first == f"{what} --preset p --recipe=r --steps=3 --output run"
    assert others == [f"{what} --steps=3 --resume run"] * 2
    cause = {"killed": "was ended by SIGKILL", "failed": "ended with status 1"}[what]
    assert [f"process 0 of 1 {cause}; restart {n} of 2, from the last checkpoint in run" in line
            for n, line in enumerate(capsys.readouterr().err.splitlines(), 1)] == [True, True]  # fmt: skip


def test_no_restart_after_the_last_one_or_after_a_usage_error(program, capsys):
    assert program("killed", restarts=1) == 128 + 9
    assert "process 0 of 1 was ended by SIGKILL; no restarts are left" in capsys.readouterr().err
    assert len(Path("calls").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="run is not empty: choose another --output, or use --resume run"):
        program("killed", restarts=1)
    assert run_local(["python", "-m", "prog", "mistake", "--resume", "run"], 1, restarts=5) == 2
    assert len(Path("calls").read_text().splitlines()) == 3
    assert run_local(["python", "-m", "prog", "killed", "--resume=run"], 1) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["--output"], ["--output", "--steps=3"], ["--resume", "--", "run"], []])
def test_restarts_need_the_name_of_a_run_directory(arguments):
    with pytest.raises(ValueError, match="--restarts needs a run directory: add --output DIRECTORY to the command"):
        run_local(["python", "-m", "prog", *arguments], 1, restarts=1)


def test_a_usage_error_of_one_process_decides_even_if_other_processes_fail(monkeypatch):
    class Child:
        def __init__(self, command, **options):
            self.status = 2 if command[command.index("--process") + 1] == "0" else 1

        def poll(self):
            return self.status

        kill = wait = lambda self: None

    monkeypatch.setattr(launch.subprocess, "Popen", Child)
    assert launch._run_once("prog", [], 3, 60, []) == (2, "process 0 of 3 ended with status 2")


@pytest.mark.parametrize("is_ignored", [False, True], ids=["terminal", "nohup"])
def test_a_hang_up_ends_the_processes_unless_it_is_ignored(is_ignored, tmp_path, monkeypatch):
    """The program receives SIGTERM once, although the launcher receives SIGHUP twice."""
    (tmp_path / "prog.py").write_text(
        "import os, signal, sys, time\n"
        "received = []\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))\n"
        "for _ in range(2):\n"
        "    os.kill(os.getppid(), signal.SIGHUP)\n"
        "    time.sleep(0.3)\n"
        "sys.exit(10 + len(received))\n"
    )
    monkeypatch.chdir(tmp_path)
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        assert run_local(["python", "-m", "prog"], 1) == (10 if is_ignored else 11)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_run_without_a_configuration_is_started_again_in_its_directory(program):
    assert program("early", restarts=2) == 0
    calls = Path("calls").read_text().splitlines()
    assert calls[1] == calls[0] == "early --preset p --recipe=r --steps=3 --output run"
    assert calls[2] == "early --steps=3 --resume run"
    assert sorted(path.name for path in Path("run").iterdir()) == ["config.json", "half"]
    assert [path.name for path in Path().glob("run*")] == ["run"]


def test_a_directory_that_is_not_a_run_is_not_resumed_or_renamed(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match=r"--resume .*: there is no config.json, so this is not a run: choose a run"):
        run_local(["python", "-m", "prog", "--resume", str(tmp_path)], 1, restarts=1)
    assert (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["local:0"], "topology 'local:0' must be local:N, with a number of processes such as local:2"),
        (["local"], "must be local:N"),
        (["local:2"], "--topology local:N needs --command 'python -m MODULE ...'"),
        (["local:2", "--command", "python -m m", "--dry-run"], "remove --dry-run, --zone, --name, --host and --spot"),
        (["local:2", "--command", "bash"], "the command must be python -m MODULE ..., got bash"),
        (["local:2", "--command", "python -m m", "--restarts", "1"], "add --output DIRECTORY to the command"),
        (["local:2", "--command", "python -m m", "--restarts", "-1"], "restarts=-1 must be at least 0"),
        (["local:2", "--command", "python -m m", "--lost-after", "0"], "lost_after=0 must be at least 1"),
        (
            ["v5e:2x2", "--zone", "z", "--dry-run", "--restarts", "1"],
            "apply only to --topology local:N",
        ),
        (
            ["local:2", "--command", "python -m 'm"],
            """--command "python -m 'm" has an open quotation or a final backslash (No closing quotation): close or""",
        ),
        (["gpu", "--host", "h", "--dry-run", "--command", "ls \\"], "(No escaped character): close or remove it"),
    ],
)
def test_errors_name_the_bad_local_option(arguments, message, capsys):
    assert cli.main(["launch", "--topology", *arguments]) == 2
    assert message in capsys.readouterr().err


ABORT = """F1126 17:44:08.532965    5515 client.h:80] Terminating process because the JAX distributed service \
detected fatal errors. This most likely indicates that another task died; absl::Status: UNAVAILABLE: The following \
tasks are unhealthy (stopped sending heartbeats):
1
12
The tasks have crashed. Check the task logs for an earlier error.

RPC: /xla.coordination.CoordinationService/PollForError
*** Check failure stack trace: ***
    @     0x7fe08ac40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
LEADER = ABORT.replace("(stopped sending heartbeats):\n1\n12\n", "\n").replace("PollForError", "Heartbeat")
NOISE = """E1126 17:44:08.532825    5515 coordination_service_agent.cc:289] Polled an error from coordination service.
W1126 17:39:06.100837    1558 preemption_sync_manager.cc:147] Failed to retrieve preemption notice: UNAVAILABLE: reset
Additional GRPC error information from remote target coordination_service while calling GetKeyValue:
:UNKNOWN:Error received from peer  {grpc_status:14}. This is only expected if one of the tasks is unhealthy.
"""


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("a\nb", "a\nb"),
        ("\0lost {lost}\na\n" + ABORT, "a\nlost 1, 12\n"),
        ("\0lost {lost}\n" + NOISE + LEADER, "lost 0\n"),
        ("\0lost {lost}\n\0\nown line\n" + ABORT, "own line\n"),
        (NOISE + "1\nafter\n", "after\n"),
        ("1\nW1126 17:39:06.1 15 other.cc:1] text\n", "1\nW1126 17:39:06.1 15 other.cc:1] text\n"),
    ],
)
def test_the_report_of_a_lost_process_becomes_one_line(written, printed):
    target = io.BytesIO()
    stderr_relay.relay(io.BytesIO(written.encode()), target)
    assert target.getvalue().decode() == printed
