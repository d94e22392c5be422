"""Wrong parameters, states and counts (``Model.apply``, ``Model.rollback``), and negative segment ids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.models import get_model
from jaxlm.testing.helpers import add_noise, decodes, initial_params, random_tokens, source_inputs, tiny_model


@pytest.mark.parametrize("name", ["mamba2-tiny", "llama-tiny"])
@pytest.mark.parametrize("stacked", [False, True])
def test_parameters_with_another_number_of_layers_are_an_error(name, stacked):
    two, three = (tiny_model(name, num_layers=layers, scan_layers=stacked) for layers in (2, 3))
    tokens = random_tokens(two, 1, 4)
    with pytest.raises(
        ValueError, match=r"the parameters have 2 layers, but the config has 3: create them with the same config"
    ):
        jax.eval_shape(three.apply, initial_params(two), tokens)
    with pytest.raises(ValueError, match="the parameters have 2 layers, but the state has 3: create them"):
        jax.eval_shape(lambda p, state: two.apply(p, tokens, state=state), initial_params(two), three.init_state(1, 4))


@pytest.mark.parametrize(
    ("name", "two", "three"),
    [
        ("lstm-tiny", {"num_layers": 2}, {"num_layers": 3}),
        ("attention-rnn-lm-tiny", {"num_layers": 2}, {"num_layers": 3}),
        ("attention-rnn-luong-tiny", {"num_layers": 2}, {"num_layers": 3}),
        ("resnet-tiny", {"blocks": (1, 1)}, {"blocks": (1, 2)}),
        ("resnet-lm-tiny", {"blocks": ((8, 3, 0),) * 2}, {"blocks": ((8, 3, 0),) * 3}),
        # A convolution of one tap has no state.
        ("alexnet-lm-tiny", {"kernels": (1, 3), "pools": (2, 1)}, {"kernels": (1, 3, 3), "pools": (2, 1, 1)}),
    ],
)
def test_named_layers_of_parameters_and_state_are_counted(name, two, three):
    small, large = (tiny_model(name, **fields) for fields in (two, three))
    source, tokens = source_inputs(small, 1), random_tokens(small, 1, 4)
    for params_of, model, numbers in ((large, small, (3, 2)), (small, large, (2, 3))):
        message = "the parameters have {} layers, but the config has {}: create them".format(*numbers)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda p, model=model: model.apply(p, tokens, **source), initial_params(params_of))
    if source or not decodes(small):
        return

    def read(state):
        return jax.eval_shape(lambda p, state: small.apply(p, tokens, state=state), initial_params(small), state)

    read(small.init_state(1, 4))
    message = "the state has 2 layers, but .* has 1" if "kernels" in two else "the state has 3 layers, but .* has 2"
    with pytest.raises(ValueError, match=message):
        read(large.init_state(1, 4))


def test_a_t5_state_with_other_layers_is_an_error():
    """T5's state also has the keys and values of the source for each layer."""
    two, three = (tiny_model("t5-tiny", num_decoder_layers=layers) for layers in (2, 3))
    params, source, tokens = initial_params(three), np.ones((1, 4), np.int32), np.ones((1, 2), np.int32)
    state = three.init_decode_state(params, source, 8)
    with pytest.raises(ValueError, match=r"the parameters have one tree per layer .* but the state has stacked layers"):
        jax.eval_shape(lambda state: three.apply(params, tokens, state=state), spec.restack(state))
    with pytest.raises(ValueError, match="the parameters have 2 layers, but the state has 3: create them"):
        jax.eval_shape(lambda state: two.apply(initial_params(two), tokens, state=state), state)


@pytest.mark.parametrize("name", ["mamba2-tiny", "llama-tiny", "lstm-tiny", "xlnet-tiny"])
def test_a_state_with_another_number_of_rows_is_an_error(name):
    model = get_model(name)
    tokens = random_tokens(model, 4, 1)
    with pytest.raises(ValueError, match=r"the state has 1 rows, but the tokens have 4 rows: make a state with 4 rows"):
        jax.eval_shape(
            lambda p, state: model.apply(p, tokens, state=state), initial_params(model), model.init_state(1, 8)
        )


@pytest.mark.parametrize("name", ["rwkv7-tiny", "llama-tiny"])
@pytest.mark.parametrize(
    ("count", "message"),
    [
        ([0, 4], r"count=\[0, 4\] must be from 0 to 3, the number of tokens that the last call read"),
        ([-1, 3], r"count=\[-1, 3\] must be from 0 to 3"),
        ([1.5, 2.0], "count has dtype float32: pass integers"),
        ([1], r"count \[1\] must be \[batch\], \[2\]"),
    ],
)
def test_rollback_checks_counts(name, count, message):
    model = tiny_model(name)
    state = model.init_state(2, 8)
    with pytest.raises(ValueError, match=message):
        model.rollback(initial_params(model), state, jnp.ones((2, 3), jnp.int32), state, jnp.array(count))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_rollback_of_more_tokens_than_the_dtype_of_count_can_represent(dtype):
    model = tiny_model("gpt2-tiny", num_layers=1, max_positions=300)
    params, tokens, before = initial_params(model), random_tokens(model, 2, 300), model.init_state(2, 300)
    _, after = jax.jit(lambda p, state: model.apply(p, tokens, state=state))(params, before)
    state = model.rollback(params, before, tokens, after, jnp.array([10, 120], dtype))
    assert state["length"].tolist() == [10, 120]


@pytest.mark.parametrize("name", ["mamba2-tiny", "llama-tiny"])
def test_negative_segment_ids_are_padding(name):
    model = tiny_model(name)
    params, tokens = add_noise(initial_params(model)), random_tokens(model, 1, 5)

    @jax.jit
    def read_twice(segment_ids):
        hidden, state = model.apply(params, tokens, state=model.init_state(1, 16), segment_ids=segment_ids)
        return jnp.where(segment_ids[..., None] > 0, hidden, 0), model.apply(params, tokens, state=state)[0]

    zeros, negative = (read_twice(np.array([[padding, 1, padding, 1, 1]], np.int32)) for padding in (0, -1))
    np.testing.assert_array_equal(zeros[0], negative[0])
    np.testing.assert_array_equal(zeros[1], negative[1])
