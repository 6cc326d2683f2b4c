"""The package's layout: imports go one way, the outside sees public names only, and those explain themselves."""

import ast
import doctest
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import contrastive_meta as cm
from contrastive_meta import architectures, local_learners, problems, prox

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "contrastive_meta"

# Each unit (a module or a folder of modules) may import itself and the units before it.
ORDER = (
    "_pytree",
    "_control",
    "_arity",
    "_tracing",
    "_holomorphic",
    "_problem",
    "_stages",
    "_result",
    "_dependence",
    "_response",
    "_row_norms",
    "_solvers",
    "prox",
    "_instance",
    "_symmetry",
    "_walls",
    "_base_point",
    "_nudging",
    "_plasticity",
    "_linear",
    "_estimators",
    "_contrastive",
    "_argmin",
    "_sharding",
    "_batch",
    "_optax",
    "_report",
    "problems",
    "architectures",
    "local_learners",
)
# Problems are examples of what a user writes, so they get no more of the package than a user has.
SEEN_BY_PROBLEMS = {"_pytree", "_problem", "problems"}
DEPENDENCIES = {"jax", "optax", "numpy", "scipy"}

# The only files outside the package that may name its private modules: tests of those modules' own promises, which
# no public name exposes.
PRIVATE_TESTED_BY: dict[str, set[str]] = {
    "tests/test_holomorphic.py": {"_holomorphic"},
    "tests/test_conjugate_gradient.py": {"_linear"},
    "tests/test_row_norms.py": {"_row_norms"},
}

# Words of the old vocabulary and the standard ones in their place. In identifiers they are parts between underscores
# (or capitals); in docstrings and comments, regular expressions; in module names, whole names.
IDENTIFIERS = {
    "answer|answers|answered": "solution, estimate, reply",
    "astray": "basin uncertain",
    "bend|bends": "nonlinearity",
    "decide": "accept or reject",
    "doubling": "step reduction",
    "doubt|doubts|doubtful": "error estimate, caveat",
    "falls": "sufficient decrease",
    "foretold": "predicted reduction",
    "gauge|seek|rung": "step-size selection, trial",
    "go_on|run_again|runs_again": "fallback, rerun, continued",
    "judge|judged|judges": "convergence tests, residuals, status",
    "lacking|untruncated": "Richardson extrapolation, iterative refinement",
    "mover": "Newton step",
    "newton_length": "Cauchy step length",
    "one_pass": "Newton-Krylov iteration",
    "oracle|oracles": "finite differences, reference",
    "ran_away|runs_away|runaway": "nudge unbounded",
    "remainder|what_is_left": "residual (of which equation)",
    "setting": "instance",
    "shrink": "step reduction",
    "turn|turns": "iteration, linear solve",
    "unanswered": "residual norm, not converged",
    "verdict|verdicts": "agreement",
}
# Fields that users read, by the class that has them.
PUBLIC_FIELDS = {"EstimatorState.doubling", "Segment.bend", "CheckReport.verdict"}
PROSE = {
    r"astray": "basin uncertain",
    r"betrays?": "shows",
    r"foretold": "predicted reduction",
    r"front door": "interface",
    r"lest": "so that ... not",
    r"(no more|nor|neither) do(es)?": "a sentence of its own",
    r"oracles?": "finite differences, reference",
    r"ran away|runs away": "unbounded",
    r"remainders?": "residual (of which equation)",
    r"unanswered": "residual norm, not converged",
    r"what (is|was) left(?! out)": "residual (of which equation)",
}
MODULES = {
    "border": "interop",
    "doubt": "error_estimate",
    "front": "batch",
    "gauge": "step_size",
    "go_on": "fallback",
    "judge": "convergence",
    "layout": "sharding",
    "line": "newton_step",
    "oracle": "finite_differences",
    "phases_seen": "phase_profile",
    "run_again": "rerun",
    "search": "newton_krylov",
    "seek": "step_size",
    "verdict": "agreement",
    "words": "sentences",
}
# Old words that are still there, by file.
EXCEPTIONS: dict[str, set[str]] = {}


def package_files() -> list[Path]:
    """Every module of the package."""
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def module_name(path: Path) -> str:
    """The dotted name of the module in `path`, `__init__` left out."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str | None:
    """The part of `contrastive_meta.UNIT...` that the order ranks; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(syntax: ast.AST, package: str = "") -> Iterator[str]:
    """The dotted name of everything imported anywhere in `syntax`: `from a import b` gives `a.b`."""
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def private_names(syntax: ast.AST) -> set[str]:
    """Private modules and names of the package that `syntax` imports or reaches through a name it is bound to."""
    bound = {PACKAGE}
    for node in ast.walk(syntax):
        if isinstance(node, ast.Import):
            bound |= {alias.asname for alias in node.names if alias.name == PACKAGE and alias.asname}
    reached = {name.split(".", 1)[1] for name in imports(syntax) if name.startswith(f"{PACKAGE}.")}
    for node in ast.walk(syntax):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            reached.add(node.attr)
    private = {name for name in reached if any(part.startswith("_") for part in name.split("."))}
    return {name for name in private if not name.startswith("__")}


