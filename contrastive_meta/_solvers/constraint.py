"""Constraints as SciPy takes them, which JAX evaluates and differentiates, and those of them that hold a minimum."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax.flatten_util import ravel_pytree

from contrastive_meta import _pytree as tree
from contrastive_meta._arity import number_of_arguments, require_function
from contrastive_meta._control import fori_loop
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import static, strategy

# A constraint may be active within this power of epsilon, times the length of `params`, of its boundary: minimisers
# with line searches of values stop at about eps^(1/2).
NEAR = 1 / 3
# How often constraints that pull the wrong way are left out. Each time some are; more than a few at once are rare.
_ROUNDS = 4


@strategy
class Constraint:
    """lower <= g(w, meta_params) <= upper, by entries.

    Args:
      function: `(params, meta_params) -> array`, or None for a linear one.
      matrix: of a linear one, over all entries of `params` in one vector.
      lower: finite bounds, and zeros where there are none.
      upper: likewise.
      kinds: for each entry of the bounds, whether it has a lower one and an upper one, and whether they are equal. One
        entry serves for all of g.
    """

    function: Callable[[Params, MetaParams], Any] | None = static()
    matrix: Any
    lower: Any
    upper: Any
    kinds: tuple[tuple[bool, bool, bool], ...] = static()

    def rows(self, params: Params, meta_params: MetaParams) -> tuple[jax.Array, np.ndarray[Any, Any]]:
        """Numbers that are zero where g is at its bound and positive inside; and which of them must be zero.

        Args:
          params: where.
          meta_params: of the problem.

        Raises:
          TypeError: g is no floating array.
          ValueError: it has another number of entries than its bounds.
        """
        vector = ravel_pytree(params)[0]
        if self.function is None:
            values = jnp.asarray(self.matrix, vector.dtype) @ vector
        else:
            values = jnp.ravel(jnp.asarray(self.function(params, meta_params)))
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            raise TypeError(
                f"A constraint's function must return a floating array; got {values.dtype}. Return the number that the "
                "bounds are for, not whether they hold."
            )
        if len(self.kinds) not in (1, values.size):
            raise ValueError(
                f"A constraint has bounds for {len(self.kinds)} entries, and its function returned {values.size}. "
                "Give one bound, or one for each entry."
            )
        has_lower, has_upper, is_equal = np.broadcast_to(np.array(self.kinds, bool), (values.size, 3)).T
        low, high = (jnp.broadcast_to(jnp.asarray(x, values.dtype), values.shape) for x in (self.lower, self.upper))
        below, above = np.flatnonzero(has_lower), np.flatnonzero(has_upper & ~is_equal)
        rows = jnp.concatenate([(values - low)[below], (high - values)[above]])
        return rows, np.concatenate([is_equal[below], np.zeros(above.size, bool)])


@functools.singledispatch
def constraint_of(given: Any) -> Constraint:
    """What a user wrote, as a `Constraint`.

    Args:
      given: SciPy's `LinearConstraint` or `NonlinearConstraint`, or its dictionary of "type" and "fun".
    """
    raise TypeError(
        "A constraint must be a `scipy.optimize.LinearConstraint`, a `NonlinearConstraint` or a dictionary "
        f"`{{'type': 'ineq', 'fun': function}}`; got a {type(given).__name__}."
    )


@constraint_of.register
def _(given: Constraint) -> Constraint:
    return given


@constraint_of.register
def _(given: scipy.optimize.LinearConstraint) -> Constraint:
    return _bounded(None, np.atleast_2d(np.asarray(given.A, float)), given.lb, given.ub)


@constraint_of.register
def _(given: scipy.optimize.NonlinearConstraint) -> Constraint:
    return _bounded(_of_both(given.fun), None, given.lb, given.ub)


@constraint_of.register
def _(given: dict) -> Constraint:  # type: ignore[type-arg]
    kinds = {"eq": 0.0, "ineq": np.inf}
    if given.get("type") not in kinds or "fun" not in given:
        raise ValueError(f"A constraint's dictionary needs 'type', 'eq' or 'ineq', and 'fun'; got {given!r}.")
    if given.get("args"):
        raise ValueError("A constraint's 'args' do not reach its function: write them into the function.")
    return _bounded(_of_both(given["fun"]), None, 0.0, kinds[given["type"]])


def _of_both(function: Callable[..., Any]) -> Callable[[Params, MetaParams], Any]:
    """A function of params, and of the meta-parameters if it takes them."""
    if number_of_arguments(function) >= 2:
        return function
    require_function(function, "fun", "params", "array")
    return _OfParams(function)


@dataclasses.dataclass(frozen=True)
class _OfParams:
    """A function of params alone: equal to another of the same function, so that nothing is compiled again."""

    function: Callable[[Params], Any]

    def __call__(self, params: Params, meta_params: MetaParams) -> Any:
        return self.function(params)


def _bounded(function: Any, matrix: Any, lower: Any, upper: Any) -> Constraint:
    low, high = np.broadcast_arrays(*np.atleast_1d(np.asarray(lower, float), np.asarray(upper, float)))
    if np.any(np.isnan(low) | np.isnan(high) | (low > high)):
        raise ValueError(f"A constraint's lower bounds must not be above its upper ones; got {lower} and {upper}.")
    kinds = zip(np.isfinite(low).tolist(), np.isfinite(high).tolist(), (low == high).tolist(), strict=True)
    low, high = (np.where(np.isfinite(x), x, 0.0) for x in (low, high))
    return Constraint(function, matrix, low, high, tuple(kinds))


class BoundConstraints(NamedTuple):
    """Constraints at their meta-parameters.

    Attributes:
      rows: `params -> vector`, zero at a boundary and positive inside; infinite where there is none.
      equal: which entries must be zero.
    """

    rows: Callable[[Params], jax.Array]
    equal: Callable[[Params], np.ndarray[Any, Any]]

    @classmethod
    def of(cls, constraints: tuple[Constraint, ...], box: Any, meta_params: MetaParams) -> "BoundConstraints":
        """Of general constraints, and of bounds of entries.

        Args:
          constraints: the general ones.
          box: a `Box`, or None.
          meta_params: of the problem.
        """

        def rows(params: Params) -> jax.Array:
            vector = ravel_pytree(params)[0]
            values = [x.rows(params, meta_params)[0].astype(vector.dtype) for x in constraints]
            if box is not None:
                low, high = (ravel_pytree(x)[0] for x in box.bounds(params, meta_params))
                values += [vector - low, high - vector]
            return jnp.concatenate([*values, jnp.zeros((0,), vector.dtype)])

        def equal(params: Params) -> np.ndarray[Any, Any]:
            found: list[np.ndarray[Any, Any]] = []
            jax.eval_shape(lambda at: found.extend(x.rows(at, meta_params)[1] for x in constraints), params)
            size = 0 if box is None else 2 * sum(x.size for x in jax.tree.leaves(params))
            return np.concatenate([*found, np.zeros(size, bool)]).astype(bool)

        return cls(rows, equal)

    def evaluated(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The rows, and their Jacobian over all entries of `params` in one vector."""
        vector, unravel = ravel_pytree(params)
        rows: jax.Array = self.rows(params)
        jacobian: jax.Array = jax.jacrev(lambda at: self.rows(unravel(at)))(vector)
        return rows, jacobian


