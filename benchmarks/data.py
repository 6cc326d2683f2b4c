"""Real data for the benchmarks, as numpy arrays, and one line on how to get what is missing."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.datasets import SETS, cache_folder

DATA_VARIABLE = "CONTRASTIVE_META_DATA"


_DOWNLOAD = "`python -m benchmarks data {}` downloads it."
_NEWSGROUPS = (
    "newsgroups20_counts.npz holds 20news-bydate from http://qwone.com/~jason/20Newsgroups as word counts in rows "
    "(CSR): indptr_train, indices_train, counts_train, y_train."
)


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


def wine(seed: int) -> Split:
    """178 wines, 13 features, standardised, from 3 cultivars."""
    return _standardised(_shuffled_halves(*_load("wine"), seed, num_train=89, num_val=89))


def digits(seed: int, num_train: int, num_val: int) -> Split:
    """Handwritten digits of 8 x 8 pixels, grey values from 0 to 1, in 10 classes; 1797 in all."""
    x, y = _load("digits")
    return _shuffled_halves(x / 16.0, y, seed, num_train, num_val)


def fours_and_nines(seed: int) -> Split:
    """The 361 of those digits that are a 4 (labels 1) or a 9 (labels -1), the first 180 to learn from."""
    x, y = _load("digits")
    kept = (y == 4) | (y == 9)
    return _shuffled_halves(x[kept] / 16.0, np.where(y[kept] == 4, 1.0, -1.0), seed, num_train=180, num_val=181)


def omniglot(folder: Path | None) -> npt.NDArray[np.float32]:
    """1,623 characters of many alphabets, each drawn by 20 people: (characters, drawings, 28, 28), ink is 1."""
    images: npt.NDArray[np.float32] = load_omniglot(folder)[0].astype(np.float32) / np.float32(255)
    return images


def load_omniglot(
    folder: Path | None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The drawings as bytes, the alphabet of each character, and whether it is one for evaluation."""
    with np.load(find_file("omniglot28_u8.npz", folder, _DOWNLOAD.format("omniglot"))) as arrays:
        return arrays["images"], arrays["char_alphabet"].astype(np.int64), arrays["char_split"] == 1


def mnist(seed: int, num_train: int, num_val: int, folder: Path | None) -> Split:
    """Handwritten digits of 28 x 28 pixels, grey values from 0 to 1, in 10 classes: of the 60,000 training images."""
    with np.load(find_file("mnist.npz", folder, _DOWNLOAD.format("mnist"))) as arrays:
        x, y = arrays["x_train"], arrays["y_train"]
    chosen = np.random.default_rng(seed).permutation(len(y))[: num_train + num_val]
    return _cut(x[chosen].reshape(len(chosen), -1) / 255.0, y[chosen].astype(np.int32), num_train)


def images(name: str, folder: Path | None) -> tuple[npt.NDArray[Any], ...]:
    """Official training images, their labels, official test images and theirs, as bytes: of `mnist` or `cifar10`."""
    with np.load(find_file(SETS[name].file, folder, _DOWNLOAD.format(name))) as arrays:
        return tuple(arrays[key] for key in ("x_train", "y_train", "x_test", "y_test"))


