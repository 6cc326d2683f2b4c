"""A bank of slow modules that fast coefficients mix (a linear hypernetwork)."""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity.listening import Synapses, call_on, learn, listen
from contrastive_meta._plasticity.local_rule import LocalRule
from contrastive_meta._plasticity.transmission import outer_products
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task
from contrastive_meta._pytree import PyTree, strategy


@strategy
class ModuleBank(LocalRule):
    """Fast: how much of each module a task needs. Slow, the meta-parameters: the modules, templates of a layer.

        y = x (sum_m c_m Theta_m)
        statistic of Theta_mij: c_m times the sum over examples and time of x_i (dL/dy_j)

    Modules must act through `mix`, other slow weights through `transmit`. The same bank may serve several layers.

    Reference:
      Ha et al. (2017), hypernetworks; Schug et al. (2024), modular hypernetworks; Zucchet et al. (2022), section 5.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> bank, coefficients = jnp.ones((4, 3, 2)), jnp.array([1.0, 0.0, 0.5, 0.0])
      >>> cm.ModuleBank().mix(jnp.ones((5, 3)), bank, coefficients)[0].tolist()
      [4.5, 4.5]
    """

    def mix(self, x: jax.Array, bank: Any, coefficients: jax.Array) -> jax.Array:
        """A layer whose weights are the modules, mixed.

        Args:
          x: shape (..., inputs).
          bank: slow, shape (modules, inputs, outputs).
          coefficients: fast, shape (modules,).

        Returns:
          shape (..., outputs).
        """
        return call_on(Bank(), bank, x, coefficients)

    def signals(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> PyTree:
        """Presynaptic activity, the module's coefficient, and postsynaptic error of each slow weight."""
        return listen(problem, params, meta_params, task, beta)

    def measure(self, params: Params, meta_params: MetaParams, signals: PyTree) -> MetaParams:
        """Their products."""
        return learn(meta_params, signals)


@strategy
class Bank(Synapses):
    """The synapses of all modules between the same two layers, shape (modules, inputs, outputs)."""

    def forward(self, leaf: jax.Array, *incoming: jax.Array) -> jax.Array:
        """The activity times the mixture of kernels."""
        activity, coefficients = incoming
        return activity @ jnp.tensordot(coefficients, leaf, axes=1)

    def axes(self, *ndims: int) -> tuple[tuple[int | None, ...], ...]:
        """Activity along the inputs, coefficients along the modules, error along the outputs."""
        before, _, after = ndims
        return (*[None] * (before - 1), 1), (0,), (*[None] * (after - 1), 2)

    def learn(self, leaf: jax.Array, *heard: jax.Array) -> jax.Array:
        """Coefficient times presynaptic activity times local error, over examples and time."""
        activity, coefficients, error = heard
        return coefficients[:, None, None] * outer_products(activity, error)
