"""Modules in small: closed forms against descent and least squares, and what each network of digits can see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.composition.composed_digits import FIRST, PAIR, SECOND, network, outputs, pairs
from benchmarks.composition.linear_modules import (
    BITS,
    DENSE,
    MODULES,
    SPLIT,
    SPLIT_OUTPUTS,
    Weights,
    aligned,
    expected_error,
    items,
    joined,
    learned,
    modes,
    simulated,
    unseen_error,
)
from benchmarks.harness import precision


@pytest.mark.parametrize("name", [DENSE, SPLIT_OUTPUTS, SPLIT])
def test_the_closed_form_is_what_descent_does(name: str) -> None:
    of, _ = items(3, 2, 0.7, 1.5)
    seen, told = MODULES[name][0]
    x, y = joined(of.inputs(), seen), joined(of.targets(), told)
    basis = modes(x, y)
    begin = aligned(basis, 1e-3, np.random.default_rng(0))
    weights, rate, found = begin, 1e-3, []
    for step in range(1, 6001):
        slope = (weights.out @ weights.into @ x - y) @ x.T / x.shape[1]
        weights = Weights(weights.into - rate * weights.out.T @ slope, weights.out - rate * slope @ weights.into.T)
        if step % 1000 == 0:
            found.append(weights.out @ weights.into)
    exact = learned(basis, rate * np.arange(1000, 6001, 1000), 1e-3)
    size = np.linalg.norm(exact[-1])
    assert max(np.linalg.norm(ours - closed) for ours, closed in zip(found, exact, strict=True)) < 0.005 * size
    # Learning is under way at first: the comparison is not of ends alone.
    assert np.linalg.norm(exact[1]) < 0.5 * size
    with precision(x64=True):
        ours = simulated(Weights(begin.into[None], begin.out[None]), x[None], y, rate, 6, 1000)[0]
        np.testing.assert_allclose(ours, found, atol=1e-9)


@pytest.mark.parametrize("name", [DENSE, SPLIT_OUTPUTS, SPLIT])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_error_of_unseen_items_is_that_of_least_squares(name: str, scale: float) -> None:
    of, unseen = items(4, 2, scale, 1.0)
    seen, told = MODULES[name][0]
    assert told[0] == BITS
    least = joined(of.targets(), told) @ np.linalg.pinv(joined(of.inputs(), seen))
    assert unseen_error(least[None], of, unseen)[0] == pytest.approx(expected_error(name, of), abs=1e-12)
    basis = modes(joined(of.inputs(), seen), joined(of.targets(), told))
    np.testing.assert_allclose(learned(basis, np.array([1e4]), 1e-3)[0], least, atol=1e-9)


def test_data_without_common_directions_has_no_closed_form() -> None:
    random = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no closed form"):
        modes(random.normal(size=(3, 6)), random.normal(size=(2, 6)))


def test_every_digit_is_seen_on_either_side_and_most_pairs_are_not() -> None:
    seen, unseen = pairs(np.random.default_rng(0), 3)
    assert len(seen) == 30 and len(unseen) == 70
    assert {tuple(pair) for pair in np.concatenate([seen, unseen])} == {(i, j) for i in range(10) for j in range(10)}
    for side in (0, 1):
        np.testing.assert_array_equal(np.bincount(seen[:, side]), 3)


@pytest.mark.parametrize(("name", "sees"), [(DENSE, True), (SPLIT_OUTPUTS, True), (SPLIT, False)])
def test_only_split_networks_read_a_digit_without_the_other(name: str, sees: bool) -> None:
    params = network(name, (12, 12), jax.random.key(0))
    first, second = jax.random.uniform(jax.random.key(1), (2, 4, 196))
    before = outputs(name, params, {FIRST: first, SECOND: second})
    after = outputs(name, params, {FIRST: first, SECOND: jnp.zeros_like(second)})
    assert {part: logits.shape for part, logits in before.items()} == {FIRST: (4, 10), SECOND: (4, 10), PAIR: (4, 100)}
    assert bool(jnp.any(before[FIRST] != after[FIRST])) == sees
    assert bool(jnp.any(before[SECOND] != after[SECOND]))
