"""The meta-gradient of a training step beside finite differences of what training comes to later."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._control import fori_loop, scan, usual_promotion
from contrastive_meta._dependence import leaf_names
from contrastive_meta._optax import TuningMode, tune_while_training
from contrastive_meta._optax._interop import as_transformation
from contrastive_meta._problem import BilevelProblem, MetaParams, ModelState, Params, Task, as_float_arrays
from contrastive_meta._pytree import PyTree
from contrastive_meta._report.gradients import flatten, norm
from contrastive_meta._report.horizon.report import HorizonReport, HorizonRow
from contrastive_meta._result import Status

# By how much the parameters of a leaf are stretched, to see whether their length matters.
_STRETCH = 1.3
# It does not if the outer loss changes by less than this part of what as long a random change does to it. A batch
# normalisation adds 1e-5 to variances of the order of 1e-2 to 1.
_SCALE_FREE = 1e-2


def check_horizon(
    problem: BilevelProblem,
    optimizer: optax.GradientTransformation,
    params: Params,
    meta_params: MetaParams,
    tasks: Task,
    *,
    opt_state: PyTree | None = None,
    mode: TuningMode | None = None,
    horizons: Sequence[int] = (10, 100, 1000),
    model_state: ModelState = (),
    step: float = 0.05,
    num_averaged: int = 10,
    key: jax.Array | None = None,
) -> HorizonReport:
    """Whether the meta-gradients that `tune_while_training` would follow have the sign and size of the long run's.

    A short nudged phase answers what the next few steps would change. For weight decay, augmentation and the like the
    long run may want the opposite: decay hurts the validation loss of the next step, and helps that of the end. Here
    training is continued from `params` for as many steps as the longest horizon, with meta-parameters that stay, moved
    a little up and down along the meta-gradient of each leaf. Central differences of the outer loss at each horizon
    are the truth: of two step sizes, whose difference bounds their error. That takes four runs of that length for each
    leaf, and no derivative of the optimiser. The outer loss is averaged over `tasks`. The model state is held.

    Args:
      problem: as given to `tune_while_training`.
      optimizer: of the parameters.
      params: where training is; try the start, the middle and the end of a run.
      meta_params: the values to check at.
      tasks: what `update` gets as its `task`, several of them stacked along a leading axis. Training goes through them
        in turns.
      opt_state: of `optimizer` at `params`; by default a fresh one.
      mode: as given to `tune_while_training`.
      horizons: numbers of training steps, increasing.
      model_state: for problems with one.
      step: by which a leaf is moved, a norm; the second step size is twice that. For logarithms of strengths, and
        logits, the default is small.
      num_averaged: training steps from `params` on over which the meta-gradient is averaged. `SingleLoop`, whose nudged
        iterate starts with the check, needs as many as that takes to answer.
      key: for `problem.sample`.

    Returns:
      A report to print.

    Raises:
      ValueError: horizons that do not increase from 1 on; a step that is not positive; tasks without a common
        leading axis.

    Reference:
      Wu, Ren, Liao & Grosse (2018), Understanding short-horizon bias in stochastic meta-optimization.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> def inner_loss(w, log_decay, task):
      ...     return 0.5 * jnp.sum((w - task) ** 2) + 0.5 * jnp.exp(log_decay) * jnp.sum(w**2)
      >>> problem = cm.BilevelProblem(inner_loss, lambda w, _, task: 0.5 * jnp.sum((w - 1.0) ** 2), lambda *_: 0.0)
      >>> tasks = jnp.full((4, 1), 3.0)
      >>> report = cm.check_horizon(
      ...     problem, optax.sgd(0.1), jnp.zeros(1), jnp.array(-2.0), tasks, horizons=(3, 30), num_averaged=1
      ... )
      >>> report.agree  # decay keeps w from the target 1 at first, and later from passing it
      False
    """
    horizons = tuple(int(horizon) for horizon in horizons)
    if not horizons or horizons[0] < 1 or any(a >= b for a, b in itertools.pairwise(horizons)):
        raise ValueError(f"`horizons` must be numbers of steps that increase from 1 on; got {horizons}.")
    if not step > 0:
        raise ValueError(f"`step` must be positive; got {step}.")
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(tasks)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            "`tasks` must be tasks stacked along a leading axis, of one length for all leaves; the leaves' leading "
            f"axes are {sorted(lengths)}. A single task: `jax.tree.map(lambda x: x[None], task)`."
        )
    params = as_float_arrays(params, "params", "params must be")
    meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
    optimizer = as_transformation(optimizer, "optimizer")
    opt_state = optimizer.init(params) if opt_state is None else opt_state
    key = jax.random.key(0) if key is None else key
    run = _Run(problem.at(model_state), optimizer, tasks, key)

    now, statuses = _now(run, problem, mode, num_averaged, params, opt_state, meta_params, model_state)
    directions = [_direction(part) for part in jax.tree.leaves(now)]
    later, doubled = _later(run, params, opt_state, meta_params, directions, (0, *horizons), step)
    errors = np.abs(later - doubled)
    sizes = [norm(flatten(part)) for part in jax.tree.leaves(now)]
    rows = [
        HorizonRow(name, size, tuple(map(float, slopes)), tuple(map(float, error)))
        for name, size, slopes, error in zip(leaf_names(meta_params), sizes, later, errors, strict=True)
    ]
    told = tuple(Status(int(value)) for value in np.unique(np.asarray(statuses)))
    return HorizonReport(horizons, tuple(rows), _scale_free(run, params, meta_params), told)


class _Run(NamedTuple):
    """A training run at fixed meta-parameters."""

    problem: BilevelProblem
    optimizer: optax.GradientTransformationExtraArgs
    tasks: Task
    key: jax.Array

    def task_at(self, step: Any) -> Task:
        """What the losses look at in a training step."""
        length = jax.tree.leaves(self.tasks)[0].shape[0]
        return jax.tree.map(lambda x: jnp.asarray(x)[step % length], self.tasks)

    def gradient(self, params: Params, meta_params: MetaParams, step: Any) -> Params:
        """Of the inner loss in a training step."""
        task = self.problem.minibatch(self.key, self.task_at(step), step)
        return tree.grad(lambda at: self.problem.inner(at, meta_params, task))(params)

    def train(self, carry: tuple[Params, PyTree], meta_params: MetaParams, first: Any, last: Any) -> Any:
        """Go through the training steps from `first` on to before `last`."""

        def step(index: Any, carry: tuple[Params, PyTree]) -> tuple[Params, PyTree]:
            params, opt_state = carry
            with usual_promotion():
                grads = self.gradient(params, meta_params, index)
                updates, opt_state = self.optimizer.update(grads, opt_state, params)
                return optax.apply_updates(params, updates), opt_state

        return fori_loop(first, last, step, carry)

    def outer(self, params: Params, meta_params: MetaParams) -> jax.Array:
        """The outer loss, its mean over the tasks."""
        return jnp.mean(jax.lax.map(lambda task: self.problem.outer(params, meta_params, task), self.tasks))


def _now(
    run: _Run,
    problem: BilevelProblem,
    mode: TuningMode | None,
    number: int,
    params: Params,
    opt_state: PyTree,
    meta_params: MetaParams,
    model_state: ModelState,
) -> tuple[MetaParams, jax.Array]:
    """The meta-gradient, its mean over training steps in which the meta-parameters stay; and the statuses."""

    def add(grads: MetaParams, total: MetaParams, _: Any = None) -> tuple[MetaParams, MetaParams]:
        return tree.zeros_like(grads), tree.add(total, grads)

    tune = tune_while_training(
        run.optimizer,
        meta_optimizer=optax.GradientTransformation(tree.zeros_like, add),
        problem=problem,
        init_meta_params=meta_params,
        every=1,
        mode=mode,
        on_failure="keep",
    )
    extra = {} if problem.init_model_state is None else {"model_state": model_state}

    def step(carry: tuple[Params, Any], index: jax.Array) -> tuple[tuple[Params, Any], jax.Array]:
        params, state = carry
        grads = run.gradient(params, meta_params, index)
        updates, state = tune.update(grads, state, params, task=run.task_at(index), **extra)
        return (optax.apply_updates(params, updates), state), state.diagnostics.status

    @jax.jit
    def go(params: Params, opt_state: PyTree) -> tuple[MetaParams, jax.Array]:
        state = tune.init(params)._replace(optimizer=opt_state)
        (_, state), statuses = scan(step, (params, state), jnp.arange(number))
        return tree.scale(1 / number, state.meta_optimizer), statuses

    found: tuple[MetaParams, jax.Array] = go(params, opt_state)
    return found


def _direction(part: jax.Array) -> jax.Array:
    """Of unit length, along a leaf's meta-gradient; along ones where that vanishes or is not finite."""
    length = tree.norm(part).astype(part.dtype)
    known = jnp.isfinite(length) & (length > 0)
    return jnp.where(known, part / jnp.where(known, length, 1), jnp.ones_like(part) / max(part.size, 1) ** 0.5)


