"""Players and matches: scripted games with known results, batched calls, and engines."""

from __future__ import annotations

import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import chess
import numpy as np
import pytest

from jaxlm.data.moves import MoveTokenizer
from jaxlm.tasks import chess_players
from jaxlm.tasks.chess import board_after
from jaxlm.tasks.chess_players import EnginePlayer, MatchResult, MaterialPlayer, ModelPlayer, RandomPlayer, play_match
from tests.tasks.oracle import oracle

UCI = MoveTokenizer("uci")
FOOL = "f2f3 e7e5 g2g4 d8h4"
SCHOLAR = "e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 h5f7"
SHUFFLE = "g1f3 g8f6 f3g1 f6g8 " * 3
STALEMATE = "e2e3 a7a5 d1h5 a8a6 h5a5 h7h5 h2h4 a6h6 a5c7 f7f6 c7d7 e8f7 d7b7 d8d3 b7b8 d3h7 b8c8 f7g6 c8e6"


class ScriptedPlayer:
    """A player that plays the next move of the line that matches the game. It records the plies of each call."""

    def __init__(self, *lines: str, max_moves: int | None = None) -> None:
        self.lines, self.calls, self.max_moves = [line.split() for line in lines], [], max_moves  # type: ignore[var-annotated]

    def choose(self, boards: Sequence[chess.Board], rng: np.random.Generator) -> list[chess.Move | None]:
        self.calls.append([len(board.move_stack) for board in boards])
        moves = []
        for board in boards:
            played = [move.uci() for move in board.move_stack]
            line = next(line for line in self.lines if line[: len(played)] == played)
            moves.append(chess.Move.from_uci(line[len(played)]) if len(line) > len(played) else None)
        return moves


def counts(result: MatchResult) -> tuple[int, ...]:
    return result.wins, result.draws, result.losses, result.unfinished, result.illegal


def test_players_alternate_colours_and_results_count_for_the_first_player() -> None:
    player = ScriptedPlayer(SCHOLAR)
    result = play_match(player, ScriptedPlayer(SCHOLAR), games=3)
    assert counts(result) == (2, 0, 1, 0, 0)
    assert result.games.moves == (SCHOLAR,) * 3
    assert result.games.results == ("1-0",) * 3
    assert result.score.value == pytest.approx(2 / 3)
    assert player.calls[0] == [0, 0], "white in games 0 and 2"
    assert player.calls[1:] == [[2, 1, 2], [4, 3, 4], [6, 5, 6]], "one call per turn, with all boards"
    black = play_match(ScriptedPlayer(FOOL), ScriptedPlayer(FOOL), games=3)
    assert (black.wins, black.losses, black.games.results) == (1, 2, ("0-1",) * 3)


@pytest.mark.parametrize(
    ("line", "options", "expected"),
    [
        (SHUFFLE, {}, (0, 2, 0, 0, 0)),
        (STALEMATE, {}, (0, 2, 0, 0, 0)),
        (SCHOLAR, {"max_moves": 6}, (0, 2, 0, 2, 0)),
        (SCHOLAR, {"max_moves": 7}, (1, 0, 1, 0, 0)),
        ("e2e4 e7e5 e4e5", {}, (1, 0, 1, 0, 1)),
        ("e2e4 e7e5 g1f3", {}, (1, 0, 1, 0, 1)),
    ],
)
def test_results_of_games_follow_the_rules(line: str, options: dict, expected: tuple[int, ...]) -> None:
    assert counts(play_match(ScriptedPlayer(line), ScriptedPlayer(line), games=2, **options)) == expected


def test_a_player_can_play_against_itself() -> None:
    player = ScriptedPlayer(SCHOLAR)
    assert counts(play_match(player, player, games=2)) == (1, 0, 1, 0, 0)


def test_random_players_follow_the_seed() -> None:
    matches = [play_match(RandomPlayer(), RandomPlayer(), games=2, max_moves=10, seed=seed) for seed in (1, 1, 2)]
    assert matches[0] == matches[1]
    assert matches[0].games.moves != matches[2].games.moves
    assert all(len(line.split()) == 10 for line in matches[0].games.moves)
    moves = RandomPlayer().choose([chess.Board()] * 300, np.random.default_rng(0))
    assert {move.uci() for move in moves if move} == {move.uci() for move in chess.Board().legal_moves}


def test_pairs_of_games_share_a_random_opening() -> None:
    result = play_match(RandomPlayer(), RandomPlayer(), games=4, max_moves=7, opening_moves=6, seed=5)
    openings = [line.split()[:6] for line in result.games.moves]
    assert openings[0] == openings[1]
    assert openings[2] == openings[3]
    assert openings[0] != openings[2]


