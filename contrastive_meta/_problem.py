"""What is to be learned and what comes back: the bilevel problem, the meta-gradient, its diagnostics, its status."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._pytree import PyTree, static, strategy

Params = PyTree
MetaParams = PyTree
Task = PyTree
ModelState = PyTree
Number = float | complex | jax.Array
# `(params, meta_params, task)`, and `model_state` where a problem has one.
Loss = Callable[..., Any]


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
    UNBOUNDED_NUDGE = 8
    DIVERGED = 9
    NOT_FINITE = 10
    INVALID_SCHEME = 11

    def describe(self) -> str:
        """What the status means and what to do about it, in one sentence each."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    Status.CONVERGED: "Every check passed.",
    Status.FELL_BACK: (
        "The nudged phases as they were to run failed, and others took their place and passed every check: the user's "
        "own learner, where the inner loss was not nearly quadratic, or the linear nudge, where the outer loss took "
        "the minimum away. Where this is the rule, `nudged_solver=` or `nudge=LinearNudge()` saves the failed attempt."
    ),
    Status.APPROXIMATE: (
        "The estimator is biased or noisy by construction, or its nudge is large enough to be, so convergence cannot "
        "vouch for it. Lower beta, or compare it with an exact estimator: `contrastive_meta.compare`."
    ),
    Status.TARGET_NOT_REACHED: (
        "The estimated error is above `target_error`; `diagnostics.error_estimate` says how close it came. "
        "Raise `max_steps`, learn for longer, or use float64 or `automatic(order=4)`, whose floors are lower."
    ),
    Status.FREE_NOT_CONVERGED: (
        "Learning stopped before a stationary point, where the meta-gradient is defined. "
        "Give the solver more steps or a faster optimiser, or meta-differentiate the steps themselves "
        "with `BackpropThroughLearning`."
    ),
    Status.NUDGED_NOT_CONVERGED: (
        "The nudged phases (or the linear solve) stopped before they answered the nudge. "
        "Give `nudged_solver` (or the linear solver) more steps; an optimiser whose steps do not shrink, such as Adam "
        "at a constant rate, needs a decaying schedule."
    ),
    Status.LOST_IN_NOISE: (
        "The response to the nudge is not far above the rounding noise of the losses. "
        "Raise beta or `displacement`, or use float64 or `complex_step`."
    ),
    Status.INDEFINITE_CURVATURE: (
        "The inner loss curves downwards in the direction of the response, so this is no minimum. "
        "Learn for longer, regularise the inner loss, or add damping to the linear solver."
    ),
    Status.UNBOUNDED_NUDGE: (
        "A nudged phase ran away: the nudged loss has no minimum near the free one. "
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


def worst(*statuses: Any) -> jax.Array:
    """The most severe of several statuses, as an int32 array."""
    return jnp.max(jnp.stack([jnp.max(jnp.asarray(status, jnp.int32)) for status in statuses]))


def flag(condition: Any, status: Status) -> jax.Array:
    """`status` where the condition holds, else `CONVERGED`."""
    return jnp.where(condition, jnp.int32(status), jnp.int32(Status.CONVERGED))


class Diagnostics(NamedTuple):
    """How far a meta-gradient can be trusted: scalars of the same structure for every estimator.

    What an estimator has no notion of is NaN (floats) or 0 (counts).

    Attributes:
      beta: nudging strength used, in the units of `outer_loss`; the modulus for complex nudges.
      free_residual: norm of the inner loss's gradient in `params` at `result.params`.
      nudged_residual: how far the response to the nudge is from solved, relative to the nudge: the norm of
        v - H u over that of v, with v the outer loss's gradient in `params` and u the response.
      displacement: distance that the nudge of strength `beta` moved `params`, relative to their norm.
      num_gradients: gradients of the inner (or nudged) loss evaluated, all phases together.
      num_hvps: Hessian-vector products evaluated.
      error_estimate: estimated relative error of `grad`; NaN where no estimate is made.
      status: value of a `Status`; the most severe wins.

    Example:
      >>> import contrastive_meta as cm
      >>> cm.Diagnostics._fields[-1]
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


def make_diagnostics(dtype: Any, **known: Any) -> Diagnostics:
    """Diagnostics in one dtype, with NaN or 0 for what is not among `known`."""
    counts = {"num_gradients": jnp.int32, "num_hvps": jnp.int32, "status": jnp.int32}
    missing = {name: 0 if name in counts else jnp.nan for name in Diagnostics._fields}
    values = missing | known
    return Diagnostics(**{name: jnp.asarray(value, counts.get(name, dtype)) for name, value in values.items()})


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


@strategy
class BilevelProblem:
    """Meta-parameters shape a learning process whose outcome is judged: algorithm (1) and (2).

    All three functions take `task` last, but for a model state: any pytree of arrays, with support and query data,
    targets and PRNG keys. Nothing a task needs is captured by closure, so that tasks can be batched.

    A model may have a state of its own that no gradient moves: running averages, counters. With `init_model_state` both
    losses take it as a fourth argument. The forward pass of every step of the free phase moves it once, as in ordinary
    training; whatever comes after reads it as the free phase left it. The meta-gradient holds it fixed, but for
    estimators that differentiate, or repeat, the whole of learning (`BackpropThroughLearning`, `FiniteDifference`,
    `EvolutionStrategies`).

    Args:
      inner_loss: `(params, meta_params, task) -> scalar`, minimised over `params` by learning.
      outer_loss: `(params, meta_params, task) -> scalar`, the judge of the learned `params`.
      init_params: `(meta_params, task) -> params`, where learning starts.
      has_aux: whether both losses return `(scalar, aux)`; the outer loss's aux is returned with the result.
      sample: `(key, task, step) -> task`, the minibatch (and dropout key) of inner step number `step`. `key` is
        already folded with the step. Every phase sees the same sequence, so the sampling noise cancels in the
        contrast. Residuals, statistics and the reported loss use the whole `task`.
      init_model_state: `(meta_params, task) -> model_state`, any pytree of arrays, integers included. Then the losses
        are `inner_loss(params, meta_params, task, model_state) -> (scalar, new_model_state)`, whatever `has_aux`, and
        `outer_loss(params, meta_params, task, model_state) -> scalar`, or `(scalar, aux)` with `has_aux`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, log_decay, task: jnp.sum((w - task) ** 2) + jnp.exp(log_decay) * jnp.sum(w**2),
      ...     outer_loss=lambda w, log_decay, task: jnp.sum((w - 1.0) ** 2),
      ...     init_params=lambda log_decay, task: jnp.zeros_like(task),
      ... )

      With a model state, here a running average of `w` by which it is judged:

      >>> averaged = cm.BilevelProblem(
      ...     inner_loss=lambda w, pull, task, mean: (0.5 * (w - task) ** 2 + 0.5 * pull * w**2, 0.9 * mean + 0.1 * w),
      ...     outer_loss=lambda w, pull, task, mean: 0.5 * (w - mean) ** 2 + w,
      ...     init_params=lambda pull, task: jnp.zeros(()),
      ...     init_model_state=lambda pull, task: jnp.zeros(()),
      ... )
      >>> estimator = cm.Contrastive(cm.OptaxDescent(optax.sgd(0.4), num_steps=200))
      >>> result = estimator.estimate(averaged, jnp.array(1.0), jnp.array(2.0))
      >>> round(float(result.model_state), 3), round(float(result.grad), 3)  # w = 2 / (1 + pull), dw/dpull = -1/2
      (1.0, -0.5)
    """

    inner_loss: Loss = static()
    outer_loss: Loss = static()
    init_params: Callable[[MetaParams, Task], Params] = static()
    has_aux: bool = static(default=False)
    sample: Callable[[jax.Array, Task, jax.Array], Task] | None = static(default=None)
    init_model_state: Callable[[MetaParams, Task], ModelState] | None = static(default=None)

    def at(self, model_state: ModelState) -> "BilevelProblem":
        """The problem with its model state held fixed: an ordinary problem, without one.

        Args:
          model_state: such as `result.model_state`; () for problems without one, which are returned as they are.

        Raises:
          ValueError: a model state for a problem that has none.
        """
        if self.init_model_state is None:
            if jax.tree.leaves(model_state):
                raise ValueError("This problem has no model state to be held: give it one by `init_model_state=`.")
            return self

        def inner(params: Params, meta_params: MetaParams, task: Task) -> Any:
            value, moved = self._forward(params, meta_params, task, model_state)
            return (value, moved) if self.has_aux else value

        def outer(params: Params, meta_params: MetaParams, task: Task) -> Any:
            return self.outer_loss(params, meta_params, task, model_state)

        return BilevelProblem(inner, outer, self.init_params, has_aux=self.has_aux, sample=self.sample)

    def at_start(self, meta_params: MetaParams, task: Task) -> "BilevelProblem":
        """The problem at the model state with which learning starts."""
        return self.at(self.first_model_state(meta_params, task))

    def first_model_state(self, meta_params: MetaParams, task: Task) -> ModelState:
        """The model state with which learning starts, stripped of weak types; () without one."""
        return () if self.init_model_state is None else strongly_typed(self.init_model_state(meta_params, task))

    def moved(
        self, params: Params, meta_params: MetaParams, task: Task, model_state: ModelState
    ) -> tuple[jax.Array, ModelState]:
        """One forward pass of the inner loss: its value, and the model state that it leaves behind."""
        value, moved = self._forward(params, meta_params, task, model_state)
        check_same_structure(
            moved, model_state, "The model state that `inner_loss` returned",
            "It must have the structure, shapes and dtypes of what `init_model_state` returns.",
        )  # fmt: skip
        return value, strongly_typed(moved)

    def inner(self, params: Params, meta_params: MetaParams, task: Task) -> jax.Array:
        """The inner loss alone, checked to be a real or complex floating scalar."""
        return self._evaluate(self.inner_loss, "inner_loss", params, meta_params, task)[0]

    def outer(self, params: Params, meta_params: MetaParams, task: Task) -> jax.Array:
        """The outer loss alone, checked likewise."""
        return self.outer_with_aux(params, meta_params, task)[0]

    def outer_with_aux(self, params: Params, meta_params: MetaParams, task: Task) -> tuple[jax.Array, Any]:
        """The outer loss and its aux (None without `has_aux`)."""
        return self._evaluate(self.outer_loss, "outer_loss", params, meta_params, task)

    def nudged(self, params: Params, meta_params: MetaParams, task: Task, beta: Any) -> jax.Array:
        """The nudged loss L_in + beta L_out, algorithm (5)."""
        inner = self.inner(params, meta_params, task)
        strength = beta if jnp.iscomplexobj(beta) else jnp.asarray(beta, inner.dtype)
        return inner + strength * self.outer(params, meta_params, task)

    def init(self, meta_params: MetaParams, task: Task) -> Params:
        """The starting point, checked to be floating arrays and stripped of weak types."""
        return as_float_arrays(self.init_params(meta_params, task), "params", "init_params must return")

    def minibatch(self, key: jax.Array, task: Task, step: Any) -> Task:
        """The task that inner step `step` sees."""
        return task if self.sample is None else self.sample(jax.random.fold_in(key, step), task, step)

    def _forward(
        self, params: Params, meta_params: MetaParams, task: Task, model_state: ModelState
    ) -> tuple[jax.Array, ModelState]:
        return _split(self.inner_loss(params, meta_params, task, model_state), "inner_loss", "new_model_state")

    def _evaluate(
        self, loss: Loss, name: str, params: Params, meta_params: MetaParams, task: Task
    ) -> tuple[jax.Array, Any]:
        if self.init_model_state is not None:
            raise TypeError(
                "This problem has a model state (`init_model_state`), and its losses were not told which one to read. "
                "Hold one first: `problem.at(model_state)`, with `result.model_state` for that of the free phase."
            )
        return _split(loss(params, meta_params, task), name, "aux" if self.has_aux else None)


def _split(returned: Any, name: str, second: str | None) -> tuple[jax.Array, Any]:
    """What a loss returned as `(scalar, second)`, checked; None for the second where there is to be none."""
    if second is not None and not (isinstance(returned, tuple) and len(returned) == 2):
        cause = "has_aux=True" if second == "aux" else "init_model_state="
        raise TypeError(f"`{name}` must return `(scalar, {second})` when `{cause}`; got {type(returned).__name__}.")
    value, other = returned if second is not None else (returned, None)
    if isinstance(value, tuple):
        raise TypeError(
            f"`{name}` must return a scalar; got a tuple of {len(value)}. Losses that return `(scalar, aux)` need "
            "`BilevelProblem(..., has_aux=True)`; an inner loss that returns `(scalar, new_model_state)` needs "
            "`init_model_state=`."
        )
    value = jnp.asarray(value)
    if value.ndim != 0 or not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(
            f"`{name}` must return a floating scalar; got shape {value.shape}, dtype {value.dtype}. "
            "Reduce it with `jnp.sum` or `jnp.mean`."
        )
    return value, other


def strongly_typed(values: PyTree) -> PyTree:
    """Strip weak types, so that a state has one type from the first call on."""

    def strong(x: Any) -> jax.Array:
        array = jnp.asarray(x)
        return array if jnp.issubdtype(array.dtype, jax.dtypes.extended) else jnp.asarray(array, dtype=array.dtype)

    return jax.tree.map(strong, values)


def as_float_arrays(values: PyTree, name: str, what: str) -> PyTree:
    """`values` as strongly typed floating arrays.

    Raises:
      TypeError: a leaf is not a real floating array; the message names it.
    """

    def convert(path: Any, leaf: Any) -> jax.Array:
        where = f"{name}{jax.tree_util.keystr(path)}"
        try:
            array = jnp.asarray(leaf)
        except TypeError as error:
            raise TypeError(f"{what} a pytree of arrays; {where} is a {type(leaf).__name__}.") from error
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(
                f"{what} real floating arrays; {where} has dtype {array.dtype}. "
                "Convert it to a floating dtype, or put it in `task` if it is not learned."
            )
        return jnp.asarray(array, dtype=array.dtype)

    return jax.tree_util.tree_map_with_path(convert, values)


def check_same_structure(got: PyTree, expected: PyTree, name: str, remedy: str) -> None:
    """Raise unless `got` has the structure, shapes and dtypes of `expected`.

    Raises:
      ValueError: naming both and the remedy.
    """

    def describe(tree_: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree_)

    got, expected = describe(got), describe(expected)
    if not same_structure(got, expected) or jax.tree.leaves(got) != jax.tree.leaves(expected):
        raise ValueError(f"{name}: expected {expected}, got {got}. {remedy}")


def same_structure(a: PyTree, b: PyTree) -> bool:
    """Whether two pytrees differ in nothing but their leaves."""
    structures: list[object] = [jax.tree.structure(a), jax.tree.structure(b)]
    return structures[0] == structures[1]


def same_arrays(a: PyTree, b: PyTree) -> bool:
    """Whether two pytrees agree in structure, shapes and dtypes."""
    kinds = [[(jnp.shape(x), jnp.result_type(x)) for x in jax.tree.leaves(values)] for values in (a, b)]
    return same_structure(a, b) and kinds[0] == kinds[1]


def float_dtype_of(problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task) -> Any:
    """The real dtype in which the problem's inner loss is computed."""

    def inner(params: Params, meta_params: MetaParams, task: Task) -> jax.Array:
        return problem.at_start(meta_params, task).inner(params, meta_params, task)

    return tree.float_dtype(jax.eval_shape(inner, params, meta_params, task))
