"""How the benchmark `sparse` selects: a grid, and searches by the contrast, by jaxopt and by sparho."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax

import contrastive_meta as cm
from benchmarks.harness import Record
from benchmarks.sparse_cases import Array, Case, Task
from benchmarks.speed_peers import imported, installed

CONTRAST, JAXOPT, SPARHO, GRID = "contrast", "jaxopt", "sparho", "grid"
NUM_STEPS = 30
# Of Adam on logarithms of hyperparameters, the same for the contrast and for jaxopt; examples/array_lasso_penalty.py
# has it too.
RATE = 0.2
# The default of `ProximalDescent`, on the norm of the fixed point's residual; jaxopt measures the same, in its own
# steps. scikit-learn's, which sparho sets, is on the duality gap: for warm starts sparho's adapter asks for 1e-8.
TOL, GAP_TOL = 1e-6, 1e-8
MAX_STEPS = 10_000


class Searched(NamedTuple):
    """What a search visited.

    Attributes:
      visited: hyperparameters, shape (steps, hyperparameters).
      statuses: of its meta-gradients, shape (steps,); None for peers, which have none.
      num_gradients: of the inner loss, shape (steps,); None for peers, which do not count them.
    """

    visited: Any
    statuses: Any = None
    num_gradients: Any = None


class Judged(NamedTuple):
    """Where learning ends at some hyperparameters.

    Attributes:
      losses: on validation data.
      num_weights: that are not 0.
    """

    losses: Any
    num_weights: Any


def grid_points(case: Case, start: Array) -> Array:
    """All points of the grid, in an order in which each is next to the one before."""
    axes = [np.linspace(*axis) for axis in case.grid]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    points: Array = start + offsets
    return points


def judge(case: Case) -> Callable[[Any, Task], Judged]:
    """Learning at one point after the other, each from where the last one ended."""
    learner = cm.ProximalDescent(case.penalty, tol=TOL, max_steps=MAX_STEPS)

    def judged(points: Any, task: Task) -> Judged:
        def learn(w: Any, s: Any) -> tuple[Any, Judged]:
            w = learner.bind(s).solve(lambda w: case.inner_loss(w, s, task), w).params
            return w, Judged(case.outer_loss(w, s, task), jnp.sum(w != 0))

        found: Judged = jax.lax.scan(learn, _zeros(task), points)[1]
        return found

    return judged


def contrast(case: Case) -> Callable[[Any, Task], Searched]:
    """Thirty steps of Adam with the default of `Contrastive`, warm starts included."""
    learner = cm.ProximalDescent(case.penalty, tol=TOL, max_steps=MAX_STEPS)
    estimator = cm.Contrastive(learner)
    problem = cm.BilevelProblem(case.inner_loss, case.outer_loss, lambda s, task: _zeros(task))

    def search(start: Any, task: Task) -> Searched:
        optimizer = optax.adam(RATE)

        def step(carry: Any, _: None) -> Any:
            s, memory, state = carry
            result = estimator.estimate(problem, s, task, state=state)
            updates, memory = optimizer.update(result.grad, memory)
            told = result.diagnostics
            visited = Searched(s, told.status, told.num_gradients)
            return (optax.apply_updates(s, updates), memory, result.state), visited

        begin = (start, optimizer.init(start), estimator.init_state(problem, start, task))
        searched: Searched = jax.lax.scan(step, begin, length=NUM_STEPS)[1]
        return searched

    return search


def by_jaxopt(case: Case) -> Callable[[Any, Task], Searched]:
    """The same steps with jaxopt's proximal gradient, differentiated implicitly with its default linear solver."""
    jaxopt = imported(JAXOPT)
    peer = case.peer
    options = {"tol": TOL, "maxiter": MAX_STEPS, "implicit_diff": True}
    if peer.is_projection:
        solver = jaxopt.ProjectedGradient(case.inner_loss, getattr(jaxopt.projection, peer.prox), **options)
    else:
        solver = jaxopt.ProximalGradient(case.inner_loss, getattr(jaxopt.prox, peer.prox), **options)

    def search(start: Any, task: Task) -> Searched:
        optimizer = optax.adam(RATE)

        def after_learning(s: Any, w: Any) -> tuple[Any, Any]:
            w = solver.run(w, peer.settings(s), s, task).params
            return case.outer_loss(w, s, task), w

        def step(carry: Any, _: None) -> Any:
            s, memory, w = carry
            grad, w = jax.grad(after_learning, has_aux=True)(s, w)
            updates, memory = optimizer.update(grad, memory)
            return (optax.apply_updates(s, updates), memory, w), Searched(s)

        searched: Searched = jax.lax.scan(step, (start, optimizer.init(start), _zeros(task)), length=NUM_STEPS)[1]
        return searched

    return search


