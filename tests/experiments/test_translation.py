"""The translation experiment, small: what it leaves, the command for finished models, bad input."""

import gzip

import pytest

import jaxlm
from experiments import translation
from jaxlm import cli
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
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pairs")
    for name, count in (("train", 4), ("val", 1), ("test_2016_flickr", 1)):
        for language, words in (("en", NUMBERS), ("de", NUMBERS.values())):
            with gzip.open(directory / f"{name}.{language}.gz", "wt") as file:
                file.write("".join(f"{word}\n" for word in words) * count)
    return directory


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    run = tmp_path_factory.mktemp("translation") / "run"
    assert main(*TINY, "--data.directory", files, "--output", run) == 0
    return run


def test_what_a_run_leaves(finished, capsys):
    results = read_results(finished)
    assert [score.name.split()[0] for score in results["scores"]] == ["BLEU", "BLEU", "chrF2"]
    assert results["scores"][2].value > 99.0
    assert (finished / "translations.txt").read_text().split() == list(NUMBERS.values())
    assert {"source": "two", "reference": "zwei", "output": "zwei"} in read_samples(finished)
    assert "zwei" in (finished / "report.html").read_text()
    maps = read_attention(finished)
    assert {"".join(item.rows).split("</s>")[0] for item in maps} <= set(NUMBERS.values())
    assert (finished / "attention.png").read_bytes().startswith(b"\x89PNG")
    model, _ = jaxlm.load_pretrained(finished / "model")
    assert model.config.decoder_start_id == 0
    assert cli.main(["translate", str(finished), "three", "one"]) == 0
    assert capsys.readouterr().out.split() == ["drei", "eins"]


def test_a_missing_file_is_named(files, tmp_path, capsys):
    assert main(*TINY, "--data.directory", files, "--data.target", "fr", "--output", tmp_path / "run") == 2
    assert "train.fr.gz is not a file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_embedded_verses_are_split_without_overlap():
    training, validation, test = translation.parts(translation.Data())
    assert len(training) + len(validation) + len(test) == 5833
    assert not set(training.column("source")) & set(test.column("source"))
