"""Tests of Hugging Face directories without torch: golden outputs of torch (``make_goldens.py``), and all errors."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import integrity, spec
from jaxlm.interop import config_json, formats, huggingface
from jaxlm.interop.huggingface import load_pretrained, named_tensors, save_pretrained
from jaxlm.interop.locations import Location
from jaxlm.models import FAMILIES, Model, get_model
from jaxlm.models.registry import family
from jaxlm.objectives import causal
from jaxlm.sharding import Rules, Sharding, make_mesh
from jaxlm.testing.helpers import assert_trees_equal, initial_params, relative_error

GOLDENS = Path(__file__).parent / "goldens"
CASES = ("tied", "untied", "padded", "base")


def weights(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, read with the safetensors library."""
    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


def raw(tensors: dict[str, np.ndarray]) -> dict[str, tuple[Any, ...]]:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in tensors.items()}


def zeros(model: Model) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.specs)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of a golden directory that a test can change."""
    return Path(shutil.copytree(GOLDENS / "tied", tmp_path / "model"))


def edit_config(directory: Path, **fields: Any) -> None:
    """Set fields of ``config.json``. The value ``...`` removes a field."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(directory: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path)


# ------------------------------------------------------------------------------------------------------ numerics


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_logits_loss_and_all_gradients_equal_torch(case: str) -> None:
    head = {"task": "causal", "tie_embeddings": True} if case == "base" else {}  # its files have no head
    model, params = load_pretrained(GOLDENS / case, **head)
    with np.load(GOLDENS / case / "reference.npz") as file:
        golden = dict(file)
    tokens, segment_ids, real = golden["tokens"], golden["mask"], golden["mask"] == 1
    assert (case == "padded") == (not real.all())

    @jax.jit
    def compute(params: Any, tokens: Any, segment_ids: Any, batch: causal.Batch) -> Any:
        hidden, _ = model.apply(params, tokens, segment_ids=segment_ids)

        def mean_loss(params: Any) -> Any:
            total, count, _ = causal.loss(model, params, batch)
            return total / count

        return hidden, model.logits(params, hidden), *jax.value_and_grad(mean_loss)(params)

    batch = causal.batch(tokens, segment_ids)
    hidden, logits, loss, gradients = compute(params, tokens, segment_ids, batch)
    assert relative_error(hidden[real], golden["hidden"][real]) < 1e-5
    assert relative_error(logits[real], golden["logits"][real]) < 1e-5
    assert relative_error(loss, golden["loss"]) < 1e-6
    expected = {key.removeprefix("gradient of "): value for key, value in golden.items() if key.startswith("gradient")}
    got = dict(named_tensors(model, gradients))
    assert got.keys() == expected.keys()
    assert max(relative_error(got[name], expected[name]) for name in expected) < 2e-5


def test_goldens_cover_different_configs() -> None:
    configs = {case: load_pretrained(GOLDENS / case)[0].config for case in CASES}
    assert [config.tie_embeddings for config in configs.values()] == [True, False, True, True]
    assert [config.activation for config in configs.values()] == ["gelu_tanh", "gelu", "gelu_tanh", "relu"]
    assert [config.mlp_dim for config in configs.values()] == [None, 40, 24, None]
    assert configs["padded"].norm_epsilon == 1e-3
    assert "wte.weight" in weights(GOLDENS / "base")
    assert "transformer.wte.weight" in weights(GOLDENS / "tied")
    assert sum(path.stat().st_size for path in GOLDENS.rglob("*")) < 1_000_000


def test_neither_torch_nor_transformers_is_imported() -> None:
    script = (
        "import sys; from jaxlm.interop.huggingface import load_pretrained; load_pretrained(sys.argv[1]);"
        "print([name for name in ('torch', 'transformers', 'tokenizers', 'matplotlib') if name in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(GOLDENS / "tied")], capture_output=True, text=True, check=True, timeout=100
    )
    assert run.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_keeps_every_byte(case: str, dtype: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(GOLDENS / case, tmp_path / "in"))
    edit_weights(directory, lambda tensors: {name: array.astype(dtype) for name, array in tensors.items()})
    model, params = load_pretrained(directory)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {dtype}
    save_pretrained(tmp_path / "out", model, params)
    source = weights(directory)
    if case == "base":
        source = {f"transformer.{name}": array for name, array in source.items()}
    assert raw(weights(tmp_path / "out")) == raw(source)
    reloaded_model, _ = load_pretrained(tmp_path / "out")
    assert reloaded_model == model


