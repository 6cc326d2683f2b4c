"""The fast learner from where learning ended; where it does not arrive learning goes on, and it is tried again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, only_if
from contrastive_meta._estimators._free_point import NOISE_FLOOR, NUM_GRADIENTS, FreePoint
from contrastive_meta._estimators._phases import Nudging
from contrastive_meta._estimators._search import Outcome
from contrastive_meta._problem import Params
from contrastive_meta._solvers.base import InnerSolver, Solution, Stop

# How often the fast learner is tried.
_MOST_TRIES = 3
# In between learning goes on until its residual is this part of what it was; and for another try at least to that.
_FURTHER = 1e-3
_WORTH_A_TRY = 0.5


class Try(NamedTuple):
    """A try of the fast learner, and where the next one begins."""

    point: dict[str, Any]  # what changes of a `FreePoint` from try to try, by name
    outcome: Outcome
    params: Params  # flattened: where the next try begins
    num_gradients: jax.Array  # of all tries, and of learning in between
    num_tries: jax.Array
    running: jax.Array


def find(
    nudging: Nudging,
    free: Solution,
    look: Callable[[Params], FreePoint],
    search: Callable[[FreePoint], Outcome],
    solver: InnerSolver,
) -> tuple[FreePoint, Outcome, jax.Array]:
    """Try the fast learner, and where it fails or goes astray let the user's own go on learning first.

    Which minimum an unfinished phase would have ended in, only the learner itself can tell: it goes on, without a
    nudge, and the fast one sets out again from where that leads.

    Args:
      nudging: what the phases are to be.
      free: the free phase.
      look: what the losses say at flattened `params`.
      search: the fast learner, from there.
      solver: the user's learner, bound to the meta-parameters.

    Returns:
      The point of the last try and what came of it, gradients of all tries counted; and the number of tries.
    """
    setting, flattening = nudging.tree_setting, nudging.flattening
    eps = tree.coarsest_eps(setting.dtype, free.params)

    def learn_on(before: Try) -> Try:
        residual = tree.norm(before.point["inner_grad"])
        solution = solver.solve(
            setting.inner,
            flattening.unflatten(before.params),
            minibatch_loss=None if setting.problem.sample is None else setting.inner_minibatch,
            stop=Stop(tol=jnp.maximum(_FURTHER * residual, 2 * before.point["noise"]).astype(setting.dtype)),
        )
        # A learner that does not rest where the gradient vanishes comes no nearer.
        nearer = solution.residual <= _WORTH_A_TRY * residual
        spent = before.num_gradients + solution.num_gradients
        return before._replace(params=flattening.flatten(solution.params), num_gradients=spent, running=nearer)

    @jax.jit  # traced once, for its shapes and in the loop
    def try_from(params: Params) -> tuple[dict[str, Any], Outcome]:
        point = look(params)
        return {name: x for name, x in point._asdict().items() if name not in ("solution", "eps")}, search(point)

    def one_try(before: Try) -> Try:
        point, outcome = try_from(before.params)
        # The first look is not counted here: it is the estimator's.
        looked = jnp.where(before.num_tries > 0, NUM_GRADIENTS, 0)
        needed = outcome.failed | outcome.unlearned | outcome.astray
        needed &= tree.norm(point["inner_grad"]) > NOISE_FLOOR * point["noise"]
        tried = before._replace(
            point=point,
            outcome=outcome,
            num_gradients=before.num_gradients + looked + outcome.phases.num_gradients,
            num_tries=before.num_tries + 1,
            running=jnp.asarray(False),
        )
        return cast_like(only_if(needed & (tried.num_tries < _MOST_TRIES), learn_on, tried), before)

    begin, none = flattening.flatten(free.params), jnp.int32(0)
    point, outcome = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(try_from, begin))
    first = Try(point, outcome, begin, none, none, jnp.asarray(True))
    last: Try = jax.lax.while_loop(lambda now: now.running, one_try, first)
    found = last.outcome
    phases = found.phases._replace(num_gradients=last.num_gradients)
    # What the learner remembers is of another place, and dear to carry along.
    solution = free._replace(memory=())
    return FreePoint(solution=solution, eps=eps, **last.point), found._replace(phases=phases), last.num_tries
