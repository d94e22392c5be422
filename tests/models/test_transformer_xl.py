"""Tests of Transformer-XL in addition to the contract, such as the memory over several segments."""

import dataclasses
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
from jaxlm.models.transformer_xl import Config
from jaxlm.sharding import Sharding, make_mesh
from jaxlm.testing.helpers import (
    add_noise,
    apply,
    assert_trees_equal,
    initial_params,
    random_tokens,
    relative_error,
    tiny_model,
)
from tests.models.helpers import setup
from tests.oracles import read_golden

TOLERANCE = 1e-5  # float32, with different orders of summation
SEGMENTS = Path(__file__).parent / "goldens" / "transformer_xl_segments.npz"  # made by test_transformer_xl_live.py


logits_of = jax.jit(lambda model, params, hidden: model.logits(params, hidden), static_argnums=0)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("case", ["base", "divided", "pre_norm", "padded"])
def test_segments_with_memory_equal_transformers(case, tmp_path):
    """Some segments are shorter than the memory, some longer. The case padded also has same_length."""
    read_golden("transformer_xl", case, tmp_path)
    model, params = load_pretrained(tmp_path)
    with np.load(SEGMENTS) as file:
        golden = {name.removeprefix(f"{case}/"): x for name, x in file.items() if name.startswith(f"{case}/")}
    state, start = model.init_state(2, model.config.memory_length), 0
    for length in golden["lengths"]:
        segment = slice(start, start + length)
        hidden, state = apply(model, params, golden["tokens"][:, segment], state=state)
        assert relative_error(hidden, golden["hidden"][:, segment]) < TOLERANCE
        start += length
    memories = np.stack([layer["hidden"] for layer in state["layers"]])
    assert relative_error(memories, golden["memory"]) < TOLERANCE
    assert relative_error(logits_of(model, params, hidden), golden["logits"]) < TOLERANCE


def test_a_short_memory_drops_old_tokens():
    """Each layer extends the context by the length of the memory: num_layers * slots tokens in all."""
    model, params, tokens = setup("transformer_xl", batch=1, length=9)
    hidden = []
    for first in (1, 2):
        changed = tokens.copy()
        changed[0, 0] = first
        state = model.init_state(1, 3)
        for position in range(9):
            output, state = apply(model, params, changed[:, position : position + 1], state=state)
            hidden.append(np.asarray(output)[0, 0])
    differs = [bool(np.any(a != b)) for a, b in zip(hidden[:9], hidden[9:])]
    assert differs == [position <= 2 * 3 for position in range(9)]


@pytest.mark.parametrize("calls", [1, 3])
def test_same_length_gives_every_token_the_same_number_of_keys(calls):
    """With one layer, only the last memory_length tokens have an effect, in one call and in several."""
    model, params, tokens = setup("transformer_xl", batch=1, length=9, same_length=True, memory_length=4, num_layers=1)

    def last_hidden(tokens):
        state = model.init_state(1, 4)
        for chunk in np.split(tokens, calls, axis=1):
            hidden, state = apply(model, params, chunk, state=state)
        return np.asarray(hidden)[0, -1]

    for position in range(9):
        changed = tokens.copy()
        changed[0, position] = (changed[0, position] + 1) % 64
        assert np.array_equal(last_hidden(changed), last_hidden(tokens)) == (position <= 4), position


