"""Chess players (random, fixed rules, language model, engine) and matches between them.

    result = play_match(ModelPlayer(model, params, tokenizer), RandomPlayer(), games=200)
    print(result)

A move is the move of one player, not of both.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from jaxlm.config import check_min
from jaxlm.data.games import Games, import_chess
from jaxlm.data.moves import MoveTokenizer
from jaxlm.decoding.sample import check_temperature
from jaxlm.metrics import Score, proportion
from jaxlm.models import Model
from jaxlm.spec import Params
from jaxlm.tasks.chess_reading import LegalMoves, MoveReader, choose_ids, find_mate

if TYPE_CHECKING:
    import chess


MAX_OPENING_MOVES = 200
"""Maximum number of random moves in the opening of a game. If the game ends within the opening, another random opening
replaces it. With this limit, few openings are replaced: of 400 games with random moves, 87 % had more than 200 moves,
35 % more than 400, and 3 % more than 600."""

UNFINISHED = "maximum number of moves"
"""The reason for the draw of a game that reached its maximum number of moves."""
_ILLEGAL = "illegal move"


class Player(Protocol):
    """The interface of a player. A player selects moves for several boards in one call.

    Attributes:
        max_moves: the player can select a move on a board after at most this many moves. None: no limit.
    """

    @property
    def max_moves(self) -> int | None: ...

    def choose(self, boards: Sequence[chess.Board], rng: np.random.Generator) -> list[chess.Move | None]:
        """The move for each board. On all boards, it is the player's turn. None or an illegal move loses the game.

        The method does not change the boards. Random choices use ``rng``.
        """
        ...


class RandomPlayer:
    """A player that selects a legal move uniformly at random."""

    max_moves = None

    def choose(self, boards: Sequence[chess.Board], rng: np.random.Generator) -> list[chess.Move | None]:
        return [_random_move(board, rng) for board in boards]


class ModelPlayer:
    """A player that uses a language model: any causal family with a model state, or any encoder-decoder.

    Args:
        temperature: the move is drawn from ``softmax(logits / temperature)``. 0 selects the most probable move.
        masked: True: select only legal moves. If the vocabulary has no legal move of a position, the player selects a
            random legal move. False: the player can select any token, and an illegal move loses the game.
        search: search one move ahead with the rules of chess. The player gives checkmate if it can. It selects a move
            that ends in stalemate or repeats a position only if no other move of the vocabulary is legal.

    Raises:
        TypeError: the model has no state, or the tokenizer is not a ``MoveTokenizer``.
        ValueError: the model does not predict next tokens or cannot use the tokenizer (``check_model``), the
            temperature is outside its range, or ``search`` is set without ``masked``.
    """

    def __init__(
        self, model: Model, params: Params, tokenizer: MoveTokenizer, temperature: float = 0.0, masked: bool = True,
        search: bool = False,
    ) -> None:  # fmt: skip
        check_temperature(temperature)
        if search and not masked:
            raise ValueError("search=True selects only legal moves: set masked=True")
        self.temperature, self.masked, self.search = temperature, masked, search
        self._reader = MoveReader(model, params, tokenizer)
        self._legal = LegalMoves(tokenizer)

    @property
    def max_moves(self) -> int | None:
        return self._reader.max_moves

    def choose(self, boards: Sequence[chess.Board], rng: np.random.Generator) -> list[chess.Move | None]:
        logits = self._reader.logits(boards)
        if not self.masked:
            ids = choose_ids(logits, self.temperature, rng)
            return [self._legal.move(board, id) for board, id in zip(boards, ids.tolist(), strict=True)]
        legal_moves = [self._candidates(board) for board in boards]
        legal_mask = np.zeros(logits.shape, bool)
        for row, moves_by_id in zip(legal_mask, legal_moves, strict=True):
            row[list(moves_by_id)] = True
        ids = choose_ids(np.where(legal_mask, logits, -np.inf), self.temperature, rng)
        mates = [find_mate(board) if self.search else None for board in boards]
        return [
            mate or (moves_by_id[id] if moves_by_id else _random_move(board, rng))
            for board, mate, moves_by_id, id in zip(boards, mates, legal_moves, ids.tolist(), strict=True)
        ]

    def _candidates(self, board: chess.Board) -> dict[int, chess.Move]:
        """A dict from ids to the legal moves that the player considers.

        With ``search``, moves that end in stalemate or repeat a position are left out, if other moves remain.
        """
        moves = self._legal.ids(board)
        if not self.search:
            return moves
        return {id: move for id, move in moves.items() if not _draws_or_repeats(board, move)} or moves


class MaterialPlayer:
    """A player with fixed rules that searches one move ahead. It wins almost every game against ``RandomPlayer``.

    The player gives checkmate if it can. Otherwise it selects the move with the largest score, in pawns: the value of
    the captured piece (pawn 1, knight and bishop 3, rook 5, queen 9) and the gain of a promotion, minus the largest
    loss that the opponent's next capture can cause. The loss of an attacked piece is its value or, if it is protected,
    its value minus that of the least valuable attacker. Smaller terms of the score favor pawn moves that end near
    promotion, and moves that leave the opponent few replies. Moves that end in stalemate or repeat a position have the
    lowest scores. The player makes no random choices.
    """

    max_moves = None

    def choose(self, boards: Sequence[chess.Board], rng: np.random.Generator) -> list[chess.Move | None]:
        return [max(list(board.legal_moves), key=functools.partial(_material_score, board)) for board in boards]


class EnginePlayer:
    """A player that uses a UCI engine, by default Stockfish at its lowest skill level.

    Use the player in a ``with`` statement, or call ``close``. At skill level n, Stockfish selects at random among the
    best moves of a search of depth n + 1. The ``seed`` of a match does not control this choice. At a low skill level,
    searching more nodes does not make Stockfish stronger, because the depth is limited.

    Args:
        command: the engine's executable. None: ``stockfish`` on the PATH or in /usr/games.
        skill_level: the engine's option "Skill Level", 0 to 20 for Stockfish. None: the option is not set. Stockfish
            then has full strength.
        nodes: number of positions that the engine searches for each move.

    Raises:
        ImportError: the package ``chess`` is not installed.
        FileNotFoundError: the engine is not installed.
        ValueError: the executable is not a UCI engine, the engine does not support the skill level, or ``nodes`` is
            below 1.
    """

    max_moves = None

    def __init__(self, command: str | Path | None = None, *, skill_level: int | None = 0, nodes: int = 1000) -> None:
        import_chess()
        import chess.engine

        check_min(1, nodes=nodes)
        executable = str(command) if command is not None else shutil.which("stockfish", path=_engine_path())
        if executable is None or shutil.which(executable) is None:
            raise FileNotFoundError(
                f"no chess engine {executable or 'stockfish on the PATH or in /usr/games'}: install one "
                "(apt-get install stockfish), or pass the path of its executable as command"
            )
        self._limit = chess.engine.Limit(nodes=nodes)
        try:
            self._engine = chess.engine.SimpleEngine.popen_uci(executable)
        except (chess.engine.EngineError, OSError, TimeoutError) as error:
            raise ValueError(f"{executable} does not answer as a UCI engine: {error!r}") from error
        if skill_level is not None:
            try:
                self._engine.configure({"Skill Level": skill_level})
            except chess.engine.EngineError as error:
                self.close()
                raise ValueError(f"{executable} has no skill level {skill_level}: {error}") from error

    def choose(self, boards: Sequence[chess.Board], rng: np.random.Generator) -> list[chess.Move | None]:
        return [self._engine.play(board, self._limit).move for board in boards]

    def close(self) -> None:
        """Stop the engine's process."""
        self._engine.close()

    def __enter__(self) -> EnginePlayer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class MatchResult:
    """The result of a match, seen from its first player (the argument ``player`` of :func:`play_match`).

    Attributes:
        wins, draws, losses: numbers of games that the first player won, drew and lost.
        unfinished: number of games that were drawn because they reached the maximum number of moves.
        illegal: number of games that the first player lost by an illegal move.
        games: the games in UCI notation. The first player has white in games 0, 2, 4, ...
    """

    wins: int
    draws: int
    losses: int
    unfinished: int
    illegal: int
    games: Games

    @property
    def score(self) -> Score:
        """(wins + draws / 2) / games, with the 95 % Wilson interval of a proportion with this value.

        If there are draws, the interval is wider than necessary, because draws reduce the variance of the score.
        """
        return proportion("score", self.wins + self.draws / 2, self.wins + self.draws + self.losses)

    def scores(self, opponent: str) -> list[Score]:
        """Two scores, whose names contain ``opponent``: the share of games that were won, and :attr:`score`."""
        games = self.wins + self.draws + self.losses
        won = proportion(f"wins against {opponent}", self.wins, games)
        return [won, dataclasses.replace(self.score, name=f"score against {opponent}")]

    def __str__(self) -> str:
        return (
            f"{self.wins} wins, {self.draws} draws ({self.unfinished} unfinished), {self.losses} losses "
            f"({self.illegal} by illegal moves): {self.score}"
        )


