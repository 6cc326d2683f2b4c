"""The truncated Neumann series: what K steps of gradient descent make of an inverse."""

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import fori_loop
from contrastive_meta._linear.base import (
    HessianProduct,
    InverseHessian,
    LinearSolution,
    Real,
    attainable_tolerance,
    curves_down,
    make_system,
    require_positive,
)
from contrastive_meta._problem import Params
from contrastive_meta._pytree import strategy
from contrastive_meta._result import Status, flag, worst


@strategy
class NeumannSeries(InverseHessian):
    """u = a sum_{k < K} (I - a H)^k v: what K gradient-descent steps of size a move in response to a nudge v.

    The residual is exactly (I - a H)^K v, so the error shrinks by the spectral radius max |1 - a h| over the
    eigenvalues h of H each term: K of about k log(1 / tol) for condition number k, against sqrt(k) for
    `ConjugateGradient`. It diverges for a > 2 / ||H|| and for H with negative eigenvalues; the partial sum is
    returned as it is, with a residual above 1 or a status that says so. All K terms are always taken.

    Args:
      step_size: a, in units of 1 / H, positive and below 2 / ||H||: a learning rate that would be stable.
      num_terms: K, an integer, possibly traced. K = 1 gives a v to the last bit, at the cost of one product for
        the residual; K terms cost K products.
      tol: tolerance on the residual below which the status is `CONVERGED`, dimensionless. It stops nothing. None:
        as in `ConjugateGradient`.

    Raises:
      ValueError: `step_size` or `num_terms` is known and not positive.

    Reference:
      Liao et al. (2018), recurrent backpropagation by a Neumann series; Lorraine, Vicol & Duvenaud (2020),
      algorithm 3.

    Example:
      >>> import contrastive_meta as cm
      >>> import jax.numpy as jnp
      >>> solved = cm.NeumannSeries(step_size=0.5, num_terms=3).solve(lambda x: x, jnp.array([8.0]))
      >>> solved.solution.tolist(), float(solved.residual)
      ([7.0], 0.125)
    """

    step_size: Real
    num_terms: int | jax.Array = 100
    tol: Real | None = None

    def solve(self, hvp: HessianProduct, vector: Params) -> LinearSolution:
        """Sum as `InverseHessian.solve` says."""
        require_positive(self.step_size, "step_size", "Use a learning rate at which the inner loss descends.")
        require_positive(self.num_terms, "num_terms", "One term is `step_size * vector`.")
        system = make_system(hvp, vector)
        num_terms = jnp.asarray(self.num_terms, jnp.int32)

        def add_term(k: jax.Array, carry: tuple[Params, Params, jax.Array]) -> tuple[Params, Params, jax.Array]:
            total, residual, indefinite = carry
            total = tree.add(total, residual)
            # The last product measures v - H u itself: it equals the recursion's (I - a H)^K v without its drift.
            last = k == num_terms - 1
            point = tree.where(last, tree.scale(self.step_size, total), residual)
            product = system.product(point)
            indefinite |= curves_down(point, product, self.step_size, system.dtype)
            ahead = tree.add_scaled(residual, -self.step_size, product)
            return total, tree.where(last, tree.subtract(system.vector, product), ahead), indefinite

        start = (tree.zeros_like(system.vector), system.vector, jnp.asarray(False))
        total, residual, indefinite = fori_loop(0, num_terms, add_term, start)
        solution = tree.scale(self.step_size, total)
        relative = system.relative_norm(residual)
        norm_of_hessian = 1 / jnp.asarray(self.step_size, system.dtype)
        tolerance = attainable_tolerance(self.tol, system, norm_of_hessian, solution)
        status = worst(
            flag(relative > tolerance, Status.NUDGED_NOT_CONVERGED), flag(indefinite, Status.INDEFINITE_CURVATURE)
        )
        return system.finish(solution, relative, num_terms, status)
