"""The first thing a newcomer runs, small: what it leaves behind, and what can be done with that."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxlm
from experiments import shakespeare
from jaxlm import cli, spec
from jaxlm import config as config_lib
from jaxlm.checkpoint import Checkpointer
from jaxlm.data import load_tokenizer, read_text
from jaxlm.objectives import causal
from jaxlm.training.loop import Result
from jaxlm.training.optimizer import make_optimizer
from jaxlm.training.report import curve, read_metrics
from jaxlm.training.trainer import Trainer

TINY = (
    "--training.steps", "12", "--training.batch-size", "8", "--training.sequence-length", "32",
    "--training.evaluation-batches", "2", "--training.log-every", "1", "--optimizer.warmup-steps", "2",
    "--model.num-layers", "1", "--model.embed-dim", "32", "--sample-tokens", "24",
)  # fmt: skip


def main(*arguments):
    return shakespeare.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """The one line in which a command line that cannot be run says why."""
    capsys.readouterr()
    assert main(*arguments) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("experiments.shakespeare: ")
    return said


def losses(run):
    return curve(read_metrics(run / "metrics.jsonl"), "loss")[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on the embedded plays. Not to be changed."""
    run = tmp_path_factory.mktemp("shakespeare") / "run"
    assert main(*TINY, "--output", run) == 0
    return run


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_what_a_run_leaves(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "loss.png", "checkpoints", "model", "sample.txt"}
    assert {path.name for path in (finished / "model").iterdir()} == {
        "config.json",
        "model.safetensors",
        "jaxlm_tokenizer.json",
    }
    experiment = config_lib.read(shakespeare.Experiment, finished / "config.json")
    assert (experiment.model.embed_dim, experiment.training.steps, experiment.output) == (32, 12, finished)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(losses(finished)) == 12
    assert losses(finished)[-1] < losses(finished)[0] - 0.2
    records = read_metrics(finished / "metrics.jsonl")
    assert curve(records, "validation_loss")[0] == [12]
    passage = read_text(finished / "sample.txt")
    assert passage.startswith("ROMEO:")
    assert len(passage) == len("ROMEO:") + 24


def test_the_exported_model_is_that_of_the_last_checkpoint(finished):
    model, params = jaxlm.load_pretrained(finished / "model")
    tokenizer = load_tokenizer(finished / "model")
    assert model.config.vocab_size == tokenizer.vocab_size
    with Checkpointer(finished / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [12]
        state, meta = checkpoints.restore(_target(finished))
    assert meta["experiment"] == json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert meta["data"]["next"] == 12
    trained = spec.flatten(state.params)
    trained["token_embedding"] = trained["token_embedding"][: tokenizer.vocab_size]  # the file has no padding
    for path, leaf in spec.flatten(params).items():
        assert np.array_equal(leaf, trained[path]), path


def _target(run):
    experiment = config_lib.read(shakespeare.Experiment, run / "config.json")
    model, _ = jaxlm.load_pretrained(run / "model", vocab_multiple=experiment.model.vocab_multiple)
    optimizer = make_optimizer(experiment.optimizer, model.specs, experiment.training.steps)
    return Trainer(model, optimizer, causal.loss).abstract()


def test_jaxlm_generate_writes_the_passage_of_the_run_again(finished, capsys):
    arguments = ["generate", str(finished), "--prompt", "ROMEO:", "--max-new-tokens", "24"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == read_text(finished / "sample.txt") + "\n"


def test_split_over_a_mesh_the_losses_are_the_same(finished, tmp_path):
    assert main(*TINY, "--mesh", "data=4,tensor=2", "--output", tmp_path / "run") == 0
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(finished), rtol=1e-4)
    assert read_text(tmp_path / "run" / "sample.txt").startswith("ROMEO:")


def test_a_run_goes_on_with_more_steps(copied, finished):
    assert main("--resume", copied, "--training.steps", "16") == 0
    records = read_metrics(copied / "metrics.jsonl")
    assert {"event": "resumed", "step": 12} in records
    assert curve(records, "loss")[0] == list(range(1, 17))
    assert losses(copied)[:12] == losses(finished)
    assert config_lib.read(shakespeare.Experiment, copied / "config.json").training.steps == 16
    with Checkpointer(copied / "checkpoints") as checkpoints:
        assert checkpoints.latest == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((), "step 12 of 12 is reached. Ask for more training.steps"),
        (("--training.steps", "5", "--optimizer.warmup-steps", "1"), "step 12 of 5 is reached"),
        (("--tokenizer", "byte"), "tokenizer=byte cannot change when a run goes on (it is character)"),
        (("--validation-fraction", "0.2"), "validation_fraction=0.2 cannot change"),
    ],
)
def test_a_run_that_cannot_go_on_says_why_and_keeps_its_configuration(copied, capsys, change, message):
    before = (copied / "config.json").read_bytes()
    assert message in refused(capsys, "--resume", copied, *change)
    assert (copied / "config.json").read_bytes() == before


