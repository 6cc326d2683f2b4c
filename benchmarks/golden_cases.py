"""The configurations of the golden record: estimators of every kind on small problems."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import contrastive_meta as cm


class Outcome(NamedTuple):
    """What a configuration computes.

    Attributes:
      grad: the meta-gradient.
      params: where it was taken; None where the interface does not say.
      diagnostics: of the estimate, of each task along a leading axis for a batch; None where there are none.
    """

    grad: Any
    params: Any
    diagnostics: cm.Diagnostics | None


# From (losses, meta_params, task).
Way = Callable[[cm.BilevelProblem, Any, Any], Outcome]


class Configuration(NamedTuple):
    """One line of the record.

    Attributes:
      problem: a key of `golden_problems.PROBLEMS`.
      what: the estimator, in words.
      way: how the meta-gradient is computed.
      x64: float64 or float32.
    """

    problem: str
    what: str
    way: Way
    x64: bool = True

    @property
    def name(self) -> str:
        """Unique in the record."""
        return f"{self.problem}, {self.what}, {'float64' if self.x64 else 'float32'}"


def _estimate(estimator: cm.MetaGradientEstimator) -> Way:
    def way(losses: cm.BilevelProblem, meta_params: Any, task: Any) -> Outcome:
        result = estimator.estimate(losses, meta_params, task)
        return Outcome(result.grad, result.params, result.diagnostics)

    return way


def _over_tasks(estimator: cm.MetaGradientEstimator) -> Way:
    def way(losses: cm.BilevelProblem, meta_params: Any, task: Any) -> Outcome:
        evaluate = cm.value_and_meta_grad(losses, estimator, has_aux=True)
        (_, diagnostics), grad = evaluate(meta_params, task)
        return Outcome(grad, None, diagnostics)

    return way


def _argmin(solver: cm.InnerSolver) -> Way:
    def way(losses: cm.BilevelProblem, meta_params: Any, task: Any) -> Outcome:
        learned = cm.argmin(losses.inner_loss, solver, init=losses.init_params)

        def objective(meta_params: Any) -> tuple[Any, Any]:
            params = learned(meta_params, task)
            return losses.outer_loss(params, meta_params, task), params

        grad, params = jax.grad(objective, has_aux=True)(meta_params)
        return Outcome(grad, params, None)

    return way


def _sgd(step_size: float, momentum: float, **how_long: Any) -> cm.OptaxDescent:
    return cm.OptaxDescent(optax.sgd(step_size, momentum=momentum, nesterov=True), **how_long)


def _contrast(*args: Any, **settings: Any) -> Way:
    return _estimate(cm.Contrastive(*args, **settings))


def _both(problem: str, what: str, way: Way) -> list[Configuration]:
    return [Configuration(problem, what, way, x64) for x64 in (True, False)]


LBFGS, STEPS = cm.LBFGS(), _sgd(0.25, 0.9, num_steps=200)
LOOSE = cm.OptaxDescent(optax.sgd(0.02), tol=1.0, max_steps=2000)  # it ends on the rim of the double well
CONFIGURATIONS: list[Configuration] = [
    *_both("logistic", "LBFGS", _contrast(LBFGS)),
    Configuration("logistic", "LBFGS, no estimate", _contrast(LBFGS, estimate_error=False)),
    Configuration("logistic", "LBFGS, 4 steps", _contrast(cm.LBFGS(max_steps=4))),
    *_both("logistic", "sgd, 200 steps", _contrast(STEPS)),
    Configuration("logistic", "sgd, 15 steps", _contrast(_sgd(0.25, 0.9, num_steps=15)), x64=False),
    Configuration("logistic", "sgd to 1e-6", _contrast(_sgd(0.25, 0.9, tol=1e-6, max_steps=2000))),
    Configuration("logistic", "LBFGS, target 1e-3", _contrast(LBFGS, target_error=1e-3)),
    Configuration("logistic", "LBFGS, sequential", _contrast(LBFGS, sequential=True)),
    *_both("logistic", "LBFGS, published", _contrast(LBFGS, nudged_solver=LBFGS)),
    Configuration("logistic", "sgd, published", _contrast(STEPS, nudged_solver=STEPS)),
    Configuration("logistic", "argmin", _argmin(LBFGS)),
    *_both("logistic", "implicit CG", _estimate(cm.ImplicitDifferentiation(LBFGS, cm.ConjugateGradient()))),
    Configuration("logistic", "backprop", _estimate(cm.BackpropThroughLearning(STEPS))),
    Configuration("logistic x 1", "LBFGS, batch", _over_tasks(cm.Contrastive(LBFGS))),
    *_both("ridge", "sgd, 200 steps", _contrast(_sgd(0.2, 0.8, num_steps=200))),
    Configuration("cleaning", "LBFGS", _contrast(LBFGS), x64=False),
    Configuration("cleaning", "loss nudge", _contrast(LBFGS, nudge=cm.LossNudge())),
    Configuration("cleaning", "forward", _contrast(LBFGS, scheme=cm.forward_difference(1e-4))),
    Configuration("cleaning", "second-order forward", _contrast(LBFGS, scheme=cm.second_order_forward(1e-3))),
    Configuration("cleaning", "central 1e-3", _contrast(LBFGS, scheme=cm.central_difference(1e-3))),
    Configuration("cleaning", "relative central", _contrast(LBFGS, scheme=cm.relative(cm.central_difference))),
    Configuration("cleaning", "automatic 1", _contrast(LBFGS, scheme=cm.automatic(order=1))),
    Configuration("cleaning", "automatic 4", _contrast(LBFGS, scheme=cm.automatic(order=4))),
    Configuration("cleaning", "complex step", _contrast(LBFGS, scheme=cm.relative(cm.complex_step))),
    Configuration("cleaning", "circle", _contrast(LBFGS, scheme=cm.circle(1e-2))),
    *_both("network", "LBFGS", _contrast(LBFGS)),
    Configuration("network", "sgd, published, linear nudge", _contrast(
        _sgd(0.3, 0.9, num_steps=1500), nudged_solver=_sgd(0.3, 0.9, num_steps=1500), nudge=cm.LinearNudge()
    )),
    Configuration("sinusoid", "LBFGS", _contrast(LBFGS)),
    Configuration("anchored", "LBFGS, AnchoredSynapse", _contrast(LBFGS, rule=cm.AnchoredSynapse())),
    Configuration("sinusoid x 4", "LBFGS, batch", _over_tasks(cm.Contrastive(LBFGS))),
    Configuration("double well", "fallback", _contrast(LOOSE)),
    Configuration("double well x 4", "fallback for one, batch", _over_tasks(cm.Contrastive(LOOSE))),
]  # fmt: skip
