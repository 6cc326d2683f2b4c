"""A diagnosis as a picture, in a figure that the user made: nothing is imported here."""

import math
from collections.abc import Sequence
from typing import Any

from contrastive_meta._report.diagnose.findings import Findings, Segment
from contrastive_meta._report.text import strength, wrap

# Okabe & Ito (2008): colour-blind readers can tell them apart; each has a marker of its own for grey print.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_NOISE, _TRUNCATION = "#56B4E9", "#E69F00"
# Beyond it there is nothing to tell apart.
_LARGEST = 1e4
_PLACES = {"hspace": 0.38, "wspace": 0.3, "left": 0.09, "right": 0.97, "bottom": 0.08, "top": 0.88}
_TITLE_WIDTH = 105


def draw(found: Findings, advice: str, figure: Any) -> None:
    """Four panels: the curve, the residuals, and the losses and slopes on the way to the nudged phases."""
    axes = figure.subplots(2, 2, gridspec_kw=_PLACES)
    figure.suptitle("\n".join(wrap(advice, width=_TITLE_WIDTH)), fontsize=11)
    _draw_curve(found, axes[0][0])
    _draw_residuals(found, axes[0][1])
    _draw_losses(found, axes[1][0])
    _draw_slopes(found, axes[1][1])
    for axis in axes[1]:
        axis.ticklabel_format(axis="y", scilimits=(-2, 3))
    for axis in axes.flat:
        axis.grid(True, which="major", alpha=0.3)
        axis.set_axisbelow(True)


def _draw_curve(found: Findings, axis: Any) -> None:
    curve = found.curve
    _plot(axis, curve.strengths, _positive(curve.errors, _LARGEST), "error", color=_COLOURS[0], marker=_MARKERS[0])
    estimates = _positive(curve.estimates, _LARGEST)
    _plot(axis, curve.strengths, estimates, "estimated by itself", color="grey", linestyle=":", marker=".")
    error = min(curve.error if curve.error > 0 else found.told, _LARGEST)
    if error > 0:
        axis.plot(
            [found.beta], [error], "*", color=_COLOURS[3], markersize=15, markeredgecolor="black", zorder=5,
            linestyle="none", label="chosen",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    edge = 10**0.25
    for border, region, name, colour in (
        (curve.noise_below, (curve.strengths[0] / edge, None), "noise dominates", _NOISE),
        (curve.truncation_above, (None, curve.strengths[-1] * edge), "truncation dominates", _TRUNCATION),
    ):
        if border is not None:
            near = border * edge if region[0] is not None else border / edge
            axis.axvspan(region[0] or near, region[1] or near, color=colour, alpha=0.15, linewidth=0, label=name)
    axis.set_xlim(curve.strengths[0] / edge, curve.strengths[-1] * edge)
    axis.set_title("Error against strength", fontsize=10)
    axis.set_xlabel("nudging strength beta (units of inner / outer loss)")
    axis.set_ylabel("relative error of the meta-gradient")
    _legend(axis)


def _draw_residuals(found: Findings, axis: Any) -> None:
    phases = found.phases
    places = list(range(len(phases)))
    residuals, tolerances = _positive([p.residual for p in phases]), _positive([p.tolerance for p in phases])
    _plot(axis, places, residuals, "residual", color=_COLOURS[0], marker="o", linestyle="none")
    _plot(axis, places, tolerances, "tolerance", color=_COLOURS[3], marker="_", linestyle="none",
          markersize=18, markeredgewidth=2)  # fmt: skip
    if 0 < found.noise < math.inf:
        axis.axhline(found.noise, color="grey", linestyle="--", label="rounding noise")
    axis.set_yscale("log")
    axis.set_xticks(
        places, [phase.name if phase.beta == 0 else strength(phase.beta, ".1e") for phase in phases], fontsize=7
    )
    axis.set_xlim(-0.5, len(phases) - 0.5)
    axis.set_title("Gradient that each phase left of its own loss", fontsize=10)
    axis.set_xlabel("phase (nudging strength beta)")
    axis.set_ylabel("gradient norm (inner loss / params)")
    _legend(axis)


def _draw_losses(found: Findings, axis: Any) -> None:
    ways = [(segment, segment.nudged_loss, segment.inner_loss) for segment in found.segments]
    _draw_ways(ways, axis, "Losses on the way to the nudged phases", "change of the loss (units of the inner loss)")


def _draw_slopes(found: Findings, axis: Any) -> None:
    ways = [(segment, segment.nudged_slope, segment.inner_slope) for segment in found.segments]
    axis.axhline(0.0, color="black", linewidth=0.8)
    _draw_ways(ways, axis, "Slopes on the way", "slope (units of the inner loss per way)")


def _draw_ways(
    ways: Sequence[tuple[Segment, Sequence[float], Sequence[float]]], axis: Any, title: str, unit: str
) -> None:
    """For each way to a nudged solution, what the nudged and the inner loss do on it."""
    for index, (segment, nudged, inner) in enumerate(ways):
        style, name = _style(index), f"beta = {segment.beta:.1e}"
        _plot(axis, segment.positions, nudged, f"nudged, {name}", **style)
        _plot(axis, segment.positions, inner, f"inner, {name}", **style, linestyle="--", fillstyle="none")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("position (0: base point, 1: nudged solution)")
    axis.set_ylabel(unit)
    _legend(axis)


def _style(index: int) -> dict[str, Any]:
    # Ways of opposite strengths often coincide: the first is the wider one.
    return {
        "color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)], "markersize": 3.5,
        "markevery": 4, "linewidth": max(3.0 - 1.2 * index, 0.8),
    }  # fmt: skip


def _plot(axis: Any, xs: Sequence[float], ys: Sequence[float], label: str, **style: Any) -> None:
    """The finite points."""
    shown = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    if shown:
        axis.plot([x for x, _ in shown], [y for _, y in shown], label=label, **style)


def _positive(values: Sequence[float], largest: float = math.inf) -> list[float]:
    """What a log axis can show, the rest as NaN."""
    return [value if 0 < value <= largest else math.nan for value in values]


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
