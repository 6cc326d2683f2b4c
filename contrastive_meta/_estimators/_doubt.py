"""How wrong a contrast is: what its passes still changed, and what another strength would."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._nudging import NudgeScheme
from contrastive_meta._problem import MetaParams

# A pass is not believed to contract by less than this.
_WORST_CONTRACTION = 0.9


class Doubt(NamedTuple):
    """Norms of the errors that passes leave in a contrast.

    A pass that multiplies a remainder by c and changes the contrast by d would, repeated, change it by d c / (1 - c)
    more. The response and the base point converge each at their own rate, so each is told apart from the other.

    Attributes:
      response: by the response to the nudge.
      base: by the point at which it is taken.
    """

    response: jax.Array
    base: jax.Array

    def after_pass(
        self,
        before: MetaParams,
        between: MetaParams,
        after: MetaParams,
        contraction: tuple[jax.Array, jax.Array],
        moved: jax.Array,
        unmoved: jax.Array,
    ) -> "Doubt":
        """What is in doubt after a pass.

        Args:
          before: the contrast before the pass.
          between: with the new response at the old base point.
          after: with both.
          contraction: by which the remainder of the nudge, and of learning, were multiplied.
          moved: whether the pass moved the base point.
          unmoved: error by a base point that no pass has moved, relative to the contrast.
        """
        of_response, of_base = (jnp.clip(c, 0.0, _WORST_CONTRACTION) for c in contraction)
        response = tree.norm(tree.subtract(between, before)) * of_response / (1 - of_response)
        base = tree.norm(tree.subtract(after, between)) * of_base / (1 - of_base)
        kept = jnp.where(jnp.isnan(self.base), unmoved * tree.norm(after), self.base)
        dtype = self.response.dtype
        return Doubt(response.astype(dtype), jnp.where(moved, base, kept).astype(dtype))


def doubt_of_strength(
    contrast_at: Callable[[jax.Array], MetaParams], scheme: NudgeScheme, contrast: MetaParams
) -> jax.Array:
    """Norm of the error by truncation and rounding, from the contrasts at twice and at half the strength.

    Truncation grows with the strength to the power of the scheme's order p, so twice the strength changes the contrast
    by 2^p - 1 times its error. Half the strength doubles what rounding makes of it.

    Args:
      contrast_at: the contrast at a multiple of the strength.
      scheme: with its strength.
      contrast: at that strength.
    """
    twice, half = tree.unstack(jax.lax.map(contrast_at, jnp.array([2.0, 0.5])), 2)
    truncation = tree.norm(tree.subtract(twice, contrast)) / (2**scheme.order - 1)
    return jnp.maximum(truncation, tree.norm(tree.subtract(half, contrast)))


def relative_to(grad: MetaParams, error: jax.Array) -> jax.Array:
    """The error relative to a gradient; 0 where both vanish, infinite where only the gradient does."""
    size = tree.norm(grad)
    return jnp.where(error > 0, error / jnp.where(size > 0, size, 0.0), jnp.where(jnp.isnan(error), jnp.nan, 0.0))
