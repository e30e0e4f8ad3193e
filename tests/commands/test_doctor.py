"""`doctor`: one line per finding whatever is broken, and an exit code that scripts can use."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.doctor import machine as doctor
from commands.doctor import settings as ours
from commands.doctor.machine import (
    Finding,
    check_folder,
    check_open_files,
    check_packages,
    check_shared_memory,
    examined,
)
from commands.doctor.settings import (
    check_data,
    check_decoders,
    check_device,
    check_encoder,
    check_folders,
    check_weights,
    diagnose,
)
from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config, DataConfig
from engine import device
from features.dataset.build import build_index
from features.dataset.sampling import sampled_frames
from features.frames.source import frame_cache
from tests.cli import run
from tests.gpu import Gpu
from tests.onednn import cpu_with_bf16
from tests.stage1_cnn.material import SPEC, make_world, write_dataset


def levels(findings: Any) -> list[str]:
    return [finding.level for finding in findings]


def only(findings: Any) -> Finding:
    (finding,) = findings
    return finding


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_prints_one_line_per_finding_and_changes_nothing(tmp_path: Path) -> None:
    done = run(["doctor", "--set", "cnn.weights=random"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert all(line.split(" ")[0] in ("ok", "warn") for line in lines)
    for what in ("settings", "Python", "packages", "torch and torchvision", "CPU", "decoders", "weights", "runs"):
        assert any(line[6:].startswith(f"{what}: ") for line in lines), what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_what_fails_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    done = run(["doctor", "--set", "cnn.weights=random"], tmp_path)
    assert done.returncode == 1
    assert "FAIL  runs: runs cannot be created" in done.stdout


@pytest.mark.slow
def test_wrong_settings_are_a_finding_and_the_machine_is_checked_all_the_same(tmp_path: Path) -> None:
    done = run(["doctor", "--set", "data.fsp=1"], tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("FAIL  settings: ")
    assert "fsp" in lines[0]
    for what in ("Python", "packages", "CPU", "decoders"):
        assert any(line[6:].startswith(f"{what}: ") for line in lines), what
    assert "data root" not in done.stdout


# ---------------------------------------------------------------------------------------------- broken installations


def test_a_check_that_raises_is_a_finding() -> None:
    def broken() -> list[Finding]:
        raise RuntimeError("two\nlines")

    finding = only(examined("GPU", broken))
    assert finding.line().startswith("FAIL  GPU: RuntimeError: two lines; ")
    assert finding.line().isprintable()


def test_what_a_check_found_before_it_raised_is_shown() -> None:
    def breaking() -> Iterator[Finding]:
        yield Finding("ok", "GPU", "one")
        raise RuntimeError("no other")

    findings = iter(examined("GPU", breaking))
    assert next(findings).found == "one"
    assert only(findings).line().startswith("FAIL  GPU: RuntimeError: no other; ")


def test_settings_that_a_broken_package_cannot_read_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "machine_checks", lambda: ())
    monkeypatch.setattr(ours, "check_decoders", lambda: ())

    def load() -> Any:
        raise ImportError("pydantic_core is broken")

    assert (
        only(diagnose(load)).line().startswith("FAIL  settings: cannot be read (ImportError: pydantic_core is broken)")
    )

    def refuse() -> Any:
        raise UserError("a.yaml: no such file")

    assert only(diagnose(refuse)).line().startswith("FAIL  settings: a.yaml: no such file; weights, data")


def test_a_package_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def fake(name: str, *rest: Any, **options: Any) -> Any:
        if name in ("h5py", "decord"):
            raise OSError(f"lib{name}.so: cannot open shared object file")
        return real(name, *rest, **options)

    monkeypatch.setattr(importlib, "import_module", fake)
    found = {finding.what: finding for finding in check_packages()}
    assert found["h5py"].level == "FAIL"
    assert "cannot open shared object file" in found["h5py"].found
    assert found["decord"].level == "warn"  # PyAV reads all videos without it
    assert "h5py" not in found["packages"].found


def test_garbage_is_collected_again_after_the_packages() -> None:
    import gc

    assert gc.isenabled()
    assert list(check_packages())
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("versions", "level", "words"),
    [
        ({"h5py": None}, "FAIL", "not installed"),
        ({"h5py": "3.7.0"}, "FAIL", "3.7.0, but >=3.8 is required"),
        ({"h5py": "3.8.0a0+vendor"}, None, ""),
        ({"h5py": "3.10.0"}, None, ""),  # 10 > 8
        ({"av": "14.0.1"}, "FAIL", "14.0.1, but"),
    ],
)
def test_packages_must_have_a_version_that_setup_cfg_allows(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None], level: str | None, words: str
) -> None:
    real = metadata.version

    def fake(name: str) -> str:
        if name in versions:
            if versions[name] is None:
                raise metadata.PackageNotFoundError(name)
            return str(versions[name])
        return real(name)

    monkeypatch.setattr(metadata, "version", fake)
    found = {finding.what: finding for finding in check_packages()}
    (name,) = versions
    if level is None:
        assert name not in found
    else:
        assert found[name].level == level
        assert words in found[name].found


@pytest.mark.parametrize(
    ("ours", "vision", "level"),
    [("2.14.1", "0.29.1", "ok"), ("2.6.0+cu118", "0.21.0+cu118", "ok"), ("2.14.1", "0.28.0", "FAIL")],
)
def test_torch_and_torchvision_must_match(monkeypatch: pytest.MonkeyPatch, ours: str, vision: str, level: str) -> None:
    monkeypatch.setattr(metadata, "version", {"torch": ours, "torchvision": vision}.__getitem__)
    assert only(doctor.check_torch_pair()).level == level


def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "driver_lists_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CPUs; install a torch" in gpu_finding().line()
    for name, level in (("auto", "FAIL"), ("cuda", "FAIL"), ("cpu", "ok")):
        assert only(check_device(load_config("mini", [f"device={name}"]))).level == level
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "(built for CUDA 12.8) cannot use it" in gpu_finding().line()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "hidden" in gpu_finding().found
    assert only(check_device(load_config("mini"))).level == "ok"


def gpu_finding() -> Finding:
    return only(finding for finding in doctor.check_devices() if finding.what.startswith("GPU"))


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((7, 5), "sm_75, computes fp16 where precision is auto"),
        ((9, 0), "sm_90, computes bf16 where precision is auto"),
    ],
)
def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], words: str) -> None:
    Gpu(monkeypatch, capability, "Tesla T4")
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda size, device: ones(size))
    assert gpu_finding().line() == f"ok    GPU 0: Tesla T4, {words}, 15.0 of 16.0 GiB free"


def test_a_gpu_that_torch_was_not_built_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernel(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    Gpu(monkeypatch, (6, 0), "Tesla P100")
    monkeypatch.setattr(torch, "ones", no_kernel)
    assert gpu_finding().level == "FAIL"
    assert "has no code for sm_60, Tesla P100; install a torch for its CUDA" in gpu_finding().line()
    assert "pip install -e ." not in gpu_finding().line()


@pytest.mark.parametrize(
    "setting",
    ["cnn.precision", "extract.precision", "temporal.precision", "temporal.projection", "joint.multitask.precision"],
)
def test_a_precision_that_a_command_would_refuse_fails(setting: str) -> None:
    config = load_config("mini", [f"{setting}=bf16"])
    with cpu_with_bf16(False):
        finding = only(found for found in check_device(config) if found.level != "ok")
        assert finding.line().startswith(f"FAIL  precision: {setting}=bf16: this CPU does not multiply bf16")
        assert finding.line().endswith(f"set {setting}=fp32 or auto")
        cpu = next(found for found in doctor.check_devices() if found.what == "CPU")
        assert cpu.found.endswith("no native bf16, so extraction runs in fp32 where precision is auto")
    with cpu_with_bf16(True):
        assert levels(check_device(config)) == ["ok"]


def test_a_gpu_s_memory_is_compared_with_what_the_settings_need(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch, (7, 5))
    found = {line.found.split()[0]: line for line in list(check_device(load_config("mtrcnet_cl")))[1:]}
    assert (found["train-cnn"].level, found["train-joint"].level) == ("ok", "warn")
    assert "joint.gradient_checkpointing=true, or lower joint.sequence.batch" in found["train-joint"].to_do
    smaller = load_config("mtrcnet_cl", ["joint.gradient_checkpointing=true"])
    assert levels(check_device(smaller)) == ["ok", "ok", "ok"]
    Gpu(monkeypatch, (6, 0))
    for other in ("cnn.backbone=resnet18", "cnn.freeze_until=layer2"):  # whose need was not counted
        assert levels(check_device(load_config("cholec80", [other]))) == ["ok"]


@pytest.mark.parametrize(
    ("frames", "precision", "checkpointing", "counted"),
    [
        (100, "bf16", False, 4.4),
        (100, "fp32", False, 8.3),
        (50, "fp16", False, 2.3),
        (400, "bf16", False, 16.8),
        (400, "fp32", False, 32.5),
        (400, "bf16", True, 6.8),
        (400, "fp32", True, 12.7),
    ],
)
def test_memory_of_a_step_is_what_was_counted(frames: int, precision: str, checkpointing: bool, counted: float) -> None:
    """Live bytes, and 1.5 GiB for the context and cuDNN's workspace."""
    assert ours.step_gib(frames, precision, 224, checkpointing) == pytest.approx(counted + 1.5, rel=0.05)


