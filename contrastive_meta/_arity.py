"""Whether a function can be called as it will be: an error where it is passed, rather than where it is used."""

import inspect
from collections.abc import Callable
from typing import Any

import jax


def require_function(value: Any, name: str, arguments: str, returns: str) -> None:
    """Raise unless `value` is a function that takes these arguments by position.

    Where a signature cannot be read, or need not be that of the function, as behind some decorators, nothing is said.

    Args:
      value: what the user passed.
      name: of the argument that it was passed for.
      arguments: such as "params, meta_params, task".
      returns: what it must return, in words.

    Raises:
      TypeError: with what was expected, what came and what to write.
    """
    expected = f"`{name}` must be a function ({arguments}) -> {returns}"
    written = f"`{name}=lambda {arguments}: ...`"
    if not callable(value):
        is_array = hasattr(value, "shape") and hasattr(value, "dtype")
        kind = f"an array of shape {value.shape}" if is_array else f"a {type(value).__name__}"
        raise TypeError(f"{expected}; got {kind}. Write {written}, with what is fixed after the colon.")
    signature = _signature(value)
    if signature is None:
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError:
        raise TypeError(
            f"{expected}; got one with the arguments {signature}, which cannot be called with these. Write {written}: "
            "it must take them in this order, also those that it does not use."
        ) from None


def number_of_arguments(function: Callable[..., Any]) -> int:
    """How many arguments without a default a function takes by position; 0 where that cannot be read.

    Args:
      function: what the user passed.
    """
    try:
        arguments = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(x.kind in positional and x.default is inspect.Parameter.empty for x in arguments)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    # `jax.jit` keeps the arguments; of other wrappers nothing is known but their own.
    while isinstance(function, jax.stages.Wrapped) and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if "__signature__" in getattr(function, "__dict__", {}):
        return None
    try:
        return inspect.signature(function, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
