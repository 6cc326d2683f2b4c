"""The PyTorch peers on the speed benchmark, on the three problems that both can express.

higher: backprop through the steps of `torch.optim.SGD` in `innerloop_ctx`. torchopt: `diff.implicit.custom_root` around
`torch.optim.LBFGS`, with `linear_solve.solve_cg`. betty-ml is left out: its last releases need Python below 3.11.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.speed_methods import COLD_STEPS, Outcome, Point
from benchmarks.speed_problems import CLEANING, DIGITS, RIDGE
from benchmarks.speed_reference import ACCURATE, COLD, UNFINISHED, Ready

HIGHER, TORCHOPT = "higher", "torchopt"

Leaves = Sequence[Any]
Losses = tuple[Callable[[Leaves, Leaves], Any], Callable[[Leaves, Leaves], Any]]


def absent() -> Iterator[tuple[str, str]]:
    """The peers that are not installed, and how to get them."""
    for name in (HIGHER, TORCHOPT):
        if not _installed(name):
            yield name, 'not installed: pip install ".[peers-torch]"'
    yield "betty-ml", "left out: betty-ml 0.2 needs Python below 3.11"


def points(ready: Ready) -> Iterator[Point]:
    """The grids of those that are installed, on the problems that are written for torch."""
    if ready.problem.name not in _LOSSES:
        return
    if _installed(TORCHOPT):
        grids = {ACCURATE: (0,), UNFINISHED: (8, 16, 32)}
        for start, steps in grids.items():
            for num_steps in steps:
                for tol in (1e-2, 1e-3, 1e-4):
                    words = f"{num_steps} steps, tolerance {tol:g}"
                    call = functools.partial(_torchopt, num_steps, tol)
                    yield _point(ready, start, "torchopt, L-BFGS + CG", words, call)
    if _installed(HIGHER):
        for start, steps in {ACCURATE: (100, 300), UNFINISHED: (100, 300), COLD: (COLD_STEPS,)}.items():
            for num_steps in steps:
                call = functools.partial(_higher, ready.curvature, ready.momentum, num_steps)
                yield _point(ready, start, "higher, backprop", f"{num_steps} steps from the start", call)


def _installed(name: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in ("torch", name))


def _point(ready: Ready, start: str, method: str, settings: str, call: Any) -> Point:
    torch = importlib.import_module("torch")

    def convert(leaf: Any) -> Any:
        array = np.array(leaf)
        return torch.from_numpy(array.astype(np.int64) if np.issubdtype(array.dtype, np.integer) else array)

    task = ready.tasks[start]
    losses = _LOSSES[ready.problem.name](*(convert(leaf) for leaf in task.data))
    params = [convert(leaf) for leaf in jax.tree.leaves(task.start)]
    meta_params = [convert(leaf) for leaf in jax.tree.leaves(ready.meta_params)]
    return Point(start, method, settings, call, (losses, params, meta_params), on_host=True)


def _outcome(torch: Any, losses: Losses, params: Leaves, thetas: Leaves) -> Outcome:
    value = losses[1](params, thetas)
    grads = torch.autograd.grad(value, thetas)
    return Outcome(value.item(), [grad.numpy() for grad in grads])


def _torchopt(num_steps: int, tol: float, losses: Losses, params: Leaves, meta_params: Leaves) -> Outcome:
    torch, torchopt = importlib.import_module("torch"), importlib.import_module(TORCHOPT)
    thetas = [theta.clone().requires_grad_() for theta in meta_params]

    def inner(params: Any, *thetas: Any) -> Any:
        return losses[0](params, thetas)

    def learn(params: Any, *thetas: Any) -> Any:
        if not num_steps:
            return params
        learned = [leaf.clone().requires_grad_() for leaf in params]
        fixed = [theta.detach() for theta in thetas]
        optimizer = torch.optim.LBFGS(
            learned,
            max_iter=num_steps,
            max_eval=4 * num_steps,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Any:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = losses[0](learned, fixed)
                loss.backward()
            return loss

        optimizer.step(closure)
        return tuple(leaf.detach() for leaf in learned)

    differentiable = torchopt.diff.implicit.custom_root(
        torch.func.grad(inner, argnums=0),
        argnums=tuple(range(1, 1 + len(thetas))),
        solve=torchopt.linear_solve.solve_cg(rtol=tol, maxiter=1000),
    )(learn)
    start = tuple(leaf.clone().requires_grad_() for leaf in params)
    return _outcome(torch, losses, tuple(differentiable(start, *thetas)), thetas)


def _higher(
    curvature: float, momentum: float, num_steps: int, losses: Losses, params: Leaves, meta_params: Leaves
) -> Outcome:
    torch, higher = importlib.import_module("torch"), importlib.import_module(HIGHER)
    thetas = [theta.clone().requires_grad_() for theta in meta_params]
    model = torch.nn.ParameterList([torch.nn.Parameter(leaf.clone()) for leaf in params])
    optimizer = torch.optim.SGD(model.parameters(), lr=1 / curvature, momentum=momentum, nesterov=True)
    with higher.innerloop_ctx(model, optimizer) as (functional, differentiable):
        for _ in range(num_steps):
            differentiable.step(losses[0](list(functional.parameters()), thetas))
        return _outcome(torch, losses, list(functional.parameters()), thetas)


def _ridge(x: Any, y: Any, x_val: Any, y_val: Any) -> Losses:
    def inner(params: Leaves, thetas: Leaves) -> Any:
        return ((x @ params[0] - y) ** 2).mean() / 2 + _penalty(params, thetas)

    def outer(params: Leaves, thetas: Leaves) -> Any:
        return ((x_val @ params[0] - y_val) ** 2).mean() / 2

    return inner, outer


def _digits(x: Any, y: Any, x_val: Any, y_val: Any) -> Losses:
    cross_entropy = importlib.import_module("torch").nn.functional.cross_entropy

    def inner(params: Leaves, thetas: Leaves) -> Any:
        bias, kernel = params
        return cross_entropy(x @ kernel + bias, y) + _penalty(params, thetas)

    def outer(params: Leaves, thetas: Leaves) -> Any:
        bias, kernel = params
        return cross_entropy(x_val @ kernel + bias, y_val)

    return inner, outer


def _cleaning(x: Any, y: Any, x_val: Any, y_val: Any, classes: Any, decay: Any) -> Losses:
    torch = importlib.import_module("torch")
    cross_entropy = torch.nn.functional.cross_entropy

    def inner(params: Leaves, thetas: Leaves) -> Any:
        kernel, bias = params
        each = cross_entropy(x @ kernel + bias, y, reduction="none")
        return (torch.sigmoid(thetas[0]) * each).mean() + decay * ((kernel**2).sum() + (bias**2).sum()) / 2

    def outer(params: Leaves, thetas: Leaves) -> Any:
        kernel, bias = params
        return cross_entropy(x_val @ kernel + bias, y_val)

    return inner, outer


def _penalty(params: Leaves, thetas: Leaves) -> Any:
    return sum((theta.exp() * leaf**2).sum() for leaf, theta in zip(params, thetas, strict=True)) / 2


_LOSSES: dict[str, Callable[..., Losses]] = {RIDGE.name: _ridge, DIGITS.name: _digits, CLEANING.name: _cleaning}
