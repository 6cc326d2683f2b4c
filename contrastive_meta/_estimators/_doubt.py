"""How wrong a contrast is: what twice the strength, and an answer to what is left, would make of it."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, only_if
from contrastive_meta._estimators._free_point import NOISE_FLOOR, FreePoint, difference_step
from contrastive_meta._estimators._judge import Judged
from contrastive_meta._estimators._krylov import Difference, Limits, solve
from contrastive_meta._estimators._phases import Nudging, Phases, statistic_noise, stiffening
from contrastive_meta._problem import MetaParams, Params

# One step of steepest descent makes about this part of what is missing, more or less whatever the problem; chosen on
# ridge and softmax regression.
_SHARE_OF_A_STEP = 0.5
# Most gradients that are spent on what the response lacks.
_MOST_STEPS = 200
# Down to which part of what is left it is looked for, for the base point, for the response, and for what may be left
# instead, whose size alone matters; or to which part of the noise in one direction of many. Of the response 1e-2 is too
# little: with a single curvature of 1e-4 beside others near 1 the estimate was 5 to 260 times too low.
_ANSWERED = 1e-2, 1e-4, 1e-1
_OF_NOISE = 0.3


class Untruncated(NamedTuple):
    """What is known of the truncation of a contrast.

    Attributes:
      remainder: v - H u, free of the leading truncation.
      changed: what truncation and noise may have made of nothing: what may be left instead.
      lacking: what truncation takes from the meta-gradient.
      doubling: what twice the strength changes in the meta-gradient and in what is left of the nudge, relative to each.
      unseen: what shows in neither contrast, relative to the meta-gradient: truncation (see `stiffening`), or noise of
        the statistic.
    """

    remainder: Params
    changed: Params
    lacking: MetaParams
    doubling: jax.Array
    unseen: jax.Array


def without_truncation(nudging: Nudging, point: FreePoint, phases: Phases, grad: MetaParams) -> Untruncated:
    """Extrapolate both contrasts from the strength of the phases and twice that.

    Were learning linear, phases nudged twice as much would end twice as far from the base point. Truncation grows with
    the strength to the power of the scheme's order p: twice the strength changes a contrast by 2^p - 1 times its
    truncation. Costs a residual and a statistic for each phase.

    Args:
      nudging: what the phases were to be.
      point: where the free phase ended.
      phases: what they left behind.
      grad: the contrast of their statistic.
    """
    scheme, dtype = phases.scheme.scaled(jnp.asarray(2.0, nudging.setting.dtype)), nudging.setting.dtype
    nudges, _ = scheme.arrays(dtype)
    ends = jax.tree.map(lambda xs, x: xs + (xs - x), phases.params, phases.base)
    nudged = nudging.nudged(phases.base, phases.base_outer[1])
    residuals, statistic = nudging.evaluate(nudged, ends, nudges)
    share = 1 / (2**scheme.order - 1)
    remainder = phases.scheme.contrast(phases.residual)
    unanswered = tree.subtract(remainder, scheme.contrast(residuals))
    truncation = tree.scale(share, unanswered)
    change = tree.subtract(scheme.contrast(statistic), grad)
    relative = [tree.norm(x) / tree.or_one(tree.norm(of)) for x, of in ((change, grad), (unanswered, point.outer_grad))]
    doubling = jnp.hypot(*relative).astype(dtype)
    # Of the phases' gradients, what is not linear in the distance: r(2b) - 2 r(b) + r(0), twice what r(b) has of it.
    bent = jax.tree.map(lambda far, near, x: far / 2 - near + x / 2, residuals, phases.residual, phases.base_grad)
    stiffer = stiffening(nudging, point, phases.scheme, bent, phases.scheme.contrast(phases.params))
    unseen = jnp.where(phases.at_minima, stiffer**phases.scheme.order, 0.0)
    # Where the strength was sought, noise n and truncation n / p are both in what doubling changes.
    p = scheme.order
    at_best = math.hypot(1, 1 / p) / math.hypot((2**p - 1) / p, math.hypot(1, 1 / 2))
    rounded = phases.scheme.noise_gain(dtype) * statistic_noise(point, phases.statistic) / tree.or_one(tree.norm(grad))
    unseen = jnp.maximum(unseen, jnp.where(phases.chosen > 0, at_best * relative[0], rounded)).astype(dtype)
    # The noise of a remainder may cancel what is left of it; then not what twice the strength changes, noise as well.
    changed = tree.scale(jnp.where(phases.chosen > 0, at_best, share).astype(dtype), unanswered)
    return Untruncated(tree.add(remainder, truncation), changed, tree.scale(-share, change), doubling, unseen)


class Lacking(NamedTuple):
    """What base point and response lack.

    Attributes:
      ahead: the base point, had learning ended.
      outer_grad: there.
      responses: H^-1 of what is left of the nudge there, and of what may be left instead, along a leading axis.
      num_gradients: spent on finding out.
    """

    ahead: Params
    outer_grad: Params
    responses: Params
    num_gradients: jax.Array


def answer(nudging: Nudging, point: FreePoint, phases: Phases, judged: Judged, changed: Params) -> Lacking:
    """Solve for what is left to learn, and for what is left of the nudge there.

    Along low curvature a remainder within the noise may hide much of the response, and a step down the remainder would
    not show it. Whoever learned to noise has left as much of it as this finds.

    Args:
      nudging: what the phases were to be.
      point: where the free phase ended.
      phases: what they left behind.
      judged: where.
      changed: what may be left of the nudge instead.
    """
    setting = nudging.setting
    dtype = setting.dtype
    distance, _ = difference_step(setting, point)
    difference = Difference(tree.grad(setting.inner), judged.params, judged.base_grad, distance, point.noise, dtype)
    size = sum(x.size for x in jax.tree.leaves(point.params))
    # At the dtype's floor what is left to learn is noise.
    unlearned = judged.residual > NOISE_FLOOR * point.noise
    # Of the base point, of the response and of what it may lack instead: what is to be answered and a step towards it,
    # the noise in it, down to which part of it, and the longest answer.
    sides = tree.scale(-1.0, judged.base_grad), judged.remainder, changed
    steps = tree.subtract(judged.ahead, judged.params), judged.more, tree.zeros_like(judged.more)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *sides), jax.tree.map(lambda *x: jnp.stack(x), *steps)
    gain = phases.scheme.noise_gain(dtype)
    noise = _OF_NOISE * point.noise / size**0.5 * jnp.stack([jnp.ones(()), gain, gain])
    parts = jnp.asarray(_ANSWERED, dtype)
    radii = jnp.stack([point.scale, jnp.inf, jnp.inf]).astype(dtype)
    left_over = setting.norm(judged.remainder)

    def look(
        before: tuple[Params, Params, jax.Array],
        turn: tuple[jax.Array, jax.Array, jax.Array, jax.Array, Params, Params],
    ) -> tuple[tuple[Params, Params, jax.Array], Params]:
        (ahead, outer_grad, spent), (of_response, noise, part, radius, side, step) = before, turn
        sought = tree.where(of_response, tree.add(side, tree.subtract(outer_grad, judged.outer_grad)), side)
        left = setting.norm(sought)
        unit = tree.or_one(left)
        none, infinite = jnp.zeros((), dtype), jnp.full((), jnp.inf, dtype)
        # Beside a larger remainder a small one does not matter.
        answered = part * jnp.maximum(left, jnp.where(of_response, left_over, 0.0))
        limits = Limits((jnp.maximum(noise, answered) / unit).astype(dtype), none, infinite, radius / unit)
        wanted = (of_response | unlearned) & (left > answered)
        scaled, nothing = tree.scale(1 / unit, sought), tree.zeros_like(sought)
        system = solve(difference, scaled, nothing, wanted, limits, jnp.int32(_MOST_STEPS))
        found = system.x
        # An answer is longer than a step down the remainder, by the Cauchy-Schwarz inequality.
        solved = tree.all_finite(found) & (tree.norm(found) * unit >= tree.norm(step))
        found = tree.where(solved, tree.scale(unit, found), tree.scale(1 / _SHARE_OF_A_STEP, step))
        moves = ~of_response & unlearned
        ahead = tree.where(moves, tree.add(judged.params, found), ahead)
        outer_grad = only_if(moves, lambda _: tree.grad(setting.outer)(ahead), outer_grad)
        return cast_like((ahead, outer_grad, spent + system.num_steps + moves), before), found

    of_response = jnp.array([False, True, True])
    start = judged.params, judged.outer_grad, jnp.int32(0)
    (ahead, outer_grad, spent), found = jax.lax.scan(look, start, (of_response, noise, parts, radii, *stacked))
    return Lacking(ahead, outer_grad, jax.tree.map(lambda xs: xs[1:], found), spent)


def relative_error(
    nudging: Nudging, phases: Phases, judged: Judged, grad: MetaParams, truncation: MetaParams, lacking: Lacking
) -> jax.Array:
    """Estimated relative error of a contrast: what it lacks by truncation, and by unfinished phases.

    Costs a statistic for each phase and each of the two responses that may be lacking; the larger error counts.

    Args:
      nudging: what the phases were to be.
      phases: what they left behind.
      judged: where.
      grad: the contrast of their statistic.
      truncation: what it takes from the contrast.
      lacking: what base point and response lack.

    Returns:
      The error over what would be right; 0 where both vanish, infinite where the latter alone does.
    """
    nudges, _ = phases.scheme.arrays(nudging.setting.dtype)
    nudged = nudging.nudged(lacking.ahead, lacking.outer_grad)

    def step(ends: jax.Array, base: jax.Array, ahead: jax.Array, more: jax.Array) -> jax.Array:
        return ends + (ahead - base) - nudges.astype(ends.dtype).reshape(-1, *[1] * base.ndim) * more

    def with_response(response: Params) -> jax.Array:
        ends = jax.tree.map(step, phases.params, judged.params, lacking.ahead, response)
        nearer = tree.add(truncation, phases.scheme.contrast(nudging.measure(nudged, ends, nudges)))
        error = tree.norm(tree.subtract(nearer, grad))
        return jnp.where(error == 0, 0.0, error / tree.norm(nearer))

    return jnp.max(jax.lax.map(with_response, lacking.responses))
