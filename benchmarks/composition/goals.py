"""Goals that combine: shortest paths in mazes to a kind of object in a quadrant, and what is done there; imitated."""

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
from benchmarks.composition.grid_worlds import MOVES, STAY, maze, mazes, reaching_tasks
from benchmarks.harness import Record, Session
from contrastive_meta.problems import SplitData

NAME = "goals"
ABOUT = "grid worlds whose goals are combinations: a hypernetwork against MAML and ANIL by imitation; 8 minutes"
# Settings were chosen on seed 100.
_FIRST_SEED = 1
SIZE, NUM_WALLS, NUM_MAZES, NUM_KINDS, NUM_DEEDS, NUM_QUADRANTS = 5, 5, 3, 4, 2, 4
# A quarter of the combinations is never learned from.
_UNSEEN_SHARE = 0.25
# Worlds of each task, half of them to learn from; steps of a demonstration.
_NUM_WORLDS, _NUM_STEPS = 4, 8
# Outer steps.
_STEPS = 400
LEARNERS = {
    HYPERNETWORK: Learner(0.1, even=True),
    MAML: Learner(0.3),
    ANIL: Learner(1.0),
}


def combinations(random: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Maze, kind, deed and quadrant of tasks that are learned from, and of tasks that are not: shape (tasks, 4)."""
    every = np.array(list(itertools.product(*map(range, (NUM_MAZES, NUM_KINDS, NUM_DEEDS, NUM_QUADRANTS)))))
    order = random.permutation(len(every))
    number = round(_UNSEEN_SHARE * len(every))
    return every[order[number:]], every[order[:number]]


def demonstrations(num_train: int, num_test: int, seed: int) -> dict[str, Any]:
    """So many of each task, to meta-learn from; others of the same combinations; and of unseen combinations."""
    random = np.random.default_rng(seed)
    of = mazes(np.stack([maze(random, SIZE, NUM_WALLS) for _ in range(NUM_MAZES)]))
    seen, unseen = combinations(random)
    found = {}
    for number, (name, tasks, repeats) in enumerate(
        (("train", seen, num_train), (SEEN, seen, num_test), (UNSEEN, unseen, 3 * num_test))
    ):
        key = jax.random.fold_in(jax.random.key(seed), number)
        made = _demonstrated(key, of, jnp.asarray(np.repeat(tasks, repeats, axis=0)))
        found[name] = made | {"free": of.free[made["maze"]]}
    return found


@jax.jit
def _demonstrated(key: jax.Array, of: Any, tasks: jax.Array) -> dict[str, jax.Array]:
    return reaching_tasks(key, of, tasks, NUM_KINDS, _NUM_WORLDS, _NUM_STEPS)


def inputs(free: jax.Array, places: jax.Array, kinds: jax.Array, cell: jax.Array) -> jax.Array:
    """What a network sees of a state: a map of each kind of object, of the walls and of the agent."""
    num_cells = SIZE * SIZE
    maps = jax.nn.one_hot(kinds * num_cells + places, NUM_KINDS * num_cells).sum(-2)
    world = jnp.concatenate([maps, 1.0 - free], -1)
    agent = jax.nn.one_hot(cell, num_cells)
    return jnp.concatenate([jnp.broadcast_to(world, (*agent.shape[:-1], world.shape[-1])), agent], -1)


def split(found: dict[str, jax.Array]) -> SplitData:
    """The first half of the worlds to learn from, the second to judge by; actions after the deed are -1."""
    free, places, kinds = (found[name][..., None, :] for name in ("free", "places", "kinds"))
    x = inputs(free, places, kinds, found["cell"])
    y = jnp.where(found["valid"], found["teacher"], -1)
    half, number = _NUM_WORLDS // 2, len(y)

    def flat(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(number, -1, *leaf.shape[3:])

    return SplitData(flat(x[:, :half]), flat(y[:, :half]), flat(x[:, half:]), flat(y[:, half:]))


def loss(outputs: jax.Array, actions: jax.Array) -> jax.Array:
    """Mean cross-entropy of the actions that count."""
    counts = actions >= 0
    told = jnp.take_along_axis(jax.nn.log_softmax(outputs), jnp.maximum(actions, 0)[..., None], -1)[..., 0]
    return -jnp.sum(told * counts) / jnp.sum(counts)


def accuracy(outputs: jax.Array, actions: jax.Array) -> jax.Array:
    """The share of them that the largest output names."""
    return jnp.sum(outputs.argmax(-1) == actions) / jnp.sum(actions >= 0)


def world(found: Mapping[str, Any]) -> dict[str, Any]:
    """The walls of a world, and its objects: row, column and kind of each, the goal in brackets."""
    names = [f"({'ABCD'[found['kinds'][0]]})", *("ABCD"[kind] for kind in found["kinds"][1:])]
    places = [divmod(int(place), SIZE) for place in found["places"]]
    objects = [[*place, name] for place, name in zip(places, names, strict=True)]
    return {"walls": ~found["free"].reshape(SIZE, SIZE), "objects": objects}


def rolled_out(found: Mapping[str, Any], act: Callable[[jax.Array], int]) -> list[list[int]]:
    """Cells that an agent comes to, which acts in a world as `act` says of what it sees, until it does something."""
    free = found["free"].reshape(SIZE, SIZE)
    row, column = divmod(int(found["cell"][0]), SIZE)
    path = [[row, column]]
    for _ in range(_NUM_STEPS):
        walls, places, kinds = (jnp.asarray(found[name]) for name in ("free", "places", "kinds"))
        action = act(inputs(walls, places, kinds, jnp.asarray(SIZE * row + column)))
        if action >= STAY:
            break
        to = row + MOVES[action][0], column + MOVES[action][1]
        if all(0 <= at < SIZE for at in to) and free[to]:
            row, column = to
        path.append([row, column])
    return path


def family(num_train: int = 128, num_test: int = 2) -> Family:
    """The tasks and their scores."""
    make = functools.partial(demonstrations, num_train, num_test)
    return Family(make, split, loss, accuracy, STAY + NUM_DEEDS, LEARNERS, world, rolled_out)


def run(session: Session) -> None:
    """Every learner on every seed."""
    grid_learners.run(session, family(1, 1) if session.smoke else family(), _FIRST_SEED, _STEPS)


def show(records: Sequence[Record]) -> str:
    """Errors of actions, and every claim."""
    return grid_learners.show(records, "Goals: cross-entropy of the teacher's actions")


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Worlds of unseen combinations, with the ways that learners take."""
    return figures.draw_worlds(records, folder / "goals.png")
