"""What the records on Omniglot come to: a table of accuracies, and for each claim whether it holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.experiments.omniglot_methods import (
    ANCHOR,
    ANIL,
    ANIL_RIDGE,
    FOMAML,
    HEAD,
    IMAML,
    MAML,
    PIXELS,
    REPTILE,
    UNTRAINED,
)
from benchmarks.harness import Record
from benchmarks.tables import decimals, lay_out, milliseconds, seeds_of, wrap

_ORDER = (PIXELS, UNTRAINED, HEAD, ANIL, ANIL_RIDGE, ANCHOR, IMAML, MAML, FOMAML, REPTILE)
_HEAD_AIM, _EVERY_AIM = 0.93, 0.80
_COSINE_AIM, _STATUS_AIM, _OVERHEAD_AIM = 0.999, 0.95, 1.3


def claims(records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """Each claim of the experiment: whether it holds, and the numbers that say so; None where they are missing."""
    for shape in _shapes(records):
        here = [r for r in records if r["kind"] == "method" and _name(r) == shape]
        if shape == "5-way 1-shot":
            yield _at_least(here, HEAD, _HEAD_AIM, shape)
            for name in (ANCHOR, MAML):
                yield _at_least(here, name, _EVERY_AIM, shape)
        for first, second in (
            (HEAD, ANIL), (HEAD, ANIL_RIDGE), (HEAD, UNTRAINED), (UNTRAINED, PIXELS), (ANCHOR, MAML), (ANCHOR, IMAML),
            (ANCHOR, FOMAML), (ANCHOR, REPTILE),
        ):  # fmt: skip
            for column in ("accuracy", "accuracy_at_equal_gradients"):
                yield _above(here, first, second, column, shape)
        for name in (HEAD, ANCHOR):
            passed = [r["passed"] for r in here if r["case"] == name]
            yield _limit(f"{shape}: statuses of {name} pass in 95 % of the tasks", passed, _STATUS_AIM)
    for record in records:
        if record["kind"] == "gradients":
            for name, told in record["estimators"].items():
                text = f"cosine to the exact meta-gradient at trained weights is above .999: {name}"
                yield _limit(text, [told["cosine"]], _COSINE_AIM)
        if record["kind"] == "overhead":
            held = record["ratio"] <= _OVERHEAD_AIM
            text = "a step of the package takes at most 1.3 times the bare contrast"
            yield {"claim": text, "held": held, "measured": record["ratio"], "aim": _OVERHEAD_AIM, "margin": None}


def _at_least(records: Sequence[Record], name: str, aim: float, shape: str) -> dict[str, Any]:
    return _limit(f"{shape}: {name} is at least {aim}", [r["accuracy"] for r in records if r["case"] == name], aim)


def _limit(claim: str, values: Sequence[float], aim: float) -> dict[str, Any]:
    measured = float(np.mean(values)) if values else None
    held = None if measured is None else measured >= aim
    return {"claim": claim, "held": held, "measured": measured, "aim": aim, "margin": None}


def _above(records: Sequence[Record], first: str, second: str, column: str, shape: str) -> dict[str, Any]:
    """Held where the mean difference, seed by seed, is above its standard deviation over seeds."""
    by_seed = [{r["seed"]: r[column] for r in records if r["case"] == name} for name in (first, second)]
    differences = [by_seed[0][seed] - by_seed[1][seed] for seed in sorted(by_seed[0].keys() & by_seed[1].keys())]
    at = "equal time" if column == "accuracy" else "equal gradients"
    claim = f"{shape}: {first} is above {second} at {at}"
    if not differences:
        return {"claim": claim, "held": None, "measured": None, "aim": 0.0, "margin": None}
    mean, spread = float(np.mean(differences)), float(np.std(differences, ddof=1)) if len(differences) > 1 else None
    held = None if spread is None else mean > spread
    return {"claim": claim, "held": held, "measured": mean, "aim": 0.0, "margin": spread}


def show(records: Sequence[Record]) -> str:
    """Accuracies with their spread, then every claim."""
    blocks = []
    for shape in _shapes(records):
        here = [r for r in records if r["kind"] == "method" and _name(r) == shape]
        blocks.append("\n".join([f"{shape} [{here[0]['data']}, {seeds_of(here)}]", "", _accuracies(here)]))
        stopped = [f"{r['case']}, seed {r['seed']}: {r['stopped']}" for r in here if r["stopped"]]
        blocks += [wrap(text) for text in stopped]
    told = [r for r in records if r["kind"] == "claim"]
    if told:
        header = ["claim", "measured", "aim", "spread", "held"]
        rows = [
            [
                r["claim"], decimals(r["measured"], 3), f"{r['aim']:g}", decimals(r["margin"], 3),
                "-" if r["held"] is None else "yes" if r["held"] else "NO",
            ]
            for r in told
        ]  # fmt: skip
        known = [r for r in told if r["held"] is not None]
        said = f"{sum(r['held'] for r in known)} of {len(known)} claims hold; a difference holds beyond its spread."
        blocks.append("\n".join([lay_out(header, rows), "", said]))
    return "\n\n".join(blocks)


def _accuracies(records: Sequence[Record]) -> str:
    header = [
        "method",
        "equal time",
        "equal gradients",
        "seconds",
        "compile",
        "steps",
        "ms a step",
        "gradients",
        "passed",
    ]
    rows = []
    for name in _ORDER:
        here = [r for r in records if r["case"] == name]
        if here:
            trains = here[0]["num_steps"] > 0
            step = (here[0]["seconds"] - here[0]["compile_seconds"]) / here[0]["num_steps"] if trains else None
            rows.append(
                [
                    name,
                    _mean(here, "accuracy"),
                    _mean(here, "accuracy_at_equal_gradients"),
                    f"{np.mean([r['seconds'] for r in here]):.0f}",
                    f"{here[0]['compile_seconds']:.0f}" if trains else "-",
                    f"{np.mean([r['num_steps'] for r in here]):,.0f}",
                    milliseconds(step),
                    f"{np.mean([r['num_gradients'] for r in here]):,.0f}",
                    decimals(float(np.mean([r["passed"] for r in here])), 2) if trains else "-",
                ]
            )
    return lay_out(header, rows, left=(0,))


def _mean(records: Sequence[Record], field: str) -> str:
    values = [r[field] for r in records]
    spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _shapes(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(_name(r) for r in records if r["kind"] == "method"))


def _name(record: Record) -> str:
    return f"{record['shape']['ways']}-way {record['shape']['shots']}-shot"
