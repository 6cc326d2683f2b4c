"""Digits of which half are mislabelled, a weight for each, and the small convolutional network that learns them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import contrastive_meta as cm
from benchmarks import data
from contrastive_meta import problems

NUM_CLASSES = 10


class Instance(NamedTuple):
    """How large everything is, and how learning goes.

    Attributes:
      num_train: examples to learn from.
      num_val: clean examples that weights are judged by.
      num_test: examples of which nothing is used but their accuracy.
      fraction: of wrong training labels.
      batch_size: training examples in a step.
      num_val_batch: validation examples in a step.
      num_steps: training steps; where training stops.
      rate: learning rate, of Adam.
    """

    num_train: int = 1000
    num_val: int = 100
    num_test: int = 690
    fraction: float = 0.5
    batch_size: int = 100
    num_val_batch: int = 50
    num_steps: int = 2000
    rate: float = 2e-3


class Digits(NamedTuple):
    """Images (num, side, side) and labels (num,) of one seed, and which training labels are wrong."""

    x_train: jax.Array
    y_train: jax.Array
    x_val: jax.Array
    y_val: jax.Array
    x_test: jax.Array
    y_test: jax.Array
    corrupted: jax.Array
    batches: jax.Array
    val_batches: jax.Array
    key: jax.Array


class Batch(NamedTuple):
    """What the losses of a training step see.

    Attributes:
      x: training images, shape (batch_size, side, side).
      y: their labels.
      places: their places among the training examples, where their weights are.
      x_val: validation images.
      y_val: their labels.
    """

    x: jax.Array
    y: jax.Array
    places: jax.Array
    x_val: jax.Array
    y_val: jax.Array


def load(name: str, setting: Instance, seed: int, folder: Path | None) -> Digits:
    """The data of a seed: splits, wrong labels, batches, and the key of the first parameters."""
    num_seen = setting.num_train + setting.num_val
    if name == "MNIST":
        split = data.mnist(seed, num_seen, setting.num_test, folder)
    else:
        split = data.digits(seed, num_seen, setting.num_test)
    side = round(split.x_train.shape[1] ** 0.5)
    x_seen, x_test = (jnp.asarray(x.reshape(-1, side, side), jnp.float32) for x in (split.x_train, split.x_val))
    y_seen, y_test = (jnp.asarray(y, jnp.int32) for y in (split.y_train, split.y_val))
    clean, num_train = y_seen[: setting.num_train], setting.num_train
    key_labels, key_params = jax.random.split(jax.random.key(seed))
    noisy = problems.corrupt_labels(key_labels, clean, NUM_CLASSES, setting.fraction)
    rng = np.random.default_rng([seed, 1])
    return Digits(
        x_seen[:num_train],
        noisy,
        x_seen[num_train:],
        y_seen[num_train:],
        x_test,
        y_test,
        noisy != clean,
        jnp.asarray(_in_turn(rng, setting.num_train, setting.batch_size, setting.num_steps)),
        jnp.asarray(_in_turn(rng, setting.num_val, setting.num_val_batch, setting.num_steps)),
        key_params,
    )


def _in_turn(rng: np.random.Generator, num: int, size: int, num_steps: int) -> npt.NDArray[np.int32]:
    """Batches that go through all examples in an order of their own, again and again: shape (num_steps, size)."""
    epochs = -(-num_steps * size // num)
    order = np.concatenate([rng.permutation(num) for _ in range(epochs)])
    return order[: num_steps * size].reshape(num_steps, size).astype(np.int32)


def batch_of(digits: Digits, step: Any) -> Batch:
    """The training and validation batch of a step; every method sees the same ones."""
    here, there = digits.batches[step], digits.val_batches[step]
    return Batch(digits.x_train[here], digits.y_train[here], here, digits.x_val[there], digits.y_val[there])


def init_params(digits: Digits) -> dict[str, Any]:
    """Two convolutions and two affine layers."""
    side = digits.x_train.shape[-1]
    first, second = ((5, 2), (3, 1)) if side > 8 else ((3, 1), (2, 1))
    after_first = ((side - first[0]) // first[1] + 1) // 2
    after_second = after_first - second[0] + 1
    shapes = {
        "first": (first[0] ** 2, 16),
        "second": (second[0] ** 2 * 16, 32),
        "hidden": (after_second**2 * 32, 64),
        "readout": (64, NUM_CLASSES),
    }
    keys = dict(zip(shapes, jax.random.split(digits.key, len(shapes)), strict=True))
    return {
        name: {
            "kernel": jax.random.normal(keys[name], shape, jnp.float32) * (2 / shape[0]) ** 0.5,
            "bias": jnp.zeros(shape[1], jnp.float32),
        }
        for name, shape in shapes.items()
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    """Shape (num, NUM_CLASSES), of images (num, side, side)."""
    large = x.shape[-1] > 8
    hidden = _pooled(_convolved(params["first"], x[..., None], 2 if large else 1))
    hidden = _convolved(params["second"], hidden, 1).reshape(x.shape[0], -1)
    hidden = jax.nn.softplus(_affine(params["hidden"], hidden))
    return _affine(params["readout"], hidden)


def _affine(layer: Any, x: jax.Array) -> jax.Array:
    result: jax.Array = x @ layer["kernel"] + layer["bias"]
    return result


def _convolved(layer: Any, x: jax.Array, stride: int) -> jax.Array:
    """A convolution as a product of matrices, since phases that run side by side have kernels of their own."""
    size = round((layer["kernel"].shape[0] / x.shape[-1]) ** 0.5)
    count = (x.shape[1] - size) // stride + 1
    places = stride * jnp.arange(count)[:, None] + jnp.arange(size)
    patches = x[:, places[:, None, :, None], places[None, :, None, :]].reshape(x.shape[0], count, count, -1)
    return jax.nn.softplus(_affine(layer, patches))


def _pooled(x: jax.Array) -> jax.Array:
    num, side, _, channels = x.shape
    return jnp.mean(x.reshape(num, side // 2, 2, side // 2, 2, channels), axis=(2, 4))


def losses(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The cross-entropy of each example."""
    values: jax.Array = -jnp.take_along_axis(jax.nn.log_softmax(logits(params, x)), y[:, None], axis=1)[:, 0]
    return values


def accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The fraction of examples whose label is the most likely one."""
    return jnp.mean(jnp.argmax(logits(params, x), axis=-1) == y)


def inner_loss(params: Any, scores: jax.Array, batch: Batch) -> jax.Array:
    """The mean over the batch of each example's loss times its weight, the sigmoid of its score."""
    return jnp.mean(jax.nn.sigmoid(scores[batch.places]) * losses(params, batch.x, batch.y))


def outer_loss(params: Any, scores: jax.Array, batch: Batch) -> jax.Array:
    """The mean loss of clean examples."""
    return jnp.mean(losses(params, batch.x_val, batch.y_val))


def _no_start(scores: jax.Array, batch: Batch) -> Any:
    raise NotImplementedError("Training starts where it starts.")


PROBLEM = cm.BilevelProblem(inner_loss, outer_loss, _no_start)
