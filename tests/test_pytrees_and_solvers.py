"""One table of solvers, one contract; and trees of every kind, which must not change what is computed from them."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import contrastive_meta as cm
from contrastive_meta import Status, problems
from tests.oracles import relative_error


class Layer(NamedTuple):
    weight: Any
    bias: Any


def flat(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]


# What the solvers minimise: not quadratic, curvatures between 0.6 and 1.6 or so, over a tree with every kind of branch.

DIM = 5


def data(seed: int = 0, dtype: Any = jnp.float64) -> Any:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0]
    curvature = (basis * np.linspace(0.5, 1.4, DIM)) @ basis.T
    return {"curvature": jnp.asarray(curvature, dtype), "pull": jnp.asarray(rng.normal(size=DIM), dtype)}


def start(dtype: Any = jnp.float64) -> Any:
    layer = Layer(jnp.full((2, 2), 0.3, dtype), jnp.asarray(-0.2, dtype))
    return {"layer": layer, "none": None, "empty": ((), {})}


def loss_on(given: Any) -> Callable[[Any], jax.Array]:
    def loss(params: Any) -> jax.Array:
        w = flat(params)
        return jnp.sum(w * (given["curvature"] @ w)) / 2 + 0.1 * jnp.sum(jnp.cosh(w)) - jnp.sum(given["pull"] * w)

    return loss


@functools.cache
def minimum(seed: int = 0) -> np.ndarray:
    """By Newton's method, in numpy."""
    curvature, pull = (np.asarray(x) for x in data(seed).values())
    w = np.zeros(DIM)
    for _ in range(20):
        w -= np.linalg.solve(curvature + 0.1 * np.diag(np.cosh(w)), curvature @ w + 0.1 * np.sinh(w) - pull)
    return w


def learner_in_jax(loss: Any, init: Any) -> Any:
    holomorphic = jnp.iscomplexobj(flat(init))

    def step(_: Any, params: Any) -> Any:
        return jax.tree.map(lambda w, g: w - 0.8 * g, params, jax.grad(loss, holomorphic=holomorphic)(params))

    return jax.lax.fori_loop(0, 60, step, init)


def learner_on_the_host(loss: Any, init: Any) -> Any:
    layer = init["layer"]
    for _ in range(60):
        grad = loss.value_and_grad(init | {"layer": layer})[1]["layer"]
        layer = Layer(layer.weight - 0.8 * grad.weight, layer.bias - 0.8 * grad.bias)
    return init | {"layer": layer}


class Row(NamedTuple):
    """A solver and what it is able to.

    Attributes:
      make: `x -> solver`, with x in every number that may change without recompiling.
      accuracy: how near to the minimum it ends, relatively, in float64.
      to_tolerance: whether it stops at a gradient norm of 1e-9 and says so where it could not.
      stops: whether `stop` reaches it.
      complex_capable: whether its steps are holomorphic.
      unrollable: whether `BackpropThroughLearning` can differentiate its steps.
      counts: whether `num_gradients` counts every evaluation of the loss.
      host: whether it runs in Python threads.
    """

    make: Callable[[float], cm.InnerSolver]
    accuracy: float
    to_tolerance: bool = False
    stops: bool = False
    complex_capable: bool = False
    unrollable: bool = False
    counts: bool = True
    host: bool = False


MOMENTUM = optax.sgd(0.7, momentum=0.2)
SGD = optax.sgd(0.8)
ADAM = optax.adam(optax.cosine_decay_schedule(0.2, 200))
SOLVERS: dict[str, Row] = {
    # What is left to learn shrinks by 0.5 or less a step: 60 steps end at rounding, 1e-9 is reached in 35.
    "descent": Row(lambda x: cm.OptaxDescent(MOMENTUM, num_steps=60), 1e-14, complex_capable=True, unrollable=True),
    "carried": Row(
        lambda x: cm.OptaxDescent(MOMENTUM, num_steps=60, carry_state=True),
        1e-14,
        complex_capable=True,
        unrollable=True,
    ),
    # Its schedule ends at 0; what 200 steps leave is not controlled by anything.
    "adam": Row(lambda x: cm.OptaxDescent(ADAM, num_steps=200), 1e-3, unrollable=True),
    "descent to a tolerance": Row(
        lambda x: cm.OptaxDescent(SGD, tol=1e-9 * x, max_steps=int(100 * x)), 2e-9, True, True, complex_capable=True
    ),
    "lbfgs": Row(lambda x: cm.LBFGS(tol=1e-9 * x, max_steps=int(40 * x)), 2e-9, True, True),
    "scipy": Row(lambda x: cm.ScipyMinimize("BFGS", tol=1e-9 * x, max_steps=int(100 * x)), 2e-9, True, True, host=True),
    "callable": Row(
        lambda x: cm.CallableSolver(learner_in_jax, tol=1e-9 * x),
        1e-14,
        complex_capable=True,
        unrollable=True,
        counts=False,
    ),
    "host callable": Row(lambda x: cm.CallableSolver(learner_on_the_host, host=True, tol=1e-9 * x), 1e-14, host=True),
}
EVERY = pytest.mark.parametrize("name", SOLVERS)


