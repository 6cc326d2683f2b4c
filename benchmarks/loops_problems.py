"""The training loops' problems: a log-strength for each weight of a linear classifier of digits, and exact answers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import contrastive_meta as cm
from benchmarks import data

TWO_CLASSES, TEN_CLASSES = "4 against 9", "ten classes"


class Task(NamedTuple):
    """Images (num, 64) and labels (1 or -1; or 0 to 9) to learn from and to judge by."""

    x_train: jax.Array
    y_train: jax.Array
    x_val: jax.Array
    y_val: jax.Array


class Exact(NamedTuple):
    """The exact meta-gradient.

    Attributes:
      grad: like the meta-parameters.
      residual: norm of the inner gradient at the parameters given.
      rest: norm of the inner gradient where the exact one was computed.
    """

    grad: jax.Array
    residual: jax.Array
    rest: jax.Array


class Problem(NamedTuple):
    """A problem with its data.

    Attributes:
      losses: inner and outer.
      load: from a seed to the task, in JAX's current precision.
      num_outputs: of the linear classifier.
      check_every: of how many outer steps one has its error looked at; a dense solve each.
      exact: from params, meta-parameters and task, in float64.
    """

    losses: cm.BilevelProblem
    load: Callable[[int], Task]
    num_outputs: int
    check_every: int
    exact: Callable[[Any, Any, Any], Exact]


def _two_classes(logits: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.logaddexp(0.0, -label * logits[0])


def _ten_classes(logits: jax.Array, label: jax.Array) -> jax.Array:
    loss: jax.Array = jax.nn.logsumexp(logits) - logits[label]
    return loss


def _make(
    example_loss: Callable[[jax.Array, jax.Array], jax.Array],
    load: Callable[[int], data.Split],
    num_outputs: int,
    check_every: int,
) -> Problem:
    def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(example_loss)(x @ w, y))

    def inner(w: jax.Array, log_strengths: jax.Array, task: Task) -> jax.Array:
        return loss(w, task.x_train, task.y_train) + jnp.sum(jnp.exp(log_strengths) * w**2) / 2

    def outer(w: jax.Array, log_strengths: jax.Array, task: Task) -> jax.Array:
        return loss(w, task.x_val, task.y_val)

    def hessian(w: jax.Array, log_strengths: jax.Array, task: Task) -> jax.Array:
        """Of the inner loss; that of each example is in its logits."""
        x = task.x_train
        curvatures = jax.vmap(jax.hessian(example_loss))(x @ w, task.y_train)
        of_data = jnp.einsum("ni,nab,nj->iajb", x, curvatures, x, optimize="optimal") / x.shape[0]
        curvature: jax.Array = of_data.reshape(w.size, w.size) + jnp.diag(jnp.exp(log_strengths).ravel())
        return curvature

    def exact(w: jax.Array, log_strengths: jax.Array, task: Task) -> Exact:
        """By Newton, with halved steps where they are too long, and a dense solve."""
        args = log_strengths, task
        halves = 0.5 ** jnp.arange(12.0)

        def rest(w: jax.Array) -> jax.Array:
            norm: jax.Array = jnp.linalg.norm(jax.grad(inner)(w, *args))
            return norm

        def newton(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            w, number = at
            step = jnp.linalg.solve(hessian(w, *args), jax.grad(inner)(w, *args).ravel())
            tried = w - halves[:, None, None] * step.reshape(w.shape)
            return tried[jnp.argmin(jax.vmap(lambda w: inner(w, *args))(tried))], number + 1

        begin = (w, jnp.int32(0))
        end, _ = jax.lax.while_loop(lambda at: (rest(at[0]) > 1e-12) & (at[1] < 40), newton, begin)
        adjoint = jnp.linalg.solve(hessian(end, *args), jax.grad(outer)(end, *args).ravel()).reshape(w.shape)
        grad = -jax.grad(lambda s: jnp.sum(jax.grad(inner)(end, s, task) * adjoint))(log_strengths)
        return Exact(grad, rest(w), rest(end))

    def prepared(seed: int) -> Task:
        return Task(*map(jnp.asarray, load(seed)))

    losses = cm.BilevelProblem(inner, outer, lambda log_strengths, task: jnp.zeros_like(log_strengths))
    return Problem(losses, prepared, num_outputs, check_every, jax.jit(exact))


PROBLEMS = {
    TWO_CLASSES: _make(_two_classes, data.fours_and_nines, num_outputs=1, check_every=1),
    TEN_CLASSES: _make(_ten_classes, lambda seed: data.digits(seed, 898, 899), num_outputs=10, check_every=8),
}
