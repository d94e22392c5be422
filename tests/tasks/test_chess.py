"""Chess: legal moves, incremental reading of moves, and metrics.

The tests compare with brute force, with forward passes over complete games, and with a fake model.
"""

from __future__ import annotations

import functools
from typing import Any

import chess
import jax
import numpy as np
import pytest

from jaxlm.data.games import chess_games, to_uci
from jaxlm.data.moves import MoveTokenizer
from jaxlm.decoding import decoder_start_id
from jaxlm.tasks import chess_reading
from jaxlm.tasks.chess import (
    LegalMoves,
    MoveReader,
    board_after,
    legal_move_rate,
    mate_in_one_accuracy,
    mates_in_one,
    next_move_accuracy,
    next_move_probabilities,
)
from jaxlm.tasks.chess_reading import choose_ids
from jaxlm.testing.helpers import add_noise, initial_params, tiny_model
from tests.tasks.oracle import Oracle, oracle

UCI = MoveTokenizer("uci")
FOOL = "f2f3 e7e5 g2g4 d8h4"
SCHOLAR = "e2e4 e7e5 d1h5 b8c6 f1c4 g8f6 h5f7"
FAMILIES = ("gpt2-tiny", "lstm-tiny", "t5-tiny", "attention_rnn")


@functools.cache
def games(notation: str = "uci") -> tuple[str, ...]:
    lines = chess_games("san").moves[:40]
    return lines if notation == "san" else tuple(map(to_uci, lines))


@functools.cache
def model_and_params(name: str, vocab_size: int = UCI.vocab_size) -> tuple[Any, Any]:
    sizes = {"max_positions": 64} if name == "gpt2-tiny" else {}
    model = tiny_model(name, vocab_size=vocab_size, **sizes)
    return model, add_noise(initial_params(model))


def prefixes(count: int, max_length: int = 40) -> list[str]:
    """Return beginnings of the included games, with random lengths."""
    lengths = np.random.default_rng(0).integers(0, max_length, count)
    return [" ".join(line.split()[:length]) for line, length in zip(games(), lengths, strict=False)]


# --------------------------------------------------------------------------------------------- legal moves


@pytest.mark.parametrize("notation", ["uci", "san"])
def test_the_legal_mask_is_correct_for_every_move_of_the_vocabulary(notation: str) -> None:
    tokenizer = MoveTokenizer.from_games(games(notation), notation)  # type: ignore[arg-type]
    legal = LegalMoves(tokenizer)
    castling = "4k2r/P6P/8/8/8/8/8/R3K2R w KQk - 0 1"
    boards = [*(board_after(line) for line in prefixes(8)), board_after(FOOL), chess.Board(castling)]
    mask = legal.mask(boards)
    for board, row in zip(boards, mask, strict=True):
        names = {m.uci() if notation == "uci" else board.san(m).rstrip("+#"): m for m in board.legal_moves}
        expected = [move in names for move in tokenizer.moves]
        assert row.tolist() == [False] * tokenizer.first_move_id + expected
        for id in (*np.flatnonzero(row).tolist(), *range(tokenizer.first_move_id + 40)):
            move = legal.move(board, id)
            if row[id]:
                assert move == names[tokenizer.move_text(id)]
            elif notation == "uci" or id < tokenizer.first_move_id:
                assert move is None
    assert mask[-2].sum() == 0, "no move is legal after checkmate"


def test_san_moves_with_unnecessary_origin_are_legal_and_ambiguous_moves_are_not() -> None:
    legal = LegalMoves(MoveTokenizer("san", ["Nbc3", "Nd2"]))
    assert legal.move(chess.Board(), 4) == chess.Move.from_uci("b1c3")
    assert legal.ids(chess.Board()) == {}
    assert legal.move(board_after("d4 d5 Nf3 Nf6"), 5) is None


def test_a_san_move_with_a_wrong_capture_sign_is_illegal() -> None:
    tokenizer = MoveTokenizer("san", ["Nf3", "Nxf3", "exd6", "d6"])
    legal = LegalMoves(tokenizer)
    knight, en_passant = chess.Move.from_uci("g1f3"), chess.Move.from_uci("e5d6")
    for line, expected in (
        ("", [knight, None, None, None]),
        ("f3 e5 e3 e4 a3 exf3", [None, knight, None, None]),
        ("e4 a6 e5 d5", [knight, None, en_passant, None]),
    ):
        assert [legal.move(board_after(line), tokenizer.move_id(move) or 0) for move in tokenizer.moves] == expected