def test_the_dtype_in_the_config_is_that_of_most_entries(tmp_path: Path) -> None:
    """For example, Mamba-2 may have A_log in float32, and all other parameters in bfloat16."""
    directory = Path(shutil.copytree(GOLDENS / "tied", tmp_path / "in"))
    edit_weights(
        directory,
        lambda tensors: {name: x if "ln_f" in name else x.astype(jnp.bfloat16) for name, x in tensors.items()},
    )
    edit_config(directory, torch_dtype="bfloat16")
    save_pretrained(tmp_path / "out", *load_pretrained(directory))
    assert raw(weights(tmp_path / "out")) == raw(weights(directory))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "variant"),
    [(name, variant) for name in FAMILIES for variant in family(name).VARIANTS if variant.endswith("tiny")],
)
def test_every_family_round_trips(name: str, variant: str, tmp_path: Path) -> None:
    model = get_model(variant)
    # All entries are different, so that a swapped axis or layer changes the result.
    flat = spec.flatten(model.specs)
    ends = np.cumsum([leaf.size for leaf in flat.values()])
    params = jax.tree.unflatten(
        jax.tree.structure(model.specs),
        [
            np.arange(end - leaf.size, end, dtype=np.float32).reshape(leaf.shape)
            for leaf, end in zip(flat.values(), ends, strict=True)
        ],
    )
    tensors = dict(named_tensors(model, params))
    assert sorted(np.concatenate([array.ravel() for array in tensors.values()])) == list(range(ends[-1]))
    save_pretrained(tmp_path, model, params)
    assert raw(weights(tmp_path)) == raw(tensors)
    reloaded_model, reloaded_params = load_pretrained(tmp_path)
    assert reloaded_model.specs == model.specs
    # A field that is None in the model can have an explicit value after loading.
    assert config_json.model_config_json(reloaded_model, "float32") == config_json.model_config_json(model, "float32")
    assert_trees_equal(reloaded_params, params)
    fields = {field.name for field in dataclasses.fields(model.config)}
    for table in formats.of(name):
        assert set(table.layouts) <= {*table.tensors, *table.unprefixed_tensors}
        assert {*table.hf_name_of_field, *table.default_fields} <= fields
        assert all(set(implied) <= fields for implied in table.architectures.values())


def test_a_native_file_may_have_fewer_tensors_than_experts(tmp_path: Path) -> None:
    """In jaxlm's own format, one tensor contains all experts of a layer."""
    model = get_model(
        "gated_deltanet", vocab_size=16, num_layers=1, embed_dim=8, mlp_dim=8, num_experts=96, expert_dim=2,
        experts_per_token=2, shared_expert_dim=2, negative_eigenvalues=True, delta_key_heads=1, delta_value_heads=1,
        delta_key_dim=4, delta_value_dim=4, num_heads=2, num_kv_heads=1, head_dim=8,
    )  # fmt: skip
    params = zeros(model)
    save_pretrained(tmp_path, model, params)
    assert len(weights(tmp_path)) < 96
    loaded, loaded_params = load_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_trees_equal(loaded_params, params)
    fields = json.loads((tmp_path / "config.json").read_text())["config"]
    edit_config(tmp_path, config={**fields, "num_experts": 10**12})
    with pytest.raises(ValueError, match=r"layers.0.experts.\S+ expected F32\[1000000000000, .*, got F32\[96, "):
        load_pretrained(tmp_path)


def test_formats_are_found_by_family() -> None:
    modules = {path.stem for path in Path(formats.__file__).parent.glob("*.py")} - {
        "__init__",
        "decoders",
        "experts",
        "format",
        "rotary",
    }
    assert {name for name in FAMILIES if formats.of(name)} == modules
    assert [table.model_type for table in formats.of("gpt")] == ["gpt2", "openai-gpt"]
    assert formats.of("lstm") == ()


def test_one_layer_of_qkv_has_the_layout_of_the_file() -> None:
    _, params = load_pretrained(GOLDENS / "tied")
    file = weights(GOLDENS / "tied")
    layer_weights = [layer["attention"]["qkv"]["weight"] for layer in params["layers"]]
    assert [weight.shape for weight in layer_weights] == [(24, 3, 3, 8)] * 2
    np.testing.assert_array_equal(layer_weights[1].reshape(24, 72), file["transformer.h.1.attn.c_attn.weight"])
    np.testing.assert_array_equal(  # the queries of the second head
        layer_weights[1][:, 0, 1], file["transformer.h.1.attn.c_attn.weight"][:, 8:16]
    )


