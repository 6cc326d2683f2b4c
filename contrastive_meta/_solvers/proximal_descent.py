"""Accelerated proximal gradient descent: learners with kinks, bounds and constraints."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, while_loop
from contrastive_meta._problem import MetaParams, Params
from contrastive_meta._pytree import PyTree, strategy
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers._descend import any_of
from contrastive_meta._solvers.base import InnerLoss, InnerSolver, MinibatchLoss, Solution, Stop, final_status
from contrastive_meta._solvers.penalty import BoundPenalty, Penalty

# A loss is off by about this many roundings of its own: smaller differences of values tell nothing of a step.
_ROUNDING = 1e2
# Most halvings of a step: from the largest float32 to the smallest.
_MOST_HALVINGS = 256


@strategy
class ProximalDescent(InnerSolver):
    """Proximal gradient descent with acceleration, restarts and backtracking, for an inner objective loss + penalty.

    The inner loss of the problem is the smooth part alone; the part with kinks, or the constraint, is `penalty`. Free
    and nudged phases take the same proximal steps, so that no nudge leads through a wall. What the phases measure is
    the derivative of the whole inner objective: meta-parameters may enter the penalty, its strength for instance.

    A run ends where its own steps stay: `solution.residual` is the norm of (w - prox(w - s grad)) / s for steps of
    length s, which is the gradient norm where there is no wall. Steps get shorter where the loss rises more than
    predicted (Beck & Teboulle's backtracking), or where two successive gradients show more curvature than 1 / s, which
    rounding hides least. They never get longer. It minimises the whole loss: minibatches are not followed.

    Args:
      penalty: the part that is not smooth, such as `cm.prox.l1(0.1)` or `cm.prox.of(my_function)`.
      tol: absolute tolerance on that residual.
      max_steps: budget.
      meta_params: set by `bind`.

    Raises:
      TypeError: `penalty` is not a `Penalty`.

    Reference:
      Beck & Teboulle (2009), A fast iterative shrinkage-thresholding algorithm (4.1) to (4.3); O'Donoghue & Candes
      (2015), Adaptive restart for accelerated gradient schemes, section 3.2.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> solver = cm.ProximalDescent(cm.prox.l1(1.0))
      >>> solution = solver.solve(lambda w: 0.5 * jnp.sum((w - jnp.array([3.0, 0.5])) ** 2), jnp.zeros(2))
      >>> [round(float(w), 3) for w in solution.params]
      [2.0, 0.0]
    """

    penalty: Penalty
    tol: float | jax.Array = 1e-6
    max_steps: int | jax.Array = 10_000
    meta_params: MetaParams = None

    def __post_init__(self) -> None:
        """Check the penalty."""
        given: Any = self.penalty
        if not isinstance(given, Penalty):
            raise TypeError(
                f"ProximalDescent takes a penalty such as `cm.prox.l1(0.1)`; got a {type(given).__name__}. "
                "Wrap a proximal step `(params, meta_params, step) -> params`: `cm.prox.of(function, value=...)`."
            )

    def bind(self, meta_params: MetaParams) -> "ProximalDescent":
        """The solver with its penalty at these meta-parameters."""
        return dataclasses.replace(self, meta_params=meta_params)

    @property
    def walls(self) -> BoundPenalty:
        """As the user gave it, at the meta-parameters of `bind`."""
        bound = BoundPenalty.of(self.penalty, self.meta_params)
        assert bound is not None
        return bound

    @property
    def descends_loss(self) -> bool:
        """To the minimum of loss and penalty."""
        return True

    @property
    def step_budget(self) -> int | jax.Array:
        """As the user set it."""
        return self.max_steps

    def init_memory(self, params: Params) -> PyTree:
        """No length of a step is known yet."""
        return jnp.zeros((), tree.float_dtype(params))

    def solve(
        self,
        loss: InnerLoss,
        init: Params,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
        stop: Stop = Stop(),
    ) -> Solution:
        """See `InnerSolver.solve`; `memory` is the length of the last step."""
        if tree.is_complex(init):
            self.check_holomorphic(init)
        dtype = tree.float_dtype(init)
        tol = jnp.asarray(self.tol if stop.tol is None else stop.tol, dtype)
        max_steps = self.max_steps if stop.max_steps is None else stop.max_steps
        prox, evaluate = self.walls.prox, tree.value_and_grad(loss)
        known = jnp.asarray(memory, dtype) if jax.tree.leaves(memory) else jnp.zeros((), dtype)
        init = prox(init, jnp.asarray(1.0, dtype))

        def iterate(now: _Descent) -> _Descent:
            value, gradient = evaluate(now.at)
            value = jnp.asarray(value, now.value.dtype)
            moved, turned = tree.subtract(now.at, now.last_at), tree.subtract(gradient, now.last_gradient)
            way, change, size = tree.norms(moved, turned, gradient).astype(dtype)
            told = change > _ROUNDING * jnp.finfo(dtype).eps * size
            secant = way / tree.or_one(change)
            first = now.num_steps == 0
            # Without a gradient to compare with, the first step goes as far as the parameters are long.
            alone = jnp.maximum(tree.norm(now.at).astype(dtype), 1) / tree.or_one(size)
            length = jnp.where(first, jnp.where(known > 0, known, alone), now.length)
            length = jnp.where(~first & told, jnp.minimum(length, secant), length)

            def beyond(length: jax.Array) -> tuple[Params, jax.Array]:
                to = prox(tree.add_scaled(now.at, -length, gradient), length)
                step = tree.subtract(to, now.at)
                predicted = value + tree.vdot(gradient, step) + tree.vdot(step, step) / (2 * length)
                slack = _ROUNDING * jnp.finfo(value.dtype).eps * jnp.abs(value)
                return to, ~(loss(to) <= predicted + slack)

            def halve(carry: Any) -> Any:
                length, _, _, number = carry
                to, too_far = beyond(length / 2)
                return cast_like((length / 2, to, too_far, number + 1), carry)

            # One call site for the loss: the first length is tried as half of its double.
            begin = (2 * length, now.params, jnp.asarray(True), jnp.int32(0))
            length, to, _, tried = while_loop(lambda c: c[2] & (c[3] < _MOST_HALVINGS), halve, begin)

            residual = (tree.norm(tree.subtract(now.at, to)) / length).astype(dtype)
            step = tree.subtract(to, now.params)
            restart = tree.vdot(tree.subtract(now.at, to), step) > 0
            momentum = jnp.where(restart, 1.0, now.momentum).astype(dtype)
            following = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
            ahead = tree.add_scaled(to, (momentum - 1) / following, step)
            running = any_of(stop.group, (residual > tol) & (now.num_steps + 1 < max_steps) & tree.all_finite(to))
            return cast_like(
                _Descent(
                    params=to,
                    at=ahead,
                    last_at=now.at,
                    last_gradient=gradient,
                    momentum=following,
                    length=length,
                    value=value,
                    residual=residual,
                    first=jnp.where(first, jnp.stack([value.astype(dtype), residual]), now.first),
                    num_steps=now.num_steps + 1,
                    num_gradients=now.num_gradients + 1 + tried // 2,
                    running=running,
                ),
                now,
            )

        zero, value_dtype = jnp.zeros((), dtype), tree.float_dtype(jax.eval_shape(loss, init))
        begin = _Descent(
            init, init, init, tree.zeros_like(init), zero + 1, zero, jnp.zeros((), value_dtype), zero + jnp.inf,
            jnp.zeros((2,), dtype), jnp.int32(0), jnp.int32(0), jnp.asarray(True),
        )  # fmt: skip
        end = while_loop(lambda now: now.running, iterate, begin)
        unfinished = flag(~(end.residual <= tol), Status.FREE_NOT_CONVERGED)
        health = final_status(end.first[0], end.first[1], end.params, end.value, end.residual)
        return Solution(
            end.params, end.residual, end.num_gradients, end.num_steps, worst(unfinished, health), end.length
        )


class _Descent(NamedTuple):
    """A descent under way.

    Attributes:
      params: the last proximal step's end.
      at: where the next step begins, ahead of that.
      last_at: where the last step began.
      last_gradient: gradient there.
      momentum: t of Beck & Teboulle's (4.2).
      length: of the last step.
      value: loss where the last step began.
      residual: of the last step.
      first: loss and residual at the start.
      num_steps: steps taken.
      num_gradients: evaluations, those of values counted as half a gradient.
      running: whether there is another.
    """

    params: Params
    at: Params
    last_at: Params
    last_gradient: Params
    momentum: jax.Array
    length: jax.Array
    value: jax.Array
    residual: jax.Array
    first: jax.Array
    num_steps: jax.Array
    num_gradients: jax.Array
    running: jax.Array
