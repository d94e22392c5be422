"""Shared code of the model families: base configs, checks of configs and inputs, the loop over layers, and helpers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import config as config_lib
from jaxlm import spec
from jaxlm.nn import choices
from jaxlm.nn.attention import cache, tile_scores
from jaxlm.nn.convolution.window import pad_to_length
from jaxlm.nn.embedding import embed
from jaxlm.nn.experts import dropless
from jaxlm.nn.linear import linear, linear_specs
from jaxlm.sharding import constrain
from jaxlm.spec import Array, ArraySpec, Initializer, LayerTrees, Params, State, require_arrays

ComputeDtype = Literal["float32", "bfloat16", "float16"]
Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Base class for the ``Config`` of a family: the fields that all families share, and checks of field values.

    A value must have the type of its field. An integer field must be at least the ``minimum`` in the metadata of its
    ``dataclasses.field`` (default: 1). A field whose name ends in ``dropout`` is a rate in [0, 1). A field whose name
    ends in ``epsilon``, ``init_bound`` or ``init_stddev`` must be at least 0. A rotary base must exceed 1, and a number
    of layers has an upper limit. A field whose name ends in ``soft_cap`` must be positive.
    """

    vocab_multiple: int = 1
    """Pad the vocabulary axis of token tables to a multiple of this number, so that the axis can be sharded."""
    dtype: ComputeDtype = "float32"
    """Compute dtype of activations, key-value caches and memories of earlier tokens. Parameters have their own dtype.
    Recurrent states are float32. The residual stream of T5 is float32 if dtype is float16. The residual stream of
    Mamba-2 is float32 by default."""

    def __post_init__(self) -> None:
        config_lib.convert_numpy_scalars(self)
        config_lib.check_choices(self)
        types = config_lib.field_types(type(self))
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            config_lib.check_value(types[name], value, name)
            if value is None:
                continue
            minimum = field.metadata.get("minimum", 1)
            if types[name] in (int, int | None) and value < minimum:
                raise ValueError(f"{name}={value} must be at least {minimum}")
            if name.endswith("dropout") and not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value} must be in [0, 1)")
            if name.endswith(("epsilon", "init_bound", "init_stddev")) and value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
            if name.endswith("soft_cap") and value <= 0:
                or_none = ", or None for no cap" if types[name] == float | None else ""
                raise ValueError(f"{name}={value} must be positive{or_none}")
            config_lib.check_num_layers(name, value, name)
            if name in ("rotary_base", "window_rotary_base") and not value > 1:
                raise ValueError(f"{name}={value} must exceed 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayeredConfig(ModelConfig):
    """Base class for the ``Config`` of a family that runs its layers with :func:`run_layers`.

    The layers may be of several kinds.
    """

    remat: Remat = "dots"
    """Activations that the backward pass recomputes. none: no activations. full: all inside a block. dots: all inside a
    block except the outputs of linear layers, attention kernels and experts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(LayeredConfig):
    """Base class for the ``Config`` of a family whose layers can be stacked if all are of the same kind."""

    scan_layers: bool = False
    """True: stack the parameters of the layers and run the layers with ``lax.scan``, which compiles only one layer.
    False: use one tree of parameters per layer and a Python loop, which makes training steps faster but compilation
    slower (docs/labbook.md)."""


def run_layers(
    block: Callable[[Any, Any], tuple[Any, Any]],
    x: Any,
    weights: LayerTrees,
    state: LayerTrees | None,
    key: jax.Array | None,
    *,
    remat: Remat,
    num_layers: int | None = None,
    in_place: bool = False,
) -> tuple[Any, Any]:
    """The activations after all layers, and the new state of the layers.

    Layer i computes ``x, state[i] = block(x, (weights[i], state[i], key[i]))``.

    Args:
        block: the function of one layer.
        x: the input of the first layer: an array, or a tree of everything that one layer passes to the next.
        weights: parameters of all layers (``spec.layers``): stacked for a ``lax.scan``, or a tuple with one tree per
            layer for a Python loop.
        state: state of all layers, in the same layout as ``weights``; None: the layers have no state.
        key: random key; layer i gets ``jax.random.fold_in(key, i)``. None: every layer gets None.
        remat: see :class:`LayeredConfig`.
        num_layers: the number of layers of the config, to check the parameters; None: no check.
        in_place: in a scan, the block receives and returns views of the stacked state (``cache.CacheView``) instead of
            slices, so that the state of a layer is not copied. No effect in a Python loop.

    Raises:
        ValueError: the state and the parameters have different layouts or numbers of layers, or there are not
            ``num_layers`` layers.
    """
    x, new_state, _ = run_layers_with_outputs(
        lambda x, layer: (*block(x, layer), None),
        x,
        weights,
        state,
        key,
        remat=remat,
        num_layers=num_layers,
        in_place=in_place,
    )
    return x, new_state


def run_layers_with_outputs(
    block: Callable[[Any, Any], tuple[Any, Any, Any]] | tuple[Callable[[Any, Any], tuple[Any, Any, Any]], ...],
    x: Any,
    weights: LayerTrees,
    state: LayerTrees | None,
    key: jax.Array | None,
    *,
    remat: Remat,
    num_layers: int | None = None,
    in_place: bool = False,
) -> tuple[jax.Array, Any, Any]:
    """The results of :func:`run_layers`, and the outputs of the layers, for a block that returns three values.

    Layer i computes ``x, state[i], outputs[i] = block(x, ...)``. The outputs are stacked along a new first axis;
    layers whose output is None are left out. If no layer has an output, the third result is None.

    Args:
        block: the function of all layers; or a tuple of functions, where layer i uses the function at index i modulo
            the length of the tuple. With stacked weights, all layers use the first function, so all functions must be
            equal.
    """
    per_layer = isinstance(weights, tuple)
    if state is not None:
        spec.check_state_layers(weights, state)
    functions = block if isinstance(block, tuple) else (block,)
    remat_functions = {function: _with_remat(function, remat, unrolled=per_layer) for function in functions}
    block = remat_functions[functions[0]]
    count = spec.num_layers(weights)
    if num_layers is not None:
        _check_num_layers("parameters have", count, num_layers)
    keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    if isinstance(weights, tuple):
        new_states, outputs = [], []
        for i in range(count):
            layer_state = state[i] if isinstance(state, tuple) else None
            layer = weights[i], layer_state, None if keys is None else keys[i]
            x, new_state, output = remat_functions[functions[i % len(functions)]](x, layer)
            new_states.append(new_state)
            outputs += [] if output is None else [output]
        stacked_outputs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs) if outputs else None
        return x, None if new_states[0] is None else tuple(new_states), stacked_outputs

    def scanned_block(x: jax.Array, layer: Any) -> tuple[jax.Array, tuple[Any, Any]]:
        x, new_state, output = block(x, layer)
        return x, (new_state, output)

    if not in_place:
        x, (new_state, stacked_outputs) = jax.lax.scan(scanned_block, x, (weights, state, keys))
        return x, new_state, stacked_outputs

    def block_in_place(carry: Any, layer: Any) -> tuple[Any, Any]:
        """Run one layer, which updates its slice of the stacked state in place."""
        x, state = carry
        layer_weights, index, layer_key = layer
        views = jax.tree.map(lambda stack: cache.CacheView(stack, index), state)
        x, views, output = block(x, (layer_weights, views, layer_key))
        return (x, jax.tree.map(lambda _, view: view.stack, state, views)), output

    (x, new_state), stacked_outputs = jax.lax.scan(block_in_place, (x, state), (weights, jnp.arange(count), keys))
    return x, new_state, stacked_outputs


def check_numbered_layers(
    params: Params, state: State | None, num_layers: int, num_stateful: int | None = None
) -> None:
    """Check that the parameters and the state have the entries ``layer_0``, ``layer_1``, ... of all layers.

    Without this check, a model would ignore further layers.

    Args:
        num_layers: the number of layers of the config.
        num_stateful: the number of layers that have an entry in the state; None: all layers.

    Raises:
        ValueError: there are other numbers of entries.
    """
    num_stateful = num_layers if num_stateful is None else num_stateful
    for owner_has, tree, expected in (("parameters have", params, num_layers), ("state has", state, num_stateful)):
        if tree is not None:
            _check_num_layers(owner_has, sum(entry.startswith("layer_") for entry in tree), expected)


def _check_num_layers(owner_has: str, count: int, num_layers: int) -> None:
    if count != num_layers:
        raise ValueError(
            f"the {owner_has} {count} layers, but the config has {num_layers}: create them with the same config"
        )


def _with_remat(block: Callable[..., Any], remat: Remat, *, unrolled: bool) -> Callable[..., Any]:
    """The block with the rematerialization that ``remat`` selects (:class:`LayeredConfig`)."""
    prevent_cse = choices.prevent_cse_in_remat(unrolled=unrolled)
    if remat == "full":
        return jax.checkpoint(block, prevent_cse=prevent_cse)
    if remat == "dots":
        policies = jax.checkpoint_policies
        policy = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(tile_scores.CHECKPOINT_NAME, dropless.CHECKPOINT_NAME),
        )
        return jax.checkpoint(block, policy=policy, prevent_cse=prevent_cse)
    return block


def gather_weights(specs: Any, params: Params) -> Any:
    """The parameters, all-gathered over the mesh axes that shard ``embed``.

    Call this function for weights that a loop over time uses. Without the call, XLA gathers the weights in each step of
    the loop. The call is also needed for correctness. If weights in a loop are sharded over ``fsdp``, XLA computes
    wrong gradients on the mesh data=2, fsdp=2, tensor=2 (jax 0.10.2 on CPU; the test of the sharded step in
    jaxlm/testing/contract.py detects this).
    """

    def gather(leaf: ArraySpec, x: jax.Array) -> jax.Array:
        return constrain(x, tuple("activation_embed" if axis == "embed" else axis for axis in leaf.axes))

    return jax.tree.map(gather, specs, params)


def project_heads(weights: Params, x_BTD: jax.Array, *names: str) -> list[jax.Array]:
    """The outputs of the linear layers ``names``, such as queries and keys: a list of arrays [B, T, H, K]."""
    return [constrain(linear(weights[name], x_BTD), ("batch", "seq", "heads", "kv")) for name in names]


def mlp_specs(width: int, hidden: int, init: Initializer, down_init: Initializer | None = None) -> dict[str, Any]:
    """The specs of an MLP without a gate: ``up`` and ``down``. ``down_init`` is ``init`` by default."""
    return {
        "up": linear_specs((width, hidden), ("embed", "mlp"), init),
        "down": linear_specs((hidden, width), ("mlp", "embed"), init if down_init is None else down_init),
    }


def embed_padded_text(
    cfg: Any, table_VD: jax.Array, tokens_BT: jax.Array, segment_ids: jax.Array | None, *, reverse: bool = False
) -> jax.Array:
    """The embedded text of each row and then zeros, [B, cfg.max_positions, D]; NaN for a row with several documents.

    Padding inside the text is moved to the end of the row. ``reverse`` reverses the order of the real tokens.
    """
    tokens, is_real_BT, is_one_text_B = pad_to_length(tokens_BT, segment_ids, cfg.max_positions, reverse=reverse)
    x = jnp.where(is_real_BT[:, :, None], embed(table_VD, tokens, jnp.dtype(cfg.dtype), size=cfg.vocab_size), 0.0)
    return jnp.where(is_one_text_B[:, None, None], x, jnp.nan)


def fixed_size_state_length(cfg: Any) -> int:
    """``carried_state_length`` of a family whose state has the same size for every ``length``: 1."""
    return 1


def time_axis_name(length: int, num_tokens: int) -> str | None:
    """The name of a time axis: ``seq`` if its size ``length`` is a multiple of ``num_tokens``, otherwise None.

    ``num_tokens`` is the number of new tokens. ``length`` is larger if the axis also contains tokens of a memory
    (Transformer-XL, XLNet) or of the query stream (XLNet). If ``length`` is a multiple of ``num_tokens``, devices that
    split the new tokens evenly also split this axis evenly.
    """
    return "seq" if length % num_tokens == 0 else None


def decoder_outputs(
    x_BTD: jax.Array, kv: Any, context: cache.CacheContext, state: State | None
) -> tuple[jax.Array, State | None]:
    """The outputs of ``apply``: the hidden states, and the state with the new caches ``kv`` (None without a state).

    If the tokens of a row do not fit into its cache, the hidden states of the row are NaN.
    """
    if state is None:
        return x_BTD, None
    assert context.fits_B is not None
    return jnp.where(context.fits_B[:, None, None], x_BTD, jnp.nan), {**state, "layers": kv}


def segment_ids_or_ones(ids: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """``segment_ids`` as int32, [B, T]; all ones (one document per row) if ``segment_ids`` is None."""
    # ``ones_like`` keeps the sharding of the ids.
    return jnp.ones_like(ids, jnp.int32) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)


# ------------------------------------------------------------------------------------------------ checks of configs


def check_values(cfg: ModelConfig, reason: str, **required: Any) -> None:
    """Raise ``ValueError`` unless every field has its ``required`` value.

    Args:
        reason: the setting that requires these values, such as ``"copy=True"``.
    """
    for name, value in required.items():
        if getattr(cfg, name) != value:
            raise ValueError(f"{reason} needs {name}={value!r}, got {getattr(cfg, name)!r}: change one of them")


def check_divides(cfg: ModelConfig, divisor: str, *dividends: str) -> None:
    """Raise ``ValueError`` unless the field ``divisor`` divides the fields ``dividends``. A None is not checked."""
    divisor_value = getattr(cfg, divisor)
    for dividend in dividends:
        value = getattr(cfg, dividend)
        if value is not None and divisor_value is not None and value % divisor_value:
            raise ValueError(f"{divisor}={divisor_value} does not divide {dividend}={value}: change one of them")


def check_start_id(cfg: Any) -> None:
    """Raise ``ValueError`` unless ``decoder_start_id`` is in the vocabulary."""
    if not 0 <= cfg.decoder_start_id < cfg.vocab_size:
        raise ValueError(f"decoder_start_id={cfg.decoder_start_id} is outside the vocabulary of {cfg.vocab_size} ids")


# ------------------------------------------------------------------------------------------------- checks of inputs


def check_tokens(
    tokens: Array,
    segment_ids: Array | None,
    positions: Any = None,
    max_positions: int | None = None,
    *,
    name: str = "tokens",
) -> None:
    """Raise ``ValueError`` unless the inputs of ``apply`` are integer arrays of the same shape [B, T].

    The error is also raised if a NumPy array has values outside int32, or if T exceeds ``max_positions`` and neither
    segment ids nor positions are given. An input that is not an array raises ``TypeError``.

    Args:
        segment_ids, positions: may be None.
        max_positions: the maximum length of a sequence; None: no limit.
        name: the name of ``tokens`` in messages. For ``source``, messages call the segment ids ``source_segment_ids``.
    """
    require_arrays(**{name: tokens})
    segment_ids_name = "source_segment_ids" if name == "source" else "segment_ids"
    for input_name, x in ((name, tokens), (segment_ids_name, segment_ids), ("positions", positions)):
        if x is not None:
            check_integers(input_name, x, tokens, name)
    # With segment ids or positions, a row may be longer than max_positions although every position is below it.
    if max_positions is not None and segment_ids is None and positions is None and tokens.shape[1] > max_positions:
        raise ValueError(
            f"{tokens.shape[1]} tokens exceed max_positions={max_positions}: shorten them, or use a model with a "
            "larger max_positions"
        )


def check_integers(input_name: str, x: Array, tokens: Array, name: str = "tokens") -> None:
    """Raise ``ValueError`` unless ``x`` is an integer array with the shape [B, T] of ``tokens``.

    The error is also raised if ``x`` is a NumPy array with values outside int32. An ``x`` that is not an array
    raises ``TypeError``.

    Args:
        input_name, name: the names of ``x`` and ``tokens`` in messages.
    """
    require_arrays(**{input_name: x})
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{input_name} must be integers of shape [batch, time], got {x.dtype}{list(x.shape)}")
    if x.shape != tokens.shape:
        raise ValueError(f"{input_name} {list(x.shape)} must have the shape of {name} {list(tokens.shape)}")
    if isinstance(x, np.ndarray):
        config_lib.check_int32(x, input_name)


def check_pattern(cfg: Any) -> None:
    """Raise ``ValueError`` if ``cfg.pattern`` is empty, or if ``scan_layers`` is True and the layers differ in kind."""
    if not cfg.pattern:
        raise ValueError("pattern=() must not be empty: give the kind of at least one layer")
    if cfg.scan_layers and len(set(layer_kinds(cfg))) > 1:
        raise ValueError(
            f"scan_layers=True needs layers of one kind, but pattern={cfg.pattern}: set scan_layers to False"
        )


def layer_kinds(cfg: Any) -> tuple[Any, ...]:
    """The kind of each layer (its mixer, or for Llama its kind of attention): ``cfg.pattern``, repeated for
    ``cfg.num_layers`` layers.
    """
    return tuple(cfg.pattern[layer % len(cfg.pattern)] for layer in range(cfg.num_layers))


def layers_of_kinds(cfg: Any, specs_by_kind: dict[str, Any]) -> Any:
    """The specs of all layers (``spec.layers``), from the specs of a layer of each kind."""
    return spec.layers((specs_by_kind[kind] for kind in layer_kinds(cfg)), stacked=cfg.scan_layers)


def check_source(tokens: jax.Array, source: Any, source_segment_ids: Any, state: State | None) -> None:
    """Raise ``ValueError`` unless exactly one of ``source`` and ``state`` is given.

    The error is also raised if ``source`` and ``tokens`` have different numbers of rows, or if ``source_segment_ids``
    are given with a state. A source that is not an array raises ``TypeError``.
    """
    require_arrays(source=source)
    if (source is None) == (state is None):
        got = "neither" if source is None else "both"
        raise ValueError(f"apply takes source (to train) or state (to decode, from init_decode_state), got {got}")
    if source is None:
        if source_segment_ids is not None:
            raise ValueError(
                "source_segment_ids cannot be given with a state: pass them to init_decode_state as segment_ids"
            )
    elif source.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"source {list(source.shape)} and tokens {list(tokens.shape)} must have the same number of rows"
        )
