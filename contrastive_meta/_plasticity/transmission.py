"""The synapses of a layer: what goes through them, and what they learn from presynaptic activity and local error."""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity.listening import Synapses, call_on
from contrastive_meta._pytree import strategy

Axes = tuple[tuple[int | None, ...], ...]


def transmit(activity: Any, kernel: Any, bias: Any = None) -> jax.Array:
    """`activity @ kernel + bias`, through synapses that a network's rule can listen to.

    Use it in a network whose kernels and biases are meta-parameters: `GainModulation` and the other rules for networks
    then get the presynaptic activity and the postsynaptic error of every synapse, delivered by the network itself.

    Args:
      activity: shape (..., inputs): examples, time, or neither come first. Whole batches: not under a `vmap` of the
        loss's own.
      kernel: shape (inputs, outputs); None for a bias alone.
      bias: shape (outputs,), or None.

    Returns:
      shape (..., outputs).

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> cm.transmit(jnp.ones((5, 3)), jnp.ones((3, 2)), jnp.zeros(2)).shape
      (5, 2)
    """
    output = activity if kernel is None else call_on(Kernel(), kernel, activity)
    return output if bias is None else call_on(Bias(), bias, output)


@strategy
class Kernel(Synapses):
    """All-to-all synapses, shape (inputs, outputs)."""

    def forward(self, leaf: jax.Array, *incoming: jax.Array) -> jax.Array:
        """The activity times the kernel."""
        (activity,) = incoming
        return activity @ leaf

    def axes(self, *ndims: int) -> Axes:
        """Activity along the inputs, error along the outputs."""
        before, after = ndims
        return (*[None] * (before - 1), 0), (*[None] * (after - 1), 1)

    def learn(self, leaf: jax.Array, *heard: jax.Array) -> jax.Array:
        """Presynaptic activity times local error, over examples and time."""
        activity, error = heard
        return outer_products(activity, error)


@strategy
class Bias(Synapses):
    """One synapse for each neuron, from something that is always active; shape (outputs,)."""

    def forward(self, leaf: jax.Array, *incoming: jax.Array) -> jax.Array:
        """The input and the bias."""
        (input_,) = incoming
        return input_ + leaf

    def axes(self, *ndims: int) -> Axes:
        """Both along the outputs."""
        return tuple((*[None] * (ndim - 1), 0) for ndim in ndims)

    def learn(self, leaf: jax.Array, *heard: jax.Array) -> jax.Array:
        """The local error, over examples and time."""
        _, error = heard
        return jnp.sum(error, axis=tuple(range(error.ndim - 1)))


def outer_products(activity: jax.Array, error: jax.Array) -> jax.Array:
    """The sum over examples and time of activity_i error_j, shape (inputs, outputs)."""
    times = tuple(range(activity.ndim - 1))
    return jnp.tensordot(activity, error, axes=(times, times))
