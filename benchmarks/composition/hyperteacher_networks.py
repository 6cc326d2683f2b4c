"""Modular teachers, students that are hypernetworks, and the learner that infers which modules a task is made of."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import contrastive_meta as cm
from benchmarks.composition.hyperteacher_supports import NUM_MODULES, draw_weights

NUM_INPUTS, NUM_HIDDEN, NUM_OUTPUTS = 8, 8, 4
_BANK = cm.ModuleBank()
# Damped Newton: damping over the mean curvature at first, its factors after steps that fall and steps that do not.
_DAMPING, _EASED, _TIGHTENED = 1e-2, 0.1, 10.0
# Added to a curvature matrix, over its mean diagonal: a module that a student has not learned to use has no curvature.
_RIDGE = 1e-7

Task = dict[str, jax.Array]


def modules(key: jax.Array, num_hidden: int, num_modules: int = NUM_MODULES) -> jax.Array:
    """Random modules, N(0, 1/8): shape (modules, inputs, hidden)."""
    drawn: jax.Array = jax.random.normal(key, (num_modules, NUM_INPUTS, num_hidden)) / NUM_INPUTS**0.5
    return drawn


def network(
    bank: jax.Array, weights: jax.Array, x: jax.Array, activation: Callable[[Any], Any] = jax.nn.relu
) -> jax.Array:
    """The outputs P f(x sum_m w_m Theta_m), shape (examples, outputs); output i sums the units i, i + 4, i + 8, ...

    Args:
      bank: shape (modules, inputs, hidden).
      weights: shape (modules,).
      x: shape (examples, inputs).
      activation: f.
    """
    active: jax.Array = activation(_BANK.mix(x, bank, weights))
    return active.reshape(len(x), -1, NUM_OUTPUTS).sum(1)


def sampler(num_tasks: int, num_examples: int, *, joint: bool) -> Callable[[jax.Array, Any], Task]:
    """Tasks of one teacher, `(key, {"teacher", "support"}) -> tasks`; they share their inputs.

    Args:
      num_tasks: in a batch.
      num_examples: of each of the two sets.
      joint: whether the tasks are judged on the examples that they are learned from.
    """

    def sample(key: jax.Array, data: Any) -> Task:
        of_inputs, of_weights = jax.random.split(key)
        bound = 3**0.5
        x = jax.random.uniform(of_inputs, (2, num_examples, NUM_INPUTS), minval=-bound, maxval=bound)
        weights = draw_weights(of_weights, data["support"], num_tasks)

        def examples(inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jax.vmap(network, (None, 0, None))(data["teacher"], weights, inputs)
            return jnp.broadcast_to(inputs, (num_tasks, *inputs.shape)), y

        support = examples(x[0])
        query = support if joint else examples(x[1])
        return {"x": support[0], "y": support[1], "x_query": query[0], "y_query": query[1], "weights": weights}

    return sample


def unexplained(bank: jax.Array, weights: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """1 - R^2: mean squared error over the variance of the targets."""
    return jnp.mean((network(bank, weights, x) - y) ** 2) / jnp.var(y)


def problem() -> cm.BilevelProblem:
    """Which weights of the modules explain a task's support set, and how well they explain its query set."""
    return cm.BilevelProblem(
        lambda z, bank, t: unexplained(bank, z, t["x"], t["y"]),
        lambda z, bank, t: unexplained(bank, z, t["x_query"], t["y_query"]),
        _first_guess,
    )


def _first_guess(bank: jax.Array, task: Task) -> jax.Array:
    """Least squares where every rectifier is replaced by its mean slope, 1/2; a start, which is not differentiated."""
    kept = jax.lax.stop_gradient(bank)
    units = jnp.eye(kept.shape[0], dtype=kept.dtype)
    columns = jax.vmap(lambda z: network(kept, z, task["x"], lambda a: a / 2).reshape(-1), out_axes=1)(units)
    curvature = columns.T @ columns
    weights: jax.Array = jnp.linalg.solve(_ridged(curvature, _RIDGE), columns.T @ task["y"].reshape(-1))
    return weights


def _ridged(curvature: jax.Array, share: Any) -> jax.Array:
    mean = jnp.trace(curvature) / curvature.shape[0]
    ridged: jax.Array = curvature + share * mean * jnp.eye(curvature.shape[0], dtype=curvature.dtype)
    return ridged


def newton_learner(num_steps: int, level: float = 0.0) -> cm.CallableSolver:
    """A few steps of Newton's method with the damping of Levenberg (1944) and Marquardt (1963).

    The network is linear in the weights of its modules wherever no rectifier switches, and so the Hessian of its mean
    squared error is the matrix of Gauss and Newton.

    Args:
      num_steps: each evaluates the loss, its gradient and its Hessian once.
      level: losses that differ by a smaller share are taken to be equal, and the smaller gradient decides. Near its
        minimum a loss in float32 tells steps apart only to the square root of its rounding.
    """

    def learn(loss: Callable[[jax.Array], jax.Array], start: jax.Array) -> jax.Array:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            trial, best, damping = carry
            value, gradient = jax.value_and_grad(loss)(trial)
            found = trial, value, gradient, jax.hessian(loss)(trial)
            lower, flatter = value < best[1], jnp.linalg.norm(gradient) < jnp.linalg.norm(best[2])
            falls = jnp.where(jnp.abs(value - best[1]) < level * best[1], flatter, lower)
            best = jax.tree.map(lambda new, old: jnp.where(falls, new, old), found, best)
            damping = damping * jnp.where(falls, _EASED, _TIGHTENED)
            at, _, slope, curvature = best
            return (at - jnp.linalg.solve(_ridged(curvature, damping + _RIDGE), slope), best, damping), None

        number = start.shape[0]
        nothing = (start, jnp.asarray(jnp.inf, start.dtype), start, jnp.eye(number, dtype=start.dtype))
        begin = (start, nothing, jnp.asarray(_DAMPING / _EASED, start.dtype))
        # The last trial is not evaluated: one more turn would only say whether it is better.
        (_, best, _), _ = jax.lax.scan(step, begin, None, num_steps + 1)
        end: jax.Array = best[0]
        return end

    return cm.CallableSolver(learn)
