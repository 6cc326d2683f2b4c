"""What the records of `trust` come to: a number for each promise, its verdict, and the cases that stand out."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Record
from benchmarks.tables import lay_out, scientific, wrap
from benchmarks.trust_cases import HALVES, HELD_OUT

FACTOR = 3.0
ACCURATE = 2e-3
# Statuses by which every check passed.
SURE = ("CONVERGED", "FELL_BACK")
_SHOWN = 20


class Promise(NamedTuple):
    """A number that some of the cases come to, and its bound.

    Attributes:
      text: what it is.
      of: which cases.
      value: NaN where there are none.
      bound: None where nothing was promised.
      at_most: whether the bound is an upper one.
      number: of cases.
    """

    text: str
    of: str
    value: float
    bound: float | None = None
    at_most: bool = True
    number: int = 0

    @property
    def verdict(self) -> str:
        """Whether the promise is kept."""
        if self.bound is None or math.isnan(self.value):
            return ""
        return "kept" if (self.value <= self.bound if self.at_most else self.value >= self.bound) else "MISSED"


def error_of(row: Record) -> float:
    """The true error; infinite where the gradient is not finite."""
    return math.inf if row["error"] is None else float(row["error"])


def best_of(row: Record) -> tuple[float, int]:
    """The least error of all typed strengths, and which it is."""
    errors = [math.inf if error is None else float(error) for error in row["swept"]["error"]]
    return min(errors), int(np.argmin(errors))


def regret(row: Record) -> float:
    """The error of the default's strength over that of the best one; below the floor errors count as the floor."""
    return _over(max(error_of(row), row["floor"]), max(best_of(row)[0], row["floor"]))


def regret_by_hindsight(row: Record) -> float:
    """The same of the typed strength that all 16 errors speak for, were it not for luck: the least median of three."""
    errors = [max(math.inf if error is None else float(error), row["floor"]) for error in row["swept"]["error"]]
    medians = [float(np.median(errors[k - 1 : k + 2])) for k in range(1, len(errors) - 1)]
    return _over(errors[1 + int(np.argmin(medians))], min(errors))


def told(row: Record, *, floored: bool = True) -> float:
    """The estimated error over the true one, both at least the floor; NaN where there is no finite estimate."""
    if row["estimate"] is None:
        return math.nan
    floor = row["floor"] if floored else 0.0
    return _over(max(float(row["estimate"]), floor), max(error_of(row), floor))


def sure(row: Record) -> bool:
    """Whether the status says that every check passed."""
    return row["status"] in SURE


def _over(a: float, b: float) -> float:
    if math.isinf(b):
        return 1.0 if math.isinf(a) else 0.0
    return a / b if b > 0 else (1.0 if a == 0 else math.inf)


def promises(records: Sequence[Record]) -> list[Promise]:
    """Every number that was promised, and some more, of records that are all of cases with an exact answer."""
    convex, networks = [r for r in records if r["convex"]], [r for r in records if not r["convex"]]
    found: list[Promise] = []
    for of, rows, within, below in (("convex", convex, 0.95, 0.01), ("networks", networks, 0.85, 0.03)):
        found += _of_strength(of, rows) + _of_estimate(of, rows, within, below)
    asked = [row | row["target"] for row in records if row.get("target")]
    groups: tuple[tuple[str, float, Callable[[Record], bool]], ...] = (
        ("convex float64", 0.9, lambda row: bool(row["convex"] and row["precision"] == "float64")),
        ("convex float32", 0.8, lambda row: bool(row["convex"] and row["precision"] == "float32")),
        ("networks", 0.6, lambda row: not row["convex"]),
    )
    # Before there is a `target_error`, what the default does by itself.
    name = "asked for 1e-3" if asked else "not asked for 1e-3"
    for of, share, member in groups:
        found += _of_target(name, of, [row for row in asked or records if member(row)], share)
    for of, rows in (("convex", convex), ("networks", networks)):
        found += _of_cost(of, rows)
    return found


def _of_strength(of: str, rows: Sequence[Record]) -> list[Promise]:
    regrets, hindsight = [regret(row) for row in rows], [regret_by_hindsight(row) for row in rows]
    return [
        Promise("error over that of the best of 16 strengths, median", of, _median(regrets), 1.3, number=len(rows)),
        Promise("  worst", of, max(regrets, default=math.nan), 3.0, number=len(rows)),
        Promise("  share above 3", of, _share(r > FACTOR for r in regrets), number=len(rows)),
        Promise("  chosen by hindsight, worst", of, max(hindsight, default=math.nan), number=len(rows)),
        Promise("  chosen by hindsight, share above 3", of, _share(r > FACTOR for r in hindsight), number=len(rows)),
    ]


def _of_estimate(of: str, rows: Sequence[Record], within: float, below: float) -> list[Promise]:
    ratios = [told(row) for row in rows]
    strict = [told(row, floored=False) for row in rows]
    low = [ratio < 1 / FACTOR for ratio in ratios]
    silent = [is_low and sure(row) for is_low, row in zip(low, rows, strict=True)]
    return [
        Promise(
            "error estimate within a factor 3, share", of, _share(_close(r) for r in ratios), within, False, len(rows)
        ),
        Promise("  errors below the floor as they are", of, _share(_close(r) for r in strict), number=len(rows)),
        Promise("  below a third of the true error, share", of, _share(low), below, number=len(rows)),
        Promise("  of these flagged by no status, number", of, float(sum(silent)), 0.0, number=len(rows)),
        Promise("  no finite estimate, share", of, _share(math.isnan(r) for r in ratios), number=len(rows)),
        Promise("  estimate over true error, median", of, _median([r for r in ratios if not math.isnan(r)]),
                number=len(rows)),
    ]  # fmt: skip


