"""Learners on the host: SciPy and black boxes find what they should, under every transformation, and leave no trace."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm

GRADIENT_METHODS = ["BFGS", "CG", "L-BFGS-B", "TNC", "Newton-CG", "trust-ncg", "trust-krylov"]
VALUE_METHODS = ["Nelder-Mead", "Powell"]


@pytest.fixture(autouse=True)
def _no_thread_left_behind() -> Iterator[None]:
    before = threading.active_count()
    yield
    deadline = time.monotonic() + 10.0  # aborted learners need a moment to notice
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before, [thread.name for thread in threading.enumerate()]


class Ridge(NamedTuple):
    inputs: Any
    targets: Any
    decay: Any

    def loss(self, w: Any) -> Any:
        residuals = self.inputs @ w - self.targets
        return 0.5 * jnp.mean(residuals**2) + 0.5 * self.decay * jnp.sum(w**2)

    def solution(self) -> np.ndarray:
        inputs, targets, decay = (np.asarray(x, np.float64) for x in self)
        gram = inputs.T @ inputs / len(inputs) + decay * np.eye(inputs.shape[1])
        return np.linalg.solve(gram, inputs.T @ targets / len(inputs))


def ridge(seed: int = 0, dim: int = 8, dtype: Any = jnp.float64) -> Ridge:
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(30, dim))
    targets = inputs @ np.arange(dim) + rng.normal(size=30)
    return Ridge(jnp.asarray(inputs, dtype), jnp.asarray(targets, dtype), jnp.asarray(0.1, dtype))


def numpy_descent(loss: Any, params: Any) -> Any:
    """A learner that knows nothing of JAX but its trees: descent with in-place steps on its own arrays."""
    for _ in range(200):
        _, grads = loss.value_and_grad(params)
        for leaf, grad in zip(jax.tree.leaves(params), jax.tree.leaves(grads), strict=True):
            np.subtract(leaf, 0.2 * grad, out=leaf)
    return params


def relative_error(got: Any, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected))


# --- SciPy ---


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_ridge_in_float64(method: str) -> None:
    task = ridge()
    solution = jax.jit(lambda: cm.ScipyMinimize(method, tol=1e-10).solve(task.loss, jnp.zeros(8)))()
    # Condition number about 10: the error is at most about residual / smallest curvature.
    assert relative_error(solution.params, task.solution()) < 1e-9
    assert solution.residual <= 1e-10
    np.testing.assert_allclose(solution.residual, np.linalg.norm(jax.grad(task.loss)(solution.params)), atol=1e-14)
    assert solution.status == cm.Status.CONVERGED
    # What was asked for begins with the start, which is measured anyway; the solution is measured once more.
    assert solution.num_gradients == solution.num_steps + 1


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_ridge_in_float32_reaches_the_floor_of_the_gradient_not_that_of_the_loss(method: str) -> None:
    task = ridge(dtype=jnp.float32)
    solution = cm.ScipyMinimize(method, tol=2e-5).solve(task.loss, jnp.zeros(8, jnp.float32))
    assert solution.params.dtype == solution.residual.dtype == jnp.float32
    assert solution.status == cm.Status.CONVERGED
    # The loss is about 0.5 and equal to rounding within sqrt(eps) = 3e-4 of its minimum; the gradient tells more.
    assert relative_error(solution.params, task.solution()) < 2e-5


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_a_tolerance_out_of_reach_gives_the_best_point_and_says_so(method: str) -> None:
    task = ridge()
    solution = cm.ScipyMinimize(method, tol=0.0).solve(task.loss, jnp.zeros(8))
    # Gradients are sums of terms of size 10 with rounding 1e-16.
    assert solution.residual < 1e-13
    assert solution.status == cm.Status.FREE_NOT_CONVERGED
    assert solution.num_steps < 2000


@pytest.mark.parametrize("method", VALUE_METHODS)
def test_methods_that_see_values_only(method: str) -> None:
    task = ridge(dim=2)
    solution = cm.ScipyMinimize(method, tol=1e-6).solve(task.loss, jnp.zeros(2))
    # Values locate a minimum to the square root of epsilon.
    assert relative_error(solution.params, task.solution()) < 1e-6
    assert solution.num_gradients == 2
    assert solution.num_steps > 20
    np.testing.assert_allclose(solution.residual, np.linalg.norm(jax.grad(task.loss)(solution.params)), rtol=1e-6)


def test_a_curved_valley() -> None:
    def rosenbrock(w: jax.Array) -> jax.Array:
        return jnp.sum(100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2)

    for method in GRADIENT_METHODS:
        solution = cm.ScipyMinimize(method, tol=1e-9).solve(rosenbrock, jnp.full(4, -0.5))
        assert solution.status == cm.Status.CONVERGED, method
        np.testing.assert_allclose(solution.params, np.ones(4), atol=1e-8, err_msg=method)


def test_budget_and_options() -> None:
    task = ridge()
    start = jnp.zeros(8)
    few = cm.ScipyMinimize("CG", max_steps=5).solve(task.loss, start)
    assert few.num_steps == 5
    assert few.status == cm.Status.FREE_NOT_CONVERGED
    assert task.loss(few.params) < task.loss(start)
    one_iteration = cm.ScipyMinimize("CG", options=(("maxiter", 1),)).solve(task.loss, start)
    assert one_iteration.num_steps < 5
    none = cm.ScipyMinimize("CG", max_steps=0).solve(task.loss, start)
    np.testing.assert_array_equal(none.params, start)


def test_a_stop_replaces_settings_even_traced() -> None:
    task = ridge()
    traces = 0

    @jax.jit
    def solve(tol: Any, max_steps: Any) -> Any:
        nonlocal traces
        traces += 1
        return cm.ScipyMinimize("BFGS").solve(task.loss, jnp.zeros(8), stop=cm.Stop(tol=tol, max_steps=max_steps))

    loose, tight, cut = solve(1e-2, 1000), solve(1e-12, 1000), solve(1e-12, 4)
    assert traces == 1
    assert 1e-4 < loose.residual <= 1e-2
    assert tight.residual <= 1e-12
    assert [int(x.status) for x in (loose, tight, cut)] == [0, 0, cm.Status.FREE_NOT_CONVERGED]
    assert cut.num_steps == 4


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"method must be one of BFGS.*got 'trust-exact'.*Hessians"):
        cm.ScipyMinimize("trust-exact")
    options: Any = {"maxcor": 5}
    with pytest.raises(TypeError, match=r"tuple\(options.items\(\)\)"):
        cm.ScipyMinimize(options=options)
    with pytest.raises(TypeError, match="holomorphic; ScipyMinimize is not"):
        cm.ScipyMinimize().solve(lambda w: jnp.sum(w**2), jnp.ones(2, complex))


# --- trees, dtypes and transformations ---


class Layer(NamedTuple):
    weight: Any
    bias: Any


@pytest.mark.parametrize(
    "solver",
    [cm.ScipyMinimize(tol=1e-6), cm.CallableSolver(numpy_descent, host=True, tol=1e-5)],
    ids=["scipy", "numpy"],
)
def test_any_pytree_keeps_its_dtypes(solver: cm.InnerSolver) -> None:
    init = {
        "layer": Layer(jnp.ones((2, 3), jnp.float32), jnp.zeros((), jnp.float64)),
        "none": None,
        "empty": (),
        "void": jnp.zeros((0, 2)),
    }

    def loss(params: Any) -> jax.Array:
        layer = params["layer"]
        weights = jnp.arange(1.0, 4.0) * (layer.weight - jnp.arange(6.0).reshape(2, 3)) ** 2
        return 0.5 * jnp.sum(weights) + (layer.bias + 2.0) ** 2

    solution = jax.jit(lambda: solver.solve(loss, init))()
    assert jax.tree.map(jnp.dtype, jax.tree.map(lambda x: x.dtype, solution.params)) == jax.tree.map(
        lambda x: x.dtype, init
    )
    # One leaf lives in float32.
    np.testing.assert_allclose(solution.params["layer"].weight, np.arange(6.0).reshape(2, 3), atol=2e-6)
    np.testing.assert_allclose(solution.params["layer"].bias, -2.0, atol=2e-6)
    assert solution.status == cm.Status.CONVERGED
    assert solution.memory == ()


@pytest.mark.parametrize("solver", [cm.ScipyMinimize(), cm.CallableSolver(numpy_descent, host=True)], ids=type)
def test_nothing_to_learn(solver: cm.InnerSolver) -> None:
    solution = solver.solve(lambda params: jnp.asarray(3.0), {"none": jnp.zeros(0)})
    assert solution.params["none"].shape == (0,)
    assert solution.status == cm.Status.CONVERGED


def stack(tasks: list[Ridge]) -> Ridge:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)


@pytest.mark.parametrize(
    "solver",
    [cm.ScipyMinimize("BFGS"), cm.CallableSolver(numpy_descent, host=True)],
    ids=["BFGS", "numpy"],
)
def test_jit_vmap_twice_and_scan_equal_a_loop(solver: cm.InnerSolver) -> None:
    tasks = [ridge(seed, dim=3) for seed in range(6)]

    def solve(task: Ridge) -> cm.Solution:
        return solver.solve(task.loss, jnp.zeros(3))

    compiled = jax.jit(solve)
    looped = [compiled(task) for task in tasks]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *looped)
    batch = stack(tasks)
    grid = jax.tree.map(lambda x: x.reshape(2, 3, *x.shape[1:]), batch)
    nested = jax.jit(jax.vmap(jax.vmap(solve)))(grid)
    results = {
        "eager": jax.tree.map(lambda *leaves: np.stack(leaves), solve(tasks[0]), *looped[1:]),
        "vmap": jax.jit(jax.vmap(solve))(batch),
        "vmap twice": jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), nested),
        "scan": jax.jit(lambda batch: jax.lax.scan(lambda _, task: (None, solve(task)), None, batch)[1])(batch),
        "scan of vmap": jax.tree.map(
            lambda x: x.reshape(6, *x.shape[2:]),
            jax.jit(lambda grid: jax.lax.scan(lambda _, row: (None, jax.vmap(solve)(row)), None, grid)[1])(grid),
        ),
    }
    for name, got in results.items():
        # Batched products round differently, and where a learner stops can hang on that: the solutions agree to what
        # was asked of them.
        np.testing.assert_allclose(got.params, expected.params, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(got.status, expected.status, err_msg=name)
        assert got.num_steps.dtype == jnp.int32
    for task, params in zip(tasks, expected.params, strict=True):
        assert relative_error(params, task.solution()) < 1e-6


def test_a_hard_lane_and_a_broken_one_leave_the_others_alone() -> None:
    def loss(w: jax.Array, hardness: jax.Array) -> jax.Array:
        return jnp.sum((1 - w) ** 2) + hardness * (w[1] - w[0] ** 2) ** 2

    def solve(hardness: Any) -> cm.Solution:
        return cm.ScipyMinimize("BFGS").solve(lambda w: loss(w, hardness), jnp.array([-1.2, 1.0]))

    hardness = jnp.array([0.0, 1e4, jnp.nan, 1.0])
    together = jax.jit(jax.vmap(solve))(hardness)
    for lane in (0, 1, 3):
        # Elementwise losses: a lane computes exactly what it would alone.
        alone = jax.jit(solve)(hardness[lane])
        np.testing.assert_array_equal(together.params[lane], alone.params)
        assert together.num_steps[lane] == alone.num_steps
    assert together.num_steps[1] > 3 * together.num_steps[0]
    np.testing.assert_array_equal(together.status, [0, 0, cm.Status.NOT_FINITE, 0])


@pytest.mark.parametrize("method", GRADIENT_METHODS + VALUE_METHODS)
def test_no_method_raises_on_losses_that_are_not_finite(method: str) -> None:
    solver = cm.ScipyMinimize(method, max_steps=300)

    @jax.jit
    @jax.vmap
    def solve(poison: Any, beyond: Any) -> cm.Solution:
        def loss(w: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(w > beyond, poison, jnp.cosh(3 * (w - 1.0))))

        return solver.solve(loss, jnp.full(2, -1.0))

    # Poisoned everywhere; or sound at the start and around the minimum at 1, and poisoned beyond 2.
    poisons, beyond = jnp.array([jnp.nan, jnp.inf, jnp.nan, jnp.inf]), jnp.array([-5.0, -5.0, 2.0, 2.0])
    solution = solve(poisons, beyond)
    np.testing.assert_array_equal(solution.status == cm.Status.NOT_FINITE, [True, True, False, False])
    assert jnp.all(jnp.isfinite(solution.params))


def test_equal_starts_are_never_taken_for_one_solve() -> None:
    """Both solves make the same first call: same start, same value, same gradient."""

    @jax.jit
    def solve(quartic: Any) -> Any:
        return cm.ScipyMinimize("BFGS").solve(lambda w: jnp.sum((w - 1) ** 2 + quartic * w**4), jnp.zeros(2)).params

    one, two = jax.jit(lambda: (solve(0.0), solve(1.0)))()
    np.testing.assert_allclose(one, 1.0, atol=1e-8)
    np.testing.assert_allclose(two, 0.5897545123, atol=1e-8)  # the real root of 2 w^3 + w - 1


def test_differentiating_through_a_host_learner_is_refused() -> None:
    def outcome(decay: Any) -> jax.Array:
        task = ridge()._replace(decay=decay)
        return jnp.sum(cm.ScipyMinimize().solve(task.loss, jnp.zeros(8)).params)

    for differentiate in (jax.jit(jax.grad(outcome)), jax.jacfwd(outcome)):
        with pytest.raises(TypeError, match=r"Learning on the host cannot be differentiated.*BackpropThroughLearning"):
            differentiate(0.1)
    # Where nothing is differentiated nothing is refused.
    value, slope = jax.value_and_grad(lambda decay: outcome(jax.lax.stop_gradient(decay)) * decay)(0.1)
    np.testing.assert_allclose(slope, value / 0.1)


# --- black boxes on the host ---


def test_a_numpy_learner_descends_as_one_in_jax_would() -> None:
    task = ridge(dim=3)
    solution = jax.jit(lambda: cm.CallableSolver(numpy_descent, host=True).solve(task.loss, jnp.ones(3)))()
    in_jax = jax.lax.fori_loop(0, 200, lambda _, w: w - 0.2 * jax.grad(task.loss)(w), jnp.ones(3))
    np.testing.assert_allclose(solution.params, in_jax, rtol=1e-12)
    assert solution.num_steps == 200
    assert solution.num_gradients == 200 + 1  # the solution was not asked about, and is measured


def test_what_a_host_learner_sees() -> None:
    init = {"w": jnp.asarray([1.0, 2.0], jnp.float32), "b": jnp.asarray(3.0, jnp.float32)}
    seen: list[Any] = []

    def learn(loss: Any, params: Any) -> Any:
        seen.extend([params, loss(params), loss.value_and_grad(params), loss.value_and_grad(params)])
        return {"w": np.asarray([0.5, 0.25]), "b": 0}

    solution = cm.CallableSolver(learn, host=True).solve(lambda p: jnp.sum(p["w"] ** 2) * p["b"], init)
    params, value, (same_value, grad), _ = seen
    assert isinstance(value, float)
    assert value == same_value == 15.0
    for tree_ in (params, grad):
        assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in jax.tree.leaves(tree_))
    np.testing.assert_array_equal(grad["w"], [6.0, 12.0])
    np.testing.assert_array_equal(grad["b"], 5.0)
    # All three questions were about the start, which is known; one evaluation measures the solution.
    assert (solution.num_steps, solution.num_gradients) == (1, 2)
    np.testing.assert_array_equal(solution.params["w"], np.asarray([0.5, 0.25], np.float32))


def test_a_learner_of_another_kind() -> None:
    """Random search on values alone, as a stand-in for any black box."""

    def search(loss: Any, params: Any) -> Any:
        rng = np.random.default_rng(0)
        best, width = loss(params), 1.0
        for _ in range(1500):
            candidate = params + width * rng.normal(size=params.shape)
            value = loss(candidate)
            better = value < best
            params, best = (candidate, value) if better else (params, best)
            width *= 1.5 if better else 0.9
        return params

    task = ridge(dim=2)
    solution = cm.CallableSolver(search, host=True, tol=1e-4).solve(task.loss, jnp.zeros(2))
    assert relative_error(solution.params, task.solution()) < 1e-5
    assert solution.status == cm.Status.CONVERGED
    unfinished = cm.CallableSolver(search, host=True).solve(task.loss, jnp.zeros(2), stop=cm.Stop(tol=1e-14))
    assert unfinished.status == cm.Status.FREE_NOT_CONVERGED


def test_lanes_learn_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=30.0)

    def learn(loss: Any, params: Any) -> Any:
        meeting.wait()  # passes only if all three are here before any is answered
        loss(params + 1)
        meeting.wait()
        return params - loss.value_and_grad(params)[1] / 2

    solution = jax.vmap(
        lambda goal: cm.CallableSolver(learn, host=True).solve(lambda w: jnp.sum((w - goal) ** 2), jnp.zeros(2))
    )(jnp.arange(3.0))
    np.testing.assert_allclose(solution.params, np.repeat(np.arange(3.0), 2).reshape(3, 2))


def failing(loss: Any, params: Any) -> Any:
    value, _ = loss.value_and_grad(params + 1.0)
    if value < 50.0:
        raise RuntimeError(f"the data of hospital {value:.0f} are missing")
    while True:
        loss(params)
        params = params + 1.0


def test_what_a_learner_raises_reaches_the_user(caplog: pytest.LogCaptureFixture) -> None:
    def solve(scale: Any) -> Any:
        return cm.CallableSolver(failing, host=True).solve(lambda w: scale * jnp.sum(w**2), jnp.zeros(2)).params

    with pytest.raises(Exception, match=r"(?s)in failing.*RuntimeError: the data of hospital 2 are missing"):
        jax.block_until_ready(jax.jit(solve)(1.0))
    # The other lanes would ask for ever: they are ended with the program (see the fixture).
    with pytest.raises(Exception, match="hospital 4 are missing"):
        jax.block_until_ready(jax.jit(jax.vmap(solve))(jnp.array([100.0, 2.0, 200.0])))


def test_a_learner_that_swallows_exceptions_ends_with_its_program() -> None:
    def stubborn(loss: Any, params: Any) -> Any:
        while True:
            params = params + 1.0
            try:
                value = loss(params)
            except Exception:
                continue
            if value < 50.0:
                raise RuntimeError("lane is done for")

    def solve(scale: Any) -> Any:
        return cm.CallableSolver(stubborn, host=True).solve(lambda w: scale * jnp.sum(w**2), jnp.zeros(2)).params

    with pytest.raises(Exception, match="lane is done for"):
        jax.block_until_ready(jax.vmap(solve)(jnp.array([100.0, 2.0])))


def test_parameters_of_another_shape_are_named() -> None:
    def shorter(loss: Any, params: Any) -> Any:
        return params["w"][:1]

    def asks_shorter(loss: Any, params: Any) -> Any:
        return loss({"w": params["w"][:1]})

    for learner, words in ((shorter, "`shorter` returned"), (asks_shorter, "`asks_shorter` asked for the loss at")):
        solver = cm.CallableSolver(learner, host=True)
        with pytest.raises(Exception, match=rf"(?s){words} parameters unlike `init`: expected.*\(2,\).*got.*\(1,\)"):
            jax.block_until_ready(solver.solve(lambda p: jnp.sum(p["w"] ** 2), {"w": jnp.zeros(2)}).params)


def test_a_loss_kept_beyond_the_learning_is_dead() -> None:
    kept: list[Any] = []

    def learn(loss: Any, params: Any) -> Any:
        kept.append(loss)
        return params

    jax.block_until_ready(cm.CallableSolver(learn, host=True).solve(lambda w: jnp.sum(w**2), jnp.ones(2)))
    with pytest.raises(BaseException, match="loss can be asked only while its learner"):
        kept[0](np.zeros(2))


def test_many_solves_leave_no_threads() -> None:
    task = ridge(dim=2)

    def solve(start: Any) -> Any:
        return cm.ScipyMinimize("BFGS", tol=1e-6).solve(task.loss, start).params

    compiled, batched = jax.jit(solve), jax.jit(jax.vmap(solve))
    before = threading.active_count()
    for step in range(200):
        jax.block_until_ready(compiled(jnp.full(2, float(step))))
    # At once: a finished learner's thread has ended before its program goes on.
    assert threading.active_count() == before
    jax.block_until_ready(batched(jnp.arange(64.0).reshape(32, 2)))
    assert threading.active_count() == before


# --- functions in JAX ---


def jax_descent(loss: Any, params: Any) -> Any:
    grad = jax.grad(loss, holomorphic=any(jnp.iscomplexobj(x) for x in jax.tree.leaves(params)))
    return jax.lax.scan(lambda w, _: (jax.tree.map(lambda x, g: x - 0.3 * g, w, grad(w)), None), params, length=60)[0]


def test_a_jax_function_is_called_and_measured() -> None:
    def closed_form(loss: Any, params: Any) -> Any:
        return params - jnp.linalg.solve(jax.hessian(loss)(params), jax.grad(loss)(params))

    task = ridge()
    solution = jax.jit(lambda: cm.CallableSolver(closed_form, tol=1e-12).solve(task.loss, jnp.ones(8)))()
    assert relative_error(solution.params, task.solution()) < 1e-13
    assert solution.residual <= 1e-12
    assert (solution.status, solution.num_gradients, solution.num_steps) == (cm.Status.CONVERGED, 2, 0)
    loose = cm.CallableSolver(lambda loss, params: params, tol=1e-12).solve(task.loss, jnp.ones(8))
    np.testing.assert_allclose(loose.residual, np.linalg.norm(jax.grad(task.loss)(jnp.ones(8))))
    assert loose.status == cm.Status.FREE_NOT_CONVERGED
    silent = cm.CallableSolver(lambda loss, params: params).solve(task.loss, jnp.ones(8))
    assert silent.status == cm.Status.CONVERGED
    away = cm.CallableSolver(lambda loss, params: 1000 * params).solve(task.loss, jnp.ones(8))
    assert away.status == cm.Status.DIVERGED
    lost = cm.CallableSolver(lambda loss, params: params * jnp.nan).solve(task.loss, jnp.ones(8))
    assert lost.status == cm.Status.NOT_FINITE


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_jax_function_is_differentiated_through(checkpoint: bool) -> None:
    solver = cm.CallableSolver(jax_descent)
    problem = cm.BilevelProblem(
        inner_loss=lambda w, decay, task: Ridge(*task).loss(w) + 0.5 * decay * jnp.sum(w**2),
        outer_loss=lambda w, decay, task: jnp.sum((w - 1.0) ** 2),
        init_params=lambda decay, task: jnp.zeros(3),
    )
    task = ridge(dim=3)

    def learned(decay: Any) -> jax.Array:
        return problem.outer(solver.solve(lambda w: problem.inner(w, decay, task), jnp.zeros(3)).params, decay, task)

    step = 1e-5
    expected = (learned(0.3 + step) - learned(0.3 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(learned)(0.3), expected, rtol=1e-8)
    estimator = cm.BackpropThroughLearning(solver, checkpoint=checkpoint)
    np.testing.assert_allclose(estimator.estimate(problem, jnp.asarray(0.3), task).grad, expected, rtol=1e-8)


def test_what_a_jax_function_cannot_do_is_said() -> None:
    def changed(loss: Any, params: Any) -> Any:
        return {"v": params["w"]}

    with pytest.raises(ValueError, match=r"what `changed` returned: expected .*w.*got .*v.*Return parameters"):
        cm.CallableSolver(changed).solve(lambda p: jnp.sum(p["w"] ** 2), {"w": jnp.zeros(2)})
    cm.CallableSolver(jax_descent).check_holomorphic(jnp.ones(2, complex))
    with pytest.raises(TypeError, match=r"learner `<lambda>` must be holomorphic .*abs"):
        cm.CallableSolver(lambda loss, w: jnp.abs(w) * w).check_holomorphic(jnp.ones(2, complex))
    with pytest.raises(TypeError, match="holomorphic; CallableSolver is not"):
        cm.CallableSolver(numpy_descent, host=True).check_holomorphic(jnp.ones(2, complex))


# --- as learners of an estimator ---


@pytest.mark.parametrize(
    "solver",
    [
        cm.ScipyMinimize("L-BFGS-B", tol=1e-10),
        cm.CallableSolver(numpy_descent, host=True),
        cm.CallableSolver(jax_descent),
    ],
    ids=["scipy", "numpy", "jax"],
)
def test_contrast_of_black_boxes_is_the_meta_gradient(solver: cm.InnerSolver) -> None:
    """L_in = sum a_i (w_i - t_i)^2 / 2 + e^theta |w|^2 / 2 has w = a t / (a + e^theta)."""
    curvature, goal, theta = jnp.array([2.0, 3.0]), jnp.array([1.0, -2.0]), jnp.asarray(-0.5)
    problem = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: 0.5 * jnp.sum(curvature * (w - task) ** 2 + jnp.exp(theta) * w**2),
        outer_loss=lambda w, theta, task: 0.5 * jnp.sum((w - 1.0) ** 2),
        init_params=lambda theta, task: jnp.zeros(2),
    )
    total = curvature + jnp.exp(theta)
    learned = curvature * goal / total
    expected = jnp.sum((learned - 1.0) * -learned / total * jnp.exp(theta))
    estimator = cm.Contrastive(solver, nudged_solver=solver, scheme=cm.central_difference(beta=1e-3))
    result = jax.jit(lambda theta: estimator.estimate(problem, theta, goal))(theta)
    # The bias of a central difference is about beta^2.
    np.testing.assert_allclose(result.grad, expected, rtol=1e-5)
    assert result.diagnostics.status == cm.Status.CONVERGED


# --- few cores ---

ON_ONE_CORE = """
    import os
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    import jax
    import jax.numpy as jnp
    import numpy as np
    import contrastive_meta as cm

    def descend(loss, params):
        for _ in range(8):
            params = params - 0.5 * loss.value_and_grad(params)[1]
        return params

    # 1.6 MB a vector: jaxlib copies those on a thread of its pool. The goals are still being computed when the solves
    # are called, so these run on the pool too: on its only thread.
    def solve(goal):
        solver = cm.CallableSolver(descend, host=True)
        return solver.solve(lambda w: 0.5 * jnp.sum((w - goal) ** 2), jnp.zeros(400_000)).params

    batched = jax.jit(jax.vmap(solve))
    ones = jnp.ones((2, 400_000))
    outcomes = [batched(jnp.cos(ones * step)) for step in range(6)]
    for step, outcome in enumerate(outcomes):
        np.testing.assert_allclose(outcome, np.cos(np.asarray(ones) * step) * (1 - 0.5**8), rtol=1e-5)
    small = jax.vmap(lambda goal: cm.ScipyMinimize(tol=1e-4).solve(lambda w: jnp.sum((w - goal) ** 2), jnp.zeros(3)))
    print(small(jnp.arange(4.0)).status.max(), "done")
"""


@pytest.mark.parametrize("flags", ["", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"])
def test_one_core_does_not_hang(flags: str) -> None:
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(ON_ONE_CORE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "0 done", done.stderr
