"""The pictures of README and docs, as SVG text that follows a reader's light or dark theme."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import Record

# One parameter w: the inner loss is (w - TARGET)^2 / 2 + PENALTY w^2 / 2, the outer loss (w - VALIDATION_TARGET)^2 / 2.
# The strength is far larger than in practice, so that the two ends can be told apart in print.
TARGET, PENALTY, VALIDATION_TARGET, BETA, START = 3.0, 0.5, 0.6, 1.0, 4.2
WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BASE = 720, 330, 30, 690, 34, 190
_LOWEST, _HIGHEST, _LOSS_SHOWN = 0.0, 4.6, 3.4

# Of `beta_curves`: one problem, the schemes shown and how each is drawn.
CURVES_OF, CURVES_IN = "breast cancer", "float32"
_SCHEMES = {"forward": "outer", "central": "inner", "four-point": "nudged"}
_CURVES = _SCHEMES | {"change from the last": "inner", "true error": "outer"}
# As `_contrastive/step_size.py` has it; the ladder of the picture begins where noise dominates.
LADDER_FACTOR, _LADDER_FROM, _LADDER_LENGTH = 8.0, 2.0**-17, 7
# Of `analysis`: kind, problem and seed, and the strength.
_UNFINISHED, UNFINISHED_BETA = ("steps", "ridge", 0), 0.01

STYLE = """\
text { font: 14px system-ui, sans-serif; fill: #222 }
.inner { stroke: #0072B2 } .nudged { stroke: #D55E00 } .outer { stroke: #777; stroke-dasharray: 5 4 }
.axis { stroke: #777 } path, polyline, line { fill: none; stroke-width: 2 }
circle.inner { fill: #0072B2 } circle.nudged { fill: #D55E00 }
text.inner { fill: #0072B2; stroke: none } text.nudged { fill: #B84A00; stroke: none }
text.outer { fill: #666; stroke: none }
@media (prefers-color-scheme: dark) {
  text { fill: #ddd } .inner { stroke: #56B4E9 } circle.inner, text.inner { fill: #56B4E9 }
  .nudged { stroke: #E69F00 } circle.nudged, text.nudged { fill: #E69F00 } text.outer { fill: #aaa }
}"""


def inner_loss(w: float) -> float:
    """What the free phase minimises."""
    return 0.5 * (w - TARGET) ** 2 + 0.5 * PENALTY * w**2


def outer_loss(w: float) -> float:
    """What the meta-gradient is a gradient of."""
    return 0.5 * (w - VALIDATION_TARGET) ** 2


def nudged_loss(w: float) -> float:
    """What the nudged phase minimises."""
    return inner_loss(w) + BETA * outer_loss(w)


def free_end() -> float:
    """The minimum of the inner loss, in closed form."""
    return TARGET / (1 + PENALTY)


def nudged_end() -> float:
    """The minimum of the nudged loss, in closed form."""
    return (TARGET + BETA * VALIDATION_TARGET) / (1 + PENALTY + BETA)


def across(w: float) -> float:
    """The horizontal place of a parameter, in pixels."""
    return _LEFT + (_RIGHT - _LEFT) * (w - _LOWEST) / (_HIGHEST - _LOWEST)


def contrast_svg() -> str:
    """Free phase, nudged phase and their contrast on one axis of learning."""
    least = inner_loss(free_end())
    free, nudged, start = across(free_end()), across(nudged_end()), across(START)
    parts = [
        _curve(outer_loss, "outer", 0.0),
        _curve(inner_loss, "inner", least),
        _curve(nudged_loss, "nudged", least),
        line((_LEFT, _BASE), (_RIGHT, _BASE), "axis"),
        text(_RIGHT, _BASE + 18, "what is learned, w", "outer", anchor="end"),
        text(across(0.03), 162, "outer loss", "outer"),
        text(across(3.42), 132, "inner loss", "inner"),
        text(across(2.6), 50, "inner loss + β outer loss", "nudged", anchor="end"),
        _dot(free, _height(inner_loss(free_end()), least), "inner"),
        _dot(nudged, _height(nudged_loss(nudged_end()), least), "nudged"),
        _arrow(start, free, 222, "inner"),
        text(start + 8, 227, "free phase", "inner"),
        text(free - 8, 227, "measure g(0)", "inner", anchor="end"),
        _arrow(free, nudged, 250, "nudged"),
        text(free + 8, 255, "nudged phase", "nudged"),
        text(nudged - 8, 255, "measure g(β)", "nudged", anchor="end"),
        f'<path class="axis" d="M {free:.1f} 268 v 8 H {nudged:.1f} v -8"/>',
        text((free + nudged) / 2, 294, "contrast: (g(β) − g(0)) / β", "", anchor="middle"),
        text(
            (free + nudged) / 2, 314, "the gradient of the outer loss after learning, for small β", "", anchor="middle"
        ),
    ]
    about = (
        "A free phase ends at the minimum of the inner loss, a nudged phase a little nearer to that of the outer loss."
    )
    return drawing(parts, about, WIDTH, _HEIGHT)


def truncation_svg(records: Sequence[Record]) -> str:
    """Error against strength for schemes of order 1, 2 and 4, and the strengths that `automatic` selected.

    Args:
      records: of `beta_curves`, its newest runs.
    """
    here = [row for row in records if (row["case"], row["precision"]) == (CURVES_OF, CURVES_IN)]
    here = [row for row in here if row["scheme"] in _SCHEMES]
    curves = {
        row["scheme"]: [pair for pair in zip(row["betas"], row["errors"], strict=True) if pair[1]]
        for row in here
        if row["kind"] == "curve"
    }
    return _log_log(
        curves,
        {row["scheme"]: (row["beta"], row["error"]) for row in here if row["kind"] == "chosen"},
        (-5, 1),
        (-7, 1),
        "strength β, in units of the outer loss",
        f"relative error of the meta-gradient; {CURVES_OF}, {CURVES_IN}",
        "Noise falls with the strength and truncation grows with it. Dots: the strengths that were selected.",
    )


def unfinished_svg(records: Sequence[Record]) -> str:
    """Error against steps of the free phase: the bare forward rule, and the central one whose drift cancels.

    Args:
      records: of `analysis`, its newest runs.
    """
    here = [row for row in records if (row["kind"], row["case"], row.get("seed")) == _UNFINISHED]
    curves = {}
    for row in here:
        if row["scheme"] in _SCHEMES:
            at_beta = row["errors"][row["betas"].index(UNFINISHED_BETA)]
            curves[row["scheme"]] = [
                (steps, by_nudged[-1]) for steps, by_nudged in zip(row["marks"], at_beta, strict=True)
            ]
    return _log_log(
        curves,
        {},
        (0, 4),
        (-5, 3),
        f"steps of the free phase, before {here[0]['marks'][-1]:,} nudged ones",
        f"relative error of the meta-gradient; ridge, {here[0]['precision']}, β = {UNFINISHED_BETA}",
        "What is still to be learned is divided by β in the forward rule, and cancels in the central one.",
    )


def ladder_svg() -> str:
    """The ladder of strengths on the problem of `contrast_svg`, in float32: differences of neighbours, and true errors.

    The contrast is central; its statistic is half the square of the parameter, the derivative in the penalty.
    """
    strengths = [_LADDER_FROM * LADDER_FACTOR**k for k in range(_LADDER_LENGTH)]
    contrasts = [float(_central(np.float32(beta))) for beta in strengths]
    exact = -free_end() * (free_end() - VALIDATION_TARGET) / (1 + PENALTY)
    errors = [abs(contrast / exact - 1) for contrast in contrasts]
    changes = [abs(after - before) / abs(exact) for before, after in itertools.pairwise(contrasts)]
    least = min(range(len(changes)), key=changes.__getitem__)
    return _log_log(
        {
            "change from the last": list(zip(strengths[1:], changes, strict=True)),
            "true error": list(zip(strengths, errors, strict=True)),
        },
        {"change from the last": (strengths[least + 1], changes[least])},
        (-6, 1),
        (-7, 1),
        f"strength β; each is {LADDER_FACTOR:g} times the one before",
        "relative; one parameter, float32, central difference",
        "Changes between neighbouring strengths fall with the noise and rise with truncation, as the true errors do.",
    )


def _central(beta: np.float32) -> np.float32:
    """(g(beta) - g(-beta)) / (2 beta) in single precision, from the closed form of the minimum."""

    def statistic(strength: np.float32) -> np.float32:
        numbers = np.array([TARGET, VALIDATION_TARGET, 1 + PENALTY, 0.5], np.float32)
        end = (numbers[0] + strength * numbers[1]) / (numbers[2] + strength)
        half_square: np.float32 = numbers[3] * end * end
        return half_square

    contrast: np.float32 = (statistic(beta) - statistic(-beta)) / (beta + beta)
    return contrast


def write(folder: Path, curves: Sequence[Record], analysis: Sequence[Record]) -> list[Path]:
    """All pictures of this file, into a folder; their paths.

    Args:
      folder: made if it is not there.
      curves: records of `beta_curves`, its newest runs.
      analysis: records of `analysis`, its newest runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"contrast.svg": contrast_svg(), "ladder.svg": ladder_svg()}
    if curves:
        drawn["truncation.svg"] = truncation_svg(curves)
    if any((row["kind"], row["case"], row.get("seed")) == _UNFINISHED for row in analysis):
        drawn["unfinished.svg"] = unfinished_svg(analysis)
    for name, content in drawn.items():
        (folder / name).write_text(content, encoding="utf-8")
    return [folder / name for name in drawn]


def _log_log(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    dots: Mapping[str, tuple[float, float]],
    across_decades: tuple[int, int],
    error_decades: tuple[int, int],
    label: str,
    note: str,
    about: str,
) -> str:
    left, right, top, base = 70, 690, 20, 270
    spacing = 30 + 7 * max(map(len, curves))  # 7 pixels a letter

    def x(value: float) -> float:
        low, high = across_decades
        return left + (right - left) * (math.log10(value) - low) / (high - low)

    def y(error: float) -> float:
        low, high = error_decades
        return base - (base - top) * (math.log10(error) - low) / (high - low)

    parts = [line((left, base), (right, base), "axis"), line((left, base), (left, top), "axis")]
    for k in range(across_decades[0], across_decades[1] + 1):
        parts.append(text(x(10.0**k), base + 18, f"1e{k}", "outer", anchor="middle"))
    parts += [text(left - 8, y(10.0**k) + 5, f"1e{k}", "outer", anchor="end") for k in range(*error_decades, 2)]
    for index, (scheme, pairs) in enumerate(curves.items()):
        points = [(x(value), y(error)) for value, error in pairs]
        shown = [(a, b) for a, b in points if left <= a <= right and top <= b <= base]
        parts.append(f'<polyline class="{_CURVES[scheme]}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in shown)}"/>')
        parts.append(text(left + 330 + spacing * index, top - 4, scheme, _CURVES[scheme]))
    parts += [_dot(x(value), y(error), _CURVES[scheme]) for scheme, (value, error) in dots.items()]
    parts.append(text((left + right) / 2, base + 42, label, "", anchor="middle"))
    parts.append(text(left + 8, base - 10, note, "outer"))
    return drawing(parts, about, WIDTH, _HEIGHT)


def drawing(parts: Sequence[str], about: str, width: float, height: float) -> str:
    """An SVG file of some parts."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
    return "\n".join([head, f"<title>{about}</title>", f"<style>\n{STYLE}\n</style>", *parts, "</svg>\n"])


def _height(loss: float, least: float) -> float:
    return _BASE - 12 - (_BASE - 12 - _TOP) * (loss - least) / _LOSS_SHOWN


def _curve(loss: Callable[[float], float], name: str, least: float) -> str:
    grid: Sequence[float] = [_LOWEST + (_HIGHEST - _LOWEST) * k / 230 for k in range(231)]
    points = [(across(w), _height(loss(w), least)) for w in grid if loss(w) - least <= _LOSS_SHOWN]
    return f'<polyline class="{name}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def line(start: tuple[float, float], end: tuple[float, float], name: str) -> str:
    """A straight line, in pixels."""
    return f'<line class="{name}" x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'


def _arrow(start: float, end: float, y: float, name: str) -> str:
    return f'<path class="{name}" d="M {start:.1f} {y} H {end:.1f} m 8 -5 l -8 5 l 8 5"/>'


def _dot(x: float, y: float, name: str) -> str:
    return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'


def text(x: float, y: float, words: str, name: str, *, anchor: str = "start") -> str:
    """Words in a class of `STYLE`."""
    return f'<text class="{name}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>'
