"""The free solution as every estimator judges it: losses and gradients there, and whether learning had ended."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._estimators.base import Setting
from contrastive_meta._problem import Params, Status, flag, worst
from contrastive_meta._response import length_scale, measure_noise
from contrastive_meta._solvers.base import Solution

# Learning has ended when what is left to learn would move `params`, or the outer gradient there, by less than this
# fraction of their norms.
UNLEARNED = 1e-2
# The response to the nudge is solved when what is left of the nudge, or of the response, is below this fraction of it.
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


# Spent by `survey` (the inner and outer gradients at the solution, three for the noise) and by `free_status`.
NUM_GRADIENTS = 5 + 3


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


def newton_step(
    curve: Callable[[Params], Params], remainder: Params, least_curvature: jax.Array
) -> tuple[Params, jax.Array]:
    """`remainder` over the curvature along itself, and the length of that: what H^-1 would at least make of it.

    For positive definite H the Cauchy-Schwarz inequality gives e' H^-1 e >= (e'e)^2 / e'He, so a remainder that is too
    large by this measure is too large; leftovers of unfinished learning lie along low curvature, where it is sharp.

    Args:
      curve: `x -> H x`.
      remainder: e.
      least_curvature: curvatures below it are not told from rounding.
    """
    squared = tree.vdot(remainder, remainder)
    present = squared > 0
    curvature = tree.vdot(remainder, curve(remainder)) / jnp.where(present, squared, 1)
    inverse = jnp.where(present, 1 / jnp.maximum(curvature, least_curvature), 0)
    return tree.scale(inverse, remainder), inverse * jnp.sqrt(squared)


def gradient_difference(setting: Setting, point: FreePoint, at: Params, inner_grad: Params) -> tuple[Any, jax.Array]:
    """`x -> H x` at `at` by one-sided differences of the inner gradient, and the least curvature they resolve."""
    distance = 3 * jnp.sqrt(jnp.finfo(setting.dtype).eps) * point.scale

    def curve(x: Params) -> Params:
        length = tree.norm(x)
        step = distance / jnp.where(length > 0, length, 1)
        moved = tree.grad(setting.inner)(tree.add_scaled(at, step, x))
        return tree.scale(1 / step, tree.subtract(moved, inner_grad))

    smallest = jnp.finfo(setting.dtype).tiny
    return curve, jnp.maximum(point.noise / distance, smallest)


def free_status(setting: Setting, point: FreePoint, at: Params, inner_grad: Params) -> jax.Array:
    """Whether learning had ended where the meta-gradient was taken: 1 inner and 2 outer gradients.

    It had not if the step that is at least left to take would move `params`, or change what the outer loss asks for
    there, by more than `UNLEARNED` of either; unless the residual is at the floor of the dtype.

    Args:
      setting: the problem.
      point: the free phase.
      at: where the meta-gradient was taken.
      inner_grad: gradient of the inner loss there.
    """
    curve, least = gradient_difference(setting, point, at, inner_grad)
    step, distance = newton_step(curve, inner_grad, least)
    here, there = tree.grad(setting.outer)(at), tree.grad(setting.outer)(tree.subtract(at, step))
    shifted = tree.norm(tree.subtract(there, here)) > UNLEARNED * tree.norm(here)
    residual = tree.norm(inner_grad)
    at_floor = residual <= NOISE_FLOOR * point.noise
    # Without a nudge there is nothing for the solution to matter to.
    unlearned = ((distance > UNLEARNED * point.scale) | shifted) & ~at_floor & (point.nudge_norm > 0)
    reported = point.solution.status
    refined = residual < 1e-3 * point.solution.residual
    excused = (reported == Status.FREE_NOT_CONVERGED) & (at_floor | refined)
    return worst(
        flag(unlearned, Status.FREE_NOT_CONVERGED),
        jnp.where(excused, jnp.int32(Status.CONVERGED), reported),
    )