def test_layouts_transpose_and_merge() -> None:
    weight = np.arange(24).reshape(2, 3, 4)  # [D, H, K]
    merged = Location(("a",), (), (2, 3, 4), ((0,), (1, 2)))
    transposed = Location(("a",), (), (2, 3, 4), ((1, 2), (0,)))
    assert merged.tensor_shape == (2, 12)
    assert transposed.tensor_shape == (12, 2)
    np.testing.assert_array_equal(merged.to_file(weight), weight.reshape(2, 12))
    np.testing.assert_array_equal(transposed.to_file(weight), weight.reshape(2, 12).T)
    for location in (merged, transposed):
        np.testing.assert_array_equal(location.to_model(location.to_file(weight)), weight)


# ----------------------------------------------------------------------------------------------- options of loading


def test_param_dtype_casts_and_the_default_does_not(directory: Path) -> None:
    _, params = load_pretrained(directory, param_dtype="bfloat16")
    _, original_params = load_pretrained(directory)
    jax.tree.map(
        lambda cast, full: np.testing.assert_array_equal(cast, full.astype(jnp.bfloat16)), params, original_params
    )
    with pytest.raises(ValueError, match="param_dtype='int8' is unknown"):
        load_pretrained(directory, param_dtype="int8")  # type: ignore[arg-type]


def test_dtypes_may_differ_between_parameters_but_not_between_layers_of_one(directory: Path) -> None:
    def half(*names: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        return lambda tensors: {
            name: array.astype(np.float16) if name.endswith(names) else array for name, array in tensors.items()
        }

    edit_weights(directory, half("wpe.weight"))
    _, params = load_pretrained(directory)
    assert params["position_embedding"].dtype == jnp.float16
    assert params["token_embedding"].dtype == jnp.float32
    model, params = load_pretrained(directory)
    save_pretrained(directory, model, params)
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"

    edit_weights(directory, half("h.1.ln_1.bias"))
    with pytest.raises(ValueError, match=r"layers/attention_norm/bias .*F16 and F32.*param_dtype='float32'"):
        load_pretrained(directory)
    _, params = load_pretrained(directory, param_dtype="float32")
    assert params["layers"][1]["attention_norm"]["bias"].dtype == jnp.float32


def test_one_tensor_may_contain_bfloat16_and_float16_parameters(tmp_path: Path) -> None:
    """``in_proj`` of Mamba-2 contains the three parameters zx, BC and dt."""
    model = get_model("mamba2-tiny", num_layers=1)

    def with_half_precision(path: Any, leaf: Any) -> Any:
        return np.ones(leaf.shape, jnp.float16 if spec.path_name(path).endswith("dt/weight") else jnp.bfloat16)

    params = jax.tree_util.tree_map_with_path(with_half_precision, model.specs)
    save_pretrained(tmp_path, model, params)
    dtypes = {name: str(array.dtype) for name, array in weights(tmp_path).items()}
    assert {name: dtype for name, dtype in dtypes.items() if dtype != "bfloat16"} == {
        "backbone.layers.0.mixer.in_proj.weight": "float32"
    }
    jax.tree.map(np.testing.assert_array_equal, load_pretrained(tmp_path)[1], params)


def test_stacked_layers_may_have_bfloat16_and_float16_tensors() -> None:
    model = get_model("gpt2-tiny", scan_layers=True)
    tensors = dict(named_tensors(model, zeros(model)))
    halves = {name: array.astype(jnp.float16 if ".h.0." in name else jnp.bfloat16) for name, array in tensors.items()}
    assert huggingface.params_from_tensors(model, halves)["layers"]["mlp"]["up"]["bias"].dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "message"), [("float64", "param_dtype='float32'"), ("int8", "only F32, F16, BF16")])
def test_other_dtypes_are_not_cast_silently(directory: Path, dtype: str, message: str) -> None:
    edit_weights(directory, lambda tensors: tensors | {"transformer.ln_f.bias": np.ones(24, dtype)})
    with pytest.raises(ValueError, match=rf"final_norm/bias \(transformer.ln_f.bias\) is .*{message}"):
        load_pretrained(directory)


def test_overrides_change_the_config_and_pad_tables_with_zeros(tmp_path: Path) -> None:
    model, params = load_pretrained(GOLDENS / "untied", vocab_multiple=64, dtype="bfloat16", attention_dropout=0.0)
    assert (model.config.dtype, model.config.attention_dropout, model.config.residual_dropout) == ("bfloat16", 0.0, 0.1)
    for table, name in (("token_embedding", "transformer.wte.weight"), ("head", "lm_head.weight")):
        assert params[table].shape == (64, 16)
        np.testing.assert_array_equal(params[table][:48], weights(GOLDENS / "untied")[name])
        assert not params[table][48:].any()
    save_pretrained(tmp_path, model, params)
    assert raw(weights(tmp_path)) == raw(weights(GOLDENS / "untied"))
    with pytest.raises(ValueError, match=r"no field 'vocab_multiples'.*vocab_multiple"):
        load_pretrained(GOLDENS / "untied", vocab_multiples=8)
    with pytest.raises(ValueError, match=r"c_attn.weight expected F32\[12, 36\], got F32\[24, 72\]"):
        load_pretrained(GOLDENS / "tied", embed_dim=12)