def test_model_players_play_legal_moves_if_masked() -> None:
    masked_player = ModelPlayer(*oracle(UCI, [SCHOLAR, "e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 e2e4"]), UCI)
    # The checkmate and the illegal move e2e4 have equal logits. The unmasked player plays e2e4, the smaller id.
    assert counts(play_match(masked_player, ScriptedPlayer(SCHOLAR), games=2)) == (1, 0, 1, 0, 0)
    unmasked_player = ModelPlayer(*oracle(UCI, [SCHOLAR, "e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 e2e4"]), UCI, masked=False)
    result = play_match(unmasked_player, ScriptedPlayer(SCHOLAR), games=1)
    assert counts(result) == (0, 0, 1, 0, 1)
    assert result.games.moves == (SCHOLAR.rsplit(" ", 1)[0],)
    ending_player = ModelPlayer(*oracle(UCI, [""]), UCI, masked=False)
    assert ending_player.choose([chess.Board()], np.random.default_rng(0)) == [None]


def test_a_search_gives_mate_and_avoids_stalemate_and_repeated_positions() -> None:
    *moves, stalemate = STALEMATE.split()
    before_stalemate, repeated = " ".join(moves), "g1f3 g8f6 f3g1"
    before_mates = [SCHOLAR.rsplit(" ", 1)[0], FOOL.rsplit(" ", 1)[0]]
    lines = [STALEMATE, f"{repeated} f6g8", *(f"{line} a2a3" for line in before_mates[:1]), f"{before_mates[1]} a7a6"]
    boards = [board_after(line) for line in (before_stalemate, repeated, *before_mates)]
    rng = np.random.default_rng(0)
    plain, searching = (ModelPlayer(*oracle(UCI, lines), UCI, search=search) for search in (False, True))
    assert [str(move) for move in plain.choose(boards, rng)] == [stalemate, "f6g8", "a2a3", "a7a6"]
    played = searching.choose(boards, rng)
    assert [str(move) for move in played[2:]] == ["h5f7", "d8h4"]
    for board, move in zip(boards, played, strict=True):
        assert move is not None
        board.push(move)
    assert not boards[0].is_stalemate()
    assert not boards[1].is_repetition(2)


def test_a_search_needs_masked_moves() -> None:
    with pytest.raises(ValueError, match="search=True selects only legal moves: set masked=True"):
        ModelPlayer(*oracle(UCI, ["e2e4"]), UCI, masked=False, search=True)


def test_a_model_player_with_a_temperature_samples_legal_moves() -> None:
    player = ModelPlayer(*oracle(UCI, ["e2e4", "d2d4", "e2e5"]), UCI, temperature=1.0)
    moves = player.choose([chess.Board()] * 60, np.random.default_rng(0))
    names = [move.uci() for move in moves if move]
    assert len(names) == 60
    assert {"e2e4", "d2d4"} <= set(names)
    assert names.count("e2e4") + names.count("d2d4") > 50
    assert all(chess.Board().is_legal(move) for move in moves if move)


def test_a_san_player_plays_a_random_move_if_no_legal_move_is_in_the_vocabulary() -> None:
    tokenizer = MoveTokenizer("san", ["Qxf7"])
    player = ModelPlayer(*oracle(tokenizer, ["Qxf7"]), tokenizer)
    moves = player.choose([chess.Board()] * 20, np.random.default_rng(0))
    assert len({move.uci() for move in moves if move}) > 3
    assert player.choose([board_after(SCHOLAR.rsplit(" ", 1)[0])], np.random.default_rng(0)) == [
        chess.Move.from_uci("h5f7")
    ]


