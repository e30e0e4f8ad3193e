"""The content of the report: tables, figures and files of runs evaluated by `evaluate`. How it looks and behaves in a
browser is tests/test_report_browser.py."""

from __future__ import annotations

import dataclasses
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from commands.report_runs import jpeg, report_runs
from configs.errors import UserError
from evaluation.files.truth import TRUTH_FILE, Truth, VideoTruth, read_truth, write_truth
from evaluation.reports import html_tables as report_tables
from evaluation.reports import plotly_base, plotly_curves
from evaluation.reports import plotly_figures as report_figures
from evaluation.reports.gather import Report, Thumbnail, disagreements, find_run, gather
from evaluation.reports.page import render, safe_json, write_report
from evaluation.reports.paper_figures import PALETTE
from evaluation.reports.static_files import draw_panels, write_figures
from features.run_lengths import runs
from tests.report_material import SPEC, write_run


class Page(HTMLParser):
    """Elements and text of a page, read by an independent parser."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = [*self._inside, tag] if tag in ("script", "style") else self._inside

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside[:-1] if tag in ("script", "style") else self._inside

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text += data


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on the same videos."""
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / name, seed=seed) for seed, name in enumerate(("first", "second"))]


@pytest.fixture(scope="module")
def two(folders: list[Path]) -> Report:
    return gather(folders)


def test_the_worst_video_comes_first(two: Report) -> None:
    scores = [two.runs[0].accuracy(video) for video in two.videos]
    assert scores == sorted(scores)
    assert two.videos == ["video03", "video02", "video01"]


def test_tables_say_what_metrics_say(two: Report, folders: list[Path]) -> None:
    metrics = json.loads((folders[1] / "evaluate/test/metrics.json").read_text())
    tables = report_tables.all_tables(two)
    assert set(tables.conventions) == set(metrics["phases"]["temporal"])
    overall, per_phase = tables.conventions["pooled"].tables
    accuracy = dict(overall.rows)["Accuracy"]
    assert overall.groups == [("first", 3), ("second", 3)]
    mean, interval = accuracy[3].splitlines()
    assert mean == f"{metrics['phases']['temporal']['pooled']['accuracy']['mean']:.1f}"
    assert interval.startswith("[")
    assert len(accuracy[4].splitlines()) == 1  # no predictions in files, so no interval
    jaccard = metrics["phases"]["temporal"]["pooled"]["per_phase"]["Preparation"]["jaccard"]
    assert dict(per_phase.rows)["Preparation"][5 + 2].startswith(f"{jaccard['mean']:.1f}")
    assert tables.tools is not None
    assert len(tables.tools.rows) == 8
    about = " ".join(tables.conventions["relaxed_fixed"].about)
    for said in ("relaxed by 10 s", "Absent phases", "standard deviation", "1 fps", "3 videos", "1 seed per run"):
        assert said in about


def test_settings_in_which_runs_differ_are_listed(two: Report) -> None:
    tables = report_tables.all_tables(two)
    assert tables.settings is not None
    assert tables.settings.rows == [("seed", ["0", "1"])]
    assert dict(tables.provenance.rows)["Revision"][0] == two.runs[0].environment["git_revision"]


def test_ribbons_hold_one_bar_per_run(two: Report) -> None:
    video = two.videos[0]
    figure = report_figures.ribbon(two, 0, video)
    assert figure is not None
    bars = sum(len(trace["x"]) for trace in figure.spec["data"])
    assert bars == sum(len(runs(track)) for _, track in report_figures.tracks(two, video))
    covered = sum(sum(trace["x"]) for trace in figure.spec["data"])
    assert covered == 3 * 300_000  # truth and two predictions of 300 s
    used = {trace["marker"]["color"] for trace in figure.spec["data"]}
    assert used <= set(PALETTE[:7])
    assert figure.spec["data"][0]["customdata"][0].startswith("0:00:00 to 0:0")


def test_the_reliability_diagram_shows_the_calibration_of_the_metrics(two: Report, folders: list[Path]) -> None:
    metrics = json.loads((folders[0] / "evaluate/test/metrics.json").read_text())["phases"]["temporal"]["calibration"]
    both, alone = (plotly_curves.reliability_diagram(found) for found in (two.runs, two.runs[:1]))
    assert both is not None
    assert alone is not None
    assert [trace["name"] for trace in both.spec["data"]] == ["calibrated", "first", "second"]
    assert f"first {metrics['ece']['pooled']:.1f} %" in both.alt
    for key, trace in zip(("ece", "ece_near"), alone.spec["data"][1:], strict=True):
        frames = np.array([int(text.replace(",", "")) for text in trace["customdata"]])
        error = (np.abs(np.array(trace["x"]) - trace["y"]) * frames).sum() / frames.sum()
        assert error == pytest.approx(metrics[key]["pooled"], abs=0.02)


