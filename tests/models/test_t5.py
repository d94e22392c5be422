import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import spec
from jaxlm.interop import config_json
from jaxlm.interop.huggingface import load_pretrained, save_pretrained
from jaxlm.models import t5
from jaxlm.testing.helpers import (
    add_noise,
    apply,
    assert_trees_equal,
    decode_state,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
)

GOLDEN = Path(__file__).parent / "goldens" / "t5_generate.npz"  # made by test_t5_live.py
TOLERANCE = 1e-5

# With these small buckets, a wrong distance changes the bucket.
SMALL = {"num_layers": 1, "embed_dim": 16, "head_dim": 6, "mlp_dim": 20, "num_buckets": 8, "max_distance": 7}


logits_of = jax.jit(lambda model, params, hidden: model.logits(params, hidden), static_argnums=0)


@functools.cache
def small(**overrides):
    model = tiny_model("t5", **{**SMALL, **overrides})
    return model, add_noise(initial_params(model))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("t5-small", 60_506_624),
        ("t5-base", 222_903_552),
        ("t5-large", 737_668_096),
        ("t5-3b", 2_851_598_336),
        ("t5-v1.1-small", 76_961_152),
        ("t5-v1.1-base", 247_577_856),
        ("t5-v1.1-large", 783_150_080),
        ("mt5-small", 300_176_768),
    ],
)
def test_published_sizes(name, count):
    assert spec.count(t5.specs(t5.VARIANTS[name])) == count


def test_cached_decoding_equals_transformers():
    """Greedy ids and the logits of every step, for sources without padding, padded left and padded right."""
    golden = np.load(GOLDEN)
    config = t5.Config(
        vocab_size=30, num_layers=2, num_heads=2, embed_dim=8, head_dim=3, mlp_dim=10, mlp="gated_gelu",
        tie_embeddings=False, num_buckets=8, max_distance=7, scan_layers=True,
    )  # fmt: skip
    model = dataclasses.replace(tiny_model("t5"), config=config)
    paths = spec.flatten(model.specs)
    params = jax.tree.unflatten(jax.tree.structure(model.specs), [golden[f"params/{path}"] for path in paths])
    source, segments, tokens = golden["source"], golden["segments"], golden["tokens"]
    encoded = jax.jit(functools.partial(t5.encode, config))(params, source, segment_ids=segments)
    assert relative_error(encoded[segments > 0], golden["encoded"][segments > 0]) < TOLERANCE
    state, logits = decode_state(model, params, source, tokens.shape[1], segments), []
    next_tokens = np.full((3, 1), config.decoder_start_id, np.int32)
    for step in range(tokens.shape[1] - 1):
        hidden, state = apply(model, params, next_tokens, state=state)
        logits.append(np.asarray(logits_of(model, params, hidden))[:, 0])
        next_tokens = np.argmax(logits[-1], axis=-1).astype(np.int32)[:, None]
        np.testing.assert_array_equal(next_tokens[:, 0], tokens[:, step + 1])
    assert relative_error(np.stack(logits, axis=1), golden["logits"]) < TOLERANCE


@pytest.mark.thorough
@pytest.mark.parametrize("bias_per_layer", [False, True])
def test_decoding_from_a_state_equals_apply_with_a_source(bias_per_layer):
    """Padding between a prompt and the tokens after it must not change distances."""
    model, params = small(bias_per_layer=bias_per_layer)
    source, tokens = random_tokens(model, 2, 7), random_tokens(model, 2, 9, seed=1)
    segments = np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]], np.int32)
    full = np.asarray(apply(model, params, tokens, source=source, source_segment_ids=segments)[0])
    state = decode_state(model, params, source, 12, segments)
    assert [layer["key"].shape for layer in state["source"]["layers"]] == [(2, 7, 4 * 6)]
    assert spec.differences(t5.state_specs(model.config, 2, 12, 7), state) == []
    prompt, real = np.zeros((2, 6), np.int32), np.zeros((2, 6), np.int32)
    for row, length in enumerate((2, 5)):
        prompt[row, :length], real[row, :length] = tokens[row, :length], 1
    hidden, state = apply(model, params, prompt, state=state, segment_ids=real)
    assert relative_error(np.asarray(hidden)[0, :2], full[0, :2]) < TOLERANCE
    for i in range(4):
        next_tokens = np.stack([tokens[0, 2 + i], tokens[1, 5 + i]])[:, None]
        hidden, state = apply(model, params, next_tokens, state=state)
        assert relative_error(hidden, np.stack([full[0, 2 + i], full[1, 5 + i]])[:, None]) < TOLERANCE


