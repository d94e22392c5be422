"""Small runs of the text generation experiment: files of a run, the exported model, resuming and errors."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxlm
from experiments import text_generation
from jaxlm import cli, integrity, spec
from jaxlm import config as config_lib
from jaxlm.checkpoint import Checkpointer
from jaxlm.data import load_tokenizer, read_text
from jaxlm.objectives import causal
from jaxlm.training import experiment as lib
from jaxlm.training.loop import Result
from jaxlm.training.optimizer import make_optimizer
from jaxlm.training.report import metric_curve, read_attention, read_metrics, read_results, read_samples
from jaxlm.training.trainer import Trainer

TINY = (
    "--training.steps", "12", "--training.batch-size", "8", "--training.sequence-length", "32",
    "--training.evaluation-batches", "2", "--training.log-every", "1", "--optimizer.warmup-steps", "2",
    "--validation-fraction", "0.02",
    "--model.set", "num_layers=1", "num_heads=4", "embed_dim=32", "vocab_multiple=8", "embedding_dropout=0.0",
    "attention_dropout=0.0", "residual_dropout=0.0", "--sample-tokens", "24",
)  # fmt: skip


def main(*arguments):
    return text_generation.main([str(argument) for argument in arguments])


def error_line(capsys, *arguments):
    """Run an invalid command. Return the last line of its error output."""
    capsys.readouterr()
    assert main(*arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("experiments.text_generation: ")
    return line


def losses(run):
    return metric_curve(read_metrics(run / "metrics.jsonl"), "loss")[1]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run on the included plays. Tests must not change it."""
    run = tmp_path_factory.mktemp("text") / "run"
    assert main(*TINY, "--output", run) == 0
    return run


@pytest.fixture
def copied_run(finished_run, tmp_path):
    return Path(shutil.copytree(finished_run, tmp_path / "copy"))


def test_files_of_a_run(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "loss.png", "checkpoints", "model", "sample.txt", "samples.jsonl",
        "results.json", "report.html", "attention.json", "attention.png",
    }  # fmt: skip
    assert {path.name for path in (finished_run / "model").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "checksums.json",
        "jaxlm_tokenizer.json",
    }
    experiment = config_lib.read(text_generation.Experiment, finished_run / "config.json")
    assert "embed_dim=32" in experiment.model.set
    assert (experiment.training.steps, experiment.output) == (12, finished_run)
    assert (finished_run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(losses(finished_run)) == 12
    assert losses(finished_run)[-1] < losses(finished_run)[0] - 0.2
    records = read_metrics(finished_run / "metrics.jsonl")
    assert metric_curve(records, "validation_loss")[0] == [12]
    passage = read_text(finished_run / "sample.txt")
    assert passage.startswith("ROMEO:")
    assert len(passage) == len("ROMEO:") + 24
    assert "".join(read_attention(finished_run)[0].columns) == passage


def test_the_exported_model_equals_the_last_checkpoint(finished_run):
    model, params = jaxlm.load_pretrained(finished_run / "model")
    tokenizer = load_tokenizer(finished_run / "model")
    assert model.config.vocab_size == tokenizer.vocab_size
    with Checkpointer(finished_run / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [12]
        state, meta = checkpoints.restore(_abstract_state(finished_run))
    assert meta["experiment"] == json.loads((finished_run / "config.json").read_text(encoding="utf-8"))
    assert meta["data"]["next"] == 12
    trained = spec.flatten(state.params)
    trained["token_embedding"] = trained["token_embedding"][
        : tokenizer.vocab_size
    ]  # the exported table has no padding rows
    for path, leaf in spec.flatten(params).items():
        assert np.array_equal(leaf, trained[path]), path


def _abstract_state(run):
    experiment = config_lib.read(text_generation.Experiment, run / "config.json")
    model, _ = jaxlm.load_pretrained(run / "model", vocab_multiple=8)
    optimizer = make_optimizer(experiment.optimizer, model.specs, experiment.training.steps)
    return Trainer(model, optimizer, causal.loss).abstract()


def test_jaxlm_generate_prints_the_sample_of_the_run(finished_run, capsys):
    arguments = ["generate", str(finished_run), "--prompt", "ROMEO:", "--max-new-tokens", "24"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == read_text(finished_run / "sample.txt") + "\n"


@pytest.mark.thorough
def test_losses_on_a_mesh_are_the_same(finished_run, tmp_path):
    assert main(*TINY, "--mesh", "data=4,tensor=2", "--output", tmp_path / "run") == 0
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(finished_run), rtol=1e-4)
    assert read_text(tmp_path / "run" / "sample.txt").startswith("ROMEO:")


@pytest.mark.usefixtures("no_svg")
def test_a_run_can_be_resumed_with_more_steps(copied_run, finished_run):
    assert main("--resume", copied_run, "--training.steps", "16") == 0
    records = read_metrics(copied_run / "metrics.jsonl")
    assert {"event": "resumed", "step": 12} in records
    assert metric_curve(records, "loss")[0] == list(range(1, 17))
    assert losses(copied_run)[:12] == losses(finished_run)
    assert config_lib.read(text_generation.Experiment, copied_run / "config.json").training.steps == 16
    with Checkpointer(copied_run / "checkpoints") as checkpoints:
        assert checkpoints.latest == 16
    for name in lib.RESULT_FILES:
        old, new = finished_run / name, copied_run / f"{name}.step-12"
        assert old.exists() == new.exists()
        assert not old.exists() or (new.read_bytes() == old.read_bytes() and (copied_run / name).exists())
    assert (read_results(finished_run)["steps"], read_results(copied_run)["steps"]) == (12, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("--training.steps", "5", "--optimizer.warmup-steps", "1"),
            "the checkpoint is of step 12, beyond training.steps=5: set training.steps to at least 12",
        ),
        (("--tokenizer", "byte"), "tokenizer=byte cannot change in a resumed run (saved value: character)"),
        (("--validation-fraction", "0.2"), "validation_fraction=0.2 cannot change"),
        (("--training.evaluation-batches", "3"), "training.evaluation_batches=3 cannot change in a resumed run"),
        (("--seed", "7"), "training.seed=7 cannot change in a resumed run (saved value: 0): leave it out"),
    ],
)
def test_a_rejected_resume_keeps_all_files(copied_run, capsys, change, message):
    content = {path: path.read_bytes() for path in copied_run.rglob("*") if path.is_file()}
    assert message in error_line(capsys, "--resume", copied_run, *change)
    assert {path: path.read_bytes() for path in copied_run.rglob("*") if path.is_file()} == content


