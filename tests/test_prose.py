"""README and docs are in plain words: short sentences, short pages, and a textbook's terms."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST_SENTENCE = 35  # words
LARGEST_PAGE = 12_000  # bytes
LARGEST_README = 7_500
GENERATED = ROOT / "docs" / "records"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if GENERATED not in page.parents),
]
REPORTS = sorted((ROOT / "contrastive_meta" / "_report").rglob("*.py"))

# Words of the old vocabulary, and the standard ones. Words with an everyday meaning as well are left out: line, place,
# far, turn, hidden, learned, published.
WORDS = {
    r"answer(s|ed|ing)?": "solution, solve for, estimate",
    r"astray": "basin uncertain",
    r"bends?": "nonlinearity",
    r"betrays?": "shows",
    r"doubts?|doubtful": "error estimate, caveat",
    r"foretold": "predicted",
    r"front door": "interface",
    r"gauges?|rungs?": "step-size selection, trial",
    r"go(es)? on|went on|going on": "continue",
    r"judges?|judged|judging": "measure, evaluate, outer loss",
    r"lest": "so that ... not",
    r"movers?": "Newton step",
    r"(no more|nor|neither) do(es)?": "a sentence of its own",
    r"oracles?": "finite differences, reference",
    r"ran away|runs away": "unbounded",
    r"remainders?": "residual (of which equation)",
    r"(run|ran|runs) again": "rerun",
    r"seeks?|seeking|sought": "select, step-size selection",
    r"shrinks?|shrinking": "reduce, reduction",
    r"unanswered": "residual norm, not converged",
    r"verdicts?": "agreement, result",
    r"what (is|was) left(?! out)": "residual (of which equation)",
}


def prose(text: str, *, tables: bool = False) -> list[str]:
    """The paragraphs and list items of a page, each on one line: no code, formulas, headings or results."""
    text = re.sub(r"<!-- results: begin -->.*?<!-- results: end -->", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```$", "\n\n", text, flags=re.DOTALL | re.MULTILINE)
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.strip() or re.match(r"#|    \S" if tables else r"\||#|    \S", line):
            paragraphs.append([])
            continue
        if re.match(r"\||\s*([-*]|\d+\.)\s", line):
            paragraphs.append([])
        paragraphs[-1].append(line.strip())
    joined = (" ".join(lines) for lines in paragraphs if lines)
    # Code is one word; of a link its text counts.
    return [re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "X", paragraph)) for paragraph in joined]


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose."""
    ends = re.compile(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*]*[A-Z])")
    return [sentence for paragraph in prose(text) for sentence in ends.split(paragraph)]


def old_words(text: str) -> list[str]:
    """The old words of a page, each with its standard one."""
    found = []
    for paragraph in prose(text, tables=True):
        for word, standard in WORDS.items():
            matches = re.finditer(rf"\b({word})\b", paragraph, flags=re.IGNORECASE)
            found += [
                f'"{match.group()}" -> {standard}: {paragraph[max(0, match.start() - 40) :][:90]}' for match in matches
            ]
    return found


def test_what_is_measured_is_found() -> None:
    """The measures can fail, and leave out what they are to leave out."""
    page = (
        "# Lest\n\n"
        + "word " * 36
        + f"end. `lest` Short.\n\n| {'word ' * 40}oracle |\n\n```\nlest\n```\n\n- The remainder of [it](x.md).\n"
    )
    assert [len(sentence.split()) for sentence in sentences(page)] == [37, 2, 5]
    assert [found.split(" ")[0] for found in old_words(page)] == ['"oracle"', '"remainder"']


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_in_plain_words(page: Path) -> None:
    text = page.read_text()
    long = [
        f"{len(words)} words: {sentence}"
        for sentence in sentences(text)
        if len(words := sentence.split()) > LONGEST_SENTENCE
    ]
    found = long + old_words(text)
    assert not found, "\n  ".join([f"{page.name}:", *found])
    largest = LARGEST_README if page == ROOT / "README.md" else LARGEST_PAGE
    assert len(text.encode()) <= largest, f"{page.name} has {len(text.encode())} bytes: divide it"


def printed(source: str) -> Iterator[str]:
    """The texts of a module that it may print: strings with a space, docstrings left out, X for what is filled in."""
    tree = ast.parse(source)
    with_docstrings = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, with_docstrings) and node.body and isinstance(node.body[0], ast.Expr)
    }
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | within:
            yield re.sub(r"{\w+}", "X", node.value)


def test_printed_texts_are_found() -> None:
    source = '"""An oracle."""\nx = f"{oracle} is an oracle"\ny = "no more doubts"\nz = "{unanswered} is left"\n'
    assert [bool(old_words(text)) for text in printed(source) if " " in text] == [True, True, False]


@pytest.mark.parametrize("module", REPORTS, ids=lambda module: str(module.relative_to(ROOT)))
def test_what_reports_print_is_in_plain_words(module: Path) -> None:
    found = [word for text in printed(module.read_text()) if " " in text for word in old_words(text)]
    assert not found, "\n  ".join([f"{module.name}:", *found])
