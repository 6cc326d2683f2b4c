"""The two loops of `OptaxDescent`: a fixed number of steps, and steps to a tolerance.

Each evaluates the loss at the top of its body and nowhere else. The last iteration only evaluates, so that neither the
start nor the end needs a copy of the loss of its own in the program.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cond, only_if, scan, usual_promotion, while_loop
from contrastive_meta._problem import ModelState, Params
from contrastive_meta._pytree import PyTree
from contrastive_meta._solvers.base import InnerLoss, MovingLosses

# A value with the model state that its forward pass leaves behind, and the gradient.
Evaluated = tuple[tuple[jax.Array, ModelState], Params]
# From parameters and gradient to what vanishes where the optimiser rests; None for the gradient itself.
ResidualOf = Callable[[Params, Params], Params]


class Position(NamedTuple):
    """Where a descent is.

    Attributes:
      params: the iterate.
      opt_state: the optimiser's state.
      model_state: the model's, which the steps taken have moved.
    """

    params: Params
    opt_state: PyTree
    model_state: ModelState


class Measured(NamedTuple):
    """What a solve reports of the loss at a point.

    Attributes:
      loss: its real part.
      residual: gradient norm; where the optimiser has walls, the norm of what it does not hold.
    """

    loss: jax.Array
    residual: jax.Array

    @classmethod
    def nothing(cls) -> "Measured":
        """Infinite, in the widest floating dtype, which holds the loss whatever its own dtype is."""
        infinite = jnp.asarray(jnp.inf, jnp.result_type(float))
        return cls(infinite, infinite)

    @classmethod
    def of(cls, evaluated: Evaluated, params: Params = (), residual_of: ResidualOf | None = None) -> "Measured":
        """Loss and residual; no derivative passes through what only measures."""
        (value, _), grads = evaluated
        loss, widest = jnp.real(jax.lax.stop_gradient(value)), jnp.result_type(float)
        grads = grads if residual_of is None else residual_of(*jax.lax.stop_gradient((params, grads)))
        return cls(loss.astype(widest), tree.norm(grads).astype(widest))


class Descent(NamedTuple):
    """A descent under way or at its end.

    Attributes:
      at: where it is.
      first: what was measured at the start.
      last: what was measured at the latest evaluation.
      num_steps: steps taken.
      num_gradients: gradients evaluated, line searches included.
      running: whether another iteration is wanted.
    """

    at: Position
    first: Measured
    last: Measured
    num_steps: jax.Array
    num_gradients: jax.Array
    running: jax.Array


def one_step(
    optimizer: optax.GradientTransformation,
    loss: InnerLoss,
    value: jax.Array,
    grads: Params,
    params: Params,
    state: Any,
) -> tuple[Params, PyTree]:
    """One optimiser step; the loss's value and function are offered to line searches and ignored by the rest."""
    extended = optax.with_extra_args_support(optimizer)
    with usual_promotion():
        updates, state = extended.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state


def steps_for_backprop(
    optimizer: optax.GradientTransformation,
    losses: MovingLosses,
    start: Position,
    *,
    first_step: int,
    num_steps: int,
    unroll: int | bool,
    checkpoint: bool = False,
) -> Position:
    """`num_steps` steps by `scan`, to be differentiated in reverse; nothing is measured.

    A loop keeps the iterates and what the optimiser computes, and takes the gradients again on the way back: what is
    inside a gradient is mostly larger than `params`, and no faster to read than to compute. Without a loop XLA would
    undo it, and compile for longer. With `checkpoint` the steps are cut into segments of about sqrt(num_steps), of
    which only the starts are kept. `unroll` then unrolls the steps of a segment.
    """
    evaluate = tree.value_and_grad(losses.of_step, has_aux=True)
    if unroll is not True and num_steps > unroll:
        # `prevent_cse` is for programs without a loop, and stands in the way of fusions.
        evaluate = jax.checkpoint(evaluate, prevent_cse=False)

    def step(carry: tuple[jax.Array, Position], _: None) -> tuple[tuple[jax.Array, Position], None]:
        index, at = carry
        evaluated = evaluate(at.params, at.model_state, index)
        return (index + 1, _next_position(optimizer, losses, at, index, evaluated)), None

    def steps(carry: tuple[jax.Array, Position], number: int) -> tuple[jax.Array, Position]:
        # A scan without iterations would still have a copy of the loss in the program.
        # The index travels in the carry: a list of indices would be the one thing that grows with the length.
        return scan(step, carry, None, length=number, unroll=unroll)[0] if number else carry

    carry, rest = (jnp.int32(first_step), start), num_steps
    if checkpoint:
        length = max(1, math.isqrt(num_steps))
        segments, rest = divmod(num_steps, length)
        segment = jax.checkpoint(lambda carry, _: (steps(carry, length), None))
        carry, _ = scan(segment, carry, None, length=segments)
    return steps(carry, rest)[1]


