"""Synthetic tasks on which architectures get different results, as defined in the cited papers.

    recall              multi-query associative recall (Arora et al. 2024, "Zoology")
    formal_language     length generalization on formal languages (Deletang et al. 2023)
    word_problem        products of group elements: state tracking (Merrill et al. 2024; Grazzi et al. 2025)
    copying             repeat a string after a separator (Jelassi et al. 2024)
    induction           recall the token after a special token (Gu and Dao 2024, section 4.1.2)
    needle              recall a number that replaces a part of a text (not from a paper)

Each of these functions draws a batch of ``rows`` rows with a NumPy generator. Generators in equal states give equal
batches. The batches are for causal models. Only the positions in ``Batch.target_positions`` have targets, so the loss
and the metrics ignore all other positions.

Shapes: N rows, P targets of a row, G elements of a group, S tokens of a text.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.config import check_min
from jaxlm.objectives.batch import Batch

# ---------------------------------------------------------------------------------------------- associative recall


def recall(
    rng: np.random.Generator, rows: int, length: int, pairs: int, *, vocab_size: int = 8192, power: float = 0.01
) -> Batch:
    """A batch of multi-query associative recall, [N, length] tokens with ``pairs`` targets per row.

    A row begins with ``pairs`` keys, each followed by its value. Later, each key occurs once more as a query. The
    target at the position of a query is the value of the key. Keys are ids from 1 to vocab_size // 2 - 1, and values
    are ids from vocab_size // 2 to vocab_size - 1. Each pair has a gap g. Its query is at position
    2 * pairs + 2 * (g - 1). The gaps of a row are drawn without replacement from 1 to length / 2 - pairs, with
    probabilities proportional to g ** (power - 1). All other tokens are random ids (Arora et al. 2024, appendix E.1,
    and the code of these authors).

    Args:
        length: number of tokens of a row, even and at least 4 * pairs.
        pairs: number of key-value pairs of a row.
        vocab_size: number of token ids; more than ``length``.
        power: the parameter of the distribution of the gaps. 1: all gaps are equally probable. Below 1: small gaps are
            more probable, so early queries are more probable.

    Raises:
        ValueError: the length is odd or too small for the pairs, or the vocabulary is too small.
    """
    if length % 2 or length < 4 * pairs:
        raise ValueError(f"length={length} must be even and at least 4 * pairs={4 * pairs}")
    if vocab_size // 2 <= pairs or vocab_size <= length:
        raise ValueError(f"vocab_size={vocab_size} must exceed length={length} and 2 * pairs={2 * pairs}")
    keys = _draw_distinct(rng, rows, pairs, np.ones(vocab_size // 2 - 1)) + 1
    values = _draw_distinct(rng, rows, pairs, np.ones(vocab_size - vocab_size // 2)) + vocab_size // 2
    num_gaps = (length - 2 * pairs) // 2
    gaps = _draw_distinct(rng, rows, pairs, np.arange(1, num_gaps + 1) ** (power - 1.0)) + 1
    positions = 2 * pairs + 2 * (gaps - 1)
    tokens = rng.integers(0, vocab_size, (rows, length))
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    np.put_along_axis(tokens, positions, keys, axis=1)
    return _batch(tokens, values, positions)


def _draw_distinct(rng: np.random.Generator, rows: int, count: int, weights: np.ndarray) -> np.ndarray:
    """``count`` distinct indices per row, [N, count], drawn without replacement in proportion to ``weights``."""
    # The largest log-weights with Gumbel noise are a sample without replacement (Gumbel-top-k trick; Kool et al. 2019).
    # The values are negated, because argpartition and argsort put the smallest values first.
    noisy = -np.log(weights) - rng.gumbel(size=(rows, len(weights)))
    chosen = np.argpartition(noisy, count - 1, axis=1)[:, :count]
    order = np.argsort(np.take_along_axis(noisy, chosen, axis=1), axis=1)
    return np.take_along_axis(chosen, order, axis=1)


# ------------------------------------------------------------------------------------------------ formal languages


class FormalLanguage(NamedTuple):
    """A task of Deletang et al. 2023.

    Attributes:
        sample: a function ``(rng, rows, length)`` that returns inputs [N, length] and answers [N, P]. For modular
            arithmetic, an even length is reduced by one.
        num_symbols: number of different input symbols. Their ids are 0 to num_symbols - 1. The id ``num_symbols`` is
            the placeholder that the model reads instead of each symbol of the answer.
        num_answers: number of different answer symbols. A uniformly random guess has the accuracy 1 / num_answers.
        level: level in the Chomsky hierarchy: "regular", "dcf" (deterministic context-free), "cs" (context-sensitive).
        answer_has_input_length: True if the answer has as many symbols as the input, False if it has one symbol.
    """

    sample: Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray]]
    num_symbols: int
    num_answers: int
    level: str
    answer_has_input_length: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of token ids that a model needs."""
        return max(self.num_symbols + 1, self.num_answers)


