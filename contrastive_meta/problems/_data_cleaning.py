"""Data cleaning: a learned weight for every training example, some of which are mislabelled."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta._problem import BilevelProblem
from contrastive_meta.problems._classification import classification_data
from contrastive_meta.problems._exact import exact_meta_gradient
from contrastive_meta.problems._instance import ProblemInstance, SplitData, check_labels, classification_split
from contrastive_meta.problems._losses import cross_entropy

KernelAndBias = tuple[jax.Array, jax.Array]


class DataCleaningTask(NamedTuple):
    """The data of `data_cleaning`.

    Attributes:
      x_train: inputs, shape (num_train, num_features).
      y_train: labels, some of them wrong, shape (num_train,).
      x_val: inputs, shape (num_val, num_features).
      y_val: trusted labels, shape (num_val,).
      classes: 0 .. num_classes - 1; its length tells the number of classes.
      decay: fixed strength of the penalty on all parameters, a scalar.

    Example:
      >>> import jax
      >>> noisy = corrupted_data(jax.random.key(0))
      >>> task = data_cleaning(*noisy.split, num_classes=3, decay=0.5).task
      >>> task.classes.shape, float(task.decay)
      ((3,), 0.5)
    """

    x_train: jax.Array
    y_train: jax.Array
    x_val: jax.Array
    y_val: jax.Array
    classes: jax.Array
    decay: jax.Array


class CorruptedData(NamedTuple):
    """Data with wrong labels among those to learn from.

    Attributes:
      split: the data, to be unpacked into `data_cleaning`; the validation labels are right.
      corrupted: which training labels are wrong, bool, shape (num_train,).

    Example:
      >>> import jax
      >>> split, corrupted = corrupted_data(jax.random.key(0))
      >>> split.y_train.shape, corrupted.shape
      ((60,), (60,))
    """

    split: SplitData
    corrupted: jax.Array


def data_cleaning(
    x_train: Any, y_train: Any, x_val: Any, y_val: Any, num_classes: int, decay: float = 1e-2
) -> ProblemInstance:
    """Softmax regression on weighted examples; the weights are learned on trusted data.

        L_in  = mean_i sigmoid(meta_params_i) cross-entropy_i (train) + 1/2 decay sum params^2     (biases included)
        L_out = mean cross-entropy (validation)

    The mean over training examples divides by their number, not by the sum of the weights. Holomorphic; safe while
    logits and meta-parameters stay within +-80 in float32 and +-700 in float64. `exact` is dense Newton and the
    implicit function theorem (`exact_meta_gradient`).

    Args:
      x_train: inputs, shape (num_train, num_features), floating, numpy or JAX; its dtype is the problem's.
      y_train: integer labels from 0, some of them wrong, shape (num_train,).
      x_val: shape (num_val, num_features).
      y_val: trusted labels, shape (num_val,).
      num_classes: number of classes.
      decay: fixed strength of the penalty; positive, so that the inner loss is strongly convex.

    Returns:
      params are (kernel, bias) of shapes (num_features, num_classes) and (num_classes,); meta_params are logits of
      the examples' weights, shape (num_train,), and start at 0: weight 1/2.

    Raises:
      ValueError: shapes that do not fit together, labels outside the classes, or a decay that is not positive.
      TypeError: inputs that are not floating or labels that are not integers.

    Reference:
      Franceschi et al. 2017, "Forward and reverse gradient-based hyperparameter optimization", section 5.1.

    Example:
      >>> import jax
      >>> noisy = corrupted_data(jax.random.key(0))
      >>> data_cleaning(*noisy.split, num_classes=3).meta_params.shape
      (60,)
    """
    if not decay > 0:
        raise ValueError(f"`decay` must be positive, or the inner loss has no unique minimum; got {decay}.")
    data = classification_split(x_train, y_train, x_val, y_val, num_classes)
    dtype = data.x_train.dtype
    task = DataCleaningTask(*data, classes=jnp.arange(num_classes), decay=jnp.asarray(decay, dtype))
    problem = BilevelProblem(_inner_loss, _outer_loss, _init_params)
    meta_params = jnp.zeros(data.y_train.shape, dtype)
    return ProblemInstance(problem, meta_params, task, partial(exact_meta_gradient, problem))


def corrupt_labels(key: jax.Array, labels: Any, num_classes: int, fraction: float) -> jax.Array:
    """Labels of which a given fraction, drawn without replacement, is moved to another class, drawn uniformly.

    Args:
      key: PRNG key.
      labels: integers from 0, shape (num,).
      num_classes: number of classes.
      fraction: how many, from 0 to 1; `round(fraction * num)` labels change, each to a different class.

    Returns:
      The labels, same shape and dtype; the wrong ones are those that differ from `labels`.

    Raises:
      ValueError: a fraction outside 0 .. 1, labels outside the classes, or labels that are not one-dimensional.
      TypeError: labels that are not integers.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> labels = jnp.zeros(10, int)
      >>> int(jnp.sum(corrupt_labels(jax.random.key(0), labels, num_classes=3, fraction=0.4) != labels))
      4
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"`fraction` must lie between 0 and 1; got {fraction}.")
    right = check_labels("labels", labels, num_classes)
    if right.ndim != 1:
        raise ValueError(f"`labels` must have shape (num,); got {right.shape}.")
    key_which, key_where = jax.random.split(key)
    chosen = jax.random.permutation(key_which, right.shape[0]) < round(fraction * right.shape[0])
    # A shift by 1 .. num_classes - 1 around the circle of classes reaches every other class and never the same one.
    shift = jax.random.randint(key_where, right.shape, 1, num_classes, dtype=right.dtype)
    return jnp.where(chosen, (right + shift) % num_classes, right)


