"""What a comparison measures errors against, and how to say so."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from contrastive_meta._estimators import ImplicitDifferentiation, MetaGradientEstimator
from contrastive_meta._linear import DenseInverse
from contrastive_meta._problem import BilevelProblem, MetaParams, Task, same_structure
from contrastive_meta._report.gradients import (
    LARGEST_DENSE,
    Vector,
    first_line,
    flatten,
    norm,
    num_params,
    status_of,
)
from contrastive_meta._result import MetaGradient, Status


class Reference(NamedTuple):
    """The gradient that counts as right.

    Attributes:
      grad: flat; None where there is none.
      text: what it is, in words.
    """

    grad: Vector | None
    text: str


class Subject(NamedTuple):
    """What is compared: arguments of `compare` and what its estimators returned."""

    problem: BilevelProblem
    estimators: Mapping[str, MetaGradientEstimator]
    results: Mapping[str, MetaGradient]
    meta_params: MetaParams
    task: Task
    key: jax.Array | None


def resolve_reference(subject: Subject, reference: Any) -> Reference:
    """The reference that `compare` was asked for."""
    if reference is None:
        return _by_default(subject)
    if isinstance(reference, str):
        return _row(subject, reference)
    if isinstance(reference, MetaGradientEstimator):
        what = f"{type(reference).__name__} as passed in `reference`"
        return _row_or_estimate(subject, reference, what)
    return _with_caveats(flatten(reference), "the gradient passed in `reference`, no row of this table", None)


def check_reference(estimators: Mapping[str, MetaGradientEstimator], meta_params: MetaParams, reference: Any) -> None:
    """Find what is wrong with `reference` before anything runs.

    Raises:
      ValueError: an unknown name, or a gradient unlike `meta_params`.
    """
    names = ", ".join(repr(name) for name in estimators)
    if isinstance(reference, str):
        if reference not in estimators:
            raise ValueError(f"`reference` names none of the estimators: got {reference!r}, expected one of {names}.")
    elif reference is not None and not isinstance(reference, MetaGradientEstimator):
        expected, got = jax.tree.map(np.shape, meta_params), jax.tree.map(np.shape, reference)
        if not same_structure(meta_params, reference) or expected != got:
            raise ValueError(
                f"`reference` must be a gradient like `meta_params`: expected shapes {expected}, got {got}. Pass the "
                f"`grad` of a result, an estimator, or the name of one of the estimators ({names})."
            )


def _by_default(subject: Subject) -> Reference:
    name, first = next(iter(subject.estimators.items()))
    size = num_params(subject.problem, subject.meta_params, subject.task)
    if size > LARGEST_DENSE:
        why = f"`params` has {size} entries, too many for dense implicit differentiation"
        return _row(subject, next(iter(subject.results)), f" ({why})")
    dense = ImplicitDifferentiation(first.solver, DenseInverse())
    try:
        return _row_or_estimate(subject, dense, f"dense implicit differentiation with the solver of {name!r}")
    except Exception as error:
        why = f"dense implicit differentiation raised {first_line(error)}"
        return _row(subject, next(iter(subject.results)), f" ({why})")


def _row_or_estimate(subject: Subject, estimator: MetaGradientEstimator, what: str) -> Reference:
    """An estimator's gradient. One that is a row of the table already is not computed again."""
    for name, candidate in subject.estimators.items():
        if name in subject.results and _same(candidate, estimator):
            return _row(subject, name, f" ({what})")
    result = estimator.estimate(subject.problem, subject.meta_params, subject.task, key=subject.key)
    return _with_caveats(flatten(result.grad), f"{what}, no row of this table", result)


def _row(subject: Subject, name: str, remark: str = "") -> Reference:
    if name not in subject.results:
        return Reference(None, f"none: {name!r} raised an error.")
    result = subject.results[name]
    return _with_caveats(flatten(result.grad), f"{name!r}, itself a row of this table{remark}", result)


def _with_caveats(grad: Vector, text: str, result: MetaGradient | None) -> Reference:
    """A reference with its caveats: its value, its own status, what it cannot see."""
    caveats = []
    if not np.isfinite(grad).all():
        caveats.append("It is not finite, so errors and cosines are not defined.")
    elif norm(grad) == 0:
        caveats.append("It is zero, so relative errors and cosines are not defined.")
    if result is not None:
        status = status_of(result)
        if status != Status.CONVERGED:
            caveats.append(f"It may be wrong itself: its status is {status.name}.")
        if result.unseen:
            caveats.append(f"It cannot see {', '.join(result.unseen)}, where it is zero.")
    return Reference(grad, " ".join([f"{text}.", *caveats]))


def _same(a: MetaGradientEstimator, b: MetaGradientEstimator) -> bool:
    """Whether two estimators are equal, numbers included."""
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=False)
    return same_structure(a, b) and all(np.array_equal(x, y) for x, y in leaves)
