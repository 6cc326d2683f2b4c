"""Docstring examples run in JAX's default precision, tests in float64; no file keeps another's compiled code."""

import gc
import itertools
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


_TESTS_BETWEEN = 100
_count = itertools.count(1)


@pytest.fixture(autouse=True, scope="module")
def _no_file_keeps_what_another_compiled() -> Iterator[None]:
    yield
    _free_compiled_code()


@pytest.fixture(autouse=True)
def _nor_does_a_long_one() -> Iterator[None]:
    yield
    if next(_count) % _TESTS_BETWEEN == 0:
        _free_compiled_code()


def _free_compiled_code() -> None:
    """Drop what was compiled so far.

    Every executable holds several memory maps, of which Linux grants a process 65,530: a process that ran half of
    this suite and kept everything would meet that limit, and crash inside the compiler.
    """
    jax.clear_caches()
    gc.collect()
