"""The contrastive estimator: run learning twice, free and nudged, and contrast what each phase measures."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._estimators._free_point import (
    NUM_GRADIENTS,
    FreePoint,
    free_status,
    survey,
)
from contrastive_meta._estimators._phases import Phases, nudged_status, or_one
from contrastive_meta._estimators.base import MetaGradientEstimator, Setting
from contrastive_meta._holomorphic import require_holomorphic
from contrastive_meta._nudging import LossNudge, Nudge, NudgeScheme, NudgeStrength, central_difference, relative
from contrastive_meta._plasticity.autodiff import Autodiff, PlasticityRule, measure
from contrastive_meta._problem import (
    EstimatorState,
    MetaGradient,
    MetaParams,
    Params,
    make_diagnostics,
    same_arrays,
    worst,
)
from contrastive_meta._pytree import static, strategy
from contrastive_meta._response import Probe
from contrastive_meta._solvers.base import InnerSolver, Solution, Stop

_PHASES = "phases"


@strategy
class Contrastive(MetaGradientEstimator):
    """Meta-gradients by contrast: the equilibrium-propagation rule applied to learning itself.

    A free phase learns; nudged phases, started from its solution, learn with beta times the outer loss added; the
    weighted sum of what each phase measures is dPhi/dtheta, algorithm (7) and (8). Needs gradients only, no second
    derivatives, no trajectory: memory does not grow with the number of inner steps. It sees what the losses see: not
    the initialisation, nor the optimiser's settings.

    Args:
      solver: the learner of the free phase.
      nudged_solver: the learner of the nudged phases; the same by default. Phases of one contrast take the same
        number of steps; host solvers and other black boxes decide for themselves.
      scheme: phases, weights and strength. `relative(central_difference)` by default; a scheme with a typed beta
        uses it raw.
      nudge: `LossNudge()` or `LinearNudge()`.
      rule: what a phase measures; `Autodiff()` is right for any problem.
      nudged_tol: residual, relative to |beta| ||v||, at which the nudged phases of a solver that runs to a tolerance
        may stop; by default about eps^(2/3), and never below the measured rounding noise.
      sequential: run phases one after another instead of in one vmapped solve: about half the memory, and slower.

    Raises:
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
    nudged_solver: InnerSolver | None = None
    scheme: NudgeStrength = relative(central_difference)
    nudge: Nudge = LossNudge()
    rule: PlasticityRule = Autodiff()
    nudged_tol: float | jax.Array | None = None
    sequential: bool = static(default=False)

    def _estimate(self, setting: Setting, state: EstimatorState) -> MetaGradient:
        # Free phase: learn.
        free = setting.free_phase(self.solver, state)
        init = setting.problem.init(setting.meta_params, setting.task)
        meta_params, setting = setting.meta_params, setting.in_dtype_of_loss()
        point = survey(setting, free, init, self._statistic(setting))

        # Nudged phases: learn a little towards the outer loss.
        scheme, pilot_gradients = self.scheme.resolve(_probe(setting, point))
        nudged = setting.replace_problem(
            self.nudge.apply(setting.problem, point.params, setting.meta_params, setting.task, point.outer_grad)
        )
        phases = self._nudged_phases(nudged, point, scheme)

        # Contrast: what the phases measured, weighted and summed, algorithm (8). The same contrast of where they
        # ended is the response dphi/dbeta = -u, and of their residuals what is left of the nudge, v - H u.
        grad = scheme.contrast(phases.statistic)
        response = scheme.contrast(phases.params)
        remainder = scheme.contrast(phases.residual)

        base, base_grad = _base_point(setting, point, scheme, phases)
        outer_loss, aux = setting.problem.outer_with_aux(base, setting.meta_params, setting.task)
        beta = scheme.strength(setting.dtype)
        return MetaGradient(
            grad=jax.tree.map(lambda g, theta: g.astype(theta.dtype), grad, meta_params),
            outer_loss=outer_loss,
            params=base,
            state=EstimatorState(base, free.memory, response, beta),
            aux=aux,
            diagnostics=make_diagnostics(
                setting.dtype,
                beta=beta,
                free_residual=tree.norm(base_grad),
                nudged_residual=tree.norm(remainder) / or_one(point.nudge_norm),
                displacement=beta * tree.norm(response) / point.scale,
                num_gradients=free.num_gradients + NUM_GRADIENTS + pilot_gradients + phases.num_gradients + 3,
                status=worst(
                    free_status(setting, point, base, base_grad),
                    nudged_status(setting, point, scheme, phases, grad, response, remainder),
                ),
            ),
        )

    def _parts(self) -> dict[str, Any]:
        nudged = (InnerSolver, type(None))
        return super()._parts() | {
            "nudged_solver": nudged, "scheme": NudgeStrength, "nudge": Nudge, "rule": PlasticityRule
        }  # fmt: skip

    def _statistic(self, setting: Setting) -> Any:
        return lambda at: self.rule.statistic(setting.problem, at, setting.meta_params, setting.task, 0.0)

    def _nudged_phases(self, setting: Setting, point: FreePoint, scheme: NudgeScheme) -> Phases:
        """Run the scheme's phases from the free solution, together, and measure each where it ends."""
        solver = (self.nudged_solver or self.solver).bind(setting.meta_params)
        start, memory = point.params, point.solution.memory
        if scheme.is_complex:
            start, memory = tree.to_complex(start), ()
            _require_complex_capable(setting, scheme, solver, start)
        if not same_arrays(memory, solver.init_memory(point.params)):
            memory = ()
        nudges, _ = scheme.arrays(setting.dtype)
        tolerances = self._tolerances(setting, point, nudges)

        def run(beta: jax.Array, stop: Stop) -> Solution:
            def on_minibatch(at: Params, step: jax.Array) -> jax.Array:
                return setting.nudged_minibatch(at, beta, step)

            return solver.solve(
                lambda at: setting.nudged(at, beta),
                start,
                minibatch_loss=on_minibatch if setting.problem.sample is not None else None,
                memory=memory,
                stop=stop,
            )

        # An unmatched free phase is the free solution itself; everything else runs, the matched control included.
        skipped = None if scheme.matched else scheme.free_phase
        running = [k for k in range(len(scheme.nudges)) if k != skipped]
        solutions = _run_sequentially(run, nudges, tolerances, running) if self.sequential else _run_together(
            run, nudges[jnp.array(running)], tolerances[jnp.array(running)]
        )  # fmt: skip
        ended, status, num_gradients = solutions.params, solutions.status, jnp.sum(solutions.num_gradients)
        if skipped is not None:
            ended = jax.tree.map(lambda xs, x: jnp.insert(xs, skipped, x, axis=0), ended, start)
        statistic, residual = _over_phases(
            lambda at, beta: measure(self.rule, setting.problem, at, setting.meta_params, setting.task, beta),
            ended,
            nudges,
            sequential=self.sequential,
        )
        return Phases(ended, statistic, residual, status, num_gradients + len(scheme.nudges))

    def _tolerances(self, setting: Setting, point: FreePoint, nudges: jax.Array) -> jax.Array:
        """Absolute gradient norms at which phases may stop: relative to their nudge, not below the noise."""
        eps = jnp.finfo(setting.dtype).eps
        relative_tol = eps ** (2 / 3) if self.nudged_tol is None else self.nudged_tol
        sizes = jnp.abs(nudges)
        smallest = jnp.min(jnp.where(sizes > 0, sizes, jnp.inf))
        # The matched control stops with the weakest nudge.
        wanted = jnp.asarray(relative_tol, setting.dtype) * jnp.where(sizes > 0, sizes, smallest) * point.nudge_norm
        return jnp.maximum(wanted, 2 * point.noise).astype(setting.dtype)


