"""An optimiser of parameters in whose state hyperparameters improve while an ordinary training loop runs."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, only_if, usual_promotion
from contrastive_meta._optax._interop import (
    as_transformation,
    completed,
    no_diagnostics,
    required,
)
from contrastive_meta._optax.alternating import Alternating
from contrastive_meta._optax.tuning_mode import Batch, Measured, Schedule, Training, TuningMode, on_visible
from contrastive_meta._problem import (
    BilevelProblem,
    MetaParams,
    ModelState,
    Params,
    Task,
    as_float_arrays,
    check_same_structure,
)
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._result import USABLE, Diagnostics, Status, failed

# Training is not over, and the phases are short, by design. A nudge as strong as learning itself may also bend their
# way, in few steps, as much as one that takes the minimum away.
_USABLE_IN_TRAINING = (*USABLE, Status.FREE_NOT_CONVERGED, Status.NUDGED_NOT_CONVERGED, Status.UNBOUNDED_NUDGE)


class TuneState(NamedTuple):
    """What `tune_while_training` keeps between steps: plain arrays, of one structure from `init` on.

    Attributes:
      step: training steps taken, int32.
      waited: training steps since the last meta-step, int32.
      meta_params: the values that the next training step uses.
      optimizer: state of the wrapped optimiser.
      meta_optimizer: state of the meta-parameters' optimiser.
      memory: what the mode keeps: () or `SingleLoop`'s nudged iterates.
      outer_loss: outer loss on the batch of the last meta-step; infinite before the first.
      diagnostics: of the last meta-step; `num_gradients` does not count the gradients passed in.
      num_gradients: gradients spent on tuning so far, int32.
      num_failed: meta-steps so far whose status was neither `CONVERGED` nor allowed, int32.
      num_clipped: meta-steps so far whose meta-gradient was longer than `clip_norm`, int32.
      status_counts: meta-steps so far by status, int32 of shape (len(Status),); their sum is the number of meta-steps.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.TuneState._fields[:3]
      ('step', 'waited', 'meta_params')
    """

    step: jax.Array
    waited: jax.Array
    meta_params: MetaParams
    optimizer: PyTree
    meta_optimizer: PyTree
    memory: PyTree
    outer_loss: jax.Array
    diagnostics: Diagnostics
    num_gradients: jax.Array
    num_failed: jax.Array
    num_clipped: jax.Array
    status_counts: jax.Array


def tune_while_training(
    optimizer: optax.GradientTransformation,
    *,
    meta_optimizer: optax.GradientTransformation,
    problem: BilevelProblem,
    init_meta_params: MetaParams,
    every: int | Schedule | None = None,
    mode: TuningMode | None = None,
    on_failure: Literal["keep", "skip"] = "skip",
    allow: tuple[Status, ...] = _USABLE_IN_TRAINING,
    clip_norm: float | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser of `params` that tunes what shapes their training, in one training run.

    `updates, state = tx.update(grads, state, params, task=batch)`: the updates are those of `optimizer`, untouched;
    the meta-parameters in the state take a step every so often. `current_meta_params(state)` reads the values that the
    next gradient is to be taken with. `task` holds what both losses look at: a training batch and a validation batch.
    Other extra arguments: `unmasked`, all parameters, where `optax.masked` or `optax.multi_transform` show a part;
    `model_state`, for problems with one, as `grads` were taken with it: the training loop moves it, and the phases read
    it; the rest goes to `optimizer`.

    Args:
      optimizer: of the parameters; any optax transformation.
      meta_optimizer: of the meta-parameters; any optax transformation.
      problem: the losses. `init_params` and `init_model_state` are not called: training starts where it starts.
      init_meta_params: pytree of real floating arrays.
      every: training steps from one meta-step to the next, or a function of the training step; by default 10 for
        `Alternating` and 1 for `SingleLoop`.
      mode: `Alternating()`, the default, or `SingleLoop()`.
      on_failure: what becomes of a meta-gradient whose status is neither `CONVERGED` nor in `allow`. "skip":
        meta-parameters and their optimiser stay as they were, and `num_failed` in the state counts it. "keep": it is
        used, and counted too.
      allow: statuses that are no failure, besides `CONVERGED`; by default also `FREE_NOT_CONVERGED`,
        `NUDGED_NOT_CONVERGED` and `UNBOUNDED_NUDGE`, since neither training nor the short phases are over.
      clip_norm: length to which longer meta-gradients are shortened, outer loss over meta-parameters in units;
        `num_clipped` in the state counts them. None shortens none.
      seed: of the PRNG keys that `problem.sample` draws with.

    Returns:
      A transformation whose state is a `TuneState`.

    Raises:
      TypeError: an argument that is not of its kind.
      ValueError: an unknown `on_failure`, an `every` below 1, a `clip_norm` that is not positive; and by `update`: no
        `task`, no parameters, no model state for a problem with one.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> def inner_loss(w, log_decay, task):
      ...     return 0.5 * (w - task["train"]) ** 2 + 0.5 * jnp.exp(log_decay) * w**2
      >>> problem = cm.BilevelProblem(inner_loss, lambda w, _, task: 0.5 * (w - task["val"]) ** 2, lambda *_: 0.0)
      >>> tx = cm.tune_while_training(
      ...     optax.sgd(0.3), meta_optimizer=optax.sgd(0.5), problem=problem, init_meta_params=jnp.array(-2.0), every=5
      ... )
      >>> task, w = {"train": jnp.array(3.0), "val": jnp.array(1.0)}, jnp.array(0.0)
      >>> state, update = tx.init(w), jax.jit(tx.update)
      >>> for _ in range(200):
      ...     grads = jax.grad(inner_loss)(w, cm.current_meta_params(state), task)
      ...     updates, state = update(grads, state, w, task=task)
      ...     w = optax.apply_updates(w, updates)
      >>> round(float(jnp.exp(cm.current_meta_params(state))), 1), round(float(w), 1)  # 3 / (1 + 2) = 1
      (2.0, 1.0)
    """
    mode = Alternating() if mode is None else mode
    if not isinstance(mode, TuningMode):
        raise TypeError(f"`mode` must be `Alternating(...)` or `SingleLoop(...)`; got {mode!r}.")
    if not isinstance(problem, BilevelProblem):
        raise TypeError(f"`problem` must be a BilevelProblem; got a {type(problem).__name__}.")
    if on_failure not in ("keep", "skip"):
        raise ValueError(f'`on_failure` is "keep" or "skip"; got {on_failure!r}.')
    every = mode.usual_every if every is None else every
    if not callable(every) and every < 1:
        raise ValueError(f"`every` must be at least 1 training step; got {every}.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"`clip_norm` must be positive, or None; got {clip_norm}.")
    tuner = _Tuner(
        on_visible(problem),
        as_transformation(optimizer, "optimizer"),
        as_transformation(meta_optimizer, "meta_optimizer"),
        on_failure == "skip",
        tuple(allow),
        clip_norm,
        seed,
    )

    def held(model_state: ModelState | None) -> ModelState:
        if problem.init_model_state is None:
            return ()
        remedy = "The problem has one: pass the state that `grads` were taken with; it is read, and not moved."
        return required(model_state, "model_state", remedy)

    def init(params: Params) -> TuneState:
        return tuner.init(mode.at(jnp.int32(0)), as_float_arrays(params, "params", "params must be"), init_meta_params)

    def update(
        updates: Params,
        state: TuneState,
        params: Params | None = None,
        *,
        task: Task | None = None,
        unmasked: Params | None = None,
        model_state: ModelState | None = None,
        **extra: Any,
    ) -> tuple[Params, TuneState]:
        params = required(params, "params", "Pass the parameters as the third argument.")
        task = required(task, "task", "Pass what the losses look at, `tx.update(grads, state, params, task=batch)`.")
        check_same_structure(updates, params, "The gradient passed to `update`", "It must be a pytree like `params`.")
        batch = Batch(task, params, completed(params, unmasked, "params"), held(model_state))
        due = state.waited + 1 >= (every(state.step) if callable(every) else every)
        # The state as it was is what the phases start from.
        tuned = _meta_step(tuner, mode.at(state.step), due, updates, state, batch)
        with usual_promotion():
            moved, opt_state = tuner.optimizer.update(updates, state.optimizer, params, **extra)
        return moved, tuned._replace(optimizer=opt_state)

    return optax.GradientTransformationExtraArgs(init, update)


def current_meta_params(state: PyTree) -> MetaParams:
    """The meta-parameters that the next training step uses, wherever in an optax state they are.

    Args:
      state: of `tune_while_training`, or of anything around it: `optax.chain`, `masked`, `multi_transform`,
        `MultiSteps`, `apply_if_finite`, `inject_hyperparams`.

    Raises:
      ValueError: there is none in it, or more than one.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, theta, task: jnp.sum((w - theta) ** 2),
      ...     outer_loss=lambda w, theta, task: jnp.sum(w**2),
      ...     init_params=lambda theta, task: jnp.zeros(2),
      ... )
      >>> tune = cm.tune_while_training(
      ...     optax.adam(1e-3), meta_optimizer=optax.adam(1e-2), problem=problem, init_meta_params=jnp.ones(2)
      ... )
      >>> tx = optax.chain(optax.clip_by_global_norm(1.0), tune)
      >>> [float(value) for value in cm.current_meta_params(tx.init(jnp.zeros(2)))]
      [1.0, 1.0]
    """
    return find_tune_state(state, "current_meta_params").meta_params


def find_tune_state(state: PyTree, asked_by: str) -> TuneState:
    """The one `TuneState` in an optax state.

    Raises:
      ValueError: there is none in it, or more than one.
    """
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, TuneState))
    found = [leaf for leaf in leaves if isinstance(leaf, TuneState)]
    if len(found) != 1:
        raise ValueError(
            f"`{asked_by}` needs a state with one `tune_while_training` in it; found {len(found)}. "
            + ("Pass the part of the state that is meant." if found else "Pass what `tx.init` or `tx.update` returned.")
        )
    return found[0]


