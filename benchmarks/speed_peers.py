"""The JAX peers on the speed benchmark, jaxopt and optimistix, used as their documentation recommends.

jaxopt: `solver.run` with `implicit_diff=True`, differentiated by `jax.grad`; the linear solver is the default
(`solve_normal_cg`) or `solve_cg` with a tolerance. optimistix: `minimise` with `ImplicitAdjoint`, its default linear
solver (dense) or lineax's CG with the Hessian tagged as positive, or GMRES; `RecursiveCheckpointAdjoint`.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import contrastive_meta as cm
from benchmarks.speed_methods import Outcome, Point
from benchmarks.speed_reference import ACCURATE, UNFINISHED, Ready

JAXOPT, OPTIMISTIX = "jaxopt", "optimistix"
# Rows of peers begin with their names.
NAMES = (JAXOPT, OPTIMISTIX)
# Above so many parameters nothing dense is tried.
_DENSE = 1000
_MAX_LINEAR_STEPS = 400
# lineax's absolute tolerance is on each entry, in units of the outer gradient's entries, which are below 1e-2 here.
_SMALL = 1e-3

Learn = Callable[[Any, cm.BilevelProblem, Any, Any], Any]


def absent() -> Iterator[tuple[str, str]]:
    """The peers that are not installed, and how to get them."""
    for name in NAMES:
        if not installed(name):
            yield name, 'not installed: pip install ".[peers]"'


def points(ready: Ready) -> Iterator[Point]:
    """The grids of those that are installed."""
    if installed(JAXOPT):
        yield from _jaxopt_points(ready)
    if installed(OPTIMISTIX):
        yield from _optimistix_points(ready)


def smoke_points(ready: Ready) -> Iterator[Point]:
    """One point of one peer."""
    if installed(JAXOPT):
        yield _point(ready, ACCURATE, "jaxopt, L-BFGS + CG", "0 steps, tolerance 0.001", _jaxopt_lbfgs, (0, 1e-3))


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(name) is not None


def imported(name: str) -> Any:
    """A peer, without what it warns of on import."""
    with warnings.catch_warnings():
        # jaxopt says on import that it is no longer maintained.
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module(name)


def _jaxopt_points(ready: Ready) -> Iterator[Point]:
    tols = ready.tolerances
    grids = {ACCURATE: [(0, tol) for tol in tols], UNFINISHED: [(k, tol) for k in ready.free_steps for tol in tols[1:]]}
    for start, budgets in grids.items():
        for budget in budgets:
            words = f"{budget[0]} steps, tolerance {budget[1]:g}"
            yield _point(ready, start, "jaxopt, L-BFGS + CG", words, _jaxopt_lbfgs, budget)
    # Descent is far behind on networks, as GMRES is below.
    for start, steps in ((ACCURATE, (0,)), (UNFINISHED, (16, 48, 144))):
        for num_steps in steps if ready.problem.convex else ():
            for tol in ready.tolerances[1:-1]:
                words = f"{num_steps} steps, tolerance {tol:g}"
                learn = functools.partial(_jaxopt_descent, 1 / ready.curvature)
                yield _point(ready, start, "jaxopt, descent + CG", words, learn, (num_steps, tol))
    if ready.problem.wide:
        for start, num_steps in ((ACCURATE, 0), (UNFINISHED, 32)):
            words = f"{num_steps} steps, default linear solver"
            yield _point(ready, start, "jaxopt, L-BFGS + default", words, _jaxopt_lbfgs_default, (num_steps, 0.0))


def _optimistix_points(ready: Ready) -> Iterator[Point]:
    grids = {
        ACCURATE: [(1e-1, tol) for tol in ready.tolerances],
        UNFINISHED: [(tol, linear_tol) for tol in (1e-4, 1e-5, 1e-6, 1e-7) for linear_tol in ready.tolerances[1:-1]],
    }
    dense = ready.num_params <= _DENSE
    for start, budgets in grids.items():
        for budget in budgets:
            words = f"tolerances {budget[0]:g} and {budget[1]:g}"
            yield _point(ready, start, "optimistix, L-BFGS + CG", words, _optimistix(_lbfgs, _cg), budget)
            if ready.problem.convex:
                yield _point(ready, start, "optimistix, L-BFGS + GMRES", words, _optimistix(_lbfgs, _gmres), budget)
        if not (ready.problem.wide and dense):
            continue
        for budget in budgets[1::2]:
            words = f"tolerances {budget[0]:g} and {budget[1]:g}"
            yield _point(ready, start, "optimistix, BFGS + CG", words, _optimistix(_bfgs, _cg), budget)
        for tol in (1e-1,) if start == ACCURATE else (1e-4, 1e-6):
            words = f"tolerance {tol:g}"
            yield _point(ready, start, "optimistix, BFGS + default", words, _optimistix(_bfgs, _auto), (tol, 0.0))
            name = "optimistix, BFGS checkpointed"
            yield _point(ready, start, name, words, _optimistix(_bfgs, None), (tol, 0.0))


def _point(ready: Ready, start: str, method: str, settings: str, learn: Learn, budget: tuple[Any, Any]) -> Point:
    function = _Differentiated(learn, ready.problem.batched)
    args = (budget, ready.losses, ready.meta_params, ready.tasks[start])
    return Point(start, method, settings, function, args)


class _Differentiated:
    """Value and gradient of the outer loss after learning; equal to others of the same parts."""

    def __init__(self, learn: Learn, batched: bool) -> None:
        self.learn, self.batched = learn, batched

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Differentiated) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())

    def __call__(self, budget: Any, losses: cm.BilevelProblem, meta_params: Any, task: Any) -> Outcome:
        def of_task(theta: Any, task: Any) -> jax.Array:
            return losses.outer(self.learn(budget, losses, theta, task), theta, task)

        def value(theta: Any) -> jax.Array:
            if self.batched:
                return jnp.mean(jax.vmap(of_task, in_axes=(None, 0))(theta, task))
            return of_task(theta, task)

        with jax.default_matmul_precision("highest"):  # as the estimators do
            return Outcome(*jax.value_and_grad(value)(meta_params))

    def _parts(self) -> Any:
        learn = self.learn
        parts = (learn.func, learn.args) if isinstance(learn, functools.partial) else (learn, ())
        return (*parts, self.batched)


def _jaxopt_lbfgs(budget: Any, losses: cm.BilevelProblem, meta_params: Any, task: Any) -> Any:
    num_steps, tol = budget
    jaxopt = imported(JAXOPT)
    solve = functools.partial(jaxopt.linear_solve.solve_cg, tol=tol, maxiter=_MAX_LINEAR_STEPS)
    solver = jaxopt.LBFGS(losses.inner, maxiter=num_steps, tol=0.0, implicit_diff=True, implicit_diff_solve=solve)
    return solver.run(task.start, meta_params, task).params


def _jaxopt_lbfgs_default(budget: Any, losses: cm.BilevelProblem, meta_params: Any, task: Any) -> Any:
    num_steps, _ = budget
    solver = imported(JAXOPT).LBFGS(losses.inner, maxiter=num_steps, tol=0.0, implicit_diff=True)
    return solver.run(task.start, meta_params, task).params


def _jaxopt_descent(step_size: float, budget: Any, losses: cm.BilevelProblem, meta_params: Any, task: Any) -> Any:
    num_steps, tol = budget
    jaxopt = imported(JAXOPT)
    solve = functools.partial(jaxopt.linear_solve.solve_cg, tol=tol, maxiter=_MAX_LINEAR_STEPS)
    solver = jaxopt.GradientDescent(
        losses.inner, stepsize=step_size, maxiter=num_steps, tol=0.0, implicit_diff=True, implicit_diff_solve=solve
    )
    return solver.run(task.start, meta_params, task).params


def _optimistix(make_solver: Any, make_linear: Any) -> Learn:
    return functools.partial(_minimise, make_solver, make_linear)


def _minimise(
    make_solver: Any, make_linear: Any, budget: Any, losses: cm.BilevelProblem, meta_params: Any, task: Any
) -> Any:
    """`make_linear` None: backprop through the solver, with checkpoints."""
    tol, linear_tol = budget
    optimistix, lineax = imported(OPTIMISTIX), imported("lineax")
    if make_linear is None:
        adjoint = optimistix.RecursiveCheckpointAdjoint()
    else:
        adjoint = optimistix.ImplicitAdjoint(linear_solver=make_linear(lineax, linear_tol))
    return optimistix.minimise(
        lambda params, args: losses.inner(params, *args),
        make_solver(optimistix, tol),
        task.start,
        (meta_params, task),
        max_steps=1000,  # a tolerance ends it
        throw=False,
        adjoint=adjoint,
        tags=frozenset({lineax.positive_semidefinite_tag}),
    ).value


def _lbfgs(optimistix: Any, tol: Any) -> Any:
    return optimistix.LBFGS(rtol=tol, atol=tol)


def _bfgs(optimistix: Any, tol: Any) -> Any:
    return optimistix.BFGS(rtol=tol, atol=tol)


def _cg(lineax: Any, tol: Any) -> Any:
    # In float32 and above some thousands of parameters lineax takes small curvature for none and returns NaN.
    return lineax.CG(rtol=tol, atol=_SMALL * tol, max_steps=_MAX_LINEAR_STEPS)


def _gmres(lineax: Any, tol: Any) -> Any:
    return lineax.GMRES(rtol=tol, atol=_SMALL * tol, max_steps=_MAX_LINEAR_STEPS)


def _auto(lineax: Any, tol: Any) -> Any:
    return lineax.AutoLinearSolver(well_posed=None)
