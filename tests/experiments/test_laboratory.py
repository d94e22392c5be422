"""The laboratory: every model has a run, results are kept, claims are judged, the page is complete."""

import dataclasses
import functools
import shlex

import jax
import numpy as np
import pytest

from experiments.laboratory import __main__ as command
from experiments.laboratory import page, pronunciation, runs, scaling, war_and_peace
from experiments.laboratory.catalogue import EXPERIMENTS, Claim
from experiments.laboratory.models import ENCODER_DECODERS, MODELS, model_of
from jaxlm import spec
from jaxlm.decoding import generate
from jaxlm.models import FAMILIES, get_model, registry
from jaxlm.objectives import seq2seq
from jaxlm.testing.helpers import initial_params
from tests.pages import ROOT

PLAN = runs.Plan(steps=4, widths=(32,), layers=1, learning_rates=(1e-3, 1e-2), seeds=2, test_batches=1)


def result(case="64 tokens, 4 pairs", model="gpt", width=64, rate=1e-3, seed=0, accuracy=0.5, layers=2, steps=None):
    steps = EXPERIMENTS["recall"].plan.steps if steps is None else steps
    accuracies = {"validation": accuracy, "test": accuracy}
    return runs.Result(
        "recall", case, model, width, rate, seed, layers, steps, accuracies, 1000, steps, 1.0, 60.0, "a processor"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_causal_family_and_encoder_decoder_has_a_model_with_its_name(name):
    sizes = {"vocab_size": 32, "layers": 2, "max_length": 12}
    variants = [get_model(variant) for variant in (name, *registry.family(name).VARIANTS)]
    if not any(model.task == "causal" or model.reads_source for model in variants):
        with pytest.raises(ValueError, match=f"family '{name}' has no causal variant and no encoder-decoder"):
            model_of(name, width=64, **sizes)
        return
    narrow, wide = (model_of(name, width=width, **sizes) for width in (64, 128))
    assert (narrow.family, narrow.config.vocab_size, wide.config.embed_dim) == (name, 32, 128)
    # Weights of most matrices grow in both dimensions.
    assert 3.0 < wide.num_parameters / narrow.num_parameters < 4.1


@pytest.mark.parametrize("name", [*MODELS, *ENCODER_DECODERS])
def test_models_have_the_number_of_layers_of_each_plan(name):
    for layers in {experiment.plan.layers for experiment in EXPERIMENTS.values()} | {1, 3}:
        model = model_of(name, vocab_size=8, width=64, layers=layers, max_length=8)
        num_layers = len(model.config.blocks) if name == "resnet_lm" else model.config.num_layers
        assert num_layers == layers
        assert model.num_parameters > 0


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_requested_size_and_no_dropout(name):
    model = model_of(name, vocab_size=11, width=64, layers=1, max_length=20)
    assert model.config.vocab_size == 11
    assert all(value == 0.0 for field, value in vars(model.config).items() if field.endswith("dropout"))
    hidden, _ = jax.eval_shape(model.apply, jax.eval_shape(model.init, jax.random.key(0)), np.zeros((2, 20), np.int32))
    assert hidden.shape[:2] == (2, 20)


def test_a_hybrid_of_two_layers_has_attention():
    hybrid, recurrent = (model_of(name, vocab_size=8, width=64, layers=2, max_length=8) for name in ("griffin", "hawk"))
    assert any("attention" in path for path in spec.flatten(hybrid.specs))
    assert not any("attention" in path for path in spec.flatten(recurrent.specs))


@pytest.mark.thorough
def test_training_learns_a_task_and_is_repeatable():
    case = EXPERIMENTS["formal_languages"].cases["bucket_sort"]
    case = dataclasses.replace(case, tests={runs.VALIDATION: case.training})
    plan = dataclasses.replace(PLAN, steps=60)
    training = runs.Training("formal_languages", "bucket_sort", case, plan, "gru", 32)
    first = training.run(2e-2, 0)
    assert first.accuracy["validation"] > 0.3  # guessing: 0.2
    slow = training.run(1e-4, 0)
    assert slow.loss > first.loss
    again = training.run(2e-2, 0)
    assert (again.accuracy, again.loss) == (first.accuracy, first.loss)


@pytest.mark.thorough
def test_a_run_ends_at_the_requested_accuracy():
    case = EXPERIMENTS["state_tracking"].cases["Z60"]
    plan = dataclasses.replace(PLAN, steps=50, stop_at=0.0, evaluate_every=5)
    assert runs.Training("state_tracking", "Z60", case, plan, "gru", 32).run(1e-3, 0).steps == 5


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["t5", "gpt"])
def test_pronunciations_are_learned_with_and_without_an_encoder(name):
    case = EXPERIMENTS["pronunciation"].cases["CMUdict"]
    plan = dataclasses.replace(PLAN, steps=3)
    trained = runs.Training("pronunciation", "CMUdict", case, plan, name, 32).run(1e-3, 0)
    assert set(trained.accuracy) == {"validation", "test"}
    assert trained.accuracy["test"] < 0.1
    assert 2.0 < trained.loss < np.log(case.vocab_size) + 0.7


