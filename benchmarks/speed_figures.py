"""The pictures of the speed benchmark: error against time, gradients and memory, a panel for each problem."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.figures import _COLOURS, _MARKERS, _pyplot, _save
from benchmarks.harness import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_AXES = (
    ("time", "time of value and meta-gradient (ms)"),
    ("gradients", "gradients and Hessian-vector products"),
    ("memory", "compiled temporary memory (KiB)"),
)


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """A picture for each start and quantity."""
    paths = []
    for start in dict.fromkeys(row["start"] for row in records if row["start"]):
        for quantity, label in _AXES:
            rows = [row for row in records if row["start"] == start and _place(row, quantity) is not None]
            if rows:
                paths.append(_draw(rows, quantity, label, folder / f"speed_{start}_{quantity}.png"))
    return paths


def _place(row: Record, quantity: str) -> float | None:
    if not row.get("relative_error"):
        return None
    if quantity == "time":
        return 1e3 * float(row["seconds"])
    if quantity == "memory":
        return float(row["temp_bytes"]) / 1024 if row.get("temp_bytes") else None
    return row["num_gradients"] + row["num_hvps"] if row.get("num_gradients") is not None else None


def _draw(rows: Sequence[Record], quantity: str, label: str, path: Path) -> Path:
    plt = _pyplot()
    cases = list(dict.fromkeys(row["case"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    columns = min(4, len(cases))
    lines = math.ceil(len(cases) / columns)
    width = max(7.0, 3.8 * columns)
    entries = int(width // 2.3)  # of the legend, side by side
    height = 1.0 + 3.2 * lines + 0.2 * math.ceil(len(methods) / entries)
    figure, axes = plt.subplots(lines, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for case, axis in zip(cases, axes.ravel(), strict=False):
        _draw_panel(axis, [row for row in rows if row["case"] == case], quantity, methods)
        axis.set_title(case, fontsize=10)
    for axis in axes.ravel()[len(cases) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel(label, fontsize=9)
    figure.supylabel("relative error of the meta-gradient", fontsize=10)
    handles = [plt.Line2D([], [], label=method, **_style(methods, method)) for method in methods]
    figure.legend(handles=handles, loc="outside lower center", ncols=entries, fontsize=8, frameon=False)
    start, precision, seed = (rows[0][field] for field in ("start", "precision", "seed"))
    figure.suptitle(f"From {_article(start)} free phase, {precision}, seed {seed}", fontsize=11)
    return _save(figure, path)


def _draw_panel(axis: "Axes", rows: Sequence[Record], quantity: str, methods: Sequence[str]) -> None:
    """What each method reaches for what it may cost, of the first seed: the points that no other of its grid beats."""
    seed = rows[0]["seed"]
    for method in methods:
        here = [row for row in rows if row["method"] == method and row["seed"] == seed]
        places = sorted((_place(row, quantity), row["relative_error"]) for row in here)
        best, kept = math.inf, []
        for place, error in places:
            if error < best:
                best = error
                kept.append((place, error))
        if kept:
            axis.plot(*zip(*kept, strict=True), **_style(methods, method))
    _make_log(axis)


def draw_scaling(records: Sequence[Record], reached: Any, cost: Any, path: Path) -> Path:
    """Evaluations and time to the target against size: a column for each axis.

    Args:
      records: of `speed_scaling`.
      reached: `(records, axis, method, field) -> records`, the cheapest of each size.
      cost: `(record, field) -> number`.
      path: of the picture.
    """
    plt = _pyplot()
    names = list(dict.fromkeys(row["case"] for row in records))
    methods = list(dict.fromkeys(row["method"] for row in records))
    figure, axes = plt.subplots(
        2, len(names), figsize=(1.5 + 3.8 * len(names), 6.6), squeeze=False, sharex="col", layout="constrained"
    )
    fields = (("evaluations", "gradients and Hessian-vector products"), ("seconds", "time (s)"))
    for column, name in enumerate(names):
        for line, (field, label) in enumerate(fields):
            axis = axes[line][column]
            for method in methods:
                rows = reached(records, name, method, field)
                if rows:
                    places = [row["size"] for row in rows]
                    axis.plot(places, [cost(row, field) for row in rows], **_style(methods, method))
            _make_log(axis)
            if column == 0:
                axis.set_ylabel(label)
        axes[1][column].set_xlabel(name)
    handles = [plt.Line2D([], [], label=method, **_style(methods, method)) for method in methods]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(methods), fontsize=9, frameon=False)
    figure.suptitle(f"Cost of a meta-gradient to 1e-3, {records[0]['precision']}", fontsize=11)
    return _save(figure, path)


def _make_log(axis: "Axes") -> None:
    """Logarithmic, over whole decades where there is less than one: ticks have room and two labels at least."""
    for scale, limits, place in (
        (axis.set_xscale, axis.get_xlim, axis.set_xlim),
        (axis.set_yscale, axis.get_ylim, axis.set_ylim),
    ):
        scale("log")
        least, most = limits()
        if 0 < least < most < 10 * least:
            place(10.0 ** math.floor(math.log10(least)), 10.0 ** math.ceil(math.log10(most)))
    for which in (axis.xaxis, axis.yaxis):
        # Laying out minor ticks was half of the time of a picture.
        which.set_minor_locator(_null_locator())
    axis.grid(True, which="major", alpha=0.3)


def _null_locator() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _style(methods: Sequence[str], method: str) -> dict[str, Any]:
    index = methods.index(method)
    dashes = ("-", "--", ":", "-.")[(index // len(_COLOURS)) % 4]
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)],
        "markersize": 4,
        "linewidth": 1.2,
        "linestyle": dashes,
    }


def _article(start: str) -> str:
    return f"an {start}" if start[0] in "aeiou" else f"a {start}"
