"""The viewer in a real headless Chromium: every function by keys and by mouse, reloads, two tabs, long operations."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe

from features.annotation_files.table import read_csv
from live.view.app import Durations, Material
from live.view.videos import Timing
from tests.cli import run, start_fresh, succeed
from tests.live.view.browsing import Tab
from tests.live.view.material import LABELS, material, repeated_video, write_case
from tests.live.view.test_following import line
from tests.videos import VideoSpec, write_video

pytestmark = pytest.mark.slow

PHASES = ["Preparation", "CalotTriangleDissection", "ClippingCutting", "GallbladderDissection"]
Open = Callable[..., Tab]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds at 25 frames per second."""
    return write_case(tmp_path_factory.mktemp("videos"))


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Open]:
    """Opens material in a tab of a browser that has seen no other server; several tabs of one material share it."""
    from live.view.serve import PageServer

    with ExitStack() as stack:
        servers: dict[int, tuple[PageServer, Any]] = {}
        tabs: list[Tab] = []

        def opened(what: Material, **size: int) -> Tab:
            if id(what) not in servers:
                context = chromium.new_context(accept_downloads=True, reduced_motion="reduce")
                stack.callback(context.close)
                servers[id(what)] = stack.enter_context(PageServer(what)), context
            server, context = servers[id(what)]
            tabs.append(Tab(context, server, **size))
            return tabs[-1]

        yield opened
        for tab in tabs:
            assert tab.complaints == []
            assert tab.strangers == []


@pytest.fixture
def mine(case: Path, tmp_path: Path) -> Material:
    """The case with a folder for labels."""
    return material(case, labels=tmp_path / "labels", dataset="cholec80")


def on_disk(folder: Path) -> list[tuple[str, str, float, float]]:
    [path] = (folder / "labels").glob("*.csv")
    [video] = read_csv(path.read_bytes(), path).videos
    return [(one.track, one.label, one.start_s, one.end_s) for one in video.intervals]


# ---------------------------------------------------------------------------------------------- looking


def test_keys_step_frame_by_frame_and_playing_stops_on_an_exact_frame(open_tab: Open, case: Path) -> None:
    tab = open_tab(material(case))
    assert tab.picture() == 0
    for keys, frame in (
        (["ArrowRight"], 1),
        (["ArrowRight", "ArrowRight"], 3),
        (["Shift+ArrowRight"], 28),
        (["ArrowLeft"], 27),
        (["End"], 249),
        (["Shift+ArrowLeft", "PageUp"], 0),
        (["PageDown"], 249),
        (["Home", "Alt+ArrowRight"], 249),
        (["Home"], 0),
    ):
        tab.press(*keys)
        assert (tab.frame, tab.picture()) == (frame, frame)
    tab.page.select_option("#speed", "4")
    tab.press(" ")
    tab.until(lambda: tab.frame > 20)
    assert tab.page.evaluate("surgstage.player.canPlay")  # Chromium plays it itself
    tab.page.get_by_role("button", name="Pause").click()
    assert tab.page.evaluate("document.activeElement.id") == "timeline"  # so that the space bar plays again
    assert tab.picture() == tab.frame
    assert tab.page.locator("#edits").is_hidden()


def test_what_the_browser_cannot_play_is_played_from_images(open_tab: Open, tmp_path: Path) -> None:
    path = write_video(tmp_path / "old.avi", VideoSpec(codec="mpeg4", b_frames=0, count=50))
    tab = open_tab(material(path))
    tab.press(" ")
    tab.until(lambda: tab.frame > 5)
    assert not tab.page.evaluate("surgstage.player.canPlay")
    tab.press(" ")
    assert tab.picture() == tab.frame
    tab.press("End", " ")  # from the end, it begins again
    tab.until(lambda: 2 < tab.frame < 49)


