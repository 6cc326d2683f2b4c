"""A differentiable argmin: learning forward, an estimator of meta-gradients backward."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from contrastive_meta import _pytree as tree
from contrastive_meta._argmin.adjoints import Adjoint, ContrastiveAdjoint
from contrastive_meta._argmin.captured import OpenLoss, hold_open
from contrastive_meta._argmin.learned import AlreadyLearned
from contrastive_meta._argmin.operands import Operands, Wanted, once, primal, wanted_of
from contrastive_meta._arity import require_function
from contrastive_meta._base_point import UNCONVERGED
from contrastive_meta._control import varying
from contrastive_meta._instance import Instance
from contrastive_meta._problem import (
    BilevelProblem,
    Loss,
    MetaParams,
    Params,
    Task,
    as_float_arrays,
    check_same_structure,
    float_dtype_of,
)
from contrastive_meta._result import Diagnostics, EstimatorState, Status, flag, make_diagnostics, worst
from contrastive_meta._solvers.base import InnerSolver, Solution

Init = Params | Callable[[MetaParams, Task], Params]
OnFailure = str | Callable[[Diagnostics], None]


def argmin(
    inner_loss: Loss,
    solver: InnerSolver,
    *,
    init: Init,
    adjoint: Adjoint = ContrastiveAdjoint(),
    on_failure: OnFailure = "nan",
    has_aux: bool = False,
) -> Callable[..., Any]:
    """The minimiser of an inner loss, phi = argmin of inner_loss, as a function that reverse mode differentiates.

    It is differentiable in `meta_params`, in the floating leaves of `task`, and in whatever traced values `inner_loss`
    captured; under jit, vmap and scan, inside other losses, an inner loss of another `argmin` included. Only what is
    asked for is computed. The minimum does not depend on where learning began, nor on the numbers of the solver and
    the adjoint: their gradient is an exact zero, but for the start under `BackpropAdjoint`. First derivatives in
    reverse mode only.

    The function returned is `(meta_params, task, *, params=None) -> phi`; `params` is a warm start, used instead of
    `init` and of its structure.

    Args:
      inner_loss: `(params, meta_params, task) -> scalar`.
      solver: the learner. Its optimiser must not capture traced values: give it a function of `meta_params`.
      init: where learning starts: a pytree of real floating arrays, or a function `(meta_params, task) -> params`.
        A callable that is itself a pytree of arrays, a module, counts as the former.
      adjoint: how the cotangent of phi is carried back.
      on_failure: what becomes of gradients where the adjoint's status says that they cannot be trusted (anything above
        `APPROXIMATE`): "nan" makes them NaN, "keep" keeps them, and a function `(diagnostics) -> None` is called on
        the host with NumPy scalars, once for each failure, and keeps them; what it raises ends the program. A zero
        cotangent gives exact zeros and is no failure. Solutions are returned as they are: see `has_aux`.
      has_aux: return `(phi, diagnostics)`, the free phase's residual, cost and status.

    Raises:
      TypeError: an argument is not of its kind; params are not real floating arrays; a complex value is differentiated.
      ValueError: `on_failure` is unknown, or `params` is not like `init`.

    Reference:
      Griewank & Walther (2008), chapter 15, for derivatives of fixed points; theory (9) for the default adjoint.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> def shrunk(w, decay, y):
      ...     return jnp.sum((w - y) ** 2) + decay * jnp.sum(w**2)
      >>> solve = cm.argmin(shrunk, cm.LBFGS(), init=lambda decay, y: jnp.zeros_like(y))
      >>> phi = solve(jnp.array(1.0), jnp.array([4.0]))  # w = y / (1 + decay)
      >>> grad = jax.grad(lambda decay: jnp.sum(solve(decay, jnp.array([4.0]))))(jnp.array(1.0))
      >>> round(float(phi[0]), 3), round(float(grad), 3)
      (2.0, -1.0)
    """
    require_function(inner_loss, "inner_loss", "params, meta_params, task", "scalar")
    _require(solver, "solver", isinstance(solver, InnerSolver), "an instance of InnerSolver, such as LBFGS()")
    _require(adjoint, "adjoint", isinstance(adjoint, Adjoint), "an instance of Adjoint, such as ContrastiveAdjoint()")
    if on_failure not in ("nan", "keep") and (isinstance(on_failure, str) or not callable(on_failure)):
        raise ValueError(f'`on_failure` must be "nan", "keep" or a function (diagnostics) -> None; got {on_failure!r}.')
    adjoint.estimator(solver)._check_parts(_Layer(OpenLoss(inner_loss), on_failure).problem(()))
    is_function = callable(init) and jax.tree.leaves(init) == [init]
    if is_function:
        require_function(init, "init", "meta_params, task", "params")

    def solve(meta_params: MetaParams, task: Task, *, params: Params | None = None) -> Any:
        meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
        task = jax.tree.map(jnp.asarray, task)
        start = as_float_arrays(init(meta_params, task) if is_function else init, "init", "`init` must be or return")
        if params is not None:
            params = as_float_arrays(params, "params", "`params` must be")
            check_same_structure(params, start, "`params`", "A warm start has the structure and dtypes of `init`.")
            start = params
        loss, values = hold_open(inner_loss, start, meta_params, task)
        operands = varying(Operands(start, meta_params, task, values))
        phi, diagnostics = _solve(_Layer(loss, on_failure), (solver, adjoint), operands)
        return (phi, jax.lax.stop_gradient(diagnostics)) if has_aux else phi

    return solve


@dataclasses.dataclass(frozen=True)
class _Layer:
    """What is static of a layer: hashable, so that the next call finds what this one compiled.

    Attributes:
      loss: `(params, meta_params, task, values) -> scalar`.
      on_failure: as `argmin` takes it.
    """

    loss: Callable[..., Any]
    on_failure: OnFailure

    def problem(self, values: tuple[Any, ...]) -> BilevelProblem:
        """Learning, with what the loss captured; nothing judges it."""
        return BilevelProblem(
            lambda params, meta_params, task: self.loss(params, meta_params, task, values),
            lambda params, meta_params, task: jnp.zeros(()),
            lambda meta_params, task: (),
        )


Strategies = tuple[InnerSolver, Adjoint]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(layer: _Layer, strategies: Strategies, operands: Operands) -> tuple[Params, Diagnostics]:
    solution, diagnostics = _learn(layer, strategies[0], operands)
    return solution.params, diagnostics


def _solve_forward(layer: _Layer, strategies: Any, operands: Any) -> tuple[Any, Any]:
    strategies, known = once(primal(strategies)), once(primal(operands))
    wanted = wanted_of(operands)
    solution, diagnostics = _learn(layer, strategies[0], known)
    return (solution.params, diagnostics), (strategies, known, wanted, solution)


def _solve_backward(layer: _Layer, kept: Any, cotangents: Any) -> tuple[None, Any]:
    strategies, operands, wanted, solution = kept
    cotangent = cotangents[0]
    nothing = all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(cotangent))
    none = [None] * len(wanted.mask)
    if nothing or not any(wanted.mask):
        return None, jax.tree.unflatten(jax.tree.structure(operands), none)
    cotangent = jax.tree.map(
        lambda v, phi: jnp.zeros_like(phi) if isinstance(v, SymbolicZero) else v, cotangent, solution.params
    )
    grads = _pull_back(layer, strategies, operands, wanted, solution, once(cotangent))
    return None, wanted.merge(grads, none, operands)


_solve.defvjp(_solve_forward, _solve_backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _learn(layer: _Layer, solver: InnerSolver, operands: Operands) -> tuple[Solution, Diagnostics]:
    """The free phase."""
    start, meta_params, task, values = operands
    with jax.default_matmul_precision("highest"):
        instance = _make_instance(layer.problem(values), start, meta_params, task)
        memory = solver.bind(meta_params).init_memory(start)
        found = instance.free_phase(solver, EstimatorState.fresh(start, memory, instance.dtype))
    diagnostics = make_diagnostics(
        instance.dtype, free_residual=found.residual, num_gradients=found.num_gradients, status=found.status
    )
    # What a solver remembers is not kept for the way back: it may be many times as large as the solution.
    return found._replace(memory=()), diagnostics


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _pull_back(
    layer: _Layer, strategies: Strategies, operands: Operands, wanted: Wanted, solution: Solution, cotangent: Params
) -> list[Any]:
    """The cotangents of the wanted operands: the meta-gradient of <cotangent, phi>, theory (9)."""
    solver, adjoint = strategies
    differentiated, others = wanted.split(operands)

    def merge(meta: list[Any], task: Any) -> Operands:
        return wanted.merge(meta, task[0], operands)

    def inner(params: Params, meta: list[Any], task: Any) -> Any:
        merged = merge(meta, task)
        return layer.loss(params, merged.meta_params, merged.task, merged.values)

    def outer(params: Params, meta: list[Any], task: Any) -> Any:
        # Not `vdot`: it conjugates, and complex phases need a holomorphic line.
        return sum(jnp.sum(v * phi) for v, phi in zip(*map(jax.tree.leaves, (task[1], params)), strict=True))

    problem = BilevelProblem(inner, outer, lambda meta, task: merge(meta, task).start)
    learned = AlreadyLearned(solver, solution, lambda meta: merge(meta, (others,)).meta_params)
    with jax.default_matmul_precision("highest"):
        instance = _make_instance(problem, solution.params, differentiated, (others, cotangent))
        result = adjoint.estimator(learned)._estimate(
            instance, EstimatorState.fresh(solution.params, (), instance.dtype)
        )

    asked = jnp.any(jnp.stack([jnp.any(v != 0) for v in jax.tree.leaves(cotangent)]))
    # The cotangent belongs to the solution that was returned, not to a minimum that the adjoint found from there.
    away = tree.norm(tree.subtract(result.params, solution.params)) > UNCONVERGED * tree.norm(solution.params)
    status = worst(result.diagnostics.status, flag(away, Status.FREE_NOT_CONVERGED))
    failed = asked & (status > Status.APPROXIMATE)
    grads = tree.where(asked, result.grad, tree.zeros_like(differentiated))
    if layer.on_failure == "nan":
        grads = jax.tree.map(lambda g: jnp.where(failed, jnp.nan, g), grads)
    elif callable(layer.on_failure):
        told = result.diagnostics._replace(status=status)
        jax.debug.callback(functools.partial(_tell, layer.on_failure), failed, told)
    return list(grads)


def _make_instance(problem: BilevelProblem, params: Params, meta_params: Any, task: Any) -> Instance:
    dtype = float_dtype_of(problem, params, meta_params, task)
    return Instance(problem, meta_params, task, jax.random.key(0), dtype)


def _tell(on_failure: Callable[[Diagnostics], None], failed: Any, diagnostics: Diagnostics) -> None:
    # A condition in the program would not hold under vmap.
    if np.asarray(failed):
        on_failure(jax.tree.map(lambda value: np.asarray(value)[()], diagnostics))


def _require(value: Any, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        got = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"`{name}` must be {wanted}; got {got}.")
