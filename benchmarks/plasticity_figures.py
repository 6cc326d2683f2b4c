"""What was learned, as a physiologist would plot it: strengths as images, masks by layer, fast parameters by task."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.figures import _pyplot, _save
from benchmarks.harness import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(records: Sequence[Record], path: Path) -> Path:
    """One panel for each rule, the last for the learners."""
    plt = _pyplot()
    judged = [record for record in records if record["score"]]
    pictured, others = ([r for r in judged if ("picture" in r) == with_one] for with_one in (True, False))
    panels = len(pictured) + bool(others)
    columns = min(4, panels)
    rows = -(-panels // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.2 * rows), squeeze=False, layout="constrained")
    for axis, record in zip(axes.flat, pictured, strict=False):
        _draw_picture(axis, record["picture"])
        axis.set_title(f"{record['case']}\n{record['says']}: {record['number']:.2f}", fontsize=8)
    if others:
        _draw_learners(axes.flat[len(pictured)], others)
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    return _save(figure, path)


def _draw_picture(axis: "Axes", picture: dict[str, Any]) -> None:
    rows = np.asarray(picture["rows"], float)
    if picture["kind"] == "images":
        image = axis.imshow(np.concatenate([rows[0], np.full((8, 1), np.nan), rows[1]], axis=1), cmap="viridis")
        axis.figure.colorbar(image, ax=axis, shrink=0.6, label="mean log strength")
        axis.set_xlabel(" | ".join(picture["names"]), fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    elif picture["kind"] == "layers":
        axis.bar(picture["names"], rows, color="#0072B2")
        axis.tick_params(labelsize=7)
    else:
        limit = np.percentile(np.abs(rows), 98) or 1.0
        image = axis.imshow(rows, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.figure.colorbar(image, ax=axis, label="change within the task")
        axis.set_xlabel("fast parameters", fontsize=8)
        axis.locator_params(integer=True)
        axis.set_ylabel(picture["names"][0], fontsize=8)


def _draw_learners(axis: "Axes", records: Sequence[Record]) -> None:
    places = np.arange(len(records))
    for shift, when, colour in ((-0.2, "before", "#999999"), (0.2, "after", "#D55E00")):
        axis.barh(places + shift, [record[when] for record in records], 0.4, label=when, color=colour)
    names = [textwrap.fill(record["case"], 16) + f"\n({record['score']})" for record in records]
    axis.set_yticks(places, names, fontsize=7)
    axis.invert_yaxis()
    axis.legend(fontsize=7, frameon=False)
    axis.set_title("local learners, held-out", fontsize=8)
