"""Tests of speculative decoding: greedy tokens equal ``generate``, drawn tokens have the target's distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxlm
from jaxlm.decoding import (
    GREEDY,
    NotFiniteError,
    Sampling,
    SpeculativeModels,
    filter_logits,
    generate,
    speculative_generate,
)
from jaxlm.testing.helpers import add_noise, decode_state, initial_params, relative_error, source_inputs, tiny_model

PROMPTS = np.array([[5, 6, 7, 9], [0, 8, 9, 3], [0, 0, 0, 2]], np.int32)
SEGMENTS = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]], np.int32)
END = 11


@functools.cache
def model_and_params(name, seed=0, **overrides):
    model = tiny_model(name, **overrides)
    return model, add_noise(initial_params(model, seed))


def models_of(target, draft, num_proposed=3, **overrides):
    return SpeculativeModels(
        *model_and_params(target, **overrides), *model_and_params(draft, 1, **overrides), num_proposed
    )


PAIRS = [
    ("mamba2", "gpt"),
    ("griffin", "lstm"),
    ("gated_deltanet-hybrid-tiny", "gru"),
    ("xlstm-slstm-tiny", "llama"),
    ("rwkv7", "resnet_lm"),
    ("falcon-h1-tiny", "mamba2"),
    ("resnet_lm", "rwkv7"),
    ("gemma-3-tiny", "griffin"),
    ("gpt", "lstm"),
    ("gru", "llama"),
    ("transformer_xl", "resnet_lm"),
    ("xlnet", "gru"),
    ("attention_rnn_lm", "gpt"),
]
"""Pairs of a target and a draft model, with states of many kinds."""


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize(("target", "draft"), PAIRS)
def test_greedy_tokens_equal_those_of_generate(target, draft):
    models = models_of(target, draft)
    want = generate(
        models.target, models.target_params, PROMPTS, SEGMENTS, max_new_tokens=9, end_id=END, num_allowed_ids=64
    )
    options = {"max_new_tokens": 9, "end_id": END, "num_allowed_ids": 64}
    got = speculative_generate(models, PROMPTS, SEGMENTS, **options)
    np.testing.assert_array_equal(got.generation.tokens, want.tokens)
    np.testing.assert_array_equal(got.generation.lengths, want.lengths)
    assert relative_error(got.generation.log_probs, want.log_probs) < 1e-5
    # Each round generates its accepted proposals and one more token. The prompt gives the first token.
    assert np.all(want.lengths <= 1 + got.rounds + got.accepted)


@pytest.mark.thorough
def test_a_model_accepts_its_own_proposals():
    model, params = model_and_params("gpt", num_layers=1)
    models = SpeculativeModels(model, params, model, params, 3)
    for sampling in (GREEDY, Sampling(temperature=0.8, top_k=20)):
        result = speculative_generate(
            models, PROMPTS, SEGMENTS, max_new_tokens=9, sampling=sampling, key=jax.random.key(0)
        )
        np.testing.assert_array_equal(result.rounds, 2)
        np.testing.assert_array_equal(result.accepted, 6)
        np.testing.assert_array_equal(result.generation.lengths, 9)


@pytest.mark.thorough
def test_logits_after_the_last_token_of_a_row_may_be_not_finite():
    model, params = model_and_params("gru", 1, tie_embeddings=False)
    options = {"segment_ids": SEGMENTS[:1], "max_new_tokens": 9}
    tokens = np.asarray(generate(model, params, PROMPTS[:1], **options).tokens)[0]
    # A round proposes tokens 1 to 3. Token 2 ends the row, so its NaN embedding gives only discarded tokens.
    assert tokens[2] not in {*PROMPTS[0].tolist(), *tokens[:2].tolist()}
    bad = {**params, "token_embedding": params["token_embedding"].at[tokens[2]].set(jnp.nan)}
    models = SpeculativeModels(model, bad, model, bad, 3)
    for end in ({"end_id": int(tokens[2])}, {"max_new_tokens": 3}):
        result = speculative_generate(models, PROMPTS[:1], **{**options, **end})
        assert np.asarray(result.generation.tokens)[0, :3].tolist() == tokens[:3].tolist()
    with pytest.raises(NotFiniteError, match="row 0 .* token_embedding"):
        speculative_generate(models, PROMPTS[:1], **options)


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["t5", "attention_rnn"])
def test_an_encoder_decoder_with_a_decoder_as_draft(target):
    models = models_of(target, "lstm", num_layers=1)
    source = source_inputs(models.target, 3)["source"]
    prompts = np.zeros((3, 1), np.int32)
    state = decode_state(models.target, models.target_params, source, 20)
    want = generate(models.target, models.target_params, prompts, max_new_tokens=8, num_allowed_ids=64, state=state)
    states = state, models.draft.init_state(3, 20)
    got = speculative_generate(models, prompts, max_new_tokens=8, num_allowed_ids=64, states=states)
    np.testing.assert_array_equal(got.generation.tokens, want.tokens)
    if not models.target.has_cache:
        return
    states = models.target.init_state(3, 10), states[1]
    with pytest.raises(ValueError, match="10 free cache slots, but the prompts and the new tokens need 11"):
        speculative_generate(models, prompts, max_new_tokens=8, num_allowed_ids=64, states=states)


@pytest.mark.thorough
def test_the_memory_of_the_target_model_must_have_room_for_all_tokens_it_may_attend_to():
    """Otherwise, a token sees more in a call of several tokens than in a call of one token."""
    draft, draft_params = model_and_params("lstm", 1, vocab_size=64)
    options = {"prompts": PROMPTS, "max_new_tokens": 9}  # 4 + 9 - 1 + 3 proposals = 15 tokens

    def run(target, params, state):
        models = SpeculativeModels(target, params, draft, draft_params, 3)
        return speculative_generate(models, **options, states=(state, None))

    unlimited = {
        "transformer_xl": {},
        "xlnet": {"task": "permutation", "vocab_size": 64},
        "attention_rnn_lm": {"window": None, "vocab_size": 64},
    }
    for name, overrides in unlimited.items():
        target = tiny_model(name, **overrides)
        with pytest.raises(ValueError, match=rf"\({name}\) has 14 memory slots, 0 .* needs 15, .*at least 15"):
            run(target, None, target.init_state(3, 14))
    target, params = model_and_params("transformer_xl")
    used = {**target.init_state(3, 20), "segment_ids": np.pad(np.ones((3, 6), np.int32), [(0, 0), (14, 0)])}
    with pytest.raises(ValueError, match="has 20 memory slots, 6 of them used, but needs 21, .* at least 21"):
        run(target, None, used)
    # Each token attends to at most 5 tokens, so a memory of 5 slots is enough.
    target, params = model_and_params("transformer_xl", same_length=True, memory_length=5, num_layers=1)
    assert target.init_state(3, 100)["segment_ids"].shape == (3, 5)
    state = target.init_state(3, 5)
    want = generate(target, params, **options, state=state)
    np.testing.assert_array_equal(run(target, params, state).generation.tokens, want.tokens)


@pytest.mark.plain_cases(1)
@pytest.mark.parametrize(
    ("target", "draft", "sampling"),
    [
        ("mamba2", "gpt", Sampling()),
        ("gpt", "gru", Sampling()),
        ("gpt", "gru", Sampling(temperature=0.7, top_p=0.9)),
    ],
)
def test_drawn_tokens_have_the_distribution_of_the_target_model(target, draft, sampling):
    """A chi-square test of the first three tokens of 4,000 rows, over all texts of three tokens."""
    rows, ids = 4000, 5
    models = models_of(target, draft, 2, vocab_size=ids, num_layers=1)
    prompts = np.tile(np.array([[1, 3]], np.int32), (rows, 1))
    key = jax.random.key(7)
    result = speculative_generate(models, prompts, max_new_tokens=3, sampling=sampling, key=key)
    assert 0 < np.mean(result.accepted) < 2  # proposals are accepted and rejected

    def p_value(tokens, model, params):
        expected = rows * _probabilities(model, params, prompts[0], sampling, ids)
        observed = np.bincount(np.asarray(tokens) @ np.array([ids**2, ids, 1]), minlength=ids**3)
        assert np.all(observed[expected == 0.0] == 0)
        rare = expected < 5
        cells = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected)]
        observed, expected = (x[cells[1] > 0] for x in cells)
        return stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue

    assert p_value(result.generation.tokens, models.target, models.target_params) > 1e-3
    # The draft model passes its own test, and its distribution is far from that of the target model.
    drawn = generate(models.draft, models.draft_params, prompts, max_new_tokens=3, sampling=sampling, key=key)
    assert p_value(drawn.tokens, models.draft, models.draft_params) > 1e-3
    target_texts = _probabilities(models.target, models.target_params, prompts[0], sampling, ids)
    draft_texts = _probabilities(models.draft, models.draft_params, prompts[0], sampling, ids)
    assert np.abs(target_texts - draft_texts).sum() > 0.3


def _probabilities(model, params, prompt, sampling, ids):
    """The probability of each text of three tokens, [ids ** 3]."""
    texts = np.stack(np.meshgrid(*[np.arange(ids)] * 3, indexing="ij"), -1).reshape(-1, 3)
    tokens = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
    log_p = np.asarray(_log_probabilities(model, params, tokens, sampling, len(prompt), ids), np.float64)
    return np.exp(np.take_along_axis(log_p, texts[..., None], -1)[..., 0].sum(axis=1))


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _log_probabilities(model, params, tokens, sampling, prompt_length, ids):
    """Filtered log-probabilities of each token after the prompt, [B, T, ids]."""
    logits = model.logits(params, model.apply(params, tokens)[0])[:, prompt_length - 1 : -1, :ids]
    return jax.nn.log_softmax(jax.vmap(functools.partial(filter_logits, sampling), 1, 1)(logits))


@pytest.mark.thorough
def test_the_draws_of_a_row_do_not_depend_on_the_other_rows():
    models = models_of("gpt", "lstm", vocab_size=64)
    keys = jax.random.split(jax.random.key(3), 3)
    options = {"max_new_tokens": 7, "sampling": Sampling(temperature=0.9)}
    together = speculative_generate(models, PROMPTS, SEGMENTS, key=keys, **options)
    alone = speculative_generate(models, PROMPTS[1:2], SEGMENTS[1:2], key=keys[1:2], **options)
    np.testing.assert_array_equal(alone.generation.tokens[0], together.generation.tokens[1])


def test_errors_name_the_bad_input():
    """Errors name the invalid argument, or the draft parameter that is not finite."""
    models = models_of("gpt", "lstm")
    run = functools.partial(speculative_generate, prompts=PROMPTS, max_new_tokens=4)
    with pytest.raises(ValueError, match="num_proposed=0 must be at least 1"):
        run(models.replace(num_proposed=0))
    with pytest.raises(ValueError, match=r"num_proposed=2.0 must be a whole number"):
        models.replace(num_proposed=2.0)
    draft, draft_params = model_and_params("transformer_xl")
    with pytest.raises(ValueError, match=r"128 token ids and the draft model 64: .* set num_allowed_ids"):
        run(models.replace(draft=draft, draft_params=draft_params))
    with pytest.raises(ValueError, match="repetition_penalty=1.2 is not supported in speculative decoding"):
        run(models, sampling=Sampling(repetition_penalty=1.2), key=jax.random.key(0))
    capacity = jaxlm.get_model("mixtral-tiny", vocab_size=128, capacity_factor=1.25)
    with pytest.raises(ValueError, match=r"target model has capacity_factor=1.25.* set capacity_factor=None"):
        run(models.replace(target=capacity))
    reader = tiny_model("t5")
    with pytest.raises(ValueError, match=r"t5 reads a source: pass states=.* length of the prompts \+ 6 \(max_new"):
        run(models.replace(target=reader))
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        run(models, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature=1.0 draws at random: pass a key"):
        run(models, sampling=Sampling())
    positions = models.target.config.max_positions
    with pytest.raises(ValueError, match=f"max_positions={positions}"):
        run(models, max_new_tokens=positions - 4)
    broken = jax.tree.map(lambda x: x.at[..., 0].set(jnp.nan), models.draft_params)
    with pytest.raises(NotFiniteError, match="parameters are not finite: head/bias"):
        run(models.replace(draft_params=broken))
