"""Mamba-2, Bamba and Falcon-H1: published sizes, initial values, the gate, residuals, errors, and fields of files."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.interop import config_json
from jaxlm.interop.huggingface import load_pretrained, named_tensors, params_from_tensors, save_pretrained
from jaxlm.models import get_model
from jaxlm.nn.attention.rotary import RotaryScaling
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import (
    add_noise,
    assert_trees_equal,
    initial_params,
    relative_error,
    tiny_model,
)
from tests.models.helpers import save_with_fields, setup


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mamba2-130m", 128_989_632),
        ("mamba2-370m", 368_346_624),
        ("mamba2-780m", 780_161_280),
        ("mamba2-1.3b", 1_343_757_312),
        ("mamba2-2.7b", 2_702_599_680),
        ("bamba-9b", 9_780_235_392),
        ("falcon-h1-0.5b", 521_411_104),
    ],
)
def test_published_parameter_counts(name, count):
    assert spec.count(get_model(name).specs) == count


def test_a_long_text_has_a_small_state():
    model = get_model("mamba2-130m")
    assert spec.count(model.state_specs(1, 10**9)) == 24 * (24 * 128 * 64 + 3 * (1536 + 256)) + 3


@pytest.mark.thorough
def test_negative_eigenvalues_in_pieces_with_documents_and_padding():
    model, params, tokens = setup("mamba2-tiny", length=12, negative_eigenvalues=True)
    segments = np.array([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 2], [1] * 12])
    want = np.asarray(jax.jit(model.apply)(params, tokens, segment_ids=segments)[0])
    step, pieces, state = jax.jit(model.apply), [], model.init_state(2, 1)
    for start in range(0, 12, 4):
        piece = slice(start, start + 4)
        hidden, state = step(params, tokens[:, piece], state=state, segment_ids=segments[:, piece])
        pieces.append(hidden)
    real = segments > 0
    assert relative_error(np.concatenate(pieces, axis=1)[real], want[real]) < 1e-5
    alone, _ = jax.jit(model.apply)(params, tokens[:1, 5:10])
    assert relative_error(alone, want[:1, 5:10]) < 1e-5
    other, _ = jax.jit(model.with_fields(negative_eigenvalues=False).apply)(params, tokens, segment_ids=segments)
    assert relative_error(np.asarray(other)[real], want[real]) > 0.01


def test_the_state_grows_only_with_attention_and_max_positions_limits_its_length():
    model = tiny_model("bamba-tiny")
    mixer, attention = model.state_specs(2, 40)["layers"]
    assert mixer["hidden"].shape == (2, 8, 12, 8)
    assert attention["key"].shape == attention["value"].shape == (2, 40, 2 * 8)
    assert model.carried_state_length is None
    without_attention = get_model("mamba2-tiny", max_positions=8)
    with pytest.raises(ValueError, match="a state of 9 tokens exceeds max_positions=8"):
        without_attention.init_state(1, 9)
    with pytest.raises(ValueError, match="a state of 65 tokens exceeds max_positions=64"):
        model.state_specs(1, 65)
    recurrent = model.with_fields(pattern=("mamba2",), max_positions=None)
    assert recurrent.carried_state_length == 1
    assert recurrent.state_specs(2, 3) == recurrent.state_specs(2, 40)


@pytest.mark.thorough
def test_initial_values_are_in_the_published_ranges():
    model = get_model("mamba2-tiny", embed_dim=512, num_layers=1)
    (layer,) = jax.device_get(initial_params(model)["layers"])
    mixer = layer["mixer"]
    decay_rates, dt = np.exp(mixer["A_log"]), np.log1p(np.exp(mixer["dt_bias"]))
    assert 1.0 <= decay_rates.min() < 2.0
    assert 15.0 < decay_rates.max() < 16.0
    assert dt.min() * (1 + 1e-5) >= 0.001
    assert dt.max() <= 0.1 * (1 + 1e-5)
    assert np.mean(dt < 0.01) == pytest.approx(0.5, abs=0.15)  # the logarithm is uniform
    assert (mixer["D"] == 1.0).all()
    assert np.abs(mixer["output"]["weight"]).max() <= 1024**-0.5
    no_low_dt = tiny_model("mamba2-tiny", init_dt_floor=0.05).specs["layers"][0]["mixer"]["dt_bias"]
    floored = jax.nn.softplus(spec.init({"dt_bias": no_low_dt}, jax.random.key(0))["dt_bias"])
    assert floored.min() == pytest.approx(0.05)


def test_only_matrices_and_taps_decay():
    model = get_model("mamba2-tiny", linear_bias=True, tie_embeddings=False)
    decayed = {spec.split_layer(name)[0] for name, leaf in spec.flatten(model.specs).items() if leaf.decay}
    mixer = {f"layers/mixer/{name}/weight" for name in ("zx", "BC", "dt", "x_convolution", "BC_convolution", "output")}
    assert decayed == {"token_embedding", "head", *mixer}


@pytest.mark.thorough
def test_tensor_parallelism_needs_two_sums_per_layer():
    """Section 8.1 of the paper: heads are split over devices. One sum is for the output, a small one for the norm."""
    sharding = Sharding(make_mesh("data=4,tensor=2"))
    counts = []
    for num_layers in (1, 2):
        model = get_model("mamba2-tiny", num_layers=num_layers, embed_dim=64, num_groups=1)

        def forward(params, tokens, model=model):
            with sharding.scope():
                return model.apply(params, tokens)[0]

        tokens = jax.ShapeDtypeStruct((8, 16), np.int32, sharding=sharding.named_sharding(("batch", None)))
        text = jax.jit(forward).lower(sharding.abstract(model.specs), tokens).compile().as_text()
        operations = re.findall(r" (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", text)
        assert set(operations) == {"all-reduce"}
        counts.append(len(operations))
    assert counts[1] - counts[0] == 2


def reference_mixer(cfg, weights, u_TD):
    """The mixer as the equations of the paper, for one text: a loop over steps and heads in float64."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    (T, _), H, P, G, N = u_TD.shape, 8, cfg.head_dim, cfg.num_groups, cfg.state_size
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731

    def convolution(params, x_TC):
        padded = np.concatenate([np.zeros((cfg.conv_width - 1, x_TC.shape[1])), x_TC])
        taps = [params["weight"][k] * padded[k : k + T] for k in range(cfg.conv_width)]
        return silu(sum(taps) + params["bias"])

    z, x = (
        u_TD @ weights["zx"]["weight"][:, 0],
        convolution(weights["x_convolution"], u_TD @ weights["zx"]["weight"][:, 1]),
    )
    B, C = np.split(convolution(weights["BC_convolution"], u_TD @ weights["BC"]["weight"]), 2, axis=1)
    dt = np.log1p(np.exp(u_TD @ weights["dt"]["weight"] + weights["dt_bias"]))
    dt = np.clip(dt, cfg.dt_limit_min, cfg.dt_limit_max)
    y = np.zeros((T, H, P))
    for head in range(H):
        group, state = head // (H // G), np.zeros((N, P))
        for t in range(T):
            new = np.outer(B[t].reshape(G, N)[group], x[t].reshape(H, P)[head])
            state = np.exp(-np.exp(weights["A_log"][head]) * dt[t, head]) * state + dt[t, head] * new
            y[t, head] = C[t].reshape(G, N)[group] @ state + weights["D"][head] * x[t].reshape(H, P)[head]
    y = y.reshape(T, H * P)
    norm = lambda y: weights["norm"]["scale"] * y / np.sqrt(np.mean(y**2, axis=1, keepdims=True) + cfg.norm_epsilon)  # noqa: E731
    y = norm(y) * silu(z) if cfg.norm_before_gate else norm(y * silu(z))
    return y @ weights["output"]["weight"]


