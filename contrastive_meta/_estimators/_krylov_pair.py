"""Conjugate gradients for two right-hand sides at once: each system is solved along the directions of both."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like
from contrastive_meta._estimators._krylov import FLAT, LEAST, Difference, Limits, System, go_on
from contrastive_meta._problem import Params

# Most steps of two systems together.
_PAIRED = 32
# Directions of which one is the other but for this part of its squared length count as one.
_DEPENDENT = 1e-3


def solve_pair(
    difference: Difference,
    systems: tuple[System, System],
    limits: tuple[Limits, Limits],
    forcing: jax.Array,
    budget: jax.Array,
    *,
    sequential: bool,
) -> tuple[System, System, jax.Array]:
    """Solve H x = b for two right-hand sides of length 1, or for those of them that are active.

    While both are, products with both directions are taken side by side, which costs less than one after the other, and
    both systems are solved in what all directions span, which takes fewer steps. When one has ended the other goes on
    alone, from its own direction. So does the first when that takes many steps: the worse the condition, the less of
    the second solution outlives a step along the first.

    Args:
      difference: H.
      systems: as they set out; the solution of the first is the step that the base point is to take.
      limits: when they end.
      forcing: what of remainders that step will leave anyway, in units of its length: together they end there.
      budget: most steps of each, shape (2,).
      sequential: take products one after another, for the sake of memory.

    Returns:
      The systems at their ends, and whether the second was left unsolved.

    Reference:
      O'Leary (1980), The block conjugate gradient algorithm and related methods.
    """
    start, ends = (jax.tree.map(lambda *xs: jnp.stack(xs), *of_both) for of_both in (systems, limits))
    pair: System = jax.lax.while_loop(
        lambda s: jnp.all(s.active) & (s.num_steps[0] < _PAIRED),
        lambda s: _iterate(difference, budget, ends, forcing, sequential, s),
        start,
    )
    pair = pair._replace(
        slope=_dots(pair.remainder, pair.direction, difference),
        pp=_dots(pair.direction, pair.direction, difference),
        xp=_dots(pair.x, pair.direction, difference),
    )
    # The one that is still active, or the first.
    number = jnp.argmax(pair.active)
    alone, end = (jax.tree.map(lambda xs: xs[number], of_both) for of_both in (pair, ends))
    too_long = jnp.all(pair.active)
    left_anyway = jnp.where(too_long, 0, forcing * jnp.sqrt(pair.xx[0]))
    end = end._replace(remainder=jnp.maximum(end.remainder, left_anyway))
    alone = go_on(difference, alone, end, budget[number])
    first, second = tree.unstack(jax.tree.map(lambda xs, x: xs.at[number].set(x), pair, alone), 2)
    return first, second, too_long


def _iterate(
    difference: Difference, budget: jax.Array, limits: Limits, forcing: jax.Array, sequential: bool, s: System
) -> System:
    """One step along both directions."""
    lengths = jnp.sqrt(_dots(s.direction, s.direction, difference))
    units = _each(1 / tree.or_one(lengths), s.direction)
    products = _products(difference, units, s.num_steps[0], sequential)
    curvatures = _gram(units, products, difference)
    span = _span(_gram(units, units, difference), curvatures, difference.resolution)
    # Outside the domain of the loss a product is not finite: that ends its own system alone.
    products = jax.vmap(tree.where)(jnp.isfinite(jnp.diagonal(curvatures)), products, tree.zeros_like(products))

    # In each system as far as its quadratic falls within the span, but not beyond the radius.
    steps = span.inverse @ _gram(units, s.remainder, difference)
    moves = _combined(steps.T, units)
    along, squared_length = _dots(s.x, moves, difference), _dots(moves, moves, difference)
    longest = jnp.sqrt(along**2 + squared_length * jnp.maximum(limits.radius**2 - s.xx, 0)) - along
    inside = ~(longest < squared_length)
    part = jnp.where(inside, 1, longest / tree.or_one(squared_length))
    remainder = tree.subtract(s.remainder, _each(part, _combined(steps.T, products)))
    squared = _dots(remainder, remainder, difference)
    xx = s.xx + 2 * part * along + part**2 * squared_length
    least = jnp.maximum(jnp.minimum(s.least, span.least), difference.resolution)
    enough = jnp.sqrt(squared) <= jnp.maximum(limits.remainder, difference.resolution * jnp.sqrt(xx))
    enough |= jnp.sqrt(squared) <= jnp.maximum(limits.step * LEAST * least, forcing * jnp.sqrt(xx[0]))
    # A first direction that leads nowhere is replaced by the remainder itself.
    flat = span.flat & ~s.fresh
    num_steps = s.num_steps + 1
    turns = span.inverse @ _gram(products, remainder, difference)
    new = s._replace(
        x=tree.add(s.x, _each(part, moves)),
        remainder=remainder,
        direction=tree.subtract(remainder, _combined(turns.T, units)),
        squared=squared,
        xx=xx,
        fresh=jnp.zeros_like(s.fresh),
        num_steps=num_steps,
        indefinite=span.indefinite & ~s.fresh,
        flat=flat,
        least=least,
        active=~flat & jnp.all(inside) & ~enough & (squared > 0) & (num_steps < budget),
    )
    return cast_like(new, s)


class _Span(NamedTuple):
    """H on the span of two directions, of which the second is made conjugate to the first."""

    inverse: jax.Array  # P (P'HP)^-1 P' in coordinates of the directions, shape (2, 2); of what is not flat
    least: jax.Array  # least curvature that is not flat, else infinite
    flat: jax.Array  # of each, whether its curvature is not told from rounding; shape (2,)
    indefinite: jax.Array  # of each, whether it is negative beyond rounding


def _span(lengths: jax.Array, curvatures: jax.Array, resolution: jax.Array) -> _Span:
    """Of two unit directions, from their inner products among themselves and with H times themselves."""
    first, mixed = curvatures[0, 0], (curvatures[0, 1] + curvatures[1, 0]) / 2
    upward = first > FLAT * resolution
    ratio = jnp.where(upward & jnp.isfinite(mixed), mixed / jnp.where(upward, first, 1), 0)
    # The second less `ratio` times the first.
    length = 1 - 2 * ratio * lengths[0, 1] + ratio**2
    second = curvatures[1, 1] - ratio * mixed
    apart = length > _DEPENDENT * (1 + ratio**2)
    upward = jnp.stack([upward, apart & (second > FLAT * resolution * length)])
    along, by_length = jnp.stack([first, second]), jnp.stack([first, second / tree.or_one(length)])
    told = jnp.array([True, apart])
    conjugate = jnp.array([[1, 0], [-ratio, 1]])
    return _Span(
        inverse=conjugate.T @ (jnp.where(upward, 1 / jnp.where(upward, along, 1), 0)[:, None] * conjugate),
        least=jnp.min(jnp.where(upward, by_length, jnp.inf)),
        flat=~upward & told,
        indefinite=(by_length < -resolution) & told,
    )


def _products(difference: Difference, units: Params, number: jax.Array, sequential: bool) -> Params:
    """H times both directions."""

    def product(direction: Params) -> Params:
        return difference.product(direction, jnp.ones((), difference.dtype), number)

    return jax.lax.map(product, units) if sequential else jax.vmap(product)(units)


def _gram(a: Params, b: Params, difference: Difference) -> jax.Array:
    """The inner products of both of `a` with both of `b`, shape (2, 2)."""
    return jax.vmap(lambda x: jax.vmap(lambda y: tree.vdot(x, y))(b))(a).astype(difference.dtype)


def _dots(a: Params, b: Params, difference: Difference) -> jax.Array:
    """The inner product of each of `a` with that of `b`, shape (2,)."""
    return jax.vmap(tree.vdot)(a, b).astype(difference.dtype)


def _each(factors: jax.Array, a: Params) -> Params:
    """Each of `a` by a factor of its own."""
    return jax.vmap(tree.scale)(factors, a)


def _combined(weights: jax.Array, a: Params) -> Params:
    """Two sums of both of `a`, by the rows of `weights`."""

    def sums(x: Any) -> jax.Array:
        return jnp.tensordot(weights.astype(x.dtype), x, 1)

    return jax.tree.map(sums, a)
