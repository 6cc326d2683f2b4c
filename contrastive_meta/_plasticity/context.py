"""A slow network with a fast context among its inputs (CAVIA)."""

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity.listening import learn, listen
from contrastive_meta._plasticity.local_rule import LocalRule
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task
from contrastive_meta._pytree import PyTree, strategy


@strategy
class Context(LocalRule):
    """Fast: a context vector that says which task it is. Slow, the meta-parameters: the network that reads it.

    The statistic of a slow weight is the sum over examples and time of presynaptic activity times postsynaptic error;
    to the synapses that read the context, its units are presynaptic neurons like others. The network's weights must act
    through `transmit`.

    Reference:
      Zintgraf et al. (2019), CAVIA: fast context adaptation via meta-learning.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> cm.Context().join(jnp.zeros((5, 3)), context=jnp.ones(2)).shape
      (5, 5)
    """

    def join(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """The inputs of every example with the context after them.

        Args:
          x: shape (..., inputs).
          context: shape (size,).

        Returns:
          shape (..., inputs + size).
        """
        return jnp.concatenate([x, jnp.broadcast_to(context, (*x.shape[:-1], context.size))], axis=-1)

    def signals(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> PyTree:
        """Presynaptic activity and postsynaptic error of each slow weight."""
        return listen(problem, params, meta_params, task, beta)

    def measure(self, params: Params, meta_params: MetaParams, signals: PyTree) -> MetaParams:
        """Their outer products."""
        return learn(meta_params, signals)
