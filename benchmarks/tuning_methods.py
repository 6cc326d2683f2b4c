"""Ways to train on mislabelled digits: as they are, without the wrong ones, and with weights that are learned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.tuning_task import PROBLEM, Digits, Instance, accuracy, batch_of, init_params, inner_loss, losses

NUM_CHECKS = 20
# A score whose sigmoid is 1, or 0 with the sign turned, to rounding.
CERTAIN = 30.0
# Its learning rate is in its state.
_META_OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)


class Trained(NamedTuple):
    """What one training run came to.

    Attributes:
      accuracies: test accuracy after each twentieth of the run; the last is the result.
      val_loss: loss of all clean validation examples at the end.
      scores: of the examples at the end, whose sigmoids are their weights.
      num_tuning: gradients spent on tuning, as estimators count them, Hessian products included.
      num_failed: steps of the weights whose status was a failure.
    """

    accuracies: jax.Array
    val_loss: jax.Array
    scores: jax.Array
    num_tuning: jax.Array
    num_failed: jax.Array


class Choices(NamedTuple):
    """What is chosen on seeds of its own; numbers, so that another choice compiles nothing.

    Attributes:
      rate: learning rate of the examples' scores, of Adam.
      every: training steps from one step of the scores to the next.
      mode: of `tune_while_training`; unrolling has none.
    """

    rate: float
    every: int
    mode: cm.TuningMode | None = None


Fixed = Callable[[Digits, Any], Trained]
Tuned = Callable[[Digits, Choices], Trained]
Carry = tuple[Any, Any]


def _checked(
    setting: Instance, digits: Digits, step: Callable[[Carry, Any], Carry], carry: Carry
) -> tuple[Carry, jax.Array]:
    """All steps, with a look at the test examples now and then."""

    def some(carry: Carry, numbers: Any) -> tuple[Carry, jax.Array]:
        carry, _ = jax.lax.scan(lambda c, k: (step(c, k), None), carry, numbers)
        return carry, accuracy(carry[0], digits.x_test, digits.y_test)

    return jax.lax.scan(some, carry, jnp.arange(setting.num_steps).reshape(NUM_CHECKS, -1))


def _trained(digits: Digits, params: Any, accuracies: Any, scores: Any, num_tuning: Any, num_failed: Any) -> Trained:
    val_loss = jnp.mean(losses(params, digits.x_val, digits.y_val))
    return Trained(accuracies, val_loss, scores, jnp.asarray(num_tuning), jnp.asarray(num_failed))


def with_scores(setting: Instance, scores_of: Callable[[Digits], jax.Array]) -> Fixed:
    """Weights that stay as they are, and a penalty of so much on all parameters."""
    optimizer = optax.adam(setting.rate)

    @jax.jit
    def run(digits: Digits, decay: Any) -> Trained:
        scores, params = scores_of(digits), init_params(digits)

        def loss(params: Any, number: Any) -> jax.Array:
            squares = sum((jnp.sum(x**2) for x in jax.tree.leaves(params)), start=jnp.zeros(()))
            penalised: jax.Array = inner_loss(params, scores, batch_of(digits, number)) + decay * squares / 2
            return penalised

        def step(carry: Carry, number: Any) -> Carry:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, number), state, params)
            return optax.apply_updates(params, updates), state

        carry, accuracies = _checked(setting, digits, step, (params, optimizer.init(params)))
        return _trained(digits, carry[0], accuracies, scores, 0, 0)

    return run


def tuned(setting: Instance) -> Tuned:
    """`tune_while_training`: the training loop of the others around it."""

    @jax.jit
    def run(digits: Digits, choices: Choices) -> Trained:
        tx = cm.tune_while_training(
            optax.adam(setting.rate),
            meta_optimizer=_META_OPTIMIZER,
            problem=PROBLEM,
            init_meta_params=jnp.zeros(setting.num_train, jnp.float32),
            every=lambda step: choices.every,
            mode=choices.mode,
        )
        params = init_params(digits)

        def step(carry: Carry, number: Any) -> Carry:
            params, state = carry
            batch = batch_of(digits, number)
            grads = jax.grad(inner_loss)(params, cm.current_meta_params(state), batch)
            updates, state = tx.update(grads, state, params, task=batch)
            return optax.apply_updates(params, updates), state

        start = tx.init(params)
        start = start._replace(meta_optimizer=_at_rate(start.meta_optimizer, choices.rate))
        (params, state), accuracies = _checked(setting, digits, step, (params, start))
        return _trained(digits, params, accuracies, state.meta_params, state.num_gradients, state.num_failed)

    return run


def unrolled(setting: Instance, num_steps: int, window_rate: float) -> Tuned:
    """Backprop through a window of descent steps from the current parameters; one step is that of DARTS."""
    estimator = cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(window_rate), num_steps=num_steps))
    problem = cm.BilevelProblem(
        lambda params, scores, task: PROBLEM.inner_loss(params, scores, task[0]),
        lambda params, scores, task: PROBLEM.outer_loss(params, scores, task[0]),
        lambda scores, task: task[1],
    )
    optimizer = optax.adam(setting.rate)

    @jax.jit
    def run(digits: Digits, choices: Choices) -> Trained:
        params, scores = init_params(digits), jnp.zeros(setting.num_train, jnp.float32)

        def step(carry: Carry, number: Any) -> Carry:
            params, (state, scores, meta_state, spent) = carry
            batch = batch_of(digits, number)
            grads = jax.grad(inner_loss)(params, scores, batch)

            def meta_step(scores: Any, meta_state: Any, spent: Any) -> Any:
                result = estimator.estimate(problem, scores, (batch, params))
                updates, meta_state = _META_OPTIMIZER.update(result.grad, meta_state, scores)
                spent += result.diagnostics.num_gradients + result.diagnostics.num_hvps
                return optax.apply_updates(scores, updates), meta_state, spent

            due = (number + 1) % choices.every == 0
            tuning = jax.lax.cond(due, meta_step, lambda *still: still, scores, meta_state, spent)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), (state, *tuning)

        meta_state = _at_rate(_META_OPTIMIZER.init(scores), choices.rate)
        start = params, (optimizer.init(params), scores, meta_state, jnp.int32(0))
        (params, (_, scores, _, spent)), accuracies = _checked(setting, digits, step, start)
        return _trained(digits, params, accuracies, scores, spent, 0)

    return run


def _at_rate(state: Any, rate: Any) -> Any:
    """A meta-optimiser's state with the learning rate that was chosen."""
    return state._replace(hyperparams=state.hyperparams | {"learning_rate": jnp.asarray(rate, jnp.float32)})
