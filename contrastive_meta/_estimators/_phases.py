"""What the phases of a scheme left behind, and what went wrong in them if anything did."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._estimators._free_point import (
    NOISE_FLOOR,
    UNANSWERED,
    FreePoint,
    gradient_difference,
    newton_step,
)
from contrastive_meta._estimators.base import Setting
from contrastive_meta._nudging import NudgeScheme
from contrastive_meta._problem import MetaParams, Params, Status, flag, worst

# The truncation error of a scheme of order p is of the order of bend^p.
UNTRUNCATED = 1e-2


class Phases(NamedTuple):
    """What the phases of a scheme left behind; every leaf has a leading axis of phases.

    Attributes:
      params: where each phase ended.
      statistic: what the plasticity rule measured there.
      residual: gradient of the phase's own loss there.
      status: of each phase's solver.
      num_gradients: of all phases together (no leading axis).
    """

    params: Params
    statistic: MetaParams
    residual: Params
    status: jax.Array
    num_gradients: jax.Array


def nudged_status(
    setting: Setting,
    point: FreePoint,
    scheme: NudgeScheme,
    phases: Phases,
    grad: MetaParams,
    response: Params,
    remainder: Params,
) -> jax.Array:
    """What went wrong in the nudged phases, judged from the same contrast as the meta-gradient."""
    nudge = or_one(point.nudge_norm)
    curve, least = gradient_difference(setting, point, point.params, point.inner_grad)
    _, missing = newton_step(curve, remainder, least)
    unanswered = (tree.norm(remainder) > UNANSWERED * nudge) | (missing > UNANSWERED * tree.norm(response))
    # A pure imaginary nudge is read off without subtraction: rounding is not divided by it.
    subtracts = len(scheme.nudges) > 1
    _, weights = scheme.arrays(setting.dtype)
    gain = jnp.sqrt(jnp.sum(jnp.abs(weights) ** 2)) * subtracts
    # A response that never came leaves a zero that any noise exceeds: that is not the noise's doing.
    drowned = (point.noise * gain * NOISE_FLOOR > nudge) | (
        (point.statistic_noise * gain * NOISE_FLOOR > tree.norm(grad)) & ~unanswered
    )
    anything = point.nudge_norm > 0
    # H response = remainder - v: its product with the response is the curvature that the nudge met.
    curvature = tree.vdot(response, tree.subtract(remainder, point.outer_grad))
    indefinite = curvature < -1e-3 * tree.norm(response) * nudge
    learned, finite = tree.all_finite((point.params, point.outer_grad)), tree.all_finite((grad, phases.params))
    bent = _bend(setting, point, scheme, phases, response)
    coarse = bent**scheme.order > UNTRUNCATED
    ran_away = jnp.any(phases.status == Status.DIVERGED) | _curves_downwards(point, scheme, phases) | (bent > 0.5)
    return worst(
        flag(anything & coarse, Status.APPROXIMATE),
        flag(anything & unanswered, Status.NUDGED_NOT_CONVERGED),
        flag(anything & drowned, Status.LOST_IN_NOISE),
        flag(indefinite, Status.INDEFINITE_CURVATURE),
        flag((anything & ran_away & ~drowned) | (learned & ~finite), Status.UNBOUNDED_NUDGE),
        scheme.validity(setting.dtype),
        flag(~learned, Status.NOT_FINITE),
    )


def _bend(setting: Setting, point: FreePoint, scheme: NudgeScheme, phases: Phases, response: Params) -> jax.Array:
    """How far learning is from linear over the span of the phases.

    It is 0 for quadratic losses, of the order of the displacement for smooth ones, and of order 1 where a kink or the
    rim of the basin lies between the phases. Two signs, the worse counts. The inner gradient at the mean of the
    phases' ends against the mean of their gradients, relative to the nudge. And, where learning had ended, how far
    the line through the phases' ends misses the free solution, relative to their displacement.
    """
    nudges, _ = scheme.arrays(setting.dtype)
    strength = scheme.strength(setting.dtype)
    nudge = strength * or_one(point.nudge_norm)

    def mean(trees: Params) -> Params:
        return jax.tree.map(lambda xs: jnp.mean(jnp.real(xs), axis=0), trees)

    def inner_grad(residual: Params, beta: jax.Array) -> Params:
        return tree.subtract(residual, tree.scale(beta, point.outer_grad))

    def without_response(params: Params, beta: jax.Array) -> Params:
        return tree.subtract(params, tree.scale(beta, response))

    expected = mean(jax.vmap(inner_grad)(phases.residual, nudges))
    found = tree.grad(setting.inner)(mean(phases.params))
    of_gradient = tree.norm(tree.subtract(found, expected)) / nudge
    missed = tree.subtract(mean(jax.vmap(without_response)(phases.params, nudges)), point.params)
    of_path = tree.norm(missed) / or_one(strength * tree.norm(response))
    # Before learning ends the phases drift on together, which bends nothing.
    ended = tree.norm(point.inner_grad) < 1e-3 * nudge
    return jnp.maximum(of_gradient, jnp.where(ended, of_path, 0.0))


def _curves_downwards(point: FreePoint, scheme: NudgeScheme, phases: Phases) -> jax.Array:
    """Whether a nudged loss has negative mean curvature along the path of its own phase: it has no minimum there."""
    if scheme.is_complex:
        return jnp.asarray(False)

    def curves(params: Params, residual: Params, beta: jax.Array) -> jax.Array:
        moved = tree.subtract(params, point.params)
        start = tree.add_scaled(point.inner_grad, beta, point.outer_grad)
        turned = tree.subtract(residual, start)
        return tree.vdot(turned, moved) < -1e-2 * tree.norm(turned) * tree.norm(moved)

    nudges, _ = scheme.arrays(tree.float_dtype(point.inner_grad))
    return jnp.any(jax.vmap(curves)(phases.params, phases.residual, nudges) & (nudges != 0))


def or_one(x: jax.Array) -> jax.Array:
    """`x` where it is positive, else 1: a divisor."""
    return jnp.where(x > 0, x, jnp.ones_like(x))
