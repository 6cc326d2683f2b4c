"""A randomised low-rank picture of the Hessian, inverted by Woodbury's identity: few products, all at once."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from contrastive_meta import _pytree as tree
from contrastive_meta._linear.base import (
    HessianProduct,
    InverseHessian,
    LinearSolution,
    Real,
    curves_down,
    default_tolerance,
    make_system,
    map_products,
    require_positive,
)
from contrastive_meta._problem import Params
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import Status, flag, worst

_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@strategy
class Nystrom(InverseHessian):
    """u = (U L U' + damping I)^-1 v, with U L U' a Nystrom approximation of H from `rank` random products.

    The products do not depend on each other, so they run as one batch, and no iteration can diverge. It is accurate
    where the eigenvalues of H beyond the first `rank` are small against `damping`: a left-out eigenvalue h leaves
    h / damping of v's part along it as residual, a kept one damping / (h + damping). The status is `APPROXIMATE`
    unless the residual says otherwise, and `NUDGED_NOT_CONVERGED` where u is worse than zero (residual of 1 or
    more): raise `rank` or `damping`. Eigenvalues that the sketch shows to be negative are left out; they, and a u with
    u'H u < 0, are reported as `INDEFINITE_CURVATURE`. Memory is O(n rank).

    Args:
      rank: number of random directions, static; at most n of them are used, and n give H itself.
      damping: stands for all the curvature that is left out, in units of H, positive.
      seed: of the random directions: an integer or a `jax.random.key`. The same seed gives the same directions.
      batch_size: how many products run at once; None runs all.

    Raises:
      ValueError: `rank` or `batch_size` is not positive, or `damping` is known and not positive.

    Reference:
      Hataya & Yamada (2023), AISTATS, for meta-gradients (they sample columns; here directions are Gaussian, which
      does not depend on the basis); Frangella, Tropp & Udell (2023), algorithm 2.1, for the stable form.

    Example:
      >>> import contrastive_meta as cm
      >>> import jax.numpy as jnp
      >>> curvature = jnp.array([4.0, 2.0, 0.0, 0.0])
      >>> solved = cm.Nystrom(rank=2, damping=1.0).solve(lambda x: curvature * x, jnp.array([5.0, 3.0, 0.0, 7.0]))
      >>> [round(float(x), 6) for x in solved.solution[:2]], int(solved.num_hvps)
      ([1.0, 1.0], 3)
    """

    rank: int = static()
    damping: Real
    seed: int | jax.Array = 0
    batch_size: int | None = static(default=None)

    def solve(self, hvp: HessianProduct, vector: Params) -> LinearSolution:
        """Sketch and solve as `InverseHessian.solve` says."""
        require_positive(self.rank, "rank", "It is the number of products with random directions.")
        require_positive(self.damping, "damping", "It stands for the curvature that the sketch leaves out.")
        system = make_system(hvp, vector)
        flat, unravel = ravel_pytree(system.vector)
        if flat.size == 0:
            return system.finish(system.vector, system.norm, 0, flag(False, Status.CONVERGED))
        rank = min(self.rank, flat.size)
        directions = jnp.linalg.qr(jax.random.normal(self._key(), (flat.size, rank), flat.dtype))[0]
        products = map_products(system, directions.T, unravel, self.batch_size).T
        sketch = _approximate(directions, products)

        damping = jnp.asarray(self.damping, flat.dtype)
        inside = _matmul(sketch.basis.T, flat)
        solution_flat = _matmul(sketch.basis, inside / (sketch.eigenvalues + damping))
        if rank < flat.size:
            # Projected twice: what rounding leaves of the kept directions would be divided by a small damping.
            outside = flat - _matmul(sketch.basis, inside)
            outside -= _matmul(sketch.basis, _matmul(sketch.basis.T, outside))
            solution_flat += outside / damping
        solution = unravel(solution_flat)
        product = system.product(solution)
        residual = system.relative_norm(tree.subtract(system.vector, product))
        # The sketch may miss a negative eigenvalue that the solution, large along left-out directions, runs into.
        largest = jnp.max(sketch.eigenvalues) + damping
        indefinite = sketch.indefinite | curves_down(solution, product, 1 / largest, system.dtype)
        status = worst(
            flag(residual > default_tolerance(system.dtype), Status.APPROXIMATE),
            flag(residual >= 1, Status.NUDGED_NOT_CONVERGED),
            flag(indefinite, Status.INDEFINITE_CURVATURE),
        )
        return system.finish(solution, residual, rank + 1, status)

    def _key(self) -> jax.Array:
        seed = jnp.asarray(self.seed)
        return seed if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key) else jax.random.key(seed)


class _Sketch(NamedTuple):
    basis: jax.Array  # orthonormal columns, (n, rank)
    eigenvalues: jax.Array  # not negative, (rank,)
    indefinite: jax.Array


def _approximate(directions: jax.Array, products: jax.Array) -> _Sketch:
    """The Nystrom approximation Y (Q'Y)^+ Y' of H, from Y = H Q with orthonormal Q, by its eigenvalues.

    H + shift I is approximated in place of H, shift being the rounding of Y, and the shift taken off the eigenvalues:
    the core Q'Y is then positive definite in floating point wherever H is positive semidefinite. Where the reference
    takes a Cholesky factor of the core, its eigenvalues are taken here: those that stay negative prove that H has a
    negative eigenvalue at least as low (Cauchy's interlacing), and are left out instead of ending in NaN.
    """
    size, eps = products.shape[0], float(jnp.finfo(products.dtype).eps)
    shift = size**0.5 * eps * jnp.linalg.norm(products)
    shifted = products + shift * directions
    core = _matmul(directions.T, shifted)
    values, vectors = jnp.linalg.eigh(0.5 * (core + core.T))
    present = values > 0.5 * shift
    inverse_root = jnp.where(present, jax.lax.rsqrt(jnp.where(present, values, 1.0)), 0.0)
    root = _matmul(shifted, vectors * inverse_root[None])
    basis, singular, _ = jnp.linalg.svd(root, full_matrices=False)
    eigenvalues = jnp.maximum(jnp.square(singular) - shift, 0.0)
    return _Sketch(basis, eigenvalues, values[0] < 0)
