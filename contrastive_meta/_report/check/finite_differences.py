"""Finite differences for `check`: slopes of the outer loss after learning along a few directions, and their noise."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from contrastive_meta import _pytree as tree
from contrastive_meta._instance import Instance
from contrastive_meta._problem import BilevelProblem, MetaParams, Task, float_dtype_of
from contrastive_meta._report.gradients import Vector, norm
from contrastive_meta._result import EstimatorState, Status
from contrastive_meta._solvers.base import InnerSolver

# Random unit directions in each group of meta-parameters; a group with no more entries than that takes all of its own.
NUM_DIRECTIONS = 5
# Step sizes tried for each direction.
NUM_STEPS = 5
# Learnings that run at once.
_BATCH_SIZE = 10


class Slopes(NamedTuple):
    """Finite differences of the outer loss after learning, along K directions in n meta-parameters.

    Sums over the directions estimate norms over all of the meta-parameters: E <x, d>^2 = |x|^2 / n for a random unit
    direction d, so `weights` are n / K for K random ones, and 1 where the directions are all of the coordinates.

    Attributes:
      directions: unit vectors, shape (K, n).
      groups: which group of meta-parameters each lies in, shape (K,).
      weights: of the squares, shape (K,).
      values: the slopes, shape (K,).
      noise: estimated absolute error of each, shape (K,); infinite where nothing finite was found.
      status: the worst that learning reported on the way.
    """

    directions: Vector
    groups: Any
    weights: Vector
    values: Vector
    noise: Vector
    status: Status

    def norm(self, along: Vector, group: int | None = None) -> float:
        """The estimated norm of the vector whose components along the directions are given, or of one group of it."""
        weighted = along * np.sqrt(self.weights)
        return norm(weighted if group is None else weighted[self.groups == group])


def measure_slopes(
    problem: BilevelProblem,
    solver: InnerSolver,
    meta_params: MetaParams,
    task: Task,
    key: jax.Array,
    groups: Sequence[int],
) -> Slopes:
    """Central differences at several step sizes, of which those are kept that agree best with the next larger ones.

    The error of a difference at step h is about noise / h + curvature h^2. The disagreement with the next larger step
    shows both; what smaller steps disagree by, scaled up by their noise, keeps a chance agreement from passing for
    accuracy. The rounding of the outer loss is the least it can be.

    Args:
      problem: the bilevel problem.
      solver: the learner, started afresh for each.
      meta_params: where.
      task: a single task.
      key: of the minibatches, the same for all.
      groups: a number from 0 for each leaf of `meta_params`: leaves of one number share directions.
    """
    sizes = [int(np.size(leaf)) for leaf in jax.tree.leaves(meta_params)]
    flat = np.asarray(ravel_pytree(meta_params)[0], np.float64)
    entries = np.repeat(np.asarray(groups, int), sizes)
    directions, group_of, weights, lengths = _directions(flat, entries)
    loss_dtype = float_dtype_of(problem, problem.init(meta_params, task), meta_params, task)
    dtypes = [loss_dtype, *(tree.float_dtype(leaf) for leaf in jax.tree.leaves(meta_params))]
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)
    # From near the rounding of the outer loss to where the nonlinearity of smooth functions shows.
    steps = np.geomspace(eps**0.4, eps ** (1 / 6), NUM_STEPS)

    offsets = steps[:, None, None] * lengths[:, None] * np.array([1.0, -1.0])
    with jax.default_matmul_precision("highest"):
        outcome = _learn_along(problem, solver, meta_params, task, key, jnp.asarray(directions), jnp.asarray(offsets))
    losses, moved = (np.asarray(x, np.float64) for x in outcome[:2])
    statuses = np.asarray(outcome[2])
    with np.errstate(all="ignore"):
        # Over the distance that was moved in floating point, not the one that was meant.
        distances = moved[..., 0] - moved[..., 1]
        slopes = (losses[..., 0] - losses[..., 1]) / distances
        # What two losses differ by if they are the same number but for rounding.
        rounding = float(jnp.finfo(outcome[0].dtype).eps) * np.abs(losses).max(axis=-1) / distances

    values, noise, worst = np.empty(len(weights)), np.empty(len(weights)), Status.CONVERGED
    for group in np.unique(group_of):
        here = group_of == group
        best, values[here], noise[here] = _settle(slopes[:, here], steps, rounding[:, here])
        worst = max(worst, Status(int(statuses[best][here].max())))
    return Slopes(directions, group_of, weights, values, noise, worst)


def _directions(flat: Vector, entries: Any) -> tuple[Vector, Any, Vector, Vector]:
    """Directions, the group and weight of each, and the length along each that moves its entries by their scale."""
    random = np.random.default_rng(0)
    directions, groups, weights, lengths = [], [], [], []
    for group in np.unique(entries):
        (where,) = np.nonzero(entries == group)
        size = where.size
        count = min(size, NUM_DIRECTIONS)
        block = np.zeros((count, flat.size))
        if size <= NUM_DIRECTIONS:
            block[np.arange(size), where] = 1.0
            length = np.maximum(1, np.abs(flat[where]))
        else:
            block[:, where] = random.standard_normal((count, size))
            block /= np.linalg.norm(block, axis=1, keepdims=True)
            length = np.full(count, np.sqrt(size) * max(1.0, norm(flat[where]) / np.sqrt(size)))
        directions.append(block)
        groups.append(np.full(count, group))
        weights.append(np.full(count, size / count))
        lengths.append(length)
    return np.concatenate(directions), np.concatenate(groups), np.concatenate(weights), np.concatenate(lengths)


@jax.jit
def _learn_along(
    problem: BilevelProblem,
    solver: InnerSolver,
    meta_params: MetaParams,
    task: Task,
    key: jax.Array,
    directions: jax.Array,
    offsets: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outer loss, distance moved and status for each of `offsets`, of shape (steps, K, 2)."""
    flat, unravel = ravel_pytree(meta_params)

    def learn(which: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        direction = directions[which].astype(flat.dtype)
        meta = unravel(flat + offset.astype(flat.dtype) * direction)
        init = problem.init(meta, task)
        instance = Instance(problem, meta, task, key, float_dtype_of(problem, init, meta, task))
        memory, first = solver.bind(meta).init_memory(init), problem.first_model_state(meta, task)
        solution = instance.free_phase(solver, EstimatorState.fresh(init, memory, instance.dtype, first))
        instance = instance.at(solution.model_state)
        moved = jnp.vdot(ravel_pytree(meta)[0] - flat, direction)
        return instance.outer(solution.params), moved, solution.status

    which = jnp.broadcast_to(jnp.arange(offsets.shape[1])[:, None], offsets.shape)
    flattened = jax.lax.map(lambda x: learn(*x), (which.ravel(), offsets.ravel()), batch_size=_BATCH_SIZE)
    losses, moved, status = (x.reshape(offsets.shape) for x in flattened)
    return losses, moved, status


def _settle(slopes: Vector, steps: Vector, rounding: Vector) -> tuple[int, Vector, Vector]:
    """The index of the best step, the slopes there and their noise; `slopes` and `rounding` have shape (steps, K)."""
    with np.errstate(invalid="ignore"):
        gaps = np.abs(np.diff(slopes, axis=0))
    gaps[~np.isfinite(gaps)] = np.inf
    # Noise grows as 1 / h: the gap at a smaller step, times the ratio of the steps, is another sample of it.
    noise = np.stack([(gaps[: j + 1] * (steps[: j + 1, None] / steps[j])).max(axis=0) for j in range(len(gaps))])
    # Losses that do not resolve the steps are equal, so their differences say nothing: rounding bounds the noise.
    noise = np.maximum(noise, rounding[:-1])
    best = int(np.argmin([norm(row) for row in noise]))
    return best, slopes[best], noise[best]
