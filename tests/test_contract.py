"""One table of estimators, one contract: what every estimator promises, whatever it computes and however."""

import dataclasses
import functools
import math
import os
import warnings
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
from tests.oracles import ALONE, cast, cosine, relative_error

# The problem that all are held to. Every kind of branch in every tree; not quadratic, so that a bias in beta shows; the
# start, the inner loss and the outer loss all depend on all meta-parameters but one each, so nobody is blind to any.


class Layer(NamedTuple):
    weight: Any
    bias: Any


class Data(NamedTuple):
    offset: Any
    target: Any


TRACES: list[str] = []
# Set by `.ci/run`, beside JAX's own variables for its strict switches: nothing may be moved to the device in a call.
GUARDED = os.environ.get("CONTRACT_WITHOUT_TRANSFERS") == "1"


def flat(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]


def inner_loss(params: Any, meta: Any, task: Any) -> Any:
    TRACES.append("inner")
    w = flat(params)
    curved = jnp.sum(w * (task["curvature"] @ w)) / 2 + 0.05 * jnp.sum(jnp.cosh(w))
    driven = jnp.sum(w * (task["data"].offset + task["coupling"] @ meta["drive"]))
    pulled = jnp.exp(meta["log_strength"]) * jnp.sum((w - flat(meta["anchor"])) ** 2) / 2
    return curved - driven + pulled, "inner"


def outer_loss(params: Any, meta: Any, task: Any) -> Any:
    w, drive = flat(params), meta["drive"]
    missed = jnp.sum((w - task["data"].target) ** 2) / 2
    return missed + 0.3 * jnp.sum(w * (task["coupling"] @ drive)) + jnp.sum(drive**2) / 2, {"at": w, "none": None}


def init_params(meta: Any, task: Any) -> Any:
    shift = 0.1 * meta["log_strength"] + 0.2 * jnp.sum(meta["drive"])
    return jax.tree.map(lambda anchor: anchor + shift, meta["anchor"])


PROBLEM = cm.BilevelProblem(inner_loss, outer_loss, init_params, has_aux=True)
# Curvatures between 0.6 + 0.05 + 0.2 and 1.2 + 0.1 + 0.2: a step of 0.85 shrinks what is left to learn by 0.3 or less,
# so that 30 steps end at the minimum, to the last digit.
RATE, STEP, NUM_STEPS = 0.3, 0.85, 30
SGD = cm.OptaxDescent(optax.sgd(STEP), num_steps=NUM_STEPS)
HEAVY_BALL = optax.sgd(STEP, momentum=0.1)
MOMENTUM = cm.OptaxDescent(HEAVY_BALL, num_steps=NUM_STEPS)
ADAM = cm.OptaxDescent(optax.adam(optax.cosine_decay_schedule(0.1, 200)), num_steps=200)
DIM, NUM_META = 5, 8


def normals(seed: int, dtype: Any) -> Callable[..., jax.Array]:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(0.5 * rng.normal(size=shape), dtype)

    return draw


@functools.cache
def meta_params(seed: int = 0, dtype: Any = jnp.float64) -> Any:
    draw = normals(seed, dtype)
    return {
        "anchor": {"layer": Layer(draw(2, 2), draw()), "nothing": None, "empty": ((), {})},
        "log_strength": jnp.asarray(math.log(0.2) + 0.02 * seed, dtype),
        "drive": draw(2),
        "none": None,
        "empty": {},
    }


@functools.cache
def task(seed: int = 0, dtype: Any = jnp.float64) -> Any:
    draw = normals(100 + seed, dtype)
    basis = np.linalg.qr(draw(DIM, DIM))[0]
    return {
        "curvature": jnp.asarray((basis * np.linspace(0.6, 1.2, DIM)) @ basis.T, dtype),
        "coupling": draw(DIM, 2),
        "data": Data(draw(DIM), draw(DIM)),
        "labels": jnp.arange(3),
        "key": jax.random.key(seed),
        "none": None,
        "empty": ((), {}),
    }


# A second, tiny one: each meta-parameter has one way in, and the last has none.


def init_of_start(meta: Any, data: Any) -> Any:
    return meta["start"] * data


def inner_of_seen(params: Any, meta: Any, data: Any) -> Any:
    return jnp.sum((params - data) ** 2 + jnp.exp(meta["decay"]) * params**2) / 2


def outer_of_judge(params: Any, meta: Any, data: Any) -> Any:
    return jnp.sum((params - 1.0) ** 2 * meta["judge"]) / 2 + 0.0 * jnp.sum(params)


PARTLY = cm.BilevelProblem(inner_of_seen, outer_of_judge, init_of_start)
PARTLY_META = {name: jnp.asarray(0.3 + 0.1 * k) for k, name in enumerate(("decay", "judge", "start", "rate", "idle"))}
PARTLY_TASK = jnp.array([2.0, -3.0])


# What an estimator ought to return: the meta-gradient, or the closed form of what it takes for it.

Gradients = Callable[[Any, Any], Any]


