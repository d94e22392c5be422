"""The experiment that trains every family: its recipes and data, and the files of a short run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import jaxlm
from experiments import families
from jaxlm.models import FAMILIES, bert, get_model
from jaxlm.objectives.batch import Batch
from jaxlm.training.recipes import recipe

NO_HEAD = get_model("bert-tiny", task="none")


@pytest.fixture(scope="module")
def data() -> families.Data:
    return families.Data.load()


@pytest.fixture(params=["with an entry", "without an entry"])
def recipe_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], families.Recipe]:
    if request.param == "without an entry":
        monkeypatch.setattr(families, "RECIPES", {})
    return families.recipe_of


def test_the_rows_of_a_family_without_a_recipe_fit_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(families.RECIPES, "gpt")
    recipe_without_entry = families.recipe_of("gpt")
    assert recipe_without_entry.length == recipe_without_entry.build().max_positions == 64


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"NEEDS_WHOLE_TEXT": True}, "family 'bert' must read a text from its first token"),
        (
            {"VARIANTS": {"bert-tiny": NO_HEAD.config}, "Config": lambda: NO_HEAD.config},
            "family 'bert' has no variant that experiments.families can train: add a variant",
        ),
    ],
)
def test_a_family_that_cannot_be_trained_is_an_error_before_the_first_training(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delitem(families.RECIPES, "bert")
    for name, value in changes.items():
        monkeypatch.setattr(bert, name, value, raising=False)
    monkeypatch.setattr(families, "train_family", lambda *_: pytest.fail("the training started"))
    assert families.main(["--family", "lstm", "bert", "--output", str(tmp_path / "run")]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("signal", "error", "arguments"), [("SIGINT", KeyboardInterrupt, ()), ("SIGTERM", SystemExit, (143,))]
)
def test_the_exit_status_depends_on_the_signal(
    signal: str, error: type[BaseException], arguments: tuple[int, ...], data: families.Data,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(families, "train", lambda *_: SimpleNamespace(validation_loss=None, interrupted=signal))
    with pytest.raises(error) as caught:
        families.train_family("lstm", data, tmp_path)
    assert caught.value.args == arguments


ROW = families.Row("lstm", "lstm", "causal", "adamw", 1, 2, 3.0, 4567.0, 1.0, 2.0)


def test_no_family_starts_after_a_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results, drawn = [(ROW, "SIGINT")], []
    monkeypatch.setattr(families, "train_family", lambda *_: results.pop())
    monkeypatch.setattr(families, "draw", lambda rows, directory: drawn.append(rows))
    (tmp_path / "run").mkdir()
    with pytest.raises(KeyboardInterrupt):
        families.run(["lstm", "gru"], tmp_path / "run")
    assert [row["family"] for row in json.loads((tmp_path / "run" / "results.json").read_text())] == ["lstm"]
    assert drawn == [[ROW]]


def test_the_table_has_the_tokens_per_second() -> None:
    header, _, line = families.table([ROW]).splitlines()
    assert dict(zip(header.split(" | "), line.split(" | "), strict=True))["tokens/s"] == "4,567"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_optimizer_is_the_published_one_or_adamw(name: str) -> None:
    config, published = families.recipe_of(name).optimizer(1000), recipe(name)
    assert config.name in (published.name, "adamw")
    if config.name == published.name:
        assert (config.beta1, config.beta2, config.weight_decay) == (
            published.beta1,
            published.beta2,
            published.weight_decay,
        )
    assert families.recipe_of(name).optimizer(2).warmup_steps <= 1, "the warm-up is shorter than a run of two steps"


def test_t5_uses_the_published_adafactor_recipe() -> None:
    assert families.recipe_of("t5").optimizer(1200) == recipe("t5")
    assert recipe("t5").name == "adafactor"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_fits_the_model_and_is_reproducible(
    name: str, data: families.Data, recipe_of: Callable[[str], families.Recipe]
) -> None:
    recipe = recipe_of(name)
    model, make_batch = recipe.build(), families.to_batch(recipe)
    source = families.source(data, recipe, "training", 0)
    window = source.batch(3, range(recipe.batch_size))
    batch, repeated = make_batch(window), make_batch(source.batch(3, range(recipe.batch_size)))
    assert all(map(np.array_equal, jax.tree.leaves(batch), jax.tree.leaves(repeated)))
    assert batch.tokens.max() < model.config.vocab_size
    assert batch.weights.sum() > 0
    inputs = {**batch.inputs, "segment_ids": batch.segment_ids}
    if recipe.state_length is not None:
        inputs["state"] = jax.tree.map(np.zeros_like, model.init_state(recipe.batch_size, recipe.state_length))
    params = jax.eval_shape(model.init, jax.random.key(0))
    hidden = jax.eval_shape(lambda params: model.apply(params, batch.tokens, **inputs)[0], params)
    assert hidden.shape[0] == recipe.batch_size


def test_the_label_of_a_passage_is_its_play(data: families.Data) -> None:
    rows = data.passages("validation", 50, 50).reshape(-1, 51)
    assert sorted(set(rows[:, -1])) == list(range(13))
    for row in rows[::97]:
        play = data.plays[row[-1]]
        windows = np.lib.stride_tricks.sliding_window_view(play[int(len(play) * 0.9) :], 50)
        assert (windows == row[:-1]).all(axis=1).any()


def test_entropy_ignores_targets_with_weight_0() -> None:
    batch = Batch(None, np.array([[0, 1, 2, 2]]), np.array([[1.0, 1.0, 0.0, 0.0]]))
    assert families.entropy([batch, batch]) == pytest.approx(np.log(2))


@pytest.mark.thorough
def test_a_run_writes_a_table_a_plot_and_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert families.main(["--family", "lstm", "resnet_lm", "--steps", "3", "--output", str(run)]) == 0
    assert (run / "losses.png").stat().st_size > 10_000
    rows = json.loads((run / "results.json").read_text())
    assert [row["family"] for row in rows] == ["lstm", "resnet_lm"]
    assert [row["optimizer"] for row in rows] == ["adamw", "adamw"]
    assert all(3.0 < row["loss"] < 5.5 and 3.3 < row["entropy"] < 3.4 for row in rows)
    assert (run / "table.md").read_text() in capsys.readouterr().out
    model, _ = jaxlm.load_pretrained(run / "lstm" / "model")
    assert model == families.recipe_of("lstm").build()
    assert families.main(["--family", "lstm", "--steps", "3", "--output", str(run)]) == 2
    assert "is not empty: choose another --output" in capsys.readouterr().err
