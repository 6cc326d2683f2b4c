"""Penalties that learners treat by a proximal step: kinks, bounds and constraints that no gradient shows."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import static, strategy


class Penalty(abc.ABC):
    """A convex term h of the inner objective that is not smooth: what `inner_loss` leaves out.

    Subclasses are final strategies. `contrastive_meta.prox` has ready-made ones, and `prox.of` makes one of functions.

    Reference:
      Parikh & Boyd (2014), Proximal algorithms, section 1.1.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.prox.l1(0.1), cm.Penalty)
      True
    """

    @abc.abstractmethod
    def prox(self, params: Params, meta_params: MetaParams, step: Any) -> Params:
        """The proximal step, argmin_w h(w, meta_params) + ||w - params||^2 / (2 step).

        Args:
          params: from where.
          meta_params: of the problem.
          step: length of the step; a projection does not depend on it.
        """

    def value(self, params: Params, meta_params: MetaParams) -> Any:
        """h itself, a scalar that can be differentiated in `meta_params`; None where it is not known.

        0 on the set of a projection.

        Args:
          params: where.
          meta_params: of the problem.
        """
        return None


class BoundPenalty(NamedTuple):
    """A penalty at its meta-parameters.

    Attributes:
      prox: `(params, step) -> params`.
      value: `params -> scalar`, or None where it is not known.
    """

    prox: Callable[[Params, Any], Params]
    value: Callable[[Params], Any]

    @classmethod
    def of(cls, penalty: Penalty | None, meta_params: MetaParams) -> "BoundPenalty | None":
        """The penalty at these meta-parameters; None for none."""
        if penalty is None:
            return None
        return cls(
            lambda params, step: penalty.prox(params, meta_params, step),
            lambda params: penalty.value(params, meta_params),
        )


@strategy
class Setting:
    """A number, an array or a pytree of them; or a function from the meta-parameters to one.

    Args:
      given: the number.
      function: the function, in the place of a number.
    """

    given: Any = None
    function: Callable[[MetaParams], Any] | None = static(default=None)

    @classmethod
    def of(cls, value: Any) -> "Setting":
        """Of what a user typed."""
        return cls(None, value) if callable(value) else cls(value)

    def at(self, meta_params: MetaParams) -> Any:
        """The number at these meta-parameters."""
        return self.given if self.function is None else self.function(meta_params)

    def like(self, meta_params: MetaParams, params: Params) -> Params:
        """The number for each leaf of `params`, in its dtype: one for all, or a pytree like `params`."""
        value = self.at(meta_params)
        if jax.tree.structure(value) == jax.tree.structure(0):
            return jax.tree.map(lambda x: jax.numpy.asarray(value, jax.numpy.real(x).dtype), params)
        return jax.tree.map(lambda v, x: jax.numpy.asarray(v, jax.numpy.real(x).dtype), value, params)