def _run_together(run: Any, nudges: jax.Array, tolerances: jax.Array) -> Solution:
    """All phases in one vmapped solve; solvers that run to a tolerance go on until every phase is done."""
    solutions: Solution = jax.vmap(lambda beta, tol: run(beta, Stop(tol=tol, group=_PHASES)), axis_name=_PHASES)(
        nudges, tolerances
    )
    return solutions


def _run_sequentially(run: Any, nudges: jax.Array, tolerances: jax.Array, running: list[int]) -> Solution:
    """One phase after another: the first to run decides how many steps the others take."""
    first = run(nudges[running[-1]], Stop(tol=tolerances[running[-1]]))
    stop = Stop(tol=jnp.zeros_like(tolerances[0]), max_steps=first.num_steps)
    solutions = [run(nudges[k], stop) for k in running[:-1]] + [first]
    stacked: Solution = jax.tree.map(lambda *xs: jnp.stack(xs), *solutions)
    return stacked


def _over_phases(function: Any, params: Params, nudges: jax.Array, *, sequential: bool) -> Any:
    if sequential:
        return jax.lax.map(lambda phase: function(*phase), (params, nudges))
    return jax.vmap(function)(params, nudges)


def _probe(setting: Setting, point: FreePoint) -> Probe:
    return Probe(
        inner_grad=tree.grad(setting.inner),
        params=point.params,
        free_grad=point.inner_grad,
        outer_grad=point.outer_grad,
        nudge_norm=point.nudge_norm,
        scale=point.scale,
        noise=point.noise,
        dtype=setting.dtype,
    )


def _base_point(setting: Setting, point: FreePoint, scheme: NudgeScheme, phases: Phases) -> tuple[Params, Params]:
    """The free solution, or what the phases made of it where that is better learned.

    The phases go on learning: the matched control is the free solution some steps later, and the mean of phases
    whose nudges cancel is, to second order in beta, the same. The smaller residual wins.
    """
    if scheme.free_phase is not None:
        refined = jax.tree.map(lambda xs: xs[scheme.free_phase], phases.params)
    else:
        refined = jax.tree.map(lambda xs: jnp.mean(jnp.real(xs), axis=0), phases.params)
    after = tree.grad(setting.inner)(refined)
    better = tree.norm(after) < tree.norm(point.inner_grad)
    base, base_grad = tree.where(better, (refined, after), (point.params, point.inner_grad))
    return base, base_grad


def _require_complex_capable(setting: Setting, scheme: NudgeScheme, solver: InnerSolver, start: Params) -> None:
    """Raise unless both losses, their gradients and the learner's steps are holomorphic."""
    meta_params = tree.to_complex(setting.meta_params)
    for name, loss in (("inner_loss", setting.problem.inner), ("outer_loss", setting.problem.outer)):
        require_holomorphic(
            tree.value_and_grad(functools.partial(_on_task, loss, setting.task), argnums=(0, 1)),
            start,
            meta_params,
            what=f"{name} or its gradient",
            remedy="Complex schemes differentiate along a complex nudge: write the loss without this operation, "
            "or use a real scheme such as `central_difference`.",
            complex_step=len(scheme.nudges) == 1,
        )
    solver.check_holomorphic(start)


def _on_task(loss: Any, task: Any, params: Params, meta_params: MetaParams) -> jax.Array:
    value: jax.Array = loss(params, meta_params, task)
    return value
