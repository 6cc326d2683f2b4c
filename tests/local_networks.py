"""Small networks, tasks and learners that the tests of local learners share."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import contrastive_meta as cm
from contrastive_meta import architectures, local_learners
from contrastive_meta.problems import SplitData

SIZES = (3, 5, 4, 2)


SETTLED = local_learners.Relaxation(step_size=0.5, num_steps=200)


def squared_error(outputs, targets):
    return jnp.mean(jnp.square(outputs - targets))


def cross_entropy(outputs, targets):
    return jnp.mean(optax.softmax_cross_entropy(outputs, jax.nn.softmax(targets)))


def network(seed, sizes=SIZES, dtype=jnp.float64):
    """Biases off zero as well: symmetric values would hide a wrong one."""
    params = architectures.mlp_params(jax.random.key(seed), sizes, dtype)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return structure.unflatten(
        [x + 0.2 * jax.random.normal(k, x.shape, dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def data(seed, sizes=SIZES, num=6, dtype=jnp.float64):
    x, y = jax.random.split(jax.random.key(seed))
    return jax.random.normal(x, (num, sizes[0]), dtype), jax.random.normal(y, (num, sizes[-1]), dtype)


def slope(learner_at, loss, exact, x, y, params, strengths):
    """In which power of its nudge a learner's update approaches `exact`."""

    @jax.jit
    def error(strength):
        update = jax.grad(lambda w: loss(learner_at(strength).apply(w, x), y))(params)
        difference = jax.tree.map(jnp.subtract, update, exact)
        return optax.tree_utils.tree_norm(difference) / optax.tree_utils.tree_norm(exact)

    errors = [float(error(jnp.asarray(strength))) for strength in strengths]
    return np.log2(errors[0] / errors[1]) / np.log2(strengths[0] / strengths[1]), errors


def run_forwards(params, x):
    first = jnp.tanh(x @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"])
    second = jnp.tanh(first @ params["hidden_1"]["kernel"] + params["hidden_1"]["bias"])
    return [first, second, second @ params["readout"]["kernel"] + params["readout"]["bias"]]


SPIKES_IN = (4, 12, 6)  # examples, time, inputs


def spiking(seed, recurrent=1.0):
    """A network that fires, at potentials all over the range of the pseudo-derivative."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "input": 0.06 * jax.random.normal(keys[0], (6, 5)),
        "recurrent": recurrent * 0.05 * jax.random.normal(keys[1], (5, 5)),
        "readout": 0.5 * jax.random.normal(keys[2], (5, 2)),
    }
    x = jax.random.bernoulli(keys[3], 0.4, SPIKES_IN).astype(jnp.float64)
    targets = jax.random.normal(jax.random.fold_in(keys[3], 1), (4, 12, 2))
    rate = float(jnp.mean(local_learners.EProp().apply(params, x).spikes))
    assert 0.05 < rate < 0.6
    return params, x, targets


# Estimators, on a network small enough for dense second derivatives.
# Curvatures lie between 1.5 and 10: converged to rounding.
SMALL, STRENGTH = (2, 3, 1), 2.0


LEARNER = cm.OptaxDescent(optax.sgd(0.15), num_steps=150)


QUICK = local_learners.Relaxation(step_size=0.7, num_steps=60)


LEARNERS = {
    "equilibrium propagation": lambda w: local_learners.EquilibriumPropagation(0.1, QUICK),
    "predictive coding": lambda w: local_learners.PredictiveCoding(0.1, QUICK),
    "feedback alignment": lambda w: local_learners.FeedbackAlignment(
        local_learners.random_feedback(jax.random.key(5), w)
    ),
}


def small_task(seed, dtype=jnp.float64):
    (x, y), (x_val, y_val) = data(seed, SMALL, 8, dtype), data(seed + 1, SMALL, 8, dtype)
    return SplitData(x, y / 2, x_val, y_val / 2)


def small_split(name, dtype=jnp.float64):
    params = network(0, SMALL, dtype)
    return architectures.learned_initialisation(LEARNERS[name](params).apply, squared_error, params, STRENGTH)


def as_published(split, scheme, solver=LEARNER):
    return cm.Contrastive(solver, solver, scheme, cm.LossNudge(), split.rule, estimate_error=False)


def of_apply(apply):
    return architectures.learned_initialisation(apply, squared_error, network(0, SMALL), STRENGTH)
