"""An encoder of timm through both stages, the joint net and prediction, partly frozen, from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import Tensor

from configs.load import load_config, to_yaml
from configs.schema import Config, PreprocessConfig
from engine.checkpoints import load_checkpoint
from engine.logs import read_metrics
from features.store import read_features
from features.video.open import open_video
from tests.cli import run, succeed
from tests.stage1_cnn.material import FRAMES, SPEC, STRIDE, make_world, write_dataset

NET = "mobilenetv3_small_050"  # its batch norms apply the activation as well


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, its index and settings.yaml; `run` folders appear in `runs`."""
    base = tmp_path_factory.mktemp("finetune")
    world = make_world(base, write_dataset(base / "data"))
    tree = world.config.model_dump(mode="json")
    tree["data"]["dataset"] = str(base / "tiny.yaml")
    tree["cnn"] |= {"backbone": f"timm:{NET}", "epochs": 1, "freeze_until": "blocks.1", "layer_lr_decay": 0.75}
    tree["preprocess"] |= {"interpolation": "bilinear", "short_side_px": None}  # not the encoder's
    tree["temporal"]["head"] = {"name": "lstm", "hidden": 4}
    tree["joint"] |= {
        "sequence": {"mode": "clips", "frames": 4, "stride": 3, "batch": 3, "inference": "clip"},
        "multitask": {"epochs": 1, "precision": "fp32", "optim": {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}},
        "gradient_checkpointing": True,
        "workers": 0,
    }
    world.index().save(base / "index.json")
    (base / "tiny.yaml").write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    (base / "settings.yaml").write_text(to_yaml(Config.model_validate(tree)))
    return base


def tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the network in a checkpoint, under timm's own names."""
    model, start = load_checkpoint(path)["model"], "backbone.net."
    return {name.removeprefix(start): value for name, value in model.items() if name.startswith(start)}


def frames_of(video: Path, preprocess: PreprocessConfig) -> Tensor:
    """The sampled frames of a video as the net sees them, (T, 3, 32, 32), resized by Pillow and cropped here."""
    with open_video(video) as reader:
        frames = [
            Image.fromarray(frame).resize((40, 40), Image.Resampling.BILINEAR)
            for frame in reader.read(range(0, FRAMES, STRIDE))
        ]
    pixels = torch.from_numpy(np.stack([np.asarray(frame)[4:36, 4:36] for frame in frames])).float() / 255
    return ((pixels - torch.tensor(preprocess.mean)) / torch.tensor(preprocess.std)).permute(0, 3, 1, 2)


def test_an_encoder_of_timm_from_stage_one_to_prediction(place: Path) -> None:
    settings = ["--config", "settings.yaml"]
    succeed(["train-cnn", *settings, "--name", "one"], place)
    said = succeed(["train-joint", *settings, "--name", "two", "--from-cnn", "one"], place)
    assert f"cnn.freeze_until=blocks.1: 0.01 of 0.57 million parameters of timm:{NET} are frozen" in said
    one, two = (tensors(place / "runs" / path) for path in ("one/cnn/best.pt", "two/joint/multitask/best.pt"))
    torch.manual_seed(0)
    first = timm.create_model(NET, num_classes=0).state_dict()
    frozen = ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.")
    for before, after in ((first, one), (one, two)):
        assert {name for name in before if torch.equal(before[name], after[name])} == {
            name for name in before if name.startswith(frozen)
        }
    (epoch,) = read_metrics(place / "runs/two/joint/multitask/metrics.jsonl", "epoch")
    assert epoch["lr_backbone.blocks.5.0"] == pytest.approx(0.75 * epoch["lr_backbone.conv_head"])

    net = timm.create_model(NET, num_classes=0).eval()
    net.load_state_dict(two)
    images = frames_of(place / "data/video04.mp4", load_config(str(place / "settings.yaml")).preprocess)
    with torch.inference_mode():
        expected = net(images).numpy()
    for precision, tolerance in (("fp32", 1e-4), ("bf16", 0.05)):  # in bf16 the net is folded
        options = ["--set", f"extract.precision={precision}", "--set", f"extract.store={precision}"]
        done = run(["extract", *settings, "--from-joint", "two", "--name", precision, *options], place)
        if precision == "bf16" and "bf16: this CPU" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        (path,) = (place / precision).glob("*/video04.h5")
        found = read_features(path).features
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    assert "mean (mAP)" in succeed(["evaluate", *settings, "--name", "two", "--model", "joint"], place)
    succeed(["predict", *settings, "--name", "two", "--out", "out", "data/video04.mp4"], place)
    assert len((place / "out/video04.csv").read_text().splitlines()) == 1 + len(images)


def test_a_layer_that_is_not_there_ends_in_one_line(place: Path) -> None:
    done = run(["train-cnn", "--config", "settings.yaml", "--name", "x", "--set", "cnn.freeze_until=blocks.9"], place)
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: cnn.freeze_until=blocks.9: not a layer that can be named; did you mean blocks.")
    assert line.endswith("blocks.5, blocks.5.0, conv_head")
    assert not (place / "runs/x").exists()
