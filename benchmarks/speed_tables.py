"""What the records of the speed benchmark say: times to an error for each problem, and how ours compare."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.harness import Record
from benchmarks.speed_methods import (
    BACKPROP,
    CHECKPOINTED,
    FAST,
    FREE_PHASE,
    IMPLICIT_CG,
    LEAN,
    NUDGED_LBFGS,
)
from benchmarks.speed_reference import ACCURATE, COLD, UNFINISHED
from benchmarks.tables import decimals, lay_out, memory, milliseconds, scientific, wrap

TARGETS = (1e-2, 1e-3)
# A network in float32 is asked for the best that implicit CG reaches, to within this factor.
_SLACK = 1.25
_PEERS = ("jaxopt", "optimistix")

Chooser = Callable[[Record], bool]


def show(records: Sequence[Record]) -> str:
    """A table for each problem and start, then what they come to."""
    blocks = []
    for case in _distinct(records, "case"):
        for start in (ACCURATE, UNFINISHED, COLD):
            rows = [row for row in records if row["case"] == case and row["start"] == start]
            if rows:
                blocks.append(_block(rows))
    notes = sorted(
        {f"'{row['method']}' on {row['case']}: {row['error']}" for row in records if row["status"] == "RAISED"}
    )
    absent = sorted({f"{row['method']}: {row['error']}" for row in records if row["status"] == "NOT_INSTALLED"})
    return "\n\n\n".join([*blocks, "\n".join([*summary(records), "", *map(wrap, [*absent, *notes])])])


def _block(rows: Sequence[Record]) -> str:
    first = rows[0]
    seeds = sorted({row["seed"] for row in rows})
    about = f"{first['title']}, {first['start']} free phase  [{first['precision']}, seeds {seeds[0]} to {seeds[-1]}]"
    distances = [row["start_distance"] for row in rows]
    off = f"{first['num_params']} parameters, {first['num_meta']} meta-parameters; the start is "
    off += f"{scientific(statistics.median(distances))} of the solution's norm away from it."
    vouched = all(row["reference_converged"] for row in rows)
    off += "" if vouched else " The reference did NOT converge for some seed: do not trust the errors."
    header = ["method", "to 1e-2 (ms)", "to 1e-3 (ms)", "over CG", "least error", "memory", "gradients", "compile s"]
    table = [_cells(rows, method) for method in _distinct(rows, "method")]
    return "\n".join([about, "", lay_out(header, table, left=(0,)), "", wrap(off)])


def _cells(rows: Sequence[Record], method: str) -> list[str]:
    here = [row for row in rows if row["method"] == method]
    timed = [row for row in here if row.get("seconds") is not None]
    if not timed:
        return [method, *["-"] * 6, here[0]["status"]]
    if method == FREE_PHASE:
        least = min(timed, key=lambda row: float(row["seconds"]))
        return [method, milliseconds(least["seconds"]), "", "", "", _most_memory([least]), _gradients([least]), ""]
    times = [_over_seeds(here, target) for target in TARGETS]
    ratio = _median(ratios(rows, _is(method), _is(IMPLICIT_CG)))
    errors = [_least_error(of_seed) for of_seed in _by_seed(timed)]
    fastest_rows = [row for row in (fastest(s, final_target(rows, s)) for s in _by_seed(here)) if row is not None]
    compiled = [row["compile_seconds"] for row in timed if row.get("compile_seconds") is not None]
    return [
        method,
        *times,
        decimals(ratio, 2),
        scientific(_median(error for error in errors if error is not None)),
        _most_memory(timed),
        _gradients(fastest_rows),
        decimals(statistics.median(compiled) if compiled else None, 1),
    ]


def _over_seeds(rows: Sequence[Record], target: float) -> str:
    """Median of the times to a target, with the range over the seeds; a dash unless most seeds reach it."""
    found = [row["seconds"] for row in (fastest(of_seed, target) for of_seed in _by_seed(rows)) if row is not None]
    if 2 * len(found) <= len(_by_seed(rows)):
        return "-"
    text = milliseconds(statistics.median(found))
    return text if len(found) == 1 else f"{text} ({milliseconds(min(found))}-{milliseconds(max(found))})"


def fastest(rows: Iterable[Record], target: float) -> Record | None:
    """The fastest point of a grid that comes as close as `target`."""
    close = [row for row in rows if row.get("relative_error") is not None and row["relative_error"] <= target]
    return min(close, key=lambda row: float(row["seconds"]), default=None)


def final_target(rows: Iterable[Record], of_seed: Sequence[Record]) -> float:
    """1e-3; on networks in float32 the best level that implicit CG reaches, if that is worse."""
    first = of_seed[0]
    if first["convex"] or first["precision"] == "float64":
        return TARGETS[-1]
    same = [row for row in rows if row["seed"] == first["seed"] and row["start"] == first["start"]]
    best = _least_error([row for row in same if row["method"] == IMPLICIT_CG])
    return TARGETS[-1] if best is None else max(TARGETS[-1], _SLACK * best)


def ratios(rows: Sequence[Record], ours: Chooser, theirs: Chooser) -> list[float]:
    """For each seed the time of the fastest of `ours` over that of the fastest of `theirs`, at the final target.

    `rows` are of one problem and one start. Seeds at which one of the two does not get there are left out.
    """
    found = []
    for of_seed in _by_seed(rows):
        target = final_target(rows, of_seed)
        pair = [fastest([row for row in of_seed if chosen(row)], target) for chosen in (ours, theirs)]
        if pair[0] is not None and pair[1] is not None:
            found.append(pair[0]["seconds"] / pair[1]["seconds"])
    return found


def summary(records: Sequence[Record]) -> list[str]:
    """How ours compare on each problem, and over all: the median and the worst of the medians over seeds."""
    contrasts = {
        "fast, typed tolerance": _is(FAST),
        "fast, best scheme": lambda row: str(row["method"]).startswith(FAST),
        "L-BFGS twice": _is(NUDGED_LBFGS),
    }
    others = {"CG": _is(IMPLICIT_CG), "peer": _of_peers}
    columns = [(start, other) for other in others for start in (ACCURATE, UNFINISHED)]
    blocks = []
    for name, ours in contrasts.items():
        found = [_by_case(records, start, ours, others[other]) for start, other in columns]
        cases = [case for case in _distinct(records, "case") if any(case in ratios_ for ratios_ in found)]
        if not cases:
            continue
        table = [[case, *(_interval(ratios_.get(case, [])) for ratios_ in found)] for case in cases]
        table.append(["median over problems", *(_overall(ratios_, statistics.median) for ratios_ in found)])
        table.append(["worst", *(_overall(ratios_, max) for ratios_ in found)])
        header = [f"contrast, {name}", *(f"over {other}, {start}" for start, other in columns)]
        blocks.append(lay_out(header, table, left=(0,)))
    title = (
        "Ratios of the times to the final target (1e-3; on networks in float32 the best level that implicit CG "
        "reaches) over implicit CG and over the faster of jaxopt and optimistix, each method at its fastest setting: "
        "median over the seeds at which both get there, and their range."
    )
    notes = [
        *_against_backprop(records),
        *_over_implicit(records, "compile_seconds", "Time to compile"),
        *_over_implicit(records, "temp_bytes", "Temporary memory"),
        *_overheads(records),
    ]
    return [wrap(title), "", *("\n\n".join(blocks).splitlines()), "", *notes]


def _by_case(records: Sequence[Record], start: str, ours: Chooser, theirs: Chooser) -> dict[str, list[float]]:
    found = {}
    for case in _distinct(records, "case"):
        rows = [row for row in records if row["case"] == case and row["start"] == start]
        of_seeds = ratios(rows, ours, theirs)
        if of_seeds:
            found[case] = of_seeds
    return found


def _interval(found: Sequence[float]) -> str:
    if not found:
        return "-"
    middle = f"{statistics.median(found):.2f}"
    return middle if len(found) == 1 else f"{middle} ({min(found):.2f}-{max(found):.2f})"


def _overall(by_case: dict[str, list[float]], of: Callable[[list[float]], float]) -> str:
    return f"{of([statistics.median(found) for found in by_case.values()]):.2f}" if by_case else "-"


def _against_backprop(records: Sequence[Record]) -> list[str]:
    lines = []
    for case in _distinct(records, "case"):
        rows = [row for row in records if row["case"] == case and row["start"] == COLD and row.get("seconds")]
        ours, full = (
            [row for row in rows if row["method"] == name and row["settings"].startswith("1000 steps")]
            for name in (FAST, BACKPROP)
        )
        any_ours = [row for row in rows if row["method"] == FAST and (row["relative_error"] or 1.0) <= TARGETS[-1]]
        kept = [row for row in rows if row["method"] == CHECKPOINTED]
        if not (ours and full):
            continue
        seconds = statistics.median(row["seconds"] for row in full)
        share = statistics.median(row["seconds"] for row in ours) / seconds
        text = f"{case}, 1,000 steps: ours take {share:.2f} of backprop's time"
        if any_ours:
            share = (
                statistics.median(min(row["seconds"] for row in of_seed) for of_seed in _by_seed(any_ours)) / seconds
            )
            text += f" ({share:.2f} with the free phase stopped in time)"
        if ours[0].get("temp_bytes") and full[0].get("temp_bytes"):
            text += f" and 1/{full[0]['temp_bytes'] / ours[0]['temp_bytes']:,.0f} of its memory"
        if kept and ours[0].get("temp_bytes"):
            text += f" (1/{kept[0]['temp_bytes'] / ours[0]['temp_bytes']:,.1f} with checkpoints)"
        lines.append(wrap(text + "."))
    return lines


def _over_implicit(records: Sequence[Record], field: str, words: str) -> list[str]:
    """What programs take, over what that of implicit CG takes, from free phases that are not cold."""
    told = []
    for name, of_name in ((FAST, "the fast contrast"), (LEAN, "sequential and without the fallback")):
        found = []
        for case in _distinct(records, "case"):
            rows = [r for r in records if r["case"] == case and r.get(field) is not None and r["start"] != COLD]
            ours, theirs = ([row[field] for row in rows if row["method"] == m] for m in (name, IMPLICIT_CG))
            if ours and theirs:
                found.append(max(ours) / max(theirs))
        if found:
            told.append(f"{of_name} {statistics.median(found):.2f} (at most {max(found):.2f})")
    return [wrap(f"{words}, over implicit CG's, median over problems: {'; '.join(told)}.")] if told else []


def _overheads(records: Sequence[Record]) -> list[str]:
    """Time of the fast contrast beyond the very free phase that it starts from, at 1e-3."""
    lines = []
    for learner in ("descent until", "L-BFGS until"):
        shares = []
        for case in _distinct(records, "case"):
            for of_seed in _by_seed([row for row in records if row["case"] == case and row["start"] == COLD]):
                same = [row for row in of_seed if row["settings"].startswith(learner) and row.get("seconds")]
                alone = [row["seconds"] for row in same if row["method"] == FREE_PHASE]
                ours = fastest([row for row in same if row["method"] == FAST], TARGETS[-1])
                if alone and ours:
                    shares.append(ours["seconds"] / alone[0] - 1)
        if shares:
            share = f"{statistics.median(shares):.0%}"
            lines.append(f"Beyond a free phase by {learner} the gradient fell the contrast takes {share} (median).")
    return lines


def _is(method: str) -> Chooser:
    return lambda row: bool(row["method"] == method)


def _of_peers(row: Record) -> bool:
    return str(row["method"]).startswith(_PEERS)


def _distinct(rows: Iterable[Record], field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def _by_seed(rows: Sequence[Record]) -> list[list[Record]]:
    return [[row for row in rows if row["seed"] == seed] for seed in sorted({row["seed"] for row in rows})]


def _least_error(rows: Iterable[Record]) -> float | None:
    return min((row["relative_error"] for row in rows if row.get("relative_error") is not None), default=None)


def _median(numbers: Iterable[float]) -> float | None:
    found = list(numbers)
    return statistics.median(found) if found else None


def _most_memory(rows: Iterable[Record]) -> str:
    return memory(max((row["temp_bytes"] for row in rows if row.get("temp_bytes") is not None), default=None))


def _gradients(rows: Iterable[Record]) -> str:
    """Gradients and Hessian-vector products together, of the points that were fastest."""
    counts = [row["num_gradients"] + row["num_hvps"] for row in rows if row.get("num_gradients") is not None]
    return f"{statistics.median(counts):.0f}" if counts else "-"
