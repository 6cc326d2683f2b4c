"""Gradients through `argmin`: equal to the exact ones, whatever the adjoint, and under every transformation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from contrastive_meta import problems
from tests.oracles import ALONE, cast, relative_error, small_problem

# Condition numbers of the problems here stay below 50: these many steps reach the floor of float64.
DESCENT = cm.OptaxDescent(optax.sgd(0.3), num_steps=400)
# What the transformations are tested with has nothing to fall back to, which compiles faster.
FAST = cm.ContrastiveAdjoint(ALONE)


def ridge_loss(w: Any, strengths: Any, task: Any) -> Any:
    return 0.5 * jnp.mean((task["x"] @ w - task["y"]) ** 2) + 0.5 * jnp.sum(jnp.exp(strengths) * w**2)


def ridge_solution(strengths: Any, task: Any) -> Any:
    """In closed form, so that JAX differentiates it: the reference."""
    x, y = task["x"], task["y"]
    return jnp.linalg.solve(x.T @ x / len(x) + jnp.diag(jnp.exp(strengths)), x.T @ y / len(x))


def ridge_task(seed: int, batch: tuple[int, ...] = ()) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*batch, 12, 3))
    return {"x": jnp.asarray(x), "y": jnp.asarray(x @ np.array([2.0, -1.0, 0.5]) + rng.normal(size=(*batch, 12)))}


def judged(phi: Any) -> Any:
    """An outer loss that tells the parameters apart."""
    return jnp.sum(jnp.sin(phi) * jnp.arange(1.0, 1.0 + phi.size))


STRENGTHS = jnp.array([-1.0, 0.3, -0.2])
layer = cm.argmin(ridge_loss, DESCENT, init=jnp.zeros(3), adjoint=FAST)


# --- Against exact gradients ---


@pytest.mark.parametrize("name", ["ridge", "logistic", "softmax"])
def test_gradients_equal_the_exact_ones(name: str) -> None:
    """In the meta-parameters against the dense implicit gradient, in the task against differences of solutions."""
    case = small_problem(name)
    problem, meta_params = case.problem, case.meta_params
    floats, rest = _floats(case.task)
    solve = cm.argmin(problem.inner_loss, cm.LBFGS(tol=1e-10), init=problem.init_params)

    def value(meta_params: Any, floats: Any) -> Any:
        task = _join(floats, rest)
        return problem.outer_loss(solve(meta_params, task), meta_params, case.task)

    of_meta, of_task = jax.jit(jax.grad(value, argnums=(0, 1)))(meta_params, floats)
    # What the default scheme gives with learning finished is about 1e-9.
    assert relative_error(of_meta, case.exact.grad) < 1e-6

    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), floats)

    def along(step: float) -> float:
        task = _join(jax.tree.map(lambda x, d: x + step * d, floats, direction), rest)
        phi = problems.exact_meta_gradient(problem, meta_params, task, near=case.params).params
        return float(problem.outer_loss(phi, meta_params, case.task))

    # Richardson: truncation of order step^4.
    wide, narrow = ((along(h) - along(-h)) / (2 * h) for h in (2e-3, 1e-3))
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(of_task, direction, strict=True))
    assert slope == pytest.approx((4 * narrow - wide) / 3, rel=1e-6)


def _floats(task: Any) -> tuple[list[Any], Any]:
    leaves = jax.tree.leaves(task)
    return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)], task


def _join(floats: list[Any], task: Any) -> Any:
    left = iter(floats)
    return jax.tree.map(lambda x: next(left) if jnp.issubdtype(x.dtype, jnp.floating) else x, task)


ADJOINTS: dict[str, Any] = {
    "as published": cm.ContrastiveAdjoint(nudged_solver=DESCENT),
    "four-point, one by one": cm.ContrastiveAdjoint(FAST.nudged_solver, cm.relative(cm.four_point), sequential=True),
    "complex step": cm.ContrastiveAdjoint(FAST.nudged_solver, cm.relative(cm.complex_step)),
    "implicit": cm.ImplicitAdjoint(),
    "backprop": cm.BackpropAdjoint(),
    "backprop, checkpointed": cm.BackpropAdjoint(checkpoint=True),
}


@pytest.mark.parametrize("name", ADJOINTS)
def test_every_exact_adjoint_gives_the_exact_gradient(name: str) -> None:
    task = ridge_task(0)
    solve = cm.argmin(ridge_loss, DESCENT, init=jnp.zeros(3), adjoint=ADJOINTS[name])
    got = jax.jit(jax.grad(lambda s, t: judged(solve(s, t)), argnums=(0, 1)))(STRENGTHS, task)
    assert relative_error(got, _reference(STRENGTHS, task)) < 1e-8


def _reference(strengths: Any, task: Any) -> Any:
    return jax.grad(lambda s, t: judged(ridge_solution(s, t)), argnums=(0, 1))(strengths, task)


def test_one_step_is_the_derivative_of_one_step() -> None:
    """Of phi - step_size * gradient, its start held fixed; with step_size = 1 / curvature it would be exact."""
    task, step_size = ridge_task(0), 0.4
    solve = cm.argmin(ridge_loss, DESCENT, init=jnp.zeros(3), adjoint=cm.OneStepAdjoint(step_size))
    phi, pull = jax.vjp(lambda s: solve(s, task), STRENGTHS)
    v = jnp.array([1.0, -2.0, 3.0])
    # The gradient of the loss has the derivative exp(s) w in the log-strengths, on the diagonal.
    expected = -step_size * jnp.exp(STRENGTHS) * ridge_solution(STRENGTHS, task) * v
    assert relative_error(pull(v)[0], expected) < 1e-10
    assert relative_error(phi, ridge_solution(STRENGTHS, task)) < 1e-10


# --- Under transformations ---


def test_gradient_of_a_batch_and_batch_of_gradients() -> None:
    tasks = ridge_task(1, batch=(3,))
    solve = jax.vmap(layer, in_axes=(None, 0))
    weights = jnp.arange(1.0, 4.0)

    def total(solutions: Any) -> Any:
        return jnp.sum(weights * jax.vmap(judged)(solutions))

    got = jax.jit(jax.grad(lambda s, t: total(solve(s, t)), argnums=(0, 1)))(STRENGTHS, tasks)
    exact = jax.vmap(ridge_solution, in_axes=(None, 0))
    expected = jax.grad(lambda s, t: total(exact(s, t)), argnums=(0, 1))(STRENGTHS, tasks)
    assert relative_error(got, expected) < 1e-7

    each = jax.jit(jax.vmap(jax.grad(lambda s, t: judged(layer(s, t)), argnums=(0, 1)), in_axes=(None, 0)))
    assert relative_error(each(STRENGTHS, tasks), jax.vmap(_reference, in_axes=(None, 0))(STRENGTHS, tasks)) < 1e-7


def test_gradient_through_a_scan_of_twenty_outer_steps() -> None:
    """Each step's solution is the next one's strengths and warm start."""
    tasks = ridge_task(2, batch=(20,))

    def last(solve: Any, strengths: Any) -> Any:
        def step(carry: Any, task: Any) -> Any:
            strengths, phi = carry
            phi = solve(strengths, task, phi)
            return (0.8 * strengths - 0.3 * jnp.tanh(phi), phi), judged(phi)

        return jnp.mean(jax.lax.scan(step, (strengths, jnp.zeros(3)), tasks)[1])

    got = jax.jit(jax.grad(lambda s: last(lambda s, t, phi: layer(s, t, params=phi), s)))(STRENGTHS)
    expected = jax.grad(lambda s: last(lambda s, t, phi: ridge_solution(s, t), s))(STRENGTHS)
    # Errors of some 1e-9 a step add up.
    assert relative_error(got, expected) < 1e-7


def test_several_in_one_program_and_one_fed_by_another() -> None:
    first, second = ridge_task(3), ridge_task(4)
    implicit = cm.argmin(ridge_loss, DESCENT, init=jnp.ones(3), adjoint=cm.ImplicitAdjoint(cm.DenseInverse()))

    def chain(one: Any, two: Any, strengths: Any) -> Any:
        phi = one(strengths, first)
        return judged(two(jnp.tanh(phi), {**second, "y": second["y"] + jnp.sum(phi)})) + jnp.sum(phi**2)

    got = jax.jit(jax.grad(functools.partial(chain, layer, implicit)))(STRENGTHS)
    expected = jax.grad(functools.partial(chain, ridge_solution, ridge_solution))(STRENGTHS)
    assert relative_error(got, expected) < 1e-7


def test_nested_in_an_inner_loss() -> None:
    """The loss of phi holds psi(phi), itself an argmin: of (psi - theta - phi)^2 + psi^2."""

    def innermost(psi: Any, theta: Any, phi: Any) -> Any:
        return jnp.sum((psi - theta - phi) ** 2 + psi**2)

    below = cm.argmin(
        innermost, cm.OptaxDescent(optax.sgd(0.2), num_steps=60), init=jnp.zeros(2),
        adjoint=cm.ImplicitAdjoint(cm.DenseInverse()),
    )  # fmt: skip

    def middle(phi: Any, theta: Any, task: Any) -> Any:
        return jnp.sum((phi - task) ** 2) + jnp.sum(below(theta, phi) ** 2)

    learner = cm.OptaxDescent(optax.sgd(0.2), num_steps=60)
    outer = cm.argmin(middle, learner, init=jnp.zeros(2), adjoint=cm.ContrastiveAdjoint(learner))
    theta, task = jnp.array([1.0, -0.5]), jnp.array([0.3, 2.0])
    # psi = (theta + phi) / 2, so phi minimises (phi - task)^2 + (theta + phi)^2 / 4: phi = (4 task - theta) / 5.
    phi, pull = jax.vjp(jax.jit(outer), theta, task)
    v = jnp.array([1.0, 3.0])
    assert relative_error(phi, (4 * task - theta) / 5) < 1e-9
    # The inner argmin stops at 1e-14 of its solution; the contrast divides by a strength of about 1e-6.
    assert relative_error(pull(v), (-v / 5, 4 * v / 5)) < 1e-7


def test_a_contrast_within_a_contrast() -> None:
    """The nudged phases of one argmin learn on a loss whose gradients are contrasts of another's phases."""
    strength = cm.central_difference(1e-3)
    learner = cm.OptaxDescent(optax.sgd(0.5), num_steps=60)
    adjoint = cm.ContrastiveAdjoint(learner, scheme=strength)
    below = cm.argmin(
        lambda psi, theta, phi: jnp.sum((psi - jnp.sin(theta + phi)) ** 2) / 2, learner, init=jnp.zeros(2),
        adjoint=adjoint,
    )  # fmt: skip

    def middle(phi: Any, theta: Any, task: Any) -> Any:
        return jnp.sum((phi - task) ** 2 + below(theta, phi) ** 2) / 2

    outer = cm.argmin(middle, learner, init=jnp.zeros(2), adjoint=adjoint)
    theta, task, v = jnp.array([0.4, -0.5]), jnp.array([0.3, 0.2]), jnp.array([1.0, 3.0])
    phi, pull = jax.vjp(jax.jit(outer), theta, task)
    # psi = sin(theta + phi), so phi is where phi - task + sin(2 (theta + phi)) / 2 = 0.
    assert float(jnp.max(jnp.abs(phi - task + jnp.sin(2 * (theta + phi)) / 2))) < 1e-9
    bend = jnp.cos(2 * (theta + phi))
    # The bias of a central strength is its square, 1e-6, times third derivatives of order one.
    assert relative_error(pull(v), (-v * bend / (1 + bend), v / (1 + bend))) < 1e-5


