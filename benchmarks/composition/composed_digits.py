"""Pairs of handwritten digits, and ReLU networks that read them, split into modules or dense."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

from benchmarks.composition.linear_modules import DENSE, SPLIT, SPLIT_OUTPUTS
from benchmarks.data import digits as small_digits
from benchmarks.data import images, resized
from contrastive_meta.architectures import mlp, mlp_params

FIRST, SECOND, PAIR = "first", "second", "pair"
_DIGITS = 10
_SIDE = 14  # pixels
_SIZES = {FIRST: _DIGITS, SECOND: _DIGITS, PAIR: _DIGITS**2}
# What each module sees and reports.
MODULES: Mapping[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    DENSE: (((FIRST, SECOND), (FIRST, SECOND, PAIR)),),
    SPLIT_OUTPUTS: tuple(((FIRST, SECOND), (reported,)) for reported in _SIZES),
    SPLIT: (((FIRST,), (FIRST,)), ((SECOND,), (SECOND,)), ((FIRST, SECOND), (PAIR,))),
}
# Adam's usual rate.
_RATE = 1e-3


class Digits(NamedTuple):
    """As many images of each digit, 14 x 14 pixels between 0 and 1: shape (10, images, 196)."""

    train: npt.NDArray[np.float32]
    test: npt.NDArray[np.float32]


def digits(num_train: int, num_test: int, folder: Path | None, *, smoke: bool) -> Digits:
    """The first of MNIST's training images and test images of each digit, averaged over 2 x 2 pixels.

    A smoke run takes the 8 x 8 pixels that come with scikit-learn, with a margin: it needs no download.
    """
    if smoke:
        split = small_digits(0, 1000, 700)
        x_train, y_train, x_test, y_test, scale = split.x_train, split.y_train, split.x_val, split.y_val, 1.0
    else:
        x_train, y_train, x_test, y_test = images("mnist", folder)
        x_train, x_test, scale = x_train.reshape(len(x_train), -1), x_test.reshape(len(x_test), -1), 255.0

    def first(x: npt.NDArray[Any], y: npt.NDArray[Any], number: int) -> npt.NDArray[np.float32]:
        chosen = np.concatenate([x[np.flatnonzero(y == digit)[:number]] for digit in range(_DIGITS)])
        small = resized(chosen, _SIDE) / scale
        flat: npt.NDArray[np.float32] = small.reshape(_DIGITS, number, -1).astype(np.float32)
        return flat

    return Digits(first(x_train, y_train, num_train), first(x_test, y_test, num_test))


def pairs(random: np.random.Generator, partners: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Pairs of digits that are learned from, each digit with so many partners on either side, and the others.

    Returns:
      two arrays of shape (pairs, 2).
    """
    offsets, names = random.permutation(_DIGITS)[:partners], random.permutation(_DIGITS)
    seen = {(first, int(names[(first + offset) % _DIGITS])) for first in range(_DIGITS) for offset in offsets}
    every = [(first, second) for first in range(_DIGITS) for second in range(_DIGITS)]
    return np.array([pair for pair in every if pair in seen]), np.array([pair for pair in every if pair not in seen])


def network(name: str, hidden: tuple[int, ...], key: jax.Array) -> list[dict[str, Any]]:
    """First parameters of each module. Modules share the dense network's hidden units evenly."""
    of = MODULES[name]
    widths = [max(1, width // len(of)) for width in hidden]
    num_pixels = _SIDE**2
    return [
        mlp_params(k, (num_pixels * len(seen), *widths, sum(_SIZES[part] for part in reported)))
        for k, (seen, reported) in zip(jax.random.split(key, len(of)), of, strict=True)
    ]


def outputs(name: str, params: list[dict[str, Any]], x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Logits of the first digit, the second digit, and the name of the pair, shape (examples, classes)."""
    told: dict[str, jax.Array] = {}
    for (seen, reported), of in zip(MODULES[name], params, strict=True):
        logits = mlp(of, jnp.concatenate([x[part] for part in seen], axis=-1), jax.nn.relu)
        ends = np.cumsum([_SIZES[part] for part in reported])[:-1].tolist()
        told |= dict(zip(reported, jnp.split(logits, ends, axis=-1), strict=True))
    return told


def drawn(key: jax.Array, kept: jax.Array, of: jax.Array, number: int) -> tuple[dict[str, jax.Array], jax.Array]:
    """So many random images of random pairs, and the pairs, shape (number, 2)."""
    of_pairs, of_images = jax.random.split(key)
    chosen = kept[jax.random.randint(of_pairs, (number,), 0, len(kept))]
    which = jax.random.randint(of_images, (number, 2), 0, of.shape[1])
    x = of[chosen, which]
    return {FIRST: x[:, 0], SECOND: x[:, 1]}, chosen


def learned(
    name: str, hidden: tuple[int, ...], key: jax.Array, kept: jax.Array, of: jax.Array, num_steps: int, batch: int
) -> list[dict[str, Any]]:
    """The network after Adam on the sum of the three cross-entropies."""
    of_start, of_run = jax.random.split(key)
    begin = network(name, hidden, of_start)
    descent = optax.adam(_RATE)

    def loss(params: list[dict[str, Any]], key: jax.Array) -> jax.Array:
        x, chosen = drawn(key, kept, of, batch)
        targets = {FIRST: chosen[:, 0], SECOND: chosen[:, 1], PAIR: _DIGITS * chosen[:, 0] + chosen[:, 1]}
        told = outputs(name, params, x)
        terms = [optax.softmax_cross_entropy_with_integer_labels(told[part], targets[part]).mean() for part in told]
        return jnp.sum(jnp.stack(terms))

    def step(state: Any, key: jax.Array) -> tuple[Any, None]:
        params, memory = state
        updates, memory = descent.update(jax.grad(loss)(params, key), memory)
        return (optax.apply_updates(params, updates), memory), None

    (end, _), _ = jax.lax.scan(step, (begin, descent.init(begin)), jax.random.split(of_run, num_steps))
    return end


def accuracy(name: str, params: list[dict[str, Any]], key: jax.Array, kept: jax.Array, of: jax.Array) -> jax.Array:
    """The share of digits that are read right, in 2,000 pairs of these kinds."""
    x, chosen = drawn(key, kept, of, 2000)
    told = outputs(name, params, x)
    return jnp.mean(jnp.stack([told[FIRST].argmax(-1), told[SECOND].argmax(-1)], -1) == chosen)