def test_distances_beyond_the_clamp_are_equal():
    model, params, tokens = setup("transformer_xl", batch=1, length=8, clamp_length=3, num_layers=1)
    near, far = tokens.copy(), tokens.copy()
    near[0, [5, 6]] = tokens[0, [6, 5]]
    far[0, [1, 3]] = tokens[0, [3, 1]]
    want, near, far = (np.asarray(apply(model, params, x)[0])[0, -1] for x in (tokens, near, far))
    assert relative_error(far, want) < TOLERANCE
    assert relative_error(near, want) > 1e-3


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("fields", [{}, {"same_length": True, "memory_length": 3, "clamp_length": 4, "pre_norm": True}])
def test_documents_in_several_calls_with_padding_equal_separate_documents(fields):
    model, params, _ = setup("transformer_xl", **fields)
    calls = [
        [[0, 0, 1, 1, 1, 2], [1, 1, 0, 0, 0, 0], [1, 0, 1, 2, 0, 2]],
        [[2, 0, 2, 3, 0, 0], [0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]],
        [[0, 3, 3, 3, 4, 4], [1, 2, 2, 0, 0, 0], [2, 2, 2, 3, 3, 3]],
    ]
    tokens = random_tokens(model, 3, 18)
    state, hidden = model.init_state(3, 18), []
    for call, segments in enumerate(calls):
        chunk = tokens[:, 6 * call : 6 * call + 6]
        output, state = apply(model, params, chunk, state=state, segment_ids=np.array(segments, np.int32))
        hidden.append(output)
    hidden, segments = np.concatenate(hidden, axis=1), np.concatenate(calls, axis=1)
    for row in range(3):
        for document in range(1, segments[row].max() + 1):
            (positions,) = np.nonzero(segments[row] == document)
            alone, _ = apply(model, params, tokens[row : row + 1, positions])
            assert relative_error(hidden[row, positions], alone[0]) < 2 * TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_displace_tokens_in_the_memory(side):
    """The memory is shorter than the prompt. A padded row decodes as without padding."""
    model, params, tokens = setup("transformer_xl", batch=1, length=10)
    padded, segments = np.zeros((2, 9), np.int32), np.zeros((2, 9), np.int32)
    real = slice(3, 9) if side == "left" else slice(0, 6)
    padded[0, real], segments[0, real] = tokens[0, :6], 1
    padded[1], segments[1] = tokens[0, :9], 1
    _, state = apply(model, params, padded, state=model.init_state(2, 4), segment_ids=segments)
    hidden, _ = apply(model, params, np.tile(tokens[:, 6:7], (2, 1)), state=state)
    _, unpadded_state = apply(model, params, tokens[:, :6], state=model.init_state(1, 4))
    want, _ = apply(model, params, tokens[:, 6:7], state=unpadded_state)
    assert relative_error(np.asarray(hidden)[:1], want) < TOLERANCE


@pytest.mark.thorough
def test_no_gradient_flows_into_the_memory():
    model, params, tokens = setup("transformer_xl")

    def loss(params, state):
        return jnp.sum(jnp.square(model.apply(params, tokens[:, 6:], state=state)[0]))

    def loss_through_memory(params):
        return loss(params, model.apply(params, tokens[:, :6], state=model.init_state(2, 8))[1])

    _, state = apply(model, params, tokens[:, :6], state=model.init_state(2, 8))
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1), allow_int=True))(params, state)
    assert not any(np.asarray(layer["hidden"]).any() for layer in gradients[1]["layers"])
    loss_through_memory = jax.jit(jax.grad(loss_through_memory))(params)
    for path, gradient in spec.flatten(loss_through_memory).items():
        assert relative_error(gradient, spec.flatten(gradients[0])[path]) < TOLERANCE, path


def test_log_probabilities_are_normalized():
    model, params, tokens = setup("transformer_xl")
    log_p = np.asarray(logits_of(model, params, apply(model, params, tokens)[0]), np.float64)
    assert log_p.shape == (2, 12, 64)
    assert np.abs(np.log(np.exp(log_p).sum(axis=-1))).max() < 1e-5


def test_a_classifier_reads_the_last_real_token():
    model, params, tokens = setup("transformer_xl", task="classification", num_labels=3)
    segments = np.array([[1] * 12, [0] * 2 + [1] * 7 + [0] * 3], np.int32)
    hidden, _ = apply(model, params, tokens, segment_ids=segments)
    pooled = model.pool(params, hidden, segment_ids=segments)
    hidden = np.asarray(hidden)
    assert_trees_equal(np.asarray(pooled)[:, 0], np.stack([hidden[0, 11], hidden[1, 8]]))
    assert model.logits(params, pooled).shape == (2, 1, 3)


