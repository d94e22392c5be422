"""Small runs of the chess experiment: files of a run, resuming, presets, errors, and the command ``jaxlm chess``."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest

import jaxlm
from experiments import chess
from jaxlm import cli
from jaxlm.data import ByteTokenizer, MoveTokenizer, chess_games, load_tokenizer, read_games, split_games
from jaxlm.testing.helpers import initial_params, tiny_model
from jaxlm.training.report import read_attention, read_boards, read_results, read_samples

SMALL = (
    "--training.evaluate-every", "2", "--training.checkpoint-every", "2", "--training.batch-size", "2",
    "--training.sequence-length", "64", "--optimizer.warmup-steps", "1", "--validation-fraction", "0.1",
    "--test-fraction", "0.4", "--tests.games", "3", "--tests.mates", "40", "--tests.sampled", "3", "--tests.random",
    "2", "--tests.engine", "0", "--tests.max-moves", "12",
)  # fmt: skip
LLAMA = ("--model.set", "num_layers=1", "num_heads=2", "embed_dim=16", "mlp_dim=32")


def main(*arguments: Any) -> int:
    return chess.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write games in SAN. Six games end with the same mate after different first moves; one game is illegal."""
    path: Path = tmp_path_factory.mktemp("games") / "games.txt"
    mates = [f"{pawn} e5 e4 Nc6 Qh5 Nf6 Bc4 d6 Qxf7" for pawn in ("a3", "b3", "h3", "a4", "h4", "c3")]
    path.write_text("\n".join([*chess_games("san").moves[:30], *mates, "e4 e4"]) + "\n")
    return path