def test_disagreements_are_counted_marked_and_stepped_through(open_tab: Open, case: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(LABELS)
    (tmp_path / "b.csv").write_text(LABELS.replace("4", "6") + "case,phase,ClippingCutting,9,9\n")
    tab = open_tab(material(case, shown=(tmp_path / "a.csv", tmp_path / "b.csv")))
    assert tab.page.locator("#agreement").inner_text() == "80.0 % equal, 1 disagreement"
    tab.press("d")
    assert tab.frame == 100
    assert "CalotTriangleDissection and Preparation" in tab.page.locator("#said").inner_text()
    tab.page.select_option("#compare-b", "0")
    assert tab.page.locator("#agreement").inner_text() == ""
    span = "surgstage.timeline.to - surgstage.timeline.from"
    tab.press("+", "+")
    assert tab.page.evaluate(span) == pytest.approx(2.5)
    tab.press("-")
    assert tab.page.evaluate(span) == pytest.approx(5)
    tab.press("f")
    assert tab.page.evaluate(span) == pytest.approx(10)


# ---------------------------------------------------------------------------------------------- labelling by keys


def test_labels_are_made_and_changed_with_keys_alone(open_tab: Open, mine: Material, tmp_path: Path) -> None:
    tab = open_tab(mine)
    one, two, three, four = PHASES
    tab.press("1")
    tab.go(100)
    tab.press("2")
    tab.go(200)
    tab.press("3")
    assert tab.labels == [(one, 0, 4), (two, 4, 8), (three, 8, 10)]
    tab.press("ArrowUp")
    assert tab.frame == 100
    tab.press("ArrowDown")
    assert tab.frame == 200
    tab.go(110)
    tab.press("[")  # CalotTriangleDissection begins here
    tab.go(190)
    tab.press("]")
    assert tab.labels == [(one, 0, 4.4), (two, 4.4, 7.6), (three, 7.6, 10)]
    tab.go(150)
    tab.press("s", "4")
    assert tab.labels == [(one, 0, 4.4), (two, 4.4, 6), (four, 6, 7.6), (three, 7.6, 10)]
    tab.press("m")
    assert tab.labels == [(one, 0, 4.4), (two, 4.4, 6), (four, 6, 10)]
    tab.press("Shift+M")
    assert tab.labels == [(one, 0, 4.4), (four, 4.4, 10)]
    tab.press("Delete")
    assert tab.labels == [(one, 0, 4.4)]
    for _ in range(3):
        tab.press("z")
    assert tab.labels == [(one, 0, 4.4), (two, 4.4, 6), (four, 6, 7.6), (three, 7.6, 10)]
    tab.press("Shift+Z")
    tab.press("Control+z", "Control+y", "Control+z")
    tab.press("r")  # the class of the interval at the playhead, in the table
    tab.page.locator("#segments select:focus").select_option(one)
    assert tab.page.evaluate("document.activeElement.value") == one  # the table has changed, the focus has not
    assert tab.labels == [(one, 0, 4.4), (two, 4.4, 6), (one, 6, 7.6), (three, 7.6, 10)]
    tab.saved()
    assert [(label, start, end) for _, label, start, end in on_disk(tmp_path)] == tab.labels


def test_tools_begin_and_end_and_may_overlap(open_tab: Open, mine: Material, tmp_path: Path) -> None:
    tab = open_tab(mine)
    tab.press("t")
    assert tab.page.locator("#track").input_value() == "tool"
    tab.press("1")  # Grasper from the start
    tab.go(50)
    tab.press("3")
    tab.go(75)
    tab.press("1", "3")
    tab.saved()
    assert on_disk(tmp_path) == [("tool", "Grasper", 0, 3), ("tool", "Hook", 2, 3)]


def test_a_track_and_classes_of_ones_own(open_tab: Open, case: Path, tmp_path: Path) -> None:
    tab = open_tab(material(case, labels=tmp_path / "labels"))  # no data set: no classes at all
    for button, name in (("New track", "step"), ("New class", "Suture"), ("New class", "Knot <b>")):
        tab.page.get_by_role("button", name=button).click()
        tab.page.get_by_label("Name", exact=True).fill(name)
        tab.press("Enter")
    tab.page.locator("#timeline").focus()
    tab.press("1")
    tab.go(125)
    tab.press("2")
    tab.saved()
    assert on_disk(tmp_path) == [("step", "Suture", 0, 5), ("step", "Knot <b>", 5, 10)]


# ---------------------------------------------------------------------------------------------- mouse


def test_a_border_is_dragged_to_a_frame_and_escape_leaves_it(open_tab: Open, mine: Material, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/case.csv").write_text(LABELS)
    tab = open_tab(mine)
    tab.drag(4, 6.013, drop=False)
    assert tab.frame == 150  # the picture is that of the border
    assert tab.labels[0] == ("Preparation", 0, 6)
    tab.press("Escape")
    assert tab.labels[0] == ("Preparation", 0, 4)
    tab.page.mouse.up()
    tab.drag(4, 5.013)
    tab.saved()
    assert on_disk(tmp_path) == [("phase", PHASES[0], 0, 5), ("phase", PHASES[1], 5, 10)]
    tab.drag(5, 12)  # not beyond the last frame of the next interval
    assert tab.labels == [(PHASES[0], 0, 9.96), (PHASES[1], 9.96, 10)]
    tab.page.mouse.click(*tab.place(2))
    assert tab.frame == 50


def test_a_prediction_is_the_start_and_stays_marked_until_it_is_accepted(
    open_tab: Open, case: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.csv").write_text(LABELS)
    opened = material(case, labels=tmp_path / "labels", shown=(tmp_path / "model.csv",))
    row = opened.rows(0)[0]
    object.__setattr__(row, "kind", "prediction")
    tab = open_tab(opened)
    tab.page.get_by_role("button", name="Start from model.csv").click()
    tab.saved()
    assert "model 50 %" in tab.page.locator("#segments").inner_text()
    assert ",0.5000" in (tmp_path / "labels/case.csv").read_text()
    tab.page.locator("#timeline").focus()
    tab.press("y", "End", "y")
    tab.saved()
    assert "model" not in tab.page.locator("#segments").inner_text()
    assert "confidence" not in (tmp_path / "labels/case.csv").read_text()


# ---------------------------------------------------------------------------------------------- saving


def test_a_reload_loses_nothing_even_while_saving_fails(open_tab: Open, mine: Material) -> None:
    tab = open_tab(mine)
    tab.press("1")
    tab.saved()
    tab.drag(0, 3, drop=False)  # in the middle of scrubbing
    tab.page.reload()
    tab.ready()
    assert tab.labels == [(PHASES[0], 0, 10)]
    tab.page.mouse.up()
    tab.page.route("**/labels", lambda route: route.abort() if route.request.method == "PUT" else route.continue_())
    tab.go(100)
    tab.press("2")
    tab.until(lambda: "NOT saved" in tab.page.locator("#saved").inner_text())
    tab.page.unroute("**/labels")
    tab.page.on("dialog", lambda dialog: dialog.accept())  # the browser warns of unsaved changes
    tab.page.reload()
    tab.ready()
    tab.saved()
    assert tab.labels == [(PHASES[0], 0, 4), (PHASES[1], 4, 10)]
    tab.complaints.clear()  # the requests that were aborted


def test_two_tabs_never_overwrite_each_other(open_tab: Open, mine: Material, tmp_path: Path) -> None:
    first, second = open_tab(mine), open_tab(mine)
    first.press("1")
    first.saved()
    second.page.evaluate("surgstage.refresh()")  # as when it comes to the front
    second.until(lambda: second.labels == [(PHASES[0], 0, 10)])
    first.go(100)
    first.press("2")
    first.saved()
    second.go(50)
    second.press("3")  # made on labels that are no longer those of the file
    second.page.get_by_role("button", name="Take the saved ones").click()
    second.until(lambda: second.labels == [(PHASES[0], 0, 4), (PHASES[1], 4, 10)])
    second.press("z")  # one's own change can be got back
    second.saved()
    assert second.labels == [(PHASES[0], 0, 2), (PHASES[2], 2, 10)]
    first.go(200)
    first.press("4")
    first.page.get_by_role("button", name="Save mine instead").click()
    first.saved()
    assert [label for _, label, _, _ in on_disk(tmp_path)] == [PHASES[0], PHASES[1], PHASES[3]]
    first.page.get_by_role("button", name="History").click()
    rows = first.page.locator("#history tbody tr")
    first.until(lambda: rows.count() == 4)
    rows.nth(1).get_by_role("button").click()
    first.saved()
    assert [label for _, label, _, _ in on_disk(tmp_path)] == [PHASES[0], PHASES[2]]


def test_a_correction_changes_the_evaluation_by_the_frames_that_it_moved(open_tab: Open, tmp_path: Path) -> None:
    data, predicted = tmp_path / "data", tmp_path / "predicted"
    for folder in (data / "videos", data / "phase_annotations", predicted):
        folder.mkdir(parents=True)
    video = write_video(data / "videos/video01.mp4", VideoSpec(count=250))
    rows = [f"{k}\t{PHASES[k >= 150]}\n" for k in range(250)]
    (predicted / "video01-phase.txt").write_text("Frame\tPhase\n" + "".join(rows))
    tab = open_tab(material(video, labels=tmp_path / "labels", dataset="cholec80"))
    tab.press("1")
    tab.go(100)
    tab.press("2")
    accuracy = [_accuracy(tab, data, predicted, tmp_path)]
    tab.drag(4, 5.01)
    accuracy.append(_accuracy(tab, data, predicted, tmp_path))
    # of 250 frames, those from 100 to 149 differ at first, and those from 125 to 149 after the correction
    assert accuracy == [pytest.approx(100 * 200 / 250), pytest.approx(100 * 225 / 250)]


def _accuracy(tab: Tab, data: Path, predicted: Path, folder: Path) -> float:
    """Export the labels, index them, and evaluate the predictions against them."""
    tab.saved()
    tab.page.get_by_role("button", name="Export").click()
    tab.page.select_option("#export-format", "cholec80")
    with tab.page.expect_download() as started:
        tab.page.get_by_role("button", name="Download").click()
    tab.press("Escape")
    started.value.save_as(data / "phase_annotations" / started.value.suggested_filename)
    succeed(["index", "--root", data, "--out", folder / "index.json", "--force"], folder)
    known = json.loads((folder / "index.json").read_text())["videos"][0]
    assert known["phase_file"]["path"] == "phase_annotations/video01-phase.txt"
    out = folder / "results.json"
    truth = data / "phase_annotations"
    asked = ["--predictions", predicted, "--ground-truth", truth, "--fps", "25", "--convention", "video_macro"]
    succeed(["evaluate", *asked, "--json", out], folder)
    found: float = json.loads(out.read_text())["video_macro"]["accuracy"]["mean"]
    return found


# ---------------------------------------------------------------------------------------------- long and live


@pytest.mark.parametrize("fps", [1, 25])
def test_three_hours_are_labelled_like_ten_seconds(open_tab: Open, tmp_path: Path, fps: int) -> None:
    opened, count = long_operation(tmp_path, fps)
    tab = open_tab(opened)
    tab.press("End")
    assert tab.frame == count - 1
    assert tab.picture() == (count - 1) % 60
    tab.press("Home", "1")
    tab.go(count // 2)
    tab.press("2", "+", "+", "d", "d", "Shift+D")
    assert [label for label, _, _ in tab.labels] == PHASES[:2]
    tab.drag(5400, 5300)
    tab.saved()
    [_, (_, _, border, end)] = on_disk(tmp_path)
    assert border == pytest.approx(5300, abs=20)  # a pixel is several seconds
    assert end == 10800


def long_operation(folder: Path, fps: int) -> tuple[Material, int]:
    """Three hours: a video whose 60 frames follow each other again and again, and a prediction that changes often.

    At 25 frames per second the server only claims so (a file of 270,000 frames takes seconds to make).
    """
    hours = 3 if fps == 1 else 1 / 1500
    path, count = repeated_video(folder / "long.mp4", fps, hours)
    rows = "".join(f"long,phase,{PHASES[i % 3]},{2 * i},{2 * i + 2}\n" for i in range(5400))
    (folder / "model.csv").write_text("video,track,label,start,end\n" + rows)
    opened = material(path, labels=folder / "labels", dataset="cholec80", shown=(folder / "model.csv",))
    if fps == 25:
        count = 270_000
        short, video = material(path).videos[0].jpeg, opened.videos[0]
        vars(video)["timing"] = Timing(np.arange(count), np.arange(count + 1) / 25, 25.0, even=True)
        video.jpeg = lambda position: short(position % 60)  # type: ignore[method-assign]
    return opened, count


def test_the_ribbon_of_a_live_operation_grows(open_tab: Open, tmp_path: Path) -> None:
    path = tmp_path / "live.jsonl"
    opened = material(live=path)
    opened.durations.append(Durations("first", "phase", {"A": 90.0, "B": 30.0}))
    tab = open_tab(opened)
    now, table = tab.page.locator("#now"), tab.page.locator("#durations")
    assert now.inner_text() == "waiting for live.jsonl …"
    path.write_text("".join(line(t) for t in range(80)))
    tab.until(lambda: now.inner_text() == "A for 1 min 19 s")
    with path.open("a") as stream:
        stream.write("nonsense\n" + "".join(line(t, "B", since_s=80) for t in range(80, 100)))
    tab.until(lambda: now.inner_text() == "B for 19.0 s")
    assert "1 line(s) could not be read" in tab.page.locator("#saved").inner_text()
    assert "1 A\t1 min 20 s\t1 min 30 s" in table.inner_text()
    assert "2 B\t19.0 s\t30.0 s" in table.inner_text()
    rows = tab.page.evaluate("surgstage.timeline.rows.map((row) => row.lanes.map((lane) => lane.ends.at(-1)))")
    assert rows == [[99], [99]]  # the phases, and the tool
    path.write_text(line(0, "B"))
    tab.until(lambda: now.inner_text() == "B for 0.0 s")


# ---------------------------------------------------------------------------------------------- for everyone


@pytest.mark.parametrize("width_px", [1280, 390])
def test_the_page_is_accessible_and_fits(open_tab: Open, case: Path, tmp_path: Path, width_px: int) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/case.csv").write_text(LABELS + "case,tool,Hook,1,2\n")
    (tmp_path / "theirs.csv").write_text(LABELS.replace("4", "6"))
    path = tmp_path / "live.jsonl"
    path.write_text(line(0) + line(70, "B"))
    shown = (tmp_path / "theirs.csv",)
    tab = open_tab(material(case, labels=tmp_path / "labels", shown=shown, live=path), width_px=width_px)
    for view in ("live", "0"):
        tab.page.select_option("#video", view)
        tab.ready()
        tab.until(lambda: tab.page.evaluate("surgstage.timeline.drawn > 1"))
        for dialog in ("", "#show-help", "#show-export", "#show-history"):
            if dialog and view == "live" and dialog != "#show-help":
                continue
            if dialog:
                tab.page.locator(dialog).click()
            found = Axe().run(tab.page)
            assert found.violations_count == 0, (view, dialog, found.generate_report())
            if dialog:
                tab.press("Escape")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width_px


def test_every_control_can_be_reached_and_used_without_a_mouse(open_tab: Open, mine: Material) -> None:
    tab = open_tab(mine)
    tab.press("1", "?")
    assert tab.page.locator("#help").is_visible()
    tab.press("2")  # no key acts behind a dialog
    tab.press("Escape")
    assert tab.labels == [(PHASES[0], 0, 10)]
    reached = set()
    for _ in range(60):
        tab.press("Tab")
        reached.add(tab.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    wanted = {"video", "show-export", "show-history", "show-help", "play", "on", "speed", "timeline", "compare-a"}
    wanted |= {"track", "split", "merge", "undo"}
    assert wanted <= reached
    assert any("ClippingCutting" in one for one in reached)


def test_the_command_serves_until_a_signal_and_refuses_in_one_line(case: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = start_fresh(["view", str(case), "--no-browser"], tmp_path, log)
    try:
        limit = time.monotonic() + 60
        while "http" not in (text := log.read_text()) and time.monotonic() < limit:
            time.sleep(0.05)
        address = text.split()[0]
        assert httpx.get(address).status_code == 200
        assert httpx.get(address.partition("?")[0]).status_code == 403
        port = address.partition("?")[0].rstrip("/").rpartition(":")[2]
        for words, reason in (
            ([], "nothing to open"),
            ([case, "--port", port], f"--port {port}: cannot be used"),
            ([tmp_path / "missing.mp4"], "no such video"),
            ([case, "--labels", log], "is not a folder"),
            ([case, "--run", tmp_path / "missing"], "no such run"),
        ):
            refused = run(["view", "--no-browser", *words], tmp_path)
            assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
            assert reason in refused.stderr
        command.send(signal.SIGTERM, group=False)
        assert command.wait(20) == 75
    finally:
        command.end()
    assert "Traceback" not in log.read_text()


def test_without_the_key_there_is_nothing(chromium: Any, mine: Material) -> None:
    from live.view.serve import PageServer

    with PageServer(mine) as server:
        page = chromium.new_page()
        answer = page.goto(server.address.partition("?")[0])
        assert answer.status == 403
        assert "view" in page.content()
        page.close()
    assert not any(thread.name == "uvicorn" for thread in threading.enumerate())
