"""Chess on a terminal: text drawings of boards, and games of a person against a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np

from jaxlm.config import check_value
from jaxlm.data.games import import_chess
from jaxlm.data.moves import MoveTokenizer
from jaxlm.models import Model
from jaxlm.spec import Params
from jaxlm.tasks.chess_players import UNFINISHED, ModelPlayer, result_and_reason

if TYPE_CHECKING:
    import chess

HELP = "a move (e4, Nf3, O-O, e7e8q), or: moves, board, undo, resign, quit"


def draw_board(board: chess.Board, *, white_below: bool = True) -> str:
    """The position as ten lines of text with Unicode pieces. Brackets mark the two squares of the last move.

    Args:
        white_below: whether rank 1 is at the bottom. False: the board is turned, as Black sees it.

    Example:
        >>> print(draw_board(chess.Board()).splitlines()[0])   # doctest: +SKIP
        8  ♜  ♞  ♝  ♛  ♚  ♝  ♞  ♜
    """
    chess = import_chess()
    last = board.peek() if board.move_stack else chess.Move.null()
    marked = {last.from_square, last.to_square} if last else set()
    ranks = range(7, -1, -1) if white_below else range(8)
    files = range(8) if white_below else range(7, -1, -1)
    lines = []
    for rank in ranks:
        cells = []
        for file in files:
            square = chess.square(file, rank)
            piece = board.piece_at(square)
            symbol = "·" if piece is None else piece.unicode_symbol()
            cells.append(f"[{symbol}]" if square in marked else f" {symbol} ")
        lines.append(f"{rank + 1} {''.join(cells)}".rstrip())
    lines.append("  " + "".join(f" {chess.FILE_NAMES[file]} " for file in files).rstrip())
    lines.append(f"{'White' if board.turn else 'Black'} to move{', in check' if board.is_check() else ''}")
    return "\n".join(lines)


def play_on_terminal(
    model: Model,
    params: Params,
    tokenizer: MoveTokenizer,
    ask: Callable[[str], str] = input,
    say: Callable[[str], object] = print,
    *,
    color: Literal["white", "black"] = "white",
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Play a game of a person against a model. Returns ``1-0``, ``0-1``, ``1/2-1/2``, or ``*`` if the person quits.

    The person types a SAN or UCI move, or one of these commands: ``moves`` lists the legal moves, ``board`` draws the
    board, ``undo`` takes back the last move of each player, and ``resign`` and ``quit`` end the game. After any other
    input, a one-line message is shown. The model plays only legal moves. A game that is too long for the model is a
    draw.

    Args:
        ask: a function that shows a prompt and returns the line that the person types. ``EOFError`` means ``quit``.
        say: a function that shows a text.
        color: the color of the person.
        temperature: the sampling temperature, as for ``ModelPlayer``.
        seed: the seed of the model's random choices.

    Raises:
        ValueError: ``color`` is neither "white" nor "black".
        TypeError, ValueError: as in ``ModelPlayer``.
    """
    check_value(Literal["white", "black"], color, "color")
    board, person_is_white = import_chess().Board(), color == "white"
    player, rng = ModelPlayer(model, params, tokenizer, temperature), np.random.default_rng(seed)
    say(f"You play {color}. Type {HELP}.")
    if person_is_white:
        say(draw_board(board))
    outcome = None
    while outcome is None:
        if board.turn == person_is_white:
            outcome = _read_line(board, ask, say, person_is_white)
        else:
            move = player.choose([board], rng)[0]
            # By default, ModelPlayer selects only legal moves. The game has not ended, so there is a legal move.
            assert move is not None
            say(f"The model plays {board.san(move)}.")
            board.push(move)
            say(draw_board(board, white_below=person_is_white))
        outcome = outcome or result_and_reason(board, None if player.max_moves is None else player.max_moves + 1)
    result, reason = outcome
    if reason == UNFINISHED:
        reason = f"the model reads games of at most {player.max_moves} moves, of White and Black together"
    say(f"Result: {result} ({reason})")
    return result


def _read_line(
    board: chess.Board, ask: Callable[[str], str], say: Callable[[str], object], person_is_white: bool
) -> tuple[str, str] | None:
    """Ask the person for one line, and execute its move or command.

    Returns the result and the reason if the line ends the game, and otherwise None.
    """
    try:
        line = ask("your move: ").strip()
    except EOFError:
        line = "quit"
    match line.lower():
        case "quit":
            return "*", "you quit"
        case "resign":
            return "0-1" if person_is_white else "1-0", "you resign"
        case "moves":
            say(" ".join(sorted(board.san(move) for move in board.legal_moves)))
        case "board":
            say(draw_board(board, white_below=person_is_white))
        case "undo":
            if len(board.move_stack) < 2:
                say("There is no move of yours to take back.")
            else:
                board.pop()
                board.pop()
                say(draw_board(board, white_below=person_is_white))
        case _:
            move = _parse(board, line, say)
            if move is not None:
                board.push(move)
    return None


def _parse(board: chess.Board, line: str, say: Callable[[str], object]) -> chess.Move | None:
    """The legal move that ``line`` describes. If there is no such move, tell the person why and return None."""
    chess = import_chess()
    for parse in (board.parse_san, board.parse_uci):
        try:
            move = parse(line)
            if move:
                return move
        except (chess.AmbiguousMoveError, chess.IllegalMoveError):
            choices = _completions(board, line)
            if choices:
                say(f"{line!r} is ambiguous: type {' or '.join(choices)}.")
            else:
                check = ": you are in check" if board.is_check() else ""
                say(f'{line!r} is not legal here{check}. Type "moves" for a list of the legal moves.')
            return None
        except chess.InvalidMoveError:
            continue
    say(f"{line!r} is not understood. Type {HELP}.")
    return None


def _completions(board: chess.Board, line: str) -> list[str]:
    """The SAN of the legal moves that ``line`` describes incompletely; an empty list if there are fewer than two.

    An incomplete line lacks the origin square of the piece, or the piece of a promotion.
    """
    incomplete, completions = line.rstrip("+#"), []
    origin = incomplete[1:-2].rstrip("x-")  # the file, the rank, or both, of the piece's square
    for move in board.legal_moves:
        name = board.san(move)
        bare = name.rstrip("+#")
        same_piece = bare[0] == incomplete[0] and bare[0] in "QRBN" and bare[-2:] == incomplete[-2:]
        same_piece = same_piece and set(origin) <= set(move.uci()[:2])
        if same_piece or (move.promotion and (bare.startswith(incomplete) or move.uci()[:4] == incomplete)):
            completions.append(name)
    return sorted(completions) if len(completions) > 1 else []
