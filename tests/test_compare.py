"""`measure` and `compare`: numbers against direct calls and numpy, what is timed, tables that stay aligned."""

import dataclasses
import itertools
import json
import math
import re
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import contrastive_meta as cm
from tests.oracles import cosine, relative_error

# Each step halves what is left at least: 80 leave rounding.
SOLVER = cm.OptaxDescent(optax.sgd(0.4), num_steps=80)
# Learning that has barely begun.
SHORT = cm.OptaxDescent(optax.sgd(0.1), num_steps=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edited(cm.MetaGradientEstimator):
    """Backprop with its gradient multiplied, and perhaps a warning on the way."""

    solver: cm.InnerSolver
    factor: float = 1.0
    complain: bool = dataclasses.field(default=False, metadata={"static": True})

    def _estimate(self, instance: Any, state: Any) -> cm.MetaGradient:
        if self.complain:
            warnings.warn("this estimator is deprecated", UserWarning, stacklevel=2)
        result = cm.BackpropThroughLearning(self.solver).estimate(
            instance.problem, instance.meta_params, instance.task, key=instance.key
        )
        return dataclasses.replace(result, grad=jax.tree.map(lambda g: self.factor * g, result.grad))

    def _sees(self, problem: Any, params: Any, meta_params: Any, task: Any) -> list[bool]:
        return [True] * len(jax.tree.leaves(meta_params))


def _inner(w: Any, meta: Any, task: Any) -> Any:
    return jnp.sum((w - task) ** 2) / 2 + jnp.sum(jnp.exp(meta["log_decay"]) * w**2) / 2


def _outer(w: Any, meta: Any, task: Any) -> Any:
    return jnp.sum((w - 1.0) ** 2) / 2 + jnp.sum(meta["log_decay"] ** 2) / 2


def _init(meta: Any, task: Any) -> Any:
    return meta["start"]


PROBLEM = cm.BilevelProblem(_inner, _outer, _init)


class Case(NamedTuple):
    """Arguments, and the answer in numpy: w = task / (1 + exp(log_decay)), and the direct term."""

    meta_params: Any
    task: Any
    exact: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def case() -> Case:
    log_decay, task = np.linspace(-1.0, 1.0, 4), np.array([2.0, 3.0, -1.0, 0.5])
    decay = np.exp(log_decay)
    learned = task / (1 + decay)
    exact = {"log_decay": log_decay - (learned - 1) * task * decay / (1 + decay) ** 2, "start": np.zeros(4)}
    meta_params = {"log_decay": jnp.asarray(log_decay), "start": 0.3 * jnp.ones(4)}
    return Case(meta_params, jnp.asarray(task), exact)


# Wrong on purpose, and quick to compile.
IMPLICIT = cm.ImplicitDifferentiation(SOLVER, cm.IdentityHessian())
DENSE = cm.ImplicitDifferentiation(SOLVER, cm.DenseInverse())
ESTIMATORS: dict[str, cm.MetaGradientEstimator] = {
    "identity": IMPLICIT,
    "backprop": cm.BackpropThroughLearning(SOLVER),
    "cannot": cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(0.5), tol=1e-6)),
    "nan": Edited(SOLVER, float("nan")),
    "dense": DENSE,
}


@pytest.fixture(scope="module")
def table(case: Case) -> cm.Comparison:
    """One table for many tests; warnings are errors, so it also shows that none escapes."""
    return cm.compare(PROBLEM, ESTIMATORS, case.meta_params, case.task, repeats=2)


def _row(table: cm.Comparison, name: str) -> Any:
    return next(row for row in table.rows if row.name == name)


def _reference_error(case: Case, estimator: cm.MetaGradientEstimator, **options: Any) -> tuple[float, str]:
    table = cm.compare(PROBLEM, {"only": estimator}, case.meta_params, case.task, repeats=1, **options)
    return table.rows[0].relative_error, table.reference


# measure


def test_temporary_memory_is_that_of_jit_by_hand() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sort(x @ x.T, axis=0) @ x)

    x = jnp.ones((64, 64))
    by_hand = jax.jit(function).lower(x).compile().memory_analysis().temp_size_in_bytes
    assert by_hand > 0
    assert cm.measure(function, x, repeats=1).temp_bytes == by_hand


def test_a_backend_that_does_not_tell_its_memory_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    assert cm.measure(jnp.sum, jnp.ones(3), repeats=1).temp_bytes is None