class Killed(BaseException):
    """A simulated kill."""


def test_a_killed_run_keeps_the_changed_options_of_its_resume(copied_run, monkeypatch):
    def raise_killed(*arguments, **options):
        raise Killed

    options = ("--training.steps", "16", "--optimizer.clip-norm", "0.5")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "jit_step", lambda self: raise_killed)
        with pytest.raises(Killed):
            main("--resume", copied_run, *options)
    config = config_lib.read(text_generation.Experiment, copied_run / "config.json")
    assert (config.training.steps, config.optimizer.clip_norm) == (16, 0.5)
    assert not any((copied_run / name).exists() for name in lib.RESULT_FILES), "they describe the weights of step 12"


OTHER_MODEL = ("--model.set", "num_layers=1", "num_heads=4", "embed_dim=64", "vocab_multiple=8")


def test_a_run_cannot_be_resumed_with_another_model(copied_run, capsys):
    config_bytes = (copied_run / "config.json").read_bytes()
    assert main("--resume", copied_run, "--training.steps", "16", *OTHER_MODEL) == 2
    assert "embed_dim=64 cannot change in a resumed run (saved value: 32)" in capsys.readouterr().err
    assert (copied_run / "config.json").read_bytes() == config_bytes


def test_an_invalid_prompt_is_rejected_before_the_training(tmp_path, capsys):
    for prompt, message in (
        ("Ωmega", "character 'Ω'"),
        ("", "--prompt has 0 tokens: the model reads from 1 to 32 tokens"),
        ("x" * 33, "--prompt has 33 tokens: the model reads from 1 to 32 tokens"),
    ):
        assert message in error_line(capsys, *TINY, "--prompt", prompt, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_reads_each_validation_window_once(tmp_path, monkeypatch, capsys):
    batches = []

    def stop(model, loss, held_out, **options):
        batches.extend(held_out)
        raise ValueError("enough")

    monkeypatch.setattr(text_generation, "Evaluator", stop)
    (tmp_path / "a.txt").write_text("abcdefgh\n" * 333)
    options = ("--data", tmp_path / "a.txt", "--validation-fraction", "0.1", "--training.evaluation-batches", "5")
    assert "enough" in error_line(capsys, *TINY, *options, "--output", tmp_path / "run")
    assert len(batches) == 2
    assert sum(batch.weights.sum() for batch in batches) == 9 * 32  # 9 windows of 32 targets fit into 300 tokens


@pytest.mark.usefixtures("no_svg")
def test_training_on_a_text_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.txt").write_text("Été: l'œuvre est née.\n" * 60, encoding="utf-8")
    options = ("--data", "mine.txt", "--validation-fraction", "0.1", "--prompt", "née", "--training.steps", "4")
    assert main(*TINY, *options) == 0
    (run,) = Path("runs").iterdir()  # the default output directory
    assert run.name.startswith("text_generation-")
    tokenizer = load_tokenizer(run / "model")
    assert tokenizer.characters == "".join(sorted(set("Été: l'œuvre est née.\n")))
    assert set(read_text(run / "sample.txt")) <= set(tokenizer.characters)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"To be, or not",
            r"validation split of .*mine.txt: random windows of length 32 .* tokens, at least 33 needed",
        ),
        (b"", r"mine.txt is empty"),
        ("né".encode("latin-1") * 500, r"mine.txt is not UTF-8 text: byte 0xe9 at offset 1"),
        (None, r"mine.txt is not a file"),
    ],
)
def test_unusable_texts_are_rejected(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "mine.txt").write_bytes(content)
    assert re.search(message, error_line(capsys, *TINY, "--data", tmp_path / "mine.txt", "--output", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_nonempty_output_directory_is_rejected(finished_run, capsys):
    config_bytes = (finished_run / "config.json").read_bytes()
    message = error_line(capsys, *TINY, "--training.seed", "5", "--output", finished_run)
    assert "is not empty: choose another --output, or continue with --resume" in message
    assert (finished_run / "config.json").read_bytes() == config_bytes


def test_of_two_new_runs_in_one_directory_only_one_starts(tmp_path, capsys, monkeypatch):
    lock, output = integrity.lock_directory, tmp_path / "run"
    output.mkdir()
    with lock(output):
        assert main(*TINY, "--output", output) == 1
    assert "run is in use by another process" in capsys.readouterr().err.splitlines()[-1]
    assert list(output.iterdir()) == []

    def lock_after_another_run(directory):
        (directory / "config.json").write_text("the other run passed the same checks and was faster")
        return lock(directory)

    monkeypatch.setattr(integrity, "lock_directory", lock_after_another_run)
    assert "run is not empty: choose another --output" in error_line(capsys, *TINY, "--output", output)
    assert [path.name for path in output.iterdir()] == ["config.json"]
    assert (output / "config.json").read_text().startswith("the other run")


def test_runs_without_an_output_that_start_in_one_second_have_different_directories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lib.time, "strftime", lambda form: "now")
    directories = [lib.new_directory("chess") for _ in range(3)]
    assert directories == [Path("runs/chess-now"), Path("runs/chess-now-2"), Path("runs/chess-now-3")]
    assert all(directory.is_dir() for directory in directories)


def test_an_invalid_mesh_is_rejected(tmp_path, capsys):
    for mesh, message in (
        ("data=3", "mesh data=3 needs 3 devices, there are 8"),
        ("date=8", "mesh axis 'date' has no rule, so it splits no array: did you mean 'data'"),
        ("data", "cannot read 'data' in mesh 'data'"),
    ):
        assert message in error_line(capsys, *TINY, "--mesh", mesh, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_option_suggests_the_right_one(capsys):
    with pytest.raises(SystemExit):
        main("--training.stps", "6")
    assert "--training.steps" in capsys.readouterr().err


SHORT_RUN = ("--training.steps", "3", "--training.batch-size", "8", "--training.sequence-length", "16",
          "--training.log-every", "1", "--optimizer.warmup-steps", "1", "--sample-tokens", "8")  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Write a short text. Return its path."""
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("Été: l'œuvre est née.\nUne autre ligne, et la fin.\n" * 60, encoding="utf-8")
    return path


@pytest.mark.usefixtures("no_svg")
@pytest.mark.plain_cases(1)
@pytest.mark.parametrize(
    ("preset", "changes", "method"),
    [
        ("lstm", "num_layers=1 embed_dim=16 hidden_dim=16", "state carried along 8 columns"),
        ("gru", "num_layers=1 embed_dim=16 hidden_dim=16", "state carried along 8 columns"),
        (
            "transformer_xl",
            "num_layers=1 num_heads=2 embed_dim=16 head_dim=8 token_dim=16 mlp_dim=16 memory_length=16 cutoffs=()",
            "state carried along 8 columns",
        ),
        ("llama", "num_layers=1 num_heads=2 embed_dim=16 mlp_dim=16", "windows of 16 tokens, one every 8 tokens"),
        ("gated_convolutions", "embed_dim=8 blocks=((8,3,1),)", "windows of 16 tokens, one every 8 tokens"),
    ],
)
def test_every_family_is_scored_on_complete_splits(tmp_path, text, preset, changes, method):
    run = tmp_path / "run"
    fractions = ("--validation-fraction", "0.3", "--test-fraction", "0.2")
    command = ("--preset", preset, *SHORT_RUN, *fractions, "--data", text, "--output", run)
    assert main(*command, "--model.set", *changes.split()) == 0
    assert (run / "attention.json").exists() == (preset in ("transformer_xl", "llama"))
    results = read_results(run)
    scores, total = results["scores"], len(read_text(text))
    names = ("nats per character", "bits per character", "perplexity per token")
    assert [score.name for score in scores] == [f"{split} {name}" for split in ("validation", "test") for name in names]
    assert scores[0].count == pytest.approx(0.3 * total, abs=2)
    assert scores[3].count == pytest.approx(0.2 * total, abs=2)
    assert scores[0].detail == f"whole validation split, {method}"
    assert 1.0 < scores[0].value < 5.0
    (sample,) = read_samples(run)
    # The source is the start of the validation split.
    assert sample["source"] == read_text(text)[total // 2 :][: len(sample["source"])]
    assert len(sample["source"]) == (8 if preset == "llama" else 32)  # half of the context length
    assert len(sample["output"]) == 8


EXPERTS = "num_layers=1 num_heads=2 embed_dim=16 mlp_dim=16 num_experts=4 experts_per_token=2"
DELTA = (
    "shared_expert_dim=8 delta_key_heads=2 delta_value_heads=2 delta_key_dim=8 delta_value_dim=8 "
    "pattern=('delta_rule',)"
)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("family", "changes"), [("llama", EXPERTS), ("gated_deltanet", f"{EXPERTS.replace('num_heads=2 ', '')} {DELTA}")]
)
def test_the_losses_of_the_routers_have_their_own_names(tmp_path, text, capsys, family, changes):
    run = tmp_path / "run"
    command = ("--model.name", family, *SHORT_RUN, "--validation-fraction", "0.3", "--data", text, "--output", run)
    assert main(*command, "--training.evaluate-every", "2", "--model.set", *changes.split()) == 0
    records = read_metrics(run / "metrics.jsonl")
    for name in ("load_balance_loss", "router_z_loss"):
        steps, values = metric_curve(records, name)
        assert steps == [1, 2, 3]
        assert 0.0 < min(values) <= max(values) < 10.0
        assert metric_curve(records, f"validation_{name}")[0] == [2, 3]
    balance = metric_curve(records, "validation_load_balance_loss")[1][-1]
    assert 1.5 < balance < 4.0  # 2 if the router is uniform
    assert f"load_balance_loss {balance:.4f}" in capsys.readouterr().err
    assert "load balance loss" in read_text(run / "report.html")


def test_the_routers_of_a_dense_model_have_no_losses(finished_run):
    assert not any("load_balance_loss" in record for record in read_metrics(finished_run / "metrics.jsonl"))


@pytest.mark.thorough
def test_losses_of_a_stateful_model_on_a_mesh_are_the_same(tmp_path, text):
    small = ("--model.set", "num_layers=1", "embed_dim=16", "hidden_dim=16", "embedding_dropout=0.0",
             "input_dropout=0.0", "output_dropout=0.0", "weight_dropout=0.0")  # fmt: skip
    command = ("--preset", "gru", *SHORT_RUN, *small, "--data", text, "--validation-fraction", "0.3")
    for name, mesh in (("one", ()), ("eight", ("--mesh", "data=8"))):
        assert main(*command, *mesh, "--output", tmp_path / name) == 0
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-4)


@pytest.mark.thorough
@pytest.mark.usefixtures("no_svg")
def test_byte_models_are_scored_per_character(tmp_path, text):
    run = tmp_path / "run"
    small = ("--model.set", "num_layers=1", "num_heads=2", "embed_dim=16")
    assert main(*SHORT_RUN, *small, "--data", text, "--tokenizer", "byte", "--prompt", "Une", "--output", run) == 0
    nats, _, perplexity = (score.value for score in read_results(run)["scores"])
    content = read_text(text)
    assert nats == pytest.approx(np.log(perplexity) * len(content.encode()) / len(content))


def test_a_family_that_does_not_generate_text_is_rejected(tmp_path, capsys):
    message = "this is a BERT with a masked-token head: it does not continue texts; choose a causal family"
    assert message in error_line(
        capsys, *SHORT_RUN, "--model.name", "bert", "--model.set", "--output", tmp_path / "run"
    )


def test_fractions_that_leave_no_training_split_are_rejected(tmp_path, capsys):
    message = error_line(
        capsys, *TINY, "--validation-fraction", "0.5", "--test-fraction", "0.5", "--output", tmp_path / "r"
    )
    assert "validation_fraction=0.5 and test_fraction=0.5 leave nothing to train on" in message


def test_every_preset_builds_a_model():
    sizes = {}
    for name, experiment in text_generation.PRESETS.items():
        fixed = {"vocab_size": 65}
        if hasattr(jaxlm.get_model(experiment.model.name).config, "max_positions"):
            fixed["max_positions"] = experiment.training.sequence_length
        sizes[name] = experiment.model.build(**fixed)[0].num_parameters
    assert sizes["nanogpt"] < sizes["gpt_large"] < 4e6
    assert sizes["war_and_peace_lstm_1"] < sizes["war_and_peace_lstm_2"] < sizes["war_and_peace_lstm_3"]


@pytest.fixture
def fake_run(monkeypatch):
    """Replace ``text_generation.run``. Return a dict of the experiment that it gets and the signal that ends it."""
    record = {"interrupted": None, "signal": None}

    def run(experiment, resume=None):
        record["experiment"] = experiment
        return Result(None, None, 0, None, record["interrupted"], 0.0, 0.0, 0.0, 0, signal=record["signal"])

    monkeypatch.setattr(text_generation, "run", run)
    return record


def test_model_options_change_single_fields_of_the_preset(fake_run, capsys, tmp_path):
    preset = text_generation.PRESETS["lstm"].model.set
    assert main("--preset", "lstm", "--model.set", "num_layers=3", "remat=full", "--seed", "7") == 0
    model = fake_run["experiment"].model
    assert set(model.set) == {*preset, "num_layers=3", "remat=full"} - {"num_layers=2"}
    assert fake_run["experiment"].training.seed == 7
    assert main("--preset", "lstm", "--model.set") == 0
    assert fake_run["experiment"].model.set == ()
    assert main("--preset", "lstm", "--model.name", "llama", "--model.set", "num_layers=1") == 0
    assert fake_run["experiment"].model.set == ("num_layers=1",)
    assert main("--preset", "lstm", "--model.name", "gru", "--model.set", *preset) == 0
    assert fake_run["experiment"].model.set == preset
    assert "not used" not in capsys.readouterr().out
    assert main("--preset", "lstm", "--model.name", "llama") == 0
    assert fake_run["experiment"].model.set == ()
    assert f"the preset's fields of lstm are not used: {' '.join(preset)}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("--seed", "1", "--training.seed", "2")
    assert "--seed and --training.seed exclude each other" in capsys.readouterr().err


def test_the_nanogpt_preset_is_the_published_configuration(fake_run):
    """The configuration is in nanoGPT's README, section "I only have a macbook"."""
    assert main("--preset", "nanogpt", "--data", "tinyshakespeare.txt") == 0
    experiment = fake_run["experiment"]
    config, training = experiment.model.build(vocab_size=65, max_positions=64)[0].config, experiment.training
    assert (config.num_layers, config.num_heads, config.embed_dim) == (4, 4, 128)
    assert (training.sequence_length, training.batch_size, training.steps) == (64, 12, 2000)
    assert config.embedding_dropout == config.attention_dropout == config.residual_dropout == 0.0
    assert experiment.data == Path("tinyshakespeare.txt")


@pytest.mark.parametrize(("signal", "status"), [(None, 0), ("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("field", ["interrupted", "signal"])
def test_the_exit_status_depends_on_the_signal(fake_run, field, signal, status):
    fake_run[field] = signal
    assert main() == status
