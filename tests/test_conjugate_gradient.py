"""The conjugate gradients loop against dense numpy solutions: what it reports beside the solution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_meta._linear import LinearSolve, Stopping, conjugate_gradient

N = 5
STRICT = Stopping(tol=1e-12, highest_tol=1e-12, max_steps=50)


def system(condition: float = 50.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(N, N)))[0]
    return (basis * np.geomspace(1 / condition, 1, N)) @ basis.T, rng.normal(size=N)


def solve(H: Any, b: Any, stopping: Stopping, guess: Any = None, skip: bool = False) -> LinearSolve:
    norm = jnp.linalg.norm(b)
    return jax.jit(
        lambda stopping: conjugate_gradient(
            lambda x: jnp.asarray(H) @ x, jnp.asarray(b), norm, stopping, guess=guess, skip=skip
        )
    )(stopping)


def cauchy_length(H: np.ndarray, r: np.ndarray) -> float:
    return float((r @ r) ** 1.5 / (r @ H @ r))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_solution_residual_and_curvature_along_the_right_side(damping: float) -> None:
    H, b = system()
    found = solve(H, b, STRICT._replace(damping=damping))
    expected = np.linalg.solve(H + damping * np.eye(N), b)
    np.testing.assert_allclose(found.solution, expected, rtol=1e-9)
    # The residual is that of the undamped system.
    np.testing.assert_allclose(found.residual, b - H @ expected, atol=1e-10)
    assert float(found.first_curvature) == pytest.approx(b @ H @ b / (b @ b), rel=1e-12)
    assert not found.indefinite and not found.broken


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_looking_ahead_costs_one_product_and_bounds_what_is_missing_from_below(damping: float) -> None:
    H, b = system(condition=1e4)
    early = Stopping(tol=1e-12, highest_tol=1e-12, max_steps=2, damping=damping)
    found, ahead = solve(H, b, early), solve(H, b, early._replace(look_ahead=True))
    np.testing.assert_array_equal(found.solution, ahead.solution)
    assert ahead.num_products == found.num_products + 1
    residual, solution = np.asarray(ahead.residual), np.asarray(ahead.solution)
    missing = cauchy_length(H, residual) / np.linalg.norm(solution)
    # The loop knows |H| |x| up to its estimate of |H|, the largest curvature that it has met: the estimate cancels.
    assert float(ahead.missing) == pytest.approx(missing, rel=0.1)
    assert missing <= np.linalg.norm(np.linalg.solve(H, residual)) / np.linalg.norm(solution)


def test_a_guess_is_measured_and_a_good_one_is_returned() -> None:
    H, b = system()
    guess = np.linalg.solve(H, b)
    found = solve(H, b, STRICT, jnp.asarray(guess))
    assert found.num_products == 1
    np.testing.assert_array_equal(found.solution, guess)
    rough = jnp.asarray(guess + 1e-3)
    np.testing.assert_allclose(solve(H, b, STRICT, rough).solution, guess, rtol=1e-9)
    measured = solve(H, b, STRICT._replace(max_steps=0), rough)
    assert measured.num_products == 1
    np.testing.assert_array_equal(measured.solution, rough)
    np.testing.assert_allclose(measured.residual, b - H @ np.asarray(rough), rtol=1e-9, atol=1e-14)


def test_what_is_skipped_costs_nothing() -> None:
    H, b = system()
    found = solve(H, b, STRICT._replace(look_ahead=True), skip=True)
    assert found.num_products == 0 and not np.any(found.solution)
    np.testing.assert_array_equal(found.residual, b)


def test_downward_curvature_and_broken_products_end_the_search() -> None:
    H, b = system()
    assert solve(-H, b, STRICT).indefinite
    assert solve(np.full((N, N), np.nan), b, STRICT).broken