@functools.cache
def solved(meta_seed: int, task_seed: int) -> Any:
    return problems.exact_meta_gradient(PROBLEM, meta_params(meta_seed), task(task_seed))


def exactly(meta_seed: int, task_seed: int) -> Any:
    """dPhi/dtheta."""
    exact = solved(meta_seed, task_seed)
    assert exact.converged
    return exact.grad


def _at_solution(meta_seed: int, task_seed: int) -> tuple[Any, Any, Any, Any]:
    """params, v, the direct term, and the function `u -> cross derivative of the inner loss times u`."""
    meta, data, params = meta_params(meta_seed), task(task_seed), solved(meta_seed, task_seed).params
    v, direct = jax.grad(PROBLEM.outer, argnums=(0, 1))(params, meta, data)
    _, cross = jax.vjp(lambda theta: jax.grad(PROBLEM.inner)(params, theta, data), meta)
    return params, v, direct, cross


def t1_t2(meta_seed: int, task_seed: int) -> Any:
    """T1-T2, direct - scale * cross v: H^-1 taken to be `scale`."""
    _, v, direct, cross = _at_solution(meta_seed, task_seed)
    return jax.tree.map(lambda d, c: d - 0.9 * c, direct, cross(v)[0])


def fomaml(meta_seed: int, task_seed: int) -> Any:
    """FOMAML, direct + (dinit/dtheta)' v: dphi/dinit taken to be the identity."""
    _, v, direct, _ = _at_solution(meta_seed, task_seed)
    _, init_vjp = jax.vjp(lambda theta: init_params(theta, task(task_seed)), meta_params(meta_seed))
    return jax.tree.map(jnp.add, direct, init_vjp(v)[0])


def reptile(meta_seed: int, task_seed: int) -> Any:
    """Reptile, scale (dinit/dtheta)' (init - solution)."""
    params = solved(meta_seed, task_seed).params
    init, init_vjp = jax.vjp(lambda theta: init_params(theta, task(task_seed)), meta_params(meta_seed))
    return init_vjp(jax.tree.map(lambda a, b: 0.5 * (a - b), init, params))[0]


class Row(NamedTuple):
    """An estimator and what it promises.

    Attributes:
      make: `x -> estimator`, with x in every number that may change without recompiling; x = 1 is the one tested.
      accuracy: relative error in float64 to `expected`, with a margin of about ten.
      rounding: relative agreement of two computations that round differently: eps over the strength of the nudge.
      expected: what it estimates.
      status: in float64.
    """

    make: Callable[[float], cm.MetaGradientEstimator]
    accuracy: float
    rounding: float
    expected: Gradients = exactly
    status: Status = Status.CONVERGED


def contrastive(
    scheme: Callable[[float], Any], solver: Any = SGD, nudged_solver: Any = ALONE, **options: Any
) -> Callable[[float], Any]:
    return lambda x: cm.Contrastive(solver, nudged_solver, scheme(x), **options)


def implicit(inverse: Callable[[float], Any]) -> Callable[[float], Any]:
    return lambda x: cm.ImplicitDifferentiation(SGD, inverse(x))


