"""Learners with kinks, bounds, constraints and decay: right values, passing statuses, and failing ones where due."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import ALONE

SEEDS = range(10)
LOG_STRENGTHS = jnp.array([-1.5, -2.0])


def regression(seed: int, dtype: Any = jnp.float64) -> dict[str, jax.Array]:
    """Thirty cases of eight inputs, half of them idle, for learning and for judging."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(2, 30, 8))
    y = x @ (random.normal(size=8) * (random.random(8) < 0.5)) + 0.3 * random.normal(size=(2, 30))
    return dict(zip(("x", "x_val", "y", "y_val"), (jnp.asarray(a, dtype) for a in (*x, *y)), strict=True))


def inner(w: Any, s: Any, t: Any) -> Any:
    return 0.5 * jnp.mean((t["x"] @ w - t["y"]) ** 2) + 0.5 * jnp.exp(s[1]) * jnp.sum(w**2)


def outer(w: Any, s: Any, t: Any) -> Any:
    return 0.5 * jnp.mean((t["x_val"] @ w - t["y_val"]) ** 2)


def begin(s: Any, t: Any) -> Any:
    return jnp.zeros(8, t["x"].dtype)


def soft(w: Any, s: Any, step: Any) -> Any:
    """The proximal step of the lasso, of a user's own."""
    return jnp.sign(w) * jnp.maximum(jnp.abs(w) - step * jnp.exp(s[0]).astype(w.dtype), 0.0)


PROBLEM = cm.BilevelProblem(inner, outer, begin)
PENALTIES = {
    "lasso": cm.prox.l1(lambda s: jnp.exp(s[0])),
    "elastic net": cm.prox.elastic_net(lambda s: jnp.exp(s[0]), lambda s: 0.1 * jnp.exp(s[0])),
    "group": cm.prox.of(
        lambda w, s, step: cm.prox.group(jnp.exp(s[0])).prox(w.reshape(4, 2), None, step).reshape(8),
        lambda w, s: cm.prox.group(jnp.exp(s[0])).value(w.reshape(4, 2), None),
    ),
    "non-negative": cm.prox.non_negative(),
    "box": cm.prox.box(lambda s: -jnp.exp(s[0]), lambda s: 2 * jnp.exp(s[0])),
    "simplex": cm.prox.simplex(lambda s: 5 * jnp.exp(s[0])),
    "ball": cm.prox.l2_ball(lambda s: 2 * jnp.exp(s[0])),
}


@functools.cache
def judged(name: str) -> Callable[[Any, Any], Any]:
    """The outer loss after learning, in float64 to rounding: 4000 plain proximal steps, apart from the package's."""
    penalty = PENALTIES[name]

    @jax.jit
    def after_learning(s: Any, t: Any) -> Any:
        step = 1 / (jnp.linalg.norm(t["x"], 2) ** 2 / 30 + jnp.exp(s[1]))

        def proximal_step(_: Any, w: Any) -> Any:
            return penalty.prox(w - step * jax.grad(inner)(w, s, t), s, step)

        return outer(jax.lax.fori_loop(0, 4000, proximal_step, begin(s, t)), s, t)

    return after_learning


@functools.cache
def exactly(name: str, seed: int) -> np.ndarray[Any, Any]:
    """Central differences, whose error is of the order of 1e-10 for steps of 1e-4 and of fourth order."""
    task, found = regression(seed), []
    for direction in jnp.eye(2):
        values = [judged(name)(LOG_STRENGTHS + k * 1e-4 * direction, task) for k in (1, -1, 2, -2)]
        found.append((8 * (values[0] - values[1]) - (values[2] - values[3])) / 12e-4)
    return np.array(found)


def learner(name: str, dtype: Any) -> cm.ProximalDescent:
    return cm.ProximalDescent(PENALTIES[name], tol=1e-12 if dtype == jnp.float64 else 1e-6)


def error_of(grad: Any, exact: Any) -> float:
    return float(np.linalg.norm(np.asarray(grad, np.float64) - exact) / np.linalg.norm(exact))


# --- Penalties and constraints, the default strength ---


