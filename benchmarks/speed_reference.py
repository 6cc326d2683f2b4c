"""From where learning starts on the speed benchmark, and the exact meta-gradient at the same minimum."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import contrastive_meta as cm
from benchmarks.cases import WarmTask, largest_curvature, started_by_task, upcast
from benchmarks.harness import Session, Vector, flatten, precision
from benchmarks.speed_problems import Problem

ACCURATE, UNFINISHED, COLD = "accurate", "unfinished", "cold"
# An unfinished free phase is the first point on the way down that is as close as this, relative to the solution's norm.
DISTANCE = 0.02
# Steps between the points of the way down that are looked at.
_SEGMENTS = (1,) * 20 + (4,) * 20 + (12,) * 200
# Of the first residual: what L-BFGS learns to before Newton's steps are tried.
_TOLERANCES = (1e-5, 1e-6, 1e-7)


class Ready(NamedTuple):
    """A problem with its starts and its exact answer.

    Attributes:
      problem: what it is.
      losses: with learning started from where the task says.
      meta_params: in the working precision.
      tasks: `{start: data and starting point}`, in the working precision.
      distances: `{start: distance from the solution, relative to its norm}`.
      reference: the meta-gradient at the solution in float64, flat.
      converged: whether the reference vouches for itself.
      curvature: the largest of the inner loss, a little above.
      first_residual: gradient norm of the inner loss at the cold start.
      num_params: entries of `params`, of one task.
      num_meta: entries of `meta_params`.
    """

    problem: Problem
    losses: cm.BilevelProblem
    meta_params: Any
    tasks: dict[str, WarmTask]
    distances: dict[str, float]
    reference: Vector
    converged: bool
    curvature: float
    first_residual: float
    num_params: int
    num_meta: int

    @property
    def tolerances(self) -> Sequence[float]:
        """Of linear solves and of their likes; networks, worse conditioned, need smaller ones."""
        return (1e-1, 1e-2, 5e-3, 2e-3, 1e-3, 1e-4) if self.problem.convex else (1e-2, 1e-3, 1e-4, 1e-5)

    @property
    def free_steps(self) -> Sequence[int]:
        """Of L-BFGS, to finish an unfinished free phase with."""
        return (4, 8, 16, 32, 64) if self.problem.convex else (64, 256, 512)

    @property
    def momentum(self) -> float:
        """Of Nesterov's descent, from the condition number, rounded: a neighbouring seed shares the program."""
        root = math.sqrt(self.curvature / self.problem.floor)
        return round((root - 1) / (root + 1), 2)


def prepare(problem: Problem, session: Session, x64: bool) -> Ready:
    """Build a problem in the working precision; solve it in float64, from the very same numbers, on the way of L-BFGS.

    All starts lie on one path down, so that all methods are in one basin.

    Raises:
      DataMissingError: its data are not there.
    """
    with precision(x64):
        instance = problem.build(session)
        losses = started_by_task(instance.problem)
        every = jax.vmap if problem.batched else _unmapped
        init = every(lambda task: instance.problem.init(instance.meta_params, task))(instance.task)
    with precision(True):
        meta_params, cold = upcast(instance.meta_params), WarmTask(upcast(instance.task), upcast(init))
        solve = _Solve(losses, meta_params, problem.batched)
        solution, unfinished, converged = _way_down(solve, cold)
        result = solve.differentiate(cold._replace(start=solution))
        curvature = max(solve.curvature(cold._replace(start=at)) for at in (unfinished, solution))
        # A network's solution is one of many: a free phase from its random start might end in another one.
        begin = cold.start if problem.convex else unfinished
        starts = {ACCURATE: solution, UNFINISHED: unfinished, COLD: begin}
        length = float(np.linalg.norm(flatten(solution)))
        distances = {
            name: float(np.linalg.norm(flatten(at) - flatten(solution))) / length for name, at in starts.items()
        }
        first_residual = float(np.max(solve.residual(cold._replace(start=begin))))
    with precision(x64):
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, init)
        tasks = {
            name: WarmTask(instance.task, jax.tree.map(lambda x, dtype: jnp.asarray(np.asarray(x), dtype), at, dtypes))
            for name, at in starts.items()
        }
    num_tasks = jax.tree.leaves(instance.task)[0].shape[0] if problem.batched else 1
    return Ready(
        problem,
        losses,
        instance.meta_params,
        tasks,
        distances,
        flatten(result),
        converged,
        _rounded_up(curvature),
        first_residual,
        sum(leaf.size for leaf in jax.tree.leaves(init)) // num_tasks,
        sum(leaf.size for leaf in jax.tree.leaves(instance.meta_params)),
    )