# The bias of a scheme of order p is about displacement^p; rounding is about 1e-16 / displacement.
ESTIMATORS: dict[str, Row] = {
    "default": Row(lambda x: cm.Contrastive(SGD), 1e-9, 1e-9),
    "relative forward": Row(contrastive(lambda x: cm.relative(cm.forward_difference, 1e-8 * x)), 1e-7, 1e-7),
    "relative second order": Row(contrastive(lambda x: cm.relative(cm.second_order_forward, 1e-5 * x)), 1e-9, 1e-9),
    "relative four-point": Row(contrastive(lambda x: cm.relative(cm.four_point, 1e-3 * x)), 2e-11, 1e-12),
    "relative circle": Row(contrastive(lambda x: cm.relative(cm.circle, 1e-2 * x), MOMENTUM), 1e-13, 1e-13),
    "relative complex step": Row(contrastive(lambda x: cm.relative(cm.complex_step), MOMENTUM), 1e-14, 1e-14),
    "forward unmatched": Row(contrastive(lambda x: cm.forward_difference(-1e-6 * x, matched=False)), 1e-5, 1e-8),
    "central": Row(contrastive(lambda x: cm.central_difference(1e-3 * x), SGD, None), 1e-5, 1e-11),
    "linear nudge": Row(contrastive(lambda x: cm.central_difference(1e-3 * x), nudge=cm.LinearNudge()), 1e-7, 1e-11),
    "sequential": Row(contrastive(lambda x: cm.central_difference(1e-3 * x), sequential=True), 1e-5, 1e-11),
    # Adam, which no complex phase can run, leaves 1e-4 or so; the nudged phase learns on, and takes the base along.
    "nudged solver": Row(contrastive(lambda x: cm.complex_step(1e-9 * x), ADAM, MOMENTUM), 1e-13, 1e-13),
    "lbfgs": Row(
        lambda x: cm.Contrastive(cm.LBFGS(tol=1e-12 * x, max_steps=int(50 * x), memory_size=5), nudged_tol=1e-9 * x),
        # Iterations to a tolerance end where rounding sends them: within the tolerance of the nudge.
        1e-8,
        1e-8,
    ),
    "to a tolerance": Row(
        lambda x: cm.Contrastive(
            cm.OptaxDescent(HEAVY_BALL, tol=1e-12 * x, max_steps=int(200 * x), carry_state=True),
            scheme=cm.central_difference(1e-3 * x),
        ),
        1e-5,
        1e-9,
    ),
    # Steps to a tolerance, none of whose entries the box holds: the walls must cost nothing.
    "proximal descent": Row(
        lambda x: cm.Contrastive(cm.ProximalDescent(cm.prox.box(-9.0, 9.0 * x), tol=1e-12 * x, max_steps=int(500 * x))),
        1e-8,
        1e-8,
    ),
    "conjugate gradient": Row(implicit(lambda x: cm.ConjugateGradient(1e-12 * x, int(50 * x), 1e-13)), 1e-12, 1e-12),
    "neumann": Row(implicit(lambda x: cm.NeumannSeries(STEP, int(30 * x))), 1e-13, 1e-13),
    "nystrom": Row(implicit(lambda x: cm.Nystrom(DIM, 1e-12 * x)), 1e-11, 1e-12),
    "dense": Row(implicit(lambda x: cm.DenseInverse(1e-14 * x)), 1e-13, 1e-13),
    "t1-t2": Row(implicit(lambda x: cm.IdentityHessian(0.9)), 1e-13, 1e-13, t1_t2, Status.APPROXIMATE),
    "backprop": Row(lambda x: cm.BackpropThroughLearning(SGD), 1e-13, 1e-13),
    "backprop truncated": Row(
        # The derivative lacks the terms beyond the last 15 steps.
        lambda x: cm.BackpropThroughLearning(SGD, truncate=15), RATE**15, 1e-13, status=Status.APPROXIMATE
    ),
    "backprop checkpointed": Row(lambda x: cm.BackpropThroughLearning(MOMENTUM, checkpoint=True), 1e-13, 1e-13),
    "forward mode": Row(lambda x: cm.BackpropThroughLearning(SGD, forward_mode=True), 1e-13, 1e-13),
    "fomaml": Row(lambda x: cm.FirstOrder(SGD), 1e-13, 1e-13, fomaml, Status.APPROXIMATE),
    "reptile": Row(lambda x: cm.Reptile(SGD, scale=0.5), 1e-13, 1e-13, reptile, Status.APPROXIMATE),
    "evolution strategies": Row(
        # The standard error of the mean of e e'g over 2000 pairs is sqrt((8 + 1) / 2000) = 0.067; four of them.
        lambda x: cm.EvolutionStrategies(SGD, sigma=1e-3 * x, num_pairs=2000, batch_size=500),
        0.27,
        1e-11,
        status=Status.APPROXIMATE,
    ),
    "finite difference": Row(lambda x: cm.FiniteDifference(SGD, step=1e-5 * x, batch_size=3), 1e-9, 1e-9),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", ESTIMATORS)


def estimator(name: str, x: float = 1.0) -> cm.MetaGradientEstimator:
    return ESTIMATORS[name].make(x)


@functools.cache
def start(name: str) -> cm.EstimatorState:
    return estimator(name).init_state(PROBLEM, meta_params(), task())


@functools.cache
def estimate(name: str, task_seed: int = 0) -> cm.MetaGradient:
    """The plain call, compiled once for each estimator: most of the contract looks at its result."""
    arguments = meta_params(), task(task_seed), start(name)

    def call(meta: Any, data: Any, state: Any) -> cm.MetaGradient:
        return estimator(name).estimate(PROBLEM, meta, data, state=state)

    if not GUARDED:
        return call(*arguments)
    # Guarded is what runs, not the making of arguments; the estimator's numbers are constants of the program.
    compiled = jax.jit(call)
    with jax.transfer_guard("disallow"):
        return jax.block_until_ready(compiled(*arguments))


def types(tree: Any) -> Any:
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x), getattr(x, "weak_type", False)), tree)


