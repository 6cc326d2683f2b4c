"""A diagnosis names what was done wrong on purpose, with numbers that have a closed form."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import contrastive_meta as cm
from tests.oracles import ALONE, STILL, low_curvature, relative_error, small_problem

# Problems and learners below differ in numbers only, so that few programs are compiled.


class Shape(NamedTuple):
    """L_in = a w^4 / 4 + b w^2 / 2 - theta w and L_out = c w + d w^2 / 2, learned from `start`."""

    a: float
    b: float
    c: float
    d: float
    start: float


def inner_loss(w, theta, shape):
    return shape.a * w**4 / 4 + shape.b * w**2 / 2 - theta * w


def outer_loss(w, theta, shape):
    return shape.c * w + shape.d * w**2 / 2


PROBLEM = cm.BilevelProblem(inner_loss, outer_loss, lambda theta, shape: shape.start)
SGD = optax.sgd(0.1)
# L_in = w^2 / 2 - theta w: minimum at theta.
BOWL = Shape(a=0.0, b=1.0, c=1.0, d=1.0, start=1.0)
# Curved, but with a single minimum.
QUARTIC = Shape(a=1.0, b=1.0, c=1.0, d=0.0, start=1.0)
# Minima at +-1, between them a hill of height 1/4; the nudge pushes to the left.
WELLS = Shape(a=1.0, b=-1.0, c=1.0, d=0.0, start=1.0)


def learner(max_steps=1000):
    # Relative to rounding only: it learns to the end, or until its steps are spent.
    return cm.OptaxDescent(SGD, tol=1e-14, max_steps=jnp.int32(max_steps))


def diagnose(shape, theta, beta, dtype=jnp.float64, max_steps=1000, nudged_steps=1000, nudge=None, **options):
    estimator = cm.Contrastive(learner(max_steps), learner(nudged_steps), cm.central_difference(beta), nudge)
    shape = jax.tree.map(lambda x: jnp.asarray(x, dtype), shape)
    return cm.diagnose(PROBLEM, estimator, jnp.asarray(theta, dtype), shape, **options)


def lines(diagnosis):
    """Everything that `print` shows, in one line."""
    return " ".join(str(diagnosis).split())


def test_a_strength_in_place_is_left_alone():
    """On the bowl the contrast is (theta + 1) / (1 - beta^2): truncation is beta^2, and nothing else is wrong."""
    found = diagnose(BOWL, 0.5, 1e-5)
    assert found.rule == "nothing"
    assert found.advice == f"Nothing to change: estimated error {found.error:.1e}."
    assert found.error < 1e-8
    strengths, errors = np.array(found.curve.strengths), np.array(found.curve.errors)
    middle = (strengths > 1e-4) & (strengths < 0.05)
    np.testing.assert_allclose(errors[middle], strengths[middle] ** 2, rtol=0.2)
    # Rounding eps / beta and truncation beta^2 are equal at eps^(1/3) = 6e-6; a grid in half decades, rounding that
    # is a number of eps.
    assert 1e-6 < strengths[found.curve.least] < 5e-5
    assert found.curve.noise_below < strengths[found.curve.least] < found.curve.truncation_above
    assert found.drift.distance < 1e-13
    assert found.drift.gradient < 1e-8
    for segment, beta in zip(found.segments, (1e-5, -1e-5), strict=True):
        assert segment.same_basin
        assert segment.barrier <= segment.noise
        assert segment.bend < 1e-6
        # H = 1; the nudge adds beta d.
        assert segment.curvature == pytest.approx(1.0, abs=1e-5)
        assert segment.nudged_curvature == pytest.approx(1.0 + beta, abs=1e-5)
        # From w = 1/2 by -beta (w + 1) / (1 + beta): the inner loss rises by half its square.
        assert segment.length == pytest.approx(1.5e-5, rel=1e-4)
        assert segment.inner_loss[-1] == pytest.approx(1.5e-5**2 / 2, rel=1e-4)
        assert segment.nudged_loss[-1] == pytest.approx(-(1.5e-5**2) / 2, rel=1e-4)


def test_learning_that_was_stopped_is_told_to_go_on():
    """From w = 1 towards 1/2, three steps of 0.1: what is left shrinks by 0.9 a step."""
    found = diagnose(BOWL, 0.5, 1e-2, max_steps=3, nudged_steps=3)
    assert found.rule == "unlearned"
    left = 0.5 * 0.9**3
    free = found.phases[0]
    assert free.residual == pytest.approx(left, rel=1e-9)
    # A phase evaluates six gradients: in three steps, at its start, where it ended and at the base point.
    scale, drift = 0.5 + left, left * (1 - 0.9**6)
    assert found.drift.distance == pytest.approx(drift / scale, rel=1e-9)
    assert found.drift.displacement > 10
    assert found.curve.error < 1e-5 < found.error, "strengths have in common what is unlearned"
    # The statistic is -w: the drift against beta times the gradient.
    assert found.drift.statistic == pytest.approx(drift / (1e-2 * abs(float(found.result.grad))), rel=1e-9)
    assert found.drift.gradient > 0.1
    assert "give the solver more steps" in found.advice
    assert f"moves `params` by {100 * drift / scale:.0f} % of their norm" in found.advice
    assert f"the gradient by {100 * found.drift.gradient:.0f} %" in found.advice


def test_too_large_a_strength_is_told_to_shrink():
    exact = -1 / (3 * w_of_quartic(0.5) ** 2 + 1)  # dL_out/dw dw/dtheta is c / H; the gradient is its own sign
    found = diagnose(QUARTIC, 0.5, 0.3, reference=jnp.asarray(-exact))
    assert found.rule == "truncation"
    assert found.curve.referenced
    true = abs(float(found.result.grad) + exact) / abs(exact)
    assert found.error == pytest.approx(true, rel=1e-9)
    assert found.error > 1e-2
    assert found.beta > found.curve.strengths[found.curve.least]
    assert found.curve.excess > 100
    # Second order: the slope is 2.
    errors, strengths = np.log(found.curve.errors), np.log(found.curve.strengths)
    assert (errors[6] - errors[2]) / (strengths[6] - strengths[2]) == pytest.approx(2.0, abs=0.1)
    assert max(segment.bend for segment in found.segments) > 0.02
    # Without the reference the neighbouring strengths say about the same.
    blind = diagnose(QUARTIC, 0.5, 0.3)
    assert blind.rule == "truncation"
    assert not blind.curve.referenced
    assert blind.curve.error == pytest.approx(true, rel=0.3)


def w_of_quartic(theta):
    """The real root of w^3 + w = theta."""
    roots = np.roots([1.0, 0.0, 1.0, -theta])
    return float(np.real(roots[np.argmin(np.abs(np.imag(roots)))]))


def test_a_nudge_across_a_hill_is_seen():
    """Beyond beta = 2 / sqrt(27) = 0.385 the right well is no minimum of the nudged loss any more."""
    found = diagnose(WELLS, 0.0, 0.6)
    assert found.rule == "barrier"
    across, back = found.segments
    assert not across.same_basin
    assert back.same_basin
    # From -1/4 over 0 and down to -1/4: the way leads straight over the top. Slopes at 21 points are interpolated.
    assert across.inner_barrier == pytest.approx(0.25, rel=1e-2)
    end = 1.0 - across.length
    rise = end**4 / 4 - end**2 / 2 + 0.25
    assert across.inner_loss[-1] == pytest.approx(rise, rel=1e-2)
    assert across.relative_barrier == pytest.approx(0.25 / rise, rel=1e-2)
    assert f"{across.relative_barrier:.2g} times as high" in found.advice
    assert "beta = 6.00e-01" in found.advice
    assert "a barrier" in lines(found)
    # Below that the way is free, however much it bends.
    near = diagnose(WELLS, 0.0, 0.3)
    assert all(segment.same_basin for segment in near.segments)
    assert near.rule == "truncation"


def test_a_nudge_that_takes_the_minimum_away_is_seen():
    """With -beta the nudged loss is (1 - 3) w^2 / 2 and some slope: there is nowhere to stay."""
    found = diagnose(BOWL, 0.5, 3.0, nudged_steps=100, nudge=cm.LossNudge())
    assert found.status == cm.Status.UNBOUNDED_NUDGE
    assert found.rule == "unbounded nudge"
    up, down = found.segments
    assert up.nudged_curvature == pytest.approx(4.0, rel=1e-6)
    assert down.nudged_curvature == pytest.approx(-2.0, rel=1e-6)
    assert "beta = -3.00e+00" in found.advice
    assert "`LinearNudge()`" in found.advice
    assert "no minimum" in lines(found)


def test_a_strength_lost_in_rounding_is_told_to_grow():
    found = diagnose(QUARTIC, 0.5, 1e-6, jnp.float32)
    assert found.rule == "noise"
    assert found.error > 0.03
    # Rounding of w, 3e-8, divided by a beta H^-1.
    assert found.curve.regions[found.curve.chosen] == "noise"
    least = found.curve.strengths[found.curve.least]
    assert 1e-3 < least < 5e-2
    assert "use float64, complex_step, or a larger displacement" in found.advice
    assert f"about {least / 1e-6:.0f} times this beta" in found.advice


def test_nudged_phases_that_were_stopped_are_told_to_go_on():
    """Three steps of 0.1 answer 1 - 0.9^3 of the nudge."""
    found = diagnose(BOWL, 0.5, 1e-3, nudged_steps=3)
    assert found.status == cm.Status.NUDGED_NOT_CONVERGED
    assert found.rule == "unanswered"
    assert float(found.result.diagnostics.nudged_residual) == pytest.approx(0.9**3, rel=1e-2)
    assert "the residual is 73 % of the nudge" in found.advice
    assert found.phases[1].residual > found.phases[1].tolerance


def test_a_hilltop_is_no_minimum():
    """Learning that begins on top of the hill stays there; phases roll down both sides, and L_in'' = -1."""
    found = diagnose(WELLS._replace(start=0.0), 0.0, 0.01)
    assert found.rule == "indefinite"
    for segment in found.segments:
        step = segment.positions[1]
        assert segment.inner_slope[1] == pytest.approx(-step * segment.length**2, rel=1e-2)


def test_what_all_strengths_have_in_common_shows_against_a_reference():
    """The gradient is 3/2: against 3 no strength is right. What is left to learn counts where no strength shows it."""
    found = diagnose(BOWL, 0.5, 1e-5, reference=jnp.asarray(3.0))
    assert found.rule == "out of reach"
    assert found.error == pytest.approx(0.5, rel=1e-6)
    assert "`reference`" in found.curve.against
    left = dataclasses.replace(diagnose(BOWL, 0.5, 1e-5), drift=drift_with(found, 0.2))
    assert left.rule == "unsettled"
    assert left.advice == "Learning had not ended: 20 % of the gradient is left; give the solver more steps."


def drift_with(found, gradient):
    """The drift of a diagnosis, with another effect on the gradient."""
    return found.drift._replace(gradient=gradient)


def test_what_lies_along_low_curvature_is_told_to_be_looked_for():
    """Strengths are not to blame: a quadratic loss and a linear nudge have no truncation."""
    problem, learned, exact = low_curvature()
    estimator = cm.Contrastive(STILL, cm.NewtonKrylov(tol=1e-2, fall_back=False))
    found = cm.diagnose(problem, estimator, jnp.array(1.0), learned)
    assert found.status == cm.Status.APPROXIMATE
    assert found.rule == "loose"
    assert found.error == pytest.approx(float(found.result.diagnostics.error_estimate))
    assert found.error == pytest.approx(relative_error(found.result.grad, exact), rel=1e-2)
    assert "a lower tolerance" in found.advice


def test_nothing_to_nudge_is_nothing_to_change():
    found = diagnose(BOWL._replace(c=0.0, d=0.0), 0.5, 0.01)
    assert found.rule == "nothing"
    assert found.error == 0.0
    assert "zero" in found.curve.against


def test_nan_is_named_and_printed():
    found = diagnose(BOWL._replace(b=math.nan), 0.5, 1e-3)
    assert found.rule == "not finite"
    assert "NaN" in found.advice
    assert "NOT_FINITE" in str(found)
    draw(found)


@pytest.fixture(scope="module")
def ridge():
    """The default estimator on converged ridge regression, against the closed form."""
    case = small_problem("ridge")
    solver = cm.OptaxDescent(optax.sgd(0.3), num_steps=600)
    estimator = cm.Contrastive(solver, nudged_solver=ALONE)
    return case, estimator, cm.diagnose(case.problem, estimator, *case[2:4], reference=case.exact.grad)


def test_the_default_on_a_solved_problem_needs_nothing(ridge):
    case, _, found = ridge
    assert found.status == cm.Status.CONVERGED
    assert found.rule == "nothing"
    assert found.advice == f"Nothing to change: relative error {found.error:.1e}."
    assert found.error < 1e-8
    # A linear nudge of a quadratic loss has no truncation: nothing but rounding, which falls until it is the
    # problem's own.
    assert found.curve.truncation_above is None or found.curve.truncation_above > 100 * found.beta
    assert found.curve.noise_below <= found.beta
    assert max(found.drift.distance, found.drift.gradient) < 1e-8
    # The curvature met is u' H u / u'u, u = H^-1 v.
    task, strength = case.task, jnp.exp(case.meta_params)
    hessian = task.x_train.T @ task.x_train / len(task.y_train) + jnp.diag(strength)
    outer_grad = task.x_val.T @ (task.x_val @ case.params - task.y_val) / len(task.y_val)
    response = jnp.linalg.solve(hessian, outer_grad)
    expected = float(response @ outer_grad / (response @ response))
    for segment in found.segments:
        assert segment.same_basin
        assert segment.curvature == pytest.approx(expected, rel=1e-6)
        assert segment.length == pytest.approx(found.beta * float(jnp.linalg.norm(response)), rel=1e-6)


def test_the_evaluations_add_up(ridge):
    _, _, found = ridge
    assert found.gradients["free phase"] == 601
    assert sum(found.gradients.values()) == int(found.result.diagnostics.num_gradients)


def test_the_page_is_aligned_and_narrow(ridge):
    _, _, found = ridge
    text = str(found)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert any(line.startswith("Advice: ") for line in text.splitlines()[1:3])
    table = [line for line in text.splitlines() if "1e-" in line or "e-" in line]
    chosen = [line for line in table if line.startswith(">")]
    assert len(chosen) == 1
    assert f"{found.beta:.2e}" in chosen[0]
    assert "@" in chosen[0]
    # The columns of the curve are columns: every row has its error where the first has.
    rows = [next(line for line in table if f"{beta:.2e}" in line) for beta in found.curve.strengths]
    places = {line.index(f"{error:.1e}", 11) for line, error in zip(rows, found.curve.errors, strict=True)}
    assert len(places) == 1
    assert f"Gradient evaluations: {sum(found.gradients.values())}" in lines(found)
    for word in ("Phases:", "Drift:", "Basin:", "Result:", "Status CONVERGED: Every check passed."):
        assert word in text


def draw(found):
    figure = Figure(figsize=(11, 8.5))
    FigureCanvasAgg(figure)
    found.draw(figure)
    figure.canvas.draw()
    return figure


def test_the_figure_has_units_a_legend_and_the_chosen_point(ridge):
    _, _, found = ridge
    figure = draw(found)
    curve, residuals, losses, slopes = figure.axes
    for axis in figure.axes:
        assert axis.get_xlabel()
        assert axis.get_ylabel()
        assert axis.get_title()
        assert axis.get_legend() is not None
        assert axis.lines
        for line in axis.lines:
            assert np.isfinite(np.asarray(line.get_xydata(), float)).all()
            assert len(line.get_xydata())
        assert np.isfinite([*axis.get_xlim(), *axis.get_ylim()]).all()
    for axis in (curve, residuals, losses, slopes):
        assert "(" in axis.get_ylabel() or "relative" in axis.get_ylabel()
    (star,) = [line for line in curve.lines if line.get_label() == "chosen"]
    np.testing.assert_allclose(star.get_xydata(), [[found.beta, found.curve.error]])
    (drawn,) = [line for line in curve.lines if line.get_label() == "error"]
    np.testing.assert_allclose(drawn.get_xydata()[:, 1], found.curve.errors)
    assert (curve.get_xscale(), curve.get_yscale()) == ("log", "log")


def test_an_unseen_meta_parameter_is_named():
    problem = cm.BilevelProblem(
        lambda w, theta, task: jnp.sum((w - theta["seen"]) ** 2),
        lambda w, theta, task: jnp.sum(w**2),
        lambda theta, task: jnp.ones(2) * theta["start"],
    )
    meta_params = {"seen": jnp.ones(2), "start": jnp.ones(())}
    estimator = cm.Contrastive(learner(), learner(), cm.forward_difference(0.01))
    found = cm.diagnose(problem, estimator, meta_params, None)
    assert found.result.unseen == ("['start']",)
    assert "Unseen meta-parameters, whose gradient is an exact zero: ['start']" in lines(found)
    assert [phase.name for phase in found.phases] == ["free", "control", "nudged"]
    assert len(found.segments) == 1


@pytest.mark.slow
def test_drift_that_is_divided_by_beta_is_named():
    """As published: the free solution itself is the other phase, and what ten more steps move it is in the contrast."""
    solver = cm.OptaxDescent(SGD, num_steps=40)
    estimator = cm.Contrastive(solver, solver, cm.forward_difference(1e-4, matched=False))
    shape = jax.tree.map(jnp.asarray, BOWL._replace(start=0.6))
    found = cm.diagnose(PROBLEM, estimator, jnp.asarray(0.5), shape)
    assert found.status == cm.Status.CONVERGED or found.rule == "drift"
    # The statistic is -w, and its contrast (0.1 0.9^40 (1 - 0.9^40) - beta * 1.5) / beta.
    left = 0.1 * 0.9**40 * (1 - 0.9**40)
    assert found.drift.statistic == pytest.approx(left / (1e-4 * abs(float(found.result.grad))), rel=0.2)
    assert found.rule == "drift"
    assert not found.matched
    assert "leave out `matched=False`" in found.advice


def test_what_cannot_be_diagnosed_is_refused():
    solver = learner()
    with pytest.raises(TypeError, match=r"expected a Contrastive estimator, got a ImplicitDifferentiation"):
        cm.diagnose(PROBLEM, cm.ImplicitDifferentiation(solver), jnp.ones(()), BOWL)
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda theta: diagnose(BOWL, theta, 0.1).error)(0.5)
    with pytest.raises(ValueError, match="must be a gradient like `meta_params`"):
        diagnose(BOWL, 0.5, 0.1, reference=jnp.ones(3))
    with pytest.raises(ValueError, match="`tolerance` must be positive"):
        diagnose(BOWL, 0.5, 0.1, tolerance=0.0)
