"""Slow features under a fast readout (ANIL)."""

from collections.abc import Mapping

import jax

from contrastive_meta._plasticity.listening import learn, listen
from contrastive_meta._plasticity.local_rule import LocalRule
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task
from contrastive_meta._pytree import PyTree, strategy


@strategy
class FastHead(LocalRule):
    """Fast: the head, which learns each task. Slow, the meta-parameters: the body that gives it features.

    The statistic of a slow weight is the sum over examples and time of presynaptic activity times postsynaptic error,
    the errors coming back through the head as it is in that phase. The body's weights must act through `transmit`.

    Reference:
      Raghu et al. (2020), ANIL: almost no inner loop.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> head = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> cm.FastHead().readout(head, jnp.ones((5, 3))).shape
      (5, 2)
    """

    def readout(self, head: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
        """The fast affine readout of slow features.

        Args:
          head: the fast "kernel", shape (features, outputs), and "bias", shape (outputs,).
          features: shape (..., features).

        Returns:
          shape (..., outputs).
        """
        return features @ head["kernel"] + head["bias"]

    def signals(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> PyTree:
        """Presynaptic activity and postsynaptic error of each slow weight."""
        return listen(problem, params, meta_params, task, beta)

    def measure(self, params: Params, meta_params: MetaParams, signals: PyTree) -> MetaParams:
        """Their outer products."""
        return learn(meta_params, signals)
