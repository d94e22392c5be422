"""``Model``: a family and a config; its methods are the family's functions with this config."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm import spec
from jaxlm.config import check_value
from jaxlm.nn.attention.weight_record import recorded_weights
from jaxlm.nn.loss import chunked_cross_entropy

FAMILIES = (
    "gpt", "llama", "bert", "roberta", "t5", "xlnet", "transformer_xl", "lstm", "gru", "attention_rnn",
    "attention_rnn_lm", "resnet", "resnet_lm", "alexnet",
)  # fmt: skip
"""Names of the families, each of which is a module of this package."""


def family(name: str) -> ModuleType:
    """The module of a family."""
    return importlib.import_module(f"jaxlm.models.{name}")


def variant_names() -> dict[str, str]:
    """A dict from the name of every published or tiny variant to its family."""
    return {variant: name for name in FAMILIES for variant in family(name).VARIANTS}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Facts about a loaded model that its functions do not need: the contents of its files, and how they were loaded.

    Attributes:
        labels: names of the labels of a (token) classifier, in the order of the logits; None: the labels have no names.
        token_ids: ids of special tokens by role, such as ``{"eos": 2, "pad": 0, "decoder_start": 0}``. An id may be
            None, or a list if several tokens end a text.
        config: the whole ``config.json``; ``save_pretrained`` keeps the fields that jaxlm does not set.
        generation_config: the whole ``generation_config.json``; None if there is no such file.
        fresh: paths of the parameters that are missing in the files and were initialised.
        unused: names of the tensors in the files that the model does not use.
    """

    labels: tuple[str, ...] | None = None
    token_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: Mapping[str, Any] | None = None
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """A family's functions with a config. Hashable: may be a static argument of ``jax.jit``.

    Equality and hash ignore ``metadata``, so models that differ only in it share compiled functions.

    Example:
        >>> model = get_model("gpt2-tiny")
        >>> params = model.init(jax.random.key(0))
        >>> hidden, state = model.apply(params, jax.numpy.ones((1, 8), int))
        >>> model.logits(params, hidden).shape
        (1, 8, 128)
    """

    family: str
    config: Any
    metadata: Metadata | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def module(self) -> ModuleType:
        """The family's module."""
        return family(self.family)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the labels, in the order of the logits; None if they have no names."""
        return None if self.metadata is None else self.metadata.labels

    def with_labels(self, names: Sequence[str]) -> Model:
        """The model with names for its labels, which ``save_pretrained`` writes to the files.

        Example:
            >>> get_model("bert-tiny", task="classification", num_labels=2).with_labels(["bad", "good"]).labels
            ('bad', 'good')

        Raises:
            TypeError: one string, or names that are not strings.
            ValueError: the model has no labels; the numbers of names and labels differ; a name occurs twice.
        """
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"labels must be a sequence of strings, got {names!r}")
        task = getattr(self.config, "task", None)
        if task not in ("classification", "token_classification"):
            raise ValueError(
                f"a model with task={task!r} has no labels: take task='classification' or 'token_classification'"
            )
        if len(names) != self.config.num_labels:
            raise ValueError(f"got {len(names)} labels {list(names)} for num_labels={self.config.num_labels}")
        if len(set(names)) != len(names):
            raise ValueError(f"labels must be distinct, got {list(names)}")
        metadata = dataclasses.replace(self.metadata or Metadata(), labels=tuple(names))
        return dataclasses.replace(self, metadata=metadata)

    @property
    def specs(self) -> spec.Tree:
        """The specs of the parameters."""
        return self.module.specs(self.config)

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
        return spec.count(self.specs)

    def with_fields(self, **values: Any) -> Model:
        """The model with these values of config fields. Fields that its config does not have are left out."""
        names = {field.name for field in dataclasses.fields(self.config)}
        changes = {name: value for name, value in values.items() if name in names}
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))

    def init(self, key: jax.Array) -> spec.Tree:
        """Newly initialised parameters."""
        return spec.init(self.specs, key)

    def apply(self, params: spec.Tree, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Any]:
        """The hidden states [B, T, D] and the new state, from the family's ``apply``.

        For an empty batch (B or T is 0), the hidden states are empty, gradients are 0, and a given state is returned
        unchanged.

        Raises:
            ValueError: an input that the family does not accept; an empty source with tokens that are not empty; T = 0
                for a family that makes one representation of a whole text.
        """
        if 0 in jnp.shape(tokens):
            return self._apply_to_empty_batch(params, tokens, inputs)
        self._check_source(inputs.get("source"))
        return self.module.apply(self.config, params, tokens, **inputs)

    def _apply_to_empty_batch(
        self, params: spec.Tree, tokens: jax.Array, inputs: dict[str, Any]
    ) -> tuple[jax.Array, Any]:
        """The outputs of ``apply`` for an empty batch. Nothing is computed."""
        hidden, new = self._shapes(self.module.apply, params, tokens, inputs)
        B, T = tokens.shape
        if T == 0 and hidden.shape[1] != 1:
            raise ValueError(
                f"tokens {[B, T]} have no position, but {self.family} makes one representation of a whole text: give "
                "each row at least one token"
            )
        shape = (B if B == 0 else hidden.shape[0], T if T == 0 else hidden.shape[1], *hidden.shape[2:])
        state = inputs.get("state")
        if state is None and new is not None:
            state = {name: params[name] for name in new}  # an empty batch does not change batch statistics
        return jnp.zeros(shape, hidden.dtype), state

    def _shapes(self, function: Callable[..., Any], params: spec.Tree, x: jax.Array, inputs: dict[str, Any]) -> Any:
        """The shapes of ``function(config, params, x, **inputs)``, with every size of 0 replaced by 1.

        The function checks its inputs, but computes nothing.
        """

        def is_array(value: Any) -> bool:
            return all(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))

        arrays = {name: value for name, value in inputs.items() if is_array(value)}
        options = {name: value for name, value in inputs.items() if not is_array(value)}

        def run(params: spec.Tree, x: jax.Array, arrays: dict[str, Any]) -> Any:
            return function(self.config, params, x, **arrays, **options)

        return jax.eval_shape(run, params, *jax.tree.map(_with_nonzero_sizes, (x, arrays)))

    def _check_source(self, source: Any) -> None:
        if source is not None and 0 in jnp.shape(source):
            raise ValueError(f"source {list(jnp.shape(source))} is empty: give at least one row of at least one token")

    def logits(self, params: spec.Tree, hidden: jax.Array) -> jax.Array:
        """The logits [B, T, V] float32, from the family's ``logits``."""
        return self.module.logits(self.config, params, hidden)

    def cross_entropy(
        self,
        params: spec.Tree,
        hidden: jax.Array,
        targets: jax.Array,
        weights: jax.Array,
        *,
        label_smoothing: float = 0.0,
    ) -> jax.Array:
        """The loss ``sum(weights * -log p(target))`` in nats, float32, for hidden states [B, T, D].

        Logits are computed in chunks, so [B, T, V] is never in memory. A family that can compute its loss without all
        logits has its own ``cross_entropy``. As in torch, the sum over no target is 0 (``reduction="sum"``), and a mean
        over no target is 0 / 0 = NaN.

        Args:
            label_smoothing: share of the target probability that is spread over the vocabulary.

        Raises:
            ValueError: ``label_smoothing`` for a family that has its own ``cross_entropy``.
        """
        if hasattr(self.module, "cross_entropy"):
            if label_smoothing:
                raise ValueError(
                    f"label_smoothing={label_smoothing}: the loss of {self.family!r} has none, leave it at 0"
                )
            if hidden.size == 0:
                return jnp.zeros(())
            return self.module.cross_entropy(self.config, params, hidden, targets, weights)
        return chunked_cross_entropy(self.logits, params, hidden, targets, weights, label_smoothing=label_smoothing)

    def pool(self, params: spec.Tree, hidden: jax.Array, **inputs: Any) -> jax.Array:
        """The input of the classifier for each row, [B, 1, D']; its ``logits`` are those of the labels.

        Raises:
            TypeError: the family does not classify.
            ValueError: hidden states with T = 0.
        """
        if not hasattr(self.module, "pool"):
            raise TypeError(f"family {self.family!r} has no pooled output, so it cannot classify")
        if hidden.shape[1] == 0:
            raise ValueError(f"hidden states {list(hidden.shape)} have no position to classify: give each row a token")
        if hidden.shape[0] == 0:
            pooled = self._shapes(self.module.pool, params, hidden, inputs)
            return jnp.zeros((0, *pooled.shape[1:]), pooled.dtype)
        return self.module.pool(self.config, params, hidden, **inputs)

    def attention_weights(self, params: spec.Tree, tokens: jax.Array, **inputs: Any) -> dict[str, list[jax.Array]]:
        """The attention weights of each layer, [B, H, T, S] float32; the weights of each query sum to 1.

        The keys of the result are "self"; for an encoder-decoder "encoder", "decoder" and "cross" (as far as the family
        has them); and "pool" if a classifier pools by attention (H is the number of hops, T is 1). XLNet has two
        entries per layer, for its content stream and its query stream. Dropout is off. A query without visible keys has
        weights of 0.

        Args:
            inputs: as for :meth:`apply`, for example ``source`` or ``segment_ids``.

        Raises:
            TypeError: the family has no attention that can be recorded.
        """
        # Records cannot leave a scan or a recomputed block.
        model = self.with_fields(remat="none", scan_layers=False)

        @jax.jit
        def run(params: spec.Tree, tokens: jax.Array, inputs: dict[str, Any]) -> dict[str, list[jax.Array]]:
            with recorded_weights() as records:
                hidden, _ = model.apply(spec.unstack(params), tokens, **inputs)
                if getattr(self.config, "task", None) == "classification" and hasattr(self.module, "pool"):
                    model.pool(params, hidden, segment_ids=inputs.get("segment_ids"))
            weights: dict[str, list[jax.Array]] = {}
            for index, (layer_weights, kind) in enumerate(records):
                name = "pool" if kind == "pool" else "self"
                if self.reads_source:
                    # The encoder comes first. In the decoder, self-attention is causal and cross-attention is not.
                    in_decoder = any(record.kind == "causal" for record in records[:index])
                    is_cross = kind == "source" or (kind == "bidirectional" and in_decoder)
                    name = "cross" if is_cross else "decoder" if kind == "causal" else "encoder"
                weights.setdefault(name, []).append(layer_weights)
            return weights

        weights = run(params, tokens, inputs)
        if not weights:
            raise TypeError(f"family {self.family!r} has no attention weights to show")
        return weights

    @property
    def reads_source(self) -> bool:
        """Whether the model is an encoder-decoder: ``apply`` needs a source, or a state with an encoded source."""
        return hasattr(self.module, "encode")

    @property
    def reads_token_types(self) -> bool:
        """Whether the family's ``apply`` takes ``token_types``."""
        return "token_types" in inspect.signature(self.module.apply).parameters

    def encode(self, params: spec.Tree, source: jax.Array, **inputs: Any) -> jax.Array:
        """The hidden states of the source of an encoder-decoder, [B, S, D]."""
        self._require_encoder()
        self._check_source(source)
        return self.module.encode(self.config, params, source, **inputs)

    def init_decode_state(self, params: spec.Tree, source: jax.Array, length: int, **inputs: Any) -> spec.Tree:
        """The decode state of an encoder-decoder for a source [B, S], with room for ``length`` tokens per row."""
        self._require_encoder()
        self._check_source(source)
        return self.module.init_decode_state(self.config, params, source, length, **inputs)

    def _require_encoder(self) -> None:
        if not self.reads_source:
            raise TypeError(f"family {self.family!r} has no encoder: give it a text with apply")

    def state_specs(self, batch: int, length: int, **sizes: int) -> spec.Tree:
        """The specs of the model state that is carried between calls. Encoder-decoders also take ``source_length``.

        Raises:
            TypeError: the family has no state.
        """
        if not hasattr(self.module, "state_specs"):
            raise TypeError(f"family {self.family!r} carries no state between calls, so it cannot decode or stream")
        return self.module.state_specs(self.config, batch, length, **sizes)

    def init_state(self, batch: int, length: int) -> spec.Tree:
        """The initial state for ``batch`` rows of at most ``length`` tokens."""
        return spec.init(self.state_specs(batch, length))


