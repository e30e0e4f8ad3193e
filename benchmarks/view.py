"""How long the viewer's page takes to answer keys and the mouse, in a three-hour operation at 1 and 25 fps.

Times are from an event until the page has drawn what follows from it (and, where it says so, until the frame is on the
page), in a headless Chromium on this machine. The operation has 200 labels, a prediction that changes every two
seconds, and seven tools. Needs Debian's package chromium.

python benchmarks/view.py --json artifacts/bench/view.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.load import load_dataset
from engine.files import write_json
from live.view.serve import PageServer, open_material
from tests.conftest import CHROMIUM_OPTIONS
from tests.live.view.material import repeated_video

SPEC = load_dataset("cholec80")
HOURS, LABELS, REPEATS = 3, 200, 30
# Each waits for the next frame that the browser draws after what the action has changed.
ACTIONS = {
    "step to the next frame, until drawn": "app.stepFrames(1)",
    "go anywhere, until drawn": "app.goTo(Math.floor(Math.random() * app.clock.count))",
    "begin a class": "app.beginClass(app.known.phase[i % 7])",
    "move a border to another frame": "app.goTo(1000 + i), app.borderHere(1)",
    "undo": "app.editor.undo()",
    "zoom": "app.timeline.zoom(i % 2 ? 4 : 0.25)",
    "next disagreement": "app.comparison.go(1)",
}
PICTURES = {
    "next frame, until it is on the page": "app.stepFrames(1)",
    "previous frame, until it is on the page": "app.stepFrames(-1)",
    "any frame, until it is on the page": "app.goTo(Math.floor(Math.random() * app.clock.count))",
}
_TIMED = """async ([action, repeats, picture]) => {
    const app = surgstage;
    const act = [...Array(repeats).keys()];
    const times = [];
    for (const i of act) {
        while (app.player.loading || app.editor.saving) await new Promise((go) => setTimeout(go, 1));
        const drawn = app.timeline.drawn;
        const begin = performance.now();
        RUN;
        do await new Promise((go) => setTimeout(go, 0));
        while (picture ? !app.player._isShown() : app.timeline.drawn === drawn && performance.now() - begin < 500);
        times.push(performance.now() - begin);
    }
    return times;
}"""


def write_labels(folder: Path, video: str) -> None:
    """Labels of one's own, and what a model has said."""
    length = HOURS * 3600 / LABELS
    own = [f"{video},phase,{SPEC.phases[i % 7]},{i * length:.3f},{(i + 1) * length:.3f}" for i in range(LABELS)]
    model = [
        f"{video},phase,{SPEC.phases[i // 700 % 7 if i % 9 else 3]},{2 * i},{2 * i + 2}" for i in range(HOURS * 1800)
    ]
    tools = [f"{video},tool,{SPEC.tools[i % 7]},{10 * i},{10 * i + 15}" for i in range(HOURS * 360 - 1)]
    header = "video,track,label,start,end"
    (folder / "labels").mkdir()
    (folder / f"labels/{video}.csv").write_text("\n".join([header, *own]) + "\n")
    (folder / "model.csv").write_text("\n".join([header, *model, *tools]) + "\n")


def measure(browser: Any, folder: Path, fps: int) -> dict[str, dict[str, float]]:
    """Median and maximum in milliseconds of each action."""
    path, _ = repeated_video(folder / "operation.mp4", fps, HOURS)
    write_labels(folder, "operation")
    more: dict[str, Any] = {"split": "test", "annotator": None, "dataset": "cholec80", "live": None}
    opened = open_material([path], (), shown=[folder / "model.csv"], labels=folder / "labels", **more)
    found = {}
    with PageServer(opened) as server:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(server.address)
        while not page.evaluate("Boolean(window.surgstage?.clock)"):
            page.wait_for_timeout(50)
        for actions, picture in ((ACTIONS, False), (PICTURES, True)):
            for name, action in actions.items():
                times = page.evaluate(_TIMED.replace("RUN", action), [action, REPEATS, picture])
                found[name] = {"p50_ms": round(statistics.median(times), 1), "max_ms": round(max(times), 1)}
        page.close()
    return found


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from playwright.sync_api import sync_playwright

    results = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM_OPTIONS)
        for fps in (1, 25):
            with tempfile.TemporaryDirectory() as place:
                results[f"{fps} fps"] = measure(browser, Path(place), fps)
        browser.close()
    for rate, rows in results.items():
        for name, row in rows.items():
            print(f"{rate:>6}  {name:42} p50 {row['p50_ms']:6.1f} ms   max {row['max_ms']:6.1f} ms")
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