def having(**properties: bool) -> pytest.MarkDecorator:
    """The rows with these properties."""
    names = [
        name for name, row in SOLVERS.items() if all(getattr(row, key) == wanted for key, wanted in properties.items())
    ]
    return pytest.mark.parametrize("name", names)


TRACES: list[int] = []


@jax.jit
def solve(solver: cm.InnerSolver, given: Any, init: Any, memory: Any = (), stop: cm.Stop = cm.Stop()) -> cm.Solution:
    TRACES.append(1)
    found: cm.Solution = solver.solve(loss_on(given), init, memory=memory, stop=stop)
    return found


@functools.cache
def solution(name: str, seed: int = 0) -> cm.Solution:
    found: cm.Solution = solve(SOLVERS[name].make(1.0), data(seed), start())
    return found


def types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


@EVERY
def test_it_finds_the_minimum_and_says_how_near_it_came(name: str) -> None:
    row, found = SOLVERS[name], solution(name)
    assert relative_error(flat(found.params), minimum()) < row.accuracy
    residual = np.linalg.norm(flat(jax.grad(loss_on(data()))(found.params)))
    # Two ways to sum the same gradient differ by its rounding.
    assert float(found.residual) == pytest.approx(residual, rel=1e-6, abs=1e-15)
    assert found.residual <= 1e-9 or not row.to_tolerance
    assert found.status == Status.CONVERGED


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_structure_and_dtypes(name: str, dtype: Any) -> None:
    solver, init = SOLVERS[name].make(1.0), start(dtype)
    found = jax.eval_shape(lambda: solver.solve(loss_on(data(0, dtype)), init))
    assert jax.tree.structure(found.params) == jax.tree.structure(init)
    assert types(found.params) == types(init)
    assert found.residual.dtype == dtype and found.residual.shape == ()
    assert [x.dtype for x in (found.num_gradients, found.num_steps, found.status)] == [jnp.int32] * 3
    memory = solver.init_memory(init)
    assert jax.tree.structure(memory) == jax.tree.structure(found.memory)
    assert types(memory) == types(found.memory)


@EVERY
def test_jit_and_vmap_are_a_loop(name: str) -> None:
    """A lane that breaks says so, and leaves the others alone."""
    row, solver = SOLVERS[name], SOLVERS[name].make(1.0)
    broken = data(2) | {"pull": data(2)["pull"].at[3].set(jnp.nan)}
    lanes = jax.tree.map(lambda *xs: jnp.stack(xs), data(0), data(1), broken)
    together = jax.jit(jax.vmap(lambda given: solver.solve(loss_on(given), start())))(lanes)
    for index in (0, 1):
        alone, lane = solution(name, index), jax.tree.map(operator.itemgetter(index), together)
        # Batched sums round differently, which a line search may turn into another path to the same tolerance.
        assert relative_error(lane.params, alone.params) < max(1e-13, row.accuracy * row.to_tolerance)
        assert lane.status == alone.status
        assert lane.num_steps == alone.num_steps or row.stops or row.host
    assert together.status[2] == Status.NOT_FINITE


@EVERY
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_is_reported(name: str, value: float) -> None:
    solution(name)
    given = data() | {"pull": data()["pull"].at[0].set(value)}
    assert solve(SOLVERS[name].make(1.0), given, start()).status == Status.NOT_FINITE


@EVERY
def test_new_numbers_do_not_recompile(name: str) -> None:
    solution(name)
    before = len(TRACES)
    found = solve(SOLVERS[name].make(1.5), data(1), jax.tree.map(lambda x: x + 0.1, start()))
    assert len(TRACES) == before
    assert relative_error(flat(found.params), minimum(1)) < 1.5 * SOLVERS[name].accuracy


COUNT: list[int] = []


@having(counts=True)
def test_counted_gradients_are_the_executed_ones(name: str) -> None:
    def counted(params: Any) -> jax.Array:
        jax.debug.callback(lambda _: COUNT.append(1), params["layer"].bias)
        return loss_on(data())(params)

    COUNT.clear()
    found = jax.block_until_ready(jax.jit(lambda init: SOLVERS[name].make(1.0).solve(counted, init))(start()))
    jax.effects_barrier()
    assert found.num_gradients == len(COUNT)
    assert 0 < found.num_steps < found.num_gradients


