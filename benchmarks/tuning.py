"""One training run on half-mislabelled digits: weights of examples learned on the way, against what it could be."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import contrastive_meta as cm
from benchmarks import figures
from benchmarks.harness import Record, Session, precision
from benchmarks.tables import decimals, lay_out, wrap
from benchmarks.tuning_methods import CERTAIN, Choices, Fixed, Trained, Tuned, tuned, unrolled, with_scores
from benchmarks.tuning_task import Digits, Instance, load

NAME = "tuning"
ABOUT = "weights of half-mislabelled examples, learned in one training run of a small CNN, against what it could be"

NUM_SEEDS, NUM_TRIALS = 5, 20
# Choices were made on these seeds, which are not among those reported. Tried were: single loop at rate 0.02, beta
# measured, 0.1, 0.3, 1, 3 and 10; alternating every 6 to 10 steps at rates 0.05, 0.1 and 0.3, beta measured and 0.1 to
# 30, runs of 1 and 5 steps; unrolled every 10 steps at rates 0.1 and 0.3, and every 2 at 0.02 and 0.05.
CHOSEN_ON = (100, 101, 102)

PLAIN, ORACLE, CLEAN, SEARCH = "no weights", "wrong ones left out", "clean examples alone", "random search"
SINGLE, ALTERNATING, DARTS = "single loop", "alternating", "one step unrolled"
_TUNED: dict[str, tuple[Callable[[Instance], Tuned], Choices]] = {
    SINGLE: (tuned, Choices(rate=0.02, every=1, mode=cm.SingleLoop())),
    ALTERNATING: (tuned, Choices(rate=0.1, every=10, mode=cm.Alternating(beta=10.0))),
    DARTS: (lambda setting: unrolled(setting, 1, 0.05), Choices(rate=0.05, every=2)),
}
CASES = (PLAIN, ORACLE, CLEAN, *_TUNED, SEARCH)


class _Ran(NamedTuple):
    """A method's result on one seed: the run that counts, and the gradients of all runs it took."""

    trained: Trained
    num_gradients: int
    choices: dict[str, Any]


def run(session: Session) -> None:
    """Every method on every seed: the same data, first parameters, batches, steps and stopping."""
    setting = Instance(num_train=200, num_steps=40) if session.smoke else Instance()
    num_seeds = 1 if session.smoke else session.num_seeds or NUM_SEEDS
    seeds = range(session.seed, session.seed + num_seeds)
    session.refuse_unknown_cases(CASES)
    with precision(x64=False):
        methods = _methods(setting, 2 if session.smoke else NUM_TRIALS)
        for name in [case for case in CASES if case in (session.cases or CASES)]:
            session.progress.begin(name, num_seeds)
            for seed in seeds:
                session.progress.step(f"seed {seed}")
                _record(dataclasses.replace(session, seed=seed), setting, name, methods[name], session.data)


def _record(
    session: Session, setting: Instance, name: str, method: Callable[[Digits], _Ran], folder: Path | None
) -> None:
    digits = load("digits", setting, session.seed, folder)
    start = time.perf_counter()
    trained, num_gradients, choices = jax.block_until_ready(method(digits))
    weights, wrong = np.asarray(jax.nn.sigmoid(trained.scores)), np.asarray(digits.corrupted)
    learned = name in _TUNED
    session.record(
        x64=False,
        case=name,
        setting=setting._asdict(),
        choices=choices,
        chosen_on=CHOSEN_ON,
        accuracy=trained.accuracies[-1],
        accuracies=trained.accuracies,
        val_loss=trained.val_loss,
        num_gradients=num_gradients,
        auc=_auc(np.asarray(trained.scores), ~wrong) if learned else None,
        weight_of_right=weights[~wrong].mean() if learned else None,
        weight_of_wrong=weights[wrong].mean() if learned else None,
        num_failed=trained.num_failed,
        seconds=time.perf_counter() - start,
    )


