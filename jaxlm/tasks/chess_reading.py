"""Chess games as a language model reads them: legal moves as ids, and logits of the next move for many boards.

A model reads a game as tokens of a ``MoveTokenizer``: the beginning, then one token per move. An encoder-decoder reads
them as its source and writes the next move; its decoder begins with ``decoder_start_id`` of ``jaxlm.decoding``.

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
from jaxlm.decoding import decoder_start_id
from jaxlm.decoding.describe import require_task
from jaxlm.decoding.prompts import read_prompts, source_vocab_size
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
        TypeError: a tokenizer of another kind.
        ValueError: a model that predicts no next token, a tokenizer with more tokens than the model, a game longer than
            the model's positions, or with ``legal_only`` an illegal game or a position without a legal move in the
            vocabulary.
    """
    check_model(model, tokenizer)
    rows = [tokenizer.encode_inputs(line).ids for line in games_so_far]
    logits = np.concatenate(list(next_logits(model, params, tokenizer, rows, batch_size)))
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


def mates(board: chess.Board, move: chess.Move) -> bool:
    """Whether a legal move is mate. The board is as before afterwards."""
    if not board.gives_check(move):
        return False
    board.push(move)
    mate = board.is_checkmate()
    board.pop()
    return mate


def choose_ids(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """One id per row of logits [B, V], drawn from ``softmax(logits / temperature)``; the largest at temperature 0."""
    if not 0.0 <= temperature < np.inf:
        raise ValueError(f"temperature={temperature} must be finite and at least 0")
    if temperature > 0.0:
        # The largest of logits with Gumbel noise is a draw from their softmax.
        logits = logits / temperature + rng.gumbel(size=logits.shape)
    return logits.argmax(axis=1)


# ------------------------------------------------------------------------------------------------- reading


class MoveReader:
    """Logits of the next move for many boards; a model that carries a state reads each move only once.

    Boards that continue those of the last call, in the same order and perhaps without some of them, are read from
    where that call ended. Other boards are read from the beginning. An encoder-decoder always reads the whole game.

    Raises:
        TypeError: a model that carries no state, or a tokenizer of another kind.
        ValueError: a model that predicts no next token, or a tokenizer with more tokens than the model.
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
        self.check_moves(max(len(board.move_stack) for board in boards))
        at = self._find(boards)
        if at is None:
            self._restart(boards)
            at = list(range(len(boards)))
        try:
            return self._logits_at(at, boards)
        except BaseException:
            self._restart([])  # the state is donated, so after an interruption nothing of it is left
            raise

    def _logits_at(self, at: list[int], boards: Sequence[chess.Board]) -> np.ndarray:
        """Read what is new in the rows ``at``, and return their logits."""
        new: list[list[int]] = [[] for _ in self._rows]
        for index, board in zip(at, boards, strict=True):
            new[index] = self._extend(self._rows[index], board)
        if self.model.reads_source:
            sources = [np.array(self._rows[index].ids, np.int32) for index in at]
            return np.concatenate(list(next_logits(self.model, self.params, self.tokenizer, sources, self._batch)))
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
        tokens, segment_ids = padded([np.array(ids, np.int32) for ids in new], self._batch, count)
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
    begin_id: int | None,
    sharding: Sharding | None,  # part of the cache key: constrain reads it while tracing
) -> jax.Array:
    """Logits [B, V] of the token after each row."""
    if model.reads_source:
        state = model.start(params, tokens_BT, 1, segment_ids=segment_ids_BT)
        assert begin_id is not None
        begin_B1 = jnp.full((tokens_BT.shape[0], 1), begin_id, jnp.int32)
        hidden_B1D, _ = model.apply(params, begin_B1, state=state)
        return model.logits(params, hidden_B1D)[:, 0]
    hidden_BTD, _ = model.apply(params, tokens_BT, segment_ids=segment_ids_BT)
    return model.logits(params, last_real(hidden_BTD, segment_ids_BT))[:, 0]


def next_logits(
    model: Model, params: Any, tokenizer: MoveTokenizer, rows: Sequence[np.ndarray], batch_size: int
) -> Iterator[np.ndarray]:
    """Logits [b, V] after each of b rows, in the order of the rows."""
    check_lengths(model, rows)
    begin_id = decoder_start_id(model, tokenizer) if model.reads_source else None
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        batch = min(batch_size, 1 << (len(part) - 1).bit_length())
        tokens, segment_ids = padded(part, batch, padded_length(model, part))
        logits = _last_logits(
            model, params, tokens, segment_ids, begin_id=begin_id, sharding=active()
        )  # fmt: skip
        yield _finite(np.asarray(logits)[: len(part), : tokenizer.vocab_size])


def _finite(logits: np.ndarray) -> np.ndarray:
    if np.isnan(logits).any():
        raise ValueError("the model's logits are NaN: its parameters are broken, or a token is outside its vocabulary")
    return logits


def padded(rows: Sequence[np.ndarray], batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as tokens [batch, length] padded on the right, and their segment ids (1; 0 in padding and unused rows)."""
    tokens, segment_ids = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)], segment_ids[index, : len(row)] = row, 1
    return tokens, segment_ids


def padded_length(model: Model, rows: Sequence[np.ndarray]) -> int:
    """The length to which rows are padded: a multiple of ``LENGTH_MULTIPLE``, or the model's positions."""
    longest = max(map(len, rows))
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return min(length, _max_positions(model) or length)


def _max_positions(model: Model) -> int | None:
    return getattr(model.config, "max_positions", None)


def check_lengths(model: Model, rows: Sequence[np.ndarray]) -> None:
    """Raise ``ValueError`` when a row has more tokens than the model has positions."""
    limit = _max_positions(model)
    too_long = [index for index, row in enumerate(rows) if limit is not None and len(row) > limit]
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(rows)} games are longer than the model's max_positions={limit}, first game "
            f"{too_long[0]} with {len(rows[too_long[0]]) - 1} moves: leave them out or shorten them"
        )


def check_model(model: Model, tokenizer: MoveTokenizer) -> None:
    """Raise unless the model predicts next tokens and has an id for every token.

    Raises:
        TypeError: another kind of tokenizer.
        ValueError: another kind of model, or a tokenizer with more tokens than the model.
    """
    if not isinstance(tokenizer, MoveTokenizer):
        raise TypeError(
            f"chess needs a MoveTokenizer, got a {type(tokenizer).__name__}: the model was not trained on moves"
        )
    require_task(
        model, ("causal", "permutation", "seq2seq"), "it predicts no next move",
        "use a language model (GPT, Llama, LSTM, ...) or an encoder-decoder (T5, attention RNN)",
    )  # fmt: skip
    for size in (model.config.vocab_size, source_vocab_size(model)):
        if size < tokenizer.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has vocab_size={size}")
