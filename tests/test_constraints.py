"""SciPy's minimisers with constraints: closed forms, statuses where no derivative exists, and mistakes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import contrastive_meta as cm
from tests.oracles import ALONE

SIZE = 5
RANDOM = np.random.default_rng(0)
ROOT = RANDOM.normal(size=(SIZE, SIZE))
HESSIAN = ROOT @ ROOT.T / SIZE + np.eye(SIZE)
PULL, TARGET = RANDOM.normal(size=(2, SIZE))
MATRIX = RANDOM.normal(size=(2, SIZE))
META = jnp.array([0.2, -0.5])


def inner(w: Any, s: Any, t: Any) -> Any:
    return w @ HESSIAN @ w / 2 - jnp.exp(s[0]) * (PULL @ w)


def outer(w: Any, s: Any, t: Any) -> Any:
    return jnp.sum((w - TARGET) ** 2) / 2


PROBLEM = cm.BilevelProblem(inner, outer, lambda s, t: jnp.zeros(SIZE))


def on_plane(rows: Any, right: Any) -> Any:
    """The gradient of the outer loss at the minimum where rows w = right(s), from its first-order system."""

    def after_learning(s: Any) -> Any:
        number = rows.shape[0]
        system = jnp.block([[jnp.asarray(HESSIAN), rows.T], [rows, jnp.zeros((number, number))]])
        solution = jnp.linalg.solve(system, jnp.concatenate([jnp.exp(s[0]) * PULL, right(s)]))
        return outer(solution[:SIZE], s, None)

    return np.asarray(jax.grad(after_learning)(META))


def right_side(s: Any) -> Any:
    return jnp.stack([1.0 + 0 * s[1], s[1]])


def error_of(grad: Any, exact: Any) -> float:
    return float(np.linalg.norm(grad - exact) / np.linalg.norm(exact))


EQUAL = {"type": "eq", "fun": lambda w, s: MATRIX @ w - right_side(s)}
SLSQP = cm.ScipyMinimize("SLSQP", constraints=EQUAL)


@pytest.mark.parametrize(
    ("estimator", "accuracy"),
    [
        (cm.Contrastive(SLSQP), 1e-12),
        (cm.Contrastive(SLSQP, nudged_solver=SLSQP), 1e-9),
        # What a tolerance of 1e-8 leaves of learning, over the strength.
        (cm.ImplicitDifferentiation(SLSQP, cm.DenseInverse()), 1e-7),
    ],
    ids=["default", "own phases", "implicit"],
)
def test_equalities_that_depend_on_meta_parameters(estimator: Any, accuracy: float) -> None:
    result = estimator.estimate(PROBLEM, META, None)
    assert error_of(result.grad, on_plane(MATRIX, right_side)) < accuracy
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert result.diagnostics.error_estimate < accuracy
    np.testing.assert_allclose(MATRIX @ result.params, right_side(META), atol=1e-8)


@pytest.mark.parametrize("method", ["SLSQP", "trust-constr"])
def test_an_active_inequality_and_an_idle_one(method: str) -> None:
    """The first is kept at its upper bound, the second far from both of its bounds."""
    free = np.linalg.solve(HESSIAN, np.exp(META[0]) * PULL)
    limit = float(MATRIX[0] @ free) - 0.5
    solver = cm.ScipyMinimize(
        method, constraints=scipy.optimize.LinearConstraint(MATRIX, [-np.inf, -20.0], [limit, 20.0])
    )
    result = cm.Contrastive(solver, nudged_solver=ALONE).estimate(PROBLEM, META, None)
    exact = on_plane(MATRIX[:1], lambda s: jnp.array([limit]))
    assert error_of(result.grad[0], exact[0]) < 1e-10
    assert result.grad[1] == 0
    assert result.diagnostics.status == cm.Status.CONVERGED


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_curved_constraint(dtype: Any) -> None:
    """The nearest point to y with |w|^2 <= e^s is y e^(s/2) / |y|, so that d(c w)/ds is half of c w."""
    y, c = jnp.array([3.0, 4.0], dtype), jnp.array([1.0, -2.0], dtype)
    problem = cm.BilevelProblem(
        lambda w, s, t: jnp.sum((w - y) ** 2) / 2, lambda w, s, t: c @ w, lambda s, t: jnp.zeros(2, dtype)
    )
    within = scipy.optimize.NonlinearConstraint(lambda w, s: jnp.sum(w**2) - jnp.exp(s), -np.inf, 0.0)
    solver = cm.ScipyMinimize("SLSQP", tol=1e-8 if dtype == jnp.float64 else 1e-4, constraints=[within])
    s = jnp.asarray(0.3, dtype)
    result = cm.Contrastive(solver, nudged_solver=ALONE).estimate(problem, s, None)
    exact = 0.5 * np.exp(0.15) * float(c @ y) / 5
    assert result.grad == pytest.approx(exact, rel=1e-9 if dtype == jnp.float64 else 1e-4)
    assert result.diagnostics.status == cm.Status.CONVERGED
    # Far inside there is no constraint, and nothing depends on its strength.
    inside = cm.Contrastive(solver, nudged_solver=ALONE).estimate(problem, jnp.asarray(5.0, dtype), None)
    assert inside.grad == 0
    assert inside.diagnostics.status == cm.Status.CONVERGED


def test_a_constraint_that_only_just_touches_is_flagged() -> None:
    """It holds the minimum back for weaker strengths and does not for stronger ones: two derivatives."""
    free = np.linalg.solve(HESSIAN, np.exp(META[0]) * PULL)
    touching = scipy.optimize.LinearConstraint(MATRIX[:1], -np.inf, MATRIX[:1] @ free)
    solver = cm.ScipyMinimize("SLSQP", constraints=touching)
    result = cm.Contrastive(solver, nudged_solver=ALONE).estimate(PROBLEM, META, None)
    assert result.diagnostics.status > cm.Status.APPROXIMATE
    assert jnp.isinf(result.diagnostics.error_estimate)


def test_a_simplex_of_bounds_and_an_equality() -> None:
    """As the projection onto the simplex has it, for a batch and as a layer."""
    total = {"type": "eq", "fun": lambda w, s: jnp.sum(w) - jnp.exp(s[1])}
    solver = cm.ScipyMinimize("SLSQP", bounds=cm.prox.non_negative(), constraints=total)
    projected = cm.ProximalDescent(cm.prox.simplex(lambda s: jnp.exp(s[1])), tol=1e-12)
    expected = cm.Contrastive(projected, nudged_solver=ALONE).estimate(PROBLEM, META, None)
    assert int(jnp.sum(expected.params == 0)) in (1, 2, 3), "some entries are held, and some are not"
    step = cm.value_and_meta_grad(PROBLEM, cm.Contrastive(solver, nudged_solver=ALONE), has_aux=True)
    (_, told), grad = step(META, jnp.zeros((3, 1)))
    assert error_of(grad, expected.grad) < 1e-9
    assert told.status.tolist() == [cm.Status.CONVERGED] * 3
    solve = cm.argmin(inner, solver, init=jnp.zeros(SIZE), adjoint=cm.ContrastiveAdjoint(ALONE))
    assert error_of(jax.grad(lambda s: outer(solve(s, None), s, None))(META), expected.grad) < 1e-7


def test_constraints_that_cannot_be_met_are_a_failure() -> None:
    none = [{"type": "ineq", "fun": lambda w: w[0] - 1.0}, {"type": "ineq", "fun": lambda w: -w[0] - 1.0}]
    solution = cm.ScipyMinimize("SLSQP", constraints=none, max_steps=50).solve(lambda w: jnp.sum(w**2), jnp.zeros(2))
    assert solution.status == cm.Status.FREE_NOT_CONVERGED


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: cm.ScipyMinimize("BFGS", constraints=EQUAL), ValueError, "'BFGS' takes no constraints.*SLSQP"),
        (lambda: cm.ScipyMinimize("SLSQP", constraints=[3.0]), TypeError, "A constraint must be .* got a float"),
        (lambda: cm.ScipyMinimize("SLSQP", constraints={"type": "le"}), ValueError, "needs 'type'.*and 'fun'"),
        (
            lambda: cm.ScipyMinimize("SLSQP", constraints={"type": "eq", "fun": abs, "args": (1,)}),
            ValueError,
            "write them into the function",
        ),
        (
            lambda: cm.ScipyMinimize("SLSQP", constraints=scipy.optimize.LinearConstraint([[1.0]], 2.0, 1.0)),
            ValueError,
            "must not be above",
        ),
        (
            lambda: _solve({"type": "ineq", "fun": lambda w: w > 0}),
            TypeError,
            "must return a floating array; got bool.*not whether",
        ),
        (
            lambda: _solve(scipy.optimize.NonlinearConstraint(lambda w: w, [0.0, 0.0, 0.0], 1.0)),
            ValueError,
            "bounds for 3 entries, and its function returned 2",
        ),
    ],
    ids=["method", "kind", "dictionary", "args", "crossed", "boolean", "number"],
)
def test_mistakes_are_named(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"(?s){message}"):
        call()


def _solve(constraint: Any) -> Any:
    return cm.ScipyMinimize("SLSQP", constraints=constraint).solve(lambda w: jnp.sum(w**2), jnp.ones(2))
