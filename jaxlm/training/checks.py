"""Checks of an experiment. They run before the first training step, so that a run with a wrong setting fails early.

``jaxlm.training.experiment.command_line`` calls :func:`check_settings`, :func:`check_cpu_choices` and, if ``--output``
or ``--resume`` is given, :func:`check_output` before any data is read. ``jaxlm.training.experiment.prepare_run`` runs
directly before training. It calls all checks of this module except :func:`check_settings` and
:func:`check_cpu_choices`. The config classes of the model, the training and the optimizer check the ranges of their own
fields.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxlm import integrity, processes
from jaxlm.config import numbers_of
from jaxlm.data.tokenizers import TOKENIZER_FILES, num_required_ids
from jaxlm.decoding.describe import require_task
from jaxlm.decoding.prompts import source_vocab_size
from jaxlm.models import Model, get_model
from jaxlm.nn.cpu_choices import VARIABLE, cpu_choices
from jaxlm.objectives import causal

if TYPE_CHECKING:  # so that the commands that import this module start without orbax
    from jaxlm.data import Tokenizer
    from jaxlm.training.evaluation import Evaluator
    from jaxlm.training.loop import TrainingConfig
    from jaxlm.training.trainer import Trainer

MINIMUMS = {
    "vocab_size": 1, "buckets": 1, "num_beams": 1, "sample_tokens": 1, "max_source": 2, "max_summary": 1,
    "max_length": 1, "max_answer_tokens": 1, "max_moves": 1, "max_games": 1, "min_count": 1, "min_frequency": 1,
    "stories": 1, "sentences": 1, "largest_group": 1, "positions_per_game": 1, "target_length": 1, "folds": 2,
    "stride": 0, "games": 0, "mates": 0, "sampled": 0, "random": 0, "engine": 0, "opening_moves": 0, "temperature": 0,
}  # fmt: skip
"""Minimums of settings. A key is the last part of a dotted name: ``largest_group`` for ``data.largest_group``.

