"""The network of the few-shot experiments: strided convolutions as patches and matrix products, fast on a CPU."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm

# Length of the feature vector of an image: a strength of the readout's penalty means the same all along.
FEATURE_NORM = 10.0


class Layer(NamedTuple):
    """A strided convolution: `reach` x `reach` pixels every `stride`, to `channels`."""

    reach: int
    stride: int
    channels: int


# Calibrated on held-out background alphabets, one seed: .94 there by the fast head in 240 s of one CPU.
LAYERS = Layer(6, 4, 32), Layer(3, 2, 64), Layer(3, 2, 64)
# As the paper's public code has them for Omniglot: four blocks of stride 2, here normalised image by image.
PAPER = (Layer(3, 2, 64),) * 4
SMALL = Layer(8, 8, 8), Layer(3, 2, 8)


def init_body(key: jax.Array, layers: tuple[Layer, ...] = LAYERS) -> dict[str, Any]:
    """First parameters: normal kernels of variance 2 / inputs, with a bias for each channel."""
    params, before = {}, 1
    for number, (layer, k) in enumerate(zip(layers, jax.random.split(key, len(layers)), strict=True)):
        inputs = layer.reach**2 * before
        kernel = jax.random.normal(k, (inputs, layer.channels)) * (2 / inputs) ** 0.5
        params[f"layer_{number}"] = {"kernel": kernel, "bias": jnp.zeros(layer.channels)}
        before = layer.channels
    return params


def with_gains(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same body with a gain of 1 and a shift of 0 for every channel of every layer."""
    return {
        name: {**layer, "gain": jnp.ones_like(layer["bias"]), "shift": jnp.zeros_like(layer["bias"])}
        for name, layer in body.items()
    }


def with_modules(body: Mapping[str, Any], num_modules: int, key: jax.Array) -> dict[str, Any]:
    """The same body, each kernel a mixture of modules: the first is the kernel, and the others, drawn, have weight 0.

    Args:
      body: as `init_body` makes it.
      num_modules: of each layer.
      key: PRNG key of the modules.
    """

    def modular(layer: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
        kernel = layer["kernel"]
        others = jax.random.normal(key, (num_modules - 1, *kernel.shape)) * (2 / len(kernel)) ** 0.5
        bank = jnp.concatenate([kernel[None], others])
        return {"bank": bank, "coefficients": jnp.zeros(num_modules).at[0].set(1), "bias": layer["bias"]}

    keys = jax.random.split(key, len(body))
    return {name: modular(layer, k) for (name, layer), k in zip(body.items(), keys, strict=True)}


def features(body: Mapping[str, Any], images: jax.Array, layers: tuple[Layer, ...] = LAYERS) -> jax.Array:
    """Features of length `FEATURE_NORM`.

    Args:
      body: as `init_body` makes it, or with gains or modules.
      images: shape (..., 28, 28).
      layers: of the body.

    Returns:
      shape (..., number of features).
    """
    x = images[..., None]
    for number, layer in enumerate(layers):
        weights = body[f"layer_{number}"]
        x = _affine(weights, _patches(x, layer))
        # Each image by itself, over places and channels: no batch statistics.
        centred = x - jnp.mean(x, (-3, -2, -1), keepdims=True)
        x = centred * jax.lax.rsqrt(jnp.mean(centred**2, (-3, -2, -1), keepdims=True) + 1e-5)
        x = jax.nn.relu(weights["gain"] * x + weights["shift"] if "gain" in weights else x)
    flat = x.reshape(*x.shape[:-3], -1)
    return FEATURE_NORM * flat * jax.lax.rsqrt(jnp.sum(flat**2, -1, keepdims=True) + 1e-6)


def num_features(layers: tuple[Layer, ...] = LAYERS, side: int = 28) -> int:
    """How many."""
    for layer in layers:
        side = -(-side // layer.stride)
    return side**2 * layers[-1].channels


def logits(network: Mapping[str, Any], images: jax.Array, layers: tuple[Layer, ...] = LAYERS) -> jax.Array:
    """The whole network, {"body", "readout"}: shape (..., classes)."""
    readout = network["readout"]
    out: jax.Array = features(network["body"], images, layers) @ readout["kernel"] + readout["bias"]
    return out


def cross_entropy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over examples, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))


def accuracy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """The fraction of examples."""
    return jnp.mean((jnp.argmax(scores, -1) == labels).astype(jnp.float32))


def _affine(weights: Mapping[str, jax.Array], patches: jax.Array) -> jax.Array:
    """What the synapses of a layer pass on, so that a rule of plasticity can listen to them."""
    if "bank" in weights:
        mixed = cm.ModuleBank().mix(patches, weights["bank"], weights["coefficients"])
        return cm.transmit(mixed, None, weights["bias"])
    return cm.transmit(patches, weights["kernel"], weights["bias"])


def _patches(x: jax.Array, layer: Layer) -> jax.Array:
    """What each place sees, zeros beyond the edges: shape (..., height / stride, width / stride, reach^2 channels)."""
    side, reach, stride = x.shape[-2], layer.reach, layer.stride
    places = -(-side // stride)
    before = max((places - 1) * stride + reach - side, 0) // 2
    padded = jnp.pad(x, [*[(0, 0)] * (x.ndim - 3), (before, reach), (before, reach), (0, 0)])
    last = (places - 1) * stride + 1
    # Rows, then columns: 2 x reach slices in place of reach^2, which take three times as long to compile.
    rows = jnp.concatenate([padded[..., i : i + last : stride, :, :] for i in range(reach)], axis=-1)
    return jnp.concatenate([rows[..., j : j + last : stride, :] for j in range(reach)], axis=-1)
