"""The report page is complete and self-contained, and the drawn figure of README shows what it says."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks import doc_figures, gallery, report, report_page
from benchmarks.harness import COMMITTED_RECORDS
from benchmarks.registry import BENCHMARKS

ROOT = Path(__file__).resolve().parent.parent
# Drawn in a second; all pictures together take a minute.
DRAWN = "tuning"
VOID = {"meta", "img"}


class Balanced(HTMLParser):
    """Reads a page, and fails where a tag is closed that is not the one open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.benchmarks
def test_the_page_of_the_committed_records_is_complete_and_refers_to_nothing_else(tmp_path: Path) -> None:
    records = report.load(COMMITTED_RECORDS)
    runs = {name: report.newest_runs(records, name) for name in BENCHMARKS}
    rows = [row for run in runs[DRAWN] for row in run]
    pictures = report.draw(BENCHMARKS[DRAWN], rows, tmp_path)
    page = report_page.render(runs, BENCHMARKS, {DRAWN: pictures})
    reader = Balanced()
    reader.feed(page)
    assert not reader.open
    assert pictures and page.count("data:image/png;base64,") == len(pictures)
    assert all(address.startswith(("#", "data:")) for address in reader.addresses)
    for name in (name for name, found in runs.items() if found):
        assert f'href="#{name}"' in page and f'id="{name}"' in page and f"benchmarks run {name}<" in page
    # Every line of every table is there.
    text = html.unescape(page)
    shown = [BENCHMARKS[name].show(run) for name, found in runs.items() for run in found]
    assert shown and all(table in text for table in shown)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page and "overflow-x: auto" in page


def test_the_committed_figures_are_those_that_the_code_draws(tmp_path: Path) -> None:
    records = report.load(COMMITTED_RECORDS)
    curves, analysis = (
        [row for run in report.newest_runs(records, name) for row in run] for name in ("beta_curves", "analysis")
    )
    of_gallery = {
        name: [row for run in report.newest_runs(records, name) for row in run] for name in gallery.THUMBNAILS
    }
    drawn = doc_figures.write(tmp_path, curves, analysis) + gallery.write(tmp_path / "gallery", of_gallery)
    shown = (ROOT / "docs" / "gallery.md").read_text()
    for path in drawn:
        committed = ROOT / "docs" / "figures" / path.relative_to(tmp_path)
        assert path.parent.name != "gallery" or f"figures/gallery/{path.name}" in shown
        assert committed.read_text() == path.read_text(), f"`python -m benchmarks report` remakes {committed.name}"
        assert 'points=""' not in path.read_text(), f"{path.name} has a curve without a point"


def test_the_ends_of_both_phases_are_the_lowest_points_of_their_curves() -> None:
    """And the contrast has the sign of the gradient: both are read off the picture, as a reader would."""
    drawing = doc_figures.contrast_svg()
    ends = {}
    for name in ("inner", "nudged"):
        (points,) = re.findall(rf'<polyline class="{name}" points="([^"]*)"', drawing)
        curve = [tuple(map(float, point.split(","))) for point in points.split()]
        ((x, y),) = re.findall(rf'<circle class="{name}" cx="([\d.]+)" cy="([\d.]+)"', drawing)
        lowest = max(curve, key=lambda point: point[1])  # pixels count downwards
        # The grid of a curve has a point in every 2.9 pixels.
        assert abs(lowest[0] - float(x)) <= 3.0 and abs(lowest[1] - float(y)) <= 0.2
        ends[name] = float(x)
    outer = doc_figures.across(doc_figures.VALIDATION_TARGET)
    assert outer < ends["nudged"] < ends["inner"]


def test_a_thumbnail_has_the_mean_and_the_range_of_its_seeds() -> None:
    records = [
        {"kind": "method", "case": "anchor", "error_at_equal_gradients": 0.0},
        {"kind": "method", "case": "anchor", "error_at_equal_gradients": 4.0},
        {"kind": "method", "case": "MAML", "error_at_equal_gradients": 1.0},
        {"kind": "claim", "case": "claims"},
    ]
    drawing = gallery.draw(records, gallery.THUMBNAILS["sinusoids"])
    anchor, maml = re.findall(r'<circle class="(\w+)" cx="([\d.]+)"', drawing)
    ranges = re.findall(r'<line class="(\w+)" x1="([\d.]+)" y1="[\d.]+" x2="([\d.]+)"', drawing)
    low, high = map(float, ranges[0][1:])  # the axis
    assert (anchor[0], maml[0]) == ("nudged", "inner")
    assert abs(float(anchor[1]) - (low + high) / 2) < 0.1 and abs(float(maml[1]) - (low + (high - low) / 4)) < 0.1
    assert ranges[1] == ("nudged", ranges[0][1], ranges[0][2]) and ranges[2][1] == ranges[2][2]


def test_the_ladder_falls_with_the_noise_and_rises_with_truncation() -> None:
    drawing = doc_figures.ladder_svg()
    changes, errors = (
        [float(y) for _, y in re.findall(r"([\d.]+),([\d.]+)", points)]
        for points in re.findall(r'<polyline class="\w+" points="([^"]*)"', drawing)
    )
    # Pixels count downwards: the least change is neither the first nor the last, and its strength errs least, or a
    # neighbour of it.
    least = max(range(len(changes)), key=changes.__getitem__)
    assert 0 < least < len(changes) - 1
    assert abs(max(range(len(errors)), key=errors.__getitem__) - (least + 1)) <= 1