def opponents(
    *, random: int, engine: int, opening_moves: int, report: Callable[[str], None]
) -> Iterator[tuple[str, Player, int, int]]:
    """Yield ``(name, player, number of games, number of random opening moves)`` for each opponent in an evaluation.

    Play each match inside the loop over the opponents: the process of Stockfish ends when the loop continues.

    Args:
        random: number of games against random legal moves; 0: no such opponent.
        engine: number of games against Stockfish at skill level 0; 0: no such opponent. If Stockfish is not installed
            or does not start, it is left out.
        opening_moves: number of random moves at the beginning of each game against Stockfish.
        report: a function, for example ``print``. It gets a message if Stockfish is not installed or does not start.
    """
    if random:
        yield "random moves", RandomPlayer(), random, 0
    if engine:
        try:
            with EnginePlayer() as player:
                yield "Stockfish level 0", player, engine, opening_moves
        except (FileNotFoundError, ValueError) as error:
            report(f"{error}: this test is skipped")


def check_opening_moves(name: str, opening_moves: int, max_moves: int) -> None:
    """Raise ``ValueError`` if games of ``max_moves`` moves cannot begin with ``opening_moves`` random moves.

    Args:
        name: name of the argument ``opening_moves`` in the error message.
    """
    check_min(0, **{name: opening_moves})
    if opening_moves > min(MAX_OPENING_MOVES, max_moves - 1):
        raise ValueError(
            f"{name}={opening_moves} must be at most {MAX_OPENING_MOVES} and less than {max_moves}, the maximum number "
            "of moves of a game"
        )


