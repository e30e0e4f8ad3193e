"""The effect of each option of each command in each mode: it is passed on or refused (tests/test_options.py).

`python -m tests.options_table` writes docs/options.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click

from pipeline import cli

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "options.md"
SETTINGS = {"--config": "own.yaml", "--set": "runs=elsewhere"}  # own.yaml: other runs, seed and data set
RUN = {**SETTINGS, "--name": "other"}
READING = {
    "--ground-truth": "truth2",
    "--fps": "25",
    "--prediction-fps": "25",
    "--background": "idle",
    "--skip-first-row": "",
    "--phase-order": "mtrcnet",
    "--allow-missing": "",
}
WEIGHTS = ["--set", "cnn.weights=own.pth"]
PREDICT = {**RUN, "--inference": "clip", "--decoding": "causal", "--out": "a #b", "--video": "", "--as": "eaf"}
EXTRACT = {**RUN, "--devices": "2", "--shard": "1/2", "--index": "a #b"}
NEW_VIDEOS = "live.new_videos:predict_new_videos"
PAIR = ("live.nets:pair_of_stages", NEW_VIDEOS)
STREAM = {**RUN, "--inference": "clip", "--decoding": "causal", "--speed": "max", "--raw": "8x8@25", "--give-up": "3"}
STREAM |= {f"--{name}": "a #b" for name in ("jsonl", "csv", "record", "dump-input", "state", "report")}
STREAMING = ("live.sources.open:open_source_named", "live.stream:run_stream")
EXPORT_MODEL = "live.export.model_file:export_model"
EXPORTING = {**RUN, "RUN": "net", "--out": "x.onnx", "--force": "", "--inference": "clip"}
MATRIX = {"--matrix": ""}
WITHOUT_MATRIX = {"--mapping": "cataract", "--csv": "x.csv", "--html": "x.html"}
COMPARE = ("evaluation.comparison:compare_models",)
SUBMIT = {
    "--partition": "p",
    "--gpus-per-node": "1",
    "--nodes": "2",
    "--cpus-per-task": "3",
    "--mem-gb": "3",
    "--time": "30",
    "--slurm": "account=x",
    "--max-requeues": "3",
}
CONVERT = {"--from": "csv", "--dataset": "x", "--track": "x", "--annotator": "x", "--fps": "25", "--force": ""}
IMPORT = "interop.feature_files.importing:import_features"
IMPORTING = {
    **SETTINGS,
    "--format": "mstcn",
    "--fps": "25",
    "--every": "25",
    "--labels": "none",
    "--phase-order": "mtrcnet",
    "--layout": "DT",
    "--key": "features",
    "--encoder": "resnet50 of fold 1",
}
POSITIONAL = {"models", "arguments", "sources"}  # arguments of any number
INTRODUCTION = """# Options

