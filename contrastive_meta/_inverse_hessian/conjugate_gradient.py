"""Conjugate gradients that measure their own residual and know when the curvature is not theirs to solve."""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._inverse_hessian.base import (
    HessianProduct,
    InverseHessian,
    LinearSolution,
    Real,
    default_tolerance,
    make_system,
)
from contrastive_meta._linear import LinearSolve, Stopping, conjugate_gradient
from contrastive_meta._problem import Params, as_float_arrays
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