@strategy
class _Tuner:
    """The settings of a `tune_while_training`."""

    problem: BilevelProblem
    optimizer: optax.GradientTransformationExtraArgs = static()
    meta_optimizer: optax.GradientTransformationExtraArgs = static()
    skips_failed: bool = static()
    allow: tuple[Status, ...] = static()
    clip_norm: float | None = None
    seed: int = 0

    def init(self, mode: TuningMode, params: Params, init_meta_params: MetaParams) -> TuneState:
        """Nothing trained, nothing to report."""
        meta_params = as_float_arrays(init_meta_params, "init_meta_params", "init_meta_params must be")
        # A copy: a loop that donates its state would delete the user's values.
        meta_params = jax.tree.map(lambda x: jnp.array(x, copy=True), meta_params)
        diagnostics, zero = no_diagnostics(params, meta_params), jnp.int32(0)
        return TuneState(
            step=zero,
            waited=jnp.zeros_like(zero),
            meta_params=meta_params,
            optimizer=self.optimizer.init(params),
            meta_optimizer=self.meta_optimizer.init(meta_params),
            memory=mode.init(self.optimizer, params),
            outer_loss=jnp.full_like(diagnostics.beta, jnp.inf),
            diagnostics=diagnostics,
            num_gradients=jnp.zeros_like(zero),
            num_failed=jnp.zeros_like(zero),
            num_clipped=jnp.zeros_like(zero),
            status_counts=jnp.zeros(len(Status), jnp.int32),
        )