@pytest.mark.thorough
def test_word_accuracy_equals_greedy_decoding():
    """A word is right if one of its pronunciations is the greedily decoded one."""
    model = model_of("lstm", vocab_size=pronunciation.CASE.vocab_size, width=32, layers=1, max_length=41)
    params = initial_params(model)
    letters = [5, 9, 4]
    prompt = np.array([[*letters, pronunciation.START]], np.int32)
    out = generate(model, params, prompt, max_new_tokens=3, num_allowed_ids=model.config.vocab_size)
    decoded = np.asarray(out.tokens)[0].tolist()
    others = [[40, 41, 42], [decoded[0], decoded[1], decoded[2] + 1], [decoded[0] + 1, *decoded[1:]]]

    word_accuracy = jax.jit(functools.partial(pronunciation.word_accuracy, model))

    def accuracy(*pronunciations):
        batch = seq2seq.batch(np.array([letters] * 4), np.array(pronunciations), start_id=pronunciation.START)
        right, words, _ = word_accuracy(params, seq2seq.to_decoder_only_batch(batch))
        return float(right), float(words)

    assert accuracy(decoded, *others) == (1.0, 1.0)
    assert accuracy(*others, decoded) == (1.0, 1.0)
    assert accuracy(*others, others[0]) == (0.0, 1.0)


def test_words_of_the_splits_differ():
    parts = pronunciation._parts()
    words = [word for part in parts for word in part]
    assert len(words) == len(set(words)) > 126_000
    assert [len(part) / len(words) for part in parts] == pytest.approx([0.85, 0.05, 0.1], abs=1e-4)
    assert max(len(p) for part in parts for p in part.values()) == pronunciation.MAX_PRONUNCIATIONS


def test_results_are_kept_and_not_computed_again(tmp_path, monkeypatch):
    trained = []

    class Training:
        def __init__(self, experiment, case_name, case, plan, model, width):
            self.settings = {"model": model, "width": width, "layers": plan.layers, "steps": plan.steps}

        def run(self, rate, seed):
            trained.append((rate, seed))
            return result(rate=rate, seed=seed, accuracy=rate, **self.settings)

    monkeypatch.setattr(runs, "Training", Training)
    case = EXPERIMENTS["recall"].cases["64 tokens, 4 pairs"]
    arguments = "recall", "64 tokens, 4 pairs", case, PLAN, "gpt", 64
    for _ in range(2):
        runs.run_model(*arguments, runs.Results(tmp_path / "recall.jsonl"), lambda result: None)
        assert trained == [(1e-3, 0), (1e-2, 0), (1e-2, 1)]  # seed 1 only with the better rate
    assert [kept.seed for kept in runs.Results(tmp_path / "recall.jsonl")] == [0, 0, 1]
    with (tmp_path / "recall.jsonl").open("a") as file:
        file.write('{"experiment": "rec')  # the disk was full
    results = runs.Results(tmp_path / "recall.jsonl")
    results.add(result(seed=5))
    assert [kept.seed for kept in runs.Results(tmp_path / "recall.jsonl")] == [0, 0, 1, 5]


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "recall.jsonl").write_text('{"experiment": "recall"}\n')
    with pytest.raises(ValueError, match=r"recall.jsonl, line 1 is not a result: delete the line"):
        runs.Results(tmp_path / "recall.jsonl")


