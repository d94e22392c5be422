"""The board as text, and games of a person against a model, with scripted input."""

from __future__ import annotations

from typing import Any

import chess
import pytest

from jaxlm.data.moves import MoveTokenizer
from jaxlm.tasks.chess import board_after
from jaxlm.tasks.chess_terminal import _completions, draw_board, play_on_terminal
from jaxlm.testing.helpers import initial_params, tiny_model
from tests.tasks.oracle import oracle

UCI = MoveTokenizer("uci")
FOOL = "f2f3 e7e5 g2g4 d8h4"
SCHOLAR = "e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 h5f7"


def test_board_has_pieces_coordinates_and_the_last_move() -> None:
    lines = draw_board(board_after("e2e4")).splitlines()
    assert lines == [
        "8  ♜  ♞  ♝  ♛  ♚  ♝  ♞  ♜",
        "7  ♟  ♟  ♟  ♟  ♟  ♟  ♟  ♟",
        "6  ·  ·  ·  ·  ·  ·  ·  ·",
        "5  ·  ·  ·  ·  ·  ·  ·  ·",
        "4  ·  ·  ·  · [♙] ·  ·  ·",
        "3  ·  ·  ·  ·  ·  ·  ·  ·",
        "2  ♙  ♙  ♙  ♙ [·] ♙  ♙  ♙",
        "1  ♖  ♘  ♗  ♕  ♔  ♗  ♘  ♖",
        "   a  b  c  d  e  f  g  h",
        "Black to move",
    ]
    from_black = draw_board(board_after(FOOL), white_below=False).splitlines()
    assert from_black[0] == "1  ♖  ♘  ♗  ♔  ♕  ♗  ♘  ♖"
    assert from_black[3] == "4 [♛] ♙  ·  ·  ·  ·  ·  ·"
    assert from_black[8] == "   h  g  f  e  d  c  b  a"
    assert from_black[9] == "White to move, in check"
    assert "[" not in draw_board(chess.Board())


def play_scripted(inputs: list[str], lines: list[str], **options: Any) -> tuple[str, list[str]]:
    messages: list[str] = []
    input_lines = iter(inputs)

    def ask(prompt: str) -> str:
        try:
            return next(input_lines)
        except StopIteration:
            raise EOFError from None

    result = play_on_terminal(*oracle(UCI, lines), UCI, ask, messages.append, **options)
    return result, messages


def test_a_person_checkmates_the_model() -> None:
    result, messages = play_scripted(["e4", "d1h5", "Bc4", "Qxf7#"], [SCHOLAR])
    assert result == "1-0"
    assert [text for text in messages if text.startswith("The model")] == [
        "The model plays e5.", "The model plays Nc6.", "The model plays Nf6.",
    ]  # fmt: skip
    assert messages[-1] == "Result: 1-0 (checkmate)"


def test_the_model_checkmates_a_person() -> None:
    result, messages = play_scripted(["f3", "g4"], [FOOL])
    assert result == "0-1"
    assert "The model plays Qh4#." in messages
    result, messages = play_scripted(["e5", "Nc6", "Nf6"], [SCHOLAR], color="black")
    assert result == "1-0"
    assert messages[2].splitlines()[0].startswith("1 "), "the person's side is below"


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("Ke5", "'Ke5' is not legal here. Type \"moves\" for a list of the legal moves."),
        ("e2e5", "'e2e5' is not legal here. Type \"moves\" for a list of the legal moves."),
        ("hello", "'hello' is not understood. Type a move (e4, Nf3, O-O, e7e8q), or: moves, board,"),
        ("", "'' is not understood."),
        ("0000", "'0000' is not understood."),
        ("undo", "There is no move of yours to take back."),
        ("moves", "Na3 Nc3 Nf3 Nh3 a3 a4 b3 b4 c3 c4 d3 d4 e3 e4 f3 f4 g3 g4 h3 h4"),
        (" BOARD ", draw_board(chess.Board())),
    ],
)
def test_each_input_gets_one_answer(line: str, answer: str) -> None:
    result, messages = play_scripted([line], [SCHOLAR])
    assert result == "*"
    assert len(messages) == 4
    assert messages[2].startswith(answer)
    assert messages[3] == "Result: * (you quit)"


def test_answers_explain_check_and_ambiguous_moves() -> None:
    _, messages = play_scripted(["d4", "Nf3", "Nd2"], ["d2d4 d7d5 g1f3 a7a6"])
    assert messages[-2] == "'Nd2' is ambiguous: type Nbd2 or Nfd2."
    assert _completions(chess.Board("4k3/8/8/8/8/8/8/R4R1K w - - 0 1"), "Rbd1") == []
    assert _completions(chess.Board("4k3/8/8/8/8/8/8/R4R1K w - - 0 1"), "Rxd1") == ["Rad1", "Rfd1"]
    assert _completions(chess.Board("4k3/8/8/8/8/1N6/8/1N2K3 w - - 0 1"), "Nbd2") == ["N1d2", "N3d2"]
    promotion = "a2a4 b7b5 a4b5 a7a6 b5a6 h7h6 a6a7 h6h5 a7b8q"
    for line in ("axb8", "a7b8"):
        _, messages = play_scripted(["a4", "axb5", "bxa6", "a7", line], [promotion])
        assert messages[-2] == f"'{line}' is ambiguous: type axb8=B or axb8=N or axb8=Q or axb8=R."
    _, messages = play_scripted(["d4", "c4", "a4"], ["d2d4 e7e6 c2c4 f8b4"])
    assert messages[-2] == "'a4' is not legal here: you are in check. Type \"moves\" for a list of the legal moves."


def test_moves_can_be_taken_back_and_games_resigned() -> None:
    result, messages = play_scripted(["f3", "undo", "e4", "resign"], [SCHOLAR, FOOL])
    assert result == "0-1"
    boards = [text for text in messages if text.startswith("8")]
    assert boards[0] == boards[2]
    assert "4  ·  ·  ·  ·  ♙" in boards[-1]
    assert play_scripted(["resign"], [SCHOLAR], color="black")[0] == "1-0"
    assert play_scripted(["quit"], [SCHOLAR])[0] == "*"


def test_the_reason_of_a_draw_is_printed() -> None:
    result, messages = play_scripted(["Nf3", "Ng1"] * 2, ["g1f3 g8f6 f3g1 f6g8 g1f3 g8f6 f3g1 f6g8"])
    assert (result, messages[-1]) == ("1/2-1/2", "Result: 1/2-1/2 (threefold repetition)")
    messages = []
    model = tiny_model("gpt2-tiny", vocab_size=UCI.vocab_size, max_positions=4, num_layers=1)
    params = initial_params(model)
    input_lines = iter(["e4", "h4"])
    assert play_on_terminal(model, params, UCI, lambda _: next(input_lines), messages.append) == "1/2-1/2"
    assert messages[-1] == "Result: 1/2-1/2 (the model reads games of at most 3 moves, of White and Black together)"


def test_an_invalid_side_raises_an_error() -> None:
    with pytest.raises(ValueError, match="color='red' must be 'white' or 'black'"):
        play_scripted([], [SCHOLAR], color="red")
