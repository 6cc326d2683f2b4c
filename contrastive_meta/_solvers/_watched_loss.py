"""The loss on its way to SciPy: counted, accurate to the last digit of the gradient, and the best point kept."""

import math
from typing import Any, NamedTuple

import numpy as np

from contrastive_meta._solvers._host_sessions import HostLoss, Vector

# How many epsilons of its own size a loss may be off by rounding: differences below that are taken from gradients.
_ROUNDING = 1e3


class WatchedLoss:
    """The loss on its way to SciPy: counted, made accurate near the solution, and the best point kept.

    A line search compares values. Near a minimum they agree to rounding while the gradient norm is still of the order
    of the square root of epsilon, and it fails there. So a run that failed is started again, from its best point r and
    in units of its gradient norm s there, with small differences of values taken from the gradients by the trapezoidal
    rule, which cancels nothing:

        x = r + s y,    s^2 F(y) = L(x) - L(r) = (dL(x) + dL(r)) . (x - r) / 2 + O(|x - r|^3).

    F has the curvature of L and a gradient of norm 1, so that SciPy's absolute thresholds do not bite either. (The
    same observation is behind the approximate Wolfe conditions of Hager & Zhang, 2005.)

    Args:
      loss: what asks the program.
      start: where the first run starts.
      dtype: dtype of `params`, in which points are evaluated.
      epsilon: that of the values.
      tol: gradient norm that ends everything.
      budget: number of evaluations that ends everything.
      bounds: lower and upper bounds of each entry; None for none. Points are then judged by the projected gradient.
    """

    def __init__(
        self,
        loss: HostLoss,
        start: Vector,
        dtype: Any,
        epsilon: float,
        tol: float,
        budget: int,
        bounds: tuple[Vector, Vector] | None = None,
    ) -> None:
        self._loss = loss
        self._bounds = bounds
        self._dtype = dtype
        self._epsilon = epsilon
        self._tol = tol
        self._budget = budget
        # A conjugate gradient iteration inside a step may take as many products as there are parameters.
        self._patience = 50 + 2 * start.size
        self._since_best = 0
        self._lowest = math.inf
        self._reference: Evaluated | None = None
        self._center: Evaluated | None = None
        self.start = start
        self.best: Evaluated | None = None
        self.all_finite = True

    def restart(self) -> None:
        """Begin another run at the best point."""
        assert self.best is not None
        self._since_best = 0
        if self.best.gradient.size:
            self._reference = self.best
            self.start = np.zeros_like(self.start)
        else:
            self.start = self.best.point

    @property
    def bounds(self) -> list[tuple[float, float]] | None:
        """The bounds of what the run varies."""
        if self._bounds is None:
            return None
        at = self._reference
        low, high = self._bounds if at is None else ((bound - at.point) / at.slope for bound in self._bounds)
        return list(zip(low.tolist(), high.tolist(), strict=True))

    def value(self, point: Vector) -> float:
        """For methods without gradients."""
        self._spend()
        value = self._loss(point)
        self._remember(Evaluated(self._rounded(point), value, np.zeros(0), value))
        return value

    def value_and_grad(self, y: Vector) -> tuple[float, Vector]:
        """For methods with gradients."""
        at = self._reference
        if at is None:
            evaluated = self._evaluate(y)
            return evaluated.value, evaluated.gradient.copy()
        evaluated = self._evaluate(at.point + at.slope * y)
        difference = evaluated.value - at.value
        if abs(difference) <= _ROUNDING * self._epsilon * abs(at.value):
            difference = 0.5 * float((evaluated.gradient + at.gradient) @ (evaluated.point - at.point))
        return difference / at.slope / at.slope, evaluated.gradient / at.slope

    def hessian_product(self, y: Vector, direction: Vector) -> Vector:
        """A one-sided difference of gradients, its step set by the sizes of the point and of `direction`."""
        at = self._reference
        point = self._rounded(y if at is None else at.point + at.slope * y)
        if self._center is None or not np.array_equal(point, self._center.point):
            self._center = self._evaluate(point)
        length = float(np.linalg.norm(direction)) or 1.0
        step = math.sqrt(self._epsilon) * (1.0 + float(np.linalg.norm(point))) / length
        return (self._evaluate(point + step * direction).gradient - self._center.gradient) / step

    def has_improved(self, before: "Evaluated | None") -> bool:
        """Whether the best point is worth another run, now that `before` is where the last one started."""
        if self.best is None or before is None:
            return self.best is not None
        if self.best.gradient.size:
            return self.best.slope < 0.5 * before.slope
        return self.best.value < before.value - _ROUNDING * self._epsilon * abs(before.value)

    def _evaluate(self, point: Vector) -> "Evaluated":
        self._spend()
        value, gradient = self._loss.value_and_grad(point if self._bounds is None else self._rounded(point))
        at = self._rounded(point)
        evaluated = Evaluated(at, value, gradient, float(np.linalg.norm(self._projected(at, gradient))))
        self._remember(evaluated)
        if self.best is evaluated and evaluated.slope <= self._tol:
            raise EndOfRunError
        if self._since_best > self._patience:
            raise StalledError
        return evaluated

    def _rounded(self, point: Vector) -> Vector:
        if self._bounds is not None:
            # A restart's units round, and no point may lie outside.
            point = np.clip(point, *self._bounds)
        return point.astype(self._dtype).astype(np.float64)

    def _projected(self, point: Vector, gradient: Vector) -> Vector:
        """The gradient without what points out of the bounds."""
        if self._bounds is None:
            return gradient
        low, high = self._bounds
        down, up = np.minimum(gradient, point - low), np.maximum(gradient, point - high)
        projected: Vector = np.where(gradient > 0, down, up)
        return projected

    def _spend(self) -> None:
        if self._budget <= 0:
            raise EndOfRunError
        self._budget -= 1

    def _remember(self, evaluated: "Evaluated") -> None:
        self._since_best += 1
        if not (math.isfinite(evaluated.value) and np.all(np.isfinite(evaluated.gradient))):
            self.all_finite = False
            return
        self._lowest = min(self._lowest, evaluated.value)
        limit = self._lowest + 16 * self._epsilon * abs(self._lowest)
        # Among values that are equal up to rounding the gradient tells the better point.
        overtaken = self.best is None or self.best.value > limit
        if overtaken or (self.best is not None and evaluated.value <= limit and evaluated.slope < self.best.slope):
            self.best = evaluated
            self._since_best = 0


class Evaluated(NamedTuple):
    """A point that was evaluated; `slope` is the gradient norm, or the value itself where values are all there is."""

    point: Vector
    value: float
    gradient: Vector
    slope: float


class EndOfRunError(Exception):
    """Ends a run of SciPy from inside its loss."""


class StalledError(Exception):
    """Ends a run of SciPy that goes on without getting anywhere."""