@pytest.mark.thorough
def test_a_target_document_attends_to_the_source_document_of_the_same_number():
    model, params = small()
    source, tokens = random_tokens(model, 1, 9), random_tokens(model, 1, 8, seed=1)
    source_segments, segments = np.array([[1] * 5 + [2] * 3 + [0]]), np.array([[1] * 3 + [2] * 4 + [0]])
    inputs = {"source": source, "source_segment_ids": source_segments, "segment_ids": segments}
    packed = np.asarray(apply(model, params, tokens, **inputs)[0])
    assert np.isfinite(packed).all()
    for target_slice, source_slice in ((slice(0, 3), slice(0, 5)), (slice(3, 7), slice(5, 8))):
        separate, _ = apply(model, params, tokens[:, target_slice], source=source[:, source_slice])
        assert relative_error(packed[:, target_slice], separate) < TOLERANCE
    state = decode_state(model, params, source, 8, source_segments)
    cached, _ = apply(model, params, tokens, state=state, segment_ids=segments)
    assert relative_error(np.asarray(cached)[:, :7], packed[:, :7]) < TOLERANCE
    without_segments, _ = apply(
        model, params, tokens, state=state
    )  # without segment_ids, all tokens belong to document 1
    assert relative_error(np.asarray(without_segments)[:, :3], packed[:, :3]) < TOLERANCE


def test_only_distances_between_positions_matter():
    model, params = small()
    source, tokens, positions = random_tokens(model, 2, 4), random_tokens(model, 2, 6, seed=1), np.arange(6)[None]
    want = np.asarray(apply(model, params, tokens, source=source)[0])
    shifted = np.asarray(positions + np.array([[0], [100]]), np.int32)
    assert relative_error(apply(model, params, tokens, source=source, positions=shifted)[0], want) < 1e-6
    positions = np.repeat(2 * positions, 2, axis=0)
    stretched = np.asarray(apply(model, params, tokens, source=source, positions=positions)[0])
    assert relative_error(stretched[:, :1], want[:, :1]) < 1e-6
    assert relative_error(stretched, want) > 1e-3


@pytest.mark.thorough
def test_equal_tables_per_layer_equal_a_shared_table():
    model, params = small(num_layers=2)
    per_layer_model = small(num_layers=2, bias_per_layer=True)[0]
    per_layer_params = {**params}
    for stack in ("encoder", "decoder"):
        table = params[stack]["relative_bias"]
        layers = tuple({**layer, "relative_bias": table} for layer in params[stack]["layers"])
        per_layer_params[stack] = {"layers": layers, "final_norm": params[stack]["final_norm"]}
    spec.require_same(per_layer_model.specs, per_layer_params, "parameters")
    tokens, inputs = random_tokens(model, 2, 9), {"source": random_tokens(model, 2, 12, seed=1)}
    want = apply(model, params, tokens, **inputs)[0]
    assert relative_error(apply(per_layer_model, per_layer_params, tokens, **inputs)[0], want) < 1e-6
    per_layer_params["decoder"]["layers"][1]["relative_bias"] = -table
    assert relative_error(apply(per_layer_model, per_layer_params, tokens, **inputs)[0], want) > 1e-3


def test_float16_residual_sums_do_not_overflow():
    model, params = small()
    for stack in ("encoder", "decoder"):
        for layer in params[stack]["layers"]:
            layer["mlp"]["down"]["weight"] *= 3e5  # sums of more than 65504, the largest float16
    float16_model = dataclasses.replace(model, config=dataclasses.replace(model.config, dtype="float16"))
    tokens, inputs = random_tokens(model, 2, 9), {"source": random_tokens(model, 2, 12, seed=1)}
    hidden, _ = apply(float16_model, params, tokens, **inputs)
    assert hidden.dtype == jnp.float16
    assert relative_error(hidden, apply(model, params, tokens, **inputs)[0]) < 0.02


@pytest.mark.parametrize("form", [{}, {"mlp": "gated_gelu", "tie_embeddings": False}])
def test_initial_scores_and_logits_have_variance_1(form):
    """Attention does not scale scores, so the initial query weights must be small."""
    model = tiny_model("t5", embed_dim=64, head_dim=48, mlp_dim=256, vocab_size=512, num_layers=1, **form)
    params = initial_params(model)
    (layer,) = params["decoder"]["layers"]
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    q, k = (np.einsum("TD,DHK->HTK", x, layer["attention"][name]["weight"]) for name in ("query", "key"))
    assert 0.5 < np.std(np.einsum("HTK,HSK->HTS", q, k)[:, 0, 1]) < 2.0
    hidden = np.random.default_rng(2).standard_normal((1, 16, 64)).astype(np.float32)
    assert 0.9 < np.std(logits_of(model, params, hidden)) < 1.1


def test_an_encoder_without_decoder():
    """It has only encoder parameters, encodes as the full model does, and refuses to decode."""
    model, params = small()
    encoder_config = dataclasses.replace(model.config, num_decoder_layers=0, task="none")
    assert set(t5.specs(encoder_config)) == {"token_embedding", "encoder"}
    encoder_params = {name: params[name] for name in t5.specs(encoder_config)}
    source = random_tokens(model, 2, 5)
    encode = jax.jit(t5.encode, static_argnums=0)
    assert_trees_equal(encode(encoder_config, encoder_params, source), encode(model.config, params, source))
    for call in (
        lambda: t5.apply(encoder_config, encoder_params, source, source=source),
        lambda: t5.init_decode_state(encoder_config, encoder_params, source, 3),
        lambda: t5.state_specs(encoder_config, 2, 3),
    ):
        with pytest.raises(ValueError, match="num_decoder_layers=0 has no decoder: call encode"):
            call()


