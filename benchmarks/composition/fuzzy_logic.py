"""Tasks of fuzzy logic: a function is the larger of two conjunctions, which tasks combine."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt


class Logic(NamedTuple):
    """Of tasks.

    Attributes:
      num_variables: each conjunction has all of them, negated (1 - x) or not.
      num_examples: to read.
      num_queries: to predict.
    """

    num_variables: int
    num_examples: int
    num_queries: int

    @property
    def terms(self) -> npt.NDArray[np.int_]:
        """Whether a conjunction has a variable as it is: shape (2^variables, variables)."""
        return np.array(list(itertools.product([0, 1], repeat=self.num_variables)))

    @property
    def pairs(self) -> npt.NDArray[np.int_]:
        """All combinations of two conjunctions, shape (combinations, 2)."""
        return np.array(list(itertools.combinations(range(2**self.num_variables), 2)))

    @property
    def num_inputs(self) -> int:
        """Of a token: the variables, the target or 0, and whether it is a query."""
        return self.num_variables + 2


class Tasks(NamedTuple):
    """A batch of tasks.

    Attributes:
      tokens: examples, then queries: shape (tasks, examples and queries, inputs).
      targets: of the queries, of variance near 1: shape (tasks, queries).
      pairs: the conjunctions of each task, shape (tasks, 2).
      active: which conjunction is the larger one, shape (tasks, examples and queries).
    """

    tokens: jax.Array
    targets: jax.Array
    pairs: jax.Array
    active: jax.Array


def sampler(logic: Logic, num_tasks: int) -> Callable[[jax.Array, Any], Tasks]:
    """Tasks `(key, chances of each pair) -> tasks`: f(x) = max over two terms of min over variables (Zadeh 1965)."""
    pairs, terms = jnp.asarray(logic.pairs), jnp.asarray(logic.terms)
    number = logic.num_examples + logic.num_queries

    def sample(key: jax.Array, chances: Any) -> Tasks:
        of_pairs, of_inputs = jax.random.split(key)
        chosen = jax.random.choice(of_pairs, pairs, (num_tasks,), p=chances)
        x = jax.random.uniform(of_inputs, (num_tasks, number, logic.num_variables))
        literals = jnp.where(terms[chosen][:, :, None] == 1, x[:, None], 1 - x[:, None])
        values = jnp.min(literals, -1)
        y = scaled(jnp.max(values, 1), logic)
        asked = jnp.arange(number) >= logic.num_examples
        # Uniform variables have variance 1/12.
        columns = [(x - 0.5) * 12**0.5, jnp.where(asked, 0, y)[..., None], jnp.broadcast_to(asked, y.shape)[..., None]]
        active = jnp.take_along_axis(chosen, jnp.argmax(values, 1), 1)
        queries = slice(logic.num_examples, None)
        return Tasks(jnp.concatenate(columns, -1), y[:, queries], chosen, active)

    return sample


def scaled(values: jax.Array, logic: Logic) -> jax.Array:
    """Values of the functions brought near mean 0 and variance 1.

    A conjunction of n uniform variables has mean 1 / (n + 1) and variance n / ((n + 1)^2 (n + 2)). The larger of two
    lies about half a standard deviation above; of two normal ones it would be 0.56 (1 / sqrt(pi)).
    """
    n = logic.num_variables
    deviation = (n / (n + 2)) ** 0.5 / (n + 1)
    near: jax.Array = (values - 1 / (n + 1)) / deviation - 0.56
    return near


class Division(NamedTuple):
    """Which combinations are trained on.

    Attributes:
      seen: rows of `Logic.pairs`.
      unseen: rows that no division of this seed trains on.
    """

    seen: npt.NDArray[np.int_]
    unseen: npt.NDArray[np.int_]

    def chances(self, rows: npt.NDArray[np.int_], logic: Logic) -> jax.Array:
        """Equal ones for these rows, 0 for the others."""
        of = np.zeros(len(logic.pairs), np.float32)
        of[rows] = 1 / len(rows)
        return jnp.asarray(of)


def divide(logic: Logic, share: float, num_unseen: int, seed: int) -> Division:
    """A random division; a larger share of the pairs has all those of a smaller one.

    Every term is in a seen pair: the first pairs are a random ring of all terms.

    Args:
      logic: of the tasks.
      share: of all pairs that are seen.
      num_unseen: pairs kept apart.
      seed: of the division.

    Raises:
      ValueError: the share leaves no room for the ring or for what is kept apart.
    """
    random, pairs = np.random.default_rng(seed), logic.pairs
    number, num_terms = round(share * len(pairs)), 2**logic.num_variables
    if not num_terms <= number <= len(pairs) - num_unseen:
        raise ValueError(f"{number} of {len(pairs)} pairs: at least {num_terms} for a ring, {num_unseen} kept apart.")
    circle = random.permutation(num_terms)
    row_of = {tuple(pair): row for row, pair in enumerate(pairs.tolist())}
    ring = np.array([row_of[tuple(sorted((int(a), int(b))))] for a, b in zip(circle, np.roll(circle, 1), strict=True)])
    others = random.permutation(np.setdiff1d(np.arange(len(pairs)), ring))
    order = np.concatenate([ring, others])
    return Division(order[:number], order[len(order) - num_unseen :])
