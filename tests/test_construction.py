"""Mistakes that are told where they are made: functions of the wrong arguments, values for functions, optimisers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import contrastive_meta as cm

SGD = cm.OptaxDescent(optax.sgd(0.5), num_steps=3)


def inner(w: Any, s: Any, t: Any) -> Any:
    return jnp.sum((w - s) ** 2)


def outer(w: Any, s: Any, t: Any) -> Any:
    return jnp.sum(w**2)


def init(s: Any, t: Any) -> Any:
    return jnp.zeros(2)


def sample(key: Any, t: Any, step: Any) -> Any:
    return t


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner_loss": lambda w, s: 0.0}, r"`inner_loss` must be a function \(params, meta_params, task\).*\(w, s\)"),
        ({"outer_loss": lambda w, s, t, u: 0.0}, r"`outer_loss` must be .* -> scalar; got one with .*\(w, s, t, u\)"),
        ({"outer_loss": jax.jit(lambda w, s: 0.0)}, r"`outer_loss` must be .*\(w, s\)"),
        ({"inner_loss": functools.partial(inner, jnp.ones(2))}, "`inner_loss` must be"),
        ({"inner_loss": jnp.ones(2)}, r"`inner_loss` must be .*; got an array of shape \(2,\)"),
        ({"init_params": jnp.zeros(2)}, r"got an array of shape \(2,\).*Write `init_params=lambda meta_params, task"),
        ({"init_params": {"w": jnp.zeros(2)}}, r"`init_params` must be .* -> params; got a dict"),
        ({"init_params": lambda t: jnp.zeros(2)}, r"`init_params` must be a function \(meta_params, task\).*\(t\)"),
        ({"sample": lambda key, t: t}, r"`sample` must be a function \(key, task, step\) -> task"),
        ({"init_model_state": lambda s, t: 0}, r"task, model_state\) -> \(scalar, new_model_state"),
        ({"has_aux": True, "inner_loss": lambda w: 0.0}, r"`inner_loss` must be .* -> \(scalar, aux\)"),
    ],
)  # fmt: skip
def test_a_problem_of_the_wrong_functions(change: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        cm.BilevelProblem(**{"inner_loss": inner, "outer_loss": outer, "init_params": init} | change)


class Model:
    """A loss as an object, as a method, and as what a class builds."""

    def __call__(self, w: Any, s: Any, t: Any) -> Any:
        return inner(w, s, t)

    def method(self, w: Any, s: Any, t: Any) -> Any:
        return inner(w, s, t)

    @staticmethod
    def static(w: Any, s: Any, t: Any, *, scale: float = 1.0) -> Any:
        return scale * inner(w, s, t)

    @classmethod
    def of_class(cls, w: Any, s: Any, t: Any = None) -> Any:
        return inner(w, s, t)


@functools.wraps(lambda w: None)
def wrapped(*args: Any) -> Any:
    """Says that it takes one argument, and takes three."""
    return inner(*args)


def lying(*args: Any) -> Any:
    return inner(*args)


lying.__signature__ = "not even one"  # type: ignore[attr-defined]


def with_more(extra: Any, w: Any, s: Any, t: Any, *, scale: float) -> Any:
    return scale * inner(w, s, t) + extra


@pytest.mark.parametrize(
    "loss",
    [
        inner,
        Model(),
        Model().method,
        Model.static,
        Model.of_class,
        wrapped,
        lying,
        lambda *args: inner(*args) + 1,
        lambda w, *rest: inner(w, *rest) + 1,
        lambda w, s, t, unused=None, **options: inner(w, s, t),
        functools.partial(with_more, 0.0, scale=1.0),
        functools.partial(functools.partial(with_more, scale=1.0), 0.0),
        functools.partial(lambda w, s, t, scale: scale * inner(w, s, t), scale=1.0),
        jax.jit(inner),
        jax.jit(Model().method),
        jax.jit(functools.partial(with_more, 0.0, scale=1.0)),
        jax.jit(wrapped),
        jax.checkpoint(inner),
        jax.named_call(inner, name="loss"),
        jax.custom_jvp(inner),
        jax.custom_vjp(inner),
        jax.vmap(inner, in_axes=None, axis_size=1),
        max,
        np.ndarray.sum,
        np.add,
        dict,
    ],
)
def test_nothing_is_refused_that_could_be_called(loss: Any) -> None:
    cm.BilevelProblem(loss, outer, init)
    cm.argmin(loss, SGD, init=jnp.zeros(2))


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1), optax.MultiSteps(optax.sgd(0.1), 2), cm.LBFGS], ids=["optax", "MultiSteps", "class"]
)
@pytest.mark.parametrize(
    "make",
    [
        cm.Contrastive,
        cm.ImplicitDifferentiation,
        cm.BackpropThroughLearning,
        cm.FirstOrder,
        cm.Reptile,
        cm.FiniteDifference,
        cm.EvolutionStrategies,
        lambda optimizer: cm.Contrastive(SGD, optimizer),
        lambda optimizer: cm.ImplicitDifferentiation(SGD, optimizer),
    ],
)
def test_an_optimiser_or_a_class_for_a_solver(make: Any, optimizer: Any) -> None:
    kind = "the class LBFGS" if optimizer is cm.LBFGS else f"a {type(optimizer).__name__}"
    with pytest.raises(TypeError, match=rf"must be an instance of .*; got {kind}\..*OptaxDescent\(optimizer"):
        make(optimizer)


def test_estimators_remain_trees_of_anything() -> None:
    """JAX puts other things in the place of leaves, and of whole parts, when it handles trees."""
    estimator = cm.Contrastive(cm.LBFGS(), target_error=1e-3)
    assert jax.tree.structure(jax.tree.map(lambda _: object(), estimator)) == jax.tree.structure(estimator)
    children, structure = jax.tree.flatten(estimator, is_leaf=lambda x: isinstance(x, cm.InnerSolver))
    jax.tree.unflatten(structure, [object() for _ in children])


def test_argmin_of_the_wrong_functions() -> None:
    with pytest.raises(TypeError, match=r"`inner_loss` must be a function \(params, meta_params, task\)"):
        cm.argmin(lambda w, s: 0.0, SGD, init=jnp.zeros(2))
    with pytest.raises(TypeError, match=r"`init` must be a function \(meta_params, task\) -> params"):
        cm.argmin(inner, SGD, init=lambda s: jnp.zeros(2))