def _later(
    run: _Run,
    params: Params,
    opt_state: PyTree,
    meta_params: MetaParams,
    directions: list[jax.Array],
    marks: tuple[int, ...],
    step: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes of the outer loss along each leaf's direction, a row of horizons for each leaf, by two step sizes."""
    leaves, structure = jax.tree.flatten(meta_params)
    ends = jnp.stack([jnp.asarray(marks[:-1]), jnp.asarray(marks[1:])], axis=1)

    def losses(steps: jax.Array) -> jax.Array:
        """The outer loss at each horizon, for the leaves moved by `steps` times their directions."""
        moved = [x + s.astype(x.dtype) * d for x, s, d in zip(leaves, steps, directions, strict=True)]
        at = jax.tree.unflatten(structure, moved)

        def segment(carry: Any, ends: jax.Array) -> tuple[Any, jax.Array]:
            carry = run.train(carry, at, ends[0], ends[1])
            return carry, run.outer(carry[0], at)

        found: jax.Array = scan(segment, (params, opt_state), ends)[1]
        return found

    # One after another: as many lanes of a network at once would fill the memory.
    units = np.eye(len(leaves))
    runs = jax.jit(lambda steps: jax.lax.map(losses, steps))(
        jnp.concatenate([jnp.asarray(factor * step * units) for factor in (1, -1, 2, -2)])
    )
    up, down, up_twice, down_twice = np.split(np.asarray(runs, np.float64), 4)
    return (up - down) / (2 * step), (up_twice - down_twice) / (4 * step)


def _scale_free(run: _Run, params: Params, meta_params: MetaParams) -> tuple[str, ...]:
    """The leaves of `params` whose length the outer loss does not depend on."""
    leaves, structure = jax.tree.flatten(params)
    outer = jax.jit(lambda at: run.outer(at, meta_params))
    here, found = outer(params), []
    for index, (name, leaf) in enumerate(zip(leaf_names(params, "params"), leaves, strict=True)):
        way = jax.random.normal(jax.random.fold_in(run.key, index), leaf.shape, leaf.dtype)
        aside = (_STRETCH - 1) * jnp.linalg.norm(leaf) / jnp.linalg.norm(way) * way
        others = [[*leaves[:index], x, *leaves[index + 1 :]] for x in (_STRETCH * leaf, leaf + aside)]
        stretched, moved = (jnp.abs(outer(jax.tree.unflatten(structure, other)) - here) for other in others)
        if leaf.size > 1 and stretched < _SCALE_FREE * moved:
            found.append(name)
    return tuple(found)
