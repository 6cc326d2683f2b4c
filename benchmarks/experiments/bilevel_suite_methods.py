"""Stochastic bilevel methods by one interface: the package's single loop, SOBA, SABA, stocBiO, F2SA and F2SA-p.

One call is a gradient of either loss in parameters or in meta-parameters, or a product with the inner loss's Hessian or
cross-derivative, of a minibatch. z are parameters, x meta-parameters, G the inner and F the outer loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import contrastive_meta as cm
from benchmarks.experiments.bilevel_suite_problems import Examples, Sample, Suite

OURS, CENTRAL = "single loop", "single loop, central"
SOBA, SABA, STOCBIO, F2SA, F2SA_2, F2SA_4 = "SOBA", "SABA", "stocBiO", "F2SA", "F2SA-2", "F2SA-4"
# Step sizes fall by so much in all: as 1 / sqrt(1 + 20 t / T) in step t of T. SABA's do not fall.
_FALL = 20.0
_INNER, _OUTER = (0.03, 0.1, 0.3, 1.0), (0.001, 0.01, 0.1, 1.0)
# Strong negative nudges take the minimum away: on the quadratic those of .3 did.
_NUDGES = (0.01, 0.1)
# stocBiO: Ji, Yang & Liang (2021) have 10 inner steps and as many terms of the series.
_LOOP = 10
# F2SA-p: inner steps of each of its problems.
_STEPS = 5


class Choice(NamedTuple):
    """What is tuned: step sizes of parameters and meta-parameters, and the strength of a nudge where there is one."""

    inner: Any
    outer: Any
    strength: Any


class Method(NamedTuple):
    """A stochastic method.

    Attributes:
      calls: of a step.
      first_calls: before the first step, from the numbers of minibatches of either sum.
      start: `(suite, choice, num_steps) -> state`, whose first entry is x.
      step: `(suite, choice, num_steps, state, number, key) -> state`.
      grid: choices to select from; outer step sizes in units of the suite.
      is_normalised: whether meta-steps have a length of their own, not the gradient's.
    """

    calls: int
    start: Callable[[Suite, Choice, int], Any]
    step: Callable[[Suite, Choice, int, Any, jax.Array, jax.Array], Any]
    grid: tuple[Choice, ...]
    first_calls: Callable[[int, int], int] = lambda num_train, num_val: 0
    is_normalised: bool = False


def _grid(strengths: tuple[float, ...] = (0.0,), outer: tuple[float, ...] = _OUTER) -> tuple[Choice, ...]:
    return tuple(Choice(i, o, s) for i in _INNER for o in outer for s in strengths)


def _falling(number: jax.Array, num_steps: int, power: float = 0.5) -> jax.Array:
    return (1 + _FALL * number / num_steps) ** -power


def single_loop(mode: Callable[[Choice], cm.SingleLoop], calls: int, grid: tuple[Choice, ...]) -> Method:
    """`cm.tune_while_training(mode=cm.SingleLoop(..))` around an ordinary loop of stochastic gradient descent."""

    def transformation(suite: Suite, choice: Choice, num_steps: int) -> optax.GradientTransformationExtraArgs:
        return cm.tune_while_training(
            optax.sgd(lambda count: choice.inner * _falling(count, num_steps)),
            meta_optimizer=optax.sgd(lambda count: choice.outer * _falling(count, num_steps)),
            problem=suite.problem,
            init_meta_params=suite.meta_params,
            mode=mode(choice),
        )

    def start(suite: Suite, choice: Choice, num_steps: int) -> Any:
        return suite.meta_params, suite.params, transformation(suite, choice, num_steps).init(suite.params)

    def step(suite: Suite, choice: Choice, num_steps: int, state: Any, number: jax.Array, key: jax.Array) -> Any:
        x, z, tuning = state
        sample = suite.sample(key)
        grads = jax.grad(suite.problem.inner)(z, x, sample)
        updates, tuning = transformation(suite, choice, num_steps).update(grads, tuning, z, task=sample)
        return cm.current_meta_params(tuning), optax.apply_updates(z, updates), tuning

    return Method(calls, start, step, grid)


class _Directions(NamedTuple):
    """The five quantities of a minibatch at (z, v, x): three of the inner sum, two of the outer one."""

    inner: tuple[jax.Array, jax.Array, jax.Array]
    outer: tuple[jax.Array, jax.Array]


def _of_inner(suite: Suite, z: jax.Array, v: jax.Array, x: jax.Array, train: Examples) -> Any:
    """Gradient of G in z, H v and the cross-derivative times v."""

    def in_z(z: jax.Array, x: jax.Array) -> jax.Array:
        gradient: jax.Array = jax.grad(suite.problem.inner)(z, x, Sample(train, train))
        return gradient

    gradient, pull = jax.vjp(in_z, z, x)
    return gradient, *pull(v)


def _of_outer(suite: Suite, z: jax.Array, x: jax.Array, val: Examples) -> Any:
    return jax.grad(suite.problem.outer, argnums=(0, 1))(z, x, Sample(val, val))


def _moved(choice: Choice, fall: Any, zvx: Any, told: _Directions) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All three at once; v descends v H v / 2 + v dF/dz, whose minimum is what implicit differentiation solves for."""
    (z, v, x), (gradient, product, cross), (in_z, in_x) = zvx, *told
    rate = choice.inner * fall
    return z - rate * gradient, v - rate * (product + in_z), x - choice.outer * fall * (cross + in_x)


