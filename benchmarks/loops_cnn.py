"""Few-shot learning in batches of 4 tasks: a 4-block CNN on drawings (iMAML), against 5 steps of MAML."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

import contrastive_meta as cm
from benchmarks import data, loops_sine
from benchmarks.harness import Session, precision
from benchmarks.loops_cnn_network import (
    NUM_QUERIES,
    Size,
    anchored_loss,
    draw_tasks,
    glyphs,
    init_params,
    inner_loss,
    outer_loss,
)
from benchmarks.loops_few_shot import CONTRAST, MAML, Setup, measure
from benchmarks.loops_measure import record_aim

CASE = "cnn"
NUM_STEPS = 8  # outer
RATE, INNER_STEPS, MAML_STEPS = 0.1, 16, 5
SEQUENTIAL, WITHOUT_ESTIMATE = "contrast, sequential", "contrast, no estimate"


def run(session: Session) -> None:
    """The CNN, and the iMAML example."""
    x64 = bool(session.x64)
    num_steps = 1 if session.smoke else NUM_STEPS
    size = Size(8, 4, 1) if session.smoke else Size()
    images, source = _images(session, size)
    rng = np.random.default_rng(session.seed)
    with precision(x64):
        batches = [draw_tasks(rng, images) for _ in range(num_steps)]
        params = init_params(jax.random.key(session.seed), size)
        cnn = Setup("4-block CNN", _methods(session.smoke), params, batches, anchored_loss, source)
        rows = measure(session, x64, CASE, cnn)
        default, maml = rows[CONTRAST], rows[MAML]
        compiling = default["compile_cpu_seconds"] / maml["compile_cpu_seconds"]
        # In small it would show nothing that the CNN does not.
        sine = {} if session.smoke else measure(session, x64, CASE, loops_sine.setup(session.seed, num_steps))
    over_plain = sine[CONTRAST]["over_plain"] if sine else None
    for aim, target, measured in (
        ("4-block CNN: time to trace and compile over MAML", 1.5, compiling),
        ("4-block CNN: time of a step over MAML", 4.0, default["over"][MAML]),
        ("4-block CNN: time of a step over its counted gradients as plain ones", 1.3, default["over_plain"]),
        ("iMAML example: time over its counted gradients as plain ones", 1.3, over_plain),
    ):
        record_aim(session, x64=x64, case=CASE, aim=aim, target=target, measured=measured)


def _methods(smoke: bool) -> dict[str, tuple[cm.BilevelProblem, cm.MetaGradientEstimator]]:
    """With their problems: MAML's has no anchor."""
    learner = cm.OptaxDescent(optax.sgd(RATE), num_steps=2 if smoke else INNER_STEPS)
    anchored = cm.BilevelProblem(anchored_loss, outer_loss, lambda start, task: start)
    free = cm.BilevelProblem(inner_loss, outer_loss, lambda start, task: start)
    maml = cm.BackpropThroughLearning(cm.OptaxDescent(optax.sgd(RATE), num_steps=1 if smoke else MAML_STEPS))
    contrast = cm.Contrastive(learner)
    if smoke:
        # As published, at a typed strength: the contrast that compiles fastest.
        published = cm.Contrastive(learner, learner, cm.forward_difference(0.1), cm.LossNudge(), estimate_error=False)
        return {CONTRAST: (anchored, published), MAML: (free, maml)}
    return {
        CONTRAST: (anchored, contrast),
        SEQUENTIAL: (anchored, dataclasses.replace(contrast, sequential=True)),
        WITHOUT_ESTIMATE: (anchored, dataclasses.replace(contrast, estimate_error=False)),
        MAML: (free, maml),
    }


def _images(session: Session, size: Size) -> tuple[Any, str]:
    """Omniglot where a data folder has it, or drawings made here: what they show does not change what a step costs."""
    if not session.smoke:
        try:
            return data.omniglot(session.data), "Omniglot"
        except data.DataMissingError:
            pass
    return glyphs(session.seed, 40, 1 + NUM_QUERIES, size.side), "generated glyphs"