FLOATS: list[Any] = [(name, jnp.float64) for name in PENALTIES if name not in ("group", "ball")]
FLOATS += [("lasso", jnp.float32)]
# Programs take seconds to compile, and these are much like others.
FLOATS += [pytest.param(name, jnp.float64, marks=pytest.mark.slow) for name in ("group", "ball")]
FLOATS += [
    pytest.param(name, jnp.float32, marks=pytest.mark.slow)
    for name in ("elastic net", "non-negative", "box", "simplex", "ball")
]


@pytest.mark.parametrize(("name", "dtype"), FLOATS, ids=lambda x: x if isinstance(x, str) else jnp.dtype(x).name)
def test_the_default_is_right_on_ten_seeds(name: str, dtype: Any) -> None:
    # Where phases need no other learner, it need not be compiled.
    estimator = cm.Contrastive(learner(name, dtype), nudged_solver=None if name == "lasso" else ALONE)
    estimate = jax.jit(lambda task: estimator.estimate(PROBLEM, LOG_STRENGTHS.astype(dtype), task))
    tolerance = 1e-6 if dtype == jnp.float64 else 1e-3
    for seed in SEEDS:
        result, exact = estimate(regression(seed, dtype)), exactly(name, seed)
        assert error_of(result.grad, exact) < tolerance, seed
        assert result.diagnostics.status <= cm.Status.FELL_BACK, (seed, cm.Status(int(result.diagnostics.status)))
        assert result.diagnostics.error_estimate < 0.01
        assert result.grad.dtype == dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("lasso", jnp.float64),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("lasso", jnp.float32),
                ("ball", jnp.float64),
                ("ball", jnp.float32),
                ("box", jnp.float64),
                ("simplex", jnp.float64),
            )
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else jnp.dtype(x).name,
)
def test_phases_that_the_learner_runs_are_right(name: str, dtype: Any) -> None:
    solver = learner(name, dtype)
    estimator = cm.Contrastive(solver, nudged_solver=solver)
    estimate = jax.jit(lambda task: estimator.estimate(PROBLEM, LOG_STRENGTHS.astype(dtype), task))
    for seed in SEEDS:
        result = estimate(regression(seed, dtype))
        assert error_of(result.grad, exactly(name, seed)) < (1e-6 if dtype == jnp.float64 else 1e-3), seed
        assert result.diagnostics.status <= cm.Status.FELL_BACK
        assert result.diagnostics.phases_by == cm.PhasesBy.SOLVER


def test_tasks_of_a_batch_have_walls_of_their_own() -> None:
    tasks = jax.tree.map(lambda *xs: jnp.stack(xs), *(regression(seed) for seed in range(4)))
    step = jax.jit(cm.value_and_meta_grad(PROBLEM, cm.Contrastive(learner("lasso", jnp.float64), ALONE), has_aux=True))
    (_, told), grad = step(LOG_STRENGTHS, tasks)
    assert error_of(grad, np.mean([exactly("lasso", seed) for seed in range(4)], axis=0)) < 1e-6
    assert told.status.tolist() == [cm.Status.CONVERGED] * 4


def test_lasso_in_one_dimension() -> None:
    """For the loss (w - y)^2 / 2, w = y - strength where y is larger, so that dw / d log strength = -strength."""
    problem = cm.BilevelProblem(
        lambda w, s, y: 0.5 * jnp.sum((w - y) ** 2), lambda w, s, y: jnp.sum(w), lambda s, y: jnp.zeros_like(y)
    )
    estimator = cm.Contrastive(cm.ProximalDescent(cm.prox.l1(jnp.exp)), ALONE)
    result = estimator.estimate(problem, jnp.log(0.5), jnp.array([3.0, 0.2, -2.0, 1.5]))
    # Two entries end above 0 and one below.
    assert result.grad == pytest.approx(-0.5, rel=1e-9)
    np.testing.assert_allclose(result.params, [2.5, 0.0, -1.5, 1.0], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "inverse"),
    [
        ("lasso", cm.DenseInverse()),
        ("box", cm.ConjugateGradient()),
        ("simplex", cm.DenseInverse()),
        pytest.param("ball", cm.DenseInverse(), marks=pytest.mark.slow),
    ],
    ids=["lasso, dense", "box, cg", "simplex, dense", "ball, dense"],
)
def test_implicit_differentiation_is_right_too(name: str, inverse: cm.InverseHessian) -> None:
    estimator = cm.ImplicitDifferentiation(learner(name, jnp.float64), inverse)
    estimate = jax.jit(lambda task: estimator.estimate(PROBLEM, LOG_STRENGTHS, task))
    for seed in range(4):
        result = estimate(regression(seed))
        assert error_of(result.grad, exactly(name, seed)) < 1e-6
        assert result.diagnostics.status == cm.Status.CONVERGED


