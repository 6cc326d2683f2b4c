"""Which synapses may learn: a slow mask over the fast changes of the weights."""

from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._plasticity.listening import Synapses, call_on, learn, listen
from contrastive_meta._plasticity.local_rule import LocalRule
from contrastive_meta._problem import BilevelProblem, MetaParams, Number, Params, Task
from contrastive_meta._pytree import PyTree, static, strategy


@strategy
class PlasticityMask(LocalRule):
    """Where to learn: a synapse's weight moves within a task as far as its mask lets it.

        w_i = omega_i + z_i d_i,   z = (1 + sign m) / 2   or   z = max(m, 0) when `graded`

    Fast, `params`: d, what each synapse would have changed. Slow, a dictionary of `"start"` omega and `"mask"` m, both
    like `params`. Gradients pass z straight through, in two places:

    - learning: d descends dL/dw_i, open or not, so that w descends z_i dL/dw_i and a closed synapse goes on noting
      what it would have changed;
    - meta-learning: dz/dm is 1/2, or 1 when `graded`, everywhere.

    The statistic of m_i is (dz/dm) d_i (dL/dw_i), and of omega_i dL/dw_i. With `FirstOrder(OptaxDescent(sgd(alpha)))`,
    d is -alpha times the sum of the gradients met, and the meta-gradient of m is sparse-MAML's,
    -(alpha / 2) (dL_out/dw) * (that sum).

    With `energy` in the inner loss, 1/2 strength sum_i z_i d_i^2, learning has an end also for closed synapses, and
    `Contrastive` applies. Its meta-gradient is exact where z > 0: with d = (w - omega) / z the energy is
    1/2 strength (w - omega)^2 / z, and the statistic its derivative in z at a solution. A closed synapse gets the limit
    of that, which to first order in the response is sparse-MAML's with 1 / strength for alpha. Where z is not the same
    for all synapses, what learning descends is no gradient in d. `NewtonKrylov`, the default of the nudged phases, goes
    by curvature as if it were, and then measures the residual of the nudge in the update itself: where that has not
    converged, the phases are run by the solver, status `FELL_BACK`. `nudged_solver=solver` runs them so from the
    beginning.

    Args:
      strength: of the pull back to the start.
      graded: z = max(m, 0), so that the mask is also a learning rate, instead of a switch.

    Reference:
      Von Oswald et al. (2021), Learning where to learn: sparse-MAML and sparse-ReLU-MAML.

    Example:
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> slow = {"start": jnp.zeros(3), "mask": jnp.array([0.5, -0.5, 2.0])}
      >>> cm.PlasticityMask().weights(jnp.ones(3), slow).tolist()
      [1.0, 0.0, 1.0]
    """

    strength: float | jax.Array = 1.0
    graded: bool = static(default=False)

    def weights(self, params: Params, meta_params: MetaParams) -> PyTree:
        """The weights w that the network uses.

        Args:
          params: d, any pytree.
          meta_params: "start" and "mask", pytrees like `params`.
        """
        change = jax.tree.map(lambda m, d: call_on(Gate(self.graded), m, d), meta_params["mask"], params)
        return jax.tree.map(lambda omega, c: call_on(Start(), omega, c), meta_params["start"], change)

    def energy(self, params: Params, meta_params: MetaParams) -> jax.Array:
        """1/2 strength sum_i z_i d_i^2, which pulls every weight back to its start."""
        held = jax.tree.map(lambda m, d: jnp.sum(call_on(Hold(self.graded), m, d)), meta_params["mask"], params)
        total = jnp.asarray(sum(jax.tree.leaves(held)))
        return jnp.asarray(self.strength, tree.float_dtype(total)) * total

    def signals(
        self, problem: BilevelProblem, params: Params, meta_params: MetaParams, task: Task, beta: Number
    ) -> PyTree:
        """What each synapse would have changed, and the derivative of the loss in its weight."""
        return listen(problem, params, meta_params, task, beta)

    def measure(self, params: Params, meta_params: MetaParams, signals: PyTree) -> MetaParams:
        """Their product, straight through the mask."""
        return learn(meta_params, signals)


def _open(graded: bool, mask: jax.Array) -> jax.Array:
    """The mask z; of the real part, for a mask never is complex but in name."""
    m = jnp.real(mask)
    return jnp.maximum(m, 0) if graded else (1 + jnp.sign(m)) / 2


def _slope(graded: bool) -> float:
    """The straight-through dz/dm."""
    return 1.0 if graded else 0.5


def _gated(graded: bool, mask: jax.Array, change: jax.Array) -> jax.Array:
    return _open(graded, mask) * change


def _held(graded: bool, mask: jax.Array, change: jax.Array) -> jax.Array:
    return _open(graded, mask) * jnp.square(change) / 2


_gate: Any = jax.custom_jvp(_gated, nondiff_argnums=(0,))
_hold: Any = jax.custom_jvp(_held, nondiff_argnums=(0,))


@_gate.defjvp  # type: ignore[untyped-decorator]
def _gate_jvp(graded: bool, at: Any, moved: Any) -> tuple[jax.Array, jax.Array]:
    (_, change), (mask_moved, change_moved) = at, moved
    return _gated(graded, *at), change_moved + _slope(graded) * change * mask_moved


@_hold.defjvp  # type: ignore[untyped-decorator]
def _hold_jvp(graded: bool, at: Any, moved: Any) -> tuple[jax.Array, jax.Array]:
    (_, change), (mask_moved, change_moved) = at, moved
    return _held(graded, *at), change * change_moved + _slope(graded) * jnp.square(change) / 2 * mask_moved


@strategy
class Gate(Synapses):
    """The mask over what each synapse would have changed: z d."""

    graded: bool = static()

    def forward(self, leaf: jax.Array, *incoming: jax.Array) -> jax.Array:
        """What of the change is let through."""
        gated: jax.Array = _gate(self.graded, leaf, *incoming)
        return gated

    def axes(self, *ndims: int) -> tuple[tuple[int | None, ...], ...]:
        """All at the synapse itself."""
        return tuple(tuple(range(ndim)) for ndim in ndims)

    def learn(self, leaf: jax.Array, *heard: jax.Array) -> jax.Array:
        """The change times the derivative in the weight, times dz/dm."""
        change, error = heard
        return _slope(self.graded) * change * error


@strategy
class Hold(Synapses):
    """The mask over the cost of a change: z d^2 / 2."""

    graded: bool = static()

    def forward(self, leaf: jax.Array, *incoming: jax.Array) -> jax.Array:
        """The cost of each synapse's change."""
        held: jax.Array = _hold(self.graded, leaf, *incoming)
        return held

    def axes(self, *ndims: int) -> tuple[tuple[int | None, ...], ...]:
        """All at the synapse itself."""
        return tuple(tuple(range(ndim)) for ndim in ndims)

    def learn(self, leaf: jax.Array, *heard: jax.Array) -> jax.Array:
        """The cost of the whole change, times dz/dm."""
        change, error = heard
        return _slope(self.graded) * jnp.square(change) / 2 * error


@strategy
class Start(Synapses):
    """Where the weights start: omega, to which the changes are added."""

    def forward(self, leaf: jax.Array, *incoming: jax.Array) -> jax.Array:
        """The weight."""
        (change,) = incoming
        return leaf + change

    def axes(self, *ndims: int) -> tuple[tuple[int | None, ...], ...]:
        """All at the synapse itself."""
        return tuple(tuple(range(ndim)) for ndim in ndims)

    def learn(self, leaf: jax.Array, *heard: jax.Array) -> jax.Array:
        """The derivative in the weight."""
        return heard[-1]
