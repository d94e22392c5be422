"""A small run of the translation experiment: its files, the command ``jaxlm translate``, and invalid input."""

import dataclasses
import gzip
import shutil
from types import SimpleNamespace

import pytest

import jaxlm
from experiments import translation
from jaxlm import cli
from jaxlm.data import load_tokenizer
from jaxlm.data.examples import Examples
from jaxlm.training.report import read_attention, read_results, read_samples

NUMBERS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier"}
TINY = (
    "--preset", "bahdanau", "--training.batch-size", "16", "--training.evaluate-every", "50", "--epochs", "90",
    "--optimizer.warmup-steps", "5", "--optimizer.learning-rate", "0.02", "--vocab-size", "270", "--buckets", "1",
    "--num-beams", "2", "--label-smoothing", "0.0", "--model.set", "source_vocab_size=None", "embed_dim=24",
    "hidden_dim=32", "output_dim=24",
)  # fmt: skip


def main(*arguments):
    return translation.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def data_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pairs")
    for name, count in (("train", 4), ("val", 1), ("test_2016_flickr", 1)):
        for language, words in (("en", NUMBERS), ("de", NUMBERS.values())):
            with gzip.open(directory / f"{name}.{language}.gz", "wt") as file:
                file.write("".join(f"{word}\n" for word in words) * count)
    return directory


@pytest.fixture(scope="module")
def finished_run(data_directory, tmp_path_factory):
    run = tmp_path_factory.mktemp("translation") / "run"
    assert main(*TINY, "--data.directory", data_directory, "--output", run) == 0
    return run


def test_files_of_a_run_and_the_command(finished_run, capsys):
    results = read_results(finished_run)
    assert [score.name.split()[0] for score in results["scores"]] == ["BLEU", "BLEU", "chrF2"]
    assert results["scores"][2].value > 99.0
    assert (finished_run / "translations.txt").read_text().split() == list(NUMBERS.values())
    assert {"source": "two", "reference": "zwei", "output": "zwei"} in read_samples(finished_run)
    assert "zwei" in (finished_run / "report.html").read_text()
    maps = read_attention(finished_run)
    assert {"".join(item.rows).split("</s>")[0] for item in maps} <= set(NUMBERS.values())
    assert (finished_run / "attention.png").read_bytes().startswith(b"\x89PNG")
    model, _ = jaxlm.load_pretrained(finished_run / "model")
    assert model.config.decoder_start_id == 0
    assert cli.main(["translate", str(finished_run), "three", "one"]) == 0
    assert capsys.readouterr().out.split() == ["drei", "eins"]


def test_the_error_for_a_missing_file_has_its_name(data_directory, tmp_path, capsys):
    assert main(*TINY, "--data.directory", data_directory, "--data.target", "fr", "--output", tmp_path / "run") == 2
    assert "train.fr is not a file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_empty_lines_are_an_error_or_are_left_out(data_directory, tmp_path, capsys):
    directory = tmp_path / "pairs"
    shutil.copytree(data_directory, directory)
    for language in ("en", "de"):
        path = directory / f"train.{language}"
        path.write_text(gzip.decompress(path.with_suffix(f".{language}.gz").read_bytes()).decode() + "\n")
    data = translation.Data(directory)
    with pytest.raises(ValueError, match=r"train.en, line 17: .* is empty; --data.on-error report leaves"):
        translation.parts(data)
    training, _, _ = translation.parts(dataclasses.replace(data, on_error="report"))
    assert len(training) == 16
    assert "line 17 is left out" in capsys.readouterr().out


@pytest.mark.thorough
def test_training_continues_from_pretrained_weights_with_their_tokenizer(finished_run, data_directory, tmp_path):
    at = TINY.index("--vocab-size")  # the tokenizer of the weights is used
    arguments = (
        *TINY[:at],
        *TINY[at + 2 :],
        "--model.pretrained",
        finished_run / "model",
        "--model.set",
        "--epochs",
        8,
    )
    assert main(*arguments, "--data.directory", data_directory, "--output", tmp_path / "run") == 0
    assert (tmp_path / "run" / "translations.txt").read_text().split() == list(NUMBERS.values())
    names = ("tokenizer.json", "tokenizer_config.json")
    for name in names:
        assert (tmp_path / "run/model" / name).read_bytes() == (finished_run / "model" / name).read_bytes()


def test_a_test_source_without_tokens_is_found_before_the_training(data_directory, tmp_path, monkeypatch, capsys):
    training, validation, _ = translation.parts(translation.Data(data_directory))
    test = Examples([{"source": "", "target": "eins"}], "test.en")
    monkeypatch.setattr(translation, "parts", lambda data: (training, validation, test))
    assert main(*TINY, "--data.directory", data_directory, "--output", tmp_path / "run") == 2
    assert "example 0 of test.en has the source '', which has no tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_line_n_of_the_translations_is_example_n(finished_run, tmp_path, monkeypatch):
    model, _ = jaxlm.load_pretrained(finished_run / "model")
    tokenizer = load_tokenizer(finished_run / "model")
    monkeypatch.setattr(translation, "generate_text", lambda *_: ["eins\nzwei", "drei\r"])
    for module, name in ((translation.seq2seq, "write_test"), (translation.lib, "report")):
        monkeypatch.setattr(module, name, lambda *_, **__: None)
    result = SimpleNamespace(params=None)
    test = Examples([{"source": "one", "target": "eins"}] * 2)
    translation.translate(tmp_path, translation.PRESETS["verses"], model, result, tokenizer, test, 0.0)
    assert (tmp_path / "translations.txt").read_bytes() == b"eins\\nzwei\ndrei\\r\n"


def test_splits_of_the_included_verses_do_not_overlap():
    training, validation, test = translation.parts(translation.Data())
    assert len(training) + len(validation) + len(test) == 5833
    assert not set(training.column("source")) & set(test.column("source"))
