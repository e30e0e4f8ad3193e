from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import stage1_cnn.encoders.calibration
import stage1_cnn.encoders.openvino_net
from configs.errors import UserError
from configs.schema import ExtractConfig, PreprocessConfig
from engine.stopping import StopRequest
from features.dataset.index import Index
from features.frames.preprocess import normalise
from features.store import read_features
from stage1_cnn.encoders.backbone import Backbone, build_backbone
from stage1_cnn.encoders.calibration import int8_arithmetic
from stage1_cnn.encoders.openvino_net import calibrate, convert, openvino
from stage1_cnn.extract import ExtractReport, extract
from tests.stage1_cnn.material import World

PREPROCESS = PreprocessConfig(resize_px=(40, 60), crop_px=(32, 48))
PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build_backbone("resnet18", "random", 0).eval()


def crops(count: int, seed: int = 0) -> np.ndarray:
    """Noise that changes slowly, as images do: (count, 32, 48, 3) uint8."""
    coarse = torch.from_numpy(np.random.default_rng(seed).random((count, 3, 4, 4), dtype=np.float32))
    return (nn.functional.interpolate(coarse, (32, 48), mode="bilinear") * 255).byte().permute(0, 2, 3, 1).numpy()


def reference(backbone: Backbone, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return backbone(normalise(images, PREPROCESS)).numpy()


def cosine(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    product = (found.astype(np.float64) * expected).sum(1)
    return product / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)


def dump(world: World, index: Index | None = None, **settings: object) -> ExtractReport:
    config = world.set(extract={"encoder": "initial", "engine": "openvino", "calibration_frames": 4, **settings})
    run = world.run.with_name("-".join(map(str, settings.values())) or "first")
    return extract(config, run, world.dataset(index), stop=StopRequest())


def features(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_features(path).features for path in sorted(folder.glob("*.h5"))}


# ---------------------------------------------------------------------------------------------- the net


def test_fp32_gives_torchs_embeddings_for_any_number_of_crops(backbone: Backbone) -> None:
    net, images = convert(backbone, PREPROCESS, "fp32"), crops(5)
    expected = reference(backbone, images)
    for some in (images, images[:1], images[:3]):
        found = net(torch.from_numpy(some)).numpy()
        np.testing.assert_allclose(found, expected[: len(some)], rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_an_output_is_not_overwritten_by_the_next_batch(backbone: Backbone) -> None:
    net, images = convert(backbone, PREPROCESS, "fp32"), torch.from_numpy(crops(4))
    first = net(images[:2])
    kept = first.clone()
    net(images[2:])
    assert torch.equal(first, kept)


def test_int8_is_close_to_fp32_and_is_int8(backbone: Backbone) -> None:
    net, images = calibrate(backbone, PREPROCESS, list(crops(20, seed=1))), crops(16, seed=2)
    found = net(torch.from_numpy(images)).numpy()
    expected = reference(backbone, images)
    assert cosine(found, expected).min() > 0.99
    assert not np.allclose(found, expected, rtol=1e-3)
    assert len(net.weights) < 0.3 * len(convert(backbone, PREPROCESS, "fp32").weights)


def test_weights_stay_in_half_the_range_of_8_bits(backbone: Backbone) -> None:
    """Without VNNI pairs of products of unsigned and signed bytes are added in 16 bits, and saturate."""
    net = calibrate(backbone, PREPROCESS, list(crops(4)))
    model = openvino().Core().read_model(net.graph, net.weights)
    rounded = [
        one.data
        for one in model.get_ordered_ops()
        if one.get_type_name() == "Constant" and one.get_element_type() == openvino().Type.i8
    ]
    assert len(rounded) == 19  # all convolutions of a ResNet18 but the first
    assert max(np.abs(weights.astype(int)).max() for weights in rounded) <= 64


def test_calibrating_twice_gives_the_same_net(backbone: Backbone) -> None:
    first, second = (calibrate(backbone, PREPROCESS, list(crops(4))) for _ in range(2))
    assert first.weights == second.weights
    assert int8_arithmetic(first) == int8_arithmetic(second)  # layers' names are numbered through a process


def test_a_process_can_be_sent_the_net(backbone: Backbone) -> None:
    net, images = convert(backbone, PREPROCESS, "fp32"), torch.from_numpy(crops(2))
    assert torch.equal(pickle.loads(pickle.dumps(net))(images), net(images))  # noqa: S301


def signal_stack() -> bytes:
    """This thread's alternate signal stack: address, flags and size."""
    stack = ctypes.create_string_buffer(64)
    assert ctypes.CDLL(None).sigaltstack(None, stack) == 0
    return stack.raw


def test_the_signal_stack_is_not_replaced(backbone: Backbone) -> None:
    before, images = signal_stack(), torch.from_numpy(crops(2))
    nets = convert(backbone, PREPROCESS, "fp32"), calibrate(backbone, PREPROCESS, list(crops(4)))
    for net in nets:
        net(images)
        assert signal_stack() == before
    del net, nets
    assert signal_stack() == before


def test_signals_are_handled_after_nets_are_freed_in_the_order_they_were_made() -> None:
    """In a process of its own: it died of SIGSEGV, since OpenVINO put back a signal stack that was unmapped."""
    program = (
        "import signal, torch\n"
        "from configs.schema import PreprocessConfig\n"
        "from stage1_cnn.encoders.backbone import build_backbone\n"
        "from stage1_cnn.encoders.openvino_net import convert\n"
        "settings = PreprocessConfig(resize_px=40, crop_px=32)\n"
        "backbone = build_backbone('resnet18', 'random', 0).eval()\n"
        "nets = [convert(backbone, settings, 'fp32') for _ in range(2)]\n"
        "for net in nets:\n"
        "    net(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))\n"
        "del net\n"
        "while nets:\n"
        "    del nets[0]\n"
        "signal.signal(signal.SIGCHLD, lambda *_: print('handled'))\n"
        "signal.raise_signal(signal.SIGCHLD)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_calibration_prints_nothing_of_the_libraries(tmp_path: Path) -> None:
    """In a process of its own, since the libraries print when they are imported; NNCF draws progress bars."""
    program = (
        "import numpy as np\n"
        "from configs.schema import PreprocessConfig\n"
        "from stage1_cnn.encoders.backbone import build_backbone\n"
        "from stage1_cnn.encoders.openvino_net import calibrate\n"
        "crops = np.random.default_rng(0).integers(0, 255, (4, 32, 32, 3), np.uint8)\n"
        "calibrate(build_backbone('resnet18', 'random', 0), PreprocessConfig(resize_px=40, crop_px=32), list(crops))\n"
    )
    toolkit = {**os.environ, "CUDA_HOME": str(tmp_path)}  # torch warns of a CUDA toolkit on a machine without a GPU
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=PROJECT, env=toolkit, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_usage_data_is_sent() -> None:
    """OpenVINO and NNCF import the package that would send it, unless it cannot be imported."""
    program = (
        "import sys\n"
        "from stage1_cnn.encoders.openvino_net import openvino\n"
        "openvino('nncf'), openvino('openvino.tools.ovc')\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry.')]\n"
        "import nncf.telemetry.wrapper as wrapper\n"
        "assert type(wrapper.telemetry).__name__ == 'MagicMock', wrapper.telemetry\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=True, timeout=120)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, backbone: Backbone) -> None:
    openvino.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"openvino cannot be imported .*`pip install -e '\.\[openvino\]'"):
        convert(backbone, PREPROCESS, "fp32")
    openvino.cache_clear()


def test_a_network_that_cannot_be_converted_is_one_line() -> None:
    class Refuses(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svd(images.flatten(2)).S.flatten(1)

    with pytest.raises(UserError, match="cannot convert this network"):
        convert(Refuses(), PREPROCESS, "fp32")


# ---------------------------------------------------------------------------------------------- extraction


def test_fp32_features_are_torchs_to_rounding_and_another_encoders(world: World) -> None:
    ours = dump(world, precision="fp32")
    torchs = extract(world.set(extract={"encoder": "initial"}), world.run, world.dataset(), stop=StopRequest())
    assert ours.folder != torchs.folder
    assert read_features(ours.folder / "video01.h5").attributes["arithmetic"] == "openvino"
    expected = features(torchs.folder)
    for name, found in features(ours.folder).items():
        assert cosine(found, expected[name]).min() > 0.99999


@pytest.mark.slow
def test_int8_features_do_not_depend_on_processes_and_segments(world: World) -> None:
    """Other processes compute with the one net that was calibrated."""
    whole = dump(world, precision="int8", workers=1)
    expected = features(whole.folder)
    for settings in ({"workers": 2}, {"workers": 2, "segment_frames": 4}):
        for path in whole.folder.glob("*.h5"):
            path.unlink()
        again = dump(world, precision="int8", **settings)
        assert again.folder == whole.folder
        for name, found in features(again.folder).items():
            np.testing.assert_array_equal(found, expected[name])


@pytest.mark.slow
def test_a_net_is_calibrated_once_and_on_training_frames_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = stage1_cnn.encoders.calibration.open_frames

    def watched(config, dataset, entry, *rest):
        opened.append(entry.id)
        return real(config, dataset, entry, *rest)

    monkeypatch.setattr("stage1_cnn.encoders.calibration.open_frames", watched)
    first = dump(world, precision="int8")
    assert opened == ["video01", "video02"]
    second = dump(world, precision="int8")
    assert (second.folder, second.done, len(second.skipped)) == (first.folder, [], 4)
    assert opened == ["video01", "video02"]
    assert len(list((world.config.extract.store / "int8").glob("*.pt"))) == 1


@pytest.mark.slow
def test_other_calibration_frames_make_another_encoder(world: World) -> None:
    few, many = (dump(world, precision="int8", calibration_frames=count) for count in (1, 9))
    assert few.folder != many.folder


@pytest.mark.slow
def test_a_damaged_training_video_is_left_out_of_the_calibration(
    own_world: World, capsys: pytest.CaptureFixture
) -> None:
    index = own_world.index()
    (own_world.root / "video01.mp4").unlink()
    report = dump(own_world, index, precision="int8")
    assert [video for video, _ in report.failed] == ["video01"]
    assert "video01: not used for calibration" in capsys.readouterr().err


def test_without_training_videos_int8_is_refused(world: World) -> None:
    index = world.index()
    others = Index.model_validate(
        {**index.model_dump(), "videos": [video.model_copy(update={"split": "test"}) for video in index.videos]}
    )
    with pytest.raises(UserError, match="int8 is calibrated on frames of training videos, and the index has none"):
        dump(world, others, precision="int8")


def test_an_altered_net_in_the_store_is_refused(world: World) -> None:
    dump(world, precision="int8")
    (path,) = (world.config.extract.store / "int8").glob("*.pt")
    path.rename(path.with_name(path.name.replace(path.stem[-12:], "0" * 12)))
    with pytest.raises(UserError, match="does not hold the net that its name says"):
        dump(world, precision="int8")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "int8"}, "int8 needs engine=openvino"),
        ({"engine": "openvino", "precision": "fp16"}, "not fp16"),
        ({"engine": "openvino", "compile": True}, "cannot be combined"),
        ({"engine": "tensorrt"}, "torch"),
        ({"engine": "openvino", "precision": "int8", "calibration_frames": 0}, "greater than"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExtractConfig(**values)
