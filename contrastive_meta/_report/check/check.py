"""Whether the estimators that apply to a problem agree with one another and with finite differences, in words."""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from contrastive_meta._contrastive import Contrastive
from contrastive_meta._dependence import leaf_names
from contrastive_meta._estimators import (
    BackpropThroughLearning,
    ImplicitDifferentiation,
    MetaGradientEstimator,
)
from contrastive_meta._linear import ConjugateGradient, DenseInverse
from contrastive_meta._nudging import LinearNudge
from contrastive_meta._problem import BilevelProblem, MetaParams, Task, as_float_arrays
from contrastive_meta._report.check.agreement import FINITE_DIFFERENCES, Blindness, Estimate, Evidence
from contrastive_meta._report.check.finite_differences import Slopes, measure_slopes
from contrastive_meta._report.check.report import CheckReport, CheckRow
from contrastive_meta._report.check.sentences import sentences
from contrastive_meta._report.gradients import (
    LARGEST_DENSE,
    first_line,
    flatten,
    norm,
    num_params,
    raise_first,
    status_of,
    unseen_told_later,
)
from contrastive_meta._result import MetaGradient
from contrastive_meta._solvers.base import InnerSolver


def check(
    problem: BilevelProblem,
    solver: InnerSolver,
    meta_params: MetaParams,
    task: Task,
    *,
    tolerance: float = 1e-2,
    estimators: Mapping[str, MetaGradientEstimator] | None = None,
    key: jax.Array | None = None,
) -> CheckReport:
    """Ask every estimator that applies for the meta-gradient, and finite differences of the whole of learning.

    The finite differences share no derivative with the estimators, and see everything: they learn anew at perturbed
    meta-parameters, along the coordinates where there are up to 5 of them, else along 5 random directions (and 5 more
    for meta-parameters that some estimator cannot see), at 5 step sizes, from which their own noise is estimated. They
    differentiate the learner as it is, so a solver that stops at a loose tolerance shows in them. What is wrong in a
    part of the gradient that is smaller than `tolerance` times the whole goes unnoticed. A model state moves with
    learning in the differences and in backprop, while the others hold it fixed; `check(problem.at(model_state), ...)`
    asks all of them at a fixed one.

    Args:
      problem: the bilevel problem.
      solver: the learner of all estimators, and of the finite differences.
      meta_params: where.
      task: a single task.
      tolerance: on relative differences.
      estimators: what to check, `{name: estimator}`; by default `Contrastive` with both nudges,
        `ImplicitDifferentiation` by conjugate gradients and, up to 2000 entries of `params`, dense, and
        `BackpropThroughLearning` where the solver can be unrolled.
      key: as in `estimate`; the same for all.

    Returns:
      A report to print.

    Raises:
      ValueError: a tolerance that is not positive; nothing to check.
      Exception: what the first estimator raised, if all did.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import contrastive_meta as cm
      >>> problem = cm.BilevelProblem(
      ...     inner_loss=lambda w, log_decay, task: 0.5 * jnp.sum((w - task) ** 2 + jnp.exp(log_decay) * w**2),
      ...     outer_loss=lambda w, log_decay, task: 0.5 * jnp.sum((w - 1.0) ** 2),
      ...     init_params=lambda log_decay, task: jnp.zeros_like(task),
      ... )
      >>> solver = cm.OptaxDescent(optax.sgd(0.4), num_steps=50)
      >>> report = cm.check(problem, solver, jnp.array(0.0), jnp.array([4.0]))
      >>> report.agree
      True
    """
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive; got {tolerance}.")
    meta_params = as_float_arrays(meta_params, "meta_params", "meta_params must be")
    sizes = [int(leaf.size) for leaf in jax.tree.leaves(meta_params)]
    leaves = list(zip(leaf_names(meta_params), sizes, strict=True))
    chosen = _applicable(solver, num_params(problem, meta_params, task)) if estimators is None else dict(estimators)
    if not chosen or FINITE_DIFFERENCES in chosen or not sum(sizes):
        raise ValueError(
            "`check` needs at least one estimator, by a name other than 'finite differences', and at least one "
            f"meta-parameter; got estimators {list(chosen)} and meta-parameters {leaves}."
        )
    key = jax.random.key(0) if key is None else key

    def ask(estimator: MetaGradientEstimator) -> Estimate:
        return _estimate(estimator.estimate(problem, meta_params, task, key=key))

    estimates, errors = _estimate_each(chosen, ask)
    # Meta-parameters that the same estimators cannot see are differentiated together.
    blindness = [tuple(name for name in estimates if leaf in estimates[name].unseen) for leaf, _ in leaves]
    kinds = sorted(set(blindness))
    slopes = measure_slopes(problem, solver, meta_params, task, key, [kinds.index(blind) for blind in blindness])
    members = [[leaf for (leaf, _), b in zip(leaves, blindness, strict=True) if b == blind] for blind in kinds]
    groups = [Blindness(tuple(names), blind) for names, blind in zip(members, kinds, strict=True)]
    evidence = Evidence(estimates, slopes, groups, leaves, tolerance)
    # A default estimator that raises at trace time does not apply. Any other exception is a failure.
    failed = {n: e for n, e in errors.items() if estimators is not None or not isinstance(e, TypeError | ValueError)}
    remark = _HELD if problem.init_model_state is not None and not evidence.agreement() else ""
    return _report(evidence, errors, failed, remark)


