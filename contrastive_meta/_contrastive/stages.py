"""The stages of the nudged phases as turns of one loop, in which every loss has one call site for each purpose.

| stage | solver | linear systems | measured | next |
|---|---|---|---|---|
| NEWTON | | base point and response | base point, a ladder of strengths | NEWTON, MEASURE, JUDGE |
| MEASURE | | | a ladder of strengths | JUDGE |
| JUDGE | | | | LEARN_ON or PILOT where it failed, else AHEAD |
| LEARN_ON | without a nudge | | base point | NEWTON, PILOT |
| PILOT | | response, roughly | a ladder, if the strength is sought | RERUN |
| RERUN | every phase | | where the phases ended | RERUN with a linear nudge, AHEAD |
| AHEAD | | base point | base point | ANSWER |
| ANSWER | | response | the selected strength | NEWTON or RERUN towards a target, else the end |

The last two estimate the error, by iterative refinement: the result is compared with what a further pass makes of it.
"""

import enum
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import NOISE_FLOOR, FreeResidual, OuterGradients
from contrastive_meta._contrastive.convergence import Convergence, converged, learning_ended
from contrastive_meta._contrastive.newton_krylov import (
    Attempt,
    NewtonKrylov,
    accept_or_reject,
    is_away,
    may_go_on,
    may_start,
    newton_systems,
    nudge_norm_at,
    outcome_of,
)
from contrastive_meta._contrastive.newton_step import (
    LONG,
    Line,
    Region,
    Solved,
    Systems,
    Trial,
    judge_trial,
    solve_systems,
    what_is_left,
)
from contrastive_meta._contrastive.phases import Base, PhaseSetup, on_line
from contrastive_meta._contrastive.rerun import Rerun, Runs, tolerances_for
from contrastive_meta._contrastive.step_size import Contrast, Plan, measure, select
from contrastive_meta._control import cast_like, only_if, settle
from contrastive_meta._nudging import LinearNudge, LossNudge
from contrastive_meta._problem import Params
from contrastive_meta._result import PhasesBy, Status, flag, worst

# Most strengths of a ladder: with a factor of 8 that spans the precision of float64.
_MOST_STRENGTHS = 16
# How often the Newton-Krylov iteration is tried.
_MOST_TRIES = 3
# In between, learning goes on until its residual is this fraction of what it was; a further try is worth it only if
# the residual fell at least to the second fraction.
_FURTHER, _WORTH_A_TRY = 1e-3, 0.5
# Most steps of each system that estimates an error, and how far its residuals are reduced: of the base point, and of
# the response. At 1e-2 for the response the estimate was 5 to 260 times too low where one curvature was 1e-4 beside
# others near 1. What truncation and noise may have left counts by its size alone.
_MOST_STEPS = 200
_AHEAD_TOL, _ANSWER_TOL, _POSSIBLE_TOL = 1e-2, 1e-4, 1e-1
# What leaves more than this of a system unsolved, because the curvature is downward or not told from rounding, tells
# nothing of the error.
_UNSOLVED = 0.1
# Residuals are solved for down to this fraction of the noise in one direction of many.
_OF_NOISE = 0.3
# A round towards a target error that leaves more of the error than this is the last one.
_STALLED = 0.9
# Where an accuracy is asked for, phases take by default this many times the steps that one run takes.
_MOST_ROUNDS = 8


class Stage(enum.IntEnum):
    """What a turn of the loop does."""

    NEWTON = 0
    MEASURE = 1
    JUDGE = 2
    AHEAD = 3
    ANSWER = 4
    LEARN_ON = 5
    PILOT = 6
    RERUN = 7


class Strategy(NamedTuple):
    """Who runs the nudged phases.

    Attributes:
      fast: the Newton-Krylov iteration, or None where the solver runs the phases from the first.
      rerun: the user's solver, or None where it is not to run any.
      deferred: whether phases that fail are left for later.
      rests: whether the solver stays at a minimum of the loss, from a point and the outer gradient there.
      nudged_tol: as for `Contrastive`.
      target_error: estimated relative error to reach, or None.
      max_steps: budget for that, or None.
    """

    fast: NewtonKrylov | None
    rerun: Rerun | None
    deferred: bool
    rests: Any
    nudged_tol: Any
    target_error: Any
    max_steps: Any


