"""The Hessian written out and factorised: the reference where it fits in memory."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from contrastive_meta import _pytree as tree
from contrastive_meta._linear.base import (
    HessianProduct,
    InverseHessian,
    LinearSolution,
    Real,
    attainable_tolerance,
    make_system,
    map_products,
)
from contrastive_meta._problem import Params
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import Status, flag, worst

_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@strategy
class DenseInverse(InverseHessian):
    """Writes out H with n products, one for each of the n entries of v, and solves by its eigenvalues.

    Memory is O(n^2) for H and its eigenvectors, plus n copies of what one product needs unless `batch_size` bounds
    it; time is O(n^3). Exact to rounding, with one step of iterative refinement, for definite and indefinite H
    alike. Where the smallest eigenvalue of H + damping I is not positive (beyond rounding) the status is
    `INDEFINITE_CURVATURE`; eigenvalues that are zero up to rounding are left out, so a singular system gets its
    minimum-norm least-squares solution.

    Args:
      damping: added to the diagonal of H, in its units. As in `ConjugateGradient` the reported residual is the
        undamped one, and the status is `APPROXIMATE` where only the damped system was solved.
      batch_size: how many products run at once; None runs all n.

    Raises:
      ValueError: `batch_size` is not positive.

    Reference:
      Higham (2002), Accuracy and Stability of Numerical Algorithms, chapter 12, for the refinement.

    Example:
      >>> import contrastive_meta as cm
      >>> import jax.numpy as jnp
      >>> hessian = jnp.array([[2.0, 1.0], [1.0, 3.0]])
      >>> solved = cm.DenseInverse().solve(lambda x: hessian @ x, jnp.array([3.0, 4.0]))
      >>> [round(float(x), 6) for x in solved.solution], int(solved.num_hvps)
      ([1.0, 1.0], 3)
    """

    damping: Real = 0.0
    batch_size: int | None = static(default=None)

    def solve(self, hvp: HessianProduct, vector: Params) -> LinearSolution:
        """Factorise and solve as `InverseHessian.solve` says."""
        system = make_system(hvp, vector)
        flat, unravel = ravel_pytree(system.vector)
        if flat.size == 0:
            return system.finish(system.vector, system.norm, 0, flag(False, Status.CONVERGED))
        identity = jnp.eye(flat.size, dtype=flat.dtype)
        rows = map_products(system, identity, unravel, self.batch_size)
        hessian = 0.5 * (rows + rows.T) + jnp.asarray(self.damping, flat.dtype) * identity
        eigenvalues, basis = jnp.linalg.eigh(hessian)

        eps = float(jnp.finfo(flat.dtype).eps)
        largest = jnp.max(jnp.abs(eigenvalues))
        # Eigenvalues that are exactly zero came out at 1 to 3 eps of the largest for n from 5 to 800.
        rounding = 8 * eps * largest
        present = jnp.abs(eigenvalues) > rounding
        inverse = jnp.where(present, 1 / jnp.where(present, eigenvalues, 1.0), 0.0)

        def apply_inverse(x: jax.Array) -> jax.Array:
            return _matmul(basis, inverse * _matmul(basis.T, x))

        first = apply_inverse(flat)
        solution = unravel(first + apply_inverse(flat - _matmul(hessian, first)))
        residual = tree.subtract(system.vector, system.product(solution))
        relative = system.relative_norm(residual)
        damped = system.relative_norm(tree.add_scaled(residual, -self.damping, solution))
        tolerance = attainable_tolerance(None, system, largest, solution)
        status = worst(
            flag(relative > tolerance, Status.APPROXIMATE),
            flag(damped > tolerance, Status.NUDGED_NOT_CONVERGED),
            flag(jnp.min(eigenvalues) <= rounding, Status.INDEFINITE_CURVATURE),
        )
        return system.finish(solution, relative, flat.size + 1, status)
