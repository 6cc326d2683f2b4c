"""Fuzzy logic and tasks in context in small: tasks, divisions, decoding, and the shape of the records."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.composition import attention, fuzzy_logic, in_context
from benchmarks.composition.transformers import Shape, Trainer, first_params, transformer

LOGIC = fuzzy_logic.Logic(3, 5, 4)


def test_a_task_is_the_larger_of_two_conjunctions() -> None:
    row = 5
    chances = jnp.zeros(len(LOGIC.pairs)).at[row].set(1)
    tasks = fuzzy_logic.sampler(LOGIC, 6)(jax.random.key(0), chances)
    x = np.asarray(tasks.tokens[..., :3], np.float64) / 12**0.5 + 0.5
    first, second = LOGIC.pairs[row]
    values = [np.where(LOGIC.terms[t], x, 1 - x).min(-1) for t in (first, second)]
    deviation = (3 / 5) ** 0.5 / 4
    expected = (np.maximum(*values) - 1 / 4) / deviation - 0.56
    np.testing.assert_allclose(tasks.targets, expected[:, 5:], atol=1e-5)
    np.testing.assert_allclose(tasks.tokens[:, :5, 3], expected[:, :5], atol=1e-5)
    assert np.all(tasks.tokens[:, 5:, 3] == 0)
    np.testing.assert_array_equal(tasks.active, np.where(values[0] >= values[1], first, second))
    assert {tuple(pair) for pair in np.asarray(tasks.pairs).tolist()} == {(first, second)}


def test_targets_have_about_unit_variance() -> None:
    logic = fuzzy_logic.Logic(4, 1, 500)
    chances = jnp.full(len(logic.pairs), 1 / len(logic.pairs))
    targets = np.asarray(fuzzy_logic.sampler(logic, 200)(jax.random.key(1), chances).targets)
    assert abs(targets.mean()) < 0.2
    assert 0.5 < targets.var() < 1.5


def test_what_is_seen_and_what_is_not_never_meet() -> None:
    small, large = (fuzzy_logic.divide(LOGIC, share, 7, seed=3) for share in (0.3, 0.75))
    assert len(small.seen) == 8
    assert len(large.seen) == 21
    assert set(small.seen) < set(large.seen)
    np.testing.assert_array_equal(small.unseen, large.unseen)
    assert not set(large.seen) & set(large.unseen)
    # Every term is met, by the smallest share too.
    assert set(LOGIC.pairs[small.seen].ravel()) == set(range(8))
    with pytest.raises(ValueError, match="at least 8"):
        fuzzy_logic.divide(LOGIC, 0.2, 7, seed=3)
    with pytest.raises(ValueError, match="kept apart"):
        fuzzy_logic.divide(LOGIC, 0.8, 7, seed=3)


def test_a_code_that_tells_is_decoded_and_one_that_does_not_is_not() -> None:
    random = np.random.default_rng(0)
    # Labels of unequal frequency, those of a task alike.
    chances = np.where(random.random((2, 100, 1)) < 0.5, 0.9, 0.5)
    labels = (random.random((2, 100, 12)) < chances).astype(int)
    noise = random.normal(size=(2, 100, 12, 3))
    telling = noise + 8 * labels[..., None]
    right = attention.decode(telling[0], labels[0], telling[1], labels[1])
    assert right.accuracy > 0.999
    assert right.chance == 0.5
    wrong = attention.decode(noise[0], labels[0], noise[1], labels[1])
    assert abs(wrong.accuracy - 0.5) < 4 * wrong.standard_error
    # What always says one label is at chance, however frequent the label is.
    constant = attention.decode(0 * noise[0], labels[0], 0 * noise[1], labels[1])
    assert constant.accuracy == pytest.approx(0.5)
    # The standard error over tasks is that of a bootstrap of tasks.
    drawn = [random.integers(0, 100, 100) for _ in range(300)]
    accuracies = [attention.decode(noise[0], labels[0], noise[1][d], labels[1][d]).accuracy for d in drawn]
    assert np.std(accuracies) == pytest.approx(wrong.standard_error, rel=0.2)


def test_pairs_and_queries_keep_their_labels() -> None:
    """Codes that spell out the labels: those of the pair, and the query's conjunction in every pair of it."""
    chances = jnp.full(len(LOGIC.pairs), 1 / len(LOGIC.pairs))
    tasks = fuzzy_logic.sampler(LOGIC, 60)(jax.random.key(4), chances)
    examples, queries = tasks.active[:, :5], tasks.active[:, 5:]
    code = jnp.stack([queries[:, :, None] == examples[:, None], jnp.repeat(queries[:, :, None], 5, 2)], -1)
    pairs, same = attention._of_pairs(code, tasks)
    np.testing.assert_array_equal(pairs[..., 0], same)
    means, named = attention._of_queries(code, tasks)
    np.testing.assert_array_equal(means[..., 1], named)


