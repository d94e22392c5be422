"""Gated DeltaNet: its state, its patterns of mixers, and supported fields of files."""

import json

import jax
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.config import from_json, to_json
from jaxlm.interop import formats
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import gated_deltanet, get_model
from jaxlm.models.common import layer_kinds
from jaxlm.models.gated_deltanet import Config
from jaxlm.nn.attention.rotary import RotaryScaling
from jaxlm.nn.scan import gated_delta_rule
from jaxlm.testing.helpers import (
    add_noise,
    assert_trees_close,
    assert_trees_equal,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
)
from tests.models.helpers import save_with_fields

HYBRID = "gated_deltanet-hybrid-tiny"


def test_the_pattern_of_mixers_is_repeated():
    assert layer_kinds(Config(num_layers=6)) == (*["delta_rule"] * 3, "attention", "delta_rule", "delta_rule")
    layers = get_model(HYBRID, num_layers=5).specs["layers"]
    assert ["attention" in layer for layer in layers] == [False, True, False, True, False]


def test_only_attention_has_a_state_that_grows_with_the_length():
    short, long = (tiny_model("gated_deltanet-tiny").state_specs(2, length) for length in (1, 5000))
    assert short == long
    specs = tiny_model(HYBRID).state_specs(2, 40)
    assert [sorted(layer) for layer in specs["layers"]] == [["memory", "tail"], ["key", "value"], ["memory", "tail"]]
    assert specs["layers"][0]["memory"].shape == (2, 4, 16, 6)
    assert specs["layers"][1]["key"].shape == (2, 40, 2 * 16)


def test_training_carries_a_state_only_without_attention():
    assert tiny_model("gated_deltanet-tiny").carried_state_length == 1
    assert tiny_model(HYBRID).carried_state_length is None


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["gated_deltanet-tiny", pytest.param(HYBRID, marks=pytest.mark.thorough)])
def test_texts_longer_than_a_chunk_can_be_read_in_pieces(name):
    """75 tokens with left padding are several chunks of the delta rule; the pieces end inside of chunks."""
    model = tiny_model(name, max_positions=None)
    params, tokens = add_noise(initial_params(model)), random_tokens(model, 2, 75)
    segments = np.ones((2, 75), np.int32)
    segments[1, :40] = 0
    want = np.asarray(jax.jit(model.apply)(params, tokens, segment_ids=segments)[0])
    step = jax.jit(lambda p, t, s, i: model.apply(p, t, state=s, segment_ids=i))
    pieces, state = [], model.init_state(2, 75)
    for start in range(0, 75, 25):
        piece = slice(start, start + 25)
        hidden, state = step(params, tokens[:, piece], state, segments[:, piece])
        pieces.append(hidden)
    real = segments > 0
    assert relative_error(np.concatenate(pieces, axis=1)[real], want[real]) < 2e-5


@pytest.mark.parametrize("name", ["gated_deltanet-tiny", "mamba2-tiny"])
def test_a_model_with_negative_eigenvalues_is_saved_with_names_of_jaxlm(name, tmp_path):
    model = get_model(name, negative_eigenvalues=True)
    params = initial_params(model)
    save_pretrained(tmp_path, model, params)
    loaded, loaded_params = load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_trees_equal(loaded_params, params)


def test_negative_eigenvalues_double_beta(monkeypatch):
    betas = []

    def record_beta(q, k, v, log_decay, beta, *arguments, **options):
        jax.debug.callback(lambda beta: betas.append(np.asarray(beta)), beta)
        return gated_delta_rule(q, k, v, log_decay, beta, *arguments, **options)

    monkeypatch.setattr(gated_deltanet, "gated_delta_rule", record_beta)
    for negative in (False, True):
        model = tiny_model(
            "gated_deltanet-tiny", num_layers=1, remat="none", init_stddev=1.0, negative_eigenvalues=negative
        )
        params = initial_params(model)
        jax.jit(model.apply)(params, random_tokens(model, 1, 6))
        jax.effects_barrier()
    assert 0.5 < betas[0].max() < 1.0 < betas[1].max() < 2.0
    np.testing.assert_allclose(betas[1], 2.0 * betas[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": ()}, r"pattern=\(\) must not be empty"),
        ({"pattern": ("delta_rule", "mamba")}, r"pattern=\('delta_rule', 'mamba'\) .* each entry is 'delta_rule'"),
        ({"delta_key_heads": 3}, "delta_key_heads=3 does not divide delta_value_heads=4"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"conv_width": 1}, "conv_width=1 must be at least 2"),
        ({"rotary_fraction": 0.2}, r"rotary_fraction=0.2 must be .* its product with head_dim=16, .* must be even"),
        ({"rotary_fraction": 1.5}, "rotary_fraction=1.5 must be at most 1"),
        ({"max_positions": 0}, "max_positions=0 must be at least 1"),
        ({"task": "masked"}, "task='masked' is unknown: choose from 'causal'"),
    ],
)
def test_errors_name_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_model(HYBRID, **fields)


def test_a_too_long_text_raises():
    model = tiny_model(HYBRID, max_positions=8)
    with pytest.raises(ValueError, match="9 tokens exceed max_positions=8"):
        model.apply(spec.abstract(model.specs), np.zeros((1, 9), np.int32))
    with pytest.raises(ValueError, match="a state of 9 tokens exceeds max_positions=8"):
        model.state_specs(1, 9)


def test_a_config_round_trips_through_json():
    config = get_model(HYBRID, rotary_scaling=RotaryScaling("linear", 2.0)).config
    assert from_json(Config, json.loads(json.dumps(to_json(config)))) == config


# ---------------------------------------------------------------------------------------------------------- files

