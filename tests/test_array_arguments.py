"""Functions that take arrays reject lists. The error names the argument, its type and the fix."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.nn import convolution, embedding, experts, linear, loss, norm, recurrence, scan, segments
from jaxlm.nn.attention import attention, bucket_bias, mask, rotary
from jaxlm.nn.convolution import pooling
from jaxlm.objectives import (
    causal,
    classification,
    masked,
    permutation,
    seq2seq,
    span_corruption,
    span_qa,
    token_classification,
)
from jaxlm.spec import Array, require_arrays

IDS = np.ones((2, 8), np.int32)
KEEP = np.ones((2, 8), bool)
FLOATS = np.ones((2, 8, 4), np.float32)
HEADS = np.ones((2, 8, 1, 4), np.float32)
PER_HEAD = np.zeros((2, 8, 1), np.float32)
STATE = np.zeros((2, 1, 4, 4), np.float32)
RNG = np.random.default_rng(0)
WEIGHT = {"weight": np.ones((4, 4), np.float32), "bias": np.zeros(4, np.float32)}
MASKS = {"reset_BT": ~KEEP, "keep_BT": KEEP}


def params(specs: Any) -> Any:
    return jaxlm.spec.init(specs, jax.random.key(0))


def model_call(method: str, variant: str, **overrides: Any) -> Any:
    """A method of a model with its parameters."""
    model = jaxlm.get_model(variant, **overrides)
    return functools.partial(getattr(model, method), model.init(jax.random.key(0)))


INPUTS = {"tokens": IDS, "segment_ids": IDS}
LOSS = {"targets_BT": IDS, "weights_BT": np.ones(IDS.shape, np.float32)}
QKV = {"query_BTHK": HEADS, "key_BTHK": HEADS, "value_BTHV": HEADS, "state_BHKV": STATE, **MASKS}
SHARED_QKV = {"query_BTGK": HEADS, "key_BTGK": HEADS, "value_BTHV": HEADS, "state_BHKV": STATE, **MASKS}
TAPS = {"weight": np.ones((2, 4, 4), np.float32)}
MASKING = masked.MaskingConfig(mask_id=5, vocab_size=9)
PERMUTATION = permutation.PermutationConfig(reuse_length=2, permutation_length=1, num_predict=2)

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt": (model_call("apply", "gpt2-tiny"), {**INPUTS, "positions": IDS}),
    "bert": (model_call("apply", "bert-tiny"), {**INPUTS, "token_types": IDS}),
    "t5": (model_call("apply", "t5-tiny"), {**INPUTS, "source": IDS, "source_segment_ids": IDS}),
    "xlnet": (
        model_call("apply", "xlnet-tiny"),
        {**INPUTS, "token_types": IDS, "order": IDS, "targets": IDS, "right_to_left": KEEP[:, 0]},
    ),
    "encode": (model_call("encode", "t5-tiny"), {"source": IDS}),
    "pool": (model_call("pool", "bert-tiny", task="classification", num_labels=2), {"hidden": FLOATS}),
    "logits": (model_call("logits", "gpt2-tiny"), {"hidden": FLOATS}),
    "cross_entropy": (
        model_call("cross_entropy", "gpt2-tiny"),
        {"hidden": FLOATS, "targets": IDS, "weights": FLOATS[..., 0]},
    ),
    "attention_weights": (model_call("attention_weights", "gpt2-tiny"), {"tokens": IDS}),
    "apply_with_routing": (model_call("apply_with_routing", "mixtral-tiny"), {"tokens": IDS}),
    "causal.batch": (causal.batch, {**INPUTS, "reset": KEEP[:, 0]}),
    "classification.batch": (functools.partial(classification.batch, num_labels=2), {**INPUTS, "labels": IDS[:, 0]}),
    "token_classification.batch": (
        functools.partial(token_classification.batch, num_labels=2),
        {**INPUTS, "labels": IDS},
    ),
    "masked.batch": (functools.partial(masked.batch, rng=RNG, config=MASKING), {**INPUTS, "word_ids": IDS}),
    "seq2seq.batch": (
        functools.partial(seq2seq.batch, start_id=0),
        {"source": IDS, "targets": IDS, "source_segment_ids": IDS, "segment_ids": IDS},
    ),
    "span_qa.batch": (functools.partial(span_qa.batch, spans=[[1, 2], [1, 2]]), INPUTS),
    "span_corruption.batch": (functools.partial(span_corruption.batch, rng=RNG, first_sentinel=99), {"tokens": IDS}),
    "permutation.batch": (
        functools.partial(permutation.batch, rng=RNG, config=PERMUTATION),
        {"tokens": IDS, "word_starts": KEEP, "sentences": IDS, "right_to_left": KEEP[:, 0], "reset": KEEP[:, 0]},
    ),
    "attention": (
        attention,
        {"q_BTHK": HEADS, "k_BSGK": HEADS, "v_BSGK": HEADS, "bias": np.zeros((1, 1, 8, 8), np.float32)},
    ),
    "rotary_angles": (functools.partial(rotary.rotary_angles, width=4, base=1e4), {"positions_BT": IDS}),
    "rotate": (functools.partial(rotary.rotate, angles=rotary.rotary_angles(IDS, 4, 1e4)), {"x_BTHK": HEADS}),
    "bias_of_each_distance": (
        functools.partial(bucket_bias.bias_of_each_distance, max_distance=8, bidirectional=True),
        {"table_NH": np.ones((8, 1), np.float32)},
    ),
    "document_mask": (mask.document_mask, {"segment_ids": IDS}),
    "positions_in_segments": (
        segments.positions_in_segments,
        {"segment_ids_BT": IDS, "last_segment_B": IDS[:, 0], "next_position_B": IDS[:, 0]},
    ),
    "linear_scan": (scan.linear_scan, {"decay_BTD": FLOATS, "input_BTD": FLOATS, "state_BD": FLOATS[:, 0], **MASKS}),
    "linear_attention": (scan.linear_attention, {**SHARED_QKV, "log_decay": PER_HEAD, "scale_BTH": PER_HEAD}),
    "ssd": (
        scan.ssd,
        {
            "x_BTHP": HEADS,
            "dt_BTH": PER_HEAD,
            "A_H": PER_HEAD[0, 0],
            "B_BTGN": HEADS,
            "C_BTGN": HEADS,
            "state_BHNP": STATE,
            **MASKS,
        },
    ),
    "mlstm": (
        scan.mlstm,
        {
            **{name: x for name, x in QKV.items() if name != "state_BHKV"},
            "log_input_BTH": PER_HEAD,
            "log_forget_BTH": PER_HEAD,
        },
    ),
    "gated_delta_rule": (scan.gated_delta_rule, {**QKV, "log_decay_BTH": PER_HEAD, "beta_BTH": PER_HEAD}),
    "generalized_delta_rule": (
        lambda a, b, **arguments: scan.generalized_delta_rule(low_rank=(a, b), **arguments),
        {**QKV, "log_decay_BTHK": HEADS, "a": HEADS, "b": HEADS},
    ),
    "lstm": (functools.partial(recurrence.lstm, params(recurrence.lstm_specs(4, 4))), {"x_BTD": FLOATS, **MASKS}),
    "gru": (functools.partial(recurrence.gru, params(recurrence.gru_specs(4, 4))), {"x_BTD": FLOATS, **MASKS}),
    "rg_lru": (
        functools.partial(recurrence.rg_lru, params(recurrence.rg_lru_specs(4, 1))),
        {"x_BTW": FLOATS, "state_BW": FLOATS[:, 0], **MASKS},
    ),
    "slstm": (
        functools.partial(recurrence.slstm, {"weight_hidden": jnp.zeros((1, 4, 4, 4)), "bias": jnp.zeros((1, 4, 4))}),
        {"projected_BTHGP": np.ones((2, 8, 1, 4, 4), np.float32), **MASKS},
    ),
    "convolution": (
        functools.partial(convolution.convolution, TAPS, padding="same"),
        {"x_BTC": FLOATS, "segment_ids": IDS},
    ),
    "depthwise_convolution": (
        functools.partial(convolution.depthwise_convolution, WEIGHT, padding="causal"),
        {"x_BTC": FLOATS, "segment_ids": IDS},
    ),
    "max_pool": (functools.partial(pooling.max_pool, window=2, padding="same"), {"x_BTC": FLOATS}),
    "k_max_pool": (functools.partial(pooling.k_max_pool, k=2), {"x_BTC": FLOATS}),
    "mixture_of_experts": (
        functools.partial(
            experts.mixture_of_experts,
            params(experts.expert_specs(4, 4, 2, jaxlm.spec.Normal(1.0))),
            num_selected=1,
            renormalize=True,
        ),
        {"x_BTD": FLOATS, "keep_BT": KEEP},
    ),
    "unembed": (
        functools.partial(embedding.unembed, vocab_size=4),
        {"table_VD": WEIGHT["weight"], "hidden_BTD": FLOATS},
    ),
    "loss.cross_entropy": (loss.cross_entropy, {"logits_BTV": FLOATS, "targets_BT": IDS}),
    "chunked_cross_entropy": (
        functools.partial(loss.chunked_cross_entropy, linear.linear, WEIGHT),
        {"hidden_BTD": FLOATS, **LOSS},
    ),
    "selected_cross_entropy": (
        functools.partial(loss.selected_cross_entropy, linear.linear, WEIGHT),
        {"hidden_BTD": FLOATS, **LOSS},
    ),
    "chunked_argmax": (functools.partial(loss.chunked_argmax, linear.linear, WEIGHT), {"hidden_BTD": FLOATS}),
    "linear": (functools.partial(linear.linear, WEIGHT), {"x": FLOATS}),
    "layer_norm": (lambda x: norm.layer_norm(params(norm.layer_norm_specs(4)), x, 1e-5), {"x": FLOATS}),
    "rms_norm": (lambda x: norm.rms_norm(params(norm.rms_norm_specs(4)), x, 1e-5), {"x": FLOATS}),
}
"""Functions, and their arguments that are arrays."""


@pytest.mark.parametrize(
    ("name", "argument"), [(name, argument) for name, (_, arguments) in CASES.items() for argument in arguments]
)
def test_a_list_is_rejected_by_name(name: str, argument: str) -> None:
    function, arguments = CASES[name]
    shown = argument.split("_")[0] + r"\w*"  # messages may leave out the axes, such as _BT
    described = rf"{shown} must be an array, got a list: pass jnp.asarray\({shown}\)"
    with pytest.raises(TypeError, match=described):
        function(**{**arguments, argument: arguments[argument].tolist()})


def test_arrays_traced_arrays_and_none_are_accepted() -> None:
    def check(x: Array) -> Array:
        require_arrays(x=x)
        return x

    jax.jit(check)(IDS)
    jax.eval_shape(jax.vmap(check), jax.ShapeDtypeStruct((2,), jnp.float32))
    require_arrays(numpy=IDS, jax=jnp.asarray(IDS), key=jax.random.key(0), missing=None)
    for other in (3, 2.0, (1, 2), "text"):
        with pytest.raises(TypeError, match="x must be an array, got a"):
            require_arrays(x=other)
