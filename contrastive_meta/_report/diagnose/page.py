"""A diagnosis as a page of text."""

import math
from collections.abc import Sequence

import numpy as np

from contrastive_meta._report.diagnose.advice import NEAR_LEAST
from contrastive_meta._report.diagnose.curve import NEITHER
from contrastive_meta._report.diagnose.findings import Findings, Segment
from contrastive_meta._report.text import Column, lay_out, listing, share, strength, wrap

WIDTH = 100
# The axis on which the page draws the curve: one character for each third of a decade.
_PER_DECADE = 3
_LARGEST = 1.0


def page(found: Findings, advice: str) -> str:
    """All findings, the advice first, in lines of at most 100 characters."""
    status = found.status
    sections = [
        _wrap(f"Diagnosis of {found.estimator}: {status.name}."),
        _wrap(f"Advice: {advice}"),
        ["", *_curve(found)],
        ["", *_phases(found)],
        ["", *_drift(found)],
        ["", *_basin(found)],
        ["", *_result(found)],
    ]
    return "\n".join(line for section in sections for line in section)


def _curve(found: Findings) -> list[str]:
    curve = found.curve
    rows = range(len(curve.strengths))
    chosen = [">" if k == curve.chosen else "" for k in rows]
    columns = [
        Column(("",), chosen, numeric=False),
        Column(("beta",), [f"{beta:.2e}" for beta in curve.strengths]),
        Column(("error",), [f"{error:.1e}" for error in curve.errors]),
        Column(("says", "itself"), [_number(told) for told in curve.estimates]),
        Column(("error on a log axis", _axis(curve.errors)), _marks(curve.errors, curve.chosen), numeric=False),
        Column(("dominated by",), ["" if region == NEITHER else region for region in curve.regions], numeric=False),
        Column(("status",), [status.name for status in curve.statuses], numeric=False, narrowest=9),
    ]
    lines = _wrap(f"Error against strength: relative, {curve.against}.")
    lines += lay_out(columns, WIDTH)
    if not math.isfinite(curve.excess):
        return [*lines, "No contrast is finite."]
    near = curve.excess <= NEAR_LEAST
    edge = "" if near or 0 < curve.least < len(curve.strengths) - 1 else " or beyond"
    said = f"At the chosen beta = {found.beta:.2e} the error is {_excess(curve.excess)} the least, which is at beta = "
    said += f"{curve.strengths[curve.least]:.2e}{edge}."
    if curve.noise_below is not None:
        said += f" Noise, which is divided by beta, dominates up to {curve.noise_below:.2e}."
    if curve.truncation_above is not None:
        said += f" Truncation dominates from {curve.truncation_above:.2e}."
    return lines + _wrap(said)


def _excess(excess: float) -> str:
    if excess <= NEAR_LEAST:
        return f"within {NEAR_LEAST:g} times"
    return f"{excess:.1f} times" if excess < 1e3 else f"{excess:.0e} times"


def _range(errors: Sequence[float]) -> tuple[int, int]:
    """The decades that the finite, nonzero errors span."""
    logs = [math.log10(error) for error in errors if math.isfinite(error) and error > 0]
    lowest = math.floor(min(logs, default=-1.0))
    return lowest, max(math.ceil(min(max(logs, default=0.0), math.log10(_LARGEST))), lowest + 1)


def _axis(errors: Sequence[float]) -> str:
    lowest, highest = _range(errors)
    width = _PER_DECADE * (highest - lowest)
    first, last = f"1e{lowest}", f"1e{highest}"
    return f"{first}{last.rjust(width + 1 - len(first))}" if width >= len(first) + len(last) else first


def _marks(errors: Sequence[float], chosen: int) -> list[str]:
    """For each error its place on a log axis: `o`, the chosen one `@`, beyond the axis `>`."""
    lowest, highest = _range(errors)
    marks = []
    for index, error in enumerate(errors):
        if not math.isfinite(error) or error > 10.0**highest:
            place, mark = _PER_DECADE * (highest - lowest), ">"
        else:
            decades = math.log10(error) - lowest if error > 0 else 0.0
            place, mark = round(_PER_DECADE * max(decades, 0.0)), "@" if index == chosen else "o"
        # Not a blank: a table strips those.
        marks.append("." * place + mark)
    return marks


