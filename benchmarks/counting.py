"""What a program is made of: call sites of the user's losses, equations, operations, temporary bytes.

Losses are marked by `jax.ad_checkpoint.checkpoint_name`, an identity that JAX keeps in a jaxpr. Its derivative leaves
tangents unnamed. Forward and backward pass of one evaluation are therefore one site, and so is a mapped evaluation.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

import contrastive_meta as cm

INNER, OUTER = "inner loss", "outer loss"


class Program(NamedTuple):
    """A compiled program and its size.

    Attributes:
      inner_sites: call sites of the marked inner loss.
      outer_sites: call sites of the marked outer loss.
      equations: of the jaxpr, those of all jaxprs within it included, without marks.
      operations: of the compiled program.
      temporary_bytes: what the compiled program allocates besides arguments and results.
      seconds: to trace and compile.
      run: the compiled program, a function of the same arguments.
    """

    inner_sites: int
    outer_sites: int
    equations: int
    operations: int
    temporary_bytes: int
    seconds: float
    run: Callable[..., Any]


def mark(loss: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The same loss, each call of which leaves one mark in a jaxpr.

    Args:
      loss: a function whose first argument is a pytree of arrays, `params`. It must depend on their largest leaf.
      name: of the mark, `INNER` or `OUTER`.
    """

    def marked(params: Any, *rest: Any) -> Any:
        leaves, structure = jax.tree.flatten(params)
        largest = max(range(len(leaves)), key=lambda i: jnp.size(leaves[i]))
        leaves[largest] = checkpoint_name(leaves[largest], name)
        return loss(jax.tree.unflatten(structure, leaves), *rest)

    return marked


def mark_problem(problem: cm.BilevelProblem) -> cm.BilevelProblem:
    """The same problem with both losses marked."""
    return cm.BilevelProblem(
        mark(problem.inner_loss, INNER),
        mark(problem.outer_loss, OUTER),
        problem.init_params,
        has_aux=problem.has_aux,
        sample=problem.sample,
        init_model_state=problem.init_model_state,
    )


def count_sites(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """Call sites of the inner and of the outer loss in the jaxpr of `function(*args)`.

    A jaxpr within the jaxpr counts each time that an equation refers to it: nested jits are expanded. The body of a
    loop counts once. Traces that take only shapes leave no equation and do not count.

    Args:
      function: calls losses that were marked by `mark` or `mark_problem`.
      *args: pytrees of arrays.
    """
    return _sites(jax.make_jaxpr(function)(*args).jaxpr)


def count_equations(function: Callable[..., Any], *args: Any) -> int:
    """Equations in the jaxpr of `function(*args)`, nested jaxprs expanded, marks left out."""
    return _equations(jax.make_jaxpr(function)(*args).jaxpr)


def count_operations(function: Callable[..., Any], *args: Any) -> int:
    """Operations of the program that `function(*args)` compiles to."""
    return measure_program(function, *args).operations


def measure_program(function: Callable[..., Any], *args: Any) -> Program:
    """Trace and compile `function` for `args`, and count what came out."""
    begin = time.perf_counter()
    traced = jax.jit(function).trace(*args)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - begin
    memory: Any = compiled.memory_analysis()
    return Program(
        *_sites(traced.jaxpr.jaxpr),
        _equations(traced.jaxpr.jaxpr),
        str(compiled.as_text()).count(" = "),
        int(memory.temp_size_in_bytes),
        seconds,
        compiled,
    )


def _sites(jaxpr: Any) -> tuple[int, int]:
    marks = [eqn.params["name"] for eqn in _all_equations(jaxpr) if eqn.primitive.name == "name"]
    return marks.count(INNER), marks.count(OUTER)


def _equations(jaxpr: Any) -> int:
    return sum(eqn.primitive.name != "name" for eqn in _all_equations(jaxpr))


def _all_equations(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for called in _jaxprs(list(eqn.params.values())):
            yield from _all_equations(called)


def _jaxprs(value: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters, which may be tuples of them."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)
