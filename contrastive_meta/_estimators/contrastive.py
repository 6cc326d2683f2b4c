"""The contrastive estimator: run learning twice, free and nudged, and contrast what each phase measures."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import only_if
from contrastive_meta._estimators._assess import assess
from contrastive_meta._estimators._free_point import NUM_GRADIENTS, FreePoint, survey
from contrastive_meta._estimators._go_on import run_fast
from contrastive_meta._estimators._judge import ran_away
from contrastive_meta._estimators._phases import Goal, Nudging, Phases
from contrastive_meta._estimators._run_again import require_complex_capable, run_again
from contrastive_meta._estimators._search import Outcome
from contrastive_meta._instance import Instance
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._estimators.newton_krylov import NewtonKrylov
from contrastive_meta._nudging import (
    LinearNudge,
    LossNudge,
    Nudge,
    NudgeInPlace,
    NudgeStrength,
    automatic,
    is_concrete,
)
from contrastive_meta._plasticity.autodiff import Autodiff, PlasticityRule
from contrastive_meta._problem import Params
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import EstimatorState, MetaGradient, Status, flag, make_diagnostics, worst
from contrastive_meta._solvers.base import InnerSolver, Solution


class Ran(NamedTuple):
    """What an estimate ran."""

    free: Solution
    nudging: Nudging
    point: FreePoint
    phases: Phases
    fell_back: jax.Array


# A strength is sought again where doubling it changes the contrast this many times more than when it was chosen.
_WORN = 8.0


@strategy
class Contrastive(MetaGradientEstimator):
    """Meta-gradients by contrast: the equilibrium-propagation rule applied to learning itself.

    A free phase learns; nudged phases, started from its solution, learn with beta times the outer loss added; the
    weighted sum of what each phase measures is dPhi/dtheta, theory (7) and (8). Needs gradients only, no second
    derivatives, no trajectory: memory does not grow with the number of inner steps. It sees what the losses see: not
    the initialisation, nor the optimiser's settings.

    Args:
      solver: the learner of the free phase.
      nudged_solver: the learner of the nudged phases; the same by default. Phases of one contrast take the same
        number of steps; host solvers and other black boxes decide for themselves.
      scheme: phases, weights and strength. `automatic()` by default: a central difference whose strength is sought; a
        scheme with a typed beta uses it raw.
      nudge: `LossNudge()` or `LinearNudge()`; by default the former where learning is run again, unless it turns out to
        have no minimum, when the phases are run with the latter (`FELL_BACK`); and the latter for `NewtonKrylov`, which
        linearises at the base point that it refines, so that phases need not evaluate the outer loss.
      rule: what a phase measures; `Autodiff()` is right for any problem.
      nudged_tol: residual, relative to |beta| ||v||, at which the nudged phases of a solver that runs to a tolerance
        may stop; by default about eps^(2/3), and never below the measured rounding noise.
      target_error: estimated relative error to reach. Nudged learning goes on, the base point with it, until
        `diagnostics.error_estimate` is below, in as many rounds as that takes; it stops earlier than without where that
        is enough. Where it cannot be reached the status is `TARGET_NOT_REACHED`. None takes what one run gives.
      max_steps: budget of steps of each nudged phase for `target_error`; by default that of `NewtonKrylov`, or 8 times
        the steps of a learner that is run again.
      sequential: run phases one after another instead of in one vmapped solve: about half the memory, and slower.
      estimate_error: whether to estimate how wrong the result is, `diagnostics.error_estimate`: from the contrasts of
        phases at twice the distance from their base point, and from what answers to what is left of the nudge and of
        learning would change. Costs a residual and three statistics for each phase, and three solves by conjugate
        gradients of at most 200 gradients each; no phase. Infinite where phases ran away. Above 0.1 the status is at
        least `APPROXIMATE`; without an estimate it knows residuals alone, which hardly show what lies along low
        curvature.

    Raises:
      ValueError: a target that is not positive, or without `estimate_error`.
      TypeError: a complex scheme meets an operation or a learner that is not holomorphic.

    Reference:
      Zucchet, Schug, von Oswald, Zhao & Sacramento (2022), theorem 1; Scellier & Bengio (2017).

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, log_decay, task: 0.5 * jnp.sum((w - task) ** 2 + jnp.exp(log_decay) * w**2),
      ...     outer_loss=lambda w, log_decay, task: 0.5 * jnp.sum((w - 1.0) ** 2),
      ...     init_params=lambda log_decay, task: jnp.zeros_like(task),
      ... )
      >>> estimator = cm.Contrastive(cm.OptaxDescent(optax.sgd(0.4), num_steps=100))
      >>> result = estimator.estimate(problem, jnp.array(0.0), jnp.array([4.0]))
      >>> round(float(result.grad), 3)  # w = 4 / (1 + e^0) = 2, so (w - 1) dw/dlog_decay = -1
      -1.0
    """

    solver: InnerSolver
    nudged_solver: InnerSolver | NewtonKrylov | None = None
    scheme: NudgeStrength = automatic()
    nudge: Nudge | None = None
    rule: PlasticityRule = Autodiff()
    nudged_tol: float | jax.Array | None = None
    target_error: float | jax.Array | None = None
    max_steps: int | jax.Array | None = None
    sequential: bool = static(default=False)
    estimate_error: bool = static(default=True)

    def __post_init__(self) -> None:
        """Check what is asked for."""
        if self.target_error is not None and not self.estimate_error:
            raise ValueError("`target_error` needs the error estimate: leave out `estimate_error=False`.")
        if self.target_error is not None and is_concrete(self.target_error) and not self.target_error > 0:
            raise ValueError(
                f"`target_error` must be positive, a relative error such as 1e-3; got {self.target_error}."
            )

    def _estimate(self, setting: Instance, state: EstimatorState) -> MetaGradient:
        meta_params = setting.meta_params
        free, nudging, point, phases, fell_back = self._run_phases(setting, state)
        setting, unflatten = nudging.tree_setting, nudging.flattening.unflatten

        # Contrast: what the phases measured, weighted and summed, theory (8).
        grad = phases.scheme.contrast(phases.statistic)

        # The same contrast of where they ended, and of their residuals, says how far it can be trusted.
        assessed, spent = phases.assessed, jnp.int32(0)
        if assessed is None:
            assessed = assess(nudging, point, phases, estimate_error=self.estimate_error)
            spent = assessed.num_gradients
        params, ((outer_loss, aux), _) = tree.where(
            assessed.further, (phases.base, phases.base_outer), (point.params, point.outer)
        )
        beta, goal = phases.scheme.strength(setting.dtype), self._goal(nudging, point)
        missed = jnp.asarray(False) if goal is None else goal.missed(assessed)
        return MetaGradient(
            grad=jax.tree.map(lambda g, theta: g.astype(theta.dtype), grad, meta_params),
            outer_loss=outer_loss,
            params=unflatten(params),
            state=EstimatorState(
                unflatten(params),
                free.memory,
                unflatten(phases.scheme.contrast(phases.params)),
                beta,
                *_settled(state, phases.chosen, assessed.doubling),
                free.model_state,
            ),
            aux=aux,
            diagnostics=make_diagnostics(
                setting.dtype,
                beta=beta,
                free_residual=assessed.free_residual,
                nudged_residual=assessed.nudged_residual,
                displacement=assessed.displacement,
                error_estimate=assessed.error,
                num_gradients=free.num_gradients + NUM_GRADIENTS + phases.num_gradients + spent,
                status=worst(fell_back, flag(missed, Status.TARGET_NOT_REACHED), assessed.status),
            ),
        )

    def _run_phases(self, setting: Instance, state: EstimatorState) -> Ran:
        """The free phase, and the nudged ones."""
        # Free phase: learn.
        free = setting.free_phase(self.solver, state)
        setting = setting.at(free.model_state)
        init = setting.problem.init(setting.meta_params, setting.task)
        setting = setting.in_dtype_of_loss()
        flattening = tree.Flattening.of(free.params)
        flat = setting.flattened(flattening)

        def look(params: Params) -> FreePoint:
            return survey(flat, params, free, flattening.flatten(init))

        # Nudged phases: learn a little towards the outer loss.
        response = tree.scale(-1.0, flattening.flatten(state.displacement))
        learner = self._learner(setting)
        nudge = self.nudge or (LossNudge() if isinstance(learner, InnerSolver) else LinearNudge())
        nudging = Nudging(
            flat, flattening, setting, self.scheme, nudge, self.rule, self.sequential, response, state.strength
        )
        template = self.scheme.template()
        if template.is_complex:
            require_complex_capable(flat, template, flattening.flatten(free.params))
        if isinstance(learner, InnerSolver):
            point = look(flattening.flatten(free.params))
            nudged, phases, fell_back = self._learned_again(nudging, point, learner)
            return Ran(free, nudged, point, phases, fell_back)
        return Ran(free, nudging, *self._found_fast(nudging, free, look, learner))

    def _goal(self, nudging: Nudging, point: FreePoint) -> Goal | None:
        """The accuracy asked for, as learners take it."""
        if self.target_error is None:
            return None
        target = jnp.asarray(self.target_error, nudging.setting.dtype)
        return Goal(target, functools.partial(assess, nudging, point, estimate_error=True), self.max_steps)

    def _parts(self) -> dict[str, Any]:
        nudged = (InnerSolver, NewtonKrylov, type(None))
        return super()._parts() | {
            "nudged_solver": nudged, "scheme": NudgeStrength, "nudge": (Nudge, type(None)), "rule": PlasticityRule
        }  # fmt: skip

    def _learner(self, setting: Instance) -> InnerSolver | NewtonKrylov:
        """What runs the nudged phases: by default the fast learner, where it goes to where the solver would."""
        # A fixed sequence of minibatches ends near, not at, the minimum of the whole loss.
        fast = self.solver.bind(setting.meta_params).descends_loss and setting.problem.sample is None
        return self.nudged_solver or (NewtonKrylov() if fast else self.solver)

    def _learned_again(
        self, nudging: Nudging, point: FreePoint, learner: InnerSolver
    ) -> tuple[Nudging, Phases, jax.Array]:
        """The phases as published, what nudged them, and whether another nudge had to take the place of the loss's."""
        own, goal = learner.bind(nudging.setting.meta_params), self._goal(nudging, point)
        phases = run_again(nudging, point, own, self.nudged_tol, goal)
        if self.nudge is not None or self.scheme.template().is_complex:
            return nudging, phases, jnp.int32(Status.CONVERGED)

        # A nudge that takes the loss's minimum away: its linearisation cannot.
        def linearised(before: Phases) -> Phases:
            instead = nudging._replace(nudge=LinearNudge(), scheme=before.scheme)
            phases, spent = run_again(instead, point, own, self.nudged_tol), before.num_gradients
            if goal is not None:
                assessed = assess(instead, point, phases, estimate_error=True)
                phases, spent = phases._replace(assessed=assessed), spent + assessed.num_gradients
            return phases._replace(num_gradients=spent + phases.num_gradients, chosen=before.chosen)

        unbounded = ran_away(point, phases) & tree.all_finite((point.params, point.outer_grad))
        nudged = nudging._replace(nudge=NudgeInPlace(unbounded))
        return nudged, only_if(unbounded, linearised, phases), flag(unbounded, Status.FELL_BACK)

    def _found_fast(
        self, nudging: Nudging, free: Solution, look: Callable[[Params], FreePoint], learner: NewtonKrylov
    ) -> tuple[FreePoint, Phases, jax.Array]:
        """Where the fast learner set out, its phases or those of the solver in its place, and what became of it."""
        own = self.solver.bind(nudging.setting.meta_params)

        def attempt(params: Params) -> tuple[FreePoint, Outcome]:
            point = look(params)
            return point, learner.run(nudging, point, self._goal(nudging, point))

        # One phase after another, lest what hardly ever runs decides how much memory is set aside. Nor is a strength
        # sought: that would double what there is to compile.
        scheme = self.scheme if nudging.sought is None else nudging.sought.default
        as_published = nudging._replace(sequential=True, nudge=self.nudge or LossNudge(), scheme=scheme)

        def published(point: FreePoint) -> Phases:
            return run_again(as_published, point, own, self.nudged_tol, self._goal(as_published, point))

        return run_fast(nudging, free, attempt, own, published if learner.fall_back and own.takes_losses else None)


def _settled(state: EstimatorState, chosen: jax.Array, doubling: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The strength to carry on, and what doubling it changed when it was chosen; 0 where it has worn out."""
    new = state.strength != chosen
    # What is exact to rounding has a truncation that comes and goes.
    allowed = jnp.maximum(jnp.where(new, doubling, state.doubling), 1e3 * jnp.finfo(doubling.dtype).eps)
    return jnp.where(doubling > _WORN * allowed, 0.0, chosen), allowed
