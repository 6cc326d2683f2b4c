"""Estimators side by side on one problem: errors, costs and statuses in a table."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from contrastive_meta._estimators import MetaGradientEstimator
from contrastive_meta._problem import BilevelProblem, MetaParams, Task, as_float_arrays
from contrastive_meta._report import text
from contrastive_meta._report.compare.measurement import (
    Measurement,
    Prepared,
    check_repeats,
    prepare_each,
    time_interleaved,
)
from contrastive_meta._report.compare.reference import Reference, Subject, check_reference, resolve_reference
from contrastive_meta._report.gradients import (
    cosine,
    first_line,
    flatten,
    raise_first,
    relative_error,
    status_of,
    unseen_told_later,
)
from contrastive_meta._result import MetaGradient, Status


class Row(NamedTuple):
    """One estimator's line; None where it raised.

    Attributes:
      name: as in `estimators`.
      relative_error: ||grad - reference|| / ||reference||; NaN where that is not defined.
      cosine: of the angle between `grad` and the reference, both flattened; NaN likewise.
      outer_loss: at the solution that the estimator learned.
      seconds: wall time of one estimate after compilation, the median.
      spread: interquartile range of the same, in seconds.
      compile_seconds: tracing and compiling.
      temp_bytes: compiled temporary memory; None where the backend does not tell.
      num_gradients: gradients of the inner (or nudged) loss, counted.
      num_hvps: Hessian-vector products, counted.
      status: the name of its `Status`; the error's first line where it raised.
      unseen: names of the meta-parameters that it cannot see.
    """

    name: str
    relative_error: float | None
    cosine: float | None
    outer_loss: float | None
    seconds: float | None
    spread: float | None
    compile_seconds: float | None
    temp_bytes: int | None
    num_gradients: int | None
    num_hvps: int | None
    status: str
    unseen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare` found: `print` it, or take it along as a dictionary or JSON.

    Attributes:
      rows: one for each estimator, in the order given, with the fields `name`, `relative_error`, `cosine`,
        `outer_loss`, `seconds`, `spread`, `compile_seconds`, `temp_bytes`, `num_gradients`, `num_hvps`, `status` and
        `unseen`. Those of an estimator that raised hold None, and the error in `status`.
      reference: in words, what errors are measured against.
      notes: what else a reader should know: unseen meta-parameters, errors, what the statuses mean.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.Comparison(rows=(), reference="none.").to_dict()
      {'reference': 'none.', 'rows': [], 'notes': []}
    """

    rows: tuple[Row, ...]
    reference: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Aligned text of at most 120 columns."""
        below = [text.wrap(f"Reference: {self.reference}", "  ")]
        below += [text.wrap(f"Note: {note}", "  ") for note in self.notes]
        return "\n".join([*text.lay_out(_columns(self.rows)), "", *(line for lines in below for line in lines)])

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and text."""
        rows = [{**row._asdict(), "unseen": list(row.unseen)} for row in self.rows]
        return {"reference": self.reference, "rows": rows, "notes": list(self.notes)}

    def to_json(self, path: str | Path | None = None, indent: int | None = 2) -> str:
        """The same as JSON, NaN and infinity as null.

        Args:
          path: a file to write it to as well.
          indent: as in `json.dumps`.
        """
        encoded = json.dumps(_without_nan(self.to_dict()), indent=indent, allow_nan=False)
        if path is not None:
            Path(path).write_text(f"{encoded}\n", encoding="utf-8")
        return encoded


