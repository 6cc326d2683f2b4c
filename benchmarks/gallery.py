"""The thumbnails of docs/gallery.md: one small picture of the records of each benchmark, a dot for each method."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.doc_figures import drawing, line, text
from benchmarks.harness import Record

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 520, 270, 490, 34, 22
# Labels are cut after this many letters, 7 pixels each, so that they end where the dots begin.
_LETTERS = 36


class Thumbnail(NamedTuple):
    """Which numbers of a benchmark are shown.

    Attributes:
      shown: whether a record is; records with one `label` are the seeds of one dot.
      label: the name of a record's dot.
      value: what is drawn.
      axis: what that is, in words, the better end named.
      contrast: names of the dots that learn by contrast, in another colour.
      log: whether the axis is logarithmic.
    """

    shown: Callable[[Record], bool]
    label: Callable[[Record], str]
    value: Callable[[Record], float]
    axis: str
    contrast: Sequence[str]
    log: bool = False


def _method(record: Record) -> str:
    return str(record["method"])


def _case(record: Record) -> str:
    return str(record["case"])


def _after_colon(record: Record) -> str:
    return str(record["case"]).partition(": ")[2]


THUMBNAILS: Mapping[str, Thumbnail] = {
    "estimators": Thumbnail(
        lambda row: (row["case"], row["precision"]) == ("breast cancer", "float32") and bool(row.get("relative_error")),
        _method,
        lambda row: row["relative_error"],
        "relative error, logistic regression, float32 (left is better)",
        (
            "contrastive (default)",
            "contrastive, learner run twice",
            "contrastive, four-point",
            "contrastive, complex step",
            "forward as published",
        ),
        log=True,
    ),
    "scaling_steps": Thumbnail(
        lambda row: row["num_steps"] == 10_000,
        _method,
        lambda row: row["temp_bytes"] / 1024,
        "memory in KiB at 10,000 inner steps (left is better)",
        ("contrastive (default)", "contrastive, learner run twice"),
        log=True,
    ),
    "tuning": Thumbnail(
        lambda row: (row["kind"], row["case"], row.get("start")) == ("method", "MNIST 50 % wrong", "usual"),
        _method,
        lambda row: row["accuracy"],
        "test accuracy, half of the labels wrong (right is better)",
        ("alternating", "single loop"),
    ),
    "regularisation": Thumbnail(
        lambda row: (row["kind"], row["case"]) == ("method", "digits and noise"),
        _method,
        lambda row: row["test_accuracy"],
        "test accuracy, a penalty for each weight (right is better)",
        ("contrast",),
    ),
    "sinusoids": Thumbnail(
        lambda row: row["kind"] == "method",
        _case,
        lambda row: row["error_at_equal_gradients"],
        "squared error at equal gradients (left is better)",
        ("anchor", "anchor and strengths", "gains", "fast head", "control: weak anchor", "control: constant rates"),
    ),
    "omniglot": Thumbnail(
        lambda row: row["kind"] == "method" and row["shape"]["ways"] == 5,
        _case,
        lambda row: row["accuracy_at_equal_gradients"],
        "accuracy at equal gradients (right is better)",
        (
            "fast head by contrast",
            "fast head by contrast at rest",
            "anchor by contrast",
            "gains by contrast",
            "module bank by contrast",
        ),
    ),
    "spiking": Thumbnail(
        lambda row: row["kind"] == "method",
        _case,
        lambda row: row["error_at_equal_gradients"],
        "error at equal gradients (left is better)",
        ("anchor by contrast", "anchor and strengths by contrast"),
    ),
    "where_to_learn": Thumbnail(
        lambda row: row["kind"] == "method" and row["case"].startswith("sinusoids: ") and ";" not in row["case"],
        _after_colon,
        lambda row: row["error_at_equal_gradients"],
        "squared error at equal gradients (left is better)",
        ("all plastic by contrast", "head only by contrast", "sign mask by contrast", "ReLU mask by contrast"),
    ),
    "bandit": Thumbnail(
        lambda row: row["kind"] == "method",
        _case,
        lambda row: sum(row["regret"]["0.9"]) / len(row["regret"]["0.9"]),
        "regret in % of chance's, wheel 0.9 (left is better)",
        ("anchor", "gains"),
        log=True,
    ),
    "bilevel_suite": Thumbnail(
        lambda row: row["kind"] == "method" and row["problem"] == "quadratic",
        _after_colon,
        lambda row: row["norms"][-1],
        "norm of the meta-gradient at the end, quadratic (left is better)",
        ("single loop", "single loop, central"),
        log=True,
    ),
    "hyperteacher": Thumbnail(
        lambda row: row["kind"] == "student",
        _case,
        lambda row: row["unseen"][-1],
        "squared error on pairs never seen (left is better)",
        ("ring by contrast", "groups by contrast"),
        log=True,
    ),
    "attention": Thumbnail(
        lambda row: row["kind"] == "transformer",
        _case,
        lambda row: row["unseen"],
        "R^2 on combinations never seen, fuzzy logic (right is better)",
        (),
    ),
    "in_context": Thumbnail(
        lambda row: row["kind"] == "transformer",
        _case,
        lambda row: row["unseen"],
        "error on combinations never seen, in context (left is better)",
        (),
    ),
    "goals": Thumbnail(
        lambda row: row["kind"] == "learner",
        _case,
        lambda row: row["error_unseen"],
        "error on combinations never seen, grid worlds (left is better)",
        (),
    ),
    "modules": Thumbnail(
        lambda row: row["kind"] == "digits",
        lambda row: str(row["network"]),
        lambda row: row["unseen"],
        "accuracy on pairs of digits never seen (right is better)",
        (),
    ),
}


def draw(records: Sequence[Record], what: Thumbnail) -> str:
    """A dot at the mean of the seeds, a line over their range, the methods in the order of the records.

    Args:
      records: of one benchmark, its newest runs.
      what: which of them, and how.

    Returns:
      SVG text.
    """
    values: dict[str, list[float]] = {}
    for record in records:
        if what.shown(record) and math.isfinite(number := float(what.value(record))):
            values.setdefault(what.label(record), []).append(number)
    every = [number for numbers in values.values() for number in numbers]
    low, high = min(every), max(every)

    def x(number: float) -> float:
        scale = math.log10 if what.log else float
        return _LEFT + (_RIGHT - _LEFT) * (scale(number) - scale(low)) / ((scale(high) - scale(low)) or 1.0)

    base = _TOP + _ROW * len(values)
    parts = [text(8, 18, what.axis, ""), line((_LEFT, base), (_RIGHT, base), "axis")]
    for k, (name, numbers) in enumerate(values.items()):
        y, colour = _TOP + _ROW * (k + 0.5), "nudged" if name in what.contrast else "inner"
        parts.append(text(_LEFT - 12, y + 5, name[:_LETTERS], colour, anchor="end"))
        parts.append(line((x(min(numbers)), y), (x(max(numbers)), y), colour))
        parts.append(f'<circle class="{colour}" cx="{x(sum(numbers) / len(numbers)):.1f}" cy="{y:.1f}" r="5"/>')
    for number in (low, high):
        told = f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
        parts.append(text(x(number), base + 18, told, "outer", anchor="middle"))
    return drawing(parts, what.axis, _WIDTH, base + 28)


def write(folder: Path, records: Mapping[str, Sequence[Record]]) -> list[Path]:
    """All thumbnails with records, into a folder; their paths.

    Args:
      folder: made if it is not there.
      records: of each benchmark, its newest runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, what in THUMBNAILS.items():
        if records[name]:
            paths.append(folder / f"{name}.svg")
            paths[-1].write_text(draw(records[name], what), encoding="utf-8")
    return paths
