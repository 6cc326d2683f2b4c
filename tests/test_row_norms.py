"""The diagonal preconditioner: estimated norms of rows against NumPy, and what they save where scales differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm
from contrastive_meta._row_norms import NUM_PRODUCTS, inverse_row_norms, num_products, random_signs

SIZE = 200


def scales(spread: float) -> np.ndarray:
    """From 1 down to 10**-spread."""
    return 10.0 ** -np.linspace(0, spread, SIZE)


def estimated(hessian: np.ndarray, dtype=jnp.float64) -> np.ndarray:
    signs = random_signs(jnp.zeros(SIZE, dtype), NUM_PRODUCTS)
    return np.asarray(inverse_row_norms(signs @ jnp.asarray(hessian, dtype), jnp.asarray(0.0, dtype)), float)


def test_signs_are_balanced_and_differ():
    signs = np.asarray(random_signs({"a": jnp.zeros((50, 40)), "b": jnp.zeros(8000, jnp.float32)}, 4)["b"], float)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    # Three standard deviations of independent fair signs, for their means and the products of every two of them.
    assert np.all(np.abs(signs @ signs.T / signs.shape[1] - np.eye(4)) < 3 / signs.shape[1] ** 0.5)
    assert np.all(np.abs(signs.mean(1)) < 3 / signs.shape[1] ** 0.5)
    assert np.abs(np.mean(signs[:, 1:] * signs[:, :-1])) < 3 / signs.size**0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_norms_of_a_diagonal_matrix_are_its_entries(dtype):
    wanted = scales(3)
    found = estimated(np.diag(wanted), dtype)
    # All products are exact here; yet a part of the variance is taken for that of the estimation.
    slope, _ = np.polyfit(np.log(wanted), np.log(found), 1)
    assert -1 < slope < -0.9
    np.testing.assert_allclose(
        np.log(found), np.polyval(np.polyfit(np.log(wanted), np.log(found), 1), np.log(wanted)), atol=1e-3
    )


def test_norms_of_a_full_matrix():
    random, scale = np.random.default_rng(0), scales(3)
    mixed = random.standard_normal((SIZE, SIZE)) * scale[:, None]
    hessian = mixed @ mixed.T
    ratios = np.log(estimated(hessian) * np.linalg.norm(hessian, axis=1))
    # Of four products: a standard deviation of .40, less what is moved towards the mean.
    assert np.std(ratios) < 0.45 < 0.3 * np.std(np.log(np.linalg.norm(hessian, axis=1)))


def test_rows_that_are_alike_are_left_alone():
    random = np.random.default_rng(1)
    basis, _ = np.linalg.qr(random.standard_normal((SIZE, SIZE)))
    np.testing.assert_array_equal(estimated((basis * scales(4)) @ basis.T), 1.0)
    np.testing.assert_array_equal(estimated(np.zeros((SIZE, SIZE))), 1.0)
    np.testing.assert_array_equal(estimated(np.full((SIZE, SIZE), np.nan)), 1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_an_unknown_without_curvature_does_not_take_over(dtype):
    found = estimated(np.diag(np.concatenate([scales(3)[:-1], [0.0]])), dtype)
    assert np.isfinite(found).all()
    assert found[-1] <= found[0] * 1.01 / float(jnp.finfo(dtype).eps) ** 0.5


def test_few_unknowns_are_not_worth_it():
    assert num_products({"a": jnp.zeros(30)}) == 0
    assert num_products({"a": jnp.zeros(30), "b": jnp.zeros((2, 2))}) == NUM_PRODUCTS


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-3), (jnp.float64, 1e-9)])
def test_inputs_in_different_units_cost_few_gradients(dtype, error):
    """Ridge regression whose inputs have sizes over two decades, so curvatures over four, beside one of equal sizes."""
    random = np.random.default_rng(2)
    x, x_val = random.standard_normal((2, 400, SIZE)) / 20
    y, y_val = random.standard_normal((2, 400))
    problem = cm.BilevelProblem(
        lambda w, s, t: (jnp.sum((t["x"] @ w - t["y"]) ** 2) + jnp.sum(jnp.exp(s) * w**2)) / 2,
        lambda w, s, t: jnp.sum((t["x_val"] @ w - t["y_val"]) ** 2) / 2,
        lambda s, t: jnp.zeros_like(s),
    )
    estimate = jax.jit(cm.Contrastive(cm.LBFGS(tol=1e-4, max_steps=3000)).estimate, static_argnums=0)

    def measured(sizes: np.ndarray) -> tuple[float, int]:
        task, strengths = {"x": x * sizes, "y": y, "x_val": x_val * sizes, "y_val": y_val}, sizes**2 / 10
        w = np.linalg.solve(hessian := task["x"].T @ task["x"] + np.diag(strengths), task["x"].T @ y)
        u = np.linalg.solve(hessian, task["x_val"].T @ (task["x_val"] @ w - y_val))
        exact = -strengths * w * u
        cast = jax.tree.map(lambda a: jnp.asarray(a, dtype), (np.log(strengths), task))
        told = estimate(problem, *cast)
        assert told.diagnostics.status == cm.Status.CONVERGED
        free = cm.LBFGS(tol=1e-4, max_steps=3000).solve(lambda w: problem.inner(w, *cast), jnp.zeros(SIZE, dtype))
        spent = int(told.diagnostics.num_gradients) - int(free.num_gradients)
        return float(np.linalg.norm(np.asarray(told.grad, float) - exact) / np.linalg.norm(exact)), spent

    alike, spread = measured(np.ones(SIZE)), measured(scales(2))
    assert alike[0] < error
    assert spread[0] < error
    assert spread[1] < 3 * alike[1]
