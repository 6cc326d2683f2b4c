"""The four bilevel problems on real data, their learners' settings and their exact meta-gradients in float64."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import contrastive_meta as cm
from benchmarks import data
from benchmarks.harness import Session, Vector, flatten, precision
from benchmarks.methods import BASICS, CHECKPOINTED, FINITE_DIFFERENCES, NYSTROM, Tuning

Instance = cm.problems.ProblemInstance


class Case(NamedTuple):
    """A problem on real data.

    Attributes:
      name: short.
      title: what is learned from what.
      build: the problem in JAX's current precision.
      floor: strength of the penalty at the start: the curvature in directions of which the data say nothing.
      num_steps: of the learner.
      convex: whether the solution is unique; then step size and momentum follow from the curvature.
      methods: names of the rows; empty for all.
      left_out: which estimators are left out, and why.
      repeats: timed rounds.
    """

    name: str
    title: str
    build: Callable[[Session], Instance]
    floor: float
    num_steps: int
    convex: bool = True
    methods: Sequence[str] = ()
    left_out: str = ""
    repeats: int = 5


class Prepared(NamedTuple):
    """A case with its numbers.

    Attributes:
      instance: in the working precision.
      tuning: settings that follow from its curvature.
      reference: the meta-gradient in float64, flat.
      reference_text: what the reference is.
      converged: whether the reference vouches for itself.
    """

    instance: Instance
    tuning: Tuning
    reference: Vector
    reference_text: str
    converged: bool


class WarmTask(NamedTuple):
    """Data, and where learning starts."""

    data: Any
    start: Any


def _ridge(session: Session) -> Instance:
    return cm.problems.ridge(*data.diabetes(session.seed), strength=RIDGE.floor)


def _logistic(session: Session) -> Instance:
    return cm.problems.logistic_regression(*data.breast_cancer(session.seed), strength=LOGISTIC.floor)


def _cleaning(session: Session) -> Instance:
    num = 60 if session.smoke else 500
    split = data.digits(session.seed, num, num)
    with precision(False):  # JAX draws other numbers in float64: the same labels must be wrong in both
        key = jax.random.key(session.seed)
        noisy = np.asarray(cm.problems.corrupt_labels(key, split.y_train, num_classes=10, fraction=0.5))
    return cm.problems.data_cleaning(
        split.x_train, noisy, split.x_val, split.y_val, num_classes=10, decay=CLEANING.floor
    )


def _mlp(session: Session) -> Instance:
    """The network with a start of its own: the solution for strengths that are a fifth smaller.

    A non-convex loss has many minima, each with a meta-gradient, so a comparison must hold all estimators to one
    basin. Starting near it is also what an outer loop does from its second step on.
    """
    num, width = (60, 3) if session.smoke else (300, 8)
    cold = cm.problems.mlp_strengths(
        *data.digits(session.seed, num, num),
        num_classes=10,
        widths=(width,),
        key=jax.random.key(session.seed),
        strength=MLP.floor,
    )
    problem = started_by_task(cold.problem)
    with precision(True):
        weaker, task = jax.tree.map(lambda strength: strength - 0.2, upcast(cold.meta_params)), upcast(cold.task)
        # The same program as the reference's: compiled once.
        start = _learn_and_differentiate(problem, weaker, WarmTask(task, cold.problem.init(weaker, task))).params
    dtype = cold.task.x_train.dtype
    start = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), dtype), start)
    return Instance(problem, cold.meta_params, WarmTask(cold.task, start), exact=None)


@functools.cache
def started_by_task(losses: cm.BilevelProblem) -> cm.BilevelProblem:
    """The same losses, with learning started from where the task says."""
    return cm.BilevelProblem(
        inner_loss=lambda params, meta_params, task: losses.inner(params, meta_params, task.data),
        outer_loss=lambda params, meta_params, task: losses.outer(params, meta_params, task.data),
        init_params=lambda meta_params, task: task.start,
    )


_LEFT_OUT = (
    "Left out: finite differences and evolution strategies, whose number of learnings grows with the {} "
    "meta-parameters; rows that tell nothing beyond the first table (`methods.py` has them all)."
)

RIDGE = Case(
    "ridge",
    "Ridge regression on diabetes: a log-strength per weight",
    _ridge,
    floor=0.1,
    num_steps=300,
)
LOGISTIC = Case(
    "breast cancer",
    "Logistic regression on breast cancer: a log-strength per weight",
    _logistic,
    floor=0.1,
    num_steps=300,
    methods=(*BASICS, FINITE_DIFFERENCES),
    left_out="Left out: rows that tell nothing beyond the first table (`methods.py` has them all).",
)
CLEANING = Case(
    "data cleaning",
    "Data cleaning on digits, half of the labels wrong: a weight per training example",
    _cleaning,
    floor=1e-2,
    num_steps=400,
    methods=(*BASICS, NYSTROM),
    left_out=_LEFT_OUT.format(500),
    repeats=3,
)
MLP = Case(
    "tanh MLP",
    "Tanh MLP on digits: a log-strength per synapse",
    _mlp,
    floor=1e-2,
    num_steps=600,
    convex=False,
    methods=(*BASICS, CHECKPOINTED),
    left_out=_LEFT_OUT.format(610),
    repeats=3,
)
CASES = (RIDGE, LOGISTIC, CLEANING, MLP)


def prepare(case: Case, session: Session, x64: bool) -> Prepared:
    """Build a case in the working precision, and its reference in float64 from the very same (rounded) numbers."""
    with precision(x64):
        instance = case.build(session)
        init = instance.problem.init(instance.meta_params, instance.task)
    with precision(True):
        meta_params, task = upcast(instance.meta_params), upcast(instance.task)
        if instance.exact is not None:
            exact = instance.exact(meta_params, task)
            grad, params, converged = exact.grad, exact.params, bool(exact.converged)
            smallest = float(exact.min_eigenvalue)
            text = "exact meta-gradient: Newton and a dense solve in float64"
        else:
            learned = _learn_and_differentiate(instance.problem, meta_params, task)
            grad, params, smallest = learned.grad, learned.params, None
            converged = cm.Status(int(learned.diagnostics.status)) == cm.Status.CONVERGED
            text = "L-BFGS from the same start to a gradient of 1e-10 and implicit CG to 1e-10, in float64"
        points = (upcast(init), params)
        curvature = 1.1 * max(float(largest_curvature(instance.problem, at, meta_params, task)) for at in points)
        reference = flatten(grad)
    # No theory for the network: 1e-3 is the order of its smallest curvature.
    root = (curvature / (smallest or 1e-3)) ** 0.5
    tuning = Tuning(
        step_size=1 / curvature,
        momentum=(root - 1) / (root + 1),
        num_steps=max(20, case.num_steps // 10) if session.smoke else case.num_steps,
        largest_curvature=curvature,
        floor=case.floor,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(init)),
        num_meta=sum(leaf.size for leaf in jax.tree.leaves(instance.meta_params)),
    )
    return Prepared(instance, tuning, reference, text, converged)


def _learn_and_differentiate(problem: cm.BilevelProblem, meta_params: Any, task: Any) -> cm.MetaGradient:
    estimator = cm.ImplicitDifferentiation(cm.LBFGS(tol=1e-10, max_steps=5000), cm.ConjugateGradient(max_steps=5000))
    return estimator.estimate(problem, meta_params, task)


def upcast(values: Any) -> Any:
    """Floating leaves in float64, the others (labels, keys) as they are."""

    def convert(leaf: Any) -> Any:
        return jnp.asarray(np.asarray(leaf), jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(convert, values)


@jax.jit
def largest_curvature(problem: cm.BilevelProblem, params: Any, meta_params: Any, task: Any) -> jax.Array:
    """Largest eigenvalue of the inner Hessian, by power iteration."""
    flat, unravel = ravel_pytree(params)
    grad = jax.grad(lambda at: problem.inner(unravel(at), meta_params, task))

    def multiply(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        vector, _ = carry
        product = jax.jvp(grad, (flat,), (vector,))[1]
        length = jnp.linalg.norm(product)
        return product / length, length

    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    begin = (start / jnp.linalg.norm(start), jnp.zeros((), flat.dtype))
    largest: jax.Array = jax.lax.fori_loop(0, 60, multiply, begin)[1]
    return largest
