"""Every example runs as a user would run it and ends in an assertion, is short, and is listed in its README."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 59

# What the package itself brings.
INSTALLED = {"contrastive_meta", "jax", "numpy", "optax", *sys.stdlib_module_names}


def missing(script: Path) -> list[str]:
    """The libraries that `script` imports and that are not there."""
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return sorted(name for name in found - INSTALLED if importlib.util.find_spec(name) is None)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs(script: Path, tmp_path: Path) -> None:
    if absent := missing(script):
        pytest.skip(f'needs {", ".join(absent)}: python -m pip install ".[examples]"')
    # A process of its own: this suite's float64, cheap compiler settings and errors out of warnings are not a user's.
    settings = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    path = os.pathsep.join([str(ROOT), *filter(None, [settings.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**settings, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip(), "an example prints what it found"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_ends_in_an_assertion(script: Path) -> None:
    text = script.read_text()
    syntax = ast.parse(text)
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(syntax)
    last = syntax.body[-1]
    assert isinstance(last, ast.Assert)
    assert any(isinstance(node, ast.Compare) for node in ast.walk(last)), "compare a number with a number"


def test_every_example_is_listed_and_nothing_else() -> None:
    page = (ROOT / "examples" / "README.md").read_text()
    rows = [line.split("](")[1].split(")")[0] for line in page.splitlines() if line.startswith("| [")]
    assert sorted(rows) == [script.name for script in SCRIPTS]
