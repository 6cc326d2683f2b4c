"""Error against nudging strength: how large it is at each, where rounding dominates it and where truncation does."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from contrastive_meta._report.gradients import Vector, norm
from contrastive_meta._result import Status

NOISE, TRUNCATION, NEITHER = "noise", "truncation", "neither"

# Half a decade between strengths, four decades to either side of the chosen one.
_RATIO = 10**0.5
_REACH = 8
# A relative error below this multiple of the dtype's eps is rounding of whatever it is measured against.
_FLOOR = 20.0
# Rounding falls with slope -1 and truncation rises with slope p: a slope of at least half of 1 counts as either.
_STEEP = 0.5
# A slope is fitted to this many points to either side.
_WINDOW = 2


class Curve(NamedTuple):
    """The contrast at strengths around the chosen one, and what is wrong with each.

    Attributes:
      strengths: the smallest |beta| of the scheme's phases, ascending, in units of the inner over the outer loss.
      errors: relative errors of the contrasts; NaN where one is not finite.
      estimates: the estimate that each reports, `diagnostics.error_estimate`; NaN where none is made.
      statuses: what each reported.
      regions: what dominates each error, by the slope of the curve: `"noise"` (what is divided by beta: rounding, and
        whatever phases left unfinished that does not cancel), `"truncation"` or `"neither"`.
      chosen: index of the strength that the estimator chose.
      least: index of the least error, lucky points left out.
      excess: error at the chosen strength over the least, at least 1.
      order: power of beta with which truncation grows.
      against: in words, what `errors` are measured against.
      referenced: whether that is a reference, or only the contrasts at neighbouring strengths.
    """

    strengths: tuple[float, ...]
    errors: tuple[float, ...]
    estimates: tuple[float, ...]
    statuses: tuple[Status, ...]
    regions: tuple[str, ...]
    chosen: int
    least: int
    excess: float
    order: int
    against: str
    referenced: bool

    @property
    def error(self) -> float:
        """The error at the chosen strength."""
        return self.errors[self.chosen]

    @property
    def noise_below(self) -> float | None:
        """The largest strength at which noise dominates; None where it nowhere does."""
        found = [s for s, region in zip(self.strengths, self.regions, strict=True) if region == NOISE]
        return max(found, default=None)

    @property
    def truncation_above(self) -> float | None:
        """The smallest strength at which truncation dominates; None where it nowhere does."""
        found = [s for s, region in zip(self.strengths, self.regions, strict=True) if region == TRUNCATION]
        return min(found, default=None)


def strengths_around(chosen: float) -> list[float]:
    """Strengths in equal ratios, the chosen one in their middle."""
    return [float(chosen * _RATIO**k) for k in range(-_REACH, _REACH + 1)]


class Points(NamedTuple):
    """What the estimator gave at each strength: gradient, its own error estimate and status."""

    strengths: Sequence[float]
    gradients: Sequence[Vector]
    estimates: Sequence[float]
    statuses: Sequence[Status]


def make_curve(points: Points, reference: Vector | None, text: str, order: int, eps: float) -> Curve:
    """Errors, against the reference if there is one, and what dominates them.

    Args:
      points: the contrasts.
      reference: the gradient that counts as right; None to go by neighbouring strengths.
      text: what it is, in words.
      order: of the scheme.
      eps: relative rounding of the losses.
    """
    gradients = points.gradients
    if reference is None:
        absolute, unit = _without_reference(gradients, order)
    else:
        absolute, unit = np.array([norm(g - reference) for g in gradients]), norm(reference)
    if unit == 0:
        text = f"{text} (absolute, since the gradient it is relative to is zero)"
    absolute = absolute / (unit or 1.0)
    # Noise falls by no more than the ratio from one strength to the next. An error far below that is accidental.
    floored = np.fmax(_or_infinite(absolute), _FLOOR * eps)
    likely = np.fmax(floored, np.concatenate([[0.0], floored[:-1] / _RATIO]))
    least, chosen = int(np.argmin(likely)), len(gradients) // 2
    return Curve(
        strengths=tuple(points.strengths),
        errors=tuple(float(error) for error in absolute),
        estimates=tuple(points.estimates),
        statuses=tuple(points.statuses),
        regions=tuple(_region(np.log10(likely), at, least) for at in range(len(likely))),
        chosen=chosen,
        least=least,
        excess=max(float(floored[chosen] / likely[least]), 1.0) if np.isfinite(likely[least]) else float("nan"),
        order=order,
        against=text,
        referenced=reference is not None,
    )


def _without_reference(gradients: Sequence[Vector], order: int) -> tuple[npt.NDArray[np.float64], float]:
    """Errors by neighbours and by the contrast that has the least of those; and the norm of that."""
    errors = _from_neighbours(gradients, order)
    # Where a nudge is far too large, the contrast vanishes, and so do its differences to the neighbours. So errors are
    # compared relative to the norm of their own contrast.
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = errors / np.array([norm(gradient) for gradient in gradients])
    best = gradients[int(np.argmin(_or_infinite(relative)))]
    return np.fmax(errors, [norm(gradient - best) for gradient in gradients]), norm(best)


def _from_neighbours(gradients: Sequence[Vector], order: int) -> npt.NDArray[np.float64]:
    """Error of each contrast from its differences to the two beside it (Richardson).

    With ratio r from one strength to the next, truncation T_k grows by r^p and noise N_k falls by r. Where truncation
    dominates, the difference to the next contrast is (r^p - 1) T_k and that to the last (1 - r^-p) T_k; where noise
    does, they are N_k and r N_k. Each term is the smaller of what its two differences say, and the larger term wins.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        steps = [norm(after - before) for before, after in pairwise(gradients)]
    last, following = np.array([np.nan, *steps]), np.array([*steps, np.nan])
    power = _RATIO**order
    noise = np.fmin(last / _RATIO, following)
    truncation = np.fmin(last * power / (power - 1), following / (power - 1))
    finite = np.array([np.isfinite(gradient).all() for gradient in gradients])
    return np.where(finite, np.fmax(noise, truncation), np.nan)


def _region(logs: npt.NDArray[np.float64], at: int, least: int) -> str:
    """What dominates at an index, from the slope of the curve around it and the side of the least error it is on."""
    around = range(max(at - _WINDOW, 0), min(at + _WINDOW + 1, len(logs)))
    finite = [k for k in around if np.isfinite(logs[k])]
    if at == least or not np.isfinite(logs[at]) or len(finite) < 2:
        return NEITHER
    slope = float(np.polyfit(finite, logs[finite], 1)[0]) / np.log10(_RATIO)
    if at < least and slope < -_STEEP:
        return NOISE
    return TRUNCATION if at > least and slope > _STEEP else NEITHER


def _or_infinite(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.inf)
