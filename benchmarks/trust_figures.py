"""The pictures of `trust`: what was told against what is true, and how much the default's strength costs."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.figures import _COLOURS, _MARKERS, _pyplot, _save
from benchmarks.harness import Record
from benchmarks.trust_cases import HALVES
from benchmarks.trust_tables import FACTOR, error_of, regret

_RANGE = (1e-13, 1e1)


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Two pictures, of all cases with an exact answer."""
    counted = [row for row in records if row["kind"] == "case" and row["reference_converged"]]
    if not counted:
        return []
    return [_estimates(counted, folder / "trust_estimates.png"), _regrets(counted, folder / "trust_strengths.png")]


def _estimates(records: Sequence[Record], path: Path) -> Path:
    """Estimated against true error: a panel for each half and kind of problem, a colour for each status."""
    plt = _pyplot()
    halves = [half for half in HALVES if any(row["half"] == half for row in records)]
    figure, axes = plt.subplots(
        len(halves), 2, figsize=(10, 1.2 + 4.6 * len(halves)), squeeze=False, sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    statuses = sorted({row["status"] for row in records})
    line = np.array(_RANGE)
    for row_of_axes, half in zip(axes, halves, strict=True):
        for axis, convex in zip(row_of_axes, (True, False), strict=True):
            axis.fill_between(line, line / FACTOR, line * FACTOR, color="0.9", label="within a factor 3")
            axis.plot(line, line, color="0.6", linewidth=0.8)
            here = [row for row in records if row["half"] == half and bool(row["convex"]) == convex]
            for index, status in enumerate(statuses):
                points = [_point(row) for row in here if row["status"] == status]
                colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
                if points:
                    axis.scatter(*zip(*points, strict=True), s=14, color=colour, marker=marker, label=status.lower())
            axis.set(xscale="log", yscale="log", xlim=_RANGE, ylim=_RANGE)
            axis.set_title(f"{'convex problems' if convex else 'networks'}, {half} half", fontsize=10)
            axis.set_xlabel("true relative error")
            axis.grid(True, which="major", alpha=0.3)
            axis.legend(fontsize=8, loc="upper left")
        row_of_axes[0].set_ylabel("`diagnostics.error_estimate`")
    figure.suptitle("What the default says of its error, and what it is (at the rim: beyond it, or not finite)")
    return _save(figure, path)


def _point(row: Record) -> tuple[float, float]:
    estimate = math.inf if row["estimate"] is None else float(row["estimate"])
    low, high = _RANGE
    return min(max(error_of(row), low), high), min(max(estimate, low), high)


def _regrets(records: Sequence[Record], path: Path) -> Path:
    """How many cases have so much larger an error than at the best of all strengths."""
    plt = _pyplot()
    halves = [half for half in HALVES if any(row["half"] == half for row in records)]
    figure, axes = plt.subplots(1, len(halves), figsize=(1 + 5 * len(halves), 4), squeeze=False, layout="constrained")
    for axis, half in zip(axes[0], halves, strict=True):
        here = [row for row in records if row["half"] == half]
        groups = [[min(regret(row), 1e3) for row in here if bool(row["convex"]) == convex] for convex in (True, False)]
        bins = np.geomspace(min([0.3, *(r for group in groups for r in group)]), 1.1e3, 40)
        axis.hist(groups, bins=bins, stacked=True, color=_COLOURS[:2], label=["convex problems", "networks"])
        axis.axvline(FACTOR, color="black", linestyle="--", linewidth=1)
        axis.set(xscale="log", xlabel="error over that of the best of 16 strengths", ylabel="cases", title=half)
        axis.legend(fontsize=9)
    return _save(figure, path)
