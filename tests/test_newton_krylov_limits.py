"""Where the fast nudged learner does not apply, and whether it knows: curvature, other learners, units, old states."""

import dataclasses

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import ALONE, STILL, away, double_well, relative_error, small_problem, started_at

# Of the double well: on the rim between its minima, where the loss curves downwards.
RIM = np.float64(0.1)


def test_downward_curvature_falls_back_to_the_users_learner():
    problem, theta = double_well(), jnp.array(0.0)
    # After two small steps the loss still curves downwards; the nudged phases of the published rule go on learning.
    start = cm.OptaxDescent(optax.sgd(0.01), num_steps=2)
    fast = cm.Contrastive(start).estimate(problem, theta, RIM)
    # In reserve no strength is sought.
    published = cm.Contrastive(start, start, cm.relative(cm.central_difference), cm.LinearNudge())
    published = published.estimate(problem, theta, RIM)
    np.testing.assert_allclose(fast.grad, published.grad, rtol=1e-12)
    assert fast.diagnostics.status >= cm.Status.FELL_BACK
    alone = cm.Contrastive(start, ALONE).estimate(problem, theta, RIM)
    assert alone.diagnostics.status > cm.Status.APPROXIMATE
    settled = cm.Contrastive(cm.OptaxDescent(optax.sgd(0.05), num_steps=400)).estimate(problem, theta, RIM)
    assert settled.diagnostics.status == cm.Status.CONVERGED
    # At w = 1 the curvature is 8 and dw/dtheta = -1/8; the outer gradient is 1 in each of two entries.
    np.testing.assert_allclose(settled.grad, -2 / 8, rtol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    ("start", "status"), [((-1.2, 1.0), cm.Status.FREE_NOT_CONVERGED), ((-0.5, 0.5), cm.Status.CONVERGED)]
)
def test_learning_is_finished_through_a_curved_valley(start, status, dtype):
    """Rosenbrock (1960): on the way to the minimum at (theta, theta^2) the loss falls while its gradient grows.

    From the first start it more than doubles on the way, and another learner might have ended elsewhere, for all that
    is known; from the second it does not. Straight from there to the minimum the mean curvature is negative, which is
    no fault of the nudge.
    """
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: (theta - w[0]) ** 2 + 10 * (w[1] - w[0] ** 2) ** 2,
        outer_loss=lambda w, theta, task: 0.5 * jnp.sum((w - task) ** 2),
        init_params=lambda theta, task: jnp.array(start, dtype),
    )
    asked = jnp.array([2.0, 0.5], dtype)
    estimator = cm.Contrastive(STILL, ALONE)
    result = estimator.estimate(problem, jnp.asarray(0.8, dtype), asked)
    exact = (0.8 - 2.0) * 1.0 + (0.64 - 0.5) * 2 * 0.8
    # In float32 the way from the first start is another one, on which the gradient grows by 1.4: nothing is uncertain.
    other_way = dtype == jnp.float32 and result.diagnostics.status == cm.Status.CONVERGED
    assert result.diagnostics.status == status or other_way
    np.testing.assert_allclose(result.grad, exact, rtol=1e-3 if dtype == jnp.float32 else 1e-8)
    assert float(result.diagnostics.error_estimate) < (2e-3 if dtype == jnp.float32 else 1e-8)
    # Of which the answer to the nudge is a part: it is not sought anew at every step of the way.
    assert result.diagnostics.num_gradients < 250


def test_a_step_beyond_the_domain_of_the_loss_is_taken_back():
    """The longest step allowed is 30; Newton's, 12 down from 9, leads to the root of a negative number."""
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: theta * w[0] ** 1.5 / 1.5 - w[0] + 0.5 * (w[1] - 100.0) ** 2,
        outer_loss=lambda w, theta, task: 0.5 * (w[0] - 2.0) ** 2,
        init_params=lambda theta, task: jnp.array([9.0, 100.0]),
    )
    estimator = cm.Contrastive(STILL, ALONE)
    result = estimator.estimate(problem, jnp.array(1.0), None)
    assert result.diagnostics.status == cm.Status.CONVERGED
    # Learned is w = 1 / theta^2.
    np.testing.assert_allclose(result.grad, (1.0 - 2.0) * -2.0, rtol=1e-7)


