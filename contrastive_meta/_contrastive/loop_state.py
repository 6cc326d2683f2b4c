"""The state of the loop of stages, and what all stages need."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._contrastive.newton_krylov import (
    Attempt,
    NewtonKrylov,
    may_continue,
)
from contrastive_meta._contrastive.newton_step import (
    Line,
    Solved,
    Systems,
    Trial,
)
from contrastive_meta._contrastive.phases import Base, PhaseSetup
from contrastive_meta._contrastive.rerun import Rerun, Runs
from contrastive_meta._contrastive.step_size import Contrast
from contrastive_meta._problem import Params

# Error estimates solve for residuals down to this fraction of the noise in one direction of many.
_OF_NOISE = 0.3


class Stage(enum.IntEnum):
    """What one iteration of the loop does."""

    NEWTON = 0
    MEASURE = 1
    TEST = 2
    AHEAD = 3
    RESPONSE = 4
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
      nudge_unbounded: whether a nudged loss has no minimum where its phase went.
      share: of the tolerance of the first round.
      num_steps: of each phase, all rounds together.
    """

    beta: jax.Array
    linear: jax.Array
    linearised: jax.Array
    statuses: jax.Array
    nudge_unbounded: jax.Array
    share: jax.Array
    num_steps: jax.Array


class LoopState(NamedTuple):
    """The loop between two conjugations.

    Attributes:
      stage: what the next iteration does.
      attempt: at the line that is being looked for.
      kept: the line whose error is being estimated, or the fast response_step while the solver runs phases.
      origin: where this attempt set out.
      ran: what the solver's phases came to.
      missed: whether the fast response_step is not what was looked for.
      close: whether it is right but for its accuracy.
      uncertain: whether it may belong to another minimum than the learner's.
      by_solver: whether the solver ran the phases that are kept.
      num_tries: of the Newton-Krylov iteration.
      missing: what is at least missing of the kept line: lengths of the steps down the gradient, and down the residual
        of the nudge, shape (2,); lower bounds by the Cauchy-Schwarz inequality.
      unknown: whether the estimate of the error met curvature by which nothing can be told.
      downward: whether what refines phases that the solver ran, or that failed, met downward curvature.
      error: estimated relative error of the kept line.
      num_gradients: spent so far.
      running: whether there is a next iteration.
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
    """What an iteration is to solve and to measure.

    Attributes:
      systems: the linear systems.
      response: to which the response_step is added.
      most: most strengths to measure at.
      fixed: whether the strength is that of the kept line, or of the solver's phases.
    """

    systems: Systems
    response: Params
    most: jax.Array
    fixed: jax.Array


class Found(NamedTuple):
    """What an iteration solved and measured."""

    line: Line
    solved: Solved
    trial: Trial
    runs: Runs | None
    length: jax.Array  # of the response


class PhaseLoop:
    """What all stages need.

    Args:
      setup: what the nudged phases are to be.
      strategy: who runs them.
    """

    def __init__(self, setup: PhaseSetup, strategy: Strategy) -> None:
        self.setup, self.strategy = setup, strategy
        self.dtype = setup.dtype
        self.norm = setup.norm
        self.sought = setup.sought
        self.template = setup.scheme.template()
        self.number = len(self.template.nudges)
        self.fast = strategy.fast if strategy.fast is not None else NewtonKrylov()
        self.tol = jnp.asarray(10 * setup.start.eps if self.fast.tol is None else self.fast.tol, self.dtype)
        stages = [Stage.NEWTON, Stage.MEASURE, Stage.TEST] if strategy.fast is not None else []
        stages += [Stage.AHEAD, Stage.RESPONSE] if setup.estimate_error else []
        if strategy.rerun is not None:
            stages += [Stage.LEARN_ON] if strategy.fast is not None else []
            stages += [Stage.PILOT, Stage.RERUN] if setup.scheme.num_pilot_steps else [Stage.RERUN]
        self.stages = stages
        # A typed strength of a learner that runs again needs no linear system, unless an error is to be estimated.
        self.solves = any(hasattr(self, f"_prepare_{stage.name.lower()}") for stage in stages)

    def _unmeasured(self, base: Base, displacement: jax.Array, beta: jax.Array) -> Line:
        """A line without a response: all of the nudge is left."""
        contrast = Contrast.none(self.setup, base.outer.in_params, beta, displacement)
        return Line(base, tree.zeros_like(base.params), contrast)

    def _may_continue(self, attempt: Attempt) -> jax.Array:
        return may_continue(
            self.setup,
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
