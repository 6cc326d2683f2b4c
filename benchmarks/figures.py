"""The pictures, drawn from records: log-log, in colours that colour-blind readers can tell apart."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.harness import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito (2008); each also has a marker of its own, so that a grey print can be read.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LARGEST_SHOWN = 1e2


def draw_beta_curves(records: Sequence[Record], path: Path) -> Path:
    """Relative error against beta: a row of panels for each precision, a column for each problem."""
    plt = _pyplot()
    cases = list(dict.fromkeys(record["case"] for record in records))
    precisions = sorted({record["precision"] for record in records})
    schemes = list(dict.fromkeys(record["scheme"] for record in records if record["kind"] == "curve"))
    size = (1.0 + 4.6 * len(cases), 1.3 + 3.4 * len(precisions))
    figure, axes = plt.subplots(
        len(precisions), len(cases), figsize=size, squeeze=False, sharex=True, sharey="row", layout="constrained"
    )
    for row, precision in enumerate(precisions):
        for column, case in enumerate(cases):
            here = [r for r in records if (r["case"], r["precision"]) == (case, precision)]
            axis = axes[row][column]
            _draw_panel(axis, here, schemes)
            axis.set_title(f"{here[0]['title'].split(':')[0]}, {precision}" if here else "", fontsize=10)
            if column == 0:
                axis.set_ylabel("relative error of the meta-gradient")
            if row == len(precisions) - 1:
                axis.set_xlabel("nudging strength beta (in units of the outer loss)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(
        "Error of contrast against the nudging strength\n(stars: `automatic`, of order 2 by default, and 4)",
        fontsize=11,
    )
    return _save(figure, path)


def _draw_panel(axis: "Axes", records: Sequence[Record], schemes: Sequence[str]) -> None:
    for index, scheme in enumerate(schemes):
        curve = next((r for r in records if r["kind"] == "curve" and r["scheme"] == scheme), None)
        if curve is None:
            continue
        points = [(b, e) for b, e in zip(curve["betas"], curve["errors"], strict=True) if e and e <= _LARGEST_SHOWN]
        style: dict[str, Any] = {"color": _COLOURS[index], "marker": _MARKERS[index]}
        axis.plot(*zip(*points, strict=True), label=scheme, markersize=3.2, linewidth=1.2, **style)
    for record in records:
        if record["kind"] == "chosen" and record["error"]:
            colour = _COLOURS[schemes.index(record["scheme"])]
            axis.plot(
                record["beta"], record["error"], "*", color=colour, markersize=15, markeredgecolor="black", zorder=5
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(True, which="major", alpha=0.3)


def draw_scaling(records: Sequence[Record], path: Path) -> Path:
    """Temporary memory and time against the number of inner steps, in the precision of the first record."""
    plt = _pyplot()
    records = [record for record in records if record["precision"] == records[0]["precision"]]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    quantities = (
        ("temp_bytes", 2.0**-20, "compiled temporary memory (MiB)"),
        ("seconds", 1.0, "time of one estimate (s)"),
    )
    for axis, (field, unit, label) in zip(axes, quantities, strict=True):
        for index, name in enumerate(dict.fromkeys(record["method"] for record in records)):
            rows = [record for record in records if record["method"] == name and record.get(field)]
            axis.loglog(
                [row["num_steps"] for row in rows],
                [row[field] * unit for row in rows],
                label=name,
                color=_COLOURS[index],
                marker=_MARKERS[index],
            )
        axis.set_xlabel("inner steps")
        axis.set_ylabel(label)
        axis.grid(True, which="major", alpha=0.3)
    axes[0].legend(fontsize=9)
    first = records[0]
    figure.suptitle(f"Cost against inner steps: {first['title'].split(':')[0]}, {first['precision']}")
    return _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_tuning(records: Sequence[Record], path: Path) -> Path:
    """A column for each task: test accuracy against gradients, and below how tuning moved decays and smoothing."""
    plt = _pyplot()
    cases = list(dict.fromkeys(record["case"] for record in records))
    methods = list(dict.fromkeys(record["method"] for record in records))
    figure, axes = plt.subplots(2, len(cases), figsize=(1 + 3.2 * len(cases), 6.6), squeeze=False, layout="constrained")
    for column, case in enumerate(cases):
        here = [record for record in records if record["case"] == case]
        axis, below = axes[0][column], axes[1][column]
        for index, method in enumerate(methods):
            found = [record for record in here if record["method"] == method]
            axis.plot(
                [record["num_gradients"] / record["setting"]["num_steps"] for record in found],
                [100 * record["accuracy"] for record in found],
                _MARKERS[index % len(_MARKERS)],
                color=_COLOURS[index % len(_COLOURS)],
                fillstyle="full" if index < len(_COLOURS) else "none",
                label=method,
                markersize=5,
            )
        axis.set_xscale("log")
        axis.set_title(case, fontsize=10)
        axis.set_xlabel("gradients, times a plain run")
        _draw_paths(below, [record for record in here if record.get("paths") and record["method"] == "alternating"])
    axes[0][0].set_ylabel("test accuracy (%)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return _save(figure, path)


def _draw_paths(axis: "Axes", records: Sequence[Record]) -> None:
    """Logarithms of decays by layer, of all seeds and starts; an empty axis where none is tuned."""
    if not records:
        axis.axis("off")
        return
    layers = list(records[0]["paths"]["decay"])
    for record in records:
        for index, layer in enumerate(layers):
            path = record["paths"]["decay"][layer]
            steps = [record["setting"]["num_steps"] * (k + 1) / len(path) for k in range(len(path))]
            first = record is records[0]
            axis.plot(steps, path, color=_COLOURS[index], linewidth=1, label=layer if first else None)
    axis.set_xlabel("training steps")
    axis.set_ylabel("log decay, alternating")
    axis.legend(fontsize=7)


def draw_sparse(records: Sequence[Record], path: Path) -> Path:
    """The least validation loss so far over the least of the grid, against outer steps: a panel for each case."""
    plt = _pyplot()
    paths = [record for record in records if record.get("losses")]
    cases = list(dict.fromkeys(record["case"] for record in paths))
    methods = list(dict.fromkeys(record["method"] for record in paths))
    columns = min(3, len(cases))
    rows = -(-len(cases) // columns)
    size = (1.0 + 3.6 * columns, 1.3 + 2.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, case in zip(axes.flat, cases, strict=False):
        for record in paths:
            if record["case"] != case:
                continue
            index, lowest = methods.index(record["method"]), record["lowest_of_grid"]
            ratios = [100 * (min(record["losses"][: k + 1]) / lowest - 1) for k in range(len(record["losses"]))]
            # The contrast and jaxopt often take the same steps: the first of both is drawn below the other, and larger.
            style: dict[str, Any] = {"markersize": 6.5 - 3.3 * (index > 0), "linewidth": 2.4 - 1.2 * (index > 0)}
            axis.plot(ratios, color=_COLOURS[index], marker=_MARKERS[index], **style)
        axis.axhspan(-1, 1, color="#999999", alpha=0.25, linewidth=0)
        axis.set_yscale("symlog", linthresh=1.0)
        axis.set_title(case, fontsize=10)
        axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("outer steps")
    figure.supylabel("least validation loss so far, above the grid's (%)", fontsize=10)
    handles = [
        axes[0][0].plot([], [], color=_COLOURS[k], marker=_MARKERS[k], label=m)[0] for k, m in enumerate(methods)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(methods), fontsize=9, frameon=False)
    return _save(figure, path)


def draw_loops(records: Sequence[Record], path: Path) -> Path:
    """Time of each outer step of the training loops on digits: a panel for each problem, a line for each method."""
    plt = _pyplot()
    panels = list(dict.fromkeys((record["problem"], record["precision"]) for record in records))
    size = (1.0 + 4.6 * len(panels), 5.0)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    names = list(dict.fromkeys(record["method"] for record in records))
    lines = {}
    for axis, panel in zip(axes[0], panels, strict=True):
        for record in records:
            if (record["problem"], record["precision"]) == panel:
                index = names.index(record["method"])
                style: dict[str, Any] = {
                    "color": _COLOURS[index % len(_COLOURS)],
                    "linestyle": "-" if index < len(_COLOURS) else "--",
                }
                milliseconds = [1e3 * seconds for seconds in record["all_seconds"]]
                (lines[record["method"]],) = axis.semilogy(milliseconds, linewidth=1.2, **style)
        axis.set_title(", ".join(panel), fontsize=10)
        axis.set_xlabel("outer step")
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("time of the step (ms)")
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _save(figure, path)


def draw_alignment(students: Sequence[Record], path: Path) -> Path:
    """How alike the units of teachers and students are: a panel for each student, of the first seed."""
    plt = _pyplot()
    students = [r for r in students if r["seed"] == min(r["seed"] for r in students)]
    columns = min(len(students), 4)
    rows = -(-len(students) // columns)
    size = (1.2 + 3.4 * columns, 0.8 + 2.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    image = None
    for axis in axes.flat[len(students) :]:
        axis.set_visible(False)
    for axis, student in zip(axes.flat, students, strict=False):
        # Each student's unit beside the teacher's unit that it is most like: what was found lies on the diagonal.
        cosines = np.array(student["similarities"], float)
        order = np.lexsort((-cosines.max(0), cosines.argmax(0)))
        image = axis.imshow(cosines[:, order], vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
        axis.set_title(f"{student['case']}\nworst unit {student['worst_alignment']:.2f}", fontsize=9)
        axis.set_xlabel("unit of the student, sorted", fontsize=9)
        axis.set_ylabel("unit of the teacher", fontsize=9)
    if image is not None:
        figure.colorbar(image, ax=axes, label="cosine (best linear map)", shrink=0.9)
    return _save(figure, path)


def draw_attention(records: Sequence[Record], path: Path) -> Path:
    """R^2 on unseen combinations against the share of seen ones, and codes of the hypernetwork form."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for index, name in enumerate(dict.fromkeys(record["attention"] for record in records)):
        of = [record for record in records if record["attention"] == name]
        shares = sorted({record["share"] for record in of})
        for field, line in (("unseen", "-"), ("inside", ":")):
            values = [[record[field] for record in of if record["share"] == share] for share in shares]
            label = name if field == "unseen" else None
            style: dict[str, Any] = {"color": _COLOURS[index], "marker": _MARKERS[index], "linestyle": line}
            axes[0].errorbar(
                [100 * share for share in shares],
                [np.mean(v) for v in values],
                [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values],
                capsize=3,
                label=label,
                **style,
            )
    axes[0].set_xlabel("combinations seen (%)")
    axes[0].set_ylabel("R^2 on unseen combinations (dotted: on seen ones)")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    shown = next((r for r in records if r["attention"] == "hypernetwork" and r.get("codes")), None)
    if shown:
        components = np.array(shown["codes"]["components"], float)
        shared = np.array(shown["codes"]["shared"], bool)
        for index, (kept, label) in enumerate(((~shared, "another conjunction"), (shared, "the same conjunction"))):
            axes[1].scatter(*components[kept].T, color=_COLOURS[index], s=5, alpha=0.5, label=label)
        axes[1].set_xlabel("code along the difference of means")
        axes[1].set_ylabel("leading component across it")
        axes[1].set_title("queries and examples of unseen combinations", fontsize=10)
        axes[1].legend(fontsize=9)
    return _save(figure, path)