def test_little_shared_memory_and_few_open_files_are_warnings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import resource

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    assert only(check_shared_memory(tmp_path)).line().startswith("warn  shared memory: 64 MiB; start the container")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    assert only(check_open_files()).line() == "warn  open files: 256 at most (hard limit 4096); run `ulimit -n 1024`"


def test_folders_that_are_full_or_closed_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert only(check_folder("runs", tmp_path / "a/b/c")).level in ("ok", "warn")
    assert not (tmp_path / "a").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, 10**9))
    assert only(check_folder("runs", tmp_path)).level == "warn"
    assert "about 2.0 GB needed" in only(check_folder("runs", tmp_path, 2 * 10**9)).found
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    finding = only(check_folder("runs", tmp_path))
    assert (finding.level, "Read-only file system" in finding.found) == ("FAIL", True)


@pytest.mark.parametrize("call", ["exists", "disk_usage"])
def test_a_folder_that_cannot_be_accessed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path if call == "exists" else shutil, call, refuse)
    finding = only(check_folder("runs", tmp_path))
    assert finding.line() == f"FAIL  runs: {tmp_path} cannot be accessed (Permission denied); choose another folder"


@pytest.mark.parametrize(
    ("program", "level", "words"),
    [
        ("import os; os.abort()", "FAIL", "exit code -6"),
        ("raise ImportError('libav is gone')", "FAIL", "libav is gone"),
        ("print('warn PyAV reads; decord does not (decord is not installed)')", "warn", "decord is not installed"),
        ("import time; time.sleep(60)", "FAIL", "no frame within 1 s"),
    ],
)
def test_a_decoder_that_crashes_or_hangs_is_a_finding(program: str, level: str, words: str) -> None:
    finding = only(check_decoders(program, limit_s=1.0 if "sleep" in program else 60.0))
    assert (finding.level, words in finding.found) == (level, True), finding.line()


