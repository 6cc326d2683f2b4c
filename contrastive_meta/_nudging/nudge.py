"""What the nudged phases add to the inner loss: the outer loss itself, or its linearisation."""

import abc

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task
from contrastive_meta._pytree import strategy


class Nudge(abc.ABC):
    """What the nudged phases add to the inner loss.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.LinearNudge(), cm.Nudge)
      True
    """

    @abc.abstractmethod
    def apply(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, outer_grad: Params
    ) -> BilevelProblem:
        """The problem whose outer loss nudges, given the free solution and the outer loss's gradient there."""


@strategy
class LossNudge(Nudge):
    """Nudge with the outer loss itself, theory (5).

    Accurate from unfinished free phases, since the pair of phases goes on refining its base point; but a negative
    beta can take the nudged loss's minimum away.

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), nudge=cm.LossNudge())
    """

    def apply(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, outer_grad: Params
    ) -> BilevelProblem:
        """The problem as it is."""
        return problem


@strategy
class LinearNudge(Nudge):
    """Nudge with the outer loss linearised at the free solution, theory (9).

    The inner Hessian is untouched, so no beta destroys convexity, and phases never evaluate the outer loss. With a
    central scheme it is exact at any beta where the inner loss is quadratic in `params` and its meta-gradient at
    most quadratic. Its accuracy is capped by that of the free phase.

    Example:
      >>> import contrastive_meta as cm
      >>> estimator = cm.Contrastive(cm.LBFGS(), nudge=cm.LinearNudge())
    """

    def apply(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, outer_grad: Params
    ) -> BilevelProblem:
        """The problem with its outer loss replaced by a line through the free solution."""

        def linearised(at: Params, meta: MetaParams, task_: Task) -> jax.Array:
            # Not `vdot`: it conjugates, and complex phases need a holomorphic line.
            moved = tree.subtract(at, params)
            products = jax.tree.map(lambda v, d: jnp.sum(v * d), outer_grad, moved)
            through: jax.Array = problem.outer(params, meta, task) + sum(jax.tree.leaves(products))
            return through

        return BilevelProblem(problem.inner, linearised, problem.init_params, sample=problem.sample)
