"""Logistic and softmax regression with a learned strength per weight."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._problem import BilevelProblem, MetaParams, Params
from contrastive_meta._pytree import zeros_like
from contrastive_meta.problems._exact import exact_meta_gradient
from contrastive_meta.problems._instance import ProblemInstance, SplitData, classification_split
from contrastive_meta.problems._losses import Linear, binary_cross_entropy, cross_entropy, penalty


def logistic_regression(x_train: Any, y_train: Any, x_val: Any, y_val: Any, strength: float = 0.1) -> ProblemInstance:
    """Binary classification whose per-weight penalties are learned on validation data.

        L_in  = mean cross-entropy (train) + 1/2 sum_i exp(log_strength_i) params_i^2     (the bias included)
        L_out = mean cross-entropy (validation)

    Means over examples, a sum over weights. Holomorphic; safe while margins stay above -80 in float32 and -700 in
    float64. `exact` is dense Newton and the implicit function theorem (`exact_meta_gradient`).

    Args:
      x_train: inputs, shape (num_train, num_features), floating, numpy or JAX; its dtype is the problem's.
      y_train: labels 0 or 1, integers, shape (num_train,).
      x_val: shape (num_val, num_features).
      y_val: shape (num_val,).
      strength: where the strengths start.

    Returns:
      params and meta_params (log-strengths) are both NamedTuples `(kernel, bias)` of shapes (num_features,) and ().

    Raises:
      ValueError: shapes that do not fit together, or labels other than 0 and 1.
      TypeError: inputs that are not floating or labels that are not integers.

    Example:
      >>> import jax
      >>> data = classification_data(jax.random.key(0), num_classes=2)
      >>> logistic_regression(*data).meta_params.kernel.shape
      (10,)
    """
    data = classification_split(x_train, y_train, x_val, y_val, num_classes=2)
    dtype = data.x_train.dtype
    start = jnp.log(jnp.asarray(strength, dtype))
    log_strengths = Linear(kernel=jnp.full(data.x_train.shape[1:], start, dtype), bias=start)
    problem = BilevelProblem(_logistic_inner, _logistic_outer, _init_params)
    return ProblemInstance(problem, log_strengths, data, partial(exact_meta_gradient, problem))


def softmax_regression(
    x_train: Any, y_train: Any, x_val: Any, y_val: Any, num_classes: int, strength: float = 0.1
) -> ProblemInstance:
    """Classification into several classes whose per-weight penalties are learned on validation data.

        L_in  = mean cross-entropy (train) + 1/2 sum_i exp(log_strength_i) params_i^2     (biases included)
        L_out = mean cross-entropy (validation)

    Means over examples, a sum over weights. Holomorphic; safe while logits stay within +-80 in float32 and +-700 in
    float64. `exact` is dense Newton and the implicit function theorem (`exact_meta_gradient`).

    Args:
      x_train: inputs, shape (num_train, num_features), floating, numpy or JAX; its dtype is the problem's.
      y_train: integer labels from 0, shape (num_train,).
      x_val: shape (num_val, num_features).
      y_val: shape (num_val,).
      num_classes: number of classes.
      strength: where the strengths start.

    Returns:
      params and meta_params (log-strengths) are both {"kernel": (num_features, num_classes), "bias": (num_classes,)}.

    Raises:
      ValueError: shapes that do not fit together, or labels outside the classes.
      TypeError: inputs that are not floating or labels that are not integers.

    Example:
      >>> import jax
      >>> data = classification_data(jax.random.key(0))
      >>> softmax_regression(*data, num_classes=3).meta_params["kernel"].shape
      (10, 3)
    """
    data = classification_split(x_train, y_train, x_val, y_val, num_classes)
    num_features, dtype = data.x_train.shape[1], data.x_train.dtype
    start = jnp.log(jnp.asarray(strength, dtype))
    log_strengths = {
        "kernel": jnp.full((num_features, num_classes), start, dtype),
        "bias": jnp.full((num_classes,), start, dtype),
    }
    problem = BilevelProblem(_softmax_inner, _softmax_outer, _init_params)
    return ProblemInstance(problem, log_strengths, data, partial(exact_meta_gradient, problem))


def classification_data(
    key: jax.Array,
    num_train: int = 60,
    num_val: int = 60,
    num_features: int = 10,
    num_classes: int = 3,
    separation: float = 2.0,
    dtype: Any = None,
) -> SplitData:
    """Overlapping Gaussian classes, of which the first half of the features tells something.

    Args:
      key: PRNG key.
      num_train: number of examples to learn from.
      num_val: number of examples to judge by.
      num_features: number of inputs; within a class they are independent and have unit variance.
      num_classes: number of classes, drawn uniformly.
      separation: root mean square distance of a class's centre from the origin.
      dtype: of the inputs; None for JAX's default.

    Returns:
      A `SplitData` with integer labels.

    Example:
      >>> import jax
      >>> classification_data(jax.random.key(0), num_train=40, num_val=80).x_train.shape
      (40, 10)
    """
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    key_labels, key_centres, key_noise = jax.random.split(key, 3)
    num, num_told = num_train + num_val, (num_features + 1) // 2
    labels = jax.random.randint(key_labels, (num,), 0, num_classes)
    centres = jax.random.normal(key_centres, (num_classes, num_told), dtype) * (separation / num_told**0.5)
    centres = jnp.pad(centres, ((0, 0), (0, num_features - num_told)))
    x = centres[labels] + jax.random.normal(key_noise, (num, num_features), dtype)
    return SplitData(x[:num_train], labels[:num_train], x[num_train:], labels[num_train:])


def _logistic_inner(params: Linear, meta_params: Linear, task: SplitData) -> jax.Array:
    logits = task.x_train @ params.kernel + params.bias
    return jnp.mean(binary_cross_entropy(logits, task.y_train)) + penalty(meta_params, params)


def _logistic_outer(params: Linear, meta_params: Linear, task: SplitData) -> jax.Array:
    return jnp.mean(binary_cross_entropy(task.x_val @ params.kernel + params.bias, task.y_val))


def _softmax_inner(params: Params, meta_params: MetaParams, task: SplitData) -> jax.Array:
    logits = task.x_train @ params["kernel"] + params["bias"]
    return jnp.mean(cross_entropy(logits, task.y_train)) + penalty(meta_params, params)


def _softmax_outer(params: Params, meta_params: MetaParams, task: SplitData) -> jax.Array:
    return jnp.mean(cross_entropy(task.x_val @ params["kernel"] + params["bias"], task.y_val))


def _init_params(meta_params: MetaParams, task: SplitData) -> Params:
    return zeros_like(meta_params)
