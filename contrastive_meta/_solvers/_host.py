"""Learners that run on the host: they ask, and the compiled program answers, so that the host never calls JAX.

A host function that called a JAX loss from inside a callback would wait for a device that waits for the callback:
on a machine with few cores it hangs. Here it is the other way round. The learner runs in a thread of its own and
*asks* for the loss at a point; a `while_loop` in the compiled program evaluates it and *tells* the thread, through
one `pure_callback` per evaluation.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.flatten_util import ravel_pytree

from contrastive_meta import _pytree as tree
from contrastive_meta._control import while_loop
from contrastive_meta._problem import Params
from contrastive_meta._solvers._host_sessions import Learner, Office, Reply, Told
from contrastive_meta._solvers.base import InnerLoss

# jaxlib's CPU client copies what a callback is given; above 100 KiB on a thread of its pool, which is the one that
# waits here where there is a single core (jax 0.10: hangs). Vectors therefore travel in smaller pieces.
_PIECE_BYTES = 96 * 1024


class HostSolution(NamedTuple):
    """Where a learner on the host ended.

    Attributes:
      params: the solution.
      loss: loss there.
      residual: gradient norm there.
      first_loss: loss at the start.
      first_residual: gradient norm at the start.
      num_evaluations: evaluations the learner asked for, int32.
      num_gradients: gradients evaluated, those at the start and at the solution included, int32.
    """

    params: Params
    loss: jax.Array
    residual: jax.Array
    first_loss: jax.Array
    first_residual: jax.Array
    num_evaluations: jax.Array
    num_gradients: jax.Array


class _State(NamedTuple):
    reply: Reply
    value: jax.Array
    gradient: jax.Array
    num_evaluations: jax.Array


def learn_on_host(
    learner: Learner, loss: InnerLoss, init: Params, *, tol: Any, max_steps: Any, needs_gradient: bool = True
) -> HostSolution:
    """Run `learner` on the host while this program evaluates `loss`; under jit, vmap and scan.

    Args:
      learner: `(loss, start, tol, max_steps) -> solution`, on flat vectors. Each lane of a batch runs in
        its own thread. What it raises is raised by the program.
      loss: `params -> scalar`.
      init: the start, real floating arrays.
      tol: for the learner; may be traced.
      max_steps: for the learner; may be traced.
      needs_gradient: False for learners that use values only; their evaluations then cost no gradient.

    Raises:
      TypeError: when differentiated.
    """
    start, unravel = ravel_pytree(init)
    exchange = _differentiable_by_nobody(_exchange_with(Office(learner)))

    def flat_loss(vector: jax.Array) -> jax.Array:
        return loss(unravel(vector))

    def evaluate(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, gradient = tree.value_and_grad(flat_loss)(vector)
        return value, gradient

    def evaluate_as_asked(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        return evaluate(vector) if needs_gradient else (flat_loss(vector), jnp.zeros_like(vector))

    settings = jnp.asarray(tol, jnp.result_type(float)), jnp.asarray(max_steps, jnp.int32)

    def body(at: _State) -> _State:
        session, finished, point = at.reply
        reply = exchange(Told(session, finished, *settings, point, at.value, at.gradient))
        return _State(reply, *evaluate_as_asked(reply.point), at.num_evaluations + 1)

    # The first call, as number 0, opens the session. It is made inside the loop because two equal calls outside
    # would be merged into one: two learners with different losses would then share a thread.
    opening = Reply(jnp.int32(0), jnp.asarray(False), start)
    first_value, first_gradient = evaluate(start)
    begin = _State(opening, first_value, first_gradient, jnp.int32(0))
    end = while_loop(lambda at: ~at.reply.finished, body, begin)
    # A finished session's point is evaluated by the loop like any other: that is the measurement of the solution.
    value, gradient = (end.value, end.gradient) if needs_gradient else evaluate(end.reply.point)
    return HostSolution(
        params=unravel(end.reply.point),
        loss=value,
        residual=tree.norm(gradient),
        first_loss=first_value,
        first_residual=tree.norm(first_gradient),
        num_evaluations=end.num_evaluations,
        num_gradients=1 + (end.num_evaluations if needs_gradient else jnp.int32(1)),
    )


def _differentiable_by_nobody(exchange: Callable[[Told], Reply]) -> Callable[[Told], Reply]:
    differentiable: jax.custom_jvp[Reply] = jax.custom_jvp(exchange)

    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            "Learning on the host cannot be differentiated through. `BackpropThroughLearning` needs the steps in JAX: "
            "`OptaxDescent(optimizer, num_steps=...)` or a JAX-traceable `CallableSolver`. "
            "`Contrastive` and `ImplicitDifferentiation` differentiate no steps and take any solver."
        )

    differentiable.defjvp(refuse)
    return differentiable


def _exchange_with(office: Office) -> Callable[[Told], Reply]:
    """The exchange as a JAX function that knows its whole batch, as cutting it into pieces needs."""
    exchange = custom_vmap(lambda told: _call_host(office, told))

    def over_lanes(size: int, is_batched: Sequence[Told], told: Told) -> tuple[Reply, Reply]:
        (mapped,) = is_batched
        lanes = [
            x if batched else jnp.broadcast_to(x, (size, *x.shape)) for batched, x in zip(mapped, told, strict=True)
        ]
        return exchange(Told(*lanes)), Reply(True, True, True)

    exchange.def_vmap(over_lanes)
    return exchange


def _call_host(office: Office, told: Told) -> Reply:
    shape, batch = told.point.shape, told.session.shape
    size = math.prod(batch)
    kinds = (batch, jnp.int32), (batch, jnp.bool_), (shape, told.point.dtype)
    expected = Reply(*(jax.ShapeDtypeStruct(*kind) for kind in kinds))

    def on_host(told: Told) -> Reply:
        def lanes(x: Any) -> Any:
            vectors = (size, shape[-1])
            return np.concatenate(x).reshape(vectors) if isinstance(x, list) else np.asarray(x).reshape(size)

        reply = office.exchange(Told._make(map(lanes, told)))
        return Reply._make(
            np.asarray(x, like.dtype).reshape(like.shape) for x, like in zip(reply, expected, strict=True)
        )

    pieces = told._replace(point=cut(told.point), gradient=cut(told.gradient))
    reply: Reply = jax.pure_callback(on_host, expected, pieces)
    return reply


def cut(vectors: jax.Array) -> list[jax.Array]:
    """An array as flat pieces that a callback may be given, to be joined on the host."""
    flat = vectors.reshape(-1)
    size = _PIECE_BYTES // flat.dtype.itemsize
    return [flat[i : i + size] for i in range(0, max(1, flat.size), size)]
