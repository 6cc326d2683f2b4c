"""What the tests compare with: finite differences of the whole of learning, and small problems that are solved."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from contrastive_meta import BilevelProblem, NewtonKrylov, OptaxDescent, problems
from contrastive_meta.problems import ExactMetaGradient, ProblemInstance

PyTree = Any
# Stays where it starts: what is measured is the nudged learner alone.
STILL = OptaxDescent(optax.sgd(0.0), num_steps=1)
# The fast learner without the phases in reserve. Where the default is `CONVERGED` they never ran, and a test that asks
# for that status does not have to compile them, which takes as long as all the rest.
ALONE = NewtonKrylov(fall_back=False)


class SmallProblem(NamedTuple):
    """A problem with 5 to 30 parameters, off its symmetric starting point, and its answer.

    Attributes:
      name: a key of `SMALL_PROBLEMS`.
      problem: the losses.
      meta_params: pytree in the dtype asked for.
      task: one task, in the dtype asked for.
      params: the converged free solution, found in float64 (to a gradient norm below 1e-13) and rounded to the dtype
        asked for; where there are several minima, the one meant.
      exact: the answer in float64, at `params` before rounding.
      convex: whether the inner loss is strongly convex, so that every learner ends at `params`.
    """

    name: str
    problem: BilevelProblem
    meta_params: PyTree
    task: PyTree
    params: PyTree
    exact: ExactMetaGradient
    convex: bool


def _classification(key: jax.Array, num_classes: int, dtype: Any) -> problems.SplitData:
    return problems.classification_data(key, 20, 20, 4, num_classes, separation=1.5, dtype=dtype)


def _quadratic(key: jax.Array, dtype: Any) -> ProblemInstance:
    return problems.quadratic(key, dim=6, num_meta=3, condition_number=10.0, dtype=dtype)


def _ridge(key: jax.Array, dtype: Any) -> ProblemInstance:
    return problems.ridge(*problems.ridge_data(key, 20, 20, 8, 4, dtype=dtype))


def _ridge_shared(key: jax.Array, dtype: Any) -> ProblemInstance:
    return problems.ridge(*problems.ridge_data(key, 20, 20, 8, 4, dtype=dtype), shared=True)


def _logistic(key: jax.Array, dtype: Any) -> ProblemInstance:
    return problems.logistic_regression(*_classification(key, 2, dtype))


def _softmax(key: jax.Array, dtype: Any) -> ProblemInstance:
    return problems.softmax_regression(*_classification(key, 3, dtype), num_classes=3)


def _data_cleaning(key: jax.Array, dtype: Any) -> ProblemInstance:
    noisy = problems.corrupted_data(key, 20, 20, 4, num_classes=3, fraction=0.5, dtype=dtype)
    return problems.data_cleaning(*noisy.split, num_classes=3, decay=0.05)


def _mlp(key: jax.Array, dtype: Any) -> ProblemInstance:
    data = _classification(key, 3, dtype)
    return problems.mlp_strengths(*data, num_classes=3, widths=(3,), key=jax.random.fold_in(key, 1), strength=0.1)


def _sinusoids(key: jax.Array, dtype: Any) -> ProblemInstance:
    batch = problems.sinusoids(key, num_tasks=1, widths=(3, 2), strength=5.0, dtype=dtype)
    return batch._replace(task=jax.tree.map(lambda x: x[0], batch.task))


SMALL_PROBLEMS: dict[str, Callable[[jax.Array, Any], ProblemInstance]] = {
    "quadratic": _quadratic,
    "ridge": _ridge,
    "ridge_shared": _ridge_shared,
    "logistic": _logistic,
    "softmax": _softmax,
    "data_cleaning": _data_cleaning,
    "mlp": _mlp,
    "sinusoids": _sinusoids,
}


@functools.cache
def small_instance(name: str, seed: int) -> ProblemInstance:
    """One of `SMALL_PROBLEMS` in float64; `small_problem` takes seeds from 1 on."""
    build, exact = _builder(name)
    instance: ProblemInstance = build(jax.random.key(seed))
    return instance._replace(exact=exact[0])


@functools.cache
def _builder(name: str) -> tuple[Callable[[jax.Array], ProblemInstance], list[Any]]:
    """The constructor compiled whole, for otherwise each of its operations would be; and its `exact`."""
    exact: list[Any] = []  # a function of its arguments alone, so it may leave the trace

    def build(key: jax.Array) -> ProblemInstance:
        instance = SMALL_PROBLEMS[name](key, jnp.float64)
        exact.append(instance.exact)
        return instance._replace(exact=None)

    return jax.jit(build), exact


@functools.cache
def small_problem(name: str, dtype: Any = jnp.float64) -> SmallProblem:
    """One of `SMALL_PROBLEMS`, solved. The float32 instance is the float64 one, rounded before it is solved."""
    seed = 1 + list(SMALL_PROBLEMS).index(name)
    instance = small_instance(name, seed)
    # Every meta-parameter its own value: symmetric ones would hide a permuted gradient.
    noise = np.random.default_rng(seed)
    moved = jax.tree.map(lambda x: x + 0.3 * noise.standard_normal(x.shape), instance.meta_params)
    meta_params, task = cast(moved, dtype), cast(instance.task, dtype)
    exact = problems.exact_meta_gradient(instance.problem, cast(meta_params, jnp.float64), cast(task, jnp.float64))
    assert exact.converged, f"{name}: no strict minimum found: {exact}"
    params = cast(exact.params, dtype)
    return SmallProblem(name, instance.problem, meta_params, task, params, exact, convex=instance.exact is not None)


def small_problems(dtype: Any = jnp.float64) -> list[SmallProblem]:
    """All of `SMALL_PROBLEMS`, solved. To parametrise tests, use the names: solving takes a second each."""
    return [small_problem(name, dtype) for name in SMALL_PROBLEMS]


def double_well() -> BilevelProblem:
    """Minima near -1 and 1, where the curvature is 8 and dw/dtheta = -1/8; the task is where learning starts."""
    return BilevelProblem(
        inner_loss=lambda w, theta, task: jnp.sum((w**2 - 1.0) ** 2) + theta * jnp.sum(w),
        outer_loss=lambda w, theta, task: jnp.sum((w - 0.5) ** 2),
        init_params=lambda theta, task: jnp.full(2, task),
    )


def low_curvature() -> tuple[BilevelProblem, jax.Array, jax.Array]:
    """A problem, its solution and its meta-gradient at 1, 3/4 of which shows in 3e-4 of the nudge.

    In a single direction of 41 the curvature is 1e-4. The task is where learning starts.
    """
    curvature = jnp.append(jnp.linspace(0.5, 1.5, 40), 1e-4)
    nudge, force = (jnp.append(jnp.full(40, 40**-0.5), low) for low in (3e-4, 1.0))
    problem = BilevelProblem(
        inner_loss=lambda w, theta, task: 0.5 * jnp.sum(curvature * w**2) - theta * jnp.sum(force * w),
        outer_loss=lambda w, theta, task: jnp.sum(nudge * w),
        init_params=lambda theta, task: task,
    )
    return problem, force / curvature, jnp.sum(nudge * force / curvature)


def started_at(problem: BilevelProblem, params: PyTree) -> BilevelProblem:
    """The same problem, learning from `params`."""
    return BilevelProblem(problem.inner_loss, problem.outer_loss, lambda meta, task: params)


@functools.partial(jax.jit, static_argnames="seed")
def away(params: PyTree, distance: Any, seed: int = 0) -> PyTree:
    """`params` moved by `distance`, relative to their norm."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    length, moved = (jnp.sqrt(sum(jnp.vdot(x, x) for x in xs)) for xs in (leaves, noise))
    factor = distance * length / moved
    return jax.tree.unflatten(structure, [x + (factor * n).astype(x.dtype) for x, n in zip(leaves, noise, strict=True)])