# Contrast and implicit differentiation leave the model state out by definition: the report says so.
_HELD = (
    "The problem has a model state, which finite differences and backprop move with learning and the others hold "
    "fixed: `check(problem.at(result.model_state), ...)` asks all of them at a fixed one."
)


def _applicable(solver: InnerSolver, size: int) -> dict[str, MetaGradientEstimator]:
    dense = {"implicit (dense)": ImplicitDifferentiation(solver, DenseInverse())} if size <= LARGEST_DENSE else {}
    return {
        "contrastive": Contrastive(solver),
        "contrastive (linear nudge)": Contrastive(solver, nudge=LinearNudge()),
        "implicit (CG)": ImplicitDifferentiation(solver, ConjugateGradient()),
        **dense,
        # Checkpoints: a check should not be what runs out of memory.
        "backprop": BackpropThroughLearning(solver, checkpoint=True),
    }


def _estimate_each(
    estimators: Mapping[str, MetaGradientEstimator], ask: Callable[[MetaGradientEstimator], Estimate]
) -> tuple[dict[str, Estimate], dict[str, Exception]]:
    """The estimate of each, or its exception. Where all raise, the first exception is raised again."""
    estimates: dict[str, Estimate] = {}
    errors: dict[str, Exception] = {}
    with unseen_told_later():
        for name, estimator in estimators.items():
            try:
                estimates[name] = ask(estimator)
            except Exception as error:
                errors[name] = error
    if not estimates:
        raise_first(errors)
    return estimates, errors


def _estimate(result: MetaGradient) -> Estimate:
    return Estimate(flatten(result.grad), status_of(result), float(result.diagnostics.free_residual), result.unseen)


def _report(
    evidence: Evidence, errors: Mapping[str, Exception], failed: Mapping[str, Exception], remark: str
) -> CheckReport:
    said = [*sentences(evidence), *([remark] if remark else [])]
    said += [f"{name} raised {first_line(error)}" for name, error in failed.items()]
    names = evidence.names
    rows = []
    for name, estimate in evidence.estimates.items():
        relation = evidence.to_finite_differences(name)
        rows.append(
            CheckRow(
                name=name,
                grad_norm=norm(estimate.grad),
                free_residual=estimate.free_residual,
                difference=relation.difference,
                agrees=relation.agrees,
                status=estimate.status,
                unseen=estimate.unseen,
            )
        )
    rows.append(_finite_differences_row(evidence.slopes))
    return CheckReport(
        agree=False if failed else evidence.agreement(),
        verdict=" ".join(said),
        rows=tuple(rows),
        differences={a: {b: evidence.relation(a, b).difference for b in names} for a in names},
        noise=_relative_noise(evidence.slopes),
        left_out={name: first_line(error) for name, error in errors.items()},
        tolerance=evidence.tolerance,
    )


def _finite_differences_row(slopes: Slopes) -> CheckRow:
    complete = bool(np.all(slopes.weights == 1))
    size = slopes.norm(slopes.values) if complete else None
    return CheckRow(FINITE_DIFFERENCES, size, None, 0.0, True, slopes.status, ())


def _relative_noise(slopes: Slopes) -> float:
    size, noise = slopes.norm(slopes.values), slopes.norm(slopes.noise)
    return noise / size if size > 0 else float(np.inf if noise > 0 else 0.0)
