"""Programs are compiled cheaply; docstring examples run in JAX's default precision; no file keeps another's code."""

import gc
import os
from collections.abc import Iterator

import jax
import pytest

from benchmarks.harness import CHEAP_XLA_FLAGS, use_cheap_xla_flags

# Nearly all of a test's time is compilation of a program that runs for a millisecond. Whoever sets XLA_FLAGS has them,
# and `XLA_FLAGS= python -m pytest` compiles as users do; xdist's workers find what its controller has set.
if os.environ.get("XLA_FLAGS", CHEAP_XLA_FLAGS) == CHEAP_XLA_FLAGS:
    jax.config.update("jax_disable_most_optimizations", True)
    use_cheap_xla_flags()


@pytest.fixture(autouse=True)
def _precision_of_the_reader(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turn 64-bit mode off around doctests: `tests/conftest.py` turned it on for the whole process."""
    before: bool = jax.config.read("jax_enable_x64")
    if isinstance(request.node, pytest.DoctestItem):
        jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(autouse=True, scope="module")
def _compiled_code_is_freed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drop what a test file compiled once it has run.

    Every executable holds several memory maps, of which Linux grants a process 65,530: a process that ran half of
    this suite and kept everything would meet that limit, and crash inside the compiler. All docstrings together
    compile less than one test file, and much of it is the same few dozen operations: what they compile is kept.
    """
    yield
    if request.path.parent.name == "tests":
        jax.clear_caches()
        gc.collect()
