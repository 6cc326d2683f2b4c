"""Descent by any optax transformation, for a fixed number of steps or to a tolerance."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._control import usual_promotion
from contrastive_meta._dependence import used_leaves
from contrastive_meta._holomorphic import require_holomorphic
from contrastive_meta._problem import MetaParams, ModelState, Params
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers._descend import (
    Descent,
    Position,
    ResidualOf,
    fixed_steps,
    one_step,
    steps_for_backprop,
    steps_to_tolerance,
)
from contrastive_meta._solvers._probing import held_by
from contrastive_meta._solvers.base import (
    Held,
    InnerLoss,
    InnerSolver,
    MinibatchLoss,
    MovingLosses,
    Solution,
    Stop,
    UnrolledLosses,
    final_status,
)
from contrastive_meta._solvers.penalty import BoundPenalty, Penalty


@strategy
class OptaxDescent(InnerSolver):
    """Any optax optimiser as the learner.

    Give either `num_steps` (a `scan`: reverse-differentiable, minibatches allowed) or `tol` (a `while_loop` that
    ends when the gradient norm is at most `tol`, or after `max_steps`).

    `unroll=True` is for few steps of a convolutional network on a CPU. There XLA compiles the gradients of convolutions
    inside loops to slow code (docs/convolutions.md). Five steps of a CNN with four blocks took 0.96 s in a loop and
    0.16 s unrolled, and 4.4 s and 5.3 s to compile. Without convolutions a loop is about as fast, and compiles in the
    time of one step.

    Args:
      optimizer: an optax transformation; or a function `meta_params -> transformation`, for settings that
        `BackpropThroughLearning` meta-learns.
      num_steps: number of steps.
      tol: absolute tolerance on the gradient norm, in units of the loss over those of `params`. Nudged phases
        replace it by a tolerance relative to their nudge.
      max_steps: budget of a run to a tolerance.
      carry_state: hand the optimiser's state (momentum, moments, step count) from the free phase to the nudged
        ones and to the next call. Off by default: a finished schedule would stop them dead.
      penalty: where the optimiser rests, if that is not where the gradient vanishes and not found by its updates:
        AdamW and Lion with weight decay c end at the minimum within `cm.prox.box(-1 / c, 1 / c)`.
      unroll: how many of the `num_steps` steps one iteration of the loop takes, as in `jax.lax.scan`; True for
        all of them.

    Raises:
      TypeError: `penalty` is no `Penalty`.
      ValueError: neither or both of `num_steps` and `tol`; or `tol` with minibatches, whose gradient norm does
        not go to zero; or `unroll` that is no positive number of steps, or goes with `tol`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> solver = cm.OptaxDescent(optax.sgd(0.5), num_steps=40)
      >>> solution = solver.solve(lambda w: jnp.sum((w - 3.0) ** 2), jnp.zeros(2))
      >>> [round(float(w), 3) for w in solution.params]
      [3.0, 3.0]
    """

    optimizer: optax.GradientTransformation | Callable[[MetaParams], optax.GradientTransformation] = static()
    num_steps: int | None = static(default=None)
    tol: float | None = None
    max_steps: int | jax.Array = 10_000
    carry_state: bool = static(default=False)
    unroll: int | bool = static(default=1)
    penalty: Penalty | None = None
    meta_params: MetaParams = None

    def __post_init__(self) -> None:
        """Check that there is one stopping rule, and that its loop can be unrolled as asked."""
        if (self.num_steps is None) == (self.tol is None):
            raise ValueError(
                "OptaxDescent needs one stopping rule: `num_steps=` for a fixed number of steps, "
                f"or `tol=` for a gradient norm. Got num_steps={self.num_steps}, tol={self.tol}."
            )
        given: Any = self.penalty
        if given is not None and not isinstance(given, Penalty):
            raise TypeError(
                f"OptaxDescent's `penalty` must be one such as `cm.prox.box(-1.0, 1.0)`; got a {type(given).__name__}."
            )
        if not isinstance(self.unroll, int) or (self.unroll is not False and self.unroll < 1):
            raise ValueError(
                "OptaxDescent's `unroll` is how many steps one iteration of the loop takes: a positive integer, or "
                f"True for all of them. Got {self.unroll!r}."
            )
        if self.num_steps is None and (self.unroll is True or self.unroll > 1):
            raise ValueError(
                "OptaxDescent can unroll a fixed number of steps alone, not a run to a tolerance, whose length is not "
                f"known when it is compiled. Got unroll={self.unroll}: use `num_steps=`, or leave `unroll` out."
            )

    def bind(self, meta_params: MetaParams) -> "OptaxDescent":
        """The solver with its optimiser's settings read from `meta_params`, where they are learned."""
        solver = self if self.penalty is None else dataclasses.replace(self, meta_params=meta_params)
        if isinstance(self.optimizer, optax.GradientTransformation):
            return solver
        return dataclasses.replace(solver, optimizer=self.optimizer(meta_params))

    @property
    def walls(self) -> BoundPenalty | None:
        """As the user gave them."""
        return BoundPenalty.of(self.penalty, self.meta_params)

    @property
    def step_budget(self) -> int | jax.Array:
        """As the user set it."""
        return self.max_steps

    @property
    def descends_loss(self) -> bool:
        """As far as its updates follow the gradient: see `rests_at`."""
        return True

    def held_at(self, params: Params, gradient: Params) -> Held | None:
        """By probing updates; None for optimisers whose updates do not depend on `params`, which have no walls."""
        update, searches = self._first_update(params), []

        def zero_loss(at: Params) -> jax.Array:
            searches.append(at)
            return jnp.zeros((), tree.float_dtype(params))

        # Line searches ask for the loss: they follow its gradient, and many of them in a program take long to compile.
        if not any(used_leaves(lambda at: update(gradient, at, zero_loss), params)) or searches:
            return None
        return held_by(update, params, gradient)

    def _residual_of(self, like: Params) -> ResidualOf | None:
        """What vanishes where the optimiser rests; None where that is the gradient."""
        walls = self.walls
        if walls is not None:
            # A proximal step of length 1, so that it is the gradient where there is no wall.
            return lambda at, gradient: tree.subtract(at, walls.prox(tree.subtract(at, gradient), 1.0))
        if self.held_at(like, like) is None:
            return None

        def residual(params: Params, gradient: Params) -> Params:
            held = self.held_at(params, gradient)
            assert held is not None
            return tree.where(held.known, held.residual(params, gradient), gradient)

        return residual

    def _first_update(self, like: Params) -> Callable[..., Params]:
        """`(gradient, params, loss) -> updates` of an optimiser that begins at `params`; the loss is 0 by default."""
        optimizer = optax.with_extra_args_support(self._bound_optimizer())
        zero = jnp.zeros((), tree.float_dtype(like))

        def update(grads: Params, params: Params, loss: InnerLoss = lambda at: zero) -> Params:
            extra = {"value": zero, "grad": grads, "value_fn": loss}
            with usual_promotion():
                updates: Params = optimizer.update(grads, optimizer.init(params), params, **extra)[0]
            return updates

        return update

    def rests_at(self, params: Params, gradient: Params) -> jax.Array:
        """One update without a gradient must do nothing, and one with it must move every leaf or none."""
        first_update = self._first_update(params)

        def update(grads: Params) -> Params:
            return first_update(grads, params)

        # A projection's update is a rounding error where there is nothing to project; a small step may be lost in
        # rounding, but is one.
        with usual_promotion():
            stayed = optax.apply_updates(params, update(tree.zeros_like(params)))
        stays = tree.max_abs(tree.subtract(stayed, params)) == 0
        moves = [jnp.any(x != 0) for x in jax.tree.leaves(update(gradient))]
        wanted = [jnp.any(x != 0) for x in jax.tree.leaves(gradient)]
        follows = jnp.stack([moved | ~due for moved, due in zip(moves, wanted, strict=True)])
        # A schedule that warms up from 0 moves nothing at first.
        return stays & (jnp.all(follows) | ~jnp.any(jnp.stack(moves)))

    def solve(
        self,
        loss: InnerLoss,
        init: Params,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
        stop: Stop = Stop(),
    ) -> Solution:
        """See `InnerSolver.solve`. With `num_steps` the `stop` argument changes nothing."""
        return self._solve(MovingLosses.without_state(loss, minibatch_loss), init, (), memory, stop)

    def solve_with_state(
        self, losses: MovingLosses, init: Params, model_state: ModelState, *, memory: PyTree = ()
    ) -> Solution:
        """See `InnerSolver.solve_with_state`."""
        return self._solve(losses, init, model_state, memory, Stop())

    def _solve(
        self, losses: MovingLosses, init: Params, model_state: ModelState, memory: PyTree, stop: Stop
    ) -> Solution:
        optimizer = self._bound_optimizer()
        opt_state = memory if jax.tree.leaves(memory) else optimizer.init(init)
        start = Position(init, opt_state, model_state)
        if self.num_steps is None:
            tol = jnp.asarray(self.tol if stop.tol is None else stop.tol, jnp.result_type(float))
            end = self._run_to_tolerance(optimizer, losses, start, tol, stop)
            unfinished = flag(~(end.last.residual <= tol), Status.FREE_NOT_CONVERGED)
        else:
            end = fixed_steps(
                optimizer,
                losses,
                start,
                num_steps=self.num_steps,
                unroll=self.unroll,
                residual_of=self._residual_of(init),
            )
            unfinished = flag(False, Status.FREE_NOT_CONVERGED)
        health = final_status(*end.first, end.at.params, *end.last)
        return Solution(
            params=end.at.params,
            residual=end.last.residual.astype(tree.float_dtype(init)),
            num_gradients=end.num_gradients,
            num_steps=end.num_steps,
            status=worst(unfinished, health),
            memory=end.at.opt_state if self.carry_state else (),
            model_state=end.at.model_state,
        )

    def init_memory(self, params: Params) -> PyTree:
        """A fresh optimiser state where it is carried, else ()."""
        return self._bound_optimizer().init(params) if self.carry_state else ()

    def one_update(self, params: Params) -> PyTree:
        """The step that the optimiser takes from `params`, on a loss of its own."""
        optimizer = self._bound_optimizer()

        def loss(at: Params) -> jax.Array:
            return tree.sum_of_leaves(jax.tree.map(jnp.sum, at))

        value, grads = tree.value_and_grad(loss)(params)
        return one_step(optimizer, loss, value, grads, params, optimizer.init(params))[0]

    def solve_differentiably(
        self, losses: UnrolledLosses, init: Params, *, truncate: int | None, checkpoint: bool
    ) -> Params:
        """See `InnerSolver.solve_differentiably`."""
        if self.num_steps is None:
            return super().solve_differentiably(losses, init, truncate=truncate, checkpoint=checkpoint)
        return self.solve_differentiably_with_state(
            MovingLosses.without_state(losses.loss, losses.minibatch_loss),
            MovingLosses.without_state(losses.loss, losses.detached),
            init,
            (),
            truncate=truncate,
            checkpoint=checkpoint,
        )[0]

    def solve_differentiably_with_state(
        self,
        losses: MovingLosses,
        detached: MovingLosses,
        init: Params,
        model_state: ModelState,
        *,
        truncate: int | None,
        checkpoint: bool,
    ) -> tuple[Params, ModelState]:
        """See `InnerSolver.solve_differentiably_with_state`."""
        if self.num_steps is None:
            raise self._cannot_unroll()
        optimizer = self._bound_optimizer()
        kept = self.num_steps if truncate is None else min(truncate, self.num_steps)
        at = Position(init, optimizer.init(init), model_state)
        skipped = self.num_steps - kept
        if skipped:
            at = steps_for_backprop(
                optimizer, detached, jax.lax.stop_gradient(at), first_step=0, num_steps=skipped, unroll=self.unroll
            )
        end = steps_for_backprop(
            optimizer,
            losses,
            jax.lax.stop_gradient(at) if skipped else at,
            first_step=skipped,
            num_steps=kept,
            unroll=self.unroll,
            checkpoint=checkpoint,
        )
        return end.params, end.model_state

    def check_holomorphic(self, params: Params) -> None:
        """Trace one update on complex parameters and look for operations that are not holomorphic."""
        optimizer = self._bound_optimizer()
        require_holomorphic(
            lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0],
            params,
            params,
            what="the update of OptaxDescent's optimizer",
            remedy="Complex phases need an optimiser that is linear in the gradient, such as "
            "`optax.sgd(learning_rate, momentum=..., nesterov=True)`: pass it in `nudged_solver=`.",
        )

    def _bound_optimizer(self) -> optax.GradientTransformation:
        if isinstance(self.optimizer, optax.GradientTransformation):
            return self.optimizer
        raise TypeError(
            "This OptaxDescent takes its optimiser's settings from the meta-parameters: "
            "call `solver.bind(meta_params)` before `solve`, or pass it to an estimator."
        )

    def _run_to_tolerance(
        self, optimizer: optax.GradientTransformation, losses: MovingLosses, start: Position, tol: Any, stop: Stop
    ) -> Descent:
        if losses.minibatch_loss is not None:
            raise ValueError(
                "OptaxDescent(tol=...) was given a problem with minibatches (`sample`): their gradient norm does not "
                "go to zero, so it cannot say when to stop. Use `OptaxDescent(optimizer, num_steps=...)`."
            )
        max_steps = self.max_steps if stop.max_steps is None else stop.max_steps
        return steps_to_tolerance(
            optimizer, losses, start, tol=tol, max_steps=max_steps, group=stop.group,
            residual_of=self._residual_of(start.params),
        )  # fmt: skip
