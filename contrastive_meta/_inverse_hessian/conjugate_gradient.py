"""Conjugate gradients that measure their own residual and know when the curvature is not theirs to solve."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._inverse_hessian.base import (
    HessianProduct,
    InverseHessian,
    LinearSolution,
    Real,
    System,
    attainable_tolerance,
    default_tolerance,
    make_system,
)
from contrastive_meta._problem import Params
from contrastive_meta._pytree import strategy
from contrastive_meta._result import Status, flag, worst


@strategy
class ConjugateGradient(InverseHessian):
    """Solves (H + damping I) u = v by conjugate gradients: the reference for positive definite H.

    Without rounding it is exact after as many steps as H has distinct eigenvalues; the error falls at least by
    (sqrt(k) - 1) / (sqrt(k) + 1) a step, k being the condition number. The residual it stops on is a recursion that
    drifts from the true one, so on reaching the tolerance the true one is measured (one product more), and where
    that is still above the tolerance the search restarts from there, as long as restarts halve it. In float32 this
    goes down to the rounding floor of about 1e-7 ||H|| ||u|| / ||v||, at worst 1e-7 times the condition number, and
    makes up for products that are a little off, as under reduced matmul precision.

    It stops at a direction p of curvature p'(H + damping I)p <= 0 (or positive only by rounding) with
    `INDEFINITE_CURVATURE`, and at a product that is not finite with `NOT_FINITE`. Whatever happens the iterate with
    the smallest residual is returned, the starting point excepted: every step brings u closer to the solution, even
    while its residual is above 1. Zero, of residual 1, is returned only if the very first direction fails.

    Args:
      tol: tolerance on ||v - (H + damping I) u|| / ||v||, dimensionless. None: 1e-10 in float64 and 1.2e-6 in
        float32, raised where the rounding floor is higher, though never above sqrt(eps).
      max_steps: the most search directions to take, an integer, possibly traced; at least one is taken.
      damping: added to the diagonal of H, in its units. The reported residual is the undamped one and so includes
        what damping distorts; the status is then `APPROXIMATE` where only the damped system was solved.

    Reference:
      Hestenes & Stiefel (1952); for meta-gradients Rajeswaran et al. (2019), iMAML, algorithm 2; for replacing the
      recursive residual by the true one van der Vorst & Ye (2000).

    Example:
      >>> import contrastive_meta as cm
      >>> import jax.numpy as jnp
      >>> hessian = jnp.array([[2.0, 1.0], [1.0, 3.0]])
      >>> answer = cm.ConjugateGradient().solve(lambda x: hessian @ x, jnp.array([3.0, 4.0]))
      >>> [round(float(x), 6) for x in answer.solution], int(answer.num_hvps)
      ([1.0, 1.0], 3)
    """

    tol: Real | None = None
    max_steps: int | jax.Array = 1000
    damping: Real = 0.0

    def solve(self, hvp: HessianProduct, vector: Params) -> LinearSolution:
        """Solve as `InverseHessian.solve` says."""
        system = make_system(hvp, vector)
        search = jax.lax.while_loop(lambda s: ~s.done, lambda s: self._iterate(system, s), _start(system))
        tolerance = attainable_tolerance(self.tol, system, search.curvature, search.kept)
        status = worst(
            flag(search.kept_undamped > tolerance, Status.APPROXIMATE),
            flag(search.kept_residual > tolerance, Status.NUDGED_NOT_CONVERGED),
            flag(search.indefinite, Status.INDEFINITE_CURVATURE),
            flag(search.broken, Status.NOT_FINITE),
        )
        return system.finish(search.kept, search.kept_undamped, search.num_hvps, status)

    def _iterate(self, system: System, s: "_Search") -> "_Search":
        # One product a turn, along the next direction or to measure the best iterate: the loop holds a single copy
        # of the product's code, and turns are products.
        point = tree.where(s.measuring, s.best, s.direction)
        product = tree.add_scaled(system.product(point), self.damping, point)
        s = s._replace(num_hvps=s.num_hvps + 1)
        turned: _Search = jax.lax.cond(
            s.measuring, partial(self._measure, system), partial(self._step, system), s, product
        )
        return turned

    def _step(self, system: System, s: "_Search", product: Params) -> "_Search":
        """One step along the direction p, `product` being (H + damping I) p."""
        eps = float(jnp.finfo(system.dtype).eps)
        along, length = tree.vdot(s.direction, product), tree.vdot(s.direction, s.direction)
        curvature = jnp.maximum(s.curvature, along / length)
        curved = along > eps * curvature * length
        step = s.squared / jnp.where(curved, along, 1.0)
        iterate = tree.add_scaled(s.iterate, step, s.direction)
        remainder = tree.add_scaled(s.remainder, -step, product)
        squared = tree.vdot(remainder, remainder)
        finite = jnp.isfinite(along) & (~curved | jnp.isfinite(squared))
        residual = jnp.sqrt(squared) / system.norm
        better = curved & finite & (residual < s.best_residual)
        num_steps = s.num_steps + 1
        claimed = residual <= _claim(self.tol, system)
        return s._replace(
            iterate=iterate,
            remainder=remainder,
            direction=tree.add_scaled(remainder, squared / s.squared, s.direction),
            squared=squared,
            best=tree.where(better, iterate, s.best),
            best_residual=jnp.where(better, residual, s.best_residual),
            curvature=jnp.where(finite, curvature, s.curvature),
            num_steps=num_steps,
            measuring=~finite | ~curved | claimed | (num_steps >= self.max_steps),
            indefinite=s.indefinite | (finite & ~curved),
            broken=s.broken | ~finite,
        )

    def _measure(self, system: System, s: "_Search", product: Params) -> "_Search":
        """Compare the best iterate's true residual with that of the kept one; restart from it if that helped."""
        remainder = tree.subtract(system.vector, product)
        residual = system.relative_norm(remainder)
        undamped = system.relative_norm(tree.add_scaled(remainder, self.damping, s.best))
        better = (s.best_residual < jnp.inf) & (residual < s.kept_residual)
        enough = residual <= jnp.maximum(
            attainable_tolerance(self.tol, system, s.curvature, s.best), _claim(self.tol, system)
        )
        halved = residual <= 0.5 * s.kept_residual
        return s._replace(
            iterate=s.best,
            remainder=remainder,
            direction=remainder,
            squared=tree.vdot(remainder, remainder),
            best_residual=residual,
            kept=tree.where(better, s.best, s.kept),
            kept_residual=jnp.where(better, residual, s.kept_residual),
            kept_undamped=jnp.where(better, undamped, s.kept_undamped),
            measuring=jnp.asarray(False),
            done=s.broken | s.indefinite | enough | ~halved | (s.num_steps >= self.max_steps),
        )


