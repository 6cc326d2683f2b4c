"""The search for the line on which the phases of a nearly quadratic loss lie."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, only_if
from contrastive_meta._estimators._free_point import NOISE_FLOOR, UNANSWERED, FreePoint
from contrastive_meta._estimators._gauge import Gauge
from contrastive_meta._estimators._krylov import LEAST
from contrastive_meta._estimators._line import AS_FORETOLD, GROWN, LONG, Line, Moved, Mover
from contrastive_meta._estimators._phases import Assessed, Goal, Nudging, Phases, on_line

# Newton's step may move the base point by this fraction of the length of `params`.
_RADIUS = 0.3


class Outcome(NamedTuple):
    """What a search came to.

    Attributes:
      phases: on the line.
      failed: whether the response was not found.
      unlearned: whether the base point is still on the way to a minimum.
      astray: whether that may be another minimum than the learner's.
      close: whether what was found is right but for its accuracy.
    """

    phases: Phases
    failed: jax.Array
    unlearned: jax.Array
    astray: jax.Array
    close: jax.Array

    @property
    def missed(self) -> jax.Array:
        """Whether the phases are not what was looked for."""
        return self.failed | self.unlearned | self.astray


class Search:
    """One search for the line, with what stays the same in all passes."""

    def __init__(
        self, nudging: Nudging, point: FreePoint, tol: Any, max_steps: Any, max_passes: Any, go_astray: bool
    ) -> None:
        setting = nudging.setting
        self.nudging, self.point, self.setting = nudging, point, setting
        self.max_steps, self.max_passes, self.go_astray = max_steps, max_passes, go_astray
        self.dtype = setting.dtype
        self.tol = jnp.asarray(10 * point.eps if tol is None else tol, setting.dtype)
        # What nudges may be more than the outer loss.
        first_nudge = tree.grad(
            self.nudging.nudged(point.params, point.outer_grad).flattened(nudging.flattening).outer
        )(point.params)
        self.gauge = Gauge(nudging, point, first_nudge)
        self.mover = Mover(nudging, point, self.gauge)

    def start(self) -> Line:
        """The free solution, with no response yet and all of the nudge left."""
        point, none, false = self.point, jnp.int32(0), jnp.asarray(False)
        one = jnp.ones((), self.dtype)
        learned = tree.norm(point.inner_grad) <= 2 * point.noise
        nudged = self.nudging.nudged(point.params, point.outer_grad)
        return Line(
            base=point.params,
            response=tree.zeros_like(point.params),
            phases=self.gauge.at_rest(nudged, self.nudging.chosen),
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
            waits=false,
            both=false,
            change=one,
            num_steps=jnp.zeros((2,), jnp.int32),
            num_passes=none,
            num_gradients=none,
            indefinite=false,
            hidden=jnp.zeros((), self.dtype),
            measured=false,
            running=self._may_start(learned) & (self.max_passes > 0) & (self.max_steps > 0),
        )

    def run(self, line: Line) -> Line:
        """Passes until the line is found, or one no longer helps, or the budget is spent."""
        found: Line = jax.lax.while_loop(lambda line: line.running, self.one_pass, line)
        return found

    def run_until(self, goal: Goal, line: Line) -> Outcome:
        """Passes until the meta-gradient is estimated to be right to what was asked for, and the phases then."""
        # A remainder of the nudge is not much less of the meta-gradient, and may be more.
        loose = jnp.maximum(line.tol, 0.1 * goal.target_error).astype(self.dtype)

        def tighten(carry: tuple[Line, Assessed, jax.Array]) -> tuple[Line, Assessed, jax.Array]:
            before, earlier, _ = carry
            # What one tolerance was enough for, the next is not.
            found = self.run(before._replace(running=self._may_go_on(before) & self._may_start(before.learned)))
            outcome = self.measure(found)
            assessed = goal.assess(outcome.phases)
            more = goal.missed(assessed) & ~outcome.failed & (before.tol > self.tol) & self._may_go_on(found)
            tol = jnp.where(more, jnp.maximum(0.1 * before.tol, self.tol), before.tol)
            after = found._replace(tol=tol, num_gradients=found.num_gradients + assessed.num_gradients)
            return (*cast_like((after, assessed), (before, earlier)), more)

        start = line._replace(tol=loose), Assessed.nothing(self.dtype), jnp.asarray(True)
        found, assessed, _ = jax.lax.while_loop(lambda carry: carry[2], tighten, start)
        outcome = self.measure(found)
        return outcome._replace(phases=outcome.phases._replace(assessed=assessed))

    def one_pass(self, line: Line) -> Line:
        """Solve for a step of the base point and what is left of the nudge before it; measure what is left after it.

        While the base point is on its way the nudge is not answered: that waits for where it arrives.
        """
        target = self.gauge.target(line.phases.scheme, line.tol, self.gauge.nudge(line.base_outer))
        moved = self.mover.move(line, target, self.max_steps - line.num_steps)
        place, nudge = moved.place, self.gauge.nudge(moved.place.base_outer)
        nudged = self.nudging.nudged(place.base, place.base_outer[1])
        at_base = nudged, place.base, place.base_grad
        chosen, sought = self.gauge.seek(~moved.away, line.chosen, *at_base, moved.response)
        # Nothing was done about the remainder on the way: that it is large is no sign of too large a nudge.
        before = jnp.where(moved.away, jnp.inf, moved.left)
        tried = self.gauge.measure(line.phases, nudged, place.base, moved.response, before, line.tol, nudge, chosen)
        spent = line._replace(
            least=jnp.minimum(line.least, moved.least),
            num_steps=line.num_steps + moved.num_steps,
            num_passes=line.num_passes + 1,
            num_gradients=line.num_gradients
            + moved.num_gradients
            + sought
            + tried.num_tries * 2 * len(tried.best.scheme.nudges),
            waits=line.waits | moved.too_long,
            both=line.both | (self.mover.bent(moved, tried.left) & (tried.left > target * nudge)),
            # What is known of the response that is kept.
            indefinite=jnp.where(moved.away, line.indefinite, moved.indefinite),
            hidden=jnp.where(moved.away, line.hidden, moved.hidden),
        )
        taken = spent._replace(
            base=place.base,
            response=moved.response,
            phases=tried.best,
            base_grad=place.base_grad,
            base_outer=place.base_outer,
            chosen=chosen,
            measured=jnp.asarray(True),
        )
        return cast_like(self._decide(spent, taken, moved, tried.left), line)

    def _decide(self, before: Line, taken: Line, moved: Moved, left: jax.Array) -> Line:
        """The line after a pass: the new one if it is better, and whether another pass is to follow."""
        place, left_before = moved.place, moved.left
        base_left, base_now = self.setting.norm(before.base_grad), self.setting.norm(taken.base_grad)
        noise = self.point.noise
        nudge = self.gauge.nudge(taken.base_outer)
        target = self.gauge.target(taken.phases.scheme, before.tol, nudge)
        # Along low curvature a gradient far within the noise is a long way: learning is over when a pass that looked
        # for more in each direction did not go far.
        small, within_noise = target * self.point.scale, base_now <= 2 * noise
        learned = (within_noise & (place.distance <= small)) | (base_now <= small * LEAST * before.least)
        near_noise = base_left <= NOISE_FLOOR * noise
        learned |= place.arrived | (before.learned & near_noise)
        change = moved.more / tree.or_one(self.setting.norm(taken.response))
        change *= jnp.minimum(left / tree.or_one(left_before), 1.0)
        change = jnp.where(moved.away, before.change, change)
        # Along low curvature a small remainder is much of the response: what the pass changed tells.
        answered = (left <= target * nudge) & (change <= 10 * target)
        # A base point that learned takes its own measurement along, whatever the nudge was before.
        learning = place.sound & ((base_now <= 0.9 * base_left) | within_noise | place.falls) & ~before.learned
        better = place.sound & jnp.isfinite(left) & ((left <= left_before) | learning)
        refused = ~place.sound & (place.distance > 0)
        # Within the noise no shorter step is any better: learning is over, and the nudge to be answered here.
        over = refused & near_noise
        retry = refused & ~over
        # Once the base point no longer learns, what waited for it is answered.
        lost = within_noise & (base_left <= 2 * noise)
        stalled = taken.waits & (lost | ~(learning | refused | place.far))
        progress = (better & ((left <= 0.5 * left_before) | learning)) | refused | before.far
        progress |= taken.waits & ~(stalled & answered)
        done = better & answered & learned & ~moved.away
        # Near a minimum gradients fall with the loss: where they grow lies a valley, or a saddle, with other ways out.
        grown = before.grown | (better & place.falls & (base_now > GROWN * base_left))
        gone = self.setting.norm(tree.subtract(taken.base, self.point.params))
        astray = before.astray | (grown & better & (gone > LONG * self.point.scale))

        taken = taken._replace(learned=learned, change=change)
        kept: Line = tree.where(better, cast_like(taken, before), before)
        wider = jnp.where(learning & place.far & (place.foretold > AS_FORETOLD), 2.0, 1.0) * before.radius
        radius = jnp.where(retry, 0.25 * place.distance, wider)
        far = retry | (better & place.far)
        over |= stalled
        after = kept._replace(learned=kept.learned | over, radius=radius, far=far, grown=grown, astray=astray)
        after = after._replace(waits=taken.waits & ~after.learned)
        return after._replace(running=~done & progress & self._may_go_on(after))

    def measure(self, line: Line) -> Outcome:
        """The phases at the end of the search, and what it did not find."""
        nudges, _ = line.phases.scheme.arrays(self.dtype)
        ends = on_line(line.base, line.response, nudges)
        unmeasured = ~line.measured
        nudged = self.nudging.nudged(line.base, line.base_outer[1])
        statistic = only_if(unmeasured, lambda _: self.nudging.measure(nudged, ends, nudges), line.phases.statistic)
        enough = jnp.maximum(UNANSWERED, line.tol)
        left = self.setting.norm(line.phases.remainder)
        unanswered = (left > enough * self.gauge.nudge(line.base_outer)) | (line.change > enough)
        unanswered |= line.hidden > enough * self.setting.norm(line.response)
        anything = (self.point.nudge_norm > 0) | (left > 0)
        failed = anything & (line.indefinite | unanswered)
        status = jnp.zeros(nudges.shape, jnp.int32)
        spent = line.num_gradients + unmeasured * nudges.size
        at_base = line.base, line.base_grad, line.base_outer
        kind = line.chosen, jnp.asarray(False)
        phases = Phases(line.phases.scheme, ends, statistic, line.phases.residuals, status, *at_base, spent, *kind)
        # At the dtype's floor what is left to learn is noise, which nobody learns.
        unlearned = ~line.learned & (self.setting.norm(line.base_grad) > NOISE_FLOOR * self.point.noise)
        close = line.measured & ~(line.indefinite | unlearned | line.astray)
        return Outcome(phases, failed, unlearned, line.astray, close)

    def _may_start(self, learned: jax.Array) -> jax.Array:
        """Whether there is anything to search for."""
        point = self.point
        # Without a nudge here there may be one where learning ends.
        return tree.all_finite((self.gauge.first_nudge, point.inner_grad)) & ((point.nudge_norm > 0) | ~learned)

    def _may_go_on(self, line: Line) -> jax.Array:
        """Whether passes are left, and the way is one to follow."""
        within: jax.Array = (line.num_passes < self.max_passes) & jnp.all(line.num_steps < self.max_steps)
        return within if self.go_astray else within & ~line.astray