def corrupted_data(
    key: jax.Array,
    num_train: int = 60,
    num_val: int = 60,
    num_features: int = 10,
    num_classes: int = 3,
    fraction: float = 0.5,
    separation: float = 2.0,
    dtype: Any = None,
) -> CorruptedData:
    """`classification_data` with a fraction of the training labels moved to another class.

    Args:
      key: PRNG key.
      num_train: number of examples to learn from.
      num_val: number of trusted examples.
      num_features: number of inputs.
      num_classes: number of classes.
      fraction: of training labels that are wrong.
      separation: root mean square distance of a class's centre from the origin.
      dtype: of the inputs; None for JAX's default.

    Returns:
      The data and which labels are wrong.

    Example:
      >>> import jax
      >>> int(corrupted_data(jax.random.key(0), fraction=0.25).corrupted.sum())
      15
    """
    key_data, key_labels = jax.random.split(key)
    clean = classification_data(key_data, num_train, num_val, num_features, num_classes, separation, dtype)
    labels = corrupt_labels(key_labels, clean.y_train, num_classes, fraction)
    return CorruptedData(clean._replace(y_train=labels), labels != clean.y_train)


def _inner_loss(params: KernelAndBias, meta_params: jax.Array, task: DataCleaningTask) -> jax.Array:
    kernel, bias = params
    losses = cross_entropy(task.x_train @ kernel + bias, task.y_train)
    decay = task.decay * (jnp.sum(jnp.square(kernel)) + jnp.sum(jnp.square(bias))) / 2
    return jnp.mean(jax.nn.sigmoid(meta_params) * losses) + decay


def _outer_loss(params: KernelAndBias, meta_params: jax.Array, task: DataCleaningTask) -> jax.Array:
    kernel, bias = params
    return jnp.mean(cross_entropy(task.x_val @ kernel + bias, task.y_val))


def _init_params(meta_params: jax.Array, task: DataCleaningTask) -> KernelAndBias:
    num_features, num_classes, dtype = task.x_train.shape[1], task.classes.shape[0], task.x_train.dtype
    return jnp.zeros((num_features, num_classes), dtype), jnp.zeros((num_classes,), dtype)
