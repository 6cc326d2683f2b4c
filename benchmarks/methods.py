"""The table of estimators, each with the settings that suit a given problem."""

from typing import NamedTuple

import optax

import contrastive_meta as cm


class Tuning(NamedTuple):
    """What a fair choice of settings is made from.

    Attributes:
      step_size: of the learner, from the largest curvature.
      momentum: of the learner (Nesterov).
      num_steps: steps of the learner, enough to converge on the convex problems.
      largest_curvature: largest eigenvalue of the inner Hessian, at the start or the solution.
      floor: strength of the penalty: the curvature in directions of which the data say nothing.
      num_params: entries of `params`.
      num_meta: entries of `meta_params`.
      beta: for the rows that take a typed strength.
    """

    step_size: float
    momentum: float
    num_steps: int
    largest_curvature: float
    floor: float
    num_params: int
    num_meta: int
    beta: float = 0.1

    @property
    def learner(self) -> cm.OptaxDescent:
        """Nesterov's descent for a fixed number of steps: what every row learns with."""
        optimizer = optax.sgd(self.step_size, momentum=self.momentum, nesterov=True)
        return cm.OptaxDescent(optimizer, num_steps=self.num_steps)


class Method(NamedTuple):
    """A row of the tables: an estimator and what is worth knowing of its settings."""

    estimator: cm.MetaGradientEstimator
    settings: str


CONTRASTIVE = "contrastive (default)"
TWICE = "contrastive, learner run twice"
FORWARD = "forward as published"
IMPLICIT_CG = "implicit, CG"
BACKPROP = "backprop"
CHECKPOINTED = "backprop, checkpointed"
NYSTROM = "implicit, Nystrom"
FINITE_DIFFERENCES = "finite differences"
BASICS = (
    CONTRASTIVE,
    TWICE,
    "contrastive, four-point",
    FORWARD,
    "contrastive, complex step",
    IMPLICIT_CG,
    "implicit, Neumann",
    "implicit, T1-T2",
    BACKPROP,
    "backprop, truncated",
)


def all_methods(tuning: Tuning) -> dict[str, Method]:
    """Every estimator that can see the meta-parameters of a penalty or of example weights."""
    return {**contrastive(tuning), **implicit(tuning), **backprop(tuning), **zeroth_order(tuning)}


def contrastive(tuning: Tuning) -> dict[str, Method]:
    """Contrasts: the default, a higher order, the loss nudge, the rule as first published, the complex step."""
    learner, beta = tuning.learner, tuning.beta
    published = cm.forward_difference(beta, matched=False)
    return {
        CONTRASTIVE: Method(cm.Contrastive(learner), "automatic(order=2), phases by NewtonKrylov()"),
        TWICE: Method(
            cm.Contrastive(learner, nudged_solver=learner), "automatic(order=2), phases by the learner itself"
        ),
        "contrastive, four-point": Method(
            cm.Contrastive(learner, scheme=cm.automatic(order=4)), "automatic(order=4), phases by NewtonKrylov()"
        ),
        "contrastive, loss nudge": Method(
            cm.Contrastive(learner, nudge=cm.LossNudge()), "automatic(order=2), LossNudge, phases by NewtonKrylov()"
        ),
        FORWARD: Method(
            cm.Contrastive(learner, nudged_solver=learner, scheme=published),
            f"forward_difference(beta={beta:g}, matched=False)",
        ),
        "contrastive, complex step": Method(
            cm.Contrastive(learner, scheme=cm.relative(cm.complex_step)),
            "relative(complex_step), phases by NewtonKrylov()",
        ),
    }


def implicit(tuning: Tuning) -> dict[str, Method]:
    """Implicit differentiation with every inverse."""
    learner, step_size = tuning.learner, 1 / tuning.largest_curvature
    rank = max(2, min(100, (4 * tuning.num_params) // 5))
    # Best of seven dampings between 0.1 and 100 times the penalty's strength, on three of the problems.
    damping = 3 * tuning.floor
    inverses: dict[str, tuple[cm.InverseHessian, str]] = {
        IMPLICIT_CG: (cm.ConjugateGradient(), "until converged"),
        "implicit, Neumann": (
            cm.NeumannSeries(step_size=step_size, num_terms=tuning.num_steps),
            f"{tuning.num_steps} terms of step {step_size:.3g}, 1 / the largest curvature",
        ),
        NYSTROM: (
            cm.Nystrom(rank=rank, damping=damping),
            f"rank {rank}, damping {damping:g}, three times the penalty's strength",
        ),
        "implicit, dense": (cm.DenseInverse(), f"{tuning.num_params} products"),
        "implicit, T1-T2": (cm.IdentityHessian(), "inverse Hessian = identity"),
    }
    return {
        name: Method(cm.ImplicitDifferentiation(learner, inverse), settings)
        for name, (inverse, settings) in inverses.items()
    }


def backprop(tuning: Tuning) -> dict[str, Method]:
    """Backprop through learning: full, truncated, checkpointed."""
    learner, kept = tuning.learner, max(1, tuning.num_steps // 10)
    return {
        BACKPROP: Method(cm.BackpropThroughLearning(learner), f"all {tuning.num_steps} steps"),
        "backprop, truncated": Method(cm.BackpropThroughLearning(learner, truncate=kept), f"last {kept} steps"),
        CHECKPOINTED: Method(cm.BackpropThroughLearning(learner, checkpoint=True), f"all {tuning.num_steps} steps"),
    }


def zeroth_order(tuning: Tuning) -> dict[str, Method]:
    """The outside oracles: they learn anew for every perturbation."""
    learner = tuning.learner
    return {
        "evolution strategies": Method(
            cm.EvolutionStrategies(learner, sigma=0.1, num_pairs=64), "64 antithetic pairs, sigma 0.1"
        ),
        FINITE_DIFFERENCES: Method(cm.FiniteDifference(learner), f"{2 * tuning.num_meta} learnings, step eps^(1/3)"),
    }
