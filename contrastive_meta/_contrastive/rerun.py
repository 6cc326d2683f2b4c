"""Nudged phases as published: the learner runs again, on the nudged loss, from the end of the free phase."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._contrastive.phases import Base, PhaseSetup
from contrastive_meta._control import cast_like, cond, fori_loop
from contrastive_meta._holomorphic import require_holomorphic
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import LinearNudge, LossNudge, NudgeScheme
from contrastive_meta._problem import MetaParams, Params, Task
from contrastive_meta._pytree import PyTree
from contrastive_meta._solvers.base import InnerSolver, Solution, Stop
from contrastive_meta._walls import Walls

_GROUP = "phases"


class Runs(NamedTuple):
    """Where the learner's runs ended.

    Attributes:
      ends: flattened, a leading axis of phases.
      status: of each phase's run.
      residual: norm of the gradient of its own loss where the last one ended.
      num_steps: of the longest run.
      num_gradients: of all runs.
    """

    ends: Params
    status: jax.Array
    residual: jax.Array
    num_steps: jax.Array
    num_gradients: jax.Array


class Rerun(NamedTuple):
    """The learner that runs phases.

    Attributes:
      solver: bound to the meta-parameters.
      memory: where its runs begin, of the solver; () starts afresh.
      may_linearise: whether the linear nudge may take the place of the outer loss.
      together: whether to run all phases in one vmapped solve.
      walls: coordinates of where its runs begin and end, where it has walls; else None.
      original: the problem before those coordinates, which it learns.
    """

    solver: InnerSolver
    memory: PyTree
    may_linearise: bool
    together: bool
    walls: Walls | None = None
    original: Instance | None = None

    def run(
        self,
        setup: PhaseSetup,
        origin: Base,
        begin: Params,
        nudges: jax.Array,
        tolerances: jax.Array,
        linear: jax.Array,
        count: Any,
    ) -> Runs:
        """Run the last `count` phases; the others are left where they begin.

        Args:
          setup: what the phases are to be.
          origin: from which they are nudged.
          begin: where they begin, flattened, a leading axis of phases.
          nudges: their strengths.
          tolerances: gradient norms at which they may stop.
          linear: whether the linear nudge takes the place of the outer loss.
          count: how many to run.
        """
        starts = jax.vmap(setup.flattening.unflatten)(begin)
        if self.walls is not None:
            starts = jax.vmap(self._params_of)(starts)

        def solve(at: Params, beta: jax.Array, stop: Stop) -> Solution:
            loss, minibatch_loss = self._losses(setup, origin, beta, linear)
            solution = self.solver.solve(loss, at, minibatch_loss=minibatch_loss, memory=self.memory, stop=stop)
            if self.walls is None:
                return solution
            end = self.walls.coordinates(solution.params, tree.grad(loss)(solution.params))
            end = self.walls.aligned(solution.params, end)
            return solution._replace(params=self._settled(setup, origin, end))

        if self.together:
            solutions: Solution = jax.vmap(
                lambda at, beta, tol: solve(at, beta, Stop(tol=tol, group=_GROUP)), axis_name=_GROUP
            )(starts, nudges, tolerances)
            return self._runs(setup, solutions, solutions.residual[-1])
        return self._one_by_one(setup, solve, starts, nudges, tolerances, count)

    def _one_by_one(
        self, setup: PhaseSetup, solve: Any, starts: Params, nudges: jax.Array, tolerances: jax.Array, count: Any
    ) -> Runs:
        """One run after another, the last phase first: it decides how many steps the others take."""
        number = nudges.size
        budget = jnp.asarray(self.solver.step_budget, jnp.int32)
        none = jnp.zeros((number,), jnp.int32)
        residual = jnp.zeros((), setup.dtype)

        def run(place: jax.Array, runs: Any) -> Any:
            ends, status, _, num_steps, num_gradients = runs
            k = number - 1 - place
            at = jax.tree.map(lambda xs: xs[k], starts)
            stop = Stop(tol=jnp.where(place == 0, tolerances[k], 0), max_steps=jnp.where(place == 0, budget, num_steps))
            solution = solve(at, nudges[k], stop)
            after = (
                jax.tree.map(lambda xs, x: xs.at[k].set(x), ends, solution.params),
                status.at[k].set(solution.status),
                solution.residual,
                jnp.where(place == 0, solution.num_steps, num_steps),
                num_gradients + solution.num_gradients,
            )
            return cast_like(after, runs)

        begin = starts, none, residual, jnp.int32(0), jnp.int32(0)
        ends, status, residual, num_steps, num_gradients = fori_loop(0, count, run, begin)
        return Runs(jax.vmap(setup.flattening.flatten)(ends), status, residual, num_steps, num_gradients)

    def _runs(self, setup: PhaseSetup, solutions: Solution, residual: jax.Array) -> Runs:
        return Runs(
            jax.vmap(setup.flattening.flatten)(solutions.params),
            solutions.status,
            residual.astype(setup.dtype),
            jnp.max(solutions.num_steps),
            jnp.sum(solutions.num_gradients).astype(jnp.int32),
        )

    def _params_of(self, x: Params) -> Params:
        assert self.walls is not None and self.original is not None
        return self.walls.params_of(x, self.original.meta_params)

    def _settled(self, setup: PhaseSetup, origin: Base, end: Params) -> Params:
        """Coordinates of an end, those that make no difference as they were at the origin."""
        assert self.walls is not None
        begin = setup.flattening.unflatten(origin.params)
        there, here, slope = (*map(self._params_of, (end, begin)), self.walls.slopes(begin))

        def settled(x: jax.Array, x0: jax.Array, w: jax.Array, w0: jax.Array, moves: jax.Array) -> jax.Array:
            return jnp.where((moves == 0) & (w == w0), x0.astype(x.dtype), x)

        return jax.tree.map(settled, end, begin, there, here, slope)

    def _losses(self, setup: PhaseSetup, origin: Base, beta: jax.Array, linear: jax.Array) -> tuple[Any, Any]:
        """The nudged loss of trees, and on minibatches where the problem has them."""
        instance, nudge, unflatten = setup.tree_instance, setup.nudge, setup.flattening.unflatten
        base, pull = unflatten(origin.params), unflatten(origin.outer.in_params)
        if self.walls is not None and self.original is not None:
            instance, base = self.original, self._params_of(base)
            pull = tree.grad(instance.outer)(base)

        def line(at: Params) -> jax.Array:
            # Not `vdot`: it conjugates, and complex phases need a holomorphic line.
            products = jax.tree.map(lambda v, x, x0: jnp.sum(v * (x - x0)), pull, at, base)
            return tree.sum_of_leaves(products)

        def of_loss(at: Params, meta_params: MetaParams, task: Task) -> jax.Array:
            def loss(at: Params) -> jax.Array:
                return instance.problem.outer(at, meta_params, task).astype(instance.dtype)

            # Not `where`, whose derivative has the NaN of either.
            value: jax.Array = cond(linear, lambda x: line(x).astype(instance.dtype), loss, at)
            return value

        pulls: Callable[[Params, MetaParams, Task], jax.Array]
        if isinstance(nudge, LinearNudge):
            pulls = lambda at, meta_params, task: line(at)  # noqa: E731
        elif isinstance(nudge, LossNudge) and self.may_linearise:
            pulls = of_loss
        else:
            applied = nudge.apply(instance.problem, base, instance.meta_params, instance.task, pull)
            pulls = setup.nudged_problem(origin, nudge).problem.outer if self.walls is None else applied.outer

        def nudged(at: Params, task: Task) -> jax.Array:
            inner = instance.problem.inner(at, instance.meta_params, task)
            strength = beta if jnp.iscomplexobj(beta) else jnp.asarray(beta, inner.dtype)
            return inner + strength * pulls(at, instance.meta_params, task)

        def on_minibatch(at: Params, step: jax.Array) -> jax.Array:
            return nudged(at, instance.problem.minibatch(instance.key, instance.task, step))

        stochastic = instance.problem.sample is not None
        return (lambda at: nudged(at, instance.task)), (on_minibatch if stochastic else None)


def tolerances_for(setup: PhaseSetup, origin: Base, nudges: jax.Array, nudged_tol: Any) -> jax.Array:
    """Gradient norms at which phases may stop: relative to their nudge, not below the noise."""
    start, dtype = setup.start, setup.dtype
    relative_tol = start.eps ** (2 / 3) if nudged_tol is None else nudged_tol
    sizes = jnp.abs(nudges)
    smallest = jnp.min(jnp.where(sizes > 0, sizes, jnp.inf))
    nudge_norm = setup.norm_of_nudge(origin.outer.in_params)
    # The matched control stops with the weakest nudge.
    wanted = jnp.asarray(relative_tol, dtype) * jnp.where(sizes > 0, sizes, smallest) * nudge_norm
    return jnp.maximum(wanted, 2 * start.noise).astype(dtype)


def require_complex_capable(instance: Instance, scheme: NudgeScheme, start: Params) -> None:
    """Raise unless both losses and their gradients are holomorphic."""
    meta_params, start = tree.to_complex(instance.meta_params), tree.to_complex(start)
    for name, loss in (("inner_loss", instance.problem.inner), ("outer_loss", instance.problem.outer)):
        require_holomorphic(
            tree.value_and_grad(functools.partial(_on_task, loss, instance.task), argnums=(0, 1)),
            start,
            meta_params,
            what=f"{name} or its gradient",
            remedy="Complex schemes differentiate along a complex nudge: write the loss without this operation, "
            "or use a real scheme such as `central_difference`.",
            complex_step=len(scheme.nudges) == 1,
        )


def _on_task(loss: Any, task: Any, params: Params, meta_params: MetaParams) -> jax.Array:
    value: jax.Array = loss(params, meta_params, task)
    return value
