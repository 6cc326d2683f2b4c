"""Our estimators on the speed benchmark, each with a grid of budgets: free steps to go on with, and tolerances."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

import contrastive_meta as cm
from benchmarks.speed_reference import ACCURATE, COLD, UNFINISHED, Ready

FAST = "contrast, fast"
LEAN = "contrast, fast, lean"
IMPLICIT_CG = "implicit, CG"
BACKPROP = "backprop"
CHECKPOINTED = "backprop, checkpointed"
FREE_PHASE = "free phase alone"
NUDGED_LBFGS = "contrast, L-BFGS twice"
NUDGED_DESCENT = "contrast, descent twice"
# Steps of backprop's learning from the cold start.
COLD_STEPS = 1000


class Outcome(NamedTuple):
    """What a timed call returns; counts and status are None where a method does not tell.

    Attributes:
      value: outer loss.
      grad: meta-gradient.
      num_gradients: gradients of the inner loss, of one task where there are several (the mean).
      num_hvps: Hessian-vector products, likewise.
      status: the most severe.
    """

    value: Any
    grad: Any
    num_gradients: Any = None
    num_hvps: Any = None
    status: Any = None


class Point(NamedTuple):
    """A point of a method's grid: what is timed.

    Attributes:
      start: name of the start.
      method: name of the row.
      settings: of this point, in words.
      function: traceable.
      args: its arguments.
      on_host: whether it is called as it is, and not compiled.
    """

    start: str
    method: str
    settings: str
    function: Callable[..., Outcome]
    args: Sequence[Any]
    on_host: bool = False

    @property
    def key(self) -> str:
        """Unique among the points of a problem."""
        return f"{self.start} | {self.method} | {self.settings}"


Budget = tuple[int, float | None]  # free steps, tolerance of what follows


def points(ready: Ready, x64: bool) -> Iterator[Point]:
    """The grids of all our estimators that suit the problem, from all its starts."""
    for start, budgets in ((ACCURATE, _from_accurate), (UNFINISHED, _from_unfinished)):
        yield from _contrasts(ready, start, budgets)
        yield from _implicit(ready, start, budgets)
        if ready.problem.wide:
            yield from _unrolled(ready, start)
    if ready.problem.cold:
        yield from _cold(ready, x64)


def smoke_points(ready: Ready) -> Iterator[Point]:
    """Two points of each of two methods."""
    for budget in ((0, 1e-1), (0, 1e-3)):
        yield _point(ready, ACCURATE, IMPLICIT_CG, budget, _cg(_lbfgs(budget[0]), budget[1]))
        yield _point(ready, ACCURATE, FAST, budget, fast(_lbfgs(budget[0]), budget[1]))


def fast(free: cm.InnerSolver, tol: float | None) -> cm.Contrastive:
    """The contrast with the fast nudged learner, to a typed tolerance; lean, as what it is compared with."""
    scheme = cm.relative(cm.central_difference)
    return cm.Contrastive(free, nudged_solver=cm.NewtonKrylov(tol=tol), scheme=scheme, estimate_error=False)


def _from_accurate(free_steps: Sequence[int], tols: Sequence[float | None]) -> list[Budget]:
    return [(0, tol) for tol in tols]


def _from_unfinished(free_steps: Sequence[int], tols: Sequence[float | None]) -> list[Budget]:
    return [(num_steps, tol) for num_steps in free_steps for tol in tols]


def _contrasts(ready: Ready, start: str, budgets: Any) -> Iterator[Point]:
    wide, convex = ready.problem.wide, ready.problem.convex
    for budget in budgets((0, 4, 16) if convex else (0, 64, 256), ready.tolerances):
        yield _point(ready, start, FAST, budget, fast(_lbfgs(budget[0]), budget[1]))
    for budget in budgets((0, 8) if convex else (0,), (1e-1, 1e-2, 1e-3)):
        asked = cm.Contrastive(_lbfgs(budget[0]), target_error=budget[1])
        yield _point(ready, start, f"{FAST}, error asked for", budget, asked)
    schemes = {
        f"{FAST}, forward": cm.relative(cm.forward_difference),
        f"{FAST}, four-point": cm.relative(cm.four_point),
        f"{FAST}, complex step": cm.relative(cm.complex_step),
    }
    # What lies below the floor of central differences matters on networks, what a forward one leaves does not.
    for name, scheme in list(schemes.items())[0 if convex else 1 :] if wide or not convex else ():
        for budget in budgets((0, 8), (1e-1, 1e-2, 1e-4)) if convex else budgets((0, 256), (1e-3, 1e-4, 1e-5)):
            estimator = dataclasses.replace(fast(_lbfgs(budget[0]), budget[1]), scheme=scheme)
            yield _point(ready, start, name, budget, estimator)
    # One phase after another, and no program for a learner to fall back on.
    tol = ready.tolerances[2]
    alone = cm.NewtonKrylov(tol=tol, fall_back=False)
    estimator = dataclasses.replace(fast(_lbfgs(0), tol), nudged_solver=alone, sequential=True)
    yield _point(ready, start, LEAN, (0, tol), estimator)
    for num_steps in (10, 30, 100):
        nudged = cm.LBFGS(tol=0.0, max_steps=num_steps)
        estimator = cm.Contrastive(_lbfgs(0), nudged_solver=nudged)
        yield _point(ready, start, NUDGED_LBFGS, (0, None), estimator, f"{num_steps} nudged steps")
    for num_steps in (30, 100, 300) if wide else ():
        estimator = cm.Contrastive(_lbfgs(0), nudged_solver=_descent(ready, num_steps))
        yield _point(ready, start, NUDGED_DESCENT, (0, None), estimator, f"{num_steps} nudged steps")


def _implicit(ready: Ready, start: str, budgets: Any) -> Iterator[Point]:
    wide, floor = ready.problem.wide, ready.problem.floor
    for budget in budgets(ready.free_steps, ready.tolerances):
        yield _point(ready, start, IMPLICIT_CG, budget, _cg(_lbfgs(budget[0]), budget[1]))
    if start == UNFINISHED and ready.problem.convex:
        for budget in budgets((8, 16, 32, 64), ready.tolerances[:-1]):
            estimator = _cg(_descent(ready, budget[0]), budget[1])
            yield _point(ready, start, IMPLICIT_CG, budget, estimator, f"{budget[0]} steps of descent first")
    if not wide:
        return
    for budget in budgets((16, 48), (None,)):
        for num_terms in (30, 100, 300):
            inverse = cm.NeumannSeries(step_size=1 / ready.curvature, num_terms=num_terms)
            estimator = cm.ImplicitDifferentiation(_lbfgs(budget[0]), inverse, estimate_error=False)
            yield _point(ready, start, "implicit, Neumann", budget, estimator, f"{num_terms} terms")
    for budget in budgets((48,), (None,)):
        for rank in (min(100, 4 * ready.num_params // 5),):
            nystrom = cm.Nystrom(rank=rank, damping=3 * floor)
            yield _point(
                ready,
                start,
                "implicit, Nystrom",
                budget,
                cm.ImplicitDifferentiation(_lbfgs(budget[0]), nystrom, estimate_error=False),
                f"rank {rank}",
            )
        if ready.num_params <= 1000:
            dense = cm.ImplicitDifferentiation(_lbfgs(budget[0]), cm.DenseInverse(), estimate_error=False)
            yield _point(ready, start, "implicit, dense", budget, dense)


def _unrolled(ready: Ready, start: str) -> Iterator[Point]:
    for num_steps in (30, 100, 300):
        learner = _descent_for(ready, num_steps)
        words = f"{num_steps} steps from the start"
        yield _point(ready, start, BACKPROP, (num_steps, None), cm.BackpropThroughLearning(learner), words)
    learner = _descent_for(ready, 300)
    words = "300 steps from the start"
    estimator = cm.BackpropThroughLearning(learner, checkpoint=True)
    yield _point(ready, start, CHECKPOINTED, (300, None), estimator, words)
    estimator = cm.BackpropThroughLearning(learner, truncate=100)
    yield _point(ready, start, "backprop, truncated", (300, None), estimator, words + ", the last 100 differentiated")


def _cold(ready: Ready, x64: bool) -> Iterator[Point]:
    """The same learning for all: so many steps of descent, and descent and L-BFGS until the gradient norm fell."""
    fixed = _descent_for(ready, COLD_STEPS)
    words = f"{COLD_STEPS} steps of descent"
    truncated = cm.BackpropThroughLearning(fixed, truncate=COLD_STEPS // 10)
    yield _point(ready, COLD, BACKPROP, (COLD_STEPS, None), cm.BackpropThroughLearning(fixed), words)
    yield _point(ready, COLD, "backprop, truncated", (COLD_STEPS, None), truncated, f"{words}, a tenth differentiated")
    checkpointed = cm.BackpropThroughLearning(fixed, checkpoint=True)
    yield _point(ready, COLD, CHECKPOINTED, (COLD_STEPS, None), checkpointed, words)
    drop = 1e-5 if x64 else 1e-4
    tol = drop * ready.first_residual
    learners: dict[str, cm.InnerSolver] = {
        words: fixed,
        f"descent until the gradient fell by {drop:g}": cm.OptaxDescent(_nesterov(ready), tol=tol, max_steps=20_000),
        f"L-BFGS until the gradient fell by {drop:g}": cm.LBFGS(tol=tol, max_steps=2000),
    }
    for name, learner in learners.items():
        yield Point(COLD, FREE_PHASE, name, _learn, (learner, ready.losses, ready.meta_params, ready.tasks[COLD]))
        for linear_tol in (1e-2, 1e-3, 1e-4):
            settings = f"{name}, tolerance {linear_tol:g}"
            yield _point(ready, COLD, IMPLICIT_CG, (0, linear_tol), _cg(learner, linear_tol), settings)
            yield _point(ready, COLD, FAST, (0, linear_tol), fast(learner, linear_tol), settings)


def _point(
    ready: Ready, start: str, method: str, budget: Budget, estimator: cm.MetaGradientEstimator, words: str = ""
) -> Point:
    free, tol = budget
    default = f"{free} free steps" + ("" if tol is None else f", tolerance {tol:g}")
    settings = words if start == COLD or "steps from" in words else f"{default}{', ' if words else ''}{words}"
    function = estimate_batch if ready.problem.batched else estimate
    return Point(start, method, settings, function, (estimator, ready.losses, ready.meta_params, ready.tasks[start]))


def _lbfgs(num_steps: int) -> cm.LBFGS:
    """So many steps; a tolerance that is never met."""
    return cm.LBFGS(tol=0.0, max_steps=num_steps)


def _descent(ready: Ready, num_steps: int) -> cm.OptaxDescent:
    """So many steps, as data: all numbers of steps share a program."""
    return cm.OptaxDescent(_nesterov(ready), tol=0.0, max_steps=num_steps)


def _descent_for(ready: Ready, num_steps: int) -> cm.OptaxDescent:
    """So many steps, known when compiled, as backprop needs it."""
    return cm.OptaxDescent(_nesterov(ready), num_steps=num_steps)


def _nesterov(ready: Ready) -> optax.GradientTransformation:
    return nesterov(1 / ready.curvature, ready.momentum)


@functools.cache
def nesterov(step_size: float, momentum: float) -> optax.GradientTransformation:
    """Descent with momentum; the same object for the same settings, so that seeds share programs."""
    return optax.sgd(step_size, momentum=momentum, nesterov=True)


def _cg(free: cm.InnerSolver, tol: float | None) -> cm.ImplicitDifferentiation:
    return cm.ImplicitDifferentiation(free, cm.ConjugateGradient(tol=tol), estimate_error=False)


def estimate(estimator: cm.MetaGradientEstimator, problem: cm.BilevelProblem, meta_params: Any, task: Any) -> Outcome:
    """What is timed of our estimators, for a single task."""
    result = estimator.estimate(problem, meta_params, task)
    told = result.diagnostics
    return Outcome(result.outer_loss, result.grad, told.num_gradients, told.num_hvps, told.status)


def estimate_batch(
    estimator: cm.MetaGradientEstimator, problem: cm.BilevelProblem, meta_params: Any, tasks: Any
) -> Outcome:
    """What is timed of our estimators, for a batch of tasks."""
    (value, told), grad = cm.value_and_meta_grad(problem, estimator, has_aux=True)(meta_params, tasks)
    means = [jax.numpy.mean(count) for count in (told.num_gradients, told.num_hvps)]
    return Outcome(value, grad, means[0], means[1], jax.numpy.max(told.status))


def _learn(solver: cm.InnerSolver, problem: cm.BilevelProblem, meta_params: Any, task: Any) -> Outcome:
    """Learning and the outer loss; zero for a meta-gradient."""
    with jax.default_matmul_precision("highest"):  # as the estimators do
        found = solver.solve(lambda at: problem.inner(at, meta_params, task), problem.init(meta_params, task))
        value = problem.outer(found.params, meta_params, task)
    return Outcome(value, jax.tree.map(jax.numpy.zeros_like, meta_params), found.num_gradients, 0, found.status)
