"""Preferences that combine: demonstrations in grid worlds, learned by a hypernetwork, MAML and ANIL."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from benchmarks import figures
from benchmarks.composition import grid_learners
from benchmarks.composition.grid_learners import ANIL, HYPERNETWORK, MAML, SEEN, UNSEEN, Family, Learner
from benchmarks.composition.grid_worlds import collecting_tasks, grid, rooms
from benchmarks.harness import Record, Session
from contrastive_meta.problems import SplitData

NAME = "preferences"
ABOUT = "grid worlds whose rewards are combinations of preferences: a hypernetwork against MAML and ANIL; 8 minutes"
# Settings were chosen on seed 100.
_FIRST_SEED = 1
NUM_PREFERENCES, NUM_FEATURES, NUM_OBJECTS = 8, 8, 3
# At most so many preferences in a task, each weighed by U[.5, 1]; as published (Schug et al. 2024).
_MOST = 3
# A quarter of the combinations is never learned from.
_UNSEEN_SHARE = 0.25
# Worlds of each task, half of them to learn from; steps of a demonstration.
_NUM_WORLDS, _NUM_STEPS = 12, 6
# The mean square of action values over states, tasks and seeds 100 to 102: errors are relative to it.
_MEAN_SQUARE = 0.45
_GRID = grid(rooms())
# Outer steps.
_STEPS = 250
LEARNERS = {
    HYPERNETWORK: Learner(0.1, 3e-3),
    MAML: Learner(0.1),
    ANIL: Learner(0.3),
}


def combinations(random: np.random.Generator) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Sets of preferences that are learned from, and sets that are not."""
    every = [c for size in range(1, _MOST + 1) for c in itertools.combinations(range(NUM_PREFERENCES), size)]
    order = random.permutation(len(every))
    number = round(_UNSEEN_SHARE * len(every))
    return [every[k] for k in order[number:]], [every[k] for k in order[:number]]


def weights(random: np.random.Generator, kept: Sequence[tuple[int, ...]], number: int) -> npt.NDArray[np.float64]:
    """Of preferences in so many tasks, shape (number, preferences)."""
    drawn = np.zeros((number, NUM_PREFERENCES))
    for row, which in zip(drawn, random.integers(len(kept), size=number), strict=True):
        row[list(kept[which])] = random.uniform(0.5, 1, len(kept[which]))
    return drawn


def demonstrations(num_train: int, num_test: int, seed: int) -> dict[str, Any]:
    """Of tasks to meta-learn from, of new tasks of the same combinations, and of tasks of unseen combinations."""
    random = np.random.default_rng(seed)
    of_preferences = random.normal(size=(NUM_PREFERENCES, NUM_FEATURES))
    seen, unseen = combinations(random)
    pools = {"train": (seen, num_train), SEEN: (seen, num_test), UNSEEN: (unseen, num_test)}
    return {
        name: _demonstrated(
            jax.random.fold_in(jax.random.key(seed), number),
            jnp.asarray(weights(random, kept, size) @ of_preferences, jnp.float32),
        )
        for number, (name, (kept, size)) in enumerate(pools.items())
    }


@jax.jit
def _demonstrated(key: jax.Array, of_features: jax.Array) -> dict[str, jax.Array]:
    neighbours = jnp.asarray(_GRID.neighbours)
    return collecting_tasks(key, neighbours, of_features, _NUM_WORLDS, NUM_OBJECTS, _NUM_STEPS)


def inputs(places: jax.Array, features: jax.Array, left: jax.Array, cell: jax.Array) -> jax.Array:
    """What a network sees of a state: a map of each feature and one of the agent, shape (..., inputs)."""
    num_cells = len(_GRID.cells)
    remains = (left[..., None] // 2 ** jnp.arange(NUM_OBJECTS)) % 2
    maps = jax.nn.one_hot(features * num_cells + places, NUM_FEATURES * num_cells)
    objects = jnp.einsum("...n,...nf->...f", remains.astype(maps.dtype), maps)
    return jnp.concatenate([objects, jax.nn.one_hot(cell, num_cells)], -1)


def split(found: dict[str, jax.Array]) -> SplitData:
    """The first half of the worlds to learn from, the second to judge by."""
    places, features = (found[name][..., None, :] for name in ("places", "features"))
    x, y = inputs(places, features, found["left"], found["cell"]), found["values"]

    def flat(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(leaf.shape[0], -1, leaf.shape[-1])

    half = _NUM_WORLDS // 2
    return SplitData(flat(x[:, :half]), flat(y[:, :half]), flat(x[:, half:]), flat(y[:, half:]))


def loss(outputs: jax.Array, values: jax.Array) -> jax.Array:
    """Mean squared error of action values, relative to their mean square."""
    return jnp.mean((outputs - values) ** 2) / _MEAN_SQUARE


def accuracy(outputs: jax.Array, values: jax.Array) -> jax.Array:
    """The share of states in which the action of the largest output is a best one."""
    chosen = jnp.take_along_axis(values, outputs.argmax(-1)[..., None], -1)[..., 0]
    return jnp.mean(chosen >= values.max(-1) - 1e-4)


def world(found: Mapping[str, Any]) -> dict[str, Any]:
    """The walls of a world, and its objects: row, column and reward of each."""
    places = _GRID.cells[found["places"]]
    objects = [[*place, f"{reward:+.1f}"] for place, reward in zip(places.tolist(), found["rewards"], strict=True)]
    return {"walls": rooms(), "objects": objects}


def rolled_out(found: Mapping[str, Any], act: Callable[[jax.Array], int]) -> list[list[int]]:
    """Cells that an agent comes to, which acts in a world as `act` says of what it sees."""
    cell, left = int(found["cell"][0]), 2**NUM_OBJECTS - 1
    path = [cell]
    for _ in range(_NUM_STEPS):
        places, features = (jnp.asarray(found[name]) for name in ("places", "features"))
        x = inputs(places, features, jnp.asarray(left), jnp.asarray(cell))
        cell = int(_GRID.neighbours[cell, act(x)])
        left -= sum(2**j for j in range(NUM_OBJECTS) if found["places"][j] == cell and left // 2**j % 2)
        path.append(cell)
    return [_GRID.cells[at].tolist() for at in path]


def family(num_train: int = 2048, num_test: int = 128) -> Family:
    """The tasks and their scores."""
    make = functools.partial(demonstrations, num_train, num_test)
    num_moves = _GRID.neighbours.shape[1]
    return Family(make, split, loss, accuracy, num_moves, LEARNERS, world, rolled_out)


def run(session: Session) -> None:
    """Every learner on every seed."""
    grid_learners.run(session, family(8, 4) if session.smoke else family(), _FIRST_SEED, _STEPS)


def show(records: Sequence[Record]) -> str:
    """Errors of action values, and every claim."""
    return grid_learners.show(records, "Preferences: squared error of action values over their mean square")


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Worlds of unseen combinations, with the ways that learners take."""
    return figures.draw_worlds(records, folder / "preferences.png")
