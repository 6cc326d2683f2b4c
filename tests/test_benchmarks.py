"""The benchmarks' machinery: records, tables, the README's block, the command line, and one benchmark in small."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

import contrastive_meta as cm
from benchmarks import beta_curves, estimators, figures, report, tables
from benchmarks.__main__ import main
from benchmarks.cases import CASES, RIDGE, Case, prepare
from benchmarks.data import DATA_VARIABLE, DataMissingError, breast_cancer, diabetes, digits, find_file
from benchmarks.harness import Progress, Session, plain, precision
from benchmarks.registry import BENCHMARKS


def _session(folder: Path | None = None) -> Session:
    return Session("estimators", Progress(), folder, smoke=True)


def _record(**fields: Any) -> dict[str, Any]:
    environment = {"jax": "0.0", "cpu_count": 2, "device": "cpu"}
    row = {
        "benchmark": "estimators", "run": "a", "date": "2030-01-01", "seed": 0, "smoke": False, "precision": "float32",
        "case": "ridge", "title": "Ridge: x", "method": "contrastive (default)", "num_params": 2, "num_meta": 2,
        "num_steps": 10, "learner": "descent", "reference": "exact", "reference_converged": True, "left_out": "",
        "status": "CONVERGED", "relative_error": 1.25e-4, "cosine": 1.0, "seconds": 1e-3, "spread": 1e-4,
        "compile_seconds": 1.0, "temp_bytes": 2048, "num_gradients": 7, "num_hvps": 0, "environment": environment,
    }  # fmt: skip
    return row | fields


def test_precision_holds_whatever_the_process_has() -> None:
    with precision(False):
        assert jnp.asarray(1.0).dtype == jnp.float32
        with precision(True):
            assert jnp.asarray(1.0).dtype == jnp.float64
    assert jnp.asarray(1.0).dtype == jnp.float64  # the tests' own default, unharmed


def test_reference_is_of_the_very_numbers_that_are_measured() -> None:
    prepared = prepare(RIDGE, _session(), x64=False)
    instance = prepared.instance
    assert {leaf.dtype for leaf in jax.tree.leaves((instance.task, instance.meta_params))} == {np.dtype("float32")}
    assert prepared.converged
    # Closed form from the float32 numbers in numpy's float64, independent of the package.
    x, y = (np.asarray(leaf, np.float64) for leaf in instance.task[:2])
    x_val, y_val = (np.asarray(leaf, np.float64) for leaf in instance.task[2:])
    strength = np.exp(np.asarray(instance.meta_params, np.float64))
    hessian = x.T @ x / len(x) + np.diag(strength)
    w = np.linalg.solve(hessian, x.T @ y / len(x))
    expected = -strength * w * np.linalg.solve(hessian, x_val.T @ (x_val @ w - y_val) / len(x_val))
    # Condition number 44, so 1e-16 times that; 1e-12 would fail for a reference of the unrounded data (1e-7 off).
    np.testing.assert_allclose(prepared.reference, expected, rtol=1e-11)
    assert prepared.tuning.step_size < 1 / np.linalg.eigvalsh(hessian)[-1]


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: str(case.name))
def test_both_precisions_have_the_same_problem(case: Case) -> None:
    # The fourth, the network, is left out for time: its start is learned in float64 for either precision.
    tasks = []
    for x64 in (False, True):
        with precision(x64):
            tasks.append(jax.tree.leaves(case.build(_session()).task))
    for single, double in zip(*tasks, strict=True):
        if not jnp.issubdtype(single.dtype, jax.dtypes.prng_key):
            # Equal but for rounding: 1e-6 is ten roundings of float32.
            np.testing.assert_allclose(np.asarray(single), np.asarray(double), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "make", [cm.forward_difference, cm.second_order_forward, cm.central_difference, cm.complex_step]
)
def test_padding_a_scheme_changes_nothing(make: Any) -> None:
    scheme = make(0.3)
    padded = beta_curves._pad(scheme, 5)
    assert len(padded.nudges) == 5
    for power in range(4):  # what schemes contrast are powers of beta, to any order
        exact, ours = (sum(w * b**power for w, b in zip(s.weights, s.nudges, strict=True)) for s in (scheme, padded))
        assert abs(ours - exact) < 1e-14 * (1 + abs(exact)) / 0.3


def test_a_call_that_raises_is_a_row_and_takes_nobody_along() -> None:
    def fails(x: Any) -> Any:
        raise ValueError("no\nreally")

    session = _session()
    outcome = session.measure("test", {"good": (lambda x: 2 * x, (jnp.ones(2),)), "bad": (fails, (jnp.ones(2),))}, 1)
    assert isinstance(outcome["good"], cm.Measurement)
    np.testing.assert_array_equal(outcome["good"].output, [2.0, 2.0])
    assert isinstance(outcome["bad"], ValueError)
    row = estimators._row(outcome["bad"], prepared=None)  # type: ignore[arg-type]
    assert row == {"status": "RAISED", "error": "ValueError: no"}
    text = estimators.show([_record(), _record(method="bad", **row, relative_error=None)])
    assert "RAISED" in text and "'bad' raised ValueError: no" in text


def test_records_are_plain_json_with_their_origin(tmp_path: Path) -> None:
    session = _session(tmp_path)
    session.record(x64=False, value=jnp.float32(np.nan), curve=np.array([1.0, np.inf]), count=np.int32(3))
    session.record(x64=True, value=2.0)
    lines = [json.loads(line) for line in (tmp_path / "estimators.jsonl").read_text().splitlines()]
    assert [line["precision"] for line in lines] == ["float32", "float64"]
    assert (lines[0]["value"], lines[0]["curve"], lines[0]["count"]) == (None, [1.0, None], 3)
    assert lines[0]["environment"]["jax"] == jax.__version__
    assert {"jaxlib", "optax", "numpy", "scipy", "python", "device", "default_matmul_precision", "commit"} <= set(
        lines[0]["environment"]
    )
    assert plain({"a": (np.float64(1), True)}) == {"a": [1.0, True]}


def test_tables_line_up_and_stay_narrow() -> None:
    rows = [_record(), _record(method="contrastive, complex step", status="NUDGED_NOT_CONVERGED", relative_error=None)]
    lines = estimators._table(rows).splitlines()
    assert max(map(len, lines)) <= tables.WIDTH
    column = lines[0].index("status")
    assert lines[2][column:] == "CONVERGED" and lines[3][column:] == "NUDGED_NOT_CONVERGED"
    assert tables.scientific(2.1e-5) == "2.1e-5" and tables.scientific(None) == "-"
    assert [tables.memory(size) for size in (12, 2048, 5 * 2**20)] == ["12 B", "2.0 KiB", "5.0 MiB"]
    assert [tables.milliseconds(s) for s in (0.0012, 0.012, 1.2)] == ["1.20", "12.0", "1200"]


def test_readme_block_is_of_the_newest_records_and_is_checked(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    old, new = _record(relative_error=9e-1), _record(run="b", date="2030-02-01", relative_error=2e-4)
    smoke = _record(run="c", date="2030-03-01", smoke=True)
    folder = tmp_path / "clone" / "records"
    folder.mkdir(parents=True)
    (folder / "estimators.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (new, old, smoke)))
    records = report.load(folder)
    assert len(records) == 2
    block = report.render_readme_block(records)
    assert "2.0e-4, 1.00 ms" in block and "9.0e-1" not in block

    readme = tmp_path / "clone" / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "PACKAGE_FOLDER", tmp_path / "clone" / "benchmarks")
    assert report.report(folder, tmp_path, check=True) == 1
    assert report.report(folder, tmp_path, check=False) == 0
    assert readme.read_text() == f"before\n{report.BEGIN}\n{block}\n{report.END}\nafter\n"
    assert report.report(folder, tmp_path, check=True) == 0
    readme.unlink()
    capsys.readouterr()
    assert report.report(folder, tmp_path, check=False) == 0
    assert block in capsys.readouterr().out


def test_pictures_are_drawn_from_records(tmp_path: Path) -> None:
    betas, errors = [1e-3, 1e-2, 1e-1], [1e-2, None, 1e3]
    curve = {"benchmark": "beta_curves", "kind": "curve", "scheme": "central", "betas": betas, "errors": errors}
    chosen = {"kind": "chosen", "scheme": "central", "beta": 1e-2, "error": 1e-3}
    for path in (
        figures.draw_beta_curves([_record(**curve), _record(**chosen)], tmp_path / "curves.png"),
        figures.draw_scaling([_record(num_steps=n, temp_bytes=n) for n in (10, 100)], tmp_path / "scaling.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert "costs at most a factor 0.1" in beta_curves.read([_record(**curve), _record(**chosen)])


def test_data_are_what_they_say(tmp_path: Path, monkeypatch: Any) -> None:
    for split, features in ((diabetes(0), 10), (breast_cancer(0), 30), (digits(0, 50, 40), 64)):
        assert split.x_train.shape[1] == split.x_val.shape[1] == features
        # No example is on both sides.
        assert not {row.tobytes() for row in split.x_train} & {row.tobytes() for row in split.x_val}
    np.testing.assert_allclose(diabetes(0).x_train.std(axis=0), 1.0)
    assert (diabetes(0).x_train != diabetes(1).x_train).any()
    (tmp_path / "there").touch()
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert find_file("there", None, "") == tmp_path / "there"
    with pytest.raises(DataMissingError, match=r"nowhere is not in .*\. Download it\."):
        find_file("nowhere", tmp_path, "Download it.")


def test_command_line_lists_and_refuses(capsys: Any) -> None:
    assert main(["list", "--names"]) == 0
    assert capsys.readouterr().out.split() == list(BENCHMARKS)
    with pytest.raises(SystemExit):
        main(["run", "nope"])
    assert "'nope'; known are: estimators, beta_curves, scaling_steps" in capsys.readouterr().err


@pytest.mark.benchmarks
def test_estimators_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "estimators", "--smoke"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/estimators.jsonl").read_text().splitlines()]
    # Measured in float32 although this process is in float64.
    assert {row["dtype"] for row in rows} == {"float32"} and all(row["smoke"] for row in rows)
    assert {row["case"] for row in rows} == {"ridge", "tanh MLP"}
    ridge = {row["method"]: row["relative_error"] for row in rows if row["case"] == "ridge"}
    # 30 steps at a condition number of 48 leave (1 - 1/sqrt(48))^30, about 1e-2.
    assert max(ridge.values()) < 5e-2
    printed = capsys.readouterr()
    assert "contrastive (default)" in printed.out and "done in" in printed.out
    assert "compiling contrastive (default)" in printed.err
