"""RWKV-7: published sizes, initial values, token shift, value residual, errors, and supported fields of files."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import spec
from jaxlm.interop import formats
from jaxlm.interop.huggingface import load_pretrained, named_tensors, save_pretrained
from jaxlm.models import get_model
from jaxlm.nn import choices, lazy_pallas
from jaxlm.testing.helpers import (
    apply,
    assert_trees_equal,
    initial_params,
    relative_error,
    tiny_model,
)
from tests.models.helpers import setup


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("rwkv7-0.1b", 191_034_624),
        ("rwkv7-0.4b", 450_767_872),
        ("rwkv7-1.5b", 1_527_404_544),
        ("rwkv7-2.9b", 2_947_735_040),
    ],
)
def test_published_parameter_counts(name, count):
    assert spec.count(get_model(name).specs) == count


def test_a_long_text_has_a_small_state():
    model = get_model("rwkv7-0.1b")
    assert spec.count(model.state_specs(1, 10**9)) == 12 * (12 * 64 * 64 + 2 * 768) + 1


def test_initial_values_are_those_of_the_authors_code():
    """The formulas of the authors' code, for channel i of D and layer n of N."""
    model = tiny_model("rwkv7-tiny", num_layers=3)
    tensors = dict(named_tensors(model, initial_params(model)))
    D, N, K = 32, 3, 8
    i = np.arange(D)
    linear, y = i / (D - 1) - 0.5, (i % K - (K - 1) / 2) / ((K - 1) / 2)
    zigzag = y * np.abs(y)
    for n in range(N):
        early, late = 1 - n / N, n / (N - 1)
        want = {
            "att.x_r": 1 - (i / D) ** (0.2 * early),
            "att.x_w": 1 - (i / D) ** (0.9 * early),
            "att.x_k": 1 - (i / D) ** (0.7 * early),
            "att.x_v": 1 - (i / D) ** (0.7 * early),
            "att.x_a": 1 - (i / D) ** (0.9 * early),
            "att.x_g": 1 - (i / D) ** (0.2 * early),
            "att.w0": -6 + 6 * (i / (D - 1)) ** (1 + late**0.3) + 0.5 + 2.5 * zigzag,
            "att.a0": -0.19 + 0.3 * zigzag + 0.4 * linear,
            "att.k_k": 0.71 - 0.1 * linear,
            "att.k_a": np.full(D, 1.02),
            "att.r_k": np.full(D, -0.04),
            "att.ln_x.weight": np.full(D, ((1 + n) / N) ** 0.7),
            "ffn.x_k": 1 - (i / D) ** (early**4),
        }
        want |= {"att.v0": 0.73 - 0.4 * linear} if n else {}
        for name, values in want.items():
            np.testing.assert_allclose(tensors[f"blocks.{n}.{name}"].ravel(), values, atol=2e-6, err_msg=name)
        assert all((tensors[f"blocks.{n}.{name}.weight"] == 0).all() for name in ("att.output", "ffn.value"))
    assert "blocks.0.att.v0" not in tensors
    assert np.std(tensors["blocks.1.att.receptance.weight"]) == pytest.approx(D**-0.5, rel=0.1)
    assert np.std(tensors["blocks.1.att.key.weight"]) == pytest.approx(0.1 * D**-0.5, rel=0.1)
    assert np.std(tensors["head.weight"]) == pytest.approx(0.5 * D**-0.5, rel=0.1)
    assert np.abs(tensors["emb.weight"]).max() <= 1e-4


def test_weight_decay_excludes_vectors_and_matrices_of_low_rank():
    model = tiny_model("rwkv7-tiny")
    mask = jax.tree.map(lambda leaf: np.full(leaf.shape, leaf.decay), model.specs)
    assert {re.sub(r"blocks\.\d\.", "", name) for name, decays in named_tensors(model, mask) if decays.all()} == {
        "att.receptance.weight", "att.key.weight", "att.value.weight", "att.output.weight", "ffn.key.weight",
        "ffn.value.weight", "emb.weight", "head.weight",
    }  # fmt: skip


