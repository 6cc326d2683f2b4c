"""What an estimator returns: the meta-gradient, what the next call carries on from, and how it went."""

import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import MetaParams, ModelState, Params
from contrastive_meta._pytree import PyTree, static, strategy


class Status(enum.IntEnum):
    """What happened, in rising order of severity: of several statuses the largest is reported.

    Values are what `result.diagnostics.status` holds; `describe` gives the message and the remedy.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.Status(0).describe()
      'Every check passed.'
    """

    CONVERGED = 0
    FELL_BACK = 1
    APPROXIMATE = 2
    TARGET_NOT_REACHED = 3
    FREE_NOT_CONVERGED = 4
    NUDGED_NOT_CONVERGED = 5
    LOST_IN_NOISE = 6
    INDEFINITE_CURVATURE = 7
    NOT_SMOOTH = 8
    INCONSISTENT_GRADIENT = 9
    UNBOUNDED_NUDGE = 10
    DIVERGED = 11
    NOT_FINITE = 12
    INVALID_SCHEME = 13

    def describe(self) -> str:
        """What the status means and what to do about it, in one sentence each."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    Status.CONVERGED: "Every check passed.",
    Status.FELL_BACK: (
        "The nudged phases as they were to run failed, and others took their place and passed every check: from where "
        "the user's learner had learned further, or run by it, where the inner loss was not nearly quadratic; with the "
        "linear nudge, where the outer loss took the minimum away. Where this is the rule, a tighter tolerance of the "
        "free phase, `nudged_solver=` or `nudge=LinearNudge()` saves the failed attempt."
    ),
    Status.APPROXIMATE: (
        "The estimator is biased or noisy by construction, or its nudge is large enough to be, or its estimated error "
        "is above 0.1, so convergence cannot vouch for it. Lower beta or a tolerance that was typed, ask for "
        "`target_error`, or compare it with an exact estimator: `contrastive_meta.compare`."
    ),
    Status.TARGET_NOT_REACHED: (
        "The estimated error is above `target_error`; `diagnostics.error_estimate` says how close it came. "
        "Raise `max_steps`, learn for longer, or use float64 or `automatic(order=4)`, whose floors are lower."
    ),
    Status.FREE_NOT_CONVERGED: (
        "Learning stopped before a stationary point, where the meta-gradient is defined, or so far off that the one "
        "found from there may not be the learner's. "
        "Give the solver more steps or a faster optimiser, or meta-differentiate the steps themselves "
        "with `BackpropThroughLearning`."
    ),
    Status.NUDGED_NOT_CONVERGED: (
        "The nudged phases (or the linear solve) stopped before the response to the nudge was complete. "
        "Give `nudged_solver` (or the linear solver) more steps; an optimiser whose steps keep their size, such as "
        "Adam at a constant rate, needs a decaying schedule."
    ),
    Status.LOST_IN_NOISE: (
        "The response to the nudge is not far above the rounding noise of the losses. "
        "Raise beta or `displacement`, or use float64 or `complex_step`."
    ),
    Status.INDEFINITE_CURVATURE: (
        "The inner loss curves downwards in the direction of the response, so this is no minimum. "
        "Learn for longer, regularise the inner loss, or add damping to the linear solver."
    ),
    Status.NOT_SMOOTH: (
        "The solution lies at a kink of the inner loss, such as that of an absolute value at 0, or at the edge of a "
        "learner's wall, through which nudged phases, or rounding, lead. "
        "Leave a kink to a learner that knows it, `ProximalDescent`, or smooth the penalty. At an edge the gradient "
        "may differ on both sides: change the meta-parameters a little, learn to a tighter tolerance, or lower beta."
    ),
    Status.INCONSISTENT_GRADIENT: (
        "The inner loss's gradient is not that of its value: a `stop_gradient`, a straight-through trick or a "
        "derivative rule of the loss's own changes it, and then no estimator knows what learning depends on. "
        "Write the loss without it, or give the detached factor its value as part of the task."
    ),
    Status.UNBOUNDED_NUDGE: (
        "A nudged phase left the neighbourhood of the free one: the nudged loss has no minimum near the free one. "
        "Lower beta (or `displacement`), use `LinearNudge()`, or `forward_difference`; where learning itself had not "
        "settled, learn for longer first."
    ),
    Status.DIVERGED: "Learning diverged: the loss and its gradient grew. Lower the inner learning rate.",
    Status.INVALID_SCHEME: (
        "The scheme's weights do not satisfy Re sum w = 0 and sum w beta = 1 (beta = 0 breaks both). "
        "Use one of the scheme functions with a nonzero beta."
    ),
    Status.NOT_FINITE: (
        "A loss, a gradient or a solution holds NaN or infinity. "
        "Look for NaN in the task, then for a learning rate or a beta that is too large."
    ),
}


# An estimated relative error above this makes a result approximate, whatever else was checked.
LARGEST_ACCURATE_ERROR = 0.1


def worst(*statuses: Any) -> jax.Array:
    """The most severe of several statuses, as an int32 array."""
    return jnp.max(jnp.stack([jnp.max(jnp.asarray(status, jnp.int32)) for status in statuses]))


def flag(condition: Any, status: Status) -> jax.Array:
    """`status` where the condition holds, else `CONVERGED`."""
    return jnp.where(condition, jnp.int32(status), jnp.int32(Status.CONVERGED))


class PhasesBy(enum.IntEnum):
    """Who ran the nudged phases of an estimate: values of `result.diagnostics.phases_by`.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.PhasesBy(1).name
      'NEWTON_KRYLOV'
    """

    NOBODY = 0  # the estimator has no nudged phases
    NEWTON_KRYLOV = 1
    NEWTON_KRYLOV_AFTER_LEARNING = 2  # from where the solver had learned on, without a nudge
    SOLVER = 3


class Diagnostics(NamedTuple):
    """How far a meta-gradient can be trusted: scalars of the same structure for every estimator.

    What an estimator has no notion of is infinite where it would measure an error, and else 0. It is never NaN, which
    is left to losses and data, and which `jax_debug_nans` stops at.

    Attributes:
      beta: nudging strength used, in units of `inner_loss` over those of `outer_loss`; the modulus for complex nudges.
      free_residual: norm of the inner loss's gradient in `params` at `result.params`.
      nudged_residual: how far the response to the nudge is from solved, relative to the nudge: the norm of
        v - H u over that of v, with v the outer loss's gradient in `params` and u the response.
      displacement: distance that the nudge of strength `beta` moved `params`, relative to their norm.
      num_gradients: gradients of the inner (or nudged) loss evaluated, all phases together.
      num_hvps: Hessian-vector products evaluated.
      error_estimate: estimate of ||grad - exact|| / ||exact||; infinite where what was measured says nothing of it,
        and where no estimate is made. An estimate above 0.1 makes the status at least `APPROXIMATE`, unless the
        meta-gradient is zero but for rounding: direct and indirect term cancel to the last digits.
      status: value of a `Status`; the most severe wins.
      phases_by: value of a `PhasesBy`: who ran the nudged phases.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.Diagnostics._fields[-2]
      'status'
    """

    beta: jax.Array
    free_residual: jax.Array
    nudged_residual: jax.Array
    displacement: jax.Array
    num_gradients: jax.Array
    num_hvps: jax.Array
    error_estimate: jax.Array
    status: jax.Array
    phases_by: jax.Array | int = PhasesBy.NOBODY.value


# Statuses that are no failure, besides `CONVERGED`.
USABLE = (Status.FELL_BACK, Status.APPROXIMATE)


def failed(status: jax.Array, allow: tuple[Status, ...]) -> jax.Array:
    """Whether a status is neither `CONVERGED` nor among `allow`."""
    return ~jnp.isin(status, jnp.asarray([Status.CONVERGED, *allow], jnp.int32))


# A sum of two terms is zero but for rounding if it is below this many roundings of one of them.
_ROUNDINGS = 1e2


def is_rounding(grad: MetaParams, direct: MetaParams, error: Any) -> jax.Array:
    """Whether a meta-gradient and its error are rounding: direct and indirect term cancel, to the last digits.

    Args:
      grad: the meta-gradient.
      direct: its direct term.
      error: estimated, relative to `grad`.
    """
    size, term = tree.norms(grad, direct)
    known = jnp.isfinite(error)
    whole = (1 + jnp.where(known, error, 0)) * size
    return jnp.asarray(known & (whole <= _ROUNDINGS * tree.coarsest_eps(size.dtype, grad) * term))


def make_diagnostics(dtype: Any, *, is_zero: Any = False, **known: Any) -> Diagnostics:
    """Diagnostics in one dtype; a large estimated error is a status.

    Args:
      dtype: of what is no count.
      is_zero: whether the meta-gradient is zero but for rounding, of which no error relative to it says anything.
      **known: fields; None, or left out, for what is not known.
    """
    counts = dict.fromkeys(("num_gradients", "num_hvps", "status", "phases_by"), jnp.int32)
    errors = ("free_residual", "nudged_residual", "error_estimate")
    values = {name: jnp.inf if name in errors else 0 for name in Diagnostics._fields}
    values |= {name: value for name, value in known.items() if value is not None}
    told = Diagnostics(**{name: jnp.asarray(value, counts.get(name, dtype)) for name, value in values.items()})
    is_estimated = jnp.asarray(known.get("error_estimate") is not None) & ~jnp.asarray(is_zero)
    inaccurate = flag(is_estimated & (told.error_estimate > LARGEST_ACCURATE_ERROR), Status.APPROXIMATE)
    return told._replace(status=jnp.maximum(told.status, inaccurate))


class EstimatorState(NamedTuple):
    """What one estimate hands to the next as a warm start; the same structure from the first call on.

    Attributes:
      params: the last solution, where the next free phase starts.
      memory: the inner solver's own memory (curvature pairs, optimiser state), or ().
      displacement: response dphi/dbeta of `params` to a unit nudge; zeros before the first call.
      beta: the last nudging strength; 0 before the first call.
      strength: the displacement, relative to the length of `params`, that `automatic` found to be best; 0 where none
        has been sought.
      doubling: how much twice that strength changed the contrasts then, relative to them: the truncation allowed.
      model_state: the model state at the end of the last free phase, where the next one starts; () for problems
        without one.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, theta, task: jnp.sum((w - theta) ** 2),
      ...     outer_loss=lambda w, theta, task: jnp.sum(w**2),
      ...     init_params=lambda theta, task: jnp.zeros(2),
      ... )
      >>> estimator = cm.Contrastive(cm.LBFGS())
      >>> state = estimator.init_state(problem, jnp.ones(2), None)  # same structure as result.state: a scan carry
      >>> result = estimator.estimate(problem, jnp.ones(2), None, state=state)
      >>> jax.tree.structure(result.state) == jax.tree.structure(state)
      True
    """

    params: Params
    memory: PyTree
    displacement: Params
    beta: jax.Array
    strength: jax.Array
    doubling: jax.Array
    model_state: ModelState = ()

    @classmethod
    def fresh(cls, params: Params, memory: PyTree, dtype: Any, model_state: ModelState = ()) -> "EstimatorState":
        """The state of a problem that has not been estimated yet."""
        zero = jnp.zeros((), dtype)
        return cls(params, memory, tree.zeros_like(params), zero, zero, zero, model_state)


@strategy
class MetaGradient:
    """A meta-gradient with what is needed to judge it.

    Attributes:
      grad: dPhi/dtheta, a pytree like `meta_params`: the gradient of the outer loss after learning. Descend it.
      outer_loss: outer loss at `params`.
      params: the free-phase solution.
      state: warm start for the next call, `estimate(..., state=result.state)`.
      diagnostics: residuals, counts and the status.
      aux: what `outer_loss` returned beside the loss (problems with `has_aux`), else None.
      unseen: names of meta-parameters that this estimator cannot see; their gradient is an exact zero.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, theta, task: jnp.sum((w - theta) ** 2),
      ...     outer_loss=lambda w, theta, task: jnp.sum(w**2),
      ...     init_params=lambda theta, task: jnp.zeros(2),
      ... )
      >>> result = cm.Contrastive(cm.LBFGS()).estimate(problem, jnp.ones(2), None)
      >>> [round(float(g), 2) for g in result.grad]
      [2.0, 2.0]
      >>> cm.Status(int(result.diagnostics.status)).name
      'CONVERGED'
    """

    grad: MetaParams
    outer_loss: jax.Array
    params: Params
    state: EstimatorState
    diagnostics: Diagnostics
    aux: Any = None
    unseen: tuple[str, ...] = static(default=())

    @property
    def model_state(self) -> ModelState:
        """The model state as the free phase left it; () for problems without one."""
        return self.state.model_state