def test_another_model_cannot_take_over_a_run(copied, capsys):
    before = (copied / "config.json").read_bytes()
    assert main("--resume", copied, "--training.steps", "16", "--model.embed-dim", "64") == 1
    assert "expected float32[64], got float32[32]" in capsys.readouterr().err
    assert (copied / "config.json").read_bytes() == before


def test_a_prompt_that_cannot_be_read_is_found_before_the_training(tmp_path, capsys):
    assert "character 'Ω'" in refused(capsys, *TINY, "--prompt", "Ωmega", "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("Été: l'œuvre est née.\n" * 60, encoding="utf-8")
    assert main(*TINY, "--data", "mine.txt", "--prompt", "née", "--training.steps", "4") == 0
    (run,) = Path("runs").iterdir()  # where a run goes that was told nothing
    assert run.name.startswith("shakespeare-")
    tokenizer = load_tokenizer(run / "model")
    assert tokenizer.characters == "".join(sorted(set("Été: l'œuvre est née.\n")))
    assert set(read_text(run / "sample.txt")) <= set(tokenizer.characters)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"To be, or not", r"validation part of .*mine.txt: random windows of length 32 .* tokens, at least 33 needed"),
        (b"", r"mine.txt is empty: nothing to train on"),
        ("né".encode("latin-1") * 500, r"mine.txt is not UTF-8 text: byte 0xe9 at offset 1"),
        (None, r"No such file or directory: .*mine.txt"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    assert re.search(message, refused(capsys, *TINY, "--data", tmp_path / "mine.txt", "--output", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_something_is_refused(finished, capsys):
    before = (finished / "config.json").read_bytes()
    said = refused(capsys, *TINY, "--training.seed", "5", "--output", finished)
    assert "is not empty: choose another --output, or go on with --resume" in said
    assert (finished / "config.json").read_bytes() == before


def test_a_mesh_that_does_not_fit_is_refused(tmp_path, capsys):
    for mesh, message in (
        ("data=3", "mesh data=3 needs 3 devices, there are 8"),
        ("date=8", "mesh axis 'date' is named by no rule, so it would split nothing: did you mean 'data'"),
        ("data", "cannot read 'data' in mesh 'data'"),
    ):
        assert message in refused(capsys, *TINY, "--mesh", mesh, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_suggests_the_right_one(capsys):
    with pytest.raises(SystemExit):
        main("--model.num-layrs", "6")
    assert "--model.num-layers" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """Instead of running: what would be run, and the signal that it ends with."""
    seen = {"interrupted": None}

    def run(experiment, resume=None):
        seen["experiment"] = experiment
        return Result(None, None, 0, None, seen["interrupted"], 0.0, 0.0, 0.0, 0)

    monkeypatch.setattr(shakespeare, "run", run)
    return seen


def test_the_preset_is_the_published_configuration(asked):
    """nanoGPT's README, "I only have a macbook"."""
    assert main("--preset", "nanogpt", "--data", "tinyshakespeare.txt") == 0
    experiment = asked["experiment"]
    model, training = experiment.model, experiment.training
    assert (model.num_layers, model.num_heads, model.embed_dim) == (4, 4, 128)
    assert (training.sequence_length, training.batch_size, training.steps) == (64, 12, 2000)
    assert model.embedding_dropout == model.attention_dropout == model.residual_dropout == 0.0
    assert experiment.data == Path("tinyshakespeare.txt")


@pytest.mark.parametrize(("signal", "status"), [(None, 0), ("SIGINT", 130), ("SIGTERM", 143)])
def test_the_exit_status_tells_how_a_run_ended(asked, signal, status):
    asked["interrupted"] = signal
    assert main() == status
