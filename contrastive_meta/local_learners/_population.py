"""A number as the spikes of a population of tuned neurons."""

import jax
import jax.numpy as jnp


def population_spikes(
    key: jax.Array, values: jax.Array, num_inputs: int, num_steps: int, width: float = 0.014
) -> jax.Array:
    """Each neuron fires at random, most often where a value is near the one that it prefers.

    Args:
      key: PRNG key.
      values: in 0 .. 1, shape (...).
      num_inputs: neurons; what they prefer is spread evenly over 0 .. 1.
      num_steps: of time.
      width: standard deviation of a neuron's tuning, in units of the values.

    Returns:
      0 and 1, shape (..., num_steps, num_inputs), in the dtype of `values`.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> values = jax.numpy.array([0.0, 0.5])
      >>> cm.local_learners.population_spikes(jax.random.key(0), values, num_inputs=32, num_steps=20).shape
      (2, 20, 32)
    """
    preferred = jnp.linspace(0.0, 1.0, num_inputs, dtype=values.dtype)
    rates = jnp.exp(-0.5 * jnp.square((values[..., None] - preferred) / width))
    drawn = jax.random.bernoulli(key, rates[..., None, :], (*values.shape, num_steps, num_inputs))
    return drawn.astype(values.dtype)