def test_a_model_without_head_has_no_logits():
    model, params, tokens = setup("transformer_xl", task="none")
    assert "head" not in params
    with pytest.raises(ValueError, match="task='none' has no"):
        model.logits(params, apply(model, params, tokens)[0])


def test_published_sizes():
    # The number of transformers' class (test_transformer_xl_live.py). Table 1 of the paper says 257M and 151M.
    assert get_model("transfo-xl-wt103").num_parameters == 285_205_322
    assert round(get_model("transformer-xl-base").num_parameters / 1e6) == 151


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 31}, "embed_dim=31 must be even"),
        ({"clamp_length": 0}, "clamp_length=0 must be at least 1"),
        ({"memory_length": 0}, "memory_length=0 must be at least 1"),
        ({"cutoffs": (48, 32)}, r"cutoffs=\(48, 32\) must ascend"),
        ({"task": "masked"}, "task='masked' is unknown"),
    ],
)
def test_errors_name_bad_fields(change, message):
    with pytest.raises(ValueError, match=message):
        get_model("transformer-xl-tiny", **change)


def test_files_have_a_copy_of_shared_biases_for_each_layer(tmp_path):
    """transformers does not tie the copies: it would initialise a copy that a file lacks."""
    model = tiny_model("transformer_xl", untie_relative=False)
    params = add_noise(initial_params(model))
    save_pretrained(tmp_path / "shards", model, params, max_shard_bytes=300)
    assert_trees_equal(load_pretrained(tmp_path / "shards")[1], params)
    save_pretrained(tmp_path, model, params)
    tensors = load_file(tmp_path / "model.safetensors")
    copies = [f"transformer.layers.{i}.dec_attn.r_{x}_bias" for i in range(model.config.num_layers) for x in "wr"]
    assert set(tensors) - set(dict(named_tensors(model, params))) == set(copies)
    for name in copies:
        assert np.array_equal(tensors[name], tensors["transformer." + name.rpartition(".")[2]])
    tensors[copies[-1]][1, 2] += 1
    (tmp_path / "checksums.json").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.dec_attn.r_r_bias must equal transformer.r_r_bias, .* they differ"):
        load_pretrained(tmp_path)
    base = {name.removeprefix("transformer."): x for name, x in tensors.items() if name.startswith("transformer.")}
    save_file({**base, copies[-1].removeprefix("transformer."): base["r_r_bias"]}, tmp_path / "model.safetensors")
    assert np.array_equal(load_pretrained(tmp_path, task="none")[1]["position_bias"], params["position_bias"])


def test_fields_of_hugging_face_configs():
    (table,) = formats.of("transformer_xl")
    read, write = table.read_fields, table.write_fields
    assert read({"cutoffs": [3, 5], "clamp_len": -1, "tie_projs": [False, False, False]}) == {
        "cutoffs": (3, 5), "clamp_length": None, "tie_projections": False,
    }  # fmt: skip
    assert read({"tie_projs": [False, True], "clamp_len": 7}) == {"tie_projections": True, "clamp_length": 7}
    for cfg in (Config(), Config(cutoffs=(), clamp_length=None), Config(tie_projections=False)):
        assert dataclasses.replace(cfg, **read(write(cfg))) == cfg
    for tie_projs in ([True, True], [False, True, False]):
        with pytest.raises(ValueError, match="the first entry must be false, and all other entries must be equal"):
            read({"tie_projs": tie_projs})
    for tie_projs in ([False, 3], True):
        message = re.escape(f"tie_projs={tie_projs!r} must be None or a list in which each entry is true or false")
        with pytest.raises(ValueError, match=message):
            read({"tie_projs": tie_projs})


def test_a_mesh_may_split_a_vocabulary_that_needs_padding():
    model, params, _ = setup("transformer_xl", vocab_size=63, vocab_multiple=2)
    hidden = np.random.default_rng(0).normal(size=(2, 3, model.config.embed_dim)).astype(np.float32)
    expected = logits_of(model, params, hidden)
    with Sharding(make_mesh({"tensor": 2}, devices=jax.devices()[:2])).scope():
        assert relative_error(jax.jit(model.logits)(params, hidden), expected) < TOLERANCE