@pytest.fixture(scope="module")
def finished_run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 4 steps. Tests must not change it."""
    run: Path = tmp_path_factory.mktemp("chess") / "run"
    extra = run.parent / "extra.txt"
    extra.write_text("e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 h5f7 1-0\nf2f3 e7e5 g2g4 d8h4 0-1\n")
    files = ("--data", file, "--extra-data", extra)
    assert main(*SMALL, *LLAMA, "--notation", "uci", *files, "--training.steps", "4", "--output", run) == 0
    return run


def test_files_of_a_run(finished_run: Path) -> None:
    results = read_results(finished_run)
    names = [score.name for score in results["scores"]]
    assert names == [
        "next move", "next move in top 5", "legal best move", "mate in one", "legal sampled move",
        "game without illegal move", "wins against random moves", "score against random moves",
        "wins against random moves, with search", "score against random moves, with search",
    ]  # fmt: skip
    assert (results["task"], results["notation"], results["steps"]) == ("chess", "uci", 4)
    assert load_tokenizer(finished_run / "model") == MoveTokenizer("uci")
    samples = read_samples(finished_run)
    assert len(samples) == 3
    assert all(sample["output"].count(",") == 4 and len(sample["reference"]) in (4, 5) for sample in samples)


def test_the_report_has_the_boards(finished_run: Path) -> None:
    boards = read_boards(finished_run)
    assert boards[0].title.startswith("Against random moves, game 1: ")
    page = (finished_run / "report.html").read_text()
    for board in boards:
        assert f"chess position {board.fen}" in page


def test_the_report_has_an_attention_map_of_a_game(finished_run: Path) -> None:
    (item,) = read_attention(finished_run)
    assert item.rows[0] == item.columns[0] == "<bos>"
    assert " ".join(item.columns[1:]) == item.title
    assert (finished_run / "attention.png").read_bytes().startswith(b"\x89PNG")
    page = (finished_run / "report.html").read_text()
    assert f"<figcaption>{item.title}</figcaption>" in page


@pytest.mark.thorough
def test_a_resumed_run_equals_an_uninterrupted_run(finished_run: Path, file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    for step in (run / "checkpoints").iterdir():
        if step.name.lstrip("0") == "4":
            shutil.rmtree(step)
    assert main("--resume", run) == 0
    assert (run / "model" / "model.safetensors").read_bytes() == (
        finished_run / "model" / "model.safetensors"
    ).read_bytes()
    assert read_results(run)["scores"] == read_results(finished_run)["scores"]


def test_a_resumed_run_rejects_another_notation(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--resume", finished_run, "--notation", "san") == 2
    assert "notation=san cannot change in a resumed run (saved value: uci)" in capsys.readouterr().err
    assert main("--resume", finished_run, "--optimizer.name", "adafactor") == 2
    assert "optimizer.name=adafactor cannot change in a resumed run" in capsys.readouterr().err
    assert main("--resume", finished_run, "--training.evaluation-batches", "1") == 2
    assert "training.evaluation_batches=1 cannot change in a resumed run" in capsys.readouterr().err


@pytest.mark.thorough
def test_an_encoder_decoder_on_san(file: Path, tmp_path: Path) -> None:
    sizes = ("--model.set", "num_layers=1", "num_heads=2", "embed_dim=16", "head_dim=8", "mlp_dim=32")
    options = (
        "--notation",
        "san",
        "--training.steps",
        "2",
        "--positions-per-game",
        "2",
        "--target-length",
        "3",
    )
    command = ("--preset", "t5", *SMALL, *sizes, *options, "--data", file, "--max-games", "34")
    assert main(*command, "--tests.mates", "0", "--tests.games", "1", "--output", tmp_path / "run") == 0
    names = [score.name for score in read_results(tmp_path / "run")["scores"]]
    assert names[-1] == "score against random moves, with search"
    assert "mate in one" not in names


@pytest.mark.thorough
@pytest.mark.parametrize("preset", ["gpt", "chess_llama", "lstm", "transformer_xl", "attention_rnn_lm", "t5"])
def test_every_preset_trains_and_plays(preset: str, file: Path, tmp_path: Path) -> None:
    sizes = ("--tests.games", "1", "--tests.mates", "0", "--training.steps", "2")
    assert main("--preset", preset, *SMALL, *sizes, "--data", file, "--output", tmp_path / "run") == 0
    assert read_results(tmp_path / "run")["steps"] == 2
    assert read_boards(tmp_path / "run")


@pytest.mark.parametrize("name", ["qwen3-0.6b", "openai-gpt", "chess-llama-tiny", "lstm-tiny"])
def test_a_transformer_has_as_many_positions_as_a_row(name: str) -> None:
    experiment = chess.Experiment(model=chess.lib.ModelConfig(name), notation="uci", min_count=1)
    model, params, _ = chess.build(experiment, ["e2e4 e7e5"], None)
    assert params is None
    assert model.max_positions == (None if name == "lstm-tiny" else experiment.training.sequence_length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tests.opening-moves", "12"), "tests.opening_moves=12 must be at most 200 and less than 12, the"),
        (("--tests.max-moves", "99", "--tests.opening-moves", "64"), "at most 200 and less than 64"),
        (("--preset", "lstm", "--tests.max-moves", "300", "--tests.opening-moves", "201"), "201 must be at most 200"),
    ],
)
def test_long_openings_are_an_error_before_the_training(
    options: tuple[str, ...], message: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(*SMALL, "--tests.engine", "1", *options, "--data", file, "--training.steps", "2", "--output", run) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_an_evaluation_reads_each_validation_game_once(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = list[float]()

    def stop(model: Any, losses: Any, batches: Any) -> None:
        weights.extend(batch.weights.sum() for batch in batches)
        raise ValueError("enough")

    monkeypatch.setattr(chess, "Evaluator", stop)
    options = ("--notation", "uci", "--data", file, "--training.batch-size", "7", "--output", tmp_path / "run")
    assert main(*SMALL, *LLAMA, *options) == 2
    assert "enough" in capsys.readouterr().err
    _, validation, _ = split_games(read_games(file), 0.1, 0.4)
    assert sum(weights) == sum(min(len(line.split()) + 1, 64) for line in validation.moves)


def test_invalid_data_options_print_errors(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("--data", file, "--max-games", "100") == 2
    assert "max_games=100 must be from 1 to 36, the number of games" in capsys.readouterr().err
    assert main("--data", file.parent / "missing.txt") == 2
    assert "missing.txt" in capsys.readouterr().err
    assert main("--data", file, "--extra-data", file.parent / "no_extra.txt") == 2
    assert "no_extra.txt" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- the command


def test_the_command_plays_a_game(
    finished_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("e4\nresign\n"))
    assert cli.main(["chess", str(finished_run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("You play white.")
    assert any("The model plays" in line for line in lines)
    assert lines[-1].endswith("Result: 0-1 (you resign)")


def test_the_command_rejects_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("gpt2-tiny", vocab_size=257)
    jaxlm.save_pretrained(tmp_path / "bytes", model, initial_params(model))
    ByteTokenizer().save(tmp_path / "bytes")
    assert cli.main(["chess", str(tmp_path / "bytes")]) == 2
    error = capsys.readouterr().err
    assert "has no chess model" in error
    assert "ByteTokenizer" in error
    assert len(error.splitlines()) == 1
    assert cli.main(["chess", str(tmp_path / "nothing")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    MoveTokenizer("uci").save(tmp_path / "bytes")
    assert cli.main(["chess", str(tmp_path / "bytes")]) == 2
    assert "the tokenizer has 1,971 ids, and the model has 257" in capsys.readouterr().err
