"""The scales of a free solution: how noisy its gradient is, and how far a unit nudge would move it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import while_loop
from contrastive_meta._problem import Params

# A second difference this many times the other is a jump. Of two norms of random vectors of one entry the larger is
# seldom 1,000 times the smaller (once in 800), and never where there are several entries.
_JUMP = 1e3
# A jump is at least this part of what the function changes by over the length of the point. What rounds its inputs,
# such as matrix products in TF32 (2^-11) and bfloat16 (2^-8), jumps as well, by less: that is noise.
_LEAST_JUMP = 5e-3
# Where the function is evaluated for second differences around the point, and for some ahead of it that do not touch
# those; in steps of 0.05 sqrt(eps) times the length of the point. What is smooth contributes 0.0025 eps, and 49 times
# that ahead. Learners that run into a kink end within 1e-9 of it in float64, about one step. With differences that
# touch each other, each held a kink of one of four unknowns in 9 of 25 lassos; with these, in one.
_PLACES = (-1.0, 0.0, 1.0, 8.0, 15.0)
DIFFERENCE = 0.05
# One-sided differences for products with random signs take steps of this many times sqrt(eps) times the length of the
# point, as in `difference_step` where noise is an eps of what the function is made of.
_PRODUCT_STEP = 3.0


class Probe(NamedTuple):
    """The free solution as a pilot sees it: first-order information only.

    Attributes:
      inner_grad: gradient of the inner loss as a function of `params`.
      params: the free solution.
      free_grad: gradient of the inner loss there (what learning left over).
      outer_grad: gradient v of the outer loss there (what a unit nudge adds).
      nudge_norm: norm of `outer_grad`.
      scale: the length that displacements are relative to: the norm of `params`, or of the distance learned where
        that is larger (as when `params` end at zero).
      noise: norm of the rounding noise of `inner_grad`.
      curvature: norm of the change of `inner_grad` per unit of length along v, or along ones where v is 0.
      dtype: real floating dtype of the losses.
      eps: relative rounding of the coarsest of losses and `params`.
      chosen: the displacement, relative to `scale`, that was found to be best; 0 where none has been looked for.
    """

    inner_grad: Callable[[Params], Params]
    params: Params
    free_grad: Params
    outer_grad: Params
    nudge_norm: jax.Array
    scale: jax.Array
    noise: jax.Array
    curvature: jax.Array
    dtype: Any
    eps: float
    chosen: jax.Array


class Noise(NamedTuple):
    """What `measure_noise` finds at a point.

    Attributes:
      value: of the function there.
      noise: norm of its rounding noise.
      slope: how much it changes, in norm, for a unit of length along the direction.
      jump: norm of a jump next to the point, or at it; 0 where there is none.
      products: of the derivative with the signs that were given, stacked; () without any.
      product_floor: entries of products below it are not told from rounding.
    """

    value: Params
    noise: jax.Array
    slope: jax.Array
    jump: jax.Array
    products: Params
    product_floor: jax.Array


def measure_noise(
    function: Callable[[Params], Params],
    at: Params,
    direction: Params,
    scale: jax.Array,
    eps: float,
    length: jax.Array | None = None,
    signs: Params = (),
) -> Noise:
    """The value of `function` at a point, the norm of its rounding noise there, its slope, and whether it jumps there.

    Second differences over steps that are a small part of sqrt(eps) * scale: what is smooth contributes less than
    eps, so the rest is noise, whether it comes from the dtype or from reduced-precision matrix products. There are
    two of them, around the point and ahead of it. A jump is in one of them, and noise is in both: where they differ by
    a factor of 1,000 the smaller is the noise, and the larger is the jump. Costs 5 evaluations, and one for each
    product with signs, one after another: side by side they would need as many times the memory.

    Args:
      function: `params -> tree`.
      at: where.
      direction: along which to step; any length.
      scale: length of `at`.
      eps: relative rounding.
      length: norm of `direction` where it is known.
      signs: directions of entries 1 and -1 to multiply the derivative with, stacked; () for none.

    Reference:
      More & Wild (2011), ECnoise: the difference table.
    """
    length = tree.norm(direction) if length is None else length
    step = (DIFFERENCE * eps**0.5 * scale / tree.or_one(length)).astype(scale.dtype)
    steps = jnp.asarray(_PLACES, scale.dtype) * step
    points = jax.vmap(lambda distance: tree.add_scaled(at, distance, direction))(steps)
    size = sum(x.size for x in jax.tree.leaves(at)) ** 0.5
    apart = (_PRODUCT_STEP * eps**0.5 / size * scale).astype(scale.dtype)
    number = next((xs.shape[0] for xs in jax.tree.leaves(signs)), 0)
    if number:
        aside = jax.vmap(lambda sign: tree.add_scaled(at, apart, sign))(signs)
        points = jax.tree.map(lambda *xs: jnp.concatenate(xs), points, aside)
    behind, here, near, far, farther, *there = tree.unstack(jax.lax.map(function, points), 5 + number)
    products = [tree.scale(1 / apart, tree.subtract(x, here)) for x in there]
    # Taken from the one between, nearly equal numbers are subtracted exactly.
    ahead, back = tree.subtract(near, here), tree.subtract(behind, here)
    on, before = tree.subtract(farther, far), tree.subtract(near, far)
    lengths = tree.norms(
        tree.add(ahead, back), tree.add(on, before), tree.subtract(ahead, back), tree.subtract(on, before)
    )
    second, first = lengths.astype(scale.dtype).reshape(2, 2)
    slopes = first / (2 * step * tree.or_one(length) * jnp.array([1.0, _PLACES[3] - _PLACES[2]], scale.dtype))
    # Rounding `at` alone makes up to half an eps of each entry.
    floors = jnp.maximum(second, eps * slopes * scale / 4)
    jumps = (second > _JUMP * floors[::-1]) & (second > _LEAST_JUMP * slopes[::-1] * scale)
    chosen = jnp.where(jumps[0], 1, 0)
    # The variance of a second difference of independent errors is 1 + 4 + 1 times theirs.
    noise = second[chosen] / 6**0.5
    jump = jnp.max(jnp.where(jumps, second, 0))
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *products) if number else ()
    return Noise(here, noise, slopes[chosen], jump, stacked, noise / (size * apart))


def measure_response(probe: Probe, num_steps: int) -> tuple[Params, jax.Array]:
    """The response u to a unit nudge, H u = v, roughly, and the gradients spent.

    Conjugate gradients in which a Hessian-vector product is a one-sided gradient difference. Stopped early its length
    is an underestimate, and so the nudge somewhat larger than asked; along downward curvature the iterate
    reached so far is used.
    """

    def curve(direction: Params, distance: jax.Array) -> Params:
        length = tree.norm(direction)
        step = distance / jnp.where(length > 0, length, 1)
        moved = probe.inner_grad(tree.add_scaled(probe.params, step, direction))
        return tree.scale(1 / step, tree.subtract(moved, probe.free_grad))

    # Step length of the differences: rounding and curvature balance at the square root of the relative noise.
    unit = tree.scale(1 / tree.or_one(probe.nudge_norm), probe.outer_grad)
    relative_noise = jnp.clip(probe.noise / tree.or_one(probe.curvature * probe.scale), probe.eps, 1e-3)
    distance = 3 * jnp.sqrt(relative_noise) * probe.scale

    def unconverged(carry: Any) -> Any:
        _, _, _, squared, count, upward = carry
        return (squared > 1e-4) & (count < num_steps) & upward

    def body(carry: Any) -> Any:
        x, residual, direction, squared, count, _ = carry
        product = curve(direction, distance)
        curvature = tree.vdot(direction, product)
        upward = curvature > 0
        # Downhill from the very start there is no iterate yet: the modulus of the curvature still gives a length.
        usable = upward | ((count == 0) & (curvature < 0))
        alpha = jnp.where(usable, squared / jnp.where(usable, jnp.abs(curvature), 1), 0)
        x = tree.add_scaled(x, alpha, direction)
        residual = tree.add_scaled(residual, -alpha, product)
        new = tree.vdot(residual, residual)
        direction = tree.add_scaled(residual, new / squared, direction)
        return x, residual, direction, new, count + 1, upward

    begin = (tree.zeros_like(unit), unit, unit, tree.vdot(unit, unit), jnp.int32(0), jnp.asarray(True))
    x, _, _, _, count, _ = while_loop(unconverged, body, begin)
    return tree.scale(probe.nudge_norm, x), count