def test_a_bad_output_fails_before_the_first_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "run_model", lambda *arguments: pytest.fail("a model was trained"))
    (tmp_path / "file").write_text("")
    arguments = ["recall", "--model", "gpt", "--width", "64", "--output", str(tmp_path / "file")]
    assert command.main(arguments) == 2
    assert "is a file: choose another --output" in capsys.readouterr().err


def test_page_selects_rates_and_judges_claims(tmp_path):
    experiment = EXPERIMENTS["recall"]
    measured = [result(rate=1e-2, accuracy=0.2), *(result(seed=seed, accuracy=0.9 + seed / 100) for seed in range(3))]
    measured += [result(model="resnet_lm", case="128 tokens, 8 pairs", accuracy=0.3)]
    measured += [result(model="resnet_lm", case="128 tokens, 8 pairs", width=128, accuracy=1.0)]  # not in the claim
    chosen = page.best_runs(experiment, measured)
    assert [run.seed for run in chosen["64 tokens, 4 pairs", "gpt", 64]] == [0, 1, 2]
    assert page.mean_and_interval([0.90, 0.91, 0.92]) == "0.910 ± 0.025"  # 4.30 * 0.01 / sqrt(3)
    judged = [page.agreement(claim, chosen) for claim in experiment.claims]
    assert judged == [("0.91", "± 0.02", "no"), ("0.30", "one seed", "yes")]
    other = Claim("", "", ("lstm",), "validation", minimum=0.5)
    assert page.agreement(other, chosen) == ("", "", "not measured")
    path = page.write({"recall": measured}, tmp_path)
    text = path.read_text()
    assert (
        "| Attention solves the task at all lengths and widths | Arora et al. 2024 (Zoology), figure 2 | 1.00 | 0.91 | "
        "± 0.02 | no (test ≥ 0.95); 1 of 12 rows measured | "
        "`recall --model gpt --case '64 tokens, 4 pairs' --width 64` | 4.0 |"  # four runs of a minute
    ) in text
    assert "| 64 tokens, 4 pairs | gpt | 64 | 1,000 | 0.910 ± 0.025 | 0.910 ± 0.025 | 0.001 | 3 | 1.0 |" in text
    assert "Formal languages" not in text
    assert (tmp_path / "pictures/laboratory_recall.png").stat().st_size > 5000


def test_the_intervals_of_a_claim_are_those_of_its_smallest_and_largest_accuracy():
    measured = [result(model="gpt", seed=seed, accuracy=0.9 + seed / 100) for seed in range(3)]
    measured += [result(model="llama", seed=seed, accuracy=0.2 + seed / 10) for seed in range(2)]
    chosen = page.best_runs(EXPERIMENTS["recall"], measured)
    claim = EXPERIMENTS["recall"].claims[0]
    assert page.agreement(claim, chosen) == ("0.25 to 0.91", "± 0.64, ± 0.02", "no")  # 12.7 * 0.0707 / sqrt(2)


