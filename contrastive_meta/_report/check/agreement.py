"""Who agrees with whom: relative differences between gradients, and finite differences as far as their noise allows."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from contrastive_meta._report.check.finite_differences import Slopes
from contrastive_meta._report.gradients import Vector, norm
from contrastive_meta._result import Status

FINITE_DIFFERENCES = "finite differences"
# A difference is significant if it exceeds the tolerance by this many times the noise of the finite differences.
NOISE_FACTOR = 3.0


class Estimate(NamedTuple):
    """What one estimator returned.

    Attributes:
      grad: flat.
      status: that it reported.
      free_residual: of its free phase.
      unseen: meta-parameters that it cannot see.
    """

    grad: Vector
    status: Status
    free_residual: float
    unseen: tuple[str, ...]


class Relation(NamedTuple):
    """How two estimates compare.

    Attributes:
      difference: norm of their difference over the larger of their norms.
      noise: how much of `difference` may be noise of the finite differences.
      agrees: None where the noise leaves it open.
      factor: the number that the first is times the second, where it is nothing but a multiple of it; else NaN.
    """

    difference: float
    noise: float
    agrees: bool | None
    factor: float


class Blindness(NamedTuple):
    """Meta-parameters of one group, and who cannot see them."""

    leaves: tuple[str, ...]
    blind: tuple[str, ...]


class Evidence(NamedTuple):
    """All that the verdict of a `CheckReport` is made from.

    Attributes:
      estimates: by name.
      slopes: the finite differences.
      groups: of the meta-parameters, in the numbering of `slopes.groups`.
      leaves: names and sizes of the leaves of `meta_params`.
      tolerance: on relative differences.
    """

    estimates: Mapping[str, Estimate]
    slopes: Slopes
    groups: Sequence[Blindness]
    leaves: Sequence[tuple[str, int]]
    tolerance: float

    @property
    def names(self) -> list[str]:
        """The names that can be compared; finite differences last."""
        return [*self.estimates, FINITE_DIFFERENCES]

    def relation(self, first: str, second: str) -> Relation:
        """Compare two by name, finite differences included."""
        if first == second:
            return Relation(0.0, 0.0, True, 1.0)
        if FINITE_DIFFERENCES in (first, second):
            return self.to_finite_differences(second if first == FINITE_DIFFERENCES else first)
        a, b = self.estimates[first].grad, self.estimates[second].grad
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            return Relation(float("nan"), 0.0, False, float("nan"))
        difference = _over(norm(a - b), max(norm(a), norm(b)))
        return Relation(difference, 0.0, difference <= self.tolerance, _factor(a, b, self.tolerance))

    def to_finite_differences(self, name: str, only_visible: bool = False) -> Relation:
        """Compare an estimate with the finite differences, or only in groups of meta-parameters that it can see."""
        slopes = self.slopes
        visible = [name not in group.blind or not only_visible for group in self.groups]
        weights = np.sqrt(slopes.weights) * np.asarray(visible)[slopes.groups]
        grad = self.estimates[name].grad
        if not np.isfinite(grad).all():
            return Relation(float("nan"), 0.0, False, float("nan"))
        if not (np.isfinite(slopes.values).all() and np.isfinite(slopes.noise).all()):
            return Relation(float("nan"), float("inf"), None, float("nan"))
        along, values = weights * (slopes.directions @ grad), weights * slopes.values
        scale = max(norm(along), norm(values))
        difference, noise = _over(norm(along - values), scale), _over(norm(weights * slopes.noise), scale)
        agrees = None
        if difference > self.tolerance + NOISE_FACTOR * noise:
            agrees = False
        elif max(difference, noise) <= self.tolerance:
            agrees = True
        return Relation(difference, noise, agrees, _factor(along, values, max(self.tolerance, NOISE_FACTOR * noise)))

    def clusters(self) -> list[list[str]]:
        """Names in groups within which all agree; those with an estimate that is not finite are in none."""
        found: list[list[str]] = []
        finite = [name for name, estimate in self.estimates.items() if np.isfinite(estimate.grad).all()]
        for name in [FINITE_DIFFERENCES, *finite]:
            for cluster in found:
                if all(self.relation(name, member).agrees for member in cluster):
                    cluster.append(name)
                    break
            else:
                found.append([name])
        return [sorted(cluster, key=self.names.index) for cluster in found]

    def agreement(self) -> bool | None:
        """Whether all agree with all; None where nothing but the noise of the finite differences leaves it open."""
        names = self.names
        pairs = [(a, b) for index, a in enumerate(names) for b in names[index + 1 :]]
        opinions = [self.relation(*pair).agrees for pair in pairs]
        if False in opinions:
            return False
        return None if None in opinions else True

    def leaf_of(self, name: str, other: str) -> str | None:
        """The leaf that holds most of the difference between two estimators; None where there is no such one."""
        difference = self.estimates[name].grad - self.estimates[other].grad
        ends = np.cumsum([size for _, size in self.leaves])[:-1]
        parts = [norm(part) for part in np.split(difference, ends)]
        largest = int(np.argmax(parts))
        dominant = parts[largest] > 0.7 * norm(difference)
        return self.leaves[largest][0] if dominant and len(parts) > 1 else None


def _over(size: float, scale: float) -> float:
    if scale > 0:
        return size / scale
    return 0.0 if size == 0 else float("inf")


def _factor(a: Vector, b: Vector, tolerance: float) -> float:
    """The number r with a = r b, within a tolerance; NaN where there is none."""
    length = norm(b)
    if length == 0:
        return float("nan")
    a, b = a / length, b / length
    factor = float(a @ b)
    return factor if norm(a - factor * b) <= tolerance * norm(a) else float("nan")
