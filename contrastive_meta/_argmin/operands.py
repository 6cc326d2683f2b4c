"""What a layer may be differentiated in: which of it is, and that it is only once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal

from contrastive_meta._problem import MetaParams, Params, Task
from contrastive_meta._pytree import static, strategy


class Operands(NamedTuple):
    """All that a layer may be differentiated in.

    Attributes:
      start: where learning begins.
      meta_params: of the problem.
      task: of the problem.
      values: what the inner loss captured.
    """

    start: Params
    meta_params: MetaParams
    task: Task
    values: tuple[Any, ...]


@strategy
class Wanted:
    """Which leaves of the operands are differentiated.

    Attributes:
      mask: a flag for each leaf.
    """

    mask: tuple[bool, ...] = static()

    def split(self, operands: Operands) -> tuple[list[Any], list[Any]]:
        """The leaves that are, and those that are not."""
        leaves = jax.tree.leaves(operands)
        return (
            [leaf for leaf, wanted in zip(leaves, self.mask, strict=True) if wanted],
            [leaf for leaf, wanted in zip(leaves, self.mask, strict=True) if not wanted],
        )

    def merge(self, differentiated: list[Any], others: list[Any], like: Operands) -> Operands:
        """The operands that were split."""
        a, b = iter(differentiated), iter(others)
        operands: Operands = jax.tree.unflatten(
            jax.tree.structure(like), [next(a) if wanted else next(b) for wanted in self.mask]
        )
        return operands


def primal(marked: Any) -> Any:
    """The values of a tree of marked leaves."""
    return jax.tree.map(lambda x: jnp.asarray(x.value), marked, is_leaf=_is_marked)


def wanted_of(operands: Any) -> Wanted:
    """The real floating leaves that are differentiated, of marked operands."""
    mask = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(operands, is_leaf=_is_marked):
        dtype = jnp.result_type(leaf.value)
        if leaf.perturbed and jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"argmin cannot be differentiated in complex values; operands{jax.tree_util.keystr(path)} has dtype "
                f"{dtype}. Pass its real and imaginary parts, and join them in `inner_loss`."
            )
        mask.append(bool(leaf.perturbed and jnp.issubdtype(dtype, jnp.floating)))
    return Wanted(tuple(mask))


def _is_marked(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


@jax.custom_jvp
def _differentiated_once(x: jax.Array) -> jax.Array:
    return x


@_differentiated_once.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "The gradient of an argmin cannot be differentiated again: it has first derivatives in reverse mode only. "
        "Within the inner loss of another argmin, let that one use `ContrastiveAdjoint`: it needs no second ones."
    )


def once(values: Any) -> Any:
    """The values, guarded: derivatives of the backward pass would be those of its iterations, which mean nothing."""
    return jax.tree.map(
        lambda x: _differentiated_once(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x, values
    )