@pytest.mark.parametrize("fields", [{}, {"norm_before_gate": True, "dt_limit_min": 0.4, "dt_limit_max": 0.8}])
def test_a_layer_equals_the_equations_of_the_paper(fields):
    model, params, tokens = setup("mamba2-tiny", batch=1, num_layers=1, task="none", **fields)
    (layer,) = params["layers"]
    embedded = np.asarray(params["token_embedding"], np.float64)[tokens[0]]
    norm = lambda x, weights: (  # noqa: E731
        np.asarray(weights["scale"]) * x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + model.config.norm_epsilon)
    )
    x = embedded + reference_mixer(model.config, layer["mixer"], norm(embedded, layer["norm"]))
    assert relative_error(jax.jit(model.apply)(params, tokens)[0][0], norm(x, params["final_norm"])) < 2e-6


@pytest.mark.thorough
def test_the_residual_stream_is_float32_by_default():
    """Each of 24 layers adds 0.003 to half of the channels, which are 1. In bfloat16, 1 + 0.003 is 1."""
    model = tiny_model("mamba2-tiny", num_layers=24, scan_layers=True, linear_bias=True, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), model.specs)
    mixer = params["layers"]["mixer"]
    output = {"weight": 0.0 * mixer["output"]["weight"], "bias": np.full((24, 32), 0.003, np.float32)}
    output["bias"][:, 16:] = 0.0
    params["layers"] = {**params["layers"], "mixer": {**mixer, "output": output}}
    ratios = []
    for variant in (model, model.with_fields(residual_in_float32=False)):
        hidden, _ = jax.jit(variant.apply)(params, np.zeros((1, 1), np.int32))
        assert hidden.dtype == jnp.bfloat16
        first, last = np.asarray(hidden, np.float32)[0, 0, [0, 31]]
        ratios.append(float(first / last))
    assert ratios == [pytest.approx(1.072, abs=0.01), 1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": ()}, r"pattern=\(\) must not be empty"),
        ({"pattern": ("mamba2", "mlp")}, "each entry is 'mamba2' or 'attention' or 'parallel'"),
        ({"norm_groups": 3}, "norm_groups=3 does not divide the width of a mixer, 64"),
        ({"expand": 0.01}, r"head_dim=8 must divide expand \* embed_dim = 0"),
        ({"attention_kv_heads": 5}, "attention_kv_heads=5 does not divide attention_heads=32"),
        ({"rotary_fraction": 0.01}, r"rotary_fraction=0.01 must be .* its product with head_dim=128, .* must be even"),
        ({"mlp_dim": 0}, "mlp_dim=0 must be at least 1"),
        ({"rotary_scaling": RotaryScaling("dynamic", 2.0, 64)}, "dynamic rotary scaling needs max_positions"),
        ({"attention_implementation": "fast"}, "attention_implementation='fast' is unknown"),
        ({"head_dim": 7}, r"head_dim=7 must divide expand \* embed_dim = 64"),
        ({"num_groups": 3}, "num_groups=3 does not divide the 8 heads"),
        ({"state_size": 0}, "state_size=0 must be at least 1"),
        ({"conv_width": 1}, "conv_width=1 must be at least 2"),
        ({"dt_limit_max": 0.0}, r"dt_limit_min=0.0 must be in \[0, dt_limit_max=0.0\)"),
        ({"init_dt_min": 0.2}, "init_dt_min=0.2, init_dt_max=0.1 and init_dt_floor=0.0001 must be above 0"),
        ({"init_dt_floor": 0.0}, "init_dt_floor=0.0 must be above 0"),
        ({"task": "masked"}, "task='masked' is unknown: choose from 'causal', 'classification'"),
    ],
)
def test_errors_name_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_model("mamba2-tiny", **fields)


