"""The fast nudged learner: as right as the published rule where it applies, and aware of where it does not."""

import dataclasses
import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax
import pytest

import contrastive_meta as cm
from benchmarks.cases import WarmTask, started_by_task
from tests.oracles import ALONE, STILL, away, relative_error, small_problem, started_at

NESTEROV = cm.OptaxDescent(optax.sgd(0.1, momentum=0.9, nesterov=True), num_steps=800)


@pytest.mark.parametrize("name", ["ridge", "softmax", "mlp"])
def test_it_agrees_with_the_rule_as_published_and_costs_less(name):
    case = small_problem(name)
    # Learned to the end: both are then limited by the contrast alone.
    problem = started_at(case.problem, case.params)
    learner = cm.OptaxDescent(optax.sgd(0.02, momentum=0.95, nesterov=True), num_steps=3000)
    published = cm.Contrastive(learner, learner).estimate(problem, *case[2:4])
    fast = cm.Contrastive(STILL, ALONE).estimate(problem, *case[2:4])
    assert fast.diagnostics.status == cm.Status.CONVERGED
    assert relative_error(fast.grad, case.exact.grad) < 1e-6
    assert relative_error(fast.grad, published.grad) < 1e-5
    assert fast.diagnostics.num_gradients < 200


def test_the_tolerance_is_kept_and_no_more_is_done():
    case = small_problem("softmax")
    problem = started_at(case.problem, case.params)
    default = cm.Contrastive(STILL, ALONE).estimate(problem, *case[2:4])
    for tol in (1e-1, 1e-3, 1e-6):
        result = cm.Contrastive(STILL, dataclasses.replace(ALONE, tol=tol)).estimate(problem, *case[2:4])
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


def off_by(case, distance):
    """Meta-parameters and task with learning started off the solution by that part of its length."""
    return case.meta_params, WarmTask(case.task, away(case.params, distance))


@pytest.mark.parametrize("name", ["logistic", "data_cleaning"])
def test_unfinished_learning_is_finished(name):
    """The base point takes Newton's steps of its own; implicit differentiation stays where learning stopped."""
    case = small_problem(name)
    problem = started_by_task(case.problem)
    for distance in (1e-3, 1e-2, 0.1):
        fast = cm.Contrastive(STILL).estimate(problem, *off_by(case, distance))
        implicit = cm.ImplicitDifferentiation(STILL, cm.DenseInverse()).estimate(problem, *off_by(case, distance))
        assert relative_error(fast.grad, case.exact.grad) < 1e-7
        assert relative_error(fast.params, case.exact.params) < 1e-7
        assert relative_error(implicit.grad, case.exact.grad) > 1e-4
        assert fast.diagnostics.status == cm.Status.CONVERGED


@pytest.mark.parametrize("name", ["logistic", "softmax", "data_cleaning"])
def test_learning_that_hardly_began_is_finished_too(name):
    """From once and twice the length of the solution off it: by steps to a radius, which grows again."""
    case = small_problem(name)
    problem = started_by_task(case.problem)
    for distance in (1.0, 2.0):
        result = cm.Contrastive(STILL, ALONE).estimate(problem, *off_by(case, distance))
        assert result.diagnostics.status == cm.Status.CONVERGED
        assert relative_error(result.grad, case.exact.grad) < 1e-9


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
        result = cm.Contrastive(STILL, ALONE, cm.relative(scheme)).estimate(problem, *case[2:4])
        assert relative_error(result.grad, case.exact.grad) < bound, scheme


def test_complex_phases_need_no_complex_learner():
    """Conjugate gradients take real differences; L-BFGS, the free learner, never sees a complex number."""
    case = small_problem("logistic")
    estimator = cm.Contrastive(cm.LBFGS(tol=1e-10), scheme=cm.relative(cm.complex_step))
    assert relative_error(estimator.estimate(*case[1:4]).grad, case.exact.grad) < 1e-10


def test_one_phase_after_another_gives_the_same():
    case = small_problem("softmax")
    together = cm.Contrastive(NESTEROV, ALONE).estimate(*case[1:4])
    sequential = cm.Contrastive(NESTEROV, ALONE, sequential=True).estimate(*case[1:4])
    assert relative_error(sequential.grad, together.grad) < 1e-8


def test_a_warm_start_saves_gradients_and_changes_nothing():
    case = small_problem("data_cleaning")
    problem = started_at(case.problem, case.params)
    estimator = cm.Contrastive(STILL, cm.NewtonKrylov(tol=1e-3, fall_back=False))
    first = estimator.estimate(problem, *case[2:4])
    second = estimator.estimate(problem, *case[2:4], state=first.state)
    assert second.diagnostics.num_gradients < first.diagnostics.num_gradients
    assert relative_error(second.grad, case.exact.grad) < 5e-3
    # A response of the wrong sign, as after an outer loss has changed, is a direction all the same.
    turned = first.state._replace(displacement=jax.tree.map(jnp.negative, first.state.displacement))
    third = estimator.estimate(problem, *case[2:4], state=turned)
    assert relative_error(third.grad, second.grad) < 1e-6


def test_trees_of_any_shape_give_the_gradient_of_one_vector():
    """Flattening is an implementation detail: a vector, a tree, and a tree of two precisions agree."""
    case = small_problem("ridge")

    def split(w, dtype):
        return {"a": w[:3].reshape(1, 3), "b": (w[3], w[4:].astype(dtype)), "empty": {}}

    def join(tree):
        return jnp.concatenate([tree["a"].ravel(), tree["b"][0][None], tree["b"][1].astype(jnp.float64)])

    plain = cm.Contrastive(NESTEROV, ALONE).estimate(*case[1:4])
    for dtype, bound in ((jnp.float64, 1e-9), (jnp.float32, 1e-4)):
        problem = cm.BilevelProblem(
            lambda p, meta, task: case.problem.inner_loss(join(p), meta, task),
            lambda p, meta, task: case.problem.outer_loss(join(p), meta, task),
            lambda meta, task, dtype=dtype: split(case.problem.init_params(meta, task), dtype),
        )
        result = cm.Contrastive(NESTEROV, ALONE).estimate(problem, *case[2:4])
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
    result = cm.Contrastive(NESTEROV, ALONE, rule=Decay()).estimate(problem, *case[2:4])
    assert relative_error(result.grad, case.exact.grad) < 1e-6