def draw_in_context(records: Sequence[Record], path: Path) -> Path:
    """Error on unseen pairs against error on training pairs, a point for each run; on the diagonal there is no gap."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5.2, 4.6), layout="constrained")
    for index, case in enumerate(dict.fromkeys(record["case"] for record in records)):
        of = [record for record in records if record["case"] == case]
        errors = [[record[field] for record in of] for field in ("inside", "unseen")]
        axis.loglog(*errors, _MARKERS[index], color=_COLOURS[index], label=case)
    limits = [*axis.get_xlim(), *axis.get_ylim()]
    axis.plot([min(limits), max(limits)], [min(limits), max(limits)], color="#999999", linewidth=1)
    axis.set_xlabel("error on training pairs, 1 - R^2")
    axis.set_ylabel("error on unseen pairs")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return _save(figure, path)


def draw_modules(records: Sequence[Record], path: Path) -> Path:
    """The error of unseen items as linear networks learn, closed form dashed; and accuracies of digits in pairs."""
    plt = _pyplot()
    linear = [r for r in records if r["kind"] == "linear"]
    first = min(r["seed"] for r in linear)
    linear = [r for r in linear if r["seed"] == first and r["num_bits"] == max(r["num_bits"] for r in linear)]
    figure, (axis, bars) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    networks = list(dict.fromkeys(r["network"] for r in linear))
    for record in linear:
        color = f"C{networks.index(record['network'])}"
        style = {"lw": 3, "alpha": 0.4, "color": color}
        label = record["network"] if record["scale"] == max(r["scale"] for r in linear) else None
        axis.plot(record["times"], record["curve"], label=label, **style)
        axis.plot(record["times"], record["curve_closed"], "--", lw=1, color=color)
    axis.set(xlabel="time of gradient flow", ylabel="error on bits of unseen items", yscale="log", ylim=(1e-6, 2))
    axis.set_title(
        f"{linear[0]['num_bits']} bits, names scaled by "
        + ", ".join(f"{scale:g}" for scale in sorted({r["scale"] for r in linear})),
        fontsize=9,
    )
    axis.legend(fontsize=9)
    read = [r for r in records if r["kind"] == "digits"]
    for place, name in enumerate(dict.fromkeys(r["network"] for r in read)):
        for shift, kind in ((-0.2, "seen"), (0.2, "unseen")):
            values = [r[kind] for r in read if r["network"] == name]
            color = "C7" if kind == "seen" else "C3"
            bars.bar(place + shift, np.mean(values), 0.36, color=color, label=f"{kind} pairs" if place == 0 else None)
            bars.plot([place + shift] * len(values), values, "k.", ms=4)
    bars.set_xticks(range(place + 1), list(dict.fromkeys(r["network"] for r in read)))
    bars.set(ylabel="digits read right", ylim=(0, 1.05))
    bars.legend(fontsize=9, loc="lower right")
    return _save(figure, path)


def draw_worlds(records: Sequence[Record], path: Path) -> list[Path]:
    """Grid worlds of unseen combinations, and the ways that teacher and learners take in them; none without worlds."""
    plt = _pyplot()
    worlds = [r for r in records if r["kind"] == "world"]
    if not worlds:
        return []
    figure, axes = plt.subplots(1, len(worlds), figsize=(3.3 * len(worlds), 3.9), squeeze=False, layout="constrained")
    for axis, world in zip(axes.flat, worlds, strict=True):
        axis.imshow(np.array(world["walls"]), cmap="Greys", vmin=0, vmax=1.6)
        for row, column, name in world["objects"]:
            axis.text(column, row, name, ha="center", va="center", fontsize=9, zorder=3)
        names = ["teacher", *(name for name in world["paths"] if name != "teacher")]
        for number, name in enumerate(names):
            # Ways are drawn beside each other, and a dot ends each.
            rows, columns = np.array(world["paths"][name], float).T + 0.09 * (number - (len(names) - 1) / 2)
            style = {"color": "k", "lw": 3} if name == "teacher" else {"color": f"C{number - 1}", "lw": 1.5}
            axis.plot(columns, rows, label=name, alpha=0.8, zorder=2, **style)
            axis.plot(columns[-1], rows[-1], "o", color=style["color"], ms=5)
        axis.set(xticks=[], yticks=[])
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return [_save(figure, path)]


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
    return path