def test_a_direction_out_of_the_domain_of_the_loss_takes_no_other_along():
    """At 1e-6 the nudge points to the roots of negative numbers, and learning away from them."""
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: theta * w[0] ** 1.5 / 1.5 - w[0] + 0.5 * (w[1] - 100.0) ** 2,
        outer_loss=lambda w, theta, task: 0.5 * (w[0] - 2.0) ** 2,
        init_params=lambda theta, task: jnp.array([1e-6, 100.0]),
    )
    estimator = cm.Contrastive(STILL, ALONE)
    result = estimator.estimate(problem, jnp.array(1.0), None)
    assert result.diagnostics.status == cm.Status.CONVERGED
    # Learned is w = 1 / theta^2. Where learning began, the third derivative is taken for noise: 2.2e-5 is reached.
    np.testing.assert_allclose(result.grad, (1.0 - 2.0) * -2.0, rtol=3e-5)
    assert float(result.diagnostics.error_estimate) > 5e-6


def test_a_successful_fallback_is_no_failure():
    """A loose tolerance ends the free phase on the rim; nudged phases, asked for more, slide down to the minimum."""
    loose = cm.OptaxDescent(optax.sgd(0.02), tol=1.0, max_steps=2000)
    result = cm.Contrastive(loose).estimate(double_well(), jnp.array(0.0), RIM)
    assert result.diagnostics.status == cm.Status.FELL_BACK
    np.testing.assert_allclose(result.params, 1.0, rtol=1e-6)
    np.testing.assert_allclose(result.grad, -2 / 8, rtol=1e-4)
    cm.raise_if_failed(result)


def test_tasks_in_a_batch_fall_back_one_by_one():
    """One task curves downwards and one does not: each gets what it would get alone."""
    problem = double_well()
    solver, theta = cm.OptaxDescent(optax.sgd(0.01), num_steps=2), jnp.array(0.0)
    tasks = jnp.array([0.1, 1.0])
    estimator = cm.Contrastive(solver)
    together = jax.vmap(lambda task: estimator.estimate(problem, theta, task))(tasks)
    for index, task in enumerate(tasks):
        alone = estimator.estimate(problem, theta, task)
        np.testing.assert_allclose(together.grad[index], alone.grad, rtol=1e-6)
        assert together.diagnostics.status[index] == alone.diagnostics.status
    assert together.diagnostics.status[1] == cm.Status.CONVERGED


def test_a_black_box_runs_its_own_phases_unless_told_otherwise():
    case = small_problem("ridge")

    def closed_form(loss, init):
        """A learner that minimises a quadratic in one step; traced once for each kind of phase."""
        calls.append(1)
        gradient, hessian = jax.grad(loss)(init), jax.hessian(loss)(init)
        return init - jnp.linalg.solve(hessian, gradient)

    # The linear nudge, in reserve while what nudges is left open, is in the same program as the loss's.
    for nudged, expected in ((None, 2), (ALONE, 1)):
        calls = []
        solver = cm.CallableSolver(closed_form)
        result = cm.Contrastive(solver, nudged).estimate(*case[1:4])
        assert relative_error(result.grad, case.exact.grad) < 1e-6
        assert len(calls) == expected


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_units_of_one_leaf_change_little(dtype):
    """One leaf counted in other units: the strength follows what the phases show, not the norm of `params` alone."""
    x = jax.random.normal(jax.random.key(0), (40, 3), dtype)
    y = jnp.sign(x @ jnp.array([1.0, -2.0, 0.5], dtype) + 0.3 * jax.random.normal(jax.random.key(1), (40,), dtype))

    def loss(w, strength, scale):
        logits = x @ w["w"] + w["b"] / scale
        decay = jnp.exp(strength) * (jnp.sum(w["w"] ** 2) + (w["b"] / scale) ** 2)
        return jnp.mean(jnp.log1p(jnp.exp(-y * logits))) + 0.5 * decay

    @jax.jit
    def estimate(scale):
        problem = cm.BilevelProblem(
            inner_loss=lambda w, strength, task: loss(w, strength, scale),
            outer_loss=lambda w, strength, task: jnp.mean((x @ w["w"] + w["b"] / scale - y) ** 2),
            init_params=lambda strength, task: {"w": jnp.zeros(3, dtype), "b": jnp.zeros((), dtype)},
        )

        # Newton's method, which no change of units slows down.
        def newton(inner, init):
            flat, unravel = jax.flatten_util.ravel_pytree(init)

            def step(_, at):
                hessian, gradient = (
                    jax.hessian(lambda p: inner(unravel(p)))(at),
                    jax.grad(lambda p: inner(unravel(p)))(at),
                )
                return at - jnp.linalg.solve(hessian, gradient)

            return unravel(jax.lax.fori_loop(0, 12, step, flat))

        estimator = cm.Contrastive(cm.CallableSolver(newton), ALONE)
        return estimator.estimate(problem, jnp.asarray(-2.0, dtype), None)

    plain = estimate(jnp.ones((), dtype))
    for unit in (1e-4, 1e4):
        other = estimate(jnp.asarray(unit, dtype))
        trusted = other.diagnostics.status == cm.Status.CONVERGED
        error = abs(float(other.grad / plain.grad) - 1)
        # The other leaf moves 1e4 times as far for its size: 1e-2 of it in float64, of which the square is felt.
        assert error < (2e-2 if dtype == jnp.float32 else 1e-3) if trusted else error > 1e-6, (error, other.diagnostics)


