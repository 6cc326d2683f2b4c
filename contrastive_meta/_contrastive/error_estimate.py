"""The estimate of the error, by iterative refinement of the line that is kept."""

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import UNCONVERGED, FreeResidual
from contrastive_meta._contrastive.convergence import Convergence, converged, learning_ended
from contrastive_meta._contrastive.loop_state import Found, LoopState, Stage
from contrastive_meta._contrastive.newton_krylov import nudge_norm_at
from contrastive_meta._contrastive.newton_step import (
    Region,
    Solved,
)
from contrastive_meta._contrastive.stage_systems import MOST_STEPS, StageSystems
from contrastive_meta._control import cast_like
from contrastive_meta._result import Status

# What leaves more than this of a system unsolved, because the curvature is downward or not told from rounding, tells
# nothing of the error.
_UNSOLVED = 0.1
# A round towards a target error that leaves more of the error than this is the last one.
_STALLED = 0.9
# Where an accuracy is asked for, phases take by default this many times the steps that one run takes.
_MOST_ROUNDS = 8


class ErrorEstimate(StageSystems):
    """The stages that estimate the error, and what they tell."""

    def _kept(self, now: LoopState, wanted: jax.Array) -> LoopState:
        """Begin to estimate the error of the line that is kept, or stop."""
        if not self.setup.estimate_error:
            return now._replace(running=~wanted)
        region = Region.around(self.setup, now.kept.base.inner_grad)
        region = region._replace(two_sided=now.attempt.region.two_sided, uncertain=now.attempt.region.uncertain)
        attempt = now.attempt._replace(line=now.kept, region=cast_like(region, now.attempt.region))
        return now._replace(
            attempt=tree.where(wanted, attempt, now.attempt), stage=jnp.where(wanted, Stage.AHEAD, now.stage)
        )

    def _after_ahead(self, now: LoopState, found: Found) -> LoopState:
        """The base point, had learning ended."""
        finite = tree.all_finite((found.line.base.params, found.line.base.inner_grad))
        attempt = now.attempt._replace(line=tree.where(finite, found.line, now.attempt.line))
        missing = found.solved.cauchy.at[1].set(0)
        return now._replace(attempt=attempt, missing=missing, stage=jnp.int32(Stage.RESPONSE))

    def _is_unknown(self, now: LoopState, solved: Solved) -> jax.Array:
        """Whether more than noise of the nudge was left, and most of that found no response though steps were left."""
        unsolved = (solved.left[1] > _UNSOLVED) & (solved.num_steps[1] > 0) & (solved.num_steps[1] < MOST_STEPS)
        unknown: jax.Array = unsolved & (solved.lengths[1] > UNCONVERGED * nudge_norm_at(self.setup, now.kept))
        return unknown

    def _after_response(self, now: LoopState, found: Found) -> LoopState:
        """The refined result is there to be compared with the kept one."""
        # Truncation is no failure of the learner.
        residual, sought = self.setup.norm_of_nudge(now.kept.contrast.residual), found.solved.lengths[1]
        missing = found.solved.cauchy[1] * jnp.minimum(residual / tree.or_one(sought), 1.0)
        after = now._replace(
            attempt=now.attempt._replace(line=found.line),
            missing=now.missing.at[1].set(missing.astype(self.dtype)),
            unknown=self._is_unknown(now, found.solved),
            downward=(now.by_solver | now.missed) & found.solved.indefinite,
            running=jnp.asarray(False),
        )
        if self.strategy.target_error is None:
            return after
        return self._towards_target(now, after._replace(error=self._error(after)))

    def _error(self, last: LoopState) -> jax.Array:
        """The refined result against the kept one, at the same strength, so that truncation cancels."""
        kept, refined = last.kept.contrast, last.attempt.line.contrast
        missing_gradient = tree.add(tree.subtract(refined.plain, kept.plain), kept.correction)
        size, whole = self.setup.statistic_norms(missing_gradient, tree.add(kept.grad, missing_gradient))
        relative = jnp.where(size == 0, 0.0, size / whole)
        # A zero that nothing changes is exact.
        error = jnp.where(whole == 0, jnp.where(size == 0, 0.0, jnp.inf), jnp.sqrt(relative**2 + kept.error**2))
        return jnp.where(last.unknown, jnp.inf, error).astype(self.dtype)

    def conclude(self, last: LoopState) -> tuple[Convergence, jax.Array]:
        """How far the phases came, and the estimated error: from what refining the kept line changed."""
        kept, refined = last.kept, last.attempt.line
        new, old = refined.base, kept.base
        moved = tree.subtract(new.params, old.params)
        bent = tree.subtract(new.outer.in_params, old.outer.in_params)
        residual, shift, distance = self.setup.norms([old.inner_grad], [bent], steps=[moved])
        # The whole step may go far along low curvature, where it hardly matters: the statuses go by what is certain.
        certain = jnp.minimum(last.missing[0] / tree.or_one(distance), 1.0)
        distance, shift, missing = certain * distance, certain * shift, last.missing[1]
        # Phases that are centred off the minimum take nothing from what the free phase learned.
        start = self.norm(self.setup.start.inner_grad)
        nearer = jnp.minimum(start / tree.or_one(residual), 1.0)
        pull = self.setup.norm_of_nudge(kept.base.outer.in_params)
        left = FreeResidual(jnp.minimum(residual, start), nearer * distance, nearer * shift, pull)
        ended = ~last.by_solver | learning_ended(self.setup, self.norm(last.origin.inner_grad), kept.contrast.beta)
        nudge_unbounded = (ended & kept.contrast.downward) | (last.by_solver & last.ran.nudge_unbounded)
        told = converged(self.setup, kept, left, missing, nudge_unbounded, last.downward)
        if not self.setup.estimate_error:
            return told, last.error
        error = self._error(last)
        return told, jnp.where((told.status >= Status.NOT_SMOOTH) | jnp.isnan(error), jnp.inf, error)

    def _towards_target(self, now: LoopState, after: LoopState) -> LoopState:
        """Another round, where the estimated error is above the target and can be lowered."""
        missed = ~(after.error <= self.strategy.target_error)
        attempt, ran = after.attempt, after.ran
        more = missed & ~now.by_solver & ~now.missed & (attempt.tol > self.tol) & self._may_continue(attempt)
        again = jnp.asarray(False)
        if self.strategy.rerun is not None:
            budget = self.strategy.rerun.solver.step_budget
            most = _MOST_ROUNDS * budget if self.strategy.max_steps is None else self.strategy.max_steps
            rounds = 1 - jnp.log10(ran.share)
            within = ran.num_steps.astype(self.dtype) * (1 + 1 / rounds) <= jnp.asarray(most, self.dtype)
            again = missed & now.by_solver & (after.error < _STALLED * now.error) & within
            ran = ran._replace(share=jnp.where(again, 0.1 * ran.share, ran.share))
        tol = jnp.where(more, jnp.maximum(0.1 * attempt.tol, self.tol), attempt.tol)
        stage = jnp.where(more, Stage.NEWTON, jnp.where(again, Stage.RERUN, now.stage))
        return after._replace(attempt=attempt._replace(tol=tol), ran=ran, stage=stage, running=more | again)