def _even_pairs(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    bits = rng.integers(0, 2, (rows, length))
    return bits, np.sum(bits[:, 1:] != bits[:, :-1], axis=1, keepdims=True) % 2


def _parity(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    bits = rng.integers(0, 2, (rows, length))
    return bits, np.sum(bits, axis=1, keepdims=True) % 2


def _cycle_navigation(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    moves = rng.integers(0, 3, (rows, length))  # 0: left, 1: stay, 2: right
    return moves, np.sum(moves - 1, axis=1, keepdims=True) % 5


def _modular_arithmetic(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Expressions of numbers 0 to 4 (ids 0 to 4) and the operators +, -, * (ids 5, 6, 7), and their values modulo 5.

    An even length is reduced by one, because an expression has an odd number of symbols.
    """
    length -= 1 - length % 2
    numbers = rng.integers(0, 5, (rows, (length + 1) // 2))
    operators = rng.integers(5, 8, (rows, length // 2))
    tokens = np.empty((rows, length), np.int64)
    tokens[:, 0::2], tokens[:, 1::2] = numbers, operators
    total, term = np.zeros(rows, np.int64), numbers[:, 0]
    for operator, number in zip(operators.T, numbers.T[1:], strict=True):
        is_product = operator == 7
        total = np.where(is_product, total, (total + term) % 5)
        term = np.where(is_product, term * number, np.where(operator == 5, number, -number)) % 5
    return tokens, ((total + term) % 5)[:, None]


def _reverse_string(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    bits = rng.integers(0, 2, (rows, length))
    return bits, bits[:, ::-1]


def _bucket_sort(rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    symbols = rng.integers(0, 5, (rows, length))
    return symbols, np.sort(symbols, axis=1)


FORMAL_LANGUAGES = {
    "even_pairs": FormalLanguage(_even_pairs, 2, 2, "regular"),
    "modular_arithmetic": FormalLanguage(_modular_arithmetic, 8, 5, "regular"),
    "parity": FormalLanguage(_parity, 2, 2, "regular"),
    "cycle_navigation": FormalLanguage(_cycle_navigation, 3, 5, "regular"),
    "reverse_string": FormalLanguage(_reverse_string, 2, 2, "dcf", answer_has_input_length=True),
    "bucket_sort": FormalLanguage(_bucket_sort, 5, 5, "cs", answer_has_input_length=True),
}
"""Six tasks of Deletang et al. 2023, table 1."""


def formal_language(name: str, rng: np.random.Generator, rows: int, length: int, padded_length: int) -> Batch:
    """A batch of a formal language: inputs of one length, each followed by one placeholder for each answer symbol.

    As in the paper, the model reads placeholders instead of the symbols of the answer. Rows are padded on the right, so
    batches with inputs of different lengths can have the same shape.

    Args:
        name: a key of :data:`FORMAL_LANGUAGES`.
        length: number of symbols of the input. For modular arithmetic, an even length is reduced by one.
        padded_length: rows are padded to the length of a row whose input has ``padded_length`` symbols: 2 *
            padded_length tokens if the answer has the length of the input, otherwise padded_length + 1 tokens.

    Raises:
        ValueError: the name is unknown, or ``length`` is below 1 or above ``padded_length``.
    """
    if name not in FORMAL_LANGUAGES:
        raise ValueError(f"name={name!r} is unknown: choose from {', '.join(FORMAL_LANGUAGES)}")
    if not 1 <= length <= padded_length:
        raise ValueError(f"length={length} must be at least 1 and at most padded_length={padded_length}")
    language = FORMAL_LANGUAGES[name]
    inputs, answers = language.sample(rng, rows, length)
    num_inputs, num_answers = inputs.shape[1], answers.shape[1]
    padded_answers = padded_length if language.answer_has_input_length else 1
    answer_tokens = np.full((rows, num_answers), language.num_symbols)
    tokens = np.concatenate([inputs, answer_tokens], axis=1)
    tokens = _pad(tokens, padded_length + padded_answers)
    segment_ids = np.broadcast_to(np.arange(tokens.shape[1]) < num_inputs + num_answers, tokens.shape)
    positions = np.broadcast_to(num_inputs + np.arange(num_answers), answers.shape)
    weights = _pad(np.ones((rows, num_answers)), padded_answers)
    return _batch(tokens, _pad(answers, padded_answers), _pad(positions, padded_answers), weights, segment_ids)


def _pad(x: np.ndarray, length: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, length - x.shape[1])))


# --------------------------------------------------------------------------------------------------- group products

GROUPS = ("S5", "A5", "Z60", "Z2")
"""Names of groups: permutations of 5 items, even permutations of 5 items, sums modulo 60, sums modulo 2 (parity)."""


@functools.cache
def multiplication_table(group: str) -> np.ndarray:
    """The products of all pairs of elements of a group, [G, G] ids of elements. Id 0 is the identity.

    The entry [a, b] is the product of a and b. For permutations, the product applies a first, then b.

    Raises:
        ValueError: the group is unknown.
    """
    if group in ("Z60", "Z2"):
        elements = np.arange(int(group[1:]))
        return (elements[:, None] + elements[None, :]) % len(elements)
    if group not in GROUPS:
        raise ValueError(f"group={group!r} is unknown: choose from {', '.join(GROUPS)}")
    permutations = _permutations(group)
    index = {permutation: number for number, permutation in enumerate(permutations)}
    return np.array([[index[tuple(b[i] for i in a)] for b in permutations] for a in permutations])


def _permutations(group: str) -> list[tuple[int, ...]]:
    permutations = itertools.permutations(range(5))
    return [each for each in permutations if group == "S5" or _is_even(each)]


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def moved_points(group: str) -> np.ndarray:
    """The number of points that each element of a permutation group moves, [G].

    Elements with 2 moved points are transpositions. Elements with 3 moved points are 3-cycles.

    Raises:
        ValueError: the group is not a group of permutations.
    """
    if group not in ("S5", "A5"):
        raise ValueError(f"group={group!r} is not a group of permutations: choose from S5, A5")
    return np.array([sum(image != point for point, image in enumerate(each)) for each in _permutations(group)])


def word_problem(
    group: str, rng: np.random.Generator, rows: int, length: int, *, elements: Sequence[int] | np.ndarray | None = None
) -> Batch:
    """A batch of random group elements, [N, length]; the target at each position is the product up to this position.

    Args:
        elements: the ids of the elements that rows contain; None: all elements of the group.

    Raises:
        ValueError: the group or an element is unknown, ``elements`` is empty, or the length is less than 1.
    """
    check_min(1, length=length)
    table = multiplication_table(group)
    chosen = np.arange(len(table)) if elements is None else np.asarray(elements)
    if not (chosen.size and chosen.min() >= 0 and chosen.max() < len(table)):
        raise ValueError(f"elements={elements} must be ids from 0 to {len(table) - 1} of the group {group}")
    tokens = chosen[rng.integers(0, len(chosen), (rows, length))]
    products = np.empty_like(tokens)
    products[:, 0] = tokens[:, 0]
    for position in range(1, length):
        products[:, position] = table[products[:, position - 1], tokens[:, position]]
    return _batch(tokens, products, np.broadcast_to(np.arange(length), tokens.shape))


# ------------------------------------------------------------------------------------------- copying and induction


def copying(rng: np.random.Generator, rows: int, length: int, *, vocab_size: int = 27) -> Batch:
    """A batch of rows with a random string of ``length`` symbols, a separator, and the string again.

    The separator has the id vocab_size - 1. The targets are the symbols of the second string. To predict a symbol, the
    model also reads the earlier symbols of the second string. The last symbol is only a target, so the tokens are
    [N, 2 * length].

    Raises:
        ValueError: the length is less than 1, or ``vocab_size`` is less than 2.
    """
    check_min(1, length=length)
    check_min(2, vocab_size=vocab_size)  # one id is the separator
    symbols = rng.integers(0, vocab_size - 1, (rows, length))
    tokens = np.concatenate([symbols, np.full((rows, 1), vocab_size - 1), symbols[:, :-1]], axis=1)
    return _batch(tokens, symbols, np.broadcast_to(length + np.arange(length), symbols.shape))


def induction(rng: np.random.Generator, rows: int, length: int, *, vocab_size: int = 16) -> Batch:
    """A batch of random tokens, [N, length], in which a special token (id vocab_size - 1) occurs twice.

    The second occurrence is the last token. The target at this position is the token after the first occurrence.

    Raises:
        ValueError: the length is less than 3, or ``vocab_size`` is less than 2.
    """
    check_min(3, length=length)
    check_min(2, vocab_size=vocab_size)  # one id is special
    tokens = rng.integers(0, vocab_size - 1, (rows, length))
    first = rng.integers(0, length - 2, (rows, 1))
    targets = np.take_along_axis(tokens, first + 1, axis=1)
    np.put_along_axis(tokens, first, vocab_size - 1, axis=1)
    tokens[:, -1] = vocab_size - 1
    return _batch(tokens, targets, np.full((rows, 1), length - 1))


def needle(rng: np.random.Generator, rows: int, length: int, text: np.ndarray, *, vocab_size: int) -> Batch:
    """A batch of windows of a text, [N, length]. The model must recall a number that replaces a part of the window.

    A marker and a number of four random digits replace five tokens at a random position. The same marker and the first
    three digits replace the last four tokens. The targets at these four positions are the four digits.

    Args:
        text: tokens of the text, ids in [0, vocab_size), shape [S] with S > length.
        vocab_size: number of ids of the text. The digits have the ids from vocab_size to vocab_size + 9, and the marker
            has the id vocab_size + 10. So the model needs vocab_size + 11 ids.

    Raises:
        ValueError: the length is less than 9, or the text is not longer than the length.
    """
    if length < 9:
        raise ValueError(f"length={length} must be at least 9: a marker and four digits, and a marker and three digits")
    if len(text) <= length:
        raise ValueError(f"the text has {len(text)} tokens: it must be longer than length={length}")
    starts = rng.integers(0, len(text) - length, (rows, 1))
    tokens = text[starts + np.arange(length)].astype(np.int32)
    number = vocab_size + rng.integers(0, 10, (rows, 4))
    marked = np.concatenate([np.full((rows, 1), vocab_size + 10), number], axis=1)
    position = rng.integers(0, length - 8, (rows, 1))
    np.put_along_axis(tokens, position + np.arange(5), marked, axis=1)
    tokens[:, -4:] = marked[:, :4]
    return _batch(tokens, number, np.broadcast_to(length - 4 + np.arange(4), number.shape))


def _batch(
    tokens: np.ndarray,
    targets: np.ndarray,
    positions: np.ndarray,
    weights: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
) -> Batch:
    weights = np.ones(targets.shape) if weights is None else weights
    return Batch(
        tokens.astype(np.int32), targets.astype(np.int32), weights.astype(np.float32),
        segment_ids=None if segment_ids is None else segment_ids.astype(np.int32),
        target_positions=positions.astype(np.int32),
    )  # fmt: skip
