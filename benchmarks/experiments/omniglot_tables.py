"""What the records on Omniglot come to: a table of accuracies, and for each claim whether it holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.experiments.claims import Claim, above, at_least, at_most, show_claims
from benchmarks.experiments.omniglot_methods import (
    ANCHOR,
    ANIL,
    ANIL_RIDGE,
    BANK,
    FOMAML,
    GAINS,
    HEAD,
    HEAD_TO_REST,
    IMAML,
    MAML,
    PIXELS,
    REPTILE,
    UNTRAINED,
)
from benchmarks.harness import Record
from benchmarks.tables import decimals, lay_out, milliseconds, seeds_of, wrap

_ORDER = (
    PIXELS, UNTRAINED, HEAD, HEAD_TO_REST, ANIL, ANIL_RIDGE, ANCHOR, GAINS, BANK, IMAML, MAML, FOMAML, REPTILE,
)  # fmt: skip
_HEAD_AIM, _EVERY_AIM = 0.93, 0.80
_COSINE_AIM, _STATUS_AIM, _OVERHEAD_AIM = 0.999, 0.95, 1.3


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """Each claim of the experiment that has a record of the method that it is about."""
    for title, here in _groups(records, "method"):
        told = {r["case"] for r in here}
        if title.startswith("5-way 1-shot"):
            for name, aim in ((HEAD, _HEAD_AIM), (HEAD_TO_REST, _HEAD_AIM), (ANCHOR, _EVERY_AIM), (MAML, _EVERY_AIM)):
                if name in told:
                    yield at_least(f"{title}: {name} is at least {aim}", [*_of(here, name, "accuracy").values()], aim)
        for first, second in (
            (HEAD, ANIL), (HEAD, ANIL_RIDGE), (HEAD_TO_REST, ANIL), (HEAD_TO_REST, HEAD), (HEAD, UNTRAINED),
            (UNTRAINED, PIXELS), (ANCHOR, MAML), (ANCHOR, IMAML), (ANCHOR, FOMAML), (ANCHOR, REPTILE), (GAINS, MAML),
            (BANK, MAML),
        ):  # fmt: skip
            columns = ("accuracy", "time"), ("accuracy_at_equal_gradients", "gradients")
            for column, at in columns[: 1 if second in (UNTRAINED, PIXELS) else 2]:
                if first in told:
                    text = f"{title}: {first} is above {second} at equal {at}"
                    yield above(text, _of(here, first, column), _of(here, second, column))
        for name in (HEAD, HEAD_TO_REST, ANCHOR, GAINS, BANK):
            if name in told:
                passed = list(_of(here, name, "passed").values())
                yield at_least(f"{title}: statuses of {name} pass in 95 % of the tasks", passed, _STATUS_AIM)
    for title, here in _groups(records, "other shape"):
        for first, second in ((HEAD, ANIL_RIDGE), (HEAD_TO_REST, ANIL_RIDGE), (HEAD, UNTRAINED)):
            if any(r["case"] == first for r in here):
                text = f"{title}, bodies trained for another shape: {first} is above {second} at equal time"
                yield above(text, _of(here, first, "accuracy"), _of(here, second, "accuracy"))
    for record in records:
        if record["kind"] == "gradients":
            for name, told in record["estimators"].items():
                text = f"cosine to the exact meta-gradient at weights of {record['case']} is above .999: {name}"
                yield at_least(text, [told["cosine"]], _COSINE_AIM)
        if record["kind"] == "overhead":
            yield at_most(f"a step of {record['case']} over the bare contrast", [record["ratio"]], _OVERHEAD_AIM)


def _groups(records: Sequence[Record], kind: str) -> Iterator[tuple[str, list[Record]]]:
    """What may be compared: of each shape the methods of one budget, and with each what does not train."""
    for shape in dict.fromkeys(_name(r) for r in records if r["kind"] == kind):
        here = [r for r in records if r["kind"] == kind and _name(r) == shape]
        budgets = dict.fromkeys(_budget(r) for r in here if r["case"] not in (UNTRAINED, PIXELS))
        for budget in budgets or (None,):
            rows = [r for r in here if r["case"] in (UNTRAINED, PIXELS) or _budget(r) == budget]
            yield shape if budget is None else f"{shape}, {budget:g} s", rows


def _budget(record: Record) -> float | None:
    """Seconds of the processor; of records that do not say, those that were spent."""
    budget: float | None = record["budget"] if "budget" in record else round(record["seconds"])
    return budget


def _of(records: Sequence[Record], name: str, column: str) -> dict[Any, float]:
    """By seed; at equal gradients by their number as well, which only runs that were made together share."""
    key = "seed" if column != "accuracy_at_equal_gradients" else "equal"
    rows = [{**r, "equal": (r["seed"], r.get("fewest_gradients"))} for r in records if r["case"] == name]
    return {row[key]: row[column] for row in rows}


def show(records: Sequence[Record]) -> str:
    """Accuracies with their spread, then every claim."""
    blocks = []
    for title, here in _groups(records, "method"):
        blocks.append("\n".join([f"{title} [{here[0]['data']}, {seeds_of(here)}]", "", _accuracies(here)]))
        stopped = [f"{r['case']}, seed {r['seed']}: {r['stopped']}" for r in here if r["stopped"]]
        blocks += [wrap(text) for text in stopped]
    for title, here in _groups(records, "other shape"):
        rows = [
            [name, _mean([r for r in here if r["case"] == name], "accuracy")]
            for name in _ORDER
            if name in {r["case"] for r in here}
        ]
        blocks.append(f"{title}: the same bodies\n\n{lay_out(['body', 'accuracy'], rows, left=(0,))}")
    return "\n\n".join([*blocks, show_claims([*claims(records)])]).rstrip()


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


def _name(record: Record) -> str:
    return f"{record['shape']['ways']}-way {record['shape']['shots']}-shot"
