"""Published bilevel problems: the default contrast is right at the published points, or says that it is not."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import contrastive_meta as cm
from tests.bolib_problems import PROBLEMS, Published

# Any status up to this one passes `raise_if_failed`.
PASSES = cm.Status.TARGET_NOT_REACHED
REGULAR = [name for name, problem in PROBLEMS.items() if problem.slope is None]
# Learning starts that far from the solution in every unknown, and upper unknowns are moved that far at most.
AWAY, MOVED = 0.05, 0.02


class Terms(NamedTuple):
    """What a hypergradient is made of.

    Attributes:
      solution: of the lower level.
      direct: partial derivative of the upper objective.
      indirect: that by way of the solution, from the implicit function theorem.
    """

    solution: Any
    direct: Any
    indirect: Any


def solve(problem: Published, x: Any) -> Any:
    """The lower solution next to the published one, by Newton's method with the exact Hessian."""
    y = jnp.array(problem.y)
    # Digits double at each step: from the 3 that are printed to 16 in 3, and from the starts here in 6.
    for _ in range(10 if problem.slope is None else 0):
        y = y - jnp.linalg.solve(jax.hessian(problem.lower, 1)(x, y), jax.grad(problem.lower, 1)(x, y))
    return y


def exactly(problem: Published, x: Any) -> Terms:
    """By exact dense Hessians, or by the slope that is known where the Hessian is zero."""
    y = solve(problem, x)
    by_x, by_y = jax.grad(problem.upper, (0, 1))(x, y)
    if problem.slope is not None:
        return Terms(y, by_x, problem.slope * by_y)
    mixed = jax.jacobian(jax.grad(problem.lower, 1), 0)(x, y)
    return Terms(y, by_x, -jnp.linalg.solve(jax.hessian(problem.lower, 1)(x, y), by_y) @ mixed)


@functools.cache
def estimator(upper_size: int, lower_size: int) -> Callable[..., cm.MetaGradient]:
    """The default for all problems of these sizes: which one is the task, so that a single program is compiled."""
    alike = [problem for problem in PROBLEMS.values() if (len(problem.x), len(problem.y)) == (upper_size, lower_size)]
    uppers, lowers = ([getattr(problem, which) for problem in alike] for which in ("upper", "lower"))
    problem = cm.BilevelProblem(
        lambda y, x, task: jax.lax.switch(task["number"], lowers, x, y),
        lambda y, x, task: jax.lax.switch(task["number"], uppers, x, y),
        lambda x, task: task["start"],
    )
    return jax.jit(lambda x, task: cm.Contrastive(cm.LBFGS(tol=1e-8)).estimate(problem, x, task))


def estimate(name: str, x: Any) -> cm.MetaGradient:
    """From a start near the published solution, so that of several minima it is the one meant."""
    problem = PROBLEMS[name]
    sizes = len(problem.x), len(problem.y)
    alike = [other for other, its in PROBLEMS.items() if (len(its.x), len(its.y)) == sizes]
    return estimator(*sizes)(x, {"number": alike.index(name), "start": jnp.array(problem.y) + AWAY})


def error_of(result: cm.MetaGradient, terms: Terms) -> float:
    """Over the norms of the direct and of the indirect term; the error itself where both are zero."""
    size = float(jnp.linalg.norm(terms.direct) + jnp.linalg.norm(terms.indirect))
    return float(jnp.linalg.norm(result.grad - terms.direct - terms.indirect)) / (size or 1.0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_published_point_is_a_free_minimum(name: str) -> None:
    problem = PROBLEMS[name]
    x = jnp.array(problem.x)
    y = solve(problem, x)
    assert jnp.max(jnp.abs(jax.grad(problem.lower, 1)(x, y))) < 1e-8
    assert jnp.max(jnp.abs(y - jnp.array(problem.y))) <= problem.rounding
    curvature = jnp.linalg.eigvalsh(jax.hessian(problem.lower, 1)(x, y))
    assert jnp.all(curvature > 0.05) if problem.slope is None else jnp.all(curvature == 0)
    assert jnp.all(problem.constraints(x, y) < -1e-2)
    assert 1 <= y.size <= 10
    if problem.values is not None:
        # Published to two decimals, some cut off, and to five digits.
        found = [problem.upper(x, y), problem.lower(x, y)]
        np.testing.assert_allclose(found, problem.values, rtol=2e-5, atol=1e-2)


@pytest.mark.parametrize("name", REGULAR)
def test_the_default_is_right(name: str) -> None:
    """To 1e-6 at the published point, and at one next to it, where no term vanishes."""
    problem = PROBLEMS[name]
    for moved in (0.0, MOVED):
        x = jnp.array(problem.x) + moved * jnp.cos(jnp.arange(len(problem.x)))
        result, terms = estimate(name, x), exactly(problem, x)
        assert jnp.all(problem.constraints(x, terms.solution) < 0)
        assert error_of(result, terms) < 1e-6, (moved, result.grad, terms)
        assert int(result.diagnostics.status) <= PASSES, cm.Status(int(result.diagnostics.status))


# In Example 3.12 both the solution and the curvature there go to zero as learning goes on, and their quotient does not.
@pytest.mark.parametrize("name", ["Colson2002BIPA1", "ShimizuEtal1997b", "MitsosBarton2006Ex312"])
def test_a_solution_without_curvature_is_right_or_flagged(name: str) -> None:
    """The implicit function theorem says nothing there: the status vouches for no wrong number."""
    problem = PROBLEMS[name]
    x = jnp.array(problem.x)
    result = estimate(name, x)
    vouched = result.diagnostics.status <= cm.Status.FELL_BACK
    assert not vouched or error_of(result, exactly(problem, x)) < 1e-6, (result.grad, result.diagnostics)


def test_the_suite_is_large_enough() -> None:
    assert len(REGULAR) >= 25
