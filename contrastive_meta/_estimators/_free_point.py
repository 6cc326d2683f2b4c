"""The free solution as every estimator judges it: losses and gradients there, and whether learning had ended."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._estimators.base import Setting
from contrastive_meta._problem import Params, Status, flag, worst
from contrastive_meta._response import length_scale, measure_noise
from contrastive_meta._solvers.base import Solution

# Learning has ended when what is left to learn would move `params` by less than this fraction of their norm.
UNLEARNED = 1e-2
# The response to the nudge is solved when what is left of it is below this fraction of the nudge.
UNANSWERED = 1e-2
# A residual within this factor of the rounding noise is as small as the dtype allows.
NOISE_FLOOR = 10.0


class FreePoint(NamedTuple):
    """Where the free phase ended, and what the losses say there.

    Attributes:
      params: the free solution.
      solution: what the solver reported.
      outer_loss: outer loss there.
      aux: the outer loss's aux.
      inner_grad: gradient of the inner loss there.
      outer_grad: gradient v of the outer loss there.
      nudge_norm: norm of v.
      scale: length of `params`, see `length_scale`.
      noise: rounding noise of the inner gradient.
      statistic_noise: rounding noise of the meta-gradient's statistic; 0 where none is measured.
    """

    params: Params
    solution: Solution
    outer_loss: jax.Array
    aux: Any
    inner_grad: Params
    outer_grad: Params
    nudge_norm: jax.Array
    scale: jax.Array
    noise: jax.Array
    statistic_noise: jax.Array


NUM_GRADIENTS = 5  # spent by `survey`: the inner and outer gradients at the solution, and three for the noise.


def survey(setting: Setting, solution: Solution, init: Params, statistic: Any = None) -> FreePoint:
    """Evaluate both losses at the free solution and measure their rounding noise.

    Args:
      setting: the problem.
      solution: of the free phase.
      init: where learning started.
      statistic: `params -> meta-params tree`, whose noise is wanted too, or None.
    """
    params = solution.params
    inner_grad = tree.grad(setting.inner)(params)
    (outer_loss, aux), outer_grad = jax.value_and_grad(
        lambda at: setting.problem.outer_with_aux(at, setting.meta_params, setting.task), has_aux=True
    )(params)
    scale = length_scale(params, init, setting.dtype)

    def noisy(at: Params) -> tuple[Any, ...]:
        grads = tree.grad(setting.inner)(at)
        return (grads, statistic(at)) if statistic is not None else (grads,)

    here = (inner_grad, statistic(params)) if statistic is not None else (inner_grad,)
    noise, *statistic_noise = measure_noise(noisy, params, here, outer_grad, scale)
    zero = jnp.zeros((), setting.dtype)
    return FreePoint(
        params, solution, outer_loss, aux, inner_grad, outer_grad, tree.norm(outer_grad).astype(setting.dtype), scale,
        noise.astype(setting.dtype), statistic_noise[0].astype(setting.dtype) if statistic_noise else zero,
    )  # fmt: skip


def free_status(point: FreePoint, residual: jax.Array, response_norm: jax.Array) -> jax.Array:
    """Whether learning had ended where the meta-gradient was taken.

    Args:
      point: the free phase.
      residual: gradient norm of the inner loss where the meta-gradient was taken.
      response_norm: ||u||, u = H^-1 v: its ratio to ||v|| is the inverse curvature that turns a residual into a
        distance in `params`, in the direction that matters to the outer loss.
    """
    safe = jnp.where(point.nudge_norm > 0, point.nudge_norm, 1)
    distance = residual * jnp.where(point.nudge_norm > 0, response_norm / safe, 0)
    at_floor = residual <= NOISE_FLOOR * point.noise
    unlearned = flag((distance > UNLEARNED * point.scale) & ~at_floor, Status.FREE_NOT_CONVERGED)
    reported = point.solution.status
    excused = (reported == Status.FREE_NOT_CONVERGED) & at_floor
    return worst(unlearned, jnp.where(excused, jnp.int32(Status.CONVERGED), reported))