def syntax_of(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text())


def listed(what: str, offenders: list[str]) -> str:
    """A message with one offender a line."""
    return "\n  ".join([f"{what}:", *offenders])


def python_in_markdown(text: str) -> Iterator[ast.AST]:
    """The syntax of every fenced Python block, plain or with prompts."""
    for block in re.findall(r"^```(?:python|pycon|py)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        examples = doctest.DocTestParser().get_examples(block)
        yield ast.parse("".join(example.source for example in examples) if examples else block)


def public_names() -> Iterator[tuple[str, Any]]:
    """What `import contrastive_meta` and `contrastive_meta.problems` offer, by the name a user types."""
    for prefix, module in (
        ("", cm),
        ("problems.", problems),
        ("architectures.", architectures),
        ("local_learners.", local_learners),
        ("prox.", prox),
    ):
        syntax = ast.parse(Path(inspect.getfile(module)).read_text())
        for node in ast.walk(syntax):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = alias.asname or alias.name
                    yield prefix + name, getattr(module, name)


# Whose control flow `jax.shard_map` must be able to type. Problems and local learners are what users write.
TYPED_LOOPS = set(ORDER) - {"_control", "problems", "architectures", "local_learners"}
CONTROL_FLOW = {"cond", "fori_loop", "scan", "switch", "while_loop"}


def test_control_flow_is_called_through_control() -> None:
    """A carry that starts from a constant has the wrong type in `jax.shard_map`; `_control` gives it another."""
    offenders = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in package_files()
        if unit(module_name(path)) in TYPED_LOOPS
        for node in ast.walk(syntax_of(path))
        if isinstance(node, ast.Attribute) and node.attr in CONTROL_FLOW and ast.unparse(node.value) == "jax.lax"
    ]
    assert not offenders, listed("`jax.lax` where `contrastive_meta._control` has the same", offenders)


def wrong_way(module: str, imported: str) -> bool:
    """Whether `module` imports a unit that the order puts after its own."""
    here, there = unit(module), unit(imported)
    if here is None or there is None or here == there:
        return False
    return ORDER.index(there) > ORDER.index(here) or (here == "problems" and there not in SEEN_BY_PROBLEMS)


def test_every_module_has_a_place_in_the_order() -> None:
    units = {unit(module_name(path)) for path in package_files()} - {None}
    assert units <= set(ORDER), f"give {units - set(ORDER)} a place in ORDER"


def test_the_order_is_read_as_meant() -> None:
    """The check itself can fail: in both directions, for relative imports, and for the narrower view of problems."""
    assert wrong_way(f"{PACKAGE}._solvers.base", f"{PACKAGE}._report.compare")
    assert not wrong_way(f"{PACKAGE}._report", f"{PACKAGE}._solvers.base")
    assert wrong_way(f"{PACKAGE}.problems._ridge", f"{PACKAGE}._solvers.base")
    relative = ast.parse("from .._nudging import circle\nfrom . import base")
    assert list(imports(relative, f"{PACKAGE}._solvers")) == [f"{PACKAGE}._nudging.circle", f"{PACKAGE}._solvers.base"]
    assert private_names(ast.parse("import contrastive_meta as cm\ncm._pytree.norm(cm.__name__)")) == {"_pytree"}
    assert private_names(ast.parse("from contrastive_meta._pytree import norm")) == {"_pytree.norm"}