# Where it stops.


@having(to_tolerance=True)
def test_a_spent_budget_is_reported(name: str) -> None:
    solver: Any = SOLVERS[name].make(1.0)
    found = solve(dataclasses.replace(solver, max_steps=2), data(), start())
    assert found.num_steps <= 3 and found.residual > 1e-9
    assert found.status == Status.FREE_NOT_CONVERGED


def test_a_black_box_that_misses_its_tolerance_is_reported() -> None:
    found = solve(cm.CallableSolver(lambda loss, init: init, tol=1e-9), data(), start())
    assert found.status == Status.FREE_NOT_CONVERGED
    assert solve(cm.CallableSolver(lambda loss, init: init), data(), start()).status == Status.CONVERGED


@having(stops=True)
def test_a_stop_overrides_the_settings_and_may_be_traced(name: str) -> None:
    solver = SOLVERS[name].make(1.0)
    loose = solve(solver, data(), start(), stop=cm.Stop(tol=jnp.asarray(1e-2), max_steps=jnp.asarray(50)))
    assert 1e-9 < loose.residual <= 1e-2 and loose.status == Status.CONVERGED
    before = len(TRACES)
    short = solve(solver, data(), start(), stop=cm.Stop(tol=jnp.asarray(1e-12), max_steps=jnp.asarray(2)))
    assert len(TRACES) == before
    assert short.status == Status.FREE_NOT_CONVERGED and short.num_steps <= 3


@having(stops=False)
def test_a_fixed_learner_takes_all_its_steps(name: str) -> None:
    found = solve(SOLVERS[name].make(1.0), data(), start(), stop=cm.Stop(tol=1e3, max_steps=1))
    np.testing.assert_array_equal(flat(found.params), flat(solution(name).params))


@having(stops=True, host=False)
def test_members_of_a_group_take_the_same_number_of_steps(name: str) -> None:
    """The one that has least to learn goes on until the others are done."""
    solver = SOLVERS[name].make(1.0)
    scales = jnp.array([0.0, 1e-3, 1.0])
    near = jax.tree.map(lambda x: x, solution(name).params)

    def run(scale: jax.Array, group: str | None) -> cm.Solution:
        given = data() | {"pull": data()["pull"] * (1 + scale)}
        return solver.solve(loss_on(given), near, stop=cm.Stop(tol=1e-8, group=group))

    alone = jax.jit(jax.vmap(lambda scale: run(scale, None)))(scales)
    together = jax.jit(jax.vmap(lambda scale: run(scale, "members"), axis_name="members"))(scales)
    assert alone.num_steps[0] == 0 < alone.num_steps[1] < alone.num_steps[2]
    assert list(together.num_steps) == [int(alone.num_steps[2])] * 3
    assert max(together.residual) <= 1e-8 and not np.any(together.status)


@pytest.mark.parametrize(("num_steps", "status"), [(5, Status.DIVERGED), (2000, Status.NOT_FINITE)])
def test_divergence_is_reported(num_steps: int, status: Status) -> None:
    """A step of three times the curvature's inverse doubles the parameters, until 2^1024 is infinite."""
    for settings in ({"num_steps": num_steps}, {"tol": 1e-9, "max_steps": num_steps}):
        solver = cm.OptaxDescent(optax.sgd(3.0), **settings)
        found = jax.jit(lambda init, solver=solver: solver.solve(lambda w: jnp.sum(w**2) / 2, init))(jnp.ones(2))
        assert found.status == status


# Going on.


@EVERY
def test_going_on_from_the_solution_stays_there(name: str) -> None:
    row, found = SOLVERS[name], solution(name)
    again = solve(row.make(1.0), data(), found.params, memory=found.memory)
    # Adam without its memory starts its schedule anew, and leaves the minimum before it comes back.
    assert relative_error(again.params, found.params) < max(row.accuracy, 1e-14)
    # On the host a step is an evaluation, and one is asked for at least.
    assert again.num_steps <= row.host or not row.to_tolerance
    assert types(again.memory) == types(found.memory)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        (lambda steps: cm.OptaxDescent(MOMENTUM, num_steps=steps, carry_state=True), 4),
        (lambda steps: cm.OptaxDescent(ADAM, num_steps=steps, carry_state=True), 4),
        (lambda steps: cm.OptaxDescent(ADAM, tol=1e-30, max_steps=steps, carry_state=True), 4),
        (lambda steps: cm.LBFGS(tol=1e-30, max_steps=steps), 3),
    ],
    ids=["momentum", "adam", "adam to a tolerance", "lbfgs"],
)
def test_a_learner_with_memory_goes_on_as_if_it_had_not_stopped(make: Any, steps: int) -> None:
    half = solve(make(steps), data(), start())
    whole = solve(make(2 * steps), data(), start())
    in_two = solve(make(steps), data(), half.params, memory=half.memory)
    assert relative_error(in_two.params, whole.params) < 1e-13
    # The memory matters: without it the path is another one.
    assert relative_error(solve(make(steps), data(), half.params).params, whole.params) > 1e-6


