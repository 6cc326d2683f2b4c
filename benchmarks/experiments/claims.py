"""Comparative claims as records: held or not held beyond the spread over seeds, with the numbers that say so."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Session
from benchmarks.tables import lay_out

Claim = dict[str, Any]


def claim(text: str, values: Sequence[float], aim: float, held: bool | None) -> Claim:
    """The mean of the values and their standard deviation over seeds; `held` None where nothing was measured."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    measured = float(np.mean(values)) if len(values) else None
    return {"claim": text, "measured": measured, "spread": spread, "aim": aim, "held": held}


def at_least(text: str, values: Sequence[float], aim: float) -> Claim:
    """The mean of the values is."""
    return claim(text, values, aim, bool(np.mean(values) >= aim) if len(values) else None)


def at_most(text: str, values: Sequence[float], aim: float) -> Claim:
    """The mean of the values is."""
    return claim(text, values, aim, bool(np.mean(values) <= aim) if len(values) else None)


def above(text: str, firsts: Mapping[Any, float], seconds: Mapping[Any, float]) -> Claim:
    """The mean difference, seed by seed, is above its standard deviation over seeds; one seed decides nothing.

    Args:
      text: of the claim.
      firsts: values by seed, claimed to be larger.
      seconds: values by seed.
    """
    shared = sorted(firsts.keys() & seconds.keys())
    differences = [firsts[seed] - seconds[seed] for seed in shared]
    held = bool(np.mean(differences) > np.std(differences, ddof=1)) if len(shared) > 1 else None
    return claim(text, differences, 0.0, held)


def record_claims(session: Session, told: Iterable[Claim], *, x64: bool = False) -> None:
    """Put claims among the records of a run; `x64` is the precision that they are shown with."""
    for made in told:
        session.record(x64=x64, kind="claim", case="claims", **made)


def show_claims(told: Sequence[Claim]) -> str:
    """A row for each claim, and how many hold."""
    if not told:
        return ""
    words = {None: "-", True: "yes", False: "NO"}
    rows = [
        [row["claim"], _number(row["measured"]), _number(row["spread"]), f"{row['aim']:.4g}", words[row["held"]]]
        for row in told
    ]
    known = [row for row in told if row["held"] is not None]
    table = lay_out(["claim", "mean", "spread", "aim", "held"], rows)
    return f"{table}\n\n{sum(row['held'] for row in known)} of {len(known)} claims that could be decided hold."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
