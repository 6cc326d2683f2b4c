"""The pieces that the problems' losses are made of, all holomorphic: they hold for complex arguments as they stand.

No maximum is subtracted inside the log-sum-exp, because a maximum (of numbers that depend on `params`) is not
holomorphic. The price is a range: logits must stay within +-80 in float32 and +-700 in float64, where exp neither
overflows nor vanishes; logits of standardised inputs and penalised weights are far inside it. For complex logits the
imaginary parts must be well below pi / 2, so that no argument of the logarithm circles zero.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta._pytree import PyTree


class Linear(NamedTuple):
    """One affine layer, or the log-strengths of its synapses.

    Attributes:
      kernel: shape (num_inputs, num_outputs), or (num_inputs,) for a single output.
      bias: shape (num_outputs,) or ().

    Example:
      >>> import jax.numpy as jnp
      >>> layer = Linear(kernel=jnp.ones((3, 2)), bias=jnp.zeros(2))
      >>> (jnp.ones((5, 3)) @ layer.kernel + layer.bias).shape
      (5, 2)
    """

    kernel: jax.Array
    bias: jax.Array


def penalty(log_strengths: PyTree, params: PyTree) -> jax.Array:
    """1/2 sum_i exp(log_strength_i) params_i^2; a log-strength may be shared by broadcasting."""
    terms = jax.tree.map(lambda s, p: jnp.sum(jnp.exp(s) * jnp.square(p)) / 2, log_strengths, params)
    return jnp.asarray(sum(jax.tree.leaves(terms)))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log softmax(logits)[label] for each example.

    Args:
      logits: shape (num, num_classes).
      labels: integers, shape (num,).

    Returns:
      shape (num,).
    """
    # A product with zeros and ones instead of a gather: linear, so the complex step passes through it.
    one_hot = (labels[:, None] == jnp.arange(logits.shape[-1])).astype(jnp.finfo(logits.dtype).dtype)
    return jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - jnp.sum(one_hot * logits, axis=-1)


def binary_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """-log sigmoid(logit) for label 1 and -log sigmoid(-logit) for label 0; all shapes (num,)."""
    signs = 2 * labels.astype(jnp.finfo(logits.dtype).dtype) - 1
    return jnp.log1p(jnp.exp(-signs * logits))


def tanh_network(layers: Sequence[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """Affine layers with tanh between them.

    Args:
      layers: (kernel, bias) of each layer, the last without a nonlinearity.
      x: shape (num, num_inputs).

    Returns:
      shape (num, num_outputs).
    """
    for kernel, bias in layers[:-1]:
        x = jnp.tanh(x @ kernel + bias)
    kernel, bias = layers[-1]
    return x @ kernel + bias


def init_layers(key: jax.Array, shapes: Sequence[tuple[int, int]], dtype: Any) -> list[Linear]:
    """Normal kernels of variance 1 / num_inputs, zero biases."""
    keys = jax.random.split(key, len(shapes))
    kernels = [jax.random.normal(k, shape, dtype) / shape[0] ** 0.5 for k, shape in zip(keys, shapes, strict=True)]
    return [Linear(kernel, jnp.zeros(kernel.shape[-1:], dtype)) for kernel in kernels]


def layer_shapes(num_inputs: int, widths: Sequence[int], num_outputs: int) -> list[tuple[int, int]]:
    """Kernel shapes of a network with these hidden widths.

    Raises:
      ValueError: a width is not positive.
    """
    if any(width < 1 for width in widths):
        raise ValueError(f"`widths` must be positive, one per hidden layer; got {tuple(widths)}.")
    sizes = [num_inputs, *widths, num_outputs]
    return list(itertools.pairwise(sizes))