def test_castling_has_one_text_in_uci() -> None:
    castling = chess.Board("4k2r/P6P/8/8/8/8/8/R3K2R w KQk - 0 1")
    legal_uci = LegalMoves(UCI)
    for text, is_legal in (("e1g1", True), ("e1c1", True), ("e1h1", False), ("e1a1", False)):
        assert (legal_uci.move(castling, UCI.encode(text)[0]) is not None) == is_legal, text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("e4 e5 Ke3", "illegal"),
        ("e4 --", "'--' is a null move"),
        ("e2e4 e7e6 0000", "'0000' is a null move"),
        ("e4 e5 what", "invalid"),
    ],
)
def test_a_board_refuses_moves_that_are_not_legal(line, message):
    with pytest.raises(ValueError, match=message):
        board_after(line)


# -------------------------------------------------------------------------------------------- probabilities


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAMILIES)
def test_probabilities_do_not_depend_on_the_batch(name: str) -> None:
    model, params = model_and_params(name)
    lines = ["", "e2e4", *prefixes(5)]
    probabilities = next_move_probabilities(model, params, UCI, lines, batch_size=4)
    assert probabilities.shape == (7, UCI.vocab_size)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    tokens = np.array([[1, *UCI.encode(lines[3])]], np.int32)
    inputs = {"source": tokens} if model.reads_source else {}
    decoder_input = np.full((1, 1), decoder_start_id(model, UCI)) if model.reads_source else tokens
    logits = jax.jit(lambda params: model.logits(params, model.apply(params, decoder_input, **inputs)[0]))(params)
    expected = jax.nn.softmax(logits[0, -1, : UCI.vocab_size])
    np.testing.assert_allclose(probabilities[3], expected, rtol=2e-3, atol=1e-7)


def test_legal_only_renormalises_the_probabilities() -> None:
    model, params = model_and_params("lstm-tiny")
    lines = ["", *prefixes(4)]
    probabilities = next_move_probabilities(model, params, UCI, lines)
    legal = next_move_probabilities(model, params, UCI, lines, legal_only=True)
    mask = LegalMoves(UCI).mask([board_after(line) for line in lines])
    np.testing.assert_allclose(
        legal, probabilities * mask / (probabilities * mask).sum(axis=1, keepdims=True), rtol=1e-4
    )
    assert (legal[~mask] == 0).all()
    with pytest.raises(ValueError, match="the vocabulary has no legal move after 'f2f3 e7e5 g2g4 d8h4'"):
        next_move_probabilities(model, params, UCI, [FOOL], legal_only=True)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", FAMILIES)
def test_incremental_reading_equals_reading_the_complete_game(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chess_reading, "MIN_CAPACITY", 8)  # so that the state must grow
    model, params = model_and_params(name)
    reader = MoveReader(model, params, UCI)
    lines = [line.split() for line in games()[:5]]
    boards = [chess.Board() for _ in lines]
    rows = list(range(5))

    def check() -> None:
        logits = reader.logits([boards[row] for row in rows])
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        so_far = [" ".join(move.uci() for move in boards[row].move_stack) for row in rows]
        expected = next_move_probabilities(model, params, UCI, so_far)
        np.testing.assert_allclose(weights / weights.sum(axis=1, keepdims=True), expected, rtol=2e-3, atol=1e-7)

    for ply in range(36):
        if ply == 4:
            rows.remove(1)  # a game ended
        if ply == 8:
            rows.remove(4)
        if ply % 9 == 0 or ply in (1, 5):
            check()
            check()  # again, without new moves
        if ply == 10:
            boards[3].pop()  # a move is taken back
            check()
            boards[3].push_uci(lines[3][ply - 1])
        for row in rows:
            boards[row].push_uci(lines[row][ply])


def test_a_game_that_returns_after_a_new_state_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chess_reading, "MIN_CAPACITY", 8)
    line = games()[0].split()
    reader = MoveReader(*oracle(UCI, games()[:1]), UCI)
    first, second = chess.Board(), board_after(" ".join(line[:3]))
    reader.logits([first, second])
    for move in line[:20]:  # the state grows while the second game is missing
        first.push_uci(move)
        reader.logits([first])
    second.push_uci(line[3])
    assert reader.logits([first, second])[1].argmax() == UCI.move_id(line[4])


