"""What the phases of a scheme left behind, and what went wrong in them if anything did."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import only_if
from contrastive_meta._estimators._free_point import (
    NOISE_FLOOR,
    UNANSWERED,
    FreePoint,
    LeftToLearn,
    OuterEvaluated,
    difference_step,
    newton_length,
)
from contrastive_meta._estimators.base import Setting
from contrastive_meta._nudging import Nudge, NudgeScheme, NudgeStrength
from contrastive_meta._plasticity.autodiff import PlasticityRule, measured_by
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._response import Probe
from contrastive_meta._result import Status, flag, worst

# The truncation error of a scheme of order p is of the order of bend^p.
UNTRUNCATED = 1e-2
# Learning has ended, next to a nudge, when its residual is below this part of what the nudge adds.
ENDED = 1e-3


class Nudging(NamedTuple):
    """What the phases of an estimate are to be.

    Attributes:
      setting: the problem, its `params` flattened.
      flattening: of `params`; learners and rules see the tree.
      tree_setting: the problem as the user wrote it.
      scheme: the strengths, or a way to find them.
      nudge: what is added to the inner loss.
      rule: what is measured.
      sequential: one phase after another, instead of all at once.
      response: u of an earlier estimate, to start from; zeros where there is none.
      chosen: the displacement found best by an earlier estimate, relative to the length of `params`; 0 for none.
    """

    setting: Setting
    flattening: tree.Flattening
    tree_setting: Setting
    scheme: NudgeStrength
    nudge: Nudge
    rule: PlasticityRule
    sequential: bool
    response: Params
    chosen: jax.Array

    def nudged(self, base: Params, outer_grad: Params) -> Setting:
        """The setting, for trees, whose outer loss is what nudges, from flattened `params` and outer gradient."""
        setting, unflatten = self.tree_setting, self.flattening.unflatten
        return setting.replace_problem(
            self.nudge.apply(setting.problem, unflatten(base), setting.meta_params, setting.task, unflatten(outer_grad))
        )

    def residuals(self, nudged: Setting, ends: Params, nudges: jax.Array) -> Params:
        """The gradient of each phase's loss, flattened, where it ended."""
        flat = nudged.flattened(self.flattening)
        return self.over_phases(lambda at, beta: tree.grad(lambda params: flat.nudged(params, beta))(at), ends, nudges)

    def measure(self, nudged: Setting, ends: Params, nudges: jax.Array) -> MetaParams:
        """The rule's statistic of each phase, where it ended; the rule sees trees."""
        problem, meta_params, task = nudged.problem, nudged.meta_params, nudged.task
        return self.over_phases(
            lambda at, beta: measured_by(self.rule, problem, self.flattening.unflatten(at), meta_params, task, beta),
            ends,
            nudges,
        )

    def evaluate(self, nudged: Setting, ends: Params, nudges: jax.Array) -> tuple[Params, MetaParams]:
        """Residual and statistic of each phase: two derivatives of one evaluation, where both are asked for."""
        return self.residuals(nudged, ends, nudges), self.measure(nudged, ends, nudges)

    def over_phases(self, function: Callable[..., Any], *stacked: Any) -> Any:
        """`function` of each phase, whose values are stacked along the leading axis."""
        if self.sequential:
            return jax.lax.map(lambda phase: function(*phase), stacked)
        return jax.vmap(function)(*stacked)

    def probe(self, point: FreePoint) -> Probe:
        """The free solution as a pilot sees it."""
        return Probe(
            inner_grad=tree.grad(self.setting.inner),
            params=point.params,
            free_grad=point.inner_grad,
            outer_grad=point.outer_grad,
            nudge_norm=point.nudge_norm,
            scale=point.scale,
            noise=point.noise,
            dtype=self.setting.dtype,
            eps=point.eps,
            chosen=self.chosen,
        )


class Phases(NamedTuple):
    """What the phases of a scheme left behind; but for `scheme` every leaf has a leading axis of phases.

    Attributes:
      scheme: strengths and weights.
      params: where each phase ended.
      statistic: what the plasticity rule measured there.
      residual: gradient of the phase's own loss there.
      status: of each phase's solver.
      base: where the phases would have ended without a nudge (no leading axis).
      base_grad: gradient of the inner loss there (no leading axis).
      base_outer: outer loss, its aux and its gradient there (no leading axis).
      num_gradients: of all phases together (no leading axis).
      chosen: the displacement that was looked for and found best, relative to the length of `params`; else 0 (no
        leading axis).
      at_minima: whether phases went to the minima of their own losses, not put on a line (no leading axis).
    """

    scheme: NudgeScheme
    params: Params
    statistic: MetaParams
    residual: Params
    status: jax.Array
    base: Params
    base_grad: Params
    base_outer: OuterEvaluated
    num_gradients: jax.Array
    chosen: jax.Array
    at_minima: jax.Array