class _Search(NamedTuple):
    iterate: Params
    remainder: Params  # of the iterate, by recursion
    direction: Params
    squared: jax.Array  # ||remainder||^2
    best: Params  # the iterate of smallest recursive residual since the last measurement
    best_residual: jax.Array
    kept: Params  # the iterate of smallest measured residual
    kept_residual: jax.Array
    kept_undamped: jax.Array
    curvature: jax.Array  # the largest p'Hp / p'p so far, at most ||H||
    num_steps: jax.Array
    num_hvps: jax.Array
    measuring: jax.Array
    indefinite: jax.Array
    broken: jax.Array
    done: jax.Array


def _start(system: System) -> _Search:
    zero = tree.zeros_like(system.vector)
    none, false = jnp.zeros((), jnp.int32), jnp.asarray(False)
    # Infinite, not 1: any step is kept in preference to the zero that the search starts from.
    unknown = jnp.full((), jnp.inf, system.dtype)
    return _Search(
        iterate=zero,
        remainder=system.vector,
        direction=system.vector,
        squared=jnp.square(system.norm),
        best=zero,
        best_residual=unknown,
        kept=zero,
        kept_residual=unknown,
        kept_undamped=jnp.ones((), system.dtype),
        curvature=jnp.zeros((), system.dtype),
        num_steps=none,
        num_hvps=none,
        measuring=false,
        indefinite=false,
        broken=false,
        done=~system.solvable,
    )


def _claim(tol: Real | None, system: System) -> jax.Array:
    """The recursive residual at which to measure the true one; below one rounding of v it has nothing to say."""
    tol = default_tolerance(system.dtype) if tol is None else tol
    return jnp.maximum(jnp.asarray(tol, system.dtype), float(jnp.finfo(system.dtype).eps))
