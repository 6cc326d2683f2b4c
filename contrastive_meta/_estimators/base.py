"""One interface and one result for every meta-gradient estimator."""

import abc
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._control import varying
from contrastive_meta._dependence import leaf_names
from contrastive_meta._estimators._derivative import guarded, with_derivative
from contrastive_meta._estimators._visibility import (
    any_of,
    gradient_reaches_params,
    seen_in_inner_loss,
    seen_in_outer_loss,
    seen_in_penalty,
)
from contrastive_meta._instance import Instance
from contrastive_meta._problem import (
    BilevelProblem,
    MetaParams,
    Params,
    Task,
    as_float_arrays,
    check_same_structure,
    float_dtype_of,
    same_arrays,
    strongly_typed,
)
from contrastive_meta._result import EstimatorState, MetaGradient
from contrastive_meta._solvers.base import InnerSolver
from contrastive_meta._stages import last_stage, last_stage_of_each

Prepare = Callable[..., tuple[Instance, EstimatorState]]


class MetaGradientEstimator(abc.ABC):
    """A way to estimate dPhi/dtheta, the gradient of the outer loss after learning.

    Subclasses are final strategies with a `solver` field and one method, `_estimate`.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.Contrastive(cm.LBFGS()), cm.MetaGradientEstimator)
      True
    """

    solver: InnerSolver

    def __post_init__(self) -> None:
        """Refuse what cannot be a part. What JAX puts in the place of parts, when it handles trees, passes."""
        for field, kind in self._parts().items():
            part = getattr(self, field, None)
            if isinstance(part, optax.GradientTransformation | optax.MultiSteps | type):
                raise self._wrong_part(field, kind, part)

    def estimate(
        self,
        problem: BilevelProblem,
        meta_params: MetaParams,
        task: Task,
        *,
        state: EstimatorState | None = None,
        key: jax.Array | None = None,
    ) -> MetaGradient:
        """Learn one task and estimate the meta-gradient there.

        Compiled once per problem, estimator structure and shapes: new numbers in any argument, beta included, do
        not recompile.

        Args:
          problem: the bilevel problem.
          meta_params: pytree of real floating arrays.
          task: a single task: pytree of arrays.
          state: `result.state` of an earlier call, or `init_state(...)`: learning starts from its solution and model
            state, with its memory if it was the same solver's.
          key: PRNG key of the minibatch sequence and of sampling estimators; `jax.random.key(0)` by default.

        Returns:
          The meta-gradient, with the free-phase solution and diagnostics. `jax.grad` of `result.outer_loss` in
          `meta_params` gives `result.grad`. That is the only derivative. Those of `result.grad`, `result.params` and
          `result.aux`, second ones, and those in `task` or in values the losses close over raise TypeError in reverse
          mode, and are NaN in forward mode. `result.state` and `result.diagnostics` count as constants.

        Raises:
          TypeError: a loss is not a floating scalar; params or meta-parameters are not floating arrays; an argument
            or a part of the estimator is not of its kind.
          ValueError: trees do not match, or none of the meta-parameters can be seen by this estimator.
        """
        self._check_parts(problem)
        meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
        key = jax.random.key(0) if key is None else key
        with jax.default_matmul_precision("highest"):
            result: MetaGradient = _estimate(self, problem, meta_params, task, state, key)
        return result

    def _estimate_batch(
        self,
        problem: BilevelProblem,
        meta_params: MetaParams,
        tasks: Task,
        keys: jax.Array,
        states: EstimatorState | None = None,
    ) -> MetaGradient:
        """`estimate` of each task of a batch, along a leading axis; nothing runs for all that a single task needs."""
        self._check_parts(problem)
        meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
        with jax.default_matmul_precision("highest"):
            results: MetaGradient = _estimate_batch(self, problem, meta_params, tasks, states, keys)
        return results

    def init_state(self, problem: BilevelProblem, meta_params: MetaParams, task: Task) -> EstimatorState:
        """A state that carries nothing yet, in the structure of every later one: a `scan` carry.

        Args:
          problem: the bilevel problem.
          meta_params: as in `estimate`.
          task: as in `estimate`.
        """
        meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
        params = problem.init(meta_params, task)
        memory = self.solver.bind(meta_params).init_memory(params)
        dtype = float_dtype_of(problem, params, meta_params, task)
        model_state = problem.first_model_state(meta_params, task)
        fresh: EstimatorState = strongly_typed(EstimatorState.fresh(params, memory, dtype, model_state))
        return fresh

    def _check_parts(self, problem: Any) -> None:
        """Raise TypeError where the problem or a part of the estimator is something else."""
        if not isinstance(problem, BilevelProblem):
            raise TypeError(
                f"The first argument of `estimate` is the problem: expected a BilevelProblem, got {_kind(problem)}. "
                "The order is `estimate(problem, meta_params, task)`."
            )
        for field, kind in self._parts().items():
            part = getattr(self, field)
            if not isinstance(part, kind):
                raise self._wrong_part(field, kind, part)

    def _wrong_part(self, field: str, kind: Any, part: Any) -> TypeError:
        wanted = " or ".join(cls.__name__ for cls in (kind if isinstance(kind, tuple) else (kind,)))
        return TypeError(
            f"`{type(self).__name__}.{field}` must be an instance of {wanted}; got {_kind(part)}. Call a class or a "
            "function to make one; an optax optimiser becomes a solver by `OptaxDescent(optimizer, num_steps=...)`."
        )

    def _parts(self) -> dict[str, Any]:
        """What each field that holds a strategy must be an instance of."""
        return {"solver": InnerSolver}

    @property
    def _pulls_outer_loss_back(self) -> bool:
        """Whether the gradient of the outer loss in `params` is how this estimator sees what was learned."""
        return True

    @abc.abstractmethod
    def _estimate(self, instance: Instance, state: EstimatorState) -> MetaGradient:
        """The estimate, under jit, with everything validated."""

    def _estimate_each(self, prepare: Prepare, inputs: tuple[Any, ...]) -> MetaGradient:
        """The estimates of a batch of tasks, under jit, along a leading axis.

        Args:
          prepare: from the inputs of one task to what `_estimate` takes.
          inputs: with a leading axis of tasks.
        """
        estimates: MetaGradient = jax.vmap(lambda *of_one: self._estimate(*prepare(*of_one)))(*inputs)
        return estimates

    def _without_estimate(self) -> "MetaGradientEstimator":
        """The same estimator for callers who do not look at its diagnostics."""
        return self

    def _sees(self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> list[bool]:
        """For each leaf of `meta_params`, whether this estimator can see it; by default, if a loss depends on it."""
        return any_of(
            seen_in_inner_loss(problem, params, meta_params, task),
            seen_in_outer_loss(problem, params, meta_params, task),
            seen_in_penalty(self.solver, params, meta_params),
        )


@functools.partial(jax.jit, inline=True)
def _estimate(
    estimator: MetaGradientEstimator,
    problem: BilevelProblem,
    meta_params: MetaParams,
    task: Task,
    state: EstimatorState | None,
    key: jax.Array,
) -> MetaGradient:
    # In `jax.shard_map` each device has a meta-gradient of its own, where JAX would add up those of all.
    meta_params, task, state, key = varying((meta_params, task, state, key))
    # The estimate is the derivative: nothing is differentiated through the phases by accident.
    held_meta, held_task, held_state = jax.lax.stop_gradient((meta_params, task, state))
    rest, staged, pull_back = last_stage(problem, held_meta, held_task)
    instance, start = _prepared(estimator, rest, staged, held_task, held_state, key)
    unseen = _unseen(estimator, problem, start.params, held_meta, held_task)
    result = estimator._estimate(instance, start)
    return _finished(dataclasses.replace(result, grad=pull_back(result.grad)), unseen, meta_params, task)


@functools.partial(jax.jit, inline=True)
def _estimate_batch(
    estimator: MetaGradientEstimator,
    problem: BilevelProblem,
    meta_params: MetaParams,
    tasks: Task,
    states: EstimatorState | None,
    keys: jax.Array,
) -> MetaGradient:
    if keys.shape[0] == 1:
        # A batch of one is a single estimate: nothing is mapped.
        task, state, key = jax.tree.map(lambda xs: xs[0], (tasks, states, keys))
        result = _estimate(estimator, problem, meta_params, task, state, key)
        lonely: MetaGradient = jax.tree.map(lambda x: x[None], result)
        return lonely
    meta_params, tasks, states, keys = varying((meta_params, tasks, states, keys))
    held_meta, held_tasks, held_states = jax.lax.stop_gradient((meta_params, tasks, states))
    rest, staged, pull_back = last_stage_of_each(problem, held_meta, held_tasks)
    unseen: list[str] = []

    def prepare(
        task: Task, state: EstimatorState | None, key: jax.Array, own: MetaParams = held_meta
    ) -> tuple[Instance, EstimatorState]:
        return _prepared(estimator, rest, own, task, state, key)

    def find_unseen(task: Task, *others: Any) -> jax.Array:
        _, start = prepare(task, *others)
        unseen[:] = _unseen(estimator, problem, start.params, held_meta, task)
        return jnp.zeros(())

    inputs = held_tasks, held_states, keys, *staged
    jax.eval_shape(find_unseen, *jax.tree.map(lambda xs: xs[0], inputs))
    results = estimator._estimate_each(prepare, inputs)
    results = dataclasses.replace(results, grad=pull_back(results.grad))
    finished: MetaGradient = jax.vmap(lambda result, task: _finished(result, tuple(unseen), meta_params, task))(
        results, tasks
    )
    return finished


def _prepared(
    estimator: MetaGradientEstimator,
    problem: BilevelProblem,
    meta_params: MetaParams,
    task: Task,
    state: EstimatorState | None,
    key: jax.Array,
) -> tuple[Instance, EstimatorState]:
    """What an estimator works on, and a state that it may start from."""
    fresh = estimator.init_state(problem, meta_params, task)
    if state is None:
        state = fresh
    check_same_structure(
        state.params, fresh.params, "`state.params`", "Pass the state of an earlier estimate of the same problem."
    )
    check_same_structure(
        state.model_state,
        fresh.model_state,
        "`state.model_state`",
        "Pass what `init_model_state` returns, moved or not.",
    )
    if not same_arrays(state.memory, fresh.memory):
        # The memory of another solver, or of other settings: its solution is still a good start.
        state = state._replace(memory=fresh.memory)
    # One task of NaN must not spoil the tasks after it.
    start, memory, model_state = tree.where(
        tree.all_finite((state.params, tree.floating(state.model_state))),
        (state.params, state.memory, state.model_state),
        (fresh.params, fresh.memory, fresh.model_state),
    )
    state = state._replace(params=start, memory=memory, model_state=model_state)
    dtype = float_dtype_of(problem, state.params, meta_params, task)
    return Instance(problem, meta_params, task, key, dtype), state


def _finished(result: MetaGradient, unseen: tuple[str, ...], meta_params: MetaParams, task: Task) -> MetaGradient:
    """The result as users get it."""
    check_same_structure(
        result.grad, meta_params, "The meta-gradient", "A rule's `statistic` must return a pytree like `meta_params`; "
        "return zeros for meta-parameters that it leaves alone."
    )  # fmt: skip
    # Estimators that sample would leave noise there.
    leaves = zip(leaf_names(meta_params), jax.tree.leaves(result.grad), strict=True)
    grad = jax.tree.unflatten(
        jax.tree.structure(meta_params), [jnp.zeros_like(leaf) if name in unseen else leaf for name, leaf in leaves]
    )
    held = jax.lax.stop_gradient(grad)
    return MetaGradient(
        grad=guarded(grad, (meta_params, task)),
        outer_loss=with_derivative(guarded(result.outer_loss, task), held, meta_params),
        params=guarded(result.params, (meta_params, task)),
        state=jax.lax.stop_gradient(strongly_typed(result.state)),
        diagnostics=jax.lax.stop_gradient(result.diagnostics),
        aux=guarded(result.aux, (meta_params, task)),
        unseen=unseen,
    )


def _unseen(
    estimator: MetaGradientEstimator, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task
) -> tuple[str, ...]:
    names = leaf_names(meta_params)
    seen = estimator._sees(problem, params, meta_params, task)
    unseen = tuple(name for name, visible in zip(names, seen, strict=True) if not visible)
    name = type(estimator).__name__
    remedy = (
        "Only BackpropThroughLearning sees the initialisation and the optimiser's settings; FirstOrder and Reptile see "
        "the initialisation. To learn an initialisation with the others, anchor `params` to it in the inner loss."
    )
    if names and len(unseen) == len(names):
        raise ValueError(
            f"{name} sees none of the meta-parameters: nothing it looks at depends on {', '.join(unseen)}, so the "
            f"meta-gradient would be identically zero. {remedy}"
        )
    if estimator._pulls_outer_loss_back and not gradient_reaches_params(problem, params, meta_params, task):
        warnings.warn(
            f"No gradient of the outer loss reaches `params`, so {name} finds nothing that is learned through them: "
            "its meta-gradient is how the outer loss depends on meta-parameters directly, and zero where it does not. "
            "An error rate, a rounding or `stop_gradient` has no gradient: take a smooth loss, such as a "
            "cross-entropy, or use `FiniteDifference` or `EvolutionStrategies`, which compare values.",
            UserWarning,
            stacklevel=4,
        )
    if unseen:
        warnings.warn(
            f"{name} cannot see the meta-parameters {', '.join(unseen)}: their gradient is an exact zero. {remedy}",
            UserWarning,
            stacklevel=4,
        )
    return unseen


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
