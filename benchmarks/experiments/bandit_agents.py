"""Agents for the wheel: networks that go on learning, Bayesian linear heads with Thompson sampling, and chance."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.experiments.bandit_wheel import NUM_ARMS, Pulls, Replay, Wheel, contexts, empty_replay, regret, rewards

# Networks see rewards in this unit, so that outputs of size 1 to 5 say what there is to say; the same for all of them.
UNIT = 10.0
# Of every arm, before an agent has a say (Riquelme, Tucker & Snoek, 2018).
_FIRST_PULLS = 2


class Agent(NamedTuple):
    """A way to choose arms.

    Attributes:
      start: `(meta_params, key) -> state`.
      act: `(state, key, context) -> arm`.
      observe: `(state, context, arm, reward) -> state`, after every pull.
      learn: `(state, key, replay) -> state`, every so often.
    """

    start: Callable[[Any, jax.Array], Any]
    act: Callable[[Any, jax.Array, jax.Array], jax.Array]
    observe: Callable[[Any, jax.Array, jax.Array, jax.Array], Any]
    learn: Callable[[Any, jax.Array, Replay], Any]


class Online(NamedTuple):
    """How a wheel is played.

    Attributes:
      trials: after the first pulls of every arm, which count as well.
      every: trials from one retraining to the next.
      steps: of a retraining.
      batch: pulls that a step of retraining sees.
      slots: pulls that are remembered.
    """

    trials: int = 2000
    every: int = 50
    steps: int = 20
    batch: int = 128
    slots: int = 2048


def masked_error(outputs: jax.Array, pulls: Pulls) -> jax.Array:
    """Mean squared error of the arms that were pulled, the only ones whose reward is known."""
    told = jnp.take_along_axis(outputs, pulls.arm[..., None], axis=-1)[..., 0]
    return jnp.mean(jnp.square(told - pulls.reward / UNIT))


def play(agent: Agent, online: Online, meta_params: Any, key: jax.Array, delta: jax.Array) -> jax.Array:
    """Mean regret of a trial; contexts and noise depend on `key` alone, so that all agents meet the same."""
    of_context, of_noise, of_agent, of_first = jax.random.split(key, 4)
    first = _FIRST_PULLS * NUM_ARMS
    num = first + online.trials
    seen = contexts(of_context, num)
    noise = jax.random.split(of_noise, num)

    def pull(carry: Any, number: jax.Array, arm: jax.Array) -> tuple[Any, jax.Array]:
        state, replay = carry
        reward = rewards(noise[number], seen[number], arm, delta)
        state = agent.observe(state, seen[number], arm, reward)
        return (state, replay.add(seen[number], arm, reward)), regret(seen[number], arm, delta)

    def trial(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        return pull(carry, number, agent.act(carry[0], jax.random.fold_in(of_agent, number), seen[number]))

    def block(carry: Any, numbers: jax.Array) -> tuple[Any, jax.Array]:
        carry, lost = jax.lax.scan(trial, carry, numbers)
        return _learned(carry, numbers[-1]), lost

    def _learned(carry: Any, number: jax.Array) -> Any:
        state, replay = carry
        return agent.learn(state, jax.random.fold_in(of_agent, num + number), replay), replay

    carry = agent.start(meta_params, of_first), empty_replay(online.slots, seen.dtype)
    arms = jnp.arange(first, dtype=jnp.int32) % NUM_ARMS
    carry, lost = jax.lax.scan(lambda c, k: pull(c, k, arms[k]), carry, jnp.arange(first))
    numbers = first + jnp.arange(online.trials).reshape(-1, online.every)
    _, losses = jax.lax.scan(block, _learned(carry, jnp.int32(first)), numbers)
    return (jnp.sum(lost) + jnp.sum(losses)) / num


def chance() -> Agent:
    """Any arm."""
    return Agent(
        lambda meta_params, key: (),
        lambda state, key, context: jax.random.randint(key, (), 0, NUM_ARMS, dtype=jnp.int32),
        lambda state, *pull: state,
        lambda state, key, replay: state,
    )


def greedy(
    problem: cm.BilevelProblem,
    predict: Callable[[Any, Any, jax.Array], jax.Array],
    optimizer: optax.GradientTransformation,
    online: Online,
) -> Agent:
    """A network that pulls the arm of the highest prediction, and descends its own inner loss on what it remembers.

    Args:
      problem: of learning a wheel; where its `init` starts.
      predict: `(params, meta_params, context) -> outputs`, one for each arm.
      optimizer: of retraining, which goes on from the current weights and the optimiser's state.
      online: steps and batches.
    """

    def start(meta_params: Any, key: jax.Array) -> Any:
        params = problem.init(meta_params, ())
        return meta_params, params, optimizer.init(params)

    def act(state: Any, key: jax.Array, context: jax.Array) -> jax.Array:
        meta_params, params, _ = state
        return jnp.argmax(predict(params, meta_params, context)).astype(jnp.int32)

    def learn(state: Any, key: jax.Array, replay: Replay) -> Any:
        meta_params = state[0]

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, memory = carry
            x, y = replay.sample(key, online.batch)
            grads = jax.grad(problem.inner)(params, meta_params, Wheel(x, y, x, y))
            updates, memory = optimizer.update(grads, memory, params)
            return (optax.apply_updates(params, updates), memory), None

        carry, _ = jax.lax.scan(step, state[1:], jax.random.split(key, online.steps))
        return meta_params, *carry

    return Agent(start, act, lambda state, *pull: state, learn)


class Posterior(NamedTuple):
    """What the pulls say of each arm's linear reward, with a leading axis of arms.

    Attributes:
      inverse: of prior strength plus sum of x x^T, shape (5, d, d).
      moment: sum of x r, shape (5, d).
      squares: sum of r^2, shape (5,).
      number: of pulls, shape (5,).
    """

    inverse: jax.Array
    moment: jax.Array
    squares: jax.Array
    number: jax.Array


class Prior(NamedTuple):
    """Normal and inverse gamma: weights have variance sigma^2 / strength, and sigma^2 is inverse gamma (a, b)."""

    strength: float
    a: float
    b: float


# As in the contrastive paper's code.
LINEAR_PRIOR, NEURAL_PRIOR = Prior(0.25, 6.0, 6.0), Prior(23.0, 12.0, 30.0)


def posterior(prior: Prior, features: jax.Array, pulls: Pulls, weights: jax.Array) -> Posterior:
    """From pulls, shape (num,), that count as much as their weights.

    Args:
      prior: of every arm.
      features: shape (num, d).
      pulls: shape (num,).
      weights: 0 for slots without a pull.
    """
    of_arm = weights[:, None] * (pulls.arm[:, None] == jnp.arange(NUM_ARMS))
    eye = jnp.eye(features.shape[1], dtype=features.dtype)
    # One product of matrices for all arms.
    by_arm = of_arm[:, :, None] * features[:, None, :]
    squares = jnp.tensordot(by_arm, features, axes=(0, 0))
    return Posterior(
        _inverse(prior.strength * eye + squares),
        jnp.einsum("nai,n->ai", by_arm, pulls.reward),
        jnp.einsum("na,n->a", of_arm, jnp.square(pulls.reward)),
        jnp.sum(of_arm, axis=0),
    )


def _inverse(matrices: jax.Array) -> jax.Array:
    """Of positive definite ones, shape (.., d, d), by Gauss and Jordan's elimination in place, which needs no pivots.

    For 250 matrices of 32 rows in float32, `jnp.linalg.inv` took 0.6 s of CPU here, once for each retraining.
    """

    def eliminate(k: jax.Array, a: jax.Array) -> jax.Array:
        column, row, pivot = a[..., :, k], a[..., k, :], a[..., k, k, None]
        a = a - column[..., :, None] * (row / pivot)[..., None, :]
        a = a.at[..., k, :].set(row / pivot).at[..., :, k].set(-column / pivot)
        return a.at[..., k, k].set(1 / pivot[..., 0])

    inverse: jax.Array = jax.lax.fori_loop(0, matrices.shape[-1], eliminate, matrices)
    return inverse


def thompson(prior: Prior, belief: Posterior, key: jax.Array, features: jax.Array) -> jax.Array:
    """The best arm of a draw from the posterior.

    Weights are normal given an arm's variance, and arms are independent: it is their rewards that are drawn, x w being
    normal around x m with variance sigma^2 x^T A^-1 x.

    Reference:
      Riquelme, Tucker & Snoek (2018), section 3 (full posterior).
    """
    of_variance, of_weights = jax.random.split(key)
    mean = jnp.einsum("aij,aj->ai", belief.inverse, belief.moment)
    a = prior.a + belief.number / 2
    b = prior.b + (belief.squares - jnp.einsum("ai,ai->a", mean, belief.moment)) / 2
    variance = jnp.maximum(b, jnp.finfo(b.dtype).tiny) / jax.random.gamma(of_variance, a)
    spread = jnp.einsum("i,aij,j->a", features, belief.inverse, features)
    noise = jax.random.normal(of_weights, variance.shape, variance.dtype)
    return jnp.argmax(mean @ features + jnp.sqrt(variance * spread) * noise).astype(jnp.int32)


def linear() -> Agent:
    """A full posterior over linear rewards of the context and a constant, Thompson sampling."""

    def features(context: jax.Array) -> jax.Array:
        return jnp.concatenate([context, jnp.ones((*context.shape[:-1], 1), context.dtype)], axis=-1)

    def start(meta_params: Any, key: jax.Array) -> Posterior:
        nothing = jnp.zeros(1)
        return posterior(
            LINEAR_PRIOR, features(jnp.zeros((1, 2))), Pulls(nothing.astype(jnp.int32), nothing), nothing
        )  # fmt: skip

    def observe(state: Posterior, context: jax.Array, arm: jax.Array, reward: jax.Array) -> Posterior:
        return _with_one_more(state, features(context), arm, reward)

    def act(state: Posterior, key: jax.Array, context: jax.Array) -> jax.Array:
        return thompson(LINEAR_PRIOR, state, key, features(context))

    return Agent(start, act, observe, lambda state, key, replay: state)


def neural_linear(
    predict: Callable[[Any, jax.Array], jax.Array],
    features: Callable[[Any, jax.Array], jax.Array],
    rate: float,
    online: Online,
) -> Agent:
    """A posterior over linear rewards of a network's last hidden units, which are retrained every so often.

    RMSprop, its rate over (1 + t / 2) in the t-th step of a retraining, gradients clipped to norm 5, as in the
    contrastive paper's code; the posterior of new features is that of all remembered pulls.

    Args:
      predict: `(network, context) -> outputs`, shape (.., 5).
      features: `(network, context) -> hidden units`, shape (.., d).
      rate: of the first step.
      online: steps and batches.

    Reference:
      Riquelme, Tucker & Snoek (2018), section 3 (neural linear).
    """
    optimizer = optax.chain(optax.clip_by_global_norm(5.0), optax.rmsprop(lambda count: rate / (1 + count / 2)))

    def start(network: Any, key: jax.Array) -> Any:
        hidden = features(network, jnp.zeros((1, 2)))
        nothing = jnp.zeros(1, hidden.dtype)
        return network, posterior(NEURAL_PRIOR, hidden, Pulls(nothing.astype(jnp.int32), nothing), nothing)

    def act(state: Any, key: jax.Array, context: jax.Array) -> jax.Array:
        network, belief = state
        return thompson(NEURAL_PRIOR, belief, key, features(network, context))

    def observe(state: Any, context: jax.Array, arm: jax.Array, reward: jax.Array) -> Any:
        network, belief = state
        return network, _with_one_more(belief, features(network, context), arm, reward)

    def learn(state: Any, key: jax.Array, replay: Replay) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            network, memory = carry
            x, y = replay.sample(key, online.batch)
            grads = jax.grad(lambda network: masked_error(predict(network, x), y))(network)
            updates, memory = optimizer.update(grads, memory, network)
            return (optax.apply_updates(network, updates), memory), None

        first = state[0], optimizer.init(state[0])
        (network, _), _ = jax.lax.scan(step, first, jax.random.split(key, online.steps))
        hidden = features(network, replay.context)
        return network, posterior(NEURAL_PRIOR, hidden, replay.pulls, replay.is_filled.astype(hidden.dtype))

    return Agent(start, act, observe, learn)


def _with_one_more(belief: Posterior, features: jax.Array, arm: jax.Array, reward: jax.Array) -> Posterior:
    """One more pull of an arm, its inverse by the formula of Sherman and Morrison."""
    one = (jnp.arange(NUM_ARMS) == arm).astype(features.dtype)
    along = belief.inverse @ features
    fall = along[:, :, None] * along[:, None, :] / (1 + along @ features)[:, None, None]
    return Posterior(
        belief.inverse - one[:, None, None] * fall,
        belief.moment + one[:, None] * reward * features,
        belief.squares + one * jnp.square(reward),
        belief.number + one,
    )
