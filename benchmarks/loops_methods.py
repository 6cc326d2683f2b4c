"""One step's meta-gradient of each method in the training loop on digits, with what it carries to the next step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import contrastive_meta as cm
from benchmarks.speed_peers import JAXOPT as JAXOPT_PACKAGE
from benchmarks.speed_peers import OPTIMISTIX, imported, installed

DEFAULT = "contrast"
WITHOUT_ESTIMATE = "contrast, no estimate"
BARE = "contrast, no estimate, no fallback"
IMPLICIT_CG = "implicit CG"
IMPLICIT_WITHOUT = "implicit CG, no estimate"
JAXOPT = "jaxopt L-BFGS"
JAXOPT_CG = "jaxopt L-BFGS + CG"
OPTIMISTIX_BFGS = "optimistix BFGS"
OPTIMISTIX_LBFGS = "optimistix L-BFGS + CG"
_MAX_STEPS = 500


class Told(NamedTuple):
    """What a step tells; None where a method does not.

    Attributes:
      outer_loss: after learning.
      grad: meta-gradient.
      params: where learning ended.
      num_gradients: of the inner loss.
      num_hvps: Hessian-vector products.
      error_estimate: of the meta-gradient, relative.
      status: value of a `cm.Status`.
    """

    outer_loss: jax.Array
    grad: Any
    params: Any
    num_gradients: Any = None
    num_hvps: Any = None
    error_estimate: Any = None
    status: Any = None


class Method(NamedTuple):
    """A method, as a training loop runs it.

    Attributes:
      start: from meta-parameters and task to what the first step starts from.
      call: from meta-parameters, task and what is carried to what the step tells, and what is carried on.
    """

    start: Callable[[Any, Any], Any]
    call: Callable[[Any, Any, Any], tuple[Told, Any]]


def methods(problem: cm.BilevelProblem, tol: float, smoke: bool) -> dict[str, Method]:
    """All of them by name, those of peers where they are installed; learning ends at a gradient norm of `tol`."""
    solver = cm.LBFGS(tol=tol, max_steps=_MAX_STEPS)
    alone = cm.NewtonKrylov(fall_back=False)
    if smoke:
        bare = cm.Contrastive(solver, alone, cm.relative(cm.central_difference), estimate_error=False)
        quick = cm.ImplicitDifferentiation(solver, estimate_error=False)
        return {DEFAULT: _ours(problem, bare), IMPLICIT_CG: _ours(problem, quick)}
    estimators: dict[str, cm.MetaGradientEstimator] = {
        DEFAULT: cm.Contrastive(solver),
        WITHOUT_ESTIMATE: cm.Contrastive(solver, estimate_error=False),
        BARE: cm.Contrastive(solver, alone, estimate_error=False),
        IMPLICIT_CG: cm.ImplicitDifferentiation(solver, cm.ConjugateGradient()),
        IMPLICIT_WITHOUT: cm.ImplicitDifferentiation(solver, cm.ConjugateGradient(), estimate_error=False),
    }
    found = {name: _ours(problem, estimator) for name, estimator in estimators.items()}
    if installed(JAXOPT_PACKAGE):
        found[JAXOPT] = _peer(problem, lambda *args: _by_jaxopt(problem, tol, False, *args))
        found[JAXOPT_CG] = _peer(problem, lambda *args: _by_jaxopt(problem, tol, True, *args))
    if installed(OPTIMISTIX):
        found[OPTIMISTIX_BFGS] = _peer(problem, lambda *args: _by_optimistix(problem, tol, False, *args))
        found[OPTIMISTIX_LBFGS] = _peer(problem, lambda *args: _by_optimistix(problem, tol, True, *args))
    return found


def _ours(problem: cm.BilevelProblem, estimator: cm.MetaGradientEstimator) -> Method:
    def call(meta_params: Any, task: Any, state: Any) -> tuple[Told, Any]:
        result = estimator.estimate(problem, meta_params, task, state=state)
        told = result.diagnostics
        counts = (told.num_gradients, told.num_hvps, told.error_estimate, told.status)
        return Told(result.outer_loss, result.grad, result.params, *counts), result.state

    return Method(lambda meta_params, task: estimator.init_state(problem, meta_params, task), call)


def _peer(problem: cm.BilevelProblem, learn: Callable[[Any, Any, Any], Any]) -> Method:
    """A learner that `jax.grad` differentiates, started where it ended a step before."""

    def call(meta_params: Any, task: Any, start: Any) -> tuple[Told, Any]:
        def value(meta_params: Any) -> tuple[jax.Array, Any]:
            params = learn(start, meta_params, task)
            return problem.outer(params, meta_params, task), params

        with jax.default_matmul_precision("highest"):  # as the estimators do
            (outer_loss, params), grad = jax.value_and_grad(value, has_aux=True)(meta_params)
        return Told(outer_loss, grad, params), params

    return Method(problem.init, call)


def _by_jaxopt(problem: cm.BilevelProblem, tol: float, cg: bool, start: Any, meta_params: Any, task: Any) -> Any:
    """Its default linear solver (CG on the normal equations), or CG to 1e-6."""
    jaxopt = imported(JAXOPT_PACKAGE)
    linear = {"implicit_diff_solve": jaxopt.linear_solve.solve_cg} if cg else {}
    solver = jaxopt.LBFGS(problem.inner, maxiter=_MAX_STEPS, tol=tol, implicit_diff=True, **linear)
    return solver.run(start, meta_params, task).params


def _by_optimistix(problem: cm.BilevelProblem, tol: float, cg: bool, start: Any, meta_params: Any, task: Any) -> Any:
    """BFGS with the default (dense) linear solver, or L-BFGS with CG."""
    optimistix, lineax = imported(OPTIMISTIX), imported("lineax")
    # Its tolerances are on what a step changes, not on the gradient: a tenth ends no earlier than the others do.
    tols = {"rtol": tol / 10, "atol": tol / 10}
    linear = {"linear_solver": lineax.CG(rtol=1e-4, atol=1e-8, max_steps=4 * _MAX_STEPS)} if cg else {}
    return optimistix.minimise(
        lambda params, args: problem.inner(params, *args),
        (optimistix.LBFGS if cg else optimistix.BFGS)(**tols),
        start,
        (meta_params, task),
        max_steps=_MAX_STEPS,
        throw=False,
        adjoint=optimistix.ImplicitAdjoint(**linear),
        tags=frozenset({lineax.positive_semidefinite_tag}),
    ).value
