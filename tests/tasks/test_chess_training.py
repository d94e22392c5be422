"""Games as training examples, boards of a report, and the player that searches for a mate in one."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data.games import Games, chess_games, to_san, to_uci
from jaxlm.data.moves import MoveTokenizer
from jaxlm.tasks import chess_training
from jaxlm.tasks.chess import MatchResult, board_after
from jaxlm.tasks.chess_training import extra_games, game_batches, generated_games, match_boards, write_test
from jaxlm.testing.helpers import initial_params, tiny_model
from jaxlm.training.report import read_attention, read_samples

UCI = MoveTokenizer("uci")
SCHOLAR = "e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 h5f7"
FOOL = "f2f3 e7e5 g2g4 d8h4"


def test_extra_games_are_reported_and_have_no_held_out_games(tmp_path: Path) -> None:
    path, reports = tmp_path / "extra.txt", list[str]()
    path.write_text(f"{SCHOLAR}\ne4 e4\n{to_san(FOOL)}\n{FOOL}\n")
    assert extra_games(path, "uci", {FOOL, "e2e4"}, report=reports.append) == (SCHOLAR,)
    assert "3 games, 1 rejected" in reports[0]
    assert "line 2: move 1 of black, 'e4', is illegal" in reports[0]
    assert reports[1:] == ["2 of these games are left out: they equal validation or test games"]
    assert extra_games(None, "uci", {FOOL}, report=reports.append) == ()
    assert len(reports) == 2


def test_causal_batches_predict_every_move_and_the_end() -> None:
    model = tiny_model("gpt2-tiny", vocab_size=UCI.vocab_size, max_positions=16)
    source, to_batch, summary = game_batches(model, UCI, [SCHOLAR, FOOL], 1, 15)
    assert source.rows_per_epoch == 1
    batch = to_batch(source.batch(0, [0]))
    assert batch.weights.sum() == 8 + 5, "targets are all moves and an EOS token per game"
    assert "0 games cut" in summary
    source, to_batch, summary = game_batches(model, UCI, [SCHOLAR, FOOL], 1, 6)
    assert "1 games cut after 6 moves" in summary
    weights = sum(to_batch(source.batch(index, [0])).weights.sum() for index in range(source.rows_per_epoch))
    assert weights == 6 + 5, "the long game is truncated"


def test_an_encoder_decoder_predicts_the_moves_after_a_position() -> None:
    model = tiny_model("t5-tiny", vocab_size=UCI.vocab_size)
    source, to_batch, summary = game_batches(model, UCI, [SCHOLAR], 4, 5, positions_per_game=4, target_length=2)
    assert summary.endswith("sources of at most 5 tokens, targets of at most 2")
    batch = to_batch(source.batch(0, range(4)))
    game = UCI.encode_game(SCHOLAR).tolist()
    for row in range(4):
        source_ids = [id for id in np.asarray(batch.inputs["source"][row]).tolist() if id]
        assert source_ids == game[: len(source_ids)]
        assert 1 <= len(source_ids) <= 5
        target_ids = np.asarray(batch.targets[row])[np.asarray(batch.weights[row]) > 0].tolist()
        assert target_ids == game[len(source_ids) : len(source_ids) + 2]


@pytest.mark.parametrize("name", ["length", "positions_per_game", "target_length"])
def test_options_must_be_at_least_1(name: str) -> None:
    model = tiny_model("t5-tiny", vocab_size=UCI.vocab_size)
    options = {"length": 5, "positions_per_game": 1, "target_length": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        game_batches(model, UCI, [SCHOLAR], 1, **options)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "fields"), [("gpt2-tiny", {"max_positions": 30}), ("transformer-xl-tiny", {})])
def test_the_attention_map_of_a_causal_model_has_the_first_moves_of_a_game(
    name: str, fields: dict[str, int], tmp_path: Path
) -> None:
    model, games = tiny_model(name, vocab_size=UCI.vocab_size, **fields), list(chess_games("uci").moves[:2])
    params, words = initial_params(model), games[0].split()
    assert 40 <= len(words) <= 60
    write_test(tmp_path, model, params, UCI, [" ".join(words[:12]), " ".join(games[1].split()[:20])])
    (item,) = read_attention(tmp_path)
    assert item.title == " ".join(words[:12])
    assert list(item.rows) == list(item.columns) == ["<bos>", *words[:12]]
    weights = np.asarray(item.weights)
    assert np.allclose(np.triu(weights, 1), 0.0), "a move attends to the moves before it"
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-3)
    assert len(read_samples(tmp_path)) == 2
    write_test(tmp_path, model, params, UCI, games[:1])
    (item,) = read_attention(tmp_path)
    assert item.columns == ["<bos>", *words[: fields.get("max_positions", chess_training.MAP_TOKENS) - 1]]


@pytest.mark.thorough
def test_the_attention_map_of_an_encoder_decoder_has_the_next_moves_as_rows(tmp_path: Path) -> None:
    model, line = tiny_model("t5-tiny", vocab_size=UCI.vocab_size), chess_games("uci").moves[0]
    params, words = initial_params(model), line.split()[:10]
    write_test(tmp_path, model, params, UCI, [" ".join(words)], target_length=3)
    (item,) = read_attention(tmp_path)
    assert list(item.columns) == ["<bos>", *words[:5]]
    assert list(item.rows) == words[5:8]
    # The decoder reads what it reads in the training: its start id, then the target without the last move.
    source, target = UCI.encode_game(" ".join(words))[None, :6], UCI.encode(" ".join(words[5:8]))
    tokens = np.concatenate([[model.config.decoder_start_id], target[:-1]])[None]
    layers = model.attention_weights(params, jnp.asarray(tokens), source=jnp.asarray(source))["cross"]
    np.testing.assert_allclose(item.weights, np.stack(layers)[:, 0].mean(axis=(0, 1)), atol=1e-4)


def test_a_family_without_attention_has_no_attention_map(tmp_path: Path) -> None:
    model = tiny_model("lstm-tiny", vocab_size=UCI.vocab_size)
    write_test(tmp_path, model, initial_params(model), UCI, ["e2e4 e7e5"])
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize(
    ("games", "message"),
    [([], "there are no games to sample"), ([SCHOLAR, " "], "game 1 has no moves: remove it")],
)
def test_samples_need_games_with_moves(games: list[str], message: str, tmp_path: Path) -> None:
    model = tiny_model("lstm-tiny", vocab_size=UCI.vocab_size)
    with pytest.raises(ValueError, match=message):
        write_test(tmp_path, model, {}, UCI, games)
    assert not list(tmp_path.iterdir())


def test_match_boards_show_captures_and_last_positions() -> None:
    games = Games((SCHOLAR, SCHOLAR, FOOL), ("1-0", "1-0", "*"), "uci")
    boards = list(match_boards("nobody", MatchResult(1, 1, 1, 0, 0, games)))
    assert [board.title for board in boards[:3]] == [
        "Against nobody, game 1: won in 7 moves", "Against nobody, game 1: won in 7 moves",
        "Against nobody, game 2: lost in 7 moves",
    ]  # fmt: skip
    assert boards[0].text == "The model is white. Its most valuable capture is move 7."
    assert boards[1].fen == board_after(SCHOLAR).fen()
    assert (boards[1].last_move, boards[2].text) == ("h5f7", "The model is black. The last position.")
    en_passant = Games(("e2e4 a7a6 e4e5 d7d5 e5d6 c7d6",), ("*",), "uci")
    captured = next(match_boards("nobody", MatchResult(1, 0, 0, 1, 0, en_passant)))
    assert captured.text == "The model is white. Its most valuable capture is move 5."


def test_generated_games_are_legal_games_with_mates_that_follow_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="seed=-1 must be at least 0"):
        generated_games(0, seed=-1)
    games = generated_games(6, "san", seed=1)
    assert (len(games), games.notation) == (6, "san")
    assert set(games.results) <= {"1-0", "0-1"}
    for line, result in zip(games.moves, games.results, strict=True):
        board = board_after(to_uci(line))
        assert board.is_checkmate()
        assert board.result() == result
    assert generated_games(6, "uci", seed=1).moves == tuple(to_uci(line) for line in games.moves)
    assert not set(games.moves) & set(generated_games(6, "san", seed=2).moves)
    assert len(generated_games(0)) == 0
    monkeypatch.setattr(chess_training, "_GAMES_PER_MATCH", 2)
    first, second = (set(generated_games(4, seed=seed).moves) for seed in (0, 2))
    assert (len(first), len(first | second)) == (4, 8), "blocks of different seeds differ"
    with pytest.raises(ValueError, match="count=-1 must be at least 0"):
        generated_games(-1)
