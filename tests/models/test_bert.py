"""Tests of BERT in addition to the contract and oracle tests: heads, token types, pretraining losses and files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm import spec
from jaxlm.interop.huggingface import load_pretrained, named_tensors, save_pretrained
from jaxlm.models import bert, get_model
from jaxlm.nn.loss import cross_entropy
from jaxlm.testing.helpers import apply, assert_trees_equal, random_tokens, relative_error, tiny_model
from tests.oracles import read_golden

GOLDEN = Path(__file__).parent / "goldens" / "bert_pretraining"
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 3e-5


def setup(name="bert", **overrides):
    """A tiny model, random parameters that are made without compiling, and tokens [2, 10]."""
    model = tiny_model(name, **overrides)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(leaf.init == spec.ONES, 0.2, leaf.shape), leaf.dtype), model.specs
    )
    return model, params, random_tokens(model, 2, 10)


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(model, params, tokens, **inputs):
    return model.apply(params, tokens, **inputs)[0]


@pytest.mark.parametrize(
    ("name", "overrides", "count"),
    [
        ("bert-base-uncased", {"task": "none"}, 109_482_240),  # encoder and pooler, as most tables count
        ("bert-base-uncased", {"next_sentence": True}, 110_106_428),  # with both pretraining heads
        ("bert-base-cased", {"task": "none"}, 108_310_272),
        ("bert-large-uncased", {"task": "none"}, 335_141_888),
        ("all-minilm-l6-v2", {}, 22_713_216),
    ],
)
def test_published_sizes(name, overrides, count):
    assert get_model(name, **overrides).num_parameters == count


@pytest.mark.parametrize(
    ("overrides", "heads"),
    [
        ({"task": "masked"}, {"masked"}),
        ({"task": "masked", "next_sentence": True}, {"masked", "pooler", "next_sentence"}),
        ({"task": "none"}, {"pooler"}),
        ({"task": "none", "next_sentence": True}, {"pooler", "next_sentence"}),
        ({"task": "classification", "num_labels": 5}, {"pooler", "classifier"}),
        ({"task": "token_classification", "num_labels": 5}, {"token_classifier"}),
        ({"task": "span_qa"}, {"span"}),
    ],
)
def test_heads_of_each_task(overrides, heads):
    model, params, tokens = setup(**overrides)
    body = {"token_embedding", "position_embedding", "token_type_embedding", "embedding_norm", "layers"}
    assert set(params) == body | heads
    if model.config.task == "none":
        with pytest.raises(ValueError, match="task='none' has no"):
            model.logits(params, jnp.zeros((2, 10, 32)))
        return
    hidden, state = jax.eval_shape(model.apply, params, tokens)
    assert state is None
    if model.config.task == "classification":
        hidden = jax.eval_shape(model.pool, params, hidden)
    outputs = {"masked": 128, "classification": 5, "token_classification": 5, "span_qa": 2}[model.config.task]
    assert jax.eval_shape(model.logits, params, hidden).shape == (*hidden.shape[:2], outputs)


def test_tokens_attend_to_all_tokens_of_their_document_only():
    model, params, _ = setup()
    tokens = np.arange(9, dtype=np.int32)[None]
    segments = np.array([[0, 1, 1, 1, 1, 2, 2, 2, 0]], np.int32)

    def hidden(table):
        return model.apply({**params, "token_embedding": table}, tokens, segment_ids=segments)[0][0].sum(-1)

    influence = np.abs(jax.jit(jax.jacrev(hidden))(params["token_embedding"])[:, :9]).max(axis=-1)
    same = (segments[0][:, None] == segments[0][None, :]) & (segments[0] > 0)
    assert (influence[1:8][same[1:8]] > 0).all()
    assert (influence[1:8][~same[1:8]] == 0).all()


def test_pool_reads_the_first_real_token():
    model, params, tokens = setup(task="none")
    unpadded = model.pool(params, hidden_of(model, params, tokens[:1, :6]))
    assert unpadded.shape == (1, 1, 32)
    padded, segments = np.full((3, 10), 7, np.int32), np.zeros((3, 10), np.int32)
    for row, start in enumerate((4, 0, 1)):
        padded[row, start : start + 6], segments[row, start : start + 6] = tokens[0, :6], 1
    segments[2, 7:] = 2  # another document
    pooled = model.pool(params, hidden_of(model, params, padded, segment_ids=segments), segment_ids=segments)
    assert relative_error(pooled, jnp.repeat(unpadded, 3, axis=0)) < TOLERANCE


def test_logits_of_selected_positions_equal_all_logits():
    model, params, tokens = setup(vocab_multiple=48)
    hidden = hidden_of(model, params, tokens)
    logits = jax.jit(model.logits)
    all_logits = logits(params, hidden)
    assert all_logits.shape == (2, 10, 144)
    assert (np.asarray(all_logits[..., 128:]) < -1e38).all()  # vocabulary entries that are padding
    positions = np.array([[7, 2], [0, 9]])[:, :, None]
    selected_logits = logits(params, jnp.take_along_axis(hidden, positions, axis=1))
    assert relative_error(selected_logits, jnp.take_along_axis(all_logits, positions, axis=1)) < TOLERANCE


def test_the_default_token_type_is_0():
    model, params, tokens = setup()
    types = np.zeros_like(tokens)
    hidden = hidden_of(model, params, tokens)
    assert relative_error(hidden_of(model, params, tokens, token_types=types), hidden) < TOLERANCE
    table = params["token_type_embedding"]
    changed_params = {**params, "token_type_embedding": table.at[0].add(jnp.arange(32) / 32)}
    assert relative_error(hidden_of(model, changed_params, tokens), hidden) > 1e-2
    types[:, 6:] = 1
    assert relative_error(hidden_of(model, params, tokens, token_types=types), hidden) > 1e-2
    types[1, 3] = 2
    assert np.isnan(np.asarray(hidden_of(model, params, tokens, token_types=types)[1])).any()


def test_classifier_dropout_acts_before_both_classification_heads():
    key = jax.random.key(1)
    model, params, tokens = setup(task="token_classification", classifier_dropout=0.5)  # the only rate that is not 0
    assert relative_error(hidden_of(model, params, tokens, key=key), hidden_of(model, params, tokens)) > 0.1
    model, params, _ = setup(task="classification", classifier_dropout=0.5)
    hidden = jax.random.normal(key, (2, 10, 32))
    assert relative_error(model.pool(params, hidden, key=key), model.pool(params, hidden)) > 0.1
    assert bert.classifier_dropout(bert.Config(hidden_dropout=0.3)) == 0.3


def test_errors_name_bad_input():
    model, params, tokens = setup()
    hidden = jnp.zeros((2, 10, 32))
    with pytest.raises(ValueError, match="carries no state"):
        model.apply(params, tokens, state={})
    with pytest.raises(ValueError, match=r"token_types \[2, 3\] must have the shape of tokens \[2, 10\]"):
        model.apply(params, tokens, token_types=np.zeros((2, 3), np.int32))
    with pytest.raises(ValueError, match="token_types must be integers of shape .*, got float64"):
        model.apply(params, tokens, token_types=np.zeros((2, 10)))
    with pytest.raises(ValueError, match="65 tokens exceed max_positions=64"):
        model.apply(params, np.zeros((1, 65), np.int32))
    with pytest.raises(ValueError, match="task='masked' has no pooler"):
        model.pool(params, hidden)
    with pytest.raises(ValueError, match="use next_sentence=True"):
        bert.next_sentence_logits(model.config, params, hidden)
    with pytest.raises(ValueError, match="got task='token_classification'"):
        bert.Config(task="token_classification", next_sentence=True)
    with pytest.raises(ValueError, match="task='causal' is unknown"):
        bert.Config(task="causal")
    with pytest.raises(ValueError, match="classifier_dropout=1.5 must be in"):
        bert.Config(classifier_dropout=1.5)
    with pytest.raises(ValueError, match="num_heads=5 does not divide embed_dim=768"):
        bert.Config(num_heads=5)
    with pytest.raises(TypeError, match="carries no state"):
        model.init_state(1, 8)


# ------------------------------------------------------------------------------------------------- pretraining


def compare_pretraining(directory, reference):
    """Compare pooled output, logits of both heads, loss and gradients with those of ``BertForPreTraining``."""
    model, params = load_pretrained(directory)
    assert (model.config.task, model.config.next_sentence) == ("masked", True)
    inputs = {name: reference[name] for name in ("tokens", "segment_ids", "token_types")}
    weights = reference["labels"] >= 0

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        hidden, _ = apply(model, params, **inputs)
        pooled = model.pool(params, hidden, segment_ids=inputs["segment_ids"])[:, 0]
        masked = model.logits(params, hidden)
        following = bert.next_sentence_logits(model.config, params, hidden, inputs["segment_ids"])
        losses = cross_entropy(masked, np.maximum(reference["labels"], 0))
        loss = jnp.sum(losses * weights) / weights.sum() + jnp.mean(cross_entropy(following, reference["following"]))
        return loss, (pooled, masked, following)

    (loss, (pooled, masked, following)), gradient = run(params)
    real = inputs["segment_ids"] > 0
    assert relative_error(pooled, reference["pooled"]) < TOLERANCE
    assert relative_error(masked[real], reference["masked_logits"][real]) < TOLERANCE
    assert relative_error(following, reference["following_logits"]) < TOLERANCE
    assert relative_error(loss, reference["loss"]) < TOLERANCE
    for name, got in named_tensors(model, gradient):
        if not name.endswith("key.bias"):  # only rounding errors: softmax is invariant to a bias on all keys
            assert relative_error(got, reference[f"gradient of {name}"]) < GRADIENT_TOLERANCE, name


def test_pretraining_equals_torch():
    compare_pretraining(GOLDEN, np.load(GOLDEN / "reference.npz"))


# ------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def old_file(tmp_path):
    """A directory in the old format, with duplicate tensors of the tied head and its bias, and with position ids."""
    model, params, _ = setup()
    save_pretrained(tmp_path, model, params)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].copy()
    tensors["bert.embeddings.position_ids"] = np.arange(64)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path, params, tensors


def test_duplicate_tensors_of_old_files_are_ignored(old_file):
    directory, params, _ = old_file
    assert_trees_equal(load_pretrained(directory)[1], params)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_untied_head_raises(old_file, name):
    directory, _, tensors = old_file
    tensors[f"cls.predictions.decoder.{name}"][0] += 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=f"cls.predictions.decoder.{name} must equal"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [("position_embedding_type", "relative_key"), ("is_decoder", True), ("hidden_act", "silu")],
)
def test_an_unsupported_setting_raises(old_file, field, value):
    directory, _, _ = old_file
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ValueError, match=f"{field}='?{value}"):
        load_pretrained(directory)


def test_the_mlp_width_is_written_and_defaults_to_3072(old_file):
    directory, _, _ = old_file
    path = directory / "config.json"
    config = json.loads(path.read_text())
    assert config["intermediate_size"] == 128
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "intermediate_size"}))
    with pytest.raises(ValueError, match="3072"):  # the default of transformers
        load_pretrained(directory)


def test_biases_and_norms_have_no_weight_decay():
    model = tiny_model("bert", next_sentence=True)
    decayed = {path for path, decay in spec.flatten(spec.decay_mask(model.specs)).items() if decay}
    tables = {"token_embedding", "position_embedding", "token_type_embedding"}
    assert decayed == tables | {path for path in spec.flatten(model.specs) if path.endswith("/weight")}


def test_names_of_the_first_published_files_are_read(tmp_path):
    for name in ("old", "new"):
        read_golden("bert", "masked", tmp_path / name)
    path = tmp_path / "old" / "model.safetensors"
    tensors = load_file(path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, path)
    (model, params), (same, expected) = load_pretrained(tmp_path / "old"), load_pretrained(tmp_path / "new")
    assert model == same
    assert_trees_equal(params, expected)
    save_file({**old, **tensors}, path)
    with pytest.raises(ValueError, match=r"contains tensors under both an old and a new name: .*LayerNorm\.beta"):
        load_pretrained(tmp_path / "old")
