"""Any function as the learner: a JAX one, or black-box Python on the host."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_meta import _pytree as tree
from contrastive_meta._arity import number_of_arguments
from contrastive_meta._holomorphic import require_holomorphic
from contrastive_meta._problem import MetaParams, Params, check_same_structure
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers._host import learn_on_host
from contrastive_meta._solvers._host_sessions import HostLoss, PaddedLoss, Vector
from contrastive_meta._solvers.base import (
    InnerLoss,
    InnerSolver,
    MinibatchLoss,
    Solution,
    Stop,
    UnrolledLosses,
    final_status,
)
from contrastive_meta._solvers.penalty import BoundPenalty, Penalty, fixed_point_residual


@strategy
class CallableSolver(InnerSolver):
    """A function `(loss, init) -> params` as the learner; nudged phases run it again, on the nudged loss.

    A function of three arguments, `(loss, init, meta_params) -> params`, is given the meta-parameters as well: for
    bounds and proximal steps that depend on them. Arguments that have defaults do not count.

    A learner with kinks, bounds or constraints of its own says so by `penalty`. It is then judged by whether a proximal
    step moves where it ended, instead of by the gradient, and its nudged phases are measured behind the same walls.

    A JAX function is called as it is: it must work under the transformations it is put under, and is differentiated
    through by `BackpropThroughLearning` if it can be. The gradients it takes cannot be counted from outside:
    `num_gradients` holds the two that measure start and solution, `num_steps` is 0.

    With `host=True` the function is ordinary Python. It is called with `init` as a pytree of NumPy arrays and a `loss`
    to call: `loss(params) -> float` and `loss.value_and_grad(params) -> (float, pytree of NumPy arrays)`, evaluated by
    the compiled program that runs the learner. It must not call JAX itself: on few cores that can hang. It runs in a
    thread of its own, one for each lane of a batch, and what it raises is raised by the program. `num_steps` then
    counts the evaluations it asked for; asking twice in a row at the same point counts once.

    The function decides itself when to stop: `stop` does not reach it, so that the phases of a contrast need not take
    the same number of steps. Minibatches do not reach it either: it minimises the whole loss.

    Args:
      fn: the learner.
      host: whether `fn` is Python to be run on the host instead of JAX to be traced.
      tol: gradient norm above which the solution counts as not converged; None to ask for nothing. With a penalty, norm
        of (w - prox(w - s grad)) / s.
      penalty: what the learner minimises beside the loss, such as `cm.prox.l1(0.1)` or `cm.prox.non_negative()`.
      meta_params: set by `bind`.

    Raises:
      ValueError: `fn` returned something that is not like `init`.

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> def descend(loss, params):
      ...     for _ in range(40):
      ...         value, grad = loss.value_and_grad(params)
      ...         params = params - 0.25 * grad
      ...     return params
      >>> solver = cm.CallableSolver(descend, host=True)
      >>> solution = solver.solve(lambda w: jnp.sum((w - 3.0) ** 2), jnp.zeros(2))
      >>> [round(float(w), 3) for w in solution.params]
      [3.0, 3.0]
    """

    fn: Callable[..., Params] = static()
    host: bool = static(default=False)
    tol: float | jax.Array | None = None
    penalty: Penalty | None = None
    meta_params: MetaParams = None

    def bind(self, meta_params: MetaParams) -> "CallableSolver":
        """The solver with its function and its penalty at these meta-parameters."""
        if self.penalty is None and not self._takes_meta_params:
            return self
        return dataclasses.replace(self, meta_params=meta_params)

    @property
    def walls(self) -> BoundPenalty | None:
        """As the user gave them."""
        return BoundPenalty.of(self.penalty, self.meta_params)

    @property
    def _takes_meta_params(self) -> bool:
        """Whether the function has a third argument without a default."""
        return number_of_arguments(self.fn) >= 3

    def _call(self, loss: Any, init: Params, meta_params: MetaParams) -> Params:
        return self.fn(loss, init, meta_params) if self._takes_meta_params else self.fn(loss, init)

    def solve(
        self,
        loss: InnerLoss,
        init: Params,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
        stop: Stop = Stop(),
    ) -> Solution:
        """See `InnerSolver.solve`. `stop.tol` replaces `tol` in the status; the rest of `stop` changes nothing."""
        if self.host:
            return self._solve_on_host(loss, init, stop)
        params = self._learn(loss, init)
        # The residuals only measure: they must not enter the derivative of a run that is being unrolled.
        evaluate = tree.value_and_grad(loss)
        first_value, first_gradient = evaluate(jax.lax.stop_gradient(init))
        value, gradient = evaluate(jax.lax.stop_gradient(params))
        first_residual = self._residual(init, first_gradient, params, gradient)
        residual = self._residual(params, gradient, init, first_gradient)
        health = final_status(first_value, first_residual, params, value, residual)
        status = worst(self._unfinished(residual, stop), health)
        return Solution(params, residual, jnp.int32(2), jnp.int32(0), status, ())

    def solve_differentiably(
        self, losses: UnrolledLosses, init: Params, *, truncate: int | None, checkpoint: bool
    ) -> Params:
        """See `InnerSolver.solve_differentiably`: the function is differentiated as a whole.

        Raises:
          TypeError: for a host function, or with `truncate`, since its steps are not known.
        """
        if self.host:
            return super().solve_differentiably(losses, init, truncate=truncate, checkpoint=checkpoint)
        if truncate is not None:
            raise TypeError(
                "CallableSolver cannot be truncated: which of its steps are the last is not known from outside. "
                "Put `jax.lax.stop_gradient` into the function, or use `OptaxDescent(optimizer, num_steps=...)`."
            )

        def learn(start: Params) -> Params:
            return self._learn(losses.loss, start)

        return jax.checkpoint(learn)(init) if checkpoint else learn(init)

    def check_holomorphic(self, params: Params) -> None:
        """Trace a JAX function on a quadratic of complex parameters; a host function is real."""
        if self.host:
            super().check_holomorphic(params)
        require_holomorphic(
            lambda start: self._call(_quadratic, start, self.meta_params),
            params,
            what=f"CallableSolver's learner `{_name(self.fn)}`",
            remedy="It needs `jax.grad(loss, holomorphic=True)` where `init` is complex, and a fixed number of steps.",
        )

    def _learn(self, loss: InnerLoss, init: Params) -> Params:
        params = self._call(loss, init, self.meta_params)
        check_same_structure(
            params,
            init,
            f"CallableSolver: what `{_name(self.fn)}` returned",
            "Return parameters with the structure, shapes and dtypes of `init`.",
        )
        return params

    def _residual(self, params: Params, gradient: Params, other: Params, other_gradient: Params) -> jax.Array:
        """The gradient norm, or that of the proximal step, whose length is taken from two points."""
        if self.walls is None:
            return tree.norm(gradient)
        kept = jax.lax.stop_gradient((params, other))
        return fixed_point_residual(self.walls, kept[0], gradient, kept[1], other_gradient)

    def _unfinished(self, residual: jax.Array, stop: Stop) -> jax.Array:
        tol = self.tol if stop.tol is None else stop.tol
        return flag(False if tol is None else ~(residual <= tol), Status.FREE_NOT_CONVERGED)

    def _solve_on_host(self, loss: InnerLoss, init: Params, stop: Stop) -> Solution:
        if tree.is_complex(init):
            self.check_holomorphic(init)
        like = _Like(init, _name(self.fn))
        meta_params = self.meta_params if self._takes_meta_params else ()
        given = _Like(meta_params, _name(self.fn))
        # What the function is given beside the loss travels to the host as a part of the start.
        size = sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(init))

        def learn(host_loss: HostLoss, start: Vector, tol: float, max_steps: int) -> Vector:
            rest = start[size:]
            loss_on_host = LossOnHost(PaddedLoss(host_loss, rest) if rest.size else host_loss, like)
            params = self._call(loss_on_host, like.unravel(start[:size]), given.unravel(rest))
            return np.concatenate([like.ravel(params, "returned"), rest])

        def of_both(both: tuple[Params, MetaParams]) -> jax.Array:
            return loss(both[0])

        end = learn_on_host(learn, of_both, (init, meta_params), tol=0.0, max_steps=0)
        params, residual = end.params[0], end.residual
        if self.walls is not None:
            gradients = [tree.grad(loss)(at) for at in (params, init)]
            residual = self._residual(params, gradients[0], init, gradients[1])
        health = final_status(end.first_loss, end.first_residual, params, end.loss, end.residual)
        status = worst(self._unfinished(residual, stop), health)
        return Solution(params, residual, end.num_gradients, end.num_evaluations, status, ())


class LossOnHost:
    """The loss as a host function is given it: pytrees of NumPy arrays in, numbers out."""

    def __init__(self, loss: HostLoss | PaddedLoss, like: "_Like") -> None:
        self._loss = loss
        self._like = like

    def __call__(self, params: Params) -> float:
        """The loss at `params`."""
        return self._loss(self._like.ravel(params, "asked for the loss at"))

    def value_and_grad(self, params: Params) -> tuple[float, Params]:
        """The loss at `params` and its gradient, a pytree like `params`."""
        value, gradient = self._loss.value_and_grad(self._like.ravel(params, "asked for the gradient at"))
        return value, self._like.unravel(gradient)


class _Like:
    """`ravel_pytree` for the host, without JAX arrays: the structure, shapes and dtypes of `init`."""

    def __init__(self, init: Params, name: str) -> None:
        leaves = jax.tree.leaves(init)
        self._structure: Any = jax.tree.structure(init)
        self._shapes = [jnp.shape(leaf) for leaf in leaves]
        self._dtypes = [np.dtype(jnp.result_type(leaf)) for leaf in leaves]
        self._name = name

    def ravel(self, params: Params, verb: str) -> Vector:
        """`params` as one float64 vector.

        Raises:
          ValueError: it has another structure or other shapes than `init`.
        """
        leaves, structure = jax.tree.flatten(params)
        arrays = [np.asarray(leaf, np.float64) for leaf in leaves] if structure == self._structure else []
        shapes = [array.shape for array in arrays]
        if structure != self._structure or shapes != self._shapes:
            raise ValueError(
                f"CallableSolver: `{self._name}` {verb} parameters unlike `init`: expected {self._structure} with "
                f"shapes {self._shapes}, got {structure} with shapes {[np.shape(leaf) for leaf in leaves]}. "
                "Keep the structure and the shapes of `init`."
            )
        return np.concatenate([np.zeros(0), *(array.reshape(-1) for array in arrays)])

    def unravel(self, vector: Vector) -> Params:
        """The pytree that a vector holds, each leaf a NumPy array of its own in its own dtype."""
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])
        pieces = np.split(vector, ends[:-1]) if self._shapes else []
        leaves = [
            piece.reshape(shape).astype(dtype)
            for piece, shape, dtype in zip(pieces, self._shapes, self._dtypes, strict=True)
        ]
        return jax.tree.unflatten(self._structure, leaves)


def _quadratic(params: Params) -> jax.Array:
    return jnp.asarray(sum(jnp.sum((leaf - 1.0) ** 2) for leaf in jax.tree.leaves(params)))


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
