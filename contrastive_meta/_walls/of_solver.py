"""Which coordinates a learner's fixed points have."""

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._instance import Instance
from contrastive_meta._problem import Params
from contrastive_meta._solvers.base import Held, InnerSolver
from contrastive_meta._walls.active_set import active_set
from contrastive_meta._walls.held_entries import held_entries
from contrastive_meta._walls.normal_map import normal_map
from contrastive_meta._walls.walls import Walls


def walls_of(solver: InnerSolver, instance: Instance, params: Params) -> Walls | None:
    """The coordinates of a learner's fixed points next to one of them; None for learners without walls.

    Args:
      solver: the learner, not bound yet.
      instance: the problem, its model state held.
      params: where learning ended.

    Raises:
      ValueError: a penalty that depends on meta-parameters and does not tell its value.
    """
    bound = solver.bind(instance.meta_params)
    if bound.walls is not None:
        return normal_map(solver, instance, params)
    if bound.held_to is not None:
        return active_set(solver, instance, params)
    if not bound.descends_loss or bound.held_at(params, params) is None:
        return None
    gradient = tree.grad(instance.inner)(params)
    held = bound.held_at(params, gradient)
    assert held is not None
    # Where the learner rests is not known: the parameters as they are, at which it is then found not to.
    nothing = Held(jax.tree.map(jnp.zeros_like, held.entries), tree.zeros_like(held.decay), held.known)
    return held_entries(bound, tree.where(held.known, held, nothing), params)
