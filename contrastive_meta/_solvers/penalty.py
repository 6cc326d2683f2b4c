"""Penalties that learners treat by a proximal step: kinks, bounds and constraints that no gradient shows."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import static, strategy


class Penalty(abc.ABC):
    """A convex term h of the inner objective that is not smooth: what `inner_loss` leaves out.

    Subclasses are final strategies. `contrastive_meta.prox` has ready-made ones, and `prox.of` makes one of functions.

    Reference:
      Parikh & Boyd (2014), Proximal algorithms, section 1.1.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.prox.l1(0.1), cm.Penalty)
      True
    """

    @abc.abstractmethod
    def prox(self, params: Params, meta_params: MetaParams, step: Any) -> Params:
        """The proximal step, argmin_w h(w, meta_params) + ||w - params||^2 / (2 step).

        Args:
          params: from where.
          meta_params: of the problem.
          step: length of the step; a projection does not depend on it.
        """

    def value(self, params: Params, meta_params: MetaParams) -> Any:
        """The penalty itself, a scalar that can be differentiated in `meta_params`; None where it is not known.

        0 on the set of a projection.

        Args:
          params: where.
          meta_params: of the problem.
        """
        return None

    def unfelt(self, params: Params, meta_params: MetaParams) -> Any:
        """A number that changes along a way on which the proximal step ends at the same point; None for no such number.

        Needed where such a way is not one entry alone, as at the surface of a ball or a simplex: without it the way is
        a direction of no curvature, which estimators cannot tell from one of little.

        Args:
          params: from where the step is taken.
          meta_params: of the problem.
        """
        return None


class BoundPenalty(NamedTuple):
    """A penalty at its meta-parameters.

    Attributes:
      prox: `(params, step) -> params`.
      value: `params -> scalar`, or None where it is not known.
      unfelt: `params -> scalar`, see `Penalty.unfelt`; or None.
    """

    prox: Callable[[Params, Any], Params]
    value: Callable[[Params], Any]
    unfelt: Callable[[Params], Any]

    @classmethod
    def of(cls, penalty: Penalty | None, meta_params: MetaParams) -> "BoundPenalty | None":
        """The penalty at these meta-parameters; None for none."""
        if penalty is None:
            return None
        return cls(
            # Projections of optax promote dtypes, and so may a user's step.
            lambda params, step: cast_like(penalty.prox(params, meta_params, step), params),
            lambda params: penalty.value(params, meta_params),
            lambda params: penalty.unfelt(params, meta_params),
        )


@strategy
class Quantity:
    """A number, an array or a pytree of them; or a function from the meta-parameters to one.

    Args:
      given: the number.
      function: the function, in the place of a number.
    """

    given: Any = None
    function: Callable[[MetaParams], Any] | None = static(default=None)

    @classmethod
    def of(cls, value: Any) -> "Quantity":
        """Of what a user typed."""
        return cls(None, value) if callable(value) else cls(value)

    def at(self, meta_params: MetaParams) -> Any:
        """The number at these meta-parameters."""
        return self.given if self.function is None else self.function(meta_params)

    def like(self, meta_params: MetaParams, params: Params) -> Params:
        """The number for each leaf of `params`, in its dtype: one for all, or a pytree like `params`."""
        value = self.at(meta_params)
        if jax.tree.structure(value) == jax.tree.structure(0):
            return jax.tree.map(lambda x: jnp.asarray(value, jnp.real(x).dtype), params)
        return jax.tree.map(lambda v, x: jnp.asarray(v, jnp.real(x).dtype), value, params)


@strategy
class Box(Penalty):
    """The constraint lower <= w <= upper; see `prox.box`."""

    lower: Quantity
    upper: Quantity

    def bounds(self, params: Params, meta_params: MetaParams) -> tuple[Params, Params]:
        """Both bounds of every entry."""

        def full(value: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.broadcast_to(value, x.shape)

        lower, upper = self.lower.like(meta_params, params), self.upper.like(meta_params, params)
        return jax.tree.map(full, lower, params), jax.tree.map(full, upper, params)

    def prox(self, params: Params, meta_params: MetaParams, step: Any) -> Params:
        """The nearest point of the box."""
        bounds = self.bounds(params, meta_params)
        return jax.tree.map(lambda x, low, high: jnp.minimum(jnp.maximum(x, low), high), params, *bounds)

    def value(self, params: Params, meta_params: MetaParams) -> Any:
        """0, as of any set."""
        return jnp.zeros((), tree.float_dtype(params))


def secant_step(params: Params, gradient: Params, other: Params, other_gradient: Params) -> jax.Array:
    """An inverse curvature between two points, by the change of the gradient; 1 where that is not known."""
    way = tree.norm(tree.subtract(params, other))
    change = tree.norm(tree.subtract(gradient, other_gradient))
    known = (way > 0) & (change > 0) & jnp.isfinite(change)
    return jnp.where(known, way / tree.or_one(change), 1.0)


def fixed_point_residual(
    walls: BoundPenalty, params: Params, gradient: Params, other: Params, other_gradient: Params
) -> jax.Array:
    """Norm of (w - prox(w - s gradient)) / s at one point, s being an inverse curvature between it and another.

    It is the gradient norm where there are no walls, and of the order of the distance to the fixed point times the
    curvature otherwise (Parikh & Boyd, 2014, section 4.2).
    """
    step = secant_step(params, gradient, other, other_gradient)
    moved = walls.prox(tree.add_scaled(params, -step, gradient), step)
    return tree.norm(tree.subtract(params, moved)) / step
