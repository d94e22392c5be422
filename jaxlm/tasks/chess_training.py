"""Training data and report files of a chess model: batches of games, additional games, boards and samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import check_min, check_value
from jaxlm.data import PackedDocuments, Source
from jaxlm.data.buckets import Bucketed, Encoded
from jaxlm.data.games import Games, Notation, import_chess, read_games, to_san
from jaxlm.data.moves import MoveTokenizer
from jaxlm.models import Model
from jaxlm.objectives.batch import Batch
from jaxlm.spec import Params
from jaxlm.tasks import seq2seq, text_generation
from jaxlm.tasks.attention_maps import write_attention_maps
from jaxlm.tasks.chess_players import MatchResult, MaterialPlayer, RandomPlayer, play_match
from jaxlm.tasks.chess_reading import board_after, check_model, next_move_probabilities
from jaxlm.training.report import Board, write_samples

MAP_TOKENS = 40
"""Maximum number of tokens, including BOS, in the attention map of a game."""
_GAMES_PER_MATCH = 500
"""Maximum number of generated games that are played in parallel. More games need more memory."""
_GENERATED_SEED = 1_000_000
"""First element of the seed of generated games. Without this element, generated games and a match with the same seed
would have the same random numbers."""


def game_batches(
    model: Model,
    tokenizer: MoveTokenizer,
    games: Sequence[str],
    batch_size: int,
    length: int,
    *,
    positions_per_game: int = 4,
    target_length: int = 8,
    seed: int = 0,
) -> tuple[Source, Callable[[Any], Batch], str]:
    """A source of training data, a function that converts its batches to ``Batch``, and a description of the data.

    For a causal model, games are packed into rows. For an encoder-decoder, each game is cut at several positions, and
    each position gives one example. Its source has the tokens before the position. Its target has the next tokens, at
    most ``target_length``.

    Args:
        games: one line of moves per game, in the tokenizer's notation.
        length: for a causal model, number of tokens that the model reads per row. Only the first ``length`` moves of a
            longer game are used, because the model cannot know the board at which the rest begins. For an
            encoder-decoder, maximum number of tokens of a source, including BOS.
        positions_per_game: for an encoder-decoder, number of positions at which each game is cut. They are drawn
            uniformly with replacement from 1 to ``length`` (for a shorter game, to its last token).
        target_length: for an encoder-decoder, maximum number of tokens of a target.
        seed: seed of the order of the data and of the drawn positions.

    Raises:
        TypeError: the tokenizer is not a ``MoveTokenizer``.
        ValueError: there are no games; ``batch_size``, ``length``, ``positions_per_game`` or ``target_length`` is below
            1; ``seed`` is negative; ``length`` is larger than ``max_positions`` of the model; a game has a word that is
            not a move of the tokenizer; or the model cannot use the tokenizer (``check_model``).
    """
    check_min(1, length=length, positions_per_game=positions_per_game, target_length=target_length)
    check_model(model, tokenizer)
    text_generation.check_row_length(model, length)
    encoded = [tokenizer.encode_game(line) for line in games]
    if model.reads_source:
        rng, rows = np.random.default_rng(seed), list[Encoded]()
        for game in encoded:
            for cut in rng.integers(1, min(len(game), length + 1), positions_per_game).tolist():
                rows.append({"source": game[:cut], "target": game[cut : cut + target_length]})
        bucketed = Bucketed(rows, batch_size, seed=seed, equal_tokens=True)
        description = f"{bucketed.describe()}, sources of at most {length} tokens, targets of at most {target_length}"
        return bucketed, seq2seq.to_batch(model, tokenizer), description
    truncated = f"{sum(len(game) > length + 1 for game in encoded)} games cut after {length} moves"
    packed = PackedDocuments([game[: length + 1] for game in encoded], length, batch_size, seed)
    return packed, text_generation.to_batch, f"{1 - packed.efficiency:.0%} padding, {truncated}"


def extra_games(
    path: Path | None, notation: Notation, held_out: Collection[str], *, report: Callable[[str], None] = print
) -> tuple[str, ...]:
    """The games of a file that are not in ``held_out``, one line of moves per game.

    Args:
        path: the file. None: the result is empty.
        notation: the notation of the returned games and of ``held_out``.
        held_out: the validation and test games.
        report: a function that prints a text. It gets :meth:`Games.report` of the file. If games are left out, it also
            gets their number.

    Raises:
        ImportError, FileNotFoundError, ValueError: as in :func:`jaxlm.data.read_games`.
    """
    if path is None:
        return ()
    games = read_games(path, notation)
    kept = tuple(line for line in games.moves if line not in held_out)
    report(games.report())
    if len(kept) < len(games):
        report(f"{len(games) - len(kept):,} of these games are left out: they equal validation or test games")
    return kept


def generated_games(count: int, notation: Notation = "uci", seed: int = 0) -> Games:
    """``count`` games of ``MaterialPlayer`` against ``RandomPlayer``. A game takes about 0.08 s on one core.

    Nearly all of these games end with a checkmate. Master games seldom end with a checkmate, because players resign.
    ``MaterialPlayer`` has white in games 0, 2, 4, ...

    Args:
        seed: seed of the moves of ``RandomPlayer``.

    Raises:
        ImportError: the package ``chess`` is not installed.
        ValueError: the notation is unknown, or ``count`` or ``seed`` is negative.
    """
    check_value(Notation, notation, "notation")
    check_min(0, count=count, seed=seed)
    matches = [
        play_match(
            MaterialPlayer(), RandomPlayer(), min(_GAMES_PER_MATCH, count - start), seed=(_GENERATED_SEED, seed, start)
        ).games
        for start in range(0, count, _GAMES_PER_MATCH)
    ]
    lines = [line if notation == "uci" else to_san(line) for games in matches for line in games.moves]
    results = tuple(result for games in matches for result in games.results)
    return Games(tuple(lines), results, notation, source="MaterialPlayer against RandomPlayer")


def match_boards(name: str, match: MatchResult) -> Iterator[Board]:
    """Yield boards for the report, from the first game that the model won, the first draw and the first lost game.

    Of each of these games, the function yields the board after the model's most valuable capture (if there is one), and
    the last board. Games without moves are skipped.

    Args:
        match: the result of a match whose first player is the model.
        name: name of the opponent, for the titles.
    """
    shown_results = set()
    for number, (line, result) in enumerate(zip(match.games.moves, match.games.results, strict=True)):
        color, words = ("white", "black")[number % 2], line.split()
        outcome = "drawn" if result == "1/2-1/2" else "won" if (result == "1-0") == (color == "white") else "lost"
        if outcome in shown_results or not words:
            continue
        shown_results.add(outcome)
        title = f"Against {name}, game {number + 1}: {outcome} in {len(words)} moves"
        capture = _best_capture(words, number % 2)
        if capture is not None:
            text = f"The model is {color}. Its most valuable capture is move {capture}."
            yield Board(title, board_after(" ".join(words[:capture])).fen(), words[capture - 1], text)
        yield Board(title, board_after(line).fen(), words[-1], f"The model is {color}. The last position.")


def _best_capture(words: Sequence[str], first: int) -> int | None:
    """The number (from 1) of the move with which a player captures the most valuable piece. None: no capture.

    The order of value is pawn, knight, bishop, rook, queen. Of captures of equal pieces, the first is returned.

    Args:
        words: the UCI moves of the game.
        first: index of the player's first move, 0 for white and 1 for black.
    """
    pawn = import_chess().PAWN

    board, best, best_piece = board_after(""), None, 0
    for index, word in enumerate(words):
        move = board.parse_uci(word)
        captured = board.piece_type_at(move.to_square) or pawn  # an en passant capture moves to an empty square
        if index % 2 == first and captured > best_piece and board.is_capture(move):
            best, best_piece = index + 1, captured
        board.push_uci(word)
    return best


def write_test(
    run: Path,
    model: Model,
    params: Params,
    tokenizer: MoveTokenizer,
    games: Sequence[str],
    *,
    target_length: int = 8,
) -> None:
    """Write ``samples.jsonl`` with the :func:`move_samples` of the games, and an attention map of the first game.

    The map has BOS and the first moves of the game, at most :data:`MAP_TOKENS` tokens, or fewer if the model has fewer
    positions. For an encoder-decoder, these tokens are the columns, and they end at the middle of the game at the
    latest. The rows are the next moves, at most ``target_length``. For families without attention, no map is written.

    Raises:
        ValueError: as in :func:`move_samples`.
    """
    write_samples(run, move_samples(model, params, tokenizer, games))
    words, limit = games[0].split(), model.max_positions
    length = min(len(words), MAP_TOKENS - 1 if limit is None else min(MAP_TOKENS, limit) - 1)
    outputs = None
    if model.reads_source:
        length = min(length, len(words) // 2)
        outputs = [" ".join(words[length : length + target_length])]
    # Targets in training have no BOS (see game_batches), so the outputs must have none either.
    write_attention_maps(
        run, model, params, tokenizer, [" ".join(words[:length])], outputs, output_special_tokens=False
    )  # fmt: skip


def move_samples(
    model: Model, params: Params, tokenizer: MoveTokenizer, games: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Yield a row for ``write_samples`` for each of the first 20 games.

    A row has the first half of the moves (``source``), the next move (``reference``), and the five most probable next
    tokens with their probabilities (``output``).

    Raises:
        ValueError: there are no games, one of these games has no moves, or as in
            :func:`jaxlm.tasks.chess_reading.next_move_probabilities`.
    """
    if not games:
        raise ValueError("there are no games to sample: use at least one game")
    games_words = [line.split() for line in games[:20]]
    for index, words in enumerate(games_words):
        if not words:
            raise ValueError(f"game {index} has no moves: remove it")
    prefixes = [" ".join(words[: len(words) // 2]) for words in games_words]
    probabilities = next_move_probabilities(model, params, tokenizer, prefixes)
    for words, source, row in zip(games_words, prefixes, probabilities, strict=True):
        best = [f"{tokenizer.move_text(id)} {row[id]:.2f}" for id in np.argsort(-row)[:5].tolist()]
        yield {"source": source, "reference": words[len(words) // 2], "output": ", ".join(best)}
