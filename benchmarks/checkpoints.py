"""Checkpoints that are whole or not there, and logs that go on where a checkpoint does."""

import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

_NUMBERS = "numbers.json"


class Restorable(Protocol):
    """What a checkpoint holds besides arrays."""

    def numbers(self) -> dict[str, Any]:
        """As JSON."""

    def restore(self, numbers: dict[str, Any], leaves: Sequence[Any]) -> None:
        """Back again."""


class CheckpointError(RuntimeError):
    """A checkpoint that is not of this run; the message says what was expected and what came."""


def save_checkpoint(path: Path, arrays: Any, run: Restorable) -> None:
    """Replace the checkpoint at once: whoever is killed on the way leaves the one before.

    Args:
      path: of a zip archive of `.npy` files.
      arrays: a pytree.
      run: its numbers go with them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        with zipfile.ZipFile(file, "w") as archive:
            for number, leaf in enumerate(jax.tree.leaves(arrays)):
                raw = io.BytesIO()
                np.save(raw, np.asarray(leaf), allow_pickle=False)
                archive.writestr(f"{number}.npy", raw.getvalue())
            archive.writestr(_NUMBERS, json.dumps(run.numbers()))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path, like: Any, run: Restorable) -> None:
    """Bring a run to where the checkpoint is.

    Args:
      path: of the checkpoint.
      like: what `arrays` were at the start of the run; later ones may follow them.
      run: of the same structure; it is changed.

    Raises:
      CheckpointError: its first arrays have other shapes or dtypes than `like`.
    """
    with zipfile.ZipFile(path) as archive:
        count = sum(name.endswith(".npy") for name in archive.namelist())
        leaves = [np.load(io.BytesIO(archive.read(f"{k}.npy")), allow_pickle=False) for k in range(count)]
        numbers = json.loads(archive.read(_NUMBERS))
    expected = [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in jax.tree.leaves(like)]
    found = [(leaf.shape, leaf.dtype) for leaf in leaves[: len(expected)]]
    if found != expected:
        raise CheckpointError(
            f"{path}: expected arrays {expected}; got {found}. It is of a run with other settings: delete it, or name "
            "another file."
        )
    run.restore(numbers, leaves)


class Log:
    """JSON lines, one for each step."""

    def __init__(self, path: Path, keep: int) -> None:
        """Go on after `keep` lines: a run that was killed has written more than its checkpoint knows of."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:keep] if path.exists() else []
        path.write_text("".join(lines), encoding="utf-8")
        self._path = path

    def write(self, **fields: Any) -> None:
        """One line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")