def finite_difference_meta_gradient(
    problem: BilevelProblem, meta_params: PyTree, task: PyTree, near: PyTree | None = None, step: float = 1e-3
) -> PyTree:
    """The meta-gradient from outer losses alone: learning is solved anew at every moved meta-parameter.

    Central differences at `step` and `step / 2`, extrapolated (Richardson): truncation is O(step^4), about 1e-12,
    and rounding 1e-16 / step. NaN where a solve failed.

    Args:
      problem: any.
      meta_params: float64 pytree.
      task: one task.
      near: a solution in the basin that is meant; None is where learning from `init_params` ends.
      step: of each meta-parameter.

    Returns:
      A float64 pytree like `meta_params`.
    """
    if near is None:
        near = problems.exact_meta_gradient(problem, meta_params, task).params
    leaves, structure = jax.tree.flatten(meta_params)
    assert all(leaf.dtype == jnp.float64 for leaf in leaves), "finite differences need float64 meta_params"

    def learned(index: int, moved: Any) -> float:
        # One call per point, not a vmap: the solve for these shapes is compiled already.
        trial = structure.unflatten([*leaves[:index], moved, *leaves[index + 1 :]])
        exact = problems.exact_meta_gradient(problem, trial, task, near)
        return float(exact.outer_loss) if exact.converged else float("nan")

    def derivative(index: int, direction: Any) -> float:
        leaf = np.asarray(leaves[index])
        up, down, half_up, half_down = (
            learned(index, leaf + h * direction) for h in (step, -step, step / 2, -step / 2)
        )
        wide, narrow = (up - down) / (2 * step), (half_up - half_down) / step
        return (4 * narrow - wide) / 3

    def differences(index: int, leaf: Any) -> Any:
        directions = np.eye(leaf.size).reshape(leaf.size, *leaf.shape)
        return np.array([derivative(index, direction) for direction in directions]).reshape(leaf.shape)

    return structure.unflatten([differences(index, leaf) for index, leaf in enumerate(leaves)])


def relative_error(got: PyTree, expected: PyTree) -> float:
    """The norm of the difference over the norm of `expected`, over all leaves, in float64."""
    a, b = _flat(got), _flat(expected)
    assert a.shape == b.shape, f"compared trees of {a.shape} and {b.shape} entries"
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def cosine(a: PyTree, b: PyTree) -> float:
    """The cosine of the angle between two trees, over all leaves, in float64."""
    x, y = _flat(a), _flat(b)
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating leaves in `dtype`; labels and keys stay as they are."""

    def convert(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(convert, tree)


def _flat(tree: PyTree) -> Any:
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)