@functools.partial(jax.jit, inline=True)
def _meta_step(
    tuner: _Tuner, mode: TuningMode, due: jax.Array, grads: Params, state: TuneState, batch: Batch
) -> TuneState:
    """One training step as the meta-parameters see it; all of the state but the wrapped optimiser's moves on."""
    key = jax.random.fold_in(jax.random.key(tuner.seed), state.step)
    training = Training(tuner.problem, batch.params, grads, state.meta_params, batch, state.optimizer, key)
    last = Measured(tree.zeros_like(state.meta_params), state.outer_loss, state.diagnostics)
    memory, measured = mode.follow(tuner.optimizer, training, state.memory, due, last)
    status = measured.diagnostics.status
    bad = due & failed(status, tuner.allow)
    grad, long = _clipped(measured.grad, tuner.clip_norm)

    def step(still: tuple[MetaParams, PyTree]) -> tuple[MetaParams, PyTree]:
        offered = {"value": measured.outer_loss, "grad": grad}
        with usual_promotion():
            updates, opt_state = tuner.meta_optimizer.update(grad, still[1], still[0], **offered)
            return optax.apply_updates(still[0], updates), opt_state

    moves = due & ~bad if tuner.skips_failed else due
    meta_params, meta_state = only_if(moves, step, (state.meta_params, state.meta_optimizer))
    spent = jnp.where(due, measured.diagnostics.num_gradients, 0)
    new = state._replace(
        step=state.step + 1,
        waited=jnp.where(due, 0, state.waited + 1),
        meta_params=meta_params,
        meta_optimizer=meta_state,
        memory=memory,
        outer_loss=measured.outer_loss,
        diagnostics=measured.diagnostics,
        num_gradients=state.num_gradients + spent,
        num_failed=state.num_failed + bad.astype(jnp.int32),
        num_clipped=state.num_clipped + (moves & long).astype(jnp.int32),
        status_counts=state.status_counts.at[status].add(due.astype(jnp.int32)),
    )
    return cast_like(new, state)


def _clipped(grad: MetaParams, length: float | None) -> tuple[MetaParams, jax.Array]:
    """A meta-gradient of at most this length, and whether it was longer."""
    if length is None:
        return grad, jnp.bool_(False)
    norm = tree.norm(grad)
    long = norm > length
    return tree.scale(jnp.where(long, length / norm, 1), grad), long