def test_a_function_is_compiled_once_however_often_it_runs_and_anew_each_time_it_is_measured() -> None:
    traced = []

    def function(x: jax.Array) -> jax.Array:
        traced.append(x)
        return jnp.sin(x)

    measurement = cm.measure(function, 2.0, repeats=5)
    assert len(traced) == 1
    np.testing.assert_allclose(measurement.output, np.sin(2.0))
    assert measurement.compile_seconds > 0
    # Otherwise the second compile time would be that of a look-up.
    cm.measure(function, 2.0, repeats=1)
    assert len(traced) == 2


def test_time_is_the_median_of_finished_calls_without_warm_up_and_compilation() -> None:
    naps = iter([0.5, 0.0, 0.4, 0.1])  # the first is the warm-up

    def nap(x: Any) -> Any:
        time.sleep(next(naps))
        return x

    measurement = cm.measure(lambda x: jax.pure_callback(nap, x, x), jnp.ones(()), repeats=3)
    assert 0.1 <= measurement.seconds < 0.16, "the median of 0, 0.4 and 0.1 is 0.1; their mean is 0.17"
    assert measurement.spread == pytest.approx(0.2, abs=0.05), "the quartiles are 0.05 and 0.25"
    assert math.isnan(cm.measure(lambda x: x, 1.0, repeats=1).spread)


def test_the_clock_waits_for_what_is_dispatched() -> None:
    def products(x: jax.Array) -> jax.Array:
        for _ in range(6):
            x = jnp.tanh(x @ x)
        return x

    x = jnp.ones((500, 500))
    compiled = jax.jit(products).lower(x).compile()

    def by_hand() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(x))
        return time.perf_counter() - start

    # Some 20 ms; a clock stopped at dispatch shows less than one.
    assert cm.measure(products, x, repeats=3).seconds > 0.3 * min(by_hand() for _ in range(3))


def test_an_estimator_that_cannot_be_moved_to_the_device_is_a_row(case: Case) -> None:
    estimators: Any = {"good": ESTIMATORS["identity"], "bad": object()}
    table = cm.compare(PROBLEM, estimators, case.meta_params, case.task, repeats=1)
    assert [row.relative_error is None for row in table.rows] == [False, True]
    assert any(note.startswith("bad raised TypeError") for note in table.notes)


def test_interleaved_calls_take_turns() -> None:
    order: list[str] = []

    def named(name: str) -> Any:
        return lambda x: io_callback(lambda: order.append(name), None, ordered=True) or x

    measurements = cm.measure_interleaved({name: (named(name), (1.0,)) for name in "abc"}, repeats=3)
    assert list(measurements) == ["a", "b", "c"]
    assert "".join(order) == "abc" + 3 * "abc"


def test_programs_compiled_at_a_time_are_those_compiled_one_by_one() -> None:
    def power(k: int) -> Any:
        return lambda x: x**k

    calls = {f"{k}": (power(k), (jnp.arange(3.0),)) for k in range(5)}
    together = cm.measure_interleaved(calls, repeats=1, num_compiling=3)
    assert list(together) == list(calls)
    for k, measurement in enumerate(together.values()):
        np.testing.assert_array_equal(measurement.output, np.arange(3.0) ** k)
        assert measurement.compile_seconds > 0
    with pytest.raises(TypeError, match="cannot reshape"):
        cm.measure_interleaved(calls | {"bad": (lambda x: x.reshape(7), (jnp.arange(3.0),))}, num_compiling=2)
    with pytest.raises(ValueError, match="`num_compiling` must be at least 1; got 0"):
        cm.measure_interleaved(calls, num_compiling=0)


def test_repeats_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="`repeats` must be at least 1; got 0"):
        cm.measure(jnp.sin, 1.0, repeats=0)


# compare


