"""A small transformer that reads examples and predicts the targets of queries, and how it is trained."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import Progress
from benchmarks.meta_training import cosine_decay
from contrastive_meta.architectures import attention, attention_params

Kind = Literal["softmax", "linear", "hypernetwork"]
# Decay of weights, one of two in the public code of Schug et al. (2025), and the hyperteacher's norm of gradients.
_DECAY, _CLIP = 0.03, 1.0
# Steps over which the rate rises.
_RISE = 100


class Shape(NamedTuple):
    """Of a transformer.

    Attributes:
      size: of its residual stream; hidden layers are twice as wide.
      num_heads: of attention, which divide the size.
      num_layers: each of attention and a network with one hidden layer.
    """

    size: int = 64
    num_heads: int = 8
    num_layers: int = 2


class Read(NamedTuple):
    """What a transformer makes of its tokens.

    Attributes:
      outputs: shape (tasks, queries, outputs).
      code: of attention in the last layer, shape (tasks, queries, examples, heads).
    """

    outputs: jax.Array
    code: jax.Array


def first_params(key: jax.Array, num_inputs: int, num_outputs: int, shape: Shape) -> dict[str, Any]:
    """Normal kernels of variance 1 / inputs; a readout of a tenth of that scale, so that first outputs are small."""
    of_tokens, of_outputs, *of_layers = jax.random.split(key, 2 + shape.num_layers)

    def normal(key: jax.Array, *size: int) -> jax.Array:
        kernel: jax.Array = jax.random.normal(key, size) / size[0] ** 0.5
        return kernel

    def layer(key: jax.Array) -> dict[str, Any]:
        of_attention, up, down = jax.random.split(key, 3)
        head_size = shape.size // shape.num_heads
        return {
            "attention": attention_params(of_attention, shape.size, num_heads=shape.num_heads, head_size=head_size),
            "up": normal(up, shape.size, 2 * shape.size),
            "bias": jnp.zeros(2 * shape.size),
            "down": normal(down, 2 * shape.size, shape.size),
        }

    return {
        "tokens": normal(of_tokens, num_inputs, shape.size),
        "layers": [layer(k) for k in of_layers],
        "outputs": normal(of_outputs, shape.size, num_outputs) / 10,
    }


def transformer(params: Any, tokens: jax.Array, num_examples: int, kind: Kind, shape: Shape) -> Read:
    """Every token attends to the examples; those behind them are queries, of which the last layer is computed alone.

    Args:
      params: see `first_params`.
      tokens: shape (tasks, examples and queries, inputs).
      num_examples: of each task.
      kind: of attention.
      shape: of the transformer.
    """
    x, code = tokens @ params["tokens"], jnp.zeros(0)
    for number, layer in enumerate(params["layers"]):
        normal = _normalised(x)
        last = number == len(params["layers"]) - 1
        x, asking = (x[:, num_examples:], normal[:, num_examples:]) if last else (x, normal)
        attended, code = attention(
            layer["attention"], asking, kind=kind, num_heads=shape.num_heads, context=normal[:, :num_examples]
        )
        # Means over examples, as softmax is: divided by a root, a hypernetwork explained .62 of unseen pairs, not .70.
        x = x + (attended if kind == "softmax" else attended / num_examples)
        x = x + jax.nn.gelu(_normalised(x) @ layer["up"] + layer["bias"]) @ layer["down"]
    return Read(_normalised(x) @ params["outputs"], code)


def _normalised(x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    # The smallest variance, as is usual for layer normalisation.
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-6)


class Learned(NamedTuple):
    """What came of training some transformers side by side.

    Attributes:
      params: of each at the end.
      losses: of each, means of the last tenth of the steps.
      seconds: of processor time for each, without compilation.
      num_gradients: evaluated for each, of one batch.
    """

    params: Sequence[Any]
    losses: Sequence[float]
    seconds: float
    num_gradients: int


class Trainer:
    """Trains by AdamW with a rate that rises at first and falls as a half cosine; compiled once.

    Several runs go side by side under `vmap`: small products of matrices then cost little more than one of them.

    Args:
      loss: `(params, tasks) -> scalar`.
      sample: `(key, data) -> tasks`.
      rate: of learning, at most.
      num_steps: of training.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], jax.Array],
        sample: Callable[[jax.Array, Any], Any],
        rate: float,
        num_steps: int,
    ) -> None:
        self._num_steps = num_steps
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(_CLIP), optax.scale_by_adam(), optax.add_decayed_weights(_DECAY)
        )
        of_fraction = cosine_decay(rate)

        def step(params: Any, memory: Any, key: jax.Array, number: jax.Array, data: Any) -> tuple[Any, Any, jax.Array]:
            value, grad = jax.value_and_grad(loss)(params, sample(jax.random.fold_in(key, number), data))
            direction, memory = self._optimizer.update(grad, memory, params)
            now = of_fraction(number / num_steps) * jnp.minimum(1.0, (number + 1) / _RISE)
            return optax.apply_updates(params, jax.tree.map(lambda u: -now * u, direction)), memory, value

        self._step = jax.jit(jax.vmap(step, (0, 0, 0, None, 0)), donate_argnums=(0, 1))

    def train(
        self, starts: Sequence[Any], keys: Sequence[jax.Array], data: Sequence[Any], progress: Progress, what: str
    ) -> Learned:
        """Each from its own parameters, with its own key, on tasks of its own data."""
        progress.begin(what, 100)
        params, each_key, each_data = (_stacked(of) for of in (starts, keys, data))
        memory, losses, begin = jax.vmap(self._optimizer.init)(params), [], 0.0
        for number in range(self._num_steps):
            params, memory, value = self._step(params, memory, each_key, jnp.float32(number), each_data)
            losses.append(np.asarray(value))
            if number == 0:
                begin = time.process_time()
            told = f"{what}: step {number + 1:,}, loss {np.mean(losses[-50:]):.4f}"
            progress.tell(told, (number + 1) / self._num_steps)
        ends = [jax.tree.map(lambda leaf, k=k: leaf[k], params) for k in range(len(starts))]
        tail = np.mean(losses[-max(1, self._num_steps // 10) :], 0)
        return Learned(ends, tail.tolist(), (time.process_time() - begin) / len(starts), self._num_steps)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