def _of_target(name: str, of: str, rows: Sequence[Record], share: float) -> list[Promise]:
    trusted = [row for row in rows if sure(row)]
    met = _share(error_of(row) <= ACCURATE for row in trusted)
    # Without a target the default promises nothing.
    bounds = (0.95, share) if name == "asked for 1e-3" else (None, None)
    return [
        Promise(f"{name}, of those called converged within 2e-3", of, met, bounds[0], False, len(trusted)),
        Promise("  called converged, share", of, _share(sure(row) for row in rows), bounds[1], False, len(rows)),
    ]


def _of_cost(of: str, rows: Sequence[Record]) -> list[Promise]:
    def oracle(row: Record) -> float:
        return float(row["swept"]["cost"][best_of(row)[1]])

    single = [row["cost"] / oracle(row) for row in rows]
    nudged = [_over(row["cost"] - row["free_gradients"], oracle(row) - row["free_gradients"]) for row in rows]
    trained = [row["trained"]["cost"] / row["trained"]["oracle_cost"] for row in rows if row.get("trained")]
    return [
        Promise("gradients over those of the best strength, median", of, _median(single), 1.5, number=len(rows)),
        Promise("  of the nudged phases alone", of, _median(nudged), number=len(rows)),
        Promise("  in a training loop", of, _median(trained), 1.1, number=len(trained)),
    ]


def _close(ratio: float) -> bool:
    return 1 / FACTOR <= ratio <= FACTOR


def _share(members: Any) -> float:
    flags = [bool(member) for member in members]
    return sum(flags) / len(flags) if flags else math.nan


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else math.nan


def show(records: Sequence[Record]) -> str:
    """For each half the promises and what became of them; then the cases that stand out."""
    return "\n\n".join(_half(half, here) for half in HALVES if (here := [r for r in records if r["half"] == half]))


def _half(half: str, records: Sequence[Record]) -> str:
    counted, left_out = _counted(records)
    rows = []
    for promise in promises(counted):
        bound = "" if promise.bound is None else f"{'<=' if promise.at_most else '>='} {promise.bound:g}"
        value = "-" if math.isnan(promise.value) else f"{promise.value:.3g}"
        # Constants were chosen on the other half: a verdict on it would be none.
        verdict = promise.verdict if half == HELD_OUT else promise.verdict.lower()
        rows.append([promise.text, promise.of, str(promise.number), value, bound, verdict])
    names = ", ".join(dict.fromkeys(row["case"] for row in records))
    header = ["promise", "cases", "number", "value", "bound", "verdict"]
    lines = [
        f"Trust, the {half} half: {len(counted)} cases", wrap(names), "", lay_out(header, rows, left=(0, 1, -1)),
    ]  # fmt: skip
    lines += [wrap(line) for line in left_out]
    worst = sorted((row for row in counted if _stands_out(row)), key=_badness, reverse=True)
    if worst:
        more = f", the worst {_SHOWN}" if len(worst) > _SHOWN else ""
        lines += ["", f"{len(worst)} cases stand out{more}:", "", listing(worst[:_SHOWN])]
    return "\n".join(lines)


def _counted(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Cases with an exact answer, and a line on each of the others.

    The rule: a case counts unless a program raised, or the point that its learning approaches is no minimum (the inner
    Hessian there is not positive definite, or Newton's method found no stationary point).
    """
    counted = [row for row in records if row["kind"] == "case" and row["reference_converged"]]
    reasons = [
        (row, row["error_text"] if row["kind"] == "failed" else "no minimum where learning ends")
        for row in records
        if row["kind"] == "failed" or not row["reference_converged"]
    ]
    return counted, [f"left out: {label(row)}: {reason}" for row, reason in reasons]


def label(row: Record) -> str:
    """A case in a few words."""
    bits, start = row["precision"].removeprefix("float"), ", warm" if row["warm"] else ""
    return f"{row['case']} {row['data_seed']}, {bits} bits, {row['tolerance']:.0e}, {row['scaling']}{start}"


def _badness(row: Record) -> float:
    """How many times off the worse of strength and estimate is."""
    ratio = told(row)
    return max(regret(row), math.inf if math.isnan(ratio) else max(ratio, 1 / ratio if ratio > 0 else math.inf))


def _stands_out(row: Record) -> bool:
    return _badness(row) > FACTOR


def listing(records: Sequence[Record]) -> str:
    """A line for each case."""
    header = ["case", "error", "estimate", "est/true", "best", "at", "moved", "regret", "floor", "status"]
    rows = []
    for row in records:
        best, index = best_of(row)
        ratio = told(row)
        rows.append([
            label(row), scientific(row["error"]), scientific(row["estimate"]),
            "-" if math.isnan(ratio) else f"{ratio:.2g}", scientific(best), scientific(row["displacements"][index]),
            scientific(row["displacement"]), f"{regret(row):.2g}", scientific(row["floor"]), row["status"],
        ])  # fmt: skip
    return lay_out(header, rows, left=(0, -1))
