"""examples/run_onnx.py: short, on its own, with the phases of `predict`, and one line for input that is none."""

from __future__ import annotations

import ast
import csv
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from configs.dataset_spec import DataSetSpec
from configs.head_settings import LstmHead
from configs.load import load_dataset
from configs.schema import DecodingConfig
from engine.stopping import StopRequest
from evaluation.files.predictions import PredictionFile, read_prediction_csv
from features.dataset.build import dataset_of_source
from features.dataset.sampling import sampled_frames
from features.frames.source import source_frames
from live.export.agreement import as_input
from live.export.description import decoding_json
from live.export.model_file import export_model
from live.nets import Nets
from live.new_videos import predict_new_videos
from tests.cli import PROJECT, succeed
from tests.live.export.tiny import LINEAR, decoded, nets_of
from tests.stage2_temporal.decoding.test_decoder import probabilities
from tests.test_released import RELEASED, released  # noqa: F401 (fixture)

EXAMPLE = PROJECT / "examples" / "run_onnx.py"


def run_example(folder: Path, *arguments: object, given: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, input=given, capture_output=True, check=False)


def rows_of(done: subprocess.CompletedProcess[bytes]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return list(csv.reader(io.StringIO(done.stdout.decode()), delimiter="\t"))


def inputs(nets: Nets, video: Path) -> NDArray[np.float32]:
    """The sampled frames of a video (N, 3, S, S), prepared as the metadata says."""
    dataset = dataset_of_source(video, nets.spec, nets.config.data)
    [entry] = dataset.index.videos
    numbers = sampled_frames(entry, nets.config.data.fps)
    with source_frames(nets.config, dataset, entry, numbers) as found:
        return np.concatenate([as_input(nets, frame) for frame in found.frames])


def as_npy(frames: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, frames)
    return stream.getvalue()


def test_it_is_short_and_needs_onnx_runtime_and_numpy_only() -> None:
    source = EXAMPLE.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 80
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in imported if isinstance(node, ast.Import) for name in node.names}
    assert not any(isinstance(node, ast.ImportFrom) for node in imported)
    assert names == {"json", "sys", "numpy", "onnxruntime"}


@pytest.mark.slow
def test_a_real_clip_has_the_phases_of_predict(released: Path, shared_data: Path) -> None:  # noqa: F811
    """Of a joint net, all through the command line; frames on stdin as a .npy file, or as bare numbers."""
    clip, settings = shared_data / "clips" / "videos" / "video05.mp4", ["--config", "old.yaml"]
    said = succeed(["export-model", "joint", *settings], released)
    assert "runs/joint/onnx/joint.onnx: 1.6 MB; ONNX Runtime and torch differ by at most" in said
    assert json.loads((released / "runs/joint/onnx/joint.json").read_text())["check"]["agrees"]
    succeed(["predict", *settings, "--name", "joint", str(clip), "--out", "found"], released)
    dumping = ["--speed", "max", "--dump-input", "frames.npy"]
    succeed(["stream", *settings, "--name", "joint", str(clip), *dumping], released)
    given = ((released / "frames.npy").read_bytes(), np.load(released / "frames.npy").tobytes())
    one, other = (rows_of(run_example(released, "runs/joint/onnx/joint.onnx", given=each)) for each in given)
    assert one == other
    spec = load_dataset("simulated")
    require_same(one, read_prediction_csv(released / "found/video05.csv", spec), spec)


def test_a_decoded_net_has_the_phases_of_predict(tmp_path: Path) -> None:
    video = RELEASED / "videos/videos/video04.mp4"
    nets = decoded(nets_of(LstmHead(hidden=9)), mode="filter")
    export_model(nets, tmp_path / "net.onnx", StopRequest())
    np.save(tmp_path / "frames.npy", inputs(nets, video))
    predict_new_videos(nets, [video], tmp_path / "out", stop=StopRequest())
    expected = read_prediction_csv(tmp_path / "out" / "video04.csv", nets.spec)
    require_same(rows_of(run_example(tmp_path, "net.onnx", "frames.npy")), expected, nets.spec)


def require_same(rows: list[list[str]], expected: PredictionFile, spec: DataSetSpec) -> None:
    assert len(rows) == len(expected.phase) > 20
    assert [row[2] for row in rows] == [spec.phases[label] for label in expected.phase]
    np.testing.assert_allclose([float(row[1]) for row in rows], expected.time_s, atol=1e-3)
    likeliest = expected.probabilities.max(axis=1)
    np.testing.assert_allclose([float(row[3]) for row in rows], likeliest, atol=1e-4)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.parametrize("mode", ["calibrated", "filter", "causal"])
def test_its_decoding_is_that_of_predict(mode: Any, example: dict[str, Any]) -> None:
    """Of `causal` it has the probabilities, which are the filter's, and not the path."""
    nets = decoded(nets_of(LINEAR), mode=mode)
    assert nets.decoding is not None
    values = probabilities(5, 60, 7)
    values[7] = [1, 0, 0, 0, 0, 0, 0]
    labels, expected = nets.decoding.decode("phases", 2.0, values)
    decoder = example["Decoder"](json.loads(json.dumps(decoding_json(nets.decoding, 2.0))))
    found = np.stack([decoder.step(one) for one in values])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if mode != "causal":
        assert found.argmax(axis=1).tolist() == labels.tolist()


def test_without_decoding_probabilities_stay_as_they_are(example: dict[str, Any]) -> None:
    assert DecodingConfig().mode == "none"
    [one] = probabilities(5, 1, 7)
    assert example["Decoder"](None).step(one) is one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    export_model(nets_of(LINEAR), path, StopRequest())
    return path


FRAME = np.zeros((2, 3, 32, 32), np.float32)
HOSTILE: dict[str, Callable[[], bytes]] = {
    "half a frame": lambda: FRAME.tobytes()[:-5],
    "other size": lambda: as_npy(FRAME[:, :, 1:]),
    "other type": lambda: as_npy(FRAME.astype(np.float64)),
    "objects": lambda: as_npy(np.array([{}, ()], dtype=object)),
    "no number": lambda: as_npy(FRAME * np.nan),
    "half a header": lambda: as_npy(FRAME)[:9],
    "a later version": lambda: b"\x93NUMPY\x09\x00" + as_npy(FRAME)[8:],
    "frames missing": lambda: as_npy(FRAME)[:-1],
}


@pytest.mark.parametrize("what", HOSTILE)
def test_input_that_is_none_ends_in_one_line(
    what: str, model: Path, example: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "frames").write_bytes(HOSTILE[what]())
    with pytest.raises((ValueError, KeyError)) as refused:
        example["main"](str(model), str(tmp_path / "frames"))
    assert "\n" not in str(refused.value)


def test_errors_are_one_line_on_stderr(model: Path, tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    for arguments in ((model, "none.npy"), ("no.onnx", "none.npy"), ()):
        done = run_example(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (1, b"")
        assert done.stderr.startswith(b"error: ")
        assert done.stderr.count(b"\n") == 1
