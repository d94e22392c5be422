"""Chess moves as tokens: the fixed UCI vocabulary, SAN vocabularies, decoding and files."""

from __future__ import annotations

import json
from pathlib import Path

import chess
import numpy as np
import pytest

from jaxlm.data.games import chess_games
from jaxlm.data.moves import MoveTokenizer, uci_moves
from jaxlm.data.tokenizers import SpecialIds, load_tokenizer


def test_uci_moves_are_all_moves_of_pieces_on_an_empty_board() -> None:
    expected = set()
    for square in chess.SQUARES:
        for piece in (chess.QUEEN, chess.KNIGHT):
            board = chess.BaseBoard.empty()
            board.set_piece_at(square, chess.Piece(piece, chess.WHITE))
            expected |= {chess.Move(square, target).uci() for target in board.attacks(square)}
    for color, rank in ((chess.WHITE, 6), (chess.BLACK, 1)):
        for file in range(8):
            square, promotion_square = chess.square(file, rank), chess.square(file, 7 if color else 0)
            for target in [promotion_square, *chess.SquareSet(chess.BB_PAWN_ATTACKS[color][square])]:
                expected |= {chess.Move(square, target, piece).uci() for piece in (2, 3, 4, 5)}
    assert len(expected) == 1968
    assert set(uci_moves()) == expected
    assert list(uci_moves()) == sorted(expected), "ids must be reproducible"


@pytest.mark.thorough
@pytest.mark.parametrize("notation", ["uci", "san"])
def test_decoding_returns_all_included_games(notation: str) -> None:
    games = chess_games(notation)
    tokenizer = MoveTokenizer.from_games(games.moves, notation)
    for line in games.moves:
        ids = tokenizer.encode(line)
        assert ids.dtype == np.int32
        assert ids.min() >= tokenizer.first_move_id
        assert tokenizer.decode(ids) == line
    assert tokenizer.vocab_size == {"uci": 1971, "san": 1595}[notation]


def test_san_vocabulary_is_sorted_by_frequency_and_has_an_unknown_token() -> None:
    tokenizer = MoveTokenizer.from_games(["e4 e5 Nf3", "e4 c5+ Nf3", "e4 Qxf7#"], "san", min_count=1)
    assert tokenizer.moves == ("e4", "Nf3", "Qxf7", "c5", "e5")
    assert tokenizer.encode("e4 Qxf7# Qxf7+ d4").tolist() == [4, 6, 6, 3]
    assert tokenizer.decode([1, 4, 3, 2, 0], skip_special_tokens=True) == "e4 <unk>"
    assert tokenizer.decode([1, 4, 3, 2, 0]) == "<bos> e4 <unk> <eos> <pad>"
    assert MoveTokenizer.from_games(["e4 e5", "e4 c5"], "san", min_count=2).moves == ("e4",)
    assert tokenizer.special_ids == SpecialIds(pad=0, unk=3, bos=1, eos=2)
    assert tokenizer.end_id == 2


def test_a_game_has_bos_and_eos_tokens() -> None:
    tokenizer = MoveTokenizer("uci")
    first, second = tokenizer.encode("e2e4 e7e5").tolist()
    assert tokenizer.encode_game("e2e4 e7e5").tolist() == [1, first, second, 2]
    assert tokenizer.move_text(first) == "e2e4"
    assert tokenizer.move_id("e7e5") == second
    assert tokenizer.move_id("e7e4e5") is None
    assert [tokenizer.is_move(id) for id in (0, 2, 3, 1970, 1971)] == [False, False, True, True, False]
    assert tokenizer.encode("").shape == (0,)


def test_encodings_have_the_character_offsets_of_each_move() -> None:
    tokenizer = MoveTokenizer("uci")
    encoding = tokenizer.encode_inputs("e2e4  e7e5")
    assert encoding.ids.tolist() == tokenizer.encode_game("e2e4 e7e5")[:-1].tolist()
    assert encoding.offsets.tolist() == [[0, 0], [0, 4], [6, 10]]
    assert encoding.sequence_ids.tolist() == [-1, 0, 0]
    assert tokenizer.encode_inputs("").ids.tolist() == [1]
    assert len(tokenizer.encode_inputs("e2e4 e7e5 g1f3", max_length=2).ids) == 2


@pytest.mark.parametrize(
    "tokenizer",
    [MoveTokenizer("uci"), MoveTokenizer("uci", ["e2e4", "e7e5"]), MoveTokenizer("san", ["e4", "O-O", "e8=Q"])],
)
def test_a_loaded_tokenizer_equals_the_saved_one(tmp_path: Path, tokenizer: MoveTokenizer) -> None:
    tokenizer.save(tmp_path / "run")
    content = json.loads((tmp_path / "run" / "jaxlm_tokenizer.json").read_text())
    assert content["type"] == "moves"
    assert MoveTokenizer.from_json(content) == tokenizer
    assert hash(MoveTokenizer.from_json(content)) == hash(tokenizer)
    assert tokenizer != MoveTokenizer("san", ["e4"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoveTokenizer("san"), "SAN has no fixed set of moves"),
        (lambda: MoveTokenizer("san", ["e4+"]), r"'e4\+' is not a san move, or it ends with"),
        (lambda: MoveTokenizer("uci", ["e4"]), "'e4' is not a uci move"),
        (lambda: MoveTokenizer("san", ["e4", "e4"]), "must be distinct, got 'e4' twice"),
        (lambda: MoveTokenizer("san", []), "at least one move"),
        (lambda: MoveTokenizer("lan"), "notation='lan' must be 'uci' or 'san'"),
        (lambda: MoveTokenizer.from_games(["e4"], "san", min_count=0), "min_count=0 must be at least 1"),
        (
            lambda: MoveTokenizer.from_games(["e4 e5"], "san", min_count=5),
            "min_count=5: the most .* 1 times .* smaller",
        ),
        (lambda: MoveTokenizer.from_games([""], "san", min_count=5), "at least one move"),
        (lambda: MoveTokenizer.from_games(["e2e4"], "san"), "'e2e4' is not a san move"),
        (lambda: MoveTokenizer.from_games(["e4 Nf3++"], "san"), r"'Nf3\+\+' is not a san move"),
        (lambda: MoveTokenizer("san", ["Nf3"]).encode("Nf3++"), r"'Nf3\+\+', is not a san move"),
        (lambda: MoveTokenizer.from_json({"notation": "san", "moves": ["e4"]}), "moves must be a text, got list"),
        (lambda: MoveTokenizer("uci", ["e2e4"]).encode("e2e4 e7e5"), "word 2 .* 'e7e5', is not in the vocabulary of 1"),
        (lambda: MoveTokenizer("uci").encode("a1b8"), "word 1 of the game, 'a1b8', is not a uci move"),
        (lambda: MoveTokenizer("uci").encode("e2e4 e5"), "word 2 of the game, 'e5', is not a uci move"),
        (lambda: MoveTokenizer("san", ["e4"]).encode("e4 1-0"), "word 2 of the game, '1-0', is not a san move"),
        (lambda: MoveTokenizer("uci").decode([3, 1971]), "id 1971 at position 1 is outside"),
    ],
)
def test_invalid_input_raises_an_error(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_load_tokenizer_loads_a_move_tokenizer(tmp_path: Path) -> None:
    tokenizer = MoveTokenizer.from_games(["e4 e5 Nf3"], "san")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path) == tokenizer
