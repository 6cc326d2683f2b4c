"""A small convolutional network that a rule can listen to: convolution, normalisation, activation, pooling."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity import Context, ModuleBank, transmit

Layer = Mapping[str, Any]
_REACH = 3


def cnn(
    params: Mapping[str, Any], x: jax.Array, activation: Callable[[jax.Array], jax.Array] = jax.nn.relu
) -> jax.Array:
    """Blocks of 3 x 3 convolution, normalisation, activation and 2 x 2 max-pooling, then a linear readout.

    A convolution is `transmit` of patches, so that a rule hears what reaches its synapses, which places share: to the
    rule, places are examples. Each image is normalised by itself, over places and channels, before gains: no batch
    statistics, nothing that a phase could move. Odd edges are left out of the pooling, and an image of one place is
    not pooled.

    Args:
      params: as for `mlp`, `hidden_0`, `hidden_1`, .. being blocks; their kernels have shape (9 * channels, channels
        after), a patch being ordered by row, column and channel. `with_gains`, `with_context` (more channels, the same
        everywhere) and `with_modules` add to them what they add to an `mlp`.
      x: images, shape (..., height, width, channels).
      activation: of the blocks.

    Returns:
      shape (..., outputs).

    Raises:
      ValueError: fewer than three axes.

    Reference:
      Vinyals et al. (2016), the four-block body of few-shot learning; Ba et al. (2016), layer normalisation.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.cnn_params(jax.random.key(0), (8, 8, 1), (4, 4), 5)
      >>> cm.architectures.cnn(params, jax.numpy.ones((2, 8, 8, 1))).shape
      (2, 5)
    """
    if jnp.ndim(x) < 3:
        raise ValueError(f"cnn: expected images of shape (..., height, width, channels); got {jnp.shape(x)}.")
    if "context" in params:
        x = Context().join(x, params["context"])
    for number in range(sum(name.startswith("hidden_") for name in params)):
        layer = params[f"hidden_{number}"]
        affine = _normalised(_affine(layer, _patches(x)))
        if "gain" in layer:
            affine = layer["gain"] * affine + layer["shift"]
        x = _pooled(activation(affine))
    readout = params["readout"]
    return transmit(x.reshape(*x.shape[:-3], -1), readout["kernel"], readout["bias"])


def cnn_params(
    key: jax.Array,
    image: tuple[int, int, int],
    channels: Sequence[int] = (64, 64, 64, 64),
    num_outputs: int = 5,
    dtype: Any = None,
) -> dict[str, Any]:
    """First parameters for `cnn`: normal kernels of variance 2 / inputs, the readout's 1 / inputs, zero biases.

    Args:
      key: PRNG key.
      image: height, width and channels.
      channels: of each block.
      num_outputs: of the readout.
      dtype: of every array; None for JAX's default.

    Raises:
      ValueError: no block.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.cnn_params(jax.random.key(0), (28, 28, 1))
      >>> params["hidden_1"]["kernel"].shape, params["readout"]["kernel"].shape
      ((576, 64), (64, 5))
    """
    if not channels:
        raise ValueError("cnn_params: expected channels of one block at least; got none. `mlp_params` has no blocks.")
    height, width, before = image
    shapes, variances = [], []
    for after in channels:
        shapes.append((_REACH**2 * before, after))
        variances.append(2 / shapes[-1][0])
        height, width, before = max(height // 2, 1), max(width // 2, 1), after
    shapes.append((height * width * before, num_outputs))
    variances.append(1 / shapes[-1][0])
    names = [*(f"hidden_{number}" for number in range(len(channels))), "readout"]
    keys = jax.random.split(key, len(names))
    kernels = [
        variance**0.5 * jax.random.normal(k, shape, dtype or jnp.result_type(float))
        for k, shape, variance in zip(keys, shapes, variances, strict=True)
    ]
    return {name: {"kernel": w, "bias": jnp.zeros_like(w[0])} for name, w in zip(names, kernels, strict=True)}


def _affine(layer: Layer, patches: jax.Array) -> jax.Array:
    if "bank" in layer:
        return transmit(ModuleBank().mix(patches, layer["bank"], layer["coefficients"]), None, layer["bias"])
    return transmit(patches, layer["kernel"], layer["bias"])


def _patches(x: jax.Array) -> jax.Array:
    """What each place sees, zeros beyond the edges; shape (..., height, width, 9 * channels)."""
    height, width = x.shape[-3:-1]
    padded = jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), (1, 1), (1, 1), (0, 0)])
    seen = [padded[..., i : i + height, j : j + width, :] for i in range(_REACH) for j in range(_REACH)]
    return jnp.concatenate(seen, axis=-1)


def _normalised(x: jax.Array) -> jax.Array:
    """Mean 0 and variance 1 over the places and channels of each image."""
    axes = (-3, -2, -1)
    centred = x - jnp.mean(x, axes, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + 1e-5)


def _pooled(x: jax.Array) -> jax.Array:
    """The largest of every 2 x 2 places, or of fewer along an axis that has only one."""
    for axis in (-3, -2):
        if x.shape[axis] > 1:
            pairs = x.shape[axis] // 2
            first, second = (jax.lax.slice_in_dim(x, k, 2 * pairs, 2, axis) for k in range(2))
            # Not `jnp.max`: its derivative looks for the places that equal the largest. Compilers may compute `x` twice
            # and round it twice; where none is equal it divides by zero.
            x = jnp.maximum(first, second)
    return x