def test_a_query_sees_examples_and_no_other_query() -> None:
    shape, random = Shape(8, 2, 2), np.random.default_rng(0)
    params = first_params(jax.random.key(0), 3, 2, shape)
    tokens = random.normal(size=(2, 7, 3))
    moved = tokens.copy()
    moved[:, 6] += 1
    before, after = (transformer(params, jnp.asarray(t), 5, "linear", shape) for t in (tokens, moved))
    np.testing.assert_array_equal(before.outputs[:, 0], after.outputs[:, 0])
    assert np.abs(before.outputs[:, 1] - after.outputs[:, 1]).max() > 1e-3
    # The order of the examples does not matter.
    turned = transformer(params, jnp.asarray(tokens[:, [4, 3, 2, 1, 0, 5, 6]]), 5, "linear", shape)
    np.testing.assert_allclose(turned.outputs, before.outputs, rtol=1e-9)
    assert before.code.shape == (2, 2, 5, 2)


def test_training_finds_lines() -> None:
    def sample(key: jax.Array, slope: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jax.random.normal(key, (32,))
        return x, slope * x

    trainer = Trainer(lambda w, t: jnp.mean((w * t[0] - t[1]) ** 2), sample, 0.1, 200)
    told = type("Quiet", (), {"begin": lambda *_: None, "tell": lambda *_: None})()
    slopes, keys = [jnp.float64(0.7), jnp.float64(-0.2)], [*jax.random.split(jax.random.key(0))]
    learned = trainer.train([jnp.float64(0)] * 2, keys, slopes, told, "two lines")
    # The decay of weights is a small share of a step: it pulls by .03 times the rate, which falls to 0.
    np.testing.assert_allclose(learned.params, slopes, atol=0.02)
    assert learned.num_gradients == 200


def test_the_bottleneck_hides_the_examples_behind_a_few_numbers() -> None:
    sizes = in_context.SMOKE
    data = {
        "teacher": in_context.modules(jax.random.key(0), 2, 8),
        "support": in_context.SUPPORTS[in_context.CONNECTED].to_sample(),
        "scale": jnp.float64(2),
    }
    tasks = in_context.sampler(sizes, 3)(jax.random.key(1), data)
    hidden = np.maximum(np.einsum("tni,tm,mih->tnh", tasks["x"], tasks["weights"], data["teacher"]), 0)
    np.testing.assert_allclose(tasks["y"], (hidden[..., :4] + hidden[..., 4:]) / 2, rtol=1e-5, atol=1e-6)
    read = in_context.tokens(tasks, sizes.num_examples)
    assert np.all(read[:, sizes.num_examples :, 2:6] == 0)
    np.testing.assert_array_equal(read[:, : sizes.num_examples, 2:6], tasks["y"][:, : sizes.num_examples])
    random = np.random.default_rng(0)
    code, mixing = random.normal(size=(2, 50, 6)), random.normal(size=(6, 6))
    weights = code @ mixing + 1
    assert in_context.decodability(code[0], weights[0], code[1], weights[1]) == pytest.approx(1)
    assert in_context.decodability(code[0], weights[0], code[0], weights[1]) < 0.5


@pytest.mark.benchmarks
@pytest.mark.parametrize(("name", "case"), [("attention", "hypernetwork"), ("in_context", "bottleneck")])
def test_a_smoke_run_is_shown(
    name: str, case: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert main(["run", name, "--smoke", "--cases", case]) == 0
    shown = capsys.readouterr().out
    assert case in shown
    assert "claims that could be decided hold" in shown
    rows = [json.loads(line) for line in Path(f"results/records/{name}.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "transformer"]
    assert {row["seed"] for row in trained} == {1}
    assert all(np.isfinite([row["inside"], row["unseen"], row["loss"]]).all() for row in trained)
    told = [row for row in rows if row["kind"] == "claim"]
    # One seed has no spread: no comparison is decided, and none has anything to compare with.
    assert told
    assert all(row["held"] is None for row in told if row["aim"] == 0)