def soba() -> Method:
    """SOBA: parameters, linear system and meta-parameters take a step each, all on the same minibatches.

    Reference:
      Dagreou, Ablin, Vaiter & Moreau (2022), algorithm SOBA.
    """

    def start(suite: Suite, choice: Choice, num_steps: int) -> Any:
        return suite.meta_params, suite.params, jnp.zeros_like(suite.params)

    def step(suite: Suite, choice: Choice, num_steps: int, state: Any, number: jax.Array, key: jax.Array) -> Any:
        x, z, v = state
        sample = suite.sample(key)
        told = _Directions(_of_inner(suite, z, v, x, sample.train), _of_outer(suite, z, x, sample.val))
        z, v, x = _moved(choice, _falling(number, num_steps), (z, v, x), told)
        return x, z, v

    return Method(5, start, step, _grid())


def saba() -> Method:
    """SABA: SOBA with every direction replaced by SAGA's, which remembers one for each minibatch; constant steps.

    Reference:
      Dagreou, Ablin, Vaiter & Moreau (2022), algorithm SABA.
    """

    def start(suite: Suite, choice: Choice, num_steps: int) -> Any:
        x, z, v = suite.meta_params, suite.params, jnp.zeros_like(suite.params)
        inner = jax.lax.map(lambda train: _of_inner(suite, z, v, x, train), suite.train)
        outer = jax.lax.map(lambda val: _of_outer(suite, z, x, val), suite.val)
        memory = _Directions(inner, outer)
        return x, z, v, memory, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), memory)

    def step(suite: Suite, choice: Choice, num_steps: int, state: Any, number: jax.Array, key: jax.Array) -> Any:
        x, z, v, memory, mean = state
        of_train, of_val = jax.random.split(key)
        i = jax.random.randint(of_train, (), 0, suite.train.y.shape[0])
        j = jax.random.randint(of_val, (), 0, suite.val.y.shape[0])
        train, val = (jax.tree.map(lambda leaf, k=k: leaf[k], part) for part, k in ((suite.train, i), (suite.val, j)))
        inner, of_inner, inner_mean = _saga(i, _of_inner(suite, z, v, x, train), memory.inner, mean.inner)
        outer, of_outer, outer_mean = _saga(j, _of_outer(suite, z, x, val), memory.outer, mean.outer)
        z, v, x = _moved(choice, 1.0, (z, v, x), _Directions(inner, outer))
        return x, z, v, _Directions(of_inner, of_outer), _Directions(inner_mean, outer_mean)

    return Method(5, start, step, _grid(), lambda num_train, num_val: 3 * num_train + 2 * num_val)


def _saga(place: jax.Array, fresh: Any, memory: Any, mean: Any) -> tuple[Any, Any, Any]:
    """The corrected direction, the memory and its mean, for one minibatch."""
    change = jax.tree.map(lambda new, old: new - old[place], fresh, memory)
    corrected = jax.tree.map(jnp.add, change, mean)
    kept = jax.tree.map(lambda old, new: old.at[place].set(new), memory, fresh)
    means = jax.tree.map(lambda m, d, old: m + d / old.shape[0], mean, change, memory)
    return corrected, kept, means


def stocbio() -> Method:
    """StocBiO: steps of learning, then a Neumann series on minibatches of its own, then a meta-step.

    Reference:
      Ji, Yang & Liang (2021), algorithm 2 and equation (4).
    """

    def start(suite: Suite, choice: Choice, num_steps: int) -> Any:
        return suite.meta_params, suite.params

    def step(suite: Suite, choice: Choice, num_steps: int, state: Any, number: jax.Array, key: jax.Array) -> Any:
        x, z = state
        of_learning, of_series, of_ends = (jax.random.split(k, _LOOP) for k in jax.random.split(key, 3))
        fall = _falling(number, num_steps)
        rate = choice.inner * fall
        in_z = jax.grad(suite.problem.inner)
        z, _ = jax.lax.scan(lambda z, k: (z - rate * in_z(z, x, suite.sample(k)), None), z, of_learning)
        of_outer, in_x = _of_outer(suite, z, x, suite.sample(of_ends[0]).val)

        def term(carry: Any, key: jax.Array) -> tuple[Any, None]:
            total, last = carry
            sample = suite.sample(key)
            _, product = jax.jvp(lambda z: in_z(z, x, sample), (z,), (last,))
            last = last - choice.inner * product
            return (total + last, last), None

        (total, _), _ = jax.lax.scan(term, (of_outer, of_outer), of_series)
        sample = suite.sample(of_ends[1])
        _, pull = jax.vjp(lambda x: in_z(z, x, sample), x)
        (cross,) = pull(choice.inner * total)
        return x - choice.outer * fall * (in_x - cross), z

    return Method(2 * _LOOP + 3, start, step, _grid())