def play_match(
    player: Player,
    opponent: Player,
    games: int = 200,
    *,
    max_moves: int = 200,
    opening_moves: int = 0,
    seed: int | Sequence[int] = 0,
) -> MatchResult:
    """The result of a match of ``games`` games for ``player``, which has white in games 0, 2, 4, ...

    All games are played in parallel: each call of ``choose`` gets all boards on which the player must move. A game ends
    with checkmate, stalemate, insufficient material, threefold repetition, 50 moves by each player without a capture or
    pawn move, or an illegal move. A game that has not ended in this way after ``max_moves`` moves is a draw.

    Args:
        max_moves: maximum number of moves of a game, including its opening.
        opening_moves: number of random moves at the beginning of a game. Games 2k and 2k + 1 have the same opening.
            Without random openings, deterministic players repeat the same game. At most :data:`MAX_OPENING_MOVES`.
        seed: seed for ``np.random.default_rng``. It controls all random choices except those of an engine.

    Raises:
        ValueError: ``games`` or ``max_moves`` is below 1; :func:`check_opening_moves` does not accept
            ``opening_moves``; or ``max_moves`` is too large for a player.
    """
    check_min(1, games=games, max_moves=max_moves)
    check_opening_moves("opening_moves", opening_moves, max_moves)
    for side in (player, opponent):
        if side.max_moves is not None and max_moves > side.max_moves + 1:
            raise ValueError(
                f"max_moves={max_moves} is too large for a player whose model reads games of at most {side.max_moves} "
                f"moves: use max_moves={side.max_moves + 1} or fewer"
            )
    rng = np.random.default_rng(seed)
    boards = _openings(games, opening_moves, rng)
    outcomes = [result_and_reason(board, max_moves) for board in boards]
    while None in outcomes:
        for side, parity in ((player, 0), (opponent, 1)):
            to_move = [
                game
                for game, board in enumerate(boards)
                if outcomes[game] is None and board.turn == (game % 2 == parity)
            ]
            if to_move:
                moves = side.choose([boards[game] for game in to_move], rng)
                for game, move in zip(to_move, moves, strict=True):
                    outcomes[game] = _play(boards[game], move, max_moves)
    return _match_result(boards, [outcome for outcome in outcomes if outcome is not None])