def _with_nonzero_sizes(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, with every size of 0 replaced by 1."""
    return jax.ShapeDtypeStruct(tuple(size or 1 for size in x.shape), x.dtype)


def get_model(name: str, **overrides: Any) -> Model:
    """The model of a family or variant by name, with changed fields of its config.

    Example:
        >>> get_model("gpt2", num_layers=2).num_parameters
        53561088

    Raises:
        ValueError: an unknown name or field (the message suggests the nearest one), or a value of a wrong type.
    """
    variants = variant_names()
    if name in FAMILIES:
        family_name, config = name, family(name).Config()
    elif name in variants:
        family_name, config = variants[name], family(variants[name]).VARIANTS[name]
    else:
        known = sorted({*FAMILIES, *variants})
        raise ValueError(f"no model is called {name!r}: {_suggest(name, known)}choose from {', '.join(known)}")
    fields = [field.name for field in dataclasses.fields(config)]
    hints = typing.get_type_hints(type(config))
    for field, value in overrides.items():
        if field not in fields:
            raise ValueError(
                f"{family_name} has no field {field!r}: {_suggest(field, fields)}its fields are {', '.join(fields)}"
            )
        check_value(hints[field], value, field)
    return Model(family_name, dataclasses.replace(config, **overrides))


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}? " if close else ""
