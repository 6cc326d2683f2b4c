"""Few-shot regression of sinusoids from a meta-learned initialisation: a batch of tasks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta._problem import BilevelProblem, Params
from contrastive_meta.problems._instance import ProblemInstance, SplitData
from contrastive_meta.problems._losses import Linear, init_layers, layer_shapes, tanh_network


class Anchor(NamedTuple):
    """The meta-parameters of `sinusoids`.

    Attributes:
      weights: omega, like `params`: where learning starts and what it is pulled back to.
      log_strength: log lambda, the strength of the pull, a scalar.

    Example:
      >>> import jax
      >>> anchor = sinusoids(jax.random.key(0), num_tasks=3, strength=0.5).meta_params
      >>> anchor.weights["hidden_0"]["kernel"].shape, round(float(jax.numpy.exp(anchor.log_strength)), 3)
      ((1, 40), 0.5)
    """

    weights: Params
    log_strength: jax.Array


def sinusoids(
    key: jax.Array,
    num_tasks: int = 25,
    num_support: int = 10,
    num_query: int = 10,
    widths: Sequence[int] = (40, 40),
    strength: float = 0.5,
    dtype: Any = None,
) -> ProblemInstance:
    """Few-shot regression with a tanh network that is pulled to a learned anchor, which is also its initialisation.

        L_in  = sum (f(x_train) - y_train)^2 + 1/2 lambda |params - omega|^2
        L_out = sum (f(x_val) - y_val)^2

    Sums over the points of a task, not means: divide `outer_loss` by `num_query` for the mean squared error.
    Holomorphic for complex arguments whose imaginary parts are small (tanh has poles at i pi / 2). Not convex, so
    `exact` is None: `exact_meta_gradient(problem, meta_params, task, near=params)` gives one minimum's.

    Args:
      key: PRNG key of the tasks and of the anchor (normal, variance 1 / fan-in; zero biases).
      num_tasks: number of tasks.
      num_support: points to learn from, per task.
      num_query: points to judge by, per task.
      widths: numbers of hidden units, one per hidden layer.
      strength: where lambda starts.
      dtype: of every array; None for JAX's default.

    Returns:
      `task` is a batch: `SplitData` whose leaves have a leading axis of length `num_tasks` (one task is
      `jax.tree.map(lambda x: x[0], instance.task)`); params are nested dictionaries, {"hidden_0": {"kernel": ..,
      "bias": ..}, .., "readout": ..}; meta_params an `Anchor`.

    Raises:
      ValueError: widths below 1.

    Reference:
      Tasks: Finn et al. 2017, "Model-agnostic meta-learning", section 5.1. Anchored learning: Rajeswaran et al. 2019,
      "Meta-learning with implicit gradients", equation (3), with a sum where that has a mean.

    Example:
      >>> import jax
      >>> instance = sinusoids(jax.random.key(0), num_tasks=3)
      >>> instance.task.x_train.shape
      (3, 10, 1)
      >>> sorted(instance.meta_params.weights)
      ['hidden_0', 'hidden_1', 'readout']
    """
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    key_tasks, key_anchor = jax.random.split(key)
    layers = init_layers(key_anchor, layer_shapes(1, widths, 1), dtype)
    names = [f"hidden_{i}" for i in range(len(widths))] + ["readout"]
    weights = {name: layer._asdict() for name, layer in zip(names, layers, strict=True)}
    meta_params = Anchor(weights, jnp.log(jnp.asarray(strength, dtype)))
    tasks = sinusoid_tasks(key_tasks, num_tasks, num_support, num_query, dtype)
    return ProblemInstance(BilevelProblem(_inner_loss, _outer_loss, _init_params), meta_params, tasks, exact=None)


def sinusoid_tasks(
    key: jax.Array, num_tasks: int, num_support: int = 10, num_query: int = 10, dtype: Any = None
) -> SplitData:
    """Fresh tasks y = A sin(x + p): A uniform in 0.1 .. 5, p in 0 .. pi, x in -5 .. 5.

    Args:
      key: PRNG key.
      num_tasks: number of tasks.
      num_support: points to learn from, per task.
      num_query: points to judge by, per task.
      dtype: of every array; None for JAX's default.

    Returns:
      Inputs of shape (num_tasks, num_points, 1) and targets of shape (num_tasks, num_points).

    Example:
      >>> import jax
      >>> sinusoid_tasks(jax.random.key(0), num_tasks=3).y_val.shape
      (3, 10)
    """
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    key_amplitude, key_phase, key_x = jax.random.split(key, 3)
    amplitude = jax.random.uniform(key_amplitude, (num_tasks, 1), dtype, 0.1, 5.0)
    phase = jax.random.uniform(key_phase, (num_tasks, 1), dtype, 0.0, jnp.pi)
    x = jax.random.uniform(key_x, (num_tasks, num_support + num_query), dtype, -5.0, 5.0)
    y = amplitude * jnp.sin(x + phase)
    return SplitData(x[:, :num_support, None], y[:, :num_support], x[:, num_support:, None], y[:, num_support:])


def _inner_loss(params: Params, meta_params: Anchor, task: SplitData) -> jax.Array:
    pulls = jax.tree.map(lambda p, omega: jnp.sum(jnp.square(p - omega)), params, meta_params.weights)
    pull: jax.Array = jnp.exp(meta_params.log_strength) * sum(jax.tree.leaves(pulls)) / 2
    return _squared_error(params, task.x_train, task.y_train) + pull


def _outer_loss(params: Params, meta_params: Anchor, task: SplitData) -> jax.Array:
    return _squared_error(params, task.x_val, task.y_val)


def _init_params(meta_params: Anchor, task: SplitData) -> Params:
    return meta_params.weights


def _squared_error(params: Mapping[str, Mapping[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    # By number, because the keys of a dictionary pytree come back sorted as text: hidden_10 before hidden_2.
    names = [f"hidden_{i}" for i in range(len(params) - 1)] + ["readout"]
    layers = [Linear(params[name]["kernel"], params[name]["bias"]) for name in names]
    return jnp.sum(jnp.square(tanh_network(layers, x)[:, 0] - y))
