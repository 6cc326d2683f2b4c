"""What makes the contrast right: drift, negative nudges, direct terms, common random numbers, and honest trouble."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import ALONE, STILL, low_curvature, relative_error, small_problem

NESTEROV = cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), num_steps=1500)


def grad_of(estimator, problem, meta_params, task, **extra):
    return estimator.estimate(problem, meta_params, task, **extra).grad


def ill_conditioned_ridge():
    """Ridge in which the last directions are learned slowly, so that few steps leave learning unfinished."""
    rng = np.random.default_rng(7)
    scales = np.geomspace(1.0, 0.15, 8)
    x, x_val = rng.standard_normal((2, 40, 8)) * scales
    w = rng.standard_normal(8)
    y, y_val = (a @ w + 0.5 * rng.standard_normal(40) for a in (x, x_val))
    instance = cm.problems.ridge(x, y, x_val, y_val)
    return instance.problem, instance.meta_params - 1.0, instance.task


@pytest.mark.parametrize("num_steps", [10, 20])
def test_unfinished_free_phase_drifts_only_the_naive_contrast(num_steps):
    """Leftover relaxation enters the naive contrast divided by beta; the control and the pair cancel it."""
    problem, meta_params, task = ill_conditioned_ridge()
    exact = cm.problems.exact_meta_gradient(problem, meta_params, task).grad
    learner = cm.OptaxDescent(optax.sgd(0.5), num_steps=num_steps)
    nudged = cm.OptaxDescent(optax.sgd(0.5), num_steps=300)
    schemes = {
        "naive": cm.forward_difference(0.01, matched=False),
        "matched": cm.forward_difference(0.01),
        "central": cm.central_difference(0.01),
    }
    results = {
        name: cm.Contrastive(learner, nudged, scheme=scheme).estimate(problem, meta_params, task)
        for name, scheme in schemes.items()
    }
    errors = {name: relative_error(result.grad, exact) for name, result in results.items()}
    assert errors["naive"] > 0.5, errors
    assert errors["matched"] < 0.2 * errors["naive"], errors
    assert errors["central"] < 0.2 * errors["naive"], errors
    # The naive contrast is not merely worse: it says so.
    assert results["naive"].diagnostics.status >= cm.Status.FREE_NOT_CONVERGED


def test_refined_base_point_is_returned():
    """The phases go on learning; the result holds the better-learned point, and its outer loss."""
    problem, meta_params, task = ill_conditioned_ridge()
    exact = cm.problems.exact_meta_gradient(problem, meta_params, task)
    learner = cm.OptaxDescent(optax.sgd(0.5), num_steps=20)
    free = learner.solve(lambda w: problem.inner_loss(w, meta_params, task), problem.init_params(meta_params, task))
    for scheme in (cm.central_difference(1e-3), cm.forward_difference(1e-3)):
        result = cm.Contrastive(learner, NESTEROV, scheme=scheme).estimate(problem, meta_params, task)
        assert relative_error(result.params, exact.params) < 1e-4 < relative_error(free.params, exact.params)
        assert np.isclose(result.outer_loss, exact.outer_loss, rtol=1e-4)
        assert result.diagnostics.free_residual < 1e-3 * free.residual


def test_negative_nudges_are_nudges():
    """Earlier code dropped the cost for beta < 0: its central estimate was half the forward one (ratio .4999)."""
    case = small_problem("logistic")
    central = grad_of(cm.Contrastive(NESTEROV, NESTEROV, cm.central_difference(1e-4)), *case[1:4])
    forward = grad_of(cm.Contrastive(NESTEROV, NESTEROV, cm.forward_difference(1e-4)), *case[1:4])
    backward = grad_of(cm.Contrastive(NESTEROV, NESTEROV, cm.forward_difference(-1e-4)), *case[1:4])
    for one_sided in (forward, backward):
        assert relative_error(central, one_sided) < 1e-3
    # Forward and backward truncation errors are opposite, and the central estimate lies in the middle.
    middle = jax.tree.map(lambda a, b: (a + b) / 2, forward, backward)
    assert relative_error(central, middle) < 1e-8


def test_batch_of_tasks_is_the_mean():
    """Earlier code used the last task's gradient over the batch size."""
    case = small_problem("ridge")
    tasks = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x, 0.5 * x]), case.task)
    estimator = cm.Contrastive(NESTEROV, ALONE)
    value, grad = cm.value_and_meta_grad(case.problem, estimator)(case.meta_params, tasks)
    singles = [
        estimator.estimate(case.problem, case.meta_params, jax.tree.map(lambda x, i=i: x[i], tasks)) for i in range(3)
    ]
    expected = jax.tree.map(lambda *gs: sum(gs) / 3, *[single.grad for single in singles])
    assert relative_error(grad, expected) < 1e-9
    assert np.isclose(value, sum(single.outer_loss for single in singles) / 3, rtol=1e-12)