def test_task_none_has_no_head():
    model, params, tokens = setup("mamba2-tiny", task="none", tie_embeddings=False)
    assert "head" not in params
    hidden, _ = jax.jit(model.apply)(params, tokens)
    with pytest.raises(ValueError, match="task='none' has no head"):
        model.logits(params, hidden)


# ---------------------------------------------------------------------------------------------------------- files

YARN = RotaryScaling("yarn", 2.0, original_positions=32)
SHAPES = {
    "tied": ("mamba2-tiny", {}),
    "untied": ("mamba2-tiny", {"tie_embeddings": False, "linear_bias": True, "dt_limit_min": 0.1}),
    "limits": ("mamba2-tiny", {"dt_limit_max": 0.5, "conv_bias": False, "task": "none"}),
    "bamba": ("bamba-tiny", {"num_layers": 5, "pattern": ("mamba2", "mamba2", "attention"), "rotary_scaling": YARN}),
    "bamba_bias": ("bamba-tiny", {"linear_bias": True, "attention_bias": True, "tie_embeddings": True, "task": "none"}),
    "mlp": ("bamba-tiny", {"pattern": ("mamba2",)}),
    "falcon": ("falcon-h1-tiny", {"rotary_scaling": YARN}),
    "falcon_plain": ("falcon-h1-tiny", {"multipliers": None, "norm_groups": None, "linear_bias": True}),
}


@pytest.mark.plain_cases(2)
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_files_round_trip(name, scan_layers, tmp_path):
    variant, fields = SHAPES[name]
    if scan_layers and "attention" in tiny_model(variant, **fields).config.pattern:
        fields = {**fields, "pattern": ("attention",)}
    model = tiny_model(variant, **fields, scan_layers=scan_layers)
    params = add_noise(initial_params(model))
    save_pretrained(tmp_path, model, params, max_shard_bytes=9000)
    loaded_model, loaded_params = load_pretrained(tmp_path, scan_layers=scan_layers)
    assert loaded_model == model
    assert_trees_equal(loaded_params, params)
    assert_trees_equal(params_from_tensors(model, dict(named_tensors(model, params))), params)


