"""The exact meta-gradient of each case of `trust` in float64, at the minimum that its own learning approaches."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import contrastive_meta as cm
from benchmarks.cases import upcast
from benchmarks.harness import Vector, flatten, precision
from benchmarks.trust_cases import Case, Learner, moved

# Solutions that differ by less, relative to their norm, are one minimum.
_SAME = 1e-3


class Minimum(NamedTuple):
    """A minimum of the inner loss and the meta-gradient there.

    Attributes:
      params: flat.
      grad: the exact meta-gradient, flat.
      converged: whether it is a minimum, and found to the floor of float64.
      least, largest: eigenvalues of the inner Hessian.
    """

    params: Vector
    grad: Vector
    converged: bool
    least: float
    largest: float

    def floor(self, x64: bool) -> float:
        """Relative error below which a precision cannot be held to account.

        Ten roundings; or, where that is more, one rounding times the condition number of the inner Hessian, which is
        what solving exactly in that precision may be off by.
        """
        eps = float(np.finfo(np.float64 if x64 else np.float32).eps)
        return eps * max(10.0, self.largest / self.least if self.least > 0 else np.inf)


@dataclasses.dataclass
class Ready:
    """The numbers that the cases of one instance share.

    Attributes:
      losses: of the problem.
      meta_params: in the working precision.
      data: in the working precision.
      start: in the working precision.
      learner: of the free phase, which goes on to its minimum; None for a learner that is not asked.
      minima: found so far.
      step_size: of descent, from the largest curvature at the start and at the solution.
      momentum: of descent, from the condition number.
    """

    losses: cm.BilevelProblem
    meta_params: Any
    data: Any
    start: Any
    convex: bool
    learner: Learner | None = None
    minima: list[Minimum] = dataclasses.field(default_factory=list)
    step_size: float = 0.0
    momentum: float = 0.0

    def minimum(self, free: Any) -> Minimum:
        """The minimum that learning approaches from `free`; searched for once."""
        if self.convex and self.minima:
            return self.minima[0]
        with precision(True):
            meta_params, task = upcast(self.meta_params), upcast(self.data)
            settled, numbers = upcast(free), (self.step_size, self.momentum)
            # The case's own learner chooses the minimum: another one may cross to another.
            for learner in () if self.convex else filter(None, (self.learner, _to_the_floor)):
                settled = _learn_on(learner, self.losses, meta_params, task, settled, numbers)
            here = flatten(settled)
            for known in self.minima:
                if np.linalg.norm(here - known.params) <= _SAME * np.linalg.norm(known.params):
                    return known
            exact = cm.problems.exact_meta_gradient(self.losses, meta_params, task, near=settled)
            least, largest = _curvatures(self.losses, exact.params, meta_params, task)
            found = Minimum(
                flatten(exact.params), flatten(exact.grad), bool(exact.converged), float(least), float(largest)
            )
        self.minima.append(found)
        return found


def prepare(case: Case, folder: Path | None) -> Ready:
    """Build an instance in float64, round its numbers to the working precision, and find settings that suit it.

    Raises:
      DataMissingError: its data are not there.
    """
    with precision(True):
        built = case.family.build(case.data_seed, folder)
        task, start = upcast(built.data), upcast(built.start)
        meta_params = moved(upcast(built.meta_params), case.meta_seed)
        if case.warm:
            before = moved(meta_params, case.meta_seed + 1, distance=0.2)
            start = _learn_on(_to_the_floor, built.losses, before, task, start, (0.0, 0.0))
    dtype = np.float64 if case.x64 else np.float32

    def rounded(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf.astype(dtype)
        return leaf.astype(np.int32) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf  # a key is neither

    with precision(True):
        meta_params, task, start = jax.tree.map(rounded, (meta_params, task, start))
    ready = Ready(built.losses, meta_params, task, start, case.family.convex)
    minimum = ready.minimum(start)
    with precision(True):
        _, largest = _curvatures(built.losses, upcast(start), upcast(meta_params), upcast(task))
    # On the way to a network's solution the curvature may be larger than at its ends.
    largest = (1.05 if case.family.convex else 2.0) * max(float(largest), minimum.largest)
    root = np.sqrt(largest / max(minimum.least, 1e-4 * largest))
    ready.step_size, ready.momentum, ready.learner = 1 / largest, float((root - 1) / (root + 1)), case.family.learner
    return ready


def _to_the_floor(tol: Any, step_size: Any, momentum: Any) -> cm.InnerSolver:
    """L-BFGS to the end."""
    # From a start that learning left almost settled, a fall is too much to ask for: the loss's own scale is the unit.
    return cm.LBFGS(tol=jnp.minimum(tol, 1e-8), max_steps=5000)


@functools.partial(jax.jit, static_argnums=0)
def _learn_on(
    learner: Learner, losses: cm.BilevelProblem, meta_params: Any, task: Any, start: Any, numbers: tuple[Any, Any]
) -> Any:
    """Where a learner of a step size and a momentum goes from a start, until the gradient has fallen by 1e-6."""

    def loss(params: Any) -> jax.Array:
        return losses.inner(params, meta_params, task)

    first = jnp.linalg.norm(ravel_pytree(jax.grad(loss)(start))[0])
    return learner(1e-6 * first, *numbers).solve(loss, start).params


@jax.jit
def _curvatures(losses: cm.BilevelProblem, params: Any, meta_params: Any, task: Any) -> tuple[jax.Array, jax.Array]:
    """The least and the largest eigenvalue of the inner Hessian."""
    flat, unravel = ravel_pytree(params)
    hessian = jax.hessian(lambda at: losses.inner(unravel(at), meta_params, task))(flat)
    eigenvalues = jnp.linalg.eigvalsh(hessian)
    return eigenvalues[0], eigenvalues[-1]