# What some can and others cannot.


@having(complex_capable=True)
def test_complex_learning_is_the_analytic_continuation(name: str) -> None:
    """Learning at pull + ih has dw/dpull as its imaginary part over h: the inverse Hessian's column."""
    solver, step = SOLVERS[name].make(1.0), 1e-8
    init = jax.tree.map(lambda x: x.astype(complex), start())
    solver.check_holomorphic(init)
    given = data() | {"pull": data()["pull"].astype(complex).at[0].add(1j * step)}
    found = solve(solver, given, init)
    hessian = np.asarray(data()["curvature"]) + 0.1 * np.diag(np.cosh(minimum()))
    np.testing.assert_allclose(np.real(flat(found.params)), minimum(), rtol=1e-7)
    # Of what a tolerance of 1e-9 leaves unlearned, much less is imaginary: it shrinks in the same proportion.
    column = np.linalg.inv(hessian)[:, 0]
    np.testing.assert_allclose(np.imag(flat(found.params)) / step, column, rtol=1e-6, atol=1e-6)


@having(complex_capable=False)
def test_learners_that_are_not_holomorphic_say_so(name: str) -> None:
    solver = SOLVERS[name].make(1.0)
    with pytest.raises(TypeError, match=type(solver).__name__):
        solver.check_holomorphic(jax.tree.map(lambda x: x.astype(complex), start()))


@having(unrollable=True)
def test_backprop_differentiates_the_steps(name: str) -> None:
    """d/dpull of the sum of the solution, against the inverse Hessian and against central differences."""

    @jax.jit
    @jax.grad
    def derivative(pull: jax.Array) -> jax.Array:
        problem = cm.BilevelProblem(
            lambda params, meta, task: loss_on(task | {"pull": meta})(params),
            lambda params, meta, task: jnp.sum(flat(params)),
            lambda meta, task: start(),
        )
        estimator = cm.BackpropThroughLearning(SOLVERS[name].make(1.0))
        return estimator.estimate(problem, pull, data()).outer_loss

    def learned(index: int, step: float) -> float:
        given = data() | {"pull": data()["pull"].at[index].add(step)}
        return float(jnp.sum(flat(solve(SOLVERS[name].make(1.0), given, start()).params)))

    got = np.asarray(derivative(data()["pull"]))
    differences = [(learned(index, 1e-5) - learned(index, -1e-5)) / 2e-5 for index in range(DIM)]
    np.testing.assert_allclose(got, differences, rtol=1e-7)


@having(unrollable=False)
def test_learners_that_cannot_be_unrolled_say_so(name: str) -> None:
    problem = cm.BilevelProblem(
        lambda params, meta, task: loss_on(task | {"pull": meta})(params),
        lambda params, meta, task: jnp.sum(flat(params)),
        lambda meta, task: start(),
    )
    solver = SOLVERS[name].make(1.0)
    with pytest.raises(TypeError, match=rf"{type(solver).__name__} cannot be differentiated in reverse.*num_steps="):
        cm.BackpropThroughLearning(solver).estimate(problem, data()["pull"], data())


