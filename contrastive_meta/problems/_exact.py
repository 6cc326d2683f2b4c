"""The exact meta-gradient of a small problem: dense Newton, then the implicit function theorem, densely."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task, as_float_arrays
from contrastive_meta._pytree import all_finite, norm
from contrastive_meta.problems._instance import ExactMetaGradient

_MAX_STEPS = 200
_MAX_HALVINGS = 40


def exact_meta_gradient(
    problem: BilevelProblem, meta_params: MetaParams, task: Task, near: Params | None = None
) -> ExactMetaGradient:
    """The meta-gradient by dense linear algebra, the reference that estimators are held to.

    Solves the inner problem by damped Newton to the floor of the dtype, then applies theory (4) with the dense
    Hessian. Shares no code with the solvers and estimators of this package. Work in float64 for a reference: its
    relative error is then about 1e-16 times the Hessian's condition number, 1e-7 times in float32. Time grows with
    the cube, memory with the square of the number of parameters: some thousands at most.

    Args:
      problem: with a twice differentiable inner loss.
      meta_params: pytree of floating arrays.
      task: one task, not a batch (`jax.vmap` over a batch).
      near: where Newton starts, like `params`; None starts at `problem.init_params`. On a non-convex inner loss pass
        a solution in the basin that is meant: Newton descends from it, and the result's `params` show where it went.

    Returns:
      An `ExactMetaGradient`. Failure is not raised, so that this works under jit and vmap: look at `converged`.

    Reference:
      Newton on |H|: Nocedal & Wright, "Numerical Optimization", 2nd ed. 2006, section 3.4. Gradient: the implicit
      function theorem, theory (4).

    Example:
      >>> import jax.numpy as jnp
      >>> from contrastive_meta import BilevelProblem
      >>> from contrastive_meta.problems import exact_meta_gradient
      >>> problem = BilevelProblem(
      ...     inner_loss=lambda w, theta, task: (w - theta) ** 2 / 2,
      ...     outer_loss=lambda w, theta, task: w**2,
      ...     init_params=lambda theta, task: jnp.zeros_like(theta),
      ... )
      >>> float(exact_meta_gradient(problem, jnp.asarray(3.0), None).grad)
      6.0
    """
    meta_params = as_float_arrays(meta_params, "meta_params", "exact_meta_gradient needs")
    start = problem.init(meta_params, task) if near is None else as_float_arrays(near, "near", "`near` must be")
    result: ExactMetaGradient = _exact(problem, meta_params, task, start)
    return result


@jax.jit
def _exact(problem: BilevelProblem, meta_params: MetaParams, task: Task, start: Params) -> ExactMetaGradient:
    flat_start, unravel = ravel_pytree(start)

    def inner(flat: jax.Array, meta_params: MetaParams) -> jax.Array:
        return problem.inner(unravel(flat), meta_params, task)

    def outer(flat: jax.Array, meta_params: MetaParams) -> jax.Array:
        return problem.outer(unravel(flat), meta_params, task)

    with jax.default_matmul_precision("highest"):
        flat = _newton(lambda flat: inner(flat, meta_params), flat_start)
        free_grad, hessian = jax.grad(inner)(flat, meta_params), jax.hessian(inner)(flat, meta_params)
        outer_loss, (outer_in_params, direct) = jax.value_and_grad(outer, argnums=(0, 1))(flat, meta_params)

        # (4): dL_out/dtheta - d/dtheta <dL_in/dphi, a> with a = H^-1 dL_out/dphi held fixed.
        adjoint = jnp.linalg.solve(hessian, outer_in_params)
        indirect = jax.grad(lambda theta: jnp.vdot(jax.grad(inner)(flat, theta), adjoint))(meta_params)
        grad = jax.tree.map(jnp.subtract, direct, indirect)
        return vouch(grad, outer_loss, unravel(flat), free_grad, hessian)


def vouch(
    grad: MetaParams, outer_loss: jax.Array, params: Params, free_grad: jax.Array, hessian: jax.Array
) -> ExactMetaGradient:
    """The result with its residual, smallest eigenvalue and whether it is accurate.

    It is where the Newton step still to go is below what rounding leaves: eps times the condition number, times
    a thousand for long sums, but never more than half of the digits.
    """
    eigenvalues = jnp.linalg.eigvalsh(hessian)
    smallest, largest = eigenvalues[0], eigenvalues[-1]
    eps = jnp.finfo(free_grad.dtype).eps
    rounding = jnp.minimum(1e3 * eps * largest / jnp.abs(smallest), eps**0.5)
    remaining = norm(jnp.linalg.solve(hessian, free_grad))
    small = remaining <= rounding * (1 + norm(params))
    definite = smallest > eigenvalues.shape[0] * eps * largest
    converged = small & definite & all_finite((grad, outer_loss, params))
    return ExactMetaGradient(grad, outer_loss, params, norm(free_grad), smallest, converged)


class _Iterate(NamedTuple):
    params: jax.Array
    loss: jax.Array
    grad: jax.Array
    best_params: jax.Array
    best_residual: jax.Array
    stalled: jax.Array
    step: jax.Array


def _newton(loss: Callable[[jax.Array], jax.Array], start: jax.Array) -> jax.Array:
    """Newton with |H| for H and backtracking, until neither loss nor gradient falls any further."""
    value_and_grad, hessian = jax.value_and_grad(loss), jax.hessian(loss)
    eps = jnp.finfo(start.dtype).eps

    def unconverged(it: _Iterate) -> jax.Array:
        return (it.stalled < 3) & (it.step < _MAX_STEPS) & (it.best_residual > 0)

    def advance(it: _Iterate) -> _Iterate:
        noise = 8 * eps * jnp.abs(it.loss)
        direction = _descent_direction(hessian(it.params), it.grad)
        params = _backtrack(loss, it, direction, noise)
        value, grad = value_and_grad(params)
        residual = norm(grad)
        # At its floor the loss is noise and the smallest gradient decides; while it falls, the newest iterate does.
        fell = value < it.loss - noise
        better = fell | (residual < it.best_residual)
        progress = fell | (residual < it.best_residual / 2)
        return _Iterate(
            params,
            value,
            grad,
            best_params=jnp.where(better, params, it.best_params),
            best_residual=jnp.where(better, residual, it.best_residual),
            stalled=jnp.where(progress, 0, it.stalled + 1),
            step=it.step + 1,
        )

    value, grad = value_and_grad(start)
    first = _Iterate(start, value, grad, start, norm(grad), jnp.int32(0), jnp.int32(0))
    last: _Iterate = jax.lax.while_loop(unconverged, advance, first)
    return last.best_params


def _descent_direction(hessian: jax.Array, grad: jax.Array) -> jax.Array:
    """-|H|^-1 g, which descends on either side of a saddle and is Newton's step where H is positive."""
    eigenvalues, vectors = jnp.linalg.eigh(hessian)
    size = jnp.abs(eigenvalues)
    floor = jnp.finfo(grad.dtype).eps * jnp.max(size)
    direction: jax.Array = -vectors @ (vectors.T @ grad / jnp.maximum(size, floor))
    return direction


def _backtrack(loss: Callable[[jax.Array], jax.Array], it: _Iterate, direction: jax.Array, noise: Any) -> jax.Array:
    """The longest of the steps 1, 1/2, 1/4, ... along `direction` that lowers the loss enough (Armijo)."""
    slope = jnp.vdot(it.grad, direction)

    def too_long(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        length, halvings = state
        wanted = it.loss + 1e-4 * length * slope + noise
        low_enough: jax.Array = loss(it.params + length * direction) <= wanted
        return ~low_enough & (halvings < _MAX_HALVINGS)  # the negation, so that a NaN counts as too long

    def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state[0] / 2, state[1] + 1

    length: jax.Array = jax.lax.while_loop(too_long, halve, (jnp.ones((), it.params.dtype), jnp.int32(0)))[0]
    return it.params + length * direction
