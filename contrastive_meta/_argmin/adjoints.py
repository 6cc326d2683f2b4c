"""The adjoints of a differentiable argmin: each is an estimator whose outer loss is the cotangent's product."""

import abc
from typing import Any

from contrastive_meta._contrastive import Contrastive, NewtonKrylov
from contrastive_meta._estimators import BackpropThroughLearning, ImplicitDifferentiation, MetaGradientEstimator
from contrastive_meta._linear import ConjugateGradient, IdentityHessian, InverseHessian
from contrastive_meta._nudging import NudgeStrength, central_difference, relative
from contrastive_meta._pytree import static, strategy
from contrastive_meta._solvers.base import InnerSolver


class Adjoint(abc.ABC):
    """How the cotangent v of phi = argmin becomes cotangents of what the inner loss depends on.

    That is the meta-gradient of the outer loss <v, phi>, so an adjoint is no more than the choice of an estimator: one
    that works from a single free phase, since that is done. `EvolutionStrategies` and the like learn again and do not.
    Subclasses are final strategies.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.ContrastiveAdjoint(), cm.Adjoint)
      True
    """

    @abc.abstractmethod
    def estimator(self, solver: InnerSolver) -> MetaGradientEstimator:
        """The estimator of the backward pass.

        Args:
          solver: the learner. Its free phase is done: `solve_free` returns the solution that was found.
        """


@strategy
class ContrastiveAdjoint(Adjoint):
    """Contrast of phases that the cotangent nudges, theory (9): gradients only, any learner, constant memory.

    The cotangent is a linear nudge by itself, so that no strength takes the minimum away.

    Args:
      nudged_solver: what runs the nudged phases; by default as for `Contrastive`. Its settings cannot be read from
        meta-parameters.
      scheme: phases, weights and strength; as for `Contrastive`.
      nudged_tol: as for `Contrastive`.
      sequential: as for `Contrastive`.
      estimate_error: whether a callback for failures finds `diagnostics.error_estimate`.

    Reference:
      Zucchet et al. (2022), theorem 1; Scellier & Bengio (2017).

    Example:
      >>> import contrastive_meta as cm
      >>> adjoint = cm.ContrastiveAdjoint(nudged_solver=cm.LBFGS(), scheme=cm.relative(cm.four_point))
    """

    nudged_solver: InnerSolver | NewtonKrylov | None = None
    scheme: NudgeStrength = relative(central_difference)
    nudged_tol: Any = None
    sequential: bool = static(default=False)
    estimate_error: bool = static(default=False)

    def estimator(self, solver: InnerSolver) -> MetaGradientEstimator:
        """`Contrastive`."""
        return Contrastive(
            solver,
            nudged_solver=self.nudged_solver,
            scheme=self.scheme,
            nudged_tol=self.nudged_tol,
            sequential=self.sequential,
            estimate_error=self.estimate_error,
        )


@strategy
class ImplicitAdjoint(Adjoint):
    """The implicit function theorem, theory (4): a linear solve with the inner loss's Hessian.

    It differentiates the inner loss twice, so no other `argmin` may lie within that.

    Args:
      inverse_hessian: how H^-1 v is found.

    Example:
      >>> import contrastive_meta as cm
      >>> adjoint = cm.ImplicitAdjoint(cm.DenseInverse())
    """

    inverse_hessian: InverseHessian = ConjugateGradient()

    def estimator(self, solver: InnerSolver) -> MetaGradientEstimator:
        """`ImplicitDifferentiation`."""
        return ImplicitDifferentiation(solver, self.inverse_hessian)


@strategy
class BackpropAdjoint(Adjoint):
    """The derivative of the learner's own steps: the only one to see the initialisation and the learner's settings.

    The backward pass learns once more, so that nothing is kept between the two but the solution; within it memory
    grows with the number of steps.

    Args:
      truncate: as for `BackpropThroughLearning`.
      checkpoint: as for `BackpropThroughLearning`.

    Raises:
      TypeError: the learner cannot be unrolled (when differentiated).
      ValueError: `truncate` is not positive (when given to `argmin`).

    Example:
      >>> import contrastive_meta as cm
      >>> adjoint = cm.BackpropAdjoint(checkpoint=True)
    """

    truncate: int | None = static(default=None)
    checkpoint: bool = static(default=False)

    def estimator(self, solver: InnerSolver) -> MetaGradientEstimator:
        """`BackpropThroughLearning`."""
        return BackpropThroughLearning(solver, truncate=self.truncate, checkpoint=self.checkpoint)


@strategy
class OneStepAdjoint(Adjoint):
    """The derivative of one gradient step at the solution, as if the start of that step were a constant.

    phi - step_size * grad L(phi, theta) differentiated in theta alone. Biased: the relative error is that of taking
    the inverse Hessian for `step_size` times the identity, at most max |1 - step_size * h| over the curvatures h.
    With an ill-conditioned loss it is near 1, and the gradient points elsewhere. A handful of gradients, no solve.

    Args:
      step_size: in units of an inverse curvature, `params` squared over the inner loss; positive. 1 / (largest
        curvature) never overshoots; 2 / (smallest + largest) has the least bound. There is no default, because no
        value is right for two problems.

    Raises:
      ValueError: `step_size` is known and not positive.

    Reference:
      Bolte, Pauwels & Vaiter (2023), One-step differentiation of iterative algorithms.

    Example:
      >>> import contrastive_meta as cm
      >>> adjoint = cm.OneStepAdjoint(step_size=0.1)
    """

    step_size: Any

    def estimator(self, solver: InnerSolver) -> MetaGradientEstimator:
        """`ImplicitDifferentiation` with a multiple of the identity for the inverse Hessian."""
        return ImplicitDifferentiation(solver, IdentityHessian(self.step_size))
