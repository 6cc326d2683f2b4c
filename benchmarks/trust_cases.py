"""The cases of the benchmark `trust`: problems, seeds, precisions, tolerances and units, in two halves."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks import data

CALIBRATION, HELD_OUT = "calibration", "held-out"
HALVES = (CALIBRATION, HELD_OUT)
# Data seeds and meta-parameter seeds of a half begin here, so that no half has seen another's.
FIRST_SEED = {CALIBRATION: 0, HELD_OUT: 500}
TOLERANCES = (1e-2, 1e-4)


class Built(NamedTuple):
    """A problem in float64, with where learning starts."""

    losses: cm.BilevelProblem
    meta_params: Any
    data: Any
    start: Any


Learner = Callable[[Any, Any, Any], cm.InnerSolver]


class Family(NamedTuple):
    """Cases that share their programs: they differ in numbers only.

    Attributes:
      name: short.
      title: what is learned from what.
      half: constants are chosen on `CALIBRATION`; verdicts are for `HELD_OUT`.
      build: the problem of a data seed.
      learner: of the free phase, from a tolerance, a step size and a momentum.
      convex: whether the solution is unique.
    """

    name: str
    title: str
    half: str
    build: Callable[[int, Path | None], Built]
    learner: Learner
    convex: bool = True


class Scaling(NamedTuple):
    """Other units: the outer loss is multiplied by `outer`, and `params` are measured in `unit`."""

    name: str
    outer: float
    unit: float


SCALINGS = (Scaling("as it is", 1.0, 1.0), Scaling("outer loss x 1e6", 1e6, 1.0), Scaling("params x 1e-4", 1.0, 1e-4))


class Case(NamedTuple):
    """One call of an estimator, as data.

    Attributes:
      family: the problem.
      data_seed: of the data, and of a network's first weights.
      meta_seed: of the meta-parameters.
      x64: float64 or float32.
      tolerance: the free phase ends where the gradient norm has fallen by this factor.
      scaling: of units.
    """

    family: Family
    data_seed: int
    meta_seed: int
    x64: bool
    tolerance: float
    scaling: Scaling

    @property
    def warm(self) -> bool:
        """Whether learning starts at the solution for other meta-parameters, as from an outer loop's second step on."""
        return not self.family.convex and self.data_seed % 2 == 1

    @property
    def trains(self) -> bool:
        """Whether an outer loop is run on it as well."""
        return self.tolerance == TOLERANCES[-1] and self.scaling == SCALINGS[0]


def cases(family: Family, num_seeds: int, precisions: Sequence[bool]) -> Iterator[Case]:
    """All cases of a family: `num_seeds` seeds of data and as many of meta-parameters, paired."""
    first = FIRST_SEED[family.half]
    for x64, seed in itertools.product(precisions, range(first, first + num_seeds)):
        for tolerance, scaling in itertools.product(TOLERANCES, SCALINGS):
            yield Case(family, seed, seed, x64, tolerance, scaling)


class ScaledTask(NamedTuple):
    """Data, where learning starts (in the problem's own units), and the units."""

    data: Any
    start: Any
    outer: jax.Array
    unit: jax.Array


@functools.cache
def scaled(losses: cm.BilevelProblem) -> cm.BilevelProblem:
    """The same losses in the units that the task says: params = unit * what is learned."""

    def own(params: Any, task: ScaledTask) -> Any:
        return jax.tree.map(lambda leaf: task.unit * leaf, params)

    return cm.BilevelProblem(
        inner_loss=lambda params, meta_params, task: losses.inner(own(params, task), meta_params, task.data),
        outer_loss=lambda params, meta_params, task: (
            task.outer * losses.outer(own(params, task), meta_params, task.data)
        ),
        init_params=lambda meta_params, task: jax.tree.map(lambda leaf: leaf / task.unit, task.start),
    )


def moved(meta_params: Any, seed: int, distance: float = 0.5) -> Any:
    """Meta-parameters at a standard normal distance from the given ones, the same in both precisions."""
    rng = np.random.default_rng([seed, 1])
    return jax.tree.map(lambda x: x + distance * rng.standard_normal(x.shape), meta_params)


def lbfgs(tol: Any, step_size: Any, momentum: Any) -> cm.InnerSolver:
    """L-BFGS, which needs no settings."""
    return cm.LBFGS(tol=tol, max_steps=3000)


def descent(tol: Any, step_size: Any, momentum: Any) -> cm.InnerSolver:
    """Nesterov's descent."""
    optimizer = optax.sgd(step_size, momentum=momentum, nesterov=True)
    return cm.OptaxDescent(optimizer, tol=tol, max_steps=20_000)


