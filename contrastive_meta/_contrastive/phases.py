"""The nudged phases: what they are to be, and the gradients of both losses where they end."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import BasePoint, OuterGradients, outer_gradients
from contrastive_meta._control import cast_like, cond, fori_loop, only_if
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import AutomaticStrength, LinearNudge, LossNudge, Nudge, NudgeScheme, NudgeStrength
from contrastive_meta._plasticity.autodiff import Autodiff, PlasticityRule, measured_by
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._response import Probe
from contrastive_meta._walls import Walls


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
        return cls(
            nudges,
            weights / largest,
            largest,
            scheme.weights_at_zero(dtype),
            scheme.noise_gain(dtype) * strength,
            jnp.abs(jnp.mean(nudges)) < 1e-3,
        )

    def contrast(self, measured: Any, beta: jax.Array) -> Any:
        """Re sum_k w_k measured_k over the leading axis of phases, theory (8), at strength beta."""

        def weigh(values: jax.Array) -> jax.Array:
            total = jnp.real(jnp.sum(_along(self.ratios, values) * values, axis=0))
            return (self.largest / beta).astype(total.dtype) * total

        return jax.tree.map(weigh, measured)

    def at_zero(self, measured: Any) -> Any:
        """What would be measured without a nudge, by interpolation."""
        return jax.tree.map(lambda xs: jnp.real(jnp.sum(_along(self.zeros, xs) * xs, axis=0)), measured)


def _along(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Weights of phases, to be multiplied with values stacked along the leading axis, in their precision."""
    dtype = jnp.real(values).dtype
    dtype = tree.promoted(dtype, jnp.complex64) if jnp.iscomplexobj(weights) else dtype
    return weights.astype(dtype).reshape(-1, *[1] * (values.ndim - 1))