@pytest.mark.parametrize(
    ("change", "model_type", "architecture"),
    [
        ({}, "t5", "T5ForConditionalGeneration"),
        ({"task": "none"}, "t5", "T5Model"),
        ({"task": "none", "num_decoder_layers": 0}, "t5", "T5EncoderModel"),
        (
            {"bias_per_layer": True, "tie_embeddings": False, "mlp": "gated_gelu"},
            "umt5",
            "UMT5ForConditionalGeneration",
        ),
    ],
)
def test_files_round_trip(change, model_type, architecture, tmp_path):
    model = tiny_model("t5", **SMALL, **change)
    params = initial_params(model)
    save_pretrained(tmp_path, model, params)
    text = (tmp_path / "config.json").read_text()
    assert f'"{model_type}"' in text
    assert f'"{architecture}"' in text
    loaded_model, loaded_params = load_pretrained(tmp_path)
    assert loaded_model == model
    assert_trees_equal(loaded_params, params)


def test_files_of_transformers_5_have_another_field_for_a_separate_head():
    config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "tie_word_embeddings": True}
    for scaled in (True, False):
        described = config_json.describe_model({**config, "scale_decoder_outputs": scaled}, Path("config.json"), {})
        assert described.model.config.tie_embeddings == scaled


def test_duplicate_and_unused_tensors_of_published_files_are_ignored(tmp_path):
    model = tiny_model("t5", **SMALL)
    params = initial_params(model)
    save_pretrained(tmp_path, model, params)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": np.ones((8, 4), np.float32),
        **dict.fromkeys(("encoder.embed_tokens.weight", "lm_head.weight"), tensors["shared.weight"]),
    }
    save_file({**tensors, **extra}, tmp_path / "model.safetensors")
    assert_trees_equal(load_pretrained(tmp_path)[1], params)
    save_file({**tensors, **extra, "lm_head.weight": tensors["shared.weight"] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight must equal shared.weight"):
        load_pretrained(tmp_path)


def test_errors_name_bad_input():
    model, params = small()
    tokens, source = random_tokens(model, 2, 3), random_tokens(model, 2, 4)
    state = model.init_state(2, 5)
    with pytest.raises(
        ValueError, match=r"takes source \(to train\) or state \(to decode, from init_decode_state\), got neither"
    ):
        model.apply(params, tokens)
    with pytest.raises(ValueError, match="got both"):
        model.apply(params, tokens, source=source, state=state)
    with pytest.raises(ValueError, match="source_segment_ids cannot be given with a state"):
        model.apply(params, tokens, source_segment_ids=np.ones((2, 4), np.int32), state=state)
    with pytest.raises(ValueError, match=r"source \[1, 4\] and tokens \[2, 3\] must have the same number of rows"):
        model.apply(params, tokens, source=source[:1])
    with pytest.raises(ValueError, match="task='none' has no head"):
        t5.logits(dataclasses.replace(model.config, task="none"), params, np.zeros((1, 1, 16)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_decoder_layers": 0}, "task='seq2seq' needs a decoder"),
        ({"num_decoder_layers": -1}, "num_decoder_layers=-1 must be at least 0"),
        ({"num_decoder_layers": 10**6}, "num_decoder_layers=1000000 is too large: at most 10000"),
        ({"decoder_start_id": 32128}, "decoder_start_id=32128 is outside the vocabulary of 32128 ids"),
        ({"num_buckets": 7}, "7 buckets are too few or odd"),
        ({"max_distance": 8}, "max_distance=8 must exceed 8"),
        ({"max_distance": 16}, "max_distance=16 must exceed 16"),
        ({"mlp": "swiglu"}, "mlp='swiglu' is unknown: choose from 'relu', 'gated_gelu'"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"head_dim": 0}, "head_dim=0 must be at least 1"),
    ],
)
def test_errors_name_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        t5.Config(**fields)


def test_a_segment_id_of_a_source_that_occurs_again_starts_a_document():
    model = tiny_model("t5-tiny")
    params, source = initial_params(model), np.arange(9, dtype=np.int32)[None]
    encode = jax.jit(lambda ids: t5.encode(model.config, params, source, segment_ids=ids))
    again, unique = (np.repeat([ids], 3, axis=1).astype(np.int32) for ids in ([1, 2, 1], [1, 2, 3]))
    np.testing.assert_array_equal(encode(again), encode(unique))
    assert relative_error(encode(unique), encode(np.ones_like(unique))) > 1e-2
