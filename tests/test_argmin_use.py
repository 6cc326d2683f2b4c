"""Using `argmin`: captured values, warm starts, learners on the host, failures, mistakes, and what is not computed."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm
from tests.oracles import relative_error

# The curvatures of the losses below lie between 2 and 4: 60 steps take the error to 0.6^60.
DESCENT = cm.OptaxDescent(optax.sgd(0.2), num_steps=60)
UNFINISHED = cm.OptaxDescent(optax.sgd(0.2), num_steps=2)
DENSE = cm.ImplicitAdjoint(cm.DenseInverse())
AGAIN = cm.ContrastiveAdjoint(DESCENT)
V = jnp.array([1.0, -2.0])
Y = jnp.array([4.0, 1.0])


def shrunk(w: Any, decay: Any, y: Any) -> Any:
    """Its minimum is y / (1 + decay)."""
    return jnp.sum((w - y) ** 2) + decay * jnp.sum(w**2)


def start(decay: Any, y: Any) -> Any:
    return jnp.zeros_like(y)


# --- What the loss captured ---


def captured(decay: Any, y: Any, index: Any, key: Any) -> Any:
    """<V, phi> of a layer whose loss has all it depends on from around it: a number, an array, integers and a key."""

    def loss(w: Any, meta_params: Any, task: Any) -> Any:
        return jnp.sum((w - y[index] - jax.random.uniform(key, (2,))) ** 2) + decay * jnp.sum(w**2)

    return jnp.vdot(V, cm.argmin(loss, DESCENT, init=jnp.zeros(2), adjoint=AGAIN)(None, None))


def captured_exactly(decay: Any, y: Any, index: Any, key: Any) -> Any:
    return jnp.vdot(V, (y[index] + jax.random.uniform(key, (2,))) / (1 + decay))


ON = {"argnums": (0, 1)}
LIFTS: dict[str, Callable[[Any], Any]] = {
    "jit of grad": lambda f: jax.jit(jax.grad(lambda *xs: f(xs[0][0], xs[1][0], xs[2][0], xs[3][0]), **ON)),
    "grad of jit of vmap": lambda f: jax.grad(jax.jit(lambda *xs: jnp.sum(jnp.arange(3.0) * jax.vmap(f)(*xs))), **ON),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f, **ON)),
}


@pytest.mark.parametrize("name", LIFTS)
def test_captured_values_are_differentiated_and_integers_and_keys_come_along(name: str) -> None:
    decay, y = jnp.array([1.0, 0.5, 0.7]), jnp.arange(9.0).reshape(3, 3)
    index, keys = jnp.array([[0, 2], [1, 1], [2, 0]]), jax.random.split(jax.random.key(0), 3)
    got, expected = (LIFTS[name](f)(decay, y, index, keys) for f in (captured, captured_exactly))
    # Quadratic: no truncation; rounding is divided by a strength of about 1e-6.
    assert relative_error(got, expected) < 1e-8


def test_captured_float32_in_a_float64_loss() -> None:
    """Its derivative rounds to float32, so the nudge must be as strong as float32 asks: else 6e-8 / 1e-6 is lost."""

    def value(y: Any) -> Any:
        solve = cm.argmin(lambda w, m, t: shrunk(w, 1.0, y + t), DESCENT, init=jnp.zeros(2), adjoint=AGAIN)
        return jnp.vdot(V, solve(None, jnp.zeros(2)))

    got = jax.jit(jax.grad(value))(Y.astype(jnp.float32))
    assert got.dtype == jnp.float32
    assert relative_error(got, V / 2) < 1e-3


def test_the_loss_of_a_loop_that_carries_what_it_captured() -> None:
    def step(decay: Any, _: Any) -> Any:
        phi = cm.argmin(lambda w, m, t: shrunk(w, decay, Y), DESCENT, init=jnp.zeros(2), adjoint=DENSE)(None, None)
        return 0.5 * decay + 0.1 * jnp.sum(phi), None

    def step_exactly(decay: Any, _: Any) -> Any:
        return 0.5 * decay + 0.1 * jnp.sum(Y / (1 + decay)), None

    def after_five(f: Any) -> float:
        return float(jax.grad(lambda decay: jax.lax.scan(f, decay, length=5)[0])(jnp.array(0.3)))

    assert after_five(step) == pytest.approx(after_five(step_exactly), rel=1e-9)


# --- Starts ---


def test_a_warm_start_saves_gradients_and_has_an_exact_zero_gradient() -> None:
    solve = cm.argmin(shrunk, cm.LBFGS(tol=1e-10), init=start, adjoint=DENSE, has_aux=True)
    cold, before = solve(jnp.array(1.0), Y)
    warm, after = solve(jnp.array(1.0), Y, params=cold)
    np.testing.assert_allclose(warm, Y / 2, rtol=1e-9)
    assert int(after.num_gradients) < int(before.num_gradients)

    def value(decay: Any, begin: Any) -> Any:
        return jnp.vdot(V, solve(decay, Y, params=begin)[0])

    of_decay, of_start = jax.jit(jax.grad(value, argnums=(0, 1)))(jnp.array(1.0), cold + 1)
    assert of_decay == pytest.approx(float(jnp.vdot(V, -Y / 4)), rel=1e-8)
    assert jnp.all(of_start == 0)


def test_backprop_alone_sees_the_start_and_the_settings() -> None:
    """Two steps of descent on shrunk at decay 1 multiply the distance from y / 2 by (1 - 4 rate)^2."""
    solver = cm.OptaxDescent(lambda meta_params: optax.sgd(meta_params["rate"]), num_steps=2)
    solve = cm.argmin(
        lambda w, m, y: shrunk(w, 1.0, y), solver, init=lambda m, y: m["start"], adjoint=cm.BackpropAdjoint()
    )
    meta_params = {"rate": jnp.array(0.1), "start": jnp.array([3.0, -1.0])}
    got = jax.jit(jax.grad(lambda m: jnp.vdot(V, solve(m, Y))))(meta_params)
    np.testing.assert_allclose(got["start"], 0.36 * V, rtol=1e-12)
    np.testing.assert_allclose(got["rate"], jnp.vdot(V, 2 * 0.6 * -4 * (meta_params["start"] - Y / 2)), rtol=1e-12)


# --- Learners on the host ---


def descend(loss: Any, params: Any) -> Any:
    for _ in range(60):
        params = params - 0.2 * loss.value_and_grad(params)[1]
    return params


HOSTS = {"scipy": cm.ScipyMinimize(tol=1e-10), "callable": cm.CallableSolver(descend, host=True)}


@pytest.mark.parametrize("name", HOSTS)
def test_learners_on_the_host_run_both_phases(name: str) -> None:
    solve = cm.argmin(shrunk, HOSTS[name], init=start)
    decays, ys = jnp.array([0.5, 1.0]), jnp.stack([Y, 2 * Y])
    each = jax.jit(jax.vmap(jax.grad(lambda decay, y: jnp.vdot(V, solve(decay, y)), argnums=(0, 1))))
    of_decay, of_y = each(decays, ys)
    # What a tolerance of 1e-10 leaves is divided by a strength of about 1e-6.
    np.testing.assert_allclose(of_decay, -(ys @ V) / (1 + decays) ** 2, rtol=1e-4)
    np.testing.assert_allclose(of_y, V / (1 + decays)[:, None], rtol=1e-4)


# --- Failures ---


def unfinished(on_failure: Any, decay: Any, y: Any, v: Any = V) -> Any:
    """The gradient at two steps from zero: wrong where y is not zero, which the status says."""
    solve = cm.argmin(shrunk, UNFINISHED, init=start, adjoint=DENSE, on_failure=on_failure)
    return jax.grad(lambda decay, y: jnp.vdot(v, solve(decay, y)), argnums=(0, 1))(decay, y)


def test_a_failure_makes_the_gradient_nan_and_only_its_own() -> None:
    ys = jnp.stack([Y, 0 * Y, -Y])  # for y = 0 learning begins at the solution
    of_decay, of_y = jax.jit(jax.vmap(functools.partial(unfinished, "nan"), in_axes=(None, 0)))(jnp.array(1.0), ys)
    assert jnp.isnan(of_decay).tolist() == [True, False, True]
    np.testing.assert_array_equal(jnp.isnan(of_y), jnp.array([[True], [False], [True]]) * jnp.ones((1, 2), bool))
    np.testing.assert_allclose(of_y[1], V / 2, rtol=1e-12)


def test_keep_keeps_what_the_estimator_gives() -> None:
    problem = cm.BilevelProblem(shrunk, lambda w, decay, y: jnp.vdot(V, w), start)
    result = cm.ImplicitDifferentiation(UNFINISHED, cm.DenseInverse()).estimate(problem, jnp.array(1.0), Y)
    assert result.diagnostics.status == cm.Status.FREE_NOT_CONVERGED
    of_decay, _ = jax.jit(functools.partial(unfinished, "keep"))(jnp.array(1.0), Y)
    np.testing.assert_allclose(of_decay, result.grad, rtol=1e-14)


def test_a_callback_is_told_of_each_failure_once_and_keeps_the_gradient() -> None:
    told: list[cm.Diagnostics] = []
    ys, vs = jnp.stack([Y, 0 * Y, -Y, Y]), jnp.stack([V, V, V, 0 * V])  # the last two: a failure, and nothing asked
    of_decay, _ = jax.jit(jax.vmap(functools.partial(unfinished, told.append), in_axes=(None, 0, 0)))(1.0, ys, vs)
    jax.effects_barrier()
    assert [d.status for d in told] == [cm.Status.FREE_NOT_CONVERGED] * 2
    assert all(type(d).__name__ == "Diagnostics" and d.free_residual > 0.1 for d in told)
    assert jnp.all(jnp.isfinite(of_decay))


def test_a_callback_may_raise() -> None:
    def stop(diagnostics: cm.Diagnostics) -> None:
        raise RuntimeError(f"stopped by {cm.Status(int(diagnostics.status)).name}")

    def run() -> None:
        jax.block_until_ready(jax.jit(functools.partial(unfinished, stop))(jnp.array(1.0), Y))
        jax.effects_barrier()

    with pytest.raises(Exception, match="stopped by FREE_NOT_CONVERGED"):
        run()


@pytest.mark.parametrize("adjoint", [AGAIN, cm.ContrastiveAdjoint(), DENSE], ids=["again", "default", "implicit"])
def test_a_zero_cotangent_gives_exact_zeros_and_is_no_failure(adjoint: Any) -> None:
    """Of an unfinished learner."""
    solve = cm.argmin(shrunk, UNFINISHED, init=start, adjoint=adjoint)
    gradient = jax.jit(lambda v: jax.grad(lambda decay, y: jnp.vdot(v, solve(decay, y)), argnums=(0, 1))(1.0, Y))
    assert all(bool(jnp.all(leaf == 0)) for leaf in jax.tree.leaves(gradient(0 * V)))
    # The phases of a contrast go on learning, to the minimum, for which the cotangent was not meant.
    assert jnp.isnan(gradient(V)[0])


def test_a_saddle_is_a_failure_of_the_default_adjoint() -> None:
    solve = cm.argmin(lambda w, m, t: m * w[0] ** 2 - w[1] ** 2, DESCENT, init=jnp.zeros(2))
    assert jnp.isnan(jax.grad(lambda m: jnp.sum(solve(m, None)))(jnp.array(1.0)))


def test_has_aux_reports_the_free_phase_and_carries_no_derivative() -> None:
    solve = cm.argmin(shrunk, cm.LBFGS(max_steps=1), init=start, adjoint=DENSE, has_aux=True)
    phi, diagnostics = solve(jnp.array(1.0), Y)
    assert diagnostics.status == cm.Status.FREE_NOT_CONVERGED
    np.testing.assert_allclose(diagnostics.free_residual, jnp.linalg.norm(4 * phi - 2 * Y), rtol=1e-12)
    assert jax.grad(lambda decay: solve(decay, Y)[1].free_residual)(jnp.array(1.0)) == 0


@pytest.mark.parametrize("size", [1e-200, 1e150])
def test_the_scale_of_the_cotangent_does_not_matter(size: float) -> None:
    _, pull = jax.vjp(lambda y: LAYER(jnp.array(1.0), y), Y)
    assert relative_error(pull(size * V)[0] / size, V / 2) < 1e-8


LAYER = cm.argmin(shrunk, DESCENT, init=start, adjoint=AGAIN)


# --- What is computed, and compiled ---


def test_a_hundred_calls_compile_once(caplog: pytest.LogCaptureFixture) -> None:
    """Also without jit around them, and with new numbers in the solver and in what the loss captured."""

    def captures(decay: Any, y: Any, tol: Any) -> Any:
        solve = cm.argmin(lambda w, m, t: shrunk(w, decay, t), cm.LBFGS(tol=tol), init=start, adjoint=DENSE)
        return jnp.vdot(V, solve(None, y))

    eager = jax.grad(lambda decay, y: jnp.vdot(V, LAYER(decay, y)))
    jitted = jax.jit(jax.grad(captures))

    def call(k: int) -> Any:
        decay = jnp.asarray(np.asarray(0.5 + 0.01 * k))
        return float(eager(decay, Y)), float(jitted(decay, Y, 10.0 ** -(8 + k % 3))), float(decay)

    call(0)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(1.0)
        assert any("Compiling" in record.getMessage() for record in caplog.records)  # it would be seen
        caplog.clear()
        calls = [call(k) for k in range(100)]
    assert not [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    for one, two, decay in calls:
        expected = -float(jnp.vdot(V, Y)) / (1 + decay) ** 2
        assert (one, two) == pytest.approx((expected, expected), rel=1e-6)


def test_what_is_not_differentiated_is_not_measured() -> None:
    """A leaf of the task that has no derivative does no harm, and costs nothing."""

    @jax.custom_jvp
    def opaque(x: Any) -> Any:
        return x

    opaque.defjvp(lambda primals, tangents: pytest.fail("differentiated"))

    def loss(w: Any, decay: Any, task: Any) -> Any:
        return shrunk(w, decay, opaque(task["y"])) + jnp.real(task["complex"]) * 0

    solve = cm.argmin(loss, DESCENT, init=jnp.zeros(2), adjoint=AGAIN)
    task = {"y": Y, "complex": 1j}
    got = jax.grad(lambda decay: jnp.vdot(V, solve(decay, task)))(jnp.array(1.0))
    assert got == pytest.approx(float(-jnp.vdot(V, Y) / 4), rel=1e-8)


# --- Mistakes ---

TO_TOLERANCE = cm.argmin(shrunk, cm.OptaxDescent(optax.sgd(0.2), tol=1e-3), init=start, adjoint=cm.BackpropAdjoint())

MISTAKES: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "a class for the solver": (
        TypeError, "`solver` must be an instance of InnerSolver.*the class LBFGS",
        lambda: cm.argmin(shrunk, cm.LBFGS, init=start),
    ),
    "an optax optimiser for the solver": (
        TypeError, "`solver` must be", lambda: cm.argmin(shrunk, optax.adam(0.1), init=start)
    ),
    "a class for the adjoint": (
        TypeError, "`adjoint` must be an instance of Adjoint.*the class ImplicitAdjoint",
        lambda: cm.argmin(shrunk, DESCENT, init=start, adjoint=cm.ImplicitAdjoint),
    ),
    "a function for a part of the adjoint": (
        TypeError, "`Contrastive.scheme` must be",
        lambda: cm.argmin(shrunk, DESCENT, init=start, adjoint=cm.ContrastiveAdjoint(scheme=cm.circle)),
    ),
    "a problem for the loss": (
        TypeError, "`inner_loss` must be", lambda: cm.argmin(cm.BilevelProblem(shrunk, shrunk, start), DESCENT, init=Y)
    ),
    "an unknown policy": (
        ValueError, '`on_failure` must be "nan", "keep" or',
        lambda: cm.argmin(shrunk, DESCENT, init=start, on_failure="raise"),
    ),
    "a truncation of nothing": (
        ValueError, "`truncate`", lambda: cm.argmin(shrunk, DESCENT, init=start, adjoint=cm.BackpropAdjoint(truncate=0))
    ),
    "integers for params": (
        TypeError, r"`init` must be or return real floating arrays; init\['w'\] has dtype int",
        lambda: cm.argmin(shrunk, DESCENT, init={"w": jnp.arange(2)})(jnp.array(1.0), Y),
    ),
    "a warm start of another structure": (
        ValueError, "`params`: expected",
        lambda: cm.argmin(shrunk, DESCENT, init=start)(jnp.array(1.0), Y, params={"w": Y}),
    ),
    "a warm start of another dtype": (
        ValueError, "`params`: expected",
        lambda: cm.argmin(shrunk, DESCENT, init=start)(jnp.array(1.0), Y, params=Y.astype(jnp.float32)),
    ),
    "integers for meta_params": (
        TypeError, "meta_params must be real floating", lambda: cm.argmin(shrunk, DESCENT, init=start)(1, Y)
    ),
    "a loss that is no scalar": (
        TypeError, "`inner_loss` must return a floating scalar",
        lambda: cm.argmin(lambda w, m, t: w, DESCENT, init=Y)(None, None),
    ),
    "complex values differentiated": (
        TypeError, r"complex values; operands.task has dtype complex128",
        lambda: jax.grad(
            lambda z: jnp.sum(cm.argmin(lambda w, m, t: shrunk(w, 1.0, jnp.real(t)), DESCENT, init=Y)(None, z)),
            holomorphic=False,
        )(Y + 0j),
    ),
    "a solver that cannot be unrolled": (
        TypeError, "cannot be differentiated in reverse through its steps",
        lambda: jax.grad(lambda d: jnp.sum(TO_TOLERANCE(d, Y)))(1.0),
    ),
    "forward mode": (
        TypeError, "forward-mode", lambda: jax.jvp(lambda d: LAYER(d, Y), (jnp.array(1.0),), (jnp.array(1.0),))
    ),
    "second derivatives": (
        TypeError, "cannot be differentiated again", lambda: jax.hessian(lambda d: jnp.sum(LAYER(d, Y)))(jnp.array(1.0))
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_says_what_it_is(name: str) -> None:
    kind, message, make = MISTAKES[name]
    with pytest.raises(kind, match=message):
        make()
