"""What the program of an estimate is made of, and what a batch of tasks runs: counts, exact on any machine."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

import contrastive_meta as cm
from benchmarks.counting import count_equations, count_sites, mark_problem
from tests.oracles import ALONE, STILL, double_well, relative_error, small_problem, started_at

SGD = cm.OptaxDescent(optax.sgd(0.3), num_steps=50)
LOOSE = cm.OptaxDescent(optax.sgd(0.02), tol=1.0, max_steps=2000)


@pytest.mark.parametrize(
    ("estimator", "inner", "outer"),
    [
        # Free phase, survey, linear systems, ladder, phases by the solver; the outer loss: survey and ladder,
        # and the solver where it is nudged by the loss itself.
        (cm.Contrastive(cm.LBFGS()), 5, 2),
        (cm.Contrastive(SGD), 5, 2),
        (cm.Contrastive(cm.LBFGS(), target_error=1e-3), 5, 2),
        (cm.Contrastive(cm.LBFGS(), cm.LBFGS()), 5, 3),
        (cm.Contrastive(cm.LBFGS(), ALONE), 4, 2),
        (cm.Contrastive(cm.LBFGS(), estimate_error=False), 5, 2),
        # No linear system, of a response or of an error.
        (cm.Contrastive(SGD, SGD, cm.forward_difference(0.1), cm.LinearNudge(), estimate_error=False), 4, 2),
        (cm.ImplicitDifferentiation(cm.LBFGS()), 4, 2),
    ],
    ids=["L-BFGS", "descent", "target", "published", "no fallback", "no estimate", "typed strength", "implicit"],
)
def test_each_purpose_has_one_call_site(estimator, inner, outer):
    case = small_problem("logistic")
    problem = mark_problem(case.problem)
    sites = count_sites(lambda meta, task: estimator.estimate(problem, meta, task), case.meta_params, case.task)
    assert sites == (inner, outer)


def test_the_default_program_has_two_thirds_of_the_equations_it_had():
    """9,506 equations before its rebuild, on a problem of this kind with L-BFGS."""
    case, estimator = small_problem("logistic"), cm.Contrastive(cm.LBFGS())
    assert count_equations(lambda m, t: estimator.estimate(case.problem, m, t), case.meta_params, case.task) < 6400


def test_the_result_says_who_ran_the_phases():
    case = small_problem("ridge")
    fast = cm.Contrastive(STILL).estimate(started_at(case.problem, case.params), *case[2:4])
    assert fast.diagnostics.phases_by == cm.PhasesBy.NEWTON_KRYLOV
    published = cm.Contrastive(SGD, SGD).estimate(*case[1:4])
    assert published.diagnostics.phases_by == cm.PhasesBy.SOLVER
    went_on = cm.Contrastive(LOOSE).estimate(double_well(), jnp.array(0.0), jnp.array(0.1))
    assert went_on.diagnostics.phases_by == cm.PhasesBy.NEWTON_KRYLOV_AFTER_LEARNING
    implicit = cm.ImplicitDifferentiation(SGD).estimate(*case[1:4])
    assert implicit.diagnostics.phases_by == cm.PhasesBy.NOBODY


def counted_wells():
    """The double well, and a list that grows with each gradient of its inner loss."""
    seen = []

    def inner(w, theta, task):
        jax.debug.callback(lambda _: seen.append(1), w)
        return jnp.sum((w**2 - 1.0) ** 2) + theta * jnp.sum(w)

    problem = double_well()
    return cm.BilevelProblem(inner, problem.outer_loss, problem.init_params), seen


def gradients_of(function, *args, seen):
    """What the function returns, and the gradients it executes."""
    seen.clear()
    found = jax.block_until_ready(function(*args))
    jax.effects_barrier()
    return found, len(seen)


def test_one_task_that_falls_back_costs_the_others_nothing():
    """Fifteen tasks that need no fallback, and one that does: executed gradients, not reported ones."""
    problem, seen = counted_wells()
    estimator, theta = cm.Contrastive(LOOSE), jnp.array(0.0)
    step = jax.jit(cm.value_and_meta_grad(problem, estimator, has_aux=True))
    easy = jnp.linspace(1.0, 1.05, 16)
    _, without = gradients_of(step, theta, easy, seen=seen)
    ((_, told), grad), with_one = gradients_of(step, theta, easy.at[5].set(0.1), seen=seen)
    assert told.status.tolist() == [cm.Status.CONVERGED] * 5 + [cm.Status.FELL_BACK] + [cm.Status.CONVERGED] * 10
    single = jax.jit(lambda task: estimator.estimate(problem, theta, task))
    alone, for_one = gradients_of(single, jnp.array(0.1), seen=seen)
    np.testing.assert_allclose(grad, -0.25, rtol=1e-8)
    np.testing.assert_allclose(alone.grad, -0.25, rtol=1e-8)
    # Until its first attempt has failed, the task takes part in the batch, whose lanes go on together.
    attempt = 16 * for_one / 4
    assert with_one < without + for_one + attempt, (with_one, without, for_one)


def test_a_batch_of_one_runs_what_a_single_estimate_runs():
    problem, seen = counted_wells()
    estimator, theta = cm.Contrastive(LOOSE), jnp.array(0.0)
    for task in (1.0, 0.1):
        single, alone = gradients_of(
            jax.jit(lambda t: estimator.estimate(problem, theta, t)), jnp.array(task), seen=seen
        )
        step = jax.jit(cm.value_and_meta_grad(problem, estimator, has_aux=True))
        ((_, told), grad), batch = gradients_of(step, theta, jnp.array([task]), seen=seen)
        assert batch == alone
        assert relative_error(grad, single.grad) < 1e-12
        assert told.num_gradients[0] == single.diagnostics.num_gradients


def test_without_diagnostics_no_error_is_estimated():
    problem, seen = counted_wells()
    theta, tasks = jnp.array(0.0), jnp.array([1.0, 1.05])
    estimator = cm.Contrastive(LOOSE)
    (_, told), with_estimate = gradients_of(
        jax.jit(cm.value_and_meta_grad(problem, estimator, has_aux=True)), theta, tasks, seen=seen
    )
    (_, grad), without = gradients_of(jax.jit(cm.value_and_meta_grad(problem, estimator)), theta, tasks, seen=seen)
    assert without < with_estimate
    np.testing.assert_allclose(grad, told, rtol=1e-9)


def test_without_diagnostics_implicit_differentiation_solves_one_system_and_a_step():
    """Its error takes two more systems: without has_aux the last one, and all but a step of the first, are gone."""
    case = small_problem("ridge")
    estimator = cm.ImplicitDifferentiation(cm.LBFGS())
    tasks = jax.tree.map(lambda x: x[None], case.task)

    def equations(has_aux):
        return count_equations(
            cm.value_and_meta_grad(case.problem, estimator, has_aux=has_aux), case.meta_params, tasks
        )

    assert equations(False) < equations(True)
