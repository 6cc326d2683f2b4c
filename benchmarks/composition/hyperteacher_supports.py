"""Which combinations of modules the tasks of a hyperteacher are made of, and which stay unseen."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from contrastive_meta.architectures import SupportReport, check_support

NUM_MODULES = 6
# Every set of masks is repeated to this many rows, a multiple of all their numbers: one program samples from any.
_ROWS = 420


class Support(NamedTuple):
    """The training tasks of one condition.

    Attributes:
      combinations: modules that occur together.
      drawn: whether each task draws the weights of its modules; else they are equal, and sum to 1.
    """

    combinations: tuple[tuple[int, ...], ...]
    drawn: bool = True

    def masks(self) -> npt.NDArray[np.bool_]:
        """Shape (combinations, modules)."""
        return np.array([[m in c for m in range(NUM_MODULES)] for c in self.combinations])

    def check(self) -> SupportReport:
        """What the theory says of these tasks."""
        return check_support(self.masks(), drawn_weights=self.drawn)

    def to_sample(self) -> dict[str, jax.Array]:
        """What `draw_weights` draws from."""
        masks = self.masks().astype(np.float32)
        return {"masks": jnp.asarray(np.tile(masks, (_ROWS // len(masks), 1))), "drawn": jnp.asarray(self.drawn)}


def draw_weights(key: jax.Array, support: Any, number: int) -> jax.Array:
    """Weights of modules in so many tasks: U[.5, 1] on a random mask, or equal ones that sum to 1.

    Returns:
      shape (number, modules).
    """
    of_masks, of_weights = jax.random.split(key)
    masks = jax.random.choice(of_masks, support["masks"], (number,))
    drawn = jax.random.uniform(of_weights, masks.shape, minval=0.5)
    equal = 1 / jnp.sum(masks, 1, keepdims=True)
    return masks * jnp.where(support["drawn"], drawn, equal)


def _cycle(*modules: int, size: int = 2) -> tuple[tuple[int, ...], ...]:
    number = len(modules)
    return tuple(tuple(sorted(modules[(k + j) % number] for j in range(size))) for k in range(number))


_ALL = tuple(range(NUM_MODULES))
_SINGLETONS = tuple((m,) for m in _ALL)
_RING = _cycle(*_ALL)
_TRIANGLES = _cycle(0, 1, 2) + _cycle(3, 4, 5)

RING, GROUPS, SINGLETONS, MISSING = "ring", "groups", "singletons", "a module never seen"
# The first four are calibrated; the rest are the doomed and the blessed supports of the theory.
SUPPORTS = {
    RING: Support(_RING),
    GROUPS: Support(_TRIANGLES),
    SINGLETONS: Support(_SINGLETONS),
    MISSING: Support(tuple(c for c in _RING if 5 not in c)),
    "two triples": Support(((0, 1, 2), (3, 4, 5))),
    "ring of triples": Support(((0, 1, 2), (2, 3, 4), (0, 4, 5))),
    "sliding triples": Support(_cycle(*_ALL, size=3)),
    "all at once": Support((_ALL,)),
    "equal weights: ring": Support(_RING, drawn=False),
    "equal weights: ring and singletons": Support(_RING + _SINGLETONS, drawn=False),
    "equal weights: triangles and singletons": Support(_TRIANGLES + _SINGLETONS, drawn=False),
    "equal weights: sliding triples": Support(_cycle(*_ALL, size=3), drawn=False),
    "equal weights: triples and singletons": Support(_cycle(*_ALL, size=3) + _SINGLETONS, drawn=False),
    "equal weights: all at once": Support((_ALL,), drawn=False),
    "equal weights: all at once and singletons": Support((_ALL, *_SINGLETONS), drawn=False),
}

# The pairs in neither ring nor groups: out of distribution for all conditions.
UNSEEN = Support(tuple(c for c in itertools.combinations(_ALL, 2) if c not in _RING + _TRIANGLES))


def combinations_of(size: int) -> Support:
    """All combinations of so many modules."""
    return Support(tuple(itertools.combinations(_ALL, size)))
