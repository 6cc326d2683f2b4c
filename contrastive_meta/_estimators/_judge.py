"""What the contrasts of the phases say of where they ended, and what went wrong in them if anything did."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import only_if
from contrastive_meta._estimators._free_point import (
    NOISE_FLOOR,
    UNANSWERED,
    FreePoint,
    LeftToLearn,
    difference_step,
    newton_length,
)
from contrastive_meta._estimators._phases import Nudging, Phases, mean_of, statistic_noise
from contrastive_meta._nudging import LinearNudge, NudgeScheme
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._result import Status, flag, worst

# The truncation error of a scheme of order p is of the order of bend^p.
_UNTRUNCATED = 1e-2
# Learning has ended, next to a nudge, when its residual is below this part of what the nudge adds.
_ENDED = 1e-3


class Judged(NamedTuple):
    """The contrasts of the phases, where the meta-gradient was taken, and what was left there.

    Attributes:
      response: contrast of where the phases ended: dphi/dbeta = -u.
      moved: norm of the response.
      remainder: v - H u, what is left of the nudge, as it was given.
      unanswered: norm of the contrast of their residuals, the same but for truncation.
      params: the base point: the free solution, or what the phases made of it where that is better learned.
      further: whether it is the latter.
      residual: norm of the inner gradient there.
      base_grad: that gradient.
      outer_grad: there.
      missing: length of what is at least missing of the response, see `newton_length`.
      more: that part of the response, a step down the remainder.
      ahead: the base point after the step that is at least left to learn.
      bend: how far learning is from linear over the span of the phases, see `judge`.
      left: what was left to learn.
      num_gradients: spent on finding out.
    """

    response: Params
    moved: jax.Array
    remainder: Params
    unanswered: jax.Array
    params: Params
    further: jax.Array
    residual: jax.Array
    base_grad: Params
    outer_grad: Params
    missing: jax.Array
    more: Params
    ahead: Params
    bend: jax.Array
    left: LeftToLearn
    num_gradients: jax.Array


def judge(nudging: Nudging, point: FreePoint, phases: Phases, remainder: Params) -> Judged:
    """Evaluate the losses between the phases, and along what their contrasts say is left.

    The phases go on learning: where they would have ended without a nudge is the free solution some steps later. The
    better learned of the two is the base point.

    The bend is 0 for quadratic losses, of the order of the displacement for smooth ones, and of order 1 where a kink
    or the rim of the basin lies between the phases. Two signs, the worse counts. The inner gradient at the mean of the
    phases' ends against the mean of their gradients, relative to the nudge. And, where learning had ended, how far the
    line through the phases' ends misses the free solution, relative to their displacement.

    Args:
      nudging: what the phases were to be.
      point: where the free phase ended.
      phases: what they left behind.
      remainder: the contrast of their residuals, or a better estimate of v - H u.
    """
    setting, scheme = nudging.setting, phases.scheme
    response, base = scheme.contrast(phases.params), phases.base
    nudges, _ = scheme.arrays(setting.dtype)
    mean_nudge = jnp.mean(jnp.real(nudges))
    # A linear nudge pulls everywhere as where learners set out: those run again do so from the free solution.
    pull = phases.base_outer[1]
    if isinstance(nudging.nudge, LinearNudge):
        pull = tree.where(phases.at_minima, point.outer_grad, pull)
    center, expected = mean_of(phases.params), tree.add_scaled(mean_of(phases.residual), -mean_nudge, pull)
    common = scheme.at_zero(phases.residual)
    distance, least = difference_step(setting, point)
    of_common = setting.norm(common)
    before, residual = setting.norm(point.inner_grad), setting.norm(phases.base_grad)
    better = residual < before
    residual = jnp.where(better, residual, before)
    outer_grad = tree.where(better, phases.base_outer[1], point.outer_grad)
    nudge = point.usual_nudge(outer_grad)
    # At the dtype's floor what is left to learn is noise, and excused.
    unlearned = residual > NOISE_FLOOR * point.noise
    # The phases of a symmetric scheme center on the base point, but for rounding.
    off_center = setting.norm(tree.subtract(center, base)) > 4 * point.eps * point.scale

    def evaluate(needed: jax.Array, at: Params) -> Params:
        return only_if(needed, lambda _: tree.grad(setting.inner)(at), phases.base_grad)

    def along(direction: Params, length: jax.Array) -> Params:
        return tree.add_scaled(base, distance / tree.or_one(length), direction)

    def product(grad: Params, length: jax.Array) -> Params:
        return tree.scale(length / distance, tree.subtract(grad, phases.base_grad))

    points = jax.tree.map(lambda *xs: jnp.stack(xs), center, along(common, of_common))
    needed = jnp.stack([off_center, unlearned])
    found, grad = tree.unstack(jax.lax.map(lambda x: evaluate(*x), (needed, points)), 2)
    # The step that is left goes down the gradient, by the curvature along what the phases have in common.
    length = newton_length(common, product(grad, of_common), least, of_common)
    length = jnp.where(unlearned, length * residual / tree.or_one(of_common), 0.0)
    learned, base_grad = tree.where(better, (base, phases.base_grad), (point.params, point.inner_grad))
    ahead = tree.add_scaled(learned, -length / tree.or_one(residual), base_grad)
    there = only_if(unlearned, lambda _: tree.grad(setting.outer)(ahead), outer_grad)
    change = tree.subtract(there, outer_grad)
    left = LeftToLearn(residual, length, setting.norm(change), setting.norm(outer_grad))

    # What is missing of the response answers what is left of the nudge, there.
    unanswered = setting.norm(scheme.contrast(phases.residual))
    sought = tree.add(remainder, change)
    of_sought = setting.norm(sought)
    grad = evaluate(of_sought > 0, along(sought, of_sought))
    missing = newton_length(sought, product(grad, of_sought), least, of_sought)
    more = tree.scale(missing / tree.or_one(of_sought), sought)
    # Truncation and the step ahead are no failures of the learner.
    missing = missing * jnp.minimum(unanswered / tree.or_one(of_sought), 1.0)
    strength = scheme.strength(setting.dtype)
    moved = setting.norm(response)
    of_gradient = setting.norm(tree.subtract(found, expected)) / (strength * jnp.maximum(nudge, setting.norm(pull)))
    off_line = tree.subtract(tree.add_scaled(center, -mean_nudge, response), point.params)
    of_path = setting.norm(off_line) / tree.or_one(strength * moved)
    # Before learning ends the phases drift on together, which bends nothing; no more does a base point that is better
    # learned, as along low curvature, where a small gradient has a long way to go.
    ended = _learning_ended(point, scheme) & ~better
    bend = jnp.maximum(of_gradient, jnp.where(ended, of_path, 0.0))
    spent = off_center + 2 * unlearned + (of_sought > 0)
    return Judged(
        response, moved, remainder, unanswered, learned, better, residual, base_grad, outer_grad,
        missing, more, ahead, bend, left, spent,
    )  # fmt: skip


def nudged_status(nudging: Nudging, point: FreePoint, phases: Phases, grad: MetaParams, judged: Judged) -> jax.Array:
    """What went wrong in the nudged phases, judged from the same contrast as the meta-gradient."""
    dtype, scheme = nudging.setting.dtype, phases.scheme
    nudge = point.usual_nudge(judged.outer_grad)
    unanswered = (judged.unanswered > UNANSWERED * nudge) | (judged.missing > UNANSWERED * judged.moved)
    gain = scheme.noise_gain(dtype)
    # A response that never came leaves a zero that any noise exceeds: that is not the noise's doing.
    drowned = (point.noise * gain * NOISE_FLOOR > nudge) | (
        (statistic_noise(point, phases.statistic) * gain * NOISE_FLOOR > tree.norm(grad)) & ~unanswered
    )
    anything = (point.nudge_norm > 0) | (tree.norm(judged.outer_grad) > 0)
    # H response = remainder - v: its product with the response is the curvature that the nudge met.
    met = tree.scale(1 / nudge, tree.subtract(judged.remainder, judged.outer_grad))
    indefinite = tree.vdot(tree.scale(1 / tree.or_one(judged.moved), judged.response), met) < -1e-3
    learned, finite = tree.all_finite((point.params, point.outer_grad)), tree.all_finite((grad, phases.params))
    coarse = judged.bend**scheme.order > _UNTRUNCATED
    unbounded = ran_away(point, phases) | (judged.bend > 0.5)
    return worst(
        flag(anything & coarse, Status.APPROXIMATE),
        flag(anything & unanswered, Status.NUDGED_NOT_CONVERGED),
        flag(anything & drowned, Status.LOST_IN_NOISE),
        flag(indefinite, Status.INDEFINITE_CURVATURE),
        flag((anything & unbounded & ~drowned) | (learned & ~finite), Status.UNBOUNDED_NUDGE),
        scheme.validity(dtype),
        flag(~learned, Status.NOT_FINITE),
    )


def ran_away(point: FreePoint, phases: Phases) -> jax.Array:
    """Whether a nudged loss has no minimum where its phase went.

    Phases that go on with unfinished learning may cross downward curvature that is not the nudge's.
    """
    ended = ~phases.at_minima | _learning_ended(point, phases.scheme)
    return jnp.any(phases.status >= Status.DIVERGED) | (ended & _curves_downwards(point, phases))


def _learning_ended(point: FreePoint, scheme: NudgeScheme) -> jax.Array:
    """Whether what the free phase left to learn is little beside what the nudges add."""
    strength = scheme.strength(point.scale.dtype)
    return tree.norm(point.inner_grad) < _ENDED * strength * tree.or_one(point.nudge_norm)


def _curves_downwards(point: FreePoint, phases: Phases) -> jax.Array:
    """Whether a nudged loss has negative mean curvature along the path of its own phase: it has no minimum there.

    Phases that learned set out from the free solution; those on a line from its base point, wherever that came from.
    """
    scheme = phases.scheme
    if scheme.is_complex:
        return jnp.asarray(False)
    unit = scheme.strength(point.scale.dtype) * tree.or_one(point.nudge_norm)
    origin, inner_grad, outer_grad = tree.where(
        phases.at_minima,
        (point.params, point.inner_grad, point.outer_grad),
        (phases.base, phases.base_grad, phases.base_outer[1]),
    )

    def curves(params: Params, residual: Params, beta: jax.Array) -> jax.Array:
        moved = tree.subtract(params, origin)
        start = tree.add_scaled(inner_grad, beta, outer_grad)
        turned = tree.subtract(residual, start)
        lengths = tree.norm(turned) * tree.norm(moved)
        return tree.vdot(tree.scale(1 / unit, turned), moved) * unit < -1e-2 * lengths

    nudges, _ = scheme.arrays(tree.float_dtype(point.inner_grad))
    return jnp.any(jax.vmap(curves)(phases.params, phases.residual, nudges) & (nudges != 0))