class Ran(NamedTuple):
    """What the solver's own phases came to.

    Attributes:
      beta: strength of the phases.
      linear: whether the nudge is linear.
      linearised: whether a linear nudge took the place of the outer loss.
      statuses: of each phase's run.
      ran_away: whether a nudged loss has no minimum where its phase went.
      share: of the tolerance of the first round.
      num_steps: of each phase, all rounds together.
    """

    beta: jax.Array
    linear: jax.Array
    linearised: jax.Array
    statuses: jax.Array
    ran_away: jax.Array
    share: jax.Array
    num_steps: jax.Array


class Turn(NamedTuple):
    """The loop between two turns.

    Attributes:
      stage: what the next turn does.
      attempt: at the line that is being looked for.
      kept: the line whose error is being estimated, or the fast answer while the solver runs phases.
      origin: where this attempt set out.
      ran: what the solver's phases came to.
      missed: whether the fast answer is not what was looked for.
      close: whether it is right but for its accuracy.
      uncertain: whether it may belong to another minimum than the learner's.
      by_solver: whether the solver ran the phases that are kept.
      num_tries: of the Newton-Krylov iteration.
      missing: what is at least missing of the kept line: lengths of the steps down the gradient, and down what is left
        of the nudge, shape (2,); lower bounds by the Cauchy-Schwarz inequality.
      unknown: whether the estimate of the error met curvature by which nothing can be told.
      downward: whether what refines phases that the solver ran met downward curvature.
      error: estimated relative error of the kept line.
      num_gradients: spent so far.
      running: whether there is a next turn.
    """

    stage: jax.Array
    attempt: Attempt
    kept: Line
    origin: Base
    ran: Ran
    missed: jax.Array
    close: jax.Array
    uncertain: jax.Array
    by_solver: jax.Array
    num_tries: jax.Array
    missing: jax.Array
    unknown: jax.Array
    downward: jax.Array
    error: jax.Array
    num_gradients: jax.Array
    running: jax.Array


class Prepared(NamedTuple):
    """What a turn is to solve and to measure.

    Attributes:
      systems: the linear systems.
      response: to which the answer is added.
      most: most strengths to measure at.
      fixed: whether the strength is that of the kept line, or of the solver's phases.
    """

    systems: Systems
    response: Params
    most: jax.Array
    fixed: jax.Array


class Found(NamedTuple):
    """What a turn solved and measured."""

    line: Line
    solved: Solved
    trial: Trial
    runs: Runs | None
    length: jax.Array  # of the response