# --- Precision and trees ---


def test_float32() -> None:
    task = ridge_task(0)
    expected = _reference(STRENGTHS, task)
    got = jax.jit(jax.grad(lambda s, t: judged(layer32(s, t)), argnums=(0, 1)))(*cast((STRENGTHS, task), jnp.float32))
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    # A central contrast of converged phases: 1e-4 to 1e-3, as docs/choosing.md says.
    assert relative_error(got, expected) < 1e-3


layer32 = cm.argmin(ridge_loss, DESCENT, init=jnp.zeros(3, jnp.float32), adjoint=FAST)


def test_a_tree_of_both_precisions_with_integers_and_keys_in_the_task() -> None:
    def loss(params: Any, meta_params: Any, task: Any) -> Any:
        w, b = params["w"], params["b"][0]
        noise = jax.random.normal(task["key"], (4,))
        fit = jnp.sum((w[task["index"]] - task["y"] - noise) ** 2) + jnp.sum((b - meta_params["center"]) ** 2)
        return fit + jnp.exp(meta_params["strength"]) * (jnp.sum(w**2) + jnp.sum(b**2))

    init = {"w": jnp.zeros(3), "b": [jnp.zeros(2, jnp.float32)], "none": None}
    meta_params = {"strength": jnp.float32(0.2), "center": jnp.array([1.0, -2.0])}
    task = {"index": jnp.array([0, 1, 2, 1]), "y": jnp.arange(4.0), "key": jax.random.key(3), "used": True}
    solve = cm.argmin(loss, cm.OptaxDescent(optax.sgd(0.15), num_steps=200), init=init, adjoint=FAST)

    def value(phi: Any) -> Any:
        return jnp.sum(phi["w"] * jnp.arange(3.0)) + jnp.sum(phi["b"][0] ** 2)

    def closed_form(meta_params: Any, y: Any) -> Any:
        strength = jnp.exp(meta_params["strength"].astype(jnp.float64))
        counts = jnp.zeros(3).at[task["index"]].add(1.0)
        sums = jnp.zeros(3).at[task["index"]].add(y + jax.random.normal(task["key"], (4,)))
        return {"w": sums / (counts + strength), "b": [meta_params["center"] / (1 + strength)]}

    got = jax.jit(jax.grad(lambda m, y: value(solve(m, {**task, "y": y})), argnums=(0, 1)))(meta_params, task["y"])
    expected = jax.grad(lambda m, y: value(closed_form(m, y)), argnums=(0, 1))(meta_params, task["y"])
    assert jax.tree.map(lambda x: x.dtype, got[0]) == jax.tree.map(lambda x: x.dtype, meta_params)
    # The float32 leaf of `params` limits all of it: float32's accuracy.
    assert relative_error(got, expected) < 1e-3