@pytest.mark.parametrize("nudge", [cm.LossNudge(), cm.LinearNudge()])
def test_direct_term_is_contrasted_for_either_nudge(nudge):
    case = small_problem("quadratic")
    direct = jax.grad(case.problem.outer_loss, argnums=1)(case.params, case.meta_params, case.task)
    assert relative_error(jax.tree.map(jnp.subtract, case.exact.grad, direct), case.exact.grad) > 1e-2
    assert relative_error(grad_of(cm.Contrastive(NESTEROV, ALONE, nudge=nudge), *case[1:4]), case.exact.grad) < 1e-7


def minibatched(case, batch_size=5):
    """Ridge learned from minibatches of its training rows, drawn from the key that the problem is given."""

    def sample(key, task, step):
        rows = jax.random.choice(key, task[0].shape[0], (batch_size,), replace=False)
        return type(task)(task[0][rows], task[1][rows], *task[2:])

    inner, outer, init = case.problem.inner_loss, case.problem.outer_loss, case.problem.init_params
    return cm.BilevelProblem(inner, outer, init, sample=sample)


def test_phases_see_the_same_minibatches():
    """With common random numbers a smaller beta changes nothing; independent noise would be divided by it."""
    case = small_problem("ridge")
    problem = minibatched(case)
    solver = cm.OptaxDescent(optax.sgd(0.1), num_steps=200)
    grads = [
        grad_of(
            cm.Contrastive(solver, solver, cm.central_difference(beta), cm.LinearNudge()),
            problem, case.meta_params, case.task,
        )
        for beta in (1e-3, 1e-6)
    ]  # fmt: skip
    # Each step is linear in params and in beta, so nothing but rounding, about 1e-16 / beta, depends on beta.
    assert relative_error(grads[1], grads[0]) < 1e-8
    other = grad_of(
        cm.Contrastive(solver, solver, cm.central_difference(1e-3), cm.LinearNudge()),
        problem, case.meta_params, case.task, key=jax.random.key(5),
    )  # fmt: skip
    assert relative_error(other, grads[0]) > 1e-4, "the key must change the sequence"


def test_minibatch_sequence_is_followed_step_by_step():
    case = small_problem("ridge")
    problem, key = minibatched(case), jax.random.key(3)
    w = problem.init_params(case.meta_params, case.task)
    for step in range(7):
        batch = problem.sample(jax.random.fold_in(key, step), case.task, step)
        w = w - 0.1 * jax.grad(problem.inner_loss)(w, case.meta_params, batch)
    solver = cm.OptaxDescent(optax.sgd(0.1), num_steps=7)
    result = cm.BackpropThroughLearning(solver).estimate(problem, case.meta_params, case.task, key=key)
    assert relative_error(result.params, w) < 1e-12


def test_a_tolerance_with_minibatches_is_refused():
    case = small_problem("ridge")
    estimator = cm.Contrastive(cm.OptaxDescent(optax.sgd(0.1), tol=1e-6))
    with pytest.raises(ValueError, match=r"minibatches.*num_steps"):
        estimator.estimate(minibatched(case), case.meta_params, case.task)