def test_the_parts_of_a_tensor_are_in_the_order_of_transformers():
    model, params, _ = setup("mamba2-tiny")
    tensors, mixer = dict(named_tensors(model, params)), params["layers"][1]["mixer"]
    in_proj = tensors["backbone.layers.1.mixer.in_proj.weight"]
    assert in_proj.shape == (64 + 64 + 24 + 24 + 8, 32)  # z, x, B, C, dt
    assert np.array_equal(in_proj[64:128], mixer["zx"]["weight"][:, 1].T)
    assert np.array_equal(in_proj[128:176], mixer["BC"]["weight"].T)
    assert np.array_equal(in_proj[176:], mixer["dt"]["weight"].T)
    conv = tensors["backbone.layers.1.mixer.conv1d.weight"]
    assert conv.shape == (64 + 48, 1, 4)
    assert np.array_equal(conv[64:, 0], mixer["BC_convolution"]["weight"].T)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rms_norm": False}, "rms_norm=False is not supported"),
        ({"num_heads": 4}, r"num_heads=4 times head_dim=8 must equal expand \* hidden_size = 64"),
        ({"time_step_limit": [0.1]}, r"time_step_limit=\[0.1\] must be a list of two numbers"),
        ({"time_step_limit": [math.inf, 1.0]}, "the first must be finite"),
        ({"time_step_limit": ["a", 1.0]}, r"time_step_limit=\['a', 1.0\] must be a list of two numbers"),
    ],
)
def test_unsupported_settings_raise(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(save_with_fields(tmp_path, "mamba2-tiny", **fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        (
            {"attn_layer_indices": 1},
            "attn_layer_indices=1 must be None or a list in which each entry is a whole number",
        ),
        ({"mamba_n_heads": 7}, "mamba_n_heads=7 times mamba_d_head=8 must equal the width of the mixer, 64"),
        ({"mamba_d_head": "wide"}, "mamba_d_head='wide' must equal the width of the mixer, 64"),
        ({"mamba_expand": None}, "mamba_expand=None must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
    ],
)
def test_unsupported_settings_of_bamba_raise(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(save_with_fields(tmp_path, "bamba-tiny", **fields))


def test_fields_of_bamba_with_a_default_are_read(tmp_path):
    fields = {"mamba_d_head": "auto", "num_key_value_heads": None, "attn_layer_indices": None}
    path = save_with_fields(tmp_path, "bamba-tiny", **fields) / "config.json"
    config = json.loads(path.read_text())
    del config["head_dim"]
    model = config_json.describe_model(config, path, {}).model
    assert (model.config.head_dim, model.config.attention_kv_heads, model.config.attention_head_dim) == (8, 4, 32 // 4)
    assert model.config.pattern == ("mamba2",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ssm_multipliers": [1.0, 2.0]}, r"ssm_multipliers=\[1.0, 2.0\] must have 5 numbers"),
        ({"mlp_multipliers": 0.5}, "mlp_multipliers=0.5 must be a list in which each entry is a finite number"),
        ({"lm_head_multiplier": None}, "lm_head_multiplier=None must be a finite number"),
        ({"projectors_bias": True}, "mamba_proj_bias=False and projectors_bias=True must be equal"),
        ({"head_dim": None}, "head_dim=None must be a whole number"),
        ({"mamba_d_ssm": None, "mamba_expand": None}, "mamba_expand=None must be a whole number"),
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
    ],
)
def test_unsupported_settings_of_falcon_h1_raise(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        load_pretrained(save_with_fields(tmp_path, "falcon-h1-tiny", **fields))


def test_infinite_limits_of_transformers_5_are_read(tmp_path):
    model, _ = load_pretrained(
        save_with_fields(tmp_path, "mamba2-tiny", time_step_limit=[0.01, {"__float__": "Infinity"}])
    )
    assert (model.config.dt_limit_min, model.config.dt_limit_max) == (0.01, None)


def test_segment_ids_of_64_bits_do_not_change_the_dtypes_of_the_state():
    model, params, tokens = setup("mamba2-tiny", length=6)
    with jax.enable_x64(True):
        segments = jnp.ones(tokens.shape, jnp.int64)
        before = jax.eval_shape(lambda: model.init_state(*tokens.shape))
        _, after = jax.eval_shape(lambda p, s: model.apply(p, tokens, state=s, segment_ids=segments), params, before)
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