def test_the_score_has_the_wilson_interval() -> None:
    games = play_match(ScriptedPlayer(SCHOLAR), ScriptedPlayer(SCHOLAR), games=1).games
    score = MatchResult(200, 0, 0, 0, 0, games).score
    assert (score.value, score.high) == pytest.approx((1.0, 1.0))
    assert score.low == pytest.approx(0.98115, abs=1e-5)
    half = MatchResult(40, 20, 40, 5, 0, games)
    assert (half.score.low, half.score.high) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    assert str(half) == ("40 wins, 20 draws (5 unfinished), 40 losses (0 by illegal moves): score 0.500 [0.404, 0.596]")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"games": 0}, "games=0 must be at least 1"),
        ({"max_moves": 0}, "max_moves=0 must be at least 1"),
        ({"opening_moves": -1}, "opening_moves=-1 must be at least 0"),
        ({"opening_moves": 9, "max_moves": 9}, "opening_moves=9 must be at most 200 and less than 9, the maximum"),
        ({"opening_moves": 201, "max_moves": 300}, "opening_moves=201 must be at most 200 and less than 300"),
        ({"max_moves": 65}, "model reads games of at most 63 moves: use max_moves=64 or fewer"),
    ],
)
def test_invalid_match_options_raise_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        play_match(ScriptedPlayer("", max_moves=63), RandomPlayer(), **options)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [(-1, "temperature=-1 must be finite and at least 0"), (1e-45, "temperature=1e-45 is too small")],
)
def test_an_invalid_temperature_raises_an_error(temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelPlayer(*oracle(UCI, [FOOL]), UCI, temperature=temperature)


# -------------------------------------------------------------------------------------------------- engines

FAKE_ENGINE = """#!{python}
import sys, chess
board, level = chess.Board(), None
for line in sys.stdin:
    words = line.split()
    if words[0] == "uci":
        print("id name fake{option}\\nuciok")
    elif words[0] == "isready":
        print("readyok")
    elif words[0] == "setoption":
        level = words[-1]
    elif words[0] == "position":
        board = chess.Board()
        for move in words[words.index("moves") + 1 :] if "moves" in words else []:
            board.push_uci(move)
    elif words[0] == "go":
        assert level == "{level}" and words[1:] == ["nodes", "7"]
        print("bestmove", min(move.uci() for move in board.legal_moves))
    elif words[0] == "quit":
        break
    sys.stdout.flush()
"""


def write_program(folder: Path, text: str) -> Path:
    path = folder / "stockfish"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def write_fake_engine(folder: Path, level: int | None) -> Path:
    option = "" if level is None else "\\noption name Skill Level type spin default 20 min 0 max 20"
    return write_program(folder, FAKE_ENGINE.format(python=sys.executable, option=option, level=level))


def test_an_engine_player_plays_a_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fake_engine(tmp_path, 3)
    monkeypatch.setattr(chess_players, "_engine_path", lambda: str(tmp_path))
    with EnginePlayer(skill_level=3, nodes=7) as engine:
        moves = engine.choose([chess.Board(), board_after("e2e4")], np.random.default_rng(0))
        assert [move.uci() for move in moves if move] == ["a2a3", "a7a5"]
        assert play_match(engine, RandomPlayer(), games=2, max_moves=4).games.moves[0].startswith("a2a3 ")


def test_missing_and_unsuitable_engines_raise_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chess_players, "_engine_path", lambda: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no chess engine stockfish on the PATH.*apt-get install stockfish"):
        EnginePlayer()
    with pytest.raises(FileNotFoundError, match="no chess engine /no/engine"):
        EnginePlayer("/no/engine")
    with pytest.raises(ValueError, match="nodes=0 must be at least 1"):
        EnginePlayer(nodes=0)
    with pytest.raises(ValueError, match="does not answer as a UCI engine"):
        EnginePlayer(write_program(tmp_path, "#!/bin/sh\nexit 1\n"))
    with pytest.raises(ValueError, match="has no skill level 0"):
        EnginePlayer(write_fake_engine(tmp_path, None))


@pytest.mark.parametrize(
    ("fen", "expected"),
    [
        ("rnb1kbnr/ppp1pppp/8/3p4/4P3/8/PPPP1PPP/RNBQKBNR w KQkq - 0 2", "e4d5"),  # a pawn without protection
        ("4k3/8/8/3q4/8/8/8/3QK3 w - - 0 1", "d1d5"),  # a queen without protection
        ("4k3/2p1p3/3p4/8/8/3Q4/8/4K3 w - - 0 1", None),  # the pawn on d6 is protected, so it is not captured
        ("8/P6k/8/8/8/8/8/K7 w - - 0 1", "a7a8q"),
        ("6k1/5ppp/8/8/8/8/8/R3K3 w - - 0 1", "a1a8"),  # checkmate
        ("k7/2Q5/8/8/8/8/8/1K6 w - - 0 1", None),  # no stalemate, as after c7b6 or c7c6
    ],
)
def test_a_material_player_captures_promotes_mates_and_avoids_losses(fen: str, expected: str | None) -> None:
    board = chess.Board(fen)
    (move,) = MaterialPlayer().choose([board], np.random.default_rng(0))
    assert board.fen() == fen
    assert move is not None
    if expected is not None:
        assert move.uci() == expected
        return
    assert not board.is_capture(move)
    board.push(move)
    assert not board.is_stalemate()
    assert not any(board.is_capture(reply) for reply in board.legal_moves), "no piece is lost"


def test_a_material_player_wins_against_random_moves() -> None:
    match = play_match(MaterialPlayer(), RandomPlayer(), 20, max_moves=256, seed=3)
    assert match.wins >= 18
