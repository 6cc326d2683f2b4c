"""Docstring examples run in JAX's default precision, tests in float64; no file keeps another's compiled code."""

import gc
from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _precision_of_the_reader(request: pytest.FixtureRequest) -> Iterator[None]:
    """Turn 64-bit mode off around doctests: `tests/conftest.py` turned it on for the whole process."""
    before: bool = jax.config.read("jax_enable_x64")
    if isinstance(request.node, pytest.DoctestItem):
        jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(autouse=True, scope="module")
def _compiled_code_is_freed() -> Iterator[None]:
    """Drop what a file compiled once it has run.

    Every executable holds several memory maps, of which Linux grants a process 65,530: a process that ran half of
    this suite and kept everything would meet that limit, and crash inside the compiler.
    """
    yield
    jax.clear_caches()
    gc.collect()
