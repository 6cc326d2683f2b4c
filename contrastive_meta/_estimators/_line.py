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
from contrastive_meta._estimators._krylov import FLAT, LEAST, Difference, Limits, System, solve_each
from contrastive_meta._estimators._phases import Goal, Nudging, Phases, on_line
from contrastive_meta._estimators._seek import Found, seek
from contrastive_meta._estimators._setting import Setting
from contrastive_meta._nudging import NudgeScheme
from contrastive_meta._problem import MetaParams, Params

# Of a remainder, one pass is asked to leave this power of the dtype's eps: what products that are one-sided gradient
# differences are accurate to, 1e-7 in float64 and 1e-3 in float32.
_FORCING = 0.45
# Newton's step may move the base point by this fraction of the length of `params`.
_RADIUS = 0.3
# A pass that leaves more of the remainder than this is suspected of too large a nudge.
_SUSPICIOUS = 0.3
# By what strengths and difference steps are divided then, and how often.
_SHRINK = 8.0
_MOST_TRIES = 4


class Line(NamedTuple):
    """The line base - beta u, on which the phases lie, and what their gradients say of it."""

    base: Params
    response: Params  # u
    scheme: NudgeScheme
    residuals: Params  # gradients of the phases' own losses, a leading axis of phases
    statistic: MetaParams  # what the rule measures of the phases; zeros until a pass has measured it
    remainder: Params  # v - H u, the contrast of the residuals
    base_grad: Params  # gradient of the inner loss at the base point: what is left of learning
    base_outer: OuterEvaluated  # the outer loss there
    learned: jax.Array  # whether what is left of learning is too little to matter
    shrink: jax.Array  # what strengths and difference steps are divided by
    chosen: jax.Array  # the displacement found best, relative to the length of `params`; 0 for none
    tol: jax.Array  # of the remainder, relative to the nudge
    least: jax.Array  # least curvature met so far
    radius: jax.Array  # the longest step of the base point
    change: jax.Array  # of the response by the last pass, relative, times what the pass left of the remainder
    num_steps: jax.Array
    num_passes: jax.Array
    num_gradients: jax.Array
    indefinite: jax.Array
    hidden: jax.Array  # least length of the response along directions too flat for differences, by the last pass
    measured: jax.Array  # whether a pass has measured this line
    running: jax.Array


class Measured(NamedTuple):
    """The phases' gradients at one strength."""

    scheme: NudgeScheme
    residuals: Params
    statistic: MetaParams
    remainder: Params
    left: jax.Array  # norm of the remainder
    shrink: jax.Array
    trying: jax.Array  # what to shrink by in the next try
    num_tries: jax.Array
    running: jax.Array


class Outcome(NamedTuple):
    """What a search came to.

    Attributes:
      phases: on the line.
      failed: whether the response was not found.
      unlearned: whether the base point is still on the way to a minimum.
    """

    phases: Phases
    failed: jax.Array
    unlearned: jax.Array


