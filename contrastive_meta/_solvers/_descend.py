"""The two loops that every optax-driven solver runs: a fixed number of steps, and steps to a tolerance."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import ModelState, Params
from contrastive_meta._pytree import PyTree
from contrastive_meta._solvers.base import InnerLoss, MovingLosses, Stop

# A value with the model state that its forward pass leaves behind, and the gradient.
Evaluated = tuple[tuple[jax.Array, ModelState], Params]
Evaluate = Callable[[Params, PyTree, ModelState], Evaluated]


class Descent(NamedTuple):
    """A descent under way: where it is, what the loss says there, and where it came from.

    Attributes:
      params: the iterate.
      opt_state: the optimiser's state.
      model_state: the model's, which the steps taken have moved.
      loss: loss at `params` and `model_state`.
      grads: gradient there.
      moved: what the forward pass there made of the model state: that of the next step, if there is one.
      first_loss: loss at the start.
      first_residual: gradient norm at the start.
      num_steps: steps taken.
      num_gradients: gradients evaluated, line searches included.
      running: whether another step is wanted.
    """

    params: Params
    opt_state: PyTree
    model_state: ModelState
    loss: jax.Array
    grads: Params
    moved: ModelState
    first_loss: jax.Array
    first_residual: jax.Array
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
    updates, state = extended.update(grads, state, params, value=value, grad=grads, value_fn=loss)
    return optax.apply_updates(params, updates), state


def fixed_steps(
    optimizer: optax.GradientTransformation,
    losses: MovingLosses,
    params: Params,
    opt_state: PyTree,
    model_state: ModelState,
    *,
    first_step: int,
    num_steps: int,
    checkpoint: bool = False,
) -> tuple[Params, PyTree, ModelState, jax.Array, jax.Array, jax.Array]:
    """`num_steps` steps by `scan`; differentiable.

    Returns:
      params, optimiser state, model state, loss and gradient norm at the first step, and extra line-search evaluations.
    """

    def step(carry: Any, _: None) -> tuple[Any, None]:
        index, params, state, held, first_loss, first_residual, searched = carry
        (value, moved), grads = tree.value_and_grad(losses.of_step, has_aux=True)(params, held, index)
        at_first = index == first_step
        first_loss = jnp.where(at_first, jnp.real(jax.lax.stop_gradient(value)), first_loss)
        # Only the first step pays for the norm.
        first_residual = jax.lax.cond(
            at_first, lambda: tree.norm(grads).astype(first_residual.dtype), lambda: first_residual
        )
        params, state = one_step(optimizer, lambda p: losses.of_step(p, held, index)[0], value, grads, params, state)
        searched = searched + line_search_evaluations(state)
        return (index + 1, params, state, moved, first_loss, first_residual, searched), None

    def steps(carry: Any, number: int) -> Any:
        # The index travels in the carry: a list of indices would be the one thing that grows with the length.
        return jax.lax.scan(step, carry, None, length=number)[0]

    value, _ = jax.eval_shape(losses.of_step, params, model_state, jnp.int32(0))
    infinite = jnp.asarray(jnp.inf, tree.float_dtype(value))
    carry = (jnp.int32(first_step), params, opt_state, model_state, infinite, infinite, jnp.int32(0))
    rest = num_steps
    if checkpoint:
        length = max(1, math.isqrt(num_steps))
        segments, rest = divmod(num_steps, length)
        segment = jax.checkpoint(lambda carry, _: (steps(carry, length), None))
        carry, _ = jax.lax.scan(segment, carry, None, length=segments)
    _, params, opt_state, model_state, first_loss, first_residual, searched = steps(carry, rest)
    return params, opt_state, model_state, first_loss, first_residual, searched


def steps_to_tolerance(
    optimizer: optax.GradientTransformation,
    losses: MovingLosses,
    params: Params,
    opt_state: PyTree,
    model_state: ModelState,
    *,
    tol: jax.Array,
    max_steps: Any,
    stop: Stop,
    evaluate: Evaluate,
    stop_when_stuck: bool,
    start: Evaluated,
) -> Descent:
    """Steps until the gradient norm is at most `tol`, or the budget is spent, by `while_loop`.

    Args:
      optimizer: any optax transformation.
      losses: of which the whole loss is descended.
      params: the start.
      opt_state: the optimiser's state there.
      model_state: the model's there.
      tol: tolerance on the gradient norm.
      max_steps: budget.
      stop: overrides; with `stop.group` all members of the mapped axis go on until all are done.
      evaluate: `(params, opt_state, model_state)` to value, moved model state and gradient after a step; line searches
        know value and gradient already.
      stop_when_stuck: end when a step moved nothing (a failed line search), instead of spending the budget.
      start: what `evaluate` gives at `params`.

    Returns:
      The descent at its end.
    """
    tol = tol if stop.tol is None else stop.tol
    max_steps = max_steps if stop.max_steps is None else stop.max_steps

    def wanted(residual: jax.Array, num_steps: jax.Array, moved: Any) -> Any:
        unfinished = (residual > tol) & (num_steps < max_steps) & moved
        if stop.group is None:
            return unfinished
        return jax.lax.pmax(unfinished.astype(jnp.int32), stop.group) > 0

    def body(at: Descent) -> Descent:
        loss = losses.held(at.model_state)
        params, opt_state = one_step(optimizer, loss, at.loss, at.grads, at.params, at.opt_state)
        (value, moved_state), grads = evaluate(params, opt_state, at.moved)
        moved = tree.max_abs(tree.subtract(params, at.params)) > 0 if stop_when_stuck else True
        return Descent(
            params,
            opt_state,
            at.moved,
            value,
            grads,
            moved_state,
            at.first_loss,
            at.first_residual,
            at.num_steps + 1,
            at.num_gradients + jnp.maximum(1, line_search_evaluations(opt_state)),
            wanted(tree.norm(grads), at.num_steps + 1, moved),
        )

    (value, moved_state), grads = start
    residual = tree.norm(grads)
    zero = jnp.int32(0)
    running = wanted(residual, zero, True)
    begin = Descent(params, opt_state, model_state, value, grads, moved_state, value, residual, zero, zero + 1, running)
    return jax.lax.while_loop(lambda at: at.running, body, begin)


def line_search_evaluations(opt_state: PyTree) -> jax.Array:
    """Evaluations that line searches inside an optax state made in their last step; 0 without one."""
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "num_linesearch_steps")
    return jnp.asarray(sum(count for _, count in found), jnp.int32)