def resized(x: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """Square images of `side` pixels each way: means of blocks of larger ones, smaller ones with a margin.

    Args:
      x: images, flat: shape (num, pixels).
      side: of the images returned, shape (num, side, side).
    """
    before = round(x.shape[1] ** 0.5)
    square = x.reshape(-1, before, before)
    if before > side:
        means: npt.NDArray[Any] = square.reshape(-1, side, before // side, side, before // side).mean(axis=(2, 4))
        return means
    margin = (side - before) // 2
    return np.pad(square, ((0, 0), (margin, margin), (margin, margin)))


def ijcnn1(seed: int, num_train: int, num_val: int, folder: Path | None) -> Split:
    """Time series of an engine's misfires, 22 features between -1 and 1, labels 0 and 1: of the 49,990 for training."""
    with np.load(find_file("ijcnn1.npz", folder, _DOWNLOAD.format("ijcnn1"))) as arrays:
        x, y = arrays["X_train"], arrays["y_train"]
    return _shuffled_halves(np.asarray(x, np.float64), y.astype(np.int32), seed, num_train, num_val)


def a9a(seed: int, num_train: int, num_val: int, folder: Path | None) -> Split:
    """Census data, 123 features that are 0 or 1, labels 0 and 1 (income): of the 32,561 for training."""
    with np.load(find_file("a9a_bits.npz", folder, _DOWNLOAD.format("a9a"))) as arrays:
        x = np.unpackbits(arrays["bits_train"], axis=1)[:, : int(arrays["n_features"])]
        y = (arrays["y_train"] > 0).astype(np.int32)
    return _shuffled_halves(x.astype(np.float64), y, seed, num_train, num_val)


def newsgroups(seed: int, num_train: int, num_val: int, num_terms: int, folder: Path | None) -> Split:
    """Posts to 20 newsgroups as frequencies of the `num_terms` words that most posts contain, scaled to unit length.

    Frequencies are logarithmic, weighted by how rare a word is (tf-idf), of the posts for training.
    """
    with np.load(find_file("newsgroups20_counts.npz", folder, _NEWSGROUPS)) as arrays:
        ends, words = arrays["indptr_train"], arrays["indices_train"]
        counts, labels = arrays["counts_train"], arrays["y_train"]
    found = np.bincount(words)
    terms = np.argsort(-found, kind="stable")[:num_terms]
    column = np.full(len(found), -1)
    column[terms] = np.arange(num_terms)
    rarity = np.log(len(labels) / found[terms])
    chosen = np.random.default_rng(seed).permutation(len(labels))[: num_train + num_val]
    x = np.zeros((len(chosen), num_terms))
    for row, post in enumerate(chosen):
        here = slice(ends[post], ends[post + 1])
        kept = column[words[here]] >= 0
        x[row, column[words[here][kept]]] = np.log1p(counts[here][kept])
    x *= rarity
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return _cut(x / np.where(lengths > 0, lengths, 1.0), labels[chosen].astype(np.int32), num_train)


def find_file(name: str, folder: Path | None, how_to_get: str) -> Path:
    """A data file in `folder` (`--data`), in the folder that the environment variable names, or in the cache.

    Raises:
      DataMissingError: it is in none; the message ends with `how_to_get`.
    """
    named = os.environ.get(DATA_VARIABLE)
    given = [place for place in (folder, Path(named) if named else None) if place is not None]
    folders = [*given, cache_folder()]
    for place in folders:
        if (place / name).exists():
            return place / name
    searched = " or ".join(str(place) for place in folders)
    raise DataMissingError(f"{name} is not in {searched} (give another by --data or {DATA_VARIABLE}). {how_to_get}")


def _load(name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataMissingError('This data comes with scikit-learn: pip install ".[bench]"') from error
    loaders = {
        "diabetes": datasets.load_diabetes,
        "breast_cancer": datasets.load_breast_cancer,
        "digits": datasets.load_digits,
        "wine": datasets.load_wine,
    }
    x, y = loaders[name](return_X_y=True)
    return np.asarray(x, np.float64), np.asarray(y)


def _shuffled_halves(x: npt.NDArray[np.float64], y: npt.NDArray[Any], seed: int, num_train: int, num_val: int) -> Split:
    order = np.random.default_rng(seed).permutation(len(y))
    chosen = order[: num_train + num_val]
    return _cut(x[chosen], y[chosen], num_train)


def _cut(x: npt.NDArray[np.float64], y: npt.NDArray[Any], num_train: int) -> Split:
    return Split(x[:num_train], y[:num_train], x[num_train:], y[num_train:])


def _standardised(split: Split) -> Split:
    """Inputs with mean 0 and deviation 1 over what is learned from."""
    mean, deviation = split.x_train.mean(axis=0), split.x_train.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    return split._replace(x_train=(split.x_train - mean) / deviation, x_val=(split.x_val - mean) / deviation)
