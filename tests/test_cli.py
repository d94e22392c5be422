"""Tests of the ``jaxlm`` command line."""

import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import jaxlm
from jaxlm import cli
from jaxlm.cli import doctor
from jaxlm.data import ByteTokenizer, CharTokenizer, text_files
from jaxlm.decoding import GenerationConfig, generate_text
from jaxlm.tasks.predict import classify, score_texts
from jaxlm.testing.helpers import initial_params, tiny_model
from jaxlm.training.report import MetricsFile

TOKENIZER = CharTokenizer.from_text("To be, or not to be: that is the question.\n")


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt", vocab_size=TOKENIZER.vocab_size, max_positions=24)


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(lambda key: jax.tree.map(lambda x: 5.0 * x, model.init(key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def run_directory(model, params, tmp_path_factory):
    """A run directory like that of an experiment: its subdirectory ``model`` contains the model."""
    directory = tmp_path_factory.mktemp("run")
    jaxlm.save_pretrained(directory / "model", model, params)
    TOKENIZER.save(directory / "model")
    return directory


def generate_output(capsys, directory, *options):
    arguments = ["generate", str(directory), "--prompt", "to be", "--max-new-tokens", "12", *options]
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def error_line(capsys, *arguments):
    """Run a command that must fail, and return its error message (one line on stderr)."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("jaxlm: ")
    return line


def test_generate_continues_the_prompt_and_depends_only_on_the_seed(run_directory, capsys):
    text = generate_output(capsys, run_directory)
    assert text.startswith("to be")
    assert len(text) == len("to be") + 12 + 1
    assert generate_output(capsys, run_directory) == text
    assert generate_output(capsys, run_directory, "--seed", "1") != text


def test_greedy_output_equals_generate_text(run_directory, model, params, capsys):
    (want,) = generate_text(model, params, TOKENIZER, ["to be"], GenerationConfig(12))
    for options in (["--temperature", "0"], ["--temperature", "0", "--seed", "3"], ["--top-k", "1", "--seed", "4"]):
        assert generate_output(capsys, run_directory, *options) == f"to be{want}\n"


def test_generate_accepts_a_run_or_its_model_directory(run_directory, capsys):
    assert generate_output(capsys, run_directory / "model") == generate_output(capsys, run_directory)


def test_stop_strings_end_the_text(run_directory, capsys):
    text = generate_output(capsys, run_directory, "--temperature", "0").removeprefix("to be")
    want = text[: text.index(text[3])]
    assert generate_output(capsys, run_directory, "--temperature", "0", "--stop", text[3]) == f"to be{want}\n"


def test_errors_are_one_line(run_directory, tmp_path, capsys):
    prompt = ("--prompt", "to be")
    missing = tmp_path / "nowhere"
    assert f"{str(missing)!r} is not a directory" in error_line(capsys, "generate", missing, *prompt)
    assert "has no config.json" in error_line(capsys, "generate", tmp_path, *prompt)
    unfinished = tmp_path / "unfinished"
    (unfinished / "model").mkdir(parents=True)
    (unfinished / "config.json").write_text("{}")
    message = f"{unfinished} has no exported model yet: wait until the training ends, or resume it"
    assert message in error_line(capsys, "generate", unfinished, *prompt)
    assert "character 'Z' (U+005A) at position 1" in error_line(capsys, "generate", run_directory, "--prompt", "tZ")
    assert "pass at least one character" in error_line(capsys, "generate", run_directory, "--prompt", "")
    assert "prompt 0 has 25 tokens, but max_positions=24" in error_line(
        capsys, "generate", run_directory, "--prompt", "t" * 25
    )
    for option, value, message in (
        ("--temperature", "-1", "temperature=-1.0 must be finite and at least 0"),
        ("--top-p", "2", "top_p=2.0 must be in (0, 1]"),
        ("--top-k", "99", f"top_k=99 exceeds the {TOKENIZER.vocab_size} ids"),
        ("--max-new-tokens", "0", "max_new_tokens=0 must be at least 1"),
        ("--dtype", "bfloat61", "dtype='bfloat61' is unknown: choose from"),
    ):
        assert message in error_line(capsys, "generate", run_directory, *prompt, option, value)


def test_error_for_a_model_without_a_tokenizer(model, params, tmp_path, capsys):
    jaxlm.save_pretrained(tmp_path, model, params)
    assert f"no tokenizer in {tmp_path}: looked for" in error_line(capsys, "generate", tmp_path, "--prompt", "to be")


def test_an_interrupt_prints_no_traceback(run_directory, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxlm.cli.generate.stream_text", interrupted)
    assert cli.main(["generate", str(run_directory), "--prompt", "to be"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_option_suggests_the_right_one(run_directory, capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", str(run_directory), "--prompt", "to be", "--max-new-token", "3"])
    assert "--max-new-tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # another command has this option
        cli.main(["score", str(run_directory), "to be", "--temperature", "3"])
    assert "did you mean --temperature" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["generate", str(run_directory), "to be", "--temperatur", "3", "--foo"])
    assert "--temperatur, 3, --foo; did you mean --temperature?; jaxlm --help" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["generate", str(run_directory), "--prompt", "to be", "--seed", "one"])
    assert "--seed" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in text
    assert {"translate", "summarize", "answer", "classify", "chess", "compare"} < set(cli.COMMANDS)


def test_compare_prints_a_table_and_writes_a_plot(tmp_path, capsys):
    for name, loss in (("one", 2.0), ("two", 1.5)):
        (tmp_path / name).mkdir()
        MetricsFile(tmp_path / name / "metrics.jsonl").write(step=10, validation_loss=loss)
    assert cli.main(["compare", str(tmp_path / "one"), str(tmp_path / "two"), "--plot", str(tmp_path / "x.png")]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["one", "two"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "results.json").write_text("[]")  # the results of several runs
    assert cli.main(["compare", *map(str, sorted(tmp_path.iterdir()))]) == 0  # compare runs/*
    output = capsys.readouterr()
    assert [row.split("|")[1].strip() for row in output.out.splitlines()[2:]] == ["one", "two"]
    assert output.err.splitlines() == [
        f"jaxlm compare: {tmp_path / name} is left out: it is not a run directory" for name in ("families", "x.png")
    ]
    assert cli.main(["compare", str(tmp_path / "families"), str(tmp_path / "x.png")]) == 2
    assert "families is not a run directory: it has neither" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path / "one"), str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not a directory" in capsys.readouterr().err
    assert cli.main(["compare", str(tmp_path)]) == 2
    assert cli.main(["compare"]) == 2
    assert "name at least one run directory" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxlm {jaxlm.__version__}\n"


def test_doctor_prints_versions_devices_and_missing_packages(monkeypatch, capsys):
    real_version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda package: None if package in ("torch", "chess") else real_version(package)
    )
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line}
    assert report["jax"] == jax.__version__
    assert report["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert report["backend"].startswith(jax.default_backend())
    assert sum(line.startswith("device ") for line in lines) == jax.device_count()
    assert report["torch"].startswith("missing: ")
    assert "pip install -e '.[reference]' in" in report["torch"]
    assert report["tokenizers"] == real_version("tokenizers")
    assert report["sacrebleu"] == real_version("sacrebleu")
    assert report["chess"] == "missing: the rules of chess; pip install -e '.[chess]' in the clone of jaxlm"


def test_doctor_lists_the_packages_of_all_extras():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    of_jax = {"jax[tpu]": "libtpu", "jax[cuda13]": "jax-cuda13-plugin"}  # the packages that these extras of JAX install
    expected = []
    for extra, requirements in project["optional-dependencies"].items():
        names = [re.split("[<>=]", requirement)[0] for requirement in requirements if extra not in ("docs", "dev")]
        expected += [(of_jax.get(name, name), extra) for name in names if not name.startswith("jaxlm[")]
    listed = [(package, extra) for packages, extra, _ in doctor.EXTRAS for package in packages]
    assert sorted(listed) == sorted(expected)


# ------------------------------------------------------------- commands that read lines and print lines


def stdin(data):
    """A replacement of ``sys.stdin`` with this text or these bytes, in the error handler of the C locale."""
    data = data.encode() if isinstance(data, str) else data
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="surrogateescape")


def output_lines(capsys, *arguments):
    """Run a command, and return the lines that it prints."""
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    """A function that saves a model with a byte tokenizer and returns its directory (cached)."""
    directories = {}

    def get_directory(name, **fields):
        if (name, *fields.items()) not in directories:
            path = tmp_path_factory.mktemp(name)
            model = tiny_model(name, vocab_size=264, num_layers=1, **fields)
            jaxlm.save_pretrained(path, model, initial_params(model))
            ByteTokenizer().save(path)
            directories[name, *fields.items()] = path
        return directories[name, *fields.items()]

    return get_directory


@pytest.mark.thorough
def test_texts_come_from_arguments_a_file_or_standard_input(model_directory, tmp_path, monkeypatch, capsys):
    directory = model_directory("t5-tiny")
    model, params = jaxlm.load_pretrained(directory)
    sources = ["guten Tag", "ja", "auf Wiedersehen"]
    config = GenerationConfig(6, num_beams=2)
    want = [
        text_files.escape_line_breaks(text) for text in generate_text(model, params, ByteTokenizer(), sources, config)
    ]
    options = ["--max-new-tokens", "6", "--num-beams", "2"]
    assert output_lines(capsys, "translate", directory, *sources, *options) == want
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(sources) + "\n", encoding="utf-8")
    assert output_lines(capsys, "summarize", directory, "--file", file, *options) == want
    monkeypatch.setattr(sys, "stdin", stdin("\ufeff" + "\r\n".join(sources)))
    assert output_lines(capsys, "translate", directory, *options) == want
    prefixed = generate_text(model, params, ByteTokenizer(), [f"de: {text}" for text in sources], config)
    assert output_lines(capsys, "translate", directory, *sources, "--prefix", "de: ", *options) == [
        text_files.escape_line_breaks(text) for text in prefixed
    ]


def test_generate_prints_one_line_per_prompt(run_directory, model, params, tmp_path, capsys):
    file = tmp_path / "lines.txt"
    file.write_text("to be\nis\n", encoding="utf-8")
    want = generate_text(model, params, TOKENIZER, ["to be", "is"], GenerationConfig(12))
    options = ["--max-new-tokens", "12", "--temperature", "0"]
    lines = [text_files.escape_line_breaks(prompt + text) for prompt, text in zip(["to be", "is"], want, strict=True)]
    assert output_lines(capsys, "generate", run_directory, "--file", file, *options) == lines
    assert output_lines(capsys, "generate", run_directory, "to be", "is", *options) == lines


@pytest.mark.thorough
def test_a_draft_model_does_not_change_greedy_text(run_directory, model_directory, tmp_path, capsys):
    options = ["to be", "is", "--max-new-tokens", "12", "--temperature", "0"]
    want = output_lines(capsys, "generate", run_directory, *options)
    draft = jaxlm.get_model("gru-tiny", vocab_size=TOKENIZER.vocab_size)
    jaxlm.save_pretrained(tmp_path, draft, initial_params(draft), TOKENIZER)
    options += ["--num-proposed", "3"]
    assert output_lines(capsys, "generate", run_directory, *options, "--draft", tmp_path) == want
    other_tokenizer = model_directory("gpt2-tiny")
    message = f"the tokenizer of the draft model {other_tokenizer} differs from that of the target model"
    assert message in error_line(capsys, "generate", run_directory, *options, "--draft", other_tokenizer)


@pytest.mark.thorough
def test_sampled_outputs_depend_on_the_seed(model_directory, capsys):
    options = [model_directory("t5-tiny"), "guten Tag", "--max-new-tokens", "8", "--temperature", "1"]
    first, repeated, different = (
        output_lines(capsys, "translate", *options, "--num-beams", "1", "--seed", seed) for seed in (1, 1, 2)
    )
    assert first == repeated != different
    assert "temperature=1.0 draws at random: set num_beams=1" in error_line(capsys, "translate", *options)


@pytest.mark.thorough
def test_defaults_come_from_generation_config_json(model_directory, tmp_path, capsys):
    for name, command in (("gpt2-tiny", "generate"), ("t5-tiny", "translate")):
        shutil.copytree(model_directory(name), tmp_path / name)
        content = {"max_new_tokens": 5, "num_beams": 2, "eos_token_id": [3, 256], "length_penalty": 0.5}
        (tmp_path / name / "generation_config.json").write_text(json.dumps(content))
        model, params = jaxlm.load_pretrained(model_directory(name))
        config = GenerationConfig(5, num_beams=2, length_penalty=0.5, early_stopping=False, end_ids=(3, 256))
        (want,) = generate_text(model, params, ByteTokenizer(), ["ja"], config)
        expected = text_files.escape_line_breaks(want) if command == "translate" else f"ja{want}"
        arguments = [command, str(tmp_path / name), "ja"]
        assert cli.main(arguments) == 0
        assert capsys.readouterr().out == f"{expected}\n"
        greedy = dataclasses.replace(config, num_beams=1, length_penalty=None, max_new_tokens=3)
        (want,) = generate_text(model, params, ByteTokenizer(), ["ja"], greedy)
        expected = text_files.escape_line_breaks(want) if command == "translate" else f"ja{want}"
        assert cli.main([*arguments, "--num-beams", "1", "--temperature", "0", "--max-new-tokens", "3"]) == 0
        assert capsys.readouterr().out == f"{expected}\n"
        (tmp_path / name / "generation_config.json").write_text('{"no_repeat_ngram_size": 3}')
        assert "generation_config.json sets no_repeat_ngram_size=3, which jaxlm does" in error_line(capsys, *arguments)


def test_standard_input_has_the_lines_of_a_file(tmp_path, monkeypatch):
    data = b"\xef\xbb\xbfone\rtwo\r\nthree\xe2\x80\xa8four"
    (tmp_path / "lines.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", stdin(data))
    lines = cli.common.read_texts((), None)
    assert lines == ["one\rtwo", "three\u2028four"] == cli.common.read_texts((), tmp_path / "lines.txt")


def test_one_line_escapes_line_breaks():
    assert text_files.escape_line_breaks("a\nb\r\\n") == "a\\nb\\r\\\\n"


def test_classify_prints_labels_and_probabilities(model_directory, capsys, monkeypatch):
    directory = model_directory("bert-tiny", task="classification", num_labels=3)
    predictions = classify(*jaxlm.load_pretrained(directory), ByteTokenizer(), ["fine", "a bore"])
    lines = output_lines(capsys, "classify", directory, "fine", "a bore")
    for line, label, probabilities in zip(lines, predictions.labels, predictions.probabilities, strict=True):
        assert line.split("\t") == [str(label), f"{probabilities.max():.4f}"]
    (line,) = output_lines(capsys, "classify", directory, "fine", "--all")
    shown = [float(cell) for cell in line.split("\t")[1::2]]
    assert shown == sorted(shown, reverse=True)
    assert sum(shown) == pytest.approx(1.0, abs=1e-3)
    assert output_lines(capsys, "classify", directory, "fine\ta bore", "a\tb")[0] != lines[0], "pairs"
    named = dataclasses.replace(predictions, names=("a\nb", "a\tb", "a\\b"))
    monkeypatch.setattr("jaxlm.cli.classify.classify", lambda *_, **__: named)
    labels = [line.split("\t")[0] for line in output_lines(capsys, "classify", directory, "fine", "a bore")]
    assert labels == [("a\\nb", "a\\tb", "a\\\\b")[index] for index in named.ids]


def test_score_prints_likelihoods(model_directory, capsys):
    lines = output_lines(capsys, "score", model_directory("gpt2-tiny"), "to be", "is")
    scores = score_texts(*jaxlm.load_pretrained(model_directory("gpt2-tiny")), ByteTokenizer(), ["to be", "is"])
    for line, total, count in zip(lines, scores.log_likelihoods, scores.num_tokens, strict=True):
        shown = [float(cell) for cell in line.split("\t")]
        assert shown == pytest.approx([total, count, math.exp(-total / count)], rel=1e-4)
    (line,) = output_lines(capsys, "score", model_directory("t5-tiny"), "ja\tyes")
    assert line.split("\t")[1] == "4", "three bytes and the end"


def test_a_command_rejects_the_wrong_kind_of_model(model_directory, capsys):
    bert, gpt, t5 = model_directory("bert-tiny"), model_directory("gpt2-tiny"), model_directory("t5-tiny")
    masked = "this is a BERT with a masked-token head: it"
    for command, directory, message in (
        ("classify", bert, f"{masked} does not classify texts; fine-tune it with load_pretrained(directory, task="),
        ("translate", bert, f"{masked} reads no source, so it cannot translate; load an encoder-decoder"),
        ("generate", bert, f"{masked} generates no text; load a language model"),
        ("score", bert, f"{masked} does not score texts; load a language model"),
        ("summarize", gpt, "this is a GPT with a next-token head: it reads no source, so it cannot summarize"),
        (
            "generate",
            t5,
            "this is a T5 with a sequence-to-sequence head: it reads a source, so it cannot continue a prompt",
        ),
        ("score", t5, "it scores targets, so give SOURCE<tab>TARGET"),
    ):
        assert message in error_line(capsys, command, directory, "a text")


def test_errors_name_the_unusable_text(model_directory, tmp_path, monkeypatch, capsys):
    directory, file = model_directory("gpt2-tiny"), tmp_path / "lines.txt"
    file.write_text("one\n\nthree\n", encoding="utf-8")
    assert f"line 2 of {file} is empty" in error_line(capsys, "score", directory, "--file", file)
    assert "give texts or --file, not both" in error_line(capsys, "score", directory, "text", "--file", file)
    assert "only one of --prompt" in error_line(capsys, "generate", directory, "text", "--prompt", "text")
    file.write_bytes("né".encode("latin-1"))
    assert "is not UTF-8 text: byte 0xe9" in error_line(capsys, "score", directory, "--file", file)
    for data, message in (
        (b"", "standard input is empty"),
        (b"one\n \n", "line 2 of standard input is empty"),
        (b"one\ncaf\xe9\n", "standard input is not UTF-8 text: byte 0xe9 at offset 7, line 2"),
        (b"one\0", "standard input is not UTF-8 text: byte 0x00 at offset 3, line 1"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin(data))
        assert message in error_line(capsys, "score", directory)
    message = r"character 1 of text 1, '\udce9', is a surrogate and has no UTF-8 bytes"
    assert message in error_line(capsys, "score", directory, "one", "a\udce9")
    assert message.replace("text 1", "text 0") in error_line(capsys, "generate", directory, "--prompt", "a\udce9")
    assert "text 1 has 0 tabs and text 0 has 1" in error_line(capsys, "score", model_directory("t5-tiny"), "a\tb", "c")
    assert "text 1 has 100 tokens, but max_positions=64" in error_line(capsys, "score", directory, "short", "x" * 100)


def test_evaluate_names_a_missing_package_before_it_loads_the_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "jaxlm.tasks.lm_eval", raising=False)
    assert cli.main(["evaluate", str(tmp_path / "missing"), "--tasks", "lambada"]) == 2
    assert "evaluation on tasks needs lm_eval: pip install -e '.[eval]' in" in capsys.readouterr().err


def test_python_m_jaxlm_runs_the_command():
    run = subprocess.run(
        [sys.executable, "-m", "jaxlm", "generate", "nowhere", "--prompt", "x"],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("jaxlm: 'nowhere' is not a directory")


def test_ctrl_c_ends_a_shell_loop(tmp_path):
    """A shell ends a loop only if SIGINT ended the command; the exit status 130 is not enough."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, time\n"
        "from jaxlm.command_line import end_process, exit_status\n"
        "def command():\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "    return 0\n"
        "atexit.register(print, 'exit handler')\n"
        "end_process(exit_status(command, 'program'))\n"
    )
    loop = f"for i in 1 2; do {sys.executable} {program}; echo status $?; done; echo after"
    # A terminal sends SIGINT to the shell and to the command. The new process makes the terminal.
    spawn = "import pty, sys; pty.spawn(sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", spawn, "bash", "-c", loop], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as terminal:
        output = terminal.stdout.read(len("started"))
        terminal.stdin.write(b"\x03")
        terminal.stdin.flush()
        output += terminal.stdout.read()
    assert output.count(b"started") == 1
    assert b"exit handler" in output
    assert b"after" not in output
