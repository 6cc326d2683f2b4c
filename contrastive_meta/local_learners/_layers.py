"""The layers of a network with parameters like those of `architectures.mlp`, checked."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Layer = tuple[jax.Array, jax.Array]


def layers_of(params: Any, x: jax.Array, learner: str) -> list[Layer]:
    """Kernel and bias of each layer, the readout last.

    Raises:
      TypeError: `x` is not floating.
      ValueError: other entries than "hidden_0", "hidden_1", .. and "readout", or than "kernel" and "bias" in each of
        them; shapes that do not follow on one another or on `x`.
    """
    require_floating(x, learner)
    entries = dict(params) if isinstance(params, Mapping) else {}
    names = [*(f"hidden_{number}" for number in range(len(entries) - 1)), "readout"]
    if set(entries) != set(names) or any(
        not isinstance(entries[name], Mapping) or set(entries[name]) != {"kernel", "bias"} for name in names
    ):
        raise ValueError(
            f"{learner}: expected params like those of `architectures.mlp_params`, layers hidden_0, hidden_1, .. and "
            f'readout, each with "kernel" and "bias" and nothing else; got {_describe(params)}.'
        )
    layers = [(jnp.asarray(entries[name]["kernel"]), jnp.asarray(entries[name]["bias"])) for name in names]
    size = x.shape[-1] if jnp.ndim(x) else None
    for name, (kernel, bias) in zip(names, layers, strict=True):
        if kernel.ndim != 2 or kernel.shape[0] != size or bias.shape != kernel.shape[1:]:
            raise ValueError(
                f"{learner}: {name} follows on {size} units, so its kernel must have shape ({size}, units) and its "
                f"bias (units,); got {kernel.shape} and {bias.shape}."
            )
        size = kernel.shape[1]
    return layers


def require_floating(x: Any, learner: str) -> None:
    """What has a derivative.

    Raises:
      TypeError: `x` has none.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
        raise TypeError(f"{learner}: expected inputs of a floating dtype; got {jnp.result_type(x)}. Convert them.")


def _describe(params: Any) -> str:
    shapes = jax.tree_util.tree_leaves_with_path(params)
    return ", ".join(f"{jax.tree_util.keystr(path)}: {jnp.shape(leaf)}" for path, leaf in shapes) or repr(params)
