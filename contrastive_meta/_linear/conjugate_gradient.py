"""Conjugate gradients with restarts from the true residual: the loop, and the public inverse Hessian on it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import while_loop
from contrastive_meta._linear.base import (
    HessianProduct,
    InverseHessian,
    LinearSolution,
    Real,
    default_tolerance,
    make_system,
)
from contrastive_meta._problem import Params, as_float_arrays
from contrastive_meta._pytree import strategy
from contrastive_meta._result import Status, flag, worst

Product = Callable[[Params], Params]


class Stopping(NamedTuple):
    """When conjugate gradients end. All fields may be traced, so that systems with their own settings share a loop.

    Attributes:
      tol: relative residual |b - (H + damping I) x| / |b| at which the system counts as solved.
      highest_tol: up to here `tol` is raised where rounding of the products permits no less. Equal to `tol`: never.
      max_steps: the largest number of search directions. 0 measures the residual of the guess.
      damping: added to the diagonal of H.
      look_ahead: whether to spend one product more on the curvature along the final residual.
    """

    tol: Any
    highest_tol: Any
    max_steps: Any
    damping: Any = 0.0
    look_ahead: Any = False


class LinearSolve(NamedTuple):
    """What conjugate gradients found.

    Attributes:
      solution: the iterate of the smallest measured residual.
      residual: b - H x there, of the undamped system. It was measured by a product, not by the recursion.
      relative_residual: |b - (H + damping I) x| / |b| there; infinite where no step could be taken.
      undamped_relative_residual: |residual| / |b|; never NaN.
      tolerance: the tolerance that applied there, between `tol` and `highest_tol`.
      first_curvature: Rayleigh quotient of H along the first search direction, which is b without a guess.
      missing: length of the Cauchy step that `residual` asks for, over the length of the solution. Infinite where the
        curvature along `residual` is not positive, and where `look_ahead` did not ask for it.
      num_products: products with H.
      indefinite: whether a direction of curvature that is not positive ended the search.
      broken: whether a product that is not finite ended the search.
    """

    solution: Params
    residual: Params
    relative_residual: jax.Array
    undamped_relative_residual: jax.Array
    tolerance: jax.Array
    first_curvature: jax.Array
    missing: jax.Array
    num_products: jax.Array
    indefinite: jax.Array
    broken: jax.Array


# A step along the direction; the measured residual of the best iterate; the curvature along the final residual.
_STEP, _MEASURE, _LOOK_AHEAD, _DONE = range(4)
# Why a search ended early: curvature that is not positive, or a product that is not finite.
_INDEFINITE, _BROKEN = 1, 2


class _Search(NamedTuple):
    """The loop's carry. An iteration takes a step along `direction`, or measures the residual of `best`."""

    iterate: Params
    residual: Params  # of the iterate, by recursion
    squared: jax.Array  # |residual|^2
    direction: Params
    best: Params  # the iterate of smallest recursive residual since the last measurement
    best_norm: jax.Array  # relative
    kept: Params  # the iterate of smallest measured residual
    kept_residual: Params
    kept_norm: jax.Array  # relative
    kept_scaled: jax.Array  # its length times `largest_curvature`
    largest_curvature: jax.Array  # the largest modulus of a Rayleigh quotient so far, at most |H|
    first_curvature: jax.Array
    last_curvature: jax.Array
    num_steps: jax.Array
    num_products: jax.Array
    action: jax.Array  # what the next iteration does: _STEP, _MEASURE, _LOOK_AHEAD or _DONE
    failure: jax.Array  # _INDEFINITE, _BROKEN or 0


def conjugate_gradient(
    product: Product, right_side: Params, norm: jax.Array, stopping: Stopping, *, guess: Params | None = None, skip: Any
) -> LinearSolve:
    """Solve (H + damping I) x = b for symmetric H.

    The residual of the recursion drifts from the true one. So on reaching the tolerance the true residual is measured
    by one product more. Where it is still above the tolerance the search restarts from there, as long as restarts
    halve it. The search ends at a direction of curvature that is not positive beyond rounding. Every iteration needs
    one product, along the next direction or at the iterate to be measured, so the product is compiled once.

    Args:
      product: `x -> H x`.
      right_side: b, of order one, so that squares neither overflow nor vanish.
      norm: |b|, or 1 where b is zero. Its dtype is that of all scalars.
      stopping: tolerance, budget and damping.
      guess: where to start; its residual is measured first. None starts at zero and measures nothing.
      skip: whether to return at once, with the zero that the search starts from.

    Reference:
      Hestenes & Stiefel (1952); for the restarts van der Vorst & Ye (2000).
    """
    start = _start(right_side, norm, guess, skip)
    search = while_loop(lambda s: s.action != _DONE, lambda s: _iterate(product, right_side, norm, stopping, s), start)
    residual = tree.add_scaled(search.kept_residual, stopping.damping, search.kept)
    length = jnp.sqrt(_vdot(residual, residual, norm.dtype))
    relative = jnp.where(jnp.isnan(length), jnp.inf, length / norm)
    cauchy = length / jnp.maximum(search.last_curvature, jnp.finfo(norm.dtype).tiny) * search.largest_curvature
    return LinearSolve(
        solution=search.kept,
        residual=residual,
        relative_residual=search.kept_norm,
        undamped_relative_residual=relative,
        tolerance=_tolerance(stopping, norm, search.kept_scaled),
        first_curvature=search.first_curvature,
        missing=jnp.where(length == 0, 0.0, cauchy / search.kept_scaled),
        num_products=search.num_products,
        indefinite=search.failure == _INDEFINITE,
        broken=search.failure == _BROKEN,
    )


