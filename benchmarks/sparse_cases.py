"""The models of the benchmark `sparse`: smooth inner losses, penalties or bounds, and hyperparameters to select."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import contrastive_meta as cm
from benchmarks import data

Task = dict[str, Any]
Array = npt.NDArray[np.float64]

# Newsgroups in the alphabetical order of their names: 1 to 5 are on computers.
_COMPUTERS = (1, 2, 3, 4, 5)


class Peer(NamedTuple):
    """How peers write a case.

    Attributes:
      prox: name of the proximal operator or projection in jaxopt.
      settings: `hyperparameters -> ` the argument of that operator.
      is_projection: whether it is a projection.
      sparho: names of the datafit, of the penalty and of its adapter, in sparho; empty where it has no such model.
    """

    prox: str
    settings: Callable[[Any], Any]
    is_projection: bool = False
    sparho: tuple[str, ...] = ()


class Case(NamedTuple):
    """A model, and the hyperparameters to select on validation data.

    Attributes:
      title: the data, with sizes.
      load: `(seed, folder, smoke) -> task`; the number of weights is that of the columns of its `x`.
      inner_loss: the smooth part.
      outer_loss: validation loss.
      penalty: the part that is not smooth.
      hyperparameters: their names; they are logarithms.
      start: `task -> ` where all searches start.
      grid: for each hyperparameter the lowest and the highest value, from the start, and how many.
      peer: how peers write it.
    """

    title: str
    load: Callable[[int, Path | None, bool], Task]
    inner_loss: Callable[[Any, Any, Task], jax.Array]
    outer_loss: Callable[[Any, Any, Task], jax.Array]
    penalty: cm.Penalty
    hyperparameters: tuple[str, ...]
    start: Callable[[Task], Array]
    grid: tuple[tuple[float, float, int], ...]
    peer: Peer


def _regression(seed: int, folder: Path | None, smoke: bool) -> Task:
    """Two hundred cases of fifty standard normal inputs, of which eight matter; noise of deviation 2."""
    random = np.random.default_rng(seed)
    truth = np.where(np.arange(50) < 8, random.normal(size=50), 0.0)
    x, x_val = random.normal(size=(2, 200, 50))
    noise = 2 * random.normal(size=(2, 200))
    return {"x": x, "y": x @ truth + noise[0], "x_val": x_val, "y_val": x_val @ truth + noise[1]}


def _positive_regression(seed: int, folder: Path | None, smoke: bool) -> Task:
    """Sixty cases of fifty inputs with a correlation of 0.5, of which ten matter, positively; noise of deviation 2."""
    random = np.random.default_rng(seed)
    truth = np.where(np.arange(50) < 10, random.uniform(size=50), 0.0)
    own, common = random.normal(size=(2, 60, 50)), random.normal(size=(2, 60, 1))
    x, x_val = (own + common) / np.sqrt(2)
    noise = 2 * random.normal(size=(2, 60))
    return {"x": x, "y": x @ truth + noise[0], "x_val": x_val, "y_val": x_val @ truth + noise[1]}


def _newsgroups(seed: int, folder: Path | None, smoke: bool) -> Task:
    """A thousand posts by the five hundred words that most contain: on computers, or on anything else."""
    size, terms = (100, 50) if smoke else (500, 500)
    split = data.newsgroups(seed, size, size, terms, folder)
    y, y_val = (np.where(np.isin(labels, _COMPUTERS), 1.0, -1.0) for labels in (split.y_train, split.y_val))
    return {"x": split.x_train, "y": y, "x_val": split.x_val, "y_val": y_val}


def _tumours(seed: int, folder: Path | None, smoke: bool) -> Task:
    """Gaussian kernels of 285 tumours, with which dual variables are multiplied, at scikit-learn's default width."""
    split = data.breast_cancer(seed)

    def kernel(a: Array, b: Array) -> Array:
        # Features are standardised, so that `gamma="scale"` is one over their number.
        values: Array = np.exp(-((a[:, None] - b[None]) ** 2).mean(axis=2))
        return values

    return {
        "x": kernel(split.x_train, split.x_train),
        "x_val": kernel(split.x_val, split.x_train),
        "y": 2.0 * split.y_train - 1,
        "y_val": 2.0 * split.y_val - 1,
    }


def _squares(w: Any, s: Any, task: Task) -> jax.Array:
    return 0.5 * jnp.mean((task["x"] @ w - task["y"]) ** 2)


def _validation_squares(w: Any, s: Any, task: Task) -> jax.Array:
    return 0.5 * jnp.mean((task["x_val"] @ w - task["y_val"]) ** 2)


def _ridge(w: Any, s: Any, task: Task) -> jax.Array:
    return _squares(w, s, task) + 0.5 * jnp.exp(s[0]) * jnp.sum(w**2)


