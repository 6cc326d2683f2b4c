"""What is to be learned: the bilevel problem, its losses, and the checks of what they take and return."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._arity import require_function
from contrastive_meta._control import varying
from contrastive_meta._pytree import PyTree, static, strategy

Params = PyTree
MetaParams = PyTree
Task = PyTree
ModelState = PyTree
Number = float | complex | jax.Array
# `(params, meta_params, task)`, and `model_state` where a problem has one.
Loss = Callable[..., Any]


@strategy
class BilevelProblem:
    """Meta-parameters shape a learning process whose outcome is judged: theory (1) and (2).

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
      stages: of a problem that `in_two_stages` made; not for callers.

    Raises:
      TypeError: an argument is no function, or none of the arguments that it will be called with.

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
    stages: Any = static(default=None)

    def __post_init__(self) -> None:
        """Check that all are functions of what they will be called with."""
        of_loss, of_task = "params, meta_params, task", "meta_params, task"
        scalar = "scalar" if not self.has_aux else "(scalar, aux)"
        has_state = self.init_model_state is not None
        of_loss += ", model_state" if has_state else ""
        require_function(self.inner_loss, "inner_loss", of_loss, "(scalar, new_model_state)" if has_state else scalar)
        require_function(self.outer_loss, "outer_loss", of_loss, scalar)
        require_function(self.init_params, "init_params", of_task, "params")
        if self.sample is not None:
            require_function(self.sample, "sample", "key, task, step", "task")
        if self.init_model_state is not None:
            require_function(self.init_model_state, "init_model_state", of_task, "model_state")

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
        if self.init_model_state is None:
            return ()
        return varying(strongly_typed(self.init_model_state(meta_params, task)))

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
        """The nudged loss L_in + beta L_out, theory (5)."""
        inner = self.inner(params, meta_params, task)
        strength = beta if jnp.iscomplexobj(beta) else jnp.asarray(beta, inner.dtype)
        return inner + strength * self.outer(params, meta_params, task)

    def init(self, meta_params: MetaParams, task: Task) -> Params:
        """The starting point, checked to be floating arrays and stripped of weak types."""
        return varying(as_float_arrays(self.init_params(meta_params, task), "params", "init_params must return"))

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
