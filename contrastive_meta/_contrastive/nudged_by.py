"""Who runs the nudged phases: the one place where that is chosen."""

from typing import NamedTuple

from contrastive_meta._contrastive.newton_krylov import NewtonKrylov
from contrastive_meta._instance import Instance
from contrastive_meta._nudging import LinearNudge, LossNudge, Nudge
from contrastive_meta._solvers.base import InnerSolver

NudgedLearner = InnerSolver | NewtonKrylov


class NudgedBy(NamedTuple):
    """Who runs the nudged phases.

    Attributes:
      fast: the Newton-Krylov iteration, or None where a solver runs the phases from the first.
      solver: the solver that runs phases, from the first or in reserve, bound to the meta-parameters.
      in_reserve: whether that solver may take the place of `fast`.
    """

    fast: NewtonKrylov | None
    solver: InnerSolver
    in_reserve: bool

    @classmethod
    def choose(cls, nudged: NudgedLearner | None, solver: InnerSolver, instance: Instance) -> "NudgedBy":
        """From what the user asked for; by default Newton-Krylov, where it goes to where the solver would.

        Args:
          nudged: the learner of nudged phases that the user named, or None.
          solver: of the free phase.
          instance: the problem at one task.
        """
        own = solver.bind(instance.meta_params)
        if nudged is None:
            # A fixed sequence of minibatches ends near, not at, the minimum of the whole loss.
            nudged = NewtonKrylov() if own.descends_loss and instance.problem.sample is None else solver
        if isinstance(nudged, InnerSolver):
            return cls(None, nudged.bind(instance.meta_params), False)
        return cls(nudged, own, nudged.fall_back and own.takes_losses)

    @property
    def reruns(self) -> bool:
        """Whether a solver runs the phases from the first."""
        return self.fast is None

    @property
    def default_nudge(self) -> Nudge:
        """What is added to the inner loss where the user left that open."""
        return LossNudge() if self.reruns else LinearNudge()
