"""Chess with language models: how well a model knows the game. The names of all chess modules are here.

    tokenizer = MoveTokenizer("uci")
    accuracy = next_move_accuracy(model, params, tokenizer, games)
    print(play_match(ModelPlayer(model, params, tokenizer), RandomPlayer()))

A model reads a game as tokens of a ``MoveTokenizer``: the beginning, then one token per move. An encoder-decoder reads
them as its source and writes the next move. One move means one move of one player.

Shapes: B games, T tokens of a game, V tokens of the tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.data.games import import_chess
from jaxlm.data.moves import MoveTokenizer
from jaxlm.metrics import BOOTSTRAP_SAMPLES, Score, proportion
from jaxlm.models import Model
from jaxlm.sharding import Sharding, active
from jaxlm.tasks.chess_players import (
    EnginePlayer,
    MatchResult,
    MatingPlayer,
    ModelPlayer,
    Player,
    RandomPlayer,
    play_match,
)
from jaxlm.tasks.chess_reading import (
    LegalMoves,
    MoveReader,
    board_after,
    check_lengths,
    check_model,
    choose_ids,
    mates,
    next_logits,
    next_move_probabilities,
    padded,
    padded_length,
    push,
)
from jaxlm.tasks.chess_terminal import draw_board, play_on_terminal

__all__ = [
    "EnginePlayer", "LegalMoveRate", "LegalMoves", "MatchResult", "MatingPlayer", "ModelPlayer", "MoveReader",
    "NextMoves", "Player", "RandomPlayer", "board_after", "draw_board", "legal_move_rate", "mate_in_one_accuracy",
    "mates_in_one", "next_move_accuracy", "next_move_probabilities", "play_match", "play_on_terminal",
]  # fmt: skip


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
            the illegal one included; later ones do not exist. 0 when no move was sampled.
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

    About one master game in a hundred has such a position. The search takes about 14 ms per game.
    """
    found = []
    for line in games:
        board, words = import_chess().Board(), line.split()
        for index, word in enumerate(words):
            if any(mates(board, move) for move in board.legal_moves):
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
    legal_moves, found = LegalMoves(tokenizer), 0
    for line, id in zip(positions, best.tolist(), strict=True):
        board = board_after(line)
        if not any(mates(board, move) for move in board.legal_moves):
            raise ValueError(f"there is no mate in one after {line!r}")
        move = legal_moves.move(board, id)
        found += move is not None and mates(board, move)
    return proportion("mate in one", found, len(positions))


def _share(name: str, hits: np.ndarray, counts: np.ndarray) -> Score:
    """``sum(hits) / sum(counts)`` with the percentile bootstrap interval over games; 0 when all counts are 0.

    Both have one entry per game.
    """
    total, hit = int(counts.sum()), int(hits.sum())
    if hit in (0, total):  # resampling would give an interval of width 0
        games = proportion(name, len(hits) * bool(hit), len(hits))
        return dataclasses.replace(games, count=total, detail=f"Wilson interval of {len(hits)} games")
    rng, ratios = np.random.default_rng(0), []
    for _ in range(BOOTSTRAP_SAMPLES):
        chosen = rng.integers(0, len(hits), len(hits))
        ratios.append(hits[chosen].sum() / max(1, counts[chosen].sum()))
    low, high = np.percentile(ratios, [2.5, 97.5])
    detail = f"bootstrap interval over {len(hits)} games, {BOOTSTRAP_SAMPLES} samples"
    return Score(name, hit / total, float(low), float(high), total, detail)


def _predictions(
    model: Model, params: Any, tokenizer: MoveTokenizer, games: Sequence[str], batch_size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each game: its index, the best id before each of its moves, and the rank of the move (0 is the best)."""
    rows = [tokenizer.encode_inputs(line).ids for line in games]
    if model.reads_source:
        for index, row in enumerate(rows):
            beginnings = [row[:end] for end in range(1, len(row))]
            logits = np.concatenate(list(next_logits(model, params, tokenizer, beginnings, batch_size)))
            true = np.take_along_axis(logits, row[1:, None], axis=1)
            yield index, logits.argmax(axis=1), np.sum(~(logits < true), axis=1) - 1
        return
    check_lengths(model, [row[:-1] for row in rows])
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # similar lengths share a batch
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        part = [rows[index] for index in chosen]
        length = padded_length(model, [row[:-1] for row in part]) + 1
        tokens, segment_ids = padded(part, batch_size, length)
        best, ranks = _best_and_rank(
            model, params, tokens, segment_ids, ids=tokenizer.vocab_size, sharding=active()
        )  # fmt: skip
        best, ranks = np.asarray(best), np.asarray(ranks)
        for at, index in enumerate(chosen):
            moves = len(rows[index]) - 1
            yield index, best[at, :moves], ranks[at, :moves]


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


def _check_games(games: Sequence[str]) -> None:
    if isinstance(games, str) or not games or not all(line.strip() for line in games):
        raise ValueError("games must be a sequence of lines with at least one move each")
