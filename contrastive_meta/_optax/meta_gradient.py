"""An optax link that makes the meta-gradient: what comes after it in a chain sees an ordinary gradient."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._batch import count_tasks, mean_of_usable, sum_over_tasks, without_failed
from contrastive_meta._control import cast_like
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._optax._interop import completed, hides, no_diagnostics, required, show, summary
from contrastive_meta._problem import BilevelProblem, MetaParams, Task, as_float_arrays, check_same_structure
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._result import USABLE, Diagnostics, EstimatorState, Status
from contrastive_meta._sharding import along_tasks, as_laid_out, leave_to_compiler


class MetaGradientState(NamedTuple):
    """What `meta_gradient` keeps between updates: plain arrays, of one structure from `init` on.

    Attributes:
      num_updates: updates made, int32; the PRNG key of an update follows from it.
      inner: `EstimatorState` of each task along a leading axis (solution, learner's memory, response, nudging
        strength, model state), where the next update starts; () without `warm_start`.
      outer_loss: mean outer loss of the last update; infinite before the first, and where all tasks were left out.
      diagnostics: of the last update over all tasks: gradients and products added up, of everything else the largest.
      num_failed: tasks of the last update whose status is neither `CONVERGED` nor allowed, int32.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.MetaGradientState._fields[0]
      'num_updates'
    """

    num_updates: jax.Array
    inner: EstimatorState | tuple[()]
    outer_loss: jax.Array
    diagnostics: Diagnostics
    num_failed: jax.Array


def meta_gradient(
    problem: BilevelProblem,
    estimator: MetaGradientEstimator,
    *,
    batch_size: int | None = None,
    warm_start: Task | None = None,
    on_failure: Literal["keep", "zero"] = "keep",
    allow: tuple[Status, ...] = USABLE,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """The meta-gradient as a link of an optax chain: the mean over the leading axis of `tasks`.

    `tx.update(None, state, meta_params, tasks=tasks)` gives what `value_and_meta_grad` gives; a gradient passed instead
    of None, such as that of a penalty on the meta-parameters, is added to it. Optional extra arguments: `key`, the PRNG
    key of this update; `unmasked`, the whole of the meta-parameters where `optax.masked` or `optax.multi_transform`
    show the link only a part (these take a gradient, zeros for none). Others are ignored.

    Args:
      problem: the bilevel problem of one task.
      estimator: any estimator.
      batch_size: how many tasks learn at once, the rest waiting; None for all. Memory grows with it.
      warm_start: a batch like `tasks`. Task number i of an update then starts where number i of the update before
        ended, the first time where `init_params` says for this batch. None starts afresh every time.
      on_failure: what becomes of tasks with a status that is neither `CONVERGED` nor in `allow`. "keep": nothing, the
        status is in the state. "zero": they contribute nothing, and the mean is taken over the others; 0 if none is
        left.
      allow: statuses that are no failure, besides `CONVERGED`.
      seed: of the PRNG keys that minibatches and sampling estimators draw with.

    Returns:
      A transformation whose state is a `MetaGradientState`.

    Raises:
      TypeError: a problem or an estimator that is none.
      ValueError: an unknown `on_failure`; and by `update`: no `tasks` or no meta-parameters, or a batch of another
        length than `warm_start`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, anchor, task: 0.5 * jnp.sum((w - task) ** 2 + (w - anchor) ** 2),
      ...     outer_loss=lambda w, anchor, task: 0.5 * jnp.sum((w - 1.0) ** 2),
      ...     init_params=lambda anchor, task: jnp.zeros_like(task),
      ... )
      >>> estimator = cm.Contrastive(cm.OptaxDescent(optax.sgd(0.4), num_steps=50))
      >>> tx = optax.chain(cm.meta_gradient(problem, estimator), optax.clip_by_global_norm(0.5), optax.sgd(1.0))
      >>> state = tx.init(jnp.array(0.0))
      >>> updates, state = tx.update(None, state, jnp.array(0.0), tasks=jnp.array([4.0, 6.0]))  # the gradient is 0.75
      >>> round(float(updates), 3)
      -0.5
    """
    if on_failure not in ("keep", "zero"):
        raise ValueError(
            f'`on_failure` of `meta_gradient` is "keep" or "zero"; got {on_failure!r}. To skip the update of what '
            'follows in the chain, use `meta_optimizer(..., on_failure="skip")`.'
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")
    if not isinstance(estimator, MetaGradientEstimator):
        raise TypeError(f"`estimator` must be an estimator, such as `Contrastive(solver)`; got {estimator!r}.")
    estimator._check_parts(problem)
    batch = _Batch(problem, estimator, batch_size, on_failure == "zero", warm_start is not None, tuple(allow), seed)

    def init(meta_params: MetaParams) -> MetaGradientState:
        return batch.init(meta_params, warm_start)

    def update(
        updates: MetaParams | None,
        state: MetaGradientState,
        params: MetaParams | None = None,
        *,
        tasks: Task | None = None,
        unmasked: MetaParams | None = None,
        key: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[MetaParams, MetaGradientState]:
        visible = required(params, "params", "Pass the meta-parameters as the third argument.")
        tasks = required(tasks, "tasks", "Pass a batch of tasks, `tx.update(None, state, meta_params, tasks=tasks)`.")
        grad, state = _update(batch, completed(visible, unmasked, "meta_params"), tasks, state, key)
        grad = show(grad, visible)
        return (grad if updates is None else _added(updates, grad)), state

    return optax.GradientTransformationExtraArgs(init, update)


@strategy
class _Batch:
    """The settings of a `meta_gradient`."""

    problem: BilevelProblem
    estimator: MetaGradientEstimator
    batch_size: int | None = static()
    drops_failed: bool = static()
    is_warm: bool = static()
    allow: tuple[Status, ...] = static()
    seed: int = 0

    def init(self, meta_params: MetaParams, warm_start: Task | None) -> MetaGradientState:
        """Nothing learned, nothing to report."""
        meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
        diagnostics = no_diagnostics(meta_params)
        nothing = jnp.full_like(diagnostics.beta, jnp.inf)
        inner: EstimatorState | tuple[()] = ()
        if self.is_warm:
            if hides(meta_params):
                raise ValueError(
                    "`warm_start` needs all meta-parameters where the state is made, and a mask hides some of them: "
                    "put `optax.masked` or `optax.multi_transform` around the wrapped optimizer instead."
                )
            count_tasks(warm_start)

            def fresh(meta_params: MetaParams, tasks: Task) -> EstimatorState:
                return jax.vmap(lambda task: self.estimator.init_state(self.problem, meta_params, task))(tasks)

            inner = leave_to_compiler(fresh, (meta_params, warm_start), lambda mesh: along_tasks(warm_start, mesh))
        return MetaGradientState(jnp.int32(0), inner, nothing, diagnostics, jnp.int32(0))

    def of_batch(
        self, meta_params: MetaParams, tasks: Task, keys: jax.Array, states: EstimatorState | tuple[()]
    ) -> tuple[PyTree, PyTree]:
        """What is added up of each task, and what is kept of it."""
        starts = states if isinstance(states, EstimatorState) else None
        results = self.estimator._estimate_batch(self.problem, meta_params, tasks, keys, starts)
        added = without_failed(
            (results.outer_loss, results.grad), results.diagnostics.status, self.allow, self.drops_failed
        )
        return added, (results.diagnostics, results.state if self.is_warm else ())


@functools.partial(jax.jit, inline=True)
def _update(
    batch: _Batch, meta_params: MetaParams, tasks: Task, state: MetaGradientState, key: jax.Array | None
) -> tuple[MetaParams, MetaGradientState]:
    everything = batch, meta_params, tasks, state, key
    return leave_to_compiler(_over_tasks, everything, lambda mesh: as_laid_out((meta_params, state), mesh))


def _over_tasks(
    batch: _Batch, meta_params: MetaParams, tasks: Task, state: MetaGradientState, key: jax.Array | None
) -> tuple[MetaParams, MetaGradientState]:
    num_tasks = count_tasks(tasks)
    if batch.is_warm and count_tasks(state.inner) != num_tasks:
        raise ValueError(
            f"`tasks` must be as many as `warm_start` was made of: expected {count_tasks(state.inner)}, got "
            f"{num_tasks}. Leave `warm_start` out where batches differ in size."
        )
    key = jax.random.fold_in(jax.random.key(batch.seed), state.num_updates) if key is None else key
    keys = jax.random.split(key, num_tasks)
    total, (diagnostics, inner) = sum_over_tasks(
        lambda *inputs: batch.of_batch(meta_params, *inputs),
        (tasks, keys, state.inner),
        num_tasks,
        batch.batch_size or num_tasks,
    )
    outer_loss, grad, num_failed = mean_of_usable(total, num_tasks, batch.drops_failed)
    new = MetaGradientState(
        num_updates=state.num_updates + 1,
        inner=inner,
        outer_loss=outer_loss,
        diagnostics=summary(diagnostics, state.diagnostics),
        num_failed=num_failed,
    )
    return grad, cast_like(new, state)


def _added(given: MetaParams, grad: MetaParams) -> MetaParams:
    check_same_structure(
        given, grad, "The gradient passed to `update`", "Pass None, or a pytree like the meta-parameters."
    )
    return tree.add(given, grad)
