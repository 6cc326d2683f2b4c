"""The fast nudged learner: as right as the published rule where it applies, and aware of where it does not."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import relative_error, small_problem

NESTEROV = cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), num_steps=800)
# Stays where it starts: what is measured is the nudged learner alone.
STILL = cm.OptaxDescent(optax.sgd(0.0), num_steps=1)


def started_at(problem, params):
    """The same problem, learning from `params`."""
    return cm.BilevelProblem(problem.inner_loss, problem.outer_loss, lambda meta, task: params)


def away(params, distance, seed=0):
    """`params` moved by `distance`, relative to their norm."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    length, moved = (jnp.sqrt(sum(jnp.vdot(x, x) for x in xs)) for xs in (leaves, noise))
    factor = distance * length / moved
    return jax.tree.unflatten(structure, [x + (factor * n).astype(x.dtype) for x, n in zip(leaves, noise, strict=True)])


@pytest.mark.parametrize("name", ["ridge", "softmax", "mlp"])
def test_it_agrees_with_the_rule_as_published_and_costs_less(name):
    case = small_problem(name)
    # Learned to the end: both are then limited by the contrast alone.
    problem = started_at(case.problem, case.params)
    learner = cm.OptaxDescent(optax.sgd(0.02, momentum=0.95, nesterov=True), num_steps=3000)
    published = cm.Contrastive(learner, learner).estimate(problem, *case[2:4])
    fast = cm.Contrastive(STILL).estimate(problem, *case[2:4])
    assert fast.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(fast.grad, case.exact.grad) < 1e-6
    assert relative_error(fast.grad, published.grad) < 1e-5
    assert fast.diagnostics.num_gradients < 200


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_the_tolerance_is_kept_and_no_more_is_done(tol):
    case = small_problem("softmax")
    problem = started_at(case.problem, case.params)
    result = cm.Contrastive(STILL, cm.NewtonKrylov(tol=tol)).estimate(problem, *case[2:4])
    default = cm.Contrastive(STILL).estimate(problem, *case[2:4])
    assert result.diagnostics.nudged_residual <= tol
    # The condition number is 30: a remainder of tol is at most 30 tol of the response.
    assert relative_error(result.grad, case.exact.grad) < 30 * tol
    assert result.diagnostics.num_gradients < default.diagnostics.num_gradients


def test_a_budget_that_runs_out_is_reported():
    case = small_problem("data_cleaning")
    problem = started_at(case.problem, case.params)
    few = cm.NewtonKrylov(max_steps=2, fall_back=False)
    result = cm.Contrastive(STILL, few).estimate(problem, *case[2:4])
    assert result.diagnostics.status == cm.Status.NUDGED_NOT_CONVERGED
    assert result.diagnostics.nudged_residual > 1e-2


