"""A small convolutional network with a learned strength for every synapse; tanh and average pooling keep it smooth."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import contrastive_meta as cm
from benchmarks.cases import Instance

_NUM_CHANNELS = (6, 12)


class ImageTask(NamedTuple):
    """Images (num, side, side, 1) and labels (num,) to learn from and to judge by, and the key of the first weights."""

    x_train: jax.Array
    y_train: jax.Array
    x_val: jax.Array
    y_val: jax.Array
    key: jax.Array


def cnn_strengths(
    x_train: Any, y_train: Any, x_val: Any, y_val: Any, num_classes: int, key: jax.Array, strength: float
) -> Instance:
    """Two convolutions, each with tanh and pooling of 2 x 2, and an affine layer; cross-entropy and penalties.

    Args:
      x_train: flat images, shape (num_train, side * side).
      y_train: integer labels, shape (num_train,).
      x_val: shape (num_val, side * side).
      y_val: shape (num_val,).
      num_classes: number of classes.
      key: of the initialisation.
      strength: where the strengths start.
    """
    side = round(x_train.shape[1] ** 0.5)
    images = [jnp.asarray(x.reshape(-1, side, side, 1), jnp.result_type(float)) for x in (x_train, x_val)]
    task = ImageTask(images[0], jnp.asarray(y_train), images[1], jnp.asarray(y_val), key)
    dtype = images[0].dtype
    widths = (1, *_NUM_CHANNELS)
    shapes = {"first": (5, 5, *widths[:2]), "second": (3, 3, *widths[1:])}
    size = ((side - 4) // 2 // 2 - 2) // 2  # a stride of 2, pooling, the second kernel, pooling
    shapes_of_all = {**shapes, "readout": (size * size * widths[-1], num_classes)}
    start = jnp.log(jnp.asarray(strength, dtype))
    log_strengths = {
        name: {"kernel": jnp.full(shape, start, dtype), "bias": jnp.full(shape[-1:], start, dtype)}
        for name, shape in shapes_of_all.items()
    }
    return Instance(_PROBLEM, log_strengths, task, exact=None)


def _logits(params: Any, x: jax.Array) -> jax.Array:
    for name, stride in (("first", 2), ("second", 1)):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        x = _pooled(jnp.tanh(_patches(x, kernel.shape[0], stride) @ kernel.reshape(-1, kernel.shape[-1]) + bias))
    logits: jax.Array = x.reshape(x.shape[0], -1) @ params["readout"]["kernel"] + params["readout"]["bias"]
    return logits


def _patches(x: jax.Array, size: int, stride: int) -> jax.Array:
    """What the kernel sees at each place, flat: products of matrices are fast in every precision, convolutions not."""
    # One gather, not a slice for each place in the kernel: programs that hold many gradients stay small.
    places = [stride * jnp.arange((side - size) // stride + 1)[:, None] + jnp.arange(size) for side in x.shape[1:3]]
    patches = x[:, places[0][:, None, :, None], places[1][None, :, None, :]]
    return patches.reshape(*patches.shape[:3], -1)


def _pooled(x: jax.Array) -> jax.Array:
    num, height, width, channels = x.shape
    return jnp.mean(x.reshape(num, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    hit = labels[:, None] == jnp.arange(logits.shape[-1])
    return jnp.mean(jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1))


def _inner_loss(params: Any, meta_params: Any, task: ImageTask) -> jax.Array:
    terms = jax.tree.map(lambda s, p: jnp.sum(jnp.exp(s) * p**2) / 2, meta_params, params)
    penalty: jax.Array = sum(jax.tree.leaves(terms), start=jnp.zeros((), task.x_train.dtype))
    return _cross_entropy(_logits(params, task.x_train), task.y_train) + penalty


def _outer_loss(params: Any, meta_params: Any, task: ImageTask) -> jax.Array:
    return _cross_entropy(_logits(params, task.x_val), task.y_val)


def _init_params(meta_params: Any, task: ImageTask) -> Any:
    keys = dict(zip(meta_params, jax.random.split(task.key, len(meta_params)), strict=True))

    def draw(name: str) -> Any:
        kernel, bias = meta_params[name]["kernel"], meta_params[name]["bias"]
        fan_in = kernel.size // kernel.shape[-1]
        return {
            "kernel": jax.random.normal(keys[name], kernel.shape, kernel.dtype) / fan_in**0.5,
            "bias": jnp.zeros_like(bias),
        }

    return {name: draw(name) for name in meta_params}


_PROBLEM = cm.BilevelProblem(_inner_loss, _outer_loss, _init_params)