def fixed_steps(
    optimizer: optax.GradientTransformation,
    losses: MovingLosses,
    start: Position,
    *,
    num_steps: int,
    unroll: int | bool,
    residual_of: ResidualOf | None = None,
) -> Descent:
    """`num_steps` steps by `scan`, measured at both ends.

    The end is evaluated by one more iteration of the scan. With minibatches the steps descend another loss than the
    one that is measured at the end, which is then evaluated after the scan.
    """
    evaluate = tree.value_and_grad(losses.of_step, has_aux=True)
    ends_in_scan = losses.minibatch_loss is None

    def iterate(carry: Any, _: None) -> tuple[Any, None]:
        index, at, first, last, searched = carry
        evaluated = evaluate(at.params, at.model_state, index)
        # Only the ends pay for the norm.
        at_an_end = (index == 0) | (index == num_steps)
        last = cond(at_an_end, lambda: Measured.of(evaluated, at.params, residual_of), lambda: last)
        first = tree.where(index == 0, last, first)

        def step() -> tuple[Position, jax.Array]:
            to = _next_position(optimizer, losses, at, index, evaluated)
            return to, searched + line_search_evaluations(to.opt_state)

        at, searched = cond(index < num_steps, step, lambda: (at, searched)) if ends_in_scan else step()
        return (index + 1, at, first, last, searched), None

    carry = (jnp.int32(0), start, Measured.nothing(), Measured.nothing(), jnp.int32(0))
    num_iterations = num_steps + 1 if ends_in_scan else num_steps
    _, at, first, last, searched = scan(iterate, carry, None, length=num_iterations, unroll=unroll)[0]
    if not ends_in_scan:
        # It only measures, and must not enter a derivative of the run.
        end = jax.lax.stop_gradient(at)
        evaluated = tree.value_and_grad(losses.loss, has_aux=True)(end.params, end.model_state)
        last = Measured.of(evaluated, end.params, residual_of)
    num_gradients = jnp.maximum(num_steps, searched) + 1
    return Descent(at, first, last, jnp.int32(num_steps), num_gradients, jnp.asarray(False))


def steps_to_tolerance(
    optimizer: optax.GradientTransformation,
    losses: MovingLosses,
    start: Position,
    *,
    tol: Any,
    max_steps: Any,
    group: str | None,
    residual_of: ResidualOf | None = None,
) -> Descent:
    """Steps until the gradient norm is at most `tol`, or the budget is spent, by `while_loop`.

    Args:
      optimizer: any optax transformation.
      losses: of which the whole loss is descended.
      start: where to begin.
      tol: tolerance on the gradient norm.
      max_steps: budget.
      group: name of the mapped axis whose members go on until all are done.
      residual_of: what is measured in the place of the gradient.
    """
    evaluate = tree.value_and_grad(losses.loss, has_aux=True)

    def iterate(now: Descent) -> Descent:
        at = now.at
        evaluated = evaluate(at.params, at.model_state)
        last = Measured.of(evaluated, at.params, residual_of)
        running = any_of(group, (last.residual > tol) & (now.num_steps < max_steps))

        def step(_: Any) -> tuple[Position, jax.Array]:
            to = _next_position(optimizer, losses, at, now.num_steps, evaluated)
            return to, jnp.maximum(1, line_search_evaluations(to.opt_state))

        # A line search evaluates the loss: the last iteration must not begin one.
        to, spent = only_if(running, step, (at, jnp.int32(0)))
        first = tree.where(now.num_steps == 0, last, now.first)
        return Descent(to, first, last, now.num_steps + running.astype(jnp.int32), now.num_gradients + spent, running)

    begin = Descent(start, Measured.nothing(), Measured.nothing(), jnp.int32(0), jnp.int32(1), jnp.asarray(True))
    return while_loop(lambda now: now.running, iterate, begin)


def any_of(group: str | None, condition: jax.Array) -> jax.Array:
    """Whether the condition holds for any member of the group; without a group, the condition itself."""
    return condition if group is None else jax.lax.pmax(condition.astype(jnp.int32), group) > 0


def line_search_evaluations(opt_state: PyTree) -> jax.Array:
    """Evaluations that line searches inside an optax state made in their last step; 0 without one."""
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "num_linesearch_steps")
    return jnp.asarray(sum(count for _, count in found), jnp.int32)


def _next_position(
    optimizer: optax.GradientTransformation, losses: MovingLosses, at: Position, index: jax.Array, evaluated: Evaluated
) -> Position:
    (value, moved), grads = evaluated

    def loss(params: Params) -> jax.Array:
        return losses.of_step(params, at.model_state, index)[0]

    return Position(*one_step(optimizer, loss, value, grads, at.params, at.opt_state), moved)