def test_a_layer_of_the_lasso() -> None:
    solve = cm.argmin(inner, learner("lasso", jnp.float64), init=begin, adjoint=cm.ContrastiveAdjoint(ALONE))
    grad = jax.grad(lambda s: outer(solve(s, regression(0)), s, regression(0)))(LOG_STRENGTHS)
    assert error_of(grad, exactly("lasso", 0)) < 1e-6


# --- What may depend on meta-parameters ---


def test_a_proximal_step_without_a_value() -> None:
    """Right for projections, which do not depend on the step, and for strengths that are numbers; else it raises."""
    task = regression(0)
    capped = cm.prox.of(lambda w, s, step: jnp.clip(w, -jnp.exp(s[0]), 2 * jnp.exp(s[0])))
    found = cm.Contrastive(cm.ProximalDescent(capped, tol=1e-12), ALONE, estimate_error=False).estimate(
        PROBLEM, LOG_STRENGTHS, task
    )
    assert error_of(found.grad, exactly("box", 0)) < 1e-6
    fixed = cm.prox.of(lambda w, s, step: soft(w, LOG_STRENGTHS, step))
    found = cm.Contrastive(cm.ProximalDescent(fixed, tol=1e-12), ALONE, estimate_error=False).estimate(
        PROBLEM, LOG_STRENGTHS, task
    )
    assert found.grad[0] == 0
    assert found.grad[1] == pytest.approx(exactly("lasso", 0)[1], rel=1e-6)
    with pytest.raises(ValueError, match="its penalty has no value"):
        cm.Contrastive(cm.ProximalDescent(cm.prox.of(soft))).estimate(PROBLEM, LOG_STRENGTHS, task)


def project(loss: Any, w: Any, s: Any) -> Any:
    low, high = -jnp.exp(s[0]), 2 * jnp.exp(s[0])
    return jax.lax.fori_loop(0, 600, lambda _, at: jnp.clip(at - 0.3 * jax.grad(loss)(at), low, high), w)


def project_on_host(loss: Any, w: Any, s: Any) -> Any:
    for _ in range(300):
        w = np.clip(w - 0.3 * loss.value_and_grad(w)[1], -np.exp(s[0]), 2 * np.exp(s[0]))
    return w


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(cm.CallableSolver(project, penalty=PENALTIES["box"]), marks=pytest.mark.slow),
        cm.CallableSolver(project_on_host, host=True, penalty=PENALTIES["box"]),
        cm.ScipyMinimize("L-BFGS-B", tol=1e-10, bounds=PENALTIES["box"]),
        pytest.param(cm.ScipyMinimize("TNC", tol=1e-8, bounds=PENALTIES["box"]), marks=pytest.mark.slow),
    ],
    ids=["callable", "on the host", "L-BFGS-B", "TNC"],
)
def test_bounds_that_are_learned(solver: cm.InnerSolver) -> None:
    result = cm.Contrastive(solver).estimate(PROBLEM, LOG_STRENGTHS, regression(0))
    assert error_of(result.grad, exactly("box", 0)) < 1e-6
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert result.diagnostics.phases_by == cm.PhasesBy.SOLVER


def test_bounds_that_nobody_declared_are_a_failure() -> None:
    result = cm.Contrastive(cm.CallableSolver(project)).estimate(PROBLEM, LOG_STRENGTHS, regression(0))
    assert result.diagnostics.status > cm.Status.APPROXIMATE


def test_a_function_of_two_arguments_still_is_one() -> None:
    """Arguments with defaults do not count."""

    def descend(loss: Any, w: Any, rate: float = 0.3) -> Any:
        return jax.lax.fori_loop(0, 600, lambda _, at: at - rate * jax.grad(loss)(at), w)

    task = regression(0)
    result = cm.Contrastive(cm.CallableSolver(descend)).estimate(PROBLEM, LOG_STRENGTHS, task)
    expected = cm.ImplicitDifferentiation(cm.LBFGS(tol=1e-12)).estimate(PROBLEM, LOG_STRENGTHS, task)
    assert error_of(result.grad, np.asarray(expected.grad)) < 1e-6


