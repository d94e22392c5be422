"""Classification: each row has one label, which is predicted from the pooled output of the row (``Model.pool``).

Shapes: B batch, T time, D' width of the pooled output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.models import Model, common
from jaxlm.nn.loss import chunked_cross_entropy
from jaxlm.objectives.batch import Batch, Loss, hidden_states
from jaxlm.spec import Params, State, require_arrays

IGNORED_LABEL = -100
"""The label of ignored targets, as in ``transformers`` and torch."""


def batch(
    tokens: np.ndarray,
    labels: np.ndarray,
    segment_ids: np.ndarray | None = None,
    *,
    num_labels: int,
    inputs: dict[str, Any] | None = None,
) -> Batch:
    """A batch of tokens [B, T] with one label per row, [B]. A row with the label ``IGNORED_LABEL`` has weight 0.

    Args:
        num_labels: number of labels. Labels are in [0, num_labels).
        inputs: further keyword arguments of ``apply``, such as ``token_types``.

    Raises:
        ValueError: the shapes do not match, tokens or labels are not integers, or a label is out of range.
        TypeError: an argument is not an array.
    """
    common.check_tokens(tokens, segment_ids, None, None)
    require_arrays(labels=labels)
    if labels.shape != tokens.shape[:1]:
        raise ValueError(f"labels {list(labels.shape)} must have one label for each row of tokens {list(tokens.shape)}")
    targets, weights = targets_and_weights(labels, num_labels)
    return Batch(tokens, targets, weights, segment_ids, dict(inputs or {}))


def targets_and_weights(
    labels: np.ndarray, num_labels: int, segment_ids: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The targets (int32) and weights (float32) for labels of any shape. Ignored labels give target 0 and weight 0.

    ``IGNORED_LABEL`` and the labels of padding are ignored.

    Args:
        segment_ids: 0 for padding, with the shape of ``labels``. None: there is no padding.

    Raises:
        ValueError: labels are not integers, or a label that is not ignored is outside [0, num_labels).
    """
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    is_ignored = labels == IGNORED_LABEL
    if segment_ids is not None:
        is_ignored |= np.asarray(segment_ids) <= 0
    wrong = np.unique(labels[~is_ignored & ((labels < 0) | (labels >= num_labels))])
    if wrong.size:
        raise ValueError(
            f"label {wrong[0]} is not in [0, num_labels={num_labels}); use {IGNORED_LABEL} for ignored targets"
        )
    return np.where(is_ignored, 0, labels).astype(np.int32), (~is_ignored).astype(np.float32)


def check_problem_type(model: Model) -> None:
    """Raise ``ValueError`` if the ``config.json`` of the model has a problem type other than one label per text.

    The other types are several labels per text and regression. ``save_pretrained`` keeps ``problem_type``. So a program
    that loads the trained model would apply no softmax to its logits.
    """
    problem = model.problem_type
    if problem not in (None, "single_label_classification"):
        raise ValueError(
            f"config.json of the model has problem_type={problem!r}, but this objective needs exactly one label per "
            'text: write "problem_type": "single_label_classification" to config.json, or load the model with another '
            "num_labels, which makes a new head"
        )


def pooled_states(
    model: Model, params: Params, batch: Batch, key: jax.Array | None, state: State | None
) -> tuple[jax.Array, Any]:
    """The input of the classifier for each row, [B, 1, D'], and the new model state."""
    hidden, state = hidden_states(model, params, batch, key, state)
    return model.pool(params, hidden, segment_ids=batch.segment_ids, key=key), state


def make_loss(*, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> Loss:
    """Make a loss function with label smoothing and class weights.

    Args:
        label_smoothing: fraction of the target probability that is spread over all labels (Szegedy et al. 2016,
            section 7).
        class_weights: one weight per label. The weight of a row is multiplied by the weight of its label, in both
            ``total`` and ``weight``. Without label smoothing, this equals ``weight`` of ``torch.nn.CrossEntropyLoss``.
            None: equal weights.

    Raises:
        ValueError: ``label_smoothing`` is outside [0, 1), or a class weight is not positive and finite. The loss
            function also raises it if the number of class weights is not the number of labels of the model, or if
            :func:`check_problem_type` rejects the model.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
    if class_weights is not None and not all(0.0 < weight < math.inf for weight in class_weights):
        raise ValueError(f"class_weights={tuple(class_weights)} must be positive and finite")

    def loss(
        model: Model, params: Params, batch: Batch, *, key: jax.Array | None = None, state: State | None = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """The weighted sum of the negative log-likelihoods in nats, the sum of the weights, and the new model state."""
        check_problem_type(model)
        pooled_B1D, state = pooled_states(model, params, batch, key, state)
        weights = batch.weights
        if class_weights is not None:
            if len(class_weights) != model.config.num_labels:
                raise ValueError(f"{len(class_weights)} class_weights for num_labels={model.config.num_labels}")
            weights = weights * jnp.asarray(class_weights, jnp.float32)[batch.targets]
        total = chunked_cross_entropy(
            model.logits, params, pooled_B1D, batch.targets[:, None], weights[:, None], label_smoothing=label_smoothing
        )
        return total, jnp.sum(weights), state

    return loss


loss = make_loss()


def accuracy(
    model: Model, params: Params, batch: Batch, *, key: jax.Array | None = None, state: State | None = None
) -> tuple[jax.Array, jax.Array, Any]:
    """The weighted number of rows whose label has the highest logit, the sum of the weights, and the new model state.

    This function is an evaluation metric with the signature of a loss. The accuracy is the first result divided by the
    second.
    """
    pooled_B1D, state = pooled_states(model, params, batch, key, state)
    is_correct = jnp.argmax(model.logits(params, pooled_B1D)[:, 0], axis=-1) == batch.targets
    return jnp.sum(jnp.where(is_correct, batch.weights, 0.0)), jnp.sum(batch.weights), state
