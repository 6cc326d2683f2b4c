"""A nudging scheme: strengths and contrast weights as data, and the contrast itself."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import Number
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._response import Probe
from contrastive_meta._result import Status, flag

_SLACK = 1e-5


class NudgeStrength(abc.ABC):
    """What `Contrastive` takes as its `scheme`: a `NudgeScheme`, or a way to find one from the free phase.

    Example:
      >>> import contrastive_meta as cm
      >>> all(isinstance(s, cm.NudgeStrength) for s in (cm.circle(0.1), cm.relative(cm.circle)))
      True
    """

    @abc.abstractmethod
    def resolve(self, probe: Probe) -> tuple["NudgeScheme", jax.Array]:
        """The scheme to use, and the number of gradients spent to find it."""

    def for_response(self, probe: Probe, response: jax.Array) -> "NudgeScheme":
        """The scheme to use where the length of the response to a unit nudge is known; by default as if it were not."""
        return self.resolve(probe)[0]

    @property
    def adapts(self) -> bool:
        """Whether the strength follows what is measured, or is what the user typed."""
        return True

    @property
    def num_pilot_steps(self) -> int:
        """Conjugate-gradient iterations that tell the length of the response, where phases are run again; 0 for none.

        Without any, `resolve` finds the strength by itself.
        """
        return 0

    @abc.abstractmethod
    def template(self) -> "NudgeScheme":
        """A scheme of the same structure, whatever its strength."""


@strategy
class NudgeScheme(NudgeStrength):
    """Phases and how they are contrasted: estimate = Re sum_k weights_k g(nudges_k), theory (8).

    Args:
      nudges: strength beta_k of each phase, in units of the inner loss over those of the outer.
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
        if all(is_concrete(number) for number in (*self.nudges, *self.weights)):
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

    def for_response(self, probe: Probe, response: jax.Array) -> "NudgeScheme":
        """The scheme itself."""
        return self

    @property
    def adapts(self) -> bool:
        """A strength that is typed is raw."""
        return False

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
        target = tree.promoted(dtype, jnp.complex64) if self.is_complex else dtype
        return (
            jnp.stack([jnp.asarray(beta, target) for beta in self.nudges]),
            jnp.stack([jnp.asarray(weight, target) for weight in self.weights]),
        )

    def noise_gain(self, dtype: Any) -> jax.Array:
        """What the contrast multiplies independent noise of its phases by; 0 for a single one: no difference."""
        _, weights = self.arrays(dtype)
        gain = tree.norm(weights)
        return gain if len(self.nudges) > 1 else jnp.zeros_like(gain)

    def validity(self, dtype: Any) -> jax.Array:
        """`INVALID_SCHEME` where traced weights are not those of a derivative."""
        nudges, weights = self.arrays(dtype)
        slack = max(_SLACK, 32 * float(jnp.finfo(dtype).eps))
        total = jnp.abs(_total(weights)) <= slack * jnp.max(jnp.abs(weights))
        unit = jnp.abs(_unit(nudges, weights) - 1) <= slack
        return flag(~(total & unit), Status.INVALID_SCHEME)

    def at_zero(self, measured: PyTree) -> PyTree:
        """What `measured` would be without a nudge: the polynomial through all phases, at strength 0.

        Its error is O(beta^n) for n phases: the free phase where there is one, the mean of a symmetric pair.
        """

        def interpolate(values: jax.Array) -> jax.Array:
            weights = self.weights_at_zero(jnp.real(values).dtype)
            return jnp.real(jnp.tensordot(weights, values, axes=(0, 0)))

        return jax.tree.map(interpolate, measured)

    def weights_at_zero(self, dtype: Any) -> jax.Array:
        """Lagrange's weights at strength 0: the products over j != k of beta_j / (beta_j - beta_k).

        A strength that occurs twice counts once.
        """
        nudges, _ = self.arrays(dtype)
        gaps = nudges[None, :] - nudges[:, None]
        repeated = jnp.any(jnp.tril(gaps == 0, -1), axis=1)
        left_out = (gaps == 0) | repeated[None, :]
        factors = jnp.where(left_out, 1, nudges[None, :] / jnp.where(left_out, 1, gaps))
        return jnp.where(repeated, 0, jnp.prod(factors, axis=1))

    def contrast(self, measured: PyTree) -> PyTree:
        """Re sum_k w_k measured_k over the leading (phase) axis of every leaf: theory (8)."""

        def weigh(values: jax.Array) -> jax.Array:
            _, weights = self.arrays(jnp.real(values).dtype)
            # Equal weights become exactly +-1 before anything is multiplied, so that the difference of two nearly
            # equal numbers is taken exactly and only then divided by beta.
            largest = jnp.max(jnp.abs(weights))
            ratios = (weights / largest).reshape(-1, *[1] * (values.ndim - 1))
            return largest * jnp.real(jnp.sum(ratios * values, axis=0))

        return jax.tree.map(weigh, measured)


def _total(weights: Any) -> Any:
    return weights.sum(axis=0).real


def _unit(nudges: Any, weights: Any) -> Any:
    return (nudges * weights).sum(axis=0)


def is_concrete(number: Any) -> bool:
    """Whether a number is known while tracing."""
    if isinstance(number, jax.Array):
        return not isinstance(number, jax.core.Tracer)
    return isinstance(number, int | float | complex | np.generic | np.ndarray)
