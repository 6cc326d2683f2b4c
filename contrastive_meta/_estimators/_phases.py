"""The nudged phases: what they are to be, and what they left behind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._estimators._free_point import FreePoint, OuterEvaluated
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import AutomaticStrength, Nudge, NudgeScheme, NudgeStrength
from contrastive_meta._plasticity.autodiff import PlasticityRule, measured_by
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._response import Probe


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

    setting: Instance
    flattening: tree.Flattening
    tree_setting: Instance
    scheme: NudgeStrength
    nudge: Nudge
    rule: PlasticityRule
    sequential: bool
    response: Params
    chosen: jax.Array

    @property
    def sought(self) -> AutomaticStrength | None:
        """The scheme, if its strength is to be sought."""
        return self.scheme if isinstance(self.scheme, AutomaticStrength) else None

    def nudged(self, base: Params, outer_grad: Params) -> Instance:
        """The setting, for trees, whose outer loss is what nudges, from flattened `params` and outer gradient."""
        setting, unflatten = self.tree_setting, self.flattening.unflatten
        return setting.replace_problem(
            self.nudge.apply(setting.problem, unflatten(base), setting.meta_params, setting.task, unflatten(outer_grad))
        )

    def residuals(self, nudged: Instance, ends: Params, nudges: jax.Array) -> Params:
        """The gradient of each phase's loss, flattened, where it ended."""
        flat = nudged.flattened(self.flattening)
        return self.over_phases(lambda at, beta: tree.grad(lambda params: flat.nudged(params, beta))(at), ends, nudges)

    def measure(self, nudged: Instance, ends: Params, nudges: jax.Array) -> MetaParams:
        """The rule's statistic of each phase, where it ended; the rule sees trees."""
        problem, meta_params, task = nudged.problem, nudged.meta_params, nudged.task
        return self.over_phases(
            lambda at, beta: measured_by(self.rule, problem, self.flattening.unflatten(at), meta_params, task, beta),
            ends,
            nudges,
        )

    def evaluate(self, nudged: Instance, ends: Params, nudges: jax.Array) -> tuple[Params, MetaParams]:
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
            curvature=point.curvature,
            dtype=self.setting.dtype,
            eps=point.eps,
            chosen=self.chosen,
        )


class Assessed(NamedTuple):
    """What is made of phases, all scalars.

    Attributes:
      further: whether their base point is better learned than where the free phase ended.
      free_residual: as in `Diagnostics`, like the next two.
      nudged_residual: see there.
      displacement: see there.
      error: estimated relative error; NaN where none was made.
      doubling: what twice the strength changes in the meta-gradient and in what is left of the nudge, relative to each.
      status: of the phases and of the base point.
      num_gradients: spent on finding out.
    """

    further: jax.Array
    free_residual: jax.Array
    nudged_residual: jax.Array
    displacement: jax.Array
    error: jax.Array
    doubling: jax.Array
    status: jax.Array
    num_gradients: jax.Array

    @classmethod
    def nothing(cls, dtype: Any) -> "Assessed":
        """Before there is anything to assess."""
        unknown, none = jnp.asarray(jnp.inf, dtype), jnp.int32(0)
        return cls(jnp.asarray(False), unknown, unknown, unknown, unknown, unknown, none, none)


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
      assessed: what the last look at them made of them, where an accuracy was asked for, its gradients counted in
        `num_gradients`; else None (no leading axis).
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
    assessed: Assessed | None = None


class Goal(NamedTuple):
    """The accuracy asked for.

    Attributes:
      target_error: estimated relative error of the meta-gradient at which to stop.
      assess: what is made of phases.
      max_steps: most steps of each phase that are taken for it.
    """

    target_error: jax.Array
    assess: Callable[[Phases], Assessed]
    max_steps: Any

    def missed(self, assessed: Assessed) -> jax.Array:
        """Whether it was not reached."""
        return ~(assessed.error <= self.target_error)


def statistic_noise(point: FreePoint, statistic: MetaParams) -> jax.Array:
    """Rounding of a phase's statistic: as large, relative to itself, as the inner gradient's to what it is made of."""
    coarser = jnp.maximum(point.noise / tree.or_one(point.eps * point.curvature * point.scale), 1.0)
    return point.eps * coarser * tree.norm(mean_of(statistic)) / 4


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
    bent = tree.vdot(tree.scale(1 / unit, response), mean_of(residuals))
    share = bent / tree.or_one(jnp.abs(along) * scheme.strength(nudging.setting.dtype))
    return jnp.where(symmetric, jnp.abs(share), 0.0)


def on_line(base: Params, response: Params, nudges: jax.Array) -> Params:
    """Where phases end if learning is linear, base - beta_k u; in the precision of each leaf."""

    def end(at: jax.Array, u: jax.Array) -> jax.Array:
        dtype = jnp.result_type(at, jnp.complex64) if jnp.iscomplexobj(nudges) else at.dtype
        return at - nudges.astype(dtype).reshape(-1, *[1] * at.ndim) * u

    return jax.tree.map(end, base, response)


def mean_of(stacked: Any) -> Any:
    """The real part of the mean over phases."""
    return jax.tree.map(lambda xs: jnp.mean(jnp.real(xs), axis=0), stacked)
