"""Hyperparameters of sparse and bounded models, selected by meta-gradients, beside peers and a fine grid."""

import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import contrastive_meta as cm
from benchmarks import figures, sparse_methods
from benchmarks.data import DataMissingError
from benchmarks.harness import Record, Session, first_line, precision
from benchmarks.sparse_cases import CASES, Array, Case, Task
from benchmarks.sparse_methods import CONTRAST, GRID, JAXOPT, NUM_STEPS, SPARHO, Searched
from benchmarks.speed_peers import installed
from benchmarks.tables import decimals, lay_out, wrap

NAME = "sparse"
ABOUT = "hyperparameters of lassos, of an SVM and of bounded least squares by meta-gradients, beside peers and a grid"

NUM_SEEDS, REPEATS = 1, 3
# Seconds from which on a search is not repeated: the whole is to take five minutes.
LONG = 20.0
# Of the quickest to compile, which all methods have.
SMOKE_CASES = ("lasso",)


class _Ready(NamedTuple):
    """A search that has run once.

    Attributes:
      call: runs it to the end.
      first: what it found.
      seconds: that took.
      compile_seconds: None for what is not compiled.
    """

    call: Callable[[], Searched]
    first: Searched
    seconds: float
    compile_seconds: float | None = None


def run(session: Session) -> None:
    """Every case on every seed; a grid, and the searches in turn."""
    session.refuse_unknown_cases(CASES)
    names = session.cases or (SMOKE_CASES if session.smoke else tuple(CASES))
    num_seeds = 1 if session.smoke else session.num_seeds or NUM_SEEDS
    # Peers' coordinate descent is float64, and so is all the rest unless said otherwise.
    x64 = session.x64 is not False
    for name in names:
        for seed in range(session.seed, session.seed + num_seeds):
            of_seed = dataclasses.replace(session, seed=seed)
            try:
                task = CASES[name].load(seed, session.data, session.smoke)
            except DataMissingError as error:
                session.progress.begin(f"{name} is left out: {error}", 1)
                break
            with precision(x64):
                _run_case(of_seed, name, task, x64)
        jax.clear_caches()


def _run_case(session: Session, name: str, task: Task, x64: bool) -> None:
    case, repeats = CASES[name], 1 if session.smoke else REPEATS
    start = case.start(task)
    points = sparse_methods.grid_points(case, start)[:: 10 if session.smoke else 1]
    common = {"case": name, "title": case.title, "hyperparameters": case.hyperparameters, "start": start}
    session.progress.begin(f"{name}, seed {session.seed}: grid of {len(points)}", 3)
    on_device = jax.tree.map(jnp.asarray, task)
    judge, compile_seconds = _compiled(sparse_methods.judge(case), jnp.asarray(points), on_device)
    began = time.perf_counter()
    grid = jax.block_until_ready(judge(jnp.asarray(points), on_device))
    seconds, lowest = time.perf_counter() - began, float(grid.losses.min())
    fields = sparse_methods.read(Searched(points), np.asarray(grid.losses), np.asarray(grid.num_weights), lowest)
    # Of a grid the path is of no interest.
    short = {key: value for key, value in fields.items() if key not in ("losses", "visited", "steps_to_target")}
    session.record(
        x64=x64, method=GRID, seconds=seconds, spread=None, compile_seconds=compile_seconds, **common, **short
    )

    session.progress.step("compiling")
    searches, failed = _searches(case, start, task, on_device)
    session.progress.step(f"searching: {', '.join(searches)}")
    for method, times in _in_turn(searches, repeats).items():
        found_by = searches[method].first
        visited = np.asarray(found_by.visited)
        # The program of the grid, for as many points.
        found = [judge(jnp.asarray(part), on_device) for part in _parts(visited, len(points))]
        losses, weights = (np.concatenate(arrays)[: len(visited)] for arrays in zip(*found, strict=True))
        lower, median, upper = (float(x) for x in np.percentile(times, [25, 50, 75]))
        session.record(
            x64=x64,
            method=method,
            seconds=median,
            spread=upper - lower,
            compile_seconds=searches[method].compile_seconds,
            lowest_of_grid=lowest,
            version=_version(method),
            **common,
            **sparse_methods.read(found_by, losses, weights, lowest),
        )
    for method, reason in (sparse_methods.absent(case) | failed).items():
        status = "RAISED" if method in failed else "NOT_INSTALLED"
        session.record(x64=x64, method=method, status=status, error=reason, **common)


def _parts(points: Array, size: int) -> list[Array]:
    """Parts of this size, the last one filled up with what is at its end."""
    missing = -len(points) % size
    filled = np.concatenate([points, np.repeat(points[-1:], missing, axis=0)])
    return list(filled.reshape(-1, size, points.shape[1]))


