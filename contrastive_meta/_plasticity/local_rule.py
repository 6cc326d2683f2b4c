"""A rule that says what reaches a synapse apart from what the synapse makes of it."""

import abc

import jax

from contrastive_meta._plasticity.autodiff import PlasticityRule
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task
from contrastive_meta._pytree import PyTree, static, strategy


@strategy
class Signal:
    """Something that reaches the synapses of one leaf of the meta-parameters, by whatever way.

    Args:
      value: the array.
      axes: for each axis of `value`, the axis of the leaf that it runs along, or None for examples and time. What runs
        along axis 0 of a kernel of shape (inputs, outputs) is there at every synapse of one presynaptic neuron; what
        runs along no axis is there at all of them.

    Raises:
      ValueError: two axes are said to run along the same one.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> cm.Signal(jnp.ones((20, 3)), axes=(None, 0)).axes  # 20 examples of 3 presynaptic activities
      (None, 0)
    """

    value: jax.Array
    axes: tuple[int | None, ...] = static()

    def __post_init__(self) -> None:
        """Check that the axes differ."""
        along = [axis for axis in self.axes if axis is not None]
        if len(set(along)) != len(along):
            raise ValueError(
                f"No two axes of a signal may run along the same axis of its leaf; got {self.axes}. State None for "
                "examples and time."
            )


class LocalRule(PlasticityRule):
    """A rule whose statistic at a synapse is made of what is there: its own parameters and the signals it receives.

    `signals` says what arrives, from wherever; `measure` may only combine. `check_local` proves that it does no more.

    Example:
      >>> import contrastive_meta as cm
      >>> isinstance(cm.AnchoredSynapse(), cm.LocalRule)
      True
    """

    def signals(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> PyTree:
        """What reaches each synapse in this phase; by default nothing.

        Returns:
          A pytree that has, where `meta_params` has a leaf, any pytree of `Signal`s to it; or () for none at all.
        """
        return ()

    @abc.abstractmethod
    def measure(self, params: Params, meta_params: MetaParams, signals: PyTree) -> MetaParams:
        """The statistic, from what is at each synapse: a pytree like `meta_params`.

        Args:
          params: where the phase ended.
          meta_params: theta.
          signals: what `signals` returned.
        """

    def statistic(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> MetaParams:
        """See `PlasticityRule.statistic`."""
        return self.measure(params, meta_params, self.signals(problem, params, meta_params, task, beta))
