"""What every problem constructor returns, and the data it is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task


class ExactMetaGradient(NamedTuple):
    """A meta-gradient from a dense solve, theory (4), with what vouches for it.

    Attributes:
      grad: dPhi/dtheta, a pytree like `meta_params`, the direct term included.
      outer_loss: outer loss at `params`.
      params: the inner minimiser.
      residual: norm of the inner loss's gradient in `params`; rounding alone where the solve succeeded.
      min_eigenvalue: smallest eigenvalue of the inner loss's Hessian at `params`; positive at a strict minimum.
      converged: whether all of it is finite, the Hessian is positive definite and what remains to the minimum is
        rounding. Where it is False the other fields say how far it came: `grad` is then not the meta-gradient.

    Example:
      >>> import jax
      >>> from contrastive_meta.problems import quadratic
      >>> problem, meta_params, task, exact = quadratic(jax.random.key(0), condition_number=10.0)
      >>> answer = exact(meta_params, task)
      >>> bool(answer.converged), round(float(answer.min_eigenvalue), 3)
      (True, 0.1)
    """

    grad: MetaParams
    outer_loss: jax.Array
    params: Params
    residual: jax.Array
    min_eigenvalue: jax.Array
    converged: jax.Array


class ProblemInstance(NamedTuple):
    """A bilevel problem with the arguments that go into its losses.

    Attributes:
      problem: the losses and the start of learning; module-level functions, so that two instances of one family
        share their compilations.
      meta_params: where meta-learning starts.
      task: the data. `sinusoids` alone returns a batch of tasks, with a leading axis.
      exact: `(meta_params, task) -> ExactMetaGradient` for one task, in closed form or by `exact_meta_gradient`;
        None where the inner loss is not convex, because the gradient then belongs to one of several minima:
        name it with `exact_meta_gradient(problem, meta_params, task, near=params)`.

    Example:
      >>> import jax
      >>> from contrastive_meta.problems import ridge, ridge_data
      >>> problem, meta_params, task, exact = ridge(*ridge_data(jax.random.key(0)))
      >>> bool(exact(meta_params, task).converged)
      True
    """

    problem: BilevelProblem
    meta_params: MetaParams
    task: Task
    exact: Callable[..., ExactMetaGradient] | None


class SplitData(NamedTuple):
    """Data to learn from and data to judge by.

    Attributes:
      x_train: inputs, shape (num_train, num_features).
      y_train: targets (floating) or class labels (integers from 0), shape (num_train,).
      x_val: inputs, shape (num_val, num_features).
      y_val: targets or labels, shape (num_val,).

    Example:
      >>> from contrastive_meta.problems import SplitData, ridge
      >>> import numpy as np
      >>> data = SplitData(np.eye(3), np.ones(3), np.eye(3), np.zeros(3))
      >>> ridge(*data).meta_params.shape
      (3,)
    """

    x_train: jax.Array
    y_train: jax.Array
    x_val: jax.Array
    y_val: jax.Array


def regression_split(x_train: Any, y_train: Any, x_val: Any, y_val: Any) -> SplitData:
    """The arrays in their common floating dtype, checked to fit together.

    Raises:
      ValueError: the shapes do not fit.
      TypeError: inputs or targets are not floating.
    """
    arrays = [jnp.asarray(array) for array in (x_train, y_train, x_val, y_val)]
    for name, array in zip(SplitData._fields, arrays, strict=True):
        _check_floating(name, array)
    dtype = jnp.result_type(*arrays)
    data = SplitData(*(array.astype(dtype) for array in arrays))
    _check_shapes(data)
    return data


def classification_split(x_train: Any, y_train: Any, x_val: Any, y_val: Any, num_classes: int) -> SplitData:
    """The inputs in their common floating dtype and the labels as integers, checked to fit together.

    Raises:
      ValueError: the shapes do not fit, or a (concrete) label lies outside 0 .. num_classes - 1.
      TypeError: inputs are not floating or labels not integers.
    """
    inputs = [jnp.asarray(x_train), jnp.asarray(x_val)]
    for name, array in zip(("x_train", "x_val"), inputs, strict=True):
        _check_floating(name, array)
    dtype = jnp.result_type(*inputs)
    labels = [check_labels(name, y, num_classes) for name, y in (("y_train", y_train), ("y_val", y_val))]
    data = SplitData(inputs[0].astype(dtype), labels[0], inputs[1].astype(dtype), labels[1])
    _check_shapes(data)
    return data


def check_labels(name: str, labels: Any, num_classes: int) -> jax.Array:
    """`labels` as an integer array of class numbers.

    Raises:
      ValueError: fewer than two classes, or a (concrete) label outside 0 .. num_classes - 1.
      TypeError: labels are not integers.
    """
    if num_classes < 2:
        raise ValueError(f"`num_classes` must be at least 2; got {num_classes}.")
    array = jnp.asarray(labels)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"`{name}` must hold integer class labels; got dtype {array.dtype}. Use `.astype(int)`.")
    if not isinstance(array, jax.core.Tracer) and array.size:
        values = np.asarray(array)
        if values.min() < 0 or values.max() >= num_classes:
            raise ValueError(
                f"`{name}` must hold labels from 0 to {num_classes - 1}; got {values.min()} to {values.max()}. "
                "Renumber the classes or pass the right `num_classes`."
            )
    return array


def _check_floating(name: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be real and floating; got dtype {array.dtype}. Use `.astype(float)`.")


def _check_shapes(data: SplitData) -> None:
    x_shape, y_shape = jnp.shape(data.x_train), jnp.shape(data.y_train)
    fits = len(x_shape) == 2 and data.x_val.ndim == 2 and x_shape[1] == data.x_val.shape[1]
    paired = y_shape == x_shape[:1] and data.y_val.shape == data.x_val.shape[:1]
    if not (fits and paired and x_shape[0] and data.x_val.shape[0]):
        shapes = {name: array.shape for name, array in zip(SplitData._fields, data, strict=True)}
        raise ValueError(
            "Expected x_train (num_train, num_features), y_train (num_train,), x_val (num_val, num_features), "
            f"y_val (num_val,), none of them empty; got {shapes}. Flatten inputs to one row per example."
        )
