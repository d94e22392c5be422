"""``Model``: a family and a config, whose methods are the family's functions with the config filled in."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import typing
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import jax

from jaxlm import spec
from jaxlm.config import check_value
from jaxlm.nn.loss import chunked_cross_entropy
from jaxlm.nn.weight_record import recorded_weights

FAMILIES = (
    "gpt", "llama", "bert", "roberta", "t5", "xlnet", "transformer_xl", "lstm", "gru", "attention_rnn",
    "attention_rnn_lm", "resnet", "resnet_lm", "alexnet",
)  # fmt: skip
"""Modules of this package that are families."""


def family(name: str) -> ModuleType:
    """The module of a family."""
    return importlib.import_module(f"jaxlm.models.{name}")


def variant_names() -> dict[str, str]:
    """``{variant: family}`` of every published (and tiny) size."""
    return {variant: name for name in FAMILIES for variant in family(name).VARIANTS}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Facts about a model that its functions do not need: what a directory said, and how it was loaded.

    Attributes:
        labels: the names of a classifier's or tagger's labels, in the order of its logits; None: they have no names.
        token_ids: ids of special tokens by role, such as ``{"eos": 2, "pad": 0, "decoder_start": 0}``. An id may be
            None, or a list where several tokens end a text.
        config: the whole ``config.json``; ``save_pretrained`` writes back what jaxlm does not decide.
        generation_config: the whole ``generation_config.json``; None: there is none.
        fresh: paths of the parameters that the files do not have, which were initialised.
        unused: names of the tensors in the files that the model does not have.
    """

    labels: tuple[str, ...] | None = None
    token_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: Mapping[str, Any] | None = None
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Model:
    """A family's functions with their config filled in, and nothing more. Hashable: may be static in ``jax.jit``.

    ``metadata`` is no part of equality or hash, so models that differ in nothing else share compiled functions.

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
        """The names of the labels, in the order of the logits; None where they have no names."""
        return None if self.metadata is None else self.metadata.labels

    def with_labels(self, names: Sequence[str]) -> Model:
        """The same model with names for its labels, which ``save_pretrained`` writes.

        Example:
            >>> get_model("bert-tiny", task="classification", num_labels=2).with_labels(["bad", "good"]).labels
            ('bad', 'good')

        Raises:
            TypeError: one string, or names that are not strings.
            ValueError: the model has no labels; another number of names than of labels; a name that occurs twice.
        """
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"labels must be a sequence of strings, got {names!r}")
        task = getattr(self.config, "task", None)
        if task not in ("classification", "tagging"):
            raise ValueError(f"a model with task={task!r} has no labels: take task='classification' or 'tagging'")
        if len(names) != self.config.num_labels:
            raise ValueError(f"got {len(names)} labels {list(names)} for num_labels={self.config.num_labels}")
        if len(set(names)) != len(names):
            raise ValueError(f"labels must be distinct, got {list(names)}")
        metadata = dataclasses.replace(self.metadata or Metadata(), labels=tuple(names))
        return dataclasses.replace(self, metadata=metadata)

    @property
    def specs(self) -> spec.Tree:
        """Specs of the parameters."""
        return self.module.specs(self.config)

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return spec.count(self.specs)

    def init(self, key: jax.Array) -> spec.Tree:
        """Fresh parameters."""
        return spec.init(self.specs, key)

    def apply(self, params: spec.Tree, tokens: jax.Array, **inputs: Any) -> tuple[jax.Array, Any]:
        """The family's ``apply``: hidden states [B, T, D] and the new state."""
        return self.module.apply(self.config, params, tokens, **inputs)

    def logits(self, params: spec.Tree, hidden: jax.Array) -> jax.Array:
        """The family's ``logits``: [B, T, V] float32."""
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
        """``sum(weights * -log p(target))`` in nats, float32, of hidden states [B, T, D]; [B, T, V] is never held.

        A family whose loss needs less than its ``logits`` has a ``cross_entropy`` of its own.

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
            return self.module.cross_entropy(self.config, params, hidden, targets, weights)
        return chunked_cross_entropy(self.logits, params, hidden, targets, weights, label_smoothing=label_smoothing)

    def summary(self, params: spec.Tree, hidden: jax.Array, **inputs: Any) -> jax.Array:
        """What a classifier reads of each row, [B, 1, D']: ``logits`` of it are those of the labels.

        Raises:
            TypeError: the family does not classify.
        """
        if not hasattr(self.module, "summary"):
            raise TypeError(f"family {self.family!r} has no summary of a row, so it cannot classify")
        return self.module.summary(self.config, params, hidden, **inputs)

    def attention_weights(self, params: spec.Tree, tokens: jax.Array, **inputs: Any) -> dict[str, list[jax.Array]]:
        """The attention weights of each layer, float32 [B, H, T, S]; those of each query sum to 1.

        The keys of the result are "self" or, for an encoder-decoder, those of "encoder", "decoder" and "cross" that the
        family has, and "pool" where a classifier pools by attention (H is the number of hops, T is 1). XLNet has two
        entries for each layer, of its content stream and of its query stream. Dropout is off. The weights of a query
        that sees no key are 0.

        Args:
            inputs: of :meth:`apply`, for example ``source`` or ``segment_ids``.

        Raises:
            TypeError: the family has no attention that can be recorded.
        """
        plain = {"remat": "none"} if hasattr(self.config, "remat") else {}
        model = dataclasses.replace(self, config=dataclasses.replace(self.config, **plain))

        @jax.jit
        def run(params: spec.Tree, tokens: jax.Array, inputs: dict[str, Any]) -> dict[str, list[jax.Array]]:
            with recorded_weights() as records:
                hidden, _ = model.apply(spec.unstack(params), tokens, **inputs)
                if getattr(self.config, "task", None) == "classification" and hasattr(self.module, "summary"):
                    model.summary(params, hidden, segment_ids=inputs.get("segment_ids"))
            weights: dict[str, list[jax.Array]] = {}
            for number, (made, kind) in enumerate(records):
                name = "pool" if kind == "pool" else "self"
                if self.reads_source:
                    # The encoder comes first. In the decoder, self-attention is causal and attention to the source not.
                    in_decoder = any(record.kind == "causal" for record in records[:number])
                    is_cross = kind == "source" or (kind == "bidirectional" and in_decoder)
                    name = "cross" if is_cross else "decoder" if kind == "causal" else "encoder"
                weights.setdefault(name, []).append(made)
            return weights

        weights = run(params, tokens, inputs)
        if not weights:
            raise TypeError(f"family {self.family!r} has no attention weights to show")
        return weights

    @property
    def reads_source(self) -> bool:
        """Whether the model is an encoder-decoder: ``apply`` needs a source, or a state that has read one."""
        return hasattr(self.module, "encode")

    @property
    def reads_token_types(self) -> bool:
        """Whether the ``apply`` of the family takes ``token_types``."""
        return "token_types" in inspect.signature(self.module.apply).parameters

    def encode(self, params: spec.Tree, source: jax.Array, **inputs: Any) -> jax.Array:
        """An encoder-decoder's ``encode``: hidden states of the source, [B, S, D]."""
        self._needs_encoder()
        return self.module.encode(self.config, params, source, **inputs)

    def start(self, params: spec.Tree, source: jax.Array, length: int, **inputs: Any) -> spec.Tree:
        """The state of an encoder-decoder that has read a source [B, S] and has room for ``length`` tokens."""
        self._needs_encoder()
        return self.module.start(self.config, params, source, length, **inputs)

    def _needs_encoder(self) -> None:
        if not self.reads_source:
            raise TypeError(f"family {self.family!r} has no encoder: give it a text with apply")

    def state_specs(self, batch: int, length: int, **sizes: int) -> spec.Tree:
        """Specs of what the model carries between calls. Encoder-decoders also take ``source_length``.

        Raises:
            TypeError: the family carries nothing.
        """
        if not hasattr(self.module, "state_specs"):
            raise TypeError(f"family {self.family!r} carries no state between calls, so it cannot decode or stream")
        return self.module.state_specs(self.config, batch, length, **sizes)

    def init_state(self, batch: int, length: int) -> spec.Tree:
        """An empty state for ``batch`` rows of at most ``length`` tokens."""
        return spec.init(self.state_specs(batch, length))


def get_model(name: str, **overrides: Any) -> Model:
    """The model of a family or variant name, with config fields changed.

    Example:
        >>> get_model("gpt2", num_layers=2).num_parameters
        53561088

    Raises:
        ValueError: no such name or field (the nearest one is suggested), or a value of another type than the field's.
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
