"""Gradients as flat float64 vectors on the host, and what sets two of them apart."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
import numpy.typing as npt

from contrastive_meta._problem import BilevelProblem, MetaParams, Task
from contrastive_meta._result import MetaGradient, Status

Vector = npt.NDArray[np.float64]

# Above this many parameters a dense Hessian and its eigenvectors cost more than the estimates.
LARGEST_DENSE = 2000


def flatten(values: Any) -> Vector:
    """All entries of a pytree as one float64 vector."""
    leaves = [np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(values)]
    return np.concatenate([np.zeros(0), *leaves])


def norm(vector: Vector) -> float:
    """The Euclidean norm, safe from overflow and underflow of the squares."""
    largest = float(np.max(np.abs(vector), initial=0.0))
    if largest == 0 or not np.isfinite(largest):
        return largest
    return largest * float(np.linalg.norm(vector / largest))


def relative_error(vector: Vector, reference: Vector) -> float:
    """||vector - reference|| / ||reference||; NaN for a reference of zero."""
    length = norm(reference)
    with np.errstate(invalid="ignore", over="ignore"):
        return norm(vector - reference) / length if length > 0 else float("nan")


def cosine(a: Vector, b: Vector) -> float:
    """The cosine of the angle between two vectors; NaN if either is zero or not finite."""
    lengths = norm(a), norm(b)
    if not (np.isfinite(lengths).all() and min(lengths) > 0):
        return float("nan")
    return float(np.clip((a / lengths[0]) @ (b / lengths[1]), -1.0, 1.0))


def status_of(result: MetaGradient) -> Status:
    """The status of a result; a gradient that is not finite overrules what the estimator says of it."""
    reported = Status(int(result.diagnostics.status))
    return reported if np.isfinite(flatten(result.grad)).all() else max(reported, Status.NOT_FINITE)


def first_line(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def num_params(problem: BilevelProblem, meta_params: MetaParams, task: Task) -> int:
    """The number of entries of `params`."""
    init = jax.eval_shape(problem.init, meta_params, task)
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(init))


def raise_first(errors: dict[str, Exception]) -> NoReturn:
    """Raise the first of several errors, saying that the others failed too."""
    name, error = next(iter(errors.items()))
    error.add_note(f"Every estimator raised ({', '.join(errors)}); this is what {name!r} said.")
    raise error


@contextlib.contextmanager
def unseen_told_later() -> Iterator[None]:
    """Silence the warning about unseen meta-parameters, which `result.unseen` repeats; let others through."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* cannot see the meta-parameters", category=UserWarning)
        yield