def test_bounds_for_a_method_that_takes_none() -> None:
    with pytest.raises(ValueError, match="'BFGS' takes no bounds"):
        cm.ScipyMinimize("BFGS", bounds=cm.prox.box(0.0, 1.0))


def test_phases_of_a_learner_without_the_walls_are_a_failure() -> None:
    estimator = cm.Contrastive(learner("lasso", jnp.float64), nudged_solver=cm.LBFGS(tol=1e-10))
    result = estimator.estimate(PROBLEM, LOG_STRENGTHS, regression(0))
    assert result.diagnostics.status > cm.Status.APPROXIMATE


# --- Projections and decay in the optimiser ---


def case_of_a_user() -> tuple[cm.BilevelProblem, Any]:
    """Ridge regression with weights that stay positive; right: 0.29310587."""
    random = np.random.RandomState(0)
    a = random.randn(10, 5)
    b, c = a @ np.array([0.5, -0.8, 0.7, -0.3, 0.2]), random.randn(5)
    problem = cm.BilevelProblem(
        lambda w, decay, t: 0.5 * jnp.mean((a @ w - b) ** 2) + 0.5 * decay * jnp.sum(w**2),
        lambda w, decay, t: c @ w,
        lambda decay, t: jnp.zeros(5),
    )
    return problem, optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative())


@pytest.mark.parametrize(
    ("options", "own"),
    [({"num_steps": 2000}, True), ({"tol": 1e-10}, False)],
    ids=["own phases, steps", "default, tolerance"],
)
def test_positive_weights(options: dict[str, Any], own: bool) -> None:
    problem, optimizer = case_of_a_user()
    solver = cm.OptaxDescent(optimizer, **options)
    result = cm.Contrastive(solver, nudged_solver=solver if own else ALONE).estimate(problem, 0.3, None)
    assert result.grad == pytest.approx(0.29310587, abs=5e-9)
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert result.diagnostics.error_estimate < 1e-6


def test_a_run_to_a_tolerance_ends_at_a_wall() -> None:
    problem, optimizer = case_of_a_user()
    solver = cm.OptaxDescent(optimizer, tol=1e-8)
    solution = solver.solve(lambda w: problem.inner_loss(w, 0.3, None), jnp.zeros(5))
    assert solution.status == cm.Status.CONVERGED
    assert solution.num_steps < 1000
    assert solution.residual <= 1e-8


@pytest.mark.parametrize("momentum", [None, 0.9], ids=["descent", "momentum"])
def test_weight_decay_in_the_optimiser(momentum: float | None) -> None:
    """The minimum of the loss with 0.2 |w|^2 / 2 added, in closed form."""
    task = regression(0)

    def after_learning(s: Any) -> Any:
        hessian = task["x"].T @ task["x"] / 30 + (jnp.exp(s[1]) + 0.2) * jnp.eye(8)
        return outer(jnp.linalg.solve(hessian, task["x"].T @ task["y"] / 30), s, task)

    optimizer = optax.chain(optax.add_decayed_weights(0.2), optax.sgd(0.1, momentum=momentum))
    result = cm.Contrastive(cm.OptaxDescent(optimizer, num_steps=1500), ALONE).estimate(PROBLEM, LOG_STRENGTHS, task)
    assert error_of(result.grad, np.asarray(jax.grad(after_learning)(LOG_STRENGTHS))) < 1e-8
    assert result.diagnostics.status == cm.Status.CONVERGED


# --- Edges ---