class Goal(NamedTuple):
    """The accuracy asked for.

    Attributes:
      target_error: estimated relative error of the meta-gradient at which to stop.
      error: estimates it from phases, and says how many gradients that took.
      max_steps: most steps of each phase that are taken for it.
    """

    target_error: jax.Array
    error: Callable[[Phases], tuple[jax.Array, jax.Array]]
    max_steps: Any


class Judged(NamedTuple):
    """The contrasts of the phases, where the meta-gradient was taken, and what was left there.

    Attributes:
      response: contrast of where the phases ended: dphi/dbeta = -u.
      moved: norm of the response.
      remainder: v - H u, what is left of the nudge, as it was given.
      unanswered: norm of the contrast of their residuals, the same but for truncation.
      params: the base point: the free solution, or what the phases made of it where that is better learned.
      residual: norm of the inner gradient there.
      base_grad: that gradient.
      outer_grad: there.
      outer_loss: there.
      aux: of the outer loss, there.
      missing: length of what is at least missing of the response, see `newton_length`.
      more: that part of the response, a step down the remainder.
      ahead: the base point after the step that is at least left to learn.
      outer_grad_ahead: there.
      bend: how far learning is from linear over the span of the phases, see `judge`.
      left: what was left to learn.
      num_gradients: spent on finding out.
    """

    response: Params
    moved: jax.Array
    remainder: Params
    unanswered: jax.Array
    params: Params
    residual: jax.Array
    base_grad: Params
    outer_grad: Params
    outer_loss: jax.Array
    aux: Any
    missing: jax.Array
    more: Params
    ahead: Params
    outer_grad_ahead: Params
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
    center, expected = _mean(phases.params), tree.add_scaled(_mean(phases.residual), -mean_nudge, point.outer_grad)
    common = scheme.at_zero(phases.residual)
    distance, least = difference_step(setting, point)
    nudge, usual = tree.or_one(point.nudge_norm), point.usual_grad
    of_common = tree.norm_in(usual, common)
    before, residual = tree.norm_in(usual, point.inner_grad), tree.norm_in(usual, phases.base_grad)
    better = residual < before
    residual = jnp.where(better, residual, before).astype(setting.dtype)
    # At the dtype's floor what is left to learn is noise, and excused.
    unlearned = residual > NOISE_FLOOR * point.noise
    # The phases of a symmetric scheme center on the base point, but for rounding.
    off_center = tree.norm_in(point.scale, tree.subtract(center, base)) > 4 * point.eps * point.scale

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
    (outer_loss, aux), outer_grad = tree.where(better, phases.base_outer, point.outer)
    there = only_if(unlearned, lambda _: tree.grad(setting.outer)(ahead), outer_grad)
    change = tree.subtract(there, outer_grad)
    left = LeftToLearn(residual, length, tree.norm_in(nudge, change), tree.norm_in(nudge, outer_grad))

    # What is missing of the response answers what is left of the nudge, there.
    unanswered = tree.norm_in(nudge, scheme.contrast(phases.residual))
    sought = tree.add(remainder, change)
    of_sought = tree.norm_in(nudge, sought)
    grad = evaluate(of_sought > 0, along(sought, of_sought))
    missing = newton_length(sought, product(grad, of_sought), least, of_sought)
    more = tree.scale(missing / tree.or_one(of_sought), sought)
    # Truncation and the step ahead are no failures of the learner.
    missing = missing * jnp.minimum(unanswered / tree.or_one(of_sought), 1.0)
    strength = scheme.strength(setting.dtype)
    moved = tree.norm_in(point.scale / tree.or_one(strength), response)
    of_gradient = tree.norm_in(usual, tree.subtract(found, expected)) / (strength * nudge)
    off_line = tree.subtract(tree.add_scaled(center, -mean_nudge, response), point.params)
    of_path = tree.norm_in(point.scale, off_line) / tree.or_one(strength * moved)
    # Before learning ends the phases drift on together, which bends nothing.
    ended = before < ENDED * strength * nudge
    bend = jnp.maximum(of_gradient, jnp.where(ended, of_path, 0.0))
    spent = off_center + 2 * unlearned + (of_sought > 0)
    return Judged(
        response, moved, remainder, unanswered, learned, residual, base_grad, outer_grad, outer_loss, aux,
        missing, more, ahead, there, bend, left, spent,
    )  # fmt: skip


