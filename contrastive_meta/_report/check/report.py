"""What a check found, and how it prints."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from contrastive_meta._report import text
from contrastive_meta._result import Status

# More columns of differences than this do not fit a line.
_MOST_COLUMNS = 7


class CheckRow(NamedTuple):
    """What one estimator, or the finite differences, contributed.

    Attributes:
      name: of the estimator.
      grad_norm: norm of its gradient; None for finite differences that did not take every direction.
      free_residual: gradient norm of the inner loss where learning ended; None for the finite differences.
      difference: from the finite differences, relative to the larger of the two.
      agrees: with the finite differences; None where their noise leaves it open.
      status: what it reported.
      unseen: meta-parameters that it cannot see.
    """

    name: str
    grad_norm: float | None
    free_residual: float | None
    difference: float
    agrees: bool | None
    status: Status
    unseen: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What `check` found: `print` it.

    Attributes:
      agree: whether all estimators and the finite differences agree within the tolerance; False if any differs
        beyond doubt, is not finite or raised (unless `check` itself chose it and it does not apply); None where the
        noise of the finite differences leaves it open.
      verdict: the same in words: who agrees with whom, who differs by how much, and why.
      rows: one for each estimator that ran, with the fields `name`, `grad_norm`, `free_residual`, `difference` (from
        the finite differences), `agrees`, `status` and `unseen`; the finite differences last.
      differences: `{name: {name: relative difference}}`, the norm of the difference over the larger of the norms.
      noise: estimated relative error of the finite differences.
      left_out: estimators that did not run, and why.
      tolerance: that was asked for.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.CheckReport(True, "a and b agree.", (), {}, 0.0, {}, 1e-2).agree
      True
    """

    agree: bool | None
    verdict: str
    rows: tuple[CheckRow, ...]
    differences: Mapping[str, Mapping[str, float]]
    noise: float
    left_out: Mapping[str, str]
    tolerance: float

    def __str__(self) -> str:
        """The verdict, the pairwise differences, and what the statuses mean, in at most 120 columns."""
        opinions = {True: "all agree", False: "they do not all agree", None: "cannot decide"}
        lines = text.wrap(f"Check: {opinions[self.agree]} (tolerance {text.share(self.tolerance)}).")
        lines += [*text.wrap(self.verdict), "", *text.lay_out(self._columns()), ""]
        noise = f"Noise of the finite differences: {text.share(self.noise)} of their norm."
        lines.append(noise if math.isfinite(self.noise) else "The finite differences are nothing but noise.")
        for status in sorted({row.status for row in self.rows}):
            names = ", ".join(row.name for row in self.rows if row.status == status)
            lines += text.wrap(f"{status.name} ({names}): {status.describe()}", "  ")
        for name, why in self.left_out.items():
            lines += text.wrap(f"Left out: {name}. {why}", "  ")
        return "\n".join(lines)

    def _columns(self) -> list[text.Column]:
        numbers = [str(index + 1) for index in range(len(self.rows))]
        columns = [
            text.Column(("",), numbers),
            text.Column(("estimator",), [row.name for row in self.rows], numeric=False, narrowest=14, keep_end=True),
            text.Column(("gradient", "norm"), [text.number(row.grad_norm, ".4g") for row in self.rows]),
            text.Column(("free", "residual"), [text.number(row.free_residual, ".2g") for row in self.rows]),
        ]
        compared = list(zip(numbers, self.rows, strict=True))
        for index, row in compared if len(compared) <= _MOST_COLUMNS else compared[-1:]:
            cells = [_difference_cell(self.differences[other.name][row.name]) for other in self.rows]
            columns.append(text.Column(("differs", f"from {index}"), cells))
        return columns


def _difference_cell(difference: float) -> str:
    return "." if difference == 0 else format(difference, ".1e")