def _way_down(solve: "_Solve", cold: WarmTask) -> tuple[Any, Any, bool]:
    """L-BFGS from the cold start, then Newton: the end, the first point near it (`DISTANCE`), whether it converged."""
    first = solve.residual(cold)
    points, memory, solution, converged = [cold.start], None, cold.start, False
    # Where the loss still curves downwards Newton's steps lead nowhere: L-BFGS goes on.
    for tol in _TOLERANCES:
        for num_steps in _SEGMENTS:
            found = solve.descend(cold._replace(start=points[-1]), memory, tol * first, num_steps)
            points.append(found.params)
            memory = found.memory
            if np.all(found.residual <= tol * first):
                break
        solution = solve.polish(cold._replace(start=points[-1]))
        converged = bool(np.all(solve.residual(cold._replace(start=solution)) <= 1e-9 * first))
        if converged:
            break
    flat = flatten(solution)
    near = [at for at in points if np.linalg.norm(flatten(at) - flat) <= DISTANCE * np.linalg.norm(flat)]
    return solution, near[0] if near else points[-1], converged


class _Solve:
    """What the reference is made of, in float64, for one task or mapped over a batch."""

    def __init__(self, losses: cm.BilevelProblem, meta_params: Any, batched: bool) -> None:
        self.losses, self.meta_params, self.batched = losses, meta_params, batched

    def residual(self, task: WarmTask) -> Any:
        """Norm of the inner gradient at the start, for each task."""
        return np.asarray(self._map(_residual, task))

    def descend(self, task: WarmTask, memory: Any, tol: Any, max_steps: int) -> cm.Solution:
        """L-BFGS from the start, with what it remembers, to a gradient norm or for so many steps."""
        if memory is None:
            memory = self._map(_no_memory, task)
        found: cm.Solution = self._map(_descend, task, memory, jnp.asarray(tol), jnp.full(jnp.shape(tol), max_steps))
        return found

    def polish(self, task: WarmTask) -> Any:
        """Newton's steps from the start, to the floor of float64."""
        return self._map(_polish, task)

    def differentiate(self, task: WarmTask) -> Any:
        """The meta-gradient at the start, by conjugate gradients to 1e-11; the mean over a batch."""
        grads = self._map(_differentiate, task)
        return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), grads) if self.batched else grads

    def curvature(self, task: WarmTask) -> float:
        """The largest eigenvalue of the inner Hessian at the start."""
        return float(np.max(self._map(_largest_curvature, task)))

    def _map(self, function: Any, task: WarmTask, *more: Any) -> Any:
        return _compiled(function, self.batched)(self.losses, self.meta_params, task, *more)


@functools.cache
def _compiled(function: Any, batched: bool) -> Any:
    if not batched:
        return jax.jit(function)

    def over_tasks(losses: Any, meta_params: Any, *rest: Any) -> Any:
        return jax.vmap(functools.partial(function, losses, meta_params))(*rest)

    return jax.jit(over_tasks)


def _residual(losses: cm.BilevelProblem, meta_params: Any, task: WarmTask) -> jax.Array:
    grads = jax.grad(losses.inner)(task.start, meta_params, task)
    norm: jax.Array = jnp.linalg.norm(ravel_pytree(grads)[0])
    return norm


def _no_memory(losses: cm.BilevelProblem, meta_params: Any, task: WarmTask) -> Any:
    return cm.LBFGS().init_memory(task.start)


def _descend(
    losses: cm.BilevelProblem, meta_params: Any, task: WarmTask, memory: Any, tol: jax.Array, max_steps: jax.Array
) -> cm.Solution:
    solver = cm.LBFGS(tol=tol, max_steps=max_steps)
    return solver.solve(lambda at: losses.inner(at, meta_params, task), task.start, memory=memory)


def _polish(losses: cm.BilevelProblem, meta_params: Any, task: WarmTask) -> Any:
    inner_grad = jax.grad(lambda at: losses.inner(at, meta_params, task))

    def residual(params: Any) -> Any:
        return jnp.linalg.norm(ravel_pytree(inner_grad(params))[0])

    def step(carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        params, count = carry
        grads, hvp = jax.linearize(inner_grad, params)
        move = cm.ConjugateGradient(tol=1e-6, max_steps=3000).solve(hvp, grads).solution
        return jax.tree.map(jnp.subtract, params, move), count + 1

    floor = 1e-9 * residual(task.start)  # of a start that L-BFGS left at 1e-5 or below

    def unfinished(carry: tuple[Any, jax.Array]) -> Any:
        return (carry[1] < 12) & (residual(carry[0]) > floor)

    return jax.lax.while_loop(unfinished, step, (task.start, jnp.int32(0)))[0]


def _differentiate(losses: cm.BilevelProblem, meta_params: Any, task: WarmTask) -> Any:
    # A tolerance that is met at once: no step is taken.
    estimator = cm.ImplicitDifferentiation(cm.LBFGS(tol=1e9), cm.ConjugateGradient(tol=1e-11, max_steps=5000))
    return estimator.estimate(losses, meta_params, task).grad


def _largest_curvature(losses: cm.BilevelProblem, meta_params: Any, task: WarmTask) -> jax.Array:
    largest: jax.Array = largest_curvature(losses, task.start, meta_params, task)
    return largest


def _unmapped(function: Any) -> Any:
    return function


def _rounded_up(curvature: float) -> float:
    """Up to the next power of 1.25: seeds whose curvatures nearly agree share their programs."""
    return float(1.25 ** math.ceil(math.log(1.02 * curvature, 1.25)))
