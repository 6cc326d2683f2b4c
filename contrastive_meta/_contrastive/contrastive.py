"""The contrastive estimator: run learning twice, free and nudged, and contrast what each phase measures."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import UNCONVERGED, BasePoint, survey
from contrastive_meta._contrastive.loop_state import LoopState, Strategy
from contrastive_meta._contrastive.newton_krylov import NewtonKrylov
from contrastive_meta._contrastive.nudged_by import NudgedBy
from contrastive_meta._contrastive.phases import PhaseSetup, Stencil
from contrastive_meta._contrastive.rerun import Rerun, require_complex_capable
from contrastive_meta._contrastive.stages import Phases
from contrastive_meta._control import axes_of_shard_map, while_loop
from contrastive_meta._estimators.base import MetaGradientEstimator, Prepare
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import Nudge, NudgeStrength, automatic, is_concrete
from contrastive_meta._plasticity.autodiff import Autodiff, PlasticityRule
from contrastive_meta._problem import MetaParams, Params, same_arrays
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import EstimatorState, MetaGradient, Status, flag, is_rounding, make_diagnostics, worst
from contrastive_meta._row_norms import num_products
from contrastive_meta._solvers.base import InnerSolver, Solution
from contrastive_meta._walls import Walls, walls_of

# A strength is sought again where the next strength changes the contrast this many times more than when it was chosen.
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
      nudged_solver: the learner of the nudged phases. By default it is `NewtonKrylov()` where `solver` descends the
        whole loss, and `solver` itself elsewhere. Phases of one contrast take the same number of steps; host solvers
        and other black boxes decide for themselves. `diagnostics.phases_by` tells who ran the phases in the end.
      scheme: phases, weights and strength. `automatic()` by default: a central difference whose strength is sought, and
        which is extrapolated to the next order. A scheme with a typed beta uses it raw.
      nudge: `LossNudge()` or `LinearNudge()`. By default it is the linear nudge for `NewtonKrylov`, which linearises at
        the base point that it refines, so that phases need not evaluate the outer loss; so it is where the solver takes
        over from it. For a solver that runs the phases from the first it is the loss
        nudge; if the nudged loss turns out to have no minimum, the linear nudge takes its place (`FELL_BACK`).
      rule: what a phase measures; `Autodiff()` is right for any problem.
      nudged_tol: residual, relative to |beta| ||v||, at which the nudged phases of a solver that runs to a tolerance
        may stop; by default about eps^(2/3), and never below the measured rounding noise.
      target_error: estimated relative error to reach. Nudged learning goes on, and the base point is refined with it,
        until `diagnostics.error_estimate` is below the target, in as many rounds as that takes. It stops earlier than
        without a target where that is enough. Where the target cannot be reached the status is `TARGET_NOT_REACHED`.
        None takes what one run gives.
      max_steps: budget of steps of each nudged phase for `target_error`; by default that of `NewtonKrylov`, or 8 times
        the steps of a solver that runs the phases.
      sequential: run phases one after another instead of in one vmapped solve: about half the memory, and slower.
      estimate_error: whether to estimate how wrong the result is, `diagnostics.error_estimate`. The estimate compares
        the result with what a further pass makes of it (iterative refinement), and takes truncation and noise from
        neighbouring strengths. It costs the gradients of the further pass: at most 200 for each of two linear systems,
        and a few evaluations of the phases. It is infinite where a nudge was unbounded or the further pass met downward
        curvature. Above 0.1 the status is at least `APPROXIMATE`. Without an estimate the status knows residuals alone,
        which hardly show an error along low curvature.

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
        super().__post_init__()
        if self.target_error is not None and not self.estimate_error:
            raise ValueError("`target_error` needs the error estimate: leave out `estimate_error=False`.")
        if self.target_error is not None and is_concrete(self.target_error) and not self.target_error > 0:
            raise ValueError(
                f"`target_error` must be positive, a relative error such as 1e-3; got {self.target_error}."
            )

    def _estimate(self, instance: Instance, state: EstimatorState) -> MetaGradient:
        # Free phase: learn.
        free = instance.free_phase(self.solver, state)

        # Nudged phases: learn a little towards the outer loss.
        phases = self._phases(instance, state, free)
        last = phases.run(phases.first())

        # Contrast: what the phases measured, weighted and summed, theory (8).
        return self._result(instance, state, free, phases, last)

    def _estimate_each(self, prepare: Prepare, inputs: tuple[Any, ...]) -> MetaGradient:
        """All tasks at once; those whose phases failed fall back one by one, and the others do not pay for it.

        Where there are several devices, tasks may be spread over them, which a traced program cannot see: then tasks
        fall back where they are, all in step, and none is sent to another device.
        """
        first = jax.tree.map(lambda xs: xs[0], inputs)
        if jax.device_count() > 1 or not self.nudged_by(prepare(*first)[0]).in_reserve:
            return super()._estimate_each(prepare, inputs)

        def attempt(*of_one: Any) -> tuple[Solution, BasePoint, LoopState]:
            instance, state = prepare(*of_one)
            free = instance.free_phase(self.solver, state)
            phases = self._phases(instance, state, free, defer=True)
            return free, phases.setup.start.without_constants(), phases.run(phases.first())

        def resume(of_one: Any, found: tuple[Solution, BasePoint, LoopState]) -> LoopState:
            instance, state = prepare(*of_one)
            free, start, last = found
            phases = self._phases(instance, state, free, start)
            return phases.run(phases.fall_back(last))

        def conclude(*of_one: Any) -> MetaGradient:
            *task, (free, start, last) = of_one
            instance, state = prepare(*task)
            return self._result(instance, state, free, self._phases(instance, state, free, start), last)

        frees, starts, lasts = jax.vmap(attempt)(*inputs)

        def rescue(carry: tuple[jax.Array, LoopState]) -> tuple[jax.Array, LoopState]:
            failed, conjugations = carry
            k = jnp.argmax(failed)
            of_one, found = jax.tree.map(lambda xs: xs[k], (inputs, (frees, starts, conjugations)))
            last = resume(of_one, found)
            return failed.at[k].set(False), jax.tree.map(lambda xs, x: xs.at[k].set(x), conjugations, last)

        _, lasts = while_loop(lambda carry: jnp.any(carry[0]), rescue, (lasts.missed, lasts))
        results: MetaGradient = jax.vmap(conclude)(*inputs, (frees, starts, lasts))
        return results

    def _without_estimate(self) -> "Contrastive":
        """Without an error estimate, unless the accuracy asked for needs one."""
        return self if self.target_error is not None else dataclasses.replace(self, estimate_error=False)

    def nudged_by(self, instance: Instance) -> NudgedBy:
        """Who runs the nudged phases."""
        return NudgedBy.choose(self.nudged_solver, self.solver, instance)

    def _phases(
        self,
        instance: Instance,
        state: EstimatorState,
        free: Solution,
        start: BasePoint | None = None,
        *,
        defer: bool = False,
    ) -> Phases:
        """What the nudged phases are to be, and who runs them.

        Args:
          instance: the problem.
          state: of an earlier estimate.
          free: the free phase.
          start: what the losses say where it ended; None to find out.
          defer: whether phases that fail are left for later.
        """
        instance = instance.at(free.model_state)
        init = instance.problem.init(instance.meta_params, instance.task)
        original = instance.in_dtype_of_loss()
        own = self.solver.bind(original.meta_params)
        walls, params, instance = walls_of(self.solver, original, free.params), free.params, original
        if walls is not None:
            self._check_walls(own, walls, original.meta_params)
            params, instance = walls.at, walls.seen_by_estimators(original)
        flattening = tree.Flattening.of(params)
        flat = instance.flattened(flattening)
        by = self.nudged_by(instance)
        template = self.scheme.template()
        if template.is_complex:
            require_complex_capable(flat, template, flattening.flatten(params))
        if start is None:
            at = flattening.flatten(params)
            # Products that reach across a wall say nothing of the rows on this side of it.
            products = num_products(at) if walls is None else 0
            start = survey(flat, at, free, flattening.flatten(init), products)
        start = start._replace(eps=tree.coarsest_eps(instance.dtype, params))
        may_rerun = (by.reruns or by.in_reserve) and not defer
        setup = PhaseSetup(
            instance=flat,
            tree_instance=instance,
            as_written=original,
            flattening=flattening,
            start=start,
            units=start.units,
            scheme=self.scheme,
            stencil=Stencil.of(template, instance.dtype),
            nudge=self.nudge or by.default_nudge,
            rule=self.rule,
            sequential=self.sequential,
            guess=tree.scale(-1.0, flattening.flatten(state.displacement)),
            displacement=state.strength,
            may_rerun=may_rerun,
            estimate_error=self.estimate_error,
            walls=walls,
        )

        def rests(params: Params, gradient: Params) -> jax.Array:
            at = flattening.unflatten(params)
            if walls is None:
                return own.rests_at(at, flattening.unflatten(gradient))
            learned = walls.params_of(at, original.meta_params)
            return walls.rests_at(at, learned, tree.grad(original.inner)(learned))

        rerun = None
        if may_rerun:
            rerun = self._rerun(by.solver, free, by.reruns, template.is_complex)
            if walls is not None:
                rerun = rerun._replace(walls=walls, original=original)
        return Phases(setup, Strategy(by.fast, rerun, defer, rests, self.nudged_tol, self.target_error, self.max_steps))

    def _rerun(self, solver: InnerSolver, free: Solution, first: bool, is_complex: bool) -> Rerun:
        """The solver as it runs phases: all together where it is asked to from the first, else one by one."""
        start = tree.to_complex(free.params) if is_complex else free.params
        memory = free.memory if first and not is_complex else ()
        if not same_arrays(memory, solver.init_memory(start)):
            memory = ()
        if first and is_complex:
            solver.check_holomorphic(start)
        may_linearise = first and self.nudge is None and not is_complex
        # In `jax.shard_map` nothing can be reduced over a mapped axis (an assertion in jax 0.10.2).
        together = first and not self.sequential and not axes_of_shard_map()
        return Rerun(solver, memory, may_linearise, together)

    def _result(
        self, instance: Instance, state: EstimatorState, free: Solution, phases: Phases, last: LoopState
    ) -> MetaGradient:
        """The contrast of the phases, and how far it can be trusted."""
        start, kept, unflatten = phases.setup.start, last.kept, phases.setup.flattening.unflatten
        convergence, error = phases.conclude(last)
        refined = convergence.free_residual < phases.norm(start.inner_grad)
        params, outer_loss, aux = tree.where(
            refined,
            (kept.base.params, kept.base.outer.loss, kept.base.outer.aux),
            (start.params, start.outer_loss, start.aux),
        )
        learned, response = unflatten(params), unflatten(kept.response)
        certain, same = self._held_as_learned(instance, free, phases, last)
        error = jnp.where(certain & same, error, jnp.inf)
        # At the edge of a wall a phase does not run away, it leaves the wall.
        at_edge = ~certain & (convergence.status == Status.UNBOUNDED_NUDGE)
        found = jnp.where(at_edge, jnp.int32(Status.NOT_SMOOTH), convergence.status)
        if (walls := phases.setup.walls) is not None:
            learned, response = walls.in_params(learned, response, instance.meta_params)
        strength, allowed = self._strength_to_carry(state, last)
        missed = jnp.asarray(False) if self.target_error is None else ~(error <= self.target_error)
        return MetaGradient(
            grad=jax.tree.map(lambda g, theta: g.astype(theta.dtype), kept.contrast.grad, instance.meta_params),
            outer_loss=outer_loss,
            params=learned,
            state=EstimatorState(
                learned,
                free.memory,
                tree.scale(-1.0, response),
                kept.contrast.beta,
                strength,
                allowed,
                free.model_state,
            ),
            aux=aux,
            diagnostics=make_diagnostics(
                instance.dtype,
                is_zero=is_rounding(kept.contrast.grad, kept.base.outer.in_meta, error),
                beta=kept.contrast.beta,
                free_residual=jnp.minimum(convergence.free_residual, phases.norm(start.inner_grad)),
                nudged_residual=convergence.nudged_residual,
                displacement=convergence.displacement,
                error_estimate=error if self.estimate_error else None,
                num_gradients=free.num_gradients + start.num_gradients + last.num_gradients,
                phases_by=phases.run_by(last),
                status=worst(
                    phases.status(last),
                    flag(missed, Status.TARGET_NOT_REACHED),
                    flag(~same, Status.FREE_NOT_CONVERGED),
                    flag(~certain, Status.NOT_SMOOTH),
                    found,
                ),
            ),
        )

    def _held_as_learned(
        self, instance: Instance, free: Solution, phases: Phases, last: LoopState
    ) -> tuple[jax.Array, jax.Array]:
        """Whether walls hold all phases alike, and whether the base point is the learner's solution.

        A learner that took no loss is compared: the base point is a minimum of the loss, and it may have learned
        something else.
        """
        setup, base = phases.setup, last.kept.base
        certain = same = jnp.asarray(True)
        if setup.walls is not None:
            instance = instance.at(free.model_state).in_dtype_of_loss()
            at = setup.flattening.unflatten(base.params)
            certain = setup.walls.is_certain(instance, at, setup.norm(base.inner_grad))
            certain &= ~setup.crosses_walls(base.params, last.kept.response, last.kept.contrast.beta)
        if not self.solver.bind(instance.meta_params).takes_losses:
            start = setup.start
            changes = tree.subtract(base.of_outer_loss, start.outer_grad), tree.subtract(base.params, start.params)
            change, distance = setup.norms(nudges=changes[:1], steps=changes[1:])
            far = (distance > UNCONVERGED * start.scale) | (change > UNCONVERGED * start.nudge_norm)
            same = ~(far & (start.nudge_norm > 0))
        return certain, same

    def _check_walls(self, solver: InnerSolver, walls: Walls, meta_params: MetaParams) -> None:
        """Raise for rules and schemes that a learner with walls cannot have."""
        if not isinstance(self.rule, Autodiff) and walls.depends_on(meta_params):
            raise TypeError(
                "A learner whose penalty, bounds or constraints depend on the meta-parameters needs `rule=Autodiff()`: "
                "what its phases measure is the derivative of the whole inner objective, the penalty included. Got "
                f"{type(self.rule).__name__}, which measures `inner_loss`. For that rule write the penalty into "
                "`inner_loss`, in a smooth form."
            )
        if self.scheme.template().is_complex and (solver.walls is not None or solver.held_to is not None):
            raise TypeError(
                "Complex schemes cannot follow a learner with a penalty, bounds or constraints: a proximal step, or "
                "the choice of what is active, is not holomorphic. Use `automatic()` or another real scheme, such as "
                "`relative(central_difference)`."
            )

    def _strength_to_carry(self, state: EstimatorState, last: LoopState) -> tuple[jax.Array, jax.Array]:
        """The strength to carry on, and what the next one changed when it was chosen; 0 where it has worn out."""
        contrast, before = last.kept.contrast, state.doubling
        new = state.strength != contrast.displacement
        change = jnp.where(jnp.isfinite(contrast.change), contrast.change, 1.0).astype(before.dtype)
        # What is exact to rounding has a truncation that comes and goes.
        allowed = jnp.maximum(jnp.where(new, change, before), 1e3 * jnp.finfo(change.dtype).eps)
        return jnp.where(change > _WORN * allowed, 0.0, contrast.displacement), allowed

    def _parts(self) -> dict[str, Any]:
        nudged = (InnerSolver, NewtonKrylov, type(None))
        return super()._parts() | {
            "nudged_solver": nudged, "scheme": NudgeStrength, "nudge": (Nudge, type(None)), "rule": PlasticityRule
        }  # fmt: skip
