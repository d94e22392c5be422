"""The laboratory: every model has a run, results are kept, claims are judged, the page is complete."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.laboratory import __main__ as command
from experiments.laboratory import page, runs
from experiments.laboratory.catalogue import EXPERIMENTS, Claim
from experiments.laboratory.models import MODELS, model_of
from jaxlm.models import FAMILIES, get_model

PLAN = runs.Plan(steps=4, widths=(32,), layers=1, learning_rates=(1e-3, 1e-2), seeds=2, test_batches=1)


def result(case="64 tokens, 4 pairs", model="gpt", width=64, rate=1e-3, seed=0, accuracy=0.5, layers=2, steps=3000):
    accuracies = {"validation": accuracy, "test": accuracy}
    return runs.Result(
        "recall", case, model, width, rate, seed, layers, steps, accuracies, 1000, steps, 1.0, 60.0, "a processor"
    )


def test_every_causal_family_has_a_model():
    families = {model_of(name, vocab_size=8, width=32, layers=1, max_length=8).family for name in MODELS}
    causal = {name for name in FAMILIES if get_model(name).task == "causal" and not get_model(name).reads_source}
    # Their memory or pooling needs rows of a certain length, or they repeat another family.
    assert causal - families <= {"transformer_xl", "alexnet"}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_requested_size_and_no_dropout(name):
    model = model_of(name, vocab_size=11, width=64, layers=1, max_length=20)
    assert model.config.vocab_size == 11
    assert all(value == 0.0 for field, value in vars(model.config).items() if field.endswith("dropout"))
    hidden, _ = jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), np.zeros((2, 20), np.int32))
    assert hidden.shape[:2] == (2, 20)


def test_training_learns_a_task_and_is_repeatable():
    case = EXPERIMENTS["formal_languages"].cases["bucket_sort"]
    case = dataclasses.replace(case, tests={runs.VALIDATION: case.training})
    plan = dataclasses.replace(PLAN, steps=60)
    first = runs.train("formal_languages", "bucket_sort", case, plan, "gru", 32, 2e-2, 0)
    assert first.accuracy["validation"] > 0.3  # guessing: 0.2
    again = runs.train("formal_languages", "bucket_sort", case, plan, "gru", 32, 2e-2, 0)
    assert (again.accuracy, again.loss) == (first.accuracy, first.loss)


def test_a_run_ends_at_the_requested_accuracy():
    case = EXPERIMENTS["state_tracking"].cases["Z60"]
    plan = dataclasses.replace(PLAN, steps=50, stop_at=0.0, evaluate_every=5)
    assert runs.train("state_tracking", "Z60", case, plan, "gru", 32, 1e-3, 0).steps == 5


def test_results_are_kept_and_not_computed_again(tmp_path, monkeypatch):
    trained = []

    def train(experiment, case_name, case, plan, model, width, rate, seed):
        trained.append((rate, seed))
        return result(
            model=model, width=width, rate=rate, seed=seed, accuracy=rate, layers=plan.layers, steps=plan.steps
        )

    monkeypatch.setattr(runs, "train", train)
    case = EXPERIMENTS["recall"].cases["64 tokens, 4 pairs"]
    arguments = "recall", "64 tokens, 4 pairs", case, PLAN, "gpt", 64
    for _ in range(2):
        runs.run_model(*arguments, runs.Results(tmp_path / "recall.jsonl"), lambda result: None)
        assert trained == [(1e-3, 0), (1e-2, 0), (1e-2, 1)]  # seed 1 only with the better rate
    assert [kept.seed for kept in runs.Results(tmp_path / "recall.jsonl")] == [0, 0, 1]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "recall.jsonl").write_text('{"experiment": "recall"}\n')
    with pytest.raises(ValueError, match=r"recall.jsonl, line 1 is not a result: delete the line"):
        runs.Results(tmp_path / "recall.jsonl")


def test_page_selects_rates_and_judges_claims(tmp_path):
    experiment = EXPERIMENTS["recall"]
    measured = [result(rate=1e-2, accuracy=0.2), *(result(seed=seed, accuracy=0.9 + seed / 100) for seed in range(3))]
    measured += [result(model="resnet_lm", case="128 tokens, 8 pairs", accuracy=0.3)]
    measured += [result(model="resnet_lm", case="128 tokens, 8 pairs", width=128, accuracy=1.0)]  # not in the claim
    chosen = page.selected(experiment, measured)
    assert [run.seed for run in chosen["64 tokens, 4 pairs", "gpt", 64]] == [0, 1, 2]
    assert page.mean_and_interval([0.90, 0.91, 0.92]) == "0.910 ± 0.025"  # 4.30 * 0.01 / sqrt(3)
    judged = [page.agreement(claim, chosen) for claim in experiment.claims]
    assert judged == [("0.91", "no"), ("0.30", "yes")]
    other = Claim("", "", ("lstm",), "validation", minimum=0.5)
    assert page.agreement(other, chosen) == ("", "not measured")
    path = page.write({"recall": measured}, tmp_path)
    text = path.read_text()
    assert "| 64 tokens, 4 pairs | gpt | 64 | 1,000 | 0.910 ± 0.025 | 0.910 ± 0.025 | 0.001 | 3 | 1.0 |" in text
    assert "Formal languages" not in text
    assert (tmp_path / "pictures/laboratory_recall.png").stat().st_size > 5000


def test_command_runs_quick_experiments_and_writes_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "QUICK_STEPS", 2)
    output = ["--quick", "--output", str(tmp_path), "--model", "gru"]
    assert command.main(["state_tracking", *output]) == 0
    assert capsys.readouterr().out.count("\n") == 3  # one line per group
    assert command.main(["--page", str(tmp_path / "docs"), *output]) == 0
    text = (tmp_path / "docs/laboratory.md").read_text()
    assert "| S5 | gru | 128 |" in text
    assert "2 layers; 2 steps;" in text


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["recal"])
    assert "invalid choice: 'recal'" in capsys.readouterr().err
