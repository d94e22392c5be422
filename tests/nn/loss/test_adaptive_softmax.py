"""Tests of adaptive softmax and adaptive input against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import spec
from jaxlm.nn import choices
from jaxlm.nn.loss import adaptive_softmax
from jaxlm.nn.loss.adaptive_softmax import Clusters
from jaxlm.spec import Normal
from jaxlm.testing.helpers import add_noise, assert_trees_close, initial_values, relative_error

CLUSTERS = {
    "one table": Clusters(20, (6, 11), 8, 8),
    "one projected table": Clusters(20, (6, 11), 4, 8),
    "narrower tails": Clusters(20, (6, 11), 8, 8, 2),
    "no clusters": Clusters(20, (), 8, 8),
    "one padded table": Clusters(20, (6, 11), 8, 8, multiple=8),
    "padded tables": Clusters(20, (6, 11), 8, 8, 2, multiple=4),
}
all_clusters = pytest.mark.parametrize("case", CLUSTERS)


def specs(clusters, **ties):
    ties = {"tie_embeddings": True, "tie_projections": True, **ties}
    normal = Normal(0.5)
    tree = adaptive_softmax.input_specs(clusters, normal, normal)
    return {**tree, "head": adaptive_softmax.head_specs(clusters, normal, normal, **ties)}


def parameters(clusters, **ties):
    return add_noise(initial_values(specs(clusters, **ties)))


log_probabilities = jax.jit(adaptive_softmax.log_probabilities, static_argnums=0)


def softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def numpy_probabilities(clusters, params, h):
    """The probabilities of all words, computed cluster by cluster. The module's docstring lists the parameters."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    head, result, edges = params["head"], [], (0, *clusters.cutoffs, clusters.vocab_size)
    for i, (start, stop) in enumerate(zip(edges[:-1], edges[1:])):
        cluster_params = head if i == 0 else head.get("tails", {}).get(f"cluster_{i}", {})
        if i == 0 or clusters.divisor == 1:
            table, projection = params["token_embedding"], params.get("token_projection")
        else:
            table, projection = (params["tails"][f"cluster_{i}"][name] for name in ("embedding", "projection"))
        table, bias = (cluster_params.get("embedding", table), cluster_params.get("bias", head["bias"]))
        if clusters.divisor == 1:
            table, bias = head.get("embedding", table)[start:stop], bias[start:stop]
        table, bias = table[: stop - start], bias[: stop - start]
        projection = cluster_params.get("projection", projection)
        x = h if projection is None else h @ projection.T
        scores = x @ table.T + bias
        if i == 0 and clusters.cutoffs:
            scores = np.concatenate([scores, x @ head["cluster_weight"].T + head["cluster_bias"]], axis=-1)
        p = softmax(scores)
        if i == 0:
            p, cluster_p = p[..., :stop], p[..., stop:]
        else:
            p = p * cluster_p[..., i - 1 : i]
        result.append(p)
    return np.concatenate(result, axis=-1)


@pytest.mark.plain_cases(2)
@all_clusters
@pytest.mark.parametrize("ties", [{}, {"tie_embeddings": False, "tie_projections": False}])
def test_log_probabilities_equal_numpy_and_sum_to_one(case, ties):
    clusters = CLUSTERS[case]
    params = parameters(clusters, **ties)
    hidden = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    log_p = log_probabilities(clusters, params, hidden)
    assert log_p.dtype == jnp.float32
    assert relative_error(np.exp(log_p), numpy_probabilities(clusters, params, hidden)) < 1e-5
    assert relative_error(np.exp(log_p).sum(-1), np.ones((2, 3))) < 1e-5


