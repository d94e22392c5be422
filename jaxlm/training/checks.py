"""Everything that is checked before a training starts, for all experiments: a mistake costs seconds, not hours.

``experiment.command_line`` calls :func:`check_settings` and :func:`check_output` before any data are read, and
``experiment.prepare_run`` calls the others right before the training. Configs check their own ranges.
"""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxlm import spec
from jaxlm.config import numbers_of
from jaxlm.decoding.config import GenerationConfig, num_ids
from jaxlm.decoding.describe import require_task
from jaxlm.decoding.prompts import source_vocab_size
from jaxlm.models import Model, get_model
from jaxlm.objectives import causal

if TYPE_CHECKING:
    from jaxlm.data import Tokenizer
    from jaxlm.training.evaluation import Evaluator
    from jaxlm.training.loop import TrainingConfig
    from jaxlm.training.trainer import Trainer

LEAST = {
    "vocab_size": 1, "buckets": 1, "num_beams": 1, "sample_tokens": 1, "max_source": 2, "max_summary": 1,
    "max_length": 1, "max_answer_tokens": 1, "max_moves": 1, "max_games": 1, "min_count": 1, "min_frequency": 1,
    "stories": 1, "sentences": 1, "largest_group": 1, "cuts": 1, "horizon": 1, "folds": 2, "stride": 0, "games": 0,
    "mates": 0, "sampled": 0, "random": 0, "engine": 0, "opening_moves": 0, "temperature": 0,
}  # fmt: skip
"""The least value of the settings of experiments, by the last part of their name."""

FRACTIONS = {"validation_fraction", "test_fraction", "label_smoothing"}
"""Settings in [0, 1)."""


def check_settings(experiment: Any, start: Any) -> None:
    """Check the settings of an experiment that need no data.

    Args:
        start: the configuration that the options changed (a preset, or that of the resumed run).

    Raises:
        ValueError: a number out of its range, or a setting that was changed and has no effect.
    """
    for name, value in numbers_of(experiment):
        last = name.rpartition(".")[2]
        if name.startswith(("training.", "optimizer.")):
            continue  # their classes check them
        if value < LEAST.get(last, -math.inf):
            raise ValueError(f"{name}={value} must be at least {LEAST[last]}")
        if last in FRACTIONS and not 0.0 <= value < 1.0:
            raise ValueError(f"{name}={value} must be at least 0 and less than 1")
        if last == "similarity" and not 0.0 < value <= 1.0:
            raise ValueError(f"{name}={value} must be above 0 and at most 1")
        if last == "epochs" and not 0.0 < value <= 1e6:
            raise ValueError(f"{name}={value} must be above 0 and at most a million")
    for name, reason in _unread(experiment):
        value = _get(experiment, name)
        if value != _get(start, name):
            raise ValueError(f"{name}={value} has no effect, because {reason}: leave --{_option(name)} out")


def _option(name: str) -> str:
    return name.replace("_", "-")


def _get(config: Any, name: str, default: Any = None) -> Any:
    """The setting with this dotted name, or ``default`` if the experiment has no such setting."""
    for part in name.split("."):
        config = getattr(config, part, default)
    return config


def _unread(experiment: Any) -> Iterator[tuple[str, str]]:
    """The settings of the experiment that nothing reads, given the others: dotted name and reason."""

    def get(name: str, default: Any = None) -> Any:
        return _get(experiment, name, default)

    for names, unread, reason in RULES:
        if unread(get):
            for name in names.split():
                if _get(experiment, name, _MISSING) is not _MISSING:
                    yield name, reason


_MISSING: Any = object()
_SGD = ("sgd", "nt_asgd")
_Get = Callable[..., Any]


def _reads_source(get: _Get) -> bool:
    """Whether the model of the experiment is an encoder-decoder; True if that is not known."""
    with contextlib.suppress(ValueError):
        return get("model.pretrained") is not None or get_model(get("model.name")).reads_source
    return True


