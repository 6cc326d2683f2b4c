"""The public homes of the data sets, and how what they publish becomes the arrays that benchmarks read."""

import io
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.download import DownloadError, Remote, download, members, unpacked

CACHE_VARIABLE = "CONTRASTIVE_META_CACHE"
Arrays = Mapping[str, npt.NDArray[Any]]
_MB = 1_000_000


class DataSet(NamedTuple):
    """A set as its home publishes it, and as it lies in a data folder.

    Attributes:
      file: in the data folder.
      remotes: what is downloaded. Checksums are those that the homes, or the loaders that everybody uses, publish:
        CIFAR-10 its home; MNIST and Omniglot torchvision. LIBSVM publishes none.
      build: from the downloaded files to the arrays of `file`.
      shapes: what the arrays must be, for homes with and without checksums.
      counts: how many training examples each class must have.
    """

    file: str
    remotes: Sequence[Remote]
    build: Callable[[Sequence[Path]], Arrays]
    shapes: Mapping[str, tuple[int, ...]]
    counts: Sequence[int] = ()


def cache_folder() -> Path:
    """Where downloads are kept: CONTRASTIVE_META_CACHE, or a folder of the user's cache."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contrastive_meta"


def get(name: str, folder: Path | None = None) -> Path:
    """Download a set into the cache, unless it is there, and make its file.

    Args:
      name: one of `SETS`.
      folder: of the cache; None for `cache_folder()`.

    Returns:
      The path of the `.npz` file.

    Raises:
      DownloadError: it could not be had, or is not the set.
    """
    data_set, folder = SETS[name], folder or cache_folder()
    target = folder / data_set.file
    if target.exists():
        return target
    paths = [download(remote, folder / name) for remote in data_set.remotes]
    arrays = data_set.build(paths)
    check(name, arrays)
    partial = folder / f"{data_set.file}.part"
    save: Any = np.savez_compressed  # its stub takes every keyword for `allow_pickle`
    with partial.open("wb") as file:
        save(file, **arrays)
    os.replace(partial, target)
    return target


def check(name: str, arrays: Arrays) -> None:
    """Raise unless arrays have the shapes and class counts of the set.

    Raises:
      DownloadError: naming what was expected and what came.
    """
    data_set = SETS[name]
    for key, shape in data_set.shapes.items():
        if key not in arrays or arrays[key].shape != tuple(shape):
            got = arrays[key].shape if key in arrays else "nothing"
            raise DownloadError(f"{name}: expected {key} of shape {tuple(shape)}; got {got}.")
    if data_set.counts:
        found = np.bincount(np.asarray(arrays["y_train"], np.int64)).tolist()
        if found != list(data_set.counts):
            raise DownloadError(f"{name}: expected {list(data_set.counts)} examples of the classes; got {found}.")


def _mnist(paths: Sequence[Path]) -> Arrays:
    """IDX: a header of big-endian 32-bit integers, then bytes."""

    def values(path: Path, header: int) -> npt.NDArray[np.uint8]:
        raw = unpacked(path, 60_000 * 28 * 28 + 16)
        sizes = np.frombuffer(raw, ">i4", header // 4)[1:]
        return np.frombuffer(raw, np.uint8, offset=header).reshape(sizes)

    x_train, y_train, x_test, y_test = (
        values(path, header) for path, header in zip(paths, (16, 8, 16, 8), strict=True)
    )
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def _cifar10(paths: Sequence[Path]) -> Arrays:
    """The first 600 training and 200 test images of each class, in the official order."""
    batches = {Path(name).name: raw for name, raw in members(paths[0], "", 200 * _MB)}
    arrays: dict[str, npt.NDArray[Any]] = {}
    for part, names, each in (
        ("train", [f"data_batch_{k}" for k in range(1, 6)], 600),
        ("test", ["test_batch"], 200),
    ):
        loaded = [_ArraysOnly(io.BytesIO(batches[name]), encoding="latin1").load() for name in names]
        x = np.concatenate([batch["data"] for batch in loaded]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        y = np.concatenate([np.asarray(batch["labels"], np.uint8) for batch in loaded])
        chosen = np.sort(np.concatenate([np.flatnonzero(y == label)[:each] for label in range(10)]))
        arrays |= {f"x_{part}": x[chosen], f"y_{part}": y[chosen], f"i_{part}": chosen.astype(np.uint16)}
    return arrays


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers, and refuses to call anything else."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        """Raise for names that are not needed to rebuild an array."""
        if module.split(".", maxsplit=1)[0] == "numpy" and name in self._ALLOWED:
            # Arrays pickled by numpy 1 name modules that numpy 2 has renamed.
            return super().find_class(
                module.replace("numpy.core", "numpy._core") if hasattr(np, "_core") else module, name
            )
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise DownloadError(f"a data file asks for {module}.{name}, which no array needs: it is not read.")


def _omniglot(paths: Sequence[Path]) -> Arrays:
    """Drawings inverted and reduced to 28 x 28 by bilinear interpolation, as few-shot learning has them.

    Reference:
      Lake, Salakhutdinov & Tenenbaum (2015); Vinyals et al. (2016) for 28 x 28.
    """
    from PIL import Image, ImageOps

    images, names, split = [], [], []
    for number, path in enumerate(paths):
        drawings: dict[str, list[npt.NDArray[np.uint8]]] = {}
        for name, raw in members(path, ".png", 100 * _MB):
            with Image.open(io.BytesIO(raw)) as image:
                small = ImageOps.invert(image.convert("L")).resize((28, 28), Image.Resampling.BILINEAR)
            drawings.setdefault("/".join(Path(name).parts[-3:-1]), []).append(np.asarray(small, np.uint8))
        for character in sorted(drawings):
            images.append(np.stack(drawings[character]))
            names.append(character)
            split.append(number)
    alphabets = sorted({name.split("/")[0] for name in names})
    return {
        "images": np.stack(images),
        "char_split": np.array(split, np.uint8),
        "char_alphabet": np.array([alphabets.index(name.split("/")[0]) for name in names], np.uint8),
        "alphabet_names": np.array([name.encode() for name in alphabets]),
        "char_names": np.array([name.encode() for name in names]),
    }


def _libsvm(num_features: int, path: Path, max_bytes: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Lines of `label index:value ...`, indices from 1, labels -1 and 1."""
    lines = unpacked(path, max_bytes).decode("ascii").splitlines()
    x, y = np.zeros((len(lines), num_features), np.float32), np.zeros(len(lines), np.uint8)
    for row, line in enumerate(lines):
        label, *entries = line.split()
        y[row] = float(label) > 0
        for entry in entries:
            index, _, value = entry.partition(":")
            x[row, int(index) - 1] = float(value)
    return x, y


