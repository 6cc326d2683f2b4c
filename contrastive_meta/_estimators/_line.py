"""The line on which the phases of a nearly quadratic loss lie, and where Newton's step leads from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import only_if
from contrastive_meta._estimators._free_point import NOISE_FLOOR, FreePoint, OuterEvaluated, difference_step
from contrastive_meta._estimators._gauge import Gauge, Measured
from contrastive_meta._estimators._krylov import FLAT, Difference, Limits, System, begin
from contrastive_meta._estimators._krylov_pair import solve_pair
from contrastive_meta._estimators._phases import Nudging
from contrastive_meta._problem import Params

# Differences on both sides of a base point take steps this many times as long: their error is of the next order.
_WIDER = 2.0
# Products are bent by the third derivative if a pass leaves more than this many times what they are accurate to; on
# convex problems and tanh networks it leaves up to 3 times that, on badly conditioned ones 5 to 100 times.
_BENT = 4.0
# Of a remainder, one pass is asked to leave this power of the dtype's eps: what products that are one-sided gradient
# differences are accurate to, 1e-7 in float64 and 1e-3 in float32.
_FORCING = 0.45
# A step of that part of the length of `params` changes gradients and responses by about this part of itself.
_MOVES = 0.5
# A step is taken if the loss falls by this part of what was foretold.
_FALLS = 0.1
# Where it falls by this part the next may be as long again.
AS_FORETOLD = 0.7
# A step on which the gradient grows by more than this, on a way longer than that part of `params`, leads out of the
# neighbourhood of the free solution: the loss has to fall as foretold.
GROWN, LONG = 2.0, 0.1


class Line(NamedTuple):
    """The line base - beta u, on which the phases lie, and what their gradients say of it."""

    base: Params
    response: Params  # u
    phases: Measured  # their statistic is zeros until a pass has measured it
    base_grad: Params  # gradient of the inner loss at the base point: what is left of learning
    base_outer: OuterEvaluated  # the outer loss there
    learned: jax.Array  # whether what is left of learning is too little to matter
    chosen: jax.Array  # the displacement found best, relative to the length of `params`; 0 for none
    tol: jax.Array  # of the remainder, relative to the nudge
    least: jax.Array  # least curvature met so far
    radius: jax.Array  # the longest step of the base point
    far: jax.Array  # whether the last pass went that far or too far: no place yet to answer the nudge
    grown: jax.Array  # whether gradients grew on the way while the loss fell
    astray: jax.Array  # whether it was then so long that it may lead to another minimum than the learner's
    waits: jax.Array  # whether the nudge is not to be answered before the base point has arrived
    both: jax.Array  # whether products are taken on both sides, since those on one were bent
    change: jax.Array  # of the response by the last pass, relative, times what the pass left of the remainder
    num_steps: jax.Array  # of each of the two systems, shape (2,)
    num_passes: jax.Array
    num_gradients: jax.Array
    indefinite: jax.Array
    hidden: jax.Array  # least length of the response along directions too flat for differences, by the last pass
    measured: jax.Array  # whether a pass has measured this line
    running: jax.Array


class Place(NamedTuple):
    """A base point, and the step that led there."""

    base: Params
    base_grad: Params
    base_outer: OuterEvaluated
    distance: jax.Array  # from the last one
    far: jax.Array  # whether that is the longest allowed
    arrived: jax.Array  # whether the step is lost in the rounding of `params`
    foretold: jax.Array  # by what the inner loss fell on the way, over what its curvature foretold
    falls: jax.Array  # whether that is enough for gradients to be allowed to grow
    sound: jax.Array  # whether it is a place to stay at


class Turn(NamedTuple):
    """One system H x = b and its solution."""

    left: jax.Array  # norm of b
    anew: jax.Array  # whether b is all of the nudge
    x: Params
    unforeseen: jax.Array  # <x, b - H x>
    squared: jax.Array  # ||b - H x||^2 / ||b||^2
    least: jax.Array
    indefinite: jax.Array
    flat: jax.Array
    num_steps: jax.Array


class Moved(NamedTuple):
    """Where a pass leads."""

    place: Place
    response: Params
    left: jax.Array  # norm of what was left of the nudge before the step
    more: jax.Array  # norm of what is added to the response; 0 on the way
    hidden: jax.Array
    away: jax.Array  # whether the base point is on its way: nothing was done about the response
    least: jax.Array
    indefinite: jax.Array
    too_long: jax.Array  # whether the response is to wait: both at once take too many steps
    num_steps: jax.Array  # of each of the two systems, shape (2,)
    num_gradients: jax.Array


class Mover:
    """Takes Newton's step from lines, with what stays the same in all steps.

    Args:
      nudging: what the phases are to be.
      point: where the free phase ended.
      gauge: what measures the nudge.
    """

    def __init__(self, nudging: Nudging, point: FreePoint, gauge: Gauge) -> None:
        self.nudging, self.setting, self.point, self.gauge = nudging, nudging.setting, point, gauge
        self.guess = nudging.response
        self.dtype = self.setting.dtype
        self.inner_grad = tree.grad(self.setting.inner)
        self.forcing: float = point.eps**_FORCING
        self.distance, _ = difference_step(self.setting, point)

    def move(self, line: Line, target: jax.Array, budget: jax.Array) -> Moved:
        """Newton's step of the base point and, unless that is on the way, the response.

        Both are solved for at once, which leaves of the nudge what the step changes in its answer. Where they take many
        steps that is too much: then the nudge waits until the base point has arrived.

        Args:
          line: from where.
          target: remainder of the nudge to reach, relative to it.
          budget: most steps of conjugate gradients for each of the two, shape (2,).
        """
        learned, answer, too_long = self._solve(line, target, budget)
        place = self._learn(line, learned)
        # What is answered on the way, or nothing was there to be answered yet: that is for the next place.
        away = line.far | place.far | ~place.sound | line.waits | too_long
        away |= (answer.left == 0) & (place.distance > 0)
        answer = answer._replace(x=tree.where(away, tree.zeros_like(answer.x), answer.x))
        # A remainder e along curvature h hides a response of length ||e|| / h.
        resolution = self._difference(line).resolution
        hidden = answer.left * jnp.sqrt(answer.squared) / tree.or_one(FLAT * resolution)
        return Moved(
            place,
            tree.add(tree.where(answer.anew, tree.zeros_like(line.response), line.response), answer.x),
            answer.left,
            self.setting.norm(answer.x),
            jnp.where(answer.flat, hidden, 0.0),
            away,
            # What is left of learning lies along low curvature.
            jnp.minimum(learned.least, answer.least),
            answer.indefinite,
            too_long,
            jnp.stack([learned.num_steps, answer.num_steps]),
            (1 + line.both) * (learned.num_steps + answer.num_steps) + 2 * (place.distance > 0),
        )

    def bent(self, moved: Moved, left: jax.Array) -> jax.Array:
        """Whether a pass at rest left more of the nudge, by measurement, than products as accurate as can be."""
        return (left > _BENT * self.forcing * moved.left) & (moved.place.distance == 0) & ~moved.away

    def _solve(self, line: Line, target: jax.Array, budget: jax.Array) -> tuple[Turn, Turn, jax.Array]:
        """What learning left over and what is left of the nudge, solved; whether the second waits instead."""
        scale, none = self.point.scale, jnp.zeros((), self.dtype)
        unanswered, anew = self._unanswered(line)
        lefts = self.setting.norm(line.base_grad), self.setting.norm(unanswered)
        units = tree.or_one(lefts[0]), tree.or_one(lefts[1])

        def limits(remainder: jax.Array, step: jax.Array, radius: jax.Array) -> Limits:
            told = jnp.maximum(remainder, self.forcing), step, line.least, radius
            return Limits(*(limit.astype(self.dtype) for limit in told))

        of_learning = limits(self._resolved / units[0], 0.1 * target * scale / units[0], line.radius / units[0])
        of_nudge = limits(
            0.3 * target * self.gauge.nudge(line.base_outer) / units[1], none, jnp.full_like(none, jnp.inf)
        )
        guess = tree.scale(jnp.where(line.num_passes == 0, 1.0, 0.0), self.guess)
        right = tree.scale(-1 / units[0], line.base_grad), tree.scale(1 / units[1], unanswered)
        # On the way the nudge is not answered.
        answers = ~line.far & ~line.waits & (lefts[1] > 0)
        pair = (
            begin(self.dtype, right[0], tree.zeros_like(guess), ~line.learned, of_learning),
            begin(self.dtype, right[1], guess, answers, of_nudge),
        )
        forcing = (_MOVES * units[0] / scale).astype(self.dtype)
        difference, ends = self._difference(line), (of_learning, of_nudge)
        *found, too_long = solve_pair(difference, pair, ends, forcing, budget, sequential=self.nudging.sequential)

        def taken(left: jax.Array, unit: jax.Array, system: System) -> Turn:
            unforeseen = unit**2 * tree.vdot(system.x, system.remainder).astype(self.dtype)
            return Turn(
                left, anew, tree.scale(unit, system.x), unforeseen, system.squared, system.least, system.indefinite,
                system.flat, system.num_steps,
            )  # fmt: skip

        learned, answer = map(taken, lefts, units, found)
        return learned, answer, too_long

    def _unanswered(self, line: Line) -> tuple[Params, jax.Array]:
        """What is left of the nudge, and whether to answer it anew: less is left without any response."""
        left = line.phases.remainder
        whole = self.gauge.nudge_at(line.base_outer)
        anew = ~(self.setting.norm(left) <= self.setting.norm(whole))
        return tree.where(anew, whole, left), anew

    def _learn(self, line: Line, solved: Turn) -> Place:
        """Where a step leads; nothing is evaluated unless it moves."""
        base, noise = tree.add(line.base, solved.x), self.point.noise
        distance = self.setting.norm(tree.subtract(base, line.base))
        # Differences are taken from the gradient at the base point, so that has to be exact, not interpolated.
        base_grad, base_outer = only_if(
            distance > 0,
            lambda _: (self.inner_grad(base), self.setting.outer_value_and_grad(base)),
            (line.base_grad, line.base_outer),
        )
        # By the trapezoidal rule, from the slopes along the step.
        here, there = tree.vdot(solved.x, line.base_grad), tree.vdot(solved.x, base_grad)
        expected = here - solved.unforeseen
        foretold = jnp.where(expected < 0, (here + there) / jnp.where(expected < 0, expected, -1.0), 0.0)
        before, now = self.setting.norm(line.base_grad), self.setting.norm(base_grad)
        # Within the noise there is nowhere to go.
        anywhere = before > NOISE_FLOOR * noise
        # Far from a minimum no step goes most of the way, and gradients may grow while the loss falls.
        gone = self.setting.norm(tree.subtract(base, self.point.params)) > LONG * self.point.scale
        wanted = jnp.where(gone & (now > GROWN * before), AS_FORETOLD, _FALLS)
        falls = (foretold > wanted) & anywhere & (distance > 0)
        sound = jnp.isfinite(now) & ((now <= jnp.maximum(before, NOISE_FLOOR * noise)) | falls)
        far = (distance > 0.99 * line.radius) & anywhere
        arrived = (distance == 0) & (self.setting.norm(solved.x) > 0)
        return Place(base, base_grad, base_outer, distance, far, arrived, foretold, falls, sound)

    def _difference(self, line: Line) -> Difference:
        distance = jnp.where(line.both, _WIDER, 1.0).astype(self.dtype) * self.distance / line.phases.shrink
        return Difference(self.inner_grad, line.base, line.base_grad, distance, self.point.noise, self.dtype, line.both)

    @property
    def _resolved(self) -> jax.Array:
        """Rounding noise of the gradient in one direction of many."""
        size = sum(x.size for x in jax.tree.leaves(self.point.params))
        return jnp.asarray(2 * self.point.noise / size**0.5, self.dtype)