def test_every_figure_is_one_that_plotly_knows(two: Report) -> None:
    from plotly.graph_objects import Figure

    figures = report_figures.all_figures(two)
    kinds = {name.split("-")[0] for name in figures}
    assert kinds == {"ribbon", "tools", "bars", "confusion", "reliability", "curve", "training"}
    for figure in figures.values():
        Figure(figure.spec)  # raises for properties that do not exist
        json.dumps(figure.spec, allow_nan=False)


def test_bars_have_the_intervals_of_the_bootstrap(two: Report) -> None:
    spec = report_figures.all_figures(two)["bars-video_macro-recall"].spec
    entry = two.runs[1].intervals.per_phase["video_macro"]["GallbladderPackaging"]["recall"]
    trace = spec["data"][1]
    assert trace["x"][4] == entry.mean
    assert trace["x"][4] - trace["error_x"]["arrayminus"][4] == pytest.approx(entry.low)
    assert trace["marker"]["color"] != spec["data"][0]["marker"]["color"]
    assert trace["marker"]["pattern"]["shape"]


def test_curves_end_where_everything_is_called_present(two: Report) -> None:
    points = plotly_curves.curve_points(two.runs[0], 0)
    assert points is not None
    recall, precision = points
    assert (np.diff(recall) >= 0).all()
    assert len(recall) <= plotly_curves.CURVE_POINTS + 2
    present = np.concatenate([video.tools[:, 0] for video in two.truth.videos.values()]).mean()
    assert (recall[-1], precision[-1]) == (100.0, pytest.approx(100 * present))


