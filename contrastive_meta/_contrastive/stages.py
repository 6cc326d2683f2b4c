"""The stages of the nudged phases as iterations of one loop, in which every loss has one call site for each purpose.

| stage | solver | linear systems | measured | next |
|---|---|---|---|---|
| NEWTON | | base point and response | base point, a ladder of strengths | NEWTON, MEASURE, TEST |
| MEASURE | | | a ladder of strengths | TEST |
| TEST | | | | LEARN_ON or PILOT where it failed, else AHEAD |
| LEARN_ON | without a nudge | | base point | NEWTON, PILOT |
| PILOT | | response, roughly | a ladder, if the strength is sought | RERUN |
| RERUN | every phase | | where the phases ended | RERUN with a linear nudge, AHEAD |
| AHEAD | | base point | base point | RESPONSE |
| RESPONSE | | response | the selected strength | NEWTON or RERUN towards a target, else the end |

The last two estimate the error, by iterative refinement: the result is compared with what a further pass makes of it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import OuterGradients
from contrastive_meta._contrastive.fallback import Fallback
from contrastive_meta._contrastive.loop_state import Found, LoopState, Ran, Stage
from contrastive_meta._contrastive.newton_krylov import (
    Attempt,
    accept_or_reject,
    is_away,
    may_start,
    outcome_of,
)
from contrastive_meta._contrastive.newton_step import (
    Line,
    Solved,
    Trial,
    assess_trial,
    solve_systems,
)
from contrastive_meta._contrastive.phases import Base, PhaseSetup
from contrastive_meta._contrastive.step_size import measure, select
from contrastive_meta._control import cast_like, switch, while_loop
from contrastive_meta._nudging import LinearNudge, LossNudge
from contrastive_meta._problem import Params
from contrastive_meta._result import PhasesBy, Status, flag, worst


class Phases(Fallback):
    """The nudged phases of one estimate: the loop, and the stages of the Newton-Krylov iteration."""

    def run(self, first: LoopState) -> LoopState:
        """Iterations until the phases are found, and their error is estimated."""
        last: LoopState = while_loop(lambda state: state.running, self.iterate, first)
        return last

    def first(self) -> LoopState:
        """Before the first iteration."""
        setup, strategy, start = self.setup, self.strategy, self.setup.start
        outer, outer_grad = _outer_of(setup)
        base = Base(start.params, start.inner_grad, outer, outer_grad)
        beta, spent = self._first_strength(base)
        line = self._unmeasured(base, setup.displacement, beta)
        none, false = jnp.int32(0), jnp.asarray(False)
        tol = self.tol
        if strategy.target_error is not None and strategy.fast is not None:
            # A residual of the nudge is not much less of the meta-gradient, and may be more.
            tol = jnp.maximum(tol, 0.1 * jnp.asarray(strategy.target_error, self.dtype))
        attempt = Attempt.at(setup, line, tol)
        if strategy.fast is None:
            stage = jnp.int32(Stage.PILOT if setup.scheme.num_pilot_steps else Stage.RERUN)
        else:
            go = may_start(setup, line, attempt.region) & self._may_continue(attempt)
            stage = jnp.where(go, jnp.int32(Stage.NEWTON), jnp.int32(Stage.MEASURE))
        linear = jnp.asarray(isinstance(setup.nudge, LinearNudge))
        ran = Ran(beta, linear, false, jnp.zeros((self.number,), jnp.int32), false, jnp.ones((), self.dtype), none)
        infinite = jnp.full((), jnp.inf, self.dtype)
        first = LoopState(
            stage, attempt, line, base, ran, false, false, false, false, none, jnp.zeros((2,), self.dtype), false,
            false, infinite, spent, jnp.asarray(True),
        )  # fmt: skip
        begin: LoopState = jax.tree.map(jnp.asarray, first)
        return begin

    def iterate(self, now: LoopState) -> LoopState:
        """One iteration of the loop: solver, linear systems, measurement, decision."""
        setup, line, region = self.setup, now.attempt.line, now.attempt.region

        # The solver: on without a nudge, or every phase.
        runs = self._solve(now)

        # Linear systems: a step of the base point, and a step of the response.
        otherwise = self._prepare(now)
        prepared = self._by_stage(now, "_prepare", lambda method: method(now), otherwise, lambda: otherwise)
        if self.solves:
            solved = solve_systems(setup, line.base, region, prepared.systems)
        else:
            solved = Solved.nothing(setup, line.base)

        # Measurement: a base point, and the phases around it.
        plan, trial = self._plan(now, prepared, solved, runs)

        def assess(base: Base) -> tuple[Trial, jax.Array]:
            assessed = cast_like(assess_trial(setup, line.base, base, solved, region), trial)
            return assessed, ~is_away(region, assessed, solved) | (now.stage != Stage.NEWTON)

        stay = ~is_away(region, trial, solved) | (now.stage != Stage.NEWTON)
        ladder = measure(setup, plan._replace(most=jnp.where(plan.known & ~stay, 0, plan.most)), assess, trial)
        # Without phases the residual of the nudge moves with the nudge.
        pull = tree.subtract(ladder.base.outer.in_params, line.base.outer.in_params)
        drifted = line.contrast._replace(residual=tree.add(line.contrast.residual, pull))
        contrast = select(setup, plan, ladder, drifted)
        response = tree.where(ladder.number > 1, plan.response, line.response)
        spent = ladder.num_evaluations * self.number + jnp.where(plan.known, 0, 1)
        spent += solved.num_gradients + (0 if runs is None else runs.num_gradients)
        now = now._replace(num_gradients=now.num_gradients + spent.astype(jnp.int32))
        taken = cast_like(Line(ladder.base, response, contrast), line)
        found = Found(taken, solved, ladder.trial, runs, plan.length)

        # Decision.
        after: LoopState = self._by_stage(now, "_after", lambda method: method(now, found), now)
        return after

    def _by_stage(self, now: LoopState, prefix: str, call: Any, like: Any, default: Any = None) -> Any:
        """What the method of this stage returns; `default()` where it has none."""
        branches, table = ([] if default is None else [default]), [0] * len(Stage)
        for stage in self.stages:
            method = getattr(self, f"{prefix}_{stage.name.lower()}", None)
            if method is not None:
                table[stage] = len(branches)
                branches.append(functools.partial(call, method))
        in_precision = [functools.partial(lambda branch: cast_like(branch(), like), branch) for branch in branches]
        return switch(jnp.asarray(table, jnp.int32)[now.stage], in_precision)

    def _first_strength(self, base: Base) -> tuple[jax.Array, jax.Array]:
        """A strength to begin with, and the gradients spent on finding it."""
        setup = self.setup
        if self.strategy.fast is None and not setup.scheme.num_pilot_steps:
            scheme, spent = setup.scheme.resolve(setup.probe(base.params, base.inner_grad, setup.displacement))
            return scheme.strength(self.dtype), spent
        return setup.strength_for(base, setup.displacement, self._usual_length()), jnp.int32(0)

    def _after_newton(self, now: LoopState, found: Found) -> LoopState:
        """Accept or reject the pass."""
        before = now.attempt
        away = is_away(before.region, found.trial, found.solved)
        attempt, progress = accept_or_reject(self.setup, before, found.line, found.solved, found.trial, away)
        continues = progress & self._may_continue(attempt)
        ended = jnp.where(attempt.measured, Stage.TEST, Stage.MEASURE)
        return now._replace(attempt=attempt, stage=jnp.where(continues, Stage.NEWTON, ended))

    def _after_measure(self, now: LoopState, found: Found) -> LoopState:
        """Nothing was looked for, but phases were measured."""
        attempt = now.attempt._replace(line=found.line, measured=jnp.asarray(True))
        return now._replace(attempt=attempt, stage=jnp.int32(Stage.TEST))

    def _after_test(self, now: LoopState, found: Found) -> LoopState:
        """Keep what was found; where that is not what was looked for, the solver learns on or runs the phases."""
        setup, line = self.setup, now.attempt.line
        outcome = outcome_of(setup, now.attempt)
        rests = self.strategy.rests(line.base.params, line.base.outer.in_params)
        missed = outcome.missed | ~rests
        now = now._replace(
            kept=line,
            missed=missed,
            close=outcome.close & rests,
            uncertain=outcome.uncertain,
            num_tries=now.num_tries + 1,
        )
        now = self._kept(now, ~missed if self.strategy.deferred else jnp.asarray(True))
        if self.strategy.deferred:
            return now._replace(running=now.running & ~missed)
        if self.strategy.rerun is None:
            return now
        decided: LoopState = tree.where(missed, cast_like(self.fall_back(now), now), now)
        return decided

    def run_by(self, last: LoopState) -> jax.Array:
        """Who ran the phases that are kept."""
        fast = jnp.where(last.num_tries > 1, PhasesBy.NEWTON_KRYLOV_AFTER_LEARNING, PhasesBy.NEWTON_KRYLOV)
        return jnp.where(last.by_solver, PhasesBy.SOLVER, fast)

    def status(self, last: LoopState) -> jax.Array:
        """The status that only the loop knows: what fell back on what."""
        went_on = flag(last.num_tries > 1, Status.FELL_BACK)
        linearised = flag(last.by_solver & last.ran.linearised, Status.FELL_BACK)
        if self.strategy.fast is None:
            return linearised
        uncertain = flag(last.uncertain, Status.FREE_NOT_CONVERGED)
        if self.strategy.rerun is None or self.template.is_complex:
            failed = last.missed & ~last.close & ~last.uncertain
            return worst(went_on, uncertain, flag(failed, Status.NUDGED_NOT_CONVERGED))
        return worst(went_on, uncertain, flag(last.missed, Status.FELL_BACK))


def _outer_of(setup: PhaseSetup) -> tuple[OuterGradients, Params]:
    """The outer loss and the gradients of what nudges, at the end of the free phase."""
    start = setup.start
    if not isinstance(setup.nudge, LinearNudge | LossNudge):
        return setup.outer_at(start.params)
    return OuterGradients(start.outer_loss, start.aux, start.outer_grad, start.outer_in_meta), ()
