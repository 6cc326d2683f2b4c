"""Finite sums for single-loop methods: a quadratic, strengths of a logistic regression, and cleaning of digits."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import contrastive_meta as cm
from benchmarks import data

QUADRATIC, IJCNN, CLEANING = "quadratic", "ijcnn1", "data cleaning"


class Examples(NamedTuple):
    """Some examples: inputs (num, features), targets (num,), and their places among all (num,)."""

    x: jax.Array
    y: jax.Array
    place: jax.Array


class Sample(NamedTuple):
    """What the losses see: examples of the inner and of the outer sum."""

    train: Examples
    val: Examples


class Suite(NamedTuple):
    """A bilevel problem whose two losses are means over examples, cut into minibatches.

    Attributes:
      problem: losses of (params, meta_params, sample).
      whole: every example.
      train: of the inner sum, with leading axes (batches, examples).
      val: of the outer sum, likewise.
      params: where learning starts.
      meta_params: where meta-learning starts.
      unit: outer step sizes of a grid are in this unit, about one over the curvature of the outer problem.
      length: and those of normalised steps in this one, about how far meta-parameters have to go.
    """

    problem: cm.BilevelProblem
    whole: Sample
    train: Examples
    val: Examples
    params: jax.Array
    meta_params: jax.Array
    unit: float
    length: float

    def sample(self, key: jax.Array) -> Sample:
        """A minibatch of either sum."""
        of_train, of_val = jax.random.split(key)
        i = jax.random.randint(of_train, (), 0, self.train.y.shape[0])
        j = jax.random.randint(of_val, (), 0, self.val.y.shape[0])
        return Sample(jax.tree.map(lambda leaf: leaf[i], self.train), jax.tree.map(lambda leaf: leaf[j], self.val))


class Sizes(NamedTuple):
    """Examples of either sum, and in a minibatch."""

    num: int
    batch: int


def quadratic(seed: int, sizes: Sizes, folder: Path | None) -> Suite:
    """Least squares in both: the inner residual is a z + e x - b, the outer one c z - y, z of size 20 and x of 10.

    Both are penalised, by .1 / 2 of the sum of squares of z and of x: the outer problem is strongly convex.
    """
    rng, size, size_meta = np.random.default_rng([seed, 5]), 20, 10
    truth = rng.normal(size=size)

    def inner(z: jax.Array, x: jax.Array, sample: Sample) -> jax.Array:
        residual = sample.train.x @ jnp.concatenate([z, x]) - sample.train.y
        return jnp.mean(jnp.square(residual)) / 2 + 0.05 * jnp.sum(jnp.square(z))

    def outer(z: jax.Array, x: jax.Array, sample: Sample) -> jax.Array:
        residual = sample.val.x @ z - sample.val.y
        return jnp.mean(jnp.square(residual)) / 2 + 0.05 * jnp.sum(jnp.square(x))

    a, c = rng.normal(size=(sizes.num, size + size_meta)), rng.normal(size=(sizes.num, size))
    a[:, size:] += a[:, :size_meta]
    split = data.Split(a, rng.normal(size=sizes.num), c, c @ truth + rng.normal(size=sizes.num))
    return _suite(inner, outer, split, sizes, np.zeros(size), np.zeros(size_meta), (1.0, 1.0))


def ijcnn1(seed: int, sizes: Sizes, folder: Path | None) -> Suite:
    """Logistic regression with the logarithm of a strength for each of 22 weights, all strengths 1 at first."""
    split = data.ijcnn1(seed, sizes.num, sizes.num, folder)

    def error(z: jax.Array, seen: Examples) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-(2.0 * seen.y - 1.0) * (seen.x @ z)))

    def inner(z: jax.Array, x: jax.Array, sample: Sample) -> jax.Array:
        return error(z, sample.train) + jnp.sum(jnp.exp(x) * jnp.square(z)) / 2

    def outer(z: jax.Array, x: jax.Array, sample: Sample) -> jax.Array:
        return error(z, sample.val)

    return _suite(inner, outer, split, sizes, np.zeros(22), np.zeros(22), (10.0, 10.0))


def cleaning(seed: int, sizes: Sizes, folder: Path | None) -> Suite:
    """Softmax regression on digits of 7 x 7 pixels, half of them mislabelled, each weighted by a sigmoid.

    Half as many clean digits are the outer sum; .1 / 2 of the sum of squares penalises 500 parameters.
    """
    num_classes, side = 10, 7
    split = data.mnist(seed, sizes.num, sizes.num // 2, folder)
    rng = np.random.default_rng([seed, 6])
    wrong = rng.random(sizes.num) < 0.5
    y = np.where(wrong, rng.integers(0, num_classes, sizes.num), split.y_train).astype(np.int32)
    x_train, x_val = (_with_constant(_pooled(x, side)) for x in (split.x_train, split.x_val))

    def errors(z: jax.Array, seen: Examples) -> jax.Array:
        logits = seen.x @ z.reshape(-1, num_classes)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), seen.y[:, None], axis=1)[:, 0]

    def inner(z: jax.Array, x: jax.Array, sample: Sample) -> jax.Array:
        weighted = jax.nn.sigmoid(x[sample.train.place]) * errors(z, sample.train)
        return jnp.mean(weighted) + 0.05 * jnp.sum(jnp.square(z))

    def outer(z: jax.Array, x: jax.Array, sample: Sample) -> jax.Array:
        return jnp.mean(errors(z, sample.val))

    split = data.Split(x_train, y, x_val, split.y_val)
    params = np.zeros((side**2 + 1) * num_classes)
    return _suite(inner, outer, split, sizes, params, np.zeros(sizes.num), (10.0 * sizes.num, 30.0))


PROBLEMS: dict[str, Callable[[int, Sizes, Path | None], Suite]] = {
    QUADRATIC: quadratic,
    IJCNN: ijcnn1,
    CLEANING: cleaning,
}


def _suite(
    inner: Callable[[jax.Array, jax.Array, Sample], jax.Array],
    outer: Callable[[jax.Array, jax.Array, Sample], jax.Array],
    split: data.Split,
    sizes: Sizes,
    params: npt.NDArray[np.float64],
    meta_params: npt.NDArray[np.float64],
    units: tuple[float, float],
) -> Suite:
    whole = Sample(_examples(split.x_train, split.y_train), _examples(split.x_val, split.y_val))
    train, val = (
        jax.tree.map(lambda leaf: leaf.reshape(-1, min(sizes.batch, leaf.shape[0]), *leaf.shape[1:]), part)
        for part in whole
    )
    start, problem = jnp.asarray(params), cm.BilevelProblem(inner, outer, lambda x, sample: jnp.asarray(params))
    return Suite(problem, whole, train, val, start, jnp.asarray(meta_params), *units)


def _examples(x: npt.NDArray[np.float64], y: npt.NDArray[np.generic]) -> Examples:
    return Examples(jnp.asarray(x), jnp.asarray(y), jnp.arange(len(y)))


def _pooled(x: npt.NDArray[np.float64], side: int) -> npt.NDArray[np.float64]:
    """Images as rows, reduced to `side` x `side` by means."""
    before = round(x.shape[1] ** 0.5)
    blocks = x.reshape(-1, side, before // side, side, before // side)
    pooled: npt.NDArray[np.float64] = blocks.mean(axis=(2, 4)).reshape(-1, side**2)
    return pooled


def _with_constant(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)
