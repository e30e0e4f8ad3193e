"""The model card: its content, and that simulated data is called simulated."""

from __future__ import annotations

import html
import json
import re
from typing import Any

import jinja2
import numpy as np
import pytest

from configs.errors import printable
from configs.load import load_config, load_dataset, to_yaml
from evaluation.metrics.phases import evaluate_phases
from evaluation.metrics.results import Evaluation, JointDetails, ToolAbout, ToolResults
from evaluation.reports.model_card import render_model_card, write_model_card
from evaluation.reports.templates import markdown
from features.dataset.index import Index, VideoEntry
from tests.report_material import JOINT


def index(dataset: str = "cholec80") -> Index:
    def entry(number: int, split: str) -> VideoEntry:
        return VideoEntry(
            id=f"video{number:02d}",
            kind="video",
            source=f"v{number}.mp4",
            size_bytes=1,
            modified_ns=0,
            sha256_ends="0" * 64,
            fps=25.0,
            frame_count=100,
            split=split,
        )

    splits = ["train", "train", "val", "test", "test"]
    return Index(dataset=load_dataset(dataset), videos=tuple(entry(k, split) for k, split in enumerate(splits, 1)))


def metrics(phases: bool = True, tools: bool = True, joint: dict | None = None, **more: Any) -> Evaluation:
    truth = {"video04": np.repeat([0, 1], 20), "video05": np.repeat([1, 2], 20)}
    spec = load_dataset("cholec80")
    found = {
        head: evaluate_phases(truth, {n: np.roll(t, k) for n, t in truth.items()}, spec.phases, 1.0, split="test")
        for head, k in (("temporal", 1), ("frame", 3))
    }
    about = ToolAbout(split="test", fps=1.0, videos=2, videos_without_labels=[], seeds=1)
    numbers = ToolResults(map_pooled=51.25, map_video=None, per_tool={}, per_video={}, about=about)
    known: dict[str, Any] = {
        "split": "test",
        "fps": 1.0,
        "simulated": False,
        "videos": list(truth),
        "scored": {},
        "videos_without_labels": {},
        "left_out": [],
        "convention": "phase_mean",
        "phases": found if phases else {},
        "tools": numbers if tools else None,
        "joint": JointDetails(**(JOINT | joint)) if joint else None,
    }
    return Evaluation(**known | more)


def test_a_key_of_a_later_version_does_not_make_a_joint_net() -> None:
    """It is ignored, as it is inside every other part of the results."""
    for of_joint in (None, {"crops": "five"}):
        written = metrics(joint=of_joint)
        tree = written.to_json() | {"said_later": 1}
        assert Evaluation.from_json(tree).to_json() == written.to_json()
    assert Evaluation.from_json(metrics().to_json() | {"said_later": 1}).joint is None


def test_the_card_of_a_run(tmp_path):
    run = tmp_path / "lstm"
    (run / "temporal").mkdir(parents=True)
    config = load_config("cholec80", ["data.root=/secret/place", "seed=7"])
    (run / "temporal" / "config.yaml").write_text(to_yaml(config))
    (run / "temporal" / "environment.json").write_text(
        json.dumps({"python": "3.11.2", "git_revision": "a" * 40, "packages": {"torch": "2.14.1", "torchvision": None}})
    )
    numbers = metrics()
    path = write_model_card(run, "temporal", index(), numbers)
    card = path.read_text()
    assert path == run / "MODEL_CARD.md"
    assert card.startswith("# Model card: lstm\n")
    for text in (
        "| data set | Cholec80 |",
        "| train | 2 videos: video01, video02 |",
        "| test | 2 videos: video04, video05 |",
        "torch 2.14.1, Python 3.11.2, revision aaaaaaaaaaaa",
        "seed: 7",
        "backbone: resnet50",
        f"| `phase_mean` | {numbers.phases['temporal']['phase_mean'].scores['accuracy'].mean:.1f} ± ",
        "| per-frame head on the same features |",
        "Tools: mAP 51.2 pooled over frames, - averaged over videos",
        "## Intended use",
        "**Not a medical device**",
    ):
        assert text in card, text
    for convention, result in numbers.phases["temporal"].items():
        assert f"- `{convention}`: " in card
        assert result.about.absent_phase in card
        assert result.about.std in card
    assert "SIMULATED" not in card
    assert "/secret/place" not in card
    assert "\n\n\n" not in card
    assert write_model_card(run, "temporal", index(), numbers).read_text() == card


