"""The nudged phases: what they are to be, and the gradients of both losses where they end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import BasePoint, OuterGradients, outer_gradients
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import AutomaticStrength, LinearNudge, LossNudge, Nudge, NudgeInPlace, NudgeScheme, NudgeStrength
from contrastive_meta._plasticity.autodiff import Autodiff, PlasticityRule, measured_by
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._response import Probe


class Base(NamedTuple):
    """A point and what both losses say there.

    Attributes:
      params: the point, flattened.
      inner_grad: gradient of the inner loss.
      outer: the outer loss with its aux, and the gradients of what nudges: those of the outer loss unless the user
        wrote a nudge of their own.
      outer_grad: gradient of the outer loss where the user wrote a nudge of their own, else ().
    """

    params: Params
    inner_grad: Params
    outer: OuterGradients
    outer_grad: Params = ()

    @property
    def of_outer_loss(self) -> Params:
        """The gradient of the outer loss."""
        return self.outer_grad if jax.tree.leaves(self.outer_grad) else self.outer.in_params


class Evaluated(NamedTuple):
    """What the phases of one strength measure, along a leading axis of phases.

    Attributes:
      residuals: gradient of each phase's own loss in `params`.
      statistics: what the plasticity rule measures.
      outer: the outer loss, and the gradients of what nudges.
      outer_grad: as in `Base`.
    """

    residuals: Params
    statistics: MetaParams
    outer: OuterGradients
    outer_grad: Params


class Stencil(NamedTuple):
    """A scheme at the strength 1, as arrays.

    Attributes:
      nudges: strength of each phase.
      ratios: weight of each phase over the largest; equal weights are exactly +-1, so that nearly equal numbers are
        subtracted before anything is multiplied.
      largest: the largest weight.
      zeros: weights of the polynomial through all phases at strength 0, see `NudgeScheme.at_zero`.
      gain: what a contrast multiplies independent noise of its phases by.
      symmetric: whether the strengths cancel.
    """

    nudges: jax.Array
    ratios: jax.Array
    largest: jax.Array
    zeros: jax.Array
    gain: jax.Array
    symmetric: jax.Array

    @classmethod
    def of(cls, scheme: NudgeScheme, dtype: Any) -> "Stencil":
        """Of a scheme of any strength."""
        strength = tree.or_one(scheme.strength(dtype))
        nudges, weights = scheme.arrays(dtype)
        nudges, weights = nudges / strength, weights * strength
        largest = jnp.max(jnp.abs(weights))
        number = len(scheme.nudges)
        return cls(
            nudges,
            weights / largest,
            largest,
            jnp.asarray(scheme.at_zero(jnp.eye(number, dtype=nudges.dtype)), jnp.real(nudges).dtype),
            scheme.noise_gain(dtype) * strength,
            jnp.abs(jnp.mean(nudges)) < 1e-3,
        )

    def contrast(self, measured: Any, beta: jax.Array) -> Any:
        """Re sum_k w_k measured_k over the leading axis of phases, theory (8), at strength beta."""

        def weigh(values: jax.Array) -> jax.Array:
            ratios = self.ratios.reshape(-1, *[1] * (values.ndim - 1)).astype(values.dtype)
            total = jnp.real(jnp.sum(ratios * values, axis=0))
            return (self.largest / beta).astype(total.dtype) * total

        return jax.tree.map(weigh, measured)

    def at_zero(self, measured: Any) -> Any:
        """What would be measured without a nudge, by interpolation."""
        return jax.tree.map(lambda xs: jnp.tensordot(self.zeros.astype(jnp.real(xs).dtype), jnp.real(xs), 1), measured)


class PhaseSetup(NamedTuple):
    """What the phases of an estimate are to be; the same for all of its passes.

    Attributes:
      instance: the problem, its `params` flattened.
      tree_instance: the problem as the user wrote it.
      flattening: of `params`; solvers and rules see the tree.
      start: the end of the free phase.
      scheme: the strengths, or a way to find them.
      stencil: the scheme as arrays.
      nudge: what is added to the inner loss of phases on a line.
      rerun_nudge: what is added to the inner loss of phases that the solver runs.
      rule: what is measured.
      sequential: one phase after another, instead of all at once.
      guess: the response of an earlier estimate; zeros where there is none.
      displacement: the strength that an earlier estimate found best, as the part of the length of `params` that it
        moves; 0 for none.
      may_rerun: whether the solver may run phases.
      estimate_error: whether to estimate an error.
    """

    instance: Instance
    tree_instance: Instance
    flattening: tree.Flattening
    start: BasePoint
    scheme: NudgeStrength
    stencil: Stencil
    nudge: Nudge
    rerun_nudge: Nudge
    rule: PlasticityRule
    sequential: bool
    guess: Params
    displacement: jax.Array
    may_rerun: bool
    estimate_error: bool

    @property
    def dtype(self) -> Any:
        """Of scalars."""
        return self.instance.dtype

    @property
    def sought(self) -> bool:
        """Whether the strength is sought."""
        return isinstance(self.scheme, AutomaticStrength)

    @property
    def order(self) -> int:
        """Of the scheme's truncation."""
        return self.scheme.template().order

    @property
    def may_linearise(self) -> bool:
        """Whether phases may be nudged by the outer loss and, elsewhere, by its linearisation."""
        return self.may_rerun and isinstance(self.rerun_nudge, LossNudge)

    def strength_for(self, base: "Base", displacement: Any, length: Any) -> jax.Array:
        """The strength for a response of a length; where it is sought, at the displacement found last time."""
        probe = self.probe(base.params, base.inner_grad, displacement)
        return self.scheme.for_response(probe, length).strength(self.dtype)
