"""The pages' Python runs, in order and in one namespace, as a reader would type it; links and names lead somewhere."""

import ast
import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

import contrastive_meta as cm
from benchmarks import page_pictures
from benchmarks.page_pictures import FENCED, SAVED

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
ALL_PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
PAGES = [page for page in ALL_PAGES if FENCED.search(page.read_text())]
# Modules of the package that users name; the reference has a page for each.
MODULES = ("prox", "problems", "architectures", "local_learners")


# What a page says that it prints; numbers differ from machine to machine, words do not.
SHOWN = re.compile(r"^The whole page prints[^\n]*:\n\n```text\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d[\d.,]*(?:e[-+]?\d+)?")

# A page with this line runs before JAX has devices, in a process of its own.
OWN_PROCESS = "jax_num_cpu_devices"
# Places in a picture may differ from machine to machine by this part of its width, on average.
APART = 0.03

# Pages may show these without the tests needing them.
OPTIONAL = {"flax"}


def absent(code: str) -> list[str]:
    """The optional libraries that a block imports and that are not there."""
    modules = [node.module or "" for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    modules += [
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names
    ]
    names = {module.split(".")[0] for module in modules} & OPTIONAL
    return sorted(name for name in names if not importlib.util.find_spec(name))


@pytest.fixture
def precision_of_the_reader() -> Iterator[None]:
    """JAX's default precision, in which a page's numbers are given. Pages share no program: none is kept."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)
    jax.clear_caches()


@pytest.mark.usefixtures("precision_of_the_reader")
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_of_a_page_runs(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = path.read_text()
    monkeypatch.chdir(tmp_path)
    if SAVED.search(text):
        page_pictures.drawn_alike()
    if OWN_PROCESS in text:
        out = in_a_process_of_its_own("".join(block.group(1) for block in FENCED.finditer(text)))
    else:
        namespace: dict[str, Any] = {"__name__": path.stem}
        for source in page_pictures.blocks(path):
            if lacking := absent(source):
                pytest.skip(f'what follows on {path.name} needs {", ".join(lacking)}: pip install ".[examples]"')
            exec(compile(source, str(path), "exec"), namespace)
        out = capsys.readouterr().out
    printed = without_numbers(out)
    assert all(without_numbers(shown) in printed for shown in SHOWN.findall(text)), printed
    for name in SAVED.findall(text):
        assert f"figures/{name})" in text, f"{path.name} draws {name} and does not show it"
        found = apart((tmp_path / name).read_text(), (FIGURES / name).read_text())
        assert found <= APART, f"`python -m benchmarks.page_pictures {path.stem}` draws {name} anew"


def in_a_process_of_its_own(code: str) -> str:
    """What code prints that says itself how many devices there are."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def apart(drawn: str, committed: str) -> float:
    """How far the curves of two pictures are apart on average, relative to their width; inf if they show other things.

    Curves are the clipped paths of matplotlib's SVG, bars among them.
    """

    def read(picture: str) -> tuple[list[str], float, list[list[float]]]:
        words = [word for word in re.findall(r"<text[^>]*>([^<]*)</text>", picture) if re.search("[a-z]", word)]
        (width,) = re.findall(r'viewBox="0 0 ([\d.]+)', picture)
        curves = re.findall(r'<path d="([^"]*)" clip-path', picture)
        return words, float(width), [[float(n) for n in re.findall(r"-?\d+\.?\d*", curve)] for curve in curves]

    ours, theirs = read(drawn), read(committed)
    if ours[:2] != theirs[:2] or list(map(len, ours[2])) != list(map(len, theirs[2])) or not ours[2]:
        return math.inf
    differences = [abs(a - b) for x, y in zip(ours[2], theirs[2], strict=True) for a, b in zip(x, y, strict=True)]
    return sum(differences) / len(differences) / ours[1]


def test_pictures_that_show_other_things_are_told_apart() -> None:
    committed = (FIGURES / "sparse_model.svg").read_text()
    assert apart(committed, committed) == 0
    assert apart(committed, committed.replace("validation loss", "training loss")) == math.inf
    curve = re.search(r'<path d="([^"]*)" clip-path', committed)
    assert curve is not None
    assert apart(committed, committed.replace(curve.group(0), "")) == math.inf
    # The curve turned into a straight line at the bottom.
    flat = re.sub(r"(?<= )[\d.]+ $", "200", curve.group(1), flags=re.MULTILINE)
    assert apart(committed, committed.replace(curve.group(1), flat)) > APART


def without_numbers(text: str) -> str:
    """Words and signs in one line, a mark for each number."""
    return " ".join(NUMBER.sub("#", text).split())


def anchors(page: Path) -> set[str]:
    """What links within a page may point to, as mkdocs names its headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_the_package_exist(page: Path) -> None:
    names = set(re.findall(r"\bcm\.((?:\w+\.)*\w+)", page.read_text()))
    absent = [name for name in sorted(names) if not reachable(name)]
    assert not absent


def reachable(name: str) -> bool:
    """Whether `contrastive_meta.NAME` is there; behind a class or function anything may follow."""
    try:
        functools.reduce(getattr, name.split("."), cm)
    except AttributeError:
        first = name.partition(".")[0]
        return hasattr(cm, first) and first not in MODULES
    return True


def test_the_reference_has_every_public_name_once() -> None:
    pages = [page.read_text() for page in sorted((ROOT / "docs" / "reference").glob("*.md"))]
    shown = Counter(name for text in pages for name in re.findall(r"^::: contrastive_meta\.(\w+)$", text, flags=re.M))
    public = [name for name in vars(cm) if not name.startswith("_")]
    assert shown == Counter(public)
    (index,) = (text for text in pages if text.startswith("# Reference by topic"))
    listed = set(re.findall(r"`([\w.]+)`", index)) - {"cm", "contrastive_meta"}
    of_modules = {f"{module}.{name}" for module in MODULES for name in vars(getattr(cm, module)) if name[0] != "_"}
    assert listed == (set(public) - set(MODULES)) | of_modules
