"""Adaptive softmax (Grave et al. 2017) and adaptive input (Baevski & Auli 2019), as Transformer-XL ties them.

The vocabulary is sorted by frequency and cut into clusters. Cluster 0 stands in the head, beside one entry for each
further cluster, and a word of cluster i has ``p(word) = p(cluster i | head) * p(word | cluster i)``. With a
``divisor`` d, the vectors of cluster i have width ``width / d^i`` and a projection to the model's width; with d = 1 all
are equally wide, in one table.

Parameters (E_i width of cluster i, n_i its words, C clusters beyond the first, D model):

    token_embedding [n_0, E_0] (d = 1: [V, E]), token_projection [E_0, D] (d = 1: only if E is not D)
    tails/cluster_i/embedding [n_i, E_i], tails/cluster_i/projection [E_i, D]                           (d > 1)
    head/bias [n_0] (d = 1: [V]), head/cluster_weight [C, E_0], head/cluster_bias [C], head/tails/cluster_i/bias [n_i]

The projection of the first cluster is the head's own, ``head/projection``, in every published model. Where the others,
or the tables, are not tied either, they stand beside the biases as ``projection`` and ``embedding``.
The entry of cluster i in the head is ``cutoffs[0] + i - 1``, as in the TensorFlow code and in Hugging Face's files; the
authors' PyTorch code counts them from the end, so the rows of its ``cluster_weight`` and ``cluster_bias`` are reversed.

Shapes: B batch, T time, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.nn import embedding
from jaxlm.nn.loss import chunked_cross_entropy, selected_cross_entropy
from jaxlm.spec import ArraySpec, Initializer


@dataclasses.dataclass(frozen=True)
class Clusters:
    """How a vocabulary is cut, and how wide its vectors are.

    Attributes:
        cutoffs: first id of each cluster but the first; empty means an ordinary softmax.
        width: of the vectors of the first cluster.
        model_width: of hidden states.
        divisor: how much narrower each cluster is than the one before.

    Raises:
        ValueError: cutoffs that do not ascend within the vocabulary, or a cluster of width 0.
    """

    vocab_size: int
    cutoffs: tuple[int, ...]
    width: int
    model_width: int
    divisor: int = 1

    def __post_init__(self) -> None:
        if any(stop <= start for start, stop in self.borders):
            raise ValueError(f"cutoffs={self.cutoffs} must ascend between 0 and vocab_size={self.vocab_size}")
        if self.widths[-1] < 1:
            raise ValueError(
                f"cluster {len(self.cutoffs)} would have width {self.width} / {self.divisor}^{len(self.cutoffs)} < 1: "
                "use fewer cutoffs or a smaller divisor"
            )

    @property
    def borders(self) -> tuple[tuple[int, int], ...]:
        """First id of each cluster, and the id after its last."""
        edges = (0, *self.cutoffs, self.vocab_size)
        return tuple(zip(edges[:-1], edges[1:], strict=True))

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the vectors of each cluster."""
        return tuple(self.width // self.divisor**i for i in range(len(self.borders)))

    @property
    def projected(self) -> bool:
        """Whether vectors are projected to the model's width."""
        return self.divisor > 1 or self.width != self.model_width

    @property
    def tables(self) -> tuple[tuple[int, int], ...]:
        """[rows, width] of each table: one a cluster, or one for all when they are equally wide."""
        if self.divisor == 1:
            return ((self.vocab_size, self.width),)
        return tuple((stop - start, width) for (start, stop), width in zip(self.borders, self.widths, strict=True))


def input_specs(clusters: Clusters, init: Initializer, projection_init: Initializer) -> dict[str, Any]:
    """Specs of the embedding: ``token_embedding`` and, where there are any, ``token_projection`` and ``tails``."""
    (first, *others), D = clusters.tables, clusters.model_width
    tree: dict[str, Any] = {"token_embedding": _table(first, init)}
    if clusters.projected:
        tree["token_projection"] = _projection((first[1], D), projection_init)
    if others:
        tree["tails"] = {
            f"cluster_{i}": {
                "embedding": _table(shape, init),
                "projection": _projection((shape[1], D), projection_init),
            }
            for i, shape in enumerate(others, start=1)
        }
    return tree


def head_specs(
    clusters: Clusters, init: Initializer, projection_init: Initializer, *, tie_embeddings: bool, tie_projections: bool
) -> dict[str, Any]:
    """Specs of the softmax beyond what it shares with :func:`input_specs`.

    Args:
        tie_embeddings: share the tables.
        tie_projections: share the projections of all clusters but the first.
    """
    trees: list[dict[str, Any]] = [{} for _ in clusters.borders]
    for tree, shape in zip(trees, clusters.tables, strict=False):
        tree["bias"] = ArraySpec((shape[0],), ("vocab",))
        if not tie_embeddings:
            tree["embedding"] = _table(shape, init)
    for i, (tree, width) in enumerate(zip(trees, clusters.widths, strict=True)):
        if clusters.projected and (i == 0 or not tie_projections):
            tree["projection"] = _projection((width, clusters.model_width), projection_init)
    head, *tails = trees
    if clusters.cutoffs:
        C = len(clusters.cutoffs)
        head["cluster_weight"] = ArraySpec((C, clusters.width), (None, "embed"), init, decay=True)
        head["cluster_bias"] = ArraySpec((C,), (None,))
    if any(tails):
        head["tails"] = {f"cluster_{i}": tail for i, tail in enumerate(tails, start=1)}
    return head


def _table(shape: tuple[int, int], init: Initializer) -> ArraySpec:
    return ArraySpec(shape, ("vocab", "embed"), init, decay=True)


def _projection(shape: tuple[int, int], init: Initializer) -> ArraySpec:
    return ArraySpec(shape, (None, "embed"), init, decay=True)


def embed(clusters: Clusters, params: dict[str, Any], ids_BT: jax.Array, dtype: Any) -> jax.Array:
    """Vectors of the model's width, [B, T, D] in ``dtype``. An id outside the vocabulary gives NaN."""
    if clusters.divisor == 1:
        rows = embedding.embed(params["token_embedding"], ids_BT, dtype)
        return rows @ params["token_projection"].astype(dtype) if clusters.projected else rows
    x: Any = jnp.nan  # where no cluster has the id
    for i, (start, stop) in enumerate(clusters.borders):
        table, projection = _input(params, i)
        inside = (ids_BT >= start) & (ids_BT < stop)
        rows = embedding.embed(table, jnp.where(inside, ids_BT - start, 0), dtype)
        x = jnp.where(inside[..., None], rows @ projection.astype(dtype), x)
    return x


def log_probabilities(clusters: Clusters, params: dict[str, Any], hidden_BTD: jax.Array) -> jax.Array:
    """Normalised log-probabilities of the whole vocabulary, [B, T, V] float32."""
    first, *tails = (jax.nn.log_softmax(_logits(own, hidden_BTD)) for own in _outputs(clusters, params))
    words = clusters.borders[0][1]
    of_clusters = jnp.split(first[..., words:], len(tails), axis=-1) if tails else []
    return jnp.concatenate([first[..., :words], *map(jnp.add, of_clusters, tails)], axis=-1)


def cross_entropy(
    clusters: Clusters, params: dict[str, Any], hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """``sum(weights * -log p(target))`` in nats, a float32 scalar. A target outside the vocabulary gives NaN.

    What the clusters are for: each but the first is worked out at the places alone whose target is in it (Grave et al.
    2017, section 4). Differentiable in ``params`` and ``hidden``.
    """
    first, *tails = _outputs(clusters, params)
    words = clusters.borders[0][1]
    outside = (targets_BT < 0) | (targets_BT >= clusters.vocab_size)
    cluster_BT = jnp.where(outside, -1, sum((targets_BT >= cutoff).astype(jnp.int32) for cutoff in clusters.cutoffs))
    in_head_BT = jnp.where(cluster_BT > 0, words - 1 + cluster_BT, jnp.where(outside, -1, targets_BT))
    total = chunked_cross_entropy(_logits, first, hidden_BTD, in_head_BT, weights_BT)
    for i, own in enumerate(tails, start=1):
        weights = jnp.where(cluster_BT == i, weights_BT, 0.0)
        total += selected_cross_entropy(_logits, own, hidden_BTD, targets_BT - clusters.borders[i][0], weights)
    return total


def _logits(output: dict[str, jax.Array], hidden_BTD: jax.Array) -> jax.Array:
    """Scores of the words (and entries) of one cluster."""
    projection, weight = output.get("projection"), output["weight"]
    x = hidden_BTD if projection is None else hidden_BTD @ projection.astype(hidden_BTD.dtype).T
    return embedding.unembed(weight, x, weight.shape[0]) + output["bias"].astype(jnp.float32)[None, None]


def _input(params: dict[str, Any], i: int) -> tuple[jax.Array, Any]:
    """Table and projection (or None) of cluster i, where each cluster has a table."""
    if i == 0:
        return params["token_embedding"], params.get("token_projection")
    tail = params["tails"][f"cluster_{i}"]
    return tail["embedding"], tail["projection"]


def _outputs(clusters: Clusters, params: dict[str, Any]) -> list[dict[str, jax.Array]]:
    """Weight, bias and, where there is one, projection of each cluster in the softmax: the head's own, or else those of
    the input. The first has the entries of the others after its words."""
    head = params["head"]
    own = [head if i == 0 else head.get("tails", {}).get(f"cluster_{i}", {}) for i in range(len(clusters.borders))]
    inputs = [_input(params, 0 if clusters.divisor == 1 else i) for i in range(len(own))]
    projections = [mine.get("projection", shared) for mine, (_, shared) in zip(own, inputs, strict=True)]
    if clusters.divisor == 1:
        # Split and not sliced: its gradient is put together, and not added up from arrays that are zero elsewhere.
        weights = jnp.split(head.get("embedding", inputs[0][0]), clusters.cutoffs)
        biases = jnp.split(head["bias"], clusters.cutoffs)
    else:
        weights = [mine.get("embedding", shared) for mine, (shared, _) in zip(own, inputs, strict=True)]
        biases = [mine["bias"] for mine in own]
    if clusters.cutoffs:
        weights[0] = jnp.concatenate([weights[0], head["cluster_weight"]])
        biases[0] = jnp.concatenate([biases[0], head["cluster_bias"]])
    return [
        {"weight": weight, "bias": bias, **({} if projection is None else {"projection": projection})}
        for weight, bias, projection in zip(weights, biases, projections, strict=True)
    ]
