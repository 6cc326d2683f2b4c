"""What the records of learned masks come to: errors, closed weights by layer, forgetting, and the claims about them."""

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.experiments.claims import Claim, above, at_least
from benchmarks.experiments.where_to_learn_methods import ALL, CONTRAST, FEWER, FIRST, HEAD, MORE, RELU, SIGN, THROUGH
from benchmarks.experiments.where_to_learn_settings import OMNIGLOT, SINUSOIDS, STREAM
from benchmarks.harness import Record
from benchmarks.tables import decimals, lay_out, seeds_of, wrap

_SETTINGS = (SINUSOIDS, STREAM, OMNIGLOT)
# A stream has no equilibrium to contrast.
_FAMILIES = (
    (SINUSOIDS, THROUGH), (SINUSOIDS, CONTRAST), (STREAM, THROUGH), (OMNIGLOT, THROUGH), (OMNIGLOT, CONTRAST)
)  # fmt: skip
# R14: a graded mask closes more than this of the weights, all of which are open at first.
_CLOSED = 0.1


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """E3 and R14; comparisons of errors are of logarithms."""
    here = [r for r in records if r["kind"] == "method"]

    def of(case: str, column: str, logarithm: bool = False) -> dict[int, float]:
        rows = [r for r in here if r["case"] == case and r[column] is not None]
        return {r["seed"]: float(np.log(r[column])) if logarithm else r[column] for r in rows}

    def errs_more(text: str, more: str, less: str, column: str = "error") -> Claim:
        return above(text, of(more, column, True), of(less, column, True))

    for setting, how in _FAMILIES:
        where = _where(setting, how)
        for form in (SIGN, RELU):
            case = f"{setting}: {form} {how}"
            for rival in (ALL, HEAD):
                # Their programs are the same, or of one shape: equal steps are equal gradients, and equal time.
                yield errs_more(f"{where}: {rival} errs more than {form}", f"{setting}: {rival} {how}", case)
            if form == SIGN:
                yield above(
                    f"{where}: {form} closes more than at first", of(case, "closed"), of(case, "closed_at_first")
                )
            else:
                yield at_least(f"{where}: {form} closes a tenth (R14)", list(of(case, "closed").values()), _CLOSED)
            first, last = (_closed_at(here, case, end) for end in (0, -1))
            yield above(f"{where}: {form} closes more of the first layer than of the last", first, last)
            if setting != OMNIGLOT:
                more, less = (_forgotten(here, f"{setting}: {what} {how}") for what in (ALL, form))
                yield above(f"{where}: {ALL} forgets more of a stream than {form}", more, less)
    for setting in (SINUSOIDS, OMNIGLOT):
        text = f"{setting}: {ALL} {THROUGH} errs more than {SIGN} {FIRST}"
        yield errs_more(text, f"{setting}: {ALL} {THROUGH}", f"{setting}: {SIGN} {FIRST}")
        for form in (SIGN, RELU):
            for at in ("time", "gradients"):
                text = f"{setting}: {form} {THROUGH} errs more than {CONTRAST} at equal {at}"
                through, contrast = (f"{setting}: {form} {how}" for how in (THROUGH, CONTRAST))
                yield errs_more(text, through, contrast, f"error_at_equal_{at}")
    text = f"{SINUSOIDS}: {SIGN} {THROUGH} errs more from 1/4 closed than from 3/4"
    yield errs_more(text, f"{SINUSOIDS}: {FEWER}", f"{SINUSOIDS}: {MORE}")


def _where(setting: str, how: str) -> str:
    return f"{setting} {how}"


def _forgotten(records: Sequence[Record], case: str) -> dict[int, float]:
    """What the error on the first segments rises by until the end."""
    rows = [r for r in records if r["case"] == case and r["stream_at_once"] is not None]
    return {r["seed"]: r["stream_at_the_end"] - r["stream_at_once"] for r in rows}


def _closed_at(records: Sequence[Record], case: str, end: int) -> dict[int, float]:
    """The closed fraction of the first layer, or of the last."""
    return {r["seed"]: [*r["closed_by_layer"].values()][end] for r in records if r["case"] == case}


