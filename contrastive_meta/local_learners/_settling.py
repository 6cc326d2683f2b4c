"""A layered network that runs freely, and settles once more to learn from the errors at its outputs."""

import abc
from collections.abc import Callable
from typing import Any

import jax

from contrastive_meta import _pytree as tree
from contrastive_meta._pytree import PyTree
from contrastive_meta.local_learners._layers import layers_of

States = list[jax.Array]


class SettlingNetwork(abc.ABC):
    """`apply` gives the outputs of the free network; its derivative is what `update` makes of the errors at them.

    Subclasses are strategies with two methods, `free` and `update`.
    """

    def apply(self, params: PyTree, x: jax.Array) -> jax.Array:
        """The outputs of the free network.

        Args:
          params: as `architectures.mlp_params` makes them.
          x: shape (..., inputs).

        Returns:
          shape (..., outputs).

        Raises:
          ValueError: `params` is of another kind, or does not fit `x`.
          TypeError: `x` is not floating.
        """
        layers_of(params, x, type(self).__name__)
        return _outputs(jax.lax.stop_gradient(self), params, x)

    @abc.abstractmethod
    def free(self, params: PyTree, x: jax.Array) -> States:
        """Activities of all layers without a target, the outputs last.

        Args:
          params: as for `apply`.
          x: as for `apply`.
        """

    @abc.abstractmethod
    def update(self, params: PyTree, x: jax.Array, free: States, error: jax.Array) -> tuple[PyTree, jax.Array]:
        """What synapses and inputs get instead of the derivative of the loss.

        Args:
          params: as for `apply`.
          x: as for `apply`.
          free: activities of all layers.
          error: derivative of the loss in the outputs, shape (..., outputs).
        """


def _forward(learner: SettlingNetwork, params: PyTree, x: jax.Array) -> tuple[jax.Array, Any]:
    free = learner.free(params, x)
    return free[-1], (learner, params, x, free)


def _backward(saved: Any, error: jax.Array) -> Any:
    learner, params, x, free = saved
    return tree.zeros_like(learner), *learner.update(params, x, free, error)


_outputs: Callable[[SettlingNetwork, PyTree, jax.Array], jax.Array] = jax.custom_vjp(
    lambda learner, params, x: learner.free(params, x)[-1]
)
_outputs.defvjp(_forward, _backward)  # type: ignore[attr-defined]
