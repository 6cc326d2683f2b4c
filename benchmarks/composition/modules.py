"""When modules specialise: linear networks beside their closed form, and digits in pairs, split against dense."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import figures
from benchmarks.composition import composed_digits as digits
from benchmarks.composition.linear_modules import (
    BITS,
    DENSE,
    MODULES,
    SPLIT,
    SPLIT_OUTPUTS,
    Weights,
    aligned,
    expected_error,
    items,
    joined,
    learned,
    modes,
    noise,
    simulated,
    unseen_error,
)
from benchmarks.experiments.claims import Claim, above, at_least, at_most, record_claims, show_claims
from benchmarks.harness import Record, Session, precision
from benchmarks.tables import decimals, lay_out, scientific, seeds_of

NAME = "modules"
ABOUT = (
    "which networks recombine what they learned: linear modules beside their closed form, digits in pairs; 3 minutes"
)
NETWORKS = (DENSE, SPLIT_OUTPUTS, SPLIT)
# Nothing was tuned.
_FIRST_SEED = 1
# Half of the bits are asked for; the rest are seen only.
_REPORTED_SHARE = 0.5
# Every mode of the closed form starts here, and random weights of this deviation are as small.
_START, _NOISE = 1e-3, 1e-2
# At this rate simulation and closed form differ by 1.5e-3 at most.
_RATE, _DURATION = 2e-3, 60.0
# The closed form is right to this; digits of unseen pairs fall behind by at most, and by at least, so much.
_AGREED, _SYSTEMATIC, _NOT_SYSTEMATIC = 0.01, 0.02, 0.1


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      num_bits: of the items of each linear data set.
      scales: of the names among the inputs.
      num_times: at which linear networks are looked at.
      num_seeds: reported.
      hidden: units of the dense network of digits; split ones have as many in all.
      steps: of learning digits.
      batch: pairs in each.
      num_images: of each digit, to learn from and to test on.
      partners: of each digit in the pairs that are learned from.
    """

    num_bits: tuple[int, ...] = (3, 4, 5)
    scales: tuple[float, ...] = (0.5, 1.0, 2.0)
    num_times: int = 100
    num_seeds: int = 3
    hidden: tuple[int, ...] = (192, 96)
    steps: int = 2000
    batch: int = 128
    num_images: tuple[int, int] = (500, 200)
    partners: int = 3


SMOKE = Sizes((3,), (1.0,), 5, 1, (6, 6), 3, 8, (5, 5))
FULL = Sizes((3, 4, 5, 6), (0.25, 0.5, 1.0, 2.0, 4.0), num_seeds=10, hidden=(768, 384), steps=20_000)


def run(session: Session) -> None:
    """Linear networks of all sizes, then digits; all seeds of a network learn at once."""
    sizes = SMOKE if session.smoke else FULL if session.full else Sizes()
    session.refuse_unknown_cases(NETWORKS)
    seeds = session.seeds(_FIRST_SEED, sizes.num_seeds)
    images = digits.digits(*sizes.num_images, session.data, smoke=session.smoke)
    # Compiling takes longest: smoke runs leave out a network, and read digits by one alone.
    for network in session.cases or ((DENSE, SPLIT) if session.smoke else NETWORKS):
        with precision(x64=True):
            for num_bits in sizes.num_bits:
                _linear(session, network, num_bits, sizes, seeds)
        if network == SPLIT or not session.smoke:
            with precision(x64=False):
                _digits(session, network, images, sizes, seeds)
    record_claims(session, claims(session.records))


