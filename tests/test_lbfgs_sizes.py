"""L-BFGS in float32 at sizes where optax's met NaN under jit (jax 0.10.2, some CPUs), alone, mapped, in estimates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("sizes", [["300x64", "500x196"], ["600x196", "2000x784"]], ids=" ".join)
def test_it_descends_in_float32_as_in_float64(sizes: list[str]) -> None:
    """In a process of its own: the flags that this suite compiles with hide the fault."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.softmax_descents", *sizes]
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    for size, found in zip(sizes, json.loads(printed.stdout.splitlines()[-1]), strict=True):
        # Two steps from the same start; float32 has 24 bits, and a mean loses few.
        np.testing.assert_allclose(found["float32"], found["float64"], rtol=1e-5, err_msg=size)
        assert np.isfinite(found["grad"]), size
        assert found["float64"] < 0.5 * np.log(10.0), "the loss at the start"
