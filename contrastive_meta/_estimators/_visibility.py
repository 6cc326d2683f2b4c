"""Which meta-parameters an estimator can see: what the losses, the start of learning and the learner depend on."""

from contrastive_meta._dependence import used_leaves
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task
from contrastive_meta._solvers.base import InnerSolver


def seen_in_inner_loss(problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
    """For each leaf of `meta_params`, whether the inner loss depends on it."""
    return used_leaves(lambda meta: problem.inner(params, meta, task), meta_params)


def seen_in_outer_loss(problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
    """For each leaf, whether the outer loss depends on it directly."""
    return used_leaves(lambda meta: problem.outer(params, meta, task), meta_params)


def seen_in_start(problem: BilevelProblem, meta_params: MetaParams, task: Task) -> list[bool]:
    """For each leaf, whether the initialisation depends on it."""
    return used_leaves(lambda meta: problem.init(meta, task), meta_params)


def seen_in_settings(solver: InnerSolver, params: Params, meta_params: MetaParams) -> list[bool]:
    """For each leaf, whether the learner's settings depend on it."""
    return used_leaves(lambda meta: solver.bind(meta).one_update(params), meta_params)


def any_of(*seen: list[bool]) -> list[bool]:
    """Leaf by leaf, whether it is seen in any of several places."""
    return [any(flags) for flags in zip(*seen, strict=True)]