class PhaseSetup(NamedTuple):
    """What the phases of an estimate are to be; the same for all of its passes.

    Attributes:
      instance: the problem, its `params` flattened.
      tree_instance: the problem with `params` as a tree; in the coordinates of walls, if there are any.
      as_written: the problem as the user wrote it.
      flattening: of `params`; solvers and rules see the tree.
      start: the end of the free phase.
      units: see `BasePoint.units`.
      scheme: the strengths, or a way to find them.
      stencil: the scheme as arrays.
      nudge: what is added to the inner loss of phases.
      rule: what is measured.
      sequential: one phase after another, instead of all at once.
      guess: the response of an earlier estimate; zeros where there is none.
      displacement: the strength that an earlier estimate found best, as the part of the length of `params` that it
        moves; 0 for none.
      may_rerun: whether the solver may run phases.
      estimate_error: whether to estimate an error.
      walls: the coordinates that `params` are, where the learner has walls; else None.
    """

    instance: Instance
    tree_instance: Instance
    as_written: Instance
    flattening: tree.Flattening
    start: BasePoint
    units: jax.Array
    scheme: NudgeStrength
    stencil: Stencil
    nudge: Nudge
    rule: PlasticityRule
    sequential: bool
    guess: Params
    displacement: jax.Array
    may_rerun: bool
    estimate_error: bool
    walls: Walls | None = None

    @property
    def dtype(self) -> Any:
        """Of scalars."""
        return self.instance.dtype

    def norms(
        self,
        gradients: Sequence[Params] = (),
        nudges: Sequence[Params] = (),
        responses: Sequence[Params] = (),
        steps: Sequence[Params] = (),
    ) -> jax.Array:
        """Norms of gradients of the inner loss, of nudges and their residuals, of responses, of steps: in turn."""
        kinds = np.repeat(np.arange(4), [len(gradients), len(nudges), len(responses), len(steps)])
        units = self.units[kinds[0]] if len(set(kinds)) == 1 else self.units[kinds]
        return tree.norms(*gradients, *nudges, *responses, *steps, units=units).astype(self.dtype)

    def norm(self, gradient: Params) -> jax.Array:
        """The norm of a gradient of the inner loss."""
        return self.norms([gradient])[0]

    def norm_of_nudge(self, nudge: Params) -> jax.Array:
        """The norm of a nudge, or of its residual."""
        return self.norms(nudges=[nudge])[0]

    def statistic_norms(self, *contrasts: MetaParams) -> jax.Array:
        """Norms of what is like a meta-gradient."""
        return tree.norms(*contrasts, units=self.units[4]).astype(self.dtype)

    @property
    def sought(self) -> bool:
        """Whether the strength is sought."""
        return isinstance(self.scheme, AutomaticStrength)

    @property
    def order(self) -> int:
        """Of the scheme's truncation."""
        return self.scheme.template().order

    def strength_for(self, base: "Base", displacement: Any, length: Any) -> jax.Array:
        """The strength for a response of a length; where it is sought, at the displacement found last time."""
        probe = self.probe(base.params, base.inner_grad, displacement)
        return self.scheme.for_response(probe, length).strength(self.dtype)

    def crosses_walls(self, base: Params, response: Params, strength: Any) -> jax.Array:
        """Whether phases of a strength on the line base - beta_k u end behind another wall than the base point."""
        if self.walls is None or tree.is_complex(self.stencil.nudges):
            return jnp.asarray(False)
        walls, unflatten = self.walls, self.flattening.unflatten
        ends = on_line(base, response, strength * self.stencil.nudges)
        return jnp.any(jax.lax.map(lambda end: ~walls.same_piece(unflatten(base), unflatten(end)), ends))

    def statistic_noise(self, size: jax.Array) -> jax.Array:
        """Rounding noise of a phase's statistic of a size.

        The noise relative to the statistic is taken to be that of the inner gradient relative to its own terms.
        """
        start = self.start
        coarser = jnp.maximum(start.noise / tree.or_one(start.eps * start.curvature * start.scale), 1.0)
        return start.eps * coarser * size / 4

    def over_phases(self, function: Callable[..., Any], *stacked: Any) -> Any:
        """`function` of each phase, whose values are stacked along the leading axis."""
        if self.sequential:
            return jax.lax.map(lambda phase: function(*phase), stacked)
        return jax.vmap(function)(*stacked)

    def nudged_problem(self, base: Base, nudge: Nudge) -> Instance:
        """The problem of `tree_instance`, with what nudges in the place of its outer loss."""
        instance, unflatten = self.tree_instance, self.flattening.unflatten
        at = unflatten(base.params), instance.meta_params, instance.task, unflatten(base.of_outer_loss)
        return instance.replace_problem(nudge.apply(instance.problem, *at))

    def nudged_problem_of_rules(self, base: Base, nudge: Nudge) -> tuple[Instance, Callable[[Params], Params]]:
        """The nudged problem as the user wrote it, and the user's parameters at a point."""
        if self.walls is None:
            return self.nudged_problem(base, nudge), self.flattening.unflatten
        instance, coordinates = self.as_written, self.walls.params_of
        problem, meta_params, task = instance.problem, instance.meta_params, instance.task

        def params_of(x: Params) -> Params:
            return coordinates(self.flattening.unflatten(x), meta_params)

        at = params_of(base.params)
        gradient = tree.grad(lambda params: problem.outer(params, meta_params, task))(at)
        return instance.replace_problem(nudge.apply(problem, at, meta_params, task, gradient)), params_of

    def probe(self, params: Params, inner_grad: Params, displacement: jax.Array) -> Probe:
        """What a nudging strength is derived from."""
        start = self.start
        return Probe(
            inner_grad=tree.grad(self.instance.inner),
            params=params,
            free_grad=inner_grad,
            outer_grad=start.outer_grad,
            nudge_norm=start.nudge_norm,
            scale=start.scale,
            noise=start.noise,
            curvature=start.curvature,
            dtype=self.dtype,
            eps=start.eps,
            chosen=displacement,
        )

    def outer_at(self, params: Params) -> tuple[OuterGradients, Params]:
        """`Base.outer` and `Base.outer_grad` at a point."""
        outer = outer_gradients(self.instance, params)
        if isinstance(self.nudge, LinearNudge | LossNudge):
            return outer, ()
        base = Base(params, outer.in_params, outer)
        own = outer_gradients(self.nudged_problem(base, self.nudge).flattened(self.flattening), params)
        return outer._replace(in_params=own.in_params, in_meta=own.in_meta), outer.in_params

    def evaluate(self, base: Base, ends: Params, nudges: jax.Array, at_base: jax.Array, linear: jax.Array) -> Evaluated:
        """Gradients of the phases' own losses in `params` and in the meta-parameters, where the phases ended.

        The inner loss has one call site here, and the outer loss has one. Both serve the base point as well: there all
        phases are at the same point, and the outer loss is evaluated once.

        Args:
          base: from which the phases are nudged; its outer gradients are replaced where `at_base`.
          ends: where the phases ended, a leading axis of phases.
          nudges: their strengths.
          at_base: whether this is the base point itself.
          linear: whether the nudge is linear.
        """
        nudge, autodiff = self.nudge, isinstance(self.rule, Autodiff)

        def inner(params: Params) -> Any:
            meta_params = self.instance.meta_params
            if not autodiff:
                return tree.grad(self.instance.inner)(params), ()
            meta_params = tree.to_complex(meta_params) if tree.is_complex(params) else meta_params
            task, problem = self.instance.task, self.instance.problem
            return tree.grad(lambda at, meta: problem.inner(at, meta, task), (0, 1))(params, meta_params)

        in_params, in_meta = self.over_phases(inner, ends)
        outer, outer_grad = self._outer(base, ends, at_base, nudge, linear, nudges.size)

        def with_nudge(gradient: jax.Array, pulls: jax.Array) -> jax.Array:
            weights = nudges.astype(gradient.dtype).reshape(-1, *[1] * (gradient.ndim - 1))
            return gradient + weights * pulls.astype(gradient.dtype)

        residuals = jax.tree.map(with_nudge, in_params, outer.in_params)
        if autodiff:
            return Evaluated(residuals, jax.tree.map(with_nudge, in_meta, outer.in_meta), outer, outer_grad)

        def statistics_with(chosen: Nudge) -> MetaParams:
            nudged, params_of = self.nudged_problem_of_rules(base, chosen)
            return self.over_phases(
                lambda at, beta: measured_by(
                    self.rule, nudged.problem, params_of(at), nudged.meta_params, nudged.task, beta
                ),
                ends,
                nudges,
            )

        if isinstance(nudge, LossNudge):
            # Not a nudge that branches: a rule cannot listen to a network within a branch of the loss.
            statistics = cond(linear, lambda: statistics_with(LinearNudge()), lambda: statistics_with(LossNudge()))
        else:
            statistics = statistics_with(nudge)
        return Evaluated(residuals, statistics, outer, outer_grad)

    def _outer(
        self, base: Base, ends: Params, at_base: jax.Array, nudge: Nudge, linear: jax.Array, number: int
    ) -> tuple[OuterGradients, Params]:
        """`Base.outer` and `Base.outer_grad` at each end; those of `base` where the nudge is linear."""

        def repeated(values: Any) -> Any:
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *jnp.shape(x))), values)

        if isinstance(nudge, LinearNudge):
            # The outer loss is not evaluated but at the base point.
            def evaluate_base(known: Any) -> Any:
                at = jax.tree.map(lambda xs, x: jnp.real(xs[0]).astype(x.dtype), ends, base.params)
                return cast_like(self.outer_at(at), known)

            of_base: tuple[OuterGradients, Params] = repeated(
                only_if(at_base, evaluate_base, (base.outer, base.outer_grad))
            )
            return of_base
        known = repeated((base.outer, base.outer_grad))
        if tree.is_complex(ends):
            return self._complex_outer(base, ends, at_base, nudge, known)
        count = jnp.where(at_base, 1, jnp.where(linear, 0, number))

        def evaluate(k: jax.Array, found: Any) -> Any:
            values = self.outer_at(jax.tree.map(lambda xs: xs[k], ends))
            return jax.tree.map(lambda xs, x: xs.at[k].set(jnp.asarray(x, xs.dtype)), found, values)

        found: tuple[OuterGradients, Params] = fori_loop(0, count, evaluate, known)
        return found

    def _complex_outer(
        self, base: Base, ends: Params, at_base: jax.Array, nudge: Nudge, known: Any
    ) -> tuple[OuterGradients, Params]:
        """The gradients of what nudges at complex points; at the base point, which is real, the outer loss as well."""
        instance = self.nudged_problem(base, nudge).flattened(self.flattening)
        meta_params = tree.to_complex(instance.meta_params)

        def gradients(at: Params) -> Any:
            return tree.grad(lambda p, meta: instance.problem.outer(p, meta, instance.task), (0, 1))(at, meta_params)

        def evaluate_base(of_base: Any) -> Any:
            at = jax.tree.map(lambda xs, x: jnp.real(xs[0]).astype(x.dtype), ends, base.params)
            values = self.outer_at(at)
            return jax.tree.map(lambda xs, x: jnp.broadcast_to(jnp.asarray(x, xs.dtype), xs.shape), of_base, values)

        outer, outer_grad = only_if(at_base, evaluate_base, known)
        in_params, in_meta = self.over_phases(gradients, ends)
        return outer._replace(in_params=in_params, in_meta=in_meta), outer_grad


def on_line(base: Params, response: Params, nudges: jax.Array) -> Params:
    """Where phases end if learning is linear, base - beta_k u; in the precision of each leaf."""

    def end(at: jax.Array, u: jax.Array) -> jax.Array:
        dtype = tree.promoted(at, jnp.complex64) if jnp.iscomplexobj(nudges) else at.dtype
        return at[None] - nudges.astype(dtype).reshape(-1, *[1] * at.ndim) * u[None]

    return jax.tree.map(end, base, response)


def mean_of(stacked: Any) -> Any:
    """The real part of the mean over phases."""
    return jax.tree.map(lambda xs: jnp.mean(jnp.real(xs), axis=0), stacked)
