"""What proofs by tracing share: a function's operations, what each calls, and where it stands in the user's code."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core, source_info_util

# Where primitives that only call a function keep it, its operands being theirs one for one.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "call": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
}

_JAX_FILES = os.path.dirname(jax.__file__) + os.sep


class CallSite(NamedTuple):
    """Where the user's code called what is being walked; `final` if nothing inside says it better."""

    place: str = ""
    final: bool = False


def trace(function: Callable[..., Any], *args: Any) -> core.ClosedJaxpr:
    """The operations of `function(*args)`.

    Args:
      function: `(*args) -> pytree of arrays`. It may close over traced values.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`.
    """
    # A new function each time: JAX remembers traces by function, and closures may have changed since.
    closed: core.ClosedJaxpr = jax.make_jaxpr(functools.partial(function))(*args)
    return closed


def open_jaxpr(traced: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
    """The operations, without the arrays that they captured."""
    return traced.jaxpr if isinstance(traced, core.ClosedJaxpr) else traced


def place_of(eqn: core.JaxprEqn, site: CallSite) -> str:
    """The innermost line outside JAX, e.g. " at losses.py:12:4 (loss)"; nothing where there is none."""
    frame = "" if site.final else source_info_util.summarize(eqn.source_info)
    return f" at {frame}" if frame and not frame.startswith(__file__) else site.place


def site_of_call(eqn: core.JaxprEqn, called: core.Jaxpr | core.ClosedJaxpr, site: CallSite) -> CallSite:
    """The site of what a call runs.

    JAX traces its own functions once and keeps the source lines of whoever called first, or none: inside them, the line
    that counts is that of this call. Lines in functions of the user's are right wherever they are called from.
    """
    debug = getattr(open_jaxpr(called), "debug_info", None)
    if site.final or not (getattr(debug, "func_filename", None) or "").startswith(_JAX_FILES):
        return CallSite(place_of(eqn, site), site.final)
    name = getattr(debug, "func_name", "")
    return CallSite((f" (inside `{name}`)" if name.isidentifier() else "") + place_of(eqn, site), final=True)