def test_decoders_are_compared_on_a_real_video(tmp_path: Path) -> None:
    decord = importlib.util.find_spec("decord")
    assert ours.compare_readers(tmp_path).startswith("ok PyAV" if decord else "warn PyAV")


# ---------------------------------------------------------------------------------------------- settings


def test_weights_that_are_not_here_are_a_warning_and_a_missing_file_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    world = make_world(tmp_path, tmp_path)
    assert only(check_weights(world.config)).level == "ok"  # random
    finding = only(check_weights(world.set(cnn={"weights": "imagenet", "backbone": "resnet50"})))
    assert (finding.level, "without internet" in finding.to_do) == ("warn", True)
    assert only(check_weights(world.set(cnn={"weights": str(tmp_path / "gone.pth")}))).level == "FAIL"


def test_the_data_are_checked_without_being_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.delenv("SURGSTAGE_DATA", raising=False)
    root = write_dataset(tmp_path / "data", 3)
    described = tmp_path / "tiny-set.yaml"
    described.write_text(yaml.safe_dump(SPEC.model_dump(mode="json")))
    world = make_world(tmp_path, root)
    config = world.set(data={"dataset": str(described)})
    assert "3 video(s) (video), 3 with phases, not indexed yet" in only(check_data(config)).found
    assert only(check_data(world.set(data={"root": None}))).level == "warn"
    assert only(check_data(world.set(data={"root": tmp_path / "gone"}))).level == "warn"
    build_index(root, SPEC, DataConfig()).save(config.data.index)
    assert levels(check_data(config)) == ["ok", "ok"]
    (root / "video02.mp4").write_bytes(b"other")
    assert "1 of 3 sources have changed (video02)" in list(check_data(config))[-1].found
    (root / "video02.mp4").unlink()
    assert "1 of 3 sources are missing (video02)" in list(check_data(config))[-1].found
    config.data.index.write_text("{")
    assert levels(check_data(config)) == ["FAIL"]


