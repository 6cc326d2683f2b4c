"""The strength at which a contrast errs least, sought along the line on which its phases lie."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like
from contrastive_meta._estimators._free_point import NOISE_FLOOR, FreePoint
from contrastive_meta._estimators._phases import Nudging, mean_of, on_line, statistic_noise, stiffening
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import LinearNudge
from contrastive_meta._problem import MetaParams, Params

# Strengths compared are this factor apart; the first is as much below the default.
_FACTOR = 8.0
# No nudge is to move `params` by more than this fraction of their length.
_LARGEST = 1.0
# Differences that rise by more than this are no accident of the noise.
_RISE = 2.0
# Nor may a nudge's curvature add more than this part of it to gradients: beyond, nudged losses lose their minima.
_MOST_BENT = 0.1
# Of the noise that the dtype and the gradients' own lead to expect, the least that is believed.
_BELIEVED = 0.3


class Rung(NamedTuple):
    """One strength of the ladder."""

    factor: jax.Array  # of the default strength
    contrasts: tuple[MetaParams, Params]  # of statistics and of residuals
    noise: jax.Array  # what rounding is expected to make of them at the default strength
    before: jax.Array  # what the strengths two rungs and one rung below differ by
    change: jax.Array  # what the strength one rung below and this one differ by
    num_rungs: jax.Array
    climbing: jax.Array


class Found(NamedTuple):
    """A strength, and what it took to find it."""

    displacement: jax.Array
    num_gradients: jax.Array


def seek(
    nudging: Nudging,
    point: FreePoint,
    nudged: Instance,
    base: Params,
    base_grad: Params,
    response: Params,
    *,
    to_minima: bool,
) -> Found:
    """Climb from weak to strong nudges until truncation shows, and balance it against the noise below.

    Contrasts at b and f b differ by c b^p (f^p - 1) of truncation and, with variances added, n sqrt(1 + 1 / f^2) / b of
    noise. Two such differences give c and n; c b^p + n / b is least at b^(p + 1) = n / (p c).

    Args:
      nudging: what the phases are to be.
      point: where the free phase ended.
      nudged: the setting whose outer loss is what nudges.
      base: the point from which phases are moved.
      base_grad: gradient of the inner loss there.
      response: u; a phase of strength b is taken to end at base - b u.
      to_minima: whether phases will go to the minima of their own losses, instead of staying on that line. What the
        nudge adds to the curvature along it is then truncation as well.

    Returns:
      The displacement that the strength brings about, relative to the length of `params`.
    """
    dtype = nudging.setting.dtype
    length = nudging.setting.norm(response)
    default = nudging.scheme.for_response(nudging.probe(point)._replace(chosen=jnp.zeros((), dtype)), length)
    usual = default.strength(dtype) * length / point.scale
    order = default.order

    # Phases at minima tell of it by themselves, see `stiffening`; a linear nudge has no curvature.
    curved = not to_minima and not isinstance(nudging.nudge, LinearNudge)
    _, weights = default.arrays(dtype)

    def climb(last: Rung) -> Rung:
        factor = _FACTOR * last.factor
        scheme = default.scaled(factor)
        nudges, _ = scheme.arrays(dtype)
        ends = on_line(base, response, nudges)
        residuals, statistic = nudging.evaluate(nudged, ends, nudges)
        contrasts = scheme.contrast((statistic, residuals))
        # Relative to the meta-gradient, to the nudge, and to the curvature without a nudge.
        units = tree.or_one(tree.norm(contrasts[0])), tree.or_one(point.nudge_norm)
        apart = [tree.norm(x) / unit for x, unit in zip(tree.subtract(contrasts, last.contrasts), units, strict=True)]
        moved = tree.subtract(residuals, base_grad)
        bent = jnp.maximum(tree.norm(mean_of(moved)) - NOISE_FLOOR * point.noise, 0.0) if curved else 0.0
        stiffer = stiffening(nudging, point, scheme, moved, response) if to_minima else 0.0
        noise = default.noise_gain(dtype) * jnp.hypot(
            statistic_noise(point, statistic) / units[0], point.noise / units[1]
        )
        first = last.num_rungs == 0
        change = jnp.where(first, jnp.inf, jnp.hypot(*apart) + stiffer**order)
        # Where the losses end, truncation is large.
        change = jnp.where(jnp.isnan(change), _FACTOR ** (order + 1) * last.change, change)
        rung = Rung(
            factor, contrasts, jnp.where(first, noise, last.noise), last.change, change, last.num_rungs + 1,
            climbing=(first | ((change < _RISE * last.change) & (_FACTOR * factor * usual <= _LARGEST)))
            & (_FACTOR * bent <= _MOST_BENT * units[1] * scheme.strength(dtype)),
        )  # fmt: skip
        return cast_like(rung, last)

    infinite, start = jnp.asarray(jnp.inf, dtype), jnp.asarray(1 / _FACTOR, dtype)
    shapes = jax.eval_shape(
        lambda: default.contrast(nudging.measure(nudged, on_line(base, response, weights), weights))
    )
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), tree.zeros_like(response)
    ground = Rung(start / _FACTOR, nothing, infinite, infinite, infinite, jnp.int32(0), jnp.asarray(True))
    top: Rung = jax.lax.while_loop(lambda rung: rung.climbing, climb, ground)

    # The two laws, in squares, at the lower strengths of both differences.
    lower, upper = top.factor / _FACTOR**2, top.factor / _FACTOR
    truncated = [(b**order * (_FACTOR**order - 1)) ** 2 for b in (lower, upper)]
    noisy = [(1 + 1 / _FACTOR**2) / b**2 for b in (lower, upper)]
    squares = top.before**2, top.change**2
    whole = truncated[1] * noisy[0] - truncated[0] * noisy[1]
    truncation = jnp.maximum(squares[1] * noisy[0] - squares[0] * noisy[1], 0) / whole
    noise = jnp.maximum(squares[0] * truncated[1] - squares[1] * truncated[0], 0) / whole
    noise = jnp.maximum(noise, (_BELIEVED * top.noise) ** 2)
    best = (noise / (order**2 * truncation)) ** (1 / (2 * (order + 1)))
    best = jnp.clip(best, start, top.factor)
    displacement = jnp.where(jnp.isfinite(best), best, 1.0) * usual
    return Found(displacement.astype(dtype), top.num_rungs * len(default.nudges))
