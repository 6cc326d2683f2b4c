"""Implicit differentiation of the free solution, with any inverse of the Hessian."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._estimators._free_point import (
    NOISE_FLOOR,
    NUM_GRADIENTS,
    UNANSWERED,
    FreePoint,
    LeftToLearn,
    free_status,
    newton_length,
    survey,
)
from contrastive_meta._instance import Instance
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._inverse_hessian import ConjugateGradient, InverseHessian, LinearSolution
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import EstimatorState, MetaGradient, Status, flag, make_diagnostics, worst
from contrastive_meta._solvers.base import InnerSolver

# What answers what is left, of learning and of the nudge, to estimate how wrong a result is. A coarser answer misses
# what lies along low curvature: at 1e-2 it is off by 100 at condition 1e6, at 1e-4 by a quarter.
_ANSWER = ConjugateGradient(tol=1e-4, max_steps=200)
# A part of it that is left without an answer, beyond which nothing is known.
_UNKNOWN = 0.1


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
      estimate_error: whether to estimate `diagnostics.error_estimate`: what changes in the meta-gradient when Newton's
        step takes what is left to learn, and an answer to the linear solver's residual there is added to the adjoint.
        Costs two solves by conjugate gradients, to 1e-4 and of at most 200 products each, an outer gradient and a mixed
        derivative. Infinite where a tenth of what is left found no answer (too long a way, or downward curvature);
        rounding is beyond it.

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

    def _estimate(self, setting: Instance, state: EstimatorState) -> MetaGradient:
        free = setting.free_phase(self.solver, state)
        setting = setting.at(free.model_state)
        point = survey(setting, free.params, free, setting.problem.init(setting.meta_params, setting.task))

        # Linearising once keeps what the products share; each then costs one forward-over-reverse pass.
        _, hvp = jax.linearize(tree.grad(setting.inner), point.params)
        adjoint = self.inverse_hessian.solve(hvp, point.outer_grad)

        grad = _implicit_gradient(setting, point.params, adjoint.solution)

        remainder, left, solved = _left(setting, point, hvp, adjoint)
        doubt = _Doubt(jnp.asarray(jnp.nan, setting.dtype), jnp.int32(0))
        if self.estimate_error:
            doubt = _doubt(setting, point, hvp, adjoint, remainder, grad)
        return MetaGradient(
            grad=grad,
            outer_loss=point.outer_loss,
            params=point.params,
            state=state._replace(
                params=point.params,
                memory=free.memory,
                displacement=tree.scale(-1.0, adjoint.solution),
                model_state=free.model_state,
            ),
            aux=point.aux,
            diagnostics=make_diagnostics(
                setting.dtype,
                free_residual=left.residual,
                nudged_residual=adjoint.residual,
                num_gradients=free.num_gradients + NUM_GRADIENTS + 1 + 3 * self.estimate_error,
                num_hvps=adjoint.num_hvps + 3 + doubt.num_hvps,
                error_estimate=doubt.error,
                status=worst(
                    free_status(setting, point, left),
                    _linear_status(adjoint, solved),
                    flag(~tree.all_finite((grad, point.params)), Status.NOT_FINITE),
                ),
            ),
        )


def _left(
    setting: Instance, point: FreePoint, hvp: Callable[[Params], Params], adjoint: LinearSolution
) -> tuple[Params, LeftToLearn, jax.Array]:
    """What is left of the nudge, what was left to learn, and whether the linear system counts as solved.

    A solver's own tolerance may lie below what the dtype can reach; what matters is what is left.
    """
    pair = jax.tree.map(lambda u, g: jnp.stack([u, g]), adjoint.solution, point.inner_grad)
    of_solution, of_residual = tree.unstack(jax.vmap(hvp)(pair), 2)
    least = jnp.asarray(jnp.finfo(setting.dtype).tiny, setting.dtype)
    remainder = tree.subtract(point.outer_grad, of_solution)
    missing = newton_length(remainder, hvp(remainder), least, tree.norm(remainder))
    solved = (adjoint.residual <= UNANSWERED) & (missing <= UNANSWERED * tree.norm(adjoint.solution))
    residual = tree.norm(point.inner_grad)
    distance = newton_length(point.inner_grad, of_residual, least, residual)
    ahead = tree.add_scaled(point.params, -distance / tree.or_one(residual), point.inner_grad)
    shift = tree.norm(tree.subtract(tree.grad(setting.outer)(ahead), point.outer_grad))
    return remainder, LeftToLearn(residual, distance, shift, point.nudge_norm), solved


def _linear_status(adjoint: LinearSolution, solved: jax.Array) -> jax.Array:
    """What is to be said of the linear system."""
    excused = solved & (adjoint.status == Status.NUDGED_NOT_CONVERGED)
    told = worst(jnp.where(excused, Status.CONVERGED, adjoint.status), flag(~solved, Status.NUDGED_NOT_CONVERGED))
    # By its own account an approximation: that it leaves a remainder is no news.
    return jnp.where(adjoint.status == Status.APPROXIMATE, adjoint.status, told)


class _Doubt(NamedTuple):
    """How wrong an estimate is held to be, relative to it, and the products spent on finding out."""

    error: jax.Array
    num_hvps: jax.Array


def _doubt(
    setting: Instance,
    point: FreePoint,
    hvp: Callable[[Params], Params],
    adjoint: LinearSolution,
    remainder: Params,
    grad: MetaParams,
) -> _Doubt:
    """Take the rest of learning's way, answer what is left of the nudge there, and compare."""
    # At the dtype's floor what is left to learn is noise.
    unlearned = tree.norm(point.inner_grad) > NOISE_FLOOR * point.noise
    step = _ANSWER.solve(hvp, tree.where(unlearned, point.inner_grad, tree.zeros_like(point.inner_grad)))
    ahead = tree.subtract(point.params, step.solution)
    change = tree.subtract(tree.grad(setting.outer)(ahead), point.outer_grad)
    more = _ANSWER.solve(hvp, tree.add(remainder, change))
    after = _implicit_gradient(setting, ahead, tree.add(adjoint.solution, more.solution))
    error = tree.norm(tree.subtract(after, grad))
    error = jnp.where(error == 0, 0.0, error / tree.norm(after))
    unknown = (step.residual > _UNKNOWN) | (more.residual > _UNKNOWN) | jnp.isnan(error)
    return _Doubt(jnp.where(unknown, jnp.inf, error), step.num_hvps + more.num_hvps)


def _implicit_gradient(setting: Instance, params: Params, adjoint: Params) -> MetaParams:
    """What the implicit function theorem makes of a solution and of H^-1 v there, theory.md (4)."""
    direct = tree.grad(lambda meta: setting.problem.outer(params, meta, setting.task))(setting.meta_params)
    _, inner_grad_vjp = jax.vjp(
        lambda meta: tree.grad(lambda at: setting.problem.inner(at, meta, setting.task))(params), setting.meta_params
    )
    (indirect,) = inner_grad_vjp(adjoint)
    gradient: MetaParams = tree.subtract(direct, indirect)
    return gradient