def test_parameters_are_loaded_with_their_shardings(tmp_path: Path) -> None:
    sharding = Sharding(make_mesh("data=4,tensor=2"), Rules.of(vocab="tensor", embed="data", mlp="tensor"))
    model, params = load_pretrained(GOLDENS / "tied", sharding=sharding, vocab_multiple=8)
    _, unsharded = load_pretrained(GOLDENS / "tied", vocab_multiple=8)
    assert_trees_equal(params, unsharded)
    expected = sharding.tree(model.specs)
    assert jax.tree.map(
        lambda leaf, expected_sharding: leaf.sharding == expected_sharding, params, expected
    ) == jax.tree.map(lambda _: True, params)
    assert params["token_embedding"].addressable_shards[0].data.shape == (32, 6)
    save_pretrained(tmp_path, model, params)
    assert raw(weights(tmp_path)) == raw(weights(GOLDENS / "tied"))
    with pytest.raises(ValueError, match="vocab"):  # 61 rows over 2 devices
        load_pretrained(GOLDENS / "tied", sharding=sharding)


def test_loading_needs_memory_for_at_most_one_extra_parameter(tmp_path: Path) -> None:
    model = get_model("gpt2-tiny", num_layers=12, embed_dim=128, scan_layers=True)
    save_pretrained(tmp_path, model, zeros(model), max_shard_bytes=1_000_000)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(model.specs))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model.specs))
    tracemalloc.start()
    _, params = load_pretrained(tmp_path, scan_layers=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert spec.count(params) == model.num_parameters
    # tracemalloc traces the memory of NumPy and not that of XLA. NumPy holds only the parameter that is being copied.
    assert largest <= peak < 1.5 * largest < 0.5 * total


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_tensor_names_may_have_no_prefix_and_old_buffers_are_ignored(directory: Path, prefix: str) -> None:
    def to_old_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = {prefix + name.removeprefix("transformer."): array for name, array in tensors.items()}
        buffers = {f"{prefix}h.{layer}.attn.bias": np.tri(20, dtype=np.bool_)[None, None] for layer in range(2)}
        scalars = {f"{prefix}h.{layer}.attn.masked_bias": np.full((), -1e4, np.float32) for layer in range(2)}
        return tensors | buffers | scalars | {"lm_head.weight": tensors[f"{prefix}wte.weight"]}

    edit_weights(directory, to_old_names)
    _, params = load_pretrained(directory)
    assert_trees_equal(params, load_pretrained(GOLDENS / "tied")[1])


def test_the_position_ids_in_old_files_of_gpt1_are_ignored(tmp_path: Path) -> None:
    model = get_model("openai-gpt-tiny")
    save_pretrained(tmp_path, model, zeros(model))
    edit_weights(tmp_path, lambda tensors: tensors | {"transformer.position_ids": np.arange(64)})
    (tmp_path / "checksums.json").unlink()
    assert load_pretrained(tmp_path)[0] == model


def test_a_tied_head_must_equal_the_token_table(directory: Path) -> None:
    def add_changed_head(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        table = tensors["transformer.wte.weight"].copy()
        table[60, 23] += 1
        return tensors | {"lm_head.weight": table}

    edit_weights(directory, add_changed_head)
    with pytest.raises(ValueError, match=r"lm_head.weight must equal transformer.wte.weight.*differ"):
        load_pretrained(directory)
    _, params = load_pretrained(directory, tie_embeddings=False)
    assert params["head"][60, 23] == params["token_embedding"][60, 23] + 1
    edit_weights(directory, lambda tensors: tensors | {"lm_head.weight": np.ones((3, 2), np.float32)})
    with pytest.raises(ValueError, match=r"lm_head.weight must equal"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("name", "copy"),
    [
        ("gpt2-tiny", "lm_head.weight"),
        ("t5-tiny", "encoder.embed_tokens.weight"),
        ("t5-tiny", "decoder.embed_tokens.weight"),
        ("t5-untied", "decoder.embed_tokens.weight"),
    ],
)
def test_a_copy_replaces_a_missing_tied_tensor(name: str, copy: str, tmp_path: Path) -> None:
    """``safetensors.torch.save_model`` keeps only one of several tied tensors."""
    model = get_model("t5-tiny", tie_embeddings=False) if name == "t5-untied" else get_model(name)
    params = initial_params(model)
    save_pretrained(tmp_path, model, params)
    (tmp_path / "checksums.json").unlink()
    original = {"gpt2-tiny": "transformer.wte.weight"}.get(name, "shared.weight")
    edit_weights(tmp_path, lambda tensors: {copy if key == original else key: x for key, x in tensors.items()})
    loaded_model, loaded_params = load_pretrained(tmp_path)
    assert loaded_model == model
    assert_trees_equal(loaded_params, params)
    _, headless_params = load_pretrained(tmp_path, task="none")
    assert_trees_equal(headless_params, {name: params[name] for name in headless_params})
    edit_weights(tmp_path, lambda tensors: {key: x for key, x in tensors.items() if key != copy})
    with pytest.raises(ValueError, match=f"missing: {original}"):
        load_pretrained(tmp_path)


def test_an_untied_head_does_not_replace_a_missing_token_table(tmp_path: Path) -> None:
    model = get_model("llama-tiny", tie_embeddings=False)
    save_pretrained(tmp_path, model, initial_params(model))
    (tmp_path / "checksums.json").unlink()
    edit_weights(tmp_path, lambda tensors: {k: x for k, x in tensors.items() if k != "model.embed_tokens.weight"})
    for overrides in ({}, {"task": "classification"}):
        with pytest.raises(ValueError, match=r"missing: model.embed_tokens.weight"):
            load_pretrained(tmp_path, **overrides)


def test_quantized_weights_are_an_error(directory: Path) -> None:
    edit_config(directory, quantization_config={"quant_method": "bitnet", "quantization_mode": "online"})
    with pytest.raises(
        ValueError, match=r"quantization_config=.*'bitnet'.* is not supported: save the model with float"
    ):
        load_pretrained(directory)
    edit_config(directory, quantization_config=None)
    load_pretrained(directory)


def test_missing_fields_have_defaults_and_unknown_fields_are_ignored(directory: Path) -> None:
    edit_config(directory, tie_word_embeddings=..., n_inner=..., scale_attn_weights=..., architectures=...)
    model, _ = load_pretrained(directory)
    assert model == load_pretrained(GOLDENS / "tied")[0]
    edit_config(directory, activation_function="gelu_pytorch_tanh", something_unheard_of=3)  # the same function
    assert load_pretrained(directory)[0] == model


# -------------------------------------------------------------------------------------------------------- saving


def test_contents_of_a_saved_config(tmp_path: Path) -> None:
    """``config.json`` has exactly the fields of GPT-2, and the permissions of the weights."""
    model = get_model("gpt2-tiny", activation="gelu", mlp_dim=48, attention_dropout=0.25)
    save_pretrained(tmp_path, model, zeros(model))
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 128,
        "n_positions": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_embd": 32,
        "n_inner": 48,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.25,
        "resid_pdrop": 0.1,
        "tie_word_embeddings": True,
        "activation_function": "gelu",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "pruned_heads": {},
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float32",
    }
    mode = (tmp_path / "config.json").stat().st_mode
    assert (tmp_path / "model.safetensors").stat().st_mode == mode
    assert config_json.model_config_json(get_model("gpt2"), "float32")["eos_token_id"] == 50256


def test_shards_and_their_index(tmp_path: Path) -> None:
    """No shard exceeds the limit, the index is correct, and the shards load as the same model."""
    model, params = load_pretrained(GOLDENS / "tied")
    save_pretrained(tmp_path, model, params, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted({path.name for path in tmp_path.iterdir()} - {integrity.CHECKSUMS})
    count = len(files) - 2
    assert files == [
        "config.json",
        *(f"model-{shard:05}-of-{count:05}.safetensors" for shard in range(1, count + 1)),
        "model.safetensors.index.json",
    ]
    assert 3 <= count <= 6
    for name in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == tensors.keys()
        assert sum(array.nbytes for array in tensors.values()) <= 20_000
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert raw(weights(tmp_path)) == raw(weights(GOLDENS / "tied"))
    reloaded_model, reloaded_params = load_pretrained(tmp_path)
    assert reloaded_model == model
    assert_trees_equal(reloaded_params, params)


def test_a_tensor_larger_than_a_shard_gets_its_own_shard(tmp_path: Path) -> None:
    assert huggingface._split_into_shards([("a", 3), ("b", 9), ("c", 2), ("d", 3)], 5) == [["a"], ["b"], ["c", "d"]]
    model, params = load_pretrained(GOLDENS / "tied")
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_pretrained(tmp_path, model, params, max_shard_bytes=0)


def test_a_save_replaces_an_earlier_save_and_keeps_other_files(tmp_path: Path) -> None:
    model, params = load_pretrained(GOLDENS / "tied")
    other_model, other_params = load_pretrained(GOLDENS / "padded")
    (tmp_path / "tokenizer.json").write_text("{}")
    for max_bytes in (20_000, 10**9, 12_000, 20_000):
        save_pretrained(tmp_path, other_model, other_params, max_shard_bytes=10_000)
        save_pretrained(tmp_path, model, params, max_shard_bytes=max_bytes)
        assert (tmp_path / "model.safetensors").exists() == (max_bytes == 10**9)
        assert raw(weights(tmp_path)) == raw(weights(GOLDENS / "tied"))
        assert load_pretrained(tmp_path)[0] == model
        assert (tmp_path / "tokenizer.json").exists()
        assert not list(tmp_path.glob(".*"))


def test_a_failed_save_keeps_the_earlier_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = load_pretrained(GOLDENS / "tied")
    save_pretrained(tmp_path, model, params, max_shard_bytes=20_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        if "00002" in path.name:
            raise OSError("no space left on device")
        save_file(tensors, path, metadata)

    def full_at_the_checksums(directory: Path, names: Any) -> None:
        raise OSError("no space left on device")

    # The second failure comes when all weights are written, directly before the files are moved.
    for module, name, replacement in (
        (huggingface, "save_file", full), (integrity, "write_checksums", full_at_the_checksums)
    ):  # fmt: skip
        monkeypatch.setattr(module, name, replacement)
        with pytest.raises(OSError, match="no space"):
            save_pretrained(tmp_path, model, jax.tree.map(lambda leaf: leaf + 1, params), max_shard_bytes=20_000)
        monkeypatch.undo()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_interrupted_save_of_shards_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = load_pretrained(GOLDENS / "tied")
    save_pretrained(tmp_path, model, params, max_shard_bytes=20_000)

    def killed(source: Path, target: Path) -> None:
        if "00002" in target.name:
            raise KeyboardInterrupt
        source.rename(target)

    monkeypatch.setattr(huggingface.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path, model, jax.tree.map(lambda leaf: leaf + 1, params), max_shard_bytes=20_000)
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        load_pretrained(tmp_path)


def test_an_interrupted_save_leaves_no_generation_config_of_the_earlier_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, params = load_pretrained(GOLDENS / "tied")
    save_pretrained(tmp_path, model, params)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    install_files = integrity.install_files

    def killed(*arguments: Any, **options: Any) -> None:
        install_files(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(integrity, "install_files", killed)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(tmp_path, model, params)
    loaded, _ = load_pretrained(tmp_path)
    assert loaded.metadata.generation_config is None


def test_parameters_that_could_not_be_loaded_are_not_saved(tmp_path: Path) -> None:
    model, params = load_pretrained(GOLDENS / "tied")
    with pytest.raises(ValueError, match=r"parameters of gpt .*\n.*missing: token_embedding"):
        save_pretrained(tmp_path / "a", model, {key: leaf for key, leaf in params.items() if key != "token_embedding"})
    short = {**params, "final_norm": {"scale": jnp.ones(24), "bias": jnp.ones(23)}}
    with pytest.raises(ValueError, match=r"final_norm/bias expected float32\[24\], got float32\[23\]"):
        save_pretrained(tmp_path / "a", model, short)
    integers = {**params, "position_embedding": params["position_embedding"].astype(jnp.int32)}
    with pytest.raises(ValueError, match="position_embedding is int32"):
        save_pretrained(tmp_path / "a", model, integers)
    assert not (tmp_path / "a").exists()


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, r"model_type='mamba' is not supported: .*gpt2 \(GPT2LMHeadModel, "),
        ({"model_type": ...}, r"model_type=None is not supported"),
        ({"architectures": ["GPT2DoubleHeadsModel"]}, r"'GPT2DoubleHeadsModel'.*GPT2LMHeadModel"),
        ({"activation_function": "swish"}, r"activation_function='swish' .*choose from gelu_new, "),
        ({"activation_function": ["gelu"]}, r"activation_function=\['gelu'\]"),
        ({"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx=True.*it must be False"),
        ({"scale_attn_weights": False}, r"scale_attn_weights=False .*it must be True"),
        ({"n_layer": "2"}, r"n_layer='2' must be a whole number"),
        ({"n_layer": True}, r"n_layer=True must be a whole number"),
        ({"n_inner": 1.5}, r"n_inner=1.5 must be a whole number or None"),
        ({"tie_word_embeddings": None}, r"tie_word_embeddings=None must be true or false"),
        (
            {"eos_token_id": "2"},
            r"config.json: eos_token_id='2' must be a whole number or None or a list in which each entry is",
        ),
        ({"n_head": 5}, r"config.json: num_heads=5 does not divide embed_dim=24"),
        ({"n_layer": 10**3}, r"1000 layers .*, but only 28 tensors"),
        ({"n_layer": 10**12}, r"n_layer=1000000000000 is too large"),
        (
            {"vocab_size": 10**12},
            r"differs: transformer.wte.weight expected F32\[1000000000000, 24\], got F32\[61, 24\]",
        ),
        ({"n_layer": 1}, r"12 differences\)\S\n.*extra: transformer.h.1.attn.c_attn.bias"),
        ({"n_layer": 3}, r"12 differences\)\S\n.*missing: transformer.h.2.attn.c_attn.bias"),
    ],
)
def test_errors_name_unsupported_config_fields(directory: Path, fields: dict[str, Any], message: str) -> None:
    edit_config(directory, **fields)
    with pytest.raises(ValueError, match=message):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen2", {"use_sliding_window": True}), ("smollm3", {}), ("gemma3_text", {}), ("bamba", {}), ("qwen3_next", {})
    ],
)  # fmt: skip
def test_a_huge_number_of_layers_is_an_error_before_lists_of_layers_are_made(
    model_type: str, fields: dict[str, Any]
) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 10**12, **fields}
    with pytest.raises(ValueError, match=r"num_hidden_layers=1000000000000 is too large: at most 10000"):
        config_json.describe_model(config, Path("config.json"), {})