@pytest.mark.parametrize("name", [name for name, experiment in EXPERIMENTS.items() if experiment.claims])
def test_the_command_of_a_claim_runs_its_measured_rows(name, monkeypatch):
    experiment, ran = EXPERIMENTS[name], []
    measured = page.best_runs(experiment, runs.Results(ROOT / "docs/laboratory" / f"{name}.jsonl"))
    monkeypatch.setattr(command, "run_model", lambda *arguments: ran.append((arguments[1], *arguments[4:6])))
    monkeypatch.setattr(command, "check_output", lambda *arguments, **options: None)
    monkeypatch.setattr(war_and_peace, "read", lambda path: "a text")
    for claim in experiment.claims:
        ran.clear()
        possible = page.claim_groups(claim, experiment)
        groups = [group for group in possible if group in measured] or possible
        assert command.main(shlex.split(page.claim_command(name, experiment, groups))) == 0
        assert set(ran) == set(groups)


def test_a_claim_about_a_difference_compares_runs_of_equal_seed():
    claim = Claim("", "", ("gru",), "test", minimum=0.0, cases=("2 layers",), compared_case="1 layer")
    shallow = [result("1 layer", "gru", 128, seed=seed, accuracy=0.5 + seed / 10) for seed in range(2)]
    deep = [result("2 layers", "gru", 128, seed=seed, accuracy=0.52 + seed / 10) for seed in range(3)]
    groups = {("1 layer", "gru", 128): shallow, ("2 layers", "gru", 128): deep}
    assert page.agreement(claim, groups) == ("0.02", "± 0.00", "yes")
    assert page.agreement(claim, groups | {("1 layer", "gru", 128): deep}) == ("0.00", "± 0.00", "yes")
    swapped = {("1 layer", "gru", 128): deep, ("2 layers", "gru", 128): shallow}
    assert page.agreement(claim, swapped) == ("-0.02", "± 0.00", "no")
    assert page.agreement(claim, {("2 layers", "gru", 128): deep}) == ("", "", "not measured")


def test_the_cases_of_war_and_peace_have_their_own_layers_and_parts_of_the_text(monkeypatch):
    text = "".join(chr(97 + i // 1000) for i in range(10_000))  # 8,000 characters a to h, 1,000 i and 1,000 j
    cases, plan = war_and_peace.cases(text), EXPERIMENTS["war_and_peace"].plan
    layers = [runs.model_of_case("gru", case, plan, 128).config.num_layers for case in cases.values()]
    assert layers == [1, 2, 3]
    case, rng = cases["2 layers"], np.random.default_rng(0)
    parts = [case.training, case.tests["validation"], case.tests["test"]]
    drawn = [set(np.concatenate([draw(rng).tokens.ravel() for _ in range(9)])) for draw in parts]
    assert drawn == [set(range(8)), {8}, {9}]
    batch = case.training(rng)
    assert batch.tokens.shape == (50, 100)
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])


def test_another_text_or_no_text_is_refused(tmp_path, capsys):
    path, missing = tmp_path / "text.txt", tmp_path / "none"
    path.write_text("Well, Prince")
    with pytest.raises(SystemExit):
        command.main(["war_and_peace"])
    assert "war_and_peace needs a text: download https://" in capsys.readouterr().err
    for file, error in ((path, "is not War and Peace as in Karpathy et al. 2015"), (missing, "is not a file")):
        arguments = ["war_and_peace", "--war-and-peace", str(file), "--output", str(tmp_path / "runs")]
        assert command.main(arguments) == 2
        assert f"{file} {error}" in capsys.readouterr().err
    case = EXPERIMENTS["war_and_peace"].cases["1 layer"]
    with pytest.raises(ValueError, match="the experiment has no text: download https://"):
        case.training(np.random.default_rng(0))


