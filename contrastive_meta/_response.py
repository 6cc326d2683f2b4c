"""The scales of a free solution: how noisy its gradient is, and how far a unit nudge would move it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import while_loop
from contrastive_meta._problem import Params


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


def measure_noise(
    function: Callable[[Params], Params],
    at: Params,
    direction: Params,
    scale: jax.Array,
    eps: float,
    length: jax.Array | None = None,
) -> tuple[Params, jax.Array, jax.Array]:
    """The value of `function` at a point, the norm of its rounding noise there, and its slope.

    A second difference over steps that are a small part of sqrt(eps) * scale: what is smooth contributes less than
    eps, so the rest is noise, whether it comes from the dtype or from reduced-precision matrix products. Costs 3
    evaluations, one after another: side by side they would need three times the memory.

    Args:
      function: `params -> tree`.
      at: where.
      direction: along which to step; any length.
      scale: length of `at`.
      eps: relative rounding.
      length: norm of `direction` where it is known.

    Returns:
      The value; the norm of its noise; and how much it changes, in norm, for a unit of length along `direction`.

    Reference:
      More & Wild (2011), ECnoise: the difference table.
    """
    length = tree.norm(direction) if length is None else length
    step = (0.05 * eps**0.5 * scale / tree.or_one(length)).astype(scale.dtype)
    steps = jnp.stack([jnp.zeros_like(step), step, -step])
    points = jax.vmap(lambda distance: tree.add_scaled(at, distance, direction))(steps)
    values = jax.lax.map(function, points)
    here, ahead, behind = tree.unstack(values, 3)
    # Taken from `here`, nearly equal numbers are subtracted exactly.
    ahead, behind = tree.subtract(ahead, here), tree.subtract(behind, here)
    # The variance of a second difference of independent errors is 1 + 4 + 1 times theirs.
    second, first = tree.norms(tree.add(ahead, behind), tree.subtract(ahead, behind))
    slope = first / (2 * step * tree.or_one(length))
    return here, (second / 6**0.5).astype(scale.dtype), slope.astype(scale.dtype)


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
