"""Few-shot tasks of Omniglot, sampled from a key: characters, rotated by quarters, their drawings, and their splits."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from benchmarks.data import DataMissingError, load_omniglot
from benchmarks.loops_cnn_network import glyphs
from contrastive_meta.problems import SplitData

# Background alphabets on which choices are made; the others of the 30 are trained on. Every fifth, by name.
_SELECT_EVERY = 5


class Shape(NamedTuple):
    """Of a task.

    Attributes:
      ways: classes.
      shots: drawings of each to learn from.
      queries: drawings of each to judge by.
    """

    ways: int = 5
    shots: int = 1
    queries: int = 5


class Splits(NamedTuple):
    """Characters to train on, to choose by and to test on, no alphabet in two of them: uint8, ink is 255.

    Attributes:
      train: (characters, drawings, 28, 28), of background alphabets.
      select: of other background alphabets.
      test: of evaluation alphabets.
      source: of the drawings, in words.
    """

    train: npt.NDArray[np.uint8]
    select: npt.NDArray[np.uint8]
    test: npt.NDArray[np.uint8]
    source: str


def load(folder: Path | None, *, smoke: bool) -> Splits:
    """Omniglot's own split into background and evaluation alphabets; in small, where it is missing, drawings made here.

    Raises:
      DataMissingError: Omniglot is not there, and this is no smoke run.
    """
    try:
        images, alphabets, evaluation = load_omniglot(folder)
    except DataMissingError:
        if not smoke:
            raise
        drawn = (255 * glyphs(0, 90, 20, 28)).astype(np.uint8)
        train, select, test = np.split(drawn, 3)
        return Splits(train, select, test, "generated glyphs")
    background = np.unique(alphabets[~evaluation])
    select = np.isin(alphabets, background[::_SELECT_EVERY]) & ~evaluation
    return Splits(images[~evaluation & ~select], images[select], images[evaluation], "Omniglot")


def sample_tasks(
    key: jax.Array, images: jax.Array, num_tasks: int, shape: Shape, *, rotate: bool, augment: float = 0.0
) -> SplitData:
    """Tasks of different characters each.

    Args:
      key: PRNG key.
      images: uint8, shape (characters, drawings, 28, 28).
      num_tasks: how many.
      shape: of a task.
      rotate: whether a class is a character turned by a random number of quarters.
      augment: largest shift of a drawing, in pixels, each one its own; 0 for none.

    Returns:
      Images of shape (num_tasks, ways * shots or ways * queries, 28, 28) between 0 and 1, and labels.
    """

    def task(key: jax.Array) -> SplitData:
        of_classes, of_turns, of_drawings, of_shifts = jax.random.split(key, 4)
        num_characters, num_drawings = images.shape[:2]
        # The places of the largest of random numbers: no draw is made twice, and nothing is sorted.
        classes = jax.lax.top_k(jax.random.uniform(of_classes, (num_characters,)), shape.ways)[1]
        turns = jax.random.randint(of_turns, (shape.ways,), 0, 4 if rotate else 1)
        each = shape.shots + shape.queries
        drawings = jax.lax.top_k(jax.random.uniform(of_drawings, (shape.ways, num_drawings)), each)[1]
        chosen = images[classes[:, None], drawings].astype(jnp.float32) / 255
        x = _turned(chosen, turns[:, None, None, None])
        if augment:
            x = _shifted(of_shifts, x, augment)
        labels = jnp.broadcast_to(jnp.arange(shape.ways)[:, None], (shape.ways, each))
        side = images.shape[-2:]
        parts = x[:, : shape.shots], labels[:, : shape.shots], x[:, shape.shots :], labels[:, shape.shots :]
        x_train, y_train, x_val, y_val = parts
        return SplitData(x_train.reshape(-1, *side), y_train.ravel(), x_val.reshape(-1, *side), y_val.ravel())

    return jax.vmap(task)(jax.random.split(key, num_tasks))


def _turned(x: jax.Array, quarters: jax.Array) -> jax.Array:
    """Images turned by a number of quarters each: half a turn, and then a quarter."""
    x = jnp.where(quarters >= 2, x[..., ::-1, ::-1], x)
    return jnp.where(quarters % 2 == 1, jnp.swapaxes(x, -2, -1)[..., ::-1, :], x)


def _shifted(key: jax.Array, x: jax.Array, most: float) -> jax.Array:
    """Each image moved by whole pixels, at most so many in each direction; paper comes in at the edges."""
    reach = int(most)
    shifts = jax.random.randint(key, (*x.shape[:-2], 2), 0, 2 * reach + 1)
    padded = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (reach, reach), (reach, reach)])

    def cut(image: jax.Array, shift: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, shift, x.shape[-2:])

    return jax.vmap(jax.vmap(cut))(padded, shifts)