def test_space_is_required_for_what_does_not_exist_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_dataset(tmp_path / "data", 4)
    world = make_world(tmp_path, root)
    index = world.index()
    index.save(world.config.data.index)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 0))

    def found(config: Any = world.config) -> dict[str, Finding]:
        return {finding.what: finding for finding in check_folders(config)}

    assert (found()["features"].level, found()["frame cache"].level) == ("FAIL", "FAIL")
    trained_on = [entry.id for entry in index.videos if entry.split in ("train", "val")]
    assert 0 < len(trained_on) < 4
    for video_id in trained_on:
        path = frame_cache(world.config).path(video_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert found()["frame cache"].level == "warn"
    assert "needed" not in found()["frame cache"].found
    folder = world.config.extract.store / f"{world.config.cnn.backbone}-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "video01.h5").touch()
    assert found()["features"].level == "warn"
    assert "needed in total" in found()["features"].found


def test_space_for_features_depends_on_backbone_and_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_dataset(tmp_path / "data", 4)
    world = make_world(tmp_path, root)
    index = world.index()
    index.save(world.config.data.index)
    needed: dict[str, int] = {}

    def note(what: str, folder: Path, needed_bytes: int = 0, certain: bool = True) -> list[Finding]:
        needed[what] = needed_bytes
        return []

    monkeypatch.setattr(ours, "check_folder", note)
    sizes = {}
    for backbone, storage in (("resnet18", "float16"), ("resnet50", "float16"), ("resnet50", "float32")):
        assert list(check_folders(world.set(cnn={"backbone": backbone}, extract={"storage": storage}))) == []
        sizes[backbone, storage] = needed["features"]
    frames = sum(len(sampled_frames(entry, world.config.data.fps)) for entry in index.videos)
    assert sizes["resnet50", "float16"] - sizes["resnet18", "float16"] == frames * (2048 - 512) * 2
    assert sizes["resnet50", "float32"] - sizes["resnet50", "float16"] == frames * 2048 * 2
    assert list(check_folders(world.set(cnn={"backbone": "no such net"}))) == []


def test_the_encoder_is_described_and_wrong_image_sizes_fail(tmp_path: Path) -> None:
    world = make_world(tmp_path, tmp_path)
    finding = only(check_encoder(world.set(cnn={"backbone": "resnet18"})))
    assert (finding.level, finding.what) == ("ok", "encoder")
    assert finding.found.startswith("resnet18, embeddings of dimension 512; frames resized to ")
    lite = Config.model_validate({"cnn": {"backbone": "efficientnet_lite2"}})
    finding = only(check_encoder(lite))
    assert "embeddings of dimension 1280; frames for efficientnet_lite2: resized to 290 x 290" in finding.found
    assert finding.found.endswith("; licence of its weights: Apache-2.0")
    wrong = Config.model_validate({"cnn": {"backbone": "vit_b_32"}, "preprocess": {"resize_px": 64, "crop_px": 64}})
    assert only(check_encoder(wrong)).level == "FAIL"
    unknown = Config.model_validate({"cnn": {"backbone": "efficientnet_lite9"}})
    assert "did you mean efficientnet_lite" in only(check_encoder(unknown)).found


def test_released_weights_are_named_where_they_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SURGSTAGE_WEIGHTS", str(tmp_path))
    config = Config.model_validate({"cnn": {"backbone": "lemonfm"}})
    finding = only(check_weights(config))
    assert finding.level == "FAIL"
    assert "get lemonfm.pth from https://" in finding.found
    (tmp_path / "lemonfm.pth").write_bytes(b"weights")
    assert "lemonfm.pth (0 MB" in only(check_weights(config)).found
