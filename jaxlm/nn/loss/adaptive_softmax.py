"""Adaptive softmax (Grave et al. 2017) and adaptive input (Baevski and Auli 2019), tied as in Transformer-XL.

The vocabulary is sorted by frequency and split into clusters. The first softmax has the words of cluster 0 and one
entry for each further cluster. A word of cluster i > 0 has the probability
``p(word) = p(cluster i) * p(word | cluster i)``. With a ``divisor`` d > 1, the vectors of cluster i have width
``width / d^i`` and a projection to the model's width. With d = 1, all vectors have the same width and are in one table.

Parameters, for i from 1 to C (E_i width of the vectors of cluster i, E = E_0, n_i number of words of cluster i, C
number of clusters after the first, D model width, V vocabulary):

    token_embedding [n_0, E_0] (d = 1: [V, E]), token_projection [E_0, D] (d = 1: only if E is not D)
    tails/cluster_i/embedding [n_i, E_i], tails/cluster_i/projection [E_i, D]                           (d > 1)
    head/bias [n_0] (d = 1: [V]), head/cluster_weight [C, E_0], head/cluster_bias [C] (both only if C > 0)
    head/tails/cluster_i/bias [n_i]                                                                     (d > 1)
    head/projection [E_0, D]                                             (only if there is a token_projection)

The numbers of rows n_i and V of tables and biases are rounded up to a multiple of ``Clusters.multiple``.

The parameters of the input are ``token_embedding``, ``token_projection`` and ``tails``. The softmax reads a tied table
or projection from them. The projection of the first cluster is never tied, as in every published model: the softmax
uses ``head/projection``. If the other projections are not tied, they are ``head/tails/cluster_i/projection``. If the
tables are not tied, they are ``head/embedding`` and, with d > 1, ``head/tails/cluster_i/embedding``.

The index of cluster i in the first softmax is ``cutoffs[0] + i - 1``, as in the TensorFlow code of Transformer-XL and
in Hugging Face's files. The PyTorch code of Transformer-XL numbers the clusters from the end, so the rows of its
``cluster_weight`` and ``cluster_bias`` are in reverse order.

Shapes: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxlm.nn import embedding
from jaxlm.nn.loss.chunked import chunked_cross_entropy
from jaxlm.nn.loss.selected import selected_cross_entropy
from jaxlm.spec import ArraySpec, Initializer, Params, require_arrays


@dataclasses.dataclass(frozen=True)
class Clusters:
    """The clusters of a vocabulary, and the width of their vectors.

    Attributes:
        vocab_size: V, the number of words.
        cutoffs: first id of each cluster after the first; empty: an ordinary softmax.
        width: E_0, the width of the vectors of the first cluster.
        model_width: D, the width of the hidden states.
        divisor: d; the vectors of cluster i have the width ``width / d^i``, rounded down.
        multiple: the number of rows of each table and bias is rounded up to a multiple of this number. The padding does
            not change the probabilities.

    Raises:
        ValueError: the divisor is less than 1, the cutoffs do not ascend strictly between 0 and ``vocab_size``, or a
            cluster has width 0.
    """

    vocab_size: int
    cutoffs: tuple[int, ...]
    width: int
    model_width: int
    divisor: int = 1
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.divisor < 1:
            raise ValueError(f"divisor={self.divisor} must be at least 1")
        if any(stop <= start for start, stop in self.ranges):
            raise ValueError(f"cutoffs={self.cutoffs} must ascend between 0 and vocab_size={self.vocab_size}")
        if self.widths[-1] < 1:
            raise ValueError(
                f"cluster {len(self.cutoffs)} would have width {self.width} / {self.divisor}^{len(self.cutoffs)} < 1: "
                "use fewer cutoffs or a smaller divisor"
            )

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """``(start, stop)`` of the ids of each cluster; ``stop`` is the id after the last."""
        edges = (0, *self.cutoffs, self.vocab_size)
        return tuple(zip(edges[:-1], edges[1:], strict=True))

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the vectors of each cluster: ``width / divisor^i``, rounded down."""
        return tuple(self.width // self.divisor**i for i in range(len(self.ranges)))

    @property
    def projected(self) -> bool:
        """Whether vectors are projected to the model's width."""
        return self.divisor > 1 or self.width != self.model_width

    @property
    def table_shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, width) of each table: one table per cluster, or one for all clusters if they have the same width."""
        if self.divisor == 1:
            return ((embedding.round_up(self.vocab_size, self.multiple), self.width),)
        sizes = (embedding.round_up(stop - start, self.multiple) for start, stop in self.ranges)
        return tuple(zip(sizes, self.widths, strict=True))


def input_specs(clusters: Clusters, init: Initializer, projection_init: Initializer) -> dict[str, Any]:
    """Specs of the parameters of :func:`embed`.

    They are ``token_embedding`` and, if the clusters need them, ``token_projection`` and ``tails``.
    """
    (first_table, *other_tables), D = clusters.table_shapes, clusters.model_width
    specs: dict[str, Any] = {"token_embedding": _table(first_table, init)}
    if clusters.projected:
        specs["token_projection"] = _projection((first_table[1], D), projection_init)
    if other_tables:
        specs["tails"] = {
            f"cluster_{i}": {
                "embedding": _table(shape, init),
                "projection": _projection((shape[1], D), projection_init),
            }
            for i, shape in enumerate(other_tables, start=1)
        }
    return specs


def head_specs(
    clusters: Clusters, init: Initializer, projection_init: Initializer, *, tie_embeddings: bool, tie_projections: bool
) -> dict[str, Any]:
    """Specs of the parameters of the softmax that are not shared with :func:`input_specs`.

    Args:
        tie_embeddings: share the tables with the input.
        tie_projections: share the projections with the input, except the projection of the first cluster.
    """
    trees: list[dict[str, Any]] = [{} for _ in clusters.ranges]
    for tree, shape in zip(trees, clusters.table_shapes, strict=False):
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


def embed(clusters: Clusters, params: Params, ids_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The embeddings of the ids, [B, T, D] in ``dtype``. An id outside the vocabulary gives NaN."""
    if clusters.divisor == 1:
        rows = embedding.embed(params["token_embedding"], ids_BT, dtype, size=clusters.vocab_size)
        return rows @ params["token_projection"].astype(dtype) if clusters.projected else rows
    ids_BT = embedding.widen_ids(ids_BT)
    x: Any = jnp.nan  # for ids that are in no cluster
    for i, (start, stop) in enumerate(clusters.ranges):
        table, projection = _input_table_and_projection(params, i)
        in_cluster = (ids_BT >= start) & (ids_BT < stop)
        rows = embedding.embed(table, jnp.where(in_cluster, ids_BT - start, 0), dtype)
        x = jnp.where(in_cluster[..., None], rows @ projection.astype(dtype), x)
    return x


