"""Different groups of meta-parameters, different rules."""

from collections.abc import Callable, Mapping
from typing import Any

from contrastive_meta._plasticity.autodiff import PlasticityRule, measured_by
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task
from contrastive_meta._pytree import strategy


@strategy
class ByGroup(PlasticityRule):
    """Each entry of the meta-parameters, a dictionary, is measured by a rule of its own.

    A rule sees its own group as the whole of the meta-parameters, and the problem with all other groups held.

    Args:
      rules: a rule for every entry of the meta-parameters.

    Raises:
      ValueError: the entries of the meta-parameters are not those of `rules` (when a phase is measured).

    Example:
      >>> import contrastive_meta as cm
      >>> rule = cm.ByGroup({"weights": cm.GainModulation(), "pull": cm.AnchoredSynapse()})
    """

    rules: Mapping[str, PlasticityRule]

    def statistic(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> MetaParams:
        """See `PlasticityRule.statistic`."""
        return {
            name: measured_by(rule, held, params, part, task, beta)
            for name, (rule, held, part) in self.parts(problem, meta_params).items()
        }

    def parts(
        self, problem: BilevelProblem, meta_params: MetaParams
    ) -> dict[str, tuple[PlasticityRule, BilevelProblem, MetaParams]]:
        """For each group its rule, the problem with all other groups held, and its meta-parameters."""
        if not isinstance(meta_params, Mapping) or set(meta_params) != set(self.rules):
            got = sorted(meta_params) if isinstance(meta_params, Mapping) else type(meta_params).__name__
            raise ValueError(
                f"ByGroup: expected meta-parameters in a dictionary with the entries {sorted(self.rules)}; got {got}. "
                "Name a rule for every entry, `Autodiff()` where no other fits."
            )
        return {
            name: (rule, _holding(problem, meta_params, name), meta_params[name]) for name, rule in self.rules.items()
        }


def _holding(problem: BilevelProblem, meta_params: Mapping[str, Any], name: str) -> BilevelProblem:
    """The problem of the group `name` alone."""

    def of_part(function: Callable[..., Any], index: int) -> Callable[..., Any]:
        def applied(*args: Any) -> Any:
            return function(*args[:index], {**meta_params, name: args[index]}, *args[index + 1 :])

        return applied

    return BilevelProblem(
        of_part(problem.inner_loss, 1),
        of_part(problem.outer_loss, 1),
        of_part(problem.init_params, 0),
        has_aux=problem.has_aux,
        sample=problem.sample,
    )
