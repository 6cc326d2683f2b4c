"""First-order shortcuts for learned initialisations: FOMAML and Reptile."""

from typing import Any

import jax

from contrastive_meta import _pytree as tree
from contrastive_meta._estimators._learned import result_of_learning
from contrastive_meta._estimators._visibility import any_of, seen_in_outer_loss, seen_in_start
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._instance import Instance
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task
from contrastive_meta._pytree import strategy
from contrastive_meta._result import EstimatorState, MetaGradient, Status
from contrastive_meta._solvers.base import InnerSolver, Solution


@strategy
class FirstOrder(MetaGradientEstimator):
    """FOMAML: learning is taken to move the solution exactly as it moves its start, dphi/dinit = identity.

    grad = dL_out/dtheta + (dinit/dtheta)^T dL_out/dphi. Biased; cheap. It sees the initialisation and what the outer
    loss depends on directly, not the inner loss's meta-parameters nor the optimiser's settings. Learning always starts
    from `init_params`.

    Args:
      solver: the learner.

    Reference:
      Finn, Abbeel & Levine (2017), first-order MAML.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, start, task: 0.5 * jnp.sum((w - task) ** 2),
      ...     outer_loss=lambda w, start, task: 0.5 * jnp.sum(w**2),
      ...     init_params=lambda start, task: start,
      ... )
      >>> estimator = cm.FirstOrder(cm.OptaxDescent(optax.sgd(0.5), num_steps=1))
      >>> float(estimator.estimate(problem, jnp.array(1.0), jnp.array(2.0)).grad)  # w = 1.5
      1.5
    """

    solver: InnerSolver

    def _estimate(self, instance: Instance, state: EstimatorState) -> MetaGradient:
        _, init_vjp, free = _learn_from_start(self.solver, instance, state)
        instance = instance.at(free.model_state)
        outer_grad = tree.grad(instance.outer)(free.params)
        direct = tree.grad(lambda meta: instance.problem.outer(free.params, meta, instance.task))(instance.meta_params)
        (through_start,) = init_vjp(outer_grad)
        return result_of_learning(
            instance,
            state,
            free,
            tree.add(direct, through_start),
            num_gradients=free.num_gradients + 1,
            status=Status.APPROXIMATE,
        )

    def _sees(self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
        """The initialisation, and what the outer loss depends on directly."""
        return any_of(seen_in_outer_loss(problem, params, meta_params, task), seen_in_start(problem, meta_params, task))


@strategy
class Reptile(MetaGradientEstimator):
    """Reptile: move the initialisation towards the solution, grad = scale * (dinit/dtheta)^T (init - solution).

    Not the gradient of the outer loss, which it never looks at. It sees the initialisation alone. Learning always
    starts from `init_params`.

    Args:
      solver: the learner.
      scale: factor of the step, 1 / (inner learning rate * steps) to compare magnitudes with a gradient.

    Reference:
      Nichol, Achiam & Schulman (2018), eq. 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, start, task: 0.5 * jnp.sum((w - task) ** 2),
      ...     outer_loss=lambda w, start, task: 0.5 * jnp.sum(w**2),
      ...     init_params=lambda start, task: start,
      ... )
      >>> estimator = cm.Reptile(cm.OptaxDescent(optax.sgd(0.5), num_steps=1))
      >>> float(estimator.estimate(problem, jnp.array(1.0), jnp.array(2.0)).grad)  # from 1 to 1.5
      -0.5
    """

    solver: InnerSolver
    scale: float | jax.Array = 1.0

    @property
    def _pulls_outer_loss_back(self) -> bool:
        """It does not look at the outer loss."""
        return False

    def _estimate(self, instance: Instance, state: EstimatorState) -> MetaGradient:
        init, init_vjp, free = _learn_from_start(self.solver, instance, state)
        (grad,) = init_vjp(tree.scale(self.scale, tree.subtract(init, free.params)))
        return result_of_learning(
            instance.at(free.model_state),
            state,
            free,
            grad,
            num_gradients=free.num_gradients,
            status=Status.APPROXIMATE,
        )

    def _sees(self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
        """The initialisation."""
        return seen_in_start(problem, meta_params, task)


def _learn_from_start(solver: InnerSolver, instance: Instance, state: EstimatorState) -> tuple[Params, Any, Solution]:
    init, init_vjp = jax.vjp(lambda meta: instance.problem.init(meta, instance.task), instance.meta_params)
    memory = solver.bind(instance.meta_params).init_memory(init)
    model_state = instance.problem.first_model_state(instance.meta_params, instance.task)
    start = state._replace(params=init, memory=memory, model_state=model_state)
    return init, init_vjp, instance.free_phase(solver, start)