def assert_like(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert types(got) == types(expected)


# The numbers.


@EVERY
def test_the_gradient_is_what_the_estimator_promises(name: str) -> None:
    row, result = ESTIMATORS[name], estimate(name)
    assert relative_error(result.grad, row.expected(0, 0)) < row.accuracy
    assert result.diagnostics.status == row.status, Status(int(result.diagnostics.status)).name
    if row.expected is exactly:
        # No component is right by being small, and none has the wrong sign.
        assert cosine(result.grad, exactly(0, 0)) > 0.95
        assert abs(float(result.outer_loss) - float(solved(0, 0).outer_loss)) < 1e-9


def test_the_biased_ones_are_not_right_by_accident() -> None:
    """Their closed forms are far from the meta-gradient here, so that passing the test above means something."""
    assert all(relative_error(form(0, 0), exactly(0, 0)) > 0.05 for form in (t1_t2, fomaml, reptile))


@EVERY
def test_what_comes_beside_the_gradient(name: str) -> None:
    result = estimate(name)
    np.testing.assert_allclose(flat(result.params), flat(solved(0, 0).params), rtol=1e-9)
    np.testing.assert_array_equal(result.aux["at"], flat(result.params))
    assert result.aux["none"] is None and result.unseen == ()
    # At float64's floor, or at the tolerance asked for.
    assert 0 <= result.diagnostics.free_residual < 1e-11
    assert result.diagnostics.num_gradients > 0
    np.testing.assert_array_equal(flat(result.state.params), flat(result.params))


def test_evolution_strategies_know_their_error() -> None:
    result = estimate("evolution strategies")
    actual = relative_error(result.grad, exactly(0, 0))
    predicted = math.sqrt((NUM_META + 1) / 2000)  # E |e e'g - g|^2 = (n + 1) |g|^2 for e ~ N(0, I)
    assert float(result.diagnostics.error_estimate) == pytest.approx(predicted, rel=0.3)
    assert actual < 4 * float(result.diagnostics.error_estimate)


# Structure and dtypes.


@EVERY
def test_structure_shapes_and_dtypes(name: str) -> None:
    result = estimate(name)
    assert_like(result.grad, meta_params())
    assert_like(result.params, init_params(meta_params(), task()))
    assert_like(result.state, start(name))
    assert_like(result.diagnostics, estimate("default").diagnostics)


@EVERY
def test_float32_in_float32_out(name: str) -> None:
    """Also where float64 is switched on: nothing is promoted on the way. Traced only; the numbers are tested below."""
    meta, data = meta_params(0, jnp.float32), task(0, jnp.float32)
    result, state = traced(name, once=False)
    assert_like(result.grad, meta)
    assert_like(result.params, init_params(meta, data))
    assert_like(result.state, state)
    assert result.outer_loss.dtype == jnp.float32
    assert {str(x.dtype) for x in result.diagnostics} == {"float32", "int32"}
    # The solver's memory is optax's: its L-BFGS keeps some scalars in float64.
    assert {str(x.dtype) for x in jax.tree.leaves(result.state._replace(memory=()))} == {"float32"}


@functools.cache
def traced(name: str, once: bool) -> tuple[cm.MetaGradient, cm.EstimatorState]:
    """Shapes and dtypes of an estimate in float32; once: of an inner loss that has no second derivative."""
    meta, data, problem = meta_params(0, jnp.float32), task(0, jnp.float32), ONCE if once else PROBLEM
    state = estimator(name).init_state(problem, meta, data)
    return jax.eval_shape(lambda: estimator(name).estimate(problem, meta, data, state=state)), state


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        # Central at its best strength: eps^(2/3) = 2e-5, times the conditioning; nothing subtracted: rounding alone.
        ("default", 1e-3),
        ("relative complex step", 1e-5),
        ("conjugate gradient", 1e-5),
    ],
)
def test_float32_numbers(name: str, accuracy: float) -> None:
    meta, data = meta_params(0, jnp.float32), task(0, jnp.float32)
    result = estimator(name).estimate(PROBLEM, meta, data)
    exact = problems.exact_meta_gradient(PROBLEM, cast(meta, jnp.float64), cast(data, jnp.float64))
    assert relative_error(result.grad, exact.grad) < accuracy
    assert result.diagnostics.status == Status.CONVERGED, Status(int(result.diagnostics.status)).name


# Transformations.


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, None, 0, None))
def in_batch(chosen: cm.MetaGradientEstimator, meta: Any, data: Any, state: Any) -> Any:
    """Under jit, vmap and grad at once: the result, and its derivative through the outer loss."""

    def with_result(theta: Any) -> Any:
        result = chosen.estimate(PROBLEM, theta, data, state=state)
        return result.outer_loss, result

    of_outer_loss, result = jax.grad(with_result, has_aux=True)(meta)
    return result, of_outer_loss


def broken_task() -> Any:
    return task(2) | {"data": Data(task(2)["data"].offset.at[0].set(jnp.nan), task(2)["data"].target)}


@functools.cache
def batch(name: str) -> Any:
    tasks = jax.tree.map(lambda *xs: jnp.stack(xs), task(0), task(1), broken_task())
    return in_batch(estimator(name), meta_params(), tasks, start(name))


