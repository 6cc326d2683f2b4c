"""Feedback alignment: errors come down through fixed synapses of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from contrastive_meta._plasticity import transmit
from contrastive_meta._pytree import PyTree, static, strategy


@strategy
class FeedbackAlignment:
    """A multilayer perceptron whose errors are sent down by fixed feedback instead of the weights' transpose.

        forwards   h_l = act(a_l),   a_l = h_{l-1} W_l + b_l
        backwards  d_{l-1} = act'(a_{l-1}) * (d_l B_l^T),   dL/dW_l = h_{l-1}^T d_l

    `apply` gives the outputs; their derivative is this update: with B = W exactly backprop's, else the gradient of no
    loss. Learning ends where the update, the inner one and its penalties together, vanishes. What `Contrastive` with
    `nudged_solver=solver` estimates there is the derivative of the statistic along -J^-1 g, with J the Jacobian of the
    update in `params` and g the update of the outer loss; the exact meta-gradient has the transpose of J and the
    gradient of the outer loss. They are the same where B = W. Learners that go by curvature, the default of the nudged
    phases, take J for symmetric: not here.

    Weights act through `transmit`, so that slow ones can have a local rule; what such a rule hears is the error that
    the feedback delivered.

    Args:
      feedback: {name of a layer: B of that layer}, shaped like its kernel, for every layer but the first (whose inputs
        get errors from W). `random_feedback` draws them.
      activation: of hidden units.

    Reference:
      Lillicrap et al. (2016), random synaptic feedback weights support error backpropagation.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> feedback = cm.local_learners.random_feedback(jax.random.key(1), params)
      >>> network = cm.local_learners.FeedbackAlignment(feedback)
      >>> update = jax.grad(lambda w: jnp.mean((network.apply(w, jnp.ones((5, 3))) - 1.0) ** 2))(params)
      >>> update["hidden_0"]["kernel"].shape
      (3, 8)
    """

    feedback: PyTree
    activation: Callable[[jax.Array], jax.Array] = static(default=jnp.tanh)

    def apply(self, params: PyTree, x: jax.Array) -> jax.Array:
        """The outputs.

        Args:
          params: as `architectures.mlp_params` makes them, with gains or without (`architectures.with_gains`).
          x: shape (..., inputs).

        Returns:
          shape (..., outputs).

        Raises:
          ValueError: layers of another kind; feedback that is missing, too much, or of another shape than its kernel.
        """
        names = [*(f"hidden_{number}" for number in range(len(params) - 1)), "readout"]
        _check(self.feedback, params, names)
        for name in names:
            layer = params[name]
            sent = _one_way(x) if name in self.feedback else x
            affine = transmit(sent, layer["kernel"], layer["bias"])
            if name in self.feedback:
                affine += self._delivered(name, x, affine)
            if "gain" in layer:
                affine = layer["gain"] * affine + layer["shift"]
            x = self.activation(affine) if name != "readout" else affine
        return x

    def _delivered(self, name: str, x: jax.Array, affine: jax.Array) -> jax.Array:
        """Nothing forwards; backwards the errors of a layer to the one below."""
        feedback, expected = self.feedback[name], (x.shape[-1], affine.shape[-1])
        if jnp.shape(feedback) != expected:
            raise ValueError(
                f"FeedbackAlignment: feedback of {name} must have the shape of its kernel, {expected}; got "
                f"{jnp.shape(feedback)}. `random_feedback(key, params)` draws it."
            )
        # A constant: no reason for a coarser network to become finer.
        fixed = jax.lax.stop_gradient(jnp.asarray(feedback, affine.dtype))
        return _feedback(x.astype(affine.dtype), fixed)


def random_feedback(key: jax.Array, params: PyTree) -> dict[str, jax.Array]:
    """Normal feedback of the variance of first weights, 1 / inputs, for every layer but the first.

    Args:
      key: PRNG key.
      params: as `architectures.mlp_params` makes them.

    Example:
      >>> import jax
      >>> import contrastive_meta as cm
      >>> params = cm.architectures.mlp_params(jax.random.key(0), (3, 8, 2))
      >>> cm.local_learners.random_feedback(jax.random.key(1), params)["readout"].shape
      (8, 2)
    """
    names = [*(f"hidden_{number}" for number in range(1, len(params) - 1)), *["readout"] * (len(params) > 1)]
    keys = jax.random.split(key, len(names) + 1)
    kernels = {name: params[name]["kernel"] for name in names}
    return {
        name: jax.random.normal(k, w.shape, w.dtype) / w.shape[0] ** 0.5
        for k, (name, w) in zip(keys[1:], kernels.items(), strict=True)
    }


def _check(feedback: Any, params: Any, names: list[str]) -> None:
    """By names alone: where a rule listens, what stands in for a weight has no shape."""
    kinds = ({"kernel", "bias"}, {"kernel", "bias", "gain", "shift"})
    if set(params) != set(names) or any(set(params[name]) not in kinds for name in names):
        raise ValueError(
            "FeedbackAlignment: expected params like those of `architectures.mlp_params`, layers hidden_0, hidden_1, "
            '.. and readout, each with "kernel" and "bias" and perhaps "gain" and "shift"; got '
            f"{ {name: sorted(layer) for name, layer in params.items()} }."
        )
    if set(feedback) != set(names[1:]):
        raise ValueError(
            f"FeedbackAlignment: expected feedback for every layer but the first, {names[1:]}; got {sorted(feedback)}. "
            "`random_feedback(key, params)` draws it."
        )


# Not `stop_gradient`: the update depends on activities, and so do second derivatives, which are those of the update.
_one_way: Callable[[jax.Array], jax.Array] = jax.custom_vjp(lambda x: x)
_one_way.defvjp(lambda x: (x, None), lambda _, error: (jnp.zeros_like(error),))  # type: ignore[attr-defined]


def _feedback_forward(x: jax.Array, feedback: jax.Array) -> tuple[jax.Array, Any]:
    return _zeros(x, feedback), feedback


def _feedback_backward(feedback: jax.Array, error: jax.Array) -> Any:
    return error @ feedback.T, jnp.zeros_like(feedback)


def _zeros(x: jax.Array, feedback: jax.Array) -> jax.Array:
    """Nothing forwards; backwards the errors, through the feedback."""
    return jnp.zeros((*x.shape[:-1], feedback.shape[1]), jnp.result_type(x, feedback))


_feedback: Callable[[jax.Array, jax.Array], jax.Array] = jax.custom_vjp(_zeros)
_feedback.defvjp(_feedback_forward, _feedback_backward)  # type: ignore[attr-defined]
