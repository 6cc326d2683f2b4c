"""A nudging strength that is sought: measured truncation against measured noise."""

import jax
import jax.numpy as jnp

from contrastive_meta._nudging.scheme import NudgeScheme, NudgeStrength
from contrastive_meta._nudging.schemes import central_difference, forward_difference, four_point
from contrastive_meta._nudging.strength import RelativeStrength, relative
from contrastive_meta._pytree import strategy
from contrastive_meta._response import Probe

_SCHEMES = {1: forward_difference, 2: central_difference, 4: four_point}


@strategy
class AutomaticStrength(NudgeStrength):
    """A scheme whose strength is sought on every problem; see `automatic`.

    Args:
      default: the strength to begin with, and to keep where nothing better is found.
    """

    default: RelativeStrength

    def template(self) -> NudgeScheme:
        """The scheme at strength 1."""
        return self.default.unit

    @property
    def num_pilot_steps(self) -> int:
        """As of the strength to begin with."""
        return self.default.num_pilot_steps

    def resolve(self, probe: Probe) -> tuple[NudgeScheme, jax.Array]:
        """What was found, or the strength to begin with, by a pilot's response."""
        response, num_gradients = self.default.pilot(probe)
        return self.for_response(probe, response), num_gradients

    def for_response(self, probe: Probe, response: jax.Array) -> NudgeScheme:
        """The scheme scaled to the displacement that was found, or else to the default one."""
        displacement = jnp.where(probe.chosen > 0, probe.chosen, self.default.wanted(probe, response))
        return RelativeStrength(self.default.unit, displacement).for_response(probe, response)


def automatic(order: int = 2, num_pilot_steps: int = 16) -> AutomaticStrength:
    """A nudging strength that sets itself, from what the phases report.

    The contrast is taken at strengths a factor of 8 apart. Where noise rules, what two neighbours differ by falls with
    the strength; where truncation rules it rises with its power `order`. When it has begun to rise, the two laws are
    fitted to the last differences and the strength is put where their sum is least. The strength is kept as a
    displacement relative to the length of `params`, so the units of the losses and of `params` do not matter.

    It is sought once: 4 to 20 evaluations of the statistic for each phase, no phase of learning. `result.state` carries
    it on, and a later estimate from that state seeks again only where the truncation has grown much since. Under vmap
    every task has its own.

    Args:
      order: power of the truncation error: 1 for `forward_difference`, 2 for `central_difference`, 4 for `four_point`.
      num_pilot_steps: where learning is run again, conjugate-gradient iterations of the pilot that finds the line
        along which strengths are compared; one inner gradient each.

    Returns:
      What `Contrastive(scheme=...)` takes.

    Raises:
      ValueError: another order.

    Reference:
      Gill, Murray, Saunders & Wright (1983), "Computing forward-difference intervals for numerical optimization", for
      the balance of rounding and truncation.

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), scheme=cm.automatic(order=4))
    """
    if order not in _SCHEMES:
        raise ValueError(
            f"`automatic` knows the orders {', '.join(map(str, _SCHEMES))}; got {order!r}. "
            "For another scheme use `relative(scheme, displacement=...)`."
        )
    return AutomaticStrength(relative(_SCHEMES[order], num_pilot_steps=num_pilot_steps))