@pytest.mark.parametrize("own", [True, False])
def test_the_card_names_the_encoder_of_the_features(tmp_path, own):
    """Settings name a backbone even if features were given by `--features`, and stage one may have changed since."""
    for stage, overrides in (("temporal", []), ("cnn", ["cnn.epochs=3"]), ("extract", ["extract.storage=float32"])):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.yaml").write_text(to_yaml(load_config("cholec80", overrides)))
    digest = "d" * 64
    (tmp_path / "extract" / "result.json").write_text(json.dumps({"encoder_digest": digest if own else "other"}))
    encoder = {"backbone": "resnet18", "preprocess": {"resize_px": 97}, "digest": digest}
    card = write_model_card(tmp_path, "temporal", index(), metrics(encoder=encoder)).read_text()
    assert "backbone: resnet18" in card
    assert "resize_px: 97" in card
    assert "resize_px: 250" not in card
    assert ("epochs: 3" in card) == own
    assert ("storage: float32" in card) == own


@pytest.mark.parametrize(
    ("backbone", "dataset", "said"),
    [
        (
            "selfsupsurg_dino",
            "cholec80",
            "**The release of selfsupsurg\\_dino was pretrained on cholec80 (videos 1 to 40, without their labels).** "
            "Results on these videos are too good.",
        ),
        (
            "selfsupsurg_dino",
            "cholect50",
            "without their labels), which may share operations with cholect50.** Results",
        ),
        ("selfsupsurg_dino", "pitvis", ""),
        ("resnet50", "cholec80", ""),
    ],
)
def test_the_card_says_what_the_encoder_was_pretrained_on(tmp_path, backbone, dataset, said):
    encoder = {"backbone": backbone, "preprocess": {}, "digest": "d" * 64}
    card = write_model_card(tmp_path, "temporal", index(dataset), metrics(encoder=encoder)).read_text()
    assert said in card
    assert ("pretrained" in card) == bool(said)
    assert "\n\n\n" not in card


def test_simulated_data_is_marked(tmp_path):
    for spec in ("simulated", "cholec80"):
        card = write_model_card(tmp_path / "run", "joint", index(spec), metrics(simulated=True)).read_text()
        assert "Trained and tested on SIMULATED operations" in card
        assert "2 SIMULATED videos" in card
        assert "\n\n\n" not in card


def test_a_net_for_one_task_names_missing_numbers(tmp_path):
    card = write_model_card(tmp_path, "joint", index(), metrics(phases=False, tools=False)).read_text()
    assert "No phase metrics" in card
    assert "No tool metrics" in card
    assert "versions that were not recorded" in card
    assert "The settings were not recorded." in card


def test_the_card_of_a_joint_net_says_what_it_is_made_of(tmp_path):
    (tmp_path / "joint").mkdir()
    values = ["cnn.backbone=resnet18", "cnn.freeze_until=layer2", "cnn.layer_lr_decay=0.5", "temporal.head.hidden=48"]
    (tmp_path / "joint" / "config.yaml").write_text(to_yaml(load_config("mtrcnet_cl", values)))
    card = write_model_card(tmp_path, "joint", index(), metrics()).read_text()
    for text in (
        "backbone: resnet18",
        "freeze_until: layer2",
        "layer_lr_decay: 0.5",
        "hidden: 48",
        "tool_hidden: 512",
    ):
        assert text in card, text


def test_an_imported_net_is_not_described_as_trained_here(tmp_path):
    (tmp_path / "joint").mkdir()
    (tmp_path / "joint" / "config.yaml").write_text(to_yaml(load_config("mtrcnet")))
    (tmp_path / "joint" / "environment.json").write_text(json.dumps({"packages": {"torch": "2.14.1"}}))
    for spec in ("cholec80", "simulated"):
        numbers = metrics(joint={"imported": "theirs.pth"}, simulated=spec == "simulated")
        card = write_model_card(tmp_path, "joint", index(spec), numbers).read_text()
        assert "Imported from `theirs.pth`" in card
        assert "Which videos it was trained on is not in the\nfile" in card
        assert "backbone: resnet50" in card
        for untrue in (
            "Trained with",
            "torch 2.14.1",
            "Trained and tested",
            "was not trained on any",
            "epochs:",
            "seed: ",
        ):
            assert untrue not in card, untrue
        assert ("Tested on SIMULATED" in card) == (spec == "simulated")
        assert "\n\n\n" not in card