def show(records: Sequence[Record]) -> str:
    """A table for each setting, then every claim that something was measured for."""
    here = [r for r in records if r["kind"] == "method"]
    told = [claim for claim in claims(records) if claim["measured"] is not None]
    places = [_where(*family) for family in _FAMILIES]
    placed = [claim for claim in told if claim["claim"].split(": ")[0] in places]
    others = [claim for claim in told if claim not in placed]
    known = [claim for claim in told if claim["held"] is not None]
    title = "Mean of the difference, or of the fraction (R14), its spread over seeds, and whether the claim holds"
    held = f"{sum(claim['held'] for claim in known)} of {len(known)} claims that could be decided hold."
    return "\n\n".join([*_blocks(here), title, *(_side_by_side(part) for part in (placed, others) if part), held])


def _side_by_side(told: Sequence[Claim]) -> str:
    """Claims that are made of several settings: a row for each claim, a column for each setting."""
    words = {None: "-", True: "yes", False: "NO"}
    cells = {}
    for claim in told:
        where, text = claim["claim"].split(": ")
        spread = "" if claim["spread"] is None else f" ({claim['spread']:.2f})"
        cells[text, where] = f"{claim['measured']:.2f}{spread} {words[claim['held']]}"
    columns, texts = (list(dict.fromkeys(key[k] for key in cells)) for k in (1, 0))
    rows = [[text, *(cells.get((text, where), "") for where in columns)] for text in texts]
    header = ["claim", *(where.replace(" learning", "") for where in columns)]
    return lay_out(header, rows, left=(0,))


def _blocks(records: Sequence[Record]) -> Iterator[str]:
    what = {
        SINUSOIDS: "Whole sinusoids: mean squared error on new ones",
        STREAM: "Streams: mean squared error on new sinusoids that are met in segments, at the end",
        OMNIGLOT: "Reduced Omniglot, 5-way 1-shot: fraction of wrong labels on unseen alphabets",
    }
    for setting in _SETTINGS:
        here = [r for r in records if r["setting"] == setting]
        if here:
            yield f"{what[setting]} [{seeds_of(here)}]\n\n{_table(here)}"
            for r in here:
                if r["stopped"]:
                    yield wrap(f"{r['case']}, seed {r['seed']}: {r['stopped']}")


def _table(records: Sequence[Record]) -> str:
    layers = list(dict.fromkeys(name for r in records for name in r["closed_by_layer"]))
    streamed = any(r["stream_at_once"] is not None for r in records)
    header = ["method", "error", "at time", "at grads", "unlearned", "s", "steps", "grads", "closed", *layers]
    header += ["learned", "kept"] if streamed else []
    rows = []
    for name in dict.fromkeys(r["method"] for r in records):
        of = [r for r in records if r["method"] == name]
        columns = "error_at_equal_time", "error_at_equal_gradients", "error_unlearned"
        errors = [_mean([r[c] for r in of], 3) for c in columns]
        counts = [f"{np.mean([r[c] for r in of]):,.0f}" for c in ("seconds", "num_steps", "num_gradients")]
        shares = [
            _mean([r["closed"] for r in of], 2),
            *(_mean([r["closed_by_layer"].get(k) for r in of], 2) for k in layers),
        ]
        stream = [_mean([r[c] for r in of], 2) for c in ("stream_at_once", "stream_at_the_end")] if streamed else []
        short = (
            name.replace(THROUGH, "through")
            .replace("a quarter", "1/4")
            .replace("three quarters", "3/4")
            .replace(" at first", "")
        )
        rows.append([short, _with_spread([r["error"] for r in of]), *errors, *counts, *shares, *stream])
    return lay_out(header, rows, left=(0,))


def _mean(values: Sequence[float | None], places: int) -> str:
    known = [v for v in values if v is not None]
    return decimals(float(np.mean(known)) if known else None, places)


def _with_spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    spread = f" +- {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{_mean(known, 3)}{spread}"
