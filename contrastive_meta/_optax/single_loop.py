"""Tuning in a single loop: nudged iterates train beside the parameters, one gradient step each per training step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from contrastive_meta import _pytree as tree
from contrastive_meta._base_point import UNCONVERGED
from contrastive_meta._control import cast_like
from contrastive_meta._nudging import NudgeScheme, forward_difference
from contrastive_meta._optax._interop import as_transformation
from contrastive_meta._optax.tuning_mode import Measured, Schedule, Training, TuningMode
from contrastive_meta._problem import MetaParams, Number, Params, float_dtype_of
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._result import Status, flag, make_diagnostics, worst
from contrastive_meta._solvers._descend import one_step

# Beyond this displacement, relative to the parameters, a nudged iterate is somewhere else.
_UNBOUNDED = 0.5


class NudgedIterates(NamedTuple):
    """What `SingleLoop` keeps.

    Attributes:
      params: the nudged iterates; every leaf has a leading axis of nudged phases.
      opt_state: states of their optimisers, likewise.
      learning: norms of the gradients that training took, added up.
      nudging: norms of the outer gradients at the first nudged iterate, added up.
    """

    params: Params
    opt_state: PyTree
    learning: jax.Array
    nudging: jax.Array


class _Losses(NamedTuple):
    """Both losses at a nudged iterate, each with its gradients in parameters and meta-parameters."""

    inner: tuple[jax.Array, tuple[Params, MetaParams]]
    outer: tuple[jax.Array, tuple[Params, MetaParams]]


class _Phase(NamedTuple):
    """One phase as it stands: where, the loss and its gradient there, and what the rule measures."""

    params: Params
    loss: jax.Array
    residual: Params
    statistic: MetaParams
    outer_grad: Params


@strategy
class SingleLoop(TuningMode):
    """Parameters, nudged iterates and meta-parameters all move by one step at a time.

    The parameters in training are the free iterate. A nudged iterate follows the gradient of L_in + beta L_out, on the
    same batch and by the same kind of optimiser; the contrast of what the two measure moves the meta-parameters. It
    costs a gradient of either loss and two statistics beside the training step: about three gradients in all. Nothing
    is truncated: where everything comes to rest, the contrast is that of two finished phases. That takes
    meta-parameters that move more slowly than the parameters learn, and `grads` that are the gradient of `inner_loss`
    on `task` itself: `problem.sample` is not used.

    Args:
      beta: nudging strength, inner over outer loss in units, or a function of the training step; 1 / beta is the
        penalty of F2SA. It has to change more slowly than the parameters learn. None for one that makes the nudge as
        strong as what training itself follows: the mean norm, over all steps so far, of the gradients of training over
        that of the outer gradients. With minibatches that is far above the noise that parts the iterates for no
        reason; where training comes to rest it falls as one over the number of steps, and the bias with it. The units
        of the losses do not matter.
      optimizer: of the nudged iterates; None for the one in training.
      scheme: from beta to the phases. A phase with strength 0 is the parameters themselves; the others are iterates in
        the state: two of them for `central_difference`, whose bias is O(beta^2).
      sequential: evaluate one iterate after another, each compiled for itself, where there are two. For convolutional
        networks on a CPU, where XLA compiles two side by side into slow grouped convolutions.

    Reference:
      Kwon, Kwon, Wright & Nowak (2023), F2SA, algorithm 1, its single-loop form.

    Example:
      >>> import contrastive_meta as cm
      >>> mode = cm.SingleLoop(beta=lambda step: 1.0 / (10 + step))
    """

    beta: Number | Schedule | None = None
    optimizer: optax.GradientTransformation | None = static(default=None)
    scheme: Callable[[Number], NudgeScheme] = static(default=forward_difference)
    sequential: bool = static(default=False)

    @property
    def usual_every(self) -> int:
        """Meta-parameters move in every training step."""
        return 1

    def init(self, optimizer: optax.GradientTransformationExtraArgs, params: Params) -> NudgedIterates:
        """All iterates start at the parameters."""
        own = self._own(optimizer)
        _, running = self._phases(1.0)
        # New buffers: the parameters must not be donated twice.
        stacked = jax.tree.map(lambda x: jnp.stack([x] * len(running)), params)
        nothing = jnp.zeros((), tree.promoted(tree.float_dtype(params), jnp.float32))
        return NudgedIterates(stacked, jax.vmap(own.init)(stacked), nothing, jnp.zeros_like(nothing))

    def follow(
        self,
        optimizer: optax.GradientTransformationExtraArgs,
        training: Training,
        memory: NudgedIterates,
        due: jax.Array,
        last: Measured,
    ) -> tuple[NudgedIterates, Measured]:
        """See `TuningMode.follow`. Iterates move in every step, so they are measured in every step."""
        problem, meta_params, batch = training.problem, training.meta_params, training.batch
        dtype = float_dtype_of(problem, training.params, meta_params, batch)
        own = self._own(optimizer)
        with jax.default_matmul_precision("highest"):
            losses = self._each(lambda params: _evaluate(training, dtype, params), memory.params)
            learning = memory.learning + tree.norm(training.grads)
            nudging = memory.nudging + tree.norm(jax.tree.map(lambda xs: xs[0], losses.outer[1][0]))
            balance = learning / tree.or_one(nudging)
            # Where there was nothing to learn yet the iterates are the parameters still: a strength that does not
            # amplify rounding.
            balance = jnp.where(learning > 0, balance, 1.0)
            balance = jnp.maximum(balance.astype(dtype), jnp.finfo(dtype).tiny ** 0.5)
            scheme, running = self._phases(balance if self.beta is None else self.beta)
            nudges = scheme.arrays(dtype)[0][jnp.array(running)]
            nudged = jax.vmap(_nudged_phase)(memory.params, losses, nudges)
            measured = _contrast(scheme, running, training, dtype, nudged)

            def advance(phase: _Phase, beta: jax.Array, state: PyTree) -> tuple[Params, PyTree]:
                def loss(at: Params) -> jax.Array:
                    return problem.nudged(at, meta_params, batch, beta)

                return one_step(own, loss, phase.loss, phase.residual, phase.params, state)

            params, states = self._each(advance, nudged, nudges, memory.opt_state)
            moved = NudgedIterates(params, states, learning, nudging)
        # An iterate that is lost starts again from the parameters; the status says so.
        kept = tree.where(
            tree.all_finite(moved._replace(opt_state=())),
            cast_like(moved, memory),
            self.init(optimizer, training.params),
        )
        return kept, tree.where(due, cast_like(measured, last), last)

    def _each(self, function: Callable[..., Any], *stacked: Any) -> Any:
        """A function of every iterate, stacked."""
        number = len(self._phases(1.0)[1])
        if number > 1 and not self.sequential:
            return jax.vmap(function)(*stacked)
        found = [function(*of_one) for of_one in tree.unstack(stacked, number)]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *found)

    def _own(self, optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
        return optimizer if self.optimizer is None else as_transformation(self.optimizer, "SingleLoop.optimizer")

    def _phases(self, beta: Any) -> tuple[NudgeScheme, list[int]]:
        """The scheme at a strength, and which of its phases are iterates in the state."""
        if callable(beta):
            raise TypeError("A schedule of beta has a value at a step only: call `mode.at(step)` first.")
        scheme = self.scheme(beta)
        if scheme.is_complex:
            raise TypeError(
                "`SingleLoop` trains nudged iterates like `params`: it needs a real scheme, got a complex one."
            )
        return scheme, [k for k in range(len(scheme.nudges)) if k != scheme.free_phase]


def _evaluate(training: Training, dtype: Any, params: Params) -> _Losses:
    problem, meta_params, batch = training.problem, tree.at_least(training.meta_params, dtype), training.batch
    inner = jax.value_and_grad(problem.inner, argnums=(0, 1))(params, meta_params, batch)
    return _Losses(inner, jax.value_and_grad(problem.outer, argnums=(0, 1))(params, meta_params, batch))


def _nudged_phase(params: Params, losses: _Losses, beta: jax.Array) -> _Phase:
    """What a phase of strength beta has for a loss, a gradient and a statistic where its iterate is."""
    (inner, inner_grads), (outer, outer_grads) = losses
    residual, statistic = tree.add_scaled(inner_grads, beta, outer_grads)
    return _Phase(params, inner + beta * outer, residual, statistic, outer_grads[0])


def _contrast(scheme: NudgeScheme, running: list[int], training: Training, dtype: Any, nudged: _Phase) -> Measured:
    """The contrast of what the phases measure, theory (8), and of their parameters and their residuals."""
    problem, batch = training.problem, training.batch
    phases = nudged.params, nudged.residual, nudged.statistic
    if scheme.free_phase is not None:
        statistic = jax.grad(problem.inner, argnums=1)(
            training.params, tree.at_least(training.meta_params, dtype), batch
        )
        free = training.params, training.grads, statistic
        phases = jax.tree.map(lambda xs, x: jnp.insert(xs, scheme.free_phase, x, axis=0), phases, free)
    response, residual, grad = scheme.contrast(phases)
    outer_loss = problem.outer(training.params, training.meta_params, batch)
    strength, nudge = scheme.strength(dtype), tree.norm(jax.tree.map(lambda xs: xs[0], nudged.outer_grad))
    displacement = strength * tree.norm(response) / tree.or_one(tree.norm(training.params))
    relative_residual = tree.norm(residual) / tree.or_one(nudge)
    status = worst(
        Status.APPROXIMATE,
        flag(relative_residual > UNCONVERGED, Status.NUDGED_NOT_CONVERGED),
        flag(displacement > _UNBOUNDED, Status.UNBOUNDED_NUDGE),
        flag(~tree.all_finite((phases, grad, outer_loss)), Status.NOT_FINITE),
        scheme.validity(dtype),
    )
    diagnostics = make_diagnostics(
        dtype,
        beta=strength,
        free_residual=tree.norm(training.grads),
        nudged_residual=relative_residual,
        displacement=displacement,
        num_gradients=len(scheme.nudges),
        status=status,
    )
    return Measured(grad, outer_loss, diagnostics)