def _convex(instance: cm.problems.ProblemInstance) -> Built:
    problem, meta_params, task, _ = instance
    return Built(problem, meta_params, task, problem.init(meta_params, task))


def _cleaning(split: data.Split, seed: int, num_classes: int) -> Built:
    noisy = cm.problems.corrupt_labels(jax.random.key(seed), split.y_train, num_classes, fraction=0.3)
    return _convex(
        cm.problems.data_cleaning(split.x_train, noisy, split.x_val, split.y_val, num_classes=num_classes, decay=1e-2)
    )


def _quadratic(seed: int, dim: int, condition_number: float) -> Built:
    key = jax.random.key(seed)
    return _convex(cm.problems.quadratic(key, dim=dim, num_meta=5, condition_number=condition_number))


def _network(split: Any, seed: int, widths: Sequence[int], strength: float, num_classes: int, by_layer: bool) -> Built:
    """A tanh network; `by_layer` shares one strength among the kernel, and one among the biases, of a layer."""
    problem, meta_params, task, _ = cm.problems.mlp_strengths(
        split.x_train, split.y_train, split.x_val, split.y_val, num_classes, widths,
        key=jax.random.key(seed), strength=strength,
    )  # fmt: skip
    start = problem.init(meta_params, task)
    shared = jax.tree.map(lambda leaf: leaf.ravel()[0], meta_params) if by_layer else meta_params
    return Built(problem, shared, task, start)


def _sinusoid(seed: int, widths: Sequence[int], num_support: int, strength: float) -> Built:
    problem, meta_params, tasks, _ = cm.problems.sinusoids(
        jax.random.key(seed), num_tasks=1, num_support=num_support, widths=widths, strength=strength
    )
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    return Built(problem, meta_params, task, problem.init(meta_params, task))


def _coarse_digits(seed: int, num: int) -> data.Split:
    """Digits of 4 x 4 pixels."""
    split = data.digits(seed, num, num)

    def pooled(x: Any) -> Any:
        return x.reshape(-1, 4, 2, 4, 2).mean(axis=(2, 4)).reshape(len(x), 16)

    return split._replace(x_train=pooled(split.x_train), x_val=pooled(split.x_val))


def _parity(split: data.Split) -> data.Split:
    return split._replace(y_train=split.y_train % 2, y_val=split.y_val % 2)