@pytest.mark.parametrize("own", [True, False], ids=["own phases", "default"])
def test_a_solution_at_the_edge_of_a_kink_is_flagged(own: bool) -> None:
    """For (w - y)^2 / 2 and a strength of |y| the derivative is one-sided: any nudge brings the entry in, or not."""
    problem = cm.BilevelProblem(
        lambda w, s, y: 0.5 * jnp.sum((w - y) ** 2),
        lambda w, s, y: jnp.sum((w - 3.0) ** 2),
        lambda s, y: jnp.zeros_like(y),
    )
    solver = cm.ProximalDescent(cm.prox.l1(lambda s: s), tol=1e-10)
    estimator = cm.Contrastive(solver, nudged_solver=solver if own else ALONE)
    estimate = jax.jit(lambda y: estimator.estimate(problem, jnp.array(0.5), y).diagnostics)
    at_edge = estimate(jnp.array([2.0, 0.5 + 1e-15]))
    assert at_edge.status == cm.Status.NOT_SMOOTH
    assert jnp.isinf(at_edge.error_estimate)
    # Next to it, nudges are made small enough.
    for y in (0.501, 0.499):
        near = estimate(jnp.array([2.0, y]))
        assert near.status <= cm.Status.FELL_BACK
        assert near.error_estimate < 1e-2


def test_a_typed_strength_that_leads_through_a_wall_is_flagged() -> None:
    solver = learner("lasso", jnp.float64)
    scheme = cm.central_difference(beta=3.0)
    result = cm.Contrastive(solver, nudged_solver=solver, scheme=scheme).estimate(PROBLEM, LOG_STRENGTHS, regression(1))
    assert result.diagnostics.status >= cm.Status.NOT_SMOOTH
    assert error_of(result.grad, exactly("lasso", 1)) > 1e-2


def pieces(name: str, w: Any, s: Any) -> Any:
    """For each entry which of the penalty's pieces it is on, by the penalty's own formula: -1, 0 or 1."""
    if name == "box":
        return (w >= 2 * jnp.exp(s[0])).astype(int) - (w <= -jnp.exp(s[0])).astype(int)
    return jnp.sign(w).astype(int)


@functools.cache
def nudged(name: str) -> Callable[[Any, Any], Any]:
    """Where learning with `beta` times the outer loss ends: 4000 plain proximal steps, apart from the package's."""
    penalty = PENALTIES[name]

    @jax.jit
    def after_learning(beta: Any, t: Any) -> Any:
        s = LOG_STRENGTHS
        step = 1 / (
            jnp.linalg.norm(t["x"], 2) ** 2 / 30 + jnp.exp(s[1]) + beta * jnp.linalg.norm(t["x_val"], 2) ** 2 / 30
        )
        loss = lambda w: inner(w, s, t) + beta * outer(w, s, t)  # noqa: E731
        return jax.lax.fori_loop(0, 4000, lambda _, w: penalty.prox(w - step * jax.grad(loss)(w), s, step), begin(s, t))

    return after_learning


FIVE = ("lasso", "elastic net", "non-negative", "box", "simplex")


@pytest.mark.parametrize("name", ["lasso", *(pytest.param(name, marks=pytest.mark.slow) for name in FIVE[1:])])
def test_a_support_that_changes_under_the_nudge_is_said(name: str) -> None:
    """A strength of 0.3, one-sided: on some of ten seeds an entry enters or leaves on the way, on others none does."""
    solver, beta = learner(name, jnp.float64), 0.3
    estimator = cm.Contrastive(solver, nudged_solver=solver, scheme=cm.forward_difference(beta))
    estimate = jax.jit(lambda task: estimator.estimate(PROBLEM, LOG_STRENGTHS, task).diagnostics.status)
    changes = []
    for seed in SEEDS:
        task = regression(seed)
        free, away = (pieces(name, nudged(name)(strength, task), LOG_STRENGTHS) for strength in (0.0, beta))
        changes.append(bool(jnp.any(free != away)))
        assert (estimate(task) >= cm.Status.NOT_SMOOTH) == changes[-1], seed
    assert 0 < sum(changes) < len(changes)


@pytest.mark.parametrize("name", ["lasso", "box", "ball"])
def test_complex_schemes_of_a_penalty_are_refused(name: str) -> None:
    estimator = cm.Contrastive(learner(name, jnp.float64), ALONE, cm.complex_step())
    with pytest.raises(TypeError, match=r"(?s)Complex schemes cannot follow a learner with a penalty.*`automatic\(\)`"):
        estimator.estimate(PROBLEM, LOG_STRENGTHS, regression(0))


def test_other_rules_are_told_what_to_write() -> None:
    estimator = cm.Contrastive(learner("lasso", jnp.float64), rule=cm.AnchoredSynapse())
    with pytest.raises(TypeError, match=r"(?s)Got AnchoredSynapse.*write the penalty into `inner_loss`"):
        estimator.estimate(PROBLEM, LOG_STRENGTHS, regression(0))