def lane(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


@EVERY
def test_jit_and_vmap_are_a_loop_of_plain_calls(name: str) -> None:
    """Batched sums are taken in another order, and a contrast divides the rounding of that by its strength."""
    result = batch(name)[0]
    for index in (0, 1):
        alone, together = estimate(name, index), lane(result, index)
        assert relative_error(together.grad, alone.grad) < ESTIMATORS[name].rounding
        assert relative_error(together.params, alone.params) < 1e-11
        assert float(together.outer_loss) == pytest.approx(float(alone.outer_loss), rel=1e-11)
        assert together.diagnostics.status == alone.diagnostics.status
    # A task that breaks says so, and breaks no other.
    assert list(result.diagnostics.status == Status.NOT_FINITE) == [False, False, True]


@EVERY
def test_the_outer_loss_has_the_estimate_as_derivative(name: str) -> None:
    result, of_outer_loss = batch(name)
    for index in (0, 1):
        np.testing.assert_array_equal(flat(lane(of_outer_loss, index)), flat(lane(result.grad, index)))


def test_grad_of_the_outer_loss_as_users_write_it() -> None:
    def loss(meta: Any) -> jax.Array:
        return 3 * estimator("central").estimate(PROBLEM, meta, task(), state=start("central")).outer_loss

    got = jax.jit(jax.grad(loss))(meta_params())
    assert relative_error(got, jax.tree.map(lambda x: 3 * x, exactly(0, 0))) < ESTIMATORS["central"].accuracy


@pytest.mark.parametrize("name", ["to a tolerance", "conjugate gradient"])
def test_scan_over_meta_steps_carries_the_state(name: str) -> None:
    def step(carry: Any, data: Any) -> Any:
        meta, state = carry
        result = estimator(name).estimate(PROBLEM, meta, data, state=state)
        meta = jax.tree.map(lambda x, g: x - 0.1 * g, meta, result.grad)
        return (meta, result.state), result.outer_loss

    tasks = [task(0), task(1), task(0)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *tasks)
    (scanned, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, stacked))((meta_params(), start(name)))
    looped, expected = (meta_params(), start(name)), []
    for data in tasks:
        looped, loss = step(looped, data)
        expected.append(float(loss))
    assert relative_error(scanned, looped[0]) < ESTIMATORS[name].rounding
    np.testing.assert_allclose(losses, expected, rtol=1e-8)
    assert expected[2] < expected[0], "two steps against the gradient lower the outer loss"


@EVERY
def test_a_warm_start_does_not_change_the_answer(name: str) -> None:
    """It costs no compilation either: the state has one type from `init_state` on."""
    first, before = estimate(name), len(TRACES)
    again = estimator(name).estimate(PROBLEM, meta_params(1), task(1), state=first.state)
    assert len(TRACES) == before
    row = ESTIMATORS[name]
    assert relative_error(again.grad, row.expected(1, 1)) < row.accuracy
    assert again.diagnostics.status == row.status


FEW_STEPS = cm.OptaxDescent(optax.sgd(0.2), num_steps=3)


def test_the_state_of_another_solver_is_a_start() -> None:
    """Its memory is of no use; its solution is."""
    taker = cm.ImplicitDifferentiation(cm.OptaxDescent(HEAVY_BALL, tol=1e-10, carry_state=True))
    result = taker.estimate(PROBLEM, meta_params(), task(), state=estimate("lbfgs").state)
    assert relative_error(result.grad, exactly(0, 0)) < 1e-9
    # There is nothing left to learn from there.
    np.testing.assert_array_equal(flat(result.params), flat(estimate("lbfgs").params))


EAGER: dict[str, cm.MetaGradientEstimator] = {
    "sequential": cm.Contrastive(
        cm.OptaxDescent(optax.sgd(0.2), tol=0.3), scheme=cm.central_difference(0.05), nudged_tol=0.1, sequential=True
    ),
    "implicit": cm.ImplicitDifferentiation(FEW_STEPS, cm.ConjugateGradient(max_steps=2)),
    "backprop": cm.BackpropThroughLearning(FEW_STEPS, truncate=2),
    "fomaml": cm.FirstOrder(FEW_STEPS),
}


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.filterwarnings("ignore:.*cannot see the meta-parameters")
def test_jit_is_eager(name: str) -> None:
    """With jit disabled numbers are concrete where jit has tracers. A tiny problem: every loop is then Python's."""
    compiled = EAGER[name].estimate(PARTLY, PARTLY_META, PARTLY_TASK)
    with jax.disable_jit():
        eager = EAGER[name].estimate(PARTLY, PARTLY_META, PARTLY_TASK)
    # Strengths are 1e-3 and more, and rounding counts by 1e-16 over them.
    assert relative_error(eager.grad, compiled.grad) < 1e-10
    assert eager.diagnostics.status == compiled.diagnostics.status
    # This problem is solved to rounding, where one pass more or less hangs on the last bit of a residual.
    np.testing.assert_allclose(eager.diagnostics.num_gradients, compiled.diagnostics.num_gradients, rtol=0.2)
    assert_like(eager.grad, compiled.grad)


# Compilation.


@EVERY
def test_new_numbers_do_not_recompile(name: str) -> None:
    """A new strength, tolerance or scale, new data and new meta-parameters: the losses are not traced again."""
    estimate(name)
    before = len(TRACES)
    result = estimator(name, 1.1).estimate(PROBLEM, meta_params(1), task(1), state=start(name))
    assert len(TRACES) == before, "traced again"
    # And the new numbers were used, not the old ones. A bias grows with the strength, at most as its fourth power.
    row = ESTIMATORS[name]
    assert relative_error(result.grad, row.expected(1, 1)) < 1.5 * row.accuracy


def test_a_new_structure_does_recompile() -> None:
    """The counter counts: it is no proof otherwise."""
    estimate("central")
    before = len(TRACES)
    contrast = cm.Contrastive(SGD, scheme=cm.NudgeScheme((1e-3, -1e-3), (500.0, -500.0), order=7))
    jax.eval_shape(lambda: contrast.estimate(PROBLEM, meta_params(), task(), state=start("central")))
    assert len(TRACES) > before


