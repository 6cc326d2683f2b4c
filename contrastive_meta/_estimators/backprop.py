"""Backprop through learning: the derivative of the solver's own steps."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from contrastive_meta import _pytree as tree
from contrastive_meta._estimators._visibility import (
    any_of,
    seen_in_model_state,
    seen_in_settings,
    seen_in_start,
)
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._instance import Instance
from contrastive_meta._problem import BilevelProblem, MetaParams, ModelState, Params, Task
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import EstimatorState, MetaGradient, Status, flag, make_diagnostics, worst
from contrastive_meta._solvers.base import InnerSolver, UnrolledLosses, final_status
from contrastive_meta._symmetry import LARGEST_ASYMMETRY, asymmetry_of


@strategy
class BackpropThroughLearning(MetaGradientEstimator):
    """The exact derivative of the outer loss after the steps that the solver takes, whether or not they converge.

    It alone sees the initialisation (through `init_params`), the optimiser's settings (through
    `OptaxDescent(lambda meta_params: ...)`), and what learning makes of a model state, through which it differentiates.
    Reverse mode keeps every iterate, and takes the gradients again on the way back: memory grows with the number of
    steps, by `params` and what the optimiser computes of their gradient. Learning always starts from `init_params`
    and `init_model_state`, whatever `state` holds, because the start is differentiated.

    Args:
      solver: a learner with a fixed number of steps, or a differentiable `CallableSolver`; in forward mode any solver
        made of JAX operations.
      truncate: differentiate only the last `truncate` steps. The initialisation is then out of sight.
      checkpoint: keep every sqrt(num_steps)-th iterate and recompute the rest: one more forward pass, memory of
        order sqrt(num_steps).
      forward_mode: forward-mode derivatives, one for each entry of `meta_params`: memory constant in the number of
        steps, time proportional to the number of meta-parameters.

    Raises:
      TypeError: the solver cannot be unrolled.
      ValueError: `forward_mode` together with `truncate` or `checkpoint`, which are reverse mode's.

    Reference:
      Maclaurin, Duvenaud & Adams (2015); Franceschi et al. (2017), reverse and forward mode; Shaban et al. (2019),
      truncation.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, rate, task: 0.5 * jnp.sum((w - task) ** 2),
      ...     outer_loss=lambda w, rate, task: 0.5 * jnp.sum(w**2),
      ...     init_params=lambda rate, task: jnp.zeros_like(task),
      ... )
      >>> solver = cm.OptaxDescent(lambda rate: optax.sgd(rate), num_steps=1)
      >>> result = cm.BackpropThroughLearning(solver).estimate(problem, jnp.array(0.5), jnp.array([1.0]))
      >>> float(result.grad)  # w = rate * 1, so d(w^2 / 2)/d rate = rate
      0.5
    """

    solver: InnerSolver
    truncate: int | None = static(default=None)
    checkpoint: bool = static(default=False)
    forward_mode: bool = static(default=False)

    def __post_init__(self) -> None:
        """Check that the options go together."""
        super().__post_init__()
        if self.forward_mode and (self.truncate is not None or self.checkpoint):
            raise ValueError("`forward_mode` stores no trajectory: leave out `truncate` and `checkpoint`.")
        if self.truncate is not None and self.truncate < 1:
            raise ValueError(f"`truncate` must be at least 1 step; got {self.truncate}.")

    @property
    def _pulls_outer_loss_back(self) -> bool:
        """In forward mode a loss need not be one that reverse mode differentiates."""
        return not self.forward_mode

    def _estimate(self, instance: Instance, state: EstimatorState) -> MetaGradient:
        def learned(meta_params: MetaParams) -> tuple[jax.Array, tuple[Params, ModelState, Any]]:
            params, model_state = self._learn(instance, meta_params)
            held = instance.problem.at(model_state)
            outer_loss, aux = held.outer_with_aux(params, meta_params, instance.task)
            return outer_loss, (params, model_state, aux)

        if self.forward_mode:
            (outer_loss, (params, model_state, aux)), grad = _forward_value_and_grad(learned, instance.meta_params)
        else:
            (outer_loss, (params, model_state, aux)), grad = jax.value_and_grad(learned, has_aux=True)(
                instance.meta_params
            )

        instance = instance.at(model_state)
        init = instance.problem.init(instance.meta_params, instance.task)
        first_loss, first_grad = tree.value_and_grad(instance.inner)(init)
        loss, inner_grad = tree.value_and_grad(instance.inner)(params)
        residual, scale = tree.norm(inner_grad), tree.or_one(tree.norm(params)).astype(instance.dtype)
        asymmetry = asymmetry_of(instance, params, jax.tree.map(jnp.ones_like, params), scale)
        num_steps = getattr(self.solver, "num_steps", None)
        truncated = self.truncate is not None and num_steps is not None and self.truncate < num_steps
        return MetaGradient(
            grad=grad,
            outer_loss=outer_loss,
            params=params,
            state=state._replace(params=params, model_state=model_state),
            aux=aux,
            diagnostics=make_diagnostics(
                instance.dtype,
                free_residual=residual,
                num_gradients=self._num_gradients(num_steps) + 2,
                num_hvps=min(self.truncate or num_steps or 0, num_steps or 0),
                status=worst(
                    final_status(first_loss, tree.norm(first_grad), params, loss, residual),
                    flag(jnp.asarray(truncated), Status.APPROXIMATE),
                    flag(asymmetry > LARGEST_ASYMMETRY, Status.INCONSISTENT_GRADIENT),
                    flag(~tree.all_finite(grad), Status.NOT_FINITE),
                ),
            ),
        )

    def _learn(self, instance: Instance, meta_params: MetaParams) -> tuple[Params, ModelState]:
        """Learning, the model state with it, as a function of the meta-parameters."""
        solver = self.solver.bind(meta_params)
        here = Instance(instance.problem, meta_params, instance.task, instance.key, instance.dtype)
        fixed = Instance(
            instance.problem, jax.lax.stop_gradient(meta_params), instance.task, instance.key, instance.dtype
        )
        init = instance.problem.init(meta_params, instance.task)
        if instance.problem.init_model_state is not None:
            first = instance.problem.first_model_state(meta_params, instance.task)
            if self.forward_mode:
                solution = solver.solve_with_state(here.moving_losses(), init, first)
                return solution.params, solution.model_state
            both = here.moving_losses(), fixed.moving_losses()
            return solver.solve_differentiably_with_state(
                *both, init, first, truncate=self.truncate, checkpoint=self.checkpoint
            )
        stochastic = instance.problem.sample is not None
        if self.forward_mode:
            minibatch = here.inner_minibatch if stochastic else None
            return solver.solve(here.inner, init, minibatch_loss=minibatch).params, ()
        losses = UnrolledLosses(
            loss=here.inner,
            minibatch_loss=here.inner_minibatch if stochastic else None,
            detached=fixed.inner_minibatch,
        )
        return solver.solve_differentiably(losses, init, truncate=self.truncate, checkpoint=self.checkpoint), ()

    def _num_gradients(self, num_steps: int | None) -> int:
        """Gradients of the forward pass; checkpointing repeats it. One taken again for its product belongs to that."""
        steps = num_steps or 0
        return 2 * steps if self.checkpoint else steps

    def _sees(self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
        """What any loss, the initialisation, the model state or the optimiser's settings depend on."""
        by_loss = super()._sees(problem, params, meta_params, task)
        by_settings = seen_in_settings(self.solver, params, meta_params)
        by_state = seen_in_model_state(problem, params, meta_params, task)
        if self.truncate is not None:
            return any_of(by_loss, by_settings, by_state)
        return any_of(by_loss, by_settings, by_state, seen_in_start(problem, meta_params, task))


def _forward_value_and_grad(function: Any, at: MetaParams) -> Any:
    """`value_and_grad(has_aux=True)` by one forward-mode pass for each entry, mapped together."""
    flat, unravel = ravel_pytree(at)

    def flat_function(x: jax.Array) -> Any:
        value, aux = function(unravel(x))
        return value, (value, aux)

    grad, (value, aux) = jax.jacfwd(flat_function, has_aux=True)(flat)
    return (value, aux), unravel(grad.astype(flat.dtype))
