"""Grid worlds, their teachers (value iteration, shortest paths) and what the teachers demonstrate."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

# Rows and columns that each action moves by; the last stays.
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))
STAY = len(MOVES) - 1
# Of rewards, a step; as published (Schug et al. 2024), as are the eight backups.
DISCOUNT = 0.9
NUM_BACKUPS = 8
_FAR = np.float32(1e6)


class Grid(NamedTuple):
    """A grid with walls; its free cells are numbered row by row.

    Attributes:
      cells: row and column of each free cell, shape (cells, 2).
      neighbours: the free cell that each move leads to, shape (cells, 5); a move into a wall leads nowhere.
      shape: rows and columns.
    """

    cells: npt.NDArray[np.int32]
    neighbours: npt.NDArray[np.int32]
    shape: tuple[int, int]


def grid(walls: npt.NDArray[np.bool_]) -> Grid:
    """The grid of a map of its walls, shape (rows, columns)."""
    cells = np.argwhere(~walls).astype(np.int32)
    number = {(row, column): k for k, (row, column) in enumerate(cells.tolist())}
    neighbours = [
        [number.get((row + down, column + right), k) for down, right in MOVES] for (row, column), k in number.items()
    ]
    return Grid(cells, np.array(neighbours, np.int32), (walls.shape[0], walls.shape[1]))


def rooms(size: int = 5) -> npt.NDArray[np.bool_]:
    """Walls of four rooms, each joined to two others by a door: shape (size, size), size odd."""
    walls = np.zeros((size, size), bool)
    half = size // 2
    walls[half, :] = walls[:, half] = True
    doors = half // 2, size - 1 - half // 2
    walls[half, doors] = walls[doors, half] = False
    return walls


def maze(random: np.random.Generator, size: int, num_walls: int) -> npt.NDArray[np.bool_]:
    """Walls at random, all free cells within reach of each other: shape (size, size)."""
    while True:
        walls = np.zeros(size * size, bool)
        walls[random.choice(size * size, num_walls, replace=False)] = True
        shaped = walls.reshape(size, size)
        if np.asarray(distances(jnp.asarray(grid(shaped).neighbours))).max() < _FAR:
            return shaped


def distances(neighbours: jax.Array) -> jax.Array:
    """Steps of the shortest path to each goal from each cell, by relaxation: shape (goals, cells); 1e6 for none."""
    number = len(neighbours)
    begin = jnp.where(jnp.eye(number, dtype=bool), 0.0, _FAR)

    def relaxed(found: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.minimum(found, 1 + found[:, neighbours].min(-1)), None

    steps: jax.Array = jax.lax.scan(relaxed, begin, None, number)[0]
    return jnp.minimum(steps, _FAR)


def first_moves(neighbours: jax.Array) -> jax.Array:
    """The first move of a shortest path to each goal from each cell, the first of equals: shape (goals, cells)."""
    return jnp.argmin(distances(neighbours)[:, neighbours], axis=-1)


class Collection(NamedTuple):
    """Objects that are picked up by stepping on them; a subset of those left is a number, bit j for object j.

    Attributes:
      gain: the reward of stepping on a cell, shape (subsets, cells).
      after: the subset left after stepping on a cell, shape (subsets, cells).
    """

    gain: jax.Array
    after: jax.Array


def collection(places: jax.Array, rewards: jax.Array, num_cells: int) -> Collection:
    """Of objects at `places`, shape (objects,), each with its reward, shape (objects,)."""
    bits = 2 ** jnp.arange(places.shape[0])
    subsets = jnp.arange(2 ** places.shape[0])
    left = (subsets[:, None] // bits) % 2
    at = places == jnp.arange(num_cells)[:, None]
    picked = left[:, None] * at
    return Collection(picked @ rewards, subsets[:, None] - picked @ bits)


def action_values(neighbours: jax.Array, objects: Collection) -> jax.Array:
    """Discounted values of all moves after `NUM_BACKUPS` Bellman backups: shape (subsets, cells, moves)."""
    cells = jnp.arange(len(neighbours))

    def backup(values: jax.Array) -> jax.Array:
        on_arrival = objects.gain + DISCOUNT * values.max(-1)[objects.after, cells]
        return on_arrival[:, neighbours]

    nothing = jnp.zeros((*objects.gain.shape, neighbours.shape[1]))
    values: jax.Array = jax.lax.fori_loop(0, NUM_BACKUPS, lambda _, values: backup(values), nothing)
    return values


def collecting_tasks(
    key: jax.Array, neighbours: jax.Array, of_features: jax.Array, num_worlds: int, num_objects: int, num_steps: int
) -> dict[str, jax.Array]:
    """Demonstrations of tasks: in random worlds, the best way to collect what the task rewards.

    Args:
      key: PRNG key.
      neighbours: of the grid, shape (cells, 5).
      of_features: what each task rewards an object of each feature with, shape (tasks, features).
      num_worlds: of each task, each with one demonstration.
      num_objects: in each world, each of a random feature.
      num_steps: of each demonstration; after the best way has ended the teacher stays.

    Returns:
      With leading axes (tasks, worlds): "places" and "features", shape (objects,); "rewards", shape (objects,); "cell"
      and "left", the state before each step, shape (steps,); "values" of all moves there, shape (steps, 5); "teacher",
      the move taken, shape (steps,).
    """
    num_cells, num_features = len(neighbours), of_features.shape[1]

    def world(key: jax.Array, task: jax.Array) -> dict[str, jax.Array]:
        of_cells, of_kinds = jax.random.split(key)
        *placed, start = _cells(of_cells, jnp.ones(num_cells, bool), [True] * (num_objects + 1))
        places = jnp.stack(placed)
        features = jax.random.randint(of_kinds, (num_objects,), 0, num_features)
        objects = collection(places, task[features], num_cells)
        values = action_values(neighbours, objects)

        def step(state: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, Any]:
            left, cell = state
            here = values[left, cell]
            to = neighbours[cell, jnp.argmax(here)]
            return (objects.after[left, to], to), (cell, left, here)

        begin = jnp.asarray(2**num_objects - 1), start
        _, (path, left, seen) = jax.lax.scan(step, begin, None, num_steps)
        return {
            "places": places, "features": features, "rewards": task[features],
            "cell": path, "left": left, "values": seen, "teacher": jnp.argmax(seen, -1),
        }  # fmt: skip

    keys = jax.random.split(key, (len(of_features), num_worlds))
    return jax.vmap(jax.vmap(world, (0, None)))(keys, of_features)


class Mazes(NamedTuple):
    """Several mazes of one size, over all their cells: walls are cells that no move leads to.

    Attributes:
      free: whether a cell is, shape (mazes, cells).
      neighbours: shape (mazes, cells, 5).
      first: the first move of a shortest path, shape (mazes, goals, cells).
      quadrant: of each cell, shape (cells,).
    """

    free: jax.Array
    neighbours: jax.Array
    first: jax.Array
    quadrant: jax.Array


def mazes(walls: npt.NDArray[np.bool_]) -> Mazes:
    """From maps of their walls, shape (mazes, size, size)."""
    _, size, _ = walls.shape
    neighbours = []
    for each in walls:
        known = grid(each)
        number = known.cells[:, 0] * size + known.cells[:, 1]
        full = np.repeat(np.arange(size * size, dtype=np.int32)[:, None], len(MOVES), axis=1)
        full[number] = number[known.neighbours]
        neighbours.append(full)
    of_all = jnp.asarray(np.stack(neighbours))
    lower = np.arange(size) >= size // 2
    quadrant = (2 * lower[:, None] + lower[None, :]).ravel()
    return Mazes(
        jnp.asarray(~walls.reshape(len(walls), -1)),
        of_all,
        jax.jit(jax.vmap(first_moves))(of_all),
        jnp.asarray(quadrant),
    )


def reaching_tasks(
    key: jax.Array, of: Mazes, tasks: jax.Array, num_kinds: int, num_worlds: int, num_steps: int
) -> dict[str, jax.Array]:
    """Demonstrations of tasks: the shortest path to the object of a kind in a quadrant, and what is done with it there.

    Each world has four objects: the goal, one of its kind in another quadrant, and two of other kinds, one of them in
    the goal's quadrant. The kind, the quadrant and the deed are thus all needed to know what to do.

    Args:
      key: PRNG key.
      of: the mazes.
      tasks: the maze, the kind, the deed and the quadrant of each task, shape (tasks, 4).
      num_kinds: of objects.
      num_worlds: of each task, each with one demonstration from a random cell.
      num_steps: of each demonstration.

    Returns:
      With leading axes (tasks, worlds): "maze"; "places" and "kinds" of objects, shape (4,), the goal first; "cell" and
      "teacher" of each step, shape (steps,), deeds numbered after the four moves; "valid", false after the deed.
    """

    def world(key: jax.Array, task: jax.Array) -> dict[str, jax.Array]:
        number, kind, deed, quadrant = task
        of_cells, of_kinds = jax.random.split(key)
        within = of.quadrant == quadrant
        *placed, start = _cells(of_cells, of.free[number], [within, ~within, within, True, True])
        others = (kind + jax.random.randint(of_kinds, (2,), 1, num_kinds)) % num_kinds

        def step(cell: jax.Array, _: None) -> tuple[jax.Array, Any]:
            there = cell == placed[0]
            move = of.first[number, placed[0], cell]
            action = jnp.where(there, STAY + deed, move)
            return jnp.where(there, cell, of.neighbours[number, cell, move]), (cell, action, there)

        _, (path, actions, there) = jax.lax.scan(step, start, None, num_steps)
        return {
            "maze": number, "places": jnp.stack(placed), "kinds": jnp.stack([kind, kind, *others]),
            "cell": path, "teacher": actions, "valid": jnp.cumsum(there) <= there,
        }  # fmt: skip

    keys = jax.random.split(key, (len(tasks), num_worlds))
    return jax.vmap(jax.vmap(world, (0, None)))(keys, tasks)


def _cells(key: jax.Array, free: jax.Array, allowed: Sequence[Any]) -> list[jax.Array]:
    """Random cells, no two the same, each a free one among those allowed to it. A sort would take long to compile."""
    order = jax.random.uniform(key, free.shape)
    drawn: list[jax.Array] = []
    for mask in allowed:
        drawn.append(jnp.argmax(jnp.where(free & mask, order, -1.0)).astype(jnp.int32))
        free = free.at[drawn[-1]].set(False)
    return drawn
