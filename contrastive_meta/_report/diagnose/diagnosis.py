"""What a diagnosis found: a page to print, numbers to use, a figure to draw."""

import dataclasses
from typing import Any

from contrastive_meta._report.diagnose.advice import advise
from contrastive_meta._report.diagnose.drawing import draw
from contrastive_meta._report.diagnose.findings import Findings
from contrastive_meta._report.diagnose.page import page


@dataclasses.dataclass(frozen=True)
class Diagnosis(Findings):
    """What `diagnose` found: `print` it, use its numbers, `draw` it.

    Attributes:
      result: the estimate that was looked into.
      estimator: in words: solvers, scheme, precision.
      tolerance: relative error that is good enough.
      curve: contrasts at strengths around the chosen one: `strengths`, `errors`, `regions`, `chosen` and `least`
        (indices), `excess` (error at the chosen over the least one), `noise_below`, `truncation_above`.
      phases: where each phase ended: `beta`, `residual`, `tolerance`, `moved`, `status`; the free phase first.
      noise: rounding noise of the inner gradient, a norm like the residuals.
      drift: what learning on without a nudge changes: `distance`, `displacement`, `statistic`, `gradient`.
      segments: the straight way to each nudged phase: losses and slopes at 21 positions, `barrier`, `inner_barrier`,
        `relative_barrier`, `same_basin`, `curvature`, `nudged_curvature`, `bend`.
      matched: whether what drifts cancels: False only for `matched=False`.
      gradients: gradients evaluated by the free phase, by the nudged phases and by everything else.

    Example:
      >>> import contrastive_meta as cm
      >>> callable(cm.Diagnosis.draw)  # `cm.diagnose` makes one
      True
    """

    @property
    def rule(self) -> str:
        """The name of the rule that the advice follows from."""
        return advise(self)[0]

    @property
    def advice(self) -> str:
        """One sentence: what to change."""
        return advise(self)[1]

    def __str__(self) -> str:
        """A page of at most 100 columns, the advice first."""
        return page(self, self.advice)

    def draw(self, figure: Any) -> None:
        """Draw the page's figure: the curve, the residuals, and the losses and slopes on the way to the phases.

        Args:
          figure: an empty `matplotlib.figure.Figure` (or `SubFigure`) of the user's own, at least 9 by 7 inches.
        """
        draw(self, self.advice, figure)