class Phases:
    """The nudged phases of one estimate.

    Args:
      setup: what they are to be.
      strategy: who runs them.
    """

    def __init__(self, setup: PhaseSetup, strategy: Strategy) -> None:
        self.setup, self.strategy = setup, strategy
        self.dtype = setup.dtype
        self.norm = setup.instance.norm
        self.sought = setup.sought
        self.template = setup.scheme.template()
        self.number = len(self.template.nudges)
        self.fast = strategy.fast if strategy.fast is not None else NewtonKrylov()
        self.tol = jnp.asarray(10 * setup.start.eps if self.fast.tol is None else self.fast.tol, self.dtype)
        stages = [Stage.NEWTON, Stage.MEASURE, Stage.JUDGE] if strategy.fast is not None else []
        stages += [Stage.AHEAD, Stage.ANSWER] if setup.estimate_error else []
        if strategy.rerun is not None:
            stages += [Stage.LEARN_ON] if strategy.fast is not None else []
            stages += [Stage.PILOT, Stage.RERUN]
        self.stages = stages

    def run(self, first: Turn) -> Turn:
        """Turns until the phases are found, and their error is estimated."""
        last: Turn = jax.lax.while_loop(lambda turn: turn.running, self.turn, first)
        return last

    def first(self) -> Turn:
        """Before the first turn."""
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
            go = may_start(setup, line, attempt.region) & self._may_go_on(attempt)
            stage = jnp.where(go, jnp.int32(Stage.NEWTON), jnp.int32(Stage.MEASURE))
        linear = jnp.asarray(isinstance(setup.nudge, LinearNudge))
        ran = Ran(beta, linear, false, jnp.zeros((self.number,), jnp.int32), false, jnp.ones((), self.dtype), none)
        infinite = jnp.full((), jnp.inf if setup.estimate_error else jnp.nan, self.dtype)
        turn = Turn(
            stage, attempt, line, base, ran, false, false, false, false, none, jnp.zeros((2,), self.dtype), false,
            false, infinite, spent, jnp.asarray(True),
        )  # fmt: skip
        begin: Turn = jax.tree.map(jnp.asarray, turn)
        return begin

    def turn(self, now: Turn) -> Turn:
        """One turn of the loop: solver, linear systems, measurement, decision."""
        setup, line, region = self.setup, now.attempt.line, now.attempt.region

        # The solver: on without a nudge, or every phase.
        runs = self._solve(now)

        # Linear systems: a step of the base point, and an answer to what is left of the nudge.
        otherwise = self._prepare(now)
        prepared = self._by_stage(now, "_prepare", lambda method: method(now), otherwise, lambda: otherwise)
        solved = solve_systems(setup, line.base, region, prepared.systems)

        # Measurement: a base point, and the phases around it.
        plan, trial = self._plan(now, prepared, solved, runs)

        def judge(base: Base) -> tuple[Trial, jax.Array]:
            judged = cast_like(judge_trial(setup, line.base, base, solved, region), trial)
            return judged, ~is_away(region, judged, solved) | (now.stage != Stage.NEWTON)

        stay = ~is_away(region, trial, solved) | (now.stage != Stage.NEWTON)
        ladder = measure(setup, plan._replace(most=jnp.where(plan.known & ~stay, 0, plan.most)), judge, trial)
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
        after: Turn = self._by_stage(now, "_after", lambda method: method(now, found), now)
        return after

    def _by_stage(self, now: Turn, prefix: str, call: Any, like: Any, default: Any = None) -> Any:
        """What the method of this stage returns; `default()` where it has none."""
        branches, table = ([] if default is None else [default]), [0] * len(Stage)
        for stage in self.stages:
            method = getattr(self, f"{prefix}_{stage.name.lower()}", None)
            if method is not None:
                table[stage] = len(branches)
                branches.append(functools.partial(call, method))
        in_precision = [functools.partial(lambda branch: cast_like(branch(), like), branch) for branch in branches]
        return jax.lax.switch(jnp.asarray(table, jnp.int32)[now.stage], in_precision)

    # What is solved and measured.

    def _prepare(self, now: Turn) -> Prepared:
        """No system, and as many strengths as there are to be."""
        setup, line = self.setup, now.attempt.line
        zero, none = jnp.zeros((2,), self.dtype), jnp.zeros((2,), jnp.int32)
        doubles = 2 if setup.estimate_error else 1
        most = jnp.where((now.stage == Stage.RERUN) | (not self.sought), doubles, _MOST_STRENGTHS)
        most = jnp.where((now.stage == Stage.JUDGE) | (now.stage == Stage.LEARN_ON), 0, most)
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

    def _prepare_newton(self, now: Turn) -> Prepared:
        """A step of the base point, and an answer to what is left of the nudge."""
        line = now.attempt.line
        systems = newton_systems(self.setup, now.attempt, self._max_steps)
        _, anew, _ = what_is_left(self.setup, line)
        response = tree.where(anew, tree.zeros_like(line.response), line.response)
        return self._prepare(now)._replace(systems=systems, response=response)

    def _prepare_ahead(self, now: Turn) -> Prepared:
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
            num_steps=jnp.full((2,), _MOST_STEPS, jnp.int32),
        )
        return prepared._replace(systems=systems, most=jnp.int32(0))

    def _prepare_answer(self, now: Turn) -> Prepared:
        """What the response lacks, and what it may lack that truncation and noise hide."""
        setup, kept, left = self.setup, now.kept.contrast, now.attempt.line.contrast.residual
        possible = kept.residual_error
        # Where the strength is not sought, truncation is not made good: what it takes is known.
        left = tree.where(jnp.asarray(self.sought) & ~now.by_solver, left, tree.add(left, possible))
        sizes = self.norm(possible), self.norm(left)
        gain = setup.stencil.gain / tree.or_one(kept.beta)
        noise = self._noise_in_one_direction * gain
        largest = jnp.maximum(sizes[1], self.norm(kept.residual))
        limits = jnp.stack([_POSSIBLE_TOL * sizes[0], _ANSWER_TOL * largest])
        limits = jnp.maximum(noise, limits)
        prepared = self._prepare(now)
        systems = prepared.systems._replace(
            rhs=(possible, left),
            active=jnp.stack(sizes) > limits,
            residual=limits,
            radius=jnp.full((), jnp.inf, self.dtype),
            num_steps=jnp.full((2,), _MOST_STEPS, jnp.int32),
        )
        return prepared._replace(systems=systems, most=jnp.int32(1), fixed=jnp.asarray(True))

    def _prepare_pilot(self, now: Turn) -> Prepared:
        """The response to the nudge, roughly."""
        pull, zero = now.attempt.line.base.outer.in_params, jnp.zeros((), self.dtype)
        length = self.norm(pull)
        prepared = self._prepare(now)
        systems = prepared.systems._replace(
            rhs=(prepared.systems.rhs[0], pull),
            active=jnp.stack([jnp.asarray(False), length > 0]),
            residual=jnp.stack([zero, 1e-2 * length]),
            num_steps=jnp.full((2,), max(self.setup.scheme.num_pilot_steps, 1), jnp.int32),
        )
        return prepared._replace(systems=systems, most=jnp.int32(_MOST_STRENGTHS if self.sought else 0))

    def _solve(self, now: Turn) -> Runs | None:
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

    def _plan(self, now: Turn, prepared: Prepared, solved: Solved, runs: Runs | None) -> tuple[Plan, Trial]:
        """What is measured in a turn, and what is to be said of the base point where it stays."""
        setup, line, region = self.setup, now.attempt.line, now.attempt.region
        here = [now.stage == stage for stage in (Stage.ANSWER, Stage.RERUN, Stage.LEARN_ON)]
        answer, rerun, learn_on = settle(*here)
        # In that stage both solutions belong to the response.
        usable = answer & tree.all_finite((solved.step, solved.answer))
        step = tree.where(answer, tree.zeros_like(solved.step), solved.step)
        more = tree.where(usable, solved.step, tree.zeros_like(solved.step))
        added = tree.where(answer & ~usable, tree.zeros_like(solved.answer), tree.add(solved.answer, more))
        params, response = tree.add(line.base.params, step), tree.add(prepared.response, added)
        moved = tree.subtract(params, line.base.params)
        known = ~jnp.any(jnp.stack([jnp.any(x != 0) for x in jax.tree.leaves(moved)]))
        beta = now.kept.contrast.beta
        ends = ()
        if runs is not None:
            learned = jax.tree.map(lambda xs, like: jnp.real(xs[-1]).astype(like.dtype), runs.ends, params)
            center = cast_like(setup.stencil.at_zero(runs.ends), params)
            answered = cast_like(tree.scale(-1.0, setup.stencil.contrast(runs.ends, now.ran.beta)), response)
            params = tree.where(learn_on, learned, tree.where(rerun, center, params))
            response = tree.where(rerun, answered, response)
            known &= ~(learn_on | rerun)
            beta = jnp.where(rerun, now.ran.beta, beta)
            ends = runs.ends
        zero, false = jnp.zeros((), self.dtype), jnp.asarray(False)
        length, distance = tree.norms(response, step).astype(self.dtype)
        trial = Trial(zero, false, known & (distance > 0), zero, false, jnp.isfinite(solved.gradient_norm))
        settled = (setup.displacement > 0) & (region.shrink == 1) & (line.contrast.displacement > 0)
        plan = Plan(
            base=line.base._replace(params=cast_like(params, line.base.params)),
            known=known,
            response=cast_like(response, line.response),
            length=jnp.where(length > 0, length, self._usual_length()),
            nudge_norm=nudge_norm_at(setup, line),
            displacement=line.contrast.displacement,
            shrink=region.shrink,
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

    # What comes after, by stage.

    def _after_newton(self, now: Turn, found: Found) -> Turn:
        """Accept or reject the pass."""
        before = now.attempt
        away = is_away(before.region, found.trial, found.solved)
        attempt, progress = accept_or_reject(self.setup, before, found.line, found.solved, found.trial, away)
        go_on = progress & self._may_go_on(attempt)
        ended = jnp.where(attempt.measured, Stage.JUDGE, Stage.MEASURE)
        return now._replace(attempt=attempt, stage=jnp.where(go_on, Stage.NEWTON, ended))

    def _after_measure(self, now: Turn, found: Found) -> Turn:
        """Nothing was looked for, but phases were measured."""
        attempt = now.attempt._replace(line=found.line, measured=jnp.asarray(True))
        return now._replace(attempt=attempt, stage=jnp.int32(Stage.JUDGE))

    def _after_judge(self, now: Turn, found: Found) -> Turn:
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
        decided: Turn = tree.where(missed, cast_like(self.fall_back(now), now), now)
        return decided

    def fall_back(self, now: Turn) -> Turn:
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

    def _after_learn_on(self, now: Turn, found: Found) -> Turn:
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

    def _before_rerun(self, now: Turn, wanted: jax.Array) -> Turn:
        """Set out from the origin for phases that the solver runs; in reserve no strength is sought."""
        setup = self.setup
        pilot = bool(setup.scheme.num_pilot_steps)
        line = self._unmeasured(now.origin, jnp.zeros_like(setup.displacement), now.kept.contrast.beta)
        fresh = cast_like(Attempt.at(setup, line, now.attempt.tol), now.attempt)
        linear = jnp.asarray(isinstance(setup.rerun_nudge, LinearNudge))
        ran = now.ran._replace(linear=jnp.where(wanted, linear, now.ran.linear))
        if not pilot:
            found = setup.strength_for(now.origin, setup.displacement, self._usual_length())
            ran = ran._replace(beta=jnp.where(wanted, found, ran.beta))
        return now._replace(
            attempt=tree.where(wanted, fresh, now.attempt),
            ran=ran,
            stage=jnp.where(wanted, Stage.PILOT if pilot else Stage.RERUN, now.stage),
        )

    def _after_pilot(self, now: Turn, found: Found) -> Turn:
        """The strength of the phases, from the length of the response."""
        displacement = found.line.contrast.displacement
        if self.strategy.fast is not None:
            displacement = jnp.zeros_like(displacement)
        beta = self.setup.strength_for(now.origin, displacement, found.length)
        contrast = now.attempt.line.contrast._replace(displacement=displacement)
        attempt = now.attempt._replace(line=now.attempt.line._replace(contrast=contrast))
        return now._replace(attempt=attempt, ran=now.ran._replace(beta=beta), stage=jnp.int32(Stage.RERUN))

    def _after_rerun(self, now: Turn, found: Found) -> Turn:
        """Keep what the solver found, unless a nudge ran away or the fast answer is better."""
        setup, norm, runs, line, ran = self.setup, self.norm, found.runs, found.line, now.ran
        assert runs is not None and self.strategy.rerun is not None
        strength = ran.beta
        left, residual = norm(now.origin.inner_grad), norm(line.base.inner_grad)
        settled = learning_ended(setup, left, strength)
        ran_away = jnp.any(runs.status >= Status.DIVERGED) | (settled & line.contrast.downward)
        again = jnp.asarray(False)
        if self.strategy.rerun.may_linearise:
            again = ran_away & ~ran.linear & tree.all_finite((now.origin.params, now.origin.outer.in_params))

        # Where the line through the phases' ends misses the free solution, the way was not straight.
        nudges = strength * setup.stencil.nudges
        center = jax.tree.map(lambda xs: jnp.mean(jnp.real(xs), axis=0), runs.ends)
        on_path = tree.add_scaled(center, jnp.mean(jnp.real(nudges)), line.response)
        missed_by = norm(tree.subtract(on_path, now.origin.params)) / tree.or_one(strength * norm(line.response))
        crooked = jnp.where(settled & ~(residual < left), missed_by, 0.0)
        crooked = jnp.maximum(line.contrast.nonlinearity, crooked).astype(self.dtype)
        line = line._replace(contrast=line.contrast._replace(nonlinearity=crooked))

        # From far off a minimum either may learn further. Of two answers that are not accurate enough, the better one.
        fast = now.kept
        further = ~now.close | now.uncertain | (residual < norm(fast.base.inner_grad))
        better = now.close & (norm(fast.contrast.residual) <= norm(line.contrast.residual))
        chosen = jnp.asarray(self.strategy.fast is None) | (further & ~better)
        # On such a way phases may find another minimum than learning would have.
        gone = norm(tree.subtract(line.base.params, now.origin.params)) > LONG * setup.start.scale
        after = now._replace(
            kept=tree.where(chosen, cast_like(line, now.kept), now.kept),
            ran=ran._replace(
                linear=ran.linear | again,
                linearised=ran.linearised | again,
                statuses=runs.status,
                ran_away=ran_away,
                num_steps=ran.num_steps + runs.num_steps,
            ),
            by_solver=chosen,
            uncertain=now.uncertain & gone,
        )
        # A nudge that takes the minimum away: its linearisation cannot.
        after = self._kept(after, ~again)
        return after._replace(stage=jnp.where(again, Stage.RERUN, after.stage), running=after.running | again)

    def _kept(self, now: Turn, wanted: jax.Array) -> Turn:
        """Begin to estimate the error of the line that is kept, or stop."""
        if not self.setup.estimate_error:
            return now._replace(running=~wanted)
        region = Region.around(self.setup, now.kept.base.inner_grad)
        region = region._replace(two_sided=now.attempt.region.two_sided, uncertain=now.attempt.region.uncertain)
        attempt = now.attempt._replace(line=now.kept, region=cast_like(region, now.attempt.region))
        return now._replace(
            attempt=tree.where(wanted, attempt, now.attempt), stage=jnp.where(wanted, Stage.AHEAD, now.stage)
        )

    def _after_ahead(self, now: Turn, found: Found) -> Turn:
        """The base point, had learning ended."""
        finite = tree.all_finite((found.line.base.params, found.line.base.inner_grad))
        attempt = now.attempt._replace(line=tree.where(finite, found.line, now.attempt.line))
        missing = found.solved.cauchy.at[1].set(0)
        unknown = self._unsolved(found.solved)[0]
        return now._replace(attempt=attempt, missing=missing, unknown=unknown, stage=jnp.int32(Stage.ANSWER))

    def _unsolved(self, solved: Solved) -> jax.Array:
        """Of each system of an estimate, whether it ended with steps left and a tenth of it unsolved."""
        return (solved.left > _UNSOLVED) & (solved.num_steps > 0) & (solved.num_steps < _MOST_STEPS)

    def _after_answer(self, now: Turn, found: Found) -> Turn:
        """The refined result is there to be compared with the kept one."""
        # Truncation is no failure of the learner.
        residual, sought = self.norm(now.kept.contrast.residual), found.solved.lengths[1]
        missing = found.solved.cauchy[1] * jnp.minimum(residual / tree.or_one(sought), 1.0)
        after = now._replace(
            attempt=now.attempt._replace(line=found.line),
            missing=now.missing.at[1].set(missing.astype(self.dtype)),
            unknown=now.unknown | self._unsolved(found.solved)[1],
            downward=now.by_solver & found.solved.indefinite,
            running=jnp.asarray(False),
        )
        if self.strategy.target_error is None:
            return after
        return self._towards_target(now, after._replace(error=self._error(after)))

    def _error(self, last: Turn) -> jax.Array:
        """The refined result against the kept one, at the same strength, so that truncation cancels."""
        kept, refined = last.kept.contrast, last.attempt.line.contrast
        lacking = tree.add(tree.subtract(refined.plain, kept.plain), kept.correction)
        size, whole = tree.norms(lacking, tree.add(kept.grad, lacking)).astype(self.dtype)
        relative = jnp.where(size == 0, 0.0, size / whole)
        # A zero that nothing changes is exact.
        error = jnp.where(whole == 0, jnp.where(size == 0, 0.0, jnp.inf), jnp.sqrt(relative**2 + kept.error**2))
        return jnp.where(last.unknown, jnp.inf, error).astype(self.dtype)

    def conclude(self, last: Turn) -> tuple[Convergence, jax.Array]:
        """How far the phases came, and the estimated error: from what refining the kept line changed."""
        kept, refined = last.kept, last.attempt.line
        changes = [
            tree.subtract(new, old)
            for new, old in (
                (refined.base.params, kept.base.params),
                (refined.base.outer.in_params, kept.base.outer.in_params),
                (refined.response, kept.response),
            )
        ]
        residual, distance, shift, _ = tree.norms(kept.base.inner_grad, *changes).astype(self.dtype)
        # The whole step may go far along low curvature, where it hardly matters: the statuses go by what is certain.
        certain = jnp.minimum(last.missing[0] / tree.or_one(distance), 1.0)
        distance, shift, missing = certain * distance, certain * shift, last.missing[1]
        # Phases that are centred off the minimum take nothing from what the free phase learned.
        start = self.norm(self.setup.start.inner_grad)
        nearer = jnp.minimum(start / tree.or_one(residual), 1.0)
        pull = self.norm(kept.base.outer.in_params)
        left = FreeResidual(jnp.minimum(residual, start), nearer * distance, nearer * shift, pull)
        ended = ~last.by_solver | learning_ended(self.setup, self.norm(last.origin.inner_grad), kept.contrast.beta)
        ran_away = (ended & kept.contrast.downward) | (last.by_solver & last.ran.ran_away)
        told = converged(self.setup, kept, left, missing, ran_away, last.downward)
        if not self.setup.estimate_error:
            return told, last.error
        error = self._error(last)
        return told, jnp.where((told.status >= Status.UNBOUNDED_NUDGE) | jnp.isnan(error), jnp.inf, error)

    def _towards_target(self, now: Turn, after: Turn) -> Turn:
        """Another round, where the estimated error is above the target and can be lowered."""
        missed = ~(after.error <= self.strategy.target_error)
        attempt, ran = after.attempt, after.ran
        more = missed & ~now.by_solver & ~now.missed & (attempt.tol > self.tol) & self._may_go_on(attempt)
        again = jnp.asarray(False)
        if self.strategy.rerun is not None:
            budget = self.strategy.rerun.solver.step_budget
            most = _MOST_ROUNDS * budget if self.strategy.max_steps is None else self.strategy.max_steps
            rounds = 1 - jnp.log10(ran.share)
            within = ran.num_steps * (1 + 1 / rounds) <= most
            again = missed & now.by_solver & (after.error < _STALLED * now.error) & within
            ran = ran._replace(share=jnp.where(again, 0.1 * ran.share, ran.share))
        tol = jnp.where(more, jnp.maximum(0.1 * attempt.tol, self.tol), attempt.tol)
        stage = jnp.where(more, Stage.NEWTON, jnp.where(again, Stage.RERUN, now.stage))
        return after._replace(attempt=attempt._replace(tol=tol), ran=ran, stage=stage, running=more | again)

    def run_by(self, last: Turn) -> jax.Array:
        """Who ran the phases that are kept."""
        fast = jnp.where(last.num_tries > 1, PhasesBy.NEWTON_KRYLOV_AFTER_LEARNING, PhasesBy.NEWTON_KRYLOV)
        return jnp.where(last.by_solver, PhasesBy.SOLVER, fast)

    def status(self, last: Turn) -> jax.Array:
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

    # Small things.

    def _unmeasured(self, base: Base, displacement: jax.Array, beta: jax.Array) -> Line:
        """A line without a response: all of the nudge is left."""
        contrast = Contrast.none(self.setup, base.outer.in_params, beta, displacement)
        return Line(base, tree.zeros_like(base.params), contrast)

    def _may_go_on(self, attempt: Attempt) -> jax.Array:
        return may_go_on(
            attempt,
            self._max_steps,
            self.fast.max_passes,
            leave_basin=self.strategy.rerun is None and not self.strategy.deferred,
        )

    @property
    def _max_steps(self) -> Any:
        target, budget = self.strategy.target_error, self.strategy.max_steps
        return self.fast.max_steps if target is None or budget is None else budget

    @property
    def _noise_in_one_direction(self) -> jax.Array:
        """Down to which norm of a residual an error estimate looks for what it hides."""
        size = sum(x.size for x in jax.tree.leaves(self.setup.start.params))
        return jnp.asarray(_OF_NOISE * self.setup.start.noise / size**0.5)

    def _usual_length(self) -> jax.Array:
        """The length of a response that is not known yet, by the mean inverse curvature."""
        start = self.setup.start
        return tree.or_one(start.nudge_norm) / tree.or_one(start.curvature)

    def _first_strength(self, base: Base) -> tuple[jax.Array, jax.Array]:
        """A strength to begin with, and the gradients spent on finding it."""
        setup = self.setup
        if self.strategy.fast is None and not setup.scheme.num_pilot_steps:
            scheme, spent = setup.scheme.resolve(setup.probe(base.params, base.inner_grad, setup.displacement))
            return scheme.strength(self.dtype), spent
        return setup.strength_for(base, setup.displacement, self._usual_length()), jnp.int32(0)


def _outer_of(setup: PhaseSetup) -> tuple[OuterGradients, Params]:
    """The outer loss and the gradients of what nudges, at the end of the free phase."""
    start = setup.start
    if not isinstance(setup.nudge, LinearNudge | LossNudge):
        return setup.outer_at(start.params)
    return OuterGradients(start.outer_loss, start.aux, start.outer_grad, start.outer_in_meta), ()
