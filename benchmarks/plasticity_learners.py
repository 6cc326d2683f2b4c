"""A family of tasks, what learns them, and how it is meta-learned and judged."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm

Draw = Callable[[jax.Array, int], Any]


class Course(NamedTuple):
    """A family of tasks, what learns them, and how anchors are meta-learned.

    Attributes:
      split: of the learner: problem, rule, first anchors.
      estimator: of the meta-gradient.
      learner: of the free phase, with which anchors are judged.
      draw: `(key, number) -> tasks` for meta-learning.
      held_out: likewise, for the judgement alone: of data, or of tasks, that meta-learning never saw.
      score: `(params, meta_params, task) -> scalar` by which a task's solution is judged.
      optimizer: of the anchors.
      num_steps: of meta-learning.
      batch: tasks in a step, whose meta-gradients are averaged.
      num_judged: held-out tasks.
    """

    split: Any
    estimator: cm.MetaGradientEstimator
    learner: cm.InnerSolver
    draw: Draw
    held_out: Draw
    score: Callable[[Any, Any, Any], jax.Array]
    optimizer: optax.GradientTransformation
    num_steps: int
    batch: int
    num_judged: int


def meta_learn(course: Course, key: jax.Array) -> tuple[Any, Any]:
    """The meta-parameters after the course, and the outer loss of every step of it."""
    step = cm.value_and_meta_grad(course.split.problem, course.estimator)

    def one(carry: Any, key: jax.Array) -> Any:
        meta_params, state = carry
        value, grad = step(meta_params, course.draw(key, course.batch))
        updates, state = course.optimizer.update(grad, state, meta_params)
        return (optax.apply_updates(meta_params, updates), state), value

    @jax.jit
    def run(meta_params: Any, keys: jax.Array) -> Any:
        return jax.lax.scan(one, (meta_params, course.optimizer.init(meta_params)), keys)

    (meta_params, _), values = run(course.split.meta_params, jax.random.split(key, course.num_steps))
    return meta_params, values


def judge(course: Course, meta_params: Any, key: jax.Array) -> float:
    """The mean score on held-out tasks, learned from the anchors."""
    problem = course.split.problem

    def one(task: Any) -> jax.Array:
        start = problem.init_params(meta_params, task)
        params = course.learner.solve(lambda w: problem.inner_loss(w, meta_params, task), start).params
        return course.score(params, meta_params, task)

    return float(jnp.mean(jax.jit(jax.vmap(one))(course.held_out(key, course.num_judged))))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over examples."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def shrinking_steps(num_steps: int, rate: float) -> cm.OptaxDescent:
    """Adam with steps that shrink to nothing: phases are compared where they end.

    `eps_root`, or the derivative of the step of a synapse that has been silent is infinite.
    """
    schedule = optax.cosine_decay_schedule(rate, num_steps)
    return cm.OptaxDescent(optax.adam(schedule, eps_root=1e-12), num_steps=num_steps)


def published_estimator(split: Any, learner: cm.InnerSolver, nudged: cm.InnerSolver, beta: float) -> cm.Contrastive:
    """The rule as published: learning run again, nudged both ways by the outer loss.

    Adam's first steps have the whole rate for length, however small the gradient: at a solution that is a kick, which
    a smaller rate of the nudged learner keeps within its basin.
    """
    scheme, nudge = cm.central_difference(beta), cm.LossNudge()
    return cm.Contrastive(learner, nudged, scheme, nudge, split.rule, estimate_error=False)
