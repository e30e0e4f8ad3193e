"""Writes tiny copies of the public data sets that are described in `configs/datasets`, in the form of each.

Each function writes a copy below a folder and returns what it has written: the class of every frame (or image), by
video and role; -1 means no label. Header lines and the first lines of files are those of the data sets; the labels are
drawn.
"""

from __future__ import annotations

import functools
import itertools
import json
import pickle
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from configs.dataset_spec import DataSetSpec
from configs.load import load_dataset
from tests.videos import VideoSpec, write_video

FRAMES = 10
Truth = dict[str, dict[str, np.ndarray]]  # by video and role: (F,), or (F, K) for tools
WRITERS: dict[str, Callable[[Path, DataSetSpec], Truth]] = {}


def make(name: str, root: Path) -> Truth:
    """Write a copy of the data set `name` below `root`; return the labels of its frames."""
    return WRITERS[name](root, load_dataset(name))


def _writer(*names: str) -> Callable[[Callable[[Path, DataSetSpec], Truth]], Callable[[Path, DataSetSpec], Truth]]:
    def register(function: Callable[[Path, DataSetSpec], Truth]) -> Callable[[Path, DataSetSpec], Truth]:
        WRITERS.update(dict.fromkeys(names, function))
        return function

    return register


@functools.cache
def _encoded(fps: int, ending: str, frames: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        codec = {"codec": "mpeg4", "b_frames": 0} if ending == ".avi" else {}
        spec = VideoSpec(count=frames, fps=Fraction(fps), width_px=64, height_px=48, **codec)
        return write_video(Path(folder) / f"video{ending}", spec).read_bytes()


def video(path: Path, fps: int = 25, frames: int = FRAMES) -> None:
    """Write a video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_encoded(fps, path.suffix, frames))


@functools.cache
def _image(ending: str) -> bytes:
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"image.{ending}"
        Image.new("RGB", (32, 24), (90, 40, 30)).save(path)
        return path.read_bytes()


def images(folder: Path, name: str, count: int = FRAMES, first: int = 0, step: int = 1) -> None:
    """Write a folder of images whose names are `name % number`."""
    folder.mkdir(parents=True, exist_ok=True)
    for at in range(count):
        (folder / (name % (first + at * step))).write_bytes(_image(name.rpartition(".")[2]))


def text(path: Path, lines: Sequence[str]) -> None:
    """Write the lines of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def drawn(classes: Sequence[str], seed: int, count: int = FRAMES) -> np.ndarray:
    """Return the classes (count,) of a sequence that changes now and then, and at least once."""
    rng = np.random.default_rng(seed)
    changes = np.cumsum(rng.random(count) < 0.4) + np.arange(count) // (count // 2)
    return (rng.permutation(len(classes))[changes % len(classes)]).astype(np.int8)


def drawn_tools(count: int, tools: int, seed: int) -> np.ndarray:
    """Return which tools (count, tools) are present."""
    return (np.random.default_rng(seed).random((count, tools)) < 0.4).astype(np.int8)


def runs(labels: np.ndarray) -> list[tuple[int, int, int]]:
    """Return (first, first after, class) of each run of equal labels."""
    edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
    return [(first, stop, int(labels[first])) for first, stop in itertools.pairwise(edges)]


# ---------------------------------------------------------------------------------------------- one row per frame


@_writer("cholec80", "simulated")
def _cholec80(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for number in (1, 2):
        name, phases, tools = f"video{number:02d}", drawn(spec.phases, number), drawn_tools(1, len(spec.tools), number)
        video(root / f"videos/{name}.mp4")
        rows = [f"{at}\t{spec.phases[one]}" for at, one in enumerate(phases)]
        text(root / f"phase_annotations/{name}-phase.txt", ["Frame\tPhase", *rows])
        row = "\t".join(map(str, [0, *tools[0]]))
        rows = ["\t".join(["Frame", *spec.tools]), row]  # every 25th frame
        text(root / f"tool_annotations/{name}-tool.txt", rows)
        truth[name] = {"phase": phases, "tool": np.repeat(tools, FRAMES, axis=0)}
    return truth


@_writer("m2cai16-workflow")
def _m2cai16(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for seed, name in enumerate(("train_dataset/workflow_video_01", "test_dataset/test_workflow_video_01")):
        phases = drawn(spec.phases, seed)
        video(root / f"{name}.mp4")
        rows = [f"{at}\t{spec.phases[one]}" for at, one in enumerate(phases)]
        text(root / f"{name}.txt", ["Frame\tPhase", *rows])
        text(root / f"{name}_timestamp.txt", [f"00:00:{at / 25:05.2f}\t{spec.phases[0]}" for at in range(FRAMES)])
        truth[Path(name).name] = {"phase": phases}
    return truth


@_writer("heichole")
def _heichole(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for number, name, fps in ((1, "Hei-Chole1", 25), (16, "hei-chole16", 50)):
        phases, slots = drawn(spec.phases, number), drawn_tools(FRAMES, 21, number)
        video(root / f"Videos/Full/{name}.mp4", fps)
        video(root / f"Videos/Skill/{name}_calot.mp4", fps)
        said = ("Annotation_Phase", "Annotation_Instrument") if name[0] == "H" else ("annotation_phase",) * 2
        instrument = said[1] if name[0] == "H" else "annotation_instrument"
        text(root / f"Annotations/Phase/{name}_{said[0]}.csv", [f"{at},{one}" for at, one in enumerate(phases)])
        rows = [",".join(map(str, [at, *row])) for at, row in enumerate(slots)]
        text(root / f"Annotations/Instrument/{name}_{instrument}.csv", rows)
        text(root / f"Annotations/Phase/Raw_annotations/{name}_{said[0]}.csv", ["another form"])
        truth[f"Hei-Chole{number}"] = {"phase": phases, "tool": slots[:, :7]}
    return truth


@_writer("phakir")
def _phakir(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for number in (1, 7):
        phases = drawn(spec.phases, number)
        phases[3] = -1
        video(root / f"Video_{number:02d}.mp4")
        names = ["Undefined" if one < 0 else spec.phases[one] for one in phases]
        text(root / f"Video_{number:02d}_Phases.csv", ["Frame,Phase", *(f"{at},{one}" for at, one in enumerate(names))])
        text(root / f"Video_{number:02d}_Cuts.csv", ["Frame", "74"])
        truth[f"Video_{number:02d}"] = {"phase": phases}
    return truth


@_writer("cataracts")
def _cataracts(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for seed, (name, folder) in enumerate((("train01", "train_gt"), ("test01", "dev_gt"), ("test02", "test_gt"))):
        steps = drawn(spec.phases, seed)
        video(root / f"videos/micro/{name}.mp4", fps=30)
        video(root / f"videos/tray/{name}.mp4", fps=30)
        rows = [f"{at},{one}" for at, one in enumerate(steps, 1)]
        text(root / f"ground_truth/CATARACTS_2020/{folder}/{name}.csv", ["Frame,Steps", *rows])
        text(root / f"ground_truth/CATARACTS_2017/{folder}/{name}.csv", ["another form"])
        truth[name] = {"phase": steps}
    return truth


@_writer("petraw")
def _petraw(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for number, part in ((1, "Training"), (2, "Training"), (91, "Test")):
        name = f"{number:03d}"
        labels = {"phase": drawn(spec.phases, number)}
        labels |= {track: drawn(one.classes, number + 1) for track, one in spec.tracks.items()}
        video(root / f"{part}/Video/{name}.mp4", fps=30)
        images(root / f"{part}/Segmentation/{name}", "%06d.png", 2)
        names = [[spec.classes_of(role)[0][one] for one in row] for role, row in labels.items()]
        rows = ["\t".join([str(at), *row]) for at, row in enumerate(zip(*names, strict=True))]
        header = "Frame\tPhase\tStep\tVerb_Left\tVerb_Right"
        text(root / f"{part}/Procedural_description/{name}.txt", [header, *rows])
        truth[name] = labels
    return truth


@_writer("sar-rarp50")
def _sar_rarp50(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for seed, name in enumerate(("video_01", "video_11_1", "video_11_2", "video_41")):
        actions = drawn(spec.phases, seed, 4)
        video(root / name / "video_left.avi", fps=60, frames=24)
        images(root / name / "segmentation", "%09d.png", 2, step=60)
        text(root / name / "action_discrete.txt", [f"{6 * at:09d},{one}" for at, one in enumerate(actions)])
        before = truth.get(name[:8], {"phase": np.zeros(0, dtype=np.int8)})  # parts of one operation
        truth[name[:8]] = {"phase": np.concatenate([before["phase"], np.repeat(actions, 6)])}
    return truth


# ---------------------------------------------------------------------------------------------- one row per second


@_writer("autolaparo")
def _autolaparo(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for number in (1, 11, 15):
        phases = drawn(spec.phases, number, 5)
        video(root / f"videos/{number:02d}.mp4", fps=2)
        rows = [f"{at}\t{one + 1}" for at, one in enumerate(phases, 1)]
        text(root / f"labels/label_{number:02d}.txt", ["Frame\tPhase", *rows])
        truth[f"{number:02d}"] = {"phase": np.repeat(phases, 2)}
    return truth


@_writer("pitvis")
def _pitvis(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for number in (1, 2):
        steps, tools = drawn(spec.phases, number, 5), np.zeros((5, len(spec.tools)), dtype=np.int8)
        steps[0] = -1
        pairs = [(-1, -2), (0, -2), (1, -2), (16, 3), (18, 0)]  # in the fifth: instrument2 is 0, as in four odd rows
        for at, pair in enumerate(pairs):
            for one in pair:
                tools[at, one - 1] |= one > 0
        tools[0] = -1  # out of the patient
        video(root / f"26531686/video_{number:02d}.mp4", fps=2)
        ids = [one + 1 if one >= 0 else -1 for one in steps.tolist()]
        rows = [f"{number},{at},{ids[at]},{one},{other}" for at, (one, other) in enumerate(pairs)]
        header = "int_video,int_time,int_step,int_instrument1,int_instrument2"
        text(root / f"26531686/annotations_{number:02d}.csv", [header, *rows, f"{number},5,-1,-1,-2"])
        text(root / "26531686/map_steps.csv", ["int_step,str_step", "1,nasal corridor creation "])
        truth[f"video{number:02d}"] = {"phase": np.repeat(steps, 2), "tool": np.repeat(tools, 2, axis=0)}
    return truth


@_writer("cholect50", "cholect45")
def _cholect50(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for number in (1, 8, 79):
        name, phases, tools = f"VID{number:02d}", drawn(spec.phases, number), drawn_tools(FRAMES, 6, number)
        frames: dict[str, list[list[float]]] = {}
        for at in range(FRAMES):
            present = np.flatnonzero(tools[at]).tolist() or [-1]
            frames[str(at)] = [
                [7, one, 1, -1, -1, -1, -1, 0, 0, -1, -1, -1, -1, -1, int(phases[at])] for one in present
            ]
        frames["4"], phases[4], tools[4] = [], -1, -1  # a frame without action triplets has no phase
        content = {"video": number, "fps": 1, "num_frames": FRAMES, "annotations": frames}
        content["categories"] = {"phase": {str(at): one for at, one in enumerate(spec.phases)}}
        images(root / f"videos/{name}", "%06d.png")
        text(root / f"labels/{name}.json", [json.dumps(content)])
        truth[name] = {"phase": phases, "tool": tools}
    return truth


@_writer("grasp")
def _grasp(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    files: dict[str, list[str]] = {"fold1": ["CASE001"], "train": ["CASE001", "CASE002"], "test": ["CASE041"]}
    steps = spec.tracks["steps"].classes
    for part, cases in files.items():
        pictures, annotations = [], []
        for case in cases:
            labels = {"phase": drawn(spec.phases, int(case[-2:])), "steps": drawn(steps, int(case[-2:]) + 1)}
            images(root / f"GraSP_1fps/frames/{case}", "%05d.jpg")
            for at in range(FRAMES):
                number = len(pictures)
                file = {"file_name": f"{case}/{at:05d}.jpg", "video_name": case, "frame_num": at}
                pictures.append({"id": number, **file, "width": 1280, "height": 800})
                classes = {"phases": _shuffled(labels["phase"][at], 11), "steps": _shuffled(labels["steps"][at], 21)}
                annotations.append({"id": number, "image_id": number, "image_name": file["file_name"], **classes})
            truth[case] = labels
        content = {
            "images": pictures,
            "annotations": annotations[::-1],
            "phases_categories": [{"id": _shuffled(at, 11), "name": one} for at, one in enumerate(spec.phases)],
            "steps_categories": [{"id": _shuffled(at, 21), "name": one} for at, one in enumerate(steps)],
        }
        text(root / f"GraSP_1fps/annotations/grasp_long-term_{part}.json", [json.dumps(content)])
    return truth


def _shuffled(number: int, count: int) -> int:
    """Return another id for each class: the class names in the file decide, not the order of ids."""
    return (int(number) * 2 + 3) % count if count % 2 else int(number)


@_writer("psi-ava")
def _psi_ava(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for part, cases in (("train", (1, 4)), ("val", (2,))):
        lines = []
        for number in cases:
            phases, steps = drawn(spec.phases, number), drawn(spec.tracks["steps"].classes, number + 1)
            images(root / f"keyframes/CASE{number:03d}", "%05d.jpg")
            rows = zip(phases, steps, strict=True)
            start = f"CASE{number:03d}"
            lines += [f"{start},{at},{at + 1},0.0,0.0,0.0,0.0,0,-1,-1,0,{b},{a}" for at, (a, b) in enumerate(rows)]
            truth[start] = {"phase": phases, "steps": steps}
        text(root / f"psi-ava_extended/fold1/annotations/{part}.csv", lines)
        text(root / f"psi-ava/fold1/annotations/{part}.csv", lines[::5])
    return truth


# ---------------------------------------------------------------------------------------------- starts and intervals


@_writer("cataract-101")
def _cataract_101(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    lines = ["VideoID;FrameNo;Phase"]
    for number in (269, 270, 1001):
        phases = drawn(spec.phases, number)
        phases[:2], phases[-1] = -1, phases[-2]
        lines += [f"{number};{first};{one + 1}" for first, _, one in runs(phases) if one >= 0]
        video(root / f"videos/case_{number}.mp4")
        truth[f"case_{number}"] = {"phase": phases}
    number, _, phase = lines[-1].split(";")
    lines.append(f"{number};{FRAMES - 1};{phase}")  # the same phase may be annotated twice in a row
    text(root / "annotations.csv", lines)
    text(root / "videos.csv", ["VideoID;Frames;FPS;Surgeon;Experience", "269;10;25;1;2"])
    text(root / "phases.csv", ["Phase;Meaning", "5;Phacoemulsificiation"])
    return truth


@_writer("cataract-1k")
def _cataract_1k(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for number in (4687, 4863):
        phases = drawn(spec.phases, number)
        phases[:2] = 0  # idle
        spelled = {**dict(enumerate(spec.phases)), 7: "Capsule Pulishing", 10: "Viscoelastic_Suction"}
        rows = [
            f"{number},{spelled[one]},{first},{stop},{first / 25:.2f},{stop / 25:.2f}"
            for first, stop, one in runs(phases)[::-1]
            if one > 0
        ]
        video(root / f"videos/case_{number}.mp4")
        folder = root / f"annotations/case_{number}"
        header = "caseId,comment,frame,endFrame,sec,endSec"
        empty = f"{number},Viscoelastic_Suction,3,3,0.12,0.12"  # as in case_5063
        text(folder / f"case_{number}_annotations_phases.csv", [header, *rows, empty])
        text(folder / f"case_{number}_video.csv", ["id,width,height,frames,fps", f"{number},64,48,10,240"])
        truth[f"case_{number}"] = {"phase": phases}
    return truth


@_writer("jigsaws")
def _jigsaws(root: Path, spec: DataSetSpec) -> Truth:
    truth: Truth = {}
    for seed, (task, trial) in enumerate((("Suturing", "B001"), ("Suturing", "C001"), ("Knot_Tying", "B001"))):
        name, gestures = f"{task}_{trial}", drawn(spec.phases, seed)
        gestures[[0, -1]] = -1
        for camera in (1, 2):
            video(root / task / f"video/{name}_capture{camera}.avi", fps=30)
        lines = [f"{first + 1} {stop} G{one + 1} " for first, stop, one in runs(gestures) if one >= 0]
        text(root / task / f"transcriptions/{name}.txt", lines)
        text(root / task / f"kinematics/AllGestures/{name}.txt", ["0.1 0.2 0.3"])
        truth[name] = {"phase": gestures}
    return truth


def _bypass(root: Path, spec: DataSetSpec, hospital: str, names: Sequence[str]) -> Truth:
    truth: Truth = {}
    folder = root / "labels" / hospital / "labels_by70"
    for name in names:
        phases, steps = drawn(spec.phases, int(name[-2:])), drawn(spec.tracks["steps"].classes, int(name[-2:]) + 1)
        phases[:2] = steps[:2] = -1
        rows: dict[str, list[dict[str, object]]] = {}
        for key, labels, classes in (("phases", phases, spec.phases), ("steps", steps, spec.tracks["steps"].classes)):
            rows[key] = [
                {"start": first * 40, "end": stop * 40, "label_name": classes[one], "label_id": one}
                for first, stop, one in runs(labels)
                if one >= 0
            ]
        rows["phases"].insert(1, {"start": 90, "end": 170, "label_name": "out_of_body", "label_id": 12})
        rows["phases"].append({"start": 0, "end": 60, "label_name": "severe_index", "label_id": 13})
        text(folder / f"{name}.mp4.json", [json.dumps(rows)])
        video(root / f"{'BernBypass70' if name[0] == 'B' else 'StrasBypass70'}/videos/{name}.mp4")
        truth[name] = {"phase": phases, "steps": steps}
    for part, file in (("train", "train/1fps_100_0"), ("val", "val/1fps_0"), ("test", "test/1fps_0")):
        listed = {"train": names[:1], "val": names[1:2], "test": names[2:]}[part]
        row = {"Frame_id": "BBP03_00000005", "Original_frame_id": 4, "Phase_gt": 0, "Step_gt": 2}
        path = root / f"labels/{hospital}/labels_by70_splits/labels/{file}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps({name: [row] * 3 for name in listed}))
    return truth


@_writer("strasbypass70")
def _strasbypass70(root: Path, spec: DataSetSpec) -> Truth:
    return _bypass(root, spec, "strasbourg", ("SBP01", "SBP09", "SBP70"))


@_writer("bernbypass70")
def _bernbypass70(root: Path, spec: DataSetSpec) -> Truth:
    return _bypass(root, spec, "bern", ("BBP01", "BBP03", "BBP70"))


@_writer("multibypass140")
def _multibypass140(root: Path, spec: DataSetSpec) -> Truth:
    return _strasbypass70(root, spec) | _bernbypass70(root, spec)