def nudged_status(nudging: Nudging, point: FreePoint, phases: Phases, grad: MetaParams, judged: Judged) -> jax.Array:
    """What went wrong in the nudged phases, judged from the same contrast as the meta-gradient."""
    dtype, scheme = nudging.setting.dtype, phases.scheme
    nudge = tree.or_one(point.nudge_norm)
    unanswered = (judged.unanswered > UNANSWERED * nudge) | (judged.missing > UNANSWERED * judged.moved)
    gain = scheme.noise_gain(dtype)
    # A response that never came leaves a zero that any noise exceeds: that is not the noise's doing.
    drowned = (point.noise * gain * NOISE_FLOOR > nudge) | (
        (statistic_noise(point, phases.statistic) * gain * NOISE_FLOOR > tree.norm(grad)) & ~unanswered
    )
    anything = point.nudge_norm > 0
    # H response = remainder - v: its product with the response is the curvature that the nudge met.
    met = tree.scale(1 / nudge, tree.subtract(judged.remainder, judged.outer_grad))
    indefinite = tree.vdot(tree.scale(1 / tree.or_one(judged.moved), judged.response), met) < -1e-3
    learned, finite = tree.all_finite((point.params, point.outer_grad)), tree.all_finite((grad, phases.params))
    coarse = judged.bend**scheme.order > UNTRUNCATED
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


def statistic_noise(point: FreePoint, statistic: MetaParams) -> jax.Array:
    """Rounding of a phase's statistic: as large, relative to itself, as the inner gradient's to what it is made of."""
    coarser = jnp.maximum(point.noise / tree.or_one(point.eps * point.curvature * point.scale), 1.0)
    return point.eps * coarser * tree.norm(_mean(statistic)) / 4


def stiffening(
    nudging: Nudging, point: FreePoint, scheme: NudgeScheme, residuals: Params, response: Params
) -> jax.Array:
    """What the nudges of a symmetric scheme add to the curvature along the response, relative to it.

    On the line base - beta u the phases' gradients have -beta^2 C u in common, C the curvature of what nudges; so
    beta u'Cu / u'v, where u'v = u'Hu, is the share by which a nudge stiffens what answers it. It cancels from the
    contrast of a line, but phases that go to their own minima answer (1 +- share) times less: an error of share^2.

    Args:
      nudging: what the phases are to be.
      point: where the free phase ended.
      scheme: of the phases.
      residuals: of phases on the line, less what is left there without a nudge.
      response: u.
    """
    nudges, _ = scheme.arrays(nudging.setting.dtype)
    symmetric = jnp.abs(jnp.mean(nudges)) < 1e-3 * jnp.max(jnp.abs(nudges))
    unit = tree.or_one(tree.norm(response) * point.nudge_norm)
    along = tree.vdot(tree.scale(1 / unit, response), point.outer_grad)
    bent = tree.vdot(tree.scale(1 / unit, response), _mean(residuals))
    share = bent / tree.or_one(jnp.abs(along) * scheme.strength(nudging.setting.dtype))
    return jnp.where(symmetric, jnp.abs(share), 0.0)


def on_line(base: Params, response: Params, nudges: jax.Array) -> Params:
    """Where phases end if learning is linear, base - beta_k u; in the precision of each leaf."""

    def end(at: jax.Array, u: jax.Array) -> jax.Array:
        dtype = jnp.result_type(at, jnp.complex64) if jnp.iscomplexobj(nudges) else at.dtype
        return at - nudges.astype(dtype).reshape(-1, *[1] * at.ndim) * u

    return jax.tree.map(end, base, response)


def ran_away(point: FreePoint, phases: Phases) -> jax.Array:
    """Whether a nudged loss has no minimum where its phase went."""
    return jnp.any(phases.status >= Status.DIVERGED) | _curves_downwards(point, phases)


def _curves_downwards(point: FreePoint, phases: Phases) -> jax.Array:
    """Whether a nudged loss has negative mean curvature along the path of its own phase: it has no minimum there."""
    scheme = phases.scheme
    if scheme.is_complex:
        return jnp.asarray(False)
    unit = scheme.strength(point.scale.dtype) * tree.or_one(point.nudge_norm)

    def curves(params: Params, residual: Params, beta: jax.Array) -> jax.Array:
        moved = tree.subtract(params, point.params)
        start = tree.add_scaled(point.inner_grad, beta, point.outer_grad)
        turned = tree.subtract(residual, start)
        lengths = tree.norm_in(unit, turned) * tree.norm_in(point.scale, moved)
        return tree.vdot(tree.scale(1 / unit, turned), moved) * unit < -1e-2 * lengths

    nudges, _ = scheme.arrays(tree.float_dtype(point.inner_grad))
    return jnp.any(jax.vmap(curves)(phases.params, phases.residual, nudges) & (nudges != 0))


def _mean(stacked: Any) -> Any:
    """The real part of the mean over phases."""
    return jax.tree.map(lambda xs: jnp.mean(jnp.real(xs), axis=0), stacked)
