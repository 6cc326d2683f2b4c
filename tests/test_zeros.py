"""Meta-gradients that are zero, and those of small polynomials, right to rounding: both pass all checks."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import contrastive_meta as cm
from tests.oracles import ALONE


def anchored(w: Any, s: Any, t: Any) -> Any:
    return jnp.sum((w - s) ** 2) / 2


def opposite(w: Any, s: Any, t: Any) -> Any:
    return jnp.sum((w - s * jnp.array([1.0, -1.0], w.dtype)) ** 2) / 2


# Inner loss, outer loss, number of parameters, meta-parameter.
ZEROS = {
    "no outer gradient": (anchored, lambda w, s, t: jnp.sum((w - 0.3) ** 2), 1, 0.3),
    "no mixed derivative": (lambda w, s, t: jnp.sum((w - 1) ** 2) + s**2, lambda w, s, t: jnp.sum(w**2), 1, 0.3),
    "entries that cancel": (opposite, lambda w, s, t: jnp.sum(w), 2, 0.3),
    "direct and indirect term": (anchored, lambda w, s, t: jnp.sum(w) - s, 1, 0.3),
}
# The same with the exact meta-gradient: w = s; w^3 = s; s w^2 + w = 1.
POLYNOMIALS = {
    "quadratic": (anchored, lambda w, s, t: jnp.sum((w - 1) ** 2) / 2, 0.3, lambda s: s - 1),
    "quartic": (
        lambda w, s, t: jnp.sum(w**4 / 4 - s * w),
        lambda w, s, t: jnp.sum(w**2) / 2,
        8.0,
        lambda s: s ** (-1 / 3) / 3,
    ),
    "cubic": (
        lambda w, s, t: jnp.sum(w**2 / 2 + s * w**3 / 3 - w),
        lambda w, s, t: jnp.sum(w),
        2.0,
        jax.grad(lambda s: (jnp.sqrt(1 + 4 * s) - 1) / (2 * s)),
    ),
}
DTYPES = [jnp.float64, pytest.param(jnp.float32, marks=pytest.mark.slow)]
KINDS: dict[str, Any] = {
    "contrastive": lambda solver: cm.Contrastive(solver, ALONE),
    "implicit": cm.ImplicitDifferentiation,
}


def learner(dtype: Any) -> cm.LBFGS:
    return cm.LBFGS(tol=1e-10 if dtype == jnp.float64 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=["f64", "f32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZEROS)
def test_a_zero_passes(name: str, kind: str, dtype: Any) -> None:
    inner, outer, size, s = ZEROS[name]
    problem = cm.BilevelProblem(inner, outer, lambda s, t: jnp.full(size, 0.5, dtype))
    result = KINDS[kind](learner(dtype)).estimate(problem, jnp.asarray(s, dtype), None)
    # Every term is of the order of 1, and rounding is divided by the displacement, here more than a hundredth.
    assert abs(float(result.grad)) <= 100 * float(jnp.finfo(dtype).eps)
    assert result.diagnostics.status == cm.Status.CONVERGED


@pytest.mark.parametrize("name", ["entries that cancel", "no mixed derivative"])
def test_a_layer_gives_the_zero(name: str) -> None:
    inner, _, size, s = ZEROS[name]
    solve = cm.argmin(inner, learner(jnp.float64), init=jnp.full(size, 0.5), adjoint=cm.ContrastiveAdjoint(ALONE))
    assert jax.grad(lambda s: jnp.sum(solve(s, None)))(s) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=["f64", "f32"])
@pytest.mark.parametrize("name", POLYNOMIALS)
def test_small_polynomials_are_right_and_pass(name: str, dtype: Any) -> None:
    inner, outer, s, exact = POLYNOMIALS[name]
    problem = cm.BilevelProblem(inner, outer, lambda s, t: jnp.full(1, 0.5, dtype))
    result = cm.Contrastive(learner(dtype), ALONE).estimate(problem, jnp.asarray(s, dtype), None)
    # Some hundred roundings for what is extrapolated.
    assert result.grad == pytest.approx(float(exact(s)), rel=1e-11 if dtype == jnp.float64 else 1e-5)
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert result.diagnostics.error_estimate < (1e-10 if dtype == jnp.float64 else 1e-4)


def test_rounding_of_terms_that_cancel_is_in_the_estimate() -> None:
    def outer(w: Any, s: Any, t: Any) -> Any:
        at = s * jnp.arange(1, 8) / 7
        return jnp.sum(w) - jnp.sum(jnp.exp(at) - jnp.exp(-at)) / 2

    def inner(w: Any, s: Any, t: Any) -> Any:
        return jnp.sum(w**2) / 2 - jnp.sum(w) * jnp.sum(jnp.sinh(s * jnp.arange(1, 8) / 7))

    problem = cm.BilevelProblem(inner, outer, lambda s, t: jnp.full(1, 0.5, jnp.float32))
    estimator = cm.ImplicitDifferentiation(learner(jnp.float32))
    results = jax.vmap(lambda s: estimator.estimate(problem, s, None))(jnp.linspace(0.1, 2, 40, dtype=jnp.float32))
    wrong = results.grad != 0
    # The meta-gradient is zero: what is left is rounding, which differs between the two terms.
    assert jnp.any(wrong)
    assert jnp.all(results.diagnostics.error_estimate[wrong] > 0.1)
    assert jnp.all(results.diagnostics.status == cm.Status.CONVERGED)
