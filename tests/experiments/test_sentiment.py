"""Small runs of the sentiment experiment: files of a run, resuming, folds and invalid input."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import jaxlm
from experiments import sentiment
from jaxlm import cli
from jaxlm.metrics import proportion
from jaxlm.training.experiment import ModelConfig
from jaxlm.training.report import read_attention, read_results, read_samples

WORDS = {"1": "good fine great warm", "0": "bad dull poor cold"}
TINY = (
    "--preset", "lstm", "--training.batch-size", "8", "--epochs", "3", "--training.evaluate-every", "4",
    "--optimizer.warmup-steps", "2",
    "--buckets", "1", "--data.validation-fraction", "0.1", "--optimizer.learning-rate", "0.02",
    "--model.set", "embed_dim=16", "hidden_dim=16", "input_dropout=0.0", "output_dropout=0.0",
)  # fmt: skip


def main(*arguments):
    return sentiment.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sentences")
    lines = [f"{label}\tit is {word} and {other}\n" for label, words in WORDS.items() for word in words.split()
             for other in words.split()]  # fmt: skip
    (directory / "train.tsv").write_text("label\tsentence\n" + "".join(lines * 2))
    (directory / "dev.tsv").write_text("label\tcontent\n1\tit is great and fine\n0\tit is dull and bad\n")
    return directory


@pytest.fixture(scope="module")
def finished_run(files, tmp_path_factory):
    run = tmp_path_factory.mktemp("sentiment") / "run"
    arguments = ("--data.train", files / "train.tsv", "--data.test", files / "dev.tsv", "--output", run)
    assert main(*TINY, *arguments) == 0
    return run


def test_files_of_a_run(finished_run, capsys):
    results = read_results(finished_run)
    assert results["scores"][0].name == "accuracy"
    assert results["scores"][0].value == 1.0
    assert results["compilations"] == 1
    assert {"source": "it is dull and bad", "label": "0", "output": "0"} in read_samples(finished_run)
    assert json.loads((finished_run / "confusion.json").read_text())["counts"] == [[1, 0], [0, 1]]
    page = (finished_run / "report.html").read_text()
    assert "it is great and fine" in page
    assert not (finished_run / "attention.json").exists()  # an LSTM has no attention
    model, _ = jaxlm.load_pretrained(finished_run / "model")
    assert model.labels == ("0", "1")
    assert cli.main(["classify", str(finished_run), "it is warm and great"]) == 0
    assert capsys.readouterr().out.split()[0] == "1"


@pytest.mark.parametrize("field", ["directory=run", "param_dtype=bfloat16", "seed=1"])
def test_options_of_load_pretrained_are_not_fields_of_the_model(field):
    with pytest.raises(ValueError, match=f"--model.set {field}: .* is not a config field"):
        ModelConfig(pretrained=Path("model"), set=(field,)).build()


@pytest.mark.usefixtures("no_svg")
def test_resuming_a_finished_run_exports_it_again_and_rejects_other_data(finished_run, files, tmp_path, capsys):
    config = (finished_run / "config.json").read_text()
    (finished_run / "report.html").unlink()
    (finished_run / "model" / "model.safetensors").unlink()
    assert main("--resume", finished_run) == 0
    assert "the training is complete" in capsys.readouterr().err
    assert (finished_run / "report.html").exists()
    jaxlm.load_pretrained(finished_run / "model")
    for change in (("--data.train", files / "dev.tsv"), ("--min-frequency", "3")):
        assert main("--resume", finished_run, *change) == 2
        assert "cannot change in a resumed run" in capsys.readouterr().err
    moved = tmp_path / "train.tsv"
    for text, status in (("it is", 0), ("that was", 2)):
        moved.write_text((files / "train.tsv").read_text().replace("it is", text))
        assert main("--resume", finished_run, "--data.train", moved) == status
        output = capsys.readouterr()
        assert f"data.train={moved} is used instead of {files / 'train.tsv'}: it must have the same" in output.out
        assert ("the saved iterator read other data" in output.err) == (status == 2)
        moved_config = json.loads((finished_run / "config.json").read_text())["data"]["train"]
        (finished_run / "config.json").write_text(config)
        assert moved_config == str(moved if status == 0 else files / "train.tsv")


def test_a_model_for_several_labels_per_text_is_refused_before_the_training(finished_run, files, tmp_path, capsys):
    directory, output = tmp_path / "model", tmp_path / "run"
    shutil.copytree(finished_run / "model", directory)
    (directory / "checksums.json").unlink()  # the configuration changes
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    assert main("--model.pretrained", directory, "--data.train", files / "train.tsv", "--output", output) == 2
    assert "has problem_type='multi_label_classification', but this objective needs" in capsys.readouterr().err
    assert not output.exists()


def test_lines_without_a_text_are_an_error_or_are_left_out(tmp_path, capsys):
    path = tmp_path / "train.all"
    path.write_text("1 it is great\n0 \n0 it is dull\n")
    with pytest.raises(ValueError, match=r"line 2: the line must have a label, .*; --data.on-error report"):
        sentiment.read(path, sentiment.Data())
    assert len(sentiment.read(path, sentiment.Data(on_error="report"))) == 2
    assert f"{path}, line 2 is left out: the line must have a label, a space and a text" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.usefixtures("no_svg")
def test_a_transformer_has_attention_maps_of_four_test_texts(files, tmp_path):
    sizes = ("num_layers=1", "num_heads=2", "embed_dim=16", "max_positions=64")
    arguments = ("--data.train", files / "train.tsv", "--output", tmp_path / "run")
    assert main("--preset", "roberta", *TINY[2:-4], *arguments, "--model.set", *sizes) == 0
    maps = read_attention(tmp_path / "run")
    assert len(maps) == 4
    assert maps[0].columns[1:3] == ["it", "is"]


def test_a_label_that_only_the_random_test_split_has_is_known(tmp_path):
    (tmp_path / "lines.all").write_text("".join(f"{'rare' if n == 0 else n % 2} it is word {n}\n" for n in range(20)))
    for fraction in (0.3, 0.6, 0.9):
        *_, labels = sentiment.parts(sentiment.Data(train=tmp_path / "lines.all", test_fraction=fraction))
        assert labels == ("0", "1", "rare")


@pytest.fixture
def phrases(tmp_path):
    """Settings of a file with 20 sentences and a phrase of each. The first word of a text begins with its number."""
    sentences = [" ".join(f"w{n}-{word}" for word in range(6)) for n in range(20)]
    lines = [f"{n % 2} {part}\n" for n, text in enumerate(sentences) for part in (text, text[:11].rsplit(" ", 1)[0])]
    (tmp_path / "lines.all").write_text("".join(lines))
    return sentiment.Data(train=tmp_path / "lines.all", group_phrases=True)


def numbers(examples):
    """The numbers of the sentences from which the texts come (see the fixture ``phrases``)."""
    return {text.split("-")[0] for text in examples.column("text")}


def test_phrases_are_in_the_split_of_their_sentence(phrases):
    training, test, _ = sentiment.parts(phrases)
    assert len(test) == 4
    assert not numbers(training) & numbers(test)


def test_phrases_are_in_the_fold_of_their_sentence(phrases, tmp_path, monkeypatch):
    tested = []

    def train_and_test(experiment, training, test, labels, resume, parent):
        assert not numbers(training) & numbers(test)
        tested.extend(test.column("text"))
        return SimpleNamespace(signal=None), proportion("accuracy", 1, 10)

    monkeypatch.setattr(sentiment, "train_and_test", train_and_test)
    monkeypatch.setattr(sentiment.classification, "write_folds", lambda output, scores: None)
    sentiment.run(dataclasses.replace(sentiment.PRESETS["lstm"], data=phrases, folds=3, output=tmp_path / "run"))
    assert len(set(tested)) == len(tested) == 40


@pytest.mark.parametrize("received_signal", [None, "SIGINT"])
def test_every_fold_knows_all_labels_and_no_fold_starts_after_a_signal(tmp_path, monkeypatch, received_signal):
    (tmp_path / "lines.all").write_text("".join(f"{'rare' if n == 0 else n % 2} it is word {n}\n" for n in range(20)))
    calls = []

    def train_and_test(experiment, training, test, labels, resume, parent):
        calls.append((labels, "rare" in training.label_names()))
        return SimpleNamespace(signal=received_signal), proportion("accuracy", 1, 10)

    monkeypatch.setattr(sentiment, "train_and_test", train_and_test)
    monkeypatch.setattr(sentiment.classification, "write_folds", lambda output, scores: None)
    data = sentiment.Data(train=tmp_path / "lines.all")
    sentiment.run(dataclasses.replace(sentiment.PRESETS["lstm"], data=data, folds=2, output=tmp_path / "run"))
    assert {labels for labels, _ in calls} == {("0", "1", "rare")}
    assert sorted(has_rare for _, has_rare in calls) == ([False, True] if received_signal is None else [True])


class Killed(BaseException):
    """A simulated kill."""


def raise_killed(*arguments, **options):
    raise Killed


def test_a_start_of_folds_that_is_killed_or_fails_can_be_repeated(files, tmp_path, monkeypatch, capsys):
    run, write = tmp_path / "run", sentiment.lib.config_lib.write
    arguments = (*TINY, "--data.train", files / "train.tsv", "--folds", 2, "--output", run)
    with monkeypatch.context() as patch:
        patch.setattr(sentiment.lib.config_lib, "write", raise_killed)
        with pytest.raises(Killed):
            main(*arguments)
    assert not (run / "config.json").exists()

    def write_parent(config, path):
        if path.parent != run:
            raise Killed
        write(config, path)

    with monkeypatch.context() as patch:
        patch.setattr(sentiment.lib.config_lib, "write", write_parent)
        with pytest.raises(Killed):
            main(*arguments)
    assert not (run / "fold-0" / "config.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(sentiment, "train", raise_killed)
        with pytest.raises(Killed):
            main("--resume", run)
    contents = {path: path.read_bytes() for path in run.rglob("*.json")}
    assert [json.loads(contents[path / "config.json"])["output"] for path in (run, run / "fold-0")] == [
        str(run),
        str(run / "fold-0"),
    ]

    def fail(*arguments):
        raise ValueError("the checkpoint is of another step")

    monkeypatch.setattr(sentiment, "train", fail)
    assert main("--resume", run, "--epochs", "1") == 2
    assert "the checkpoint is of another step" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*.json")} == contents


def test_a_fold_cannot_be_resumed_alone(finished_run, tmp_path, capsys):
    fold = tmp_path / "folds" / "fold-0"
    shutil.copytree(finished_run, fold)
    config = json.loads((fold / "config.json").read_text())
    (fold / "config.json").write_text(json.dumps({**config, "folds": 3, "output": str(fold)}))
    before = sorted(fold.rglob("*"))
    assert main("--resume", fold) == 2
    message = f"--resume {fold} is one fold of a cross-validation: to resume all folds, use --resume {fold.parent}"
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert main("--resume", finished_run, "--folds", 3) == 2  # not a fold
    assert "folds=3" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(fold.rglob("*")) == before


@pytest.mark.thorough
def test_folds_use_every_example_for_testing_once(files, tmp_path, capsys):
    lines = [f"{label} it is {word}\n" for label, words in WORDS.items() for word in words.split()] * 4
    (tmp_path / "lines.all").write_text("".join(lines))
    arguments = ("--data.train", tmp_path / "lines.all", "--folds", "2", "--output", tmp_path / "run")
    assert main(*TINY, *arguments, "--optimizer.warmup-steps", "900") == 2
    assert not (tmp_path / "run").exists(), "a failed check writes nothing"
    assert main(*TINY, *arguments) == 0
    assert "accuracy over 2 folds" in capsys.readouterr().out
    results = json.loads((tmp_path / "run/results.json").read_text())
    (score,) = results["scores"]
    assert (score["name"], score["detail"]) == ("accuracy over 2 folds", "Wilson interval")
    assert score["value"] == pytest.approx(sum(results["accuracy_of_folds"]) / 2, abs=0.05)
    counts = [
        json.loads((tmp_path / "run" / f"fold-{fold}" / "confusion.json").read_text())["counts"] for fold in (0, 1)
    ]
    assert sum(sum(map(sum, fold)) for fold in counts) == len(lines)
    (tmp_path / "run/results.json").unlink()
    shutil.rmtree(tmp_path / "run/fold-1")
    assert main("--resume", tmp_path / "run") == 0
    resumed = json.loads((tmp_path / "run/results.json").read_text())
    assert resumed["accuracy_of_folds"] == results["accuracy_of_folds"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--data.train", "none.tsv"), "none.tsv is not a file"),
        (("--model.set", "num_labels=3"), "--model.set num_labels=3: num_labels follows from the data, the"),
        (("--model.set", "name=gru"), "lstm has no field 'name'"),
        (("--model.set", "hidden"), "cannot read --model.set 'hidden': write name=value"),
        (("--model.name", "lstn"), "no model is called 'lstn': did you mean 'lstm'"),
        (("--optimizer.warmup-steps", "999"), "warmup_steps=999 must be fewer than the"),
    ],
)
def test_invalid_options_print_one_line_and_create_no_directory(files, tmp_path, capsys, change, message):
    arguments = ("--data.train", files / "train.tsv", "--output", tmp_path / "run")
    assert main(*TINY, *arguments, *change) == 2
    message_line = capsys.readouterr().err.splitlines()[-1]
    assert message in message_line
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("preset", ["bilstm", "gru", "attention_rnn", "cnn", "resnet", "roberta", "xlnet"])
def test_every_preset_trains(files, tmp_path, preset):
    sizes = {
        "cnn": ("embedding=learned", "embed_dim=16", "channels=16", "kernels=(5,)", "fc_dim=16"),
        "resnet": ("embed_dim=16", "channels=8", "blocks=(1, 1)", "fc_dim=16"),
        "attention_rnn": ("embed_dim=16", "hidden_dim=8", "attention_dim=8"),
        "roberta": ("num_layers=1", "num_heads=2", "embed_dim=16", "max_positions=64"),
        "xlnet": ("num_layers=1", "num_heads=2", "embed_dim=16", "mlp_dim=32"),
    }.get(preset, ("embed_dim=16", "hidden_dim=16", "direction=both"))
    arguments = ("--data.train", files / "train.tsv", "--output", tmp_path / "run")
    assert main("--preset", preset, *TINY[2:-4], *arguments, "--model.set", *sizes) == 0
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "attention.json").exists() == (preset in ("attention_rnn", "roberta", "xlnet"))