@pytest.mark.thorough
def test_texts_longer_than_a_chunk_can_be_read_in_pieces():
    """75 tokens with left padding and two documents are several chunks; the pieces end inside of chunks."""
    model, params, tokens = setup("rwkv7-tiny", length=75)
    segments = np.ones((2, 75), np.int32)
    segments[0, 33:] = 2
    segments[1, :40] = 0
    want, _ = apply(model, params, tokens, segment_ids=segments)
    pieces, state = [], model.init_state(2, 75)
    for start in range(0, 75, 25):
        piece = slice(start, start + 25)
        hidden, state = apply(model, params, tokens[:, piece], state=state, segment_ids=segments[:, piece])
        pieces.append(hidden)
    real = segments > 0
    assert relative_error(jnp.concatenate(pieces, axis=1)[real], want[real]) < 2e-5


def test_a_tpu_saves_no_float32_activations_for_the_backward_pass(monkeypatch):
    """The matmuls with ones, which a TPU uses for sums, are not saved, unlike other matmuls (``remat="dots"``)."""
    monkeypatch.setattr(choices, "head_sums_by_matmul", lambda: True)
    monkeypatch.setattr(choices, "matrix_scan", lambda steps, unsupported: "pallas")
    monkeypatch.setattr(choices, "wrong_platform", lambda implementation: None)
    monkeypatch.setattr(lazy_pallas, "INTERPRET", True)
    model = get_model("rwkv7-tiny", dtype="bfloat16", embed_dim=64, head_dim=16, num_layers=2)
    tokens = np.zeros((2, 64), np.int32)

    def pull_back(params):
        return jax.vjp(lambda params: model.apply(params, tokens)[0], params)[1]

    saved = jax.tree.leaves(jax.eval_shape(pull_back, spec.abstract(model.specs)))
    assert any(x.shape[:2] == (2, 64) and x.dtype == jnp.bfloat16 for x in saved)
    activations = [x for x in saved if x.shape[:1] == (2,) and x.shape[-1] == 64]
    assert not [x for x in activations if x.dtype == jnp.float32]


def test_the_channel_mix_reads_the_previous_token_of_the_same_document():
    """Without the outputs of the time mixes, a token depends only on itself and on the num_layers tokens before it."""
    model, params, tokens = setup("rwkv7-tiny")
    for layer in params["layers"]:
        layer["time_mix"]["output"]["weight"] *= 0.0
    changed = tokens.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 128
    segments = np.repeat(np.array([[1] * 5 + [2] * 7]), 2, axis=0).astype(np.int32)
    for inputs, differing in (({}, [4, 5, 6]), ({"segment_ids": segments}, [4])):
        before, after = (apply(model, params, x, **inputs)[0] for x in (tokens, changed))
        assert sorted({int(t) for t in np.nonzero(np.asarray(before != after))[1]}) == differing


def test_the_value_residual_can_replace_the_values_of_later_blocks_by_those_of_the_first():
    model, params, tokens = setup("rwkv7-tiny", num_layers=3)
    for layer in params["layers"][1:]:
        layer["time_mix"]["value_residual"]["up"]["bias"] += 1e4  # a weight of 1 for the first block
    want, _ = apply(model, params, tokens)
    for number, depends in ((1, False), (2, False), (0, True)):
        layers = list(params["layers"])
        time_mix = layers[number]["time_mix"]
        other = {**time_mix, "value": {"weight": -time_mix["value"]["weight"]}}
        layers[number] = {**layers[number], "time_mix": other}
        got, _ = apply(model, {**params, "layers": tuple(layers)}, tokens)
        assert (relative_error(got, want) > 1e-3) == depends


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 5}, "head_dim=5 does not divide embed_dim=32"),
        ({"value_rank": 0}, "value_rank=0 must be at least 1"),
        ({"mlp_dim": 0}, "mlp_dim=0 must be at least 1"),
        ({"task": "masked"}, "task='masked' is unknown: choose from 'causal', 'classification'"),
        ({"remat": "some"}, "remat='some' is unknown"),
    ],
)
def test_errors_name_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_model("rwkv7-tiny", **fields)


