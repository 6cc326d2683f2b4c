"""Where optax and this package meet: transformations of any kind, masked trees, and what an argument lacks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like
from contrastive_meta._pytree import PyTree
from contrastive_meta._result import Diagnostics, make_diagnostics


def as_transformation(optimizer: Any, name: str) -> optax.GradientTransformationExtraArgs:
    """An optax transformation that takes any extra arguments.

    Raises:
      TypeError: `optimizer` is something else.
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"`{name}` must be an optax transformation, such as `optax.adam(1e-3)`; got a {type(optimizer).__name__}."
        )
    return optax.with_extra_args_support(optimizer)


def is_masked(leaf: Any) -> bool:
    """Whether `optax.masked` put this in the place of something it hides."""
    return isinstance(leaf, optax.MaskedNode)


def hides(values: PyTree) -> bool:
    """Whether `optax.masked` hides a part of a tree."""
    return any(is_masked(leaf) for leaf in jax.tree.leaves(values, is_leaf=is_masked))


def fill(visible: PyTree, whole: PyTree) -> PyTree:
    """`visible`, with the parts that a mask hides taken from `whole`."""
    return jax.tree.map(lambda part, full: full if is_masked(part) else part, visible, whole, is_leaf=is_masked)


def show(whole: PyTree, visible: PyTree) -> PyTree:
    """The parts of `whole` that a mask does not hide in `visible`."""
    return jax.tree.map(lambda part, full: part if is_masked(part) else full, visible, whole, is_leaf=is_masked)


def completed(visible: PyTree, unmasked: PyTree | None, name: str) -> PyTree:
    """The whole tree, of which `visible` may be what a mask leaves.

    Raises:
      ValueError: a mask hides a part, and the caller did not pass it.
    """
    if not hides(visible):
        return visible
    if unmasked is None:
        raise ValueError(
            f"A mask (`optax.masked` or `optax.multi_transform`) hides a part of `{name}`, which the losses need: pass "
            f"the whole tree as well, `tx.update(..., unmasked={name})`; or put the mask around the wrapped optimizer."
        )
    return fill(visible, unmasked)


def required(value: Any, name: str, remedy: str) -> Any:
    """`value`, unless the caller left it out.

    Raises:
      ValueError: it is None.
    """
    if value is None:
        raise ValueError(f"`update` needs `{name}`; it was not given. {remedy}")
    return value


def no_diagnostics(*trees: PyTree) -> Diagnostics:
    """Diagnostics before there is anything to report, in the coarsest dtype that suits all trees."""
    return make_diagnostics(tree.promoted(tree.float_dtype(trees), jnp.float32))


def summary(diagnostics: Diagnostics, like: Diagnostics) -> Diagnostics:
    """Diagnostics of a batch of tasks in one: counts added up, of everything else the largest."""
    counts = {"num_gradients", "num_hvps"}
    values = {
        name: jnp.sum(values) if name in counts else jnp.max(values) for name, values in diagnostics._asdict().items()
    }
    return cast_like(Diagnostics(**values), like)