The effect of each option in each mode of a command: it has one (`yes`), is `refused` in one line with exit code 2, or
is `given`, because it selects the mode. Written by `python -m tests.options_table` from the table whose rows
`tests/test_options.py` verifies. What depends on the contents of files is refused when they are read: `--inference` for
a head without a state, `--phase-order` and `--probabilities` for files without numbered phases or tools,
`--ground-truth` if every model is an evaluated run.
"""
INITIAL = [*WEIGHTS, "--set", "extract.encoder=initial"]
JOINT = ["--model", "joint"]


@dataclass(frozen=True)
class Mode:
    """One mode of a command. `words` select it; options among them are not tried again.

    Of the other options, those in `does` reach `work` (module:function; the last one ends the command), and those in
    `refused` are errors.
    """

    command: str
    name: str
    words: list[str]
    work: tuple[str, ...]
    does: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


VIEW = {"--show": "x.csv", "--dataset": "x", "--live": "x.jsonl", "--port": "8800", "--no-browser": ""}
VIEWING = ("live.view.serve:open_material", "live.view.serve:serve")

MODES = [
    Mode("config show", "always", [], ("configs.load:to_yaml",), SETTINGS),
    Mode("doctor", "always", [], ("commands.doctor.settings:diagnose",), SETTINGS),
    Mode(
        "index",
        "find videos",
        [],
        ("features.dataset.catalogue:index_dataset",),
        {
            **SETTINGS,
            "--root": "a #b",
            "--out": "on",
            "--force": "",
            "--unverified": "",
            "--phase-order": "mtrcnet",
            "--check": "",
            "--from-pickle": "x.pkl",
            "--to-pickle": "x.pkl",
        },
        {"--labels-to": "x", "--layout": "test", "--phases-only": ""},
    ),
    Mode(
        "index",
        "--check",
        ["--check"],
        ("features.dataset.catalogue:check_dataset",),
        {**SETTINGS, "--root": "2024", "--out": "a: b"},
        {
            "--force": "",
            "--unverified": "",
            "--from-pickle": "x.pkl",
            "--labels-to": "x",
            "--to-pickle": "x.pkl",
            "--layout": "test",
            "--phases-only": "",
            "--phase-order": "mtrcnet",
        },
    ),
    Mode(
        "index",
        "--from-pickle",
        ["--from-pickle", "x.pkl"],
        ("interop.pickled_index:index_from_pickles", "interop.pickled_index:pickle_from_index"),
        {
            **SETTINGS,
            "--root": "~",
            "--out": "on",
            "--force": "",
            "--unverified": "",
            "--labels-to": "x",
            "--to-pickle": "y.pkl",
            "--phase-order": "mtrcnet",
        },
        {"--check": "", "--layout": "test", "--phases-only": ""},
    ),
    Mode(
        "index",
        "--to-pickle",
        ["--to-pickle", "x.pkl"],
        ("interop.pickled_index:index_from_pickles", "interop.pickled_index:pickle_from_index"),
        {
            **SETTINGS,
            "--root": "[x]",
            "--from-pickle": "y.pkl",
            "--out": "on",
            "--force": "",
            "--unverified": "",
            "--layout": "test",
            "--phases-only": "",
            "--phase-order": "mtrcnet",
        },
        {"--check": "", "--labels-to": "x"},
    ),
    Mode(
        "train-cnn",
        "weights of this project",
        [],
        ("stage1_cnn.train:train_cnn",),
        {**RUN, "--devices": "2"},
        {"--trusted": ""},
    ),
    Mode(
        "train-cnn",
        "weights of a file",
        WEIGHTS,
        ("stage1_cnn.train:train_cnn",),
        {**RUN, "--devices": "2", "--trusted": ""},
    ),
    Mode(
        "extract",
        "a trained encoder",
        [],
        ("stage1_cnn.extract:extract",),
        {**EXTRACT, "--from-joint": "net", "--encoder": "resnet18"},
        {"--trusted": "", "--weights": "x.pth"},
    ),
    Mode(
        "extract",
        "weights of a file",
        INITIAL,
        ("stage1_cnn.extract:extract",),
        {**EXTRACT, "--trusted": "", "--from-joint": "net", "--encoder": "resnet18"},
        {"--weights": "x.pth"},
    ),
    Mode(
        "extract",
        "--encoder",
        ["--encoder", "resnet18"],
        ("stage1_cnn.extract:extract",),
        {**EXTRACT, "--weights": "x.pth"},
        {"--trusted": "", "--from-joint": "net"},
    ),
    Mode(
        "train-tools",
        "always",
        [],
        ("stage2_temporal.tool_probe:train_tools",),
        {**RUN, "--features": "a #b"},
    ),
    Mode(
        "train-temporal",
        "always",
        [],
        ("stage2_temporal.train:train_temporal",),
        {**RUN, "--devices": "2", "--features": "a #b", "--from-joint": "net"},
    ),
    Mode(
        "ablate",
        "features of a run",
        ["hidden"],
        ("stage2_temporal.ablation.run:ablate",),
        {
            "--base": "own.yaml",
            "--set": "seed=3",
            "--name": "other",
            "--features": "a #b",
            "--run": "b",
            "--workers": "2",
        },
    ),
    Mode(
        "ablate",
        "--features",
        ["hidden", "--features", "folder"],
        ("stage2_temporal.ablation.run:ablate",),
        {"--base": "own.yaml", "--set": "seed=3", "--name": "other", "--workers": "2"},
        {"--run": "b"},
    ),
    Mode(
        "compare-encoders",
        "weights of this project",
        ["encoders"],
        ("stage2_temporal.ablation.encoders:compare",),
        {"--base": "own.yaml", "--set": "seed=3", "--name": "other", "--workers": "2"},
        {"--trusted": ""},
    ),
    Mode(
        "compare-encoders",
        "weights of a file",
        ["encoders of a file.yaml", "--name", "own"],
        ("stage2_temporal.ablation.encoders:compare",),
        {"--base": "mini", "--set": "seed=3", "--workers": "2", "--trusted": ""},
    ),
    Mode(
        "train-joint",
        "weights of this project",
        [],
        ("stage2_temporal.joint.train:train_joint",),
        {**RUN, "--devices": "2", "--from-cnn": "a", "--from-temporal": "b", "--from-joint": "c"},
        {"--trusted": ""},
    ),
    Mode(
        "train-joint",
        "weights of a file",
        WEIGHTS,
        ("stage2_temporal.joint.train:train_joint",),
        {**RUN, "--devices": "2", "--from-cnn": "a", "--from-temporal": "b", "--from-joint": "c", "--trusted": ""},
    ),
    Mode(
        "train-joint",
        "--from-cnn",
        [*WEIGHTS, "--from-cnn", "a"],
        ("stage2_temporal.joint.train:train_joint",),
        {**RUN, "--devices": "2", "--from-temporal": "b", "--from-joint": "c"},
        {"--trusted": ""},
    ),
    Mode(
        "evaluate",
        "stage two",
        [],
        ("stage2_temporal.evaluate:evaluate_run",),
        {
            **RUN,
            "--features": "a #b",
            "--predictions": "theirs|--ground-truth|truth",
            "--model": "joint",
            "--inference": "clip",
            "--decoding": "causal",
            "--split": "val",
            "--index": "a #b",
            "--mapping": "cataract",
        },
        {**READING, "--convention": "pooled", "--json": "x.json"},
    ),
    Mode(
        "evaluate",
        "a joint net",
        JOINT,
        ("stage2_temporal.joint.evaluate:evaluate_joint",),
        {**RUN, "--inference": "clip", "--split": "val", "--index": "a #b", "--mapping": "cataract"},
        {
            **READING,
            "--features": "x",
            "--convention": "pooled",
            "--json": "x.json",
            "--predictions": "theirs",
            "--decoding": "causal",
        },
    ),
    Mode(
        "evaluate",
        "--predictions",
        ["--predictions", "theirs", "--ground-truth", "truth"],
        ("evaluation.external:evaluate_folder",),
        {
            "--config": "own.yaml",
            "--set": "data.dataset=m2cai16-workflow",
            **{option: value for option, value in READING.items() if option != "--ground-truth"},
            "--convention": "pooled",
            "--json": "x.json",
            "--split": "test",
        },
        {"--name": "x", "--features": "x", "--model": "joint", "--inference": "clip", "--index": "x.json"}
        | {"--mapping": "cataract", "--decoding": "causal"},
    ),
    Mode(
        "predict",
        "a trained encoder",
        ["video.mp4"],
        PAIR,
        {**PREDICT, "--model": "joint", "--from-cnn": "a", "--from-joint": "b"},
        {"--trusted": ""},
    ),
    Mode(
        "predict",
        "weights of a file",
        ["video.mp4", *INITIAL],
        PAIR,
        {**PREDICT, "--model": "joint", "--from-joint": "b", "--trusted": ""},
        {"--from-cnn": "a"},
    ),
    Mode(
        "predict",
        "--from-joint",
        ["video.mp4", "--from-joint", "b"],
        PAIR,
        PREDICT,
        {"--model": "joint", "--from-cnn": "a", "--trusted": ""},
    ),
    Mode(
        "predict",
        "a joint net",
        ["video.mp4", *JOINT],
        ("live.nets:joint_net", NEW_VIDEOS),
        {option: value for option, value in PREDICT.items() if option != "--decoding"},
        {"--from-cnn": "a", "--from-joint": "b", "--trusted": "", "--decoding": "causal"},
    ),
    Mode(
        "stream",
        "two stages",
        ["video.mp4"],
        ("live.nets:pair_of_stages", *STREAMING),
        {**STREAM, "--model": "joint", "--from-cnn": "a", "--from-joint": "b"},
        {"--trusted": ""},
    ),
    Mode(
        "stream",
        "a joint net",
        ["video.mp4", *JOINT],
        ("live.nets:joint_net", *STREAMING),
        {option: value for option, value in STREAM.items() if option != "--decoding"},
        {"--from-cnn": "a", "--from-joint": "b", "--trusted": "", "--decoding": "causal"},
    ),
    Mode(
        "export-model",
        "a trained encoder",
        ["--format", "onnx"],
        (PAIR[0], EXPORT_MODEL),
        {**EXPORTING, "--decoding": "causal", "--model": "joint", "--from-cnn": "a", "--from-joint": "b"},
        {"--trusted": ""},
    ),
    Mode(
        "export-model",
        "weights of a file",
        ["--format", "onnx", *INITIAL],
        (PAIR[0], EXPORT_MODEL),
        {**EXPORTING, "--decoding": "causal", "--model": "joint", "--from-joint": "b", "--trusted": ""},
        {"--from-cnn": "a"},
    ),
    Mode(
        "export-model",
        "a joint net",
        ["--format", "onnx", *JOINT],
        ("live.nets:joint_net", EXPORT_MODEL),
        EXPORTING,
        {"--from-cnn": "a", "--from-joint": "b", "--trusted": "", "--decoding": "causal"},
    ),
    Mode(
        "import-checkpoint",
        "always",
        ["net.pth", "--name", "new"],
        ("interop.mtrcnet_runs:import_original",),
        {
            **SETTINGS,
            "--phase-order": "mtrcnet",
            "--normalisation": "main",
            "--variant": "cl",
            "--into": "net",
            "--trusted": "",
        },
    ),
    Mode(
        "export-checkpoint",
        "always",
        ["net", "out"],
        ("interop.mtrcnet_runs:export_original",),
        {**SETTINGS, "--phase-order": "mtrcnet", "--prefix-module": ""},
    ),
    Mode(
        "export",
        "a run",
        [],
        ("interop.text_files:export_run",),
        {
            **RUN,
            "RUN": "other",
            "--from-predictions": "x.pkl",
            "--split": "val",
            "--out": "x",
            "--probabilities": "",
            "--force": "",
        },
        {
            "--tools-from": "y.pkl",
            "--index": "i.json",
            "--sequence": "4",
            "--fill-first": "",
            "--phase-order": "mtrcnet",
        },
    ),
    Mode(
        "export",
        "--from-predictions",
        ["--from-predictions", "x.pkl"],
        ("interop.text_files:export_predictions",),
        {
            **SETTINGS,
            "--split": "val",
            "--out": "x",
            "--probabilities": "",
            "--force": "",
            "--tools-from": "y.pkl",
            "--index": "a #b",
            "--sequence": "4",
            "--fill-first": "",
            "--phase-order": "mtrcnet",
        },
        {"RUN": "other", "--name": "other"},
    ),
    Mode(
        "compare",
        "runs",
        ["a", "b"],
        COMPARE,
        {**SETTINGS, "--split": "val", "--track": "a", "--convention": "pooled", "--metric": "f1", "--json": "x.json"}
        | MATRIX,
        {option: value for option, value in READING.items() if option != "--ground-truth"}
        | {"--ground-truth": "truth", **WITHOUT_MATRIX},
    ),
    Mode(
        "compare",
        "folders of predictions",
        ["theirs", "others", "--ground-truth", "truth"],
        COMPARE,
        {
            **SETTINGS,
            **{option: value for option, value in READING.items() if option != "--ground-truth"},
            "--convention": "pooled",
            "--metric": "f1",
            "--json": "x.json",
        },
        {"--split": "val", "--track": "a", "--matrix": "", **WITHOUT_MATRIX},
    ),
    Mode(
        "compare",
        "both",
        ["theirs", "a", "--ground-truth", "truth"],
        COMPARE,
        {
            **SETTINGS,
            **{option: value for option, value in READING.items() if option != "--ground-truth"},
            "--split": "val",
            "--convention": "pooled",
            "--metric": "f1",
            "--json": "x.json",
        },
        {"--track": "a", "--matrix": "", **WITHOUT_MATRIX},
    ),
    Mode(
        "compare",
        "--matrix",
        ["a", "b", "--matrix"],
        ("evaluation.matrix:show_matrix",),
        {
            **SETTINGS,
            "--split": "val",
            "--track": "a",
            "--mapping": "cataract",
            "--convention": "pooled",
            "--metric": "f1",
            "--json": "x.json",
            "--csv": "x.csv",
            "--html": "x.html",
        },
        {**READING},
    ),
    Mode(
        "report",
        "always",
        ["a"],
        ("commands.report_runs:report_runs",),
        {"--split": "val", "--out": "x.html", "--figures": "x", "--no-thumbnails": ""},
    ),
    Mode("run", "always", [], ("commands.run:run_all",), RUN),
    Mode("submit", "extract", ["extract", "--dry-run"], (), SUBMIT | {"--array": "3"}),
    Mode("submit", "another stage", ["train-cnn", "--dry-run"], (), SUBMIT, {"--array": "3"}),
    Mode("submit", "for real", ["train-cnn"], ("commands.slurm:submit",), SUBMIT | {"--array": "3", "--dry-run": ""}),
    Mode(
        "simulate",
        "always",
        ["out"],
        ("features.simulation.write:simulate",),
        {
            "--videos": "3",
            "--seed": "3",
            "--fps": "3",
            "--width": "32",
            "--height": "32",
            "--speed-up": "3",
            "--first": "3",
            "--workers": "3",
        },
    ),
    Mode(
        "encoders list",
        "always",
        [],
        ("commands.encoder_lines:encoder_records", "commands.encoder_lines:encoder_rows"),
        {"--json": ""},
    ),
    Mode("encoders info", "always", ["resnet50"], ("commands.encoder_lines:encoder_lines",)),
    Mode("datasets list", "always", [], ("features.dataset.describe:dataset_rows",)),
    Mode("datasets show", "always", ["cholec80"], ("features.dataset.describe:dataset_lines",)),
    Mode(
        "datasets check",
        "always",
        ["cholec80", "--root", "."],
        ("features.dataset.trial:Trial",),
        {**SETTINGS, "--videos": "3"},
    ),
    Mode(
        "annotations convert",
        "labelstudio",
        ["a.csv", "out", "--to", "labelstudio"],
        ("interop.annotations:convert_files",),
        {**CONVERT, "--media": "x", "--index": "x.json"},
    ),
    Mode(
        "annotations convert",
        "another format",
        ["a.csv", "out", "--to", "eaf"],
        ("interop.annotations:convert_files",),
        {**CONVERT, "--index": "x.json"},
        {"--media": "x"},
    ),
    Mode(
        "annotations convert",
        "--index",
        ["a.csv", "out", "--to", "labelstudio", "--index", "x.json"],
        ("interop.annotations:convert_files",),
        {**{option: value for option, value in CONVERT.items() if option != "--fps"}, "--media": "x"},
        {"--fps": "25"},
    ),
    Mode(
        "view",
        "to look",
        ["v.mp4"],
        VIEWING,
        {**VIEW, "--run": "a", "--labels": "x"},
        {"--split": "val", "--annotator": "anna"},
    ),
    Mode(
        "view",
        "--run",
        ["--run", "a"],
        VIEWING,
        {**VIEW, "--split": "val", "--labels": "x"},
        {"--annotator": "anna"},
    ),
    Mode(
        "view",
        "--labels",
        ["v.mp4", "--labels", "x"],
        VIEWING,
        {**VIEW, "--annotator": "anna", "--run": "a"},
        {"--split": "val"},
    ),
    Mode(
        "annotations review",
        "always",
        ["a"],
        ("evaluation.review:review_run",),
        {"--split": "val", "--min-confidence": "0.7", "--top": "3", "--as": "eaf", "--out": "x"},
    ),
    Mode("features verify", "always", ["folder"], ("features.store_folder:verify_folder",)),
    Mode("features info", "always", ["folder"], ("features.store_folder:describe_folder",)),
    Mode(
        "features import",
        "without an index",
        ["theirs", "--out", "a #b"],
        (IMPORT,),
        {**IMPORTING, "--dataset": "autolaparo", "--split": "split1", "--index": "x.json"},
    ),
    Mode(
        "features import",
        "--index",
        ["theirs", "--out", "a #b", "--index", "x.json"],
        (IMPORT,),
        IMPORTING,
        {"--dataset": "autolaparo", "--split": "split1"},
    ),
    Mode(
        "features export",
        "--to mstcn",
        ["folder", "out", "--to", "mstcn"],
        ("interop.feature_files.export:export_features",),
        {"--unlabelled": "idle", "--force": ""},
    ),
    Mode(
        "features export",
        "--to npz",
        ["folder", "out", "--to", "npz"],
        ("interop.feature_files.export:export_features",),
        {"--force": ""},
        {"--unlabelled": "idle"},
    ),
]


def options_of(command: click.Command) -> list[click.Parameter]:
    """The options of a command, and its arguments that may be left out."""
    optional = [one for one in command.params if isinstance(one, click.Option) or not one.required]
    return [parameter for parameter in optional if parameter.name not in POSITIONAL]


def spelled(parameter: click.Parameter) -> str:
    """An option as it is written on the command line, an argument by its name."""
    if isinstance(parameter, click.Argument):
        return str(parameter.metavar or parameter.name).strip("[]")
    return max(parameter.opts, key=len)


def commands(group: click.Group = cli, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command with its name, subcommands included."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def document() -> str:
    """docs/options.md."""
    text = [INTRODUCTION]
    for name, command in commands():
        modes = [mode for mode in MODES if mode.command == name]
        if not options_of(command):
            continue
        text += [f"## {name}", "", "| option | " + " | ".join(mode.name for mode in modes) + " | what it does |"]
        text += ["|" + "---|" * (len(modes) + 2)]
        for parameter in options_of(command):
            option, cells = spelled(parameter), []
            for mode in modes:
                cells.append("refused" if option in mode.refused else "yes" if option in mode.does else "given")
            told = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
            text += [f"| `{option}` | " + " | ".join(cells) + f" | {told} |"]
        text += [""]
    return "\n".join(text)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
