"""SciPy's minimisers as the learner: they run on the host and ask the compiled program for the loss."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers._constrained import ConstrainedLoss, minimize_constrained
from contrastive_meta._solvers._host import learn_on_host
from contrastive_meta._solvers._host_sessions import HostLoss, PaddedLoss, Vector
from contrastive_meta._solvers._watched_loss import EndOfRunError, StalledError, WatchedLoss
from contrastive_meta._solvers.base import InnerLoss, InnerSolver, MinibatchLoss, Solution, Stop, final_status
from contrastive_meta._solvers.constraint import BoundConstraints, constraint_of, residual_of
from contrastive_meta._solvers.penalty import BoundPenalty, Box, fixed_point_residual, secant_step

Options = tuple[tuple[str, Any], ...]


class _Method(NamedTuple):
    """What is to be known about a SciPy method.

    Attributes:
      endless: `tol -> options` that keep it from stopping before it is told to.
      needs_gradient: whether it uses gradients.
      needs_hvp: whether it uses Hessian-vector products; they are differences of gradients.
      budgets: names of its options that limit iterations and evaluations.
      takes_bounds: whether it keeps within bounds.
      takes_constraints: whether it keeps to constraints.
    """

    endless: Callable[[float], dict[str, Any]]
    needs_gradient: bool = True
    needs_hvp: bool = False
    budgets: tuple[str, ...] = ("maxiter",)
    takes_bounds: bool = False
    takes_constraints: bool = False


# SciPy's tolerances mean another norm in each method: where gradients are known they are switched off, and
# `WatchedLoss` stops the run. Methods that see values only are left to stop at a small step.
_METHODS = {
    "BFGS": _Method(lambda tol: {"gtol": 0.0}),
    "CG": _Method(lambda tol: {"gtol": 0.0}),
    "L-BFGS-B": _Method(lambda tol: {"gtol": 0.0, "ftol": 0.0}, budgets=("maxiter", "maxfun"), takes_bounds=True),
    "TNC": _Method(lambda tol: {"gtol": 0.0, "ftol": 0.0, "xtol": 0.0}, budgets=("maxfun",), takes_bounds=True),
    # Not zero: with that SciPy 1.11 takes no step.
    "Newton-CG": _Method(lambda tol: {"xtol": 1e-300}, needs_hvp=True),
    "trust-ncg": _Method(lambda tol: {"gtol": 0.0}, needs_hvp=True),
    "trust-krylov": _Method(lambda tol: {"gtol": 0.0}, needs_hvp=True),
    "Nelder-Mead": _Method(lambda tol: {"xatol": tol, "fatol": tol}, needs_gradient=False, takes_bounds=True),
    "Powell": _Method(lambda tol: {"xtol": tol, "ftol": tol**2}, needs_gradient=False, takes_bounds=True),
    "SLSQP": _Method(lambda tol: {"ftol": 1e-300}, takes_bounds=True, takes_constraints=True),
    # Steps that are lost in rounding end it: other tolerances of its own would do so earlier.
    "trust-constr": _Method(
        lambda tol: {"gtol": 0.0, "xtol": 1e-15, "barrier_tol": 1e-15}, takes_bounds=True, takes_constraints=True
    ),
}


@strategy
class ScipyMinimize(InnerSolver):
    """A minimiser of `scipy.optimize` as the learner.

    SciPy runs on the host, in float64 whatever the dtype of `params`; the loss and its gradient are evaluated by JAX.
    Each evaluation costs a hand-over of some 0.3 ms, and each lane of a batch is a thread of its own: right for small
    problems and for losses that are slow themselves. On a busy machine L-BFGS-B is slowed by the threads of its own
    linear algebra; `OPENBLAS_NUM_THREADS=1` in the environment helps.

    The solution is the best point that was evaluated. Where a line search gives up because values agree to rounding,
    the run is continued on values reconstructed from gradients, so that gradient norms down to some epsilons of the
    dtype can be asked for. It minimises the whole loss: a minibatch sequence on the problem is not followed, and
    `stop.group` cannot be honoured, since each lane decides for itself when to stop.

    Args:
      method: "BFGS", "CG", "L-BFGS-B", "TNC", "Newton-CG", "trust-ncg", "trust-krylov" (the last three difference
        gradients for Hessian-vector products); with constraints "SLSQP", "trust-constr"; or, with values only and for a
        few parameters, "Nelder-Mead", "Powell".
      tol: absolute tolerance on the gradient norm, the Euclidean one for every method. The two that see values only
        stop at a step of this size instead, and are judged by the gradient norm all the same.
      max_steps: budget in evaluations of the loss.
      bounds: a box such as `cm.prox.box(0.0, 1.0)` or `cm.prox.non_negative()`, which may depend on meta-parameters;
        None for none. For "L-BFGS-B", "TNC", "Nelder-Mead", "Powell", "SLSQP" and "trust-constr". The run is then
        judged by the projected gradient.
      constraints: for "SLSQP" and "trust-constr": one or several of `scipy.optimize.LinearConstraint`,
        `scipy.optimize.NonlinearConstraint` and SciPy's dictionaries. Functions are written with `jax.numpy`. They are
        given `params` as the loss is, and also the meta-parameters if they take two arguments. A matrix acts on
        all entries of `params` in one vector. JAX takes the derivatives: `jac`, `hess` and `keep_feasible` are not
        used.
        `tol` is then for the length of two parts together: the gradient that no multiplier of an active constraint
        accounts for, and how far constraints are missed, in units of the gradient.
      options: further options of the method as `((name, value), ...)`. Those that stop it (`gtol`, `maxiter`, ...) are
        obeyed besides `tol` and `max_steps`.
      meta_params: set by `bind`.

    Raises:
      ValueError: an unknown method, or one that needs Hessians; bounds or constraints for a method that takes none.
      TypeError: `options` is not a tuple of pairs, `bounds` are no box, or `constraints` none of SciPy's.

    Reference:
      Virtanen et al. (2020), "SciPy 1.0: fundamental algorithms for scientific computing in Python".

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> solver = cm.ScipyMinimize("BFGS", tol=1e-3)
      >>> solution = solver.solve(lambda w: jnp.sum((w - 3.0) ** 2), jnp.zeros(2))
      >>> [round(float(w), 3) for w in solution.params]
      [3.0, 3.0]
    """

    method: str = static(default="L-BFGS-B")
    tol: float | jax.Array = 1e-8
    max_steps: int | jax.Array = 10_000
    options: Options = static(default=())
    bounds: Box | None = None
    constraints: Any = ()
    meta_params: MetaParams = None

    def __post_init__(self) -> None:
        """Check the settings that are structure."""
        if self.method not in _METHODS:
            raise ValueError(
                f"ScipyMinimize: method must be one of {', '.join(_METHODS)}; got {self.method!r}. "
                "Methods that need Hessians are not offered."
            )
        if self.bounds is not None and not _METHODS[self.method].takes_bounds:
            able = ", ".join(name for name, method in _METHODS.items() if method.takes_bounds)
            raise ValueError(f"ScipyMinimize: {self.method!r} takes no bounds. Use one of {able}.")
        several: Any = self.constraints
        several = several if isinstance(several, tuple | list) else (several,)
        object.__setattr__(self, "constraints", tuple(constraint_of(each) for each in several))
        if self.constraints and not _METHODS[self.method].takes_constraints:
            able = ", ".join(name for name, method in _METHODS.items() if method.takes_constraints)
            raise ValueError(f"ScipyMinimize: {self.method!r} takes no constraints. Use one of {able}.")
        given: Any = self.options
        if not isinstance(given, tuple) or not all(isinstance(x, tuple) and len(x) == 2 for x in given):
            raise TypeError(
                f"ScipyMinimize: options must be a tuple of (name, value) pairs; got {given!r}. "
                "Write a dictionary as `tuple(options.items())`."
            )

    def bind(self, meta_params: MetaParams) -> "ScipyMinimize":
        """The solver with its bounds and constraints at these meta-parameters."""
        alone = self.bounds is None and not self.constraints
        return self if alone else dataclasses.replace(self, meta_params=meta_params)

    @property
    def walls(self) -> BoundPenalty | None:
        """The bounds, where there are no constraints beside them."""
        return None if self.constraints else BoundPenalty.of(self.bounds, self.meta_params)

    @property
    def held_to(self) -> BoundConstraints | None:
        """The constraints, and bounds beside them."""
        return BoundConstraints.of(self.constraints, self.bounds, self.meta_params) if self.constraints else None

    @property
    def descends_loss(self) -> bool:
        """With constraints: another learner may run on from its end, where they hold it."""
        return bool(self.constraints)

    @property
    def step_budget(self) -> int | jax.Array:
        """As the user set it, in evaluations."""
        return self.max_steps

    def solve(
        self,
        loss: InnerLoss,
        init: Params,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
        stop: Stop = Stop(),
    ) -> Solution:
        """See `InnerSolver.solve`. `stop.tol` and `stop.max_steps` replace `tol` and `max_steps`."""
        if tree.is_complex(init):
            self.check_holomorphic(init)
        tol = self.tol if stop.tol is None else stop.tol
        # Values are as good as the coarser of the two dtypes.
        dtypes = tree.float_dtype(init), tree.float_dtype(jax.eval_shape(loss, init))
        epsilon = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)

        if _METHODS[self.method].takes_constraints:
            budget = self.max_steps if stop.max_steps is None else stop.max_steps
            return self._solve_constrained(loss, init, tol, budget, epsilon)
        method = _METHODS[self.method]
        # Bounds travel to the host as a part of the start.
        bounds = () if self.bounds is None else self.bounds.bounds(init, self.meta_params)
        size = sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(init))

        def learn(host_loss: HostLoss, start: Vector, tol: float, max_steps: int) -> Vector:
            begin, *rest = np.split(start, [size, 2 * size]) if bounds else [start]
            limits = (rest[0], rest[1]) if bounds else None
            of_begin: Any = PaddedLoss(host_loss, start[size:]) if bounds else host_loss
            begin = begin if limits is None else np.clip(begin, *limits)
            watched = WatchedLoss(of_begin, begin, dtypes[0], epsilon, tol, max_steps, limits)
            return np.concatenate([_minimize(self.method, self.options, watched, tol, max_steps), start[size:]])

        end = learn_on_host(
            learn,
            loss if not bounds else lambda both: loss(both[0]),
            (init, bounds) if bounds else init,
            tol=tol,
            max_steps=self.max_steps if stop.max_steps is None else stop.max_steps,
            needs_gradient=method.needs_gradient,
        )
        if self.walls is not None:
            params = end.params[0]
            gradients = [tree.grad(loss)(at) for at in (params, init)]
            residual = fixed_point_residual(self.walls, params, gradients[0], init, gradients[1])
            end = end._replace(params=params, residual=residual)
        unfinished = flag(~(end.residual <= tol), Status.FREE_NOT_CONVERGED)
        health = final_status(end.first_loss, end.first_residual, end.params, end.loss, end.residual)
        return Solution(
            params=end.params,
            residual=end.residual,
            num_gradients=end.num_gradients,
            num_steps=end.num_evaluations,
            status=worst(unfinished, health),
            memory=(),
        )

    def _solve_constrained(self, loss: InnerLoss, init: Params, tol: Any, max_steps: Any, epsilon: float) -> Solution:
        """With constraints: their rows and their Jacobian reach the host as derivatives in zeros beside the point."""
        bound = BoundConstraints.of(self.constraints, self.bounds, self.meta_params)
        general = BoundConstraints.of(self.constraints, None, self.meta_params)
        box = () if self.bounds is None else self.bounds.bounds(init, self.meta_params)
        equal, size = general.equal(init), sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(init))
        zeros = jnp.zeros((equal.size * (1 + size),), tree.float_dtype(init))
        endless = _METHODS[self.method].endless(0.0) | {"maxiter": 2**31 - 1} | dict(self.options)

        def learn(host_loss: HostLoss, start: Vector, tol: float, max_steps: int) -> Vector:
            # In the order of the tree: the point, the zeros, the bounds.
            begin, nothing, *low_and_high = np.split(start, np.cumsum([size, zeros.size, *[size] * len(box)]))[:-1]
            limits = (low_and_high[0], low_and_high[1]) if box else None
            begin = begin if limits is None else np.clip(begin, *limits)
            of_point: Any = PaddedLoss(host_loss, np.concatenate(low_and_high)) if box else host_loss
            asked = ConstrainedLoss(of_point, size, equal, limits, epsilon, tol, max_steps)
            found = minimize_constrained(self.method, endless, asked, begin, limits)
            return np.concatenate([found, nothing, *low_and_high])

        def with_constraints(every: tuple[Params, jax.Array, Any]) -> jax.Array:
            params, zeros, _ = every
            value = loss(params)
            told = jnp.concatenate([x.ravel() for x in general.evaluated(jax.lax.stop_gradient(params))])
            return value + (zeros @ told.astype(zeros.dtype)).astype(value.dtype)

        end = learn_on_host(learn, with_constraints, (init, zeros, box), tol=tol, max_steps=max_steps)
        params = end.params[0]
        gradients = [tree.grad(loss)(at) for at in (params, init)]
        residual = residual_of(bound, params, gradients[0], secant_step(params, gradients[0], init, gradients[1]))
        finite = tree.all_finite(params) & jnp.isfinite(residual) & jnp.isfinite(end.loss)
        status = worst(flag(~(residual <= tol), Status.FREE_NOT_CONVERGED), flag(~finite, Status.NOT_FINITE))
        return Solution(params, residual, end.num_gradients, end.num_evaluations, status, ())


def _minimize(name: str, options: Options, watched: WatchedLoss, tol: float, max_steps: int) -> Vector:
    """Run SciPy, again from where it gave up as long as that helps; the best point seen."""
    method = _METHODS[name]
    ours = dict.fromkeys(method.budgets, max_steps + 1) | method.endless(tol)
    user_stops_it = any(key in ours for key, _ in options)
    while watched.start.size:
        before = watched.best
        try:
            with np.errstate(all="ignore"):
                scipy.optimize.minimize(
                    watched.value_and_grad if method.needs_gradient else watched.value,
                    watched.start,
                    method=name,
                    jac=method.needs_gradient or None,
                    hessp=watched.hessian_product if method.needs_hvp else None,
                    bounds=watched.bounds,
                    options=ours | dict(options),
                )
        except StalledError:
            pass
        except EndOfRunError:
            break
        except (ArithmeticError, ValueError, np.linalg.LinAlgError):
            # Some methods stumble over NaN or infinity. That is an outcome, and the status will name it.
            if watched.all_finite:
                raise
            break
        if user_stops_it or not watched.has_improved(before):
            break
        watched.restart()
    return watched.start if watched.best is None else watched.best.point
