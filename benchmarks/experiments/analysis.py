"""Error of the contrast against beta, against steps and against what learning leaves undone; memory against steps."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import contrastive_meta as cm
from benchmarks import scaling_steps
from benchmarks.experiments.analysis_problems import Analysed, build, contrast, descend, minimum
from benchmarks.experiments.claims import Claim, claim, record_claims, show_claims
from benchmarks.harness import Record, Session, Vector, cosine, precision, relative_error
from benchmarks.methods import BACKPROP, CONTRASTIVE, IMPLICIT_CG, TWICE
from benchmarks.tables import lay_out, scientific, seeds_of

NAME = "analysis"
ABOUT = (
    "error of contrast against beta, inner steps and residual, with the fitted bounds of the theory; memory and time "
    "from 10 to 100,000 inner steps; 4 minutes on two cores"
)

Make = Callable[[Any], cm.NudgeScheme]
_SCHEMES: dict[str, Make] = {
    "forward": lambda beta: cm.forward_difference(beta, matched=False),
    "second-order forward": lambda beta: cm.second_order_forward(beta, matched=False),
    "central": cm.central_difference,
}
# Powers of beta in the truncation error, and how far a fitted slope may be off: experiments of R1.
_ORDERS = {"forward": (1, 0.1), "second-order forward": (2, 0.15), "central": (2, 0.15)}
_SLOPE_BETAS = (0.05, 0.025, 0.0125)
_COSINE_BETA, _COSINE = 0.01, 0.999
# Exponents in the residual of the best beta and of the least error, which balance residual / beta and beta^order (R2).
_EXPONENTS = {"forward": (1 / 2, 1 / 2), "central": (1 / 3, 2 / 3)}
_EXPONENT_SLACK = 0.1
_NUM_DRAWS = 32
_LARGEST_BETA = 0.3  # beyond, the error is no power of beta any more
_STEP_BETAS = (0.01, 0.1)
_METHODS = (CONTRASTIVE, TWICE, IMPLICIT_CG, BACKPROP)


def run(session: Session) -> None:
    """All parts on each seed, or those that `--cases` names: beta, residual, steps, memory."""
    parts = {"beta": _beta, "residual": _residual, "steps": _steps}
    unknown = set(session.cases) - {*parts, "memory"}
    if unknown:
        known = ", ".join([*parts, "memory"])
        raise SystemExit(f"analysis has no part {', '.join(sorted(unknown))}; known are: {known}")
    num_seeds = session.num_seeds or (1 if session.smoke else 3)
    problems = ("logistic",) if session.smoke else ("ridge", "logistic")
    with precision(x64=True):
        for seed in range(session.seed, session.seed + num_seeds):
            here = dataclasses.replace(session, seed=seed)
            for name in problems:
                session.progress.begin(f"{name}, seed {seed}", len(parts))
                analysed = build(name, seed)
                for part, measure in parts.items():
                    if part in (session.cases or parts):
                        session.progress.step(part)
                        measure(here, analysed)
    if "memory" in (session.cases or ("memory",)):
        _memory(session)
    record_claims(session, claims(session.records), x64=True)


def _beta(session: Session, analysed: Analysed) -> None:
    """R1: with phases solved exactly, the error is the truncation error of the scheme."""
    betas = [*_SLOPE_BETAS, _COSINE_BETA]

    @jax.jit
    def estimates(beta: Any) -> dict[str, jax.Array]:
        return {name: _of_minima(analysed, make(beta)) for name, make in _SCHEMES.items()}

    found = [{name: np.asarray(grad) for name, grad in estimates(beta).items()} for beta in betas]
    for name in _SCHEMES:
        errors = [relative_error(grads[name], analysed.exact) for grads in found]
        slope = _slope(_SLOPE_BETAS, errors[: len(_SLOPE_BETAS)])
        session.record(
            x64=True, kind="beta", case=analysed.name, scheme=name, betas=betas, errors=errors, slope=slope,
            cosine=cosine(found[-1][name], analysed.exact),
        )  # fmt: skip


def _of_minima(analysed: Analysed, scheme: cm.NudgeScheme) -> jax.Array:
    return contrast(analysed, scheme, [minimum(analysed, beta) for beta in scheme.nudges])


def _residual(session: Session, analysed: Analysed) -> None:
    """R2: phases end at a distance delta from their minima, each in a random direction of its own."""
    deltas = np.geomspace(1e-8, 1e-4, 3 if session.smoke else 5)
    betas = np.geomspace(1e-6, 1.0, 25 if session.smoke else 97)
    keys = jax.random.split(jax.random.key(session.seed), _NUM_DRAWS)
    for name in _EXPONENTS:
        make, order = _SCHEMES[name], _ORDERS[name][0]

        @jax.jit
        def errors_at(beta: Any, make: Make = make) -> jax.Array:
            scheme = make(beta)
            minima = [minimum(analysed, nudge) for nudge in scheme.nudges]

            def one(key: jax.Array, delta: jax.Array) -> jax.Array:
                away = jax.random.normal(key, (len(minima), len(minima[0])))
                away = delta * away / jnp.linalg.norm(away, axis=1, keepdims=True)
                ends = [at + off for at, off in zip(minima, away, strict=True)]
                return jnp.sum(jnp.square(contrast(analysed, scheme, ends) - analysed.exact))

            return jnp.sqrt(jnp.mean(jax.vmap(jax.vmap(one, (0, None)), (None, 0))(keys, jnp.asarray(deltas)), axis=1))

        errors = np.stack([np.asarray(errors_at(beta)) for beta in betas])
        best = np.argmin(errors, axis=0)
        least, best_betas = errors[best, np.arange(len(deltas))], _refined(betas, errors, best)
        session.record(
            x64=True, kind="residual", case=analysed.name, scheme=name, deltas=deltas, betas=betas, errors=errors.T,
            best_betas=best_betas, least_errors=least, exponent_of_beta=_slope(deltas, best_betas),
            exponent_of_error=_slope(deltas, least), **_bound(errors, betas, deltas, order),
        )  # fmt: skip


def _refined(betas: Vector, errors: Vector, best: Any) -> Vector:
    """The minimum of a parabola through the logarithms of the three errors around the least."""
    at = np.clip(best, 1, len(betas) - 2)
    left, middle, right = (np.log(errors[at + k, np.arange(errors.shape[1])]) for k in (-1, 0, 1))
    shift = (left - right) / (2 * (left - 2 * middle + right))
    refined: Vector = np.exp(np.log(betas[at]) + np.clip(shift, -1, 1) * np.log(betas[1] / betas[0]))
    return refined


def _bound(errors: Vector, betas: Vector, deltas: Vector, order: int) -> Record:
    """C1 delta / beta + C2 beta^order: fitted on every other delta, and held against the errors of the others."""
    usable = betas <= _LARGEST_BETA
    b, e = betas[usable, None], errors[usable]
    fitted, held_out = e[:, ::2], e[:, 1::2]
    bias = np.min(fitted, axis=1, keepdims=True)  # the smallest delta: what is left is truncation, at large beta
    largest = b[:, 0] >= _LARGEST_BETA / 10
    c2 = float(np.max(bias[largest, 0] / b[largest, 0] ** order))
    c1 = float(np.max(np.maximum(fitted - c2 * b**order, 0) * b / deltas[None, ::2]))
    limits = c1 * deltas[None, 1::2] / b + c2 * b**order
    return {
        "c1": c1,
        "c2": c2,
        "below": float(np.mean(held_out <= limits)),
        "bound_over_error": _middle(limits, held_out),
    }


def _steps(session: Session, analysed: Analysed) -> None:
    """R2 with a real learner: gradient descent, cut short in the free phase, in the nudged phases, or in both."""
    marks = (3, 10, 30, 100) if session.smoke else (3, 10, 30, 100, 300, 1000, 3000)
    for name in _EXPONENTS:
        make, order = _SCHEMES[name], _ORDERS[name][0]

        @jax.jit
        def grid(beta: Any, make: Make = make) -> tuple[jax.Array, jax.Array]:
            scheme = make(beta)
            frees = jnp.stack(descend(analysed, analysed.problem.init(analysed.meta_params, analysed.task), 0.0, marks))
            minima = jnp.stack([minimum(analysed, nudge) for nudge in scheme.nudges])

            def from_free(free: jax.Array) -> tuple[jax.Array, jax.Array]:
                # As published: a phase that is not nudged is the free one itself.
                phases = [
                    [free] * len(marks) if scheme.free_phase == k else descend(analysed, free, nudge, marks)
                    for k, nudge in enumerate(scheme.nudges)
                ]
                ends = [jnp.stack(list(at)) for at in zip(*phases, strict=True)]
                errors = [jnp.linalg.norm(contrast(analysed, scheme, list(at)) - analysed.exact) for at in ends]
                return jnp.stack(errors), jnp.stack([jnp.sum(jnp.linalg.norm(at - minima, axis=1)) for at in ends])

            return jax.vmap(from_free)(frees)

        found = [tuple(np.asarray(part) for part in grid(beta)) for beta in _STEP_BETAS]
        errors, away = (np.stack(part) for part in zip(*found, strict=True))
        size = float(np.linalg.norm(analysed.exact))
        session.record(
            x64=True, kind="steps", case=analysed.name, scheme=name, betas=_STEP_BETAS, marks=marks,
            errors=errors / size, distances=away, **_bound_of_steps(errors, away, order),
        )  # fmt: skip


def _bound_of_steps(errors: Vector, away: Vector, order: int) -> Record:
    """C1 (sum of distances) / beta + C2 beta^order: fitted on every other cell of the grid, held against the others."""
    betas = np.asarray(_STEP_BETAS)[:, None, None]
    here = np.indices(errors.shape).sum(axis=0) % 2 == 0
    c2 = float(np.max(errors[:, -1:, -1:] / betas**order))
    c1 = float(np.max((np.maximum(errors - c2 * betas**order, 0) * betas / away)[here]))
    limits = c1 * away / betas + c2 * betas**order
    below = float(np.mean((errors <= limits)[~here]))
    return {"c1": c1, "c2": c2, "below": below, "bound_over_error": _middle(limits[~here], errors[~here])}


def _memory(session: Session) -> None:
    """R11: compiled temporary memory and time against the number of inner steps."""
    lengths = (10,) if session.smoke else (10, 100, 1000, 10_000, 100_000)
    methods = (BACKPROP,) if session.smoke else _METHODS
    scaling_steps.measure(session, lengths, methods, kind="memory")


def claims(records: Sequence[Record]) -> Iterator[Claim]:
    """Each claim, the mean over seeds and its spread: held where the mean is within its limits."""
    for case, scheme in dict.fromkeys((r["case"], r["scheme"]) for r in records if r["kind"] == "beta"):
        rows = [r for r in records if r["kind"] == "beta" and (r["case"], r["scheme"]) == (case, scheme)]
        order, slack = _ORDERS[scheme]
        yield _near(f"{case}, {scheme}: slope of the error in beta", [r["slope"] for r in rows], order, slack)
        values = [r["cosine"] for r in rows]
        yield claim(f"{case}, {scheme}: cosine at beta = .01 is above .999", values, _COSINE, min(values) > _COSINE)
    for case, scheme in dict.fromkeys((r["case"], r["scheme"]) for r in records if r["kind"] == "residual"):
        rows = [r for r in records if r["kind"] == "residual" and (r["case"], r["scheme"]) == (case, scheme)]
        for which, aim in zip(("beta", "error"), _EXPONENTS[scheme], strict=True):
            words = {"beta": "the best beta", "error": "the least error"}[which]
            values = [r[f"exponent_of_{which}"] for r in rows]
            yield _near(f"{case}, {scheme}: exponent of {words} in the residual", values, aim, _EXPONENT_SLACK)
    for kind in ("residual", "steps"):
        for case, scheme in dict.fromkeys((r["case"], r["scheme"]) for r in records if r["kind"] == kind):
            values = [r["below"] for r in records if r["kind"] == kind and (r["case"], r["scheme"]) == (case, scheme)]
            text = f"{case}, {scheme}: errors are below the fitted bound, against {kind}"
            yield claim(text, values, 1.0, min(values) == 1.0)
    for name, most in ((CONTRASTIVE, True), (TWICE, True), (IMPLICIT_CG, True), (BACKPROP, False)):
        sizes = sorted((r["num_steps"], r["temp_bytes"]) for r in records if _measured(r) and r["method"] == name)
        if len(sizes) > 1:
            grown = sizes[-1][1] / sizes[0][1]
            longer = sizes[-1][0] / sizes[0][0]
            if most:
                yield claim(f"memory of {name} is the same for all numbers of steps", [grown], 1.0, grown <= 1.05)
            else:
                text = f"memory of {name} grows with the steps, at least half as fast"
                yield claim(text, [grown], longer / 2, grown >= longer / 2)
                # A constant part hides the growth of short runs from the ratio above.
                further = [(steps - sizes[0][0], size - sizes[0][1]) for steps, size in sizes[1:]]
                if len(further) > 1:
                    text = f"memory of {name} beyond that of {sizes[0][0]} steps: exponent in the further steps"
                    yield _near(text, [_slope(*zip(*further, strict=True))], 1.0, _EXPONENT_SLACK)


def _measured(record: Record) -> bool:
    return record["kind"] == "memory" and bool(record.get("temp_bytes"))


def _near(text: str, values: Sequence[float], aim: float, slack: float) -> Claim:
    return claim(f"{text} is {aim:.2f} +- {slack:g}", values, aim, abs(float(np.mean(values)) - aim) <= slack)


def _slope(x: Sequence[float] | Vector, y: Sequence[float] | Vector) -> float:
    """Of y against x, both logarithmic."""
    return float(np.polyfit(np.log(np.asarray(x)), np.log(np.asarray(y)), 1)[0])


def _middle(limits: Vector, errors: Vector) -> float:
    return float(np.median(limits / errors))


def show(records: Sequence[Record]) -> str:
    """Errors on the grid of steps, memory, and every claim."""
    blocks = [f"Analysis of the contrast [{seeds_of(records)}]"]
    for row in records:
        if row["kind"] == "steps" and row["seed"] == records[0]["seed"]:
            header = ["free steps", *(f"{mark:,} nudged" for mark in row["marks"])]
            for beta, errors in zip(row["betas"], row["errors"], strict=True):
                cells = [[f"{mark:,}", *map(scientific, line)] for mark, line in zip(row["marks"], errors, strict=True)]
                title = f"{row['case']}, {row['scheme']}, beta {beta:g}: relative error by steps, seed {row['seed']}"
                blocks.append(f"{title}\n\n{lay_out(header, cells, left=())}")
    memory = [row for row in records if row["kind"] == "memory"]
    if memory:
        blocks.append(scaling_steps.show(memory))
    return "\n\n\n".join([*blocks, show_claims([*claims(records)])]).rstrip()