def compare(
    problem: BilevelProblem,
    estimators: Mapping[str, MetaGradientEstimator],
    meta_params: MetaParams,
    task: Task,
    *,
    reference: Any = None,
    repeats: int = 5,
    key: jax.Array | None = None,
    num_compiling: int = 1,
) -> Comparison:
    """Run estimators on one problem and set their gradients, costs and statuses side by side.

    Each is compiled and warmed up before any is timed, and they are timed in turn. An estimator that raises becomes a
    row with its error.

    Args:
      problem: the bilevel problem.
      estimators: `{name: estimator}`.
      meta_params: where the meta-gradient is wanted.
      task: a single task.
      reference: what errors are measured against: the name of one of the estimators, another estimator, or a pytree
        like `meta_params`. None for dense implicit differentiation with the solver of the first estimator, where
        `params` has at most 2000 entries and that works; else for the first estimator that did not raise.
      repeats: timed estimates of each.
      key: as in `estimate`; the same for all.
      num_compiling: programs that are compiled at a time; see `measure_interleaved`.

    Returns:
      A table to print or to export. It says what the reference is, and how doubtful.

    Raises:
      ValueError: no estimators; a reference that is none of the above; `repeats` or `num_compiling` below 1.
      Exception: what the first estimator raised, if all did.

    Example:
      >>> import jax
      >>> import optax
      >>> import contrastive_meta as cm
      >>> from contrastive_meta.problems import ridge, ridge_data
      >>> problem, meta_params, task, exact = ridge(*ridge_data(jax.random.key(0)))
      >>> solver = cm.OptaxDescent(optax.sgd(0.3), num_steps=300)
      >>> table = cm.compare(
      ...     problem,
      ...     {"contrastive": cm.Contrastive(solver), "implicit": cm.ImplicitDifferentiation(solver)},
      ...     meta_params,
      ...     task,
      ...     reference=exact(meta_params, task).grad,
      ... )
      >>> [row.relative_error < 1e-2 for row in table.rows]
      [True, True]
    """
    if not estimators:
        raise ValueError("`compare` needs at least one estimator: pass `{name: estimator}`.")
    check_repeats(repeats)
    meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
    check_reference(estimators, meta_params, reference)

    calls = {name: (_estimate, (estimator, problem, meta_params, task, key)) for name, estimator in estimators.items()}
    with unseen_told_later():
        ready = prepare_each(calls, num_compiling)
        prepared = {name: one for name, one in ready.items() if isinstance(one, Prepared)}
        errors = {name: one for name, one in ready.items() if isinstance(one, Exception)}
        if not prepared:
            raise_first(errors)
        results = {name: one.output for name, one in prepared.items()}
        against = resolve_reference(Subject(problem, estimators, results, meta_params, task, key), reference)
    measurements = time_interleaved(prepared, repeats)

    rows = tuple(
        _row(name, measurements[name], against) if name in measurements else _failed_row(name, errors[name])
        for name in estimators
    )
    return Comparison(rows, against.text, tuple(_notes(rows, errors)))


def _estimate(
    estimator: MetaGradientEstimator, problem: BilevelProblem, meta_params: MetaParams, task: Task, key: Any
) -> MetaGradient:
    return estimator.estimate(problem, meta_params, task, key=key)


def _row(name: str, measurement: Measurement, reference: Reference) -> Row:
    result: MetaGradient = measurement.output
    grad = flatten(result.grad)
    against = np.full_like(grad, np.nan) if reference.grad is None else reference.grad
    return Row(
        name=name,
        relative_error=relative_error(grad, against),
        cosine=cosine(grad, against),
        outer_loss=float(result.outer_loss),
        seconds=measurement.seconds,
        spread=measurement.spread,
        compile_seconds=measurement.compile_seconds,
        temp_bytes=measurement.temp_bytes,
        num_gradients=int(result.diagnostics.num_gradients),
        num_hvps=int(result.diagnostics.num_hvps),
        status=status_of(result).name,
        unseen=result.unseen,
    )


def _failed_row(name: str, error: Exception) -> Row:
    return Row(name, None, None, None, None, None, None, None, None, None, first_line(error))


def _notes(rows: Sequence[Row], errors: Mapping[str, Exception]) -> list[str]:
    """One line for each set of unseen meta-parameters, each error, and each status that is not as it should be."""
    blind = {row.unseen: [r.name for r in rows if r.unseen == row.unseen] for row in rows if row.unseen}
    notes = [
        f"{text.listing(names)} cannot see {text.listing(unseen)}: the gradient there is an exact zero."
        for unseen, names in blind.items()
    ]
    notes += [f"{name} raised {first_line(error)}" for name, error in errors.items()]
    occurring = {row.status for row in rows}
    return notes + [f"{s.name}: {s.describe()}" for s in Status if s.name in occurring and s != Status.CONVERGED]


def _columns(rows: Sequence[Row]) -> list[text.Column]:
    number = text.number
    return [
        text.Column(("estimator",), [row.name for row in rows], numeric=False, narrowest=14, keep_end=True),
        text.Column(("relative", "error"), [number(row.relative_error, ".2e") for row in rows]),
        text.Column(("cosine",), [number(row.cosine, ".5f") for row in rows]),
        text.Column(("outer", "loss"), [number(row.outer_loss, ".5g") for row in rows]),
        text.Column(("time", "(ms)"), [text.milliseconds(row.seconds) for row in rows]),
        text.Column(("compile", "(s)"), [number(row.compile_seconds, ".2f") for row in rows]),
        text.Column(("temporary", "memory"), [text.memory(row.temp_bytes) for row in rows]),
        text.Column(("inner", "gradients"), [number(row.num_gradients, "d") for row in rows]),
        text.Column(("HVPs",), [number(row.num_hvps, "d") for row in rows]),
        text.Column(("status",), [row.status for row in rows], numeric=False, narrowest=20),
    ]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
