"""A recurrent network of spiking neurons that learns by e-prop: eligibility at the synapse times a broadcast signal."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from contrastive_meta import _pytree as tree
from contrastive_meta._pytree import PyTree, strategy
from contrastive_meta.local_learners._layers import require_floating


class Spiking(NamedTuple):
    """What a spiking network does.

    Attributes:
      outputs: of the readout, shape (..., time, outputs).
      spikes: 0 or 1, shape (..., time, units).

    Example:
      >>> import contrastive_meta as cm
      >>> cm.local_learners.Spiking._fields
      ('outputs', 'spikes')
    """

    outputs: jax.Array
    spikes: jax.Array


def spiking_params(
    key: jax.Array, num_inputs: int, num_units: int, num_outputs: int, dtype: Any = None
) -> dict[str, jax.Array]:
    """First parameters for `EProp`: normal kernels, weak ones within and strong enough ones from the inputs.

    Args:
      key: PRNG key.
      num_inputs: neurons that bring the inputs.
      num_units: spiking neurons.
      num_outputs: readouts.
      dtype: of every array; None for JAX's default.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> sorted(cm.local_learners.spiking_params(jax.random.key(0), 32, 16, 1))
      ['input', 'readout', 'recurrent']
    """
    dtype = jnp.result_type(float) if dtype is None else jnp.dtype(dtype)
    shapes = {
        "input": (num_inputs, num_units), "recurrent": (num_units, num_units), "readout": (num_units, num_outputs)
    }  # fmt: skip
    gains = {"input": 0.2, "recurrent": 0.02, "readout": 0.2}
    keys = jax.random.split(key, len(shapes))
    return {
        name: gains[name] * jax.random.normal(k, shape, dtype) / shape[0] ** 0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


@strategy
class EProp:
    """Leaky integrate-and-fire neurons with recurrent synapses and a leaky readout, which learn by e-prop.

        v_t = a v_{t-1} + x_t W_in + z_{t-1} W_rec - threshold z_{t-1},   z_t = 1 where v_t > threshold
        y_t = k y_{t-1} + z_t W_out

    `apply` gives outputs and spikes over time; losses may use both, the spikes for a term on firing rates. Its
    derivative in the weights is e-prop: with v_t the error that arrives at y_t,

        eligibility     e_ij(t) = psi_j(t) * (inputs of synapse i, low-passed by a)
        signal          L_j(t)  = sum_k B_jk v_k(t),   B = W_out or the fixed `feedback`
        dL/dW_ij        = sum_t L_j(t) * (e_ij low-passed by k)
        psi             = dampening / threshold * max(0, 1 - |v / threshold - 1|)

    which a synapse accumulates as time goes by. Errors that arrive at spikes meet e_ij(t) itself. What is left out is
    how a spike moves other neurons later: with symmetric feedback the update is that of backprop through time, with the
    same psi and a reset that nothing is propagated through, where recurrent weights are 0, and for the readout always.

    It is the gradient of no loss, and spikes jump: losses have steps, which psi pretends are slopes. `Contrastive` with
    `nudged_solver=solver` estimates what it can: how the statistic differs between where learning ends with and
    without the nudge, over beta. Take a beta that spikes can see, and steps that shrink. Learners that go by curvature,
    the default of the nudged phases, look for something that is not there.

    Args:
      feedback: B, shape (units, outputs); None for the readout's own weights.
      membrane_decay: a, of one step.
      readout_decay: k, of one step.
      threshold: at which a neuron fires, and what it then loses.
      dampening: height of psi times the threshold.

    Reference:
      Bellec et al. (2020), equations (3), (22) and (23) for neurons without adaptation; both feedbacks are theirs.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> params = cm.local_learners.spiking_params(jax.random.key(0), 32, 16, 1)
      >>> x = cm.local_learners.population_spikes(jax.random.key(1), jnp.linspace(0.0, 1.0, 5), 32, num_steps=20)
      >>> update = jax.grad(lambda w: jnp.mean((cm.local_learners.EProp().apply(w, x).outputs - 1.0) ** 2))(params)
      >>> update["recurrent"].shape
      (16, 16)
    """

    feedback: jax.Array | None = None
    membrane_decay: float | jax.Array = 0.967
    readout_decay: float | jax.Array = 0.967
    threshold: float | jax.Array = 0.1
    dampening: float | jax.Array = 0.3

    def apply(self, params: PyTree, x: jax.Array) -> Spiking:
        """Outputs and spikes over time.

        Args:
          params: {"input", "recurrent", "readout"}, as `spiking_params` makes them.
          x: spikes or currents, shape (..., time, inputs).

        Raises:
          ValueError: parameters, inputs or feedback that do not fit together.
          TypeError: `x` is not floating.
        """
        self._check(params, x)
        return _spiking(jax.lax.stop_gradient(self), params, x)

    def simulate(self, params: PyTree, x: jax.Array) -> Spiking:
        """The same; its derivative is not local: backprop through time, with the same psi.

        Args:
          params: as for `apply`.
          x: as for `apply`.
        """
        self._check(params, x)
        return self._run(params, x)[0]

    def _run(self, params: PyTree, x: jax.Array) -> tuple[Spiking, jax.Array]:
        """What happens, and the membrane potentials."""
        currents = jnp.moveaxis(x @ params["input"], -2, 0)
        rest = jnp.zeros_like(currents[0])
        threshold, decay = (jnp.asarray(number, rest.dtype) for number in (self.threshold, self.membrane_decay))

        def step(before: Any, current: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            potential, spikes = before
            reset = threshold * jax.lax.stop_gradient(spikes)
            potential = decay * potential + current + spikes @ params["recurrent"] - reset
            spikes = _spike(potential / threshold - 1, self.dampening)
            return (potential, spikes), (potential, spikes)

        _, (potentials, spikes) = jax.lax.scan(step, (rest, rest), currents)
        outputs = _low_pass(self.readout_decay, spikes @ params["readout"])
        return Spiking(*(jnp.moveaxis(values, 0, -2) for values in (outputs, spikes))), potentials

    def _check(self, params: PyTree, x: jax.Array) -> None:
        require_floating(x, type(self).__name__)
        units = jnp.shape(params["recurrent"])[-1:]
        shapes = {name: jnp.shape(leaf) for name, leaf in params.items()}
        outputs = shapes.get("readout", ())[-1:]
        expected = {"input": (*x.shape[-1:], *units), "recurrent": (*units, *units), "readout": (*units, *outputs)}
        if x.ndim < 2 or shapes != expected:
            raise ValueError(
                f"EProp: for inputs of shape (..., time, inputs), here {x.shape}, expected params "
                f"of shapes {expected}; got {shapes}. `spiking_params` makes them."
            )
        if self.feedback is not None and jnp.shape(self.feedback) != expected["readout"]:
            raise ValueError(
                f"EProp: expected feedback of the shape of the readout, {expected['readout']}; got "
                f"{jnp.shape(self.feedback)}. None takes the readout's own weights."
            )


@jax.custom_jvp
def _spike(above: jax.Array, dampening: Any) -> jax.Array:
    """1 above the threshold."""
    return (above > 0).astype(above.dtype)


@_spike.defjvp
def _spike_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    above, dampening = primals
    return _spike(above, dampening), _pseudo_derivative(above, dampening) * tangents[0]


def _pseudo_derivative(above: jax.Array, dampening: Any) -> jax.Array:
    return jnp.asarray(dampening * jnp.maximum(0, 1 - jnp.abs(above)))


def _low_pass(decay: Any, values: jax.Array, reverse: bool = False) -> jax.Array:
    """y_t = decay y_{t-1} + x_t along the leading axis, or from its end."""

    def step(before: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        after = jnp.asarray(decay, value.dtype) * before + value
        return after, after

    filtered: jax.Array = jax.lax.scan(step, jnp.zeros_like(values[0]), values, reverse=reverse)[1]
    return filtered


def _forward(learner: EProp, params: PyTree, x: jax.Array) -> tuple[Spiking, Any]:
    out, potentials = learner._run(params, x)
    return out, (learner, params, x, jnp.moveaxis(out.spikes, -2, 0), potentials)


def _backward(saved: Any, errors: Spiking) -> Any:
    learner, params, x, spikes, potentials = saved
    arrived, at_spikes = (jnp.moveaxis(error, -2, 0) for error in errors)
    # sum_t L(t) (low-passed e)(t) = sum_t (L low-passed from the end)(t) e(t): here the sum is done in the order that
    # needs no memory for each synapse and time, in a synapse in the order that needs no future.
    from_readout = _low_pass(learner.readout_decay, arrived, reverse=True)
    feedback = params["readout"] if learner.feedback is None else learner.feedback
    psi = _pseudo_derivative(potentials / learner.threshold - 1, learner.dampening) / learner.threshold
    local = psi * (from_readout @ feedback.T + at_spikes)
    before = jnp.concatenate([jnp.zeros_like(spikes[:1]), spikes[:-1]])
    from_inputs = _low_pass(learner.membrane_decay, jnp.moveaxis(x, -2, 0))
    grads = {
        "input": _products(from_inputs, local),
        "recurrent": _products(_low_pass(learner.membrane_decay, before), local),
        "readout": _products(spikes, from_readout),
    }
    to_inputs = _low_pass(learner.membrane_decay, local, reverse=True) @ params["input"].T
    grads = {name: grad.astype(params[name].dtype) for name, grad in grads.items()}
    return tree.zeros_like(learner), grads, jnp.moveaxis(to_inputs, 0, -2).astype(x.dtype)


def _products(activity: jax.Array, error: jax.Array) -> jax.Array:
    """The sum over time and examples of activity_i error_j."""
    axes = tuple(range(activity.ndim - 1))
    return jnp.tensordot(activity, error, axes=(axes, axes))


_spiking: Callable[[EProp, PyTree, jax.Array], Spiking] = jax.custom_vjp(
    lambda learner, params, x: learner._run(params, x)[0]
)
_spiking.defvjp(_forward, _backward)  # type: ignore[attr-defined]
