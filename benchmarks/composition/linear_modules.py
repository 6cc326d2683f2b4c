"""Systematic data sets, and linear networks that learn them, dense or in modules: closed form and simulation."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
DENSE, SPLIT_OUTPUTS, SPLIT = "dense", "split outputs", "split"
BITS, NAME = "bits", "name"


class Items(NamedTuple):
    """Items that have bits, which they share with others, and a name of their own.

    Attributes:
      bits: of each item, -1 or 1, shape (bits, items).
      num_reported: how many of the bits, the first ones, are asked for.
      scale_in: of the one-hot name among the inputs.
      scale_out: of the one-hot name among the targets.
    """

    bits: Matrix
    num_reported: int
    scale_in: float
    scale_out: float

    def inputs(self) -> dict[str, Matrix]:
        """Bits and name of each item."""
        return {BITS: self.bits, NAME: self.scale_in * np.eye(self.bits.shape[1])}

    def targets(self) -> dict[str, Matrix]:
        """Reported bits and name of each item."""
        return {BITS: self.bits[: self.num_reported], NAME: self.scale_out * np.eye(self.bits.shape[1])}


def items(num_bits: int, num_reported: int, scale_in: float, scale_out: float) -> tuple[Items, Matrix]:
    """The items whose bits have the product 1, and the bits of the others, which are not learned from.

    In this half every bit is as often 1 as -1, and no two bits go together: the rows of bits are orthogonal, as they
    are over all items, and the closed form holds.
    """
    everyone = np.array(np.meshgrid(*[[1.0, -1.0]] * num_bits, indexing="ij")).reshape(num_bits, -1)
    even = everyone.prod(0) > 0
    return Items(everyone[:, even], num_reported, scale_in, scale_out), everyone[:, ~even]


# What each module of a network sees and reports.
MODULES: Mapping[str, tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = {
    DENSE: (((BITS, NAME), (BITS, NAME)),),
    SPLIT_OUTPUTS: (((BITS, NAME), (BITS,)), ((BITS, NAME), (NAME,))),
    SPLIT: (((BITS,), (BITS,)), ((BITS, NAME), (NAME,))),
}


class Modes(NamedTuple):
    """A module's data in the basis where what it learns falls apart into numbers.

    Attributes:
      left: directions of the targets, shape (outputs, modes).
      right: directions of the inputs, shape (inputs, modes).
      strength: of target to input in each, shape (modes,).
      power: of the input in each, shape (modes,).
    """

    left: Matrix
    right: Matrix
    strength: Matrix
    power: Matrix


def modes(x: Matrix, y: Matrix) -> Modes:
    """Singular vectors of X = V x E' and Y = U y E', which share the directions E of items.

    Args:
      x: shape (inputs, items).
      y: shape (outputs, items).

    Raises:
      ValueError: the data has no such basis, and no closed form.
    """
    number = x.shape[1]
    # A generic mixture has the directions that both have, and separates those that either does.
    shared = x.T @ x / np.trace(x.T @ x) + np.sqrt(2) * y.T @ y / np.trace(y.T @ y)
    _, directions = np.linalg.eigh(shared)
    right, left = x @ directions, y @ directions
    of_x, of_y = np.linalg.norm(right, axis=0), np.linalg.norm(left, axis=0)
    kept = (of_x > 1e-9) & (of_y > 1e-9)
    right, left = right[:, kept] / of_x[kept], left[:, kept] / of_y[kept]
    if not (np.allclose(right.T @ right, np.eye(kept.sum())) and np.allclose(left.T @ left, np.eye(kept.sum()))):
        raise ValueError("modes: inputs and targets share no directions of items, and have no closed form.")
    return Modes(left, right, of_x[kept] * of_y[kept] / number, of_x[kept] ** 2 / number)


def learned(of: Modes, times: Matrix, start: float) -> Matrix:
    """The maps of a linear network with one hidden layer in gradient flow: shape (times, outputs, inputs).

        L = |Y - W2 W1 X|^2 / (2 items),    pi' = 2 pi (s - d pi),    W2 W1 = sum over modes of pi left right'

    Args:
      of: the module's modes.
      times: of gradient flow, shape (times,).
      start: of every mode.

    Reference:
      Saxe, McClelland & Ganguli (2014), deep linear networks; Jarvis et al. (2024), modules.
    """
    end = of.strength / of.power
    sizes = end / (1 - (1 - end / start) * np.exp(-2 * of.strength * times[:, None]))
    maps: Matrix = np.einsum("tk,ok,ik->toi", sizes, of.left, of.right)
    return maps


class Weights(NamedTuple):
    """Of a network W2 W1: `into` of shape (hidden, inputs), `out` of shape (outputs, hidden); or several, stacked."""

    into: Any
    out: Any


def aligned(of: Modes, start: float, random: np.random.Generator) -> Weights:
    """A start of the closed form: `start` in every mode, turned at random in the hidden layer."""
    turn, _ = np.linalg.qr(random.normal(size=(len(of.strength), len(of.strength))))
    return Weights(np.sqrt(start) * turn @ of.right.T, np.sqrt(start) * of.left @ turn.T)


def noise(num_inputs: int, num_hidden: int, num_outputs: int, scale: float, random: np.random.Generator) -> Weights:
    """Small random weights, normal with deviation `scale`."""
    return Weights(
        scale * random.normal(size=(num_hidden, num_inputs)), scale * random.normal(size=(num_outputs, num_hidden))
    )


@functools.partial(jax.jit, static_argnames=("num_times", "steps_between"))
@functools.partial(jax.vmap, in_axes=(0, 0, None, None, None, None))
def simulated(begin: Weights, x: jax.Array, y: jax.Array, rate: float, num_times: int, steps_between: int) -> jax.Array:
    """The maps W2 W1 under descent on |Y - W2 W1 X|^2 / (2 items).

    Args:
      begin: of each network, with a leading axis.
      x: inputs of each network, shape (networks, inputs, items).
      y: targets of all, shape (outputs, items).
      rate: of descent: the time of gradient flow that a step stands for.
      num_times: that are told.
      steps_between: two of them, and before the first.

    Returns:
      shape (networks, times, outputs, inputs).
    """

    def loss(weights: Weights) -> jax.Array:
        return jnp.sum((y - weights.out @ (weights.into @ x)) ** 2) / (2 * x.shape[1])

    def step(_: int, weights: Weights) -> Weights:
        slopes = jax.grad(loss)(weights)
        return Weights(weights.into - rate * slopes.into, weights.out - rate * slopes.out)

    def several(weights: Weights, _: None) -> tuple[Weights, jax.Array]:
        moved = jax.lax.fori_loop(0, steps_between, step, weights)
        return moved, moved.out @ moved.into

    maps: jax.Array = jax.lax.scan(several, Weights(*map(jnp.asarray, begin)), None, num_times)[1]
    return maps


def joined(parts: Mapping[str, Matrix], names: tuple[str, ...]) -> Matrix:
    """The rows of these parts, one below the other."""
    return np.concatenate([parts[name] for name in names])


def unseen_error(maps: Matrix, of: Items, unseen: Matrix) -> Matrix:
    """Of the reported bits of items that were not learned from, whose names no input stands for.

    Args:
      maps: of the module that reports the bits, the bits first: shape (times, outputs, inputs).
      of: the items learned from.
      unseen: bits of the others, shape (bits, items).

    Returns:
      The mean squared error over the mean square of the targets, shape (times,).
    """
    reported = of.num_reported
    told = maps[:, :reported, : len(unseen)] @ unseen
    error: Matrix = np.mean((told - unseen[:reported]) ** 2, axis=(1, 2))
    return error


def expected_error(network: str, of: Items) -> float:
    """The error of `unseen_error` in the end: a module that sees names credits them with a part of every bit."""
    number = of.bits.shape[1]
    share = of.scale_in**2 / (number + of.scale_in**2)
    return 0.0 if network == SPLIT else float(share**2)
