"""A small multilayer perceptron that a rule can listen to, with gains, a context or modules where it has them."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity import Context, ModuleBank, transmit

Layer = Mapping[str, Any]


def mlp(params: Mapping[str, Any], x: jax.Array, activation: Callable[[jax.Array], jax.Array] = jnp.tanh) -> jax.Array:
    """The network; what its parameters hold decides what it does.

    Args:
      params: `hidden_0`, `hidden_1`, .. and `readout`, each a layer: "kernel" and "bias"; or "bank", "coefficients" and
        "bias"; a hidden layer may have "gain" and "shift", h = act(gain * (W x + bias) + shift). And, if the inputs
        have one, a "context".
      x: shape (..., inputs).
      activation: of the hidden layers.

    Returns:
      shape (..., outputs).

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> cm.architectures.mlp(params, jax.numpy.ones((5, 3))).shape
      (5, 2)
    """
    if "context" in params:
        x = Context().join(x, params["context"])
    for number in range(sum(name.startswith("hidden_") for name in params)):
        layer = params[f"hidden_{number}"]
        affine = _affine(layer, x)
        if "gain" in layer:
            affine = layer["gain"] * affine + layer["shift"]
        x = activation(affine)
    return _affine(params["readout"], x)


def mlp_params(key: jax.Array, sizes: Sequence[int], dtype: Any = None) -> dict[str, Any]:
    """First parameters for `mlp`: normal kernels of variance 1 / inputs, zero biases.

    Args:
      key: PRNG key.
      sizes: numbers of inputs, of units of each hidden layer, and of outputs.
      dtype: of every array; None for JAX's default.

    Raises:
      ValueError: fewer than two sizes.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> sorted(cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2)))
      ['hidden_0', 'readout']
    """
    if len(sizes) < 2:
        raise ValueError(f"`sizes` are those of inputs, hidden layers and outputs, two at least; got {tuple(sizes)}.")
    names = [*(f"hidden_{number}" for number in range(len(sizes) - 2)), "readout"]
    keys = jax.random.split(key, len(names))
    kernels = [
        jax.random.normal(k, shape, dtype or jnp.result_type(float)) / shape[0] ** 0.5
        for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]
    return {name: {"kernel": w, "bias": jnp.zeros_like(w[0])} for name, w in zip(names, kernels, strict=True)}


def with_gains(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same network with a gain of 1 and a shift of 0 for every hidden unit.

    Args:
      params: as `mlp_params` makes them.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.with_gains(cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2)))
      >>> sorted(params["hidden_0"])
      ['bias', 'gain', 'kernel', 'shift']
    """

    def modulated(name: str, layer: Layer) -> Layer:
        if not name.startswith("hidden_"):
            return layer
        return {**layer, "gain": jnp.ones_like(layer["bias"]), "shift": jnp.zeros_like(layer["bias"])}

    return {name: modulated(name, layer) for name, layer in params.items()}


def with_context(params: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The same network, `size` of whose inputs are a context of zeros, the last ones.

    Args:
      params: as `mlp_params` makes them, for inputs and context together.
      size: of the context.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.with_context(cm.architectures.mlp_params(jax.random.key(0), (3 + 2, 8, 2)), 2)
      >>> cm.architectures.mlp(params, jax.numpy.ones((5, 3))).shape
      (5, 2)
    """
    return {**params, "context": jnp.zeros_like(next(iter(params.values()))["bias"], shape=(size,))}


def with_modules(params: Mapping[str, Any], num_modules: int, key: jax.Array) -> dict[str, Any]:
    """The same network, each kernel of a hidden layer a mixture of modules.

    The kernel that was there is the first module and has coefficient 1; the others are drawn like it and have 0.

    Args:
      params: as `mlp_params` makes them.
      num_modules: of each layer.
      key: PRNG key of the modules.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> params = cm.architectures.with_modules(params, 4, jax.random.key(1))
      >>> params["hidden_0"]["bank"].shape
      (4, 3, 8)
    """

    def modular(name: str, layer: Layer, key: jax.Array) -> Layer:
        if not name.startswith("hidden_"):
            return layer
        kernel = layer["kernel"]
        others = jax.random.normal(key, (num_modules - 1, *kernel.shape), kernel.dtype) / kernel.shape[0] ** 0.5
        bank = jnp.concatenate([kernel[None], others])
        return {"bank": bank, "coefficients": jnp.zeros_like(bank[:, 0, 0]).at[0].set(1), "bias": layer["bias"]}

    keys = jax.random.split(key, len(params))
    return {name: modular(name, layer, k) for (name, layer), k in zip(params.items(), keys, strict=True)}


def _affine(layer: Layer, x: jax.Array) -> jax.Array:
    if "bank" in layer:
        return transmit(ModuleBank().mix(x, layer["bank"], layer["coefficients"]), None, layer["bias"])
    return transmit(x, layer["kernel"], layer["bias"])
