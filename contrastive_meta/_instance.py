"""One bilevel problem at one point, and its free phase: what every estimator works on."""

from typing import Any

import jax

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import BilevelProblem, MetaParams, ModelState, Params, Task, check_same_structure
from contrastive_meta._pytree import static, strategy
from contrastive_meta._result import EstimatorState
from contrastive_meta._solvers.base import InnerSolver, MinibatchLoss, MovingLosses, Solution, Stop


@strategy
class Instance:
    """One bilevel problem at one point: what an estimator works on.

    Attributes:
      problem: the losses.
      meta_params: theta.
      task: the task.
      key: randomness of minibatches, and of estimators that sample.
      dtype: real floating dtype of the inner loss.
    """

    problem: BilevelProblem
    meta_params: MetaParams
    task: Task
    key: jax.Array
    dtype: Any = static()

    def replace_problem(self, problem: BilevelProblem) -> "Instance":
        """The same setting with other losses."""
        return Instance(problem, self.meta_params, self.task, self.key, self.dtype)

    def at(self, model_state: ModelState) -> "Instance":
        """The same setting, the model state held where the free phase left it: what comes after cannot move it."""
        return self.replace_problem(self.problem.at(model_state))

    def in_dtype_of_loss(self) -> "Instance":
        """The same setting, no meta-parameter coarser than the losses: it would round what a phase measures."""
        fine = tree.at_least(self.meta_params, self.dtype)
        return Instance(self.problem, fine, self.task, self.key, self.dtype)

    def flattened(self, flattening: tree.Flattening) -> "Instance":
        """The same setting for flattened `params`."""
        problem, unflatten = self.problem, flattening.unflatten
        sample = problem.sample
        return self.replace_problem(
            BilevelProblem(
                lambda params, meta_params, task: problem.inner_loss(unflatten(params), meta_params, task),
                lambda params, meta_params, task: problem.outer_loss(unflatten(params), meta_params, task),
                lambda meta_params, task: flattening.flatten(problem.init_params(meta_params, task)),
                has_aux=problem.has_aux,
                sample=sample,
            )
        )

    def inner(self, params: Params) -> jax.Array:
        """The inner loss on the whole task."""
        return self.problem.inner(params, self.meta_params, self.task)

    def outer(self, params: Params) -> jax.Array:
        """The outer loss."""
        return self.problem.outer(params, self.meta_params, self.task)

    def norm(self, values: Params) -> jax.Array:
        """The Euclidean norm, in the dtype of the inner loss whatever that of `params`."""
        return tree.norm(values).astype(self.dtype)

    def nudged(self, params: Params, beta: Any) -> jax.Array:
        """The nudged loss on the whole task."""
        return self.problem.nudged(params, self.meta_params, self.task, beta)

    def inner_minibatch(self, params: Params, step: Any) -> jax.Array:
        """The inner loss on the minibatch of a step."""
        return self.problem.inner(params, self.meta_params, self.problem.minibatch(self.key, self.task, step))

    def moving_losses(self) -> MovingLosses:
        """The inner loss as it moves the model state."""

        def loss(params: Params, model_state: ModelState) -> tuple[jax.Array, ModelState]:
            return self.problem.moved(params, self.meta_params, self.task, model_state)

        def on_minibatch(params: Params, model_state: ModelState, step: Any) -> tuple[jax.Array, ModelState]:
            task = self.problem.minibatch(self.key, self.task, step)
            return self.problem.moved(params, self.meta_params, task, model_state)

        return MovingLosses(loss, None if self.problem.sample is None else on_minibatch)

    @property
    def _minibatch_loss(self) -> MinibatchLoss | None:
        """As learners take it."""
        return None if self.problem.sample is None else self.inner_minibatch

    def learn_on(self, solver: InnerSolver, params: Params, stop: Stop, memory: Any = ()) -> Solution:
        """Go on minimising the inner loss, without a nudge, from where learning stopped.

        Args:
          solver: bound to the meta-parameters.
          params: where learning stopped.
          stop: when to end now.
          memory: of the learner there; by default it starts afresh.
        """
        return solver.solve(self.inner, params, minibatch_loss=self._minibatch_loss, memory=memory, stop=stop)

    def free_phase(self, solver: InnerSolver, state: EstimatorState) -> Solution:
        """Learn: minimise the inner loss from where `state` stands.

        Where the problem has a model state, `solution.model_state` is what to hold from then on: `setting.at(...)`.
        """
        if self.problem.init_model_state is None:
            solution = solver.solve_free(
                self.inner,
                state.params,
                self.meta_params,
                self.task,
                minibatch_loss=self._minibatch_loss,
                memory=state.memory,
            )
        else:
            solution = solver.bind(self.meta_params).solve_with_state(
                self.moving_losses(), state.params, state.model_state, memory=state.memory
            )
        check_same_structure(
            solution.params,
            state.params,
            "The solver's solution",
            "It must be a pytree like what `init_params` returns.",
        )
        return solution