@pytest.mark.parametrize(
    "solver",
    [cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), tol=1e-6), cm.LBFGS(tol=1e-6)],
    ids=["descent", "lbfgs"],
)
def test_absolute_tolerance_does_not_stop_the_nudged_phases(solver):
    """A beta of 1e-6 starts its phases with a gradient below tol = 1e-6: they must move all the same."""
    case = small_problem("logistic")
    result = cm.Contrastive(solver, solver, cm.central_difference(1e-6)).estimate(*case[1:4])
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(result.grad, case.exact.grad) < 1e-5


@pytest.mark.parametrize("carry_state", [False, True])
def test_finished_schedule_is_not_a_silent_zero(carry_state):
    """A fresh optimiser restarts its schedule; one that is carried on request stands still, and the status says so."""
    case = small_problem("logistic")
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, 400))
    solver = cm.OptaxDescent(optimizer, num_steps=400, carry_state=carry_state)
    result = cm.Contrastive(solver, nudged_solver=solver).estimate(*case[1:4])
    if carry_state:
        assert result.diagnostics.status == cm.Status.NUDGED_NOT_CONVERGED
        assert np.isclose(result.diagnostics.nudged_residual, 1.0, atol=0.05)
        with pytest.raises(cm.EstimateError, match="nudged phases"):
            cm.raise_if_failed(result)
    else:
        good = relative_error(result.grad, case.exact.grad) < 2e-2
        assert good or result.diagnostics.status >= cm.Status.FREE_NOT_CONVERGED


def round_to_tf32(x):
    """float32 as the inputs of a TF32 matrix product keep it: 10 bits of mantissa; the derivative of the identity."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((bits + 0x1000) & jnp.uint32(0xFFFFE000), jnp.float32)
    return x + jax.lax.stop_gradient(rounded - x)


def tf32_logistic():
    case = small_problem("logistic", jnp.float32)

    def rounded(loss):
        def with_rounding(params, meta_params, task):
            return loss(jax.tree.map(round_to_tf32, params), meta_params, task)

        return with_rounding

    problem = cm.BilevelProblem(
        rounded(case.problem.inner_loss), rounded(case.problem.outer_loss), case.problem.init_params
    )
    return problem, case


@pytest.mark.parametrize("scheme", [cm.relative(cm.central_difference), cm.central_difference(1e-3)])
@pytest.mark.parametrize("num_steps", [100, 1500])
def test_tf32_matrix_products_give_right_numbers_or_a_status(scheme, num_steps):
    """The noise is measured, not read off the dtype: the strength grows with it, or the status reports it."""
    problem, case = tf32_logistic()
    solver = cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), num_steps=num_steps)
    result = cm.Contrastive(solver, scheme=scheme).estimate(problem, case.meta_params, case.task)
    right = relative_error(result.grad, case.exact.grad) < 0.1
    assert right or result.diagnostics.status >= cm.Status.FREE_NOT_CONVERGED, result.diagnostics


def test_measured_noise_raises_the_strength():
    problem, case = tf32_logistic()
    solver = cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), num_steps=300)
    rounded = cm.Contrastive(solver, ALONE).estimate(problem, case.meta_params, case.task)
    exact = cm.Contrastive(solver, ALONE).estimate(case.problem, case.meta_params, case.task)
    assert rounded.diagnostics.beta > 3 * exact.diagnostics.beta


def test_unbounded_nudge_is_reported():
    """-beta L_out beats the inner curvature: the nudged loss has no minimum, and the linear nudge still has."""
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: 0.5 * jnp.sum((w - theta) ** 2),
        outer_loss=lambda w, theta, task: jnp.sum((w - task) ** 2),
        init_params=lambda theta, task: jnp.zeros_like(theta),
    )
    theta, task = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.5])
    solver = cm.OptaxDescent(optax.sgd(0.3), num_steps=60)
    asked_for = cm.Contrastive(solver, solver, cm.central_difference(1.0), nudge=cm.LossNudge())
    assert asked_for.estimate(problem, theta, task).diagnostics.status == cm.Status.UNBOUNDED_NUDGE
    # Where the kind of nudge is left open, the linear one takes its place, and that is said.
    instead = cm.Contrastive(solver, solver, cm.central_difference(1.0)).estimate(problem, theta, task)
    assert instead.diagnostics.status == cm.Status.FELL_BACK
    assert relative_error(instead.grad, 2 * (theta - task)) < 1e-8
    # And the estimate is of the nudge that was, which has no truncation: the loss's would err by (2 beta)^2 and more.
    assert float(instead.diagnostics.error_estimate) < 1e-8
    linear = cm.Contrastive(solver, ALONE, cm.central_difference(1.0), cm.LinearNudge())
    assert relative_error(grad_of(linear, problem, theta, task), 2 * (theta - task)) < 1e-8


@pytest.mark.parametrize("displacement", [0.1, 0.3])
@pytest.mark.parametrize("fast", [True, False])
def test_a_long_way_down_a_flat_valley_is_learning_and_no_runaway(fast, displacement):
    """The gradient that is left is below that of the nudge, and the way that is left longer than the nudge's."""
    problem, learned, exact = low_curvature()
    start = learned * (1 + 0.3 * jnp.cos(jnp.arange(41.0)))
    learner = ALONE if fast else cm.LBFGS(tol=1e-8, max_steps=300)
    scheme = cm.relative(cm.central_difference, displacement=displacement)
    result = cm.Contrastive(STILL, learner, scheme).estimate(problem, jnp.array(1.0), start)
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(result.grad, exact) < 1e-5


