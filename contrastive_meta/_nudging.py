"""How learning is nudged: schemes (strengths and contrast weights as data), nudges, and a strength measured by a pilot."""

import abc
import cmath
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Status, Task, flag
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._response import Probe, measure_response


class NudgeStrength(abc.ABC):
    """What `Contrastive` takes as its `scheme`: a `NudgeScheme`, or a way to find one from the free phase."""

    @abc.abstractmethod
    def resolve(self, probe: Probe) -> tuple["NudgeScheme", jax.Array]:
        """The scheme to use, and the number of gradients spent to find it."""

    @abc.abstractmethod
    def template(self) -> "NudgeScheme":
        """A scheme of the same structure, whatever its strength."""


@strategy
class NudgeScheme(NudgeStrength):
    """Phases and how they are contrasted: estimate = Re sum_k weights_k g(nudges_k), algorithm (8).

    Args:
      nudges: strength beta_k of each phase, in the units of `outer_loss`.
      weights: weight w_k of each phase; Re sum w = 0 and sum w beta = 1.
      order: power p of the truncation error O(beta^p).
      free_phase: index of the phase whose strength is 0, or None.
      matched: whether the free phase of the scheme runs again, for as long as the nudged ones (the matched
        control), so that leftover relaxation cancels; otherwise the free-phase solution itself is contrasted.

    Raises:
      ValueError: the weights are not those of a derivative, where the numbers are concrete; traced numbers
        give `Status.INVALID_SCHEME` instead.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.NudgeScheme((0.1, -0.1), (5.0, -5.0), order=2) == cm.central_difference(0.1)
      True
    """

    nudges: tuple[Number, ...]
    weights: tuple[Number, ...]
    order: int = static(default=1)
    free_phase: int | None = static(default=None)
    matched: bool = static(default=True)

    def __post_init__(self) -> None:
        """Check the weights where they are concrete."""
        if len(self.nudges) != len(self.weights) or not self.nudges:
            raise ValueError(
                f"A scheme needs as many weights as nudges; got {len(self.nudges)} nudges "
                f"and {len(self.weights)} weights."
            )
        if all(_is_concrete(number) for number in (*self.nudges, *self.weights)):
            nudges, weights = np.array(self.nudges), np.array(self.weights)
            total, unit = float(np.max(np.abs(_total(weights)))), float(np.max(np.abs(_unit(nudges, weights) - 1)))
            if not total <= _SLACK * float(np.max(np.abs(weights))) or not unit <= _SLACK:
                raise ValueError(
                    "The weights of a scheme must satisfy Re sum_k w_k = 0 and sum_k w_k beta_k = 1; got "
                    f"Re sum = {total:.3g} and sum w beta off by {unit:.3g}, for nudges {self.nudges} and "
                    f"weights {self.weights}. Use `central_difference(beta)` or its like, with a nonzero beta."
                )

    def resolve(self, probe: Probe) -> tuple["NudgeScheme", jax.Array]:
        """The scheme itself: a strength that is typed is raw."""
        return self, jnp.int32(0)

    def template(self) -> "NudgeScheme":
        """The scheme itself."""
        return self

    @property
    def is_complex(self) -> bool:
        """Whether any phase is complex."""
        return any(jnp.iscomplexobj(number) for number in (*self.nudges, *self.weights))

    def strength(self, dtype: Any) -> jax.Array:
        """The smallest nonzero |beta_k|, the beta by which the scheme is known."""
        sizes = [abs(beta) for k, beta in enumerate(self.nudges) if k != self.free_phase]
        return jnp.min(jnp.stack([jnp.asarray(size, dtype) for size in sizes]))

    def scaled(self, factor: Any) -> "NudgeScheme":
        """The scheme with every nudge multiplied by `factor`: the weights shrink with it."""
        nudges = tuple(beta * factor for beta in self.nudges)
        weights = tuple(weight / factor for weight in self.weights)
        return NudgeScheme(nudges, weights, self.order, self.free_phase, self.matched)

    def arrays(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Nudges and weights as vectors, in the precision of `dtype`."""
        target = jnp.result_type(dtype, jnp.complex64) if self.is_complex else dtype
        return (
            jnp.stack([jnp.asarray(beta, target) for beta in self.nudges]),
            jnp.stack([jnp.asarray(weight, target) for weight in self.weights]),
        )

    def validity(self, dtype: Any) -> jax.Array:
        """`INVALID_SCHEME` where traced weights are not those of a derivative."""
        nudges, weights = self.arrays(dtype)
        slack = max(_SLACK, 32 * float(jnp.finfo(dtype).eps))
        total = jnp.abs(_total(weights)) <= slack * jnp.max(jnp.abs(weights))
        unit = jnp.abs(_unit(nudges, weights) - 1) <= slack
        return flag(~(total & unit), Status.INVALID_SCHEME)

    def contrast(self, measured: PyTree) -> PyTree:
        """Re sum_k w_k measured_k over the leading (phase) axis of every leaf: algorithm (8)."""

        def weigh(values: jax.Array) -> jax.Array:
            _, weights = self.arrays(jnp.real(values).dtype)
            # Equal weights become exactly +-1 before anything is multiplied, so that the difference of two nearly
            # equal numbers is taken exactly and only then divided by beta.
            largest = jnp.max(jnp.abs(weights))
            ratios = (weights / largest).reshape(-1, *[1] * (values.ndim - 1))
            return largest * jnp.real(jnp.sum(ratios * values, axis=0))

        return jax.tree.map(weigh, measured)


def forward_difference(beta: Number, *, matched: bool = True) -> NudgeScheme:
    """One nudged phase against the free one; the bias is O(beta).

    For every beta this is the fully first-order estimator F2SA with penalty 1/beta.

    Args:
      beta: nudging strength; either sign.
      matched: see `NudgeScheme`; False contrasts with the free-phase solution itself, as first published, which is
        wrong by (leftover relaxation) / beta wherever the free phase is unfinished.

    Reference:
      Scellier & Bengio (2017); Zucchet et al. (2022), eq. 5; Kwon et al. (2023), F2SA.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.forward_difference(0.5).weights
      (-2.0, 2.0)
    """
    b = _nonzero(beta)
    return NudgeScheme((0.0, b), (-1 / b, 1 / b), order=1, free_phase=0, matched=matched)


def second_order_forward(beta: Number, *, matched: bool = True) -> NudgeScheme:
    """Phases at 0, beta and 2 beta; the bias is O(beta^2), and no phase is nudged the wrong way.

    Args:
      beta: nudging strength.
      matched: as in `forward_difference`.

    Reference:
      Three-point one-sided difference; F2SA-p with p = 2 forward (Chen et al., 2026).

    Example:
      >>> import contrastive_meta as cm
      >>> cm.second_order_forward(1.0).weights
      (-1.5, 2.0, -0.5)
    """
    b = _nonzero(beta)
    weights = (-3 / (2 * b), 2 / b, -1 / (2 * b))
    return NudgeScheme((0.0, b, 2 * b), weights, order=2, free_phase=0, matched=matched)


def central_difference(beta: Number) -> NudgeScheme:
    """Phases at +beta and -beta (symmetric nudging); the bias is O(beta^2).

    Args:
      beta: nudging strength. A loss nudge with -beta can destroy the convexity of the inner loss when it is large.

    Reference:
      Laborieux et al. (2021); Zucchet et al. (2022), the symmetric estimator.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.central_difference(0.1).nudges
      (0.1, -0.1)
    """
    b = _nonzero(beta)
    return NudgeScheme((b, -b), (1 / (2 * b), -1 / (2 * b)), order=2)


def four_point(beta: Number) -> NudgeScheme:
    """Phases at +-beta and +-2 beta; the bias is O(beta^4).

    Args:
      beta: the smaller nudging strength.

    Reference:
      Five-point central stencil without its middle.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.four_point(1.0).order
      4
    """
    b = _nonzero(beta)
    near, far = 2 / (3 * b), 1 / (12 * b)
    return NudgeScheme((b, -b, 2 * b, -2 * b), (near, -near, -far, far), order=4)


def circle(beta: Number, num_points: int = 8) -> NudgeScheme:
    """`num_points` phases on a circle of radius beta in the complex plane; the bias is O(beta^num_points).

    Needs losses that are holomorphic in params and meta-parameters, a learner whose steps are, and a radius inside
    the domain of analyticity.

    Args:
      beta: radius.
      num_points: number of phases N >= 2.

    Reference:
      Laborieux & Zenke (2022), holomorphic equilibrium propagation; Cauchy's integral formula.

    Raises:
      ValueError: fewer than two points.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.circle(0.1, num_points=4).order
      4
    """
    if num_points < 2:
        raise ValueError(f"`circle` needs num_points >= 2; got {num_points}.")
    b = _nonzero(beta)
    points = [cmath.exp(2j * cmath.pi * k / num_points) for k in range(num_points)]
    nudges = tuple(b * point for point in points)
    weights = tuple(point.conjugate() / (num_points * b) for point in points)
    return NudgeScheme(nudges, weights, order=num_points)


def complex_step(step: Number = 1e-6) -> NudgeScheme:
    """One phase at the imaginary strength i * step: no subtraction, so no rounding term; the bias is O(step^2).

    Needs holomorphic losses and a holomorphic learner, as `circle` does.

    Args:
      step: modulus of the imaginary nudge.

    Reference:
      Squire & Trapp (1998), the complex-step derivative, along the nudging strength.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.complex_step(1e-6).nudges
      (1e-06j,)
    """
    h = _nonzero(step)
    return NudgeScheme((1j * h,), (-1j / h,), order=2)


@strategy
class RelativeStrength(NudgeStrength):
    """A scheme whose strength is set by how far it moves `params`; see `relative`.

    Args:
      unit: the scheme at strength 1.
      displacement: distance moved at strength beta over the norm of `params`; None for the dtype's default.
      num_pilot_steps: conjugate-gradient iterations of the pilot; one inner gradient each.
    """

    unit: NudgeScheme
    displacement: float | jax.Array | None = None
    num_pilot_steps: int = static(default=16)

    def template(self) -> NudgeScheme:
        """The scheme at strength 1."""
        return self.unit

    def resolve(self, probe: Probe) -> tuple[NudgeScheme, jax.Array]:
        """Measure the response to a unit nudge, then scale the scheme to the wanted displacement."""
        response, num_gradients = measure_response(probe, self.num_pilot_steps)
        wanted = self._displacement(probe, response)
        # With nothing to respond to (a zero outer gradient) any strength does.
        beta = jnp.where(response > 0, wanted * probe.scale / jnp.where(response > 0, response, 1), 1.0)
        return self.unit.scaled(beta.astype(probe.dtype)), num_gradients

    def _displacement(self, probe: Probe, response: jax.Array) -> jax.Array:
        if self.displacement is not None:
            return jnp.asarray(self.displacement, probe.dtype)
        eps = float(jnp.finfo(probe.dtype).eps)
        if self.unit.is_complex and len(self.unit.nudges) == 1:
            # Nothing is subtracted, so only the truncation, about displacement^2, has to vanish.
            return jnp.asarray(0.1 * math.sqrt(eps), probe.dtype)
        # Rounding falls as 1/beta and truncation grows as beta^p: the best strength is near noise^(1/(p+1)). The
        # noise is measured, because reduced-precision matrix products are noisier than the dtype says.
        curvature = jnp.where(response > 0, probe.nudge_norm / jnp.where(response > 0, response, 1), 0.0)
        gradient_scale = curvature * probe.scale
        measured = probe.noise / jnp.where(gradient_scale > 0, gradient_scale, 1.0)
        noise = jnp.clip(jnp.where(gradient_scale > 0, measured, eps), eps, 1e-2)
        return 0.2 * noise ** (1 / (self.unit.order + 1))


def relative(
    scheme: NudgeScheme | Callable[[Number], NudgeScheme],
    displacement: float | jax.Array | None = None,
    num_pilot_steps: int = 16,
) -> RelativeStrength:
    """A nudging strength set from the problem's own scale: the nudge moves `params` by a fraction of their norm.

    A short pilot (conjugate gradients on gradient differences: first-order information only, whatever the learner)
    measures the response u of `params` to a unit nudge; then beta = displacement * ||params|| / ||u||. Rescaling
    either loss, or the units of `params`, changes nothing in the result but rounding.

    Args:
      scheme: a scheme function such as `central_difference`, or a scheme, whose own strength is then ignored.
      displacement: distance moved at strength beta, relative to the norm of `params` (of the distance learned, where
        `params` end at zero). By default 0.2 * noise^(1/(order + 1)), with the measured relative noise of the
        gradient, at least the dtype's eps: about 1e-3 for `central_difference` in float32, 1e-6 in float64.
      num_pilot_steps: iterations of the pilot, one inner gradient each.

    Returns:
      What `Contrastive(scheme=...)` takes.

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), scheme=cm.relative(cm.four_point, displacement=1e-2))
    """
    if not isinstance(scheme, NudgeScheme):
        return RelativeStrength(scheme(1.0), displacement, num_pilot_steps)
    sizes = [abs(beta) for k, beta in enumerate(scheme.nudges) if k != scheme.free_phase]
    return RelativeStrength(scheme.scaled(1 / min(sizes)), displacement, num_pilot_steps)


class Nudge(abc.ABC):
    """What the nudged phases add to the inner loss."""

    @abc.abstractmethod
    def apply(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, outer_grad: Params
    ) -> BilevelProblem:
        """The problem whose outer loss nudges, given the free solution and the outer loss's gradient there."""


