"""The benchmark `tuning`: its data are what it says, its table adds up, and it runs."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

from benchmarks import report, tuning
from benchmarks.__main__ import main
from benchmarks.tuning_task import Instance, batch_of, init_params, inner_loss, load, logits


def _record(**fields: Any) -> dict[str, Any]:
    row = {
        "benchmark": "tuning", "run": "a", "date": "2030-01-01", "seed": 0, "smoke": False, "precision": "float32",
        "case": tuning.PLAIN, "setting": Instance()._asdict(), "choices": {}, "accuracy": 0.6, "accuracies": [0.7, 0.6],
        "val_loss": 1.0, "num_gradients": 2000, "auc": None, "num_failed": 0, "seconds": 1.0,
        "environment": {"jax": "0.0", "cpu_count": 2, "device": "cpu"},
    }  # fmt: skip
    return row | fields


ROWS = [
    _record(),
    _record(seed=1, accuracy=0.7),
    _record(case=tuning.ORACLE, accuracy=0.9),
    _record(case=tuning.ORACLE, accuracy=0.95, seed=1),
    _record(case=tuning.SINGLE, accuracy=0.87, auc=0.95, num_gradients=6000),
    _record(case=tuning.SINGLE, accuracy=0.8, auc=0.85, num_gradients=6000, seed=1),
    # A seed that has no oracle says nothing about the gap.
    _record(case=tuning.SINGLE, accuracy=0.2, auc=0.9, num_gradients=6000, seed=2),
]


def test_the_gap_is_of_the_same_seed_and_the_table_says_it(tmp_path: Path) -> None:
    assert tuning.gap_closed(ROWS, tuning.SINGLE) == pytest.approx([0.9, 0.4])
    assert tuning.gap_closed(ROWS, tuning.ORACLE) == [1.0, 1.0]
    text = tuning.show(ROWS)
    assert "65 (40-90)" in text and "3.00" in text and "0.900" in text and "62.3" in text
    block = report.render_shown_block(ROWS, tuning)
    assert text in block and "python -m benchmarks run tuning" in block
    assert tuning.draw(ROWS, tmp_path)[0].read_bytes().startswith(b"\x89PNG")


def test_auc_counts_ties_one_half() -> None:
    right = np.array([True, True, False, False])
    assert tuning._auc(np.array([2.0, 3.0, 1.0, 0.0]), right) == 1.0
    assert tuning._auc(np.array([0.0, 3.0, 1.0, 0.0]), right) == pytest.approx((0 + 0.5 + 1 + 1) / 4)


def test_half_of_the_labels_are_wrong_and_no_example_is_in_two_parts() -> None:
    setting = Instance(num_train=100, num_val=50, num_test=200, batch_size=20, num_val_batch=25, num_steps=12)
    digits, again = (load("digits", setting, seed=3, folder=None) for _ in range(2))
    assert int(digits.corrupted.sum()) == 50
    images = np.concatenate([np.asarray(x).reshape(len(x), -1) for x in (digits.x_train, digits.x_val, digits.x_test)])
    assert len(images) == 350 and len(np.unique(images, axis=0)) == 350
    # The data, wrong labels, batches and start of a seed are its own and the same for all methods.
    np.testing.assert_array_equal(digits.y_train, again.y_train)
    np.testing.assert_array_equal(digits.batches, again.batches)
    other = load("digits", setting, seed=4, folder=None)
    assert not np.array_equal(digits.batches, other.batches) and not np.array_equal(digits.corrupted, other.corrupted)
    # Twice through the training set: five steps an epoch.
    np.testing.assert_array_equal(np.sort(np.asarray(digits.batches[:5]).ravel()), np.arange(100))


def test_a_weight_of_zero_takes_an_example_out() -> None:
    setting = Instance(num_train=20, num_val=10, num_test=10, batch_size=20, num_val_batch=10, num_steps=1)
    digits = load("digits", setting, seed=0, folder=None)
    params, batch = init_params(digits), batch_of(digits, 0)
    scores = jnp.where(digits.corrupted, -tuning.CERTAIN, tuning.CERTAIN)
    kept = ~np.asarray(digits.corrupted)
    values = np.asarray(logits(params, digits.x_train), np.float64)[kept]
    wanted = np.log(np.exp(values).sum(axis=1)) - values[np.arange(kept.sum()), np.asarray(digits.y_train)[kept]]
    # Half of the examples, but still a mean over all of them; float32.
    np.testing.assert_allclose(inner_loss(params, scores, batch), wanted.sum() / 20, rtol=1e-5)


@pytest.mark.benchmarks
@pytest.mark.slow
def test_tuning_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    cases = f"{tuning.PLAIN},{tuning.ORACLE},{tuning.SINGLE}"
    assert main(["run", "tuning", "--smoke", "--cases", cases]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/tuning.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == cases.split(",")
    single = rows[-1]
    # One gradient of training and two of tuning at every step, as counted by the package.
    assert single["num_gradients"] == 3 * single["setting"]["num_steps"]
    assert 0 < single["weight_of_wrong"] < 1 and single["num_failed"] == 0
    assert (tmp_path / "results/tuning.png").exists()
    assert tuning.SINGLE in capsys.readouterr().out