EXPERTS = {"num_experts": 4, "expert_dim": 10, "shared_expert_dim": 12}
SHAPES = {
    "hybrid": {"tie_embeddings": True, "rotary_scaling": RotaryScaling("llama3", 8.0, 16, 1.0, 2.0)},
    "pure": {"pattern": ("delta_rule",), "max_positions": None, "task": "none"},
    "biases": {"attention_bias": True, "task": "classification", "num_labels": 3},
    "attention": {"pattern": ("attention", "attention", "delta_rule"), "task": "span_qa"},
    "experts": {**EXPERTS, "dense_layers": (1,)},
}


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", SHAPES)
def test_files_round_trip(name, tmp_path):
    model = tiny_model(HYBRID, **SHAPES[name])
    params = add_noise(initial_params(model))
    save_pretrained(tmp_path, model, params)
    loaded_model, loaded_params = load_pretrained(tmp_path)
    assert loaded_model == model
    assert_trees_equal(loaded_params, params)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mlp_only_layers"] == ([1] if name == "experts" else [0, 1, 2])
    assert len(config["layer_types"]) == 3


def read_pattern(**fields):
    return formats.of("gated_deltanet")[-1].read_fields({"num_experts": 0, **fields})["pattern"]


def test_patterns_in_files():
    """``full_attention_interval`` and ``layer_types`` give the pattern of the mixers."""
    three_to_one = (*["delta_rule"] * 3, "attention")
    assert read_pattern() == three_to_one  # the default of 48 layers
    assert read_pattern(num_hidden_layers=3) == ("delta_rule",)
    assert read_pattern(num_hidden_layers=6, full_attention_interval=2) == ("delta_rule", "attention")
    types = ["linear_attention", "full_attention", "linear_attention"]
    assert read_pattern(num_hidden_layers=3, layer_types=types) == ("delta_rule", "attention")
    assert read_pattern(num_hidden_layers=3, layer_types=types[1:] + types[2:]) == (
        "attention", "delta_rule", "delta_rule",
    )  # fmt: skip


def test_experts_in_files():
    """The fields of Qwen3-Next say which layers have experts, and how many."""

    def read(**fields):
        result = formats.of("gated_deltanet")[-1].read_fields({"num_hidden_layers": 2, **fields})
        names = ("num_experts", "expert_interval", "dense_layers", "shared_expert_dim")
        return tuple(result.get(name) for name in names)

    assert read() == (512, 1, (), 512)
    assert read(num_experts=8, decoder_sparse_step=2, shared_expert_intermediate_size=6) == (8, 2, (), 6)
    assert read(num_experts=8, mlp_only_layers=[1]) == (8, 1, (1,), 512)
    for dense in ({"mlp_only_layers": [0, 1]}, {"decoder_sparse_step": 3}, {"num_experts": 0}):
        assert read(**dense) == (None, 1, (), None)
    with pytest.raises(ValueError, match="shared_expert_intermediate_size=None must be a whole number"):
        read(shared_expert_intermediate_size=None)


def test_the_shared_expert_computes_every_token():
    """With a gate of sigmoid(0) = 1/2 and experts of 0, the output is half of that of the shared expert as an MLP."""
    model = tiny_model(HYBRID, **EXPERTS, num_layers=1)
    params = add_noise(initial_params(model))
    (layer,) = params["layers"]
    layer["experts"]["shared_gate"]["weight"] *= 0.0
    layer["experts"]["down"]["weight"] *= 0.0
    dense = tiny_model(HYBRID, num_layers=1, mlp_dim=12)
    shared = jax.tree.map(lambda x: x, layer["experts"]["shared"])
    shared["down"]["weight"] = shared["down"]["weight"] / 2
    dense_layer = {name: value for name, value in layer.items() if name != "experts"} | {"mlp": shared}
    tokens = random_tokens(model, 2, 9)
    got, want = (
        jax.jit(model.apply)(params, tokens)[0],
        jax.jit(dense.apply)({**params, "layers": (dense_layer,)}, tokens)[0],
    )
    assert relative_error(got, want) < 1e-6


@pytest.mark.thorough
def test_padding_has_no_statistics():
    """Padding is moved to the end of each row before the first layer."""
    model = tiny_model(HYBRID, **EXPERTS, dense_layers=(1,))
    params, tokens = add_noise(initial_params(model)), random_tokens(model, 2, 9)
    segments = np.ones((2, 9), np.int32)
    segments[0, :4] = segments[1, 2] = 0
    apply = jax.jit(model.apply_with_routing)
    _, _, padded = apply(params, tokens, segment_ids=segments)
    row, other = (apply(params, tokens[r : r + 1, segments[r] > 0])[2] for r in (0, 1))
    assert padded.tokens.tolist() == [13, 13]
    assert_trees_close(padded, jax.tree.map(np.add, jax.device_get(row), jax.device_get(other)), 1e-5)


def test_published_parameter_counts():
    model = get_model("qwen3-next-80b-a3b")
    assert model.num_parameters == 79674391296
    experts = sum(leaf.size for leaf in jax.tree.leaves(model.specs) if "expert" in leaf.axes)
    assert model.num_parameters - experts * 502 // 512 == 3874929408  # A3B: about 3 billion active parameters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_only_layers": "all"}, "mlp_only_layers='all' must be a list of layer numbers"),
        ({"num_experts": None}, "num_experts=None must be a whole number"),
        (
            {"layer_types": ["linear_attention"] * 2},
            "layer_types=.* must name the mixer of each of num_hidden_layers=3",
        ),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types=.* must name the mixer"),
        ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval=0 must be at least 1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type='longrope' is not supported"),
    ],
)
def test_unsupported_settings_raise(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(save_with_fields(tmp_path, HYBRID, **fields))
