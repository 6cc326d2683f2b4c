"""Ready-made penalties and constraints for learners that take proximal steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import static, strategy
from contrastive_meta._solvers.penalty import Box, Penalty, Quantity

Strength = Any


def of(prox: Callable[..., Params], value: Callable[..., Any] | None = None) -> Penalty:
    """A penalty from functions.

    What a learner of walls gives way to is the whole inner objective, and a meta-parameter that enters the penalty
    enters that. So the contrast needs the derivative of the penalty's value in it, at fixed `params`: a proximal step
    does not tell it. Without a value, meta-parameters may enter `inner_loss` alone, or a projection: the value of a
    projection is 0, and it is known by not depending on `step`. Anything else raises.

    Args:
      prox: `(params, meta_params, step) -> params`, see `Penalty.prox`.
      value: `(params, meta_params) -> scalar`, see `Penalty.value`.

    Returns:
      What `ProximalDescent` takes.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> capped = cm.prox.of(lambda w, limit, step: jnp.minimum(w, limit))
      >>> capped.prox(jnp.array([0.5, 2.0]), 1.0, 0.1).tolist()
      [0.5, 1.0]
    """
    return _Functions(prox, value)


def l1(strength: Strength) -> Penalty:
    """The penalty strength * sum |w|, of the lasso.

    Args:
      strength: a number; or a pytree like `params`; or a function from the meta-parameters to either.

    Reference:
      Tibshirani (1996), Regression shrinkage and selection via the lasso; Beck & Teboulle (2009), equation (1.5).

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> lasso = cm.prox.l1(jnp.exp)  # the meta-parameter is the logarithm of the strength
      >>> lasso.prox(jnp.array([3.0, -0.5]), 0.0, 1.0).tolist()
      [2.0, -0.0]
    """
    return _ElasticNet(Quantity.of(strength), Quantity(0.0))


def elastic_net(strength: Strength, decay: Strength) -> Penalty:
    """The penalty strength * sum |w| + decay / 2 * sum w^2.

    Args:
      strength: as for `l1`.
      decay: likewise.

    Reference:
      Zou & Hastie (2005), Regularization and variable selection via the elastic net.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> cm.prox.elastic_net(1.0, 1.0).prox(jnp.array([3.0, 0.5]), None, 1.0).tolist()
      [1.0, 0.0]
    """
    return _ElasticNet(Quantity.of(strength), Quantity.of(decay))


def group(strength: Strength, axis: int = -1) -> Penalty:
    """The penalty strength * sum of the lengths of groups, of the group lasso.

    Args:
      strength: a number, or a function from the meta-parameters to one.
      axis: along which entries of an array make a group, such as the weights into one unit.

    Reference:
      Yuan & Lin (2006), Model selection and estimation in regression with grouped variables.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> shrunk = cm.prox.group(2.5).prox(jnp.array([[3.0, 4.0], [0.3, 0.4]]), None, 1.0)
      >>> shrunk.tolist()
      [[1.5, 2.0], [0.0, 0.0]]
    """
    return _Group(Quantity.of(strength), axis)


def non_negative() -> Penalty:
    """The constraint w >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> cm.prox.non_negative().prox(jnp.array([0.5, -2.0]), None, 1.0).tolist()
      [0.5, 0.0]
    """
    return Box(Quantity(0.0), Quantity(jnp.inf))


def box(lower: Strength, upper: Strength) -> Penalty:
    """The constraint lower <= w <= upper.

    Args:
      lower: as the strength of `l1`.
      upper: likewise.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> cm.prox.box(-1.0, 1.0).prox(jnp.array([0.5, -2.0]), None, 1.0).tolist()
      [0.5, -1.0]
    """
    return Box(Quantity.of(lower), Quantity.of(upper))


def simplex(total: Strength = 1.0) -> Penalty:
    """The constraint w >= 0 and sum w = total, over all leaves of `params` together.

    Args:
      total: a positive number, or a function from the meta-parameters to one.

    Reference:
      Duchi, Shalev-Shwartz, Singer & Chandra (2008), Efficient projections onto the l1-ball, figure 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> cm.prox.simplex().prox(jnp.array([1.5, 1.0, -2.0]), None, 1.0).tolist()
      [0.75, 0.25, 0.0]
    """
    return _Simplex(Quantity.of(total))


def l2_ball(radius: Strength) -> Penalty:
    """The constraint ||w|| <= radius, over all leaves of `params` together.

    Args:
      radius: a positive number, or a function from the meta-parameters to one.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> [round(float(w), 3) for w in cm.prox.l2_ball(1.0).prox(jnp.array([3.0, 4.0]), None, 1.0)]
      [0.6, 0.8]
    """
    return _L2Ball(Quantity.of(radius))


@strategy
class _Functions(Penalty):
    of_prox: Callable[..., Params] = static()
    of_value: Callable[..., Any] | None = static(default=None)

    def prox(self, params: Params, meta_params: MetaParams, step: Any) -> Params:
        return self.of_prox(params, meta_params, step)

    def value(self, params: Params, meta_params: MetaParams) -> Any:
        return None if self.of_value is None else self.of_value(params, meta_params)


@strategy
class _ElasticNet(Penalty):
    strength: Quantity
    decay: Quantity

    def prox(self, params: Params, meta_params: MetaParams, step: Any) -> Params:
        def shrunk(x: jax.Array, strength: jax.Array, decay: jax.Array) -> jax.Array:
            length = jnp.asarray(step, x.dtype)
            return jnp.sign(x) * jax.nn.relu(jnp.abs(x) - length * strength) / (1 + length * decay)

        settings = self.strength.like(meta_params, params), self.decay.like(meta_params, params)
        return jax.tree.map(shrunk, params, *settings)

    def value(self, params: Params, meta_params: MetaParams) -> Any:
        def penalty(x: jax.Array, strength: jax.Array, decay: jax.Array) -> jax.Array:
            return jnp.sum(strength * jnp.abs(x)) + jnp.sum(decay * x**2) / 2

        settings = self.strength.like(meta_params, params), self.decay.like(meta_params, params)
        return sum(jax.tree.leaves(jax.tree.map(penalty, params, *settings)))


@strategy
class _Group(Penalty):
    strength: Quantity
    axis: int = static(default=-1)

    def prox(self, params: Params, meta_params: MetaParams, step: Any) -> Params:
        def shrunk(x: jax.Array, strength: jax.Array) -> jax.Array:
            length = _lengths(x, self.axis)
            kept = jax.nn.relu(length - jnp.asarray(step, x.dtype) * strength)
            return x * (kept / jnp.where(length > 0, length, 1))

        return jax.tree.map(shrunk, params, self.strength.like(meta_params, params))

    def value(self, params: Params, meta_params: MetaParams) -> Any:
        def penalty(x: jax.Array, strength: jax.Array) -> jax.Array:
            return jnp.sum(strength * _lengths(x, self.axis))

        return sum(jax.tree.leaves(jax.tree.map(penalty, params, self.strength.like(meta_params, params))))


@strategy
class _Simplex(Penalty):
    total: Quantity

    def prox(self, params: Params, meta_params: MetaParams, step: Any) -> Params:
        flat, unravel = ravel_pytree(params)
        kept, taken = self._taken(flat, meta_params)
        projected: Params = unravel(jnp.where(kept, flat - taken, 0))
        return projected

    def unfelt(self, params: Params, meta_params: MetaParams) -> Any:
        """The length of what the projection takes from the entries that stay."""
        kept, taken = self._taken(ravel_pytree(params)[0], meta_params)
        return taken * jnp.sqrt(jnp.sum(kept).astype(taken.dtype))

    def _taken(self, flat: jax.Array, meta_params: MetaParams) -> tuple[jax.Array, jax.Array]:
        """Which entries stay, and what is taken from each of them."""
        total = jnp.asarray(self.total.at(meta_params), flat.dtype)
        # How many of the largest entries stay, and what is taken from each of them. Not `optax.projections`, whose
        # derivative fails in float32 where float64 is switched on (optax 0.2.8).
        sorted_down = -jnp.sort(-jax.lax.stop_gradient(flat))
        number = jnp.arange(1, flat.size + 1, dtype=flat.dtype)
        stays = sorted_down * number > jnp.cumsum(sorted_down) - total
        least = jnp.min(jnp.where(stays, sorted_down, jnp.inf))
        kept = flat >= least
        return kept, (jnp.sum(jnp.where(kept, flat, 0)) - total) / jnp.sum(kept).astype(flat.dtype)

    def value(self, params: Params, meta_params: MetaParams) -> Any:
        return jnp.zeros((), tree.float_dtype(params))


@strategy
class _L2Ball(Penalty):
    radius: Quantity

    def prox(self, params: Params, meta_params: MetaParams, step: Any) -> Params:
        radius = self.radius.at(meta_params)
        squared = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        outside = squared > radius**2
        length = jnp.sqrt(jnp.where(outside, squared, 1.0))
        return jax.tree.map(lambda x: x * jnp.where(outside, radius / length, 1.0).astype(x.dtype), params)

    def unfelt(self, params: Params, meta_params: MetaParams) -> Any:
        """The distance from the centre, of points that are outside."""
        squared = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
        outside = squared > self.radius.at(meta_params) ** 2
        # Not `where` alone: the derivative of a root at 0 is infinite.
        return jnp.where(outside, jnp.sqrt(jnp.where(outside, squared, 1.0)), 0.0)

    def value(self, params: Params, meta_params: MetaParams) -> Any:
        return jnp.zeros((), tree.float_dtype(params))


def _lengths(x: jax.Array, axis: int) -> jax.Array:
    """Lengths of groups, with a derivative of 0 where a group is 0."""
    squared = jnp.sum(x**2, axis=axis, keepdims=True)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
