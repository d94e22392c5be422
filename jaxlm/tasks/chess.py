"""Chess with language models: probabilities of the next move, and how well a model knows the game.

A model reads a game as tokens of a ``MoveTokenizer``: the beginning, then one token per move. An encoder-decoder reads
them as its source and writes the next move (its decoder begins with the padding id). One move means one move of one
player. Players and matches are in ``jaxlm.tasks.chess_players``.

Shapes: B games or boards, T tokens of a game, V tokens of the tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.games import UCI_MOVE, import_chess, plain_san
from jaxlm.data.moves import MoveTokenizer
from jaxlm.decoding.prompts import read_prompts
from jaxlm.metrics import BOOTSTRAP_SAMPLES, Score, proportion
from jaxlm.models import Model
from jaxlm.models.heads import last_real
from jaxlm.sharding import Sharding, active

if TYPE_CHECKING:
    import chess

LENGTH_MULTIPLE = 32
"""Games are padded to a multiple of this many tokens, so that few shapes are compiled."""
MIN_CAPACITY = 128
"""Tokens for which a reader's first state has room."""


class LegalMoves:
    """The legal moves of positions as ids of a tokenizer.

    A SAN vocabulary may lack a legal move. Such a move has no id, so a model cannot choose it.
    """

    def __init__(self, tokenizer: MoveTokenizer) -> None:
        import_chess()
        self.tokenizer = tokenizer

    def ids(self, board: chess.Board) -> dict[int, chess.Move]:
        """The legal moves by their ids."""
        moves = {self.tokenizer.move_id(self.text(board, move)): move for move in board.legal_moves}
        return {id: move for id, move in moves.items() if id is not None}

    def mask(self, boards: Sequence[chess.Board]) -> np.ndarray:
        """Which ids are legal moves: bool [B, V]."""
        mask = np.zeros((len(boards), self.tokenizer.vocab_size), bool)
        for row, board in zip(mask, boards, strict=True):
            row[list(self.ids(board))] = True
        return mask

    def move(self, board: chess.Board, id: int) -> chess.Move | None:
        """The legal move of an id, None for an illegal or ambiguous move and for special tokens."""
        if not self.tokenizer.is_move(id):
            return None
        text = self.tokenizer.move_text(id)
        try:
            return board.parse_uci(text) if self.tokenizer.notation == "uci" else board.parse_san(text)
        except ValueError:
            return None

    def text(self, board: chess.Board, move: chess.Move) -> str:
        """The move in the notation of the tokenizer."""
        return move.uci() if self.tokenizer.notation == "uci" else plain_san(board, move)


def next_move_probabilities(
    model: Model,
    params: Any,
    tokenizer: MoveTokenizer,
    games_so_far: Sequence[str],
    *,
    legal_only: bool = False,
    batch_size: int = 64,
) -> np.ndarray:
    """The probability of each token after each game, float32 [B, V].

    Args:
        games_so_far: lines of moves in the tokenizer's notation; an empty line is the initial position.
        legal_only: illegal moves and special tokens have probability 0, and the others sum to 1.
        batch_size: games that the model reads at once.

    Raises:
        TypeError: a model that predicts no next token.
        ValueError: a tokenizer with more tokens than the model, a game longer than the model's positions, or with
            ``legal_only`` an illegal game or a position without a legal move in the vocabulary.
    """
    check_model(model, tokenizer)
    rows = [_prompt(tokenizer, line) for line in games_so_far]
    logits = np.concatenate(list(_next_logits(model, params, tokenizer, rows, batch_size)))
    if legal_only:
        mask = LegalMoves(tokenizer).mask([board_after(line) for line in games_so_far])
        for line, row in zip(games_so_far, mask, strict=True):
            if not row.any():
                raise ValueError(f"no legal move of the vocabulary after {line!r}: the game is over, or moves are rare")
        logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def board_after(line: str) -> chess.Board:
    """The position after a line of UCI or SAN moves. Raises ``ValueError`` for an illegal move."""
    board = import_chess().Board()
    for word in line.split():
        push(board, word)
    return board


