"""Batches of tasks, by `value_and_meta_grad`, and `raise_if_failed` for statuses outside jit."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import scan
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._problem import BilevelProblem, MetaParams, Task
from contrastive_meta._pytree import PyTree
from contrastive_meta._result import USABLE, Diagnostics, MetaGradient, Status, failed
from contrastive_meta._sharding import along_tasks, as_laid_out, copied, leave_to_compiler

ValueAndMetaGrad = Callable[..., Any]


def value_and_meta_grad(
    problem: BilevelProblem,
    estimator: MetaGradientEstimator,
    *,
    batch_size: int | None = None,
    has_aux: bool = False,
    on_failure: Literal["keep", "zero"] = "keep",
    allow: tuple[Status, ...] = USABLE,
) -> ValueAndMetaGrad:
    """Outer loss and meta-gradient of a batch of tasks: the mean over the leading axis of `tasks`.

    The function returned takes `(meta_params, tasks, *, key=None)` and drops into any optax loop; it works under jit
    (where it should be used), vmap and scan.

    Args:
      problem: the bilevel problem of one task.
      estimator: any estimator.
      batch_size: how many tasks learn at once, the rest waiting; None for all. Memory grows with it. Where tasks are
        laid out over devices, a multiple of their number; otherwise tasks move between devices.
      has_aux: return `((value, diagnostics), grad)`, the diagnostics of each task along a leading axis; for problems
        with a model state `((value, (diagnostics, model_state)), grad)`, the state of each task likewise.
      on_failure: what becomes of tasks with a status that is neither `CONVERGED` nor in `allow`. "keep": nothing.
        "zero": they contribute nothing, and the mean is taken over the others; where none is left the meta-gradient is
        0 and the value infinite.
      allow: statuses that are no failure, besides `CONVERGED`.

    Returns:
      `(meta_params, tasks, *, key=None) -> (value, grad)`.

    Raises:
      ValueError: an unknown `on_failure`, a `batch_size` below 1; and when called: `tasks` has no leading axis, or
        leaves that disagree on its length.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, anchor, task: 0.5 * jnp.sum((w - task) ** 2 + (w - anchor) ** 2),
      ...     outer_loss=lambda w, anchor, task: 0.5 * jnp.sum((w - 1.0) ** 2),
      ...     init_params=lambda anchor, task: jnp.zeros_like(task),
      ... )
      >>> estimator = cm.Contrastive(cm.OptaxDescent(optax.sgd(0.4), num_steps=50))
      >>> step = jax.jit(cm.value_and_meta_grad(problem, estimator))
      >>> value, grad = step(jnp.array(0.0), jnp.array([4.0, 6.0]))  # w = 2 and 3, dw/danchor = 1/2
      >>> round(float(grad), 3)
      0.75
    """
    if on_failure not in ("keep", "zero"):
        raise ValueError(f'`on_failure` of `value_and_meta_grad` is "keep" or "zero"; got {on_failure!r}.')
    drops_failed = on_failure == "zero"
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1; got {batch_size}.")

    def evaluate(meta_params: MetaParams, tasks: Task, *, key: jax.Array | None = None) -> Any:
        def layout(mesh: Any) -> PyTree:
            value = (copied(mesh), along_tasks(tasks, mesh)) if has_aux else copied(mesh)
            return value, as_laid_out(meta_params, mesh)

        key = jax.random.key(0) if key is None else key
        return leave_to_compiler(over_tasks, (meta_params, tasks, key), layout)

    def over_tasks(meta_params: MetaParams, tasks: Task, key: jax.Array) -> Any:
        num_tasks = count_tasks(tasks)
        keys = jax.random.split(key, num_tasks)

        # Where nobody looks at the diagnostics, no error is estimated.
        chosen = estimator if has_aux else estimator._without_estimate()

        def batch(tasks: Task, keys: jax.Array) -> tuple[tuple[jax.Array, MetaParams], PyTree]:
            results = chosen._estimate_batch(problem, meta_params, tasks, keys)
            moved = has_aux and problem.init_model_state is not None
            kept = (results.diagnostics, results.model_state) if moved else results.diagnostics
            added = results.outer_loss, results.grad
            return without_failed(added, results.diagnostics.status, allow, drops_failed), kept

        total, kept = sum_over_tasks(batch, (tasks, keys), num_tasks, batch_size or num_tasks)
        value, grad, _ = mean_of_usable(total, num_tasks, drops_failed)
        return ((value, kept), grad) if has_aux else (value, grad)

    return evaluate


def without_failed(
    added: PyTree, status: jax.Array, allow: tuple[Status, ...], drops_failed: bool
) -> tuple[PyTree, jax.Array]:
    """What is added up of each task, with zeros for failed ones if they are dropped; and which have failed, int32."""
    bad = jax.vmap(lambda one: failed(one, allow))(status)
    if drops_failed:
        added = jax.vmap(tree.where)(bad, tree.zeros_like(added), added)
    return added, bad.astype(jnp.int32)


def mean_of_usable(
    total: tuple[PyTree, jax.Array], num_tasks: int, drops_failed: bool
) -> tuple[jax.Array, MetaParams, jax.Array]:
    """Mean outer loss and meta-gradient from the sum of `without_failed`, and how many tasks have failed."""
    added, num_failed = total
    num_left = num_tasks - num_failed
    value, grad = tree.scale(1 / jnp.maximum(num_left, 1) if drops_failed else 1 / num_tasks, added)
    return jnp.where(num_left > 0, value, jnp.inf) if drops_failed else value, grad, num_failed


def count_tasks(tasks: Task) -> int:
    """The length of the leading axis of a batch of tasks.

    Raises:
      ValueError: there is none, or leaves disagree.
    """
    shapes = [
        (jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(tasks)
    ]
    scalars = [name for name, shape in shapes if not shape]
    lengths = sorted({shape[0] for _, shape in shapes if shape})
    if scalars or len(lengths) != 1 or not lengths[0]:
        found = f"leaves without axes: {', '.join(scalars)}" if scalars else f"leading axes of lengths {lengths}"
        raise ValueError(
            f"`tasks` must be a batch: every leaf with the same leading axis of tasks; got {found}. "
            "For a single task use `jax.tree.map(lambda x: x[None], task)`, or `estimator.estimate`."
        )
    return int(lengths[0])


def sum_over_tasks(
    of_batch: Callable[..., tuple[PyTree, PyTree]], inputs: tuple[PyTree, ...], num_tasks: int, batch_size: int
) -> tuple[PyTree, PyTree]:
    """Sum batch by batch, so that only one batch of meta-gradients exists at a time.

    Tasks spread over devices stay where they are if `batch_size` and the number of tasks are multiples of theirs.

    Args:
      of_batch: from the inputs of a batch to what is summed over tasks and what is kept of each, both along a leading
        axis of tasks.
      inputs: its arguments, all with the same leading axis of tasks.
      num_tasks: the length of that axis.
      batch_size: how many tasks run at once.

    Returns:
      The sum, and what is kept along a leading axis of tasks.
    """
    size = min(batch_size, num_tasks)
    num_batches = num_tasks // size
    whole = num_batches * size

    def batch(chunk: Any) -> Any:
        added, kept = of_batch(*chunk)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), added), kept

    def accumulate(total: Any, chunk: Any) -> Any:
        added, kept = batch(chunk)
        return tree.add(total, added), kept

    if num_batches == 1 and whole == num_tasks:
        total, kept = batch(inputs)
        return total, kept

    # Batch k takes every num_batches-th task, from number k on: where tasks are spread over devices, each device then
    # has its share of every batch, and no task has to travel.
    columns = jax.tree.map(lambda x: x[:whole].reshape(size, num_batches, *x.shape[1:]), inputs)

    def column(k: Any) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, k, axis=1, keepdims=False), columns)

    first = jax.eval_shape(lambda: batch(column(0)))[0]
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, kept = scan(lambda total, k: accumulate(total, column(k)), zero, jnp.arange(num_batches))
    kept = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(whole, *x.shape[2:]), kept)
    if whole < num_tasks:
        total, rest = accumulate(total, jax.tree.map(lambda x: x[whole:], inputs))
        kept = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), kept, rest)
    return total, kept


class EstimateError(RuntimeError):
    """A meta-gradient that should not be used; its message names the status and the remedy.

    Example:
      >>> import contrastive_meta as cm
      >>> issubclass(cm.EstimateError, RuntimeError)
      True
    """


def raise_if_failed(result: MetaGradient | Diagnostics, *, allow: tuple[Status, ...] = USABLE) -> None:
    """Raise if a result's status says that it cannot be trusted. Outside jit: it looks at the values.

    Args:
      result: a meta-gradient, or its diagnostics, also those of a batch of tasks.
      allow: statuses that pass, besides `CONVERGED`.

    Raises:
      EstimateError: with the status, what it means, the remedy, and how many tasks it concerns.
      TypeError: called under jit, where the status has no value yet.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, theta, task: jnp.sum((w - theta) ** 2),
      ...     outer_loss=lambda w, theta, task: jnp.sum(w**2),
      ...     init_params=lambda theta, task: jnp.zeros(2),
      ... )
      >>> cm.raise_if_failed(cm.Contrastive(cm.LBFGS()).estimate(problem, jnp.ones(2), None))
    """
    diagnostics = result.diagnostics if isinstance(result, MetaGradient) else result
    if isinstance(diagnostics.status, jax.core.Tracer):
        raise TypeError(
            "`raise_if_failed` looks at values: call it outside jit, or return the status and test it there."
        )
    statuses = [Status(int(status)) for status in jnp.ravel(jnp.asarray(diagnostics.status))]
    failed = [status for status in statuses if status not in (Status.CONVERGED, *allow)]
    if failed:
        worst = max(failed)
        where = f" in {len(failed)} of {len(statuses)} tasks" if len(statuses) > 1 else ""
        raise EstimateError(f"{worst.name}{where}: {worst.describe()}")
