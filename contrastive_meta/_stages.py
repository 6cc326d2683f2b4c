"""Problems in two stages: what of them does not depend on `params` is computed once for each task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from contrastive_meta._arity import require_function
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task, as_float_arrays, check_same_structure
from contrastive_meta._pytree import PyTree

Prepare = Callable[[MetaParams, Task], PyTree]
PullBack = Callable[[PyTree], MetaParams]


class Stages(NamedTuple):
    """The two stages of a problem.

    Attributes:
      prepare: `(meta_params, task) -> prepared`.
      rest: the problem whose meta-parameters are `prepared`.
    """

    prepare: Prepare
    rest: BilevelProblem


def in_two_stages(prepare: Prepare, rest: BilevelProblem) -> BilevelProblem:
    """A problem whose losses see the meta-parameters only through something that does not depend on `params`.

        L(params, meta_params, task) = L_rest(params, prepare(meta_params, task), task)

    Such are features below a readout that learns. Estimators call `prepare` once for each task, estimate the
    meta-gradient of `rest` with the prepared values in the place of meta-parameters, and pull it back by one
    vector-Jacobian product of `prepare`. This is the chain rule: it is as exact as the estimate of `rest`. Learning
    then costs what it costs in `rest`, whatever `prepare` costs.

    To whoever evaluates its losses one by one, such as a reference, it is an ordinary problem. Solvers that are given
    meta-parameters, and solvers with learned settings, are given the prepared values; so are plasticity rules.

    Args:
      prepare: `(meta_params, task) -> prepared`, a pytree of floating arrays.
      rest: its losses and its `init_params` take `prepared` where others take `meta_params`.

    Raises:
      ValueError: `rest` has minibatches or a model state. What is prepared is of the whole task.
      TypeError: `prepare` is no function of two arguments; or, when called, returns other than floating arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> rest = cm.BilevelProblem(
      ...     inner_loss=lambda w, target, task: jnp.sum((w - target) ** 2),
      ...     outer_loss=lambda w, target, task: jnp.sum(w),
      ...     init_params=lambda target, task: jnp.zeros_like(target),
      ... )
      >>> problem = cm.in_two_stages(lambda theta, task: theta**2 * task, rest)
      >>> result = cm.Contrastive(cm.LBFGS()).estimate(problem, jnp.array(3.0), jnp.ones(2))
      >>> round(float(result.grad), 3)  # w = theta^2, twice
      12.0
    """
    require_function(prepare, "prepare", "meta_params, task", "prepared")
    for given, what in ((rest.sample, "sample"), (rest.init_model_state, "init_model_state")):
        if given is not None:
            raise ValueError(
                f"in_two_stages: expected a problem without `{what}`, got one with it. What is prepared is of the "
                "whole task and stays as it is; write a problem in one stage, by `BilevelProblem`."
            )

    def inner(params: Params, meta_params: MetaParams, task: Task) -> object:
        return rest.inner_loss(params, prepare(meta_params, task), task)

    def outer(params: Params, meta_params: MetaParams, task: Task) -> object:
        return rest.outer_loss(params, prepare(meta_params, task), task)

    def init(meta_params: MetaParams, task: Task) -> Params:
        return rest.init_params(prepare(meta_params, task), task)

    return BilevelProblem(inner, outer, init, has_aux=rest.has_aux, stages=Stages(prepare, rest))


def last_stage(
    problem: BilevelProblem, meta_params: MetaParams, task: Task
) -> tuple[BilevelProblem, MetaParams, PullBack]:
    """The second stage once the first is computed: a problem, its meta-parameters, and the way back for gradients.

    A problem of one stage is returned as it is.

    Args:
      problem: of one stage or two.
      meta_params: of the problem.
      task: a single one.
    """
    if problem.stages is None:
        return problem, meta_params, lambda grad: grad
    prepared, pull = _prepared(problem.stages, meta_params, task)
    return problem.stages.rest, prepared, lambda grad: _back(prepared, pull, grad)


def last_stage_of_each(
    problem: BilevelProblem, meta_params: MetaParams, tasks: Task
) -> tuple[BilevelProblem, tuple[MetaParams, ...], PullBack]:
    """`last_stage` of a batch of tasks.

    Args:
      problem: of one stage or two.
      meta_params: of the problem.
      tasks: with a leading axis.

    Returns:
      The problem; the meta-parameters of each task along a leading axis, or none where all share `meta_params`; and the
      way back for gradients along a leading axis.
    """
    if problem.stages is None:
        return problem, (), lambda grads: grads
    stages: Stages = problem.stages
    prepared, pulls = jax.vmap(lambda task: _prepared(stages, meta_params, task))(tasks)
    return stages.rest, (prepared,), lambda grads: jax.vmap(_back)(prepared, pulls, grads)


def _prepared(stages: Stages, meta_params: MetaParams, task: Task) -> Any:
    """What is prepared, and the vector-Jacobian product, a pytree that can be mapped."""

    def values(meta_params: MetaParams) -> PyTree:
        return as_float_arrays(stages.prepare(meta_params, task), "prepared", "`prepare` must return")

    return jax.vjp(values, meta_params)


def _back(prepared: PyTree, pull: Callable[[PyTree], tuple[PyTree]], grad: PyTree) -> PyTree:
    check_same_structure(
        grad, prepared, "The meta-gradient", "A rule's `statistic` must return a pytree like what `prepare` returns."
    )
    return pull(grad)[0]