def test_a_net_fine_tuned_from_an_imported_one_says_so(tmp_path):
    """Its first training may have seen the test videos, whatever the second one's split is."""
    (tmp_path / "joint").mkdir()
    (tmp_path / "joint" / "config.yaml").write_text(to_yaml(load_config("mtrcnet")))
    numbers = metrics(joint={"fine_tuned_from": "theirs.pth"})
    card = write_model_card(tmp_path, "joint", index(), numbers).read_text()
    assert "Fine-tuned from `theirs.pth`" in card
    assert "test videos may be among them" in card
    assert "Trained with" in card
    assert "epochs:" in card
    assert "\n\n\n" not in card


@pytest.mark.parametrize(
    ("stage", "tasks", "said"),
    [
        ("joint", "both", "A CNN and a model over time in one net for phases and tools of laparoscopic operations."),
        ("joint", "phase", "A CNN and a model over time in one net for phases of laparoscopic operations."),
        ("joint", "tool", "A CNN, frame by frame, for tools of laparoscopic operations."),
        ("temporal", None, "then a model over time) for phases and tools of laparoscopic operations."),
    ],
)
def test_the_card_names_what_the_net_tells(tmp_path, stage, tasks, said):
    card = write_model_card(tmp_path, stage, index(), metrics(joint={"tasks": tasks} if tasks else None)).read_text()
    assert said in card


def test_features_of_an_untrained_backbone_have_no_tool_logits(tmp_path):
    (tmp_path / "temporal").mkdir()
    (tmp_path / "temporal/config.yaml").write_text(to_yaml(load_config("cholec80", ["extract.encoder=initial"])))
    card = write_model_card(tmp_path, "temporal", index(), metrics(tools=False)).read_text()
    assert "then a model over time) for phases of laparoscopic operations." in card


HOSTILE = (
    "<script>alert(1)</script>",
    "![x](http://tracker/x.png)",
    "a | b",
    "two\n\n# lines",
    "*bold* `code`",
    "\x1b[31mred",
    "&lt;b&gt;",
    "_evil_",
    "~~x~~",
    "https://evil.example/x",
    "WWW.evil.example",
    "a@b.c",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_in_a_card(tmp_path, name):
    """Model hosts show cards as web pages: names must not run or load anything, nor break a table."""
    spec = load_dataset("cholec80")
    tools, videos = (name, *spec.tools[1:]), index().videos
    changed = spec.model_copy(update={"title": name, "source": name, "tools": tools})
    hostile = Index(dataset=changed, videos=videos)
    card = write_model_card(tmp_path, "joint", hostile, metrics(joint={"imported": f"{name}.pth"})).read_text()
    (file,) = re.findall(r"Imported from `([^`]*)`, a file", card)
    assert file.endswith(".pth")
    card = card.replace(f"`{file}`", "")  # between backticks only a backtick has a meaning
    assert "<" not in card
    assert "\x1b" not in card
    assert "](" not in card.replace("\\](", "")
    row = next(line for line in card.splitlines() if line.startswith("| data set |"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert not re.search(r"(?<!\\)[_~]", row)
    for link in ("://", "www.", "@"):
        assert link not in row.lower()
    assert not [line for line in card.splitlines() if line.startswith("# lines")]


@pytest.mark.parametrize("name", [*HOSTILE, "my_run_2", "Cholec80", "Stauder et al., arXiv 1610.09278 & others"])
def test_names_read_as_they_are_when_a_card_is_shown(name):
    from markdown_it import MarkdownIt  # comes with rich

    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    (cell,) = re.findall("<td>(.*)</td>", page.render(f"| a |\n|---|\n| {markdown(name)} |\n"))
    assert "<" not in cell
    assert html.unescape(cell) == " ".join(printable(name).split())


def test_a_missing_fact_is_an_error(tmp_path):
    with pytest.raises(jinja2.UndefinedError):
        render_model_card({"metrics": metrics()})
