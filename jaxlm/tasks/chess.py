"""Metrics of language models that play chess. The module also exports names of other chess modules (``__all__``).

    tokenizer = MoveTokenizer("uci")
    accuracy = next_move_accuracy(model, params, tokenizer, games)
    print(play_match(ModelPlayer(model, params, tokenizer), RandomPlayer()))

A model reads a game as tokens of a ``MoveTokenizer``: the BOS token, then one token per move. An encoder-decoder reads
these tokens as its source, and its target is the next move. A move is the move of one player, not of both.

Shapes: B games, T tokens of a game, V tokens of the tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config import check_min
from jaxlm.data.games import import_chess
from jaxlm.data.moves import MoveTokenizer
from jaxlm.data.tokenizers import check_strings
from jaxlm.metrics import BOOTSTRAP_SAMPLES, Score, bootstrap, proportion
from jaxlm.models import Model
from jaxlm.spec import Params
from jaxlm.tasks.chess_players import (
    EnginePlayer,
    MatchResult,
    MaterialPlayer,
    ModelPlayer,
    Player,
    RandomPlayer,
    play_match,
)
from jaxlm.tasks.chess_reading import (
    LegalMoves,
    MoveReader,
    board_after,
    check_games,
    check_lengths,
    check_model,
    choose_ids,
    find_mate,
    gives_checkmate,
    next_logits,
    next_move_probabilities,
    pad_games,
    padded_length,
    push_move,
)
from jaxlm.tasks.chess_terminal import draw_board, play_on_terminal

__all__ = [
    "EnginePlayer", "LegalMoveRate", "LegalMoves", "MatchResult", "MaterialPlayer", "ModelPlayer",
    "MoveReader", "NextMoveScores", "Player", "RandomPlayer", "board_after", "draw_board", "legal_move_rate",
    "mate_in_one_accuracy", "mates_in_one", "next_move_accuracy", "next_move_probabilities", "play_match",
    "play_on_terminal",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NextMoveScores:
    """Scores of next-move predictions in recorded games.

    The true move is the move that was played. The model reads all true moves before the predicted move.

    Attributes:
        top_1: fraction of true moves that are the most probable token.
        top_5: fraction of true moves that are among the five most probable tokens.
        legal: fraction of positions in which the most probable token is a legal move.
    """

    top_1: Score
    top_5: Score
    legal: Score


def next_move_accuracy(
    model: Model, params: Params, tokenizer: MoveTokenizer, games: Sequence[str], *, batch_size: int = 16
) -> NextMoveScores:
    """The accuracy and the legality of the model's next-move predictions in ``games``. Illegal moves are not masked.

    Every move of every game counts once. The end token does not count. If a true move is outside the SAN vocabulary,
    its prediction counts as wrong. If the true move and other tokens have the same probability, the true move ranks
    last among them. The confidence intervals are percentile bootstrap intervals over games. If a score is 0 or 1, its
    interval is instead the Wilson interval of a proportion with one trial per game.

    An encoder-decoder reads a separate source for each move. So it is slower than a causal model by a factor of about
    the number of moves per game.

    Args:
        games: one line of moves per game, in the tokenizer's notation. All moves must be legal.

    Raises:
        TypeError: the tokenizer is not a ``MoveTokenizer``, or ``games`` is one string.
        ValueError: there are no games; ``batch_size`` is below 1; a game has no moves, has an illegal move or has
            more moves than ``max_positions``; the model does not predict next tokens; the tokenizer has more tokens
            than the model; or the model is a ``chess_llama`` and the tokenizer is not ``MoveTokenizer("uci")``.
    """
    check_model(model, tokenizer)
    check_games("games", games, batch_size)
    if not all(line.strip() for line in games):
        raise ValueError("games must be lines with at least one move each")
    legal_moves, hits = LegalMoves(tokenizer), np.zeros((3, len(games)), int)
    for index, best_ids, ranks in _predictions(model, params, tokenizer, games, batch_size):
        board, num_legal = import_chess().Board(), 0
        for word, id in zip(games[index].split(), best_ids, strict=True):
            num_legal += legal_moves.move(board, int(id)) is not None
            push_move(board, word)
        in_vocabulary = tokenizer.encode(games[index]) >= tokenizer.first_move_id
        hits[:, index] = np.sum(in_vocabulary & (ranks < 1)), np.sum(in_vocabulary & (ranks < 5)), num_legal
    moves = np.array([len(line.split()) for line in games])
    names = ("next move", "next move in top 5", "legal best move")
    return NextMoveScores(*(_ratio_over_games(name, row, moves) for name, row in zip(names, hits, strict=True)))


@dataclasses.dataclass(frozen=True)
class LegalMoveRate:
    """The fractions of legal moves and legal games among games that a model generated.

    Attributes:
        moves: fraction of sampled moves that are legal. The first illegal move of a game counts as a sampled move and
            ends the game. The fraction is 0 if no move was sampled.
        games: fraction of games without an illegal move.
        lines: the legal moves of each game, in the tokenizer's notation.
    """

    moves: Score
    games: Score
    lines: tuple[str, ...]


def legal_move_rate(
    model: Model,
    params: Params,
    tokenizer: MoveTokenizer,
    *,
    games: int = 200,
    max_moves: int = 200,
    temperature: float = 1.0,
    seed: int = 0,
) -> LegalMoveRate:
    """The fractions of legal moves and of legal games in games that the model generates. Illegal moves are not masked.

    A game ends with its first illegal move, with the end token, or after ``max_moves`` moves. The end token does not
    count as a move. Other special tokens count as illegal moves. Every move after checkmate or stalemate is illegal.

    Args:
        games: number of games.
        temperature: each move is drawn from ``softmax(logits / temperature)``. 0 selects the most probable token.
        seed: seed of the draws.

    Raises:
        TypeError: the model has no state, or the tokenizer is not a ``MoveTokenizer``.
        ValueError: ``games`` or ``max_moves`` is below 1, ``max_moves`` exceeds the model's positions, the temperature
            is outside its range, the model does not predict next tokens, the tokenizer has more tokens than the model,
            or the model is a ``chess_llama`` and the tokenizer is not ``MoveTokenizer("uci")``.
    """
    check_min(1, games=games, max_moves=max_moves)
    reader, legal_moves, rng = MoveReader(model, params, tokenizer), LegalMoves(tokenizer), np.random.default_rng(seed)
    reader.check_moves(max_moves - 1)
    boards = [import_chess().Board() for _ in range(games)]
    lines: list[list[str]] = [[] for _ in boards]
    illegal = np.zeros(games, int)
    playing = list(range(games))
    for _ in range(max_moves):
        ids = choose_ids(reader.logits([boards[game] for game in playing]), temperature, rng)
        unfinished = []
        for game, id in zip(playing, ids.tolist(), strict=True):
            move = legal_moves.move(boards[game], id)
            if move is not None:
                lines[game].append(legal_moves.text(boards[game], move))
                boards[game].push(move)
                unfinished.append(game)
            else:
                illegal[game] = id != tokenizer.eos_id
        playing = unfinished
        if not playing:
            break
    legal = np.array([len(line) for line in lines])
    return LegalMoveRate(
        _ratio_over_games("legal sampled move", legal, legal + illegal),
        proportion("game without illegal move", int(games - illegal.sum()), games),
        tuple(" ".join(line) for line in lines),
    )


def mates_in_one(games: Sequence[str]) -> list[str]:
    """The positions in ``games`` in which the player to move can give checkmate, in the order of the games.

    Each position is returned as the line of moves that leads to it. The position after the last move of a game is not
    searched. About one in a hundred master games has a mate in one. The search takes about 14 ms per game.

    Args:
        games: one line of UCI or SAN moves per game.

    Raises:
        TypeError: ``games`` is one string.
        ValueError: a move is illegal or unreadable (``board_after``).
    """
    check_strings("games", games)
    found = []
    for line in games:
        board, words = import_chess().Board(), line.split()
        for index, word in enumerate(words):
            if find_mate(board) is not None:
                found.append(" ".join(words[:index]))
            push_move(board, word)
    return found


def mate_in_one_accuracy(
    model: Model, params: Params, tokenizer: MoveTokenizer, positions: Sequence[str], *, batch_size: int = 64
) -> Score:
    """The fraction of ``positions`` in which the model's most probable legal move gives checkmate.

    Every move that gives checkmate is correct, not only the move of the game. If the tokenizer's vocabulary has none of
    the legal moves of a position, the position counts as wrong. The confidence interval is a Wilson interval.

    Args:
        positions: lines of moves after which a mate in one is possible, for example from :func:`mates_in_one`.

    Raises:
        TypeError: the tokenizer is not a ``MoveTokenizer``, or ``positions`` is one string.
        ValueError: there are no positions, ``batch_size`` is below 1, a position has no mate in one, or another
            argument is invalid for ``next_move_probabilities``.
    """
    check_games("positions", positions, batch_size)
    check_model(model, tokenizer)
    boards = [board_after(line) for line in positions]
    for line, board in zip(positions, boards, strict=True):
        if find_mate(board) is None:
            raise ValueError(f"there is no mate in one after {line!r}")
    legal_moves, num_mates = LegalMoves(tokenizer), 0
    playable = np.flatnonzero(legal_moves.mask(boards).any(axis=1)).tolist()
    if playable:
        lines = [positions[index] for index in playable]
        best_ids = next_move_probabilities(
            model, params, tokenizer, lines, legal_only=True, batch_size=batch_size
        ).argmax(axis=1)  # fmt: skip
        for index, id in zip(playable, best_ids.tolist(), strict=True):
            move = legal_moves.move(boards[index], id)
            num_mates += move is not None and gives_checkmate(boards[index], move)
    return proportion("mate in one", num_mates, len(positions))


def _ratio_over_games(name: str, hits: np.ndarray, counts: np.ndarray) -> Score:
    """``sum(hits) / sum(counts)``, or 0 if all counts are 0, with its percentile bootstrap interval over games.

    If the fraction is 0 or 1, the interval is the Wilson interval of a proportion with one trial per game.

    Args:
        hits, counts: integers [games].
    """
    total, hit = int(counts.sum()), int(hits.sum())
    if hit in (0, total):  # the bootstrap interval would have width 0
        games = proportion(name, len(hits) * bool(hit), len(hits))
        return dataclasses.replace(games, count=total, detail=f"Wilson interval of {len(hits)} games")
    low, high = bootstrap(lambda sample: hits[sample].sum() / max(1, counts[sample].sum()), len(hits))
    detail = f"bootstrap interval over {len(hits)} games, {BOOTSTRAP_SAMPLES} samples"
    return Score(name, hit / total, low, high, total, detail)


def _predictions(
    model: Model, params: Params, tokenizer: MoveTokenizer, games: Sequence[str], batch_size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield for each game: its index, the most probable id at each move, and the rank of each true move (0 is best)."""
    rows = [tokenizer.encode_inputs(line).ids for line in games]
    if model.reads_source:
        for index, row in enumerate(rows):
            prefixes = [row[:end] for end in range(1, len(row))]
            logits = np.concatenate(list(next_logits(model, params, tokenizer, prefixes, batch_size)))
            true_logits = np.take_along_axis(logits, row[1:, None], axis=1)
            yield index, logits.argmax(axis=1), np.sum(~(logits < true_logits), axis=1) - 1
        return
    check_lengths(model, [row[:-1] for row in rows])
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # games of similar length share a batch
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch_rows = [rows[index] for index in chosen]
        length = padded_length(model, [row[:-1] for row in batch_rows]) + 1
        tokens, segment_ids = pad_games(batch_rows, batch_size, length)
        best_ids, ranks = _best_id_and_rank(
            model, params, tokens, segment_ids, vocab_size=tokenizer.vocab_size
        )  # fmt: skip
        best_ids, ranks = np.asarray(best_ids), np.asarray(ranks)
        for batch_row, index in enumerate(chosen):
            moves = len(rows[index]) - 1
            yield index, best_ids[batch_row, :moves], ranks[batch_row, :moves]


@jax.jit(static_argnames=("model", "vocab_size"))
def _best_id_and_rank(
    model: Model,
    params: Params,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """The model's most probable id for each token after the first, and the token's rank; both int32 [B, T - 1].

    The rank is the number of other ids that are at least as probable as the token.
    """
    hidden_BTD, _ = model.apply(params, tokens_BT[:, :-1], segment_ids=segment_ids_BT[:, :-1])
    logits_BTV = model.logits(params, hidden_BTD)[..., :vocab_size]
    true_BT1 = jnp.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)
    # NaN logits get the worst rank. With `logits >= true`, they would count as a hit.
    return jnp.argmax(logits_BTV, axis=-1), jnp.sum(~(logits_BTV < true_BT1), axis=-1) - 1
