"""Classifiers with a learned L2 strength for every synapse: their data, networks and losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import contrastive_meta as cm
from benchmarks import data

NUISANCE, MNIST, MNIST_FULL, CIFAR = "digits and noise", "MNIST", "MNIST, full size", "CIFAR-10"
_NUM_CLASSES = 10


class Task(NamedTuple):
    """Data to learn from, to learn strengths by, and to report on; and where learning starts.

    Attributes:
      x_train: inputs.
      y_train: their labels.
      x_val: inputs of the validation half.
      y_val: their labels.
      x_test: inputs that no choice is made by.
      y_test: their labels.
      start: first parameters of the network, the same at every outer step, as published.
    """

    x_train: jax.Array
    y_train: jax.Array
    x_val: jax.Array
    y_val: jax.Array
    x_test: jax.Array
    y_test: jax.Array
    start: Any


class Case(NamedTuple):
    """A data set and a network.

    Attributes:
      load: `(seed, folder) -> Task`; the seed draws the split and where learning starts.
      apply: `(network, x) -> scores`.
      num_nuisances: of the inputs, the last ones, that say nothing of the label.
    """

    load: Callable[[int, Path | None], Task]
    apply: Callable[[Any, jax.Array], jax.Array]
    num_nuisances: int = 0


def problem(case: Case) -> cm.BilevelProblem:
    """L_in = mean cross-entropy (train) + 1/2 sum_i exp(log_strength_i) params_i^2; L_out that of the validation half.

    Biases have strengths as well.

    Reference:
      Zucchet et al. (2022), section 5.2, whose penalty lacks the half.
    """

    def inner(params: Any, log_strengths: Any, task: Task) -> jax.Array:
        pulls = jax.tree.map(lambda p, s: jnp.sum(jnp.exp(s) * jnp.square(p)), params, log_strengths)
        penalty: jax.Array = sum(jax.tree.leaves(pulls)) / 2
        return _cross_entropy(case.apply(params, task.x_train), task.y_train) + penalty

    def outer(params: Any, log_strengths: Any, task: Task) -> jax.Array:
        return _cross_entropy(case.apply(params, task.x_val), task.y_val)

    return cm.BilevelProblem(inner, outer, lambda log_strengths, task: task.start)


def strengths(task: Task, strength: float) -> Any:
    """The logarithms of one strength for all."""
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, np.log(strength)), task.start)


def accuracy(case: Case, params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    """The fraction of inputs whose label has the highest score."""
    return jnp.mean(jnp.argmax(case.apply(params, x), axis=-1) == y)


def told_apart(case: Case, log_strengths: Any, task: Task) -> float | None:
    """How often a nuisance is held more strongly than an input that says something (AUC); None without nuisances.

    An input's hold is the mean logarithm over the synapses that leave it. Pixels that are constant are left out.
    """
    if not case.num_nuisances:
        return None
    hold = np.mean(np.asarray(log_strengths["hidden_0"]["kernel"]), axis=1)
    varies = np.std(np.asarray(task.x_train), axis=0) > 0
    signal, nuisance = hold[: -case.num_nuisances][varies[: -case.num_nuisances]], hold[-case.num_nuisances :]
    above = nuisance[:, None] - signal
    return float(np.mean((above > 0) + 0.5 * (above == 0)))


def cases(num: int | None = None, width: int = 32) -> dict[str, Case]:
    """All, by name; `num` examples in each half, where it is given."""
    return {
        NUISANCE: Case(lambda seed, _: _digits_and_noise(seed, num or 250, width), cm.architectures.mlp, 64),
        MNIST: Case(lambda seed, folder: _mnist(seed, num or 500, (width,), folder), cm.architectures.mlp),
        MNIST_FULL: Case(lambda seed, folder: _full_mnist(seed, num or 30_000, folder), cm.architectures.mlp),
        CIFAR: Case(lambda seed, folder: _cifar(seed, num or 3_000, folder), cm.architectures.cnn),
    }


def _digits_and_noise(seed: int, num: int, width: int) -> Task:
    """Digits of 8 x 8 pixels, and as many inputs again of noise; the digits that are left are to test on."""
    split = data.digits(seed, num, 1797 - num)
    rng = np.random.default_rng(seed)
    x = np.concatenate([split.x_train, split.x_val])
    mean, deviation = split.x_train.mean(axis=0), split.x_train.std(axis=0)
    x = np.where(deviation > 0, (x - mean) / np.where(deviation > 0, deviation, 1.0), 0.0)
    x = np.concatenate([x, rng.standard_normal(x.shape)], axis=1)
    y = np.concatenate([split.y_train, split.y_val])
    return _task(x, y, x[2 * num :], y[2 * num :], num, _mlp(seed, x.shape[1], (width, width)))


def _mnist(seed: int, num: int, widths: tuple[int, ...], folder: Path | None) -> Task:
    """Pixels averaged in blocks of 2 x 2; 2,000 of the official test images."""
    x, y, x_test, y_test = data.images("mnist", folder)
    chosen, tested = (np.random.default_rng(seed).permutation(len(part)) for part in (y, y_test))
    chosen, tested = chosen[: 2 * num], tested[:2000]
    blocks = [
        images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(-1, 196) for images in (x[chosen], x_test[tested])
    ]
    x, x_test = (_grey(part) for part in blocks)
    return _task(x, y[chosen], x_test, y_test[tested], num, _mlp(seed, 196, widths))


def _full_mnist(seed: int, num: int, folder: Path | None) -> Task:
    """All of it, and the network of the paper: five hidden layers of 256."""
    x, y, x_test, y_test = data.images("mnist", folder)
    chosen = np.random.default_rng(seed).permutation(len(y))[: 2 * num]
    x, x_test = (_grey(part.reshape(-1, 784)) for part in (x[chosen], x_test))
    return _task(x, y[chosen], x_test, y_test, num, _mlp(seed, 784, (256,) * 5))


def _cifar(seed: int, num: int, folder: Path | None) -> Task:
    """The subset, each channel standardised; blocks of 6, 16 and 32 channels."""
    x, y, x_test, y_test = data.images("cifar10", folder)
    chosen = np.random.default_rng(seed).permutation(len(y))[: 2 * num]
    mean, deviation = x.mean(axis=(0, 1, 2)), x.std(axis=(0, 1, 2))
    start = cm.architectures.cnn_params(jax.random.key(seed), (32, 32, 3), (6, 16, 32), _NUM_CLASSES)
    return _task((x[chosen] - mean) / deviation, y[chosen], (x_test - mean) / deviation, y_test, num, start)


def _grey(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Standardised by MNIST's own mean and deviation, .1307 and .3081 of white."""
    return np.asarray((images / 255 - 0.1307) / 0.3081)


def _mlp(seed: int, num_inputs: int, widths: tuple[int, ...]) -> Any:
    return cm.architectures.mlp_params(jax.random.key(seed), (num_inputs, *widths, _NUM_CLASSES))


def _task(
    x: npt.NDArray[Any], y: npt.NDArray[Any], x_test: npt.NDArray[Any], y_test: npt.NDArray[Any], num: int, start: Any
) -> Task:
    inputs = [jnp.asarray(part, jnp.float32) for part in (x[:num], x[num : 2 * num], x_test)]
    labels = [jnp.asarray(part, jnp.int32) for part in (y[:num], y[num : 2 * num], y_test)]
    return Task(inputs[0], labels[0], inputs[1], labels[1], inputs[2], labels[2], start)


def _cross_entropy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels))