def test_minibatches_are_followed_by_fixed_steps_alone() -> None:
    """Step k sees a pull of k alone, so the path is a recursion by hand."""

    def minibatch_loss(w: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.sum((w - step) ** 2) / 2

    def whole(w: jax.Array) -> jax.Array:
        return jnp.sum(w**2) / 2

    w = np.ones(3)
    for step in range(5):
        w = w - 0.25 * (w - step)
    found = cm.OptaxDescent(optax.sgd(0.25), num_steps=5).solve(whole, jnp.ones(3), minibatch_loss=minibatch_loss)
    np.testing.assert_allclose(found.params, w, rtol=1e-14)
    # The residual is that of the whole loss.
    assert float(found.residual) == pytest.approx(np.linalg.norm(w), rel=1e-14)
    for solver in (cm.LBFGS(), cm.ScipyMinimize()):
        assert np.all(abs(solver.solve(whole, jnp.ones(3), minibatch_loss=minibatch_loss).params) < 1e-6)
    with pytest.raises(ValueError, match=r"with minibatches.*Use `OptaxDescent\(optimizer, num_steps=...\)`"):
        cm.OptaxDescent(SGD, tol=1e-3).solve(whole, jnp.ones(3), minibatch_loss=minibatch_loss)


@pytest.mark.parametrize("dtype,exponents", [(jnp.float32, (-37, 37)), (jnp.float64, (-300, 300))])
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (5000,)], ids=str)
def test_residuals_of_any_size_are_norms(shape: Any, dtype: Any, exponents: tuple[int, int]) -> None:
    """Squares of most of these are 0 or infinite; the gradient of a linear loss is what it is multiplied with."""
    entries = np.random.default_rng(0).uniform(0.5, 1.0, shape)

    @jax.jit
    def residuals(pulls: jax.Array) -> jax.Array:
        solver = cm.OptaxDescent(optax.sgd(0.0), num_steps=1)
        losses = [lambda w, pull=pull: jnp.sum(pull * w) for pull in pulls]
        return jnp.stack([solver.solve(loss, jnp.zeros(shape, dtype)).residual for loss in losses])

    # Both sides of where one way to sum gives over to another, and far from there.
    sizes = 10.0 ** np.linspace(*exponents, 23)
    pulls = np.multiply.outer(sizes, entries).astype(dtype)
    expected = sizes * np.linalg.norm(entries)
    expected[expected > np.finfo(dtype).max] = np.inf
    np.testing.assert_allclose(residuals(pulls), expected, rtol=1e-6 if dtype == jnp.float32 else 1e-14)


def test_residuals_that_are_not_finite_stay_so() -> None:
    def residual(pull: list[float]) -> float:
        solver = cm.OptaxDescent(optax.sgd(0.0), num_steps=1)
        return float(solver.solve(lambda w: jnp.sum(jnp.asarray(pull) * w), jnp.zeros(2)).residual)

    assert residual([0.0, 0.0]) == 0.0
    assert np.isinf(residual([np.inf, 1.0]))
    assert np.isnan(residual([np.nan, 1.0])) and np.isnan(residual([np.nan, np.inf]))


# Settings.


@pytest.mark.parametrize("settings", [{}, {"num_steps": 3, "tol": 1e-3}], ids=["neither", "both"])
def test_there_is_one_stopping_rule(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"one stopping rule: `num_steps=`.*or `tol=`.*Got num_steps=") as caught:
        cm.OptaxDescent(SGD, **settings)
    assert all(f"{key}={settings.get(key)}" in str(caught.value) for key in ("num_steps", "tol"))


def test_settings_from_meta_parameters_need_them() -> None:
    solver = cm.OptaxDescent(lambda meta: optax.sgd(meta["rate"]), num_steps=60)
    with pytest.raises(TypeError, match=r"solver.bind\(meta_params\)"):
        solver.solve(loss_on(data()), start())
    bound = solver.bind({"rate": jnp.asarray(0.8)})
    assert bound.bind({"rate": jnp.asarray(0.1)}) is bound
    found = bound.solve(loss_on(data()), start())
    assert relative_error(flat(found.params), minimum()) < 1e-13
    # `one_update` is where the dependence on settings can be seen; the other solvers have none.
    rate = jax.grad(lambda rate: jnp.sum(solver.bind({"rate": rate}).one_update(jnp.ones(2))))(0.5)
    assert rate == -2.0
    assert all(SOLVERS[name].make(1.0).one_update(start()) == () for name in ("lbfgs", "scipy", "callable"))


# Loops: how often the loss is in the program, and what unrolling changes.


def copies(solve: Callable[[Callable[[Any], jax.Array]], Any]) -> int:
    """How often a solver calls the loss while it is traced."""
    calls = []

    def loss(params: Any) -> jax.Array:
        calls.append(1)
        return loss_on(data())(params)

    jax.make_jaxpr(lambda: solve(loss))()
    return len(calls)


@pytest.mark.parametrize("name", ["descent", "carried", "adam", "descent to a tolerance", "lbfgs"])
def test_the_loss_is_in_the_program_once(name: str) -> None:
    solver = SOLVERS[name].make(1.0)
    assert copies(lambda loss: solver.solve(loss, start())) == 1


def test_minibatches_need_a_copy_and_the_whole_loss_another() -> None:
    solver = cm.OptaxDescent(SGD, num_steps=5)
    assert copies(lambda loss: solver.solve(loss, start(), minibatch_loss=lambda params, _: loss(params))) == 2


