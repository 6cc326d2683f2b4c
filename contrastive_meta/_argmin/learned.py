"""A learner whose free phase is done, as the estimators of a backward pass are given it."""

from collections.abc import Callable
from typing import Any

from contrastive_meta._problem import MetaParams, Params, Task
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._solvers.base import InnerLoss, InnerSolver, MinibatchLoss, Solution, Stop


@strategy
class AlreadyLearned(InnerSolver):
    """The user's learner after its free phase, for a problem whose meta-parameters are what is differentiated.

    Args:
      solver: the user's.
      solution: where its free phase ended.
      of_user: the user's meta-parameters, from those of the problem.
    """

    solver: InnerSolver
    solution: Solution
    of_user: Callable[[Any], MetaParams] = static()

    def solve_free(
        self,
        loss: InnerLoss,
        init: Params,
        meta_params: MetaParams,
        task: Task,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
    ) -> Solution:
        """The solution that was found."""
        return self.solution

    def bind(self, meta_params: MetaParams) -> InnerSolver:
        """The user's solver, bound: it runs what comes after the free phase."""
        return self.solver.bind(self.of_user(meta_params))

    def solve(
        self,
        loss: InnerLoss,
        init: Params,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
        stop: Stop = Stop(),
    ) -> Solution:
        """As the user's solver."""
        return self.solver.solve(loss, init, minibatch_loss=minibatch_loss, memory=memory, stop=stop)

    @property
    def num_steps(self) -> int | None:
        """As the user's solver has it, for the count of an unrolled run."""
        steps: int | None = getattr(self.solver, "num_steps", None)
        return steps
