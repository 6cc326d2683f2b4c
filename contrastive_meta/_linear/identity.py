"""No solve at all: the inverse Hessian taken to be a multiple of the identity, as T1-T2 has it."""

from contrastive_meta import _pytree as tree
from contrastive_meta._linear.base import (
    HessianProduct,
    InverseHessian,
    LinearSolution,
    Real,
    curves_down,
    make_system,
    require_positive,
)
from contrastive_meta._problem import Params
from contrastive_meta._pytree import strategy
from contrastive_meta._result import Status, flag, worst


@strategy
class IdentityHessian(InverseHessian):
    """u = scale v, as if H were I / scale: T1-T2, and the first term of `NeumannSeries`.

    Right in direction only as far as v lies along eigenvectors of one eigenvalue; the status is `APPROXIMATE` at
    least. One product is spent to report the residual, which is how wrong the supposition is.

    Args:
      scale: the supposed inverse curvature, in units of 1 / H, positive.

    Raises:
      ValueError: `scale` is known and not positive.

    Reference:
      Luketina et al. (2016), who name it T1-T2.

    Example:
      >>> import contrastive_meta as cm
      >>> import jax.numpy as jnp
      >>> solved = cm.IdentityHessian(0.5).solve(lambda x: 3.0 * x, jnp.array([2.0]))
      >>> solved.solution.tolist(), float(solved.residual)
      ([1.0], 0.5)
    """

    scale: Real = 1.0

    def solve(self, hvp: HessianProduct, vector: Params) -> LinearSolution:
        """Scale as `InverseHessian.solve` says."""
        require_positive(self.scale, "scale", "It stands for the inverse of a positive curvature.")
        system = make_system(hvp, vector)
        solution = tree.scale(self.scale, system.vector)
        product = system.product(solution)
        residual = system.relative_norm(tree.subtract(system.vector, product))
        indefinite = curves_down(solution, product, self.scale, system.dtype)
        solved = system.finish(solution, residual, 1, flag(indefinite, Status.INDEFINITE_CURVATURE))
        return solved._replace(status=worst(solved.status, Status.APPROXIMATE))