def _iterate(product: Product, right_side: Params, norm: jax.Array, stopping: Stopping, s: _Search) -> _Search:
    """One product, and what follows from it."""
    dtype, eps = norm.dtype, float(jnp.finfo(norm.dtype).eps)
    measuring, stepping = s.action == _MEASURE, s.action == _STEP
    point = tree.where(measuring, s.best, s.direction)
    image = tree.add_scaled(product(point), stopping.damping, point)

    # A step of length r'r / p'Hp along the direction p; or, measuring, the residual b - H x of x itself.
    along, length = _vdot(point, image, dtype), _vdot(point, point, dtype)
    rayleigh = along / tree.or_one(length)
    largest = jnp.maximum(s.largest_curvature, jnp.abs(rayleigh))
    upward = along > eps * largest * length
    step = jnp.where(measuring, 1, s.squared / jnp.where(upward, along, 1))
    iterate = tree.add_scaled(tree.where(measuring, tree.zeros_like(s.iterate), s.iterate), step, point)
    residual = tree.add_scaled(tree.where(measuring, right_side, s.residual), -step, image)
    squared = _vdot(residual, residual, dtype)
    relative = jnp.sqrt(squared) / norm
    finite = jnp.isfinite(along) & (~upward | jnp.isfinite(squared))

    # |H| |x|: scaled by |H|, x has no squares that overflow.
    scaled_iterate = tree.scale(largest, iterate)
    scaled = jnp.sqrt(_vdot(scaled_iterate, scaled_iterate, dtype))
    # Below one rounding of b the recursion says nothing.
    claim = jnp.maximum(jnp.asarray(stopping.tol, dtype), eps)

    num_steps = s.num_steps + stepping.astype(jnp.int32)
    failed = jnp.where(finite, jnp.where(upward, 0, _INDEFINITE), _BROKEN)
    failure = jnp.where(stepping, failed, s.failure)
    # Every step brings the iterate closer to the solution, even while its residual is above that of zero; so the
    # start has an infinite norm, and any step is kept in preference to it.
    better = measuring | (upward & finite & (relative < s.best_norm))
    improved = measuring & (s.best_norm < jnp.inf) & (relative < s.kept_norm)
    kept, kept_residual = tree.where(improved, (iterate, residual), (s.kept, s.kept_residual))

    spent = num_steps >= stopping.max_steps
    enough = jnp.maximum(_tolerance(stopping, norm, scaled), claim)
    restart = (relative > enough) & (relative <= 0.5 * s.kept_norm)
    ended = measuring & ((failure > 0) | spent | ~restart)
    claimed = stepping & ((failure > 0) | (relative <= claim) | spent)
    after = jnp.where(ended, jnp.where(stopping.look_ahead, _LOOK_AHEAD, _DONE), jnp.where(claimed, _MEASURE, _STEP))
    # Where the search ended, the residual is that of the undamped system.
    left = tree.add_scaled(kept_residual, jnp.where(ended, stopping.damping, 0), kept)
    return _Search(
        iterate=iterate,
        residual=residual,
        squared=squared,
        direction=tree.where(measuring, left, tree.add_scaled(residual, squared / tree.or_one(s.squared), point)),
        best=tree.where(better, iterate, s.best),
        best_norm=jnp.where(better, relative, s.best_norm),
        kept=kept,
        kept_residual=kept_residual,
        kept_norm=jnp.where(improved, relative, s.kept_norm),
        kept_scaled=jnp.where(improved, scaled, s.kept_scaled),
        largest_curvature=jnp.where((s.action != _LOOK_AHEAD) & jnp.isfinite(largest), largest, s.largest_curvature),
        first_curvature=jnp.where(stepping & (s.num_steps == 0), rayleigh - stopping.damping, s.first_curvature),
        last_curvature=jnp.where(s.action == _LOOK_AHEAD, rayleigh - stopping.damping, s.last_curvature),
        num_steps=num_steps,
        num_products=s.num_products + 1,
        action=jnp.where(s.action == _LOOK_AHEAD, _DONE, after).astype(jnp.int32),
        failure=failure.astype(jnp.int32),
    )


