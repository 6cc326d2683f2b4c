"""The suite of the speed benchmarks: problems on real data."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

import contrastive_meta as cm
from benchmarks import data
from benchmarks.cases import Instance
from benchmarks.harness import Session, precision
from benchmarks.speed_cnn import cnn_strengths


class Problem(NamedTuple):
    """A member of the suite.

    Attributes:
      name: short.
      title: what is learned from what.
      build: the problem in JAX's current precision.
      floor: strength of the penalty at the start, the least curvature.
      convex: whether the solution is unique.
      batched: whether `build` gives a batch of tasks.
      wide: whether every row of the grid is measured, or only the main ones.
      cold: whether learning from its very beginning is measured as well.
      repeats: timed rounds.
    """

    name: str
    title: str
    build: Callable[[Session], Instance]
    floor: float
    convex: bool = True
    batched: bool = False
    wide: bool = False
    cold: bool = False
    repeats: int = 5


def _ridge(session: Session) -> Instance:
    return cm.problems.ridge(*data.diabetes(session.seed), strength=0.1)


def _digits(session: Session) -> Instance:
    return cm.problems.softmax_regression(*data.digits(session.seed, 500, 500), num_classes=10, strength=1e-2)


def _cleaning(session: Session) -> Instance:
    return _cleaned(data.digits(session.seed, 500, 500), session.seed)


def _mnist(session: Session) -> Instance:
    split = data.mnist(session.seed, 2000, 2000, session.data)
    return cm.problems.softmax_regression(*split, num_classes=10, strength=1e-2)


def _mnist_cleaning(session: Session) -> Instance:
    return _cleaned(data.mnist(session.seed, 2000, 2000, session.data), session.seed)


def _ijcnn1(session: Session) -> Instance:
    return cm.problems.logistic_regression(*data.ijcnn1(session.seed, 20_000, 20_000, session.data), strength=1e-2)


def _a9a(session: Session) -> Instance:
    return cm.problems.logistic_regression(*data.a9a(session.seed, 10_000, 10_000, session.data), strength=1e-2)


def _newsgroups(session: Session) -> Instance:
    split = data.newsgroups(session.seed, 2000, 2000, 1000, session.data)
    return cm.problems.softmax_regression(*split, num_classes=20, strength=1e-3)


def _mlp(session: Session) -> Instance:
    return _network(data.digits(session.seed, 500, 500), 140, session.seed)


def _large_mlp(session: Session) -> Instance:
    return _network(data.mnist(session.seed, 500, 500, session.data), 126, session.seed)


def _cnn(session: Session) -> Instance:
    split = data.mnist(session.seed, 150, 150, session.data)
    return cnn_strengths(*split, num_classes=10, key=jax.random.key(session.seed), strength=1e-2)


def _sinusoids(session: Session) -> Instance:
    return cm.problems.sinusoids(jax.random.key(session.seed), num_tasks=10, strength=0.5)


def _network(split: data.Split, width: int, seed: int) -> Instance:
    return cm.problems.mlp_strengths(*split, num_classes=10, widths=(width,), key=jax.random.key(seed), strength=2e-2)


def _cleaned(split: data.Split, seed: int) -> Instance:
    with precision(False):  # the same labels must be wrong in both precisions
        noisy = np.asarray(
            cm.problems.corrupt_labels(jax.random.key(seed), split.y_train, num_classes=10, fraction=0.5)
        )
    return cm.problems.data_cleaning(split.x_train, noisy, split.x_val, split.y_val, num_classes=10, decay=1e-2)


RIDGE = Problem(
    "ridge", "Ridge regression on diabetes: a strength per weight", _ridge, 0.1, wide=True, cold=True, repeats=11
)
DIGITS = Problem(
    "digits", "Softmax regression on digits: a strength per weight", _digits, 1e-2, wide=True, cold=True, repeats=7
)
CLEANING = Problem(
    "cleaning", "Data cleaning on digits: a weight per example", _cleaning, 1e-2, wide=True, cold=True, repeats=7
)
SUITE: Sequence[Problem] = (
    RIDGE,
    DIGITS,
    CLEANING,
    Problem("ijcnn1", "Logistic regression on ijcnn1: a strength per feature", _ijcnn1, 1e-2),
    Problem("a9a", "Logistic regression on a9a: a strength per feature", _a9a, 1e-2),
    Problem("MNIST", "Softmax regression on MNIST: a strength per weight", _mnist, 1e-2, repeats=3),
    Problem("MNIST cleaning", "Data cleaning on MNIST: a weight per example", _mnist_cleaning, 1e-2, repeats=3),
    Problem("CNN", "Tanh CNN on MNIST: a strength per synapse", _cnn, 1e-2, convex=False, repeats=3),
    Problem("MLP 1e4", "Tanh MLP on digits: a strength per synapse", _mlp, 2e-2, convex=False, repeats=3),
    Problem("newsgroups", "Softmax regression on newsgroups: a strength per weight", _newsgroups, 1e-3, repeats=3),
    Problem("MLP 1e5", "Tanh MLP on MNIST: a strength per synapse", _large_mlp, 2e-2, convex=False, repeats=3),
    Problem("sinusoids", "Sinusoids, 10 tasks: the anchor of a tanh MLP", _sinusoids, 0.5, convex=False, batched=True),
)
