"""Read chess games from text and PGN files, check them with the rules of chess, convert their notation, and split them.

A move is one move of one player (a ply). A game is a line of moves in one of two notations: ``uci`` (Universal Chess
Interface: ``e2e4``, ``e7e8q``) or ``san`` (standard algebraic notation: ``e4``, ``Nbxd2``, ``e8=Q``). The readers
remove the signs for check and mate from SAN, because the position determines these signs. The package ``chess`` (extra
``chess``) implements the rules.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import io
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from jaxlm import extras
from jaxlm.config import check_min, check_same_number, check_value
from jaxlm.data.examples import Rejected, group_indices
from jaxlm.data.text_files import read_lines, read_text, suffix_without_gz

Notation = Literal["uci", "san"]
RESULTS = ("1-0", "0-1", "1/2-1/2", "*")
"""The results: white won, black won, draw, unknown."""
UCI_MOVE = re.compile(r"[a-h][1-8][a-h][1-8][qrbn]?")
SAN_MOVE = re.compile(r"(?:[KQRBN][a-h]?[1-8]?x?[a-h][1-8]|(?:[a-h]x)?[a-h][1-8](?:=[QRBN])?|O-O(?:-O)?)[+#]?")
_SAN_WITHOUT_ORIGIN = re.compile(r"[KQRBN]x?[a-h][1-8]|(?:[a-h]x)?[a-h][1-8](?:=[QRBN])?|O-O(?:-O)?")
_TAG_NAME = r"[A-Za-z0-9_][A-Za-z0-9_+#=:-]*"
_PGN_TAG = re.compile(
    # A tag as in the PGN standard, or a line with one tag whose value has unescaped quotes. python-chess reads both.
    rf'\[\s*{_TAG_NAME}\s*"(?:[^"\\\n]|\\.)*"\s*\]|\[(?<![^\n]\[){_TAG_NAME}\s+".*"\][^\S\n]*$', re.MULTILINE
)  # fmt: skip
_PGN_TAG_PARTS = re.compile(r'\[\s*([^\s"]+)\s*"(.*)"\s*\]\s*')
# The search is faster if each alternative begins with a literal character instead of a lookbehind.
_PGN_DELIMITER = re.compile(
    "|".join(
        [r";[^\n]*", r"%(?<![^\n]%)[^\n]*", r"\{", r"\(", r"\)", r"\n[^\S\n]*(?=\n)", _PGN_TAG.pattern]
        + [rf"{word}(?<![^\s)}}]{word})(?![^\s({{;])" for word in map(re.escape, RESULTS)]
    ),
    re.MULTILINE,
)
_PGN_KINDS = {";": "comment", "%": "comment", "{": "brace", "[": "tag", "(": "open", ")": "close", "\n": "empty"}
"""First character of a match of ``_PGN_DELIMITER`` -> its kind. A match with another first character is a result."""
_PGN_IGNORED = re.compile(r"\$\d+|(?<!\S)(?:\d+\s*)?\.+|(?<!\S)\d+(?!\S)|\be\.p\.")
"""The parts of a PGN move text that are not moves: annotations such as ``$1``, move numbers, and ``e.p.``."""
_PGN_MOVE = re.compile(r"[KQRBNP]?[a-h]?[1-8]?[-x]?[a-h][1-8](?:=?[KQRBNkqrbn])?|[O0]-[O0](?:-[O0])?|--")
_FIRST_MOVE_NUMBER = re.compile(r"1(?:\.(?!\s*\.)|\s|$)")
"""The number of the first move of white: ``1.`` or ``1``, but not ``1...``, the number of the first move of black."""
GAMES_PER_EXTRA_PROCESS = 2000
"""Number of games for which ``read_games`` starts one more process. A process takes one or two seconds to start."""


@dataclasses.dataclass(frozen=True)
class Games:
    """The games of a file, or a selection of these games.

    Attributes:
        moves: one string per game, with its moves separated by spaces.
        results: the result of each game, one of ``RESULTS``.
        notation: notation of ``moves``.
        source: name of the file, for messages.
        rejected: the games of the file that cannot be used, each with its line and the reason. Empty for a selection.

    Raises:
        ValueError: the numbers of ``moves`` and ``results`` differ.
    """

    moves: tuple[str, ...]
    results: tuple[str, ...]
    notation: Notation
    source: str = "games"
    rejected: tuple[Rejected, ...] = ()

    def __post_init__(self) -> None:
        check_same_number(game=self.moves, result=self.results)

    def __len__(self) -> int:
        return len(self.moves)

    def select(self, indices: Sequence[int] | np.ndarray) -> Games:
        """The games at ``indices``, in this order. The ``rejected`` of the result is empty."""
        moves = tuple(self.moves[i] for i in indices)
        return dataclasses.replace(self, moves=moves, results=tuple(self.results[i] for i in indices), rejected=())

    def groups(self) -> list[list[int]]:
        """The indices of games with equal moves: one list per distinct game, in order of first occurrence."""
        return group_indices(self.moves)

    def duplicates(self) -> list[list[int]]:
        """The lists of ``groups`` that have more than one game."""
        return [group for group in self.groups() if len(group) > 1]

    def report(self, max_rejected: int = 5) -> str:
        """A text with the numbers of games, rejected games and duplicates, and the first rejected games.

        A duplicate is a game with the same moves as an earlier game.

        Args:
            max_rejected: maximum number of rejected games that are listed.
        """
        repeated = sum(len(group) - 1 for group in self.duplicates())
        lines = [f"{self.source}: {len(self):,} games, {len(self.rejected):,} rejected, {repeated:,} duplicates"]
        lines += [f"  {self.source}, line {game.line}: {game.reason}" for game in self.rejected[:max_rejected]]
        if len(self.rejected) > max_rejected:
            lines.append(f"  and {len(self.rejected) - max_rejected:,} more rejected games")
        return "\n".join(lines)


def chess_games(notation: Notation = "uci") -> Games:
    """The 2,000 included master games; public domain. ``CHESS.md`` in this directory describes their source.

    The notation ``uci`` needs the package ``chess``.
    """
    with importlib.resources.as_file(importlib.resources.files("jaxlm.data") / "chess_games.txt.gz") as path:
        # The included games are legal SAN, so only the conversion to UCI needs the rules.
        games = read_games(path, notation, check="syntax" if notation == "san" else "rules", workers=1)
    return dataclasses.replace(games, source="chess_games.txt.gz")


def read_games(
    path: str | Path,
    notation: Notation = "uci",
    *,
    check: Literal["rules", "syntax"] = "rules",
    workers: int | None = None,
) -> Games:
    """The games of a file, with their moves in ``notation``.

    A text file has one game per line: SAN or UCI moves, and optionally the result at the end. Empty lines are skipped.
    A PGN file has the suffix ``.pgn``. The moves of its games are read without variations and comments. A game ends at
    its result, or where the next game begins. Files may be compressed (``.gz``).

    ``Games.rejected`` lists the games that cannot be used, each with its line and the reason: the game has no
    moves, or an illegal, ambiguous, null or unreadable move. Further reasons in a PGN file: an invalid tag, rules other
    than standard chess, another initial position, a first move number that is not 1, and a comment or variation that is
    not closed.

    Checking the rules takes about 0.9 ms per game (2 minutes for 144,000 games on one core, 1 minute on two cores).
    ``check="syntax"`` takes a few seconds for these games. It requires a text file that uses ``notation``. It checks
    only that the words of a line have the form of moves. The last word may be a result.

    Args:
        path: a text file or a PGN file.
        notation: the notation of the returned moves.
        check: ``rules`` replays each game. ``syntax`` checks only the form of the words.
        workers: number of processes. None: with ``check="rules"``, one process, plus one for every 2,000 games, at most
            one per core; with ``check="syntax"``, one process.

    Raises:
        ImportError: the package ``chess`` is not installed (``check="syntax"`` does not need it).
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, is not text or has no game that can be used; ``notation`` or ``check`` is
            unknown; ``workers`` is below 1; or the file is PGN and ``check`` is "syntax".
    """
    path = Path(path)
    check_value(Notation, notation, "notation")
    check_value(Literal["rules", "syntax"], check, "check")
    is_pgn = suffix_without_gz(path) == ".pgn"
    if check == "syntax" and is_pgn:
        raise ValueError(f"check='syntax' cannot read the PGN file {path}: use check='rules'")
    check_min(1, workers=workers)
    if is_pgn:
        items = list(_pgn_games(read_text(path)))
    else:
        items = [(number, line) for number, line in read_lines(path) if line.strip()]
    if not items:
        raise ValueError(f"{path} is empty: it must have one game per line, or be a PGN file with the suffix .pgn")
    if check == "rules":
        import_chess()
    reader = _read_pgn if is_pgn else _read_with_rules if check == "rules" else _read_with_syntax
    if workers is None:
        workers = min(os.cpu_count() or 1, 1 + len(items) // GAMES_PER_EXTRA_PROCESS) if check == "rules" else 1
    found = _read_all(reader, items, notation, workers)
    rejected = tuple(game for game in found if isinstance(game, Rejected))
    accepted = [game for game in found if not isinstance(game, Rejected)]
    games = Games(
        tuple(moves for moves, _ in accepted), tuple(result for _, result in accepted), notation, str(path), rejected
    )
    if not games.moves:
        raise ValueError(f"no game of the file can be used.\n{games.report()}")
    return games


def split_games(
    games: Games, validation_fraction: float, test_fraction: float, seed: int = 0
) -> tuple[Games, Games, Games]:
    """Split the games into (training, validation, test). Games with equal moves are in the same split.

    The fractions are fractions of the distinct games. The games of each split are drawn at random. Within a split, the
    games keep the order of ``games``.

    Raises:
        ValueError: a fraction is negative or at least 1, the fractions leave no games for training, or a positive
            fraction of the distinct games rounds to 0 games.
    """
    for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name}={value} must be at least 0 and below 1")
    groups = games.groups()
    sizes = [round(fraction * len(groups)) for fraction in (validation_fraction, test_fraction)]
    for name, size, fraction in zip(("validation", "test"), sizes, (validation_fraction, test_fraction), strict=True):
        if fraction > 0.0 and size == 0:
            raise ValueError(f"{name}_fraction={fraction} of {len(groups)} distinct games rounds to 0: increase it")
    if sum(sizes) >= len(groups):
        raise ValueError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction} leave none of the "
            f"{len(groups)} distinct games to train on"
        )
    order = np.random.default_rng(seed).permutation(len(groups))
    num_validation, num_held_out = sizes[0], sum(sizes)
    parts = (order[num_held_out:], order[:num_validation], order[num_validation:num_held_out])
    train, validation, test = (
        games.select(sorted(index for group in part for index in groups[group])) for part in parts
    )
    return train, validation, test


def to_uci(line: str) -> str:
    """The UCI moves for a line of SAN or UCI moves from the initial position.

    Example:
        >>> to_uci("e4 e5 Nf3")
        'e2e4 e7e5 g1f3'

    Raises:
        ImportError: the package ``chess`` is not installed.
        ValueError: a move is illegal, ambiguous, unreadable or a null move.
    """
    return _replay(line.split(), "uci")


def to_san(line: str) -> str:
    """The SAN moves, without signs for check and mate, for a line of SAN or UCI moves from the initial position.

    Raises:
        ImportError, ValueError: as in :func:`to_uci`.
    """
    return _replay(line.split(), "san")


def san_without_check_signs(board: Any, move: Any) -> str:
    """The SAN of a legal move on a ``chess.Board``, without the signs for check and mate."""
    return board.san(move).rstrip("+#")


def import_chess() -> ModuleType:
    """The package ``chess``. If it is not installed, an ``ImportError`` names the extra that installs it."""
    return extras.import_optional("chess", "chess", "chess games need the package `chess`")


# ------------------------------------------------------------------------------------------- reading one game


_Game = tuple[str, str]
"""The moves in the requested notation, and one of ``RESULTS``."""
_Reader = Callable[[str, Notation], _Game]
"""A function that reads one game. It raises ``ValueError`` if the game is rejected."""


def _replay(words: Sequence[str], notation: Notation) -> str:
    """Convert SAN or UCI moves to ``notation``. Raises ``ValueError`` for the first word that is not a legal move."""
    board = import_chess().Board()
    moves = []
    for number, word in enumerate(words):
        is_uci = UCI_MOVE.fullmatch(word)
        try:
            move = board.parse_uci(word) if is_uci else board.parse_san(word)
        except ValueError as error:
            kind = type(error).__name__.removesuffix("MoveError").lower()  # illegal, ambiguous or invalid
            raise ValueError(f"{_move_name(number, word)} is {'unreadable' if kind == 'invalid' else kind}") from error
        if not move:
            raise ValueError(f"{_move_name(number, word)} is a null move")
        if notation == "uci":
            moves.append(move.uci())
        else:
            moves.append(_canonical_san(board, move, word) if not is_uci else san_without_check_signs(board, move))
        board.push(move)
    return " ".join(moves)


def _move_name(index: int, word: str) -> str:
    """The name of the move at ``index`` of a game, for error messages."""
    return f"move {index // 2 + 1} of {'black' if index % 2 else 'white'}, {word!r},"


def _canonical_san(board: Any, move: Any, word: str) -> str:
    """The standard SAN, without signs for check and mate, of a move that was parsed from ``word``."""
    # board.san takes as long as parsing. So return the word if it is already standard. It is standard if it has no
    # origin square (except the file of a pawn that captures), and has "x" if and only if the move is a capture.
    plain = word.rstrip("+#")
    if _SAN_WITHOUT_ORIGIN.fullmatch(plain) and ("x" in plain) == board.is_capture(move):
        return plain
    return san_without_check_signs(board, move)


def _split_result(line: str) -> tuple[list[str], str]:
    """The moves of a line, and its result ("*" if the line has none). Raises ``ValueError`` if there are no moves."""
    words = line.split()
    result = words.pop() if words and words[-1] in RESULTS else "*"
    if not words:
        raise ValueError("no moves")
    return words, result


def _read_with_rules(text: str, notation: Notation) -> tuple[str, str]:
    words, result = _split_result(text)
    try:
        return _replay(words, notation), result
    except ValueError as error:
        hint = "; a file with move numbers or tags needs the suffix .pgn" if re.match(r"\d+\.|\[", words[0]) else ""
        raise ValueError(f"{error}{hint}") from error


def _read_with_syntax(text: str, notation: Notation) -> tuple[str, str]:
    words, result = _split_result(text)
    pattern = UCI_MOVE if notation == "uci" else SAN_MOVE
    for number, word in enumerate(words):
        if not pattern.fullmatch(word):
            raise ValueError(f"{_move_name(number, word)} is not a {notation} move")
    return " ".join(word.rstrip("+#") for word in words), result


def _read_pgn(text: str, notation: Notation) -> tuple[str, str]:
    import_chess()
    import chess.pgn

    class MainLine(chess.pgn.GameBuilder):
        """Builds only the main line, and stores errors without logging them."""

        def begin_variation(self) -> Any:
            super().begin_variation()
            return chess.pgn.SKIP

        def handle_error(self, error: Exception) -> None:
            self.game.errors.append(error)

    unknown_word = _unknown_word(text)
    if unknown_word is not None:  # chess.pgn.read_game ignores unknown words
        problem = "is not closed" if unknown_word in ("{", "(") else "is not a move"
        raise ValueError(f"{unknown_word!r} in the text of the game {problem}")
    game = chess.pgn.read_game(io.StringIO(text), Visitor=MainLine)
    assert game is not None
    if game.errors:  # board() raises an error if a tag is invalid
        raise ValueError(str(game.errors[0]))
    board = game.board()
    first_number = re.match(r"(\d+)(?:\.|\s)", _pgn_moves(text))
    if board.uci_variant != "chess" or board.chess960 or board.fen() != chess.STARTING_FEN:
        raise ValueError("the game is not standard chess from the initial position")
    if game.next() is None:
        raise ValueError("no moves")
    if first_number is not None and first_number[1] != "1":
        raise ValueError(f"the game begins with move {first_number[1]}, not with move 1")
    moves = _replay([move.uci() for move in game.mainline_moves()], notation)
    # If the tag has no result, the result after the moves counts.
    tag_result, (_, result_after_moves) = game.headers.get("Result", "*").strip(), _split_result(_pgn_moves(text))
    return moves, tag_result if tag_result in RESULTS and tag_result != "*" else result_after_moves


def _pgn_moves(text: str) -> str:
    """The moves in a text that :func:`_pgn_games` yields: the last line of the text."""
    return text.rpartition("\n")[2]


def _unknown_word(text: str) -> str | None:
    """The first word that is neither a move nor a result, in the moves of a text that :func:`_pgn_games` yields."""
    words = (word.rstrip("+#!?") for word in _PGN_IGNORED.sub(" ", _pgn_moves(text)).split())
    return next((word for word in words if word and word not in RESULTS and not _PGN_MOVE.fullmatch(word)), None)


@dataclasses.dataclass
class _PgnGame:
    """One game of a PGN text.

    Attributes:
        line: the number of the first line.
        tags: the (name, value) of each tag.
        moves: the parts of the main line, including the result.
        depth: number of open variations.
    """

    line: int
    tags: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    moves: list[str] = dataclasses.field(default_factory=list)
    depth: int = 0

    def text(self) -> str:
        """One line per tag, an empty line, and one line of moves. Its last word is "(" if a variation is not closed."""
        moves = [word for part in self.moves for word in part.split()] + ["("] * bool(self.depth)
        return "\n".join([*(f'[{name} "{value}"]' for name, value in self.tags), "", " ".join(moves)])


def _pgn_games(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line number and the text (``_PgnGame.text``) of each game, without comments and variations.

    A result ends a game. A tag after moves begins a game. After an empty line, a game also begins at move 1 of white,
    or at a tag if the current game already has a tag of this name. Empty lines in comments do not count.
    """
    text = re.sub(r"\r\n?", "\n", text)
    game, after_empty, line, counted_until = None, False, 1, 0
    for start, kind, part in _pgn_parts(text):
        if kind == "empty":
            after_empty = True
            continue
        tag = _PGN_TAG_PARTS.fullmatch(part) if kind == "tag" else None
        if game is not None:
            if tag is not None:
                is_new = bool(game.moves or game.depth) or (after_empty and tag[1] in dict(game.tags))
            else:
                after_result = not game.depth and bool(game.moves) and game.moves[-1] in RESULTS
                at_move_1 = after_empty and bool(game.moves) and _FIRST_MOVE_NUMBER.match(part) is not None
                is_new = kind in ("moves", "result") and (after_result or at_move_1)
            if is_new:
                yield game.line, game.text()
                game = None
        if game is None:
            line, counted_until = line + text.count("\n", counted_until, start), start
            game = _PgnGame(line)
        if tag is not None:
            game.tags.append((tag[1], tag[2]))
        elif kind == "open":
            game.depth += 1
        elif kind == "close" and game.depth:
            game.depth -= 1
        elif not game.depth or kind == "unclosed":
            game.moves.append(part)
        after_empty = False
    if game is not None:
        yield game.line, game.text()


