"""What a loss captured from the functions around it, made an argument: JAX forgets it on the way back otherwise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import Loss, MetaParams, Params, Task

Values = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class OpenLoss:
    """A loss that captured no traced value.

    Attributes:
      loss: as the user wrote it.
    """

    loss: Loss

    def __call__(self, params: Params, meta_params: MetaParams, task: Task, values: Values) -> Any:
        """The loss."""
        return self.loss(params, meta_params, task)


@dataclasses.dataclass(frozen=True, eq=False)
class ConvertedLoss:
    """A traced loss, its captured values held open.

    Attributes:
      jaxpr: the traced program.
      dtype: of the result: no finer than any captured value, whose derivative rounds to its own dtype.
    """

    jaxpr: Any
    dtype: Any

    def __call__(self, params: Params, meta_params: MetaParams, task: Task, values: Values) -> jax.Array:
        """The loss, with these values in place of those captured."""
        arguments = jax.tree.leaves((params, meta_params, task))
        inputs = list(zip(arguments, self.jaxpr.invars, strict=True))
        if any(jnp.iscomplexobj(x) and not jnp.iscomplexobj(v.aval) for x, v in inputs):
            raise TypeError(
                "Complex schemes cannot follow an inner loss that captured traced values: "
                "pass them in `meta_params` or `task`, or use a real scheme such as `relative(central_difference)`."
            )
        typed = [_in_dtype(x, v.aval.dtype) for x, v in inputs]
        value: jax.Array = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, list(values)))(*typed)[0]
        return value.astype(self.dtype)


def hold_open(loss: Loss, params: Params, meta_params: MetaParams, task: Task) -> tuple[Any, Values]:
    """The loss as a function of what it captured, too, and what it captured.

    Unlike `jax.closure_convert` this takes integers and keys along: they are traced as well, and just as lost.

    Args:
      loss: `(params, meta_params, task) -> scalar`, which may have captured anything.
      params: where it is evaluated.
      meta_params: likewise.
      task: likewise.

    Returns:
      `(params, meta_params, task, values) -> scalar`, and `values`.
    """
    with jax.default_matmul_precision("highest"):
        traced = jax.make_jaxpr(loss)(params, meta_params, task)
        if not any(isinstance(value, jax.core.Tracer) for value in traced.consts):
            return OpenLoss(loss), ()
        # Phases measure no coarser than the loss, so it is traced as they will call it.
        dtype = tree.float_dtype(traced.out_avals)
        fine = jax.tree.map(lambda x: _at_least(x, dtype), (meta_params, task))
        traced = jax.make_jaxpr(loss)(params, *fine)
    dtypes = [x.dtype for x in [*traced.out_avals, *traced.consts] if jnp.issubdtype(x.dtype, jnp.floating)]
    return ConvertedLoss(traced.jaxpr, max(dtypes, key=lambda kind: float(jnp.finfo(kind).eps))), tuple(traced.consts)


def _at_least(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(tree.promoted(x.dtype, dtype)) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _in_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype) if jnp.issubdtype(dtype, jnp.inexact) else x
