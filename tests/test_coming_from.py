"""Pairs of docs/coming_from.md, run where the other library is installed: both sides give one gradient."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


# The pairs of PyTorch's libraries. Ten steps of descent are far from the minimum, so that what is compared is the
# derivative of the steps; the implicit ones start at the minimum. `hypergrad` is what hypertorch's package is called.
RATE, STEPS = 0.5, 10
PROBLEM = cm.BilevelProblem(ridge, lambda w, s, task: jnp.sum(w**2), lambda s, task: START)
OF_THE_START = cm.BilevelProblem(
    lambda w, start, task: smooth(w, None), lambda w, start, task: jnp.sum(w**2), lambda start, task: start
)
DESCENT = cm.OptaxDescent(optax.sgd(RATE), num_steps=STEPS)
MINIMISER = cm.LBFGS(tol=1e-10)


class Torch:
    """`ridge` in PyTorch, its learner and its minimum."""

    def __init__(self) -> None:
        self.torch = importlib.import_module("torch")
        self.x, self.y, self.start = (self.torch.from_numpy(np.array(array)) for array in (X, Y, START))
        self.s = self.torch.tensor(float(LOG_STRENGTH), dtype=self.x.dtype, requires_grad=True)

    def loss(self, w: Any, s: Any = None) -> Any:
        fit = 0.5 * self.torch.mean((self.x @ w - self.y) ** 2)
        return fit if s is None else fit + 0.5 * self.torch.exp(s) * self.torch.sum(w**2)

    def step(self, w: Any, s: Any) -> Any:
        return w - RATE * self.torch.autograd.grad(self.loss(w, s), w, create_graph=True)[0]

    def minimum(self) -> Any:
        normal = self.x.T @ self.x / len(self.x) + self.torch.exp(self.s.detach()) * self.torch.eye(
            3, dtype=self.x.dtype
        )
        return self.torch.linalg.solve(normal, self.x.T @ self.y / len(self.x)).requires_grad_()

    def slope(self, w: Any) -> Any:
        return self.torch.autograd.grad(self.torch.sum(w**2), self.s)[0]


def with_higher(t: Torch) -> Any:
    higher = importlib.import_module("higher")
    model = t.torch.nn.ParameterList([t.torch.nn.Parameter(t.start.clone())])
    with higher.innerloop_ctx(model, t.torch.optim.SGD(model.parameters(), lr=RATE)) as (functional, optimizer):
        for _ in range(STEPS):
            optimizer.step(t.loss(functional[0], t.s))
        return t.slope(functional[0])


def with_torchopt_steps(t: Torch) -> Any:
    torchopt = importlib.import_module("torchopt")
    model = t.torch.nn.Module()
    model.w = t.torch.nn.Parameter(t.start.clone())
    optimizer = torchopt.MetaSGD(model, lr=RATE)
    for _ in range(STEPS):
        optimizer.step(t.loss(model.w, t.s))
    return t.slope(model.w)


def with_torchopt_root(t: Torch) -> Any:
    torchopt = importlib.import_module("torchopt")
    root = torchopt.diff.implicit.custom_root(
        t.torch.func.grad(t.loss), argnums=1, solve=torchopt.linear_solve.solve_cg(rtol=1e-10, maxiter=100)
    )
    return t.slope(root(lambda w, s: t.minimum().detach())(t.start.clone().requires_grad_(), t.s))


def with_hypergrad(name: str) -> Callable[[Torch], Any]:
    def slope(t: Torch) -> Any:
        estimate = getattr(importlib.import_module("hypergrad"), name)
        step, outer = lambda ws, ss: [t.step(ws[0], ss[0])], lambda ws, ss: t.torch.sum(ws[0] ** 2)
        if name == "reverse_unroll":
            w = [t.start.clone().requires_grad_()]
            for _ in range(STEPS):
                w = step(w, [t.s])
            return estimate(w, [t.s], outer, set_grad=False)[0]
        # Its CG returns the iterate before the one at which it stops by tolerance: three steps, as many as unknowns.
        return estimate([t.minimum()], [t.s], 3 if name == "CG" else 500, step, outer, tol=0.0, set_grad=False)[0]

    return slope


def with_learn2learn(first_order: bool) -> Callable[[Torch], Any]:
    def gradient(t: Torch) -> Any:
        learn2learn = importlib.import_module("learn2learn")
        model = t.torch.nn.Module()
        model.w = t.torch.nn.Parameter(t.start.clone())
        learner = learn2learn.algorithms.MAML(model, lr=RATE, first_order=first_order).clone()
        for _ in range(STEPS):
            learner.adapt(t.loss(learner.module.w))
        return t.torch.autograd.grad(t.torch.sum(learner.module.w**2), model.w)[0]

    return gradient


THROUGH_STEPS = cm.BackpropThroughLearning(DESCENT)
IMPLICIT = cm.ImplicitDifferentiation(MINIMISER, cm.ConjugateGradient(tol=1e-10))
NEUMANN = cm.ImplicitDifferentiation(MINIMISER, cm.NeumannSeries(num_terms=500, step_size=RATE))


@pytest.mark.parametrize(
    ("library", "theirs", "problem", "estimator"),
    [
        pytest.param("higher", with_higher, PROBLEM, THROUGH_STEPS, id="higher innerloop_ctx"),
        pytest.param("torchopt", with_torchopt_steps, PROBLEM, THROUGH_STEPS, id="torchopt MetaSGD"),
        pytest.param("torchopt", with_torchopt_root, PROBLEM, IMPLICIT, id="torchopt custom_root"),
        pytest.param("hypergrad", with_hypergrad("CG"), PROBLEM, IMPLICIT, id="hypertorch CG"),
        pytest.param("hypergrad", with_hypergrad("fixed_point"), PROBLEM, NEUMANN, id="hypertorch fixed_point"),
        pytest.param("hypergrad", with_hypergrad("reverse_unroll"), PROBLEM, THROUGH_STEPS, id="hypertorch unroll"),
        pytest.param("learn2learn", with_learn2learn(False), OF_THE_START, THROUGH_STEPS, id="learn2learn MAML"),
        pytest.param(
            "learn2learn", with_learn2learn(True), OF_THE_START, cm.FirstOrder(DESCENT), id="learn2learn first_order"
        ),
    ],
)
def test_a_pair_of_pytorch_gives_one_gradient(
    library: str, theirs: Callable[[Torch], Any], problem: cm.BilevelProblem, estimator: cm.MetaGradientEstimator
) -> None:
    for name in ("torch", library):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed: pip install ".[peers-torch]" has some of them')
    meta_params = START if problem is OF_THE_START else LOG_STRENGTH
    ours = np.asarray(estimator.estimate(problem, meta_params, None).grad)
    np.testing.assert_allclose(ours, theirs(Torch()).numpy(), rtol=1e-7)
    assert np.max(np.abs(ours)) > 1e-3, "a gradient of zero would agree with anything"
