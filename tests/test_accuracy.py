"""The numbers: estimators against exact meta-gradients, the order of schemes in beta, identities with others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import ALONE, SmallProblem, relative_error, small_problem

CONVEX = ["ridge", "logistic", "data_cleaning"]
# Condition numbers of the small problems are below 100: 1500 accelerated steps end at the floor of float64.
NESTEROV = cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), num_steps=1500)
LBFGS = cm.LBFGS(tol=1e-9, max_steps=500)


def estimate(estimator: cm.MetaGradientEstimator, case: SmallProblem) -> cm.MetaGradient:
    return estimator.estimate(case.problem, case.meta_params, case.task)


def error(estimator: cm.MetaGradientEstimator, case: SmallProblem) -> float:
    result = estimate(estimator, case)
    assert result.diagnostics.status == cm.Status.CONVERGED, cm.Status(int(result.diagnostics.status)).describe()
    return relative_error(result.grad, case.exact.grad)


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize(
    ("scheme", "tolerance"),
    [(cm.central_difference, 1e-6), (cm.second_order_forward, 1e-6), (cm.four_point, 1e-8), (cm.circle, 1e-8),
     (cm.complex_step, 1e-12)],
)  # fmt: skip
def test_float64_schemes_reach_the_exact_gradient(name, scheme, tolerance):
    estimator = cm.Contrastive(NESTEROV, ALONE, cm.relative(scheme))
    assert error(estimator, small_problem(name)) <= tolerance


@pytest.mark.parametrize("name", CONVEX)
def test_default_estimator_with_lbfgs(name):
    assert error(cm.Contrastive(LBFGS), small_problem(name)) <= 1e-6


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize(("scheme", "tolerance"), [(cm.central_difference, 1e-3), (cm.complex_step, 1e-5)])
def test_float32_schemes_reach_the_floor_of_float32(name, scheme, tolerance):
    case = small_problem(name, jnp.float32)
    result = estimate(cm.Contrastive(NESTEROV, ALONE, cm.relative(scheme)), case)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result.grad))
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(result.grad, case.exact.grad) <= tolerance


def test_central_linear_nudge_on_ridge_is_exact_at_any_strength():
    # L_in is quadratic in params and dL_in/dtheta as well, so no power of beta beyond the first is left.
    estimator = cm.Contrastive(NESTEROV, ALONE, cm.central_difference(1.0), cm.LinearNudge())
    case = small_problem("ridge")
    assert relative_error(estimate(estimator, case).grad, case.exact.grad) <= 1e-12


@pytest.mark.parametrize("name", CONVEX)
@pytest.mark.parametrize("inverse", [cm.ConjugateGradient(), cm.DenseInverse()])
def test_implicit_differentiation_is_exact(name, inverse):
    assert error(cm.ImplicitDifferentiation(NESTEROV, inverse), small_problem(name)) <= 1e-6


@pytest.mark.parametrize("name", ["quadratic", "softmax"])
def test_direct_terms_and_other_trees(name):
    case = small_problem(name)
    result = estimate(cm.Contrastive(NESTEROV, ALONE), case)
    assert relative_error(result.grad, case.exact.grad) <= 1e-6
    assert np.isclose(result.outer_loss, case.exact.outer_loss, rtol=1e-9)


@pytest.mark.parametrize(("name", "rate"), [("mlp", 0.1), ("sinusoids", 0.01)])
def test_networks_from_inside_their_basin(name, rate):
    case = small_problem(name)
    solver = cm.OptaxDescent(optax.sgd(rate, momentum=0.9, nesterov=True), num_steps=3000)
    estimator = cm.Contrastive(solver, ALONE)
    start = estimator.init_state(case.problem, case.meta_params, case.task)._replace(params=case.params)
    result = estimator.estimate(case.problem, case.meta_params, case.task, state=start)
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(result.grad, case.exact.grad) <= 1e-6


def test_neumann_and_unrolling_converge_to_the_same_limit():
    case = small_problem("logistic")
    neumann = [
        relative_error(
            estimate(cm.ImplicitDifferentiation(NESTEROV, cm.NeumannSeries(0.5, num_terms=n)), case).grad,
            case.exact.grad,
        )
        for n in (10, 40, 160, 1500)
    ]
    unrolled = [
        relative_error(
            estimate(cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(0.5), num_steps=n)), case).grad,
            case.exact.grad,
        )
        for n in (10, 40, 160, 1500)
    ]
    for errors in (neumann, unrolled):
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] <= 1e-6 < errors[0]


# Spans of beta in which truncation is above rounding and the next order is still small.
SLOPES = [
    (cm.forward_difference, 1, (1e-3, 1e-2)),
    (cm.second_order_forward, 2, (1e-3, 1e-2)),
    (cm.central_difference, 2, (3e-3, 3e-2)),
    (cm.four_point, 4, (4e-3, 2.4e-2)),
    (functools.partial(cm.circle, num_points=4), 4, (4e-3, 2.4e-2)),
]


@pytest.mark.parametrize(("scheme", "order", "span"), SLOPES)
@pytest.mark.parametrize("name", ["logistic", "data_cleaning"])
def test_error_falls_with_the_order_of_the_scheme(name, scheme, order, span):
    case = small_problem(name)
    betas = jnp.geomspace(*span, 5)
    schemes = jax.vmap(scheme)(betas)

    @jax.jit
    @jax.vmap
    def gradient(scheme):
        return estimate(cm.Contrastive(NESTEROV, ALONE, scheme), case).grad

    grads = gradient(schemes)
    errors = [relative_error(jax.tree.map(lambda g, k=k: g[k], grads), case.exact.grad) for k in range(len(betas))]
    slope = np.polyfit(np.log(betas), np.log(errors), 1)[0]
    assert abs(slope - order) <= 0.2, errors


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.01])
def test_forward_contrast_is_the_fully_first_order_estimator(beta):
    """F2SA (Kwon et al. 2023), written out for ridge with penalty 1/beta and closed-form solves."""
    case = small_problem("ridge")
    (x, y, x_val, y_val), strengths = case.task[:4], np.exp(np.asarray(case.meta_params))
    penalty = 1 / beta
    n, n_val = len(y), len(y_val)

    def solve(nudge):
        hessian = x.T @ x / n + np.diag(strengths) + nudge * x_val.T @ x_val / n_val
        return np.linalg.solve(hessian, x.T @ y / n + nudge * x_val.T @ y_val / n_val)

    def inner_in_meta(w):
        return 0.5 * strengths * w**2

    # grad = d_theta g(y_lambda) + lambda (d_theta f(y_lambda) - d_theta f(y*)), g without direct term here.
    expected = penalty * (inner_in_meta(solve(beta)) - inner_in_meta(solve(0.0)))
    result = estimate(cm.Contrastive(NESTEROV, NESTEROV, cm.forward_difference(beta)), case)
    # Rounding of the solutions, about 1e-15, is divided by beta.
    assert relative_error(result.grad, expected) <= 1e-12 / beta


@pytest.mark.parametrize("num_terms", [1, 3, 10])
def test_nudged_descent_steps_are_neumann_terms(num_terms):
    """From a converged free phase, K steps of plain descent towards beta -> 0 sum K terms of the Neumann series."""
    case, rate = small_problem("logistic"), 0.3
    nudged = cm.OptaxDescent(optax.sgd(rate), num_steps=num_terms)
    contrast = estimate(cm.Contrastive(NESTEROV, nudged, scheme=cm.central_difference(1e-4)), case)
    series = estimate(cm.ImplicitDifferentiation(NESTEROV, cm.NeumannSeries(rate, num_terms=num_terms)), case)
    assert relative_error(contrast.grad, series.grad) <= 1e-6
    assert contrast.diagnostics.status == cm.Status.NUDGED_NOT_CONVERGED
    assert np.isclose(contrast.diagnostics.nudged_residual, series.diagnostics.nudged_residual, rtol=1e-5)
    if num_terms == 1:
        identity = estimate(cm.ImplicitDifferentiation(NESTEROV, cm.IdentityHessian()), case)
        assert relative_error(contrast.grad, jax.tree.map(lambda g: rate * g, identity.grad)) <= 1e-6