@strategy
class LossNudge(Nudge):
    """Nudge with the outer loss itself, algorithm (5).

    Accurate from unfinished free phases, since the pair of phases goes on refining its base point; but a negative
    beta can take the nudged loss's minimum away.

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), nudge=cm.LossNudge())
    """

    def apply(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, outer_grad: Params
    ) -> BilevelProblem:
        """The problem as it is."""
        return problem


@strategy
class LinearNudge(Nudge):
    """Nudge with the outer loss linearised at the free solution, algorithm (9).

    The inner Hessian is untouched, so no beta destroys convexity, and phases never evaluate the outer loss. With a
    central scheme it is exact at any beta where the inner loss is quadratic in `params` and its meta-gradient at
    most quadratic. Its accuracy is capped by that of the free phase.

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), nudge=cm.LinearNudge())
    """

    def apply(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, outer_grad: Params
    ) -> BilevelProblem:
        """The problem with its outer loss replaced by a line through the free solution."""

        def linearised(at: Params, meta: MetaParams, task_: Task) -> jax.Array:
            # Not `vdot`: it conjugates, and complex phases need a holomorphic line.
            moved = tree.subtract(at, params)
            products = jax.tree.map(lambda v, d: jnp.sum(v * d), outer_grad, moved)
            return problem.outer(params, meta, task) + sum(jax.tree.leaves(products))

        return BilevelProblem(problem.inner, linearised, problem.init_params, sample=problem.sample)


_SLACK = 1e-5


def _total(weights: Any) -> Any:
    return weights.sum(axis=0).real


def _unit(nudges: Any, weights: Any) -> Any:
    return (nudges * weights).sum(axis=0)


def _is_concrete(number: Any) -> bool:
    if isinstance(number, jax.Array):
        return not isinstance(number, jax.core.Tracer)
    return isinstance(number, int | float | complex | np.generic | np.ndarray)


def _nonzero(beta: Number) -> Any:
    if _is_concrete(beta) and np.any(np.asarray(beta) == 0):
        raise ValueError(
            "A nudging strength of 0 nudges nothing: beta must be nonzero, since the contrast is divided by it. "
            "Type a small positive number, or let `relative(...)` choose."
        )
    return beta