def push(board: chess.Board, word: str) -> chess.Move:
    """Play a UCI or SAN move on ``board`` and return it. Raises ValueError for an illegal move."""
    return board.push_uci(word) if UCI_MOVE.fullmatch(word) else board.push_san(word)


def choose_ids(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """One id per row of logits [B, V], drawn from ``softmax(logits / temperature)``; the largest at temperature 0."""
    if not 0.0 <= temperature < np.inf:
        raise ValueError(f"temperature={temperature} must be finite and at least 0")
    if temperature > 0.0:
        # The largest of logits with Gumbel noise is a draw from their softmax.
        logits = logits / temperature + rng.gumbel(size=logits.shape)
    return logits.argmax(axis=1)


# ------------------------------------------------------------------------------------------------- metrics


@dataclasses.dataclass(frozen=True)
class NextMoves:
    """Predictions of the moves of given games, each from the true moves before it.

    Attributes:
        top_1: share of moves that have the highest probability of all tokens.
        top_5: share of moves that are among the five tokens with the highest probabilities.
        legal: share of positions in which the token with the highest probability is a legal move.
    """

    top_1: Score
    top_5: Score
    legal: Score


def next_move_accuracy(
    model: Model, params: Any, tokenizer: MoveTokenizer, games: Sequence[str], *, batch_size: int = 16
) -> NextMoves:
    """How often the model predicts the next move of ``games``, without a mask of legal moves.

    Every move of every game counts once; the end of a game does not count. A move that is not in a SAN vocabulary is
    never predicted, and of equally probable tokens the true one comes last. Intervals are percentile bootstrap
    intervals over games.

    An encoder-decoder reads one source for every move, which takes about as many times longer as a game has moves.

    Args:
        games: lines of legal moves in the tokenizer's notation.

    Raises:
        ValueError: no game, an illegal one, one longer than the model's positions, or a tokenizer that does not fit.
    """
    check_model(model, tokenizer)
    _check_games(games)
    legal_moves, hits = LegalMoves(tokenizer), np.zeros((3, len(games)), int)
    for index, best, ranks in _predictions(model, params, tokenizer, games, batch_size):
        board, legal = import_chess().Board(), 0
        for word, id in zip(games[index].split(), best, strict=True):
            legal += legal_moves.move(board, int(id)) is not None
            push(board, word)
        known = tokenizer.encode(games[index]) >= tokenizer.first_move_id
        hits[:, index] = np.sum(known & (ranks < 1)), np.sum(known & (ranks < 5)), legal
    moves = np.array([len(line.split()) for line in games])
    names = ("next move", "next move in top 5", "legal best move")
    return NextMoves(*(_share(name, row, moves) for name, row in zip(names, hits, strict=True)))


@dataclasses.dataclass(frozen=True)
class LegalMoveRate:
    """Legality of games that a model made up.

    Attributes:
        moves: share of legal moves among the sampled moves. In each game, the moves up to its first illegal move count,
            the illegal one included; later ones do not exist.
        games: share of games without an illegal move.
        lines: the legal moves of each game, in the tokenizer's notation.
    """

    moves: Score
    games: Score
    lines: tuple[str, ...]


def legal_move_rate(
    model: Model,
    params: Any,
    tokenizer: MoveTokenizer,
    *,
    games: int = 200,
    max_moves: int = 200,
    temperature: float = 1.0,
    seed: int = 0,
) -> LegalMoveRate:
    """How many moves are legal when the model makes up whole games, from all tokens and without a mask.

    A game ends with its first illegal move, with the end token, or after ``max_moves`` moves. The end token is not a
    move and does not count. Any move after checkmate or stalemate is illegal, and so is any other special token.

    Raises:
        ValueError: counts below 1, more moves than the model's positions, or a tokenizer that does not fit.
    """
    for name, value in (("games", games), ("max_moves", max_moves)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    reader, legal_moves, rng = MoveReader(model, params, tokenizer), LegalMoves(tokenizer), np.random.default_rng(seed)
    reader.check_moves(max_moves - 1)
    boards = [import_chess().Board() for _ in range(games)]
    lines: list[list[str]] = [[] for _ in boards]
    illegal = np.zeros(games, int)
    playing = list(range(games))
    for _ in range(max_moves):
        ids = choose_ids(reader.logits([boards[game] for game in playing]), temperature, rng)
        still = []
        for game, id in zip(playing, ids.tolist(), strict=True):
            move = legal_moves.move(boards[game], id)
            if move is not None:
                lines[game].append(legal_moves.text(boards[game], move))
                boards[game].push(move)
                still.append(game)
            else:
                illegal[game] = id != tokenizer.eos_id
        playing = still
        if not playing:
            break
    legal = np.array([len(line) for line in lines])
    return LegalMoveRate(
        _share("legal sampled move", legal, legal + illegal),
        proportion("game without illegal move", int(games - illegal.sum()), games),
        tuple(" ".join(line) for line in lines),
    )


def mates_in_one(games: Sequence[str]) -> list[str]:
    """The beginnings of ``games`` after which the player to move can mate at once, in the order of the games.

    It takes about 10 ms per game.
    """
    found = []
    for line in games:
        board, words = import_chess().Board(), line.split()
        for index, word in enumerate(words):
            if any(_mates(board, move) for move in board.legal_moves):
                found.append(" ".join(words[:index]))
            push(board, word)
    return found


def mate_in_one_accuracy(
    model: Model, params: Any, tokenizer: MoveTokenizer, positions: Sequence[str], *, batch_size: int = 64
) -> Score:
    """Share of ``positions`` with a mate in one in which the model's most probable legal move mates.

    Any mate counts, also one that the game does not have. The interval is Wilson's.

    Args:
        positions: games so far, from ``mates_in_one``.

    Raises:
        ValueError: no position, one without a mate in one, or as ``next_move_probabilities``.
    """
    if not positions:
        raise ValueError("mate_in_one_accuracy needs at least one position: use mates_in_one of more games")
    best = next_move_probabilities(
        model, params, tokenizer, positions, legal_only=True, batch_size=batch_size
    ).argmax(axis=1)  # fmt: skip
    legal_moves, mates = LegalMoves(tokenizer), 0
    for line, id in zip(positions, best.tolist(), strict=True):
        board = board_after(line)
        if not any(_mates(board, move) for move in board.legal_moves):
            raise ValueError(f"there is no mate in one after {line!r}")
        move = legal_moves.move(board, id)
        mates += move is not None and _mates(board, move)
    return proportion("mate in one", mates, len(positions))


def _mates(board: chess.Board, move: chess.Move) -> bool:
    if not board.gives_check(move):
        return False
    board.push(move)
    mate = board.is_checkmate()
    board.pop()
    return mate


def _share(name: str, hits: np.ndarray, counts: np.ndarray) -> Score:
    """``sum(hits) / sum(counts)`` with the percentile bootstrap interval over games. Both have one entry per game."""
    total, hit = int(counts.sum()), int(hits.sum())
    if hit in (0, total):  # resampling would give an interval of width 0
        return proportion(name, len(hits) * bool(hit), len(hits))
    rng, ratios = np.random.default_rng(0), []
    for _ in range(BOOTSTRAP_SAMPLES):
        chosen = rng.integers(0, len(hits), len(hits))
        ratios.append(hits[chosen].sum() / max(1, counts[chosen].sum()))
    low, high = np.percentile(ratios, [2.5, 97.5])
    detail = f"bootstrap interval over {len(hits)} games, {BOOTSTRAP_SAMPLES} samples"
    return Score(name, hit / total, float(low), float(high), total, detail)


# ------------------------------------------------------------------------------------------------- reading


class MoveReader:
    """Logits of the next move for many boards; a model that carries a state reads each move only once.

    Boards that continue those of the last call, in the same order and perhaps without some of them, are read from
    where that call ended. Other boards are read from the beginning. An encoder-decoder always reads the whole game.

    Raises:
        TypeError: a model that predicts no next token or carries no state.
        ValueError: a tokenizer with more tokens than the model.
    """

    def __init__(self, model: Model, params: Any, tokenizer: MoveTokenizer) -> None:
        check_model(model, tokenizer)
        model.state_specs(1, 1)
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self._legal = LegalMoves(tokenizer)
        self._rows: list[_Row] = []
        self._restart([])

    @property
    def max_moves(self) -> int | None:
        """The longest game after which the model can predict a move; None: any."""
        limit = _max_positions(self.model)
        return None if limit is None else limit - 1

    def check_moves(self, moves: int) -> None:
        """Raise ``ValueError`` when the model cannot read a game of so many moves."""
        if self.max_moves is not None and moves > self.max_moves:
            raise ValueError(
                f"a game of {moves} moves needs {moves + 1} positions, but the model has max_positions="
                f"{self.max_moves + 1}: play or evaluate shorter games, or train a model with more positions"
            )

    def logits(self, boards: Sequence[chess.Board]) -> np.ndarray:
        """Logits of the next token, float32 [B, V].

        Raises:
            ValueError: no board, a board that did not begin in the initial position, or a game that is too long.
        """
        if not boards:
            raise ValueError("logits needs at least one board")
        at = self._find(boards)
        if at is None:
            self._restart(boards)
            at = list(range(len(boards)))
        new: list[list[int]] = [[] for _ in self._rows]
        for index, board in zip(at, boards, strict=True):
            new[index] = self._extend(self._rows[index], board)
        self.check_moves(max(len(board.move_stack) for board in boards))
        if self.model.reads_source:
            sources = [np.array(self._rows[index].ids, np.int32) for index in at]
            return np.concatenate(list(_next_logits(self.model, self.params, self.tokenizer, sources, len(sources))))
        count = max(map(len, new))
        if count:
            if self._state is None or self._used + count > self._capacity:
                chosen = set(at)
                new = [row.ids if index in chosen else [] for index, row in enumerate(self._rows)]
                count = self._new_state(max(map(len, new)))
            self._read(new, count)
        return self._logits[at]

    def _find(self, boards: Sequence[chess.Board]) -> list[int] | None:
        """The row whose moves each board continues, None when one has no such row."""
        found: list[int] = []
        for board in boards:
            start, moves = (found[-1] + 1 if found else 0), board.move_stack
            row = next((i for i in range(start, len(self._rows)) if self._rows[i].begins(moves)), None)
            if row is None:
                return None
            found.append(row)
        return found

    def _restart(self, boards: Sequence[chess.Board]) -> None:
        chess = import_chess()
        for index, board in enumerate(boards):
            if board.root().fen() != chess.STARTING_FEN:
                raise ValueError(
                    f"board {index} begins at {board.root().fen()!r}: models read games from the beginning"
                )
        self._rows = [_Row([], []) for _ in boards]
        self._state, self._used, self._capacity = None, 0, 0
        # A power of two, so that matches of different sizes share compiled programs.
        self._batch = 1 << max(0, len(boards) - 1).bit_length()
        self._logits = np.zeros((self._batch, self.tokenizer.vocab_size), np.float32)

    def _extend(self, row: _Row, board: chess.Board) -> list[int]:
        """Add the new moves of ``board`` to its row, and return their ids (first the beginning, in a new row)."""
        new = [] if row.ids else [self.tokenizer.bos_id]
        moves = board.move_stack[len(row.moves) :]
        before = board.copy(stack=len(moves))
        for _ in moves:
            before.pop()
        for move in moves:
            id = self.tokenizer.move_id(self._legal.text(before, move))
            new.append(self.tokenizer.special_ids.unk if id is None else id)  # type: ignore[arg-type]
            before.push(move)
        row.moves.extend(moves)
        row.ids.extend(new)
        return new

    def _new_state(self, longest: int) -> int:
        """Make an empty state with room for more than ``longest`` tokens; returns how many are to be read at once."""
        limit = _max_positions(self.model)
        count = longest if longest <= 2 else -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        self._capacity = max(MIN_CAPACITY, 1 << (count + LENGTH_MULTIPLE - 1).bit_length())
        if limit is not None and self._capacity > limit:
            self._capacity = limit
            count = longest if count + LENGTH_MULTIPLE > limit else count
        self._state, self._used = self.model.init_state(self._batch, self._capacity), 0
        return count

    def _read(self, new: list[list[int]], count: int) -> None:
        tokens, segment_ids = _padded([np.array(ids, np.int32) for ids in new], self._batch, count)
        self._state, logits = _read_moves(
            self.model, self.params, self._state, tokens, segment_ids, sharding=active()
        )  # fmt: skip
        self._used += count
        fresh = np.flatnonzero(segment_ids.any(axis=1))
        self._logits[fresh] = _finite(np.asarray(logits)[fresh, : self.tokenizer.vocab_size])


@dataclasses.dataclass
class _Row:
    """What one row of a reader has read: the moves, and the ids (beginning included)."""

    moves: list[chess.Move]
    ids: list[int]

    def begins(self, moves: list[chess.Move]) -> bool:
        return moves[: len(self.moves)] == self.moves


@functools.partial(jax.jit, static_argnames=("model", "sharding"), donate_argnames="state")
def _read_moves(
    model: Model, params: Any, state: Any, tokens_BT: jax.Array, segment_ids_BT: jax.Array, *, sharding: Sharding | None
) -> tuple[Any, jax.Array]:
    """The state after the tokens, and the logits [B, V] after each row's last real one."""
    return read_prompts(model, params, tokens_BT, segment_ids_BT, 0, state)


@functools.partial(jax.jit, static_argnames=("model", "begin_id", "sharding"))
def _last_logits(
    model: Model,
    params: Any,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    begin_id: int,
    sharding: Sharding | None,  # part of the cache key: constrain reads it while tracing
) -> jax.Array:
    """Logits [B, V] of the token after each row."""
    if model.reads_source:
        state = model.start(params, tokens_BT, 1, segment_ids=segment_ids_BT)
        begin_B1 = jnp.full((tokens_BT.shape[0], 1), begin_id, jnp.int32)
        hidden_B1D, _ = model.apply(params, begin_B1, state=state)
        return model.logits(params, hidden_B1D)[:, 0]
    hidden_BTD, _ = model.apply(params, tokens_BT, segment_ids=segment_ids_BT)
    return model.logits(params, last_real(hidden_BTD, segment_ids_BT))[:, 0]


@functools.partial(jax.jit, static_argnames=("model", "ids", "sharding"))
def _best_and_rank(
    model: Model,
    params: Any,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    ids: int,
    sharding: Sharding | None,
) -> tuple[jax.Array, jax.Array]:
    """For each token but the first: the most probable id in its position, and the number of other ids that are at least
    as probable as the token. Both int32 [B, T - 1]."""
    hidden_BTD, _ = model.apply(params, tokens_BT[:, :-1], segment_ids=segment_ids_BT[:, :-1])
    logits_BTV = model.logits(params, hidden_BTD)[..., :ids]
    true_BT1 = jnp.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)
    # Not logits >= true, which for NaN would be False, and so a rank of 0.
    return jnp.argmax(logits_BTV, axis=-1), jnp.sum(~(logits_BTV < true_BT1), axis=-1) - 1


def _next_logits(
    model: Model, params: Any, tokenizer: MoveTokenizer, rows: Sequence[np.ndarray], batch_size: int
) -> Iterator[np.ndarray]:
    """Logits [b, V] after each of b rows, in the order of the rows."""
    _check_lengths(model, rows)
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        batch = min(batch_size, 1 << (len(part) - 1).bit_length())
        tokens, segment_ids = _padded(part, batch, _padded_length(model, part))
        logits = _last_logits(
            model, params, tokens, segment_ids, begin_id=tokenizer.pad_id, sharding=active()
        )  # fmt: skip
        yield _finite(np.asarray(logits)[: len(part), : tokenizer.vocab_size])


def _predictions(
    model: Model, params: Any, tokenizer: MoveTokenizer, games: Sequence[str], batch_size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each game: its index, the best id before each of its moves, and the rank of the move (0 is the best)."""
    rows = [_prompt(tokenizer, line) for line in games]
    if model.reads_source:
        for index, row in enumerate(rows):
            beginnings = [row[:end] for end in range(1, len(row))]
            logits = np.concatenate(list(_next_logits(model, params, tokenizer, beginnings, batch_size)))
            true = np.take_along_axis(logits, row[1:, None], axis=1)
            yield index, logits.argmax(axis=1), np.sum(~(logits < true), axis=1) - 1
        return
    _check_lengths(model, [row[:-1] for row in rows])
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # similar lengths share a batch
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        part = [rows[index] for index in chosen]
        length = _padded_length(model, [row[:-1] for row in part]) + 1
        tokens, segment_ids = _padded(part, batch_size, length)
        best, ranks = _best_and_rank(
            model, params, tokens, segment_ids, ids=tokenizer.vocab_size, sharding=active()
        )  # fmt: skip
        best, ranks = np.asarray(best), np.asarray(ranks)
        for at, index in enumerate(chosen):
            moves = len(rows[index]) - 1
            yield index, best[at, :moves], ranks[at, :moves]


def _prompt(tokenizer: MoveTokenizer, line: str) -> np.ndarray:
    """What a model reads of a game so far: the beginning and the moves."""
    return np.concatenate([[tokenizer.bos_id], tokenizer.encode(line)]).astype(np.int32)


def _finite(logits: np.ndarray) -> np.ndarray:
    if np.isnan(logits).any():
        raise ValueError("the model's logits are NaN: its parameters are broken, or a token is outside its vocabulary")
    return logits


def _padded(rows: Sequence[np.ndarray], batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as tokens [batch, length] padded on the right, and their segment ids (1; 0 in padding and unused rows)."""
    tokens, segment_ids = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], segment_ids[index, : len(row)] = row, 1
    return tokens, segment_ids


def _padded_length(model: Model, rows: Sequence[np.ndarray]) -> int:
    longest = max(map(len, rows))
    padded = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return min(padded, _max_positions(model) or padded)


def _max_positions(model: Model) -> int | None:
    return getattr(model.config, "max_positions", None)


def _check_lengths(model: Model, rows: Sequence[np.ndarray]) -> None:
    limit = _max_positions(model)
    too_long = [index for index, row in enumerate(rows) if limit is not None and len(row) > limit]
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(rows)} games are longer than the model's max_positions={limit}, first game "
            f"{too_long[0]} with {len(rows[too_long[0]]) - 1} moves: leave them out or shorten them"
        )


def _check_games(games: Sequence[str]) -> None:
    if isinstance(games, str) or not games or not all(line.strip() for line in games):
        raise ValueError("games must be a sequence of lines with at least one move each")


def check_model(model: Model, tokenizer: MoveTokenizer) -> None:
    """Raise unless the model predicts next tokens and has an id for every token.

    Raises:
        TypeError: the wrong kind of model or tokenizer.
        ValueError: a tokenizer with more tokens than the model.
    """
    if not isinstance(tokenizer, MoveTokenizer):
        raise TypeError(
            f"chess needs a MoveTokenizer, got a {type(tokenizer).__name__}: the model was not trained on moves"
        )
    task = getattr(model.config, "task", "causal")
    if task not in ("causal", "seq2seq"):
        raise TypeError(f"chess needs a model that predicts the next token, but {model.family} has task={task!r}")
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has vocab_size={model.config.vocab_size}"
        )