FAMILIES: Sequence[Family] = (
    Family(
        "ridge", "Ridge regression on diabetes: a strength per weight", CALIBRATION,
        lambda seed, folder: _convex(cm.problems.ridge(*data.diabetes(seed), strength=0.1)), descent,
    ),
    Family(
        "softmax", "Softmax regression on digits: a strength per weight", CALIBRATION,
        lambda seed, folder: _convex(
            cm.problems.softmax_regression(*data.digits(seed, 200, 200), num_classes=10, strength=1e-2)
        ), lbfgs,
    ),
    Family(
        "cleaning", "Data cleaning on coarse digits: a weight per example", CALIBRATION,
        lambda seed, folder: _cleaning(_coarse_digits(seed, 200), seed, 10), descent,
    ),
    Family(
        "breast cancer", "Logistic regression on breast cancer: a strength per weight", CALIBRATION,
        lambda seed, folder: _convex(cm.problems.logistic_regression(*data.breast_cancer(seed), strength=1e-2)),
        descent,
    ),
    Family(
        "quadratic 1e2", "Quadratic, condition number 100: anchor, drive and strengths", CALIBRATION,
        lambda seed, folder: _quadratic(seed, 30, 1e2), descent,
    ),
    Family(
        "ijcnn1", "Logistic regression on ijcnn1: a strength per feature", CALIBRATION,
        lambda seed, folder: _convex(
            cm.problems.logistic_regression(*data.ijcnn1(seed, 1000, 1000, folder), strength=1e-2)
        ), descent,
    ),
    Family(
        "MLP digits", "Tanh MLP on digits: a strength per synapse", CALIBRATION,
        lambda seed, folder: _network(data.digits(seed, 200, 200), seed, (5,), 1e-2, 10, by_layer=False), descent,
        convex=False,
    ),
    Family(
        "MLP layers", "Tanh MLP on coarse digits: strengths per layer", CALIBRATION,
        lambda seed, folder: _network(_coarse_digits(seed, 200), seed, (8,), 1e-2, 10, by_layer=True), descent,
        convex=False,
    ),
    Family(
        "sinusoid", "Sinusoid from 10 points: the anchor of a tanh MLP with 2 x 10 units", CALIBRATION,
        lambda seed, folder: _sinusoid(seed, (10, 10), 10, 0.5), lbfgs, convex=False,
    ),
    Family(
        "MLP wine", "Tanh MLP on wine, two hidden layers: a strength per synapse", CALIBRATION,
        lambda seed, folder: _network(data.wine(seed), seed, (8, 6), 1e-2, 3, by_layer=False), descent, convex=False,
    ),
    Family(
        "MLP parity", "Tanh MLP on coarse digits, odd or even: strengths per layer", CALIBRATION,
        lambda seed, folder: _network(_parity(_coarse_digits(seed, 200)), seed, (10,), 1e-2, 2, by_layer=True),
        descent, convex=False,
    ),
    Family(
        "sinusoid wide", "Sinusoid from 20 points: the anchor of a tanh MLP with 40 units", CALIBRATION,
        lambda seed, folder: _sinusoid(seed, (40,), 20, 0.2), lbfgs, convex=False,
    ),
    Family(
        "ridge many", "Ridge regression on drawn data with 60 features: a strength per weight", HELD_OUT,
        lambda seed, folder: _convex(
            cm.problems.ridge(*cm.problems.ridge_data(jax.random.key(seed), 80, 80, num_features=60), strength=0.03)
        ), descent,
    ),
    Family(
        "wine", "Softmax regression on wine: a strength per weight", HELD_OUT,
        lambda seed, folder: _convex(cm.problems.softmax_regression(*data.wine(seed), num_classes=3, strength=3e-3)),
        lbfgs,
    ),
    Family(
        "parity", "Logistic regression on digits, odd or even: a strength per weight", HELD_OUT,
        lambda seed, folder: _convex(
            cm.problems.logistic_regression(*_parity(data.digits(seed, 300, 300)), strength=1e-2)
        ), descent,
    ),
    Family(
        "cleaning 2", "Data cleaning on breast cancer: a weight per example", HELD_OUT,
        lambda seed, folder: _cleaning(data.breast_cancer(seed), seed, 2), descent,
    ),
    Family(
        "quadratic 1e3", "Quadratic, condition number 1000: anchor, drive and strengths", HELD_OUT,
        lambda seed, folder: _quadratic(seed, 60, 1e3), descent,
    ),
    Family(
        "newsgroups", "Softmax regression on newsgroups, 20 words: a strength per weight", HELD_OUT,
        lambda seed, folder: _convex(
            cm.problems.softmax_regression(*data.newsgroups(seed, 400, 400, 20, folder), num_classes=20, strength=1e-3)
        ), lbfgs,
    ),
    Family(
        "a9a", "Logistic regression on a9a: a strength per feature", HELD_OUT,
        lambda seed, folder: _convex(
            cm.problems.logistic_regression(*data.a9a(seed, 500, 500, folder), strength=1e-2)
        ), descent,
    ),
    Family(
        "MLP breast cancer", "Tanh MLP on breast cancer: a strength per synapse", HELD_OUT,
        lambda seed, folder: _network(data.breast_cancer(seed), seed, (6,), 1e-2, 2, by_layer=False), descent,
        convex=False,
    ),
    Family(
        "MLP deep", "Tanh MLP on coarse digits, two hidden layers: a strength per synapse", HELD_OUT,
        lambda seed, folder: _network(_coarse_digits(seed, 150), seed, (10, 8), 5e-3, 10, by_layer=False), descent,
        convex=False,
    ),
    Family(
        "sinusoid deep", "Sinusoid from 15 points: the anchor of a tanh MLP with 12 and 8 units", HELD_OUT,
        lambda seed, folder: _sinusoid(seed, (12, 8), 15, 0.3), lbfgs, convex=False,
    ),
    Family(
        "MLP ijcnn1", "Tanh MLP on ijcnn1: strengths per layer", HELD_OUT,
        lambda seed, folder: _network(data.ijcnn1(seed, 400, 400, folder), seed, (6,), 1e-2, 2, by_layer=True), lbfgs,
        convex=False,
    ),
)  # fmt: skip
# Without data files, and in seconds.
SMOKE_FAMILIES: Sequence[Family] = (
    Family(
        "quadratic", "Quadratic, condition number 10", CALIBRATION,
        lambda seed, folder: _quadratic(seed, 5, 10.0), descent,
    ),
    Family(
        "small network", "Tanh MLP on drawn classes: strengths per layer", HELD_OUT,
        lambda seed, folder: _network(
            cm.problems.classification_data(jax.random.key(seed), 30, 30, 4), seed, (3,), 3e-2, 3, by_layer=True
        ), descent, convex=False,
    ),
)  # fmt: skip