@pytest.mark.parametrize(
    ("optimizer", "described"),
    [
        (optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)), True),
        (optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()), True),
        (
            optax.multi_transform(
                {"learn": optax.sgd(0.1), "still": optax.set_to_zero()}, {"a": "learn", "b": "still"}
            ),
            False,
        ),
    ],
    ids=["weight decay", "projection", "frozen leaf"],
)
def test_a_learner_that_rests_elsewhere_is_nudged_from_there(optimizer, described):
    """Newton's step would go to the minimum of the loss, which is not where such a learner ends.

    Where it is known what holds the learner, the step is taken behind its walls; otherwise the learner runs the phases.
    """
    target = {"a": jnp.array([1.0, -0.5]), "b": jnp.array(2.0)}
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: sum(
            0.5 * jnp.sum(jnp.exp(theta) * (w[k] - task[k]) ** 2) + 0.05 * jnp.sum(w[k] ** 2) for k in task
        ),
        outer_loss=lambda w, theta, task: sum(jnp.sum((w[k] - 1.0) ** 2) for k in task),
        init_params=lambda theta, task: jax.tree.map(lambda x: 0.5 * jnp.ones_like(x), task),
    )
    solver = cm.OptaxDescent(optimizer, num_steps=300)
    default = cm.Contrastive(solver).estimate(problem, jnp.array(0.0), target)
    # In reserve no strength is sought, and the nudge is that of the fast learner.
    nudge = None if described else cm.LinearNudge()
    published = cm.Contrastive(solver, solver, cm.relative(cm.central_difference), nudge)
    published = published.estimate(problem, jnp.array(0.0), target)
    by = cm.PhasesBy.NEWTON_KRYLOV if described else cm.PhasesBy.SOLVER
    assert default.diagnostics.phases_by == by
    assert (default.diagnostics.status == cm.Status.CONVERGED) == described
    np.testing.assert_allclose(default.grad, published.grad, rtol=1e-9)
    assert relative_error(default.params, published.params) < 1e-9


def test_a_step_that_rounding_swallows_still_moves_its_leaf():
    """Of two leaves the large one does not change in float32: the learner follows the gradient all the same."""
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: 0.5 * (w["a"] - 1e2) ** 2 + 0.5 * jnp.sum((w["b"] - theta) ** 2),
        outer_loss=lambda w, theta, task: 1e-3 * w["a"] + jnp.sum(w["b"] ** 2),
        init_params=lambda theta, task: {"a": jnp.float32(1e2), "b": theta * jnp.ones(2, jnp.float32)},
    )
    slow = cm.OptaxDescent(optax.sgd(1e-6), num_steps=1)
    result = cm.Contrastive(slow).estimate(problem, jnp.float32(1.0), None)
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert float(result.grad) == pytest.approx(4.0, rel=1e-3)  # 2 b of each of two


def test_what_nudges_by_default_is_the_linearised_outer_loss():
    case = small_problem("softmax")
    problem = started_at(case.problem, case.params)
    by_nudge = {
        nudge: cm.Contrastive(STILL, ALONE, scheme=cm.relative(cm.central_difference, 0.1), nudge=nudge)
        .estimate(problem, *case[2:4])
        .grad
        for nudge in (None, cm.LinearNudge(), cm.LossNudge())
    }
    # At a large strength the two nudges differ in their truncation, far above rounding.
    assert relative_error(by_nudge[None], by_nudge[cm.LinearNudge()]) == 0
    assert 1e-5 < relative_error(by_nudge[None], by_nudge[cm.LossNudge()]) < 1e-1


def test_a_nudge_that_is_zero_where_learning_stopped_is_looked_for_where_it_ends():
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: 0.5 * (w - theta) ** 2,
        outer_loss=lambda w, theta, task: jnp.maximum(w - 0.5, 0.0) ** 2,
        init_params=lambda theta, task: jnp.zeros(()),
    )
    result = cm.Contrastive(STILL).estimate(problem, jnp.array(1.0), None)
    trusted = result.diagnostics.status == cm.Status.CONVERGED
    # At w = theta = 1 the outer gradient is 2 (1 - 0.5).
    assert abs(float(result.grad) - 1.0) < 1e-6 if trusted else abs(float(result.grad) - 1.0) > 1e-6, result


