"""The fast learner from where learning ended; where it does not arrive learning goes on, and it is tried again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._control import cast_like, only_if
from contrastive_meta._estimators._free_point import NOISE_FLOOR, NUM_GRADIENTS, FreePoint
from contrastive_meta._estimators._line import LONG
from contrastive_meta._estimators._phases import Nudging, Phases
from contrastive_meta._estimators._search import Outcome
from contrastive_meta._problem import Params
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers.base import InnerSolver, Solution, Stop

# How often the fast learner is tried.
_MOST_TRIES = 3
# In between learning goes on until its residual is this part of what it was; and for another try at least to that.
_FURTHER = 1e-3
_WORTH_A_TRY = 0.5


Attempt = Callable[[Params], tuple[FreePoint, Outcome]]


class Try(NamedTuple):
    """A try of the fast learner, and where the next one begins."""

    found: list[jax.Array]  # leaves of where it set out and of what came of it
    params: Params  # flattened: where the next try begins
    num_gradients: jax.Array  # of all tries, and of learning in between
    num_tries: jax.Array
    running: jax.Array


def run_fast(
    nudging: Nudging,
    free: Solution,
    attempt: Attempt,
    solver: InnerSolver,
    published: Callable[[FreePoint], Phases] | None,
) -> tuple[FreePoint, Phases, jax.Array]:
    """The phases by the fast learner, or by the user's where it fails for good, and what became of it.

    Args:
      nudging: what the phases are to be.
      free: the free phase.
      attempt: what the losses say at flattened `params`, and how far the fast learner comes from there.
      solver: the user's learner, bound to the meta-parameters.
      published: the phases by that learner, from there; None for neither falling back on it nor going on with it.

    Returns:
      The point from which the phases were found, the phases, and their status as far as the learner knows.
    """
    unflatten = nudging.flattening.unflatten
    if published is None:
        (point, found), num_tries = attempt(nudging.flattening.flatten(free.params)), jnp.int32(1)
    else:
        point, found, num_tries = _find(nudging, free, attempt, solver)
    phases = found.phases
    # The fast learner goes to the minimum of the loss: where the user's would not stay, that is another question.
    rests = solver.rests_at(unflatten(phases.scheme.at_zero(phases.params)), unflatten(point.outer_grad))
    found = found._replace(failed=found.failed | ~rests, close=found.close & rests)
    went_on = flag(num_tries > 1, Status.FELL_BACK)
    if published is None or phases.scheme.is_complex:
        astray, failed = flag(found.astray, Status.FREE_NOT_CONVERGED), flag(found.failed, Status.NUDGED_NOT_CONVERGED)
        return point, phases, worst(went_on, astray, failed)

    def again(fast: Phases) -> Phases:
        slow = published(point)
        # From far off a minimum either may learn further.
        further = found.failed | found.astray | (tree.norm(slow.base_grad) < tree.norm(fast.base_grad))
        # Of two answers that are not accurate enough, the better one.
        further &= ~(found.close & (_left(fast) <= _left(slow)))
        chosen: Phases = tree.where(further, slow, fast)
        return chosen._replace(num_gradients=slow.num_gradients + fast.num_gradients)

    phases = only_if(found.missed, again, phases)
    # On such a way phases may find another minimum than learning would have.
    lost = found.astray & (tree.norm(tree.subtract(phases.base, point.params)) > LONG * point.scale)
    return point, phases, worst(went_on, flag(found.missed, Status.FELL_BACK), flag(lost, Status.FREE_NOT_CONVERGED))


def _left(phases: Phases) -> jax.Array:
    """What is left of the nudge."""
    return tree.norm(phases.scheme.contrast(phases.residual))


def _find(
    nudging: Nudging,
    free: Solution,
    attempt: Attempt,
    solver: InnerSolver,
) -> tuple[FreePoint, Outcome, jax.Array]:
    """Try the fast learner, and where it fails or goes astray let the user's own go on learning first.

    Which minimum an unfinished phase would have ended in, only the learner itself can tell: it goes on, without a
    nudge, and the fast one sets out again from where that leads.

    Returns:
      The point of the last try and what came of it, gradients of all tries counted; and the number of tries.
    """
    setting, flattening = nudging.tree_setting, nudging.flattening
    begin = flattening.flatten(free.params)
    # Neither changes from try to try. What the learner remembers is of another place, and dear to carry along.
    fixed: dict[str, Any] = {"solution": free._replace(memory=()), "eps": tree.coarsest_eps(setting.dtype, free.params)}

    @jax.jit  # traced once, for its shapes and in the loop
    def try_from(params: Params) -> tuple[dict[str, Any], Outcome]:
        point, outcome = attempt(params)
        return {name: x for name, x in point._asdict().items() if name not in fixed}, outcome

    def one_try(before: Try) -> Try:
        found = try_from(before.params)
        point, outcome = FreePoint(**fixed, **found[0]), found[1]
        residual = tree.norm(point.inner_grad)

        def learn_on(tried: Try) -> Try:
            tol = jnp.maximum(_FURTHER * residual, 2 * point.noise).astype(setting.dtype)
            solution = setting.learn_on(solver, flattening.unflatten(tried.params), Stop(tol=tol))
            # A learner that does not rest where the gradient vanishes comes no nearer.
            nearer = solution.residual <= _WORTH_A_TRY * residual
            spent = tried.num_gradients + solution.num_gradients
            return tried._replace(params=flattening.flatten(solution.params), num_gradients=spent, running=nearer)

        # The first look is not counted here: it is the estimator's.
        looked = jnp.where(before.num_tries > 0, NUM_GRADIENTS, 0)
        spent = before.num_gradients + looked + outcome.phases.num_gradients
        tried = Try(jax.tree.leaves(found), before.params, spent, before.num_tries + 1, jnp.asarray(False))
        more = (residual > NOISE_FLOOR * point.noise) & (tried.num_tries < _MOST_TRIES)
        return cast_like(only_if(outcome.missed & more, learn_on, tried), before)

    shapes, structure = jax.tree.flatten(jax.eval_shape(try_from, begin))
    nothing, none = [jnp.zeros(x.shape, x.dtype) for x in shapes], jnp.int32(0)
    last: Try = jax.lax.while_loop(lambda now: now.running, one_try, Try(nothing, begin, none, none, jnp.asarray(True)))
    changing, outcome = jax.tree.unflatten(structure, last.found)
    phases = outcome.phases._replace(num_gradients=last.num_gradients)
    return FreePoint(**fixed, **changing), outcome._replace(phases=phases), last.num_tries
