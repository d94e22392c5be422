"""A Llama that reads the chess board: a family for sequences of UCI moves.

The vector of a move is its token embedding plus an embedding of the board after the move. The blocks are those of
``jaxlm.models.llama``. The model computes the boards from the moves, so its inputs are the same as those of a Llama,
and it does not have to learn where the pieces are. It does not know which moves are legal: it must learn this.

The model state has the board after each token in the cache. A move changes the board. Padding and other tokens that are
not moves do not change the board. Before the first token of a document, the board is reset to the initial board.

Shapes: B batch, T time, D model width, E entries of a board (64 squares, then the side to move), S squares, R rows of
the table of board embeddings, K rows of this table for one square (side to move and piece).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlm.data.moves import MoveTokenizer
from jaxlm.models import common, llama
from jaxlm.nn.attention import cache
from jaxlm.nn.experts import RouterStatistics
from jaxlm.nn.segments import segment_boundaries
from jaxlm.sharding import constrain, gather_sharding
from jaxlm.spec import ArraySpec, Normal, Params, State

PIECE_KINDS = "pnbrqk"
"""The kinds of pieces. A white piece has the value 1 + its index, a black piece 7 + its index, an empty square 0."""
PAWN, KING = PIECE_KINDS.index("p"), PIECE_KINDS.index("k")
SIDE_TO_MOVE = 64
"""Index of the board entry that is 0 if white has the next move and 1 if black has it."""

_BACK_RANK = [1 + PIECE_KINDS.index(kind) for kind in "rnbqkbnr"]
INITIAL_BOARD = np.array(
    _BACK_RANK + [1 + PAWN] * 8 + [0] * 32 + [7 + PAWN] * 8 + [6 + piece for piece in _BACK_RANK] + [0], np.int8
)
"""The board at the start of a game, int8 [E]. Square a1 has index 0, b1 has 1, and h8 has 63."""


def _square(name: str) -> int:
    return "abcdefgh".index(name[0]) + 8 * (int(name[1]) - 1)


_TOKENIZER = MoveTokenizer("uci")
# For each move of the vocabulary: the origin square, the target square, and the index in PIECE_KINDS of the promoted
# piece. The index 0 (pawn) means no promotion.
_MOVES = np.array(
    [(_square(move), _square(move[2:]), PIECE_KINDS.index(move[4:] or "p")) for move in _TOKENIZER.moves], np.int32
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(llama.Config):
    """Shape and behavior of a Llama that reads the chess board. The fields are those of a Llama."""

    vocab_size: int = _TOKENIZER.vocab_size
    """Number of token ids. The ids are those of ``MoveTokenizer("uci")``."""
    max_positions: int = 256
    """Maximum length of a sequence. No parameter depends on this field."""
    num_layers: int = 8
    """Number of blocks."""
    num_heads: int = 4
    """Query heads of each block."""
    embed_dim: int = 128
    """Model width."""
    mlp_dim: int = 352
    """Hidden width of the MLP."""
    task: Literal["causal", "none"] = "causal"
    """Output head: next move (causal), or none."""


def apply(
    cfg: Config, params: Params, tokens: jax.Array, *, state: State | None = None,
    segment_ids: jax.Array | None = None, positions: jax.Array | None = None, key: jax.Array | None = None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """The hidden states after the final norm, [B, T, D], and the new state (None without a state).

    The arguments and errors are those of ``jaxlm.models.llama.apply``.
    """
    hidden, state, _ = apply_with_routing(
        cfg, params, tokens, state=state, segment_ids=segment_ids, positions=positions, key=key
    )
    return hidden, state


def apply_with_routing(
    cfg: Config, params: Params, tokens: jax.Array, *, state: State | None = None,
    segment_ids: jax.Array | None = None, positions: jax.Array | None = None, key: jax.Array | None = None,
) -> tuple[jax.Array, State | None, RouterStatistics | None]:  # fmt: skip
    """The results of :func:`apply`, and the router statistics of layers with experts, stacked (None: no experts)."""
    common.check_tokens(tokens, segment_ids, positions, cfg.max_positions)  # before the boards are computed
    boards_BTE = _read_boards(tokens, segment_ids, state)
    hidden, new_state, statistics = llama.apply_with_routing(
        cfg, params, tokens, state=state, segment_ids=segment_ids, positions=positions, key=key,
        added_embeddings=embed_boards(params["board_embedding"].astype(cfg.dtype), boards_BTE),
    )  # fmt: skip
    if state is not None and new_state is not None:
        new_state = {**new_state, "boards": cache.append(state["boards"], boards_BTE, state["length"])}
    return hidden, new_state, statistics


def embed_boards(table_RD: jax.Array, boards_BTE: jax.Array) -> jax.Array:
    """The embedding of each board, [B, T, D]: the sum of the vectors of its pieces.

    Args:
        table_RD: one row for each square, side to move and piece: 64 * 2 * 12 rows, in this order.
        boards_BTE: boards as in :data:`INITIAL_BOARD`, int8.
    """
    pieces_BTS, side_BT1 = boards_BTE[..., :SIDE_TO_MOVE], boards_BTE[..., SIDE_TO_MOVE:]
    index_BTS = jnp.where(pieces_BTS > 0, 12 * side_BT1 + pieces_BTS - 1, -1)
    # A matmul with zeros and ones is faster than a gather and sum of up to 32 rows, also in the backward pass.
    rows_BTSK = jax.nn.one_hot(index_BTS, 24, dtype=table_RD.dtype)  # -1 gives zeros
    rows_BTR = rows_BTSK.reshape(*boards_BTE.shape[:2], -1)
    return constrain(rows_BTR @ table_RD, ("batch", "seq", "activation_embed"))


def boards_after(
    tokens_BT: jax.Array,
    board_BE: jax.Array | None = None,
    *,
    reset_BT: jax.Array | None = None,
    keep_BT: jax.Array | None = None,
) -> jax.Array:
    """The board after each token, int8 [B, T, E].

    A token that is not a move does not change the board. Illegal moves are made too. If the origin square of a move is
    empty, its target square becomes empty.

    Args:
        tokens_BT: ids of ``MoveTokenizer("uci")``.
        board_BE: the boards before the first token, int8. None: initial boards.
        reset_BT: True at the first token of each game. The board is reset to the initial board before this token. None:
            no game begins.
        keep_BT: False at padding, which does not change the board. None: there is no padding.

    Example:
        >>> from jaxlm.data import MoveTokenizer
        >>> ids = MoveTokenizer("uci").encode("e2e4 e7e5")
        >>> board = boards_after(jnp.asarray(ids)[None])[0, 1]
        >>> board[28].item(), board[36].item(), board[12].item()  # pawns on e4 and e5, and the empty square e2
        (1, 7, 0)
    """
    B, T = tokens_BT.shape
    # ``zeros_like`` keeps the sharding of the tokens.
    initial_BE = jnp.zeros_like(tokens_BT[:, :1], jnp.int8) + jnp.asarray(INITIAL_BOARD)[None]
    board_BE = initial_BE if board_BE is None else board_BE
    reset_BT = jnp.zeros((B, T), bool) if reset_BT is None else reset_BT
    keep_BT = jnp.ones((B, T), bool) if keep_BT is None else keep_BT
    index_BT = tokens_BT.astype(jnp.int32) - _TOKENIZER.first_move_id
    is_move_BT = keep_BT & (index_BT >= 0) & (index_BT < len(_MOVES))
    moves_BT3 = jnp.asarray(_MOVES).at[jnp.where(is_move_BT, index_BT, 0)].get(out_sharding=gather_sharding(index_BT))

    def step(board_BE: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        reset_B, is_move_B, move_B3 = inputs
        board_BE = jnp.where(reset_B[:, None], initial_BE, board_BE)
        board_BE = jnp.where(is_move_B[:, None], _make_move(board_BE, move_B3), board_BE)
        return board_BE, board_BE

    time_major_inputs = (reset_BT.swapaxes(0, 1), is_move_BT.swapaxes(0, 1), moves_BT3.swapaxes(0, 1))
    _, boards_TBE = lax.scan(step, board_BE, time_major_inputs)
    return boards_TBE.swapaxes(0, 1)


def _make_move(board_BE: jax.Array, move_B3: jax.Array) -> jax.Array:
    """The boards [B, E] after one move on each board.

    If a king on file e moves by two squares along its rank, the move is castling, and a rook moves too.
    """
    origin_B1, target_B1, promoted_B1 = (move_B3[:, index, None] for index in range(3))
    index_1E = jnp.arange(SIDE_TO_MOVE + 1)[None]
    piece_B1 = jnp.take_along_axis(board_BE, origin_B1, axis=1)
    captured_B1 = jnp.take_along_axis(board_BE, target_B1, axis=1)
    kind_B1 = jnp.where(piece_B1 > 0, (piece_B1 - 1) % 6, -1)
    step_B1 = target_B1 % 8 - origin_B1 % 8  # in files
    first_of_rank_B1 = origin_B1 // 8 * 8

    placed_B1 = piece_B1 + jnp.where(kind_B1 == PAWN, promoted_B1, 0).astype(piece_B1.dtype)
    board_BE = jnp.where(index_1E == origin_B1, 0, board_BE)
    board_BE = jnp.where(index_1E == target_B1, placed_B1, board_BE)

    is_en_passant_B1 = (kind_B1 == PAWN) & (step_B1 != 0) & (captured_B1 == 0)
    board_BE = jnp.where(is_en_passant_B1 & (index_1E == first_of_rank_B1 + target_B1 % 8), 0, board_BE)

    is_castling_B1 = (kind_B1 == KING) & (origin_B1 % 8 == 4) & (jnp.abs(target_B1 - origin_B1) == 2)
    rook_origin_B1 = first_of_rank_B1 + jnp.where(step_B1 > 0, 7, 0)
    rook_target_B1 = (origin_B1 + target_B1) // 2
    rook_B1 = jnp.take_along_axis(board_BE, rook_origin_B1, axis=1)
    board_BE = jnp.where(is_castling_B1 & (index_1E == rook_origin_B1), 0, board_BE)
    board_BE = jnp.where(is_castling_B1 & (index_1E == rook_target_B1), rook_B1, board_BE)
    return jnp.where(index_1E == SIDE_TO_MOVE, 1 - board_BE, board_BE)


def _read_boards(tokens_BT: jax.Array, segment_ids: jax.Array | None, state: State | None) -> jax.Array:
    """The board after each new token, [B, T, E]. A document that began in an earlier call keeps its board."""
    segments_BT = common.segment_ids_or_ones(tokens_BT, segment_ids)
    last_segment_B = board_BE = None
    if state is not None:
        last_B1, last_segment_B = cache.last_real_slot(state)
        board_BE = jnp.take_along_axis(state["boards"], last_B1[..., None], axis=1)[:, 0]
    reset_BT, keep_BT, _ = segment_boundaries(segments_BT, last_segment_B, include_first=True)
    return boards_after(tokens_BT, board_BE, reset_BT=reset_BT, keep_BT=keep_BT)


logits = llama.logits
rollback = llama.rollback
embedding_multiplier = llama.embedding_multiplier
NEEDS_WHOLE_TEXT = True
"""The model must read a game from its first move. In a window that begins later, the boards would be wrong, because the
first board is always the initial board."""


def specs(cfg: Config) -> dict[str, Any]:
    """The specs of all parameters: those of a Llama, and ``board_embedding`` (:func:`embed_boards`)."""
    table = ArraySpec((SIDE_TO_MOVE * 2 * 12, cfg.embed_dim), (None, "embed"), Normal(cfg.init_stddev), decay=True)
    return {**llama.specs(cfg), "board_embedding": table}


def state_specs(cfg: Config, batch: int, length: int) -> dict[str, ArraySpec]:
    """The specs of the model state: the key-value cache of a Llama, and the board after each token in the cache."""
    boards = ArraySpec((batch, length, SIDE_TO_MOVE + 1), ("batch", "slots", None), dtype=jnp.int8)
    return {**llama.state_specs(cfg, batch, length), "boards": boards}


VARIANTS = {
    "chess-llama-tiny": Config(vocab_size=128, max_positions=64, num_layers=2, num_kv_heads=2, embed_dim=32, mlp_dim=48)
}
