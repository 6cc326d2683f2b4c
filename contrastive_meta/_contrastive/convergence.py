"""Convergence tests: whether learning and the phases ended where they should, as statuses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import NOISE_FLOOR, UNCONVERGED, BasePoint, FreeResidual, free_status
from contrastive_meta._contrastive.newton_step import Line
from contrastive_meta._contrastive.phases import PhaseSetup
from contrastive_meta._result import Status, flag, worst

# The truncation error of a scheme of order p is of the order of nonlinearity^p.
_LARGEST_TRUNCATION = 1e-2
# Learning has ended, next to a nudge, when its gradient is below this fraction of the nudge.
_ENDED = 1e-3


class Convergence(NamedTuple):
    """How far phases came, all scalars.

    Attributes:
      free_residual: norm of the inner gradient at the base point.
      nudged_residual: norm of v - H u over that of v.
      displacement: of the nudged phases, relative to the length of `params`.
      status: of both.
    """

    free_residual: jax.Array
    nudged_residual: jax.Array
    displacement: jax.Array
    status: jax.Array


def learning_ended(setup: PhaseSetup, gradient: jax.Array, strength: jax.Array) -> jax.Array:
    """Whether what learning left over is little beside what a nudge adds.

    Args:
      setup: what the phases are.
      gradient: norm of the inner gradient.
      strength: of the nudge.
    """
    return gradient < _ENDED * strength * tree.or_one(setup.start.nudge_norm)


def usual_nudge(start: BasePoint, nudge: jax.Array) -> jax.Array:
    """What nudges are measured in: the larger one of those at the free solution and elsewhere; 1 where both are 0."""
    return tree.or_one(jnp.maximum(start.nudge_norm, nudge))


def converged(
    setup: PhaseSetup,
    line: Line,
    left: FreeResidual,
    missing: jax.Array,
    nudge_unbounded: jax.Array,
    downward: jax.Array,
) -> Convergence:
    """The statuses of phases.

    Args:
      setup: what the phases were to be.
      line: what was measured.
      left: how far learning was from converged at the base point.
      missing: length of what is missing of the response.
      nudge_unbounded: whether a nudged loss has no minimum where its phase went.
      downward: whether the inner loss was found to curve downwards.
    """
    start, contrast = setup.start, line.contrast
    nudges = [line.base.outer.in_params, contrast.residual]
    pull, residual, length = setup.norms(nudges=nudges, responses=[line.response])
    nudge = usual_nudge(start, pull)
    # A nudge that vanishes where learning ends asks for no response.
    vanishes = pull <= NOISE_FLOOR * start.eps * nudge
    unresponsive = (residual > UNCONVERGED * nudge) | ((missing > UNCONVERGED * length) & ~vanishes)
    gain = setup.stencil.gain / tree.or_one(contrast.beta)
    # A response that never came leaves a zero that any noise exceeds: that is not the noise's doing.
    drowned = (start.noise * gain * NOISE_FLOOR > nudge) | ((contrast.noise * NOISE_FLOOR > 1) & ~unresponsive)
    anything = (start.nudge_norm > 0) | (pull > 0)
    # H u = v - residual: its product with u is the curvature that the nudge met.
    met = tree.scale(1 / nudge, tree.subtract(line.base.outer.in_params, contrast.residual))
    indefinite = tree.vdot(tree.scale(1 / tree.or_one(length), line.response), met) < -1e-3
    learned = tree.all_finite((start.params, start.outer_grad))
    finite = tree.all_finite((contrast.grad, line.response, line.base.params))
    coarse = contrast.nonlinearity**setup.order > _LARGEST_TRUNCATION
    unbounded = nudge_unbounded | (contrast.nonlinearity > 0.5)
    status = worst(
        free_status(start, left),
        flag(anything & coarse, Status.APPROXIMATE),
        flag(anything & unresponsive, Status.NUDGED_NOT_CONVERGED),
        flag(anything & drowned, Status.LOST_IN_NOISE),
        flag(indefinite | downward, Status.INDEFINITE_CURVATURE),
        flag((anything & unbounded & ~drowned) | (learned & ~finite), Status.UNBOUNDED_NUDGE),
        setup.scheme.template().validity(setup.dtype),
        flag(~learned, Status.NOT_FINITE),
    )
    displacement = contrast.beta * length / start.scale
    return Convergence(left.residual, (residual / nudge).astype(setup.dtype), displacement.astype(setup.dtype), status)
