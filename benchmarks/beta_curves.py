"""Relative error against the nudging strength: truncation on one side, rounding on the other, for every scheme."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import contrastive_meta as cm
from benchmarks import figures
from benchmarks.cases import LOGISTIC, RIDGE, Case, Prepared, prepare
from benchmarks.harness import Record, Session, Vector, compiling_cheaply, first_line, precision, relative_error
from benchmarks.tables import lay_out, scientific, wrap

NAME = "beta_curves"
ABOUT = "relative error against beta for each scheme, float32 and float64, and what `automatic` chooses by itself"

_ONE_SIDED = {"forward": cm.forward_difference, "second-order forward": cm.second_order_forward}
_SYMMETRIC = {"central": cm.central_difference, "four-point": cm.four_point}
_COMPLEX = {"complex step": cm.complex_step, "circle, 8 points": cm.circle}
_TWICE = {"central, learner run twice": cm.central_difference}
_CHOSEN = {"central": cm.automatic(order=2), "four-point": cm.automatic(order=4)}

_NUM_STEPS = {RIDGE.name: 300, LOGISTIC.name: 200}


def run(session: Session) -> None:
    """One compiled program for each kind of scheme sweeps all strengths, and one more learns twice."""
    betas = np.geomspace(1e-8, 1e1, 7 if session.smoke else 37)
    for x64 in (False, True) if session.x64 is None else (session.x64,):
        for case in (RIDGE,) if session.smoke else (RIDGE, LOGISTIC):
            session.progress.begin(f"{case.name}: the reference", 1)
            prepared = prepare(case, session, x64)
            # Nothing here is timed.
            with precision(x64), compiling_cheaply(True):
                _sweep(session, case, prepared, betas, x64)


def _sweep(session: Session, case: Case, prepared: Prepared, betas: Vector, x64: bool) -> None:
    # As many steps as it takes to learn to the floor of float64: ridge is the worse conditioned one.
    num_steps = 20 if session.smoke else _NUM_STEPS[case.name]
    instance, learner = prepared.instance, prepared.tuning._replace(num_steps=num_steps).learner
    subject = (instance.problem, instance.meta_params, instance.task)
    families: dict[str, dict[str, Any]] = {
        "one-sided": _ONE_SIDED,
        "symmetric": _SYMMETRIC,
        "twice": _TWICE,
        "complex": _COMPLEX,
    }
    phases_by_default = cm.NewtonKrylov(fall_back=False)
    learners = {
        "one-sided": phases_by_default,
        "symmetric": phases_by_default,
        "twice": learner,
        "complex": cm.NewtonKrylov(),
    }
    calls: dict[str, Any] = {
        kind: (_over_schemes, (_stack(schemes, betas), learner, learners[kind], *subject))
        for kind, schemes in families.items()
        if not session.smoke or kind == "symmetric"
    }
    for name, scheme in {} if session.smoke else _CHOSEN.items():
        estimator = cm.Contrastive(learner, scheme=scheme)
        calls[f"automatic, {name}"] = (_estimate, (estimator, *subject))
    bits = "float64" if x64 else "float32"
    for name, outcome in session.measure(f"{case.name}: error against beta, {bits}", calls, repeats=1).items():
        common = {"case": case.name, "title": case.title, "reference_converged": prepared.converged}
        if isinstance(outcome, Exception):
            session.record(x64=x64, kind="failed", scheme=name, error=first_line(outcome), **common)
        elif name in families:
            for index, scheme_name in enumerate(families[name]):
                errors = [relative_error(grad, prepared.reference) for grad in _rows(outcome.output, index, len(betas))]
                session.record(x64=x64, kind="curve", scheme=scheme_name, betas=betas, errors=errors, **common)
        else:
            result = outcome.output
            session.record(
                x64=x64,
                kind="chosen",
                scheme=name.removeprefix("automatic, "),
                beta=result.diagnostics.beta.item(),
                error=relative_error(result.grad, prepared.reference),
                status=cm.Status(int(result.diagnostics.status)).name,
                **common,
            )


def _stack(schemes: dict[str, Any], betas: Vector) -> cm.NudgeScheme:
    """All schemes at all strengths as one batch: a scheme is data, so one program runs those with one free phase."""
    made = [make(float(beta)) for make in schemes.values() for beta in betas]
    num_phases = max(len(scheme.nudges) for scheme in made)
    padded = [_pad(scheme, num_phases) for scheme in made]
    stacked: cm.NudgeScheme = jax.tree.map(lambda *numbers: jnp.stack([*map(jnp.asarray, numbers)]), *padded)
    return stacked


def _pad(scheme: cm.NudgeScheme, num_phases: int) -> cm.NudgeScheme:
    """The same estimate from more phases: the last one repeated, its weight shared out."""
    copies = num_phases - len(scheme.nudges) + 1
    nudges = (*scheme.nudges[:-1], *[scheme.nudges[-1]] * copies)
    weights = (*scheme.weights[:-1], *[scheme.weights[-1] / copies] * copies)
    return cm.NudgeScheme(nudges, weights, free_phase=scheme.free_phase)


def _over_schemes(
    schemes: cm.NudgeScheme,
    learner: cm.InnerSolver,
    nudged: cm.InnerSolver | cm.NewtonKrylov,
    problem: cm.BilevelProblem,
    meta_params: Any,
    task: Any,
) -> Any:
    def one(scheme: cm.NudgeScheme) -> Any:
        return cm.Contrastive(learner, nudged, scheme, estimate_error=False).estimate(problem, meta_params, task).grad

    return jax.vmap(one)(schemes)


def _estimate(
    estimator: cm.MetaGradientEstimator, problem: cm.BilevelProblem, meta_params: Any, task: Any
) -> cm.MetaGradient:
    return estimator.estimate(problem, meta_params, task)


def _rows(grads: Any, index: int, count: int) -> list[Any]:
    here = jax.tree.map(lambda leaf: np.asarray(leaf)[index * count : (index + 1) * count], grads)
    return [jax.tree.map(lambda leaf, at=at: leaf[at], here) for at in range(count)]


def show(records: Sequence[Record]) -> str:
    """For each scheme where its error is least, and what `automatic` chose."""
    header = ["problem", "precision", "scheme", "least error", "at beta", "`automatic` chose", "its error"]
    rows = []
    for record in records:
        if record["kind"] != "curve":
            continue
        known = [(e, b) for e, b in zip(record["errors"], record["betas"], strict=True) if e is not None]
        error, beta = min(known, default=(None, None))
        chosen = [r for r in records if r["kind"] == "chosen" and _key(r) == _key(record)]
        choice = [scientific(chosen[0]["beta"]), scientific(chosen[0]["error"])] if chosen else ["", ""]
        rows.append([*_key(record), scientific(error), scientific(beta), *choice])
    failed = [f"{record['scheme']} failed: {record['error']}" for record in records if record["kind"] == "failed"]
    title = f"Relative error against beta  [seed {records[0]['seed']}]"
    return "\n".join([title, "", lay_out(header, rows, left=(0, 1, 2)), "", *map(wrap, [*failed, read(records)])])


def _key(record: Record) -> list[str]:
    return [record["case"], record["precision"], record["scheme"]]


def read(records: Sequence[Record]) -> str:
    """What the table says, in one sentence."""
    chosen = [record for record in records if record["kind"] == "chosen"]
    losses = []
    for choice in chosen:
        curve = next(r for r in records if r["kind"] == "curve" and _key(r) == _key(choice))
        least = min((e for e in curve["errors"] if e is not None), default=None)
        if least and choice["error"] is not None:
            losses.append(choice["error"] / least)
    if not losses:
        return "Too small a beta divides rounding by it, too large a one adds truncation: each curve is a U."
    return (
        "Too small a beta divides rounding by it, too large a one adds truncation; the strength that `automatic` "
        f"selects by itself costs at most a factor {max(losses):.1f} against the best of all strengths tried, and no "
        "tuning; the complex step subtracts nothing and so has no left branch."
    )


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """One panel for each problem and precision."""
    return [figures.draw_beta_curves(records, folder / "beta_curves.png")]
