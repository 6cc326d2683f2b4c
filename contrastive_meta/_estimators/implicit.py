"""Implicit differentiation of the free solution, with any inverse of the Hessian."""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._estimators._doubt import SHARE_OF_A_STEP
from contrastive_meta._estimators._free_point import (
    NUM_GRADIENTS,
    UNANSWERED,
    LeftToLearn,
    free_status,
    newton_length,
    survey,
)
from contrastive_meta._estimators._setting import Setting
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._inverse_hessian import ConjugateGradient, InverseHessian
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import EstimatorState, MetaGradient, Status, flag, make_diagnostics, worst
from contrastive_meta._solvers.base import InnerSolver


@strategy
class ImplicitDifferentiation(MetaGradientEstimator):
    """Meta-gradients by the implicit function theorem, algorithm (4).

    Needs second derivatives (Hessian-vector products and one mixed derivative) of the inner loss. Exact at a minimum
    up to the linear solve; at an unfinished solution it is wrong without the linear solve noticing, which the status
    reports from the inner residual. It sees what the losses see: not the initialisation, nor the optimiser's settings.

    Args:
      solver: the learner.
      inverse_hessian: how H^-1 v is found: `ConjugateGradient()` (iMAML), `NeumannSeries` (recurrent backprop),
        `Nystrom`, `DenseInverse()`, or `IdentityHessian()` (T1-T2).
      estimate_error: whether to estimate `diagnostics.error_estimate`: what one more step of steepest descent, of the
        solution by the inner residual and of the adjoint by the linear solver's, would change in the meta-gradient,
        doubled since such a step goes about half of the way. Costs a Hessian-vector product, a meta-gradient and
        a mixed derivative. Rounding, and an adjoint that is far off (`IdentityHessian`), are beyond it.

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

    def _estimate(self, setting: Setting, state: EstimatorState) -> MetaGradient:
        free = setting.free_phase(self.solver, state)
        setting = setting.at(free.model_state)
        point = survey(setting, free.params, free, setting.problem.init(setting.meta_params, setting.task))

        # Linearising once keeps what the products share; each then costs one forward-over-reverse pass.
        _, hvp = jax.linearize(tree.grad(setting.inner), point.params)
        adjoint = self.inverse_hessian.solve(hvp, point.outer_grad)

        grad = _implicit_gradient(setting, point.params, adjoint.solution)

        finite = tree.all_finite((grad, point.params))
        # A solver's own tolerance may lie below what the dtype can reach; what matters is what is left, of the nudge
        # and of the response; and what was left to learn.
        pair = jax.tree.map(lambda u, g: jnp.stack([u, g]), adjoint.solution, point.inner_grad)
        of_solution, of_residual = tree.unstack(jax.vmap(hvp)(pair), 2)
        least = jnp.asarray(jnp.finfo(setting.dtype).tiny, setting.dtype)
        left = tree.subtract(point.outer_grad, of_solution)
        missing = newton_length(left, hvp(left), least, tree.norm(left))
        residual = tree.norm(point.inner_grad)
        distance = newton_length(point.inner_grad, of_residual, least, residual)
        step = tree.scale(distance / tree.or_one(residual), point.inner_grad)
        _, ahead = setting.outer_value_and_grad(tree.subtract(point.params, step))
        change = tree.subtract(ahead, point.outer_grad)
        shift, error = tree.norm(change), jnp.asarray(jnp.nan, setting.dtype)
        if self.estimate_error:
            # What a step of steepest descent of solution and adjoint would change.
            sought = tree.add(left, change)
            more = newton_length(sought, hvp(sought), least, tree.norm(sought)) / tree.or_one(tree.norm(sought))
            nearer = tree.add_scaled(adjoint.solution, more, sought)
            after = _implicit_gradient(setting, tree.subtract(point.params, step), nearer)
            error = tree.norm(tree.subtract(after, grad)) / SHARE_OF_A_STEP
            error = jnp.where(error == 0, 0.0, error / tree.norm(grad))
        solved = (adjoint.residual <= UNANSWERED) & (missing <= UNANSWERED * tree.norm(adjoint.solution))
        unsolved = flag(~solved, Status.NUDGED_NOT_CONVERGED)
        excused = solved & (adjoint.status == Status.NUDGED_NOT_CONVERGED)
        linear = worst(jnp.where(excused, Status.CONVERGED, adjoint.status), unsolved)
        # By its own account an approximation: that it leaves a remainder is no news.
        linear = jnp.where(adjoint.status == Status.APPROXIMATE, adjoint.status, linear)
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
                free_residual=residual,
                nudged_residual=adjoint.residual,
                num_gradients=free.num_gradients + NUM_GRADIENTS + 1 + 3 * self.estimate_error,
                num_hvps=adjoint.num_hvps + 3 + self.estimate_error,
                error_estimate=error,
                status=worst(
                    free_status(setting, point, LeftToLearn(residual, distance, shift, point.nudge_norm)),
                    linear,
                    flag(~finite, Status.NOT_FINITE),
                ),
            ),
        )


def _implicit_gradient(setting: Setting, params: Params, adjoint: Params) -> MetaParams:
    """What the implicit function theorem makes of a solution and of H^-1 v there, theory.md (4)."""
    direct = tree.grad(lambda meta: setting.problem.outer(params, meta, setting.task))(setting.meta_params)
    _, inner_grad_vjp = jax.vjp(
        lambda meta: tree.grad(lambda at: setting.problem.inner(at, meta, setting.task))(params), setting.meta_params
    )
    (indirect,) = inner_grad_vjp(adjoint)
    gradient: MetaParams = tree.subtract(direct, indirect)
    return gradient
