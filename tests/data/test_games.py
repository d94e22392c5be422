"""Chess games: the included file, readers of each format, rejected games, duplicates and splits."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.resources
from pathlib import Path

import chess
import pytest

from jaxlm.data import games as games_module
from jaxlm.data.examples import Rejected
from jaxlm.data.games import Games, chess_games, read_games, split_games, to_san, to_uci

PGN = """[Event "First"]
[Result "1-0"]

1. e4 {best} e5 2. Qh5 (2. Nf3 Nc6 $1) Nc6 3. Bc4 Nf6?? 4. Qxf7# 1-0

[Event "Second"]
[Result "1/2-1/2"]

1. d4 d5 2. Kd3 1/2-1/2

[Event "Broken"]

1. d4 $3 hello d5 1-0

[Event "Third"]
[SetUp "1"]
[FEN "4k3/8/8/8/8/8/4P3/4K3 w - - 0 1"]
[Result "*"]

1. e4 *
[Event "Fourth"]
[Result "0-1"]

1. f3 e5 2. g4
{[%clk 0:01]}
Qh4# 0-1

[Event "Fifth"]
[Result "*"]

*
"""


@functools.cache
def included(notation: str) -> Games:
    return chess_games(notation)  # type: ignore[arg-type]


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_included_games_match_their_description() -> None:
    folder = importlib.resources.files("jaxlm.data")
    data = gzip.decompress(folder.joinpath("chess_games.txt.gz").read_bytes())
    note = folder.joinpath("CHESS.md").read_text(encoding="utf-8")
    games = included("san")
    assert hashlib.sha256(data).hexdigest() in note
    assert f"{len(data):,} bytes" in note
    assert (len(games), games.rejected, games.duplicates()) == (2000, (), [])
    assert f"{sum(len(line.split()) for line in games.moves):,} moves" in note
    assert f"{len({move for line in games.moves for move in line.split()}):,} distinct SAN moves" in note
    assert [games.results.count(result) for result in ("1-0", "0-1", "1/2-1/2")] == [715, 486, 799]


@pytest.mark.thorough
def test_to_san_and_to_uci_convert_included_games() -> None:
    uci, san = included("uci"), included("san")
    assert uci.results == san.results
    for line, expected in zip(uci.moves[::20], san.moves[::20], strict=True):
        assert to_san(line) == expected
        assert to_uci(expected) == line
    for line, expected in zip(uci.moves[::100], san.moves[::100], strict=True):  # compare with python-chess
        board = chess.Board()
        for move, name in zip(line.split(), expected.split(), strict=True):
            assert board.san(chess.Move.from_uci(move)).rstrip("+#") == name
            board.push_uci(move)
    raw = gzip.decompress(importlib.resources.files("jaxlm.data").joinpath("chess_games.txt.gz").read_bytes())
    stripped = [line.rsplit(" ", 1)[0].replace("+", "").replace("#", "") for line in raw.decode().splitlines()]
    assert list(san.moves) == stripped


def test_lines_in_both_notations_are_read_and_bad_lines_are_reported(tmp_path: Path) -> None:
    lines = [
        "e4 e5 Nf3 1-0",
        "",
        "e2e4 e7e5 g1f3 0-1",
        "e4 e5 Ke3 1-0",
        "d4 d5 Ngf3 0-0 1/2-1/2",
        "d4 hello",
        "1-0",
        "1. e4 e5 1-0",
        "Nf3 d5 d4 c5 Nd2 *",
        "e2e4 0000",
        "Ng1f3 d5 d4 Nc6 e3 Bf5 Bb5 a6 Bxc6+",
    ]
    games = read_games(write(tmp_path / "games.txt", "\n".join(lines)), "san")
    assert games.moves == ("e4 e5 Nf3", "e4 e5 Nf3", "Nf3 d5 d4 Nc6 e3 Bf5 Bb5 a6 Bxc6")
    assert games.results == ("1-0", "0-1", "*")
    reasons = {game.line: game.reason for game in games.rejected}
    assert reasons == {
        4: "move 2 of white, 'Ke3', is illegal",
        5: "move 2 of black, '0-0', is illegal",
        6: "move 1 of black, 'hello', is unreadable",
        7: "no moves",
        8: "move 1 of white, '1.', is unreadable; a file with move numbers or tags needs the suffix .pgn",
        9: "move 3 of white, 'Nd2', is ambiguous",
        10: "move 1 of black, '0000', is a null move",
    }
    assert games.duplicates() == [[0, 1]]
    report = games.report(max_rejected=2).splitlines()
    assert report[0].endswith("games.txt: 3 games, 7 rejected, 1 duplicates")
    assert report[1].endswith("games.txt, line 4: move 2 of white, 'Ke3', is illegal")
    assert report[-1] == "  and 5 more rejected games"


def test_pgn_readers_keep_only_main_lines(tmp_path: Path) -> None:
    for name in ("games.pgn", "games.pgn.gz"):
        games = read_games(write(tmp_path / name, PGN), "uci")
        assert games.moves == ("e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 h5f7", "f2f3 e7e5 g2g4 d8h4")
        assert games.results == ("1-0", "0-1")
        assert [game.line for game in games.rejected] == [6, 11, 15, 28]
        illegal, broken, start, empty = (game.reason for game in games.rejected)
        assert "Kd3" in illegal
        assert "illegal" in illegal
        assert broken == "'hello' in the text of the game is not a move"
        assert "standard chess from the initial position" in start
        assert empty == "no moves"
    assert read_games(tmp_path / "games.pgn", "san").moves[0] == "e4 e5 Qh5 Nc6 Bc4 Nf6 Qxf7"


def test_pgn_without_tags_and_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read_games(write(tmp_path / "a.pgn", "1. e4 e5 2. Nf3 *\n\n1.d4 d5 1-0\n")).results == ("*", "1-0")
    games = read_games(write(tmp_path / "b.pgn", f"\ufeff{PGN}".replace("\n", "\r\n")))
    assert len(games) == 2
    assert len(games.rejected) == 4


def test_a_pgn_game_without_a_result_continues_after_an_empty_line(tmp_path: Path) -> None:
    first = '[Event "a"]\n[Result "1-0"]\n\n1. e4 e5\n\n2. Nc3\n\n2... Nf6 {so far}\n\n1-0\n\n'
    other = '1. d4 (1. c4\n\n1... c5) d5\n\n1.e4 c5\n\n[Event "b"]\n\n{a comment}\n\n1. Nf3\n\n1... d5 *'
    games = read_games(write(tmp_path / "a.pgn", first + other), "san")
    assert games.moves == ("e4 e5 Nc3 Nf6", "d4 d5", "e4 c5", "Nf3 d5")
    assert games.results == ("1-0", "*", "*", "*")
    assert not games.rejected
    for comment in ("{Game 2}\n", "{Game 2} ", "; Game 2\n"):
        games = read_games(write(tmp_path / "b.pgn", f"1. d4 d5\n\n{comment}1. c4 c5\n"), "san")
        assert games.moves == ("d4 d5", "c4 c5")


def test_an_error_in_a_pgn_game_without_tags_does_not_reject_the_next_game(tmp_path: Path) -> None:
    first_games = "1. e4 hello *\n\n1. d4 {a comment\n\nwith an empty line} d5 ; and {\n2. Nf3 1-0\n\n\n"
    games = read_games(write(tmp_path / "A.PGN", first_games + "1 e4 e5 2 Ke3 *\n\n1 e4 c5 *\n"), "san")
    assert games.moves == ("d4 d5 Nf3", "e4 c5")
    assert [game.line for game in games.rejected] == [1, 9]
    assert games.rejected[0].reason == "'hello' in the text of the game is not a move"
    assert "Ke3" in games.rejected[1].reason


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("1. e4 garbage e5 *", "garbage"),
        ("1. e4 e5 {garbage ( } 2. Nf3 ; garbage\n% garbage\nNc6 (2... d6 (2... Nf6) 3. d4) 3.Bb5!? $1 a6 *", None),
        ("1. e4 d6 2. e5 d5 3. exd6 e.p. Nf6 4... 0-0 *", None),
        ("1. e4 e5 2. N", "N"),
        ("1 e4 e5 2 Nf3 3N", "3N"),
        ("1 . e4 1 ... e5 2. .. Nf3 2. ... Nc6 ...Bb5 *", None),
    ],
)
def test_unknown_words_in_pgn_are_found(text: str, unknown: str | None) -> None:
    ((_, game),) = games_module._pgn_games(f'[Event "garbage in a tag"]\n\n{text}')
    assert games_module._unknown_word(game) == unknown


FEN = "8/8/8/8/4k3/8/8/4K2R w K - 0 1"


@pytest.mark.parametrize(
    ("text", "moves", "rejected"),
    [
        # A result ends a game, also without an empty line after it, but not in a comment or variation.
        ("1. a4 a5 1/2-1/2\n1. b4 b5 0-1\n", ["a4 a5", "b4 b5"], {}),
        ("1. e4 e5 1-0 1. d4 d5 0-1", ["e4 e5", "d4 d5"], {}),
        ("1. e4 {1-0 *} e5{x}1-0{resigns} ; 0-1\n(1. c4) 2. Nf3 *", ["e4 e5"], {2: "the game begins with move 2, not"}),
        ("1. e4 (1. d4 d5 1-0) 1... e5 *", ["e4 e5"], {}),
        # Tags as in the PGN standard and in python-chess.
        (f'[FEN "{FEN}"]\n[White   "K"]\n\n1. Kd1 *\n\n1. e4 *', ["e4"], {1: "the game is not standard chess"}),
        ('[Variant "Chess960"]\n[Time-Control "60"]\n\n1. e4 *\n1. d4 *', ["d4"], {1: "the game is not standard"}),
        (f'[White "A"] [ FEN "{FEN}" ]\n[Black "A "b" \\"]\n1. Kd1 *\n1. d4 *', ["d4"], {1: "the game is not"}),
        (f'[FEN "{FEN}"]\n; [x\n% comment\n\n[White "K"]\n1. Kd1 *\n1. e4 *', ["e4"], {1: "the game is not standard"}),
        ('[Event "a"]\n\n[Event "b"]\n\n1. e4 *', ["e4"], {1: "no moves"}),
        # Comments and variations.
        ('1. e4 {from\n[Site "Paris"]\nbook} e5 1-0\n\n[Event "b"]\n1. d4 *', ["e4 e5", "d4"], {}),
        ('1. e4 {from\n\n[Event "b"]\n1. d4 *\n[Event "c"]\n1. c4 {x} c5 *', ["d4", "c4 c5"], {1: "'{' in the text"}),
        ("1. d4 *\n1. e4 {from\n\n1. d4 *", ["d4"], {2: "'{' in the text of the game is not closed"}),
        ('1. e4 (1. d4\n\n[Event "b"]\n1. c4 *', ["c4"], {1: "'(' in the text of the game is not closed"}),
        ("1. e4 ) e5 *\n1. c4 *", ["c4"], {1: "')' in the text of the game is not a move"}),
    ],
)  # fmt: skip
def test_each_pgn_game_is_read_or_rejected_alone(
    text: str, moves: list[str], rejected: dict[int, str], tmp_path: Path
) -> None:
    games = read_games(write(tmp_path / "a.pgn", text), "san")
    assert list(games.moves) == moves
    assert [game.line for game in games.rejected] == list(rejected)
    for game in games.rejected:
        assert game.reason.startswith(rejected[game.line])


@pytest.mark.parametrize(
    ("tag", "after", "result"),
    [
        ("?", "1-0", "1-0"), ("1-0 ", "*", "1-0"), ("1/2", "1/2-1/2", "1/2-1/2"), ("*", "0-1", "0-1"),
        ("1-0", "0-1", "1-0"), ("?", "", "*"),
    ],
)  # fmt: skip
def test_a_pgn_result_is_that_of_the_tag_or_that_after_the_moves(
    tag: str, after: str, result: str, tmp_path: Path
) -> None:
    games = read_games(write(tmp_path / "a.pgn", f'[Result "{tag}"]\n\n1. e4 e5 {after}'), "san")
    assert games.results == (result,)


@pytest.mark.thorough
def test_several_workers_return_the_same_games_as_one(tmp_path: Path) -> None:
    lines = [*included("san").moves[:9], "e4 e4"]
    file = write(tmp_path / "games.txt.gz", "\n".join(lines))
    assert read_games(file, workers=2) == read_games(file, workers=1)


def test_the_syntax_check_accepts_illegal_moves(tmp_path: Path) -> None:
    file = write(tmp_path / "games.txt", "e4 Qxh7# 1-0\ne4 e2e4\n")
    games = read_games(file, "san", check="syntax")
    assert games.moves == ("e4 Qxh7",)
    assert games.rejected == (Rejected(2, "move 1 of black, 'e2e4', is not a san move"),)
    syntax = [games_module.SAN_MOVE.fullmatch(move) for line in included("san").moves for move in set(line.split())]
    assert all(syntax)


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.txt", "e4 e4\n", {}, r"no game of the file can be used(.|\n)*line 1: move 1 of black, 'e4', is illegal"),
        ("a.txt", "", {}, "is empty"),
        ("a.pgn", PGN, {"check": "syntax"}, "check='syntax' cannot read the PGN file"),
        ("a.txt", "e4", {"check": "no"}, "check='no' must be 'rules' or 'syntax'"),
        ("a.txt", "e4", {"workers": 0}, "workers=0 must be at least 1"),
        ("a.txt", "e4", {"notation": "lan"}, "notation='lan' must be 'uci' or 'san'"),
    ],
)
def test_bad_files_and_arguments_raise_errors(
    tmp_path: Path, name: str, text: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_games(write(tmp_path / name, text), **options)


def test_conversion_errors_name_the_illegal_move() -> None:
    with pytest.raises(ValueError, match="move 2 of white, 'e2e4', is illegal"):
        to_san("e2e4 e7e5 e2e4")


@pytest.mark.thorough
def test_splits_keep_duplicates_together() -> None:
    base = included("uci").moves[:90]
    games = Games((*base, *base[:60]), ("*",) * 150, "uci")
    train, validation, test = split_games(games, 0.2, 0.1, seed=3)
    splits = [set(split.moves) for split in (train, validation, test)]
    assert [len(split) for split in splits] == [63, 18, 9]
    assert set.union(*splits) == set(base)
    assert sum(len(split) for split in (train, validation, test)) == 150
    assert split_games(games, 0.2, 0.1, seed=3)[1] == validation
    assert split_games(games, 0.2, 0.1, seed=4)[1] != validation
    positions = [games.moves.index(line) for line in dict.fromkeys(train.moves)]
    assert len(split_games(games, 0.0, 0.1)[1]) == 0
    assert positions == sorted(positions), "a split keeps the order of the games"


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.5, 0.5), "leave none of the 10 distinct games"),
        ((-0.1, 0.0), "validation_fraction=-0.1 must be at least 0"),
        ((0.2, 1.0), "test_fraction=1.0 must be"),
        ((0.01, 0.2), "validation_fraction=0.01 of 10 distinct games rounds to 0"),
    ],
)
def test_split_games_rejects_fractions_that_leave_an_empty_split(fractions: tuple[float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_games(included("uci").select(range(10)), *fractions)