def test_the_log_probabilities_of_a_few_rows_do_not_copy_parts_of_the_table():
    """As in decoding. One matmul computes the logits of all clusters."""
    clusters = Clusters(2000, (500, 1200), 256, 256)
    hidden = jax.ShapeDtypeStruct((4, 1, 256), jnp.float32)
    compiled = log_probabilities.lower(clusters, spec.abstract(specs(clusters)), hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2000 * 256 / 4


def test_the_bias_of_a_cluster_acts_on_its_own_words():
    """Tests the order of the cluster entries in the head, which differs between published implementations."""
    clusters = CLUSTERS["narrower tails"]
    params = parameters(clusters)
    for i, (start, stop) in enumerate(clusters.ranges[1:]):
        params["head"]["cluster_bias"] = jnp.zeros(2).at[i].set(50.0)
        p = np.exp(log_probabilities(clusters, params, np.ones((1, 1, 8), np.float32)))[0, 0]
        assert p[start:stop].sum() > 0.99


@all_clusters
def test_input_embeddings_equal_numpy(case):
    clusters = CLUSTERS[case]
    params = parameters(clusters)
    ids = np.array([[0, 5, 6, 10], [11, 19, 20, -1]])
    x = jax.jit(lambda params: adaptive_softmax.embed(clusters, params, ids, jnp.float32))(params)
    x = np.asarray(x)
    for row, token in np.ndenumerate(ids):
        if not 0 <= token < 20:
            assert np.isnan(x[row]).all()
            continue
        i = int(np.searchsorted(clusters.cutoffs, token, side="right")) if clusters.divisor > 1 else 0
        tail = params["tails"][f"cluster_{i}"] if i else None
        table = tail["embedding"] if tail else params["token_embedding"]
        projection = tail["projection"] if tail else params.get("token_projection", np.eye(8))
        want = np.asarray(table)[token - (clusters.ranges[i][0] if tail else 0)] @ np.asarray(projection)
        assert relative_error(x[row], want) < 1e-6


def test_gradients_reach_every_parameter_from_every_cluster():
    clusters = CLUSTERS["narrower tails"]
    params = parameters(clusters)
    ids = jnp.asarray([[1, 7, 15]])

    def loss(params):
        hidden = adaptive_softmax.embed(clusters, params, ids, jnp.float32)
        log_p = adaptive_softmax.log_probabilities(clusters, params, hidden)
        return -jnp.sum(jnp.take_along_axis(log_p, ids[..., None], axis=-1))

    for path, gradient in spec.flatten(jax.jit(jax.grad(loss))(params)).items():
        assert np.isfinite(np.asarray(gradient)).all(), path
        assert np.abs(gradient).max() > 0.0, path


def test_tied_weights_have_no_separate_parameters():
    clusters = CLUSTERS["narrower tails"]
    tied, untied = ({*spec.flatten(specs(clusters, tie_embeddings=t, tie_projections=t))} for t in (True, False))
    assert tied < untied
    assert untied - tied == {
        "head/embedding",
        *(f"head/tails/cluster_{i}/{name}" for i in (1, 2) for name in ("embedding", "projection")),
    }
    assert "head/projection" in tied  # the projection of the first cluster is never tied


@pytest.mark.parametrize("cutoffs", [(6, 6), (11, 6), (0, 6), (20,)])
def test_cutoffs_that_do_not_ascend_are_an_error(cutoffs):
    with pytest.raises(ValueError, match="must ascend between 0 and vocab_size=20"):
        Clusters(20, cutoffs, 8, 8)


def test_a_divisor_of_zero_is_an_error():
    with pytest.raises(ValueError, match="divisor=0 must be at least 1"):
        Clusters(20, (6,), 8, 8, divisor=0)


def test_a_cluster_without_width_is_an_error():
    with pytest.raises(ValueError, match=r"cluster 2 would have width 8 / 4\^2 < 1"):
        Clusters(20, (6, 11), 8, 8, 4)


@pytest.mark.plain_cases(1)
@all_clusters
@pytest.mark.parametrize("ties", [{}, {"tie_embeddings": False, "tie_projections": False}])
def test_the_loss_and_its_gradients_equal_those_from_log_probabilities(case, ties, monkeypatch):
    monkeypatch.setattr(choices, "MIN_LOSS_BLOCK_ROWS", {"cpu": 2})  # several blocks
    clusters, rng = CLUSTERS[case], np.random.default_rng(1)
    params, hidden = parameters(clusters, **ties), rng.normal(size=(3, 11, 8)).astype(np.float32)
    weights = rng.integers(0, 3, (3, 11)).astype(np.float32) * 0.7

    def dense(params, hidden, targets, weights):
        log_p = adaptive_softmax.log_probabilities(clusters, params, hidden)
        return -jnp.sum(jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0] * weights)

    def run(function, targets):
        def loss(params, hidden):
            return 2.5 * function(params, hidden, targets, weights)

        return jax.value_and_grad(loss, (0, 1))(params, hidden)

    run = jax.jit(run, static_argnums=0)
    adaptive = functools.partial(adaptive_softmax.cross_entropy, clusters)
    adaptive_loss = jax.jit(adaptive)
    # Every cluster has some targets; one cluster has all targets; or some clusters have none.
    for targets in (rng.integers(0, 20, (3, 11)), rng.integers(11, 20, (3, 11)), rng.integers(0, 6, (3, 11))):
        want = run(dense, targets)
        assert_trees_close(run(adaptive, targets), want, 3e-6)
        assert relative_error(adaptive_loss(params, hidden, targets, weights), want[0] / 2.5) < 1e-6


def test_a_target_outside_the_vocabulary_gives_nan_unless_its_weight_is_zero():
    clusters = CLUSTERS["one table"]
    params, hidden = parameters(clusters), np.ones((1, 3, 8), np.float32)
    run = jax.jit(functools.partial(adaptive_softmax.cross_entropy, clusters))
    for bad in (20, 25, -1):
        targets = np.array([[3, bad, 15]])
        assert np.isnan(run(params, hidden, targets, np.ones((1, 3), np.float32)))
        assert np.isfinite(run(params, hidden, targets, np.array([[1.0, 0.0, 1.0]], np.float32)))
