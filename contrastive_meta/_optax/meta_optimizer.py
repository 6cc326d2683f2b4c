"""An optax optimiser of meta-parameters that makes its own gradient."""

from typing import Any, Literal, NamedTuple

import jax
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._control import only_if, usual_promotion
from contrastive_meta._estimators.base import MetaGradientEstimator
from contrastive_meta._optax._interop import as_transformation
from contrastive_meta._optax.meta_gradient import MetaGradientState, meta_gradient
from contrastive_meta._problem import BilevelProblem, MetaParams, Task, as_float_arrays
from contrastive_meta._pytree import PyTree
from contrastive_meta._result import USABLE, Status


class MetaOptimizerState(NamedTuple):
    """What `meta_optimizer` keeps between updates: plain arrays, of one structure from `init` on.

    Attributes:
      meta_gradient: `MetaGradientState`: the number of updates, the warm-started inner solutions, the last outer loss
        and diagnostics.
      optimizer: state of the wrapped optimiser.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.MetaOptimizerState._fields
      ('meta_gradient', 'optimizer')
    """

    meta_gradient: MetaGradientState
    optimizer: PyTree


def meta_optimizer(
    optimizer: optax.GradientTransformation,
    problem: BilevelProblem,
    estimator: MetaGradientEstimator,
    *,
    batch_size: int | None = None,
    warm_start: Task | None = None,
    on_failure: Literal["keep", "zero", "skip"] = "keep",
    allow: tuple[Status, ...] = USABLE,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Any optax optimiser, for meta-parameters: `tx.update(None, state, meta_params, tasks=tasks)`.

    It is `optax.chain(meta_gradient(problem, estimator, ...), optimizer)`, but that it can skip an update as a whole
    and offers the mean outer loss to optimisers that look at a `value`. The arguments of `update` are those of
    `meta_gradient`. Costs nothing beside the estimates and the optimiser.

    Args:
      optimizer: any optax transformation.
      problem: see `meta_gradient`.
      estimator: see `meta_gradient`.
      batch_size: see `meta_gradient`.
      warm_start: see `meta_gradient`.
      on_failure: "keep" and "zero" as in `meta_gradient`; "skip": if any task failed, the updates are zero and the
        wrapped optimiser's state stays as it was. What failed is in the state in every case.
      allow: see `meta_gradient`.
      seed: see `meta_gradient`.

    Returns:
      A transformation whose state is a `MetaOptimizerState`.

    Raises:
      TypeError: an argument that is not of its kind.
      ValueError: see `meta_gradient`.

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
      >>> tx = cm.meta_optimizer(optax.sgd(1.0), problem, estimator)
      >>> anchor, tasks = jnp.array(0.0), jnp.array([4.0, 6.0])
      >>> state, step = tx.init(anchor), jax.jit(tx.update)
      >>> for _ in range(20):
      ...     updates, state = step(None, state, anchor, tasks=tasks)
      ...     anchor = optax.apply_updates(anchor, updates)
      >>> round(float(anchor), 2)  # the solutions, (4 + anchor) / 2 and (6 + anchor) / 2, average to 1
      -2.99
    """
    if on_failure not in ("keep", "zero", "skip"):
        raise ValueError(f'`on_failure` is "keep", "zero" or "skip"; got {on_failure!r}.')
    optimizer = as_transformation(optimizer, "optimizer")
    link = meta_gradient(
        problem,
        estimator,
        batch_size=batch_size,
        warm_start=warm_start,
        on_failure="zero" if on_failure == "zero" else "keep",
        allow=allow,
        seed=seed,
    )

    def init(meta_params: MetaParams) -> MetaOptimizerState:
        meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
        return MetaOptimizerState(link.init(meta_params), optimizer.init(meta_params))

    def update(
        updates: MetaParams | None, state: MetaOptimizerState, params: MetaParams | None = None, **extra: Any
    ) -> tuple[MetaParams, MetaOptimizerState]:
        grad, of_gradient = link.update(updates, state.meta_gradient, params, **extra)
        offered = {"value": of_gradient.outer_loss, "grad": grad, **extra}

        def step(skipped: tuple[MetaParams, PyTree]) -> tuple[MetaParams, PyTree]:
            with usual_promotion():
                new: tuple[MetaParams, PyTree] = optimizer.update(grad, skipped[1], params, **offered)
            return new

        skipped = tree.zeros_like(grad), state.optimizer
        usable = jax.numpy.equal(of_gradient.num_failed, 0)
        updates, of_optimizer = only_if(usable, step, skipped) if on_failure == "skip" else step(skipped)
        return updates, MetaOptimizerState(of_gradient, of_optimizer)

    return optax.GradientTransformationExtraArgs(init, update)