def _phases(found: Findings) -> list[str]:
    phases, noise = found.phases, found.noise or math.nan
    columns = [
        Column(("phase",), [phase.name for phase in phases], numeric=False),
        Column(("beta",), [strength(phase.beta, ".2e") for phase in phases]),
        Column(("residual",), [_number(phase.residual) for phase in phases]),
        Column(("tolerance",), [_number(phase.tolerance) for phase in phases]),
        Column(("over", "rounding"), [_number(phase.residual / noise) for phase in phases]),
        Column(("moved",), [_number(phase.moved) for phase in phases]),
        Column(("status",), [phase.status.name for phase in phases], numeric=False, narrowest=9),
    ]
    diagnostics = found.result.diagnostics
    said = (
        f"A residual is the gradient norm of the phase's own loss; rounding makes {found.noise:.1e} of it. Where the "
        f"meta-gradient is taken the free residual is {float(diagnostics.free_residual):.1e}, and that of the "
        f"nudge {share(float(diagnostics.nudged_residual))} of it. What is the same in all phases cancels."
    )
    return ["Phases: where each ended (moved: from the base point, relative to params)", *lay_out(columns, WIDTH),
            *_wrap(said)]  # fmt: skip


def _drift(found: Findings) -> list[str]:
    drift = found.drift
    return _wrap(
        f"Drift: learning on without a nudge, for as long as a nudged phase, moves params by {share(drift.distance)} "
        f"of their norm, {_times(drift.displacement)} as far as the nudge does, and the statistic by "
        f"{_times(drift.statistic)} what the nudge does; the meta-gradient taken from there differs by "
        f"{share(drift.gradient)}."
    )


def _basin(found: Findings) -> list[str]:
    segments = found.segments
    if not segments:
        return ["Basin: no nudged phase to walk to."]
    columns = [
        Column(("beta",), [f"{s.beta:.2e}" for s in segments]),
        Column(("change of", "nudged loss"), [_number(s.nudged_loss[-1]) for s in segments]),
        Column(("change of", "inner loss"), [_number(s.inner_loss[-1]) for s in segments]),
        Column(("barrier,", "nudged"), [_number(s.barrier) for s in segments]),
        Column(("barrier,", "inner"), [_number(s.inner_barrier) for s in segments]),
        Column(("curvature,", "inner"), [_number(s.curvature) for s in segments]),
        Column(("curvature,", "nudged"), [_number(s.nudged_curvature) for s in segments]),
        Column(("bend",), [share(s.bend) for s in segments]),
        Column(("found",), [_finding(s) for s in segments], numeric=False),
    ]
    return ["Basin: the straight way from the base point to each nudged phase", *lay_out(columns, WIDTH)]


def _finding(segment: Segment) -> str:
    if not math.isfinite(segment.barrier):
        return "not finite"
    if not segment.same_basin:
        return "a barrier"
    return "no minimum" if segment.is_unbounded else "same basin"


def _result(found: Findings) -> list[str]:
    diagnostics, total = found.result.diagnostics, max(sum(found.gradients.values()), 1)
    spent = ", ".join(f"{name} {count} ({100 * count / total:.0f} %)" for name, count in found.gradients.items())
    lines = _wrap(
        f"Result: outer loss {float(found.result.outer_loss):.6g}; estimated error "
        f"{share(found.told) if np.isfinite(found.told) else 'none'}; the nudge moves params by "
        f"{share(float(diagnostics.displacement))} of their norm."
    )
    lines += _wrap(f"Gradient evaluations: {sum(found.gradients.values())}: {spent}.")
    lines += _wrap(f"Status {found.status.name}: {found.status.describe()}")
    if found.result.unseen:
        lines += _wrap(f"Unseen meta-parameters, whose gradient is an exact zero: {listing(found.result.unseen)}.")
    return lines


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"


def _times(ratio: float) -> str:
    return f"{ratio:.2g} times" if math.isfinite(ratio) else "not finitely many times"


def _wrap(text: str) -> list[str]:
    return wrap(text, "  ", WIDTH)
