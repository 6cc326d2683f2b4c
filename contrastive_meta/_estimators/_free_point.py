"""The free solution as every estimator judges it: losses and gradients there, and whether learning had ended."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._instance import Instance
from contrastive_meta._problem import Params
from contrastive_meta._response import length_scale, measure_noise
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers.base import Solution

# Learning has ended when what is left to learn would move `params`, or the outer gradient there, by less than this
# fraction of their norms.
UNLEARNED = 1e-2
# The response to the nudge is solved when what is left of the nudge, or of the response, is below this fraction of it.
UNANSWERED = 1e-2
# A residual within this factor of the rounding noise is as small as the dtype allows.
NOISE_FLOOR = 10.0


# The outer loss with its aux, and its gradient.
OuterEvaluated = tuple[tuple[jax.Array, Any], Params]


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
      curvature: of the inner loss along v: the norm of H v over that of v; along ones where v is 0.
      eps: relative rounding of the coarsest of losses and `params`.
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
    curvature: jax.Array
    eps: float

    @property
    def outer(self) -> OuterEvaluated:
        """What `Instance.outer_value_and_grad` gave here."""
        return (self.outer_loss, self.aux), self.outer_grad

    def usual_nudge(self, outer_grad: Params) -> jax.Array:
        """What nudges are measured in: the larger norm of the outer gradients here and elsewhere; 1 where both are 0.

        Where learning has not ended there may be no nudge yet.
        """
        return tree.or_one(jnp.maximum(self.nudge_norm, tree.norm(outer_grad).astype(self.nudge_norm.dtype)))


# Spent by `survey`: the inner gradient three times, the outer one once.
NUM_GRADIENTS = 4


def survey(setting: Instance, params: Params, solution: Solution, init: Params) -> FreePoint:
    """Evaluate both losses at the free solution and measure the rounding noise of the inner gradient.

    Args:
      setting: the problem.
      params: where the free phase ended.
      solution: of the free phase.
      init: where learning started.
    """
    (outer_loss, aux), outer_grad = setting.outer_value_and_grad(params)
    scale, eps = length_scale(params, init, setting.dtype), tree.coarsest_eps(setting.dtype, params)
    nudge_norm = setting.norm(outer_grad)
    # Without a nudge any direction does.
    direction = tree.where(nudge_norm > 0, outer_grad, jax.tree.map(jnp.ones_like, params))
    inner_grad, noise, curvature = measure_noise(tree.grad(setting.inner), params, direction, scale, eps)
    return FreePoint(
        params, solution, outer_loss, aux, inner_grad, outer_grad, nudge_norm, scale, noise, curvature, eps
    )


def newton_length(remainder: Params, product: Params, least_curvature: jax.Array, length: jax.Array) -> jax.Array:
    """The length of what H^-1 would at least make of `remainder`: its norm over the curvature along itself.

    For positive definite H the Cauchy-Schwarz inequality gives e' H^-1 e >= (e'e)^2 / e'He, so a remainder that is too
    large by this measure is too large; leftovers of unfinished learning lie along low curvature, where it is sharp.

    Args:
      remainder: e.
      product: H e.
      least_curvature: curvatures below it are not told from rounding.
      length: norm of e.
    """
    per_length = 1 / tree.or_one(length)
    curvature = tree.vdot(tree.scale(per_length, remainder), tree.scale(per_length, product))
    return length / jnp.maximum(curvature, least_curvature)


def difference_step(setting: Instance, point: FreePoint) -> tuple[jax.Array, jax.Array]:
    """The length of a one-sided gradient difference, and the least curvature that it resolves."""
    # Rounding and curvature balance at the square root of the relative noise.
    scale = point.scale
    wanted = 3 * jnp.sqrt(point.noise * scale / tree.or_one(point.curvature))
    distance = jnp.clip(wanted, point.eps**0.5 * scale, 0.1 * scale)
    return distance, jnp.maximum(point.noise / distance, jnp.finfo(setting.dtype).tiny)


def free_status(setting: Instance, point: FreePoint, left: "LeftToLearn") -> jax.Array:
    """Whether learning had ended where the meta-gradient was taken.

    It had not if the step that is at least left to take would move `params`, or change what the outer loss asks for
    there, by more than `UNLEARNED` of either; unless the residual is at the floor of the dtype.
    """
    shifted = left.shift > UNLEARNED * left.nudge_norm
    at_floor = left.residual <= NOISE_FLOOR * point.noise
    # Without a nudge, here and ahead, there is nothing for the solution to matter to.
    matters = (point.nudge_norm > 0) | (left.nudge_norm > 0) | (left.shift > 0)
    unlearned = ((left.distance > UNLEARNED * point.scale) | shifted) & ~at_floor & matters
    reported = point.solution.status
    refined = left.residual < 1e-3 * point.solution.residual
    excused = (reported == Status.FREE_NOT_CONVERGED) & (at_floor | refined)
    return worst(
        flag(unlearned, Status.FREE_NOT_CONVERGED),
        jnp.where(excused, jnp.int32(Status.CONVERGED), reported),
    )


class LeftToLearn(NamedTuple):
    """What was left to learn where the meta-gradient was taken.

    Attributes:
      residual: norm of the inner gradient there.
      distance: length of the step that is at least left to take, see `newton_length`.
      shift: norm of the change that this step makes to the outer gradient.
      nudge_norm: norm of the outer gradient there.
    """

    residual: jax.Array
    distance: jax.Array
    shift: jax.Array
    nudge_norm: jax.Array