def test_rows_hold_what_the_estimators_return(table: cm.Comparison, case: Case) -> None:
    for name in ("identity", "backprop"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = ESTIMATORS[name].estimate(PROBLEM, case.meta_params, case.task)
        row = _row(table, name)
        # The reference is exact up to rounding.
        assert row.relative_error == pytest.approx(relative_error(result.grad, case.exact), rel=1e-6, abs=1e-9), name
        assert row.cosine == pytest.approx(cosine(result.grad, case.exact), abs=1e-9)
        assert row.outer_loss == pytest.approx(float(result.outer_loss), rel=1e-12)
        assert row.num_gradients == int(result.diagnostics.num_gradients)
        assert row.num_hvps == int(result.diagnostics.num_hvps)
        assert row.status == cm.Status(int(result.diagnostics.status)).name
        assert row.unseen == result.unseen
        assert row.seconds > 0
        assert row.compile_seconds > row.seconds
    assert 0.1 < _row(table, "identity").relative_error < 10
    assert _row(table, "backprop").relative_error < 1e-9


def test_memory_and_time_are_those_of_the_estimator_alone(table: cm.Comparison, case: Case) -> None:
    def alone(estimator: Any, meta_params: Any, task: Any) -> Any:
        return estimator.estimate(PROBLEM, meta_params, task, key=jax.random.key(0))

    compiled = jax.jit(alone).lower(ESTIMATORS["backprop"], case.meta_params, case.task).compile()
    assert _row(table, "backprop").temp_bytes == compiled.memory_analysis().temp_size_in_bytes


def test_the_default_reference_is_dense_and_named_where_it_is_a_row(table: cm.Comparison, case: Case) -> None:
    assert table.reference.startswith("'dense', itself a row of this table (dense implicit differentiation with the ")
    assert "It cannot see ['start'], where it is zero." in table.reference
    assert _row(table, "dense").relative_error == 0
    error, text = _reference_error(case, ESTIMATORS["backprop"])
    assert text.startswith("dense implicit differentiation with the solver of 'only', no row of this table.")
    assert error == pytest.approx(_row(table, "backprop").relative_error, abs=1e-12)


def test_a_reference_by_name_by_estimator_and_by_value_are_one(table: cm.Comparison, case: Case) -> None:
    error, text = _reference_error(case, IMPLICIT, reference=case.exact)
    assert error == pytest.approx(_row(table, "identity").relative_error, rel=1e-9)
    assert text == "the gradient passed in `reference`, no row of this table."
    error, text = _reference_error(case, IMPLICIT, reference="only")
    assert (error, text[:36]) == (0, "'only', itself a row of this table. ")
    # A reference is what errors are divided by: the other way round it would be 2/3.
    # It differs from the row in nothing but a number, and is another one all the same.
    error, text = _reference_error(case, Edited(SOLVER, 3.0), reference=Edited(SOLVER, 1.0))
    assert error == pytest.approx(2.0, rel=1e-9)
    assert text == "Edited as passed in `reference`, no row of this table."


def test_a_reference_of_zero_leaves_errors_undefined_and_says_so(case: Case) -> None:
    zero = jax.tree.map(jnp.zeros_like, case.meta_params)
    error, text = _reference_error(case, IMPLICIT, reference=zero)
    assert math.isnan(error)
    assert "It is zero, so relative errors and cosines are not defined." in text


def test_a_doubtful_reference_says_so(case: Case) -> None:
    _, text = _reference_error(case, cm.BackpropThroughLearning(SHORT))
    assert "It may be wrong itself: its status is FREE_NOT_CONVERGED." in text
    error, text = _reference_error(case, Edited(SOLVER, float("nan")), reference="only")
    assert math.isnan(error)
    assert "It is not finite" in text
    assert "NOT_FINITE" in text


def test_a_large_problem_is_measured_against_the_first_estimator() -> None:
    size = 2001
    problem = cm.BilevelProblem(
        lambda w, theta, task: jnp.sum((w - theta) ** 2),
        lambda w, theta, task: jnp.sum(w**2),
        lambda *_: jnp.zeros(size),
    )
    table = cm.compare(problem, {"first": cm.BackpropThroughLearning(SHORT)}, jnp.ones(()), None, repeats=1)
    assert table.reference.startswith("'first', itself a row of this table (`params` has 2001 entries, too many for")


def test_where_dense_implicit_differentiation_does_not_apply_the_first_estimator_is_the_reference() -> None:
    problem = cm.BilevelProblem(
        lambda w, rate, task: jnp.sum((w - 1) ** 2), lambda w, rate, task: jnp.sum(w**2), lambda *_: jnp.zeros(2)
    )
    solver = cm.OptaxDescent(optax.sgd, num_steps=2)
    table = cm.compare(problem, {"first": cm.BackpropThroughLearning(solver)}, jnp.array(0.1), None, repeats=1)
    assert table.reference.startswith(
        "'first', itself a row of this table (dense implicit differentiation raised Value"
    )


def test_an_estimator_that_raises_is_a_row(table: cm.Comparison) -> None:
    row = _row(table, "cannot")
    assert row.status.startswith("TypeError: OptaxDescent cannot be differentiated in reverse")
    assert set(row[1:10]) == {None}
    assert any(note.startswith("cannot raised TypeError: OptaxDescent cannot be") for note in table.notes)


def test_a_gradient_that_is_not_finite_is_shown_as_such(table: cm.Comparison) -> None:
    row = _row(table, "nan")
    assert row.status == "NOT_FINITE", "whatever the estimator itself says"
    assert math.isnan(row.relative_error)
    assert math.isnan(row.cosine)
    assert any(note.startswith("NOT_FINITE: A loss, a gradient") for note in table.notes)


def test_unseen_meta_parameters_are_told_once(table: cm.Comparison) -> None:
    told = [note for note in table.notes if "cannot see" in note]
    assert told == ["identity and dense cannot see ['start']: the gradient there is an exact zero."]
    assert str(table).count("exact zero") == 1


def test_other_warnings_are_let_through(case: Case) -> None:
    with pytest.warns(UserWarning) as caught:
        _reference_error(case, Edited(SOLVER, complain=True), reference="only")
    assert {str(warning.message) for warning in caught} == {"this estimator is deprecated"}


def test_if_all_raise_so_does_the_comparison(case: Case) -> None:
    broken = cm.BackpropThroughLearning(cm.LBFGS())
    with pytest.raises(TypeError, match="LBFGS cannot be differentiated") as caught:
        cm.compare(PROBLEM, {"a": broken, "b": broken}, case.meta_params, case.task)
    assert "Every estimator raised (a, b)" in caught.value.__notes__[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimators": {}}, "needs at least one estimator"),
        ({"repeats": 0}, "`repeats` must be at least 1"),
        ({"reference": "contrastive"}, "got 'contrastive', expected one of 'identity'"),
        ({"reference": jnp.ones(4)}, "must be a gradient like `meta_params`"),
        ({"reference": {"log_decay": np.ones(4), "start": np.ones(3)}}, r"expected shapes .*\(4,\).*, got .*\(3,\)"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(options: dict[str, Any], message: str, case: Case) -> None:
    arguments = {"estimators": {"identity": IMPLICIT}, "meta_params": case.meta_params, "task": case.task} | options
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        cm.compare(PROBLEM, **arguments)
    assert time.perf_counter() - start < 0.2


# The table as text and as data


def _crafted(table: cm.Comparison) -> cm.Comparison:
    """The table with names and numbers that want to break it."""
    first = table.rows[0]
    wide = first._replace(
        name="x" * 200,
        relative_error=1.2345e-100,
        cosine=-1.0,
        outer_loss=-1.23456e-8,
        seconds=1234.5,
        compile_seconds=123.4,
        temp_bytes=1023 * 1024**3,
        num_gradients=2_000_000_000,
        num_hvps=100_000,
        status="ValueError: " + "y" * 300,
    )
    odd = first._replace(name="two\nlines\tand a tab", seconds=1e-7, temp_bytes=None, relative_error=float("inf"))
    return dataclasses.replace(table, rows=(*table.rows, wide, odd), notes=("word " * 100,))


@pytest.mark.parametrize("crafted", [False, True])
def test_columns_stay_columns(table: cm.Comparison, crafted: bool) -> None:
    table = _crafted(table) if crafted else table
    lines = str(table).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[1].startswith("estimator")
    body = lines[: lines.index("")]
    assert len(body) == 2 + len(table.rows)
    width = max(map(len, body))
    padded = [line.ljust(width) for line in body]
    # A gap of two blanks runs through all lines between any two columns: ten columns, nine gaps.
    blank = "".join(" " if all(line[i] == " " for line in padded) else "#" for i in range(width))
    assert len(re.findall(r" {2,}", blank)) == 9
    starts = [match.start() for match in re.finditer(r"(?<=  )#|^#", blank)]
    for line, row in zip(padded[2:], table.rows, strict=True):
        assert line[starts[-1] :].startswith(row.status[:10])
        assert line.startswith(row.name[:3])
    # Numbers are right-aligned: in each numeric column every cell ends where its header ends.
    for start, end in itertools.pairwise(starts[1:]):
        cells = [line[start : end - 2] for line in padded]
        assert all(not cell.endswith(" ") for cell in cells[1:]), cells


def test_units_are_in_the_header_or_the_cell(table: cm.Comparison) -> None:
    text = str(_crafted(table))
    assert "(ms)" in text
    assert "(s)" in text
    assert " 1e+03 GiB" not in text
    assert " 1023 GiB" in text or " 0.999 TiB" in text
    assert " 1234500 " in text, "1234.5 s in milliseconds"


def test_a_table_survives_json(table: cm.Comparison, tmp_path: Path) -> None:
    table = _crafted(table)
    path = tmp_path / "table.json"
    text = table.to_json(path)
    assert path.read_text() == f"{text}\n"
    # Strict JSON: the constants NaN and Infinity, which Python would read, are not there.
    loaded = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    expected = table.to_dict()
    assert loaded["reference"] == expected["reference"]
    assert loaded["notes"] == expected["notes"]
    for got, want in zip(loaded["rows"], expected["rows"], strict=True):
        for name, value in want.items():
            lost = isinstance(value, float) and not math.isfinite(value)
            assert got[name] == (None if lost else value), name
    assert "\n" not in table.to_json(indent=None)
