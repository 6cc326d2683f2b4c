"""Ways to train: with fixed hyperparameters, or with some that move by `tune_while_training` or by its rivals."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.tuning_task import Batch, Data, Sizes, batch_of, in_use, init_params, logits, mean_loss, problem_of

# Looks at the hyperparameters along a run.
NUM_LOOKS = 20
# Its learning rate is in its state.
_META_OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)


class Trained(NamedTuple):
    """What one training run came to.

    Attributes:
      accuracy: of the test examples at the end.
      test_loss: their mean cross-entropy.
      val_loss: of all validation examples.
      num_tuning: gradients spent on tuning, as estimators count them, Hessian products included.
      failed: meta-steps whose status was a failure.
      statuses: numbers of meta-steps by status.
      paths: decays, smoothing and shifts in use after each twentieth of the run.
      scores: of the examples at the end.
    """

    accuracy: jax.Array
    test_loss: jax.Array
    val_loss: jax.Array
    num_tuning: jax.Array
    failed: jax.Array
    statuses: jax.Array
    paths: Any
    scores: jax.Array


class Run(NamedTuple):
    """What a program is given: arrays, so that other numbers compile nothing.

    Attributes:
      data: of the seed.
      batches: places of the examples of each training step.
      start: hyperparameters at the start.
      free: 1 where they are tuned.
      rate: of the meta-optimiser.
      every: training steps from one meta-step to the next.
    """

    data: Data
    batches: jax.Array
    start: Any
    free: Any
    rate: jax.Array
    every: jax.Array


class Watched(NamedTuple):
    """What tuning adds to a training step's state: counts of what it did."""

    num_tuning: jax.Array
    failed: jax.Array
    statuses: jax.Array


Program = Callable[[Run], Trained]
_NOTHING = Watched(jnp.int32(0), jnp.int32(0), jnp.zeros(len(cm.Status), jnp.int32))


def _finished(
    network: str, sizes: Sizes, run: Run, step: Any, carry: Any, read: Callable[[Any], tuple[Any, Any, Watched]]
) -> Trained:
    """All training steps, and what there is at the end; `read` gives parameters, deviations and counts."""

    def some(carry: Any, numbers: Any) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(lambda c, k: (step(c, k), None), carry, numbers)
        hyper = _at(run, read(carry)[1])
        return carry, {name: hyper[name] for name in ("decay", "smoothing", "shift") if name in hyper}

    carry, paths = jax.lax.scan(some, carry, jnp.arange(sizes.num_steps).reshape(NUM_LOOKS, -1))
    params, deviations, counts = read(carry)
    data, num = run.data, sizes.num_train
    # A normalisation is by the statistics of the training examples.
    values = logits(network, params, jnp.concatenate([data.x[:num], data.x_test]), num)[num:]
    known = logits(network, params, data.x, num)[num:]
    return Trained(
        jnp.mean(jnp.argmax(values, axis=-1) == data.y_test),
        mean_loss(values, data.y_test),
        mean_loss(known, data.y[num:]),
        *counts,
        paths,
        _at(run, deviations)["score"][:num],
    )


def _at(run: Run, deviations: Any) -> Any:
    nothing = jnp.zeros((0,))
    return in_use(deviations, Batch(nothing, nothing, nothing, nothing, nothing, nothing, run.start, run.free))


def fixed(network: str, sizes: Sizes) -> Program:
    """Hyperparameters that stay as they are."""
    optimizer, problem = optax.adam(sizes.rate), problem_of(network)

    def train(run: Run) -> Trained:
        still = jax.tree.map(jnp.zeros_like, run.start)

        def step(carry: Any, number: Any) -> Any:
            params, state = carry
            batch = batch_of(run.data, run.batches, number, run.start, run.free)
            updates, state = optimizer.update(jax.grad(problem.inner_loss)(params, still, batch), state, params)
            return optax.apply_updates(params, updates), state

        params = init_params(network, run.data.key)
        return _finished(network, sizes, run, step, (params, optimizer.init(params)), lambda c: (c[0], still, _NOTHING))

    return train