def by_sparho(case: Case, start: Array, task: Task) -> Callable[[], Searched]:
    """The search that sparho recommends, HOAG with warm starts, by scikit-learn's coordinate descent; not traced."""
    sparho = imported(SPARHO)
    datafit, penalty, adapter = case.peer.sparho
    penalties = {"ElasticNet": lambda: sparho.ElasticNet(rho=0.5)}
    num = len(task["y"])
    # sparho's logistic loss is a sum over examples; its squares are means, as scikit-learn has them.
    scale = num if datafit == "LogisticLoss" else 1
    criterion = sparho.HeldOutLogistic if datafit == "LogisticLoss" else sparho.HeldOutMSE
    problem = sparho.Problem(
        getattr(sparho, datafit)(),
        penalties.get(penalty, getattr(sparho, penalty))(),
        np.concatenate([task["x"], task["x_val"]]),
        np.concatenate([task["y"], task["y_val"]]),
    )
    folds = ((np.arange(num, dtype=np.int32), np.arange(num, num + len(task["y_val"]), dtype=np.int32)),)
    solver = getattr(sparho.adapters, adapter)()

    def search() -> Searched:
        with warnings.catch_warnings():
            # scikit-learn's new names for its own options, and its advice on convergence.
            warnings.simplefilter("ignore")
            found = sparho.hoag_search(
                problem,
                scale * math.exp(start[0]),
                solver=solver,
                criterion=sparho.CrossVal(folds, base=criterion, warm_start=True),
                n_iter=NUM_STEPS,
                inner_tol=GAP_TOL,
            )
        return Searched(np.log([[record.hyperparam / scale] for record in found.history]))

    return search


def absent(case: Case) -> dict[str, str]:
    """Peers that have such a model and are not installed, and how to get them."""
    wanted = {JAXOPT: 'pip install ".[peers]"'} | ({SPARHO: "pip install sparho"} if case.peer.sparho else {})
    return {name: f"not installed: {how}" for name, how in wanted.items() if not installed(name)}


def read(searched: Searched, losses: npt.NDArray[Any], num_weights: npt.NDArray[Any], lowest: float) -> Record:
    """What a search comes to, against the least loss of the grid."""
    best = int(np.argmin(losses))
    close = np.flatnonzero(losses <= 1.01 * lowest)
    statuses = None
    if searched.statuses is not None:
        names = [cm.Status(int(status)).name for status in searched.statuses]
        statuses = {name: names.count(name) for name in dict.fromkeys(names)}
    return {
        "status": "",
        "losses": losses,
        "visited": searched.visited,
        "best": losses[best],
        "excess": losses[best] / lowest - 1,
        "selected": np.asarray(searched.visited)[best],
        "num_weights": num_weights[best],
        "steps_to_target": None if len(close) == 0 else int(close[0]),
        "num_steps": len(losses),
        "statuses": statuses,
        "num_gradients": None if searched.num_gradients is None else int(np.sum(searched.num_gradients)),
    }


def _zeros(task: Task) -> jax.Array:
    return jnp.zeros(task["x"].shape[1], task["x"].dtype)