def _ijcnn1(paths: Sequence[Path]) -> Arrays:
    (x, y), (x_test, y_test) = (_libsvm(22, path, 100 * _MB) for path in paths)
    return {"X_train": x, "y_train": y, "X_test": x_test, "y_test": y_test}


def _a9a(paths: Sequence[Path]) -> Arrays:
    (x, y), (x_test, y_test) = (_libsvm(123, path, 20 * _MB) for path in paths)
    packed = [np.packbits(part > 0, axis=1) for part in (x, x_test)]
    num_features = np.array(123, np.int32)
    return {
        "bits_train": packed[0], "y_train": y, "bits_test": packed[1], "y_test": y_test, "n_features": num_features
    }  # fmt: skip


_MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"  # as torchvision has it: the home itself often refuses
_OMNIGLOT = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
_LIBSVM = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary"

SETS: dict[str, DataSet] = {
    "mnist": DataSet(
        "mnist.npz",
        [
            Remote(f"{_MNIST}/train-images-idx3-ubyte.gz", 12 * _MB, "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873"),
            Remote(f"{_MNIST}/train-labels-idx1-ubyte.gz", 1 * _MB, "md5:d53e105ee54ea40749a09fcbcd1e9432"),
            Remote(f"{_MNIST}/t10k-images-idx3-ubyte.gz", 3 * _MB, "md5:9fb629c4189551a2d022fa330f9573f3"),
            Remote(f"{_MNIST}/t10k-labels-idx1-ubyte.gz", 1 * _MB, "md5:ec29112dd5afa0611ce80d1b7f02629c"),
        ],
        _mnist,
        {"x_train": (60_000, 28, 28), "x_test": (10_000, 28, 28), "y_test": (10_000,)},
        (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    ),
    "cifar10": DataSet(
        "cifar10_6k2k.npz",
        [
            Remote(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                180 * _MB,
                "md5:c58f30108f718f92721af3b95e74349a",
            )
        ],
        _cifar10,
        {"x_train": (6_000, 32, 32, 3), "x_test": (2_000, 32, 32, 3), "y_test": (2_000,)},
        (600,) * 10,
    ),
    "omniglot": DataSet(
        "omniglot28_u8.npz",
        [
            Remote(f"{_OMNIGLOT}/images_background.zip", 20 * _MB, "md5:68d2efa1b9178cc56df9314c21c6e718"),
            Remote(f"{_OMNIGLOT}/images_evaluation.zip", 20 * _MB, "md5:6b91aef0f799c5bb55b94e3f2daec811"),
        ],
        _omniglot,
        {"images": (1_623, 20, 28, 28), "char_split": (1_623,), "alphabet_names": (50,)},
    ),
    "ijcnn1": DataSet(
        "ijcnn1.npz",
        [Remote(f"{_LIBSVM}/ijcnn1.bz2", 20 * _MB), Remote(f"{_LIBSVM}/ijcnn1.t.bz2", 20 * _MB)],
        _ijcnn1,
        {"X_train": (49_990, 22), "X_test": (91_701, 22)},
        (45_137, 4_853),
    ),
    "a9a": DataSet(
        "a9a_bits.npz",
        [Remote(f"{_LIBSVM}/a9a", 4 * _MB), Remote(f"{_LIBSVM}/a9a.t", 3 * _MB)],
        _a9a,
        {"bits_train": (32_561, 16), "bits_test": (16_281, 16)},
        (24_720, 7_841),
    ),
}