@pytest.mark.parametrize("distance", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("name", ["logistic", "data_cleaning"])
def test_unfinished_learning_is_finished(name, distance):
    """The base point takes Newton's steps of its own; implicit differentiation stays where learning stopped."""
    case = small_problem(name)
    problem = started_at(case.problem, away(case.params, distance))
    fast = cm.Contrastive(STILL).estimate(problem, *case[2:4])
    implicit = cm.ImplicitDifferentiation(STILL, cm.DenseInverse()).estimate(problem, *case[2:4])
    assert relative_error(fast.grad, case.exact.grad) < 1e-7
    assert relative_error(fast.params, case.exact.params) < 1e-7
    assert relative_error(implicit.grad, case.exact.grad) > 1e-4
    assert fast.diagnostics.status == cm.Status.CONVERGED


def test_schemes_of_every_kind_reach_their_own_accuracy_in_float32():
    case = small_problem("logistic", jnp.float32)
    problem = started_at(case.problem, case.params)
    bounds = {
        cm.forward_difference: 3e-3,
        cm.second_order_forward: 2e-3,
        cm.central_difference: 5e-4,
        cm.four_point: 1e-4,
        functools.partial(cm.circle, num_points=8): 1e-4,
        cm.complex_step: 2e-6,
    }
    for scheme, bound in bounds.items():
        result = cm.Contrastive(STILL, scheme=cm.relative(scheme)).estimate(problem, *case[2:4])
        assert relative_error(result.grad, case.exact.grad) < bound, scheme


def test_complex_phases_need_no_complex_learner():
    """Conjugate gradients take real differences; L-BFGS, the free learner, never sees a complex number."""
    case = small_problem("logistic")
    estimator = cm.Contrastive(cm.LBFGS(tol=1e-10), scheme=cm.relative(cm.complex_step))
    assert relative_error(estimator.estimate(*case[1:4]).grad, case.exact.grad) < 1e-10


def test_one_phase_after_another_gives_the_same():
    case = small_problem("softmax")
    together = cm.Contrastive(NESTEROV).estimate(*case[1:4])
    sequential = cm.Contrastive(NESTEROV, sequential=True).estimate(*case[1:4])
    assert relative_error(sequential.grad, together.grad) < 1e-8


def double_well():
    """Two minima at -1 and 1; learning starts on the rim between them, where the loss curves downwards."""
    return cm.BilevelProblem(
        inner_loss=lambda w, theta, task: jnp.sum((w**2 - 1.0) ** 2) + theta * jnp.sum(w),
        outer_loss=lambda w, theta, task: jnp.sum((w - 0.5) ** 2),
        init_params=lambda theta, task: jnp.full(2, 0.1),
    )


def test_downward_curvature_falls_back_to_the_users_learner():
    problem, theta = double_well(), jnp.array(0.0)
    # After two small steps the loss still curves downwards; the nudged phases of the published rule go on learning.
    start = cm.OptaxDescent(optax.sgd(0.01), num_steps=2)
    fast = cm.Contrastive(start).estimate(problem, theta, None)
    published = cm.Contrastive(start, start).estimate(problem, theta, None)
    np.testing.assert_allclose(fast.grad, published.grad, rtol=1e-12)
    assert fast.diagnostics.status >= cm.Status.FELL_BACK
    alone = cm.Contrastive(start, cm.NewtonKrylov(fall_back=False)).estimate(problem, theta, None)
    assert alone.diagnostics.status > cm.Status.APPROXIMATE
    settled = cm.Contrastive(cm.OptaxDescent(optax.sgd(0.05), num_steps=400)).estimate(problem, theta, None)
    assert settled.diagnostics.status == cm.Status.CONVERGED
    # At w = 1 the curvature is 8 and dw/dtheta = -1/8; the outer gradient is 1 in each of two entries.
    np.testing.assert_allclose(settled.grad, -2 / 8, rtol=1e-7)


def test_a_successful_fallback_is_no_failure():
    """A loose tolerance ends the free phase on the rim; nudged phases, asked for more, slide down to the minimum."""
    loose = cm.OptaxDescent(optax.sgd(0.02), tol=1.0, max_steps=2000)
    result = cm.Contrastive(loose).estimate(double_well(), jnp.array(0.0), None)
    assert result.diagnostics.status == cm.Status.FELL_BACK
    np.testing.assert_allclose(result.params, 1.0, rtol=1e-6)
    np.testing.assert_allclose(result.grad, -2 / 8, rtol=1e-4)
    cm.raise_if_failed(result)


def test_tasks_in_a_batch_fall_back_one_by_one():
    """One task curves downwards and one does not: each gets what it would get alone."""
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: jnp.sum((w**2 - 1.0) ** 2) + theta * jnp.sum(w),
        outer_loss=lambda w, theta, task: jnp.sum((w - 0.5) ** 2),
        init_params=lambda theta, task: jnp.full(2, task),
    )
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
        """A learner that minimises a quadratic in one step and is asked once for each phase."""
        calls.append(1)
        gradient, hessian = jax.grad(loss)(init), jax.hessian(loss)(init)
        return init - jnp.linalg.solve(hessian, gradient)

    for nudged, expected in ((None, 2), (cm.NewtonKrylov(fall_back=False), 1)):
        calls = []
        solver = cm.CallableSolver(closed_form)
        result = cm.Contrastive(solver, nudged).estimate(*case[1:4])
        assert relative_error(result.grad, case.exact.grad) < 1e-6
        assert len(calls) == expected


def test_a_warm_start_saves_gradients_and_changes_nothing():
    case = small_problem("data_cleaning")
    problem = started_at(case.problem, case.params)
    estimator = cm.Contrastive(STILL, cm.NewtonKrylov(tol=1e-3))
    first = estimator.estimate(problem, *case[2:4])
    second = estimator.estimate(problem, *case[2:4], state=first.state)
    assert second.diagnostics.num_gradients < first.diagnostics.num_gradients
    assert relative_error(second.grad, case.exact.grad) < 5e-3
    # A response of the wrong sign, as after an outer loss has changed, is a direction all the same.
    turned = first.state._replace(displacement=jax.tree.map(jnp.negative, first.state.displacement))
    third = estimator.estimate(problem, *case[2:4], state=turned)
    assert relative_error(third.grad, second.grad) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_units_of_one_leaf_change_little(unit, dtype):
    """One leaf counted in other units: the strength follows what the phases show, not the norm of `params` alone."""
    x = jax.random.normal(jax.random.key(0), (40, 3), dtype)
    y = jnp.sign(x @ jnp.array([1.0, -2.0, 0.5], dtype) + 0.3 * jax.random.normal(jax.random.key(1), (40,), dtype))

    def loss(w, strength, scale):
        logits = x @ w["w"] + w["b"] / scale
        decay = jnp.exp(strength) * (jnp.sum(w["w"] ** 2) + (w["b"] / scale) ** 2)
        return jnp.mean(jnp.log1p(jnp.exp(-y * logits))) + 0.5 * decay

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

        estimator = cm.Contrastive(cm.CallableSolver(newton), cm.NewtonKrylov(fall_back=False))
        return estimator.estimate(problem, jnp.asarray(-2.0, dtype), None)

    plain, other = estimate(1.0), estimate(unit)
    trusted = other.diagnostics.status == cm.Status.CONVERGED
    error = abs(float(other.grad / plain.grad) - 1)
    # The other leaf moves 1e4 times as far for its size: 1e-2 of it in float64, of which the square is felt.
    assert error < (2e-2 if dtype == jnp.float32 else 1e-3) if trusted else error > 1e-6, (error, other.diagnostics)


