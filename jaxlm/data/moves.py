"""A tokenizer of chess moves: one id per move, in UCI or SAN notation (see ``jaxlm.data.games``)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config import check_min, check_value
from jaxlm.data.encodings import SPECIAL_TOKEN, Encoding
from jaxlm.data.games import SAN_MOVE, UCI_MOVE, Notation
from jaxlm.data.tokenizers import EncodeInputsMixin, SpecialIds, check_ids, save_jaxlm_file

_CHECK_SIGN = re.compile(r"(?<![+#])[+#]$")  # a word with two signs is not a move
_SPECIAL = {"uci": ("<pad>", "<bos>", "<eos>"), "san": ("<pad>", "<bos>", "<eos>", "<unk>")}


def uci_moves() -> tuple[str, ...]:
    """The 1,968 UCI moves of all pieces on an empty board, including promotions, in alphabetical order.

    These are the moves of a queen and of a knight, and the promotions of pawns. The moves of all other pieces are among
    the moves of a queen. In UCI, castling is a move of the king by two squares.
    """
    squares = [(file, rank) for file in range(8) for rank in range(8)]
    moves = []
    for (file, rank), (to_file, to_rank) in ((a, b) for a in squares for b in squares if a != b):
        files, ranks = abs(to_file - file), abs(to_rank - rank)
        name = f"{'abcdefgh'[file]}{rank + 1}{'abcdefgh'[to_file]}{to_rank + 1}"
        if files == 0 or ranks == 0 or files == ranks or {files, ranks} == {1, 2}:
            moves.append(name)
        if files <= 1 and (rank, to_rank) in ((6, 7), (1, 0)):
            moves += [name + piece for piece in "bnqr"]
    return tuple(sorted(moves))


class MoveTokenizer(EncodeInputsMixin):
    """A tokenizer with one id per move. A text is a line of moves such as ``e2e4 e7e5 g1f3`` or ``e4 e5 Nf3``.

    Ids 0 to 2 are padding, the beginning and the end of a game. ``encode_inputs`` adds id 1 before the moves.
    By default, the UCI vocabulary has all 1,968 moves. A SAN vocabulary has the moves of the training games, and id 3
    for any other move. For SAN, ``encode`` removes the signs for check and mate (``+``, ``#``). The position determines
    these signs, and they would enlarge the vocabulary (of ``chess_games``: 2,220 instead of 1,591 distinct moves).

    Args:
        notation: ``uci`` or ``san``.
        moves: the moves in the order of their ids. None: all moves (only for ``uci``).

    Raises:
        ValueError: the notation is unknown. ``moves`` is empty, or is None for ``san``. A move is repeated, is not in
            the notation, or has a sign for check or mate.

    Attributes:
        notation: ``uci`` or ``san``.
        moves: the moves in the order of their ids.
        pad_id, bos_id, eos_id: the ids of padding and of the beginning and end of a game. ``end_id`` equals ``eos_id``.
        first_move_id: the id of ``moves[0]``. Smaller ids are special tokens.

    Example:
        >>> MoveTokenizer("uci").encode("e2e4 e7e5").tolist()
        [1034, 1209]
    """

    pad_id = 0
    bos_id = 1
    eos_id = 2
    end_id = 2

    def __init__(self, notation: Notation = "uci", moves: Sequence[str] | None = None) -> None:
        check_value(Notation, notation, "notation")
        if moves is None:
            if notation == "san":
                raise ValueError("SAN has no fixed set of moves: use MoveTokenizer.from_games(san_lines, 'san')")
            moves = uci_moves()
        pattern = UCI_MOVE if notation == "uci" else SAN_MOVE
        for move in moves:
            if not pattern.fullmatch(move) or move[-1] in "+#":
                raise ValueError(f"{move!r} is not a {notation} move, or it ends with '+' or '#': remove these signs")
        repeated = [move for move, count in Counter(moves).items() if count > 1]
        if repeated:
            raise ValueError(f"the moves of a vocabulary must be distinct, got {repeated[0]!r} twice")
        if not moves:
            raise ValueError("a vocabulary needs at least one move")
        self.notation: Notation = notation
        self.moves = tuple(moves)
        special = _SPECIAL[notation]
        self.first_move_id = len(special)
        self.special_ids = SpecialIds(pad=0, bos=1, eos=2, unk=3 if notation == "san" else None)
        self.vocab_size = len(special) + len(self.moves)
        self._texts = (*special, *self.moves)
        self._ids = {move: id for id, move in enumerate(self.moves, start=self.first_move_id)}

    @classmethod
    def from_games(cls, lines: Iterable[str], notation: Notation = "uci", *, min_count: int = 1) -> MoveTokenizer:
        """The tokenizer with a vocabulary for training games.

        For ``san``, the vocabulary has the moves that occur at least ``min_count`` times, the most frequent first. For
        ``uci``, the vocabulary has all moves, and ``lines`` is not read.

        Args:
            lines: the moves of each game.

        Raises:
            ValueError: the notation is unknown or ``min_count`` is below 1. For ``san``: no word occurs at least
                ``min_count`` times, or a word that occurs so often is not a SAN move.
        """
        check_value(Notation, notation, "notation")
        check_min(1, min_count=min_count)
        if notation == "uci":
            return cls("uci")
        counts = Counter(_CHECK_SIGN.sub("", word) for line in lines for word in line.split())
        moves = sorted((move for move in counts if counts[move] >= min_count), key=lambda m: (-counts[m], m))
        if counts and not moves:
            raise ValueError(
                f"min_count={min_count}: the most frequent move occurs {max(counts.values())} times in the games: use "
                "a smaller min_count or more games"
            )
        return cls("san", moves)

    def encode(self, text: str) -> np.ndarray:
        """The ids of the moves, int32 [moves], without the ids of the beginning and the end of a game.

        Raises:
            ValueError: a word is not a move in the notation, for example a result or a move number. For ``uci``: a move
                is not in the vocabulary.
        """
        ids = []
        for number, word in enumerate(text.split()):
            id = self._ids.get(word)
            ids.append(self._id_of_unlisted_word(word, number) if id is None else id)
        return np.array(ids, np.int32)

    def encode_game(self, line: str) -> np.ndarray:
        """The ids of a whole game as a training document: beginning, moves, end; int32 [moves + 2]."""
        return np.concatenate([[self.bos_id], self.encode(line), [self.eos_id]]).astype(np.int32)

    def is_move(self, id: int) -> bool:
        """True if ``id`` is the id of a move, False if it is the id of a special token."""
        return self.first_move_id <= id < self.vocab_size

    def move_id(self, move: str) -> int | None:
        """The id of a move (without signs for check and mate). None: the vocabulary does not have the move."""
        return self._ids.get(move)

    def move_text(self, id: int) -> str:
        """The move for an id, or the name of a special token, such as ``<eos>``."""
        return self._texts[id]

    def decode(self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool = False) -> str:
        """The line of moves. Id 3 of SAN is written as ``<unk>``, even if ``skip_special_tokens`` is True."""
        unknown = self.special_ids.unk
        return " ".join(
            self._texts[id]
            for id in check_ids(ids, self.vocab_size)
            if id >= self.first_move_id or id == unknown or not skip_special_tokens
        )

    def save(self, directory: str | Path) -> None:
        content: dict[str, Any] = {"type": "moves", "notation": self.notation}
        if self.notation == "san" or self.moves != uci_moves():
            content["moves"] = " ".join(self.moves)
        save_jaxlm_file(directory, content)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> MoveTokenizer:
        """The tokenizer of a saved ``jaxlm_tokenizer.json`` of type ``moves``.

        A missing ``notation`` means ``uci``. Missing ``moves`` mean all moves of ``uci``.

        Raises:
            ValueError: a field is invalid, or ``moves`` is missing for ``san``.
        """
        moves = content.get("moves")
        if moves is not None and not isinstance(moves, str):
            raise ValueError(f"moves must be a text, got {type(moves).__name__}")
        return cls(content.get("notation", "uci"), None if moves is None else moves.split())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MoveTokenizer) and (self.notation, self.moves) == (other.notation, other.moves)

    def __hash__(self) -> int:
        return hash((self.notation, self.moves))

    def __repr__(self) -> str:
        return f"MoveTokenizer({self.notation!r}, {len(self.moves):,} moves)"

    def _id_of_unlisted_word(self, word: str, number: int) -> int:
        """The id of a word that is not a key of ``_ids``. Raises ``ValueError`` if it is not a move or has no id."""
        plain = _CHECK_SIGN.sub("", word) if self.notation == "san" else word
        id = self._ids.get(plain, self.special_ids.unk)
        pattern = SAN_MOVE if self.notation == "san" else UCI_MOVE
        if id is None and word in uci_moves():
            raise ValueError(
                f"word {number + 1} of the game, {word!r}, is not in the vocabulary of {len(self.moves):,} moves: use "
                "a tokenizer whose moves contain it"
            )
        if id is None or not pattern.fullmatch(word):
            raise ValueError(
                f"word {number + 1} of the game, {word!r}, is not a {self.notation} move: read games with "
                f"read_games(path, {self.notation!r}), or convert a line with to_{self.notation}"
            )
        return id

    def _offsets(self, text: str) -> np.ndarray:
        return np.array([match.span() for match in re.finditer(r"\S+", text)], np.int32).reshape(-1, 2)

    def _encodings(self, texts: Sequence[str], pairs: Sequence[str] | None) -> list[Encoding]:
        bos = Encoding(*(np.array([x], np.int32) for x in (self.bos_id, 0, (0, 0), SPECIAL_TOKEN)))
        return [
            Encoding(*(np.concatenate(fields) for fields in zip(bos, encoding, strict=True)))
            for encoding in super()._encodings(texts, pairs)
        ]
