"""The result of estimators that learn from the start and look at nothing but where learning ends."""

from typing import Any

import jax

from contrastive_meta import _pytree as tree
from contrastive_meta._instance import Instance
from contrastive_meta._problem import MetaParams
from contrastive_meta._result import EstimatorState, MetaGradient, Status, flag, make_diagnostics, worst
from contrastive_meta._solvers.base import Solution


def result_of_learning(
    instance: Instance,
    state: EstimatorState,
    free: Solution,
    grad: MetaParams,
    *,
    num_gradients: jax.Array,
    status: Any,
    error: Any = None,
) -> MetaGradient:
    """A meta-gradient judged by the free phase's own report, and by whether its numbers are finite.

    Args:
      instance: the problem, its model state held.
      state: the state that came in.
      free: where learning ended.
      grad: the estimate.
      num_gradients: gradients spent, those of `free` included.
      status: what the estimator knows besides.
      error: estimated relative error, or None.
    """
    outer_loss, aux = instance.problem.outer_with_aux(free.params, instance.meta_params, instance.task)
    return MetaGradient(
        grad=grad,
        outer_loss=outer_loss,
        params=free.params,
        state=state._replace(params=free.params, memory=free.memory, model_state=free.model_state),
        aux=aux,
        diagnostics=make_diagnostics(
            instance.dtype,
            free_residual=free.residual,
            num_gradients=num_gradients,
            error_estimate=error,
            status=worst(status, free.status, flag(~tree.all_finite((grad, outer_loss)), Status.NOT_FINITE)),
        ),
    )
