"""Ridge regression with a learned strength per weight, or one for all: a closed form on real data."""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._problem import BilevelProblem
from contrastive_meta.problems._exact import vouch
from contrastive_meta.problems._instance import ExactMetaGradient, ProblemInstance, SplitData, regression_split
from contrastive_meta.problems._losses import penalty


def ridge(
    x_train: Any, y_train: Any, x_val: Any, y_val: Any, shared: bool = False, strength: float = 0.1
) -> ProblemInstance:
    """Linear regression whose penalty is learned on validation data.

        L_in  = 1/2 mean (x_train w - y_train)^2 + 1/2 sum_i exp(log_strength_i) w_i^2
        L_out = 1/2 mean (x_val w - y_val)^2

    Means over examples, a sum over weights. Holomorphic everywhere. No intercept: centre the targets, or add a
    column of ones. The meta-gradient is a closed form through a dense solve.

    Args:
      x_train: inputs, shape (num_train, num_features), floating, numpy or JAX; its dtype is the problem's.
      y_train: targets, shape (num_train,).
      x_val: shape (num_val, num_features).
      y_val: shape (num_val,).
      shared: one strength for all weights instead of one each.
      strength: where the strengths start.

    Returns:
      params of shape (num_features,); meta_params the log-strengths, of shape (num_features,) or, shared, ().

    Raises:
      ValueError: shapes that do not fit together.
      TypeError: arrays that are not floating.

    Example:
      >>> import jax
      >>> problem, meta_params, task, exact = ridge(*ridge_data(jax.random.key(0)), shared=True)
      >>> exact(meta_params, task).grad.shape
      ()
    """
    data = regression_split(x_train, y_train, x_val, y_val)
    shape = () if shared else data.x_train.shape[1:]
    log_strength = jnp.full(shape, jnp.log(strength), data.x_train.dtype)
    return ProblemInstance(BilevelProblem(_inner_loss, _outer_loss, _init_params), log_strength, data, _closed_form)


def ridge_data(
    key: jax.Array,
    num_train: int = 40,
    num_val: int = 40,
    num_features: int = 20,
    num_relevant: int = 5,
    noise: float = 1.0,
    dtype: Any = None,
) -> SplitData:
    """Regression data in which only the first features matter, so that strengths should differ by weight.

    Args:
      key: PRNG key.
      num_train: number of examples to learn from.
      num_val: number of examples to judge by.
      num_features: number of inputs, standard normal.
      num_relevant: how many of them, from the first on, enter the target (with standard normal weights).
      noise: standard deviation of what is added to the targets.
      dtype: of every array; None for JAX's default.

    Returns:
      A `SplitData`, to be unpacked into `ridge`.

    Example:
      >>> import jax
      >>> ridge_data(jax.random.key(0), num_train=60, num_val=20).x_train.shape
      (60, 20)
    """
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    key_x, key_w, key_noise = jax.random.split(key, 3)
    num = num_train + num_val
    x = jax.random.normal(key_x, (num, num_features), dtype)
    relevant = jnp.arange(num_features) < num_relevant
    weights = jnp.where(relevant, jax.random.normal(key_w, (num_features,), dtype), jnp.zeros((), dtype))
    y = x @ weights + jnp.asarray(noise, dtype) * jax.random.normal(key_noise, (num,), dtype)
    return SplitData(x[:num_train], y[:num_train], x[num_train:], y[num_train:])


def _inner_loss(params: jax.Array, meta_params: jax.Array, task: SplitData) -> jax.Array:
    return jnp.mean(jnp.square(task.x_train @ params - task.y_train)) / 2 + penalty(meta_params, params)


def _outer_loss(params: jax.Array, meta_params: jax.Array, task: SplitData) -> jax.Array:
    return jnp.mean(jnp.square(task.x_val @ params - task.y_val)) / 2


def _init_params(meta_params: jax.Array, task: SplitData) -> jax.Array:
    return jnp.zeros(task.x_train.shape[1:], task.x_train.dtype)


def _closed_form(meta_params: jax.Array, task: SplitData) -> ExactMetaGradient:
    """Solve w = H^-1 X'y / n with H = X'X / n + diag(exp(s)); d/ds_i = -exp(s_i) w_i (H^-1 v)_i."""
    with jax.default_matmul_precision("highest"):
        num_train, num_features = task.x_train.shape
        strength = jnp.broadcast_to(jnp.exp(meta_params), (num_features,))
        hessian = task.x_train.T @ task.x_train / num_train + jnp.diag(strength)
        force = task.x_train.T @ task.y_train / num_train
        params = jnp.linalg.solve(hessian, force)
        outer_in_params = task.x_val.T @ (task.x_val @ params - task.y_val) / task.x_val.shape[0]
        per_weight = -strength * params * jnp.linalg.solve(hessian, outer_in_params)
        grad = jnp.sum(per_weight) if meta_params.ndim == 0 else per_weight
        outer_loss = _outer_loss(params, meta_params, task)
        return vouch(grad, outer_loss, params, hessian @ params - force, hessian)
