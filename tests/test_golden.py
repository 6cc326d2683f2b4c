"""The golden record's counter on functions whose sites can be counted by hand, and its comparison of records."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("sklearn", reason='the benchmarks need pip install ".[bench]"')

import contrastive_meta as cm
from benchmarks import golden
from benchmarks.counting import (
    INNER,
    OUTER,
    count_equations,
    count_operations,
    count_sites,
    mark,
    mark_problem,
    measure_program,
)

X = np.linspace(0.5, 1.5, 3)


def cubic(x):
    return jnp.sum(x**3)


def through_loop(loss):
    """A gradient in the body of a while_loop, and none before."""

    def function(x):
        return jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (c[0] - 0.1 * jax.grad(loss)(c[0]), c[1] + 1), (x, 0))

    return function


def through_scan(loss):
    def final(x):
        return jnp.sum(jax.lax.scan(lambda c, _: (c - 0.1 * jax.grad(loss)(c), None), x, None, length=3)[0])

    return jax.grad(final)


def hessian_products(loss):
    def function(x):
        _, product = jax.linearize(jax.grad(loss), x)
        return product(x) + product(2 * x)

    return function


ONE_SITE = {
    "value": lambda loss: loss,
    "gradient": jax.grad,
    "value and gradient": jax.value_and_grad,
    "product, forward over reverse": lambda loss: lambda x: jax.jvp(jax.grad(loss), (x,), (x,)),
    "product, reverse over reverse": lambda loss: jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) * x)),
    "products from one linearization": hessian_products,
    "mapped gradient": lambda loss: lambda x: jax.vmap(jax.grad(loss))(jnp.stack([x, 2 * x])),
    "complex gradient": lambda loss: lambda x: jax.grad(loss, holomorphic=True)(x + 0.1j),
    "dense hessian": jax.hessian,
    "body of a loop": through_loop,
    "mapped loop": lambda loss: lambda x: jax.vmap(through_loop(loss))(jnp.stack([x, 2 * x])),
    "reverse mode through learning": through_scan,
    "jit of gradient": lambda loss: jax.jit(jax.grad(loss)),
}
TWO_SITES = {
    "two calls": lambda loss: lambda x: (loss(x), loss(2 * x)),
    "one jit, called twice": lambda loss: lambda x: (jax.jit(loss)(x), jax.jit(loss)(2 * x)),
    "two branches": lambda loss: lambda x: jax.lax.cond(x[0] > 0, loss, lambda x: 2 * loss(x), x),
    "gradient, then a loop of gradients": lambda loss: lambda x: through_loop(loss)(jax.grad(loss)(x)),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("use", "expected"),
    [pytest.param(use, 1, id=name) for name, use in ONE_SITE.items()]
    + [pytest.param(use, 2, id=name) for name, use in TWO_SITES.items()],
)
def test_sites_are_counted_as_by_hand(use, expected, jitted):
    """A loss that is a jit of its own gives a forward and a transposed call: one site still."""
    loss = mark(cubic, INNER)
    assert count_sites(use(jax.jit(loss) if jitted else loss), X) == (expected, 0)


def test_shapes_alone_are_no_site():
    loss = mark(cubic, INNER)
    assert count_sites(lambda x: jnp.zeros(jax.eval_shape(loss, x).shape) + loss(x), X) == (1, 0)


def test_inner_and_outer_sites_of_a_problem_are_told_apart():
    problem = mark_problem(
        cm.BilevelProblem(
            inner_loss=lambda w, theta, task: jnp.sum((w["w"] - theta) ** 4) + w["b"] ** 2,
            outer_loss=lambda w, theta, task: jnp.sum(w["w"] ** 2),
            init_params=lambda theta, task: {"b": jnp.zeros(()), "w": jnp.zeros(3)},
        )
    )
    params = problem.init(X, None)

    def both(params, theta):
        return jax.grad(problem.inner)(params, theta, None), jax.value_and_grad(problem.outer)(params, theta, None)

    assert count_sites(both, params, X) == (1, 1)
    assert count_sites(lambda w, theta: problem.nudged(w, theta, None, 0.1), params, X) == (1, 1)


def test_marks_change_nothing():
    estimator = cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(0.4), num_steps=3))
    plain = cm.BilevelProblem(
        inner_loss=lambda w, theta, task: jnp.sum((w - task) ** 2 + jnp.exp(theta) * w**2) / 2,
        outer_loss=lambda w, theta, task: jnp.sum((w - 1.0) ** 2),
        init_params=lambda theta, task: jnp.zeros_like(task),
    )
    marked = mark_problem(plain)
    programs = [
        measure_program(lambda theta, task, p=problem: estimator.estimate(p, theta, task).grad, jnp.zeros(3), X)
        for problem in (plain, marked)
    ]
    assert programs[0].equations == programs[1].equations
    assert programs[0].operations == programs[1].operations
    assert programs[0].inner_sites == 0 < programs[1].inner_sites
    np.testing.assert_array_equal(*(program.run(jnp.zeros(3), X) for program in programs))


def test_equations_and_operations():
    loss = mark(lambda x: jnp.sin(x) * 2.0, OUTER)
    assert count_equations(loss, jnp.ones(3)) == 2
    # The jit is an equation, and so are the two within it.
    assert count_equations(jax.jit(loss), jnp.ones(3)) == 3
    assert 0 < count_operations(loss, jnp.ones(3)) < 20


def record(**changes):
    known = {key: 10 for key in golden.COUNTS}
    return known | {
        "seconds": 1.0, "norm": 1.0, "hash": "a", "error": 1e-9, "error_estimate": 2e-9, "status": "CONVERGED",
        "floor": 1e-12,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "flagged"),
    [
        ({}, []),
        ({"hash": "b", "error": 1.9e-9, "seconds": 9.0}, []),
        ({"error": 2.1e-9}, ["error more than doubled"]),
        ({"error": None}, ["error more than doubled", "estimate off by a factor inf"]),
        ({"error": 1e-11, "error_estimate": 1e-10}, ["estimate off by a factor 10.0"]),
        ({"error": 1e-15, "error_estimate": 1e-17}, []),
        ({"operations": 11, "inner_sites": 9}, ["more operations"]),
        ({"status": "APPROXIMATE"}, ["another status"]),
    ],
)
def test_what_counts_as_worse(changes, flagged):
    assert golden.worse(record(), record(**changes)) == flagged
    text, bad = golden.comparison({"case": record()}, {"case": record(**changes), "another": record()})
    assert bad == bool(flagged) and all(flag in text for flag in flagged) and "another: new" in text


def test_an_error_below_the_floor_may_double():
    assert golden.worse(record(error=1e-14, floor=1e-12), record(error=9e-13, floor=1e-12)) == []


def test_a_run_that_raises_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    configurations = [c for c in golden.CONFIGURATIONS if "backprop" in c.name or "implicit CG, float64" in c.name]

    def measured(configuration):
        if "backprop" in configuration.name:
            raise ValueError("no such thing")
        return record()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(golden, "measure", measured)
    monkeypatch.setattr(golden, "CONFIGURATIONS", configurations)
    assert golden.main([]) == 0
    records = json.loads((tmp_path / "results" / golden.NAME).read_text())["configurations"]
    assert sorted("exception" in r for r in records.values()) == [False, True]
    monkeypatch.setattr(golden, "measure", lambda configuration: record())
    assert golden.main(["--against", "results/golden.json", "--only", "backprop"]) == 0
    assert "ValueError: no such thing" in capsys.readouterr().out
    assert golden.load(tmp_path / "results" / golden.NAME).keys() == records.keys()


def test_the_committed_record_has_every_configuration():
    records = golden.load(golden.COMMITTED_RECORDS / golden.NAME)
    assert list(records) == [configuration.name for configuration in golden.CONFIGURATIONS]
    assert not any("exception" in r for r in records.values())
