"""``Model`` (a family with a config), and ``get_model``, which makes a model by name.

A family is a module such as ``jaxlm.models.gpt``. The methods of a model call the functions of this module.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.config import suggest_name
from jaxlm.models.registry import family, family_names, family_of_variant, variant_names
from jaxlm.nn.embedding import Unembedding, as_logits
from jaxlm.nn.loss import chunked_cross_entropy
from jaxlm.nn.weight_record import record_weights
from jaxlm.spec import Params, State

if typing.TYPE_CHECKING:  # not imported at run time, so that `import jaxlm` is fast
    from jaxlm.nn.experts import RouterStatistics


class NoAttentionWeightsError(TypeError):
    """The model has no attention weights that can be recorded."""


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Information about a model that the functions of its family do not use, such as contents of loaded files.

    Attributes:
        labels: names of the labels of a (token) classifier, in the order of the logits; None: the labels have no names.
        token_ids: ids of special tokens by role, such as ``{"eos": 2, "pad": 0, "decoder_start": 0}``. An id may be
            None, or a list if several tokens end a text.
        config: the contents of ``config.json``; empty if the model was not loaded from a directory with this file.
            ``save_pretrained`` keeps the fields that jaxlm does not set.
        generation_config: the contents of ``generation_config.json``; None if there is no such file.
        initialized: paths of the parameters that the files do not contain; they have initial values.
        unused_tensors: names of the tensors in the files that the model does not use.
    """

    labels: tuple[str, ...] | None = None
    token_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: Mapping[str, Any] | None = None
    initialized: tuple[str, ...] = ()
    unused_tensors: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """The name of a family (a module such as ``jaxlm.models.gpt``) and a config. A model contains no parameters.

    A model is hashable, so it may be a static argument of ``jax.jit``. Equality and hash ignore ``metadata``, so models
    that differ only in their metadata share compiled functions.

    Example:
        >>> model = get_model("gpt2-tiny")
        >>> params = model.init(jax.random.key(0))
        >>> hidden, state = model.apply(params, jax.numpy.ones((1, 8), int))
        >>> model.logits(params, hidden).shape
        (1, 8, 128)
    """

    family: str
    config: Any
    metadata: Metadata = dataclasses.field(default_factory=Metadata, compare=False, repr=False)

    @property
    def module(self) -> Any:
        """The module of the family, or the object that ``register_family`` registered."""
        return family(self.family)

    @property
    def task(self) -> str:
        """The task of the output head, such as "classification"; "causal" if the config has no field ``task``."""
        return getattr(self.config, "task", "causal")

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the labels, in the order of the logits; None if they have no names."""
        return self.metadata.labels

    @property
    def problem_type(self) -> str | None:
        """The ``problem_type`` in the ``config.json`` from which the model was loaded.

        The result is None if the model was not loaded from files or if the field is missing. It is also None if some
        parameters were initialized instead of loaded, because the head may then be new.
        """
        return None if self.metadata.initialized else self.metadata.config.get("problem_type")

    def with_labels(self, names: Sequence[str]) -> Model:
        """The model with these names for its labels. ``save_pretrained`` writes the names to the files.

        Example:
            >>> get_model("bert-tiny", task="classification", num_labels=2).with_labels(["bad", "good"]).labels
            ('bad', 'good')

        Raises:
            TypeError: ``names`` is one string, or a name is not a string.
            ValueError: the model has no labels, the number of names is not ``num_labels``, or a name occurs twice.
        """
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"labels must be a sequence of strings, got {names!r}")
        task = self.task
        if task not in ("classification", "token_classification"):
            raise ValueError(
                f"a model with task={task!r} has no labels: use task='classification' or 'token_classification'"
            )
        if len(names) != self.config.num_labels:
            raise ValueError(f"got {len(names)} labels {list(names)} for num_labels={self.config.num_labels}")
        if len(set(names)) != len(names):
            raise ValueError(f"labels must be distinct, got {list(names)}")
        return dataclasses.replace(self, metadata=dataclasses.replace(self.metadata, labels=tuple(names)))

    @property
    def specs(self) -> spec.Tree:
        """The specs of the parameters, a tree of ``jaxlm.spec.ArraySpec``."""
        return self.module.specs(self.config)

    @property
    def num_parameters(self) -> int:
        """The number of parameters. Padding of the vocabulary and running statistics of batch norms are included."""
        return spec.count(self.specs)

    def with_fields(self, **values: Any) -> Model:
        """The model with these values of config fields. If ``num_labels`` changes, the names of the labels are dropped.

        Raises:
            ValueError: the family has no such field (the message suggests a similar one), or its ``Config`` does not
                accept the values.
        """
        names = [field.name for field in dataclasses.fields(self.config)]
        for name in values:
            if name not in names:
                raise ValueError(
                    f"{self.family} has no field {name!r}: {suggest_name(name, names)}its fields are {', '.join(names)}"
                )
        model = dataclasses.replace(self, config=dataclasses.replace(self.config, **values))
        num_labels = getattr(model.config, "num_labels", None)
        if self.labels is None or len(self.labels) == num_labels:
            return model
        return dataclasses.replace(model, metadata=dataclasses.replace(self.metadata, labels=None))

    def with_known_fields(self, **values: Any) -> Model:
        """The model with these values of config fields. Fields that its config does not have are ignored."""
        names = {field.name for field in dataclasses.fields(self.config)}
        return self.with_fields(**{name: value for name, value in values.items() if name in names})

    @property
    def zero_dropout(self) -> dict[str, float]:
        """A dict with the value 0 for each dropout rate of the config: ``model.with_fields(**model.zero_dropout)``."""
        return {field.name: 0.0 for field in dataclasses.fields(self.config) if field.name.endswith("dropout")}

    def init(self, key: jax.Array) -> spec.Tree:
        """Newly initialized parameters."""
        return spec.init(self.specs, key)

    def apply(self, params: Params, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, State | None]:
        """The hidden states [B, T, D] and the new state (None without a state), from the family's ``apply``.

        ``xlnet`` with the argument ``targets`` (P positions) returns [B, P, D]. ``attention_rnn`` with ``copy=True``
        appends the copy gate and the distribution of copied tokens to the D features. Classifiers of ``alexnet`` and
        ``resnet`` return the features of the text, [B, S, C]: C channels at S positions, where S does not depend on T.
        In training, the new state of ``resnet`` contains the new running statistics.

        For an empty batch (B or T is 0), the hidden states are empty and gradients are 0. The new state is then the
        given state, or in training of ``resnet`` the running statistics in ``params``.

        Raises:
            ValueError: the family does not accept the value of an input; the parameters have another number of layers
                than the config; the source is empty but the tokens are not; or T is 0 and the hidden states do not
                belong to tokens, but to whole texts or to ``targets``.
            TypeError: an input is not an argument of the family's ``apply``, or is not an array.
        """
        spec.require_arrays(tokens=tokens)
        if 0 in tokens.shape:
            return self._apply_to_empty_batch(params, tokens, inputs)
        self._check_source(inputs.get("source"))
        return self.module.apply(self.config, params, tokens, **inputs)

    @property
    def has_experts(self) -> bool:
        """Whether the model has layers with a mixture of experts."""
        return getattr(self.config, "num_experts", None) is not None and hasattr(self.module, "apply_with_routing")

    def apply_with_routing(
        self, params: Params, tokens: jax.Array, **inputs: Any
    ) -> tuple[jax.Array, State | None, RouterStatistics]:
        """The hidden states and the new state of :meth:`apply`, and the statistics of the routers of all layers.

        The statistics are stacked: one entry per layer with experts (``jaxlm.nn.experts.RouterStatistics``). For an
        empty batch, all statistics are 0.

        Raises:
            TypeError: the model has no experts; or see :meth:`apply`.
            ValueError: see :meth:`apply`.
        """
        if not self.has_experts:
            raise TypeError(
                f"this model of family {self.family!r} has no experts (num_experts), so it has no router statistics"
            )
        spec.require_arrays(tokens=tokens)
        if 0 not in tokens.shape:
            return self.module.apply_with_routing(self.config, params, tokens, **inputs)
        _, _, statistics = self._eval_shape(self.module.apply_with_routing, params, tokens, inputs)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), statistics)
        return *self.apply(params, tokens, **inputs), zeros

    def _apply_to_empty_batch(
        self, params: Params, tokens: jax.Array, inputs: dict[str, Any]
    ) -> tuple[jax.Array, State | None]:
        """The outputs of ``apply`` for an empty batch, from the shapes of the inputs."""
        hidden, new_state = self._eval_shape(self.module.apply, params, tokens, inputs)
        B, T = tokens.shape
        state = inputs.get("state")
        is_per_token = hidden.shape[1] == 1
        # If T is 0, the shapes are those of a call with one token. So one hidden state may also belong to a whole text
        # or to a target, and a call with two tokens decides. A state may have no slot for a second token.
        if T == 0 and is_per_token and state is None:
            is_per_token = self._eval_shape(self.module.apply, params, tokens, inputs, size=2)[0].shape[1] == 2
        if T == 0 and not is_per_token:
            raise ValueError(
                f"tokens {[B, T]} are empty, but {self.family} computes {hidden.shape[1]} hidden states that do not "
                "belong to tokens: give each row at least one token"
            )
        shape = (B if B == 0 else hidden.shape[0], T if T == 0 else hidden.shape[1], *hidden.shape[2:])
        if state is None and new_state is not None:
            state = {name: params[name] for name in new_state}  # an empty batch keeps the running statistics
        return jnp.zeros(shape, hidden.dtype), state

    def _eval_shape(
        self, function: Callable[..., Any], params: Params, x: jax.Array, inputs: dict[str, Any], size: int = 1
    ) -> Any:
        """The output shapes of ``function(config, params, x, **inputs)``, where ``size`` replaces input sizes of 0.

        JAX only traces the function, so the function checks its inputs, but computes nothing.
        """

        def is_array(value: Any) -> bool:
            return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))

        def with_nonzero_sizes(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(tuple(n or size for n in x.shape), x.dtype)

        def call_function(params: Params, x: jax.Array, arrays: dict[str, Any]) -> Any:
            return function(self.config, params, x, **{**inputs, **arrays})

        arrays = {name: value for name, value in inputs.items() if is_array(value)}
        return jax.eval_shape(call_function, params, *jax.tree.map(with_nonzero_sizes, (x, arrays)))

    def _check_source(self, source: Any) -> None:
        spec.require_arrays(source=source)
        if source is not None and 0 in source.shape:
            raise ValueError(f"source {list(source.shape)} is empty: give at least one row of at least one token")

    def logits(self, params: Params, hidden: jax.Array) -> jax.Array:
        """The outputs of the task's head, float32, from the family's ``logits``.

        For tasks that predict tokens, these are logits [B, T, V], where V includes vocabulary padding. Two families
        return log-probabilities instead of these logits: ``transformer_xl``, and ``attention_rnn`` if its config has
        ``copy=True``. For labels, see ``jaxlm.models.heads``.

        Raises:
            ValueError: the config has ``task="none"``, so there is no head.
            TypeError: ``hidden`` is not an array.
        """
        spec.require_arrays(hidden=hidden)
        return as_logits(self._head(params, hidden))

    def _head(self, params: Params, hidden: jax.Array) -> jax.Array | Unembedding:
        return self.module.logits(self.config, params, hidden)

    def cross_entropy(
        self,
        params: Params,
        hidden: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        *,
        label_smoothing: float = 0.0,
    ) -> jax.Array:
        """The loss ``sum(weights * -log p(target))`` in nats, a float32 scalar, for hidden states [B, T, D].

        Logits are computed in chunks, so that no array [B, T, V] is stored. A family that can compute its loss without
        all logits has its own ``cross_entropy``. If ``targets`` is empty, the loss is 0, as in torch with
        ``reduction="sum"``. The mean over the targets is then 0 / 0 = NaN.

        Args:
            targets: [B, T].
            weights: [B, T], the factor of the loss of each target; 0 for padding.
            label_smoothing: fraction of the target probability that is spread over the vocabulary.

        Raises:
            ValueError: ``label_smoothing`` is not 0 and the family has its own ``cross_entropy``.
            TypeError: ``hidden``, ``targets`` or ``weights`` are not arrays.
        """
        spec.require_arrays(hidden=hidden, targets=targets, weights=weights)
        if hasattr(self.module, "cross_entropy"):
            if label_smoothing:
                raise ValueError(
                    f"label_smoothing={label_smoothing}: the loss of {self.family!r} does not support it, set it to 0"
                )
            if hidden.size == 0:
                return jnp.zeros(())
            return self.module.cross_entropy(self.config, params, hidden, targets, weights)
        return chunked_cross_entropy(self._head, params, hidden, targets, weights, label_smoothing=label_smoothing)

    def pool(self, params: Params, hidden: jax.Array, **inputs: Any) -> jax.Array:
        """The pooled output of each row, [B, 1, D'], where D' is the width of the classifier's input.

        :meth:`logits` computes the logits of the labels from this output.

        Args:
            hidden: the hidden states from :meth:`apply`.
            inputs: ``segment_ids`` [B, T], as for :meth:`apply`, and ``key``, a random key for dropout.

        Raises:
            TypeError: the family has no classifier, or ``hidden`` is not an array.
            ValueError: the hidden states have T = 0, or the task of the model has no pooled output.
        """
        if not hasattr(self.module, "pool"):
            raise TypeError(f"family {self.family!r} has no pooled output, so it cannot classify")
        spec.require_arrays(hidden=hidden)
        if hidden.shape[1] == 0:
            raise ValueError(f"hidden states {list(hidden.shape)} have no position to classify: give each row a token")
        if hidden.shape[0] == 0:
            pooled = self._eval_shape(self.module.pool, params, hidden, inputs)
            return jnp.zeros((0, *pooled.shape[1:]), pooled.dtype)
        return self.module.pool(self.config, params, hidden, **inputs)

    def attention_weights(self, params: Params, tokens: jax.Array, **inputs: Any) -> dict[str, list[jax.Array]]:
        """A dict of lists: the attention weights of each layer with attention, [B, H, T, S] float32.

        T is the number of queries, and S is the number of keys. With a state, the keys in the state are included. The
        dict has one list per type of attention: "self", or for an encoder-decoder "encoder", "decoder" and "cross". A
        type that the family does not have is missing. A classifier that pools by attention also has the type "pool",
        where T is 1 and H is the number of weighted sums of the tokens (hops, Lin et al. 2017). XLNet with the task
        permutation has two entries per layer, for its content stream and its query stream. Dropout is off unless
        ``inputs`` contain a random ``key``.

        The weights of a query sum to 1, with two exceptions. The weights of a query without visible keys are 0. If the
        config of ``attention_rnn`` has a ``window``, the sum may be below 1. Some families (Transformer-XL, Griffin,
        Gated DeltaNet, Mamba-2 with attention, and without a state also T5 and Llama with a window) move the padding of
        a call to the end of each row. In their weights, the rows and columns of this padding come last
        (only the rows in "cross").

        Args:
            inputs: as for :meth:`apply`, for example ``source`` or ``segment_ids``.

        Raises:
            NoAttentionWeightsError: the family has no attention that can be recorded.
            ValueError: there are no tokens; or see :meth:`apply`.
            TypeError: see :meth:`apply`.
        """
        spec.require_arrays(tokens=tokens)
        if 0 in tokens.shape:
            raise ValueError(f"tokens {list(tokens.shape)} are empty: give at least one row of at least one token")
        if "state" in inputs:
            inputs = {**inputs, "state": spec.unstack(inputs["state"])}
        # Recorded weights are tracers, which may not leave a scan or a rematerialized block.
        model = self.with_known_fields(remat="none", scan_layers=False)

        @jax.jit
        def compute_weights(params: Params, tokens: jax.Array, inputs: dict[str, Any]) -> dict[str, list[jax.Array]]:
            with record_weights() as records:
                hidden, _ = model.apply(spec.unstack(params), tokens, **inputs)
                if self.task == "classification" and hasattr(self.module, "pool"):
                    model.pool(params, hidden, segment_ids=inputs.get("segment_ids"))
            weights: dict[str, list[jax.Array]] = {}
            for index, (layer_weights, kind) in enumerate(records):
                name = "pool" if kind == "pool" else "self"
                if self.reads_source:
                    # The encoder comes first. In the decoder, self-attention is causal and cross-attention is not.
                    in_decoder = any(record.kind == "causal" for record in records[:index])
                    is_cross = kind == "source" or (kind == "bidirectional" and in_decoder)
                    name = "cross" if is_cross else "decoder" if kind == "causal" else "encoder"
                    if is_cross:
                        layer_weights = _split_shared_source(layer_weights, tokens)
                weights.setdefault(name, []).append(layer_weights)
            return weights

        weights = compute_weights(params, tokens, inputs)
        if not weights:
            raise NoAttentionWeightsError(f"family {self.family!r} has no attention weights that can be recorded")
        return weights

    @property
    def reads_source(self) -> bool:
        """Whether the family is an encoder-decoder: ``apply`` needs a source, or a state with an encoded source."""
        return hasattr(self.module, "encode")

    @property
    def max_positions(self) -> int | None:
        """The maximum number of tokens of a text; None if the model has no limit."""
        if hasattr(self.module, "max_positions"):
            return self.module.max_positions(self.config)
        return getattr(self.config, "max_positions", None)

    @property
    def needs_whole_text(self) -> bool:
        """Whether the model must read a text from its first token, because a later part alone gives wrong results."""
        return getattr(self.module, "NEEDS_WHOLE_TEXT", False)

    @property
    def reads_token_types(self) -> bool:
        """Whether the family's ``apply`` takes ``token_types``."""
        return "token_types" in inspect.signature(self.module.apply).parameters

    def encode(self, params: Params, source: jax.Array, **inputs: Any) -> jax.Array:
        """The hidden states of the source of an encoder-decoder, [B, S, D].

        Raises:
            TypeError: the family has no encoder, or the source is not an array.
            ValueError: the source is empty, or the family does not accept the value of an input.
        """
        self._require_encoder()
        self._check_source(source)
        return self.module.encode(self.config, params, source, **inputs)

    def init_decode_state(self, params: Params, source: jax.Array, length: int, **inputs: Any) -> spec.Tree:
        """The decode state of an encoder-decoder for a source [B, S], with room for ``length`` tokens per row.

        Raises:
            TypeError: the family has no encoder, or the source is not an array.
            ValueError: the source is empty, the model has no decoder, or the family does not accept the value of an
                input.
        """
        self._require_encoder()
        self._check_source(source)
        return self.module.init_decode_state(self.config, params, source, length, **inputs)

    def _require_encoder(self) -> None:
        if not self.reads_source:
            raise TypeError(f"family {self.family!r} has no encoder: call apply instead")

    def state_specs(self, batch: int, length: int, **sizes: int) -> spec.Tree:
        """The specs of the model state, which :meth:`apply` takes and returns.

        Args:
            batch: number of rows.
            length: maximum number of tokens of a row.
            sizes: ``source_length``, the number of source tokens; only for encoder-decoders.

        Raises:
            TypeError: the family has no state, or the config's ``task`` or ``direction`` rules out a state.
            ValueError: ``length`` exceeds the model's ``max_positions``; the model has no decoder; or its memory would
                have no slots.
        """
        if not hasattr(self.module, "state_specs"):
            raise TypeError(
                f"family {self.family!r} carries no state between calls, so it cannot decode or read a text in several "
                "calls"
            )
        limit = self.max_positions
        if limit is not None and length > limit:
            raise ValueError(f"a state of {length} tokens exceeds max_positions={limit}: shorten prompt or output")
        return self.module.state_specs(self.config, batch, length, **sizes)

    def rollback(
        self,
        params: Params,
        before: State,
        tokens: jax.Array,
        after: State,
        count: jax.Array,
        segment_ids: jax.Array | None = None,
        **inputs: Any,
    ) -> spec.Tree:
        """The state after only the first ``count`` tokens of each row of the last call.

        Later calls give the same results as if the last call had read only these tokens. If the family has a function
        ``rollback(after, dropped)`` (as in ``gpt`` and ``t5``), this function frees the cache slots of the last
        ``dropped`` tokens of each row. Otherwise, the model reads the tokens again, starting from ``before``. The
        tokens after the first ``count`` tokens are then padding. If the state has a key-value cache, the slots of this
        padding are freed. If the last call exceeded the cache, the result is not defined. A freed slot keeps its keys
        and values. So if a dropped token had an id outside the vocabulary, later results of this row may be NaN until
        the slot is written again.

        Args:
            before: the state before the last call.
            tokens: [B, T], the tokens of the last call.
            after: the state that the last call returned.
            count: [B] integers from 0 to T, the number of tokens that each row keeps, padding included. Inside ``jit``,
                the values are not checked.
            segment_ids: [B, T], the segment ids of the last call. Default: all tokens belong to document 1.
            inputs: further inputs of the last call, such as ``token_types``. Only ``xlnet`` has them.

        Raises:
            ValueError: ``count`` does not have the shape [B], is not an integer array, or has a value outside 0 to T.
            TypeError: ``tokens``, ``count`` or ``segment_ids`` are not arrays.

        Example:
            >>> model = get_model("lstm-tiny")
            >>> params, tokens = model.init(jax.random.key(0)), jax.numpy.array([[5, 6, 7]])
            >>> before = model.init_state(1, 8)
            >>> _, after = model.apply(params, tokens, state=before)
            >>> # the state after the tokens 5 and 6:
            >>> state = model.rollback(params, before, tokens, after, jax.numpy.array([2]))
        """
        spec.require_arrays(tokens=tokens, count=count, segment_ids=segment_ids)
        B, T = tokens.shape
        if count.shape != (B,):
            raise ValueError(f"count {list(count.shape)} must be [batch], {[B]}: one number for each row of tokens")
        if not jnp.issubdtype(count.dtype, jnp.integer):
            raise ValueError(f"count has dtype {count.dtype}: pass integers, the number of tokens that each row keeps")
        from jaxlm.nn.attention import cache  # imported here, because `import jaxlm` must not import flax
        from jaxlm.nn.embedding import widen_ids

        count = widen_ids(count)  # T may not fit into a smaller dtype
        if not isinstance(count, jax.core.Tracer):
            with jax.ensure_compile_time_eval():  # other arguments may be traced
                is_valid = bool(jnp.all((count >= 0) & (count <= T)))
            if not is_valid:
                raise ValueError(
                    f"count={count.tolist()} must be from 0 to {T}, the number of tokens that the last call read"
                )
        if hasattr(self.module, "rollback"):
            return self.module.rollback(after, T - count)
        is_kept = jnp.arange(T)[None, :] < count[:, None]
        segments = jnp.where(is_kept, 1 if segment_ids is None else segment_ids, 0)
        # A dropped token may be an id outside the vocabulary. As padding, it must not give NaN.
        _, state = self.apply(params, jnp.where(is_kept, tokens, 0), state=before, segment_ids=segments, **inputs)
        assert state is not None
        return cache.rollback(state, T - count) if self.has_cache else state

    @property
    def has_cache(self) -> bool:
        """Whether the state has a key-value cache, which has a fixed number of slots (``jaxlm.nn.attention.cache``)."""
        from jaxlm.nn.attention import cache  # imported here, because `import jaxlm` must not import flax

        specs = self.state_specs(1, 1)
        return cache.num_slots(specs, specs) is not None

    @property
    def carried_state_length(self) -> int | None:
        """The ``length`` that training passes to :meth:`state_specs`, to carry the state between batches.

        None: training reads independent windows and carries no state.
        """
        function = getattr(self.module, "carried_state_length", None)
        is_causal = self.task == "causal"
        return function(self.config) if function is not None and is_causal else None

    @property
    def embedding_multiplier(self) -> float:
        """The factor by which token embeddings are multiplied before the first layer; 1 for most families.

        The factor ``multipliers.embedding`` of Falcon-H1 is not included.
        """
        function = getattr(self.module, "embedding_multiplier", None)
        return 1.0 if function is None else function(self.config)

    def init_state(self, batch: int, length: int) -> spec.Tree:
        """The initial state for ``batch`` rows of at most ``length`` tokens. For errors, see :meth:`state_specs`."""
        return spec.init(self.state_specs(batch, length))


def _split_shared_source(weights: jax.Array, tokens: jax.Array) -> jax.Array:
    """The cross-attention weights [B, H, T, S], from weights [N, H, B / N * T, S].

    B / N rows share each of the N sources (``jaxlm.nn.attention.source``).
    """
    (N, H, _, S), (B, T) = weights.shape, tokens.shape
    return weights.reshape(N, H, B // N, T, S).swapaxes(1, 2).reshape(B, H, T, S)


def get_model(name: str, /, **overrides: Any) -> Model:
    """The model of the family or variant ``name``, with the config fields in ``overrides`` changed.

    The name of a family stands for the default values of its ``Config``.

    Example:
        >>> get_model("gpt2", num_layers=2).num_parameters
        53561088

    Raises:
        ValueError: the name or a field is unknown (the message suggests a similar one), a value has the wrong type, or
            the ``Config`` does not accept the values.
    """
    if name in family_names():
        family_name, config = name, family(name).Config()
    elif (owner := family_of_variant(name)) is not None:
        family_name, config = owner, family(owner).VARIANTS[name]
    else:
        known = sorted({*family_names(), *variant_names()})
        raise ValueError(f"no model is called {name!r}: {suggest_name(name, known)}choose from {', '.join(known)}")
    return Model(family_name, config).with_fields(**overrides)
