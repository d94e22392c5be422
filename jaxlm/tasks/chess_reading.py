"""Chess positions for language models: ids of legal moves, and logits and probabilities of the next move.

A model reads a game as tokens of a ``MoveTokenizer``: the BOS token, then one token per move. An encoder-decoder reads
these tokens as its source. Its decoder reads the start token (``jaxlm.decoding.decoder_start_id``) and predicts the
next move.

Shapes: B games or boards, T tokens of a game, V token ids of the tokenizer (in jitted functions: of the model).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import check_min
from jaxlm.data.games import UCI_MOVE, import_chess, san_without_check_signs
from jaxlm.data.moves import MoveTokenizer
from jaxlm.data.tokenizers import check_strings
from jaxlm.decoding import decoder_start_id
from jaxlm.decoding.batches import pad_rows
from jaxlm.decoding.describe import require_next_token_head
from jaxlm.decoding.prompts import read_prompts, read_tokens, source_vocab_size
from jaxlm.decoding.sample import check_temperature
from jaxlm.models import Model
from jaxlm.models.heads import last_token_hidden
from jaxlm.spec import Params

if TYPE_CHECKING:
    import chess

LENGTH_MULTIPLE = 32
"""Games that a model reads from the beginning are padded to a multiple of this number of tokens, but at most to the
model's ``max_positions``. So few shapes are compiled."""
MIN_CAPACITY = 128
"""Minimum capacity, in tokens, of the model state of a ``MoveReader``. If the model has fewer positions, the capacity
is ``max_positions``."""


class LegalMoves:
    """Converts the legal moves of positions to ids of a tokenizer and back.

    A vocabulary of SAN moves, or of selected UCI moves, may lack a legal move. Such a move has no id, so a model cannot
    select it.
    """

    def __init__(self, tokenizer: MoveTokenizer) -> None:
        import_chess()
        self.tokenizer = tokenizer

    def ids(self, board: chess.Board) -> dict[int, chess.Move]:
        """A dictionary from ids to the legal moves of a board."""
        moves = {self.tokenizer.move_id(self.text(board, move)): move for move in board.legal_moves}
        return {id: move for id, move in moves.items() if id is not None}

    def mask(self, boards: Sequence[chess.Board]) -> np.ndarray:
        """Whether each id is a legal move of each board; bool [B, V]."""
        mask = np.zeros((len(boards), self.tokenizer.vocab_size), bool)
        for row, board in zip(mask, boards, strict=True):
            row[list(self.ids(board))] = True
        return mask

    def move(self, board: chess.Board, id: int) -> chess.Move | None:
        """The legal move with this id. None: the move is illegal or ambiguous, or the id is a special token.

        In SAN, a move with a needless origin is legal, for example ``Ngf3`` if only one knight can move to f3. A move
        with a wrong or missing capture sign is illegal, for example ``Nxf3`` if f3 is empty.
        """
        if not self.tokenizer.is_move(id):
            return None
        text = self.tokenizer.move_text(id)
        try:
            if self.tokenizer.notation == "san":
                move = board.parse_san(text)
                return move if ("x" in text) == board.is_capture(move) else None  # python-chess ignores the "x"
            move = board.parse_uci(text)
        except ValueError:
            return None
        return move if move.uci() == text else None  # python-chess also reads e1h1, the castling of Chess960

    def text(self, board: chess.Board, move: chess.Move) -> str:
        """The text of a legal move in the notation of the tokenizer, without the signs for check and mate."""
        return move.uci() if self.tokenizer.notation == "uci" else san_without_check_signs(board, move)


def next_move_probabilities(
    model: Model,
    params: Params,
    tokenizer: MoveTokenizer,
    games_so_far: Sequence[str],
    *,
    legal_only: bool = False,
    batch_size: int = 64,
) -> np.ndarray:
    """The probabilities of the next token after each game, float32 [B, V].

    Args:
        games_so_far: one line of moves per game, in the tokenizer's notation. An empty line is the initial position.
        legal_only: set the probability of illegal moves and special tokens to 0. The probabilities of the legal moves
            then sum to 1.
        batch_size: number of games in a batch.

    Raises:
        TypeError: the tokenizer is not a ``MoveTokenizer``, or ``games_so_far`` is one string.
        ValueError: the model does not predict next tokens, cannot use the tokenizer (:func:`check_model`), or has NaN
            logits; there are no games; ``batch_size`` is below 1; or a game has a word that is not a move, or (with
            BOS) more tokens than the model has positions. With ``legal_only``: a game has an illegal move or has ended,
            or the vocabulary has no legal move of a position.
    """
    check_model(model, tokenizer)
    check_games("games_so_far", games_so_far, batch_size)
    rows = [tokenizer.encode_inputs(line).ids for line in games_so_far]
    logits = np.concatenate(list(next_logits(model, params, tokenizer, rows, batch_size)))
    if legal_only:
        mask = LegalMoves(tokenizer).mask([board_after(line) for line in games_so_far])
        for line, row in zip(games_so_far, mask, strict=True):
            if not row.any():
                raise ValueError(f"the vocabulary has no legal move after {line!r}, or the game has ended")
        logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def board_after(line: str) -> chess.Board:
    """The board after a line of UCI or SAN moves.

    Raises:
        ValueError: a move is illegal, ambiguous, unreadable or a null move.
    """
    board = import_chess().Board()
    for word in line.split():
        push_move(board, word)
    return board