def test_page_draws_accuracy_against_learning_rate(tmp_path):
    def run(case, width, rate, accuracy):
        other = result(case=case, model="llama", width=width, rate=rate, layers=2, steps=500)
        return dataclasses.replace(other, experiment="learning_rate", accuracy={"validation": accuracy})

    measured = [
        run(case, width, rate, 0.5 - abs(np.log2(rate / best)) / 20)
        for case, width, best in (("standard", 64, 8e-3), ("standard", 256, 2e-3), ("muP", 256, 8e-3))
        for rate in EXPERIMENTS["learning_rate"].plan.learning_rates
    ]
    text = page.write({"learning_rate": measured}, tmp_path).read_text()
    assert "| standard | llama | 64 | 1,000 | 0.500 | 0.008 | 1 | 1.0 |" in text
    assert "| standard | llama | 256 | 1,000 | 0.500 | 0.002 | 1 | 1.0 |" in text
    assert "| muP | llama | 256 | 1,000 | 0.500 | 0.008 | 1 | 1.0 |" in text
    assert "published" not in text.split("## Learning rate")[1].split("| case")[0].replace("The published", "")
    assert (tmp_path / "pictures/laboratory_learning_rate.png").stat().st_size > 5000


def scaling_run(model, width, flops, loss, seed=0):
    run = result(case="Shakespeare", model=model, width=width, seed=seed, steps=1000)
    return dataclasses.replace(
        run, experiment="scaling", parameters=width**2, flops=flops, validation_loss=loss, accuracy={"validation": 0.5}
    )


def test_a_power_law_gives_exponent_and_loss_with_intervals():
    flops = np.array([1e9, 4e9, 1.6e10])
    law = scaling.PowerLaw(flops, 20.0 * flops**-0.1)
    assert law.exponent == pytest.approx((-0.1, 0.0), abs=1e-9)
    assert law.loss(8e9) == pytest.approx([20.0 * 8e9**-0.1] * 3)
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal((1000, 9)))
    laws = [scaling.PowerLaw(np.repeat(flops, 3), 20.0 * np.repeat(flops, 3) ** -0.1 * each) for each in noise]
    covered = [low <= 20.0 * 3e10**-0.1 <= high for _, low, high in (law.loss(3e10) for law in laws)]
    assert 0.93 < np.mean(covered) < 0.97
    assert 0.93 < np.mean([abs(law.exponent[0] + 0.1) <= law.exponent[1] for law in laws]) < 0.97


def test_page_compares_losses_at_equal_flops_and_parameters(tmp_path):
    measured = [
        scaling_run(model, width, factor * 1e9 * width**2, 30.0 * (factor * 1e9 * width**2) ** -0.05 / factor, seed)
        for model, factor in (("gpt", 1), ("lstm", 2))
        for width in (64, 128, 256)
        for seed in range(3)
    ]
    measured.append(scaling_run("gru", 64, 1e13, 1.0))  # one width gives no line
    text = page.write({"scaling": measured}, tmp_path).read_text()
    # The models have runs at 4.1e12 to 6.6e13 and at 8.2e12 to 1.3e14 FLOPs: the middle of the common range is 2.3e13.
    assert "loss at 2.3e+13 training FLOPs" in text
    assert f"| gpt | 9 | -0.050 ± 0.000 | {30.0 * (2**0.5 * 1e9 * 128**2) ** -0.05:.3f} [" in text
    assert f"| lstm | 9 | -0.050 ± 0.000 | {15.0 * (2**0.5 * 1e9 * 128**2) ** -0.05:.3f} [" in text
    assert "loss at 16,384 parameters" in text
    assert "| gru | 1 |" not in text
    assert "of which validation selects one for each model" in text
    assert (tmp_path / "pictures/laboratory_scaling.png").stat().st_size > 5000


def test_the_first_width_selects_the_learning_rate_of_all_widths(tmp_path, monkeypatch):
    trained = []

    def run_model(name, case_name, case, plan, model, width, results, report):
        trained.append((width, plan.learning_rates))
        return plan.learning_rates[-1]

    monkeypatch.setattr(command, "run_model", run_model)
    assert command.main(["scaling", "--model", "gpt", "--width", "256", "--output", str(tmp_path)]) == 0
    rates = EXPERIMENTS["scaling"].plan.learning_rates
    assert trained == [(64, rates), (256, rates[-1:])]


