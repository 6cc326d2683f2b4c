"""What each stage solves and measures."""

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import NOISE_FLOOR
from contrastive_meta._contrastive.loop_state import LoopState, PhaseLoop, Prepared, Stage
from contrastive_meta._contrastive.newton_krylov import (
    newton_systems,
    nudge_norm_at,
)
from contrastive_meta._contrastive.newton_step import (
    Solved,
    Systems,
    Trial,
    nudge_residual,
)
from contrastive_meta._contrastive.phases import on_line
from contrastive_meta._contrastive.rerun import Runs, tolerances_for
from contrastive_meta._contrastive.step_size import Plan
from contrastive_meta._control import cast_like, only_if, settle

# Most strengths of a ladder: with a factor of 8 that spans the precision of float64.
_MOST_STRENGTHS = 16
# Between two tries of the Newton-Krylov iteration, learning goes on until its residual is this fraction of what it was.
_FURTHER = 1e-3
# Most steps of each system that estimates an error, and how far its residuals are reduced: of the base point, and of
# the response. At 1e-2 for the response the estimate was 5 to 260 times too low where one curvature was 1e-4 beside
# others near 1. What truncation and noise may have left counts by its size alone.
MOST_STEPS = 200
_AHEAD_TOL, _RESPONSE_TOL, _POSSIBLE_TOL = 1e-2, 1e-4, 1e-1


