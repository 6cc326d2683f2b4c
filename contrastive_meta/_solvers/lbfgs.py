"""Limited-memory BFGS as the learner, with its curvature pairs handed from phase to phase.

Each iteration of its loop evaluates the loss once: at the start, or at a trial of the line search.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import fori_loop, only_if, while_loop
from contrastive_meta._problem import Params
from contrastive_meta._pytree import Flattening, PyTree, static, strategy
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers._descend import Measured, any_of
from contrastive_meta._solvers._line_search import LineSearch, after_trial
from contrastive_meta._solvers.base import InnerLoss, InnerSolver, MinibatchLoss, Solution, Stop, final_status


class Pairs(NamedTuple):
    """The curvature pairs of the latest steps, in a ring, and what they say of the inverse Hessian.

    Attributes:
      stored: pairs ever stored; the next one goes to this number modulo the number of rows.
      params: differences of iterates, a row for each pair.
      grads: differences of gradients.
      weights: inverse inner products of the two; 0 for rows without a pair.
      scale: of the identity that the pairs correct.
    """

    stored: jax.Array
    params: Params
    grads: Params
    weights: jax.Array
    scale: jax.Array

    @classmethod
    def none(cls, params: Params, memory_size: int) -> "Pairs":
        """No pair yet."""
        rows = jax.tree.map(lambda x: jnp.zeros((memory_size, *x.shape), x.dtype), params)
        return cls(jnp.int32(0), rows, rows, jnp.zeros(memory_size), jnp.ones(()))

    def push(self, params: Params, grads: Params, *, write: jax.Array, keep: jax.Array) -> "Pairs":
        """Write a pair over the oldest one if `write`, and count it if `keep`.

        A row that is not counted is written over by the next pair, and no direction is computed in between.
        """
        slot = self._slot(self.stored)
        product, squares = tree.vdot(grads, params), tree.vdot(grads, grads)
        weight = jnp.where(product == 0, 0, 1 / product)
        scale = jnp.where(squares > 0, product / squares, 1)

        def put(rows: jax.Array, row: jax.Array) -> jax.Array:
            old = jax.lax.dynamic_index_in_dim(rows, slot, keepdims=False)
            row = jnp.where(write, row.astype(rows.dtype), old)
            put_in: jax.Array = jax.lax.dynamic_update_index_in_dim(rows, row, slot, 0)
            return put_in

        return Pairs(
            self.stored + keep.astype(jnp.int32),
            jax.tree.map(put, self.params, params),
            jax.tree.map(put, self.grads, grads),
            put(self.weights, weight),
            jnp.where(keep, scale.astype(self.scale.dtype), self.scale),
        )

    def precondition(self, grads: Params, residual: jax.Array) -> Params:
        """The inverse Hessian times the gradient, whose norm is `residual`.

        Reference:
          Nocedal & Wright (2006), algorithm 7.4 (two-loop recursion).
        """
        size = self.weights.size

        def row(age: jax.Array) -> tuple[jax.Array, jax.Array, Params, Params]:
            slot = self._slot(self.stored + size - 1 - age)
            rows = self.weights, self.params, self.grads
            return slot, *jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), rows)

        def newest_first(age: jax.Array, carry: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
            vector, projections = carry
            slot, weight, params, grads = row(age)
            projection = weight * tree.vdot(params, vector).astype(weight.dtype)
            projections = jax.lax.dynamic_update_index_in_dim(projections, projection, slot, 0)
            return tree.add_scaled(vector, -projection, grads), projections

        def oldest_first(index: jax.Array, vector: Params) -> Params:
            slot, weight, params, grads = row(size - 1 - index)
            return tree.add_scaled(
                vector, projections[slot] - weight * tree.vdot(grads, vector).astype(weight.dtype), params
            )

        vector, projections = fori_loop(0, size, newest_first, (grads, jnp.zeros_like(self.weights)))
        # Before there is a pair, a step of length 1 at most, as in optax.
        scale = jnp.where(self.stored > 0, self.scale, jnp.minimum(1, 1 / residual))
        return fori_loop(0, size, oldest_first, tree.scale(scale, vector))

    def _slot(self, number: jax.Array) -> jax.Array:
        return jax.lax.rem(number, jnp.int32(self.weights.size))


class Iteration(NamedTuple):
    """A run under way.

    Attributes:
      params: the iterate, flattened.
      grads: gradient there.
      direction: along which a step is sought.
      search: the search for it.
      pairs: curvature pairs of the steps taken.
      first: what was measured at the start.
      last: what was measured at the iterate.
      num_steps: steps taken.
      num_gradients: gradients evaluated.
      running: whether another iteration is wanted.
    """

    params: Params
    grads: Params
    direction: Params
    search: LineSearch
    pairs: Pairs
    first: Measured
    last: Measured
    num_steps: jax.Array
    num_gradients: jax.Array
    running: jax.Array


@strategy
class LBFGS(InnerSolver):
    """L-BFGS with a zoom line search, to a tolerance on the gradient norm.

    It minimises the whole loss: a minibatch sequence on the problem is not followed. It ends early when the line
    search can no longer move, which near the floor of the dtype is the natural end.

    Args:
      tol: absolute tolerance on the gradient norm.
      max_steps: budget in steps; each costs one or more gradients in the line search.
      memory_size: number of curvature pairs kept.

    Reference:
      Liu & Nocedal (1989), algorithm 2.1. Its iterates are those of `optax.lbfgs`.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> solution = cm.LBFGS(tol=1e-4).solve(lambda w: jnp.sum(jnp.cosh(w - 1.0)), jnp.zeros(3))
      >>> bool(solution.residual <= 1e-4)
      True
    """

    tol: float | jax.Array = 1e-6
    max_steps: int | jax.Array = 500
    memory_size: int = static(default=10)

    @property
    def step_budget(self) -> int | jax.Array:
        """As the user set it."""
        return self.max_steps

    @property
    def descends_loss(self) -> bool:
        """It does."""
        return True

    def solve(
        self,
        loss: InnerLoss,
        init: Params,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
        stop: Stop = Stop(),
    ) -> Solution:
        """See `InnerSolver.solve`."""
        tol = jnp.asarray(self.tol if stop.tol is None else stop.tol, jnp.result_type(float))
        max_steps = self.max_steps if stop.max_steps is None else stop.max_steps
        flattening = Flattening.of(init)

        def evaluate(params: Params) -> tuple[jax.Array, Params]:
            value, grads = tree.value_and_grad(loss)(flattening.unflatten(params))
            return value.astype(jnp.result_type(float)), flattening.flatten(grads)

        def iterate(now: Iteration) -> Iteration:
            at_start = now.num_gradients == 0
            trial_step = now.search.step
            trial = tree.add_scaled(now.params, trial_step, now.direction)
            value, grads = evaluate(trial)
            search, ended, take_safe = after_trial(now.search, trial_step, value, _slope(grads, now.direction), grads)

            ended = ended | at_start
            # The members of a group step together: one whose search is over repeats its last trial meanwhile.
            step = ~any_of(stop.group, ~ended)
            taken = step & ~at_start
            safe = tree.add_scaled(now.params, search.safe_step, now.direction), search.safe_grads, search.safe_value
            params, grads, value = tree.where(take_safe, safe, (trial, grads, value))

            moved = tree.subtract(params, now.params)
            pairs = now.pairs.push(moved, tree.subtract(grads, now.grads), write=~at_start, keep=taken)
            last = Measured.of(((value, ()), grads))
            num_steps = now.num_steps + taken.astype(jnp.int32)
            # A search that cannot move any more has come to the floor of the dtype.
            unfinished = (last.residual > tol) & (num_steps < max_steps) & (at_start | (tree.max_abs(moved) > 0))
            continued = any_of(stop.group, unfinished)

            def descend(_: Params) -> Params:
                return tree.scale(-1, pairs.precondition(grads, last.residual))

            direction = only_if(step & continued, descend, now.direction)
            fresh = LineSearch.begin(value, _slope(grads, direction), grads)
            params, grads = tree.where(step, (params, grads), (now.params, now.grads))
            return Iteration(
                params,
                grads,
                direction,
                tree.where(step, fresh, tree.where(ended, now.search, search)),
                pairs,
                tree.where(at_start, last, now.first),
                last,
                num_steps,
                now.num_gradients + (step | ~ended).astype(jnp.int32),
                ~step | continued,
            )

        start = flattening.flatten(init)
        zero, nothing = tree.zeros_like(start), Measured.nothing()
        # Nothing is known of the start: its evaluation is a trial along the zero direction.
        search = LineSearch.begin(nothing.loss, nothing.loss, zero)
        pairs = memory if jax.tree.leaves(memory) else self._no_pairs(start)
        count = jnp.int32(0)
        begin = Iteration(start, zero, zero, search, pairs, nothing, nothing, count, count, jnp.asarray(True))
        end = while_loop(lambda now: now.running, iterate, begin)

        params = flattening.unflatten(end.params)
        unfinished = flag(~(end.last.residual <= tol), Status.FREE_NOT_CONVERGED)
        status = worst(unfinished, final_status(*end.first, params, *end.last))
        residual = end.last.residual.astype(tree.float_dtype(init))
        return Solution(params, residual, end.num_gradients, end.num_steps, status, end.pairs)

    def init_memory(self, params: Params) -> PyTree:
        """Curvature memory without pairs."""
        return self._no_pairs(Flattening.of(params).flatten(params))

    def _no_pairs(self, params: Params) -> Pairs:
        return Pairs.none(params, self.memory_size)


def _slope(grads: Params, direction: Params) -> jax.Array:
    return tree.vdot(grads, direction).astype(jnp.result_type(float))
