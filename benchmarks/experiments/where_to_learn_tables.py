"""What the records of learned masks come to: errors, closed weights by layer, forgetting, and the claims about them."""

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.experiments.claims import Claim, above, at_least, show_claims
from benchmarks.experiments.where_to_learn_methods import ALL, CONTRAST, FEWER, FIRST, HEAD, MORE, RELU, SIGN, THROUGH
from benchmarks.experiments.where_to_learn_settings import OMNIGLOT, SINUSOIDS, STREAM
from benchmarks.harness import Record
from benchmarks.tables import decimals, lay_out, seeds_of, wrap

_SETTINGS = (SINUSOIDS, STREAM, OMNIGLOT)
# R14: a graded mask closes more than this of the weights, all of which are open at first.
_CLOSED = 0.1


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """E3 and R14; comparisons of errors are of logarithms."""
    here = [r for r in records if r["kind"] == "method"]

    def of(setting: str, method: str, column: str, logarithm: bool = False) -> dict[int, float]:
        rows = [r for r in here if r["setting"] == setting and r["method"] == method and r[column] is not None]
        return {r["seed"]: float(np.log(r[column])) if logarithm else r[column] for r in rows}

    def errs_more(setting: str, more: str, less: str, columns: Sequence[tuple[str, str]]) -> Iterator[Claim]:
        for column, where in columns:
            text = f"{setting}: {more} errs more than {less}{where}"
            yield above(text, of(setting, more, column, True), of(setting, less, column, True))

    both = ("error", ""), ("error_at_equal_time", ", equal time"), ("error_at_equal_gradients", ", equal gradients")
    for setting in _SETTINGS:
        for how in (THROUGH, CONTRAST):
            for form in (SIGN, RELU):
                for rival in (ALL, HEAD):
                    # Their programs are the same, so that equal steps are equal gradients.
                    yield from errs_more(setting, f"{rival} {how}", f"{form} {how}", both[:1])
        yield from errs_more(setting, f"{ALL} {THROUGH}", f"{SIGN} {FIRST}", both[:1])
        for form in (SIGN, RELU):
            yield from errs_more(setting, f"{form} {THROUGH}", f"{form} {CONTRAST}", both[1:])
    yield from errs_more(SINUSOIDS, FEWER, MORE, both[:1])
    for setting in _SETTINGS:
        for how in (THROUGH, CONTRAST):
            name = f"{SIGN} {how}"
            text = f"{setting}: {name} closes weights beyond the half closed at first"
            yield above(text, of(setting, name, "closed"), of(setting, name, "closed_at_first"))
            shares = list(of(setting, f"{RELU} {how}", "closed").values())
            yield at_least(f"R14: {setting}: {RELU} {how} closes a tenth of the weights", shares, _CLOSED)
            for form in (SIGN, RELU):
                rows = [r for r in here if r["case"] == f"{setting}: {form} {how}"]
                ends = [[*r["closed_by_layer"].values()] for r in rows]
                first, last = ({r["seed"]: e[k] for r, e in zip(rows, ends, strict=True)} for k in (0, -1))
                text = f"{setting}: {form} {how} closes more of the first layer than of the readout"
                yield above(text, first, last)
    for setting, how in ((SINUSOIDS, THROUGH), (SINUSOIDS, CONTRAST), (STREAM, THROUGH)):
        for form in (SIGN, RELU):
            text = f"{setting}: {ALL} {how} forgets more of a stream than {form}"
            more, less = (_forgotten(here, f"{setting}: {what} {how}") for what in (ALL, form))
            yield above(text, more, less)


def _forgotten(records: Sequence[Record], case: str) -> dict[int, float]:
    """What the error on the first segments rises by until the end."""
    rows = [r for r in records if r["case"] == case and r["stream_at_once"] is not None]
    return {r["seed"]: r["stream_at_the_end"] - r["stream_at_once"] for r in rows}


def show(records: Sequence[Record]) -> str:
    """A table for each setting, then every claim that something was measured for."""
    here = [r for r in records if r["kind"] == "method"]
    told = [claim for claim in claims(records) if claim["measured"] is not None]
    return "\n\n".join([*_blocks(here), show_claims(told)]).rstrip()


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
        rows.append([name, _with_spread([r["error"] for r in of]), *errors, *counts, *shares, *stream])
    return lay_out(header, rows, left=(0,))


def _mean(values: Sequence[float | None], places: int) -> str:
    known = [v for v in values if v is not None]
    return decimals(float(np.mean(known)) if known else None, places)


def _with_spread(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    spread = f" +- {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{_mean(known, 3)}{spread}"