def push_move(board: chess.Board, word: str) -> chess.Move:
    """Play a UCI or SAN move on ``board`` and return the move. Raises ``ValueError`` as in :func:`board_after`."""
    move = board.parse_uci(word) if UCI_MOVE.fullmatch(word) else board.parse_san(word)
    if not move:
        raise ValueError(f"{word!r} is a null move")
    board.push(move)
    return move


def gives_checkmate(board: chess.Board, move: chess.Move) -> bool:
    """Whether a legal move gives checkmate. The board is unchanged on return."""
    if not board.gives_check(move):
        return False
    board.push(move)
    is_mate = board.is_checkmate()
    board.pop()
    return is_mate


def find_mate(board: chess.Board) -> chess.Move | None:
    """The first legal move that gives checkmate. None: there is no such move."""
    return next((move for move in board.legal_moves if gives_checkmate(board, move)), None)


def choose_ids(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """One id per row of logits [B, V], drawn from ``softmax(logits / temperature)``. Temperature 0 gives the argmax.

    Raises:
        ValueError: the temperature is negative, not finite, or too small for float32.
    """
    check_temperature(temperature)
    if temperature > 0.0:
        # The argmax of the logits plus Gumbel noise is a sample from their softmax.
        logits = logits / temperature + rng.gumbel(size=logits.shape)
    return logits.argmax(axis=1)


# ------------------------------------------------------------------------------------------------- reading


class MoveReader:
    """Computes the logits of the next move for several boards, and reuses the model state of earlier calls.

    If each board continues a board of an earlier call, in the same order, the model reads only the new moves. Some
    boards of the earlier call may be missing. The model reads all games from the beginning if a board continues no
    board of an earlier call, or if the new moves exceed the capacity of the model state. An encoder-decoder always
    reads whole games.

    Raises:
        TypeError: the model has no state, or the tokenizer is not a ``MoveTokenizer``.
        ValueError: the model does not predict next tokens, or cannot use the tokenizer (:func:`check_model`).
    """

    def __init__(self, model: Model, params: Params, tokenizer: MoveTokenizer) -> None:
        check_model(model, tokenizer)
        model.state_specs(1, 1)  # raises TypeError if the model has no state
        self.model, self.params, self.tokenizer = model, params, tokenizer
        self._legal = LegalMoves(tokenizer)
        self._reset([])

    @property
    def max_moves(self) -> int | None:
        """The largest number of moves of a game for which the model can predict the next move. None: no limit."""
        limit = self.model.max_positions
        return None if limit is None else limit - 1

    def check_moves(self, moves: int) -> None:
        """Raise ``ValueError`` if the model cannot read a game of this number of moves."""
        if self.max_moves is not None and moves > self.max_moves:
            raise ValueError(
                f"a game of {moves} moves needs {moves + 1} positions, but the model has max_positions="
                f"{self.max_moves + 1}: play or evaluate shorter games, or train a model with more positions"
            )

    def logits(self, boards: Sequence[chess.Board]) -> np.ndarray:
        """The logits of the next token for each board, float32 [B, V].

        Raises:
            ValueError: there are no boards, a game did not start from the initial position, a game is too long, a UCI
                vocabulary does not have a move of a game, or the logits are NaN.
        """
        if not boards:
            raise ValueError("logits needs at least one board")
        self.check_moves(max(len(board.move_stack) for board in boards))
        initial = import_chess().Board()
        for index, board in enumerate(boards):
            if (start := board.root()) != initial:
                raise ValueError(
                    f"board {index} begins at {start.fen()!r}: a model needs all moves from the initial position"
                )
        indices = self._find_rows(boards)
        if indices is None:
            self._reset(boards)
            indices = list(range(len(boards)))
        try:
            return self._row_logits(indices, boards)
        except BaseException:
            self._reset([])  # the model state is donated to the jitted function, so an interruption invalidates it
            raise

    def _row_logits(self, indices: list[int], boards: Sequence[chess.Board]) -> np.ndarray:
        """Let the model read the new moves of the boards, and return the logits of each board.

        Args:
            indices: for each board, the index of its row in ``_rows``.
        """
        new_ids: list[list[int]] = [[] for _ in self._rows]
        for index, board in zip(indices, boards, strict=True):
            new_ids[index] = self._append_moves(self._rows[index], board)
        if self.model.reads_source:
            sources = [np.array(self._rows[index].ids, np.int32) for index in indices]
            return np.concatenate(list(next_logits(self.model, self.params, self.tokenizer, sources, self._batch)))
        length = max(map(len, new_ids))
        if length:
            if self._state is None or self._used + length > self._capacity:
                self._rows[:] = [self._rows[index] for index in indices]
                indices = list(range(len(indices)))
                new_ids = [row.ids for row in self._rows]
                length = self._new_state(max(map(len, new_ids)))
            self._read(new_ids, length)
        return self._logits[indices]

    def _find_rows(self, boards: Sequence[chess.Board]) -> list[int] | None:
        """The index of the row that each board continues, in increasing order. None: a board continues no row."""
        found: list[int] = []
        for board in boards:
            start, moves = (found[-1] + 1 if found else 0), board.move_stack
            rows = ((i, self._rows[i].moves) for i in range(start, len(self._rows)))
            index = next((i for i, read_moves in rows if moves[: len(read_moves)] == read_moves), None)
            if index is None:
                return None
            found.append(index)
        return found

    def _reset(self, boards: Sequence[chess.Board]) -> None:
        """Replace the rows with one empty row per board, and drop the model state."""
        self._rows = [_Row([], []) for _ in boards]
        self._state, self._used, self._capacity = None, 0, 0
        # The batch size is a power of two, so that matches of different sizes can use the same compiled function.
        self._batch = 1 << max(0, len(boards) - 1).bit_length()
        self._logits = np.zeros((self._batch, self.tokenizer.vocab_size), np.float32)

    def _append_moves(self, row: _Row, board: chess.Board) -> list[int]:
        """Append the new moves of ``board`` to its row, and return their ids. The first id of an empty row is BOS."""
        new_ids = [] if row.ids else [self.tokenizer.bos_id]
        moves = board.move_stack[len(row.moves) :]
        before = board.copy(stack=len(moves))
        for _ in moves:
            before.pop()
        for move in moves:
            text = self._legal.text(before, move)
            id = self.tokenizer.move_id(text)
            id = self.tokenizer.special_ids.unk if id is None else id
            if id is None:
                raise ValueError(f"the vocabulary has no move {text!r}: use a tokenizer with all moves of the game")
            new_ids.append(id)
            before.push(move)
        row.moves.extend(moves)
        row.ids.extend(new_ids)
        return new_ids

    def _new_state(self, longest: int) -> int:
        """Create an empty model state for rows of up to ``longest`` tokens, and return the padded length of the rows.

        The capacity has space for further moves, unless the model has too few positions. The rows are padded to a
        multiple of ``LENGTH_MULTIPLE``. They are not padded if ``longest`` is 1 or 2, or if the padded rows and
        ``LENGTH_MULTIPLE`` further tokens would exceed the positions of the model.
        """
        limit = self.model.max_positions
        length = longest if longest <= 2 else -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        self._capacity = max(MIN_CAPACITY, 1 << (length + LENGTH_MULTIPLE - 1).bit_length())
        if limit is not None and self._capacity > limit:
            self._capacity = limit
            length = longest if length + LENGTH_MULTIPLE > limit else length
        self._state, self._used = self.model.init_state(self._batch, self._capacity), 0
        return length

    def _read(self, new_ids: list[list[int]], length: int) -> None:
        """Let the model read the new ids of each row, padded to ``length``. Update the model state and the logits."""
        tokens, segment_ids = pad_games([np.array(ids, np.int32) for ids in new_ids], self._batch, length)
        self._state, logits = _read_moves(self.model, self.params, self._state, tokens, segment_ids)
        self._used += length
        updated = np.flatnonzero(segment_ids.any(axis=1))
        self._logits[updated] = _check_not_nan(np.asarray(logits)[updated, : self.tokenizer.vocab_size])


@dataclasses.dataclass
class _Row:
    """The moves that a ``MoveReader`` has read in one batch row, and their ids. The first id is BOS."""

    moves: list[chess.Move]
    ids: list[int]


@jax.jit(static_argnames="model", donate_argnames="state")
def _read_moves(
    model: Model,
    params: Params,
    state: Any,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
) -> tuple[Any, jax.Array]:
    """The model state after the tokens, and the logits [B, V] of the token that follows each row."""
    return read_prompts(model, params, tokens_BT, segment_ids_BT, 0, state)


@jax.jit(static_argnames=("model", "start_id"))
def _last_logits(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    start_id: int | None,
) -> jax.Array:
    """The logits [B, V] of the token that follows each row."""
    if model.reads_source:
        state = model.init_decode_state(params, tokens_BT, 1, segment_ids=segment_ids_BT)
        assert start_id is not None
        return read_tokens(model, params, state, jnp.full(tokens_BT.shape[:1], start_id, jnp.int32))[1]
    hidden_BTD, _ = model.apply(params, tokens_BT, segment_ids=segment_ids_BT)
    return model.logits(params, last_token_hidden(hidden_BTD, segment_ids_BT))[:, 0]


def next_logits(
    model: Model, params: Params, tokenizer: MoveTokenizer, rows: Sequence[np.ndarray], batch_size: int
) -> Iterator[np.ndarray]:
    """Yield the logits of the token that follows each row: one array [rows of the batch, V] per batch, in order.

    ``rows`` are the ids of each game. An encoder-decoder reads them as its source.

    Raises:
        ValueError: a row has more tokens than the model has positions, or the logits are NaN.
    """
    check_lengths(model, rows)
    start_id = decoder_start_id(model, tokenizer) if model.reads_source else None
    for first in range(0, len(rows), batch_size):
        batch_rows = rows[first : first + batch_size]
        batch = min(batch_size, 1 << (len(batch_rows) - 1).bit_length())
        tokens, segment_ids = pad_games(batch_rows, batch, padded_length(model, batch_rows))
        logits = _last_logits(model, params, tokens, segment_ids, start_id=start_id)
        yield _check_not_nan(np.asarray(logits)[: len(batch_rows), : tokenizer.vocab_size])


def _check_not_nan(logits: np.ndarray) -> np.ndarray:
    """Return ``logits``. Raises ``ValueError`` if they contain NaN."""
    if np.isnan(logits).any():
        raise ValueError("the model's logits are NaN: its parameters are NaN, or a token is outside its vocabulary")
    return logits


def pad_games(rows: Sequence[np.ndarray], batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded on the right, and segment ids (1 for tokens, 0 for padding); both int32 [batch, length].

    If there are fewer rows than ``batch``, the other rows contain only padding.
    """
    return pad_rows([*rows, *[np.zeros(0, np.int32)] * (batch - len(rows))], length)


def padded_length(model: Model, rows: Sequence[np.ndarray]) -> int:
    """The padded length of rows: a multiple of ``LENGTH_MULTIPLE``, but at most ``max_positions`` of the model."""
    longest = max(map(len, rows))
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return min(length, model.max_positions or length)


def check_games(name: str, games: Sequence[str], batch_size: int) -> None:
    """Check the games that a function reads in batches.

    Args:
        name: name of the argument ``games`` in error messages.

    Raises:
        TypeError: ``games`` is one string.
        ValueError: there are no games, or ``batch_size`` is below 1.
    """
    check_strings(name, games)
    if not len(games):
        raise ValueError(f"{name} is empty: give at least one line of moves")
    check_min(1, batch_size=batch_size)


def check_lengths(model: Model, rows: Sequence[np.ndarray]) -> None:
    """Raise ``ValueError`` if a row has more tokens than the model has positions."""
    limit = model.max_positions
    too_long = [index for index, row in enumerate(rows) if limit is not None and len(row) > limit]
    if too_long:
        raise ValueError(
            f"{len(too_long)} of {len(rows)} games need more positions than the model's max_positions={limit}, first "
            f"game {too_long[0]}, which needs {len(rows[too_long[0]])}: remove or shorten these games"
        )


def check_model(model: Model, tokenizer: MoveTokenizer) -> None:
    """Check that the model predicts next tokens and has all tokens of the tokenizer.

    Raises:
        TypeError: the tokenizer is not a ``MoveTokenizer``.
        ValueError: the model does not predict next tokens; the tokenizer has more tokens than the model; or the
            model is a ``chess_llama`` and the tokenizer is not ``MoveTokenizer("uci")``.
    """
    if not isinstance(tokenizer, MoveTokenizer):
        raise TypeError(
            f"chess needs a MoveTokenizer, got a {type(tokenizer).__name__}: the model was not trained on moves"
        )
    require_next_token_head(model, "it does not predict moves")
    for size in (model.config.vocab_size, source_vocab_size(model)):
        if size < tokenizer.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the model has vocab_size={size}")
    if model.family == "chess_llama" and tokenizer != MoveTokenizer("uci"):
        raise ValueError(
            f"chess_llama computes the board from the ids of MoveTokenizer('uci'), got {tokenizer}: use the notation "
            "uci, or another family"
        )
