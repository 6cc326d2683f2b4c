"""SciPy's minimisers with constraints: a run on the host, judged by what the constraints leave of the gradient."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse.linalg

from contrastive_meta._solvers._host_sessions import HostLoss, Vector
from contrastive_meta._solvers._watched_loss import EndOfRunError
from contrastive_meta._solvers.constraint import NEAR

Matrix = np.ndarray[Any, np.dtype[Any]]
Limits = tuple[Vector, Vector] | None


class Asked(NamedTuple):
    """What the program said of a point: the loss, its gradient, the constraints' rows and their Jacobian."""

    point: Vector
    value: float
    gradient: Vector
    rows: Vector
    jacobian: Matrix


class ConstrainedLoss:
    """The loss and its constraints on their way to SciPy: counted, and the best point kept.

    The program is asked for a point followed by zeros. What multiplies these zeros in its loss are the rows and their
    Jacobian, so that they come back as entries of its gradient.

    Args:
      loss: what asks the program.
      size: of the point.
      equal: which rows must be zero.
      limits: bounds of the entries, or None.
      epsilon: of the values.
      tol: residual that ends everything.
      budget: number of evaluations that ends everything.
    """

    def __init__(
        self, loss: HostLoss, size: int, equal: Matrix, limits: Limits, epsilon: float, tol: float, budget: int
    ) -> None:
        self._loss = loss
        self.size = size
        self._zeros = np.zeros(equal.size * (1 + size))
        self._limits = limits
        self._epsilon = epsilon
        self._tol = tol
        self._budget = budget
        self._last: Asked | None = None
        self.equal = equal
        self.best: tuple[float, Vector] | None = None
        self.all_finite = True

    def at(self, point: Vector) -> Asked:
        """Everything at a point; asking twice in a row counts once."""
        if self._last is not None and np.array_equal(point, self._last.point):
            return self._last
        if self._budget <= 0:
            raise EndOfRunError
        self._budget -= 1
        value, gradient = self._loss.value_and_grad(np.concatenate([point, self._zeros]))
        number = self.equal.size
        gradient, rows, jacobian = np.split(gradient, [self.size, self.size + number])
        self._last = asked = Asked(point.copy(), value, gradient, rows, jacobian.reshape(number, self.size))
        self._remember(asked)
        return asked

    def product(self, point: Vector, direction: Vector, of: Callable[[Asked], Vector]) -> Vector:
        """A one-sided difference of something along a direction."""
        length = float(np.linalg.norm(direction)) or 1.0
        step = math.sqrt(self._epsilon) * (1.0 + float(np.linalg.norm(point))) / length
        here = of(self.at(point))
        return (of(self.at(point + step * direction)) - here) / step

    def _remember(self, asked: Asked) -> None:
        if not (math.isfinite(asked.value) and np.all(np.isfinite(asked.gradient))):
            self.all_finite = False
            return
        residual = self._residual(asked)
        if self.best is None or residual < self.best[0]:
            self.best = residual, asked.point
        if residual <= self._tol:
            raise EndOfRunError

    def _residual(self, asked: Asked) -> float:
        """What the constraints leave of the gradient (multipliers by least squares), and how far they are missed."""
        rows, jacobian, equal = asked.rows, asked.jacobian, self.equal
        if self._limits is not None:
            low, high = self._limits
            eye = np.eye(self.size)
            rows = np.concatenate([rows, asked.point - low, high - asked.point])
            jacobian = np.concatenate([jacobian, eye, -eye])
            equal = np.concatenate([equal, np.zeros(2 * low.size, bool)])
        reach = self._epsilon**NEAR * max(float(np.linalg.norm(asked.point)), 1.0)
        near = equal | (rows <= reach * np.linalg.norm(jacobian, axis=1))
        lowest = np.where(equal[near], -np.inf, 0.0)
        free = asked.gradient
        if near.any():
            kept = jacobian[near]
            found = scipy.optimize.lsq_linear(kept.T, asked.gradient, (lowest, np.full(lowest.shape, np.inf)))
            free = asked.gradient - kept.T @ found.x
        missed = np.where(equal, rows, np.minimum(rows, 0.0))
        return float(np.hypot(np.linalg.norm(free), np.linalg.norm(missed[np.isfinite(missed)])))


def minimize_constrained(
    name: str, options: dict[str, Any], loss: ConstrainedLoss, start: Vector, limits: Limits
) -> Vector:
    """Run SciPy; the point with the smallest residual.

    Args:
      name: the method.
      options: of it.
      loss: with its constraints.
      start: where to begin.
      limits: bounds of the entries, or None.
    """
    settings = _METHODS[name](loss)
    bounds = None if limits is None else scipy.optimize.Bounds(*limits)
    best = start
    before = math.inf
    # Values agree to rounding before gradients do: another run, from where one ended, has fresh curvature.
    while start.size:
        try:
            with np.errstate(all="ignore"):
                scipy.optimize.minimize(
                    lambda x: loss.at(x).value, best, method=name, jac=lambda x: loss.at(x).gradient.copy(),
                    bounds=bounds, options=options, **settings,
                )  # fmt: skip
        except EndOfRunError:
            before = -math.inf
        except (ArithmeticError, ValueError, np.linalg.LinAlgError):
            if loss.all_finite:
                raise
            before = -math.inf
        if loss.best is None:
            break
        residual, best = loss.best
        if not residual < 0.5 * before:
            break
        before = residual
    return best


def _slsqp(loss: ConstrainedLoss) -> dict[str, Any]:
    def part(chosen: Matrix) -> dict[str, Any]:
        return {
            "fun": lambda x: loss.at(x).rows[chosen].copy(),
            "jac": lambda x: loss.at(x).jacobian[chosen].copy(),
        }

    kinds = {"eq": loss.equal, "ineq": ~loss.equal}
    return {"constraints": [{"type": kind, **part(chosen)} for kind, chosen in kinds.items() if chosen.any()]}


def _trust_constr(loss: ConstrainedLoss) -> dict[str, Any]:
    size = loss.size

    def curvature(x: Vector, weights: Vector) -> scipy.sparse.linalg.LinearOperator:
        def product(direction: Vector) -> Vector:
            return loss.product(x, np.ravel(direction), lambda asked: asked.jacobian.T @ weights)

        return scipy.sparse.linalg.LinearOperator((size, size), matvec=product, dtype=np.float64)

    constraint = scipy.optimize.NonlinearConstraint(
        lambda x: loss.at(x).rows.copy(), 0.0, np.where(loss.equal, 0.0, np.inf),
        jac=lambda x: loss.at(x).jacobian.copy(), hess=curvature,
    )  # fmt: skip
    return {
        "hessp": lambda x, direction: loss.product(x, direction, lambda asked: asked.gradient),
        "constraints": [constraint] if loss.equal.size else [],
    }


_METHODS = {"SLSQP": _slsqp, "trust-constr": _trust_constr}
