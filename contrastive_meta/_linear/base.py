"""What every inverse Hessian offers: from products and a right-hand side to a solution that says how good it is."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from contrastive_meta import _pytree as tree
from contrastive_meta._control import varying
from contrastive_meta._problem import Params, as_float_arrays, check_same_structure
from contrastive_meta._result import Status, flag, worst

Real = float | jax.Array
HessianProduct = Callable[[Params], Params]


class LinearSolution(NamedTuple):
    """A solution of H u = v, and how accurate it is.

    Attributes:
      solution: u, a pytree with the structure, shapes and dtypes of v.
      residual: ||v - H u|| / ||v|| with the *undamped* H, so damping shows in it. 0 for v = 0, infinite where it
        cannot be computed, never NaN.
      num_hvps: products with H that this solve needed, int32. Under `vmap` each lane counts its own, while the
        device runs as many as the slowest lane needs.
      status: value of a `Status`, int32. `CONVERGED`: the residual is within the tolerance. `APPROXIMATE`: it is
        not, and by construction (damping, low rank, no solve at all). `NUDGED_NOT_CONVERGED`,
        `INDEFINITE_CURVATURE` and `NOT_FINITE` as `Status` describes them.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> float(cm.ConjugateGradient().solve(lambda x: 2 * x, jnp.ones(3)).residual)
      0.0
    """

    solution: Params
    residual: jax.Array
    num_hvps: jax.Array
    status: jax.Array


class InverseHessian(abc.ABC):
    """A way to apply the inverse of a symmetric matrix that is known only by its products.

    Subclasses are final strategies. `solve` works under jit and vmap, on any pytree of real floating arrays, and
    gives the same relative result whatever the scale of `vector`, which is brought to order one before any product.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.DenseInverse(), cm.InverseHessian)
      True
    """

    @abc.abstractmethod
    def solve(self, hvp: HessianProduct, vector: Params) -> LinearSolution:
        """Solve H u = vector.

        Args:
          hvp: `x -> H x` for pytrees like `vector`, linear and symmetric. It may close over traced values.
          vector: the right-hand side v, a pytree of real floating arrays; empty branches and scalars included.

        Raises:
          TypeError: `vector` has a leaf that is not real floating.
          ValueError: `hvp` returns something unlike its argument, or a setting is known to be out of range.
        """


@dataclasses.dataclass(frozen=True)
class System:
    """H u = v with v brought to order one by a power of two, which rounds nothing.

    Attributes:
      product: `x -> H x`, checked to return what it was given.
      vector: v / unit, its largest entry between 1 and 2.
      norm: ||v / unit||; 1 where v is zero or not finite, to divide by.
      unit: the power of two.
      solvable: whether v is finite and not zero.
      finite: whether v is finite.
      dtype: the dtype in which scalars are computed.
    """

    product: HessianProduct
    vector: Params
    norm: jax.Array
    unit: jax.Array
    solvable: jax.Array
    finite: jax.Array
    dtype: Any

    def scaled(self, values: Params) -> Params:
        """`values` brought to the system's units."""
        return _rescale(values, jnp.divide, self.unit)

    def in_units(self, values: Params) -> Params:
        """`values` of the system in the units of v."""
        return _rescale(values, jnp.multiply, self.unit)

    def relative_norm(self, residual: Params) -> jax.Array:
        """||residual|| / ||v / unit||, infinite where it is NaN."""
        relative = (tree.norm(residual) / self.norm).astype(self.dtype)
        return jnp.where(jnp.isnan(relative), jnp.inf, relative)

    def finish(self, solution: Params, residual: jax.Array, num_hvps: Any, status: jax.Array) -> LinearSolution:
        """The solution in the units of v: zero for a zero v, NaN (and a status) for a v that is not finite."""
        solution = tree.where(self.solvable, self.in_units(solution), tree.zeros_like(solution))
        solution = jax.tree.map(lambda x: jnp.where(self.finite, x, jnp.nan).astype(x.dtype), solution)
        residual = jnp.where(self.solvable, residual, jnp.where(self.finite, 0.0, jnp.inf)).astype(self.dtype)
        sound = tree.all_finite(solution) & jnp.isfinite(residual)
        status = worst(jnp.where(self.solvable, status, Status.CONVERGED), flag(~sound, Status.NOT_FINITE))
        return LinearSolution(solution, residual, jnp.asarray(num_hvps, jnp.int32), status)


