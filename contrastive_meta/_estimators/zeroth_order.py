"""Zeroth-order meta-gradients: outer losses alone, at perturbed meta-parameters, after learning anew."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from contrastive_meta._estimators._learned import result_of_learning
from contrastive_meta._estimators._visibility import (
    any_of,
    seen_in_model_state,
    seen_in_settings,
    seen_in_start,
)
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._instance import Instance
from contrastive_meta._problem import BilevelProblem, MetaParams, Params, Task
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import EstimatorState, MetaGradient, Status, worst
from contrastive_meta._solvers.base import InnerSolver, Solution


class _Learned(NamedTuple):
    """Learning at perturbed meta-parameters: the outer loss it reached, its cost, its status."""

    outer_loss: jax.Array
    num_gradients: jax.Array
    status: jax.Array


@strategy
class FiniteDifference(MetaGradientEstimator):
    """Central differences of the outer loss after learning, one pair of learnings for each meta-parameter.

    An independent reference: it sees everything, initialisation and optimiser settings included, and shares no
    derivative with the others. Its cost is 2 len(meta_params) learnings; its accuracy is limited to about
    (solver tolerance + eps)^(2/3), so give it a tightly converged solver and float64.

    Args:
      solver: the learner, restarted from `init_params` for each perturbation.
      step: perturbation of each meta-parameter, relative to max(1, |theta_i|); by default eps^(1/3).
      batch_size: how many perturbations learn at once; 1 bounds memory.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, theta, task: 0.5 * jnp.sum((w - theta) ** 2),
      ...     outer_loss=lambda w, theta, task: 0.5 * jnp.sum(w**2),
      ...     init_params=lambda theta, task: jnp.zeros_like(theta),
      ... )
      >>> estimator = cm.FiniteDifference(cm.OptaxDescent(optax.sgd(1.0), num_steps=1))
      >>> round(float(estimator.estimate(problem, jnp.array(3.0), None).grad), 2)
      3.0
    """

    solver: InnerSolver
    step: float | jax.Array | None = None
    batch_size: int = static(default=16)

    @property
    def _pulls_outer_loss_back(self) -> bool:
        """It compares values."""
        return False

    def _estimate(self, instance: Instance, state: EstimatorState) -> MetaGradient:
        flat, unravel = ravel_pytree(instance.meta_params)
        relative_step = jnp.finfo(flat.dtype).eps ** (1 / 3) if self.step is None else self.step
        steps = (relative_step * jnp.maximum(1, jnp.abs(flat))).astype(flat.dtype)

        def difference(index: jax.Array) -> tuple[jax.Array, _Learned]:
            ahead = flat.at[index].add(steps[index])
            behind = flat.at[index].add(-steps[index])
            pair = jax.vmap(lambda x: _learn(self.solver, instance, unravel(x), state))(jnp.stack([ahead, behind]))
            # What was added to the floating-point number, not what was meant to be.
            return (pair.outer_loss[0] - pair.outer_loss[1]) / (ahead[index] - behind[index]), pair

        grad, pairs = jax.lax.map(difference, jnp.arange(flat.size), batch_size=min(self.batch_size, max(flat.size, 1)))
        return _result(self.solver, instance, state, unravel(grad.astype(flat.dtype)), pairs, None, Status.CONVERGED)

    def _sees(self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
        """Everything that learning or judging depends on."""
        by_loss = super()._sees(problem, params, meta_params, task)
        return any_of(by_loss, *_sees_beyond_losses(self.solver, problem, params, meta_params, task))


@strategy
class EvolutionStrategies(MetaGradientEstimator):
    """Antithetic evolution strategies: the gradient of the outer loss smoothed by a Gaussian, by sampling.

    grad = mean over e ~ N(0, I) of e (Phi(theta + sigma e) - Phi(theta - sigma e)) / (2 sigma). Unbiased for the
    smoothed outer loss; its variance grows with the number of meta-parameters. It sees everything. The error estimate
    is the standard error over pairs, relative to the gradient's norm (the smoothing bias is not in it).

    Args:
      solver: the learner, restarted from `init_params` for each sample.
      sigma: standard deviation of the perturbations, in the units of the meta-parameters.
      num_pairs: antithetic pairs.
      batch_size: how many pairs learn at once.

    Reference:
      Salimans et al. (2017); Metz et al. (2019), for meta-gradients.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, theta, task: 0.5 * jnp.sum((w - theta) ** 2),
      ...     outer_loss=lambda w, theta, task: jnp.sum(w),
      ...     init_params=lambda theta, task: jnp.zeros_like(theta),
      ... )
      >>> sampler = cm.EvolutionStrategies(cm.OptaxDescent(optax.sgd(1.0), num_steps=1), num_pairs=4000)
      >>> bool(abs(sampler.estimate(problem, jnp.array(3.0), None).grad - 1) < 0.1)
      True
    """

    solver: InnerSolver
    sigma: float | jax.Array = 1e-2
    num_pairs: int = static(default=64)
    batch_size: int = static(default=16)

    def __post_init__(self) -> None:
        """Check the number of pairs: a standard error needs two."""
        super().__post_init__()
        if self.num_pairs < 2:
            raise ValueError(f"EvolutionStrategies needs num_pairs >= 2; got {self.num_pairs}.")

    @property
    def _pulls_outer_loss_back(self) -> bool:
        """It compares values."""
        return False

    def _estimate(self, instance: Instance, state: EstimatorState) -> MetaGradient:
        flat, unravel = ravel_pytree(instance.meta_params)
        # A stream of its own: the minibatch sequence uses the key itself.
        keys = jax.random.split(jax.random.fold_in(instance.key, 0x5EED), self.num_pairs)
        sigma = jnp.asarray(self.sigma, flat.dtype)

        def sample(key: jax.Array) -> tuple[jax.Array, _Learned]:
            direction = jax.random.normal(key, flat.shape, flat.dtype)
            points = jnp.stack([flat + sigma * direction, flat - sigma * direction])
            pair = jax.vmap(lambda x: _learn(self.solver, instance, unravel(x), state))(points)
            slope = (pair.outer_loss[0] - pair.outer_loss[1]).astype(flat.dtype) / (2 * sigma)
            return slope * direction, pair

        samples, pairs = jax.lax.map(sample, keys, batch_size=min(self.batch_size, self.num_pairs))
        grad = jnp.mean(samples, axis=0)
        standard_error = jnp.sqrt(jnp.sum(jnp.var(samples, axis=0, ddof=1)) / self.num_pairs)
        size = jnp.linalg.norm(grad)
        error = standard_error / jnp.where(size > 0, size, 1)
        return _result(self.solver, instance, state, unravel(grad), pairs, error, Status.APPROXIMATE)

    def _sees(self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
        """Everything that learning or judging depends on."""
        by_loss = super()._sees(problem, params, meta_params, task)
        return any_of(by_loss, *_sees_beyond_losses(self.solver, problem, params, meta_params, task))


def _learn_fully(solver: InnerSolver, instance: Instance, meta_params: MetaParams, state: EstimatorState) -> Solution:
    here = Instance(instance.problem, meta_params, instance.task, instance.key, instance.dtype)
    init = instance.problem.init(meta_params, instance.task)
    memory = solver.bind(meta_params).init_memory(init)
    model_state = instance.problem.first_model_state(meta_params, instance.task)
    return here.free_phase(solver, state._replace(params=init, memory=memory, model_state=model_state))


def _learn(solver: InnerSolver, instance: Instance, meta_params: MetaParams, state: EstimatorState) -> _Learned:
    solution = _learn_fully(solver, instance, meta_params, state)
    outer_loss = instance.problem.at(solution.model_state).outer(solution.params, meta_params, instance.task)
    return _Learned(outer_loss, solution.num_gradients, solution.status)


def _result(
    solver: InnerSolver,
    instance: Instance,
    state: EstimatorState,
    grad: MetaParams,
    learned: _Learned,
    error: Any,
    status: Status,
) -> MetaGradient:
    free = _learn_fully(solver, instance, instance.meta_params, state)
    return result_of_learning(
        instance.at(free.model_state),
        state,
        free,
        grad,
        num_gradients=free.num_gradients + jnp.sum(learned.num_gradients, dtype=jnp.int32),
        status=worst(status, learned.status),
        error=error,
    )


def _sees_beyond_losses(
    solver: InnerSolver, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task
) -> list[list[bool]]:
    return [
        seen_in_start(problem, meta_params, task),
        seen_in_model_state(problem, params, meta_params, task),
        seen_in_settings(solver, params, meta_params),
    ]