class ActiveSet(NamedTuple):
    """The constraints that hold a minimum, next to a point.

    Attributes:
      active: which rows are at their boundary and hold the gradient back.
      jacobian: of the active rows; zero elsewhere.
      inverse: its pseudoinverse.
      free: the gradient, what the constraints hold back taken away.
      missed: by how far each constraint is missed, to first order.
    """

    active: jax.Array
    jacobian: jax.Array
    inverse: jax.Array
    free: jax.Array
    missed: jax.Array

    @classmethod
    def at(cls, bound: BoundConstraints, params: Params, gradient: Params) -> "ActiveSet":
        """Find it: of the rows that are near their boundary, those whose multipliers have the right sign.

        Reference:
          Nocedal & Wright (2006), Numerical optimization, theorem 12.1 (Karush, Kuhn & Tucker).
        """
        vector, slope = ravel_pytree(params)[0], ravel_pytree(gradient)[0]
        equal = jnp.asarray(bound.equal(params))
        rows, jacobian = bound.evaluated(params)
        reach = jnp.finfo(vector.dtype).eps ** NEAR * jnp.maximum(jnp.linalg.norm(vector), 1)
        near = equal | (rows <= reach * jnp.linalg.norm(jacobian, axis=1))

        def leave_out(_: Any, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            active, inverse = found
            active &= equal | (inverse.T @ slope >= 0)
            return active, _pseudoinverse(jacobian, active)

        # Without multipliers nothing is left out yet.
        active, inverse = fori_loop(0, _ROUNDS, leave_out, (near, jnp.zeros_like(jacobian.T)))
        kept = jnp.where(active[:, None], jacobian, 0)
        # Rows that are active, and others that are not met.
        missed = jnp.where(active | (rows < 0), rows, 0) / tree.or_one(jnp.linalg.norm(jacobian, axis=1))
        return cls(active, kept, inverse, slope - kept.T @ (inverse.T @ slope), missed)


def residual_of(bound: BoundConstraints, params: Params, gradient: Params, step: jax.Array) -> jax.Array:
    """Zero where the gradient is held back by constraints that are met; the gradient norm where there are none.

    Args:
      bound: the constraints.
      params: where.
      gradient: of the loss there.
      step: an inverse curvature, the unit of distances over gradients.
    """
    found = ActiveSet.at(bound, params, gradient)
    return tree.norm((found.free, found.missed / step.astype(found.free.dtype)))


def _pseudoinverse(jacobian: jax.Array, active: jax.Array) -> jax.Array:
    if not jacobian.shape[0]:
        return jacobian.T
    return jnp.linalg.pinv(jnp.where(active[:, None], jacobian, 0))