def _searches(case: Case, start: Array, task: Task, on_device: Task) -> tuple[dict[str, _Ready], dict[str, str]]:
    """The searches, compiled, and the reasons of those that raise."""
    ready: dict[str, _Ready] = {}
    failed: dict[str, str] = {}
    makers: dict[str, Callable[[Case], Any]] = {CONTRAST: sparse_methods.contrast}
    if installed(JAXOPT):
        makers[JAXOPT] = sparse_methods.by_jaxopt
    args = jnp.asarray(start), on_device
    for method, make in makers.items():
        try:
            function, seconds = _compiled(make(case), *args)
            ready[method] = _once(functools.partial(function, *args), seconds)
        except Exception as error:
            failed[method] = first_line(error)
    if case.peer.sparho and installed(SPARHO):
        try:
            ready[SPARHO] = _once(sparse_methods.by_sparho(case, start, task))
        except Exception as error:
            failed[SPARHO] = first_line(error)
    return ready, failed


def _compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float]:
    began = time.perf_counter()
    compiled = jax.jit(function).lower(*args).compile()
    return compiled, time.perf_counter() - began


def _once(call: Callable[[], Searched], compile_seconds: float | None = None) -> _Ready:
    began = time.perf_counter()
    first = jax.block_until_ready(call())
    return _Ready(call, first, time.perf_counter() - began, compile_seconds)


def _in_turn(searches: dict[str, _Ready], repeats: int) -> dict[str, list[float]]:
    """Times of whole searches, each once a round, so that the machine's load is the same for all."""
    times: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(repeats):
        for name, search in searches.items():
            if search.seconds < LONG:
                began = time.perf_counter()
                jax.block_until_ready(search.call())
                times[name].append(time.perf_counter() - began)
    return {name: taken or [searches[name].seconds] for name, taken in times.items()}


def _version(method: str) -> str | None:
    """Of a peer; that of the package is in the environment of the record."""
    return None if method == CONTRAST else importlib.metadata.version(method)


def show(records: Sequence[Record]) -> str:
    """For each case and method how close to the grid's minimum it ends, after how many steps, and its time."""
    header = [
        "model",
        "method",
        "above the grid (%)",
        "steps to 1 %",
        "search (s)",
        "compile (s)",
        "weights",
        "flagged",
    ]
    rows: list[list[str]] = []
    titles: dict[str, str] = {}
    for record in records:
        if record["status"]:
            continue
        rows.append(
            [
                record["case"] if record["case"] not in titles else "",
                record["method"] if record["method"] != GRID else f"grid of {record['num_steps']}",
                "-" if record["method"] == GRID else f"{100 * record['excess']:.3f}",
                "-" if record.get("steps_to_target") is None else str(record["steps_to_target"]),
                decimals(record["seconds"], 2),
                decimals(record["compile_seconds"], 1),
                str(record["num_weights"]),
                _flagged(record),
            ]
        )
        titles[record["case"]] = record["title"]
    head = f"Selecting hyperparameters in {NUM_STEPS} steps  [{records[0]['precision']}, seed {records[0]['seed']}]"
    absent = {f"{r['method']}: {r['error']}." for r in records if r["status"]}
    models = wrap(f"{'; '.join(f'{name}: {what}' for name, what in titles.items())}.")
    return "\n".join(
        [head, "", lay_out(header, rows, left=(0, 1)), "", models, "", wrap(read(records)), *sorted(absent)]
    )


def _flagged(record: Record) -> str:
    statuses: dict[str, int] | None = record["statuses"]
    if statuses is None:
        return "-"
    return str(sum(number for name, number in statuses.items() if cm.Status[name] > cm.Status.TARGET_NOT_REACHED))


def read(records: Sequence[Record]) -> str:
    """What the table says."""
    ours = [record for record in records if record["method"] == CONTRAST and not record["status"]]
    within = [record for record in ours if record["steps_to_target"] is not None]
    text = (
        f"The contrast comes within 1 % of the grid's minimum on {len(within)} of {len(ours)} models, after at most "
        f"{max((record['steps_to_target'] for record in within), default=0)} steps."
    )
    for peer in (JAXOPT, SPARHO):
        theirs = {(r["case"], r["seed"]): r["seconds"] for r in records if r["method"] == peer and not r["status"]}
        ratios = [r["seconds"] / theirs[key] for r in ours if (key := (r["case"], r["seed"])) in theirs]
        if ratios:
            text += (
                f" It takes {np.median(ratios):.2f} times the search time of {peer} (median over models; "
                f"{min(ratios):.2f} to {max(ratios):.2f})."
            )
    return (
        f"{text} Search times are without compilation, medians of searches in turn; below zero is better than the grid."
    )


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """The least validation loss so far against steps: a panel for each case."""
    return [figures.draw_sparse(records, folder / "sparse.png")]