def f2sa() -> Method:
    """F2SA, one step of each a time: z descends G, y descends F + lambda G, lambda grows as t^(1/7).

    Its analysis lets step sizes fall as t^(-4/7) (z), t^(-5/7) (y and x), y's being z's over 2 lambda. Both gradients
    of G in x are on one minibatch, where the paper draws two: their difference is what lambda multiplies.

    Reference:
      Kwon, Kwon, Wright & Nowak (2023), algorithm 1 (F2SA) with T = 1 and corollary 4.2.
    """

    def start(suite: Suite, choice: Choice, num_steps: int) -> Any:
        return suite.meta_params, suite.params, suite.params

    def step(suite: Suite, choice: Choice, num_steps: int, state: Any, number: jax.Array, key: jax.Array) -> Any:
        x, z, y = state
        first, second, third = (suite.sample(k) for k in jax.random.split(key, 3))
        penalty = choice.strength / _falling(number, num_steps, 1 / 7)
        rate = choice.inner * _falling(number, num_steps, 4 / 7)
        in_z, in_x = jax.grad(suite.problem.inner), jax.grad(suite.problem.inner, argnums=1)
        z = z - rate * in_z(z, x, first)
        of_outer = jax.grad(suite.problem.outer)(y, x, second)
        y = y - rate / (2 * penalty) * (of_outer + penalty * in_z(y, x, second))
        direct = jax.grad(suite.problem.outer, argnums=1)(y, x, third)
        gradient = direct + penalty * (in_x(y, x, third) - in_x(z, x, third))
        return x - choice.outer * _falling(number, num_steps, 5 / 7) * gradient, z, y

    return Method(6, start, step, _grid((10.0, 100.0), (0.003, 0.03, 0.3)))


# Finite differences of an even order: the strengths as multiples of nu, and their weights.
_DIFFERENCES = {2: ((-1, 1), (-1 / 2, 1 / 2)), 4: ((-2, -1, 1, 2), (1 / 12, -2 / 3, 2 / 3, -1 / 12))}


def f2sa_p(order: int) -> Method:
    """F2SA-p: a finite difference of order p over minimisers of G + j nu F, each learned for some steps from its last.

    Meta-steps have length one times the step size, whatever the gradient's.

    Reference:
      Chen, Li, Chayti & Zhang (2025), algorithm F2SA-p, p even.
    """
    multiples, weights = (jnp.array(part) for part in _DIFFERENCES[order])

    def start(suite: Suite, choice: Choice, num_steps: int) -> Any:
        return suite.meta_params, jnp.tile(suite.params, (order, 1))

    def step(suite: Suite, choice: Choice, num_steps: int, state: Any, number: jax.Array, key: jax.Array) -> Any:
        x, ys = state
        fall = _falling(number, num_steps)

        def nudged(y: jax.Array, x: jax.Array, strength: jax.Array, sample: Sample) -> jax.Array:
            return suite.problem.inner(y, x, sample) + strength * suite.problem.outer(y, x, sample)

        def learned(ys: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            sample = suite.sample(key)
            grads = jax.vmap(lambda y, s: jax.grad(nudged)(y, x, s, sample))(ys, strengths)
            return ys - choice.inner * fall * grads, None

        strengths = choice.strength * multiples
        ys, _ = jax.lax.scan(learned, ys, jax.random.split(key, _STEPS))
        last = suite.sample(jax.random.fold_in(key, 1))
        in_x = jax.vmap(lambda y, s: jax.grad(nudged, argnums=1)(y, x, s, last))(ys, strengths)
        gradient = weights @ in_x / choice.strength
        length = jnp.linalg.norm(gradient)
        return x - choice.outer * fall * gradient / jnp.where(length > 0, length, 1.0), ys

    grid = _grid(_NUDGES, (0.001, 0.01, 0.1))
    return Method(2 * order * (_STEPS + 1), start, step, grid, is_normalised=True)


METHODS: dict[str, Method] = {
    # The parameters' gradient and statistic, and of every nudged iterate four gradients.
    OURS: single_loop(lambda choice: cm.SingleLoop(), 6, _grid()),
    CENTRAL: single_loop(
        lambda choice: cm.SingleLoop(beta=choice.strength, scheme=cm.central_difference), 9, _grid(_NUDGES)
    ),
    SOBA: soba(),
    SABA: saba(),
    STOCBIO: stocbio(),
    F2SA: f2sa(),
    F2SA_2: f2sa_p(2),
    F2SA_4: f2sa_p(4),
}
