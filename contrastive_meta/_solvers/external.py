"""A learner that cannot take a loss, such as a model that another library fits: it runs the free phase alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from contrastive_meta import _pytree as tree
from contrastive_meta._problem import MetaParams, Params, Task, check_same_structure
from contrastive_meta._pytree import PyTree, static, strategy
from contrastive_meta._result import Status, flag, worst
from contrastive_meta._solvers._host import cut
from contrastive_meta._solvers.base import InnerLoss, InnerSolver, MinibatchLoss, Solution, Stop
from contrastive_meta._solvers.penalty import BoundPenalty, Penalty, fixed_point_residual


@strategy
class ExternalLearner(InnerSolver):
    """A function `(meta_params, task) -> params` that learns by itself: it runs the free phase, and nothing else.

    For models that another library fits. What it returns must be a minimum of the inner loss, written once more in
    JAX, for what the gradient is taken of is that loss; `diagnostics.free_residual` tells whether it is. Nudged phases
    are run by another learner: `Contrastive` takes `NewtonKrylov` unless `nudged_solver=` names one, without anything
    to fall back to. Implicit differentiation needs none.

    A model that is fitted with kinks, bounds or constraints says so by `penalty`, and `inner_loss` is the rest, its
    smooth part. If what it returns is no minimum of both, the one that `NewtonKrylov` finds is another solution. The
    status then is `FREE_NOT_CONVERGED`.

    On the host the function is called once for each lane of a batch, one after another, with NumPy arrays (PRNG keys
    as their raw data). It must not call JAX, which can hang there, and must give the same result for the same
    arguments. What it raises is raised by the program.

    Args:
      fn: the learner.
      host: whether `fn` is ordinary Python to be run on the host, or JAX to be traced.
      tol: gradient norm of the inner loss above which the solution counts as not converged; None to ask for nothing
        beyond what the estimators test themselves. With a penalty, norm of (w - prox(w - s grad)) / s.
      penalty: what the learner minimises beside the inner loss, such as `cm.prox.l1(0.1)`.
      meta_params: set by `bind`.

    Raises:
      TypeError: it is asked to minimise a loss: as `nudged_solver`, or for a problem with `sample`.
      ValueError: `fn` returned something that is not like what `init_params` returns.

    Example:
      >>> import numpy as np
      >>> import jax.numpy as jnp
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, decay, y: jnp.sum((w - y) ** 2) + decay * jnp.sum(w**2),
      ...     outer_loss=lambda w, decay, y: jnp.sum(w),
      ...     init_params=lambda decay, y: jnp.zeros_like(y),
      ... )
      >>> learner = cm.ExternalLearner(lambda decay, y: y / np.float32(1 + decay))
      >>> result = cm.Contrastive(learner).estimate(problem, jnp.array(1.0), jnp.array([4.0]))
      >>> round(float(result.grad), 3)  # w = y / (1 + decay), so dw/ddecay = -4 / 2^2
      -1.0
    """

    fn: Callable[[Any, Any], Any] = static()
    host: bool = static(default=True)
    tol: float | jax.Array | None = None
    penalty: Penalty | None = None
    meta_params: MetaParams = None

    def bind(self, meta_params: MetaParams) -> "ExternalLearner":
        """The learner with its penalty at these meta-parameters."""
        return self if self.penalty is None else dataclasses.replace(self, meta_params=meta_params)

    @property
    def walls(self) -> BoundPenalty | None:
        """As the user gave them."""
        return BoundPenalty.of(self.penalty, self.meta_params)

    @property
    def takes_losses(self) -> bool:
        """It does not."""
        return False

    @property
    def descends_loss(self) -> bool:
        """It ends at the minimum of the inner loss, from where another may run on."""
        return True

    def solve(
        self,
        loss: InnerLoss,
        init: Params,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
        stop: Stop = Stop(),
    ) -> Solution:
        """Refuse: see the class.

        Raises:
          TypeError: always.
        """
        raise TypeError(
            f"ExternalLearner cannot minimise a loss it is given, such as a nudged one: `{_name(self.fn)}` learns from "
            "(meta_params, task) alone. Let another learner run the nudged phases: leave `nudged_solver` out for "
            "`NewtonKrylov()`, or pass one, such as `LBFGS()`. Problems with `sample` need a `nudged_solver`."
        )

    def solve_free(
        self,
        loss: InnerLoss,
        init: Params,
        meta_params: MetaParams,
        task: Task,
        *,
        minibatch_loss: MinibatchLoss | None = None,
        memory: PyTree = (),
    ) -> Solution:
        """Learn, and evaluate the loss where learning ended. Only the shapes of `init` are used."""
        params = self._learn_on_host(init, meta_params, task) if self.host else self.fn(meta_params, task)
        check_same_structure(params, init, f"ExternalLearner: what `{_name(self.fn)}` returned", _REMEDY)
        value, gradient = tree.value_and_grad(loss)(params)
        residual, bound = tree.norm(gradient), self.bind(meta_params).walls
        if bound is not None:
            residual = fixed_point_residual(bound, params, gradient, init, tree.grad(loss)(init))
        finite = tree.all_finite(params) & jnp.isfinite(value) & jnp.isfinite(residual)
        unfinished = flag(False if self.tol is None else ~(residual <= self.tol), Status.FREE_NOT_CONVERGED)
        status = worst(unfinished, flag(~finite, Status.NOT_FINITE))
        return Solution(params, residual, jnp.int32(1), jnp.int32(0), status, ())

    def _learn_on_host(self, init: Params, meta_params: MetaParams, task: Task) -> Params:
        leaves, structure = jax.tree.flatten((meta_params, task))
        arrays = [_raw(leaf) for leaf in leaves]
        shapes = [array.shape for array in arrays]
        expected, like = jax.tree.flatten(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init))

        def learn(pieces: list[list[Any]]) -> list[Any]:
            joined = [np.concatenate(x).reshape(shape) for x, shape in zip(pieces, shapes, strict=True)]
            returned, got = jax.tree.flatten(self.fn(*jax.tree.unflatten(structure, joined)))
            found, wanted = [np.shape(x) for x in returned], [x.shape for x in expected]
            if got != like or found != wanted:
                raise ValueError(
                    f"ExternalLearner: `{_name(self.fn)}` returned {got} with shapes {found}, "
                    f"not {like} with shapes {wanted}. {_REMEDY}"
                )
            return [np.asarray(x, to.dtype) for x, to in zip(returned, expected, strict=True)]

        found = jax.pure_callback(learn, expected, [cut(array) for array in arrays], vmap_method="sequential")
        return jax.tree.unflatten(like, found)


_REMEDY = "Return parameters with the structure, shapes and dtypes of what the initialisation has."


def _raw(leaf: Any) -> jax.Array:
    """A leaf as numbers: keys cannot travel to the host."""
    array = jnp.asarray(leaf)
    return jax.random.key_data(array) if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) else array


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)