def result_and_reason(board: chess.Board, max_moves: int | None) -> tuple[str, str] | None:
    """The result of a game and the reason. None: the game has not ended.

    Args:
        max_moves: a game of this number of moves is a draw, and the reason is :data:`UNFINISHED`. None: no limit.
    """
    outcome = board.outcome()
    if outcome is not None:
        return outcome.result(), outcome.termination.name.lower().replace("_", " ")
    if board.is_repetition(3):
        return "1/2-1/2", "threefold repetition"
    if board.is_fifty_moves():
        return "1/2-1/2", "50 moves by each player without a capture or pawn move"
    if max_moves is not None and len(board.move_stack) >= max_moves:
        return "1/2-1/2", UNFINISHED
    return None


def _play(board: chess.Board, move: chess.Move | None, max_moves: int) -> tuple[str, str] | None:
    """Play a move and return the result of the game and the reason. None: the game has not ended."""
    if move is None or not board.is_legal(move):
        return "0-1" if board.turn else "1-0", _ILLEGAL
    board.push(move)
    return result_and_reason(board, max_moves)


def _openings(games: int, moves: int, rng: np.random.Generator) -> list[chess.Board]:
    """One board per game after a random opening. Boards 2k and 2k + 1 have the same opening."""
    Board = import_chess().Board
    boards: list[chess.Board] = []
    while len(boards) < games:
        board = Board()
        while len(board.move_stack) < moves or board.is_game_over():
            if board.is_game_over():
                board = Board()  # the opening ended the game, so try another one
            board.push(_random_move(board, rng))
        boards += [board, board.copy()]
    return boards[:games]


def _random_move(board: chess.Board, rng: np.random.Generator) -> chess.Move:
    moves = list(board.legal_moves)
    return moves[int(rng.integers(len(moves)))]


def _match_result(boards: Sequence[chess.Board], outcomes: Sequence[tuple[str, str]]) -> MatchResult:
    results, reasons = zip(*outcomes, strict=True)
    points = []
    for game, result in enumerate(results):
        white = {"1-0": 1.0, "0-1": 0.0}.get(result, 0.5)
        points.append(white if game % 2 == 0 else 1.0 - white)
    lines = tuple(" ".join(move.uci() for move in board.move_stack) for board in boards)
    return MatchResult(
        wins=points.count(1.0),
        draws=points.count(0.5),
        losses=points.count(0.0),
        unfinished=reasons.count(UNFINISHED),
        illegal=list(zip(reasons, points, strict=True)).count((_ILLEGAL, 0.0)),
        games=Games(lines, results, "uci", source="match"),
    )


_PIECE_VALUES = (0, 1, 3, 3, 5, 9, 0)
"""Value of an empty square, pawn, knight, bishop, rook, queen and king, in pawns. The index is the piece type."""


def _material_score(board: chess.Board, move: chess.Move) -> float:
    """The score of a legal move for ``MaterialPlayer``, in pawns. Checkmate has an infinite score."""
    color = board.turn
    captured = 1 if board.is_en_passant(move) else board.piece_type_at(move.to_square) or 0
    score = float(_PIECE_VALUES[captured])
    if move.promotion is not None:
        score += _PIECE_VALUES[move.promotion] - 1
    elif board.piece_type_at(move.from_square) == 1:
        rank = move.to_square // 8
        score += 0.03 * (rank if color else 7 - rank)
    board.push(move)
    replies = board.legal_moves.count()
    if replies == 0 and board.is_check():
        score = math.inf
    elif replies == 0 or board.is_repetition(2):
        score -= 1000.0
    score -= 0.02 * replies + _largest_loss(board, color)
    board.pop()
    return score


def _largest_loss(board: chess.Board, color: bool) -> int:
    """The largest loss of ``color`` by one capture of the opponent and, if possible, one recapture, in pawns."""
    largest = 0
    for piece_type in range(1, 6):
        for square in board.pieces(piece_type, color):
            attackers = board.attackers(not color, square)
            if not attackers:
                continue
            loss = _PIECE_VALUES[piece_type]
            if board.is_attacked_by(color, square):
                # A king cannot capture a protected piece, so the loss is 0 if only the king attacks. So a king
                # that attacks counts with the value of the attacked piece, instead of 0 as in _PIECE_VALUES.
                loss -= min(_PIECE_VALUES[board.piece_type_at(attacker) or 0] or loss for attacker in attackers)
            largest = max(largest, loss)
    return largest


def _draws_or_repeats(board: chess.Board, move: chess.Move) -> bool:
    """Whether a legal move ends in stalemate or repeats a position of the game. The board is unchanged on return."""
    board.push(move)
    is_draw = board.is_stalemate() or board.is_repetition(2)
    board.pop()
    return is_draw


def _engine_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/games"])
