"""Conjugate gradients whose products are differences of two gradients: the linear algebra of the fast learner."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like
from contrastive_meta._problem import Params

# A first direction is worth trying if its cosine with the right-hand side is above this.
_USEFUL = 1e-2
# Curvature below this fraction of what differences resolve counts as none.
FLAT = 0.1
# Of the least curvature along its directions, the least eigenvalue is about this part; measured on tanh networks.
LEAST = 0.1


class Difference(NamedTuple):
    """A Hessian known by differences of the gradient.

    Attributes:
      inner_grad: the gradient, `params -> params`.
      base: where the Hessian is taken.
      base_grad: the gradient there, exactly: its error would be divided by the step.
      distance: length of the step.
      noise: rounding noise of the gradient.
      dtype: of scalars.
      both: whether to take differences on both sides of the base, for two gradients instead of one.
    """

    inner_grad: Callable[[Params], Params]
    base: Params
    base_grad: Params
    distance: jax.Array
    noise: jax.Array
    dtype: Any
    both: jax.Array | bool = False

    def product(self, direction: Params, squared: jax.Array, number: jax.Array) -> Params:
        """H times a direction of the given squared length, the `number`-th of a row.

        On one side, forwards and backwards in turn: neighbouring directions are alike, and what the third derivative
        adds to one product it takes from the next.
        """
        step = jnp.where(number % 2 == 0, self.distance, -self.distance) / jnp.sqrt(squared)

        # A loop, lest the gradient is compiled twice.
        def add_side(side: jax.Array, total: Params) -> Params:
            signed = jnp.where(side == 0, step, -step)
            there = self.inner_grad(tree.add_scaled(self.base, signed, direction))
            return cast_like(tree.add_scaled(total, 1 / signed, tree.subtract(there, self.base_grad)), total)

        total = jax.lax.fori_loop(0, 1 + self.both, add_side, tree.zeros_like(direction))
        return tree.scale(jnp.where(self.both, 0.5, 1.0), total)

    @property
    def resolution(self) -> jax.Array:
        """Curvature below it is not told from rounding."""
        return self.noise / self.distance


class System(NamedTuple):
    """Conjugate gradients for H x = b under way, b of length 1; what Steihaug (1983) needs of x and p is recursive."""

    x: Params
    remainder: Params
    direction: Params  # p
    squared: jax.Array  # ||remainder||^2
    slope: jax.Array  # <remainder, p>
    pp: jax.Array
    xp: jax.Array
    xx: jax.Array
    fresh: jax.Array  # whether p is not the remainder's own, so that the next direction starts anew
    num_steps: jax.Array
    indefinite: jax.Array
    flat: jax.Array  # whether it ended on a direction whose curvature is not told from rounding
    least: jax.Array  # least curvature along a direction, so far
    active: jax.Array


class Limits(NamedTuple):
    """When conjugate gradients end, in units of the right-hand side."""

    remainder: jax.Array  # norm of the remainder
    step: jax.Array  # length of what is left, were it all along the least curvature there is
    least: jax.Array  # least curvature met before
    radius: jax.Array  # length of x


def solve(
    difference: Difference, rhs: Params, guess: Params, active: jax.Array, limits: Limits, budget: jax.Array
) -> System:
    """Solve H x = b for a right-hand side of length 1 (or 0).

    Args:
      difference: H.
      rhs: b.
      guess: a first direction, of any length; zeros for none.
      active: whether to solve at all.
      limits: when to end.
      budget: most steps.

    Returns:
      The system at its end.
    """
    return go_on(difference, begin(difference.dtype, rhs, guess, active, limits), limits, budget)


def begin(dtype: Any, rhs: Params, guess: Params, active: jax.Array, limits: Limits) -> System:
    """A system as it sets out; arguments as of `solve`."""
    length = tree.norm(guess)
    unit = tree.scale(1 / tree.or_one(length), guess)
    along = tree.vdot(rhs, unit)
    warm = (length > 0) & jnp.isfinite(length) & (jnp.abs(along) > _USEFUL)
    one, zero, false = jnp.ones((), dtype), jnp.zeros((), dtype), jnp.asarray(False)
    return System(
        x=tree.zeros_like(rhs),
        remainder=rhs,
        direction=tree.where(warm, unit, rhs),
        squared=one,
        slope=jnp.where(warm, along.astype(dtype), one),
        pp=one,
        xp=zero,
        xx=zero,
        fresh=warm,
        num_steps=jnp.int32(0),
        indefinite=false,
        flat=false,
        least=limits.least,
        active=active,
    )


def go_on(difference: Difference, system: System, limits: Limits, budget: jax.Array) -> System:
    """The system at its end; arguments as of `solve`."""
    solved: System = jax.lax.while_loop(lambda s: s.active, lambda s: _iterate(difference, budget, limits, s), system)
    return solved


def _iterate(difference: Difference, budget: jax.Array, limits: Limits, s: System) -> System:
    """One step of conjugate gradients."""
    product = difference.product(s.direction, s.pp, s.num_steps)
    along, resolved = tree.vdot(s.direction, product).astype(difference.dtype), difference.resolution * s.pp
    upward = along > FLAT * resolved
    alpha = jnp.where(upward, s.slope / jnp.where(upward, along, 1), 0)
    # Not beyond the radius.
    longest = (jnp.sqrt(s.xp**2 + s.pp * jnp.maximum(limits.radius**2 - s.xx, 0)) - s.xp) / s.pp
    inside = ~(jnp.abs(alpha) > longest)
    alpha = jnp.where(inside, alpha, longest)
    remainder = tree.add_scaled(s.remainder, -alpha, product)
    squared = tree.vdot(remainder, remainder).astype(difference.dtype)
    turn = jnp.where(s.fresh, 0, squared / s.squared)
    xx = s.xx + 2 * alpha * s.xp + alpha**2 * s.pp
    enough = jnp.sqrt(squared) <= jnp.maximum(limits.remainder, difference.resolution * jnp.sqrt(xx))
    # Curvature that is not told from rounding is taken for the least that would be.
    least = jnp.maximum(jnp.where(upward, jnp.minimum(s.least, along / s.pp), s.least), difference.resolution)
    enough |= jnp.sqrt(squared) <= limits.step * LEAST * least
    num_steps = s.num_steps + 1
    new = System(
        x=tree.add_scaled(s.x, alpha, s.direction),
        remainder=remainder,
        direction=tree.add_scaled(remainder, turn, s.direction),
        squared=squared,
        slope=squared,
        pp=squared + turn**2 * s.pp,
        xp=turn * (s.xp + alpha * s.pp),
        xx=xx,
        fresh=jnp.asarray(False),
        num_steps=num_steps,
        indefinite=(along < -resolved) & ~s.fresh,
        flat=~upward & ~s.fresh,
        least=least,
        # A first direction that leads nowhere is replaced by the remainder itself.
        active=(upward | s.fresh) & inside & ~enough & (squared > 0) & (num_steps < budget),
    )
    return cast_like(new, s)
