"""Conjugate gradients on gradient differences, for two right-hand sides at once: block CG while both are active."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, cond, fori_loop, while_loop
from contrastive_meta._problem import Params

# A first direction is worth trying if its cosine with the right-hand side is above this.
_USEFUL_COSINE = 1e-2
# Curvature below this fraction of what differences resolve counts as zero.
FLAT = 0.1
# The least eigenvalue is about this fraction of the least curvature along the directions; measured on tanh networks.
LEAST_EIGENVALUE = 0.1
# Most steps of block CG. Beyond, little of what the second system found survives the first one's step.
_MOST_BLOCK_STEPS = 32
# Two directions count as one if the squared length of their difference is below this fraction.
_DEPENDENT = 1e-3


class GradientDifference(NamedTuple):
    """A Hessian known by differences of the gradient.

    Attributes:
      inner_grad: the gradient, `params -> params`.
      base: where the Hessian is taken.
      base_grad: the gradient there, exactly: its error would be divided by the step.
      step: length of the difference step.
      noise: rounding noise of the gradient.
      two_sided: whether to take differences on both sides of the base, for two gradients instead of one.
      sequential: whether to take one product after another.
      dtype: of scalars.
      preconditioner: a diagonal that approximates the inverse; () for none.
    """

    inner_grad: Callable[[Params], Params]
    base: Params
    base_grad: Params
    step: jax.Array
    noise: jax.Array
    two_sided: jax.Array
    sequential: bool
    dtype: Any
    preconditioner: Params

    def products(self, directions: Params, active: jax.Array, number: jax.Array) -> Params:
        """H times two unit directions.

        One-sided differences alternate between forwards and backwards: neighbouring directions are alike, and what the
        third derivative adds to one product is subtracted from the next.

        Args:
          directions: stacked along a leading axis.
          active: which of them are asked for; of the others the product is of no use, and zero if it saves time.
          number: of the step of conjugate gradients.
        """
        forwards = jnp.where(number % 2 == 0, self.step, -self.step)

        def one_sided(direction: Params, step: jax.Array) -> Params:
            there = self.inner_grad(tree.add_scaled(self.base, step, direction))
            return tree.scale(1 / step, tree.subtract(there, self.base_grad))

        # A loop, so that the gradient is compiled once.
        def add_side(side: jax.Array, total: Params) -> Params:
            step = jnp.where(side == 0, forwards, -forwards)
            if not self.sequential:
                return cast_like(tree.add(total, jax.vmap(lambda d: one_sided(d, step))(directions)), total)

            def needed(of: tuple[jax.Array, Params]) -> Params:
                return cond(of[0], lambda d: cast_like(one_sided(d, step), d), tree.zeros_like, of[1])

            return cast_like(tree.add(total, jax.lax.map(needed, (active, directions))), total)

        total = fori_loop(0, jnp.where(self.two_sided, 2, 1), add_side, tree.zeros_like(directions))
        return tree.scale(jnp.where(self.two_sided, 0.5, 1.0), total)

    def preconditioned(self, residuals: Params) -> Params:
        """Both residuals, stacked, times the preconditioner."""
        if not jax.tree.leaves(self.preconditioner):
            return residuals
        return jax.tree.map(lambda xs, x: xs * x[None], residuals, self.preconditioner)

    @property
    def resolution(self) -> jax.Array:
        """Curvature below it is not told from rounding."""
        return self.noise / self.step


class Limits(NamedTuple):
    """When conjugate gradients end, in units of the right-hand side; each of shape (2,)."""

    residual: jax.Array  # norm of the residual b - H x
    step: jax.Array  # length of the error, were all of it along the least curvature
    least: jax.Array  # least curvature met before
    radius: jax.Array  # trust radius, the longest x
    num_steps: jax.Array  # budget


class Solution(NamedTuple):
    """Two linear systems H x = b, b of length 1, under way or solved; each leaf has a leading axis of systems."""

    x: Params
    residual: Params
    direction: Params
    squared: jax.Array  # ||residual||^2
    xx: jax.Array  # ||x||^2
    fresh: jax.Array  # whether the direction is a guess, so that the next one starts anew
    num_steps: jax.Array
    indefinite: jax.Array
    flat: jax.Array  # whether it ended on a direction whose curvature is not told from rounding
    least: jax.Array  # least curvature along a direction, so far
    cauchy: jax.Array  # length of the step down the right-hand side, a lower bound of the solution's
    active: jax.Array


def solve(
    difference: GradientDifference,
    rhs: Params,
    guess: Params,
    active: jax.Array,
    limits: Limits,
    forcing: jax.Array,
    *,
    delay: jax.Array,
) -> tuple[Solution, jax.Array]:
    """Solve H x = b for two right-hand sides of length 1, or for those of them that are active.

    While both are active, both systems are minimised in the span of both directions (block CG), which takes fewer
    steps. When one has ended, the other goes on alone.

    Args:
      difference: H.
      rhs: both right-hand sides, stacked.
      guess: a first direction for the second system, of any length; zeros for none.
      active: which systems to solve, shape (2,).
      limits: when they end.
      forcing: residual, per length of the first solution, that the step along the first solution will leave anyway.
      delay: whether the second system is given up, to be solved later, where both take many steps.

    Returns:
      The systems at their ends, and whether the second was given up.

    Reference:
      O'Leary (1980), The block conjugate gradient algorithm and related methods; Steihaug (1983) for the radius.
    """
    both = jnp.all(active)

    def iterate(s: Solution) -> Solution:
        return _iterate(difference, limits, jnp.where(both & ~_given_up(delay, s), forcing, 0), delay, s)

    solved: Solution = while_loop(lambda s: jnp.any(s.active), iterate, _begin(difference, rhs, guess, active, limits))
    return solved, both & _given_up(delay, solved)


def _given_up(delay: jax.Array, s: Solution) -> jax.Array:
    """Whether the second system was given up: both were under way when block CG ended."""
    return delay & ~s.active[1] & (s.num_steps[1] == _MOST_BLOCK_STEPS) & (s.num_steps[0] >= _MOST_BLOCK_STEPS)


def _begin(difference: GradientDifference, rhs: Params, guess: Params, active: jax.Array, limits: Limits) -> Solution:
    """The systems before their first step."""
    dtype = difference.dtype
    second = jax.tree.map(lambda xs: xs[1], rhs)
    length = tree.norm(guess)
    unit = tree.scale(1 / tree.or_one(length), guess)
    cosine = tree.vdot(second, unit)
    warm = (length > 0) & jnp.isfinite(length) & (jnp.abs(cosine) > _USEFUL_COSINE)
    along = difference.preconditioned(rhs)
    direction = jax.tree.map(lambda xs, x: xs.at[1].set(jnp.where(warm, x, xs[1])), along, unit)
    one, zero = jnp.ones((2,), dtype), jnp.zeros((2,), dtype)
    false, none = jnp.zeros((2,), bool), jnp.zeros((2,), jnp.int32)
    return Solution(
        x=tree.zeros_like(rhs),
        residual=rhs,
        direction=direction,
        squared=one,
        xx=zero,
        fresh=jnp.stack([jnp.asarray(False), warm]),
        num_steps=none,
        indefinite=false,
        flat=false,
        least=limits.least.astype(dtype),
        cauchy=zero,
        active=active,
    )


def _iterate(
    difference: GradientDifference, limits: Limits, forcing: jax.Array, delay: jax.Array, s: Solution
) -> Solution:
    """One step of every active system."""
    block = jnp.all(s.active) & (s.num_steps[0] < _MOST_BLOCK_STEPS)
    lengths = jnp.sqrt(_dots(s.direction, s.direction, difference))
    units = _each(1 / tree.or_one(lengths), s.direction)
    products = difference.products(units, s.active, jnp.max(s.num_steps))
    curvatures = _gram(units, products, difference)
    span = _span(_gram(units, units, difference), curvatures, difference.resolution, block)
    # Outside the domain of the loss a product is not finite: that ends its own system alone.
    products = jax.vmap(tree.where)(jnp.isfinite(jnp.diagonal(curvatures)), products, tree.zeros_like(products))
    own = block | jnp.eye(2, dtype=bool)

    # In each system as far as its quadratic decreases within the span, but not beyond the radius.
    steps = span.inverse @ jnp.where(own, _gram(units, s.residual, difference), 0)
    moves = _combined(steps.T, units)
    along, squared_length = _dots(s.x, moves, difference), _dots(moves, moves, difference)
    longest = jnp.sqrt(along**2 + squared_length * jnp.maximum(limits.radius**2 - s.xx, 0)) - along
    inside = ~(longest < squared_length)
    part = jnp.where(inside, 1, longest / tree.or_one(squared_length))
    residual = tree.subtract(s.residual, _each(part, _combined(steps.T, products)))
    squared = _dots(residual, residual, difference)
    xx = s.xx + 2 * part * along + part**2 * squared_length
    least = jnp.maximum(jnp.minimum(s.least, span.least), difference.resolution)
    left_anyway = forcing * jnp.sqrt(xx[0])
    enough = jnp.sqrt(squared) <= jnp.maximum(limits.residual, difference.resolution * jnp.sqrt(xx))
    enough |= jnp.sqrt(squared) <= jnp.maximum(limits.step * LEAST_EIGENVALUE * least, left_anyway)
    # A guess along which the curvature is not told from rounding is replaced by the residual.
    flat = span.flat & ~s.fresh
    num_steps = s.num_steps + 1
    along_residual = difference.preconditioned(residual)
    # By the Cauchy-Schwarz inequality, |H^-1 b| |b| >= b'H^-1 b >= (b'd)^2 / d'Hd for any direction d.
    cauchy = _dots(units, s.residual, difference) ** 2 / jnp.maximum(jnp.diagonal(curvatures), difference.resolution)
    conjugations = span.inverse @ jnp.where(own, _gram(products, along_residual, difference), 0)
    inside = jnp.where(block, jnp.all(inside), inside)
    given_up = jnp.stack([jnp.asarray(False), block & delay & (num_steps[0] >= _MOST_BLOCK_STEPS)])
    new = Solution(
        x=tree.add(s.x, _each(part, moves)),
        residual=residual,
        direction=tree.subtract(along_residual, _combined(conjugations.T, units)),
        squared=squared,
        xx=xx,
        fresh=jnp.zeros_like(s.fresh),
        num_steps=num_steps,
        indefinite=span.indefinite & ~s.fresh,
        flat=flat,
        least=least,
        cauchy=jnp.where(s.num_steps == 0, cauchy, s.cauchy),
        active=~flat & inside & ~enough & (squared > 0) & (num_steps < limits.num_steps) & ~given_up,
    )

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(s.active.reshape(2, *[1] * (new.ndim - 1)), new, old)

    held: Solution = jax.tree.map(kept, cast_like(new, s), s)
    return held


class _Span(NamedTuple):
    """H on the span of two directions, of which the second is made conjugate to the first."""

    inverse: jax.Array  # P (P'HP)^-1 P' in coordinates of the directions, shape (2, 2); of what is not flat
    least: jax.Array  # least curvature of each that is not flat, else infinite; shape (2,)
    flat: jax.Array  # of each, whether its curvature is not told from rounding; shape (2,)
    indefinite: jax.Array  # of each, whether it is negative beyond rounding


def _span(lengths: jax.Array, curvatures: jax.Array, resolution: jax.Array, block: jax.Array) -> _Span:
    """H on the span of two unit directions, from their inner products among themselves and with H times themselves."""
    first, mixed = curvatures[0, 0], (curvatures[0, 1] + curvatures[1, 0]) / 2
    upward = first > FLAT * resolution
    ratio = jnp.where(upward & jnp.isfinite(mixed) & block, mixed / jnp.where(upward, first, 1), 0)
    # The second direction minus `ratio` times the first.
    length = 1 - 2 * ratio * lengths[0, 1] + ratio**2
    second = curvatures[1, 1] - ratio * jnp.where(block, mixed, 0)
    independent = length > _DEPENDENT * (1 + ratio**2)
    upward = jnp.stack([upward, independent & (second > FLAT * resolution * length)])
    along, by_length = jnp.stack([first, second]), jnp.stack([first, second / tree.or_one(length)])
    told = jnp.stack([jnp.asarray(True), independent])
    one, zero = jnp.ones_like(ratio), jnp.zeros_like(ratio)
    conjugate = jnp.stack([jnp.stack([one, zero]), jnp.stack([-ratio, one])])
    least = jnp.where(upward, by_length, jnp.inf)
    return _Span(
        inverse=conjugate.T @ (jnp.where(upward, 1 / jnp.where(upward, along, 1), 0)[:, None] * conjugate),
        least=jnp.where(block, jnp.min(least), least),
        flat=~upward & told,
        indefinite=(by_length < -resolution) & told,
    )


def _gram(a: Params, b: Params, difference: GradientDifference) -> jax.Array:
    """The inner products of both of `a` with both of `b`, shape (2, 2)."""
    return jax.vmap(lambda x: jax.vmap(lambda y: tree.vdot(x, y))(b))(a).astype(difference.dtype)


def _dots(a: Params, b: Params, difference: GradientDifference) -> jax.Array:
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
