"""Implicit differentiation of the free solution, with any inverse of the Hessian."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import (
    NOISE_FLOOR,
    NUM_GRADIENTS,
    BasePoint,
    FreeResidual,
    cauchy_length,
    free_status,
    outer_gradients,
    survey,
)
from contrastive_meta._control import cond, scan
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._instance import Instance
from contrastive_meta._linear import (
    ConjugateGradient,
    InverseHessian,
    LinearSolution,
    Stopping,
    solve_by_conjugate_gradient,
)
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import EstimatorState, MetaGradient, Status, flag, is_rounding, make_diagnostics, worst
from contrastive_meta._solvers.base import InnerSolver
from contrastive_meta._walls import walls_of

# Solves the two systems of the error estimate. A coarser solution misses what lies along low curvature: at a tolerance
# of 1e-2 the estimate is off by 100 at condition 1e6, at 1e-4 by a quarter.
_REFINEMENT = ConjugateGradient(tol=1e-4, max_steps=200)
# The error is unknown where one of these two systems is left with a larger relative residual.
_UNSOLVED_REFINEMENT = 0.1
# The adjoint system is solved where its residual, and the Cauchy step that this residual still asks for, are below this
# fraction of the right-hand side and of the solution.
_UNSOLVED_ADJOINT = 1e-2


@strategy
class ImplicitDifferentiation(MetaGradientEstimator):
    """Meta-gradients by the implicit function theorem, theory (4).

    Needs second derivatives (Hessian-vector products and one mixed derivative) of the inner loss. Exact at a minimum
    up to the linear solve; at an unfinished solution it is wrong without the linear solve noticing, which the status
    reports from the inner residual. It sees what the losses see: not the initialisation, nor the optimiser's settings.

    Args:
      solver: the learner.
      inverse_hessian: how H^-1 v is found: `ConjugateGradient()` (iMAML), `NeumannSeries` (recurrent backprop),
        `Nystrom`, `DenseInverse()`, or `IdentityHessian()` (T1-T2).
      estimate_error: whether to estimate `diagnostics.error_estimate`: the change of the meta-gradient when Newton's
        step completes learning, and the linear solver's residual is solved for there and added to the adjoint.
        Costs two solves by conjugate gradients, to 1e-4 and of at most 200 products each, an outer gradient and a mixed
        derivative. Infinite where a tenth of a residual is not reduced (by too many steps, or by downward curvature).
        Of rounding, it includes one rounding of the direct term, which the indirect term may cancel.

    Reference:
      Bengio (2000); Rajeswaran et al. (2019), iMAML; Lorraine, Vicol & Duvenaud (2020).

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, log_decay, task: 0.5 * jnp.sum((w - task) ** 2 + jnp.exp(log_decay) * w**2),
      ...     outer_loss=lambda w, log_decay, task: 0.5 * jnp.sum((w - 1.0) ** 2),
      ...     init_params=lambda log_decay, task: jnp.zeros_like(task),
      ... )
      >>> estimator = cm.ImplicitDifferentiation(cm.LBFGS(), cm.DenseInverse())
      >>> round(float(estimator.estimate(problem, jnp.array(0.0), jnp.array([4.0])).grad), 3)
      -1.0
    """

    solver: InnerSolver
    inverse_hessian: InverseHessian = ConjugateGradient()
    estimate_error: bool = static(default=True)

    def _parts(self) -> dict[str, Any]:
        return super()._parts() | {"inverse_hessian": InverseHessian}

    def _without_estimate(self) -> "ImplicitDifferentiation":
        """Without an error estimate, which takes two thirds of the products."""
        return dataclasses.replace(self, estimate_error=False)

    def _estimate(self, instance: Instance, state: EstimatorState) -> MetaGradient:
        free = instance.free_phase(self.solver, state)
        instance = original = instance.at(free.model_state)
        walls, params = walls_of(self.solver, instance, free.params), free.params
        if walls is not None:
            instance, params = walls.seen_by_estimators(instance), walls.at
        base = survey(instance, params, free, instance.problem.init(instance.meta_params, instance.task))

        # Linearising once keeps what the products share; each then costs one forward-over-reverse pass.
        _, hvp = jax.linearize(tree.grad(instance.inner), base.params)
        if walls is not None:
            hvp = walls.completed(hvp, tree.or_one(base.curvature))
        systems = _solve_systems(instance, base, hvp, self.inverse_hessian, self.estimate_error)
        grad, error = _meta_gradient(instance, base, systems)
        learned, response, certain = base.params, systems.adjoint.solution, jnp.asarray(True)
        if walls is not None:
            learned, response = walls.in_params(learned, response, instance.meta_params)
            certain = walls.is_certain(original, base.params, systems.free.residual)
        return MetaGradient(
            grad=grad,
            outer_loss=base.outer_loss,
            params=learned,
            state=state._replace(
                params=learned,
                memory=free.memory,
                displacement=tree.scale(-1.0, response),
                model_state=free.model_state,
            ),
            aux=base.aux,
            diagnostics=make_diagnostics(
                instance.dtype,
                free_residual=systems.free.residual,
                nudged_residual=systems.adjoint.residual,
                num_gradients=free.num_gradients + NUM_GRADIENTS + 1 + 2 * self.estimate_error,
                num_hvps=systems.num_hvps,
                is_zero=False if error is None else is_rounding(grad, base.outer_in_meta, error),
                error_estimate=None if error is None else jnp.where(certain & ~base.unfit, error, jnp.inf),
                status=worst(
                    free_status(base, systems.free),
                    _adjoint_status(systems.adjoint, systems.solved),
                    flag(~certain, Status.NOT_SMOOTH),
                    flag(~tree.all_finite((grad, base.params)), Status.NOT_FINITE),
                ),
            ),
        )


class _Refinement(NamedTuple):
    """One step of Newton's method for the base point, and of iterative refinement for the adjoint.

    Attributes:
      params: base point after the step.
      adjoint: adjoint after the step.
      outer_in_meta: direct term at `params`.
      unknown: whether one of the two systems was left unsolved.
    """

    params: Params
    adjoint: Params
    outer_in_meta: MetaParams
    unknown: jax.Array


class _Systems(NamedTuple):
    """The linear systems with the Hessian at the base point, solved.

    Attributes:
      adjoint: of H u = v.
      solved: whether the adjoint system counts as solved.
      free: how far learning was from converged.
      refinement: for the error estimate; None without one.
      num_hvps: Hessian products of all systems.
    """

    adjoint: LinearSolution
    solved: jax.Array
    free: FreeResidual
    refinement: _Refinement | None
    num_hvps: jax.Array


class _Carry(NamedTuple):
    """What one system hands to the next.

    Attributes:
      right_side: of the next system.
      step: Newton's step, from the first system on.
      outer_grads: of the outer loss in `params` and `meta_params`, where it was evaluated last.
    """

    right_side: Params
    step: Params
    outer_grads: tuple[Params, MetaParams]


def _solve_systems(
    instance: Instance, base: BasePoint, hvp: Callable[[Params], Params], inverse: InverseHessian, refine: bool
) -> _Systems:
    """Solve three systems one after another in one loop, so that products and outer gradients are compiled once.

        0.  H s = g                      Newton's step -s for the base point x; its first product gives the Cauchy step
        1.  H u = v(x)                   the adjoint
        2.  H c = v(x - s) - H u         the adjoint's refinement, v(x - s) being the outer gradient after Newton's step

    Without an error estimate there is no system 2, and system 0 ends after one step. Any other inverse Hessian than
    conjugate gradients solves system 1 beforehand, and the loop only measures the residual.
    """
    stopping, first, guess = _settings(instance, base, hvp, inverse, refine)
    # At the floor of the dtype the inner gradient is noise, and learning has converged.
    residual = instance.norm(base.inner_grad)
    converged = residual <= NOISE_FLOOR * base.noise
    inner_grad = tree.where(converged, tree.zeros_like(base.inner_grad), base.inner_grad)
    length = jnp.where(converged, 0, residual)
    last = stopping.tol.shape[0] - 1

    def solve(carry: _Carry, system: tuple[jax.Array, Stopping]) -> tuple[_Carry, Any]:
        k, stop = system
        start = None if guess is None else tree.where(k == 1, guess, tree.zeros_like(guess))
        solution, found = solve_by_conjugate_gradient(hvp, carry.right_side, stop, start)

        # The outer loss at the end of the Cauchy step, then of Newton's step.
        cauchy = cauchy_length(length, found.first_curvature, instance.dtype)
        cauchy_step = tree.scale(cauchy / tree.or_one(length), inner_grad)
        ahead = tree.subtract(base.params, tree.where(k == 0, cauchy_step, carry.step))
        outer_grads = cond(k < last, lambda: outer_gradients(instance, ahead)[2:], lambda: carry.outer_grads)
        change = tree.subtract(outer_grads[0], base.outer_grad)

        right_side = tree.where(k == 0, base.outer_grad, tree.add(found.residual, change))
        step = tree.where(k == 0, solution.solution, carry.step)
        return _Carry(right_side, step, outer_grads), (solution, (cauchy, tree.norm(change), found.missing))

    begin = _Carry(inner_grad, inner_grad, (base.outer_grad, base.outer_in_meta))
    end, (solutions, (cauchy, change, missing)) = scan(solve, begin, (jnp.arange(last + 1), stopping))
    newton, adjoint, *rest = tree.unstack(solutions, last + 1)
    num_hvps = jnp.sum(solutions.num_hvps, dtype=jnp.int32)
    if first is not None:
        adjoint, num_hvps = first, num_hvps + first.num_hvps
    solved = (adjoint.residual <= _UNSOLVED_ADJOINT) & (missing[1] <= _UNSOLVED_ADJOINT)
    free = FreeResidual(residual, cauchy[0], change[0], base.nudge_norm)
    refinement = None
    if refine:
        (correction,) = rest
        unknown = (newton.residual > _UNSOLVED_REFINEMENT) | (correction.residual > _UNSOLVED_REFINEMENT)
        refinement = _Refinement(
            tree.subtract(base.params, newton.solution),
            tree.add(adjoint.solution, correction.solution),
            end.outer_grads[1],
            unknown,
        )
    return _Systems(adjoint, solved, free, refinement, num_hvps)


def _settings(
    instance: Instance, base: BasePoint, hvp: Callable[[Params], Params], inverse: InverseHessian, refine: bool
) -> tuple[Stopping, LinearSolution | None, Params | None]:
    """The settings of each system stacked, and what another inverse Hessian made of the adjoint system."""
    dtype = tree.float_dtype(base.params)
    refinement = _REFINEMENT.stopping(dtype)
    newton = refinement if refine else refinement._replace(max_steps=1)
    if isinstance(inverse, ConjugateGradient):
        first, guess, adjoint = None, None, inverse.stopping(dtype, look_ahead=True)
    else:
        first = inverse.solve(hvp, base.outer_grad)
        guess, adjoint = first.solution, refinement._replace(max_steps=0, look_ahead=True)
    systems = [newton, adjoint, refinement][: 3 if refine else 2]
    kinds = Stopping(dtype, dtype, jnp.int32, dtype, jnp.bool_)
    stopping = Stopping(
        *(
            jnp.stack([jnp.asarray(x, kind) for x in of])
            for of, kind in zip(zip(*systems, strict=True), kinds, strict=True)
        )
    )
    return stopping, first, guess


def _adjoint_status(adjoint: LinearSolution, solved: jax.Array) -> jax.Array:
    """What is to be said of the adjoint system.

    A solver's own tolerance may lie below what the dtype can reach; then `solved` decides.
    """
    excused = solved & (adjoint.status == Status.NUDGED_NOT_CONVERGED)
    told = worst(jnp.where(excused, Status.CONVERGED, adjoint.status), flag(~solved, Status.NUDGED_NOT_CONVERGED))
    # By its own account an approximation: that it leaves a residual is no news.
    return jnp.where(adjoint.status == Status.APPROXIMATE, adjoint.status, told)


def _meta_gradient(instance: Instance, base: BasePoint, systems: _Systems) -> tuple[MetaParams, jax.Array | None]:
    """The meta-gradient by the implicit function theorem, theory.md (4), and its estimated relative error, if any.

    The error is the difference to the meta-gradient after one step of Newton's method and of iterative refinement.
    """

    def gradient(at: tuple[Params, Params, MetaParams]) -> MetaParams:
        params, adjoint, direct = at
        _, inner_grad_vjp = jax.vjp(
            lambda meta: tree.grad(lambda x: instance.problem.inner(x, meta, instance.task))(params),
            instance.meta_params,
        )
        (indirect,) = inner_grad_vjp(adjoint)
        return tree.subtract(direct, indirect)

    here = base.params, systems.adjoint.solution, base.outer_in_meta
    if systems.refinement is None:
        return gradient(here), None
    *ahead, unknown = systems.refinement
    # One after another: side by side the two would need twice the memory.
    grad, refined = tree.unstack(jax.lax.map(gradient, jax.tree.map(lambda *x: jnp.stack(x), here, tuple(ahead))), 2)
    difference, size, direct = tree.norms(tree.subtract(refined, grad), refined, base.outer_in_meta)
    rounding = tree.coarsest_eps(instance.dtype, grad) * direct
    difference = jnp.maximum(difference, jnp.where((direct > size) & (size > 0), rounding, 0.0))
    error = jnp.where(difference == 0, 0.0, difference / size)
    return grad, jnp.where(unknown | jnp.isnan(error), jnp.inf, error)
