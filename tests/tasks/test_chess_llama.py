"""The family ``chess_llama``: the board against the package ``chess``, documents, padding and states, and errors.

All tests of the family contract are in ``test_chess_llama_contract.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.data import MoveTokenizer
from jaxlm.data.games import chess_games, import_chess
from jaxlm.decoding import GREEDY, GenerationConfig, generate_text, perplexity, stream_text
from jaxlm.tasks.chess_llama import INITIAL_BOARD, SIDE_TO_MOVE, boards_after, embed_boards
from jaxlm.tasks.chess_players import ModelPlayer, RandomPlayer, play_match
from jaxlm.tasks.chess_reading import next_move_probabilities, pad_games
from jaxlm.tasks.chess_training import game_batches
from jaxlm.tasks.text_generation import check_family
from jaxlm.tasks.text_requests import TextRequests
from jaxlm.testing.contract import (  # noqa: F401
    pytest_generate_tests,
    test_a_prefix_branches_and_each_branch_rolls_back,
    test_cached_equals_full_at_every_position,
    test_packed_documents_equal_separate_documents,
    test_padding_does_not_change_the_other_positions,
)
from jaxlm.testing.helpers import add_noise, initial_params

FAMILIES = ("chess_llama",)
TOKENIZER = MoveTokenizer("uci")


def entries_of(board):
    """The board entries of a ``chess.Board``."""
    pieces = [board.piece_at(square) for square in range(64)]
    squares = [0 if piece is None else piece.piece_type + 6 * (not piece.color) for piece in pieces]
    return np.array([*squares, not board.turn], np.int8)


def boards_of_line(line):
    board, boards = import_chess().Board(), []
    for word in line.split():
        board.push_uci(word)
        boards.append(entries_of(board))
    return np.stack(boards)


# En passant and castling of both sides, both kinds of castling, and promotions.
SPECIAL_MOVES = (
    "e2e4 a7a6 e4e5 d7d5 e5d6 g8f6 g1f3 g7g6 f1e2 f8g7 e1g1 b8c6 d6c7 c8e6 c7d8n a8d8",
    "d2d4 e7e5 c1f4 e5d4 b1c3 d4c3 d1d7 e8d7 e1c1 d7e7 h2h3 c3b2 c1b1 a7a6",
    "a2a3 d7d5 a3a4 d5d4 c2c4 d4c3 a4a5 g8f6 a5a6 g7g6 h2h3 f8g7 h3h4 e8g8 h4h5 c3b2 h5g6 b2a1q",
)


@pytest.mark.thorough
def test_boards_equal_the_boards_of_the_chess_package():
    lines = [*SPECIAL_MOVES, *chess_games("uci").moves[:40]]
    rows = [TOKENIZER.encode(line) for line in lines]
    tokens, segment_ids = pad_games(rows, len(rows), max(map(len, rows)))
    boards = np.asarray(jax.jit(boards_after)(tokens, keep_BT=jnp.asarray(segment_ids) > 0))
    for line, row in zip(lines, boards, strict=True):
        expected = boards_of_line(line)
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert np.all(row[len(expected) :] == expected[-1])  # padding does not change the board


def test_special_tokens_keep_the_board_and_a_move_of_an_empty_square_moves_nothing():
    e4, empty = TOKENIZER.encode("e2e4 e2e4")
    tokens = jnp.asarray([[TOKENIZER.bos_id, e4, TOKENIZER.eos_id, empty, TOKENIZER.vocab_size]])
    start, after, end, moved, outside = np.asarray(boards_after(tokens))[0]
    np.testing.assert_array_equal(start, INITIAL_BOARD)
    np.testing.assert_array_equal(after, boards_of_line("e2e4")[0])
    np.testing.assert_array_equal(end, after)
    assert moved[12] == moved[28] == 0  # e2 is empty, so the move empties e4
    assert (after[SIDE_TO_MOVE], moved[SIDE_TO_MOVE]) == (1, 0)
    np.testing.assert_array_equal(outside, moved)


def test_embed_boards_sums_the_rows_of_the_pieces():
    table = jax.random.normal(jax.random.key(0), (64 * 2 * 12, 8))
    boards = np.stack([INITIAL_BOARD, boards_of_line("e2e4")[0]])[None]
    vectors = embed_boards(table, jnp.asarray(boards))
    rows = np.asarray(table).reshape(64, 2, 12, 8)
    for vector, board in zip(vectors[0], boards[0], strict=True):
        expected = sum(rows[square, board[SIDE_TO_MOVE], board[square] - 1] for square in range(64) if board[square])
        np.testing.assert_allclose(vector, expected, rtol=1e-5, atol=1e-5)


def test_the_hidden_state_depends_on_the_board():
    """The gradient reaches exactly the rows of the pieces on the boards."""
    model = jaxlm.get_model("chess-llama-tiny", vocab_size=TOKENIZER.vocab_size)
    params = initial_params(model)
    tokens = jnp.asarray(TOKENIZER.encode_inputs("e2e4 e7e5 g1f3").ids)[None]
    gradient = jax.jit(jax.grad(lambda params: model.apply(params, tokens)[0][0, -1].sum()))(params)["board_embedding"]
    boards = [INITIAL_BOARD, *boards_of_line("e2e4 e7e5 g1f3")]
    used = {
        (int(square) * 2 + int(board[SIDE_TO_MOVE])) * 12 + int(board[square]) - 1
        for board in boards
        for square in np.flatnonzero(board[:SIDE_TO_MOVE])
    }
    assert set(np.flatnonzero(np.any(np.asarray(gradient) != 0, axis=1)).tolist()) == used


def test_the_player_gives_the_same_moves_as_whole_games():
    """``ModelPlayer`` reads one move at a time, ``next_move_probabilities`` reads whole games."""
    model = jaxlm.get_model("chess-llama-tiny", vocab_size=TOKENIZER.vocab_size)
    params = add_noise(initial_params(model))
    match = play_match(ModelPlayer(model, params, TOKENIZER), RandomPlayer(), games=2, max_moves=24)
    for number, line in enumerate(match.games.moves):
        words = line.split()
        prefixes = [" ".join(words[:index]) for index in range(number % 2, len(words), 2)]
        best = next_move_probabilities(model, params, TOKENIZER, prefixes, legal_only=True).argmax(axis=1)
        assert [TOKENIZER.move_text(id) for id in best.tolist()] == words[number % 2 :: 2]


def one_window():
    """A model with 12 positions, and its parameters. No parameter depends on the number of positions."""
    model = jaxlm.get_model("chess-llama-tiny", vocab_size=TOKENIZER.vocab_size)
    return model.with_fields(max_positions=12), add_noise(initial_params(model))


LINE = SPECIAL_MOVES[1].split()[:9]


@pytest.mark.thorough
def test_texts_that_fit_alone_are_generated_alone():
    """The prompts have 7 and 9 tokens. The model reads 12 tokens of each text, but a batch would need a new window."""
    config = GenerationConfig(max_length=13, sampling=GREEDY, end_ids=())
    prompts = [TOKENIZER.encode(" ".join(LINE[:n])) for n in (7, 9)]
    model, params = one_window()
    texts = generate_text(model, params, TOKENIZER, prompts, config)
    rows = np.stack([np.append(ids, TOKENIZER.encode(text)) for ids, text in zip(prompts, texts, strict=True)])
    logits = jax.jit(lambda tokens: model.logits(params, model.apply(params, tokens)[0]))(rows[:, :-1])
    best = np.asarray(logits)[..., : TOKENIZER.vocab_size].argmax(axis=-1)
    for ids, row, row_best in zip(prompts, rows, best, strict=True):
        assert row_best[ids.size - 1 :].tolist() == row[ids.size :].tolist()


def test_generation_stops_with_an_error_when_the_window_is_full():
    model, params = one_window()
    stream = stream_text(
        model, params, TOKENIZER, " ".join(LINE[:2]), GenerationConfig(20, GREEDY, end_ids=(TOKENIZER.eos_id,))
    )
    pieces = []
    with pytest.raises(ValueError, match="prompt 0: the model must read 13 tokens .* max_positions=12. chess_"):
        pieces += iter(stream)
    assert TOKENIZER.encode("".join(pieces)).size == 11


def requests_of(max_length):
    return TextRequests(*one_window(), TOKENIZER, max_length=max_length)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: generate_text(
                *one_window(), TOKENIZER, [LINE[0], " ".join(LINE[:2])], GenerationConfig(12, GREEDY, end_ids=())
            ),
            "prompt 1: the model must read 13 tokens .* max_positions=12. chess_llama cannot continue in a new window, "
            "because it must read a text from its first token. Reduce the number of new tokens. .*with_fields",
        ),
        (
            lambda: perplexity(*one_window(), TOKENIZER.encode(" ".join(LINE)), window=8, stride=4),
            "9 tokens need several windows of window=8 tokens, but chess_llama must read a text from its first token: "
            "set window=9, which needs max_positions of at least 8",
        ),
        (
            lambda: requests_of(4).rolling_log_likelihoods(["", " ".join(LINE)]),
            "text 1 has .* tokens, but max_length=4 has space for 4, and chess_llama must .* set a larger max_length",
        ),
        (
            lambda: requests_of(4).log_likelihoods([(LINE[0], f" {LINE[1]}"), (" ".join(LINE[:5]), f" {LINE[5]}")]),
            "the context of request 1 has .* tokens, but max_length=4 has space for 4, and chess_llama must",
        ),
        (
            lambda: requests_of(12).generate([(" ".join(LINE[:5]), {"max_gen_toks": 8})]),
            "the context of request 0 has .* tokens, but max_length=12 has space for 4, and chess_llama must",
        ),
        (lambda: check_family(one_window()[0]), "chess_llama must read a text from its first token, but training"),
    ],
)
def test_a_later_window_of_a_text_raises_before_compilation(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_tokenizer_raises():
    model = jaxlm.get_model("chess_llama")
    for tokenizer in (MoveTokenizer("san", ["e4", "e5"]), MoveTokenizer("uci", ["e2e4", "e7e5"])):
        with pytest.raises(ValueError, match="chess_llama computes the board from the ids of MoveTokenizer.'uci'."):
            game_batches(model, tokenizer, ["e4 e5"], 1, 8)