def _methods(setting: Instance, num_trials: int) -> dict[str, Callable[[Digits], _Ran]]:
    certain = with_scores(setting, lambda digits: jnp.full(digits.y_train.shape, CERTAIN))
    oracle = with_scores(setting, lambda digits: jnp.where(digits.corrupted, -CERTAIN, CERTAIN))

    def plain(method: Fixed, data: Callable[[Digits], Digits] = lambda digits: digits) -> Callable[[Digits], _Ran]:
        return lambda digits: _Ran(method(data(digits), 0.0), setting.num_steps, {})

    def learned(make: Callable[[Instance], Tuned], choices: Choices) -> Callable[[Digits], _Ran]:
        method = make(setting)

        def tune(digits: Digits) -> _Ran:
            trained = method(digits, choices)
            mode = {} if choices.mode is None else {"mode": type(choices.mode).__name__, "beta": choices.mode.beta}
            told = {"rate": choices.rate, "every": choices.every, **mode}
            return _Ran(trained, setting.num_steps + int(trained.num_tuning), told)

        return tune

    def search(digits: Digits) -> _Ran:
        """The penalty, of so many drawn, with the least loss of the clean examples."""
        rng = np.random.default_rng(int(jax.random.bits(digits.key)))
        decays = 10.0 ** rng.uniform(-5, -1, num_trials)
        runs = [certain(digits, np.float32(decay)) for decay in decays]
        best = int(np.argmin([float(trained.val_loss) for trained in runs]))
        return _Ran(runs[best], num_trials * setting.num_steps, {"decay": decays[best]})

    return {
        PLAIN: plain(certain),
        ORACLE: plain(oracle),
        CLEAN: plain(certain, _clean_alone),
        SEARCH: search,
        **{name: learned(*how) for name, how in _TUNED.items()},
    }


def _clean_alone(digits: Digits) -> Digits:
    """The clean examples in the place of the others, again and again."""
    num = len(digits.y_train)
    again = np.resize(np.arange(len(digits.y_val)), num)
    return digits._replace(x_train=digits.x_val[again], y_train=digits.y_val[again])


def _auc(scores: npt.NDArray[Any], right: npt.NDArray[np.bool_]) -> float:
    """How often a right example's score is above a wrong one's; ties count one half."""
    difference = scores[right][:, None] - scores[~right]
    return float(np.mean((difference > 0) + 0.5 * (difference == 0)))


def show(records: Sequence[Record]) -> str:
    """For each method its accuracy, how much of the gap it closes, and what it costs."""
    header = ["method", "seeds", "test accuracy (%)", "range", "gap closed (%)", "gradients, times", "AUC", "failed"]
    rows = []
    for name in [case for case in CASES if any(record["case"] == case for record in records)]:
        here = [record for record in records if record["case"] == name]
        accuracies = [100 * record["accuracy"] for record in here]
        closed = gap_closed(records, name)
        rows.append(
            [
                name,
                str(len(here)),
                f"{np.mean(accuracies):.1f}",
                f"{min(accuracies):.1f}-{max(accuracies):.1f}",
                "-" if not closed else f"{100 * np.mean(closed):.0f} ({100 * min(closed):.0f}-{100 * max(closed):.0f})",
                f"{np.mean([_cost(record) for record in here]):.2f}",
                decimals(float(np.mean([r["auc"] for r in here])) if here[0]["auc"] is not None else None, 3),
                str(sum(record["num_failed"] for record in here)),
            ]
        )
    first = records[0]
    title = f"Test accuracy after training on half-mislabelled digits  [{first['precision']}, seeds {_seeds(records)}]"
    return "\n".join([title, "", lay_out(header, rows, left=(0,)), "", wrap(read(records))])


def _cost(record: Record) -> float:
    return float(record["num_gradients"] / record["setting"]["num_steps"])


def _seeds(records: Sequence[Record]) -> str:
    seeds = sorted({record["seed"] for record in records})
    return f"{seeds[0]} to {seeds[-1]}"


def gap_closed(records: Sequence[Record], name: str) -> list[float]:
    """For each seed how much of the way from no weights to the oracle a method goes."""
    accuracy = {(record["case"], record["seed"]): record["accuracy"] for record in records}
    closed = []
    for case, seed in accuracy:
        if case == name and (PLAIN, seed) in accuracy and (ORACLE, seed) in accuracy:
            worst, best = accuracy[PLAIN, seed], accuracy[ORACLE, seed]
            if best > worst:
                closed.append((accuracy[name, seed] - worst) / (best - worst))
    return closed


def read(records: Sequence[Record]) -> str:
    """What the table says."""
    first = records[0]
    setting = first["setting"]
    closed = {name: np.mean(gap_closed(records, name)) for name in CASES if gap_closed(records, name)}
    ours = [name for name in (SINGLE, ALTERNATING) if name in closed]
    best = max(ours, key=lambda name: closed[name], default=None)
    text = (
        f"{setting['num_train']} digits to learn from, {100 * setting['fraction']:.0f} % of them mislabelled, "
        f"{setting['num_val']} clean ones to judge by, {setting['num_steps']:,} steps of Adam for all. Gradients are "
        "in units of the run without weights, as estimators count them."
    )
    if best is None:
        return text
    return f"{text} The best of the two modes, {best}, closes {100 * closed[best]:.0f} % of the gap in one run."


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Test accuracy along the run."""
    return [figures.draw_tuning(records, folder / "tuning.png")]
