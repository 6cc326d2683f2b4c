"""Real data for the benchmarks, as numpy arrays, and one line on how to get what is missing."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

DATA_VARIABLE = "CONTRASTIVE_META_DATA"


class DataMissingError(RuntimeError):
    """Data (or the package that ships it) is not there; the message says in one line how to get it."""


class Split(NamedTuple):
    """Inputs and targets to learn from and to judge by; inputs are float64 of shape (num, num_features)."""

    x_train: npt.NDArray[np.float64]
    y_train: npt.NDArray[Any]
    x_val: npt.NDArray[np.float64]
    y_val: npt.NDArray[Any]


def diabetes(seed: int) -> Split:
    """442 patients, 10 features, standardised; the target is disease progression in its own standard deviations."""
    split = _shuffled_halves(*_load("diabetes"), seed, num_train=221, num_val=221)
    mean, deviation = split.y_train.mean(), split.y_train.std()
    split = split._replace(y_train=(split.y_train - mean) / deviation, y_val=(split.y_val - mean) / deviation)
    return _standardised(split)


def breast_cancer(seed: int) -> Split:
    """569 tumours, 30 features, standardised; benign (1) or malignant (0)."""
    return _standardised(_shuffled_halves(*_load("breast_cancer"), seed, num_train=285, num_val=284))


def digits(seed: int, num_train: int, num_val: int) -> Split:
    """Handwritten digits of 8 x 8 pixels, grey values from 0 to 1, in 10 classes; 1797 in all."""
    x, y = _load("digits")
    return _shuffled_halves(x / 16.0, y, seed, num_train, num_val)


def find_file(name: str, folder: Path | None, how_to_get: str) -> Path:
    """A data file in `folder` (`--data`) or in the folder that the environment variable names.

    Raises:
      DataMissingError: it is in neither; the message ends with `how_to_get`.
    """
    named = os.environ.get(DATA_VARIABLE)
    folders = [place for place in (folder, Path(named) if named else None) if place is not None]
    for place in folders:
        if (place / name).exists():
            return place / name
    searched = " or ".join(str(place) for place in folders) or f"no folder (give --data or {DATA_VARIABLE})"
    raise DataMissingError(f"{name} is not in {searched}. {how_to_get}")


def _load(name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataMissingError('This data comes with scikit-learn: pip install ".[bench]"') from error
    loaders = {
        "diabetes": datasets.load_diabetes,
        "breast_cancer": datasets.load_breast_cancer,
        "digits": datasets.load_digits,
    }
    x, y = loaders[name](return_X_y=True)
    return np.asarray(x, np.float64), np.asarray(y)


def _shuffled_halves(x: npt.NDArray[np.float64], y: npt.NDArray[Any], seed: int, num_train: int, num_val: int) -> Split:
    order = np.random.default_rng(seed).permutation(len(y))
    train, val = order[:num_train], order[num_train : num_train + num_val]
    return Split(x[train], y[train], x[val], y[val])


def _standardised(split: Split) -> Split:
    """Inputs with mean 0 and deviation 1 over what is learned from."""
    mean, deviation = split.x_train.mean(axis=0), split.x_train.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return split._replace(x_train=(split.x_train - mean) / deviation, x_val=(split.x_val - mean) / deviation)