class Search:
    """One search for the line, with what stays the same in all passes."""

    def __init__(self, nudging: Nudging, point: FreePoint, tol: Any, max_steps: Any, max_passes: Any) -> None:
        setting = nudging.setting
        self.nudging, self.point, self.setting = nudging, point, setting
        self.max_steps, self.max_passes = max_steps, max_passes
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
        # The norm over which the mean inverse curvature is taken before a response is known.
        self.usual = self.nudge / tree.or_one(point.curvature)

    def start(self) -> Line:
        """The free solution, with no response yet and all of the nudge left."""
        point, none, false = self.point, jnp.int32(0), jnp.asarray(False)
        one = jnp.ones((), self.dtype)
        learned = tree.norm(point.inner_grad) <= 2 * point.noise
        scheme = self._scheme(self.usual, one, self.nudging.chosen)
        nudges, _ = scheme.arrays(self.dtype)
        # At the free solution itself the nudged losses' gradients are known.
        residuals = on_line(point.inner_grad, tree.scale(-1.0, self.first_nudge), nudges)
        nudged, ends = (
            self.nudging.nudged(point.params, point.outer_grad),
            on_line(point.params, tree.zeros_like(point.params), nudges),
        )
        shapes = jax.eval_shape(lambda: self.nudging.measure(nudged, ends, nudges))
        return Line(
            base=point.params,
            response=tree.zeros_like(point.params),
            scheme=scheme,
            residuals=residuals,
            statistic=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
            remainder=self.first_nudge,
            base_grad=point.inner_grad,
            base_outer=point.outer,
            learned=learned,
            shrink=one,
            chosen=self.nudging.chosen,
            tol=self.tol,
            least=jnp.full((), jnp.inf, self.dtype),
            radius=_RADIUS * point.scale,
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
            within = (before.num_passes < self.max_passes) & (before.num_steps < self.max_steps)
            found = self.run(before._replace(running=within & self._may_start(before.learned)))
            outcome = self.measure(found)
            error, spent = goal.error(outcome.phases)
            more = ~(error <= goal.target_error) & ~outcome.failed & (before.tol > self.tol)
            tol = jnp.maximum(0.1 * before.tol, self.tol)
            return cast_like(found._replace(tol=tol, num_gradients=found.num_gradients + spent), before), more

        found, _ = jax.lax.while_loop(lambda carry: carry[1], tighten, (line._replace(tol=loose), jnp.asarray(True)))
        return found

    def one_pass(self, line: Line) -> Line:
        """Solve for what is left of the nudge and of learning, move there, and measure what is left now."""
        point = self.point
        left, base_left = self._norm(line.remainder), self._norm(line.base_grad)
        difference = Difference(
            self.inner_grad, line.base, line.base_grad, self.distance / line.shrink, point.noise, self.dtype
        )
        systems = self._solve(difference, line, left, base_left)
        more, step = (
            tree.scale(unit, x) for unit, x in zip((left, base_left), tree.unstack(systems.x, 2), strict=True)
        )
        base, response = tree.add(line.base, step), tree.add(line.response, more)
        length, moved = self._norm(response), self._norm(step)
        # Differences are taken from the gradient at the base point, so that has to be exact, not interpolated.
        base_grad, base_outer = only_if(
            moved > 0,
            lambda _: (self.inner_grad(base), self.setting.outer_value_and_grad(base)),
            (line.base_grad, line.base_outer),
        )
        nudged = self.nudging.nudged(base, base_outer[1])
        chosen, sought = self._seek(line, nudged, base, response)
        found = self._measure_line(line, base, nudged, response, length, left, chosen)

        now, base_now, noise = found.left, self._norm(base_grad), point.noise
        target = self._target(found.scheme, line.tol)
        # What is left of learning lies along low curvature, where a gradient far within the noise is a long way: it is
        # over when a pass that looked for more in each direction did not go far.
        least, within_noise = jnp.minimum(line.least, jnp.min(systems.least)), base_now <= 2 * noise
        small = target * point.scale
        learned = (within_noise & (moved <= small)) | (base_now <= small * LEAST * least)
        change = self._norm(more) / tree.or_one(length) * jnp.minimum(now / tree.or_one(left), 1.0)
        # Along low curvature a small remainder is much of the response: what the pass changed tells.
        answered = (now <= target * self.nudge) & (change <= 10 * target)
        sound = jnp.isfinite(base_now) & (base_now <= jnp.maximum(base_left, NOISE_FLOOR * noise))
        # A base point that learned takes its own measurement along, whatever the nudge was before.
        # Far from a minimum no step goes most of the way.
        learning = sound & ((base_now <= 0.9 * base_left) | within_noise) & ~line.learned
        limited = learning & (moved > 0.99 * line.radius)
        better = sound & jnp.isfinite(now) & ((now <= left) | learning)
        retry = ~sound & (moved > 0) & (base_now > base_left)
        progress = (better & ((now <= 0.5 * left) | learning)) | retry
        done = better & answered & learned

        # A remainder e along curvature h hides a response of length ||e|| / h.
        hidden = left * jnp.sqrt(systems.squared[0]) / tree.or_one(FLAT * difference.resolution)
        num_steps, num_passes = line.num_steps + jnp.max(systems.num_steps), line.num_passes + 1
        taken = line._replace(
            base=base,
            response=response,
            scheme=found.scheme,
            residuals=found.residuals,
            statistic=found.statistic,
            remainder=found.remainder,
            base_grad=base_grad,
            base_outer=base_outer,
            learned=learned,
            shrink=found.shrink,
            chosen=chosen,
            change=change,
            measured=jnp.asarray(True),
        )
        kept: Line = tree.where(better, cast_like(taken, line), line)
        after = kept._replace(
            radius=jnp.where(retry, 0.25 * moved, jnp.where(limited, 2.0, 1.0) * line.radius),
            least=least,
            num_steps=num_steps,
            num_passes=num_passes,
            num_gradients=line.num_gradients
            + jnp.sum(systems.num_steps)
            + 2 * (moved > 0)
            + sought
            + found.num_tries * 2 * len(found.scheme.nudges),
            indefinite=systems.indefinite[0],
            hidden=jnp.where(systems.flat[0], hidden, 0.0),
            running=~done & progress & (num_passes < self.max_passes) & (num_steps < self.max_steps),
        )
        return cast_like(after, line)

    def measure(self, line: Line) -> Outcome:
        """The phases at the end of the search, and what it did not find."""
        nudges, _ = line.scheme.arrays(self.dtype)
        ends = on_line(line.base, line.response, nudges)
        unmeasured = ~line.measured
        nudged = self.nudging.nudged(line.base, line.base_outer[1])
        statistic = only_if(unmeasured, lambda _: self.nudging.measure(nudged, ends, nudges), line.statistic)
        enough = jnp.maximum(UNANSWERED, line.tol)
        unanswered = (self._norm(line.remainder) > enough * self.nudge) | (line.change > enough)
        unanswered |= line.hidden > enough * self._norm(line.response)
        anything = (self.point.nudge_norm > 0) | (self._norm(line.remainder) > 0)
        failed = anything & (line.indefinite | unanswered)
        status = jnp.zeros(nudges.shape, jnp.int32)
        spent = line.num_gradients + unmeasured * nudges.size
        at_base = line.base, line.base_grad, line.base_outer
        kind = line.chosen, jnp.asarray(False)
        phases = Phases(line.scheme, ends, statistic, line.residuals, status, *at_base, spent, *kind)
        # At the dtype's floor what is left to learn is noise, which nobody learns.
        unlearned = ~line.learned & (self._norm(line.base_grad) > NOISE_FLOOR * self.point.noise)
        return Outcome(phases, failed, unlearned)

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

    def _measure_line(
        self,
        line: Line,
        base: Params,
        nudged: Setting,
        response: Params,
        length: jax.Array,
        left: jax.Array,
        chosen: jax.Array,
    ) -> Measured:
        """The phases' gradients, at a smaller strength where this one goes beyond what is nearly quadratic."""
        length = jnp.where(length > 0, length, self.usual)

        def measure(before: Measured) -> Measured:
            scheme = self._scheme(length, before.trying, chosen)
            nudges, _ = scheme.arrays(self.dtype)
            ends = on_line(base, response, nudges)
            residuals, statistic = self.nudging.evaluate(nudged, ends, nudges)
            remainder = scheme.contrast(residuals)
            now, num_tries = self._norm(remainder), before.num_tries + 1
            better = (now < 0.5 * before.left) | (before.num_tries == 0)
            suspicious = ~(now <= jnp.maximum(_SUSPICIOUS * left, self._target(scheme, line.tol) * self.nudge))
            most_tries = _MOST_TRIES if self.nudging.scheme.adapts else 1
            new = Measured(
                scheme, residuals, statistic, remainder, now,
                shrink=before.trying,
                trying=_SHRINK * before.trying,
                num_tries=num_tries,
                running=suspicious & (num_tries < most_tries),
            )  # fmt: skip
            old = before._replace(num_tries=num_tries, running=jnp.asarray(False))
            picked: Measured = tree.where(better, cast_like(new, before), old)
            return picked

        begin = Measured(
            line.scheme, line.residuals, line.statistic, line.remainder, jnp.full_like(left, jnp.inf),
            line.shrink, line.shrink, jnp.int32(0), jnp.asarray(True),
        )  # fmt: skip
        found: Measured = jax.lax.while_loop(lambda m: m.running, measure, begin)
        return found

    def _solve(self, difference: Difference, line: Line, left: jax.Array, base_left: jax.Array) -> System:
        """Both systems: for the response, and for what the free phase left over."""
        point, target = self.point, self._target(line.scheme, line.tol)
        units = tree.or_one(left), tree.or_one(base_left)
        limits = Limits(
            remainder=jnp.stack([
                jnp.maximum(0.3 * target * self.nudge / units[0], self.forcing),
                jnp.maximum(self._resolved / units[1], self.forcing),
            ]).astype(self.dtype),
            step=jnp.stack([jnp.zeros((), self.dtype), 0.1 * target * point.scale / units[1]]),
            least=jnp.stack([line.least, line.least]),
            radius=jnp.stack([jnp.full((), jnp.inf, self.dtype), line.radius / units[1]]),
        )  # fmt: skip
        rhs = tree.scale(1 / units[0], line.remainder), tree.scale(-1 / units[1], line.base_grad)
        guess = tree.scale(jnp.where(line.num_passes == 0, 1.0, 0.0), self.nudging.response)
        active = jnp.stack([left > 0, ~line.learned])
        budget = self.max_steps - line.num_steps
        return solve_each(difference, rhs, guess, active, limits, budget)

    def _seek(self, line: Line, nudged: Setting, base: Params, response: Params) -> tuple[jax.Array, jax.Array]:
        """The strength to measure the line at, as a displacement, where it is to be sought; and the gradients spent."""
        if self.nudging.sought is None:
            return jnp.zeros_like(line.chosen), jnp.int32(0)
        found: Found = only_if(
            line.chosen == 0,
            lambda _: seek(self.nudging, self.point, nudged, base, response, to_minima=False),
            Found(line.chosen, jnp.int32(0)),
        )
        return found

    def _scheme(self, length: jax.Array, shrink: jax.Array, chosen: jax.Array) -> NudgeScheme:
        probe = self.nudging.probe(self.point)._replace(chosen=chosen)
        scheme = self.nudging.scheme.for_response(probe, length * shrink)
        strong: NudgeScheme = jax.tree.map(jnp.asarray, scheme)
        return strong

    def _target(self, scheme: NudgeScheme, tol: jax.Array) -> jax.Array:
        """The remainder to reach, relative to the nudge: not below what rounding alone leaves of the contrast."""
        return jnp.maximum(tol, 3 * scheme.noise_gain(self.dtype) * self.point.noise / self.nudge).astype(self.dtype)

    def _norm(self, values: Params) -> jax.Array:
        return tree.norm(values).astype(self.dtype)