def test_a_model_without_a_head_has_no_logits():
    model, params, tokens = setup("rwkv7-tiny", task="none")
    assert "head" not in params
    with pytest.raises(ValueError, match="task='none' has no head"):
        model.logits(params, apply(model, params, tokens)[0])


# ---------------------------------------------------------------------------------------------------------- files

CHANGED = {
    "vocab_size": 50, "num_layers": 3, "embed_dim": 24, "mlp_dim": 40, "head_dim": 6, "decay_rank": 3, "rate_rank": 2,
    "value_rank": 7, "gate_rank": 5, "norm_epsilon": 1e-3, "group_norm_epsilon": 1e-2,
}  # fmt: skip


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("task", ["causal", "none"])
def test_files_round_trip_with_every_field(task, tmp_path):
    (table,) = formats.of("rwkv7")
    assert set(CHANGED) == set(table.hf_name_of_field)
    model, params, _ = setup("rwkv7-tiny", **CHANGED, task=task)
    save_pretrained(tmp_path, model, params)
    loaded_model, loaded_params = load_pretrained(tmp_path)
    assert loaded_model == model
    assert_trees_equal(loaded_params, params)


def test_missing_fields_are_those_of_the_smallest_published_model(tmp_path):
    model = get_model("rwkv7-0.1b", num_layers=2, embed_dim=64, mlp_dim=64, vocab_size=32)
    save_pretrained(tmp_path, model, initial_params(model))
    fields = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 32}
    write_config(tmp_path, {"model_type": "rwkv7", **fields})
    assert load_pretrained(tmp_path)[0] == model


def write_config(directory: Path, fields) -> None:
    (directory / "config.json").write_text(json.dumps(fields))
    (directory / "checksums.json").unlink(missing_ok=True)


def save_with(tmp_path, fields, tensors) -> Path:
    """Save a tiny model, and change fields of its ``config.json`` and tensors of its file; returns the directory."""
    model, params, _ = setup("rwkv7-tiny")
    save_pretrained(tmp_path, model, params)
    write_config(tmp_path, {**json.loads((tmp_path / "config.json").read_text()), **fields})
    save_file({**load_file(tmp_path / "model.safetensors"), **tensors}, tmp_path / "model.safetensors")
    return tmp_path


def test_unused_tensors_of_the_first_block_are_ignored(tmp_path):
    """Some published files have weights of a value residual in the first block."""
    unused = {f"blocks.0.att.v{number}": np.ones((2, 2), np.float32) for number in range(3)}
    model, params = load_pretrained(save_with(tmp_path, {}, unused))
    assert_trees_equal(params, setup("rwkv7-tiny")[1])
    assert model == tiny_model("rwkv7-tiny")


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        ({"architectures": ["RWKV7ForCausalLM"]}, {}, "architecture 'RWKV7ForCausalLM' is not supported"),
        ({"head_dim": 7}, {}, "head_dim=7 does not divide embed_dim=32"),
        ({"a_low_rank_dim": "5"}, {}, "a_low_rank_dim='5' must be a whole number"),
        ({"decay_low_rank_dim": 7}, {}, r"blocks.0.att.w1"),
        ({"num_hidden_layers": 1}, {}, r"blocks.1"),
        # Other models of the authors have these tensors, for example RWKV-7 with DeepEmbed.
        ({}, {"blocks.0.ffn.s_emb.weight": np.ones((128, 32), np.float32)}, r"blocks.0.ffn.s_emb.weight"),
        ({}, {"blocks.1.att.x_r": np.ones((1, 1, 31), np.float32)}, r"blocks.1.att.x_r"),
    ],
)
def test_other_models_and_settings_raise(fields, tensors, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_pretrained(save_with(tmp_path, fields, tensors))