def test_divergent_learning_and_saddles_are_reported():
    case = small_problem("ridge")
    fast = cm.OptaxDescent(optax.sgd(10.0), num_steps=20)
    diverged = cm.Contrastive(fast).estimate(*case[1:4])
    assert diverged.diagnostics.status >= cm.Status.UNBOUNDED_NUDGE
    saddle = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: 0.5 * (w[0] - theta) ** 2 - 0.5 * w[1] ** 2,
        outer_loss=lambda w, theta, task: jnp.sum((w - 1.0) ** 2),
        init_params=lambda theta, task: jnp.zeros(2),
    )
    slow = cm.OptaxDescent(optax.sgd(0.01), num_steps=20)
    for estimator in (cm.Contrastive(slow), cm.ImplicitDifferentiation(slow)):
        result = estimator.estimate(saddle, jnp.array(2.0), None)
        assert result.diagnostics.status >= cm.Status.INDEFINITE_CURVATURE


def test_nan_data_and_unfinished_learning_are_reported():
    case = small_problem("ridge")
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), case.task)
    three = cm.OptaxDescent(optax.sgd(1e-2), num_steps=3)
    for build in (cm.Contrastive, cm.ImplicitDifferentiation):
        assert build(NESTEROV).estimate(*case[1:3], broken).diagnostics.status == cm.Status.NOT_FINITE
    for estimator in (cm.Contrastive(three, three), cm.ImplicitDifferentiation(three)):
        unfinished = estimator.estimate(*case[1:4]).diagnostics.status
        assert unfinished in (cm.Status.FREE_NOT_CONVERGED, cm.Status.NUDGED_NOT_CONVERGED)
    # The fast learner finishes what it can.
    finished = cm.Contrastive(three).estimate(*case[1:4])
    assert finished.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(finished.grad, case.exact.grad) < 1e-7


def test_zero_outer_gradient_is_an_exact_and_trusted_zero():
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: 0.5 * jnp.sum((w - theta) ** 2),
        outer_loss=lambda w, theta, task: jnp.sum(theta**2) + 0.0 * jnp.sum(w),
        init_params=lambda theta, task: jnp.zeros_like(theta),
    )
    theta = jnp.array([1.0, -2.0])
    for scheme in (cm.relative(cm.central_difference), cm.central_difference(0.1)):
        result = cm.Contrastive(NESTEROV, ALONE, scheme).estimate(problem, theta, None)
        assert result.diagnostics.status == cm.Status.CONVERGED
        assert relative_error(result.grad, 2 * theta) < 1e-7