def test_the_number_of_decoder_layers_is_checked_before_the_specs_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_model("t5-tiny")
    save_pretrained(tmp_path, model, zeros(model))
    edit_config(tmp_path, num_decoder_layers=9999)
    (tmp_path / "checksums.json").unlink()
    monkeypatch.setattr(model.module, "specs", None)
    for overrides in ({}, {"task": "none", "num_decoder_layers": 0}):
        with pytest.raises(ValueError, match="9999 decoder layers in config.json, but only"):
            load_pretrained(tmp_path, **overrides)


def without(name: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda tensors: {key: array for key, array in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("transformer.h.1.ln_2.bias"), r"missing: transformer.h.1.ln_2.bias tensor\[24\]"),
        (lambda t: t | {"score.weight": np.ones((2, 24), np.float32)}, r"extra: score.weight F32\[2, 24\]"),
        (lambda t: t | {"wte.weight": np.ones(2, np.float32)}, r"extra: wte.weight F32\[2\]"),
        (
            lambda t: t | {"transformer.h.0.attn.c_attn.weight": np.ones((72, 24), np.float32)},
            r"differs: transformer.h.0.attn.c_attn.weight expected F32\[24, 72\], got F32\[72, 24\]",
        ),
        (
            lambda t: t | {"transformer.h.0.attn.c_attn.bias": np.ones((3, 24), np.float32)},
            r"expected F32\[72\], got F32\[3, 24\]",
        ),
    ],
)  # fmt: skip
def test_errors_name_missing_extra_and_misshapen_tensors(directory: Path, change: Any, message: str) -> None:
    edit_weights(directory, change)
    with pytest.raises(ValueError, match=message):
        load_pretrained(directory)


