"""The experiment `bandit`: the wheel pays what it says, nothing remembered is lost, and it runs in small."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

from benchmarks.__main__ import main
from benchmarks.experiments import bandit
from benchmarks.experiments.bandit_agents import (
    LINEAR_PRIOR,
    UNIT,
    Agent,
    Online,
    chance,
    linear,
    masked_error,
    play,
    posterior,
    thompson,
)
from benchmarks.experiments.bandit_methods import ANCHOR, LINEAR, MAML, SCRATCH, last_hidden, methods, relu
from benchmarks.experiments.bandit_wheel import (
    Pulls,
    contexts,
    empty_replay,
    means,
    offline_tasks,
    regret,
    rewards,
    uniform_regret,
)
from benchmarks.harness import precision

KEY = jax.random.key(0)


def test_means_by_hand() -> None:
    x = jnp.array([[0.1, 0.1], [0.6, 0.6], [0.6, -0.6], [-0.6, 0.6], [-0.6, -0.6]])
    expected = np.tile([1.0, 1.0, 1.0, 1.0, 1.2], (5, 1))
    expected[[1, 2, 3, 4], [0, 1, 2, 3]] = 50.0
    np.testing.assert_allclose(means(x, jnp.array(0.8)), expected)
    arms = jnp.array([4, 0, 4, 4, 3])
    np.testing.assert_allclose(regret(x, arms, jnp.array(0.8)), [0, 0, 48.8, 48.8, 0])


@pytest.mark.parametrize("delta", bandit.DELTAS)
def test_regret_of_chance_in_closed_form(delta: float) -> None:
    """Simulated: 200,000 trials, four standard errors."""
    of_context, of_arm = jax.random.split(jax.random.key(7))
    x, arm = contexts(of_context, 200_000), jax.random.randint(of_arm, (200_000,), 0, 5)
    lost = np.asarray(regret(x, arm, jnp.array(delta)))
    assert abs(lost.mean() - uniform_regret(delta)) < 4 * lost.std() / len(lost) ** 0.5


def test_contexts_are_uniform_and_equal_in_both_precisions() -> None:
    with precision(x64=True):
        double = np.asarray(contexts(KEY, 50_000))
    with precision(x64=False):
        np.testing.assert_allclose(contexts(KEY, 50_000), double, rtol=1e-5, atol=1e-6)
    radius = np.linalg.norm(double, axis=1)
    # A quarter of a disc's area lies within half its radius; 4 standard errors of 50,000.
    assert abs(np.mean(radius < 0.5) - 0.25) < 0.008 and radius.max() <= 1
    assert abs(np.mean(double[:, 0] > 0) - 0.5) < 0.009


def test_rewards_spread_around_their_means() -> None:
    x = jnp.tile(jnp.array([[0.6, 0.6]]), (20_000, 1))
    for arm, mean, deviation in ((0, 50.0, 0.01), (1, 1.0, 0.05), (4, 1.2, 0.05)):
        drawn = rewards(KEY, x, jnp.full(20_000, arm), jnp.array(0.8))
        np.testing.assert_allclose(jnp.mean(drawn), mean, atol=4 * deviation / 20_000**0.5)
        np.testing.assert_allclose(jnp.std(drawn), deviation, rtol=0.03)


def test_all_of_a_wrapped_buffer_is_sampled() -> None:
    """Earlier code drew from what lies before the next slot, even after the buffer had wrapped."""
    replay = empty_replay(8)
    for number in range(11):
        replay = replay.add(jnp.full(2, number), jnp.int32(number % 5), jnp.asarray(float(number)))
        x, pulls = replay.sample(jax.random.fold_in(KEY, number), 400)
        kept = set(range(max(number - 7, 0), number + 1))
        assert set(np.asarray(pulls.reward).astype(int)) == kept
        assert int(replay.is_filled.sum()) == len(kept)
        np.testing.assert_array_equal(x[:, 0], pulls.reward)
        np.testing.assert_array_equal(pulls.arm, pulls.reward.astype(int) % 5)


def test_only_the_pulled_arm_is_judged() -> None:
    outputs = jnp.arange(10.0).reshape(2, 5)
    pulls = Pulls(jnp.array([1, 4]), jnp.array([0.0, 10.0]))
    assert masked_error(outputs, pulls) == pytest.approx((1.0**2 + (9 - 10 / UNIT) ** 2) / 2)


def test_posterior_of_linear_rewards() -> None:
    """Draws choose arms as their posterior means say where it is narrow; its sums are those of one pull at a time."""
    of_x, of_arm, of_noise = jax.random.split(KEY, 3)
    x, arm = jax.random.normal(of_x, (500, 3)), jax.random.randint(of_arm, (500,), 0, 5)
    truth = jax.random.normal(jax.random.key(3), (5, 3))
    reward = jnp.sum(truth[arm] * x, axis=1) + 1e-3 * jax.random.normal(of_noise, (500,))
    belief = posterior(LINEAR_PRIOR, x, Pulls(arm, reward), jnp.ones(500))
    mean = jnp.einsum("aij,aj->ai", belief.inverse, belief.moment)
    expected = jnp.stack([
        jnp.linalg.solve(
            x[arm == a].T @ x[arm == a] + LINEAR_PRIOR.strength * jnp.eye(3), x[arm == a].T @ reward[arm == a]
        )
        for a in range(5)
    ])  # fmt: skip
    np.testing.assert_allclose(mean, expected, rtol=1e-10)
    seen = jnp.array([[1.0, 2.0, -1.0], [-2.0, 0.0, 1.0]])
    for features in seen:
        chosen = jax.vmap(lambda k, f=features: thompson(LINEAR_PRIOR, belief, k, f))(jax.random.split(KEY, 100))
        assert np.mean(np.asarray(chosen) == np.argmax(truth @ features)) > 0.9
    agent = linear()
    state = agent.start((), KEY)
    for number in range(6):
        state = agent.observe(state, x[number, :2], arm[number], reward[number])
    ones = jnp.concatenate([x[:6, :2], jnp.ones((6, 1))], axis=1)
    at_once = posterior(LINEAR_PRIOR, ones, Pulls(arm[:6], reward[:6]), jnp.ones(6))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), state, at_once)


def test_play_counts_every_pull() -> None:
    """An agent that knows the wheel loses only on the first pulls; chance loses what the closed form says."""
    online = Online(trials=400, every=100, slots=64)
    knowing = Agent(
        lambda meta, key: (), lambda state, key, x: jnp.argmax(means(x, jnp.array(0.5))).astype(jnp.int32),
        lambda state, *pull: state, lambda state, key, replay: state,
    )  # fmt: skip
    of_first = contexts(jax.random.split(KEY, 4)[0], 410)[:10]
    expected = jnp.sum(regret(of_first, jnp.arange(10) % 5, jnp.array(0.5))) / 410
    np.testing.assert_allclose(play(knowing, online, (), KEY, jnp.array(0.5)), expected, rtol=1e-6)
    lost = jax.vmap(lambda key: play(chance(), online, (), key, jnp.array(0.5)))(jax.random.split(KEY, 100))
    assert abs(lost.mean() / uniform_regret(0.5) - 1) < 4 * lost.std() / 10 / uniform_regret(0.5)


def test_methods_start_from_the_same_network() -> None:
    made = methods(width=4)
    anchor = made[ANCHOR].build(KEY)
    for name in (MAML, SCRATCH):
        jax.tree.map(np.testing.assert_array_equal, made[name].build(KEY), anchor)
    network = anchor["anchor"]
    x = contexts(KEY, 3)
    hidden = last_hidden(network, x)
    assert hidden.shape == (3, 4)
    np.testing.assert_allclose(hidden @ network["readout"]["kernel"], relu(network, x), rtol=1e-10)
    tasks = offline_tasks(KEY, 2, 6, 3)
    assert tasks.x_train.shape == (2, 6, 2) and tasks.y_val.reward.shape == (2, 3)


def _rows(case: str, values: list[float]) -> list[dict[str, Any]]:
    wheels = {str(delta): [0.0, 2.0] for delta in bandit.DELTAS}
    rows = []
    for seed, value in enumerate(values):
        regrets = {delta: [value * v for v in of] for delta, of in wheels.items()} | {"0.99": [1e9]}
        columns = dict.fromkeys(("regret", "regret_at_equal_time", "regret_at_equal_gradients"), regrets)
        cost = {"seconds": 1.0, "num_steps": 2, "num_gradients": 10, "passed": 1.0, "stopped": ""}
        rows.append({"kind": "method", "case": case, "seed": seed, **columns, **cost})
    return rows


def test_claims_are_of_the_wheels_of_r10() -> None:
    rows = _rows(ANCHOR, [5.0, 6.0]) + _rows(MAML, [5.0, 5.0]) + _rows(SCRATCH, [40.0, 50.0])
    told = {claim["claim"]: claim for claim in bandit.claims(rows)}
    scratch = told["R10: neural-greedy loses more than anchor (%, wheels 0.5 to 0.95)"]
    assert scratch["measured"] == pytest.approx(39.5) and scratch["held"] is True
    # By 1.25 and .25: .75 +- .71 holds.
    maml = told["R10: 1.25 times MAML's loss is more than that of anchor (%)"]
    assert maml["measured"] == pytest.approx(0.75) and maml["held"] is True
    assert told["MAML loses more than anchor at equal time (%)"]["held"] is False
    assert "NO" in bandit.show(rows)


@pytest.mark.benchmarks
@pytest.mark.slow
def test_bandit_in_small(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "bandit", "--smoke", "--cases", f"{MAML},{LINEAR}"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results/records/bandit.jsonl").read_text().splitlines()]
    played = [row for row in rows if row["kind"] == "method"]
    assert [row["case"] for row in played] == [MAML, LINEAR]
    assert (
        played[0]["num_steps"] == 2
        and not played[0]["stopped"]
        and sorted(played[1]["regret"]) == ["0.5", "0.7", "0.9", "0.95", "0.99"]
    )
    assert "claims that could be decided hold" in capsys.readouterr().out
