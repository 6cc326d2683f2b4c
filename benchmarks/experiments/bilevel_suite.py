"""Single-loop bilevel methods on finite sums: the true norm of the meta-gradient against calls and against time."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

import contrastive_meta as cm
from benchmarks.experiments.bilevel_suite_methods import CENTRAL, METHODS, OURS, Choice, Method
from benchmarks.experiments.bilevel_suite_problems import CLEANING, IJCNN, PROBLEMS, QUADRATIC, Sizes, Suite
from benchmarks.experiments.claims import Claim, above, record_claims, show_claims
from benchmarks.harness import Record, Session, precision
from benchmarks.tables import lay_out, scientific, seeds_of

NAME = "bilevel_suite"
ABOUT = (
    "single-loop methods on a quadratic, ijcnn1 and data cleaning: the package's against SOBA, SABA, stocBiO, F2SA and "
    "F2SA-p, by the true norm of the meta-gradient; 10 minutes on two cores"
)
# Step sizes are chosen on seed 0, which is not reported.
_TUNED_ON, _FIRST_SEED = 0, 1
# Solved and answered to this, relative: far below any norm that is measured.
_TOL = 1e-8


class Budget(NamedTuple):
    """How much is run.

    Attributes:
      calls: of minibatches, each method and seed.
      looks: at the meta-parameters, at equal numbers of steps.
      sizes: of each problem.
      num_seeds: reported.
      choices: of a grid, the first so many; None for all.
    """

    calls: int
    looks: int
    sizes: Mapping[str, Sizes]
    num_seeds: int = 3
    choices: int | None = None


DEFAULT = Budget(20_000, 10, {QUADRATIC: Sizes(1000, 50), IJCNN: Sizes(5000, 100), CLEANING: Sizes(500, 50)})
SMOKE = Budget(300, 2, {QUADRATIC: Sizes(40, 10), IJCNN: Sizes(40, 10), CLEANING: Sizes(40, 10)}, 1, 1)
FULL = Budget(
    1_000_000, 20, {QUADRATIC: Sizes(30_000, 64), IJCNN: Sizes(24_960, 64), CLEANING: Sizes(20_000, 64)}, 10
)  # fmt: skip


def run(session: Session) -> None:
    """Every method on every problem, its step sizes chosen on a seed of their own, all from the same start."""
    budget = SMOKE if session.smoke else FULL if session.full else DEFAULT
    if session.smoke and session.full:
        sizes = {name: size._replace(num=4 * size.batch) for name, size in FULL.sizes.items()}
        budget = SMOKE._replace(sizes=sizes)
    session.refuse_unknown_cases([*PROBLEMS, *METHODS])
    # Compiling the others takes most of a smoke run.
    wanted = session.cases or ((QUADRATIC, OURS, "SOBA") if session.smoke else ())
    problems = [name for name in PROBLEMS if name in wanted] or list(PROBLEMS)
    methods = [name for name in METHODS if name in wanted] or list(METHODS)
    seeds = session.seeds(_FIRST_SEED, budget.num_seeds)
    with precision(x64=True):
        for problem in problems:
            build = PROBLEMS[problem]
            suites = {s: build(s, budget.sizes[problem], session.data) for s in dict.fromkeys([_TUNED_ON, *seeds])}
            session.progress.begin(f"{problem}: where it starts", 1)
            norms = _Norms(suites[_TUNED_ON])
            for name in methods:
                session.progress.begin(f"{problem}: {name}", 1)
                _measure(session, problem, name, budget, suites, seeds, norms)
    record_claims(session, claims(session.records), x64=True)


def _measure(
    session: Session,
    problem: str,
    name: str,
    budget: Budget,
    suites: Mapping[int, Suite],
    seeds: Sequence[int],
    norms: "_Norms",
) -> None:
    method, suite = METHODS[name], suites[_TUNED_ON]
    first_calls = method.first_calls(suite.train.y.shape[0], suite.val.y.shape[0])
    every = max((budget.calls - first_calls) // (method.calls * budget.looks), 1)
    path = _path(suite, method, every, budget.looks)
    unit = suite.length if method.is_normalised else suite.unit
    grid = [choice._replace(outer=choice.outer * unit) for choice in method.grid[: budget.choices]]
    at_ends = [path(suite, _floats(choice), jax.random.key(_TUNED_ON))[-1] for choice in grid]
    found = norms(suite, jnp.stack(at_ends))
    chosen = grid[int(np.argmin(found))]
    for seed in seeds:
        key = jax.random.key(seed)
        begin = time.perf_counter()
        steps = jax.block_until_ready(path(suites[seed], _floats(chosen), key))
        seconds = time.perf_counter() - begin
        told = norms(suites[seed], jnp.concatenate([suites[seed].meta_params[None], steps]))
        calls = [0, *(first_calls + method.calls * every * (k + 1) for k in range(budget.looks))]
        dataclasses.replace(session, seed=seed).record(
            x64=True, kind="method", case=f"{problem}: {name}", problem=problem, method=name, budget=budget,
            chosen=chosen, tried=len(grid), tuned_on=_TUNED_ON, calls_per_step=method.calls, calls=calls,
            norms=told, seconds=[seconds * k / budget.looks for k in range(budget.looks + 1)],
            at_edge=_at_edge(chosen, grid),
        )  # fmt: skip


def _floats(choice: Choice) -> Choice:
    return Choice(*(jnp.asarray(float(part)) for part in choice))


def _at_edge(chosen: Choice, grid: Sequence[Choice]) -> list[str]:
    """Which of the choices is the smallest or largest that was tried, where there were several."""
    columns = {name: sorted({getattr(choice, name) for choice in grid}) for name in Choice._fields}
    return [
        name for name, tried in columns.items()
        if len(tried) > 2 and getattr(chosen, name) in (tried[0], tried[-1])
    ]  # fmt: skip


def _path(suite: Suite, method: Method, every: int, looks: int) -> Any:
    """`(suite, choice, key) -> meta-parameters` after every so many steps, compiled once for all choices and seeds."""
    num_steps = every * looks

    @jax.jit
    def path(data: Any, choice: Choice, key: jax.Array) -> jax.Array:
        whole, train, val, params, meta_params = data
        at = suite._replace(whole=whole, train=train, val=val, params=params, meta_params=meta_params)

        def step(state: Any, number: jax.Array) -> tuple[Any, None]:
            return method.step(at, choice, num_steps, state, number, jax.random.fold_in(key, number)), None

        def some(state: Any, numbers: jax.Array) -> tuple[Any, jax.Array]:
            state, _ = jax.lax.scan(step, state, numbers)
            return state, state[0]

        numbers = jnp.arange(num_steps).reshape(looks, every)
        _, metas = jax.lax.scan(some, method.start(at, choice, num_steps), numbers)
        return metas

    # Losses of all seeds are the same function: only data differ.
    return lambda suite, choice, key: path(suite[1:-2], choice, key)


class _Norms:
    """The norm of dPhi/dx from all examples: learning and linear systems solved to `_TOL`."""

    def __init__(self, suite: Suite) -> None:
        estimator = cm.ImplicitDifferentiation(
            cm.LBFGS(tol=_TOL, max_steps=2000), cm.ConjugateGradient(tol=_TOL, max_steps=2000)
        )

        def norm(meta_params: jax.Array, whole: Any) -> jax.Array:
            length: jax.Array = jnp.linalg.norm(estimator.estimate(suite.problem, meta_params, whole).grad)
            return length

        self._all = jax.jit(lambda metas, whole: jax.lax.map(lambda meta: norm(meta, whole), metas))

    def __call__(self, suite: Suite, metas: jax.Array) -> npt.NDArray[np.float64]:
        """Of each row; infinite where it is lost."""
        sound = jnp.all(jnp.isfinite(metas), axis=1)
        told = np.asarray(self._all(jnp.where(sound[:, None], metas, 0.0), suite.whole))
        return np.where(np.asarray(sound) & np.isfinite(told), told, np.inf)


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """Whether others end with a larger true norm than the package's single loop, at equal calls and at equal time."""
    here = [r for r in records if r["kind"] == "method"]
    for problem in dict.fromkeys(r["problem"] for r in here):
        of: dict[str, dict[int, Record]] = {}
        for record in here:
            if record["problem"] == problem:
                of.setdefault(record["method"], {})[record["seed"]] = record
        for ours in (OURS, CENTRAL):
            for name, theirs in of.items():
                if name not in (OURS, CENTRAL) and ours in of:
                    yield from _compared(f"{problem}: {name} ends above {ours}", theirs, of[ours])