@pytest.mark.parametrize("keep", [0, 5, 100, 60_000, -1])
def test_error_for_truncated_weights(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or not a safetensors file"):
        load_pretrained(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", [b"", b'{"n_layer": 2,', b"[1]", b"\xff\xfe"])
def test_error_for_damaged_json(tmp_path: Path, name: str, content: bytes) -> None:
    save_pretrained(tmp_path, *load_pretrained(GOLDENS / "tied"), max_shard_bytes=20_000)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} (is not JSON or is damaged|must hold a JSON object)"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../elsewhere/model.safetensors", "{outside}/model.safetensors", "sub/model.safetensors", "..\\x.safetensors"],
)
def test_error_for_an_index_with_a_path_out_of_the_directory(directory: Path, name: str) -> None:
    outside = directory.parent / "elsewhere"
    for folder in (outside, directory / "sub"):
        folder.mkdir()
        shutil.copy(directory / "model.safetensors", folder)
    (directory / "model.safetensors").unlink()
    name = name.format(outside=outside)
    index = {"weight_map": dict.fromkeys(weights(outside), name)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not a plain file name") as raised:
        load_pretrained(directory)
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_must_stay_in_the_directory_or_in_the_hub_cache(directory: Path, name: str) -> None:
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    (directory / name).rename(blobs / "0123")
    (directory / name).symlink_to(blobs / "0123")
    with pytest.raises(ValueError, match=rf"{name} is a link out of the directory, to .*0123"):
        load_pretrained(directory)
    snapshot = directory.parent / "snapshots" / "abcd"
    snapshot.parent.mkdir()
    directory.rename(snapshot)
    blobs.rename(directory.parent / "other")  # without blobs/, it is not a cache of the hub
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(directory.parent / "other" / "0123")
    with pytest.raises(ValueError, match=rf"{name} is a link out of the directory"):
        load_pretrained(snapshot)
    (directory.parent / "other").rename(blobs)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(blobs / "0123")
    model, _ = load_pretrained(snapshot)
    assert model == load_pretrained(GOLDENS / "tied")[0]


def test_errors_for_an_index_that_does_not_match_its_files(tmp_path: Path) -> None:
    save_pretrained(tmp_path, *load_pretrained(GOLDENS / "tied"), max_shard_bytes=20_000)
    path = tmp_path / "model.safetensors.index.json"
    valid_text = path.read_text()
    index = json.loads(valid_text)
    first, last = index["weight_map"]["transformer.h.0.ln_1.bias"], index["weight_map"]["transformer.wte.weight"]
    assert first != last

    def check_error(weight_map: Any, error: type[Exception], message: str) -> None:
        path.write_text(json.dumps({**index, "weight_map": weight_map}))
        with pytest.raises(error, match=message):
            load_pretrained(tmp_path)

    check_error(
        index["weight_map"] | {"transformer.wte.weight": first}, ValueError, f"wte.weight: in {last}, index says"
    )
    check_error(index["weight_map"] | {"new.weight": first}, ValueError, "new.weight: in no file, index says")
    check_error(
        {k: v for k, v in index["weight_map"].items() if k != "transformer.wte.weight"}, ValueError, "says nothing"
    )
    check_error(
        index["weight_map"] | {"new.weight": "gone.safetensors"}, FileNotFoundError, r"gone.safetensors is missing"
    )
    check_error(
        index["weight_map"] | {"new.weight": "pytorch_model.bin"}, ValueError, r"names 'pytorch_model.bin': only"
    )
    check_error([], ValueError, "weight_map must name the file")
    check_error({"new.weight": 3}, ValueError, "weight_map must name the file")
    path.write_text(valid_text)
    (tmp_path / last).unlink()
    with pytest.raises(FileNotFoundError, match=f"{last} is missing"):
        load_pretrained(tmp_path)


def test_error_for_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_pretrained(tmp_path, *load_pretrained(GOLDENS / "tied"), max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    file = tmp_path / index["weight_map"]["transformer.h.0.ln_1.bias"]
    save_file(load_file(file) | {"transformer.wte.weight": np.ones(3, np.float32)}, file)
    with pytest.raises(ValueError, match=r"'transformer.wte.weight' is in model-.* and in model-"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_never_read(directory: Path, name: str, tmp_path: Path) -> None:
    (directory / name).write_bytes(f"cos\nmkdir\n(V{tmp_path}/opened\ntR.".encode())  # makes a directory when unpickled
    load_pretrained(directory)  # with a safetensors file in the same directory, loading works
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"only pickle files \({name}\).*arbitrary code.*safe_serialization=True"):
        load_pretrained(directory)
    shutil.copy(directory / name, directory / "model.safetensors")  # a pickle file with the wrong name
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_pretrained(directory)
    assert not (tmp_path / "opened").exists()


def test_the_advice_for_pickles_names_the_class_of_the_files(directory: Path) -> None:
    os.rename(directory / "model.safetensors", directory / "pytorch_model.bin")
    for architectures, name in (
        (["GPT2ForSequenceClassification"], "GPT2ForSequenceClassification"),
        (..., "GPT2LMHeadModel"),
    ):
        edit_config(directory, architectures=architectures)
        with pytest.raises(ValueError, match=rf"`{name}\.from_pretrained\(directory\)\.save_pretrained"):
            load_pretrained(directory)


def test_errors_for_directories_without_a_model(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="two models: remove the old one"):
        load_pretrained(directory)
    os.remove(directory / "model.safetensors.index.json")
    os.rename(directory / "model.safetensors", directory / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor .*it contains .*weights.safetensors"):
        load_pretrained(directory)
    os.remove(directory / "config.json")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_pretrained(directory)
    with pytest.raises(FileNotFoundError, match=r"'gpt2' is not a directory: nothing is downloaded.*hf download"):
        load_pretrained("gpt2")
