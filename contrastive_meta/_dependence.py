"""Which leaves of an argument a function depends on at all, read off its traced program."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def leaf_names(values: Any, bare: str = "meta_params") -> list[str]:
    """A readable name for every leaf, such as `['layer']['weight']`; `bare` for an array that is no tree."""
    paths = jax.tree_util.tree_flatten_with_path(values)[0]
    return [jax.tree_util.keystr(path) or bare for path, _ in paths]


def used_leaves(function: Callable[[Any], Any], argument: Any) -> list[bool]:
    """For every leaf of `argument`, whether any output of `function` may depend on it.

    Conservative: control flow counts as using all of its operands, so False is certain and True may be idle.

    Args:
      function: a traceable function of one pytree; it may close over traced values.
      argument: where to trace it.
    """
    jaxpr = jax.make_jaxpr(function)(argument).jaxpr
    return _used_inputs(jaxpr, [True] * len(jaxpr.outvars))


def _used_inputs(jaxpr: Any, used_outputs: list[bool]) -> list[bool]:
    needed = {var for var, used in zip(jaxpr.outvars, used_outputs, strict=True) if used and _is_variable(var)}
    for equation in reversed(jaxpr.eqns):
        outputs = [var in needed for var in equation.outvars]
        if not any(outputs):
            continue
        # A plain call passes operands and results straight through, so the walk can go inside it.
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        body = getattr(inner, "jaxpr", inner)
        is_call = equation.primitive.name in {"pjit", "jit", "closed_call", "core_call", "custom_jvp_call", "remat2"}
        used = _used_inputs(body, outputs) if is_call and body is not None else [True] * len(equation.invars)
        needed.update(v for v, use in zip(equation.invars, used, strict=True) if use and _is_variable(v))
    return [var in needed for var in jaxpr.invars]


def _is_variable(var: Any) -> bool:
    return not isinstance(var, core.Literal)