class StageSystems(PhaseLoop):
    """What each stage solves and measures."""

    def _prepare(self, now: LoopState) -> Prepared:
        """No system, and as many strengths as there are to be."""
        setup, line = self.setup, now.attempt.line
        zero, none = jnp.zeros((2,), self.dtype), jnp.zeros((2,), jnp.int32)
        doubles = 2 if setup.estimate_error else 1
        most = jnp.where((now.stage == Stage.RERUN) | (not self.sought), doubles, _MOST_STRENGTHS)
        most = jnp.where((now.stage == Stage.TEST) | (now.stage == Stage.LEARN_ON), 0, most)
        systems = Systems(
            rhs=(tree.zeros_like(line.response), tree.zeros_like(line.response)),
            active=jnp.zeros((2,), bool),
            residual=zero,
            step=zero,
            radius=jnp.zeros((), self.dtype),
            num_steps=none,
            forcing=jnp.zeros((), self.dtype),
            delay=jnp.asarray(False),
            guess=tree.zeros_like(line.response),
        )
        return Prepared(systems, line.response, most, now.stage == Stage.RERUN)

    def _prepare_newton(self, now: LoopState) -> Prepared:
        """A step of the base point, and a step of the response."""
        line = now.attempt.line
        systems = newton_systems(self.setup, now.attempt, self._max_steps)
        _, anew, _ = nudge_residual(self.setup, line)
        response = tree.where(anew, tree.zeros_like(line.response), line.response)
        return self._prepare(now)._replace(systems=systems, response=response)

    def _prepare_ahead(self, now: LoopState) -> Prepared:
        """The rest of the base point's way, if it is more than noise."""
        start, gradient = self.setup.start, now.attempt.line.base.inner_grad
        residual = self.norm(gradient)
        prepared = self._prepare(now)
        limit = jnp.maximum(self._noise_in_one_direction, _AHEAD_TOL * residual)
        systems = prepared.systems._replace(
            rhs=(tree.scale(-1.0, gradient), prepared.systems.rhs[1]),
            active=jnp.stack([residual > NOISE_FLOOR * start.noise, jnp.asarray(False)]),
            residual=jnp.stack([limit, jnp.zeros_like(limit)]),
            radius=start.scale,
            num_steps=jnp.full((2,), MOST_STEPS, jnp.int32),
        )
        return prepared._replace(systems=systems, most=jnp.int32(0))

    def _prepare_response(self, now: LoopState) -> Prepared:
        """What the response lacks, and what it may lack that truncation and noise hide."""
        setup, kept, left = self.setup, now.kept.contrast, now.attempt.line.contrast.residual
        possible = kept.residual_error
        # Where the strength is not sought, truncation is not made good: what it takes is known.
        left = tree.where(jnp.asarray(self.sought) & ~now.by_solver, left, tree.add(left, possible))
        sizes = setup.norms(nudges=[possible, left, kept.residual])
        gain = setup.stencil.gain / tree.or_one(kept.beta)
        noise = self._noise_in_one_direction * gain
        largest = jnp.maximum(sizes[1], sizes[2])
        limits = jnp.stack([_POSSIBLE_TOL * sizes[0], _RESPONSE_TOL * largest])
        limits = jnp.maximum(noise, limits)
        prepared = self._prepare(now)
        systems = prepared.systems._replace(
            rhs=(possible, left),
            active=sizes[:2] > limits,
            residual=limits,
            radius=jnp.full((), jnp.inf, self.dtype),
            num_steps=jnp.full((2,), MOST_STEPS, jnp.int32),
        )
        return prepared._replace(systems=systems, most=jnp.int32(1), fixed=jnp.asarray(True))

    def _prepare_pilot(self, now: LoopState) -> Prepared:
        """The response to the nudge, roughly."""
        pull, zero = now.attempt.line.base.outer.in_params, jnp.zeros((), self.dtype)
        length = self.setup.norm_of_nudge(pull)
        prepared = self._prepare(now)
        systems = prepared.systems._replace(
            rhs=(prepared.systems.rhs[0], pull),
            active=jnp.stack([jnp.asarray(False), length > 0]),
            residual=jnp.stack([zero, 1e-2 * length]),
            num_steps=jnp.full((2,), max(self.setup.scheme.num_pilot_steps, 1), jnp.int32),
        )
        return prepared._replace(systems=systems, most=jnp.int32(_MOST_STRENGTHS if self.sought else 0))

    def _solve(self, now: LoopState) -> Runs | None:
        """Where the solver's runs ended, if the stage asks for any."""
        setup, rerun = self.setup, self.strategy.rerun
        if rerun is None:
            return None
        nudges, learn_on = now.ran.beta * setup.stencil.nudges, now.stage == Stage.LEARN_ON
        skipped = None if self.template.matched else self.template.free_phase
        index = jnp.array([k for k in range(self.number) if k != skipped])
        begin = jax.tree.map(lambda x: jnp.broadcast_to(x, (self.number, *x.shape)), now.origin.params)
        if self.strategy.target_error is not None:
            begin = tree.where(now.ran.share < 1, on_line(now.kept.base.params, now.kept.response, nudges), begin)
        if self.template.is_complex:
            # Learning on needs no complex learner.
            real = self.strategy.fast is not None
            begin, nudges = (begin, jnp.real(nudges)) if real else (tree.to_complex(begin), nudges)
        nothing = Runs(
            jax.tree.map(lambda xs: xs[index], begin),
            jnp.zeros(index.shape, jnp.int32),
            jnp.zeros((), self.dtype),
            jnp.int32(0),
            jnp.int32(0),
        )

        def solve(before: Runs) -> Runs:
            tolerances = now.ran.share * tolerances_for(setup, now.origin, nudges, self.strategy.nudged_tol)
            on = jnp.maximum(_FURTHER * self.norm(now.origin.inner_grad), 2 * setup.start.noise)
            tolerances = jnp.where(learn_on, on, tolerances).astype(self.dtype)
            count = jnp.where(learn_on, 1, index.size)
            strengths = jnp.where(learn_on, 0, nudges)[index]
            return rerun.run(setup, now.origin, before.ends, strengths, tolerances[index], now.ran.linear, count)

        runs = only_if(learn_on | (now.stage == Stage.RERUN), solve, nothing)
        if skipped is not None:
            ends = jax.tree.map(lambda xs, x: jnp.insert(xs, skipped, x[skipped], axis=0), runs.ends, begin)
            runs = runs._replace(ends=ends, status=jnp.insert(runs.status, skipped, 0))
        return runs

    def _plan(self, now: LoopState, prepared: Prepared, solved: Solved, runs: Runs | None) -> tuple[Plan, Trial]:
        """What is measured in an iteration, and what is to be said of the base point where it stays."""
        setup, line, region = self.setup, now.attempt.line, now.attempt.region
        here = [now.stage == stage for stage in (Stage.RESPONSE, Stage.RERUN, Stage.LEARN_ON)]
        refines, rerun, learn_on = settle(*here)
        # In that stage both solutions belong to the response.
        usable = refines & tree.all_finite((solved.step, solved.response_step))
        step = tree.where(refines, tree.zeros_like(solved.step), solved.step)
        more = tree.where(usable, solved.step, tree.zeros_like(solved.step))
        both = tree.add(solved.response_step, more)
        added = tree.where(refines & ~usable, tree.zeros_like(both), both)
        params, response = tree.add(line.base.params, step), tree.add(prepared.response, added)
        moved = tree.subtract(params, line.base.params)
        known = ~jnp.any(jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(moved)]))
        beta = now.kept.contrast.beta
        ends = ()
        if runs is not None:
            learned = jax.tree.map(lambda xs, like: jnp.real(xs[-1]).astype(like.dtype), runs.ends, params)
            center = cast_like(setup.stencil.at_zero(runs.ends), params)
            response_converged = cast_like(tree.scale(-1.0, setup.stencil.contrast(runs.ends, now.ran.beta)), response)
            params = tree.where(learn_on, learned, tree.where(rerun, center, params))
            response = tree.where(rerun, response_converged, response)
            known &= ~(learn_on | rerun)
            beta = jnp.where(rerun, now.ran.beta, beta)
            ends = runs.ends
        zero, false = jnp.zeros((), self.dtype), jnp.asarray(False)
        length, distance = setup.norms(responses=[response], steps=[step])
        trial = Trial(zero, false, known & (distance > 0), zero, false, jnp.isfinite(solved.gradient_norm))
        settled = (setup.displacement > 0) & (region.reduction == 1) & (line.contrast.displacement > 0)
        plan = Plan(
            base=line.base._replace(params=cast_like(params, line.base.params)),
            known=known,
            response=cast_like(response, line.response),
            length=jnp.where(length > 0, length, self._usual_length()),
            nudge_norm=nudge_norm_at(setup, line),
            displacement=line.contrast.displacement,
            reduction=region.reduction,
            most=prepared.most,
            settled=settled,
            fixed=prepared.fixed,
            beta=beta,
            rerun=rerun,
            ends=ends,
            linear=now.ran.linear,
            origin=now.origin,
            to_minima=now.stage == Stage.PILOT,
        )
        return plan, trial
