"""What a check of the horizon found, and how it prints."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from contrastive_meta._report import text
from contrastive_meta._result import Status

# A derivative below this part of the largest of its row has no sign to speak of.
_NEGLIGIBLE = 1e-3


class HorizonRow(NamedTuple):
    """One leaf of the meta-parameters.

    Attributes:
      leaf: its name.
      now: norm of the meta-gradient of training, the derivative of the outer loss that it foretells along itself.
      later: that derivative after each of the horizons, by finite differences.
      errors: how much twice the step changed these.
    """

    leaf: str
    now: float
    later: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def certain(self) -> tuple[bool, ...]:
        """Whether the sign at each horizon is beyond doubt."""
        least = _NEGLIGIBLE * max((abs(x) for x in self.later), default=0.0)
        return tuple(abs(x) > max(error, least) for x, error in zip(self.later, self.errors, strict=True))

    @property
    def finite(self) -> bool:
        """Whether training and the meta-gradient stayed finite."""
        return bool(np.isfinite([self.now, *self.later]).all())

    @property
    def unseen(self) -> bool:
        """Whether the long run depends on the leaf, and the meta-gradient does not."""
        return self.now == 0 and any(self.certain)

    @property
    def wrong_from(self) -> int | None:
        """Index of the first horizon from which on the sign is another than that of `now`; None where it never is."""
        # Without a meta-gradient the direction is none of its own.
        wrong = [self.now > 0 and x < 0 and certain for x, certain in zip(self.later, self.certain, strict=True)]
        if not wrong or not wrong[-1]:
            return None
        return len(wrong) - next((k for k, right in enumerate(reversed(wrong)) if not right), len(wrong))


@dataclasses.dataclass(frozen=True)
class HorizonReport:
    """What `check_horizon` found: `print` it.

    Attributes:
      horizons: numbers of training steps.
      rows: one for each leaf of the meta-parameters, with the fields `leaf`, `now`, `later` and `errors`.
      agree: whether each leaf's meta-gradient has the sign of the longest horizon's derivative.
      scale_free: leaves of the parameters whose length the outer loss does not depend on.
      statuses: of the meta-gradients averaged in `now`, each once.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.HorizonReport((10,), (), (), ()).agree
      True
    """

    horizons: tuple[int, ...]
    rows: tuple[HorizonRow, ...]
    scale_free: tuple[str, ...]
    statuses: tuple[Status, ...]

    @property
    def agree(self) -> bool:
        """Whether no leaf's meta-gradient points away from the longest horizon's, or misses it."""
        return not any(row.wrong_from is not None or row.unseen or not row.finite for row in self.rows)

    def __str__(self) -> str:
        """The table, and what follows from it, in at most 120 columns."""
        columns = [
            text.Column(("", "leaf"), [row.leaf for row in self.rows], numeric=False, narrowest=14, keep_end=True),
            text.Column(("meta-gradient", "now"), [f"{row.now:.3g}" for row in self.rows]),
        ]
        for index, horizon in enumerate(self.horizons):
            cells = [f"{row.later[index]:.2g} ±{row.errors[index]:.1g}" for row in self.rows]
            columns.append(text.Column((f"after {horizon:,}", "steps"), cells))
        columns.append(text.Column(("long run", "over now"), [_ratio(row) for row in self.rows]))
        lines = ["Derivative of the outer loss along the meta-gradient of each leaf", "", *text.lay_out(columns), ""]
        for sentence in self._sentences():
            lines += text.wrap(sentence)
        return "\n".join(lines)

    def _sentences(self) -> list[str]:
        said = []
        longest = f"{self.horizons[-1]:,} steps"
        finite = [row for row in self.rows if row.finite]
        if lost := [row.leaf for row in self.rows if not row.finite]:
            said.append(f"Training diverges, or the meta-gradient does: {text.listing(lost)}.")
        for row in finite:
            if (index := row.wrong_from) is not None:
                said.append(
                    f"{row.leaf}: the meta-gradient points the wrong way from {self.horizons[index]:,} steps on. "
                    "Descending it would raise the outer loss in the long run."
                )
            elif not row.certain[-1]:
                said.append(f"{row.leaf}: differences after {longest} are too uncertain for a sign.")
            elif row.now > 0:
                said.append(f"{row.leaf}: the meta-gradient has the sign of the long run.")
        if unseen := [row.leaf for row in finite if row.unseen]:
            said.append(f"The meta-gradient does not see {text.listing(unseen)}, and the long run does.")
        if any(row.wrong_from is not None for row in finite):
            said.append(
                "What helps: let training come nearer to its end before the meta-parameters move (`every` as a "
                "function of the step), phases that solve for the whole nudge (`Alternating(cm.NewtonKrylov())`, or "
                "more `num_nudged_steps`), or `value_and_meta_grad` over whole, shortened runs."
            )
        if self.scale_free:
            said.append(
                f"The outer loss does not depend on the length of {text.listing(self.scale_free)}, as before a "
                "normalisation. A penalty on their length acts only through the size of later steps relative to it. "
                f"Meta-gradients of short phases cannot see that; the derivative after {longest} does."
            )
        told = [status for status in self.statuses if status != Status.CONVERGED]
        if told:
            said.append(f"Statuses: {text.listing([status.name for status in told])}.")
        return said


def _ratio(row: HorizonRow) -> str:
    """The last horizon's derivative over the meta-gradient."""
    if row.now == 0 or not math.isfinite(row.now):
        return "-"
    return f"{row.later[-1] / row.now:.2g}"