@pytest.mark.thorough
def test_a_result_has_the_validation_loss_and_the_flops_of_all_steps():
    case = EXPERIMENTS["scaling"].cases["Shakespeare"]
    plan = dataclasses.replace(PLAN, steps=3)
    trained = runs.Training("scaling", "Shakespeare", case, plan, "gru", 64).run(1e-3, 0)
    assert 2.0 < trained.validation_loss < np.log(case.vocab_size) + 0.5
    weights = 6 * 64 * 64 + 64 * case.vocab_size  # of one layer and the head, which is not tied
    assert trained.flops == pytest.approx(3 * 6 * weights * 32 * 64, rel=0.1)


@pytest.mark.thorough
def test_mup_changes_initial_values_and_learning_rates_of_a_wider_model(monkeypatch):
    experiment, rates = EXPERIMENTS["learning_rate"], []
    make_optimizer = runs.make_optimizer

    def record(*arguments, **options):
        rates.append(options["rates"])
        return make_optimizer(*arguments, **options)

    monkeypatch.setattr(runs, "make_optimizer", record)
    plan = dataclasses.replace(PLAN, steps=3)
    losses = [
        runs.Training("learning_rate", name, experiment.cases[name], plan, "llama", width).run(1e-2, 0).loss
        for name in ("standard", "muP")
        for width in (64, 128)
    ]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5), "muP of the base width is the standard"
    assert losses[1] != pytest.approx(losses[3], rel=1e-4)
    assert rates[:2] == [None, None]
    assert [tree["head"] for tree in rates[2:]] == [1.0, 0.5]


def test_the_page_of_the_documentation_is_up_to_date(tmp_path, monkeypatch):
    # The names of the charts are compared, not their contents. Drawing all charts takes several seconds.
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **options: path.touch())
    docs = ROOT / "docs"
    results = {name: runs.Results(docs / "laboratory" / f"{name}.jsonl") for name in EXPERIMENTS}
    assert page.write(results, tmp_path).read_text() == (docs / "laboratory.md").read_text()
    pictures = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert pictures == {path.name for path in (docs / "pictures").glob("laboratory_*")}


@pytest.mark.thorough
def test_command_runs_quick_experiments_and_writes_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "QUICK_STEPS", 2)
    output = ["--quick", "--output", str(tmp_path)]
    assert command.main(["state_tracking", *output, "--model", "gru", "--case", "Z60", "parity", "--width", "64"]) == 0
    assert capsys.readouterr().out.count("\n") == 2  # one line per case
    assert command.main(["--page", str(tmp_path / "docs"), *output]) == 0
    text = (tmp_path / "docs/laboratory.md").read_text()
    assert "| Z60 | gru | 64 |" in text
    assert "1, 2 or 4 layers; 2 steps;" in text
    with pytest.raises(SystemExit):
        command.main(["--page", str(tmp_path / "docs"), "--model", "gru"])
    assert "--page writes all results" in capsys.readouterr().err


def test_a_page_without_results_is_refused(tmp_path, capsys):
    assert command.main(["--page", str(tmp_path / "docs"), "--output", str(tmp_path)]) == 2
    assert f"{tmp_path} has no results for a page" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists(), "a page with results is not replaced"


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["recal"])
    assert "invalid choice: 'recal'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["recall", "--case", "parity"])
    assert "recall: no experiment has the cases, widths and models that you" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["recall", "--model", "t5"])
    assert "recall: no experiment has the cases, widths and models that you" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["recall", "--model", "bert"])
    assert "family 'bert' has no causal variant and no encoder-decoder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--quick", "--page"])
    assert "--quick --page needs another directory" in capsys.readouterr().err
