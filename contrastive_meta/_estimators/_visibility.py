"""Which meta-parameters an estimator can see: what the losses, the start of learning and the learner depend on."""

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._dependence import used_leaves
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task
from contrastive_meta._pytree import PyTree
from contrastive_meta._solvers.base import InnerSolver


def seen_in_inner_loss(problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
    """For each leaf of `meta_params`, whether the inner loss depends on it."""
    held = problem.at_start(meta_params, task)
    return used_leaves(lambda meta: held.inner(params, meta, task), meta_params)


def seen_in_outer_loss(problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
    """For each leaf, whether the outer loss depends on it directly."""
    held = problem.at_start(meta_params, task)
    return used_leaves(lambda meta: held.outer(params, meta, task), meta_params)


def seen_in_start(problem: BilevelProblem, meta_params: MetaParams, task: Task) -> list[bool]:
    """For each leaf, whether the initialisation depends on it."""
    return used_leaves(lambda meta: problem.init(meta, task), meta_params)


def seen_in_model_state(problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
    """For each leaf, whether the model state depends on it, at the start or after a step."""
    if problem.init_model_state is None:
        return [False] * len(jax.tree.leaves(meta_params))

    def states(meta: MetaParams) -> PyTree:
        first = problem.first_model_state(meta, task)
        return first, problem.moved(params, meta, task, first)[1]

    return used_leaves(states, meta_params)


def seen_in_penalty(solver: InnerSolver, params: Params, meta_params: MetaParams) -> list[bool]:
    """For each leaf, whether the part of the inner objective that the loss leaves out depends on it."""
    bound = solver.bind(meta_params)
    if bound.held_to is not None:

        def rows(meta: MetaParams) -> jax.Array:
            constraints = solver.bind(meta).held_to
            assert constraints is not None
            return constraints.rows(params)

        return used_leaves(rows, meta_params)
    if bound.walls is None:
        return [False] * len(jax.tree.leaves(meta_params))

    def penalty(meta: MetaParams) -> PyTree:
        walls = solver.bind(meta).walls
        assert walls is not None
        value = walls.value(params)
        return walls.prox(params, tree.float_dtype(params).type(1)), () if value is None else value

    return used_leaves(penalty, meta_params)


def seen_in_settings(solver: InnerSolver, params: Params, meta_params: MetaParams) -> list[bool]:
    """For each leaf, whether the learner's settings depend on it."""
    return used_leaves(lambda meta: solver.bind(meta).one_update(params), meta_params)


def gradient_reaches_params(problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> bool:
    """Whether the gradient of the outer loss in `params` may be other than zero: whether any operation carries it."""
    held = problem.at_start(meta_params, task)

    def pull_back(cotangent: jax.Array) -> Params:
        pulled: Params = jax.grad(lambda at: cotangent * held.outer(at, meta_params, task))(params)
        return pulled

    value = jax.eval_shape(lambda at: held.outer(at, meta_params, task), params)
    # Where nothing carries it, the pull-back is a constant, whatever the cotangent.
    return any(used_leaves(pull_back, jnp.ones(value.shape, value.dtype)))


def any_of(*seen: list[bool]) -> list[bool]:
    """Leaf by leaf, whether it is seen in any of several places."""
    return [any(flags) for flags in zip(*seen, strict=True)]
