"""The report in a real headless Chromium: what a reader sees, points at and tabs to. Screenshots were checked by
eye.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.reports.gather import gather
from evaluation.reports.page import write_report
from features.run_lengths import runs
from tests.browser import Visit
from tests.report_material import SPEC, write_run

pytestmark = pytest.mark.slow

HOSTILE = "<img src=x onerror=alert(1)>"
# Names of a phase, a video and a run that contain HTML.
SPEC_HOSTILE = SPEC.model_copy(
    update={"phases": ("</script><script>alert(2)</script>", "%{x} $a$ <b>", *SPEC.phases[2:]), "phase_orders": {}}
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs side by side."""
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    write_report(folder / "report.html", gather(runs))
    return folder / "report.html"


@pytest.fixture
def visit(chromium: Any, report: Path) -> Iterator[Visit]:
    with Visit(chromium, report) as opened:
        yield opened


def test_the_page_makes_no_requests_and_logs_no_errors(visit: Visit) -> None:
    visit.walk_through()
    assert visit.page.locator(".main-svg").count() > 20
    assert visit.complaints == []
    assert visit.requests == []


def test_the_switch_changes_tables_and_bars(visit: Visit) -> None:
    page = visit.page
    bars = visit.show(".bars")
    before = (page.locator("table:visible caption").first.inner_text(), _first_bar(bars))
    page.select_option("#convention", "relaxed_matlab")
    after = (page.locator("table:visible caption").first.inner_text(), _first_bar(bars))
    assert "phase_mean" in before[0]
    assert "relaxed_matlab" in after[0]
    assert before[1] != after[1]
    assert page.locator(".convention:visible").count() == 1
    page.select_option("#metric", "recall")
    assert _first_bar(bars) != after[1]
    page.select_option("#convention", "segmental")
    assert "Edit score" in page.locator("table:visible").first.inner_text()
    assert not bars.is_visible()
    assert visit.complaints == []


def _first_bar(bars: Any) -> list[float]:
    found: list[float] = bars.evaluate("box => box.data[0].x")
    return found


def test_hovering_a_ribbon_shows_the_time(visit: Visit) -> None:
    ribbon = visit.show(".ribbon")
    left, length = ribbon.evaluate("box => [box._fullLayout.xaxis._offset, box._fullLayout.xaxis._length]")
    box = ribbon.bounding_box()
    visit.page.mouse.move(box["x"] + left + 0.5 * length, box["y"] + 20)
    label = ribbon.locator(".hoverlayer text").first
    label.wait_for()
    assert re.search(r"truth: .*0:\d\d:\d\d to 0:\d\d:\d\d", label.text_content())
    readout = visit.page.locator(".readout").first.inner_text()
    assert readout.startswith(("0:02:29", "0:02:30"))  # half of 300 seconds
    assert "truth: " in readout
    assert "second: " in readout


def test_arrow_keys_step_through_a_ribbon(visit: Visit, report: Path) -> None:
    content = gather([report.parent / "first", report.parent / "second"])
    truth = content.truth.videos[content.videos[0]].phase
    ribbon, readout = visit.show(".ribbon"), visit.page.locator(".readout").first
    ribbon.focus()
    visit.page.keyboard.press("End")
    assert readout.inner_text().startswith("0:04:59")
    visit.page.keyboard.press("Home")
    times = set()
    for _ in range(200):
        visit.page.keyboard.press("ArrowRight")
        times.add(readout.inner_text()[:7])
    starts = [run.start for run in runs(truth)]
    assert {f"0:{start // 60:02d}:{start % 60:02d}" for start in starts[1:]} <= times


def test_ribbons_have_no_gaps(visit: Visit) -> None:
    ribbon = visit.show(".ribbon")
    length, rows = ribbon.evaluate("box => [box._fullLayout.xaxis._length, box.layout.yaxis.categoryarray.length]")
    widths = ribbon.evaluate("box => [...box.querySelectorAll('.point path')].map(one => one.getBBox().width)")
    assert sum(widths) == pytest.approx(rows * length, rel=0.01)


def test_a_phone_is_wide_enough(chromium: Any, report: Path) -> None:
    with Visit(chromium, report, width_px=360, height_px=740) as visit:
        visit.walk_through()
        for convention in visit.page.locator("#convention option").all():
            visit.page.select_option("#convention", convention.get_attribute("value"))
            assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360
        ends = visit.page.eval_on_selector_all(
            ".figure svg", "all => all.map(one => one.getBoundingClientRect().right)"
        )
        assert max(ends) <= 360
        assert visit.complaints == []


def test_the_keyboard_reaches_the_switch(visit: Visit) -> None:
    page = visit.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    assert page.locator(".skip").bounding_box()["x"] >= 0  # seen while it has the focus
    reached = []
    while "convention" not in reached and len(reached) < 15:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    assert reached[-1] == "convention"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("ArrowDown")
    assert "video_macro" in page.locator("table:visible caption").first.inner_text()


def test_headings_are_in_order_and_figures_have_words(visit: Visit) -> None:
    levels = visit.page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(one => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    names = visit.page.eval_on_selector_all(".figure", "all => all.map(one => one.getAttribute('aria-label'))")
    assert all(names)


def test_names_stay_names(chromium: Any, tmp_path: Path) -> None:
    run = write_run(tmp_path / "<script>alert(3)<b>", [HOSTILE, "video02"], spec=SPEC_HOSTILE, frames=120)
    write_report(tmp_path / "report.html", gather([run]))
    with Visit(chromium, tmp_path / "report.html") as visit:
        visit.page.on("dialog", lambda dialog: visit.complaints.append(dialog.message))
        visit.walk_through()
        assert visit.page.locator("h1").inner_text() == "<script>alert(3)<b>"
        headings = visit.page.locator("article h3").all_inner_texts()
        assert any(text.startswith(HOSTILE) for text in headings)
        assert visit.page.locator("img").count() == 0
        ribbon = visit.show(".ribbon")
        ribbon.focus()
        visit.page.keyboard.press("Home")
        assert "</script><script>alert(2)</script>" in visit.page.locator(".readout").first.inner_text()
        drawn = visit.show("[data-figure^=confusion]").inner_text()
        assert "1 </script><script>alert(2)" in drawn
        assert "2 %\u200b{x} $a$ <b>" in drawn
    assert visit.complaints == []
    assert visit.requests == []


def test_the_policy_lets_nothing_else_in(chromium: Any, report: Path, tmp_path: Path) -> None:
    added = "<script>window.inside = 1</script><img src='http://127.0.0.1:9/x.png'></body>"
    (tmp_path / "changed.html").write_text(report.read_text().replace("</body>", added))
    with Visit(chromium, tmp_path / "changed.html") as visit:
        assert visit.page.evaluate("window.inside") is None
    assert len(visit.complaints) >= 2
    assert all("Content Security Policy" in text for text in visit.complaints)
