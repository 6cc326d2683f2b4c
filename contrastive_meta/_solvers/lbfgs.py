"""Limited-memory BFGS (optax's) as the learner, with its curvature pairs handed from phase to phase."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import Params
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers._descend import steps_to_tolerance
from contrastive_meta._solvers.base import (
    InnerLoss,
    InnerSolver,
    MinibatchLoss,
    MovingLosses,
    Solution,
    Stop,
    judge,
)


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
      Liu & Nocedal (1989), algorithm 2.1, as in `optax.lbfgs`.

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
        value, grads = tree.value_and_grad(loss)(init)
        state = _continue_on(memory, grads) if jax.tree.leaves(memory) else self._optimizer().init(init)
        tol = jnp.asarray(self.tol, tree.float_dtype(value))

        def evaluate(params: Params, state: PyTree, _: Any) -> Any:
            # The line search ended at `params` and kept what it saw there.
            return (state[-1].value.astype(value.dtype), ()), state[-1].grad

        end = steps_to_tolerance(
            self._optimizer(),
            MovingLosses.without_state(loss, None),
            init,
            state,
            (),
            tol=tol,
            max_steps=self.max_steps,
            stop=stop,
            evaluate=evaluate,
            stop_when_stuck=True,
            start=((value, ()), grads),
        )
        residual = tree.norm(end.grads)
        limit = tol if stop.tol is None else stop.tol
        unfinished = flag(~(residual <= limit), Status.FREE_NOT_CONVERGED)
        health = judge(end.first_loss, end.first_residual, end.params, end.loss, residual)
        # Where no step was taken the state's gradient is stale; the memory is then the one that came in.
        search = end.opt_state[-1]._replace(grad=end.grads)
        memory = (*end.opt_state[:-1], search)
        return Solution(end.params, residual, end.num_gradients, end.num_steps, worst(unfinished, health), memory)

    def init_memory(self, params: Params) -> PyTree:
        """Curvature memory without pairs."""
        return self._optimizer().init(params)

    def _optimizer(self) -> optax.GradientTransformationExtraArgs:
        return optax.lbfgs(memory_size=self.memory_size)


def _continue_on(memory: PyTree, grads: Params) -> PyTree:
    """The memory of a solve that ended here, made fit for another loss with gradient `grads` here.

    optax closes the last curvature pair at the next update, from the difference of the new gradient and the one
    it remembers. The new loss's gradient differs by the nudge, which is no curvature: shifting what it remembers
    by the same amount leaves the pair as the old loss made it.
    """
    pairs, *rest, search = memory
    remembered = tree.add(pairs.updates, tree.subtract(grads, search.grad))
    return (pairs._replace(updates=remembered), *rest, search)