def test_calls_without_a_state_compile_once() -> None:
    first = estimator("central").estimate(PROBLEM, meta_params(), task())
    before = len(TRACES)
    second = estimator("central", 0.5).estimate(PROBLEM, meta_params(1), task(1), key=jax.random.key(3))
    # `init_state` and its like trace nothing here: all is inside the one compiled program.
    assert len(TRACES) == before
    assert relative_error(first.grad, exactly(0, 0)) < 1e-5 > relative_error(second.grad, exactly(1, 1))


# First derivatives only.


@jax.custom_jvp
def opaque(x: jax.Array) -> jax.Array:
    return x


@opaque.defjvp
def _opaque_jvp(primals: Any, tangents: Any) -> Any:
    raise TypeError("a second derivative was taken")


@jax.custom_vjp
def once(x: jax.Array) -> jax.Array:
    """The identity, that can be differentiated once, in reverse."""
    return x


once.defvjp(lambda x: (x, None), lambda _, cotangent: (opaque(cotangent),))


def inner_loss_once(params: Any, meta: Any, data: Any) -> Any:
    params, meta = jax.tree.map(once, (params, meta))
    return inner_loss(params, meta, data)


ONCE = cm.BilevelProblem(inner_loss_once, outer_loss, init_params, has_aux=True)
NEEDS_SECOND = {
    name for name in ESTIMATORS if isinstance(estimator(name), cm.ImplicitDifferentiation | cm.BackpropThroughLearning)
}


@EVERY
def test_second_derivatives_are_taken_where_they_are_announced(name: str) -> None:
    if name in NEEDS_SECOND:
        with pytest.raises(TypeError, match=r"second derivative|forward-mode autodiff"):
            traced(name, once=True)
    else:
        assert_like(traced(name, once=True)[0], traced(name, once=False)[0])


def test_an_inner_loss_without_second_derivative_has_a_meta_gradient() -> None:
    result = estimator("central").estimate(ONCE, meta_params(), task())
    assert relative_error(result.grad, exactly(0, 0)) < ESTIMATORS["central"].accuracy


# Data that is broken.


def with_data(data: Any, **changes: Any) -> Any:
    return data | {"data": data["data"]._replace(**changes)}


