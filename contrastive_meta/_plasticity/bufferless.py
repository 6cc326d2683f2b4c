"""The contrast without a trace: every phase changes the meta-parameters themselves, by what it measures."""

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._nudging import NudgeScheme
from contrastive_meta._plasticity.autodiff import Autodiff, PlasticityRule, measured_by
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task
from contrastive_meta._pytree import strategy


@strategy
class BufferlessContrast:
    """One step of meta-learning whose parts are taken as the phases end: theta -= step_size * w_k g(beta_k).

    With a forward difference: an anti-learning step after the free phase and a learning step after the nudged one. A
    synapse needs no number but its own: nothing is carried from phase to phase. The price is that later phases learn
    with meta-parameters that the earlier ones have moved, by step_size / beta times a statistic. What the steps add up
    to is off the meta-gradient by a bias of the order of step_size / beta^2, where statistics are of order 1: the step
    has to be smaller than beta^2, where `OnlineContrast` only asks that it suit the outer loss. Steps cannot be
    averaged over tasks first, nor given to an optimiser.

    Args:
      scheme: strengths and weights of the phases.
      step_size: of the meta-gradient.
      rule: what is measured.

    Reference:
      Zucchet, Schug, von Oswald, Zhao & Sacramento (2022), the contrastive rule of theorem 1 applied phase by phase.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> rule = cm.AnchoredSynapse()
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, meta, task: 0.5 * jnp.sum((w - task) ** 2) + rule.energy(w, meta),
      ...     outer_loss=lambda w, meta, task: 0.5 * jnp.sum((w - 1.0) ** 2),
      ...     init_params=lambda meta, task: meta["anchor"],
      ... )
      >>> meta_params, task, w = {"anchor": jnp.zeros(2)}, jnp.array([4.0, 6.0]), jnp.zeros(2)
      >>> bufferless = cm.BufferlessContrast(cm.forward_difference(0.1), 1e-4, rule)
      >>> for phase, beta in enumerate(bufferless.scheme.nudges):
      ...     w = cm.LBFGS().solve(lambda w: problem.nudged(w, meta_params, task, beta), w).params
      ...     meta_params = bufferless.step(meta_params, phase, problem, w, task)
      >>> [round(float(x), 1) for x in meta_params["anchor"] / -1e-4]  # the meta-gradient is 0.5 and 1.0, less 7 %
      [0.5, 0.9]
    """

    scheme: NudgeScheme
    step_size: Number
    rule: PlasticityRule = Autodiff()

    def step(
        self, meta_params: MetaParams, phase: int | jax.Array, problem: BilevelProblem, params: Params, task: Task
    ) -> MetaParams:
        """At the end of a phase.

        Args:
          meta_params: theta, as the phases before have left it, with which this phase learned.
          phase: its number in the scheme; traced ones will do.
          problem: its outer loss is what nudged.
          params: where the phase ended.
          task: the whole task.

        Returns:
          theta for the next phase; after the last one, for the next task.
        """
        nudges, weights = self.scheme.arrays(tree.float_dtype(params))
        statistic = measured_by(self.rule, problem, params, meta_params, task, nudges[phase])

        def move(theta: jax.Array, measured: jax.Array) -> jax.Array:
            change = self.step_size * jnp.real(weights[phase] * measured)
            return (theta - change).astype(theta.dtype)

        return jax.tree.map(move, jax.tree.map(jnp.asarray, meta_params), statistic)