def tuned(network: str, sizes: Sizes, mode: cm.TuningMode, tell: Callable[[Any], None] | None = None) -> Program:
    """`tune_while_training`, watched by `tell` if given, after every tenth meta-step."""
    problem = problem_of(network)

    def train(run: Run) -> Trained:
        tx = cm.tune_while_training(
            optax.adam(sizes.rate),
            meta_optimizer=_META_OPTIMIZER,
            problem=problem,
            init_meta_params=jax.tree.map(jnp.zeros_like, run.start),
            every=lambda step: run.every,
            mode=mode,
        )

        def step(carry: Any, number: Any) -> Any:
            params, state = carry
            batch = batch_of(run.data, run.batches, number, run.start, run.free)
            grads = jax.grad(problem.inner_loss)(params, cm.current_meta_params(state), batch)
            updates, state = tx.update(grads, state, params, task=batch)
            if tell is not None:
                cm.watch(state, tell, every=10)
            return optax.apply_updates(params, updates), state

        def read(carry: Any) -> tuple[Any, Any, Watched]:
            params, state = carry
            return params, state.meta_params, Watched(state.num_gradients, state.num_failed, state.status_counts)

        params = init_params(network, run.data.key)
        start = tx.init(params)
        start = start._replace(meta_optimizer=_at_rate(start.meta_optimizer, run.rate))
        return _finished(network, sizes, run, step, (params, start), read)

    return train


# From the state of the optimiser in training to what measures the meta-gradient there.
Measure = Callable[[Any], cm.MetaGradientEstimator]


def one_step_unrolled(opt_state: Any) -> cm.MetaGradientEstimator:
    """Backprop through one step of descent from the current parameters: DARTS of second order (Liu et al. 2019)."""
    return cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(_UNROLLED_RATE), num_steps=1))


def steps_unrolled(sizes: Sizes, num_steps: int) -> Measure:
    """Backprop through the next steps of training, by its own optimiser with its own state (Wu et al. 2018).

    It is what `Alternating` comes to with as many steps and a nudge that vanishes.
    """
    adam = optax.adam(sizes.rate)

    def measure(opt_state: Any) -> cm.MetaGradientEstimator:
        goes_on = optax.GradientTransformation(lambda _: opt_state, adam.update)
        return cm.BackpropThroughLearning(cm.OptaxDescent(goes_on, num_steps=num_steps))

    return measure


def identity_hessian(opt_state: Any) -> cm.MetaGradientEstimator:
    """T1-T2 (Luketina et al. 2016): the curvature of the inner loss is taken to be one."""
    return cm.ImplicitDifferentiation(
        cm.OptaxDescent(optax.sgd(_UNROLLED_RATE), num_steps=0), cm.IdentityHessian(1.0), estimate_error=False
    )


# Of the step that is differentiated; Adam normalises the meta-gradient, so that little depends on it.
_UNROLLED_RATE = 0.05


def estimated(network: str, sizes: Sizes, measure: Measure) -> Program:
    """Now and then a step along what an estimator says at the current parameters."""
    losses, optimizer = problem_of(network), optax.adam(sizes.rate)
    problem = cm.BilevelProblem(
        lambda params, meta_params, task: losses.inner_loss(params, meta_params, task[0]),
        lambda params, meta_params, task: losses.outer_loss(params, meta_params, task[0]),
        lambda meta_params, task: task[1],
    )

    def train(run: Run) -> Trained:
        def step(carry: Any, number: Any) -> Any:
            params, state, tuning = carry
            batch = batch_of(run.data, run.batches, number, run.start, run.free)
            grads = jax.grad(losses.inner_loss)(params, tuning[0], batch)

            def meta_step(deviations: Any, meta_state: Any, counts: Watched) -> Any:
                result = measure(state).estimate(problem, deviations, (batch, params))
                updates, meta_state = _META_OPTIMIZER.update(result.grad, meta_state, deviations)
                told = result.diagnostics
                counts = Watched(
                    counts.num_tuning + told.num_gradients + told.num_hvps,
                    counts.failed,
                    counts.statuses + (jnp.arange(len(cm.Status)) == told.status).astype(jnp.int32),
                )
                return optax.apply_updates(deviations, updates), meta_state, counts

            due = (number + 1) % run.every == 0
            tuning = jax.lax.cond(due, meta_step, lambda *still: still, *tuning)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, tuning

        params, still = init_params(network, run.data.key), jax.tree.map(jnp.zeros_like, run.start)
        tuning = still, _at_rate(_META_OPTIMIZER.init(still), run.rate), _NOTHING
        start = params, optimizer.init(params), tuning
        return _finished(network, sizes, run, step, start, lambda c: (c[0], c[2][0], c[2][2]))

    return train


def _at_rate(state: Any, rate: Any) -> Any:
    """A meta-optimiser's state with the learning rate that was chosen."""
    return state._replace(hyperparams=state.hyperparams | {"learning_rate": jnp.asarray(rate, jnp.float32)})