:func:`check_settings` checks these minimums and the ranges of fractions, ``similarity`` and ``epochs``. The config
classes check the settings of ``training`` and ``optimizer``. All other settings have no minimum."""

FRACTION_SETTINGS = {"validation_fraction", "test_fraction", "label_smoothing"}
"""Settings that must be in [0, 1). Each entry is the last part of a dotted name."""

NONZERO_FRACTIONS = {"validation_fraction", "data.validation_fraction", "data.test_fraction"}
"""Dotted names of fractions that must be above 0, because the split with this fraction must not be empty."""


PRETRAINED_PRESETS = {"minilm": "a directory with the files of a MiniLM"}
"""Presets with settings for fine-tuning: name of the preset -> description of the directory that
``--model.pretrained`` must name."""


def check_settings(experiment: Any, initial: Any, preset: str | None = None) -> None:
    """Check the settings of an experiment without reading its data.

    Args:
        initial: the configuration before the command-line options changed it (``ExperimentOptions.initial``): the
            default configuration, the preset, or the configuration of the resumed run.
        preset: the name of the preset; None if there is none.

    Raises:
        ValueError: a number is out of its range, an option changed a setting that has no effect
            (:data:`NO_EFFECT_RULES`), or the preset needs pretrained weights (:data:`PRETRAINED_PRESETS`).
    """
    if preset in PRETRAINED_PRESETS and experiment.model.pretrained is None:
        raise ValueError(f"--preset {preset} needs --model.pretrained: {PRETRAINED_PRESETS[preset]}")
    for name, value in numbers_of(experiment):
        field = name.rpartition(".")[2].partition("[")[0]
        if name.startswith(("training.", "optimizer.")):
            continue  # TrainingConfig and OptimizerConfig check these
        if value < MINIMUMS.get(field, -math.inf):
            raise ValueError(f"{name}={value} must be at least {MINIMUMS[field]}")
        if field in FRACTION_SETTINGS and not 0.0 <= value < 1.0:
            raise ValueError(f"{name}={value} must be at least 0 and less than 1")
        if name in NONZERO_FRACTIONS and value == 0.0:
            raise ValueError(f"{name}={value} must be above 0: this split must not be empty")
        if field == "similarity" and not 0.0 < value <= 1.0:
            raise ValueError(f"{name}={value} must be above 0 and at most 1")
        if field == "epochs" and not 0.0 < value <= 1e6:
            raise ValueError(f"{name}={value} must be above 0 and at most a million")
    for names, has_no_effect, reason in NO_EFFECT_RULES:
        if has_no_effect(functools.partial(_get, experiment)):
            for name in names.split():
                if (value := _get(experiment, name)) != _get(initial, name):
                    option = name.replace("_", "-")
                    raise ValueError(f"{name}={value} has no effect, because {reason}: leave --{option} out")


def check_cpu_choices() -> None:
    """Check, on a CPU, that the file of ``JAXLM_CHOICES`` is valid, and that all processes have the same CPU choices.

    Raises:
        FileNotFoundError, ValueError: as in ``jaxlm.nn.cpu_choices.active_calibration``.
        ValueError: the CPU choices of this process (``jaxlm.nn.cpu_choices.CpuChoices``) differ from those of the first
            process. The two processes would then compile different programs.
    """
    if jax.default_backend() != "cpu":
        return
    values = cpu_choices().changes()
    first = processes.call_in_first_process(lambda: values)
    if values != first:
        raise ValueError(
            f"{VARIABLE}: this process has {values}, but the first process has {first}: set {VARIABLE} to a file with "
            "the same values in all processes, or unset it"
        )


def _get(config: Any, name: str) -> Any:
    """The value of the setting with this dotted name, or None if the experiment has no such setting."""
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


_Get = Callable[[str], Any]


def _reads_source(get: _Get) -> bool:
    """Whether the model of the experiment is an encoder-decoder.

    The result is also True if the kind of model is not known here: the weights are pretrained, or no family or variant
    has the name ``model.name``."""
    with contextlib.suppress(ValueError):
        return get("model.pretrained") is not None or get_model(get("model.name")).reads_source
    return True


NO_EFFECT_RULES: tuple[tuple[str, Callable[[_Get], bool], str], ...] = (
    ("model.name", lambda get: get("model.pretrained") is not None, "model.pretrained determines the model"),
    ("training.steps", lambda get: get("epochs") is not None, "epochs determines the number of steps"),
    (
        "training.sequence_length training.evaluation_batches", lambda get: get("buckets") is not None,
        "batches are made of examples with similar lengths, and evaluations use the complete validation split",
    ),
    ("training.keep_last", lambda get: get("training.checkpoint_every") is None, "no checkpoints are saved"),
    (
        "optimizer.final_fraction", lambda get: get("optimizer.schedule") in ("constant", "inverse_square_root"),
        "only the schedules cosine and linear have a final learning rate",
    ),
    ("optimizer.hold_steps", lambda get: get("optimizer.schedule") == "constant", "the schedule is constant"),
    (
        "optimizer.beta1", lambda get: get("optimizer.name") in ("adafactor", "adadelta"),
        "the optimizer does not use it",
    ),
    (
        "optimizer.beta2 optimizer.epsilon", lambda get: get("optimizer.name") in ("adafactor", "sgd", "nt_asgd"),
        "the optimizer does not use it",
    ),
    (
        "tokenizer template vocabulary vocab_size min_frequency min_count",
        lambda get: get("model.pretrained") is not None,
        "the directory of model.pretrained contains the tokenizer",
    ),
    (
        "data.train data.validation data.test data.source data.target data.on_error",
        lambda get: get("data.source") is not None and get("data.directory") is None,
        "data.directory is not set, so the included Bible verses are used",
    ),
    (
        "data.encoding data.on_error",
        lambda get: get("data.encoding") is not None and get("data.train") is None and get("data.test") is None,
        "data.train is not set, so the included passages of plays are used",
    ),
    ("length_penalty", lambda get: get("num_beams") == 1, "it ranks the results of beam search, but num_beams is 1"),
    (
        "data.test_fraction", lambda get: get("data.test") is not None or get("folds") is not None,
        "data.test or folds determines the test split",
    ),
    ("data.test", lambda get: get("folds") is not None, "folds are made of data.train"),
    ("test_fraction", lambda get: get("test") is not None, "the test split is read from the file of --test"),
    (
        "stories sentences", lambda get: get("stories") is not None and get("data") is not None,
        "the questions are read from the file of --data",
    ),
    ("min_count", lambda get: get("notation") == "uci", "the uci vocabulary contains every move"),
    (
        "positions_per_game target_length",
        lambda get: get("positions_per_game") is not None and not _reads_source(get), "only encoder-decoders use it",
    ),
    ("tests.opening_moves", lambda get: get("tests.engine") == 0, "no game against Stockfish is played"),
)  # fmt: skip
"""Rules (names, condition, reason). ``names`` are dotted names of settings, separated by spaces. These settings have no
effect if ``condition(get)`` is True, where ``get(name)`` returns the value of the setting with this dotted name."""


def check_output(directory: Path, *, resume: bool) -> None:
    """Check that a run can write to its directory.

    The directory of a new run must be empty or not exist. A run that was killed at its start may leave the files of a
    tokenizer in ``model/``, the temporary file of ``config.json``, and empty directories. A directory with only these
    entries counts as empty.

    Raises:
        FileExistsError: the directory of a new run is not empty.
        NotADirectoryError: ``directory`` is a file.
        OSError: the directory, or a file in it, cannot be created.
    """
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: choose another --output")
    if not resume and directory.exists() and not _is_unused(directory):
        raise FileExistsError(
            f"{directory} is not empty: choose another --output, or continue with --resume {directory}"
        )
    new_directories = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    finally:
        for path in new_directories:  # a later check may fail, and a failed start must not leave an empty directory
            with contextlib.suppress(OSError):
                path.rmdir()


def _is_unused(directory: Path) -> bool:
    """Whether :func:`check_output` counts an existing directory as empty."""
    temporary = ".config.json"  # the temporary name of config.json (integrity.replace_text)
    entries = [path for path in directory.iterdir() if path.name != temporary]
    if not all(path.is_dir() for path in entries):
        return False
    return all(entry.name == "model" and path.name in TOKENIZER_FILES for entry in entries for path in entry.iterdir())


def check_tokenizer(model: Model, tokenizer: Tokenizer) -> None:
    """Check that the vocabulary sizes of a tokenizer and a model match.

    The model may have more ids than the tokenizer, because vocabularies are padded. The number of ids of an
    encoder-decoder is the size of the smaller of its two vocabularies (source and target).

    Raises:
        ValueError: the tokenizer needs more ids than the model has (``num_required_ids``), or the tokenizer has fewer
            than 90 % of the number of ids of the model.
    """
    tokenizer_ids, model_ids = tokenizer.vocab_size, min(model.config.vocab_size, source_vocab_size(model))
    if num_required_ids(tokenizer) > model_ids or tokenizer_ids < 0.9 * model_ids:
        raise ValueError(
            f"the tokenizer has {tokenizer_ids:,} ids, and the model has {model_ids:,}: this is the tokenizer of "
            "another model; replace it with the tokenizer of the model"
        )


def check_task(trainer: Trainer) -> None:
    """Raise ``ValueError`` if the loss is a loss of next-token prediction and the model has no next-token head.

    These losses are ``causal.loss`` and ``causal.training_loss(model)``. Other losses, for example with label
    smoothing, are not checked. The objectives ``masked``, ``permutation`` and ``token_classification`` use the same
    function as ``causal.loss``, and their models have no next-token head. So their trainers are rejected.
    """
    if trainer.loss in (causal.loss, causal.training_loss(trainer.model)):
        require_task(trainer.model, ("causal", "seq2seq"), "it predicts no next tokens", "choose a family that does")


def check_best_metric(config: TrainingConfig, evaluate: Evaluator) -> None:
    """Raise ``ValueError`` if ``best_metric`` is not in ``evaluate.names``. If ``names`` is None, check nothing."""
    if evaluate.names is not None and config.best_metric not in evaluate.names:
        raise ValueError(
            f"training.best_metric={config.best_metric!r} is not among the validation metrics "
            f"{', '.join(evaluate.names)}: choose one of them"
        )


def check_space(directory: Path, trainer: Trainer, *, checkpoints: bool) -> None:
    """Check that the disk has space for the exported model and one checkpoint.

    Args:
        checkpoints: whether the run saves checkpoints. If False, no space for a checkpoint is needed.

    Raises:
        OSError: the disk does not have enough free space (``ENOSPC``).
    """
    needed = _num_bytes(trainer.model.specs) + (_num_bytes(trainer.abstract()) if checkpoints else 0)
    free = shutil.disk_usage(integrity.nearest_existing(directory)).free
    if free < needed:
        files = "one checkpoint and the exported model" if checkpoints else "the exported model"
        raise OSError(
            errno.ENOSPC, f"{directory} needs {needed:,} bytes for {files}, and {free:,} bytes are free on its disk"
        )


def _num_bytes(tree: Any) -> int:
    """Number of bytes of all arrays in a tree of specs or ``jax.ShapeDtypeStruct``."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