@EVERY
@pytest.mark.parametrize("where", ["offset", "target"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_broken_data_is_never_silent(name: str, where: str, value: float) -> None:
    """NaN or infinity in the inner loss's data, or in the outer loss's alone."""
    vector = getattr(task()["data"], where).at[1].set(value)
    result = estimator(name).estimate(PROBLEM, meta_params(), with_data(task(), **{where: vector}), state=start(name))
    assert result.diagnostics.status == Status.NOT_FINITE
    with pytest.raises(cm.EstimateError, match=r"NOT_FINITE.*NaN in the task"):
        cm.raise_if_failed(result)


# What an estimator cannot see.


LEARNED_RATE = cm.OptaxDescent(lambda meta: optax.sgd(meta["rate"]), num_steps=4)
BLIND_TO: dict[str, tuple[cm.MetaGradientEstimator, set[str]]] = {
    "contrastive": (cm.Contrastive(LEARNED_RATE, scheme=cm.central_difference(1e-3)), {"start", "rate", "idle"}),
    "implicit": (cm.ImplicitDifferentiation(LEARNED_RATE), {"start", "rate", "idle"}),
    "backprop": (cm.BackpropThroughLearning(LEARNED_RATE), {"idle"}),
    "forward mode": (cm.BackpropThroughLearning(LEARNED_RATE, forward_mode=True), {"idle"}),
    "truncated": (cm.BackpropThroughLearning(LEARNED_RATE, truncate=2), {"start", "idle"}),
    "fomaml": (cm.FirstOrder(LEARNED_RATE), {"decay", "rate", "idle"}),
    "reptile": (cm.Reptile(LEARNED_RATE), {"decay", "judge", "rate", "idle"}),
    "evolution strategies": (cm.EvolutionStrategies(LEARNED_RATE), {"idle"}),
    "finite difference": (cm.FiniteDifference(LEARNED_RATE), {"idle"}),
}


@pytest.mark.parametrize("name", BLIND_TO)
def test_what_is_not_seen_is_said_once_and_is_exactly_zero(name: str) -> None:
    chosen, blind = BLIND_TO[name]
    with pytest.warns(UserWarning, match="cannot see the meta-parameters") as caught:
        result = chosen.estimate(PARTLY, PARTLY_META, PARTLY_TASK)
    assert len(caught) == 1 and all(f"'{leaf}'" in str(caught[0].message) for leaf in blind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = chosen.estimate(PARTLY, PARTLY_META, PARTLY_TASK)
    assert result.unseen == again.unseen == tuple(f"['{leaf}']" for leaf in sorted(blind))
    zero = {leaf for leaf, value in result.grad.items() if value == 0.0}
    assert zero == blind


@pytest.mark.parametrize("name", ["backprop", "forward mode"])
@pytest.mark.filterwarnings("ignore:.*cannot see the meta-parameters")
def test_backprop_sees_initialisation_and_learning_rate(name: str) -> None:
    """Four steps are not converged, so both matter."""
    got = BLIND_TO[name][0].estimate(PARTLY, PARTLY_META, PARTLY_TASK)
    oracle = cm.FiniteDifference(LEARNED_RATE).estimate(PARTLY, PARTLY_META, PARTLY_TASK)
    assert abs(got.grad["rate"]) > 0.01 and abs(got.grad["start"]) > 0.01
    # Finite differences at eps^(1/3) are good to eps^(2/3) = 4e-11 times third derivatives.
    assert relative_error(got.grad, oracle.grad) < 1e-8


@pytest.mark.parametrize(
    ("chosen", "problem"),
    [
        (cm.Contrastive(SGD), cm.BilevelProblem(lambda w, m, t: w @ w, lambda w, m, t: w @ w, lambda m, t: m)),
        (
            cm.ImplicitDifferentiation(SGD),
            cm.BilevelProblem(lambda w, m, t: w @ w, lambda w, m, t: w @ w, lambda m, t: m),
        ),
        (cm.FirstOrder(SGD), cm.BilevelProblem(lambda w, m, t: w @ (w - m), lambda w, m, t: w @ w, lambda m, t: t)),
        (cm.Reptile(SGD), cm.BilevelProblem(lambda w, m, t: w @ m, lambda w, m, t: w @ m, lambda m, t: t)),
        (
            cm.BackpropThroughLearning(SGD),
            cm.BilevelProblem(lambda w, m, t: w @ w, lambda w, m, t: w @ w, lambda m, t: t),
        ),
        (cm.FiniteDifference(SGD), cm.BilevelProblem(lambda w, m, t: w @ w, lambda w, m, t: w @ w, lambda m, t: t)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_to_see_nothing_at_all_is_an_error(chosen: cm.MetaGradientEstimator, problem: cm.BilevelProblem) -> None:
    with pytest.raises(ValueError, match=f"{type(chosen).__name__} sees none of the meta-parameters.*anchor `params`"):
        chosen.estimate(problem, jnp.ones(2), jnp.ones(2))


# Input that is wrong.


def replaced(**changes: Any) -> cm.BilevelProblem:
    return dataclasses.replace(PROBLEM, **changes)


def without_aux(loss: Any) -> Any:
    return lambda *args: loss(*args)[0]


BAD_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "vector inner loss": (
        lambda: _estimate(replaced(inner_loss=lambda w, m, t: (flat(w), None))),
        TypeError,
        r"`inner_loss` must return a floating scalar; got shape \(5,\), dtype float64.*jnp.mean",
    ),
    "vector outer loss": (
        lambda: _estimate(replaced(outer_loss=lambda w, m, t: (flat(w)[:2], None))),
        TypeError,
        r"`outer_loss` must return a floating scalar; got shape \(2,\)",
    ),
    "integer loss": (
        lambda: _estimate(replaced(outer_loss=lambda w, m, t: (jnp.int32(3), None))),
        TypeError,
        "`outer_loss` must return a floating scalar; got .*dtype int32",
    ),
    "integer params": (
        lambda: _estimate(replaced(init_params=lambda m, t: {"w": jnp.arange(5)})),
        TypeError,
        r"init_params must return real floating arrays; params\['w'\] has dtype int64.*floating dtype",
    ),
    "complex params": (
        lambda: _estimate(replaced(init_params=lambda m, t: jnp.zeros(5, complex))),
        TypeError,
        "init_params must return real floating arrays; params has dtype complex128",
    ),
    "integer meta_params": (
        lambda: _estimate(meta=meta_params() | {"count": jnp.arange(2)}),
        TypeError,
        r"meta_params must be real floating arrays; meta_params\['count'\] has dtype int64.*put it in `task`",
    ),
    "complex meta_params": (
        lambda: _estimate(meta=meta_params() | {"drive": jnp.ones(2, complex)}),
        TypeError,
        r"meta_params\['drive'\] has dtype complex128",
    ),
    "meta_params that are no arrays": (
        lambda: _estimate(meta=meta_params() | {"name": "drive"}),
        TypeError,
        r"meta_params must be a pytree of arrays; meta_params\['name'\] is a str",
    ),
    "state of another problem": (
        lambda: _estimate(state=start("central")._replace(params={"w": jnp.zeros(5)})),
        ValueError,
        "`state.params`: expected .*Layer.*, got .*'w'.*Pass the state of an earlier estimate of the same problem",
    ),
    "state in another dtype": (
        lambda: _estimate(state=start("central")._replace(params=cast(start("central").params, jnp.float32))),
        ValueError,
        "`state.params`: expected .*float64.*, got .*float32",
    ),
    "aux not announced": (
        lambda: _estimate(replaced(has_aux=False)),
        TypeError,
        "`inner_loss` must return a scalar; got a tuple of 2.*`BilevelProblem.*has_aux=True",
    ),
    "aux missing": (
        lambda: _estimate(replaced(outer_loss=without_aux(outer_loss))),
        TypeError,
        r"`outer_loss` must return `\(scalar, aux\)` when `has_aux=True`; got",
    ),
    "solver that returns another structure": (
        lambda: cm.Contrastive(_Forgetful()).estimate(PROBLEM, meta_params(), task()),
        ValueError,
        "The solver's solution: expected .*Layer.*It must be a pytree like what `init_params` returns",
    ),
    "rule that returns another structure": (
        lambda: cm.Contrastive(SGD, rule=_Lopsided()).estimate(PROBLEM, meta_params(), task()),
        ValueError,
        "`statistic` must return a pytree like `meta_params`: expected .*, got .*Return zeros",
    ),
    "truncated forward mode": (
        lambda: cm.BackpropThroughLearning(SGD, truncate=3, forward_mode=True),
        ValueError,
        "`forward_mode` stores no trajectory: leave out `truncate`",
    ),
    "truncation to nothing": (
        lambda: cm.BackpropThroughLearning(SGD, truncate=0),
        ValueError,
        "`truncate` must be at least 1 step; got 0",
    ),
    "a single pair": (
        lambda: cm.EvolutionStrategies(SGD, num_pairs=1),
        ValueError,
        "needs num_pairs >= 2; got 1",
    ),
    "backprop through a while loop": (
        lambda: cm.BackpropThroughLearning(cm.LBFGS()).estimate(PROBLEM, meta_params(), task()),
        TypeError,
        "LBFGS cannot be differentiated in reverse.*num_steps=.*`Contrastive` or `ImplicitDifferentiation`",
    ),
}


def _estimate(problem: cm.BilevelProblem = PROBLEM, meta: Any = None, state: Any = None) -> Any:
    return estimator("central").estimate(problem, meta_params() if meta is None else meta, task(), state=state)


class _Forgetful(cm.InnerSolver):
    def solve(self, loss: Any, init: Any, **_: Any) -> cm.Solution:
        return SGD.solve(loss, init)._replace(params=jnp.zeros(5))


class _Lopsided(cm.PlasticityRule):
    def statistic(self, problem: Any, params: Any, meta: Any, data: Any, beta: Any) -> Any:
        return {"drive": meta["drive"]}


for _kind in (_Forgetful, _Lopsided):
    jax.tree_util.register_static(_kind)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_mistakes_are_named_with_their_remedy(name: str) -> None:
    call, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        call()


# Complex schemes where they do not apply.


def relu_loss(params: Any, meta: Any, data: Any) -> Any:
    return jnp.sum((jax.nn.relu(flat(params)) - 1.0) ** 2) + inner_loss(params, meta, data)[0], None


@pytest.mark.parametrize("scheme", [cm.complex_step(1e-6), cm.relative(cm.circle)], ids=["complex step", "circle"])
@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
def test_a_loss_that_is_not_holomorphic_is_named_with_its_operation(which: str, scheme: Any) -> None:
    with pytest.raises(TypeError, match=f"(?s){which}.*`?max`?.*central_difference"):
        cm.Contrastive(SGD, scheme=scheme).estimate(replaced(**{which: relu_loss}), meta_params(), task())


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (cm.LBFGS(), "LBFGS is not"),
        (cm.OptaxDescent(optax.adam(0.1), num_steps=3), "OptaxDescent's optimizer"),
        (cm.ScipyMinimize(), "ScipyMinimize is not"),
        (cm.CallableSolver(lambda loss, init: init, host=True), "CallableSolver is not"),
    ],
    ids=["lbfgs", "adam", "scipy", "host function"],
)
def test_a_learner_that_is_not_holomorphic_is_named(solver: cm.InnerSolver, message: str) -> None:
    with pytest.raises(TypeError, match=f"(?s){message}.*nudged_solver="):
        cm.Contrastive(solver, solver, cm.complex_step()).estimate(PROBLEM, meta_params(), task())


# Strengths that are wrong, known only when they run.


@pytest.mark.parametrize(
    ("beta", "weight", "other"),
    [(1e-3, 501.0, -500.0), (1e-3, 1.0, -1.0), (0.0, np.inf, -np.inf)],
    ids=["weights that do not cancel", "weights of another strength", "central_difference(0)"],
)
def test_a_scheme_that_is_no_derivative(beta: float, weight: float, other: float) -> None:
    """Known, it raises; traced, it is reported, and not as something else that follows from it."""
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="weights of a scheme must satisfy"):
        cm.NudgeScheme((beta, -beta), (weight, other))
    assert status_of_scheme(1e-3, 500.0, -500.0) == Status.CONVERGED
    assert status_of_scheme(beta, weight, other) == Status.INVALID_SCHEME


@jax.jit
def status_of_scheme(beta: jax.Array, weight: jax.Array, other: jax.Array) -> jax.Array:
    scheme = cm.NudgeScheme((beta, -beta), (weight, other), order=2)
    return cm.Contrastive(SGD, scheme=scheme).estimate(PROBLEM, meta_params(), task()).diagnostics.status
