"""Teachers of grid worlds against plain computations, and what learners are shown and scored by."""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.composition import goals, preferences
from benchmarks.composition.grid_learners import ANIL, HYPERNETWORK, SEEN, UNSEEN, claims
from benchmarks.composition.grid_worlds import (
    DISCOUNT,
    MOVES,
    NUM_BACKUPS,
    STAY,
    action_values,
    collection,
    distances,
    first_moves,
    grid,
    maze,
    rooms,
)

WALLS = maze(np.random.default_rng(0), 5, 5)


def moved(cell: tuple[int, int], move: tuple[int, int], walls: Any) -> tuple[int, int]:
    row, column = cell[0] + move[0], cell[1] + move[1]
    inside = 0 <= row < walls.shape[0] and 0 <= column < walls.shape[1]
    return (row, column) if inside and not walls[row, column] else cell


def steps_from(goal: tuple[int, int], walls: Any) -> dict[tuple[int, int], int]:
    """Breadth first."""
    found, queue = {goal: 0}, collections.deque([goal])
    while queue:
        cell = queue.popleft()
        for move in MOVES:
            # Moves can be taken back.
            if (to := moved(cell, move, walls)) not in found:
                found[to] = found[cell] + 1
                queue.append(to)
    return found


@pytest.mark.parametrize("walls", [rooms(), WALLS], ids=["rooms", "maze"])
def test_shortest_paths_are_those_of_a_search(walls: Any) -> None:
    known = grid(walls)
    neighbours = jnp.asarray(known.neighbours)
    steps, first = np.asarray(distances(neighbours)), np.asarray(first_moves(neighbours))
    cells = [tuple(cell) for cell in known.cells.tolist()]
    for goal in range(len(cells)):
        searched = steps_from(cells[goal], walls)
        assert [searched[cell] for cell in cells] == steps[goal].tolist()
        for at, cell in enumerate(cells):
            if at != goal:
                assert searched[moved(cell, MOVES[first[goal, at]], walls)] == searched[cell] - 1


def test_value_iteration_is_that_of_a_plain_recursion() -> None:
    walls = rooms()
    known = grid(walls)
    places, rewards = [0, 7, 13], [1.0, -0.5, 0.7]
    ours = np.asarray(
        action_values(
            jnp.asarray(known.neighbours), collection(jnp.array(places), jnp.array(rewards), len(known.cells))
        )
    )
    cells = [tuple(cell) for cell in known.cells.tolist()]
    values: dict[Any, float] = collections.defaultdict(float)
    for _ in range(NUM_BACKUPS):
        backed: dict[Any, float] = {}
        for subset in range(8):
            for at, cell in enumerate(cells):
                for number, move in enumerate(MOVES):
                    to = cells.index(moved(cell, move, walls))
                    here = [j for j in range(3) if places[j] == to and subset >> j & 1]
                    left = subset - sum(1 << j for j in here)
                    best = max(values[left, to, k] for k in range(len(MOVES)))
                    backed[subset, at, number] = sum(rewards[j] for j in here) + DISCOUNT * best
        values.update(backed)
    plain = [[[values[s, c, k] for k in range(len(MOVES))] for c in range(len(cells))] for s in range(8)]
    np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_preferences_are_shown_by_the_best_way() -> None:
    shown = preferences.demonstrations(6, 3, 0)
    found = jax.tree.map(np.asarray, shown["train"])
    known = grid(rooms())
    # The agent moves as the values say, and what it steps on is gone.
    for before in range(found["cell"].shape[-1] - 1):
        move = found["values"][..., before, :].argmax(-1)
        assert (known.neighbours[found["cell"][..., before], move] == found["cell"][..., before + 1]).all()
    standing = found["places"][..., None, :] == found["cell"][..., 1:, None]
    assert not (standing & (found["left"][..., 1:, None] >> np.arange(3) & 1).astype(bool)).any()
    tasks = preferences.split(shown["train"])
    assert tasks.x_train.shape == tasks.x_val.shape == (6, 36, 9 * 20)
    assert float(preferences.loss(tasks.y_train, tasks.y_train)) == 0
    assert float(preferences.accuracy(tasks.y_train, tasks.y_train)) == 1
    assert float(preferences.accuracy(-tasks.y_train, tasks.y_train)) < 0.5
    seen, unseen = preferences.combinations(np.random.default_rng(0))
    assert not set(seen) & set(unseen) and len(unseen) == 23


def test_goals_are_shown_by_a_shortest_path_and_the_deed() -> None:
    shown = goals.demonstrations(1, 1, 0)
    random = np.random.default_rng(0)
    for _ in range(goals.NUM_MAZES):
        maze(random, goals.SIZE, goals.NUM_WALLS)
    seen, unseen = goals.combinations(random)
    assert len(seen) == 72 and len(unseen) == 24
    found = jax.tree.map(np.asarray, shown[UNSEEN])
    for task, maze_of, kinds in zip(np.repeat(unseen, 3, 0), found["maze"], found["kinds"], strict=True):
        assert (maze_of == task[0]).all() and (kinds[:, :2] == task[1]).all() and (kinds[:, 2:] != task[1]).all()
    for at in np.ndindex(found["maze"].shape):
        free = found["free"][at].reshape(5, 5)
        goal = divmod(int(found["places"][at][0]), 5)
        quadrant = [2 * (place // 5 >= 2) + (place % 5 >= 2) for place in found["places"][at]]
        wanted = np.repeat(unseen, 3, 0)[at[0]]
        assert quadrant[0] == quadrant[2] == wanted[3] != quadrant[1]
        searched = steps_from(goal, ~free)
        actions = found["teacher"][at][found["valid"][at]]
        start = divmod(int(found["cell"][at][0]), 5)
        if searched[start] < len(found["valid"][at]):
            assert len(actions) == searched[start] + 1 and actions[-1] == STAY + wanted[2]
        # An agent that does the same comes the same way; trailing steps are beyond the demonstration.
        world, teacher = {name: leaf[at] for name, leaf in found.items()}, iter([*actions.tolist(), STAY])
        path = goals.rolled_out(world, lambda _, rest=teacher: next(rest))
        assert path[: len(actions)] == [list(divmod(int(c), 5)) for c in found["cell"][at][found["valid"][at]]]
    tasks = goals.split(shown[SEEN])
    perfect = 50 * jax.nn.one_hot(tasks.y_train, STAY + 2)
    assert float(goals.loss(perfect, tasks.y_train)) < 1e-6
    assert float(goals.accuracy(perfect, tasks.y_train)) == 1
    # Steps after the deed do not count.
    ended = tasks.y_train < 0
    assert bool(ended.any())
    assert float(goals.loss(jnp.where(ended[..., None], 7.0, perfect), tasks.y_train)) < 1e-6


def test_a_learner_whose_error_is_not_finite_on_a_seed_is_above_nobody() -> None:
    errors = {(HYPERNETWORK, 1): 0.5, (HYPERNETWORK, 2): None, (ANIL, 1): 0.9, (ANIL, 2): 1.1}
    columns = [
        f"error_{which}{when}" for which in (SEEN, UNSEEN) for when in ("", "_at_equal_time", "_at_equal_gradients")
    ]
    records = [
        {"kind": "learner", "case": name, "seed": seed, **dict.fromkeys(columns, error)}
        for (name, seed), error in errors.items()
    ]
    assert {told["held"] for told in claims(records) if told["claim"].startswith(ANIL)} == {False}
    finite = [row | dict.fromkeys(columns, row[columns[0]] or 0.6) for row in records]
    assert {told["held"] for told in claims(finite) if told["claim"].startswith(ANIL)} == {True}
