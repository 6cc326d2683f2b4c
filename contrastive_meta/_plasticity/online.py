"""The contrast as a synapse would take it: phase by phase, one running number each."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._nudging import NudgeScheme
from contrastive_meta._plasticity.autodiff import Autodiff, PlasticityRule, measured_by
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task
from contrastive_meta._pytree import strategy


class Trace(NamedTuple):
    """What the synapses carry from phase to phase.

    Attributes:
      total: the statistics so far, each times its weight relative to the largest: a pytree like `meta_params`.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> cm.OnlineContrast(cm.central_difference(0.1)).begin(jnp.ones(3)).total.tolist()
      [0.0, 0.0, 0.0]
    """

    total: MetaParams


@strategy
class OnlineContrast:
    """The contrast Re sum_k w_k g(beta_k), accumulated while the phases come and go.

    At the end of each phase a synapse adds what it measures, with the sign and weight of the phase, to one number. No
    phase's solution is needed once it is measured: at any time one copy of `params` exists, where the batch form holds
    one for each phase. The result is the batch form's, up to the order of a sum.

    `Contrastive` takes the batch form, for its checks compare the phases' ends; use this one in a loop of your own, on
    hardware that has no room for two solutions, or where phases are days apart.

    Args:
      scheme: strengths and weights of the phases.
      rule: what is measured.

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
      >>> online = cm.OnlineContrast(cm.central_difference(0.1), rule)
      >>> trace = online.begin(meta_params)
      >>> for phase, beta in enumerate(online.scheme.nudges):
      ...     w = cm.LBFGS().solve(lambda w: problem.nudged(w, meta_params, task, beta), w).params
      ...     trace = online.accumulate(trace, phase, problem, w, meta_params, task)
      >>> [round(float(g), 2) for g in online.finish(trace)["anchor"]]  # w = task / 2, so (w - 1) / 2
      [0.5, 1.0]
    """

    scheme: NudgeScheme
    rule: PlasticityRule = Autodiff()

    def begin(self, meta_params: MetaParams) -> Trace:
        """Before the first phase."""
        zero = tree.zeros_like(jax.tree.map(jnp.asarray, meta_params))
        return Trace(tree.to_complex(zero) if self.scheme.is_complex else zero)

    def accumulate(
        self, trace: Trace, phase: int | jax.Array, problem: BilevelProblem, params: Params, meta_params: MetaParams,
        task: Task,
    ) -> Trace:  # fmt: skip
        """At the end of a phase.

        Args:
          trace: from the phases before.
          phase: its number in the scheme; traced ones will do.
          problem: its outer loss is what nudged.
          params: where the phase ended.
          meta_params: theta.
          task: the whole task.
        """
        nudges, weights = self.scheme.arrays(tree.float_dtype(params))
        statistic = measured_by(self.rule, problem, params, meta_params, task, nudges[phase])
        # Equal weights become +-1, so that nearly equal numbers are subtracted exactly, and only then divided by beta.
        ratio = weights[phase] / jnp.max(jnp.abs(weights))
        return Trace(tree.add_scaled(trace.total, ratio, statistic))

    def finish(self, trace: Trace) -> MetaParams:
        """After the last phase: the meta-gradient."""
        largest = jnp.max(jnp.stack([jnp.abs(jnp.asarray(weight)) for weight in self.scheme.weights]))
        return tree.scale(largest, jax.tree.map(jnp.real, trace.total))
