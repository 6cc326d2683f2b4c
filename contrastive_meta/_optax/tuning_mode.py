"""What a mode of `tune_while_training` offers: a meta-gradient out of one training step, and what it keeps for that."""

import abc
import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from contrastive_meta._optax._interop import fill
from contrastive_meta._problem import BilevelProblem, MetaParams, ModelState, Number, Params, Task
from contrastive_meta._pytree import PyTree
from contrastive_meta._result import Diagnostics

Mode = TypeVar("Mode", bound="TuningMode")
Schedule = Callable[[jax.Array], Any]


class Training(NamedTuple):
    """One step of an ordinary training loop, before its update is applied.

    Attributes:
      problem: the losses, for what is visible of the parameters and for a `Batch`.
      params: the parameters, or what a mask leaves of them.
      grads: gradient of the inner loss there, as the user passed it.
      meta_params: the values in use.
      batch: the data.
      opt_state: of the wrapped optimiser.
      key: PRNG key of this step.
    """

    problem: BilevelProblem
    params: Params
    grads: Params
    meta_params: MetaParams
    batch: "Batch"
    opt_state: PyTree
    key: jax.Array


class Measured(NamedTuple):
    """A meta-gradient, and how far it can be trusted.

    Attributes:
      grad: dPhi/dtheta.
      outer_loss: at the parameters.
      diagnostics: as those of every estimator.
    """

    grad: MetaParams
    outer_loss: jax.Array
    diagnostics: Diagnostics


class TuningMode(abc.ABC):
    """How `tune_while_training` gets its meta-gradients: `Alternating` or `SingleLoop`.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.SingleLoop(beta=0.1), cm.TuningMode)
      True
    """

    beta: Number | Schedule | None

    @property
    @abc.abstractmethod
    def usual_every(self) -> int:
        """The number of training steps from one meta-step to the next where the user does not say."""

    def at(self: Mode, step: jax.Array) -> Mode:
        """The mode at a training step: its schedule's value in the place of the schedule."""
        if not callable(self.beta):
            return self
        resolved: Mode = dataclasses.replace(self, beta=self.beta(step))  # type: ignore[type-var]
        return resolved

    @abc.abstractmethod
    def init(self, optimizer: optax.GradientTransformationExtraArgs, params: Params) -> PyTree:
        """What the mode keeps from step to step, before the first."""

    @abc.abstractmethod
    def follow(
        self,
        optimizer: optax.GradientTransformationExtraArgs,
        training: Training,
        memory: PyTree,
        due: jax.Array,
        last: Measured,
    ) -> tuple[PyTree, Measured]:
        """Take part in one training step.

        Args:
          optimizer: the wrapped optimiser.
          training: the step.
          memory: what was kept.
          due: whether the meta-parameters move in this step.
          last: what to return as measured where they do not.

        Returns:
          What to keep, and what was measured.
        """


class Batch(NamedTuple):
    """What the losses of `on_visible` take as their task.

    Attributes:
      task: the user's.
      params: where the inner problem starts: the parameters in training.
      unmasked: all parameters where a mask hides some, else the same as `params`.
      model_state: as training has it; () for problems without one.
    """

    task: Task
    params: Params
    unmasked: Params
    model_state: ModelState = ()


def on_visible(problem: BilevelProblem) -> BilevelProblem:
    """The problem whose `params` are what a mask leaves of them, and whose task is a `Batch`, its model state held."""
    losses = dataclasses.replace(problem, init_params=_start, sample=None)
    return BilevelProblem(
        _OnVisible(losses, _INNER),
        _OnVisible(losses, _OUTER),
        _start,
        has_aux=problem.has_aux,
        sample=None if problem.sample is None else _OfTask(problem.sample),
    )


_INNER, _OUTER = operator.attrgetter("inner_loss"), operator.attrgetter("outer_loss")


# Instances with equal fields are equal, so that a transformation made anew compiles nothing anew.
@dataclasses.dataclass(frozen=True)
class _OnVisible:
    losses: BilevelProblem
    which: Callable[[BilevelProblem], Callable[..., Any]]

    def __call__(self, params: Params, meta_params: MetaParams, batch: Batch) -> Any:
        loss = self.which(self.losses.at(batch.model_state))
        return loss(fill(params, batch.unmasked), meta_params, batch.task)


@dataclasses.dataclass(frozen=True)
class _OfTask:
    sample: Callable[[jax.Array, Task, jax.Array], Task]

    def __call__(self, key: jax.Array, batch: Batch, step: jax.Array) -> Batch:
        return batch._replace(task=self.sample(key, batch.task, step))


def _start(meta_params: MetaParams, batch: Batch) -> Params:
    return jax.tree.map(jnp.asarray, batch.params)
