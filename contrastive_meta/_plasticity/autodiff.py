"""What a phase measures, as the automatic derivative of its loss: the rule that fits every problem."""

import abc

import jax

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task, same_structure
from contrastive_meta._pytree import strategy


class PlasticityRule(abc.ABC):
    """What is measured at the end of one phase; the contrast of it over phases is the meta-gradient.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.Autodiff(), cm.PlasticityRule)
      True
    """

    @abc.abstractmethod
    def statistic(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> MetaParams:
        """dL/dtheta at fixed `params`, of the loss nudged by `beta`: a pytree like `meta_params`.

        Args:
          problem: the problem; its outer loss is what nudges.
          params: where the phase ended; complex in a complex phase.
          meta_params: theta.
          task: the whole task.
          beta: the phase's strength; complex in a complex phase.
        """


@strategy
class Autodiff(PlasticityRule):
    """The partial derivative g(beta) = dL/dtheta by automatic differentiation, theory (7).

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), rule=cm.Autodiff())
    """

    def statistic(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> MetaParams:
        """See `PlasticityRule.statistic`."""
        return tree.grad(lambda meta: problem.nudged(params, meta, task, beta))(
            tree.to_complex(meta_params) if tree.is_complex(params) else meta_params
        )


def measured_by(
    rule: PlasticityRule, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
) -> MetaParams:
    """The rule's statistic, checked.

    Raises:
      ValueError: the rule returned another tree than `meta_params`.
    """
    statistic = rule.statistic(problem, params, meta_params, task, beta)
    if not same_structure(statistic, meta_params):
        raise ValueError(
            "`statistic` must return a pytree like `meta_params`: expected "
            f"{jax.tree.structure(meta_params)}, got {jax.tree.structure(statistic)}. "
            "Return zeros for meta-parameters that this rule leaves alone."
        )
    return statistic
