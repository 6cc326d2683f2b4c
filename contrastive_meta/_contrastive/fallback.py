"""The stages in which the solver learns on, or runs the phases, where the Newton-Krylov iteration failed."""

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import NOISE_FLOOR
from contrastive_meta._contrastive.convergence import learning_ended
from contrastive_meta._contrastive.error_estimate import ErrorEstimate
from contrastive_meta._contrastive.loop_state import Found, LoopState, Stage
from contrastive_meta._contrastive.newton_krylov import (
    Attempt,
)
from contrastive_meta._contrastive.newton_step import (
    LONG,
)
from contrastive_meta._contrastive.phases import mean_of
from contrastive_meta._contrastive.step_size import FACTOR
from contrastive_meta._control import cast_like
from contrastive_meta._nudging import LinearNudge
from contrastive_meta._result import Status

# How often the Newton-Krylov iteration is tried.
_MOST_TRIES = 3
# Nudges are divided until they move `params` by less than this power of epsilon times their length: below that rounding
# of the phases' ends is more than a thousandth of the contrast.
LEAST_NUDGE = 0.8
# A further try is worth it if learning on reduced the residual at least to this fraction.
_WORTH_A_TRY = 0.5


class Fallback(ErrorEstimate):
    """The stages of the solver."""

    def fall_back(self, now: LoopState) -> LoopState:
        """From phases that failed: the solver learns on while there is something to learn, else it runs the phases."""
        left = self.norm(now.origin.inner_grad)
        learn_on = (left > NOISE_FLOOR * self.setup.start.noise) & (now.num_tries < _MOST_TRIES)
        if self.template.is_complex:
            # No learner runs complex phases in the place of others.
            after = self._kept(now, ~learn_on)
        else:
            after = self._before_rerun(now, ~learn_on)
        running = after.running | learn_on | (not self.template.is_complex)
        return after._replace(stage=jnp.where(learn_on, Stage.LEARN_ON, after.stage), running=running)

    def _after_learn_on(self, now: LoopState, found: Found) -> LoopState:
        """Try again where learning went on to, if that is any nearer; else the solver runs the phases there."""
        base = found.line.base
        nearer = self.norm(base.inner_grad) <= _WORTH_A_TRY * self.norm(now.origin.inner_grad)
        line = self._unmeasured(base, found.line.contrast.displacement, found.line.contrast.beta)
        fresh = Attempt.at(self.setup, line, now.attempt.tol)
        attempt = cast_like(fresh, now.attempt)
        if self.template.is_complex:
            after = now._replace(
                origin=tree.where(nearer, base, now.origin), attempt=tree.where(nearer, attempt, now.attempt)
            )
            kept = self._kept(after, ~nearer)
            return kept._replace(stage=jnp.where(nearer, Stage.NEWTON, kept.stage), running=kept.running | nearer)
        now = now._replace(origin=tree.where(nearer, base, now.origin), attempt=attempt, stage=jnp.int32(Stage.NEWTON))
        return self._before_rerun(now, ~nearer)

    def _before_rerun(self, now: LoopState, wanted: jax.Array) -> LoopState:
        """Set out from the origin for phases that the solver runs; in reserve no strength is sought."""
        setup = self.setup
        pilot = bool(setup.scheme.num_pilot_steps)
        line = self._unmeasured(now.origin, jnp.zeros_like(setup.displacement), now.kept.contrast.beta)
        fresh = cast_like(Attempt.at(setup, line, now.attempt.tol), now.attempt)
        linear = jnp.asarray(isinstance(setup.nudge, LinearNudge))
        ran = now.ran._replace(linear=jnp.where(wanted, linear, now.ran.linear))
        if not pilot:
            found = setup.strength_for(now.origin, setup.displacement, self._usual_length())
            ran = ran._replace(beta=jnp.where(wanted, found, ran.beta))
        return now._replace(
            attempt=tree.where(wanted, fresh, now.attempt),
            ran=ran,
            stage=jnp.where(wanted, Stage.PILOT if pilot else Stage.RERUN, now.stage),
        )

    def _after_pilot(self, now: LoopState, found: Found) -> LoopState:
        """The strength of the phases, from the length of the response."""
        displacement = found.line.contrast.displacement
        if self.strategy.fast is not None:
            displacement = jnp.zeros_like(displacement)
        beta = self.setup.strength_for(now.origin, displacement, found.length)
        contrast = now.attempt.line.contrast._replace(displacement=displacement)
        attempt = now.attempt._replace(line=now.attempt.line._replace(contrast=contrast))
        return now._replace(attempt=attempt, ran=now.ran._replace(beta=beta), stage=jnp.int32(Stage.RERUN))

    def _after_rerun(self, now: LoopState, found: Found) -> LoopState:
        """Keep what the solver found, unless a nudge was unbounded or the fast answer is better."""
        setup, runs, line, ran = self.setup, found.runs, found.line, now.ran
        assert runs is not None and self.strategy.rerun is not None
        strength = ran.beta
        left, residual, response = setup.norms([now.origin.inner_grad, line.base.inner_grad], responses=[line.response])
        settled = learning_ended(setup, left, strength)
        nudge_unbounded = jnp.any(runs.status >= Status.DIVERGED) | (settled & line.contrast.downward)
        again = jnp.asarray(False)
        if self.strategy.rerun.may_linearise:
            again = nudge_unbounded & ~ran.linear & tree.all_finite((now.origin.params, now.origin.outer.in_params))

        # Nudges that lead through walls: weaker ones need not.
        weaker = jnp.asarray(False)
        if setup.walls is not None and setup.scheme.adapts:
            far = strength * response > setup.start.eps**LEAST_NUDGE * setup.start.scale
            weaker = ~again & far & setup.crosses_walls(line.base.params, line.response, 2 * strength)
            again |= weaker

        # Where the line through the phases' ends misses the free solution, the way was not straight.
        nudges = strength * setup.stencil.nudges
        on_path = tree.add_scaled(mean_of(runs.ends), jnp.mean(jnp.real(nudges)), line.response)
        off, gone = setup.norms(steps=[tree.subtract(x, now.origin.params) for x in (on_path, line.base.params)])
        missed_by = off / tree.or_one(strength * response)
        crooked = jnp.where(settled & ~(residual < left), missed_by, 0.0)
        crooked = jnp.maximum(line.contrast.nonlinearity, crooked).astype(self.dtype)
        line = line._replace(contrast=line.contrast._replace(nonlinearity=crooked))

        # From far off a minimum either may learn further. Of two inaccurate responses, the better one.
        fast = now.kept
        further = ~now.close | now.uncertain | (residual < self.norm(fast.base.inner_grad))
        missing_of_fast, missing = setup.norms(nudges=[fast.contrast.residual, line.contrast.residual])
        better = now.close & (missing_of_fast <= missing)
        chosen = jnp.asarray(self.strategy.fast is None) | (further & ~better)
        # On such a way phases may find another minimum than learning would have.
        after = now._replace(
            kept=tree.where(chosen, cast_like(line, now.kept), now.kept),
            ran=ran._replace(
                beta=jnp.where(weaker, strength / FACTOR, strength),
                linear=ran.linear | (again & ~weaker),
                linearised=ran.linearised | (again & ~weaker),
                statuses=runs.status,
                nudge_unbounded=nudge_unbounded,
                num_steps=ran.num_steps + runs.num_steps,
            ),
            by_solver=chosen,
            uncertain=now.uncertain & (gone > LONG * setup.start.scale),
        )
        # A nudge that takes the minimum away: its linearisation cannot.
        after = self._kept(after, ~again)
        return after._replace(stage=jnp.where(again, Stage.RERUN, after.stage), running=after.running | again)
