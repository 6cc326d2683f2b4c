"""What every inner solver offers: from a loss and a start to a solution that says how far it came."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import MetaParams, ModelState, Params, Task
from contrastive_meta._pytree import PyTree
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers.constraint import BoundConstraints
from contrastive_meta._solvers.penalty import BoundPenalty

InnerLoss = Callable[[Params], jax.Array]
MinibatchLoss = Callable[[Params, jax.Array], jax.Array]


class Stop(NamedTuple):
    """When a solve ends, where the caller knows better than the solver's own settings.

    Attributes:
      tol: tolerance on the gradient norm, or None for the solver's own.
      max_steps: step budget, possibly traced, or None for the solver's own.
      group: name of the mapped axis whose members take the same number of steps: all go on until all are done.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> solver = cm.OptaxDescent(optax.sgd(0.1), tol=1e-6)
      >>> int(solver.solve(lambda w: jnp.sum(w**2), jnp.ones(2), stop=cm.Stop(max_steps=3)).num_steps)
      3
    """

    tol: Any = None
    max_steps: Any = None
    group: str | None = None


class Solution(NamedTuple):
    """Where learning ended.

    Attributes:
      params: the solution.
      residual: norm of the gradient of the (full) loss at `params`.
      num_gradients: gradients evaluated, int32.
      num_steps: steps taken, int32.
      status: value of a `Status`.
      memory: what `solve(..., memory=)` takes to go on from here; () for solvers without any.
      model_state: as `solve_with_state` left it; else ().

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> solution = cm.LBFGS().solve(lambda w: jnp.sum((w - 1.0) ** 2), jnp.zeros(2))
      >>> cm.Status(int(solution.status)).name
      'CONVERGED'
    """

    params: Params
    residual: jax.Array
    num_gradients: jax.Array
    num_steps: jax.Array
    status: jax.Array
    memory: PyTree
    model_state: ModelState = ()


class Held(NamedTuple):
    """How a learner's own fixed points differ from the zeros of the loss's gradient, next to a point.

    Attributes:
      entries: booleans like `params`: entries that the learner leaves where they are, whatever a small nudge says.
      decay: factors c like `params`: the learner rests where the gradient is -c `params` in the other entries.
      known: whether that is all; otherwise the learner moves in a way that this does not describe.
    """

    entries: Params
    decay: Params
    known: jax.Array

    def residual(self, params: Params, gradient: Params) -> Params:
        """Zero where the learner rests: the gradient, decay added, of the entries that are free."""

        def free(held: jax.Array, decay: jax.Array, x: jax.Array, g: jax.Array) -> jax.Array:
            return jnp.where(held, jnp.zeros_like(g), g + decay.astype(x.dtype) * x)

        return jax.tree.map(free, self.entries, self.decay, params, gradient)


class UnrolledLosses(NamedTuple):
    """The inner loss of each step, for unrolling.

    Attributes:
      loss: `params -> scalar`, the whole loss.
      minibatch_loss: `(params, step) -> scalar`, or None.
      detached: `(params, step) -> scalar`, the same values with no derivative in the meta-parameters.
    """

    loss: InnerLoss
    minibatch_loss: MinibatchLoss | None
    detached: MinibatchLoss


class MovingLosses(NamedTuple):
    """The inner loss of a model with state, which every forward pass moves.

    Attributes:
      loss: `(params, model_state) -> (scalar, model_state)`, the whole loss.
      minibatch_loss: `(params, model_state, step) -> (scalar, model_state)`, or None.
    """

    loss: Callable[[Params, ModelState], tuple[jax.Array, ModelState]]
    minibatch_loss: Callable[[Params, ModelState, jax.Array], tuple[jax.Array, ModelState]] | None

    @classmethod
    def without_state(cls, loss: InnerLoss, minibatch_loss: MinibatchLoss | None) -> "MovingLosses":
        """Losses of a model whose state is ()."""
        if minibatch_loss is None:
            return cls(lambda params, _: (loss(params), ()), None)
        return cls(lambda params, _: (loss(params), ()), lambda params, _, step: (minibatch_loss(params, step), ()))

    def of_step(self, params: Params, model_state: ModelState, step: jax.Array) -> tuple[jax.Array, ModelState]:
        """What the step of this number descends."""
        if self.minibatch_loss is None:
            return self.loss(params, model_state)
        return self.minibatch_loss(params, model_state, step)

    def held(self, model_state: ModelState) -> InnerLoss:
        """The whole loss at a fixed model state."""
        return lambda params: self.loss(params, model_state)[0]


class InnerSolver(abc.ABC):
    """A learner: minimises a loss from a starting point.

    Subclasses are final strategies. `solve` must work under jit and vmap; only a solver meant for
    `BackpropThroughLearning` need be differentiable.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.LBFGS(), cm.InnerSolver)
      True
    """

    @abc.abstractmethod
    def solve(
        self,
        loss: InnerLoss,
        init: Params,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
        stop: Stop = Stop(),
    ) -> Solution:
        """Minimise `loss` from `init`.

        Args:
          loss: `params -> scalar`, the whole loss. It may close over traced values.
          init: pytree of floating arrays (complex ones in a complex phase).
          minibatch_loss: `(params, step) -> scalar`, followed instead of `loss` by solvers that take stochastic
            steps; the others minimise `loss`.
          memory: from an earlier solution's `memory`; () starts afresh.
          stop: overrides of the solver's own stopping rule.
        """

    def solve_free(
        self,
        loss: InnerLoss,
        init: Params,
        meta_params: MetaParams,
        task: Task,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
    ) -> Solution:
        """The free phase; differs from `solve` only where the learner is given the task instead of a loss.

        Args:
          loss: as for `solve`.
          init: as for `solve`.
          meta_params: of the problem.
          task: of the problem.
          minibatch_loss: as for `solve`.
          memory: as for `solve`.
        """
        return self.bind(meta_params).solve(loss, init, minibatch_loss=minibatch_loss, memory=memory)

    def solve_with_state(
        self, losses: "MovingLosses", init: Params, model_state: ModelState, *, memory: PyTree = ()
    ) -> Solution:
        """The free phase of a model with state: as `solve`, the forward pass of every step taken moving the state once.

        What else the learner evaluates, line searches and residuals, reads the state and leaves it as it is.

        Args:
          losses: what to minimise.
          init: as for `solve`.
          model_state: with which learning starts.
          memory: as for `solve`.

        Raises:
          TypeError: the learner has no steps of which each moves the state once.
        """
        raise self._cannot_move_state()

    def _cannot_move_state(self) -> TypeError:
        return TypeError(
            f"{type(self).__name__} cannot move a model state (`init_model_state`): none of its evaluations of the "
            "loss is the forward pass of a step. Learn with `OptaxDescent(...)`; or hold the state, "
            "`problem.at(model_state)`, which makes an ordinary problem for any learner."
        )

    @property
    def takes_losses(self) -> bool:
        """Whether `solve` minimises the loss it is given, a nudged one for instance."""
        return True

    @property
    def descends_loss(self) -> bool:
        """Whether the learner follows the gradient of the loss it is given, so that another may run on from its end.

        `Contrastive` then lets a faster learner run the nudged phases. Learners that minimise something else, or that
        may not be looked into, run their own.
        """
        return False

    @property
    def step_budget(self) -> int | jax.Array:
        """The most steps that a solve takes where `stop.max_steps` is None."""
        return 2**31 - 1

    def rests_at(self, params: Params, gradient: Params) -> jax.Array:
        """Whether the learner stays at `params` where the gradient vanishes, and moves each leaf that has one.

        Only asked of learners that descend the loss: weight decay, projections and frozen leaves in their updates make
        them end elsewhere than at its minimum.
        """
        return jnp.asarray(True)

    @property
    def walls(self) -> BoundPenalty | None:
        """The part of the learner's objective that the loss it is given leaves out, with its proximal step.

        Where there is one the learner rests at fixed points of w - prox(w - s grad, s), and estimators judge by that.
        Of a bound solver; None for learners that minimise the loss alone.
        """
        return None

    @property
    def held_to(self) -> BoundConstraints | None:
        """Constraints that the learner keeps to and that no proximal step describes; None for none.

        Of a bound solver. Where there are some, the learner rests where active ones hold the gradient back.
        """
        return None

    def held_at(self, params: Params, gradient: Params) -> Held | None:
        """What holds the learner at a point where the loss has this gradient.

        None where nothing ever does, which must be known without looking at numbers. Only asked of learners that
        descend the loss.
        """
        return None

    def init_memory(self, params: Params) -> PyTree:
        """A memory that carries nothing yet, in the structure of `Solution.memory`."""
        return ()

    def bind(self, meta_params: MetaParams) -> "InnerSolver":
        """The solver for these meta-parameters; differs from `self` only where settings are meta-learned."""
        return self

    def one_update(self, params: Params) -> PyTree:
        """Something computed from every setting that `bind` reads from meta-parameters; () where there are none."""
        return ()

    def solve_differentiably(
        self, losses: "UnrolledLosses", init: Params, *, truncate: int | None, checkpoint: bool
    ) -> Params:
        """The solution as a function that reverse mode can differentiate, for `BackpropThroughLearning`.

        Args:
          losses: the losses to follow, with and without derivative.
          init: where learning starts.
          truncate: differentiate only the last `truncate` steps; None for all.
          checkpoint: keep only every sqrt(num_steps)-th iterate and recompute the others on the way back.

        Raises:
          TypeError: the solver cannot be unrolled.
        """
        raise self._cannot_unroll()

    def _cannot_unroll(self) -> TypeError:
        return TypeError(
            f"{type(self).__name__} cannot be differentiated in reverse through its steps. "
            "Use `OptaxDescent(optimizer, num_steps=...)` or a differentiable `CallableSolver`; "
            "solvers that stop at a tolerance can be differentiated by `Contrastive` or `ImplicitDifferentiation`."
        )

    def solve_differentiably_with_state(
        self,
        losses: "MovingLosses",
        detached: "MovingLosses",
        init: Params,
        model_state: ModelState,
        *,
        truncate: int | None,
        checkpoint: bool,
    ) -> tuple[Params, ModelState]:
        """As `solve_differentiably`, for a model with state: solution and state, both to be differentiated through.

        Args:
          losses: the losses to follow.
          detached: the same without derivative in the meta-parameters.
          init: where learning starts.
          model_state: with which it starts.
          truncate: as for `solve_differentiably`.
          checkpoint: as for `solve_differentiably`.

        Raises:
          TypeError: the solver cannot be unrolled, or cannot move a state.
        """
        raise self._cannot_move_state()

    def check_holomorphic(self, params: Params) -> None:
        """Return if the solver's own operations are holomorphic, as complex phases need.

        Raises:
          TypeError: they are not, or are not known to be.
        """
        raise TypeError(
            f"Complex schemes need a learner whose steps are holomorphic; {type(self).__name__} is not. "
            "Pass `nudged_solver=OptaxDescent(optax.sgd(..., momentum=...), num_steps=...)`."
        )


def final_status(loss_before: Any, residual_before: Any, params: Params, loss: Any, residual: Any) -> jax.Array:
    """`NOT_FINITE`, `DIVERGED` (the loss rose and its gradient grew tenfold) or `CONVERGED`."""
    finite = tree.all_finite(params) & jnp.isfinite(residual) & jnp.isfinite(loss)
    grew = (jnp.real(loss) > jnp.real(loss_before)) & (residual > 10 * residual_before)
    return worst(flag(grew, Status.DIVERGED), flag(~finite, Status.NOT_FINITE))
