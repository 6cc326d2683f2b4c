"""The tasks of the benchmark `tuning`: data with flaws, hyperparameters that could mend them, and small networks."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.scipy.ndimage import map_coordinates

import contrastive_meta as cm
from benchmarks import data
from contrastive_meta import problems

NUM_CLASSES = 10
SIDE = 14  # MNIST in means of 2 x 2 pixels; digits of 8 x 8 pixels with a margin
# A score whose weight is 2, or 0 with the sign turned, to rounding.
CERTAIN = 30.0
SHIFTED = "dense, shifted"
# In the place of 0 and 1, whose logits are not finite.
_LEAST_SMOOTHING = 1e-4
_EPSILON = 1e-5  # of batch normalisation, as usual (Ioffe & Szegedy 2015)


class Sizes(NamedTuple):
    """How large everything is, and how learning goes.

    Attributes:
      num_train: examples to learn from.
      num_val: clean, balanced examples that hyperparameters are judged by.
      num_test: examples of which nothing is used but their accuracy and loss at the end.
      batch_size: training examples in a step.
      num_val_batch: validation examples in a meta-step.
      num_steps: training steps; where training stops.
      rate: learning rate, of Adam.
    """

    num_train: int
    num_val: int
    num_test: int
    batch_size: int = 50
    num_val_batch: int = 50
    num_steps: int = 1000
    rate: float = 2e-3


class Task(NamedTuple):
    """What is learned, and which hyperparameters may help.

    Attributes:
      name: of the case.
      network: `dense`, `dense, shifted` (whose training images are shifted), `conv` or `conv, normalised`.
      sizes: of its data and its run.
      source: MNIST or digits.
      noise: part of the training labels that is wrong.
      ratio: between examples of the rarest class and of the most frequent one.
      moved: pixels that validation and test images are shifted sideways, in the root of the mean square.
      tuned: names of the hyperparameters that are tuned.
      starts: where tuning starts, by name: arguments of `hyperparameters`.
      axes: of grids and random search: the values of two arguments; the first axis alone, at the second's first value,
        is the grid of five.
    """

    name: str
    network: str
    sizes: Sizes
    source: str = "MNIST"
    noise: float = 0.0
    ratio: float = 1.0
    moved: float = 0.0
    tuned: tuple[str, ...] = ("score",)
    starts: tuple[tuple[str, dict[str, float]], ...] = (("usual", {}),)
    axes: tuple[tuple[str, tuple[float, ...]], tuple[str, tuple[float, ...]]] = (
        ("decay", (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)),
        ("smoothing", (0.0, 0.1, 0.2, 0.4)),
    )


class Data(NamedTuple):
    """Images (num, side, side) and labels (num,) of one seed: training examples first, then validation examples.

    `normals` (num_steps, batch_size, 2) are what shifts of training images are drawn from, down and to the right.
    """

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array
    wrong: jax.Array
    batches: jax.Array
    val_batches: jax.Array
    normals: jax.Array
    key: jax.Array


class Batch(NamedTuple):
    """What the losses of a training step see.

    Attributes:
      x: training images, shape (batch_size, side, side).
      y: their labels.
      places: their places among the examples, where their scores are.
      normals: what their shifts are drawn from, shape (batch_size, 2).
      x_val: validation images.
      y_val: their labels.
      start: hyperparameters where tuning starts.
      free: for each of them 1 where it is tuned, else 0.
    """

    x: jax.Array
    y: jax.Array
    places: jax.Array
    normals: jax.Array
    x_val: jax.Array
    y_val: jax.Array
    start: Any
    free: Any


def load(task: Task, seed: int, folder: Path | None) -> Data:
    """The data of a seed: splits, flaws, batches, and the key of the first parameters; the same for all methods."""
    sizes = task.sizes
    rng = np.random.default_rng([seed, 1])
    # Enough to choose from where classes are made rare.
    spare = sizes.num_train if task.ratio == 1 else 10 * sizes.num_train
    num_seen = spare + sizes.num_val
    if task.source == "MNIST":
        split = data.mnist(seed, num_seen, sizes.num_test, folder)
    else:
        split = data.digits(seed, num_seen, sizes.num_test)
    x_seen, x_test = (data.resized(x, SIDE) for x in (split.x_train, split.x_val))
    x_val, y_val = x_seen[spare:], split.y_train[spare:]
    normals = np.random.default_rng([seed, 3]).normal(size=(sizes.num_steps, sizes.batch_size, 2))
    if task.moved:
        x_val, x_test = (_moved_sideways(rng, x, task.moved) for x in (x_val, x_test))
    kept = np.arange(spare) if task.ratio == 1 else _rarer(rng, split.y_train[:spare], sizes.num_train, task.ratio)
    x_train, clean = x_seen[kept], jnp.asarray(split.y_train[kept], jnp.int32)
    key_labels, key_params = jax.random.split(jax.random.key(seed))
    noisy = problems.corrupt_labels(key_labels, clean, NUM_CLASSES, task.noise) if task.noise else clean
    return Data(
        jnp.asarray(np.concatenate([x_train, x_val]), jnp.float32),
        jnp.concatenate([noisy, jnp.asarray(y_val, jnp.int32)]),
        jnp.asarray(x_test, jnp.float32),
        jnp.asarray(split.y_val, jnp.int32),
        noisy != clean,
        jnp.asarray(in_turn(rng, np.arange(len(kept)), sizes.batch_size, sizes.num_steps)),
        jnp.asarray(in_turn(rng, len(kept) + np.arange(sizes.num_val), sizes.num_val_batch, sizes.num_steps)),
        jnp.asarray(normals, jnp.float32),
        key_params,
    )


def shifted(x: jax.Array, by: jax.Array) -> jax.Array:
    """Images (num, side, side) shifted by (num, 2) pixels, down and to the right, between pixels linearly."""
    grid = jnp.indices(x.shape[1:])
    result: jax.Array = jax.vmap(lambda image, far: map_coordinates(image, list(grid - far[:, None, None]), 1))(x, by)
    return result


def _moved_sideways(rng: np.random.Generator, x: npt.NDArray[Any], how_far: float) -> npt.NDArray[Any]:
    by = np.stack([np.zeros(len(x)), how_far * rng.normal(size=len(x))], axis=1)
    return np.asarray(shifted(jnp.asarray(x, jnp.float32), jnp.asarray(by, jnp.float32)))


def _rarer(rng: np.random.Generator, y: npt.NDArray[Any], num: int, ratio: float) -> npt.NDArray[Any]:
    """Places of `num` examples whose classes are rarer from one to the next, by the same factor (Cui et al. 2019)."""
    parts = ratio ** (np.arange(NUM_CLASSES) / (NUM_CLASSES - 1))
    counts = np.maximum(1, np.round(num * parts / parts.sum())).astype(int)
    counts[0] += num - counts.sum()
    found = [np.flatnonzero(y == label)[:count] for label, count in enumerate(counts)]
    return rng.permutation(np.concatenate(found))


def in_turn(rng: np.random.Generator, places: npt.NDArray[Any], size: int, num_steps: int) -> npt.NDArray[np.int32]:
    """Batches that go through all examples in an order of their own, again and again: shape (num_steps, size)."""
    epochs = -(-num_steps * size // len(places))
    order = np.concatenate([rng.permutation(places) for _ in range(epochs)])
    return order[: num_steps * size].reshape(num_steps, size).astype(np.int32)


# --- Hyperparameters. What is tuned is the deviation from where tuning starts; those that are held have none.


def hyperparameters(
    here: Data,
    network: str,
    decay: float = 1e-4,
    smoothing: float = 0.0,
    power: float = 0.0,
    shift: float = 0.2,
    aspect: float = 1.0,
) -> dict[str, Any]:
    """All hyperparameters as unbounded numbers.

    Args:
      here: the data.
      network: its name.
      decay: of the weights of each layer.
      smoothing: part of a label that is spread over all classes.
      power: classes weigh their number of training examples to the power of minus this.
      shift: pixels that training images are shifted sideways, in the root of the mean square; `dense, shifted` alone.
      aspect: how many times as far they are shifted down.
    """
    num = here.wrong.shape[0]
    counts = jnp.bincount(here.y[:num], length=NUM_CLASSES)
    smoothing = min(max(smoothing, _LEAST_SMOOTHING), 1 - _LEAST_SMOOTHING)
    start = {
        "score": jnp.zeros(here.y.shape, jnp.float32),
        "class": -jnp.float32(power) * jnp.log(jnp.maximum(counts, 1).astype(jnp.float32)),
        "decay": {name: jnp.log(jnp.float32(decay)) for name in SHAPES[network]},
        "smoothing": jnp.log(jnp.float32(smoothing / (1 - smoothing))),
    }
    if network == SHIFTED:
        start["shift"] = jnp.log(shift * jnp.array([aspect, 1.0], jnp.float32))
    return start


def in_use(deviations: Any, batch: Batch) -> Any:
    """The hyperparameters themselves."""
    return jax.tree.map(lambda start, free, x: start + free * x, batch.start, batch.free, deviations)


def batch_of(here: Data, batches: jax.Array, step: Any, start: Any, free: Any) -> Batch:
    """The training and validation batch of a step; every method sees the same ones."""
    places, there = batches[step], here.val_batches[step]
    normals = here.normals[step]
    return Batch(here.x[places], here.y[places], places, normals, here.x[there], here.y[there], start, free)


# --- Networks.

SHAPES = {
    "dense": {"hidden": (SIDE**2, 100), "readout": (100, NUM_CLASSES)},
    SHIFTED: {"hidden": (SIDE**2, 100), "readout": (100, NUM_CLASSES)},
    "conv": {"first": (9, 8), "second": (72, 16), "readout": (256, NUM_CLASSES)},
    "conv, normalised": {"first": (9, 8), "second": (72, 16), "readout": (256, NUM_CLASSES)},
}


def init_params(network: str, key: jax.Array) -> dict[str, Any]:
    """He's initialisation (2015); gains and offsets of a normalisation are in the biases' place."""
    shapes = SHAPES[network]
    params = {}
    for name, shape, own in zip(shapes, shapes.values(), jax.random.split(key, len(shapes)), strict=True):
        kernel = jax.random.normal(own, shape, jnp.float32) * (2 / shape[0]) ** 0.5
        params[name] = {"kernel": kernel, "bias": jnp.zeros(shape[1], jnp.float32)}
        if network == "conv, normalised" and name != "readout":
            params[name]["gain"] = jnp.ones(shape[1], jnp.float32)
    return params


def logits(network: str, params: Any, x: jax.Array, num_known: int | None = None) -> jax.Array:
    """Shape (num, NUM_CLASSES), of images (num, side, side); batches are normalised by their first `num_known`."""
    if network.startswith("dense"):
        hidden = jax.nn.softplus(_affine(params["hidden"], x.reshape(len(x), -1)))
        return _affine(params["readout"], hidden)
    hidden = _convolved(params["first"], x[..., None], 2, num_known)
    hidden = _convolved(params["second"], hidden, 1, num_known)
    return _affine(params["readout"], hidden.reshape(len(x), -1))


def _affine(layer: Any, x: jax.Array) -> jax.Array:
    result: jax.Array = x @ layer["kernel"] + layer["bias"]
    return result


def _convolved(layer: Any, x: jax.Array, stride: int, num_known: int | None) -> jax.Array:
    """A convolution of 3 x 3 as a product of matrices, which phases that run side by side compile into fast code."""
    count = (x.shape[1] - 3) // stride + 1
    places = stride * jnp.arange(count)[:, None] + jnp.arange(3)
    patches = x[:, places[:, None, :, None], places[None, :, None, :]].reshape(len(x), count, count, -1)
    if "gain" not in layer:
        return jax.nn.softplus(_affine(layer, patches))
    hidden = patches @ layer["kernel"]
    known = hidden[:num_known]
    normal = (hidden - jnp.mean(known, (0, 1, 2))) / jnp.sqrt(jnp.var(known, (0, 1, 2)) + _EPSILON)
    return jax.nn.softplus(normal * layer["gain"] + layer["bias"])


def inner_loss(network: str, params: Any, deviations: Any, batch: Batch) -> jax.Array:
    """Cross-entropy with smoothed labels, each example weighted by itself and by its class, and weight decay."""
    hyper = in_use(deviations, batch)
    x = shifted(batch.x, jnp.exp(hyper["shift"]) * batch.normals) if network == SHIFTED else batch.x
    smoothing = jax.nn.sigmoid(hyper["smoothing"])
    targets = (1 - smoothing) * jax.nn.one_hot(batch.y, NUM_CLASSES) + smoothing / NUM_CLASSES
    losses = -jnp.sum(targets * jax.nn.log_softmax(logits(network, params, x)), axis=1)
    weights = 2 * jax.nn.sigmoid(hyper["score"][batch.places])
    weights = weights * NUM_CLASSES * jax.nn.softmax(hyper["class"])[batch.y]
    penalties = [jnp.exp(hyper["decay"][name]) * jnp.sum(params[name]["kernel"] ** 2) for name in hyper["decay"]]
    return jnp.mean(weights * losses) + sum(penalties, start=jnp.float32(0)) / 2


def outer_loss(network: str, params: Any, deviations: Any, batch: Batch) -> jax.Array:
    """The mean cross-entropy of validation examples; a normalisation is by their own statistics."""
    return mean_loss(logits(network, params, batch.x_val), batch.y_val)


def mean_loss(values: jax.Array, y: jax.Array) -> jax.Array:
    """The mean cross-entropy."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(values), y[:, None], axis=1))


def _no_start(deviations: Any, batch: Batch) -> Any:
    raise NotImplementedError("Training starts where it starts.")


@functools.cache
def problem_of(network: str) -> cm.BilevelProblem:
    """The losses of a network."""
    return cm.BilevelProblem(functools.partial(inner_loss, network), functools.partial(outer_loss, network), _no_start)
