"""Pairs of docs/coming_from.md, run where the other library is installed: both sides give one gradient."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import contrastive_meta as cm

# jaxopt says at import that it is no longer maintained.
pytestmark = pytest.mark.filterwarnings("ignore")

X = jax.random.normal(jax.random.key(0), (20, 3), float)
Y = X @ jnp.array([2.0, -1.0, 0.5])
START, LOG_STRENGTH = jnp.zeros(3), jnp.array(-2.0)


def ridge(w: Any, log_strength: Any, task: Any = None) -> Any:
    return 0.5 * jnp.mean((X @ w - Y) ** 2) + 0.5 * jnp.exp(log_strength) * jnp.sum(w**2)


def smooth(w: Any, log_strength: Any, task: Any = None) -> Any:
    return 0.5 * jnp.mean((X @ w - Y) ** 2)


def jaxopt_lbfgs(s: Any) -> Any:
    import jaxopt

    return jaxopt.LBFGS(ridge, implicit_diff=True, tol=1e-10, maxiter=200).run(START, s).params


def jaxopt_lasso(s: Any) -> Any:
    import jaxopt

    solver = jaxopt.ProximalGradient(smooth, jaxopt.prox.prox_lasso, tol=1e-10, maxiter=2000)
    return solver.run(START, hyperparams_prox=jnp.exp(s), log_strength=s).params


def optimistix_bfgs(s: Any) -> Any:
    import optimistix

    return optimistix.minimise(ridge, optimistix.BFGS(rtol=1e-10, atol=1e-10), START, s).value


OURS = cm.argmin(ridge, cm.LBFGS(), init=START, adjoint=cm.ImplicitAdjoint())
OUR_LASSO = cm.argmin(
    smooth, cm.ProximalDescent(cm.prox.l1(jnp.exp), tol=1e-10), init=START, adjoint=cm.ImplicitAdjoint()
)


@pytest.mark.parametrize(
    ("library", "theirs", "ours"),
    [("jaxopt", jaxopt_lbfgs, OURS), ("jaxopt", jaxopt_lasso, OUR_LASSO), ("optimistix", optimistix_bfgs, OURS)],
    ids=["jaxopt LBFGS", "jaxopt ProximalGradient", "optimistix BFGS"],
)
def test_both_sides_of_a_pair_give_one_gradient(library: str, theirs: Callable[[Any], Any], ours: Any) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f'{library} is not installed: pip install ".[peers]"')
    their_slope = float(jax.grad(lambda s: jnp.sum(theirs(s) ** 2))(LOG_STRENGTH))
    our_slope = float(jax.grad(lambda s: jnp.sum(ours(s, None) ** 2))(LOG_STRENGTH))
    # Both solve to 1e-10 or better; their linear solvers end at 1e-5 by default.
    assert abs(their_slope - our_slope) < 1e-4 * abs(our_slope)