def test_trees_of_any_shape_give_the_gradient_of_one_vector():
    """Flattening is an implementation detail: a vector, a tree, and a tree of two precisions agree."""
    case = small_problem("ridge")

    def split(w, dtype):
        return {"a": w[:3].reshape(1, 3), "b": (w[3], w[4:].astype(dtype)), "empty": {}}

    def join(tree):
        return jnp.concatenate([tree["a"].ravel(), tree["b"][0][None], tree["b"][1].astype(jnp.float64)])

    plain = cm.Contrastive(NESTEROV).estimate(*case[1:4])
    for dtype, bound in ((jnp.float64, 1e-9), (jnp.float32, 1e-4)):
        problem = cm.BilevelProblem(
            lambda p, meta, task: case.problem.inner_loss(join(p), meta, task),
            lambda p, meta, task: case.problem.outer_loss(join(p), meta, task),
            lambda meta, task, dtype=dtype: split(case.problem.init_params(meta, task), dtype),
        )
        result = cm.Contrastive(NESTEROV).estimate(problem, *case[2:4])
        assert relative_error(result.grad, plain.grad) < bound
        assert result.params["b"][1].dtype == dtype
        assert jax.tree.structure(result.params) == jax.tree.structure(problem.init_params(*case[2:4]))


def test_a_rule_sees_the_tree_that_the_user_wrote():
    case = small_problem("ridge")

    class Decay(cm.PlasticityRule):
        """What `Autodiff` gives for log-strengths of a penalty, written out: half strength times the square."""

        def statistic(self, problem, params, meta_params, task, beta):
            return 0.5 * jnp.exp(meta_params) * params["w"] ** 2 + 0.0 * params["rest"]

    problem = cm.BilevelProblem(
        lambda p, meta, task: case.problem.inner_loss(p["w"], meta, task) + jnp.sum(p["rest"] ** 2),
        lambda p, meta, task: case.problem.outer_loss(p["w"], meta, task),
        lambda meta, task: {"w": case.problem.init_params(meta, task), "rest": jnp.zeros(())},
    )
    jax.tree_util.register_static(Decay)
    result = cm.Contrastive(NESTEROV, rule=Decay()).estimate(problem, *case[2:4])
    assert relative_error(result.grad, case.exact.grad) < 1e-6


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1)),
        optax.chain(optax.sgd(0.1), optax.keep_params_nonnegative()),
        optax.multi_transform({"learn": optax.sgd(0.1), "still": optax.set_to_zero()}, {"a": "learn", "b": "still"}),
    ],
    ids=["weight decay", "projection", "frozen leaf"],
)
def test_a_learner_that_rests_elsewhere_runs_its_own_phases(optimizer):
    """Newton's step would go to the minimum of the loss, which is not where such a learner ends."""
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
    published = cm.Contrastive(solver, solver).estimate(problem, jnp.array(0.0), target)
    assert default.diagnostics.status >= cm.Status.FELL_BACK
    np.testing.assert_allclose(default.grad, published.grad, rtol=1e-9)
    assert relative_error(default.params, published.params) < 1e-9


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


def test_an_old_response_of_no_use_is_left_alone():
    case = small_problem("ridge")
    problem = started_at(case.problem, case.params)
    fresh = cm.Contrastive(STILL).estimate(problem, *case[2:4])
    outer_grad = jax.grad(case.problem.outer_loss)(case.params, *case[2:4])
    other = jnp.roll(outer_grad, 1)
    orthogonal = other - outer_grad * jnp.vdot(other, outer_grad) / jnp.vdot(outer_grad, outer_grad)
    for displacement in (orthogonal, jnp.full_like(other, jnp.inf), jnp.full_like(other, jnp.nan), 1e-300 * other):
        state = fresh.state._replace(displacement=displacement)
        result = cm.Contrastive(STILL).estimate(problem, *case[2:4], state=state)
        assert result.diagnostics.status == cm.Status.CONVERGED
        assert relative_error(result.grad, case.exact.grad) < 1e-6


@pytest.mark.parametrize("factor", [1e-20, 1e15])
def test_the_outer_loss_may_be_counted_in_any_unit(factor):
    """The squares of float32 numbers this size are 0 or infinite."""
    case = small_problem("logistic", jnp.float32)
    problem = cm.BilevelProblem(
        case.problem.inner_loss,
        lambda w, meta, task: jnp.float32(factor) * case.problem.outer_loss(w, meta, task),
        lambda meta, task: case.params,
    )
    result = cm.Contrastive(STILL).estimate(problem, *case[2:4])
    scaled = jax.tree.map(lambda g: g.astype(jnp.float64) / factor, result.grad)
    assert result.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(scaled, case.exact.grad) < 5e-4
