"""What a diagnosis measures, as plain numbers: phases, drift, the way from free to nudged, the curve."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from contrastive_meta._report.diagnose.curve import Curve
from contrastive_meta._result import MetaGradient, Status

# A barrier is one if its height is more than this part of the change of the loss that it belongs to.
BARRIER = 1e-2


class Phase(NamedTuple):
    """One phase where it ended.

    Attributes:
      name: `"free"`, `"control"` (the free phase run again, matched) or `"nudged"`.
      beta: its strength; complex for complex nudges.
      residual: norm of the gradient of its own loss.
      tolerance: residual below which it counts as finished; NaN where its learner has no such number.
      moved: distance from the base point, relative to the norm of `params`.
      status: of its learner.
    """

    name: str
    beta: complex
    residual: float
    tolerance: float
    moved: float
    status: Status


class Drift(NamedTuple):
    """What learning does when it goes on without a nudge, for as long as a nudged phase.

    Where the learner accepts a budget, it takes as many steps as a nudged phase evaluates gradients.

    Attributes:
      distance: how far `params` move, relative to their norm.
      displacement: the same over the distance that the nudge moves them.
      statistic: how far the statistic moves, over what the nudge of the same strength does to it: the error of a
        contrast in which the drift does not cancel.
      gradient: how far the meta-gradient moves when it is taken from there, relative to it: the error of unfinished
        learning.
    """

    distance: float
    displacement: float
    statistic: float
    gradient: float


class Segment(NamedTuple):
    """The straight way from the base point to where one nudged phase ended.

    Losses are relative to those at the base point, from integrated slopes: rounding would dominate differences of
    two losses. Slopes are in units of the loss per length of the segment.

    Attributes:
      beta: strength of the phase; the modulus for complex nudges, whose segment follows the response.
      positions: from 0 (base point) to 1 (nudged), shape (21,).
      inner_loss: change of the inner loss at each.
      nudged_loss: change of the nudged loss at each.
      inner_slope: of the inner loss at each.
      nudged_slope: of the nudged loss at each.
      length: norm of the way.
      inner_barrier: height of the highest pass of the inner loss between two lower points of the way; 0 for none.
      barrier: the same of the nudged loss.
      noise: changes of loss that rounding alone makes.
      bend: largest deviation of the inner slope from a straight line, over its change: 0 for a quadratic loss.
    """

    beta: float
    positions: tuple[float, ...]
    inner_loss: tuple[float, ...]
    nudged_loss: tuple[float, ...]
    inner_slope: tuple[float, ...]
    nudged_slope: tuple[float, ...]
    length: float
    inner_barrier: float
    barrier: float
    noise: float
    bend: float

    @property
    def curvature(self) -> float:
        """Mean curvature of the inner loss along the way."""
        return self._per_length(self.inner_slope)

    @property
    def nudged_curvature(self) -> float:
        """Mean curvature of the nudged loss along the way; negative where it has no minimum to go to."""
        return self._per_length(self.nudged_slope)

    @property
    def is_unbounded(self) -> bool:
        """Whether the nudged loss curves downwards along the way, by more than rounding makes of it."""
        return self.nudged_slope[-1] - self.nudged_slope[0] < -self.noise

    @property
    def curves_down(self) -> bool:
        """Whether the inner loss curves downwards where the way begins, by more than rounding makes of it."""
        return self.inner_slope[1] - self.inner_slope[0] < -self.noise

    @property
    def relative_barrier(self) -> float:
        """The higher of both barriers, each over the change of its loss from one end to the other."""
        changes = abs(self.nudged_loss[-1]), abs(self.inner_loss[-1])
        return max(_over(self.barrier, changes[0]), _over(self.inner_barrier, changes[1]))

    @property
    def same_basin(self) -> bool:
        """Whether no barrier lies on the way; False where the way is not finite."""
        if not np.isfinite([*self.nudged_loss, *self.inner_loss]).all():
            return False
        return max(self.barrier, self.inner_barrier) <= self.noise or self.relative_barrier <= BARRIER

    def _per_length(self, slopes: tuple[float, ...]) -> float:
        return (slopes[-1] - slopes[0]) / self.length**2 if self.length > 0 else float("nan")


@dataclasses.dataclass(frozen=True)
class Findings:
    """All numbers of a diagnosis; see `Diagnosis`."""

    result: MetaGradient
    estimator: str
    tolerance: float
    curve: Curve
    phases: tuple[Phase, ...]
    noise: float
    drift: Drift
    segments: tuple[Segment, ...]
    matched: bool
    gradients: Mapping[str, int]

    @property
    def status(self) -> Status:
        """What the estimate reported."""
        return Status(int(self.result.diagnostics.status))

    @property
    def beta(self) -> float:
        """The chosen strength."""
        return self.curve.strengths[self.curve.chosen]

    @property
    def told(self) -> float:
        """Relative error as the estimator itself says; NaN where it does not."""
        made = not np.all(np.isnan(self.curve.estimates))
        return float(self.result.diagnostics.error_estimate) if made else float("nan")

    @property
    def error(self) -> float:
        """Relative error: against the reference, else the larger of what the curve and the estimator say of it."""
        if self.curve.referenced or np.isnan(self.told):
            return self.curve.error
        return float(np.fmax(self.curve.error, self.told))


def _over(height: float, change: float) -> float:
    if change > 0:
        return height / change
    return 0.0 if height == 0 else float("inf")