def log_probabilities(clusters: Clusters, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """The log-probabilities of the whole vocabulary, [B, T, V] float32."""
    require_arrays(hidden_BTD=hidden_BTD)
    head, *tails = map(jax.nn.log_softmax, _logits_of_clusters(clusters, params, hidden_BTD))
    head_words = clusters.ranges[0][1]
    cluster_log_p = jnp.split(head[..., head_words:], len(tails), axis=-1) if tails else []
    return jnp.concatenate([head[..., :head_words], *map(jnp.add, cluster_log_p, tails)], axis=-1)


def cross_entropy(
    clusters: Clusters, params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> jax.Array:
    """``sum(weights * -log p(target))`` in nats, a float32 scalar.

    A target outside the vocabulary gives NaN, unless its weight is 0.

    To save time, the logits of each cluster after the first are computed only at the positions whose target is in the
    cluster (Grave et al. 2017, section 4). Differentiable in ``params`` and ``hidden``, not in ``weights``. With
    clusters after the first, second derivatives need forward mode over reverse mode (``jax.jvp`` of ``jax.grad``).
    """
    require_arrays(hidden_BTD=hidden_BTD, targets_BT=targets_BT, weights_BT=weights_BT)
    targets_BT = embedding.widen_ids(targets_BT)
    head, *tails = _softmax_parameters(clusters, params)
    head_words = clusters.ranges[0][1]
    is_invalid = (targets_BT < 0) | (targets_BT >= clusters.vocab_size)
    cluster_BT = jnp.where(is_invalid, -1, sum((targets_BT >= cutoff).astype(jnp.int32) for cutoff in clusters.cutoffs))
    head_targets_BT = jnp.where(cluster_BT > 0, head_words - 1 + cluster_BT, jnp.where(is_invalid, -1, targets_BT))
    total = chunked_cross_entropy(_logits, head, hidden_BTD, head_targets_BT, weights_BT)
    for i, tail in enumerate(tails, start=1):
        weights = jnp.where(cluster_BT == i, weights_BT, 0.0)
        total += selected_cross_entropy(_logits, tail, hidden_BTD, targets_BT - clusters.ranges[i][0], weights)
    return total


def _logits_of_clusters(clusters: Clusters, params: Params, hidden_BTD: jax.Array) -> list[jax.Array]:
    """The result of :func:`_logits` for each cluster.

    If all clusters share one table and have no projections, one matmul computes the logits of all words. One matmul per
    cluster would first copy the rows of the cluster from the table.
    """
    if clusters.divisor > 1 or clusters.projected:
        return [_logits(cluster_params, hidden_BTD) for cluster_params in _softmax_parameters(clusters, params)]
    head = params["head"]
    table_VD = head.get("embedding", params["token_embedding"])
    logits_BTV = _logits({"weight": table_VD, "bias": head["bias"]}, hidden_BTD)[..., : clusters.vocab_size]
    logits = jnp.split(logits_BTV, clusters.cutoffs, axis=-1)
    if clusters.cutoffs:
        cluster_logits = _logits({"weight": head["cluster_weight"], "bias": head["cluster_bias"]}, hidden_BTD)
        logits[0] = jnp.concatenate([logits[0], cluster_logits], axis=-1)
    return logits


def _logits(cluster_params: dict[str, jax.Array], hidden_BTD: jax.Array) -> jax.Array:
    """The logits of the rows of ``cluster_params["weight"]``, [B, T, rows] float32.

    There is one row for each word of the cluster. In the first cluster, one row for each of the C further clusters
    follows. ``cluster_params`` is a dict with ``weight``, ``bias`` and optionally ``projection``, as in the list that
    :func:`_softmax_parameters` returns.
    """
    projection, weight = cluster_params.get("projection"), cluster_params["weight"]
    x = hidden_BTD if projection is None else hidden_BTD @ projection.astype(hidden_BTD.dtype).T
    return embedding.unembed(weight, x, weight.shape[0]) + cluster_params["bias"].astype(jnp.float32)[None, None]


def _input_table_and_projection(params: Params, i: int) -> tuple[jax.Array, Any]:
    """The input table of cluster i and its projection (None: there is none).

    If all clusters share one table, i must be 0.
    """
    if i == 0:
        return params["token_embedding"], params.get("token_projection")
    tail = params["tails"][f"cluster_{i}"]
    return tail["embedding"], tail["projection"]


def _softmax_parameters(clusters: Clusters, params: Params) -> list[dict[str, jax.Array]]:
    """``weight``, ``bias`` and (if there is one) ``projection`` of each cluster in the softmax.

    Parameters that are not in ``params["head"]`` are tied, so they come from the input embedding. ``weight`` and
    ``bias`` of the first item have one row for each word of cluster 0, followed by one row for each further cluster.
    """
    head = params["head"]
    trees = [head if i == 0 else head.get("tails", {}).get(f"cluster_{i}", {}) for i in range(len(clusters.ranges))]
    inputs = [_input_table_and_projection(params, 0 if clusters.divisor == 1 else i) for i in range(len(trees))]
    projections = [tree.get("projection", tied) for tree, (_, tied) in zip(trees, inputs, strict=True)]
    if clusters.divisor == 1:
        # The gradient of a split is one concatenation. The gradient of slices would be a sum of zero-padded arrays.
        weights = jnp.split(head.get("embedding", inputs[0][0])[: clusters.vocab_size], clusters.cutoffs)
        biases = jnp.split(head["bias"][: clusters.vocab_size], clusters.cutoffs)
    else:
        sizes = [stop - start for start, stop in clusters.ranges]
        tables = [tree.get("embedding", tied) for tree, (tied, _) in zip(trees, inputs, strict=True)]
        weights = [table[:size] for table, size in zip(tables, sizes, strict=True)]
        biases = [tree["bias"][:size] for tree, size in zip(trees, sizes, strict=True)]
    if clusters.cutoffs:
        weights[0] = jnp.concatenate([weights[0], head["cluster_weight"]])
        biases[0] = jnp.concatenate([biases[0], head["cluster_bias"]])
    return [
        {"weight": weight, "bias": bias, **({} if projection is None else {"projection": projection})}
        for weight, bias, projection in zip(weights, biases, projections, strict=True)
    ]
