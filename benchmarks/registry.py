"""The benchmarks by name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import (
    beta_curves,
    estimators,
    loops,
    plasticity,
    scaling_steps,
    sparse,
    speed,
    speed_scaling,
    trust,
    tuning,
)
from benchmarks.composition import attention, goals, hyperteacher, in_context, modules, preferences
from benchmarks.experiments import (
    analysis,
    bandit,
    bilevel_suite,
    omniglot,
    regularisation,
    sinusoids,
    spiking,
    where_to_learn,
)
from benchmarks.harness import Record, Session


class Benchmark(NamedTuple):
    """A benchmark: how it runs, and how its records are shown.

    Attributes:
      name: on the command line and of its records.
      about: one line.
      run: measures and records.
      show: text from the records of a run.
      draw: pictures from the records of a run, into a folder; None draws none.
      main_job: whether `python -m benchmarks` runs it; the others take too long for a first look.
    """

    name: str
    about: str
    run: Callable[[Session], None]
    show: Callable[[Sequence[Record]], str]
    draw: Callable[[Sequence[Record], Path], list[Path]] | None = None
    main_job: bool = True


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(estimators.NAME, estimators.ABOUT, estimators.run, estimators.show),
        Benchmark(beta_curves.NAME, beta_curves.ABOUT, beta_curves.run, beta_curves.show, beta_curves.draw),
        Benchmark(scaling_steps.NAME, scaling_steps.ABOUT, scaling_steps.run, scaling_steps.show, scaling_steps.draw),
        Benchmark(speed.NAME, speed.ABOUT, speed.run, speed.show, speed.draw, main_job=False),
        Benchmark(
            speed_scaling.NAME,
            speed_scaling.ABOUT,
            speed_scaling.run,
            speed_scaling.show,
            speed_scaling.draw,
            main_job=False,
        ),
        Benchmark(trust.NAME, trust.ABOUT, trust.run, trust.show, trust.draw, main_job=False),
        Benchmark(tuning.NAME, tuning.ABOUT, tuning.run, tuning.show, tuning.draw, main_job=False),
        Benchmark(sparse.NAME, sparse.ABOUT, sparse.run, sparse.show, sparse.draw, main_job=False),
        Benchmark(loops.NAME, loops.ABOUT, loops.run, loops.show, loops.draw, main_job=False),
        Benchmark(plasticity.NAME, plasticity.ABOUT, plasticity.run, plasticity.show, plasticity.draw, main_job=False),
        Benchmark(analysis.NAME, analysis.ABOUT, analysis.run, analysis.show, main_job=False),
        Benchmark(omniglot.NAME, omniglot.ABOUT, omniglot.run, omniglot.show, main_job=False),
        Benchmark(regularisation.NAME, regularisation.ABOUT, regularisation.run, regularisation.show, main_job=False),
        Benchmark(sinusoids.NAME, sinusoids.ABOUT, sinusoids.run, sinusoids.show, main_job=False),
        Benchmark(spiking.NAME, spiking.ABOUT, spiking.run, spiking.show, main_job=False),
        Benchmark(where_to_learn.NAME, where_to_learn.ABOUT, where_to_learn.run, where_to_learn.show, main_job=False),
        Benchmark(bandit.NAME, bandit.ABOUT, bandit.run, bandit.show, main_job=False),
        Benchmark(bilevel_suite.NAME, bilevel_suite.ABOUT, bilevel_suite.run, bilevel_suite.show, main_job=False),
        Benchmark(
            hyperteacher.NAME,
            hyperteacher.ABOUT,
            hyperteacher.run,
            hyperteacher.show,
            hyperteacher.draw,
            main_job=False,
        ),
        Benchmark(attention.NAME, attention.ABOUT, attention.run, attention.show, attention.draw, main_job=False),
        Benchmark(in_context.NAME, in_context.ABOUT, in_context.run, in_context.show, in_context.draw, main_job=False),
        Benchmark(
            preferences.NAME, preferences.ABOUT, preferences.run, preferences.show, preferences.draw, main_job=False
        ),
        Benchmark(goals.NAME, goals.ABOUT, goals.run, goals.show, goals.draw, main_job=False),
        Benchmark(modules.NAME, modules.ABOUT, modules.run, modules.show, modules.draw, main_job=False),
    )
}
