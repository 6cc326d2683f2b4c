"""Schemes as data: weights of a derivative, an exact contrast, the strength that was asked; and what nudges."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import contrastive_meta as cm
from contrastive_meta import Status
from tests.oracles import ALONE, relative_error

# Scheme functions of beta, and the order of their error.
SCHEMES: dict[str, tuple[Callable[[Any], cm.NudgeScheme], int]] = {
    "forward": (cm.forward_difference, 1),
    "forward unmatched": (lambda beta: cm.forward_difference(beta, matched=False), 1),
    "second order forward": (cm.second_order_forward, 2),
    "central": (cm.central_difference, 2),
    "four-point": (cm.four_point, 4),
    "circle of 2": (lambda beta: cm.circle(beta, num_points=2), 2),
    "circle of 3": (lambda beta: cm.circle(beta, num_points=3), 3),
    "circle of 8": (cm.circle, 8),
    "complex step": (cm.complex_step, 2),
}
EVERY = pytest.mark.parametrize("name", SCHEMES)
# Both signs, over twelve decades.
BETAS = st.builds(lambda sign, exponent: sign * 10.0**exponent, st.sampled_from([1.0, -1.0]), st.floats(-6, 6))


def moment(scheme: cm.NudgeScheme, power: int) -> tuple[float, float]:
    """Re sum w beta^power, and the size of its terms."""
    terms = np.array(scheme.weights) * np.array(scheme.nudges) ** power
    return float(np.real(np.sum(terms))), float(np.sum(np.abs(terms)))


@EVERY
@given(beta=BETAS)
def test_weights_are_those_of_a_first_derivative_of_that_order(name: str, beta: float) -> None:
    """Exact for polynomials up to degree `order`, and not beyond: which is what an error O(beta^order) means."""
    make, order = SCHEMES[name]
    scheme = make(beta)
    assert scheme.order == order
    for power in range(order + 1):
        value, size = moment(scheme, power)
        assert abs(value - (power == 1)) <= 1e-14 * max(1, size), power
    # The next moment does not vanish: it is the leading error, of order 1 in units of beta^order.
    leading = moment(scheme, order + 1)[0] / beta**order
    assert 0.1 < abs(leading) < 10


@EVERY
def test_the_contrast_of_the_exponential_falls_with_that_order(name: str) -> None:
    make, order = SCHEMES[name]
    # Strengths at which 1e-16 of rounding is far below the error: 0.3^8 / 9! is 2e-10.
    betas = np.array([0.3, 0.6, 1.2]) if order > 4 else np.array([0.01, 0.02, 0.04])

    def error(beta: float) -> float:
        scheme = make(beta)
        nudges, _ = scheme.arrays(jnp.float64)
        return abs(float(scheme.contrast(jnp.exp(nudges))) - 1)

    slope = np.polyfit(np.log(betas), np.log([error(beta) for beta in betas]), 1)[0]
    assert slope == pytest.approx(order, abs=0.2)


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_contrast_is_a_real_weighted_sum_over_the_leading_axis(name: str, dtype: Any) -> None:
    scheme = SCHEMES[name][0](0.5)
    num = len(scheme.nudges)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        real = jnp.asarray(rng.normal(size=(num, *shape)), dtype)
        return jax.lax.complex(real, 2 * real + 1) if scheme.is_complex else real

    measured = {"matrix": draw(2, 3), "scalar": [draw()], "empty": ({}, None, jnp.zeros((num, 0), dtype))}
    contrast = scheme.contrast(measured)
    expected = jax.tree.map(lambda x: np.real(np.tensordot(np.array(scheme.weights), np.asarray(x), 1)), measured)
    assert jax.tree.structure(contrast) == jax.tree.structure(measured)
    for got, want in zip(jax.tree.leaves(contrast), jax.tree.leaves(expected), strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        # A sum of up to eight terms of size one, each rounded.
        np.testing.assert_allclose(got, want, atol=32 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("make", [cm.central_difference, cm.forward_difference])
@pytest.mark.parametrize("beta", [1e-3, 3e-5, 0.7])
def test_nearly_equal_numbers_are_subtracted_before_anything_is_rounded(make: Any, beta: float) -> None:
    """Multiplying first would round each at 1e-7 of its size, a tenth of their difference here."""
    a, b = np.float32(1.000001), np.float32(1.0)
    scheme = make(beta)
    ends = jnp.array([a, b]) if scheme.nudges[0] else jnp.array([b, a])
    span = max(scheme.nudges) - min(scheme.nudges)
    expected = (float(a) - float(b)) / span
    assert float(scheme.contrast(ends)) == pytest.approx(expected, rel=4 * 6e-8)


# Data.


@EVERY
def test_a_scheme_is_a_pytree_of_its_numbers(name: str) -> None:
    make, order = SCHEMES[name]
    scheme = make(0.5)
    # Python's numbers stay as they are: 0.5 is raw, in the units of the outer loss.
    assert jax.tree.leaves(scheme) == [*scheme.nudges, *scheme.weights]
    assert make(0.5) == scheme != make(0.25)
    assert jax.tree.structure(make(0.25)) == jax.tree.structure(scheme)
    assert jax.tree.structure(dataclasses.replace(scheme, order=order + 1)) != jax.tree.structure(scheme)
    traces = []

    @jax.jit
    def strength(scheme: cm.NudgeScheme) -> jax.Array:
        traces.append(1)
        return scheme.strength(jnp.float32)

    for beta in (0.5, -0.25, 3.0):
        assert strength(make(beta)) == np.float32(abs(beta))
    assert len(traces) == 1


@EVERY
def test_the_strength_is_the_smallest_nudge_that_nudges(name: str) -> None:
    scheme = SCHEMES[name][0](-0.25)
    assert scheme.strength(jnp.float64) == pytest.approx(0.25, rel=1e-15)
    assert scheme.strength(jnp.float32).dtype == jnp.float32
    sizes = np.abs(np.array(scheme.nudges))
    assert sizes[sizes > 0].min() == pytest.approx(0.25, rel=1e-15)


@EVERY
@given(factor=BETAS)
def test_scaling_a_scheme_is_another_strength(name: str, factor: float) -> None:
    make = SCHEMES[name][0]
    scaled, expected = make(0.5).scaled(factor), make(0.5 * factor)
    np.testing.assert_allclose(np.array(scaled.nudges), np.array(expected.nudges), rtol=1e-14)
    np.testing.assert_allclose(np.array(scaled.weights), np.array(expected.weights), rtol=1e-14)
    assert jax.tree.structure(scaled) == jax.tree.structure(expected)


def test_which_phase_is_free_is_said_and_not_recognised_by_its_number() -> None:
    assert cm.forward_difference(1.0).free_phase == cm.second_order_forward(1.0).free_phase == 0
    assert cm.central_difference(1.0).free_phase is cm.four_point(1.0).free_phase is cm.circle(1.0).free_phase is None
    assert cm.forward_difference(1.0).matched and not cm.forward_difference(1.0, matched=False).matched
    assert not cm.second_order_forward(1.0, matched=False).matched


def test_only_circle_and_complex_step_are_complex() -> None:
    complex_ones = {name for name, (make, _) in SCHEMES.items() if make(1.0).is_complex}
    assert complex_ones == {name for name in SCHEMES if "circle" in name or "complex" in name}
    nudges, weights = cm.circle(1.0).arrays(jnp.float32)
    assert nudges.dtype == weights.dtype == jnp.complex64
    assert cm.central_difference(1.0).arrays(jnp.float32)[0].dtype == jnp.float32


# Mistakes.

ZEROS = [0.0, 0, -0.0, jnp.zeros(()), np.float32(0), np.zeros(())]


@EVERY
@pytest.mark.parametrize("zero", ZEROS, ids=repr)
def test_a_strength_of_zero_is_refused(name: str, zero: Any) -> None:
    with pytest.raises(ValueError, match=r"beta must be nonzero.*small positive number, or let `relative"):
        SCHEMES[name][0](zero)


@pytest.mark.parametrize(
    ("nudges", "weights", "message"),
    [
        ((0.1, -0.1), (5.0, 5.0), r"Re sum = 10 .*Use `central_difference\(beta\)`"),
        ((0.1, -0.1), (10.0, -10.0), "sum w beta off by 1,"),
        ((0.1, -0.1), (-5.0, 5.0), "sum w beta off by 2,"),
        ((0.1j,), (10j,), "sum w beta off by 2,"),
        ((0.1j, 0.0), (-10j, 1.0), "Re sum = 1 "),
        ((0.1, math.nan), (5.0, -5.0), "sum w beta off by nan"),
        ((jnp.array(0.1), np.float32(-0.1)), (5.0, 5.0), "Re sum = 10 "),
        ((0.1, -0.1), (5.0,), "as many weights as nudges; got 2 nudges and 1 weights"),
        ((), (), "as many weights as nudges; got 0 nudges"),
    ],
)
def test_weights_that_are_not_those_of_a_derivative_are_refused(nudges: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cm.NudgeScheme(nudges, weights)


def test_weights_may_be_rounded() -> None:
    """In float32, or typed with six digits."""
    beta, weight = jnp.float32(0.1), jnp.float32(5)
    cm.NudgeScheme((beta, -beta), (weight, -weight))
    cm.NudgeScheme((0.3, -0.3), (1.66667, -1.66667))


def test_circles_need_two_points() -> None:
    with pytest.raises(ValueError, match="num_points >= 2; got 1"):
        cm.circle(0.1, num_points=1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_traced_weights_are_judged_when_they_run(dtype: Any) -> None:
    @jax.jit
    def status(beta: jax.Array, slip: jax.Array) -> jax.Array:
        return cm.NudgeScheme((beta, -beta), (1 / (2 * beta) + slip, -1 / (2 * beta))).validity(dtype)

    beta = jnp.asarray(0.01, dtype)
    assert status(beta, jnp.zeros((), dtype)) == Status.CONVERGED
    assert status(beta, jnp.asarray(1.0, dtype)) == Status.INVALID_SCHEME
    assert status(jnp.zeros((), dtype), jnp.zeros((), dtype)) == Status.INVALID_SCHEME
    assert status(jnp.asarray(jnp.nan, dtype), jnp.zeros((), dtype)) == Status.INVALID_SCHEME


@EVERY
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_traced_strengths_of_every_scheme_are_valid(name: str, dtype: Any) -> None:
    @jax.jit
    def status(beta: jax.Array) -> jax.Array:
        return SCHEMES[name][0](beta).validity(dtype)

    for beta in (1e-6, -0.3, 1e4):
        assert status(jnp.asarray(beta, dtype)) == Status.CONVERGED


# Nudging something: a quadratic with curvatures 1, 2, 3, whose meta-gradient (drive and direct term) is a formula.

CURVATURES = jnp.array([1.0, 2.0, 3.0])
META, TARGET = jnp.array([2.0, -1.0, 0.5]), jnp.array([1.0, 1.0, 2.0])
LEARNER = cm.OptaxDescent(optax.sgd(0.5), num_steps=60)  # what is left shrinks by 1/2 a step: to 1e-18

QUADRATIC = cm.BilevelProblem(
    inner_loss=lambda w, meta, task: jnp.sum(CURVATURES.astype(w.dtype) * w**2 / 2 - meta * w),
    outer_loss=lambda w, meta, task: jnp.sum((w - task) ** 2 / 2 + w * meta**2),
    init_params=lambda meta, task: jnp.zeros_like(task),
)


def quadratic_answer() -> Any:
    w = META / CURVATURES
    return (w - TARGET + META**2) / CURVATURES + 2 * META * w


@pytest.mark.parametrize(
    "nudges", [(0.3, -0.2), (0.1, 0.3), (0.2, 0.1, -0.4), (0.1, -0.1, 0.5, -0.5, 0.25)], ids=lambda n: str(len(n))
)
def test_any_nudges_with_fitting_weights_estimate_the_gradient(nudges: tuple[float, ...]) -> None:
    """Weights from the moment conditions by least squares; a linear nudge leaves them no error here."""
    powers = np.vander(nudges, len(nudges), increasing=True).T
    weights = np.linalg.lstsq(powers[:2], np.array([0.0, 1.0]), rcond=None)[0]
    scheme = cm.NudgeScheme(nudges, tuple(map(float, weights)))
    result = cm.Contrastive(LEARNER, ALONE, scheme, cm.LinearNudge()).estimate(QUADRATIC, META, TARGET)
    assert relative_error(result.grad, quadratic_answer()) < 1e-12
    assert float(result.diagnostics.beta) == pytest.approx(min(map(abs, nudges)))


@pytest.mark.parametrize(
    ("scheme", "displacement"),
    [
        (cm.relative(cm.central_difference, 1e-3), 1e-3),
        (cm.relative(cm.forward_difference, 1e-4), 1e-4),
        (cm.relative(cm.four_point, jnp.asarray(1e-2)), 1e-2),
        # A scheme in place of a function: its own strength is ignored.
        (cm.relative(cm.central_difference(7.0), 1e-3), 1e-3),
        (cm.relative(cm.NudgeScheme((4.0, -2.0), (1 / 6, -1 / 6)), 1e-3), 1e-3),
    ],
    ids=["central", "forward", "four-point", "instance", "lopsided"],
)
def test_a_relative_strength_moves_params_as_far_as_asked(scheme: Any, displacement: float) -> None:
    result = cm.Contrastive(LEARNER, ALONE, scheme, cm.LinearNudge()).estimate(QUADRATIC, META, TARGET)
    w = META / CURVATURES
    response = (w - TARGET + META**2) / CURVATURES
    # The pilot solves three dimensions in three steps, with products from gradient differences good to about 1e-7.
    beta = displacement * float(jnp.linalg.norm(w) / jnp.linalg.norm(response))
    assert float(result.diagnostics.beta) == pytest.approx(beta, rel=1e-4)
    assert float(result.diagnostics.displacement) == pytest.approx(displacement, rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(jnp.float64, 0.2 * 2.2e-16 ** (1 / 3)), (jnp.float32, 0.2 * 1.2e-7 ** (1 / 3))]
)
def test_by_default_the_strength_balances_rounding_and_truncation(dtype: Any, expected: float) -> None:
    """As documented: about 1e-6 in float64 and 1e-3 in float32; the measured noise is within a few eps."""
    estimator = cm.Contrastive(LEARNER, ALONE, cm.relative(cm.central_difference))
    result = estimator.estimate(QUADRATIC, META.astype(dtype), TARGET.astype(dtype))
    assert expected / 1.1 < float(result.diagnostics.displacement) < 3 * expected


# Nudges.


def test_the_linear_nudge_is_a_line_through_the_free_solution() -> None:
    problem = cm.BilevelProblem(
        inner_loss=lambda w, meta, task: (jnp.sum(w["a"] ** 2), "inner"),
        outer_loss=lambda w, meta, task: (meta * jnp.sum(jnp.sin(w["a"])) + jnp.exp(w["b"] * meta), "outer"),
        init_params=lambda meta, task: task,
        has_aux=True,
        sample=lambda key, task, step: task,
    )
    meta = jnp.asarray(0.7)
    free: Any = {"a": jnp.array([0.1, 0.2]), "b": jnp.asarray(-0.4), "none": None}
    v = jax.grad(problem.outer)(free, meta, None)
    linear = cm.LinearNudge().apply(problem, free, meta, None, v)
    moved: Any = {"a": jnp.array([5.0, -3.0]), "b": jnp.asarray(2.0), "none": None}
    value, (slope, direct) = jax.value_and_grad(linear.outer, argnums=(0, 1))(moved, meta, None)
    line = problem.outer(free, meta, None) + v["a"] @ (moved["a"] - free["a"]) + v["b"] * (moved["b"] - free["b"])
    assert float(value) == pytest.approx(float(line), rel=1e-14)
    assert relative_error(slope, v) == 0
    # v is held fixed: what is left of the meta-parameters is the direct term at the free solution.
    assert float(direct) == pytest.approx(float(jax.grad(problem.outer, argnums=1)(free, meta, None)), rel=1e-14)
    assert linear.inner(moved, meta, None) == problem.inner(moved, meta, None)
    assert linear.sample is problem.sample
    assert cm.LossNudge().apply(problem, free, meta, None, v) is problem


def _doubled_outer(problem: cm.BilevelProblem) -> cm.BilevelProblem:
    return dataclasses.replace(problem, outer_loss=lambda w, meta, task: 2 * problem.outer(w, meta, task))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Twice(cm.Nudge):
    def apply(self, problem: Any, params: Any, meta_params: Any, task: Any, outer_grad: Any) -> cm.BilevelProblem:
        return _doubled_outer(problem)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class OfTheNorm(cm.NudgeStrength):
    """A strength of a user's own: a hundredth over the norm of the outer gradient."""

    def resolve(self, probe: Any) -> tuple[cm.NudgeScheme, jax.Array]:
        return cm.central_difference(0.01 / probe.nudge_norm), jnp.int32(1000)

    def template(self) -> cm.NudgeScheme:
        return cm.central_difference(1.0)


def test_nudges_and_strengths_of_a_users_own() -> None:
    plain = cm.Contrastive(LEARNER, LEARNER, cm.central_difference(1e-2)).estimate(QUADRATIC, META, TARGET)
    own = cm.Contrastive(LEARNER, LEARNER, OfTheNorm(), Twice()).estimate(QUADRATIC, META, TARGET)
    w = META / CURVATURES
    expected = 0.01 / float(jnp.linalg.norm(w - TARGET + META**2))
    assert float(own.diagnostics.beta) == pytest.approx(expected, rel=1e-12)
    assert int(own.diagnostics.num_gradients) == int(plain.diagnostics.num_gradients) + 1000
    # The bias of the central scheme is (2 beta)^2 times the response's third derivative: 1e-4 of the gradient or less.
    assert relative_error(own.grad, 2 * quadratic_answer()) < 1e-4
    fast = cm.Contrastive(LEARNER, scheme=OfTheNorm(), nudge=Twice()).estimate(QUADRATIC, META, TARGET)
    assert fast.diagnostics.status == cm.Status.CONVERGED
    assert float(fast.diagnostics.beta) == pytest.approx(expected, rel=1e-12)
    assert relative_error(fast.grad, 2 * quadratic_answer()) < 1e-4
