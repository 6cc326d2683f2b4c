"""How the units of a network settle: damped steps to a fixed point, so many or to a tolerance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._pytree import PyTree, static, strategy


class Relaxed(NamedTuple):
    """Where units settled.

    Attributes:
      state: of all units.
      residual: how fast the fastest unit still moves, the largest entry of its direction.
      num_steps: taken, int32.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.local_learners.Relaxed._fields
      ('state', 'residual', 'num_steps')
    """

    state: PyTree
    residual: jax.Array
    num_steps: jax.Array


@strategy
class Relaxation:
    """Units move along a direction that vanishes where they rest: state <- state + step_size * direction(state).

    A fixed number of steps (a `scan`, which reverse mode can differentiate), or as many as it takes for no unit to move
    faster than `tol` (a `while_loop`, which it cannot), `num_steps` at most. Batches settle together.

    Args:
      step_size: 1 is one full step; networks with strong or many synapses need less.
      num_steps: of them, or at most.
      tol: in units of what drives the units: their activity in a free phase, the nudge in a nudged one. None takes all
        steps.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> relaxation = cm.local_learners.Relaxation(step_size=0.5, num_steps=100, tol=1e-3)
      >>> end = relaxation.run(lambda state: 1.0 - state, jnp.zeros(2))
      >>> int(end.num_steps), end.state.tolist()
      (10, [0.9990234375, 0.9990234375])
    """

    step_size: float | jax.Array = 0.5
    num_steps: int = static(default=50)
    tol: float | jax.Array | None = None

    def run(self, direction: Callable[[PyTree], PyTree], start: PyTree, scale: Any = 1.0) -> Relaxed:
        """Settle from `start`.

        Args:
          direction: state -> the direction in which each unit moves, a pytree like the state.
          start: state of all units.
          scale: what `tol` is relative to.
        """

        def step(state: PyTree) -> PyTree:
            return tree.add_scaled(state, self.step_size, direction(state))

        if self.tol is None:
            end = jax.lax.fori_loop(0, self.num_steps, lambda _, state: step(state), start)
            return Relaxed(end, tree.max_abs(direction(end)), jnp.int32(self.num_steps))
        tol = jnp.asarray(self.tol * scale, tree.float_dtype(start))

        def unsettled(carry: tuple[PyTree, jax.Array]) -> jax.Array:
            # Not `<=`: what is NaN has nowhere to go.
            return (tree.max_abs(direction(carry[0])) > tol) & (carry[1] < self.num_steps)

        end, taken = jax.lax.while_loop(unsettled, lambda carry: (step(carry[0]), carry[1] + 1), (start, jnp.int32(0)))
        return Relaxed(end, tree.max_abs(direction(end)), taken)