def test_disagreements_are_the_longest_wrong_runs(two: Report) -> None:
    found = disagreements(two, videos=1, frames=2)
    video = two.videos[0]
    wrong = two.truth.videos[video].phase != two.runs[0].predictions[video].phase
    assert {part.video for part in found} == {video}
    assert [part.time_s for part in found] == sorted(part.time_s for part in found)
    for part in found:
        assert wrong[part.frame // 25]
        assert part.time_s == part.frame // 25
        assert two.truth.videos[video].phase[part.frame // 25] == part.truth


# ---------------------------------------------------------------------------------------------- the page


def test_the_page_is_one_file_with_nothing_outside(two: Report, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", two)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    page = Page((tmp_path / "report.html").read_text())
    assert not [tag for tag, attributes in page.tags if "src" in attributes or tag in ("link", "iframe", "object")]
    assert all(str(attributes["href"]).startswith("#") for tag, attributes in page.tags if tag == "a")
    (policy,) = (attributes for tag, attributes in page.tags if "http-equiv" in attributes)
    assert "default-src 'none'" in str(policy["content"])
    assert "unsafe-eval" not in str(policy["content"])
    assert render(two) == (tmp_path / "report.html").read_text()  # the same runs give the same bytes


def test_tools_of_a_probe_are_said_to_be(tmp_path: Path) -> None:
    path = write_run(tmp_path / "frozen", ["a"], frames=60) / "evaluate/test/metrics.json"
    said = "frozen: tools are recognised by a linear probe"
    assert said not in Page(render(gather([tmp_path / "frozen"]))).text
    probe = {"c": 0.1, "val_map": None, "weights_sha256": "0" * 64}
    path.write_text(json.dumps({**json.loads(path.read_text()), "tool_probe": probe}))
    assert said in Page(render(gather([tmp_path / "frozen"]))).text


def test_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>"
    phases = (hostile, '" onmouseover="alert(1)', *SPEC.phases[2:])
    tools = (hostile, *SPEC.tools[1:])
    spec = SPEC.model_copy(update={"phases": phases, "tools": tools, "title": "<b>", "phase_orders": {}})
    run = write_run(tmp_path / "<script>x", ["<script>alert(2)", "b"], spec=spec, frames=60)
    page = Page(render(gather([run])))
    assert sum(tag == "script" for tag, _ in page.tags) == 3  # data, plotly, ours
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for name in (hostile, "<script>alert(2)", "<script>x", "of <b>", '" onmouseover="alert(1)'):
        assert name in page.text


def test_names_in_files_for_papers_are_drawn_as_they_are(tmp_path: Path) -> None:
    """A lone dollar sign or a broken formula would raise if it were read as mathematics."""
    names = {"phases": (r"a$\frac$", "b$b$", "c^{", *SPEC.phases[3:]), "tools": (r"$\bad$", *SPEC.tools[1:])}
    spec = SPEC.model_copy(update={**names, "phase_orders": {}})
    report = gather([write_run(tmp_path / r"$\worse$", ["v"], spec=spec, frames=60)])
    figures = report_figures.all_figures(report)
    draw_panels(tmp_path / "confusion.png", [figures["confusion-0"]])
    draw_panels(tmp_path / "others.png", [figures["tools-0"], figures["training-0"]])
    assert plotly_base.literal(plotly_base.plain("<b> %{x} &lt;")) == "<b> %{x} &lt;"


@pytest.mark.parametrize("text", ["</script>", "<!-- <script>", "a & b", "\u2028", "é"])
def test_data_cannot_end_its_script(text: str) -> None:
    said = safe_json({"x": [text]})
    assert not set(said) & set("<>&\u2028")
    assert json.loads(said) == {"x": [text]}


def test_frames_are_inside_the_page(two: Report) -> None:
    part = disagreements(two)[0]
    thumbnail = Thumbnail(part, jpeg(np.full((480, 854, 3), 90, np.uint8)))
    assert len(thumbnail.jpeg) < 20_000
    page = Page(render(dataclasses.replace(two, thumbnails=[thumbnail])))
    (image,) = (attributes for tag, attributes in page.tags if tag == "img")
    assert str(image["src"]).startswith("data:image/jpeg;base64,")
    assert part.video in str(image["alt"])
    assert f"truth {SPEC.phases[part.truth]}" in page.text


def test_videos_that_are_missing_cost_the_frames_only(
    folders: list[Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.delenv("SURGSTAGE_DATA", raising=False)
    report_runs(folders, out=tmp_path / "report.html")
    assert "without frames: no data root is set" in " ".join(capsys.readouterr().err.split())
    assert "not available" in Page((tmp_path / "report.html").read_text()).text
    report_runs(folders, out=tmp_path / "report.html", thumbnails=False)
    assert "not available" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- missing parts, errors


@pytest.mark.parametrize("missing", ["labels", "tools", "training", "summary", "one video"])
def test_what_a_run_lacks_is_left_out(missing: str, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"tools": ()}) if missing == "tools" else SPEC
    videos = ["v"] if missing == "one video" else ["v", "w"]
    run = write_run(
        tmp_path / "run", videos, spec=spec, labelled=missing != "labels", curves=missing != "training", frames=80
    )
    if missing == "summary":
        (run / "summary.json").unlink()
    report = gather([run])
    page = Page(render(report))
    headings = {attributes["id"] for tag, attributes in page.tags if tag == "section"}
    assert ("tools" in headings) == (missing not in ("tools", "labels"))
    assert ("training" in headings) == (missing != "training")
    assert ("confusion" in headings) == (missing != "labels")
    assert "videos" in headings
    if missing == "labels":
        assert "no phase metrics" in page.text
        assert disagreements(report) == []


def test_one_video_has_no_whiskers(tmp_path: Path) -> None:
    report = gather([write_run(tmp_path / "run", ["v"], frames=80)])
    bars = report_figures.all_figures(report)["bars-phase_mean-f1"]
    assert set(bars.spec["data"][0]["error_x"]["array"]) == {None}
    draw_panels(tmp_path / "bars.png", [bars])


def test_a_tool_only_net_has_a_report(tmp_path: Path) -> None:
    """Its scores are in `tool_predictions/`: curves and timelines are there, and no phase model is named."""
    run = write_run(tmp_path / "run", frames=60, tools_alone=True)
    assert (run / "evaluate/test/tool_predictions/video01.csv").is_file()
    report = gather([run])
    page = Page(render(report))
    assert {attributes["id"] for tag, attributes in page.tags if tag == "section"} == {
        "results", "videos", "tools", "training", "provenance",
    }  # fmt: skip
    assert "Tools on 3 videos" in page.text
    figures = report_figures.all_figures(report)
    assert {f"tools-{number}" for number in range(3)} <= set(figures)
    assert [name for name in figures if name.startswith("curve-")]
    assert not [name for name in figures if name.startswith("ribbon-")]
    assert {attributes["data-figure"] for _, attributes in page.tags if "data-figure" in attributes} <= set(figures)
    (model,) = dict(report_tables.all_tables(report).provenance.rows)["Model"]
    assert model == "resnet50, tools only"
    names = {path.stem for path in write_figures(tmp_path / "figures", report)}
    assert {"precision-recall", "tools-video01"} <= names
    shutil.rmtree(run / "evaluate/test/tool_predictions")  # as earlier versions left it
    assert "Precision against recall" not in Page(render(gather([run]))).text


def test_simulated_operations_are_called_so_whatever_the_data_set_is_called(tmp_path: Path) -> None:
    """The model card and the report use the same function; the page used to check the data set's name only."""
    (tmp_path / "simulation.json").write_text("{}")
    for root, said in ((tmp_path, True), (tmp_path / "elsewhere", False), (None, False)):
        run = write_run(tmp_path / f"run-{said}-{root is None}", ["v"], frames=60, root=root, curves=False)
        page = Page(render(gather([run])))
        assert ("SIMULATED operations." in page.text) is said
        assert ("Cholec80 (SIMULATED)" in page.text) is said
    named = SPEC.model_copy(update={"name": "simulated", "title": "Simulated operations"})
    assert (
        "SIMULATED operations." in Page(render(gather([write_run(tmp_path / "x", ["v"], frames=60, spec=named)]))).text
    )


def test_an_imported_net_is_not_described_as_trained_here(tmp_path: Path) -> None:
    """The seed, versions and machine recorded next to it are those of the import."""
    imported = gather([write_run(tmp_path / "old", ["v"], frames=60, more={"imported": "theirs.pth"})])
    rows = dict(report_tables.all_tables(imported).provenance.rows)
    assert rows["Imported from"][0] == "theirs.pth"
    assert not {"Seed", "Versions", "Machine", "Revision"} & set(rows)
    assert "resnet50" in rows["Model"][0]
    assert set(imported.runs[0].settings) == {"preprocess", "cnn", "temporal", "joint"}
    assert "epochs" not in json.dumps(imported.runs[0].settings)
    tuned = gather([write_run(tmp_path / "new", ["v"], frames=60, more={"fine_tuned_from": "theirs.pth"})])
    rows = dict(report_tables.all_tables(tuned).provenance.rows)
    assert rows["Fine-tuned from"][0] == "theirs.pth"
    assert rows["Seed"][0] == "0"


def test_settings_are_those_of_the_net_that_was_evaluated(tmp_path: Path) -> None:
    """The numbers do not belong to a stage that was started later."""
    run = write_run(tmp_path / "run", ["v"], frames=60, seed=5)
    shutil.copytree(run / "temporal", run / "joint/multitask")
    (run / "joint/multitask/config.yaml").write_text("seed: 6\n")
    assert gather([run]).runs[0].settings["seed"] == 5
    path = run / "evaluate/test/metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checkpoint": "moved/joint/multitask/best.pt"}))
    assert gather([run]).runs[0].settings["seed"] == 6


def test_runs_that_differ_in_nothing_have_no_empty_table(tmp_path: Path) -> None:
    report = gather([write_run(tmp_path / name, ["v"], frames=60, seed=3) for name in ("a", "b")])
    assert report_tables.all_tables(report).settings is None
    assert "Settings in which the runs differ" not in Page(render(report)).text


def test_runs_on_other_videos_are_not_compared(folders: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", ["video01", "video02", "video09"])
    with pytest.raises(UserError, match=r"video03, video09 in one only"):
        gather([folders[0], other])
    longer = write_run(tmp_path / "longer", frames=310)
    with pytest.raises(UserError, match=r"video01: first and longer .* different labels"):
        gather([folders[0], longer])


def test_runs_with_the_same_name_are_distinguished(folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[1], tmp_path / "first")
    names = [run.name for run in gather([folders[0], tmp_path / "first"]).runs]
    assert names == [str(folders[0]), str(tmp_path / "first")]
    with pytest.raises(UserError, match="given twice"):
        gather([folders[0], folders[0]])


def test_a_run_that_is_not_evaluated_says_which_command_to_run(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate --name first --split val`.* choose --split test"):
        gather([folders[0]], "val")
    shutil.copytree(folders[0], tmp_path / "old")
    (tmp_path / "old/evaluate/test" / TRUTH_FILE).unlink()
    with pytest.raises(UserError, match=r"evaluated without truth.json; run `.*--name old --split test`"):
        gather([tmp_path / "old"])


@pytest.mark.parametrize("broken", ["[]", '{"phases": 1}', "nothing"])
def test_damaged_metrics_are_refused(broken: str, folders: list[Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "run")
    (tmp_path / "run/evaluate/test/metrics.json").write_text(broken)
    with pytest.raises(UserError, match=r"metrics.json: not"):
        gather([tmp_path / "run"])


def test_a_convention_that_is_not_registered_here_has_tables_without_intervals(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", frames=60)
    file = folder / "evaluate/test/metrics.json"
    metrics = json.loads(file.read_text(encoding="utf-8"))
    for conventions in metrics["phases"].values():
        conventions["lenient"] = conventions["phase_mean"]
    file.write_text(json.dumps(metrics), encoding="utf-8")
    assert "lenient" in Page(render(gather([folder]))).text


# ---------------------------------------------------------------------------------------------- truth, small parts

labels = st.lists(st.integers(-1, 6), max_size=60)


@given(labels, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_truth_round_trip(tmp_path_factory: Any, phase: list[int], random: Any) -> None:
    path = tmp_path_factory.mktemp("truth") / TRUTH_FILE
    tools = np.array([[random.randint(-1, 1) for _ in SPEC.tools] for _ in phase], np.int8).reshape(-1, 7)
    write_truth(path, Truth(SPEC, "test", 0.25, {"v": VideoTruth(np.array(phase, np.int8), tools, "ab")}))
    found = read_truth(path)
    assert (found.spec, found.split, found.fps, found.videos["v"].source) == (SPEC, "test", 0.25, "ab")
    assert found.videos["v"].phase.tolist() == phase
    assert found.videos["v"].tools.tolist() == tools.tolist()


@pytest.mark.parametrize(
    ("key", "value"),
    [("phase", [[3, 7]]), ("phase", [[0, 1]]), ("phase", [[10**12, 1]]), ("phase", "x"), ("tools", [[[2, 1]]])],
)
def test_truth_that_is_damaged(key: str, value: Any, folders: list[Path], tmp_path: Path) -> None:
    tree = json.loads((folders[0] / "evaluate/test" / TRUTH_FILE).read_text())
    tree["videos"]["video01"][key] = value
    (tmp_path / TRUTH_FILE).write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"truth.json: not the labels of an evaluation .* run evaluate again"):
        read_truth(tmp_path / TRUTH_FILE)


@given(st.text(max_size=30))
def test_plotly_shows_names_literally(name: str) -> None:
    shown = plotly_base.plain(name)
    assert "<" not in shown
    assert "%{" not in shown


def test_text_on_every_colour_can_be_read() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for colour in PALETTE:
        light, dark = sorted([luminance(colour), luminance(plotly_base.text_on(colour))], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_clock() -> None:
    assert [plotly_base.clock(seconds) for seconds in (0, 59.6, 3723)] == ["0:00:00", "0:01:00", "1:02:03"]


@pytest.mark.slow
def test_the_same_figures_for_papers(two: Report, tmp_path: Path) -> None:
    written = write_figures(tmp_path / "figures", two)
    names = {path.stem for path in written}
    assert {"ribbons", "confusion-1", "confusion-2", "phases-f1", "precision-recall", "training-temporal"} <= names
    assert {f"tools-{video}" for video in two.videos} <= names
    for path in written:
        start = path.read_bytes()[:4]
        assert start == (b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
    with Image.open(tmp_path / "figures/phases-f1.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20) or ()}
    assert {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in plotly_base.RUN_COLOURS[:2]} <= colours


def test_folders_that_are_no_run_say_what_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "wide").mkdir()
    (tmp_path / "runs" / "wide" / "ablation.html").touch()
    for folder, message in (
        ("other", "no such run; give the name or the folder of an evaluated run"),
        ("runs/wide", r"this is an ablation, not a run; open runs/wide/ablation\.html"),
        ("runs/first", "not evaluated yet"),
    ):
        with pytest.raises(UserError, match=message):
            gather([Path(folder)])
    assert [find_run(Path(name)) for name in ("first", "runs/first", "other")] == [
        Path("runs/first"),
        Path("runs/first"),
        Path("other"),
    ]
    (tmp_path / "first" / "evaluate").mkdir(parents=True)
    assert find_run(Path("first")) == Path("first")