def _tolerance(stopping: Stopping, norm: jax.Array, scaled: jax.Array) -> jax.Array:
    """The tolerance where rounding of the products leaves a residual of about eps |H| |x|, `scaled` being |H| |x|."""
    eps = float(jnp.finfo(norm.dtype).eps)
    lowest, highest = jnp.asarray(stopping.tol, norm.dtype), jnp.asarray(stopping.highest_tol, norm.dtype)
    return jnp.clip(4 * eps * scaled / norm, lowest, highest)


def _start(right_side: Params, norm: jax.Array, guess: Params | None, skip: Any) -> _Search:
    zero = jnp.zeros((), norm.dtype)
    none = jnp.zeros((), jnp.int32)
    infinite = jnp.full((), jnp.inf, norm.dtype)
    nothing = tree.zeros_like(right_side)
    return _Search(
        iterate=nothing,
        residual=right_side,
        squared=jnp.square(norm),
        direction=right_side,
        best=nothing if guess is None else guess,
        best_norm=infinite if guess is None else jnp.ones_like(norm),
        kept=nothing,
        kept_residual=right_side,
        kept_norm=infinite,
        kept_scaled=zero,
        largest_curvature=zero,
        first_curvature=zero,
        last_curvature=zero,
        num_steps=none,
        num_products=none,
        action=jnp.where(skip, _DONE, _STEP if guess is None else _MEASURE).astype(jnp.int32),
        failure=none,
    )


def _vdot(a: Params, b: Params, dtype: Any) -> jax.Array:
    return tree.vdot(a, b).astype(dtype)


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
      >>> solved = cm.ConjugateGradient().solve(lambda x: hessian @ x, jnp.array([3.0, 4.0]))
      >>> [round(float(x), 6) for x in solved.solution], int(solved.num_hvps)
      ([1.0, 1.0], 3)
    """

    tol: Real | None = None
    max_steps: int | jax.Array = 1000
    damping: Real = 0.0

    def solve(self, hvp: HessianProduct, vector: Params) -> LinearSolution:
        """Solve as `InverseHessian.solve` says."""
        vector = as_float_arrays(vector, "vector", "`vector` must be")
        return solve_by_conjugate_gradient(hvp, vector, self.stopping(tree.float_dtype(vector)))[0]

    def stopping(self, dtype: Any, *, look_ahead: bool = False) -> Stopping:
        """The settings as numbers, in which several systems can share a loop.

        Args:
          dtype: that of the system's scalars.
          look_ahead: as in `Stopping`.
        """
        eps = float(jnp.finfo(dtype).eps)
        tol = default_tolerance(dtype) if self.tol is None else self.tol
        # Beyond sqrt(eps) it is no longer rounding but failure.
        highest = max(eps**0.5, default_tolerance(dtype)) if self.tol is None else self.tol
        return Stopping(tol, highest, jnp.maximum(self.max_steps, 1), self.damping, look_ahead)


def solve_by_conjugate_gradient(
    hvp: HessianProduct, vector: Params, stopping: Stopping, guess: Params | None = None
) -> tuple[LinearSolution, LinearSolve]:
    """Conjugate gradients on a right-hand side of any scale.

    Args:
      hvp: as in `InverseHessian.solve`.
      vector: as in `InverseHessian.solve`.
      stopping: see there.
      guess: of the solution, see `conjugate_gradient`.

    Returns:
      The solution, and what the loop found, its residual in the units of `vector`.
    """
    system = make_system(hvp, vector)
    guess = None if guess is None else system.scaled(guess)
    found = conjugate_gradient(system.product, system.vector, system.norm, stopping, guess=guess, skip=~system.solvable)
    undamped = found.undamped_relative_residual
    status = worst(
        flag(undamped > found.tolerance, Status.APPROXIMATE),
        flag(found.relative_residual > found.tolerance, Status.NUDGED_NOT_CONVERGED),
        flag(found.indefinite, Status.INDEFINITE_CURVATURE),
        flag(found.broken, Status.NOT_FINITE),
    )
    solution = system.finish(found.solution, undamped, found.num_products, status)
    return solution, found._replace(residual=system.in_units(found.residual))