def estimated_through(solver: cm.InnerSolver, **settings: Any) -> tuple[jax.Array, int]:
    """The meta-gradient of the sum of the solution in the pull by backprop, and how often the inner loss was traced."""
    calls = []

    def inner_loss(params: Any, meta: jax.Array, task: Any) -> jax.Array:
        calls.append(1)
        return loss_on(task | {"pull": meta})(params)

    problem = cm.BilevelProblem(inner_loss, lambda params, meta, task: jnp.sum(flat(params)), lambda *_: start())
    estimator = cm.BackpropThroughLearning(solver, **settings)
    result = jax.jit(lambda meta: estimator.estimate(problem, meta, data()))(data()["pull"])
    return result.grad, len(calls)


# Steps that one turn does not divide, those that it does, and all.
UNROLLED = pytest.mark.parametrize("unroll", [2, 4, 100, True])


@UNROLLED
def test_unrolled_steps_are_the_same_steps(unroll: int | bool) -> None:
    """Alone, side by side, with minibatches: compiled differently, so that the last digits may differ."""
    lanes = jax.tree.map(lambda *xs: jnp.stack(xs), data(0), data(1))

    def solutions(unroll: int | bool) -> list[cm.Solution]:
        solver = cm.OptaxDescent(MOMENTUM, num_steps=9, carry_state=True, unroll=unroll)

        def run(given: Any) -> cm.Solution:
            return solver.solve(loss_on(given), start())

        def on_minibatches(given: Any) -> cm.Solution:
            def minibatch_loss(params: Any, step: jax.Array) -> jax.Array:
                return loss_on(given)(params) * (1 + step) / 10

            return solver.solve(loss_on(given), start(), minibatch_loss=minibatch_loss)

        return [jax.jit(run)(data()), jax.jit(jax.vmap(run))(lanes), jax.jit(on_minibatches)(data())]

    for unrolled, scanned in zip(solutions(unroll), solutions(1), strict=True):
        assert types(unrolled) == types(scanned)
        for mine, its in zip(jax.tree.leaves(unrolled), jax.tree.leaves(scanned), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-12, atol=1e-15)


@UNROLLED
@pytest.mark.parametrize("settings", [{}, {"checkpoint": True}, {"truncate": 5}], ids=["all", "checkpoint", "truncate"])
def test_backprop_through_unrolled_steps(unroll: int | bool, settings: dict[str, Any]) -> None:
    scanned, calls = estimated_through(cm.OptaxDescent(MOMENTUM, num_steps=9), **settings)
    unrolled, calls_unrolled = estimated_through(cm.OptaxDescent(MOMENTUM, num_steps=9, unroll=unroll), **settings)
    np.testing.assert_allclose(unrolled, scanned, rtol=1e-12)
    assert calls_unrolled == calls


def test_unrolled_programs_have_no_loop() -> None:
    def text(unroll: int | bool) -> str:
        solver = cm.OptaxDescent(SGD, num_steps=9, unroll=unroll)
        return str(jax.jit(lambda init: solver.solve(loss_on(data()), init)).lower(start()).compile().as_text())

    assert " while(" in text(1) and " while(" in text(False) and " while(" in text(2)
    assert " while(" not in text(True)


@pytest.mark.parametrize("unroll", [0, -1, 2.0, None, "all"])
def test_unroll_is_a_number_of_steps(unroll: Any) -> None:
    with pytest.raises(ValueError, match=r"`unroll` is how many steps.*positive integer, or True.*Got " + repr(unroll)):
        cm.OptaxDescent(SGD, num_steps=3, unroll=unroll)


@pytest.mark.parametrize("unroll", [2, True])
def test_a_run_to_a_tolerance_cannot_be_unrolled(unroll: int | bool) -> None:
    with pytest.raises(ValueError, match=rf"a fixed number of steps alone.*Got unroll={unroll}: use `num_steps=`"):
        cm.OptaxDescent(SGD, tol=1e-3, unroll=unroll)
    assert cm.OptaxDescent(SGD, tol=1e-3, unroll=False) == cm.OptaxDescent(SGD, tol=1e-3, unroll=False)


def rosenbrock(w: jax.Array) -> jax.Array:
    return jnp.sum(100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2)


def steep(w: jax.Array) -> jax.Array:
    """Unit steps are much too long."""
    return jnp.sum(jnp.exp(3 * w)) - 1e3 * jnp.sum(w)


def linear(w: jax.Array) -> jax.Array:
    """No step is long enough: every search takes all its trials."""
    return jnp.sum(w)


def beyond_the_domain(w: jax.Array) -> jax.Array:
    return jnp.sum(w**2) - 20 * jnp.sum(jnp.log(1 - w))


