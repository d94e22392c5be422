"""Train a model to predict chess moves from sequences of moves, and measure how well it plays.

    python -m experiments.chess                                        2,000 included games, Llama, 2.5 minutes
    python -m experiments.chess --preset full --data FILE              144,000 games, chess_llama, 100 minutes

The times are for one CPU core. FILE is a PGN file, or a file with one game per line (SAN or UCI moves). Our file
of 144,000 master games is not published. The family chess_llama is a Llama that computes the board from the moves. All
presets and results are in docs/tasks/chess.md.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from jaxlm import host, metrics
from jaxlm.command_line import end_process
from jaxlm.data import Batches, MoveTokenizer
from jaxlm.data.games import Games, Notation, chess_games, import_chess, read_games, split_games
from jaxlm.models import Model, get_model
from jaxlm.objectives import causal
from jaxlm.objectives.batch import token_accuracy
from jaxlm.tasks import chess
from jaxlm.tasks.chess_players import check_opening_moves, opponents
from jaxlm.tasks.chess_training import extra_games, game_batches, match_boards, write_test
from jaxlm.training import experiment as lib
from jaxlm.training.evaluation import Evaluator, first_epoch
from jaxlm.training.loop import Result, train
from jaxlm.training.optimizer import OptimizerConfig
from jaxlm.training.recipes import recipe
from jaxlm.training.report import Board, write_boards


@dataclasses.dataclass(frozen=True)
class TestSizes:
    """Sizes of the tests after training. 0 skips a test. In a match, the model plays its most probable legal move. Each
    match is played twice: without search, and with a search of one move (``jaxlm.tasks.chess.ModelPlayer``)."""

    games: int = 500
    """Test games whose moves are predicted."""
    mates: int = 3000
    """Test games that are searched for a mate in one (14 ms per game). About 1 % of the games have a mate in one."""
    sampled: int = 200
    """Games that are sampled from the model."""
    random: int = 200
    """Games against a player that plays random legal moves."""
    engine: int = 40
    """Games against Stockfish at skill level 0, if it is installed."""
    opening_moves: int = 4
    """Random moves at the start of a game against Stockfish. At most 200, and less than the maximum number of moves."""
    max_moves: int = 256
    """Maximum number of moves of a game, counting the moves of both players. A longer game is a draw. If the model
    has fewer positions (gpt, llama, chess_llama: training.sequence_length), their number is the maximum."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Train a model on chess games and test it."""

    model: lib.ModelConfig = lib.ModelConfig("llama")
    """The model: a causal family with a model state, or an encoder-decoder."""
    training: lib.ExperimentTraining = lib.ExperimentTraining()
    """The training. Games are packed into rows of sequence_length tokens. The rest of a longer game is not used. For
    encoder-decoders, a source has at most sequence_length tokens."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    tests: TestSizes = TestSizes()
    """The tests."""
    data: Path | None = None
    """File of games: .txt (one game per line) or .pgn, also with .gz; None: the included games."""
    notation: Notation = "san"
    """Move notation that the model reads. The file may have either notation."""
    max_games: int | None = None
    """Number of games to use, from the start of the file. None: all games."""
    extra_data: Path | None = None
    """File of games that are added to the training games, for example generated games. None: no games are added."""
    min_count: int = 5
    """With notation san: moves with fewer occurrences in the training games and extra_data become unknown tokens."""
    validation_fraction: float = 0.02
    """Fraction of the games for validation."""
    test_fraction: float = 0.05
    """Fraction of the games for the tests."""
    positions_per_game: int = 4
    """Encoder-decoders: number of positions at which each game is cut. The source is the game up to the position."""
    target_length: int = 8
    """Encoder-decoders: maximum number of tokens of a target, which has the moves after the position."""
    output: Path | None = None
    """Run directory; None: runs/chess-<time>."""


MUON = OptimizerConfig("muon", learning_rate=1e-2, warmup_steps=30, final_fraction=0.02, beta2=0.95)
ADAMW = OptimizerConfig(learning_rate=5e-3, warmup_steps=30, final_fraction=0.02, beta2=0.95)


def preset(name: str, *changes: str, optimizer: OptimizerConfig = MUON, **options: Any) -> Experiment:
    """An experiment with a small, randomly initialized model."""
    training = lib.ExperimentTraining(300, 8, sequence_length=256, evaluate_every=100, checkpoint_every=100)
    small = Experiment(lib.ModelConfig(name, changes), training, optimizer, TestSizes(50, 1000, 50, 20, 10))
    return dataclasses.replace(small, **options)


SMALL_TRANSFORMER = ("num_layers=4", "num_heads=4", "embed_dim=128", "remat=none")
PRESETS = {
    "llama": preset("llama", *SMALL_TRANSFORMER, "mlp_dim=352"),
    "gpt": preset("gpt2", *SMALL_TRANSFORMER, "embedding_dropout=0.0", "attention_dropout=0.0", "residual_dropout=0.0"),
    "chess_llama": preset("chess_llama", *SMALL_TRANSFORMER, "mlp_dim=352", notation="uci"),
    "lstm": preset(
        "lstm", "num_layers=2", "embed_dim=128", "hidden_dim=256", "weight_dropout=0.0", "input_dropout=0.0",
        "hidden_dropout=0.0", "output_dropout=0.0", optimizer=ADAMW,
    ),
    "transformer_xl": preset(
        "transformer-xl-base", *SMALL_TRANSFORMER, "head_dim=32", "token_dim=128", "mlp_dim=512", "cutoffs=()",
        "memory_length=256", "embedding_divisor=1", "dropout=0.0",
    ),
    "attention_rnn_lm": preset("attention_rnn_lm", "embed_dim=128", "hidden_dim=256", "dropout=0.0", optimizer=ADAMW),
    "t5": preset(
        "t5", "num_layers=2", "num_heads=4", "embed_dim=128", "head_dim=32", "mlp_dim=512", "dropout=0.0",
        optimizer=recipe("t5"), tests=TestSizes(10, 1000, 20, 10, 4),
    ),
    "full": preset(
        "chess_llama", "num_layers=8", "num_heads=4", "embed_dim=128", "mlp_dim=352", "remat=none",
        training=lib.ExperimentTraining(5900, 16, sequence_length=256, evaluate_every=300, checkpoint_every=300),
        optimizer=dataclasses.replace(MUON, warmup_steps=100), validation_fraction=0.005, test_fraction=0.02,
        notation="uci", tests=TestSizes(),
    ),
}  # fmt: skip


def read(experiment: Experiment) -> Games:
    """The first ``max_games`` games of the file ``data`` or, if it is None, of the included games."""
    start_time = time.perf_counter()
    path, notation = experiment.data, experiment.notation
    if path is not None:
        lib.print_once(f"reading {path}: about 1 ms per game on one core")
    games = chess_games(notation) if path is None else read_games(path, notation)
    lib.print_once(f"{games.report()}, read in {time.perf_counter() - start_time:.0f} s")
    count = len(games) if experiment.max_games is None else experiment.max_games
    if not 1 <= count <= len(games):
        raise ValueError(f"max_games={count} must be from 1 to {len(games):,}, the number of games")
    return games.select(range(count))


def build(experiment: Experiment, games: Sequence[str], resume: Path | None) -> tuple[Model, Any, MoveTokenizer]:
    """The model, its initial parameters (None: random), and the tokenizer. ``games`` determine the SAN vocabulary."""
    tokenizer = experiment.model.tokenizer(
        resume, lambda: MoveTokenizer.from_games(games, experiment.notation, min_count=experiment.min_count)
    )
    fields = {"vocab_size": tokenizer.vocab_size}
    if get_model(experiment.model.name).family in ("gpt", "llama", "chess_llama"):
        fields["max_positions"] = experiment.training.sequence_length
    return *experiment.model.build(experiment.training.seed, fields), cast(MoveTokenizer, tokenizer)


def run(experiment: Experiment, resume: Path | None = None) -> Result:
    """Train and test a model, and write the report. Returns the result of training."""
    start_time, config = time.perf_counter(), experiment.training
    import_chess()
    fields = ["data", "notation", "max_games", "extra_data", "min_count", "validation_fraction", "test_fraction"]
    lib.check_unchanged(experiment, resume, ["output", "training.evaluation_batches", *fields])
    games = read(experiment)
    training, validation, test = split_games(games, experiment.validation_fraction, experiment.test_fraction)
    held_out = {*validation.moves, *test.moves}
    extra = extra_games(experiment.extra_data, experiment.notation, held_out, report=lib.print_once)
    model, params, tokenizer = build(experiment, training.moves + extra, resume)
    (source, to_batch, description), (validation_source, _, _) = (
        game_batches(
            model, tokenizer, part, config.batch_size, config.sequence_length,
            positions_per_game=experiment.positions_per_game, target_length=experiment.target_length, seed=config.seed,
        )
        for part in (training.moves + extra, validation.moves)
    )  # fmt: skip
    trainer = config.trainer(model, experiment.optimizer, causal.training_loss(model))
    evaluate = Evaluator(
        model, {"loss": causal.evaluation_loss(model), "token_accuracy": token_accuracy},
        first_epoch(Batches(validation_source, to_batch=to_batch), config.evaluation_batches),
    )  # fmt: skip
    max_moves(experiment.tests, model)  # raises an error before the training
    directory = lib.prepare_run("chess", experiment, resume, trainer, tokenizer, evaluate)
    lib.print_once(
        f"{model.num_parameters:,} parameters · {tokenizer.vocab_size:,} tokens · {len(training):,} games, "
        f"{len(extra):,} extra, {len(validation):,} for validation, {len(test):,} for the tests · "
        f"{description} · {source.rows_per_epoch:,} rows per epoch · {directory}"
    )
    data = Batches(source, to_batch=to_batch, prefetch=2)
    result = train(trainer, data, evaluate, config, lib.make_run(directory, experiment, resume), params)
    if lib.export(directory, model, result, tokenizer):
        _report(directory, experiment, model, result, tokenizer, test, start_time)
    return result


def max_moves(tests: TestSizes, model: Model) -> int:
    """The maximum number of moves of a game. Raises ``ValueError`` if the openings against Stockfish are too long."""
    limit = tests.max_moves if model.max_positions is None else min(tests.max_moves, model.max_positions)
    if tests.engine:
        check_opening_moves("tests.opening_moves", tests.opening_moves, limit)
    return limit


def _report(
    directory: Path, experiment: Experiment, model: Model, result: Result, tokenizer: MoveTokenizer, test: Games,
    start_time: float,
) -> None:  # fmt: skip
    """Run the tests and write the report."""
    tests, scores, boards, rate = experiment.tests, list[metrics.Score](), list[Board](), None
    trained_model, limit = (model, result.params, tokenizer), model.max_positions
    short_games = [line for line in test.moves if limit is None or len(line.split()) < limit]
    if len(short_games) < len(test):
        lib.print_once(f"{len(test) - len(short_games)} test games are skipped: they have {limit} or more moves")
    if lines := short_games[: tests.games]:
        started = time.perf_counter()
        moves = chess.next_move_accuracy(*trained_model, lines)
        rate = round(len(lines) / (time.perf_counter() - started), 1)
        scores += [moves.top_1, moves.top_5, moves.legal]
        write_test(directory, *trained_model, lines, target_length=experiment.target_length)
    if positions := chess.mates_in_one(short_games[: tests.mates]):
        scores.append(chess.mate_in_one_accuracy(*trained_model, positions))
    elif tests.mates:
        lib.print_once("none of the searched test games has a mate in one: this test is skipped")
    longest = max_moves(tests, model)
    if tests.sampled:
        sampled = chess.legal_move_rate(*trained_model, games=tests.sampled, max_moves=longest)
        scores += [sampled.moves, sampled.games]
    counts = {"random": tests.random, "engine": tests.engine, "opening_moves": tests.opening_moves}
    for name, opponent, games, num_opening_moves in opponents(**counts, report=lib.print_once):
        for search in (False, True):
            player = chess.ModelPlayer(*trained_model, search=search)
            match = chess.play_match(player, opponent, games, max_moves=longest, opening_moves=num_opening_moves)
            match_name = name + ", with search" * search
            lib.print_once(f"against {match_name}: {match}")
            scores += match.scores(match_name)
            boards += match_boards(match_name, match)
    write_boards(directory, boards)
    lib.report(
        directory, task="chess", model=model, start_time=start_time, scores=scores, result=result,
        data=str(experiment.data or "included games"), notation=experiment.notation, test_games_per_second=rate,
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    return lib.command_line(PRESETS["llama"], PRESETS, run, name="chess", description=f"{__doc__}", arguments=arguments)


if __name__ == "__main__":
    host.keep_freed_memory()
    end_process(main())
