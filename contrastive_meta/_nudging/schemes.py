"""The schemes: finite differences along the nudging strength, real and complex."""

import cmath
from typing import Any

import numpy as np

from contrastive_meta._nudging.scheme import NudgeScheme, is_concrete
from contrastive_meta._problem import Number


def forward_difference(beta: Number, *, matched: bool = True) -> NudgeScheme:
    """One nudged phase against the free one; the bias is O(beta).

    For every beta this is the fully first-order estimator F2SA with penalty 1/beta.

    Args:
      beta: nudging strength; either sign.
      matched: see `NudgeScheme`; False contrasts with the free-phase solution itself, as first published, which is
        wrong by (leftover relaxation) / beta wherever the free phase is unfinished.

    Reference:
      Scellier & Bengio (2017); Zucchet et al. (2022), eq. 5; Kwon et al. (2023), F2SA.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.forward_difference(0.5).weights
      (-2.0, 2.0)
    """
    b = _nonzero(beta)
    return NudgeScheme((0.0, b), (-1 / b, 1 / b), order=1, free_phase=0, matched=matched)


def second_order_forward(beta: Number, *, matched: bool = True) -> NudgeScheme:
    """Phases at 0, beta and 2 beta; the bias is O(beta^2), and no phase is nudged the wrong way.

    Args:
      beta: nudging strength.
      matched: as in `forward_difference`.

    Reference:
      Three-point one-sided difference; F2SA-p with p = 2 forward (Chen et al., 2026).

    Example:
      >>> import contrastive_meta as cm
      >>> cm.second_order_forward(1.0).weights
      (-1.5, 2.0, -0.5)
    """
    b = _nonzero(beta)
    weights = (-3 / (2 * b), 2 / b, -1 / (2 * b))
    return NudgeScheme((0.0, b, 2 * b), weights, order=2, free_phase=0, matched=matched)


def central_difference(beta: Number) -> NudgeScheme:
    """Phases at +beta and -beta (symmetric nudging); the bias is O(beta^2).

    Args:
      beta: nudging strength. A loss nudge with -beta can destroy the convexity of the inner loss when it is large.

    Reference:
      Laborieux et al. (2021); Zucchet et al. (2022), the symmetric estimator.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.central_difference(0.1).nudges
      (0.1, -0.1)
    """
    b = _nonzero(beta)
    return NudgeScheme((b, -b), (1 / (2 * b), -1 / (2 * b)), order=2)


def four_point(beta: Number) -> NudgeScheme:
    """Phases at +-beta and +-2 beta; the bias is O(beta^4).

    Args:
      beta: the smaller nudging strength.

    Reference:
      Five-point central stencil without its middle.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.four_point(1.0).order
      4
    """
    b = _nonzero(beta)
    near, far = 2 / (3 * b), 1 / (12 * b)
    return NudgeScheme((b, -b, 2 * b, -2 * b), (near, -near, -far, far), order=4)


def circle(beta: Number, num_points: int = 8) -> NudgeScheme:
    """`num_points` phases on a circle of radius beta in the complex plane; the bias is O(beta^num_points).

    Needs losses that are holomorphic in params and meta-parameters, a learner whose steps are, and a radius inside
    the domain of analyticity.

    Args:
      beta: radius.
      num_points: number of phases N >= 2.

    Reference:
      Laborieux & Zenke (2022), holomorphic equilibrium propagation; Cauchy's integral formula.

    Raises:
      ValueError: fewer than two points.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.circle(0.1, num_points=4).order
      4
    """
    if num_points < 2:
        raise ValueError(f"`circle` needs num_points >= 2; got {num_points}.")
    b = _nonzero(beta)
    points = [cmath.exp(2j * cmath.pi * k / num_points) for k in range(num_points)]
    nudges = tuple(b * point for point in points)
    weights = tuple(point.conjugate() / (num_points * b) for point in points)
    return NudgeScheme(nudges, weights, order=num_points)


def complex_step(step: Number = 1e-6) -> NudgeScheme:
    """One phase at the imaginary strength i * step: no subtraction, so no rounding term; the bias is O(step^2).

    Needs holomorphic losses and a holomorphic learner, as `circle` does.

    Args:
      step: modulus of the imaginary nudge.

    Reference:
      Squire & Trapp (1998), the complex-step derivative, along the nudging strength.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.complex_step(1e-6).nudges
      (1e-06j,)
    """
    h = _nonzero(step)
    return NudgeScheme((1j * h,), (-1j / h,), order=2)


def _nonzero(beta: Number) -> Any:
    if is_concrete(beta) and np.any(np.asarray(beta) == 0):
        raise ValueError(
            "A nudging strength of 0 nudges nothing: beta must be nonzero, since the contrast is divided by it. "
            "Type a small positive number, or let `relative(...)` choose."
        )
    return beta
