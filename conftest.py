"""Docstring examples run in JAX's default precision, as their readers would run them; tests run in float64."""

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