RULES: tuple[tuple[str, Callable[[_Get], bool], str], ...] = (
    ("model.name", lambda get: get("model.pretrained") is not None, "model.pretrained has the model"),
    ("training.steps", lambda get: get("epochs") is not None, "epochs determines the number of steps"),
    (
        "training.sequence_length training.evaluation_batches", lambda get: get("buckets") is not None,
        "batches are made of whole texts, and evaluations read the whole validation part",
    ),
    ("training.keep_last", lambda get: get("training.checkpoint_every") is None, "no checkpoints are saved"),
    (
        "optimizer.final_fraction", lambda get: get("optimizer.schedule") in ("constant", "inverse_square_root"),
        "only the schedules cosine and linear have a final learning rate",
    ),
    ("optimizer.hold_steps", lambda get: get("optimizer.schedule") == "constant", "the schedule is constant"),
    ("optimizer.beta1", lambda get: get("optimizer.name") in ("adafactor", "adadelta"), "it has no momentum"),
    (
        "optimizer.beta2 optimizer.epsilon", lambda get: get("optimizer.name") in ("adafactor", *_SGD),
        "the optimizer does not use it",
    ),
    (
        "tokenizer", lambda get: get("model.pretrained") is not None,
        "the directory of model.pretrained has the tokenizer",
    ),
    (
        "template vocabulary min_frequency", lambda get: get("model.pretrained") is not None,
        "the directory of model.pretrained has the tokenizer",
    ),
    (
        "vocab_size", lambda get: get("model.pretrained") is not None and get("template") is not None,
        "the directory of model.pretrained has the tokenizer",
    ),
    ("length_penalty", lambda get: get("num_beams") == 1, "it ranks beams, and num_beams is 1"),
    (
        "data.test_fraction", lambda get: get("data.test") is not None or get("folds") is not None,
        "data.test or folds determines the test part",
    ),
    ("data.test", lambda get: get("folds") is not None, "folds are made of data.train"),
    ("test_fraction", lambda get: get("test") is not None, "the file of test is the test part"),
    (
        "stories sentences", lambda get: get("stories") is not None and get("data") is not None,
        "data has the questions",
    ),
    ("min_count", lambda get: get("notation") == "uci", "the vocabulary of uci has every move"),
    ("cuts horizon", lambda get: get("cuts") is not None and not _reads_source(get), "it is for encoder-decoders"),
    ("tests.opening_moves", lambda get: get("tests.engine") == 0, "no game against Stockfish is played"),
)  # fmt: skip
"""Settings that nothing reads under a condition: dotted names, condition, reason."""


def check_output(directory: Path, *, resume: bool) -> None:
    """Check that a run can write its directory.

    Raises:
        FileExistsError: a new directory is not empty.
        OSError: it cannot be made, or no file can be made in it.
    """
    if not resume and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if not directory.is_dir():
            raise NotADirectoryError(f"{directory} is a file: choose another --output")
        raise FileExistsError(f"{directory} is not empty: choose another --output, or go on with --resume {directory}")
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    finally:
        for path in missing:  # a run that is refused later leaves nothing
            with contextlib.suppress(OSError):
                path.rmdir()


def check_tokenizer(model: Model, tokenizer: Tokenizer) -> None:
    """Check that a tokenizer belongs to a model. A model may have some unused rows, as padded vocabularies do.

    Raises:
        ValueError: the tokenizer has more ids than the model, or less than nine tenths of them.
    """
    ids, sizes = tokenizer.vocab_size, (model.config.vocab_size, source_vocab_size(model))
    if ids > min(sizes) or ids < 0.9 * min(sizes):
        raise ValueError(
            f"the tokenizer has {ids:,} ids, and the model has {min(sizes):,}: this is the tokenizer of another model; "
            "put that of the model into the directory"
        )


def check_task(trainer: Trainer) -> None:
    """Raise ``ValueError`` if the loss is that of next tokens, and the model predicts something else."""
    if trainer.loss is causal.loss:
        require_task(trainer.model, ("causal", "seq2seq"), "it predicts no next tokens", "choose a family that does")


def check_best_metric(config: TrainingConfig, evaluate: Evaluator) -> None:
    """Raise ``ValueError`` if ``best_metric`` is not among the metrics of the evaluations, as far as they are known."""
    if evaluate.names is not None and config.best_metric not in evaluate.names:
        raise ValueError(
            f"training.best_metric={config.best_metric!r} is not among the validation metrics "
            f"{', '.join(evaluate.names)}: choose one of them"
        )


def check_request(model: Model, tokenizer: Tokenizer, request: GenerationConfig) -> GenerationConfig:
    """``request`` with every field given, if the model can generate text as it asks.

    Raises:
        ValueError: a value outside its range.
    """
    resolved = request.resolve(model, tokenizer)
    check_beams(model, tokenizer, resolved)
    return resolved


def check_beams(model: Model, tokenizer: Tokenizer, request: GenerationConfig) -> None:
    """Raise ``ValueError`` if a request asks for more beams than there are ids."""
    ids = num_ids(model, tokenizer)
    if request.num_beams is not None and request.num_beams > ids:
        raise ValueError(f"num_beams={request.num_beams} must be at most the {ids} ids of the vocabulary")


def check_space(directory: Path, trainer: Trainer, *, checkpoints: bool) -> None:
    """Check that the disk has room for one checkpoint and the exported model.

    Args:
        checkpoints: whether the run saves checkpoints.

    Raises:
        OSError: there is less (``ENOSPC``).
    """
    needed = _bytes(spec.abstract(trainer.model.specs)) + (_bytes(trainer.abstract()) if checkpoints else 0)
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        what = "one checkpoint and the exported model" if checkpoints else "the exported model"
        raise OSError(
            errno.ENOSPC, f"{directory} needs {needed:,} bytes for {what}, and {free:,} bytes are free on its disk"
        )


def _bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.shape) * (8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(tree)
    )
