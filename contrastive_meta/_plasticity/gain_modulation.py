"""Slow weights under fast gains and thresholds: a contrastive Hebbian rule for the weights."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity.listening import learn, listen
from contrastive_meta._plasticity.local_rule import LocalRule
from contrastive_meta._plasticity.transmission import transmit
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task
from contrastive_meta._pytree import PyTree, static, strategy


@strategy
class GainModulation(LocalRule):
    """Fast: a gain and a threshold for every neuron. Slow, the meta-parameters: the weights that they modulate.

        h = act(gain * (x W + bias) + shift)
        statistic of W_ij: the sum over examples and time of x_i (dL/da_j),   a = x W + bias

    with L the phase's whole nudged loss: the ordinary weight gradient at the phase's own state. Its contrast is nudged
    minus free. Both losses see W, so the direct term dL_out/dW is not zero, and is contained: the errors of a nudged
    phase are those of L_in + beta L_out.

    The rule serves any network whose slow weights act through `transmit`, of which `layer` is one.

    Args:
      activation: of `layer`.

    Reference:
      Zucchet et al. (2022), section 4 (fast modulation of slow weights).

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> rule = cm.GainModulation()
      >>> slow = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> fast = {"gain": jnp.ones(2), "shift": jnp.zeros(2)}
      >>> rule.layer(fast, slow, jnp.zeros((5, 3))).shape
      (5, 2)
    """

    activation: Callable[[jax.Array], jax.Array] = static(default=jnp.tanh)

    def layer(self, modulation: Mapping[str, jax.Array], weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
        """One modulated layer.

        Args:
          modulation: the fast "gain" and "shift", each of shape (outputs,).
          weights: the slow "kernel", shape (inputs, outputs), and "bias", shape (outputs,).
          x: shape (..., inputs).

        Returns:
          shape (..., outputs).
        """
        affine = transmit(x, weights["kernel"], weights["bias"])
        return self.activation(modulation["gain"] * affine + modulation["shift"])

    def signals(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> PyTree:
        """Presynaptic activity and postsynaptic error of each slow weight."""
        return listen(problem, params, meta_params, task, beta)

    def measure(self, params: Params, meta_params: MetaParams, signals: PyTree) -> MetaParams:
        """Their outer products."""
        return learn(meta_params, signals)
