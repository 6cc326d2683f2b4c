"""The package's single loop as a solver of benchopt's bilevel benchmark.

Copy this file to `solvers/contrastive_meta.py` of a clone of https://github.com/benchopt/benchmark_bilevel, install
`benchopt` and `contrastive_meta`, and run

    benchopt run . -s contrastive-meta -d ijcnn1

It uses what that suite hands to its stochastic solvers written in JAX: losses `(inner_var, outer_var, start,
batch_size)`, the numbers of examples and the first variables. It was tested against a stand-in of that interface, not
with benchopt itself, which this project does not install.

Reference:
  Dagreou, Ablin, Vaiter & Moreau (2022), for the suite; Moreau et al. (2022), benchopt.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from benchopt import BaseSolver  # type: ignore[import-not-found]

import contrastive_meta as cm


class Solver(BaseSolver):  # type: ignore[misc]
    """Single-loop contrast: a nudged iterate trains beside the parameters (F2SA with a strength that sets itself)."""

    name = "contrastive-meta"
    sampling_strategy = "callback"
    # Step sizes fall as 1 / sqrt(t), as those of the suite's other solvers; `ratio` is inner over outer.
    parameters = {"step_size": [0.1], "ratio": [1.0], "batch_size": [64], "eval_freq": [128], "random_state": [1]}  # noqa: RUF012

    def set_objective(
        self,
        f_inner: Any,
        f_outer: Any,
        n_inner_samples: int,
        n_outer_samples: int,
        inner_var0: Any,
        outer_var0: Any,
        **others: Any,
    ) -> None:
        """Take the losses of minibatches; those of all examples, among `others`, are not needed."""
        sizes = [min(self.batch_size, number) for number in (n_inner_samples, n_outer_samples)]
        numbers = [number // size for number, size in zip((n_inner_samples, n_outer_samples), sizes, strict=True)]

        def loss(function: Any, size: int) -> Any:
            return lambda z, x, start: function(z, x, start, batch_size=size)

        inner, outer = loss(f_inner, sizes[0]), loss(f_outer, sizes[1])
        problem = cm.BilevelProblem(
            lambda z, x, starts: inner(z, x, starts[0]),
            lambda z, x, starts: outer(z, x, starts[1]),
            lambda x, starts: inner_var0,
        )
        tx = cm.tune_while_training(
            optax.sgd(lambda count: self.step_size / jnp.sqrt(count + 1.0)),
            meta_optimizer=optax.sgd(lambda count: self.step_size / self.ratio / jnp.sqrt(count + 1.0)),
            problem=problem,
            init_meta_params=outer_var0,
            mode=cm.SingleLoop(),
        )

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            z, state = carry
            starts = tuple(
                jax.random.randint(k, (), 0, number) * size
                for k, number, size in zip(jax.random.split(key), numbers, sizes, strict=True)
            )
            grads = jax.grad(problem.inner)(z, cm.current_meta_params(state), starts)
            updates, state = tx.update(grads, state, z, task=starts)
            return (optax.apply_updates(z, updates), state), None

        self._steps = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
        self._first = inner_var0, tx.init(inner_var0)
        self.inner_var, self.outer_var = inner_var0, outer_var0
        # Compiled before the clock runs.
        jax.block_until_ready(self._steps(self._first, self._keys(0)))

    def run(self, callback: Any) -> None:
        """Steps, `eval_freq` at a time, while the callback says so."""
        carry, number = self._first, 0
        self.inner_var, self.outer_var = carry[0], cm.current_meta_params(carry[1])
        while callback():
            carry, number = self._steps(carry, self._keys(number)), number + 1
            self.inner_var, self.outer_var = carry[0], cm.current_meta_params(carry[1])

    def get_result(self) -> dict[str, Any]:
        """Where both variables are."""
        return {"inner_var": self.inner_var, "outer_var": self.outer_var}

    def _keys(self, number: int) -> jax.Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(self.random_state), number), self.eval_freq)