def _linear(session: Session, network: str, num_bits: int, sizes: Sizes, seeds: Sequence[int]) -> None:
    """A network of each scale and seed, simulated from the start of the closed form and from small random weights."""
    session.progress.begin(f"{network}, {num_bits} bits", 1)
    settings = [(scale, seed) for scale in sizes.scales for seed in seeds]
    reported = max(1, round(_REPORTED_SHARE * num_bits))
    steps_between = round(_DURATION / sizes.num_times / _RATE) if not session.smoke else 100
    times = _RATE * steps_between * np.arange(1, sizes.num_times + 1, dtype=np.float64)
    data = [items(num_bits, reported, scale, 1.0) for scale, _ in settings]
    difference = np.zeros(len(settings))
    for seen, told in MODULES[network]:
        x = np.stack([joined(of.inputs(), seen) for of, _ in data])
        y = joined(data[0][0].targets(), told)
        bases = [modes(each, y) for each in x]
        randoms = [np.random.default_rng([seed, num_bits]) for _, seed in settings]
        starts = [aligned(basis, _START, random) for basis, random in zip(bases, randoms, strict=True)]
        begin = Weights(*map(np.stack, zip(*starts, strict=True)))
        maps = np.asarray(simulated(begin, x, y, _RATE, sizes.num_times, steps_between))
        exact = np.stack([learned(basis, times, _START) for basis in bases])
        ends = np.linalg.norm(exact[:, -1], axis=(1, 2))
        difference = np.maximum(difference, np.linalg.norm(maps - exact, axis=(2, 3)).max(1) / ends)
        if BITS in told:
            small = [noise(x.shape[1], len(starts[0].into), len(y), _NOISE, random) for random in randoms]
            of_noise = np.asarray(
                simulated(
                    Weights(*map(np.stack, zip(*small, strict=True))), x, y, _RATE, sizes.num_times, steps_between
                )
            )
            curves = [
                [unseen_error(each, of, unseen) for each, (of, unseen) in zip(which, data, strict=True)]
                for which in (maps, exact, of_noise)
            ]
    for number, ((scale, seed), (of, _)) in enumerate(zip(settings, data, strict=True)):
        at = dataclasses.replace(session, seed=seed)
        ours, closed, from_noise = (curve[number] for curve in curves)
        at.record(
            x64=True, kind="linear", case=f"{network}, {num_bits} bits, scale {scale:g}", network=network,
            num_bits=num_bits, num_reported=reported, scale=scale, num_items=of.bits.shape[1], sizes=sizes,
            difference=difference[number], expected=expected_error(network, of),
            unseen=ours[-1], unseen_closed=closed[-1], unseen_from_noise=from_noise[-1],
            times=times[:: max(1, len(times) // 50)], curve=ours[:: max(1, len(times) // 50)],
            curve_closed=closed[:: max(1, len(times) // 50)],
        )  # fmt: skip


def _digits(session: Session, network: str, images: digits.Digits, sizes: Sizes, seeds: Sequence[int]) -> None:
    """The same network of every seed, each with pairs and images of its own, at once."""
    session.progress.begin(f"{network}, digits", 1)
    split = [digits.pairs(np.random.default_rng(seed), sizes.partners) for seed in seeds]
    seen, unseen = (jnp.asarray(np.stack(each)) for each in zip(*split, strict=True))

    @jax.jit
    @jax.vmap
    def of(seed: jax.Array, seen: jax.Array, unseen: jax.Array) -> tuple[jax.Array, jax.Array]:
        of_run, of_test = jax.random.split(jax.random.key(seed))
        params = digits.learned(network, sizes.hidden, of_run, seen, train, sizes.steps, sizes.batch)
        told = [digits.accuracy(network, params, of_test, each, test) for each in (seen, unseen)]
        return told[0], told[1]

    train, test = map(jnp.asarray, images)
    inside, outside = (np.asarray(each) for each in of(jnp.asarray(list(seeds)), seen, unseen))
    num_weights = sum(leaf.size for leaf in jax.tree.leaves(digits.network(network, sizes.hidden, jax.random.key(0))))
    for number, seed in enumerate(seeds):
        at = dataclasses.replace(session, seed=seed)
        at.record(
            x64=False, kind="digits", case=f"{network}, digits", network=network, sizes=sizes, num_weights=num_weights,
            seen=inside[number], unseen=outside[number], num_seen=seen.shape[1], num_unseen=unseen.shape[1],
        )  # fmt: skip


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """The closed form is right; split networks are systematic, others are not; so with digits."""
    linear = [r for r in records if r["kind"] == "linear"]
    for network in NETWORKS:
        here = [r for r in linear if r["network"] == network]
        if not here:
            continue
        worst = {seed: max(r["difference"] for r in here if r["seed"] == seed) for seed in {r["seed"] for r in here}}
        yield at_most(f"{network}: simulated against closed form, largest difference", [*worst.values()], _AGREED)
    split = [max(r["unseen"], r["unseen_from_noise"]) for r in linear if r["network"] == SPLIT]
    yield at_most("split: largest error of bits of unseen items", split and [max(split)], 1e-6)
    for network in (DENSE, SPLIT_OUTPUTS):
        ratios = np.array([r["unseen"] / r["expected"] for r in linear if r["network"] == network])
        away = [float(np.abs(ratios - 1).max())] if ratios.size else []
        yield at_most(f"{network}: that error over the closed form's in the end, distance from 1", away, _AGREED)
    read = {
        name: {r["seed"]: r for r in records if r["kind"] == "digits" and r["network"] == name} for name in NETWORKS
    }
    gaps = {name: {seed: r["seen"] - r["unseen"] for seed, r in of.items()} for name, of in read.items()}
    yield at_most("split, digits: accuracy lost on unseen pairs", [*gaps[SPLIT].values()], _SYSTEMATIC)
    for name in (DENSE, SPLIT_OUTPUTS):
        yield at_least(f"{name}, digits: accuracy lost on unseen pairs", [*gaps[name].values()], _NOT_SYSTEMATIC)
        yield above(f"{name}, digits: loses more than split", gaps[name], gaps[SPLIT])


def show(records: Sequence[Record]) -> str:
    """Errors of linear networks, accuracies of digits, every claim."""
    linear = [r for r in records if r["kind"] == "linear"]
    read = [r for r in records if r["kind"] == "digits"]
    rows = []
    for case in dict.fromkeys(r["case"] for r in linear):
        of = [r for r in linear if r["case"] == case]
        columns = [max(r[key] for r in of) for key in ("difference", "expected", "unseen", "unseen_from_noise")]
        cells = [scientific(v) for v in columns]
        rows.append([of[0]["network"], str(of[0]["num_bits"]), f"{of[0]['scale']:g}", *cells])
    header = ["network", "bits", "scale", "difference", "error, theory", "closed form's start", "random start"]
    parts = []
    if linear:
        parts += [f"Linear modules: largest of [{seeds_of(linear)}]", lay_out(header, rows, left=(0,))]
    accuracies = []
    for name in dict.fromkeys(r["network"] for r in read):
        of = [r for r in read if r["network"] == name]
        accuracies.append(
            [name, f"{of[0]['num_weights']:,}", *(_range([r[key] for r in of]) for key in ("seen", "unseen"))]
        )
    if read:
        title = f"Digits in pairs: accuracy on new images, {read[0]['num_seen']} pairs seen [{seeds_of(read)}]"
        parts += [title, lay_out(["network", "weights", "seen pairs", "unseen pairs"], accuracies, left=(0,))]
    return "\n\n".join([*parts, show_claims([*claims(records)])]).rstrip()


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """The error of unseen items as networks learn, and the digits."""
    if not all(any(r["kind"] == kind for r in records) for kind in ("linear", "digits")):
        return []
    return [figures.draw_modules(records, folder / "modules.png")]


def _range(values: Sequence[float]) -> str:
    return f"{decimals(min(values), 3)} to {decimals(max(values), 3)}"
