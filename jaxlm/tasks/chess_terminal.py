"""Chess on a terminal: a drawing of the board, and a game of a person against a language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxlm.data.games import import_chess
from jaxlm.data.moves import MoveTokenizer
from jaxlm.models import Model
from jaxlm.tasks.chess_players import ModelPlayer

if TYPE_CHECKING:
    import chess

HELP = "a move (e4, Nf3, O-O, e7e8q), or: moves, board, undo, resign, quit"


def draw_board(board: chess.Board, *, white_below: bool = True) -> str:
    """The position as ten lines of text, with Unicode pieces. Brackets mark the two squares of the last move.

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
    params: Any,
    tokenizer: MoveTokenizer,
    ask: Callable[[str], str] = input,
    say: Callable[[str], object] = print,
    *,
    person: Literal["white", "black"] = "white",
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The result of a game of a person against a model: ``1-0``, ``0-1``, ``1/2-1/2``, or ``*`` if the person quits.

    The person types a SAN or UCI move, or ``moves`` (list the legal moves), ``board`` (draw the board), ``undo`` (take
    back the last move of both players), ``resign`` or ``quit``. The reply to any other input is one line. The model
    plays only legal moves.

    Args:
        ask: a function that returns the person's line for a prompt. ``EOFError`` means ``quit``.
        say: a function that shows a text.
        person: the color of the person.
        temperature, seed: as for ``ModelPlayer``.

    Raises:
        ValueError: ``person`` is neither "white" nor "black", or an argument is invalid for ``ModelPlayer``.
    """
    if person not in ("white", "black"):
        raise ValueError(f"person={person!r} must be 'white' or 'black'")
    board, white = import_chess().Board(), person == "white"
    player, rng = ModelPlayer(model, params, tokenizer, temperature), np.random.default_rng(seed)
    say(f"You play {person}. Type {HELP}.")
    if white:
        say(draw_board(board))
    end = None
    while end is None:
        if board.turn == white:
            end = _person_moves(board, ask, say, white)
        else:
            _model_moves(board, player, rng, say, white)
        end = end or _ended(board, player)
    result, reason = end
    say(f"Result: {result} ({reason})")
    return result


def _ended(board: chess.Board, player: ModelPlayer) -> tuple[str, str] | None:
    """The result and the reason, or None if the game has not ended. A game that is too long for the model is a draw."""
    outcome = board.outcome()
    if outcome is not None:
        return outcome.result(), outcome.termination.name.lower().replace("_", " ")
    if board.is_repetition(3):
        return "1/2-1/2", "third repetition"
    if board.is_fifty_moves():
        return "1/2-1/2", "50 moves of both sides without capture or pawn move"
    if player.max_moves is not None and len(board.move_stack) > player.max_moves:
        return "1/2-1/2", f"the model reads games of at most {player.max_moves} moves"
    return None


def _model_moves(
    board: chess.Board, player: ModelPlayer, rng: np.random.Generator, say: Callable[[str], object], white: bool
) -> None:
    """Play and show a move of the model."""
    move = player.choose([board], rng)[0]
    assert move is not None  # a masked player always finds a legal move
    name = board.san(move)
    board.push(move)
    say(f"The model plays {name}.")
    say(draw_board(board, white_below=white))


def _person_moves(
    board: chess.Board, ask: Callable[[str], str], say: Callable[[str], object], white: bool
) -> tuple[str, str] | None:
    """Read and execute one line of the person; returns the result and the reason if it ends the game."""
    try:
        line = ask("your move: ").strip()
    except EOFError:
        return "*", "you quit"
    match line.lower():
        case "quit":
            return "*", "you quit"
        case "resign":
            return "0-1" if white else "1-0", "you resign"
        case "moves":
            say(" ".join(sorted(board.san(move) for move in board.legal_moves)))
        case "board":
            say(draw_board(board, white_below=white))
        case "undo":
            if len(board.move_stack) < 2:
                say("There is no move of yours to take back.")
            else:
                board.pop()
                board.pop()
                say(draw_board(board, white_below=white))
        case _:
            move = _parse(board, line, say)
            if move is not None:
                board.push(move)
    return None


def _parse(board: chess.Board, line: str, say: Callable[[str], object]) -> chess.Move | None:
    """The legal move that ``line`` names. None: the line is invalid, and the reason has been shown."""
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
                say(f"{line!r} is not legal here{check}. Type moves for a list.")
            return None
        except chess.InvalidMoveError:
            continue
    say(f"{line!r} is not understood. Type {HELP}.")
    return None


def _completions(board: chess.Board, line: str) -> list[str]:
    """The legal moves that ``line`` names without the origin of the piece, or without the piece of a promotion."""
    plain, found = line.rstrip("+#"), []
    for move in board.legal_moves:
        name = board.san(move)
        bare = name.rstrip("+#")
        same_piece = bare[0] == plain[0] and bare[0] in "QRBN" and bare[-2:] == plain[-2:]
        if same_piece or (move.promotion and (bare.startswith(plain) or move.uci()[:4] == plain)):
            found.append(name)
    return sorted(found) if len(found) > 1 else []
