"""Regressions with a learned anchor and strength for every weight, their phases solved exactly, by Newton's method."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import contrastive_meta as cm
from benchmarks import data
from benchmarks.harness import Vector, flatten
from contrastive_meta.problems import SplitData

# Newton's method squares its error at every step: on these problems 8 steps reach rounding, 12 leave room.
_NEWTON_STEPS = 12
_STRENGTH = 0.1


class Analysed(NamedTuple):
    """A problem whose phases and meta-gradient are known to rounding.

    Attributes:
      name: of it.
      problem: meta-parameters {"anchor", "log_strength"}, one of each for each weight.
      meta_params: where it is analysed.
      task: the data.
      exact: the meta-gradient, flat.
    """

    name: str
    problem: cm.BilevelProblem
    meta_params: Any
    task: SplitData
    exact: Vector


def build(name: str, seed: int) -> Analysed:
    """`ridge` on diabetes (10 weights), or `logistic` on breast cancer (30 weights), split by the seed. In float64."""
    load, loss = {"ridge": (data.diabetes, _half_square), "logistic": (data.breast_cancer, _log_loss)}[name]
    task = SplitData(*map(jnp.asarray, load(seed)))
    size = task.x_train.shape[1]
    meta_params = {"anchor": jnp.full(size, 0.1), "log_strength": jnp.full(size, jnp.log(_STRENGTH))}

    def inner(w: jax.Array, meta: Any, task: SplitData) -> jax.Array:
        pull = jnp.sum(jnp.exp(meta["log_strength"]) * jnp.square(w - meta["anchor"])) / 2
        return loss(task.x_train @ w, task.y_train) + pull

    def outer(w: jax.Array, meta: Any, task: SplitData) -> jax.Array:
        return loss(task.x_val @ w, task.y_val)

    problem = cm.BilevelProblem(inner, outer, lambda meta, task: meta["anchor"])
    return Analysed(name, problem, meta_params, task, _exact(problem, meta_params, task))


def minimum(analysed: Analysed, beta: Any) -> jax.Array:
    """The minimum of the nudged loss of strength beta, theory (5)."""
    problem, meta, task = analysed.problem, analysed.meta_params, analysed.task

    def nudged(w: jax.Array) -> jax.Array:
        return problem.nudged(w, meta, task, beta)

    def step(_: Any, w: jax.Array) -> Any:
        return w - jnp.linalg.solve(jax.hessian(nudged)(w), jax.grad(nudged)(w))

    at: jax.Array = jax.lax.fori_loop(0, _NEWTON_STEPS, step, problem.init(meta, task))
    return at


def statistic(analysed: Analysed, w: jax.Array, beta: Any) -> jax.Array:
    """What a phase measures: the gradient of the nudged loss in the meta-parameters, flat, theory (8)."""
    grad = jax.grad(analysed.problem.nudged, 1)(w, analysed.meta_params, analysed.task, beta)
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(grad)])


def contrast(analysed: Analysed, scheme: cm.NudgeScheme, ends: Sequence[jax.Array]) -> jax.Array:
    """The estimate of phases that ended there: a weighted sum of what they measure."""
    told = zip(scheme.weights, ends, scheme.nudges, strict=True)
    total: jax.Array = sum(weight * statistic(analysed, end, beta) for weight, end, beta in told)  # type: ignore[assignment]
    return total


def descend(analysed: Analysed, start: jax.Array, beta: Any, marks: Sequence[int]) -> list[jax.Array]:
    """Where gradient descent on the nudged loss is after each of these numbers of steps."""
    problem, meta, task = analysed.problem, analysed.meta_params, analysed.task
    rate = 1 / _largest_curvature(analysed)

    def step(_: Any, w: jax.Array) -> Any:
        return w - rate * jax.grad(problem.nudged)(w, meta, task, beta)

    at, done, ends = start, 0, []
    for mark in marks:
        at = jax.lax.fori_loop(0, mark - done, step, at)
        ends.append(at)
        done = mark
    return ends


def _largest_curvature(analysed: Analysed) -> jax.Array:
    """Of the inner loss, and half as much again for the nudge; that of a logistic loss is largest where w = 0."""
    hessian = jax.hessian(analysed.problem.inner)(
        jnp.zeros_like(analysed.meta_params["anchor"]), analysed.meta_params, analysed.task
    )
    largest: jax.Array = 1.5 * jnp.linalg.eigvalsh(hessian)[-1]
    return largest


def _exact(problem: cm.BilevelProblem, meta_params: Any, task: SplitData) -> Vector:
    """The implicit function theorem at the minimum, by a dense solve: theory (4). The outer loss has no direct term."""
    at = minimum(Analysed("", problem, meta_params, task, np.zeros(0)), 0.0)
    hessian = jax.hessian(problem.inner)(at, meta_params, task)
    adjoint = jnp.linalg.solve(hessian, jax.grad(problem.outer)(at, meta_params, task))
    _, pull = jax.vjp(lambda meta: jax.grad(problem.inner)(at, meta, task), meta_params)
    return -flatten(pull(adjoint)[0])


def _half_square(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(prediction - target)) / 2


def _log_loss(score: jax.Array, label: jax.Array) -> jax.Array:
    return jnp.mean(jnp.logaddexp(0.0, score) - label * score)
