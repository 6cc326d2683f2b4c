"""One trust-region Newton step: both linear systems, the trial point, and whether it is accepted."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import NOISE_FLOOR, difference_step
from contrastive_meta._contrastive.linear_solve import FLAT, GradientDifference, Limits, solve
from contrastive_meta._contrastive.phases import Base, PhaseSetup
from contrastive_meta._contrastive.step_size import Contrast
from contrastive_meta._control import settle
from contrastive_meta._problem import Params

# Two-sided differences take steps this many times as long: their error is of the next order.
_WIDER = 2.0
# Forcing term: one pass reduces a residual to eps**0.45, the accuracy of products by one-sided gradient differences:
# 1e-7 in float64 and 1e-3 in float32.
FORCING = 0.45
# A step of that fraction of the length of `params` changes gradients and responses by about this fraction.
_MOVES = 0.5
# A step is accepted if the reduction of the loss is at least this fraction of the predicted one.
_SUFFICIENT_DECREASE = 0.1
# From this ratio of actual to predicted reduction on, the trust radius may grow.
GOOD_RATIO = 0.7
# A step on which the gradient grows by more than this factor, on a way longer than this fraction of `params`, leads out
# of the basin of the free phase: the loss has to fall by as much as predicted.
GROWN, LONG = 2.0, 0.1
# Newton's step may move the base point by this fraction of the length of `params` at first.
RADIUS = 0.3


class Line(NamedTuple):
    """The line base - beta u on which phases lie, and what was measured on it."""

    base: Base
    response: Params  # u
    contrast: Contrast


class Region(NamedTuple):
    """The trust region, and how the way to the base point went.

    Attributes:
      radius: the longest step of the base point.
      at_boundary: whether the last step went that far or farther: the nudge is not response_converged yet.
      grew: whether gradients grew on the way while the loss fell.
      uncertain: whether the way was so long that it may lead to another minimum than the learner's.
      delayed: whether the nudge is not response_converged before the base point has converged.
      converged: whether the inner gradient is too small to matter.
      two_sided: whether products are taken on both sides, since the third derivative common_curvature one-sided ones.
      least: least curvature met so far.
      change: of the response by the last pass, relative, times how much the pass reduced the residual.
      reduction: what strengths and difference steps are divided by.
      indefinite: whether the response met downward curvature.
      unresolved: least length of the response along directions too flat for differences.
      too_strong: whether the residual of the nudge was measured at too strong a nudge to be solved for.
      unsettled: whether the curvature still changed much along the last step of the base point that was no noise.
    """

    radius: jax.Array
    at_boundary: jax.Array
    grew: jax.Array
    uncertain: jax.Array
    delayed: jax.Array
    converged: jax.Array
    two_sided: jax.Array
    least: jax.Array
    change: jax.Array
    reduction: jax.Array
    indefinite: jax.Array
    unresolved: jax.Array
    too_strong: jax.Array
    unsettled: jax.Array

    @classmethod
    def around(cls, setup: PhaseSetup, inner_grad: Params) -> "Region":
        """The trust region before the first step."""
        dtype, false = setup.dtype, jnp.asarray(False)
        one, zero = jnp.ones((), dtype), jnp.zeros((), dtype)
        return cls(
            radius=(RADIUS * setup.start.scale).astype(dtype),
            at_boundary=false,
            grew=false,
            uncertain=false,
            delayed=false,
            converged=setup.norm(inner_grad) <= 2 * setup.start.noise,
            two_sided=false,
            least=jnp.full((), jnp.inf, dtype),
            change=one,
            reduction=one,
            indefinite=false,
            unresolved=zero,
            too_strong=false,
            unsettled=false,
        )


class Systems(NamedTuple):
    """Two right-hand sides b of H x = b, for the base point and for the response, and when to end.

    Attributes:
      rhs: both.
      active: which of them to solve.
      residual: at which norm of b - H x to end.
      step: at which length of the rest of the base point's step to end.
      radius: longest solution of the first.
      num_steps: budget of each.
      forcing: residual per length of the first solution that is left anyway.
      delay: whether the second may be given up.
      guess: first direction of the second.
    """

    rhs: tuple[Params, Params]
    active: jax.Array
    residual: jax.Array
    step: jax.Array
    radius: jax.Array
    num_steps: jax.Array
    forcing: jax.Array
    delay: jax.Array
    guess: Params


class Solved(NamedTuple):
    """The solutions of both systems."""

    step: Params
    response_step: Params
    lengths: jax.Array  # norms of both right-hand sides
    gradient_norm: jax.Array  # at the base point
    left: jax.Array  # norms of both residuals, relative to those
    slack: jax.Array  # <x, b - H x> of the first
    cauchy: jax.Array  # lengths of the steps down both right-hand sides, lower bounds of the solutions'
    least: jax.Array  # least curvature met
    indefinite: jax.Array  # of the second
    flat: jax.Array  # of the second
    given_up: jax.Array
    num_steps: jax.Array
    num_gradients: jax.Array

    @classmethod
    def nothing(cls, setup: PhaseSetup, base: Base) -> "Solved":
        """Where there is no system to solve."""
        two, none, false = jnp.zeros((2,), setup.dtype), tree.zeros_like(base.params), jnp.asarray(False)
        steps, infinite = jnp.zeros((2,), jnp.int32), jnp.full((), jnp.inf, setup.dtype)
        norm = setup.norm(base.inner_grad)
        return cls(
            none, none, two, norm, two, two[0], two, infinite, false, false, false, steps, steps[0],
        )  # fmt: skip


class Trial(NamedTuple):
    """A trial point, assessed by the gradient there.

    Attributes:
      distance: from the last base point.
      at_boundary: whether that is the longest allowed.
      arrived: whether the step is lost in the rounding of `params`.
      ratio: actual over predicted reduction of the inner loss.
      decreases: whether that is enough for gradients to be allowed to grow.
      sound: whether the point is one to stay at.
    """

    distance: jax.Array
    at_boundary: jax.Array
    arrived: jax.Array
    ratio: jax.Array
    decreases: jax.Array
    sound: jax.Array


def difference_at(setup: PhaseSetup, base: Base, region: Region) -> GradientDifference:
    """The Hessian at a base point."""
    start, dtype = setup.start, setup.dtype
    step, _ = difference_step(setup.instance, start)
    step = (jnp.where(region.two_sided, _WIDER, 1.0) * step / region.reduction).astype(dtype)
    inner_grad = tree.grad(setup.instance.inner)
    return GradientDifference(
        inner_grad,
        base.params,
        base.inner_grad,
        step,
        start.noise,
        region.two_sided,
        setup.sequential,
        dtype,
        start.preconditioner,
    )


def solve_systems(setup: PhaseSetup, base: Base, region: Region, systems: Systems) -> Solved:
    """Solve for the step of the base point and for the step of the response."""
    dtype = setup.dtype
    norms = tree.norms(*systems.rhs, base.inner_grad).astype(dtype)
    lengths, gradient_norm = norms[:2], norms[2]
    units = tree.or_one(lengths)
    scaled = [tree.scale(1 / unit, b) for unit, b in zip(units, systems.rhs, strict=True)]
    rhs = jax.tree.map(lambda *xs: jnp.stack(xs), *scaled)
    limits = Limits(
        systems.residual / units,
        systems.step / units,
        jnp.broadcast_to(region.least, (2,)),
        jnp.stack([systems.radius / units[0], jnp.asarray(jnp.inf, dtype)]),
        systems.num_steps,
    )
    difference = difference_at(setup, base, region)
    found, given_up = solve(
        difference,
        rhs,
        systems.guess,
        systems.active,
        Limits(*(x.astype(dtype) if x.dtype != jnp.int32 else x for x in limits)),
        (systems.forcing * units[0]).astype(dtype),
        delay=systems.delay,
    )
    step, response_step = (tree.scale(u, x) for u, x in zip(units, tree.unstack(found.x, 2), strict=True))
    first, residual = (jax.tree.map(lambda xs: xs[0], of) for of in (found.x, found.residual))
    return Solved(
        step=step,
        response_step=response_step,
        lengths=lengths,
        gradient_norm=gradient_norm,
        left=jnp.sqrt(found.squared),
        slack=(units[0] ** 2 * tree.vdot(first, residual)).astype(dtype),
        cauchy=lengths * found.cauchy,
        least=jnp.min(found.least),
        indefinite=found.indefinite[1],
        flat=found.flat[1],
        given_up=given_up,
        num_steps=found.num_steps,
        num_gradients=jnp.where(region.two_sided, 2, 1) * jnp.sum(found.num_steps, dtype=jnp.int32),
    )


def unresolved_length(setup: PhaseSetup, base: Base, region: Region, solved: Solved) -> jax.Array:
    """A residual e along curvature h hides a response of length ||e|| / h."""
    resolution = difference_at(setup, base, region).resolution
    length = solved.lengths[1] * solved.left[1] / tree.or_one(FLAT * resolution)
    return jnp.where(solved.flat, length, 0.0)


def assess_trial(setup: PhaseSetup, before: Base, trial: Base, solved: Solved, region: Region) -> Trial:
    """Whether a trial point is one to stay at: the gradient there is smaller, or the loss fell as predicted."""
    start = setup.start
    moved, way = tree.subtract(trial.params, before.params), tree.subtract(trial.params, start.params)
    new, distance, step, gone = setup.norms([trial.inner_grad], steps=[moved, solved.step, way])
    # Actual reduction by the trapezoidal rule, from the slopes along the step.
    here, there = tree.vdot(solved.step, before.inner_grad), tree.vdot(solved.step, trial.inner_grad)
    expected = here - solved.slack
    ratio = jnp.where(expected < 0, (here + there) / jnp.where(expected < 0, expected, -1.0), 0.0)
    old = solved.gradient_norm
    # Within the noise there is nowhere to go.
    anywhere = old > NOISE_FLOOR * start.noise
    # Far from a minimum no step goes most of the way, and gradients may grow although the loss decreases.
    wanted = jnp.where((gone > LONG * start.scale) & (new > GROWN * old), GOOD_RATIO, _SUFFICIENT_DECREASE)
    decreases = (ratio > wanted) & anywhere & (distance > 0)
    sound = jnp.isfinite(new) & ((new <= jnp.maximum(old, NOISE_FLOOR * start.noise)) | decreases)
    at_boundary = (distance > 0.99 * region.radius) & anywhere
    arrived = (distance == 0) & (step > 0)
    sound, decreases, at_boundary, arrived = settle(sound, decreases, at_boundary, arrived)
    return Trial(distance, at_boundary, arrived, ratio.astype(setup.dtype), decreases, sound)


def systems_of_a_step(
    setup: PhaseSetup, line: Line, region: Region, target: jax.Array, nudge_norm: jax.Array, budget: Any, guess: Params
) -> Systems:
    """The two systems of a pass: the inner gradient, and the residual of the nudge.

    Args:
      setup: what the phases are to be.
      line: where.
      region: how long a step may be.
      target: residual of the nudge to reach, relative to the nudge.
      nudge_norm: norm of the nudge.
      budget: most steps of each system.
      guess: first direction of the response.
    """
    start = setup.start
    forcing = start.eps**FORCING
    unresponsive, _, left = nudge_residual(setup, line)
    lefts = setup.norm(line.base.inner_grad), left
    size = sum(x.size for x in jax.tree.leaves(start.params))
    # Rounding noise of the gradient in one direction of many.
    resolved = 2 * start.noise / size**0.5
    zero = jnp.zeros((), setup.dtype)
    return Systems(
        rhs=(tree.scale(-1.0, line.base.inner_grad), unresponsive),
        active=jnp.stack(
            [~region.converged, ~region.at_boundary & ~region.delayed & ~region.too_strong & (lefts[1] > 0)]
        ),
        residual=jnp.stack(
            [jnp.maximum(resolved, forcing * lefts[0]), jnp.maximum(0.3 * target * nudge_norm, forcing * lefts[1])]
        ).astype(setup.dtype),
        step=jnp.stack([0.1 * target * start.scale, zero]).astype(setup.dtype),
        radius=region.radius,
        num_steps=budget,
        forcing=_MOVES / start.scale,
        delay=jnp.asarray(True),
        guess=guess,
    )


def nudge_residual(setup: PhaseSetup, line: Line) -> tuple[Params, jax.Array, jax.Array]:
    """The residual of the nudge, whether the response is to start anew since it leaves more than none, and its norm."""
    left, whole = setup.norms(nudges=[line.contrast.residual, line.base.outer.in_params])
    anew = ~(left <= whole)
    residual: Params = tree.where(anew, line.base.outer.in_params, line.contrast.residual)
    return residual, anew, jnp.where(anew, whole, left)
