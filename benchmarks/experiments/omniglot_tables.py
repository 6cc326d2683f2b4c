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
    """Each claim of the experiment."""
    for shape in _shapes(records):
        here = [r for r in records if r["kind"] == "method" and _name(r) == shape]
        if shape == "5-way 1-shot":
            for name, aim in ((HEAD, _HEAD_AIM), (HEAD_TO_REST, _HEAD_AIM), (ANCHOR, _EVERY_AIM), (MAML, _EVERY_AIM)):
                yield at_least(f"{shape}: {name} is at least {aim}", list(_of(here, name, "accuracy").values()), aim)
        for first, second in (
            (HEAD, ANIL), (HEAD, ANIL_RIDGE), (HEAD_TO_REST, ANIL), (HEAD_TO_REST, HEAD), (HEAD, UNTRAINED),
            (UNTRAINED, PIXELS), (ANCHOR, MAML), (ANCHOR, IMAML), (ANCHOR, FOMAML), (ANCHOR, REPTILE), (GAINS, MAML),
            (BANK, MAML),
        ):  # fmt: skip
            columns = ("accuracy", "time"), ("accuracy_at_equal_gradients", "gradients")
            for column, at in columns[: 1 if second in (UNTRAINED, PIXELS) else 2]:
                text = f"{shape}: {first} is above {second} at equal {at}"
                # A method that does not train spends nothing: seeds alone are shared with it.
                of = _by_seed if second in (UNTRAINED, PIXELS) else _of
                yield above(text, of(here, first, column), of(here, second, column))
        for name in (HEAD, HEAD_TO_REST, ANCHOR, GAINS, BANK):
            passed = list(_of(here, name, "passed").values())
            yield at_least(f"{shape}: statuses of {name} pass in 95 % of the tasks", passed, _STATUS_AIM)
    others = [r for r in records if r["kind"] == "other shape"]
    for shape in dict.fromkeys(map(_name, others)):
        here = [r for r in others if _name(r) == shape]
        for first, second in ((HEAD, ANIL_RIDGE), (HEAD_TO_REST, ANIL_RIDGE), (HEAD, UNTRAINED)):
            text = f"{shape}, bodies trained for another shape: {first} is above {second} at equal time"
            of = _by_seed if second == UNTRAINED else _of
            yield above(text, of(here, first, "accuracy"), of(here, second, "accuracy"))
    for record in records:
        if record["kind"] == "gradients":
            for name, told in record["estimators"].items():
                text = f"cosine to the exact meta-gradient at weights of {record['case']} is above .999: {name}"
                yield at_least(text, [told["cosine"]], _COSINE_AIM)
        if record["kind"] == "overhead":
            yield at_most(f"a step of {record['case']} over the bare contrast", [record["ratio"]], _OVERHEAD_AIM)


def _of(records: Sequence[Record], name: str, column: str) -> dict[Any, float]:
    """By seed and what was to be spent: seconds, or at equal gradients their number, which runs made together share."""
    here = [r for r in records if r["case"] == name]
    if column == "accuracy_at_equal_gradients":
        return {(r["seed"], r.get("fewest_gradients")): r[column] for r in here}
    return {(r["seed"], r.get("budget", round(r.get("seconds", 0)))): r[column] for r in here}


def _by_seed(records: Sequence[Record], name: str, column: str) -> dict[Any, float]:
    return {r["seed"]: r[column] for r in records if r["case"] == name}


def show(records: Sequence[Record]) -> str:
    """Accuracies with their spread, then every claim."""
    blocks = []
    for shape in _shapes(records):
        here = [r for r in records if r["kind"] == "method" and _name(r) == shape]
        blocks.append("\n".join([f"{shape} [{here[0]['data']}, {seeds_of(here)}]", "", _accuracies(here)]))
        stopped = [f"{r['case']}, seed {r['seed']}: {r['stopped']}" for r in here if r["stopped"]]
        blocks += [wrap(text) for text in stopped]
    others = [r for r in records if r["kind"] == "other shape"]
    if others:
        blocks.append(_others(others))
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


def _others(records: Sequence[Record]) -> str:
    """A row for each body, a column for each shape that it was not trained for."""
    shapes = list(dict.fromkeys(map(_name, records)))
    rows = []
    for name in dict.fromkeys(r["case"] for r in records):
        here = [[r for r in records if (r["case"], _name(r)) == (name, shape)] for shape in shapes]
        rows.append([name, *(_mean(of, "accuracy") for of in here)])
    title = "The same bodies on tasks of other shapes, with a readout that learns with a penalty"
    return f"{title}\n\n{lay_out(['body', *shapes], rows, left=(0,))}"


def _mean(records: Sequence[Record], field: str) -> str:
    values = [r[field] for r in records]
    spread = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def _shapes(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(_name(r) for r in records if r["kind"] == "method"))


def _name(record: Record) -> str:
    return f"{record['shape']['ways']}-way {record['shape']['shots']}-shot"