ANCHORED = cm.AnchoredSynapse()
HELD_TARGETS = jnp.array([4.0, -3.0, 1.0, -0.5, 0.2])
DECAYED = optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.3))
# Learners whose walls do not depend on the meta-parameters, and where they end, from targets with the pull.
FIXED_WALLS: dict[str, tuple[cm.InnerSolver, Callable[[Any, Any], Any]]] = {
    "non-negative": (cm.ProximalDescent(cm.prox.non_negative()), lambda pulled, s: jnp.maximum(pulled / (1 + s), 0)),
    "box": (cm.ProximalDescent(cm.prox.box(-0.7, 0.9)), lambda pulled, s: jnp.clip(pulled / (1 + s), -0.7, 0.9)),
    "bounds": (
        cm.ScipyMinimize("L-BFGS-B", tol=1e-10, bounds=cm.prox.box(-0.7, 0.9)),
        lambda pulled, s: jnp.clip(pulled / (1 + s), -0.7, 0.9),
    ),
    "decay": (cm.OptaxDescent(DECAYED, num_steps=300), lambda pulled, s: pulled / (1.5 + s)),
}


@pytest.mark.parametrize("name", FIXED_WALLS)
def test_other_rules_are_right_where_walls_do_not_depend_on_meta_parameters(name: str) -> None:
    solver, end_of = FIXED_WALLS[name]

    def outer(w: Any, meta: Any, t: Any) -> Any:
        return jnp.sum(jnp.cosh(w - 0.3))

    def exact(meta: Any) -> Any:
        s = jnp.exp(meta["log_strength"])
        return outer(end_of(HELD_TARGETS + s * meta["anchor"], s), meta, None)

    problem = cm.BilevelProblem(
        lambda w, meta, t: 0.5 * jnp.sum((w - HELD_TARGETS) ** 2) + ANCHORED.energy(w, meta),
        outer,
        lambda meta, t: jnp.full(5, 0.1),
    )
    meta_params = {"anchor": jnp.array([0.5, 0.2, -0.4, -0.3, 0.1]), "log_strength": jnp.linspace(-1.0, 1.0, 5)}
    result = cm.Contrastive(solver, ALONE, rule=ANCHORED).estimate(problem, meta_params, None)
    cm.raise_if_failed(result)
    for name_of_leaf, expected in jax.grad(exact)(meta_params).items():
        np.testing.assert_allclose(result.grad[name_of_leaf], expected, rtol=1e-6, atol=1e-8)


# --- Learners that take no loss ---

DISTANCE = cm.BilevelProblem(
    lambda w, theta, t: 0.5 * jnp.sum((w - theta) ** 2),
    lambda w, theta, t: 0.5 * jnp.sum((w - 1.0) ** 2),
    lambda theta, t: jnp.zeros(1),
)


def positive(theta: Any, task: Any) -> Any:
    return np.maximum(theta, 0.0).reshape(1)


def layer(solver: cm.InnerSolver, theta: Any) -> Any:
    solve = cm.argmin(DISTANCE.inner_loss, solver, init=jnp.zeros(1))
    return jax.grad(lambda at: DISTANCE.outer_loss(solve(at, None), at, None))(theta)


def test_an_external_learner_that_ends_elsewhere_is_flagged() -> None:
    solver = cm.ExternalLearner(positive)
    result = cm.Contrastive(solver).estimate(DISTANCE, jnp.array(-1.0), None)
    assert result.diagnostics.status == cm.Status.FREE_NOT_CONVERGED
    assert jnp.isinf(result.diagnostics.error_estimate)
    assert jnp.isnan(layer(solver, -1.0))
    assert layer(solver, 0.5) == pytest.approx(-0.5)


def test_an_external_learner_that_declares_its_walls_is_right() -> None:
    solver = cm.ExternalLearner(positive, penalty=cm.prox.non_negative())
    result = cm.Contrastive(solver).estimate(DISTANCE, jnp.array(-1.0), None)
    assert (result.grad, result.outer_loss) == (0.0, 0.5)
    cm.raise_if_failed(result)
    assert cm.Contrastive(solver).estimate(DISTANCE, jnp.array(0.5), None).grad == pytest.approx(-0.5)