@jax.jit
def with_a_dead_zone(estimator, units):
    """The outer loss has a dead zone, in which learning stopped and out of which it goes on to theta = 1.25."""
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, units: 0.5 * (w - theta) ** 2,
        outer_loss=lambda w, theta, units: units * jnp.maximum(w - 1.125, 0.0) ** 2,
        init_params=lambda theta, units: jnp.array(1.0),
    )
    return estimator.estimate(problem, jnp.array(1.25), units)


@pytest.mark.parametrize("units", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("tol", [None, 1e-3, 1e-1])
def test_a_nudge_that_appears_on_the_way_is_answered_in_its_own_units(units, tol):
    result = with_a_dead_zone(cm.Contrastive(STILL, cm.NewtonKrylov(tol=tol)), units)
    assert result.diagnostics.status == cm.Status.CONVERGED
    # At w = theta the outer gradient is 2 (1.25 - 1.125).
    np.testing.assert_allclose(result.grad, 0.25 * units, rtol=1e-6)
    # One pass goes there and answers nothing.
    cut_short = cm.Contrastive(STILL, cm.NewtonKrylov(tol=tol, max_passes=1, fall_back=False))
    assert with_a_dead_zone(cut_short, units).diagnostics.status >= cm.Status.NUDGED_NOT_CONVERGED


@pytest.mark.filterwarnings("ignore:No gradient of the outer loss reaches")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["softmax", "mlp"])
def test_without_a_nudge_learning_ends_as_with_one(name, dtype):
    """What an outer loss that asks for nothing leaves unknown, rounding and curvature, any direction tells."""
    case = small_problem(name, dtype)
    alone = cm.Contrastive(STILL, ALONE)
    indifferent = dataclasses.replace(case.problem, outer_loss=lambda params, meta_params, task: jnp.ones((), dtype))
    asking, not_asking = (
        jax.jit(lambda start, of=problem: alone.estimate(started_at(of, start), *case[2:4]))
        for problem in (case.problem, indifferent)
    )
    for start in (case.params, away(case.params, 1e-2)):
        asked, unasked = asking(start), not_asking(start)
        assert unasked.diagnostics.status == cm.Status.CONVERGED
        assert unasked.diagnostics.num_gradients < asked.diagnostics.num_gradients
        assert all(jnp.all(leaf == 0) for leaf in jax.tree.leaves(unasked.grad))


@pytest.mark.parametrize("budget", [{"max_steps": 0}, {"max_passes": 0}])
def test_no_budget_is_none(budget):
    case = small_problem("ridge")
    problem = started_at(case.problem, case.params)
    estimator = cm.Contrastive(STILL, cm.NewtonKrylov(**budget, fall_back=False), cm.relative(cm.central_difference))
    result = estimator.estimate(problem, *case[2:4])
    assert result.diagnostics.status >= cm.Status.NUDGED_NOT_CONVERGED


def test_an_old_response_of_no_use_is_left_alone():
    case = small_problem("ridge")
    problem = started_at(case.problem, case.params)
    estimator = cm.Contrastive(STILL, ALONE)
    fresh = estimator.estimate(problem, *case[2:4])
    outer_grad = jax.grad(case.problem.outer_loss)(case.params, *case[2:4])
    other = jnp.roll(outer_grad, 1)
    orthogonal = other - outer_grad * jnp.vdot(other, outer_grad) / jnp.vdot(outer_grad, outer_grad)
    for displacement in (orthogonal, jnp.full_like(other, jnp.inf), jnp.full_like(other, jnp.nan), 1e-300 * other):
        state = fresh.state._replace(displacement=displacement)
        result = estimator.estimate(problem, *case[2:4], state=state)
        assert result.diagnostics.status == cm.Status.CONVERGED
        assert relative_error(result.grad, case.exact.grad) < 1e-6


def test_the_outer_loss_may_be_counted_in_any_unit():
    """The squares of float32 numbers this size are 0 or infinite."""
    case = small_problem("logistic", jnp.float32)

    @jax.jit
    def estimate(factor):
        inner, outer = case.problem.inner_loss, case.problem.outer_loss
        problem = cm.BilevelProblem(inner, lambda *args: factor * outer(*args), lambda meta, task: case.params)
        return cm.Contrastive(STILL).estimate(problem, *case[2:4])

    for factor in (1e-20, 1e15):
        result = estimate(jnp.float32(factor))
        scaled = jax.tree.map(lambda g, f=factor: g.astype(jnp.float64) / f, result.grad)
        assert result.diagnostics.status == cm.Status.CONVERGED
        assert relative_error(scaled, case.exact.grad) < 5e-4
