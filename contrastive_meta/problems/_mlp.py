"""A tanh network with a learned strength for every synapse: smooth, but with many minima."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta._problem import BilevelProblem
from contrastive_meta.problems._instance import ProblemInstance, classification_split
from contrastive_meta.problems._losses import Linear, cross_entropy, init_layers, layer_shapes, penalty, tanh_network

Layers = list[Linear]


class MLPTask(NamedTuple):
    """The data of `mlp_strengths` and the key of its initialisation.

    Attributes:
      x_train: inputs, shape (num_train, num_features).
      y_train: labels, shape (num_train,).
      x_val: inputs, shape (num_val, num_features).
      y_val: labels, shape (num_val,).
      key: PRNG key that `init_params` draws the first weights from; another key is another start.

    Example:
      >>> import jax
      >>> from contrastive_meta.problems import classification_data
      >>> data = classification_data(jax.random.key(0))
      >>> problem, strengths, task, _ = mlp_strengths(*data, num_classes=3, key=jax.random.key(1))
      >>> another_start = problem.init(strengths, task._replace(key=jax.random.key(2)))
      >>> another_start[0].kernel.shape
      (10, 32)
    """

    x_train: jax.Array
    y_train: jax.Array
    x_val: jax.Array
    y_val: jax.Array
    key: jax.Array


def mlp_strengths(
    x_train: Any,
    y_train: Any,
    x_val: Any,
    y_val: Any,
    num_classes: int,
    widths: Sequence[int] = (32,),
    *,
    key: jax.Array,
    strength: float = 1e-2,
) -> ProblemInstance:
    """A tanh classifier whose per-synapse penalties are learned on validation data.

        L_in  = mean cross-entropy (train) + 1/2 sum_i exp(log_strength_i) params_i^2     (biases included)
        L_out = mean cross-entropy (validation)

    Means over examples, a sum over synapses. Holomorphic for complex arguments whose imaginary parts are small (tanh
    has poles at i pi / 2); safe while logits stay within +-80 in float32 and +-700 in float64. Not convex, so `exact`
    is None: `exact_meta_gradient(problem, meta_params, task, near=params)` gives the meta-gradient of one minimum.

    Args:
      x_train: inputs, shape (num_train, num_features), floating, numpy or JAX; its dtype is the problem's.
      y_train: integer labels from 0, shape (num_train,).
      x_val: shape (num_val, num_features).
      y_val: shape (num_val,).
      num_classes: number of classes.
      widths: numbers of hidden units, one per hidden layer; () is softmax regression.
      key: PRNG key of the initialisation (normal, variance 1 / fan-in; zero biases); kept in the task.
      strength: where the strengths start.

    Returns:
      params and meta_params (log-strengths) are both lists of `(kernel, bias)` NamedTuples, one per layer.

    Raises:
      ValueError: shapes that do not fit together, labels outside the classes, or widths below 1.
      TypeError: inputs that are not floating or labels that are not integers.

    Example:
      >>> import jax
      >>> from contrastive_meta.problems import classification_data
      >>> data = classification_data(jax.random.key(0))
      >>> instance = mlp_strengths(*data, num_classes=3, widths=(8, 4), key=jax.random.key(1))
      >>> [layer.kernel.shape for layer in instance.meta_params]
      [(10, 8), (8, 4), (4, 3)]
    """
    data = classification_split(x_train, y_train, x_val, y_val, num_classes)
    shapes, dtype = layer_shapes(data.x_train.shape[1], widths, num_classes), data.x_train.dtype
    start = jnp.log(jnp.asarray(strength, dtype))
    log_strengths = [Linear(jnp.full(shape, start, dtype), jnp.full(shape[1:], start, dtype)) for shape in shapes]
    problem = BilevelProblem(_inner_loss, _outer_loss, _init_params)
    return ProblemInstance(problem, log_strengths, MLPTask(*data, key=key), exact=None)


def _inner_loss(params: Layers, meta_params: Layers, task: MLPTask) -> jax.Array:
    return jnp.mean(cross_entropy(tanh_network(params, task.x_train), task.y_train)) + penalty(meta_params, params)


def _outer_loss(params: Layers, meta_params: Layers, task: MLPTask) -> jax.Array:
    return jnp.mean(cross_entropy(tanh_network(params, task.x_val), task.y_val))


def _init_params(meta_params: Layers, task: MLPTask) -> Layers:
    return init_layers(
        task.key, [(layer.kernel.shape[0], layer.kernel.shape[1]) for layer in meta_params], task.x_train.dtype
    )
