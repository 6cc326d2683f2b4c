"""The contrast as a synapse would take it: phase by phase, one running number each."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._nudging import NudgeScheme
from contrastive_meta._plasticity.autodiff import Autodiff, PlasticityRule, measured_by
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task
from contrastive_meta._pytree import static, strategy


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
      direct_at_free: take the outer loss's own derivative in `meta_params` at the free solution, once, and nowhere
        else: nudged synapses then measure the inner loss alone. The limit and the order of the bias are the same.
      rescaled: what a phase learns, `loss`, is divided by 1 + |beta|: the same minimum, by steps that need not shrink
        as the nudge grows.

    Raises:
      ValueError: `direct_at_free` with a scheme that has no free phase.

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
      >>> for phase in range(len(online.scheme.nudges)):
      ...     w = cm.LBFGS().solve(online.loss(phase, problem, meta_params, task), w).params
      ...     trace = online.accumulate(trace, phase, problem, w, meta_params, task)
      >>> [round(float(g), 2) for g in online.finish(trace)["anchor"]]  # w = task / 2, so (w - 1) / 2
      [0.5, 1.0]
    """

    scheme: NudgeScheme
    rule: PlasticityRule = Autodiff()
    direct_at_free: bool = static(default=False)
    rescaled: bool = static(default=False)

    def __post_init__(self) -> None:
        """Check that there is a free solution to take the direct term at."""
        if self.direct_at_free and self.scheme.free_phase is None:
            raise ValueError(
                "`direct_at_free` takes a scheme with a free phase, such as `forward_difference(beta)`; this one has "
                f"the strengths {self.scheme.nudges}."
            )

    def loss(
        self, phase: int | jax.Array, problem: BilevelProblem, meta_params: MetaParams, task: Task
    ) -> Callable[[Params], jax.Array]:
        """What a phase is to learn, as a function of `params`: the nudged loss."""

        def nudged(params: Params) -> jax.Array:
            nudges, _ = self.scheme.arrays(tree.float_dtype(params))
            beta = nudges[phase]
            loss = problem.nudged(params, meta_params, task, beta)
            return loss / (1 + jnp.abs(beta)) if self.rescaled else loss

        return nudged

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

        def measure(beta: jax.Array) -> MetaParams:
            return measured_by(self.rule, problem, params, meta_params, task, beta)

        # Equal weights become +-1, so that nearly equal numbers are subtracted exactly, and only then divided by beta.
        largest = jnp.max(jnp.abs(weights))
        if not self.direct_at_free:
            return Trace(tree.add_scaled(trace.total, weights[phase] / largest, measure(nudges[phase])))
        inner = measure(jnp.zeros_like(nudges[phase]))
        total = tree.add_scaled(trace.total, weights[phase] / largest, inner)
        # A statistic is that of the inner loss and beta times that of the outer one.
        outer = tree.subtract(measure(jnp.ones_like(nudges[phase])), inner)
        return Trace(tree.add_scaled(total, jnp.where(phase == self.scheme.free_phase, 1 / largest, 0), outer))

    def finish(self, trace: Trace) -> MetaParams:
        """After the last phase: the meta-gradient."""
        largest = jnp.max(jnp.stack([jnp.abs(jnp.asarray(weight)) for weight in self.scheme.weights]))
        return tree.scale(largest, jax.tree.map(jnp.real, trace.total))