def test_relative_strength_ignores_units():
    """Scaling the outer loss, or the parameters' units, changes the estimate's relative error by rounding only."""
    case = small_problem("logistic")
    inner, outer, init = case.problem.inner_loss, case.problem.outer_loss, case.problem.init_params

    @jax.jit
    def estimate(outer_scale, units):
        def physical(params):
            return jax.tree.map(lambda x: x / units, params)

        problem = cm.BilevelProblem(
            lambda params, meta, task: inner(physical(params), meta, task),
            lambda params, meta, task: outer_scale * outer(physical(params), meta, task),
            lambda meta, task: jax.tree.map(lambda x: x * units, init(meta, task)),
        )
        solver = cm.OptaxDescent(optax.sgd(0.1 * units**2, momentum=0.9, nesterov=True), num_steps=1500)
        return cm.Contrastive(solver).estimate(problem, case.meta_params, case.task)

    for outer_scale, units in itertools.product((1e-6, 1.0, 1e6), (1e-4, 1.0)):
        result = estimate(outer_scale, units)
        expected = jax.tree.map(lambda g, s=outer_scale: s * g, case.exact.grad)
        assert result.diagnostics.status == cm.Status.CONVERGED
        # The strength is that at which one realisation of the noise errs least: the error tells, whatever the units.
        assert relative_error(result.grad, expected) < 1e-9
        assert 1e-7 < result.diagnostics.displacement < 1e-1


def test_sequential_phases_agree_with_vmapped_ones():
    case = small_problem("logistic")
    for solver in (NESTEROV, cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), tol=1e-8)):
        together, apart = (
            cm.Contrastive(solver, ALONE, cm.four_point(1e-2), sequential=sequential).estimate(*case[1:4])
            for sequential in (False, True)
        )
        assert relative_error(apart.grad, together.grad) < 1e-8


def test_scheme_runs_its_phases_for_the_same_number_of_steps():
    """A pair stopped at a tolerance goes on until both members are done: the counts show it."""
    case = small_problem("logistic")
    solver = cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), tol=1e-3)
    result = cm.Contrastive(solver, solver, cm.second_order_forward(1e-3)).estimate(*case[1:4])
    # A matched control that stopped on its own would leave its relaxation in the contrast, divided by beta.
    assert relative_error(result.grad, case.exact.grad) < 1e-3


def test_phases_that_leave_the_basin_are_reported():
    """A double well: the nudge carries one phase over the rim, where it converges as well as the others do."""
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: jnp.sum((w**2 - 1.0) ** 2) + theta * jnp.sum(w),
        outer_loss=lambda w, theta, task: -jnp.sum(w),
        init_params=lambda theta, task: -jnp.ones(2),
    )
    solver = cm.OptaxDescent(optax.sgd(0.05), num_steps=400)
    estimator = cm.Contrastive(solver, solver, cm.central_difference(3.0), nudge=cm.LossNudge())
    result = estimator.estimate(problem, jnp.array(0.0), None)
    assert result.diagnostics.nudged_residual < 1e-2
    assert result.diagnostics.status == cm.Status.UNBOUNDED_NUDGE
    near = cm.Contrastive(solver).estimate(problem, jnp.array(0.0), None)
    assert near.diagnostics.status == cm.Status.CONVERGED
    # w solves 4 w (w^2 - 1) + theta = 0 near -1, where the curvature is 8: dw/dtheta = -1/8 in each of two entries.
    assert np.isclose(near.grad, 2 / 8, rtol=1e-7)


def test_state_of_another_solver_is_a_start_without_its_memory():
    case = small_problem("ridge")
    state = cm.Contrastive(cm.LBFGS(tol=1e-9)).estimate(*case[1:4]).state
    few = cm.OptaxDescent(optax.sgd(0.1), num_steps=5)
    result = cm.ImplicitDifferentiation(few).estimate(*case[1:4], state=state)
    assert relative_error(result.params, case.exact.params) < 1e-6