@pytest.mark.parametrize("loss", [rosenbrock, steep, linear, beyond_the_domain])
def test_lbfgs_takes_the_steps_of_optax(loss: Callable[[jax.Array], jax.Array]) -> None:
    """For as long as rounding does not tell the two apart, which Rosenbrock's valley amplifies."""
    optimizer, steps, init = optax.lbfgs(memory_size=4), 6, jnp.linspace(-1.2, -0.4, 6)

    @jax.jit
    def by_optax(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        value_and_grad, state, trials = optax.value_and_grad_from_state(loss), optimizer.init(w), jnp.int32(1)
        for _ in range(steps):
            value, grad = value_and_grad(w, state=state)
            updates, state = optimizer.update(grad, state, w, value=value, grad=grad, value_fn=loss)
            w, trials = optax.apply_updates(w, updates), trials + state[-1].info.num_linesearch_steps.astype(jnp.int32)
        return w, trials

    expected, trials = by_optax(init)
    found = jax.jit(cm.LBFGS(tol=1e-14, max_steps=steps, memory_size=4).solve, static_argnums=0)(loss, init)
    assert found.num_steps == steps and found.num_gradients == trials
    np.testing.assert_allclose(found.params, expected, rtol=1e-10)


# Trees: a bilevel problem on vectors, put into trees of every kind. Three parameters and three meta-parameters.


def inner_loss(w: jax.Array, theta: jax.Array, task: jax.Array) -> jax.Array:
    return jnp.sum((w - task) ** 2 + jnp.exp(theta) * w**2 + 0.1 * jnp.cosh(w) * jnp.roll(w, 1)) / 2


def outer_loss(w: jax.Array, theta: jax.Array, task: jax.Array) -> jax.Array:
    return jnp.sum((w - 1.0) ** 2) / 2 + jnp.sum(w * theta) / 5


@functools.partial(jax.tree_util.register_dataclass, data_fields=["first", "rest"], meta_fields=["name"])
@dataclasses.dataclass
class Registered:
    first: Any
    rest: Any
    name: str


# Each builds a tree whose leaves, one after another, are the vector.
Tree = Callable[[jax.Array], Any]
TREES: dict[str, Tree] = {
    "vector": lambda x: x,
    "scalars": lambda x: [x[0], x[1], x[2]],
    "named tuples and dictionaries": lambda x: Layer({"a": x[:1].reshape(1, 1, 1), "b": {"c": x[1]}}, (x[2:],)),
    "empty branches": lambda x: ((), None, {"x": (x[:2], [x[2]]), "y": {}}, jnp.zeros((0, 3), x.dtype)),
    "dataclasses": lambda x: Registered(x[0], {"rest": Registered(x[1:], None, "inside")}, "outside"),
}
LEARNER = cm.OptaxDescent(optax.sgd(0.4), num_steps=60)
ESTIMATORS: dict[str, cm.MetaGradientEstimator] = {
    "contrastive": cm.Contrastive(LEARNER, scheme=cm.central_difference(1e-3)),
    "dense implicit": cm.ImplicitDifferentiation(LEARNER, cm.DenseInverse()),
    "finite difference": cm.FiniteDifference(LEARNER),
}
EACH = pytest.mark.parametrize("name", ESTIMATORS)
THETA, TASK = jnp.array([0.2, -0.3, 0.1]), jnp.array([1.0, -2.0, 3.0])


# Which tree params, meta_params and task are put into.
MIXES: dict[str, tuple[str, str, str]] = {
    "vectors": ("vector", "vector", "vector"),
    "one mix": ("named tuples and dictionaries", "dataclasses", "empty branches"),
    "another": ("scalars", "empty branches", "dataclasses"),
}


def problem_over(params: Tree) -> cm.BilevelProblem:
    def unpacked(loss: Any) -> Any:
        return lambda *trees: loss(*map(flat, trees))

    return cm.BilevelProblem(unpacked(inner_loss), unpacked(outer_loss), lambda meta, task: params(jnp.zeros(3)))


@functools.cache
def in_trees(name: str, mix: str) -> cm.MetaGradient:
    params, meta, task = (TREES[tree] for tree in MIXES[mix])
    return ESTIMATORS[name].estimate(problem_over(params), meta(THETA), task(TASK))


@EACH
@pytest.mark.parametrize("mix", [mix for mix in MIXES if mix != "vectors"])
def test_trees_change_nothing(name: str, mix: str) -> None:
    result, expected = in_trees(name, mix), in_trees(name, "vectors")
    params, meta, _ = (TREES[tree] for tree in MIXES[mix])
    for got, like in ((result.grad, meta(THETA)), (result.params, params(TASK))):
        assert jax.tree.structure(got) == jax.tree.structure(like) and types(got) == types(like)
    # Differences of steps of 1e-3 and 6e-6 divide rounding by those.
    assert relative_error(flat(result.grad), expected.grad) < (1e-9 if name == "finite difference" else 1e-11)
    np.testing.assert_allclose(flat(result.params), expected.params, rtol=1e-13)
    assert result.diagnostics.num_gradients == expected.diagnostics.num_gradients


def test_vectors_have_the_right_answer_to_begin_with() -> None:
    exact = problems.exact_meta_gradient(problem_over(TREES["vector"]), THETA, TASK)
    assert exact.converged
    for name in ESTIMATORS:
        # The central scheme's bias: beta^2 times a third derivative, 1e-6 or so.
        assert relative_error(in_trees(name, "vectors").grad, exact.grad) < (1e-5 if name == "contrastive" else 1e-8)


@EACH
def test_scalars_and_pythons_own_numbers(name: str) -> None:
    """L_in = (w - 4)^2 / 2 + e^theta w^2 / 2 has w = 4 / (1 + e^theta)."""
    problem = cm.BilevelProblem(
        lambda w, theta, task: ((w - task) ** 2 + jnp.exp(theta) * w**2) / 2,
        lambda w, theta, task: (w - 1.0) ** 2 / 2 + theta,
        lambda theta, task: 0.0,
    )
    state = ESTIMATORS[name].init_state(problem, 0.25, 4.0)
    result = ESTIMATORS[name].estimate(problem, 0.25, 4.0, state=state)
    # No weak type is left that the next call would have to be compiled for.
    kinds = [[(x.dtype, x.weak_type) for x in jax.tree.leaves(each)] for each in (state, result.state)]
    assert kinds[0] == kinds[1]
    a = np.exp(0.25)
    w = 4 / (1 + a)
    assert result.grad.shape == result.params.shape == () and result.grad.dtype == jnp.float64
    assert float(result.grad) == pytest.approx(1 - (w - 1) * a * w / (1 + a), rel=1e-5)
    assert float(result.params) == pytest.approx(w, rel=1e-14)


# Trees whose leaves differ in precision.

MIXED: dict[str, tuple[Any, Any]] = {
    "float32 params": (jnp.float32, (jnp.float64, jnp.float64)),
    "float32 meta_params": (jnp.float64, (jnp.float32, jnp.float32)),
    "some float32 meta_params": (jnp.float64, (jnp.float32, jnp.float64)),
}
OF_EACH_KIND: dict[str, cm.MetaGradientEstimator] = ESTIMATORS | {
    "lbfgs": cm.Contrastive(cm.LBFGS(tol=1e-4)),
    "complex step": cm.Contrastive(LEARNER, scheme=cm.complex_step(1e-4)),
    "conjugate gradient": cm.ImplicitDifferentiation(LEARNER),
    "backprop": cm.BackpropThroughLearning(LEARNER),
    "forward mode": cm.BackpropThroughLearning(LEARNER, forward_mode=True),
    "fomaml": cm.FirstOrder(LEARNER),
    "reptile": cm.Reptile(LEARNER),
    "evolution strategies": cm.EvolutionStrategies(LEARNER),
}


def mixed(case: str) -> tuple[cm.BilevelProblem, Any]:
    of_params, of_meta = MIXED[case]
    problem = cm.BilevelProblem(
        lambda w, meta, task: inner_loss(w, jnp.concatenate([meta["a"], meta["b"]]), task),
        lambda w, meta, task: outer_loss(w, jnp.concatenate([meta["a"], meta["b"]]), task),
        lambda meta, task: jnp.concatenate([meta["a"], meta["b"]]).astype(of_params),
    )
    return problem, {"a": THETA[:1].astype(of_meta[0]), "b": THETA[1:].astype(of_meta[1])}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_leaves_of_different_precision_keep_it(name: str, case: str) -> None:
    problem, meta = mixed(case)
    result = jax.eval_shape(lambda: OF_EACH_KIND[name].estimate(problem, meta, TASK))
    assert types(result.grad) == types(meta)
    assert result.params.dtype == result.state.params.dtype == MIXED[case][0]


@pytest.mark.parametrize("name", ["contrastive", "dense implicit"])
def test_numbers_of_different_precision(name: str) -> None:
    problem, meta = mixed("float32 params")
    result = ESTIMATORS[name].estimate(problem, meta, TASK)
    exact = problems.exact_meta_gradient(problem_over(TREES["vector"]), THETA, TASK).grad
    # float32 params are stationary to 1e-7, which a nudge of 1e-3 makes 1e-4.
    assert relative_error(flat(result.grad), exact) < (1e-3 if name == "contrastive" else 1e-5)