def test_a_reader_reads_each_move_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    original = MoveReader._read
    monkeypatch.setattr(
        MoveReader, "_read", lambda self, new, count: (counts.append(count), original(self, new, count))
    )
    line = games()[0].split()
    reader = MoveReader(*oracle(UCI, games()[:1]), UCI)
    boards = [chess.Board() for _ in range(3)]
    for ply in range(6):
        assert reader.logits(boards).argmax(axis=1).tolist() == [UCI.move_id(line[ply])] * 3
        for board in boards:
            board.push_uci(line[ply])
    assert counts == [1] * 6
    reader.logits([chess.Board()] * 3)
    with pytest.raises(ValueError, match="board 2 begins at '4k3/8"):
        reader.logits([chess.Board(), chess.Board(), chess.Board("4k3/8/8/8/8/8/8/4K3 w - - 0 1")])
    few_moves = MoveReader(*oracle(UCI, games()[:1]), MoveTokenizer("uci", sorted({*line[1:]} - {line[0]})))
    with pytest.raises(ValueError, match=f"the vocabulary has no move '{line[0]}': use a tokenizer with all moves"):
        few_moves.logits([board_after(line[0])])


def test_a_reader_can_be_used_after_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    reader = MoveReader(*oracle(UCI, [SCHOLAR]), UCI)
    reader.logits([chess.Board()])
    board = board_after("e2e4")
    with monkeypatch.context() as patch:
        patch.setattr(MoveReader, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reader.logits([board])
    assert int(reader.logits([board]).argmax()) == UCI.move_id("e7e5")


@pytest.mark.thorough
def test_sources_are_read_in_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()
    original = chess_reading._last_logits
    monkeypatch.setattr(
        chess_reading, "_last_logits", lambda *a, **options: (shapes.add(a[2].shape), original(*a, **options))[1]
    )
    reader = MoveReader(*model_and_params("t5-tiny"), UCI)
    for count in (7, 6, 5):
        assert reader.logits([chess.Board()] * count).shape == (count, UCI.vocab_size)
    assert shapes == {(8, 32)}


def test_a_move_outside_the_san_vocabulary_is_read_as_unknown() -> None:
    tokenizer = MoveTokenizer("san", ["e4", "e5"])
    model, params = oracle(tokenizer, ["e4 d5 e5"])
    assert int(MoveReader(model, params, tokenizer).logits([board_after("e4 d5")]).argmax()) == 5
    assert int(MoveReader(model, params, tokenizer).logits([board_after("e4 a6")]).argmax()) == 5
    assert next_move_accuracy(model, params, tokenizer, ["e4 d5 e5"]).top_1.value == 2 / 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: MoveReader(*model_and_params("bert-tiny"), UCI),
            ValueError,
            "it does not predict moves; load a language model",
        ),
        (
            lambda: MoveReader(*model_and_params("gpt2-tiny", 100), UCI),
            ValueError,
            "1971 tokens, but the model has vocab_size=100",
        ),
        (lambda: MoveReader(*model_and_params("gpt2-tiny"), "uci"), TypeError, "needs a MoveTokenizer, got a str"),
        (lambda: MoveReader(*model_and_params("lstm-tiny"), UCI).logits([]), ValueError, "at least one board"),
        (
            lambda: MoveReader(*model_and_params("lstm-tiny"), UCI).logits(
                [chess.Board("4k3/8/8/8/8/8/8/4K3 w - - 0 1")]
            ),
            ValueError,
            "board 0 begins at '4k3/8",
        ),
        (
            lambda: MoveReader(*model_and_params("gpt2-tiny"), UCI).logits([board_after("g1f3 g8f6 f3g1 f6g8 " * 16)]),
            ValueError,
            "a game of 64 moves needs 65 positions, but the model has max_positions=64",
        ),
        (
            lambda: next_move_accuracy(*model_and_params("gpt2-tiny"), UCI, [FOOL, "g1f3 g8f6 f3g1 f6g8 " * 17]),
            ValueError,
            "1 of 2 games need more positions than the model's max_positions=64, first game 1, which needs 68",
        ),
        (lambda: next_move_accuracy(*model_and_params("lstm-tiny"), UCI, [""]), ValueError, "at least one move each"),
        (lambda: next_move_accuracy(*model_and_params("lstm-tiny"), UCI, FOOL), TypeError, "games must be a sequence"),
        (
            lambda: next_move_accuracy(*model_and_params("lstm-tiny"), UCI, [FOOL], batch_size=-1),
            ValueError,
            "batch_size=-1 must be at least 1",
        ),
        (
            lambda: mate_in_one_accuracy(*model_and_params("lstm-tiny"), UCI, [FOOL], batch_size=0),
            ValueError,
            "batch_size=0 must be at least 1",
        ),
        (
            lambda: next_move_probabilities(*model_and_params("lstm-tiny"), UCI, []),
            ValueError,
            "games_so_far is empty: give at least one line",
        ),
        (
            lambda: next_move_probabilities(*model_and_params("lstm-tiny"), UCI, "e2e4"),
            TypeError,
            r"games_so_far must be a sequence of strings, got one string: pass \['e2e4'\]",
        ),
        (
            lambda: legal_move_rate(*model_and_params("lstm-tiny"), UCI, games=0),
            ValueError,
            "games=0 must be at least 1",
        ),
        (lambda: legal_move_rate(*model_and_params("gpt2-tiny"), UCI, max_moves=65), ValueError, "max_positions=64"),
        (lambda: mates_in_one("e2e4"), TypeError, r"games must be .* strings, got one string: pass \['e2e4'\]"),
        (lambda: mate_in_one_accuracy(*model_and_params("lstm-tiny"), UCI, []), ValueError, "positions is empty"),
        (
            lambda: mate_in_one_accuracy(*model_and_params("lstm-tiny"), UCI, ["e2e4"]),
            ValueError,
            "no mate in one after 'e2e4'",
        ),
        (lambda: choose_ids(np.zeros((1, 3)), -1.0, np.random.default_rng(0)), ValueError, "temperature=-1.0 must be"),
        (lambda: choose_ids(np.zeros((1, 3)), 1e-45, np.random.default_rng(0)), ValueError, "1e-45 is too small"),
    ],
)  # fmt: skip
def test_invalid_input_raises_an_error(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_choose_ids_samples_with_the_temperature() -> None:
    logits, rng = np.log(np.array([[0.1, 0.6, 0.3]])), np.random.default_rng(0)
    assert choose_ids(logits, 0.0, rng).tolist() == [1]
    samples = choose_ids(np.repeat(logits, 4000, axis=0), 1.0, rng)
    np.testing.assert_allclose(np.bincount(samples) / 4000, [0.1, 0.6, 0.3], atol=0.03)
    assert set(choose_ids(np.repeat([[0.0, -np.inf, 0.0]], 50, axis=0), 1.0, rng)) == {0, 2}


# -------------------------------------------------------------------------------------------------- metrics


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gpt2-tiny", "t5-tiny"])
def test_next_move_accuracy_equals_a_loop_over_positions(name: str) -> None:
    model, params = model_and_params(name)
    lines = [" ".join(line.split()[:length]) for line, length in zip(games(), (9, 4, 14), strict=False)]
    hits = np.zeros(3, int)
    for line in lines:
        words = line.split()
        so_far = [" ".join(words[:ply]) for ply in range(len(words))]
        for before, word, row in zip(so_far, words, next_move_probabilities(model, params, UCI, so_far), strict=True):
            order, true = np.argsort(-row), UCI.encode(word)[0]
            best = UCI.move_text(order[0])
            legal = best in {move.uci() for move in board_after(before).legal_moves}
            hits += [order[0] == true, true in order[:5], legal]
    result = next_move_accuracy(model, params, UCI, lines, batch_size=2)
    assert [score.count for score in (result.top_1, result.top_5, result.legal)] == [27] * 3
    np.testing.assert_allclose([result.top_1.value, result.top_5.value, result.legal.value], hits / 27)


def test_next_move_accuracy_of_an_oracle() -> None:
    known = games()[:4]
    model, params = oracle(UCI, known)
    result = next_move_accuracy(model, params, UCI, known)
    moves = [len(line.split()) for line in known]
    num_common = sum(len({tuple(line.split()[:ply]) for line in known}) < 4 for ply in range(30))
    assert num_common < 12
    assert result.legal.value == 1.0
    assert result.top_5.value == 1.0
    assert 1.0 - 12 / sum(moves) < result.top_1.value <= 1.0
    # The oracle knows only the first two moves of this game.
    unknown_game = next_move_accuracy(model, params, UCI, [f"{' '.join(known[0].split()[:2])} a2a3 a7a6"])
    assert unknown_game.top_5.value == 0.5
    assert unknown_game.top_1.low <= unknown_game.top_1.value <= unknown_game.top_1.high


def test_legal_move_rate_counts_up_to_the_first_illegal_move() -> None:
    def rate(line: str, *, end: bool = True, max_moves: int = 20) -> Any:
        model, params = oracle(UCI, [line], end=end)
        return legal_move_rate(model, params, UCI, games=3, max_moves=max_moves, temperature=0.0)

    complete = rate(SCHOLAR)
    assert (complete.moves.value, complete.games.value, complete.lines) == (1.0, 1.0, (SCHOLAR,) * 3)
    illegal = rate("e2e4 e7e5 e2e4 e7e5")
    assert illegal.moves.value == pytest.approx(2 / 3)
    assert illegal.moves.count == 9
    assert (illegal.games.value, illegal.lines[0]) == (0.0, "e2e4 e7e5")
    assert rate(f"{FOOL} a2a3").moves.value == pytest.approx(4 / 5), "a move after checkmate is illegal"
    assert rate("e2e4", end=False).moves.value == pytest.approx(1 / 2), "padding is not a move"
    assert rate(SCHOLAR, max_moves=3).lines[0] == "e2e4 e7e5 d1h5"
    assert (rate("").moves.value, rate("").moves.count, rate("").games.value) == (0.0, 0, 1.0)


def test_sampled_games_follow_the_seed() -> None:
    model, params = oracle(UCI, ["e2e4 e7e5", "d2d4 d7d5", "c2c4 c7c5", "g1f3 g8f6"])
    lines = [legal_move_rate(model, params, UCI, games=4, max_moves=6, seed=seed).lines for seed in (1, 1, 2)]
    assert lines[0] == lines[1]
    assert lines[0] != lines[2]


def test_mates_in_one_equal_the_moves_that_san_marks() -> None:
    lines = [SCHOLAR, FOOL, *games()[:3]]
    expected = []
    for line in lines:
        board = chess.Board()
        for ply, move in enumerate(line.split()):
            if any(board.san(legal).endswith("#") for legal in board.legal_moves):
                expected.append(" ".join(line.split()[:ply]))
            board.push_uci(move)
    assert mates_in_one(lines) == expected
    assert {SCHOLAR.rsplit(" ", 1)[0], FOOL.rsplit(" ", 1)[0]} <= set(expected)


def test_mate_in_one_accuracy_of_oracles() -> None:
    positions = mates_in_one([SCHOLAR, FOOL])
    assert len(positions) == 2
    both_known = mate_in_one_accuracy(*oracle(UCI, [SCHOLAR, FOOL]), UCI, positions)
    one_known = mate_in_one_accuracy(*oracle(UCI, [SCHOLAR, f"{positions[1]} a7a6"]), UCI, positions)
    # Illegal moves are masked, so the best legal move counts.
    assert (both_known.value, one_known.value, both_known.count) == (1.0, 0.5, 2)


def test_a_position_without_a_legal_move_in_the_vocabulary_is_not_solved() -> None:
    positions = ["e4 e5 Qh5 Nc6 Bc4 Nf6", "f3 e5 g4"]
    for move, value in (("Qxf7", 0.5), ("O-O", 0.0)):  # legal in the first position; legal in no position
        tokenizer = MoveTokenizer("san", [move])
        accuracy = mate_in_one_accuracy(*oracle(tokenizer, [move]), tokenizer, positions)
        assert (accuracy.value, accuracy.count) == (value, 2)


def test_nan_parameters_raise_an_error() -> None:
    model, params = oracle(UCI, [FOOL])
    broken = {**params, "logits": params["logits"] * np.nan}
    assert next_move_accuracy(model, broken, UCI, [FOOL]).top_5.value == 0.0
    with pytest.raises(ValueError, match="logits are NaN"):
        next_move_probabilities(model, broken, UCI, [FOOL])
    with pytest.raises(ValueError, match="logits are NaN"):
        MoveReader(model, broken, UCI).logits([chess.Board()])


def test_the_oracle_can_be_used_as_a_model() -> None:
    model, params = oracle(UCI, [FOOL])
    assert isinstance(model, Oracle)
    probabilities = next_move_probabilities(model, params, UCI, [FOOL, "e2e4"])
    assert probabilities[0].argmax() == UCI.eos_id
    assert np.allclose(probabilities[1], 1 / UCI.vocab_size)
