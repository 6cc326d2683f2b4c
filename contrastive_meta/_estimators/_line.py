"""The line on which the phases of a nearly quadratic loss lie, and the search for it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, only_if
from contrastive_meta._estimators._free_point import (
    NOISE_FLOOR,
    UNANSWERED,
    FreePoint,
    OuterEvaluated,
    difference_step,
)
from contrastive_meta._estimators._gauge import Gauge, Measured
from contrastive_meta._estimators._krylov import FLAT, LEAST, Difference, Limits, System, solve_each
from contrastive_meta._estimators._phases import Goal, Nudging, Phases, on_line
from contrastive_meta._problem import Params

# Of a remainder, one pass is asked to leave this power of the dtype's eps: what products that are one-sided gradient
# differences are accurate to, 1e-7 in float64 and 1e-3 in float32.
_FORCING = 0.45
# The place of the response among the systems of a pass; learning comes first.
_RESPONSE = 1
# Newton's step may move the base point by this fraction of the length of `params`.
_RADIUS = 0.3
# A step is taken if the loss falls by this part of what was foretold.
_FALLS = 0.1
# A step on which the gradient grows by more than this, on a way longer than that part of `params`, leads out of the
# neighbourhood of the free solution.
_GROWN, _LONG = 2.0, 0.1
# The next may go twice as far if it falls by this part.
_AS_FORETOLD = 0.7


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
    change: jax.Array  # of the response by the last pass, relative, times what the pass left of the remainder
    num_steps: jax.Array
    num_passes: jax.Array
    num_gradients: jax.Array
    indefinite: jax.Array
    hidden: jax.Array  # least length of the response along directions too flat for differences, by the last pass
    measured: jax.Array  # whether a pass has measured this line
    running: jax.Array


class Moved(NamedTuple):
    """Where a pass leads."""

    base: Params
    response: Params
    base_grad: Params
    base_outer: OuterEvaluated
    distance: jax.Array  # of the base points
    far: jax.Array  # whether it is the longest allowed
    away: jax.Array  # whether the base point was on its way before or is so now: nothing was done about the response
    foretold: jax.Array  # by what the inner loss falls on the way, over what its curvature foretold
    more: jax.Array  # norm of what is added to the response; 0 on the way
    hidden: jax.Array
    systems: System


class Outcome(NamedTuple):
    """What a search came to.

    Attributes:
      phases: on the line.
      failed: whether the response was not found.
      unlearned: whether the base point is still on the way to a minimum.
      astray: whether that may be another minimum than the learner's.
    """

    phases: Phases
    failed: jax.Array
    unlearned: jax.Array
    astray: jax.Array


class Search:
    """One search for the line, with what stays the same in all passes."""

    def __init__(
        self, nudging: Nudging, point: FreePoint, tol: Any, max_steps: Any, max_passes: Any, go_astray: bool
    ) -> None:
        setting = nudging.setting
        self.nudging, self.point, self.setting = nudging, point, setting
        self.max_steps, self.max_passes, self.go_astray = max_steps, max_passes, go_astray
        self.dtype = setting.dtype
        self.inner_grad = tree.grad(setting.inner)
        eps = point.eps
        self.tol = jnp.asarray(10 * eps if tol is None else tol, setting.dtype)
        self.forcing = eps**_FORCING
        self.distance, _ = difference_step(setting, point)
        # What nudges may be more than the outer loss.
        self.first_nudge = tree.grad(
            self.nudging.nudged(point.params, point.outer_grad).flattened(nudging.flattening).outer
        )(point.params)
        self.nudge = tree.or_one(self._norm(self.first_nudge))
        self.gauge = Gauge(nudging, point, self.nudge)

    def start(self) -> Line:
        """The free solution, with no response yet and all of the nudge left."""
        point, none, false = self.point, jnp.int32(0), jnp.asarray(False)
        one = jnp.ones((), self.dtype)
        learned = tree.norm(point.inner_grad) <= 2 * point.noise
        nudged = self.nudging.nudged(point.params, point.outer_grad)
        return Line(
            base=point.params,
            response=tree.zeros_like(point.params),
            phases=self.gauge.at_rest(point.inner_grad, self.first_nudge, nudged, self.nudging.chosen),
            base_grad=point.inner_grad,
            base_outer=point.outer,
            learned=learned,
            chosen=self.nudging.chosen,
            tol=self.tol,
            least=jnp.full((), jnp.inf, self.dtype),
            radius=_RADIUS * point.scale,
            far=false,
            grown=false,
            astray=false,
            change=one,
            num_steps=none,
            num_passes=none,
            num_gradients=none,
            indefinite=false,
            hidden=jnp.zeros((), self.dtype),
            measured=false,
            running=self._may_start(learned),
        )

    def run(self, line: Line) -> Line:
        """Passes until the line is found, or one no longer helps, or the budget is spent."""
        found: Line = jax.lax.while_loop(lambda line: line.running, self.one_pass, line)
        return found

    def run_until(self, goal: Goal, line: Line) -> Line:
        """Passes until the meta-gradient is estimated to be right to what was asked for."""
        # A remainder of the nudge is not much less of the meta-gradient, and may be more.
        loose = jnp.maximum(line.tol, 0.1 * goal.target_error).astype(self.dtype)

        def tighten(carry: tuple[Line, jax.Array]) -> tuple[Line, jax.Array]:
            before, _ = carry
            # What one tolerance was enough for, the next is not.
            found = self.run(before._replace(running=self._may_go_on(before) & self._may_start(before.learned)))
            outcome = self.measure(found)
            error, spent = goal.error(outcome.phases)
            more = ~(error <= goal.target_error) & ~outcome.failed & (before.tol > self.tol) & self._may_go_on(found)
            tol = jnp.maximum(0.1 * before.tol, self.tol)
            return cast_like(found._replace(tol=tol, num_gradients=found.num_gradients + spent), before), more

        found, _ = jax.lax.while_loop(lambda carry: carry[1], tighten, (line._replace(tol=loose), jnp.asarray(True)))
        return found

    def one_pass(self, line: Line) -> Line:
        """Solve for what is left of the nudge and of learning, move there, and measure what is left now.

        While the base point is on its way only learning is solved for: the nudge is answered where it arrives.
        """
        moved = self._move(line)
        left = self._norm(line.phases.remainder)
        nudged = self.nudging.nudged(moved.base, moved.base_outer[1])
        chosen, sought = self.gauge.seek(~moved.away, line.chosen, nudged, moved.base, moved.response)
        # Nothing was done about the remainder on the way: that it is large is no sign of too large a nudge.
        before = jnp.where(moved.away, jnp.inf, left)
        tried = self.gauge.measure(line.phases, nudged, moved.base, moved.response, before, line.tol, chosen)
        systems, num_phases = moved.systems, len(tried.best.scheme.nudges)
        spent = line._replace(
            # What is left of learning lies along low curvature.
            least=jnp.minimum(line.least, jnp.min(systems.least)),
            num_steps=line.num_steps + jnp.max(systems.num_steps),
            num_passes=line.num_passes + 1,
            num_gradients=line.num_gradients
            + jnp.sum(systems.num_steps)
            + 2 * (moved.distance > 0)
            + sought
            + tried.num_tries * 2 * num_phases,
            # What is known of the response that is kept.
            indefinite=jnp.where(moved.away, line.indefinite, systems.indefinite[_RESPONSE]),
            hidden=jnp.where(moved.away, line.hidden, moved.hidden),
        )
        taken = spent._replace(
            base=moved.base,
            response=moved.response,
            phases=tried.best,
            base_grad=moved.base_grad,
            base_outer=moved.base_outer,
            chosen=chosen,
            measured=jnp.asarray(True),
        )
        return cast_like(self._decide(spent, taken, moved, left, tried.left), line)

    def _move(self, line: Line) -> Moved:
        """Where Newton's step leads from the line."""
        left, base_left = self._norm(line.phases.remainder), self._norm(line.base_grad)
        difference = Difference(
            self.inner_grad, line.base, line.base_grad, self.distance / line.phases.shrink, self.point.noise, self.dtype
        )
        systems = self._solve(difference, line, left, base_left)
        step, more = (
            tree.scale(unit, x) for unit, x in zip((base_left, left), tree.unstack(systems.x, 2), strict=True)
        )
        base, distance = tree.add(line.base, step), self._norm(step)
        # Differences are taken from the gradient at the base point, so that has to be exact, not interpolated.
        base_grad, base_outer = only_if(
            distance > 0,
            lambda _: (self.inner_grad(base), self.setting.outer_value_and_grad(base)),
            (line.base_grad, line.base_outer),
        )
        # By the trapezoidal rule, from the slopes along the step.
        unforeseen, _ = tree.unstack(systems.remainder, 2)
        here, there = tree.vdot(step, line.base_grad), tree.vdot(step, base_grad)
        expected = here - base_left * tree.vdot(step, unforeseen)
        foretold = jnp.where(expected < 0, (here + there) / jnp.where(expected < 0, expected, -1.0), 0.0)
        # A remainder e along curvature h hides a response of length ||e|| / h.
        hidden = left * jnp.sqrt(systems.squared[_RESPONSE]) / tree.or_one(FLAT * difference.resolution)
        hidden = jnp.where(systems.flat[_RESPONSE], hidden, 0.0)
        far = self._is_far(line.radius, distance, base_left)
        response, more = tree.add(line.response, more), self._norm(more)
        away = line.far | far
        return Moved(base, response, base_grad, base_outer, distance, far, away, foretold, more, hidden, systems)

    def _decide(self, before: Line, taken: Line, moved: Moved, left_before: jax.Array, left: jax.Array) -> Line:
        """The line after a pass: the new one if it is better, and whether another pass is to follow."""
        base_left, base_now, noise = self._norm(before.base_grad), self._norm(taken.base_grad), self.point.noise
        target = self.gauge.target(taken.phases.scheme, before.tol)
        # Along low curvature a gradient far within the noise is a long way: learning is over when a pass that looked
        # for more in each direction did not go far.
        small, within_noise = target * self.point.scale, base_now <= 2 * noise
        learned = (within_noise & (moved.distance <= small)) | (base_now <= small * LEAST * before.least)
        change = moved.more / tree.or_one(self._norm(taken.response))
        change *= jnp.minimum(left / tree.or_one(left_before), 1.0)
        change = jnp.where(moved.away, before.change, change)
        # Along low curvature a small remainder is much of the response: what the pass changed tells.
        answered = (left <= target * self.nudge) & (change <= 10 * target)
        # Far from a minimum no step goes most of the way, and gradients may grow while the loss falls.
        falls = (moved.foretold > _FALLS) & (base_left > NOISE_FLOOR * noise)
        sound = jnp.isfinite(base_now) & ((base_now <= jnp.maximum(base_left, NOISE_FLOOR * noise)) | falls)
        # A base point that learned takes its own measurement along, whatever the nudge was before.
        learning = sound & ((base_now <= 0.9 * base_left) | within_noise | falls) & ~before.learned
        better = sound & jnp.isfinite(left) & ((left <= left_before) | learning)
        retry = ~sound & (moved.distance > 0)
        progress = (better & ((left <= 0.5 * left_before) | learning)) | retry | before.far
        done = better & answered & learned & ~moved.away
        # Near a minimum gradients fall with the loss: where they grow lies a valley, or a saddle, with other ways out.
        grown = before.grown | (better & falls & (base_now > _GROWN * base_left))
        gone = self._norm(tree.subtract(taken.base, self.point.params))
        astray = before.astray | (grown & better & (gone > _LONG * self.point.scale))

        taken = taken._replace(learned=learned, change=change)
        kept: Line = tree.where(better, cast_like(taken, before), before)
        wider = jnp.where(learning & moved.far & (moved.foretold > _AS_FORETOLD), 2.0, 1.0) * before.radius
        radius = jnp.where(retry, 0.25 * moved.distance, wider)
        far = retry | (better & moved.far)
        after = kept._replace(radius=radius, far=far, grown=grown, astray=astray)
        return after._replace(running=~done & progress & self._may_go_on(after))

    def measure(self, line: Line) -> Outcome:
        """The phases at the end of the search, and what it did not find."""
        nudges, _ = line.phases.scheme.arrays(self.dtype)
        ends = on_line(line.base, line.response, nudges)
        unmeasured = ~line.measured
        nudged = self.nudging.nudged(line.base, line.base_outer[1])
        statistic = only_if(unmeasured, lambda _: self.nudging.measure(nudged, ends, nudges), line.phases.statistic)
        enough = jnp.maximum(UNANSWERED, line.tol)
        unanswered = (self._norm(line.phases.remainder) > enough * self.nudge) | (line.change > enough)
        unanswered |= line.hidden > enough * self._norm(line.response)
        anything = (self.point.nudge_norm > 0) | (self._norm(line.phases.remainder) > 0)
        failed = anything & (line.indefinite | unanswered)
        status = jnp.zeros(nudges.shape, jnp.int32)
        spent = line.num_gradients + unmeasured * nudges.size
        at_base = line.base, line.base_grad, line.base_outer
        kind = line.chosen, jnp.asarray(False)
        phases = Phases(line.phases.scheme, ends, statistic, line.phases.residuals, status, *at_base, spent, *kind)
        # At the dtype's floor what is left to learn is noise, which nobody learns.
        unlearned = ~line.learned & (self._norm(line.base_grad) > NOISE_FLOOR * self.point.noise)
        return Outcome(phases, failed, unlearned, line.astray)

    @property
    def _resolved(self) -> jax.Array:
        """Rounding noise of the gradient in one direction of many."""
        size = sum(x.size for x in jax.tree.leaves(self.point.params))
        return jnp.asarray(2 * self.point.noise / size**0.5, self.dtype)

    def _may_start(self, learned: jax.Array) -> jax.Array:
        """Whether there is anything to search for."""
        point = self.point
        # Without a nudge here there may be one where learning ends.
        return tree.all_finite((self.first_nudge, point.inner_grad)) & ((point.nudge_norm > 0) | ~learned)

    def _may_go_on(self, line: Line) -> jax.Array:
        """Whether passes are left, and the way is one to follow."""
        within: jax.Array = (line.num_passes < self.max_passes) & (line.num_steps < self.max_steps)
        return within if self.go_astray else within & ~line.astray

    def _solve(self, difference: Difference, line: Line, left: jax.Array, base_left: jax.Array) -> System:
        """Both systems: for what the free phase left over, and, unless that is far, for the response."""
        point, target = self.point, self.gauge.target(line.phases.scheme, line.tol)
        units = tree.or_one(left), tree.or_one(base_left)
        limits = Limits(
            remainder=jnp.stack([
                jnp.maximum(self._resolved / units[1], self.forcing),
                jnp.maximum(0.3 * target * self.nudge / units[0], self.forcing),
            ]).astype(self.dtype),
            step=jnp.stack([0.1 * target * point.scale / units[1], jnp.zeros((), self.dtype)]),
            least=jnp.stack([line.least, line.least]),
            radius=jnp.stack([line.radius / units[1], jnp.full((), jnp.inf, self.dtype)]),
        )  # fmt: skip
        rhs = tree.scale(-1 / units[1], line.base_grad), tree.scale(1 / units[0], line.phases.remainder)
        guess = tree.scale(jnp.where(line.num_passes == 0, 1.0, 0.0), self.nudging.response)
        active = jnp.stack([~line.learned, left > 0])
        budget = self.max_steps - line.num_steps

        def answered_there(step: System) -> jax.Array:
            # Of the response at another place nothing can be kept.
            return ~line.far & ~self._is_far(line.radius, units[1] * jnp.sqrt(step.xx), base_left)

        return solve_each(difference, rhs, guess, active, limits, budget, answered_there)

    def _is_far(self, radius: jax.Array, distance: jax.Array, base_left: jax.Array) -> jax.Array:
        """Whether a step of the base point ends at its radius; within the noise there is nowhere to go."""
        return (distance > 0.99 * radius) & (base_left > NOISE_FLOOR * self.point.noise)

    def _norm(self, values: Params) -> jax.Array:
        return tree.norm(values).astype(self.dtype)