def _pgn_parts(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (start, kind, part) for the parts of a PGN text, without comments.

    The kinds are ``moves``, ``result``, ``tag``, ``open`` and ``close`` (the parentheses of a variation), ``empty`` (an
    empty line) and ``unclosed`` (the ``{`` of a comment that is not closed). A comment is not closed if no ``}``
    follows, or if a tag and then another ``{`` come before the next ``}``. Reading continues at the tag, so that the
    following games are read. If there is no tag, the comment ends at the end of the text.
    """
    position = 0
    while position < len(text):
        match = _PGN_DELIMITER.search(text, position)
        start = len(text) if match is None else match.start()
        moves = text[position:start]
        if moves.strip():
            yield position + len(moves) - len(moves.lstrip()), "moves", moves.strip()
        if match is None:
            return
        position, kind = match.end(), _PGN_KINDS.get(match[0][0], "result")
        if kind == "brace":
            close = text.find("}", position)
            end = len(text) if close < 0 else close
            tag = _PGN_TAG.search(text, position, end)
            if tag is not None and (close < 0 or "{" in text[tag.end() : end]):
                position = tag.start()
                yield start, "unclosed", "{"
            elif close < 0:
                position = end
                yield start, "unclosed", "{"
            else:
                position = close + 1
        elif kind != "comment":
            yield start, kind, match[0]


def _read_game(reader: _Reader, line: int, text: str, notation: Notation) -> _Game | Rejected:
    try:
        return reader(text, notation)
    except ValueError as error:
        return Rejected(line, str(error))


# ---------------------------------------------------------------------------------------------- many games


def _read_all(
    reader: _Reader, items: list[tuple[int, str]], notation: Notation, workers: int
) -> list[_Game | Rejected]:
    if workers == 1:
        return [_read_game(reader, line, text, notation) for line, text in items]
    bounds = np.linspace(0, len(items), workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        parts = pool.map(
            lambda bound: _read_in_process(reader, items[bound[0] : bound[1]], notation), zip(bounds, bounds[1:])
        )
        return [game for part in parts for game in part]


def _read_in_process(reader: _Reader, items: list[tuple[int, str]], notation: Notation) -> list[_Game | Rejected]:
    """The games of ``items``, read in a new process."""
    # Do not use multiprocessing: a forked process may hang because of JAX's threads, and a spawned process runs the
    # user's script again.
    run = subprocess.run(
        [sys.executable, "-c", "from jaxlm.data import games; games._read_from_stdin()"],
        input=pickle.dumps((reader, items, notation)),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if run.returncode:
        raise RuntimeError(f"a process that checks chess games failed:\n{run.stderr.decode(errors='replace')}")
    return pickle.loads(run.stdout)


def _read_from_stdin() -> None:
    """Read the arguments of :func:`_read_in_process` from standard input, and write the games to standard output."""
    reader, items, notation = pickle.loads(sys.stdin.buffer.read())
    sys.stdout.buffer.write(pickle.dumps(_read_all(reader, items, notation, workers=1)))