def make_system(hvp: HessianProduct, vector: Params) -> System:
    """Check `vector`, scale it to order one and have every product checked."""
    vector = as_float_arrays(vector, "vector", "`vector` must be")

    def product(x: Params) -> Params:
        returned = hvp(x)
        check_same_structure(returned, x, "`hvp`", "It must return H x with the structure of its argument x.")
        return jax.tree.map(lambda h, like: jnp.asarray(h, like.dtype), returned, x)

    dtype = tree.float_dtype(vector)
    largest = tree.max_abs(vector).astype(dtype)
    finite = tree.all_finite(vector)
    solvable = finite & (largest > 0)
    unit = jnp.where(solvable, _power_of_two(largest), 1.0).astype(dtype)
    scaled = _rescale(vector, jnp.divide, unit)
    # Of order one, its squares neither overflow nor vanish.
    norm = jnp.where(solvable, jnp.sqrt(tree.vdot(scaled, scaled)), 1.0).astype(dtype)
    return System(product, scaled, norm, unit, solvable, finite, dtype)


def default_tolerance(dtype: Any) -> float:
    """1e-10, or ten roundings of a coarser dtype: 1.2e-6 in float32."""
    return max(1e-10, 10 * float(jnp.finfo(dtype).eps))


def attainable_tolerance(tol: Real | None, system: System, curvature: jax.Array, solution: Params) -> jax.Array:
    """`tol`; where it is None, the default one raised to what rounding permits.

    Rounding in the products leaves a residual of about eps ||H|| ||u|| / ||v||, which no solver gets below and
    which for condition numbers above 100 exceeds the default tolerance in float32. Beyond sqrt(eps) it is no
    longer rounding but failure.

    Args:
      tol: relative tolerance or None.
      system: the system.
      curvature: an estimate of ||H||, scalar.
      solution: u in the system's units.
    """
    if tol is not None:
        return jnp.asarray(tol, system.dtype)
    eps = float(jnp.finfo(system.dtype).eps)
    floor = 4 * eps * curvature * tree.norm(solution) / system.norm
    return jnp.clip(floor, default_tolerance(system.dtype), max(eps**0.5, default_tolerance(system.dtype)))


def curves_down(x: Params, product: Params, step_size: Real, dtype: Any) -> jax.Array:
    """Whether x'Hx is negative beyond rounding, for a method that supposes ||H|| to be about 1 / step_size."""
    eps = float(jnp.finfo(dtype).eps)
    return jnp.asarray(step_size, dtype) * tree.vdot(x, product) < -100 * eps * tree.vdot(x, x)


def map_products(
    system: System, rows: jax.Array, unravel: Callable[[jax.Array], Params], batch: int | None
) -> jax.Array:
    """H times each of `rows`, flat: all at once, or `batch` rows at a time."""
    rows = varying(rows)

    def flat_product(row: jax.Array) -> jax.Array:
        return ravel_pytree(system.product(unravel(row)))[0]

    if batch is None:
        return jax.vmap(flat_product)(rows)
    require_positive(batch, "batch_size", "It is how many products run at once; None runs all.")
    return jnp.asarray(jax.lax.map(flat_product, rows, batch_size=batch))


def require_positive(value: Any, name: str, remedy: str) -> None:
    """Raise where `value` is known and not positive; a traced one shows in the residual and the status instead.

    Raises:
      ValueError: naming the setting and the remedy.
    """
    if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"`{name}` must be positive; got {value}. {remedy}")


def _power_of_two(x: jax.Array) -> jax.Array:
    """The largest power of two up to `x`: its bits without those of the fraction. The least normal one below that."""
    kind = jnp.finfo(x.dtype)
    unsigned = jnp.dtype(f"uint{kind.bits}")
    exponent = np.array((2**kind.bits - 1) - (2**kind.nmant - 1), unsigned)
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, unsigned) & exponent, x.dtype)
    return jnp.maximum(power, kind.tiny)


def _rescale(vector: Params, operation: Callable[[jax.Array, jax.Array], jax.Array], unit: jax.Array) -> Params:
    # In the promoted dtype: a unit that float64 leaves need may underflow in a float32 leaf beside them.
    def rescaled(x: jax.Array) -> jax.Array:
        dtype = tree.promoted(x, unit)
        return operation(x.astype(dtype), unit.astype(dtype)).astype(x.dtype)

    return jax.tree.map(rescaled, vector)
