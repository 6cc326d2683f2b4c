"""A nudging strength measured by a short pilot, from how far a unit nudge moves `params`."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_meta import _pytree as tree
from contrastive_meta._nudging.scheme import NudgeScheme, NudgeStrength, is_concrete
from contrastive_meta._problem import Number
from contrastive_meta._pytree import static, strategy
from contrastive_meta._response import Probe, measure_response


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
        response, num_gradients = self.pilot(probe)
        return self.for_response(probe, response), num_gradients

    def pilot(self, probe: Probe) -> tuple[jax.Array, jax.Array]:
        """The length of the response to a unit nudge, and the gradients spent."""
        response, num_gradients = measure_response(probe, self.num_pilot_steps)
        return tree.norm(response).astype(probe.dtype), num_gradients

    def for_response(self, probe: Probe, response: jax.Array) -> NudgeScheme:
        """The scheme, scaled to the wanted displacement."""
        wanted = self.wanted(probe, response)
        # With nothing to respond to (a zero outer gradient) any strength does.
        beta = jnp.where(response > 0, wanted * probe.scale / jnp.where(response > 0, response, 1), 1.0)
        # What is not finite is reported as such, and not as a scheme that is none.
        beta = jnp.where(jnp.isfinite(beta) & (beta > 0), beta, 1.0)
        return self.unit.scaled(beta.astype(probe.dtype))

    def wanted(self, probe: Probe, response: jax.Array) -> jax.Array:
        """The displacement to bring about, relative to the length of `params`."""
        if self.displacement is not None:
            return jnp.asarray(self.displacement, probe.dtype)
        eps = probe.eps
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

    Raises:
      ValueError: a displacement that is not positive.

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), scheme=cm.relative(cm.four_point, displacement=1e-2))
    """
    if displacement is not None and is_concrete(displacement) and not np.all(np.asarray(displacement) > 0):
        raise ValueError(
            f"`displacement` must be positive, a fraction of the norm of `params`; got {displacement}. "
            "Leave it out for the default."
        )
    if not isinstance(scheme, NudgeScheme):
        return RelativeStrength(scheme(1.0), displacement, num_pilot_steps)
    unit = scheme.scaled(1 / scheme.strength(jnp.result_type(float)))
    return RelativeStrength(unit, displacement, num_pilot_steps)
