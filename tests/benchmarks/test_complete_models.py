"""Benchmarks of complete models: batches for jaxlm and its baselines.

Live tests check that all implementations compute the same results.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import complete_models, decoding, harness, training
from benchmarks.harness import Failure
from jaxlm import get_model, save_pretrained, spec
from jaxlm.objectives import objective
from jaxlm.plan import flops
from jaxlm.testing.helpers import initial_params, relative_error

NAMES = (
    "gpt2", "llama-3.2-1b", "mixtral-12-layers", "bert-base-uncased", "t5-small", "xlnet-base-cased",
    "transformer-xl-base", "lstm-zaremba-medium", "vdcnn-9", "mamba2-130m", "griffin-12-layers",
    "gated-deltanet-12-layers", "xlstm-12-layers",
)  # fmt: skip


def test_every_measured_family_has_baseline_classes() -> None:
    families = [complete_models.build(name, quick=True).family for name in NAMES]
    assert set(complete_models.DEFAULT_BATCH_SIZES) == set(families)
    assert set(complete_models.FLAX_FAMILIES) < set(families)
    assert set(complete_models.DECODED_FAMILIES) < set(families)
    assert set(complete_models.OWN_TORCH_FAMILIES) < set(families)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_batch_is_loaded_and_has_a_loss(name: str, tmp_path: Path) -> None:
    model = complete_models.build(name, quick=True)
    has_experts = getattr(model.config, "num_experts", None) is not None
    assert has_experts == (name == "mixtral-12-layers")
    rates = [value for name, value in vars(model.config).items() if name.endswith("dropout")]
    assert not any(rates)
    batch = complete_models.example(model, *complete_models.sizes(model, True, 3, None))
    complete_models.save(batch, str(tmp_path))
    arrays = complete_models.load(str(tmp_path))
    loaded = complete_models.batch_of(arrays)
    assert jax.tree.structure(loaded) == jax.tree.structure(batch)
    for expected, actual in zip(jax.tree.leaves(batch), jax.tree.leaves(loaded), strict=True):
        assert np.array_equal(expected, actual)
    params = spec.abstract(model.specs)
    loss = objective(model.task).loss
    total, weight, _ = jax.eval_shape(lambda params: loss(model, params, loaded), params)
    assert (total.shape, weight.shape) == ((), ())
    labels = complete_models.labels(arrays)
    assert np.sum(labels != complete_models.IGNORED) == np.sum(arrays["weights"] > 0) > 0
    if model.family not in complete_models.OWN_TORCH_FAMILIES:
        assert all(len(x) == 3 for x in complete_models.inputs(model.family, arrays).values())
    assert flops.counted_training_flops(model, loss, batch).amount > 0


def test_labels_are_at_the_target_positions() -> None:
    arrays = {
        "tokens": np.zeros((1, 4), np.int32), "labels": np.array([[7, 8, 9]]), "weights": np.array([[1.0, 1.0, 0.0]]),
        "target_positions": np.array([[3, 1, 0]]),
    }  # fmt: skip
    assert complete_models.labels(arrays).tolist() == [[-100, 8, -100, 7]]


def test_counted_flops_equal_the_formula_plus_the_causal_half() -> None:
    model = complete_models.build("gpt2", quick=True)
    batch = complete_models.example(model, 2, 32)
    counted = flops.counted_training_flops(model, objective(model.task).loss, batch)
    closed = flops.training_flops(model, 2, 32)
    assert closed is not None
    cfg = model.config
    causal_half = 6 * cfg.num_layers * cfg.embed_dim * 32 * 64
    assert relative_error(counted.amount, closed.amount + causal_half) < 0.03  # the formula counts biases and norms


def test_decoded_parameters_are_the_weights_multiplied_per_token() -> None:
    t5, lstm = (complete_models.build(name, quick=True) for name in ("t5-small", "lstm-zaremba-medium"))
    leaves = spec.flatten(t5.specs)
    once_per_source = ("encoder/", "cross_attention/key/", "cross_attention/value/")
    not_decoded = sum(leaf.size for name, leaf in leaves.items() if any(part in name for part in once_per_source))
    assert 0 < not_decoded < t5.num_parameters
    assert complete_models.num_decoding_parameters(t5) == t5.num_parameters - not_decoded
    table = (
        lstm.config.vocab_size * lstm.config.embed_dim
    )  # the input embedding is only looked up, and the output head has separate weights
    assert complete_models.num_decoding_parameters(lstm) == lstm.num_parameters - table


def test_xlnet_masks_for_transformers() -> None:
    # All queries attend to position 0. Position 2 is before 1 in the order. Targets 1 and 2 cannot see themselves.
    mask = complete_models.perm_mask(np.array([[-1, 1, 0]]), np.array([[1, 2]]))
    assert mask.tolist() == [[[0, 1, 1], [0, 1, 0], [0, 1, 1]]]
    assert complete_models.target_mapping(np.array([[2]]), 3).tolist() == [[[0, 0, 1]]]


def test_options_that_cannot_be_measured_raise_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="--length 32: a VDCNN reads texts of max_positions=64"):
        complete_models.sizes(complete_models.build("vdcnn-9", quick=True), True, None, 32)
    with pytest.raises(ValueError, match="--length 65: the model reads texts of at most max_positions=64 tokens"):
        complete_models.sizes(complete_models.build("gpt2", quick=True), True, None, 65)
    xlnet = complete_models.build("xlnet-base-cased", quick=True)
    for length in (33, 8):
        with pytest.raises(ValueError, match=f"--length {length} must be even and at least 10: an XLNet row has"):
            complete_models.sizes(xlnet, True, None, length)
    assert complete_models.example(xlnet, *complete_models.sizes(xlnet, True, 1, 10)).tokens.shape == (1, 10)
    targets = {"jaxlm": "a", "torch": "b", "flax": "c"}
    assert harness.implementations_with_family(
        targets, "xlnet", complete_models.FAMILIES_BY_BASELINE, complete_models.DEFAULT_BATCH_SIZES
    ) == {
        "jaxlm": "a",
        "torch": "b",
    }
    assert "flax: no model of the family xlnet" in capsys.readouterr().out
    with pytest.raises(Failure, match="this benchmark cannot measure family 'gru': choose a model of gpt, llama"):
        harness.implementations_with_family(
            targets, "gru", complete_models.FAMILIES_BY_BASELINE, complete_models.DEFAULT_BATCH_SIZES
        )
    assert training.main(["--batch", "0"]) == 2
    assert "--batch 0 must be from 1 to" in capsys.readouterr().err
    assert training.main(["--against", "", "--passes", "backward"]) == 2
    assert "--passes 'backward' is unknown: choose from forward, step" in capsys.readouterr().err
    assert decoding.main(["--against", "", "--batch", "one"]) == 2
    assert "--batch 'one' must be whole numbers" in capsys.readouterr().err
    assert decoding.main(["--against", "", "--model", "gpt2,gp2"]) == 2
    assert "benchmarks.decoding: --model gp2: " in capsys.readouterr().err


def test_a_prompt_and_new_tokens_need_positions(tmp_path: Path) -> None:
    from benchmarks.decoding_baselines import Jaxlm

    model = get_model("gpt2-tiny")
    save_pretrained(tmp_path, model, initial_params(model))
    assert Jaxlm(str(tmp_path), "gpt", 1, 32, 33).tokens == 33
    with pytest.raises(ValueError, match="--prompt 32 and --tokens 34 need 65 positions, but .* max_positions=64"):
        Jaxlm(str(tmp_path), "gpt", 1, 32, 34)


@pytest.mark.thorough
def test_complete_models_are_measured_without_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, common = tmp_path / "rows.json", ["--quick", "--against", "", "--rounds", "1", "--device", "cpu"]
    common += ["--model", "lstm-zaremba-medium", "--json", str(path)]
    assert training.main([*common, "--passes", "forward"]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["op"], row["shape"]) == ("loss", "lstm-zaremba-medium B2 T32")
    assert row["facts"]["cached_compile_seconds"] >= 0
    assert "cached" in capsys.readouterr().out
    assert decoding.main(common) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["shape"] == "lstm-zaremba-medium B2 prompt 8 + 16 tokens"
    assert row["work"]["amount"] == 16 * 4 * complete_models.num_decoding_parameters(
        complete_models.build("lstm-zaremba-medium", quick=True)
    )


@pytest.mark.live
@pytest.mark.parametrize("name", NAMES)
def test_implementations_compute_the_same_losses_and_tokens(name: str, tmp_path: Path) -> None:
    from benchmarks import baselines, decoding_baselines, training_baselines

    directory = str(tmp_path / "model")
    baselines.Machine(directory, name, quick=True)
    family = complete_models.build(name, quick=True).family
    names = ["Jaxlm", "Torch", *(["Flax"] if family in complete_models.FLAX_FAMILIES else [])]

    def run(module: ModuleType, name: str, times: int, **arguments: Any) -> list[Any]:
        # The Flax classes use implicit rank promotion, which jaxlm never does.
        with jax.numpy_rank_promotion("allow" if name == "Flax" else "raise"):
            implementation = getattr(module, name)(directory, family, **arguments)
            return [implementation.run() for _ in range(times)]

    for passes in ("forward", "step") if family == "gpt" else ("step",):  # a step contains a forward pass
        losses = {name.lower(): run(training_baselines, name, training.UPDATES + 1, pass_name=passes) for name in names}
        tolerances = (
            training.FAMILY_TOLERANCES.get(family, training.TOLERANCES) if passes == "step" else training.TOLERANCES
        )
        harness.check_losses(losses, tolerances)
    if family in complete_models.DECODED_FAMILIES:
        sizes = {"batch": 2, "prompt": 8, "tokens": 16}
        harness.check_same({name.lower(): run(decoding_baselines, name, 1, **sizes) for name in names})
