"""The ``jaxlm`` command as a user types it."""

import subprocess
import sys

import jax
import pytest

import jaxlm
from jaxlm import cli
from jaxlm.data import CharTokenizer
from jaxlm.decoding import generate_text
from tests.helpers import tiny_model

TOKENIZER = CharTokenizer.from_text("To be, or not to be: that is the question.\n")


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt", vocab_size=TOKENIZER.vocab_size, max_positions=24)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(lambda key: jax.tree.map(lambda x: 5.0 * x, model.init(key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def run_directory(model, params, tmp_path_factory):
    """As an experiment leaves it: the model is in ``model``."""
    directory = tmp_path_factory.mktemp("run")
    jaxlm.save_pretrained(directory / "model", model, params)
    TOKENIZER.save(directory / "model")
    return directory


def generated(capsys, directory, *options):
    arguments = ["generate", str(directory), "--prompt", "to be", "--max-new-tokens", "12", *options]
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    """The one line on stderr with which a command failed."""
    assert cli.main([str(argument) for argument in arguments]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("jaxlm: ")
    return line


def test_generate_continues_the_prompt_and_repeats_by_seed(run_directory, capsys):
    text = generated(capsys, run_directory)
    assert text.startswith("to be")
    assert len(text) == len("to be") + 12 + 1
    assert generated(capsys, run_directory) == text
    assert generated(capsys, run_directory, "--seed", "1") != text


def test_greedy_is_what_the_library_makes(run_directory, model, params, capsys):
    (want,) = generate_text(model, params, TOKENIZER, ["to be"], max_new_tokens=12)
    for options in (["--temperature", "0"], ["--temperature", "0", "--seed", "3"], ["--top-k", "1", "--seed", "4"]):
        assert generated(capsys, run_directory, *options) == f"to be{want}\n"


def test_a_model_directory_serves_as_well_as_a_run(run_directory, capsys):
    assert generated(capsys, run_directory / "model") == generated(capsys, run_directory)


def test_stop_strings_end_the_text(run_directory, capsys):
    text = generated(capsys, run_directory, "--temperature", "0").removeprefix("to be")
    want = text[: text.index(text[3])]
    assert generated(capsys, run_directory, "--temperature", "0", "--stop", text[3]) == f"to be{want}\n"


def test_errors_are_one_line(run_directory, tmp_path, capsys):
    prompt = ("--prompt", "to be")
    missing = tmp_path / "nowhere"
    assert f"{str(missing)!r} is not a directory" in refused(capsys, "generate", missing, *prompt)
    assert "has no config.json" in refused(capsys, "generate", tmp_path, *prompt)
    assert "character 'Z' (U+005A) at position 1" in refused(capsys, "generate", run_directory, "--prompt", "tZ")
    assert "pass at least one character" in refused(capsys, "generate", run_directory, "--prompt", "")
    assert "a prompt of 25 tokens exceeds max_positions=24" in refused(
        capsys, "generate", run_directory, "--prompt", "t" * 25
    )
    for option, value, message in (
        ("--temperature", "-1", "temperature=-1.0 must be finite and at least 0"),
        ("--top-p", "2", "top_p=2.0 must be in (0, 1]"),
        ("--top-k", "99", f"top_k=99 exceeds the {TOKENIZER.vocab_size} ids"),
        ("--max-new-tokens", "0", "max_new_tokens=0 must be at least 1"),
        ("--dtype", "bfloat61", "dtype='bfloat61' is unknown: choose from"),
    ):
        assert message in refused(capsys, "generate", run_directory, *prompt, option, value)


def test_a_model_without_its_tokenizer_is_named(model, params, tmp_path, capsys):
    jaxlm.save_pretrained(tmp_path, model, params)
    assert f"no tokenizer in {tmp_path}: looked for" in refused(capsys, "generate", tmp_path, "--prompt", "to be")


def test_an_interrupt_is_no_traceback(run_directory, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "stream_text", interrupted)
    assert cli.main(["generate", str(run_directory), "--prompt", "to be"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_option_suggests_the_right_one(run_directory, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", str(run_directory), "--prompt", "to be", "--max-new-token", "3"])
    assert "--max-new-tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["generate", str(run_directory), "--prompt", "to be", "--seed", "one"])
    assert "--seed" in capsys.readouterr().err


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert "generate" in text
    assert "doctor" in text


def test_doctor_prints_versions_devices_and_what_is_missing(monkeypatch, capsys):
    real = cli._version
    monkeypatch.setattr(cli, "_version", lambda package: None if package == "torch" else real(package))
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line}
    assert report["jax"] == jax.__version__
    assert report["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert report["backend"].startswith(jax.default_backend())
    assert sum(line.startswith("device ") for line in lines) == jax.device_count()
    assert report["torch"].startswith("missing: ")
    assert "pip install 'jaxlm[reference]'" in report["torch"]
    assert report["tokenizers"] == real("tokenizers")


def test_python_m_jaxlm_is_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "jaxlm", "generate", "nowhere", "--prompt", "x"],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.startswith("jaxlm: 'nowhere' is not a directory")
