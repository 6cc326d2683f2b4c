"""Tuning by short runs: now and then a nudged phase and its matched control start from the parameters in training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._contrastive.contrastive import Contrastive
from contrastive_meta._contrastive.nudged_by import NudgedLearner
from contrastive_meta._control import cast_like, only_if
from contrastive_meta._nudging import (
    LossNudge,
    NudgeScheme,
    NudgeStrength,
    RelativeStrength,
    forward_difference,
    relative,
)
from contrastive_meta._optax.tuning_mode import Measured, Schedule, Training, TuningMode
from contrastive_meta._problem import Number, Params
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._response import Probe
from contrastive_meta._result import EstimatorState
from contrastive_meta._solvers.base import InnerSolver
from contrastive_meta._solvers.optax_descent import OptaxDescent

# What may be spent to find the least strength that rounding allows: its order of magnitude will do.
_NUM_PILOT_STEPS = 2


@strategy
class _AsStrongAsLearning(NudgeStrength):
    """A strength at which the outer loss pulls as hard as the inner loss still does.

    Args:
      least: the strength that it never falls below.
    """

    least: RelativeStrength

    def template(self) -> NudgeScheme:
        """The scheme at strength 1."""
        return self.least.template()

    def resolve(self, probe: Probe) -> tuple[NudgeScheme, jax.Array]:
        """The ratio of the gradients, or where learning is over what a pilot finds."""
        scheme, num_gradients = self.least.resolve(probe)
        balance = tree.norm(probe.free_grad) / tree.or_one(probe.nudge_norm)
        strength = jnp.maximum(scheme.strength(probe.dtype), jnp.where(jnp.isfinite(balance), balance, 0.0))
        return self.template().scaled(strength.astype(probe.dtype)), num_gradients


@strategy
class Alternating(TuningMode):
    """Train; every so often run a short nudged phase and its matched control, and move the meta-parameters.

    The current parameters are the free phase. From them learning goes on twice, side by side, for the same number of
    steps on the same minibatches, once with beta times the outer loss added: `Contrastive` with a free phase of no
    steps. The runs are then thrown away. K steps answer as much of the nudge as K terms of a Neumann series: the
    meta-gradient points the right way long before it has the right length, and is unbiased only where the phases run
    to their end.

    Args:
      nudged_solver: the learner of both runs; None for the optimiser in training itself, with its state. One with
        fixed coefficients, `OptaxDescent(optax.sgd(0.1, momentum=0.9), num_steps=20)`, cancels unfinished learning
        exactly; Adam nearly so.
      num_nudged_steps: steps of each run where it is the optimiser in training; a `nudged_solver` brings its own.
      beta: nudging strength, inner over outer loss in units, or a function of the training step; None for one at which
        the outer loss's gradient is as long as the inner loss's, measured every time: of the order of what training
        does anyway, and vanishing, down to what rounding allows, where training comes to rest. The units of the losses
        do not matter. The bias of `forward_difference` grows with it: at ten times as much, decays and augmentation
        strengths of small networks were moved the wrong way.
      scheme: from beta to the phases; `central_difference` costs the same and has a bias of O(beta^2), but nudges the
        wrong way once.
      estimate_error: see `Contrastive`; off by default, since it costs gradients.
      sequential: see `Contrastive`: one run after the other. For convolutional networks on a CPU, where XLA compiles
        two side by side into slow grouped convolutions.
      unroll: see `OptaxDescent`, of the steps of the optimiser in training; a `nudged_solver` brings its own.

    Raises:
      ValueError: a negative number of steps.

    Reference:
      Zucchet et al. (2022), section 3; Liu, Simonyan & Yang (2019), DARTS, for the alternation.

    Example:
      >>> import optax
      >>> import contrastive_meta as cm
      >>> mode = cm.Alternating(cm.OptaxDescent(optax.sgd(0.1), num_steps=20), beta=lambda step: 0.1 * 0.999**step)
    """

    nudged_solver: NudgedLearner | None = None
    num_nudged_steps: int = static(default=5)
    beta: Number | Schedule | None = None
    scheme: Callable[[Number], NudgeScheme] = static(default=forward_difference)
    estimate_error: bool = static(default=False)
    sequential: bool = static(default=False)
    unroll: int | bool = static(default=1)

    def __post_init__(self) -> None:
        """Check the number of steps."""
        if self.num_nudged_steps < 1:
            raise ValueError(f"`num_nudged_steps` must be at least 1; got {self.num_nudged_steps}.")

    @property
    def usual_every(self) -> int:
        """Ten training steps, of which the runs cost about as much again twice."""
        return 10

    def init(self, optimizer: optax.GradientTransformationExtraArgs, params: Params) -> PyTree:
        """Nothing is kept."""
        return ()

    def follow(
        self,
        optimizer: optax.GradientTransformationExtraArgs,
        training: Training,
        memory: PyTree,
        due: jax.Array,
        last: Measured,
    ) -> tuple[PyTree, Measured]:
        """See `TuningMode.follow`."""

        def measure(_: Measured) -> Measured:
            at = training
            start = EstimatorState.fresh(at.params, at.opt_state, last.outer_loss.dtype)
            result = self._estimator(optimizer).estimate(at.problem, at.meta_params, at.batch, state=start, key=at.key)
            return cast_like(Measured(result.grad, result.outer_loss, result.diagnostics), last)

        return memory, only_if(due, measure, last)

    def _estimator(self, optimizer: optax.GradientTransformationExtraArgs) -> Contrastive:
        """A contrast whose free phase is over: the parameters are what training made of them so far."""

        def steps(number: int) -> Any:
            return OptaxDescent(optimizer, num_steps=number, carry_state=True, unroll=self.unroll)

        nudged = self.nudged_solver or steps(self.num_nudged_steps)
        reruns = isinstance(nudged, InnerSolver)
        return Contrastive(
            steps(0),
            nudged,
            self._strength(reruns),
            # A run that diverges is reported. There is no fallback: a second pair would double the time to compile.
            LossNudge() if reruns else None,
            sequential=self.sequential,
            estimate_error=self.estimate_error,
        )

    def _strength(self, reruns: bool) -> NudgeStrength:
        if self.beta is not None:
            return self.scheme(self.beta)  # type: ignore[arg-type]
        least = relative(self.scheme, num_pilot_steps=_NUM_PILOT_STEPS)
        # The fast learner goes to where learning ends, and the strength that follows learning with it.
        return _AsStrongAsLearning(least) if reruns else least
