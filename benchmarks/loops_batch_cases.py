"""Batches of tasks of which one falls back or none does, and the estimators of their meta-gradients."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import contrastive_meta as cm
from benchmarks.harness import Session

LOGISTIC, QUADRATIC, RECORD, WELLS = "logistic", "quadratic", "quadratic, scaling record", "double wells"
# Of the wells: which task of a batch starts on the rim between two minima, where the loss curves downwards.
ON_RIM = 5
# The free phase has ended, as in the scaling record.
_ENDED = cm.LBFGS(tol=0.0, max_steps=0)
_LEAN = cm.Contrastive(
    _ENDED,
    cm.NewtonKrylov(tol=1e-3, max_steps=20_000),
    cm.relative(cm.central_difference),
    estimate_error=False,
)
# Compiles fast, which is all that a smoke run asks for.
_QUICK = cm.ImplicitDifferentiation(_ENDED, cm.ConjugateGradient(tol=1e-2), estimate_error=False)


class Scenario(NamedTuple):
    """A batch of tasks and the estimator of their meta-gradients.

    Attributes:
      problem: of one task.
      estimator: ours.
      meta_params: shared by the tasks.
      tasks: with a leading axis.
      over_one: the most that a batch of 16 may take over one task, where that is the aim; None for the sum of single
        calls.
    """

    problem: cm.BilevelProblem
    estimator: cm.MetaGradientEstimator
    meta_params: Any
    tasks: Any
    over_one: float | None = None


def batches_of_tasks(session: Session, num_tasks: int) -> dict[str, Scenario]:
    """By name, those of which no task needs more than the others."""
    quadratic = _quadratics(session, num_tasks)
    record = Scenario(
        dataclasses.replace(quadratic.problem, init_params=lambda meta_params, task: task[1]),
        _QUICK if session.smoke else _LEAN,
        quadratic.meta_params,
        quadratic.tasks,
        over_one=2.2,
    )
    if session.smoke:
        return {RECORD: record}
    return {LOGISTIC: _logistics(session, num_tasks), RECORD: record, QUADRATIC: quadratic}


def _logistics(session: Session, num_tasks: int) -> Scenario:
    """Logistic regression, 200 weights and 300 examples, with one penalty for all: in the project's list of cases."""

    def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean(jnp.logaddexp(0.0, -y * (x @ w)))

    def draw(key: jax.Array) -> Any:
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (300, 200))
        return {"x": x, "y": jnp.sign(x[:, 0] + jax.random.normal(keys[1], (300,)))}

    problem = cm.BilevelProblem(
        lambda w, s, task: loss(w, task["x"], task["y"]) + jnp.exp(s) * jnp.sum(w**2),
        lambda w, s, task: loss(w, task["x"][:100], task["y"][:100]),
        lambda s, task: jnp.zeros(200),
    )
    tasks = jax.vmap(draw)(jax.random.split(jax.random.key(session.seed), num_tasks))
    return Scenario(problem, cm.Contrastive(cm.LBFGS()), jnp.asarray(-3.0), tasks)


def _quadratics(session: Session, num_tasks: int) -> Scenario:
    """Those of `speed_scaling`: dimension 32, condition number 100; a task is its data and its solution."""
    keys = jax.random.split(jax.random.key(session.seed), num_tasks)
    made = [cm.problems.quadratic(key, dim=32, num_meta=8, condition_number=100.0) for key in keys]
    first = made[0]
    assert first.exact is not None
    tasks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(one.task for one in made))
    solutions = jax.vmap(first.exact, in_axes=(None, 0))(first.meta_params, tasks).params
    problem = cm.BilevelProblem(
        lambda params, meta_params, task: first.problem.inner(params, meta_params, task[0]),
        lambda params, meta_params, task: first.problem.outer(params, meta_params, task[0]),
        lambda meta_params, task: first.problem.init(meta_params, task[0]),
    )
    return Scenario(problem, cm.Contrastive(cm.LBFGS()), first.meta_params, (tasks, solutions))


def wells(session: Session, num_tasks: int) -> tuple[Scenario, Any]:
    """Two wells along each of 100 weights, coupled; and the batch in which one task starts on the rim between them.

    A loose tolerance ends learning at once. From near a minimum the fast nudged learner finishes it; from the rim it
    cannot, and the user's learner goes on.
    """
    num = 20 if session.smoke else 100

    def inner(w: jax.Array, force: jax.Array, task: Any) -> jax.Array:
        return jnp.sum((w**2 - 1.0) ** 2) + 0.05 * jnp.mean((task["x"] @ w) ** 2) + jnp.sum(force * w)

    def draw(key: jax.Array) -> Any:
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (3 * num, num))
        aim, noise = jax.random.normal(keys[1], (2, num))
        return {"x": x, "aim": aim, "start": 1.0 + 0.05 * noise}

    problem = cm.BilevelProblem(
        inner,
        lambda w, force, task: 0.5 * jnp.sum((w - task["aim"]) ** 2),
        lambda force, task: task["start"],
    )
    tasks = jax.vmap(draw)(jax.random.split(jax.random.key(session.seed), num_tasks))
    rim = ON_RIM % num_tasks
    mixed = tasks | {"start": tasks["start"].at[rim].add(-0.9)}
    estimator = _QUICK if session.smoke else cm.Contrastive(cm.LBFGS(tol=5.0))
    return Scenario(problem, estimator, jnp.zeros(num), tasks), mixed