def test_imports_go_one_way_and_reach_only_the_dependencies() -> None:
    backwards, foreign = [], []
    for path in package_files():
        module = module_name(path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name in imports(syntax_of(path), package):
            if name.startswith(f"{PACKAGE}."):
                backwards += [f"{module} imports {name}"] if wrong_way(module, name) else []
            elif name.split(".")[0] not in DEPENDENCIES | set(sys.stdlib_module_names) | {PACKAGE}:
                foreign.append(f"{module} imports {name}")
    assert not backwards, listed("imports of later units", backwards)
    assert not foreign, listed(f"the package depends on {DEPENDENCIES} only", foreign)


def outside_files() -> list[Path]:
    """Code and pages that stand where a user stands."""
    scripts = [path for folder in ("tests", "benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [
        *scripts,
        *sorted(ROOT.glob("*.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
        *sorted((ROOT / "examples").glob("*.md")),
    ]


def test_the_outside_uses_public_names_only() -> None:
    found = []
    for path in outside_files():
        syntaxes = python_in_markdown(path.read_text()) if path.suffix == ".md" else [syntax_of(path)]
        allowed = PRIVATE_TESTED_BY.get(str(path.relative_to(ROOT)), set())
        names = sorted({name for syntax in syntaxes for name in private_names(syntax)})
        found += [f"{path.relative_to(ROOT)}: {name}" for name in names if name.split(".")[0] not in allowed]
    assert not found, listed("private names used outside the package", found)


def test_no_exception_is_left_behind() -> None:
    for name, allowed in PRIVATE_TESTED_BY.items():
        used = {private.split(".")[0] for private in private_names(ast.parse((ROOT / name).read_text()))}
        assert used == allowed, f"PRIVATE_TESTED_BY[{name!r}] allows {allowed}, the file uses {used}"


def test_the_map_of_the_files_is_complete_and_names_no_other() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`(_?[a-z][\w/]*(?:\.py|/))`", page))
    absent = sorted(name for name in named if not any((root / name).exists() for root in (ROOT, ROOT / PACKAGE)))
    assert not absent, listed("files that docs/architecture.md names and the package does not have", absent)
    units = {name.split("/")[0].removesuffix(".py") for name in named}
    forgotten = sorted(set(ORDER) - units)
    assert not forgotten, listed("modules that docs/architecture.md does not name", forgotten)


def test_public_names_have_docstrings_with_examples() -> None:
    found = []
    for name, value in public_names():
        if isinstance(value, ModuleType):
            found += [] if value.__doc__ else [f"{name}: no docstring"]
        elif not (inspect.isclass(value) or inspect.isroutine(value)):
            found.append(f"{name}: a {type(value).__name__}, to be documented in docs/")
        else:
            # Of the object itself: an inherited docstring describes something else.
            text = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
            example = re.search(r"^\s*Example:\n\s+>>> ", text, flags=re.MULTILINE)
            found += [] if example else [f"{name}: {'no runnable Example in its' if text else 'no'} docstring"]
    assert not found, listed("public names without explanation", found)


def test_files_begin_with_their_reason_to_exist() -> None:
    found = [module_name(path) for path in package_files() if not ast.get_docstring(syntax_of(path))]
    assert not found, listed("no module docstring", found)


def defined(syntax: ast.AST) -> Iterator[str]:
    """Every identifier that `syntax` defines: classes, functions, arguments, variables, and fields as `Class.field`."""
    fields: dict[ast.AST, str] = {}
    for node in ast.walk(syntax):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            fields |= {part.target: node.name for part in node.body if isinstance(part, ast.AnnAssign)}
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.id if isinstance(node, ast.Name) else node.attr
            yield f"{fields[node]}.{name}" if node in fields else name


def snake_case(identifier: str) -> str:
    """`PhaseSetup` and `phase_setup` alike as `_phase_setup_`."""
    return f"_{re.sub(r'(?<=[a-z0-9])(?=[A-Z])', '_', identifier).lower().strip('_')}_"


def prose(text: str) -> str:
    """Docstrings and comments, lines joined, without quotations of code in backticks and without examples."""
    docstrings = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    words = re.sub(r"^\s*(>>>|\.\.\.).*$", "", "\n".join([*docstrings, *comments]), flags=re.MULTILINE)
    return " ".join(re.sub(r"`[^`]*`", "", words).split())


def old_words(name: str, text: str) -> dict[str, str]:
    """Old words in a module of this name, each with the standard one."""
    stem = name.rpartition("/")[2].removesuffix(".py").strip("_")
    found = {f"module {stem}": MODULES[stem]} if stem in MODULES else {}
    for identifier in set(defined(ast.parse(text))) - PUBLIC_FIELDS:
        for word, standard in IDENTIFIERS.items():
            if re.search(f"_({word})_", snake_case(identifier.rpartition(".")[2])):
                found[identifier] = standard
    sentences = prose(text)
    for word, standard in PROSE.items():
        for match in re.finditer(rf"\b({word})\b", sentences, flags=re.IGNORECASE):
            found[f'"{match.group().lower()}"'] = standard
    return found


def test_old_words_are_found() -> None:
    """In identifiers, in prose and in module names; public fields, uses and words that contain them are none."""
    text = '''
class Judged(NamedTuple):
    """Nor does this."""
    ran_away: Any
class EstimatorState(NamedTuple):
    doubling: Any
def smallest_settings(overturned, state): return state.answer  # lest it be `lest`
'''
    assert set(old_words("_contrastive/_oracle.py", text)) == {
        "module oracle", "Judged", "Judged.ran_away", '"nor does"', '"lest"'
    }  # fmt: skip
    assert not old_words("_solvers/_line_search.py", "searched = 1")


def test_the_standard_words_are_used() -> None:
    found, stale = [], []
    texts = {str(path.relative_to(ROOT / PACKAGE)): path.read_text() for path in package_files()}
    for name, text in texts.items():
        here, allowed = old_words(name, text), EXCEPTIONS.get(name, set())
        found += [f"{name}: {word} -> {standard}" for word, standard in sorted(here.items()) if word not in allowed]
        stale += [f"{name}: {word}" for word in sorted(allowed - set(here))]
    assert not found, listed("old words, and the standard ones", found)
    assert not stale, listed("no longer there: take them out of EXCEPTIONS", stale)
    assert set(EXCEPTIONS) <= set(texts), f"EXCEPTIONS names files that are gone: {set(EXCEPTIONS) - set(texts)}"
