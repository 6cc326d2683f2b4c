"""The problems of the golden record, small enough to compile quickly, and their exact meta-gradients."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import contrastive_meta as cm
from benchmarks.cases import largest_curvature, upcast
from benchmarks.counting import mark_problem
from benchmarks.harness import Vector, flatten, precision


class Built(NamedTuple):
    """A problem with marked losses, in float64 or rounded to a working precision.

    Attributes:
      losses: of the problem, marked.
      meta_params: pytree.
      task: one task, or several along a leading axis.
      convex: whether the solution is unique.
      batched: whether the task is a batch.
    """

    losses: cm.BilevelProblem
    meta_params: Any
    task: Any
    convex: bool = True
    batched: bool = False


def _logistic() -> Built:
    """Digits, 4 against 9: a log-strength for each of 64 weights."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    chosen = (y == 4) | (y == 9)
    x, y = x[chosen] / 16, np.where(y[chosen] == 4, 1.0, -1.0)
    task = {"x": x[:180], "y": y[:180], "x_val": x[180:], "y_val": y[180:]}

    def loss(w: Any, x: Any, y: Any) -> Any:
        return jnp.mean(jnp.logaddexp(0, -y * (x @ w)))

    losses = cm.BilevelProblem(
        lambda w, s, t: loss(w, t["x"], t["y"]) + jnp.sum(jnp.exp(s) * w**2) / 2,
        lambda w, s, t: loss(w, t["x_val"], t["y_val"]),
        lambda s, t: jnp.zeros_like(s),
    )
    return Built(losses, np.full(64, -3.0), task)


def _instance(instance: cm.problems.ProblemInstance, **more: bool) -> Built:
    return Built(instance.problem, instance.meta_params, instance.task, **more)


def _network() -> Built:
    """A tanh network with 227 synapses, a log-strength for each."""
    drawn = cm.problems.classification_data(jax.random.key(0))
    return _instance(
        cm.problems.mlp_strengths(*drawn, num_classes=3, widths=(16,), key=jax.random.key(1), strength=3e-2),
        convex=False,
    )


def _cleaning() -> Built:
    return _instance(cm.problems.data_cleaning(*cm.problems.corrupted_data(jax.random.key(2)).split, num_classes=3))


def _sinusoids(num_tasks: int, batched: bool) -> Built:
    """A tanh network with 61 synapses, pulled to an anchor."""
    built = _instance(
        cm.problems.sinusoids(jax.random.key(3), num_tasks=num_tasks, widths=(20,)), convex=False, batched=batched
    )
    return built if batched else built._replace(task=jax.tree.map(lambda leaf: leaf[0], built.task))


def _anchored() -> Built:
    """The sinusoid with the pull of `AnchoredSynapse`, strengths included."""
    sinusoid, rule = _sinusoids(1, batched=False), cm.AnchoredSynapse()
    free = np.asarray(-np.inf)  # the sinusoid's own pull is off

    def inner(params: Any, meta: Any, task: Any) -> Any:
        anchor = cm.problems.Anchor(meta["anchor"], jnp.asarray(free, task.x_train.dtype))
        return sinusoid.losses.inner_loss(params, anchor, task) + rule.energy(params, meta)

    def outer(params: Any, meta: Any, task: Any) -> Any:
        return sinusoid.losses.outer_loss(params, None, task)

    anchor = sinusoid.meta_params.weights
    meta = {"anchor": anchor, "log_strength": jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.7), anchor)}
    return Built(cm.BilevelProblem(inner, outer, lambda meta, task: meta["anchor"]), meta, sinusoid.task, convex=False)


def _double_well(starts: Any, batched: bool) -> Built:
    """Minima at -1 and 1 and a rim between; the task is where learning starts."""
    losses = cm.BilevelProblem(
        lambda w, theta, task: jnp.sum((w**2 - 1.0) ** 2) + theta * jnp.sum(w),
        lambda w, theta, task: jnp.sum((w - 0.5) ** 2),
        lambda theta, task: jnp.full(2, task),
    )
    return Built(losses, np.asarray(0.0), np.asarray(starts), convex=False, batched=batched)


PROBLEMS: dict[str, Callable[[], Built]] = {
    "logistic": _logistic,
    "logistic x 1": lambda: _batch_of_one(_logistic()),
    "ridge": lambda: _instance(cm.problems.ridge(*cm.problems.ridge_data(jax.random.key(4)))),
    "network": _network,
    "cleaning": _cleaning,
    "sinusoid": lambda: _sinusoids(1, batched=False),
    "sinusoid x 4": lambda: _sinusoids(4, batched=True),
    "anchored": _anchored,
    "double well": lambda: _double_well(0.1, batched=False),
    "double well x 4": lambda: _double_well([0.1, 1.1, 0.9, 1.2], batched=True),
}


def _batch_of_one(built: Built) -> Built:
    return built._replace(task=jax.tree.map(lambda leaf: leaf[None], built.task), batched=True)


@functools.cache
def build(problem: str, x64: bool) -> Built:
    """A problem, drawn in float64 and rounded to the working precision, its losses marked."""
    with precision(True):
        built = PROBLEMS[problem]()
    dtype = np.float64 if x64 else np.float32

    def rounded(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        array = np.asarray(leaf)
        return jnp.asarray(array.astype(dtype if array.dtype.kind == "f" else np.int32))

    with precision(x64):
        meta_params, task = jax.tree.map(rounded, (built.meta_params, built.task))
    return built._replace(losses=mark_problem(built.losses), meta_params=meta_params, task=task)


def exact(built: Built, params: Any) -> tuple[Vector, float]:
    """The exact meta-gradient in float64, the mean over a batch, and the inner Hessian's condition number.

    Args:
      built: in the working precision; its rounded numbers are taken as exact.
      params: the solution to start from where there are several minima; None learns one for each task.

    Raises:
      ValueError: no minimum was found.
    """
    with precision(True):
        meta_params, tasks = upcast(built.meta_params), upcast(built.task)
        num_tasks = len(jax.tree.leaves(tasks)[0]) if built.batched else 1
        grads, conditions = [], []
        for i in range(num_tasks):
            task = jax.tree.map(lambda leaf, i=i: leaf[i], tasks) if built.batched else tasks
            near = None if built.convex else upcast(params)
            if near is None and not built.convex:
                near = _learn(built.losses, meta_params, task)
            answer = cm.problems.exact_meta_gradient(built.losses, meta_params, task, near=near)
            if not answer.converged:
                raise ValueError("The reference did not converge: there is no minimum near.")
            largest = largest_curvature(built.losses, answer.params, meta_params, task)
            grads.append(flatten(answer.grad))
            conditions.append(float(largest / answer.min_eigenvalue))
    return np.mean(grads, axis=0), max(conditions)


@jax.jit
def _learn(losses: cm.BilevelProblem, meta_params: Any, task: Any) -> Any:
    start = losses.init(meta_params, task)
    return cm.LBFGS(tol=1e-8).solve(lambda params: losses.inner(params, meta_params, task), start).params
