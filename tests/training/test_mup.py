"""Tests of muP: factors by hand, and for many families that updates keep their size when the model gets wider."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.laboratory.models import ENCODER_DECODERS, MODELS, model_of
from jaxlm import get_model, spec
from jaxlm.objectives import classification
from jaxlm.objectives.batch import Batch, token_loss
from jaxlm.testing.helpers import tiny_model
from jaxlm.training.mup import ScaledInit, mup
from jaxlm.training.optimizer import OptimizerConfig, make_optimizer
from jaxlm.training.trainer import Trainer


def further_models(width):
    """Variants and config fields of models that the laboratory does not have: classifiers, hybrids and experts."""
    heads, mlp, classifier = width // 32, 8 * width // 3, {"task": "classification", "num_labels": 4}
    attention = {"num_heads": heads, "max_positions": 16, "mlp_dim": mlp}
    hybrid = {
        "attention_heads": heads, "attention_kv_heads": heads, "attention_head_dim": 32, "head_dim": 32, "mlp_dim": mlp,
    }  # fmt: skip
    delta_rule = {"delta_key_heads": heads, "delta_value_heads": heads, "delta_key_dim": 32, "delta_value_dim": 32}
    return {
        "bert": ("bert", {**attention, **classifier, "num_layers": 1}),
        "roberta": ("roberta", {**attention, **classifier, "num_layers": 1}),
        "xlnet": ("xlnet", {**classifier, "num_heads": heads, "mlp_dim": mlp, "num_layers": 1}),
        "resnet": (
            "resnet-tiny",
            {"num_labels": 4, "max_positions": 12, "channels": width, "k_max": 2, "fc_dim": 2 * width},
        ),
        "bamba": ("bamba-tiny", {**hybrid, "num_layers": 2}),
        "falcon-h1": ("falcon-h1-tiny", {**hybrid, "expand": 2.0, "num_layers": 1}),
        "gated_deltanet hybrid": (
            "gated_deltanet-hybrid-tiny",
            {**delta_rule, "num_heads": heads, "num_kv_heads": heads, "mlp_dim": mlp, "num_layers": 2},
        ),
        "gated_deltanet experts": (
            "gated_deltanet-tiny", {**delta_rule, "mlp_dim": mlp, "num_experts": 4, "num_layers": 1},
        ),
        "xlstm hybrid": (
            "xlstm-slstm-tiny", {"num_heads": heads, "mlp_dim": mlp, "key_dim": width, "value_dim": 2 * width},
        ),
        "mixtral": ("mixtral-tiny", {**attention, "num_kv_heads": heads, "num_layers": 1}),
    }  # fmt: skip


NAMES = (*MODELS, *ENCODER_DECODERS, "transformer_xl", "alexnet", *further_models(64))
FAST, SLOW = ["llama", "gru"], pytest.mark.thorough
NARROW, WIDE, VOCAB, STEPS = 64, 256, 32, 4
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (8, 13)).astype(np.int32)
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], np.ones((8, 12), np.float32))
LABELED = Batch(TOKENS[:, :-1], (TOKENS[:, -1] % 4).astype(np.int32), np.ones(8, np.float32))


def model_at(name, width):
    if name in further_models(width):
        variant, fields = further_models(width)[name]
        model = get_model(variant, vocab_size=VOCAB, embed_dim=width, **fields)
        return model.with_known_fields(tie_embeddings=False, **model.zero_dropout)
    model = model_of(name, vocab_size=VOCAB, width=width, layers=1, max_length=12)
    if name == "attention_rnn":  # with larger initial weights, as in the other recurrent models of the laboratory
        model = model.with_fields(score="concat", attention_dim=width, init_bound=0.5)
    return model.with_known_fields(tie_embeddings=False)


def logits_change(name, width, *, with_mup):
    """The root mean square of the change of the logits in a few large steps of AdamW."""
    model = model_at(name, width)
    scaled = mup(model, model_at(name, NARROW))
    # At 1e-2, four steps change the logits of the ResNet, which has batch normalization, too much for a comparison.
    rate = 1e-3 if name == "resnet" else 1e-2
    config = OptimizerConfig(learning_rate=rate, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=None)
    optimizer = make_optimizer(config, model.specs, STEPS, rates=scaled.rates if with_mup else None)
    is_classifier = model.task == "classification"
    trainer = Trainer(model, optimizer, classification.loss if is_classifier else token_loss)
    batch = LABELED if is_classifier else BATCH
    if model.reads_source:
        batch = dataclasses.replace(batch, inputs={"source": batch.tokens})
    state = trainer.init(jax.random.key(1), jax.jit(scaled.init if with_mup else model.init)(jax.random.key(0)))

    @jax.jit
    def logits(params):
        # With a key, batch normalization has the statistics of the batch.
        hidden, _ = model.apply(params, batch.tokens, key=jax.random.key(2), **batch.inputs)
        return model.logits(params, model.pool(params, hidden) if is_classifier else hidden)[..., :VOCAB]

    first, step = logits(state.params), trainer.jit_step()
    for _ in range(STEPS):
        state, _ = step(state, batch)
    return float(jnp.sqrt(jnp.mean((logits(state.params) - first) ** 2)))


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) for name in NAMES if name not in FAST] + FAST)
def test_logits_of_a_wide_model_change_as_much_as_those_of_a_narrow_one(name):
    ratio = logits_change(name, WIDE, with_mup=True) / logits_change(name, NARROW, with_mup=True)
    assert 0.6 < ratio < 1.2


@pytest.mark.thorough
def test_without_mup_logits_of_a_wide_model_change_more():
    assert logits_change("llama", WIDE, with_mup=False) > 2 * logits_change("llama", NARROW, with_mup=False)


def test_factors_of_each_kind_of_parameter():
    base = get_model("llama", num_layers=1, embed_dim=64, num_heads=2, num_kv_heads=1, mlp_dim=96, vocab_size=VOCAB)
    model = base.with_fields(embed_dim=256, num_heads=8, mlp_dim=384)
    scaled = mup(model, base)
    rates, specs, base_specs = (spec.flatten(tree) for tree in (scaled.rates, scaled.specs, base.specs))
    expected = {  # factors of the standard deviation and of the learning rate
        "token_embedding": (1, 1),
        "head": (1 / 4, 1 / 4),
        "final_norm/scale": (1, 1),
        "layers/0/attention/query/weight": (1 / 2, 1 / 4),
        "layers/0/attention/key/weight": (1 / 4, 1 / 4),  # the number of key heads does not grow
        "layers/0/attention/output/weight": (1 / 2, 1 / 4),
        "layers/0/mlp/down/weight": (1 / 2, 1 / 4),
    }
    for name, (stddev, rate) in expected.items():
        init = base_specs[name].init
        assert specs[name].init == (init if stddev == 1 else ScaledInit(init, stddev)), name
        assert rates[name] == rate, name
    params, base_params = (jax.jit(mup(each, base).init)(jax.random.key(0)) for each in (model, base))
    assert float(np.std(params["head"])) == pytest.approx(float(np.std(base_params["head"])) / 4, rel=0.1)


def test_the_base_model_is_unchanged():
    base = model_at("griffin", NARROW)
    scaled = mup(base, base)
    assert scaled.specs == base.specs
    assert set(spec.flatten(scaled.rates).values()) == {1.0}


def test_a_multiplier_of_token_vectors_and_blocks_and_output_vectors():
    model, base = model_at("griffin", WIDE), model_at("griffin", NARROW)
    assert (model.embedding_multiplier, base.embedding_multiplier) == (16.0, 8.0)
    rates = spec.flatten(mup(model, base).rates)
    assert rates["token_embedding"] == 1 / 2
    assert rates["layers/0/recurrent/rg_lru/input_gate/weight"] == 1.0  # more blocks of the same size
    attention = spec.flatten(mup(model_at("attention_rnn_lm", WIDE), model_at("attention_rnn_lm", NARROW)).rates)
    assert attention["alignment/score"] == 1 / 4


def test_a_classifier_needs_no_head_over_the_vocabulary():
    base = tiny_model("gpt2-tiny", task="classification", num_labels=2)
    model = base.with_fields(embed_dim=2 * base.config.embed_dim, num_heads=2 * base.config.num_heads)
    rates = spec.flatten(mup(model, base).rates)
    assert (rates["classifier/weight"], rates["token_embedding"]) == (1 / 2, 1)


def test_only_widths_may_differ():
    base = model_at("llama", NARROW)
    with pytest.raises(ValueError, match="only the model has the parameter layers/1/attention/key/weight"):
        mup(base.with_fields(num_layers=2), base)
    with pytest.raises(ValueError, match=r"key/weight: the axis 'kv' has size 32 in the model and 16 in the base"):
        mup(base, base.with_fields(num_heads=4))
    with pytest.raises(ValueError, match="vocab_size=32 in the model and 40 in the base model: only widths may differ"):
        mup(base, base.with_fields(vocab_size=40))
    with pytest.raises(ValueError, match="scan_layers=True in the model and False in the base model"):
        mup(base.with_fields(scan_layers=True), base)
    with pytest.raises(ValueError, match="qk_norm=True in the model and False in the base model: only widths may"):
        mup(base.with_fields(qk_norm=True), base)
    with pytest.raises(ValueError, match="window=4 in the model and None in the base model: only widths may differ"):
        mup(base.with_fields(window=4), base)
    with pytest.raises(ValueError, match=r"rotary_base=500.0 in the model and 10000.0 in the base model"):
        mup(base.with_fields(rotary_base=500.0), base)
    with pytest.raises(ValueError, match=r"rotary_base=500 in the model and 10000.0 in the base model"):
        mup(base.with_fields(rotary_base=500), base)
    with pytest.raises(ValueError, match="position_embedding: the axis 'positions' has size 12 in the model and 40"):
        mup(model_at("gpt", NARROW), model_at("gpt", NARROW).with_fields(max_positions=40))
    with pytest.raises(ValueError, match="the model is a llama and the base model a gpt: use the same family"):
        mup(base, tiny_model("gpt"))
    for family, field in (
        ("t5", "num_buckets"),
        ("t5", "max_distance"),
        ("transformer_xl", "memory_length"),
        ("transformer_xl", "clamp_length"),
        ("xlnet", "reuse_length"),
    ):
        narrow = tiny_model(family)
        with pytest.raises(ValueError, match=f"{field}=24 in the model and .* in the base model: only widths may"):
            mup(narrow.with_fields(**{field: 24}), narrow)
    mup(base.with_fields(dtype="bfloat16", remat="full"), base)


def test_a_width_may_be_none_in_one_model():
    base = model_at("gpt", NARROW).with_fields(mlp_dim=None)
    model = model_at("gpt", WIDE).with_fields(mlp_dim=4 * WIDE)
    for wide, narrow in ((model, base), (model.with_fields(mlp_dim=None), base.with_fields(mlp_dim=4 * NARROW))):
        assert spec.flatten(mup(wide, narrow).rates)["layers/0/mlp/down/weight"] == NARROW / WIDE


def test_families_that_mup_does_not_support():
    llama = model_at("llama", NARROW)
    with pytest.raises(ValueError, match=r"not the token table: set tie_embeddings=False \(llama\)"):
        mup(llama.with_fields(tie_embeddings=True), llama.with_fields(tie_embeddings=True))
    for family in ("bert", "roberta", "xlnet"):
        model = tiny_model(family)
        with pytest.raises(ValueError, match=rf"not the token table: this family has no such head \({family}\)"):
            mup(model, model)
    projected = get_model("transformer-xl-tiny", tie_embeddings=False, embedding_divisor=2)
    with pytest.raises(ValueError, match=r"does not support projected token vectors \(.*projection\)"):
        mup(projected, projected)
    luong = tiny_model("attention-rnn-luong-tiny")
    with pytest.raises(ValueError, match="muP does not support score="):
        mup(luong, luong)
    with pytest.raises(ValueError, match="rates need name='adamw', got name='muon'"):
        make_optimizer(OptimizerConfig("muon"), llama.specs, 200, rates=mup(llama, llama).rates)
