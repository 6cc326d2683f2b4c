"""Tasks spread over devices and processes: the same numbers as on one, and no task travels."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
# As the root conftest.py has it; XLA until JAX 0.10 knows these, and dies of those it does not know.
CHEAP = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# Sums over tasks are taken in another order; the default learner's conjugate gradients stop at a tolerance of their
# own, on noise that is measured, and carry rounding further.
TOLERANCE = {"default": 1e-9, "learning twice": 1e-11, "implicit": 1e-11}


def start(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    flags = CHEAP if CHEAP in os.environ.get("XLA_FLAGS", "") else ""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {flags}",
    }
    command = [sys.executable, "-m", "tests.sharded", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Any:
    """What a process printed last, as JSON."""
    try:
        printed, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return json.loads(printed.splitlines()[-1])


@pytest.fixture(scope="module")
def on_eight_devices() -> Any:
    """One process for all: it takes longer to start than most of what it measures."""
    return answer(start("devices", devices=8))


def test_value_and_gradient_are_those_of_one_device(on_eight_devices: Any) -> None:
    seen = set()
    for found in on_eight_devices["estimates"]:
        name, meta_layout, _, batch_size = found["case"]
        seen |= {(name, meta_layout), (name, batch_size is None)}
        assert found["error"] < TOLERANCE[name], found["case"]
        # A layout must not change what is trusted.
        assert found["same_statuses"] and max(found["statuses"]) <= 2, found["case"]
        assert np.max(np.abs(found["grad"])) > 1e-3, "a gradient of zero would agree with anything"
    for name in TOLERANCE:
        assert {(name, "replicated"), (name, "sharded"), (name, True), (name, False)} <= seen


def test_no_task_travels(on_eight_devices: Any) -> None:
    """Between devices go sums over tasks, whether any task goes on, and meta-parameters that are spread: nothing else.

    Meta-parameters are a kernel (8,) and a bias (); a task's inputs have shape (20, 8), a batch of them (1, 20, 8) on
    each device. Taking consecutive tasks as a batch gathered all of them on all devices.
    """
    small = {"pred[]", "f64[]", "f64[8]", "f64[1]"}
    for found in on_eight_devices["estimates"]:
        kinds = {operation for operation, _ in found["collectives"]}
        shapes = {shape for _, text in found["collectives"] for shape in text.strip("()").split(", ")}
        assert shapes <= small, (found["case"], found["collectives"])
        assert "all-reduce" in kinds, "the sum over tasks needs one"
        assert kinds <= {"all-reduce", "all-gather"}
        assert found["devices_of_a_status"] == 8, "what is kept of each task stays where the task is"


def test_the_optimizer_and_its_warm_start(on_eight_devices: Any) -> None:
    for found in on_eight_devices["training"]:
        assert found["error"] < 1e-9, found["case"]
        assert found["moved"] > 1e-3
        assert found["tasks_on_a_device"] == [2] * 8, "solutions stay with their tasks"
        assert found["devices_of_meta_params"] == (8 if found["case"][1] == "sharded" else 1)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="types do not say along which axes values vary")
def test_each_device_on_its_own_in_shard_map() -> None:
    """With the default checks: a loop's carry that starts from a constant has another type there than one of a task."""
    found = answer(start("shard_map", devices=8))
    assert [each["case"] for each in found["mapped"]] == ["default", "to a tolerance", "implicit", "backprop", "argmin"]
    for each in found["mapped"]:
        # As above: tolerances of solvers are met on noise.
        assert each["error"] < (1e-9 if each["case"] in ("default", "argmin", "to a tolerance") else 1e-11), each
    assert len(found["traced"]) == 13


def test_what_is_resumed_on_a_mesh_goes_on_the_same() -> None:
    found = answer(start("resume", devices=8))
    assert found["devices"] == [8], "every leaf that is restored into lies on all devices"
    assert found["numpy"] and found.get("orbax", True)


def test_two_processes_each_with_its_part_of_the_tasks(on_eight_devices: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [start("process", str(rank), address, "2") for rank in range(2)]
    first, second = (answer(process) for process in both)
    assert first == second
    assert (first["processes"], first["tasks"]) == (2, 16)
    alone = next(found["grad"] for found in on_eight_devices["estimates"] if found["case"][0] == "learning twice")
    np.testing.assert_allclose(first["grad"], alone, rtol=1e-9, atol=1e-13)