def _compared(text: str, theirs: Mapping[int, Record], ours: Mapping[int, Record]) -> Iterator[Claim]:
    ends = [{seed: float(np.log(_last(r))) for seed, r in of.items()} for of in (theirs, ours)]
    yield above(f"{text}, equal calls (logarithms)", *ends)
    least = {seed: min(theirs[seed]["seconds"][-1], ours[seed]["seconds"][-1]) for seed in theirs.keys() & ours.keys()}
    within = [{seed: float(np.log(_within(of[seed], least[seed]))) for seed in least} for of in (theirs, ours)]
    yield above(f"{text}, equal time (logarithms)", *within)


def _last(record: Record) -> float:
    return _value(record["norms"][-1])


def _within(record: Record, seconds: float) -> float:
    """The norm at the last look within a time."""
    looks = [norm for norm, spent in zip(record["norms"], record["seconds"], strict=True) if spent <= seconds]
    return _value(looks[-1])


def _value(norm: float | None) -> float:
    """What was not finite is recorded as None."""
    return 1e30 if norm is None else norm


def show(records: Sequence[Record]) -> str:
    """For each problem the norms on the way, then every claim."""
    here = [r for r in records if r["kind"] == "method"]
    parts = []
    for problem in dict.fromkeys(r["problem"] for r in here):
        rows, of_problem = [], [r for r in here if r["problem"] == problem]
        for name in dict.fromkeys(r["method"] for r in of_problem):
            of = [r for r in of_problem if r["method"] == name]
            looks = len(of[0]["norms"]) - 1
            cells = [_mean([r["norms"][k] for r in of]) for k in (0, round(looks / 5), looks // 2, looks)]
            ends = [r["norms"][-1] for r in of if r["norms"][-1] is not None]
            seconds = float(np.mean([r["seconds"][-1] for r in of]))
            chosen = ", ".join(f"{value:.3g}" for value in of[0]["chosen"] if value)
            span = f"{scientific(min(ends))}-{scientific(max(ends))}" if ends else "-"
            span += f", {len(of) - len(ends)} lost" if len(ends) < len(of) else ""
            rows.append([name, *cells, span, f"{of[0]['calls'][-1]:,}", f"{seconds:.2f}", chosen])
        header = ["method", "start", "a fifth", "half", "end", "range", "calls", "s", "chosen"]
        title = f"{problem}: true norm of the meta-gradient by calls of minibatches [{seeds_of(of_problem)}]"
        parts.append(f"{title}\n\n{lay_out(header, rows)}")
    return "\n\n".join([*parts, show_claims([*claims(records)])]).rstrip()


def _mean(norms: Sequence[float | None]) -> str:
    """Geometric, of the runs that were not lost."""
    kept = [np.log(max(norm, 1e-300)) for norm in norms if norm is not None]
    return scientific(float(np.exp(np.mean(kept)))) if kept else "-"