def _logistic(w: Any, s: Any, task: Task) -> jax.Array:
    return jnp.mean(jnp.logaddexp(0.0, -task["y"] * (task["x"] @ w)))


def _validation_logistic(w: Any, s: Any, task: Task) -> jax.Array:
    return jnp.mean(jnp.logaddexp(0.0, -task["y_val"] * (task["x_val"] @ w)))


def _dual(w: Any, s: Any, task: Task) -> jax.Array:
    """The dual of the support-vector machine without an offset."""
    signed = task["y"] * w
    return 0.5 * jnp.vdot(signed, task["x"] @ signed) - jnp.sum(w)


def _validation_margins(w: Any, s: Any, task: Task) -> jax.Array:
    """Squared hinge loss of the margins, because the hinge loss has kinks of its own."""
    scores = task["x_val"] @ (task["y"] * w)
    return jnp.mean(jnp.maximum(1 - task["y_val"] * scores, 0) ** 2)


def _hundredth_of_largest(task: Task, slope: float) -> float:
    """Logarithm of a hundredth of the l1 strength from which on all weights are 0; `slope` is the loss's own at 0."""
    return float(np.log(0.01 * slope * np.abs(task["x"].T @ task["y"]).max() / len(task["y"])))


def _first(s: Any) -> jax.Array:
    return jnp.exp(s[0])


# From a tenth of the start to where all weights are 0.
_STRENGTHS = (-np.log(10.0), np.log(100.0))
# The share of the l1 norm, as in `l1_ratio` of scikit-learn, where the elastic net has one hyperparameter.
_RATIO = 0.5

CASES = {
    "lasso": Case(
        "200 x 50",
        _regression,
        _squares,
        _validation_squares,
        cm.prox.l1(_first),
        ("strength",),
        lambda task: np.array([_hundredth_of_largest(task, 1.0)]),
        ((*_STRENGTHS, 200),),
        Peer("prox_lasso", _first, sparho=("SquaredLoss", "L1", "SklearnLasso")),
    ),
    "elastic net": Case(
        "200 x 50, both norms in equal parts",
        _regression,
        _squares,
        _validation_squares,
        cm.prox.elastic_net(lambda s: _RATIO * jnp.exp(s[0]), lambda s: (1 - _RATIO) * jnp.exp(s[0])),
        ("strength",),
        lambda task: np.array([_hundredth_of_largest(task, 1.0) - np.log(_RATIO)]),
        ((*_STRENGTHS, 200),),
        # jaxopt's second number is the decay over the strength.
        Peer(
            "prox_elastic_net",
            lambda s: (_RATIO * jnp.exp(s[0]), (1 - _RATIO) / _RATIO),
            sparho=("SquaredLoss", "ElasticNet", "SklearnElasticNet"),
        ),
    ),
    "elastic net, two": Case(
        "200 x 50, a strength for each norm",
        _regression,
        _squares,
        _validation_squares,
        cm.prox.elastic_net(_first, lambda s: jnp.exp(s[1])),
        ("strength", "decay"),
        lambda task: np.array([_hundredth_of_largest(task, 1.0)] * 2),
        ((*_STRENGTHS, 41), (*_STRENGTHS, 41)),
        Peer("prox_elastic_net", lambda s: (jnp.exp(s[0]), jnp.exp(s[1] - s[0]))),
    ),
    "logistic": Case(
        "sparse logistic regression, 500 newsgroup posts x 500 words",
        _newsgroups,
        _logistic,
        _validation_logistic,
        cm.prox.l1(_first),
        ("strength",),
        # The logistic loss has a slope of 1 / 2 at 0.
        lambda task: np.array([_hundredth_of_largest(task, 0.5)]),
        ((*_STRENGTHS, 100),),
        Peer("prox_lasso", _first, sparho=("LogisticLoss", "L1", "SklearnLogisticRegression")),
    ),
    "SVM": Case(
        "dual of a support-vector machine with a Gaussian kernel, 285 tumours",
        _tumours,
        _dual,
        _validation_margins,
        cm.prox.box(0.0, _first),
        ("bound",),
        lambda task: np.array([-3.0]),
        ((-1.0, 6.0, 200),),
        Peer("projection_box", lambda s: (0.0, jnp.exp(s[0])), is_projection=True),
    ),
    "non-negative": Case(
        "least squares with weight decay, 60 x 50",
        _positive_regression,
        _ridge,
        _validation_squares,
        cm.prox.non_negative(),
        ("decay",),
        lambda task: np.array([-4.0]),
        ((-4.0, 6.0, 200),),
        Peer("projection_non_negative", lambda s: None, is_projection=True),
    ),
}
